"""What lies on the disk, as cases: a datalist, a folder of nnU-Net or BIDS, any folder, one volume."""

import glob
import json
import logging
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from ..mistakes import Mistake
from .describing import Case
from .dicom import Remember, is_dicom
from .reading import SUFFIXES
from .searching import OTHERS, case_name, cases_of, files_below, longest_suffix, series_cases, sort_out

__all__ = ["class_name", "dataset_facts", "label_names", "read_dataset"]

logger = logging.getLogger(__name__)

Folds = dict[str, list[Case]]
UNNAMED = "unnamed"  # the cases that a split leaves out

NNUNET_FILE = re.compile(r"(.+)_\d{4}")
BIDS_FILE = re.compile(r"(?P<patient>sub-[a-zA-Z0-9]+)(_(?P<session>ses-[a-zA-Z0-9]+))?(_.+)?_(?P<suffix>[a-zA-Z0-9]+)")
PATIENT_KEYS = ("patient", "subject", "PatientID", "participant_id")
# Names that mean something on the way of a case to the network: a datalist cannot give them another meaning.
OWN_KEYS = ("image", "label", "case", "fold", "modality", "lacks", "fov", "seed", "target", "error")


def read_dataset(
    dataset_dir: str | Path, contrasts: str | Sequence[str] | None = None, remember: Remember | None = None
) -> Folds:
    """Read the cases of a dataset, as it is laid out; arguments, results and errors as of ``find_cases``.

    A case that lacks a channel says so under ``lacks``; those that a split does not name are a fold of their own,
    ``UNNAMED``. ``remember`` is of ``find_series``.
    """
    source = Path(str(dataset_dir)).expanduser()
    if source.is_dir():
        content = _read_json(source / "dataset.json") if (source / "dataset.json").is_file() else {}
        folds = _nnunet_folds(source, content) or _listed_folds(source / "dataset.json", content, remember)
        if folds is None and (images := _bids_images(source)):
            return {"training": _bids_cases(source, images, contrasts)}
        if folds is None:
            folds = {"training": cases_of(source, files_below(source, [source]), remember=remember)}
    elif source.exists():
        folds = _one_file(source, remember)
    elif glob.has_magic(str(source)):
        folds = {"training": _matching(source)}
    else:
        raise Mistake(f"dataset_dir {source} does not exist: give a folder of volumes or a datalist JSON")
    if contrasts:
        raise Mistake(f"contrasts {contrasts} are chosen in BIDS folders, but {source} is none: leave them out")
    return folds


def dataset_facts(dataset_dir: str | Path | None) -> dict[str, Any]:
    """Read what ``dataset.json`` or a datalist says of a dataset as a whole, such as its ``name`` and ``licence``."""
    source = Path(str(dataset_dir)).expanduser()
    file = source / "dataset.json" if source.is_dir() else source
    content = _read_json(file) if file.suffix == ".json" and file.is_file() else {}
    return content if isinstance(content, dict) else {}


def label_names(dataset_dir: str | Path | None, num_labels: int) -> list[str]:
    """Name the values of label maps, from 0 on: as the dataset does, else ``background``, ``label_1``, ….

    The Decathlon names by number (``{"1": "liver"}``), nnU-Net numbers by name (``{"liver": 1}``).
    """
    labels = dataset_facts(dataset_dir).get("labels")
    pairs = labels.items() if isinstance(labels, dict) else enumerate(labels) if isinstance(labels, list) else ()
    named = ((key, name) if str(key).isdecimal() else (name, key) for key, name in pairs)
    found = {str(number): str(name) for number, name in named}
    return ["background", *(found.get(str(number), f"label_{number}") for number in range(1, num_labels + 1))]


# ------------------------------------------------------------------------------------------------- files and folders


def _one_file(path: Path, remember: Remember | None) -> Folds:
    if longest_suffix(path, (*SUFFIXES, *OTHERS)):
        return {"training": cases_of(path.parent, [path], chosen=True)}
    if is_dicom(path):
        return {"training": cases_of(path.parent, [path])}
    folds = _listed_folds(path, _read_json(path), remember)
    if folds is None:
        raise Mistake(f"{path} is not a MONAI datalist: it needs a list called 'training' of {{'image': path}}")
    return folds


