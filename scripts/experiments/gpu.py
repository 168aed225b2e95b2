"""All that only a GPU can tell, in one command and at most 25 minutes: one folder of tables.

    python -m scripts.experiments.gpu --dataset_dir DIR --output_dir runs/gpu

It runs the tests marked `gpu`, measures networks and draws, and trains on real volumes while it notes how long training
waits for data. Without a GPU it does the same at toy size.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import torch

from ..mistakes import Mistake, command
from .benchmark.networks import STEP, machine
from .reporting import markdown_table, write_report

__all__ = ["gpu"]

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests" / "test_gpu.py"
TRAINING = [str(ROOT / "configs" / "train.yaml")]
SMALL = ROOT / "configs" / "small.yaml"  # where no plan was made
# In place of what is planned.
TOY = {"img_size": [32, 32, 32], "patch_size": 8, "encoder_embed_dim": 48, "encoder_depth": 2, "encoder_num_heads": 4}
TOY |= {"swin_window_size": [2, 2, 2], "decoder_embed_dim": 32, "stem_base_dim": 8, "iterations_per_epoch": 2}


@dataclass(frozen=True)
class Step:
    """A command of its own, so that what fails or takes too long costs no other."""

    name: str
    minutes: float  # at most
    arguments: list[str]  # of Python
    tables: tuple[str, ...] = ()  # that it leaves, Markdown or JSON


def gpu(dataset_dir: str, output_dir: str = "runs/gpu", minutes: float = 25, steps: Sequence[str] = ()) -> None:
    """Do all of it, and write ``gpu.md`` and ``gpu.json``, which say what was done and where its tables are.

    Args:
        dataset_dir: volumes to train on, MR or CT: see ``run plan``.
        output_dir: a folder for each step; what a step left there earlier is replaced.
        minutes: for everything. What has not begun by then is left out, and said so.
        steps: names of those to do; default: all.
    """
    if not Path(dataset_dir).exists():
        raise Mistake(f"dataset_dir {dataset_dir} does not exist")
    folder, device = Path(output_dir).absolute(), "cuda" if torch.cuda.is_available() else "cpu"
    folder.mkdir(parents=True, exist_ok=True)
    every = _steps(Path(dataset_dir).absolute(), folder, device)
    if unknown := sorted({*steps} - {step.name for step in every}):
        raise Mistake(f"there are no steps {unknown}: there are {[step.name for step in every]}")
    report: dict[str, Any] = {"machine": machine(device), "cores": os.cpu_count(), "rows": []}
    end = time.monotonic() + 60 * minutes
    for name in [step.name for step in every]:
        if not steps or name in steps:
            # Anew, as a plan may be there by now.
            (step,) = (step for step in _steps(Path(dataset_dir).absolute(), folder, device) if step.name == name)
            report["rows"].append(_run(step, folder, min(60 * step.minutes, end - time.monotonic())))
            _report(folder, report)  # what is there by now


def _steps(dataset: Path, folder: Path, device: str) -> list[Step]:
    """List all steps, the most important first: what a short machine's time leaves out stands at the end."""
    on_gpu, planned = device == "cuda", folder / "plan" / "plan.yaml"
    experiments = ["-m", "scripts.experiments.benchmark"]
    workflow = ["-m", "monai.bundle", "run"]
    configs = ["--config_file", str([*TRAINING, str(planned if planned.exists() else SMALL)])]
    tests = ["-m", "pytest", str(TESTS), "-m", "gpu", "-n", "0", "-v", f"--junitxml={folder / 'tests' / 'tests.xml'}"]

    def networks(name: str, sizes: list[int], batches: list[int]) -> Step:
        sizes, batches = (sizes, batches) if on_gpu else ([32], [1])
        knobs = {"network": name if on_gpu else "tiny", "img_sizes": sizes, "batch_sizes": batches, "device": device}
        knobs |= {"repeats": 3 if on_gpu else 1, "output_dir": folder / f"networks_{name}"}
        return Step(f"networks_{name}", 7, [*experiments, "networks", *_knobs(knobs)], ("networks.md",))

    draws = {"img_sizes": [64, 96, 224] if on_gpu else [32], "device": device, "output_dir": folder / "draws"}
    plan = {"dataset_dir": dataset, "output_dir": planned.parent, "device": device}
    small = {"dataset_dir": dataset} | ({} if on_gpu else TOY)
    training = small | {"output_dir": folder / "training", "max_epochs": 30 if on_gpu else 1}
    waiting = small | {"output_dir": folder / "waiting"}
    return [
        Step("tests", 6, tests, ("tests.xml",)),
        networks("base", [224], [1, 4, 16]),
        Step("draws", 2, [*experiments, "draws", *_knobs(draws)], ("draws.md",)),
        Step("plan", 3, [*workflow, "plan", "--config_file", TRAINING[0], *_knobs(plan)], ("plan.yaml",)),
        Step("training", 5, [*workflow, "training", *configs, *_knobs(training)],
             ("metrics.jsonl", "verdict.json", "report.html")),
        Step("waiting", 3, [*experiments, "data", *configs, *_knobs(waiting)], ("data.md",)),
        networks("small", [48, 96], [4]),
    ]  # fmt: skip


