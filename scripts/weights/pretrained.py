"""Fill networks with weights from files, completely or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import parallel
from ..mistakes import Mistake
from ..networks.bertswin_mae import bertswin_mae_small_patch8_48x64x48
from ..networks.encoder import BertsWinEncoder
from .checkpoints import load

__all__ = [
    "Comparison",
    "bundle_root",
    "compare",
    "encoder_part",
    "has_strict_stem",
    "load_encoder",
    "load_network",
    "load_state_dict",
    "pretrained_encoder",
    "start_from",
    "strict_stem_of",
    "strip_prefixes",
    "widen",
]
# What wrappers put in front of every name: DistributedDataParallel and torch.compile.
WRAPPER_PREFIXES = ("module.", "_orig_mod.")


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read flat weights, wrapper prefixes removed.

    Raises:
        Mistake: when there is no such file, it cannot be read safely, or it holds something else.
    """
    content = load(path)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise Mistake(f"{path} holds no flat weights (name → tensor): use the model.pt of a run")
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
        Mistake: when a name is missing, left over, or of another shape; the network is then unchanged.
    """
    theirs, ours = strip_prefixes(state_dict), network.state_dict()
    comparison = compare(ours, theirs)
    if not comparison.complete:
        raise Mistake(f"the weights in {source} do not fit this network of {len(ours)} tensors: {comparison}")
    network.load_state_dict(parallel.placed_like(theirs, ours))


def start_from(network: nn.Module, pretrained: str | Path | None) -> None:
    """Fill a network with the weights of an earlier training, if there are any to start from.

    Args:
        network: to fill.
        pretrained: flat weights of the same network; None: it stays as it was initialised.

    Raises:
        Mistake: when there is no such file, or anything in it does not fit.
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
        Mistake: for another ``spread``, or weights that are not of one channel.
    """
    if spread not in ("mean", "first"):
        raise Mistake(f"spread {spread!r} must be 'mean' or 'first'")
    first = _first_kernel(state_dict)
    if first is None or state_dict[first].shape[1] != 1:
        found = "no stem" if first is None else f"{state_dict[first].shape[1]} input channels"
        raise Mistake(f"only weights of one input channel can be widened; these have {found}")
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


def load_encoder(network: nn.Module, checkpoint: str | Path) -> nn.Module:
    """Fill an encoder from a checkpoint of the encoder alone, or of the whole pre-training network.

    Args:
        network: to fill; a :class:`~bertswin_mae.networks.BertsWinEncoder`.
        checkpoint: ``encoder.pt`` or ``model.pt`` of a run.

    Returns:
        The network.

    Raises:
        Mistake: when there is no such file, or anything in it does not fit.
    """
    weights = load_state_dict(checkpoint)
    weights = encoder_part(weights) or weights
    strict = has_strict_stem(weights)
    if strict is not None and strict != network.strict_stem:
        raise Mistake(
            f"{checkpoint} has {'a strict' if strict else 'the default'} stem, not what strict_stem "
            f"{network.strict_stem} says: leave strict_stem out, it is read off the weights"
        )
    load_network(network, weights, checkpoint)
    return network


def strict_stem_of(checkpoint: str | Path | None, given: bool | None = None) -> bool:
    """Tell which stem to build.

    Args:
        checkpoint: that will be loaded. Where there is none yet, the strict stem is built.
        given: what the user says, if anything; else it is read off the checkpoint.
    """
    if given is not None or checkpoint is None or not Path(checkpoint).is_file():
        return given is not False
    return bool(has_strict_stem(load_state_dict(checkpoint)))


def bundle_root() -> Path:
    """Tell where the bundle lies, the folder of ``configs`` and ``models``: within the package or around it."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "bundle"
    return installed if installed.is_dir() else package.parent


def pretrained_encoder() -> BertsWinEncoder:
    """Build the small encoder with the weights of ``models/model.pt``; the model card says what they have seen.

    Returns:
        The encoder in evaluation mode: volumes ``(B, 1, 48, 64, 48)`` on the scale [-1, 1] to features
        ``(B, 192, 6, 8, 6)``.

    Raises:
        Mistake: when the weights are not there.
    """
    weights = bundle_root() / "models" / "model.pt"
    encoder = bertswin_mae_small_patch8_48x64x48(strict_stem=strict_stem_of(weights)).encoder
    return load_encoder(encoder, weights).eval()
