"""What makes ``python -m monai.bundle run`` kind: knobs are checked, mistakes end without a traceback."""

import difflib
import errno
import inspect
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS

from . import parallel
from .handlers import TRAINING_STATE, end_when_preempted
from .mistakes import Mistake, causes, reason
from .weights import bundle_root

__all__ = ["check_knobs", "check_run", "check_workflow", "show_mistakes"]

T = TypeVar("T")

# The configs of each recipe. Their top-level names are the knobs, the types of their plain values the valid types.
RECIPES = {
    "inference": ("inference.json",),
    "pretraining": ("train.yaml",),
    "conductor": ("train.yaml", "train_conductor.yaml"),
    "stem_tuning": ("train.yaml", "tune_stem.yaml"),
    "segmentation": ("train.yaml", "finetune_segmentation.yaml"),
    "probe": ("train.yaml", "probe.yaml"),
}
# What a knob may be, or the entries of its list.
CHOICES: dict[str, tuple[Any, ...]] = {
    "modality": ("ct", "mr"),
    "field_of_view": ("none", "scanner", "foreground"),
    "cache": ("memory", "disk", "none"),
    "flip_axes": (0, 1, 2),
    "precision": ("auto", "bf16", "fp16", "fp32"),
    "parallel": ("ddp", "fsdp", "none"),
    "tasks": ("component", "loss"),
    "stem": ("keep", "strict"),
    "objective": ("distillation", "reconstruction", "both"),
    "target": ("label", "class"),
    "mode": ("volumetric", "patch"),
}
SHARES = ("affine_prob", "flip_prob", "hu_warp_prob", "ct_noise_prob", "intensity_prob")
FROM_ZERO = ("freeze_epochs", "num_figure_volumes", "num_workers", "seed", "warmup_epochs")
FROM_ONE = (
    *("accumulation_steps", "batch_size", "early_stop_patience", "feature_size", "figure_interval", "max_epochs"),
    *("iterations_per_epoch", "max_voxels", "num_labels", "num_train_cases", "rank_timeout", "val_interval"),
    *("window_batch",),
)
# The smallest and the largest value of a knob.
RANGES = dict.fromkeys(SHARES, (0, 1)) | dict.fromkeys(FROM_ZERO, (0, inf)) | dict.fromkeys(FROM_ONE, (1, inf))
# May be null although the config gives them a value.
OPTIONAL = ("spacing", "iterations_per_epoch", "clip_norm")
# Lists of numbers that may have any length; all others have that of the config's own.
FREE_LENGTH = ("flip_axes",)
# What `--tracking mlflow` adds to a config.
TRACKING_KNOBS = {
    k for tool in DEFAULT_EXP_MGMT_SETTINGS.values() for k in tool["configs"].keys() - tool["handlers_id"]
}
SECONDS_FOR_THE_FIRST_RANK = 10.0
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, or a quota
TRUTH = {"true": True, "yes": True, "false": False, "no": False}


def check_knobs() -> None:
    """Check the overrides of a run against the configs of its recipe: the first step of every workflow.

    Booleans may be spelt as in YAML: the command line of MONAI hands ``true`` over as text.

    Raises:
        Mistake: for a name that neither the configs nor anything in the run knows, with the nearest valid one; for a
            value of another type; for one that is not among the choices, or out of range.
    """
    show_mistakes()
    parser = _caller(ConfigParser)
    if parser is None:
        raise RuntimeError("check_knobs works inside a MONAI bundle config only")
    _fit_tracking(parser)
    folder = bundle_root() / "configs"
    files = [str(folder / name) for name in RECIPES.get(parser.get("recipe", "inference"), RECIPES["pretraining"])]
    defaults = ConfigParser.load_config_files(files)
    for name, value in list(parser.get().items()):
        if name == "_meta_" or name in TRACKING_KNOBS:
            continue
        if name in defaults:
            if _is_expression(value) or (value is None and name in OPTIONAL):
                continue
            checked = _typed(name, value, defaults[name])
            _check_value(name, checked)
            if checked is not value:
                parser[name] = checked
        elif not _is_referenced(name, parser.get()) and not _is_of_an_overlay(name, value, folder):
            near = difflib.get_close_matches(name, defaults, n=1, cutoff=0)
            raise Mistake(f"there is no knob called {name}: did you mean {near[0]}? All knobs are in {files[-1]}")


def check_workflow() -> None:
    """Refuse to run what is no workflow, such as another section of the config: when MONAI initialises a run.

    A workflow is a list whose first step is :func:`check_knobs`.

    Raises:
        Mistake: for another run id, with the workflows that there are.
    """
    show_mistakes()
    workflow = _caller(ConfigWorkflow)
    if workflow is None:  # an application reads the config, and runs nothing
        return
    names = [name for name, steps in workflow.parser.get().items() if _is_workflow(steps)]
    if workflow.run_id not in names:
        others = ", ".join(name for name in names if name != "run")
        raise Mistake(f"there is no workflow called {workflow.run_id} in these configs: run one of {others}")


def check_run(device: str | torch.device, folders: Sequence[str | Path], resume: bool | None = None) -> None:
    """Refuse, before anything is read, a device that is not there, and folders that cannot or should not be written to.

    Args:
        device: to compute on.
        folders: that the run writes to.
        resume: of a training run, which from here on may be preempted: whether it continues an earlier one.
    """
    if resume is not None:
        end_when_preempted()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        here = "cuda" if torch.cuda.is_available() else "cpu"
        raise Mistake(f"device {device} cannot be used ({reason(error)}); --device {here} would do") from error
    for folder in map(Path, folders):
        if folder.parts[:1] == ("~",):
            raise Mistake(f"{folder} would be a folder called ~: write the path out, {folder.expanduser()}")
        there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise Mistake(f"{folder} cannot be written to ({there} is no folder, or not yours): choose another one")
        if resume is False and (state := folder / TRAINING_STATE).exists():
            raise Mistake(
                f"{state} is left from an earlier run: continue it with --resume true, or choose another --output_dir"
            )


