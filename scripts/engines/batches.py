"""From a batch of the data loader to the network's arguments."""

from typing import Any

import torch
from monai.engines import PrepareBatch
from monai.utils import CommonKeys as Keys
from torch import Tensor

from ..data.splitting import case_seed
from ..mistakes import Mistake
from ..networks.patches import patchify, random_masking, valid_patches
from ..transforms import Augmentation

__all__ = ["AugmentedBatch", "PrepareMaskedBatch", "PrepareWholeBatch"]


class PrepareWholeBatch(PrepareBatch):
    """Turn a batch of the data loader into the network's arguments, with nothing masked.

    Args:
        patch_size: P, in voxels.
    """

    def __init__(self, patch_size: int) -> None:
        self.patch_size = patch_size

    def __call__(
        self, batchdata: dict[str, Any], device: str | torch.device | None = None, non_blocking: bool = False, **_: Any
    ) -> tuple[Tensor, Tensor, tuple, dict]:
        """Return the volume ``(B, C, D, H, W)``, the target patches ``(B, N, P³·C)``, and no other arguments.

        The target is ``target`` where the batch has one, a volume whose intensities were not augmented.
        """
        volume = batchdata[Keys.IMAGE].to(device, non_blocking=non_blocking)
        target = batchdata["target"].to(device, non_blocking=non_blocking) if "target" in batchdata else volume
        return volume, patchify(target, self.patch_size), (), {}


class PrepareMaskedBatch(PrepareWholeBatch):
    """The same, with a mask drawn from each volume's seed.

    Training draws come with a seed of their own; that of a validation case follows from its name. So the mask is new
    at every draw in training, and the same at every epoch in validation.

    Args:
        patch_size: of :class:`PrepareWholeBatch`.
        mask_ratio: share of the valid patches to hide; must lie in (0, 1).
        seed: of the run.
        min_valid_share: a patch is valid when more of its voxels lie in the ``fov`` ``(B, 1, D, H, W)``, where one is.
    """

    def __init__(self, patch_size: int, mask_ratio: float, seed: int = 0, min_valid_share: float = 0.95) -> None:
        super().__init__(patch_size)
        if not 0 < mask_ratio < 1:
            raise Mistake(f"mask_ratio {mask_ratio} must lie in (0, 1) to train on, for example 0.75")
        self.mask_ratio, self.seed, self.min_valid_share = mask_ratio, seed, min_valid_share

    def __call__(self, batchdata: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, tuple, dict]:
        """Return volume and target as :class:`PrepareWholeBatch`, and the masks by keyword."""
        volume, target, _, masks = super().__call__(batchdata, *args, **kwargs)
        if "seed" in batchdata:
            seeds = batchdata["seed"].tolist()
        else:
            seeds = [case_seed(case, self.seed) for case in batchdata["case"]]
        valid = torch.ones(target.shape[:2], dtype=torch.bool)
        if "fov" in batchdata:
            valid = valid_patches(batchdata["fov"].to(volume.device), self.patch_size, self.min_valid_share)
            valid = masks["valid_for_masking_mask"] = valid.cpu()  # how many there are makes the shapes
        masks["masked"] = random_masking(valid, self.mask_ratio, seeds)
        return volume, target, (), masks


class AugmentedBatch(PrepareBatch):
    """Augment a training batch on the device, by the seed of each draw, before another way to prepare it.

    Args:
        prepare_batch: that way.
        augmentation: of the volumes ``(B, C, D, H, W)`` of a batch; None: the processes that load have done it.
    """

    def __init__(self, prepare_batch: PrepareBatch, augmentation: Augmentation | None) -> None:
        self.prepare_batch, self.augmentation = prepare_batch, augmentation

    def __call__(
        self, batchdata: dict[str, Any], device: str | torch.device | None = None, non_blocking: bool = False, **_: Any
    ) -> Any:
        """Return what the other way makes of the augmented batch."""
        if self.augmentation is not None:
            volumes = {key: value for key, value in batchdata.items() if isinstance(value, Tensor) and value.ndim > 1}
            moved = {key: value.to(device, non_blocking=non_blocking) for key, value in volumes.items()}
            batchdata = batchdata | self.augmentation.on_batch(moved, batchdata["seed"].tolist())
        return self.prepare_batch(batchdata, device, non_blocking)
