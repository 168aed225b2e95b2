"""Where a network starts: from what its features tell of the labels, without a step."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from einops import rearrange
from ignite.engine import Engine, Events
from monai.engines import PrepareBatch
from monai.networks import one_hot
from monai.networks.utils import eval_mode
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, GroupKFold, StratifiedGroupKFold, StratifiedKFold
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_sample_weight
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ..engines import AutocastInferer, MeanWindowInferer
from ..networks import ClassificationNetwork, SegmentationNetwork

__all__ = ["DiscriminantStart", "EmbeddingStart", "discriminants", "linear_head"]

logger = logging.getLogger(__name__)

SHRINKAGE = 0.03  # of the covariance, towards its diagonal
RARE = 1e-5  # share of the tokens that every class gets at the mean of all
FLOOR = 1e-7  # least prior of a class
TEMPER = 0.5  # of the logits: tokens are not quite normal, and the answers too sure
PENALTIES = np.logspace(-2, 5, 15)  # of squared weights, to predict numbers
STRENGTHS = np.logspace(-4, 2, 13)  # inverse penalties, to tell classes; the first where too few have several cases


@dataclass(eq=False)
class DiscriminantStart:
    """Before the first step, put a network's linear map where the labels of some draws say.

    A head that starts at random is taught first what a closed form knows: the steps go into that, and the gradients of
    a head that knows nothing spoil the features of a pre-trained encoder (Kumar et al. 2022). Attach to the trainer
    behind what resumes a run: a map that has learned something stays. A network without one starts as it is.
    """

    network: nn.Module
    draws: Iterable[dict[str, Tensor]] | None  # batches; None: no such start
    prepare_batch: PrepareBatch  # makes volumes and label maps of them, as for training
    inferer: AutocastInferer

    def attach(self, engine: Engine) -> None:
        """Follow a trainer."""
        if self.draws is not None and isinstance(self.network, SegmentationNetwork):
            engine.add_event_handler(Events.STARTED, self.start)

    @torch.no_grad()
    def start(self, engine: Engine) -> None:
        """Fit, and fill the network, unless it goes on from an earlier training."""
        if self.network.token_head.expand.weight.any():
            return
        head, classes = self.network.token_head, self.network.settings["num_labels"] + 1
        channels, places = head.reduce.in_channels + 1, head.expand.out_channels
        moments, joint = (torch.zeros(channels, width, dtype=torch.float64) for width in (channels, places))
        with eval_mode(self.network):
            for batch in self.draws:
                volume, label = self.prepare_batch(batch, engine.state.device)[:2]
                tokens = self.inferer(volume, self.network.tokens)
                rows = F.pad(rearrange(tokens.float(), "b k d h w -> (b d h w) k"), (0, 1), value=1.0)
                shares = F.avg_pool3d(one_hot(label, classes), head.repeats)
                side = dict.fromkeys("pqr", head.side)
                targets = rearrange(shares, "b c (d p) (h q) (w r) -> (b d h w) (c p q r)", **side)
                moments += (rows.T @ rows).cpu()
                joint += (rows.T @ targets).cpu()
        count = moments[-1, -1].item()
        try:
            found = discriminants(moments / count, joint / count, classes, head.reduce.out_channels)
        except torch.linalg.LinAlgError:  # features of one value, or of enormous ones
            found = None
        if found is None or not all(torch.isfinite(values).all() for values in found):
            logger.warning("no linear map can be fitted to the features of this encoder: it starts at zero")
            return
        self.network.start_from(*found)
        logger.info("the network starts from a linear map, fitted to %d tokens", count)


@dataclass(eq=False)
class EmbeddingStart:
    """Before the first step, fit the head of a classification network to the embeddings of whole volumes.

    As :class:`DiscriminantStart`, for a class or a number of each volume. A volume's embedding is the mean over its
    windows, as its prediction is. Attach to the trainer behind what resumes a run: a run that goes on keeps its head,
    and so does one whose pooling has to be learned first.
    """

    network: nn.Module
    volumes: Iterable[dict[str, Tensor]] | None  # batches of one whole training volume; None: no such start
    prepare_batch: PrepareBatch  # makes volumes and their targets of them, as for training
    inferer: MeanWindowInferer
    patients: Mapping[str, str]  # whose a case is, by its name
    balanced: bool  # all classes are equally likely beforehand; False: as likely as in the training volumes

    def attach(self, engine: Engine) -> None:
        """Follow a trainer."""
        is_fit = isinstance(self.network, ClassificationNetwork) and self.network.pooling is None
        if self.volumes is not None and is_fit:
            engine.add_event_handler(Events.STARTED, self.start)

    @torch.no_grad()
    def start(self, engine: Engine) -> None:
        """Fit, and fill the head, unless the run goes on."""
        if engine.state.iteration:
            return
        embeddings, targets, patients = [], [], []
        with eval_mode(self.network):
            for batch in self.volumes:
                volume, target = self.prepare_batch(batch, engine.state.device)[:2]
                embeddings.append(self.inferer(volume, self.network.embed).cpu())
                targets.append(target.flatten().cpu())
                patients += [self.patients[case] for case in batch["case"]]
        x, y = torch.cat(embeddings).double().numpy(), torch.cat(targets).numpy()
        if not np.isfinite(x).all() or len(np.unique(y)) < 2:
            logger.warning("the head starts at random: the features of this encoder are not finite, or all cases alike")
            return
        mean, deviation = self.network.mean.item(), self.network.deviation.item()
        y = y if self.network.head.out_features > 1 else (y - mean) / deviation
        weight, bias = linear_head(x, y, self.network.head.out_features, self.balanced, patients)
        self.network.head.weight.copy_(torch.from_numpy(weight))
        self.network.head.bias.copy_(torch.from_numpy(bias))
        logger.info("the head starts from a linear map, fitted to %d volumes", len(x))


def linear_head(
    embeddings: np.ndarray, targets: np.ndarray, outputs: int, balanced: bool, patients: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Fit logits, or a number, that are linear in embeddings ``(cases, C)``.

    Classes by logistic regression, a number by ridge regression, both with the penalty that predicts patients best from
    others, so that probabilities are no surer than they are right. Features are standardised.

    Args:
        embeddings: of the cases.
        targets: places of their classes, or numbers, ``(cases,)``.
        outputs: classes, or 1 for a number.
        balanced: classes are equally likely beforehand.
        patients: whose the cases are; None: each is another's.

    Returns:
        The weight ``(outputs, C)`` and the bias ``(outputs,)``. A class that no case has gets the least logit of all.
    """
    scaler = StandardScaler().fit(embeddings)
    x, owners = scaler.transform(embeddings), np.arange(len(targets)) if patients is None else np.array(patients)
    if outputs == 1:
        # Errors are squared, since a fold may be a single case, of which there is no share of the variance.
        folds = _folds_of_numbers(owners)
        found = RidgeCV(PENALTIES, cv=folds, scoring="neg_mean_squared_error").fit(x, targets)
        weight, bias = found.coef_[None], np.array([found.intercept_])
    else:
        places, weights = np.unique(targets), "balanced" if balanced else None
        found = LogisticRegression(C=STRENGTHS[0], class_weight=weights, max_iter=1000)
        chosen, folds = _folds_of_classes(targets, owners)
        if folds:
            search = GridSearchCV(found, {"C": STRENGTHS}, scoring=partial(_log_likelihood, weights=weights), cv=folds)
            found = search.fit(x[chosen], targets[chosen]).best_estimator_
        ours, offset = found.fit(x, targets).coef_, found.intercept_
        if len(places) == 2:  # the second against the first
            ours, offset = np.concatenate([-ours / 2, ours / 2]), np.concatenate([-offset / 2, offset / 2])
        weight, bias = np.zeros((outputs, x.shape[1])), np.full(outputs, offset.min() - 10)
        weight[places], bias[places] = ours, offset
    weight = weight / scaler.scale_
    return weight, bias - weight @ scaler.mean_


