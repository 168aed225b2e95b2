"""Promises of the losses."""

import pytest
import torch
from conftest import noise
from ignite.engine import Engine
from torch.nn.functional import huber_loss

from scripts.losses import MaskedL2Loss, MaskedLoss, StructuralLoss, SumOfLosses, TissueWeightedLoss, choose_loss
from scripts.metrics import MaskedLossMetrics
from scripts.networks import patchify


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


class MaskedHuberLoss(MaskedLoss):
    """All it takes to add a loss, and a line in train.yaml: `huber: {_target_: scripts.losses.MaskedHuberLoss}`."""

    def __init__(self):
        super().__init__({"huber": 1.0})

    def patch_errors(self, prediction, target):
        return {"huber": huber_loss(prediction, target, reduction="none").mean(dim=-1)}


def test_a_loss_of_ones_own_is_trained_added_up_conducted_and_validated_like_any_other():
    prediction, target = noise(2, 6, 512), noise(2, 6, 512, seed=1)
    hidden = (noise(2, 6, seed=2) > 0).float()
    expected = huber_loss(prediction[hidden.bool()], target[hidden.bool()])
    loss = choose_loss("huber+l2", choice() | {"huber": MaskedHuberLoss()})
    total, parts = loss.score(output(prediction, hidden), target)
    torch.testing.assert_close(parts["huber"], expected)
    torch.testing.assert_close(total - parts["l2"], expected)
    assert list(loss.tasks(parts)) == list(loss.weights) == ["huber", "l2"]
    assert list(MaskedLossMetrics(loss).by_name("loss")) == ["val_loss", "val_huber", "val_l2"]


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
    total, parts = loss.score(output(prediction, hidden), target)
    cubes = [
        patches.reshape(2, 6, 2, 4, 2, 4, 2, 4).permute(0, 1, 2, 4, 6, 3, 5, 7).reshape(2, 6, 8, 64)[hidden.bool()]
        for patches in (prediction, target)
    ]
    means, deviations = zip(*((cube.mean(dim=-1), cube.std(dim=-1, correction=0)) for cube in cubes), strict=True)
    standard = [(cube - m[..., None]) / s[..., None] for cube, m, s in zip(cubes, means, deviations, strict=True)]
    torch.testing.assert_close(parts["brightness"], (means[0] - means[1]).square().mean())
    torch.testing.assert_close(parts["contrast"], (deviations[0] - deviations[1]).square().mean())
    torch.testing.assert_close(parts["structure"], (standard[0] - standard[1]).square().mean())
    torch.testing.assert_close(total, 0.3 * parts["brightness"] + 0.2 * parts["contrast"] + 0.5 * parts["structure"])


def test_structure_ignores_brightness_and_contrast_and_they_ignore_structure():
    target, hidden = noise(1, 4, 512), torch.ones(1, 4)
    loss = structural(epsilon=1e-4)
    relit = loss.score(output(3 * target + 2, hidden), target)[1]
    assert relit["structure"] < 1e-5
    assert relit["brightness"] > 1
    mirrored = target.reshape(1, 4, 2, 4, 2, 4, 2, 4).flip(3).reshape(1, 4, 512)
    moved = loss.score(output(mirrored, hidden), target)[1]
    assert moved["brightness"] < 1e-10
    assert moved["contrast"] < 1e-10
    assert moved["structure"] > 1


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
    _, parts = structural(in_chans=2).score(output(shifted.reshape(1, 4, 1024), hidden), target)
    assert parts["brightness"].item() == pytest.approx(4.5)  # 3² in one of two channels
    assert parts["structure"] < 1e-6


def test_structural_statistics_are_float32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = (100 + 0.1 * noise(1, 4, 512)).bfloat16()
        loss, parts = structural().score(output(prediction, torch.ones(1, 4)), prediction.float())
        assert loss.dtype == torch.float32
        assert parts["structure"] == 0


def test_sub_patches_must_fill_a_patch():
    with pytest.raises(ValueError, match="sub_patch_size 8 must divide patch_size 4, for example 4"):
        StructuralLoss(patch_size=4)


def tissue(**settings):
    return TissueWeightedLoss(structural(), (32, 32, 32), hu_scale=500.0, hu_offset=-20.0, **settings)


def body():
    """Air (-1000 HU), in it a body of soft tissue (40 HU) that fills 24 x 32 x 32, in that a bone of 16³ (900 HU)."""
    hounsfield = torch.full((1, 1, 32, 32, 32), -1000.0)
    hounsfield[:, :, 8:] = 40
    hounsfield[:, :, 16:, 16:, 16:] = 900
    return (hounsfield + 20) / 500


def test_patches_are_told_apart_by_hounsfield_units_and_the_surface_of_bone_is_a_shell():
    target = patchify(body(), 8)
    groups = {name: group.reshape(4, 4, 4) for name, group in tissue(dilation=4, erosion=2).groups(target).items()}
    soft = torch.zeros(4, 4, 4)
    soft[1:], soft[2:, 2:, 2:] = 1, 0
    assert torch.equal(groups["soft_tissue"], soft)
    # Inside the bone the shell is 2 of 8 voxels deep: more than half of a corner's patch (1 - 6³/8³), but a little
    # less on an edge (1 - 6²/8²); outside, 4 of 8 voxels are no more than half.
    shell = torch.zeros(4, 4, 4)
    shell[2, 2, 2] = 1
    assert torch.equal(groups["bone_surface"], shell)
    deeper = tissue(dilation=6, erosion=2).groups(target)["bone_surface"].reshape(4, 4, 4)
    assert deeper[1, 3, 3] == deeper[3, 1, 3] == deeper[3, 3, 1] == 1
    assert deeper[0].sum() == deeper[1, 0].sum() == 0


