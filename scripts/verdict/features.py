"""Figures of a feature space, without labels: how wide it is, what it holds on to, and what it tells apart."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

__all__: list[str] = []

DEAD = 0.01  # of the features' root mean square: a channel that varies less is dead
CONTRAST = 0.1  # by which the intensity change widens the intensities
SYMMETRIC = 0.7  # correlation of volumes with their mirror images from which on they count as symmetric

Encode = Callable[[Tensor, Tensor], Tensor]  # (B, C, D, H, W) and valid patches (B, N) to (B, channels, *grid)


class Pairs(NamedTuple):
    """Tokens of volumes as they are and changed in one way, at the places that both show, ``(M, channels)`` each.

    And the embeddings of the changed volumes, ``(B, channels)``: means of their tokens.
    """

    before: Tensor
    after: Tensor
    embeddings: Tensor


class Look(NamedTuple):
    """What was seen of some volumes."""

    tokens: list[Tensor]  # of the valid patches of each volume, (n, channels)
    changed: dict[str, Pairs]  # by the way of changing
    symmetry: list[float]  # of each volume, the correlation with its mirror image


def look(volume: Tensor, valid: Tensor, encode: Encode) -> Look:
    """Encode volumes as they are, and changed in each way.

    Args:
        volume: ``(B, C, D, H, W)``.
        valid: ``(B, N)`` bool, the patches to look at.
        encode: maps both to features ``(B, channels, D/P, H/P, W/P)``.
    """
    features = encode(volume, valid)
    grid, mask = features.shape[2:], valid.unflatten(1, features.shape[2:])
    size = volume.shape[2] // grid[0]
    inner, outer = (..., *[slice(None, -1)] * 3), (..., *[slice(1, None)] * 3)
    moved = shift(mask[:, None].float(), 1)[:, 0] > 0
    changes = {
        # What lies in a patch lies in the next one along each axis.
        "shift": (shift(volume, size), moved, inner, lambda changed: changed[outer]),
        "turn": (turn(volume, size), mask, ..., lambda changed: changed),
        "intensity": (stretch(volume), mask, ..., lambda changed: changed),
        "mirror": (volume.flip(2), mask.flip(1), ..., lambda changed: changed.flip(-3)),
    }
    pairs = {}
    for name, (changed, seen, here, back) in changes.items():
        after = encode(changed, seen.flatten(1))
        both = mask[here] & back(seen)
        before_tokens, after_tokens = (rows.movedim(1, -1)[both] for rows in (features[here], back(after)))
        embeddings = torch.stack([own.mean(dim=0) for own in _tokens(after, seen)])
        pairs[name] = Pairs(before_tokens.cpu(), after_tokens.cpu(), embeddings.cpu())
    tokens = [own.cpu() for own in _tokens(features, mask)]
    return Look(tokens, pairs, [_symmetry(*pair) for pair in zip(F.avg_pool3d(volume, size), mask, strict=True)])


def summary(looks: Sequence[Look]) -> dict[str, float]:
    """Return the figures of all volumes that were looked at, by name: see ``docs/verdict.md``.

    ``mirror_change`` is there for volumes that are symmetric themselves, ``patient_ratio`` from two volumes on.
    """
    tokens = [own for one in looks for own in one.tokens]
    rows, embeddings = torch.cat(tokens), torch.stack([own.mean(dim=0) for own in tokens])
    figures = {
        "effective_rank": effective_rank(rows),
        "dead_channels": dead_channels(rows),
        "token_cosine": sum(map(token_cosine, tokens)) / len(tokens),
    }
    symmetry = [own for one in looks for own in one.symmetry]
    for name in looks[0].changed:
        if name != "mirror" or sum(symmetry) / len(symmetry) > SYMMETRIC:
            before, after = (torch.cat([one.changed[name][place] for one in looks]) for place in (0, 1))
            figures[f"{name}_change"] = change(before, after, rows)
    if len(tokens) > 1:
        crops = torch.cat([one.changed["shift"].embeddings for one in looks])
        figures["patient_ratio"] = patient_ratio(embeddings, crops)
    return figures


def effective_rank(tokens: Tensor) -> float:
    """Exponential of the entropy of the covariance's spectrum: 1 on a line, C if all directions vary alike."""
    if len(tokens) < 2:
        return 1.0
    spectrum = torch.linalg.eigvalsh(torch.cov(tokens.double().T)).clamp(min=0)
    shares = spectrum / spectrum.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return math.exp(torch.special.entr(shares).sum().item())


