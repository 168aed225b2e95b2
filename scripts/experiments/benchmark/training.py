"""How long training waits for data."""

import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine
from ignite.handlers import BasicTimeProfiler
from monai.bundle import ConfigWorkflow
from torch import Tensor

from ..reporting import markdown_table, write_report
from .networks import machine

__all__ = ["data", "time_training"]

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
TRAINING = (str(CONFIGS / "train.yaml"), str(CONFIGS / "small.yaml"))


def data(
    dataset_dir: str,
    config_file: Sequence[str] = TRAINING,
    epochs: int = 2,
    output_dir: str = "runs/benchmark",
    **knobs: Any,
) -> None:
    """Measure how long training waits for data, with the cache and without, and where preparation spends its time.

    Args:
        dataset_dir: as for training.
        config_file: what would be trained.
        epochs: to train for, after one that is not counted.
        output_dir: for ``data.json`` and ``data.md``.
        knobs: of the config, over its own.
    """
    device = knobs.get("device", "cuda" if torch.cuda.is_available() else "cpu")
    report: dict[str, Any] = {"machine": machine(device), "config_file": list(config_file), "rows": []}
    cells = []
    for cache in ("memory", "none"):
        settings = {"dataset_dir": dataset_dir, "cache": cache} | knobs
        workflow, waited, stepped = time_training(config_file, epochs, **settings)
        wait, step = waited.mean().item(), stepped.mean().item()
        share, rate = wait / (wait + step), workflow.parser.get_parsed_content("batch_size") / (wait + step)
        row = {"cache": cache, "wait_seconds": wait, "step_seconds": step, "waiting_share": share}
        report["rows"].append(row | {"volumes_per_second": rate})
        cells.append(f"{cache} | {1000 * wait:.1f} ms | {1000 * step:.0f} ms | {share:.1%} | {rate:.1f}")
    seconds = report["preparation"] = _time_transforms(workflow)
    lines = [
        *markdown_table("cache | waiting for data | step | share of waiting | volumes/s", cells),
        f"\nPreparing a volume takes {1000 * sum(seconds.values()):.1f} ms in one process, of which:\n",
        *markdown_table("transform | ms", (f"{name} | {1000 * value:.2f}" for name, value in seconds.items())),
    ]
    write_report(Path(output_dir), "data", report, lines)


def time_training(config_file: Sequence[str], epochs: int, **knobs: Any) -> tuple[ConfigWorkflow, Tensor, Tensor]:
    """Train for some epochs after one that is not counted.

    Returns:
        The workflow, and for each iteration the seconds that it waited for data and those that it worked.
    """
    with tempfile.TemporaryDirectory() as folder:
        overrides = knobs | {"output_dir": folder, "val_interval": epochs + 2, "max_epochs": epochs + 1}
        workflow = ConfigWorkflow(config_file=list(config_file), workflow_type="train", **overrides)
        workflow.initialize()
        trainer = workflow.parser.get_parsed_content("train::trainer")
        profiler = BasicTimeProfiler()
        profiler.attach(trainer)
        trainer._process_function = _synchronised(trainer._process_function)
        workflow.run()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which the workflow took for itself
    kept = slice(trainer.state.epoch_length, None)
    return workflow, profiler.dataflow_times[kept], profiler.processing_times[kept]


def _synchronised(step: Callable[[Engine, Any], Any]) -> Callable[[Engine, Any], Any]:
    """Let a step end when the device has done it: a GPU's would end when it is asked for, and the rest be waiting."""

    def done(engine: Engine, batch: Any) -> Any:
        output = step(engine, batch)
        torch.get_device_module(engine.state.device).synchronize(engine.state.device)
        return output

    return done


def _time_transforms(workflow: ConfigWorkflow, volumes: int = 16) -> dict[str, float]:
    """Seconds each transform takes on a volume, the mean of several, the longest first."""
    cases = workflow.parser.get_parsed_content("cases")["training"][:volumes]
    seconds: dict[str, float] = {}
    for item in map(dict, cases):
        for transform in workflow.parser.get_parsed_content("train::preprocessing").transforms:
            start, name = time.perf_counter(), type(transform).__name__
            item = transform(item)
            seconds[name] = seconds.get(name, 0.0) + (time.perf_counter() - start) / len(cases)
    return dict(sorted(seconds.items(), key=lambda entry: -entry[1]))