def _matching(pattern: Path) -> list[Case]:
    """Find the volumes among what a pattern matches, files and folders."""
    fixed = [part for part in pattern.parents if not glob.has_magic(str(part))]
    found = [Path(path) for path in sorted(glob.glob(str(pattern), recursive=True))]  # noqa: PTH207 (absolute, too)
    if not found:
        raise Mistake(f"dataset_dir {pattern} matches no file")
    folders = [path for path in found if path.is_dir()]
    return cases_of(fixed[0], [*(path for path in found if not path.is_dir()), *files_below(fixed[0], folders)])


# -------------------------------------------------------------------------------------------------------- datalists


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())  # of bytes, Python tells UTF-8 and UTF-16, with marks and without
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise Mistake(f"{path} is not a datalist in JSON: {error}") from error


def _listed_folds(datalist: Path, content: Any, remember: Remember | None) -> Folds | None:
    """Read a datalist of MONAI or the Decathlon; None, if it is a JSON of another kind."""
    if not isinstance(content, dict) or not isinstance(content.get("training"), list):
        if content != {}:
            logger.info("%s lists no training images", datalist)
        return None
    folds = {fold: content[fold] for fold in ("training", "validation") if content.get(fold) or fold == "training"}
    for fold, items in folds.items():
        for item in items:
            _check_item(item, fold, datalist)
    if others := [name for name in ("test", "testing") if content.get(name)]:
        logger.info("%s: the list %s is left out, only training and validation are used", datalist, others[0])
    training = folds["training"]
    if "validation" not in folds and any("fold" in item for item in training):
        folds["validation"] = [item for item in training if str(item.get("fold")) == "0"]
        folds["training"] = [item for item in training if str(item.get("fold")) != "0"]
    return {fold: [_listed_case(item, datalist.parent, remember) for item in items] for fold, items in folds.items()}


def _check_item(item: Any, fold: str, datalist: Path) -> None:
    images = item.get("image") if isinstance(item, dict) else None
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not images or not all(isinstance(path, str) for path in images):
        raise Mistake(
            f"{datalist}: every item of {fold!r} needs one 'image' path, or a list of them, but one is {item}"
        )
    for path in (*images, item.get("label")):
        _check_path(path, datalist)
    if not _is_cylinder(fov := item.get("field_of_view", {"radius": 1})):
        example = "{'radius': 99, 'centre_offset': [0, 0], 'axis': 2}"
        raise Mistake(f"{datalist}: a field_of_view must be like {example} in voxels, but one is {fov}")


def _check_path(path: Any, datalist: Path) -> None:
    """Refuse a path that climbs: it may come with somebody else's list. One in full says what it means."""
    spellings = (_without_url(path), _without_url(path).replace("\\", "/")) if isinstance(path, str) else ()
    if any(Path(os.path.normpath(spelling)).parts[:1] == ("..",) for spelling in spellings):
        way_out = "move the list above its volumes, or write the path in full"
        raise Mistake(f"{datalist} lists {path}, which leads out of its folder: {way_out}")


def _is_cylinder(fov: Any) -> bool:
    """Tell whether a case's field of view is what :func:`bertswin_mae.transforms.cylinder` takes."""
    if not isinstance(fov, dict) or not {"radius"} <= fov.keys() <= {"radius", "centre_offset", "axis"}:
        return False
    offset = fov.get("centre_offset", [0, 0])
    numbers = (fov["radius"], *offset) if isinstance(offset, list) and len(offset) == 2 else (None,)
    are_finite = all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
    return are_finite and fov["radius"] > 0 and fov.get("axis", 2) in (0, 1, 2)


def _listed_case(item: Mapping[str, Any], root: Path, remember: Remember | None = None) -> Case:
    images = item["image"] if isinstance(item["image"], list) else [item["image"]]
    paths = [_listed_path(path, root) for path in images]
    case: Case = {"image": paths[0] if len(paths) == 1 else paths, "case": case_name(Path(paths[0]), root)}
    if len(paths) == 1 and Path(paths[0]).is_dir():
        series, _ = series_cases(Path(paths[0]), list(filter(is_dicom, Path(paths[0]).iterdir())), remember)
        # Of several, reading says that one is needed.
        case = series[0] | {"case": case["case"]} if len(series) == 1 else case
    known = {key: value for key, value in item.items() if value not in (None, "") and value == value}  # no NaN
    label = known.get("label")
    if isinstance(label, int | float):  # of a classification, as many lists have it
        known.setdefault("class", label)
    elif label is not None:
        case["label"] = _listed_path(str(label), root)
    types = {"field_of_view": dict, "class": class_name, "session": str}
    case |= {key: kind(known[key]) for key, kind in types.items() if key in known}
    plain = {key: value for key, value in known.items() if isinstance(value, str | int | float)}
    case |= {key: value for key, value in plain.items() if key not in (*types, *PATIENT_KEYS, *OWN_KEYS)}
    patients = [class_name(known[key]) for key in PATIENT_KEYS if key in known]
    return case | ({"patient": patients[0]} if patients else {})


