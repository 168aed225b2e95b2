"""The runs that the proof rests on: each done once, continued where it was stopped, and recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...mistakes import Mistake
from ...weights import checkpoints

__all__ = ["ROOT", "Run", "execute", "last_metrics"]

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Run:
    """One run of a workflow.

    Args:
        folder: its ``output_dir``.
        workflow: such as ``training``.
        configs: file names below ``configs``.
        knobs: over those of the configs; those that are None are left out.
    """

    folder: Path
    workflow: str
    configs: tuple[str, ...]
    knobs: dict[str, Any] = field(default_factory=dict)

    @property
    def record(self) -> Path:
        """The file that says with which knobs and code it was started, and whether it is complete."""
        return self.folder / "run.json"

    def metrics(self) -> list[dict[str, Any]]:
        """Read the lines of ``metrics.jsonl``, one a validation."""
        file = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def last_weights(self) -> Path:
        """Write the network of the last epoch, flat, to ``last.pt``; that in ``model.pt`` is chosen by validation.

        Raises:
            Mistake: when there is no whole checkpoint.
        """
        path = self.folder / "last.pt"
        if not path.exists():
            checkpoints.save(checkpoints.load(self.folder / "checkpoints" / "training_state.pt")["network"], path)
        return path

    def execute(self, threads: int) -> None:
        """Run it, unless it is complete.

        Raises:
            Mistake: when it fails, with the end of its log; was stopped; or is there with other knobs.
        """
        knobs = {name: value for name, value in self.knobs.items() if value is not None}
        settings = {"workflow": self.workflow, "configs": list(self.configs), "knobs": knobs}
        if self.record.exists():
            found = json.loads(self.record.read_text())
            if any(found[key] != value for key, value in settings.items()):
                raise Mistake(f"{self.folder} holds a run with other knobs, see {self.record}: remove it")
            if found["complete"]:
                return
        self.folder.mkdir(parents=True, exist_ok=True)
        settings |= {"code_version": _code_version()}
        self.record.write_text(json.dumps(settings | {"complete": False}, indent=1) + "\n")
        files = str([str(ROOT / "configs" / name) for name in self.configs])
        command = [sys.executable, "-m", "monai.bundle", "run", self.workflow, "--config_file", files]
        for name, value in (knobs | {"output_dir": str(self.folder)}).items():
            command += [f"--{name}", json.dumps(value) if isinstance(value, list | bool) else str(value)]
        if (self.folder / "checkpoints").exists():
            command += ["--resume", "true"]
        log = self.folder / "log.txt"
        with log.open("a") as lines:
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            ended = subprocess.run(command, cwd=ROOT, env=environment, stdout=lines, stderr=lines, check=False)  # noqa: S603
        if ended.returncode:
            raise Mistake(f"{' '.join(command)}\nended with {ended.returncode}:\n{log.read_text()[-2000:]}")
        done = max((record["epoch"] for record in self.metrics()), default=0)
        if done < knobs.get("max_epochs", 0):  # SIGTERM ends a run with 0
            raise Mistake(f"{self.folder} was stopped before its end: the same command continues it")
        self.record.write_text(json.dumps(settings | {"complete": True}, indent=1) + "\n")


def execute(runs: Sequence[Run], jobs: int) -> None:
    """Do the runs that are not complete, some at a time, each with its share of the cores.

    Raises:
        Mistake: of the first run that fails; no other is started then.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        started = [pool.submit(run.execute, threads) for run in runs]
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
