"""Who takes part in the experiments, how each learns, and every number of the recipes they share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = [
    *(
        "ACCURACY",
        "AS_IT_STARTS",
        "COMPARISONS",
        "CLASSIFICATION",
        "DICE",
        "ERROR",
        "PRETRAINED",
        "PRETRAININGS",
        "PRETRAINING_RATES",
        "PROBED",
    ),
    *("SEGMENTATION", "STEMS", "TUNING", "Contestant", "Measure", "Task"),
]


@dataclass(frozen=True)
class Contestant:
    """A network and how it is trained."""

    title: str  # in tables and figures
    colour: str
    starts_from: str | None = None  # the weights, of those that the user gives; None: random ones
    overlays: tuple[str, ...] = ()  # config files on top of the workflow's own
    knobs: Mapping[str, Any] = field(default_factory=dict)
    frozen: float = 0.0  # share of the epochs in which the encoder is, the first ones
    by_default: bool = True  # it takes part where nobody says who does
    one_in: int | None = None  # it has this part of the ViT-MAE's epochs; default: those that take the same time


@dataclass(frozen=True)
class Measure:
    """What a contestant is judged by, and the figure that stands beside it in brackets."""

    key: str  # in metrics.jsonl
    title: str
    beside: str  # key of the other one
    unit: str  # in a sentence
    scale: float = 1.0  # of what is shown
    digits: int = 3
    sign: int = 1  # -1: the less, the better


@dataclass(frozen=True)
class Task:
    """What is learned from the labels."""

    workflow: str
    contestants: Mapping[str, Contestant]
    knobs: Mapping[str, Any]  # the same for all
    rates: tuple[float, ...]  # that each chooses from
    # The other rates that follow from one, and from whether the encoder is pre-trained.
    follow: Callable[[float, bool], dict[str, float]]


# ----------------------------------------------------------------------------------------------------- fine-tuning

STARTS = {
    "pretrained": Contestant("pre-trained, fine-tuned", "tab:blue", "pretrained"),
    "pretrained_frozen": Contestant("pre-trained, frozen", "tab:cyan", "pretrained", frozen=1.0),
    "random": Contestant("random weights, fine-tuned", "tab:grey"),
    "random_frozen": Contestant("random weights, frozen", "silver", frozen=1.0),
}
# Who differs by pre-training alone: the first pair that takes part is what the sentences are about.
PRETRAINED = (("pretrained", "random"), ("pretrained_frozen", "random_frozen"))
COMPARISONS = (  # who is compared with whom
    *PRETRAINED,
    ("pretrained", "unet"),
    ("pretrained", "densenet"),
    ("pretrained", "vit_mae"),
    ("tuned", "untuned"),
    ("tuned", "random_frozen"),
)
# Prepared volumes are few and small, and runs share the cores: none is left for processes that load. The last epoch is
# the only one that is validated, so that none is chosen.
FINETUNING = {"warmup_epochs": 1, "affine_prob": 0.2, "num_workers": 0, "validate_first": False}
# What a rate of 0 comes to: one step at a millionth of this, where the warm-up begins. So the start itself is scored.
AS_IT_STARTS = dict.fromkeys(("max_epochs", "val_interval", "iterations_per_epoch", "warmup_epochs"), 1)
AS_IT_STARTS |= {"learning_rate": 0.0003}
VIT = ("peers/vit_segmentation.yaml",)
SEGMENTATION = Task(
    "segmentation",
    {
        **STARTS,
        "unet": Contestant("MONAI U-Net, from scratch", "tab:green", overlays=("peers/unet.yaml",)),
        "unetr": Contestant("MONAI UNETR, from scratch", "tab:red", overlays=("peers/unetr.yaml",), by_default=False),
        "vit_mae": Contestant("MONAI ViT-MAE, pre-trained", "tab:orange", "vit_mae", VIT),
    },
    FINETUNING | {"batch_size": 1, "iterations_per_epoch": 20},
    (0.002, 0.006, 0.02),
    lambda rate, pretrained: {"encoder_learning_rate": rate / 10 if pretrained else rate / 2},
)
# Encoders in several states, frozen for the whole run.
STEMS = Task(
    "segmentation",
    {
        "patch_mode": Contestant("patch mode", "tab:purple", "untuned", knobs={"blockwise_norm": True}, frozen=1.0),
        "untuned": Contestant("volumetric, untuned", "tab:cyan", "untuned", frozen=1.0),
        "tuned": Contestant("volumetric, tuned", "tab:blue", "tuned", frozen=1.0),
        "random_frozen": STARTS["random_frozen"],
    },
    SEGMENTATION.knobs,
    SEGMENTATION.rates,
    SEGMENTATION.follow,
)
CLASSIFICATION = Task(
    "classification",
    {
        **STARTS,
        "pretrained": replace(STARTS["pretrained"], frozen=0.2),  # a fresh head learns alone first
        "densenet": Contestant("MONAI DenseNet, from scratch", "tab:green", overlays=("peers/densenet.yaml",)),
    },
    # Heads are fitted to all cases that they could learn from.
    FINETUNING | {"batch_size": 4, "iterations_per_epoch": 40, "start_volumes": 1_000_000},
    (0.0, 0.0003, 0.001, 0.003),  # a head that was fitted may be as good as it gets
    lambda _, pretrained: {"lr_decay": 0.75 if pretrained else 1.0},
)
DICE = Measure("val_dice", "Dice in percent (Hausdorff distance in voxels)", "val_hausdorff", "Dice", 100, 1)
ACCURACY = Measure("val_auroc", "AUROC (accuracy)", "val_accuracy", "AUROC")
ERROR = Measure("val_mae", "mean absolute error (R²)", "val_r2", "in mean absolute error", digits=2, sign=-1)

# ----------------------------------------------------------------------------------- pre-training, tuning, probing

PRETRAINING_RATES = (0.00015, 0.0005, 0.0015, 0.0045)
STRICT = {"strict_stem": True}
PRETRAININGS = {
    "bertswin": Contestant("BertsWin", "tab:blue", knobs=STRICT),
    "vit_mae": Contestant("MONAI ViT-MAE", "tab:orange", overlays=("peers/vit_mae.yaml",)),
    "bertswin_fifth": Contestant("BertsWin, a fifth of the epochs, batch 1", "navy", knobs=STRICT, one_in=5),
    "bertswin_tenth": Contestant("BertsWin, a tenth of the epochs, batch 1", "violet", knobs=STRICT, one_in=10),
}
TUNING = {"batch_size": 4, "accumulation_steps": 1, "iterations_per_epoch": 40, "max_epochs": 12, "warmup_epochs": 1}
TUNING |= {"learning_rate": 0.001, "affine_prob": 0.2, "flip_prob": 0.0, "num_workers": 0}
PROBED = {
    "pretrained": Contestant("pre-trained", "tab:blue", "pretrained"),
    "random": Contestant("random weights", "tab:grey", "random"),
    "vit_mae": Contestant("MONAI ViT-MAE, pre-trained", "tab:orange", "vit_mae", ("peers/vit_probe.yaml",)),
}
