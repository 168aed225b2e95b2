"""What a plan says to its reader."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser

from ...data import geometry_in_ras, prepared_bytes
from ...networks import BertsWinMAE
from .choices import Settings
from .cohort import Cohort
from .trial import Trial, places

__all__ = ["costs", "findings"]

NEARLY_EMPTY = 0.9  # share of padding, from which on a volume is worth a look
ODD = 2.0  # times the median, from which on a spacing or a field of view is worth a look


def findings(cohort: Cohort) -> list[str]:
    """Say what was found in the cohort, and which volumes are worth a look."""
    cases, problems, kept, facts = cohort.cases, cohort.problems, cohort.kept, cohort.facts
    names, patients = {case["case"] for case in kept}, {case["patient"] for case in kept if "patient" in case}
    of_patients = f", of {len(patients)} patients" if patients else ""
    left_out = {case["case"]: problem for case, problem in zip(cases, problems, strict=True) if problem}
    left_out |= {
        name: "its voxels are those of another" for c in cases if (name := c["case"]) not in names | left_out.keys()
    }
    lines = [f"{len(cases)} volumes, of which {len(kept)} can be used{of_patients}", *_listing("left out", left_out)]
    geometry = [geometry_in_ras(one) for one in facts]
    measured = {
        "spacing": [sides for _, sides in geometry],
        "field of view": [shape * sides for shape, sides in geometry],
    }
    for what, values in measured.items():
        usual, low, high = (reduce(values, axis=0) for reduce in (np.median, np.min, np.max))
        lines.append(f"{what}: {_sides(usual)} mm in the median, {_sides(low)} to {_sides(high)}")
        odd = np.exp(np.abs(np.log(values / usual)).max(axis=1)) > ODD
        about = {
            case["case"]: f"{_sides(own)} mm" for case, own, is_odd in zip(kept, values, odd, strict=True) if is_odd
        }
        lines += _listing("worth a look", about)
    empty = {
        case["case"]: f"{share:.0%} of it are {value}"
        for case, one in zip(kept, facts, strict=True)
        for value, share in one["channels"][0]["padding"].items()
        if share > NEARLY_EMPTY
    }
    return lines + _listing("worth a look", empty)


def costs(settings: Settings, trial: Trial, cohort: Cohort) -> list[str]:
    """Say how long the training takes, and what it needs."""
    value = {name: value for name, (value, _) in settings.items()}
    sizes = sorted(prepared_bytes(cohort.facts, value["spacing"], value["img_size"]))
    rest = sum(sizes) - sum(sizes[place] for place in places(len(sizes)))
    iterations, validated = value["iterations_per_epoch"], len(cohort.folds["validation"])
    epoch = iterations * trial.seconds_per_iteration + validated * trial.seconds_per_validation
    epochs = ConfigParser(value | {"recipe": "pretraining"}).get_parsed_content("max_epochs")
    hours = epoch * epochs / 3600
    memory = trial.memory + (rest if value["cache"] == "memory" else 0)
    weights = 4 * 3 * sum(parameter.numel() for parameter in _network(value).parameters())
    disk = 2 * weights + (sum(sizes) if value["cache"] == "disk" else 0)
    unseen = ", and the volumes that the short training did not load" if rest else ""
    gpu = "" if trial.device_memory is None else f", of the GPU {trial.device_memory / 1e9:.2g} GB"
    return [
        "",
        *(f"{name}: {json.dumps(value)}  ({why})" for name, (value, why) in settings.items()),
        "",
        f"an epoch: {epoch:.3g} s ({iterations} iterations of {trial.seconds_per_iteration:.3g} s and {validated} "
        f"validation volumes of {trial.seconds_per_validation:.2g} s, measured by a short training)",
        f"the training: {hours:.2g} hours for {epochs} epochs, unless it stops early",
        f"memory: {memory / 1e9:.3g} GB (measured{unseen}){gpu}",
        f"disk: {disk / 1e9:.2g} GB (two training states{', and the cache' if value['cache'] == 'disk' else ''})",
    ]


def _listing(title: str, about: Mapping[str, str], most: int = 10) -> list[str]:
    lines = [f"  {title}: {name}: {what}" for name, what in about.items()]
    return lines[:most] + ([f"  … and {len(lines) - most} more"] if len(lines) > most else [])


def _network(value: Mapping[str, Any]) -> torch.nn.Module:
    names = ("img_size", "patch_size", "encoder_embed_dim", "swin_window_size", "decoder_embed_dim")
    depths = {"encoder_depths": [value["encoder_depth"]], "encoder_num_heads": [value["encoder_num_heads"]]}
    with torch.device("meta"):
        return BertsWinMAE(**{name: value[name] for name in names}, in_chans=value.get("in_chans", 1), **depths)


def _sides(values: np.ndarray) -> str:
    return " x ".join(f"{value:.3g}" for value in values)
