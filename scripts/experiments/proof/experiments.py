"""The experiments on one dataset."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from monai.utils import ensure_tuple

from ...data import case_seed, find_cases, split_cases
from ...data.describing import Case
from ...mistakes import Mistake
from ...networks import bertswin_mae_small_patch8_48x64x48
from ...weights import save
from ..benchmark.training import time_training
from .contestants import FINETUNING, FINETUNING_RATES, PRETRAININGS, PROBED, RATES, SEGMENTATIONS, TUNED_EPOCHS
from .report import report_convergence, report_probes, report_scores
from .runs import Run, execute, last_metrics

__all__ = ["Proof"]

Way = tuple[str, int, float]  # a contestant, how many epochs its encoder is frozen, and the learning rate


@dataclass
class Proof:
    """The experiments on one dataset; each method is a command.

    All use ``small.yaml``: MR volumes, and where there are labels, two of them.

    Args:
        dataset_dir: a Decathlon folder or a datalist, with labels for all but :meth:`convergence`.
        output_dir: for the runs, and a table, JSON and figure of each experiment.
        num_labelled: training cases with labels, one number or several; ``all`` for all.
        seeds: one or several, each with a choice of labelled cases, initial weights and draws of its own.
        epochs: of BertsWin's pre-training.
        selection_epochs: of those that choose the rates.
        finetuning_epochs: of 20 steps.
        jobs: runs at a time.

    Raises:
        Mistake: when there are no such cases, or numbers are no numbers; of a command, when a run fails.
    """

    dataset_dir: str
    output_dir: str = "runs/proof"
    num_labelled: Sequence[int | str | None] | int | str | None = (5, 20, "all")
    seeds: Sequence[int] | int = (0, 1, 2)
    epochs: int = 200
    selection_epochs: int = 50
    finetuning_epochs: int = 20
    jobs: int = 2

    def __post_init__(self) -> None:
        dataset, self.folder = (Path(path).expanduser().resolve() for path in (self.dataset_dir, self.output_dir))
        find_cases(dataset)  # so that what is wrong is named as it was given
        self.num_labelled, self.seeds = _numbers(self.num_labelled), _numbers(self.seeds)
        if self.jobs < 1:
            raise Mistake(f"jobs {self.jobs} must be at least 1")
        self.dataset_dir = _linked(dataset, self.folder)
        folds = find_cases(self.dataset_dir)
        # As training divides them.
        self.folds = folds if "validation" in folds else split_cases(folds["training"], 0.2)
        self.inner_dataset = _divide(self.folds["training"], self.folder)

    def convergence(self) -> None:
        """Pre-train BertsWin and MONAI's ViT-MAE on the same volumes with the same masks, draws, loss and schedule.

        Each has the rate that predicts a fifth of the *training* volumes best, after a shorter training on the others,
        and the ViT-MAE as many epochs as it does in BertsWin's time, stem tuning included. Two more BertsWins have a
        tenth and a fifth of the ViT-MAE's epochs, with four times the steps an epoch.
        """
        scores = self._selection(name for name, about in PRETRAININGS.items() if about.rate_of is None)
        runs = self._pretrainings([name for name in PRETRAININGS if name != "bertswin"], scores)
        execute(list(runs.values()), self.jobs)
        curves = {name: run.metrics() for name, run in runs.items()}
        rates = {name: run.knobs["learning_rate"] for name, run in runs.items()}
        report_convergence(self.folder, curves, rates, self._seconds_per_epoch(), scores)

    def segmentation(self) -> None:
        """Fine-tune to segment, with few labels and with many: pre-trained encoders and networks from scratch.

        All learn from the same cases by the same number of steps, each in the way that does best on a fifth of the
        *training* cases after learning from 20 of the others. The last epoch is scored, on the validation cases, and
        the encoders are those of the last epoch of their pre-training: nothing is chosen by the validation cases.
        """
        encoders = self._encoders()
        found = self._finetuning_selection(list(SEGMENTATIONS), encoders)
        states = {name: (_best(found, name), {}) for name in SEGMENTATIONS}
        report_scores(self.folder, "segmentation", self._scores("segmentation", states, encoders), found)

    def tuning(self) -> None:
        """Segment with a frozen encoder: in patch mode, on whole volumes untuned and tuned, and with random weights.

        The decoder's rate is that which :meth:`segmentation` chooses for the tuned encoder, which is thawed there.
        Patch mode is the pre-trained strict stem with ``blockwise_norm``: the same function of a whole volume.
        """
        encoders = self._encoders()
        best = _best(self._finetuning_selection(["bertswin_strict"], encoders), "bertswin_strict")
        frozen, untuned = {"freeze_epochs": self.finetuning_epochs}, {"pretrained": str(encoders["untuned"])}
        states = {
            "patch mode": (best, frozen | untuned | {"blockwise_norm": True}),
            "volumetric, untuned": (best, frozen | untuned),
            "volumetric, tuned": (best, frozen),
            "random weights": (("random", *best[1:]), frozen),
        }
        report_scores(self.folder, "tuning", self._scores("tuning", states, encoders))

    def probing(self) -> None:
        """Read the labels off frozen features, of each patch and of each volume's embedding."""
        encoders, runs = self._encoders(), {}
        for seed in self.seeds:
            encoders["random"] = self.folder / "probing" / f"random_{seed}.pt"
            torch.manual_seed(seed)
            save(bertswin_mae_small_patch8_48x64x48(strict_stem=True).state_dict(), encoders["random"])
            for most, (name, overlays) in product(self.num_labelled, PROBED.items()):
                knobs = {"dataset_dir": self.dataset_dir, "pretrained": str(encoders[name])}
                knobs |= {"num_train_cases": most, "seed": seed}
                folder = self.folder / "probing" / f"{name}_{most or 'all'}_{seed}"
                runs[name, most, seed] = Run(folder, "probe", knobs, overlays)
        execute(list(runs.values()), self.jobs)
        probes = {key: json.loads((run.folder / "probe.json").read_text()) for key, run in runs.items()}
        report_probes(self.folder, probes)

    def _selection(self, names: Iterable[str]) -> dict[tuple[str, float], float]:
        """Train at every rate on a part of the training volumes, and score on the rest of them."""
        candidates = {}
        for name, rate in product(names, RATES):
            about = PRETRAININGS[name]
            # A short schedule wants a rate of its own. This is about a tenth of the ViT-MAE's, not known yet.
            length = max(1, self.epochs // 9) if about.one_in else self.selection_epochs
            settings = {"dataset_dir": self.inner_dataset, "max_epochs": length, "val_interval": length}
            folder = self.folder / "selection" / f"{name}_{rate:g}"
            knobs = {**about.knobs, **settings, "learning_rate": rate}
            candidates[name, rate] = Run(folder, "training", knobs, about.overlays)
        return {key: last["val_mse"] for key, last in last_metrics(candidates, self.jobs).items()}

    def _pretrainings(self, names: Iterable[str], scores: Mapping[tuple[str, float], float]) -> dict[str, Run]:
        seconds, runs = self._seconds_per_epoch(), {}
        for name in names:
            about, epochs = PRETRAININGS[name], self._allowed_epochs(name, seconds)
            best_rate = min((scores[about.rate_of or name, rate], rate) for rate in RATES)[1]
            settings = {"dataset_dir": self.dataset_dir, "max_epochs": epochs, "early_stop_patience": epochs}
            knobs = {**about.knobs, **settings, "learning_rate": best_rate}
            runs[name] = Run(self.folder / "pretraining" / name, "training", knobs, about.overlays)
        return runs

    def _allowed_epochs(self, name: str, seconds: Mapping[str, float]) -> int:
        """As many as fit in BertsWin's time; and in that of its stem tuning, for those that are not tuned."""
        if part := PRETRAININGS[name].one_in:
            return max(1, self._allowed_epochs("vit_mae", seconds) // part)
        extra = 0 if name.startswith("bertswin") else TUNED_EPOCHS
        return round(max(self.epochs, (self.epochs + extra) * seconds["bertswin"] / seconds[name]))

    def _seconds_per_epoch(self, rounds: int = 3) -> dict[str, float]:
        """Median over rounds, without validation, on all cores, one network after the other; measured once."""
        path = self.folder / "seconds.json"
        if not path.exists():  # numbers of epochs follow from it, so it stays
            measured: dict[str, list[float]] = {name: [] for name in PRETRAININGS}
            for _, (name, about) in product(range(rounds), PRETRAININGS.items()):
                files = Run(self.folder, "training", {}, about.overlays).config_files()
                _, waited, stepped = time_training(files, 1, **about.knobs, dataset_dir=self.dataset_dir)
                measured[name].append((waited + stepped).sum().item())
            path.write_text(json.dumps({name: statistics.median(values) for name, values in measured.items()}))
        return json.loads(path.read_text())

    def _encoders(self) -> dict[str, Path]:
        """Pre-train what is not there yet, the ViT-MAE for as long as BertsWin takes, and tune the stem."""
        runs = self._pretrainings(["bertswin_strict", "vit_mae"], self._selection(["bertswin", "vit_mae"]))
        execute(list(runs.values()), self.jobs)
        untuned = runs["bertswin_strict"].last_weights()
        knobs = {"dataset_dir": self.dataset_dir, "pretrained": str(untuned)}
        tuned = Run(self.folder / "pretraining" / "bertswin_strict_tuned", "tuning", knobs)
        execute([tuned], 1)
        return {"bertswin_strict": tuned.last_weights(), "untuned": untuned, "vit_mae": runs["vit_mae"].last_weights()}

    def _finetuning_selection(self, names: Sequence[str], encoders: Mapping[str, Path]) -> dict[Way, list[float]]:
        """Learn from 20 training cases in every way, and score on others of them: Dice by way.

        The two best ways of each go into a second round, with a seed of its own: one alone may have been lucky.
        """
        settings = {"dataset_dir": self.inner_dataset, "num_train_cases": 20}
        ways = [way for name in names for way in product([name], SEGMENTATIONS[name].freezes, FINETUNING_RATES)]
        found: dict[Way, list[float]] = {way: [] for way in ways}
        for seed in (0, 1):
            runs = {}
            for name, freeze, rate in ways:
                place = f"segmentation_selection/{name}_{freeze}_{rate:g}_{seed}"
                way = (name, freeze, rate)
                runs[way] = self._finetuning(place, way, encoders, settings | {"seed": seed})
            for way, last in last_metrics(runs, self.jobs).items():
                found[way].append(last["val_dice"])
            ranked = sorted(found, key=found.__getitem__, reverse=True)
            ways = [way for name in names for way in [way for way in ranked if way[0] == name][:2]]
        return found

    def _scores(
        self, experiment: str, states: Mapping[str, tuple[Way, Mapping[str, Any]]], encoders: Mapping[str, Path]
    ) -> dict[tuple[str, int | None, int], dict[str, Any]]:
        """Fine-tune, each its own way and with knobs of its own, and score: by state, number of labels and seed."""
        runs = {}
        for seed, most, (state, (way, knobs)) in product(self.seeds, self.num_labelled, states.items()):
            place = f"{experiment}/{state.replace(', ', '_').replace(' ', '_')}_{most or 'all'}_{seed}"
            settings = {**knobs, "num_train_cases": most, "seed": seed}
            runs[state, most, seed] = self._finetuning(place, way, encoders, settings)
        return last_metrics(runs, self.jobs)

    def _finetuning(self, place: str, way: Way, encoders: Mapping[str, Path], settings: Mapping[str, Any]) -> Run:
        name, freeze, rate = way
        knobs = FINETUNING | {
            "dataset_dir": self.dataset_dir,
            "max_epochs": self.finetuning_epochs,
            "learning_rate": rate,
            "encoder_learning_rate": rate / 10 if freeze else rate,
            "freeze_epochs": freeze,
            "pretrained": str(encoders[name]) if name in encoders else None,
        }
        return Run(self.folder / place, "finetuning", knobs | settings, SEGMENTATIONS[name].overlays)


def _best(scores: Mapping[Way, Sequence[float]], name: str) -> Way:
    """Choose a contestant's way: of those that went furthest, the best on average."""
    ways = [way for way in scores if way[0] == name]
    return max(ways, key=lambda way: (len(scores[way]), statistics.mean(scores[way]), way))


def _linked(dataset: Path, folder: Path) -> str:
    """Let runs find the dataset through a link: it may move, while the names of cases and the knobs of runs stay."""
    root = dataset.parent if dataset.is_file() else dataset
    if folder.is_relative_to(root):
        raise Mistake(f"output_dir {folder} must not lie within the dataset {root}")
    beside, link = folder / ".dataset", folder / "dataset"
    folder.mkdir(parents=True, exist_ok=True)
    beside.unlink(missing_ok=True)
    beside.symlink_to(root)
    beside.replace(link)
    return str(link / dataset.name if dataset.is_file() else link)


def _below(paths: str | list[str], folder: Path) -> str | list[str]:
    return [_below(path, folder) for path in paths] if isinstance(paths, list) else paths.removeprefix(f"{folder}/")


def _divide(cases: Sequence[Case], folder: Path) -> str:
    """Write a datalist that divides the training volumes once more, as the names' hashes have it."""
    ranked = sorted(cases, key=lambda case: case_seed(case["case"], 1))
    held_out = max(1, len(ranked) // 5)
    folds = {"training": ranked[held_out:], "validation": ranked[:held_out]}
    content = {  # paths below the list, so that they and the names that follow from them stay
        fold: [{key: _below(case[key], folder) for key in ("image", "label") if key in case} for case in cases]
        for fold, cases in folds.items()
    }
    path = folder / "selection.json"
    if path.exists() and json.loads(path.read_text()) != content:
        raise Mistake(f"{folder} holds experiments on other cases, see {path}: choose another --output_dir")
    path.write_text(json.dumps(content, indent=1))
    return str(path)


def _numbers(values: Sequence[int | str | None] | int | str | None) -> list[int | None]:
    """Read one number or several; ``all`` (or None) becomes None."""
    found = [None if value in (None, "all") else value for value in ensure_tuple(values)]
    if any(value is not None and (not isinstance(value, int) or value < 0) for value in found):
        raise Mistake(f"{values} should be whole numbers, or all")
    return found
