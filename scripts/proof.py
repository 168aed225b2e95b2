"""Experiments that show what pre-training brings, one command each: tables, figures and every run that they rest on.

    python -m scripts.proof convergence --dataset_dir Task04_Hippocampus --output_dir runs/proof
    python -m scripts.proof segmentation --dataset_dir Task04_Hippocampus --output_dir runs/proof
    python -m scripts.proof tuning --dataset_dir Task04_Hippocampus --output_dir runs/proof
    python -m scripts.proof probing --dataset_dir Task04_Hippocampus --output_dir runs/proof
    python -m scripts.proof weights --dataset_dir Task04_Hippocampus --output_dir runs/proof

Each run is a `python -m monai.bundle run` of its own, in a folder of `output_dir`. What is there already is not run
again, and what was interrupted goes on, so a command can be stopped and repeated. All use `small.yaml`: MR volumes, and
where there are labels, two of them, for at least 20 of four fifths of the training cases.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fire
import torch

from . import checkpoints
from .benchmark import time_training
from .bertswin_mae import bertswin_mae_small_patch8_48x64x48
from .data import case_seed, find_cases, split_cases
from .proof_report import report_convergence, report_probes, report_scores

__all__ = ["Run", "convergence", "execute", "probing", "segmentation", "tuning", "weights"]

ROOT = Path(__file__).resolve().parent.parent
RATES = (0.00015, 0.0005, 0.0015, 0.0045)  # the grid for pre-training
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
ONE_IN = {"bertswin_tenth": 10, "bertswin_fifth": 5}
# These take the rate that is chosen for those.
RATE_OF = {"bertswin_strict": "bertswin", "bertswin_fifth": "bertswin_tenth"}
TUNED_EPOCHS = (
    24  # of pre-training: they take longer than the twelve of stem tuning, which come to about as many seconds
)
# What is fine-tuned, all by the same steps from the same grid of rates, and scored at the end alone.
FINETUNING = {"feature_size": 8, "batch_size": 1, "iterations_per_epoch": 20, "val_interval": 1000}
FINETUNING_RATES = (0.003, 0.01, 0.03)
SEGMENTATIONS: dict[str, tuple[str, ...]] = {
    "bertswin_strict": (),
    "random": (),
    "vit_mae": ("peers/vit_segmentation.yaml",),
    "unetr": ("peers/unetr.yaml",),
    "unet": ("peers/unet.yaml",),
}
# Epochs in which the encoder is frozen; then it follows at a tenth of the decoder's rate. With 0 all learns from the
# start, at one rate. Random weights have the choice.
FREEZES: dict[str, tuple[int, ...]] = {
    "bertswin_strict": (4,),
    "random": (0, 4),
    "vit_mae": (4,),
    "unetr": (0,),
    "unet": (0,),
}


@dataclass(frozen=True)
class Run:
    """One run of a workflow.

    Args:
        folder: its ``output_dir``.
        workflow: such as ``training``.
        configs: file names below ``configs``.
        knobs: over those of the configs.
    """

    folder: Path
    workflow: str
    configs: tuple[str, ...]
    knobs: dict[str, Any] = field(default_factory=dict)

    @property
    def record(self) -> Path:
        """The file that says with which knobs it was started, and whether it is complete."""
        return self.folder / "run.json"

    def metrics(self) -> list[dict[str, Any]]:
        """Read the lines of ``metrics.jsonl``."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def last_weights(self) -> Path:
        """Write the network of the last epoch, flat, to ``last.pt``; that in ``model.pt`` is chosen by validation.

        Raises:
            ValueError: when there is no whole checkpoint.
        """
        path = self.folder / "last.pt"
        if not path.exists():
            checkpoints.save(checkpoints.load(self.folder / "checkpoints" / "training_state.pt")["network"], path)
        return path

    def _epochs_done(self) -> int:
        return self.metrics()[-1]["epoch"] if (self.folder / "metrics.jsonl").exists() else 0

    def execute(self, threads: int) -> None:
        """Run it, unless it is complete.

        Raises:
            ValueError: when it fails, with the end of its log; was stopped; or is there with other knobs.
        """
        settings = {"workflow": self.workflow, "configs": list(self.configs), "knobs": self.knobs}
        if self.record.exists():
            found = json.loads(self.record.read_text())
            if any(found[key] != value for key, value in settings.items()):
                raise ValueError(f"{self.folder} holds a run with other knobs, see {self.record}: remove it")
            if found["complete"]:
                return
        self.folder.mkdir(parents=True, exist_ok=True)
        settings |= {"code_version": _code_version()}
        self.record.write_text(json.dumps(settings | {"complete": False}, indent=1) + "\n")
        files = str([str(ROOT / "configs" / name) for name in self.configs])
        command = [sys.executable, "-m", "monai.bundle", "run", self.workflow, "--config_file", files]
        for name, value in (self.knobs | {"output_dir": str(self.folder)}).items():
            command += [f"--{name}", json.dumps(value) if isinstance(value, list | bool) else str(value)]
        if (self.folder / "checkpoints").exists():
            command += ["--resume", "true"]
        log = self.folder / "log.txt"
        with log.open("a") as lines:
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            ended = subprocess.run(command, cwd=ROOT, env=environment, stdout=lines, stderr=lines, check=False)  # noqa: S603
        if ended.returncode:
            raise ValueError(f"{' '.join(command)}\nended with {ended.returncode}:\n{log.read_text()[-2000:]}")
        if "max_epochs" in self.knobs and self._epochs_done() < self.knobs["max_epochs"]:  # SIGTERM ends a run with 0
            raise ValueError(f"{self.folder} was stopped before its end: the same command continues it")
        self.record.write_text(json.dumps(settings | {"complete": True}, indent=1) + "\n")


