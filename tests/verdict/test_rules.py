"""Promises of the verdict: it is right on runs that were made to fail, and each rule holds for its own reason alone."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from scripts.verdict import Facts, judge
from scripts.verdict.rules import suggested_epochs

# Recorded: pre-trainings of the small network on the T1 volumes of IXI, and what was made of them.
RUNS = json.loads((Path(__file__).parent / "runs.json").read_text())
BASELINES = {"val_baseline_mean": 0.7, "val_baseline_nearest": 1.1, "val_baseline_blur": 0.6}
VARIANCE = 0.1  # of hidden voxels, of an intensity window of 1
SPREAD = {"val_effective_rank": 20.0, "val_dead_channels": 0.0, "val_token_cosine": 0.4}


def made(left, train=None, **more):
    """Records of a run that validates every epoch: its curve, and training losses in proportion or given."""
    return [
        {"epoch": epoch, "train_loss": (train or left)[epoch - 1], "val_loss": value, "val_unexplained": value}
        | {"val_psnr": 10 * math.log10(1 / (VARIANCE * value)) if value > 0 else math.inf}
        | BASELINES
        | SPREAD
        | more
        for epoch, value in enumerate(left, start=1)
    ]


def falling(floor=0.3, span=5.0, epochs=20):
    return [floor + 0.5 * math.exp(-epoch / span) for epoch in range(1, epochs + 1)]


def verdict(records, max_epochs=None, **facts):
    return judge(records, Facts(max_epochs or records[-1]["epoch"], 100, **facts))


@pytest.mark.parametrize(
    ("run", "name", "knob"),
    [
        ("healthy", "healthy", None),
        ("structural", "healthy", None),
        ("structural_40_epochs", "under-trained", "max_epochs"),
        ("stopped_early", "under-trained", "resume"),
        ("rate_ten_times_too_high", "collapsed", "learning_rate"),
        ("constant_volumes", "too easy", "field_of_view"),
        ("three_volumes", "over-fitted", "affine_prob"),
        ("shuffled_voxels", "nothing to learn", "dataset_dir"),
    ],
)
def test_the_verdict_on_a_recorded_run_is_right(run, name, knob):
    found = judge(RUNS[run]["records"], Facts(**RUNS[run]["facts"]))
    assert (found.name, found.knob) == (name, knob)
    assert found.paragraph.startswith(name.capitalize() + ": ")


@pytest.mark.parametrize("done", [1, 2, 3, 6, 9, 12])
def test_a_healthy_run_that_is_stopped_is_under_trained_whenever_that_is(done):
    records = [line | BASELINES for line in RUNS["healthy"]["records"][:done]]
    assert verdict(records, max_epochs=100).name == "under-trained"


@pytest.mark.parametrize("looks", range(2, 13))
def test_a_structural_run_is_no_collapse_on_its_way(looks):
    # Its features vary along one direction alone after 20 epochs, where its loss is still that of a baseline, and after
    # 40 and 60 it leaves more of the voxels unexplained than a blur.
    found = verdict(RUNS["structural"]["records"][:looks], max_epochs=200)
    assert found.name == "under-trained"
    assert ("The network is better" in found.paragraph) == (looks > 4)


def test_a_run_that_stopped_by_itself_is_not_under_trained():
    records = made(falling())
    assert verdict(records, max_epochs=100).name == "under-trained"
    assert verdict(records, max_epochs=100, stopped_early=True).name == "healthy"


def test_a_run_hears_how_many_epochs_are_worth_it_once_its_curve_says_so():
    longer = made(falling(span=10.0))
    assert "at least" in verdict(longer).paragraph
    assert "more epochs would bring little" in verdict(made(falling(span=2.0))).paragraph
    assert "would bring little" not in verdict(made(falling(span=2.0)), max_epochs=100).paragraph
    assert "too few validations to say" in verdict(longer[:5], max_epochs=100).paragraph


def test_records_of_something_else_get_no_verdict():
    assert judge([], Facts(3, 4)) is None
    assert judge([{"epoch": 1, "val_loss": 0.5, "train_loss": 0.5}], Facts(3, 4)) is None


def test_an_untrained_networks_validation_is_no_part_of_the_curve():
    untrained = {**made([9.0])[0], "epoch": 0, "train_loss": None}
    records = made(falling(span=10.0))
    assert verdict([untrained, *records]) == verdict(records)


def test_a_loss_that_is_not_finite_is_the_first_thing_to_say():
    assert verdict(made([1.0] * 5), failure="the loss is nan").name == "diverged"


@pytest.mark.parametrize(("left", "name"), [(0.049, "too easy"), (0.06, "healthy"), (math.nan, "too easy")])
def test_a_network_that_leaves_nothing_had_little_to_learn(left, name):
    assert verdict(made([left] * 6)).name == name


def test_losses_of_zero_are_too_easy_too():
    assert verdict(made([0.0] * 6)).name == "too easy"


@pytest.mark.parametrize(("deviation", "name"), [(0.049, "too easy"), (0.06, "nothing to learn")])
def test_voxels_that_hardly_differ_are_too_easy_also_where_nothing_explains_how(monkeypatch, deviation, name):
    monkeypatch.setitem(globals(), "VARIANCE", deviation**2)
    records = made([1.0] * 6, val_baseline_mean=1.0, val_baseline_blur=1.0)
    assert verdict(records).name == name


def test_a_baseline_that_leaves_nothing_left_little_to_learn():
    assert verdict(made(falling(), val_baseline_blur=0.04)).name == "too easy"


@pytest.mark.parametrize(("baseline", "name"), [(1.0, "nothing to learn"), (0.9, "collapsed")])
def test_noise_is_what_no_baseline_explains_either(baseline, name):
    assert verdict(made([1.0] * 6, val_baseline_mean=baseline, val_baseline_blur=1.2)).name == name


@pytest.mark.parametrize(
    "features", [{"val_effective_rank": 1.9}, {"val_dead_channels": 0.6}, {"val_token_cosine": 0.999}]
)
def test_features_that_are_all_alike_have_collapsed_if_the_network_is_no_better_than_a_blur(features):
    slowly = [0.9 - 0.02 * epoch for epoch in range(10)]
    assert verdict(made(slowly)).name == "under-trained"
    assert verdict(made(slowly, **features)).name == "collapsed"
    assert verdict(made(slowly[:3], **features)).name == "under-trained"  # too early to say


def test_features_that_are_narrow_yet_need_more_epochs_though_the_loss_is_better_than_a_blur():
    found = verdict(made(falling(), val_effective_rank=1.9))
    assert (found.name, found.knob) == ("under-trained", "max_epochs")
    assert "The features vary along 1.9 directions" in found.paragraph
    for features in ({}, {"val_dead_channels": 0.6}, {"val_token_cosine": 0.999}):
        assert verdict(made(falling(), **features)).name == "healthy"


def test_an_error_that_stands_still_above_a_blur_has_collapsed_without_a_look_at_features():
    records = [{key: value for key, value in line.items() if key not in SPREAD} for line in made([0.8] * 6)]
    assert verdict(records).name == "collapsed"
    assert verdict(made([0.5] * 6)).name == "healthy"


def test_a_network_is_judged_by_what_is_trained_also_where_its_squared_error_is_above_a_blurs():
    structural = verdict(made([0.65] * 6, val_baseline_loss=0.7))
    assert structural.name == "healthy"
    assert "a loss of 0.65 against 0.7, although with 0.65 of the variance" in structural.paragraph
    assert verdict(made([0.55] * 6, val_baseline_loss=0.5)).name == "collapsed"
    assert "a loss of 0.3" in verdict(made(falling(), val_baseline_loss=0.4)).paragraph
    short = verdict(made(falling(), val_baseline_loss=0.2))
    assert short.name == "under-trained"
    assert "would bring little" not in short.paragraph


@pytest.mark.parametrize(("loss", "name"), [(0.69, "collapsed"), (0.67, "healthy")])
def test_a_network_that_says_the_same_of_all_patches_is_no_better_by_a_hair(loss, name):
    assert verdict(made([loss] * 6, val_baseline_loss=0.7)).name == name


def test_figures_of_loss_and_voxels_are_those_of_one_network():
    records = [line | {"val_unexplained": left} for line, left in zip(made(falling()), range(1, 21), strict=True)]
    assert verdict(records).figures["unexplained"] == 20


def test_a_curve_is_that_of_what_is_trained():
    records = [line | {"val_unexplained": 0.5} for line in made(falling(span=10.0))]
    assert verdict(records).figures["suggested_epochs"] == verdict(made(falling(span=10.0))).figures["suggested_epochs"]


def test_a_gap_that_was_there_from_the_start_is_no_over_fitting():
    curve = falling()
    apart = [value / 2 for value in curve]
    assert verdict(made(curve, train=apart)).name == "healthy"
    late = [2 * curve[0], *curve[1:]]  # the first epoch's mean is of a network that knew nothing
    assert verdict(made(curve, train=late)).name == "healthy"
    by_heart = verdict(made([0.8] * 20, train=falling()))  # no better than a blur, and standing still
    assert by_heart.name == "over-fitted"
    growing = [value / (1 + epoch / 20) for epoch, value in enumerate(curve)]
    assert verdict(made(curve, train=growing)).name == "over-fitted"


@pytest.mark.parametrize("span", [2.0, 10.0, 40.0])
def test_the_epochs_that_a_curve_suggests_are_where_a_fifth_more_brings_two_percent(span):
    curve = [(epoch, 0.3 + 0.5 * math.exp(-epoch / span)) for epoch in range(1, 21)]
    candidates = np.arange(20, 201)
    now, later = (0.3 + 0.5 * np.exp(-candidates * more / span) for more in (1, 1.2))
    expected = candidates[(now - later) < 0.02 * now][0]
    assert suggested_epochs(curve) == pytest.approx(expected, rel=0.06)


def test_a_curve_without_an_end_suggests_ten_times_as_many_epochs_and_one_at_its_end_none():
    assert suggested_epochs([(epoch, 1 - 0.01 * epoch) for epoch in range(1, 21)]) in range(60, 201)
    assert suggested_epochs([(epoch, 0.5) for epoch in range(1, 21)]) == 20


def test_figures_are_finite_or_null_and_the_paragraph_is_plain():
    for run in RUNS.values():
        found = judge(run["records"], Facts(**run["facts"]))
        json.dumps(found._asdict(), allow_nan=False)
        assert "nan" not in found.paragraph
        assert "None" not in found.paragraph
    assert verdict(made([math.nan] * 6)).figures["unexplained"] is None


def test_of_a_loss_within_patches_a_constant_guess_scores_one_as_of_the_others():
    # What the patches' own means tell is given away: little of the variance of voxels is left, by whatever network.
    easy = [record | {"val_unexplained": 0.04, "val_baseline_loss": 0.9} for record in made(falling())]
    assert verdict(easy).name == "too easy"
    found = verdict(easy, within_patches=True)
    assert found.name == "healthy"
    assert "0.31 of the variance within hidden patches unexplained against 0.90" in found.paragraph
    noise = [record | {"val_loss": 1.0, "val_unexplained": 0.04, "val_baseline_loss": 1.0} for record in easy]
    assert verdict(noise, within_patches=True).name == "nothing to learn"
