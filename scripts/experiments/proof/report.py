"""The proof's tables and figures."""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from ..reporting import figure, markdown_table, write_report
from .contestants import PRETRAINED, PRETRAININGS, PROBED, Measure
from .finetuning import Comparison, Rate
from .gains import Gain, labels_worth

__all__ = ["report_comparison", "report_convergence", "report_probes"]

Record = Mapping[str, Any]  # a line of metrics.jsonl, or a report of FrozenProbe
Curves = Mapping[tuple[str, int], Sequence[Record]]  # by network and seed
Gains = Mapping[tuple[str, str, int | None], Gain]
ByRun = Mapping[tuple[str, int | None, int], Record]  # by contestant, number of labels (None: all) and seed
SHARES = [f"share_of_{what}" for what in ("epochs", "seconds", "steps", "epochs_to_best", "seconds_to_best")]


def report_convergence(
    folder: Path,
    curves: Curves,
    rates: Mapping[str, float],
    seconds: Mapping[str, float],
    selection: Mapping[tuple[str, float], float],
    weights: Mapping[str, str] | None = None,
) -> None:
    """Write ``convergence.json``, ``.md`` and ``.png``: who rebuilds how well after how long.

    Beside the curves it takes the learning rate of each network, the seconds that an epoch takes, the masked MSE that
    chose the rates, and where the weights are.
    """
    names, seeds = _axes(curves)
    rows = {name: [_progress(name, seed, curves, seconds) for seed in seeds] for name in names}
    summary = [_summed_up(its, rates[name], seconds[name]) for name, its in rows.items()]
    to_goal = [_reached(its) for its in rows.values()]
    goals = [_best_epoch(curves["vit_mae", seed]) for seed in seeds]
    goal, when = (_spread([one[what] for one in goals], digits) for what, digits in (("val_mse", 4), ("epoch", 0)))
    lines = [
        *markdown_table(
            "network | learning rate | seconds an epoch | epochs | best masked MSE | unexplained | at epoch", summary
        ),
        f"\nTo the ViT-MAE's best, {goal}, which it reaches in epoch {when}:\n",
        *markdown_table(
            "network | epochs | steps | share of all the ViT-MAE's epochs | of its time | of its steps "
            "| share of its epochs until its best | of its time until then",
            to_goal,
        ),
        "\nMasked MSE on the held-out training volumes after the shorter trainings, by learning rate:\n",
        *_by_rate({(PRETRAININGS[name].title, rate): [score] for (name, rate), score in selection.items()}),
        *(f"\n{name}: {where}" for name, where in (weights or {}).items()),
    ]
    listed = [{"network": name, "seed": seed, "curve": curve} for (name, seed), curve in curves.items()]
    report = {"rows": [row for its in rows.values() for row in its], "rates": rates, "curves": listed}
    write_report(folder, "convergence", report, lines)
    _plot_curves(folder / "convergence.png", curves, seconds, statistics.mean(one["val_mse"] for one in goals))


def report_comparison(
    comparison: Comparison,
    scores: ByRun,
    gains: Gains,
    selection: Mapping[Rate, float],
    guess: Mapping[str, float] | None = None,
) -> None:
    """Write what came out of a :class:`Comparison` to ``.json``, ``.md`` and ``.png`` of its name.

    That is the mean and deviation of the scores over the seeds, who gains how much over whom, and a sentence for each
    number of labels.

    Args:
        comparison: who took part.
        scores: the last line of ``metrics.jsonl`` of each run.
        gains: by contestant, the other one, and number of labels.
        selection: the scores on held-out training cases that chose the rates.
        guess: scores of what does not look at the volumes.
    """
    measure, titles = comparison.measure, {name: about.title for name, about in comparison.task.contestants.items()}
    places = product(comparison.names, comparison.counts)
    rows = [_summary(scores, measure, name, most, comparison.seeds) for name, most in places]
    labels = _labels(comparison.counts)
    sentences = [_sentence(most, comparison, rows, gains) for most in comparison.counts]
    by_rate = {(titles[name], rate): [measure.scale * score] for (name, rate), score in selection.items()}
    lines = [
        *(f"{sentence}\n" for sentence in filter(None, sentences)),
        *markdown_table(" | ".join([measure.title, *labels]), _score_rows(rows, measure, titles, guess)),
        "\nGains, and their 95 % intervals over the validation patients:\n" if gains else "",
        *(markdown_table(" | ".join(["", *labels]), _gain_rows(gains, measure, titles)) if gains else ()),
        f"\n{measure.title.partition(' (')[0]} on held-out training cases, by learning rate:\n",
        *_by_rate(by_rate, measure.digits + 1),
    ]
    report = {"sentences": sentences, "rows": rows, "gains": [*map(_listed, gains.items())], "guess": guess}
    write_report(comparison.place.parent, comparison.place.name, report, lines)
    _plot_comparison(comparison.place.with_suffix(".png"), comparison, rows, gains)