def show_mistakes() -> None:
    """End the program with the message alone when the mistake is the user's, with a traceback when it is ours.

    In a run of ``python -m monai.bundle`` only: a program that uses the bundle keeps its own ways.
    """
    if not parallel.is_bundle_command():
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if _is_for_this_rank_to_say():
            print(_message(error) or "".join(traceback.format_exception(kind, error, trace)), file=sys.stderr)
        parallel.end_process(1)  # torchrun then ends the other ranks

    sys.excepthook = hook


def _message(error: BaseException) -> str | None:
    """Say what the user can mend; None where it is for us to mend."""
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno in FULL:
            return (
                f"error: {cause.filename or 'a file of this run'} cannot be written: {cause.strerror}. What was there "
                "before is as it was: make room, and continue with --resume true"
            )
    mistakes = (str(cause) for cause in causes(error) if isinstance(cause, Mistake))
    # A worker of the data loader hands its traceback on as text, the message at its end.
    return next((f"error: {text.rpartition('Mistake: ')[-1].strip()}" for text in mistakes), None)


def _is_for_this_rank_to_say() -> bool:
    """Leave to the first rank what all ranks find: it says so, and torchrun ends this one by SIGTERM."""
    if int(os.environ.get("RANK", 0)) == 0:
        return True
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    return signal.sigtimedwait({signal.SIGTERM}, SECONDS_FOR_THE_FIRST_RANK) is None


def _caller(kind: type[T]) -> T | None:
    """Find the parser or workflow whose config is being resolved: its components are not handed it."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(caller := frame.f_locals.get("self"), kind):
            return caller
        frame = frame.f_back
    return None


def _is_workflow(steps: Any) -> bool:
    first = steps[0] if isinstance(steps, list) and steps else None
    return isinstance(first, dict) and str(first.get("_target_")).endswith(f".{check_knobs.__name__}")


def _fit_tracking(parser: ConfigParser) -> None:
    """Mend what ``--tracking mlflow`` adds: MONAI's handler expects one output a volume, and a computed output_dir."""
    saved = parser.get("save_execute_config")
    if isinstance(saved, str) and not _is_expression(saved) and saved.endswith("'"):
        folder, _, name = saved.rpartition(" + '/")  # MONAI appends an expression even to a plain path
        parser["save_execute_config"] = f"{folder}/{name[:-1]}"
    for place, handler in enumerate(parser.get("train", {}).get("handlers", [])):
        if isinstance(handler, dict) and handler.get("_target_") == "MLFlowHandler":
            parser[f"train::handlers::{place}::output_transform"] = "$lambda output: output['loss']"


def _is_expression(value: Any) -> bool:
    return isinstance(value, str) and value[:1] in ("$", "@", "%")


def _typed(name: str, value: Any, default: Any) -> Any:
    """Return an override in the type of the config's own value; anything goes where that is null or no plain value."""
    if default is None or isinstance(default, bool):
        value = TRUTH.get(str(value).lower(), value)
    is_numbers = isinstance(default, list) and all(isinstance(entry, int | float) for entry in default)
    if is_numbers and isinstance(value, list | tuple):
        fits = len(value) == len(default) or name in FREE_LENGTH
        if not fits or not all(_is_a(type(default[0]), entry) or _is_expression(entry) for entry in value):
            raise Mistake(f"{name} is {list(value)} but must be a list like {default}")
    elif (is_numbers or type(default) in (bool, int, float)) and not _is_a(type(default), value):
        raise Mistake(f"{name} is {value!r} but must be of type {type(default).__name__}, for example {default!r}")
    return value


def _is_a(kind: type, value: Any) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, (int, float) if kind is float else kind)


def _check_value(name: str, value: Any) -> None:
    if name in RANGES and value is not None:
        smallest, largest = RANGES[name]
        if not smallest <= value <= largest:
            bound = f"at least {smallest}" if value < smallest else f"at most {largest}"
            raise Mistake(f"{name} is {value} but must be {bound}")
    valid = CHOICES.get(name)
    for entry in value if isinstance(value, list | tuple) else [value]:
        if valid is not None and entry not in valid:
            near = difflib.get_close_matches(str(entry), [str(choice) for choice in valid], n=1, cutoff=0)
            raise Mistake(f"{name} is {entry!r} but must be one of {list(valid)}: did you mean {near[0]}?")


def _is_of_an_overlay(name: str, value: Any, folder: Path) -> bool:
    """Tell whether another config of the bundle says just this: an overlay may serve several workflows."""
    others = (ConfigParser.load_config_file(other) for other in folder.glob("*.yaml"))
    return any(name in other and other[name] == value for other in others)


def _is_referenced(name: str, config: Any) -> bool:
    """Tell whether anything in the config refers to an item, as an overlay may bring items of its own."""
    if isinstance(config, dict):
        return any(_is_referenced(name, value) for value in config.values())
    if isinstance(config, list):
        return any(_is_referenced(name, value) for value in config)
    return isinstance(config, str) and re.search(rf"[@%]{re.escape(name)}\b", config) is not None
