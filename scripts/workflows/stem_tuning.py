"""Stem tuning: adapt the stem of a pre-trained network to whole volumes, everything else frozen."""

import copy
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ..losses import NORMALISED, MaskedL2Loss, MaskedLoss
from ..mistakes import Mistake
from ..networks.bertswin_mae import BertsWinMAE
from ..networks.patches import unpatchify
from ..weights import encoder_part, fill, read_record, read_weights, recorded, stem_is_strict

__all__ = ["StemTuning", "StemTuningLoss", "StemTuningReport", "load_original"]

logger = logging.getLogger(__name__)

OBJECTIVES = ("reconstruction", "distillation", "both")
Build = Callable[..., BertsWinMAE]  # makes a network, given `strict_stem` and perhaps `blockwise_norm`


def load_original(
    build: Build, pretrained: str | Path | None, strict_stem: bool | None = None, loss: str | None = None
) -> BertsWinMAE:
    """Load a whole pre-trained network; arguments are those of :func:`~bertswin_mae.weights.build_pretrained`.

    ``build`` is given ``blockwise_norm`` too. ``loss`` is that of the tuning: what it rebuilds, voxels or standardised
    patches, must be what the decoder has learned to.
    """
    if pretrained is None:
        raise Mistake("give --pretrained, the model.pt of a pre-training")
    weights = read_weights(pretrained)
    if not encoder_part(weights):
        raise Mistake(
            f"{pretrained} holds an encoder alone, or another network, where the whole one that was pre-trained is "
            "needed, its decoder included: give the model.pt of a pre-training"
        )
    trained = recorded(read_record(pretrained), "provenance").get("loss")
    if None not in (trained, loss) and (trained == NORMALISED) != (loss == NORMALISED):
        what, instead = ("standardised patches", NORMALISED) if trained == NORMALISED else ("voxels", "l2")
        raise Mistake(
            f"{pretrained} was trained with the loss {trained}, so its decoder rebuilds {what}: tune it with "
            f"--loss {instead}, not {loss}"
        )
    strict_stem = stem_is_strict(weights, pretrained, strict_stem)
    # Of a default stem, blockwise norms can only be wanted of the fresh one that takes its place.
    blockwise = {} if strict_stem else {"blockwise_norm": False}
    return fill(build(strict_stem=strict_stem, **blockwise), weights, pretrained)


class StemTuning(nn.Module):
    """The network whose stem is tuned, beside the frozen original that sets the target.

    The one reads whole volumes, the other isolated patches, as in pre-training, with nothing hidden.

    Args:
        original: the pre-trained network.
        stem: ``keep`` tunes a copy of the original's stem (the paper's ways A and C); ``strict`` starts from a fresh
            stem of non-overlapping kernels (way B) and says which weights are new.
        build: makes a network like the original, given ``strict_stem``.
        objective: ``reconstruction``, ``distillation`` or ``both``; see :class:`StemTuningLoss`.
        blockwise_norm: whether the tuned stem is to have it, which must then be strict.
    """

    def __init__(
        self, original: BertsWinMAE, stem: str, build: Build, objective: str, blockwise_norm: bool = False
    ) -> None:
        super().__init__()
        if stem not in ("keep", "strict"):
            raise Mistake(f"stem {stem!r} must be 'keep' or 'strict'")
        if stem == "keep" and blockwise_norm and not original.encoder.strict_stem:
            raise Mistake(
                "blockwise_norm needs a strict stem, which the pre-trained one is not: give --stem strict too"
            )
        self.objective, self.original = objective, original.requires_grad_(False)
        self.network = copy.deepcopy(original) if stem == "keep" else build(strict_stem=True)
        if stem == "strict":
            fresh, kept = self.network.state_dict(), _all_but_the_stem(original)
            new = ", ".join(sorted(fresh.keys() - kept.keys()))
            logger.info("%d weights taken over; new, as the stem is a fresh strict one: %s", len(kept), new)
            fill(self.network, fresh | kept)
        self.network.requires_grad_(False)
        self.network.encoder.stem.requires_grad_(True)

    @property
    def stem(self) -> nn.Module:
        """What is tuned."""
        return self.network.encoder.stem

    def forward(self, volume: Tensor) -> dict[str, Tensor]:
        """Encode the volume both ways.

        Args:
            volume: ``(B, C, D, H, W)``.

        Returns:
            ``features`` of the whole volume and ``patch_features`` of the original, both ``(B, C, D/P, H/P, W/P)``;
            where the objective or a validation asks for it also ``reconstructed_cube``, ``reconstructed_patches``
            and ``mae_mask_1d`` as of :class:`BertsWinMAE` (everything scored), and in validation
            ``patch_mode_cube``, the original's reconstruction.
        """
        features = self.network.encoder(volume)
        with torch.no_grad():
            patch_features = self.original.extract_features(volume)
        out = {"features": features, "patch_features": patch_features}
        if self.objective != "distillation" or not self.training:
            patches = self.network.decoder(features, as_patches=True)
            out["reconstructed_cube"] = unpatchify(patches, self.network.encoder.patch_size, features.shape[2:])
            out |= {"reconstructed_patches": patches, "mae_mask_1d": volume.new_ones(patches.shape[:2])}
        if not self.training:
            out["patch_mode_cube"] = self.original.decoder(patch_features)
        return out

    def changed_weights(self) -> list[str]:
        """Name the weights outside the stem that are not the original's, bit for bit: there should be none."""
        original, tuned = self.original.state_dict(), _all_but_the_stem(self.network)
        return [name for name, value in tuned.items() if not torch.equal(value, original[name])]


