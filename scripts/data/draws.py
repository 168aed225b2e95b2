"""Draws for training, in which all randomness is a function of the seed."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import ignite.distributed as idist
import numpy as np
import torch
from monai.data import CacheDataset, Dataset, get_track_meta, set_track_meta
from torch.utils.data import DistributedSampler

__all__ = ["Draw", "DrawSampler", "DrawnDataset"]


class Draw(NamedTuple):
    """Which case to load, and the seed of its augmentation and mask."""

    index: int
    seed: int


class DrawSampler(DistributedSampler):
    """Draw cases for training: full batches, every case of a dataset equally often, reproducible from seed and epoch.

    It is a DistributedSampler, so that MONAI's workflow calls ``set_epoch``. The draws of one global batch are dealt to
    the ranks in turn, so that any number of ranks trains on the same global batches.

    Args:
        num_cases: of the training set, all ranks together.
        batch_size: volumes a rank takes in one iteration.
        iterations: iterations an epoch; default: as many as one pass over the cases takes, rounded up.
        seed: of the run.
        groups: of each case, the number of its class: all classes are drawn equally often, and of a class all cases;
            default: all cases are.
        sharded: each rank has a dataset of its own, every ``num_replicas``-th case from ``rank`` on, and draws from
            that; otherwise all have the same one.
        num_replicas, rank: how many ranks there are, and which is this one; default: those of this run.
    """

    def __init__(
        self,
        num_cases: int,
        batch_size: int,
        iterations: int | None = None,
        seed: int = 0,
        groups: Sequence[int] | None = None,
        sharded: bool = False,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        if num_replicas is None:
            num_replicas, rank = idist.get_world_size(), idist.get_rank()
        super().__init__(range(num_cases), num_replicas, rank, seed=seed)
        self.batch_size, self.global_batch = batch_size, batch_size * num_replicas
        self.shard = [rank] if sharded and num_replicas > 1 else []
        mine = np.asarray(groups or [0] * num_cases)
        mine = mine[rank::num_replicas] if self.shard else mine
        self.pools = [np.flatnonzero(mine == group) for group in np.unique(mine)]  # to draw from in turn
        self.orders: dict[int, tuple[int, np.ndarray]] = {}  # of each pool, the last pass and its order
        self.iterations = iterations or -(-num_cases // self.global_batch)
        self.skipped = 0
        self.set_epoch(1)  # Ignite counts from one

    def __len__(self) -> int:
        return self.iterations * self.batch_size

    def __iter__(self) -> Iterator[Draw]:
        first, self.skipped = (self.epoch - 1) * self.iterations + self.skipped, 0
        for iteration, place in product(range(first, self.epoch * self.iterations), range(self.batch_size)):
            yield self._draw(iteration, place)

    def skip(self, iterations: int) -> None:
        """Leave out the first iterations of the next epoch that is drawn: an interrupted run has done them."""
        self.skipped = iterations

    def _draw(self, iteration: int, place: int) -> Draw:
        """Return this rank's draw at a place of its batch, iterations counted from 0 over the whole run."""
        number = iteration * self.global_batch + self.rank * self.batch_size + place
        seed = np.random.SeedSequence([self.seed, number, 1]).generate_state(1)[0]
        if self.shard:
            number = iteration * self.batch_size + place
        turn, place_in_turn = divmod(number, len(self.pools))
        pool_number = np.random.default_rng([self.seed, turn, 0, 2]).permutation(len(self.pools))[place_in_turn]
        pass_number, place_in_pass = divmod(turn, len(self.pools[pool_number]))
        return Draw(int(self._order(pool_number, pass_number)[place_in_pass]), int(seed))

    def _order(self, pool_number: int, pass_number: int) -> np.ndarray:
        """Shuffle a pool: every pass over the cases is a shuffle of its own, so all are seen equally often."""
        if self.orders.get(pool_number, (None,))[0] != pass_number:
            generator = np.random.default_rng([self.seed, pass_number, *self.shard])
            self.orders[pool_number] = pass_number, generator.permutation(self.pools[pool_number])
        return self.orders[pool_number][1]


class DrawnDataset(torch.utils.data.Dataset):
    """Answer a :class:`DrawSampler` from MONAI's dataset: seed its transforms, load, pass the seed on for the mask.

    Args:
        dataset: MONAI's.
        augmentation: of what it gives, also seeded by the draw; None: the device does it, later.
    """

    def __init__(
        self, dataset: Dataset, augmentation: Callable[[dict[str, Any], int], dict[str, Any]] | None = None
    ) -> None:
        self.dataset, self.augmentation = dataset, augmentation

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        self.dataset.transform.set_random_state(seed=draw.seed)
        # Volumes prepared in memory are plain tensors (other datasets may have to prepare them yet): to keep MONAI's
        # records of each crop would take a fifth of a draw.
        tracked = get_track_meta()
        set_track_meta(tracked and not isinstance(self.dataset, CacheDataset))
        try:
            item = self.dataset[draw.index]
            item = item[0] if isinstance(item, list) else item  # MONAI's crops that could take several give a list
            if self.augmentation is not None:
                item = self.augmentation(item, draw.seed)
        finally:
            set_track_meta(tracked)
        return {**item, "seed": draw.seed}
