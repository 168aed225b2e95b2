"""Weights on disk: save them whole or not at all, load them safely, convert them from the original authors' names."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import parallel
from .data import causes

__all__ = [
    "Comparison",
    "DamagedCheckpointError",
    "compare",
    "convert_reference_state_dict",
    "encoder_part",
    "has_strict_stem",
    "load",
    "load_network",
    "load_newest",
    "load_state_dict",
    "previous",
    "save",
    "start_from",
    "strip_prefixes",
    "to_reference_state_dict",
    "widen",
]

logger = logging.getLogger(__name__)

# What wrappers put in front of every name: DistributedDataParallel and torch.compile.
WRAPPER_PREFIXES = ("module.", "_orig_mod.")

# The authors' names, top to bottom through the network, and ours.
BLOCK = r"features\.0\.(\d+)\."
OUR_BLOCK = r"encoder.swin.blocks.\1."
REFERENCE_NAMES = (
    (r"mask_token_enc", r"mask_token"),
    (r"patch_embed\.(stages\.\d+\.[01]\.\w+|proj\.\w+)", r"encoder.stem.\1"),
    (BLOCK + r"((norm1|norm2|attn\.qkv|attn\.proj)\.\w+|attn\.relative_position_bias_table)", OUR_BLOCK + r"\2"),
    (BLOCK + r"mlp\.0\.(\w+)", OUR_BLOCK + r"mlp.linear1.\2"),
    (BLOCK + r"mlp\.3\.(\w+)", OUR_BLOCK + r"mlp.linear2.\2"),
    (r"decoder_embed\.(\w+)", r"decoder.embed.\1"),
    (r"decoder_head\.(\d+\.\w+)", r"decoder.head.\1"),
)
# Fixed by formula, so not part of our state dict.
REFERENCE_DERIVED = re.compile(r"pos_embed|features\.0\.\d+\.attn\.relative_position_index")
# The authors' default stem is one flat sequence of (conv, norm, activation) stages and a projection.
FLAT_STEM = re.compile(r"patch_embed\.(\d+)\.(\w+)")


class DamagedCheckpointError(ValueError):
    """A file is not the checkpoint that was once written: cut off, or changed."""


def save(content: Any, path: str | Path, keep_previous: bool = False) -> None:
    """Write a checkpoint beside its place, sync it and rename it there: a kill leaves the old file or the new one.

    Args:
        content: what ``torch.save`` takes; tensors are stored on the CPU, so that any machine can read them. Every
            tensor gets a checksum (CRC-32), which :func:`load` compares.
        path: where the file goes; its folder is made.
        keep_previous: keep the file that was there as :func:`previous`, for :func:`load_newest` to fall back on.

    Raises:
        OSError: when it cannot be written, naming the file; what was there before is as it was.
    """
    path = Path(path)
    with named_after(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                torch.save(_to_cpu(content), file)
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


@contextlib.contextmanager
def named_after(path: Path) -> Iterator[None]:
    """Let errors of writing, whatever torch makes of them, name the file that was to be written."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # A full disk reaches us as torch's RuntimeError.
        origin = next((cause for cause in causes(error) if isinstance(cause, OSError)), None)
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
        ValueError: when there is no such file, or it is not a checkpoint that can be read safely.
        DamagedCheckpointError: when it is cut off, or its checksums say that it was changed.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint at {path}")
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
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors and plain values (it also holds {culprit[1]}). Loading "
            "anything else could run code, so this is not done here; if you trust the file, save its weights alone in "
            "a program of your own"
        ) from error


def load_newest(path: str | Path, keep_aside: bool = True) -> Any | None:
    """Read a checkpoint, or the one before it where it is damaged.

    Args:
        path: as given to ``save(…, keep_previous=True)``.
        keep_aside: rename a damaged file, so that the next save does not put it in the place of the good one.

    Returns:
        The content, or None when there is no checkpoint at all.

    Raises:
        ValueError: when there are checkpoints, but none that can be read.
    """
    damage = None
    for candidate in (Path(path), previous(path)):
        if candidate.exists():
            content, damage = _load_or_damage(candidate)
            if damage is None:
                return content
            aside = candidate.with_name(f"{candidate.stem}.damaged{candidate.suffix}")
            if keep_aside:
                candidate.replace(aside)
                logger.warning("%s; it is kept as %s", damage, aside.name)
    if damage is not None:
        raise ValueError(f"no checkpoint is left to continue from, start anew in another --output_dir: {damage}")
    return None


