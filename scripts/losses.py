"""Reconstruction losses that look at hidden patches only."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["MaskedL2Loss"]


class MaskedL2Loss(nn.Module):
    """Mean squared error over the voxels of hidden patches (paper, masked pre-training with AdamW)."""

    def forward(self, prediction: dict[str, Tensor], target: Tensor) -> Tensor:
        """Score a reconstruction, in float32 also under autocast.

        Args:
            prediction: the network's output, of which ``reconstructed_patches`` ``(B, N, P³·C)`` is scored where
                ``mae_mask_1d`` ``(B, N)`` is 1.
            target: ``(B, N, P³·C)``, the original volume cut the same way.

        Returns:
            A scalar; 0 when no patch is hidden.
        """
        hidden = prediction["mae_mask_1d"]
        per_patch = (prediction["reconstructed_patches"].float() - target.float()).square().mean(dim=-1)
        return (per_patch * hidden).sum() / hidden.sum().clamp(min=1)
