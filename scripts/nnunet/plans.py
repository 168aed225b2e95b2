"""From the plans that nnU-Net makes for a dataset to plans for our network, and from these to the network."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.optimizers import WarmupCosineSchedule, generate_param_groups

from ..knobs import read
from ..mistakes import Mistake
from ..networks import BertsWinEncoder, SegmentationNetwork
from ..weights import bundle_root, checkpoints, fill, read_record, read_weights, recorded, stem_is_strict

__all__ = ["build_network", "make_plans", "start_training", "trainer_folder", "training_settings", "write_plans"]

CONFIGURATION = "3d_fullres"
CONFIGS = ("train.yaml", "finetune_segmentation.yaml")  # whose knobs these are
ENCODER_KNOBS = (
    *("img_size", "patch_size", "encoder_embed_dim", "encoder_depth", "encoder_num_heads", "swin_window_size"),
    *("stem_base_dim", "strict_stem", "blockwise_norm", "activation_checkpointing"),
)
TRAINING_KNOBS = ("learning_rate", "encoder_learning_rate", "weight_decay", "warmup_epochs")
KNOBS = (*ENCODER_KNOBS, *TRAINING_KNOBS, "feature_size", "modality", "spacing", "batch_size")
SLOW = ("encoder.", "token_head.")  # what learns at ``encoder_learning_rate``
READER = "NibabelIOWithReorient"  # volumes in RAS, as in pre-training
RAS = [2, 1, 0]  # axes of nnU-Net's arrays, which are D, H, W back to front


def build_network(
    input_channels: int, num_classes: int, deep_supervision: bool = False, feature_size: int = 32, **encoder: Any
) -> SegmentationNetwork:
    """Build the network that plans name: what nnU-Net calls with their ``arch_kwargs``.

    Args:
        input_channels: of an image.
        num_classes: outputs.
        deep_supervision: must be off, there is one output.
        feature_size: of :class:`~bertswin_mae.networks.SegmentationNetwork`.
        encoder: arguments of :class:`~bertswin_mae.networks.BertsWinEncoder`.
    """
    if deep_supervision:
        raise Mistake("this network has one output: train it with -tr nnUNetTrainerBertsWin, without deep supervision")
    return SegmentationNetwork(BertsWinEncoder(in_chans=input_channels, **encoder), num_classes, feature_size)


def training_settings(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Take what :func:`write_plans` wrote for the trainer out of a configuration."""
    if "bertswin" not in configuration:
        raise Mistake(
            "nnUNetTrainerBertsWin needs plans of its own: write some by `python -m bertswin_mae.nnunet plans`, and "
            "name them with -p"
        )
    return configuration["bertswin"]


