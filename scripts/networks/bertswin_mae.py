"""The masked auto-encoder: visible patches in, the whole volume out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..mistakes import Mistake
from .encoder import BertsWinEncoder, initialise_weights
from .patches import random_masking, unpatchify
from .swin import maybe_checkpointed

__all__ = ["BertsWinMAE", "ConvDecoder", "bertswin_mae_base_patch16_224", "bertswin_mae_small_patch8_48x64x48"]

# Strides of the three up-sampling stages; the product is the patch size.
UPSAMPLING = {2: (2, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (4, 2, 2), 32: (4, 4, 2), 64: (4, 4, 4)}


class ConvDecoder(nn.Module):
    """Light decoder: a linear layer and three up-sampling convolutions turn the grid of tokens back into voxels.

    No kernel reaches over the border of what it unfolds, so the convolutions are products of matrices, and only the
    last voxels need to be put in their places. (That also keeps the channels first for the group norms, which PyTorch
    computes a thousand times less exactly with the channels last, in float32 on the CPU.)

    Args:
        encoder_embed_dim: width of the tokens.
        decoder_embed_dim: width of the first up-sampling stage's input.
        patch_size: P, voxels a token stands for along each axis.
        out_channels: image channels.
        activation_checkpointing: in training, compute activations again on the way back instead of keeping them.
    """

    def __init__(
        self,
        encoder_embed_dim: int,
        decoder_embed_dim: int,
        patch_size: int,
        out_channels: int,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.activation_checkpointing, self.patch_size = activation_checkpointing, patch_size
        first, second, third = UPSAMPLING[patch_size]
        self.embed = nn.Linear(encoder_embed_dim, decoder_embed_dim)
        self.head = nn.Sequential(
            _upsample(decoder_embed_dim, 64, first),
            nn.GroupNorm(8, 64),
            nn.GELU(),
            _upsample(64, 16, second),
            nn.GroupNorm(4, 16),
            nn.GELU(),
            _upsample(16, out_channels, third),
        )
        self.apply(initialise_weights)
        order = _order_in_patch(out_channels, first, second, third)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("inverse_order", order.argsort(), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map features ``(B, C, D/P, H/P, W/P)`` to a volume ``(B, out_channels, D, H, W)``."""
        return unpatchify(self.rebuild_patches(features), self.patch_size, features.shape[2:])

    def rebuild_patches(self, features: Tensor) -> Tensor:
        """Map features ``(B, C, D/P, H/P, W/P)`` to patches ``(B, N, P³ · out_channels)``."""
        hidden = self.embed(rearrange(features, "b c d h w -> b (d h w) c")).mT
        for part in (self.head[:3], self.head[3:]):  # in two, so that only one holds its activations at a time
            hidden = maybe_checkpointed(partial(_unfold, part), hidden, self.activation_checkpointing)
        voxels = hidden.unflatten(2, (-1, features.shape[2:].numel())).flatten(1, 2)
        return _VoxelsInPlace.apply(voxels, self.order, self.inverse_order)


