"""Promises of the field of view, of padding, and of the intensity augmentation."""

import monai
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose

from scripts.transforms import (
    FieldOfViewd,
    ForegroundMaskd,
    RandCTNoised,
    RandHUWarpd,
    ValuePadd,
    cylinder,
    detect_field_of_view,
)

SCALE = {"hu_scale": 500.0, "hu_offset": -20.0}
ANCHORS, SHIFTS = np.array([-500, -80, 15, 45, 90, 1000, 1500]), np.array([0, 25, 10, 8, 6, 20, 0])


def scan(shape=(40, 36, 20), padding=-1024, radius=15):
    """A noisy cylinder in constant padding, with an organ as constant as the padding in it."""
    voxels = np.random.default_rng(0).normal(0, 30, (1, *shape)).round()
    inside = cylinder(shape, radius)
    voxels[0][~inside] = padding
    voxels[0, 18:23, 16:21, 8:12] = padding
    return voxels.astype(np.float32), inside


def test_a_cylinder_has_its_radius_its_centre_and_runs_along_its_axis():
    inside = cylinder((41, 31, 5), radius=10, centre_offset=(3, -2))
    assert inside.all(axis=2).sum() == inside.any(axis=2).sum() == pytest.approx(np.pi * 100, rel=0.03)
    places = np.argwhere(inside)
    assert places.mean(axis=0) == pytest.approx([23, 13, 2])
    assert places.max(axis=0).tolist() == [33, 23, 4]
    lying = cylinder((5, 41, 31), radius=10, centre_offset=(3, -2), axis=0)
    assert np.array_equal(lying, inside.transpose(2, 0, 1))


@pytest.mark.parametrize("padding", [-1024, 0, 3000])
def test_padding_is_found_whatever_its_value_and_what_is_as_constant_inside_is_no_padding(padding):
    voxels, inside = scan(padding=padding)
    found = detect_field_of_view(voxels)
    touching = found != inside  # a voxel of the rim may happen to have the padding's value
    assert touching.mean() < 0.002
    assert found[18:23, 16:21, 8:12].all()


def test_a_volume_without_padding_is_seen_whole():
    voxels = np.random.default_rng(0).normal(0, 30, (1, 20, 20, 20)).round()
    assert detect_field_of_view(voxels).all()
    assert detect_field_of_view(np.zeros((1, 4, 4, 4)) + np.arange(4)).mean() > 0.5


def test_padding_is_constant_in_all_channels():
    voxels, inside = scan()
    noisy = np.random.default_rng(1).normal(0, 30, voxels.shape)
    assert detect_field_of_view(np.concatenate([voxels, noisy])).all()
    both = detect_field_of_view(np.concatenate([voxels, np.where(inside, noisy, 7.0)]))
    assert (both != inside).mean() < 0.002


def test_a_field_of_view_lies_where_its_volume_does_and_the_cases_cylinder_comes_first():
    voxels, inside = scan()
    image = MetaTensor(torch.from_numpy(voxels), affine=torch.diag(torch.tensor([-2.0, -2.0, 3.0, 1.0])))
    detected = FieldOfViewd("image")({"image": image})["fov"]
    given = FieldOfViewd("image")({"image": image, "field_of_view": {"radius": 5, "centre_offset": [1, 1]}})["fov"]
    assert torch.equal(detected.affine, image.affine)
    assert (detected.shape, detected.dtype) == ((1, 40, 36, 20), torch.uint8)
    assert (np.asarray(detected[0]).astype(bool) != inside).mean() < 0.002
    assert np.array_equal(np.asarray(given[0]).astype(bool), cylinder((40, 36, 20), 5, (1, 1)))


def test_lungs_belong_to_the_body_and_air_around_it_does_not():
    body = np.full((1, 30, 30, 6), -1000.0)
    body[0, 5:25, 5:25] = 40
    body[0, 10:20, 8:14] = -850  # a lung, open at both ends of the volume
    mask = ForegroundMaskd("image", threshold=-500)({"image": MetaTensor(torch.from_numpy(body))})["fov"]
    assert mask.sum() == 20 * 20 * 6
    assert mask[0, 10:20, 8:14].all()


def warped(hounsfield, seed=0, **settings):
    warp = RandHUWarpd("image", **({"prob": 1.0} | settings))
    moved = warp.set_random_state(seed=seed).draw()
    return warp.set_random_state(seed=seed)({"image": hounsfield})["image"], moved


def test_the_warp_is_monotonic_and_bounded_by_its_anchors():
    hounsfield = torch.linspace(-1100, 2500, 36001).reshape(1, -1, 1, 1)
    limit = torch.from_numpy(np.interp(hounsfield.numpy(), ANCHORS, SHIFTS))
    moves = []
    for seed in range(50):
        bent, moved = warped(hounsfield, seed)
        moves.append(bent - hounsfield)
        assert (bent.diff(dim=1) > 0).all()
        assert (moves[-1].abs() <= limit + 1e-2).all()
        at_anchors = np.interp(ANCHORS, hounsfield.flatten(), bent.flatten())
        assert at_anchors == pytest.approx(moved, abs=1e-2)
    assert max(move.max() for move in moves) > 20  # the shifts are used
    assert torch.stack(moves).mean(dim=0).abs().max() < 10  # and go either way


