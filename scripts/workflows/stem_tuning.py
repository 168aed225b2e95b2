"""Stem tuning: adapt the stem of a pre-trained network to whole volumes, everything else frozen."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .. import parallel
from ..losses import MaskedL2Loss, MaskedLoss, SumOfLosses
from ..mistakes import Mistake
from ..networks.bertswin_mae import BertsWinMAE
from ..networks.patches import unpatchify
from ..weights.pretrained import encoder_part, has_strict_stem, load_network, load_state_dict

__all__ = ["StemTuning", "StemTuningLoss", "StemTuningReport", "load_original"]

logger = logging.getLogger(__name__)

OBJECTIVES = ("reconstruction", "distillation", "both")


def load_original(pretrained: str | Path | None, settings: dict[str, Any]) -> BertsWinMAE:
    """Load a pre-trained network, with the kind of stem that it was trained with.

    Args:
        pretrained: the whole network's weights, such as ``model.pt`` of a pre-training.
        settings: arguments of :class:`BertsWinMAE`. ``strict_stem`` may be None: it is read off the weights.

    Raises:
        Mistake: when there are no such weights, or they do not fit the settings.
    """
    if pretrained is None:
        raise Mistake("give --pretrained, the model.pt of a pre-training")
    weights = load_state_dict(pretrained)
    if not encoder_part(weights):
        raise Mistake(
            f"{pretrained} holds an encoder alone, or another network, where the whole one that was pre-trained is "
            "needed, its decoder included: give the model.pt of a pre-training"
        )
    strict = bool(has_strict_stem(weights))
    if settings.get("strict_stem") not in (None, strict):
        raise Mistake(
            f"{pretrained} has {'a strict' if strict else 'the default'} stem, not what strict_stem "
            f"{settings['strict_stem']} says: leave strict_stem out, it is read off the weights"
        )
    blockwise = strict and settings.get("blockwise_norm", False)
    network = BertsWinMAE(**(settings | {"strict_stem": strict, "blockwise_norm": blockwise}))
    load_network(network, weights, pretrained)
    return network


class StemTuning(nn.Module):
    """The network whose stem is tuned, beside the frozen original that sets the target.

    The tuned network reads whole volumes; the original reads isolated patches, as in pre-training, with nothing
    hidden.

    Args:
        original: the pre-trained network; it is frozen.
        stem: ``keep`` tunes a copy of the original's stem (the paper's ways A and C); ``strict`` starts from a fresh
            stem of non-overlapping kernels (way B) and says which weights are new.
        settings: arguments of :class:`BertsWinMAE` that built ``original``.
        objective: ``reconstruction``, ``distillation`` or ``both``; see :class:`StemTuningLoss`.

    Raises:
        Mistake: for another ``stem`` or ``objective``.
    """

    def __init__(self, original: BertsWinMAE, stem: str, settings: dict[str, Any], objective: str) -> None:
        super().__init__()
        if stem not in ("keep", "strict"):
            raise Mistake(f"stem {stem!r} must be 'keep' or 'strict'")
        self.objective = _checked_objective(objective)
        self.original = original.requires_grad_(False)
        if stem == "keep" and settings.get("blockwise_norm") and not original.encoder.strict_stem:
            raise Mistake(
                "blockwise_norm needs a strict stem, which the pre-trained one is not: give --stem strict too"
            )
        if stem == "keep":
            self.network = copy.deepcopy(original)
        else:
            self.network = BertsWinMAE(**(settings | {"strict_stem": True}))
            _take_all_but_the_stem(self.network, original)
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
            patches, encoder = self.network.decoder.rebuild_patches(features), self.network.encoder
            out["reconstructed_cube"] = unpatchify(patches, encoder.patch_size, encoder.grid_size)
            out["reconstructed_patches"] = patches
            out["mae_mask_1d"] = volume.new_ones(volume.shape[0], self.network.encoder.num_patches)
        if not self.training:
            out["patch_mode_cube"] = self.original.decoder(patch_features)
        return out

    def check_frozen(self) -> None:
        """Raise a RuntimeError unless all but the stem is the original's, bit for bit."""
        original = self.original.state_dict()
        changed = [
            name
            for name, value in self.network.state_dict().items()
            if not name.startswith("encoder.stem.") and not torch.equal(value, original[name])
        ]
        if changed:
            raise RuntimeError(f"{len(changed)} frozen weights changed during stem tuning, the first one {changed[0]}")


