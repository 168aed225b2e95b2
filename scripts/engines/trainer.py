"""The masked training loop on MONAI's SupervisedTrainer."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from functools import cached_property
from typing import Any, NamedTuple

import ignite.distributed as idist
import torch
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys as Keys
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from .. import parallel
from ..mistakes import Mistake

__all__ = ["MAETrainer", "NonFiniteLossError"]


# Of the CPU, of CUDA outside of torch's own memory, of cuBLAS and cuDNN.
IS_FULL = ("DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory", "ALLOC_FAILED")


class NonFiniteLossError(Mistake):
    """The loss became NaN or infinite; the message names the volumes of the batch."""


class _Step(NamedTuple):
    """What there is to know of an optimiser step, to tell whether it was sound."""

    figures: Tensor  # on the CPU, once `ready`: the gradient's norm, and the loss of each iteration
    ready: torch.cuda.Event | None
    place: str
    cases: list[list[str]]  # of each iteration

    def problem(self, scaled: bool) -> str | None:
        """Tell what is not finite, and on what volumes; of gradients that are ``scaled`` that is no mistake.

        With half precision they may overflow: the scaler skips the step and scales less.
        """
        norm, *losses = self.figures.tolist()
        found = [
            (f"the loss is {loss}", cases)
            for loss, cases in zip(losses, self.cases, strict=True)
            if not math.isfinite(loss)
        ]
        if not (math.isfinite(norm) or scaled):
            found.append((f"the gradient's norm is {norm}", [case for cases in self.cases for case in cases]))
        if not found:
            return None
        what, cases = found[0]
        return f"{what} in {self.place}, on {', '.join(cases)}: look at these volumes, or lower learning_rate"


class MAETrainer(SupervisedTrainer):
    """MONAI's SupervisedTrainer with the masked loss, any device's autocast, clipping and a rate by step.

    A loss or gradient that is not finite ends the run at the step that it is part of. To look at them, the CPU would
    have to wait for a GPU at every step. With a fused optimiser, which leaves the weights alone then, it looks two
    steps later.

    Args:
        lr_scheduler: stepped after every optimiser step; default: a constant rate.
        clip_norm: largest norm of the whole gradient; default: no clipping.
        kwargs: of :class:`monai.engines.SupervisedTrainer`. ``loss_function`` gets the network's output and the target
            patches, and may have a ``score`` that also returns what the loss is made of, for ``state.output``;
            ``inferer`` is an :class:`AutocastInferer`.
    """

    def __init__(
        self, *, lr_scheduler: LRScheduler | None = None, clip_norm: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**{"decollate": False, "optim_set_to_none": True, **kwargs})
        self.lr_scheduler, self.clip_norm = lr_scheduler, clip_norm
        self.is_stepping = False  # while weights are neither those before the optimiser's step nor those after it
        # Half precision alone needs its gradients scaled. MONAI's own `scaler` is rebuilt at every run.
        scale = getattr(self.inferer, "dtype", None) == torch.float16
        self.grad_scaler = torch.amp.GradScaler(self.state.device.type, enabled=scale)
        self.watched: deque[_Step] = deque()

    @cached_property
    def lag(self) -> int:
        """How many steps later a step is looked at."""
        fused = all(group.get("fused") for group in self.optimizer.param_groups)  # also of one that was resumed
        return 2 if fused and self.state.device.type == "cuda" and not self.grad_scaler.is_enabled() else 0

    def _iteration(self, engine: MAETrainer, batchdata: dict[str, Any]) -> dict[str, Any]:
        """Do one iteration; every ``accumulation_steps`` of them, and at the end of an epoch, step the optimiser."""
        try:
            return self._iterate(engine, batchdata)
        except RuntimeError as error:  # all but the first kind are any error
            if not isinstance(error, torch.OutOfMemoryError) and not any(text in str(error) for text in IS_FULL):
                raise
            batch = len(batchdata[Keys.IMAGE])
            smaller = "lower batch_size and raise accumulation_steps by the same factor, which trains alike, or "
            raise Mistake(
                f"out of memory on {self.state.device} in epoch {self.state.epoch}, iteration {self.state.iteration}, "
                f"with a batch of {batch}: {smaller if batch > 1 else ''}set --activation_checkpointing true, or "
                "choose a smaller img_size"
            ) from error

    def _iterate(self, engine: MAETrainer, batchdata: dict[str, Any]) -> dict[str, Any]:
        state = engine.state
        volume, target, args, kwargs = engine.prepare_batch(batchdata, state.device, engine.non_blocking)
        place = (state.iteration - 1) % state.epoch_length
        is_last = (place + 1) % engine.accumulation_steps == 0 or place + 1 == state.epoch_length
        engine.network.train()
        if place % engine.accumulation_steps == 0:
            engine._start_gradient()
            engine.step_losses, engine.step_cases = [], []
        state.output = {Keys.IMAGE: volume, Keys.LABEL: target}
        with engine._synchronising(is_last):
            prediction = state.output[Keys.PRED] = engine.inferer(volume, engine.network, *args, **kwargs)
            engine.fire_event(IterationEvents.FORWARD_COMPLETED)
            loss, components = engine._score(prediction, target)
            state.output[Keys.LOSS] = loss
            state.output["components"] = {name: component.detach() for name, component in components.items()}
            engine.fire_event(IterationEvents.LOSS_COMPLETED)
            engine.step_losses.append(loss.detach())
            engine.step_cases.append(batchdata["case"])
            engine._backward(loss)
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        if is_last:
            engine.is_stepping = True
            engine._step()
            engine.is_stepping = False
            # Before anything is validated or saved, all steps are known to be sound.
            engine.check_steps(0 if place + 1 == state.epoch_length else engine.lag)
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return state.output

    def _synchronising(self, is_last: bool) -> contextlib.AbstractContextManager:
        """Let gradients be averaged over the ranks at the last of the accumulated ones only."""
        if isinstance(self.network, FSDPModule):
            self.network.set_requires_gradient_sync(is_last)
        wait = isinstance(self.network, DistributedDataParallel) and not is_last
        return self.network.no_sync() if wait else contextlib.nullcontext()

    def _start_gradient(self) -> None:
        self.optimizer.zero_grad(set_to_none=self.optim_set_to_none)

    def _score(self, prediction: Any, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if hasattr(self.loss_function, "score"):
            return self.loss_function.score(prediction, target)
        return self.loss_function(prediction, target), {}

    def _backward(self, loss: Tensor) -> None:
        self.grad_scaler.scale(loss / self.accumulation_steps).backward()

    def _step(self) -> None:
        self.grad_scaler.unscale_(self.optimizer)
        limit = math.inf if self.clip_norm is None else self.clip_norm
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), limit)
        self._watch(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()

    def _watch(self, norm: Tensor) -> None:
        """Note what tells whether this step is sound, and end the run before it where nothing has to be waited for."""
        state = self.state
        figures = torch.stack([norm, *self.step_losses]).float().to("cpu", non_blocking=True)
        ready = torch.cuda.Event() if norm.is_cuda else None
        if ready is not None:
            ready.record(torch.cuda.current_stream(norm.device))
        place = f"epoch {state.epoch}, iteration {state.iteration}"
        self.watched.append(_Step(figures, ready, place, self.step_cases))
        if self.lag:
            self.optimizer.found_inf = (~torch.isfinite(norm)).float()  # then the weights stay as they are
        else:
            self.check_steps(0)

    def check_steps(self, lag: int = 0) -> None:
        """End the run, in all ranks, if a step that lies some steps back was not sound in one of them."""
        while len(self.watched) > lag:
            step = self.watched.popleft()
            if step.ready is not None:
                step.ready.synchronize()
            scaled = self.grad_scaler.is_enabled()
            # Ranks share the gradient, so that all of them see in it that one has a problem, and ask.
            asked = scaled or idist.get_world_size() == 1 or not step.figures[0].isfinite()
            if asked and (problem := parallel.first_problem(step.problem(scaled))) is not None:
                raise NonFiniteLossError(problem)
