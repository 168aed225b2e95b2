"""A folder of volumes, answered one by one: what fails on one does not cost the others, and is named at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator

from ..mistakes import Mistake, reason

__all__ = ["VolumeEvaluator", "VolumeWriter", "save_nifti"]

logger = logging.getLogger(__name__)


class VolumeEvaluator(SupervisedEvaluator):
    """MONAI's SupervisedEvaluator for one volume an iteration; one that fails does not end the run.

    ``state.output`` is a dict of ``case`` and of what ``iteration_update`` returns; of a volume that failed, ``case``
    and ``error``.

    Args:
        iteration_update: called with the evaluator and an item of ``case`` and ``image`` ``(C, D, H, W)``, in
            evaluation mode without gradients; returns a dict.
        kwargs: of :class:`monai.engines.SupervisedEvaluator`. ``val_data_loader`` gives single items, not batches;
            one that cannot be loaded is of ``case`` and ``error``.
    """

    def __init__(self, *, iteration_update: Callable[..., dict[str, Any]], **kwargs: Any) -> None:
        super().__init__(**{"decollate": False, **kwargs})
        self.answer = iteration_update

    def _iteration(self, engine: VolumeEvaluator, batchdata: dict[str, Any]) -> dict[str, Any]:
        case, error = batchdata["case"], batchdata.get("error")
        if error is None:
            try:
                with engine.mode(engine.network):
                    return {"case": case, **engine.answer(engine, batchdata)}
            except Exception as caught:  # out of memory on one volume must not cost the others
                error = reason(caught)
        return {"case": case, "error": error}


class VolumeWriter:
    """Base of the handlers that follow a :class:`VolumeEvaluator` and write each of its answers.

    Args:
        output_dir: where everything goes.
    """

    answers: str  # what the log calls them
    failure: str  # what the error at the end says of the volumes without one

    def __init__(self, output_dir: str | Path) -> None:
        self.folder = Path(output_dir)
        self.failures: list[str] = []

    def attach(self, engine: Engine) -> None:
        """Follow an evaluator."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.follow)
        engine.add_event_handler(Events.COMPLETED, self.report)

    def start(self, engine: Engine) -> None:
        """Forget an earlier run."""
        self.failures.clear()

    def follow(self, engine: Engine) -> None:
        """Write one answer, or note why there is none."""
        output = engine.state.output
        case, error = output["case"], output.get("error")
        self.discard(case)
        if error is None:
            try:
                self.write(output)
            except Exception as caught:
                self.discard(case)
                error = f"cannot be written ({reason(caught)})"
        if error is not None:
            self.failures.append(f"{case}: {error}")
        engine.state.output = {"case": case}  # nothing large is kept while the next volume loads

    def write(self, output: dict[str, Any]) -> None:
        """Write one answer of the evaluator."""
        raise NotImplementedError

    def discard(self, case: str) -> None:
        """Remove what an earlier run wrote for a case; here nothing."""

    def report(self, engine: Engine) -> None:
        """End with an error that names every volume without an answer."""
        total, failed = engine.state.iteration, len(self.failures)
        logger.info("%s of %d of %d volumes are in %s", self.answers, total - failed, total, self.folder)
        if failed:
            listing = "\n  ".join(self.failures)
            raise Mistake(f"{failed} of {total} volumes {self.failure}:\n  {listing}")


def save_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    """Write ``(D, H, W)`` or ``(D, H, W, C)`` as a NIfTI, whole or not at all; what is there is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}")
    nib.save(nib.Nifti1Image(voxels, affine), beside)
    beside.replace(path)
