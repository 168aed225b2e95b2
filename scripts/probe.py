"""A frozen probe: how much of the labels can be read off the features, token by token, by a linear map."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from tqdm import tqdm

from .data import case_seed

__all__ = ["TokenProbe", "fit_ridge", "label_fractions", "labelled", "r_squared"]

logger = logging.getLogger(__name__)

PENALTIES = tuple(10.0**power for power in range(-4, 5))


class TokenProbe:
    """Fit a ridge regression from token features to the share of each label in the token's patch.

    The penalty is chosen on a part of the training cases; the validation cases are looked at once, for the score.

    Args:
        encode: maps a volume ``(B, 1, D, H, W)`` to features ``(B, C, D/P, H/P, W/P)``.
        train_loader: batches of ``image`` and ``label``.
        val_loader: the same, of other cases.
        num_labels: labels besides background, numbered from 1.
        patch_size: P, in voxels.
        path: the report, JSON.
        about: what to write into the report besides the scores.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        train_loader: Iterable[dict[str, Any]],
        val_loader: Iterable[dict[str, Any]],
        num_labels: int,
        patch_size: int,
        path: str | Path,
        about: dict[str, Any],
    ) -> None:
        self.encode, self.train_loader, self.val_loader = encode, train_loader, val_loader
        self.num_labels, self.patch_size, self.path, self.about = num_labels, patch_size, Path(path), about

    def run(self) -> dict[str, Any]:
        """Encode, fit, score, and write the report.

        Returns:
            ``r2``, the share of the variance of the label fractions that the probe explains on validation, averaged
            over labels; ``r2_standard_error``, by bootstrap over the validation cases; ``r2_by_label``; the
            ``penalty``; the numbers of cases.
        """
        train_x, train_y = self._tokens(self.train_loader, "encoding training cases")
        val_x, val_y = self._tokens(self.val_loader, "encoding validation cases")
        mean, scale = train_x.mean(dim=(0, 1)), train_x.std(dim=(0, 1)).clamp(min=1e-6)
        train_x, val_x = ((features - mean) / scale for features in (train_x, val_x))
        penalty = _choose_penalty(train_x, train_y)
        prediction = fit_ridge(train_x, train_y, penalty)(val_x)
        scores = r_squared(prediction, val_y)
        report = {
            **self.about,
            "r2": scores.nanmean().item(),
            "r2_standard_error": _standard_error(prediction, val_y),
            "r2_by_label": scores.tolist(),
            "penalty": penalty,
            "training_cases": len(train_x),
            "validation_cases": len(val_x),
            # For paired comparisons of two probes: what each case adds to the error and to the variance.
            "error_by_case": (prediction - val_y).square().mean(dim=1).tolist(),
            "variance_by_case": (val_y - val_y.mean(dim=(0, 1))).square().mean(dim=1).tolist(),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(report, indent=1) + "\n")
        logger.info(
            "the probe explains %.3f ± %.3f of the label fractions of %d cases",
            *(report["r2"], report["r2_standard_error"], len(val_x)),
        )
        return report

    @torch.no_grad()
    def _tokens(self, loader: Iterable[dict[str, Any]], title: str) -> tuple[Tensor, Tensor]:
        """Return features ``(cases, N, C)`` and label fractions ``(cases, N, labels)``."""
        features, fractions = [], []
        for batch in tqdm(loader, desc=title, leave=False, disable=None):
            features.append(self.encode(batch["image"]).float().flatten(2).mT.cpu())
            fractions.append(label_fractions(batch["label"], self.num_labels, self.patch_size))
        return torch.cat(features), torch.cat(fractions)


def label_fractions(label: Tensor, num_labels: int, patch_size: int) -> Tensor:
    """Say what share of each patch every label takes.

    Args:
        label: ``(B, 1, D, H, W)``, whole numbers, 0 = background.
        num_labels: labels besides background.
        patch_size: P, in voxels.

    Returns:
        ``(B, N, num_labels)``.
    """
    one_hot = torch.cat([(label.round() == number).float() for number in range(1, num_labels + 1)], dim=1)
    return F.avg_pool3d(one_hot, patch_size).flatten(2).mT


def fit_ridge(features: Tensor, target: Tensor, penalty: float) -> Callable[[Tensor], Tensor]:
    """Fit a linear map with intercept in closed form, in float64.

    Args:
        features: ``(..., C)``, standardised.
        target: ``(..., K)``.
        penalty: on the squared weights, relative to the number of rows.

    Returns:
        A function from features to predictions.
    """
    x, y = features.reshape(-1, features.shape[-1]).double(), target.reshape(-1, target.shape[-1]).double()
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    x, y = x - x_mean, y - y_mean
    gram = x.T @ x + penalty * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(gram, x.T @ y)
    return lambda new: (new.double() - x_mean) @ weights + y_mean


def r_squared(prediction: Tensor, target: Tensor) -> Tensor:
    """Share of the variance explained, one figure for each of the last axis.

    A constant guess scores 0; where the target is constant, there is nothing to explain: NaN.
    """
    prediction, target = (values.reshape(-1, values.shape[-1]).double() for values in (prediction, target))
    error, spread = (prediction - target).square().mean(dim=0), target.var(dim=0, correction=0)
    return torch.where(spread > 0, 1 - error / spread, torch.nan)


def _choose_penalty(features: Tensor, target: Tensor) -> float:
    """Hold every fourth training case out and take the penalty that predicts those best."""
    held_out = torch.arange(len(features)) % 4 == 0
    if len(features) < 2:
        return 1.0

    def score(penalty: float) -> float:
        predict = fit_ridge(features[~held_out], target[~held_out], penalty)
        return r_squared(predict(features[held_out]), target[held_out]).nanmean().nan_to_num(-torch.inf).item()

    return max(PENALTIES, key=score)


def _standard_error(prediction: Tensor, target: Tensor, resamples: int = 200) -> float:
    """Bootstrap over cases, always the same way: how much the score would vary with other validation cases."""
    generator = torch.Generator().manual_seed(0)
    draws = (torch.randint(len(target), (len(target),), generator=generator) for _ in range(resamples))
    return torch.stack([r_squared(prediction[draw], target[draw]).nanmean() for draw in draws]).std().item()


def labelled(cases: Sequence[dict[str, Any]], most: int | None = None) -> list[dict[str, Any]]:
    """Keep the cases that come with a label.

    Args:
        cases: from :func:`~bertswin_mae.data.find_cases`.
        most: keep so many at the most: those whose names have the smallest hash.

    Raises:
        ValueError: when there are none.
    """
    kept = [case for case in cases if "label" in case]
    if not kept:
        raise ValueError("none of the cases has a label: the probe needs a Decathlon folder or a datalist with labels")
    return kept if most is None else sorted(kept, key=lambda case: case_seed(case["case"], 0))[:most]
