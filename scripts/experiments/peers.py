"""MONAI's networks behind the interfaces of this bundle's own, to compare with."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from monai.networks.nets import MaskedAutoEncoderViT
from torch import Tensor, nn

from ..mistakes import Mistake
from ..networks import random_masking, unpatchify
from ..weights import fill, read_weights

__all__ = ["StandardisedNetwork", "ViTEncoder", "ViTMAE", "load_vit_encoder"]


class ViTMAE(MaskedAutoEncoderViT):
    """MONAI's :class:`~monai.networks.nets.MaskedAutoEncoderViT`, trained by the same loop with the same masks.

    Network, weights and their names are MONAI's; here it takes a mask from outside, gives back what the losses and the
    figures look at, and runs under autocast. The arguments are those of :class:`~bertswin_mae.networks.BertsWinMAE`,
    for transformer blocks in the encoder and in the decoder, which has as many heads.

    Raises:
        Mistake: for a width that is no multiple of 6 and of the heads.
    """

    def __init__(
        self,
        img_size: Sequence[int],
        patch_size: int = 16,
        in_chans: int = 1,
        encoder_embed_dim: int = 768,
        encoder_depth: int = 12,
        encoder_num_heads: int = 12,
        decoder_embed_dim: int = 384,
        decoder_depth: int = 4,
        mask_ratio: float = 0.75,
    ) -> None:
        for name, width in (("encoder_embed_dim", encoder_embed_dim), ("decoder_embed_dim", decoder_embed_dim)):
            if width % 6 or width % encoder_num_heads:
                raise Mistake(f"{name} {width} must be a multiple of 6 and of the {encoder_num_heads} heads")
        super().__init__(
            in_chans,
            img_size,
            patch_size,
            hidden_size=encoder_embed_dim,
            mlp_dim=4 * encoder_embed_dim,
            num_layers=encoder_depth,
            num_heads=encoder_num_heads,
            masking_ratio=mask_ratio,
            decoder_hidden_size=decoder_embed_dim,
            decoder_mlp_dim=4 * decoder_embed_dim,
            decoder_num_layers=decoder_depth,
            decoder_num_heads=encoder_num_heads,
            qkv_bias=True,
        )
        # MONAI puts these into a float32 tensor, which fails under autocast.
        self.decoder_embed.register_forward_hook(lambda module, inputs, output: output.float())

    def forward(
        self, volume: Tensor, valid_for_masking_mask: Tensor | None = None, masked: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Hide patches and rebuild the volume.

        Arguments and outputs are those of :class:`~bertswin_mae.networks.BertsWinMAE`; as many patches are hidden in
        each volume.

        Raises:
            Mistake: for patches outside the field of view, for which this network has no place.
        """
        if valid_for_masking_mask is not None:
            raise Mistake("MONAI's ViT-MAE hides any patch: choose --field_of_view none")
        valid = torch.ones(len(volume), self.patch_embedding.n_patches, dtype=torch.bool, device=volume.device)
        if masked is None:
            masked = random_masking(valid, self.masking_ratio)
        # MONAI's forward hands on what it gets to `_masking`.
        patches, hidden = super().forward(volume, masking_ratio=masked)
        patch_size = self.patch_size[0]
        return {
            "reconstructed_cube": unpatchify(patches, patch_size, [side // patch_size for side in self.img_size]),
            "reconstructed_patches": patches,
            "mae_mask_1d": hidden.to(volume.device).float(),
            "valid_for_masking_mask": valid,
        }

    def _masking(self, x: Tensor, masking_ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take the visible tokens, by a mask ``(B, N)`` in place of MONAI's ratio."""
        masked = masking_ratio
        visible = (~masked).nonzero()[:, 1].unflatten(0, (len(x), -1))
        return x[torch.arange(len(x)).unsqueeze(1), visible], visible, masked


class ViTEncoder(nn.Module):
    """The encoder of :class:`ViTMAE`, whose arguments these are, as a feature extractor with skips."""

    def __init__(
        self,
        img_size: Sequence[int],
        patch_size: int,
        in_chans: int,
        encoder_embed_dim: int,
        encoder_depth: int,
        encoder_num_heads: int,
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size, self.in_chans = tuple(img_size), patch_size, in_chans
        width, heads = encoder_embed_dim, encoder_num_heads
        network = ViTMAE(img_size, patch_size, in_chans, width, encoder_depth, heads, 6 * heads)
        self.cls_token, self.patch_embedding, self.blocks = network.cls_token, network.patch_embedding, network.blocks

    def forward(self, volume: Tensor) -> Tensor:
        """Map ``(B, in_chans, *img_size)`` to ``(B, C, D/P, H/P, W/P)``."""
        return self.forward_intermediates(volume)[-1]

    def forward_intermediates(self, volume: Tensor) -> tuple[Tensor, ...]:
        """Return log2(P) - 1 hidden states at even distances, shallowest first, as UNETR takes, then the features."""
        tokens = self.patch_embedding(volume)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        *blocks, norm = self.blocks
        states = [tokens := block(tokens) for block in blocks]
        levels = self.patch_size.bit_length() - 1
        chosen = [states[len(states) * level // levels] for level in range(1, levels)]
        d, h, w = (side // self.patch_size for side in self.img_size)
        on_grid = partial(rearrange, pattern="b (d h w) c -> b c d h w", d=d, h=h, w=w)
        return tuple(on_grid(state[:, 1:]) for state in (*chosen, norm(tokens)))


def load_vit_encoder(encoder: ViTEncoder, pretrained: str | Path | None, required: bool = True) -> ViTEncoder:
    """Fill an encoder from ``model.pt`` of a pre-training of :class:`ViTMAE`.

    Raises:
        Mistake: when it does not fit, or there is none although it is required.
    """
    if pretrained is None and not required:
        return encoder  # as it was initialised
    if pretrained is None:
        raise Mistake("give --pretrained, the model.pt of a pre-training with peers/vit_mae.yaml")
    parts = ("cls_token", "patch_embedding.", "blocks.")
    weights = {name: value for name, value in read_weights(pretrained).items() if name.startswith(parts)}
    return fill(encoder, weights, pretrained)


class StandardisedNetwork(nn.Module):
    """Any network behind the output of :class:`~bertswin_mae.networks.ClassificationNetwork`: numbers in their unit.

    Args:
        network: maps volumes to ``(B, K)``.
        mean, deviation: of the numbers to predict.
    """

    def __init__(self, network: nn.Module, mean: float, deviation: float) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("deviation", torch.tensor(deviation))

    def forward(self, volume: Tensor) -> Tensor:
        """Map ``(B, in_chans, D, H, W)`` to logits, or to a number in its unit, ``(B, K)``."""
        return self.network(volume).float() * self.deviation + self.mean
