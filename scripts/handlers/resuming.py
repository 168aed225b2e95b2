"""Runs that can end at any moment and go on as if they had not: saving, preemption, resuming."""

from __future__ import annotations

import logging
import math
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from filelock import FileLock, Timeout
from ignite.engine import Engine, Events
from torch import nn

from .. import parallel
from ..mistakes import Mistake
from ..weights import checkpoints
from ..weights.pretrained import encoder_part, load_network, strip_prefixes

__all__ = [
    "TRAINING_STATE",
    "CheckpointHandler",
    "OutputLock",
    "PreemptionHandler",
    "ResumeHandler",
    "end_when_preempted",
]

logger = logging.getLogger(__name__)

TRAINING_STATE = "training_state.pt"


class OutputLock:
    """Refuse to train where another run is training: two runs in one folder would overwrite each other.

    Attach to the trainer before all others. The lock is the operating system's: it ends with the process, however that
    ends.

    Args:
        folders: that the run writes to.
        patience: seconds to wait for a run that is ending.
    """

    def __init__(self, folders: Sequence[str | Path], patience: float = 10) -> None:
        self.locks = [FileLock(Path(folder) / ".lock", timeout=patience) for folder in sorted(set(map(str, folders)))]

    def attach(self, engine: Engine) -> None:
        """Follow a trainer."""
        if parallel.rank() == 0:
            engine.add_event_handler(Events.STARTED, self.acquire)
            engine.add_event_handler(Events.COMPLETED, self.release)

    def acquire(self) -> None:
        """Take the locks, or say who has them."""
        for lock in self.locks:
            folder = Path(lock.lock_file).parent
            folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except Timeout as error:
                raise Mistake(
                    f"another run is writing to {folder}: wait for its end, or choose another --output_dir"
                ) from error

    def release(self) -> None:
        """Give the locks back."""
        for lock in self.locks:
            lock.release()


class CheckpointHandler:
    """Keep the best network and the last state of the run.

    Attach to an :class:`~bertswin_mae.engines.MAETrainer` behind the ValidationHandler and the MetricsRecorder. Writes,
    each whole or not at all, ``model.pt`` (the network of the best validation, flat) and ``training_state.pt``
    (everything that :class:`ResumeHandler` needs to go on as if the run had not stopped); the one before stays as
    ``training_state.previous.pt``.

    Args:
        ckpt_dir: where checkpoints go.
        validator: the evaluator, which knows the best metric and its epoch.
        network: what to save.
        save_encoder: also write the best network's ``encoder`` alone, to ``encoder.pt``.
        about: settings, plain values, that a resumed run must share.
    """

    def __init__(
        self,
        ckpt_dir: str | Path,
        validator: Engine,
        network: nn.Module,
        save_encoder: bool = False,
        about: dict[str, Any] | None = None,
    ) -> None:
        self.folder, self.validator, self.network, self.save_encoder = Path(ckpt_dir), validator, network, save_encoder
        self.about = about or {}

    def attach(self, engine: Engine) -> None:
        """Follow a trainer."""
        engine.checkpoint = self  # for the PreemptionHandler
        engine.add_event_handler(Events.STARTED, self.save_untrained)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def save_untrained(self, engine: Engine) -> None:
        """Keep the network as it came, if it was validated before training: it may turn out to be the best."""
        if engine.state.iteration == self.validator.state.best_metric_epoch == 0:
            self.save(engine)

    def save(self, engine: Engine) -> None:
        """Write the checkpoints of this epoch."""
        network = self._network()
        best = self.validator.state
        if best.best_metric_epoch == engine.state.epoch and parallel.rank() == 0:
            checkpoints.save(network, self.folder / "model.pt")
            if self.save_encoder:
                checkpoints.save(encoder_part(network), self.folder / "encoder.pt")
        self._save_state(engine, network, engine.state.epoch, engine.state.iteration)

    def save_within_epoch(self, engine: Engine) -> None:
        """Write the state after the last optimiser step, in the middle of an epoch or before its validation."""
        state, length = engine.state, engine.state.epoch_length
        epochs = state.epoch - 1
        done = state.iteration - epochs * length
        if done < length:
            done -= done % engine.accumulation_steps  # gradients that wait for their step are computed again
        self._save_state(engine, self._network(), epochs, epochs * length + done)

    def _network(self) -> dict[str, torch.Tensor]:
        # What is divided among the ranks, all of them put together; one writes.
        return parallel.whole(strip_prefixes(self.network.state_dict()))

    def _save_state(self, engine: Engine, network: dict[str, torch.Tensor], epochs: int, iteration: int) -> None:
        optimizer = parallel.whole(engine.optimizer.state_dict())
        if parallel.rank() != 0:
            return
        best, length = self.validator.state, engine.state.epoch_length
        state = {
            "about": self.about,
            "epoch": epochs,
            "iteration": iteration,
            "epoch_length": length,
            # What the MetricsRecorder has noted of the epoch.
            "epoch_losses": getattr(engine.state, "epoch_losses", [])[: iteration - epochs * length],
            "learning_rate": getattr(engine.state, "learning_rate", None),
            "best_metric": best.best_metric,
            "best_metric_epoch": best.best_metric_epoch,
            "network": network,
            "optimizer": optimizer,
            "grad_scaler": engine.grad_scaler.state_dict(),
        }
        checkpoints.save(state, self.folder / TRAINING_STATE, keep_previous=True)


