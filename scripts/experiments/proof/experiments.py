"""The experiments on one cohort."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.utils import ensure_tuple

from ...data import Targets, find_cases, labelled, read_targets, split_cases
from ...data.describing import Case
from ...mistakes import Mistake, likely
from ...weights import save
from .cohort import carried, count_labels, given_weights, hold_out, linked
from .contestants import CLASSIFICATION, PRETRAINING_RATES, PROBED, SEGMENTATION, STEMS, TUNING, Task
from .finetuning import Comparison, guess
from .pretraining import Pretraining
from .report import report_comparison, report_convergence, report_probes
from .runs import ROOT, Run, execute, last_metrics

__all__ = ["Proof"]

# Knobs that differ between the runs of an experiment, and where they come from.
CHOSEN = {
    **{"dataset_dir": "--dataset_dir", "output_dir": "--output_dir", "pretrained": "--pretrained", "seed": "--seeds"},
    **{"num_train_cases": "--num_labelled", "learning_rate": "--rates", "encoder_learning_rate": "--rates"},
    **{"max_epochs": "--finetuning_epochs or --epochs", "early_stop_patience": "the number of epochs"},
    "freeze_epochs": "the contestants, some of which are frozen",
}


@dataclass
class Proof:
    """The experiments on one cohort; each method is a command.

    Args:
        dataset_dir: a Decathlon folder or a datalist, with labels for all but :meth:`convergence`.
        output_dir: for the runs, and a table, JSON and figure of each experiment.
        pretrained: ``model.pt`` of a pre-training, its ``model.json`` beside it: network, voxels and intensities of all
            runs are those of it.
        vit_mae: weights of MONAI's ViT-MAE, of :meth:`convergence`, to take part too.
        num_labelled: training cases with labels, one number or several; ``all`` for all.
        seeds: one or several, each with a choice of labelled cases, initial weights and draws of its own.
        finetuning_epochs: of 20 steps of a segmentation, or 40 of a classification.
        rates: that each contestant chooses from, 0 for the start itself; default: those of the task.
        knobs: of the runs, over the experiments' own, such as ``{"num_labels": 3}``; not those that an experiment
            chooses run by run.
        jobs: runs at a time.

    Raises:
        Mistake: when there are no such cases or weights, or numbers are no numbers; of a command, when a run fails.
    """

    dataset_dir: str
    output_dir: str = "runs/proof"
    pretrained: str | None = None
    vit_mae: str | None = None
    num_labelled: Sequence[int | str | None] | int | str | None = (5, 20, "all")
    seeds: Sequence[int] | int = (0, 1, 2)
    finetuning_epochs: int = 20
    rates: Sequence[float] | float = ()
    knobs: Mapping[str, Any] | None = None
    jobs: int = 2

    def __post_init__(self) -> None:
        dataset, self.folder = (Path(path).expanduser().resolve() for path in (self.dataset_dir, self.output_dir))
        find_cases(dataset)  # so that what is wrong is named as it was given
        self.num_labelled, self.seeds = _numbers(self.num_labelled), _numbers(self.seeds, 0)
        self.rates, self.knobs = ensure_tuple(self.rates), dict(self.knobs or {})
        if any(rate < 0 for rate in self.rates) or (self.rates and not any(self.rates)):
            raise Mistake(
                f"rates {self.rates} should be numbers above 0; with others there may be a 0, the start itself"
            )
        if chosen := sorted(self.knobs.keys() & CHOSEN.keys()):
            raise Mistake(f"{chosen[0]} cannot be one of --knobs: it follows from {CHOSEN[chosen[0]]}")
        for name in ("jobs", "finetuning_epochs"):
            if getattr(self, name) < 1:
                raise Mistake(f"{name} {getattr(self, name)} must be at least 1")
        self.dataset_dir = linked(dataset, self.folder)
        folds = find_cases(self.dataset_dir)
        # As training divides them.
        self.folds = folds if "validation" in folds else split_cases(folds["training"], 0.2)

    def segmentation(self, contestants: Sequence[str] | str = ()) -> None:
        """Fine-tune to segment, with few labels and with many: what pre-training gains over random weights and others.

        All learn from the same cases by the same number of steps, each in the way that does best on a fifth of the
        *training* cases after learning from others of them. The last epoch is scored, on the validation cases: nothing
        is chosen by these.

        Args:
            contestants: who takes part; default: all but UNETR, and the ViT-MAE if there are weights of it.
        """
        folds = {fold: labelled(cases) for fold, cases in self.folds.items()}
        self._compare("segmentation", SEGMENTATION, self._weights(), folds, self._label_knobs(), contestants)

    def classification(self, target: Sequence[str] | str = "class", contestants: Sequence[str] | str = ()) -> None:
        """Learn a class or a number of each volume, in the ways of :meth:`segmentation`.

        Args:
            target: a field of the datalist, or several.
            contestants: who takes part; default: all.
        """
        for field in ensure_tuple(target):
            found = read_targets(self.folds, field)
            folds = {"training": found.training, "validation": found.validation}
            knobs = {"target": field, "task": found.task}
            self._compare(f"classification_{field}", CLASSIFICATION, self._weights(), folds, knobs, contestants, found)

    def tuning(self) -> None:
        """Segment with a frozen encoder: in patch mode, on whole volumes untuned and tuned, and with random weights.

        Patch mode is a strict stem with ``blockwise_norm``: the same function of a whole volume.
        """
        weights = self._weights()["pretrained"]
        network, labels = carried(weights), self._label_knobs()
        if not network.get("strict_stem"):
            raise Mistake(f"{weights} has no strict stem, as patch mode needs: pre-train with --strict_stem true")
        known = ConfigParser.load_config_files(Run(self.folder, "tuning", {}).config_files())
        given = {name: value for name, value in self.knobs.items() if name in known}  # overlap is the segmentations'
        knobs = TUNING | network | given | {"dataset_dir": self.dataset_dir, "pretrained": str(weights)}
        tuned = Run(self.folder / "tuning" / "stem", "tuning", knobs)
        execute([tuned], 1)
        states = {"pretrained": weights, "untuned": weights, "tuned": tuned.last_weights()}
        folds = {fold: labelled(cases) for fold, cases in self.folds.items()}
        self._compare("tuning", STEMS, states, folds, labels)

    def probing(self, target: Sequence[str] | str = "label") -> None:
        """Read the labels off frozen features, of each patch and of each volume's embedding.

        Args:
            target: ``label``, the label maps, or a field of the datalist, a class or a number; or several.
        """
        for field in ensure_tuple(target):
            self._probe(field)

    def _probe(self, target: str) -> None:
        of_maps, weights, runs = target == "label", self._weights(), {}
        place = "probing" if of_maps else f"probing_{target}"
        shared = {"num_workers": 0, "target": target, **carried(weights["pretrained"]), **self.knobs}
        shared |= self._label_knobs() if of_maps else {}
        for seed in self.seeds:
            weights["random"] = self.folder / "probing" / f"random_{seed}.pt"
            save(_fresh_network(shared, seed), weights["random"])
            for most, (name, path) in product(self.num_labelled, weights.items()):
                knobs = {"dataset_dir": self.dataset_dir, "num_train_cases": most, "seed": seed}
                folder = self.folder / place / f"{name}_{most or 'all'}_{seed}"
                knobs = {**shared, **knobs, "pretrained": str(path)}
                runs[name, most, seed] = Run(folder, "probe", knobs, PROBED[name].overlays)
        execute(list(runs.values()), self.jobs)
        probes = {key: json.loads((run.folder / "probe.json").read_text()) for key, run in runs.items()}
        report_probes(self.folder, place, probes)

    def convergence(
        self, overlays: Sequence[str] | str = "small.yaml", epochs: int = 200, selection_epochs: int = 50
    ) -> None:
        """Pre-train BertsWin and MONAI's ViT-MAE on the same volumes with the same masks, draws, loss and schedule.

        Each has the rate that predicts a fifth of the *training* volumes best, after a shorter training on the others,
        and the ViT-MAE as many epochs as it does in BertsWin's time. Two more BertsWins have a tenth and a fifth of the
        ViT-MAE's epochs, in steps of one volume.

        Args:
            overlays: config files behind ``train.yaml``, such as a ``plan.yaml``; default: that of the bundle.
            epochs: of BertsWin.
            selection_epochs: of the trainings that choose the rates.
        """
        files = tuple(name if name == "small.yaml" else str(Path(name).resolve()) for name in ensure_tuple(overlays))
        training = Pretraining(
            folder=self.folder,
            dataset_dir=self.dataset_dir,
            inner_dataset=hold_out(self.folds["training"], self.folder / "selection.json"),
            overlays=files,
            epochs=epochs,
            selection_epochs=selection_epochs,
            seeds=self.seeds,
            rates=self.rates or PRETRAINING_RATES,
            knobs=self.knobs,
            jobs=self.jobs,
        )
        found = training.selection()
        runs = training.runs(found)
        execute(list(runs.values()), self.jobs)
        curves = {key: run.metrics() for key, run in runs.items()}
        rates = {name: run.knobs["learning_rate"] for (name, _), run in runs.items()}
        weights = {f"{name}, seed {seed}": run.outcome() for (name, seed), run in runs.items()}
        report_convergence(self.folder, curves, rates, training.seconds_per_epoch(), found, weights)

    def _compare(
        self,
        name: str,
        task: Task,
        weights: Mapping[str, Path],
        folds: Mapping[str, Sequence[Case]],
        knobs: Mapping[str, Any],
        contestants: Sequence[str] | str = (),
        targets: Targets | None = None,
    ) -> None:
        comparison = Comparison(
            place=self.folder / name,
            task=task,
            names=_chosen(task, contestants, weights),
            weights=weights,
            dataset_dir=self.dataset_dir,
            folds=folds,
            num_labelled=self.num_labelled,
            seeds=self.seeds,
            epochs=self.finetuning_epochs,
            knobs={**carried(weights["pretrained"]), **knobs, **self.knobs},
            rates=self.rates or task.rates,
            jobs=self.jobs,
            targets=targets,
        )
        found = comparison.selection()
        runs = comparison.runs(found)
        scores, blind = last_metrics(runs, self.jobs), guess(targets) if targets else None
        for last in scores.values():
            if blind and math.isinf(last.get("val_mae", 0)):  # it diverged: a guess, as case by case
                last |= {"val_r2": 0.0, **blind}
        report_comparison(comparison, scores, comparison.gains(runs), found, blind)

    def _weights(self) -> dict[str, Path]:
        given = {"pretrained": given_weights(self.pretrained, "pretrained")}
        return given | ({"vit_mae": given_weights(self.vit_mae, "vit_mae")} if self.vit_mae else {})

    def _label_knobs(self) -> dict[str, int]:
        return {} if "num_labels" in self.knobs else {"num_labels": count_labels(self.dataset_dir)}


def _chosen(task: Task, contestants: Sequence[str] | str, weights: Mapping[str, Path]) -> list[str]:
    """Tell who takes part: those who are named, or all who are so by default and have weights."""
    able = [name for name, about in task.contestants.items() if about.starts_from in (None, *weights)]
    for name in ensure_tuple(contestants):
        if name not in able:
            others = likely(name, able) or f": there are {', '.join(able)}"
            raise Mistake(f"there is no contestant {name} here{others}")
    return list(ensure_tuple(contestants)) or [name for name in able if task.contestants[name].by_default]


def _fresh_network(knobs: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Initialise the network that knobs describe."""
    config = ConfigParser.load_config_file(ROOT / "configs" / "train.yaml")
    torch.manual_seed(seed)
    return ConfigParser(config | knobs).get_parsed_content("network_def").state_dict()


def _numbers(values: Sequence[int | str | None] | int | str | None, low: int = 1) -> list[int | None]:
    """Read one number or several, at least ``low``; ``all`` (or None) becomes None."""
    found = [None if value in (None, "all") else value for value in ensure_tuple(values)]
    if any(value is not None and (not isinstance(value, int) or value < low) for value in found):
        raise Mistake(f"{values} should be whole numbers, or all, and at least {low}")
    return found
