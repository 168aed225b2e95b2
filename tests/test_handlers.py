"""Promises of metrics, pictures, checkpoints and early stopping."""

import json
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import noise, tiny
from ignite.engine import Engine, Events, State

from scripts.handlers import EarlyStopping, HiddenVoxelMetrics, MetricsRecorder, ReconstructionFigures, composite
from scripts.masking import patchify


def output(prediction, volume, hidden):
    return {"image": volume, "pred": {"reconstructed_cube": prediction, "mae_mask_1d": hidden}}


def measure(*outputs, data_range=2.0):
    metric = HiddenVoxelMetrics(data_range)
    engine = Engine(lambda _, batch: batch)
    metric.attach(engine, "all")
    return engine.run(outputs).metrics


def test_metrics_look_at_hidden_voxels_only_and_pool_all_batches():
    volume, prediction = noise(4, 1, 16, 16, 16), noise(4, 1, 16, 16, 16, seed=1)
    hidden = (torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) > 0.4).float()
    metrics = measure(*(output(prediction[i : i + 2], volume[i : i + 2], hidden[i : i + 2]) for i in (0, 2)))

    rows = hidden.bool()
    truth, guess = patchify(volume, 8)[rows].double(), patchify(prediction, 8)[rows].double()
    mse = (truth - guess).square().mean().item()
    assert metrics["mse"] == pytest.approx(mse)
    assert metrics["mae"] == pytest.approx((truth - guess).abs().mean().item())
    assert metrics["psnr"] == pytest.approx(10 * np.log10(4 / mse))
    assert metrics["unexplained"] == pytest.approx(mse / truth.var(correction=0).item())


def test_a_constant_prediction_leaves_everything_unexplained_and_a_perfect_one_nothing():
    volume, hidden = noise(1, 1, 16, 16, 16), torch.ones(1, 8)
    constant = torch.full_like(volume, volume.mean().item())
    assert measure(output(constant, volume, hidden))["unexplained"] == pytest.approx(1, abs=1e-6)
    perfect = measure(output(volume, volume, hidden))
    assert (perfect["mse"], perfect["ssim"]) == (0, pytest.approx(1, abs=1e-5))


def test_what_the_decoder_says_of_visible_patches_changes_no_metric():
    volume, prediction, hidden = noise(1, 1, 16, 16, 16), noise(1, 1, 16, 16, 16, seed=1), torch.eye(8)[:1]
    elsewhere = torch.where(composite(volume, output(prediction, volume, hidden)["pred"]) == volume, 99.0, prediction)
    assert not torch.equal(prediction, elsewhere)
    assert measure(output(prediction, volume, hidden)) == measure(output(elsewhere, volume, hidden))


def run_recorded(recorder, epochs, start=0):
    trainer = Engine(lambda _, batch: {"loss": torch.tensor(float(batch))})
    trainer.optimizer = torch.optim.SGD([torch.zeros(1)], 0.5)
    trainer.add_event_handler(Events.STARTED, lambda engine: setattr(engine.state, "epoch", start))
    recorder.attach(trainer)
    trainer.run([1, 3], max_epochs=epochs)


def test_every_validation_leaves_one_line_and_a_resumed_run_replaces_what_it_repeats(tmp_path):
    validator = SimpleNamespace(state=State(metrics={"val_mse": 0.5, "val_ssim": 0.25}, key_metric_name="val_mse"))
    path = tmp_path / "metrics.jsonl"
    run_recorded(MetricsRecorder(path, validator), epochs=3)
    validator.state.metrics["val_mse"] = 0.125
    run_recorded(MetricsRecorder(path, validator), epochs=4, start=1)  # as after a kill behind epoch 1's checkpoint
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["epoch"] for record in records] == [0, 1, 2, 3, 4]  # 0: metrics that were there before training
    assert [record["val_mse"] for record in records] == [0.5, 0.5, 0.125, 0.125, 0.125]
    assert [record["train_loss"] for record in records] == [None, 2.0, 2.0, 2.0, 2.0]
    assert records[1]["learning_rate"] == 0.5
    assert {"iteration", "val_ssim", "seconds"} <= records[1].keys()
    assert list(tmp_path.iterdir()) == [path]


def test_figures_show_the_same_volumes_each_time(tmp_path):
    model = tiny()
    validator = Engine(lambda _, batch: {"image": batch["image"], "pred": model(batch["image"])})
    figures = ReconstructionFigures(tmp_path, num_volumes=3, interval=2, last_epoch=5)
    figures.attach(validator)
    batches = [{"image": noise(2, 1, 32, 32, 32, seed=i), "case": [f"{i}a", f"{i}b"]} for i in range(3)]
    with torch.no_grad():
        validator.run(batches, max_epochs=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_0002.png", "epoch_0004.png", "epoch_0005.png"]
    assert [case for case, _ in figures.rows] == ["0a", "0b", "1a"]
    assert matplotlib.image.imread(tmp_path / "epoch_0005.png").std() > 0.1


@pytest.mark.parametrize(("patience", "last"), [(2, 5), (3, 6), (10, 8)])
def test_training_stops_when_the_best_epoch_is_too_long_ago(patience, last):
    validator = SimpleNamespace(state=State(best_metric_epoch=-1))
    trainer = Engine(lambda *_: None)

    @trainer.on(Events.EPOCH_COMPLETED(event_filter=lambda _, epoch: epoch <= 3))
    def improve(engine):
        validator.state.best_metric_epoch = engine.state.epoch

    EarlyStopping(patience, validator).attach(trainer)
    assert trainer.run([0], max_epochs=8).epoch == last
