"""Convert weights between the original authors' names and ours, with a full account of every tensor.

    python -m scripts.convert from_authors AUTHORS.pt MODEL.pt --config_file "['configs/train.yaml']"
    python -m scripts.convert to_authors MODEL.pt AUTHORS.pt --config_file "['configs/train.yaml']"
    python -m scripts.convert widen MODEL.pt WIDE.pt --in_chans 4 --spread mean

The configs are those that the network was, or will be, trained with: they say what must be there.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fire
from monai.bundle import ConfigParser
from torch import Tensor

from . import weights
from .mistakes import Mistake
from .networks.bertswin_mae import BertsWinMAE
from .weights import checkpoints

__all__ = ["from_authors", "to_authors", "widen"]

CONFIG = "configs/train.yaml"
NETWORK_KNOBS = {
    "img_size": "img_size",
    "patch_size": "patch_size",
    "in_chans": "in_chans",
    "encoder_embed_dim": "encoder_embed_dim",
    "encoder_depth": "encoder_depths",
    "encoder_num_heads": "encoder_num_heads",
    "swin_window_size": "swin_window_size",
    "decoder_embed_dim": "decoder_embed_dim",
    "stem_base_dim": "stem_base_dim",
    "strict_stem": "strict_stem",
}


def from_authors(source: str, target: str, config_file: str | Sequence[str] = CONFIG, **knobs: Any) -> None:
    """Convert a checkpoint of the authors' implementation; nothing is written unless every weight has its place.

    Args:
        source: the authors' file: flat weights, or a training state with ``model_state_dict``.
        target: our flat weights.
        config_file: one or several configs of the network.
        knobs: of the network, over those of the configs, such as ``--strict_stem True``.

    Raises:
        Mistake: with the account, when anything is missing, left over or of another shape.
    """
    content = checkpoints.load(source)
    if not isinstance(content, dict):
        raise Mistake(f"{source} holds a {type(content).__name__}, not weights by name")
    converted = weights.convert_reference_state_dict(content.get("model_state_dict", content))
    network = _filled(_network(config_file, knobs), converted, source)
    checkpoints.save(network.state_dict(), target)
    print(f"wrote {target}")


def to_authors(source: str, target: str, config_file: str | Sequence[str] = CONFIG, **knobs: Any) -> None:
    """Convert our flat weights to a checkpoint that the authors' implementation loads strictly.

    Args:
        source: ``model.pt`` of a run.
        target: the authors' file, with ``model_state_dict``.
        config_file: one or several configs of the network.
        knobs: of the network, over those of the configs, such as ``--strict_stem True``.

    Raises:
        Mistake: with the account, when anything is missing, left over or of another shape.
    """
    network = _filled(_network(config_file, knobs), weights.load_state_dict(source), source)
    checkpoints.save({"model_state_dict": weights.to_reference_state_dict(network)}, target)
    print(f"wrote {target}")


def widen(source: str, target: str, in_chans: int, spread: str) -> None:
    """Make weights for a network of several input channels from those of one.

    Args:
        source: flat weights of a one-channel network or encoder.
        target: flat weights of the wide one.
        in_chans: its channels.
        spread: how the stem's first kernel is spread: ``mean`` gives every channel an equal share, so that equal
            channels give the features of one; ``first`` gives all to the first channel and none to the others. The
            decoder rebuilds every channel as it did the one.

    Raises:
        Mistake: for another ``spread``, or weights that are not of one channel.
    """
    checkpoints.save(weights.widen(weights.load_state_dict(source), in_chans, spread), target)
    print(f"wrote {target}: {in_chans} channels, spread by {spread}")


def _filled(network: BertsWinMAE, state_dict: Mapping[str, Tensor], source: str) -> BertsWinMAE:
    """Account for every tensor, and load them all or none."""
    print(weights.compare(network.state_dict(), state_dict).account())
    weights.load_network(network, state_dict, source)
    return network


def _network(config_file: str | Sequence[str], overrides: dict[str, Any]) -> BertsWinMAE:
    files = [config_file] if isinstance(config_file, str) else list(config_file)
    if missing := [file for file in files if not Path(file).is_file()]:
        raise Mistake(f"there is no config at {missing[0]}")
    if unknown := overrides.keys() - NETWORK_KNOBS:
        raise Mistake(f"there is no knob {min(unknown)} of the network: it has {', '.join(NETWORK_KNOBS)}")
    knobs = ConfigParser.load_config_files(files) | overrides
    settings = {argument: knobs[knob] for knob, argument in NETWORK_KNOBS.items() if knob in knobs}
    for name in ("encoder_depths", "encoder_num_heads"):
        settings[name] = [settings[name]]
    return BertsWinMAE(**settings)


if __name__ == "__main__":
    try:
        fire.Fire({"from_authors": from_authors, "to_authors": to_authors, "widen": widen})
    except Mistake as error:
        sys.exit(f"error: {error}")