def dead_channels(tokens: Tensor) -> float:
    """Share of the channels that hardly vary over tokens ``(M, C)``."""
    return (tokens.std(dim=0) <= DEAD * tokens.square().mean().sqrt()).double().mean().item()


def token_cosine(tokens: Tensor) -> float:
    """Mean cosine between two tokens of a volume, ``(n, C)``."""
    count, unit = len(tokens), F.normalize(tokens.double(), dim=1)
    return (unit.sum(dim=0).square().sum().item() - count) / max(1, count * (count - 1))


def change(before: Tensor, after: Tensor, tokens: Tensor) -> float:
    """How far tokens ``(M, C)`` move, over how far any two of ``tokens`` lie apart: 0 is not at all, 1 as far."""
    moved, apart = (after - before).double().square().sum(dim=1).mean(), 2 * tokens.double().var(dim=0).sum()
    return (moved / apart).sqrt().item() if len(before) and apart > 0 else 0.0


def patient_ratio(embeddings: Tensor, crops: Tensor) -> float:
    """Root mean square distance between volumes ``(B, C)``, over that between two crops of one volume."""
    between = (2 * embeddings.double().var(dim=0).sum()).sqrt()
    within = (crops - embeddings).double().square().sum(dim=1).mean().sqrt()
    return (between / within).item() if within > 0 else 1.0


def shift(volume: Tensor, voxels: int) -> Tensor:
    """Move a volume ``(B, C, D, H, W)`` forward along each axis; the border goes on behind it."""
    sides = (..., *(slice(side) for side in volume.shape[2:]))
    return F.pad(volume, (voxels, 0) * 3, mode="replicate")[sides]


def turn(volume: Tensor, patch_size: int) -> Tensor:
    """Turn a volume about its last axis, so little that its border moves by a quarter of a patch."""
    angle = math.atan(patch_size / 4 / (max(volume.shape[2:4]) / 2))
    depth, height = volume.shape[2:4]
    theta = torch.eye(3, 4)
    # The rows are the last axis, the second and the first, and all reach from -1 to 1.
    theta[1, 1] = theta[2, 2] = math.cos(angle)
    theta[1, 2], theta[2, 1] = -math.sin(angle) * depth / height, math.sin(angle) * height / depth
    grid = F.affine_grid(theta.expand(len(volume), 3, 4), list(volume.shape), align_corners=False)
    return F.grid_sample(volume, grid.to(volume), padding_mode="border", align_corners=False)


def stretch(volume: Tensor) -> Tensor:
    """Widen the intensities of each volume about their mean, within their own range."""
    flat = volume.flatten(1)
    low, mean, high = (values.view(-1, 1, 1, 1, 1) for values in (flat.amin(1), flat.mean(1), flat.amax(1)))
    return (mean + (1 + CONTRAST) * (volume - mean)).clamp(low, high)


def _tokens(features: Tensor, mask: Tensor) -> list[Tensor]:
    return [own.movedim(0, -1)[seen] for own, seen in zip(features, mask, strict=True)]


def _symmetry(means: Tensor, mask: Tensor) -> float:
    """Correlation of the means of valid patches ``(C, *grid)`` with those at the mirrored places."""
    both = mask & mask.flip(0)
    sides = torch.stack([means[:, both].flatten(), means.flip(1)[:, both].flatten()])
    return torch.corrcoef(sides.double())[0, 1].nan_to_num(0.0).item() if both.sum() > 1 else 0.0