def test_anchors_keep_their_order_even_when_their_shifts_would_cross():
    hounsfield = torch.linspace(-50, 150, 2001).reshape(1, -1, 1, 1)
    for seed in range(20):
        bent, moved = warped(hounsfield, seed, anchors=[0, 10, 100], shifts=[50, 50, 50])
        assert (np.diff(moved) >= 0).all()
        assert (bent.diff(dim=1) >= -1e-3).all()
    with pytest.raises(ValueError, match=r"anchors \[10, 0\] must rise"):
        RandHUWarpd("image", anchors=[10, 0], shifts=[1, 1])


@pytest.mark.parametrize("transform", [RandHUWarpd, RandCTNoised])
def test_augmentation_is_the_same_in_hounsfield_units_whatever_the_scale(transform):
    hounsfield = 300 * torch.randn(1, 12, 10, 9, generator=torch.Generator().manual_seed(0))
    plain, scaled = transform("image", prob=1.0), transform("image", prob=1.0, **SCALE)
    for each in (plain, scaled):
        each.set_random_state(seed=3)
    changed = plain({"image": hounsfield})["image"]
    again = scaled({"image": (hounsfield + 20) / 500})["image"] * 500 - 20
    assert (changed - hounsfield).abs().max() > 1
    torch.testing.assert_close(again, changed, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("transform", [RandHUWarpd, RandCTNoised])
def test_a_seed_fixes_the_augmentation_and_its_probability_holds(transform):
    volume = torch.zeros(1, 8, 8, 8)
    seeded = [transform("image", prob=1.0).set_random_state(seed=seed) for seed in (1, 1, 2)]
    first, again, other = (each({"image": volume})["image"] for each in seeded)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    sometimes = transform("image", prob=0.3).set_random_state(seed=0)
    share = np.mean([not torch.equal(sometimes({"image": volume})["image"], volume) for _ in range(400)])
    assert share == pytest.approx(0.3, abs=0.07)
    assert not volume.any()  # what came in stays as it was


def noise_of(hounsfield, dose, seed=0):
    transform = RandCTNoised("image", prob=1.0, dose=(dose, dose * (1 + 1e-9)))
    transform.set_random_state(seed=seed)
    volume = torch.full((1, 48, 48, 48), float(hounsfield))
    return transform({"image": volume})["image"] - volume


@pytest.mark.parametrize("hounsfield", [-1000, 0, 1000])
@pytest.mark.parametrize("dose", [800, 9000])
def test_noise_grows_with_density_and_falls_with_dose(hounsfield, dose):
    added = noise_of(hounsfield, dose)
    grain, electronic = 578.02 * np.exp(0.0015 * hounsfield) / np.sqrt(dose), 578.02 * 0.0015
    assert added.std().item() == pytest.approx(np.hypot(grain, electronic), rel=0.02)
    assert abs(added.mean().item()) < 0.1 * added.std().item()


def test_noise_is_grainy_and_reaches_the_border_evenly():
    added = noise_of(0, 800)[0]
    neighbours = np.corrcoef(added[:, :, :-1].flatten(), added[:, :, 1:].flatten())[0, 1]
    distant = np.corrcoef(added[:, :, :-12].flatten(), added[:, :, 12:].flatten())[0, 1]
    assert neighbours > 0.6
    assert abs(distant) < 0.05
    assert added[0].std().item() == pytest.approx(added.std().item(), rel=0.15)


def test_doses_are_drawn_evenly_by_their_logarithm():
    transform = RandCTNoised("image", prob=1.0).set_random_state(seed=0)
    doses = np.log([transform.draw().dose for _ in range(2000)])
    assert np.quantile(doses, [0, 0.5, 1]) == pytest.approx(np.log([800, np.sqrt(800 * 9000), 9000]), abs=0.06)


PADS = [
    (monai.transforms.SpatialPad, monai.transforms.SpatialPadd, {"spatial_size": (12, 10, 4)}),
    (monai.transforms.DivisiblePad, monai.transforms.DivisiblePadd, {"k": 4}),
    (monai.transforms.BorderPad, monai.transforms.BorderPadd, {"spatial_border": [1, 2, 3]}),
]


@pytest.mark.parametrize(("pad", "dictionary", "settings"), PADS)
def test_a_pad_with_a_value_a_key_is_monais_pad_of_each(pad, dictionary, settings):
    data = {
        "image": MetaTensor(torch.randn(1, 9, 7, 5), affine=torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0]))),
        "fov": MetaTensor(torch.ones(1, 9, 7, 5, dtype=torch.uint8)),
        "case": "a",
    }
    together = ValuePadd(["image", "fov"], pad(**settings), value=[-1.5, 0])
    apart = Compose([dictionary("image", **settings, value=-1.5), dictionary("fov", **settings)])
    ours, theirs = together(data), apart(data)
    for key in ("image", "fov"):
        assert torch.equal(ours[key], theirs[key])
        assert torch.equal(ours[key].affine, theirs[key].affine)
        assert ours[key].dtype == data[key].dtype
    assert ours["case"] == "a"
    undone = together.inverse(ours)
    assert torch.equal(undone["image"], data["image"])
    assert together({"image": data["image"]}).keys() == {"image"}  # a case without a mask
