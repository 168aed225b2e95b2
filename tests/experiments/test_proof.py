"""Promises of the experiments: every run once, with the knobs that its record names."""

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TINY_KNOBS, tiny, write_volume
from processes import run_module
from sklearn.metrics import roc_auc_score

from scripts.data import find_cases, labelled, read_targets
from scripts.experiments.proof import experiments as proof
from scripts.experiments.proof import finetuning, pretraining
from scripts.experiments.proof import runs as proof_runs
from scripts.experiments.proof.cohort import carried, count_labels, hold_out
from scripts.experiments.proof.contestants import PRETRAINING_RATES, PRETRAININGS, SEGMENTATION
from scripts.experiments.proof.experiments import Proof
from scripts.experiments.proof.finetuning import Comparison, best_rate, guess, rate_beyond
from scripts.experiments.proof.gains import Gain, auroc_gain, labels_worth, mean_gain
from scripts.experiments.proof.pretraining import Pretraining
from scripts.experiments.proof.report import report_comparison, report_convergence, report_probes
from scripts.experiments.proof.runs import Run, execute
from scripts.mistakes import Mistake


@pytest.fixture
def forked(monkeypatch):
    """Runs start as forks of a process that has imported the libraries."""

    def start(self, knobs):
        overrides = [part for name, value in {**knobs, "output_dir": self.folder}.items()
                     for part in (f"--{name}", "null" if value is None else str(value))]  # fmt: skip
        workflow = proof_runs.RUN_IDS.get(self.workflow, self.workflow)
        arguments = ["run", workflow, "--config_file", str(self.config_files()), *overrides]
        return run_module("monai.bundle", arguments, ROOT)

    monkeypatch.setattr(Run, "_start", start)


@pytest.fixture
def run(cohort, tmp_path):
    knobs = TINY_KNOBS | {"dataset_dir": str(cohort), "max_epochs": 1, "strict_stem": True}
    return Run(tmp_path / "run", "training", knobs, ("small.yaml",))


@pytest.fixture
def weights(tmp_path):
    """A tiny network's weights, and their record."""
    network = {
        name: value
        for name, value in TINY_KNOBS.items()
        if name in {**TINY, "encoder_depth": 2, "encoder_num_heads": 4}
    }
    network |= {"in_chans": 1, "strict_stem": True, "blockwise_norm": False}
    torch.save(tiny(strict_stem=True).state_dict(), tmp_path / "model.pt")
    record = {
        "network": network,
        "preprocessing": {"modality": "mr", "spacing": None, "intensity": {"background": -1.0}},
    }
    (tmp_path / "model.json").write_text(json.dumps(record))
    return tmp_path / "model.pt"


@pytest.fixture
def experiments(tmp_path, weights):
    """Experiments on forty volumes that are names alone."""
    training = [{"image": f"{n}.nii.gz", "label": f"label_{n}.nii.gz", "sex": "FM"[n % 2], "age": n} for n in range(40)]
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    for item in training:
        for path in (item["image"], item["label"]):
            (dataset / path).touch()
    content = {"labels": {"0": "background", "1": "a", "2": "b"}, "training": training}
    (dataset / "dataset.json").write_text(json.dumps(content))
    return Proof(str(dataset), str(tmp_path / "out"), pretrained=str(weights))


@pytest.mark.slow
def test_a_run_is_done_once_and_another_in_its_place_is_refused(run, monkeypatch):
    execute([run], jobs=1)
    weights = torch.load(run.last_weights(), weights_only=True)
    assert any(name.startswith("encoder.stem") for name in weights)
    assert len(run.metrics()) == 1
    monkeypatch.setattr(proof_runs.subprocess, "run", None)
    execute([run], jobs=1)  # there already
    with pytest.raises(ValueError, match="holds a run with other knobs"):
        execute([replace(run, knobs=run.knobs | {"seed": 1})], jobs=1)


@pytest.mark.slow
def test_a_run_that_fails_says_why_and_is_not_complete(run):
    broken = replace(run, knobs=run.knobs | {"patch_size": 7})
    with pytest.raises(ValueError, match="patch_size 7 must be a power of two"):
        execute([broken], jobs=1)
    assert broken.record()["complete"] is False


@pytest.fixture
def training(experiments):
    """The pre-trainings of that cohort."""
    inner = hold_out(experiments.folds["training"], experiments.folder / "selection.json")
    own = (experiments.folder, experiments.dataset_dir, inner)
    return Pretraining(*own, ("small.yaml",), 100, 50, (0, 1), PRETRAINING_RATES, {}, 2)