def _score_rows(
    rows: Sequence[Record], measure: Measure, titles: Mapping[str, str], guess: Mapping[str, float] | None
) -> Iterator[str]:
    for name in dict.fromkeys(row["contestant"] for row in rows):
        yield " | ".join([titles[name], *(_cell(row, measure) for row in rows if row["contestant"] == name)])
    if guess:
        shown = f"{measure.scale * guess[measure.key]:.{measure.digits}f}"
        yield " | ".join(["a guess that looks at nothing", *[shown] * len({row["num_labelled"] for row in rows})])


def _summary(scores: ByRun, measure: Measure, name: str, most: int | None, seeds: Sequence[int]) -> dict[str, Any]:
    row: dict[str, Any] = {"contestant": name, "num_labelled": most}
    for key in (measure.key, measure.beside):
        values = [scores[name, most, seed].get(key, math.nan) for seed in seeds]
        row |= {key: statistics.mean(values), f"{key}_by_seed": values, f"{key}_deviation": _deviation(values)}
    return row


def _cell(row: Record, measure: Measure) -> str:
    mean, spread = (measure.scale * row[f"{measure.key}{what}"] for what in ("", "_deviation"))
    return f"{mean:.{measure.digits}f} ± {spread:.{measure.digits}f} ({row[measure.beside]:.2f})"


def _listed(item: tuple[tuple[str, str, int | None], Gain]) -> dict[str, Any]:
    (first, second, most), gain = item
    return {"first": first, "second": second, "num_labelled": most, **gain._asdict()}


def _gain_rows(gains: Gains, measure: Measure, titles: Mapping[str, str]) -> Iterator[str]:
    for pair in dict.fromkeys((first, second) for first, second, _ in gains):
        found = [gain for (first, second, _), gain in gains.items() if (first, second) == pair]
        shown = [[f"{measure.scale * value:+.{measure.digits}f}" for value in gain[:3]] for gain in found]
        cells = (f"{value} ({low} to {high})" for value, low, high in shown)
        yield " | ".join([f"{titles[pair[0]]}, over {titles[pair[1]]}", *cells])


def _sentence(most: int | None, comparison: Comparison, rows: Sequence[Record], gains: Gains) -> str:
    """Say what pre-training gains with a number of labels, and how many labels more would do the same."""
    pairs = [pair for pair in PRETRAINED if (*pair, most) in gains]
    if not pairs:
        return ""
    measure, counts, (first, second) = comparison.measure, comparison.counts, pairs[0]
    gain = gains[first, second, most]
    value, half = (f"{measure.scale * part:.{measure.digits}f}" for part in (abs(gain.value), gain.half_width))
    head = f"With {'all ' if most is None else ''}{_labels([counts[most]])[0]}"
    if gain.low <= 0 <= gain.high:
        return f"{head} no gain is visible: {'-' if gain.value < 0 else ''}{value} ± {half} {measure.unit}."
    if gain.high < 0:
        return f"{head} pre-training costs {value} ± {half} {measure.unit}."
    shown = {(row["contestant"], row["num_labelled"]): measure.sign * row[measure.key] for row in rows}
    curve = [(count, shown[second, other]) for other, count in counts.items() if count >= counts[most]]
    needed = labels_worth(shown[second, most] + gain.value, curve)
    more = (
        "more labels than were tried"
        if needed is None
        else f"{_labels([math.ceil(round(needed - counts[most], 6))])[0]} more"
    )
    return f"{head} pre-training gains {value} ± {half} {measure.unit}; {more} would do the same."


