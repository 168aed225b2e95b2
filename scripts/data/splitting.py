"""Split cases into those to train on and those to validate on, and never a patient."""

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence

from ..mistakes import Mistake
from .describing import Case

__all__ = ["case_seed", "group_cases", "patient_of", "split_cases", "split_summary", "warn_of_shared_patients"]

logger = logging.getLogger(__name__)


def split_cases(cases: Sequence[Case], val_fraction: float) -> dict[str, list[Case]]:
    """Split by a hash of the ``patient``, where it is known, else of the case name.

    So it is stable when cases are added, the same on every machine and rank, and no patient is on both sides.

    Args:
        cases: in any order, which stays.
        val_fraction: in (0, 1), the expected share of validation patients; each side gets at least one.

    Raises:
        Mistake: for another ``val_fraction``, or when there are fewer than two cases or patients.
    """
    if not 0 < val_fraction < 1:
        raise Mistake(f"val_fraction {val_fraction} must lie between 0 and 1, for example 0.2")
    if len(cases) < 2:
        names = ", ".join(case["case"] for case in cases)
        raise Mistake(f"one volume to train on and one to validate on are needed, there is only: {names}")
    places = {patient_of(case): _hash(patient_of(case)) / 2**64 for case in cases}
    if len(places) < 2:
        raise Mistake(
            f"all {len(cases)} volumes are of one patient, {patient_of(cases[0])}, and no patient is both trained and "
            "validated on: add others, or say by --group_by which part of a case's name is the patient"
        )
    ranked = sorted(places, key=places.__getitem__)
    validation = ({name for name in ranked if places[name] < val_fraction} or {ranked[0]}) - {ranked[-1]}
    return {
        "training": [case for case in cases if patient_of(case) not in validation],
        "validation": [case for case in cases if patient_of(case) in validation],
    }


def split_summary(folds: Mapping[str, Sequence[Case]]) -> str:
    """Tell how many volumes each fold has, and a hash of their names: alike for the same split of the same volumes."""
    counts = ", ".join(f"{len(cases)} for {fold}" for fold, cases in folds.items())
    names = sorted((fold, str(case.get("case", case.get("image")))) for fold, cases in folds.items() for case in cases)
    return f"{counts} (names {hashlib.sha256(repr(names).encode()).hexdigest()[:8]})"


def group_cases(cases: Sequence[Case], group_by: str) -> list[Case]:
    """Read the ``patient`` of each case off its name, in place of what is known of it.

    Args:
        cases: to be copied.
        group_by: a regular expression that is searched in the name. Its first group is the patient, or all it matches.

    Raises:
        Mistake: when it is no regular expression, or finds nothing in a name.
    """
    try:
        pattern = re.compile(str(group_by))
    except re.error as error:
        raise Mistake(f"group_by {group_by!r} is no regular expression: {error}") from error
    grouped, without = [], []
    for case in cases:
        match = pattern.search(case["case"])
        patient = match and match[1 if pattern.groups else 0]
        grouped.append({**case, "patient": patient})
        without += [] if patient else [case["case"]]
    if without:
        names = ", ".join(without[:5])
        raise Mistake(f"group_by {group_by!r} finds no patient in the names of {len(without)} cases, such as {names}")
    return grouped


def warn_of_shared_patients(folds: Mapping[str, Sequence[Case]]) -> None:
    """Name the patients that lists of the user's own have on both sides."""
    trained, validated = ({case.get("patient") for case in folds[fold]} for fold in ("training", "validation"))
    if shared := sorted((trained & validated) - {None}):
        names = ", ".join(shared[:5])
        logger.warning("%d patients are both trained and validated on, as the lists have it: %s", len(shared), names)


def case_seed(case: str, seed: int) -> int:
    """Derive a seed from a case's name and the run's: for what must be the same for a case every time."""
    return _hash(f"{seed}/{case}") >> 1  # fits a signed 64-bit integer


def patient_of(case: Case) -> str:
    """Tell whose a case is; where nobody says so, nobody else's."""
    return case.get("patient") or case["case"]


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
