"""Fill networks with weights: completely, or not at all and with an account of what does not fit."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from .. import parallel
from ..mistakes import Mistake
from .checkpoints import load

__all__ = ["Comparison", "build_pretrained", "bundle_root", "bundle_version", "compare", "encoder_part", "fill"]
__all__ += ["read_weights", "stem_is_strict", "strip_prefixes"]

# What DistributedDataParallel and torch.compile put in front of every name.
WRAPPERS = r"^(module\.|_orig_mod\.)+"


def fill(network: nn.Module, weights: Mapping[str, Tensor] | str | Path | None, source: str | Path = "") -> nn.Module:
    """Fill a network with all of its weights, and return it: the one way from a file into a network.

    Args:
        network: to fill. An encoder takes the encoder's part of a whole network's weights.
        weights: a file, or its content; None: the network stays as it was initialised.
        source: the file that content came from, for messages.

    Raises:
        Mistake: when there is no such file, or a tensor is missing, left over, or of another shape; nothing is changed.
    """
    if weights is None:
        return network
    if isinstance(weights, str | Path):
        weights, source = read_weights(weights), weights
    theirs, ours = strip_prefixes(weights), network.state_dict()
    if not encoder_part(ours):
        theirs = encoder_part(theirs) or theirs
    comparison = compare(ours, theirs)
    if not comparison.complete:
        raise Mistake(f"the weights in {source} do not fit this network of {len(ours)} tensors: {comparison}")
    network.load_state_dict(parallel.shard_like(theirs, ours))
    return network


def build_pretrained(
    build: Callable[..., nn.Module],
    weights: str | Path | None,
    strict_stem: bool | None = None,
    part: str | None = None,
    like: str | Path | None = None,
) -> nn.Module:
    """Build a network with the kind of stem that its weights have, and fill it.

    Args:
        build: makes the network, given ``strict_stem``.
        weights: a file; None, where ``like`` is given: the network stays as it was initialised.
        strict_stem: what the user says, if anything; else it is read off the weights. With none to read off, the stem
            is the default one.
        part: what of the network to fill, such as ``encoder``; default: all of it.
        like: a file, if it is there by now, that the network will be filled with later: its stem is of that kind.
    """
    if weights is None and like is None:
        raise Mistake("give --pretrained, the model.pt of a pre-training or a tuning, or an encoder.pt")
    state_dict = None if weights is None else read_weights(weights)
    if state_dict is not None:
        strict_stem = stem_is_strict(state_dict, weights, strict_stem)
    elif strict_stem is None:
        strict_stem = Path(like).is_file() and stem_is_strict(read_weights(like), like)
    network = build(strict_stem=strict_stem)
    fill(getattr(network, part) if part else network, state_dict, weights)
    return network


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read flat weights, wrapper prefixes removed; a Mistake when a file holds something else, or cannot be read."""
    content = load(path)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise Mistake(f"{path} holds no flat weights (name → tensor): use the model.pt of a run")
    return strip_prefixes(content)


def stem_is_strict(state_dict: Mapping[str, Tensor], source: str | Path, given: bool | None = None) -> bool:
    """Tell from the weights whether the stem's kernels do not overlap; a Mistake when ``given`` says otherwise."""
    strict = any(
        name.endswith("stem.stages.0.0.weight") and kernel.shape[-1] == 2 for name, kernel in state_dict.items()
    )
    if given not in (None, strict):
        raise Mistake(
            f"{source} has {'a strict' if strict else 'the default'} stem, not what strict_stem {given} says: leave "
            "strict_stem out, it is read off the weights"
        )
    return strict


def strip_prefixes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove what wrappers put in front of the names, in any order."""
    return {re.sub(WRAPPERS, "", name): value for name, value in state_dict.items()}


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
        lists = ((what, len(names), ", ".join(names[:3])) for what, names in self._asdict().items() if names)
        return "; ".join(f"{count} {what} ({names}{', …' if count > 3 else ''})" for what, count, names in lists)

    def account(self) -> str:
        """Name every tensor, one a line."""
        lines = (f"{what:>10}  {name}" for what, names in self._asdict().items() for name in names)
        return "\n".join([*lines, "; ".join(f"{len(names)} {what}" for what, names in self._asdict().items())])


def compare(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Comparison:
    """Compare the weights a network has with those it is offered, both under our names."""
    common = [name for name in ours if name in theirs]
    reshaped = [name for name in common if theirs[name].shape != ours[name].shape]
    return Comparison(
        matched=[name for name in common if name not in reshaped],
        missing=[name for name in ours if name not in theirs],
        unexpected=[name for name in theirs if name not in ours],
        reshaped=[f"{name} {tuple(theirs[name].shape)} instead of {tuple(ours[name].shape)}" for name in reshaped],
    )


def bundle_root() -> Path:
    """Tell where the bundle lies, the folder of ``configs`` and ``models``: within the package or around it."""
    package = Path(__file__).resolve().parents[1]
    return package / "bundle" if (package / "bundle").is_dir() else package.parent


def bundle_version(root: Path | None = None) -> str:
    """Tell the version of a bundle, which stands in its metadata alone; default: of this one."""
    return json.loads(((root or bundle_root()) / "configs" / "metadata.json").read_text(encoding="utf-8"))["version"]
