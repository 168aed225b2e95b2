"""What a knob may be, however it is spelt: its type, its range, its choices, and whether it may be null."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from .mistakes import Mistake, likely

__all__ = ["CHOICES", "EXAMPLES", "MOVED", "RANGES", "RENAMED", "Range", "is_expression", "is_knob", "read"]


@dataclass(frozen=True)
class Range:
    """The numbers that a knob may be: finite, and between two ends that belong to it or not."""

    low: float
    high: float = inf
    with_low: bool = True
    with_high: bool = True

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.with_low else value > self.low
        below = value <= self.high if self.with_high else value < self.high
        return above and below and value < inf  # not a number is neither

    def __str__(self) -> str:
        low = f"at least {self.low}" if self.with_low else f"above {self.low}"
        high = f"at most {self.high}" if self.with_high else f"below {self.high}"
        return low if self.high == inf else f"{low} and {high}"


# As YAML spells them: the command line of MONAI hands them over as text.
NULL = ("null", "~", "")
TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}

SWITCHES = ("augment_on_device", "compile")  # auto: where it helps
# What a knob may be, or the entries of its list; case does not count.
CHOICES: dict[str, tuple[Any, ...]] = {
    "modality": ("ct", "mr"),
    "field_of_view": ("none", "scanner", "foreground"),
    "cache": ("auto", "memory", "disk", "none"),
    "flip_axes": (0, 1, 2),
    "precision": ("auto", "bf16", "fp16", "fp32"),
    "parallel": ("ddp", "fsdp", "none"),
    "tasks": ("component", "loss"),
    "stem": ("keep", "strict"),
    "objective": ("distillation", "reconstruction", "both"),
    "mode": ("volumetric", "patch"),
    "task": ("auto", "classification", "regression"),
    "pooling": ("mean", "attention"),
    "features": ("nii.gz", "nii", "npz", "none"),
    "save_dtype": ("float32", "float16"),
    **dict.fromkeys(SWITCHES, ("auto", True, False)),
}
SYNONYMS = {"modality": {"mri": "mr"}, **dict.fromkeys(SWITCHES, TRUTH)}
SHARES = ("affine_prob", "ct_noise_prob", "flip_prob", "hu_warp_prob", "intensity_prob")
FROM_ZERO = (
    *("encoder_learning_rate", "final_learning_rate", "freeze_epochs", "num_figure_volumes", "num_workers"),
    *("warmup_epochs", "weight_decay"),
)
FROM_ONE = (
    *("accumulation_steps", "batch_size", "decoder_embed_dim", "early_stop_patience", "encoder_depth"),
    *("encoder_embed_dim", "encoder_num_heads", "feature_size", "figure_interval", "img_size", "in_chans"),
    *("discriminant_draws", "iterations_per_epoch", "max_epochs", "max_voxels", "monitor_interval", "monitor_volumes"),
    "start_volumes",
    *("num_train_cases", "stem_base_dim", "swin_window_size", "val_interval", "window_batch"),
)
# Every number has one; a list's is that of its entries.
RANGES: dict[str, Range] = {
    **dict.fromkeys(SHARES, Range(0, 1)),
    **dict.fromkeys(("mask_ratio", "overlap", "scaling"), Range(0, 1, with_high=False)),
    **dict.fromkeys(FROM_ZERO, Range(0)),
    **dict.fromkeys(FROM_ONE, Range(1)),
    **dict.fromkeys(("clip_norm", "learning_rate"), Range(0, with_low=False)),
    "lr_decay": Range(0, 1, with_low=False),
    "num_labels": Range(1, 255),  # a label map has bytes
    "patch_size": Range(2, 64),
    "rank_timeout": Range(1, 1_000_000),
    "rotation": Range(0, 180),
    "seed": Range(0, 2**32 - 1),
    "spacing": Range(0.001, 100),  # as of a volume's voxels
    "val_fraction": Range(0, 1, with_low=False, with_high=False),
}
# Of knobs that a config leaves null or computes, what they may be.
PATHS = ("cache_dir", "ckpt_dir", "dataset_dir", "index", "output_dir")
WEIGHTS = ("pretrained",)
RENAMED = {"checkpoint": "pretrained"}  # what an earlier version called them
MOVED = {  # entries that an overlay for an earlier version may name
    "train::flips": "train::turn flips, by flip_prob and flip_axes",
    "train::random_transforms": "train::crop cuts, train::augmentation does the rest",
}
EXAMPLES: dict[str, Any] = {
    **dict.fromkeys(PATHS, "FOLDER"),
    **dict.fromkeys(WEIGHTS, "MODEL.pt"),
    "device": "cpu",
    "final_learning_rate": 0.000001,
    "group_by": "sub-[0-9]+",
    "num_train_cases": 10,
    "spacing": [1.0, 1.0, 1.0],
    "strict_stem": True,
}
# May be null although a config gives them a value.
OPTIONAL = (
    "clip_norm",
    "discriminant_draws",
    "index",
    "iterations_per_epoch",
    "monitor_interval",
    "spacing",
    "start_volumes",
)
# Lists of numbers that may have any length; all others have that of the config's own.
FREE_LENGTH = ("flip_axes",)


def read(name: str, value: Any, default: Any) -> Any:
    """Read a knob as YAML means it, also where it arrives as text, and refuse what it cannot be.

    Args:
        name: of the knob, or of another entry of a config, which may be anything.
        value: what arrived; an expression is left alone.
        default: the config's own value: the knob is of its type.

    Returns:
        The value itself, where it needs no change.

    Raises:
        Mistake: for a value of another type, one that is not among the choices, or out of range.
    """
    if is_expression(value):
        return value
    if isinstance(value, str) and value.lower() in NULL:
        value = None
    if not is_knob(name, default):
        return value
    example = EXAMPLES[name] if default is None or is_expression(default) else default
    if value is None:
        if default is None or name in OPTIONAL:
            return None
        raise Mistake(f"{name} is null but must be {_wanted(name, example)}")
    typed = _typed(name, value, example)
    if typed is None:
        or_null = ", or null" if default is None or name in OPTIONAL else ""
        raise Mistake(f"{name} is {value!r} but must be {_wanted(name, example, value)}{or_null}")
    if name in RANGES:
        _check_range(name, typed)
    return _choose(name, typed) if name in CHOICES else typed


def is_expression(value: Any) -> bool:
    """Tell whether a config's value is a reference, a macro or Python."""
    return isinstance(value, str) and value[:1] in ("$", "@", "%")


