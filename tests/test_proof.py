"""Promises of the experiments: every run once, with the knobs that its record names."""

import json
from pathlib import Path

import pytest
import torch
from conftest import TINY_KNOBS

from scripts.experiments.proof import __main__ as proof
from scripts.experiments.proof import runs as proof_runs
from scripts.experiments.proof.__main__ import PRETRAININGS, RATES, Proof
from scripts.experiments.proof.report import report_convergence, report_probes, report_scores
from scripts.experiments.proof.runs import Run, execute


@pytest.fixture
def run(cohort, tmp_path):
    knobs = TINY_KNOBS | {"dataset_dir": str(cohort), "max_epochs": 1, "strict_stem": True}
    return Run(tmp_path / "run", "training", ("train.yaml", "small.yaml"), knobs)


@pytest.fixture
def experiments(tmp_path):
    """Experiments on forty volumes that are names alone."""
    training = [{"image": f"{number}.nii.gz", "label": f"label_{number}.nii.gz"} for number in range(40)]
    for item in training:
        for path in item.values():
            (tmp_path / path).touch()
    (tmp_path / "dataset.json").write_text(json.dumps({"training": training}))
    return Proof(str(tmp_path), str(tmp_path / "out"), epochs=100)


@pytest.mark.slow
def test_a_run_is_done_once_and_another_in_its_place_is_refused(run, monkeypatch):
    execute([run], jobs=1)
    weights = torch.load(run.last_weights(), weights_only=True)
    assert any(name.startswith("encoder.stem") for name in weights)
    assert len(run.metrics()) == 1
    monkeypatch.setattr(proof_runs.subprocess, "run", None)
    execute([run], jobs=1)  # there already
    with pytest.raises(ValueError, match="holds a run with other knobs"):
        execute([Run(run.folder, run.workflow, run.configs, run.knobs | {"seed": 1})], jobs=1)


@pytest.mark.slow
def test_a_run_that_fails_says_why_and_is_not_complete(run):
    broken = Run(run.folder, run.workflow, run.configs, run.knobs | {"patch_size": 7})
    with pytest.raises(ValueError, match="patch_size 7 must be a power of two"):
        execute([broken], jobs=1)
    assert json.loads(broken.record.read_text())["complete"] is False


def test_rates_are_chosen_by_the_scores_and_time_is_shared_out_fairly(experiments, monkeypatch):
    best = {"bertswin": 0.0015, "vit_mae": 0.0005, "bertswin_tenth": 0.0045}
    scores = {(name, rate): abs(rate - best[name]) for name in best for rate in RATES}
    seconds = {"bertswin": 6.0, "bertswin_strict": 5.0, "vit_mae": 3.0}
    monkeypatch.setattr(experiments, "_seconds_per_epoch", lambda: seconds)
    runs = experiments._pretrainings(PRETRAININGS, scores)
    chosen = {name: (run.knobs["learning_rate"], run.knobs["max_epochs"]) for name, run in runs.items()}
    assert chosen == {
        "bertswin": (0.0015, 100),
        "bertswin_strict": (0.0015, 120),
        "vit_mae": (0.0005, 248),
        "bertswin_tenth": (0.0045, 24),
        "bertswin_fifth": (0.0045, 49),
    }


def test_training_volumes_are_divided_without_those_of_the_validation(experiments):
    inner = json.loads(Path(experiments._training_volumes_alone()).read_text())
    outer = {Path(case["image"]).name for case in experiments.folds["training"]}
    named = {fold: {Path(item["image"]).name for item in items} for fold, items in inner.items()}
    assert named["training"] | named["validation"] == outer
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
    selection = {("unet", 0, 0.001): [0.5], ("unet", 4, 0.001): [0.25, 0.125]}
    contestants = ["bertswin_strict", "unet"]
    report_scores(tmp_path, "segmentation", scores, contestants, (5, None), (0, 1), selection)
    table = (tmp_path / "segmentation.md").read_text()
    assert "| 5 labels | all labels |" in table
    assert "| BertsWin, pre-trained and tuned | 72.0 ± 2.8 (2.50) | 80.0 ± 0.0 (2.50) |" in table
    assert "| MONAI U-Net, from scratch, frozen at first | 0.2500, 0.1250 |" in table
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
    assert "| BertsWin, a tenth of the epochs, batch 1 |" + 7 * " never |" in table
    assert "| masked MSE | 0.2000 (after 5 epochs) | 0.1200 (after 10 epochs) |" in table
    assert "| BertsWin, default stem | 1 | 2 |" in table
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


