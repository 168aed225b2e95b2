"""The proof's tables and figures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

__all__ = ["report_convergence", "report_probes", "report_scores"]

mpl.use("Agg")

TITLES = {
    "bertswin": "BertsWin, default stem",
    "bertswin_strict": "BertsWin",
    "vit_mae": "MONAI ViT-MAE",
    "bertswin_fifth": "BertsWin, a fifth of the epochs, batch 1",
    "bertswin_tenth": "BertsWin, a tenth of the epochs, batch 1",
    "random": "BertsWin, random weights",
    "unetr": "MONAI UNETR, from scratch",
    "unet": "MONAI U-Net, from scratch",
}
# The same where they segment.
PRETRAINED_TITLES = {"bertswin_strict": "BertsWin, pre-trained and tuned", "vit_mae": "MONAI ViT-MAE, pre-trained"}
COLOURS = dict(
    zip(
        TITLES,
        ("tab:cyan", "tab:blue", "tab:orange", "navy", "violet", "tab:grey", "tab:red", "tab:green"),
        strict=True,
    )
)


def report_convergence(
    folder: Path,
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    rates: Mapping[str, float],
    seconds: Mapping[str, float],
    selection: Mapping[tuple[str, float], float],
) -> None:
    """Write ``convergence.json``, ``.md`` and ``.png``: who rebuilds how well after how long.

    Args:
        folder: to write to.
        curves: the lines of ``metrics.jsonl`` of each network.
        rates: the learning rate of each.
        seconds: an epoch, of each.
        selection: masked MSE that chose the rates, by network and rate.
    """
    peer_best = _best_epoch(curves["vit_mae"])
    goal = peer_best["val_mse"]
    rows = []
    for name, curve in curves.items():
        best = _best_epoch(curve)
        row: dict[str, Any] = {
            "network": name,
            "learning_rate": rates[name],
            "seconds_per_epoch": seconds[name],
            "epochs": curve[-1]["epoch"],
            "best_epoch": best["epoch"],
            "best_mse": best["val_mse"],
            "best_unexplained": best["val_unexplained"],
        }
        reached = next((record for record in curve if record["val_mse"] <= goal), None)
        if reached:
            row |= {"epochs_to_goal": reached["epoch"], "steps_to_goal": reached["iteration"]}
            for title, peer in (("", curves["vit_mae"][-1]), ("_to_best", peer_best)):
                share = reached["epoch"] / peer["epoch"]
                row |= {
                    f"share_of_epochs{title}": share,
                    f"share_of_steps{title}": reached["iteration"] / peer["iteration"],
                    f"share_of_seconds{title}": share * seconds[name] / seconds["vit_mae"],
                }
        rows.append(row)
    lines = [
        "| network | learning rate | seconds an epoch | epochs | best masked MSE | unexplained | at epoch |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {TITLES[row['network']]} | {row['learning_rate']:g} | {row['seconds_per_epoch']:.2f} | {row['epochs']} "
            f"| {row['best_mse']:.4f} | {row['best_unexplained']:.3f} | {row['best_epoch']} |"
            for row in rows
        ),
        "",
        f"To the ViT-MAE's best, {goal:.4f}, which it reaches in epoch {peer_best['epoch']}:",
        "",
        "| network | epochs | steps | share of all the ViT-MAE's epochs | of its time | of its steps "
        "| share of its epochs until its best | of its time until then |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {TITLES[row['network']]} | {row['epochs_to_goal']} | {row['steps_to_goal']} "
            f"| {row['share_of_epochs']:.2f} | {row['share_of_seconds']:.2f} | {row['share_of_steps']:.2f} "
            f"| {row['share_of_epochs_to_best']:.2f} | {row['share_of_seconds_to_best']:.2f} |"
            if "epochs_to_goal" in row
            else f"| {TITLES[row['network']]} |{' never |' * 7}"
            for row in rows
        ),
        "",
        "Epochs to what the ViT-MAE has reached along the way:",
        "",
        *_milestones(curves),
        "",
        "Masked MSE on the held-out training volumes after the shorter trainings, by learning rate:",
        "",
        *_by_rate({(TITLES[name], rate): [score] for (name, rate), score in selection.items()}),
    ]
    _write(folder, "convergence", {"rows": rows, "curves": curves}, lines)
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6), sharey=True, layout="constrained")
    for name, curve in curves.items():
        errors = [record["val_mse"] for record in curve]
        epochs = [record["epoch"] for record in curve]
        style = {"color": COLOURS[name], "label": TITLES[name]}
        axes[0].plot(epochs, errors, **style)
        axes[1].plot([epoch * seconds[name] / 60 for epoch in epochs], errors, **style)
    ticks = [0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4]
    for axis, label in zip(axes, ("epochs", "minutes of training"), strict=True):
        axis.axhline(goal, color="black", linewidth=0.6, linestyle=":")
        axis.set(xlabel=label, yscale="log")
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("masked MSE, validation volumes")
    axes[0].legend(frameon=False, fontsize="small")
    figure.savefig(folder / "convergence.png", dpi=110)
    plt.close(figure)


def report_scores(
    folder: Path,
    name: str,
    scores: Mapping[tuple[str, int | None, int], Mapping[str, float]],
    contestants: Sequence[str],
    num_labelled: Sequence[int | None],
    seeds: Sequence[int],
    selection: Mapping[tuple[str, int, float], Sequence[float]] | None = None,
) -> None:
    """Write mean and deviation over the seeds to ``<name>.json``, as a table to ``.md``, and as a figure to ``.png``.

    Args:
        folder: to write to.
        name: of the files.
        scores: ``val_dice`` and ``val_hausdorff``, by contestant, number of labels (None: all) and seed.
        contestants: in the order of the rows.
        num_labelled: in the order of the columns.
        seeds: that are averaged.
        selection: Dice that chose the rates, of one or more seeds, by contestant, epochs frozen and rate.
    """
    rows = []
    for contestant in contestants:
        for most in num_labelled:
            found = [scores[contestant, most, seed] for seed in seeds]
            row: dict[str, Any] = {"contestant": contestant, "num_labelled": most}
            for metric in ("val_dice", "val_hausdorff"):
                values = [one[metric] for one in found]
                row |= {metric: statistics.mean(values), f"{metric}_by_seed": values}
                row[f"{metric}_deviation"] = _spread(values)
            rows.append(row)
    titles = _titles(num_labelled)
    by_key = {(row["contestant"], row["num_labelled"]): row for row in rows}

    def cell(contestant: str, most: int | None) -> str:
        row = by_key[contestant, most]
        return f"{100 * row['val_dice']:.1f} ± {100 * row['val_dice_deviation']:.1f} ({row['val_hausdorff']:.2f})"

    lines = [
        f"| Dice in percent (Hausdorff distance in voxels) | {' | '.join(titles)} |",
        f"|---|{'---|' * len(titles)}",
        *(
            f"| {_title(contestant)} | {' | '.join(cell(contestant, most) for most in num_labelled)} |"
            for contestant in contestants
        ),
    ]
    if selection:
        by_way = {
            (f"{_title(name)}{', frozen at first' if freeze else ''}", rate): score
            for (name, freeze, rate), score in selection.items()
        }
        lines += [
            "",
            "Dice on the held-out training volumes, by learning rate (with a second seed where there are two figures):",
            "",
            *_by_rate(by_way),
        ]
    _write(folder, name, {"rows": rows}, lines)
    figure, axis = plt.subplots(figsize=(8, 3.4), layout="constrained")
    width = 0.8 / len(contestants)
    for place, contestant in enumerate(contestants):
        colour = COLOURS.get(contestant, f"C{place}")
        for number, most in enumerate(num_labelled):
            row, across = by_key[contestant, most], number + place * width
            mean, by_seed = 100 * row["val_dice"], [100 * value for value in row["val_dice_by_seed"]]
            label = _title(contestant) if number == 0 else None
            axis.plot([across] * len(by_seed), by_seed, ".", color=colour, alpha=0.5)  # every seed, and their mean
            axis.plot(across, mean, "_", color=colour, markersize=14, markeredgewidth=2.5, label=label)
            axis.annotate(
                f"{mean:.1f}", (across, max(by_seed)), (0, 5), textcoords="offset points", ha="center", size=7
            )
    axis.set(ylabel="Dice, percent")
    axis.margins(y=0.12)
    axis.set_xticks([number + 0.4 - width / 2 for number in range(len(titles))], titles)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize="small", loc="outside right center")
    figure.savefig(folder / f"{name}.png", dpi=110)
    plt.close(figure)


def report_probes(
    folder: Path,
    probes: Mapping[tuple[str, int | None, int], Mapping[str, Any]],
    contestants: Sequence[str],
    num_labelled: Sequence[int | None],
    seeds: Sequence[int],
) -> None:
    """Write the means over the seeds to ``probing.json``, and as a table to ``.md``.

    Args:
        folder: to write to.
        probes: reports of :class:`~bertswin_mae.workflows.FrozenProbe`, by contestant, number of labels (None: all) and
            seed.
        contestants: in the order of the rows.
        num_labelled: in the order of the columns.
        seeds: that are averaged.
    """
    readers = {
        "patches, linear": lambda probe: probe["r2"],
        "embeddings, linear": lambda probe: probe["embedding"]["linear"],
        "embeddings, neighbours": lambda probe: probe["embedding"]["neighbours"],
    }
    rows = []
    for contestant in contestants:
        for title, read in readers.items():
            by_count = [[read(probes[contestant, most, seed]) for seed in seeds] for most in num_labelled]
            rows.append({"contestant": contestant, "probe": title, "r2_by_seed": by_count})
    titles = _titles(num_labelled)
    lines = [
        f"| Share of the variance explained | probe | {' | '.join(titles)} |",
        f"|---|---|{'---|' * len(titles)}",
        *(
            f"| {_title(row['contestant'])} | {row['probe']} "
            f"| {' | '.join(_mean_and_spread(r2) for r2 in row['r2_by_seed'])} |"
            for row in rows
        ),
    ]
    _write(folder, "probing", {"rows": rows, "num_labelled": num_labelled}, lines)


def _write(folder: Path, name: str, report: dict[str, Any], lines: Sequence[str]) -> None:
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    table = "\n".join(lines)
    (folder / f"{name}.md").write_text(table + "\n")
    print(f"{table}\n\nwrote {folder / name}.md")


def _mean_and_spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {_spread(values):.3f}" if len(values) > 1 else mean


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _titles(num_labelled: Sequence[int | None]) -> list[str]:
    return [f"{most or 'all'} labels" for most in num_labelled]


def _title(contestant: str) -> str:
    return (TITLES | PRETRAINED_TITLES).get(contestant, contestant)


def _best_epoch(curve: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return min(curve, key=lambda record: record["val_mse"])


def _milestones(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    peer = curves["vit_mae"]
    parts = [
        [record for record in peer if record["epoch"] <= share * peer[-1]["epoch"]] for share in (0.1, 0.2, 0.5, 1)
    ]
    levels = {part[-1]["epoch"]: _best_epoch(part)["val_mse"] for part in parts if part}
    reached = {
        name: [next((str(r["epoch"]) for r in curve if r["val_mse"] <= level), "never") for level in levels.values()]
        for name, curve in curves.items()
    }
    return [
        f"| masked MSE | {' | '.join(f'{level:.4f} (after {epoch} epochs)' for epoch, level in levels.items())} |",
        f"|---|{'---|' * len(levels)}",
        *(f"| {TITLES[name]} | {' | '.join(epochs)} |" for name, epochs in reached.items()),
    ]


def _by_rate(selection: Mapping[tuple[str, float], Sequence[float]]) -> list[str]:
    titles, rates = (list(dict.fromkeys(key[place] for key in selection)) for place in (0, 1))

    def cell(title: str, rate: float) -> str:
        return ", ".join(f"{score:.4f}" for score in selection[title, rate])

    return [
        f"| learning rate | {' | '.join(f'{rate:g}' for rate in rates)} |",
        f"|---|{'---|' * len(rates)}",
        *(f"| {title} | {' | '.join(cell(title, rate) for rate in rates)} |" for title in titles),
    ]
