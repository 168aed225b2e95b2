"""Cutting a volume into patches, putting it together again, and choosing which patches to hide."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

__all__ = ["patchify", "random_masking", "unpatchify", "valid_patches"]


def patchify(volume: Tensor, patch_size: int) -> Tensor:
    """Cut volumes ``(B, C, D, H, W)``, sides multiples of P, into flat cubic patches ``(B, N, P³·C)``.

    Patches are in the order D, H, W; inside a patch the voxels are in the order D, H, W, then channels.
    """
    p = patch_size
    return rearrange(volume, "b c (d p) (h q) (w r) -> b (d h w) (p q r c)", p=p, q=p, r=p)


def unpatchify(patches: Tensor, patch_size: int, grid_size: Sequence[int]) -> Tensor:
    """Put patches ``(B, N, P³·C)`` of a grid D, H, W of N together to ``(B, C, D, H, W)``: the inverse of patchify."""
    p = patch_size
    d, h, w = grid_size
    return rearrange(patches, "b (d h w) (p q r c) -> b c (d p) (h q) (w r)", d=d, h=h, w=w, p=p, q=p, r=p)


def random_masking(valid: Tensor, mask_ratio: float, seeds: Sequence[int] | None = None) -> Tensor:
    """Choose the hidden patches of each volume uniformly at random (paper, masked pre-training).

    All volumes of a batch keep the same number of visible patches, that of the volume with the fewest valid ones, so
    that shapes stay static. At least one patch stays visible.

    Args:
        valid: ``(B, N)`` bool, False = outside the field of view.
        mask_ratio: share of the valid patches to hide, in [0, 1).
        seeds: one seed a volume: its mask then depends neither on the device nor on its neighbours in the batch (but
            for their number of valid patches). Default: torch's global generator of the mask's device.

    Returns:
        ``(B, N)`` bool, True = hidden. Patches that are not valid are hidden too.

    Raises:
        ValueError: when a volume has no valid patch, or ``seeds`` is not one a volume.
    """
    batch, num_patches = valid.shape
    if seeds is None:
        noise = torch.rand(batch, num_patches, device=valid.device)
    elif len(seeds) != batch:
        raise ValueError(f"seeds has {len(seeds)} entries for a batch of {batch} volumes: give one a volume")
    else:
        draws = [torch.rand(num_patches, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
        noise = torch.stack(draws).to(valid.device)
    fewest = int(valid.sum(dim=1).min())
    if fewest == 0:
        empty = (~valid.any(dim=1)).nonzero().flatten().tolist()
        raise ValueError(f"volumes {empty} of the batch have no valid patch: one at least must be in the field of view")
    num_visible = max(1, round((1 - mask_ratio) * fewest))
    visible = noise.masked_fill(~valid, torch.inf).argsort(dim=1)[:, :num_visible]
    return torch.ones_like(valid).scatter(1, visible, False)


def valid_patches(fov: Tensor, patch_size: int, min_share: float = 0.95) -> Tensor:
    """Tell which patches lie in the field of view (paper, field of view).

    Args:
        fov: ``(B, 1, D, H, W)``, 1 inside.
        patch_size: P, in voxels.
        min_share: a patch is valid when more of its voxels lie inside. Where none passes, those that lie inside most
            do: a volume thinner than a patch, or a crop outside the field of view, still has something to look at.

    Returns:
        ``(B, N)`` bool.
    """
    share = patchify(fov.float(), patch_size).mean(dim=-1)
    valid = share > min_share
    return valid | (~valid.any(dim=1, keepdim=True) & (share == share.amax(dim=1, keepdim=True)))
