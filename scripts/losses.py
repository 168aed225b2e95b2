"""Reconstruction losses that look at hidden patches only."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .mistakes import Mistake
from .networks.patches import patchify, unpatchify

__all__ = ["MaskedL2Loss", "MaskedLoss", "StructuralLoss", "SumOfLosses", "TissueWeightedLoss", "choose_loss"]


class MaskedLoss(nn.Module, ABC):
    """A loss over hidden patches, in float32 also under autocast, that reports what it is made of.

    Subclasses say what their components are; the loss is the weighted sum of their means over hidden patches. After a
    call, ``last_components`` holds these means, unweighted and detached, and ``last_counts`` over how many patches each
    was taken.

    Args:
        weights: of the components, by name.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.weights = dict(weights)
        self.last_components: dict[str, Tensor] = {}
        self.last_counts: dict[str, Tensor] = {}

    def forward(self, prediction: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """Score a reconstruction.

        Args:
            prediction: the network's output, of which ``reconstructed_patches`` ``(B, N, P³·C)`` is scored where
                ``mae_mask_1d`` ``(B, N)`` is 1.
            target: ``(B, N, P³·C)``, the original volume cut the same way.

        Returns:
            A scalar; 0 when no patch is hidden.
        """
        return torch.stack(list(self.tasks(prediction, target).values())).sum()

    def tasks(self, prediction: Mapping[str, Tensor], target: Tensor) -> dict[str, Tensor]:
        """Score a reconstruction by component: the weighted scalars whose sum :meth:`forward` returns."""
        with torch.autocast(target.device.type, enabled=False):
            hidden = prediction["mae_mask_1d"].float()
            errors = self.patch_errors(prediction["reconstructed_patches"].float(), target.float())
            chosen = {name: hidden * group for name, (_, group) in errors.items()}
            self.last_counts = {name: group.sum().detach() for name, group in chosen.items()}
            parts = {
                name: (error * chosen[name]).sum() / self.last_counts[name].clamp(min=1)
                for name, (error, _) in errors.items()
            }
            self.last_components = {name: part.detach() for name, part in parts.items()}
            return {name: self.weights[name] * part for name, part in parts.items()}

    @abstractmethod
    def patch_errors(self, prediction: Tensor, target: Tensor) -> dict[str, tuple[Tensor, Tensor | float]]:
        """Compare patches ``(B, N, P³·C)``.

        Returns:
            For each component the error of every patch ``(B, N)``, and which patches belong to it: ``(B, N)`` of ones
            and zeros, or 1 for all.
        """


class MaskedL2Loss(MaskedLoss):
    """Mean squared error over the voxels of hidden patches (paper, masked pre-training with AdamW).

    Args:
        normalise_target: standardise each target patch by its own mean and deviation first (He et al. 2022).
        epsilon: added to the variance then, on the network's scale, so that flat patches stay finite.
    """

    def __init__(self, normalise_target: bool = False, epsilon: float = 1e-6) -> None:
        super().__init__({"l2": 1.0})
        self.normalise_target, self.epsilon = normalise_target, epsilon

    def patch_errors(self, prediction: Tensor, target: Tensor) -> dict[str, tuple[Tensor, float]]:
        """Return ``l2``."""
        if self.normalise_target:
            mean, deviation = self._statistics(target)
            target = (target - mean) / deviation
        difference = prediction - target
        return {"l2": (torch.linalg.vecdot(difference, difference) / difference.shape[-1], 1.0)}

    def restore(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Put predicted patches ``(B, N, P³·C)`` back on the intensity scale, by the statistics of the target's."""
        if not self.normalise_target:
            return prediction
        mean, deviation = self._statistics(target.float())
        return prediction.float() * deviation + mean

    def _statistics(self, target: Tensor) -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(target, dim=-1, correction=0, keepdim=True)
        return mean, (variance + self.epsilon).sqrt()


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
        Mistake: when the sub-patches do not fill a patch.
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
            raise Mistake(
                f"sub_patch_size {sub_patch_size} must divide patch_size {patch_size}, for example "
                f"{max(size for size in range(1, patch_size + 1) if patch_size % size == 0 and size <= 8)}"
            )
        self.patch_size, self.in_chans, self.sub_patch_size, self.epsilon = (
            patch_size,
            in_chans,
            sub_patch_size,
            epsilon,
        )

    def patch_errors(self, prediction: Tensor, target: Tensor) -> dict[str, tuple[Tensor, float]]:
        """Return ``brightness``, ``contrast`` and ``structure``."""
        means, deviations, voxels = zip(*(self._describe(patches) for patches in (prediction, target)), strict=True)
        errors = {
            "brightness": (means[0] - means[1]).square(),
            "contrast": (deviations[0] - deviations[1]).square(),
            "structure": (voxels[0] - voxels[1]).square().mean(dim=-1, keepdim=True),
        }
        return {name: (error.flatten(2).mean(dim=-1), 1.0) for name, error in errors.items()}

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


class TissueWeightedLoss(MaskedLoss):
    """The structural loss over all hidden patches, over those of soft tissue, and over those on the surface of bone.

    A patch belongs to a group when more than half of its voxels do (paper, tissue-weighted form). Soft tissue is a
    range of Hounsfield units of the target. The surface of bone is a shell: a bone mask dilated, without the same mask
    eroded. The public reference takes that mask from a segmentation; here a threshold makes it. A group that no hidden
    patch belongs to adds nothing.

    Args:
        structural: the loss whose weighted sum is taken of each group.
        img_size: D, H, W, in voxels.
        hu_scale: Hounsfield units one unit of the network's scale stands for.
        hu_offset: the Hounsfield units of its zero.
        weights: of ``all_tissue``, ``soft_tissue`` and ``bone_surface``.
        soft_tissue: lowest and highest Hounsfield units.
        bone: lowest Hounsfield units.
        erosion: voxels that the shell reaches into bone.
        dilation: voxels that it reaches out of it.

    Raises:
        Mistake: when the scale is not one of Hounsfield units.
    """

    def __init__(
        self,
        structural: StructuralLoss,
        img_size: Sequence[int],
        hu_scale: float | None,
        hu_offset: float | None,
        weights: Mapping[str, float] | None = None,
        soft_tissue: tuple[float, float] = (-300.0, 300.0),
        bone: float = 300.0,
        erosion: int = 2,
        dilation: int = 4,
    ) -> None:
        super().__init__(weights or {"all_tissue": 0.3, "soft_tissue": 0.5, "bone_surface": 0.2})
        if hu_scale is None or hu_offset is None:
            raise Mistake("the loss 'tissue' tells tissues by Hounsfield units: it needs --modality ct")
        self.structural, self.hu_scale, self.hu_offset = structural, hu_scale, hu_offset
        self.grid_size = tuple(side // structural.patch_size for side in img_size)
        self.soft_tissue, self.bone, self.erosion, self.dilation = soft_tissue, bone, erosion, dilation

    def patch_errors(self, prediction: Tensor, target: Tensor) -> dict[str, tuple[Tensor, Tensor | float]]:
        """Return the structural loss of ``all_tissue``, ``soft_tissue`` and ``bone_surface``."""
        errors = self.structural.patch_errors(prediction, target)
        error = torch.stack([self.structural.weights[name] * error for name, (error, _) in errors.items()]).sum(dim=0)
        return {name: (error, group) for name, group in {"all_tissue": 1.0, **self.groups(target)}.items()}

    def groups(self, target: Tensor) -> dict[str, Tensor]:
        """Tell which patches ``(B, N, P³·C)`` are of ``soft_tissue`` and of ``bone_surface``: ``(B, N)``, 1 or 0."""
        hounsfield = target * self.hu_scale + self.hu_offset
        soft = (hounsfield >= self.soft_tissue[0]) & (hounsfield <= self.soft_tissue[1])
        size = self.structural.patch_size
        bone = (unpatchify(hounsfield, size, self.grid_size) > self.bone).float()
        # Eroding a mask is dilating its complement.
        shell = _dilate(bone, self.dilation) * _dilate(1 - bone, self.erosion)
        return {
            "soft_tissue": (soft.float().mean(dim=-1) > 0.5).float(),
            "bone_surface": (patchify(shell, size).mean(dim=-1) > 0.5).float(),
        }


class SumOfLosses(nn.Module):
    """Several losses added up.

    Args:
        losses: by name. Their components are reported as ``<loss>_<component>``, or by the loss's name where it has
            one only.
        per: what counts as a task of its own for a :class:`~bertswin_mae.engines.GradientConductor`:
            ``component`` or ``loss``.

    Raises:
        Mistake: for another ``per``.
    """

    def __init__(self, losses: Mapping[str, MaskedLoss], per: str = "component") -> None:
        super().__init__()
        if per not in ("component", "loss"):
            raise Mistake(f"per {per!r} must be 'component' or 'loss'")
        self.losses, self.per = nn.ModuleDict(losses), per

    @property
    def last_components(self) -> dict[str, Tensor]:
        """The unweighted components of the last call, detached."""
        return self._named({loss: module.last_components for loss, module in self.losses.items()})

    @property
    def last_counts(self) -> dict[str, Tensor]:
        """Over how many patches each of them was taken."""
        return self._named({loss: module.last_counts for loss, module in self.losses.items()})

    @property
    def weights(self) -> dict[str, float]:
        """Of the components."""
        return self._named({loss: module.weights for loss, module in self.losses.items()})

    def forward(self, prediction: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """See :meth:`MaskedLoss.forward`."""
        return torch.stack(list(self.tasks(prediction, target).values())).sum()

    def tasks(self, prediction: Mapping[str, Tensor], target: Tensor) -> dict[str, Tensor]:
        """Score by task: the scalars whose sum :meth:`forward` returns."""
        tasks = {loss: module.tasks(prediction, target) for loss, module in self.losses.items()}
        if self.per == "loss":
            return {loss: torch.stack(list(parts.values())).sum() for loss, parts in tasks.items()}
        return self._named(tasks)

    def _named(self, by_loss: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        return {self._name(loss, part): value for loss, parts in by_loss.items() for part, value in parts.items()}

    def _name(self, loss: str, part: str) -> str:
        if len(self.losses[loss].weights) == 1:
            return loss
        return part if len(self.losses) == 1 else f"{loss}_{part}"


def choose_loss(chosen: str, losses: Mapping[str, MaskedLoss], tasks: str = "component") -> SumOfLosses:
    """Pick a loss by its name, or add several up.

    Args:
        chosen: a name, or several with ``+`` between them.
        losses: what there is to choose from.
        tasks: see ``per`` of :class:`SumOfLosses`.

    Raises:
        Mistake: for a name that is not there, with the nearest one that is; for a normalised target among others.
    """
    names = [name.strip() for name in str(chosen).split("+")]
    for name in names:
        if name not in losses:
            near = difflib.get_close_matches(name, losses, n=1, cutoff=0)
            raise Mistake(
                f"loss {name!r} must be one of {list(losses)}, or several such as {'+'.join(list(losses)[:2])}: did "
                f"you mean {near[0]}?"
            )
    if len(names) > 1 and any(getattr(losses[name], "normalise_target", False) for name in names):
        raise Mistake(f"loss {chosen!r}: a normalised target is on another scale than the others', choose it alone")
    return SumOfLosses({name: losses[name] for name in names}, tasks)


def _dilate(mask: Tensor, radius: int) -> Tensor:
    """Let a mask ``(B, C, D, H, W)`` of ones grow by a cube of ``radius`` voxels each way, an axis at a time."""
    for axis in range(3):
        kernel, padding = [1, 1, 1], [0, 0, 0]
        kernel[axis], padding[axis] = 2 * radius + 1, radius
        mask = F.max_pool3d(mask, kernel, stride=1, padding=padding)
    return mask
