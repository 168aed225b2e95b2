"""What lies in a folder: the volumes that can be used, and what they have in common."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...data import Case, Facts, Index, case_problem, divide, find_cases, without_copies
from ...mistakes import Mistake

__all__ = ["Cohort", "cohort_modality", "look_at"]


@dataclass(frozen=True)
class Cohort:
    """The volumes of a dataset, and what is known of them."""

    cases: list[Case]
    problems: list[str | None]  # of each of them
    modality: str
    channels: int
    kept: list[Case]  # those that can be used, each volume once
    facts: list[Facts]  # of each of those
    folds: dict[str, list[Case]]  # the same, as training divides them
    complete: bool  # whether no case lacks a channel


def look_at(
    dataset_dir: str | Path,
    index: Index,
    val_fraction: float,
    contrasts: str | Sequence[str] | None = None,
    group_by: str | None = None,
) -> Cohort:
    """Find and describe the volumes of a dataset; arguments as of :func:`~bertswin_mae.data.prepare_cases`."""
    folds = find_cases(dataset_dir, contrasts, skip_invalid=True, index=index, group_by=group_by)
    complete = _is_complete(dataset_dir, contrasts, index)
    cases = [case for fold in folds.values() for case in fold]
    described = index.describe(cases)
    modality = cohort_modality(cases, described)
    channels = Counter(facts["shape"][0] for facts in described if "shape" in facts).most_common(1)[0][0]
    pairs = zip(cases, described, strict=True)
    problems = [case_problem(case, facts, modality, channels) for case, facts in pairs]
    usable = [(case, facts) for case, facts, problem in zip(cases, described, problems, strict=True) if not problem]
    if not usable:
        raise Mistake(f"none of the {len(cases)} volumes can be used, the first one, {cases[0]['case']}: {problems[0]}")
    kept = without_copies(*zip(*usable, strict=True))
    names = {case["case"] for case in kept}
    facts = [facts for case, facts in usable if case["case"] in names]
    folds = divide(folds, kept, val_fraction)
    return Cohort(cases, problems, modality, channels, kept, facts, folds, complete)


def _is_complete(dataset_dir: str | Path, contrasts: str | Sequence[str] | None, index: Index) -> bool:
    try:
        find_cases(dataset_dir, contrasts, index=index)
    except Mistake:
        return False
    return True


def cohort_modality(cases: Sequence[Case], described: Sequence[Facts]) -> str:
    """Tell whether all volumes are ``ct`` or ``mr``, by DICOM headers where there are any, else by their values.

    Raises:
        Mistake: when there are both, with names of each; or when no volume can be read.
    """
    found: dict[str, list[str]] = {"ct": [], "mr": []}
    problems = []
    for case, facts in zip(cases, described, strict=True):
        # What can be used as neither has no vote; nor has what its header calls neither.
        wrong = {kind: case_problem(case, facts, kind, *facts.get("shape", [1])[:1]) for kind in ("ct", "mr")}
        if not (wrong["ct"] and wrong["mr"]):
            found["mr" if wrong["ct"] else "ct"].append(case["case"])
        problems.append(f"\n  {case['case']}: {wrong['mr']}")
    if not found["ct"] and not found["mr"]:
        raise Mistake(f"none of the {len(cases)} volumes can be used:{''.join(problems[:5])}")
    if found["ct"] and found["mr"]:
        lists = " and ".join(
            f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
            for kind, names in found.items()
        )
        raise Mistake(f"the volumes are {lists}: one network learns one of them, so give each a folder or a datalist")
    return "ct" if found["ct"] else "mr"
