"""Experiments that show what pre-training brings, one command each: tables, figures and every run that they rest on.

    python -m scripts.proof convergence --dataset_dir Task04_Hippocampus --output_dir runs/proof

Each run is a `python -m monai.bundle run` of its own, in a folder of `output_dir`. What is there already is not run
again, and what was interrupted goes on, so a command can be stopped and repeated.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fire
import matplotlib as mpl

from .data import case_seed, find_cases, split_cases

mpl.use("Agg")

__all__ = ["Run", "convergence", "execute"]

ROOT = Path(__file__).resolve().parent.parent
RATES = (0.0005, 0.0015, 0.0045)  # the grid for every pre-training
# Configs and knobs of the networks that are compared, all of the small size.
PRETRAININGS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "bertswin": ((), {}),
    "bertswin_strict": ((), {"strict_stem": True}),
    "vit_mae": (("vit_mae.yaml",), {}),
}


@dataclass(frozen=True)
class Run:
    """One run of a workflow.

    Args:
        folder: its ``output_dir``.
        workflow: such as ``training``.
        configs: file names below ``configs``.
        knobs: over those of the configs.
    """

    folder: Path
    workflow: str
    configs: tuple[str, ...]
    knobs: dict[str, Any] = field(default_factory=dict)

    @property
    def record(self) -> Path:
        """The file that says that the run is complete, and with which knobs."""
        return self.folder / "run.json"

    def metrics(self) -> list[dict[str, Any]]:
        """Read the lines of ``metrics.jsonl``."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def execute(self, threads: int) -> None:
        """Run it, unless it is complete.

        Raises:
            ValueError: when it fails, with the end of its log; or is there with other knobs.
        """
        settings = {"workflow": self.workflow, "configs": list(self.configs), "knobs": self.knobs}
        if self.record.exists():
            if json.loads(self.record.read_text()) != settings:
                raise ValueError(f"{self.folder} holds a run with other knobs, see {self.record}: remove it")
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        files = str([str(ROOT / "configs" / name) for name in self.configs])
        command = [sys.executable, "-m", "monai.bundle", "run", self.workflow, "--config_file", files]
        for name, value in (self.knobs | {"output_dir": str(self.folder)}).items():
            command += [f"--{name}", json.dumps(value) if isinstance(value, list | bool) else str(value)]
        if (self.folder / "checkpoints").exists():
            command += ["--resume", "true"]
        log = self.folder / "log.txt"
        with log.open("a") as lines:
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            ended = subprocess.run(command, cwd=ROOT, env=environment, stdout=lines, stderr=lines, check=False)  # noqa: S603
        if ended.returncode:
            raise ValueError(f"{' '.join(command)}\nended with {ended.returncode}:\n{log.read_text()[-2000:]}")
        self.record.write_text(json.dumps(settings, indent=1) + "\n")


def execute(runs: Sequence[Run], jobs: int) -> None:
    """Do the runs that are not complete, some at a time, each with its share of the cores."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        done = [pool.submit(run.execute, threads) for run in runs]
        for future in done:
            future.result()


def convergence(
    dataset_dir: str, output_dir: str = "runs/proof", epochs: int = 200, selection_epochs: int = 50, jobs: int = 2
) -> None:
    """Pre-train BertsWin and MONAI's ViT-MAE on the same volumes with the same masks, draws, loss and schedule.

    The learning rate of each is that which predicts a fifth of the *training* volumes best, after a shorter training on
    the other four fifths. Validation volumes are those of the curves alone.

    Args:
        dataset_dir: as for training.
        output_dir: for the runs, ``convergence.json``, ``convergence.md`` and the figure.
        epochs: of the compared trainings.
        selection_epochs: of those that choose the rate.
        jobs: runs at a time.
    """
    folder = Path(output_dir).resolve()
    inner = _training_volumes_alone(dataset_dir, folder / "selection.json")
    candidates = {
        (name, rate): Run(
            folder / "selection" / f"{name}_{rate:g}",
            "training",
            ("train.yaml", "small.yaml", *configs),
            {
                **knobs,
                "dataset_dir": str(inner),
                "max_epochs": selection_epochs,
                "val_interval": selection_epochs,
                "learning_rate": rate,
            },
        )
        for name, (configs, knobs) in PRETRAININGS.items()
        if name != "bertswin_strict"  # takes the rate of the default stem
        for rate in RATES
    }
    execute(list(candidates.values()), jobs)
    scores = {key: run.metrics()[-1]["val_mse"] for key, run in candidates.items()}
    chosen = {name: min(RATES, key=lambda rate, name=name: scores[name, rate]) for name in ("bertswin", "vit_mae")}
    chosen["bertswin_strict"] = chosen["bertswin"]
    print(json.dumps({f"{name} at {rate:g}": score for (name, rate), score in scores.items()}, indent=1))
    runs = {
        name: Run(
            folder / "pretraining" / name,
            "training",
            ("train.yaml", "small.yaml", *configs),
            {
                **knobs,
                "dataset_dir": str(Path(dataset_dir).resolve()),
                "max_epochs": epochs,
                "early_stop_patience": epochs,
                "learning_rate": chosen[name],
            },
        )
        for name, (configs, knobs) in PRETRAININGS.items()
    }
    execute(list(runs.values()), jobs)


def _training_volumes_alone(dataset_dir: str, path: Path) -> Path:
    """Write a datalist that divides the training volumes once more, as the names' hashes have it."""
    folds = find_cases(dataset_dir)
    training = folds["training"] if "validation" in folds else split_cases(folds["training"], 0.2)["training"]
    ranked = sorted(training, key=lambda case: case_seed(case["case"], 1))
    held_out = max(1, len(ranked) // 5)
    content = {
        fold: [{"image": str(Path(case["image"]).resolve())} for case in cases]
        for fold, cases in (("training", ranked[held_out:]), ("validation", ranked[:held_out]))
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1))
    return path


if __name__ == "__main__":
    try:
        fire.Fire({"convergence": convergence})
    except ValueError as error:
        sys.exit(f"error: {error}")
