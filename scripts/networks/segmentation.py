"""An encoder under a dense decoder of MONAI's UNETR blocks."""

import copy

import torch
from monai.networks.blocks import UnetOutBlock, UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock
from torch import Tensor, nn

from ..mistakes import Mistake
from .encoder import recorded

__all__ = ["SegmentationNetwork"]


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
        Mistake: when the encoder gives fewer skips than there are levels.
    """

    def __init__(self, encoder: nn.Module, out_channels: int, feature_size: int = 16) -> None:
        super().__init__()
        self.encoder = encoder
        head = {"num_labels": out_channels - 1, "feature_size": feature_size}
        self.settings = getattr(encoder, "settings", {}) | head
        self.num_levels = encoder.patch_size.bit_length() - 1
        with torch.no_grad():  # of the shapes alone
            volume = torch.empty(1, encoder.in_chans, *encoder.img_size, device="meta")
            *skips, features = copy.deepcopy(encoder).to("meta").forward_with_skips(volume)
        if len(skips) < self.num_levels - 1:
            raise Mistake(
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
                upsampling = {"num_layer": doublings - 1, "upsample_kernel_size": 2, "conv_block": True}
                block = UnetrPrUpBlock(3, skip.shape[1], width, stride=1, **upsampling, **residual)
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

    def __prepare_scriptable__(self) -> nn.Module:
        return recorded(self, (self.encoder.in_chans, *self.encoder.img_size))
