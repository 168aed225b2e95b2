"""Learning from labels, from several starts: each at the rate that suits it, all on the same cases."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ...data import Targets, find_cases, patient_of
from ...data.describing import Case
from ...mistakes import Mistake
from .cohort import hold_out
from .contestants import ACCURACY, AS_IT_STARTS, COMPARISONS, DICE, ERROR, Measure, Task
from .gains import Gain, auroc_gain, mean_gain
from .runs import Run, last_metrics

__all__ = ["Comparison", "Rate", "best_rate", "guess", "rate_beyond"]

MOST_BEYOND = 2  # rates beyond the ends of the given ones

Rate = tuple[str, float]  # of a contestant
Runs = dict[tuple[str, int | None, int], Run]  # by contestant, number of labels (None: all) and seed


@dataclass(frozen=True)
class Comparison:
    """Some contestants, and what they learn from."""

    place: Path  # of the runs
    task: Task
    names: Sequence[str]  # who takes part
    weights: Mapping[str, Path]  # by what contestants start from
    dataset_dir: str
    folds: Mapping[str, Sequence[Case]]  # those with labels
    num_labelled: Sequence[int | None]  # None: all
    seeds: Sequence[int]
    epochs: int
    knobs: Mapping[str, Any]  # over the task's
    rates: Sequence[float]
    jobs: int
    targets: Targets | None = None  # of a classification

    def __post_init__(self) -> None:
        if (most := max(self.counts.values())) > (there := len(self.folds["training"])):
            raise Mistake(f"num_labelled {most} is more than the {there} labelled training cases: give fewer, or all")

    @property
    def counts(self) -> dict[int | None, int]:
        """How many labels each of ``num_labelled`` are, in rising order."""
        counts = {most: len(self.folds["training"]) if most is None else most for most in self.num_labelled}
        return dict(sorted(counts.items(), key=lambda item: item[1]))

    @property
    def measure(self) -> Measure:
        """What the contestants are judged by."""
        return DICE if self.targets is None else ACCURACY if self.targets.classes else ERROR

    def selection(self) -> dict[Rate, float]:
        """Learn at every rate, and score on a fifth of the training cases, which it does not learn from.

        With one seed, and with the middle one of the numbers of labels, of two the upper. ``all`` does not count among
        others, so that it may join later. Who does best at the lowest or the highest rate tries others beyond it.
        """
        groups = self.targets.values if self.targets and self.targets.classes else None
        inner = hold_out(self.folds["training"], self.place.parent / f"{self.place.name}_selection.json", groups)
        numbers = [count for most, count in self.counts.items() if most is not None] or [*self.counts.values()]
        most = min(numbers[len(numbers) // 2], len(find_cases(inner)["training"]))
        settings, found = {"dataset_dir": inner, "num_train_cases": most, "seed": 0}, {}
        # As it starts, a peer knows nothing: it has no head that is fitted.
        wanted = [(name, rate) for name, rate in product(self.names, self.rates)
                  if rate or not self.task.contestants[name].overlays]  # fmt: skip
        for _ in range(1 + MOST_BEYOND):
            place = self.place.parent / f"{self.place.name}_selection"
            runs = {(name, rate): self.run(name, rate, place / f"{name}_{rate:g}", settings) for name, rate in wanted}
            found |= {key: last[self.measure.key] for key, last in last_metrics(runs, self.jobs).items()}
            beyond = {name: rate_beyond(found, name, self.measure.sign) for name in self.names}
            wanted = [(name, rate) for name, rate in beyond.items() if rate]
        return found

    def runs(self, found: Mapping[Rate, float]) -> Runs:
        """Name the runs that are scored on the validation cases, each contestant's at its best rate."""
        runs: Runs = {}
        for seed, most, name in product(self.seeds, self.counts, self.names):
            settings = {"dataset_dir": self.dataset_dir, "num_train_cases": most, "seed": seed}
            folder = self.place / f"{name}_{most or 'all'}_{seed}"
            runs[name, most, seed] = self.run(name, best_rate(found, name, self.measure.sign), folder, settings)
        return runs

    def run(self, name: str, rate: float, folder: Path, settings: Mapping[str, Any]) -> Run:
        """Name one run."""
        about = self.task.contestants[name]
        learns = {
            **dict.fromkeys(("max_epochs", "val_interval", "early_stop_patience"), self.epochs),
            **self.task.follow(rate, about.starts_from is not None or about.frozen == 1),
            "learning_rate": rate,
        }
        knobs = {
            **self.task.knobs,
            **self.knobs,
            **about.knobs,
            **settings,
            **(learns if rate else learns | AS_IT_STARTS),
            "freeze_epochs": round(about.frozen * self.epochs),
            "pretrained": str(self.weights[about.starts_from]) if about.starts_from else None,
            "index": str(self.place.parent / "index.jsonl"),  # what is known of the volumes, for all runs
        }
        return Run(folder, self.task.workflow, knobs, about.overlays)

    def gains(self, runs: Runs) -> dict[tuple[str, str, int | None], Gain]:
        """Compare contestants case by case; a gain is positive where the first is better."""
        gains = {}
        for (first, second), most in product(COMPARISONS, self.counts):
            if first in self.names and second in self.names:
                both = ([runs[name, most, seed] for seed in self.seeds] for name in (first, second))
                gains[first, second, most] = self._gain(*both)
        return gains

    def _gain(self, first: Sequence[Run], second: Sequence[Run]) -> Gain:
        validation = self.targets.validation if self.targets else self.folds["validation"]
        patients = {case["case"]: patient_of(case) for case in validation}
        if not (self.targets and self.targets.classes):
            return mean_gain(*([self._by_case(run) for run in runs] for runs in (first, second)), patients)
        tables = [run.rows("scores.csv") for run in (*first, *second)]
        names = {case["case"] for case in self.targets.validation}
        cases = sorted(names.intersection(*filter(None, tables)))
        found = [self._probabilities(table, cases) for table in tables]
        true = np.array([self.targets.values[case] for case in cases]).astype(int)
        return auroc_gain(found[: len(first)], found[len(first) :], true, [patients[case] for case in cases])

    def _by_case(self, run: Run) -> dict[str, float]:
        """Read Dice, or the negative error, of every case: of a run that diverged 0, or the error of a guess."""
        if self.targets is None:
            dice = {case: float(row["mean"]) for case, row in run.rows("val_dice_raw.csv").items()}
            dice = dice or dict.fromkeys((case["case"] for case in self.folds["validation"]), 0.0)
            return {case: value for case, value in dice.items() if not math.isnan(value)}  # nan: it has no label
        rows, values = run.rows("scores.csv"), self.targets.values
        names = rows or [case["case"] for case in self.targets.validation]
        answers = {case: float(rows[case]["prediction"]) if rows else self.targets.mean for case in names}
        return {case: -abs(answer - values[case]) for case, answer in answers.items()}

    def _probabilities(self, table: Mapping[str, Mapping[str, str]], cases: Sequence[str]) -> np.ndarray:
        """Read the probabilities ``(cases, K)``; of a run that diverged they are equal."""
        columns = [f"probability of {name}" for name in self.targets.classes]
        if not table:
            return np.full((len(cases), len(columns)), 1 / len(columns))
        return np.array([[float(table[case][column]) for column in columns] for case in cases])


