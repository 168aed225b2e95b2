"""Classification and regression on top of any encoder: rates by depth, scores, and answers for a folder of volumes."""

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.metrics import Metric
from ignite.metrics.metric import reinit__is_reduced
from matplotlib.figure import Figure
from monai.engines import PrepareBatch
from monai.transforms import Compose
from monai.utils import CommonKeys as Keys
from sklearn.metrics import mean_absolute_error, r2_score, roc_auc_score
from torch import Tensor, nn

from ..data.targets import Targets
from ..engines.volumes import VolumeEvaluator, VolumeWriter
from ..mistakes import Mistake
from ..weights import read_record, recorded

__all__ = ["PredictTarget", "PredictionWriter", "PrepareTargetBatch", "ScoresWriter", "TargetScores"]
__all__ += ["calibration_bins", "layerwise_rates", "read_target"]

BLOCK = re.compile(r"^encoder\..*\bblocks\.(\d+)\.")
BINS = 10  # of the confidence, in the calibration figure and its error


def layerwise_rates(network: nn.Module, learning_rate: float, decay: float) -> list[dict[str, Any]]:
    """Group parameters for an optimiser, the rate falling from the head to the stem, as fine-tuned ViTs have it.

    Args:
        network: with an ``encoder`` whose ``blocks`` are numbered; its other parameters are the head's.
        learning_rate: of the head.
        decay: the rate of a block over that of the next one up. What lies below the first block has one rate.
    """
    depths = {name: _depth(name) for name, _ in network.named_parameters()}
    top = 1 + max((depth for depth in depths.values() if depth is not None), default=0)
    groups: dict[int, list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        below = 0 if depths[name] is None else top - depths[name]
        groups.setdefault(below, []).append(parameter)
    return [{"params": groups[below], "lr": learning_rate * decay**below} for below in sorted(groups)]


def _depth(name: str) -> int | None:
    """Tell how high a parameter lies in the encoder: 0 below the blocks; None in the head."""
    block = BLOCK.match(name)
    return int(block[1]) + 1 if block else 0 if name.startswith("encoder.") else None


class PrepareTargetBatch(PrepareBatch):
    """Turn a batch of the data loader into volume and target, which is known by the name of the case."""

    def __init__(self, targets: Targets) -> None:
        self.targets = targets

    def __call__(
        self, batchdata: dict[str, Any], device: str | torch.device | None = None, non_blocking: bool = False, **_: Any
    ) -> tuple[Tensor, Tensor, tuple, dict]:
        """Return the volume ``(B, C, D, H, W)``, and the places of classes ``(B,)`` or the numbers ``(B, 1)``."""
        values = torch.tensor([self.targets.values[case] for case in batchdata["case"]], device=device)
        target = values.long() if self.targets.classes else values[:, None]
        return batchdata[Keys.IMAGE].to(device, non_blocking=non_blocking), target, (), {}


class TargetScores(Metric):
    """How well classes or numbers are predicted, over the whole validation set.

    Index it by the name of a figure to attach that to an evaluator. Of classes ``auroc`` (one against the rest, mean
    over the classes that are there), ``accuracy``, ``balanced_accuracy`` and ``calibration_error`` (expected, of
    the class that is predicted, in ten bins); of numbers ``mae``, in their unit, and ``r2``, where they differ.

    Args:
        targets: what is predicted; cases come in the order of its ``validation``.
    """

    def __init__(self, targets: Targets) -> None:
        self.targets = targets
        super().__init__(output_transform=lambda output: (output[Keys.PRED], output[Keys.LABEL]))

    @property
    def names(self) -> list[str]:
        """Of the figures, that which chooses the network first."""
        if self.targets.classes:
            return ["auroc", "accuracy", "balanced_accuracy", "calibration_error"]
        differ = len({self.targets.values[case["case"]] for case in self.targets.validation}) > 1
        return ["mae", "r2"] if differ else ["mae"]

    def by_name(self, names: Sequence[str]) -> dict[str, Metric]:
        """Return ``val_<name>`` for each of the figures."""
        return {f"val_{name}": self[name] for name in names}

    @reinit__is_reduced
    def reset(self) -> None:
        """Start a new validation."""
        self._batches: list[tuple[Tensor, Tensor]] = []

    @reinit__is_reduced
    def update(self, output: tuple[Tensor, Tensor]) -> None:
        """Add one batch of logits ``(B, K)`` and classes ``(B,)``, or of numbers ``(B, 1)`` both."""
        prediction, truth = output
        self._batches.append((probabilities(prediction, self.targets.classes).cpu(), truth.flatten().cpu()))

    def predictions(self) -> tuple[np.ndarray, np.ndarray]:
        """Return probabilities ``(cases, K)`` or numbers ``(cases, 1)``, and what is true, ``(cases,)``."""
        predicted, true = zip(*self._batches, strict=True)
        return torch.cat(predicted).numpy(), torch.cat(true).numpy()

    def compute(self) -> dict[str, float]:
        """Return the figures by name."""
        predicted, true = self.predictions()
        if not np.isfinite(predicted).all():  # the training has diverged, as the recorder then says
            return dict.fromkeys(self.names, math.nan)
        if not self.targets.classes:
            scores = {"mae": mean_absolute_error, "r2": r2_score}
            return {name: float(scores[name](true, predicted[:, 0])) for name in self.names}
        right, present = predicted.argmax(axis=1) == true, np.unique(true)
        counts, confidence, accuracy = calibration_bins(predicted, true)
        return {
            "auroc": float(np.mean([roc_auc_score(true == place, predicted[:, place]) for place in present])),
            "accuracy": float(right.mean()),
            "balanced_accuracy": float(np.mean([right[true == place].mean() for place in present])),
            "calibration_error": float(np.average(np.abs(confidence - accuracy), weights=counts)),
        }


def probabilities(output: Tensor, classes: Sequence[str]) -> Tensor:
    """Turn logits ``(…, K)`` into probabilities; numbers, where there are no classes, stay."""
    return output.softmax(dim=-1) if classes else output


def calibration_bins(predicted: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort cases by the probability of the class that is predicted for them, into ten bins from 0 to 1.

    Args:
        predicted: probabilities ``(cases, K)``.
        true: places of classes, ``(cases,)``.

    Returns:
        The number of cases in each bin, their mean probability, and the share of them that is right; 0 of none.
    """
    confidence, right = predicted.max(axis=1), predicted.argmax(axis=1) == true
    places = np.minimum((confidence * BINS).astype(int), BINS - 1)
    counts, sums, hits = (np.bincount(places, values, BINS) for values in (np.ones_like(confidence), confidence, right))
    return counts, sums / np.maximum(counts, 1), hits / np.maximum(counts, 1)


@dataclass(eq=False)
class ScoresWriter:
    """Write the scores by case, ``scores.csv``, and ``figures/calibration.png``, of the validation that is the best.

    Attach to the evaluator. They are those of the network that is kept.
    """

    scores: TargetScores
    output_dir: str | Path

    def attach(self, engine: Engine) -> None:
        """Follow an evaluator."""
        engine.add_event_handler(Events.COMPLETED, self.write)

    def write(self, engine: Engine) -> None:
        """Write both, if no validation before was better."""
        if engine.state.best_metric_epoch != engine.state.epoch:
            return
        targets, folder = self.scores.targets, Path(self.output_dir)
        predicted, true = self.scores.predictions()
        if not np.isfinite(predicted).all():  # the recorder says that the training has diverged
            return
        truths = [targets.classes[int(value)] if targets.classes else f"{value:.6g}" for value in true]
        cases = [case["case"] for case in targets.validation]
        rows = [
            [case, truth, *answer(values, targets.classes)]
            for case, truth, values in zip(cases, truths, predicted.tolist(), strict=True)
        ]
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        beside = folder / ".scores.csv"
        with beside.open("w", newline="") as file:
            csv.writer(file).writerows([["case", "truth", *columns(targets.classes)], *rows])
        beside.replace(folder / "scores.csv")
        draw = _draw_calibration if targets.classes else _draw_agreement
        figure = draw(predicted, true, targets.field, self.scores.compute())
        beside = folder / "figures" / ".calibration.png"
        figure.savefig(beside, dpi=100)
        beside.replace(folder / "figures" / "calibration.png")


def columns(classes: Sequence[str]) -> list[str]:
    """Name the columns of :func:`answer`."""
    return ["prediction", *(f"probability of {name}" for name in classes)]


def answer(predicted: Sequence[float], classes: Sequence[str]) -> list[str]:
    """Put a case's probabilities, or its number, into words: the class and all probabilities, or the number."""
    figures = [f"{value:.6g}" for value in predicted]
    return [classes[int(np.argmax(predicted))], *figures] if classes else figures


def _draw_calibration(predicted: np.ndarray, true: np.ndarray, field: str, scores: dict[str, float]) -> Figure:
    """Draw how often a predicted class is right by its probability, and how many cases there are of each."""
    counts, confidence, accuracy = calibration_bins(predicted, true)
    figure = Figure(figsize=(5, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    filled = counts > 0
    above.plot([0, 1], [0, 1], color="gray", linestyle="dashed", label="calibrated")
    above.plot(confidence[filled], accuracy[filled], marker="o", label="validation")
    above.set(ylabel="share that is right", xlim=(1 / predicted.shape[1] - 0.05, 1.02), ylim=(-0.03, 1.03))
    above.legend(loc="upper left", frameon=False)
    below.bar((np.arange(BINS) + 0.5) / BINS, counts, width=0.9 / BINS)
    below.set(xlabel="probability of the predicted class", ylabel="cases")
    below.yaxis.get_major_locator().set_params(integer=True)
    title = (
        f"{field}: {len(true)} cases, AUROC {scores['auroc']:.3f}, calibration error {scores['calibration_error']:.3f}"
    )
    figure.suptitle(title, fontsize="medium", parse_math=False)
    return figure


def _draw_agreement(predicted: np.ndarray, true: np.ndarray, field: str, scores: dict[str, float]) -> Figure:
    """Draw predicted against true numbers."""
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    ends = [min(true.min(), predicted.min()), max(true.max(), predicted.max())]
    axes.plot(ends, ends, color="gray", linestyle="dashed")
    axes.scatter(true, predicted[:, 0], alpha=0.7)
    axes.set(xlabel="true", ylabel="predicted", aspect="equal")
    figures = ", ".join(f"{name.upper()} {value:.3g}" for name, value in scores.items())
    figure.suptitle(f"{field}: {len(true)} cases, {figures}", fontsize="medium", parse_math=False)
    return figure


def read_target(weights: str | Path) -> dict[str, Any]:
    """Read what a network predicts off the JSON beside its weights.

    Returns:
        ``field``, and ``classes``, their names in order, none of a number.

    Raises:
        Mistake: when there is no such JSON, or it is not of a classification or regression.
    """
    target = recorded(read_record(weights), "target")
    if not {"field", "classes"} <= target.keys():
        raise Mistake(
            f"nothing beside {weights} says what it predicts: copy it together with the model.json that a "
            "classification or regression left there"
        )
    return target


class PredictTarget:
    """Classify a volume, or predict its number: what a :class:`VolumeEvaluator` does in prediction.

    Args:
        postprocessing: turns ``pred``, the network's output, into probabilities, or leaves the number as it is.
    """

    def __init__(self, postprocessing: Compose) -> None:
        self.postprocessing = postprocessing

    def __call__(self, evaluator: VolumeEvaluator, item: dict[str, Any]) -> dict[str, Any]:
        """Map an item's ``image`` ``(C, D, H, W)`` to probabilities or a number, ``pred`` ``(K,)``."""
        output = evaluator.inferer(item["image"][None].to(evaluator.state.device), evaluator.network)[0]
        if not output.isfinite().all():
            raise ValueError("the network's output is not finite")
        return self.postprocessing({"pred": output})


class PredictionWriter(VolumeWriter):
    """Write what :class:`PredictTarget` returns, a row each, as ``predictions.csv``, which is there at the end.

    Args:
        output_dir: of :class:`VolumeWriter`.
        classes: their names in order; none of a number.
    """

    answers = "predictions"
    failure = "have no prediction"

    def __init__(self, output_dir: str | Path, classes: Sequence[str]) -> None:
        super().__init__(output_dir)
        self.classes, self.beside = classes, self.folder / ".predictions.csv"

    def start(self, engine: Engine) -> None:
        """Begin a new table."""
        super().start(engine)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.beside.unlink(missing_ok=True)
        self._append(["case", *columns(self.classes)])

    def write(self, output: dict[str, Any]) -> None:
        """Write one row."""
        self._append([output["case"], *answer(output["pred"].tolist(), self.classes)])

    def report(self, engine: Engine) -> None:
        """Put the table in its place, then name what is not in it."""
        self.beside.replace(self.folder / "predictions.csv")
        super().report(engine)

    def _append(self, row: Sequence[str]) -> None:
        with self.beside.open("a", newline="") as file:
            csv.writer(file).writerow(row)
