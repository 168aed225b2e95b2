"""The benchmark's tables and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

__all__ = ["FEATURES", "PATCH_FEATURES", "STEP", "TITLES", "networks_table", "plot_ratios", "plot_scaling"]

mpl.use("Agg")

TASKS = STEP, PATCH_FEATURES, FEATURES = "training step", "features, patches", "features, volume"
TITLES = {"bertswin": "BertsWin", "plain": "plain eager BertsWin", "vit_mae": "MONAI ViT-MAE"}


def networks_table(rows: Sequence[dict[str, Any]]) -> str:
    """Write the rows as a Markdown table."""
    lines = [
        "| size | task | contestant | parameters | TFLOP | seconds (fastest to slowest) | time of plain fp32 "
        "| of matrix rate | peak memory | memory of plain fp32 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["img_size"], row["batch_size"], TASKS.index(row["task"]))):
        seconds = [_shown(row[name], ".3g") for name in ("seconds", "fastest", "slowest")]
        gigabytes, teraflops = (
            value and value / scale for value, scale in ((row["peak_bytes"], 1e9), (row["flops"], 1e12))
        )
        lines.append(
            f"| {row['batch_size']} of {row['img_size']}³ | {row['task']} | {row['contestant']} "
            f"| {row['parameters'] / 1e6:.1f} M | {_shown(teraflops, '.3g')} "
            f"| {seconds[0]} ({seconds[1]} to {seconds[2]}) | {_shown(row['of_plain_fp32'])} "
            f"| {_shown(row['of_matrix_rate'], '.0%')} | {_shown(gigabytes)} GB "
            f"| {_shown(row['memory_of_plain_fp32'])} |"
        )
    return "\n".join(lines)


def _shown(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def plot_ratios(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of time for every task at the largest size, as a share of the plain form's."""
    most = max(row["img_size"] ** 3 * row["batch_size"] for row in rows)
    rows = [row for row in rows if row["img_size"] ** 3 * row["batch_size"] == most]
    names = [name for name in TASKS if any(row["task"] == name for row in rows)]
    styles = _styles(rows)
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.2), sharey=True, layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        ratios = {row["contestant"]: row["of_plain_fp32"] or 0 for row in rows if row["task"] == name}
        values = [ratios.get(contestant, 0) for contestant in styles]
        bars = axis.barh(list(styles), values, color=[style["color"] for style in styles.values()])
        axis.bar_label(bars, [f" {value:.2f}" if value else " cannot" for value in values])
        axis.set(title=name, xlim=(0, 1.2 * max(values) or 1), xlabel="time / plain eager fp32")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_scaling(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Time against voxels at the smallest batch."""
    rows = [row for row in rows if row["batch_size"] == min(row["batch_size"] for row in rows)]
    names = [name for name in TASKS if any(row["task"] == name for row in rows)]
    styles, sizes = _styles(rows), sorted({row["img_size"] for row in rows})
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.6), layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        for contestant, style in styles.items():
            points = [
                (row["img_size"] ** 3, row["seconds"])
                for row in rows
                if row["task"] == name and row["contestant"] == contestant and row["seconds"]
            ]
            if points:
                axis.loglog(*zip(*points, strict=True), marker="o", label=contestant, **style)
        axis.set_xticks([size**3 for size in sizes], [f"{size}³" for size in sizes])
        axis.minorticks_off()
        axis.set(title=name, xlabel="voxels")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _styles(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A colour for each form, and solid lines for the low precision."""
    colours = dict(zip(TITLES, ("tab:blue", "tab:grey", "tab:orange"), strict=True))
    return {
        row["contestant"]: {
            "color": "tab:cyan" if row["checkpointing"] else colours[row["form"]],
            "linestyle": "--" if row["precision"] == "fp32" else "-",
        }
        for row in rows
    }
