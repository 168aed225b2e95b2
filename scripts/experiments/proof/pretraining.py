"""Pre-training BertsWin and MONAI's ViT-MAE on the same volumes, each at its own rate."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from ..benchmark.training import time_training
from .contestants import PRETRAININGS
from .runs import Run, last_metrics

__all__ = ["Pretraining"]


@dataclass(frozen=True)
class Pretraining:
    """The networks of ``PRETRAININGS`` on one cohort."""

    folder: Path
    dataset_dir: str
    inner_dataset: str  # its training volumes, a fifth of them held out
    overlays: tuple[str, ...]  # config files behind train.yaml
    epochs: int  # of BertsWin
    selection_epochs: int
    seeds: Sequence[int]
    rates: Sequence[float]
    knobs: Mapping[str, Any]  # over all others
    jobs: int

    def selection(self) -> dict[tuple[str, float], float]:
        """Train at every rate on a part of the training volumes, and score on the rest: masked MSE by network, rate."""
        runs = {}
        for name, rate in product((name for name in PRETRAININGS if name != "bertswin_fifth"), self.rates):
            # A short schedule wants a rate of its own. This is about a tenth of the ViT-MAE's, not known yet.
            length = max(1, self.epochs // 9) if PRETRAININGS[name].one_in else self.selection_epochs
            settings = {"dataset_dir": self.inner_dataset, "val_interval": length, "seed": 0}
            runs[name, rate] = self._run(self.folder / "selection" / f"{name}_{rate:g}", name, rate, length, settings)
        return {key: last["val_mse"] for key, last in last_metrics(runs, self.jobs).items()}

    def runs(self, scores: Mapping[tuple[str, float], float]) -> dict[tuple[str, int], Run]:
        """Name the trainings, by network and seed, at the rates that did best."""
        seconds, runs = self.seconds_per_epoch(), {}
        for name, seed in product(PRETRAININGS, self.seeds):
            chooser = "bertswin_tenth" if PRETRAININGS[name].one_in else name
            rate = min((scores[chooser, rate], rate) for rate in self.rates)[1]
            settings = {"dataset_dir": self.dataset_dir, "seed": seed}
            folder = self.folder / "pretraining" / f"{name}_{seed}"
            runs[name, seed] = self._run(folder, name, rate, self._allowed_epochs(name, seconds), settings)
        return runs

    def seconds_per_epoch(self, rounds: int = 3) -> dict[str, float]:
        """Median over rounds, without validation, on all cores, one network after the other; measured once."""
        path = self.folder / "seconds.json"
        if not path.exists():  # numbers of epochs follow from it, so it stays
            measured: dict[str, list[float]] = {name: [] for name in PRETRAININGS}
            for _, name in product(range(rounds), PRETRAININGS):
                files = self._run(self.folder, name, 1.0, 1, {}).config_files()
                _, waited, stepped = time_training(files, 1, **self._knobs(name), dataset_dir=self.dataset_dir)
                measured[name].append((waited + stepped).sum().item())
            path.write_text(json.dumps({name: statistics.median(values) for name, values in measured.items()}))
        return json.loads(path.read_text())

    def _run(self, folder: Path, name: str, rate: float, epochs: int, settings: Mapping[str, Any]) -> Run:
        schedule = {"learning_rate": rate, "max_epochs": epochs, "early_stop_patience": epochs}
        overlays = (*self.overlays, *PRETRAININGS[name].overlays)
        return Run(folder, "training", {**self._knobs(name), **settings, **schedule}, overlays)

    def _knobs(self, name: str) -> dict[str, Any]:
        """Tell a network's own settings; short schedules have as many draws an epoch, each of them a step."""
        about = PRETRAININGS[name]
        files = Run(self.folder, "training", {}, self.overlays).config_files()
        config = ConfigParser.load_config_files(files) | self.knobs
        steps = config["iterations_per_epoch"] and config["batch_size"] * config["iterations_per_epoch"]
        short = {"batch_size": 1, "accumulation_steps": 1, "iterations_per_epoch": steps} if about.one_in else {}
        # MONAI's ViT-MAE hides any patch, and all are compared with the same masks, by the squared error.
        return {"field_of_view": "none", "loss": "l2", **about.knobs, **self.knobs, **short}

    def _allowed_epochs(self, name: str, seconds: Mapping[str, float]) -> int:
        """As many as fit in BertsWin's time; it has as many as were asked for, and no other network has fewer."""
        if part := PRETRAININGS[name].one_in:
            return max(1, self._allowed_epochs("vit_mae", seconds) // part)
        return round(max(self.epochs, self.epochs * seconds["bertswin"] / seconds[name]))
