"""What a run shows: metrics and pictures; when it validates, and when it stops early."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from einops import rearrange
from ignite.engine import Engine, Events, State
from ignite.metrics import Metric
from ignite.metrics.metric import reinit__is_reduced, sync_all_reduce
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from monai.engines.utils import IterationEvents
from monai.metrics.regression import compute_ssim_and_cs
from monai.utils import CommonKeys as Keys
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.tensorboard import SummaryWriter

from . import checkpoints, parallel
from .engine import NonFiniteLossError
from .losses import MaskedL2Loss
from .masking import unpatchify

__all__ = [
    "ConductorStatistics",
    "EarlyStopping",
    "HiddenVoxelMetrics",
    "MetricsRecorder",
    "ReconstructionFigures",
    "RestoreIntensities",
    "ValidateAtEnds",
    "composite",
]

logger = logging.getLogger(__name__)

# What stands in the figures for voxels that the network did not see: a hidden patch, and one outside the field of view.
HIDDEN, OUTSIDE = math.inf, -math.inf
SSIM_WINDOW = 7  # voxels
SSIM_SIGMA = 1.5  # voxels, the value of Wang et al. 2004


def composite(volume: Tensor, prediction: dict[str, Tensor]) -> Tensor:
    """Put the reconstruction of the hidden patches into the original volume, ``(B, C, D, H, W)``."""
    hidden = _voxel_mask(volume, prediction["mae_mask_1d"])
    return torch.where(hidden, prediction["reconstructed_cube"].to(volume.dtype), volume)


class HiddenVoxelMetrics(Metric):
    """How well hidden voxels are rebuilt, over all hidden voxels of the validation set together.

    Computes ``mse``, ``mae``, ``psnr`` (dB), ``ssim`` (Gaussian window of 7³ voxels, sigma 1.5, on the volume with
    its visible patches put back, averaged over hidden voxels) and ``unexplained``: the MSE over the variance of the
    same voxels, so that the best constant prediction scores 1. Index the metric by these names to attach one.

    Args:
        data_range: width of the intensity window, on the network's scale, for PSNR and SSIM.
    """

    def __init__(self, data_range: float) -> None:
        self.data_range = data_range
        super().__init__(output_transform=lambda output: (output[Keys.IMAGE], output[Keys.PRED]))

    @reinit__is_reduced
    def reset(self) -> None:
        """Start a new epoch."""
        # count, squared error, absolute error, SSIM, voxel, voxel squared
        self._sums = torch.zeros(6, dtype=torch.float64)

    @reinit__is_reduced
    def update(self, output: tuple[Tensor, dict[str, Tensor]]) -> None:
        """Add one batch: the volumes and the network's output for them."""
        volume, prediction = output[0].float(), output[1]
        rebuilt = composite(volume, prediction)
        hidden = _voxel_mask(volume, prediction["mae_mask_1d"]).expand_as(volume)
        truth, error = volume[hidden].double(), (rebuilt - volume)[hidden].double()
        ssim = _ssim_map(rebuilt, volume, self.data_range)[hidden].double()
        sums = (error.square().sum(), error.abs().sum(), ssim.sum(), truth.sum(), truth.square().sum())
        self._sums += torch.stack([torch.tensor(truth.numel(), dtype=torch.float64), *(value.cpu() for value in sums)])

    @sync_all_reduce("_sums")
    def compute(self) -> dict[str, float]:
        """Return the five figures."""
        count = self._sums[0].item()
        mse, mae, ssim, mean, square = (self._sums[1:] / count).tolist()
        psnr = 10 * math.log10(self.data_range**2 / mse) if mse > 0 else math.inf
        variance = square - mean**2
        unexplained = mse / variance if variance > 0 else math.nan
        return {"mse": mse, "mae": mae, "psnr": psnr, "ssim": ssim, "unexplained": unexplained}


