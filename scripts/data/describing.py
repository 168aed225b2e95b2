"""What is known of a volume once it was read: plain numbers, which checks, plans and splits are made of."""

import hashlib
import math
from functools import lru_cache
from typing import Any

import numpy as np
from monai.data import MetaTensor
from nibabel import orientations

from ..mistakes import Mistake, reason
from .reading import read_volume

__all__ = ["PERCENTILES", "Case", "describe_image", "describe_volume"]

Case = dict[str, Any]

PERCENTILES = (0.5, 10.0, 50.0, 90.0, 99.5)  # the first and the last are the intensity window of MR
FEW_VALUES = 8  # a label map has few whole numbers; an image, however coarse, has more
MIN_PADDING = 0.005  # share of the voxels, from which on the smallest or largest value is padding
SAMPLE = 2**13  # voxels that percentiles are taken of: to a few tenths of a percent of the voxels


def describe_volume(case: Case) -> dict[str, Any]:
    """Read the image of a case, and tell what is known of it then; it can be written as JSON.

    Returns:
        ``problem`` alone, if it cannot be read; else ``notes`` on the header, a ``hash`` of the voxels, and what
        :func:`describe_image` says.
    """
    try:
        image = read_volume(case["image"])
    except Exception as error:  # readers fail in many ways; each is a volume that cannot be used
        return {"problem": str(error) if isinstance(error, Mistake) else f"cannot be read ({reason(error)})"}
    content = repr(tuple(image.shape)).encode() + image.as_tensor().numpy().tobytes()
    return {"notes": image.meta["notes"], "hash": hashlib.sha256(content).hexdigest()[:32], **describe_image(image)}


def describe_image(image: MetaTensor) -> dict[str, Any]:
    """Tell ``affine``, ``spacing`` in mm and ``axes`` such as ``RAS`` of a volume, and of its voxels.

    The latter are ``shape`` ``[C, D, H, W]`` and, of each of the ``channels``: ``min``, ``max`` and ``not_finite``;
    ``padding``, the shares of the voxels with the smallest or largest value, where that is padding; ``percentiles`` of
    all and ``seen`` of all but padding; ``lowest`` but padding; ``values``, if they are few; and the share of ``equal``
    neighbours, if all are whole numbers.
    """
    affine, voxels = image.affine.numpy(), image.as_tensor().numpy()
    facts = {"shape": list(voxels.shape), "affine": affine.round(6).tolist()}
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        return {"problem": f"has an affine that maps voxels to no place in space: {affine[:3].round(6).tolist()}"}
    facts["spacing"] = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    facts["axes"] = _axes(tuple(affine.ravel().tolist()))
    return facts | {"channels": [_describe_channel(channel) for channel in voxels]}


@lru_cache
def _axes(affine: tuple[float, ...]) -> str:
    return "".join(orientations.aff2axcodes(np.reshape(affine, (4, 4))))


def _describe_channel(voxels: np.ndarray) -> dict[str, Any]:
    facts: dict[str, Any] = {"min": 0.0, "max": 0.0, "not_finite": 0}
    if voxels.size == 0:
        return facts
    low, high = float(voxels.min()), float(voxels.max())
    if not math.isfinite(low) or not math.isfinite(high):
        return facts | {"not_finite": int(voxels.size - np.isfinite(voxels).sum())}
    sample = np.sort(_sampled(voxels))
    firsts = np.flatnonzero(np.concatenate([[True], sample[1:] != sample[:-1]]))  # of each value, in its order
    counts = np.diff(np.append(firsts, len(sample)))
    ends = [end for end in (0, -1) if counts[end] >= MIN_PADDING * len(sample) and len(firsts) > 2]
    start, stop = firsts[1] if 0 in ends else 0, firsts[-1] if -1 in ends else len(sample)
    padding = {str(float(sample[firsts[end]])): round(float(counts[end]) / len(sample), 4) for end in ends}
    lowest = low
    if 0 in ends and sample[0] == low:
        lowest = float(voxels.min(where=voxels > low, initial=np.inf))
    facts |= {"min": low, "max": high, "lowest": lowest, "padding": padding}
    facts |= {"percentiles": _percentiles(sample), "seen": _percentiles(sample[start:stop])}
    values = sample[firsts]
    if np.array_equal(values, values.round()):
        facts |= {"values": values.tolist() if len(values) <= FEW_VALUES else None}
        facts["equal"] = round(_equal_neighbours(voxels, values[counts.argmax()]), 4)
    return facts


def _sampled(voxels: np.ndarray) -> np.ndarray:
    """Take every so many voxels, by a step that meets all columns of a volume."""
    flat = voxels.ravel()
    step = -(-flat.size // SAMPLE)
    while step > 1 and math.gcd(step, flat.size) > 1:
        step += 1
    return flat[::step]


def _percentiles(ordered: np.ndarray) -> list[float]:
    places = np.array(PERCENTILES) / 100 * (len(ordered) - 1)
    below = ordered[np.floor(places).astype(int)].astype(float)
    return (below + (places % 1) * (ordered[np.ceil(places).astype(int)] - below)).tolist()


def _equal_neighbours(voxels: np.ndarray, background: float) -> float:
    """Tell the share of neighbours within slices that are equal, of those that are not both background."""
    slices = voxels[:, :, :: max(1, voxels.shape[2] // 8)]
    equal = pairs = 0
    for one, other in ((slices[1:], slices[:-1]), (slices[:, 1:], slices[:, :-1])):
        same, both = one == other, one == background
        equal += int((same & ~both).sum())
        pairs += int(same.size - (same & both).sum())
    return equal / max(1, pairs)
