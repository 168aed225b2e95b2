"""Which voxels the scanner saw, and which belong to the body."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy import ndimage

from ..mistakes import Mistake

__all__ = ["FieldOfViewd", "ForegroundMaskd", "cylinder", "detect_field_of_view"]

MIN_PADDING = 0.01  # less than this share of a volume is no padding


def cylinder(
    shape: Sequence[int], radius: float, centre_offset: Sequence[float] = (0.0, 0.0), axis: int = 2
) -> np.ndarray:
    """Mark the cylinder that a cone-beam CT images (paper, field of view) in a bool array of a shape ``(D, H, W)``.

    It runs along the whole ``axis``. Its radius, and the offset of its centre from that of the volume along the two
    other axes, are in voxels.
    """
    places = np.ogrid[tuple(slice(side) for side in shape)]
    across = zip([other for other in range(3) if other != axis], centre_offset, strict=True)
    squares = [np.square(places[other] - (shape[other] - 1) / 2 - offset) for other, offset in across]
    return np.broadcast_to(sum(squares) <= radius**2, shape).copy()


def detect_field_of_view(volume: np.ndarray) -> np.ndarray:
    """Find what a scanner saw of a volume ``(C, D, H, W)``: all but the constant padding around it.

    Padding has the commonest value of the volume's corners, exactly, and hangs together with the border. So constant
    regions within the body stay inside, and air that is not constant does too. Give the volume as stored: resampling
    blurs the border. The answer is a bool array ``(D, H, W)``, all True where there is no padding.
    """
    corners = volume[np.ix_(range(len(volume)), *[[0, -1]] * 3)].reshape(len(volume), -1)  # (C, 8)
    values, counts = np.unique(corners, axis=1, return_counts=True)
    differs = (volume != values[:, counts.argmax()].reshape(-1, 1, 1, 1)).any(axis=0)
    inside = ndimage.binary_fill_holes(differs)
    return np.ones_like(inside) if (~inside).mean() < MIN_PADDING else inside


class FieldOfViewd(MapTransform):
    """Mark the voxels that the scanner saw, in a mask ``fov``, ``(1, D, H, W)`` uint8 (paper, field of view).

    It is the cylinder that the case's ``field_of_view`` describes, by the arguments of :func:`cylinder` in voxels and
    axes of the file; or else what is not constant padding. Put it behind ``EnsureChannelFirstd``, before anything is
    resampled. Volumes are MetaTensors ``(C, D, H, W)``.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with the mask."""
        data = dict(data)
        for key in self.key_iterator(data):
            image, given = data[key], data.get("field_of_view")
            inside = detect_field_of_view(np.asarray(image)) if given is None else cylinder(image.shape[1:], **given)
            if given is not None and not inside.any():
                raise Mistake(f"the field of view {given} has no voxel of {tuple(image.shape[1:])} in it")
            data["fov"] = _mask_like(image, inside)
        return data


class ForegroundMaskd(MapTransform):
    """Mark the voxels of the body, in a mask ``fov``, ``(1, D, H, W)`` uint8.

    The body is what is above a threshold in any channel, with the holes of every axial slice filled: lungs and gut gas
    belong to it. Put it behind ``Orientationd`` to RAS; the threshold is on the scale that the volume has there.
    """

    def __init__(self, keys: KeysCollection, threshold: float) -> None:
        super().__init__(keys)
        self.threshold = threshold

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with the mask."""
        data = dict(data)
        for key in self.key_iterator(data):
            above = (np.asarray(data[key]) > self.threshold).any(axis=0)
            slices = [ndimage.binary_fill_holes(plane) for plane in np.moveaxis(above, -1, 0)]
            data["fov"] = _mask_like(data[key], np.stack(slices, axis=-1))
        return data


def _mask_like(image: Any, inside: np.ndarray) -> MetaTensor:
    """Make a mask ``(1, D, H, W)`` uint8 that lies where the volume does."""
    return MetaTensor(torch.from_numpy(inside.astype(np.uint8))[None], affine=image.affine.clone())
