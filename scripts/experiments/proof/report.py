"""The proof's tables and figures."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from ..reporting import figure, markdown_table, write_report
from .contestants import PRETRAININGS, SEGMENTATIONS

__all__ = ["report_convergence", "report_probes", "report_scores"]

Record = Mapping[str, Any]  # a line of metrics.jsonl, or a report of FrozenProbe
Curves = Mapping[str, Sequence[Record]]  # by network
ByRun = Mapping[tuple[str, int | None, int], Record]  # by contestant, number of labels (None: all) and seed
SHARES = [f"share_of_{what}" for what in ("epochs", "seconds", "steps", "epochs_to_best", "seconds_to_best")]


def report_convergence(
    folder: Path,
    curves: Curves,
    rates: Mapping[str, float],
    seconds: Mapping[str, float],
    selection: Mapping[tuple[str, float], float],
) -> None:
    """Write ``convergence.json``, ``.md`` and ``.png``: who rebuilds how well after how long.

    Beside the curves it takes the learning rate of each network, the seconds that an epoch takes, and the masked MSE
    that chose the rates.
    """
    goal = _best_epoch(curves["vit_mae"])
    rows = [_progress(name, curves, seconds) | {"learning_rate": rates[name]} for name in curves]
    summary = [
        f"{PRETRAININGS[row['network']].title} | {row['learning_rate']:g} | {row['seconds_per_epoch']:.2f} "
        f"| {row['epochs']} | {row['best_mse']:.4f} | {row['best_unexplained']:.3f} | {row['best_epoch']}"
        for row in rows
    ]
    to_goal = [
        (
            [str(row["epochs_to_goal"]), str(row["steps_to_goal"]), *(f"{row[share]:.2f}" for share in SHARES)]
            if "epochs_to_goal" in row
            else ["never"] * 7
        )
        for row in rows
    ]
    lines = [
        *markdown_table(
            "network | learning rate | seconds an epoch | epochs | best masked MSE | unexplained | at epoch", summary
        ),
        f"\nTo the ViT-MAE's best, {goal['val_mse']:.4f}, which it reaches in epoch {goal['epoch']}:\n",
        *markdown_table(
            "network | epochs | steps | share of all the ViT-MAE's epochs | of its time | of its steps "
            "| share of its epochs until its best | of its time until then",
            (" | ".join([PRETRAININGS[name].title, *cells]) for name, cells in zip(curves, to_goal, strict=True)),
        ),
        "\nMasked MSE on the held-out training volumes after the shorter trainings, by learning rate:\n",
        *_by_rate({(PRETRAININGS[name].title, rate): [score] for (name, rate), score in selection.items()}),
    ]
    write_report(folder, "convergence", {"rows": rows, "curves": curves}, lines)
    _plot_curves(folder / "convergence.png", curves, seconds, goal["val_mse"])


def report_scores(
    folder: Path, name: str, scores: ByRun, selection: Mapping[tuple[str, int, float], Sequence[float]] | None = None
) -> None:
    """Write mean and deviation over the seeds to ``<name>.json``, as a table to ``.md``, and as a figure to ``.png``.

    Of the scores it takes ``val_dice`` and ``val_hausdorff``; of the selection, the Dice that chose the rates, of one
    or more seeds, by contestant, epochs frozen and rate.
    """
    contestants, counts, seeds = _axes(scores)
    rows: dict[str, list[dict[str, Any]]] = {contestant: [] for contestant in contestants}
    for contestant, most in product(contestants, counts):
        row: dict[str, Any] = {"contestant": contestant, "num_labelled": most}
        for metric in ("val_dice", "val_hausdorff"):
            values = [scores[contestant, most, seed][metric] for seed in seeds]
            row |= {metric: statistics.mean(values), f"{metric}_by_seed": values}
            row[f"{metric}_deviation"] = _deviation(values)
        rows[contestant].append(row)

    def cell(row: Record) -> str:
        return f"{100 * row['val_dice']:.1f} ± {100 * row['val_dice_deviation']:.1f} ({row['val_hausdorff']:.2f})"

    lines = markdown_table(
        " | ".join(["Dice in percent (Hausdorff distance in voxels)", *_labels(counts)]),
        (" | ".join([_title(contestant), *map(cell, its)]) for contestant, its in rows.items()),
    )
    if selection:
        by_rate = {
            (f"{_title(contestant)}{', frozen at first' if freeze else ''}", rate): dice
            for (contestant, freeze, rate), dice in selection.items()
        }
        where = "on the held-out training volumes, by learning rate (with a second seed where there are two figures)"
        lines += [f"\nDice {where}:\n", *_by_rate(by_rate)]
    write_report(folder, name, {"rows": [row for its in rows.values() for row in its]}, lines)
    _plot_scores(folder / f"{name}.png", rows, _labels(counts))


def report_probes(folder: Path, probes: ByRun) -> None:
    """Write the means over the seeds to ``probing.json``, and as a table to ``.md``."""
    contestants, counts, seeds = _axes(probes)
    readers = {
        "patches, linear": lambda probe: probe["r2"],
        "embeddings, linear": lambda probe: probe["embedding"]["linear"],
        "embeddings, neighbours": lambda probe: probe["embedding"]["neighbours"],
    }
    rows = []
    for contestant, (title, read) in product(contestants, readers.items()):
        by_count = [[read(probes[contestant, most, seed]) for seed in seeds] for most in counts]
        rows.append({"contestant": contestant, "probe": title, "r2_by_seed": by_count})

    def cell(values: Sequence[float]) -> str:
        return f"{statistics.mean(values):.3f}" + (f" ± {_deviation(values):.3f}" if len(values) > 1 else "")

    lines = markdown_table(
        " | ".join(["Share of the variance explained", "probe", *_labels(counts)]),
        (" | ".join([_title(row["contestant"]), row["probe"], *map(cell, row["r2_by_seed"])]) for row in rows),
    )
    write_report(folder, "probing", {"rows": rows, "num_labelled": counts}, lines)


def _progress(name: str, curves: Curves, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Tell how far a network comes, and how long it takes to the ViT-MAE's best."""
    curve, peer, best = curves[name], curves["vit_mae"], _best_epoch(curves[name])
    row = {"network": name, "seconds_per_epoch": seconds[name], "epochs": curve[-1]["epoch"]}
    row |= {"best_epoch": best["epoch"], "best_mse": best["val_mse"], "best_unexplained": best["val_unexplained"]}
    goal = _best_epoch(peer)
    if reached := next((record for record in curve if record["val_mse"] <= goal["val_mse"]), None):
        row |= {"epochs_to_goal": reached["epoch"], "steps_to_goal": reached["iteration"]}
        for title, end in (("", peer[-1]), ("_to_best", goal)):
            share = row[f"share_of_epochs{title}"] = reached["epoch"] / end["epoch"]
            row[f"share_of_steps{title}"] = reached["iteration"] / end["iteration"]
            row[f"share_of_seconds{title}"] = share * seconds[name] / seconds["vit_mae"]
    return row


