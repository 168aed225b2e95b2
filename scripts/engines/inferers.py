"""Inferers under autocast on any device, for crops and for volumes of any size."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from monai.inferers import SimpleInferer, SlidingWindowInferer
from torch import Tensor

from ..mistakes import Mistake

__all__ = ["AutocastInferer", "FeatureWindowInferer", "LogitsInferer", "LogitsWindowInferer", "autocast_dtype"]

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_dtype(precision: str, device: str | torch.device) -> torch.dtype | None:
    """Choose the type to compute in.

    Args:
        precision: ``fp32``, ``bf16``, ``fp16``, or ``auto``: bfloat16 where the device has instructions for it.
        device: that the network runs on.

    Returns:
        A type for autocast, or None to compute in float32.

    Raises:
        Mistake: for another ``precision``.
    """
    if precision in PRECISIONS:
        return PRECISIONS[precision]
    if precision != "auto":
        raise Mistake(f"precision {precision!r} must be one of {('auto', *PRECISIONS)}")
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


class FeatureWindowInferer(SlidingWindowInferer):
    """MONAI's sliding window for networks whose output is coarser than their input, under autocast.

    Windows start on patch borders, so that overlapping windows agree on where a token is; they are blended with
    Gaussian weights and gathered on the CPU, so that the device holds one batch of windows at a time.

    Args:
        window_size: the network's ``img_size``, in voxels.
        patch_size: P, in voxels.
        overlap: share of a window that its neighbour covers too, in [0, 1); rounded to whole patches.
        batch_size: windows at once.
        precision: see :func:`~bertswin_mae.engines.autocast_dtype`.
        device: that the network runs on.

    Raises:
        Mistake: for an overlap outside [0, 1).
    """

    def __init__(
        self,
        window_size: Sequence[int],
        patch_size: int,
        overlap: float = 0.5,
        batch_size: int = 1,
        precision: str = "auto",
        device: str | torch.device = "cpu",
    ) -> None:
        if not 0 <= overlap < 1:
            raise Mistake(f"overlap {overlap} must lie in [0, 1), for example 0.5")
        steps = (max(1, round(side / patch_size * (1 - overlap))) * patch_size for side in window_size)
        super().__init__(
            roi_size=tuple(window_size),
            sw_batch_size=batch_size,
            # MONAI turns this into whole voxels again, rounding down: half a voxel more is safe.
            overlap=[max(0.0, 1 - (step + 0.5) / side) for step, side in zip(steps, window_size, strict=True)],
            mode="gaussian",
            sw_device=device,
            device="cpu",
            progress=sys.stderr.isatty(),
        )
        self.autocast = AutocastInferer(precision, device)

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Slide over ``(1, C, D, H, W)``; a tuple of maps must come finest first."""

        def predict(window: Tensor) -> Any:
            output = self.autocast(window, network, *args, **kwargs)
            return tuple(part.float() for part in output) if isinstance(output, tuple) else output.float()

        with torch.no_grad():
            return super().__call__(inputs, predict)


class LogitsInferer(AutocastInferer):
    """Autocast, and logits in float32: a Dice over thousands of voxels needs more than half precision."""

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Map ``(B, C, D, H, W)`` to logits."""
        return super().__call__(inputs, network, *args, **kwargs).float()


class LogitsWindowInferer(LogitsInferer):
    """MONAI's sliding window under autocast, for volumes of any size.

    Windows are on the device a batch at a time; volumes and logits are gathered in main memory.

    Args:
        window_size: the network's ``img_size``, in voxels.
        overlap: share of a window that its neighbour covers too, in [0, 1).
        batch_size: windows at once.
        background: what volumes smaller than a window are padded with.
        precision: see :func:`~bertswin_mae.engines.autocast_dtype`.
        device: that the network runs on.
    """

    def __init__(
        self,
        window_size: list[int],
        overlap: float,
        batch_size: int,
        background: float,
        precision: str,
        device: str | torch.device,
    ) -> None:
        super().__init__(precision, device)
        self.windows = SlidingWindowInferer(
            window_size, batch_size, overlap, mode="gaussian", cval=background, sw_device=device, device="cpu"
        )

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Map a volume ``(B, C, D, H, W)`` to logits of the same size."""
        return super().__call__(inputs.cpu(), partial(self.windows, network=network), *args, **kwargs)