def _load_or_damage(path: Path) -> tuple[Any, str | None]:
    try:
        return load(path), None
    except DamagedCheckpointError as error:
        return None, str(error)


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read flat weights, wrapper prefixes removed.

    Raises:
        ValueError: when there is no such file, it cannot be read safely, or it holds something else.
    """
    content = load(path)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no flat weights (name → tensor): use the model.pt of a run")
    return strip_prefixes(content)


def has_strict_stem(state_dict: Mapping[str, Tensor]) -> bool | None:
    """Tell from the weights of a network, or of an encoder, what its stem's kernels are; None if it has no stem."""
    name = _first_kernel(state_dict)
    return None if name is None else state_dict[name].shape[-1] == 2


def encoder_part(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the encoder's weights out of a whole network's, under the encoder's own names."""
    prefix = "encoder."
    return {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}


class Comparison(NamedTuple):
    """Which tensors of some weights fit a network, by name."""

    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]

    @property
    def complete(self) -> bool:
        """Whether the weights fill the network, with nothing left over."""
        return not (self.missing or self.unexpected or self.reshaped)

    def __str__(self) -> str:
        lists = (f"{len(names)} {what}{_examples(names)}" for what, names in self._asdict().items() if names)
        return "; ".join(lists)

    def account(self) -> str:
        """Name every tensor, one a line."""
        lines = (f"{what:>10}  {name}" for what, names in self._asdict().items() for name in names)
        return "\n".join([*lines, "; ".join(f"{len(names)} {what}" for what, names in self._asdict().items())])


