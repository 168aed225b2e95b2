"""Check that volumes and label maps can be used, before anything is trained."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
from monai.data import MetaTensor
from monai.transforms import Compose, EnsureChannelFirst, LoadImage
from tqdm import tqdm

from .. import parallel
from ..mistakes import Mistake, reason

__all__ = ["check_cases", "check_labels", "resampled_shape", "volume_problem", "voxel_problem"]

logger = logging.getLogger(__name__)

Case = dict[str, Any]

CT_NEEDS_BELOW_HU = -200  # a CT has air (-1000 HU), or at least lung or gut gas; else it is on another scale
CT_NEEDS_ABOVE_HU = -500  # below there is air, and nothing to learn from
MR_PERCENTILES = (0.5, 99.5)  # the intensity window; where both ends coincide there is nothing but background
PLAUSIBLE_MM = (1e-3, 100.0)  # beyond any microscope's and any scanner's voxels: the header has another unit, or none
MOST_VOXELS = 2**31  # beyond, sampling grids overflow, and few machines hold the volume as float32
LABEL_MAP_VALUES = 8  # a label map has few whole numbers; an image, however coarse, has more


def check_cases(
    cases: Sequence[Case],
    modality: str,
    in_chans: int = 1,
    skip_invalid: bool = False,
    num_threads: int = 4,
    spacing: Sequence[float] | None = None,
) -> list[Case]:
    """Read every volume once, before training, and return the cases that can be used.

    Args:
        cases: from :func:`find_cases`.
        modality: ``ct`` (Hounsfield units) or ``mr``.
        in_chans: channels a volume must have.
        skip_invalid: leave out volumes that cannot be used, instead of ending the run.
        num_threads: volumes read at once.
        spacing: mm that volumes will be resampled to, if at all: what would not fit in memory then is refused.

    Raises:
        Mistake: naming each volume that cannot be used, and why, unless ``skip_invalid``; or when none is left.
    """
    arguments = (modality, in_chans, spacing)
    found = _problems(cases, "image", lambda case: volume_problem(case["image"], *arguments), num_threads)
    if found and not skip_invalid:
        raise Mistake(
            f"{len(found)} of {len(cases)} volumes cannot be used with modality {modality}:{_listing(found)}\n"
            "Mend or remove them, or leave them out with --skip_invalid true."
        )
    for path, problem in found.items():
        logger.warning("left out %s: %s", path, problem)
    if len(found) == len(cases):
        raise Mistake(f"none of the {len(cases)} volumes can be used with modality {modality}")
    return [case for case in cases if case["image"] not in found]


def check_labels(cases: list[Case], num_labels: int, num_threads: int = 4) -> list[Case]:
    """Read every label map once, with labels from 0 to ``num_labels``, and return the cases; as :func:`check_cases`."""
    if found := _problems(cases, "label", lambda case: _label_problem(case, num_labels), num_threads):
        raise Mistake(f"{len(found)} of {len(cases)} label maps cannot be used:{_listing(found)}")
    return cases


def _problems(cases: Sequence[Case], key: str, check: Callable[[Case], str | None], num_threads: int) -> dict[str, str]:
    """Return what is wrong with the files under a key, by their path; the ranks share the work, and each knows all."""
    mine, no_bar = cases[idist.get_rank() :: idist.get_world_size()], not parallel.shows_progress()
    with ThreadPoolExecutor(max(1, num_threads)) as threads:
        checks = threads.map(check, mine)
        bar = tqdm(checks, total=len(mine), desc=f"checking {key}s", unit=key, leave=False, disable=no_bar)
        found = {case[key]: problem for case, problem in zip(mine, bar, strict=True) if problem}
    found = {path: problem for part in idist.all_gather(found) for path, problem in part.items()}
    return {case[key]: found[case[key]] for case in cases if case[key] in found}


def _listing(problems: dict[str, str]) -> str:
    return "".join(f"\n  {path}: {problem}" for path, problem in problems.items())


def volume_problem(
    path: str | Path, modality: str, in_chans: int = 1, spacing: Sequence[float] | None = None
) -> str | None:
    """Say why a volume's file cannot be used, or None; arguments as of :func:`check_cases`."""
    try:
        with Path(path).open("rb") as file:  # whose errors say more than those of the readers
            if not file.read(1):
                return "the file is empty"
        image = EnsureChannelFirst()(LoadImage(image_only=True, dtype=None)(path))
    except Exception as error:
        return f"cannot be read ({reason(error)})"
    affine = np.asarray(image.affine)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        return f"has an affine that maps voxels to no place in space: {affine[:3].round(6).tolist()}"
    sides = np.asarray(image.pixdim)
    low, high = PLAUSIBLE_MM
    if sides.min() < low or sides.max() > high:
        has = " x ".join(f"{side:g}" for side in sides)
        return f"has voxels of {has} mm, where {low:g} to {high:g} mm are plausible"
    if problem := voxel_problem(np.asarray(image), modality, in_chans):
        return problem
    resampled = resampled_shape(image, spacing).prod()
    if resampled > MOST_VOXELS:
        return (
            f"would have {resampled:.2g} voxels at a spacing of {list(spacing or sides.round(3).tolist())} mm, more "
            f"than {MOST_VOXELS:.2g}: choose a larger --spacing, or crop it"
        )
    return None


