"""Promises of the losses."""

import pytest
import torch
from conftest import noise

from scripts.losses import MaskedL2Loss, StructuralLoss


def output(patches, hidden):
    return {"reconstructed_patches": patches, "mae_mask_1d": hidden}


def test_the_loss_sees_only_hidden_patches():
    prediction, target = noise(2, 6, 8).requires_grad_(), noise(2, 6, 8, seed=1)
    hidden = torch.tensor([[1, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0]])
    loss = MaskedL2Loss()(output(prediction, hidden), target)
    loss.backward()
    expected = (prediction - target)[hidden.bool()].square().mean()
    torch.testing.assert_close(loss, expected)
    assert torch.equal(prediction.grad.abs().sum(dim=-1) > 0, hidden.bool())


def test_nothing_hidden_costs_nothing():
    assert MaskedL2Loss()(output(noise(1, 4, 8), torch.zeros(1, 4)), noise(1, 4, 8, seed=1)) == 0


def test_half_precision_predictions_are_scored_in_float32():
    loss = MaskedL2Loss()(output(torch.full((1, 2, 8), 300.0).half(), torch.ones(1, 2)), torch.zeros(1, 2, 8))
    assert loss.dtype == torch.float32
    assert loss == 90000  # beyond what half precision holds


def test_a_normalised_target_is_each_patchs_own():
    patches = noise(1, 3, 64) * torch.tensor([1.0, 10.0, 0.0])[None, :, None] + 5
    loss = MaskedL2Loss(normalise_target=True)
    standard = torch.stack([noise(1, 3, 64)[0, 0], noise(1, 3, 64)[0, 1]])
    standard = (standard - standard.mean(dim=-1, keepdim=True)) / standard.std(dim=-1, correction=0, keepdim=True)
    perfect = torch.cat([standard, torch.zeros(1, 64)])[None]  # a flat patch has nothing to say
    assert loss(output(perfect, torch.ones(1, 3)), patches) < 1e-6


def structural(**settings):
    return StructuralLoss(**({"patch_size": 8, "sub_patch_size": 4} | settings))


def test_structural_components_are_those_of_the_sub_patches():
    prediction, target, hidden = noise(2, 6, 512), noise(2, 6, 512, seed=1), (noise(2, 6, seed=2) > 0).float()
    loss = structural(epsilon=1e-6)
    total = loss(output(prediction, hidden), target)
    cubes = [
        patches.reshape(2, 6, 2, 4, 2, 4, 2, 4).permute(0, 1, 2, 4, 6, 3, 5, 7).reshape(2, 6, 8, 64)[hidden.bool()]
        for patches in (prediction, target)
    ]
    means, deviations = zip(*((cube.mean(dim=-1), cube.std(dim=-1, correction=0)) for cube in cubes), strict=True)
    standard = [(cube - m[..., None]) / s[..., None] for cube, m, s in zip(cubes, means, deviations, strict=True)]
    parts = loss.last_components
    torch.testing.assert_close(parts["brightness"], (means[0] - means[1]).square().mean())
    torch.testing.assert_close(parts["contrast"], (deviations[0] - deviations[1]).square().mean())
    torch.testing.assert_close(parts["structure"], (standard[0] - standard[1]).square().mean())
    torch.testing.assert_close(total, 0.3 * parts["brightness"] + 0.2 * parts["contrast"] + 0.5 * parts["structure"])


def test_structure_ignores_brightness_and_contrast_and_they_ignore_structure():
    target, hidden = noise(1, 4, 512), torch.ones(1, 4)
    loss = structural(epsilon=1e-4)
    loss(output(3 * target + 2, hidden), target)
    assert loss.last_components["structure"] < 1e-5
    assert loss.last_components["brightness"] > 1
    loss(output(target.reshape(1, 4, 2, 4, 2, 4, 2, 4).flip(3).reshape(1, 4, 512), hidden), target)
    assert loss.last_components["brightness"] < 1e-10
    assert loss.last_components["contrast"] < 1e-10
    assert loss.last_components["structure"] > 1


@pytest.mark.parametrize("flat", ["target", "prediction", "both"])
def test_gradients_stay_bounded_on_air_and_padding(flat):
    noisy = 1e-6 * noise(1, 4, 512)
    prediction = (torch.zeros(1, 4, 512) if flat != "target" else noisy).requires_grad_()
    target = torch.full((1, 4, 512), -1.7125) if flat != "prediction" else noise(1, 4, 512)
    loss = structural()
    loss(output(prediction, torch.ones(1, 4)), target).backward()
    assert torch.isfinite(prediction.grad).all()
    # Four patches of 512 voxels share the mean; noise is amplified at most 1/epsilon = 100 times.
    assert prediction.grad.abs().max() < 4 * 100 / (4 * 512)


def test_the_structural_loss_keeps_the_channels_apart():
    target, hidden = noise(1, 4, 1024), torch.ones(1, 4)
    shifted = target.clone().reshape(1, 4, 512, 2)
    shifted[..., 1] += 3
    loss = structural(in_chans=2)
    loss(output(shifted.reshape(1, 4, 1024), hidden), target)
    assert loss.last_components["brightness"].item() == pytest.approx(4.5)  # 3² in one of two channels
    assert loss.last_components["structure"] < 1e-6


def test_structural_statistics_are_float32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = (100 + 0.1 * noise(1, 4, 512)).bfloat16()
        loss = structural()
        assert loss(output(prediction, torch.ones(1, 4)), prediction.float()).dtype == torch.float32
        assert loss.last_components["structure"] == 0


def test_sub_patches_must_fill_a_patch():
    with pytest.raises(ValueError, match="sub_patch_size 8 must divide patch_size 4, for example 4"):
        StructuralLoss(patch_size=4)
