"""Find, check and split: everything between a folder of scans and two datalists."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import parallel
from ..mistakes import Mistake
from .cases import Case, find_cases, split_cases
from .checks import check_cases

__all__ = ["prepare_cases"]

logger = logging.getLogger(__name__)


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
        Mistake: when there is nothing to train on; the message says what was found.
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
            raise Mistake(f"no volume is left for {fold} of the {len(usable)} usable ones in {dataset_dir}: add some")
    logger.info("%d volumes to train on, %d to validate on", len(folds["training"]), len(folds["validation"]))
    return folds
