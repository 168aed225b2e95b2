"""From a folder of scans to two datalists: find the volumes, check them, split them."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import parallel
from ..mistakes import Mistake
from .checks import check_cases, check_labels, without_copies
from .describing import Case
from .index import Index, case_files
from .layouts import UNNAMED, Folds, read_dataset
from .splitting import case_seed, group_cases, split_cases, warn_of_shared_patients

__all__ = ["divide", "find_cases", "labelled", "labelled_folds", "list_cases", "prepare_cases"]

logger = logging.getLogger(__name__)


def prepare_cases(
    dataset_dir: str | Path | Callable[[], str | Path],
    modality: str,
    val_fraction: float = 0.2,
    contrasts: str | Sequence[str] | None = None,
    group_by: str | None = None,
    index: Index | None = None,
    **checks: Any,
) -> dict[str, list[Case]]:
    """Find, check and split: everything between a folder of scans and two datalists, ``training`` and ``validation``.

    Args:
        dataset_dir: what :func:`find_cases` takes, or a function that returns it.
        modality: see :func:`check_cases`.
        val_fraction: see :func:`split_cases`; where the data does not say who is validated on.
        contrasts: see :func:`find_cases`.
        group_by: see :func:`find_cases`.
        index: that knows the volumes; without one, all are read now.
        **checks: the other arguments of :func:`check_cases`.

    Raises:
        Mistake: when there is nothing to train on; the message says what was found.
    """
    parallel.check_started()
    source = dataset_dir() if callable(dataset_dir) else dataset_dir
    index = index or Index(None)
    folds = find_cases(source, contrasts, checks.get("skip_invalid", False), index, group_by)
    usable = check_cases([case for fold in folds.values() for case in fold], modality, index=index, **checks)
    folds = divide(folds, without_copies(usable, index.describe(usable)), val_fraction)
    for fold, cases in folds.items():
        if not cases:
            raise Mistake(f"no volume is left for {fold} of the {len(usable)} usable ones in {dataset_dir}: add some")
    logger.info("%d volumes to train on, %d to validate on", len(folds["training"]), len(folds["validation"]))
    return folds


def find_cases(
    dataset_dir: str | Path | None,
    contrasts: str | Sequence[str] | None = None,
    skip_invalid: bool = False,
    index: Index | None = None,
    group_by: str | None = None,
) -> dict[str, list[Case]]:
    """List the volumes of a dataset; those that are not there too, for the check to name.

    Args:
        dataset_dir: a folder of the Decathlon, nnU-Net or BIDS; a datalist JSON; a folder with volumes and DICOM series
            at any depth, of which hidden files and those named after labels or masks are passed over; a volume; or a
            pattern with wildcards for several of these two.
        contrasts: of a BIDS folder, the suffix of the images to take, such as ``T1w``, or several, to be channels.
        skip_invalid: leave out cases that lack a contrast or a channel, with a warning, instead of refusing them.
        index: that remembers the headers of DICOM files; default: all are read.
        group_by: see :func:`group_cases`; None: patients are what the data says.

    Returns:
        ``training``, and ``validation`` where a datalist or nnU-Net's split names it, by a list of its own or by
        ``fold: 0``. Each case has an ``image`` and a name, ``case``: its path below the dataset without suffix, so that
        the split by name is the same wherever the dataset lies. ``image`` is a path, or a list of them: the channels,
        or the slices of a DICOM series. Where they are known there are also ``label`` (path), ``class``, ``patient``,
        ``session``, ``modality`` (as a DICOM header says it) and ``field_of_view``, the arguments of
        :func:`bertswin_mae.transforms.cylinder`. Other texts and numbers of a datalist, such as ``age``, come along.

    Raises:
        Mistake: when nothing is there, a case is incomplete, or two share one name.
    """
    folds = _read(dataset_dir, contrasts, index)
    if unnamed := folds.pop(UNNAMED, []):
        names = ", ".join(case["case"] for case in unnamed[:5])
        logger.warning("left out %d cases that the split of %s does not name: %s", len(unnamed), dataset_dir, names)
    listed = [case for fold in folds.values() for case in fold]
    lacking = [f"{case['case']} lacks {case['lacks']}" for case in listed if "lacks" in case]
    if lacking and not skip_invalid:
        listing = "".join(f"\n  {line}" for line in lacking)
        raise Mistake(
            f"{len(lacking)} of {len(listed)} cases in {dataset_dir} are incomplete:{listing}\n"
            "Complete or remove them, or leave them out with --skip_invalid true."
        )
    for line in lacking:
        logger.warning("left out %s", line)
    if len(lacking) == len(listed):
        raise Mistake(f"{dataset_dir} holds no volume to train on: all cases are incomplete, or named in no fold")
    folds = {fold: [case for case in cases if "lacks" not in case] for fold, cases in folds.items()}
    return folds if group_by is None else {fold: group_cases(cases, group_by) for fold, cases in folds.items()}


def _read(dataset_dir: str | Path | None, contrasts: str | Sequence[str] | None, index: Index | None = None) -> Folds:
    """Read all cases of a dataset, whose names must differ."""
    if dataset_dir is None:
        raise Mistake("give --dataset_dir, a folder of volumes or a datalist JSON")
    folds = read_dataset(dataset_dir, contrasts, index and index.remember)
    counts = Counter(case["case"] for fold in folds.values() for case in fold)
    if not counts:
        raise Mistake(f"{dataset_dir} holds no volume")
    if twins := [name for name, count in counts.items() if count > 1]:
        names = ", ".join(twins[:5])
        raise Mistake(
            f"{dataset_dir} has several volumes named {names}: each may be there once, in one list and one format"
        )
    return folds


def divide(folds: dict[str, list[Case]], kept: Sequence[Case], val_fraction: float) -> dict[str, list[Case]]:
    """Keep some of the cases that were found, and split them where the data does not say who is validated on."""
    names = {case["case"] for case in kept}
    folds = {fold: [case for case in cases if case["case"] in names] for fold, cases in folds.items()}
    if "validation" not in folds:
        return split_cases(folds["training"], val_fraction)
    warn_of_shared_patients(folds)
    return folds


def list_cases(
    dataset_dir: str | Path | None, contrasts: str | Sequence[str] | None = None, output_dir: str | Path | None = None
) -> list[Case]:
    """List all volumes of a dataset, of every fold and of none; see :func:`find_cases`.

    Those that lack a channel or a contrast say so under ``lacks``: to load them is a Mistake.

    Raises:
        Mistake: where what is written to ``output_dir`` could replace a volume or a label map, or be found as a volume
            the next time.
    """
    cases = [case for fold in _read(dataset_dir, contrasts).values() for case in fold]
    if output_dir is not None:
        given = Path(str(dataset_dir)).expanduser()
        while not given.exists():  # a pattern: what stands before its wildcards
            given = given.parent
        source, output = given.resolve(), Path(output_dir).expanduser().resolve()
        files = (file.parent.resolve() for case in cases for file in case_files(case, ("image", "label")))
        inside = source.is_dir() and output.is_relative_to(source)
        if inside or any(folder.is_relative_to(output) for folder in set(files)):
            where = "lies within" if inside else "holds files of"
            raise Mistake(f"output_dir {output_dir} {where} the dataset {dataset_dir}: choose a folder beside it")
    return cases


def labelled(cases: Sequence[Case], most: int | None = None, seed: int = 0) -> list[Case]:
    """Keep the cases that come with a ``label``, a map.

    ``most`` are kept if it is given, chosen by a hash of their names; another seed keeps others. Too few, or none, are
    a Mistake; so are label maps that are named but not there.
    """
    kept = [case for case in cases if "label" in case]
    if len(kept) < len(cases):
        logger.info("%d of %d cases have a label, the others are left out", len(kept), len(cases))
    if not kept:
        raise Mistake(
            "none of the cases has a label map: a Decathlon folder or a datalist that gives them is needed; a number "
            "under label is read as the case's class"
        )
    if gone := [case["label"] for case in kept if not Path(case["label"]).exists()]:
        raise Mistake(f"{len(gone)} of {len(kept)} label maps are not where the list says, the first one {gone[0]}")
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
