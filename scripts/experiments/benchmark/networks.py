"""Time, arithmetic and memory of BertsWin, the same in plain eager PyTorch, and MONAI's ViT-MAE of the same size."""

import contextlib
import copy
import gc
import math
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from einops import rearrange
from monai.networks.nets.swin_unetr import BasicLayer
from monai.utils import ensure_tuple
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ...engines import AutocastInferer, autocast_dtype, can_compile, compile_parts
from ...losses import MaskedL2Loss
from ...mistakes import Mistake
from ...networks import BertsWinMAE, ConvDecoder, patchify
from ...parallel import shows_progress
from ..peers import ViTMAE
from ..reporting import markdown_table, write_report

__all__ = ["Contestant", "machine", "networks", "plain_form"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TASKS = STEP, PATCH_FEATURES, FEATURES = "training step", "features, patches", "features, volume"
TITLES = {"bertswin": "BertsWin", "plain": "plain eager BertsWin", "vit_mae": "MONAI ViT-MAE"}
# Patch, width, blocks, heads, window and the decoder's width.
NETWORKS = {"base": (16, 768, 12, 12, 7, 512), "small": (8, 192, 6, 6, 3, 256), "tiny": (8, 48, 2, 4, 2, 32)}
MATRIX_SIDE = 4096  # of the products that the machine's rate is measured with
LINUX_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Contestant:
    """A network in one form and precision."""

    form: str  # bertswin, plain (see plain_form) or vit_mae
    precision: str  # bf16, fp16 or fp32
    checkpointing: bool = False  # with activation checkpointing
    compiled: bool = False

    def __str__(self) -> str:
        """Name it in the table."""
        ways = {"checkpointing": self.checkpointing, "compiled": self.compiled}
        return ", ".join([TITLES[self.form], self.precision, *(name for name, is_so in ways.items() if is_so)])

    def prepare(self, network: str, volume: Tensor) -> tuple[nn.Module, dict[str, Callable[[], Any]]]:
        """Build a network of ``NETWORKS``, and give it with the tasks it can do on a batch ``(B, 1, D, H, W)``."""
        torch.manual_seed(0)
        img_size, (patch_size, width, depth, heads, window, decoder_width) = volume.shape[2:], NETWORKS[network]
        if self.form == "vit_mae":  # its decoder half as wide, which is MONAI's proportion
            model = ViTMAE(img_size, patch_size, 1, width, depth, heads, width // 2)
        else:
            sizes = (patch_size, 1, width, [depth], [heads], window, decoder_width)
            model = BertsWinMAE(tuple(img_size), *sizes, activation_checkpointing=self.checkpointing)
        model = (plain_form(model) if self.form == "plain" else model).to(volume.device)
        compile_parts(model, self.compiled, volume.device)
        infer = AutocastInferer(self.precision, volume.device)
        target = patchify(volume, patch_size)

        def step() -> None:
            model.zero_grad(set_to_none=True)
            MaskedL2Loss()(infer(volume, model), target).backward()

        def extract(encode: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
            return torch.no_grad()(lambda: infer(volume, encode))

        tasks = {STEP: step}
        if self.form == "vit_mae":
            tasks[PATCH_FEATURES] = extract(nn.Sequential(model.patch_embedding, model.blocks))
        elif not self.checkpointing:  # which is for training
            tasks |= {PATCH_FEATURES: extract(model.extract_features), FEATURES: extract(model.encoder)}
        return model, tasks


REFERENCE = Contestant("plain", "fp32")  # which can do all tasks


def plain_form(model: BertsWinMAE) -> BertsWinMAE:
    """Copy a network, all of its parts replaced by the same arithmetic in plain eager PyTorch.

    This is how the authors' implementation computes: MONAI's Swin layer, which keeps the attention matrices for the way
    back, and convolutions of volumes. The copy has the same weights.
    """
    plain = copy.deepcopy(model)
    encoder, decoder, blocks = plain.encoder, plain.decoder, plain.encoder.swin.blocks
    heads, window_size = blocks[0].num_heads, tuple(blocks[0].window_size)
    layer = BasicLayer(encoder.embed_dim, len(blocks), heads, window_size, drop_path=0.0, qkv_bias=True)
    # MONAI's layer also stores an index that follows from the window.
    layer.load_state_dict(layer.state_dict() | encoder.swin.state_dict())
    for convolution, *_ in encoder.stem.stages:
        convolution.forward = partial(nn.Conv3d.forward, convolution)
    encoder.swin, encoder.stem = layer, nn.Sequential(*encoder.stem.stages, encoder.stem.proj)
    decoder.reconstruct_patches = partial(_reconstruct_by_convolutions, decoder)
    return plain


def _reconstruct_by_convolutions(decoder: ConvDecoder, features: Tensor) -> Tensor:
    tokens = decoder.embed(rearrange(features, "b c d h w -> b d h w c"))
    return patchify(decoder.head(rearrange(tokens, "b d h w c -> b c d h w")), decoder.patch_size)


def networks(
    network: str = "base",
    img_sizes: Sequence[int] | int = (112, 224),
    batch_sizes: Sequence[int] | int = (1,),
    precision: str = "auto",
    device: str = DEVICE,
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
        output_dir: for ``networks.json`` and ``networks.md``.

    Raises:
        Mistake: for a network or a size that is not there.
    """
    if network not in NETWORKS:
        raise Mistake(f"network {network!r} must be one of {tuple(NETWORKS)}")
    low = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "fp32"}[autocast_dtype(precision, device)]
    precisions = ["fp32"] if low == "fp32" else ["fp32", low]
    contestants = [Contestant(form, p) for form, p in product(TITLES, precisions)]
    contestants.insert(len(precisions), Contestant("bertswin", low, checkpointing=True))
    if torch.device(device).type == "cuda" and can_compile(device):
        contestants[:0] = [Contestant("bertswin", low, compiled=True)]
    folder, rows = Path(output_dir), []
    for side, batch_size in product(ensure_tuple(img_sizes), ensure_tuple(batch_sizes)):
        rows += _measure(network, (batch_size, 1, side, side, side), torch.device(device), contestants, repeats)
        report = {"machine": machine(device), "network": network, "repeats": repeats, "rows": rows}
        write_report(folder, "networks", report, _table(rows))  # what is there by now


def machine(device: str) -> dict[str, Any]:
    """Describe what is measured on."""
    on_gpu = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "float32_products": torch.get_float32_matmul_precision(),  # "highest": no TF32
    }


def _measure(
    network: str, shape: Sequence[int], device: torch.device, contestants: Sequence[Contestant], repeats: int
) -> list[dict[str, Any]]:
    """Measure all contestants on a batch; a row each and task."""
    volume = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)
    tasks, parameters = {}, {}
    for contestant in contestants:
        model, its_tasks = contestant.prepare(network, volume)
        parameters[contestant] = sum(p.numel() for p in model.parameters())
        tasks |= {(contestant, name): task for name, task in its_tasks.items()}
    flops = _count_flops(tasks)
    seconds, rates = _take_turns(tasks, device, repeats, f"{shape[-1]}³, batch {shape[0]}")
    del model, its_tasks, tasks, volume
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    peaks = {(c, name): peak for c in contestants for name, peak in _peak_memory(c, network, shape, device).items()}
    rows = []
    for (contestant, name), measured in seconds.items():
        arithmetic, rate = flops.get((contestant.form, name)), rates[contestant.precision]
        against, alike = (seconds[Contestant("plain", p), name] for p in ("fp32", contestant.precision))
        median = _finite(statistics.median(measured))
        peak, plain_peak = peaks[contestant, name], peaks[REFERENCE, name]
        row = {"contestant": str(contestant), **asdict(contestant), "task": name}
        row |= {"img_size": shape[-1], "batch_size": shape[0], "parameters": parameters[contestant]}
        # What does not fit in memory has no time, and no share of anything.
        row |= {"seconds": median, "fastest": _finite(min(measured)), "slowest": _finite(max(measured))}
        row["of_plain_fp32"], row["of_plain"] = (_share(measured, others) for others in (against, alike))
        row |= {"flops": arithmetic, "matrix_flops_per_second": rate}
        row["of_matrix_rate"] = arithmetic / median / rate if arithmetic and median else None
        row |= {"peak_bytes": peak, "memory_of_plain_fp32": peak / plain_peak if peak and plain_peak else None}
        rows.append(row)
    return rows


def _share(measured: Sequence[float], others: Sequence[float]) -> float | None:
    return _finite(statistics.median(a / b for a, b in zip(measured, others, strict=True)))


def _finite(value: float) -> float | None:
    return value if 0 < value < math.inf else None  # also for no number: infinity by infinity


def _count_flops(tasks: Mapping[tuple[Contestant, str], Callable[[], Any]]) -> dict[tuple[str, str], int]:
    """Count the operations of each form and task."""
    flops = {}
    for (contestant, name), task in tasks.items():
        if contestant in (REFERENCE, Contestant("vit_mae", "fp32")):
            with FlopCounterMode(display=False) as counter, contextlib.suppress(torch.OutOfMemoryError):
                task()
                flops[contestant.form, name] = counter.get_total_flops()
    # Ours is the same arithmetic as the plain form's.
    return flops | {("bertswin", name): count for (form, name), count in flops.items() if form == "plain"}


def _take_turns(
    tasks: Mapping[tuple[Contestant, str], Callable[[], Any]], device: torch.device, repeats: int, title: str
) -> tuple[dict[tuple[Contestant, str], list[float]], dict[str, float]]:
    """Time every task in every round, and the products of matrices in each precision, of which it gives the median."""
    order, seconds = list(tasks), {key: [] for key in tasks}
    rates: dict[str, list[float]] = {contestant.precision: [] for contestant, _ in tasks}
    for number in tqdm(range(repeats + 1), desc=title, leave=False, disable=not shows_progress()):
        for precision, measured in rates.items():
            measured.append(_matrix_rate(autocast_dtype(precision, device) or torch.float32, device))
        # Every round starts with another one, so that none always follows the same neighbour.
        first = number % len(order)
        for key in order[first:] + order[:first]:
            elapsed = _timed(tasks[key], device)
            if number:  # the first round warms up
                seconds[key].append(elapsed)
    return seconds, {precision: statistics.median(measured) for precision, measured in rates.items()}


def _timed(task: Callable[[], Any], device: torch.device) -> float:
    """Seconds a task takes; infinity, when the GPU's memory does not hold it."""
    synchronise = torch.get_device_module(device).synchronize
    synchronise(device)
    start = time.perf_counter()
    try:
        task()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return math.inf
    synchronise(device)
    return time.perf_counter() - start


def _matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second in the product of two large matrices, the best of three."""
    # Random, since a GPU draws less power, and runs faster, on ones.
    matrix = torch.randn(MATRIX_SIDE, MATRIX_SIDE, dtype=dtype, device=device)
    return 2 * MATRIX_SIDE**3 / min(_timed(lambda: matrix @ matrix, device) for _ in range(3))


def _peak_memory(*arguments: Any) -> dict[str, int | None]:
    """Measure what each task needs, in bytes, over what the process held before it built the network.

    On the CPU it is a process of its own that gives freed memory back at once, so that its size is what is in use, as
    it is counted on a GPU. Left to itself, the C library keeps some for later.
    """
    if arguments[-1].type == "cuda":
        return _peak_memory_here(*arguments)
    with (
        mock.patch.dict(os.environ, {"MALLOC_MMAP_THRESHOLD_": str(2**20)}),
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,  # which notices when it is killed
    ):
        return pool.submit(_peak_memory_here, *arguments).result()


def _peak_memory_here(
    contestant: Contestant, network: str, shape: Sequence[int], device: torch.device
) -> dict[str, int | None]:
    on_cpu, peaks = device.type == "cpu", {}
    before = _resident("VmRSS") if on_cpu else torch.cuda.memory_allocated(device)
    _, tasks = contestant.prepare(network, torch.rand(shape).to(device))
    for name in reversed(tasks):  # the training step, which leaves gradients behind, last
        if not on_cpu:
            torch.cuda.reset_peak_memory_stats(device)
        elif LINUX_STATUS.exists():
            LINUX_STATUS.with_name("clear_refs").write_text("5")  # forgets the peak
        try:
            for _ in range(2 if name == STEP else 1):  # as in training, with the gradients of the step before
                tasks[name]()
        except torch.OutOfMemoryError:
            peaks[name] = None
            continue
        peak = _resident("VmHWM") if on_cpu else torch.cuda.max_memory_allocated(device)
        peaks[name] = None if peak is None or before is None else peak - before
    return peaks


def _resident(field: str) -> int | None:
    """Memory of this process as Linux counts it, in bytes; None elsewhere."""
    if not LINUX_STATUS.exists():
        return None
    line = next(line for line in LINUX_STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Write the lines of a Markdown table."""
    cells = []
    for row in sorted(rows, key=lambda row: (row["img_size"], row["batch_size"], TASKS.index(row["task"]))):
        seconds, fastest, slowest = (_shown(row[name], ".3g") for name in ("seconds", "fastest", "slowest"))
        cells.append(
            f"{row['batch_size']} of {row['img_size']}³ | {row['task']} | {row['contestant']} "
            f"| {row['parameters'] / 1e6:.1f} M | {_shown(row['flops'], '.3g', 1e12)} "
            f"| {seconds} ({fastest} to {slowest}) | {_shown(row['of_plain_fp32'])} | {_shown(row['of_plain'])} "
            f"| {_shown(row['of_matrix_rate'], '.0%')} | {_shown(row['peak_bytes'], unit=1e9)} GB "
            f"| {_shown(row['memory_of_plain_fp32'])}"
        )
    head = (
        "size | task | contestant | parameters | TFLOP | seconds (fastest to slowest) | time of plain fp32 "
        "| of plain alike | of matrix rate | peak memory | memory of plain fp32"
    )
    return markdown_table(head, cells)


def _shown(value: float | None, form: str = ".2f", unit: float = 1) -> str:
    return "-" if value is None else format(value / unit, form)
