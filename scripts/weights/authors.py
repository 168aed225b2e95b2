"""Weights of the original authors' implementation, from and to ours."""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from ..mistakes import Mistake
from .pretrained import strip_prefixes

__all__ = ["convert_reference_state_dict", "to_reference_state_dict"]

# Fixed by formula, so not part of our state dict.
DERIVED = re.compile(r"pos_embed|features\.0\.\d+\.attn\.relative_position_index")


def convert_reference_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the authors' implementation for :class:`BertsWinMAE`, strictly loadable.

    Args:
        state_dict: the authors' weights, flat; ``module.`` and ``_orig_mod.`` prefixes are removed.

    Returns:
        The same tensors under our names. Positions and relative position indices are left out: they are fixed by
        formula.

    Raises:
        Mistake: when a name is not one of the authors' network.
    """
    theirs = {name: value for name, value in strip_prefixes(state_dict).items() if not DERIVED.fullmatch(name)}
    blocks = {match[1] for name in theirs if (match := re.match(r"features\.0\.(\d+)\.", name))}
    flat = [int(match[1]) for name in theirs if (match := re.match(r"patch_embed\.(\d+)\.", name))]
    prefixes = {theirs: ours for ours, theirs in _prefixes(len(blocks), max(flat) // 3 if flat else None).items()}
    if unknown := [name for name in theirs if not name.startswith(tuple(prefixes))]:
        raise Mistake(
            f"{len(unknown)} of {len(theirs)} names are not those of the BertsWin reference network: "
            f"{', '.join(unknown[:5])}{', …' if len(unknown) > 5 else ''}; "
            "expected names such as mask_token_enc, patch_embed.0.weight, features.0.0.attn.qkv.weight"
        )
    return _renamed(theirs, prefixes)


def to_reference_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """Rename a network's weights for the authors' implementation: the inverse of :func:`convert_reference_state_dict`.

    Args:
        network: a :class:`~bertswin_mae.networks.BertsWinMAE`.

    What the authors' state dict holds beside is added: positions ``(1, N, C)`` and relative position indices.
    """
    encoder, blocks = network.encoder, network.encoder.swin.blocks
    num_stages = None if encoder.strict_stem else len(encoder.stem.stages)
    renamed = _renamed(network.state_dict(), _prefixes(len(blocks), num_stages))
    renamed["pos_embed"] = encoder.positions.flatten(2).mT.contiguous()
    for number, block in enumerate(blocks):
        renamed[f"features.0.{number}.attn.relative_position_index"] = block.attn.relative_position_index
    return renamed


def _prefixes(depth: int, num_stages: int | None) -> dict[str, str]:
    """Map our prefixes to the authors', the more special first.

    Args:
        depth: Swin blocks.
        num_stages: of the default stem, which is one flat sequence of (conv, norm, activation) stages and a projection
            in the authors' code; None: of the strict one, whose names are ours.
    """
    prefixes = {}
    for block in range(depth):
        ours, theirs = f"encoder.swin.blocks.{block}.", f"features.0.{block}."
        prefixes |= {f"{ours}mlp.linear1.": f"{theirs}mlp.0.", f"{ours}mlp.linear2.": f"{theirs}mlp.3.", ours: theirs}
    if num_stages is not None:
        for stage in range(num_stages):
            prefixes |= {f"encoder.stem.stages.{stage}.{part}.": f"patch_embed.{3 * stage + part}." for part in (0, 1)}
        prefixes["encoder.stem.proj."] = f"patch_embed.{3 * num_stages}."
    return prefixes | {
        "encoder.stem.": "patch_embed.",
        "decoder.embed.": "decoder_embed.",
        "decoder.head.": "decoder_head.",
        "mask_token": "mask_token_enc",
    }


def _renamed(weights: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in weights.items():
        old = next(prefix for prefix in prefixes if name.startswith(prefix))
        renamed[prefixes[old] + name.removeprefix(old)] = value
    return renamed
