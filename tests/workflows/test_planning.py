"""Promises of the plan: settings that fit the volumes and the machine, with reasons."""

import json

import nibabel as nib
import numpy as np
import pytest
import yaml
from conftest import bundle, train, write_volume
from monai.bundle import ConfigParser

from scripts.data import Index
from scripts.mistakes import Mistake
from scripts.workflows import Cohort, about_schedule, grid_of, look_at, spacing_of
from scripts.workflows.planning.choices import WINDOWS, about_network


def facts_of(shape, spacing, order=(0, 1, 2)):
    return {"shape": [1, *shape], "spacing": list(spacing), "axes": "".join("RAS"[axis] for axis in order)}


def ct(path, seed=0):
    generator = np.random.default_rng(seed)
    voxels = np.where(generator.random((20, 20, 20)) < 0.5, 40, -1000) + generator.normal(0, 10, (20, 20, 20))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels.astype(np.int16), np.eye(4)), path)


def test_a_cohort_of_one_spacing_stays_as_it_is():
    spacing, why = spacing_of([facts_of((50, 60, 70), (2.0, 2.0, 2.001))] * 5)
    assert spacing is None
    assert "stay as they are" in why


def test_the_spacing_is_the_median_in_the_order_of_space():
    turned = facts_of((50, 60, 70), (2.5, 1.0, 2.0), order=(2, 0, 1))
    spacing, _ = spacing_of([facts_of((60, 70, 50), (1.0, 2.0, 2.5)), turned, facts_of((60, 70, 50), (1.5, 2.0, 3.0))])
    assert spacing == [1.0, 2.0, 2.5]


def test_many_volumes_are_drawn_250_times_each_and_few_for_as_long_as_the_quick_start():
    def drawn(count):
        cohort = Cohort([], [], "mr", 1, [], [], {"training": [{}] * count, "validation": [{}]}, True)
        schedule = {name: value for name, (value, _) in about_schedule(cohort, 4).items()}
        parser = ConfigParser(schedule | {"recipe": "pretraining"})
        return parser.get_parsed_content("max_epochs") * schedule["iterations_per_epoch"] * 4

    assert [drawn(count) for count in (8, 122, 1000)] == [9600, 191 * 160, 250_000]


@pytest.mark.parametrize(
    ("recipe", "loss", "rate", "epochs", "warmup", "patience"),
    [("pretraining", "structural", 0.0015, 60, 3, 15), ("conductor", "structural", 0.00003, 60, 0, 15),
     ("stem_tuning", "l2", 0.001, 15, 1, 15), ("segmentation", "l2", 0.006, 20, 1, 20),
     ("classification", "l2", 0.001, 20, 1, 20)],
)  # fmt: skip
def test_a_plan_that_lies_over_another_recipe_leaves_it_its_loss_rate_and_schedule(
    recipe, loss, rate, epochs, warmup, patience, tmp_path
):
    facts = [facts_of((50, 60, 70), (2.0, 2.0, 2.0))] * 5
    cohort = Cohort([], [], "mr", 1, [], facts, {"training": [{}] * 4, "validation": [{}]}, True)
    choices = about_network(cohort, "cpu", tmp_path) | about_schedule(cohort, 4)
    parser = ConfigParser({name: value for name, (value, _) in choices.items()} | {"recipe": recipe})
    names = ("loss", "learning_rate", "max_epochs", "warmup_epochs", "early_stop_patience")
    assert tuple(map(parser.get_parsed_content, names)) == (loss, rate, epochs, warmup, patience)


def test_of_thick_slices_the_finer_volumes_count():
    cohort = [facts_of((9, 9, 9), (0.5, 0.5, thick)) for thick in (6.0, 6.0, 5.0, 5.0, 5.0, 2.0, 1.0)]
    spacing, why = spacing_of(cohort)
    assert spacing[:2] == [0.5, 0.5]
    assert 1.0 < spacing[2] < 5.0
    assert "10.0 times coarser" in why


