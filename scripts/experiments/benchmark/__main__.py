"""Measure time and memory beside MONAI's ViT-MAE and beside the same network in plain eager PyTorch.

    python -m scripts.experiments.benchmark networks --network base --img_sizes "[112,224]" --output_dir OUT
    python -m scripts.experiments.benchmark data --dataset_dir DIR --output_dir OUT

The contestants take turns, round after round, so that a noisy machine is as unkind to one as to the other. Both
commands print a table and leave it in `output_dir`, with the figures as JSON and plots.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import multiprocessing
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import fire
import torch
from einops import rearrange
from ignite.handlers import BasicTimeProfiler
from monai.bundle import ConfigWorkflow
from monai.networks.nets.swin_unetr import BasicLayer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ...engines.inferers import AutocastInferer, autocast_dtype
from ...losses import MaskedL2Loss
from ...mistakes import Mistake
from ...networks.bertswin_mae import BertsWinMAE, ConvDecoder
from ...networks.patches import patchify
from ...parallel import shows_progress
from ..peers import ViTMAE
from .report import FEATURES, PATCH_FEATURES, STEP, TITLES, networks_table, plot_ratios, plot_scaling

__all__ = ["Contestant", "data", "networks", "plain_form", "time_training"]

ROOT = Path(__file__).resolve().parents[3]
NETWORKS = {
    "base": {"patch_size": 16, "width": 768, "depth": 12, "heads": 12, "window": 7, "decoder_width": 512},
    "small": {"patch_size": 8, "width": 192, "depth": 6, "heads": 6, "window": 3, "decoder_width": 256},
    "tiny": {"patch_size": 8, "width": 48, "depth": 2, "heads": 4, "window": 2, "decoder_width": 32},
}
LINUX_STATUS = Path("/proc/self/status")
MATRIX_SIDE = 4096  # of the products that the machine's rate is measured with


@dataclass(frozen=True)
class Contestant:
    """A network in one form and precision.

    Args:
        form: ``bertswin``, ``plain`` (see :func:`plain_form`) or ``vit_mae``.
        precision: as for :func:`~bertswin_mae.engines.autocast_dtype`.
        checkpointing: with activation checkpointing.
    """

    form: str
    precision: str
    checkpointing: bool = False

    def __str__(self) -> str:
        """Name it in tables and plots."""
        return f"{TITLES[self.form]}, {self.precision}{', checkpointing' if self.checkpointing else ''}"

    def build(self, network: str, img_size: int) -> nn.Module:
        """Build it for volumes of img_size³ voxels."""
        torch.manual_seed(0)
        size = NETWORKS[network]
        if self.form == "vit_mae":  # its decoder half as wide, which is MONAI's proportion
            return ViTMAE(
                [img_size] * 3, size["patch_size"], 1, size["width"], size["depth"], size["heads"], size["width"] // 2
            )
        model = BertsWinMAE(
            img_size,
            size["patch_size"],
            1,
            size["width"],
            [size["depth"]],
            [size["heads"]],
            size["window"],
            size["decoder_width"],
            activation_checkpointing=self.checkpointing,
        )
        return plain_form(model) if self.form == "plain" else model

    def tasks(self, network: str, model: nn.Module, volume: Tensor) -> dict[str, Callable[[], Any]]:
        """Give the tasks it can do on a batch ``(B, 1, D, H, W)``."""
        infer = AutocastInferer(self.precision, volume.device)
        target = patchify(volume, NETWORKS[network]["patch_size"])

        def step() -> None:
            model.zero_grad(set_to_none=True)
            MaskedL2Loss()(infer(volume, model), target).backward()

        def extract(encode: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
            return torch.no_grad()(lambda: infer(volume, encode))

        if self.form == "vit_mae":
            return {
                STEP: step,
                PATCH_FEATURES: extract(lambda volume: model.blocks(model.patch_embedding(volume))),
            }
        if self.checkpointing:  # which is for training
            return {STEP: step}
        return {STEP: step, PATCH_FEATURES: extract(model.extract_features), FEATURES: extract(model.encoder)}


class PlainDecoder(ConvDecoder):
    """The decoder as convolutions of a volume."""

    def rebuild_patches(self, features: Tensor) -> Tensor:
        """Map features ``(B, C, D/P, H/P, W/P)`` to patches ``(B, N, P³ · out_channels)``."""
        tokens = self.embed(rearrange(features, "b c d h w -> b d h w c"))
        return patchify(self.head(rearrange(tokens, "b d h w c -> b c d h w")), self.patch_size)


def plain_form(model: BertsWinMAE) -> BertsWinMAE:
    """Copy a network, all of its parts replaced by the same arithmetic in plain eager PyTorch.

    This is how the authors' implementation computes: MONAI's Swin layer, which keeps the attention matrices for the way
    back, and convolutions of volumes.

    Args:
        model: left as it is.

    Returns:
        A network with the same weights.
    """
    plain = copy.deepcopy(model)
    encoder, swin = plain.encoder, plain.encoder.swin
    block = swin.blocks[0]
    layer = BasicLayer(
        encoder.embed_dim, len(swin.blocks), block.num_heads, tuple(block.window_size), drop_path=0.0, qkv_bias=True
    )
    weights = swin.state_dict()
    weights |= {name: value for name, value in layer.state_dict().items() if name.endswith("relative_position_index")}
    layer.load_state_dict(weights)
    for stage in encoder.stem.stages:
        conv = stage[0]
        stage[0] = nn.Conv3d(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=False
        )
        stage[0].load_state_dict(conv.state_dict())
    encoder.swin, encoder.stem = layer, nn.Sequential(*encoder.stem.stages, encoder.stem.proj)
    embed, last = model.decoder.embed, model.decoder.head[-1]
    plain.decoder = PlainDecoder(embed.in_features, embed.out_features, model.decoder.patch_size, last.out_channels)
    plain.decoder.load_state_dict(model.decoder.state_dict())
    return plain


def networks(
    network: str = "base",
    img_sizes: Sequence[int] | int = (112, 224),
    batch_sizes: Sequence[int] | int = (1,),
    precision: str = "auto",
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    repeats: int = 5,
    output_dir: str = "runs/benchmark",
) -> None:
    """Measure a training step, both ways of feature extraction and peak memory of all contestants.

    A training step is forward, masked squared error and backward: the optimiser's update is the same for all.

    Args:
        network: ``base``, ``small`` or ``tiny``.
        img_sizes: sides of the volumes, in voxels.
        batch_sizes: volumes at a time.
        precision: what to compare float32 with: ``bf16``, ``fp16``, ``fp32`` (nothing else), or ``auto``.
        device: ``cpu`` or ``cuda``.
        repeats: rounds, after one that is not counted.
        output_dir: for ``networks.json``, ``networks.md`` and the plots.

    Raises:
        Mistake: for a network or a size that is not there.
    """
    if network not in NETWORKS:
        raise Mistake(f"network {network!r} must be one of {tuple(NETWORKS)}")
    low = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "fp32"}[autocast_dtype(precision, device)]
    precisions = ["fp32"] if low == "fp32" else ["fp32", low]
    contestants = [Contestant(form, p) for form, p in product(TITLES, precisions)]
    contestants.insert(len(precisions), Contestant("bertswin", low, checkpointing=True))
    report: dict[str, Any] = {"machine": _machine(device), "network": network, "repeats": repeats, "rows": []}
    for img_size, batch_size in product(_sequence(img_sizes), _sequence(batch_sizes)):
        report["rows"] += _measure(network, img_size, batch_size, contestants, torch.device(device), repeats)
        folder = _write("networks", report, table := networks_table(report["rows"]), output_dir)  # what is there by now
        plot_ratios(report["rows"], folder / "ratios.png")
        plot_scaling(report["rows"], folder / "scaling.png")
    print(f"{table}\n\nwrote {folder}")


def data(
    dataset_dir: str,
    config_file: Sequence[str] = (str(ROOT / "configs/train.yaml"), str(ROOT / "configs/small.yaml")),
    epochs: int = 2,
    output_dir: str = "runs/benchmark",
    **knobs: Any,
) -> None:
    """Measure how long training waits for data, with the cache and without, and where preparation spends its time.

    Args:
        dataset_dir: as for training.
        config_file: what would be trained.
        epochs: to train for, after one that is not counted.
        output_dir: for ``data.json`` and ``data.md``.
        knobs: of the config, over its own.
    """
    device = knobs.get("device", "cuda" if torch.cuda.is_available() else "cpu")
    report: dict[str, Any] = {"machine": _machine(device), "config_file": list(config_file), "rows": []}
    for cache in ("memory", "none"):
        workflow, waited, stepped = time_training(
            config_file, epochs, **({"dataset_dir": dataset_dir, "cache": cache} | knobs)
        )
        report["rows"].append(
            {
                "cache": cache,
                "wait_seconds": waited.mean().item(),
                "step_seconds": stepped.mean().item(),
                "waiting_share": (waited.sum() / (waited.sum() + stepped.sum())).item(),
                "volumes_per_second": workflow.parser.get_parsed_content("batch_size")
                / (waited + stepped).mean().item(),
            }
        )
    report["preparation"] = _time_transforms(workflow)
    lines = [
        "| cache | waiting for data | step | share of waiting | volumes/s |",
        "|---|---|---|---|---|",
        *(
            f"| {row['cache']} | {1000 * row['wait_seconds']:.1f} ms | {1000 * row['step_seconds']:.0f} ms "
            f"| {row['waiting_share']:.1%} | {row['volumes_per_second']:.1f} |"
            for row in report["rows"]
        ),
        "",
        f"Preparing a volume takes {1000 * sum(report['preparation'].values()):.1f} ms in one process, of which:",
        "",
        "| transform | ms |",
        "|---|---|",
        *(f"| {name} | {1000 * seconds:.2f} |" for name, seconds in report["preparation"].items()),
    ]
    folder = _write("data", report, table := "\n".join(lines), output_dir)
    print(f"{table}\n\nwrote {folder}")


def time_training(config_file: Sequence[str], epochs: int, **knobs: Any) -> tuple[ConfigWorkflow, Tensor, Tensor]:
    """Train for some epochs after one that is not counted, and look at the clock.

    Args:
        config_file: of the training.
        epochs: that count.
        knobs: of the config, over its own.

    Returns:
        The workflow, and for each iteration the seconds that it waited for data and those that it worked.
    """
    with tempfile.TemporaryDirectory() as folder:
        overrides = knobs | {"output_dir": folder, "val_interval": epochs + 2, "max_epochs": epochs + 1}
        workflow = ConfigWorkflow(config_file=list(config_file), workflow_type="train", **overrides)
        workflow.initialize()
        trainer = workflow.parser.get_parsed_content("train::trainer")
        profiler = BasicTimeProfiler()
        profiler.attach(trainer)
        workflow.run()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which the workflow took for itself
    kept = slice(trainer.state.epoch_length, None)
    return workflow, profiler.dataflow_times[kept], profiler.processing_times[kept]


def _measure(
    network: str, img_size: int, batch_size: int, contestants: Sequence[Contestant], device: torch.device, repeats: int
) -> list[dict[str, Any]]:
    """Time all contestants on one size of batch, taking turns; a row each and task."""
    volume = torch.rand(batch_size, 1, *[img_size] * 3, generator=torch.Generator().manual_seed(0)).to(device)
    models = {c: c.build(network, img_size).to(device) for c in contestants}
    tasks = {c: c.tasks(network, model, volume) for c, model in models.items()}
    parameters = {c: sum(p.numel() for p in model.parameters()) for c, model in models.items()}
    flops: dict[tuple[str, str], int] = {}
    for form in TITLES:
        counted = Contestant("plain" if form == "bertswin" else form, "fp32")  # the same arithmetic
        for name, task in tasks[counted].items():
            with FlopCounterMode(display=False) as counter, contextlib.suppress(torch.OutOfMemoryError):
                task()
                flops[form, name] = counter.get_total_flops()
    seconds: dict[tuple[Contestant, str], list[float]] = {(c, name): [] for c in contestants for name in tasks[c]}
    rates: dict[str, list[float]] = {c.precision: [] for c in contestants}
    rounds = tqdm(
        range(repeats + 1), desc=f"{img_size}³, batch {batch_size}", leave=False, disable=not shows_progress()
    )
    for number in rounds:
        for precision, measured in rates.items():
            measured.append(_matrix_rate(autocast_dtype(precision, device) or torch.float32, device))
        order = list(seconds)
        # Every round starts with another one, so that none always follows the same neighbour.
        for contestant, name in order[number % len(order) :] + order[: number % len(order)]:
            elapsed = _timed(tasks[contestant][name], device)
            if number:  # the first round warms up
                seconds[contestant, name].append(elapsed)
    del models, tasks, volume
    if device.type == "cuda":
        torch.cuda.empty_cache()  # for the processes that measure memory
    peaks = {c: _peak_memory(c, network, img_size, batch_size, str(device)) for c in contestants}
    reference = Contestant("plain", "fp32")  # which can do all tasks
    rows = []
    for (contestant, name), measured in seconds.items():
        rate, arithmetic = statistics.median(rates[contestant.precision]), flops.get((contestant.form, name))
        against, peak, their_peak = seconds[reference, name], peaks[contestant][name], peaks[reference][name]
        row = {
            "contestant": str(contestant),
            **asdict(contestant),
            "task": name,
            "img_size": img_size,
            "batch_size": batch_size,
            "parameters": parameters[contestant],
            "flops": arithmetic,
            # What does not fit in memory has no time, and no share of anything.
            "seconds": _median(measured),
            "fastest": _finite(min(measured)),
            "slowest": _finite(max(measured)),
            "of_plain_fp32": _median([a / b for a, b in zip(measured, against, strict=True) if math.isfinite(b)]),
            "matrix_flops_per_second": rate,
            "of_matrix_rate": None,
            "peak_bytes": peak,
            "memory_of_plain_fp32": peak / their_peak if peak and their_peak else None,
        }
        if row["seconds"] and arithmetic:
            row["of_matrix_rate"] = arithmetic / row["seconds"] / rate
        rows.append(row)
    return rows


def _median(values: Sequence[float]) -> float | None:
    return _finite(statistics.median(values)) if values else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _timed(task: Callable[[], Any], device: torch.device) -> float:
    """Seconds a task takes; infinity, when the GPU's memory does not hold it."""
    _synchronise(device)
    start = time.perf_counter()
    try:
        task()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return math.inf
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second in the product of two large matrices, the best of three."""
    # Random, since a GPU draws less power, and runs faster, on ones.
    matrix = torch.randn(MATRIX_SIDE, MATRIX_SIDE, dtype=dtype, device=device)
    return 2 * MATRIX_SIDE**3 / min(_timed(lambda: matrix @ matrix, device) for _ in range(3))


def _peak_memory(
    contestant: Contestant, network: str, img_size: int, batch_size: int, device: str
) -> dict[str, int | None]:
    """Measure what each task needs, in bytes, over what a process of its own held before it built the network.

    On the CPU the process gives freed memory back at once, so that its size is what is in use, as it is counted on a
    GPU. Left to itself, the C library keeps some for later.
    """
    with (
        mock.patch.dict(os.environ, {"MALLOC_MMAP_THRESHOLD_": str(2**20)}),
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,  # which notices when it is killed
    ):
        return pool.submit(_peak_memory_here, contestant, network, img_size, batch_size, device).result()


def _peak_memory_here(
    contestant: Contestant, network: str, img_size: int, batch_size: int, device: str
) -> dict[str, int | None]:
    on_cpu = device == "cpu"
    before = _resident("VmRSS") if on_cpu else 0
    volume = torch.rand(batch_size, 1, *[img_size] * 3).to(device)
    tasks = contestant.tasks(network, contestant.build(network, img_size).to(device), volume)
    peaks: dict[str, int | None] = {}
    for name in reversed(tasks):  # the training step, which leaves gradients behind, last
        _forget_peak(device)
        try:
            for _ in range(2 if name == STEP else 1):  # as in training, with the gradients of the step before
                tasks[name]()
        except torch.OutOfMemoryError:
            peaks[name] = None
            continue
        peak = _resident("VmHWM") if on_cpu else torch.cuda.max_memory_allocated(device)
        peaks[name] = None if peak is None or before is None else peak - before
    return peaks


def _forget_peak(device: str) -> None:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
    elif LINUX_STATUS.exists():
        LINUX_STATUS.with_name("clear_refs").write_text("5")


def _resident(field: str) -> int | None:
    """Memory of this process as Linux counts it, in bytes; None elsewhere."""
    if not LINUX_STATUS.exists():
        return None
    line = next(line for line in LINUX_STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _time_transforms(workflow: ConfigWorkflow, volumes: int = 16) -> dict[str, float]:
    """Seconds each transform takes on a volume, the mean of several."""
    pipeline = workflow.parser.get_parsed_content("train::preprocessing")
    cases = workflow.parser.get_parsed_content("cases")["training"][:volumes]
    seconds: dict[str, float] = {}
    for case in cases:
        item: Any = dict(case)
        for transform in pipeline.transforms:
            start = time.perf_counter()
            item = transform(item)
            name = type(transform).__name__
            seconds[name] = seconds.get(name, 0.0) + (time.perf_counter() - start) / len(cases)
    return dict(sorted(seconds.items(), key=lambda entry: -entry[1]))


def _write(name: str, report: dict[str, Any], table: str, output_dir: str) -> Path:
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1))
    (folder / f"{name}.md").write_text(table + "\n")
    return folder


def _machine(device: str) -> dict[str, Any]:
    on_gpu = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "float32_products": torch.get_float32_matmul_precision(),  # "highest": no TF32
    }


def _sequence(values: Sequence[int] | int) -> Sequence[int]:
    return [values] if isinstance(values, int) else values


if __name__ == "__main__":
    try:
        fire.Fire({"networks": networks, "data": data})
    except Mistake as error:
        sys.exit(f"error: {error}")
