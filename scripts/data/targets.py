"""What a classification or a regression learns of each case: a class or a number of the datalist."""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from ..mistakes import Mistake
from .describing import Case
from .layouts import OWN_KEYS, class_name
from .splitting import case_seed, patient_of

__all__ = ["Targets", "read_targets"]

logger = logging.getLogger(__name__)

FEW = 10  # different numbers that still pass for classes, such as grades


@dataclass(frozen=True)
class Targets:
    """One field of a datalist, and the cases that have it."""

    field: str  # its name
    classes: list[str]  # in order; none where it is a number
    training: list[Case]
    validation: list[Case]
    values: dict[str, float]  # by the case's name: the number, or the place of its class

    @property
    def task(self) -> str:
        """``classification`` or ``regression``."""
        return "classification" if self.classes else "regression"

    @property
    def about(self) -> dict[str, Any]:
        """Tell what is learned, to be kept with the weights."""
        return {"field": self.field, "classes": self.classes}

    @property
    def mean(self) -> float:
        """Of the training cases' numbers; 0 where there are classes."""
        return 0.0 if self.classes else fmean(self._trained())

    @property
    def deviation(self) -> float:
        """Standard deviation of the training cases' numbers, at least a millionth; 1 where there are classes."""
        return 1.0 if self.classes else max(pstdev(self._trained()), 1e-6)

    @property
    def groups(self) -> list[int] | None:
        """The class of each training case, to draw all classes equally often; None of numbers."""
        return [int(value) for value in self._trained()] if self.classes else None

    @property
    def patients(self) -> dict[str, str]:
        """Whose each training case is, by its name; where nobody says so, nobody else's."""
        return {case["case"]: patient_of(case) for case in self.training}

    def few(self, most: int, seed: int = 0) -> list[Case]:
        """Choose so many training cases at most, of each class its share and at least one, by a hash of their names."""
        if len(self.training) <= most:
            return self.training
        names = {case: self.classes[int(value)] for case, value in self.values.items()} if self.classes else {}
        return _most(self.training, names, max(most, len(self.classes)), seed)

    def _trained(self) -> list[float]:
        return [self.values[case["case"]] for case in self.training]


def read_targets(
    folds: Mapping[str, Sequence[Case]],
    field: str,
    task: str = "auto",
    most: int | None = None,
    seed: int = 0,
    like: Mapping[str, Any] | None = None,
) -> Targets:
    """Read what is learned of the cases of both folds off a field of the datalist.

    Cases without it are left out, by name, and so are validation cases of a class that no training case has.

    Args:
        folds: ``training`` and ``validation``, of :func:`prepare_cases`.
        field: its name, such as ``class`` or ``age``.
        task: ``classification``, ``regression``, or ``auto``: a regression if all are numbers, more than ten different.
        most: training cases to keep, if given: of each class its share, chosen by a hash of their names.
        seed: another one keeps others.
        like: ``about`` of the targets that a network has learned already; its field and classes must be the same.

    Raises:
        Mistake: when too few have it, it is text where numbers are needed, there are no two classes in each fold, or
            it is not ``like`` what was learned before.
    """
    if like is not None:
        kind = "classification" if like["classes"] else "regression"
        targets = read_targets(folds, field, kind, most, seed) if field == like["field"] else None
        if targets is None or targets.about != like:
            raise Mistake(
                f"the target is {_shown(targets.about) if targets else field} here, but {_shown(like)} in the network "
                "that goes on: give cases of the same target, with the same classes, or fine-tune a new network"
            )
        return targets
    field = str(field)
    if field in OWN_KEYS:
        raise Mistake(
            f"target {field} has a meaning of its own in a datalist, as have {', '.join(OWN_KEYS)}: give the field "
            "another name. A number under label, where no label map is, is the case's class: --target class"
        )
    kept = {fold: _with_field(cases, field, fold) for fold, cases in folds.items()}
    values = {case["case"]: case[field] for cases in kept.values() for case in cases}
    numbers = {case: number for case, value in values.items() if (number := _number(value)) is not None}
    is_numeric = len(numbers) == len(values) and len(set(numbers.values())) > FEW
    if task == "regression" or (task == "auto" and is_numeric):
        if text := [f"{value!r} of {case}" for case, value in values.items() if case not in numbers]:
            raise Mistake(
                f"target {field} is no number for {len(text)} of {len(values)} cases, such as {text[0]}: a regression "
                "needs numbers, --task classification takes names"
            )
        targets = Targets(field, [], _most(kept["training"], {}, most, seed), kept["validation"], numbers)
        low, high = min(numbers.values()), max(numbers.values())
        logger.info("%s is a number, from %g to %g: a regression", field, low, high)
        return targets
    return _classification(kept, field, {case: class_name(value) for case, value in values.items()}, task, most, seed)


