"""Promises of the experiments: every run once, with the knobs that its record names."""

import json

import pytest
import torch
from conftest import TINY_KNOBS

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
    dice = {("bertswin_strict", 5): (0.70, 0.74), ("bertswin_strict", None): (0.8, 0.8), ("unet", 5): (0.5, 0.6)}
    dice["unet", None] = (0.9, 0.9)
    scores = {
        (*key, seed): {"val_dice": values[seed], "val_hausdorff": 2.0 + seed}
        for key, values in dice.items()
        for seed in (0, 1)
    }
    selection = {("unet", 0, 0.001): 0.5, ("unet", 4, 0.001): 0.25}
    contestants = ["bertswin_strict", "unet"]
    report_scores(tmp_path, "segmentation", scores, contestants, (5, None), (0, 1), selection)
    table = (tmp_path / "segmentation.md").read_text()
    assert "| 5 labels | all labels |" in table
    assert "| BertsWin, pre-trained and tuned | 72.0 ± 2.8 (2.50) | 80.0 ± 0.0 (2.50) |" in table
    assert "| MONAI U-Net, from scratch, frozen at first | 0.2500 |" in table
    assert (tmp_path / "segmentation.png").stat().st_size > 5000


def test_what_was_reached_is_compared_with_the_peer_in_epochs_steps_and_time(tmp_path):
    errors = {
        "bertswin": {1: 0.2, 2: 0.1},
        "bertswin_tenth": {1: 0.3},
        "vit_mae": {5: 0.2, 8: 0.12, 10: 0.13},
    }
    curves = {
        name: [{"epoch": e, "iteration": 4 * e, "val_mse": v, "val_unexplained": 0.5} for e, v in values.items()]
        for name, values in errors.items()
    }
    seconds = {"bertswin": 3.0, "bertswin_tenth": 3.0, "vit_mae": 2.0}
    report_convergence(tmp_path, curves, dict.fromkeys(curves, 0.001), seconds, {("bertswin", 0.001): 0.25})
    rows = {row["network"]: row for row in json.loads((tmp_path / "convergence.json").read_text())["rows"]}
    assert (rows["bertswin"]["epochs_to_goal"], rows["bertswin"]["steps_to_goal"]) == (2, 8)
    shares = [
        rows["bertswin"][f"share_of_{what}"] for what in ("epochs", "seconds", "epochs_to_best", "seconds_to_best")
    ]
    assert shares == pytest.approx([0.2, 0.3, 0.25, 0.375])
    assert "epochs_to_goal" not in rows["bertswin_tenth"]
    table = (tmp_path / "convergence.md").read_text()
    assert "| BertsWin, strict stem, a tenth of the epochs, batch 1 |" + 7 * " never |" in table
    assert "| masked MSE | 0.2000 (after 5 epochs) | 0.1200 (after 10 epochs) |" in table
    assert "| BertsWin | 1 | 2 |" in table
    assert (tmp_path / "convergence.png").stat().st_size > 5000


def test_probes_become_a_table_of_means(tmp_path):
    probes = {
        ("vit_mae", most, seed): {"r2": 0.1 + 0.2 * seed, "embedding": {"linear": 0.5, "neighbours": 0.4}}
        for most in (5, None)
        for seed in (0, 1)
    }
    report_probes(tmp_path, probes, ["vit_mae"], (5, None), (0, 1))
    table = (tmp_path / "probing.md").read_text()
    assert "| MONAI ViT-MAE, pre-trained | patches, linear | 0.200 ± 0.141 | 0.200 ± 0.141 |" in table
    assert "| embeddings, linear | 0.500 ± 0.000 |" in table
    assert "| embeddings, neighbours | 0.400 ± 0.000 |" in table


def test_contestants_differ_in_weights_and_in_what_follows_from_them(tmp_path):
    def knobs(name, freeze):
        weights = {"bertswin_strict": tmp_path / "w.pt"}
        return proof._finetuning(tmp_path, name, freeze, 0.01, weights, {"dataset_dir": "data", "seed": 1}).knobs

    pretrained, random = knobs("bertswin_strict", 4), knobs("random", 0)
    differing = {name for name in pretrained | random if pretrained.get(name) != random.get(name)}
    assert differing == {"pretrained", "encoder_learning_rate", "freeze_epochs"}
    assert (pretrained["encoder_learning_rate"], random["encoder_learning_rate"]) == (0.001, 0.01)
    assert {name for name in pretrained if pretrained[name] != knobs("random", 4).get(name)} == {"pretrained"}


def test_the_best_way_on_the_held_out_volumes_is_chosen_for_each():
    scores = {("random", 0, 0.01): 0.5, ("random", 4, 0.01): 0.7, ("random", 4, 0.03): 0.6, ("unet", 0, 0.03): 0.9}
    assert (proof._best(scores, "random"), proof._best(scores, "unet")) == ((4, 0.01), (0, 0.03))


def test_what_is_timed_later_is_put_on_the_scale_of_what_was_timed_before(tmp_path, monkeypatch):
    seconds = json.dumps({"dataset_dir": str(tmp_path), "seconds": {"bertswin": 6.0, "vit_mae": 5.0}})
    (tmp_path / "seconds.json").write_text(seconds)
    timed = []

    def time_training(files, epochs, **knobs):
        timed.append(knobs)
        return None, torch.tensor([1.0]), torch.tensor([3.0 if "batch_size" in knobs else 2.0])

    monkeypatch.setattr(proof, "time_training", time_training)
    found = proof._seconds_per_epoch(str(tmp_path), tmp_path, rounds=1)
    assert found == {
        "bertswin": 6.0,
        "vit_mae": 5.0,
        "bertswin_strict": 6.0,
        "bertswin_tenth": 8.0,
        "bertswin_fifth": 8.0,
    }
    count = len(timed)
    assert count == 3  # the fifth has the settings of the tenth
    assert proof._seconds_per_epoch(str(tmp_path), tmp_path) == found
    assert len(timed) == count


def test_a_run_that_was_stopped_is_not_complete(run, monkeypatch):
    def stopped(*arguments, **keywords):
        (run.folder / "metrics.jsonl").write_text('{"epoch": 1}\n')
        return proof.subprocess.CompletedProcess([], 0, stdout="")

    monkeypatch.setattr(proof.subprocess, "run", stopped)
    longer = Run(run.folder, run.workflow, run.configs, run.knobs | {"max_epochs": 2})
    with pytest.raises(ValueError, match="stopped before its end"):
        longer.execute(1)
    assert json.loads(longer.record.read_text())["complete"] is False


@pytest.mark.parametrize(("given", "read"), [(5, [5]), ("all", [None]), (None, [None]), ((5, "all"), [5, None])])
def test_numbers_of_labels_are_read_as_they_stand_in_the_tables(given, read):
    assert proof._sequence(given) == read


def test_other_numbers_of_labels_are_refused():
    with pytest.raises(ValueError, match="whole numbers, or all"):
        proof._sequence("few")
