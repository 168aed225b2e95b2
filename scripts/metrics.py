"""What validation measures, each over the whole validation set."""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from ignite.metrics import Metric
from ignite.metrics.metric import reinit__is_reduced, sync_all_reduce
from monai.metrics import HausdorffDistanceMetric
from monai.metrics.regression import compute_ssim_and_cs
from monai.utils import CommonKeys as Keys
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .losses import SumOfLosses
from .networks.patches import unpatchify
from .workflows.stem_tuning import StemTuningLoss

__all__ = ["BoundedHausdorffMetric", "HiddenVoxelMetrics", "MaskedLossMetrics", "StemTuningMetrics", "composite"]

SSIM_WINDOW = 7  # voxels
SSIM_SIGMA = 1.5  # voxels, the value of Wang et al. 2004


def composite(volume: Tensor, prediction: dict[str, Tensor]) -> Tensor:
    """Put the reconstruction of the hidden patches into the original volume, ``(B, C, D, H, W)``."""
    hidden = _voxel_mask(volume, prediction["mae_mask_1d"])
    return torch.where(hidden, prediction["reconstructed_cube"].to(volume.dtype), volume)


class HiddenVoxelMetrics(Metric):
    """How well hidden voxels are rebuilt, over all hidden voxels of the validation set together.

    Computes ``mse``, ``mae``, ``psnr`` (dB), ``ssim`` (Gaussian window of 7³ voxels, sigma 1.5, on the volume with
    its visible patches put back, averaged over hidden voxels) and ``unexplained``: the MSE over the variance of the
    same voxels, so that the best constant prediction scores 1. Index the metric by these names to attach one.

    Args:
        data_range: width of the intensity window, on the network's scale, for PSNR and SSIM.
    """

    def __init__(self, data_range: float) -> None:
        self.data_range = data_range
        super().__init__(output_transform=lambda output: (output[Keys.IMAGE], output[Keys.PRED]))

    @reinit__is_reduced
    def reset(self) -> None:
        """Start a new epoch."""
        # count, squared error, absolute error, SSIM, voxel, voxel squared
        self._sums = torch.zeros(6, dtype=torch.float64)

    @reinit__is_reduced
    def update(self, output: tuple[Tensor, dict[str, Tensor]]) -> None:
        """Add one batch: the volumes and the network's output for them."""
        volume, prediction = output[0].float(), output[1]
        rebuilt = composite(volume, prediction)
        hidden = _voxel_mask(volume, prediction["mae_mask_1d"]).expand_as(volume)
        truth, error = volume[hidden].double(), (rebuilt - volume)[hidden].double()
        ssim = _ssim_map(rebuilt, volume, self.data_range)[hidden].double()
        sums = (error.square().sum(), error.abs().sum(), ssim.sum(), truth.sum(), truth.square().sum())
        self._sums += torch.stack([torch.tensor(truth.numel(), dtype=torch.float64), *(value.cpu() for value in sums)])

    @sync_all_reduce("_sums")
    def compute(self) -> dict[str, float]:
        """Return the five figures."""
        count = self._sums[0].item()
        mse, mae, ssim, mean, square = (self._sums[1:] / count).tolist()
        psnr = 10 * math.log10(self.data_range**2 / mse) if mse > 0 else math.inf
        variance = square - mean**2
        unexplained = mse / variance if variance > 0 else math.nan
        return {"mse": mse, "mae": mae, "psnr": psnr, "ssim": ssim, "unexplained": unexplained}


def _voxel_mask(volume: Tensor, mask: Tensor) -> Tensor:
    """Blow a ``(B, N)`` patch mask up to voxels: ``(B, 1, D, H, W)`` bool."""
    voxels_per_patch = math.prod(volume.shape[2:]) // mask.shape[1]
    return _assembled(rearrange(mask.bool(), "b n -> b n 1").expand(-1, -1, voxels_per_patch), volume)


