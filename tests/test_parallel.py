"""Promises of training in several processes; those about how they end are started by torchrun, as by a user."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_KNOBS, records, tiny, train, write_volume
from processes import run_ranks

from scripts import parallel

pytestmark = pytest.mark.slow

PLAIN, CONDUCTOR = ("train.yaml", "small.yaml"), ("train.yaml", "train_conductor.yaml", "small.yaml")


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """Five volumes to train on and three to validate on: two ranks cannot share them evenly."""
    folder = tmp_path_factory.mktemp("volumes")
    items = [{"image": write_volume(folder / f"case_{number}.nii.gz", seed=number).name} for number in range(8)]
    (folder / "dataset.json").write_text(json.dumps({"training": items[:5], "validation": items[5:]}))
    return folder


def start_ranks(*configs, ranks=2, overlay=("multi_gpu.yaml",), workflow="training", only=None, **knobs):
    files = [str(ROOT / "configs" / name) for name in (*configs, *overlay)]
    overrides = [part for name, value in (only or TINY_KNOBS | knobs).items() for part in (f"--{name}", str(value))]
    command = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone", "-m", "monai.bundle"]
    return subprocess.Popen(  # noqa: S603
        [sys.executable, *command, "run", workflow, "--config_file", str(files), *overrides],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def train_ranks(*configs, ranks=2, overlay=("multi_gpu.yaml",), workflow="training", only=None, **knobs):
    """Train in several processes, with what torchrun would tell each of them: it takes seconds to start them itself."""
    files = [str(ROOT / "configs" / name) for name in (*configs, *overlay)]
    overrides = [part for name, value in (only or TINY_KNOBS | knobs).items() for part in (f"--{name}", str(value))]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "TORCHELASTIC_RUN_ID": "none"}
    place |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    environments = [place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return run_ranks("monai.bundle", ["run", workflow, "--config_file", str(files), *overrides], ROOT, environments)


def weights(folder):
    return torch.load(folder / "checkpoints" / "training_state.pt", weights_only=True)["network"]


# One epoch a step, so that metrics.jsonl holds the loss of every step, averaged over ranks and accumulation.
# All patches are valid: ranks average their means without weighing them by their hidden patches.
STEPS = {
    "field_of_view": "none",
    "max_epochs": 20,
    "warmup_epochs": 3,
    "cache": "none",
    "precision": "fp32",
    "clip_norm": 1.0,
    "val_interval": 10,
}


@pytest.mark.parametrize(
    ("configs", "settings", "accumulation"),
    [(PLAIN, {"learning_rate": 1e-3}, 2), (CONDUCTOR, {"learning_rate": 1e-4}, 1)],
    ids=["adamw", "conductor"],
)
def test_two_ranks_train_like_one_process_with_their_batches_together(
    volumes, tmp_path, configs, settings, accumulation
):
    settings = STEPS | settings | {"dataset_dir": volumes, "accumulation_steps": accumulation,
                                   "iterations_per_epoch": accumulation}  # fmt: skip
    alone = train(*configs, **settings, batch_size=8 // accumulation, output_dir=tmp_path / "one")
    both = train_ranks(*configs, **settings, batch_size=4 // accumulation, output_dir=tmp_path / "two")
    assert alone.returncode == both.returncode == 0, alone.stderr + both.stderr
    one, two = records(tmp_path / "one"), records(tmp_path / "two")
    logged = [[line.split("train_loss")[1].split()[0] for line in run.stdout.splitlines() if "train_loss" in line]
              for run in (alone, both)]  # fmt: skip
    assert len(logged[0]) == len(logged[1]) == 20  # one rank alone writes the log
    assert [float(value) for value in logged[0]] == pytest.approx([float(value) for value in logged[1]], rel=2e-4)
    for first, second in zip(one, two, strict=True):
        for name in ("train_loss", "val_mse", "val_ssim", "val_unexplained"):
            assert first[name] == pytest.approx(second[name], rel=1e-4), name
    assert one[-1]["val_loss"] < 0.995 * one[0]["val_loss"]  # it learns, fifty times what the two may differ by


def test_a_divided_network_trains_like_a_whole_one_and_each_continues_the_others_runs(volumes, tmp_path):
    # One validation volume a batch: the three cannot be dealt evenly.
    settings = {"dataset_dir": volumes, "cache": "none", "precision": "fp32", "learning_rate": 1e-3, "batch_size": 1}
    modes = {"ddp": {"parallel": "ddp"}, "fsdp": {"parallel": "fsdp", "activation_checkpointing": "true"}}
    for first, second in (("ddp", "fsdp"), ("fsdp", "ddp")):
        for mode, epochs, resume in ((first, 2, "false"), (second, 3, "true")):
            run = train_ranks(*PLAIN, **settings, **modes[mode], max_epochs=epochs, resume=resume,
                              accumulation_steps=2, output_dir=tmp_path / first)  # fmt: skip
            assert run.returncode == 0, run.stderr
    one, two = records(tmp_path / "ddp"), records(tmp_path / "fsdp")
    assert [record["epoch"] for record in one] == [1, 2, 3]
    for first, second in zip(one, two, strict=True):
        for name in ("train_loss", "val_mse", "val_structure"):
            assert first[name] == pytest.approx(second[name], rel=1e-4), name
    for name, value in weights(tmp_path / "ddp").items():
        torch.testing.assert_close(weights(tmp_path / "fsdp")[name], value, rtol=1e-3, atol=1e-5)


def test_the_conductor_asks_for_whole_gradients(volumes, tmp_path):
    divided = train_ranks(*CONDUCTOR, dataset_dir=volumes, parallel="fsdp", output_dir=tmp_path)
    assert divided.returncode != 0
    assert "error: the conductor weighs whole gradients: it goes with --parallel ddp" in divided.stderr


def test_ranks_share_a_memory_cache_and_an_uneven_validation_set(volumes, tmp_path):
    settings = {"dataset_dir": volumes, "max_epochs": 1, "learning_rate": 1e-12, "precision": "fp32"}
    alone = train(*PLAIN, **settings, output_dir=tmp_path / "one")
    both = train_ranks(*PLAIN, **settings, output_dir=tmp_path / "two")
    assert alone.returncode == both.returncode == 0, both.stderr
    (one,), (two,) = records(tmp_path / "one"), records(tmp_path / "two")
    for name in ("val_loss", "val_mse", "val_structure", "val_unexplained"):
        assert one[name] == pytest.approx(two[name], rel=1e-5), name
    assert one["val_ssim"] == pytest.approx(two["val_ssim"], rel=1e-3)  # its convolutions depend on the batch
    too_many = train_ranks(*PLAIN, **settings, ranks=4, output_dir=tmp_path / "four")
    assert too_many.returncode != 0
    assert "error: 4 ranks cannot share 3 volumes" in too_many.stderr


def test_a_mistake_is_reported_once_and_a_loss_that_is_not_finite_ends_all_ranks(volumes, tmp_path):
    for mistake in ({"dataset_dir": tmp_path / "nothing"}, {"dataset_dir": volumes, "max_epochs": "many"}):
        mistaken = train_ranks(*PLAIN, output_dir=tmp_path / "a", **mistake)
        assert mistaken.returncode != 0
        assert len(re.findall("^(\\[rank0\\]: )?error: (dataset_dir|max_epochs)", mistaken.stderr, re.MULTILINE)) == 1
        assert mistaken.stderr.count("error: ") == 1
    launched = start_ranks(*PLAIN, output_dir=tmp_path / "a", dataset_dir=tmp_path / "nothing")
    _, stderr = launched.communicate(timeout=240)
    assert stderr.count("error: dataset_dir") == 1  # what torchrun itself says names no error of ours
    diverged = train_ranks(*PLAIN, dataset_dir=volumes, output_dir=tmp_path / "b", learning_rate=1e30, max_epochs=20,
                           clip_norm="None")  # fmt: skip
    assert diverged.returncode != 0
    assert diverged.stderr.count("is nan") == 1
    assert "case_" in diverged.stderr


def ranks_below(pid):
    """Return the process ids of the ranks by the variable that torchrun gave them."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == pid and b"LOCAL_WORLD_SIZE=2" in environment:
            local_rank = next(entry for entry in environment if entry.startswith(b"LOCAL_RANK="))
            found[int(local_rank.split(b"=")[1])] = int(folder.name)
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the ranks by /proc")
@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.thorough)])
def test_when_a_rank_dies_the_others_end_and_the_run_resumes(volumes, tmp_path, victim):
    settings = {"dataset_dir": volumes, "output_dir": tmp_path / "out", "iterations_per_epoch": 10, "max_epochs": 500}
    process = start_ranks(*PLAIN, **settings)
    state = tmp_path / "out" / "checkpoints" / "training_state.pt"
    deadline = time.monotonic() + 480
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(0.3)  # into an epoch
    ranks = ranks_below(process.pid)
    os.kill(ranks[victim], signal.SIGKILL)
    killed = time.monotonic()
    _, stderr = process.communicate(timeout=240)
    assert time.monotonic() - killed < 60
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in stderr
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    reached = torch.load(state, weights_only=True)["epoch"]
    resumed = train_ranks(*PLAIN, **(settings | {"max_epochs": reached + 1}), resume="true")
    assert resumed.returncode == 0, resumed.stderr
    assert records(tmp_path / "out")[-1]["epoch"] == reached + 1
    assert f"after epoch {reached} of {reached + 1}" in resumed.stdout


