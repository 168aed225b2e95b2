"""An encoder under a light decoder, whose convolutions work at half of the resolution at most."""

import copy

import torch
from einops import rearrange
from monai.networks.blocks import UnetResBlock
from torch import Tensor, nn

from ..mistakes import Mistake
from .encoder import recorded

__all__ = ["SegmentationNetwork"]


class SegmentationNetwork(nn.Module):
    """Encoder and light decoder, for any patch size.

    The decoder starts at the encoder's features, doubles the resolution log2(P) times, and takes a skip connection at
    every level but the finest. It doubles by sub-pixel convolutions of 1³ (Shi et al. 2016), and has MONAI's residual
    blocks between them. Those of :class:`~monai.networks.nets.UNETR` work on all voxels and on a skip of the image
    itself: they take most of the time, and learn slowly from few labels.

    Args:
        encoder: has ``img_size``, ``patch_size``, ``in_chans``, and ``forward_with_skips``, which maps a volume
            ``(B, in_chans, *img_size)`` to skips, and then the features ``(B, C, D/P, H/P, W/P)``. Skips on the grid of
            the features join them; those of half, a quarter, … of the resolution join their level.
        out_channels: classes, background included.
        feature_size: channels at half of the resolution, doubled at every level below.

    Raises:
        Mistake: when a skip is on no level.
    """

    def __init__(self, encoder: nn.Module, out_channels: int, feature_size: int = 32) -> None:
        super().__init__()
        self.encoder = encoder
        head = {"num_labels": out_channels - 1, "feature_size": feature_size}
        self.settings = getattr(encoder, "settings", {}) | head
        with torch.no_grad():  # of the shapes alone
            volume = torch.empty(1, encoder.in_chans, *encoder.img_size, device="meta")
            given = copy.deepcopy(encoder).to("meta").forward_with_skips(volume)
        depth = encoder.patch_size.bit_length() - 1
        self.resolutions = [(encoder.img_size[0] // hidden.shape[2]).bit_length() - 1 for hidden in given]
        if not all(1 <= level <= depth for level in self.resolutions):
            shapes = [tuple(hidden.shape[2:]) for hidden in given]
            raise Mistake(f"skips of {shapes} must lie between half of {encoder.img_size} and the grid of the features")
        channels = [0] * (depth + 1)
        for level, hidden in zip(self.resolutions, given, strict=True):
            channels[level] += hidden.shape[1]
        widths = [out_channels, *(feature_size * 2**level for level in range(depth))]
        self.levels = nn.ModuleList(  # coarsest first
            _Level(channels[level], widths[level] if level < depth else 0, widths[level], widths[level - 1])
            for level in range(depth, 0, -1)
        )

    def forward(self, volume: Tensor) -> Tensor:
        """Map ``(B, in_chans, *img_size)`` to logits ``(B, out_channels, *img_size)``."""
        given = self.encoder.forward_with_skips(volume)
        hidden: list[Tensor] = []
        for level, block in zip(range(len(self.levels), 0, -1), self.levels, strict=True):
            skips = [skip for skip, its in zip(given, self.resolutions, strict=True) if its == level]
            hidden = [block(skips, hidden)]
        return hidden[0]

    def __prepare_scriptable__(self) -> nn.Module:
        return recorded(self, (self.encoder.in_chans, *self.encoder.img_size))


class _Level(nn.Module):
    """Join the skips of a level to what comes from below, refine, and double the resolution."""

    def __init__(self, skip_channels: int, below: int, width: int, out_channels: int) -> None:
        super().__init__()
        self.project: nn.Module | None = None
        if skip_channels:
            convolution = nn.Conv3d(skip_channels, width, kernel_size=1, bias=False)
            self.project = nn.Sequential(convolution, nn.InstanceNorm3d(width, affine=True), nn.LeakyReLU(0.01))
        joined = below + (width if skip_channels else 0)
        self.refine = UnetResBlock(3, joined, width, kernel_size=3, stride=1, norm_name=("instance", {"affine": True}))
        self.upsample = nn.Conv3d(width, 8 * out_channels, kernel_size=1)

    def forward(self, skips: list[Tensor], below: list[Tensor]) -> Tensor:
        if self.project is not None:
            below = [*below, self.project(torch.cat(skips, dim=1))]
        refined = self.refine(torch.cat(below, dim=1))
        return rearrange(self.upsample(refined), "b (c p q r) d h w -> b c (d p) (h q) (w r)", p=2, q=2, r=2)
