"""What a run has come to, on a page to look at: ``report.html``."""

import contextlib
import csv
import json
import logging
import platform
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import ignite
import ignite.distributed as idist
import monai
import numpy as np
import torch
from ignite.engine import Engine, Events

from .. import machine
from ..data.describing import Case
from ..engines.trainer import NonFiniteLossError
from ..losses import NORMALISED
from ..verdict.rules import Facts, Verdict, judge
from ..weights import bundle_version, checkpoints
from .pages import Element, chart, details, element, picture, section, table, write
from .waiting import WaitingClock

__all__ = ["Setting", "TrainingReport", "WarningLog"]

logger = logging.getLogger(__name__)

PAGE, VERDICT = "report.html", "verdict.json"
LISTED = 500  # cases or warnings on a page, at most
TITLES = {
    "pretraining": "Pre-training",
    "conductor": "Pre-training with the GradientConductor",
    "stem_tuning": "Stem tuning",
    "segmentation": "Fine-tuning for segmentation",
    "classification": "Fine-tuning for classification or regression",
    "continued": "Fine-tuning, continued",
    "inference": "Features",
}
MEANINGS = {
    "loss": "what is trained to be small",
    "objective": "what is tuned to be small",
    "unexplained": "squared error on hidden voxels over their variance: 1 for a constant guess, 0 for perfection",
    "baseline_mean": "the same of the mean of the visible patches around",
    "baseline_nearest": "of the nearest visible patch",
    "baseline_blur": "of a blur of the visible voxels",
    "baseline_loss": "the smallest loss of the three",
    "learning_rate": "at the start of an epoch",
    "structural": "the structural loss, whatever is trained: to compare runs",
    "mse": "squared error on hidden voxels",
    "mae": "absolute error, on hidden voxels or of the number that is predicted",
    "psnr": "peak signal-to-noise ratio on hidden voxels, dB: more is better",
    "ssim": "structural similarity on hidden voxels: 1 is perfect",
    "dice": "overlap with the label maps: 1 is perfect",
    "hausdorff": "95th percentile of the distance between surfaces, voxels: 0 is perfect",
    "auroc": "chance that a case of a class scores above one of another: 0.5 is guessing, 1 is perfect",
    "accuracy": "share of the cases whose class is told right",
    "balanced_accuracy": "the same, each class counting alike",
    "calibration_error": "how far the stated probabilities are from the shares that came true: 0 is perfect",
    "r2": "share of the variance that is explained: 1 is perfect",
    "feature_cosine": "likeness of a whole volume's features to those of patch mode: 1 is the same",
    "volumetric": "squared error of whole volumes, rebuilt",
    "patch_mode": "squared error of the network that was not tuned, in patch mode: the goal",
}
# Of the features of validation volumes: a section of their own.
FEATURES = {
    "effective_rank": "directions along which the features vary: more is better",
    "dead_channels": "share of the channels that never vary: 0 is best",
    "token_cosine": "likeness of the tokens of a volume: near 1 they all say the same",
    "shift_change": "how far tokens move when the volume moves by a patch and they are moved back, relative to "
    "unrelated tokens: 0 is not at all",
    "turn_change": "the same, when the volume turns until its border moves by a quarter of a patch",
    "intensity_change": "the same, when its contrast grows by a tenth",
    "mirror_change": "the same, when left and right are exchanged, where volumes are symmetric themselves",
    "patient_ratio": "distance between volumes over that between two crops of one: more is better",
    "probe_r2": "share of the variance of the label fractions that a linear map reads off frozen tokens",
    "probe_linear": "share of the cases classified rightly, or of the variance explained, from frozen embeddings",
    "probe_neighbours": "the same by the nearest neighbours",
    "monitor_seconds": "what the look has taken",
}
FOLDS = {"train": "training", "val": "validation", "": ""}
FIRST = ("loss", "objective", "dice", "auroc", "r2", "unexplained", "feature_cosine", "hausdorff", "learning_rate")


class Setting(NamedTuple):
    """A knob of a run."""

    value: Any
    usual: Any  # what the recipe's own config says
    is_changed: bool


