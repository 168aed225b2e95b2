"""What a fine-tuning leaves behind: a bundle of its own, with all that a user or an application needs to run it."""

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from monai.bundle import ConfigComponent, ConfigParser, ConfigWorkflow, ckpt_export

from ..cli import TRACKING_KNOBS, as_published, caller, overridden
from ..data import dataset_facts, licence_of
from ..knobs import PATHS, is_expression, is_knob
from ..mistakes import Mistake
from ..weights import read_record, read_weights, recorded, stem_is_strict

__all__ = ["FinishedBundle", "predict"]

logger = logging.getLogger(__name__)

CONTINUED = "continued"  # the recipe of a finished bundle's own training
FIXED = ("modality", "in_chans", "img_size")  # of the fine-tuning: a prediction cannot change them
KEPT = ("schema", "monai_version", "pytorch_version", "numpy_version", "required_packages_version")  # of our metadata
DROPPED = ("_meta_", "encoder", "plan", "prediction", "sample", *TRACKING_KNOBS.difference(PATHS))  # to train further


@dataclass(eq=False)
class FinishedBundle:
    """Write a bundle of the best network when training ends; it predicts, and is trained further, by itself.

    Attach to the trainer, in a config. The bundle goes to ``bundle`` beside ``ckpt_dir``, whole or not at all, in place
    of an earlier one: ``configs/inference.json`` (the template with this run's knobs, ``intensity`` and
    ``network_def``, in plain numbers), ``configs/train.json`` (this run's config, to go on from its weights), metadata
    with the names of the channels, ``model.pt``, ``model.ts``, a model card, and the code. Of a network that this code
    does not build, as one of ``scripts.experiments``, there is none.
    """

    ckpt_dir: str | Path  # with the best network, model.pt
    channels: Sequence[str]  # what each channel of the network's output is
    about: Mapping[str, str]  # of metadata.json: `task`, and the `type` and `format` of the network's output
    num_cases: Mapping[str, int]  # of each fold
    metrics: str | Path  # metrics.jsonl, with the scores of the best epoch
    validator: Engine  # which knows that epoch
    pretrained: str | Path | None = None  # weights that it started from
    template: str | Path | Sequence[str] | None = None  # of inference.json; None: the bundle itself is renewed
    built: Mapping[str, Any] = field(default_factory=dict)  # what other entries refer to, as the run has built it

    def __post_init__(self) -> None:
        self.run = caller(ConfigParser)

    def attach(self, engine: Engine) -> None:
        """Follow a trainer."""
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def finish(self) -> None:
        """Write the bundle, on the first rank; also when a run that is resumed has nothing left to do."""
        weights = Path(self.ckpt_dir) / "model.pt"
        if idist.get_rank() or not weights.is_file():
            return
        # What it resolves need not be what the run has built.
        self.parser = ConfigParser({**deepcopy(self.run.get()), **self.built})
        self.root = Path(self.parser.get_parsed_content("bundle_root"))
        self.files, self.defaults = as_published(self.parser)
        network = _plain(self.parser.get_parsed_content("network_def", instantiate=False), weights)
        if "scripts.experiments." in json.dumps(network):
            logger.info("no bundle is made of a network that stands for comparison")
            return
        folder = finished_folder(self.ckpt_dir) if self.template else self.root
        if self.template and _trained_further(folder):
            logger.warning("the bundle in %s was trained further and stays as it is: move it to have a new one", folder)
            return
        with tempfile.TemporaryDirectory(dir=folder.parent if self.template else folder, prefix=".bundle.") as place:
            made = Path(place) / "bundle"
            for room in ("configs", "docs", "models"):
                (made / room).mkdir(parents=True)
            if self.template:
                self._write_configs(made, network)
            else:
                shutil.copy(folder / "configs/inference.json", made / "configs")
            self._write_model(made, weights)
            (_replace if self.template else _renew)(made, folder)
        logger.info("the finished bundle is in %s", folder)

    def _write_configs(self, made: Path, network: dict[str, Any]) -> None:
        """Write what stays as it is when the bundle is trained further: configs, code, licences."""
        inference = self._inference_config(network)
        _write_json(inference, made / "configs/inference.json")
        _write_json(self._training_config(inference), made / "configs/train.json")
        package = Path(__file__).resolve().parents[1]
        for name in ("LICENSE", "requirements.txt", "configs/logging.conf"):
            shutil.copy(self.root / name, made / name)
        for file in package.rglob("*.py"):
            place = file.relative_to(package)
            if place.parts[0] not in ("bundle", "experiments"):
                (made / "scripts" / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, made / "scripts" / place)
        (made / "large_files.yml").write_text("large_files: []\n")
        facts = dataset_facts(self.parser["dataset_dir"])
        licence = facts.get("licence") or facts.get("license") or "not known to this bundle"
        text = f"The licence of the volumes that it was fine-tuned on, as their datalist says it: {licence}\n"
        if self.pretrained and (of_weights := licence_of(self.pretrained)):
            text += f"The licence of the weights that it started from: {of_weights}\n"
        (made / "docs/data_license.txt").write_text(text, encoding="utf-8")

    def _write_model(self, made: Path, weights: Path) -> None:
        """Write the weights, and what is said about them."""
        model, configs = made / "models/model.pt", made / "configs"
        shutil.copy(weights, model)
        if weights.with_suffix(".json").is_file():  # which volumes they have seen
            shutil.copy(weights.with_suffix(".json"), model.with_suffix(".json"))
        epoch, lines = self.validator.state.best_metric_epoch, Path(self.metrics).read_text().splitlines()
        record = next((one for one in map(json.loads, lines) if one["epoch"] == epoch), {})
        scores = {name: value for name, value in record.items() if name.startswith("val_")}
        name = dataset_facts(self.parser["dataset_dir"]).get("name")
        data = f"{self.num_cases['training']} training volumes{f' of {name}' if name else ''}"
        _write_json(self._metadata(scores, data), configs / "metadata.json")
        (made / "docs/README.md").write_text(self._model_card(scores, data), encoding="utf-8")
        files = {"meta_file": str(configs / "metadata.json"), "config_file": str(configs / "inference.json")}
        ckpt_export("network_def", str(model.with_suffix(".ts")), str(model), **files)

    def _inference_config(self, network: dict[str, Any]) -> dict[str, Any]:
        """Complete the template with this run's knobs; paths and the device are the next user's."""
        template = ConfigParser.load_config_files(self.template)
        names = [
            name
            for name in template["_knobs_"]
            if name in self.defaults.keys() - {*PATHS, "bundle_root", "device", "precision", "pretrained"}
        ]
        intensity = _plain(self.parser.get_parsed_content("intensity", instantiate=False))
        knobs = {name: self.parser.get_parsed_content(name) for name in names}
        return {**template, **knobs, "intensity": intensity, "network_def": network}

    def _training_config(self, inference: dict[str, Any]) -> dict[str, Any]:
        """Make of this run's config one that goes on from the bundle's weights, and renews the bundle."""
        config = {name: value for name, value in deepcopy(self.run.get()).items() if name not in DROPPED}
        defaults = {name: value for name, value in self.defaults.items() if is_knob(name, value)}
        knobs = {n: self.parser.get_parsed_content(n) for n, value in defaults.items() if not is_expression(value)}
        handlers = [handler for handler in config["train"]["handlers"] if handler["_target_"] != "MLFlowHandler"]
        config["train"]["handlers"] = handlers
        config["cases"]["dataset_dir"] = "@dataset_dir"  # no sample stands in for it
        for handler in handlers:
            if handler["_target_"].endswith(f".{type(self).__name__}"):
                handler["template"] = None
        shared = {name: inference[name] for name in ("bundle_root", "device", "network_def")}
        imports = [*dict.fromkeys((*config["imports"], *inference["imports"], "$import time"))]
        names = [name for name, steps in config.items() if steps == config["training"]]
        return {
            "_knobs_": _comments(self.files, defaults),
            **config,
            **knobs,
            **{name: defaults[name] for name in PATHS if name in defaults},
            **shared,
            **dict.fromkeys(names, "%training"),
            "training": config["training"],
            "recipe": CONTINUED,
            "imports": imports,
            "output_dir": "$@bundle_root + '/runs/' + time.strftime('%Y-%m-%d_%H-%M-%S')",
            "pretrained": "$@bundle_root + '/models/model.pt'",
            "resume": False,
            "num_train_cases": None,
            "validate_first": True,  # what comes out is never worse than what was there
            "freeze_epochs": 0,
            "warmup_epochs": 0,
            "learning_rate": knobs.get("encoder_learning_rate", knobs["learning_rate"]),
            "channels": list(self.channels),
            "model": {"_target_": "scripts.weights.fill", "network": "@network_def", "weights": "@pretrained"},
            "initialize": inference["initialize"][:1],
        }

    def _metadata(self, scores: dict[str, float], data: str) -> dict[str, Any]:
        ours = json.loads((self.root / "configs/metadata.json").read_text(encoding="utf-8"))
        origin = {"version": "0.1.0", "changelog": {"0.1.0": f"fine-tuned by {ours['name']} {ours['version']}"}}
        task, modality = self.about["task"], self.parser.get_parsed_content("modality").upper()
        return {
            **{name: ours[name] for name in KEPT},
            **(origin if self.template else {name: ours[name] for name in origin}),
            "supported_apps": {},
            "name": task,
            "task": task,
            "description": f"{task} of {modality} volumes: {', '.join(self.channels)}",
            "authors": "whoever fine-tuned it",
            "copyright": "Code: Apache-2.0. Weights: see docs/data_license.txt",
            "data_source": data,
            "eval_metrics": scores,
            "intended_use": ours["intended_use"],
            "references": ours["references"][:1],
            "network_data_format": self._data_format(modality),
        }

    def _data_format(self, modality: str) -> dict[str, Any]:
        value = self.parser.get_parsed_content
        low, width = (value("intensity", instantiate=False)[name] for name in ("background", "data_range"))
        window = {"spatial_shape": value("img_size"), "dtype": "float32", "is_patch_data": True}
        image = {"type": "image", "format": "magnitude", "modality": modality, "num_channels": value("in_chans")}
        image |= {"value_range": [low, round(low + width, 4)]}
        image |= {"channel_def": {str(channel): "image" for channel in range(value("in_chans"))}}
        pred = {"type": self.about["type"], "format": self.about["format"], "num_channels": len(self.channels)}
        pred |= {"value_range": [], "channel_def": {str(place): name for place, name in enumerate(self.channels)}}
        pred |= window if pred["type"] == "image" else window | {"spatial_shape": [], "is_patch_data": False}
        return {"inputs": {"image": image | window}, "outputs": {"pred": pred}}

    def _model_card(self, scores: dict[str, float], data: str) -> str:
        value = self.parser.get_parsed_content
        spacing = f"resampled to {value('spacing')} mm" if value("spacing") else "at their own spacing"
        rows = "".join(f"| {name.removeprefix('val_')} | {score:.4g} |\n" for name, score in scores.items())
        channels = "".join(f"| {channel} | {name} |\n" for channel, name in enumerate(self.channels))
        return f"""# {self.about["task"]} of {value("modality").upper()} volumes

A MONAI bundle, made by BertsWinMAE. For research, not for clinical use.

| channel | |
|---|---|
{channels}
**Input.** Volumes of {value("in_chans")} channel(s), {spacing}, in windows of {value("img_size")} voxels.

**Data.** {data}; {self.num_cases["validation"]} others for validation. They chose the epoch, so their scores are a
little better than those of new volumes will be. [Licence](data_license.txt).

**Training.** From {f"the weights {Path(self.pretrained).name}" if self.pretrained else "random weights"}, with the \
settings in `configs/train.json`.

| score, epoch {self.validator.state.best_metric_epoch} | |
|---|---|
{rows}
```bash
pip install -r requirements.txt
python -m monai.bundle run inference --config_file configs/inference.json --dataset_dir DIR --output_dir OUT
python -m monai.bundle run training --config_file configs/train.json --dataset_dir LABELLED
```

The first writes what it finds in the volumes of `DIR` to `OUT`. The second learns from further labels, and renews the
weights of this bundle where that is better on its validation volumes.
"""


