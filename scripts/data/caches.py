"""Where prepared volumes are kept: in memory, on disk, or nowhere."""

import hashlib
import logging
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from monai.data import CacheDataset, Dataset, PersistentDataset, pickle_hashing
from monai.transforms import Compose
from monai.utils import convert_to_tensor

from .. import parallel
from ..mistakes import Mistake, reason
from ..weights import checkpoints

__all__ = ["DiskCacheDataset", "ForgivingDataset", "build_dataset"]

logger = logging.getLogger(__name__)


class ForgivingDataset(Dataset):
    """MONAI's Dataset that answers with the reason where a case cannot be loaded, instead of ending the run."""

    def _transform(self, index: int) -> dict[str, Any]:
        try:
            return super()._transform(index)
        except Exception as error:
            return {"case": self.data[index]["case"], "error": reason(error)}


class DiskCacheDataset(PersistentDataset):
    """MONAI's PersistentDataset whose files several runs may write and read at once, and that replaces damaged ones."""

    def _cachecheck(self, item_transformed: dict[str, Any]) -> dict[str, Any]:
        path = self.cache_dir / f"{self.hash_func(item_transformed).decode()}{self.transform_hash}.pt"
        if path.is_file():
            try:
                return checkpoints.load(path)
            except checkpoints.DamagedCheckpointError as error:
                logger.warning("%s; this volume is prepared again", error)
        prepared = self._pre_transform(deepcopy(item_transformed))
        prepared = convert_to_tensor(prepared, convert_numeric=False, track_meta=self.track_meta)
        checkpoints.save(prepared, path)  # beside its place, then renamed: nobody reads half a file
        return prepared


def build_dataset(
    data: Sequence[dict[str, Any]],
    transform: Sequence[Any] | Compose,
    cache: str = "memory",
    cache_dir: str | Path | None = None,
    num_workers: int = 0,
    shard: bool = False,
) -> Dataset:
    """Choose MONAI's dataset by where the results of the transforms up to the first random one are kept.

    ``cache`` is ``memory`` (CacheDataset, filled by ``num_workers`` threads), ``disk`` (:class:`DiskCacheDataset`, one
    file a volume in ``cache_dir``, which runs may share, also at the same time) or ``none``. ``shard`` keeps this
    rank's share of the data only: every ``world_size``-th case from ``rank`` on.

    Raises:
        Mistake: for another ``cache``, ``disk`` without a folder, or more ranks than cases to share.
    """
    if shard:
        if len(data) < (ranks := idist.get_world_size()):
            more = "start fewer, or give more volumes (of those to validate on, by --val_fraction)"
            raise Mistake(f"{ranks} ranks cannot share {len(data)} volumes: {more}")
        data = data[idist.get_rank() :: ranks]
    if cache == "memory":
        threads, shows_bar = max(1, num_workers), parallel.shows_progress()
        # To copy what is kept takes longer than a crop does, and no transform here writes into its input.
        return CacheDataset(data, transform, num_workers=threads, progress=shows_bar, copy_cache=False)
    if cache == "disk":
        if cache_dir is None:
            raise Mistake("cache 'disk' needs a cache_dir, a folder with room for the prepared volumes")
        return DiskCacheDataset(data, transform, cache_dir, hash_func=_hash_file, hash_transform=pickle_hashing)
    if cache == "none":
        return Dataset(data, transform)
    raise Mistake(f"cache {cache!r} must be one of ('memory', 'disk', 'none')")


def _hash_file(item: dict[str, Any]) -> bytes:
    """Name a cached volume by its files' paths, sizes and times of change, so that a changed one is prepared afresh."""
    images = item["image"] if isinstance(item["image"], list) else [item["image"]]
    files = [Path(image).absolute() for image in images]
    files += [Path(item["label"]).absolute()] if Path(str(item.get("label", ""))).is_file() else []
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    identity = repr((states, item.get("case"), item.get("field_of_view")))
    return hashlib.sha256(identity.encode()).hexdigest().encode()
