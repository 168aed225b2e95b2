"""Promises of classification and regression: frozen then trained by depth, scored by case, finished by predictions."""

import csv
import json
import math
import shutil
from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TINY_KNOBS, bundle, noise, records, started, tiny, write_volume
from ignite.engine import Engine, Events
from matplotlib.image import imread
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.transforms import Activationsd, Compose
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from test_configs import REQUIRED

from scripts import BertsWinEncoder
from scripts.data import read_targets
from scripts.engines import MeanWindowInferer, VolumeEvaluator
from scripts.mistakes import Mistake, causes
from scripts.networks import ClassificationNetwork
from scripts.workflows import (
    PredictionWriter,
    PredictTarget,
    PrepareTargetBatch,
    ScoresWriter,
    TargetScores,
    calibration_bins,
    layerwise_rates,
    read_target,
)

ENCODER = {name: value for name, value in TINY.items() if name != "decoder_embed_dim"}
FILES = ("train.yaml", "finetune_classification.yaml", "small.yaml")
KNOBS = {name: value for name, value in TINY_KNOBS.items() if name != "figure_interval"} | {"num_workers": 0}


def targets(truths, task="auto"):
    """Make targets whose validation cases, c0 and so on, have these values."""
    cases = [{"case": f"c{n}", "sex": value} for n, value in enumerate(truths)]
    return read_targets({"training": cases, "validation": cases}, "sex", task)


def validated(scores, batches, handlers=(), epochs=1):
    """Run validations over batches of prediction and label, as MONAI's evaluator does; return the last figures."""
    engine = Engine(lambda engine, batch: {"pred": batch[0], "label": batch[1]})
    engine.state.best_metric_epoch = 1
    for name, metric in scores.by_name(scores.names).items():
        metric.attach(engine, name)
    for handler in handlers:
        handler.attach(engine)
    for _ in range(epochs):
        engine.state.max_epochs = None
        engine.run(batches)
    return engine.state.metrics