def report_probes(folder: Path, name: str, probes: ByRun) -> None:
    """Write the means over the seeds to ``NAME.json``, and as a table to ``.md``.

    Of label maps and numbers it is the share of the variance that is explained; of classes the AUROC of the
    linear map and the share that the neighbours classify rightly.
    """
    contestants, counts, seeds = _axes(probes)
    (about, *_), measure = probes.values(), "share of the variance explained"
    readers = {
        "embeddings, linear": lambda probe: probe["embedding"]["linear"],
        "embeddings, neighbours": lambda probe: probe["embedding"]["neighbours"],
    }
    if "r2" in about:
        readers = {"patches, linear": lambda probe: probe["r2"]} | readers
    if "majority" in about["embedding"]:
        measure = "share classified rightly"
        readers = {"embeddings, linear: AUROC": lambda probe: probe["embedding"]["linear_auroc"]} | readers
        readers |= {"the most frequent class": lambda probe: probe["embedding"]["majority"]}
    rows = []
    for contestant, (title, read) in product(contestants, readers.items()):
        by_count = [[read(probes[contestant, most, seed]) for seed in seeds] for most in counts]
        rows.append({"contestant": contestant, "probe": title, "score_by_seed": by_count})

    def cell(values: Sequence[float]) -> str:
        return f"{statistics.mean(values):.3f}" + (f" ± {_deviation(values):.3f}" if len(values) > 1 else "")

    lines = markdown_table(
        " | ".join([measure.capitalize(), "probe", *_labels(counts)]),
        (" | ".join([PROBED[row["contestant"]].title, row["probe"], *map(cell, row["score_by_seed"])]) for row in rows),
    )
    write_report(folder, name, {"rows": rows, "num_labelled": counts}, lines)


def _summed_up(its: Sequence[Record], rate: float, seconds: float) -> str:
    figures = (("best_mse", 4), ("best_unexplained", 3), ("best_epoch", 0))
    best = [_spread([row[what] for row in its], digits) for what, digits in figures]
    start = [PRETRAININGS[its[0]["network"]].title, f"{rate:g}", f"{seconds:.2f}", str(its[0]["epochs"])]
    return " | ".join([*start, *best])


def _reached(its: Sequence[Record]) -> str:
    figures = (("epochs_to_goal", 0), ("steps_to_goal", 0), *((share, 2) for share in SHARES))
    cells = [_spread([row.get(what, math.inf) for row in its], digits) for what, digits in figures]
    return " | ".join([PRETRAININGS[its[0]["network"]].title, *cells])


def _spread(values: Sequence[float], digits: int) -> str:
    """Show the mean, and the deviation where there are several; what was not always reached was never."""
    if math.inf in values:
        return "never"
    spread = f" ± {_deviation(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _progress(name: str, seed: int, curves: Curves, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Tell how far a network comes, and how long it takes to the best of the ViT-MAE with the same seed."""
    curve, peer = curves[name, seed], curves["vit_mae", seed]
    best = _best_epoch(curve)
    row = {"network": name, "seed": seed, "seconds_per_epoch": seconds[name], "epochs": curve[-1]["epoch"]}
    row |= {"best_epoch": best["epoch"], "best_mse": best["val_mse"], "best_unexplained": best["val_unexplained"]}
    goal = _best_epoch(peer)
    if reached := next((record for record in curve if record["val_mse"] <= goal["val_mse"]), None):
        row |= {"epochs_to_goal": reached["epoch"], "steps_to_goal": reached["iteration"]}
        for title, end in (("", peer[-1]), ("_to_best", goal)):
            share = row[f"share_of_epochs{title}"] = reached["epoch"] / end["epoch"]
            row[f"share_of_steps{title}"] = reached["iteration"] / end["iteration"]
            row[f"share_of_seconds{title}"] = share * seconds[name] / seconds["vit_mae"]
    return row


def _by_rate(selection: Mapping[tuple[str, float], Sequence[float]], digits: int = 4) -> list[str]:
    titles, rates = _axes(selection)

    def cell(title: str, rate: float) -> str:
        return ", ".join(f"{score:.{digits}f}" for score in selection.get((title, rate), ()))

    head = " | ".join(["learning rate", *(f"{rate:g}" for rate in rates)])
    return markdown_table(head, (" | ".join([title, *(cell(title, rate) for rate in rates)]) for title in titles))


