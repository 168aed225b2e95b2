"""Refusing volumes that cannot be used, with the reason."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform

from ..data.checks import resampled_shape, voxel_problem
from ..mistakes import Mistake

__all__ = ["RefuseHuged", "RefuseUnusabled"]


class RefuseUnusabled(MapTransform):
    """Refuse volumes that :func:`~bertswin_mae.data.check_cases` would refuse before training; arguments as there.

    They are not 3D, constant, not finite, or not in Hounsfield units for a CT. Put it behind ``EnsureChannelFirstd``.
    """

    def __init__(self, keys: KeysCollection, modality: str, in_chans: int = 1) -> None:
        super().__init__(keys)
        self.modality, self.in_chans = modality, in_chans

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data as it is, or raise a Mistake that says why a volume cannot be used."""
        for key in self.key_iterator(data):
            if problem := voxel_problem(np.asarray(data[key]), self.modality, self.in_chans):
                raise Mistake(problem)
        return dict(data)


class RefuseHuged(MapTransform):
    """Refuse volumes that resampling to a spacing (mm, or None) would make larger than memory should hold.

    They are MetaTensors ``(C, D, H, W)``; ``max_voxels`` counts all channels together.
    """

    def __init__(self, keys: KeysCollection, spacing: Sequence[float] | None, max_voxels: int) -> None:
        super().__init__(keys)
        self.spacing, self.max_voxels = spacing, max_voxels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data as it is, or raise a Mistake that says how large a volume would be."""
        for key in self.key_iterator(data):
            shape = resampled_shape(data[key], self.spacing)
            if (voxels := data[key].shape[0] * shape.prod()) > self.max_voxels:
                size = f"{voxels:.3g} voxels {tuple(shape.astype(int).tolist())}"
                most = f"at a spacing of {self.spacing or 'its own'}: max_voxels is {self.max_voxels:.3g}"
                raise Mistake(f"would have {size} {most}; choose a coarser spacing")
        return dict(data)
