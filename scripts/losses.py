"""Reconstruction losses that look at hidden patches only.

To add one, write ``patch_errors`` as :class:`MaskedL2Loss` does, and name the class under ``losses`` in train.yaml. One
whose network predicts something else than voxels also writes ``as_prediction`` and ``restore``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .mistakes import Mistake, likely
from .networks.patches import patchify, unpatchify

__all__ = ["MaskedL2Loss", "MaskedLoss", "StructuralLoss", "SumOfLosses", "TissueWeightedLoss", "choose_loss"]


class MaskedLoss(nn.Module):
    """A sum of components by their ``weights``, each a mean over hidden patches, in float32 also under autocast."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.weights = dict(weights)

    def patch_errors(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Compare patches ``(B, N, P³·C)``: the error of each, ``(B, N)``, for every component."""
        raise NotImplementedError

    def groups(self, target: Tensor) -> dict[str, Tensor]:
        """Say which patches a component looks at, ``(B, N)`` of ones and zeros; at all if it is not named."""
        return {}

    def sums(self, prediction: Mapping[str, Tensor], target: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Add the errors of hidden patches up and count these patches, for every component.

        Of the network's output, ``reconstructed_patches`` ``(B, N, P³·C)`` is scored where ``mae_mask_1d`` ``(B, N)``
        is 1. The target ``(B, N, P³·C)`` is the original volume cut the same way.
        """
        with torch.autocast(target.device.type, enabled=False):
            target, hidden = target.float(), prediction["mae_mask_1d"].float()
            errors, groups = self.patch_errors(prediction["reconstructed_patches"].float(), target), self.groups(target)
            chosen = {name: hidden * groups[name] if name in groups else hidden for name in errors}
            return {name: ((error * chosen[name]).sum(), chosen[name].sum()) for name, error in errors.items()}

    def as_prediction(self, patches: Tensor) -> Tensor:
        """Tell the prediction that stands for patches of the intensity scale, both ``(B, N, P³·C)``."""
        return patches

    def restore(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Put predicted patches back on the intensity scale, all ``(B, N, P³·C)``."""
        return prediction

    def tasks(self, components: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weight the components: the terms whose sum is the loss."""
        return {name: self.weights[name] * value for name, value in components.items()}

    def score(self, prediction: Mapping[str, Tensor], target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its components, unweighted, all scalars; 0 where no patch is hidden."""
        sums = self.sums(prediction, target)
        components = {name: error / count.clamp(min=1) for name, (error, count) in sums.items()}
        return torch.stack([*self.tasks(components).values()]).sum(), components

    def forward(self, prediction: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """Return the loss alone."""
        return self.score(prediction, target)[0]


NORMALISED = "normalised_l2"  # what the configs call the MaskedL2Loss that standardises each patch


class MaskedL2Loss(MaskedLoss):
    """Mean squared error over the voxels of hidden patches (paper, masked pre-training with AdamW).

    With ``normalise_target`` each target patch is standardised by its own mean and deviation first (He et al. 2022);
    ``epsilon`` is added to the variance then, on the network's scale, so that flat patches stay finite.
    """

    def __init__(self, normalise_target: bool = False, epsilon: float = 1e-6) -> None:
        super().__init__({"l2": 1.0})
        self.normalise_target, self.epsilon = normalise_target, epsilon

    def patch_errors(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return ``l2``."""
        difference = prediction - self.as_prediction(target)
        return {"l2": torch.linalg.vecdot(difference, difference) / difference.shape[-1]}

    def as_prediction(self, patches: Tensor) -> Tensor:
        """Standardise patches ``(B, N, P³·C)``, where the target is."""
        return _standardise(patches, self.epsilon)[2] if self.normalise_target else patches

    def restore(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Put predicted patches ``(B, N, P³·C)`` back on the intensity scale, by the statistics of the target's."""
        if not self.normalise_target:
            return prediction
        mean, deviation, _ = _standardise(target.float(), self.epsilon)
        return prediction.float() * deviation + mean


class StructuralLoss(MaskedLoss):
    """Brightness, contrast and structure of hidden patches, balanced (paper, component-balanced loss "LCS").

    Patches are cut into sub-patches. Of each, and for each channel, the mean (brightness), the standard deviation
    (contrast) and the standardised voxels (structure) are compared by their mean squared error.
    Standardising amplifies the noise of a flat sub-patch (air, padding). The public reference divides by the deviation
    plus 1e-8, and its gradient explodes there. Here ``sqrt(variance + epsilon²)`` amplifies at most by 1/epsilon.

    Args:
        patch_size: P, in voxels.
        in_chans: image channels.
        sub_patch_size: side of a sub-patch in voxels; must divide P.
        weights: of ``brightness``, ``contrast`` and ``structure``.
        epsilon: on the network's scale; by default about 6 HU, below the noise of any CT, or 0.5 % of the MR window.
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
            fits = max(size for size in range(1, patch_size + 1) if patch_size % size == 0 and size <= 8)
            raise Mistake(f"sub_patch_size {sub_patch_size} must divide patch_size {patch_size}, for example {fits}")
        self.patch_size, self.in_chans = patch_size, in_chans
        self.sub_patch_size, self.epsilon = sub_patch_size, epsilon

    def patch_errors(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return ``brightness``, ``contrast`` and ``structure``."""
        parts, side = self.patch_size // self.sub_patch_size, self.sub_patch_size
        sizes = {"dp": parts, "hp": parts, "wp": parts, "p": side, "q": side, "r": side, "c": self.in_chans}
        cut = "b n (dp p hp q wp r c) -> b n (dp hp wp c) (p q r)"
        ours, theirs = (_standardise(rearrange(it, cut, **sizes), self.epsilon**2) for it in (prediction, target))
        errors = [(one - other).square().mean(dim=-1).mean(dim=-1) for one, other in zip(ours, theirs, strict=True)]
        return dict(zip(("brightness", "contrast", "structure"), errors, strict=True))


class TissueWeightedLoss(MaskedLoss):
    """The structural loss over all hidden patches, over those of soft tissue, and over those on the surface of bone.

    A patch belongs to a group when more than half of its voxels do (paper, tissue-weighted form). Soft tissue is a
    range of Hounsfield units of the target. The surface of bone is a shell: a bone mask dilated, without the same mask
    eroded. The public reference takes that mask from a segmentation; here it is a threshold. An empty group adds 0.

    Args:
        structural: the loss whose weighted sum is taken of each group.
        img_size: D, H, W, in voxels.
        hu_scale, hu_offset: HU that one on the network's scale stands for, and of its zero; None, as of MR, is refused.
        weights: of ``all_tissue``, ``soft_tissue`` and ``bone_surface``.
        soft_tissue, bone: lowest and highest HU; lowest HU.
        erosion, dilation: voxels that the shell reaches into bone, and out of it.
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

    def patch_errors(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return the structural loss, the same for ``all_tissue``, ``soft_tissue`` and ``bone_surface``."""
        errors = self.structural.tasks(self.structural.patch_errors(prediction, target))
        return dict.fromkeys(("all_tissue", "soft_tissue", "bone_surface"), torch.stack([*errors.values()]).sum(dim=0))

    def groups(self, target: Tensor) -> dict[str, Tensor]:
        """Say which patches are of ``soft_tissue`` and of ``bone_surface``."""
        hounsfield, size = target * self.hu_scale + self.hu_offset, self.structural.patch_size
        soft = (hounsfield >= self.soft_tissue[0]) & (hounsfield <= self.soft_tissue[1])
        bone = (unpatchify(hounsfield, size, self.grid_size) > self.bone).float()
        # Eroding a mask is dilating its complement.
        shell = _dilate(bone, self.dilation) * _dilate(1 - bone, self.erosion)
        shares = {"soft_tissue": soft.float().mean(dim=-1), "bone_surface": patchify(shell, size).mean(dim=-1)}
        return {name: (share > 0.5).float() for name, share in shares.items()}


class SumOfLosses(MaskedLoss):
    """Several losses added up, of which each ``component`` or each ``loss`` is a task (``per``) of a GradientConductor.

    Components are called ``<loss>_<component>``; where there is one loss only, by the component's name, and where a
    loss has one component only, by the loss's.
    """

    def __init__(self, losses: Mapping[str, MaskedLoss], per: str = "component") -> None:
        if per not in ("component", "loss"):
            raise Mistake(f"per {per!r} must be 'component' or 'loss'")
        super().__init__({})
        self.losses, self.per = nn.ModuleDict(losses), per
        self.weights = self._named(lambda loss: loss.weights)

    def sums(self, prediction: Mapping[str, Tensor], target: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return those of all losses."""
        return self._named(lambda loss: loss.sums(prediction, target))

    def as_prediction(self, patches: Tensor) -> Tensor:
        """Tell the prediction that stands for patches, both ``(B, N, P³·C)``."""
        for loss in self.losses.values():  # one that changes them stands alone, see `choose_loss`
            patches = loss.as_prediction(patches)
        return patches

    def restore(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Put predicted patches back on the intensity scale, all ``(B, N, P³·C)``."""
        for loss in self.losses.values():
            prediction = loss.restore(prediction, target)
        return prediction

    def tasks(self, components: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weight the components, and add up those of a loss where it is one task."""
        parts = super().tasks(components)
        if self.per == "component":
            return parts
        own = {loss: [parts[self._name(loss, part)] for part in it.weights] for loss, it in self.losses.items()}
        return {loss: torch.stack(terms).sum() for loss, terms in own.items()}

    def _named(self, give: Callable[[MaskedLoss], Mapping[str, Any]]) -> dict[str, Any]:
        return {self._name(name, part): it for name, loss in self.losses.items() for part, it in give(loss).items()}

    def _name(self, loss: str, part: str) -> str:
        if len(self.losses[loss].weights) == 1:
            return loss
        return part if len(self.losses) == 1 else f"{loss}_{part}"


def choose_loss(chosen: str, losses: Mapping[str, MaskedLoss], tasks: str = "component") -> SumOfLosses:
    """Pick one of the losses by its name, or several with ``+`` between them; ``tasks`` as ``per`` of the sum."""
    names = [name.strip() for name in str(chosen).split("+")]
    for name in names:
        if name not in losses:
            pair = "+".join([one for one, loss in losses.items() if not getattr(loss, "normalise_target", False)][:2])
            raise Mistake(f"loss {name!r} must be one of {[*losses]}, or several such as {pair}{likely(name, losses)}")
    if len(names) > 1 and any(getattr(losses[name], "normalise_target", False) for name in names):
        raise Mistake(f"loss {chosen!r}: a normalised target is on another scale than the others', choose it alone")
    return SumOfLosses({name: losses[name] for name in names}, tasks)


def _standardise(voxels: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return means and deviations along the last axis, and the standardised voxels."""
    variance, mean = torch.var_mean(voxels, dim=-1, correction=0, keepdim=True)
    deviation = (variance + epsilon).sqrt()
    return mean, deviation, (voxels - mean) / deviation


def _dilate(mask: Tensor, radius: int) -> Tensor:
    """Let a mask ``(B, C, D, H, W)`` of ones grow by a cube of ``radius`` voxels each way, an axis at a time."""
    for axis in range(3):
        kernel = [2 * radius + 1 if other == axis else 1 for other in range(3)]
        mask = F.max_pool3d(mask, kernel, stride=1, padding=[side // 2 for side in kernel])
    return mask
