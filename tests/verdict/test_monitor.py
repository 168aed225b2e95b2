"""Promises of the look at the features: when it is taken, what it costs, and that training does not notice."""

import random
from math import inf

import numpy as np
import pytest
import torch
from conftest import Volumes, records, started, tiny, train, trainer
from monai.engines import SupervisedEvaluator
from monai.utils import set_determinism
from torch import nn

from scripts.engines import AutocastInferer, PrepareMaskedBatch
from scripts.handlers import ValidationHandler
from scripts.verdict import FeatureMonitor, monitor

FIGURES = {
    *("effective_rank", "dead_channels", "token_cosine", "shift_change", "turn_change", "intensity_change"),
    *("patient_ratio", "monitor_seconds"),
}


def evaluator(network, precision="fp32", interval=2, batch_size=2, **settings):
    inferer = AutocastInferer(precision, "cpu")
    looking = FeatureMonitor(network, inferer, **({"num_volumes": 3, "interval": interval} | settings))
    return SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=torch.utils.data.DataLoader(Volumes(4), batch_size=batch_size),
        network=network,
        inferer=inferer,
        prepare_batch=PrepareMaskedBatch(8, 0.75),
        decollate=False,
        val_handlers=[looking],
    )


def looked(engine, epochs):
    """Run epochs one by one, as a trainer does, and name those whose metrics have figures."""
    found = []
    for epoch in epochs:
        engine.run(epoch)
        found += [epoch] if "val_effective_rank" in engine.state.metrics else []
    return found


def test_it_looks_first_at_every_interval_and_last(monkeypatch):
    monkeypatch.setattr(monitor, "SHARE", inf)
    assert looked(evaluator(tiny(), interval=3, last_epoch=8), range(1, 9)) == [1, 3, 6, 8]
    every_fourth = {"interval": 10, "val_interval": 4, "last_epoch": 30}
    assert looked(evaluator(tiny(), **every_fourth), [*range(4, 29, 4), 30]) == [4, 12, 20, 30]
    assert looked(evaluator(tiny(), **every_fourth), [16, 20, 24]) == [20]  # a run that was resumed looks as it did


def test_a_look_takes_the_first_volumes_whatever_the_batch_size():
    found = []
    for batch_size in (1, 2, 4):
        engine = evaluator(tiny(), batch_size=batch_size)
        engine.run(1)
        found.append({name: value for name, value in engine.state.metrics.items() if name != "val_monitor_seconds"})
    assert {name.removeprefix("val_") for name in found[0]} == FIGURES - {"monitor_seconds"}
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0] == pytest.approx(found[2], rel=1e-4)


@pytest.mark.parametrize(("cost", "looks"), [(0.5, 21), (1.5, 14), (30.0, 2)])
def test_looks_that_would_take_more_than_a_twentieth_of_the_time_are_left_out(monkeypatch, cost, looks):
    clock, original = {"now": 0.0}, monitor.look  # an epoch takes ten seconds, a look at a volume its cost
    monkeypatch.setattr(monitor.time, "monotonic", lambda: clock["now"])
    monkeypatch.setattr(monitor, "look", lambda *args: clock.update(now=clock["now"] + cost) or original(*args))
    engine, found = evaluator(tiny(), last_epoch=40, num_volumes=1), []
    for epoch in range(1, 41):
        clock["now"] += 10
        found += looked(engine, [epoch])
        assert cost > 20 or epoch < 10 or len(found) * cost <= 0.05 * clock["now"]
    assert (found[0], found[-1], len(found)) == (1, 40, looks)


def test_training_is_the_same_with_and_without_to_the_bit():
    weights = []
    for interval in (None, 1):
        network = tiny()
        for module in network.modules():  # a network with randomness of its own, and modes that are not all alike
            if isinstance(module, nn.GELU):
                module.training = False
        validator = evaluator(network, interval=interval, last_epoch=2)
        torch.manual_seed(0)
        engine = trainer(network, epochs=2)
        ValidationHandler(interval=1, validator=validator).attach(engine)
        engine.run()
        assert ("val_effective_rank" in validator.state.metrics) == (interval == 1)
        weights.append([*network.state_dict().values(), torch.get_rng_state()])
    assert all(map(torch.equal, *weights))


