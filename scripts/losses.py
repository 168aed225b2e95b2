"""Reconstruction losses that look at hidden patches only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor, nn

__all__ = ["MaskedL2Loss", "MaskedLoss", "StructuralLoss"]


class MaskedLoss(nn.Module, ABC):
    """A loss over hidden patches, in float32 also under autocast, that reports what it is made of.

    Subclasses say what their components are; the loss is the weighted sum. After a call, ``last_components`` holds
    the unweighted components, detached.

    Args:
        weights: of the components, by name.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.weights = dict(weights)
        self.last_components: dict[str, Tensor] = {}

    def forward(self, prediction: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """Score a reconstruction.

        Args:
            prediction: the network's output, of which ``reconstructed_patches`` ``(B, N, P³·C)`` is scored where
                ``mae_mask_1d`` ``(B, N)`` is 1.
            target: ``(B, N, P³·C)``, the original volume cut the same way.

        Returns:
            A scalar; 0 when no patch is hidden.
        """
        with torch.autocast(target.device.type, enabled=False):
            parts = self.components(
                prediction["reconstructed_patches"].float(), target.float(), prediction["mae_mask_1d"].float()
            )
        self.last_components = {name: part.detach() for name, part in parts.items()}
        return torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()

    @abstractmethod
    def components(self, prediction: Tensor, target: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        """Return the unweighted components, scalars, of patches ``(B, N, P³·C)`` where ``hidden`` ``(B, N)`` is 1."""


class MaskedL2Loss(MaskedLoss):
    """Mean squared error over the voxels of hidden patches (paper, masked pre-training with AdamW).

    Args:
        normalise_target: standardise each target patch by its own mean and deviation first (He et al. 2022).
        epsilon: added to the variance then, on the network's scale, so that flat patches stay finite.
    """

    def __init__(self, normalise_target: bool = False, epsilon: float = 1e-6) -> None:
        super().__init__({"l2": 1.0})
        self.normalise_target, self.epsilon = normalise_target, epsilon

    def components(self, prediction: Tensor, target: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        """Return ``l2``."""
        if self.normalise_target:
            variance, mean = torch.var_mean(target, dim=-1, correction=0, keepdim=True)
            target = (target - mean) * (variance + self.epsilon).rsqrt()
        return {"l2": _mean_over((prediction - target).square().mean(dim=-1), hidden)}


class StructuralLoss(MaskedLoss):
    """Brightness, contrast and structure of hidden patches, balanced (paper, component-balanced loss "LCS").

    Patches are cut into sub-patches. Of each, and for each channel, three things are compared by their mean squared
    error: its mean (brightness), its standard deviation (contrast) and its standardised voxels (structure).

    On a flat sub-patch (air, padding) the standardised voxels are amplified noise, by one over the deviation. The
    public reference divides by the deviation plus 1e-8, and its gradient explodes there. Here the deviation is
    ``sqrt(variance + epsilon²)``: the amplification is at most 1/epsilon, and sub-patches whose deviation is well above
    epsilon are as they were.

    Args:
        patch_size: P, in voxels.
        in_chans: image channels.
        sub_patch_size: side of a sub-patch in voxels; divides P.
        weights: of ``brightness``, ``contrast`` and ``structure``.
        epsilon: on the network's scale. The default is about 6 HU, below the noise of any CT, or half a percent of the
            MR window.

    Raises:
        ValueError: when the sub-patches do not fill a patch.
    """

    def __init__(
        self,
        patch_size: int,
        in_chans: int = 1,
        sub_patch_size: int = 8,
        weights: Mapping[str, float] | None = None,
        epsilon: float = 0.01,
    ) -> None:
        super().__init__(weights or {"brightness": 0.3, "contrast": 0.2, "structure": 0.5})
        if sub_patch_size < 1 or patch_size % sub_patch_size:
            raise ValueError(
                f"sub_patch_size {sub_patch_size} must divide patch_size {patch_size}, for example "
                f"{max(size for size in range(1, patch_size + 1) if patch_size % size == 0 and size <= 8)}"
            )
        self.patch_size, self.in_chans, self.sub_patch_size, self.epsilon = (
            patch_size,
            in_chans,
            sub_patch_size,
            epsilon,
        )

    def components(self, prediction: Tensor, target: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        """Return ``brightness``, ``contrast`` and ``structure``."""
        means, deviations, voxels = zip(*(self._describe(patches) for patches in (prediction, target)), strict=True)
        errors = {
            "brightness": (means[0] - means[1]).square(),
            "contrast": (deviations[0] - deviations[1]).square(),
            "structure": (voxels[0] - voxels[1]).square().mean(dim=-1, keepdim=True),
        }
        return {name: _mean_over(error.flatten(2).mean(dim=-1), hidden) for name, error in errors.items()}

    def _describe(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return means and deviations ``(B, N, S, 1)`` and standardised voxels ``(B, N, S, V)`` of the sub-patches."""
        parts, side = self.patch_size // self.sub_patch_size, self.sub_patch_size
        voxels = rearrange(
            patches,
            "b n (dp p hp q wp r c) -> b n (dp hp wp c) (p q r)",
            dp=parts, hp=parts, wp=parts, p=side, q=side, r=side, c=self.in_chans,
        )  # fmt: skip
        variance, mean = torch.var_mean(voxels, dim=-1, correction=0, keepdim=True)
        deviation = (variance + self.epsilon**2).sqrt()
        return mean, deviation, (voxels - mean) / deviation


def _mean_over(per_patch: Tensor, chosen: Tensor) -> Tensor:
    """Average over the patches where ``chosen`` is 1; 0 where there are none."""
    return (per_patch * chosen).sum() / chosen.sum().clamp(min=1)