def execute(runs: Sequence[Run], jobs: int) -> None:
    """Do the runs that are not complete, some at a time, each with its share of the cores.

    Raises:
        ValueError: of the first run that fails; no other is started then.
    """
    if jobs < 1:
        raise ValueError(f"jobs {jobs} must be at least 1")
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        started = [pool.submit(run.execute, threads) for run in runs]
        try:
            for run in as_completed(started):
                run.result()
        except BaseException:  # also when the user stops it
            pool.shutdown(cancel_futures=True)
            raise


def convergence(
    dataset_dir: str, output_dir: str = "runs/proof", epochs: int = 200, selection_epochs: int = 50, jobs: int = 2
) -> None:
    """Pre-train BertsWin and MONAI's ViT-MAE on the same volumes with the same masks, draws, loss and schedule.

    The learning rate of each is that which predicts a fifth of the *training* volumes best, after a shorter training on
    the other four fifths. (The strict stem takes that of the default one.)
    Validation volumes are those of the curves alone. The ViT-MAE is given as many epochs as it does in the time that
    BertsWin takes, its stem tuning included. That is measured with nothing beside, the networks taking turns.
    Two more BertsWins, both with strict stems, have schedules of a tenth and of a fifth of the ViT-MAE's epochs, and
    four times the steps an epoch. Their rate is chosen after a tenth.

    Args:
        dataset_dir: as for training.
        output_dir: for the runs, ``convergence.json``, ``convergence.md`` and the figure.
        epochs: of BertsWin.
        selection_epochs: of those that choose the rate.
        jobs: runs at a time.
    """
    folder = Path(output_dir).resolve()
    scores = _selection(dataset_dir, folder, epochs, selection_epochs, jobs)
    seconds = _seconds_per_epoch(dataset_dir, folder)
    runs = _pretrainings(dataset_dir, folder, epochs, scores, seconds)
    execute(list(runs.values()), jobs)
    curves = {name: run.metrics() for name, run in runs.items()}
    rates = {name: run.knobs["learning_rate"] for name, run in runs.items()}
    report_convergence(folder, curves, rates, seconds, scores)


