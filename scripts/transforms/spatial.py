"""MONAI's padding for keys with different backgrounds, and its affine and flips as one resampling of many volumes."""

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from monai.config import KeysCollection
from monai.networks.utils import to_norm_affine
from monai.transforms import MapTransform, Pad, Padd
from monai.transforms.utils import create_rotate, create_scale, create_translate
from monai.utils import ensure_tuple_rep
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ..devices import send
from .augmentation import RandBatchd

__all__ = ["RandTurnd", "ValuePadd"]


class ValuePadd(Padd):
    """Pad volumes ``(C, D, H, W)`` with constants, one a key: an image with its background, its mask or labels with 0.

    The ``padder``, such as ``monai.transforms.SpatialPad``, says how far. Keys that a case lacks are passed over.
    """

    def __init__(self, keys: KeysCollection, padder: Pad, value: float | Sequence[float]) -> None:
        super().__init__(keys, padder, allow_missing_keys=True)
        self.value = ensure_tuple_rep(value, len(self.keys))

    def __call__(self, data: Mapping[Hashable, Tensor], lazy: bool | None = None) -> dict[Hashable, Tensor]:
        """Return the data with its volumes padded."""
        padded = dict(data)
        for key, value in self.key_iterator(data, self.value):
            padded[key] = self.padder(data[key], value=value, lazy=self.lazy if lazy is None else lazy)
        return padded


class Turn(NamedTuple):
    """What happens to one volume."""

    affine: np.ndarray | None  # (4, 4): from voxels of the result to those of the volume, both from the centre
    flipped: list[int]  # axes of a volume (C, D, H, W)


class RandTurnd(RandBatchd):
    """Rotate, scale, shift and flip volumes, and take their centre: what MONAI's RandAffined and RandFlipd do.

    One resampling does all of it, in float32, of the voxels that are kept alone, and of a whole batch at once. Volumes
    that are not rotated, scaled or shifted are not resampled.

    Args:
        keys: of the volumes, ``(C, D, H, W)``, all of the same sides; those that a case lacks are passed over.
        spatial_size: voxels of the result, no more than the volume has.
        prob: of a rotation, scaling and shift.
        rotation: degrees, the most about each axis, either way.
        scaling: the most that each axis grows or shrinks by, as a share.
        translation: voxels, the most along each axis, either way.
        flip_prob: of a flip of each of the ``flip_axes`` 0, 1 and 2.
        flip_axes: that may be flipped.
        mode, padding_mode: of :func:`torch.nn.functional.grid_sample`, one or one a key.
    """

    def __init__(
        self,
        keys: KeysCollection,
        spatial_size: Sequence[int],
        prob: float,
        rotation: float,
        scaling: float,
        translation: float | Sequence[float] = 0.0,
        flip_prob: float = 0.0,
        flip_axes: Collection[int] = (),
        mode: str | Sequence[str] = "bilinear",
        padding_mode: str | Sequence[str] = "border",
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys=True)
        self.spatial_size, self.prob = tuple(spatial_size), prob
        self.radians, self.scaling, self.translation = np.deg2rad(rotation), scaling, translation
        self.flip_prob, self.flip_axes = flip_prob, sorted(flip_axes)
        modes, beyond = (ensure_tuple_rep(way, len(self.keys)) for way in (mode, padding_mode))
        ways = ({"mode": how, "padding_mode": pad} for how, pad in zip(modes, beyond, strict=True))
        self.ways = dict(zip(self.keys, ways, strict=True))

    def draw(self) -> Turn:
        """Draw rotation, shift, scaling and flips."""
        turned = self.R.uniform() < self.prob
        angles, shifts, factors = (self.R.uniform(-1, 1, 3) for _ in range(3))
        flipped = [axis for axis in self.flip_axes if self.R.uniform() < self.flip_prob]
        if not turned:
            return Turn(None, [axis + 1 for axis in flipped])
        mirror = np.diag([*(-1.0 if axis in flipped else 1.0 for axis in range(3)), 1.0])
        affine = create_rotate(3, angles * self.radians) @ create_translate(3, shifts * self.translation)
        return Turn(affine @ create_scale(3, 1 + factors * self.scaling) @ mirror, [])

    def change(self, batch: dict[Hashable, Tensor], drawn: Sequence[Turn]) -> dict[Hashable, Tensor]:
        """Turn volumes ``(B, C, D, H, W)``."""
        turned = [place for place, turn in enumerate(drawn) if turn.affine is not None]
        grid = self._grid([drawn[place].affine for place in turned], next(iter(batch.values()))) if turned else None
        results = {}
        for key, volumes in batch.items():
            chosen = (
                volumes
                if len(turned) == len(drawn)
                else volumes.index_select(0, send(turned, volumes.device, torch.int64))
            )
            sampled = iter(self._sampled(chosen, grid, **self.ways[key]) if turned else ())
            pieces = [
                next(sampled) if turn.affine is not None else self._centre(volume).flip(turn.flipped)
                for volume, turn in zip(volumes, drawn, strict=True)
            ]
            results[key] = torch.stack(pieces) if len(pieces) > 1 else pieces[0][None]
        return results

    def _sampled(self, volumes: Tensor, grid: Tensor, **ways: str) -> Tensor:
        return F.grid_sample(volumes.float(), grid, align_corners=True, **ways).to(volumes.dtype)

    def _centre(self, volume: Tensor) -> Tensor:
        window = (
            slice((side - size) // 2, (side + size) // 2)
            for side, size in zip(volume.shape[1:], self.spatial_size, strict=True)
        )
        return volume[(..., *window)]

    def _grid(self, affines: Sequence[np.ndarray], volumes: Tensor) -> Tensor:
        """Tell where the voxels of the results lie in the volumes, ``(B, D, H, W, 3)``, as torch has it: last first."""
        affine = torch.as_tensor(np.stack(affines))
        # What MONAI calls zero-centred without aligned corners is what torch calls aligned corners.
        affine = to_norm_affine(affine, volumes.shape[2:], self.spatial_size, zero_centered=True)[:, :3]
        theta = torch.cat([affine[:, :, :3].flip(1), affine[:, :, 3:].flip(1)], dim=2).float()
        theta = send(theta, volumes.device)[:, None]
        # Sums of what each axis adds: torch's affine_grid is a product of matrices, which TF32 rounds.
        depth, height, width = (
            (torch.arange(side, device=volumes.device) * 2 + 1 - side)[:, None] / max(side - 1, 1) * theta[..., axis]
            for axis, side in enumerate(self.spatial_size)
        )
        return (depth + theta[..., 3])[:, :, None, None] + height[:, None, :, None] + width[:, None, None]
