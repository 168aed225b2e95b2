"""What a pre-trained encoder brings to classification and regression: frozen, fine-tuned, and from random weights.

    python -m scripts.experiments.classification --dataset_dir IXI_T1_2mm --pretrained MODEL.pt --output_dir OUT

Each run is a `python -m monai.bundle run` of its own, on one thread, in a folder of `output_dir`. What is there already
is not run again, and what was interrupted goes on, so the command can be stopped and repeated.
"""

import statistics
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from monai.utils import ensure_tuple

from ..data import find_cases, read_targets, split_cases
from ..mistakes import Mistake, command
from ..weights import read_weights, stem_is_strict
from .proof.runs import Run
from .reporting import markdown_table, write_report

__all__ = ["compare_starts", "report_starts"]

# Of each way to start, whether the encoder is pre-trained, the share of the epochs in which it is frozen, and the decay
# of its rates: random weights learn at one rate from the first step.
STARTS = {"frozen": (True, 1.0, 0.75), "fine-tuned": (True, 0.25, 0.75), "random weights": (False, 0.0, 1.0)}
SCORES = {"auroc": "AUROC", "accuracy": "accuracy", "mae": "MAE", "r2": "R²"}


def compare_starts(
    dataset_dir: str,
    pretrained: str,
    output_dir: str = "runs/classification",
    targets: Sequence[str] | str = ("class", "age"),
    seeds: Sequence[int] | int = (0, 1, 2),
    epochs: int = 20,
    overlays: Sequence[str] | str = (),
    knobs: Mapping[str, Any] | None = None,
) -> None:
    """Learn every target from every start with every seed, and write a table and its numbers.

    The last epoch is scored, once, on the validation cases: nothing is chosen by them.

    Args:
        dataset_dir: a datalist, or a folder with one, whose cases have the targets.
        pretrained: an encoder's weights.
        output_dir: for runs and table.
        targets: fields of the datalist.
        seeds: each with initial weights of the head and draws of its own.
        epochs: of a run.
        overlays: config files on top of ``small.yaml``, such as the ``plan.yaml`` of the pre-training.
        knobs: on top of all.

    Raises:
        Mistake: when the cases or weights are not there, or a run fails.
    """
    folder, dataset = Path(output_dir).resolve(), str(Path(dataset_dir).expanduser().resolve())
    folds, weights = find_cases(dataset), Path(pretrained).expanduser().resolve()
    folds = folds if "validation" in folds else split_cases(folds["training"], 0.2)
    if not weights.is_file():
        raise Mistake(f"there are no weights in {weights}: give --pretrained, the model.pt of a pre-training")
    shared = {"dataset_dir": dataset, "strict_stem": stem_is_strict(read_weights(weights), weights)}
    shared |= {"max_epochs": epochs, "val_interval": epochs, "early_stop_patience": epochs} | dict(knobs or {})
    files = tuple(str(Path(path).resolve()) for path in ensure_tuple(overlays))
    runs = {}
    for target, seed, start in product(ensure_tuple(targets), ensure_tuple(seeds), STARTS):
        is_pretrained, frozen, decay = STARTS[start]
        settings = {"pretrained": str(weights) if is_pretrained else None, "freeze_epochs": round(frozen * epochs)}
        settings |= {"target": target, "seed": seed, "lr_decay": decay}
        place = folder / target / f"{start.replace(' ', '_')}_{seed}"
        runs[target, start, seed] = Run(place, "classification", shared | settings, files)
    for run in runs.values():
        run.execute(threads=1)
    scores = {key: run.metrics()[-1] for key, run in runs.items()}
    report_starts(folder, scores, {target: _guess(folds, target) for target in ensure_tuple(targets)})


def _guess(folds: Mapping[str, Any], target: str) -> dict[str, float]:
    """Score what does not look at the volume: the most frequent class, or the mean, of the training cases."""
    found = read_targets(folds, target)
    true = [found.values[case["case"]] for case in found.validation]
    if not found.classes:
        return {"mae": statistics.fmean(abs(value - found.mean) for value in true), "cases": len(true)}
    return {"auroc": 0.5, "accuracy": true.count(statistics.mode(found.groups)) / len(true), "cases": len(true)}


def report_starts(
    folder: Path, scores: Mapping[tuple[str, str, int], Mapping[str, Any]], guesses: Mapping[str, Mapping[str, float]]
) -> None:
    """Write ``classification.md`` and ``classification.json``.

    Args:
        folder: for both.
        scores: the last line of ``metrics.jsonl``, by target, start and seed.
        guesses: scores of a guess, and the number of validation ``cases``, by target.
    """
    rows = []
    for target, guess in guesses.items():
        head = f"{target}, {guess['cases']} cases | a guess"
        rows.append(" | ".join([head, *(_shown([guess.get(name)]) for name in SCORES)]))
        for start in STARTS:
            found = [record for (one, other, _), record in scores.items() if (one, other) == (target, start)]
            cells = (_shown([record.get(f"val_{name}") for record in found]) for name in SCORES)
            rows.append(" | ".join([f"| {start}", *cells]))
    report = {"scores": [[*key, dict(record)] for key, record in scores.items()], "guesses": dict(guesses)}
    lines = markdown_table(f"target | encoder | {' | '.join(SCORES.values())}", rows)
    write_report(folder, "classification", report, lines)


def _shown(values: Sequence[float | None]) -> str:
    """Show the mean over seeds, and their standard deviation; nothing where a score is not of that target."""
    if None in values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


if __name__ == "__main__":
    command(compare_starts)
