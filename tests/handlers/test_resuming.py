"""Promises of runs that are interrupted: nothing is lost, and they go on as if they had not been."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, noise, start_training, tiny, train, trainer
from ignite.engine import Engine, Events

from scripts.data import DrawSampler
from scripts.engines import NonFiniteLossError
from scripts.handlers import Checkpointing, MetricsRecorder, lock_folders

EPOCHS, ITERATIONS, VALIDATION_BATCHES = 3, 5, 2
# Runs that are killed at random moments; the release is checked with more.
KILLS = int(os.environ.get("BERTSWIN_KILLS", "2"))


HOLD_A_LOCK = """
import sys, time
from scripts.handlers import lock_folders
locks = lock_folders([sys.argv[1]])
print("locked", flush=True)
time.sleep(60)
"""


class Drawn(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, draw):
        return {"image": noise(1, 32, 32, 32, seed=draw.seed), "case": f"case_{draw.index}", "seed": draw.seed}


def run(folder, request_at=None, accumulation=2, resume=True):
    """Train, and ask for the end at the n-th iteration of trainer or validator; return whether all was done."""
    network = tiny()
    validator = Engine(lambda *_: None)
    validator.state.best_metric, validator.state.best_metric_epoch = -1.0, -1

    @validator.on(Events.EPOCH_COMPLETED)
    def measure(engine):
        metric = sum(parameter.double().sum().item() for parameter in network.parameters())
        engine.state.metrics = {"val_loss": metric}
        if metric > engine.state.best_metric:
            engine.state.best_metric, engine.state.best_metric_epoch = metric, trained.state.epoch

    def optimizer(net):
        adam = torch.optim.AdamW(net.parameters(), 1e-3)
        return adam, torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 0.9**step)

    sampler = DrawSampler(6, batch_size=1, iterations=ITERATIONS)
    loader = torch.utils.data.DataLoader(Drawn(), batch_size=1, sampler=sampler)
    trained = trainer(network, epochs=EPOCHS, optimizer_factory=optimizer, loader=loader,
                      accumulation_steps=accumulation)  # fmt: skip
    trained.add_event_handler(Events.EPOCH_STARTED, lambda engine: sampler.set_epoch(engine.state.epoch))
    validator.state.key_metric_name = "val_loss"
    checkpointing = Checkpointing(folder, validator, network, resume)
    seen = {"iterations": 0}

    def count(_):
        seen["iterations"] += 1
        if seen["iterations"] == request_at:
            checkpointing.request_end()

    checkpointing.attach(trained)
    trained.add_event_handler(Events.ITERATION_STARTED, count)
    validator.add_event_handler(Events.ITERATION_STARTED, count)
    trained.add_event_handler(Events.EPOCH_COMPLETED, lambda _: validator.run([0] * VALIDATION_BATCHES))
    MetricsRecorder(folder / "metrics.jsonl", validator).attach(trained)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        trained.run()
    except SystemExit as end:
        assert end.code == 0
        return False
    finally:
        signal.signal(signal.SIGTERM, handler)
    return True


def left(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    state = torch.load(folder / "training_state.pt", weights_only=True)
    return [{k: v for k, v in record.items() if not k.endswith("seconds")} for record in records], state


def assert_same_end(one, two):
    (records, state), (other_records, other_state) = left(one), left(two)
    assert records == other_records
    assert state.keys() == other_state.keys()
    torch.testing.assert_close(state, other_state, rtol=0, atol=0)
    best, other_best = (torch.load(folder / "model.pt", weights_only=True) for folder in (one, two))
    torch.testing.assert_close(best, other_best, rtol=0, atol=0)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_that_is_preempted_anywhere_goes_on_bit_for_bit(tmp_path, accumulation):
    assert run(tmp_path / "whole", accumulation=accumulation)
    for moment in range(1, EPOCHS * (ITERATIONS + VALIDATION_BATCHES) + 1):
        folder = tmp_path / f"at_{moment}"
        done = run(folder, request_at=moment, accumulation=accumulation)
        assert done == (moment > EPOCHS * (ITERATIONS + VALIDATION_BATCHES))
        assert run(folder, accumulation=accumulation)
        assert_same_end(tmp_path / "whole", folder)


@pytest.mark.parametrize("moment", [4, ITERATIONS, ITERATIONS + VALIDATION_BATCHES + 2])
def test_a_run_goes_on_without_a_warning_about_its_schedule(tmp_path, moment):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not run(tmp_path, request_at=moment)
        assert run(tmp_path)
    assert not [warning for warning in caught if "lr_scheduler" in str(warning.message)]


def test_a_run_that_is_preempted_again_and_again_arrives(tmp_path):
    assert run(tmp_path / "whole")
    parts, starts = tmp_path / "parts", 1
    while not run(parts, request_at=3):
        starts += 1
    assert starts > 5
    assert_same_end(tmp_path / "whole", parts)


def test_an_exception_that_comes_with_the_signal_is_no_failure_and_any_other_is(tmp_path):
    network = tiny()
    validator = Engine(lambda *_: None)
    validator.state.best_metric, validator.state.best_metric_epoch = -1.0, -1
    trained = trainer(network, epochs=2)
    checkpointing = Checkpointing(tmp_path, validator, network)
    checkpointing.attach(trained)

    def fail(_):
        raise RuntimeError("DataLoader worker is killed by signal: Terminated")

    trained.add_event_handler(Events.GET_BATCH_COMPLETED(once=1), fail)
    with pytest.raises(RuntimeError, match="Terminated"):
        trained.run()
    assert not list(tmp_path.iterdir())
    checkpointing.request_end()
    trained.state.iteration, trained.state.epoch = 1, 1
    with pytest.raises(SystemExit) as end:
        checkpointing.end_after_exception(trained, RuntimeError("Terminated"))
    assert end.value.code == 0
    assert torch.load(tmp_path / "training_state.pt", weights_only=True)["iteration"] == 1
    trained.is_stepping = True
    (tmp_path / "training_state.pt").unlink()
    with pytest.raises(SystemExit):
        checkpointing.end_after_exception(trained, RuntimeError("Terminated"))
    assert not list(tmp_path.iterdir())  # a half-done step is not saved


def test_two_runs_in_one_folder_are_refused_and_a_lock_is_no_obstacle_once_its_run_is_gone(tmp_path):
    def lock():
        return lock_folders([tmp_path / "out"], patience=0.1)

    (first,) = lock()
    with pytest.raises(ValueError, match=r"another run is writing to .*out: wait for its end"):
        lock()
    first.release()
    (second,) = lock()
    second.release()
    holder = subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", HOLD_A_LOCK, str(tmp_path / "out")], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"locked\n"
    with pytest.raises(ValueError, match="another run is writing"):
        lock()
    holder.kill()
    holder.wait()
    (third,) = lock()
    third.release()


@pytest.mark.slow
def test_a_second_run_is_refused_while_the_first_one_trains(cohort, tmp_path):
    first = start_training(dataset_dir=cohort, output_dir=tmp_path, max_epochs=1000)
    deadline = time.monotonic() + 480
    while not (tmp_path / "checkpoints" / "training_state.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    second = train(dataset_dir=cohort, output_dir=tmp_path, max_epochs=1000, resume="true")
    first.kill()
    first.wait()
    assert second.returncode == 1
    assert "error: another run is writing to" in second.stderr
    assert "Traceback" not in second.stderr


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["preempted", "killed"])
def test_a_run_interrupted_at_random_moments_ends_as_if_it_had_not_been(cohort, tmp_path, number):
    settings = {"dataset_dir": cohort, "max_epochs": 4 * KILLS, "iterations_per_epoch": 20, "accumulation_steps": 3,
                "val_interval": 2, "resume": "true", "precision": "fp32", "figure_interval": 100,
                "monitor_interval": "null"}  # fmt: skip
    # No looks at the features: which of them are affordable depends on the clock.
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(output_dir=whole, **settings).returncode == 0
    rng, interruptions = random.Random(0), 0  # noqa: S311
    while interruptions < KILLS:
        state = parts / "checkpoints" / "training_state.pt"
        before = state.stat().st_mtime_ns if state.exists() else 0
        process = start_training(output_dir=parts, **settings)
        deadline = time.monotonic() + 480
        while process.poll() is None and time.monotonic() < deadline:
            if state.exists() and state.stat().st_mtime_ns != before:
                break  # it is training
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(number)
        sent = time.monotonic()
        _, stderr = process.communicate(timeout=240)
        assert time.monotonic() - sent < 40  # clusters give thirty seconds; a machine four times slower has some more
        assert process.returncode in ((0,) if number == signal.SIGTERM else (-9, 0)), stderr
        interruptions += 1
        if torch.load(state, weights_only=True)["epoch"] == 4 * KILLS:
            break
    resumed = train(output_dir=parts, **settings)
    assert resumed.returncode == 0, resumed.stderr
    records = [[{k: v for k, v in json.loads(line).items() if not k.endswith("seconds")} for line in
                (folder / "metrics.jsonl").read_text().splitlines()] for folder in (whole, parts)]  # fmt: skip
    assert records[0] == records[1]
    for name in ("model.pt", "training_state.pt"):
        one, two = (torch.load(folder / "checkpoints" / name, weights_only=True) for folder in (whole, parts))
        assert one.pop("about", None) == two.pop("about", None)
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_nothing_is_saved_within_an_epoch_before_its_steps_are_known_to_be_sound():
    def unsound():
        raise NonFiniteLossError("the loss is nan")

    with pytest.raises(NonFiniteLossError):
        Checkpointing.save_within_epoch(None, SimpleNamespace(check_steps=unsound))