def class_name(value: Any) -> str:
    """Name a class or a patient: 1 and 1.0, as tables are joined, are one."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _listed_path(path: str, root: Path) -> str:
    """Complete a path of a list, which may be a file's URL or come from Windows."""
    path = _without_url(path)
    if "\\" in path and not os.path.lexists(root / path):
        path = path.replace("\\", "/")
    return os.path.normpath(root / path)


def _without_url(path: str) -> str:
    return url2pathname(urlparse(path).path) if path.lower().startswith("file:") else path


# ---------------------------------------------------------------------------------------------------------- nnU-Net


def _nnunet_folds(folder: Path, content: Any) -> Folds | None:
    """Read a raw folder of nnU-Net, of its first or second version; None, if it is none.

    In the first, ``dataset.json`` may look like the Decathlon's, but lists files that are not there as such: each
    channel is a file, ``<case>_0000.nii.gz``.
    """
    channels = content.get("channel_names", content.get("modality")) if isinstance(content, dict) else None
    if not isinstance(channels, dict | list):
        return None
    ending, named = _nnunet_files(folder, content)
    listed = [] if "channel_names" in content else content.get("training")
    listed = listed if isinstance(listed, list) else []
    for item in listed:
        _check_item(item, "training", folder / "dataset.json")
    if any(isinstance(item["image"], list) or os.path.lexists(_listed_path(item["image"], folder)) for item in listed):
        return None
    cases: dict[str, dict[str, Any]] = {}
    for name in named and ([Path(item["image"]).name.removesuffix(ending) for item in listed] or named):
        images = [f"imagesTr/{name}_{number:04d}{ending}" for number in range(len(channels))]
        cases[name] = {"image": images}
        if (folder / "labelsTr").is_dir():
            cases[name]["label"] = f"labelsTr/{name}{ending}"
    if isinstance(content.get("dataset"), dict):
        # Which may say where the files are, one by one.
        abouts = {name: about if isinstance(about, dict) else {} for name, about in content["dataset"].items()}
        cases = {name: {**about, "image": about.get("images")} for name, about in abouts.items()}
    if not cases and "channel_names" in content and (folder / "imagesTr").is_dir():
        raise Mistake(f"{folder} is a folder of nnU-Net without a file like imagesTr/CASE_0000{ending}")
    if not cases:
        return None
    logger.info("%s: %d cases of nnU-Net, each of %d channels", folder, len(cases), len(channels))
    made = {name: _nnunet_case(name, item, folder, len(channels)) for name, item in cases.items()}
    return _nnunet_split(folder / "splits_final.json", made)


