"""Promises of turning volumes, and of augmenting them one by one or a batch at once."""

import numpy as np
import pytest
import torch
from conftest import noise
from monai.data import MetaTensor
from monai.transforms import Affine, CenterSpatialCrop, Compose, Flip, RandGaussianNoised
from monai.transforms.utils import create_rotate, create_scale, create_translate

from scripts.transforms import Augmentation, RandCTNoised, RandHUWarpd, RandTurnd

SIZE, ROOM = (16, 12, 20), (24, 18, 30)
SETTINGS = {"prob": 1.0, "rotation": 20.0, "scaling": 0.2, "translation": [2.0, 1.0, 3.0]}


def smooth(seed=0):
    """A volume and its mask, on the sides that a crop has before it is turned."""
    axes = np.meshgrid(*(np.linspace(0, 3, side) for side in ROOM), indexing="ij")
    image = sum(np.sin(axis * (2 + seed) + number) for number, axis in enumerate(axes))
    return {
        "image": torch.from_numpy(image).float()[None],
        "fov": torch.from_numpy(image > 0.3).to(torch.uint8)[None],
    }


def turner(**settings):
    return RandTurnd(
        ["image", "fov"], SIZE, mode=["bilinear", "nearest"], padding_mode=["border", "zeros"], **(SETTINGS | settings)
    )


@pytest.mark.parametrize("seed", range(4))
def test_a_turn_is_monais_affine_and_its_flips(seed):
    turn, data = turner(flip_prob=0.5, flip_axes=[0, 2]), smooth()
    turned = turn.set_random_state(seed=seed)(data)
    turn.set_random_state(seed=seed)
    turn.R.uniform()
    angles, shifts, factors = (turn.R.uniform(-1, 1, 3) for _ in range(3))
    flipped = [axis for axis in (0, 2) if turn.R.uniform() < 0.5]
    affine = create_rotate(3, angles * np.deg2rad(20)) @ create_translate(3, shifts * [2, 1, 3])
    affine = affine @ create_scale(3, 1 + 0.2 * factors)
    for key, mode, beyond in (("image", "bilinear", "border"), ("fov", "nearest", "zeros")):
        monais = Affine(affine=affine, spatial_size=SIZE, mode=mode, padding_mode=beyond, image_only=True)
        expected = Compose([monais, Flip(flipped)] if flipped else [monais])(data[key].float())
        difference = (turned[key].float() - expected.as_tensor()).abs()
        assert turned[key].dtype == data[key].dtype
        # A voxel between two others may go to either of them.
        assert difference.max() < 1e-4 if key == "image" else difference.mean() < 1e-3


def test_what_is_not_turned_is_cropped_and_flipped_and_not_resampled():
    data = smooth()
    crop = CenterSpatialCrop(SIZE)(data["image"]).as_tensor()
    found = set()
    turn = turner(prob=0.0, flip_prob=0.5, flip_axes=[0, 1]).set_random_state(seed=0)
    for _ in range(20):
        turned = turn(data)["image"]
        same = [axes for axes in ((), (1,), (2,), (1, 2)) if torch.equal(turned, crop.flip(axes))]
        assert len(same) == 1
        found.add(same[0])
    assert len(found) == 4


def test_turns_are_as_large_as_they_may_be_and_go_either_way():
    turn = turner(prob=0.5, rotation=10.0, scaling=0.1, translation=4.0).set_random_state(seed=0)
    affines = [found.affine for found in (turn.draw() for _ in range(400))]
    kept = np.stack([affine for affine in affines if affine is not None])
    assert len(kept) / 400 == pytest.approx(0.5, abs=0.08)
    factors = np.linalg.norm(kept[:, :3, :3], axis=1)
    assert (factors.min(), factors.max()) == pytest.approx((0.9, 1.1), abs=0.01)
    shifts = np.linalg.norm(kept[:, :3, 3], axis=1)
    assert 5 < shifts.max() < 4 * np.sqrt(3)
    assert np.abs(kept[:, :3, 3].mean(axis=0)).max() < 0.6


def steps():
    hounsfield = {"hu_scale": 500.0, "hu_offset": -20.0}
    return [
        turner(prob=0.6, flip_prob=0.5, flip_axes=[0, 1, 2]),
        RandHUWarpd("image", prob=0.6, **hounsfield),
        RandCTNoised("image", prob=0.6, **hounsfield),
        RandGaussianNoised("image", prob=0.6, std=0.1),  # one of MONAI's
    ]


def test_a_batch_is_augmented_as_its_volumes_are_one_by_one():
    cases = [smooth(seed) for seed in range(5)]
    seeds = [3, 2**31, 5, 7, 11]
    batch = {key: torch.stack([case[key] for case in cases]) for key in cases[0]}
    before = {key: volumes.clone() for key, volumes in batch.items()}
    together = Augmentation(steps()).on_batch(batch, seeds)
    apart = [Augmentation(steps())(case, seed) for case, seed in zip(cases, seeds, strict=True)]
    for key in ("image", "fov"):
        expected = torch.stack([torch.as_tensor(item[key]) for item in apart])
        torch.testing.assert_close(together[key], expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(batch[key], before[key])  # what is kept in the cache stays as it is
    assert not torch.equal(together["image"][0], together["image"][1])


def test_metadata_of_monai_ends_here():
    case = {"image": MetaTensor(smooth()["image"]), "fov": smooth()["fov"]}
    batch = {key: torch.stack([value, value]) for key, value in case.items()}
    for item in (Augmentation(steps())(case, 0), Augmentation(steps()).on_batch(batch, [0, 1])):
        assert {type(value) for value in item.values()} == {torch.Tensor}


def test_an_augmentation_follows_from_the_seed_and_from_nothing_that_was_drawn_before():
    augmentation, data = Augmentation(steps()), smooth()
    first = augmentation(data, 1)["image"]
    other = augmentation(data, 2)["image"]
    assert torch.equal(augmentation(data, 1)["image"], first)
    assert not torch.equal(first, other)


def test_what_was_not_drawn_is_left_to_the_bit():
    volume = noise(3, 1, 8, 8, 8)
    for transform in (RandHUWarpd("image", prob=1.0), RandCTNoised("image", prob=1.0)):
        drawn = [None, transform.set_random_state(seed=0).draw(), None]
        changed = transform.change({"image": volume}, drawn)["image"]
        assert torch.equal(changed[[0, 2]], volume[[0, 2]])
        assert not torch.equal(changed[1], volume[1])
        assert transform.change({"image": volume}, [None] * 3)["image"] is volume
