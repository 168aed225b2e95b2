"""An encoder under a linear head: a class or a number of a whole volume."""

import math

import torch
from torch import Tensor, nn

from .encoder import recorded

__all__ = ["AttentionPooling", "ClassificationNetwork"]


class AttentionPooling(nn.Module):
    """Weigh tokens by a learned query's attention, ``(B, N, C)`` to ``(B, C)``, with up to 8 heads."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim)
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
        self.attention = nn.MultiheadAttention(embed_dim, math.gcd(embed_dim, 8), batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """Pool tokens ``(B, N, C)``."""
        tokens = self.norm(tokens)
        query = self.query.expand(tokens.shape[0], -1, -1)
        return self.attention(query, tokens, tokens, need_weights=False)[0].squeeze(1)


class ClassificationNetwork(nn.Module):
    """Encoder, pooling of its tokens, layer norm and a linear map.

    Args:
        encoder: has ``img_size``, ``in_chans`` and ``embed_dim``, C; maps ``(B, in_chans, *img_size)`` to features
            ``(B, C, D/P, H/P, W/P)``.
        out_channels: K, classes, or 1 for a number.
        pooling: ``mean`` of the tokens, or ``attention``: :class:`AttentionPooling`.
        mean, deviation: of the numbers to predict, so that the head learns standardised ones and the output is in their
            unit. Both are kept with the weights.
    """

    def __init__(
        self, encoder: nn.Module, out_channels: int, pooling: str = "mean", mean: float = 0.0, deviation: float = 1.0
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.settings = getattr(encoder, "settings", {}) | {"pooling": pooling}
        self.pooling = AttentionPooling(encoder.embed_dim) if pooling == "attention" else None
        self.norm = nn.LayerNorm(encoder.embed_dim)
        self.head = nn.Linear(encoder.embed_dim, out_channels)
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("deviation", torch.tensor(deviation))

    def forward(self, volume: Tensor) -> Tensor:
        """Map ``(B, in_chans, *img_size)`` to logits, or to a number in its unit, ``(B, K)``."""
        return self.head(self.embed(volume)).float() * self.deviation + self.mean

    def embed(self, volume: Tensor) -> Tensor:
        """Map ``(B, in_chans, *img_size)`` to what the head reads, ``(B, C)``."""
        tokens = self.encoder(volume).flatten(2).mT  # (B, N, C)
        return self.norm(tokens.mean(dim=1) if self.pooling is None else self.pooling(tokens))

    def __prepare_scriptable__(self) -> nn.Module:
        return recorded(self, (self.encoder.in_chans, *self.encoder.img_size))
