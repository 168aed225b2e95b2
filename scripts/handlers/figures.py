"""Pictures of reconstructions."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import ignite.distributed as idist
import numpy as np
from ignite.engine import Engine, Events
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys as Keys

from ..losses import MaskedL2Loss
from ..metrics import assemble, composite, voxel_mask

__all__ = ["ReconstructionFigures", "RestoreIntensities"]

# What stands in the figures for voxels that the network did not see: a hidden patch, and one outside the field of view.
HIDDEN, OUTSIDE = math.inf, -math.inf

# Of volumes in RAS: the axis looked along, the one across and the one up.
PLANES = {"axial": (2, 0, 1), "coronal": (1, 0, 2), "sagittal": (0, 1, 2)}


@dataclass(eq=False)
class RestoreIntensities:
    """Put reconstructions of a network that was trained on normalised targets back on the intensity scale.

    For metrics and figures of voxels: ``reconstructed_cube`` is changed, ``reconstructed_patches``, which the losses
    look at, stay. Attach to the evaluator before those.
    """

    loss: MaskedL2Loss  # the one with `normalise_target`

    def attach(self, engine: Engine) -> None:
        """Follow an evaluator."""
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self.restore)

    def restore(self, engine: Engine) -> None:
        """Replace the volume in the network's output."""
        volume, target, prediction = (engine.state.output[key] for key in (Keys.IMAGE, Keys.LABEL, Keys.PRED))
        patches = self.loss.restore(prediction["reconstructed_patches"], target)
        prediction["reconstructed_cube"] = assemble(patches, volume)


@dataclass(eq=False)
class ReconstructionFigures:
    """Draw original, visible and reconstructed volume in three planes: the same volumes and masks each time.

    Attach to the evaluator. Writes ``epoch_NNNN.png``.
    """

    folder: str | Path  # where the figures go
    num_volumes: int = 3  # the first volumes of the validation set, one row of panels each
    interval: int = 1  # epochs between two figures; the last epoch is drawn too
    last_epoch: int = 0  # the run's `max_epochs`
    rows: list[tuple[str, list[np.ndarray]]] = field(default_factory=list, init=False)

    def attach(self, engine: Engine) -> None:
        """Follow an evaluator."""
        if idist.get_rank() == 0:
            engine.add_event_handler(Events.EPOCH_STARTED, lambda _: self.rows.clear())
            engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.draw)

    def is_due(self, epoch: int) -> bool:
        """Tell whether a figure is drawn in this epoch."""
        return epoch % self.interval == 0 or epoch == self.last_epoch

    def collect(self, engine: Engine) -> None:
        """Keep the first volumes of the epoch."""
        if len(self.rows) >= self.num_volumes or not self.is_due(engine.state.epoch):
            return
        volume, prediction = engine.state.output[Keys.IMAGE], engine.state.output[Keys.PRED]
        hidden = voxel_mask(volume, prediction["mae_mask_1d"])
        outside = ~voxel_mask(volume, prediction["valid_for_masking_mask"])
        seen = volume.masked_fill(hidden, HIDDEN).masked_fill(outside, OUTSIDE)
        panels = (volume, seen, composite(volume, prediction))
        for place, case in enumerate(engine.state.batch["case"]):
            if len(self.rows) < self.num_volumes:
                self.rows.append((case, [panel[place, 0].float().cpu().numpy() for panel in panels]))

    def draw(self, engine: Engine) -> None:
        """Write the figure of this epoch."""
        epoch = engine.state.epoch
        if self.rows:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            title = f"epoch {epoch}   (blue: hidden, olive: outside the field of view)"
            _draw_panels(self.rows, Path(self.folder) / f"epoch_{epoch:04d}.png", title)


def _draw_panels(rows: list[tuple[str, list[np.ndarray]]], path: Path, title: str) -> None:
    """Draw a row a volume: axial, coronal and sagittal plane on one scale, each original | visible | rebuilt."""
    columns = [(name, axes, panel) for name, axes in PLANES.items() for panel in range(3)]
    size = rows[0][1][0].shape
    widths = [size[across] for _, (_, across, _), _ in columns]
    height = max(size[up] for _, _, up in PLANES.values())
    figure = Figure(figsize=(16, 0.8 + len(rows) * (0.1 + 15 * height / sum(widths))), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False, width_ratios=widths)
    outside = ListedColormap(["tab:olive"])
    for row, (case, panels) in enumerate(rows):
        low, high = panels[0].min(), panels[0].max()
        for column, (name, (along, _, _), panel) in enumerate(columns):
            view = panels[panel].take(size[along] // 2, along).T
            ax = grid[row, column]
            ax.set_facecolor("tab:blue")  # hidden
            ax.imshow(view, cmap="gray", vmin=low, vmax=high, origin="lower", interpolation="nearest")
            ax.imshow(np.where(view == OUTSIDE, 1.0, np.nan), cmap=outside, origin="lower", interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            if row == 0:
                ax.set_title(f"{name}\n{('original', 'visible', 'rebuilt')[panel]}")
            if column == 0:
                ax.set_ylabel(Path(case).name, fontsize=8, parse_math=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=90)