def test_rates_are_chosen_by_the_scores_and_time_is_shared_out_fairly(training, monkeypatch):
    best = {"bertswin": 0.0015, "vit_mae": 0.0005, "bertswin_tenth": 0.0045}
    scores = {(name, rate): abs(rate - best[name]) for name in best for rate in PRETRAINING_RATES}
    monkeypatch.setattr(Pretraining, "seconds_per_epoch", lambda self: {"bertswin": 6.0, "vit_mae": 3.0})
    runs = training.runs(scores)
    assert set(runs) == {(name, seed) for name in PRETRAININGS for seed in (0, 1)}
    chosen = {name: (runs[name, 1].knobs["learning_rate"], runs[name, 1].knobs["max_epochs"]) for name in PRETRAININGS}
    assert chosen == {
        "bertswin": (0.0015, 100),
        "vit_mae": (0.0005, 200),
        "bertswin_tenth": (0.0045, 20),
        "bertswin_fifth": (0.0045, 40),
    }
    short = runs["bertswin_tenth", 1].knobs
    assert (short["seed"], short["batch_size"], short["iterations_per_epoch"]) == (1, 1, 160)
    # What is compared is the squared error, whatever loss a plan among the overlays proposes.
    assert {(run.knobs["loss"], run.knobs["field_of_view"]) for run in runs.values()} == {("l2", "none")}


def test_training_volumes_are_divided_without_those_of_the_validation(experiments, tmp_path):
    inner = find_cases(hold_out(experiments.folds["training"], experiments.folder / "held_out.json"))
    outer = {Path(case["image"]).name for case in experiments.folds["training"]}
    named = {fold: {Path(case["image"]).name for case in cases} for fold, cases in inner.items()}
    assert named["training"] | named["validation"] == outer
    assert not named["training"] & named["validation"]
    assert all({"label", "sex", "age"} <= case.keys() for case in inner["training"])


def test_no_patient_is_both_learned_from_and_held_out(tmp_path):
    cases = [{"case": str(n), "image": f"{tmp_path}/{n}.nii.gz", "patient": f"p{n // 4}"} for n in range(40)]
    inner = find_cases(hold_out(cases, tmp_path / "held_out.json"))
    patients = {fold: {case["patient"] for case in its} for fold, its in inner.items()}
    assert not patients["training"] & patients["validation"]
    assert len(patients["validation"]) == 2


def test_every_class_is_learned_from_and_held_out(tmp_path):
    cases = [{"case": str(n), "image": f"{tmp_path}/{n}.nii.gz", "sex": "F" if n < 5 else "M"} for n in range(40)]
    groups = {case["case"]: case["sex"] for case in cases}
    inner = find_cases(hold_out(cases, tmp_path / "held_out.json", groups))
    assert Counter(case["sex"] for case in inner["validation"]) == {"F": 1, "M": 7}


def test_a_dataset_that_moves_changes_no_choice_of_cases(experiments, tmp_path):
    def chosen(proof):
        inner = find_cases(hold_out(proof.folds["training"], proof.folder / "held_out.json"))
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
    hold_out(experiments.folds["training"], tmp_path / "out" / "held_out.json")
    with pytest.raises(ValueError, match="holds experiments on other cases"):
        hold_out(Proof(str(other), str(tmp_path / "out")).folds["training"], tmp_path / "out" / "held_out.json")
    with pytest.raises(ValueError, match="must not lie within the dataset"):
        Proof(str(other), str(other / "out"))


def test_a_gain_is_that_of_each_case_and_its_interval_that_of_drawn_cases():
    first = [{"a": 0.9, "b": 0.6, "only": 0.0}, {"a": 0.7, "b": 0.6}]
    gain = mean_gain(first, [{"a": 0.5, "b": 0.6}, {"a": 0.5, "b": 0.6, "c": 1.0}])
    # Of the two cases the differences are 0.3 and 0: of two that are drawn, the mean is 0, 0.15 or 0.3.
    assert gain == pytest.approx((0.15, 0.0, 0.3, 2))
    assert gain.half_width == pytest.approx(0.15)
    alike = [{str(n): 0.5 + n / 100 for n in range(20)}]  # cases differ by far more than contestants do
    better = [{case: dice + 0.01 for case, dice in alike[0].items()}]
    assert mean_gain(better, alike) == pytest.approx((0.01, 0.01, 0.01, 20))


def test_the_interval_of_a_gain_is_that_of_drawn_patients_each_with_all_cases():
    rng = np.random.default_rng(1)
    by_patient = np.repeat(rng.normal(0.02, 0.1, 100), 4)  # four scans each, which differ by nothing
    scores, nothing = dict(enumerate(by_patient)), dict.fromkeys(range(400), 0.0)
    patients = {case: f"patient {case // 4}" for case in scores}
    gain = mean_gain([scores], [nothing], patients)
    assert gain.value == pytest.approx(by_patient.mean())
    assert gain.half_width == pytest.approx(1.96 * by_patient.std() / 10, rel=0.05)
    assert mean_gain([scores], [nothing]).half_width == pytest.approx(gain.half_width / 2, rel=0.05)
    # Of the AUROC too.
    true, runs = np.arange(60) % 2, [rng.dirichlet((1, 1), 60) for _ in range(2)]
    alone = auroc_gain(runs[:1], runs[1:], true)
    twice = (np.tile(runs[0], (2, 1)), np.tile(runs[1], (2, 1)), np.tile(true, 2), [*range(60)] * 2)
    together = auroc_gain([twice[0]], [twice[1]], twice[2], twice[3])
    assert together[:3] == pytest.approx(alone[:3], abs=0.02)


