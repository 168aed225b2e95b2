"""Convert weights: from and to the original authors' names, to several channels, to safetensors.

    python -m scripts.convert from_authors AUTHORS.pt MODEL.pt --config_file "['configs/train.yaml']"
    python -m scripts.convert to_authors MODEL.pt AUTHORS.pt --config_file "['configs/train.yaml']"
    python -m scripts.convert widen MODEL.pt WIDE.pt --in_chans 4 --spread mean
    python -m scripts.convert to_safetensors MODEL.pt MODEL.safetensors

The configs are those that the network was, or will be, trained with: they say what must be there. Knobs of the network
on the command line count over theirs, such as `--strict_stem True`. Every tensor is accounted for; nothing is written
unless all have a place.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from torch import Tensor

from . import weights
from .knobs import read
from .mistakes import Mistake, command
from .networks import BertsWinMAE

__all__ = ["from_authors", "to_authors", "to_safetensors", "widen"]

CONFIG = "configs/train.yaml"
# What the configs call what gives the network's weights their shapes.
NETWORK_KNOBS = (
    *("img_size", "patch_size", "in_chans", "encoder_embed_dim", "encoder_depth", "encoder_num_heads"),
    *("swin_window_size", "decoder_embed_dim", "stem_base_dim", "strict_stem"),
)


def from_authors(source: str, target: str, config_file: str | Sequence[str] = CONFIG, **knobs: Any) -> None:
    """Convert a checkpoint of the authors' implementation.

    Args:
        source: the authors' file: flat weights, or a training state with ``model_state_dict``.
        target: our flat weights.
        config_file: one or several configs of the network.
        knobs: of the network, over those of the configs.

    Raises:
        Mistake: with the account, when anything is missing, left over or of another shape.
    """
    content = weights.load(source)
    if not isinstance(content, dict):
        raise Mistake(f"{source} holds a {type(content).__name__}, not weights by name")
    converted = weights.convert_reference_state_dict(content.get("model_state_dict", content))
    network = _filled(_network(config_file, knobs), converted, source)
    _save(network.state_dict(), {"format": 1, "network": network.settings}, target)
    print(f"wrote {target}")


def to_authors(source: str, target: str, config_file: str | Sequence[str] = CONFIG, **knobs: Any) -> None:
    """Convert our flat weights to a checkpoint that the authors' implementation loads strictly.

    Arguments and errors as for :func:`from_authors`; the target holds ``model_state_dict``.
    """
    if Path(target).suffix == ".safetensors":
        raise Mistake(f"{target} would hold flat weights, and the authors' checkpoint is none: let it end in .pt")
    network = _filled(_network(config_file, knobs), weights.read_weights(source), source)
    weights.save({"model_state_dict": weights.to_reference_state_dict(network)}, target)
    print(f"wrote {target}")


def widen(source: str, target: str, in_chans: int, spread: str) -> None:
    """Make weights for a network, or an encoder, of several input channels from those of one.

    ``spread`` says how the stem's first kernel is spread: ``mean`` gives every channel an equal share, ``first`` gives
    all to the first one; see :func:`~bertswin_mae.weights.widen`.
    """
    in_chans = read("in_chans", in_chans, 1)
    wide = weights.widen(weights.read_weights(source), in_chans, spread)
    record = weights.read_record(source)
    network = weights.recorded(record, "network") | {"in_chans": in_chans}
    _save(wide, record and record | {"network": network}, target)
    print(f"wrote {target}: {in_chans} channels, spread by {spread}")


def to_safetensors(source: str, target: str) -> None:
    """Write flat weights as ``.safetensors``, for publishing, with what they carry in its head."""
    if Path(target).suffix != ".safetensors":
        raise Mistake(f"{target} must end in .safetensors")
    _save(weights.read_weights(source), weights.read_record(source), target)
    print(f"wrote {target}")


def _save(state_dict: dict[str, Tensor], record: dict[str, Any], target: str) -> None:
    """Write weights with what they carry: in the head of a .safetensors, else as JSON beside them."""
    if Path(target).suffix == ".safetensors":
        weights.save(state_dict, target, head={"record": json.dumps(record)})
        return
    beside = Path(target).with_suffix(".json")
    known = weights.read_record(target)
    if beside.exists() and (not record or not known.keys() & {"format", "network", "preprocessing"}):
        raise Mistake(f"{beside} tells of something else than what {target} would hold: choose another name")
    weights.save(state_dict, target)
    if record:
        weights.write_record(record, target)


def _filled(network: BertsWinMAE, state_dict: Mapping[str, Tensor], source: str) -> BertsWinMAE:
    """Account for every tensor, and load them all or none."""
    print(weights.compare(network.state_dict(), state_dict).account())
    weights.fill(network, state_dict, source)
    return network


def _network(config_file: str | Sequence[str], overrides: dict[str, Any]) -> BertsWinMAE:
    files = [config_file] if isinstance(config_file, str) else list(config_file)
    if missing := [file for file in files if not Path(file).is_file()]:
        raise Mistake(f"there is no config at {missing[0]}")
    if unknown := overrides.keys() - NETWORK_KNOBS:
        raise Mistake(f"there is no knob {min(unknown)} of the network: it has {', '.join(NETWORK_KNOBS)}")
    try:
        knobs = ConfigParser.load_config_files(files)
    except KeyError as error:  # of an overlay that changes what is not there
        raise Mistake(f"{', '.join(files)} change what none of them holds ({error}): name train.yaml first") from error
    if missing := [name for name in ("encoder_depth", "encoder_num_heads") if name not in knobs]:
        raise Mistake(f"{', '.join(files)} does not say {missing[0]} of the network: name train.yaml first")
    knobs |= {name: read(name, value, knobs.get(name)) for name, value in overrides.items()}
    settings = {name: knobs[name] for name in NETWORK_KNOBS if name in knobs}
    depth, num_heads = settings.pop("encoder_depth"), settings.pop("encoder_num_heads")
    return BertsWinMAE(encoder_depths=[depth], encoder_num_heads=[num_heads], **settings)


if __name__ == "__main__":
    commands = {"from_authors": from_authors, "to_authors": to_authors, "widen": widen}
    command({**commands, "to_safetensors": to_safetensors})