class WarningLog(logging.Handler):
    """The warnings that a run has logged, each once, with how often."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.messages[record.getMessage()] += 1

    @classmethod
    def begin(cls) -> None:
        """Listen from here on, and forget the warnings of an earlier run."""
        root = logging.getLogger()
        for handler in (handler for handler in list(root.handlers) if isinstance(handler, cls)):
            root.removeHandler(handler)
        root.addHandler(cls())

    @classmethod
    def of_this_run(cls) -> Counter[str]:
        """Return what was heard since the beginning."""
        logs = (handler.messages for handler in logging.getLogger().handlers if isinstance(handler, cls))
        return next(logs, Counter())


@dataclass(eq=False)
class TrainingReport:
    """Write ``report.html``, whole or not at all, after every validation and at the end.

    Of a pre-training also ``verdict.json``, and the log says the verdict at the end.

    Attach to the trainer behind the MetricsRecorder. A page that cannot be written is logged, and the run goes on.
    """

    output_dir: str | Path  # with metrics.jsonl, figures, and the scores of every case
    validator: Engine  # which knows the best epoch
    cases: Mapping[str, Sequence[Case]]  # by fold
    settings: Mapping[str, Setting]
    clock: WaitingClock = field(default_factory=WaitingClock, init=False)
    told: BaseException | None = field(default=None, init=False)  # Ignite tells twice of an error in an iteration

    def attach(self, engine: Engine) -> None:
        """Follow a trainer."""
        if idist.get_rank() == 0:
            self.clock.attach(engine)
            engine.add_event_handler(Events.STARTED, self.start)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.follow)
            engine.add_event_handler(Events.COMPLETED, self.finish)
            engine.add_event_handler(Events.EXCEPTION_RAISED, self.tell_failure)

    def start(self, _: Engine) -> None:
        """Look at the clock."""
        self.started = time.monotonic()

    def follow(self, engine: Engine) -> None:
        """Write the page, if this epoch was validated."""
        records = self._records()
        if records and records[-1]["epoch"] == engine.state.epoch:
            epoch, last = engine.state.epoch, engine.state.max_epochs
            left = timedelta(seconds=round(_usual_seconds(records) * (last - epoch)))
            state = f"Epoch {epoch} of {last} when this page was written. About {left} h to go."
            self._write(records, state if epoch < last else "The last epoch is done.", self._facts(last))

    def finish(self, engine: Engine) -> None:
        """Write the page of a run that has ended."""
        if records := self._records():
            epoch, last = engine.state.epoch, engine.state.max_epochs
            early = f"Stopped after epoch {epoch} of {last}: no better validation for long."
            state = early if epoch < last else f"Finished after {epoch} epochs."
            self._end(records, state, self._facts(last, stopped_early=epoch < last))

    def tell_failure(self, engine: Engine, error: BaseException) -> None:
        """Write the page of a run whose loss is not finite; whoever comes behind raises the error."""
        told, self.told = self.told, error
        if error is not told and isinstance(error, NonFiniteLossError) and (records := self._records()):
            facts = self._facts(engine.state.max_epochs, failure=str(error))
            self._end(records, f"Ended in epoch {engine.state.epoch} by an error: {error}.", facts)

    def _end(self, records: Sequence[dict[str, Any]], state: str, facts: Facts) -> None:
        if (verdict := self._write(records, state, facts)) is not None:
            logger.info("verdict: %s", verdict.paragraph)

    def _facts(self, max_epochs: int, **more: Any) -> Facts:
        within_patches = _is_within_patches(self.settings)
        return Facts(max_epochs, len(self.cases.get("training", ())), within_patches=within_patches, **more)

    def _records(self) -> list[dict[str, Any]]:
        path = Path(self.output_dir) / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def _write(self, records: Sequence[dict[str, Any]], state: str, facts: Facts) -> Verdict | None:
        folder, title, validated = Path(self.output_dir), titled(self.settings), self.validator.state
        best = validated.best_metric_epoch
        counts = ", ".join(f"{len(cases)} for {fold}" for fold, cases in self.cases.items())
        verdict = None
        with spared(folder / VERDICT):
            if (verdict := judge(records, facts)) is not None:
                checkpoints.save_text(json.dumps(verdict._asdict(), indent=1) + "\n", folder / VERDICT)
        judged = [] if verdict is None else [verdict.paragraph]
        outcome = _outcome(records, best, validated.key_metric_name, facts)
        with spared(folder / PAGE):
            write(
                folder / PAGE,
                title,
                *heading(title, [*judged, state, *outcome]),
                section("Curves", *_curves(records, best)),
                section("Metrics", _metrics(records, best)),
                *_features(records, best),
                *_scores(folder),
                *_last_figure(folder / "figures"),
                section("Volumes", element("p", counts, "."), *(_names(*fold) for fold in self.cases.items())),
                section("Time and memory", table(("", ""), self._costs(records))),
                *about_run(self.settings),
            )
        return verdict

    def _costs(self, records: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
        costs = [
            ("an epoch, with its validation", f"{_usual_seconds(records):.3g} s in the median"),
            ("since the last start", f"{timedelta(seconds=round(time.monotonic() - self.started))} h"),
        ]
        if (waiting := self.clock.share()) is not None:
            costs.append(("waiting for data", f"{waiting:.0%} of the training"))
        return [*costs, *memory()]


@contextlib.contextmanager
def spared(path: Path) -> Iterator[None]:
    """Let a run go on whose page cannot be written, and say why."""
    try:
        yield
    except Exception:
        logger.exception("%s is not written; the run goes on", path)


def titled(settings: Mapping[str, Setting]) -> str:
    """Say what a run does, and on which data: the name of the folder or file alone."""
    recipe = settings["recipe"].value if "recipe" in settings else "inference"
    given = settings["dataset_dir"].value if "dataset_dir" in settings else None
    return f"{TITLES.get(recipe, recipe)}: {Path(str(given)).absolute().name if given else 'the simulated sample'}"


def heading(title: str, verdict: Sequence[str]) -> list[Element]:
    """Begin a page: what it is of, when it was written, and what came out, a sentence each."""
    warned = len(WarningLog.of_this_run())
    lines = [element("p", line) for line in verdict]
    if warned:
        count = f"{warned} warnings" if warned > 1 else "One warning"
        lines.append(element("p", element("a", count, href="#warnings"), ", below."))
    when = f"BertsWinMAE {bundle_version()}, {datetime.now():%Y-%m-%d %H:%M}"
    return [element("h1", title), element("div", when, class_="soft"), element("div", *lines, class_="verdict")]


def about_run(settings: Mapping[str, Setting]) -> list[Element]:
    """Tell the warnings, settings and versions of a run: the end of every page."""
    warned = [(message, count) for message, count in WarningLog.of_this_run().items()]
    changed = [(name, _plain(one.value), _plain(one.usual)) for name, one in settings.items() if one.is_changed]
    everything = table(("knob", "value"), ((name, _plain(one.value)) for name, one in settings.items()))
    own = table(("knob", "value", "recipe"), changed) if changed else element("p", "All are as in the recipe.")
    versions = {"Python": platform.python_version(), "PyTorch": torch.__version__, "MONAI": monai.__version__,
                "Ignite": ignite.__version__, "BertsWinMAE": bundle_version()}  # fmt: skip
    heard = table(("warning", "times"), warned[:LISTED]) if warned else element("p", "None was logged.")
    return [
        section("Warnings", heard, *_more(len(warned))),
        section("Settings", own, details(f"All {len(settings)} knobs", everything)),
        section("Versions", element("p", ", ".join(f"{name} {version}" for name, version in versions.items()), ".")),
    ]


def memory() -> list[tuple[str, str]]:
    """Tell the machine's part, and the most memory that this process has taken."""
    lines = [("memory, at its peak", f"{machine.peak_memory() / 1e9:.2f} GB, {machine.cores()} cores")]
    if torch.cuda.is_available() and (on_gpu := torch.cuda.max_memory_allocated()):
        lines.append(("GPU memory, at its peak", f"{on_gpu / 1e9:.2f} GB, {torch.cuda.get_device_name()}"))
    return lines


