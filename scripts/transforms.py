"""Transforms that MONAI does not have, as dictionary transforms for any config."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, RandomizableTransform
from scipy import ndimage
from torch import Tensor

from .data import resampled_shape, voxel_problem

__all__ = [
    "FieldOfViewd",
    "ForegroundMaskd",
    "RandCTNoised",
    "RandHUWarpd",
    "RefuseHuged",
    "RefuseUnusabled",
    "cylinder",
    "detect_field_of_view",
]

# Padding smaller than this share of a volume is no padding.
MIN_PADDING = 0.01


class _Refusing(MapTransform, ABC):
    """Hand volumes on as they are, or refuse them with the reason."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data as it is.

        Raises:
            ValueError: saying why a volume cannot be used.
        """
        for key in self.key_iterator(data):
            if problem := self.problem(data[key]):
                raise ValueError(problem)
        return dict(data)

    @abstractmethod
    def problem(self, image: Any) -> str | None:
        """Say why a volume ``(C, D, H, W)`` cannot be used, or None if it can."""


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
        return (
            f"would have {voxels:.3g} voxels {tuple(shape.astype(int).tolist())} at a spacing of "
            f"{self.spacing or 'its own'}: max_voxels is {self.max_voxels:.3g}; choose a coarser spacing"
        )


def cylinder(
    shape: Sequence[int], radius: float, centre_offset: Sequence[float] = (0.0, 0.0), axis: int = 2
) -> np.ndarray:
    """Mark the cylinder that a cone-beam CT images (paper, field of view).

    Args:
        shape: D, H, W, in voxels.
        radius: in voxels.
        centre_offset: of its centre from that of the volume, in voxels, along the two other axes.
        axis: that the cylinder runs along; its whole length is inside.

    Returns:
        bool array of ``shape``, True inside.
    """
    across = [place for place in range(3) if place != axis]
    squares = np.zeros([1, 1, 1])
    for place, offset in zip(across, centre_offset, strict=True):
        line = np.arange(shape[place]) - (shape[place] - 1) / 2 - offset
        squares = squares + np.square(line).reshape([-1 if other == place else 1 for other in range(3)])
    return np.broadcast_to(squares <= radius**2, shape).copy()


def detect_field_of_view(volume: np.ndarray) -> np.ndarray:
    """Find what a scanner saw: all but the constant padding around it.

    Padding is what has the commonest value of the volume's corners, exactly, and hangs together with the border. So
    constant regions within the body stay inside, and air that is not constant does too.

    Args:
        volume: ``(C, D, H, W)``, as stored: resampling blurs the border.

    Returns:
        bool array ``(D, H, W)``, True inside; all True where there is no padding.
    """
    ends = np.ix_(range(volume.shape[0]), *([0, -1] for _ in range(3)))
    corners = volume[ends].reshape(volume.shape[0], -1)
    values, counts = np.unique(corners, axis=1, return_counts=True)
    same = (volume == values[:, counts.argmax()].reshape(-1, 1, 1, 1)).all(axis=0)
    labels, _ = ndimage.label(same)
    faces = [labels.take(end, axis=axis).ravel() for axis in range(3) for end in (0, -1)]
    touches_border = np.zeros(labels.max() + 1, dtype=bool)
    touches_border[np.unique(np.concatenate(faces))] = True
    touches_border[0] = False
    outside = touches_border[labels]
    return np.ones_like(outside) if outside.mean() < MIN_PADDING else ~outside


class FieldOfViewd(MapTransform):
    """Mark the voxels that the scanner saw, in a mask of its own, ``(1, D, H, W)`` uint8 (paper, field of view).

    The field of view is the cylinder that the case names, or else it is detected from constant padding. Put it behind
    ``EnsureChannelFirstd``, before anything is resampled.

    Args:
        keys: of the volumes, MetaTensors ``(C, D, H, W)``.
        fov_key: of the mask.
        cylinder_key: of the arguments of :func:`cylinder` (all but the shape), in voxels and axes of the file.
    """

    def __init__(self, keys: KeysCollection, fov_key: str = "fov", cylinder_key: str = "field_of_view") -> None:
        super().__init__(keys)
        self.fov_key, self.cylinder_key = fov_key, cylinder_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with the mask."""
        data = dict(data)
        for key in self.key_iterator(data):
            image = data[key]
            if (given := data.get(self.cylinder_key)) is not None:
                inside = cylinder(image.shape[1:], **given)
                if not inside.any():
                    raise ValueError(f"the field of view {given} has no voxel of {tuple(image.shape[1:])} in it")
            else:
                inside = detect_field_of_view(np.asarray(image))
            data[self.fov_key] = _mask_like(image, inside)
        return data


