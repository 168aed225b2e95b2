"""Random changes of training volumes: one by one in the processes that load, or a batch at once on the device."""

from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import MapTransform, Randomizable
from torch import Tensor

__all__ = ["Augmentation", "RandBatchd"]


class RandBatchd(Randomizable, MapTransform):
    """A random change of volumes: of one, as any MONAI transform, or of many at once, each by what is drawn for it.

    Subclasses ``draw`` what is random from ``self.R``, the same for all keys, and ``change`` a batch by it.
    """

    @abstractmethod
    def draw(self) -> Any:
        """Draw what happens to one volume."""

    @abstractmethod
    def change(self, batch: dict[Hashable, Tensor], drawn: Sequence[Any]) -> dict[Hashable, Tensor]:
        """Return the volumes ``(B, C, D, H, W)`` of a batch, changed; those that are given stay as they are."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Change the volumes ``(C, D, H, W)`` of one case."""
        batch = {key: torch.as_tensor(data[key])[None] for key in self.key_iterator(data)}
        return {**data, **{key: volumes[0] for key, volumes in self.change(batch, [self.draw()]).items()}}


class Augmentation:
    """Random transforms that are a function of a draw's seed, wherever they are done.

    Args:
        transforms: of dictionaries. Those that are a :class:`RandBatchd` take a batch at once, others its volumes one
            after the other.
    """

    def __init__(self, transforms: Sequence[Callable[[dict], dict]]) -> None:
        self.transforms = tuple(transforms)

    def __call__(self, item: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """Augment one case."""
        for number, transform in enumerate(self.transforms):
            item = _seeded(transform, seed, number)(item)
        return dict(item)

    def on_batch(self, batch: Mapping[str, Tensor], seeds: Sequence[int]) -> dict[str, Tensor]:
        """Augment volumes ``(B, C, D, H, W)`` by key, of ``B`` cases."""
        batch = dict(batch)
        for number, transform in enumerate(self.transforms):
            if isinstance(transform, RandBatchd):
                drawn = [_seeded(transform, seed, number).draw() for seed in seeds]
                batch |= transform.change({key: batch[key] for key in transform.key_iterator(batch)}, drawn)
            else:
                items = ({key: volumes[place] for key, volumes in batch.items()} for place in range(len(seeds)))
                changed = [_seeded(transform, seed, number)(item) for seed, item in zip(seeds, items, strict=True)]
                batch = {key: torch.stack([torch.as_tensor(item[key]) for item in changed]) for key in changed[0]}
        return batch


def _seeded(transform: Callable, seed: int, number: int) -> Callable:
    """Seed a transform, if it is random, by the draw and by its place among the others."""
    if isinstance(transform, Randomizable):
        transform.set_random_state(seed=int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))
    return transform
