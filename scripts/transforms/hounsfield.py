"""Random changes of intensity in Hounsfield units (paper, intensity augmentation)."""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform
from torch import Tensor

from ..mistakes import Mistake

__all__ = ["RandCTNoised", "RandHUWarpd"]


class _RandHounsfieldd(RandomizableTransform, MapTransform):
    """A random change of intensity that is worked out in Hounsfield units, whatever scale the volume is on.

    Subclasses ``draw`` what is random from ``self.R``, the same for all keys, and ``change`` a volume in HU.
    """

    def __init__(self, keys: KeysCollection, prob: float, hu_scale: float = 1, hu_offset: float = 0) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.hu_scale, self.hu_offset = hu_scale, hu_offset

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with its volumes changed, or as it is."""
        data = dict(data)
        self.randomize(None)
        if not self._do_transform:
            return data
        self.draw()
        for key in self.key_iterator(data):
            volume = torch.as_tensor(data[key])
            changed = self.change(volume.float() * self.hu_scale + self.hu_offset)
            data[key] = ((changed - self.hu_offset) / self.hu_scale).to(volume.dtype)
        return data


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

    def draw(self) -> None:
        """Move the anchors."""
        self.moved = np.sort(self.anchors + self.R.uniform(-1, 1, len(self.anchors)) * self.shifts)

    def change(self, hounsfield: Tensor) -> Tensor:
        """Warp a volume."""
        # One more anchor beyond each end, moved along, makes the slope one there.
        anchors = [[ends[0] - 1, *ends, ends[-1] + 1] for ends in (self.anchors, self.moved)]
        old, new = torch.tensor(anchors, dtype=torch.float32, device=hounsfield.device)
        piece = torch.bucketize(hounsfield, old[1:-1])
        slope = new.diff() / old.diff()
        return new[piece] + slope[piece] * (hounsfield - old[piece])


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
        grain = self._grain(hounsfield, generator)
        amplitude = torch.exp(self.density * hounsfield) / math.sqrt(self.drawn_dose)
        white = torch.randn(hounsfield.shape, generator=generator, device=hounsfield.device)
        return hounsfield + self.unit * (amplitude * grain + self.electronic * white)

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