def is_knob(name: str, default: Any) -> bool:
    """Tell the plain values of a config from what it is built of."""
    if default is None or is_expression(default):
        return name in EXAMPLES
    return isinstance(default, bool | int | float | str) or _is_numbers(default)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, int | float) for entry in value)


def _wanted(name: str, example: Any, value: Any = None) -> str:
    if isinstance(value, list | tuple) and isinstance(example, list):
        return f"a list like {example}"
    if name in CHOICES and not isinstance(example, list):
        return f"one of {list(CHOICES[name])}"
    return f"of type {type(example).__name__}, for example {example!r}"


def _typed(name: str, value: Any, example: Any) -> Any:
    """Return a value in the type of the example; None where it cannot be."""
    if isinstance(example, bool):
        value = TRUTH.get(str(value).lower(), value)
        return value if isinstance(value, bool) else None
    if isinstance(example, int | float):
        return _number(value, type(example))
    if isinstance(example, list):
        fits = isinstance(value, list | tuple) and (len(value) == len(example) or name in FREE_LENGTH)
        entries = [_number(entry, type(example[0])) for entry in value] if fits else [None]
        if None in entries:
            return None
        return value if isinstance(value, list) and all(map(operator.is_, value, entries)) else entries
    return str(value) if name in (*PATHS, *WEIGHTS) else value  # a folder may be called 2024


def _number(value: Any, kind: type) -> Any:
    """Return a number of that kind, which may be spelt as text (YAML's 1e-4 is); None where it is none."""
    if is_expression(value):  # an entry of a list
        return value
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        return None
    if isinstance(number, bool) or not isinstance(number, int | float):
        return None
    if kind is float or isinstance(number, int):
        return number
    return int(number) if number.is_integer() else None


def _check_range(name: str, value: Any) -> None:
    entries, what = (value, "its entries must be") if isinstance(value, list | tuple) else ([value], "must be")
    if any(not is_expression(entry) and entry not in RANGES[name] for entry in entries):
        raise Mistake(f"{name} is {value} but {what} {RANGES[name]}")


def _choose(name: str, value: Any) -> Any:
    """Return the choice that is meant, or those that a list means."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        chosen = [_choose(name, entry) for entry in value]
        return value if chosen == list(value) else chosen
    word, valid = str(value).lower(), {str(choice).lower(): choice for choice in CHOICES[name]}
    word = str(SYNONYMS.get(name, {}).get(word, word)).lower()
    if word not in valid and not is_expression(value):
        raise Mistake(f"{name} is {value!r} but must be one of {list(CHOICES[name])}{likely(word, valid)}")
    return valid.get(word, value)