class BertsWinMAE(nn.Module):
    """BertsWin, a 3D masked auto-encoder (paper: arXiv 2512.21769).

    Each visible patch goes through the CNN stem alone, a learned mask token stands in every hidden place, the Swin
    encoder sees the whole grid at one constant resolution, and a light CNN decoder rebuilds the volume.

    Args:
        img_size: volume size in voxels, D, H, W (or one number for a cube); a multiple of ``patch_size``.
        patch_size: P, a power of two from 2 to 64, in voxels.
        in_chans: image channels.
        encoder_embed_dim: token width C; a multiple of 6 and of the heads.
        encoder_depths: ``[depth]``, the number of Swin blocks.
        encoder_num_heads: ``[heads]``.
        swin_window_size: attention window in tokens, D, H, W; no larger than the grid.
        decoder_embed_dim: width at which the decoder starts.
        stem_base_dim: width of the stem's first stage; a multiple of 4.
        mask_ratio: share of the valid patches to hide, in [0, 1).
        strict_stem: non-overlapping stem kernels.
        blockwise_norm: with a strict stem, normalise each patch by itself also in whole volumes, so that patch mode
            and volumetric mode are one function.
        activation_checkpointing: in training, compute activations again on the way back instead of keeping them: less
            memory for more time.

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
        decoder_embed_dim: int = 512,
        stem_base_dim: int = 48,
        mask_ratio: float = 0.75,
        strict_stem: bool = False,
        blockwise_norm: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= mask_ratio < 1:
            raise Mistake(f"mask_ratio {mask_ratio} must lie in [0, 1), for example 0.75")
        if decoder_embed_dim < 1:
            raise Mistake(f"decoder_embed_dim {decoder_embed_dim} must be positive, for example 512")
        self.mask_ratio = mask_ratio
        self.encoder = BertsWinEncoder(
            img_size,
            patch_size,
            in_chans,
            encoder_embed_dim,
            encoder_depths,
            encoder_num_heads,
            swin_window_size,
            stem_base_dim,
            strict_stem,
            blockwise_norm,
            activation_checkpointing,
        )
        self.decoder = ConvDecoder(encoder_embed_dim, decoder_embed_dim, patch_size, in_chans, activation_checkpointing)
        self.mask_token = nn.Parameter(torch.empty(1, 1, encoder_embed_dim))
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self, volume: Tensor, valid_for_masking_mask: Tensor | None = None, masked: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Hide patches and rebuild the volume.

        Args:
            volume: ``(B, C, D, H, W)``.
            valid_for_masking_mask: ``(B, N)`` bool, False = outside the field of view: shown to the encoder as a
                mask token and left out of ``mae_mask_1d``, so that it never enters the loss. Default: all valid.
            masked: ``(B, N)`` bool, True = hidden: fixes the mask. Default: drawn at random, ``mask_ratio`` of the
                valid patches.

        Returns:
            ``reconstructed_cube`` ``(B, C, D, H, W)``, ``reconstructed_patches`` ``(B, N, P³·C)``,
            ``mae_mask_1d`` ``(B, N)`` float, 1 = a valid patch that was hidden: the ones the loss looks at; and
            ``valid_for_masking_mask`` ``(B, N)`` bool as it was given.

        Raises:
            Mistake: when an argument has another shape or type.
        """
        self.encoder.check_volume(volume)
        valid = self._patch_mask("valid_for_masking_mask", valid_for_masking_mask, volume)
        if masked is None:
            masked = random_masking(valid, self.mask_ratio)
        else:
            masked = self._patch_mask("masked", masked, volume)
        tokens = self.embed_visible(volume, valid & ~masked)
        patches = self.decoder.rebuild_patches(self.encoder.attend(tokens))
        return {
            "reconstructed_cube": unpatchify(patches, self.encoder.patch_size, self.encoder.grid_size),
            "reconstructed_patches": patches,
            "mae_mask_1d": (valid & masked).float(),
            "valid_for_masking_mask": valid,
        }

    def embed_visible(self, volume: Tensor, visible: Tensor) -> Tensor:
        """Run the stem on each visible patch alone and put a mask token everywhere else.

        Args:
            volume: ``(B, C, D, H, W)``.
            visible: ``(B, N)`` bool.

        Returns:
            ``(B, encoder_embed_dim, D/P, H/P, W/P)``.
        """
        p = self.encoder.patch_size
        patches = rearrange(volume, "b c (d p) (h q) (w r) -> b (d h w) c p q r", p=p, q=p, r=p)
        # Patches go through alone: an overlapping kernel would see hidden voxels.
        embedded = self.encoder.read(patches[visible]).flatten(1)
        tokens = self.mask_token.repeat(*visible.shape, 1)
        tokens[visible] = embedded.to(tokens.dtype)
        d, h, w = self.encoder.grid_size
        return rearrange(tokens, "b (d h w) c -> b c d h w", d=d, h=h, w=w)

    def extract_features(self, volume: Tensor, valid_mask: Tensor | None = None) -> Tensor:
        """Encode with the stem on isolated patches, as in pre-training, nothing hidden (patch mode).

        Args:
            volume: ``(B, C, D, H, W)``.
            valid_mask: ``(B, N)`` bool, False = outside the field of view: replaced by a mask token.

        Returns:
            ``(B, encoder_embed_dim, D/P, H/P, W/P)``.
        """
        self.encoder.check_volume(volume)
        return self.encoder.attend(self.embed_visible(volume, self._patch_mask("valid_mask", valid_mask, volume)))

    def extract_volumetric_features(
        self, volume: Tensor, return_skips: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Encode with the stem on the whole volume (volumetric mode): what ``encoder(volume)`` returns.

        Args:
            volume: ``(B, C, D, H, W)``.
            return_skips: also return the output of every stem stage, finest first.

        Returns:
            ``(B, encoder_embed_dim, D/P, H/P, W/P)``, or that and the list of skips.
        """
        *skips, features = self.encoder.forward_with_skips(volume)
        return (features, skips) if return_skips else features

    def extract_tokens(self, volume: Tensor, return_skips: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Run the stem alone on the whole volume, before positions and attention.

        Args:
            volume: ``(B, C, D, H, W)``.
            return_skips: also return the output of every stem stage, finest first.

        Returns:
            ``(B, N, encoder_embed_dim)``, or that and the list of skips.
        """
        self.encoder.check_volume(volume)
        tokens, skips = self.encoder.stem.forward_with_skips(volume)
        tokens = rearrange(tokens, "b c d h w -> b (d h w) c")
        return (tokens, skips) if return_skips else tokens

    def _patch_mask(self, name: str, mask: Tensor | None, volume: Tensor) -> Tensor:
        """Check a ``(B, N)`` mask; all True where none was given."""
        expected = (volume.shape[0], self.encoder.num_patches)
        if mask is None:
            return torch.ones(expected, dtype=torch.bool, device=volume.device)
        if tuple(mask.shape) != expected or mask.dtype != torch.bool:
            raise ValueError(
                f"{name} has shape {tuple(mask.shape)} and type {mask.dtype} but must be (B, N) = {expected} "
                f"and torch.bool, one entry a patch"
            )
        return mask.to(volume.device)


def bertswin_mae_base_patch16_224(**overrides: Any) -> BertsWinMAE:
    """Build the paper's network: 224³ voxels, patches of 16³, 12 blocks of width 768, windows of 7³."""
    return BertsWinMAE(**overrides)


def bertswin_mae_small_patch8_48x64x48(**overrides: Any) -> BertsWinMAE:
    """Build the network of ``configs/small.yaml``, which trains on a laptop: 48×64×48 voxels, patches of 8³."""
    small = {
        "img_size": (48, 64, 48),
        "patch_size": 8,
        "encoder_embed_dim": 192,
        "encoder_depths": (6,),
        "encoder_num_heads": (6,),
        "swin_window_size": (3, 4, 3),
        "decoder_embed_dim": 256,
    }
    return BertsWinMAE(**(small | overrides))


def _upsample(c_in: int, c_out: int, stride: int) -> nn.Module:
    if stride == 1:
        return nn.Conv3d(c_in, c_out, kernel_size=1)
    return nn.ConvTranspose3d(c_in, c_out, kernel_size=stride, stride=stride)


def _unfold(layers: nn.Sequential, hidden: Tensor) -> Tensor:
    """Apply layers of the decoder's head to ``(B, channels, M)``: a convolution unfolds each of M places into k³."""
    for layer in layers:
        if isinstance(layer, nn.Conv3d | nn.ConvTranspose3d):
            weight = layer.weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose3d) else layer.weight
            weight = rearrange(weight, "c_out c_in p q r -> (c_out p q r) c_in")
            bias = layer.bias.repeat_interleave(len(weight) // layer.out_channels)
            hidden = torch.baddbmm(bias[:, None], weight.expand(len(hidden), -1, -1), hidden)
            hidden = hidden.unflatten(1, (layer.out_channels, -1)).flatten(2)
        else:
            hidden = layer(hidden)
    return hidden


def _order_in_patch(channels: int, first: int, second: int, third: int) -> Tensor:
    """Tell from which place each value of a patch comes, where the last stage's kernel varies slowest."""
    places = torch.arange(channels * (first * second * third) ** 3)
    return rearrange(
        places,
        "(c p3 q3 r3 p2 q2 r2 p1 q1 r1) -> (p1 p2 p3 q1 q2 q3 r1 r2 r3 c)",
        **dict.fromkeys(("p1", "q1", "r1"), first),
        **dict.fromkeys(("p2", "q2", "r2"), second),
        **dict.fromkeys(("p3", "q3", "r3"), third),
    )


class _VoxelsInPlace(torch.autograd.Function):
    """Turn ``(B, K, N)`` into ``(B, N, K)`` with the K values in another order: rows are gathered, then transposed.

    One volume at a time, since PyTorch transposes matrices fast but not batches of them.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, order: Tensor, inverse_order: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_order)
        return torch.stack([value.index_select(0, order).T.contiguous() for value in values])

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse_order,) = ctx.saved_tensors
        return torch.stack([grad.T.contiguous().index_select(0, inverse_order) for grad in grads]), None, None