def _is_within_patches(settings: Mapping[str, Setting]) -> bool:
    return "loss" in settings and settings["loss"].value == NORMALISED


def _outcome(records: Sequence[dict[str, Any]], best: int, key: str, facts: Facts) -> list[str]:
    found = next((record for record in records if record["epoch"] == best), None)
    if found is None:
        return ["No validation has a best epoch yet."]
    lines = [f"The best epoch is {best}, with a {key} of {found[key]:.4g}: checkpoints/model.pt holds its weights."]
    if found.get("val_unexplained") is not None:
        figure, of = "val_unexplained", "of hidden voxels"
        if facts.within_patches:
            figure, of = "val_loss", "within hidden patches"
        left = found[figure]
        share = f"{1 - left:.0%}" if left < 1 else "nothing yet"
        scale = f"{figure} {left:.3f}, where a constant guess scores 1 and a perfect reconstruction 0"
        lines.append(f"It explains {share} of the variance {of} ({scale}).")
    if (cosine := found.get("val_feature_cosine")) is not None:
        before = f"; before tuning to {records[0]['val_feature_cosine']:.3f}" if records[0]["epoch"] == 0 else ""
        lines.append(f"Whole volumes give the features of patch mode to a cosine of {cosine:.3f}{before}.")
    if best == facts.max_epochs > 1:
        lines.append("It is the last epoch: a longer training may do better.")
    return lines


