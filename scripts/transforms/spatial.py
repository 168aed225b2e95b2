"""MONAI's padding for keys with different backgrounds, and its flips for several axes."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence

from monai.config import KeysCollection
from monai.transforms import Pad, Padd, RandFlipd
from monai.utils import ensure_tuple_rep
from torch import Tensor

__all__ = ["ValuePadd", "flips"]


class ValuePadd(Padd):
    """Pad with constants, one a key: an image with its background, its mask or labels with 0.

    Args:
        keys: of the volumes, ``(C, D, H, W)``.
        padder: says how far, such as ``monai.transforms.SpatialPad``.
        value: to fill with, one for all keys or one a key.
        allow_missing_keys: pass over keys that a case lacks.
    """

    def __init__(
        self, keys: KeysCollection, padder: Pad, value: float | Sequence[float], allow_missing_keys: bool = True
    ) -> None:
        super().__init__(keys, padder, allow_missing_keys=allow_missing_keys)
        self.value = ensure_tuple_rep(value, len(self.keys))

    def __call__(self, data: Mapping[Hashable, Tensor], lazy: bool | None = None) -> dict[Hashable, Tensor]:
        """Return the data with its volumes padded."""
        lazy = self.lazy if lazy is None else lazy
        padded = {
            key: self.padder(data[key], value=value, lazy=lazy) for key, value in self.key_iterator(data, self.value)
        }
        return {**data, **padded}


def flips(keys: KeysCollection, prob: float, axes: Collection[int], allow_missing_keys: bool = True) -> list[RandFlipd]:
    """List one random flip for each of the ``axes`` 0, 1 and 2 in that order, or none where ``prob`` is 0."""
    chosen = [axis for axis in range(3) if axis in axes and prob]
    return [RandFlipd(keys, prob, axis, allow_missing_keys) for axis in chosen]
