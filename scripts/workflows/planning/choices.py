"""What to choose for a cohort and a machine, with the reason of each choice."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ... import machine
from ...data import Facts, choose_cache, geometry_in_ras, prepared_bytes, resampled_shape
from ...mistakes import Mistake
from .cohort import Cohort

__all__ = ["SIZES", "Settings", "about_network", "about_schedule", "about_volumes", "grid_of", "size_of"]
__all__ += ["spacing_of"]

Settings = dict[str, tuple[Any, str]]  # by knob: its value, and why

# Sides of a grid of tokens, and windows that divide them: two or more of three tokens, or the whole axis.
WINDOWS = {4: 4, 5: 5, 6: 3, 7: 7, 8: 4, 9: 3, 10: 5, 12: 4, 14: 7}
COVERAGE = 3  # a crop shows at least this part of a volume's side, else patches have nothing to be told from
HOMOGENEOUS = 0.02  # share that spacings may differ by, and still be one
ANISOTROPIC = 3.0  # ratio of sides from which on the coarse one is taken from the finer volumes (nnU-Net's rule)
SHORT = "stem_tuning=15, segmentation=20, classification=20"  # epochs of what follows a pre-training
DRAWS = 9600  # of a pre-training on few volumes: that of the quick start
DRAWS_OF_EACH = 250  # volume, on many: see docs/results.md


@dataclass(frozen=True)
class Size:
    """A network's size, and what goes with it."""

    patch_size: int
    width: int
    blocks: int
    heads: int
    decoder: int
    tokens: int  # at once, at most
    learning_rate: float
    batch_size: int  # to try first


SIZES = {
    "small": Size(8, 192, 6, 6, 256, 512, 0.0015, 4),  # the rate is the best of four, of heads and of hippocampi
    "medium": Size(8, 384, 8, 6, 384, 1000, 0.0005, 16),
    "base": Size(16, 768, 12, 12, 512, 2744, 0.00015, 16),
}


def about_volumes(cohort: Cohort) -> Settings:
    """Choose what follows from the volumes' kind."""
    settings: Settings = {"modality": (cohort.modality, "by the headers and values of all volumes")}
    unusable = len(cohort.problems) - cohort.problems.count(None)
    if cohort.channels > 1:
        settings["in_chans"] = (cohort.channels, "channels that most volumes have")
    if unusable or not cohort.complete:
        settings["skip_invalid"] = (
            True,
            f"{unusable} volumes cannot be used" + ("" if cohort.complete else ", and cases lack a channel"),
        )
    return settings


def size_of(cohort: Cohort, device: str) -> str:
    """Choose a network's size, of ``SIZES``."""
    if torch.device(device).type != "cuda":
        return "small"
    return "medium" if len(cohort.folds["training"]) < 500 else "base"


