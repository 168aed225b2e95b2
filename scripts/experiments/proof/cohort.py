"""A user's cohort and weights, as the runs of the experiments take them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...data import case_seed, dataset_facts, patient_of
from ...data.describing import Case
from ...mistakes import Mistake
from ...weights import read_record, recorded

__all__ = ["carried", "count_labels", "given_weights", "hold_out", "linked"]


def linked(dataset: Path, folder: Path) -> str:
    """Let runs find the dataset through a link: it may move, while the names of cases and the knobs of runs stay."""
    root = dataset.parent if dataset.is_file() else dataset
    if folder.is_relative_to(root):
        raise Mistake(f"output_dir {folder} must not lie within the dataset {root}")
    beside, link = folder / ".dataset", folder / "dataset"
    folder.mkdir(parents=True, exist_ok=True)
    beside.unlink(missing_ok=True)
    beside.symlink_to(root)
    beside.replace(link)
    return str(link / dataset.name if dataset.is_file() else link)


def hold_out(cases: Sequence[Case], path: Path, groups: Mapping[str, Any] | None = None) -> str:
    """Write a datalist that holds out a fifth of the patients among training cases, as their names' hashes have it.

    Args:
        cases: all of them.
        path: of the list, in the folder of :func:`linked`.
        groups: the class of each case, by its name, where each class is to be on both sides.

    Raises:
        Mistake: when there are too few, or the file is of other cases.
    """
    patients = {patient_of(case): (groups or {}).get(case["case"]) for case in cases}
    if len(patients) < 2:
        raise Mistake(f"rates are chosen on held-out training cases: two at least are needed, not {len(patients)}")
    held_out: set[str] = set()
    for group in set(patients.values()):
        ranked = sorted((name for name in patients if patients[name] == group), key=lambda name: case_seed(name, 1))
        if len(ranked) > 1:  # of a class that one patient has, there is none to spare
            held_out.update(ranked[: max(1, len(ranked) // 5)])
    folds = {
        "training": [case for case in cases if patient_of(case) not in held_out],
        "validation": [case for case in cases if patient_of(case) in held_out],
    }
    # Paths below the list, so that they and the names that follow from them stay.
    listed = {fold: [_listed(case, path.parent) for case in sorted(its, key=_name)] for fold, its in folds.items()}
    if path.exists() and json.loads(path.read_text()) != listed:
        raise Mistake(f"{path.parent} holds experiments on other cases, see {path}: choose another --output_dir")
    path.write_text(json.dumps(listed, indent=1))
    return str(path)


def _name(case: Case) -> str:
    return case["case"]


def _listed(case: Case, folder: Path) -> dict[str, Any]:
    return {key: _below(value, folder) for key, value in case.items() if key != "case"}


def _below(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_below(entry, folder) for entry in value]
    return value.removeprefix(f"{folder}/") if isinstance(value, str) else value


def count_labels(dataset_dir: str) -> int:
    """Count the labels besides background that a dataset names, as the Decathlon or nnU-Net does."""
    labels = dataset_facts(dataset_dir).get("labels") or {}
    pairs = labels.items() if isinstance(labels, dict) else enumerate(labels)
    highest = max((int(part) for pair in pairs for part in pair if str(part).isdecimal()), default=0)
    if not highest:
        raise Mistake(f"{dataset_dir} names no labels: say how many there are by --knobs \"{{'num_labels': 3}}\"")
    return highest


def given_weights(path: str | None, knob: str) -> Path:
    """Check that weights are where the user says."""
    if path is None:
        raise Mistake(f"give --{knob}, the model.pt of a pre-training")
    weights = Path(path).expanduser().resolve()
    if not weights.is_file():
        raise Mistake(f"there are no weights in {weights}: give --{knob}, the model.pt of a pre-training")
    return weights


def carried(weights: Path) -> dict[str, Any]:
    """Tell the knobs of the network and the preprocessing that weights carry, for runs that start without them.

    Raises:
        Mistake: when nothing beside the weights says it.
    """
    record = read_record(weights)
    network, preprocessing = recorded(record, "network"), recorded(record, "preprocessing")
    if not network or "modality" not in preprocessing:
        raise Mistake(f"nothing beside {weights} says how it was trained: copy the {weights.stem}.json that its "
                      "training wrote there, too")  # fmt: skip
    knobs = network | {name: preprocessing[name] for name in ("modality", "spacing") if name in preprocessing}
    scaling = recorded(preprocessing, "intensity")
    return knobs | {f"intensities::{knobs['modality']}::{name}": value for name, value in scaling.items()}
