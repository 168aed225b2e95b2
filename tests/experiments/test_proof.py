"""Promises of the experiments: every run once, with the knobs that its record names."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY_KNOBS

from scripts.data.cases import find_cases, labelled
from scripts.experiments.proof import experiments as proof
from scripts.experiments.proof import runs as proof_runs
from scripts.experiments.proof.contestants import PRETRAININGS, RATES
from scripts.experiments.proof.experiments import Proof
from scripts.experiments.proof.report import report_convergence, report_probes, report_scores
from scripts.experiments.proof.runs import Run, execute


@pytest.fixture
def run(cohort, tmp_path):
    knobs = TINY_KNOBS | {"dataset_dir": str(cohort), "max_epochs": 1, "strict_stem": True}
    return Run(tmp_path / "run", "training", knobs)


@pytest.fixture
def experiments(tmp_path):
    """Experiments on forty volumes that are names alone."""
    training = [{"image": f"{number}.nii.gz", "label": f"label_{number}.nii.gz"} for number in range(40)]
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    for item in training:
        for path in item.values():
            (dataset / path).touch()
    (dataset / "dataset.json").write_text(json.dumps({"training": training}))
    return Proof(str(dataset), str(tmp_path / "out"), epochs=100)


@pytest.mark.slow
def test_a_run_is_done_once_and_another_in_its_place_is_refused(run, monkeypatch):
    execute([run], jobs=1)
    weights = torch.load(run.last_weights(), weights_only=True)
    assert any(name.startswith("encoder.stem") for name in weights)
    assert len(run.metrics()) == 1
    monkeypatch.setattr(proof_runs.subprocess, "run", None)
    execute([run], jobs=1)  # there already
    with pytest.raises(ValueError, match="holds a run with other knobs"):
        execute([Run(run.folder, run.workflow, run.knobs | {"seed": 1})], jobs=1)


@pytest.mark.slow
def test_a_run_that_fails_says_why_and_is_not_complete(run):
    broken = Run(run.folder, run.workflow, run.knobs | {"patch_size": 7})
    with pytest.raises(ValueError, match="patch_size 7 must be a power of two"):
        execute([broken], jobs=1)
    assert broken.record()["complete"] is False


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
    inner = find_cases(experiments.inner_dataset)
    outer = {Path(case["image"]).name for case in experiments.folds["training"]}
    named = {fold: {Path(case["image"]).name for case in cases} for fold, cases in inner.items()}
    assert named["training"] | named["validation"] == outer
    assert not named["training"] & named["validation"]
    assert all("label" in case for case in inner["training"])


def test_a_dataset_that_moves_changes_no_choice_of_cases(experiments, tmp_path):
    def chosen(proof):
        inner = find_cases(proof.inner_dataset)
        assert all(Path(case["image"]).exists() for case in inner["training"])
        held_out = [case["case"] for case in inner["validation"]]
        return held_out, [case["case"] for case in labelled(inner["training"], 20)], proof.dataset_dir

    before = chosen(experiments)
    moved = (tmp_path / "dataset").rename(tmp_path / "moved")
    assert chosen(Proof(str(moved), str(tmp_path / "out"))) == before
    elsewhere = chosen(Proof(str(moved), str(tmp_path / "anew")))
    assert elsewhere[:2] == before[:2]


def test_other_cases_are_refused_where_experiments_are(experiments, tmp_path):
    other = Path(shutil.copytree(tmp_path / "dataset", tmp_path / "other"))
    content = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps({"training": content["training"][1:]}))
    with pytest.raises(ValueError, match="holds experiments on other cases"):
        Proof(str(other), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="must not lie within the dataset"):
        Proof(str(other), str(other / "out"))


def test_scores_become_a_table_and_a_figure(tmp_path):
    dice = {("bertswin_strict", 5): (0.70, 0.74), ("bertswin_strict", None): (0.8, 0.8), ("unet", 5): (0.5, 0.6)}
    dice["unet", None] = (0.9, 0.9)
    scores = {
        (*key, seed): {"val_dice": values[seed], "val_hausdorff": 2.0 + seed}
        for key, values in dice.items()
        for seed in (0, 1)
    }
    scores["unet", 5, 1] = proof_runs.WORST
    selection = {("unet", 0, 0.001): [0.5], ("unet", 4, 0.001): [0.25, 0.125]}
    report_scores(tmp_path, "segmentation", scores, selection)
    table = (tmp_path / "segmentation.md").read_text()
    assert "| 5 labels | all labels |" in table
    assert "| BertsWin, pre-trained and tuned | 72.0 ± 2.8 (2.50) | 80.0 ± 0.0 (2.50) |" in table
    assert "| MONAI U-Net, from scratch | 25.0 ± 35.4 (inf) | 90.0 ± 0.0 (2.50) |" in table
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
    assert (tmp_path / "convergence.png").stat().st_size > 5000


def test_probes_become_a_table_of_means(tmp_path):
    probes = {
        ("vit_mae", most, seed): {"r2": 0.1 + 0.2 * seed, "embedding": {"linear": 0.5, "neighbours": 0.4}}
        for most in (5, None)
        for seed in (0, 1)
    }
    report_probes(tmp_path, probes)
    table = (tmp_path / "probing.md").read_text()
    assert "| MONAI ViT-MAE, pre-trained | patches, linear | 0.200 ± 0.141 | 0.200 ± 0.141 |" in table
    assert "| embeddings, linear | 0.500 ± 0.000 |" in table
    assert "| embeddings, neighbours | 0.400 ± 0.000 |" in table


def test_contestants_differ_in_weights_and_in_what_follows_from_them(experiments, tmp_path):
    def knobs(name, freeze):
        weights = {"bertswin_strict": tmp_path / "w.pt"}
        return experiments._finetuning("run", (name, freeze, 0.01), weights, {"seed": 1}).knobs

    def differing(first, second):
        return {name for name in first if first[name] != second[name]}

    pretrained, random = knobs("bertswin_strict", 4), knobs("random", 0)
    assert differing(pretrained, random) == {"pretrained", "encoder_learning_rate", "freeze_epochs"}
    assert (pretrained["encoder_learning_rate"], random["encoder_learning_rate"]) == (0.001, 0.01)
    assert differing(pretrained, knobs("random", 4)) == {"pretrained"}


def test_every_experiment_is_made_of_runs_for_all_labels_and_seeds(experiments, tmp_path, monkeypatch):
    figures = {"val_dice": 0.5, "val_hausdorff": 1.0, "r2": 0.1, "embedding": {"linear": 0.2, "neighbours": 0.3}}
    done = []

    def pretend(runs, jobs):
        for run in runs:
            run.folder.mkdir(parents=True, exist_ok=True)
            for name in ("metrics.jsonl", "probe.json"):
                (run.folder / name).write_text(json.dumps(figures) + "\n")
        done.extend(runs)

    monkeypatch.setattr(
        experiments, "_encoders", lambda: dict.fromkeys(["bertswin_strict", "untuned", "vit_mae"], tmp_path)
    )
    for module in (proof, proof_runs):
        monkeypatch.setattr(module, "execute", pretend)
    counts = {}
    for experiment in ("segmentation", "tuning", "probing"):
        getattr(experiments, experiment)()
        counts[experiment] = len({run.folder for run in done if run.folder.parent.name == experiment})
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
    assert proof._best(found, "random") == ("random", 4, 0.01)


def test_an_epoch_is_timed_once_the_networks_taking_turns(experiments, monkeypatch):
    timed = []

    def time_training(files, epochs, **knobs):
        timed.append(files[-1])
        return None, torch.tensor([1.0]), torch.tensor([float(len(timed))])

    monkeypatch.setattr(proof, "time_training", time_training)
    found = experiments._seconds_per_epoch()
    assert found == {name: 1.0 + 6 + number for number, name in enumerate(PRETRAININGS)}  # the second of three rounds
    assert experiments._seconds_per_epoch() == found
    assert len(timed) == 3 * len(PRETRAININGS)
    assert sum("vit_mae" in name for name in timed) == 3


def test_a_run_that_was_stopped_is_not_complete(run, monkeypatch):
    monkeypatch.setattr(proof_runs, "_code_version", lambda: "unknown")

    def stopped(*arguments, **keywords):
        (run.folder / "metrics.jsonl").write_text('{"epoch": 1}\n')
        return proof_runs.subprocess.CompletedProcess([], 0, stdout="")

    monkeypatch.setattr(proof_runs.subprocess, "run", stopped)
    longer = Run(run.folder, run.workflow, run.knobs | {"max_epochs": 2})
    with pytest.raises(ValueError, match="stopped before its end"):
        longer.execute(1)
    assert longer.record()["complete"] is False


MESSAGES = [
    "the loss is nan in epoch 2, iteration 5, on a, b: look at these volumes, or lower learning_rate",
    "the gradient's norm is inf in epoch 2, iteration 5, on a, b: look at these volumes, or lower learning_rate",
    "val_mse is nan after epoch 2: training has diverged; the checkpoint of the epoch before is as it was",
]


@pytest.mark.parametrize("message", MESSAGES)
def test_a_run_that_diverges_counts_as_the_worst_one(run, monkeypatch, message):
    run.folder.mkdir()
    (run.folder / "log.txt").write_text("of an earlier attempt\n")

    def diverges(command, stdout, **keywords):
        stdout.write(f"epoch 1/4\nerror: {message}\n")
        (run.folder / "metrics.jsonl").write_text('{"epoch": 1, "iteration": 2, "val_mse": 0.5}\n')
        return proof_runs.subprocess.CompletedProcess(command, 1, stdout="")

    monkeypatch.setattr(proof_runs.subprocess, "run", diverges)
    monkeypatch.setattr(proof_runs, "_code_version", lambda: "unknown")
    last = proof_runs.last_metrics({"it": run}, jobs=1)["it"]
    assert (last["val_mse"], last["val_dice"], last["epoch"]) == (math.inf, 0, 2)
    assert run.record()["complete"]
    assert run.record()["diverged"] == {"epoch": 2, "message": message}
    monkeypatch.setattr(proof_runs.subprocess, "run", None)
    run.execute(1)  # there already
    with pytest.raises(ValueError, match=f"no weights to go on with: {message}"):
        run.last_weights()


def test_the_message_of_an_earlier_attempt_does_not_count(run, monkeypatch):
    run.folder.mkdir()
    (run.folder / "log.txt").write_text(f"error: {MESSAGES[0]}\n")
    fails = proof_runs.subprocess.CompletedProcess([], 1, stdout="")
    monkeypatch.setattr(proof_runs, "_code_version", lambda: "unknown")
    monkeypatch.setattr(proof_runs.subprocess, "run", lambda *arguments, **keywords: fails)
    with pytest.raises(ValueError, match="ended with 1"):
        run.execute(1)
    assert run.record()["complete"] is False


@pytest.mark.slow
def test_training_that_diverges_is_told_by_its_last_line(run):
    hot = Run(run.folder, run.workflow, run.knobs | {"learning_rate": 1e30, "clip_norm": 1e30, "max_epochs": 3})
    execute([hot], jobs=1)
    assert "is nan" in hot.record()["diverged"]["message"]
    assert hot.metrics()[-1]["val_mse"] == math.inf


@pytest.mark.parametrize(("given", "read"), [(5, [5]), ("all", [None]), (None, [None]), ((5, "all"), [5, None])])
def test_numbers_of_labels_are_read_as_they_stand_in_the_tables(given, read):
    assert proof._numbers(given) == read


def test_other_numbers_of_labels_are_refused():
    with pytest.raises(ValueError, match="whole numbers, or all"):
        proof._numbers("few")