def about_network(cohort: Cohort, device: str, folder: Path) -> Settings:
    """Choose spacing, crop, network and where prepared volumes are kept; ``folder`` is where a cache could be."""
    on_gpu, num_training = torch.device(device).type == "cuda", len(cohort.folds["training"])
    name = size_of(cohort, device)
    size = SIZES[name]
    spacing, why, grid, cache = _fitted(cohort.facts, size, folder / "cache")
    crop = [side * size.patch_size for side in grid]
    shape = " x ".join(f"{side:.0f}" for side in _median_shape(cohort.facts, spacing))
    prepared = sum(prepared_bytes(cohort.facts, spacing, crop))
    workers = min(8, machine.cores() - 1) if on_gpu else max(0, min(2, machine.cores() // 2 - 1))
    of_size = f"goes with the size {name}"
    return {
        "spacing": (spacing, why),
        "img_size": (crop, f"voxels, of volumes of {shape} in the median"),
        "patch_size": (size.patch_size, f"a grid of {' x '.join(map(str, grid))} tokens; {size.tokens} are the most"),
        "swin_window_size": ([WINDOWS[side] for side in grid], "tokens; it divides the grid, so no window is padded"),
        "encoder_embed_dim": (
            size.width,
            f"size {name}: {num_training} training volumes, a {'G' if on_gpu else 'C'}PU",
        ),
        "encoder_depth": (size.blocks, of_size),
        "encoder_num_heads": (size.heads, of_size),
        "decoder_embed_dim": (size.decoder, of_size),
        "cache": (cache, f"the prepared volumes take {prepared / 1e9:.2g} GB"),
        "num_workers": (workers, f"of {machine.cores()} cores"),
        "precision": ("auto", "bfloat16 where the device has instructions for it"),
        # The plan lies over the other recipes too, whose rates are their own.
        "learning_rate": (
            f"$dict(pretraining={size.learning_rate}, segmentation=0.006, conductor=0.00003).get(@recipe, "
            f"{min(size.learning_rate, 0.001)})",
            of_size,
        ),
        "loss": (
            "$'structural' if @recipe in ('pretraining', 'conductor') else 'l2'",
            "on heads its features segment better than those of the squared error; those of l2 rebuild voxels better",
        ),
        "affine_prob": (0.2, "a short training learns most from volumes as they are"),
        "flip_prob": (
            "$0.5 * (@recipe == 'pretraining')",
            "left and right, in pre-training alone: what is learned later may have a side",
        ),
    }


def _fitted(facts: Sequence[Facts], size: Size, cache_dir: Path) -> tuple[list[float] | None, str, list[int], str]:
    """Coarsen the cohort's spacing until a crop shows enough of a volume, and the prepared volumes fit somewhere."""
    (spacing, why), before = spacing_of(facts), math.inf
    while True:
        shape = _median_shape(facts, spacing)
        grid = grid_of(shape, size.patch_size, size.tokens)
        crop = [side * size.patch_size for side in grid]
        if (factor := float((shape / crop).max()) / COVERAGE) > 1.01:
            because = "coarser, so that a crop shows a third of a volume's longest side"
        else:
            try:
                return spacing, why, grid, choose_cache("auto", facts, spacing, crop, cache_dir)
            except Mistake:
                prepared = sum(prepared_bytes(facts, spacing, crop))
            if prepared >= before:  # they are padded to a crop by now
                return spacing, why, grid, "none"
            before, factor = prepared, 1.25
            because = "coarser, so that the prepared volumes fit in memory or on the disk"
        own = spacing or np.median([geometry_in_ras(one)[1] for one in facts], axis=0)
        spacing = [float(f"{side * factor:.3g}") for side in own]
        why = why if because in why else f"{why.removesuffix(': they stay as they are')}; {because}"


def _median_shape(facts: Sequence[Facts], spacing: Sequence[float] | None) -> np.ndarray:
    return np.median([resampled_shape(one, spacing) for one in facts], axis=0)


def about_schedule(cohort: Cohort, batch: int) -> Settings:
    """Choose how long to train, with batches of a size."""
    num_training = len(cohort.folds["training"])
    draws = max(DRAWS, DRAWS_OF_EACH * num_training)
    iterations = max(40, math.ceil(num_training / batch))
    epochs = max(20, min(300, round(draws / (iterations * batch))))
    passes = iterations * batch / num_training
    return {
        "iterations_per_epoch": (iterations, f"{iterations * batch} draws, {passes:.2g} of each training volume"),
        # Here, too, what comes behind the pre-training has its own.
        "max_epochs": (
            f"$dict({SHORT}).get(@recipe, {epochs})",
            f"{epochs * iterations * batch} draws; a few volumes need {DRAWS}, many {DRAWS_OF_EACH} of each",
        ),
        "warmup_epochs": (
            f"$dict(pretraining={max(1, epochs // 20)}, conductor=0).get(@recipe, 1)",
            "a twentieth; one epoch in what follows",
        ),
        "early_stop_patience": (
            f"$dict({SHORT}).get(@recipe, {max(5, epochs // 4)})",
            "epochs without a better validation",
        ),
    }


def spacing_of(facts: Sequence[Facts]) -> tuple[list[float] | None, str]:
    """Choose the spacing in mm that volumes are resampled to, RAS; None where they all have the same already."""
    sides = np.array([geometry_in_ras(one)[1] for one in facts])
    usual, ratio = np.median(sides, axis=0), np.median(sides.max(axis=1) / sides.min(axis=1))
    shown = " x ".join(f"{side:.3g}" for side in usual)
    if np.abs(sides / usual - 1).max() <= HOMOGENEOUS:
        return None, f"all volumes have voxels of {shown} mm: they stay as they are"
    why = f"the median of {len(facts)} volumes"
    if ratio > ANISOTROPIC:
        coarse = int(usual.argmax())
        usual[coarse] = max(np.percentile(sides[:, coarse], 10), *np.delete(usual, coarse))
        why += f"; axis {coarse} is {ratio:.1f} times coarser, so the finer tenth of them counts for it"
    return [float(f"{side:.3g}") for side in usual], why


def grid_of(shape: Sequence[float], patch_size: int, tokens: int) -> list[int]:
    """Choose a grid of at most so many tokens that covers volumes of a shape in voxels, as far as it may."""
    grid = [
        max(side for side in WINDOWS if side <= max(4, min(14, math.ceil(voxels / patch_size)))) for voxels in shape
    ]
    while math.prod(grid) > tokens:
        longest = max(range(3), key=lambda axis: (grid[axis], axis))
        grid[longest] = max(side for side in WINDOWS if side < grid[longest])
    return grid