def compare(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Comparison:
    """Compare the weights a network has with those it is offered.

    Args:
        ours: the network's state dict.
        theirs: the offered one, under our names.
    """
    common = [name for name in ours if name in theirs]
    return Comparison(
        matched=[name for name in common if theirs[name].shape == ours[name].shape],
        missing=[name for name in ours if name not in theirs],
        unexpected=[name for name in theirs if name not in ours],
        reshaped=[
            f"{name} {tuple(theirs[name].shape)} instead of {tuple(ours[name].shape)}"
            for name in common
            if theirs[name].shape != ours[name].shape
        ],
    )


def load_network(network: nn.Module, state_dict: Mapping[str, Tensor], source: str | Path) -> None:
    """Load a network's weights completely, or say what does not fit.

    Args:
        network: to fill.
        state_dict: flat weights; wrapper prefixes are removed.
        source: where they came from, for the message.

    Raises:
        ValueError: when a name is missing, left over, or of another shape; the network is then unchanged.
    """
    theirs, ours = strip_prefixes(state_dict), network.state_dict()
    comparison = compare(ours, theirs)
    if not comparison.complete:
        raise ValueError(f"the weights in {source} do not fit this network of {len(ours)} tensors: {comparison}")
    network.load_state_dict(parallel.placed_like(theirs, ours))


def start_from(network: nn.Module, pretrained: str | Path | None) -> None:
    """Fill a network with the weights of an earlier training, if there are any to start from.

    Args:
        network: to fill.
        pretrained: flat weights of the same network; None: it stays as it was initialised.

    Raises:
        ValueError: when there is no such file, or anything in it does not fit.
    """
    if pretrained is not None:
        load_network(network, load_state_dict(pretrained), pretrained)


def strip_prefixes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove what DistributedDataParallel and torch.compile put in front of the names, in any order."""

    def strip(name: str) -> str:
        while name.startswith(WRAPPER_PREFIXES):
            name = name.split(".", 1)[1]
        return name

    return {strip(name): value for name, value in state_dict.items()}


def convert_reference_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the authors' implementation for :class:`BertsWinMAE`, strictly loadable.

    Args:
        state_dict: the authors' weights, flat; ``module.`` and ``_orig_mod.`` prefixes are removed.

    Returns:
        The same tensors under our names. Positions and relative position indices are left out: they are fixed by
        formula.

    Raises:
        ValueError: when a name is not one of the authors' network.
    """
    reference = strip_prefixes(state_dict)
    num_stages = max((int(match[1]) // 3 for name in reference if (match := FLAT_STEM.fullmatch(name))), default=0)
    converted, unknown = {}, []
    for name, value in reference.items():
        if REFERENCE_DERIVED.fullmatch(name):
            continue
        if new_name := _reference_name(name, num_stages):
            converted[new_name] = value
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(reference)} names are not those of the BertsWin reference network: "
            f"{', '.join(unknown[:5])}{', …' if len(unknown) > 5 else ''}; "
            "expected names such as mask_token_enc, patch_embed.0.weight, features.0.0.attn.qkv.weight"
        )
    return converted


def to_reference_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """Rename a network's weights for the authors' implementation: the inverse of :func:`convert_reference_state_dict`.

    Args:
        network: a :class:`~bertswin_mae.bertswin_mae.BertsWinMAE`.

    Returns:
        The same tensors under the authors' names, and what their state dict holds beside: positions
        ``(1, N, C)`` and relative position indices.
    """
    encoder, weights = network.encoder, network.state_dict()
    flat_stem = not encoder.strict_stem
    names = {}
    for block in range(len(encoder.swin.blocks)):
        for ours, theirs in (("mlp.linear1", "mlp.0"), ("mlp.linear2", "mlp.3")):
            names[f"encoder.swin.blocks.{block}.{ours}."] = f"features.0.{block}.{theirs}."
        names[f"encoder.swin.blocks.{block}."] = f"features.0.{block}."
    if flat_stem:
        num_stages = len(encoder.stem.stages)
        for stage in range(num_stages):
            for part in (0, 1):
                names[f"encoder.stem.stages.{stage}.{part}."] = f"patch_embed.{3 * stage + part}."
        names["encoder.stem.proj."] = f"patch_embed.{3 * num_stages}."
    names |= {
        "encoder.stem.": "patch_embed.",
        "decoder.embed.": "decoder_embed.",
        "decoder.head.": "decoder_head.",
        "mask_token": "mask_token_enc",
    }
    renamed = {}
    for name, value in weights.items():
        ours = next(prefix for prefix in names if name.startswith(prefix))
        renamed[names[ours] + name.removeprefix(ours)] = value
    renamed["pos_embed"] = encoder.positions.flatten(2).mT.contiguous()
    for number, block in enumerate(encoder.swin.blocks):
        renamed[f"features.0.{number}.attn.relative_position_index"] = block.attn.relative_position_index
    return renamed


def widen(state_dict: Mapping[str, Tensor], in_chans: int, spread: str) -> dict[str, Tensor]:
    """Make weights for a network of several input channels from those of one.

    Args:
        state_dict: flat weights of a one-channel network, or of its encoder alone.
        in_chans: channels of the wide network.
        spread: ``mean``: every channel gets an equal share of the stem's first kernel; ``first``: the first channel
            gets all of it.

    Returns:
        The wide weights; a decoder rebuilds every channel as it did the one.

    Raises:
        ValueError: for another ``spread``, or weights that are not of one channel.
    """
    if spread not in ("mean", "first"):
        raise ValueError(f"spread {spread!r} must be 'mean' or 'first'")
    first = _first_kernel(state_dict)
    if first is None or state_dict[first].shape[1] != 1:
        found = "no stem" if first is None else f"{state_dict[first].shape[1]} input channels"
        raise ValueError(f"only weights of one input channel can be widened; these have {found}")
    wide = dict(state_dict)
    share = torch.full((1, in_chans, 1, 1, 1), 1 / in_chans)
    if spread == "first":
        share = torch.eye(in_chans)[:1, :, None, None, None]
    wide[first] = state_dict[first] * share
    if "decoder.head.6.weight" in wide:
        # A ConvTranspose3d keeps its output channels second, as a Conv3d (kernel 1, for small patches) its input's.
        kernel = wide["decoder.head.6.weight"]
        repeats = (1, in_chans, 1, 1, 1) if kernel.shape[1] == 1 else (in_chans, 1, 1, 1, 1)
        wide["decoder.head.6.weight"] = kernel.repeat(repeats)
        wide["decoder.head.6.bias"] = wide["decoder.head.6.bias"].repeat(in_chans)
    return wide


def _first_kernel(state_dict: Mapping[str, Tensor]) -> str | None:
    """Name the stem's first kernel, of a whole network or of an encoder alone."""
    return next((name for name in state_dict if name.endswith("stem.stages.0.0.weight")), None)


def _examples(names: list[str]) -> str:
    return f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"


def _reference_name(name: str, num_stages: int) -> str | None:
    if match := FLAT_STEM.fullmatch(name):
        stage, part = divmod(int(match[1]), 3)
        return (
            f"encoder.stem.proj.{match[2]}" if stage == num_stages else f"encoder.stem.stages.{stage}.{part}.{match[2]}"
        )
    for pattern, ours in REFERENCE_NAMES:
        if match := re.fullmatch(pattern, name):
            return match.expand(ours)
    return None


def _sync_folder(folder: Path) -> None:
    """Make renames last through a loss of power, where folders can be synced at all."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _to_cpu(content: Any) -> Any:
    if isinstance(content, Tensor):
        return content.detach().cpu()
    if isinstance(content, Mapping):
        return {key: _to_cpu(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(_to_cpu(value) for value in content)
    return content
