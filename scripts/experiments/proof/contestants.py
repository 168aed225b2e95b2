"""Who takes part in the experiments, and in which ways each may learn; all are of the small size."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["FINETUNING", "FINETUNING_RATES", "PRETRAININGS", "PROBED", "RATES", "SEGMENTATIONS", "TUNED_EPOCHS"]


@dataclass(frozen=True)
class Contestant:
    """A network and how it is trained."""

    title: str  # in tables and figures
    colour: str
    overlays: tuple[str, ...] = ()  # config files on top of the workflow's own
    knobs: Mapping[str, Any] = field(default_factory=dict)
    rate_of: str | None = None  # whose learning rate it takes; default: one that is chosen for itself
    one_in: int | None = None  # it has this part of the ViT-MAE's epochs; default: those that take the same time
    # Epochs in which the encoder is frozen, one or several to choose from. Then it follows at a tenth of the decoder's
    # rate; with 0 all learns from the start, at one rate.
    freezes: tuple[int, ...] = (0,)


# An epoch has the same draws, each of them a step: 22 epochs of that end with a masked MSE of 0.070 on held-out
# training volumes, of half as many steps with two draws with 0.074.
SHORT = {"strict_stem": True, "batch_size": 1, "iterations_per_epoch": 160}
PRETRAININGS = {
    "bertswin": Contestant("BertsWin, default stem", "tab:cyan"),  # only chooses the strict one's rate
    "bertswin_strict": Contestant("BertsWin", "tab:blue", (), {"strict_stem": True}, "bertswin"),
    "vit_mae": Contestant("MONAI ViT-MAE", "tab:orange", ("peers/vit_mae.yaml",)),
    "bertswin_fifth": Contestant("BertsWin, a fifth of the epochs, batch 1", "navy", (), SHORT, "bertswin_tenth", 5),
    "bertswin_tenth": Contestant("BertsWin, a tenth of the epochs, batch 1", "violet", (), SHORT, None, 10),
}
RATES = (0.00015, 0.0005, 0.0015, 0.0045)
# Of pre-training: they take longer than the twelve of stem tuning, whose steps cost less than twice as much.
TUNED_EPOCHS = 24
# All by the same steps from the same grid of rates, and scored at the end alone.
SEGMENTATIONS = {
    "bertswin_strict": Contestant("BertsWin, pre-trained and tuned", "tab:blue", freezes=(4,)),
    "random": Contestant("BertsWin, random weights", "tab:grey", freezes=(0, 4)),
    "vit_mae": Contestant("MONAI ViT-MAE, pre-trained", "tab:orange", ("peers/vit_segmentation.yaml",), freezes=(4,)),
    "unetr": Contestant("MONAI UNETR, from scratch", "tab:red", ("peers/unetr.yaml",)),
    "unet": Contestant("MONAI U-Net, from scratch", "tab:green", ("peers/unet.yaml",)),
}
FINETUNING = {"feature_size": 8, "batch_size": 1, "iterations_per_epoch": 20, "val_interval": 1000}
FINETUNING_RATES = (0.003, 0.01, 0.03)
PROBED = {"bertswin_strict": (), "random": (), "vit_mae": ("peers/vit_probe.yaml",)}  # with their overlays
