"""Segmentation on top of any encoder: a dense decoder of MONAI's UNETR blocks, frozen and then fine-tuned."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.metrics import HausdorffDistanceMetric
from monai.networks.blocks import UnetOutBlock, UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock
from monai.transforms import Compose, Invertd
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from . import checkpoints
from .data import reason
from .encoder import BertsWinEncoder
from .engine import AutocastInferer
from .inference import load_encoder, save_nifti, strict_stem_of

__all__ = [
    "BoundedHausdorffMetric",
    "FreezeEncoder",
    "LogitsInferer",
    "LogitsWindowInferer",
    "MaskWriter",
    "SegmentationNetwork",
    "build_encoder",
    "fill_encoder",
    "from_scratch",
    "parameter_groups",
]

logger = logging.getLogger(__name__)


class SegmentationNetwork(nn.Module):
    """Encoder and dense decoder: the blocks of MONAI's :class:`~monai.networks.nets.UNETR`, for any patch size.

    The decoder starts at the encoder's features, doubles the resolution log2(P) times, and takes a skip connection at
    every level: the image itself at the finest, and below it what the encoder gives. A skip that is coarser than its
    level (a transformer's hidden states, all on the grid of tokens) is brought up to it, as UNETR does.

    Args:
        encoder: has ``img_size``, ``patch_size``, ``in_chans``, and ``forward_with_skips``, which maps a volume
            ``(B, in_chans, *img_size)`` to skips for the levels of half, a quarter, … of the resolution, finest first,
            and then the features ``(B, C, D/P, H/P, W/P)``. A skip on the grid of the features is left out.
        out_channels: classes, background included.
        feature_size: channels at full resolution, doubled at every level below.

    Raises:
        ValueError: when the encoder gives fewer skips than there are levels.
    """

    def __init__(self, encoder: nn.Module, out_channels: int, feature_size: int = 16) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_levels = encoder.patch_size.bit_length() - 1
        with torch.no_grad():  # of the shapes alone
            volume = torch.empty(1, encoder.in_chans, *encoder.img_size, device="meta")
            *skips, features = copy.deepcopy(encoder).to("meta").forward_with_skips(volume)
        if len(skips) < self.num_levels - 1:
            raise ValueError(
                f"the encoder gives {len(skips)} skips where patches of {encoder.patch_size} voxels need "
                f"{self.num_levels - 1}"
            )
        widths = [feature_size * 2**level for level in range(self.num_levels)]
        residual = {"kernel_size": 3, "norm_name": "instance", "res_block": True}
        self.skips = nn.ModuleList([UnetrBasicBlock(3, encoder.in_chans, widths[0], stride=1, **residual)])
        # What lies beyond the last level is on the grid of the features, which hold it.
        for level, (skip, width) in enumerate(zip(skips, widths[1:], strict=False), start=1):
            doublings = (encoder.img_size[0] // 2**level // skip.shape[2]).bit_length() - 1
            if doublings:
                block = UnetrPrUpBlock(
                    3,
                    skip.shape[1],
                    width,
                    num_layer=doublings - 1,
                    stride=1,
                    upsample_kernel_size=2,
                    conv_block=True,
                    **residual,
                )
            else:
                block = UnetrBasicBlock(3, skip.shape[1], width, stride=1, **residual)
            self.skips.append(block)
        self.ups = nn.ModuleList(
            UnetrUpBlock(3, coarse, fine, upsample_kernel_size=2, **residual)
            for coarse, fine in zip([*widths[1:], features.shape[1]], widths, strict=True)
        )
        self.out = UnetOutBlock(3, widths[0], out_channels)

    def forward(self, volume: Tensor) -> Tensor:
        """Map ``(B, in_chans, *img_size)`` to logits ``(B, out_channels, *img_size)``."""
        *given, hidden = self.encoder.forward_with_skips(volume)
        skips = [block(skip) for block, skip in zip(self.skips, [volume, *given], strict=False)]
        for up, skip in zip(reversed(self.ups), reversed(skips), strict=True):
            hidden = up(hidden, skip)
        return self.out(hidden)


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
        ValueError: when there are no such weights, or they do not fit the settings.
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
        ValueError: of ``load``.
    """
    return encoder if pretrained is None else load(encoder, pretrained)


def from_scratch(network: nn.Module, pretrained: str | Path | None) -> nn.Module:
    """Hand a network on that has no encoder to fill; a ValueError where there are weights for one."""
    if pretrained is not None:
        raise ValueError(f"{type(network).__name__} starts from random weights: leave --pretrained out")
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


class LogitsInferer(AutocastInferer):
    """Autocast, and logits in float32: a Dice over thousands of voxels needs more than half precision."""

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Map ``(B, C, D, H, W)`` to logits."""
        return super().__call__(inputs, network, *args, **kwargs).float()


class LogitsWindowInferer(LogitsInferer):
    """MONAI's sliding window under autocast, for volumes of any size.

    Windows are on the device a batch at a time; volumes and logits are gathered in main memory.

    Args:
        window_size: the network's ``img_size``, in voxels.
        overlap: share of a window that its neighbour covers too, in [0, 1).
        batch_size: windows at once.
        background: what volumes smaller than a window are padded with.
        precision: see :func:`~bertswin_mae.engine.autocast_dtype`.
        device: that the network runs on.
    """

    def __init__(
        self,
        window_size: list[int],
        overlap: float,
        batch_size: int,
        background: float,
        precision: str,
        device: str | torch.device,
    ) -> None:
        super().__init__(precision, device)
        self.windows = SlidingWindowInferer(
            window_size, batch_size, overlap, mode="gaussian", cval=background, sw_device=device, device="cpu"
        )

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Map a volume ``(B, C, D, H, W)`` to logits of the same size."""
        return super().__call__(inputs.cpu(), partial(self.windows, network=network), *args, **kwargs)


class BoundedHausdorffMetric(HausdorffDistanceMetric):
    """MONAI's Hausdorff distance, in voxels, finite where only one of the two has the structure.

    MONAI says infinity where it is missed altogether, which makes every mean infinite, and nothing where it is found
    though it is not there. Both are as far off here as the volume is long.
    """

    def _compute_tensor(self, y_pred: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
        distance = super()._compute_tensor(y_pred, y, **kwargs)
        diagonal = torch.tensor(y.shape[2:], dtype=distance.dtype, device=distance.device).norm()
        found, there = (mask[:, -distance.shape[1] :].flatten(2).any(dim=2) for mask in (y_pred > 0, y > 0))
        return torch.where(found.to(distance.device) != there.to(distance.device), diagonal, distance)


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
            ValueError: when the checkpoint does not fit; or at the end, naming the volumes that could not be segmented.
        """
        checkpoints.load_network(self.network, checkpoints.load_state_dict(self.checkpoint), self.checkpoint)
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
            raise ValueError(f"{len(failed)} of {total} volumes could not be segmented:\n  {listing}")

    @torch.no_grad()
    def _segment(self, image: MetaTensor, path: Path) -> None:
        source = Path(image.meta["filename_or_obj"])
        if path.exists() and path.samefile(source):
            raise ValueError(f"its label map would overwrite it: choose another --output_dir than {self.output_dir}")
        logits = self.inferer(image[None].as_tensor(), self.network)[0]
        labels = MetaTensor(logits.argmax(dim=0, keepdim=True).float(), meta=image.meta)
        labels = self.undo({"image": image, "pred": labels})["pred"]
        path.parent.mkdir(parents=True, exist_ok=True)
        save_nifti(path, labels[0].numpy().astype(np.uint8), labels.affine.numpy())
