"""What a draw of the recipe costs one core, stage by stage, and how long a GPU would wait for several."""

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.utils import ensure_tuple
from torch.utils.data import default_collate

from ...data import Draw, DrawnDataset
from ..reporting import markdown_table, write_report
from .networks import machine
from .training import CONFIGS

__all__ = ["draws"]

COPY = "crop, copied into a batch"  # all that a worker does where the device augments


def draws(
    img_sizes: Sequence[int] | int = (64, 96, 224),
    step_seconds: float = 0.1,
    cores: Sequence[int] | int = (1, 4, 16),
    device: str = "cpu",
    repeats: int = 5,
    output_dir: str = "runs/benchmark",
) -> None:
    """Measure what ``train.yaml`` does with a cached CT at every draw, all of it drawn, on one core.

    Args:
        img_sizes: sides of the crops, in voxels.
        step_seconds: that a GPU takes for one volume, to tell how long it would wait.
        cores: that load, one process each.
        device: where all but the crop is done, for comparison: such as ``cuda``.
        repeats: draws, of whose times the median is taken.
        output_dir: for ``draws.json`` and ``draws.md``.
    """
    torch.set_num_threads(1)  # as in a process that loads
    report: dict[str, Any] = {"machine": machine(device), "step_seconds": step_seconds, "rows": []}
    for side in ensure_tuple(img_sizes):
        report["rows"].append({"img_size": side, "device": False, "seconds": _measure(side, False, "cpu", repeats)})
        report["rows"].append({"img_size": side, "device": True, "seconds": _measure(side, True, device, repeats)})
    stages, waiting = [], []
    for row in report["rows"]:
        place = f"{row['img_size']}³, {'on the device' if row['device'] else 'by the workers'}"
        own = row["seconds"] if not row["device"] else {COPY: row["seconds"][COPY]}
        stages += [f"{place} | {name} | {1000 * seconds:.1f} ms" for name, seconds in row["seconds"].items()]
        worker = row["worker_seconds"] = sum(own.values())
        stages.append(f"{place} | **all that a worker does** | **{1000 * worker:.1f} ms**")
        for count in ensure_tuple(cores):
            rate = count / worker
            share = max(0.0, 1 - rate * step_seconds)
            waiting.append(f"{place} | {count} | {rate:.1f} | {share:.0%}")
    lines = [
        f"Each stage of a draw, on one core of {machine('cpu')['device']}; device: {report['machine']['device']}:\n",
        *markdown_table("crop | stage | time", stages),
        f"\nWhat so many cores load, and how much of its time a GPU waits that takes {step_seconds} s a volume:\n",
        *markdown_table("crop | cores | volumes/s | waiting", waiting),
    ]
    write_report(Path(output_dir), "draws", report, lines)


def _measure(side: int, on_device: bool, device: str, repeats: int) -> dict[str, float]:
    """Seconds of each stage."""
    with tempfile.TemporaryDirectory() as folder:
        parser = _parser(side, on_device, device, Path(folder))
        dataset = parser.get_parsed_content("train::dataloader::dataset")
        dataset.augmentation, augmentation = None, parser.get_parsed_content("train::augmentation")
        found: dict[str, list[float]] = {}
        for seed in range(repeats + 1):
            batch = _timed(COPY, partial(_load, dataset, Draw(0, seed)), found, device)
            batch = {key: value.to(device) for key, value in batch.items() if torch.is_tensor(value) and key != "seed"}
            for transform in augmentation.transforms:
                name, step = type(transform).__name__, type(augmentation)([transform])
                batch = _timed(name, partial(step.on_batch, batch, [seed]), found, device)
        return {name: median(times[1:]) for name, times in found.items()}  # the first one warms up


def _load(dataset: DrawnDataset, draw: Draw) -> dict[str, Any]:
    return default_collate([dataset[draw]])


def _timed(name: str, work: Callable[[], Any], found: dict[str, list[float]], device: str) -> Any:
    on_gpu = torch.device(device).type == "cuda"
    # On a CPU the time that this thread had a core: other programs do not count.
    clock = time.perf_counter if on_gpu else time.thread_time
    start = clock()
    result = work()
    if on_gpu:
        torch.cuda.synchronize(device)
    found.setdefault(name, []).append(clock() - start)
    return result


def _parser(side: int, on_device: bool, device: str, folder: Path) -> ConfigParser:
    """Build the data part of ``train.yaml`` on two simulated CTs, a little larger than a crop; all of it is drawn."""
    generator = np.random.default_rng(0)
    for number in range(2):
        voxels = generator.normal(40, 300, (side + side // 4,) * 3).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), folder / f"{number}.nii")
    knobs = {"dataset_dir": str(folder), "output_dir": str(folder / "out"), "modality": "ct", "spacing": None}
    knobs |= {"img_size": [side] * 3, "num_workers": 0, "cache": "memory", "batch_size": 1, "device": device}
    knobs |= {"augment_on_device": on_device, "hu_warp_prob": 1.0, "ct_noise_prob": 1.0}
    parser = ConfigParser(ConfigParser.load_config_file(CONFIGS / "train.yaml") | knobs)
    parser["bundle_root"] = str(CONFIGS.parent)
    return parser
