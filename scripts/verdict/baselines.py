"""What of the hidden voxels can be told without a network: the figures that a network has to beat."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.networks.layers import GaussianFilter
from monai.utils import CommonKeys as Keys
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ..losses import MaskedLoss
from ..metrics import MaskedLossMetrics, SumMetric, assemble, over_variance, voxel_mask
from ..networks.patches import patchify

__all__ = ["BaselineMetrics"]

NEAR = 1e-3  # share of the blur's weight below which a voxel is too far from anything visible


class BaselineMetrics(SumMetric):
    """What each baseline leaves unexplained, as ``val_unexplained`` of the network: ``mean``, ``nearest``, ``blur``.

    And ``loss``, the smallest of their losses, as ``val_loss``. They are measured as a network that says the same.
    The volumes and masks of a validation never change, so neither do these: the first epoch alone is computed.

    Args:
        loss: that is trained.
    """

    def __init__(self, loss: MaskedLoss) -> None:
        self.found: dict[str, float] | None = None
        self.loss_metrics = MaskedLossMetrics(loss)
        each = 1 + math.prod(self.loss_metrics.shape)  # sums of a baseline
        super().__init__((3 + each * len(BASELINES),), Keys.IMAGE, Keys.PRED, Keys.LABEL)

    def update(self, output: tuple[Any, ...]) -> None:
        """Add one batch of the first epoch."""
        if self.found is None:
            super().update(output)

    def compute(self) -> dict[str, float]:
        """Return the figures by name."""
        if self.found is None:
            self.found = super().compute()
        return self.found

    def _summands(self, volume: Tensor, prediction: dict[str, Tensor], target: Tensor) -> Tensor:
        volume, mask = volume.float(), prediction["mae_mask_1d"].bool()
        visible = prediction["valid_for_masking_mask"].to(mask.device) & ~mask
        truth = volume[voxel_mask(volume, mask).expand_as(volume)].double()
        sums = [truth.new_tensor(truth.numel()), truth.sum(), truth.square().sum()]
        loss = self.loss_metrics.loss
        for baseline in BASELINES.values():
            said = loss.as_prediction(patchify(baseline(volume, visible), _patch_size(volume, visible)))
            sums.append((loss.restore(said, target) - target)[mask].double().square().sum())
            sums += self.loss_metrics._summands({**prediction, "reconstructed_patches": said}, target).flatten()
        return torch.stack(sums)

    def _figures(self, sums: Tensor) -> dict[str, float]:
        number, total, square = sums[:3].tolist()
        left, losses = {}, []
        for name, its in zip(BASELINES, sums[3:].view(len(BASELINES), -1), strict=True):
            left[name] = over_variance(its[0].item() / number, total / number, square / number)
            losses.append(self.loss_metrics._figures(its[1:].view(self.loss_metrics.shape))["loss"])
        return left | {"loss": min(losses)}


def mean_around(volume: Tensor, visible: Tensor) -> Tensor:
    """Fill every patch with the mean of the visible ones among the 26 around it, or where there are none, of all.

    From ``(B, C, D, H, W)`` and ``visible`` ``(B, N)`` bool to a volume of the same shape; so do the others here.
    """
    grid = [side // _patch_size(volume, visible) for side in volume.shape[2:]]
    means = patchify(volume, _patch_size(volume, visible)).unflatten(2, (-1, volume.shape[1])).mean(dim=2)
    seen = visible.unsqueeze(-1).to(means.dtype)
    sums, counts = (_add_neighbours(values, grid) for values in (means * seen, seen))
    everywhere = (means * seen).sum(dim=1, keepdim=True) / seen.sum(dim=1, keepdim=True)
    around = torch.where(counts > 0, sums / counts.clamp(min=1), everywhere)
    voxels = volume.shape[2:].numel() // visible.shape[1]
    return assemble(around.repeat(1, 1, voxels), volume)


def nearest(volume: Tensor, visible: Tensor) -> Tensor:
    """Fill every patch with the nearest visible one."""
    size = _patch_size(volume, visible)
    axes = [torch.arange(side // size, dtype=torch.float32, device=volume.device) for side in volume.shape[2:]]
    places = torch.cartesian_prod(*axes)
    patches = patchify(volume, size)
    chosen = [seen.nonzero().flatten()[torch.cdist(places, places[seen]).argmin(dim=1)] for seen in visible]
    return assemble(torch.stack([own[index] for own, index in zip(patches, chosen, strict=True)]), volume)


def blur(volume: Tensor, visible: Tensor) -> Tensor:
    """Blur the visible voxels, with a standard deviation of half a patch: each voxel becomes their weighted mean."""
    gaussian = GaussianFilter(3, _patch_size(volume, visible) / 2).to(volume.device)
    seen = voxel_mask(volume, visible).to(volume.dtype)
    sums, weights = gaussian(volume * seen), gaussian(seen)
    everywhere = (volume * seen).sum(dim=(2, 3, 4), keepdim=True) / seen.sum(dim=(2, 3, 4), keepdim=True)
    return torch.where(weights > NEAR, sums / weights.clamp(min=NEAR), everywhere)


# What a baseline says of a volume (B, C, D, H, W) whose patches (B, N) are visible or not.
BASELINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": mean_around, "nearest": nearest, "blur": blur}


def _add_neighbours(values: Tensor, grid: Sequence[int]) -> Tensor:
    """Add up values ``(B, N, C)`` of the patches of a grid over each one and the 26 around it."""
    rows = values.mT.reshape(-1, 1, *grid)
    sums = F.conv3d(rows, values.new_ones(1, 1, 3, 3, 3), padding=1)
    return sums.view(len(values), -1, values.shape[1]).mT


def _patch_size(volume: Tensor, visible: Tensor) -> int:
    return round((volume.shape[2:].numel() / visible.shape[1]) ** (1 / 3))
