"""Transforms that MONAI does not have, as dictionary transforms for any config."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform

from .data import voxel_problem

__all__ = ["RefuseUnusabled"]


class RefuseUnusabled(MapTransform):
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

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data as it is.

        Raises:
            ValueError: saying why a volume cannot be used.
        """
        for key in self.key_iterator(data):
            if problem := voxel_problem(np.asarray(data[key]), self.modality, self.in_chans):
                raise ValueError(problem)
        return dict(data)