def test_each_tissue_weighs_by_its_own_patches_and_an_empty_group_adds_nothing():
    target = patchify(body(), 8)
    prediction = target + noise(*target.shape, seed=1)
    loss = tissue()
    errors = structural().patch_errors(prediction, target)
    error = 0.3 * errors["brightness"] + 0.2 * errors["contrast"] + 0.5 * errors["structure"]
    groups = loss.groups(target)
    hidden = (noise(1, 64, seed=2) > 0).float()
    hidden[groups["bone_surface"].bool()] = 1

    def mean(chosen):
        return error[(hidden * chosen).bool()].mean()

    total = loss(output(prediction, hidden), target)
    expected = 0.3 * mean(1) + 0.5 * mean(groups["soft_tissue"]) + 0.2 * mean(groups["bone_surface"])
    torch.testing.assert_close(total, expected)
    without_bone, parts = loss.score(output(prediction, hidden * (1 - groups["bone_surface"])), target)
    assert parts["bone_surface"] == 0
    assert torch.isfinite(without_bone)


def test_tissues_need_hounsfield_units():
    with pytest.raises(ValueError, match="needs --modality ct"):
        TissueWeightedLoss(structural(), (32, 32, 32), None, None)


def choice():
    return {"l2": MaskedL2Loss(), "structural": structural()}


def test_losses_are_chosen_by_name_and_added_up():
    prediction, target = noise(2, 6, 512), noise(2, 6, 512, seed=1)
    scored = output(prediction, torch.ones(2, 6))
    l2, lcs = (choose_loss(name, choice())(scored, target) for name in ("l2", "structural"))
    both = choose_loss("l2+structural", choice())
    total, parts = both.score(scored, target)
    torch.testing.assert_close(total, l2 + lcs)
    assert list(parts) == ["l2", "structural_brightness", "structural_contrast", "structural_structure"]
    assert both.weights.keys() == both.sums(scored, target).keys() == parts.keys()
    assert list(choose_loss("structural", choice()).weights) == ["brightness", "contrast", "structure"]
    with pytest.raises(ValueError, match="a normalised target is on another scale"):
        choose_loss("l2+normal", {"l2": MaskedL2Loss(), "normal": MaskedL2Loss(normalise_target=True)})
    with pytest.raises(ValueError, match=r"loss 'Structual' must be one of \['l2', 'structural'\].*mean structural"):
        choose_loss("structural+Structual", choice())


@pytest.mark.parametrize(
    ("per", "names"),
    [
        ("component", ["l2", "structural_brightness", "structural_contrast", "structural_structure"]),
        ("loss", ["l2", "structural"]),
    ],
)
def test_tasks_are_components_or_losses_and_add_up_to_the_loss(per, names):
    scored, target = output(noise(2, 6, 512), torch.ones(2, 6)), noise(2, 6, 512, seed=1)
    loss = choose_loss("l2+structural", choice(), per)
    total, components = loss.score(scored, target)
    tasks = loss.tasks(components)
    assert list(tasks) == names
    torch.testing.assert_close(sum(tasks.values()), total)
    with pytest.raises(ValueError, match="per 'patch' must be 'component' or 'loss'"):
        SumOfLosses(choice(), "patch")


def test_validation_losses_are_those_of_all_hidden_patches_together():
    prediction, target = noise(4, 6, 512), noise(4, 6, 512, seed=1)
    hidden = (noise(4, 6, seed=2) > 0).float()
    assert hidden[:2].sum() != hidden[2:].sum()
    loss = choose_loss("structural", choice())
    metrics = MaskedLossMetrics(loss).by_name("loss")
    assert list(metrics) == ["val_loss", "val_brightness", "val_contrast", "val_structure"]
    assert list(MaskedLossMetrics(choose_loss("l2", choice())).by_name("loss")) == ["val_loss"]
    engine = Engine(lambda _, part: {"label": target[part], "pred": output(prediction[part], hidden[part])})
    for name, metric in metrics.items():
        metric.attach(engine, name)
    measured = engine.run([slice(0, 2), slice(2, 4)]).metrics
    total, parts = loss.score(output(prediction, hidden), target)
    assert measured["val_loss"] == pytest.approx(total.item())
    assert measured["val_contrast"] == pytest.approx(parts["contrast"].item())


def test_a_tissue_that_a_batch_lacks_does_not_lower_its_validation_loss():
    target = patchify(body(), 8)
    prediction, loss = target + noise(*target.shape, seed=1), SumOfLosses({"tissue": tissue()})
    air = torch.full_like(target, -2.0)
    parts = [(prediction, target), (air + 0.1 * noise(*air.shape, seed=2), air)]
    together = [torch.cat(pair) for pair in zip(*parts, strict=True)]
    expected = loss(output(together[0], torch.ones(2, 64)), together[1]).item()
    metric = MaskedLossMetrics(loss)["loss"]
    engine = Engine(lambda _, part: {"label": part[1], "pred": output(part[0], torch.ones(1, 64))})
    metric.attach(engine, "loss")
    assert engine.run(parts).metrics["loss"] == pytest.approx(expected, rel=1e-5)


def test_predictions_of_normalised_targets_go_back_to_the_intensity_scale():
    loss, target = MaskedL2Loss(normalise_target=True), 3 * noise(1, 4, 64) + 7
    mean, deviation = target.mean(dim=-1, keepdim=True), target.std(dim=-1, correction=0, keepdim=True)
    torch.testing.assert_close(loss.restore((target - mean) / deviation, target), target)
    assert MaskedL2Loss().restore(target, target) is target
