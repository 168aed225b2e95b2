"""Check that volumes and label maps can be used, before anything is trained."""

import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
from tqdm import tqdm

from .. import parallel
from ..mistakes import Mistake, reason
from ..weights import is_usual, usual_spacing
from .describing import PERCENTILES, Case, describe_volume
from .index import Index
from .reading import read_label, read_volume

__all__ = ["Facts", "case_problem", "check_cases", "check_labels", "facts_problem", "geometry_in_ras"]
__all__ += ["resampled_shape", "volume_problem", "without_copies"]

logger = logging.getLogger(__name__)

Facts = Mapping[str, Any]  # of describe_volume

CT_NEEDS_BELOW_HU = -200  # a CT has air (-1000 HU), or at least lung or gut gas; else it is on another scale
CT_NEEDS_ABOVE_HU = -500  # below there is air, and nothing to learn from
CT_AIR_HU = (-1100, -900)  # what surrounds a body that was cut out
CT_TISSUE_BELOW_HU = 600  # nine tenths of a body's voxels are below
PLAUSIBLE_MM = (1e-3, 100.0)  # beyond any microscope's and any scanner's voxels: the header has another unit, or none
MOST_VOXELS = 2**31  # beyond, sampling grids overflow, and few machines hold the volume as float32
EQUAL_NEIGHBOURS = 0.5  # share of the neighbours in a label map that are equal; up to 0.13 in images of 8 bits
MIN_CONTRAST = 0.1  # share of the intensity window that padding must leave to the rest


def check_cases(
    cases: Sequence[Case],
    modality: str,
    in_chans: int = 1,
    skip_invalid: bool = False,
    spacing: Sequence[float] | None = None,
    index: Index | None = None,
    weights: str | Path | None = None,
) -> list[Case]:
    """Look at every volume once, before training, and return the cases that can be used.

    Args:
        cases: from :func:`find_cases`.
        modality: ``ct`` (Hounsfield units) or ``mr``.
        in_chans: channels a volume must have.
        skip_invalid: leave out volumes that cannot be used, instead of ending the run.
        spacing: mm that volumes will be resampled to, if at all: what would not fit in memory then is refused.
        index: that knows the volumes; without one, all are read now.
        weights: that they must fit, if those take voxels as they are; see ``usual`` of :func:`facts_problem`.

    Raises:
        Mistake: naming each volume that cannot be used, and why, unless ``skip_invalid``; or when none is left.
    """
    described = (index or Index(None)).describe(cases)
    arguments = (modality, in_chans, spacing, MOST_VOXELS, usual_spacing(weights))
    problems = [case_problem(case, facts, *arguments) for case, facts in zip(cases, described, strict=True)]
    found = {_name(case): problem for case, problem in zip(cases, problems, strict=True) if problem}
    if found and not skip_invalid:
        raise Mistake(
            f"{len(found)} of {len(cases)} volumes cannot be used with modality {modality}:{_listing(found)}\n"
            "Mend or remove them, or leave them out with --skip_invalid true."
        )
    for path, problem in found.items():
        logger.warning("left out %s: %s", path, problem)
    if len(found) == len(cases):
        raise Mistake(f"none of the {len(cases)} volumes can be used with modality {modality}")
    usable = [(case, facts) for case, facts, problem in zip(cases, described, problems, strict=True) if not problem]
    for case, note in ((case, note) for case, facts in usable for note in facts["notes"]):
        logger.warning("%s: %s", _name(case), note)
    return [case for case, _ in usable]


def check_labels(cases: list[Case], num_labels: int, num_threads: int = 4) -> list[Case]:
    """Read every label map once, with labels from 0 to ``num_labels``, and return the cases.

    Raises:
        Mistake: naming each label map that cannot be used, and why.
    """
    mine, no_bar = cases[idist.get_rank() :: idist.get_world_size()], not parallel.shows_progress()
    with ThreadPoolExecutor(max(1, num_threads)) as threads:
        checks = threads.map(lambda case: _label_problem(case, num_labels), mine)
        bar = tqdm(checks, total=len(mine), desc="checking labels", unit="label", leave=False, disable=no_bar)
        found = {case["label"]: problem for case, problem in zip(mine, bar, strict=True) if problem}
    found = {path: problem for part in idist.all_gather(found) for path, problem in part.items()}
    if found:
        in_order = {case["label"]: found[case["label"]] for case in cases if case["label"] in found}
        raise Mistake(f"{len(found)} of {len(cases)} label maps cannot be used:{_listing(in_order)}")
    return cases


