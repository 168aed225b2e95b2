"""What is known of a volume once it was read: plain numbers, which checks, plans and splits are made of."""

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from monai.data import MetaTensor
from nibabel import orientations

from ..mistakes import Mistake, reason
from .reading import read_volume

__all__ = ["PERCENTILES", "Case", "describe_image", "describe_volume"]

Case = dict[str, Any]

PERCENTILES = (0.5, 2.0, 10.0, 50.0, 90.0, 99.5)  # the first and the last are the intensity window of MR
FEW_VALUES = 8  # a label map has few whole numbers; an image, however coarse, has more
MIN_PADDING = 0.005  # share of the voxels, from which on the smallest or largest value is padding
BEYOND_PADDING = 0.001  # share of the voxels that may lie beyond it
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
    facts = describe_image(image)
    if "problem" in facts:
        return facts
    voxels = np.moveaxis(image.as_tensor().numpy(), 0, -1)
    if facts["axes"] != "RAS":  # so that a volume and its copy in another order of axes are one
        voxels = orientations.apply_orientation(voxels, orientations.io_orientation(image.affine.numpy()))
    content = repr(voxels.shape).encode() + np.ascontiguousarray(voxels).tobytes()
    return {"notes": image.meta["notes"], "hash": hashlib.sha256(content).hexdigest()[:32], **facts}


def describe_image(image: MetaTensor) -> dict[str, Any]:
    """Tell ``affine``, ``spacing`` in mm and ``axes`` such as ``RAS`` of a volume, and of its voxels.

    The latter are ``shape`` ``[C, D, H, W]`` and, of each of the ``channels``: ``min``, ``max`` and ``not_finite``;
    ``padding``, the shares of the voxels with the smallest or largest value, where that is padding; ``percentiles`` of
    all and ``seen`` of all but padding; ``lowest``, which beside padding is the second percentile of what lies off it;
    ``values``, if they are few; and the share of ``equal`` neighbours, if all are whole numbers.
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
    below, above = _padding(firsts, counts)
    start, stop = firsts[below] + counts[below] if below is not None else 0, None if above is None else firsts[above]
    ends = [end for end in (below, above) if end is not None]
    padding = {str(float(sample[firsts[end]])): round(float(counts[end]) / len(sample), 4) for end in ends}
    seen = _percentiles(sample[start:stop])
    facts |= {"min": low, "max": high, "padding": padding, "percentiles": _percentiles(sample), "seen": seen}
    facts["lowest"] = low if below is None else _lowest_off(voxels, sample[firsts[below]])
    values = sample[firsts]
    if np.array_equal(values, values.round()):
        facts |= {"values": values.tolist() if len(values) <= FEW_VALUES else None}
        inner = np.delete(np.arange(len(values)), ends)
        background = [*values[ends], values[inner[counts[inner].argmax()]]]
        facts["equal"] = round(_equal_neighbours(voxels, background), 4)
    return facts


def _padding(firsts: np.ndarray, counts: np.ndarray) -> tuple[int | None, int | None]:
    """Find the values of padding at both ends: frequent ones, beyond which there is next to nothing."""
    size = counts.sum()
    frequent = np.flatnonzero(counts >= MIN_PADDING * size)
    if len(firsts) < 3 or not len(frequent):
        return None, None
    below, above = int(frequent[0]), int(frequent[-1])
    has_below = firsts[below] <= BEYOND_PADDING * size
    has_above = above != below and size - firsts[above] - counts[above] <= BEYOND_PADDING * size
    return below if has_below else None, above if has_above else None


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


def _lowest_off(voxels: np.ndarray, padding: float) -> float:
    """Tell the second percentile of what lies off padding, without its edge, which resampling blurs."""
    slices = voxels[:, :, :: max(1, voxels.shape[2] // 8)]
    near = np.pad(slices <= padding, ((1, 1), (1, 1), (0, 0)))
    near = near[1:-1, 1:-1] | near[2:, 1:-1] | near[:-2, 1:-1] | near[1:-1, 2:] | near[1:-1, :-2]
    return float(np.percentile(slices[~near], 2)) if not near.all() else float(padding)


def _equal_neighbours(voxels: np.ndarray, background: Sequence[float]) -> float:
    """Tell the share of neighbours within slices that are equal, of those that are not both of a background."""
    slices = voxels[:, :, :: max(1, voxels.shape[2] // 8)]
    equal = pairs = 0
    for one, other in ((slices[1:], slices[:-1]), (slices[:, 1:], slices[:, :-1])):
        same, both = one == other, np.isin(one, background)
        equal += int((same & ~both).sum())
        pairs += int(same.size - (same & both).sum())
    return equal / max(1, pairs)
