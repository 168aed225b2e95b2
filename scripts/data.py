"""Find the volumes, check that each can be used, and split them into training and validation."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import load_decathlon_datalist
from monai.transforms import LoadImage
from tqdm import tqdm

__all__ = [
    "check_cases",
    "find_cases",
    "list_cases",
    "prepare_cases",
    "reason",
    "split_cases",
    "volume_problem",
    "voxel_problem",
]

logger = logging.getLogger(__name__)

SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
# A CT reaches air (-1000 HU) or at least lung and gut gas; what has no voxel below this is on another scale.
CT_NEEDS_BELOW_HU = -200

Case = dict[str, Any]


def prepare_cases(
    dataset_dir: str | Path | Callable[[], str | Path],
    modality: str,
    val_fraction: float = 0.2,
    seed: int = 0,
    skip_invalid: bool = False,
    num_threads: int = 4,
) -> dict[str, list[Case]]:
    """Find, check and split: everything between a folder of scans and two datalists.

    Args:
        dataset_dir: a Medical Segmentation Decathlon folder, any folder with volumes at any depth, a MONAI datalist
            JSON, or a function that returns one of these.
        modality: ``ct`` (Hounsfield units) or ``mr``.
        val_fraction: share of the cases to validate on, where the data does not say.
        seed: fixes the masks that validation uses.
        skip_invalid: leave out volumes that cannot be used, instead of ending the run.
        num_threads: volumes read at once while checking.

    Returns:
        ``training`` and ``validation``, each a list of ``image`` (path), ``case`` (name) and ``seed``.

    Raises:
        ValueError: when there is nothing to train on; the message says what was found.
    """
    folds = find_cases(dataset_dir() if callable(dataset_dir) else dataset_dir)
    usable = check_cases([case for fold in folds.values() for case in fold], modality, skip_invalid, num_threads)
    names = {case["case"] for case in usable}
    folds = {fold: [case for case in cases if case["case"] in names] for fold, cases in folds.items()}
    if "validation" not in folds:
        folds = split_cases(folds["training"], val_fraction)
    for fold, cases in folds.items():
        if not cases:
            raise ValueError(f"no volume is left for {fold} of the {len(names)} usable ones in {dataset_dir}: add some")
        for case in cases:
            case["seed"] = _hash(case["case"], salt=str(seed)) >> 1  # fits a signed 64-bit integer
    logger.info("%d volumes to train on, %d to validate on", len(folds["training"]), len(folds["validation"]))
    return folds


def find_cases(dataset_dir: str | Path | None) -> dict[str, list[Case]]:
    """List the volumes of a dataset.

    Args:
        dataset_dir: a folder with a Decathlon ``dataset.json``, a MONAI datalist JSON, or a folder of NIfTI, NRRD
            or MHA files at any depth. In a plain folder, hidden files and folders named ``labels…`` are passed over.

    Returns:
        ``training``, and ``validation`` where a datalist names it, by a list of its own or by ``fold: 0``. Each case
        is a dict of ``image`` (path), ``case``: its path below the dataset, without suffix; and ``label`` (path) where
        a datalist names one.

    Raises:
        ValueError: when nothing is there, a listed file is missing, or two files share one case name.
    """
    if dataset_dir is None:
        raise ValueError("give --dataset_dir, a folder of volumes or a datalist JSON")
    source = Path(dataset_dir).expanduser()
    if not source.exists():
        raise ValueError(f"dataset_dir {source} does not exist: give a folder of volumes or a datalist JSON")
    datalist = source / "dataset.json" if source.is_dir() else source
    if datalist.is_file():
        cases = _read_datalist(datalist)
    else:
        paths = sorted(path for path in source.rglob("*") if _is_volume(path.relative_to(source)))
        cases = {"training": [{"image": str(path), "case": _case_name(path, source)} for path in paths]}
    listed = [case for fold in cases.values() for case in fold]
    if not listed:
        raise ValueError(f"{source} holds no volume: looked for {', '.join('*' + suffix for suffix in SUFFIXES)}")
    if missing := [case["image"] for case in listed if not Path(case["image"]).is_file()]:
        raise ValueError(f"{datalist} lists {len(missing)} files that do not exist, the first one {missing[0]}")
    if twins := [name for name, count in Counter(case["case"] for case in listed).items() if count > 1]:
        raise ValueError(f"{source} holds several volumes named {', '.join(twins[:5])}: rename or remove the copies")
    return cases


def list_cases(dataset_dir: str | Path | None) -> list[Case]:
    """List all volumes of a dataset, whatever fold they are in; see :func:`find_cases`."""
    return [case for fold in find_cases(dataset_dir).values() for case in fold]


def check_cases(cases: Sequence[Case], modality: str, skip_invalid: bool = False, num_threads: int = 4) -> list[Case]:
    """Read every volume once, before training, and sort out what cannot be used.

    Args:
        cases: from :func:`find_cases`.
        modality: ``ct`` or ``mr``.
        skip_invalid: log the ones that cannot be used and go on without them.
        num_threads: volumes read at once.

    Returns:
        The usable cases.

    Raises:
        ValueError: naming each volume that cannot be used, and why, unless ``skip_invalid``; or when none is left.
    """
    with ThreadPoolExecutor(max(1, num_threads)) as threads:
        checks = threads.map(lambda case: volume_problem(case["image"], modality), cases)
        # disable=None: no bar where nobody watches (a log file).
        bar = tqdm(checks, total=len(cases), desc="checking volumes", unit="volume", leave=False, disable=None)
        problems = list(bar)
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


def volume_problem(path: str | Path, modality: str) -> str | None:
    """Say why a volume's file cannot be used, or None if it can."""
    if Path(path).stat().st_size == 0:
        return "the file is empty"
    try:
        voxels = np.asarray(LoadImage(image_only=True, dtype=None)(path))
    except Exception as error:
        return f"cannot be read ({reason(error)})"
    return voxel_problem(voxels, modality)


