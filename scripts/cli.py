"""What makes ``python -m monai.bundle run`` kind: knobs are checked, mistakes end without a traceback."""

import errno
import inspect
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

import monai.bundle.scripts
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS

from . import parallel
from .handlers import TRAINING_STATE, Setting, WarningLog, end_when_preempted
from .knobs import MOVED, RENAMED, is_expression, is_knob, read
from .mistakes import Mistake, causes, likely, reason
from .weights import CARRIED, carried_knobs, read_record, recorded

__all__ = [
    "as_published",
    "as_written",
    "caller",
    "check_knobs",
    "check_run",
    "check_workflow",
    "overridden",
    "settings",
]
__all__ += ["show_mistakes"]

T = TypeVar("T")
logger = logging.getLogger(__name__)

# The configs of each recipe. Their top-level names are the knobs, the types of their plain values the valid types.
RECIPES = {
    "inference": ("inference.json",),
    "pretraining": ("train.yaml",),
    "conductor": ("train.yaml", "train_conductor.yaml"),
    "stem_tuning": ("train.yaml", "tune_stem.yaml"),
    "segmentation": ("train.yaml", "finetune_segmentation.yaml"),
    "classification": ("train.yaml", "finetune_classification.yaml"),
    "probe": ("train.yaml", "probe.yaml"),
}
CONTINUED = {"continued": ("train.json",)}  # of a finished bundle
PRETRAINING = ("pretraining", "conductor")  # what they start from may be of another size and spacing
# What `--tracking mlflow` adds to a config.
TRACKING_KNOBS = {
    k for tool in DEFAULT_EXP_MGMT_SETTINGS.values() for k in tool["configs"].keys() - tool["handlers_id"]
}
EVERY_TENTH = "$(lambda engine, event: event % 10 == 0) if @on_gpu else True"  # to read a loss, a GPU is waited for
SECONDS_FOR_THE_FIRST_RANK = 10.0
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, or a quota
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def caller(kind: type[T]) -> T | None:
    """Find the parser or workflow whose config is being resolved: its components are not handed it."""
    return next((own for frame in _frames() if isinstance(own := frame.f_locals.get("self"), kind)), None)


def check_knobs(weights: str = "pretrained") -> None:
    """Check the overrides of a run against the configs of its recipe: the first step of every workflow.

    What YAML would read as null, true or a number arrives from the command line as text: it is put right. Knobs that
    the user left alone become those that the run's weights carry.

    Args:
        weights: id of the entry that names the file of weights.

    Raises:
        Mistake: for a name that neither the configs nor anything in the run knows; for a value that the knob cannot be;
            for one that contradicts the weights.
    """
    show_mistakes()
    WarningLog.begin()
    parser = caller(ConfigParser)
    if parser is None:
        raise RuntimeError("check_knobs works inside a MONAI bundle config only")
    _fit_tracking(parser)
    given, recipe = overridden() - TRACKING_KNOBS, parser.get("recipe", "inference")
    nulls = _nulls()
    files, defaults = as_published(parser, recipe)
    # An overlay may serve several workflows.
    passed = {"_meta_", *TRACKING_KNOBS, *as_published(parser, "pretraining")[1]}
    changes = {}
    for name, value in (parser.get() | nulls).items():
        if name in defaults:
            checked = read(name, value, defaults[name])
            changes |= {name: checked} if repr(checked) != repr(parser.get(name)) else {}
        elif name not in passed - given and not _is_referenced(name, parser.get()):
            raise Mistake(_unknown(name, defaults, files[-1]))
    for name, instead in MOVED.items():
        if name in parser:
            raise Mistake(f"{name} is of an earlier version: {instead}")
    _change(parser, changes)
    _change(parser, _carried(parser, recipe, defaults, given, weights))


def overridden() -> set[str]:
    """Name what stands on the command line, even if it is what the config says anyway."""
    return set(_command().get("override", {}))


def as_published(parser: ConfigParser, recipe: str | None = None) -> tuple[list[str], dict[str, Any]]:
    """Name the configs of a recipe, as far as they are there, and what they say together; default: that of the run."""
    folder = Path(parser.get_parsed_content("bundle_root")) / "configs"  # which may be a finished bundle's
    names = (RECIPES | CONTINUED).get(recipe or parser.get("recipe", "inference"), RECIPES["pretraining"])
    files = [str(folder / name) for name in names if (folder / name).is_file()]
    return files, ConfigParser.load_config_files(files)


def as_written(name: str) -> Any:
    """Return an entry of the config as it is written, none of its components built."""
    return caller(ConfigParser)[name]


def labelled(name: str) -> Any:
    """Build an entry of the config anew, as it is where cases come with a ``label``: it stays on its image's voxels."""
    parser = caller(ConfigParser)
    changes = {"files": ["image", "label"], "aligned": ["image", "label"], "field_of_view": "none"}
    return ConfigParser({**parser.get(), **changes}, globals=parser.globals).get_parsed_content(name)


def settings() -> dict[str, Setting]:
    """Tell what every knob of a run is, for its report: as a component of the config."""
    parser = caller(ConfigParser)
    return {
        name: Setting(parser.get_parsed_content(name), default, repr(parser.get(name)) != repr(default))
        for name, default in as_published(parser)[1].items()
        if is_knob(name, default)
    }


