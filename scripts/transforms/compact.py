"""Volumes kept in half of the memory, to the bit."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.transforms import MapTransform
from monai.utils import convert_to_tensor
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ..mistakes import Mistake
from .augmentation import Batchd

__all__ = ["Compactd", "Expandd"]

CODES = 2**16  # of two bytes
TABLE = "{}_values"  # beside the codes


class Compactd(MapTransform):
    """Keep a float32 volume ``(C, D, H, W)`` as int16 codes and a table of its values, which :class:`Expandd` undoes.

    What a scanner stores are whole numbers, and a scaling keeps their number: a few thousand different values, while
    resampling makes nearly every voxel a value of its own. What crops and pads in between sees a volume of codes.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with codes and tables; a Mistake for a volume of more than 65,536 different values."""
        compacted = dict(data)
        for key in self.key_iterator(data):
            values, codes = torch.unique(convert_to_tensor(data[key], track_meta=False), return_inverse=True)
            if len(values) > CODES:
                raise Mistake(
                    f"{data.get('case', 'a volume')} has {len(values)} different values where compact has codes for "
                    f"{CODES}: was it resampled? Leave compact out, or keep --spacing null"
                )
            compacted[key] = (codes - CODES // 2).to(torch.int16)
            compacted[TABLE.format(key)] = F.pad(values, (0, CODES - len(values)))  # of one length, to be stacked
        return compacted


class Expandd(Batchd):
    """Undo :class:`Compactd`; volumes that are no codes stay as they are."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return one case with its volumes, and no tables."""
        tables = {TABLE.format(key) for key in self.key_iterator(data)}
        return {key: value for key, value in super().__call__(data).items() if key not in tables}

    def change(self, batch: dict[Hashable, Tensor], drawn: Sequence[None]) -> dict[Hashable, Tensor]:
        """Return the volumes of a batch of codes ``(B, C, D, H, W)`` int16 and their tables ``(B, 65536)``."""
        return {
            key: torch.stack([_looked_up(*pair) for pair in zip(codes, batch[TABLE.format(key)], strict=True)])
            for key, codes in batch.items()
            if TABLE.format(key) in batch
        }


def _looked_up(codes: Tensor, values: Tensor) -> Tensor:
    places = codes.flatten().int().add_(CODES // 2)
    return values.index_select(0, places).reshape(codes.shape)
