"""The masked training loop on MONAI's engines: batches with masks, autocast on any device, and the trainer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.engines import PrepareBatch, SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.inferers import SimpleInferer
from monai.transforms import Compose
from monai.utils import CommonKeys as Keys
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from . import parallel
from .data import case_seed
from .masking import patchify, random_masking, valid_patches

__all__ = [
    "AutocastInferer",
    "ConductorTrainer",
    "MAETrainer",
    "NonFiniteLossError",
    "PrepareMaskedBatch",
    "PrepareWholeBatch",
    "autocast_dtype",
]

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the message names the volumes of the batch."""


def autocast_dtype(precision: str, device: str | torch.device) -> torch.dtype | None:
    """Choose the type to compute in.

    Args:
        precision: ``fp32``, ``bf16``, ``fp16``, or ``auto``: bfloat16 where the device has instructions for it.
        device: that the network runs on.

    Returns:
        A type for autocast, or None to compute in float32.

    Raises:
        ValueError: for another ``precision``.
    """
    if precision in PRECISIONS:
        return PRECISIONS[precision]
    if precision != "auto":
        raise ValueError(f"precision {precision!r} must be one of {('auto', *PRECISIONS)}")
    device = torch.device(device)
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)  # from Ampere on
    else:
        # Bfloat16 is emulated, and slow, on CPUs that lack these.
        fast = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if fast else None


