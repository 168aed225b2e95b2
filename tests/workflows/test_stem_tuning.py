"""Promises of stem tuning."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, TINY_KNOBS, bundle, noise, tiny
from monai.bundle import ConfigWorkflow

from scripts import BertsWinEncoder, BertsWinMAE
from scripts.losses import MaskedL2Loss, choose_loss
from scripts.metrics import StemTuningMetrics
from scripts.mistakes import Mistake
from scripts.networks import patchify, unpatchify
from scripts.weights import write_record
from scripts.workflows import StemTuning, StemTuningLoss, StemTuningReport, load_original
from scripts.workflows.stem_tuning import summarise

FILES = [str(ROOT / "configs" / name) for name in ("train.yaml", "tune_stem.yaml", "small.yaml")]
build = partial(BertsWinMAE, **TINY)
KNOBS = {name: value for name, value in TINY_KNOBS.items() if name != "figure_interval"}  # tuning draws none


def tuning(stem="keep", objective="distillation", **settings):
    return StemTuning(tiny(**settings), stem, build, objective)


@pytest.mark.parametrize("objective", ["reconstruction", "distillation", "both"])
def test_only_the_stem_learns(objective):
    network = tuning(objective=objective).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    volume = noise(2, 1, 32, 32, 32)
    target = StemTuningLoss(objective)(network(volume), noise(2, 64, 512))
    target.backward()
    optimizer.step()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in network.parameters())
    assert any(
        not torch.equal(tuned, original)
        for tuned, original in zip(network.stem.parameters(), network.original.encoder.stem.parameters(), strict=True)
    )
    assert network.changed_weights() == []


def test_a_changed_frozen_weight_is_found():
    network = tuning()
    with torch.no_grad():
        network.network.decoder.head[6].bias.add_(1e-6)
    assert network.changed_weights() == ["decoder.head.6.bias"]
    with pytest.raises(RuntimeError, match=r"1 frozen weights changed .*, the first one decoder\.head\.6"):
        StemTuningReport("x.json", "x.jsonl", network).write(None)


@torch.no_grad()
def test_the_target_is_the_original_stem_in_patch_mode_also_when_the_stem_is_swapped(caplog):
    caplog.set_level("INFO")
    network, volume = tuning(stem="strict").eval(), noise(1, 1, 32, 32, 32)
    out = network(volume)
    assert torch.equal(out["patch_features"], tiny().extract_features(volume))
    assert network.stem.stages[0][0].kernel_size == (2, 2, 2)
    assert network.original.encoder.stem.stages[0][0].kernel_size == (3, 3, 3)
    assert torch.equal(network.network.mask_token, network.original.mask_token)
    assert "new, as the stem is a fresh strict one: encoder.stem.proj.bias, encoder.stem.proj.weight" in caplog.text
    assert network.changed_weights() == []


def test_distillation_counts_in_variances_of_the_goal():
    goal = noise(2, 4, 3, 3, 3)
    constant = goal.mean(dim=(0, 2, 3, 4), keepdim=True).expand_as(goal)
    loss = StemTuningLoss("distillation")
    assert loss({"features": goal, "patch_features": goal}, goal) == 0
    assert loss({"features": constant, "patch_features": goal}, goal).item() == pytest.approx(1, abs=1e-5)
    scaled = loss({"features": 5 * constant, "patch_features": 5 * goal}, goal).item()
    assert scaled == pytest.approx(1, abs=1e-5)


def test_the_kind_of_stem_is_read_off_the_weights(tmp_path):
    for strict in (False, True):
        model = tiny(strict_stem=strict)
        torch.save(model.state_dict(), tmp_path / "model.pt")
        loaded = load_original(build, tmp_path / "model.pt")
        assert loaded.encoder.stem.stages[0][0].kernel_size == ((2,) * 3 if strict else (3,) * 3)
        assert torch.equal(loaded.mask_token, model.mask_token)


def test_a_summary_compares_the_best_validation_with_the_untuned_network():
    def record(epoch, objective, cosine, volumetric):
        return {"epoch": epoch, "val_objective": objective, "val_feature_cosine": cosine,
                "val_volumetric": volumetric, "val_patch_mode": 0.3}  # fmt: skip

    report = summarise([record(0, 2.0, 0.5, 0.8), record(1, 0.1, 0.9, 0.4), record(2, 0.2, 0.8, 0.2)])
    assert report == {
        "patch_mode": 0.3,
        "volumetric_before": 0.8,
        "volumetric_after": 0.4,
        "feature_cosine_before": 0.5,
        "feature_cosine_after": 0.9,
        "gap_closed": pytest.approx(0.8),
        "best_epoch": 1,
    }
    later = summarise([record(1, 0.1, 0.9, 0.4), record(2, 0.2, 0.8, 0.2)])  # nothing was validated before
    assert later == {name: report[name] for name in ("patch_mode", "volumetric_after", "feature_cosine_after")} | {
        "best_epoch": 1
    }


def test_errors_are_of_voxels_also_where_patches_are_standardised():
    volume = noise(2, 1, 32, 32, 32)
    target = patchify(volume, 8)
    loss = StemTuningLoss("distillation", choose_loss("normalised_l2", {"normalised_l2": MaskedL2Loss(True)}))
    perfect = unpatchify(loss.reconstruction.as_prediction(target), 8, (4, 4, 4))
    features = torch.ones(2, 8, 4, 4, 4)
    prediction = {"features": features, "patch_features": features, "patch_mode_cube": perfect}
    metrics = StemTuningMetrics(loss, 8)
    metrics.update((volume, target, prediction | {"reconstructed_cube": perfect}))
    assert metrics.compute()["volumetric"] < 1e-6
    assert metrics.compute()["patch_mode"] < 1e-6


@pytest.mark.parametrize(("trained", "loss", "instead"), [("normalised_l2", "l2", "normalised_l2"),
                                                         ("structural", "normalised_l2", "l2")])  # fmt: skip
def test_a_decoder_is_tuned_to_what_it_has_learned_to_rebuild(pretrained, tmp_path, trained, loss, instead):
    path = Path(shutil.copy(pretrained, tmp_path / "model.pt"))
    write_record({"provenance": {"loss": trained}}, path)
    with pytest.raises(Mistake, match=f"was trained with the loss {trained}, .*: tune it with --loss {instead}, not"):
        load_original(lambda **_: tiny(), path, loss=loss)
    load_original(lambda **_: tiny(), path, loss=trained)


def test_unknown_choices_are_refused():
    with pytest.raises(
        ValueError, match=r"objective 'fast' must be one of \('reconstruction', 'distillation', 'both'\)"
    ):
        StemTuningLoss("fast")
    with pytest.raises(ValueError, match="stem 'new' must be 'keep' or 'strict'"):
        tuning(stem="new")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    path = tmp_path_factory.mktemp("pretrained") / "model.pt"
    torch.save(tiny().state_dict(), path)
    return path


def tune(**knobs):
    files = str(FILES)
    return bundle("run", "tuning", "--config_file", files, **(KNOBS | knobs))


def test_check_properties_finds_nothing_missing(cohort, tmp_path, pretrained):
    workflow = ConfigWorkflow(
        FILES,
        workflow_type="train",
        dataset_dir=str(cohort),
        output_dir=str(tmp_path),
        pretrained=str(pretrained),
        **KNOBS,
    )
    workflow.initialize()
    assert workflow.check_properties() == []


@pytest.mark.slow
@pytest.mark.parametrize(("stem", "objective"), [("keep", "distillation"), ("strict", "both")])
def test_tuning_leaves_a_report_a_network_and_an_encoder(cohort, tmp_path, pretrained, stem, objective):
    settings = {"dataset_dir": cohort, "pretrained": pretrained, "stem": stem, "objective": objective}
    result = tune(output_dir=tmp_path, **settings)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "stem_tuning.json").read_text())
    assert report.keys() == {
        *("patch_mode", "volumetric_before", "volumetric_after", "feature_cosine_before", "feature_cosine_after"),
        *("gap_closed", "best_epoch", "objective"),
    }
    epochs = [json.loads(line)["epoch"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert epochs == [0, 1, 2]
    words = (
        f"to a cosine of {report['feature_cosine_after']:.3f}; before tuning to {report['feature_cosine_before']:.3f}"
    )
    assert words in (tmp_path / "report.html").read_text()

    strict = stem == "strict"
    tuned = BertsWinMAE(**(TINY | {"strict_stem": strict}))
    tuned.load_state_dict(torch.load(tmp_path / "checkpoints" / "model.pt", weights_only=True))
    encoder = BertsWinEncoder(**{k: v for k, v in TINY.items() if not k.startswith("decoder")}, strict_stem=strict)
    encoder.load_state_dict(torch.load(tmp_path / "checkpoints" / "encoder.pt", weights_only=True))
    volume = noise(1, 1, 32, 32, 32)
    assert torch.equal(encoder.eval()(volume), tuned.eval().encoder(volume))

    other = tune(
        output_dir=tmp_path, resume="true", **(settings | {"objective": "both" if stem == "keep" else "distillation"})
    )
    assert other.returncode == 1
    assert f"is of a run with objective '{objective}', not" in other.stderr
    assert "Traceback" not in other.stderr

    resumed = tune(output_dir=tmp_path, resume="true", **(settings | {"max_epochs": 3}))
    assert resumed.returncode == 0, resumed.stderr
    epochs = [json.loads(line)["epoch"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert epochs == [0, 1, 2, 3]


@pytest.mark.slow
def test_tuning_without_pretrained_weights_ends_with_a_message(cohort, tmp_path):
    result = tune(dataset_dir=cohort, output_dir=tmp_path)
    assert result.returncode == 1
    assert "error: give --pretrained" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_run_is_not_continued_from_other_weights():
    network = tuning()
    with torch.no_grad():
        network.network.mask_token.add_(1)  # as resuming brings it back
    report = StemTuningReport("x.json", "x.jsonl", network)
    with pytest.raises(ValueError, match="--pretrained is not the network that this run started from"):
        report.check_start(None)


def test_stem_settings_that_contradict_the_weights_are_refused(tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "model.pt")
    assert not load_original(build, tmp_path / "model.pt").encoder.strict_stem
    with pytest.raises(ValueError, match="has the default stem, not what strict_stem True says"):
        load_original(build, tmp_path / "model.pt", strict_stem=True)
    with pytest.raises(ValueError, match="blockwise_norm needs a strict stem, which the pre-trained one is not"):
        StemTuning(tiny(), "keep", build, "both", blockwise_norm=True)


@torch.no_grad()
def test_a_stem_without_a_gap_has_nothing_to_tune(tmp_path):
    torch.save(tiny(strict_stem=True).state_dict(), tmp_path / "model.pt")
    blockwise = partial(build, blockwise_norm=True)
    original = load_original(blockwise, tmp_path / "model.pt")
    out = StemTuning(original, "keep", blockwise, "both", blockwise_norm=True).eval()(noise(1, 1, 32, 32, 32))
    torch.testing.assert_close(out["features"], out["patch_features"], rtol=1e-5, atol=1e-5)


def test_an_encoder_alone_is_refused_by_name(tmp_path):
    torch.save(tiny().encoder.state_dict(), tmp_path / "encoder.pt")
    with pytest.raises(ValueError, match=r"encoder\.pt holds an encoder alone, or another network"):
        load_original(build, tmp_path / "encoder.pt")
