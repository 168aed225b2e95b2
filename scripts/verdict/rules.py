"""The verdict on a pre-training: a few rules, looked at in turn, each with a name, plain words and a knob to turn.

``docs/verdict.md`` says what they are for.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Facts", "Verdict", "judge"]

EASY = 0.05  # unexplained, of the network or of a baseline, below which there was little to learn
EVEN = 0.05  # standard deviation of hidden voxels, of the intensity window, below which they hardly differ
NOISE = 0.95  # unexplained by the best baseline from which on visible patches say nothing of hidden ones
NARROW = 2.0  # effective rank below which features are narrow, and so all alike
DEAD = 0.5  # share of dead channels above which they are alike, too
ALIKE = 0.995  # cosine between tokens above which they are
MARGIN = 0.03  # relative, by which the loss must be below that of a baseline to count as better
FLAT = 0.03  # relative fall of the loss over the second half of a run below which nothing moves
FAST = 0.2  # the same, from which on features that are alike are no sign of a collapse
FEW_LOOKS = 4  # validations before which nothing is said of where a run goes
CURVE = 6  # validations before which it does not say how many epochs are worth it
GAP = 1.25  # growth of validation loss over training loss from which on a network has learned its volumes by heart
GAIN = 0.02  # relative fall that a fifth more epochs must bring to be worth it
SHORT = 2.5  # times the epochs that were done which the curve suggests: from there on a run is under-trained


class Facts(NamedTuple):
    """What the records do not say of a run."""

    max_epochs: int
    volumes: int  # that it trained on
    stopped_early: bool = False  # as no better validation came for long
    failure: str | None = None  # the error that ended it, if its loss was not finite
    within_patches: bool = False  # the loss standardises each patch: what its mean and deviation tell is given away


class Verdict(NamedTuple):
    """What a run has come to."""

    name: str
    paragraph: str
    knob: str | None  # to turn, if any
    figures: dict[str, float | None]  # that the rules looked at; None where one is not finite


class Finding(NamedTuple):
    """What a rule says where it holds."""

    name: str
    words: str
    knob: str | None = None


class Run:
    """What the rules look at.

    Args:
        records: the lines of ``metrics.jsonl``, one or more.
        facts: about the run.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]], facts: Facts) -> None:
        self.facts, last = facts, records[-1]
        self.epochs = last["epoch"]
        self.ended = self.epochs < facts.max_epochs and not facts.stopped_early  # before its time
        trained = [one for one in records if one["epoch"] > 0 and math.isfinite(one["val_loss"])]
        self.curve = [(one["epoch"], one["val_loss"]) for one in trained]
        best = min(
            trained, key=lambda one: one["val_loss"], default={"val_loss": math.nan, "val_unexplained": math.nan}
        )
        self.loss, self.left = best["val_loss"], best["val_unexplained"]
        self.contrast = _contrast(last)
        self.variance = "the variance of hidden voxels"
        self.baseline = min(last[f"val_baseline_{name}"] for name in ("mean", "nearest", "blur"))
        self.baseline_loss = last.get("val_baseline_loss")
        # By what is trained: the structural loss trades squared error for structure. Before version 0.9, the records
        # did not say what loss a baseline has.
        own, its = (self.left, self.baseline) if self.baseline_loss is None else (self.loss, self.baseline_loss)
        self.is_better = own < (1 - MARGIN) * its
        if facts.within_patches and self.baseline_loss is not None:  # of which a constant guess leaves all, again
            self.left, self.baseline, self.variance = own, its, "the variance within hidden patches"
        looked = [one for one in records if "val_effective_rank" in one]
        self.features = {name: looked[-1].get(f"val_{name}") for name in SPREAD} if looked else {}
        rank, dead, alike = (self.features.get(name) for name in SPREAD)
        self.is_narrow = rank is not None and rank < NARROW
        self.is_alike = self.is_narrow or (rank is not None and (dead > DEAD or alike > ALIKE))
        self.gap = _gap([one for one in records if one["epoch"] > 0])
        self.fall = _fall(self.curve) if self.curve else 0.0  # of the loss, relative, over the second half
        self.suggested = suggested_epochs(self.curve) if len(self.curve) >= CURVE else None

    @property
    def figures(self) -> dict[str, float | None]:
        """What the rules looked at, by name."""
        found = {"epochs": self.epochs, "unexplained": self.left, "best_baseline": self.baseline,
                 "loss": self.loss, "best_baseline_loss": self.baseline_loss, "contrast": self.contrast,
                 "gap": self.gap, "suggested_epochs": self.suggested, **self.features}  # fmt: skip
        return {name: None if value is None or not math.isfinite(value) else value for name, value in found.items()}