def finished_folder(ckpt_dir: str | Path) -> Path:
    """Tell where the bundle lies that a fine-tuning leaves."""
    return Path(ckpt_dir).absolute().parent / "bundle"


def predict(ckpt_dir: str | Path) -> None:
    """Run the inference of the bundle that a fine-tuning has left, with the knobs of this run that are not the default.

    Raises:
        Mistake: when there is no such bundle, or it was fine-tuned with another value of a knob that is part of it.
    """
    if "pretrained" in overridden():
        raise Mistake("a prediction takes the weights of the fine-tuning that --ckpt_dir names: leave pretrained out")
    parser, config = caller(ConfigParser), finished_folder(ckpt_dir) / "configs/inference.json"
    if not config.is_file():
        raise Mistake(
            f"there is no {config}: --ckpt_dir must be the checkpoints of a fine-tuning that has ended. One that was "
            "stopped writes it when it ends, after --resume true"
        )
    theirs, defaults, chosen = ConfigParser.load_config_file(config), as_published(parser)[1], overridden()
    given = {
        name: parser.get_parsed_content(name)
        for name in theirs["_knobs_"]
        if name in defaults and name not in ("bundle_root", "pretrained")
        if name in (*chosen, "output_dir") or parser[name] != defaults[name]
    }
    for name in FIXED:
        if given.pop(name, theirs[name]) != theirs[name]:
            raise Mistake(f"{name} is {theirs[name]} in {config}, and cannot be another in a prediction: leave it out")
    workflow = ConfigWorkflow(str(config), workflow_type="infer", run_id="inference", logging_file=False, **given)
    workflow.initialize()
    workflow.run()


