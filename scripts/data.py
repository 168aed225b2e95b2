"""Find the volumes, check that each can be used, and split them into training and validation."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import MetaTensor, load_decathlon_datalist
from monai.transforms import Compose, EnsureChannelFirst, LoadImage
from tqdm import tqdm

from . import parallel

__all__ = [
    "case_seed",
    "causes",
    "check_cases",
    "check_labels",
    "find_cases",
    "labelled",
    "list_cases",
    "prepare_cases",
    "reason",
    "resampled_shape",
    "split_cases",
    "volume_problem",
    "voxel_problem",
]

logger = logging.getLogger(__name__)

SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
# Folders and files of these names hold labels, in a folder without a datalist.
LABEL_NAMES = {
    *("label", "labels", "labelstr", "labelsts", "labelsva"),
    *("mask", "masks", "seg", "segs", "segmentation", "segmentations"),
}
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

Case = dict[str, Any]


def prepare_cases(
    dataset_dir: str | Path | Callable[[], str | Path],
    modality: str,
    in_chans: int = 1,
    val_fraction: float = 0.2,
    skip_invalid: bool = False,
    num_threads: int = 4,
    spacing: Sequence[float] | None = None,
) -> dict[str, list[Case]]:
    """Find, check and split: everything between a folder of scans and two datalists.

    Args:
        dataset_dir: a Medical Segmentation Decathlon folder, any folder with volumes at any depth, a MONAI datalist
            JSON, or a function that returns one of these.
        modality: ``ct`` (Hounsfield units) or ``mr``.
        in_chans: channels a volume must have.
        val_fraction: share of the cases to validate on, where the data does not say.
        skip_invalid: leave out volumes that cannot be used, instead of ending the run.
        num_threads: volumes read at once while checking.
        spacing: mm that volumes will be resampled to, if at all: what would not fit in memory then is refused.

    Returns:
        ``training`` and ``validation``; see :func:`find_cases`.

    Raises:
        ValueError: when there is nothing to train on; the message says what was found.
    """
    parallel.check_started()
    folds = find_cases(dataset_dir() if callable(dataset_dir) else dataset_dir)
    listed = [case for fold in folds.values() for case in fold]
    usable = {case["case"] for case in check_cases(listed, modality, in_chans, skip_invalid, num_threads, spacing)}
    folds = {fold: [case for case in cases if case["case"] in usable] for fold, cases in folds.items()}
    if "validation" not in folds:
        folds = split_cases(folds["training"], val_fraction)
    for fold, cases in folds.items():
        if not cases:
            raise ValueError(
                f"no volume is left for {fold} of the {len(usable)} usable ones in {dataset_dir}: add some"
            )
    logger.info("%d volumes to train on, %d to validate on", len(folds["training"]), len(folds["validation"]))
    return folds


def find_cases(dataset_dir: str | Path | None, all_must_exist: bool = True) -> dict[str, list[Case]]:
    """List the volumes of a dataset.

    Args:
        dataset_dir: a folder with a Decathlon ``dataset.json``, a MONAI datalist JSON, or a folder of NIfTI, NRRD
            or MHA files at any depth. In a plain folder, hidden files and what is named after labels or masks are
            passed over.
        all_must_exist: refuse a list that names files which do not exist.

    Returns:
        ``training``, and ``validation`` where a datalist names it, by a list of its own or by ``fold: 0``. Each case
        is a dict of ``image`` (path), ``case``: its path below the dataset, without suffix (so that the split by
        name is the same wherever the dataset lies); and where a datalist names them ``label`` (path), ``class`` and
        ``field_of_view``, the arguments of :func:`bertswin_mae.transforms.cylinder`.

    Raises:
        ValueError: when nothing is there, a listed file is missing, or two files share one case name.
    """
    if dataset_dir is None:
        raise ValueError("give --dataset_dir, a folder of volumes or a datalist JSON")
    source = Path(str(dataset_dir)).expanduser()
    if not source.exists():
        raise ValueError(f"dataset_dir {source} does not exist: give a folder of volumes or a datalist JSON")
    cases = _read_datalist(source / "dataset.json" if source.is_dir() else source, required=not source.is_dir())
    if cases is None:
        paths = _volumes_below(source)
        cases = {"training": [{"image": str(path), "case": _case_name(path, source)} for path in paths]}
    listed = [case for fold in cases.values() for case in fold]
    if not listed:
        raise ValueError(f"{source} holds no volume: looked for {', '.join('*' + suffix for suffix in SUFFIXES)}")
    missing = [case["image"] for case in listed if not Path(case["image"]).is_file()]
    if missing and all_must_exist:
        raise ValueError(f"{source} lists {len(missing)} files that do not exist, the first one {missing[0]}")
    if twins := [name for name, count in Counter(case["case"] for case in listed).items() if count > 1]:
        raise ValueError(
            f"{source} has several volumes named {', '.join(twins[:5])}: each may be there once, in one list and one "
            "format"
        )
    return cases


def list_cases(dataset_dir: str | Path | None) -> list[Case]:
    """List all volumes of a dataset, of every fold, also listed ones that are not there; see :func:`find_cases`."""
    return [case for fold in find_cases(dataset_dir, all_must_exist=False).values() for case in fold]


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
        ValueError: naming each volume that cannot be used, and why, unless ``skip_invalid``; or when none is left.
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
        raise ValueError(
            f"{len(bad)} of {len(cases)} volumes cannot be used with modality {modality}:\n  {listing}\n"
            "Mend or remove them, or leave them out with --skip_invalid true."
        )
    for line in bad:
        logger.warning("left out %s", line)
    if not usable:
        raise ValueError(f"none of the {len(cases)} volumes can be used with modality {modality}")
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


def split_cases(cases: Sequence[Case], val_fraction: float) -> dict[str, list[Case]]:
    """Split by a hash of the case name: stable when cases are added, and the same on every machine and rank.

    Args:
        cases: dicts with a ``case``.
        val_fraction: expected share of validation cases, in (0, 1). Each side gets at least one case.

    Returns:
        ``training`` and ``validation``, in the order of ``cases``.

    Raises:
        ValueError: for a fraction outside (0, 1), or fewer than two cases.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction {val_fraction} must lie between 0 and 1, for example 0.2")
    if len(cases) < 2:
        names = ", ".join(case["case"] for case in cases)
        raise ValueError(f"one volume to train on and one to validate on are needed, there is only: {names}")
    places = {case["case"]: _hash(case["case"]) / 2**64 for case in cases}
    ranked = sorted(places, key=places.__getitem__)
    validation = {name for name in ranked if places[name] < val_fraction} or {ranked[0]}
    validation -= {ranked[-1]}
    return {
        "training": [case for case in cases if case["case"] not in validation],
        "validation": [case for case in cases if case["case"] in validation],
    }