def test_rates_fall_from_the_head_to_the_stem():
    network = ClassificationNetwork(BertsWinEncoder(**ENCODER | {"encoder_depths": [3]}), 2, "attention")
    groups = layerwise_rates(network, 0.1, 0.5)
    assert [group["lr"] for group in groups] == [0.1, 0.05, 0.025, 0.0125, 0.00625]  # head, blocks 2, 1, 0, stem
    places = {id(weight): place for place, group in enumerate(groups) for weight in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(places) == len(list(network.parameters()))
    found = {name: places[id(weight)] for name, weight in network.named_parameters()}
    assert {found[name] for name in found if not name.startswith("encoder.")} == {0}
    assert {found[name] for name in found if ".blocks.2." in name} == {1}
    assert {found[name] for name in found if ".blocks.0." in name} == {3}
    assert {found[name] for name in found if name.startswith("encoder.stem.")} == {4}
    assert {group["lr"] for group in layerwise_rates(network, 0.1, 1.0)} == {0.1}


def test_the_target_of_a_case_is_known_by_its_name():
    batch = {"image": noise(2, 1, 4, 4, 4), "case": ["c2", "c0"]}
    volume, target, *_ = PrepareTargetBatch(targets(["F", "M", "M"]))(batch, "cpu")
    assert torch.equal(volume, batch["image"])
    assert (target.dtype, target.tolist()) == (torch.int64, [1, 0])
    _, target, *_ = PrepareTargetBatch(targets([1.5, 2, 4], "regression"))(batch, "cpu")
    assert (target.dtype, target.tolist()) == (torch.float32, [[4.0], [1.5]])


def test_a_large_volume_gets_the_mean_over_the_windows_that_cover_it():
    def mean_and_place(window):
        assert window.shape[2:] == (4, 4, 4)
        assert len(window) <= 2 * 3  # of each volume three
        return torch.stack([window.mean(dim=(1, 2, 3, 4)), window[:, 0, 0, 0, 0]], dim=1)

    infer = MeanWindowInferer((4, 4, 4), overlap=0.5, batch_size=3, precision="fp32", device="cpu")
    volumes = noise(2, 1, 4, 5, 9)
    found = infer(volumes, mean_and_place)
    starts = [(b, c) for b in (0, 1) for c in (0, 2, 4, 5)]
    for volume, answer in zip(volumes, found, strict=True):
        expected = torch.stack([volume[0, 0, b, c] for b, c in starts]).mean()
        assert answer[1].item() == pytest.approx(expected.item(), abs=1e-6)
    small = noise(1, 1, 4, 4, 4)
    torch.testing.assert_close(infer(small, mean_and_place), mean_and_place(small))


def test_scores_of_classes_are_those_of_scikit_learn_over_all_batches():
    truths = list("abcabcabba")
    logits = 2 * noise(10, 3)
    wanted = targets(truths)
    labels = torch.tensor([wanted.classes.index(truth) for truth in truths])
    found = validated(TargetScores(wanted), list(zip(logits.split(3), labels.split(3), strict=True)))
    probability = logits.softmax(dim=1).numpy()
    auroc = roc_auc_score(labels, probability, multi_class="ovr", average="macro")
    assert found["val_auroc"] == pytest.approx(auroc, abs=1e-6)
    assert found["val_accuracy"] == pytest.approx((probability.argmax(1) == labels.numpy()).mean())
    assert found["val_balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, probability.argmax(1)))
    assert 0 < found["val_calibration_error"] < 1


def test_scores_of_numbers_are_in_their_unit():
    wanted = targets([10, 20, 40.0], "regression")
    predicted, true = torch.tensor([[12.0], [20.0], [36.0]]), torch.tensor([[10.0], [20.0], [40.0]])
    found = validated(TargetScores(wanted), [(predicted[:2], true[:2]), (predicted[2:], true[2:])])
    assert found == {"val_mae": pytest.approx(2.0), "val_r2": pytest.approx(1 - 20 / 466.667, abs=1e-5)}
    assert TargetScores(targets([3, 3], "regression")).names == ["mae"]  # there is nothing to explain


def test_a_diverged_network_is_for_the_recorder_to_refuse():
    found = validated(
        TargetScores(targets(["a", "b"])), [(torch.tensor([[math.nan, 0], [1, 0]]), torch.tensor([0, 1]))]
    )
    assert all(math.isnan(value) for value in found.values())


def test_calibration_bins_compare_probability_and_success():
    predicted = np.array([[0.95, 0.05], [0.05, 0.95], [0.99, 0.01], [0.45, 0.55], [1.0, 0.0]])
    counts, confidence, accuracy = calibration_bins(predicted, np.array([0, 0, 0, 1, 0]))
    assert counts.tolist() == [0] * 5 + [1, 0, 0, 0, 4]
    assert confidence[[5, 9]].tolist() == pytest.approx([0.55, (0.95 + 0.95 + 0.99 + 1) / 4])
    assert accuracy[[5, 9]].tolist() == [1, 0.75]


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_scores_by_case_and_a_figure_are_those_of_the_best_validation(tmp_path, task):
    truths, pred = ([1.5, 2.5], noise(2, 1)) if task == "regression" else (["M", "F, or $x$"], noise(2, 2))
    wanted = targets(truths, task)
    label = torch.tensor([wanted.values["c0"], wanted.values["c1"]])
    label = label[:, None] if task == "regression" else label.long()
    scores = TargetScores(wanted)
    writer = ScoresWriter(scores, tmp_path)
    validated(scores, [(pred[:1], label[:1]), (pred[1:], label[1:])], [writer])
    with (tmp_path / "scores.csv").open(newline="") as file:
        header, *rows = list(csv.reader(file))
    assert [row[:2] for row in rows] == [["c0", str(truths[0])], ["c1", str(truths[1])]]
    if task == "regression":
        assert header == ["case", "truth", "prediction"]
        assert [float(row[2]) for row in rows] == pytest.approx(pred.flatten().tolist(), rel=1e-4)
    else:
        assert header[3:] == ["probability of F, or $x$", "probability of M"]
        assert [float(row[3]) + float(row[4]) for row in rows] == pytest.approx([1, 1], abs=1e-4)
        assert rows[0][2] == wanted.classes[int(pred[0].argmax())]
    assert imread(tmp_path / "figures" / "calibration.png").std() > 0.05
    before = (tmp_path / "scores.csv").read_text()
    validated(scores, [(5 + pred, label)], [], epochs=1)
    engine = Engine(lambda engine, batch: None)
    engine.state.best_metric_epoch, engine.state.epoch = 1, 2
    writer.write(engine)  # this validation is worse
    assert (tmp_path / "scores.csv").read_text() == before
    assert {path.name for path in tmp_path.rglob("*")} == {"scores.csv", "figures", "calibration.png"}


def test_a_folder_of_volumes_gets_a_table_and_the_bad_ones_are_named(tmp_path):
    items = [{"case": "good, one", "image": torch.full((1, 2, 2, 2), 3.0)}, {"case": "cut", "error": "cannot be read"}]
    items += [
        {"case": "odd", "image": torch.full((1, 2, 2, 2), math.inf)},
        {"case": "b", "image": torch.ones(1, 2, 2, 2)},
    ]

    def infer(volume, network):
        mean = volume.mean(dim=(1, 2, 3, 4))
        return torch.stack([mean, torch.full_like(mean, 2.0)], dim=1)

    evaluator = VolumeEvaluator(
        device=torch.device("cpu"),
        val_data_loader=items,
        network=torch.nn.Identity(),
        inferer=infer,
        iteration_update=PredictTarget(Compose([Activationsd("pred", softmax=True)])),
        val_handlers=[PredictionWriter(tmp_path, ["F", "M"])],
    )
    (tmp_path / "predictions.csv").write_text("of an earlier run")
    with pytest.raises(Mistake, match="2 of 4 volumes have no prediction") as caught:
        evaluator.run()
    assert "cut: cannot be read" in str(caught.value)
    assert "odd: the network's output is not finite" in str(caught.value)
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["case", "prediction", "probability of F", "probability of M"]
    assert [row[:2] for row in rows[1:]] == [["good, one", "F"], ["b", "M"]]
    assert float(rows[1][2]) == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.csv"]


def test_what_a_network_predicts_is_read_off_its_record(tmp_path):
    with pytest.raises(Mistake, match=r"nothing beside .*model.pt says what it predicts: copy it together with"):
        read_target(tmp_path / "model.pt")
    (tmp_path / "model.json").write_text(json.dumps({"seen": {}}))
    with pytest.raises(Mistake, match="nothing beside"):
        read_target(tmp_path / "model.pt")
    target = {"field": "sex", "classes": ["F", "M"]}
    (tmp_path / "model.json").write_text(json.dumps({"target": target}))
    assert read_target(tmp_path / "model.pt") == target


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    """Ten volumes, of which every other one has a dark half; their sex says which, their age how bright they are."""
    folder, items = tmp_path_factory.mktemp("people"), []
    for number in range(10):
        path = write_volume(folder / "imagesTr" / f"{number}.nii.gz", seed=number, shape=(40, 30, 33))
        image = nib.load(path)
        voxels = np.asarray(image.dataobj).copy()
        voxels[:20] *= 0.3 if number % 2 else 1
        voxels[:, :, 27:] = 0  # air, which is cropped
        nib.save(nib.Nifti1Image(voxels, image.affine), path)
        items.append(
            {"image": f"imagesTr/{path.name}", "sex": "FM"[number % 2], "age": 20 + 40 * (number % 2) + number}
        )
    del items[0]["age"]
    (folder / "dataset.json").write_text(json.dumps({"training": items[:6], "validation": items[6:]}))
    return folder


def run(run_id, **knobs):
    """Do all steps of a workflow, in this process."""
    workflow = started(*FILES, run_id=run_id, **(KNOBS | knobs))
    workflow.parser.get_parsed_content(f"{run_id}::{len(workflow.parser[run_id]) - 1}")
    return workflow.parser.get_parsed_content


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def frozen(people, tmp_path_factory) -> Path:
    """What a fine-tuning for the sex leaves: of a head on an encoder that stays as it is, encoder.pt."""
    out = tmp_path_factory.mktemp("out")
    torch.save(tiny(strict_stem=True).state_dict(), out / "encoder.pt")
    knobs = {"dataset_dir": str(people), "pretrained": str(out / "encoder.pt"), "target": "sex", "spacing": None}
    knobs |= {"max_epochs": 4, "freeze_epochs": 4, "iterations_per_epoch": 10, "learning_rate": 0.01}
    run("finetuning", **knobs, output_dir=str(out), affine_prob=0.0, val_interval=2, precision="fp32")
    return out


def by_case(path):
    return {row.pop("case"): row for row in table(path)}


def same_answers(answers, scores):
    """Compare predictions with the scores of their cases."""
    for case, row in scores.items():
        expected = {name: value for name, value in row.items() if name != "truth"}
        assert answers[case] == expected, case


def test_a_head_learns_classes_from_a_frozen_encoder_and_prediction_says_the_same(people, frozen, tmp_path):
    assert [record["epoch"] for record in records(frozen)] == [0, 2, 4]
    assert records(frozen)[-1]["val_auroc"] == 1
    weights = torch.load(frozen / "checkpoints" / "model.pt", weights_only=True)
    for name, weight in torch.load(frozen / "encoder.pt", weights_only=True).items():
        if name.startswith("encoder."):
            assert torch.equal(weights[name], weight)
    assert read_target(frozen / "checkpoints" / "model.pt") == {"field": "sex", "classes": ["F", "M"]}
    assert (frozen / "figures" / "calibration.png").exists()

    knobs = {"ckpt_dir": str(frozen / "checkpoints"), "output_dir": str(tmp_path)}
    write_volume(people / "new" / "broken.nii.gz").write_bytes(b"no volume")
    with pytest.raises(RuntimeError) as caught:
        run("prediction", **knobs, dataset_dir=str(people / "new"))
    found = [str(error) for error in causes(caught.value)]
    assert any("1 of 1 volumes have no prediction" in cause for cause in found)
    run("prediction", **knobs, dataset_dir=str(people))
    answers, scores = by_case(tmp_path / "predictions.csv"), by_case(frozen / "scores.csv")
    assert len(answers) == 10
    assert {case: row["truth"] for case, row in scores.items()} == {
        f"imagesTr/{number}": "FM"[number % 2] for number in range(6, 10)
    }
    same_answers(answers, scores)


def test_a_number_is_learned_with_attention_and_all_of_the_network(people, tmp_path, capsys):
    knobs = {"dataset_dir": str(people), "target": "age", "task": "regression", "pooling": "attention"}
    knobs |= {"freeze_epochs": 1, "max_epochs": 3, "iterations_per_epoch": 6, "output_dir": str(tmp_path)}
    knobs |= {"precision": "fp32"}  # as its prediction
    resolve = run("finetuning", **knobs)
    assert "left out 1 of 6 cases, as they have no age: imagesTr/0" in capsys.readouterr().out
    last = records(tmp_path)[-1]
    assert {"val_mae", "val_r2"} <= last.keys()
    best = min(record["val_mae"] for record in records(tmp_path))
    rows = table(tmp_path / "scores.csv")
    assert np.mean([abs(float(row["truth"]) - float(row["prediction"])) for row in rows]) == pytest.approx(
        best, rel=1e-4
    )
    assert resolve("train::trainer").optimizer.param_groups[0]["lr"] < 0.001  # the cosine has come down
    ages = [20 + 40 * (number % 2) + number for number in range(1, 6)]
    weights = torch.load(tmp_path / "checkpoints" / "model.pt", weights_only=True)
    assert weights["mean"].item() == pytest.approx(np.mean(ages))
    assert weights["deviation"].item() == pytest.approx(np.std(ages), rel=1e-5)

    pred = json.loads((tmp_path / "bundle/configs/metadata.json").read_text())["network_data_format"]["outputs"]["pred"]
    assert pred["channel_def"] == {"0": "age, in the unit of its datalist"}
    place = tmp_path / "predicted"
    run("prediction", dataset_dir=str(people), ckpt_dir=str(tmp_path / "checkpoints"), output_dir=str(place))
    same_answers(by_case(place / "predictions.csv"), by_case(tmp_path / "scores.csv"))


def run_bundle(folder, kind, run_id, **knobs):
    """Run a config of a finished bundle, in this process."""
    config = {"train": "train.json", "infer": "inference.json"}[kind]
    paths = {"num_workers": 0, "precision": "fp32"} | knobs
    workflow = ConfigWorkflow(str(folder / "configs" / config), workflow_type=kind, run_id=run_id, **paths)
    workflow.initialize()
    assert workflow.check_properties() == []
    workflow.run()


def test_monais_tools_find_nothing_wrong_with_the_finished_bundle(frozen, monkeypatch, tmp_path):
    folder = frozen / "bundle"
    metadata = json.loads((folder / "configs/metadata.json").read_text())
    pred = metadata["network_data_format"]["outputs"]["pred"]
    assert pred["channel_def"] == {"0": "F", "1": "M"}
    assert (pred["spatial_shape"], pred["num_channels"]) == ([], 2)
    assert metadata["eval_metrics"]["val_auroc"] == 1
    (tmp_path / "schema.json").write_text(json.dumps({"type": "object", "required": REQUIRED}))
    monkeypatch.chdir(folder)
    meta = {"meta_file": "configs/metadata.json"}
    monai.bundle.verify_metadata(**meta, filepath=tmp_path / "schema.json")
    monai.bundle.verify_net_in_out("network_def", **meta, config_file="configs/inference.json", device="cpu")


def test_the_finished_bundle_predicts_elsewhere_by_itself_and_with_monais_own_parts(people, frozen, tmp_path):
    folder = shutil.copytree(frozen / "bundle", tmp_path / "sex")
    run_bundle(folder, "infer", "inference", dataset_dir=str(people), output_dir=str(tmp_path / "out"))
    answers, scores = by_case(tmp_path / "out/predictions.csv"), by_case(frozen / "scores.csv")
    same_answers(answers, scores)
    network = monai.bundle.load("sex", bundle_dir=str(tmp_path), workflow_type="inference", device="cpu")
    script = torch.jit.load(folder / "models/model.ts")
    parser = ConfigParser()
    parser.read_config(str(folder / "configs/inference.json"))
    parser.config |= {"bundle_root": str(folder), "device": "cpu", "precision": "fp32"}
    pre, infer, post = (parser.get_parsed_content(name) for name in ("preprocessing", "inferer", "postprocessing"))
    image = pre({"image": str(people / "imagesTr/7.nii.gz")})["image"]
    for one in (network.eval(), script):
        with torch.no_grad():
            found = post({"pred": infer(image[None], one)[0]})["pred"]
        expected = [float(answers["imagesTr/7"][f"probability of {name}"]) for name in "FM"]
        assert found.tolist() == pytest.approx(expected, abs=1e-4)


def test_the_finished_bundle_goes_on_with_more_labels_of_the_same_classes_alone(people, frozen, tmp_path):
    folder = shutil.copytree(frozen / "bundle", tmp_path / "sex")
    config = json.loads((folder / "configs/train.json").read_text())
    assert (config["learning_rate"], config["freeze_epochs"], config["channels"]) == (0.01, 0, ["F", "M"])
    content = json.loads((people / "dataset.json").read_text())
    items = content["training"] + content["validation"]
    for item in items:
        item["image"] = str(people / item["image"])
    knobs = {"max_epochs": 1, "iterations_per_epoch": 1, "affine_prob": 0.0}
    others = [item | {"sex": item["sex"].replace("F", "X")} for item in items]
    for name, cases in (("others", others), ("more", items)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"training": cases[:8], "validation": cases[8:]}))
    with pytest.raises(RuntimeError) as caught:
        run_bundle(folder, "train", "training", dataset_dir=str(tmp_path / "others.json"), **knobs)
    with pytest.raises(Mistake, match=r"target is sex \(M, X\) here, but sex \(F, M\) in the network"):
        raise next(error for error in causes(caught.value) if isinstance(error, Mistake))
    out = tmp_path / "again"
    run_bundle(folder, "train", "training", dataset_dir=str(tmp_path / "more.json"), output_dir=str(out), **knobs)
    assert [record["epoch"] for record in records(out)] == [0, 1]
    assert records(out)[0]["val_auroc"] == 1
    assert read_target(folder / "models/model.pt") == {"field": "sex", "classes": ["F", "M"]}
    more = str(tmp_path / "more.json")
    run_bundle(folder, "infer", "inference", dataset_dir=more, output_dir=str(tmp_path / "out"))
    same_answers(by_case(tmp_path / "out/predictions.csv"), by_case(out / "scores.csv"))