@pytest.mark.parametrize("shape", [(35, 50, 36), (512, 512, 300), (90, 120, 120), (20, 200, 200), (8, 8, 8)])
@pytest.mark.parametrize(("patch_size", "tokens"), [(8, 512), (8, 1000), (16, 2744)])
def test_a_grid_covers_the_volume_as_far_as_its_tokens_go_and_windows_divide_it(shape, patch_size, tokens):
    grid = grid_of(shape, patch_size, tokens)
    assert np.prod(grid) <= tokens
    assert all(side % WINDOWS[side] == 0 for side in grid)
    needed = [max(4, -(-side // patch_size)) for side in shape]
    if np.prod(needed) <= tokens and max(needed) <= 10:
        assert grid == needed


def test_mixed_modalities_are_refused_with_names_of_each(tmp_path):
    for number in range(2):
        ct(tmp_path / f"ct_{number}.nii.gz", number)
        write_volume(tmp_path / f"mr_{number}.nii.gz", seed=number)
    with pytest.raises(Mistake, match=r"2 ct \(ct_0, ct_1\) and 2 mr \(mr_0, mr_1\): one network learns one of them"):
        look_at(tmp_path, Index(None), 0.2)


def test_a_cohort_is_described_without_its_copies_and_what_cannot_be_used(tmp_path):
    for number in range(5):
        write_volume(tmp_path / f"c{number}.nii.gz", seed=number)
    write_volume(tmp_path / "copy.nii.gz", seed=0)
    (tmp_path / "broken.nii.gz").write_bytes(b"nothing")
    cohort = look_at(tmp_path, Index(None), 0.2, group_by=r"[a-z]+\d?")
    assert cohort.modality == "mr"
    assert [case["case"] for case in cohort.kept] == ["c0", "c1", "c2", "c3", "c4"]
    assert len(cohort.problems) == 7
    assert sorted(case["case"] for fold in cohort.folds.values() for case in fold) == ["c0", "c1", "c2", "c3", "c4"]


def test_what_can_be_used_as_neither_has_no_vote_on_the_modality(tmp_path):
    for number in range(3):
        ct(tmp_path / f"ct_{number}.nii.gz", number)
    nib.save(nib.Nifti1Image(np.zeros((9, 9, 9), np.int16), np.eye(4)), tmp_path / "constant.nii")
    nib.save(
        nib.Nifti1Image((np.arange(729).reshape(9, 9, 9) // 300).astype(np.int16), np.eye(4)), tmp_path / "map.nii"
    )
    clipped = np.where(nib.load(tmp_path / "ct_0.nii.gz").get_fdata() < -500, -1000, 40).astype(np.int16)
    clipped += (np.random.default_rng(0).normal(0, 9, clipped.shape) * (clipped > -500)).astype(np.int16)
    nib.save(nib.Nifti1Image(clipped, np.eye(4)), tmp_path / "masked.nii")
    cohort = look_at(tmp_path, Index(None), 0.2)
    assert cohort.modality == "ct"
    assert sorted(case["case"] for case in cohort.kept) == ["ct_0", "ct_1", "ct_2", "masked"]


def test_none_that_can_be_read_is_said(tmp_path):
    (tmp_path / "broken.nii.gz").write_bytes(b"nothing")
    with pytest.raises(Mistake, match="none of the 1 volumes can be used:\n  broken: cannot be read"):
        look_at(tmp_path, Index(None), 0.2)


@pytest.mark.slow
def test_a_plan_gives_reasons_and_its_training_starts_without_reading_again(tmp_path, cohort):
    out = tmp_path / "a plan"
    planned = bundle("run", "plan", "--config_file", "configs/train.yaml", dataset_dir=cohort, output_dir=out)
    assert planned.returncode == 0, planned.stderr
    lines = [line for line in (out / "plan.yaml").read_text().splitlines() if ":" in line and line[0] != "#"]
    assert all(" # " in line for line in lines)
    settings = yaml.safe_load((out / "plan.yaml").read_text())
    assert settings["modality"] == "mr"
    assert settings["dataset_dir"] == str(cohort)
    for promise in ("an epoch: ", "the training: ", "memory: ", "disk: ", "run training --config_file"):
        assert promise in planned.stdout
    knobs = {"max_epochs": 1, "iterations_per_epoch": 2, "warmup_epochs": 0, "output_dir": out / "training"}
    overlays = str([str(path) for path in ("configs/train.yaml", out / "plan.yaml")])
    trained = bundle("run", "training", "--config_file", overlays, **knobs)
    assert trained.returncode == 0, trained.stderr
    assert "reading" not in trained.stderr + trained.stdout
    seen = json.loads((out / "training" / "checkpoints" / "model.json").read_text())["seen"]["hashes"]
    assert 0 < len(seen) < 6


@pytest.mark.slow
def test_a_cohort_that_would_explode_is_refused_with_the_command_that_plans(tmp_path):
    for number in range(40):
        write_volume(tmp_path / f"c{number}.nii.gz", seed=number, spacing=3.0)
    refused = train(
        "train.yaml", dataset_dir=tmp_path, modality="mr", output_dir=tmp_path.parent / "out", spacing=[0.2] * 3
    )
    assert refused.returncode == 1
    assert "run plan --config_file configs/train.yaml" in refused.stderr
    assert "Traceback" not in refused.stderr