def case_seed(case: str, seed: int) -> int:
    """Derive a seed from a case's name and the run's: for what must be the same for a case every time."""
    return _hash(f"{seed}/{case}") >> 1  # fits a signed 64-bit integer


def labelled(cases: Sequence[Case], most: int | None = None, seed: int = 0, by: str = "label") -> list[Case]:
    """Keep the cases that come with a label.

    Args:
        cases: from :func:`find_cases`.
        most: keep so many at the most: those whose names have the smallest hash.
        seed: another one keeps others.
        by: ``label``, a map, or ``class``.

    Raises:
        ValueError: when there are none, or fewer than are asked for.
    """
    kept = [case for case in cases if by in case]
    if len(kept) < len(cases):
        logger.info("%d of %d cases have a %s, the others are left out", len(kept), len(cases), by)
    if not kept:
        raise ValueError(f"none of the cases has a {by}: a Decathlon folder or a datalist that gives them is needed")
    if most is None:
        return kept
    if most > len(kept):
        raise ValueError(f"num_train_cases {most} is more than the {len(kept)} labelled training cases that there are")
    return sorted(kept, key=lambda case: case_seed(case["case"], seed))[:most]


def check_labels(cases: list[Case], num_labels: int, num_threads: int = 4) -> list[Case]:
    """Read every label map once, before training.

    Args:
        cases: with ``image`` and ``label``.
        num_labels: labels besides background, numbered from 1.
        num_threads: maps read at once.

    Returns:
        The cases.

    Raises:
        ValueError: naming each map that cannot be used, and why.
    """
    with ThreadPoolExecutor(max(1, num_threads)) as threads:
        problems = threads.map(lambda case: _label_problem(case, num_labels), cases)
        bad = [f"{case['label']}: {problem}" for case, problem in zip(cases, problems, strict=True) if problem]
    if bad:
        listing = "\n  ".join(bad)
        raise ValueError(f"{len(bad)} of {len(cases)} label maps cannot be used:\n  {listing}")
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


def causes(error: BaseException) -> Iterator[BaseException]:
    """Walk from an error back through what led to it, itself first."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def reason(error: BaseException) -> str:
    """Put an error into one line: of MONAI's long ones, the last that names an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "rror:" in line]
    return (telling or lines or [type(error).__name__])[-1]


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


