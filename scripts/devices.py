"""Sending small things to a device without waiting for it."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["send"]


def send(values: Tensor | np.ndarray | Sequence, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Bring values from the CPU to a device; to a GPU from pinned memory, which needs no wait for what it is doing."""
    values = torch.as_tensor(values, dtype=dtype)
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