def best_rate(found: Mapping[Rate, float], name: str, sign: int) -> float:
    """Choose a contestant's rate: the best, of equal ones the larger."""
    return max((rate for own, rate in found if own == name), key=lambda rate: (sign * found[name, rate], rate))


def rate_beyond(found: Mapping[Rate, float], name: str, sign: int) -> float | None:
    """Tell the next rate, where a contestant does best at the end of those that it has tried, better than beside it."""
    rates = sorted(rate for own, rate in found if own == name and rate)  # beyond the start itself there is nothing
    best = best_rate(found, name, sign)
    for end, beside in ((0, 1), (-1, -2)) if len(rates) > 1 else ():
        if best == rates[end] and found[name, best] != found[name, rates[beside]]:
            rate = float(f"{best * best / rates[beside]:.1g}")  # as far away as the one beside it
            return None if rates[0] <= rate <= rates[-1] else rate
    return None


def guess(targets: Targets) -> dict[str, float]:
    """Score what does not look at the volume: the most frequent class, or the mean, of the training cases."""
    true = [targets.values[case["case"]] for case in targets.validation]
    if not targets.classes:
        return {"val_mae": statistics.fmean(abs(value - targets.mean) for value in true)}
    return {"val_auroc": 0.5, "val_accuracy": true.count(statistics.mode(targets.groups)) / len(true)}
