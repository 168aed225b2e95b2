"""Weights on disk: written whole, read safely, filled in completely, converted from the authors' names."""

from .authors import convert_reference_state_dict, to_reference_state_dict
from .checkpoints import DamagedCheckpointError, load, load_newest, previous, save
from .pretrained import (
    Comparison,
    bundle_root,
    compare,
    encoder_part,
    has_strict_stem,
    load_encoder,
    load_network,
    load_state_dict,
    pretrained_encoder,
    start_from,
    strict_stem_of,
    strip_prefixes,
    widen,
)

__all__ = [
    "Comparison",
    "DamagedCheckpointError",
    "bundle_root",
    "compare",
    "convert_reference_state_dict",
    "encoder_part",
    "has_strict_stem",
    "load",
    "load_encoder",
    "load_network",
    "load_newest",
    "load_state_dict",
    "pretrained_encoder",
    "previous",
    "save",
    "start_from",
    "strict_stem_of",
    "strip_prefixes",
    "to_reference_state_dict",
    "widen",
]