SPREAD = ("effective_rank", "dead_channels", "token_cosine")


def judge(records: Sequence[Mapping[str, Any]], facts: Facts) -> Verdict | None:
    """Judge a pre-training by the lines of its ``metrics.jsonl``; None where they are of something else."""
    if not records or "val_baseline_mean" not in records[-1]:
        return None
    run = Run(records, facts)
    found = next(finding for rule in RULES if (finding := rule(run)) is not None)
    return Verdict(found.name, f"{found.name.capitalize()}: {found.words}", found.knob, run.figures)


def diverged(run: Run) -> Finding | None:
    """Hold where the loss became infinite."""
    if run.facts.failure is None:
        return None
    words = (
        f"after epoch {run.epochs} the loss was no longer finite, and the run ended. Volumes with extreme values do "
        "this, and so does a rate that is too high: look at the volumes that the error names, then take a third of "
        "the learning_rate."
    )
    return Finding("diverged", words, "learning_rate")


def too_easy(run: Run) -> Finding | None:
    """Hold where hidden voxels hardly differ, or hardly more than a blur of the visible ones tells."""
    if run.contrast < EVEN:
        reason = f"hidden voxels hardly differ: their standard deviation is {run.contrast:.1%} of the intensity window"
    elif min(run.left, run.baseline) <= EASY:
        reason = (
            f"the network leaves {run.left:.1%} of {run.variance} unexplained, and what needs no network "
            f"{run.baseline:.1%}"
        )
    else:
        return None
    words = (
        f"{reason}, so there was little to learn and the features need not be good. Crops of padding, air or smooth "
        "volumes do this. Look at the reconstructions. --field_of_view foreground hides patches of the body alone; "
        "where that is not it, hide more (mask_ratio) or take finer voxels (spacing)."
    )
    return Finding("too easy", words, "field_of_view")


def nothing_to_learn(run: Run) -> Finding | None:
    """Hold where hidden patches do not follow from visible ones, by no baseline and not by the network."""
    if run.left < NOISE or run.baseline < NOISE:
        return None
    words = (
        f"neither the network ({run.left:.2f}) nor what needs no network ({run.baseline:.2f}) explains more of hidden "
        "voxels than a constant guess, which scores 1. The volumes hold no structure of the size of a patch. Look at "
        "the reconstructions: noise, a wrong modality or damaged files do this. No knob of the training helps."
    )
    return Finding("nothing to learn", words, "dataset_dir")


def over_fitted(run: Run) -> Finding | None:
    """Hold where the loss falls on training volumes only."""
    if run.gap is None or run.gap < GAP:
        return None
    words = (
        f"validation loss over training loss has grown to {run.gap:.2f} times what it was at the beginning: "
        f"the network learns its {run.facts.volumes} training volumes by heart. More volumes help most. With these, "
        "turn and scale every draw (--affine_prob 1), mirror it where left and right may be exchanged "
        "(--flip_prob 0.5), and train for fewer epochs; model.pt holds the best."
    )
    return Finding("over-fitted", words, "affine_prob")


def collapsed(run: Run) -> Finding | None:
    """Hold where features say the same of all patches, or the loss stands still, no better than a baseline's."""
    # Features that are alike for some epochs widen again where the loss falls fast: the structural one has it so.
    if len(run.curve) < FEW_LOOKS or run.is_better or run.fall >= (FAST if run.is_alike else FLAT):
        return None
    words = (
        f"after {run.epochs} epochs the network is no better than what needs no network, and makes no progress: "
        f"{_standing(run)}.{_spread(run)} A rate that is too high does this: start anew with a third of the "
        "learning_rate."
    )
    return Finding("collapsed", words, "learning_rate")


def under_trained(run: Run) -> Finding | None:
    """Hold where the run ended before its time, its curve falls on, its features are narrow yet, or it is no better."""
    is_short = run.suggested is not None and run.suggested > SHORT * run.epochs
    if not (run.ended or is_short or run.is_narrow or not run.is_better):
        return None
    spread = f"{_spread(run)} Longer training widens them, and tells more." if run.is_narrow else ""
    done = f"{run.epochs} of {run.facts.max_epochs} epochs are done" if run.ended else f"{run.epochs} epochs were few"
    beside = "better" if run.is_better else "no better"
    words = f"{done}. The network is {beside} than what needs no network: {_standing(run)}.{spread}{_advice(run)}" + (
        " --resume true does the rest."
        if run.ended
        else " Start anew with a larger early_stop_patience."
        if run.facts.stopped_early
        else " Start anew with more max_epochs: the rate ends with them."
    )
    knob = "resume" if run.ended else "early_stop_patience" if run.facts.stopped_early else "max_epochs"
    return Finding("under-trained", words, knob)