def voxel_problem(voxels: np.ndarray, modality: str) -> str | None:
    """Say why an array cannot be used as a volume, or None if it can."""
    shape = voxels.shape
    if voxels.ndim == 4 and shape[-1] == 1:  # a fourth axis of length one is a plain volume
        voxels = voxels[..., 0]
    if voxels.ndim != 3:
        return f"has {voxels.ndim} dimensions {shape} where 3 are needed"
    if voxels.size == 0:
        return f"holds no voxel (shape {shape})"
    if voxels.dtype.names or not np.issubdtype(voxels.dtype, np.number) or np.iscomplexobj(voxels):
        return f"has voxels of type {voxels.dtype} where plain numbers are needed"
    if bad := int(voxels.size - np.isfinite(voxels).sum()):
        return f"has {bad} voxels that are NaN or infinite"
    lowest, highest = voxels.min(), voxels.max()
    if lowest == highest:
        return f"is constant: every voxel is {lowest}"
    if modality == "ct" and lowest > CT_NEEDS_BELOW_HU:
        return (
            f"is not in Hounsfield units: no voxel is below {CT_NEEDS_BELOW_HU} HU (air is -1000), the range is "
            f"{lowest:g} to {highest:g}; for MR use --modality mr"
        )
    return None


def reason(error: BaseException) -> str:
    """Put an error into one line: of MONAI's long ones, the last that names an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "rror:" in line]
    return (telling or lines or [type(error).__name__])[-1]


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


def _read_datalist(datalist: Path) -> dict[str, list[Case]]:
    try:
        content = json.loads(datalist.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{datalist} is not a datalist in JSON: {error}") from error
    if not isinstance(content, dict) or "training" not in content:
        raise ValueError(f"{datalist} is not a MONAI datalist: it needs a list called 'training' of {{'image': path}}")
    folds = {}
    for fold in ("training", "validation"):
        if fold in content:
            # As a segmentation's, so that MONAI completes the paths of labels too.
            items = load_decathlon_datalist(datalist, is_segmentation=True, data_list_key=fold)
            if wrong := [item for item in items if not isinstance(item.get("image"), str)]:
                raise ValueError(f"{datalist}: every item of '{fold}' needs one 'image' path, but one is {wrong[0]}")
            folds[fold] = items
    if "validation" not in folds and any("fold" in item for item in folds["training"]):
        folds["validation"] = [item for item in folds["training"] if item.get("fold") == 0]
        folds["training"] = [item for item in folds["training"] if item.get("fold") != 0]
    return {fold: [_listed_case(item, datalist.parent) for item in items] for fold, items in folds.items()}


def _listed_case(item: dict[str, Any], root: Path) -> Case:
    label = {"label": str(item["label"])} if Path(str(item.get("label", ""))).is_file() else {}
    return {"image": item["image"], "case": _case_name(Path(item["image"]), root), **label}


def _is_volume(path: Path) -> bool:
    hidden_or_label = any(part.startswith(".") for part in path.parts) or any(
        part.lower().startswith("label") for part in path.parts[:-1]
    )
    return path.name.lower().endswith(SUFFIXES) and not hidden_or_label


def _case_name(path: Path, root: Path) -> str:
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
    suffix = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]


def _hash(name: str, salt: str = "") -> int:
    return int.from_bytes(hashlib.sha256((salt + name).encode()).digest()[:8], "big")
