"""From a folder of scans to two datalists: find the volumes, check them, split them."""

import hashlib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from monai.data import load_decathlon_datalist

from .. import parallel
from ..mistakes import Mistake
from .checks import check_cases, check_labels
from .describing import Case

__all__ = ["case_seed", "find_cases", "labelled", "labelled_folds", "list_cases", "prepare_cases", "split_cases"]

logger = logging.getLogger(__name__)

SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
# Folders and files of these names hold labels, in a folder without a datalist.
LABEL_NAMES = {"label", "labels", "labelstr", "labelsts", "labelsva"}
LABEL_NAMES |= {"mask", "masks", "seg", "segs", "segmentation", "segmentations"}


def prepare_cases(
    dataset_dir: str | Path | Callable[[], str | Path], modality: str, val_fraction: float = 0.2, **checks: Any
) -> dict[str, list[Case]]:
    """Find, check and split: everything between a folder of scans and two datalists, ``training`` and ``validation``.

    ``dataset_dir`` is what :func:`find_cases` takes, or a function that returns it; ``val_fraction`` that of
    :func:`split_cases`, where the data does not say; the others are those of :func:`check_cases`.

    Raises:
        Mistake: when there is nothing to train on; the message says what was found.
    """
    parallel.check_started()
    folds = find_cases(dataset_dir() if callable(dataset_dir) else dataset_dir)
    usable = check_cases([case for fold in folds.values() for case in fold], modality, **checks)
    names = {case["case"] for case in usable}
    folds = {fold: [case for case in cases if case["case"] in names] for fold, cases in folds.items()}
    if "validation" not in folds:
        folds = split_cases(folds["training"], val_fraction)
    for fold, cases in folds.items():
        if not cases:
            raise Mistake(f"no volume is left for {fold} of the {len(usable)} usable ones in {dataset_dir}: add some")
    logger.info("%d volumes to train on, %d to validate on", len(folds["training"]), len(folds["validation"]))
    return folds


def find_cases(dataset_dir: str | Path | None, all_must_exist: bool = True) -> dict[str, list[Case]]:
    """List the volumes of a dataset.

    Args:
        dataset_dir: a folder with a Decathlon ``dataset.json``, a MONAI datalist JSON, or a folder of NIfTI, NRRD or
            MHA files at any depth, of which hidden ones and those named after labels or masks are passed over.
        all_must_exist: refuse a list that names files which do not exist.

    Returns:
        ``training``, and ``validation`` where a datalist names it, by a list of its own or by ``fold: 0``. Each case
        has an ``image`` (path) and a name, ``case``: its path below the dataset without suffix, so that the split by
        name is the same wherever the dataset lies. Where a datalist names them also ``label`` (path), ``class`` and
        ``field_of_view``, the arguments of :func:`bertswin_mae.transforms.cylinder`.

    Raises:
        Mistake: when nothing is there, a listed file is missing, or two files share one case name.
    """
    if dataset_dir is None:
        raise Mistake("give --dataset_dir, a folder of volumes or a datalist JSON")
    source = Path(str(dataset_dir)).expanduser()
    if not source.exists():
        raise Mistake(f"dataset_dir {source} does not exist: give a folder of volumes or a datalist JSON")
    cases = _read_datalist(source / "dataset.json" if source.is_dir() else source, required=not source.is_dir())
    if cases is None:
        cases = {"training": _volumes_below(source)}
    listed = [case for fold in cases.values() for case in fold]
    if not listed:
        raise Mistake(f"{source} holds no volume: looked for {', '.join('*' + suffix for suffix in SUFFIXES)}")
    if all_must_exist and (missing := [case["image"] for case in listed if not Path(case["image"]).is_file()]):
        raise Mistake(f"{source} lists {len(missing)} files that do not exist, the first one {missing[0]}")
    if twins := [name for name, count in Counter(case["case"] for case in listed).items() if count > 1]:
        names = ", ".join(twins[:5])
        raise Mistake(f"{source} has several volumes named {names}: each may be there once, in one list and one format")
    return cases


def list_cases(dataset_dir: str | Path | None) -> list[Case]:
    """List all volumes of a dataset, of every fold, also listed ones that are not there; see :func:`find_cases`."""
    return [case for fold in find_cases(dataset_dir, all_must_exist=False).values() for case in fold]


def split_cases(cases: Sequence[Case], val_fraction: float) -> dict[str, list[Case]]:
    """Split by a hash of the case name: stable when cases are added, and the same on every machine and rank.

    ``val_fraction``, in (0, 1), is the expected share of validation cases; each side gets at least one of the two or
    more that are needed. Their order stays.
    """
    if not 0 < val_fraction < 1:
        raise Mistake(f"val_fraction {val_fraction} must lie between 0 and 1, for example 0.2")
    if len(cases) < 2:
        names = ", ".join(case["case"] for case in cases)
        raise Mistake(f"one volume to train on and one to validate on are needed, there is only: {names}")
    places = {case["case"]: _hash(case["case"]) / 2**64 for case in cases}
    ranked = sorted(places, key=places.__getitem__)
    validation = ({name for name in ranked if places[name] < val_fraction} or {ranked[0]}) - {ranked[-1]}
    return {
        "training": [case for case in cases if case["case"] not in validation],
        "validation": [case for case in cases if case["case"] in validation],
    }


def case_seed(case: str, seed: int) -> int:
    """Derive a seed from a case's name and the run's: for what must be the same for a case every time."""
    return _hash(f"{seed}/{case}") >> 1  # fits a signed 64-bit integer


