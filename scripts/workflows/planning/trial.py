"""A short training in a process of its own, to see what the real one takes."""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ... import machine
from ...data import Case
from ...mistakes import Mistake
from ...weights import bundle_root

__all__ = ["Trial", "bundle_command", "places", "run_and_measure", "try_training"]

ITERATIONS, EPOCHS = 8, 4  # every second one validated: the first time a GPU compiles for it
TRAINED, VALIDATED = 8, 2  # volumes
OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError", "out of memory", "can't allocate memory")
OUT_OF_MEMORY += ("ALLOC_FAILED",)  # of cuBLAS and cuDNN
OUT_OF_MEMORY += ("killed by signal", "exited unexpectedly")  # a worker of the data loader
KILLED = (-9, 137)  # by the system, when memory runs out


@dataclass(frozen=True)
class Trial:
    """What a short training took."""

    seconds_per_iteration: float
    seconds_per_validation: float  # of a volume
    memory: int  # bytes of the process, at most
    device_memory: int | None  # bytes of the GPU


def try_training(overlay: Path, cases: Sequence[Case], device: str) -> Trial | None:
    """Train on a few of the volumes by ``train.yaml`` and an overlay; None when that does not fit into memory.

    Raises:
        Mistake: when the training ends for another reason.
    """
    chosen = [cases[place] for place in places(len(cases))]
    held_out = max(1, min(VALIDATED, len(chosen) - 1))
    with tempfile.TemporaryDirectory(prefix="plan_") as folder:
        datalist = Path(folder, "cases.json")
        items = [{"image": _absolute(case["image"])} for case in chosen]
        datalist.write_text(json.dumps({"training": items[held_out:], "validation": items[:held_out]}))
        configs = [str(bundle_root() / "configs" / "train.yaml"), str(overlay)]
        knobs = {"dataset_dir": datalist, "output_dir": Path(folder, "run"), "max_epochs": EPOCHS}
        knobs |= {"iterations_per_epoch": ITERATIONS, "val_interval": 2, "num_figure_volumes": 0}
        # The list of these cases says the rest.
        knobs |= {"warmup_epochs": 1, "device": device, "contrasts": "null", "group_by": "null"}
        command = bundle_command("training", configs, knobs)
        output, code, memory, device_memory = run_and_measure(command, Path(folder), device)
    if code in KILLED or (code and any(sign in output for sign in OUT_OF_MEMORY)):
        return None
    seconds = [float(value) for value in re.findall(rf"epoch \d/{EPOCHS}  .*  ([\d.]+) s$", output, re.MULTILINE)]
    if code or len(seconds) < EPOCHS:
        raise Mistake(f"the training that was tried ended with status {code}:\n{output[-2000:]}")
    validation = max(0.0, seconds[3] - seconds[2]) / held_out
    return Trial(seconds[2] / ITERATIONS, validation, memory, device_memory)


def bundle_command(run_id: str, configs: Sequence[str], knobs: Mapping[str, Any]) -> list[str]:
    """Write the command that runs a workflow in a process of its own."""
    overrides = [part for name, value in knobs.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "monai.bundle", "run", run_id, "--config_file", str(configs), *overrides]


def _absolute(image: str | list[str]) -> str | list[str]:
    return [str(Path(file).absolute()) for file in image] if isinstance(image, list) else str(Path(image).absolute())


def places(number: int) -> list[int]:
    """Tell which of so many cases are tried: some at even distances."""
    return np.linspace(0, number - 1, min(number, TRAINED + VALIDATED)).round().astype(int).tolist()


def run_and_measure(command: list[str], folder: Path, device: str) -> tuple[str, int, int, int | None]:
    """Run a command; return what it printed, its status, and the memory that it and the GPU held at most, in bytes."""
    on_gpu, ended, free, held = torch.device(device).type == "cuda", threading.Event(), [], [0]

    def watch() -> None:
        while not ended.wait(0.2):
            held.append(machine.peak_memory(process.pid))
            if on_gpu:
                free.append(torch.cuda.mem_get_info(device)[0])

    before = torch.cuda.mem_get_info(device)[0] if on_gpu else 0
    log = folder / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=folder)  # noqa: S603
        watcher = threading.Thread(target=watch)
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    ended.set()
    watcher.join()
    # Where there is no /proc: what wait4 says starts from what this process held when it started the other.
    memory = max(held) or usage.ru_maxrss * machine.RSS_UNIT
    return log.read_text(), process.returncode, memory, before - min(free) if free else None