def test_the_interval_of_a_mean_is_as_wide_as_theory_has_it():
    values = np.random.default_rng(1).normal(0.02, 0.1, 400)
    gain = mean_gain([dict(enumerate(values))], [dict.fromkeys(range(400), 0.0)])
    assert gain.half_width == pytest.approx(1.96 * values.std() / 20, rel=0.05)


def test_the_gain_of_an_auroc_is_the_difference_of_the_metric():
    rng = np.random.default_rng(0)
    true = np.arange(30) % 3
    first, second = ([rng.dirichlet((1, 1, 1), 30) for _ in range(2)] for _ in range(2))

    def mean(runs):
        return np.mean([[roc_auc_score(true == k, run[:, k]) for k in range(3)] for run in runs])

    gain = auroc_gain(first, second, true)
    assert gain.value == pytest.approx(mean(first) - mean(second))
    assert gain.low < gain.value < gain.high
    sure = auroc_gain([np.eye(3)[true]], [np.full((30, 3), 1 / 3)], true)
    assert sure == pytest.approx((0.5, 0.5, 0.5, 30))


def test_labels_that_would_do_the_same_lie_between_those_that_were_tried_along_their_logarithm():
    curve = [(4, 0.5), (16, 0.6), (64, 0.7)]
    assert labels_worth(0.55, curve) == pytest.approx(8)
    assert labels_worth(0.7, curve) == pytest.approx(64)
    assert labels_worth(0.71, curve) is None
    assert labels_worth(0.65, [(4, 0.5), (16, 0.45), (64, 0.7)]) == pytest.approx(16 * 4 ** (0.2 / 0.25))


def comparison(folder, **settings):
    cases = {"training": [{"case": str(n)} for n in range(64)], "validation": [{"case": case} for case in "abcd"]}
    own = {
        "place": folder / "segmentation",
        "task": SEGMENTATION,
        "names": ["pretrained", "random", "unet"],
        "folds": cases,
    }
    own |= {"weights": {"pretrained": Path("w.pt")}, "dataset_dir": "d", "num_labelled": [4, 16, None], "seeds": [0, 1]}
    return Comparison(**(own | {"epochs": 20, "knobs": {}, "rates": (0.01,), "jobs": 1} | settings))


def test_scores_become_a_table_a_figure_and_a_sentence_for_each_number_of_labels(tmp_path):
    dice = {"pretrained": (0.55, 0.56, 0.69), "random": (0.5, 0.6, 0.7), "unet": (0.4, 0.5, 0.9)}
    scores = {
        (name, most, seed): {"val_dice": values[place] + 0.02 * seed, "val_hausdorff": 2.0 + seed}
        for name, values in dice.items()
        for place, most in enumerate((4, 16, None))
        for seed in (0, 1)
    }
    scores["unet", 4, 1] = proof_runs.WORST
    gains = {
        ("pretrained", "random", 4): Gain(0.05, 0.03, 0.07, 4),
        ("pretrained", "random", 16): Gain(-0.04, -0.05, -0.03, 4),
        ("pretrained", "random", None): Gain(-0.01, -0.03, 0.01, 4),
    }
    selection = {("random", 0.01): 0.5, ("random", 0.03): 0.25, ("unet", 0.01): 0.125}
    report_comparison(comparison(tmp_path), scores, gains, selection)
    table = (tmp_path / "segmentation.md").read_text()
    assert table.startswith(
        "With 4 labels pre-training gains 5.0 ± 2.0 Dice; 4 labels more would do the same.\n\n"
        "With 16 labels pre-training costs 4.0 ± 1.0 Dice.\n\n"
        "With all 64 labels no gain is visible: -1.0 ± 2.0 Dice.\n"
    )
    assert "| 4 labels | 16 labels | all labels |" in table
    assert "| pre-trained, fine-tuned | 56.0 ± 1.4 (2.50) | 57.0 ± 1.4 (2.50) | 70.0 ± 1.4 (2.50) |" in table
    assert "| MONAI U-Net, from scratch | 20.0 ± 28.3 (inf) |" in table
    assert "| pre-trained, fine-tuned, over random weights, fine-tuned | +5.0 (+3.0 to +7.0) |" in table
    assert "| random weights, fine-tuned | 50.00 | 25.00 |" in table
    assert (tmp_path / "segmentation.png").stat().st_size > 5000


def test_a_gain_beyond_all_that_was_tried_is_worth_more_labels_than_were_tried(tmp_path):
    score = {"val_dice": 0.5, "val_hausdorff": 1.0}
    scores = {(name, most, 0): score for name in ("pretrained", "random") for most in (4, 16)}
    gains = {("pretrained", "random", most): Gain(0.1, 0.05, 0.15, 4) for most in (4, 16)}
    two = comparison(tmp_path, names=["pretrained", "random"], num_labelled=[16, 4], seeds=[0])
    report_comparison(two, scores, gains, {("random", 0.01): 0.5})
    lines = (tmp_path / "segmentation.md").read_text().splitlines()
    assert (
        lines[0] == "With 4 labels pre-training gains 10.0 ± 5.0 Dice; more labels than were tried would do the same."
    )


