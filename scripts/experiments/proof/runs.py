"""The runs that the proof rests on: each done once, continued where it was stopped, and recorded."""

import csv
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...mistakes import Mistake
from ...weights import checkpoints, read_record, sha256, write_record

__all__ = ["ROOT", "Run", "execute", "last_metrics"]

ROOT = Path(__file__).resolve().parents[3]
# The config files of each workflow, a later one over those before it; overlays of the contestants come last.
CONFIGS = {
    "training": ("train.yaml",),
    "tuning": ("train.yaml", "tune_stem.yaml"),
    "segmentation": ("train.yaml", "finetune_segmentation.yaml", "peers/scores.yaml"),
    "classification": ("train.yaml", "finetune_classification.yaml", "peers/scores.yaml"),
    "probe": ("train.yaml", "probe.yaml"),
}
RUN_IDS = dict.fromkeys(("segmentation", "classification"), "finetuning")  # where it is another name
# How a run ends whose loss, gradient or validation is no finite number any more, and what it then counts as.
DIVERGED = re.compile(r"^error: (.+ is (?:nan|-?inf) (?:in|after) epoch (\d+).+)$", re.MULTILINE)
WORST = {"val_mse": math.inf, "val_unexplained": math.inf, "val_dice": 0.0, "val_hausdorff": math.inf}
WORST |= {"val_auroc": 0.5, "val_accuracy": 0.0, "val_mae": math.inf, "val_r2": -math.inf}


@dataclass(frozen=True)
class Run:
    """One run of a workflow."""

    folder: Path  # its output_dir
    workflow: str  # of CONFIGS
    knobs: Mapping[str, Any]  # over those of the configs
    overlays: tuple[str, ...] = ()  # config files on top of the workflow's own

    def config_files(self) -> list[str]:
        """Tell the paths of the workflow's config files and of the overlays."""
        return [str(ROOT / "configs" / name) for name in (*CONFIGS[self.workflow], *self.overlays)]

    def record(self) -> dict[str, Any]:
        """Read ``run.json``: with which knobs and code it was started, whether it is complete, how it diverged."""
        file = self.folder / "run.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def metrics(self) -> list[dict[str, Any]]:
        """Read the lines of ``metrics.jsonl``, one a validation; of a run that diverged, the worst scores behind."""
        file = self.folder / "metrics.jsonl"
        records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        if problem := self.record().get("diverged"):
            iteration = records[-1]["iteration"] if records else 0
            records.append({"epoch": problem["epoch"], "iteration": iteration, **WORST})
        return records

    def last_weights(self) -> Path:
        """Write the network of the last epoch and its record to ``last.pt``; ``model.pt`` is chosen by validation.

        Raises:
            Mistake: when there is no whole checkpoint, or the run diverged.
        """
        if problem := self.record().get("diverged"):
            raise Mistake(f"{self.folder} has no weights to go on with: {problem['message']}")
        path, state = self.folder / "last.pt", self.folder / "checkpoints" / "training_state.pt"
        if not path.exists():
            record = read_record(state.with_name("model.pt"))
            write_record({name: part for name, part in record.items() if name != "metrics"}, path)
            checkpoints.save(checkpoints.load(state)["network"], path)
        return path

    def outcome(self) -> str:
        """Tell where the last weights are, or how the run diverged."""
        problem = self.record().get("diverged")
        return problem["message"] if problem else str(self.last_weights())

    def rows(self, name: str) -> dict[str, dict[str, str]]:
        """Read a table of the last validation, such as ``scores.csv``: by case, the first column, the others by name.

        Empty of a run that diverged.
        """
        if "diverged" in self.record():
            return {}
        with (self.folder / name).open(newline="") as file:
            return {next(iter(row.values())): row for row in csv.DictReader(file)}

    def execute(self) -> None:
        """Run it on one thread, the fastest for networks this small, unless it is complete; one that diverges is.

        Raises:
            Mistake: when it fails, with the end of its log; was stopped; or is there with other knobs.
        """
        knobs = json.loads(json.dumps(self.knobs))  # tuples become lists, as in the record
        configs = [*CONFIGS[self.workflow], *self.overlays]
        weights = knobs.get("pretrained")  # which may change, while their path does not
        settings = {"workflow": self.workflow, "configs": configs, "knobs": knobs}
        settings["sha256_of_weights"] = weights and sha256(weights)
        if found := self.record():
            if any(found.get(key) != value for key, value in settings.items()):
                raise Mistake(f"{self.folder} holds a run with other knobs, see its run.json: remove it")
            if found["complete"]:
                return
        settings["code_version"] = _code_version()
        self._write_record(settings | {"complete": False})
        ended = self._start(knobs)
        if ended.returncode:
            problem = DIVERGED.search(ended.stdout)
            if problem is None:
                raise Mistake(f"{' '.join(ended.args)}\nended with {ended.returncode}:\n{ended.stdout[-2000:]}")
            settings["diverged"] = {"epoch": int(problem[2]), "message": problem[1]}
        elif max((record["epoch"] for record in self.metrics()), default=0) < knobs.get("max_epochs", 0):
            raise Mistake(f"{self.folder} was stopped before its end: the same command continues it")  # by SIGTERM
        self._write_record(settings | {"complete": True})

    def _write_record(self, content: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "run.json").write_text(json.dumps(content, indent=1) + "\n")

    def _start(self, knobs: Mapping[str, Any]) -> subprocess.CompletedProcess[str]:
        """Start or continue it, and wait for its end; what it prints goes to ``log.txt`` and into the result."""
        command = [
            sys.executable,
            "-m",
            "monai.bundle",
            "run",
            RUN_IDS.get(self.workflow, self.workflow),
            "--config_file",
            str(self.config_files()),
        ]
        for name, value in {**knobs, "output_dir": str(self.folder)}.items():
            # As Python has it, for lists and dicts; but MONAI would pass over a None.
            command += [f"--{name}", "null" if value is None else str(value)]
        if (self.folder / "checkpoints").exists():
            command += ["--resume", "true"]
        about = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "check": False}
        with (self.folder / "log.txt").open("a+") as log:
            start = log.tell()
            ended = subprocess.run(command, **about, stdout=log, stderr=log)  # noqa: S603
            log.seek(start)
            return subprocess.CompletedProcess(command, ended.returncode, stdout=log.read())


def execute(runs: Sequence[Run], jobs: int) -> None:
    """Do the runs that are not complete, some at a time.

    Raises:
        Mistake: of the first run that fails; no other is started then.
    """
    with ThreadPoolExecutor(jobs) as pool:
        started = [pool.submit(run.execute) for run in runs]
        try:
            for run in as_completed(started):
                run.result()
        except BaseException:  # also when the user stops it
            pool.shutdown(cancel_futures=True)
            raise


def last_metrics(runs: Mapping[Any, Run], jobs: int) -> dict[Any, dict[str, Any]]:
    """Do the runs, and read the last validation of each; see :func:`execute`."""
    execute(list(runs.values()), jobs)
    return {key: run.metrics()[-1] for key, run in runs.items()}


def _code_version() -> str:
    """Name the commit, and say ``-dirty`` behind it where there is more; ``unknown`` outside of a repository."""
    command = ["git", "describe", "--always", "--abbrev=10", "--dirty", "--exclude=*"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    return ended.stdout.strip() or "unknown"
