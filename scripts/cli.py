"""What makes ``python -m monai.bundle run`` kind: knobs are checked, mistakes end without a traceback."""

from __future__ import annotations

import atexit
import difflib
import errno
import inspect
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS

from . import parallel
from .handlers.resuming import TRAINING_STATE
from .mistakes import Mistake, causes, reason

__all__ = ["check_device", "check_knobs", "check_output", "show_mistakes_kindly"]

# What `--tracking mlflow` adds to a config.
TRACKING_KNOBS = {
    knob for tool in DEFAULT_EXP_MGMT_SETTINGS.values() for knob in tool["configs"].keys() - tool["handlers_id"]
}
# Lists of numbers that may have any length; all others have that of the config's own.
FREE_LENGTH = {"flip_axes"}
SECONDS_FOR_THE_FIRST_RANK = 10.0
# A full disk, or a used-up quota.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TRUTH = {"true": True, "yes": True, "false": False, "no": False}


def check_knobs(
    config_file: str | Path,
    choices: dict[str, list[Any]] | None = None,
    minimums: dict[str, float] | None = None,
    maximums: dict[str, float] | None = None,
    optional: Sequence[str] = (),
) -> None:
    """Check the overrides of a run against the config they override; for the config's ``initialize``.

    Booleans may be spelt as in YAML (the command line of MONAI hands ``true`` over as text). The handlers that
    ``--tracking`` adds are fitted to the trainer's output.

    Args:
        config_file: the bundle's own config of this workflow: its top-level names are the valid knobs, and the types
            of its plain values the valid types.
        choices: the valid values of some knobs, or of the entries of their lists.
        minimums: the smallest valid values of some knobs.
        maximums: the largest ones.
        optional: knobs that may be null although the config gives them a value.

    Raises:
        Mistake: for a name that neither the config nor anything in the run knows, with the nearest valid one; for
            a value of another type; for one that is not among the choices, or too small.
    """
    show_mistakes_kindly()
    parser = _calling_parser()
    _fit_tracking(parser)
    defaults = ConfigParser.load_config_file(config_file)
    for name, value in list(parser.get().items()):
        if name == "_meta_" or name in TRACKING_KNOBS:
            continue
        if name in defaults:
            if _is_expression(value) or (value is None and name in optional):
                continue
            checked = _typed(name, value, defaults[name])
            _check_value(
                name, checked, (choices or {}).get(name), (minimums or {}).get(name), (maximums or {}).get(name)
            )
            if checked is not value:
                parser[name] = checked
        elif not _is_referenced(name, parser.get()) and not _is_of_an_overlay(name, value, Path(config_file)):
            near = difflib.get_close_matches(name, defaults, n=1, cutoff=0)
            raise Mistake(f"there is no knob called {name}: did you mean {near[0]}? All knobs are in {config_file}")


def check_device(device: str | torch.device) -> None:
    """Refuse a device that is not there, before anything is read.

    Raises:
        Mistake: naming one that is.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        here = "cuda" if torch.cuda.is_available() else "cpu"
        raise Mistake(f"device {device} cannot be used ({reason(error)}); --device {here} would do") from error


def check_output(folders: Sequence[str | Path], resume: bool | None = None) -> None:
    """Refuse, before anything is read, to write where that is not possible or would overwrite an earlier run.

    Args:
        folders: that the run writes to.
        resume: of a training run: whether it is to continue the one that left its state there.

    Raises:
        Mistake: saying which folder, and what would do.
    """
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


def show_mistakes_kindly() -> None:
    """End the program with the message alone when the mistake is the user's, with a traceback when it is ours.

    In a run of ``python -m monai.bundle`` only: a program that uses the bundle keeps its own ways.
    """
    if not parallel.is_bundle_command():
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        mistake = next((cause for cause in causes(error) if isinstance(cause, Mistake)), None)
        full = next((cause for cause in causes(error) if isinstance(cause, OSError) and cause.errno in FULL), None)
        if full is not None:
            print(
                f"error: {full.filename or 'a file of this run'} cannot be written: {full.strerror}. What was there "
                "before is as it was: make room, and continue with --resume true",
                file=sys.stderr,
            )
        elif mistake is None:
            sys.__excepthook__(kind, error, trace)
        else:
            if int(os.environ.get("RANK", 0)) > 0:
                # All ranks find a user's mistake: the first one says so, and its end is that of the others.
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(SECONDS_FOR_THE_FIRST_RANK)
            print(f"error: {mistake}", file=sys.stderr)
        if parallel.world_size() > 1:
            # At once, without waiting for ranks that may not answer any more: torchrun then ends the others.
            atexit.register(os._exit, 1)

    sys.excepthook = hook


def _calling_parser() -> ConfigParser:
    """Find the parser whose config is being resolved: expressions are not handed it."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(parser := frame.f_locals.get("self"), ConfigParser):
            return parser
        frame = frame.f_back
    raise RuntimeError("check_knobs works inside a MONAI bundle config only")


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


def _check_value(name: str, value: Any, valid: list[Any] | None, minimum: float | None, maximum: float | None) -> None:
    if minimum is not None and value is not None and value < minimum:
        raise Mistake(f"{name} is {value} but must be at least {minimum}")
    if maximum is not None and value is not None and value > maximum:
        raise Mistake(f"{name} is {value} but must be at most {maximum}")
    for entry in value if isinstance(value, list | tuple) else [value]:
        if valid is not None and entry not in valid:
            near = difflib.get_close_matches(str(entry), [str(choice) for choice in valid], n=1, cutoff=0)
            raise Mistake(f"{name} is {entry!r} but must be one of {valid}: did you mean {near[0]}?")


def _is_of_an_overlay(name: str, value: Any, config_file: Path) -> bool:
    """Tell whether another config of the bundle says just this: an overlay may serve several workflows."""
    others = (ConfigParser.load_config_file(other) for other in config_file.parent.glob("*.yaml"))
    return any(name in other and other[name] == value for other in others)


def _is_referenced(name: str, config: Any) -> bool:
    """Tell whether anything in the config refers to an item, as an overlay may bring items of its own."""
    if isinstance(config, dict):
        return any(_is_referenced(name, value) for value in config.values())
    if isinstance(config, list):
        return any(_is_referenced(name, value) for value in config)
    return isinstance(config, str) and re.search(rf"[@%]{re.escape(name)}\b", config) is not None