def _comments(files: Sequence[str], knobs: Mapping[str, Any]) -> dict[str, str]:
    """Gather what configs say of their knobs."""
    texts = "\n".join(Path(file).read_text(encoding="utf-8") for file in files)
    found = dict(re.findall(r"^(\w+): .*? # (.+)$", texts, re.MULTILINE))
    return {name: found[name] for name in found if name in knobs}


def _plain(value: Any, weights: Path | None = None) -> Any:
    """Turn what a parser has resolved, but not built, into JSON; networks have the stem of their weights."""
    if isinstance(value, ConfigComponent):
        value = value.get_config()
    if isinstance(value, dict):
        if value.get("_target_") == "scripts.weights.build_pretrained":
            value = _plain(value["build"]) | {"strict_stem": stem_is_strict(read_weights(weights), weights)}
            return {name: one for name, one in value.items() if name != "_mode_"}
        return {name: _plain(one, weights) for name, one in value.items()}
    return [_plain(one, weights) for one in value] if isinstance(value, list | tuple) else value


def _write_json(content: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


def _replace(made: Path, folder: Path) -> None:
    """Put a bundle in the place of an earlier one, of which only what it has written itself stays: its runs."""
    if (folder / "runs").exists():
        (folder / "runs").rename(made / "runs")
    if folder.exists():
        folder.rename(made.with_name("replaced"))
    made.rename(folder)


def _trained_further(folder: Path) -> bool:
    """Tell whether a bundle's weights are of a training of its own."""
    return recorded(read_record(folder / "models/model.pt"), "provenance").get("recipe") == CONTINUED


def _renew(made: Path, folder: Path) -> None:
    """Put each file in its place, the weights last."""
    for file in sorted(path for path in made.rglob("*") if path.is_file()):
        file.replace(folder / file.relative_to(made))
