"""Hand cases to the network: caching, and draws in which all randomness is a function of the seed.

A draw is the g-th volume that a training run asks for. Which case it is, how it is augmented and which patches are
hidden follow from the run's seed and g alone: not from the number of workers, ranks or restarts. (Where ranks keep
shares of the cases in memory, which case it is depends on the ranks too.)
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.data import CacheDataset, Dataset, PersistentDataset, get_track_meta, pickle_hashing, set_track_meta
from monai.transforms import Compose
from monai.utils import convert_to_tensor
from torch.utils.data import DistributedSampler

from . import checkpoints, parallel
from .data import reason

__all__ = ["DiskCacheDataset", "Draw", "DrawSampler", "DrawnDataset", "ForgivingDataset", "build_dataset"]

logger = logging.getLogger(__name__)

CACHES = ("memory", "disk", "none")


class Draw(NamedTuple):
    """Which case to load, and the seed of its augmentation and mask."""

    index: int
    seed: int


class DrawSampler(DistributedSampler):
    """Draw cases for training: full batches, every case of a dataset equally often, reproducible from seed and epoch.

    A :class:`torch.utils.data.DistributedSampler`, so that MONAI's workflow calls ``set_epoch``; the draws of one
    global batch are dealt to the ranks in turn, so that any number of ranks trains on the same global batches.

    Args:
        num_cases: of the training set, all ranks together.
        batch_size: volumes a rank takes in one iteration.
        iterations: iterations an epoch; default: as many as one pass over the cases takes, rounded up.
        seed: of the run.
        sharded: each rank has a dataset of its own, every ``num_replicas``-th case from ``rank`` on, and draws from
            that; otherwise all have the same one.
        num_replicas: ranks; default: those of torch.distributed, or one.
        rank: this one.
    """

    def __init__(
        self,
        num_cases: int,
        batch_size: int,
        iterations: int | None = None,
        seed: int = 0,
        sharded: bool = False,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        if num_replicas is None:
            num_replicas, rank = parallel.world_size(), parallel.rank()
        super().__init__(range(num_cases), num_replicas=num_replicas, rank=rank, seed=seed)
        self.num_cases, self.batch_size = num_cases, batch_size
        self.sharded = sharded and num_replicas > 1
        self.global_batch = batch_size * num_replicas
        self.iterations = iterations or -(-num_cases // self.global_batch)
        self.skipped = 0
        self.set_epoch(1)  # Ignite counts from one

    def __len__(self) -> int:
        return self.iterations * self.batch_size

    def __iter__(self) -> Iterator[Draw]:
        first, self.skipped = self.skipped, 0
        for iteration in range((self.epoch - 1) * self.iterations + first, self.epoch * self.iterations):
            for place in range(self.batch_size):
                yield self.draw(iteration, place)

    def skip(self, iterations: int) -> None:
        """Leave out the first iterations of the next epoch that is drawn: an interrupted run has done them."""
        self.skipped = iterations

    def draw(self, iteration: int, place: int) -> Draw:
        """Return this rank's draw at a place of its batch, iterations counted from 0 over the whole run."""
        number = iteration * self.global_batch + self.rank * self.batch_size + place
        seed = np.random.SeedSequence([self.seed, number, 1]).generate_state(1)[0]
        if self.sharded:
            cases, shard = len(range(self.rank, self.num_cases, self.num_replicas)), [self.rank]
            number = iteration * self.batch_size + place
        else:
            cases, shard = self.num_cases, []
        pass_number, place_in_pass = divmod(number, cases)
        # Every pass over the cases is a shuffle of its own, so all are seen equally often.
        order = np.random.default_rng([self.seed, pass_number, *shard]).permutation(cases)
        return Draw(int(order[place_in_pass]), int(seed))


class DrawnDataset(torch.utils.data.Dataset):
    """Answer the draws of a :class:`DrawSampler`: seed the transforms, load, and pass the seed on for the mask.

    Args:
        dataset: of MONAI, with a ``transform``; items are dicts.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

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
        finally:
            set_track_meta(tracked)
        item = item[0] if isinstance(item, list) else item  # MONAI's crops that could take several give a list
        return {**item, "seed": draw.seed}


class ForgivingDataset(Dataset):
    """MONAI's Dataset that answers with the reason where a case cannot be loaded, instead of ending the run."""

    def _transform(self, index: int) -> dict[str, Any]:
        try:
            return super()._transform(index)
        except Exception as error:
            return {"case": self.data[index]["case"], "error": reason(error)}


class DiskCacheDataset(PersistentDataset):
    """MONAI's PersistentDataset whose files several runs may write and read at once.

    Files are written beside their place and renamed there, so that nobody reads half of one; a damaged one is
    prepared again.
    """

    def _cachecheck(self, item_transformed: dict[str, Any]) -> dict[str, Any]:
        path = self.cache_dir / f"{self.hash_func(item_transformed).decode()}{self.transform_hash}.pt"
        if path.is_file():
            try:
                return checkpoints.load(path)
            except checkpoints.DamagedCheckpointError as error:
                logger.warning("%s; this volume is prepared again", error)
        prepared = convert_to_tensor(
            self._pre_transform(deepcopy(item_transformed)), convert_numeric=False, track_meta=self.track_meta
        )
        checkpoints.save(prepared, path)
        return prepared


def build_dataset(
    data: Sequence[dict[str, Any]],
    transform: Sequence[Any] | Compose,
    cache: str = "memory",
    cache_dir: str | Path | None = None,
    num_workers: int = 0,
    shard: bool = False,
) -> Dataset:
    """Choose MONAI's dataset by where the deterministic part of the transforms is kept.

    Args:
        data: the datalist.
        transform: up to the first random one, results are kept.
        cache: ``memory`` (CacheDataset), ``disk`` (:class:`DiskCacheDataset`, one file a volume) or ``none``.
        cache_dir: folder for ``disk``; may be shared by runs, also at the same time.
        num_workers: threads that fill the memory cache.
        shard: with several ranks, keep this rank's share only: every ``world_size``-th case from ``rank`` on.

    Raises:
        ValueError: for another ``cache``, ``disk`` without a folder, or more ranks than cases to share.
    """
    if shard:
        if len(data) < parallel.world_size():
            raise ValueError(
                f"{parallel.world_size()} ranks cannot share {len(data)} volumes: start fewer, or give more "
                "volumes (of those to validate on, by --val_fraction)"
            )
        data = data[parallel.rank() :: parallel.world_size()]
    if cache == "memory":
        return CacheDataset(
            data,
            transform,
            num_workers=max(1, num_workers),
            progress=parallel.shows_progress(),
            copy_cache=False,  # which takes longer than a crop does; no transform here writes into its input
        )
    if cache == "disk":
        if cache_dir is None:
            raise ValueError("cache 'disk' needs a cache_dir, a folder with room for the prepared volumes")
        return DiskCacheDataset(data, transform, cache_dir, hash_func=_hash_file, hash_transform=pickle_hashing)
    if cache == "none":
        return Dataset(data, transform)
    raise ValueError(f"cache {cache!r} must be one of {CACHES}")


def _hash_file(item: dict[str, Any]) -> bytes:
    """Name a cached volume by its files' paths, sizes and times of change, so that a changed one is prepared afresh."""
    files = [Path(item["image"]).absolute()]
    files += [Path(item["label"]).absolute()] if Path(str(item.get("label", ""))).is_file() else []
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    identity = repr((states, item.get("case"), item.get("field_of_view")))
    return hashlib.sha256(identity.encode()).hexdigest().encode()
