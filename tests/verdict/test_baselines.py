"""Promises of what needs no network: it sees visible patches alone, and is measured as the network is."""

import pytest
import torch
from conftest import noise
from ignite.engine import Engine

from scripts.metrics import HiddenVoxelMetrics, voxel_mask
from scripts.networks import unpatchify
from scripts.verdict import BaselineMetrics
from scripts.verdict.baselines import BASELINES


def row(*values):
    """A volume of patches of 2³ in a row, each filled with one value."""
    return unpatchify(torch.tensor(values, dtype=torch.float32).view(1, -1, 1).repeat(1, 1, 8), 2, (len(values), 1, 1))


def filled(name, values, visible):
    """What a baseline makes of such a row, by patch."""
    return BASELINES[name](row(*values), torch.tensor([visible], dtype=torch.bool))[0, 0, :, 0, 0].view(-1, 2)


def measured(metric, *batches):
    engine = Engine(lambda _, batch: batch)
    metric.attach(engine, "all")
    return dict(engine.run(batches).metrics["all"])


def batch(seed=0, volumes=2):
    volume = noise(volumes, 1, 16, 16, 16, seed=seed).cumsum(dim=2)
    hidden = torch.rand(volumes, 64, generator=torch.Generator().manual_seed(seed)) > 0.25
    valid = torch.rand(volumes, 64, generator=torch.Generator().manual_seed(seed + 1)) > 0.1
    prediction = {
        "mae_mask_1d": (hidden & valid).float(),
        "valid_for_masking_mask": valid,
        "reconstructed_cube": volume,
    }
    return {"image": volume, "pred": prediction}


def test_the_mean_is_that_of_the_visible_patches_around_and_far_from_them_that_of_all():
    found = filled("mean", [1, 9, 3, 9, 9, 5], [1, 0, 1, 0, 0, 1])
    assert found[:, 0].tolist() == [1, 2, 3, 3, 5, 5]
    assert filled("mean", [1, 9, 9, 9, 3, 3], [1, 0, 0, 0, 1, 1])[2, 0].item() == pytest.approx(7 / 3)


def test_the_nearest_visible_patch_is_copied_voxel_by_voxel():
    volume, visible = noise(1, 1, 8, 2, 2), torch.tensor([[True, False, False, True]])
    found = BASELINES["nearest"](volume, visible)
    assert torch.equal(found[:, :, 2:4], volume[:, :, :2])
    assert torch.equal(found[:, :, 4:6], volume[:, :, 6:])


def test_the_blur_goes_smoothly_from_one_visible_patch_to_the_next():
    found = filled("blur", [0, 9, 2], [1, 0, 1])
    assert 0 < found[1, 0] < found[1, 1] < 2
    assert found[1].sum().item() == pytest.approx(2)  # by symmetry
    # With a standard deviation of a patch's half, 1 voxel, and one visible patch on either side.
    assert filled("blur", [0, 9, 9, 9, 9, 9, 9, 4], [1, 0, 0, 0, 0, 0, 0, 1])[3, 1].item() == pytest.approx(2)


@pytest.mark.parametrize("name", BASELINES)
def test_no_baseline_sees_a_hidden_voxel(name):
    one, prediction = batch()["image"], batch()["pred"]
    visible = prediction["valid_for_masking_mask"] & ~prediction["mae_mask_1d"].bool()
    changed = torch.where(voxel_mask(one, visible), one, 99.0)
    assert torch.equal(BASELINES[name](one, visible), BASELINES[name](changed, visible))


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_is_measured_as_a_network_that_says_the_same(name):
    batches = [batch(0), batch(3)]
    found = measured(BaselineMetrics(), *batches)[name]
    for one in batches:
        visible = one["pred"]["valid_for_masking_mask"] & ~one["pred"]["mae_mask_1d"].bool()
        one["pred"]["reconstructed_cube"] = BASELINES[name](one["image"], visible)
    assert found == pytest.approx(measured(HiddenVoxelMetrics(2.0), *batches)["unexplained"])


def test_baselines_are_computed_once():
    metric = BaselineMetrics()
    first = measured(metric, batch(0))
    assert measured(metric, {"image": None, "pred": None}) == first