def segmentation(
    dataset_dir: str,
    output_dir: str = "runs/proof",
    num_labelled: Sequence[int | None] | int = (5, 20, None),
    seeds: Sequence[int] | int = (0, 1, 2),
    epochs: int = 200,
    selection_epochs: int = 50,
    finetuning_epochs: int = 20,
    jobs: int = 2,
) -> None:
    """Fine-tune to segment, with few labels and with many: pre-trained encoders and networks from scratch.

    All learn from the same cases by the same number of steps, each at the rate of a grid that does best on a fifth of
    the *training* cases after learning from 20 of the others. Pre-trained encoders are frozen at first and then learn
    at a tenth of the decoder's rate; with random weights that is one candidate, to learn as a whole another. The last
    epoch is scored, on the validation cases, and the encoders are those of the last epoch of their pre-training:
    nothing is chosen by the validation cases.

    Args:
        dataset_dir: a Decathlon folder or a datalist, with labels.
        output_dir: as of :func:`convergence`, whose pre-trainings are taken from there, or done first.
        num_labelled: training cases with labels; None: all.
        seeds: each with a choice of cases, initial weights and draws of its own.
        epochs: of the pre-trainings.
        selection_epochs: of those that chose their rates.
        finetuning_epochs: of the fine-tunings.
        jobs: runs at a time.
    """
    num_labelled, seeds = (_sequence(values) for values in (num_labelled, seeds))
    folder = Path(output_dir).resolve()
    encoders = _encoders(dataset_dir, folder, epochs, selection_epochs, jobs)
    length = {"max_epochs": finetuning_epochs}
    found = _finetuning_selection(SEGMENTATIONS, dataset_dir, folder, encoders, length, jobs)
    runs = {
        (name, most, seed): _finetuning(
            folder / "segmentation" / f"{name}_{most or 'all'}_{seed}",
            name,
            *_best(found, name),
            encoders,
            length | {"dataset_dir": dataset_dir, "num_train_cases": most, "seed": seed},
        )
        for seed in seeds
        for most in num_labelled
        for name in SEGMENTATIONS
    }
    report_scores(folder, "segmentation", _last_metrics(runs, jobs), list(SEGMENTATIONS), num_labelled, seeds, found)


def tuning(
    dataset_dir: str,
    output_dir: str = "runs/proof",
    num_labelled: Sequence[int | None] | int = (5, 20, None),
    seeds: Sequence[int] | int = (0, 1, 2),
    epochs: int = 200,
    selection_epochs: int = 50,
    finetuning_epochs: int = 20,
    jobs: int = 2,
) -> None:
    """Segment with a frozen encoder: in patch mode, on whole volumes untuned and tuned, and with random weights.

    The decoder's rate is that which :func:`segmentation` chooses for the tuned encoder, which is thawed there.
    Patch mode is the pre-trained strict stem with ``blockwise_norm``: the same function of a whole volume.

    Args:
        dataset_dir: a Decathlon folder or a datalist, with labels.
        output_dir: as of :func:`convergence`.
        num_labelled: training cases with labels; None: all.
        seeds: see :func:`segmentation`.
        epochs: of the pre-trainings.
        selection_epochs: of those that chose their rates.
        finetuning_epochs: of the decoders.
        jobs: runs at a time.
    """
    num_labelled, seeds = (_sequence(values) for values in (num_labelled, seeds))
    folder = Path(output_dir).resolve()
    encoders = _encoders(dataset_dir, folder, epochs, selection_epochs, jobs)
    states: dict[str, tuple[str, dict[str, Any]]] = {
        "patch mode": ("bertswin_strict", {"pretrained": str(encoders["untuned"]), "blockwise_norm": True}),
        "volumetric, untuned": ("bertswin_strict", {"pretrained": str(encoders["untuned"])}),
        "volumetric, tuned": ("bertswin_strict", {}),
        "random weights": ("random", {}),
    }
    length = {"max_epochs": finetuning_epochs}
    found = _finetuning_selection(["bertswin_strict"], dataset_dir, folder, encoders, length, jobs)
    frozen = length | {"freeze_epochs": finetuning_epochs, "dataset_dir": dataset_dir}
    runs = {
        (name, most, seed): _finetuning(
            folder / "tuning" / f"{name.replace(', ', '_').replace(' ', '_')}_{most or 'all'}_{seed}",
            contestant,
            *_best(found, "bertswin_strict"),
            encoders,
            knobs | frozen | {"num_train_cases": most, "seed": seed},
        )
        for seed in seeds
        for most in num_labelled
        for name, (contestant, knobs) in states.items()
    }
    report_scores(folder, "tuning", _last_metrics(runs, jobs), list(states), num_labelled, seeds)