def test_another_target_is_not_continued_and_a_run_that_goes_on_is_the_same(people, tmp_path):
    knobs = {"dataset_dir": str(people), "target": "sex", "freeze_epochs": 1, "max_epochs": 3, "precision": "fp32"}
    once, twice = str(tmp_path / "once"), str(tmp_path / "twice")
    run("finetuning", **knobs, output_dir=once)
    # Stopped after its second epoch: the schedule is that of three.
    stopped = started(*FILES, run_id="finetuning", **(KNOBS | knobs), output_dir=twice).parser.get_parsed_content
    trainer = stopped("train::trainer")
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=2), trainer.terminate)
    trainer.run()
    stopped("train::handlers::0").unlock()
    run("finetuning", **knobs, output_dir=twice, resume=True)
    ways = [torch.load(Path(way) / "checkpoints" / "training_state.pt", weights_only=True) for way in (once, twice)]
    assert all(torch.equal(ways[0]["network"][name], weight) for name, weight in ways[1]["network"].items())
    with pytest.raises(RuntimeError) as caught:
        run("finetuning", **knobs | {"target": "age", "task": "regression"}, output_dir=once, resume=True)
    assert "is of a run with target {'field': 'sex'" in str(caught.value.__cause__)


def test_classes_are_balanced_unless_they_should_not_be(people, tmp_path):
    for balance, groups in ((True, [0, 1] * 3), (False, None)):
        settings = {"dataset_dir": str(people), "target": "sex", "class_balance": balance, "output_dir": str(tmp_path)}
        resolve = started(*FILES, run_id="finetuning", **KNOBS, **settings).parser.get_parsed_content
        assert resolve("train::sampler::groups") == groups
        assert len(resolve("train::sampler").pools) == (2 if balance else 1)