def _knobs(values: dict[str, Any]) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def _run(step: Step, folder: Path, seconds: float) -> dict[str, Any]:
    """Run a step, what it prints into ``log.txt``."""
    place = folder / step.name
    place.mkdir(exist_ok=True)
    figures = (str(Path(table).with_suffix(".json")) for table in step.tables)
    for left in ("checkpoints/training_state.pt", *step.tables, *figures):
        (place / left).unlink(missing_ok=True)
    row: dict[str, Any] = {"step": step.name, "seconds": 0.0, "outcome": "left out: no time was left"}
    if seconds < 1:
        return row
    start = time.monotonic()
    with (place / "log.txt").open("w") as log:
        about = {"cwd": ROOT, "stdout": log, "stderr": log, "start_new_session": True}
        process = subprocess.Popen([sys.executable, *step.arguments], **about)  # noqa: S603
        try:
            code = process.wait(timeout=seconds)
            row["outcome"] = "done" if code == 0 else f"failed with {code}, see {step.name}/log.txt"
        except subprocess.TimeoutExpired:
            row["outcome"] = f"stopped after {seconds:.0f} s, see {step.name}/log.txt"
        finally:  # with the processes that it has started: torchrun ends those that have left its group
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, number)
                    process.wait(timeout=10)
    row["seconds"] = round(time.monotonic() - start, 1)
    row["tables"] = [f"{step.name}/{name}" for name in step.tables if (place / name).exists()]
    return row | _figures(place)


def _figures(place: Path) -> dict[str, Any]:
    """Read the figures that belong into the overview, of the step that left them."""
    found: dict[str, Any] = {}
    if (place / "tests.xml").exists():
        suite = ET.parse(place / "tests.xml").getroot().find("testsuite")  # noqa: S314 (our own pytest wrote it)
        found["figures"] = ", ".join(f"{suite.get(name)} {name}" for name in ("tests", "failures", "errors", "skipped"))
    if (place / "metrics.jsonl").exists():
        last = json.loads((place / "metrics.jsonl").read_text().splitlines()[-1])
        found["figures"] = f"epoch {last['epoch']}, val_unexplained {last['val_unexplained']:.3f}"
    if (place / "networks.json").exists():
        rows = json.loads((place / "networks.json").read_text())["rows"]
        fitting = [
            row
            for row in rows
            if row["form"] == "bertswin" and row["task"] == STEP and row["of_plain"] and row["of_matrix_rate"]
        ]
        if fitting:
            best = max(fitting, key=lambda row: (row["precision"] != "fp32", row["of_matrix_rate"]))
            found["figures"] = (
                f"{best['contestant']}, {best['batch_size']} of {best['img_size']}³: a step takes "
                f"{best['of_plain']:.2f} of plain eager alike, {best['of_matrix_rate']:.0%} of the matrix rate"
            )
    if (place / "draws.json").exists():
        rows = json.loads((place / "draws.json").read_text())["rows"]
        found["figures"] = ", ".join(
            f"{row['img_size']}³: {row['worker_seconds']:.3f} s" for row in rows if row["device"]
        )
    if (place / "data.json").exists():
        rows = json.loads((place / "data.json").read_text())["rows"]
        found["figures"] = ", ".join(f"cache {row['cache']}: waits {row['waiting_share']:.1%}" for row in rows)
    return found


def _report(folder: Path, report: dict[str, Any]) -> None:
    cells = [
        " | ".join([row["step"], f"{row['seconds']:.0f} s", row["outcome"], row.get("figures", ""),
                    ", ".join(row.get("tables", []))])
        for row in report["rows"]
    ]  # fmt: skip
    title = f"On {report['machine']['device']}, with {report['cores']} cores:\n"
    write_report(folder, "gpu", report, [title, *markdown_table("step | time | outcome | figures | tables", cells)])


if __name__ == "__main__":
    command(gpu)