class MetricsRecorder:
    """Write one line a validation to ``metrics.jsonl``, and a short one an epoch to the log.

    Attach to the trainer behind what validates. A resumed run replaces what an interrupted one had written beyond
    its last checkpoint. A validation whose key metric is not finite ends the run, before anything is saved.

    Args:
        path: of ``metrics.jsonl``.
        validator: the evaluator, whose metrics are recorded.
        interval: epochs between two validations; the last epoch is validated too.
        logged: of the figures, those in the log; default: all.
    """

    def __init__(
        self, path: str | Path, validator: Engine, interval: int = 1, logged: Sequence[str] | None = None
    ) -> None:
        self.path, self.validator, self.interval, self.logged = Path(path), validator, interval, logged

    def attach(self, engine: Engine) -> None:
        """Follow a trainer."""
        engine.add_event_handler(Events.STARTED, self.record_untrained)
        engine.add_event_handler(Events.EPOCH_STARTED, self.start_epoch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.add_loss)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.record)

    def record_untrained(self, engine: Engine) -> None:
        """Write epoch 0 down, if the network was validated before training."""
        if engine.state.iteration == 0 and self.validator.state.metrics:
            self.start_epoch(engine)
            self.record(engine)

    def start_epoch(self, engine: Engine) -> None:
        """Forget the last epoch's losses; an epoch that goes on keeps its own."""
        state = engine.state
        goes_on = getattr(state, "epoch_goes_on", False)
        state.epoch_goes_on = False
        self.started = time.monotonic()
        if not goes_on:
            state.epoch_losses = []
            state.learning_rate = engine.optimizer.param_groups[0]["lr"]

    def add_loss(self, engine: Engine) -> None:
        """Keep an iteration's loss, and its components where there are several."""
        output = engine.state.output
        parts = output.get("components", {})
        losses = {"loss": output[Keys.LOSS].detach(), **(parts if len(parts) > 1 else {})}
        engine.state.epoch_losses.append({name: value.float().cpu() for name, value in losses.items()})

    def record(self, engine: Engine) -> None:
        """Write the epoch down."""
        state, record = engine.state, {}
        if losses := state.epoch_losses:
            sums = torch.stack([torch.stack(list(loss.values())) for loss in losses]).double().mean(dim=0)
            means = idist.all_reduce(sums, op="SUM") / idist.get_world_size()
            record = {f"train_{name}": mean for name, mean in zip(losses[0], means.tolist(), strict=True)}
            # The components for TensorBoard and MLflow too, which have the loss by iteration.
            state.metrics.update({name: mean for name, mean in record.items() if name != "train_loss"})
        validated = state.epoch % self.interval == 0 or state.epoch == state.max_epochs
        if validated:
            metrics = self.validator.state.metrics
            record |= {name: value for name, value in metrics.items() if isinstance(value, int | float)}
            self._refuse_non_finite(state)
        record = {
            "epoch": state.epoch,
            "iteration": state.iteration,
            "learning_rate": state.learning_rate,
            "train_loss": None,
            **record,
            "seconds": round(time.monotonic() - self.started, 3),
        }
        if validated and parallel.rank() == 0:
            self._write(record)
        figures = "  ".join(
            f"{name.removeprefix('val_')} {value:.4g}"
            for name, value in record.items()
            if name.startswith(("train_", "val_")) and value is not None and name in (self.logged or record)
        )
        logger.info("epoch %d/%d  %s  %.1f s", state.epoch, state.max_epochs, figures, record["seconds"])

    def _refuse_non_finite(self, state: State) -> None:
        name = self.validator.state.key_metric_name
        value = self.validator.state.metrics.get(name, 0.0)
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"{name} is {value} after epoch {state.epoch}: training has diverged; the checkpoint of the epoch "
                "before is as it was, resume from it with a lower learning_rate"
            )

    def _write(self, record: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if json.loads(line)["epoch"] < record["epoch"]]
        beside = self.path.with_name(f".{self.path.name}")
        with checkpoints.named_after(self.path):
            beside.write_text("\n".join([*kept, json.dumps(record)]) + "\n")
            beside.replace(self.path)


