"""Federated pre-training, simulated on one machine: all sites together, one of them alone, and all data in one place.

    python -m scripts.experiments.federated --dataset_dir Task04_Hippocampus --output_dir runs/federated

All three start from the same weights, take as many steps as a site does, and are scored on the same volumes.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from monai.fl.utils.constants import FlStatistics
from monai.fl.utils.exchange_object import ExchangeObject

from ..data import find_cases, split_cases
from ..mistakes import Mistake, command
from ..weights import bundle_root, save
from ..workflows import average_updates, federated_site
from .reporting import figure, markdown_table, write_report

__all__ = ["compare", "simulate"]

METRIC = "val_unexplained"


def compare(
    dataset_dir: str,
    output_dir: str,
    sites: int = 2,
    rounds: int = 5,
    num_volumes: int = 16,
    num_validation: int = 16,
    configs: Sequence[str] = ("train.yaml", "small.yaml"),
    **knobs: Any,
) -> dict[str, list[float]]:
    """Pre-train in the three ways; write ``federated.json``, ``.md`` and ``.png``.

    Args:
        dataset_dir: volumes, to be dealt out.
        output_dir: a folder for each way and site; what is there of an earlier comparison is replaced.
        sites: that train together.
        rounds: of an epoch each.
        num_volumes: that each site trains on.
        num_validation: volumes that all are scored on.
        configs: of the bundle.
        knobs: of the training.

    Returns:
        The unexplained variance of hidden voxels by way, before the first round and after each.
    """
    folder = Path(output_dir)
    cases = [case for fold in find_cases(dataset_dir, skip_invalid=True).values() for case in fold]
    folds = split_cases(cases, 0.2)
    training, validation = folds["training"], folds["validation"][:num_validation]
    if len(training) < sites * num_volumes:
        raise Mistake(f"{sites} sites of {num_volumes} volumes need more than the {len(training)} to train on")
    dealt = [training[site * num_volumes : (site + 1) * num_volumes] for site in range(sites)]
    ways = {
        f"{sites} sites, federated": dealt,
        "one site alone": dealt[:1],
        "all data in one place": [[case for cases in dealt for case in cases]],
    }
    curves = {}
    for way, parts in ways.items():
        place = folder / way.replace(",", "").replace(" ", "_")
        shutil.rmtree(place, ignore_errors=True)
        datalists = [_write_datalist(place / f"site_{n}.json", part, validation) for n, part in enumerate(parts)]
        curves[way] = simulate(datalists, place, rounds, configs, **knobs)
    about = f"{sites} sites of {num_volumes} volumes, {rounds} rounds, scored on {len(validation)} volumes"
    _report(folder, curves, about)
    return curves


def simulate(datalists: Sequence[Path], folder: Path, rounds: int, configs: Sequence[str], **knobs: Any) -> list[float]:
    """Train sites together, one after the other in this process; write the weights of the last round.

    Returns:
        The score of the common weights before the first round and after each, on the first site's validation volumes.
    """
    files = [str(bundle_root() / "configs" / config) for config in configs]
    clients = [
        federated_site(files, rounds, name=path.stem, **{"dataset_dir": str(path), "seed": n, **knobs},
                       output_dir=str(folder / path.stem))
        for n, path in enumerate(datalists)
    ]  # fmt: skip
    weights = {name: value.clone() for name, value in clients[0].trainer.network.state_dict().items()}
    scores = [clients[0].evaluate(ExchangeObject(weights=weights)).metrics[METRIC]]
    for _ in range(rounds):
        updates, steps = [], []
        for client in clients:
            client.train(ExchangeObject(weights=weights))
            update = client.get_weights()
            updates.append(update.weights)
            steps.append(update.statistics[FlStatistics.NUM_EXECUTED_ITERATIONS])
        weights = average_updates(weights, updates, steps)
        scores.append(clients[0].evaluate(ExchangeObject(weights=weights)).metrics[METRIC])
    save(weights, folder / "model.pt")
    return scores


def _write_datalist(path: Path, training: Sequence[dict], validation: Sequence[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    folds = {"training": training, "validation": validation}
    path.write_text(
        json.dumps({fold: [{"image": str(case["image"])} for case in cases] for fold, cases in folds.items()})
    )
    return path


def _report(folder: Path, curves: dict[str, list[float]], about: str) -> None:
    head = "round | " + " | ".join(curves)
    rows = [
        f"{n} | " + " | ".join(f"{score:.3f}" for score in scores)
        for n, scores in enumerate(zip(*curves.values(), strict=True))
    ]
    write_report(folder, "federated", {"about": about, "curves": curves}, [f"{about}.\n", *markdown_table(head, rows)])
    with figure(folder / "federated.png", figsize=(6, 3.6)) as (_, axes):
        for way, scores in curves.items():
            axes.plot(range(1, len(scores)), scores[1:], label=way)
        axes.set(xlabel="round", ylabel="unexplained variance of hidden voxels", ylim=(0, None))
        axes.legend()


if __name__ == "__main__":
    torch.set_num_threads(1)
    command(compare)