class StemTuningLoss(nn.Module):
    """What the stem is tuned to.

    ``reconstruction`` (the paper): the error of the whole volume, rebuilt by the frozen decoder.
    ``distillation``: the squared distance of the whole volume's features from the original's patch-mode features,
    over the variance of the latter, so that 1 is a constant guess. ``both``: the sum.

    Args:
        objective: one of these names.
        reconstruction: the error of a reconstruction; default: the mean squared one.
    """

    def __init__(self, objective: str, reconstruction: MaskedLoss | None = None) -> None:
        super().__init__()
        if objective not in OBJECTIVES:
            raise Mistake(f"objective {objective!r} must be one of {OBJECTIVES}")
        self.objective, self.reconstruction = objective, reconstruction or MaskedL2Loss()
        if objective == "distillation" and list(self.reconstruction.weights) not in (["l2"], [NORMALISED]):
            raise Mistake("--loss says how a reconstruction is judged: give --objective reconstruction, or both, too")

    def forward(self, prediction: dict[str, Tensor], target: Tensor) -> Tensor:
        """Return the loss alone; see :meth:`score`."""
        return self.score(prediction, target)[0]

    def score(self, prediction: dict[str, Tensor], target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Score the output of :class:`StemTuning` by the volume in patches ``(B, N, P³·C)``.

        Returns:
            The loss, a scalar, and what the reconstruction's error is made of.
        """
        loss, components = target.new_zeros(()), {}
        if self.objective != "distillation":
            loss, components = self.reconstruction.score(prediction, target)
        if self.objective != "reconstruction":
            features, goal = prediction["features"].float(), prediction["patch_features"].float()
            variance = goal.var(dim=(0, 2, 3, 4), correction=0).mean()
            loss = loss + F.mse_loss(features, goal) / variance.clamp(min=1e-12)
        return loss, components


@dataclass(eq=False)
class StemTuningReport:
    """Sum the tuning up in ``stem_tuning.json``, and prove that only the stem changed.

    Attach to the trainer behind the MetricsRecorder.
    """

    path: str | Path  # of stem_tuning.json
    metrics: str | Path  # of metrics.jsonl, which holds the untuned network's figures as epoch 0
    tuning: StemTuning  # the network that is trained

    def attach(self, engine: Engine) -> None:
        """Follow a trainer."""
        engine.add_event_handler(Events.STARTED, self.check_start)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def check_start(self, engine: Engine) -> None:
        """Refuse to continue a run that started from other weights."""
        if self.tuning.changed_weights():
            raise Mistake(
                "--pretrained is not the network that this run started from: continue it with the same one, or choose "
                "another --output_dir"
            )

    def write(self, engine: Engine) -> None:
        """Check the frozen weights and write the report."""
        if changed := self.tuning.changed_weights():
            raise RuntimeError(f"{len(changed)} frozen weights changed during stem tuning, the first one {changed[0]}")
        if idist.get_rank() > 0:
            return
        records = [json.loads(line) for line in Path(self.metrics).read_text().splitlines()]
        report = summarise(records) | {"objective": self.tuning.objective}
        Path(self.path).write_text(json.dumps(report, indent=1) + "\n")
        cosine, error = (
            " -> ".join(f"{report[key]:.4g}" for key in (f"{name}_before", f"{name}_after") if key in report)
            for name in ("feature_cosine", "volumetric")
        )
        logger.info(
            "feature cosine %s, volumetric error %s (patch mode %.4g), best in epoch %d",
            *(cosine, error, report["patch_mode"], report["best_epoch"]),
        )


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compare the best validation of ``metrics.jsonl`` with the one before tuning, epoch 0.

    Returns:
        ``patch_mode``, ``volumetric_before`` and ``volumetric_after`` (mean squared errors),
        ``feature_cosine_before`` and ``feature_cosine_after``, ``gap_closed`` (the share of the missing feature
        cosine that tuning won: 1 means that both modes agree, below 0 that they parted) and ``best_epoch``. Where
        nothing was validated before tuning, what compares with that is left out.
    """
    before, best = records[0], min(records, key=lambda record: record["val_objective"])
    report = {
        "patch_mode": best["val_patch_mode"],
        "volumetric_after": best["val_volumetric"],
        "feature_cosine_after": best["val_feature_cosine"],
        "best_epoch": best["epoch"],
    }
    if before["epoch"] > 0:
        return report
    missing = 1 - before["val_feature_cosine"]
    won = best["val_feature_cosine"] - before["val_feature_cosine"]
    return report | {
        "volumetric_before": before["val_volumetric"],
        "feature_cosine_before": before["val_feature_cosine"],
        "gap_closed": won / missing if missing > 0 else 1.0,
    }


def _all_but_the_stem(network: BertsWinMAE) -> dict[str, Tensor]:
    return {name: value for name, value in network.state_dict().items() if not name.startswith("encoder.stem.")}
