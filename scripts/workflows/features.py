"""From volumes to feature maps: any size by sliding windows, each token placed in the scanner's space."""

import csv
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ignite.engine import Engine
from matplotlib.figure import Figure
from monai.data import MetaTensor
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ..engines.volumes import VolumeEvaluator, VolumeWriter, save_nifti
from ..handlers.figures import PLANES
from ..handlers.report import PAGE, Setting
from ..mistakes import Mistake
from .feature_report import FeatureReport

__all__ = ["ExtractFeatures", "FeatureWriter", "Placement", "feature_affine", "place_in_window", "principal_colours"]

logger = logging.getLogger(__name__)


class Placement(NamedTuple):
    """Where a volume lies in the padded volume that the windows slide over."""

    pad_before: tuple[int, int, int]  # voxels
    size: tuple[int, int, int]  # voxels of the volume itself
    patch_size: int

    @property
    def tokens(self) -> tuple[slice, slice, slice]:
        """The tokens whose patches hold at least one voxel of the volume."""
        p = self.patch_size
        ends = ((before, before + size) for before, size in zip(self.pad_before, self.size, strict=True))
        return tuple(slice(first // p, math.ceil(last / p)) for first, last in ends)

    @property
    def first_voxel(self) -> np.ndarray:
        """Where the first of these patches starts, in voxels of the volume itself: 0, or less within padding."""
        return np.array([part.start * self.patch_size for part in self.tokens]) - self.pad_before


def place_in_window(
    volume: Tensor, window_size: Sequence[int], patch_size: int, background: float
) -> tuple[Tensor, Placement]:
    """Pad a volume ``(C, D, H, W)`` on both sides to whole patches, and to at least one window; say where it lies then.

    ``window_size`` (D, H, W) and ``patch_size`` are in voxels, ``background`` is what to pad with.
    """
    size = tuple(volume.shape[1:])
    pads = [max(w, math.ceil(side / patch_size) * patch_size) - side for side, w in zip(size, window_size, strict=True)]
    both_sides = [half for pad in reversed(pads) for half in (pad // 2, pad - pad // 2)]  # of the last axis first
    placement = Placement(tuple(pad // 2 for pad in pads), size, patch_size)
    return F.pad(volume, both_sides, value=background), placement


def feature_affine(
    affine: np.ndarray, placement: Placement, stride: int, first_centre: float | None = None
) -> np.ndarray:
    """Say where the tokens of a feature map lie: each at the centre of its patch.

    Args:
        affine: 4×4, of the volume: voxel index to mm.
        placement: of the volume among the windows.
        stride: voxels from one token to the next: P, or less for the stem's skips.
        first_centre: what the first token of the padded volume is centred on, in voxels; default: the middle of its
            block. The overlapping kernels of the default stem are centred on its first voxel, 0.

    Returns:
        4×4: token index, counted from the first one kept, to mm in the same space.
    """
    to_voxel = np.diag([stride, stride, stride, 1.0])
    to_voxel[:3, 3] = placement.first_voxel + ((stride - 1) / 2 if first_centre is None else first_centre)
    return affine @ to_voxel


@dataclass(eq=False)
class ExtractFeatures:
    """Extract the features of a volume of any size: what a :class:`VolumeEvaluator` does in inference."""

    window_size: Sequence[int]  # voxels, the network's img_size
    patch_size: int  # P, in voxels
    background: float  # what volumes are padded with, on the network's scale
    foreground: float  # above it, a voxel counts for the embedding
    save_skips: bool = False  # also compute the output of every stem stage

    def __call__(self, evaluator: VolumeEvaluator, item: dict[str, Any]) -> dict[str, Any]:
        """Pad an item's ``image`` ``(C, D, H, W)``, slide an encoder over it, and crop back.

        Returns:
            ``image``, its ``placement``, ``maps`` ``(C, d, h, w)`` with affines of their own (``features``, and with
            skips ``skip_1``, the finest, and so on), and the ``embedding`` ``(C,)``: the mean of the tokens, each
            weighted by the share of foreground in its patch.
        """
        image, network = item["image"], evaluator.network
        padded, placement = place_in_window(image.as_tensor(), self.window_size, self.patch_size, self.background)

        def cropped(values: Tensor, first_centre: float | None = None) -> MetaTensor:
            stride = padded.shape[1] // values.shape[2]
            scale = self.patch_size // stride  # places a patch has along each axis
            kept = (slice(part.start * scale, part.stop * scale) for part in placement.tokens)
            affine = feature_affine(image.affine.numpy(), placement, stride, first_centre)
            return MetaTensor(values[(0, slice(None), *kept)], affine=torch.from_numpy(affine))

        output = evaluator.inferer(padded[None], network.forward_with_skips if self.save_skips else network)
        *skips, features = output if self.save_skips else (output,)
        maps = {"features": cropped(features)}
        if not maps["features"].isfinite().all():
            raise Mistake("its features are not finite: try --precision fp32")
        # A strict stem's blocks are centred on their middle, the default stem's kernels on their first voxel.
        centre = None if network.strict_stem else 0.0
        maps |= {f"skip_{number}": cropped(skip, centre) for number, skip in enumerate(skips, start=1)}
        is_foreground = (padded[:1] > self.foreground).float()
        weights = F.avg_pool3d(is_foreground, self.patch_size)[(slice(None), *placement.tokens)]
        weights = weights if weights.any() else torch.ones_like(weights)
        # A product of matrices, which needs no second copy of the map.
        embedding = maps["features"].as_tensor().flatten(1) @ weights.flatten() / weights.sum()
        return {"image": image, "placement": placement, "maps": maps, "embedding": embedding}


class FeatureWriter(VolumeWriter):
    """Write what :class:`ExtractFeatures` returns.

    For each case, in a folder of its name: ``features`` ``(d, h, w, C)`` and their affine, ``skip_1`` and so on where
    there are skips, and ``figure.png``. For all, ``embeddings.csv`` and ``report.html``.

    Args:
        output_dir: of :class:`VolumeWriter`.
        figures: draw one for each case.
        settings: of the run, for the report.
        features: ``nii.gz``, ``nii`` or ``npz`` (an archive of ``features`` and ``affine``, not compressed); ``none``:
            the embeddings alone.
        save_dtype: ``float32``, or of an npz ``float16``, which NIfTI does not have.
    """

    answers = "features"
    failure = "have no features"

    def __init__(
        self,
        output_dir: str | Path,
        figures: bool = True,
        settings: Mapping[str, Setting] | None = None,
        features: str = "nii.gz",
        save_dtype: str = "float32",
    ) -> None:
        if save_dtype == "float16" and features not in ("npz", "none"):
            raise Mistake(f"save_dtype float16 needs --features npz: {features} has no half precision")
        super().__init__(output_dir)
        self.format, self.dtype = features, np.dtype(save_dtype)
        self.figures, self.table = figures, self.folder / "embeddings.csv"
        self.page = FeatureReport(self.folder / PAGE, settings or {})

    def start(self, engine: Engine) -> None:
        """Begin a new table and a new page."""
        super().start(engine)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.table.unlink(missing_ok=True)
        self.page.start()

    def write(self, output: dict[str, Any]) -> None:
        """Write one case."""
        case, embedding = output["case"], output["embedding"].tolist()
        if self.figures or self.format != "none":
            (self.folder / case).mkdir(parents=True, exist_ok=True)
        for name, values in output["maps"].items() if self.format != "none" else ():
            self._save(self.folder / case / f"{name}.{self.format}", values)
        if self.figures:
            _draw(output, self.folder / case / "figure.png")
        with self.table.open("a", newline="") as file:
            rows = csv.writer(file)
            if file.tell() == 0:
                rows.writerow(["case", *(f"f{number}" for number in range(len(embedding)))])
            rows.writerow([case, *(f"{value:.6g}" for value in embedding)])
        channels, *grid = output["maps"]["features"].shape
        self.page.add(output)
        logger.info("%s: %d features on a grid of %s", case, channels, " x ".join(map(str, grid)))

    def report(self, engine: Engine) -> None:
        """Write the page, and end as :class:`VolumeWriter` does."""
        self.page.write(self.failures)
        super().report(engine)

    def discard(self, case: str) -> None:
        """Remove what is written for a case, in any format."""
        for pattern in ("features.n*", "skip_*.n*", "figure.png"):
            for path in (self.folder / case).glob(pattern):
                path.unlink()

    def _save(self, path: Path, values: MetaTensor) -> None:
        voxels, affine = values.as_tensor().permute(1, 2, 3, 0).numpy(), values.affine.numpy()
        if self.format != "npz":
            save_nifti(path, voxels, affine)
            return
        beside = path.with_name(f".{path.name}")
        with beside.open("wb") as file:
            np.savez(file, features=voxels.astype(self.dtype, order="C"), affine=affine)
        beside.replace(path)


def principal_colours(features: Tensor) -> np.ndarray:
    """Show the first three principal components of ``(C, d, h, w)`` as red, green and blue, ``(d, h, w, 3)``.

    Each component is stretched to [0, 1] from its 2nd to its 98th percentile.
    """
    tokens = features.flatten(1).T
    tokens = tokens - tokens.mean(dim=0)
    _, _, directions = torch.linalg.svd(tokens.T @ tokens)  # of a C×C matrix, however many tokens there are
    components = (tokens @ directions[:3].T).numpy()
    low, high = np.percentile(components, [2, 98], axis=0)
    colours = ((components - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    return colours.reshape(*features.shape[1:], 3)


def _draw(output: dict[str, Any], path: Path) -> None:
    """Draw three planes of the volume beside its features, all on one scale, in mm from the volume's corner."""
    volume, placement = output["image"][0].as_tensor().float().numpy(), output["placement"]
    colours = principal_colours(output["maps"]["features"].as_tensor())
    spacing = np.linalg.norm(output["image"].affine.numpy()[:3, :3], axis=0)
    size, first = volume.shape * spacing, placement.first_voxel * spacing
    last = first + placement.patch_size * np.array(colours.shape[:3]) * spacing
    low, high = np.percentile(volume, [0.5, 99.5])

    widths = [size[across] for _, across, _ in PLANES.values() for _ in range(2)]
    height = max(size[up] for _, _, up in PLANES.values())
    figure = Figure(figsize=(13, 1 + 12.5 * height / sum(widths)), layout="constrained")
    axes = figure.subplots(1, 6, width_ratios=widths)
    for (name, (along, across, up)), gray, rgb in zip(PLANES.items(), axes[::2], axes[1::2], strict=True):
        middle = volume.shape[along] // 2
        token = (middle - placement.first_voxel[along]) // placement.patch_size
        plane, extent = volume.take(middle, along).T, (0, size[across], 0, size[up])
        gray.imshow(plane, cmap="gray", vmin=low, vmax=high, origin="lower", extent=extent)
        plane, extent = colours.take(token, along), (first[across], last[across], first[up], last[up])
        rgb.imshow(plane.transpose(1, 0, 2), origin="lower", interpolation="nearest", extent=extent)
        for ax, title in ((gray, name), (rgb, "features")):
            ax.set(xticks=[], yticks=[], xlim=(0, size[across]), ylim=(0, size[up]), title=title, aspect="equal")
    title = f"{output['case']}: volume, and the first three principal components of its features"
    figure.suptitle(title, parse_math=False)  # a name may hold dollars
    figure.savefig(path, dpi=100)