def _assembled(patches: Tensor, volume: Tensor) -> Tensor:
    """Put patches ``(B, N, P³·C)`` together to the sides of a volume ``(B, …, D, H, W)``."""
    sides = volume.shape[2:]
    patch_size = round((math.prod(sides) / patches.shape[1]) ** (1 / 3))
    return unpatchify(patches, patch_size, [side // patch_size for side in sides])


def _ssim_map(prediction: Tensor, target: Tensor, data_range: float) -> Tensor:
    pad = (SSIM_WINDOW // 2,) * 6
    padded = (F.pad(image, pad, mode="replicate") for image in (prediction, target))
    ssim, _ = compute_ssim_and_cs(*padded, 3, (SSIM_WINDOW,) * 3, (SSIM_SIGMA,) * 3, data_range)
    return ssim


class MaskedLossMetrics(Metric):
    """A masked loss and its components over the validation set, each over all of its hidden patches together.

    Index the metric by ``loss`` or a component's name to attach one.

    Args:
        loss: what is measured.
    """

    def __init__(self, loss: SumOfLosses) -> None:
        self.loss = loss
        super().__init__(output_transform=lambda output: (output[Keys.LABEL], output[Keys.PRED]))

    def by_name(self, total: str, prefix: str = "val_") -> dict[str, Metric]:
        """Return one metric for the loss, called ``total``, and one a component, where there are several."""
        parts = self.loss.weights if len(self.loss.weights) > 1 else ()
        return {f"{prefix}{total}": self["loss"]} | {f"{prefix}{name}": self[name] for name in parts}

    @reinit__is_reduced
    def reset(self) -> None:
        """Start a new epoch."""
        self._sums = torch.zeros(2, len(self.loss.weights), dtype=torch.float64)  # patches, and the sum of their errors

    @reinit__is_reduced
    def update(self, output: tuple[Tensor, dict[str, Tensor]]) -> None:
        """Add one batch: the target patches and the network's output."""
        target, prediction = output
        self.loss(prediction, target)
        counts, means = (
            torch.stack(list(values.values())).double().cpu()
            for values in (self.loss.last_counts, self.loss.last_components)
        )
        self._sums += torch.stack([counts, counts * means])

    @sync_all_reduce("_sums")
    def compute(self) -> dict[str, float]:
        """Return the figures by name."""
        means = (self._sums[1] / self._sums[0].clamp(min=1)).tolist()
        parts = dict(zip(self.loss.weights, means, strict=True))
        return {"loss": sum(weight * parts[name] for name, weight in self.loss.weights.items()), **parts}


class StemTuningMetrics(Metric):
    """How far the whole-volume network is from the original in patch mode, over the validation set.

    Computes ``volumetric`` and ``patch_mode`` (mean squared error of all voxels, rebuilt either way),
    ``feature_cosine`` (mean over tokens of the cosine between the two feature vectors) and ``objective`` (the loss).
    Index the metric by these names to attach one.

    Args:
        loss: the loss that is tuned to.
    """

    def __init__(self, loss: StemTuningLoss) -> None:
        self.loss = loss
        super().__init__(output_transform=lambda output: (output[Keys.IMAGE], output[Keys.LABEL], output[Keys.PRED]))

    @reinit__is_reduced
    def reset(self) -> None:
        """Start a new epoch."""
        self._sums = torch.zeros(5, dtype=torch.float64)  # volumes, then the four figures

    @reinit__is_reduced
    def update(self, output: tuple[Tensor, Tensor, dict[str, Tensor]]) -> None:
        """Add one batch."""
        volume, target, prediction = output
        cosine = F.cosine_similarity(prediction["features"].float(), prediction["patch_features"].float(), dim=1)
        figures = (
            F.mse_loss(prediction["reconstructed_cube"].float(), volume),
            F.mse_loss(prediction["patch_mode_cube"].float(), volume),
            cosine.mean(),
            self.loss(prediction, target),
        )
        size = volume.shape[0]
        self._sums += size * torch.tensor([1.0, *(figure.item() for figure in figures)], dtype=torch.float64)

    @sync_all_reduce("_sums")
    def compute(self) -> dict[str, float]:
        """Return the four figures."""
        names = ("volumetric", "patch_mode", "feature_cosine", "objective")
        return dict(zip(names, (self._sums[1:] / self._sums[0]).tolist(), strict=True))


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
