"""Checkpoints on disk: written whole or not at all, read safely."""

import contextlib
import logging
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..mistakes import Mistake

__all__ = ["DamagedCheckpointError", "load", "load_newest", "previous", "read_head", "save"]

logger = logging.getLogger(__name__)

SAFETENSORS = ".safetensors"


class DamagedCheckpointError(Mistake):
    """A file is not the checkpoint that was once written: cut off, or changed."""


def save(content: Any, path: str | Path, keep_previous: bool = False, head: dict[str, str] | None = None) -> None:
    """Write a checkpoint beside its place, sync it and rename it there: a kill leaves the old file or the new one.

    Args:
        content: what ``torch.save`` takes; tensors are stored on the CPU, so that any machine can read them. Every
            tensor gets a checksum (CRC-32), which :func:`load` compares.
        path: where the file goes; its folder is made. A ``.safetensors`` takes flat weights alone.
        keep_previous: keep the file that was there as :func:`previous`, for :func:`load_newest` to fall back on.
        head: text by name, for the head of a ``.safetensors``.

    Raises:
        OSError: when it cannot be written, naming the file; what was there before is as it was.
    """
    path = Path(path)
    content = tree_map(lambda value: value.detach().cpu() if isinstance(value, Tensor) else value, content)
    with named_after(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                if path.suffix == SAFETENSORS:
                    contiguous = {name: value.contiguous() for name, value in content.items()}
                    file.write(_safetensors(path).torch.save(contiguous, {"format": "pt"} | (head or {})))
                else:
                    torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            Path(beside).chmod(0o644)
            if keep_previous and path.exists():
                path.replace(previous(path))
            Path(beside).replace(path)
            _sync_folder(path.parent)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise


def save_text(text: str, path: Path) -> None:
    """Write a text beside its place and rename it there; errors are those of :func:`save`."""
    with named_after(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}")
        beside.write_text(text, encoding="utf-8", errors="replace")  # names of files may be no text
        beside.replace(path)


@contextlib.contextmanager
def named_after(path: Path) -> Iterator[None]:
    """Let errors of writing, whatever torch makes of them, name the file that was to be written."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        origin: BaseException | None = error
        while not isinstance(origin, OSError | None):
            origin = origin.__context__  # a full disk reaches us as torch's RuntimeError
        if origin is None:
            raise
        raise OSError(origin.errno, origin.strerror, str(path)) from error


def previous(path: str | Path) -> Path:
    """Name the file that ``save(…, keep_previous=True)`` keeps: ``training_state.previous.pt``."""
    path = Path(path)
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def load(path: str | Path) -> Any:
    """Read a checkpoint onto the CPU, tensors and primitives only: nothing in the file is executed.

    Raises:
        Mistake: when there is no such file, or it is not a checkpoint that can be read safely.
        DamagedCheckpointError: when it is cut off, or its checksums say that it was changed.
    """
    path = Path(path)
    if not path.is_file():
        raise Mistake(f"there is no checkpoint at {path}")
    if path.suffix == SAFETENSORS:
        with _readable(path):
            return _safetensors(path).torch.load_file(path)
    try:
        # torch itself does not compare the checksums. What is no zip archive may be a file of an early torch.
        changed = zipfile.ZipFile(path).testzip() if zipfile.is_zipfile(path) else None
    except Exception as error:
        raise DamagedCheckpointError(f"{path} is damaged ({error}): use another checkpoint, or a copy of it") from error
    if changed is not None:
        raise DamagedCheckpointError(
            f"{path} is damaged (the checksum of {changed} is wrong): use another checkpoint, or a copy of it"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        if culprit is None:
            raise DamagedCheckpointError(
                f"{path} cannot be read as a checkpoint of tensors and plain values ({type(error).__name__}): it is "
                "damaged, or something else"
            ) from error
        raise Mistake(
            f"{path} cannot be read as a checkpoint of tensors and plain values (it also holds {culprit[1]}). Loading "
            "anything else could run code, so this is not done here; if you trust the file, save its weights alone in "
            "a program of your own"
        ) from error


def read_head(path: str | Path) -> dict[str, str]:
    """Read the head of a ``.safetensors``, text by name; errors as of :func:`load`."""
    with _readable(path), _safetensors(path).safe_open(path, "pt") as file:
        return file.metadata() or {}


@contextlib.contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    safetensors = _safetensors(path)
    try:
        yield
    except safetensors.SafetensorError as error:
        raise DamagedCheckpointError(f"{path} is damaged ({error}): use another checkpoint, or a copy of it") from error


def _safetensors(path: str | Path) -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise Mistake(f"{path} needs safetensors: pip install safetensors, or give a .pt") from error
    return safetensors


def load_newest(path: str | Path, keep_aside: bool = True) -> Any | None:
    """Read a checkpoint, or the one before it where it is damaged; None when there is none at all.

    With ``keep_aside`` a damaged file is renamed, so that the next save does not put it in the place of the good one.

    Raises:
        Mistake: when there are checkpoints, but none that can be read.
    """
    damage = None
    for candidate in (Path(path), previous(path)):
        if not candidate.exists():
            continue
        try:
            return load(candidate)
        except DamagedCheckpointError as error:
            damage = error
        if keep_aside:
            aside = candidate.with_name(f"{candidate.stem}.damaged{candidate.suffix}")
            candidate.replace(aside)
            logger.warning("%s; it is kept as %s", damage, aside.name)
    if damage is not None:
        raise Mistake(f"no checkpoint is left to continue from, start anew in another --output_dir: {damage}")
    return None


def _sync_folder(folder: Path) -> None:
    """Make renames last through a loss of power, where folders can be synced at all."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
