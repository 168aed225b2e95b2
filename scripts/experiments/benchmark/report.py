"""The table and the plots of the networks that were measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..reporting import figure, markdown_table

__all__ = ["FEATURES", "PATCH_FEATURES", "STEP", "TITLES", "networks_table", "plot_ratios", "plot_scaling"]

TASKS = STEP, PATCH_FEATURES, FEATURES = "training step", "features, patches", "features, volume"
TITLES = {"bertswin": "BertsWin", "plain": "plain eager BertsWin", "vit_mae": "MONAI ViT-MAE"}
COLOURS = {"bertswin": "tab:blue", "plain": "tab:grey", "vit_mae": "tab:orange"}


def networks_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Write the lines of a Markdown table."""
    cells = []
    for row in sorted(rows, key=lambda row: (row["img_size"], row["batch_size"], TASKS.index(row["task"]))):
        seconds, fastest, slowest = (_shown(row[name], ".3g") for name in ("seconds", "fastest", "slowest"))
        cells.append(
            f"{row['batch_size']} of {row['img_size']}³ | {row['task']} | {row['contestant']} "
            f"| {row['parameters'] / 1e6:.1f} M | {_shown(row['flops'], '.3g', 1e12)} "
            f"| {seconds} ({fastest} to {slowest}) | {_shown(row['of_plain_fp32'])} "
            f"| {_shown(row['of_matrix_rate'], '.0%')} | {_shown(row['peak_bytes'], unit=1e9)} GB "
            f"| {_shown(row['memory_of_plain_fp32'])}"
        )
    head = (
        "size | task | contestant | parameters | TFLOP | seconds (fastest to slowest) | time of plain fp32 "
        "| of matrix rate | peak memory | memory of plain fp32"
    )
    return markdown_table(head, cells)


def plot_ratios(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of time for every task at the largest size, as a share of the plain form's."""
    most = max(row["img_size"] ** 3 * row["batch_size"] for row in rows)
    rows = [row for row in rows if row["img_size"] ** 3 * row["batch_size"] == most]
    names, styles = [name for name in TASKS if any(row["task"] == name for row in rows)], _styles(rows)
    with figure(path, ncols=len(names), figsize=(4.2 * len(names), 3.2), sharey=True) as (_, axes):
        for axis, name in zip(axes, names, strict=True):
            ratios = {row["contestant"]: row["of_plain_fp32"] or 0 for row in rows if row["task"] == name}
            values = [ratios.get(contestant, 0) for contestant in styles]
            bars = axis.barh(list(styles), values, color=[style["color"] for style in styles.values()])
            axis.bar_label(bars, [f" {value:.2f}" if value else " cannot" for value in values])
            axis.set(title=name, xlim=(0, 1.2 * max(values) or 1), xlabel="time / plain eager fp32")
        axes[0].invert_yaxis()


def plot_scaling(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Time against voxels at the smallest batch."""
    rows = [row for row in rows if row["batch_size"] == min(row["batch_size"] for row in rows)]
    names, styles = [name for name in TASKS if any(row["task"] == name for row in rows)], _styles(rows)
    sizes = sorted({row["img_size"] for row in rows})
    with figure(path, ncols=len(names), figsize=(4.2 * len(names), 3.6)) as (drawn, axes):
        for axis, name in zip(axes, names, strict=True):
            for contestant, style in styles.items():
                its = [row for row in rows if (row["task"], row["contestant"]) == (name, contestant) and row["seconds"]]
                if its:
                    voxels, seconds = [row["img_size"] ** 3 for row in its], [row["seconds"] for row in its]
                    axis.loglog(voxels, seconds, marker="o", label=contestant, **style)
            axis.set_xticks([size**3 for size in sizes], [f"{size}³" for size in sizes])
            axis.minorticks_off()
            axis.set(title=name, xlabel="voxels")
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("seconds")
        drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")


def _shown(value: float | None, form: str = ".2f", unit: float = 1) -> str:
    return "-" if value is None else format(value / unit, form)


def _styles(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A colour for each form, and solid lines for the low precision."""
    return {
        row["contestant"]: {
            "color": "tab:cyan" if row["checkpointing"] else COLOURS[row["form"]],
            "linestyle": "--" if row["precision"] == "fp32" else "-",
        }
        for row in rows
    }