class ResumeHandler:
    """Continue from the state that :class:`CheckpointHandler` left.

    Attach to the trainer before all handlers that look at its epoch when it starts.

    Args:
        ckpt_dir: where checkpoints are.
        validator: the evaluator.
        network: what was saved.
        resume: False leaves everything as it is, and so does a folder without a state.
        about: settings, plain values, that must be those of the run that is continued.
    """

    def __init__(
        self,
        ckpt_dir: str | Path,
        validator: Engine,
        network: nn.Module,
        resume: bool,
        about: dict[str, Any] | None = None,
    ) -> None:
        self.path, self.validator, self.network, self.resume = Path(ckpt_dir), validator, network, resume
        self.path /= TRAINING_STATE
        self.about = about or {}

    def attach(self, engine: Engine) -> None:
        """Follow a trainer."""
        if self.resume:
            engine.add_event_handler(Events.STARTED, self.restore)

    def restore(self, engine: Engine) -> None:
        """Bring network, optimiser, rate, counters and the best metric back."""
        saved = checkpoints.load_newest(self.path, keep_aside=parallel.rank() == 0)
        found = parallel.gather(saved and saved["iteration"])
        if len(set(found)) > 1:
            raise Mistake(
                f"the ranks find different states in {self.path.parent} (iterations {found}): the folder must be one "
                "that all of them share"
            )
        if saved is None:
            return
        for name, value in self.about.items():
            if saved["about"].get(name) != value:
                raise Mistake(
                    f"{self.path} is of a run with {name} {saved['about'].get(name)!r}, not {value!r}: continue it as "
                    "it was, or choose another --output_dir"
                )
        load_network(self.network, saved["network"], self.path)
        _restore_optimizer(engine.optimizer, saved["optimizer"])
        engine.grad_scaler.load_state_dict(saved["grad_scaler"])
        state, length = engine.state, engine.state.epoch_length
        # Counted in epochs, as their length may have changed with the data or the batch size; one that was interrupted
        # then starts anew.
        done = saved["iteration"] - saved["epoch"] * saved["epoch_length"] if saved["epoch_length"] == length else 0
        state.epoch, state.iteration = saved["epoch"], saved["epoch"] * length + done
        if done:
            state.epoch_goes_on, state.epoch_losses = True, saved["epoch_losses"]
            state.learning_rate = saved["learning_rate"]
            if done < length:
                engine.data_loader.sampler.skip(done)
        if engine.lr_scheduler is not None:
            steps_an_epoch = math.ceil(length / engine.accumulation_steps)
            steps = saved["epoch"] * steps_an_epoch + math.ceil(done / engine.accumulation_steps)
            engine.lr_scheduler.last_epoch = steps - 1
            engine.lr_scheduler.step()
        best = self.validator.state
        best.best_metric, best.best_metric_epoch = saved["best_metric"], saved["best_metric_epoch"]
        where = f" and {done} of {length} iterations" if done else ""
        logger.info("continuing from %s after epoch %d%s of %d", self.path, state.epoch, where, state.max_epochs)
        if state.epoch >= state.max_epochs:
            logger.info("nothing is left to do: a larger max_epochs trains on")


