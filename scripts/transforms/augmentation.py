"""Random changes of training volumes: one by one in the processes that load, or a batch at once on the device."""

from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform, Randomizable
from torch import Tensor

__all__ = ["Augmentation", "Batchd", "RandBatchd"]


class Batchd(MapTransform):
    """A change of volumes: of one, as any MONAI transform, or of many at once, each by what is drawn for it."""

    def draw(self) -> Any:
        """Draw what happens to one volume, where anything is random."""

    @abstractmethod
    def change(self, batch: dict[Hashable, Tensor], drawn: Sequence[Any]) -> dict[Hashable, Tensor]:
        """Return the volumes ``(B, C, D, H, W)`` of a batch, changed; those that are given stay as they are."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Change the volumes ``(C, D, H, W)`` of one case."""
        batch = {key: torch.as_tensor(data[key])[None] for key in self.key_iterator(data)}
        return {**data, **{key: volumes[0] for key, volumes in self.change(batch, [self.draw()]).items()}}


class RandBatchd(Randomizable, Batchd):
    """A random one: subclasses ``draw`` from ``self.R``, the same for all keys, and ``change`` a batch by that."""

    @abstractmethod
    def draw(self) -> Any:
        """Draw what happens to one volume."""


class Augmentation:
    """Random transforms that are a function of a draw's seed, wherever they are done.

    Args:
        transforms: of dictionaries. Those that are a :class:`Batchd` take a batch at once, others its volumes one after
            the other.
    """

    def __init__(self, transforms: Sequence[Callable[[dict], dict]]) -> None:
        self.transforms = tuple(transforms)
        self.random = [transform for transform in transforms if isinstance(transform, Randomizable)]

    def __call__(self, item: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """Augment one case."""
        for transform in self.transforms:
            item = self._seeded(transform, seed)(item)
        return _plain(item)

    def on_batch(self, batch: Mapping[str, Tensor], seeds: Sequence[int]) -> dict[str, Tensor]:
        """Augment volumes ``(B, C, D, H, W)`` by key, of ``B`` cases."""
        batch = dict(batch)
        for transform in self.transforms:
            if isinstance(transform, Batchd):
                drawn = [self._seeded(transform, seed).draw() for seed in seeds]
                batch |= transform.change({key: batch[key] for key in transform.key_iterator(batch)}, drawn)
            else:
                items = ({key: volumes[place] for key, volumes in batch.items()} for place in range(len(seeds)))
                changed = [_plain(self._seeded(transform, seed)(item)) for seed, item in zip(seeds, items, strict=True)]
                batch = {key: torch.stack([item[key] for item in changed]) for key in changed[0]}
        return _plain(batch)

    def _seeded(self, transform: Callable, seed: int) -> Callable:
        """Seed a transform, if it is random, by the draw and by its place among the random ones."""
        if transform in self.random:
            own = np.random.SeedSequence([seed, self.random.index(transform)]).generate_state(1)[0]
            transform.set_random_state(seed=int(own))
        return transform


def _plain(item: Mapping[str, Any]) -> dict[str, Any]:
    """Leave MONAI's metadata behind: a network that is compiled takes tensors alone."""
    return {key: value.as_tensor() if isinstance(value, MetaTensor) else value for key, value in item.items()}
