"""The masked auto-encoder: visible patches in, the whole volume out."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..devices import send
from ..mistakes import Mistake
from .encoder import BertsWinEncoder, initialise_weights
from .patches import random_masking, unpatchify
from .swin import maybe_checkpointed

__all__ = ["BertsWinMAE", "ConvDecoder", "bertswin_mae_base_patch16_224", "bertswin_mae_small_patch8_48x64x48"]

# Of the decoder's three stages, by patch size, which is their product.
UPSAMPLING_STRIDES = {2: (2, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (4, 2, 2), 32: (4, 4, 2), 64: (4, 4, 4)}


class ConvDecoder(nn.Module):
    """Light decoder: a linear layer and three up-sampling convolutions turn the grid of tokens back into voxels.

    Takes arguments of :class:`BertsWinMAE`; ``out_channels`` are its ``in_chans``.
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
        self.patch_size, self.activation_checkpointing = patch_size, activation_checkpointing
        first, second, third = UPSAMPLING_STRIDES[patch_size]
        self.embed = nn.Linear(encoder_embed_dim, decoder_embed_dim)
        self.head = nn.Sequential(
            _upsampling(decoder_embed_dim, 64, first),
            nn.GroupNorm(8, 64),
            nn.GELU(),
            _upsampling(64, 16, second),
            nn.GroupNorm(4, 16),
            nn.GELU(),
            _upsampling(16, out_channels, third),
        )
        self.apply(initialise_weights)

    def forward(self, features: Tensor, as_patches: bool = False) -> Tensor:
        """Map features ``(B, C, D/P, H/P, W/P)`` to a volume ``(B, out_channels, D, H, W)``, or to its patches."""
        patches = self.reconstruct_patches(features)
        return patches if as_patches else unpatchify(patches, self.patch_size, features.shape[2:])

    def reconstruct_patches(self, features: Tensor) -> Tensor:
        """Map features ``(B, C, D/P, H/P, W/P)`` to patches ``(B, N, P³ · out_channels)``."""
        hidden = self.embed(rearrange(features, "b c d h w -> b (d h w) c")).mT
        for layers in (self.head[:3], self.head[3:]):  # checkpointed one by one: only one holds its activations
            hidden = maybe_checkpointed(partial(_upsample, layers), hidden, self.activation_checkpointing)
        strides = enumerate(UPSAMPLING_STRIDES[self.patch_size], start=1)
        return rearrange(
            hidden,
            "b c (d3 h3 w3 d2 h2 w2 d1 h1 w1 n) -> b n (d1 d2 d3 h1 h2 h3 w1 w2 w3 c)",
            **{f"{axis}{stage}": stride for stage, stride in strides for axis in "dhw"},
        )


def _upsampling(c_in: int, c_out: int, stride: int) -> nn.Module:
    if stride == 1:
        return nn.Conv3d(c_in, c_out, kernel_size=1)
    return nn.ConvTranspose3d(c_in, c_out, kernel_size=stride, stride=stride)