class ConductorStatistics:
    """Write what a GradientConductor decided to TensorBoard, at every optimiser step.

    ``conductor/norm_<task>``, ``conductor/cosine_<task>_<task>`` (before merging), and over the epoch
    ``conductor/wins_<task>``: the share of the steps in which the task won a conflict.

    Attach to a :class:`~bertswin_mae.engine.ConductorTrainer`.

    Args:
        summary_writer: of TensorBoard.
    """

    def __init__(self, summary_writer: SummaryWriter) -> None:
        self.writer = summary_writer

    def attach(self, engine: Engine) -> None:
        """Follow a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.start_epoch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.write)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.write_winners)

    def start_epoch(self, engine: Engine) -> None:
        """Count wins from zero."""
        self.merged, self.step, self.wins = 0, engine.optimizer.steps, Counter()

    def write(self, engine: Engine) -> None:
        """Write norms and cosines, if this iteration made a step."""
        if engine.optimizer.steps == self.step:
            return
        self.step, statistics = engine.optimizer.steps, engine.optimizer.statistics
        self.merged += 1
        self.wins.update(set(statistics["winners"]))
        for task, norm in statistics["norms"].items():
            self.writer.add_scalar(f"conductor/norm_{task}", norm, self.step)
        for pair, cosine in statistics["cosines"].items():
            self.writer.add_scalar(f"conductor/cosine_{'_'.join(pair)}", cosine, self.step)

    def write_winners(self, engine: Engine) -> None:
        """Write how often each task won."""
        for task in engine.optimizer.statistics["norms"] if self.merged else ():
            self.writer.add_scalar(f"conductor/wins_{task}", self.wins[task] / self.merged, engine.state.epoch)
        self.writer.flush()


class RestoreIntensities:
    """Put reconstructions of a network that was trained on normalised targets back on the intensity scale.

    For metrics and figures of voxels: ``reconstructed_cube`` is changed, ``reconstructed_patches``, which the losses
    look at, stay. Attach to the evaluator before those.

    Args:
        loss: the one with ``normalise_target``.
    """

    def __init__(self, loss: MaskedL2Loss) -> None:
        self.loss = loss

    def attach(self, engine: Engine) -> None:
        """Follow an evaluator."""
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self.restore)

    def restore(self, engine: Engine) -> None:
        """Replace the volume in the network's output."""
        volume, target, prediction = (engine.state.output[key] for key in (Keys.IMAGE, Keys.LABEL, Keys.PRED))
        patches = self.loss.restore(prediction["reconstructed_patches"], target)
        prediction["reconstructed_cube"] = _assembled(patches, volume)


class ReconstructionFigures:
    """Draw original, visible and reconstructed volume in three planes: the same volumes and masks each time.

    Attach to the evaluator. Writes ``epoch_NNNN.png``.

    Args:
        folder: where the figures go.
        num_volumes: the first volumes of the validation set, one row of panels each.
        interval: epochs between two figures; the last epoch is drawn too.
        last_epoch: the run's ``max_epochs``.
    """

    def __init__(self, folder: str | Path, num_volumes: int = 3, interval: int = 1, last_epoch: int = 0) -> None:
        self.folder, self.num_volumes, self.interval, self.last_epoch = Path(folder), num_volumes, interval, last_epoch
        self.rows: list[tuple[str, list[np.ndarray]]] = []

    def attach(self, engine: Engine) -> None:
        """Follow an evaluator."""
        if parallel.rank() == 0:
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
        hidden = _voxel_mask(volume, prediction["mae_mask_1d"])
        outside = ~_voxel_mask(volume, prediction["valid_for_masking_mask"])
        seen = volume.masked_fill(hidden, HIDDEN).masked_fill(outside, OUTSIDE)
        panels = (volume, seen, composite(volume, prediction))
        for place, case in enumerate(engine.state.batch["case"]):
            if len(self.rows) < self.num_volumes:
                self.rows.append((case, [panel[place, 0].float().cpu().numpy() for panel in panels]))

    def draw(self, engine: Engine) -> None:
        """Write the figure of this epoch."""
        epoch = engine.state.epoch
        if self.rows:
            self.folder.mkdir(parents=True, exist_ok=True)
            _draw_panels(
                self.rows,
                self.folder / f"epoch_{epoch:04d}.png",
                title=f"epoch {epoch}   (blue: hidden, olive: outside the field of view)",
            )


