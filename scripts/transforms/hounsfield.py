"""Random changes of intensity in Hounsfield units (paper, intensity augmentation)."""

import math
from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from torch import Tensor

from ..devices import send
from ..mistakes import Mistake
from .augmentation import RandBatchd

__all__ = ["RandCTNoised", "RandHUWarpd"]


class _RandHounsfieldd(RandBatchd):
    """A random change of intensity that is worked out in Hounsfield units, whatever scale the volume is on.

    Subclasses ``_drawn`` what happens to a volume, and ``_change`` a batch ``(B, C, D, H, W)`` in HU, which is theirs.
    """

    def __init__(self, keys: KeysCollection, prob: float, hu_scale: float = 1, hu_offset: float = 0) -> None:
        MapTransform.__init__(self, keys)
        self.prob, self.hu_scale, self.hu_offset = prob, hu_scale, hu_offset

    def draw(self) -> Any:
        """Draw what happens to a volume, None: nothing."""
        return self._drawn() if self.R.uniform() < self.prob else None

    def change(self, batch: dict[Hashable, Tensor], drawn: Sequence[Any]) -> dict[Hashable, Tensor]:
        """Change those volumes ``(B, C, D, H, W)`` that something was drawn for."""
        places = [place for place, found in enumerate(drawn) if found is not None]
        found = [drawn[place] for place in places]
        return {key: self._changed(volumes, places, found) for key, volumes in batch.items()} if places else batch

    def _changed(self, volumes: Tensor, places: list[int], drawn: Sequence[Any]) -> Tensor:
        all_of_them = len(places) == len(volumes)
        index = send(places, volumes.device, torch.int64)
        hounsfield = (volumes if all_of_them else volumes.index_select(0, index)).float() * self.hu_scale
        changed = self._change(hounsfield.add_(self.hu_offset), drawn)
        changed = changed.sub_(self.hu_offset).div_(self.hu_scale).to(volumes.dtype)
        return changed if all_of_them else volumes.index_copy(0, index, changed)