def test_the_interval_of_a_single_patient_is_drawn_though_its_ends_differ_in_the_last_digit(tmp_path):
    scores = {(name, 4, 0): {"val_dice": 0.5, "val_hausdorff": 1.0} for name in ("pretrained", "random")}
    two = comparison(tmp_path, names=["pretrained", "random"], num_labelled=[4], seeds=[0])
    above = float(np.nextafter(0.1, 1))
    report_comparison(two, scores, {("pretrained", "random", 4): Gain(0.1, above, above, 1)}, {("random", 0.01): 0.5})
    assert (tmp_path / "segmentation.png").stat().st_size > 5000


def test_no_sentence_takes_a_gain_over_another_network_for_that_of_pre_training(tmp_path):
    scores = {(name, 4, 0): {"val_dice": 0.5, "val_hausdorff": 1.0} for name in ("pretrained", "unet")}
    two = comparison(tmp_path, names=["pretrained", "unet"], num_labelled=[4], seeds=[0])
    report_comparison(two, scores, {("pretrained", "unet", 4): Gain(0.1, 0.05, 0.15, 4)}, {("unet", 0.01): 0.5})
    table = (tmp_path / "segmentation.md").read_text()
    assert "pre-training" not in table
    assert "| pre-trained, fine-tuned, over MONAI U-Net, from scratch | +10.0 (+5.0 to +15.0) |" in table


def test_a_run_that_diverged_counts_as_nothing_of_any_case(tmp_path):
    def ended(name, content, record):
        run = Run(tmp_path / name, "segmentation", {})
        run.folder.mkdir()
        (run.folder / "val_dice_raw.csv").write_text(f"filename,class0,class1,mean\n{content}")
        (run.folder / "run.json").write_text(json.dumps(record))
        return run

    well = ended("well", 'a,0.5,0.7,0.6\nb,nan,0.4,0.4\n"c",1,1,1.0\nd,nan,nan,nan\n', {})
    lost = ended("lost", "a,1,1,1\n", {"diverged": {"epoch": 1, "message": "the loss is nan"}})
    runs = {("pretrained", most, seed): (lost, well)[seed] for most in (4, 16, None) for seed in (0, 1)}
    runs |= {("random", most, seed): well for most in (4, 16, None) for seed in (0, 1)}
    gains = comparison(tmp_path, names=["pretrained", "random"]).gains(runs)
    assert gains["pretrained", "random", 4][0] == pytest.approx(-(0.6 + 0.4 + 1.0) / 3 / 2)
    assert gains["pretrained", "random", 4].cases == 3  # of the fourth there is no label


def test_a_run_that_diverged_is_a_line_of_the_table_and_not_the_end(experiments, monkeypatch):
    def runs(runs, jobs):
        return {key: {"val_dice": 0.5, "val_hausdorff": 2.0, "val_mae": math.inf} for key in runs}

    told = {}
    for module in (proof, finetuning):
        monkeypatch.setattr(module, "last_metrics", runs)
    monkeypatch.setattr(proof, "report_comparison", lambda *found: told.update(scores=found[1]))
    monkeypatch.setattr(Comparison, "gains", lambda *_: {})
    monkeypatch.setattr(experiments, "rates", (0.01,))
    experiments._compare("segmentation", SEGMENTATION, experiments._weights(), experiments.folds, {}, ["random"])
    assert told["scores"]["random", 5, 0]["val_dice"] == 0.5


@pytest.mark.parametrize(("name", "values"), [("num_labelled", [0, 5]), ("num_labelled", "few"), ("seeds", -1)])
def test_numbers_of_labels_and_seeds_are_read_before_anything_runs(experiments, tmp_path, name, values):
    with pytest.raises(Mistake, match=f"should be whole numbers, or all, and at least {int(name != 'seeds')}"):
        Proof(str(tmp_path / "dataset"), str(tmp_path / "out"), **{name: values})


def test_numbers_are_compared_by_their_errors_and_classes_by_their_ranks(experiments, tmp_path):
    def ended(name, header, rows, record=None):
        run = Run(tmp_path / name, "classification", {})
        run.folder.mkdir()
        (run.folder / "scores.csv").write_text("\n".join([header, *rows]))
        (run.folder / "run.json").write_text(json.dumps(record or {}))
        return run

    lost = {"diverged": {"epoch": 1, "message": "the loss is nan"}}
    own = {"seeds": [0], "num_labelled": [4], "names": ["pretrained", "random"]}
    ages, sexes = (read_targets(experiments.folds, field) for field in ("age", "sex"))
    cases = [case["case"] for case in ages.validation]
    near = ended("near", "case,truth,prediction", [f"{case},0,{ages.values[case] + 1}" for case in cases])
    far = ended("far", "case,truth,prediction", [f"{case},0,{ages.values[case] - 3}" for case in cases])
    gain = comparison(tmp_path, targets=ages, **own).gains({("pretrained", 4, 0): near, ("random", 4, 0): far})
    assert gain["pretrained", "random", 4] == pytest.approx((2, 2, 2, len(cases)))
    guessed = guess(ages)["val_mae"]
    gone = ended("gone", "", [], lost)
    gain = comparison(tmp_path, targets=ages, **own).gains({("pretrained", 4, 0): near, ("random", 4, 0): gone})
    assert gain["pretrained", "random", 4].value == pytest.approx(guessed - 1)
    head = "case,truth,prediction,probability of F,probability of M"
    right = ended("right", head, [f"{c},,,{1 - sexes.values[c]},{sexes.values[c]}" for c in cases])
    gain = comparison(tmp_path, targets=sexes, **own).gains({("pretrained", 4, 0): right, ("random", 4, 0): gone})
    assert gain["pretrained", "random", 4] == pytest.approx((0.5, 0.5, 0.5, len(cases)))


