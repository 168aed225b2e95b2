"""Promises of the figures of a feature space, on encoders whose answer is known."""

import math

import pytest
import torch
from conftest import noise
from torch.nn import functional as F  # noqa: N812

from scripts.verdict.features import change, dead_channels, effective_rank, look, stretch, summary, token_cosine, turn

SMOOTH = F.interpolate(noise(4, 1, 4, 4, 4), size=(32, 32, 32), mode="trilinear")


def patch_means(volume, valid):
    """An encoder that knows neither places nor neighbours: the mean of each patch, and its square."""
    means = F.avg_pool3d(volume, 8)
    return torch.cat([means, means.square()], dim=1)


def places(volume, valid):
    """An encoder that sees nothing, and knows places alone."""
    return noise(1, 6, 4, 4, 4).expand(len(volume), -1, -1, -1, -1)


def figures(encode, volume=SMOOTH, valid=None):
    valid = torch.ones(len(volume), 64, dtype=torch.bool) if valid is None else valid
    return summary([look(volume, valid, encode)])


def test_the_effective_rank_counts_directions():
    directions = torch.linalg.qr(noise(6, 6))[0]
    assert effective_rank(torch.cat([directions, -directions])) == pytest.approx(6)
    assert effective_rank(noise(50, 1) * torch.ones(1, 6)) == pytest.approx(1, abs=1e-4)
    assert effective_rank(torch.ones(50, 6)) == pytest.approx(1)


def test_channels_that_do_not_vary_are_dead_whatever_they_say():
    tokens = noise(100, 4)
    assert dead_channels(tokens) == 0
    tokens[:, 1] = 3.0
    assert dead_channels(tokens) == 0.25
    assert dead_channels(torch.zeros(10, 4)) == dead_channels(torch.ones(10, 4)) == 1


def test_the_cosine_is_that_of_all_pairs_of_different_tokens():
    tokens = noise(20, 5)
    pairs = F.cosine_similarity(tokens[:, None], tokens[None], dim=2)
    assert token_cosine(tokens) == pytest.approx(pairs[~torch.eye(20, dtype=torch.bool)].mean().item(), abs=1e-6)
    assert token_cosine(torch.ones(3, 5)) == pytest.approx(1)


def test_a_change_is_none_for_the_same_tokens_and_one_for_unrelated_ones():
    tokens = noise(2000, 8)
    assert change(tokens, tokens, tokens) == 0
    assert change(tokens, noise(2000, 8, seed=1), tokens) == pytest.approx(1, abs=0.03)
    assert change(tokens * 0, tokens * 0, tokens * 0) == 0


def test_an_encoder_that_moves_with_the_image_is_unchanged_by_shifts_and_mirroring():
    found = figures(patch_means, 1.5 * SMOOTH + SMOOTH.flip(2))  # symmetric, but for a trifle
    assert found["shift_change"] == pytest.approx(0, abs=1e-5)
    assert found["mirror_change"] == pytest.approx(0, abs=1e-5)
    assert 0 < found["turn_change"] < 0.5
    assert 0 < found["intensity_change"] < 0.5
    assert found["patient_ratio"] > 1


def test_an_encoder_of_places_is_unchanged_by_intensities_and_moves_with_a_shift():
    found = figures(places)
    assert found["intensity_change"] == found["turn_change"] == 0
    assert found["shift_change"] == pytest.approx(1, abs=0.2)
    assert found["patient_ratio"] == 1  # patients and crops are all the same


def test_mirroring_is_judged_where_volumes_are_symmetric_themselves():
    assert "mirror_change" not in figures(patch_means)
    assert "mirror_change" in figures(patch_means, SMOOTH + SMOOTH.flip(2))
    assert "mirror_change" not in figures(patch_means, torch.ones_like(SMOOTH))


def test_patches_outside_the_field_of_view_count_nowhere():
    valid = torch.ones(4, 4, 4, 4, dtype=torch.bool)
    valid[:, :, :, 0] = valid[:, 0] = False  # not symmetric, and seen in the shifted grid
    valid = valid.flatten(1)

    def noisy_outside(volume, seen):
        return patch_means(volume, seen).masked_fill(~seen.unflatten(1, (4, 4, 4))[:, None], 99.0)

    symmetric = SMOOTH + SMOOTH.flip(2)
    assert figures(patch_means, symmetric, valid) == figures(noisy_outside, symmetric, valid)


def test_looks_at_batches_are_one_look_at_all_volumes():
    valid = torch.ones(4, 64, dtype=torch.bool)
    apart = summary([look(SMOOTH[i : i + 2], valid[i : i + 2], patch_means) for i in (0, 2)])
    assert apart == pytest.approx(figures(patch_means))
    assert "patient_ratio" not in figures(patch_means, SMOOTH[:1])


@pytest.mark.parametrize("sides", [(32, 32, 16), (32, 48, 16), (48, 32, 16)])
@pytest.mark.parametrize(("axis", "sign"), [(0, 1), (1, -1)])
def test_a_turn_moves_the_border_by_a_quarter_of_a_patch(sides, axis, sign):
    place, across = (torch.arange(float(side)) - (side - 1) / 2 for side in (sides[axis], sides[1 - axis]))
    shape = [1, 1, 1, 1, 1]
    shape[2 + axis] = -1
    turned = turn(place.view(shape).expand(1, 1, *sides), 8)[0, 0, :, :, 0].select(axis, sides[axis] // 2)
    angle = math.atan(2 / (max(sides[:2]) / 2))
    assert torch.allclose(turned, math.cos(angle) * 0.5 + sign * math.sin(angle) * across, atol=1e-4)


def test_stretched_intensities_stay_in_their_range():
    volume = noise(2, 1, 8, 8, 8)
    wide = stretch(volume)
    assert torch.equal(wide.amax(dim=(1, 2, 3, 4)), volume.amax(dim=(1, 2, 3, 4)))
    assert wide.std() > volume.std()


def test_a_single_token_has_one_direction_and_does_not_change():
    token = torch.ones(1, 4)
    assert effective_rank(token) == 1.0
    assert change(token[:0], token[:0], torch.randn(5, 4)) == 0.0