class ValidateAtEnds:
    """Validate before the first epoch, as epoch 0, and after the last: what a ValidationHandler leaves out.

    Args:
        validator: the evaluator.
        interval: the ValidationHandler's epochs between two validations.
        first: validate before training, unless the run continues an earlier one.
    """

    def __init__(self, validator: Engine, interval: int = 1, first: bool = False) -> None:
        self.validator, self.interval, self.first = validator, interval, first

    def attach(self, engine: Engine) -> None:
        """Follow a trainer."""
        if self.first:
            engine.add_event_handler(Events.STARTED, self.validate_first)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.validate_last)

    def validate_first(self, engine: Engine) -> None:
        """Run the evaluator before training."""
        if engine.state.iteration == 0:
            self.validator.run(1)  # MONAI's evaluators count from one
            self.validator.state.best_metric_epoch = 0

    def validate_last(self, engine: Engine) -> None:
        """Run the evaluator after the last epoch, if the interval left it out."""
        if engine.state.epoch == engine.state.max_epochs and engine.state.epoch % self.interval:
            self.validator.run(engine.state.epoch)


class EarlyStopping:
    """End training when the validation metric has not improved for a while.

    The first rank decides for all; nothing needs saving, since the best epoch is.

    Args:
        patience: epochs to wait for an improvement.
        validator: the evaluator, which knows the epoch of the best metric.
    """

    def __init__(self, patience: int, validator: Engine) -> None:
        self.patience, self.validator = patience, validator

    def attach(self, engine: Engine) -> None:
        """Follow a trainer."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.judge)

    def judge(self, engine: Engine) -> None:
        """Stop the trainer if the wait is over."""
        best = self.validator.state.best_metric_epoch
        if idist.broadcast(float(best >= 0 and engine.state.epoch - best >= self.patience), src=0):
            logger.info("stopping early: no improvement since epoch %d", best)
            engine.terminate()


def _voxel_mask(volume: Tensor, mask: Tensor) -> Tensor:
    """Blow a ``(B, N)`` patch mask up to voxels: ``(B, 1, D, H, W)`` bool."""
    voxels_per_patch = math.prod(volume.shape[2:]) // mask.shape[1]
    return _assembled(rearrange(mask.bool(), "b n -> b n 1").expand(-1, -1, voxels_per_patch), volume)


def _assembled(patches: Tensor, volume: Tensor) -> Tensor:
    """Put patches ``(B, N, P³·C)`` together to the sides of a volume ``(B, …, D, H, W)``."""
    sides = volume.shape[2:]
    patch_size = round((math.prod(sides) / patches.shape[1]) ** (1 / 3))
    return unpatchify(patches, patch_size, [side // patch_size for side in sides])


def _ssim_map(prediction: Tensor, target: Tensor, data_range: float) -> Tensor:
    pad = (SSIM_WINDOW // 2,) * 6
    padded = (F.pad(image, pad, mode="replicate") for image in (prediction, target))
    ssim, _ = compute_ssim_and_cs(*padded, 3, (SSIM_WINDOW,) * 3, (SSIM_SIGMA,) * 3, data_range)
    return ssim


def _draw_panels(rows: list[tuple[str, list[np.ndarray]]], path: Path, title: str) -> None:
    """Draw a row a volume: axial, coronal and sagittal plane on one scale, each original | visible | rebuilt."""
    # For volumes in RAS: the axis looked along, the one across and the one up.
    planes = {"axial": (2, 0, 1), "coronal": (1, 0, 2), "sagittal": (0, 1, 2)}
    columns = [(name, axes, panel) for name, axes in planes.items() for panel in range(3)]
    size = rows[0][1][0].shape
    widths = [size[across] for _, (_, across, _), _ in columns]
    height = max(size[up] for _, _, up in planes.values())
    figure = Figure(figsize=(16, 0.8 + len(rows) * (0.1 + 15 * height / sum(widths))), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the user's backend
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
