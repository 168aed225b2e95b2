"""A frozen probe: how much of the labels can be read off the features, of each token and of each volume."""

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import RegressorMixin
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsRegressor
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from tqdm import tqdm

from ..data import Targets, labelled_folds, patient_of, read_targets
from ..data.describing import Case
from ..mistakes import reason

__all__ = ["FewCasesProbe", "FrozenProbe", "probed_targets"]

logger = logging.getLogger(__name__)

PENALTIES = tuple(10.0**power for power in range(-4, 5))
MOST_LABELS = 256  # that are looked at while training
NEIGHBOURS = (1, 2, 3, 5, 10, 20, 40)
Cases = tuple[Tensor, Tensor]  # features (cases, …, C) and targets (cases, …, K)
Score = Callable[[Tensor, Tensor], float]  # of a prediction and its target, larger is better


def probed_targets(
    folds: Mapping[str, Sequence[Case]],
    target: str,
    most: int | None = None,
    seed: int = 0,
    num_labels: int = 2,
) -> Targets:
    """Tell what is read off the features, and of which cases.

    Args:
        folds: ``training`` and ``validation``, of :func:`~bertswin_mae.data.prepare_cases`.
        target: ``label``, the label maps, or a field of the datalist: see :func:`~bertswin_mae.data.read_targets`.
        most: training cases to keep, if given, chosen by a hash of their names.
        seed: another one keeps others.
        num_labels: that label maps hold besides background, and no others.

    Raises:
        Mistake: when no case has it, or too few; for label maps that do not fit.
    """
    if target != "label":
        return read_targets(folds, target, most=most, seed=seed)
    return Targets(target, [], *labelled_folds(folds, num_labels, most, seed).values(), values={})


