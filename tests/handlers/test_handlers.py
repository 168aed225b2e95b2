"""Promises of metrics, pictures, checkpoints and early stopping."""

import json
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import noise, tiny, trainer
from ignite.engine import Engine, Events, State

from scripts.engines import NonFiniteLossError
from scripts.handlers import (
    Checkpointing,
    EarlyStopping,
    MetricsRecorder,
    ReconstructionFigures,
    RestoreIntensities,
    ValidationHandler,
)
from scripts.losses import MaskedL2Loss
from scripts.metrics import HiddenVoxelMetrics, composite
from scripts.networks import patchify


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
    trainer.add_event_handler(
        Events.STARTED, lambda engine: vars(engine.state).update(epoch=start, iteration=2 * start)
    )
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


def checkpointed(folder, scores, resume=False, **settings):
    """Train as many epochs as there are scores, of a validation that gives these; return the trainer."""
    network = tiny()
    scheduler_steps = []
    validator = Engine(lambda *_: None)
    validator.state.best_metric, validator.state.best_metric_epoch = -1, -1
    engine = trainer(network, epochs=len(scores), **settings)

    def validate(engine):
        score = scores[engine.state.epoch - 1]
        if validator.state.best_metric_epoch == -1 or score < validator.state.best_metric:
            validator.state.best_metric, validator.state.best_metric_epoch = score, engine.state.epoch

    Checkpointing(folder, validator, network, resume).attach(engine)
    engine.add_event_handler(Events.EPOCH_STARTED, lambda engine: scheduler_steps.append(engine.state.epoch))
    engine.add_event_handler(Events.EPOCH_COMPLETED, validate)
    engine.run()
    engine.epochs_run = scheduler_steps
    return engine


def test_the_best_network_is_kept_when_later_ones_are_worse(tmp_path):
    engine = checkpointed(tmp_path, [0.5, 0.3, 0.4])
    best, last = torch.load(tmp_path / "model.pt"), torch.load(tmp_path / "training_state.pt")
    assert (last["best_metric"], last["best_metric_epoch"], last["epoch"]) == (0.3, 2, 3)
    assert not torch.equal(best["mask_token"], last["network"]["mask_token"])
    assert torch.equal(last["network"]["mask_token"], engine.network.mask_token)


def test_resuming_counts_in_epochs_and_takes_new_settings(tmp_path):
    def adamw(decay):
        # A network of its own would do: the trainer's is replaced by the state that is resumed.
        return {"optimizer_factory": lambda network: torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=decay)}

    checkpointed(tmp_path, [0.5, 0.4, 0.3], length=8, **adamw(0.1))  # four iterations an epoch
    engine = checkpointed(tmp_path, [0.5, 0.4, 0.3, 0.2, 0.1], resume=True, length=4, **adamw(0.9))  # two
    assert engine.epochs_run == [4, 5]
    assert engine.state.iteration == 10
    assert engine.optimizer.param_groups[0]["weight_decay"] == 0.9
    assert engine.optimizer.state_dict()["state"][0]["step"] == 3 * 4 + 2 * 2


def test_a_finished_run_says_so_when_resumed(tmp_path, caplog):
    caplog.set_level("INFO")
    checkpointed(tmp_path, [0.5, 0.4])
    engine = checkpointed(tmp_path, [0.5, 0.4], resume=True)
    assert engine.epochs_run == []
    assert "nothing is left to do: a larger max_epochs trains on" in caplog.text


def test_a_resumed_rate_is_the_one_of_the_whole_run(tmp_path):
    def rates(epochs, resume=False):
        seen = []

        def factory(network):
            optimizer = torch.optim.SGD(network.parameters(), 1.0)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
            optimizer.register_step_pre_hook(lambda *_: seen.append(optimizer.param_groups[0]["lr"]))
            return optimizer, scheduler

        checkpointed(tmp_path, [1.0] * epochs, resume, length=6, optimizer_factory=factory, accumulation_steps=2)
        return seen

    whole = rates(4)
    (tmp_path / "training_state.pt").unlink()
    assert rates(2) + rates(4, resume=True) == whole


def test_a_validation_that_is_not_finite_ends_the_run_before_anything_is_saved(tmp_path):
    validator = SimpleNamespace(state=State(metrics={"val_mse": float("nan")}, key_metric_name="val_mse"))
    with pytest.raises(NonFiniteLossError, match=r"val_mse is nan after epoch \d: training has diverged"):
        run_recorded(MetricsRecorder(tmp_path / "metrics.jsonl", validator), epochs=2)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("interval", "epochs", "expected"), [(1, 3, [1, 2, 3]), (2, 4, [2, 4]), (2, 5, [2, 4, 5]), (5, 2, [2])]
)
def test_the_last_epoch_is_validated_whatever_the_interval(interval, epochs, expected):
    validated = []
    handler = ValidationHandler(interval)
    handler.validator = SimpleNamespace(run=validated.append)
    engine = Engine(lambda *_: None)
    handler.attach(engine)
    engine.run([0], max_epochs=epochs)
    assert validated == expected


def test_voxels_of_a_network_trained_on_normalised_targets_are_measured_on_their_own_scale():
    volume = 3 * noise(2, 1, 16, 16, 16) + 7
    target = patchify(volume, 8)
    standard = (target - target.mean(dim=-1, keepdim=True)) / target.std(dim=-1, correction=0, keepdim=True)
    state = SimpleNamespace(output={
        "image": volume, "label": target, "pred": {"reconstructed_patches": standard, "reconstructed_cube": None}
    })  # fmt: skip
    RestoreIntensities(MaskedL2Loss(normalise_target=True)).restore(SimpleNamespace(state=state))
    torch.testing.assert_close(state.output["pred"]["reconstructed_cube"], volume, rtol=1e-4, atol=1e-4)
    assert torch.equal(state.output["pred"]["reconstructed_patches"], standard)  # what the loss looks at