def _folds_of_numbers(patients: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """Divide cases so that no patient is on both sides; None, each case by all others, where that is the same."""
    count = len(np.unique(patients))
    if count in (1, len(patients)):
        return None
    return list(GroupKFold(min(5, count)).split(patients, groups=patients))


def _folds_of_classes(
    targets: np.ndarray, patients: np.ndarray
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Choose the cases of classes that several patients have, and divide them, each class in every part to learn from.

    Returns:
        Which cases are chosen, and places among these, to learn from and to judge by; none where there is no such way.
    """
    counts = {place: len(np.unique(patients[targets == place])) for place in np.unique(targets)}
    several = [place for place, count in counts.items() if count > 1]  # of one patient they are on one side only
    chosen = np.isin(targets, several)
    if len(several) < 2:
        return chosen, []
    y, owners, count = targets[chosen], patients[chosen], min(5, *(counts[place] for place in several))
    if len(np.unique(owners)) == len(owners):
        return chosen, list(StratifiedKFold(count).split(y, y))
    folds = StratifiedGroupKFold(count).split(y, y, owners)
    return chosen, [(seen, unseen) for seen, unseen in folds if set(y[seen]) == set(several)]


def _log_likelihood(found: LogisticRegression, x: np.ndarray, targets: np.ndarray, weights: str | None) -> float:
    """Judge probabilities by the weights that they were fitted with."""
    likely = found.predict_proba(x)
    return -log_loss(targets, likely, labels=found.classes_, sample_weight=compute_sample_weight(weights, targets))


def discriminants(moments: Tensor, joint: Tensor, classes: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fit logits that are linear in the tokens, for every place in a patch.

    Linear discriminant analysis: the tokens of a class at a place are normal with a mean of their own, and all have one
    covariance (Hastie et al., The Elements of Statistical Learning, section 4.3). The map is cut to a rank, where that
    changes the logits least.

    Args:
        moments: ``(K + 1, K + 1)``, the mean of a token's products with itself, a 1 behind it.
        joint: ``(K + 1, classes · places)``, the mean of its products with the share of each class at each place.
        classes: background included.
        rank: of the map.

    Returns:
        ``reduce`` and ``expand``, whose product maps tokens to logits, and their ``bias``: see
        :meth:`~bertswin_mae.networks.SegmentationNetwork.start_from`.
    """
    mean, share = moments[:-1, -1], joint[-1]
    means = (joint[:-1] + RARE * mean[:, None]) / (share + RARE)
    places = joint.shape[1] // classes
    within = _conditioned(moments[:-1, :-1] - (means * share) @ means.T / places, SHRINKAGE)
    weight = torch.linalg.solve(within, means)
    bias = torch.log(share + FLOOR) - (means * weight).sum(dim=0) / 2
    weight, bias = (TEMPER * _centred(values, classes) for values in (weight, bias))
    # Coordinates in which tokens have unit covariance: there, what is cut off is cut off the logits.
    root = torch.linalg.cholesky(_conditioned(moments[:-1, :-1] - mean.outer(mean), 1e-4))
    logits = root.T @ weight
    axes = torch.linalg.eigh(logits @ logits.T).eigenvectors[:, -rank:]
    reduce, expand = torch.linalg.solve_triangular(root.T, axes, upper=True), axes.T @ logits
    bias = bias + mean @ (weight - reduce @ expand)
    return tuple(values.float() for values in (_padded(reduce, rank, 1), _padded(expand, rank, 0), bias))


def _centred(values: Tensor, classes: int) -> Tensor:
    """Take the mean over the classes from ``(…, classes · places)``: a softmax does not see it."""
    by_class = values.unflatten(-1, (classes, -1))
    return (by_class - by_class.mean(dim=-2, keepdim=True)).flatten(-2)


def _conditioned(covariance: Tensor, share: float) -> Tensor:
    """Add to the diagonal a share of it, and a little where it is zero."""
    diagonal = covariance.diagonal()
    return covariance + torch.diag(share * diagonal + 1e-6 * diagonal.mean() + 1e-12)


def _padded(values: Tensor, rank: int, dim: int) -> Tensor:
    """Fill up with zeros, where there are fewer channels than the rank."""
    missing = rank - values.shape[dim]
    return F.pad(values, (0, missing) if dim else (0, 0, 0, missing))