def labelled(cases: Sequence[Case], most: int | None = None, seed: int = 0, by: str = "label") -> list[Case]:
    """Keep the cases that come with a ``label``, a map, or with a ``class``.

    ``most`` are kept if it is given, chosen by a hash of their names; another seed keeps others. Too few, or none, are
    a Mistake.
    """
    kept = [case for case in cases if by in case]
    if len(kept) < len(cases):
        logger.info("%d of %d cases have a %s, the others are left out", len(kept), len(cases), by)
    if not kept:
        raise Mistake(f"none of the cases has a {by}: a Decathlon folder or a datalist that gives them is needed")
    if most is None:
        return kept
    if most > len(kept):
        raise Mistake(f"num_train_cases {most} is more than the {len(kept)} labelled training cases that there are")
    return sorted(kept, key=lambda case: case_seed(case["case"], seed))[:most]


def labelled_folds(
    folds: dict[str, list[Case]], num_labels: int, most: int | None = None, seed: int = 0, num_threads: int = 4
) -> dict[str, list[Case]]:
    """Keep the cases of both folds that are :func:`labelled`, ``most`` to train on, and :func:`check_labels` of all."""
    kept = {"training": labelled(folds["training"], most, seed), "validation": labelled(folds["validation"])}
    return {fold: check_labels(cases, num_labels, num_threads) for fold, cases in kept.items()}


def _read_datalist(datalist: Path, required: bool) -> dict[str, list[Case]] | None:
    """Read a datalist; None if there is none, or only a JSON of another kind, and none is required."""
    if not datalist.is_file():
        return None
    try:
        content = json.loads(datalist.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise Mistake(f"{datalist} is not a datalist in JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("training"), list):
        if required:
            raise Mistake(f"{datalist} is not a MONAI datalist: it needs a list called 'training' of {{'image': path}}")
        logger.info("%s lists no training images: searching its folder instead", datalist)
        return None
    folds = {}
    for fold in ("training", "validation"):
        if items := content.get(fold):
            for item in items:
                _check_item(item, fold, datalist)
            # As a segmentation's, so that MONAI completes the paths of labels too.
            folds[fold] = load_decathlon_datalist(datalist, is_segmentation=True, data_list_key=fold)
    if others := [name for name in ("test", "testing") if content.get(name)]:
        logger.info("%s: the list %s is left out, only training and validation are used", datalist, others[0])
    training = folds.get("training", [])
    if "validation" not in folds and any("fold" in item for item in training):
        folds["validation"] = [item for item in training if str(item.get("fold")) == "0"]
        folds["training"] = [item for item in training if str(item.get("fold")) != "0"]
    return {fold: [_listed_case(item, datalist.parent) for item in items] for fold, items in folds.items()}


def _check_item(item: Any, fold: str, datalist: Path) -> None:
    if not isinstance(item, dict) or not isinstance(item.get("image"), str):
        raise Mistake(f"{datalist}: every item of '{fold}' needs one 'image' path, but one is {item}")
    for path in (item["image"], item.get("label")):
        # A path in full says what it means; one that climbs may come with somebody else's list.
        if isinstance(path, str) and Path(os.path.normpath(path)).parts[:1] == ("..",):
            way_out = "move the list above its volumes, or write the path in full"
            raise Mistake(f"{datalist} lists {path}, which leads out of its folder: {way_out}")
    if not _is_cylinder(fov := item.get("field_of_view", {"radius": 1})):
        example = "{'radius': 99, 'centre_offset': [0, 0], 'axis': 2}"
        raise Mistake(f"{datalist}: a field_of_view must be like {example} in voxels, but one is {fov}")


def _is_cylinder(fov: Any) -> bool:
    """Tell whether a case's field of view is what :func:`bertswin_mae.transforms.cylinder` takes."""
    if not isinstance(fov, dict) or not {"radius"} <= fov.keys() <= {"radius", "centre_offset", "axis"}:
        return False
    offset = fov.get("centre_offset", [0, 0])
    numbers = (fov["radius"], *offset) if isinstance(offset, list) and len(offset) == 2 else (None,)
    are_finite = all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
    return are_finite and fov["radius"] > 0 and fov.get("axis", 2) in (0, 1, 2)


def _listed_case(item: dict[str, Any], root: Path) -> Case:
    case = {"image": item["image"], "case": _case_name(Path(item["image"]), root)}
    if Path(str(item.get("label", ""))).is_file():
        case["label"] = str(item["label"])
    types = {"field_of_view": dict, "class": str}
    return case | {key: kind(item[key]) for key, kind in types.items() if key in item}


def _volumes_below(root: Path) -> list[Case]:
    """Find the volumes at any depth, through links too, in the order of their names."""
    found, passed_over = [], 0
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        above = [part.lower() for part in Path(folder).relative_to(root).parts]
        volumes = [name for name in files if not name.startswith(".") and name.lower().endswith(SUFFIXES)]
        kept = [name for name in volumes if LABEL_NAMES.isdisjoint([*above, name.lower().split(".")[0]])]
        found += [Path(folder) / name for name in kept]
        passed_over += len(volumes) - len(kept)
    if passed_over:
        logger.info("passed over %d files that are named after labels or masks", passed_over)
    return [{"image": str(path), "case": _case_name(path, root)} for path in sorted(found)]


def _case_name(path: Path, root: Path) -> str:
    # Absolute first: a name must not lead out of the folder that results are written to.
    path, root = (Path(os.path.abspath(place)) for place in (path, root))  # noqa: PTH100 (links stay links)
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix().lstrip("/")
    suffix = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
