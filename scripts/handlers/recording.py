"""Write down what a run measures."""

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events, State
from monai.utils import CommonKeys as Keys
from torch.utils.tensorboard import SummaryWriter

from ..engines.trainer import NonFiniteLossError
from ..weights import checkpoints

__all__ = ["ConductorStatistics", "MetricsRecorder"]

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class MetricsRecorder:
    """Write one line a validation to ``metrics.jsonl``, and a short one an epoch to the log.

    Attach to the trainer behind what validates. A resumed run replaces what an interrupted one had written beyond
    its last checkpoint. A validation whose key metric is not finite ends the run, before anything is saved.
    """

    path: str | Path  # of metrics.jsonl
    validator: Engine  # whose metrics are recorded
    interval: int = 1  # epochs between two validations; the last epoch is validated too
    logged: Sequence[str] | None = None  # of the figures, those in the log; default: all

    def attach(self, engine: Engine) -> None:
        """Follow a trainer."""
        engine.add_event_handler(Events.STARTED, self.record_untrained)
        engine.add_event_handler(Events.EPOCH_STARTED, self.start_epoch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.add_loss)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.record)

    def record_untrained(self, engine: Engine) -> None:
        """Write epoch 0 down, if the network was validated before training."""
        if engine.state.iteration == 0 and self.validator.state.metrics:
            self.start_epoch(engine)
            self.record(engine)

    def start_epoch(self, engine: Engine) -> None:
        """Forget the last epoch's losses; an epoch that goes on keeps its own."""
        state, self.started = engine.state, time.monotonic()
        if not getattr(state, "epoch_goes_on", False):
            state.epoch_losses, state.learning_rate = [], engine.optimizer.param_groups[0]["lr"]
        state.epoch_goes_on = False

    def add_loss(self, engine: Engine) -> None:
        """Keep an iteration's loss, and its components where there are several."""
        output = engine.state.output
        parts = output.get("components", {})
        losses = {"loss": output[Keys.LOSS].detach(), **(parts if len(parts) > 1 else {})}
        engine.state.epoch_losses.append({name: value.float() for name, value in losses.items()})  # where they are

    def record(self, engine: Engine) -> None:
        """Write the epoch down."""
        state, record = engine.state, {}
        if losses := state.epoch_losses:
            rows = [torch.stack([*loss.values()]) for loss in losses]  # on the CPU those before an interruption
            sums = torch.stack([row.to(rows[-1].device) for row in rows]).cpu().double().mean(dim=0)
            means = idist.all_reduce(sums, op="SUM") / idist.get_world_size()
            record = {f"train_{name}": mean for name, mean in zip(losses[0], means.tolist(), strict=True)}
            # The components for TensorBoard and MLflow too, which have the loss by iteration.
            state.metrics.update({name: mean for name, mean in record.items() if name != "train_loss"})
        validated = state.epoch % self.interval == 0 or state.epoch == state.max_epochs
        if validated:
            metrics = self.validator.state.metrics
            record |= {name: value for name, value in metrics.items() if isinstance(value, int | float)}
            self._refuse_non_finite(state)
        place = {"epoch": state.epoch, "iteration": state.iteration, "learning_rate": state.learning_rate}
        record = {**place, "train_loss": None, **record, "seconds": round(time.monotonic() - self.started, 3)}
        if validated and idist.get_rank() == 0:
            self._write(record)
        figures = "  ".join(
            f"{name.removeprefix('val_')} {value:.4g}"
            for name, value in record.items()
            if name.startswith(("train_", "val_")) and value is not None and name in (self.logged or record)
        )
        logger.info("epoch %d/%d  %s  %.4g s", state.epoch, state.max_epochs, figures, record["seconds"])

    def _refuse_non_finite(self, state: State) -> None:
        name = self.validator.state.key_metric_name
        value = self.validator.state.metrics.get(name, 0.0)
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"{name} is {value} after epoch {state.epoch}: training has diverged; the checkpoint of the epoch "
                "before is as it was, resume from it with a lower learning_rate"
            )

    def _write(self, record: dict[str, Any]) -> None:
        path = Path(self.path)
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if json.loads(line)["epoch"] < record["epoch"]]
        checkpoints.save_text("\n".join([*kept, json.dumps(record)]) + "\n", path)


@dataclass(eq=False)
class ConductorStatistics:
    """Write what a GradientConductor decided to TensorBoard, at every optimiser step.

    ``conductor/norm_<task>``, ``conductor/cosine_<task>_<task>`` (before merging), and over the epoch
    ``conductor/wins_<task>``: the share of the steps in which the task won a conflict.

    Attach to a :class:`~bertswin_mae.engines.ConductorTrainer`.
    """

    summary_writer: SummaryWriter

    def attach(self, engine: Engine) -> None:
        """Follow a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.start_epoch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.write)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.write_winners)

    def start_epoch(self, engine: Engine) -> None:
        """Count wins from zero."""
        self.merged, self.step, self.wins = 0, engine.optimizer.steps, Counter()

    def write(self, engine: Engine) -> None:
        """Write norms and cosines, if this iteration made a step."""
        if engine.optimizer.steps == self.step:
            return
        self.step, statistics = engine.optimizer.steps, engine.optimizer.statistics
        self.merged += 1
        self.wins.update(set(statistics["winners"]))
        for task, norm in statistics["norms"].items():
            self.summary_writer.add_scalar(f"conductor/norm_{task}", norm, self.step)
        for pair, cosine in statistics["cosines"].items():
            self.summary_writer.add_scalar(f"conductor/cosine_{'_'.join(pair)}", cosine, self.step)

    def write_winners(self, engine: Engine) -> None:
        """Write how often each task won."""
        for task in engine.optimizer.statistics["norms"] if self.merged else ():
            self.summary_writer.add_scalar(f"conductor/wins_{task}", self.wins[task] / self.merged, engine.state.epoch)
        self.summary_writer.flush()