def test_a_look_draws_no_random_number_and_leaves_modules_in_their_modes():
    states = []
    for interval in (None, 1):
        set_determinism(0)
        network = tiny().train()
        network.decoder.eval()
        evaluator(network, interval=interval).run(1)
        assert all(parameter.grad is None for parameter in network.parameters())
        modes = [module.training for module in network.modules()]
        drawn = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())  # noqa: NPY002, S311
        states.append((modes, drawn))
    assert states[0] == states[1]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_gives_about_the_same_figures(precision):
    exact, rough = (evaluator(tiny(), kind) for kind in ("fp32", precision))
    exact.run(1)
    rough.run(1)
    for name in FIGURES - {"monitor_seconds", "intensity_change"}:
        assert rough.state.metrics[f"val_{name}"] == pytest.approx(
            exact.state.metrics[f"val_{name}"], rel=0.1, abs=0.02
        )


def test_a_network_without_features_and_no_interval_are_let_be():
    class Other(nn.Module):
        def forward(self, volume, masked):
            patches = masked.shape[:2]
            return {"valid_for_masking_mask": torch.ones(patches, dtype=torch.bool)}

    assert looked(evaluator(Other()), [1]) == []
    assert looked(evaluator(tiny(), interval=None), [1]) == []


def test_a_divided_network_is_not_looked_at_and_the_log_says_so(monkeypatch, caplog):
    monkeypatch.setattr(monitor, "FSDPModule", nn.Module)
    caplog.set_level("INFO")
    assert looked(evaluator(tiny()), [1]) == []
    assert "not looked at: the network is divided" in caplog.text


def test_only_the_first_rank_looks(monkeypatch):
    monkeypatch.setattr(monitor.idist, "get_rank", lambda: 1)
    assert looked(evaluator(tiny()), [1]) == []


def test_the_knobs_reach_the_look(cohort, tmp_path):
    knobs = {"monitor_interval": 4, "monitor_volumes": 5, "val_interval": 2, "max_epochs": 9, "device": "cpu"}
    workflow = started(dataset_dir=str(cohort), output_dir=str(tmp_path), **knobs)
    handlers = workflow.parser.get_parsed_content("validate::handlers")
    found = next(handler for handler in handlers if isinstance(handler, FeatureMonitor))
    assert (found.interval, found.num_volumes, found.val_interval, found.last_epoch) == (4, 5, 2, 9)
    assert found.network is workflow.parser.get_parsed_content("model")


@pytest.mark.slow
def test_figures_and_verdict_are_in_every_record_of_a_run(cohort, tmp_path):
    result = train(dataset_dir=cohort, output_dir=tmp_path, max_epochs=3, monitor_interval=10)
    assert result.returncode == 0, result.stderr
    lines = records(tmp_path)
    assert ["val_effective_rank" in line for line in lines] == [True, False, True]
    assert all(line["val_baseline_blur"] == lines[0]["val_baseline_blur"] for line in lines)
    best = min(lines[0][f"val_baseline_{name}"] for name in ("mean", "nearest", "blur"))  # the loss is a squared error
    assert lines[0]["val_baseline_loss"] / best == pytest.approx(
        lines[0]["val_loss"] / lines[0]["val_unexplained"], rel=1e-4
    )
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").rglob("events*"))
    assert b"val_effective_rank" in events
    assert b"val_baseline_blur" in events
    assert "verdict: " in result.stderr + result.stdout
    assert (tmp_path / "verdict.json").exists()


@pytest.mark.slow
def test_a_peer_without_our_features_trains_on_and_is_judged_by_its_error(cohort, tmp_path):
    result = train("train.yaml", "small.yaml", "peers/vit_mae.yaml", dataset_dir=cohort, output_dir=tmp_path,
                   decoder_embed_dim=48)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "val_baseline_blur" in records(tmp_path)[-1]
    assert "val_effective_rank" not in records(tmp_path)[-1]
    assert (tmp_path / "verdict.json").exists()