def resampled_shape(image: MetaTensor, spacing: Sequence[float] | None) -> np.ndarray:
    """Tell what shape, in voxels, an image ``(C, D, H, W)`` will have at a spacing in mm; None: the one it has."""
    shape = np.array(image.shape[1:], dtype=float)
    return shape if spacing is None else np.ceil(shape * np.array(image.pixdim) / np.array(spacing))


def voxel_problem(voxels: np.ndarray, modality: str, in_chans: int = 1) -> str | None:
    """Say why an array ``(C, D, H, W)`` cannot be used as a volume, or None; arguments as of :func:`check_cases`."""
    channels, *shape = voxels.shape
    if len(shape) != 3:
        return f"has {len(shape)} dimensions {tuple(shape)} where 3 are needed"
    if channels != in_chans:
        return f"has {channels} channels (or times) of {tuple(shape)} where in_chans is {in_chans}"
    if voxels.size == 0:
        return f"holds no voxel (shape {tuple(shape)})"
    if min(shape) == 1:
        return f"is a single slice of shape {tuple(shape)}, where a volume is needed"
    if voxels.dtype.names or not np.issubdtype(voxels.dtype, np.number) or np.iscomplexobj(voxels):
        return f"has voxels of type {voxels.dtype} where plain numbers are needed"
    if bad := int(voxels.size - np.isfinite(voxels).sum()):
        return f"has {bad} voxels that are NaN or infinite"
    return next(filter(None, (_channel_problem(channel, modality) for channel in voxels)), None)


def _label_problem(case: Case, num_labels: int) -> str | None:
    load = Compose([LoadImage(image_only=True, dtype=None), EnsureChannelFirst()])
    try:
        label = np.asarray(load(case["label"]))
    except Exception as error:
        return f"cannot be read ({reason(error)})"
    shape = load(case["image"]).shape[1:]
    if label.shape != (1, *shape):
        return f"has shape {label.shape[1:]} where its image has {tuple(shape)}"
    found = np.unique(label)
    if not np.isin(found, np.arange(num_labels + 1)).all():
        values = ", ".join(f"{value:g}" for value in found[:8])
        return f"holds the values {values} where 0 to {num_labels} are expected: say by --num_labels how many there are"
    return None


def _channel_problem(voxels: np.ndarray, modality: str) -> str | None:
    lowest, highest = voxels.min(), voxels.max()
    if lowest == highest:
        return f"is constant: every voxel is {lowest}"
    spread = f"the range is {lowest:g} to {highest:g}"
    if modality == "ct" and lowest > CT_NEEDS_BELOW_HU:
        needs = f"no voxel is below {CT_NEEDS_BELOW_HU} HU (air is -1000)"
        return f"is not in Hounsfield units: {needs}, {spread}; for MR use --modality mr"
    if modality == "ct" and highest < CT_NEEDS_ABOVE_HU:
        return f"holds nothing but air: no voxel is above {CT_NEEDS_ABOVE_HU} HU, {spread}"
    values = np.unique(voxels.ravel()[:: max(1, voxels.size // 100_000)])
    if len(values) <= LABEL_MAP_VALUES and np.array_equal(values, values.round()):
        return f"looks like a label map: its only values are {', '.join(f'{value:g}' for value in values)}"
    if modality == "mr":
        low, high = np.percentile(voxels, MR_PERCENTILES)
        if low == high:
            return f"is almost empty: {MR_PERCENTILES[1]} % of its voxels are {low:g}; crop it to what it shows"
    return None