def without_copies(cases: Sequence[Case], described: Sequence[Facts]) -> list[Case]:
    """Keep one case of those whose voxels are the same, by what is known of each: one with a label, else the first."""
    kept: dict[str, Case] = {}
    for case, facts in zip(cases, described, strict=True):
        first = kept.setdefault(facts["hash"], case)
        if first is not case:
            keep, drop = (case, first) if "label" in case and "label" not in first else (first, case)
            kept[facts["hash"]] = keep
            logger.warning("left out %s: its voxels are those of %s", _name(drop), _name(keep))
    names = {case["case"] for case in kept.values()}
    return [case for case in cases if case["case"] in names]


def _name(case: Case) -> str:
    image = case["image"]
    return image if isinstance(image, str) else f"{image[0]} and {len(image) - 1} more"


def _listing(problems: dict[str, str]) -> str:
    return "".join(f"\n  {path}: {problem}" for path, problem in problems.items())


def case_problem(case: Case, facts: Facts, modality: str, *arguments: Any) -> str | None:
    """Say why a case cannot be used, by its DICOM header or as :func:`facts_problem`, whose arguments these are."""
    if (scanner := case.get("modality")) and scanner.lower() != modality:
        return f"is {scanner} by its header, where modality is {modality}"
    return facts_problem(facts, modality, *arguments)


def volume_problem(path: str | Path | Sequence[str], *arguments: Any, **more: Any) -> str | None:
    """Read a volume and say why it cannot be used, or None; the other arguments are those of :func:`facts_problem`."""
    return facts_problem(describe_volume({"image": path}), *arguments, **more)


def facts_problem(
    facts: Facts,
    modality: str,
    in_chans: int = 1,
    spacing: Sequence[float] | None = None,
    max_voxels: float = MOST_VOXELS,
    usual: Facts | None = None,
) -> str | None:
    """Say why a volume cannot be used, by its facts of :func:`describe_volume`, or None.

    Args:
        facts: of the volume.
        modality: ``ct`` (Hounsfield units) or ``mr``.
        in_chans: channels it must have.
        spacing: mm that it will be resampled to, if at all.
        max_voxels: that it may have then, all channels together.
        usual: :func:`~bertswin_mae.weights.usual_spacing` of a network that takes voxels as they are.
    """
    if problem := facts.get("problem"):
        return problem
    sides, (low, high) = np.array(facts["spacing"]), PLAUSIBLE_MM
    if sides.min() < low or sides.max() > high:
        has = " x ".join(f"{side:g}" for side in sides)
        return f"has voxels of {has} mm, where {low:g} to {high:g} mm are plausible"
    channels, *shape = facts["shape"]
    if channels != in_chans:
        return f"has {channels} channels (or times) of {tuple(shape)} where in_chans is {in_chans}"
    if min(shape) == 0:
        return f"holds no voxel (shape {tuple(shape)})"
    if min(shape) == 1:
        return f"is a single slice of shape {tuple(shape)}, where a volume is needed"
    if problem := next(filter(None, (_channel_problem(channel, modality) for channel in facts["channels"])), None):
        return problem
    if usual and spacing is None and (problem := _spacing_problem(facts, usual)):
        return problem
    resampled = resampled_shape(facts, spacing)
    if (voxels := channels * resampled.prod()) > max_voxels:
        where = f"at a spacing of {list(spacing)} mm" if spacing else "at its own spacing"
        return (
            f"would have {voxels:.2g} voxels {where}, more than {max_voxels:.2g}: choose a larger --spacing, or crop it"
        )
    return None


def resampled_shape(facts: Facts, spacing: Sequence[float] | None) -> np.ndarray:
    """Tell what shape ``(D, H, W)`` a volume will have, in RAS, at a spacing in mm; None: that of its own voxels."""
    shape, sides = geometry_in_ras(facts)
    return shape if spacing is None else np.ceil((shape * sides / np.array(spacing)).round(3))


def geometry_in_ras(facts: Facts) -> tuple[np.ndarray, np.ndarray]:
    """Tell the shape ``(D, H, W)`` and the spacing in mm of a volume, once its axes are in the order of RAS."""
    order = sorted(range(3), key=lambda axis: "RLAPSI".index(facts["axes"][axis]))
    return np.array(facts["shape"][1:], dtype=float)[order], np.array(facts["spacing"])[order]


