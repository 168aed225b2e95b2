"""Promises of the experiments: every run once, with the knobs that its record names."""

import json

import pytest
import torch
from conftest import TINY_KNOBS, noise

from scripts import proof
from scripts.proof import PRETRAININGS, RATES, Run, execute
from scripts.proof_report import report_convergence, report_probes, report_scores


@pytest.fixture
def run(cohort, tmp_path):
    knobs = TINY_KNOBS | {"dataset_dir": str(cohort), "max_epochs": 1, "strict_stem": True}
    return Run(tmp_path / "run", "training", ("train.yaml", "small.yaml"), knobs)


@pytest.mark.slow
def test_a_run_is_done_once_and_another_in_its_place_is_refused(run, monkeypatch):
    execute([run], jobs=1)
    weights = torch.load(run.last_weights(), weights_only=True)
    assert any(name.startswith("encoder.stem") for name in weights)
    assert len(run.metrics()) == 1
    monkeypatch.setattr(proof.subprocess, "run", None)
    execute([run], jobs=1)  # there already
    with pytest.raises(ValueError, match="holds a run with other knobs"):
        execute([Run(run.folder, run.workflow, run.configs, run.knobs | {"seed": 1})], jobs=1)


@pytest.mark.slow
def test_a_run_that_fails_says_why_and_is_not_complete(run):
    broken = Run(run.folder, run.workflow, run.configs, run.knobs | {"patch_size": 7})
    with pytest.raises(ValueError, match="patch_size 7 must be a power of two"):
        execute([broken], jobs=1)
    assert json.loads(broken.record.read_text())["complete"] is False


def test_rates_are_chosen_by_the_scores_and_time_is_shared_out_fairly(tmp_path):
    best = {"bertswin": 0.0015, "vit_mae": 0.0005, "bertswin_tenth": 0.0045}
    scores = {(name, rate): abs(rate - best[name]) for name in best for rate in RATES}
    seconds = {"bertswin": 6.0, "bertswin_strict": 5.0, "vit_mae": 3.0}
    runs = proof._pretrainings("data", tmp_path, 100, scores, seconds)
    chosen = {name: (run.knobs["learning_rate"], run.knobs["max_epochs"]) for name, run in runs.items()}
    assert chosen == {
        "bertswin": (0.0015, 100),
        "bertswin_strict": (0.0015, 120),
        "vit_mae": (0.0005, 248),
        "bertswin_tenth": (0.0045, 24),
        "bertswin_fifth": (0.0045, 49),
    }
    assert runs.keys() == PRETRAININGS.keys()


def test_training_volumes_are_divided_without_those_of_the_validation(tmp_path):
    training = [{"image": f"{number}.nii.gz", "label": f"label_{number}.nii.gz"} for number in range(40)]
    for item in training:
        for path in item.values():
            (tmp_path / path).touch()
    (tmp_path / "dataset.json").write_text(json.dumps({"training": training}))
    inner = json.loads(proof._training_volumes_alone(str(tmp_path), tmp_path / "inner.json").read_text())
    outer = proof.split_cases(proof.find_cases(str(tmp_path))["training"], 0.2)
    named = {fold: {item["image"] for item in items} for fold, items in inner.items()}
    assert named["training"] | named["validation"] == {item["image"] for item in outer["training"]}
    assert not named["training"] & named["validation"]
    assert all("label" in item for item in inner["training"])


def test_scores_become_a_table_and_a_figure(tmp_path):
    scores = {
        (name, most, seed): {"val_dice": float(noise(1, seed=seed).sigmoid()), "val_hausdorff": 2.0}
        for name in ("bertswin_strict", "unet")
        for most in (5, None)
        for seed in (0, 1)
    }
    report_scores(
        tmp_path, "segmentation", scores, ["bertswin_strict", "unet"], (5, None), (0, 1), {("unet", 0.001): 0.5}
    )
    table = (tmp_path / "segmentation.md").read_text()
    assert "| 5 labels | all labels |" in table
    assert "MONAI U-Net, from scratch" in table
    assert "| MONAI U-Net, from scratch | 0.5000 |" in table
    assert (tmp_path / "segmentation.png").stat().st_size > 5000


def test_what_was_reached_is_compared_with_the_peer_in_epochs_and_in_time(tmp_path):
    curves = {
        "bertswin": [(1, 0.2, 0.5), (2, 0.1, 0.3)],
        "bertswin_tenth": [(1, 0.3, 0.6)],
        "vit_mae": [(5, 0.2, 0.5), (8, 0.12, 0.4), (10, 0.13, 0.4)],
    }
    seconds = {"bertswin": 3.0, "bertswin_tenth": 3.0, "vit_mae": 2.0}
    rates = dict.fromkeys(curves, 0.001)
    report_convergence(tmp_path, curves, rates, seconds, {("bertswin", 0.001): 0.25}, 50)
    rows = {row["network"]: row for row in json.loads((tmp_path / "convergence.json").read_text())["rows"]}
    assert (rows["bertswin"]["epochs_to_goal"], rows["bertswin_tenth"]["epochs_to_goal"]) == (2, None)
    assert rows["bertswin"]["share_of_epochs"] == pytest.approx(0.2)
    assert rows["bertswin"]["share_of_epochs_to_best"] == pytest.approx(0.25)
    assert rows["bertswin"]["share_of_seconds"] == pytest.approx(0.3)
    assert "| never | never | never | never |" in (tmp_path / "convergence.md").read_text()
    assert (tmp_path / "convergence.png").stat().st_size > 5000


def test_probes_become_a_table_of_means(tmp_path):
    probes = {
        ("vit_mae", most, seed): {"r2": 0.1 + 0.2 * seed, "embedding": {"linear": 0.5, "neighbours": 0.4}}
        for most in (5, None)
        for seed in (0, 1)
    }
    report_probes(tmp_path, probes, ["vit_mae"], (5, None), (0, 1))
    assert "| MONAI ViT-MAE | patches, linear | 0.200 | 0.200 |" in (tmp_path / "probing.md").read_text()