class PreemptionHandler:
    """Save and end, without an error, when the machine is taken away (SIGTERM).

    Attach to the trainer behind its CheckpointHandler and all others. The run ends after the iteration it is in, or,
    with several ranks, after the validation. It also finishes what an earlier preemption left of an epoch: the
    validation after its last iteration.

    Args:
        validator: the evaluator.
    """

    def __init__(self, validator: Engine) -> None:
        self.validator, self.requested = validator, False

    def attach(self, engine: Engine) -> None:
        """Follow a trainer."""
        self.trainer = engine
        engine.add_event_handler(Events.STARTED, self.listen)
        engine.add_event_handler(Events.STARTED, self.finish_epoch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.end_within_epoch)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.end_between_epochs)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.end_after_exception)
        self.validator.add_event_handler(Events.ITERATION_COMPLETED, self.end_before_validation)

    def listen(self, engine: Engine) -> None:
        """Take note of the signal from here on."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.request)

    def request(self, number: int = signal.SIGTERM, frame: FrameType | None = None) -> None:
        """Ask for the end."""
        self.requested = True

    def finish_epoch(self, engine: Engine) -> None:
        """Validate and save an epoch that was interrupted behind its last iteration."""
        state = engine.state
        if state.epoch < state.max_epochs and state.iteration == (state.epoch + 1) * state.epoch_length:
            state.epoch += 1
            engine.fire_event(Events.EPOCH_STARTED)
            engine.fire_event(Events.EPOCH_COMPLETED)

    def end_within_epoch(self, engine: Engine) -> None:
        """Save and end after an iteration; after the last one, the validation comes first."""
        if engine.state.iteration % engine.state.epoch_length and parallel.any_rank(
            self.requested, engine.state.device
        ):
            self._end(engine, within_epoch=True)

    def end_before_validation(self, validator: Engine) -> None:
        """Save and end in the middle of a validation: it is done again."""
        # Several ranks may have validation volumes in different numbers: they go on to the end.
        if self.requested and parallel.world_size() == 1 and self.trainer.state.epoch > 0:
            self._end(self.trainer, within_epoch=True)

    def end_between_epochs(self, engine: Engine) -> None:
        """End after the epoch, which is saved."""
        if parallel.any_rank(self.requested, engine.state.device) and engine.state.epoch < engine.state.max_epochs:
            self._end(engine, within_epoch=False)

    def end_after_exception(self, engine: Engine, error: BaseException) -> None:
        """End without an error when the signal killed the data loader's processes too."""
        if not self.requested or isinstance(error, SystemExit) or parallel.world_size() > 1:
            raise error
        # Within an optimiser step the weights are neither those before nor those after it.
        self._end(engine, within_epoch=not engine.is_stepping)

    def _end(self, engine: Engine, within_epoch: bool) -> None:
        if within_epoch:
            engine.checkpoint.save_within_epoch(engine)
        logger.info("ended by SIGTERM in epoch %d; --resume true continues", engine.state.epoch)
        parallel.finish()
        sys.exit(0)


def end_when_preempted() -> None:
    """End without an error on SIGTERM while a run is being prepared: nothing is lost yet."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))


def _restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Bring an optimiser's memory back, but not its settings: a resumed run may have new ones."""
    groups = [
        {**group, **{name: value for name, value in configured.items() if name != "params"}}
        for group, configured in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    memory = {
        place: parallel.placed_like(values, dict.fromkeys(values, parameters[place]))
        for place, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": memory, "param_groups": groups})
