"""Weights of the original authors' implementation, from and to ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from ..mistakes import Mistake
from .pretrained import strip_prefixes

__all__ = ["convert_reference_state_dict", "to_reference_state_dict"]

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
        raise Mistake(
            f"{len(unknown)} of {len(reference)} names are not those of the BertsWin reference network: "
            f"{', '.join(unknown[:5])}{', …' if len(unknown) > 5 else ''}; "
            "expected names such as mask_token_enc, patch_embed.0.weight, features.0.0.attn.qkv.weight"
        )
    return converted


def to_reference_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """Rename a network's weights for the authors' implementation: the inverse of :func:`convert_reference_state_dict`.

    Args:
        network: a :class:`~bertswin_mae.networks.BertsWinMAE`.

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
