"""What one contestant gains over another on the same cases, how sure that is, and how many labels it is worth."""

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Gain", "auroc_gain", "labels_worth", "mean_gain"]

RESAMPLES = 5000
ByCase = Mapping[str, float]  # scores of one run


class Gain(NamedTuple):
    """A difference, and its 95 % bootstrap interval over patients."""

    value: float
    low: float
    high: float
    cases: int

    @property
    def half_width(self) -> float:
        """Half of the interval."""
        return (self.high - self.low) / 2


def mean_gain(first: Sequence[ByCase], second: Sequence[ByCase], patients: Mapping[str, str] | None = None) -> Gain:
    """Take the difference of mean scores, the larger the better, of the cases that both have.

    Args:
        first: its scores with each seed, which are averaged case by case before patients are drawn.
        second: the other one's.
        patients: whose each case is; default: a patient each.
    """
    cases = sorted(set.intersection(*map(set, (*first, *second))))
    means = [[statistics.fmean(scores[case] for scores in seeds) for case in cases] for seeds in (first, second)]
    differences, draws = np.subtract(*means), _draws([(patients or {}).get(case, case) for case in cases])
    return _gain(differences.mean(), draws @ differences / draws.sum(1), len(cases))


def auroc_gain(
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    true: np.ndarray,
    patients: Sequence[str] | None = None,
) -> Gain:
    """Take the difference of AUROCs, the mean over seeds and over the classes that are there, each against the rest.

    Args:
        first: its probabilities ``(cases, K)`` with each seed.
        second: the other one's.
        true: the places of classes, ``(cases,)``.
        patients: whose each case is; default: a patient each.
    """
    draws, gains, drawn = _draws(range(len(true)) if patients is None else patients), [], []
    for place in np.unique(true):
        inside, outside = true == place, true != place
        ranks = [np.mean([_ranked(run[inside, place], run[outside, place]) for run in runs], 0)
                 for runs in (first, second)]  # fmt: skip
        difference = np.subtract(*ranks)
        gains.append(difference.mean())
        pairs = draws[:, inside].sum(1) * draws[:, outside].sum(1)
        sums = ((draws[:, inside] @ difference) * draws[:, outside]).sum(1)
        drawn.append(np.divide(sums, pairs, where=pairs > 0, out=np.full(len(draws), np.nan)))
    return _gain(np.mean(gains), np.mean(drawn, 0), len(true))


def labels_worth(goal: float, curve: Sequence[tuple[int, float]]) -> float | None:
    """Tell with how many labels a score is reached, between those that were tried along their logarithm.

    Args:
        goal: a score, the larger the better.
        curve: numbers of labels, rising, and the score with each.

    Returns:
        None where it is not reached.
    """
    for (few, low), (many, high) in pairwise(curve):
        if low < goal <= high:
            return few * (many / few) ** ((goal - low) / (high - low))
    return None


def _draws(patients: Sequence[Any]) -> np.ndarray:
    """Draw as many patients again and again, the same ones every time, each with all cases.

    Args:
        patients: whose each case is.

    Returns:
        How often each case is drawn, ``(RESAMPLES, cases)``.
    """
    places = {patient: place for place, patient in enumerate(dict.fromkeys(patients))}
    shares = np.full(len(places), 1 / len(places))
    drawn = np.random.default_rng(0).multinomial(len(places), shares, size=RESAMPLES)
    return drawn[:, [places[patient] for patient in patients]]


def _ranked(inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Tell of each pair whether the first is ranked higher: 1, 0, or 0.5 of equals; their mean is the AUROC."""
    return (np.sign(inside[:, None] - outside[None]) + 1) / 2


def _gain(value: float, drawn: np.ndarray, cases: int) -> Gain:
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return Gain(float(value), float(low), float(high), cases)