class RandHUWarpd(_RandHounsfieldd):
    """Bend the Hounsfield scale: move anchors a little, and everything between them along (paper, HU warp).

    Piecewise linear between the anchors, of slope one outside. Anchors keep their order, so the warp is monotonic.

    Args:
        keys: of the volumes, ``(C, D, H, W)``.
        prob: of a change.
        anchors: in HU; must rise.
        shifts: the most that each is moved by, either way, in HU.
        kwargs: ``hu_scale``: HU that one unit of the volume's scale stands for; ``hu_offset``: those of its zero.
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
            raise Mistake(f"anchors {list(anchors)} must rise, with one shift each, not {list(shifts)}")
        self.anchors, self.shifts = np.asarray(anchors, dtype=float), np.asarray(shifts, dtype=float)

    def _drawn(self) -> np.ndarray:
        """Move the anchors."""
        return np.sort(self.anchors + self.R.uniform(-1, 1, len(self.anchors)) * self.shifts)

    def _change(self, hounsfield: Tensor, drawn: Sequence[np.ndarray]) -> Tensor:
        """Add the shift of the first anchor, and what each piece between two anchors adds to it."""
        shifts = np.stack(drawn) - self.anchors  # (B, anchors)
        growth = np.diff(shifts) / np.diff(self.anchors)
        start = shifts[:, 0] - growth @ self.anchors[:-1]
        warped, piece = hounsfield + _column(start, hounsfield), torch.empty_like(hounsfield)
        for number, (low, high) in enumerate(pairwise(self.anchors)):
            if growth[:, number].any():
                torch.clamp(hounsfield, low, high, out=piece)
                warped.addcmul_(piece, _column(growth[:, number], hounsfield))
        return warped


class Noise(NamedTuple):
    """The noise of one volume."""

    dose: float
    fine: float  # standard deviations of the Gaussians, in voxels
    coarse: float
    mix: float  # share of the finer one
    seed: int  # of the white fields


class RandCTNoised(_RandHounsfieldd):
    """Add the noise of a scan with less dose: grainy, stronger in and behind what is dense (paper, CT noise).

    The standard deviation is ``unit · exp(density · HU) / sqrt(dose)``, the dose log-uniform. The grain is a mix of two
    independent white fields, smoothed by Gaussians of different widths. White electronic noise comes on top. The
    public reference takes the exponential of Hounsfield units but the amplitude on the network's scale; here ``unit``
    says how many Hounsfield units that scale's one is, and all is added in Hounsfield units.

    Smoothing takes nine tenths of a white field's deviation. Here the grain is scaled back to one, so that the noise
    has the deviation above: 6 to 20 HU in water, as in scans. Taken literally, the mix would leave 0.6 to 2 HU.

    Args:
        keys, prob, kwargs: as of :class:`RandHUWarpd`.
        dose: least and most.
        fine, coarse: least and most standard deviation of the two Gaussians, in voxels.
        mix: least and most share of the finer one.
        density: growth of the amplitude, per HU.
        electronic: standard deviation of the white noise, in units of ``unit`` HU.
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
        self.ranges = (fine, coarse, mix)
        self.dose, self.density, self.electronic, self.unit = dose, density, electronic, unit

    def _drawn(self) -> Noise:
        """Draw dose, grain, and a seed for the fields."""
        dose = math.exp(self.R.uniform(*np.log(self.dose)))
        return Noise(dose, *(self.R.uniform(*limits) for limits in self.ranges), int(self.R.randint(2**31)))

    def _change(self, hounsfield: Tensor, drawn: Sequence[Noise]) -> Tensor:
        """Add noise to volumes."""
        device = hounsfield.device
        generators = [torch.Generator(device).manual_seed(noise.seed) for noise in drawn]
        white = torch.empty_like(hounsfield)
        for field, generator in zip(white, generators, strict=True):
            field.normal_(generator=generator)
        grain = self._smoothed(white, drawn)
        for field, generator in zip(white, generators, strict=True):
            field.normal_(generator=generator)  # once more: the electronic noise
        amplitude = _column([self.unit / math.sqrt(noise.dose) for noise in drawn], hounsfield)
        grain.mul_(torch.exp(self.density * hounsfield).mul_(amplitude))
        return hounsfield.add_(grain).add_(white, alpha=self.unit * self.electronic)

    def _smoothed(self, white: Tensor, drawn: Sequence[Noise]) -> Tensor:
        """Give white fields ``(B, C, D, H, W)`` the grain, and a deviation of one."""
        # The mix of two independent fields is one field whose power is the sum of theirs. In the spectrum, smoothing
        # is several times faster than convolutions on a CPU, and does not thin out the border.
        axes = (2, 3, 4)
        spectrum = torch.fft.rfftn(white, dim=axes)
        for field, noise in zip(spectrum, drawn, strict=True):
            powers, variance = [], 0.0
            for sigma, share in ((noise.fine, noise.mix), (noise.coarse, 1 - noise.mix)):
                lines = [_power(sigma, side, white.device) for side in white.shape[2:]]
                variance += share**2 * math.prod(_mean_power(sigma, side) for side in white.shape[2:])
                depth, height, width = lines
                width = width[: spectrum.shape[-1]]
                powers.append(share**2 * depth[:, None, None] * height[:, None] * width)
            field *= powers[0].add_(powers[1]).div_(variance).sqrt_()
        return torch.fft.irfftn(spectrum, s=white.shape[2:], dim=axes)


def _power(sigma: float, side: int, device: torch.device) -> Tensor:
    """Tell what a Gaussian leaves of the power of each frequency along one axis."""
    return torch.exp(-4 * (math.pi * sigma * torch.fft.fftfreq(side, device=device)) ** 2)


def _mean_power(sigma: float, side: int) -> float:
    """Tell what it leaves of the variance of a white field; computed here, so that no device is waited for."""
    return float(np.exp(-4 * (math.pi * sigma * np.fft.fftfreq(side)) ** 2).mean())


def _column(values: Sequence[float] | np.ndarray, like: Tensor) -> Tensor:
    """Lay out one value a volume, as ``(B, 1, 1, 1, 1)``."""
    return send(np.asarray(values), like.device, like.dtype).reshape(-1, 1, 1, 1, 1)