def _upsample(layers: nn.Sequential, hidden: Tensor) -> Tensor:
    """Apply layers of the decoder's head with its convolutions as matrix products.

    Kernels as large as their strides do not overlap, so that each place is unfolded by itself. On CPUs without bfloat16
    instructions, convolutions took 1.4 to 1.95 times as long; with them, up to 1.08 times the step.

    From ``(B, channels, M)``, M places in any order, to ``(B, channels, k³ · M)``, the kernel's place varying slowest.
    """
    for layer in layers:
        if not isinstance(layer, nn.Conv3d | nn.ConvTranspose3d):
            hidden = layer(hidden)
            continue
        weight = layer.weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose3d) else layer.weight
        weight = rearrange(weight, "c_out c_in p q r -> (c_out p q r) c_in")
        bias = layer.bias.repeat_interleave(len(weight) // layer.out_channels)
        hidden = torch.baddbmm(bias[:, None], weight.expand(len(hidden), -1, -1), hidden)
        hidden = rearrange(hidden, "b (c k) m -> b c (k m)", c=layer.out_channels)
    return hidden


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
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            encoder_embed_dim=encoder_embed_dim,
            encoder_depths=encoder_depths,
            encoder_num_heads=encoder_num_heads,
            swin_window_size=swin_window_size,
            stem_base_dim=stem_base_dim,
            strict_stem=strict_stem,
            blockwise_norm=blockwise_norm,
            activation_checkpointing=activation_checkpointing,
        )
        self.decoder = ConvDecoder(encoder_embed_dim, decoder_embed_dim, patch_size, in_chans, activation_checkpointing)
        self.mask_token = nn.Parameter(torch.empty(1, 1, encoder_embed_dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.settings = {**self.encoder.settings, "decoder_embed_dim": decoder_embed_dim}

    def forward(
        self, volume: Tensor, valid_for_masking_mask: Tensor | None = None, masked: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Hide patches and rebuild the volume.

        Args:
            volume: ``(B, C, D, H, W)``.
            valid_for_masking_mask: ``(B, N)`` bool, False = outside the field of view: shown to the encoder as a
                mask token and left out of ``mae_mask_1d``, so that it never enters the loss. Default: all valid.
            masked: ``(B, N)`` bool, True = hidden: fixes the mask. Default: drawn at random, ``mask_ratio`` of the
                valid patches. Masks on the CPU spare a GPU the wait for how many patches there are.

        Returns:
            ``reconstructed_cube`` ``(B, C, D, H, W)``, ``reconstructed_patches`` ``(B, N, P³·C)``,
            ``mae_mask_1d`` ``(B, N)`` float, 1 = a valid patch that was hidden: the ones the loss looks at; and
            ``valid_for_masking_mask`` ``(B, N)`` bool as it was given.

        Raises:
            ValueError: when an argument has another shape or type.
        """
        self.encoder.check_volume(volume)
        valid = self._patch_mask("valid_for_masking_mask", valid_for_masking_mask, volume)
        if masked is None:
            masked = random_masking(valid, self.mask_ratio)
        else:
            masked = self._patch_mask("masked", masked, volume)
        tokens = self.embed_visible(volume, valid & ~masked)
        valid, masked = (send(mask, volume.device) for mask in (valid, masked))
        features = self.encoder.encode(tokens)  # the whole grid, mask tokens included
        patches = self.decoder(features, as_patches=True)
        return {
            "reconstructed_cube": unpatchify(patches, self.encoder.patch_size, self.encoder.grid_size),
            "reconstructed_patches": patches,
            "mae_mask_1d": (valid & masked).float(),
            "valid_for_masking_mask": valid,
        }

    def embed_visible(self, volume: Tensor, visible: Tensor) -> Tensor:
        """Run the stem on each visible patch alone, and put a mask token everywhere else.

        From ``(B, C, D, H, W)`` and ``visible`` ``(B, N)`` bool to tokens ``(B, encoder_embed_dim, D/P, H/P, W/P)``.
        """
        p = self.encoder.patch_size
        patches = rearrange(volume, "b c (d p) (h q) (w r) -> (b d h w) c p q r", p=p, q=p, r=p)
        places = visible.flatten().nonzero().flatten()
        places = send(places, volume.device)
        # Patches go through alone: an overlapping kernel would see hidden voxels.
        embedded = self.encoder.embed(patches.index_select(0, places)).flatten(1)
        tokens = self.mask_token.flatten(1).repeat(visible.numel(), 1)
        tokens = tokens.index_copy(0, places, embedded.to(tokens.dtype))
        d, h, w = self.encoder.grid_size
        return rearrange(tokens, "(b d h w) c -> b c d h w", d=d, h=h, w=w)

    def extract_features(self, volume: Tensor, valid_mask: Tensor | None = None) -> Tensor:
        """Encode with the stem on isolated patches, as in pre-training, nothing hidden (patch mode).

        From ``(B, C, D, H, W)`` to ``(B, encoder_embed_dim, D/P, H/P, W/P)``. Where ``valid_mask`` ``(B, N)`` is False,
        a mask token replaces a patch outside the field of view.
        """
        self.encoder.check_volume(volume)
        valid = self._patch_mask("valid_mask", valid_mask, volume)
        return self.encoder.encode(self.embed_visible(volume, valid))

    def extract_volumetric_features(
        self, volume: Tensor, return_skips: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Encode with the stem on the whole volume (volumetric mode): what ``encoder(volume)`` returns.

        From ``(B, C, D, H, W)`` to ``(B, encoder_embed_dim, D/P, H/P, W/P)``; with ``return_skips`` also to a list of
        the stem stages' outputs, finest first.
        """
        *skips, features = self.encoder.forward_with_skips(volume)
        return (features, skips) if return_skips else features

    def extract_tokens(self, volume: Tensor, return_skips: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Run the stem alone on the whole volume, arguments as before: ``(B, N, encoder_embed_dim)``, or with skips."""
        self.encoder.check_volume(volume)
        tokens, skips = self.encoder.stem.forward_with_skips(volume)
        tokens = rearrange(tokens, "b c d h w -> b (d h w) c")
        return (tokens, skips) if return_skips else tokens

    def _patch_mask(self, name: str, mask: Tensor | None, volume: Tensor) -> Tensor:
        """Check a ``(B, N)`` mask, all True where none was given, and bring it to the CPU: it makes shapes."""
        expected = (volume.shape[0], self.encoder.num_patches)
        if mask is None:
            return torch.ones(expected, dtype=torch.bool)
        if tuple(mask.shape) != expected or mask.dtype != torch.bool:
            raise ValueError(
                f"{name} has shape {tuple(mask.shape)} and type {mask.dtype} but must be (B, N) = {expected} "
                f"and torch.bool, one entry a patch"
            )
        return mask.cpu()


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