def check_workflow() -> None:
    """Refuse to run what is no workflow, such as another section of the config.

    A workflow is a list whose first step is :func:`check_knobs`.

    Raises:
        Mistake: for another run id, with the workflows that there are.
    """
    show_mistakes()
    workflow = caller(ConfigWorkflow)
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
    chosen = torch.device(device)
    if parallel.is_bundle_command() and chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)  # what asks for no device of its own, such as a peak of memory, means this one
    for folder in map(Path, folders):
        if folder.parts[:1] == ("~",):
            raise Mistake(f"{folder} would be a folder called ~: write the path out, {folder.expanduser()}")
        there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise Mistake(f"{folder} cannot be written to ({there} is no folder, or read-only): choose another one")
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
        if isinstance(cause, OSError) and cause.errno in FORBIDDEN:
            return (
                f"error: {cause.filename or 'a file of this run'} cannot be used: {cause.strerror}. Make it yours, or "
                "choose another folder: --output_dir for what a run writes, --dataset_dir in place of the sample"
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


def _is_workflow(steps: Any) -> bool:
    first = steps[0] if isinstance(steps, list) and steps else None
    return isinstance(first, dict) and str(first.get("_target_")).endswith(f".{check_knobs.__name__}")


def _command() -> dict[str, Any]:
    """Find the arguments of ``monai.bundle.run``: its components are not handed them."""
    ran = monai.bundle.scripts.run.__code__
    return next((frame.f_locals for frame in _frames() if frame.f_code is ran), {})


def _frames() -> Iterator[FrameType]:
    """Walk the calls that are being made, from this one outwards."""
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def _nulls() -> dict[str, None]:
    """Find the knobs that are null on the command line as Python spells it, ``--spacing None``: MONAI drops them.

    A program that calls :func:`monai.bundle.run` means by None, as MONAI does, that it says nothing.
    """
    command, workflow = _command(), caller(ConfigWorkflow)
    # A prediction runs another workflow within that of the command, whose knobs are not its own.
    is_its_own = workflow is not None and command.get("run_id") == workflow.run_id
    given = command["override"] if is_its_own and parallel.is_bundle_command() else {}
    return {name: None for name, value in given.items() if value is None and name.isidentifier()}  # no `train#x`


def _fit_tracking(parser: ConfigParser) -> None:
    """Mend what ``--tracking mlflow`` adds: MONAI's handler expects one output a volume, and a computed output_dir."""
    saved = parser.get("save_execute_config")
    if isinstance(saved, str) and not is_expression(saved) and saved.endswith("'"):
        folder, _, name = saved.rpartition(" + '/")  # MONAI appends an expression even to a plain path
        parser["save_execute_config"] = f"{folder}/{name[:-1]}"
    for place, handler in enumerate(parser.get("train", {}).get("handlers", [])):
        if isinstance(handler, dict) and handler.get("_target_") == "MLFlowHandler":
            parser[f"train::handlers::{place}::output_transform"] = "$lambda output: output['loss']"
            parser[f"train::handlers::{place}::iteration_log"] = EVERY_TENTH


def _unknown(name: str, defaults: dict[str, Any], file: str) -> str:
    names = sorted(name for name, default in defaults.items() if is_knob(name, default))
    proposal = likely(name, names) or f": the knobs are {', '.join(names)}."
    if name in RENAMED:
        proposal = f": it is called {RENAMED[name]} now."
    return f"there is no knob called {name}{proposal} All knobs are in {file}"


def _change(parser: ConfigParser, changes: dict[str, Any]) -> None:
    if changes:  # all at once: it resolves the config anew
        parser[""] = parser.get() | changes


def _carried(parser: ConfigParser, recipe: str, own: dict[str, Any], given: set[str], weights: str) -> dict[str, Any]:
    """Tell what must change for a run to fit the weights that it starts from; see :func:`carried_knobs`."""
    path = parser.get_parsed_content(weights) if weights in parser else None
    if path is None:
        return {}
    config = {name: value for name, value in parser.get().items() if name in own}
    for name, value in config.items():
        if name in CARRIED and is_expression(value):
            config[name] = parser.get_parsed_content(name)
    if recipe in PRETRAINING:
        own = {name: own[name] for name in ("modality", "in_chans", "intensities")}
    elif not recorded(read_record(path), "preprocessing") and Path(path).is_file():
        logger.warning("nothing beside %s says how it was trained: modality, spacing and the like are this run's", path)
    changes = carried_knobs(path, config, own, given, with_head=weights != "pretrained")
    if changes:
        values = (f"{name} {'null' if value is None else value}" for name, value in changes.items() if name in CARRIED)
        scaled = ["its scaling of intensities"] * ("intensities" in changes)
        logger.info("as %s was trained: %s", path, ", ".join([*values, *scaled]))
    return changes


def _is_referenced(name: str, config: Any) -> bool:
    """Tell whether anything in the config refers to an item, as an overlay may bring items of its own."""
    if isinstance(config, dict):
        return any(_is_referenced(name, value) for value in config.values())
    if isinstance(config, list):
        return any(_is_referenced(name, value) for value in config)
    return isinstance(config, str) and re.search(rf"[@%]{re.escape(name)}\b", config) is not None
