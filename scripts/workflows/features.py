"""From volumes to feature maps: any size by sliding windows, each token placed in the scanner's space."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from monai.engines import SupervisedEvaluator
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ..mistakes import Mistake, reason

__all__ = [
    "FeatureEvaluator",
    "FeatureWriter",
    "Placement",
    "feature_affine",
    "place_in_window",
    "principal_colours",
    "save_nifti",
]

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
        return tuple(
            slice(before // p, -(-(before + size) // p))
            for before, size in zip(self.pad_before, self.size, strict=True)
        )


def place_in_window(
    volume: Tensor, window_size: Sequence[int], patch_size: int, background: float
) -> tuple[Tensor, Placement]:
    """Pad a volume on both sides to whole patches, and to at least one window.

    Args:
        volume: ``(C, D, H, W)``.
        window_size: voxels along D, H, W.
        patch_size: P, in voxels.
        background: what to pad with.

    Returns:
        The padded volume and where the original lies in it.
    """
    size = tuple(volume.shape[1:])
    padded = tuple(
        max(window, math.ceil(side / patch_size) * patch_size) for side, window in zip(size, window_size, strict=True)
    )
    before = tuple((whole - side) // 2 for whole, side in zip(padded, size, strict=True))
    pads = [
        pad
        for whole, side, first in reversed(list(zip(padded, size, before, strict=True)))
        for pad in (first, whole - side - first)
    ]
    return F.pad(volume, pads, value=background), Placement(before, size, patch_size)


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
    first_patch = np.array([tokens.start * placement.patch_size for tokens in placement.tokens])
    to_voxel = np.diag([stride, stride, stride, 1.0])
    to_voxel[:3, 3] = first_patch - placement.pad_before + ((stride - 1) / 2 if first_centre is None else first_centre)
    return affine @ to_voxel


class FeatureEvaluator(SupervisedEvaluator):
    """MONAI's SupervisedEvaluator for one volume an iteration: pads, slides, crops back, and survives a bad file.

    ``state.output`` is a dict of ``case``, ``features`` ``(C, d, h, w)``, ``affine``, ``embedding`` ``(C,)``,
    ``skips`` (maps, finest first), ``volume`` and ``placement``; of a volume that failed, ``case`` and ``error``.

    Args:
        window_size: the network's ``img_size``, in voxels.
        patch_size: P, in voxels.
        background: value that volumes are padded with, on the network's scale.
        foreground: value above which a voxel counts for the embedding.
        save_skips: also compute the output of every stem stage.
        kwargs: of :class:`monai.engines.SupervisedEvaluator`; ``inferer`` is a :class:`FeatureWindowInferer`.
    """

    def __init__(
        self,
        *,
        window_size: Sequence[int],
        patch_size: int,
        background: float,
        foreground: float,
        save_skips: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**{"decollate": False, **kwargs})
        self.window_size, self.patch_size = tuple(window_size), patch_size
        self.background, self.foreground, self.save_skips = background, foreground, save_skips

    def _iteration(self, engine: FeatureEvaluator, batchdata: dict[str, Any]) -> dict[str, Any]:
        """Extract the features of one volume."""
        if "error" in batchdata:
            return {"case": batchdata["case"], "error": batchdata["error"]}
        try:
            return engine._extract(batchdata)
        except Exception as error:  # out of memory on one volume must not cost the others
            return {"case": batchdata["case"], "error": reason(error)}

    def _extract(self, batchdata: dict[str, Any]) -> dict[str, Any]:
        volume, affine = batchdata["image"].as_tensor(), batchdata["image"].affine.numpy()
        padded, placement = place_in_window(volume, self.window_size, self.patch_size, self.background)
        with self.mode(self.network):
            network = self.network.forward_with_skips if self.save_skips else self.network
            output = self.inferer(padded[None], network)
        *skips, features = (part[0] for part in output) if self.save_skips else (output[0],)
        features = features[(slice(None), *placement.tokens)]
        if not torch.isfinite(features).all():
            raise Mistake("its features are not finite: try --precision fp32")
        return {
            "case": batchdata["case"],
            "volume": volume[0],
            "affine": affine,
            "placement": placement,
            "features": features,
            "embedding": self._pool(features, padded, placement),
            "skips": [_crop(skip, padded, placement) for skip in skips],
            # A strict stem's blocks are centred on their middle, the default stem's kernels on their first voxel.
            "skip_centre": None if self.network.strict_stem else 0.0,
        }

    def _pool(self, features: Tensor, padded: Tensor, placement: Placement) -> Tensor:
        """Average the tokens, each weighted by the share of foreground in its patch."""
        is_foreground = (padded[:1] > self.foreground).float()
        weights = F.avg_pool3d(is_foreground[None], self.patch_size)[0][(slice(None), *placement.tokens)]
        if weights.sum() == 0:
            weights = torch.ones_like(weights)
        return (features * weights).sum(dim=(1, 2, 3)) / weights.sum()


class FeatureWriter:
    """Write what a :class:`FeatureEvaluator` extracts; name the volumes that failed at the end.

    For each case, in a folder of its name: ``features.nii.gz`` ``(d, h, w, C)``, ``skip_1.nii.gz`` and so on where
    there are skips (1 is the finest), and ``figure.png``. For all, ``embeddings.csv``.

    Args:
        output_dir: where everything goes.
        figures: draw one for each case.
    """

    def __init__(self, output_dir: str | Path, figures: bool = True) -> None:
        self.folder, self.figures = Path(output_dir), figures
        self.failures: list[str] = []

    def attach(self, engine: Engine) -> None:
        """Follow an evaluator."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.write)
        engine.add_event_handler(Events.COMPLETED, self.report)

    def start(self, engine: Engine) -> None:
        """Begin a new table."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "embeddings.csv").unlink(missing_ok=True)
        self.failures.clear()

    def write(self, engine: Engine) -> None:
        """Write one case."""
        output = engine.state.output
        folder = self.folder / output["case"]
        _clear(folder)  # of an earlier run's files
        if "error" not in output:
            try:
                self._write(output, folder)
            except Exception as error:
                _clear(folder)
                output = {"case": output["case"], "error": f"cannot be written ({reason(error)})"}
        if "error" in output:
            self.failures.append(f"{output['case']}: {output['error']}")
        else:
            logger.info("%s: %s features on a grid of %s", output["case"], *_channels_and_grid(output["features"]))
        engine.state.output = {"case": output["case"]}  # nothing large is kept while the next volume loads

    def _write(self, output: dict[str, Any], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        place = output["affine"], output["placement"]
        _save_map(folder / "features.nii.gz", output["features"], *place)
        for number, skip in enumerate(output["skips"], start=1):
            _save_map(folder / f"skip_{number}.nii.gz", skip, *place, output["skip_centre"])
        if self.figures:
            _draw(output, folder / "figure.png")
        with (self.folder / "embeddings.csv").open("a", newline="") as file:
            table = csv.writer(file)
            if file.tell() == 0:
                table.writerow(["case", *(f"f{number}" for number in range(len(output["embedding"])))])
            table.writerow([output["case"], *(f"{value:.6g}" for value in output["embedding"].tolist())])

    def report(self, engine: Engine) -> None:
        """End with an error that names every volume without features."""
        total = engine.state.iteration
        logger.info("features of %d of %d volumes are in %s", total - len(self.failures), total, self.folder)
        if self.failures:
            listing = "\n  ".join(self.failures)
            raise Mistake(f"{len(self.failures)} of {total} volumes have no features:\n  {listing}")


def principal_colours(features: Tensor) -> np.ndarray:
    """Show the first three principal components of a feature map as red, green and blue.

    Args:
        features: ``(C, d, h, w)``.

    Returns:
        ``(d, h, w, 3)`` in [0, 1]; each component is stretched from its 2nd to its 98th percentile.
    """
    tokens = features.flatten(1).T
    tokens = tokens - tokens.mean(dim=0)
    _, _, directions = torch.linalg.svd(tokens.T @ tokens)  # of a C×C matrix, however many tokens there are
    components = (tokens @ directions[:3].T).numpy()
    low, high = np.percentile(components, [2, 98], axis=0)
    colours = ((components - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    return colours.reshape(*features.shape[1:], 3)


def _channels_and_grid(features: Tensor) -> tuple[int, str]:
    return features.shape[0], " x ".join(map(str, features.shape[1:]))


def _crop(skip: Tensor, padded: Tensor, placement: Placement) -> Tensor:
    """Keep the part of a finer map that belongs to the tokens that are kept."""
    finer = placement.patch_size * skip.shape[1] // padded.shape[1]  # places a patch has along each axis
    tokens = (slice(part.start * finer, part.stop * finer) for part in placement.tokens)
    return skip[(slice(None), *tokens)]


def _clear(folder: Path) -> None:
    """Remove what a FeatureWriter writes for a case."""
    for pattern in ("features.nii.gz", "skip_*.nii.gz", "figure.png"):
        for path in folder.glob(pattern):
            path.unlink()


def _save_map(
    path: Path, features: Tensor, affine: np.ndarray, placement: Placement, first_centre: float | None = None
) -> None:
    """Write ``(C, d, h, w)`` as a NIfTI of ``(d, h, w, C)``, whole or not at all."""
    kept = placement.tokens[0].stop - placement.tokens[0].start
    stride = placement.patch_size * kept // features.shape[1]
    save_nifti(path, features.permute(1, 2, 3, 0).numpy(), feature_affine(affine, placement, stride, first_centre))


def save_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    """Write a NIfTI, whole or not at all, into a folder that is there.

    Args:
        path: ``.nii`` or ``.nii.gz``; what is there is replaced.
        voxels: ``(D, H, W)``, or ``(D, H, W, C)``.
        affine: ``(4, 4)``, from voxels to mm.
    """
    beside = path.with_name(f".{path.name}")
    nib.save(nib.Nifti1Image(voxels, affine), beside)
    beside.replace(path)


def _draw(output: dict[str, Any], path: Path) -> None:
    """Draw three planes of the volume beside its features, all on one scale, in mm from the volume's corner."""
    volume, placement = output["volume"].float().numpy(), output["placement"]
    spacing = np.linalg.norm(output["affine"][:3, :3], axis=0)
    size = volume.shape * spacing
    first_voxel = np.array([tokens.start * placement.patch_size for tokens in placement.tokens]) - placement.pad_before
    colours = principal_colours(output["features"])
    first, last = (edge * spacing for edge in (first_voxel, first_voxel + placement.patch_size * _grid(colours)))
    low, high = np.percentile(volume, [0.5, 99.5])

    # For volumes in RAS: the axis looked along, the one across and the one up.
    planes = {"axial": (2, 0, 1), "coronal": (1, 0, 2), "sagittal": (0, 1, 2)}
    widths = [size[across] for _, across, _ in planes.values() for _ in range(2)]
    height = max(size[up] for _, _, up in planes.values())
    figure = Figure(figsize=(13, 1 + 12.5 * height / sum(widths)), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the user's backend
    axes = figure.subplots(1, 6, width_ratios=widths)
    for (name, (along, across, up)), gray, rgb in zip(planes.items(), axes[::2], axes[1::2], strict=True):
        middle = volume.shape[along] // 2
        token = (middle - first_voxel[along]) // placement.patch_size
        plane, tokens = volume.take(middle, along), colours.take(token, along)
        extent = (0, size[across], 0, size[up])
        gray.imshow(plane.T, cmap="gray", vmin=low, vmax=high, origin="lower", extent=extent)
        extent = (first[across], last[across], first[up], last[up])
        rgb.imshow(tokens.transpose(1, 0, 2), origin="lower", interpolation="nearest", extent=extent)
        for ax, title in ((gray, name), (rgb, "features")):
            ax.set(xticks=[], yticks=[], xlim=(0, size[across]), ylim=(0, size[up]), title=title, aspect="equal")
    title = f"{output['case']}: volume, and the first three principal components of its features"
    figure.suptitle(title, parse_math=False)  # a name may hold dollars
    figure.savefig(path, dpi=100)


def _grid(colours: np.ndarray) -> np.ndarray:
    return np.array(colours.shape[:3])
