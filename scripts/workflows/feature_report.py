"""The page of an inference: what each volume gave, and a map on which like volumes lie close to each other."""

import io
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import matplotlib.image
import numpy as np
from sklearn.decomposition import PCA
from torch.nn import functional as F  # noqa: N812

from ..handlers.pages import Element, element, legend, picture, section, table, write
from ..handlers.report import Setting, about_run, heading, memory, spared, titled
from ..mistakes import Mistake

__all__: list[str] = []

SHOWN = 2000  # volumes on a page, at most; with their thumbnails they take about 8 MB
THUMBNAIL = 96  # pixels of the longest side
COLOURS = 8  # folders with a colour of their own, at most


class Answer(NamedTuple):
    """What the page shows of a volume."""

    case: str
    shape: tuple[int, ...]  # voxels, (D, H, W)
    grid: tuple[int, ...]  # tokens, (d, h, w)
    embedding: np.ndarray  # (C,)
    thumbnail: bytes  # JPEG


@dataclass(eq=False)
class FeatureReport:
    """Gather what :class:`ExtractFeatures` returns for ``report.html``."""

    path: Path  # of the page, beside the folders of the cases
    settings: Mapping[str, Setting]
    answers: list[Answer] = field(default_factory=list, init=False)

    def start(self) -> None:
        """Forget an earlier run, and look at the clock; a Mistake where the page would replace that of a training."""
        if (self.path.parent / "metrics.jsonl").exists():
            raise Mistake(f"{self.path.parent} holds a training: choose another --output_dir for the features")
        self.path.unlink(missing_ok=True)
        self.answers.clear()
        self.started = time.monotonic()

    def add(self, output: Mapping[str, Any]) -> None:
        """Keep what the page shows of a volume."""
        image, grid = output["image"], output["maps"]["features"].shape[1:]
        thumbnail, embedding = draw_thumbnail(image), output["embedding"].numpy()
        self.answers.append(Answer(output["case"], tuple(image.shape[1:]), tuple(grid), embedding, thumbnail))

    def write(self, failures: Sequence[str]) -> None:
        """Write the page, whole or not at all; ``failures`` are the volumes without features, with the reason."""
        with spared(self.path):
            self._write(failures)

    def _write(self, failures: Sequence[str]) -> None:
        total, title, seconds = len(self.answers), titled(self.settings), time.monotonic() - self.started
        kept = self.answers[:: math.ceil(total / SHOWN) or 1]
        verdict = [f"Features of {total} of {total + len(failures)} volumes are here, in a folder for each."]
        if len(kept) < total:
            verdict.append(f"This page shows {len(kept)} of them, evenly chosen; embeddings.csv holds all.")
        lacking = [section("Failures", element("ul", *(element("li", line) for line in failures[:SHOWN])))]
        costs = [("in all", f"{timedelta(seconds=round(seconds))} h, {seconds / max(1, total):.3g} s a volume")]
        write(
            self.path,
            title,
            *heading(title, verdict),
            *(lacking if failures else []),
            section("Map", *draw_map(self.answers, kept)),
            section("Volumes", table(("volume", "voxels", "tokens"), map(_row, kept))),
            section("Time and memory", table(("", ""), [*costs, *memory()])),
            *about_run(self.settings),
        )


def draw_thumbnail(image: Any) -> bytes:
    """Draw the middle axial plane of a MetaTensor ``(C, D, H, W)`` in RAS, in the proportions of its mm, as a JPEG."""
    plane = image[0, :, :, image.shape[3] // 2].as_tensor().float().T
    sides = np.linalg.norm(image.affine.numpy()[:3, :2], axis=0)[::-1] * plane.shape  # mm: up, across
    size = [max(1, round(float(side))) for side in sides / sides.max() * THUMBNAIL]
    small = F.interpolate(plane[None, None], size, mode="bilinear", antialias=True)[0, 0].numpy()
    low, high = np.percentile(small, [0.5, 99.5])
    file = io.BytesIO()
    matplotlib.image.imsave(file, small, vmin=low, vmax=high, cmap="gray", origin="lower", format="jpeg")
    return file.getvalue()


def draw_map(answers: Sequence[Answer], kept: Sequence[Answer]) -> list[Element]:
    """Put volumes where the first two principal components of all embeddings say, coloured by folder.

    Pointing at a volume, or going there with the tabulator, shows its name and thumbnail.
    """
    embeddings = np.stack([answer.embedding for answer in answers]) if answers else np.empty((0, 2))
    if len(np.unique(embeddings, axis=0)) < 3:
        return [element("p", "A map needs three different volumes or more.")]
    analysis = PCA(2).fit(embeddings)
    places = analysis.transform(np.stack([answer.embedding for answer in kept]))
    low, high = places.min(axis=0), places.max(axis=0)
    places = 4 + 92 * (places - low) / np.maximum(high - low, 1e-12)  # percent of the drawing
    groups = group_by_folder([answer.case for answer in kept])
    names = sorted(set(groups))
    points = (
        _point(answer, *map(float, place), names.index(group))
        for answer, place, group in zip(kept, places, groups, strict=True)
    )
    shares = " and ".join(f"{share:.1%}" for share in analysis.explained_variance_ratio_)
    about = (
        "Each point is a volume. Volumes with like embeddings lie close to each other. Across and up: the first two "
        f"principal components, which hold {shares} of the embeddings' variance. Point at one to see it."
    )
    keys = legend(name or "no folder" for name in names) if len(names) > 1 else []
    return [element("p", about, class_="soft"), element("div", *points, class_="map"), *keys]


def group_by_folder(cases: Sequence[str]) -> list[str]:
    """Name the folder of each case, at the deepest level at which there are no more folders than colours."""
    folders = [case.split("/")[:-1] for case in cases]
    levels = range(max(map(len, folders)), -1, -1)
    groups = (["/".join(folder[:level]) for folder in folders] for level in levels)
    return next(names for names in groups if len(set(names)) <= COLOURS)


def _point(answer: Answer, x: float, y: float, colour: int) -> Element:
    sides = ("left" if x < 50 else "right", "bottom" if y < 50 else "top")  # the card stays within the map
    card = element("span", picture(answer.thumbnail, "jpeg", ""), answer.case, style=": 12px; ".join((*sides, "")))
    return element(
        "a", card, class_=f"point c{colour}", href=_link(answer.case), style=f"left: {x:.2f}%; bottom: {y:.2f}%",
        **{"aria-label": answer.case},
    )  # fmt: skip


def _row(answer: Answer) -> tuple[Element, str, str]:
    link = element("a", answer.case, href=_link(answer.case))
    return link, *("\xa0x\xa0".join(map(str, sides)) for sides in (answer.shape, answer.grid))  # on one line


def _link(case: str) -> str:
    return "./" + quote(case, errors="surrogateescape") + "/"