def test_what_was_reached_is_compared_with_the_peer_in_epochs_steps_and_time(tmp_path):
    errors = {
        "bertswin": {1: 0.2, 2: 0.1},
        "bertswin_tenth": {1: 0.3},
        "vit_mae": {5: 0.2, 8: 0.12, 10: 0.13},
    }
    curves = {
        (name, seed): [
            {"epoch": e, "iteration": 4 * e, "val_mse": v + 0.001 * seed, "val_unexplained": 0.5}
            for e, v in values.items()
        ]
        for name, values in errors.items()
        for seed in (0, 1)
    }
    seconds = {"bertswin": 3.0, "bertswin_tenth": 3.0, "vit_mae": 2.0}
    where = {"bertswin, seed 0": "OUT/last.pt"}
    report_convergence(tmp_path, curves, dict.fromkeys(errors, 0.001), seconds, {("bertswin", 0.001): 0.25}, where)
    rows = {row["network"]: row for row in json.loads((tmp_path / "convergence.json").read_text())["rows"]}
    assert (rows["bertswin"]["epochs_to_goal"], rows["bertswin"]["steps_to_goal"]) == (2, 8)
    shares = [
        rows["bertswin"][f"share_of_{what}"] for what in ("epochs", "seconds", "epochs_to_best", "seconds_to_best")
    ]
    assert shares == pytest.approx([0.2, 0.3, 0.25, 0.375])
    assert "epochs_to_goal" not in rows["bertswin_tenth"]
    table = (tmp_path / "convergence.md").read_text()
    assert "| BertsWin, a tenth of the epochs, batch 1 |" + 7 * " never |" in table
    assert "| BertsWin | 0.001 | 3.00 | 2 | 0.1005 ± 0.0007 |" in table
    assert "bertswin, seed 0: OUT/last.pt" in table
    assert (tmp_path / "convergence.png").stat().st_size > 5000


def test_probes_become_a_table_of_means(tmp_path):
    probes = {
        ("vit_mae", most, seed): {"r2": 0.1 + 0.2 * seed, "embedding": {"linear": 0.5, "neighbours": 0.4}}
        for most in (5, None)
        for seed in (0, 1)
    }
    report_probes(tmp_path, "probing", probes)
    table = (tmp_path / "probing.md").read_text()
    assert "| MONAI ViT-MAE, pre-trained | patches, linear | 0.200 ± 0.141 | 0.200 ± 0.141 |" in table
    assert "| embeddings, linear | 0.500 ± 0.000 |" in table
    assert "| embeddings, neighbours | 0.400 ± 0.000 |" in table


def test_probes_of_classes_have_the_most_frequent_one_beside_them(tmp_path):
    embedding = {"linear": 0.5, "neighbours": 0.4, "majority": 0.3, "linear_auroc": 0.9}
    report_probes(tmp_path, "probing_sex", {("random", None, seed): {"embedding": embedding} for seed in (0, 1)})
    table = (tmp_path / "probing_sex.md").read_text()
    assert "| Share classified rightly | probe | all labels |" in table
    for name, score in (("linear: AUROC", 0.9), ("linear", 0.5), ("neighbours", 0.4)):
        assert f"| random weights | embeddings, {name} | {score:.3f} ± 0.000 |" in table
    assert "| random weights | the most frequent class | 0.300 ± 0.000 |" in table
    assert "patches" not in table


def test_contestants_differ_in_weights_and_in_what_follows_from_them(tmp_path):
    def knobs(name):
        return comparison(tmp_path).run(name, 0.01, tmp_path / "run", {"seed": 1}).knobs

    def differing(first, second):
        return {name for name in first if first[name] != second[name]}

    pretrained, random = knobs("pretrained"), knobs("random")
    assert differing(pretrained, random) == {"pretrained", "encoder_learning_rate"}
    assert (pretrained["encoder_learning_rate"], random["encoder_learning_rate"]) == (0.001, 0.005)
    assert differing(pretrained, knobs("pretrained_frozen")) == {"freeze_epochs"}


