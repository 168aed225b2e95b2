"""The encoder: a CNN stem, fixed 3D positions, and Swin blocks at one constant resolution."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import pairwise

import torch
from einops import rearrange
from monai.networks.blocks.pos_embed_utils import build_sincos_position_embedding
from monai.utils import ensure_tuple
from torch import Tensor, nn

from ..mistakes import Mistake
from .swin import SwinLayer, maybe_checkpointed

__all__ = ["BertsWinEncoder", "PatchStem", "initialise_weights", "sincos_positions"]

PATCH_SIZES = (2, 4, 8, 16, 32, 64)
STEM_GROUPS = 4


class BlockGroupNorm(nn.GroupNorm):
    """Group norm that normalises each block of a volume by itself, as if the blocks had come one at a time.

    Same weights as :class:`torch.nn.GroupNorm`, and the same numbers on a single block.

    Args:
        num_groups: groups of channels.
        num_channels: channels.
        block_size: side of a block in voxels.
    """

    def __init__(self, num_groups: int, num_channels: int, block_size: int) -> None:
        super().__init__(num_groups, num_channels)
        self.block_size = block_size

    def forward(self, volume: Tensor) -> Tensor:
        """Normalise ``(B, C, D, H, W)``, every side a multiple of the block's."""
        b, d, h, w = volume.shape[0], *(side // self.block_size for side in volume.shape[2:])
        blocks = rearrange(volume, "b c (d p) (h q) (w r) -> (b d h w) c p q r", d=d, h=h, w=w)
        return rearrange(super().forward(blocks), "(b d h w) c p q r -> b c (d p) (h q) (w r)", b=b, d=d, h=h, w=w)


class PaddedConv(nn.Conv3d):
    """A padded convolution of 3³ with stride 2, which spares a block of 2³, the end of a patch, the padding."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, stride=2, padding=1, bias=False)

    def forward(self, volume: Tensor) -> Tensor:
        """Map ``(B, in_channels, D, H, W)`` to ``(B, out_channels, ⌈D/2⌉, ⌈H/2⌉, ⌈W/2⌉)``."""
        if tuple(volume.shape[2:]) == (2, 2, 2):  # 19 of the 27 taps meet nothing but padding
            return nn.functional.conv3d(volume, self.weight[:, :, 1:, 1:, 1:])
        return super().forward(volume)


class PatchStem(nn.Module):
    """CNN stem that turns each P³ block of voxels into one token.

    log2(P) stages of ``Conv3d → GroupNorm(4) → GELU`` halve the volume and double the width, then a 1³ convolution
    projects to the token width. The default kernels (3³, stride 2) overlap; the strict ones (2³, stride 2) do not.

    Args:
        patch_size: P, a power of two from 2 to 64, in voxels.
        in_chans: image channels.
        base_dim: width of the first stage; a multiple of 4.
        embed_dim: width of a token.
        strict: non-overlapping kernels.
        blockwise_norm: with strict kernels, normalise each patch's block by itself. The stem then computes the same
            function on a whole volume as on its isolated patches, and needs no tuning.

    Raises:
        Mistake: when the settings cannot be built.
    """

    def __init__(
        self,
        patch_size: int,
        in_chans: int,
        base_dim: int,
        embed_dim: int,
        strict: bool = False,
        blockwise_norm: bool = False,
    ) -> None:
        super().__init__()
        if blockwise_norm and not strict:
            raise Mistake(
                "blockwise_norm needs strict_stem=True: overlapping kernels see the neighbours of a patch, whatever "
                "the norm"
            )
        if patch_size not in PATCH_SIZES or not isinstance(patch_size, int):
            raise Mistake(f"patch_size {patch_size} must be a power of two from 2 to 64: one of {PATCH_SIZES}")
        if base_dim < 1 or base_dim % STEM_GROUPS:
            raise Mistake(
                f"stem_base_dim {base_dim} must be a positive multiple of {STEM_GROUPS} (its group norm has "
                f"{STEM_GROUPS} groups), for example {_next_multiple(base_dim, STEM_GROUPS)}"
            )
        if in_chans < 1:
            raise Mistake(f"in_chans {in_chans} must be at least 1, the number of image channels")
        num_stages = PATCH_SIZES.index(patch_size) + 1
        widths = [in_chans, *(base_dim * 2**i for i in range(num_stages))]
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv3d(c_in, c_out, kernel_size=2, stride=2, bias=False) if strict else PaddedConv(c_in, c_out),
                BlockGroupNorm(STEM_GROUPS, c_out, block_size=patch_size >> stage)
                if blockwise_norm
                else nn.GroupNorm(STEM_GROUPS, c_out),
                nn.GELU(),
            )
            for stage, (c_in, c_out) in enumerate(pairwise(widths), start=1)
        )
        self.proj = nn.Conv3d(widths[-1], embed_dim, kernel_size=1)

    def forward(self, volume: Tensor) -> Tensor:
        """Map ``(B, in_chans, D, H, W)`` to ``(B, embed_dim, D/P, H/P, W/P)``."""
        return self.forward_with_skips(volume)[0]

    def forward_with_skips(self, volume: Tensor) -> tuple[Tensor, list[Tensor]]:
        """As :meth:`forward`, and the output of every stage, finest first, for dense decoders."""
        skips = []
        # Channels last in memory: convolutions are fastest in this layout, and the blocks want the tokens in it.
        # Cloned, since a single channel passes for either layout, and would be taken for the slow one.
        volume = rearrange(volume, "b c d h w -> b d h w c").clone(memory_format=torch.contiguous_format)
        volume = rearrange(volume, "b d h w c -> b c d h w")
        for stage in self.stages:
            volume = stage(volume)
            skips.append(volume)
        return self.proj(volume), skips


class BertsWinEncoder(nn.Module):
    """BertsWin as a plain feature extractor: one volume in, one feature map out.

    Stem, fixed positions and Swin blocks with no down-sampling between them. The argument names are those of
    :class:`~bertswin_mae.networks.BertsWinMAE`, whose ``encoder`` this is.

    Args:
        img_size: volume size in voxels, D, H, W (or one number for a cube); a multiple of ``patch_size``.
        patch_size: P, a power of two from 2 to 64, in voxels.
        in_chans: image channels.
        encoder_embed_dim: token width C; a multiple of 6 (sine and cosine for three axes) and of the heads.
        encoder_depths: ``[depth]``, the number of Swin blocks; a list of one, as the resolution is constant.
        encoder_num_heads: ``[heads]``.
        swin_window_size: attention window in tokens, D, H, W; no larger than the grid.
        stem_base_dim: width of the stem's first stage; a multiple of 4.
        strict_stem: non-overlapping stem kernels.
        blockwise_norm: with a strict stem, normalise each patch by itself also in whole volumes.
        activation_checkpointing: in training, compute activations again on the way back instead of keeping them.

    Raises:
        Mistake: for settings that cannot be built; the message names the value and one that would do.
    """

    def __init__(
        self,
        img_size: Sequence[int] | int = (224, 224, 224),
        patch_size: int = 16,
        in_chans: int = 1,
        encoder_embed_dim: int = 768,
        encoder_depths: Sequence[int] = (12,),
        encoder_num_heads: Sequence[int] = (12,),
        swin_window_size: Sequence[int] | int = (7, 7, 7),
        stem_base_dim: int = 48,
        strict_stem: bool = False,
        blockwise_norm: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.img_size = _three("img_size", img_size)
        self.patch_size, self.in_chans, self.embed_dim = patch_size, in_chans, encoder_embed_dim
        self.strict_stem, self.activation_checkpointing = strict_stem, activation_checkpointing
        window_size = _three("swin_window_size", swin_window_size)
        depth, num_heads = _only("encoder_depths", encoder_depths), _only("encoder_num_heads", encoder_num_heads)
        self.stem = PatchStem(patch_size, in_chans, stem_base_dim, encoder_embed_dim, strict_stem, blockwise_norm)
        _check_grid(self.img_size, patch_size, window_size)
        _check_width(encoder_embed_dim, num_heads)
        self.grid_size = tuple(side // patch_size for side in self.img_size)
        # Fixed by formula: a checkpoint holds learned parameters only, and so loads at another img_size too.
        self.register_buffer("positions", sincos_positions(self.grid_size, encoder_embed_dim), persistent=False)
        self.swin = SwinLayer(
            encoder_embed_dim, depth, num_heads, window_size, self.grid_size, activation_checkpointing
        )
        self.apply(initialise_weights)

    @property
    def num_patches(self) -> int:
        """N, the number of tokens of a volume."""
        return self.positions.shape[2:].numel()

    def forward(self, volume: Tensor) -> Tensor:
        """Extract features of whole volumes.

        Args:
            volume: ``(B, in_chans, *img_size)``.

        Returns:
            ``(B, C, D/P, H/P, W/P)``.

        Raises:
            Mistake: when the volume has another shape.
        """
        self.check_volume(volume)
        return self.attend(self.read(volume))

    def forward_with_skips(self, volume: Tensor) -> tuple[Tensor, ...]:
        """As :meth:`forward`, for dense decoders.

        Returns:
            The output of every stem stage, finest first, ``(B, stem_base_dim · 2^i, D/2^(i+1), …)``, then the features.
        """
        self.check_volume(volume)
        tokens, skips = maybe_checkpointed(self.stem.forward_with_skips, volume, self.activation_checkpointing)
        return (*skips, self.attend(tokens))

    def read(self, volume: Tensor) -> Tensor:
        """Run the stem: ``(B, in_chans, D, H, W)``, whole volumes or single patches, to ``(B, C, D/P, H/P, W/P)``."""
        return maybe_checkpointed(self.stem, volume, self.activation_checkpointing)

    def attend(self, tokens: Tensor) -> Tensor:
        """Add the positions and let the tokens talk.

        Args:
            tokens: ``(B, C, D/P, H/P, W/P)``, the stem's output, mask tokens included.

        Returns:
            Features of the same shape.
        """
        return self.swin(tokens + self.positions)

    def check_volume(self, volume: Tensor) -> None:
        """Raise a ValueError when a volume's shape is not the one this encoder was built for."""
        expected = (self.in_chans, *self.img_size)
        if tuple(volume.shape[1:]) != expected:
            raise ValueError(
                f"volume has shape {tuple(volume.shape)} but this network takes (B, C, D, H, W) = "
                f"{('B', *expected)}: crop or pad it, or slide a window of {self.img_size} over it"
            )


def sincos_positions(grid_size: Sequence[int], embed_dim: int) -> Tensor:
    """Fixed sine-cosine positions of a 3D grid: C/3 channels an axis, in the order D, H, W, sines first.

    MONAI's builder gives the same numbers with the first two axis blocks the other way round.

    Args:
        grid_size: tokens along D, H, W.
        embed_dim: C, a multiple of 6.

    Returns:
        ``(1, C, D/P, H/P, W/P)``.
    """
    d, h, w = grid_size
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.meshgrid")  # MONAI calls it without `indexing`
        table = build_sincos_position_embedding(list(grid_size), embed_dim, spatial_dims=3).detach()
    by_axis = rearrange(table, "1 (d h w) (axes c) -> 1 axes c d h w", d=d, h=h, w=w, axes=3)
    return rearrange(by_axis[:, [1, 0, 2]], "1 axes c d h w -> 1 (axes c) d h w").contiguous()


def initialise_weights(module: nn.Module) -> None:
    """Initialise one module as the paper's code does: for ``network.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
    elif isinstance(module, nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if isinstance(module, nn.Linear | nn.Conv3d) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _check_grid(img_size: Sequence[int], patch_size: int, window_size: Sequence[int]) -> None:
    if any(side < patch_size or side % patch_size for side in img_size):
        nearest = tuple(_next_multiple(side, patch_size) for side in img_size)
        raise Mistake(
            f"img_size {tuple(img_size)} must be divisible by patch_size {patch_size} along every axis, "
            f"for example {nearest}"
        )
    grid_size = tuple(side // patch_size for side in img_size)
    if any(window < 1 or window > side for window, side in zip(window_size, grid_size, strict=True)):
        fitting = tuple(min(max(window, 1), side) for window, side in zip(window_size, grid_size, strict=True))
        raise Mistake(
            f"swin_window_size {tuple(window_size)} must lie between 1 and the grid of tokens {grid_size} "
            f"(img_size {tuple(img_size)} / patch_size {patch_size}) along every axis, for example {fitting}"
        )


def _check_width(embed_dim: int, num_heads: int) -> None:
    if embed_dim < 1 or embed_dim % 6:
        raise Mistake(
            f"encoder_embed_dim {embed_dim} must be a positive multiple of 6 (a sine and a cosine for each of three "
            f"axes), for example {_next_multiple(embed_dim, 6)}"
        )
    if embed_dim % num_heads:
        fitting = max(heads for heads in range(1, num_heads) if embed_dim % heads == 0)
        raise Mistake(
            f"encoder_num_heads [{num_heads}] must divide encoder_embed_dim {embed_dim}, for example [{fitting}]"
        )


def _next_multiple(value: int, factor: int) -> int:
    return max(1, -(-value // factor)) * factor


def _three(name: str, values: Sequence[int] | int) -> tuple[int, int, int]:
    values = ensure_tuple(values)
    if len(values) not in (1, 3) or not all(isinstance(value, int) for value in values):
        example = (values[0] if isinstance(values[0], int) else 7,) * 3
        raise Mistake(f"{name} {values} must be one whole number, or three for D, H and W, for example {example}")
    return values * (3 // len(values))


def _only(name: str, values: Sequence[int] | int) -> int:
    values = ensure_tuple(values)
    if len(values) != 1 or not isinstance(values[0], int) or values[0] < 1:
        example = next((value for value in values if isinstance(value, int) and value >= 1), 12)
        raise Mistake(
            f"{name} {list(values)} must hold exactly one positive number, since the encoder works at one constant "
            f"resolution, for example [{example}]"
        )
    return values[0]