def test_the_largest_auroc_is_the_best_of_equal_ones_the_last_and_the_smallest_error(people, tmp_path):
    for target, better, worse in (("sex", (0.7, 0.7), (0.6, 0.7)), ("age", (0.6, 0.7), (0.7, 0.7))):
        settings = {"dataset_dir": str(people), "target": target, "output_dir": str(tmp_path)}
        settings["task"] = "regression" if target == "age" else "auto"
        resolve = started(*FILES, run_id="finetuning", **KNOBS, **settings).parser.get_parsed_content
        evaluator = resolve("validate::evaluator")
        assert evaluator.state.key_metric_name == {"sex": "val_auroc", "age": "val_mae"}[target]
        assert evaluator.metric_cmp_fn(*better)
        assert not evaluator.metric_cmp_fn(*worse)


def test_the_config_has_what_monai_wants_of_a_training(people, tmp_path):
    settings = KNOBS | {"dataset_dir": str(people), "output_dir": str(tmp_path), "target": "sex"}
    files = [str(ROOT / "configs" / name) for name in FILES]
    workflow = ConfigWorkflow(files, workflow_type="train", **settings)
    workflow.initialize()
    assert workflow.check_properties() == []


@pytest.mark.slow
def test_a_target_that_is_not_there_ends_a_run_in_one_line(people, tmp_path):
    files = str([str(ROOT / "configs" / name) for name in FILES])
    settings = KNOBS | {"dataset_dir": people, "output_dir": tmp_path, "target": "weight"}
    result = bundle("run", "finetuning", "--config_file", files, **settings)
    assert result.returncode == 1
    assert "error: none of the 6 training cases has a weight: --target names a field" in result.stderr
    assert "which has age, sex" in result.stderr
    assert "Traceback" not in result.stderr