def start_training(
    network: SegmentationNetwork, settings: Mapping[str, Any], num_epochs: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Fill the encoder with its weights, if any, and make AdamW, and a warm-up and a cosine by epoch.

    Args:
        network: of :func:`build_network`.
        settings: of :func:`training_settings`.
        num_epochs: after which the rates are zero.
    """
    fill(network.encoder, settings["pretrained"])
    groups = generate_param_groups(
        network,
        [lambda item: not item[0].startswith(SLOW), lambda item: item[0].startswith(SLOW)],
        ["filter", "filter"],
        [settings["learning_rate"], settings["encoder_learning_rate"]],
        include_others=False,
    )
    optimizer = torch.optim.AdamW(groups, lr=settings["learning_rate"], weight_decay=settings["weight_decay"])
    warmup = settings["warmup_epochs"]
    return optimizer, WarmupCosineSchedule(optimizer, warmup, num_epochs, warmup_multiplier=1 / (warmup + 1))


def write_plans(
    plans: str,
    pretrained: str | None = None,
    config_file: str | Sequence[str] | None = None,
    name: str = "BertsWinPlans",
    **knobs: Any,
) -> None:
    """Write plans for our network beside those of nnU-Net, as ``<name>.json``.

    A knob is taken from the command line, else from the JSON beside the weights, else from the configs.

    Args:
        plans: ``nnUNetPlans.json`` of a dataset, as ``nnUNetv2_plan_and_preprocess`` writes it.
        pretrained: an ``encoder.pt`` or ``model.pt`` to start from; default: random weights.
        config_file: overlays of the pre-training, such as ``configs/small.yaml`` or a ``plan.yaml``.
        name: of the new plans, for ``-p``.
        knobs: of the network (``img_size``, ``encoder_depth``, …), the training (``learning_rate``, …), and
            ``modality``, ``spacing``, ``batch_size``.

    Raises:
        Mistake: for plans without a 3D configuration, a knob that there is not, or weights that do not fit.
    """
    source = Path(plans)
    try:
        theirs = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Mistake(f"{plans} are no plans of nnU-Net ({error}): give the dataset's nnUNetPlans.json") from error
    chosen = _choose_knobs(pretrained, [config_file] if isinstance(config_file, str) else config_file or (), knobs)
    made = make_plans(theirs, chosen, name, pretrained and str(Path(pretrained).resolve()))
    ours = made["configurations"][CONFIGURATION]
    network = build_network(len(ours["normalization_schemes"]), 2, **ours["architecture"]["arch_kwargs"])
    fill(network.encoder, pretrained)  # what does not fit is refused here
    if "modality" not in knobs:
        _check_modality(theirs["configurations"][CONFIGURATION]["normalization_schemes"], chosen["modality"])
    path = source.with_name(f"{name}.json")
    if path.exists() and '"bertswin"' not in path.read_text(encoding="utf-8"):
        raise Mistake(f"{path} holds plans that are not ours, and would be replaced: choose another --name")
    checkpoints.save_text(json.dumps(made, indent=1) + "\n", path)
    print(f"wrote {path}: windows of {ours['patch_size']} voxels of {ours['spacing']} mm")
    if theirs["image_reader_writer"] != READER:
        print(
            "volumes are not turned to RAS, as in pre-training: if they are NIfTI, set overwrite_image_reader_writer "
            f"to {READER} in dataset.json, and plan anew"
        )


def make_plans(
    plans: Mapping[str, Any], knobs: Mapping[str, Any], name: str = "BertsWinPlans", pretrained: str | None = None
) -> dict[str, Any]:
    """Turn nnU-Net's plans of a dataset into plans for our network.

    Axes come in the order D, H, W of pre-training (x, y, z of RAS), CT in its window. Everything else is nnU-Net's:
    resampling, and for MR its mean of 0 and standard deviation of 1.

    Args:
        plans: nnU-Net's.
        knobs: one of each name in ``KNOBS``; a ``spacing`` or ``batch_size`` of None leaves nnU-Net's. And
            ``intensity``, the transforms of the modality.
        name: of the new plans.
        pretrained: weights to start from.
    """
    made = copy.deepcopy(dict(plans))
    if CONFIGURATION not in made.get("configurations", {}):
        raise Mistake(f"these plans have no {CONFIGURATION}, and the network needs volumes: plan a 3D dataset")
    ours = made["configurations"][CONFIGURATION]
    _turn_axes(made, ours)
    spacing = knobs["spacing"] or ours["spacing"]
    size = zip(ours["median_image_size_in_voxels"], ours["spacing"], spacing, strict=True)
    arguments = {name: knobs[name] for name in (*ENCODER_KNOBS, "feature_size")}
    arguments["encoder_depths"], arguments["encoder_num_heads"] = (
        [arguments.pop(name)] for name in ("encoder_depth", "encoder_num_heads")
    )
    builder = f"{build_network.__module__}.{build_network.__name__}"
    ours |= {
        "data_identifier": f"{name}_{CONFIGURATION}",
        "spacing": spacing,
        "median_image_size_in_voxels": [voxels * before / after for voxels, before, after in size],
        "patch_size": list(knobs["img_size"]),
        "batch_size": knobs["batch_size"] or ours["batch_size"],
        "architecture": {"network_class_name": builder, "arch_kwargs": arguments, "_kw_requires_import": []},
        "bertswin": {"pretrained": pretrained, **{knob: knobs[knob] for knob in TRAINING_KNOBS}},
    }
    made |= {"plans_name": name, "configurations": {CONFIGURATION: ours}}
    if knobs["modality"] == "ct":
        _window_ct(made, ours, knobs["intensity"])
    return made


def trainer_folder() -> Path:
    """Tell the folder of ``nnUNetTrainerBertsWin``, for the environment variable ``nnUNet_extTrainer``."""
    return Path(__file__).resolve().parent / "trainers"


def _turn_axes(made: dict[str, Any], ours: dict[str, Any]) -> None:
    axes = [2 - axis for axis in made["transpose_forward"]]  # x, y, z that each of nnU-Net's axes is
    for holder, key in (
        *((made, f"original_median_{what}_after_transp") for what in ("spacing", "shape")),
        *((ours, key) for key in ("spacing", "median_image_size_in_voxels")),
    ):
        holder[key] = [value for _, value in sorted(zip(axes, holder[key], strict=True))]
    made |= {"transpose_forward": RAS, "transpose_backward": RAS}


def _check_modality(schemes: Sequence[str], modality: str) -> None:
    """Refuse a modality that nobody has named for this dataset, and that nnU-Net does not take it for."""
    other = "mr" if modality == "ct" else "ct"
    if any((scheme == "CTNormalization") != (modality == "ct") for scheme in schemes):
        raise Mistake(
            f"nnU-Net scales these volumes by {', '.join(schemes)}, but weights and configs are for {modality}: give "
            f"those for {other}, or name what the volumes are by --modality {modality} or --modality {other}"
        )


def _window_ct(made: dict[str, Any], ours: dict[str, Any], transforms: Sequence[Mapping[str, Any]]) -> None:
    """Clip and scale CT as pre-training does: with its window for percentiles, and its mean and deviation."""
    if [one.get("_target_") for one in transforms] != ["ScaleIntensityRanged"] or not transforms[0].get("clip"):
        raise Mistake(f"nnU-Net can scale CT by one ScaleIntensityRanged that clips, not by {list(transforms)}")
    (window,) = transforms
    unit = (window["a_max"] - window["a_min"]) / (window["b_max"] - window["b_min"])  # HU
    scale = {
        "mean": window["a_min"] - window["b_min"] * unit,
        "std": unit,
        "percentile_00_5": window["a_min"],
        "percentile_99_5": window["a_max"],
    }
    channels = made["foreground_intensity_properties_per_channel"]
    made["foreground_intensity_properties_per_channel"] = {name: {**its, **scale} for name, its in channels.items()}
    ours["normalization_schemes"] = ["CTNormalization"] * len(ours["normalization_schemes"])


def _choose_knobs(pretrained: str | None, overlays: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    if unknown := given.keys() - set(KNOBS):
        raise Mistake(f"there is no knob {min(unknown)} of nnU-Net's plans: they are {', '.join(KNOBS)}")
    if missing := [file for file in overlays if not Path(file).is_file()]:
        raise Mistake(f"there is no config at {missing[0]}")
    parser = ConfigParser()
    parser.read_config([*(str(bundle_root() / "configs" / config) for config in CONFIGS), *map(str, overlays)])
    defaults = parser.get()
    knobs = {knob: parser.get_parsed_content(knob) for knob in KNOBS} | {"batch_size": None}
    for knob, value in (_recorded(pretrained) | given).items():
        knobs[knob] = read(knob, value, defaults[knob])
    if pretrained is not None:
        knobs["strict_stem"] = stem_is_strict(read_weights(pretrained), pretrained, given.get("strict_stem"))
    elif knobs["strict_stem"] is None:
        knobs["strict_stem"] = False  # the default stem's stages are the better skips
    theirs = recorded(read_record(pretrained), "preprocessing")
    carried = recorded(theirs, "intensity") if theirs.get("modality") == knobs["modality"] else {}
    knobs["intensity"] = (defaults["intensities"][knobs["modality"]] | carried)["transforms"]
    return knobs


def _recorded(pretrained: str | None) -> dict[str, Any]:
    """Tell what some weights carry of the knobs: nothing, where that is not known."""
    record = read_record(pretrained)
    entries = {**recorded(record, "preprocessing"), **recorded(record, "network")}
    kept = (*ENCODER_KNOBS, "modality", "spacing")
    return {knob: value for knob, value in entries.items() if knob in kept and (value is not None or knob == "spacing")}
