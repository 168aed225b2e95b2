"""What the experiments leave: a table in Markdown, the numbers behind it in JSON, figures in one style."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

__all__ = ["figure", "markdown_table", "write_report"]

mpl.use("Agg")

STYLE = {
    **{"axes.spines.top": False, "axes.spines.right": False},
    **{"legend.frameon": False, "legend.fontsize": "small", "savefig.dpi": 110},
}


def markdown_table(head: str, rows: Iterable[str]) -> list[str]:
    """Write the lines of a table; ``|`` divides the columns."""
    return [f"| {row} |" for row in (head, "|".join(["---"] * (head.count("|") + 1)), *rows)]


def write_report(folder: Path, name: str, report: dict[str, Any], lines: Sequence[str]) -> None:
    """Write ``<name>.json`` and ``<name>.md``, and print the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    table = "\n".join(lines)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / f"{name}.md").write_text(table + "\n")
    print(f"{table}\n\nwrote {folder / name}.md")


@contextmanager
def figure(path: Path, **settings: Any) -> Iterator[tuple[Figure, Any]]:
    """Give an empty figure and its axes, by the settings of :func:`matplotlib.pyplot.subplots`; then write it."""
    with mpl.rc_context(STYLE):
        drawn, axes = plt.subplots(layout="constrained", **settings)
        yield drawn, axes
        drawn.savefig(path)
        plt.close(drawn)
