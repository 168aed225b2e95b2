"""Check that volumes and label maps can be used, before anything is trained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from monai.data import MetaTensor
from monai.transforms import Compose, EnsureChannelFirst, LoadImage
from tqdm import tqdm

from .. import parallel
from ..mistakes import Mistake, reason
from .cases import Case

__all__ = ["check_cases", "check_labels", "resampled_shape", "volume_problem", "voxel_problem"]

logger = logging.getLogger(__name__)

# A CT reaches air (-1000 HU) or at least lung and gut gas; what has no voxel below this is on another scale.
CT_NEEDS_BELOW_HU = -200
# Below this there is air, and nothing to learn from.
CT_NEEDS_ABOVE_HU = -500
# The window of the MR intensities; a volume in which both ends coincide has nothing but its background in it.
MR_PERCENTILES = (0.5, 99.5)
# Finer than a microscope's voxels, or coarser than any scanner's: the header has another unit, or none.
PLAUSIBLE_MM = (1e-3, 100.0)
# Of a resampled volume: beyond this, sampling grids overflow, and few machines hold the volume as float32.
MOST_VOXELS = 2**31
# A label map has few whole numbers; an image, however coarse, has more.
LABEL_MAP_VALUES = 8


def check_cases(
    cases: Sequence[Case],
    modality: str,
    in_chans: int = 1,
    skip_invalid: bool = False,
    num_threads: int = 4,
    spacing: Sequence[float] | None = None,
) -> list[Case]:
    """Read every volume once, before training, and sort out what cannot be used.

    Args:
        cases: from :func:`find_cases`.
        modality: ``ct`` or ``mr``.
        in_chans: channels a volume must have.
        skip_invalid: log the ones that cannot be used and go on without them.
        num_threads: volumes read at once.
        spacing: mm that volumes will be resampled to.

    Returns:
        The usable cases.

    Raises:
        Mistake: naming each volume that cannot be used, and why, unless ``skip_invalid``; or when none is left.
    """
    mine = cases[parallel.rank() :: parallel.world_size()]  # several ranks share the work
    with ThreadPoolExecutor(max(1, num_threads)) as threads:
        checks = threads.map(lambda case: volume_problem(case["image"], modality, in_chans, spacing), mine)
        no_bar = not parallel.shows_progress()
        bar = tqdm(checks, total=len(mine), desc="checking volumes", unit="volume", leave=False, disable=no_bar)
        found = {case["case"]: problem for case, problem in zip(mine, bar, strict=True)}
    found = {case: problem for part in parallel.gather(found) for case, problem in part.items()}
    problems = [found[case["case"]] for case in cases]
    bad = [f"{case['image']}: {problem}" for case, problem in zip(cases, problems, strict=True) if problem]
    usable = [case for case, problem in zip(cases, problems, strict=True) if not problem]
    if bad and not skip_invalid:
        listing = "\n  ".join(bad)
        raise Mistake(
            f"{len(bad)} of {len(cases)} volumes cannot be used with modality {modality}:\n  {listing}\n"
            "Mend or remove them, or leave them out with --skip_invalid true."
        )
    for line in bad:
        logger.warning("left out %s", line)
    if not usable:
        raise Mistake(f"none of the {len(cases)} volumes can be used with modality {modality}")
    return usable


def volume_problem(
    path: str | Path, modality: str, in_chans: int = 1, spacing: Sequence[float] | None = None
) -> str | None:
    """Say why a volume's file cannot be used, or None if it can; the arguments are those of :func:`check_cases`."""
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
    if sides.min() < PLAUSIBLE_MM[0] or sides.max() > PLAUSIBLE_MM[1]:
        return (
            f"has voxels of {' x '.join(f'{side:g}' for side in sides)} mm, where {PLAUSIBLE_MM[0]:g} to "
            f"{PLAUSIBLE_MM[1]:g} mm are plausible"
        )
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
    """Say why an array cannot be used as a volume, or None if it can.

    Args:
        voxels: ``(C, D, H, W)``.
        modality: ``ct`` or ``mr``.
        in_chans: what C must be.
    """
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
    problems = (_channel_problem(channel, modality) for channel in voxels)
    return next((problem for problem in problems if problem), None)


def check_labels(cases: list[Case], num_labels: int, num_threads: int = 4) -> list[Case]:
    """Read every label map once, before training.

    Args:
        cases: with ``image`` and ``label``.
        num_labels: labels besides background, numbered from 1.
        num_threads: maps read at once.

    Returns:
        The cases.

    Raises:
        Mistake: naming each map that cannot be used, and why.
    """
    with ThreadPoolExecutor(max(1, num_threads)) as threads:
        problems = threads.map(lambda case: _label_problem(case, num_labels), cases)
        bad = [f"{case['label']}: {problem}" for case, problem in zip(cases, problems, strict=True) if problem]
    if bad:
        listing = "\n  ".join(bad)
        raise Mistake(f"{len(bad)} of {len(cases)} label maps cannot be used:\n  {listing}")
    return cases


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
        return (
            f"holds the values {', '.join(f'{value:g}' for value in found[:8])} where 0 to {num_labels} are expected: "
            "say by --num_labels how many there are"
        )
    return None


def _channel_problem(voxels: np.ndarray, modality: str) -> str | None:
    """Say why one channel cannot be used, or None if it can."""
    lowest, highest = voxels.min(), voxels.max()
    if lowest == highest:
        return f"is constant: every voxel is {lowest}"
    if modality == "ct" and lowest > CT_NEEDS_BELOW_HU:
        return (
            f"is not in Hounsfield units: no voxel is below {CT_NEEDS_BELOW_HU} HU (air is -1000), the range is "
            f"{lowest:g} to {highest:g}; for MR use --modality mr"
        )
    if modality == "ct" and highest < CT_NEEDS_ABOVE_HU:
        return (
            f"holds nothing but air: no voxel is above {CT_NEEDS_ABOVE_HU} HU, the range is {lowest:g} to {highest:g}"
        )
    values = np.unique(voxels.ravel()[:: max(1, voxels.size // 100_000)])
    if len(values) <= LABEL_MAP_VALUES and np.array_equal(values, values.round()):
        return f"looks like a label map: its only values are {', '.join(f'{value:g}' for value in values)}"
    if modality == "mr":
        low, high = np.percentile(voxels, MR_PERCENTILES)
        if low == high:
            return f"is almost empty: {MR_PERCENTILES[1]} % of its voxels are {low:g}; crop it to what it shows"
    return None