def test_the_overlay_asks_for_torchrun_and_torchrun_for_the_overlay(volumes, tmp_path):
    without = train_ranks(*PLAIN, overlay=(), dataset_dir=volumes, output_dir=tmp_path)
    assert without.returncode != 0
    assert "error: torchrun started several processes that know nothing of each other" in without.stderr
    alone = train(*PLAIN, "multi_gpu.yaml", dataset_dir=volumes, output_dir=tmp_path)
    assert alone.returncode == 1
    assert "error: multi_gpu.yaml runs under torchrun: torchrun --nproc_per_node=2" in alone.stderr


def test_the_stem_is_tuned_in_several_processes_too(volumes, tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "model.pt")
    knobs = {name: value for name, value in TINY_KNOBS.items() if name != "figure_interval"}
    settings = knobs | {
        "dataset_dir": volumes,
        "pretrained": tmp_path / "model.pt",
        "cache": "none",
        "precision": "fp32",
    }
    for ranks, batch_size in ((1, 2), (2, 1)):
        settings |= {"batch_size": batch_size, "output_dir": tmp_path / str(ranks)}
        files = ("train.yaml", "tune_stem.yaml", "small.yaml")
        tuned = train_ranks(*files, ranks=ranks, workflow="tuning", only=settings)
        assert tuned.returncode == 0, tuned.stderr
    one, two = (json.loads((tmp_path / ranks / "stem_tuning.json").read_text()) for ranks in "12")
    for name in ("volumetric_before", "volumetric_after", "patch_mode", "feature_cosine_after"):
        assert one[name] == pytest.approx(two[name], rel=1e-3), name
    encoder = torch.load(tmp_path / "2" / "checkpoints" / "encoder.pt", weights_only=True)
    assert encoder.keys() == tiny().encoder.state_dict().keys()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the ranks by /proc")