def _by_rate(selection: Mapping[tuple[str, float], Sequence[float]]) -> list[str]:
    titles, rates = _axes(selection)

    def cell(title: str, rate: float) -> str:
        return ", ".join(f"{score:.4f}" for score in selection[title, rate])

    head = " | ".join(["learning rate", *(f"{rate:g}" for rate in rates)])
    return markdown_table(head, (" | ".join([title, *(cell(title, rate) for rate in rates)]) for title in titles))


def _plot_curves(path: Path, curves: Curves, seconds: Mapping[str, float], goal: float) -> None:
    ticks = [0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4]
    with figure(path, ncols=2, figsize=(9.5, 3.6), sharey=True) as (_, axes):
        for axis, label in zip(axes, ("epochs", "minutes of training"), strict=True):
            for name, curve in curves.items():
                scale = 1 if label == "epochs" else seconds[name] / 60
                style = {"color": PRETRAININGS[name].colour, "label": PRETRAININGS[name].title}
                axis.plot([scale * r["epoch"] for r in curve], [r["val_mse"] for r in curve], **style)
            axis.axhline(goal, color="black", linewidth=0.6, linestyle=":")
            axis.set(xlabel=label, yscale="log")
            axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
        axes[0].set_ylabel("masked MSE, validation volumes")
        axes[0].legend()


def _plot_scores(path: Path, rows: Mapping[str, Sequence[Record]], labels: Sequence[str]) -> None:
    """Draw every seed, and their mean: the contestants side by side for each number of labels."""
    width = 0.8 / len(rows)
    above = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center", "size": 7}
    with figure(path, figsize=(8, 3.4)) as (drawn, axis):
        for place, (contestant, its) in enumerate(rows.items()):
            colour = SEGMENTATIONS[contestant].colour if contestant in SEGMENTATIONS else f"C{place}"
            across, means = [column + place * width for column in range(len(its))], [100 * r["val_dice"] for r in its]
            label = _title(contestant)
            axis.plot(across, means, "_", color=colour, markersize=14, markeredgewidth=2.5, label=label)
            for x, mean, row in zip(across, means, its, strict=True):
                by_seed = [100 * dice for dice in row["val_dice_by_seed"]]
                axis.plot([x] * len(by_seed), by_seed, ".", color=colour, alpha=0.5)
                axis.annotate(f"{mean:.1f}", (x, max(by_seed)), **above)
        axis.set(ylabel="Dice, percent")
        axis.margins(y=0.12)
        axis.set_xticks([column + 0.4 - width / 2 for column in range(len(labels))], labels)
        drawn.legend(loc="outside right center")


def _best_epoch(curve: Sequence[Record]) -> Record:
    return min(curve, key=lambda record: record["val_mse"])


def _axes(table: Iterable[tuple]) -> list[list]:
    """Tell what stands in each place of the keys, in their order."""
    return [list(dict.fromkeys(column)) for column in zip(*table, strict=True)]


def _deviation(values: Sequence[float]) -> float:
    if math.inf in values:  # of a run that diverged
        return math.inf
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _labels(counts: Sequence[int | None]) -> list[str]:
    return [f"{most or 'all'} labels" for most in counts]


def _title(contestant: str) -> str:
    return SEGMENTATIONS[contestant].title if contestant in SEGMENTATIONS else contestant