def _classification(
    kept: Mapping[str, list[Case]], field: str, names: Mapping[str, str], task: str, most: int | None, seed: int
) -> Targets:
    training = _most(kept["training"], names, most, seed)
    counts = Counter(names[case["case"]] for case in training)
    classes = sorted(counts, key=_in_order)
    if len(classes) < 2:
        raise Mistake(f"all {len(training)} training cases have the same {field}, {classes[0]}: two classes are needed")
    if task == "auto" and len(classes) > max(FEW, len(training) // 2):
        some = ", ".join(classes[:3])
        raise Mistake(
            f"target {field} has {len(classes)} different values in {len(training)} training cases ({some}, …), not "
            "all of them numbers: mend them, or choose --task classification"
        )
    logger.info("%s is one of %d classes: %s", field, len(classes), ", ".join(f"{c} ({counts[c]})" for c in classes))
    if single := [name for name in classes if counts[name] == 1]:
        logger.warning("only one training case each has %s %s: little can be learned of them", field, ", ".join(single))
    known = [case for case in kept["validation"] if names[case["case"]] in counts]
    _log_left_out(kept["validation"], known, f"their {field} is that of no training case")
    if len({names[case["case"]] for case in known}) < 2:
        raise Mistake(
            f"the {len(known)} validation cases have no two classes of {field}, which scores need: choose another "
            "--val_fraction, or name validation cases in the datalist"
        )
    places = {case: float(classes.index(name)) for case, name in names.items() if name in counts}
    return Targets(field, classes, training, known, places)


def _shown(about: Mapping[str, Any]) -> str:
    return f"{about['field']} ({', '.join(about['classes']) or 'a number'})"


def _with_field(cases: Sequence[Case], field: str, fold: str) -> list[Case]:
    kept = [case for case in cases if field in case]
    if not kept:
        there = sorted({key for case in cases for key in case} - {"image", "case", "label"})
        raise Mistake(
            f"none of the {len(cases)} {fold} cases has a {field}: --target names a field of the datalist"
            + (f", which has {', '.join(there)}" if there else "")
        )
    _log_left_out(cases, kept, f"they have no {field}")
    return kept


def _log_left_out(cases: Sequence[Case], kept: Sequence[Case], why: str) -> None:
    if names := sorted({case["case"] for case in cases} - {case["case"] for case in kept}):
        logger.warning("left out %d of %d cases, as %s: %s", len(names), len(cases), why, ", ".join(names))


def _most(cases: list[Case], names: Mapping[str, str], most: int | None, seed: int) -> list[Case]:
    """Keep some of the cases, of each class its share and at least one; the same ones, whatever their order."""
    if most is None:
        return cases
    groups: dict[str | None, list[Case]] = {}
    for case in sorted(cases, key=lambda case: case_seed(case["case"], seed)):
        groups.setdefault(names.get(case["case"]), []).append(case)
    if not len(groups) <= most <= len(cases):
        raise Mistake(f"num_train_cases is {most} but must be from {len(groups)} to {len(cases)}, the cases there are")
    places = [(rank > 0, (rank + 0.5) / len(group), case["case"], case)
              for group in groups.values() for rank, case in enumerate(group)]  # fmt: skip
    return [case for *_, case in sorted(places, key=lambda place: place[:3])[:most]]


def _number(value: Any) -> float | None:
    """Read a finite number, which may be spelt as text; None where it is none."""
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _in_order(name: str) -> tuple[bool, float, str]:
    """Sort numbers by their size, before names by the alphabet."""
    number = _number(name)
    return number is None, number or 0.0, name