def test_preempted_ranks_save_together_and_go_on(volumes, tmp_path):
    settings = {"dataset_dir": volumes, "output_dir": tmp_path, "iterations_per_epoch": 200, "max_epochs": 2}
    process = start_ranks(*PLAIN, **settings)
    deadline = time.monotonic() + 480
    while len(ranks := ranks_below(process.pid)) < 2 or not (tmp_path / "tensorboard").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(1)  # into the first epoch
    for pid in ranks.values():
        os.kill(pid, signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert "ended by SIGTERM in epoch 1" in stdout
    state = torch.load(tmp_path / "checkpoints" / "training_state.pt", weights_only=True)
    assert 0 < state["iteration"] < 200
    assert len(state["epoch_losses"]) == state["iteration"]
    assert state["epoch_losses"][0]["loss"].dtype == torch.float64  # the mean of the ranks'
    resumed = train_ranks(*PLAIN, **(settings | {"max_epochs": 1}), resume="true")
    assert resumed.returncode == 0, resumed.stderr
    assert f"after epoch 0 and {state['iteration']} of 200 iterations" in resumed.stdout


def test_one_process_needs_no_others():
    assert parallel.gather("mine") == ["mine"]
    assert parallel.first_problem("bad") == "bad"
    assert parallel.first_problem(None) is None
    assert (parallel.any_rank(True), parallel.any_rank(False)) == (True, False)
    with pytest.raises(ValueError, match="parallel 'dp' must be 'ddp' or 'fsdp'"):
        parallel.distribute(torch.nn.Linear(1, 1), "cpu", "dp")