def healthy(run: Run) -> Finding:
    """Hold where nothing else does."""
    spread = ""
    if run.features:
        rank, dead, _ = (run.features[name] for name in SPREAD)
        spread = f" The features vary along {rank:.0f} directions, and {dead:.0%} of their channels are dead."
    words = (
        f"on volumes that it has not trained on, the network is better than what needs no network: {_standing(run)}."
        f"{spread}{_advice(run)}"
    )
    return Finding("healthy", words, None)


RULES: tuple[Callable[[Run], Finding | None], ...] = (
    *(diverged, too_easy, nothing_to_learn, over_fitted, collapsed, under_trained, healthy),
)


def suggested_epochs(curve: Sequence[tuple[float, float]]) -> int:
    """Say at how many epochs a fifth more would bring less than 2 %, by the curve so far; at least those done.

    A constant plus an exponential is fitted. Curves usually fall longer than that, so it is a lower bound; ten times
    the epochs done is the most that is said.
    """
    epochs, left = np.array(curve, dtype=float).T
    done, fits = epochs[-1], []
    for span in done * np.geomspace(0.05, 5, 60):
        decay = np.exp(-epochs / span)
        floor, height = np.linalg.lstsq(np.stack([np.ones_like(decay), decay], axis=1), left, rcond=None)[0]
        if floor < 0:
            floor, height = 0.0, (left @ decay) / (decay @ decay)
        fits.append((np.square(floor + height * decay - left).sum(), floor, height, span))
    _, floor, height, span = min(fits)
    candidates = done * np.geomspace(1, 10, 100)
    now, later = (floor + height * np.exp(-candidates * more / span) for more in (1, 1.2))
    enough = candidates[(now - later) < GAIN * now]
    return round(enough[0] if len(enough) else candidates[-1])


def _standing(run: Run) -> str:
    left = f"{run.left:.2f} of {run.variance} unexplained against {run.baseline:.2f}"
    if run.baseline_loss is None or run.facts.within_patches:
        return left
    beside = "and" if run.is_better == (run.left < run.baseline) else "although with"
    return f"a loss of {run.loss:.4g} against {run.baseline_loss:.4g}, {beside} {left}"


def _spread(run: Run) -> str:
    if not run.features:
        return ""
    rank, dead, alike = (run.features[name] for name in SPREAD)
    return (
        f" The features vary along {rank:.1f} directions, {dead:.0%} of their channels are dead, and the cosine "
        f"between two tokens of a volume is {alike:.3f}."
    )


def _advice(run: Run) -> str:
    if run.suggested is None:
        return " It has too few validations to say how many epochs it takes."
    if run.suggested <= 1.05 * run.epochs:
        return "" if run.ended or not run.is_better else " By its curve, more epochs would bring little."
    return f" By its curve, at least {run.suggested} epochs are worth it."


def _contrast(record: Mapping[str, Any]) -> float:
    """Standard deviation of the hidden voxels over the width of the intensity window, by what is known of their error.

    The window's square is the squared error times what the PSNR says; the variance is that error over its share.
    """
    left = record["val_unexplained"]
    return math.sqrt(10 ** (-record["val_psnr"] / 10) / left) if left > 0 else 0.0


def _fall(curve: Sequence[tuple[float, float]]) -> float:
    """How far the loss fell over the second half of the epochs, relative to where that began."""
    epochs, loss = np.array(curve, dtype=float).T
    middle = np.interp(epochs[-1] / 2, epochs, loss)
    return float(1 - loss[epochs > epochs[-1] / 2].min() / middle) if middle > 0 else 0.0


def _gap(records: Sequence[Mapping[str, Any]]) -> float | None:
    """How much validation loss over training loss has grown since the first quarter of the validations.

    A training loss is the mean over an epoch: in the first epochs, validation, behind them, is below it. That counts as
    the same.
    """
    ratios = [one["val_loss"] / one["train_loss"] for one in records if one.get("train_loss")]
    if len(ratios) < FEW_LOOKS:
        return None
    return ratios[-1] / max(1.0, min(ratios[: len(ratios) // 4]))