def test_runs_without_weights_have_the_network_and_the_voxels_of_the_given_ones(experiments, weights, tmp_path):
    knobs = carried(weights)
    assert (knobs["img_size"], knobs["modality"], knobs["spacing"]) == ([32, 32, 32], "mr", None)
    assert knobs["intensities::mr::background"] == -1.0
    weights.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match="copy the model"):
        experiments.segmentation()
    experiments.pretrained = None
    with pytest.raises(ValueError, match="give --pretrained"):
        experiments.segmentation()


@pytest.fixture
def pretended(monkeypatch):
    """Runs that are done without being run: all leave the same scores."""
    figures = {"val_dice": 0.5, "val_hausdorff": 1.0, "r2": 0.1, "embedding": {"linear": 0.2, "neighbours": 0.3}}
    figures |= {"val_auroc": 0.5, "val_accuracy": 0.5, "val_mae": 9.0, "val_r2": 0.0}
    figures |= {"epoch": 1, "iteration": 2, "val_mse": 0.1, "val_unexplained": 0.2}
    done = []

    def pretend(runs, jobs):
        for run in runs:
            (run.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            for name in ("metrics.jsonl", "probe.json"):
                (run.folder / name).write_text(json.dumps(figures) + "\n")
        done.extend(runs)

    for module in (proof, proof_runs):
        monkeypatch.setattr(module, "execute", pretend)
    monkeypatch.setattr(Comparison, "gains", lambda self, runs: {})
    monkeypatch.setattr(Run, "last_weights", lambda self: self.folder / "last.pt")
    return done


def test_every_experiment_is_made_of_runs_for_all_labels_and_seeds(experiments, pretended, monkeypatch):
    monkeypatch.setattr(Pretraining, "seconds_per_epoch", lambda self: dict.fromkeys(PRETRAININGS, 1.0))
    experiments.convergence()
    for experiment in ("segmentation", "tuning", "probing"):
        getattr(experiments, experiment)()
    places = Counter(run.folder.parent.name for run in pretended)
    scored = {name: count for name, count in places.items() if not name.endswith("selection")}
    assert scored == {"pretraining": 4 * 3, "segmentation": 5 * 9, "tuning": 4 * 9 + 1, "probing": 2 * 9}
    table = (experiments.folder / "convergence.md").read_text()
    assert f"bertswin, seed 1: {experiments.folder}/pretraining/bertswin_1/last.pt" in table
    frozen = [run.knobs for run in pretended if run.folder.parent.name == "tuning" and run.workflow != "tuning"]
    assert all(knobs["freeze_epochs"] == knobs["max_epochs"] for knobs in frozen)
    assert {knobs["num_train_cases"] for knobs in frozen} == {5, 20, None}
    assert {knobs["num_labels"] for knobs in frozen} == {2}
    patch_mode = [run.knobs["blockwise_norm"] for run in pretended if run.folder.name.startswith("patch_mode")]
    assert set(patch_mode) == {True}


def test_the_search_is_one_seed_of_every_rate_with_the_middle_number_of_labels(experiments, pretended):
    experiments.classification(target=["sex", "age"])
    found = [run for run in pretended if run.folder.parent.name == "classification_sex_selection"]
    assert {(run.knobs["seed"], run.knobs["num_train_cases"]) for run in found} == {(0, 20)}
    assert len(found) == 4 * 4 + 3  # those with an encoder of ours may keep the head that was fitted
    assert (experiments.folder / "classification_age.md").read_text().count("a guess that looks at nothing") == 1


@pytest.mark.parametrize("numbers", [[10], [5, 10], [5, 10, 20]])
def test_all_labels_may_join_later_without_another_search(experiments, pretended, numbers):
    for experiments.num_labelled in (numbers, [*numbers, None]):
        experiments.segmentation(contestants="random")
    found = [run for run in pretended if run.folder.parent.name == "segmentation_selection"]
    assert {run.knobs["num_train_cases"] for run in found} == {10}


def test_a_classification_may_keep_the_head_that_was_fitted(experiments, pretended):
    experiments.knobs = {"iterations_per_epoch": 40, "warmup_epochs": 0}
    experiments.classification("age", contestants=["pretrained", "densenet"])
    found = {run.folder.name: run.knobs for run in pretended if run.folder.parent.name.endswith("selection")}
    assert [name for name in found if name.endswith("_0")] == ["pretrained_0"]
    names = ("max_epochs", "iterations_per_epoch", "warmup_epochs")
    # One step at the beginning of a warm-up: a millionth of a rate changes nothing.
    assert [found["pretrained_0"][name] for name in names] == [1, 1, 1]
    assert [found["pretrained_0.001"][name] for name in names] == [experiments.finetuning_epochs, 40, 0]
    assert "densenet_0" not in found  # which has none


def test_where_the_fitted_head_is_best_it_is_what_is_scored(experiments, pretended, monkeypatch):
    monkeypatch.setattr(Comparison, "selection", lambda self: {("pretrained", 0.0): 1.0, ("pretrained", 0.001): 2.0})
    experiments.classification("age", contestants="pretrained")
    assert len(pretended) == 9
    assert {run.knobs["max_epochs"] for run in pretended} == {1}


def test_rates_without_one_above_zero_are_refused(experiments):
    for rates in (0, [0.0], [-0.1, 0.1]):
        with pytest.raises(ValueError, match="should be numbers above 0"):
            Proof(experiments.dataset_dir, str(experiments.folder), pretrained=experiments.pretrained, rates=rates)


@pytest.mark.parametrize(("knob", "says"), [("freeze_epochs", "the contestants"), ("learning_rate", "--rates")])
def test_knobs_that_an_experiment_chooses_are_refused_not_passed_over(experiments, knob, says):
    with pytest.raises(Mistake, match=f"{knob} cannot be one of --knobs: it follows from {says}"):
        Proof(experiments.dataset_dir, str(experiments.folder), knobs={knob: 5})


def test_fields_of_a_datalist_are_probed_beside_each_other(experiments, pretended):
    experiments.probing(target=["sex", "age"])
    assert Counter(run.folder.parent.name for run in pretended) == {"probing_sex": 2 * 9, "probing_age": 2 * 9}
    assert {run.knobs["target"] for run in pretended} == {"sex", "age"}
    assert (experiments.folder / "probing_age.md").exists()


def test_the_user_says_who_takes_part(experiments, pretended):
    experiments.segmentation(contestants=["pretrained", "unetr"])
    assert {run.folder.name.split("_")[0] for run in pretended} == {"pretrained", "unetr"}
    with pytest.raises(ValueError, match="no contestant unett here: did you mean unet"):
        experiments.segmentation(contestants="unett")
    with pytest.raises(ValueError, match="no contestant vit_mae here"):
        experiments.segmentation(contestants="vit_mae")


def test_more_labels_than_there_are_are_refused(experiments):
    experiments.num_labelled = [3, 400]
    with pytest.raises(ValueError, match="num_labelled 400 is more than the"):
        experiments.segmentation()


def test_a_dataset_says_how_many_labels_it_has(tmp_path):
    for labels in ({"0": "background", "3": "c"}, {"background": 0, "c": 3}, ["background", "a", "b", "c"]):
        (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
        assert count_labels(str(tmp_path)) == 3
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(ValueError, match="names no labels: say how many there are by --knobs"):
        count_labels(str(tmp_path))


def test_each_contestant_learns_at_the_rate_that_does_best_on_held_out_training_cases():
    found = {("random", 0.003): 0.5, ("random", 0.01): 0.8, ("random", 0.03): 0.8, ("unet", 0.003): 0.9}
    assert best_rate(found, "random", 1) == 0.03
    assert best_rate(found, "random", -1) == 0.003


@pytest.mark.parametrize(
    ("scores", "sign", "beyond"),
    [({0.002: 0.6, 0.006: 0.5, 0.02: 0.3}, 1, 0.0007), ({0.002: 0.6, 0.006: 0.5, 0.02: 0.3}, -1, 0.07),
     ({0.002: 0.6, 0.006: 0.7, 0.02: 0.3}, 1, None), ({0.002: 0.6, 0.006: 0.6, 0.02: 0.6}, 1, None),
     ({0.01: 1.0}, 1, None), ({0.0: 0.6, 0.0003: 0.5}, 1, None), ({0.0: 0.5, 0.0003: 0.6}, 1, None),
     ({0.0: 0.5, 0.0003: 0.6, 0.001: 0.5}, 1, 0.00009),
     ({0.0007: 0.61, 0.002: 0.6, 0.006: 0.5}, 1, 0.0002)],
)  # fmt: skip
def test_who_does_best_at_the_end_of_the_rates_tries_one_beyond(scores, sign, beyond):
    found = {("unet", rate): score for rate, score in scores.items()} | {("random", 1.0): 5.0}
    assert rate_beyond(found, "unet", sign) == (beyond and pytest.approx(beyond))


def test_an_epoch_is_timed_once_the_networks_taking_turns(training, monkeypatch):
    timed = []

    def time_training(files, epochs, **knobs):
        timed.append(files[-1])
        return None, torch.tensor([1.0]), torch.tensor([float(len(timed))])

    monkeypatch.setattr(pretraining, "time_training", time_training)
    found = training.seconds_per_epoch()
    assert found == {name: 1.0 + 5 + number for number, name in enumerate(PRETRAININGS)}  # the second of three rounds
    assert training.seconds_per_epoch() == found
    assert len(timed) == 3 * len(PRETRAININGS)
    assert sum("vit_mae" in name for name in timed) == 3


def test_a_run_that_was_stopped_is_not_complete(run, monkeypatch):
    monkeypatch.setattr(proof_runs, "_code_version", lambda: "unknown")

    def stopped(*arguments, **keywords):
        (run.folder / "metrics.jsonl").write_text('{"epoch": 1}\n')
        return proof_runs.subprocess.CompletedProcess([], 0, stdout="")

    monkeypatch.setattr(proof_runs.subprocess, "run", stopped)
    longer = replace(run, knobs=run.knobs | {"max_epochs": 2})
    with pytest.raises(ValueError, match="stopped before its end"):
        longer.execute()
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
    run.execute()  # there already
    with pytest.raises(ValueError, match=f"no weights to go on with: {message}"):
        run.last_weights()


def test_the_message_of_an_earlier_attempt_does_not_count(run, monkeypatch):
    run.folder.mkdir()
    (run.folder / "log.txt").write_text(f"error: {MESSAGES[0]}\n")
    fails = proof_runs.subprocess.CompletedProcess([], 1, stdout="")
    monkeypatch.setattr(proof_runs, "_code_version", lambda: "unknown")
    monkeypatch.setattr(proof_runs.subprocess, "run", lambda *arguments, **keywords: fails)
    with pytest.raises(ValueError, match="ended with 1"):
        run.execute()
    assert run.record()["complete"] is False


@pytest.mark.slow
def test_training_that_diverges_is_told_by_its_last_line(run):
    hot = replace(run, knobs=run.knobs | {"learning_rate": 1e30, "clip_norm": 1e30, "max_epochs": 3})
    execute([hot], jobs=1)
    assert "is nan" in hot.record()["diverged"]["message"]
    assert hot.metrics()[-1]["val_mse"] == math.inf


@pytest.mark.parametrize(("given", "read"), [(5, [5]), ("all", [None]), (None, [None]), ((5, "all"), [5, None])])
def test_numbers_of_labels_are_read_as_they_stand_in_the_tables(given, read):
    assert proof._numbers(given) == read


def test_other_numbers_of_labels_are_refused():
    with pytest.raises(ValueError, match="whole numbers, or all"):
        proof._numbers("few")


@pytest.fixture(scope="module")
def labelled_cohort(tmp_path_factory):
    """Twelve volumes whose bright half is the label, of two classes."""
    folder, cases = tmp_path_factory.mktemp("labelled"), []
    (folder / "labelsTr").mkdir()
    for number in range(12):
        path = write_volume(folder / "imagesTr" / f"{number}.nii.gz", seed=number)
        image = nib.load(path)
        label = (np.asarray(image.dataobj) > 500).astype(np.uint8)
        nib.save(nib.Nifti1Image(label, image.affine), folder / "labelsTr" / path.name)
        names = {"image": f"imagesTr/{path.name}", "label": f"labelsTr/{path.name}"}
        cases.append(names | {"class": "ab"[number % 2], "age": 20 + number})
    content = {"labels": {"0": "background", "1": "bright"}, "training": cases[:8], "validation": cases[8:]}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@pytest.mark.slow
def test_a_cohort_tells_what_pre_training_gains_to_segment_it_and_again_without_a_run(
    labelled_cohort, weights, tmp_path, monkeypatch, forked
):
    knobs = {"iterations_per_epoch": 1, "feature_size": 4}
    settings = {"num_labelled": [1, 4], "seeds": 0, "finetuning_epochs": 1, "rates": 0.01, "knobs": knobs, "jobs": 1}
    settings |= {"output_dir": str(tmp_path / "out"), "pretrained": str(weights)}
    Proof(str(labelled_cohort), **settings).segmentation(contestants=["pretrained", "random"])
    report = json.loads((tmp_path / "out" / "segmentation.json").read_text())
    assert [row["num_labelled"] for row in report["rows"]] == [1, 4, 1, 4]
    assert [gain["cases"] for gain in report["gains"]] == [4, 4]
    dice = {(row["contestant"], row["num_labelled"]): row["val_dice"] for row in report["rows"]}
    expected = [dice["pretrained", most] - dice["random", most] for most in (1, 4)]
    assert [gain["value"] for gain in report["gains"]] == pytest.approx(expected, abs=1e-6)
    assert all(sentence.startswith("With ") for sentence in report["sentences"])
    ended = tmp_path / "out" / "segmentation" / "random_4_0"
    assert not (ended / "bundle").exists()
    assert not (ended / "report.html").exists()
    monkeypatch.setattr(Run, "_start", None)
    Proof(str(labelled_cohort), **settings).segmentation(contestants=["pretrained", "random"])


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(("target", "measure"), [("class", "val_auroc"), ("age", "val_mae")])
def test_a_cohort_tells_what_pre_training_gains_to_classify_it(labelled_cohort, weights, tmp_path, target, measure):
    settings = {"num_labelled": "all", "seeds": 0, "finetuning_epochs": 1, "rates": 0.001, "jobs": 1}
    settings |= {"output_dir": str(tmp_path), "pretrained": str(weights), "knobs": {"iterations_per_epoch": 1}}
    Proof(str(labelled_cohort), **settings).classification(target, contestants=["pretrained", "densenet"])
    report = json.loads((tmp_path / f"classification_{target}.json").read_text())
    assert set(report["guess"]) < set(report["rows"][0]) | {"cases"}
    assert measure in report["guess"]
    (gain,) = report["gains"]
    sign = -1 if measure == "val_mae" else 1
    assert gain["value"] == pytest.approx(sign * (report["rows"][0][measure] - report["rows"][1][measure]), abs=1e-4)