def _curves(records: Sequence[dict[str, Any]], best: int) -> list[Element]:
    """Draw every quantity, that of training and that of validation together; the telling ones first."""
    charts = {
        name: chart(name.replace("_", " "), MEANINGS.get(name, ""), dict(sorted(lines.items())), best)
        for name, lines in sorted(_quantities(records).items())
        if name not in FEATURES
    }
    telling = [charts.pop(name) for name in FIRST if name in charts]
    note = element("p", "Over epochs. The dotted line is the best one.", class_="soft")
    rest = [details(f"{len(charts)} more", element("div", *charts.values(), class_="grid"))] if charts else []
    return [note, element("div", *telling, class_="grid"), *rest]


def _features(records: Sequence[dict[str, Any]], best: int) -> list[Element]:
    """Draw the figures of the features, where they were looked at."""
    found = _quantities(records)
    charts = [chart(name.replace("_", " "), about, found[name], best) for name, about in FEATURES.items()
              if name in found]  # fmt: skip
    note = "Of frozen features of a few validation volumes, each patch embedded alone, nothing hidden."
    grid = element("div", *charts, class_="grid")
    return [section("Features", element("p", note, class_="soft"), grid)] if charts else []


def _quantities(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Gather points of epoch and value by quantity and line; what needs no network is a line beside the network's."""
    quantities: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for record in records:
        for name in record.keys() - {"epoch", "iteration", "seconds"}:
            fold, quantity = name.split("_", 1) if name.startswith(("train_", "val_")) else ("", name)
            line = FOLDS[fold]
            if quantity == "baseline_loss":
                quantity, line = "loss", "without a network"
            elif quantity.startswith("baseline_"):
                quantity, line = "unexplained", f"{quantity.removeprefix('baseline_')}, no network"
            if (value := record[name]) is not None:
                quantities.setdefault(quantity, {}).setdefault(line, []).append((record["epoch"], value))
    return quantities


def _metrics(records: Sequence[dict[str, Any]], best: int) -> Element:
    """Set the first, the best and the last validation side by side."""
    chosen = {"first": records[0], "best": next((one for one in records if one["epoch"] == best), {}),
              "last": records[-1]}  # fmt: skip
    head = ["", *(f"{name}, epoch {one['epoch']}" if one else name for name, one in chosen.items()), "what it is"]
    names = [
        name for name in records[-1] if name.startswith(("train_", "val_")) and name.partition("_")[2] not in FEATURES
    ]
    return table(
        head,
        (
            [name, *(one.get(name) for one in chosen.values()), MEANINGS.get(name.partition("_")[2], "")]
            for name in names
        ),
    )


def _scores(folder: Path) -> list[Element]:
    """Show the scores by label and by case, where a run wrote them: of the last validation."""
    by_metric = {path.name.removesuffix("_raw.csv").removeprefix("val_"): _read_scores(path)
                 for path in sorted(folder.glob("val_*_raw.csv"))}  # fmt: skip
    if not any(by_metric.values()):
        return []
    first, scores = next(iter(by_metric.items()))
    names = [*(f"label {place}" for place in range(1, len(next(iter(scores.values()))))), "mean"]
    means = zip(names, *(np.nanmean([*rows.values()], axis=0).tolist() for rows in by_metric.values()), strict=True)
    cases = sorted(scores, key=lambda case: scores[case][-1])
    each = ([case, *(score for rows in by_metric.values() for score in rows[case])] for case in cases[:LISTED])
    head = ["case", *(f"{metric}, {name}" for metric in by_metric for name in names)]
    return [
        section(
            "Scores",
            element("p", "Of the last validation, which need not be the best.", class_="soft"),
            table(["", *by_metric], means),
            details(f"{len(cases)} cases, by {first}", table(head, each), *_more(len(cases))),
        )
    ]


def _read_scores(path: Path) -> dict[str, list[float]]:
    with path.open(newline="") as file:
        _, *rows = csv.reader(file)
    return {case: list(map(float, values)) for case, *values in rows}


def _last_figure(folder: Path) -> list[Element]:
    paths = sorted(folder.glob("epoch_*.png"))
    if not paths:
        return []
    about = f"original, visible and rebuilt planes of validation volumes, {paths[-1].stem.replace('_', ' ')}"
    image = element("div", picture(paths[-1].read_bytes(), "png", about), class_="wide")
    return [section("Reconstructions", image, element("p", f"{len(paths)} figures are in figures.", class_="soft"))]


def _names(fold: str, cases: Sequence[Case]) -> Element:
    names = element("ul", *(element("li", case.get("case") or str(case["image"])) for case in cases[:LISTED]))
    return details(f"Names of those for {fold}", names, *_more(len(cases)))


def _more(total: int) -> list[Element]:
    return [element("p", f"… and {total - LISTED} more.")] if total > LISTED else []


def _usual_seconds(records: Sequence[dict[str, Any]]) -> float:
    return statistics.median([record["seconds"] for record in records if record["epoch"] > 0] or [0.0])


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
