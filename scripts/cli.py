"""What makes ``python -m monai.bundle run`` kind: knobs are checked, mistakes end without a traceback."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

from monai.bundle import ConfigParser
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS

from .engine import NonFiniteLossError
from .handlers import TRAINING_STATE

__all__ = ["check_knobs", "refuse_overwriting", "show_mistakes_kindly"]

# What `--tracking mlflow` adds to a config.
TRACKING_KNOBS = {
    knob for tool in DEFAULT_EXP_MGMT_SETTINGS.values() for knob in tool["configs"].keys() - tool["handlers_id"]
}
TRUTH = {"true": True, "yes": True, "false": False, "no": False}


def check_knobs(config_file: str | Path, choices: dict[str, list[Any]] | None = None) -> None:
    """Check the overrides of a run against the config they override; for the config's ``initialize``.

    Booleans may be spelt as in YAML (the command line of MONAI hands ``true`` over as text).

    Args:
        config_file: the bundle's own config of this workflow: its top-level names are the valid knobs, and the types
            of its plain values the valid types.
        choices: the valid values of some knobs.

    Raises:
        ValueError: for a name that neither the config nor anything in the run knows, with the nearest valid one; for
            a value of another type; or for one that is not among the choices.
    """
    show_mistakes_kindly()
    parser = _calling_parser()
    defaults = ConfigParser.load_config_file(config_file)
    for name, value in list(parser.get().items()):
        if name == "_meta_" or name in TRACKING_KNOBS:
            continue
        if name in defaults:
            checked = _checked(name, value, defaults[name], (choices or {}).get(name))
            if checked is not value:
                parser[name] = checked
        elif not _is_referenced(name, parser.get()) and not _is_of_an_overlay(name, value, Path(config_file)):
            near = difflib.get_close_matches(name, defaults, n=1, cutoff=0)
            raise ValueError(f"there is no knob called {name}: did you mean {near[0]}? All knobs are in {config_file}")


def refuse_overwriting(ckpt_dir: str | Path, resume: bool) -> None:
    """Refuse to start over where an earlier run left its state.

    Raises:
        ValueError: when ``ckpt_dir`` holds a training state and the run is not to resume it.
    """
    if not resume and (state := Path(ckpt_dir) / TRAINING_STATE).exists():
        raise ValueError(
            f"{state} is left from an earlier run: continue it with --resume true, or choose another --output_dir"
        )


def show_mistakes_kindly() -> None:
    """End the program with the message alone when the mistake is the user's, with a traceback when it is ours."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        link: BaseException | None = error
        while link is not None and not _is_users(link):
            link = link.__cause__ or link.__context__
        if link is None:
            sys.__excepthook__(kind, error, trace)
        else:
            print(f"error: {link}", file=sys.stderr)

    sys.excepthook = hook


def _is_users(error: BaseException) -> bool:
    """Tell whether an error was raised by this package's own checks."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = bool(frames) and Path(frames[-1].filename).parent == Path(__file__).parent
    return ours and isinstance(error, ValueError | NonFiniteLossError)


def _calling_parser() -> ConfigParser:
    """Find the parser whose config is being resolved: expressions are not handed it."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(parser := frame.f_locals.get("self"), ConfigParser):
            return parser
        frame = frame.f_back
    raise RuntimeError("check_knobs works inside a MONAI bundle config only")


def _checked(name: str, value: Any, default: Any, valid: list[Any] | None) -> Any:
    """Return an override in the type of the config's own value."""
    is_expression = isinstance(value, str) and value[:1] in ("$", "@", "%")
    if value is default or is_expression:
        return value
    if isinstance(default, bool):
        value = TRUTH.get(str(value).lower(), value)
    kinds = {bool: bool, int: int, float: (int, float), list: (list, tuple)}.get(type(default))
    wrong_kind = kinds is not None and (not isinstance(value, kinds) or isinstance(value, bool) is not (kinds is bool))
    if wrong_kind and not (value is None and not isinstance(default, bool)):
        raise ValueError(f"{name} is {value!r} but must be of type {type(default).__name__}, for example {default!r}")
    if valid is not None and value not in valid:
        near = difflib.get_close_matches(str(value), [str(choice) for choice in valid], n=1, cutoff=0)
        raise ValueError(f"{name} is {value!r} but must be one of {valid}: did you mean {near[0]}?")
    return value


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