def test_contestants_differ_in_weights_and_in_what_follows_from_them(experiments, tmp_path):
    def knobs(name, freeze):
        weights = {"bertswin_strict": tmp_path / "w.pt"}
        return experiments._finetuning("run", name, freeze, 0.01, weights, {"seed": 1}).knobs

    def differing(first, second):
        return {name for name in first if first[name] != second[name]}

    pretrained, random = knobs("bertswin_strict", 4), knobs("random", 0)
    assert differing(pretrained, random) == {"pretrained", "encoder_learning_rate", "freeze_epochs"}
    assert (pretrained["encoder_learning_rate"], random["encoder_learning_rate"]) == (0.001, 0.01)
    assert differing(pretrained, knobs("random", 4)) == {"pretrained"}


def test_every_experiment_is_made_of_runs_for_all_labels_and_seeds(experiments, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(
        experiments, "_encoders", lambda: dict.fromkeys(["bertswin_strict", "untuned", "vit_mae"], tmp_path)
    )
    for module in (proof, proof_runs):
        monkeypatch.setattr(module, "execute", lambda runs, jobs: done.extend(runs))
    metrics = {"val_dice": 0.5, "val_hausdorff": 1.0, "r2": 0.1, "embedding": {"linear": 0.2, "neighbours": 0.3}}
    monkeypatch.setattr(Run, "metrics", lambda run: [metrics])
    monkeypatch.setattr(proof.json, "loads", lambda text: metrics)
    monkeypatch.setattr(Path, "read_text", lambda path: "")
    counts = {}
    for command in ("segmentation", "tuning", "probing"):
        getattr(experiments, command)()
        counts[command] = len({run.folder for run in done if run.folder.parent.name == command})
    assert counts == {"segmentation": 5 * 9, "tuning": 4 * 9, "probing": 3 * 9}
    frozen = [run.knobs for run in done if run.folder.parent.name == "tuning"]
    assert all(knobs["freeze_epochs"] == knobs["max_epochs"] for knobs in frozen)
    assert {knobs["num_train_cases"] for knobs in frozen} == {5, 20, None}


def test_the_best_two_ways_on_the_held_out_volumes_are_tried_again_and_the_better_on_average_is_chosen(
    experiments, monkeypatch
):
    dice = {(0, 0.01): (0.5,), (0, 0.03): (0.8, 0.1), (4, 0.01): (0.7, 0.6), (0, 0.003): (0.69,)}

    def last_metrics(runs, jobs):
        return {
            way: {"val_dice": dice.get(way[1:], (0.1, 0.1))[run.knobs["seed"]] if way[0] == "random" else 0.9}
            for way, run in runs.items()
        }

    monkeypatch.setattr(proof, "last_metrics", last_metrics)
    found = experiments._finetuning_selection(["random", "unet"], {})
    assert {way[1:] for way, scores in found.items() if way[0] == "random" and len(scores) == 2} == {
        (0, 0.03),
        (4, 0.01),
    }
    assert proof._best(found, "random") == (4, 0.01)


def test_what_is_timed_later_is_put_on_the_scale_of_what_was_timed_before(experiments, monkeypatch):
    seconds = {"dataset_dir": experiments.dataset_dir, "seconds": {"bertswin": 6.0, "vit_mae": 5.0}}
    experiments.folder.mkdir()
    (experiments.folder / "seconds.json").write_text(json.dumps(seconds))
    timed = []

    def time_training(files, epochs, **knobs):
        timed.append(knobs)
        return None, torch.tensor([1.0]), torch.tensor([3.0 if "batch_size" in knobs else 2.0])

    monkeypatch.setattr(proof, "time_training", time_training)
    found = experiments._seconds_per_epoch(rounds=1)
    late = {"bertswin_strict": 6.0, "bertswin_tenth": 8.0, "bertswin_fifth": 8.0}
    assert found == {"bertswin": 6.0, "vit_mae": 5.0} | late
    assert len(timed) == 3  # the fifth has the settings of the tenth
    assert experiments._seconds_per_epoch() == found
    assert len(timed) == 3


def test_a_run_that_was_stopped_is_not_complete(run, monkeypatch):
    def stopped(*arguments, **keywords):
        (run.folder / "metrics.jsonl").write_text('{"epoch": 1}\n')
        return proof_runs.subprocess.CompletedProcess([], 0, stdout="")

    monkeypatch.setattr(proof_runs.subprocess, "run", stopped)
    longer = Run(run.folder, run.workflow, run.configs, run.knobs | {"max_epochs": 2})
    with pytest.raises(ValueError, match="stopped before its end"):
        longer.execute(1)
    assert json.loads(longer.record.read_text())["complete"] is False


@pytest.mark.parametrize(("given", "read"), [(5, [5]), ("all", [None]), (None, [None]), ((5, "all"), [5, None])])
def test_numbers_of_labels_are_read_as_they_stand_in_the_tables(given, read):
    assert proof._numbers(given) == read


def test_other_numbers_of_labels_are_refused():
    with pytest.raises(ValueError, match="whole numbers, or all"):
        proof._numbers("few")
