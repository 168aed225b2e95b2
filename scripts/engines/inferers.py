"""Inferers under autocast on any device, for crops and for volumes of any size."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.data.utils import dense_patch_slices
from monai.inferers import SimpleInferer, SlidingWindowInferer
from torch import Tensor

from ..mistakes import Mistake

__all__ = ["AutocastInferer", "FeatureWindowInferer", "LogitsInferer", "LogitsWindowInferer", "MeanWindowInferer"]
__all__ += ["autocast_dtype"]

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_dtype(precision: str, device: str | torch.device) -> torch.dtype | None:
    """Choose the type for autocast on a device, None for float32.

    ``precision`` is ``fp32``, ``bf16``, ``fp16``, or ``auto``: bfloat16 where the device has instructions for it.
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


class LogitsInferer(AutocastInferer):
    """Autocast, and logits in float32: a Dice over thousands of voxels needs more than half precision."""

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Map ``(B, C, D, H, W)`` to logits."""
        return super().__call__(inputs, network, *args, **kwargs).float()


class MeanWindowInferer(LogitsInferer):
    """Average what a network says of each of the windows that cover a volume, which is no smaller than a window.

    Arguments are those of :class:`WindowInferer`.
    """

    def __init__(
        self, window_size: Sequence[int], overlap: float, batch_size: int, precision: str, device: str | torch.device
    ) -> None:
        super().__init__(precision, device)
        self.window_size, self.batch_size = tuple(window_size), batch_size
        self.steps = [max(1, int(side * (1 - overlap))) for side in window_size]

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Map ``(B, C, D, H, W)`` to ``(B, K)``, the mean over windows."""
        places = dense_patch_slices(inputs.shape[2:], self.window_size, self.steps)
        answers = []
        for first in range(0, len(places), self.batch_size):
            windows = [inputs[(..., *place)] for place in places[first : first + self.batch_size]]
            answers.append(super().__call__(torch.cat(windows), network, *args, **kwargs))
        return torch.cat(answers).unflatten(0, (len(places), -1)).mean(dim=0)  # window by window


class WindowInferer(SlidingWindowInferer):
    """MONAI's sliding window under autocast, for volumes of any size.

    The device holds one batch of windows at a time. Their outputs are blended with Gaussian weights, in float32, and
    gathered on the CPU.

    Args:
        window_size: the network's ``img_size``, in voxels.
        overlap: share of a window that its neighbour covers too, in [0, 1); or one for each axis.
        batch_size: windows at once.
        precision, device: see :class:`AutocastInferer`.
        settings: of :class:`monai.inferers.SlidingWindowInferer`.
    """

    def __init__(
        self,
        window_size: Sequence[int],
        overlap: float | Sequence[float] = 0.5,
        batch_size: int = 1,
        precision: str = "auto",
        device: str | torch.device = "cpu",
        **settings: Any,
    ) -> None:
        settings |= {"mode": "gaussian", "sw_device": device, "device": "cpu"}
        super().__init__(tuple(window_size), batch_size, overlap, **settings)
        self.precision, self.autocast = precision, AutocastInferer(precision, device)

    def to(self, device: str | torch.device) -> "WindowInferer":
        """Go where the network went."""
        self.sw_device, self.autocast = device, AutocastInferer(self.precision, device)
        return self

    @torch.no_grad()
    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Slide over ``(B, C, D, H, W)``; a tuple of maps must come finest first."""

        def predict(window: Tensor) -> Any:
            output = self.autocast(window, network, *args, **kwargs)
            return tuple(part.float() for part in output) if isinstance(output, tuple) else output.float()

        return super().__call__(inputs.cpu(), predict)


class LogitsWindowInferer(WindowInferer):
    """Slide a segmentation network; volumes smaller than a window are padded with ``background``."""

    def __init__(self, *, background: float, **settings: Any) -> None:
        super().__init__(cval=background, **settings)


class FeatureWindowInferer(WindowInferer):
    """Slide a network whose output is coarser than its input over a volume of whole patches.

    Windows start on patch borders, so that overlapping windows agree on where a token is.

    Args:
        patch_size: P, in voxels.
        overlap: rounded to whole patches; must lie in [0, 1).
        window_size, settings: of :class:`WindowInferer`.
    """

    def __init__(self, window_size: Sequence[int], patch_size: int, overlap: float = 0.5, **settings: Any) -> None:
        if not 0 <= overlap < 1:
            raise Mistake(f"overlap {overlap} must lie in [0, 1), for example 0.5")
        steps = (max(1, round(side / patch_size * (1 - overlap))) * patch_size for side in window_size)
        # MONAI turns an overlap into whole voxels again, rounding down: half a voxel more is safe.
        overlaps = [max(0.0, 1 - (step + 0.5) / side) for step, side in zip(steps, window_size, strict=True)]
        super().__init__(window_size, overlaps, progress=sys.stderr.isatty(), **settings)