def _spacing_problem(facts: Facts, usual: Facts) -> str | None:
    sides = geometry_in_ras(facts)[1]
    if is_usual(sides, usual):
        return None
    has, seen = (" x ".join(f"{side:.3g}" for side in values) for values in (sides, usual["median"]))
    advice = f"resample it, by --spacing {json.dumps(usual['median'])}"
    return f"has voxels of {has} mm, where the weights were trained on {seen} mm: {advice}"


def _label_problem(case: Case, num_labels: int) -> str | None:
    """Say why the label map of a case cannot be used, with labels from 0 to ``num_labels``, or None."""
    try:
        label = read_label(case["label"], read_volume(case["image"]))
    except Exception as error:
        return str(error) if isinstance(error, Mistake) else f"cannot be read ({reason(error)})"
    found = np.unique(label.as_tensor().numpy()).astype(int).tolist()
    if found[0] >= 0 and found[-1] <= num_labels:
        return None
    values = f"holds the values {', '.join(map(str, found[:8]))}{', …' if len(found) > 8 else ''}"
    if found[0] < 0:
        return f"{values}: what is not to be learnt must be background, 0, as no label can be negative"
    if len(found) <= num_labels + 1 and found[-1] > 32:
        return f"{values} where 0 to {num_labels} are expected: number its structures from 1 on, without gaps"
    return f"{values} where 0 to {num_labels} are expected: say by --num_labels how many there are"


def _channel_problem(facts: Facts, modality: str) -> str | None:
    if bad := facts["not_finite"]:
        return f"has {bad} voxels that are NaN or infinite, as float32"
    if facts["min"] == facts["max"]:
        return f"is constant: every voxel is {facts['min']:g}"
    if modality == "ct" and (problem := _hounsfield_problem(facts)):
        return problem
    # Beside padding, as an MR may be padded with such a value too.
    if modality == "mr" and _is_air(facts["seen"][1]) and facts["seen"][-2] < CT_TISSUE_BELOW_HU:
        what = f"is a CT by its values (air at {facts['seen'][1]:.0f} HU), where modality is mr"
        return f"{what}: use --modality ct, and weights of CT"
    if values := facts.get("values"):
        return f"looks like a label map: its only values are {', '.join(f'{value:g}' for value in values)}"
    if (equal := facts.get("equal", 0)) >= EQUAL_NEIGHBOURS:
        return f"looks like a label map: its values are whole numbers, and {equal:.0%} of neighbours are equal"
    low, high = facts["percentiles"][0], facts["percentiles"][-1]
    if modality == "mr" and low == high:
        return f"is almost empty: {PERCENTILES[-1]} % of its voxels are {low:g}; crop it to what it shows"
    contrast = (facts["seen"][-1] - facts["seen"][0]) / (high - low) if high > low else 1.0
    if modality == "mr" and contrast < MIN_CONTRAST:
        padding = " and ".join(f"{float(value):g} in {share:.0%} of it" for value, share in facts["padding"].items())
        return f"keeps {contrast:.1%} of its contrast beside padding ({padding}): set that to the scan's lowest value"
    return None


def _is_air(value: float) -> bool:
    return CT_AIR_HU[0] <= value <= CT_AIR_HU[1]


def _hounsfield_problem(facts: Facts) -> str | None:
    lowest, highest, spread = facts["lowest"], facts["max"], f"the range is {facts['min']:g} to {facts['max']:g}"
    if highest < CT_NEEDS_ABOVE_HU:
        return f"holds nothing but air: no voxel is above {CT_NEEDS_ABOVE_HU} HU, {spread}"
    # Padding is no air. But where a body was cut out, what is around it stands for air, and the body is at 0 HU.
    cut_out = _is_air(facts["min"]) and facts["seen"][-2] < CT_TISSUE_BELOW_HU
    if lowest <= CT_NEEDS_BELOW_HU or cut_out:
        return None
    needs = f"no voxel{' but padding' if lowest > facts['min'] else ''} is below {CT_NEEDS_BELOW_HU} HU (air is -1000)"
    return f"is not in Hounsfield units: {needs}, {spread}; apply the file's intercept, or for MR use --modality mr"