def probing(
    dataset_dir: str,
    output_dir: str = "runs/proof",
    num_labelled: Sequence[int | None] | int = (5, 20, None),
    seeds: Sequence[int] | int = (0, 1, 2),
    epochs: int = 200,
    selection_epochs: int = 50,
    jobs: int = 2,
) -> None:
    """Read the labels off frozen features, of each patch and of each volume's embedding.

    Args:
        dataset_dir: a Decathlon folder or a datalist, with labels.
        output_dir: as of :func:`convergence`.
        num_labelled: training cases with labels; None: all.
        seeds: each with a choice of cases, and random weights of its own.
        epochs: of the pre-trainings.
        selection_epochs: of those that chose their rates.
        jobs: runs at a time.
    """
    num_labelled, seeds = (_sequence(values) for values in (num_labelled, seeds))
    folder = Path(output_dir).resolve()
    encoders = _encoders(dataset_dir, folder, epochs, selection_epochs, jobs)
    contestants = ("bertswin_strict", "random", "vit_mae")
    runs = {}
    for seed in seeds:
        encoders["random"] = folder / "probing" / f"random_{seed}.pt"
        encoders["random"].parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(seed)
        checkpoints.save(bertswin_mae_small_patch8_48x64x48(strict_stem=True).state_dict(), encoders["random"])
        for most in num_labelled:
            for name in contestants:
                overlays = ("peers/vit_probe.yaml",) if name == "vit_mae" else ()
                knobs = {"dataset_dir": _absolute(dataset_dir), "pretrained": str(encoders[name])}
                knobs |= {"seed": seed, **({} if most is None else {"num_train_cases": most})}
                place = folder / "probing" / f"{name}_{most or 'all'}_{seed}"
                runs[name, most, seed] = Run(place, "probe", ("probe.yaml", "small.yaml", *overlays), knobs)
    execute(list(runs.values()), jobs)
    found = {key: json.loads((run.folder / "probe.json").read_text()) for key, run in runs.items()}
    report_probes(folder, found, contestants, num_labelled, seeds)


def weights(
    dataset_dir: str,
    output_dir: str = "runs/proof",
    epochs: int = 200,
    selection_epochs: int = 50,
    jobs: int = 2,
) -> None:
    """Put the tuned encoder into ``models/model.pt``, and where it comes from into ``configs/metadata.json``.

    Args:
        dataset_dir: as of :func:`convergence`.
        output_dir: as of :func:`convergence`, whose runs are taken from there, or done first.
        epochs: of the pre-training.
        selection_epochs: of those that chose its rate.
        jobs: runs at a time.
    """
    folder = Path(output_dir).resolve()
    tuned = _encoders(dataset_dir, folder, epochs, selection_epochs, jobs)["bertswin_strict"]
    model = ROOT / "models" / "model.pt"
    checkpoints.save(checkpoints.encoder_part(checkpoints.load(tuned)), model)
    metadata_file = ROOT / "configs" / "metadata.json"
    metadata = json.loads(metadata_file.read_text())
    metadata["weights"] = {"models/model.pt": _provenance(model, dataset_dir, folder / "pretraining")}
    metadata_file.write_text(json.dumps(metadata, indent=4) + "\n")
    print(f"wrote {model} ({model.stat().st_size / 2**20:.1f} MB) and {metadata_file}")


def _provenance(model: Path, dataset_dir: str, pretraining: Path) -> dict[str, Any]:
    folds = _split(dataset_dir)
    names = sorted(case["case"] for case in folds["training"])
    stages = {}
    for title, name, metric, interval in (
        ("pre-training", "bertswin_strict", "val_mse", 10),
        ("stem tuning", "bertswin_strict_tuned", "val_feature_cosine", 1),
    ):
        about = json.loads((pretraining / name / "run.json").read_text())
        records = Run(pretraining / name, about["workflow"], tuple(about["configs"])).metrics()
        stages[title] = {
            "code_version": about["code_version"],
            "configs": about["configs"],
            "knobs": {key: value for key, value in about["knobs"].items() if key not in ("dataset_dir", "pretrained")},
            "seed": about["knobs"].get("seed", 0),
            "iterations": records[-1]["iteration"],
            "curve": {metric: {str(r["epoch"]): round(r[metric], 4) for r in records if r["epoch"] % interval == 0}},
            "last": {
                key: value if key == "epoch" else round(value, 4)
                for key, value in records[-1].items()
                if key == "epoch" or key.startswith("val_")
            },
        }
    return {
        "sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
        "data": f"{len(names)} training volumes of {Path(dataset_dir).name}, no labels",
        "split": {
            "cases": len(names) + len(folds["validation"]),
            "training": len(names),
            "sha256_of_training_cases": hashlib.sha256("\n".join(names).encode()).hexdigest(),
            "how": "scripts.data.split_cases with val_fraction 0.2; the hash is of the sorted names of the training "
            "cases, such as imagesTr/hippocampus_001, joined by newlines",
        },
        "recipe": "plain L2 and AdamW at the rate that predicts a held-out fifth of the training volumes best",
        "epoch": "the last one: no validation volume has chosen anything",
        **stages,
    }


