"""A frozen probe: how much of the labels can be read off the features, of each token and of each volume."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from tqdm import tqdm

from ..mistakes import Mistake
from ..networks.bertswin_mae import BertsWinMAE
from ..weights.pretrained import load_encoder, strict_stem_of

__all__ = [
    "FrozenProbe",
    "accuracy",
    "fit_neighbours",
    "fit_ridge",
    "label_fractions",
    "load_frozen",
    "probe_embeddings",
    "r_squared",
]

logger = logging.getLogger(__name__)

PENALTIES = tuple(10.0**power for power in range(-4, 5))
NEIGHBOURS = (1, 2, 3, 5, 10, 20, 40)


class FrozenProbe:
    """Read labels off frozen features: token by token, and off the embedding of each volume.

    From the tokens, a ridge regression predicts the share of each label in the token's patch. From a volume's
    embedding, the mean of its tokens, a ridge regression and the nearest neighbours predict how much of each label is
    in the volume, or the class of the case. Penalties and numbers of neighbours are chosen on a part of the training
    cases; the validation cases are looked at once, for the scores.

    Args:
        encode: maps a volume ``(B, C, D, H, W)`` to features ``(B, C, D/P, H/P, W/P)``.
        train_loader: batches of ``image`` and ``label``, or of ``image`` and ``class``.
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
            Of the tokens, where there are label maps: ``r2``, the share of the variance of the label fractions that is
            explained on validation, averaged over labels; ``r2_standard_error``, by bootstrap over the validation
            cases; ``r2_by_label``; the ``penalty``. Of the ``embedding``: ``linear`` and ``neighbours``, the share of
            the variance explained, or with classes the share of the cases classified rightly (and ``majority``, what
            the most frequent class alone would score); their ``penalty`` and ``k``. And the numbers of cases.
        """
        train_x, train_y, train_classes = self._read(self.train_loader, "encoding training cases")
        val_x, val_y, val_classes = self._read(self.val_loader, "encoding validation cases")
        report = {**self.about, "training_cases": len(train_x), "validation_cases": len(val_x)}
        if train_classes:
            names = sorted({*train_classes, *val_classes})
            one_hot = [
                torch.tensor([[name == own for name in names] for own in c]).double()
                for c in (train_classes, val_classes)
            ]
            report["classes"] = names
            report["embedding"] = probe_embeddings(train_x.mean(1), one_hot[0], val_x.mean(1), one_hot[1], accuracy)
            report["embedding"]["majority"] = accuracy(one_hot[0].mean(0).expand_as(one_hot[1]), one_hot[1])
        else:
            report |= self._probe_tokens(train_x, train_y, val_x, val_y)
            report["embedding"] = probe_embeddings(
                train_x.mean(1), train_y.mean(1), val_x.mean(1), val_y.mean(1), _mean_r_squared
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(report, indent=1) + "\n")
        found = report["embedding"]
        logger.info(
            "from the embeddings of %d cases: linear %.3f, %d nearest neighbours %.3f (%s)",
            *(len(val_x), found["linear"], found["k"], found["neighbours"]),
            "share classified rightly" if train_classes else "share of variance explained",
        )
        return report

    @torch.no_grad()
    def _read(self, loader: Iterable[dict[str, Any]], title: str) -> tuple[Tensor, Tensor | None, list[str]]:
        """Return features ``(cases, N, C)``, and label fractions ``(cases, N, labels)`` or classes."""
        features, fractions, classes = [], [], []
        for batch in tqdm(loader, desc=title, leave=False, disable=None):
            features.append(self.encode(batch["image"]).float().flatten(2).mT.cpu())
            if "class" in batch:
                classes += [str(name) for name in batch["class"]]
            else:
                fractions.append(label_fractions(batch["label"], self.num_labels, self.patch_size))
        return torch.cat(features), torch.cat(fractions) if fractions else None, classes

    @staticmethod
    def _probe_tokens(train_x: Tensor, train_y: Tensor, val_x: Tensor, val_y: Tensor) -> dict[str, Any]:
        train_x, val_x = _standardise(train_x, val_x)
        penalty = _choose(PENALTIES, fit_ridge, train_x, train_y, _mean_r_squared)
        prediction = fit_ridge(train_x, train_y, penalty)(val_x)
        scores = r_squared(prediction, val_y)
        report = {
            "r2": scores.nanmean().item(),
            "r2_standard_error": _standard_error(prediction, val_y),
            "r2_by_label": scores.tolist(),
            "penalty": penalty,
            # For paired comparisons of two probes: what each case adds to the error and to the variance.
            "error_by_case": (prediction - val_y).square().mean(dim=1).tolist(),
            "variance_by_case": (val_y - val_y.mean(dim=(0, 1))).square().mean(dim=1).tolist(),
        }
        logger.info(
            "from the tokens: %.3f ± %.3f of the variance of the label fractions explained",
            *(report["r2"], report["r2_standard_error"]),
        )
        return report


def load_frozen(pretrained: str | Path | None, settings: dict[str, Any]) -> BertsWinMAE:
    """Build a network around a pre-trained encoder, to read features in either mode; its decoder is not used.

    Args:
        pretrained: ``model.pt``, or the ``encoder.pt`` of a tuning.
        settings: arguments of :class:`~bertswin_mae.networks.BertsWinMAE`. ``strict_stem`` may be None: it is read
            off the weights.

    Raises:
        Mistake: when there are no such weights, or they do not fit the settings.
    """
    if pretrained is None:
        raise Mistake("give --pretrained, the model.pt of a pre-training or a tuning, or an encoder.pt")
    strict = strict_stem_of(pretrained, settings["strict_stem"])
    network = BertsWinMAE(**(settings | {"strict_stem": strict}))
    load_encoder(network.encoder, pretrained)
    return network


def probe_embeddings(
    train_x: Tensor, train_y: Tensor, val_x: Tensor, val_y: Tensor, score: Callable[[Tensor, Tensor], float]
) -> dict[str, Any]:
    """Predict from embeddings, by ridge regression and by the mean of the nearest neighbours.

    Args:
        train_x: ``(cases, C)``.
        train_y: ``(cases, K)``.
        val_x: ``(other cases, C)``.
        val_y: ``(other cases, K)``.
        score: of a prediction and its target, larger is better.

    Returns:
        ``linear`` and its ``penalty``, ``neighbours`` and their number ``k``.
    """
    train_x, val_x = _standardise(train_x, val_x)
    penalty = _choose(PENALTIES, fit_ridge, train_x, train_y, score)
    k = _choose(NEIGHBOURS, fit_neighbours, train_x, train_y, score)
    return {
        "linear": score(fit_ridge(train_x, train_y, penalty)(val_x), val_y),
        "penalty": penalty,
        "neighbours": score(fit_neighbours(train_x, train_y, k)(val_x), val_y),
        "k": k,
    }


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


def fit_neighbours(features: Tensor, target: Tensor, k: int) -> Callable[[Tensor], Tensor]:
    """Keep the training cases; predict the mean target of the k nearest.

    Args:
        features: ``(cases, C)``, standardised.
        target: ``(cases, K)``.
        k: neighbours; all, where there are fewer.

    Returns:
        A function from features to predictions.
    """
    k = min(k, len(features))
    return lambda new: target[torch.cdist(new, features).topk(k, largest=False).indices].double().mean(dim=1)


def r_squared(prediction: Tensor, target: Tensor) -> Tensor:
    """Share of the variance explained, one figure for each of the last axis.

    A constant guess scores 0; where the target is constant, there is nothing to explain: NaN.
    """
    prediction, target = (values.reshape(-1, values.shape[-1]).double() for values in (prediction, target))
    error, spread = (prediction - target).square().mean(dim=0), target.var(dim=0, correction=0)
    return torch.where(spread > 0, 1 - error / spread, torch.nan)


def accuracy(prediction: Tensor, target: Tensor) -> float:
    """Share of the rows ``(cases, classes)`` whose largest entry is where the target's is."""
    return (prediction.argmax(dim=1) == target.argmax(dim=1)).double().mean().item()


