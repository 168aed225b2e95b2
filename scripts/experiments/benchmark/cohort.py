"""What a large cohort costs: finding, indexing, starting again, an epoch and an inference over all of it."""

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from torch.utils.data import DataLoader, Dataset

from ...data import Index, find_cases
from ...workflows.planning.trial import bundle_command, run_and_measure
from ..reporting import markdown_table, write_report
from .networks import machine
from .training import CONFIGS, TRAINING

__all__ = ["cohort"]

# Small enough that the network does not hide what the cohort costs.
TINY = {"img_size": [32, 32, 32], "patch_size": 8, "encoder_embed_dim": 48, "encoder_depth": 2, "encoder_num_heads": 4}
TINY |= {"swin_window_size": [2, 2, 2], "stem_base_dim": 8}


def cohort(volumes: int = 10_000, num_workers: int = 1, output_dir: str = "runs/benchmark") -> None:
    """Make a cohort of small volumes, and measure what is done with all of it, in seconds and memory.

    Args:
        volumes: how many, of 32³ voxels; those that an earlier run made are taken.
        num_workers: processes that read.
        output_dir: for the volumes, ``cohort.json`` and ``cohort.md``.
    """
    folder = Path(output_dir).absolute()
    scans = folder / "cohort"
    for number in range(volumes):
        _make(scans / f"{number // 500:03d}" / f"{number:06d}.nii.gz", number)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        steps = _steps(scans, Path(place), num_workers)
        rows = [{"step": step, "volumes": volumes} | measure() for step, measure in steps.items()]
    report: dict[str, Any] = {"machine": machine("cpu"), "num_workers": num_workers, "rows": rows}
    cells = [
        f"{row['step']} | {row['seconds']:.1f} s | {volumes / row['seconds']:.0f} | {row['bytes'] / 1e9:.2f} GB"
        for row in rows
    ]
    table = markdown_table(f"{volumes} volumes, {num_workers} workers | time | volumes/s | memory at most", cells)
    write_report(folder, "cohort", report, list(table))


def _make(path: Path, seed: int) -> None:
    if path.exists():
        return
    generator, axes = np.random.default_rng(seed), np.meshgrid(*[np.linspace(-1, 1, 32)] * 3, indexing="ij")
    head = sum(axis**2 for axis in axes) < 0.6
    voxels = np.where(head, generator.normal(600, 20, head.shape) + 100 * axes[0], generator.normal(20, 5, head.shape))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels.astype(np.int16), np.eye(4)), path)


def _steps(scans: Path, place: Path, num_workers: int) -> dict[str, Callable[[], dict[str, float]]]:
    """List what is measured, in its order: each step finds what those before it have left."""
    program = f"import sys; sys.path.insert(0, {str(CONFIGS.parent)!r}); from {__name__} import {{0}}; "
    program += f"{{0}}({str(scans)!r}, {str(place / 'index.jsonl')!r}, {num_workers})"
    shared = {"dataset_dir": scans, "num_workers": num_workers}
    training = {"output_dir": place / "run", "index": place / "index.jsonl", "cache": "disk", "max_epochs": 1}
    training |= TINY | {"decoder_embed_dim": 32, "batch_size": 16, "warmup_epochs": 0, "num_figure_volumes": 0} | shared
    start = training | {"output_dir": place / "start", "iterations_per_epoch": 1, "cache": "none", "val_fraction": 1e-4}
    weights = place / "run" / "checkpoints" / "model.pt"
    inference = {"output_dir": place / "features", "pretrained": weights, "figures": "false"} | shared | TINY
    commands = {
        "merely read": [sys.executable, "-c", program.format("read_all")],
        "index": [sys.executable, "-c", program.format("index_all")],
        "second start, one iteration": bundle_command("training", [*TRAINING], start),
        "an epoch, cache on disk": bundle_command("training", [*TRAINING], training | {"iterations_per_epoch": "null"}),
        "inference": bundle_command("inference", [str(CONFIGS / "inference.json")], inference),
    }
    return {step: partial(_measured, command, place) for step, command in commands.items()}


def _measured(command: list[str], place: Path) -> dict[str, float]:
    start = time.perf_counter()
    output, code, memory, _ = run_and_measure(command, place, "cpu")
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with {code}:\n{output[-2000:]}")
    own = [line for line in output.splitlines() if line.startswith("seconds ")]  # without the imports
    return {"seconds": float(own[0].split()[1]) if own else time.perf_counter() - start, "bytes": memory}


class _Read(Dataset):
    def __init__(self, files: list[str]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: int) -> int:
        return nib.load(self.files[place]).get_fdata(dtype=np.float32).size


def read_all(scans: str, index: str, num_workers: int) -> None:
    """Read every volume and do nothing with it: what an index is compared with."""
    files = [case["image"] for case in find_cases(scans)["training"]]
    start = time.perf_counter()
    ahead = 16 if num_workers else None
    for _ in DataLoader(_Read(files), batch_size=None, num_workers=num_workers, prefetch_factor=ahead):
        pass
    print("seconds", time.perf_counter() - start)


def index_all(scans: str, index: str, num_workers: int) -> None:
    """Read every volume and note what is known of it."""
    cases = find_cases(scans)["training"]
    start = time.perf_counter()
    Index(index, num_workers=num_workers).describe(cases)
    print("seconds", time.perf_counter() - start)
