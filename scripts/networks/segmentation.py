"""An encoder under a light decoder, which starts from what a linear map reads off the tokens."""

import copy

import torch
from einops import rearrange
from monai.networks.blocks import UnetResBlock
from torch import Tensor, nn

from ..mistakes import Mistake
from .encoder import recorded

__all__ = ["SegmentationNetwork"]

FINEST = 8  # logits along each side of a patch that the linear map gives, at most
RANK = 64  # of the linear map


class SegmentationNetwork(nn.Module):
    """Encoder, a linear map of its tokens, and a light decoder whose logits are added, for any patch size.

    The linear map takes what the encoder says of a patch at several depths to the logits of all voxels in it. It starts
    at zero, or where :class:`~bertswin_mae.workflows.DiscriminantStart` puts it.

    The decoder starts at the features, doubles the resolution log2(P) times, and takes a skip connection at every level
    but the finest. It doubles by sub-pixel convolutions of 1³ (Shi et al. 2016), and has MONAI's residual blocks
    between them. Those of :class:`~monai.networks.nets.UNETR` work on all voxels and on a skip of the image itself:
    they take most of the time, and learn slowly.

    Args:
        encoder: has ``img_size``, ``patch_size``, ``in_chans``, and ``forward_intermediates``, which maps a volume
            ``(B, in_chans, *img_size)`` to maps, and then the features ``(B, C, D/P, H/P, W/P)``. Maps on the grid of
            the features join them; those of half, a quarter, … of the resolution are skips of their level.
        out_channels: classes, background included.
        feature_size: channels at half of the resolution, doubled at every level below.

    Raises:
        Mistake: when a map is on no level, or the grid is a single token.
    """

    def __init__(self, encoder: nn.Module, out_channels: int, feature_size: int = 32) -> None:
        super().__init__()
        self.encoder = encoder
        head = {"num_labels": out_channels - 1, "feature_size": feature_size}
        self.settings = getattr(encoder, "settings", {}) | head
        with torch.no_grad():  # of the shapes alone
            volume = torch.empty(1, encoder.in_chans, *encoder.img_size, device="meta")
            given = copy.deepcopy(encoder).to("meta").forward_intermediates(volume)
        depth = encoder.patch_size.bit_length() - 1
        self.resolutions = [(encoder.img_size[0] // hidden.shape[2]).bit_length() - 1 for hidden in given]
        if not all(1 <= level <= depth for level in self.resolutions):
            shapes = [tuple(hidden.shape[2:]) for hidden in given]
            raise Mistake(f"maps of {shapes} must lie between half of {encoder.img_size} and the grid of the features")
        if given[-1].shape[2:].numel() == 1:
            raise Mistake(f"img_size {encoder.img_size} is one patch: a decoder needs two along an axis at least")
        channels = [0] * (depth + 1)
        for level, hidden in zip(self.resolutions, given, strict=True):
            channels[level] += hidden.shape[1]
        widths = [out_channels, *(feature_size * 2**level for level in range(depth))]
        self.levels = nn.ModuleList(  # coarsest first
            Level(channels[level], widths[level] if level < depth else 0, widths[level], widths[level - 1])
            for level in range(depth, 0, -1)
        )
        self.token_head = TokenHead(channels[depth], out_channels, encoder.patch_size)

    def forward(self, volume: Tensor) -> Tensor:
        """Map ``(B, in_chans, *img_size)`` to logits ``(B, out_channels, *img_size)``."""
        given = self.encoder.forward_intermediates(volume)
        tokens, *skips = (self._of_level(given, level) for level in range(len(self.levels), 0, -1))
        hidden: list[Tensor] = []
        for block, maps in zip(self.levels, (tokens, *skips), strict=True):
            hidden = [block(maps, hidden)]
        return hidden[0] + self.token_head(tokens)

    def tokens(self, volume: Tensor) -> Tensor:
        """Map volumes to what the linear map takes, ``(B, K, D/P, H/P, W/P)``."""
        return self._of_level(self.encoder.forward_intermediates(volume), len(self.levels))

    @torch.no_grad()
    def start_from(self, reduce: Tensor, expand: Tensor, bias: Tensor) -> None:
        """Take a linear map for a start, to which the decoder adds nothing yet.

        Args:
            reduce: ``(K, rank)``, of tokens.
            expand: ``(rank, out_channels · places)``, to logits.
            bias: ``(out_channels · places,)``, of these.
        """
        first, second = self.token_head.reduce, self.token_head.expand
        for parameter, values in ((first.weight, reduce.T), (second.weight, expand.T), (second.bias, bias)):
            parameter.copy_(values.reshape(parameter.shape))
        for parameter in self.levels[-1].upsample.parameters():
            parameter.zero_()

    def _of_level(self, given: tuple[Tensor, ...], level: int) -> Tensor | None:
        maps = [hidden for hidden, its in zip(given, self.resolutions, strict=True) if its == level]
        return torch.cat(maps, dim=1) if maps else None

    def __prepare_scriptable__(self) -> nn.Module:
        return recorded(self, (self.encoder.in_chans, *self.encoder.img_size))


class TokenHead(nn.Module):
    """Linear map of low rank from a token to the logits of its patch, at 8³ places where patches are larger.

    Args:
        channels: of a token.
        out_channels: classes.
        patch_size: P, in voxels.
    """

    def __init__(self, channels: int, out_channels: int, patch_size: int) -> None:
        super().__init__()
        self.side = min(patch_size, FINEST)  # places along a side of a patch
        self.repeats = patch_size // self.side  # voxels along a side of a place
        self.reduce = nn.Conv3d(channels, RANK, kernel_size=1, bias=False)
        self.expand = nn.Conv3d(RANK, out_channels * self.side**3, kernel_size=1)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``(B, channels, D/P, H/P, W/P)`` to logits ``(B, out_channels, D, H, W)``."""
        side = dict.fromkeys("pqr", self.side)
        logits = rearrange(self.expand(self.reduce(tokens)), "b (c p q r) d h w -> b c (d p) (h q) (w r)", **side)
        return logits if self.repeats == 1 else nn.functional.interpolate(logits, scale_factor=self.repeats)


class Level(nn.Module):
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

    def forward(self, skips: Tensor | None, below: list[Tensor]) -> Tensor:
        if self.project is not None:
            below = [*below, self.project(skips)]
        refined = self.refine(torch.cat(below, dim=1))
        return rearrange(self.upsample(refined), "b (c p q r) d h w -> b c (d p) (h q) (w r)", p=2, q=2, r=2)
