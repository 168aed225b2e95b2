"""The proof's tables and figures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

__all__ = ["report_convergence", "report_probes", "report_scores"]

TITLES = {
    "bertswin": "BertsWin",
    "bertswin_strict": "BertsWin, strict stem",
    "vit_mae": "MONAI ViT-MAE",
    "bertswin_tenth": "BertsWin, a tenth of the epochs",
    "bertswin_fifth": "BertsWin, a fifth of the epochs",
    "random": "BertsWin, random weights",
    "unetr": "MONAI UNETR, from scratch",
    "unet": "MONAI U-Net, from scratch",
}
COLOURS = dict(
    zip(
        TITLES,
        ("tab:blue", "tab:cyan", "tab:orange", "violet", "navy", "tab:grey", "tab:red", "tab:green"),
        strict=True,
    )
)


def report_convergence(
    folder: Path,
    curves: Mapping[str, Sequence[tuple[int, float, float]]],
    rates: Mapping[str, float],
    seconds: Mapping[str, float],
    selection: Mapping[tuple[str, float], float],
    selection_epochs: int,
) -> None:
    """Write ``convergence.json``, ``.md`` and ``.png``: who rebuilds how well after how long.

    Args:
        folder: to write to.
        curves: epoch, masked MSE and unexplained share of each validation, by network.
        rates: the learning rate of each.
        seconds: an epoch, of each.
        selection: masked MSE that chose the rates, by network and rate.
        selection_epochs: that it was found after.
    """
    # The ViT-MAE's best, its epochs until then, and all of them.
    goal, peers_best_epoch = min((error, epoch) for epoch, error, _ in curves["vit_mae"])
    peers_epochs = curves["vit_mae"][-1][0]
    rows = []
    for name, curve in curves.items():
        best_epoch, best_mse, best_unexplained = min(curve, key=lambda point: point[1])
        reached = next((epoch for epoch, error, _ in curve if error <= goal), None)
        rows.append(
            {
                "network": name,
                "learning_rate": rates[name],
                "seconds_per_epoch": seconds[name],
                "best_mse": best_mse,
                "best_unexplained": best_unexplained,
                "best_epoch": best_epoch,
                "epochs_to_goal": reached,
                "share_of_epochs": reached and reached / peers_epochs,
                "share_of_epochs_to_best": reached and reached / peers_best_epoch,
                "share_of_seconds": reached and reached * seconds[name] / (peers_epochs * seconds["vit_mae"]),
            }
        )
    lines = [
        "| network | learning rate | seconds an epoch | best masked MSE | unexplained | at epoch "
        "| epochs to the ViT-MAE's best | share of its epochs | of those until its best | of its time |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {TITLES[row['network']]} | {row['learning_rate']:g} | {row['seconds_per_epoch']:.2f} "
            f"| {row['best_mse']:.4f} | {row['best_unexplained']:.3f} | {row['best_epoch']} "
            f"| {_shown(row['epochs_to_goal'], 'd')} | {_shown(row['share_of_epochs'])} "
            f"| {_shown(row['share_of_epochs_to_best'])} | {_shown(row['share_of_seconds'])} |"
            for row in rows
        ),
        "",
        f"Masked MSE on the held-out training volumes after {selection_epochs} epochs, by learning rate:",
        "",
        *_by_rate(selection),
    ]
    _write(folder, "convergence", {"rows": rows, "curves": curves}, lines)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for name, curve in curves.items():
        epoch, error, _ = zip(*curve, strict=True)
        style = {"color": COLOURS[name], "label": TITLES[name]}
        axes[0].plot(epoch, error, **style)
        axes[1].plot([number * seconds[name] / 60 for number in epoch], error, **style)
    for axis, label in zip(axes, ("epochs", "minutes of training"), strict=True):
        axis.axhline(goal, color="black", linewidth=0.6, linestyle=":")
        axis.set(xlabel=label, yscale="log")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("masked MSE, validation volumes")
    axes[0].legend(frameon=False)
    figure.savefig(folder / "convergence.png", dpi=110)
    plt.close(figure)


def report_scores(
    folder: Path,
    name: str,
    scores: Mapping[tuple[str, int | None, int], Mapping[str, float]],
    contestants: Sequence[str],
    num_labelled: Sequence[int | None],
    seeds: Sequence[int],
    selection: Mapping[tuple[str, float], float] | None = None,
) -> None:
    """Write mean and deviation over the seeds to ``<name>.json``, as a table to ``.md``, and as a figure to ``.png``.

    Args:
        folder: to write to.
        name: of the files.
        scores: ``val_dice`` and ``val_hausdorff``, by contestant, number of labels (None: all) and seed.
        contestants: in the order of the rows.
        num_labelled: in the order of the columns.
        seeds: that are averaged.
        selection: Dice that chose the rates, by contestant and rate.
    """
    rows = []
    for contestant in contestants:
        for most in num_labelled:
            found = [scores[contestant, most, seed] for seed in seeds]
            row: dict[str, Any] = {"contestant": contestant, "num_labelled": most}
            for metric in ("val_dice", "val_hausdorff"):
                values = [one[metric] for one in found]
                row |= {metric: statistics.mean(values), f"{metric}_by_seed": values}
                row[f"{metric}_deviation"] = statistics.stdev(values) if len(values) > 1 else 0.0
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
            f"| {TITLES.get(contestant, contestant)} | {' | '.join(cell(contestant, most) for most in num_labelled)} |"
            for contestant in contestants
        ),
    ]
    if selection:
        lines += ["", "Dice on the held-out training volumes, by learning rate:", "", *_by_rate(selection)]
    _write(folder, name, {"rows": rows}, lines)
    figure, axis = plt.subplots(figsize=(8, 3.4), layout="constrained")
    width = 0.8 / len(contestants)
    for place, contestant in enumerate(contestants):
        colour = COLOURS.get(contestant, f"C{place}")
        for number, most in enumerate(num_labelled):
            row, across = by_key[contestant, most], number + place * width
            mean, by_seed = 100 * row["val_dice"], [100 * value for value in row["val_dice_by_seed"]]
            label = TITLES.get(contestant, contestant) if number == 0 else None
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
        probes: reports of :class:`~bertswin_mae.probe.FrozenProbe`, by contestant, number of labels (None: all) and
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
            f"| {TITLES[row['contestant']]} | {row['probe']} "
            f"| {' | '.join(f'{statistics.mean(values):.3f}' for values in row['r2_by_seed'])} |"
            for row in rows
        ),
    ]
    _write(folder, "probing", {"rows": rows, "num_labelled": num_labelled}, lines)


def _write(folder: Path, name: str, report: dict[str, Any], lines: Sequence[str]) -> None:
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    table = "\n".join(lines)
    (folder / f"{name}.md").write_text(table + "\n")
    print(f"{table}\n\nwrote {folder / name}.md")


def _titles(num_labelled: Sequence[int | None]) -> list[str]:
    return [f"{most or 'all'} labels" for most in num_labelled]


def _by_rate(selection: Mapping[tuple[str, float], float]) -> list[str]:
    names, rates = (list(dict.fromkeys(key[place] for key in selection)) for place in (0, 1))
    return [
        f"| network | {' | '.join(f'{rate:g}' for rate in rates)} |",
        f"|---|{'---|' * len(rates)}",
        *(f"| {TITLES[name]} | {' | '.join(f'{selection[name, rate]:.4f}' for rate in rates)} |" for name in names),
    ]


def _shown(value: float | None, form: str = ".2f") -> str:
    return "never" if value is None else format(value, form)
