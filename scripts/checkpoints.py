"""Weights on disk: save them whole or not at all, load them safely, convert them from the original authors' names."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "convert_reference_state_dict",
    "encoder_part",
    "load",
    "load_network",
    "load_state_dict",
    "save",
    "strip_prefixes",
]

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


def save(content: Any, path: str | Path) -> None:
    """Write a checkpoint beside its place, sync it and rename it there: a kill leaves the old file or the new one.

    Args:
        content: what ``torch.save`` takes; tensors are stored on the CPU, so that any machine can read them.
        path: where the file goes; its folder is made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save(_to_cpu(content), file)
            file.flush()
            os.fsync(file.fileno())
        Path(beside).chmod(0o644)
        Path(beside).replace(path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def load(path: str | Path) -> Any:
    """Read a checkpoint onto the CPU, tensors and primitives only: nothing in the file is executed.

    Raises:
        ValueError: when there is no such file, or it is not a checkpoint that can be read safely.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint at {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors and plain values: {str(error).splitlines()[0]}"
        ) from error


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read flat weights, wrapper prefixes removed.

    Raises:
        ValueError: when there is no such file, it cannot be read safely, or it holds something else.
    """
    content = load(path)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no flat weights (name → tensor): use the model.pt of a run")
    return strip_prefixes(content)


def encoder_part(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the encoder's weights out of a whole network's, under the encoder's own names."""
    prefix = "encoder."
    return {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}


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
    missing, unexpected = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    reshaped = [
        f"{name} {tuple(theirs[name].shape)} instead of {tuple(ours[name].shape)}"
        for name in ours.keys() & theirs.keys()
        if theirs[name].shape != ours[name].shape
    ]
    wrong = {"missing": missing, "unexpected": unexpected, "of another shape": sorted(reshaped)}
    if any(wrong.values()):
        report = "; ".join(
            f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
            for what, names in wrong.items()
            if names
        )
        raise ValueError(f"the weights in {source} do not fit this network of {len(ours)} tensors: {report}")
    network.load_state_dict(theirs)


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


def _to_cpu(content: Any) -> Any:
    if isinstance(content, Tensor):
        return content.detach().cpu()
    if isinstance(content, Mapping):
        return {key: _to_cpu(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(_to_cpu(value) for value in content)
    return content