def _read_datalist(datalist: Path, required: bool) -> dict[str, list[Case]] | None:
    """Read a datalist; None if there is none, or only a JSON of another kind, and none is required."""
    if not datalist.is_file():
        return None
    try:
        content = json.loads(datalist.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{datalist} is not a datalist in JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("training"), list):
        if required:
            raise ValueError(
                f"{datalist} is not a MONAI datalist: it needs a list called 'training' of {{'image': path}}"
            )
        logger.info("%s lists no training images: searching its folder instead", datalist)
        return None
    folds = {}
    for fold in ("training", "validation"):
        if content.get(fold):
            if wrong := [item for item in content[fold] if not _has_image(item)]:
                raise ValueError(f"{datalist}: every item of '{fold}' needs one 'image' path, but one is {wrong[0]}")
            if strays := [path for item in content[fold] for path in _paths(item) if _leads_out(path)]:
                raise ValueError(
                    f"{datalist} lists {strays[0]}, which leads out of its folder: move the list above its volumes, or "
                    "write the path in full"
                )
            if odd := [item for item in content[fold] if not _is_cylinder(item.get("field_of_view", {"radius": 1}))]:
                raise ValueError(
                    f"{datalist}: a field_of_view must be like {{'radius': 99, 'centre_offset': [0, 0], 'axis': 2}} in "
                    f"voxels, but one is {odd[0]['field_of_view']}"
                )
            # As a segmentation's, so that MONAI completes the paths of labels too.
            folds[fold] = load_decathlon_datalist(datalist, is_segmentation=True, data_list_key=fold)
    if others := [name for name in ("test", "testing") if content.get(name)]:
        logger.info("%s: the list %s is left out, only training and validation are used", datalist, others[0])
    training = folds.get("training", [])
    if "validation" not in folds and any("fold" in item for item in training):
        folds["validation"] = [item for item in training if str(item.get("fold")) == "0"]
        folds["training"] = [item for item in training if str(item.get("fold")) != "0"]
    return {fold: [_listed_case(item, datalist.parent) for item in items] for fold, items in folds.items()}


def _paths(item: dict[str, Any]) -> list[str]:
    return [item[key] for key in ("image", "label") if isinstance(item.get(key), str)]


def _leads_out(path: str) -> bool:
    # A path in full says what it means; one that climbs may come with somebody else's list.
    return Path(os.path.normpath(path)).parts[:1] == ("..",)


def _has_image(item: Any) -> bool:
    return isinstance(item, dict) and isinstance(item.get("image"), str)


def _listed_case(item: dict[str, Any], root: Path) -> Case:
    label = {"label": str(item["label"])} if Path(str(item.get("label", ""))).is_file() else {}
    fov = {"field_of_view": item["field_of_view"]} if "field_of_view" in item else {}
    known = {"class": str(item["class"])} if "class" in item else {}
    return {"image": item["image"], "case": _case_name(Path(item["image"]), root), **label, **fov, **known}


def _is_cylinder(fov: Any) -> bool:
    """Tell whether a case's field of view is what :func:`bertswin_mae.transforms.cylinder` takes."""
    if not isinstance(fov, dict) or not {"radius"} <= fov.keys() <= {"radius", "centre_offset", "axis"}:
        return False
    offset = fov.get("centre_offset", [0, 0])
    if not isinstance(offset, list) or len(offset) != 2 or fov.get("axis", 2) not in (0, 1, 2):
        return False
    numbers = (fov["radius"], *offset)
    return all(_is_a_number(number) for number in numbers) and fov["radius"] > 0


def _is_a_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _volumes_below(root: Path) -> list[Path]:
    """Find the volumes at any depth, through links too, in the order of their names."""
    found, passed_over = [], 0
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        is_labels = any(part.lower() in LABEL_NAMES for part in Path(folder).relative_to(root).parts)
        for name in files:
            if name.startswith(".") or not name.lower().endswith(SUFFIXES):
                continue
            if is_labels or name.lower().split(".")[0] in LABEL_NAMES:
                passed_over += 1
            else:
                found.append(Path(folder) / name)
    if passed_over:
        logger.info("passed over %d files that are named after labels or masks", passed_over)
    return sorted(found)


def _case_name(path: Path, root: Path) -> str:
    # Absolute first: a name must not lead out of the folder that results are written to.
    path, root = (Path(os.path.abspath(place)) for place in (path, root))  # noqa: PTH100 (links stay links)
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix().lstrip("/")
    suffix = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