def _mean_r_squared(prediction: Tensor, target: Tensor) -> float:
    return r_squared(prediction, target).nanmean().item()


def _standardise(train_x: Tensor, val_x: Tensor) -> tuple[Tensor, Tensor]:
    """Standardise each feature by the training cases' statistics."""
    rows = train_x.flatten(0, -2)
    mean, scale = rows.mean(dim=0), rows.std(dim=0, correction=0).clamp(min=1e-6)
    return (train_x - mean) / scale, (val_x - mean) / scale


def _choose(
    candidates: Sequence[Any], fit: Callable[..., Any], features: Tensor, target: Tensor, score: Callable[..., float]
) -> Any:
    """Hold every fourth training case out and take the setting that predicts those best."""
    held_out = torch.arange(len(features)) % 4 == 0
    if len(features) < 2:
        return candidates[0]

    def judge(candidate: Any) -> float:
        found = score(fit(features[~held_out], target[~held_out], candidate)(features[held_out]), target[held_out])
        return -math.inf if math.isnan(found) else found

    return max(candidates, key=judge)


def _standard_error(prediction: Tensor, target: Tensor, resamples: int = 200) -> float:
    """Bootstrap over cases, always the same way: how much the score would vary with other validation cases."""
    generator = torch.Generator().manual_seed(0)
    draws = (torch.randint(len(target), (len(target),), generator=generator) for _ in range(resamples))
    return torch.stack([r_squared(prediction[draw], target[draw]).nanmean() for draw in draws]).std().item()
