"""What validation measures, each over the whole validation set."""

import math
from typing import Any

import torch
from einops import repeat
from ignite.metrics import Metric
from ignite.metrics.metric import reinit__is_reduced, sync_all_reduce
from monai.metrics import HausdorffDistanceMetric
from monai.metrics.regression import compute_ssim_and_cs
from monai.utils import CommonKeys as Keys
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .losses import MaskedLoss
from .networks.patches import patchify, unpatchify

__all__ = ["BoundedHausdorffMetric", "HiddenVoxelMetrics", "MaskedLossMetrics", "StemTuningMetrics"]
__all__ += ["SumMetric", "assemble", "composite", "over_variance", "voxel_mask"]

SSIM_WINDOW, SSIM_SIGMA = 7, 1.5  # voxels, the values of Wang et al. 2004


def assemble(patches: Tensor, volume: Tensor) -> Tensor:
    """Put patches ``(B, N, P³·C)`` together to the sides of a volume ``(B, …, D, H, W)``."""
    sides = volume.shape[2:]
    patch_size = round((math.prod(sides) / patches.shape[1]) ** (1 / 3))
    return unpatchify(patches, patch_size, [side // patch_size for side in sides])


def voxel_mask(volume: Tensor, mask: Tensor) -> Tensor:
    """Blow a ``(B, N)`` patch mask up to the voxels of a volume: ``(B, 1, D, H, W)`` bool."""
    return assemble(repeat(mask.bool(), "b n -> b n v", v=math.prod(volume.shape[2:]) // mask.shape[1]), volume)


def composite(volume: Tensor, prediction: dict[str, Tensor]) -> Tensor:
    """Put the reconstruction of the hidden patches into the original volume, ``(B, C, D, H, W)``."""
    hidden = voxel_mask(volume, prediction["mae_mask_1d"])
    return torch.where(hidden, prediction["reconstructed_cube"].to(volume.dtype), volume)


def over_variance(mse: float, mean: float, square: float) -> float:
    """Divide a mean squared error by the variance of voxels, given their mean and that of their squares."""
    return mse / variance if (variance := square - mean**2) > 0 else math.nan


class SumMetric(Metric):
    """Figures that follow from sums over the validation set of all ranks; index it by their names to attach one.

    Subclasses say what a batch adds (``_summands`` of its output under ``keys``) and what sums mean (``_figures``).
    """

    def __init__(self, shape: tuple[int, ...], *keys: str) -> None:
        self.shape = shape
        super().__init__(output_transform=lambda output: tuple(output[key] for key in keys))

    @reinit__is_reduced
    def reset(self) -> None:
        """Start a new epoch."""
        self._sums = torch.zeros(self.shape, dtype=torch.float64)

    @reinit__is_reduced
    def update(self, output: tuple[Any, ...]) -> None:
        """Add one batch."""
        self._sums += self._summands(*output).cpu()

    @sync_all_reduce("_sums")
    def compute(self) -> dict[str, float]:
        """Return the figures by name."""
        return self._figures(self._sums)


class HiddenVoxelMetrics(SumMetric):
    """How well hidden voxels are rebuilt, over all hidden voxels of the validation set together.

    Computes ``mse``, ``mae``, ``psnr`` (dB), ``ssim`` (Gaussian window of 7³ voxels, sigma 1.5, on the volume with
    its visible patches put back, averaged over hidden voxels) and ``unexplained``: the MSE over the variance of the
    same voxels, so that the best constant prediction scores 1. PSNR and SSIM take ``data_range``, the width of the
    intensity window on the network's scale.
    """

    def __init__(self, data_range: float) -> None:
        self.data_range = data_range
        super().__init__((6,), Keys.IMAGE, Keys.PRED)

    def _summands(self, volume: Tensor, prediction: dict[str, Tensor]) -> Tensor:
        volume = volume.float()
        rebuilt = composite(volume, prediction)
        hidden = voxel_mask(volume, prediction["mae_mask_1d"]).expand_as(volume)
        truth, error = volume[hidden].double(), (rebuilt - volume)[hidden].double()
        pads = (F.pad(image, (SSIM_WINDOW // 2,) * 6, mode="replicate") for image in (rebuilt, volume))
        ssim, _ = compute_ssim_and_cs(*pads, 3, (SSIM_WINDOW,) * 3, (SSIM_SIGMA,) * 3, self.data_range)
        values = (error.square(), error.abs(), ssim[hidden].double(), truth, truth.square())
        return torch.stack([truth.new_tensor(truth.numel()), *(value.sum() for value in values)])

    def _figures(self, sums: Tensor) -> dict[str, float]:
        mse, mae, ssim, mean, square = (sums[1:] / sums[0].item()).tolist()
        psnr = 10 * math.log10(self.data_range**2 / mse) if mse > 0 else math.inf
        return {"mse": mse, "mae": mae, "psnr": psnr, "ssim": ssim, "unexplained": over_variance(mse, mean, square)}


class MaskedLossMetrics(SumMetric):
    """A masked loss, ``loss``, and its components by name, over all hidden patches of the validation set together."""

    def __init__(self, loss: MaskedLoss) -> None:
        self.loss = loss
        super().__init__((2, len(loss.weights)), Keys.PRED, Keys.LABEL)

    def by_name(self, total: str) -> dict[str, Metric]:
        """Return ``val_<total>``, a metric for the loss, and one a component, where there are several."""
        parts = self.loss.weights if len(self.loss.weights) > 1 else ()
        return {f"val_{total}": self["loss"]} | {f"val_{name}": self[name] for name in parts}

    def _summands(self, prediction: dict[str, Tensor], target: Tensor) -> Tensor:
        errors, counts = map(torch.stack, zip(*self.loss.sums(prediction, target).values(), strict=True))
        return torch.stack([counts.double(), counts.double() * (errors / counts.clamp(min=1)).double()])

    def _figures(self, sums: Tensor) -> dict[str, float]:
        parts = dict(zip(self.loss.weights, (sums[1] / sums[0].clamp(min=1)).tolist(), strict=True))
        return {"loss": sum(weight * parts[name] for name, weight in self.loss.weights.items()), **parts}


class StemTuningMetrics(SumMetric):
    """How far the whole-volume network is from the original in patch mode, over the validation set.

    Computes ``volumetric`` and ``patch_mode`` (mean squared error of all voxels, rebuilt either way),
    ``feature_cosine`` (mean over tokens of the cosine between the two feature vectors) and ``objective`` (the loss).
    """

    def __init__(self, loss: nn.Module, patch_size: int) -> None:
        self.loss, self.patch_size = loss, patch_size
        super().__init__((5,), Keys.IMAGE, Keys.LABEL, Keys.PRED)

    def _summands(self, volume: Tensor, target: Tensor, prediction: dict[str, Tensor]) -> Tensor:
        cosine = F.cosine_similarity(prediction["features"].float(), prediction["patch_features"].float(), dim=1)
        cubes = (prediction[f"{way}_cube"].float() for way in ("reconstructed", "patch_mode"))
        rebuilt = (self.loss.reconstruction.restore(patchify(cube, self.patch_size), target) for cube in cubes)
        errors = [F.mse_loss(patches, target) for patches in rebuilt]
        figures = torch.stack([*errors, cosine.mean(), self.loss(prediction, target)]).double()
        return volume.shape[0] * F.pad(figures, (1, 0), value=1.0)  # the number of volumes comes first

    def _figures(self, sums: Tensor) -> dict[str, float]:
        names = ("volumetric", "patch_mode", "feature_cosine", "objective")
        return dict(zip(names, (sums[1:] / sums[0]).tolist(), strict=True))


class BoundedHausdorffMetric(HausdorffDistanceMetric):
    """MONAI's Hausdorff distance, in voxels, finite where only one of the two has the structure.

    MONAI says infinity where it is missed altogether, which makes every mean infinite, and nothing where it is found
    though it is not there. Both are as far off here as the volume is long.
    """

    def _compute_tensor(self, y_pred: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
        distance = super()._compute_tensor(y_pred, y, **kwargs)
        diagonal = torch.tensor(y.shape[2:], dtype=distance.dtype, device=distance.device).norm()
        found, there = (mask[:, -distance.shape[1] :].flatten(2).any(dim=2) for mask in (y_pred > 0, y > 0))
        return torch.where(found.to(distance.device) != there.to(distance.device), diagonal, distance)
