"""Segmentation on top of any encoder: a dense decoder of MONAI's UNETR blocks, frozen and then fine-tuned."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..engines.inferers import LogitsWindowInferer
from ..mistakes import Mistake, reason
from ..networks.encoder import BertsWinEncoder
from ..weights.pretrained import load_encoder, load_network, load_state_dict, strict_stem_of
from .features import save_nifti

__all__ = ["FreezeEncoder", "MaskWriter", "build_encoder", "fill_encoder", "from_scratch", "parameter_groups"]

logger = logging.getLogger(__name__)


def build_encoder(
    settings: dict[str, Any], pretrained: str | Path | None, finetuned: str | Path | None = None
) -> BertsWinEncoder:
    """Build an encoder, with the kind of stem that its weights have, and fill it.

    Args:
        settings: arguments of :class:`BertsWinEncoder`. ``strict_stem`` may be None: it is read off the weights;
            without any it is strict, as its stages are the better skips.
        pretrained: ``encoder.pt`` of a tuning, or ``model.pt``; None: random weights.
        finetuned: ``model.pt`` of this network, if there is one: its weights are loaded later, over these.

    Raises:
        Mistake: when there are no such weights, or they do not fit the settings.
    """
    strict = strict_stem_of(pretrained or finetuned, settings["strict_stem"])
    return fill_encoder(BertsWinEncoder(**(settings | {"strict_stem": strict})), pretrained)


def fill_encoder(
    encoder: nn.Module, pretrained: str | Path | None, load: Callable[[nn.Module, str | Path], nn.Module] = load_encoder
) -> nn.Module:
    """Fill an encoder with pre-trained weights; without any, it stays as it was initialised.

    Args:
        encoder: to fill.
        pretrained: what ``load`` reads.
        load: fills an encoder from a file, or says why not.

    Raises:
        Mistake: of ``load``.
    """
    return encoder if pretrained is None else load(encoder, pretrained)


def from_scratch(network: nn.Module, pretrained: str | Path | None) -> nn.Module:
    """Hand a network on that has no encoder to fill; a ValueError where there are weights for one."""
    if pretrained is not None:
        raise Mistake(f"{type(network).__name__} starts from random weights: leave --pretrained out")
    return network


def parameter_groups(network: nn.Module, learning_rate: float, encoder_learning_rate: float) -> list[dict[str, Any]]:
    """Divide a network's parameters for the optimiser: those of its ``encoder`` get a rate of their own.

    Args:
        network: without an ``encoder``, all is of one group.
        learning_rate: of all else.
        encoder_learning_rate: of the encoder.
    """
    groups = [{"params": [p for name, p in network.named_parameters() if not name.startswith("encoder.")]}]
    if isinstance(getattr(network, "encoder", None), nn.Module):
        groups.append({"params": list(network.encoder.parameters()), "lr": encoder_learning_rate})
    return [{"lr": learning_rate, **group} for group in groups]


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
        frozen = engine.state.epoch <= self.epochs
        if engine.state.epoch == self.epochs + 1 and self.epochs:
            logger.info("the encoder is trained from here on")
        self.encoder.requires_grad_(not frozen)


class MaskWriter:
    """Segment a folder of volumes: a label map for each, on the voxels of its file.

    Args:
        loader: of single cases, of ``image`` ``(C, D, H, W)`` and ``case``, or of ``case`` and ``error``.
        preparation: what was done to the image, to be undone on the label map.
        network: fills with the weights and segments.
        checkpoint: ``model.pt`` of a finetuning.
        inferer: slides the network over a volume.
        output_dir: for ``<case>.nii.gz``.
    """

    def __init__(
        self,
        loader: DataLoader,
        preparation: Compose,
        network: nn.Module,
        checkpoint: str | Path,
        inferer: LogitsWindowInferer,
        output_dir: str | Path,
    ) -> None:
        self.loader, self.network, self.checkpoint, self.inferer = loader, network, checkpoint, inferer
        self.output_dir = Path(output_dir)
        self.undo = Invertd("pred", preparation, "image", nearest_interp=True, to_tensor=False)

    def run(self) -> None:
        """Segment all volumes.

        Raises:
            Mistake: when the checkpoint does not fit; or at the end, naming the volumes that could not be segmented.
        """
        load_network(self.network, load_state_dict(self.checkpoint), self.checkpoint)
        self.network.eval()
        failed = []
        for item in tqdm(self.loader, desc="segmenting", unit="volume", leave=False, disable=None):
            problem = item.get("error")
            if problem is None:
                try:
                    self._segment(item["image"], self.output_dir / f"{item['case']}.nii.gz")
                except Exception as error:  # out of memory on one volume must not cost the others
                    problem = reason(error)
            if problem:
                failed.append(f"{item['case']}: {problem}")
        total = len(self.loader.dataset)
        logger.info("label maps of %d of %d volumes are in %s", total - len(failed), total, self.output_dir)
        if failed:
            listing = "\n  ".join(failed)
            raise Mistake(f"{len(failed)} of {total} volumes could not be segmented:\n  {listing}")

    @torch.no_grad()
    def _segment(self, image: MetaTensor, path: Path) -> None:
        source = Path(image.meta["filename_or_obj"])
        if path.exists() and path.samefile(source):
            raise Mistake(f"its label map would overwrite it: choose another --output_dir than {self.output_dir}")
        logits = self.inferer(image[None].as_tensor(), self.network)[0]
        labels = MetaTensor(logits.argmax(dim=0, keepdim=True).float(), meta=image.meta)
        labels = self.undo({"image": image, "pred": labels})["pred"]
        path.parent.mkdir(parents=True, exist_ok=True)
        save_nifti(path, labels[0].numpy().astype(np.uint8), labels.affine.numpy())
