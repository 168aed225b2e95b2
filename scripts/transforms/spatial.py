"""MONAI's padding for keys with different backgrounds, and its flips for several axes."""

from collections.abc import Collection, Hashable, Mapping, Sequence

from monai.config import KeysCollection
from monai.transforms import Pad, Padd, RandFlipd
from monai.utils import ensure_tuple_rep
from torch import Tensor

__all__ = ["ValuePadd", "flips"]


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


def flips(keys: KeysCollection, prob: float, axes: Collection[int]) -> list[RandFlipd]:
    """List one random flip for each of the ``axes`` 0, 1 and 2 in that order, or none where ``prob`` is 0."""
    return [RandFlipd(keys, prob, axis, allow_missing_keys=True) for axis in range(3) if axis in axes and prob]