class StemTuningLoss(nn.Module):
    """What the stem is tuned to.

    ``reconstruction`` (the paper): the error of the whole volume, rebuilt by the frozen decoder.
    ``distillation``: the squared distance of the whole volume's features from the original's patch-mode features,
    over the variance of the latter, so that 1 is a constant guess. ``both``: the sum.

    Args:
        objective: one of these names.
        reconstruction: the error of a reconstruction; default: the mean squared one.
    """

    def __init__(self, objective: str, reconstruction: MaskedLoss | SumOfLosses | None = None) -> None:
        super().__init__()
        self.objective, self.reconstruction = _checked_objective(objective), reconstruction or MaskedL2Loss()
        if objective == "distillation" and list(self.reconstruction.weights) != ["l2"]:
            raise Mistake("--loss says how a reconstruction is judged: give --objective reconstruction, or both, too")

    @property
    def last_components(self) -> dict[str, Tensor]:
        """What the reconstruction's error was made of in the last call."""
        return self.reconstruction.last_components

    def forward(self, prediction: dict[str, Tensor], target: Tensor) -> Tensor:
        """Score the output of :class:`StemTuning`.

        Args:
            prediction: the output.
            target: ``(B, N, P³·C)``, the volume in patches.

        Returns:
            A scalar.
        """
        loss = target.new_zeros(())
        if self.objective != "distillation":
            loss = loss + self.reconstruction(prediction, target)
        if self.objective != "reconstruction":
            features, goal = prediction["features"].float(), prediction["patch_features"].float()
            variance = goal.var(dim=(0, 2, 3, 4), correction=0).mean()
            loss = loss + F.mse_loss(features, goal) / variance.clamp(min=1e-12)
        return loss


class StemTuningReport:
    """Sum the tuning up in ``stem_tuning.json``, and prove that only the stem changed.

    Attach to the trainer behind the MetricsRecorder.

    Args:
        path: of ``stem_tuning.json``.
        metrics: of ``metrics.jsonl``, which holds the untuned network's figures as epoch 0.
        tuning: the network that is trained.
    """

    def __init__(self, path: str | Path, metrics: str | Path, tuning: StemTuning) -> None:
        self.path, self.metrics, self.tuning = Path(path), Path(metrics), tuning

    def attach(self, engine: Engine) -> None:
        """Follow a trainer."""
        engine.add_event_handler(Events.STARTED, self.check_start)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def check_start(self, engine: Engine) -> None:
        """Refuse to continue a run that started from other weights."""
        try:
            self.tuning.check_frozen()
        except RuntimeError as error:
            raise Mistake(
                "--pretrained is not the network that this run started from: continue it with the same one, or choose "
                "another --output_dir"
            ) from error

    def write(self, engine: Engine) -> None:
        """Check the frozen weights and write the report."""
        self.tuning.check_frozen()
        if parallel.rank() > 0:
            return
        records = [json.loads(line) for line in self.metrics.read_text().splitlines()]
        report = summarise(records) | {"objective": self.tuning.objective}
        self.path.write_text(json.dumps(report, indent=1) + "\n")
        logger.info(
            "feature cosine %.3f -> %.3f, volumetric error %.4g -> %.4g (patch mode %.4g), best in epoch %d",
            *(report[name] for name in ("feature_cosine_before", "feature_cosine_after", "volumetric_before")),
            *(report[name] for name in ("volumetric_after", "patch_mode", "best_epoch")),
        )


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compare the best validation with the one before tuning.

    Args:
        records: of ``metrics.jsonl``, epoch 0 first.

    Returns:
        ``patch_mode``, ``volumetric_before`` and ``volumetric_after`` (mean squared errors),
        ``feature_cosine_before`` and ``feature_cosine_after``, ``gap_closed`` (the share of the missing feature
        cosine that tuning won: 1 means that both modes agree, below 0 that they parted) and ``best_epoch``.
    """
    before, best = records[0], min(records, key=lambda record: record["val_objective"])
    cosines = before["val_feature_cosine"], best["val_feature_cosine"]
    return {
        "patch_mode": best["val_patch_mode"],
        "volumetric_before": before["val_volumetric"],
        "volumetric_after": best["val_volumetric"],
        "feature_cosine_before": cosines[0],
        "feature_cosine_after": cosines[1],
        "gap_closed": (cosines[1] - cosines[0]) / (1 - cosines[0]) if cosines[0] < 1 else 1.0,
        "best_epoch": best["epoch"],
    }


def _checked_objective(objective: str) -> str:
    if objective not in OBJECTIVES:
        raise Mistake(f"objective {objective!r} must be one of {OBJECTIVES}")
    return objective


def _take_all_but_the_stem(network: BertsWinMAE, original: BertsWinMAE) -> None:
    ours = network.state_dict()
    weights = {name: value for name, value in original.state_dict().items() if not name.startswith("encoder.stem.")}
    new = sorted(ours.keys() - weights.keys())
    logger.info("%d weights taken over; new, as the stem is a fresh strict one: %s", len(weights), ", ".join(new))
    network.load_state_dict(ours | weights)
