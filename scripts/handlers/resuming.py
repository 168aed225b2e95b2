"""A run that can end at any moment and go on as if it had not: locked, saved, preempted, resumed by one handler."""

import logging
import math
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from filelock import FileLock, Timeout
from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from .. import parallel
from ..mistakes import Mistake
from ..weights import checkpoints, encoder_part, fill, write_record

__all__ = ["TRAINING_STATE", "Checkpointing", "end_when_preempted", "lock_folders"]

logger = logging.getLogger(__name__)

TRAINING_STATE = "training_state.pt"


def lock_folders(folders: Sequence[str | Path], patience: float = 10) -> list[FileLock]:
    """Refuse to train where another run is training; wait some seconds for one that is ending.

    The locks, which are returned, are the operating system's: they end with the process, however that ends.
    """
    locks = [FileLock(Path(folder) / ".lock", timeout=patience) for folder in sorted(set(map(str, folders)))]
    for lock in locks:
        folder = Path(lock.lock_file).parent
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise Mistake(
                f"another run is writing to {folder}: wait for its end, or choose another --output_dir"
            ) from error
    return locks


@dataclass(eq=False)
class Checkpointing:
    """Lock the output, resume, keep the best network and the last state, and end when the machine is taken away.

    Attach to an :class:`~bertswin_mae.engines.MAETrainer` before all other handlers, which then see the run that it
    continues. What must come behind them it puts there itself, when the run starts.

    Writes, each whole or not at all, ``model.pt`` (the network of the best validation, flat) and
    ``training_state.pt`` (everything it needs to go on as if the run had not stopped); the one before stays as
    ``training_state.previous.pt``. On SIGTERM the run saves and ends, without an error, after the iteration it
    is in, or, with several ranks, after the validation.
    """

    ckpt_dir: str | Path  # where checkpoints go
    validator: Engine  # which knows the best metric and its epoch
    network: nn.Module  # what to save
    resume: bool = False  # continue from what is there; a folder without a state starts anew
    save_encoder: bool = False  # also write the best network's `encoder` alone, to encoder.pt
    about: dict[str, Any] = field(default_factory=dict)  # settings, plain values, that a resumed run must share
    folders: Sequence[str | Path] = ()  # that the run writes to, to be locked
    record: dict[str, Any] | None = None  # of the weights' origin, to be completed and written beside them as JSON

    def __post_init__(self) -> None:
        self.folder, self.preempted, self.is_first = Path(self.ckpt_dir), False, idist.get_rank() == 0

    def attach(self, engine: Engine) -> None:
        """Follow a trainer."""
        self.trainer = engine
        engine.add_event_handler(Events.STARTED, self.begin)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.end_after_exception)
        self.validator.add_event_handler(Events.ITERATION_COMPLETED, self.end_before_validation)

    def begin(self, engine: Engine) -> None:
        """Lock, restore, listen; the rest comes behind the handlers that are attached by now."""
        self.locks = lock_folders(self.folders if self.is_first else ())
        if self.resume:
            self.restore(engine)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.request_end)
        # Raising ends what is done about an error: that comes last.
        engine.remove_event_handler(self.end_after_exception, Events.EXCEPTION_RAISED)
        for event, handler in (
            (Events.STARTED, self.finish_start),
            (Events.ITERATION_COMPLETED, self.end_within_epoch),
            (Events.EPOCH_COMPLETED, self.save),
            (Events.EPOCH_COMPLETED, self.end_between_epochs),
            (Events.COMPLETED, self.unlock),
            (Events.EXCEPTION_RAISED, self.end_after_exception),
        ):
            if not engine.has_event_handler(handler, event):
                engine.add_event_handler(event, handler)

    def unlock(self) -> None:
        """Let another run write to the folders."""
        for lock in self.locks:
            lock.release()

    def finish_start(self, engine: Engine) -> None:
        """Keep an untrained network that was validated; finish an epoch that ended before its validation."""
        state = engine.state
        if state.iteration == self.validator.state.best_metric_epoch == 0:
            self.save(engine)  # it may turn out to be the best
        if state.epoch < state.max_epochs and state.iteration == (state.epoch + 1) * state.epoch_length:
            state.epoch += 1
            engine.fire_event(Events.EPOCH_STARTED)
            engine.fire_event(Events.EPOCH_COMPLETED)

    def save(self, engine: Engine) -> None:
        """Write the checkpoints of this epoch."""
        network = self._whole_network()
        if self.validator.state.best_metric_epoch == engine.state.epoch and self.is_first:
            self._save_weights(network, "model")
            if self.save_encoder:
                self._save_weights(encoder_part(network), "encoder")
        self._save_state(engine, network, engine.state.epoch, engine.state.iteration)

    def _save_weights(self, weights: dict[str, Tensor], name: str) -> None:
        path, state = self.folder / f"{name}.pt", self.validator.state
        if self.record is not None:
            metrics = {name: value for name, value in state.metrics.items() if isinstance(value, int | float)}
            network = getattr(self.network, "settings", {})
            about = {"format": 1, "network": network, "metrics": {"epoch": state.best_metric_epoch, **metrics}}
            write_record(about | self.record, path)
        checkpoints.save(weights, path)

    def save_within_epoch(self, engine: Engine) -> None:
        """Write the state after the last optimiser step, in the middle of an epoch or before its validation."""
        engine.check_steps()  # what is saved is sound
        state, length = engine.state, engine.state.epoch_length
        epochs = state.epoch - 1
        done = state.iteration - epochs * length
        if done < length:
            done -= done % engine.accumulation_steps  # gradients that wait for their step are computed again
        self._save_state(engine, self._whole_network(), epochs, epochs * length + done)

    def _whole_network(self) -> dict[str, Tensor]:
        # What is divided among the ranks, all of them put together; one writes.
        return get_model_state_dict(self.network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def _save_state(self, engine: Engine, network: dict[str, Tensor], epochs: int, iteration: int) -> None:
        optimizer = parallel.full_tensors(engine.optimizer.state_dict())
        done = iteration - epochs * engine.state.epoch_length
        losses = _over_ranks(getattr(engine.state, "epoch_losses", [])[:done])
        if not self.is_first:
            return
        best, length = self.validator.state, engine.state.epoch_length
        state = {
            "about": self.about,
            "epoch": epochs,
            "iteration": iteration,
            "epoch_length": length,
            # What the MetricsRecorder has noted of the epoch.
            "epoch_losses": losses,
            "learning_rate": getattr(engine.state, "learning_rate", None),
            "best_metric": best.best_metric,
            "best_metric_epoch": best.best_metric_epoch,
            "network": network,
            "optimizer": optimizer,
            "grad_scaler": engine.grad_scaler.state_dict(),
        }
        checkpoints.save(state, self.folder / TRAINING_STATE, keep_previous=True)

    def restore(self, engine: Engine) -> None:
        """Bring network, optimiser, rate, counters and the best metric back."""
        path = self.folder / TRAINING_STATE
        saved = checkpoints.load_newest(path, keep_aside=self.is_first)
        found = parallel.gather(saved and saved["iteration"])
        if len(set(found)) > 1:
            raise Mistake(
                f"the ranks find different states in {self.folder} (iterations {found}): the folder must be one that "
                "all of them share"
            )
        if saved is None:
            return
        for name, value in self.about.items():
            if saved["about"].get(name, value) != value:  # an earlier version may not have noted it
                raise Mistake(
                    f"{path} is of a run with {name} {saved['about'].get(name)!r}, not {value!r}: continue it as it "
                    "was, or choose another --output_dir"
                )
        fill(self.network, saved["network"], path)
        _restore_optimizer(engine.optimizer, saved["optimizer"])
        if saved["grad_scaler"]:  # empty of a run in another precision
            engine.grad_scaler.load_state_dict(saved["grad_scaler"])
        done = _restore_place(engine, saved)
        best, state = self.validator.state, engine.state
        best.best_metric, best.best_metric_epoch = saved["best_metric"], saved["best_metric_epoch"]
        where = f" and {done} of {state.epoch_length} iterations" if done else ""
        logger.info("continuing from %s after epoch %d%s of %d", path, state.epoch, where, state.max_epochs)
        if state.epoch >= state.max_epochs:
            logger.info("nothing is left to do: a larger max_epochs trains on")

    def request_end(self, *_: Any) -> None:
        """Ask for the end: what SIGTERM does."""
        self.preempted = True

    def end_within_epoch(self, engine: Engine) -> None:
        """Save and end after an iteration; after the last one, the validation comes first."""
        if engine.state.iteration % engine.state.epoch_length and parallel.any_rank(self.preempted):
            self._end(engine, within_epoch=True)

    def end_before_validation(self, validator: Engine) -> None:
        """Save and end in the middle of a validation: it is done again."""
        # Several ranks may have validation volumes in different numbers: they go on to the end.
        if self.preempted and idist.get_world_size() == 1 and self.trainer.state.epoch > 0:
            self._end(self.trainer, within_epoch=True)

    def end_between_epochs(self, engine: Engine) -> None:
        """End after the epoch, which is saved."""
        if parallel.any_rank(self.preempted) and engine.state.epoch < engine.state.max_epochs:
            self._end(engine, within_epoch=False)

    def end_after_exception(self, engine: Engine, error: BaseException) -> None:
        """End without an error when the signal killed the data loader's processes too."""
        if not self.preempted or isinstance(error, SystemExit) or idist.get_world_size() > 1:
            raise error
        # Within an optimiser step the weights are neither those before nor those after it; before the first epoch
        # there is nothing to save.
        self._end(engine, within_epoch=engine.state.epoch > 0 and not engine.is_stepping)

    def _end(self, engine: Engine, within_epoch: bool) -> None:
        if within_epoch:
            self.save_within_epoch(engine)
        logger.info("ended by SIGTERM in epoch %d; --resume true continues", engine.state.epoch)
        parallel.finish()
        sys.exit(0)


def end_when_preempted() -> None:
    """End without an error on SIGTERM while a run is being prepared: nothing is lost yet."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))


def _over_ranks(losses: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Average the losses of some iterations over the ranks, each of which has its own."""
    if idist.get_world_size() == 1 or not losses:
        return losses
    rows = torch.stack([torch.stack([*one.values()]).cpu().double() for one in losses])
    means = idist.all_reduce(rows, op="SUM") / idist.get_world_size()
    return [dict(zip(losses[0], row, strict=True)) for row in means]


def _restore_place(engine: Engine, saved: dict[str, Any]) -> int:
    """Go on at the iteration that was saved, with its rate; return how many of its epoch are done."""
    state, length, steps = engine.state, engine.state.epoch_length, engine.accumulation_steps
    # Counted in epochs, as their length may have changed with the batch size: an interrupted one starts anew then.
    done = saved["iteration"] - saved["epoch"] * saved["epoch_length"] if saved["epoch_length"] == length else 0
    state.epoch, state.iteration = saved["epoch"], saved["epoch"] * length + done
    if done:
        state.epoch_goes_on, state.epoch_losses = True, saved["epoch_losses"]
        state.learning_rate = saved["learning_rate"]
        if done < length:
            engine.data_loader.sampler.skip(done)
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.last_epoch = saved["epoch"] * math.ceil(length / steps) + math.ceil(done / steps) - 1
        with warnings.catch_warnings():  # that the first value is skipped: it is not, the schedule goes on
            warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before")
            engine.lr_scheduler.step()
    return done


def _restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Bring an optimiser's memory back, but not its settings: a resumed run may have new ones."""
    groups = [
        {**group, "params": old["params"]}
        for group, old in zip(optimizer.param_groups, state["param_groups"], strict=True)
    ]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    memory = {
        place: parallel.shard_like(values, dict.fromkeys(values, parameters[place]))
        for place, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": memory, "param_groups": groups})