def _plot_curves(path: Path, curves: Curves, seconds: Mapping[str, float], goal: float) -> None:
    _, first = next(iter(curves))
    with figure(path, ncols=2, figsize=(9.5, 3.6), sharey=True) as (_, axes):
        for axis, label in zip(axes, ("epochs", "minutes of training"), strict=True):
            for (name, seed), curve in curves.items():
                scale = 1 if label == "epochs" else seconds[name] / 60
                title = PRETRAININGS[name].title if seed == first else None  # once in the legend
                style = {"color": PRETRAININGS[name].colour, "label": title}
                axis.plot([scale * r["epoch"] for r in curve], [r["val_mse"] for r in curve], **style)
            axis.axhline(goal, color="black", linewidth=0.6, linestyle=":")
            axis.set(xlabel=label, yscale="log")
            axis.minorticks_off()
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
            axis.yaxis.set_major_formatter("{x:g}")
        axes[0].set_ylabel("masked MSE, validation volumes")
        axes[0].legend()


def _plot_comparison(path: Path, comparison: Comparison, rows: Sequence[Record], gains: Gains) -> None:
    """Draw scores, and beside them gains, by number of labels."""
    measure, labels = comparison.measure, _labels(comparison.counts)
    with figure(path, ncols=2, figsize=(11, 4.8), width_ratios=[3, 2]) as (_, (left, right)):
        _plot_scores(left, comparison, rows)
        _plot_gains(right, comparison, gains)
        left.set(ylabel=measure.title.partition(" (")[0])
        right.set(ylabel="gain, 95 % interval over patients")
        for axis in (left, right):
            axis.set_xticks(range(len(labels)), labels)
            axis.set_xlim(-0.5, len(labels) - 0.5)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08))


def _plot_scores(axis: Axes, comparison: Comparison, rows: Sequence[Record]) -> None:
    """Draw every seed, and their mean: the contestants side by side for each number of labels."""
    measure, names = comparison.measure, comparison.names
    for number, name in enumerate(names):
        about, its = comparison.task.contestants[name], [row for row in rows if row["contestant"] == name]
        across = [place + _aside(number, len(names)) for place in range(len(its))]
        means = [measure.scale * row[measure.key] for row in its]
        style = {"markersize": 14, "markeredgewidth": 2.5, "label": about.title}
        axis.plot(across, means, "_", color=about.colour, **style)
        for x, row in zip(across, its, strict=True):
            by_seed = [measure.scale * value for value in row[f"{measure.key}_by_seed"]]
            axis.plot([x] * len(by_seed), by_seed, ".", color=about.colour, alpha=0.5)


def _plot_gains(axis: Axes, comparison: Comparison, gains: Gains) -> None:
    """Draw gains and their intervals, the pairs side by side for each number of labels."""
    about, pairs = comparison.task.contestants, list(dict.fromkeys(pair[:2] for pair in gains))
    for number, (first, second) in enumerate(pairs):
        found = np.array([gain[:3] for pair, gain in gains.items() if pair[:2] == (first, second)])
        value, low, high = comparison.measure.scale * found.T
        across = np.arange(len(value)) + _aside(number, len(pairs))
        title = f"{about[first].title},\nover {about[second].title}"
        style = {"fmt": "o", "capsize": 3, "color": about[second].colour, "label": title}
        # Of a single patient all draws of the bootstrap are the same, but for their last digit.
        axis.errorbar(across, value, np.maximum([value - low, high - value], 0), **style)
    axis.axhline(0, color="black", linewidth=0.6, linestyle=":")


def _aside(number: int, of: int) -> float:
    """Place one of several beside the others."""
    return 0.8 * ((number + 0.5) / of - 0.5)


def _best_epoch(curve: Sequence[Record]) -> Record:
    return min(curve, key=lambda record: record["val_mse"])


def _axes(table: Iterable[tuple]) -> list[list]:
    """Tell what stands in each place of the keys, in their order."""
    return [list(dict.fromkeys(column)) for column in zip(*table, strict=True)]


def _deviation(values: Sequence[float]) -> float:
    if not all(map(math.isfinite, values)):  # of a run that diverged
        return math.inf
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _labels(counts: Iterable[int | None]) -> list[str]:
    return [f"{most or 'all'} label{'s' * (most != 1)}" for most in counts]
