"""From a folder of scans to two datalists."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import parallel
from ..mistakes import Mistake
from .cases import Case, find_cases, labelled, split_cases
from .checks import check_cases, check_labels

__all__ = ["labelled_folds", "prepare_cases"]

logger = logging.getLogger(__name__)


def prepare_cases(
    dataset_dir: str | Path | Callable[[], str | Path], modality: str, val_fraction: float = 0.2, **checks: Any
) -> dict[str, list[Case]]:
    """Find, check and split: everything between a folder of scans and two datalists.

    Args:
        dataset_dir: what :func:`find_cases` takes, or a function that returns it.
        modality: ``ct`` (Hounsfield units) or ``mr``.
        val_fraction: share of the cases to validate on, where the data does not say.
        checks: other arguments of :func:`check_cases`.

    Returns:
        ``training`` and ``validation``; see :func:`find_cases`.

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


def labelled_folds(
    folds: dict[str, list[Case]], num_labels: int, most: int | None = None, seed: int = 0, num_threads: int = 4
) -> dict[str, list[Case]]:
    """Keep the cases that come with a label map, and read every map once, before training.

    Args:
        folds: of :func:`prepare_cases`.
        num_labels: labels besides background, numbered from 1.
        most: training cases to keep, see :func:`labelled`.
        seed: another one keeps others.
        num_threads: maps read at once.

    Raises:
        Mistake: when there are too few, or naming each map that cannot be used.
    """
    kept = {"training": labelled(folds["training"], most, seed), "validation": labelled(folds["validation"])}
    return {fold: check_labels(cases, num_labels, num_threads) for fold, cases in kept.items()}