@dataclass(eq=False)
class FrozenProbe:
    """Read labels off frozen features: token by token, and off the embedding of each volume.

    From the tokens, a ridge regression predicts the share of each label in the token's patch. From a volume's
    embedding, the mean of its tokens, a ridge regression and the nearest neighbours predict how much of each label is
    in the volume, or the class or number of the case. Penalties and numbers of neighbours are chosen on a part of the
    training cases, of other patients; the validation cases are looked at once, for the scores.
    """

    encode: Callable[[Tensor], Tensor]  # maps a volume (B, C, D, H, W) to features (B, C, D/P, H/P, W/P)
    train_loader: Iterable[dict[str, Any]]  # batches of `image` and `label`, or of `image` and `case`
    val_loader: Iterable[dict[str, Any]]  # the same, of other cases
    num_labels: int  # besides background, numbered from 1
    patch_size: int  # P, in voxels
    path: str | Path  # of the report, JSON
    about: dict[str, Any]  # goes into the report
    targets: Targets | None = None  # classes or numbers by case; none, or none of its values: label maps

    @property
    def patients(self) -> list[str] | None:
        """Whose the training cases are, where that is known."""
        return list(self.targets.patients.values()) if self.targets else None

    @property
    def reads_maps(self) -> bool:
        """Tell whether it is label maps that are read off, not a field of the datalist."""
        return self.targets is None or not self.targets.values

    def run(self) -> dict[str, Any]:
        """Encode, fit, score, and write the report.

        Returns:
            The numbers of cases. Of the tokens, where there are label maps: ``r2``, the share of the variance that is
            explained, averaged over labels, its ``r2_standard_error``, ``r2_by_label``, and the ``penalty``. Of the
            ``embedding``: ``linear`` and ``neighbours``, the share of the variance explained, or with classes the
            share classified rightly (``majority``: by the most frequent class alone; ``linear_auroc``: how well they
            are ranked, averaged over classes); their ``penalty`` and ``k``.
        """
        train, val = self._read(self.train_loader, "training"), self._read(self.val_loader, "validation")
        report = {**self.about, "training_cases": len(train[0]), "validation_cases": len(val[0])}
        if self.reads_maps:
            report |= probe_tokens(train, val, self.patients)
            train, val = ((x.mean(1), fractions.mean(1)) for x, fractions in (train, val))
            report["embedding"] = probe_embeddings(train, val, mean_r_squared, self.patients)
        else:
            report["target"] = self.targets.about
            train, val = ((x.mean(1), own) for x, own in (train, val))
            if self.targets.classes:
                report["embedding"] = probe_embeddings(train, val, accuracy, self.patients, auroc=auroc)
                report["embedding"]["majority"] = accuracy(train[1].mean(0).expand_as(val[1]), val[1])
            else:
                report["embedding"] = probe_embeddings(train, val, mean_r_squared, self.patients)
        path = Path(self.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
        found = report["embedding"]
        logger.info(
            "from the embeddings of %d cases: linear %.3f, %d nearest neighbours %.3f (%s)",
            *(len(val[0]), found["linear"], found["k"], found["neighbours"]),
            "share classified rightly" if "majority" in found else "share of variance explained",
        )
        return report

    @torch.no_grad()
    def _read(self, loader: Iterable[dict[str, Any]], fold: str) -> Cases:
        """Return features ``(cases, N, C)``, and label fractions ``(cases, N, labels)``, or classes or numbers."""
        features, found = [], []
        for batch in tqdm(loader, desc=f"encoding {fold} cases", leave=False, disable=None):
            features.append(self.encode(batch["image"]).float().flatten(2).mT.cpu())
            if self.reads_maps:
                found.append(label_fractions(batch["label"], self.num_labels, self.patch_size))
            else:
                found.append(torch.tensor([[self.targets.values[case]] for case in batch["case"]]))
        targets = torch.cat(found)
        if not self.reads_maps and self.targets.classes:
            targets = F.one_hot(targets[:, 0].long(), len(self.targets.classes))
        return torch.cat(features), targets.double()


@dataclass(eq=False)
class FewCasesProbe:
    """Read labels or classes off the features of a network in training, on a few cases: for its verdict.

    They are what the cases of the training happen to come with, and need not be of any use: those that cannot be read
    are logged, and there is no probe.
    """

    cases: Mapping[str, Sequence[Case]]  # by fold
    transform: Callable[[dict[str, Any]], dict[str, Any]]  # prepares a case, its label map too if it has one
    most: int  # cases of each fold, one of each patient
    patch_size: int  # P, in voxels

    def __post_init__(self) -> None:
        self.read: list[list[dict[str, Any]]] | None = None
        folds = [self.cases[fold] for fold in ("training", "validation")]
        pairs = (
            [_one_of_each([case for case in fold if has(case)])[: self.most] for fold in folds]
            for has in (_has_label, _has_class)
        )
        self.chosen = next((pair for pair in pairs if min(map(len, pair)) > 1), None)

    def score(self, encode: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Fit on training cases and score on validation cases, or return nothing where there is nothing to read.

        Args:
            encode: maps a volume ``(B, C, D, H, W)`` to features ``(B, C, D/P, H/P, W/P)``.

        Returns:
            ``probe_r2`` of the tokens, where there are label maps, ``probe_linear`` and ``probe_neighbours`` of the
            embeddings: see :meth:`FrozenProbe.run`.
        """
        if self.chosen is None:
            return {}
        try:
            self.read = self.read or [[self.transform(case) | {"class": case.get("class")} for case in fold]
                                      for fold in self.chosen]  # fmt: skip
            return self._scores(encode)
        except Exception as error:
            logger.warning("the features are not probed: %s", reason(error))
            self.chosen = None
            return {}

    def _scores(self, encode: Callable[[Tensor], Tensor]) -> dict[str, float]:
        features = [torch.cat([encode(case["image"][None]).float().flatten(2).mT.cpu() for case in fold])
                    for fold in self.read]  # fmt: skip
        (train, val), scores = features, {}
        if "label" in self.read[0][0]:
            most = min(MOST_LABELS, int(max(case["label"].max() for case in self.read[0])))
            targets = [torch.cat([label_fractions(case["label"][None], most, self.patch_size) for case in fold])
                       for fold in self.read]  # fmt: skip
            found, _ = fit_best(ridge, PENALTIES, (train, targets[0]), val, mean_r_squared)
            scores["probe_r2"] = mean_r_squared(found, targets[1])
            targets, score = [fractions.mean(dim=1) for fractions in targets], mean_r_squared
        else:
            own = [[str(case["class"]) for case in fold] for fold in self.read]
            targets, score = [_one_hot(names, sorted({*own[0], *own[1]})) for names in own], accuracy
        found = probe_embeddings((train.mean(dim=1), targets[0]), (val.mean(dim=1), targets[1]), score)
        return scores | {"probe_linear": found["linear"], "probe_neighbours": found["neighbours"]}


def probe_tokens(train: Cases, val: Cases, patients: Sequence[str] | None = None) -> dict[str, Any]:
    """Predict label fractions from tokens; see :meth:`FrozenProbe.run`."""
    prediction, penalty = fit_best(ridge, PENALTIES, train, val[0], mean_r_squared, patients)
    target, scores = val[1], r_squared(prediction, val[1])
    report = {
        "r2": scores.nanmean().item(),
        "r2_standard_error": _standard_error(prediction, target),
        "r2_by_label": scores.tolist(),
        "penalty": penalty,
        # For paired comparisons of two probes: what each case adds to the error and to the variance.
        "error_by_case": (prediction - target).square().mean(dim=1).tolist(),
        "variance_by_case": (target - target.mean(dim=(0, 1))).square().mean(dim=1).tolist(),
    }
    logger.info(
        "from the tokens: %.3f ± %.3f of the variance of the label fractions explained",
        *(report["r2"], report["r2_standard_error"]),
    )
    return report


def probe_embeddings(
    train: Cases, val: Cases, score: Score, patients: Sequence[str] | None = None, **others: Score
) -> dict[str, Any]:
    """Predict from embeddings, by ridge regression and by the nearest neighbours; see :meth:`FrozenProbe.run`.

    The other scores are those of the ridge regression, and choose nothing.
    """
    linear, penalty = fit_best(ridge, PENALTIES, train, val[0], score, patients)
    neighbours, k = fit_best(nearest_neighbours, NEIGHBOURS, train, val[0], score, patients)
    report = {"linear": score(linear, val[1]), "penalty": penalty, "neighbours": score(neighbours, val[1]), "k": k}
    return report | {f"linear_{name}": other(linear, val[1]) for name, other in others.items()}


def fit_best(
    build: Callable[[Any, int], RegressorMixin],
    settings: Sequence[Any],
    train: Cases,
    new: Tensor,
    score: Score,
    patients: Sequence[str] | None = None,
) -> tuple[Tensor, Any]:
    """Choose the setting on every fourth patient, fit with it on all training cases, and predict.

    Args:
        build: an estimator of scikit-learn, from a setting and the number of rows to fit.
        settings: to choose from, by the score.
        train: to fit; each feature is standardised by their statistics.
        new: features ``(other cases, …, C)``; their prediction ``(…, K)`` is returned, and the setting.
        score: of a prediction and its target.
        patients: whose the training cases are; None: each is another's.
    """
    scaler = StandardScaler().fit(_rows(train[0]))

    def predict(setting: Any, x: Tensor, y: Tensor, new: Tensor) -> Tensor:
        x, y = scaler.transform(_rows(x)), _rows(y)
        prediction = build(setting, len(x)).fit(x, y).predict(scaler.transform(_rows(new)))
        return torch.from_numpy(prediction).reshape(*new.shape[:-1], -1)

    def judge(setting: Any) -> float:
        (kept_x, x), (kept_y, y) = ((values[~held_out], values[held_out]) for values in train)
        found = score(predict(setting, kept_x, kept_y, x), y)
        return -math.inf if math.isnan(found) else found

    several = patients is not None and len(set(patients)) > 1  # else there is a choice by the cases alone
    owners = patients if several else range(len(train[0]))
    fourth = set(list(dict.fromkeys(owners))[::4])
    held_out = torch.tensor([owner in fourth for owner in owners])
    best = settings[0] if held_out.all() else max(settings, key=judge)  # of a single case there is no choice
    return predict(best, *train, new), best


def ridge(penalty: float, rows: int) -> Ridge:
    """Build a linear map; the penalty on its squared weights is relative to the number of rows to fit."""
    return Ridge(alpha=penalty * rows)


def nearest_neighbours(k: int, rows: int) -> KNeighborsRegressor:
    """Build the mean of the k nearest of the rows to fit, or of all."""
    return KNeighborsRegressor(min(k, rows))


def label_fractions(label: Tensor, num_labels: int, patch_size: int) -> Tensor:
    """Turn labels ``(B, 1, D, H, W)``, 0 = background, into each one's share of every patch, ``(B, N, num_labels)``."""
    # One label after the other: all at once would take as many volumes.
    labels = range(1, num_labels + 1)
    shares = [F.avg_pool3d((label.round() == number).float(), patch_size) for number in labels]
    return torch.cat(shares, dim=1).flatten(2).mT


def r_squared(prediction: Tensor, target: Tensor) -> Tensor:
    """Share of the variance explained, one figure for each of the last axis.

    A constant guess scores 0; where the target is constant, there is nothing to explain: NaN.
    """
    prediction, target = (values.flatten(0, -2).double() for values in (prediction, target))
    error, spread = (prediction - target).square().mean(dim=0), target.var(dim=0, correction=0)
    return torch.where(spread > 0, 1 - error / spread, torch.nan)


def mean_r_squared(prediction: Tensor, target: Tensor) -> float:
    """Average :func:`r_squared` over what can be explained."""
    return r_squared(prediction, target).nanmean().item()


def accuracy(prediction: Tensor, target: Tensor) -> float:
    """Share of the rows ``(cases, classes)`` whose largest entry is where the target's is."""
    return (prediction.argmax(dim=1) == target.argmax(dim=1)).double().mean().item()


def auroc(prediction: Tensor, target: Tensor) -> float:
    """Area under the ROC curve, averaged over the classes that some rows ``(cases, classes)`` have and others not."""
    told = target.any(dim=0) & ~target.bool().all(dim=0)
    return float(roc_auc_score(target[:, told].numpy(), prediction[:, told].numpy()))


def _standard_error(prediction: Tensor, target: Tensor, resamples: int = 200) -> float:
    """Bootstrap over cases, always the same way: how much the score would vary with other validation cases."""
    generator = torch.Generator().manual_seed(0)
    draws = (torch.randint(len(target), (len(target),), generator=generator) for _ in range(resamples))
    return torch.stack([r_squared(prediction[draw], target[draw]).nanmean() for draw in draws]).std().item()


def _one_of_each(cases: Iterable[Case]) -> list[Case]:
    """Keep the first case of each patient."""
    first: dict[str, Case] = {}
    for case in cases:
        first.setdefault(patient_of(case), case)
    return list(first.values())


def _has_label(case: Case) -> bool:
    return "label" in case and Path(case["label"]).exists()


def _has_class(case: Case) -> bool:
    return "class" in case


def _one_hot(own: list[str], names: list[str]) -> Tensor:
    return F.one_hot(torch.tensor([names.index(name) for name in own]), len(names)).double()


def _rows(values: Tensor) -> np.ndarray:
    return values.flatten(0, -2).double().numpy()