class AutocastInferer(SimpleInferer):
    """MONAI's SimpleInferer under autocast, on any device (MONAI's engines autocast on CUDA alone).

    Args:
        precision: see :func:`autocast_dtype`.
        device: that the network runs on.
    """

    def __init__(self, precision: str, device: str | torch.device) -> None:
        super().__init__()
        self.device_type = torch.device(device).type
        self.dtype = autocast_dtype(precision, device)

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run ``network(inputs, *args, **kwargs)``."""
        if self.dtype is None:
            return super().__call__(inputs, network, *args, **kwargs)
        # Every weight is used once: a cache of the cast ones would only hold memory.
        with torch.autocast(self.device_type, dtype=self.dtype, cache_enabled=False):
            return super().__call__(inputs, network, *args, **kwargs)


class PrepareWholeBatch(PrepareBatch):
    """Turn a batch of the data loader into the network's arguments, with nothing masked.

    Args:
        patch_size: P, in voxels.
    """

    def __init__(self, patch_size: int) -> None:
        self.patch_size = patch_size

    def __call__(
        self, batchdata: dict[str, Any], device: str | torch.device | None = None, non_blocking: bool = False, **_: Any
    ) -> tuple[Tensor, Tensor, tuple, dict]:
        """Return the volume ``(B, C, D, H, W)`` and the target patches ``(B, N, P³·C)``.

        The target is the volume itself, or ``target`` where the batch has one: a volume whose intensities were not
        augmented.
        """
        volume = batchdata[Keys.IMAGE].to(device, non_blocking=non_blocking)
        target = batchdata["target"].to(device, non_blocking=non_blocking) if "target" in batchdata else volume
        return volume, patchify(target, self.patch_size), (), {}


class PrepareMaskedBatch(PrepareWholeBatch):
    """Turn a batch of the data loader into the network's arguments, with a mask drawn from each volume's seed.

    Training draws come with a seed of their own; that of a validation case follows from its name. So the mask is new
    at every draw in training, and the same at every epoch in validation.

    Args:
        patch_size: P, in voxels.
        mask_ratio: share of the valid patches to hide, in (0, 1).
        seed: of the run.
        min_valid_share: where the batch has a ``fov`` ``(B, 1, D, H, W)``, a patch is valid when more of its voxels lie
            inside.
        augmentation: of the input alone, the target stays as it is: a transform of ``{"image": (C, D, H, W)}``, applied
            to each volume of a training batch on the network's device, and seeded by the volume's seed.

    Raises:
        ValueError: for another ``mask_ratio``.
    """

    def __init__(
        self,
        patch_size: int,
        mask_ratio: float,
        seed: int = 0,
        min_valid_share: float = 0.95,
        augmentation: Sequence[Callable] | None = None,
    ) -> None:
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask_ratio {mask_ratio} must lie in (0, 1) to train on, for example 0.75")
        super().__init__(patch_size)
        self.mask_ratio, self.seed, self.min_valid_share = mask_ratio, seed, min_valid_share
        self.augmentation = Compose(augmentation) if augmentation else None

    def __call__(
        self,
        batchdata: dict[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, tuple, dict[str, Tensor]]:
        """Return the volume ``(B, C, D, H, W)``, the target patches ``(B, N, P³·C)``, and the masks by keyword."""
        volume, target, *_ = super().__call__(batchdata, device, non_blocking, **kwargs)
        if "seed" in batchdata:
            seeds = batchdata["seed"].tolist()
        else:
            seeds = [case_seed(case, self.seed) for case in batchdata["case"]]
        if self.augmentation is not None:
            volume = torch.stack([self._augmented(*pair) for pair in zip(volume, seeds, strict=True)])
        if "fov" not in batchdata:
            masked = random_masking(torch.ones(target.shape[:2], dtype=torch.bool), self.mask_ratio, seeds)
            return volume, target, (), {"masked": masked.to(device, non_blocking=non_blocking)}
        valid = valid_patches(batchdata["fov"].to(device), self.patch_size, self.min_valid_share)
        masked = random_masking(valid, self.mask_ratio, seeds)
        return volume, target, (), {"masked": masked, "valid_for_masking_mask": valid}

    def _augmented(self, volume: Tensor, seed: int) -> Tensor:
        self.augmentation.set_random_state(seed=seed % 2**32)
        return self.augmentation({Keys.IMAGE: volume})[Keys.IMAGE]


class MAETrainer(SupervisedTrainer):
    """MONAI's SupervisedTrainer with the masked loss, any device's autocast, clipping and a rate by step.

    Beside what MONAI's leaves in ``state.output``, there are ``components``: what the loss is made of.

    Args:
        lr_scheduler: stepped after every optimiser step; default: a constant rate.
        clip_norm: largest norm of the whole gradient; default: no clipping.
        kwargs: of :class:`monai.engines.SupervisedTrainer`. ``loss_function`` gets the network's output and the
            target patches; ``inferer`` is an :class:`AutocastInferer`.
    """

    def __init__(
        self,
        *,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        clip_norm: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**{"decollate": False, "optim_set_to_none": True, **kwargs})
        self.lr_scheduler, self.clip_norm = lr_scheduler, clip_norm
        self.is_stepping = False  # while weights are neither those before the optimiser's step nor those after it
        # Half precision alone needs its gradients scaled. MONAI's own `scaler` is rebuilt at every run.
        scale = getattr(self.inferer, "dtype", None) == torch.float16
        self.grad_scaler = torch.amp.GradScaler(self.state.device.type, enabled=scale)

    def _iteration(self, engine: MAETrainer, batchdata: dict[str, Any]) -> dict[str, Any]:
        """Do one iteration; every ``accumulation_steps`` of them, and at the end of an epoch, step the optimiser."""
        volume, target, args, kwargs = engine.prepare_batch(batchdata, engine.state.device, engine.non_blocking)
        place = (engine.state.iteration - 1) % engine.state.epoch_length
        is_last = (place + 1) % engine.accumulation_steps == 0 or place + 1 == engine.state.epoch_length
        engine.network.train()
        if place % engine.accumulation_steps == 0:
            engine._start_gradient()
        engine.state.output = {Keys.IMAGE: volume, Keys.LABEL: target}
        with engine._synchronising(is_last):
            prediction = engine.inferer(volume, engine.network, *args, **kwargs)
            engine.state.output[Keys.PRED] = prediction
            engine.fire_event(IterationEvents.FORWARD_COMPLETED)
            loss = engine._score(prediction, target)
            engine.state.output[Keys.LOSS] = loss
            engine.state.output["components"] = getattr(engine.loss_function, "last_components", {})
            engine.fire_event(IterationEvents.LOSS_COMPLETED)
            engine._refuse_if_any(None if torch.isfinite(loss) else f"the loss is {loss.item()}")
            engine._backward(loss)
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        if is_last:
            engine.is_stepping = True
            engine._step()
            engine.is_stepping = False
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return engine.state.output

    def _synchronising(self, is_last: bool) -> contextlib.AbstractContextManager:
        """Let gradients be averaged over the ranks at the last of the accumulated ones only."""
        if isinstance(self.network, FSDPModule):
            self.network.set_requires_gradient_sync(is_last)
        wait = isinstance(self.network, DistributedDataParallel) and not is_last
        return self.network.no_sync() if wait else contextlib.nullcontext()

    def _start_gradient(self) -> None:
        self.optimizer.zero_grad(set_to_none=self.optim_set_to_none)

    def _score(self, prediction: Any, target: Tensor) -> Tensor:
        return self.loss_function(prediction, target)

    def _backward(self, loss: Tensor) -> None:
        self.grad_scaler.scale(loss / self.accumulation_steps).backward()

    def _step(self) -> None:
        self.grad_scaler.unscale_(self.optimizer)
        self._clip()
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()

    def _clip(self) -> None:
        limit = math.inf if self.clip_norm is None else self.clip_norm
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), limit)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # With half precision an overflow is no mistake: the scaler skips the step and scales less.
        if not torch.isfinite(norm) and not self.grad_scaler.is_enabled():
            self._refuse_if_any(f"the gradient's norm is {norm.item()}")

    def _refuse_if_any(self, what: str | None) -> None:
        """End the run in all ranks if anything is wrong in one of them."""
        state = self.state
        if what is not None:
            what = (
                f"{what} in epoch {state.epoch}, iteration {state.iteration}, on {', '.join(state.batch['case'])}: "
                "look at these volumes, or lower learning_rate"
            )
        if (problem := parallel.first_problem(what, state.device)) is not None:
            raise NonFiniteLossError(problem)


class ConductorTrainer(MAETrainer):
    """The trainer that drives a GradientConductor: one gradient a task, accumulated, merged, clipped and applied.

    The tasks are those of the loss (:meth:`~bertswin_mae.losses.SumOfLosses.tasks`): every component of it, or every
    one of several losses. Each takes a backward pass of its own.

    Args:
        kwargs: of :class:`MAETrainer`, whose ``optimizer`` is a
            :class:`~bertswin_mae.optimizers.GradientConductor`.

    Raises:
        ValueError: for half precision, whose scaled gradients cannot be weighed against each other; for a network that
            is divided among the ranks; for a loss without tasks.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not hasattr(self.loss_function, "tasks"):
            raise ValueError(
                "the conductor takes the losses of pre-training: train_conductor.yaml goes with train.yaml"
            )
        if any(isinstance(parameter, DTensor) for parameter in self.network.parameters()):
            raise ValueError("the conductor weighs whole gradients: it goes with --parallel ddp, not fsdp")
        if self.grad_scaler.is_enabled():
            raise ValueError("the conductor weighs gradients, which fp16 scales: choose --precision bf16 or fp32")

    def _synchronising(self, is_last: bool) -> contextlib.AbstractContextManager:
        return super()._synchronising(is_last=False)

    def _start_gradient(self) -> None:
        self.task_gradients: dict[str, list[Tensor]] = {}

    def _score(self, prediction: Any, target: Tensor) -> Tensor:
        self.task_losses = self.loss_function.tasks(prediction, target)
        return torch.stack(list(self.task_losses.values())).sum()

    def _backward(self, loss: Tensor) -> None:
        parameters = self.optimizer.param_groups[0]["params"]
        left = len(self.task_losses)
        for task, part in self.task_losses.items():
            left -= 1
            # `grad` leaves `.grad` alone, and with it the hooks by which DistributedDataParallel would average: the
            # conductor averages each task over the ranks itself, before it judges.
            gradients = torch.autograd.grad(part / self.accumulation_steps, parameters, retain_graph=left > 0)
            so_far = self.task_gradients.get(task, [0.0] * len(parameters))
            self.task_gradients[task] = [sums + new.float() for sums, new in zip(so_far, gradients, strict=True)]

    def _step(self) -> None:
        self.optimizer.merge(self.task_gradients)
        self._clip()
        self.optimizer.step()
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
