"""From weights of one input channel to weights of several."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..mistakes import Mistake

__all__ = ["widen"]


def widen(state_dict: Mapping[str, Tensor], in_chans: int, spread: str) -> dict[str, Tensor]:
    """Make weights for a network of several input channels, each rebuilt by its decoder as the one, from those of one.

    Args:
        state_dict: flat weights of a one-channel network, or of its encoder alone.
        in_chans: channels of the wide network.
        spread: of the stem's first kernel: every channel gets an equal share (``mean``), or the first all (``first``).

    Raises:
        Mistake: for another ``spread``, or weights that are not of one channel.
    """
    if spread not in ("mean", "first"):
        raise Mistake(f"spread {spread!r} must be 'mean' or 'first'")
    # The stem's first kernel, of a whole network or of an encoder alone.
    first = next((name for name in state_dict if name.endswith("stem.stages.0.0.weight")), None)
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
