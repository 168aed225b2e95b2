"""Segmentation on top of any encoder: freezing it, label maps of a folder of volumes."""

import csv
import io
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.transforms import Compose
from torch import nn

from ..engines.inferers import LogitsInferer
from ..engines.volumes import VolumeEvaluator, VolumeWriter, save_nifti

__all__ = ["FreezeEncoder", "MaskWriter", "PredictMask", "name_cases"]

logger = logging.getLogger(__name__)


class FreezeEncoder:
    """Leave the encoder as it is for the first epochs, so that a fresh decoder does not spoil it.

    Attach to the trainer. A network without an ``encoder`` has nothing to freeze.

    Args:
        network: whose ``encoder`` it is.
        epochs: to wait for; as many as there are: the encoder stays as it is.
    """

    def __init__(self, network: nn.Module, epochs: int) -> None:
        self.encoder, self.epochs = getattr(network, "encoder", None), epochs

    def attach(self, engine: Engine) -> None:
        """Follow a trainer."""
        if isinstance(self.encoder, nn.Module):
            engine.add_event_handler(Events.EPOCH_STARTED, self.freeze)

    def freeze(self, engine: Engine) -> None:
        """Freeze or thaw, by the epoch's number alone: also in a run that goes on."""
        if engine.state.epoch == self.epochs + 1 and self.epochs:
            logger.info("the encoder is trained from here on")
        self.encoder.requires_grad_(engine.state.epoch > self.epochs)


def name_cases(batch: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Name the cases of a batch for MONAI's MetricsSaver, each as a field of a CSV file: it quotes nothing itself."""
    names = []
    for item in batch:
        file = io.StringIO()
        csv.writer(file).writerow([item["case"]])
        names.append({"filename_or_obj": file.getvalue().removesuffix("\r\n")})
    return names


class PredictMask:
    """Segment a volume, on the voxels of its file: what a :class:`VolumeEvaluator` does in prediction.

    Args:
        postprocessing: turns ``pred``, the logits of ``image``, into its label map.
        precision, device: of the network; see :class:`~bertswin_mae.engines.AutocastInferer`.
    """

    def __init__(self, postprocessing: Compose, precision: str = "fp32", device: str = "cpu") -> None:
        self.postprocessing, self.window_inferer = postprocessing, LogitsInferer(precision, device)

    def __call__(self, evaluator: VolumeEvaluator, item: dict[str, Any]) -> dict[str, Any]:
        """Map an item's ``image`` ``(C, D, H, W)`` to its label map, ``pred`` ``(1, …)``."""
        image = item["image"]
        logits = evaluator.inferer(image[None].as_tensor(), partial(self.window_inferer, network=evaluator.network))[0]
        return {"pred": self.postprocessing({"image": image, "pred": MetaTensor(logits, meta=image.meta)})["pred"]}


class MaskWriter(VolumeWriter):
    """Write what :class:`PredictMask` returns, as ``<case>.nii.gz``."""

    answers = "label maps"
    failure = "could not be segmented"

    def write(self, output: dict[str, Any]) -> None:
        """Write one label map."""
        labels = output["pred"]
        save_nifti(self._path(output["case"]), labels[0].numpy().astype(np.uint8), labels.affine.numpy())

    def discard(self, case: str) -> None:
        """Remove the label map of a case."""
        if self._path(case).is_file():
            self._path(case).unlink()

    def _path(self, case: str) -> Path:
        return self.folder / f"{case}.nii.gz"
