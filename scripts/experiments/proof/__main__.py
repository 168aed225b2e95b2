"""Experiments that show what pre-training brings, one command each: tables, figures and every run that they rest on.

    python -m scripts.experiments.proof convergence --dataset_dir Task04_Hippocampus --output_dir runs/proof
    python -m scripts.experiments.proof segmentation --dataset_dir Task04_Hippocampus --output_dir runs/proof
    python -m scripts.experiments.proof tuning --dataset_dir Task04_Hippocampus --output_dir runs/proof
    python -m scripts.experiments.proof probing --dataset_dir Task04_Hippocampus --output_dir runs/proof
    python -m scripts.experiments.proof weights --dataset_dir Task04_Hippocampus --output_dir runs/proof

Each run is a `python -m monai.bundle run` of its own, in a folder of `output_dir`. What is there already is not run
again, and what was interrupted goes on, so a command can be stopped and repeated.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fire
import torch

from ...data.cases import case_seed, find_cases, split_cases
from ...mistakes import Mistake
from ...networks.bertswin_mae import bertswin_mae_small_patch8_48x64x48
from ...weights import checkpoints
from ...weights.pretrained import encoder_part
from ..benchmark.__main__ import time_training
from .report import report_convergence, report_probes, report_scores
from .runs import ROOT, Run, execute, last_metrics

__all__ = ["Proof"]

# What is pre-trained, all of the small size: overlays and knobs.
PRETRAININGS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "bertswin": ((), {}),
    "bertswin_strict": ((), {"strict_stem": True}),
    "vit_mae": (("peers/vit_mae.yaml",), {}),
    # On short schedules. An epoch has the same draws, each of them a step: 22 epochs of that end with a masked MSE of
    # 0.070 on held-out training volumes, of half as many steps with two draws with 0.074.
    "bertswin_tenth": ((), {"strict_stem": True, "batch_size": 1, "iterations_per_epoch": 160}),
    "bertswin_fifth": ((), {"strict_stem": True, "batch_size": 1, "iterations_per_epoch": 160}),
}
# What is trained to the end; the default stem only chooses the strict one's rate.
COMPARED = ("bertswin_strict", "vit_mae", "bertswin_fifth", "bertswin_tenth")
RATES = (0.00015, 0.0005, 0.0015, 0.0045)
# These take the rate that is chosen for those.
RATE_OF = {"bertswin_strict": "bertswin", "bertswin_fifth": "bertswin_tenth"}
ONE_IN = {"bertswin_tenth": 10, "bertswin_fifth": 5}  # of the ViT-MAE's epochs
# Of pre-training: they take longer than the twelve of stem tuning, whose steps cost less than twice as much.
TUNED_EPOCHS = 24
# What is fine-tuned, all by the same steps from the same grid of rates, and scored at the end alone.
SEGMENTATIONS: dict[str, tuple[str, ...]] = {
    "bertswin_strict": (),
    "random": (),
    "vit_mae": ("peers/vit_segmentation.yaml",),
    "unetr": ("peers/unetr.yaml",),
    "unet": ("peers/unet.yaml",),
}
FINETUNING = {"feature_size": 8, "batch_size": 1, "iterations_per_epoch": 20, "val_interval": 1000}
FINETUNING_RATES = (0.003, 0.01, 0.03)
# Epochs in which the encoder is frozen; then it follows at a tenth of the decoder's rate. With 0 all learns from the
# start, at one rate. Random weights have the choice.
FREEZES: dict[str, tuple[int, ...]] = {
    "bertswin_strict": (4,),
    "random": (0, 4),
    "vit_mae": (4,),
    "unetr": (0,),
    "unet": (0,),
}
PROBED = ("bertswin_strict", "random", "vit_mae")


@dataclass
class Proof:
    """The experiments on one dataset; each method is a command.

    All use ``small.yaml``: MR volumes, and where there are labels, two of them.

    Args:
        dataset_dir: a Decathlon folder or a datalist, with labels for all but :meth:`convergence`.
        output_dir: for the runs, and a table, JSON and figure of each experiment.
        num_labelled: training cases with labels, one number or several; ``all`` for all.
        seeds: one or several, each with a choice of labelled cases, initial weights and draws of its own.
        epochs: of BertsWin's pre-training.
        selection_epochs: of those that choose the rates.
        finetuning_epochs: of 20 steps.
        jobs: runs at a time.

    Raises:
        Mistake: when there are no such cases, or numbers are no numbers; of every command, when a run fails.
    """

    dataset_dir: str
    output_dir: str = "runs/proof"
    num_labelled: Sequence[int | str | None] | int | str | None = (5, 20, "all")
    seeds: Sequence[int] | int = (0, 1, 2)
    epochs: int = 200
    selection_epochs: int = 50
    finetuning_epochs: int = 20
    jobs: int = 2

    def __post_init__(self) -> None:
        self.dataset_dir, self.folder = _absolute(self.dataset_dir), Path(_absolute(self.output_dir))
        self.num_labelled, self.seeds = _numbers(self.num_labelled), _numbers(self.seeds)
        if self.jobs < 1:
            raise Mistake(f"jobs {self.jobs} must be at least 1")
        folds = find_cases(self.dataset_dir)
        # As training divides them.
        self.folds = folds if "validation" in folds else split_cases(folds["training"], 0.2)

    def convergence(self) -> None:
        """Pre-train BertsWin and MONAI's ViT-MAE on the same volumes with the same masks, draws, loss and schedule.

        The learning rate of each is that which predicts a fifth of the *training* volumes best, after a shorter
        training on the other four fifths. BertsWin has the strict stem, which takes the rate of the default one.
        Validation volumes are those of the curves alone. The ViT-MAE is given as many epochs as it does in the time
        that BertsWin takes, its stem tuning included. That is measured with nothing beside, the networks taking turns.
        Two more BertsWins have schedules of a tenth and of a fifth of the ViT-MAE's epochs, and four times the steps an
        epoch. Their rate is chosen after a tenth.
        """
        scores = self._selection(name for name in PRETRAININGS if name not in RATE_OF)
        runs = self._pretrainings(COMPARED, scores)
        execute(list(runs.values()), self.jobs)
        curves = {name: run.metrics() for name, run in runs.items()}
        rates = {name: run.knobs["learning_rate"] for name, run in runs.items()}
        report_convergence(self.folder, curves, rates, self._seconds_per_epoch(), scores)

    def segmentation(self) -> None:
        """Fine-tune to segment, with few labels and with many: pre-trained encoders and networks from scratch.

        All learn from the same cases by the same number of steps, each at the rate of a grid that does best on a fifth
        of the *training* cases after learning from 20 of the others; the two best are tried with a second seed.
        Pre-trained encoders are frozen at first and then learn at a tenth of the decoder's rate; with random weights
        that is one candidate, to learn as a whole another. The last epoch is scored, on the validation cases, and the
        encoders are those of the last epoch of their pre-training: nothing is chosen by the validation cases.
        """
        encoders = self._encoders()
        found = self._finetuning_selection(list(SEGMENTATIONS), encoders)
        runs = {
            (name, most, seed): self._finetuning(
                f"segmentation/{name}_{most or 'all'}_{seed}",
                name,
                *_best(found, name),
                encoders,
                {"num_train_cases": most, "seed": seed},
            )
            for seed in self.seeds
            for most in self.num_labelled
            for name in SEGMENTATIONS
        }
        scores = last_metrics(runs, self.jobs)
        report_scores(self.folder, "segmentation", scores, list(SEGMENTATIONS), self.num_labelled, self.seeds, found)

    def tuning(self) -> None:
        """Segment with a frozen encoder: in patch mode, on whole volumes untuned and tuned, and with random weights.

        The decoder's rate is that which :meth:`segmentation` chooses for the tuned encoder, which is thawed there.
        Patch mode is the pre-trained strict stem with ``blockwise_norm``: the same function of a whole volume.
        """
        encoders = self._encoders()
        states: dict[str, tuple[str, dict[str, Any]]] = {
            "patch mode": ("bertswin_strict", {"pretrained": str(encoders["untuned"]), "blockwise_norm": True}),
            "volumetric, untuned": ("bertswin_strict", {"pretrained": str(encoders["untuned"])}),
            "volumetric, tuned": ("bertswin_strict", {}),
            "random weights": ("random", {}),
        }
        found = self._finetuning_selection(["bertswin_strict"], encoders)
        runs = {
            (state, most, seed): self._finetuning(
                f"tuning/{state.replace(', ', '_').replace(' ', '_')}_{most or 'all'}_{seed}",
                name,
                *_best(found, "bertswin_strict"),
                encoders,
                knobs | {"num_train_cases": most, "seed": seed, "freeze_epochs": self.finetuning_epochs},
            )
            for seed in self.seeds
            for most in self.num_labelled
            for state, (name, knobs) in states.items()
        }
        report_scores(self.folder, "tuning", last_metrics(runs, self.jobs), list(states), self.num_labelled, self.seeds)

    def probing(self) -> None:
        """Read the labels off frozen features, of each patch and of each volume's embedding."""
        encoders, runs = self._encoders(), {}
        for seed in self.seeds:
            encoders["random"] = self.folder / "probing" / f"random_{seed}.pt"
            encoders["random"].parent.mkdir(parents=True, exist_ok=True)
            torch.manual_seed(seed)
            checkpoints.save(bertswin_mae_small_patch8_48x64x48(strict_stem=True).state_dict(), encoders["random"])
            for most in self.num_labelled:
                for name in PROBED:
                    runs[name, most, seed] = Run(
                        self.folder / "probing" / f"{name}_{most or 'all'}_{seed}",
                        "probe",
                        ("probe.yaml", "small.yaml", *(["peers/vit_probe.yaml"] if name == "vit_mae" else [])),
                        {
                            "dataset_dir": self.dataset_dir,
                            "pretrained": str(encoders[name]),
                            "num_train_cases": most,
                            "seed": seed,
                        },
                    )
        execute(list(runs.values()), self.jobs)
        found = {key: json.loads((run.folder / "probe.json").read_text()) for key, run in runs.items()}
        report_probes(self.folder, found, PROBED, self.num_labelled, self.seeds)

    def weights(self) -> None:
        """Put the tuned encoder into ``models/model.pt``, and where it comes from into ``configs/metadata.json``."""
        tuned = self._encoders()["bertswin_strict"]
        model = ROOT / "models" / "model.pt"
        checkpoints.save(encoder_part(checkpoints.load(tuned)), model)
        metadata_file = ROOT / "configs" / "metadata.json"
        metadata = json.loads(metadata_file.read_text())
        metadata["weights"] = {"models/model.pt": self._provenance(model)}
        metadata_file.write_text(json.dumps(metadata, indent=4) + "\n")
        print(f"wrote {model} ({model.stat().st_size / 2**20:.1f} MB) and {metadata_file}")

    def _provenance(self, model: Path) -> dict[str, Any]:
        names = sorted(case["case"] for case in self.folds["training"])
        stages = {}
        for title, name, metric, interval in (
            ("pre-training", "bertswin_strict", "val_mse", 10),
            ("stem tuning", "bertswin_strict_tuned", "val_feature_cosine", 1),
        ):
            run = Run(self.folder / "pretraining" / name, "", ())
            about, records = json.loads(run.record.read_text()), run.metrics()
            paths = ("dataset_dir", "pretrained")
            stages[title] = {
                "code_version": about["code_version"],
                "configs": about["configs"],
                "knobs": {key: value for key, value in about["knobs"].items() if key not in paths},
                "seed": about["knobs"].get("seed", 0),
                "iterations": records[-1]["iteration"],
                "curve": {
                    metric: {str(r["epoch"]): round(r[metric], 4) for r in records if r["epoch"] % interval == 0}
                },
                "last": {
                    "epoch": records[-1]["epoch"],
                    **{key: round(value, 4) for key, value in records[-1].items() if key.startswith("val_")},
                },
            }
        return {
            "sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
            "data": f"{len(names)} training volumes of {Path(self.dataset_dir).name}, no labels",
            "split": {
                "cases": len(names) + len(self.folds["validation"]),
                "training": len(names),
                "sha256_of_training_cases": hashlib.sha256("\n".join(names).encode()).hexdigest(),
                "how": "scripts.data.split_cases with val_fraction 0.2; the hash is of the sorted names of the "
                "training cases, such as imagesTr/hippocampus_001, joined by newlines",
            },
            "recipe": "plain L2 and AdamW at the rate that predicts a held-out fifth of the training volumes best",
            "epoch": "the last one: no validation volume has chosen anything",
            **stages,
        }

    def _selection(self, names: Iterable[str]) -> dict[tuple[str, float], float]:
        """Train at every rate on a part of the training volumes, and score on the rest of them."""
        candidates, inner = {}, self._training_volumes_alone()
        for name in names:
            configs, knobs = PRETRAININGS[name]
            # A short schedule wants a rate of its own. This is about a tenth of the ViT-MAE's, not known yet.
            length = max(1, self.epochs // 9) if name in ONE_IN else self.selection_epochs
            settings = {"dataset_dir": inner, "max_epochs": length, "val_interval": length}
            for rate in RATES:
                candidates[name, rate] = Run(
                    self.folder / "selection" / f"{name}_{rate:g}",
                    "training",
                    ("train.yaml", "small.yaml", *configs),
                    knobs | settings | {"learning_rate": rate},
                )
        return {key: last["val_mse"] for key, last in last_metrics(candidates, self.jobs).items()}

    def _pretrainings(self, names: Iterable[str], scores: Mapping[tuple[str, float], float]) -> dict[str, Run]:
        seconds, runs = self._seconds_per_epoch(), {}
        for name in names:
            configs, knobs = PRETRAININGS[name]
            allowed = self._allowed_epochs(name, seconds)
            settings = {
                "dataset_dir": self.dataset_dir,
                "max_epochs": allowed,
                "early_stop_patience": allowed,
                "learning_rate": min(RATES, key=lambda rate, name=name: scores[RATE_OF.get(name, name), rate]),
            }
            place = self.folder / "pretraining" / name
            runs[name] = Run(place, "training", ("train.yaml", "small.yaml", *configs), knobs | settings)
        return runs

    def _allowed_epochs(self, name: str, seconds: Mapping[str, float]) -> int:
        """As many as fit in BertsWin's time; and in that of its stem tuning, for those that are not tuned."""
        if name in ONE_IN:
            return max(1, self._allowed_epochs("vit_mae", seconds) // ONE_IN[name])
        extra = 0 if name.startswith("bertswin") else TUNED_EPOCHS
        return round(max(self.epochs, (self.epochs + extra) * seconds["bertswin"] / seconds[name]))

    def _encoders(self) -> dict[str, Path]:
        """Pre-train what is not there yet, the ViT-MAE for as long as BertsWin takes, and tune the stem."""
        runs = self._pretrainings(["bertswin_strict", "vit_mae"], self._selection(["bertswin", "vit_mae"]))
        execute(list(runs.values()), self.jobs)
        untuned = runs["bertswin_strict"].last_weights()
        tuned = Run(
            self.folder / "pretraining" / "bertswin_strict_tuned",
            "tuning",
            ("tune_stem.yaml", "small.yaml"),
            {"dataset_dir": self.dataset_dir, "pretrained": str(untuned)},
        )
        execute([tuned], 1)
        return {"bertswin_strict": tuned.last_weights(), "untuned": untuned, "vit_mae": runs["vit_mae"].last_weights()}

    def _finetuning_selection(
        self, names: Sequence[str], encoders: Mapping[str, Path]
    ) -> dict[tuple[str, int, float], list[float]]:
        """Learn from 20 training cases in every way, and score on others of them: Dice by name, freeze and rate.

        The two best ways of each go into a second round, with a seed of its own: one alone may have been lucky.
        """
        settings = {"dataset_dir": self._training_volumes_alone(), "num_train_cases": 20}
        ways = [(name, freeze, rate) for name in names for freeze in FREEZES[name] for rate in FINETUNING_RATES]
        found: dict[tuple[str, int, float], list[float]] = {way: [] for way in ways}
        for seed in (0, 1):
            runs = {
                way: self._finetuning(
                    f"segmentation_selection/{way[0]}_{way[1]}_{way[2]:g}_{seed}",
                    *way,
                    encoders,
                    settings | {"seed": seed},
                )
                for way in ways
            }
            for way, last in last_metrics(runs, self.jobs).items():
                found[way].append(last["val_dice"])
            ranked = sorted(found, key=found.__getitem__, reverse=True)
            ways = [way for name in names for way in [way for way in ranked if way[0] == name][:2]]
        return found

    def _finetuning(
        self,
        place: str,
        name: str,
        freeze: int,
        rate: float,
        encoders: Mapping[str, Path],
        settings: dict[str, Any],
    ) -> Run:
        knobs = FINETUNING | {
            "dataset_dir": self.dataset_dir,
            "max_epochs": self.finetuning_epochs,
            "learning_rate": rate,
            "encoder_learning_rate": rate / 10 if freeze else rate,
            "freeze_epochs": freeze,
            "pretrained": str(encoders[name]) if name in encoders else None,
        }
        configs = ("finetune_segmentation.yaml", "small.yaml", *SEGMENTATIONS[name])
        return Run(self.folder / place, "finetuning", configs, knobs | settings)

    def _seconds_per_epoch(self, rounds: int = 3) -> dict[str, float]:
        """Median over rounds, without validation, on all cores, one network after the other; measured once."""
        path = self.folder / "seconds.json"
        known: dict[str, float] = {}
        if path.exists() and (found := json.loads(path.read_text()))["dataset_dir"] == self.dataset_dir:
            known = found["seconds"]
        # What was measured stays, since numbers of epochs follow from it. What is new is measured beside the first.
        missing = [name for name in PRETRAININGS if name not in known]
        if not missing:
            return known
        names = list(dict.fromkeys(["bertswin", *(_first_like(name) for name in missing)]))
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                configs, knobs = PRETRAININGS[name]
                files = [str(ROOT / "configs" / config) for config in ("train.yaml", "small.yaml", *configs)]
                _, waited, stepped = time_training(files, 1, **knobs, dataset_dir=self.dataset_dir)
                seconds[name].append((waited.sum() + stepped.sum()).item())
        medians = {name: statistics.median(measured) for name, measured in seconds.items()}
        scale = known.get("bertswin", medians["bertswin"]) / medians["bertswin"]
        known = {name: scale * medians[_first_like(name)] for name in ["bertswin", *missing]} | known
        self.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"dataset_dir": self.dataset_dir, "seconds": known}, indent=1) + "\n")
        return known

    def _training_volumes_alone(self) -> str:
        """Write a datalist that divides the training volumes once more, as the names' hashes have it."""
        ranked = sorted(self.folds["training"], key=lambda case: case_seed(case["case"], 1))
        held_out = max(1, len(ranked) // 5)
        content = {
            fold: [{key: str(Path(case[key]).resolve()) for key in ("image", "label") if key in case} for case in cases]
            for fold, cases in (("training", ranked[held_out:]), ("validation", ranked[:held_out]))
        }
        path = self.folder / "selection.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1))
        return str(path)


def _best(scores: Mapping[tuple[str, int, float], Sequence[float]], name: str) -> tuple[int, float]:
    """Say how long to freeze, and at which rate to learn: of those that went furthest, the best on average."""
    return max((len(dice), statistics.mean(dice), *way[1:]) for way, dice in scores.items() if way[0] == name)[2:]


def _first_like(name: str) -> str:
    """Name the first network with the same settings: an epoch of both takes the same time."""
    return next(other for other, settings in PRETRAININGS.items() if settings == PRETRAININGS[name])


def _absolute(path: str | Path) -> str:
    return str(Path(path).expanduser().resolve())


def _numbers(values: Sequence[int | str | None] | int | str | None) -> list[int | None]:
    """Read one number or several; ``all`` (or None) becomes None."""
    found = [
        None if value in (None, "all") else value
        for value in ([values] if isinstance(values, int | str | None) else values)
    ]
    if any(value is not None and (not isinstance(value, int) or value < 0) for value in found):
        raise Mistake(f"{values} should be whole numbers, or all")
    return found


if __name__ == "__main__":
    try:
        fire.Fire(Proof)
    except (Mistake, OSError) as error:
        sys.exit(f"error: {error}")