def _nnunet_files(folder: Path, content: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return the suffix of the files, and the names of the cases of which there is any channel; the first must be."""
    files = sorted(path for path in folder.glob("imagesTr/*") if not path.name.startswith("."))
    ending = str(
        content.get("file_ending") or next(filter(None, (longest_suffix(path, SUFFIXES) for path in files)), ".nii.gz")
    )
    stems = [path.name.removesuffix(ending) for path in files if path.name.endswith(ending)]
    if not any(stem.endswith("_0000") for stem in stems):
        return ending, []
    return ending, list(dict.fromkeys(match[1] for stem in stems if (match := NNUNET_FILE.fullmatch(stem))))


def _nnunet_case(name: str, item: Mapping[str, Any], folder: Path, num_channels: int) -> Case:
    _check_item(item, name, folder / "dataset.json")
    case = _listed_case(item, folder) | {"case": case_name(folder / "imagesTr" / name, folder)}
    images = case["image"] if isinstance(case["image"], list) else [case["image"]]
    if gone := [path for path in images if not os.path.lexists(path)]:
        return case | {"lacks": ", ".join(gone)}
    return case if len(images) == num_channels else case | {"lacks": f"{num_channels} channels, it has {len(images)}"}


def _nnunet_split(path: Path, cases: Mapping[str, Case]) -> Folds:
    """Divide cases as the first of nnU-Net's folds does, where it was written down."""
    if not path.is_file():
        return {"training": list(cases.values())}
    split = _read_json(path)
    first = split[0] if isinstance(split, list) and split else None
    if not isinstance(first, dict) or not all(isinstance(first.get(side), list) for side in ("train", "val")):
        raise Mistake(f"{path} must be a list of {{'train': [names], 'val': [names]}}")
    names = {fold: [str(name) for name in first[side]] for fold, side in (("training", "train"), ("validation", "val"))}
    if unknown := [name for side in names.values() for name in side if name not in cases]:
        raise Mistake(f"{path} names {len(unknown)} cases that are not there, such as {unknown[0]}")
    folds = {fold: [cases[name] for name in side] for fold, side in names.items()}
    named = {name for side in names.values() for name in side}
    unnamed = [case for name, case in cases.items() if name not in named]
    return folds | ({UNNAMED: unnamed} if unnamed else {})


# ------------------------------------------------------------------------------------------------------------- BIDS


def _bids_images(folder: Path) -> list[tuple[Path, dict[str, str | None]]]:
    """Find the volumes of the subjects of a BIDS folder, with patient, session and suffix; none, if it is no such."""
    subjects = sorted(path for path in folder.glob("sub-*") if path.is_dir())
    volumes, _, left_out = sort_out(folder, files_below(folder, subjects))
    named = [
        (path, BIDS_FILE.fullmatch(path.name[: len(path.name) - len(longest_suffix(path, SUFFIXES))]))
        for path in volumes
    ]
    images = [(path, match.groupdict()) for path, match in named if match]
    if images and len(images) < len(volumes):
        left_out.append(f"{len(volumes) - len(images)} files that are not named as BIDS has it")
    for what in left_out if images else []:
        logger.info("passed over %s", what)
    return images


def _bids_cases(
    folder: Path, images: Sequence[tuple[Path, dict[str, str | None]]], contrasts: str | Sequence[str] | None
) -> list[Case]:
    """Make a case of each image of the one contrast, or of each session with several: its channels."""
    counts = Counter(str(about["suffix"]) for _, about in images)
    counts = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    chosen = contrasts if isinstance(contrasts, list | tuple) else [contrasts] if contrasts else []
    wanted = [str(suffix) for suffix in chosen or counts]
    there = ", ".join(f"{count} {suffix}" for suffix, count in counts.items())
    if (not contrasts and len(wanted) > 1) or not set(wanted) <= counts.keys():
        choice = f"contrasts {contrasts} are not all there" if contrasts else "several contrasts are there"
        one, several = next(iter(counts)), ",".join(map(repr, [*counts][:2]))
        raise Mistake(
            f"{folder} is a BIDS folder with {there}; {choice}: choose one, such as --contrasts {one}, or several as "
            f'channels, such as --contrasts "[{several}]"'
        )
    sessions: dict[tuple[Any, Any], dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path, about in images:
        sessions[about["patient"], about["session"]][about["suffix"]].append(path)
    cases = []
    for (patient, session), found in sessions.items():
        about = {"patient": patient} | ({"session": session} if session else {})
        if not (made := _session_cases(folder, found, wanted)):
            logger.warning("%s has no %s: left out", "/".join(about.values()), " and no ".join(wanted))
        cases += [case | about for case in made]
    return cases


def _session_cases(folder: Path, found: Mapping[str, Sequence[Path]], wanted: Sequence[str]) -> list[Case]:
    if len(wanted) == 1:
        return [{"image": str(path), "case": case_name(path, folder)} for path in found.get(wanted[0], [])]
    if not (present := [suffix for suffix in wanted if suffix in found]):
        return []
    name = case_name(found[present[0]][0], folder).removesuffix(f"_{present[0]}")
    if lacking := [suffix for suffix in wanted if suffix not in found]:
        return [{"image": str(found[present[0]][0]), "case": name, "lacks": ", ".join(lacking)}]
    if all(len(found[suffix]) == 1 for suffix in wanted):
        return [{"image": [str(found[suffix][0]) for suffix in wanted], "case": name}]
    # Several of a contrast: those go together whose names are alike but for it, as those of a run.
    runs: dict[str, dict[str, Path]] = defaultdict(dict)
    for suffix in wanted:
        for path in found[suffix]:
            runs[case_name(path, path.parent).removesuffix(f"_{suffix}")][suffix] = path
    cases: list[Case] = []
    for run, paths in runs.items():
        first, lacking = next(iter(paths.values())), [suffix for suffix in wanted if suffix not in paths]
        case = {"image": [str(path) for path in paths.values()], "case": case_name(first.with_name(run), folder)}
        cases.append(case | ({"lacks": ", ".join(lacking)} if lacking else {}))
    return cases
