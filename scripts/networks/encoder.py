"""The encoder: a CNN stem, fixed 3D positions, and Swin blocks at one constant resolution."""

import math
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

__all__ = ["BertsWinEncoder", "PatchStem", "initialise_weights", "recorded", "sincos_positions"]

PATCH_SIZES = (2, 4, 8, 16, 32, 64)
STEM_GROUPS = 4


class BlockGroupNorm(nn.GroupNorm):
    """Group norm that normalises each block of a volume by itself, as if the blocks had come one at a time.

    Weights are those of :class:`torch.nn.GroupNorm`, and so are the numbers on a single block. ``block_size`` is the
    side of a block in voxels.
    """

    def __init__(self, num_groups: int, num_channels: int, block_size: int) -> None:
        super().__init__(num_groups, num_channels)
        self.block_size = block_size

    def forward(self, volume: Tensor) -> Tensor:
        """Normalise ``(B, C, D, H, W)``, every side a multiple of the block's."""
        b, d, h, w = volume.shape[0], *(side // self.block_size for side in volume.shape[2:])
        blocks = rearrange(volume, "b c (d p) (h q) (w r) -> (b d h w) c p q r", d=d, h=h, w=w)
        return rearrange(super().forward(blocks), "(b d h w) c p q r -> b c (d p) (h q) (w r)", b=b, d=d, h=h, w=w)


class PatchStem(nn.Module):
    """CNN stem that turns each P³ block of voxels into one token.

    log2(P) stages of ``Conv3d → GroupNorm(4) → GELU`` halve the volume and double the width, then a 1³ convolution
    projects to the token width. The default kernels (3³, stride 2) overlap; the strict ones (2³, stride 2) do not.
    Takes arguments of :class:`~bertswin_mae.networks.BertsWinMAE`.
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
        widths = [in_chans, *(base_dim * 2**stage for stage in range(PATCH_SIZES.index(patch_size) + 1))]
        kernel = {"kernel_size": 2} if strict else {"kernel_size": 3, "padding": 1}
        self.stages = nn.ModuleList()
        for stage, (c_in, c_out) in enumerate(pairwise(widths), start=1):
            conv = nn.Conv3d(c_in, c_out, stride=2, bias=False, **kernel)
            norm = nn.GroupNorm(STEM_GROUPS, c_out)
            if blockwise_norm:
                norm = BlockGroupNorm(STEM_GROUPS, c_out, block_size=patch_size >> stage)
            self.stages.append(nn.Sequential(conv, norm, nn.GELU()))
        self.proj = nn.Conv3d(widths[-1], embed_dim, kernel_size=1)

    def forward(self, volume: Tensor) -> Tensor:
        """Map ``(B, in_chans, D, H, W)`` to ``(B, embed_dim, D/P, H/P, W/P)``."""
        return self.forward_with_skips(volume)[0]

    def forward_with_skips(self, volume: Tensor) -> tuple[Tensor, list[Tensor]]:
        """As :meth:`forward`, and the output of every stage, finest first, for decoders."""
        skips = []
        for stage in self.stages:
            volume = stage(volume)
            skips.append(volume)
        return self.proj(volume), skips


class BertsWinEncoder(nn.Module):
    """BertsWin as a plain feature extractor: one volume in, one feature map out.

    Stem, fixed positions and Swin blocks with no down-sampling between them. The arguments are those of
    :class:`~bertswin_mae.networks.BertsWinMAE`, whose ``encoder`` this is.
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
        self.img_size = _triple("img_size", img_size)
        self.patch_size, self.in_chans, self.embed_dim = patch_size, in_chans, encoder_embed_dim
        self.strict_stem, self.activation_checkpointing = strict_stem, activation_checkpointing
        window_size = _triple("swin_window_size", swin_window_size)
        depth, num_heads = _single("encoder_depths", encoder_depths), _single("encoder_num_heads", encoder_num_heads)
        self.stem = PatchStem(patch_size, in_chans, stem_base_dim, encoder_embed_dim, strict_stem, blockwise_norm)
        self.grid_size = _grid_size(self.img_size, patch_size, window_size)
        _check_width(encoder_embed_dim, num_heads)
        # Fixed by formula: a checkpoint holds learned parameters only, and so loads at another img_size too.
        self.register_buffer("positions", sincos_positions(self.grid_size, encoder_embed_dim), persistent=False)
        self.swin = SwinLayer(
            encoder_embed_dim, depth, num_heads, window_size, self.grid_size, activation_checkpointing
        )
        self.apply(initialise_weights)
        # By the names of the configs' knobs: what weights carry with them.
        self.settings = {
            "img_size": list(self.img_size),
            "patch_size": patch_size,
            "in_chans": in_chans,
            "encoder_embed_dim": encoder_embed_dim,
            "encoder_depth": depth,
            "encoder_num_heads": num_heads,
            "swin_window_size": list(window_size),
            "stem_base_dim": stem_base_dim,
            "strict_stem": strict_stem,
            "blockwise_norm": blockwise_norm,
        }

    @property
    def num_patches(self) -> int:
        """N, the number of tokens of a volume."""
        return math.prod(self.grid_size)

    def forward(self, volume: Tensor) -> Tensor:
        """Map whole volumes ``(B, in_chans, *img_size)`` to features ``(B, C, D/P, H/P, W/P)``.

        Raises:
            ValueError: when the volume has another shape.
        """
        self.check_volume(volume)
        return self.encode(self.embed(volume))

    def forward_with_skips(self, volume: Tensor) -> tuple[Tensor, ...]:
        """As :meth:`forward`, and before the features the output of every stem stage, for decoders.

        Finest first, ``(B, stem_base_dim · 2^i, D/2^(i+1), …)`` each.
        """
        *intermediates, features = self.forward_intermediates(volume)
        return (*intermediates[: len(self.stem.stages)], features)

    def forward_intermediates(self, volume: Tensor) -> tuple[Tensor, ...]:
        """As :meth:`forward_with_skips`, and before the features what comes out of the Swin blocks on the way.

        After a third of the blocks and after two thirds, ``(B, C, D/P, H/P, W/P)`` each.
        """
        self.check_volume(volume)
        tokens, skips = maybe_checkpointed(self.stem.forward_with_skips, volume, self.activation_checkpointing)
        depth = len(self.swin.blocks)
        depths = sorted({depth // 3, 2 * depth // 3, depth} - {0})
        return (*skips, *self.swin.hidden_states(tokens + self.positions, depths))

    def embed(self, volume: Tensor) -> Tensor:
        """Run the stem on whole volumes or single patches: ``(B, in_chans, D, H, W)`` to ``(B, C, D/P, H/P, W/P)``."""
        return maybe_checkpointed(self.stem, volume, self.activation_checkpointing)

    def encode(self, tokens: Tensor) -> Tensor:
        """Add positions and run the Swin blocks: tokens ``(B, C, D/P, H/P, W/P)`` to features of the same shape."""
        return self.swin(tokens + self.positions)

    def __prepare_scriptable__(self) -> nn.Module:
        return recorded(self, (self.in_chans, *self.img_size))

    def check_volume(self, volume: Tensor) -> None:
        """Raise a ValueError when a volume's shape is not the one this encoder was built for."""
        expected = (self.in_chans, *self.img_size)
        if tuple(volume.shape[1:]) != expected:
            raise ValueError(
                f"volume has shape {tuple(volume.shape)} but this network takes (B, C, D, H, W) = "
                f"{('B', *expected)}: crop or pad it, or slide a window of {self.img_size} over it"
            )


def recorded(network: nn.Module, shape: Sequence[int]) -> nn.Module:
    """Trace a network: what ``torch.jit.script`` then takes in its place, as it cannot read patterns of einops.

    Every shape follows from the network's arguments but the batch's size, so nothing is lost.

    Args:
        network: to trace.
        shape: of one volume, ``(in_chans, D, H, W)``.
    """
    weight = next(network.parameters())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # comparisons of shapes, which are fixed
        traced = torch.jit.trace(network, weight.new_zeros(1, *shape), check_trace=False)
    return nn.Sequential(traced)  # torch does not script what is a script already


def sincos_positions(grid_size: Sequence[int], embed_dim: int) -> Tensor:
    """Fixed sine-cosine positions of a grid of tokens, ``(1, C, D/P, H/P, W/P)``.

    C/3 channels an axis, in the order D, H, W, sines first; MONAI's builder has the first two axes the other way round.
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


def _grid_size(img_size: Sequence[int], patch_size: int, window_size: Sequence[int]) -> tuple[int, ...]:
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
    return grid_size


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


def _triple(name: str, values: Sequence[int] | int) -> tuple[int, int, int]:
    values = ensure_tuple(values)
    if len(values) not in (1, 3) or not all(isinstance(value, int) for value in values):
        example = (values[0] if isinstance(values[0], int) else 7,) * 3
        raise Mistake(f"{name} {values} must be one whole number, or three for D, H and W, for example {example}")
    return values * (3 // len(values))


def _single(name: str, values: Sequence[int] | int) -> int:
    values = ensure_tuple(values)
    if len(values) != 1 or not isinstance(values[0], int) or values[0] < 1:
        example = next((value for value in values if isinstance(value, int) and value >= 1), 12)
        raise Mistake(
            f"{name} {list(values)} must hold exactly one positive number, since the encoder works at one constant "
            f"resolution, for example [{example}]"
        )
    return values[0]
