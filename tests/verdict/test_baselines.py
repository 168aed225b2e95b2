"""Promises of what needs no network: it sees visible patches alone, and is measured as the network is."""

import pytest
import torch
from conftest import noise
from ignite.engine import Engine

from scripts.losses import MaskedL2Loss, StructuralLoss, choose_loss
from scripts.metrics import HiddenVoxelMetrics, MaskedLossMetrics, voxel_mask
from scripts.networks import patchify, unpatchify
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


def batch(seed=0, channels=1):
    volume = noise(2, channels, 16, 16, 16, seed=seed).cumsum(dim=2)
    hidden = torch.rand(2, 64, generator=torch.Generator().manual_seed(seed)) > 0.25
    valid = torch.rand(2, 64, generator=torch.Generator().manual_seed(seed + 1)) > 0.1
    prediction = {
        "mae_mask_1d": (hidden & valid).float(),
        "valid_for_masking_mask": valid,
        "reconstructed_cube": volume,
    }
    return {"image": volume, "pred": prediction, "label": patchify(volume, 4)}


def visible(one):
    """Which patches of a batch can be seen, ``(B, N)`` bool."""
    return one["pred"]["valid_for_masking_mask"] & ~one["pred"]["mae_mask_1d"].bool()


def losses_of(channels):
    return {
        "l2": MaskedL2Loss(),
        "normalised_l2": MaskedL2Loss(normalise_target=True),
        "structural": StructuralLoss(4, channels, 4),
    }


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
    one, seen = batch()["image"], visible(batch())
    changed = torch.where(voxel_mask(one, seen), one, 99.0)
    assert torch.equal(BASELINES[name](one, seen), BASELINES[name](changed, seen))


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_is_measured_as_a_network_that_says_the_same(name):
    batches = [batch(0), batch(3)]
    found = measured(BaselineMetrics(MaskedL2Loss()), *batches)[name]
    for one in batches:
        one["pred"]["reconstructed_cube"] = BASELINES[name](one["image"], visible(one))
    assert found == pytest.approx(measured(HiddenVoxelMetrics(2.0), *batches)["unexplained"])


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("chosen", ["l2", "normalised_l2", "structural", "l2+structural"])
def test_the_loss_to_beat_is_the_smallest_of_networks_that_say_what_baselines_do(chosen, channels):
    loss, batches, losses = choose_loss(chosen, losses_of(channels)), [batch(0, channels), batch(3, channels)], []
    found = measured(BaselineMetrics(loss), *batches)["loss"]
    for baseline in BASELINES.values():
        for one in batches:
            patches = patchify(baseline(one["image"], visible(one)), 4)
            if chosen == "normalised_l2":  # such a network predicts standardised patches
                patches = (patches - patches.mean(2, keepdim=True)) / (patches.var(2, False, True) + 1e-6).sqrt()
            one["pred"]["reconstructed_patches"] = patches
        losses.append(measured(MaskedLossMetrics(loss), *batches)["loss"])
    assert found == pytest.approx(min(losses), rel=1e-4)
    assert max(losses) > 1.01 * found


def test_what_a_network_is_told_of_hidden_patches_a_baseline_is_told_too():
    # With a normalised target, a prediction is put back by the target's own mean and deviation, see RestoreIntensities.
    one, loss = batch(), losses_of(1)["normalised_l2"]
    found = measured(BaselineMetrics(choose_loss("normalised_l2", losses_of(1))), one)
    means = loss.restore(torch.zeros_like(one["label"]), one["label"])  # what the mean of visible patches around says
    one["pred"]["reconstructed_cube"] = unpatchify(means, 4, (4, 4, 4))
    assert found["mean"] == pytest.approx(measured(HiddenVoxelMetrics(2.0), one)["unexplained"], rel=1e-4)


def test_baselines_are_computed_once():
    metric = BaselineMetrics(MaskedL2Loss())
    first = measured(metric, batch(0))
    assert measured(metric, {"image": None, "pred": None, "label": None}) == first