class ForegroundMaskd(MapTransform):
    """Mark the voxels of the body, in a mask of its own, ``(1, D, H, W)`` uint8.

    The body is what is above a threshold in any channel, with the holes of every axial slice filled: lungs and gut gas
    belong to it. Put it behind ``Orientationd`` to RAS.

    Args:
        keys: of the volumes, MetaTensors ``(C, D, H, W)``.
        threshold: on the scale that the volume has there.
        fov_key: of the mask.
    """

    def __init__(self, keys: KeysCollection, threshold: float, fov_key: str = "fov") -> None:
        super().__init__(keys)
        self.threshold, self.fov_key = threshold, fov_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with the mask."""
        data = dict(data)
        for key in self.key_iterator(data):
            above = (np.asarray(data[key]) > self.threshold).any(axis=0)
            slices = [ndimage.binary_fill_holes(plane) for plane in np.moveaxis(above, -1, 0)]
            data[self.fov_key] = _mask_like(data[key], np.stack(slices, axis=-1))
        return data


class _RandHounsfieldd(RandomizableTransform, MapTransform, ABC):
    """A random change of intensity that is worked out in Hounsfield units, whatever scale the volume is on.

    Args:
        keys: of the volumes, ``(C, D, H, W)``.
        prob: of a change.
        hu_scale: Hounsfield units one unit of the volume's scale stands for.
        hu_offset: the Hounsfield units of its zero.
        device: where to compute, and where the result stays; default: where the volume is.
    """

    def __init__(
        self,
        keys: KeysCollection,
        prob: float,
        hu_scale: float = 1.0,
        hu_offset: float = 0.0,
        device: str | torch.device | None = None,
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.hu_scale, self.hu_offset, self.device = hu_scale, hu_offset, device

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with its volumes changed, or as it is."""
        data = dict(data)
        self.randomize(None)
        if not self._do_transform:
            return data
        self.draw()
        for key in self.key_iterator(data):
            volume = torch.as_tensor(data[key]).to(self.device)
            changed = self.change(volume.float() * self.hu_scale + self.hu_offset)
            data[key] = ((changed - self.hu_offset) / self.hu_scale).to(volume.dtype)
        return data

    @abstractmethod
    def draw(self) -> None:
        """Draw what is random from ``self.R``, the same for all keys."""

    @abstractmethod
    def change(self, hounsfield: Tensor) -> Tensor:
        """Change a volume ``(C, D, H, W)`` in Hounsfield units."""


class RandHUWarpd(_RandHounsfieldd):
    """Bend the Hounsfield scale: move anchors a little, and everything between them along (paper, HU warp).

    Piecewise linear between the anchors, of slope one outside. Anchors keep their order, so the warp is monotonic.

    Args:
        keys: of the volumes, ``(C, D, H, W)``.
        prob: of a warp.
        anchors: in HU, rising.
        shifts: the most that each is moved by, either way, in HU.
        kwargs: ``hu_scale``, ``hu_offset`` and ``device``: the volume's scale, and where to compute.

    Raises:
        ValueError: when anchors and shifts do not match or do not rise.
    """

    def __init__(
        self,
        keys: KeysCollection,
        prob: float = 0.8,
        anchors: Sequence[float] = (-500, -80, 15, 45, 90, 1000, 1500),
        shifts: Sequence[float] = (0, 25, 10, 8, 6, 20, 0),
        **kwargs: Any,
    ) -> None:
        super().__init__(keys, prob, **kwargs)
        if len(anchors) != len(shifts) or list(anchors) != sorted(set(anchors)):
            raise ValueError(f"anchors {list(anchors)} must rise, with one shift each, not {list(shifts)}")
        self.anchors, self.shifts = np.asarray(anchors, dtype=float), np.asarray(shifts, dtype=float)

    def draw(self) -> None:
        """Move the anchors."""
        self.moved = np.sort(self.anchors + self.R.uniform(-1, 1, len(self.anchors)) * self.shifts)

    def change(self, hounsfield: Tensor) -> Tensor:
        """Warp a volume."""
        # One more anchor beyond each end, moved along, makes the slope one there.
        old, new = (
            torch.tensor([ends[0] - 1, *ends, ends[-1] + 1], dtype=torch.float32, device=hounsfield.device)
            for ends in (self.anchors, self.moved)
        )
        piece = torch.bucketize(hounsfield, old[1:-1])
        slope = new.diff() / old.diff()
        return new[piece] + slope[piece] * (hounsfield - old[piece])


