"""From a folder of scans to `plan.yaml`."""

import json
import logging
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ...data import Index, prepared_bytes
from ...mistakes import Mistake
from ...weights import checkpoints
from .choices import SIZES, Settings, about_network, about_schedule, about_volumes, size_of
from .cohort import Cohort, look_at
from .page import costs, findings
from .trial import Trial, try_training

__all__ = ["plan"]

logger = logging.getLogger(__name__)


def plan(
    dataset_dir: str | Path | Callable[[], str | Path],
    index: Index,
    output_dir: str | Path,
    device: str,
    val_fraction: float,
    contrasts: str | Sequence[str] | None = None,
    group_by: str | None = None,
) -> None:
    """Look at a cohort and this machine, try a short training, write ``plan.yaml`` and print what was found.

    Args:
        dataset_dir: as of :func:`~bertswin_mae.data.find_cases`, or a function that returns it.
        index: what is known of the volumes; those that are not known yet are read.
        output_dir: for ``plan.yaml``, an overlay of ``train.yaml``.
        device: to train on.
        val_fraction: share of the cases to validate on.
        contrasts: see :func:`~bertswin_mae.data.find_cases`.
        group_by: see :func:`~bertswin_mae.data.group_cases`.

    Raises:
        Mistake: when there is nothing to train on, when modalities are mixed, or when no training fits this machine.
    """
    source, folder = dataset_dir() if callable(dataset_dir) else dataset_dir, Path(output_dir).absolute()
    dataset_dir = str(Path(str(source)).expanduser().absolute())
    given = {"contrasts": contrasts, "group_by": group_by, "val_fraction": val_fraction}
    cohort = look_at(dataset_dir, index, val_fraction, contrasts, group_by)
    settings = {
        "dataset_dir": (dataset_dir, f"{len(cohort.kept)} volumes that can be used"),
        "index": (
            index.path and str(index.path.absolute()),
            "what is known of them, so that training need not read them",
        ),
        **{name: (value, "as it was given") for name, value in given.items() if value is not None},
        **about_volumes(cohort),
        **about_network(cohort, device, folder),
    }
    trial = _tried(settings, cohort, folder, device)
    settings |= about_schedule(cohort, settings["batch_size"][0])
    path = _write(settings, folder)
    print(
        *findings(cohort),
        *costs(settings, trial, cohort),
        f"\nThe plan is in {path}. Start the training with\n",
        f"  python -m monai.bundle run training --config_file \"['configs/train.yaml',{str(path)!r}]\" "
        f"--output_dir {shlex.quote(str(folder / 'training'))}",
        sep="\n",
    )


def _tried(settings: Settings, cohort: Cohort, folder: Path, device: str) -> Trial:
    """Try batches, each half of the one before, until one fits; it is put into the settings."""
    batch_size = wanted = SIZES[size_of(cohort, device)].batch_size
    sizes = prepared_bytes(cohort.facts, settings["spacing"][0], settings["img_size"][0])
    by_size = [cohort.kept[place] for place in np.argsort(sizes)]
    while batch_size >= 1:
        logger.info("trying a training with batches of %d", batch_size)
        settings["batch_size"] = (
            batch_size,
            "volumes; tried" + (", the largest that fits" if batch_size < wanted else ""),
        )
        settings["accumulation_steps"] = (wanted // batch_size, f"so that a step is made of {wanted} volumes")
        if trial := try_training(_write(settings, folder), by_size, device):
            return trial
        batch_size //= 2
    raise Mistake("no training fits into the memory of this machine, not even with one volume at a time")


def _write(settings: Settings, folder: Path) -> Path:
    path = folder / "plan.yaml"
    lines = ["# A plan for these volumes and this machine. Name it behind train.yaml; change what you know better.", ""]
    lines += [f"{name}: {json.dumps(value, ensure_ascii=False)} # {why}" for name, (value, why) in settings.items()]
    checkpoints.save_text("\n".join(lines) + "\n", path)
    return path
