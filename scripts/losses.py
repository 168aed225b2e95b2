"""Reconstruction losses that look at hidden patches only."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["MaskedL2Loss"]


class MaskedL2Loss(nn.Module):
    """Mean squared error over the voxels of hidden patches (paper, masked pre-training with AdamW)."""

    def forward(self, prediction: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
        """Score a reconstruction, in float32 also under autocast.

        Args:
            prediction: ``(B, N, P³·C)``, the network's ``reconstructed_patches``.
            target: ``(B, N, P³·C)``, the original volume cut the same way.
            hidden: ``(B, N)``, 1 = score this patch: the network's ``mae_mask_1d``.

        Returns:
            A scalar; 0 when no patch is hidden.
        """
        per_patch = (prediction.float() - target.float()).square().mean(dim=-1)
        return (per_patch * hidden).sum() / hidden.sum().clamp(min=1)
