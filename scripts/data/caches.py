"""Where prepared volumes are kept: in memory, on disk, or nowhere."""

import hashlib
import logging
import shutil
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
from monai.data import CacheDataset, Dataset, PersistentDataset, pickle_hashing
from monai.transforms import Compose
from monai.utils import convert_to_tensor

from .. import machine, parallel
from ..mistakes import Mistake, reason
from ..weights import checkpoints
from .checks import resampled_shape
from .index import case_files, fingerprint

__all__ = ["DiskCacheDataset", "ForgivingDataset", "build_dataset", "choose_cache"]
__all__ += ["prepared_bytes"]

logger = logging.getLogger(__name__)

TABLE_BYTES = 4 * 2**16  # of the values that codes stand for
LARGEST_GROWTH = 8  # times the voxels of the files that resampling may make of them: half of the spacing


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


def choose_cache(
    cache: str,
    facts: Sequence[Mapping[str, Any]],
    spacing: Sequence[float] | None,
    img_size: Sequence[int],
    cache_dir: str | Path,
    masks: int = 0,
    compact: int = 0,
) -> str:
    """Choose where prepared volumes are kept, if ``cache`` is ``auto``: in memory, else on disk, where they fit.

    They may take half of the memory that is free, and nine tenths of the disk.

    Args:
        cache: ``auto``, or what the user chose, which is returned.
        facts: of the volumes, from :func:`~bertswin_mae.data.describe_volume`.
        spacing: mm that they are resampled to, or None.
        img_size: voxels that they are padded to, at least.
        cache_dir: the folder on the disk.
        masks: that are kept with each volume, such as a label map.
        compact: how many, the first ones, are kept as :class:`~bertswin_mae.transforms.Compactd` does.

    Raises:
        Mistake: when they fit neither, or would only fit the disk as they are made many times larger.
    """
    if cache != "auto":
        return cache
    codes = prepared_bytes(facts[:compact], spacing, img_size, masks, channel=2)
    prepared = sum([*codes, len(codes) * TABLE_BYTES, *prepared_bytes(facts[compact:], spacing, img_size, masks)])
    stored = sum(prepared_bytes(facts, None, (1, 1, 1), masks))
    folder = Path(cache_dir).resolve()  # which may be, or lie behind a link to, another disk
    disk = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    # A run that goes on finds its own there. Of other runs' volumes no more is counted than this one needs.
    disk += min(prepared, sum(file.stat().st_size for file in folder.glob("*.pt")))
    # The ranks must agree, whatever each of them finds.
    memory, disk = (idist.all_reduce(float(free), op="MIN") for free in (machine.free_memory(), disk))
    needed = f"the {len(facts)} prepared volumes take {prepared / 1e9:.3g} GB"
    if prepared <= memory / 2:
        logger.info("%s of %.3g GB of free memory: they are kept there", needed, memory / 1e9)
        return "memory"
    if prepared <= 0.9 * disk and prepared <= LARGEST_GROWTH * stored:
        logger.info("%s, too much for %.3g GB of free memory: they are kept in %s", needed, memory / 1e9, folder)
        return "disk"
    grown = f", {prepared / stored:.0f} times what the files hold" if prepared > 2 * stored else ""
    where = f"at a spacing of {list(spacing)} mm" if spacing else "at their own spacing"
    raise Mistake(
        f"{needed} {where}{grown}; {memory / 1e9:.3g} GB of memory and {disk / 1e9:.3g} GB of disk are free. Let the "
        "settings be planned by `python -m monai.bundle run plan --config_file configs/train.yaml --dataset_dir DIR`, "
        "or choose --spacing, or --cache none"
    )


def prepared_bytes(
    facts: Sequence[Mapping[str, Any]],
    spacing: Sequence[float] | None,
    img_size: Sequence[int],
    masks: int = 0,
    channel: int = 4,
) -> list[int]:
    """Tell how many bytes each volume takes at most once prepared: ``channel`` a voxel and channel, masks one a voxel.

    Training keeps it with a border all round, an eighth of a crop, that a crop turns into.
    """
    shapes = (np.maximum(resampled_shape(one, spacing), img_size) for one in facts)
    shapes = (shape + shape % 2 + np.array(img_size) // 4 for shape in shapes)
    return [int((channel * one["shape"][0] + masks) * shape.prod()) for one, shape in zip(facts, shapes, strict=True)]


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
    data = [{"case": str(item["image"]), **item} for item in data]  # of an application's list, named by its file
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
    files = case_files(item) + [file for file in case_files(item, ("label",)) if file.is_file()]
    identity = repr((fingerprint(files), item.get("case"), item.get("field_of_view")))
    return hashlib.sha256(identity.encode()).hexdigest().encode()
