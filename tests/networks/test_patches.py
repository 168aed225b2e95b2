"""Promises of cutting and hiding patches."""

import pytest
import torch
from conftest import noise

from scripts.networks import patchify, random_masking, unpatchify, valid_patches


@pytest.mark.parametrize("channels", [1, 3])
def test_unpatchify_inverts_patchify(channels):
    volume = noise(2, channels, 8, 16, 12)
    assert torch.equal(unpatchify(patchify(volume, 4), 4, (2, 4, 3)), volume)


def test_patchify_keeps_the_channels_of_one_patch_together():
    volume = noise(1, 2, 4, 4, 8)
    second_patch = patchify(volume, 4)[0, 1].reshape(4, 4, 4, 2)
    assert torch.equal(second_patch, volume[0, :, :, :, 4:].permute(1, 2, 3, 0))


@pytest.mark.parametrize(("ratio", "hidden"), [(0.75, 2058), (0.9, 2470), (0.6, 1646), (0.0, 0)])
def test_mask_ratio_is_exact(ratio, hidden):
    masked = random_masking(torch.ones(3, 2744, dtype=torch.bool), ratio)
    assert masked.sum(dim=1).tolist() == [hidden] * 3


def test_mask_ratio_counts_valid_patches_and_the_smallest_volume_sets_the_visible_number():
    valid = torch.ones(2, 100, dtype=torch.bool)
    valid[0, 40:] = False
    masked = random_masking(valid, 0.75)
    assert (~masked).sum(dim=1).tolist() == [10, 10]  # a quarter of 40
    assert masked[~valid].all()


def test_a_volumes_mask_depends_on_its_seed_alone():
    valid = torch.ones(3, 64, dtype=torch.bool)
    together = random_masking(valid, 0.75, seeds=[5, 6, 7])
    alone = random_masking(valid[:1], 0.75, seeds=[6])
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1])


def test_at_least_one_patch_stays_visible():
    assert (~random_masking(torch.ones(2, 4, dtype=torch.bool), 0.99)).sum(dim=1).tolist() == [1, 1]


def test_masks_are_uniform_over_the_grid():
    valid = torch.ones(1, 27, dtype=torch.bool)
    counts = sum(random_masking(valid, 2 / 3, seeds=[seed]).long() for seed in range(3000))
    assert (counts / 3000 - 2 / 3).abs().max() < 0.05  # over five standard deviations


def test_a_volume_without_a_valid_patch_is_refused_by_its_place():
    valid = torch.ones(3, 8, dtype=torch.bool)
    valid[1] = False
    with pytest.raises(ValueError, match=r"volumes \[1\] of the batch have no valid patch"):
        random_masking(valid, 0.5)


def test_a_wrong_number_of_seeds_is_refused():
    with pytest.raises(ValueError, match="seeds has 1 entries for a batch of 2"):
        random_masking(torch.ones(2, 8, dtype=torch.bool), 0.5, seeds=[1])


def test_patches_are_valid_when_nearly_all_of_their_voxels_are_in_view():
    fov = torch.ones(2, 1, 8, 8, 8)
    fov[0, :, :, :, 4:] = 0
    fov[1, 0, 0, :1, :3] = 0  # 3 of 64 voxels
    assert valid_patches(fov, 4).tolist() == [[True, False] * 4, [True] * 8]
    fov[1, 0, 0, 1, 3] = 0  # 4 of 64: still more than 93 %, but not 95 %
    assert valid_patches(fov, 4)[1].tolist() == [False] + [True] * 7
    assert valid_patches(fov, 4, min_share=0.9)[1].all()


def test_a_volume_thinner_than_a_patch_keeps_the_patches_it_fills_most():
    fov = torch.zeros(1, 1, 8, 8, 8)
    fov[..., :3] = 1
    assert valid_patches(fov, 4).tolist() == [[True, False] * 4]
