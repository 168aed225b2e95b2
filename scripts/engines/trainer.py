"""The masked training loop on MONAI's SupervisedTrainer."""

from __future__ import annotations

import contextlib
import math
from typing import Any

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


class NonFiniteLossError(Mistake):
    """The loss became NaN or infinite; the message names the volumes of the batch."""


class MAETrainer(SupervisedTrainer):
    """MONAI's SupervisedTrainer with the masked loss, any device's autocast, clipping and a rate by step.

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

    def _iteration(self, engine: MAETrainer, batchdata: dict[str, Any]) -> dict[str, Any]:
        """Do one iteration; every ``accumulation_steps`` of them, and at the end of an epoch, step the optimiser."""
        state = engine.state
        volume, target, args, kwargs = engine.prepare_batch(batchdata, state.device, engine.non_blocking)
        place = (state.iteration - 1) % state.epoch_length
        is_last = (place + 1) % engine.accumulation_steps == 0 or place + 1 == state.epoch_length
        engine.network.train()
        if place % engine.accumulation_steps == 0:
            engine._start_gradient()
        state.output = {Keys.IMAGE: volume, Keys.LABEL: target}
        with engine._synchronising(is_last):
            prediction = state.output[Keys.PRED] = engine.inferer(volume, engine.network, *args, **kwargs)
            engine.fire_event(IterationEvents.FORWARD_COMPLETED)
            loss, components = engine._score(prediction, target)
            state.output[Keys.LOSS] = loss
            state.output["components"] = {name: component.detach() for name, component in components.items()}
            engine.fire_event(IterationEvents.LOSS_COMPLETED)
            engine._refuse_if_any(None if torch.isfinite(loss) else f"the loss is {loss.item()}")
            engine._backward(loss)
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        if is_last:
            engine.is_stepping = True
            engine._step()
            engine.is_stepping = False
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
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # With half precision an overflow is no mistake: the scaler skips the step and scales less.
        if not torch.isfinite(norm) and not self.grad_scaler.is_enabled():
            self._refuse_if_any(f"the gradient's norm is {norm.item()}")
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()

    def _refuse_if_any(self, what: str | None) -> None:
        """End the run in all ranks if anything is wrong in one of them."""
        state = self.state
        if what is not None:
            what += f" in epoch {state.epoch}, iteration {state.iteration}, on {', '.join(state.batch['case'])}: "
            what += "look at these volumes, or lower learning_rate"
        if (problem := parallel.first_problem(what)) is not None:
            raise NonFiniteLossError(problem)