class RandCTNoised(_RandHounsfieldd):
    """Add the noise of a scan with less dose: grainy, stronger in and behind what is dense (paper, CT noise).

    The standard deviation is ``unit · exp(density · HU) / sqrt(dose)``, the dose log-uniform. The grain is a mix of two
    independent white fields, smoothed by Gaussians of different widths. White electronic noise comes on top. The
    public reference takes the exponential of Hounsfield units but the amplitude on the network's scale; here ``unit``
    says how many Hounsfield units that scale's one is, and all is added in Hounsfield units.

    Smoothing takes nine tenths of a white field's deviation. Here the grain is scaled back to a deviation of one, so
    that the formula above is the deviation of the noise that is seen: 6 to 20 HU in water, as in scans. Taken
    literally, the mix would leave 0.6 to 2 HU.

    Args:
        keys: of the volumes, ``(C, D, H, W)``.
        prob: of noise.
        dose: least and most.
        fine: least and most standard deviation of the finer Gaussian, in voxels.
        coarse: of the coarser one.
        mix: least and most share of the finer one.
        density: growth of the amplitude, per HU.
        electronic: standard deviation of the white noise, in units.
        unit: HU.
        kwargs: ``hu_scale``, ``hu_offset`` and ``device``: the volume's scale, and where to compute.
    """

    def __init__(
        self,
        keys: KeysCollection,
        prob: float = 0.5,
        dose: tuple[float, float] = (8e2, 9e3),
        fine: tuple[float, float] = (0.7, 1.2),
        coarse: tuple[float, float] = (1.8, 2.5),
        mix: tuple[float, float] = (0.4, 0.8),
        density: float = 0.0015,
        electronic: float = 0.0015,
        unit: float = 578.02,
        **kwargs: Any,
    ) -> None:
        super().__init__(keys, prob, **kwargs)
        self.ranges = {"fine": fine, "coarse": coarse, "mix": mix}
        self.dose, self.density, self.electronic, self.unit = dose, density, electronic, unit

    def draw(self) -> None:
        """Draw dose, grain, and a seed for the fields."""
        self.drawn_dose = math.exp(self.R.uniform(*np.log(self.dose)))
        self.drawn = {name: self.R.uniform(*limits) for name, limits in self.ranges.items()}
        self.seed = int(self.R.randint(2**31))

    def change(self, hounsfield: Tensor) -> Tensor:
        """Add noise to a volume."""
        generator = torch.Generator(hounsfield.device).manual_seed(self.seed)
        texture = self._grain(hounsfield, generator)
        amplitude = torch.exp(self.density * hounsfield) / math.sqrt(self.drawn_dose)
        white = torch.randn(hounsfield.shape, generator=generator, device=hounsfield.device)
        return hounsfield + self.unit * (amplitude * texture + self.electronic * white)

    def _grain(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Return the mixed fields, of a volume's shape and of standard deviation one."""
        # Smoothed as spectra: several times faster than convolutions on a CPU, and no thinner at the border.
        shape, axes = like.shape[1:], (1, 2, 3)
        spectrum: Tensor | float = 0.0
        for sigma, share in ((self.drawn["fine"], self.drawn["mix"]), (self.drawn["coarse"], 1 - self.drawn["mix"])):
            field = torch.fft.rfftn(torch.randn(like.shape, generator=generator, device=like.device), dim=axes)
            for axis, side in enumerate(shape):
                frequencies = (torch.fft.rfftfreq if axis == 2 else torch.fft.fftfreq)(side, device=like.device)
                line = torch.exp(-2 * (math.pi * sigma * frequencies) ** 2)
                field *= line.reshape([-1 if other == axis else 1 for other in range(3)])
            spectrum = spectrum + share * field
        texture = torch.fft.irfftn(spectrum, s=shape, dim=axes)
        return texture / texture.std().clamp(min=1e-12)


def _mask_like(image: Any, inside: np.ndarray) -> MetaTensor:
    """Make a mask ``(1, D, H, W)`` uint8 that lies where the volume does."""
    return MetaTensor(torch.from_numpy(inside.astype(np.uint8))[None], affine=image.affine.clone())
