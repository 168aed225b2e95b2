"""Refusing volumes that cannot be used, with the reason."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform

from ..data.checks import resampled_shape, voxel_problem
from ..mistakes import Mistake

__all__ = ["RefuseHuged", "RefuseUnusabled"]


class _Refusing(MapTransform):
    """Hand volumes on as they are, or refuse them with the ``problem`` that they have."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data as it is, or raise a Mistake that says why a volume cannot be used."""
        for key in self.key_iterator(data):
            if problem := self.problem(data[key]):
                raise Mistake(problem)
        return dict(data)


class RefuseUnusabled(_Refusing):
    """Refuse volumes that cannot be used: not 3D, constant, not finite, or not in Hounsfield units for a CT.

    The checks are those that training makes beforehand (:func:`~bertswin_mae.data.voxel_problem`). Put it behind
    ``EnsureChannelFirstd``.

    Args:
        keys: of the volumes, ``(C, D, H, W)``.
        modality: ``ct`` or ``mr``.
        in_chans: channels a volume must have.
    """

    def __init__(self, keys: KeysCollection, modality: str, in_chans: int = 1) -> None:
        super().__init__(keys)
        self.modality, self.in_chans = modality, in_chans

    def problem(self, image: Any) -> str | None:
        """See :func:`~bertswin_mae.data.voxel_problem`."""
        return voxel_problem(np.asarray(image), self.modality, self.in_chans)


class RefuseHuged(_Refusing):
    """Refuse volumes that resampling would make larger than memory should hold, before it is tried.

    Args:
        keys: of the volumes, MetaTensors ``(C, D, H, W)``.
        spacing: that they will be resampled to, in mm; None: they stay as they are.
        max_voxels: the largest size, all channels together.
    """

    def __init__(self, keys: KeysCollection, spacing: Sequence[float] | None, max_voxels: int) -> None:
        super().__init__(keys)
        self.spacing, self.max_voxels = spacing, max_voxels

    def problem(self, image: Any) -> str | None:
        """Say how large a volume would be, if that is too large."""
        shape = resampled_shape(image, self.spacing)
        if (voxels := image.shape[0] * shape.prod()) <= self.max_voxels:
            return None
        voxels = f"{voxels:.3g} voxels {tuple(shape.astype(int).tolist())} at a spacing of {self.spacing or 'its own'}"
        return f"would have {voxels}: max_voxels is {self.max_voxels:.3g}; choose a coarser spacing"
