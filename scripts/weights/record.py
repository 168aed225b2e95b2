"""What weights carry with them: their network, preprocessing and origin, as JSON beside the file or in its head.

``network`` and ``preprocessing`` are knobs of the configs, by name. Whatever is missing is not known.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..knobs import is_expression, read
from ..mistakes import Mistake
from . import checkpoints

__all__ = ["CARRIED", "carried_knobs", "is_usual", "read_record", "recorded", "sha256", "usual_spacing", "write_record"]

NETWORK = (
    *("img_size", "patch_size", "in_chans", "encoder_embed_dim", "encoder_depth", "encoder_num_heads"),
    *("swin_window_size", "stem_base_dim", "strict_stem", "blockwise_norm", "decoder_embed_dim"),
)
HEAD = ("num_labels", "feature_size", "pooling")  # of what was fine-tuned with the weights
CARRIED = (*NETWORK, *HEAD, "modality", "spacing")
MAY_DIFFER = ("img_size", "blockwise_norm")  # the weights fit all the same
MOST_OFF = 1.5  # how many times larger or smaller than in training a voxel may be, along each axis
# What intensities may be scaled by: a record may come from anywhere, and a config can run code.
INTENSITY = (
    *("ScaleIntensityRanged", "ScaleIntensityRangePercentilesd", "ScaleIntensityd", "NormalizeIntensityd"),
    *("ClipIntensityPercentilesd", "ThresholdIntensityd"),
)


def read_record(weights: str | Path | None) -> dict[str, Any]:
    """Read what a file of weights carries; empty where that is nothing, or another tool's."""
    if weights is None:
        return {}
    path = Path(weights)
    if path.suffix == checkpoints.SAFETENSORS:
        text = checkpoints.read_head(path).get("record", "{}") if path.is_file() else "{}"
    else:
        beside = path.with_suffix(".json") if path.name else path  # a folder, such as ".", has no name
        text = beside.read_text(encoding="utf-8") if beside.is_file() else "{}"
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise Mistake(f"the record of {weights} is damaged ({error}): copy it again") from error
    return content if isinstance(content, dict) else {}


def write_record(record: Mapping[str, Any], weights: str | Path) -> None:
    """Write a record beside a file of weights, whole or not at all."""
    checkpoints.save_text(json.dumps(record, indent=1) + "\n", Path(weights).with_suffix(".json"))


def recorded(record: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Take a part of a record, such as ``preprocessing``; empty where it is not known."""
    value = record.get(part)
    return value if isinstance(value, dict) else {}


def usual_spacing(weights: str | Path | None) -> dict[str, list[float]]:
    """Tell the ``low``, ``median`` and ``high`` spacing, mm along each axis in RAS, of what some weights have seen.

    Empty where that is not known.
    """
    usual = recorded(recorded(read_record(weights), "preprocessing"), "cohort_spacing")
    sides = [usual.get(name) for name in ("low", "median", "high")]
    known = all(isinstance(side, list) and [type(number) for number in side] == [float] * 3 for side in sides)
    return usual if known else {}


def is_usual(spacing: Iterable[float], usual: Mapping[str, Sequence[float]]) -> bool:
    """Tell whether voxels, in mm along each axis, are at most ``MOST_OFF`` times off the ``low`` and ``high`` ones."""
    sides = zip(spacing, usual["low"], usual["high"], strict=True)
    return all(low / MOST_OFF <= side <= high * MOST_OFF for side, low, high in sides)


def carried_knobs(
    weights: str | Path | None,
    config: Mapping[str, Any],
    own: Mapping[str, Any],
    chosen: Collection[str] = (),
    with_head: bool = False,
) -> dict[str, Any]:
    """Tell which entries of a config must change so that it fits weights that were trained elsewhere.

    Args:
        weights: a file, or None.
        config: entries by name, as they are now.
        own: the same as the config's author wrote them: what differs was chosen by the user.
        chosen: names that the user gave too, whatever their value.
        with_head: weights and config are of one and the same task: its head is carried too.

    Raises:
        Mistake: when the user chose what contradicts the weights, or the record holds what no config may.
    """
    preprocessing = recorded(record := read_record(weights), "preprocessing")
    network = recorded(record, "network")
    theirs = {name: network[name] for name in (*NETWORK, *(HEAD if with_head else ())) if name in network}
    theirs |= {name: preprocessing[name] for name in ("modality", "spacing") if name in preprocessing}
    theirs = {name: _checked(name, value, own[name], weights) for name, value in theirs.items() if name in own}
    changes = {}
    for name, value in theirs.items():
        ours = list(config[name]) if isinstance(config[name], tuple) else config[name]
        if name not in chosen and ours == own[name]:
            changes |= {name: value} if ours != value else {}
        elif not _fits(name, ours, value, weights):
            raise Mistake(_contradiction(name, ours, value, weights))
    block = recorded(preprocessing, "intensity")
    if block and "modality" in theirs and "intensities" in own:
        changes |= _carried_intensity(block, theirs["modality"], config, own, weights)
    return changes


def _contradiction(name: str, ours: Any, theirs: Any, weights: str | Path) -> str:
    shown = theirs if isinstance(theirs, str) else json.dumps(theirs)
    advice = f"or give weights of {ours}"
    if name == "spacing":
        seen = theirs or usual_spacing(weights)["median"]
        shown += "" if theirs else f", on voxels of {seen} mm"
        advice = f"or stay within {MOST_OFF} times of {seen} mm"
    return (
        f"{name} is {'null' if ours is None else ours}, but {weights} was trained with {shown}: leave {name} out of "
        f"the command line and of overlays, as the weights carry it, {advice}"
    )


def _fits(name: str, ours: Any, theirs: Any, weights: str | Path) -> bool:
    """Tell whether a knob that the user chose goes with the weights."""
    if name != "spacing" or ours is None:
        return ours == theirs or name in MAY_DIFFER
    usual = dict.fromkeys(("low", "high"), theirs) if theirs else usual_spacing(weights)
    return not usual or is_usual(ours, usual)


def _carried_intensity(
    block: dict[str, Any], modality: str, config: Mapping[str, Any], own: Mapping[str, Any], weights: str | Path
) -> dict[str, Any]:
    _check_plain(block, weights)
    ours = config["intensities"].get(modality, {})
    if all(ours.get(name, value) == value for name, value in block.items()):
        return {}
    if ours != own["intensities"].get(modality, {}):
        raise Mistake(
            f"intensities::{modality} is not what {weights} was trained with: leave it out of overlays, as the weights "
            "carry it"
        )
    return {"intensities": {**config["intensities"], modality: ours | block}}


def _checked(name: str, value: Any, own: Any, weights: str | Path) -> Any:
    try:
        _check_plain(value, weights)
        return read(name, value, own)
    except Mistake as error:
        raise Mistake(f"the record of {weights} cannot be used: {error}") from error


def _check_plain(value: Any, weights: str | Path) -> None:
    """Refuse what a config would run."""
    if isinstance(value, dict):
        wrong = [key for key in value if str(key).startswith("_") and key != "_target_"]
        if wrong or value.get("_target_", INTENSITY[0]) not in INTENSITY:
            raise Mistake(f"{weights} asks for {value.get('_target_', wrong)}, which is no scaling of intensities")
    elif is_expression(value):
        raise Mistake(f"{weights} asks for {value!r}, which could run code")
    for entry in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_plain(entry, weights)


def sha256(path: str | Path) -> str:
    """Hash a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