def _code_version() -> str:
    """Name the commit, and say ``-dirty`` behind it where there is more; ``unknown`` outside of a repository."""
    command = ["git", "describe", "--always", "--abbrev=10", "--dirty", "--exclude=*"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    return ended.stdout.strip() or "unknown"


def _split(dataset_dir: str) -> dict[str, list[dict[str, Any]]]:
    """Divide the cases as training does."""
    folds = find_cases(dataset_dir)
    return folds if "validation" in folds else split_cases(folds["training"], 0.2)


def _selection(
    dataset_dir: str, folder: Path, epochs: int, selection_epochs: int, jobs: int
) -> dict[tuple[str, float], float]:
    """Train at every rate on a part of the training volumes, and score on the rest of them."""
    # A short schedule wants a rate of its own. This is about a tenth of the ViT-MAE's, not known yet.
    lengths = {name: max(1, epochs // 9) if name in ONE_IN else selection_epochs for name in PRETRAININGS}
    inner = _training_volumes_alone(dataset_dir, folder / "selection.json")
    candidates = {
        (name, rate): Run(
            folder / "selection" / f"{name}_{rate:g}",
            "training",
            ("train.yaml", "small.yaml", *configs),
            {
                **knobs,
                "dataset_dir": str(inner),
                "max_epochs": lengths[name],
                "val_interval": lengths[name],
                "learning_rate": rate,
            },
        )
        for name, (configs, knobs) in PRETRAININGS.items()
        if name not in RATE_OF
        for rate in RATES
    }
    return {key: last["val_mse"] for key, last in _last_metrics(candidates, jobs).items()}


def _pretrainings(
    dataset_dir: str,
    folder: Path,
    epochs: int,
    scores: Mapping[tuple[str, float], float],
    seconds: Mapping[str, float],
) -> dict[str, Run]:
    chosen = {
        name: min(RATES, key=lambda rate, name=name: scores[RATE_OF.get(name, name), rate]) for name in PRETRAININGS
    }
    return {
        name: Run(
            folder / "pretraining" / name,
            "training",
            ("train.yaml", "small.yaml", *configs),
            {
                **knobs,
                "dataset_dir": _absolute(dataset_dir),
                "max_epochs": (allowed := _allowed_epochs(name, epochs, seconds)),
                "early_stop_patience": allowed,
                "learning_rate": chosen[name],
            },
        )
        for name, (configs, knobs) in PRETRAININGS.items()
    }


def _allowed_epochs(name: str, epochs: int, seconds: Mapping[str, float]) -> int:
    """As many as fit in BertsWin's time; and in that of its stem tuning, for those that are not tuned."""
    if name in ONE_IN:
        return max(1, _allowed_epochs("vit_mae", epochs, seconds) // ONE_IN[name])
    extra = 0 if name.startswith("bertswin") else TUNED_EPOCHS
    return round(max(epochs, (epochs + extra) * seconds["bertswin"] / seconds[name]))


def _encoders(dataset_dir: str, folder: Path, epochs: int, selection_epochs: int, jobs: int) -> dict[str, Path]:
    """Pre-train what is not there yet, the ViT-MAE for as long as BertsWin takes, and tune the stem."""
    scores = _selection(dataset_dir, folder, epochs, selection_epochs, jobs)
    runs = _pretrainings(dataset_dir, folder, epochs, scores, _seconds_per_epoch(dataset_dir, folder))
    execute([runs["bertswin_strict"], runs["vit_mae"]], jobs)
    untuned = runs["bertswin_strict"].last_weights()
    tuned = Run(
        folder / "pretraining" / "bertswin_strict_tuned",
        "tuning",
        ("tune_stem.yaml", "small.yaml"),
        {"dataset_dir": _absolute(dataset_dir), "pretrained": str(untuned)},
    )
    execute([tuned], 1)
    return {"bertswin_strict": tuned.last_weights(), "untuned": untuned, "vit_mae": runs["vit_mae"].last_weights()}


def _finetuning_selection(
    names: Iterable[str],
    dataset_dir: str,
    folder: Path,
    encoders: Mapping[str, Path],
    length: dict[str, Any],
    jobs: int,
) -> dict[tuple[str, int, float], float]:
    """Learn from 20 of the training cases in every way, and score on others of them: Dice by name, freeze and rate."""
    inner = _training_volumes_alone(dataset_dir, folder / "selection.json")
    settings = length | {"dataset_dir": inner, "num_train_cases": 20, "seed": 0}
    candidates = {
        (name, freeze, rate): _finetuning(
            folder / "segmentation_selection" / f"{name}_{freeze}_{rate:g}", name, freeze, rate, encoders, settings
        )
        for name in names
        for freeze in FREEZES[name]
        for rate in FINETUNING_RATES
    }
    return {key: last["val_dice"] for key, last in _last_metrics(candidates, jobs).items()}


def _finetuning(
    folder: Path, name: str, freeze: int, rate: float, encoders: Mapping[str, Path], settings: dict[str, Any]
) -> Run:
    rates = {"learning_rate": rate, "encoder_learning_rate": rate / 10 if freeze else rate, "freeze_epochs": freeze}
    weights = {"pretrained": str(encoders[name])} if name in encoders else {}
    knobs = FINETUNING | rates | weights | settings
    knobs |= {"dataset_dir": _absolute(knobs["dataset_dir"])}
    configs = ("finetune_segmentation.yaml", "small.yaml", *SEGMENTATIONS[name])
    return Run(folder, "finetuning", configs, {key: value for key, value in knobs.items() if value is not None})


def _best(scores: Mapping[tuple[str, int, float], float], name: str) -> tuple[int, float]:
    """Say how long to freeze, and at which rate to learn."""
    return max((score, *key[1:]) for key, score in scores.items() if key[0] == name)[1:]


def _seconds_per_epoch(dataset_dir: str, folder: Path, rounds: int = 3) -> dict[str, float]:
    """Median over rounds, without validation, on all cores, one network after the other; measured once."""
    path, source = folder / "seconds.json", _absolute(dataset_dir)
    known: dict[str, float] = {}
    if path.exists() and (found := json.loads(path.read_text()))["dataset_dir"] == source:
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
            _, waited, stepped = time_training(files, 1, **knobs, dataset_dir=source)
            seconds[name].append((waited.sum() + stepped.sum()).item())
    medians = {name: statistics.median(measured) for name, measured in seconds.items()}
    scale = known.get("bertswin", medians["bertswin"]) / medians["bertswin"]
    known = {name: scale * medians[_first_like(name)] for name in ["bertswin", *missing]} | known
    path.write_text(json.dumps({"dataset_dir": source, "seconds": known}, indent=1) + "\n")
    return known


def _first_like(name: str) -> str:
    """Name the first network with the same settings: an epoch of both takes the same time."""
    return next(other for other, settings in PRETRAININGS.items() if settings == PRETRAININGS[name])


def _last_metrics(runs: Mapping[Any, Run], jobs: int) -> dict[Any, dict[str, Any]]:
    """Do the runs, and read the last validation of each."""
    execute(list(runs.values()), jobs)
    return {key: run.metrics()[-1] for key, run in runs.items()}


def _absolute(path: str | Path) -> str:
    return str(Path(path).expanduser().resolve())


def _sequence(values: Sequence[int | str | None] | int | str | None) -> Sequence[int | None]:
    """Read numbers of labels, or seeds: one or several, ``all`` (or None) for all labels."""
    several = [values] if isinstance(values, int | str | None) else values
    found = [None if value in (None, "all") else value for value in several]
    if any(value is not None and not isinstance(value, int) for value in found):
        raise ValueError(f"{values} should be whole numbers, or all")
    return found


def _training_volumes_alone(dataset_dir: str, path: Path) -> Path:
    """Write a datalist that divides the training volumes once more, as the names' hashes have it."""
    ranked = sorted(_split(dataset_dir)["training"], key=lambda case: case_seed(case["case"], 1))
    held_out = max(1, len(ranked) // 5)
    content = {
        fold: [{key: str(Path(case[key]).resolve()) for key in ("image", "label") if key in case} for case in cases]
        for fold, cases in (("training", ranked[held_out:]), ("validation", ranked[:held_out]))
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1))
    return path


if __name__ == "__main__":
    try:
        fire.Fire({command.__name__: command for command in (convergence, segmentation, tuning, probing, weights)})
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
