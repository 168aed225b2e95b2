"""Several processes, one training: torch.distributed under torchrun. With one process everything here does nothing."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import warnings
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from monai.networks.nets.swin_unetr import SwinTransformerBlock
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from .mistakes import Mistake

__all__ = [
    "any_rank",
    "check_started",
    "distribute",
    "finish",
    "first_problem",
    "gather",
    "is_bundle_command",
    "placed_like",
    "rank",
    "shows_progress",
    "start",
    "whole",
    "world_size",
]


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return which of them this one is, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def shows_progress() -> bool:
    """Tell whether this process should draw progress bars: the first one does, where somebody watches."""
    return rank() == 0 and sys.stderr.isatty()


def start(device: str | torch.device, timeout: float = 60) -> None:
    """Join the other processes; only the first one logs from here on.

    Args:
        device: of this process; decides between NCCL (CUDA) and Gloo.
        timeout: minutes that one waits for the others before it gives up.

    Raises:
        Mistake: when this process was not started by torchrun.
    """
    if "RANK" not in os.environ:
        raise Mistake(
            "multi_gpu.yaml runs under torchrun: torchrun --nproc_per_node=2 -m monai.bundle run …; for one process "
            "leave it out of --config_file"
        )
    device = torch.device(device)
    if device.type == "cuda":
        expected = f"cuda:{os.environ['LOCAL_RANK']}"
        if str(device) != expected:
            raise Mistake(
                f"device {device} of local rank {os.environ['LOCAL_RANK']} must be {expected}: leave --device out"
            )
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=timeout))
    if dist.get_rank() > 0:
        logging.disable(logging.WARNING)


def check_started() -> None:
    """Refuse to be one of several processes that torchrun started and that know nothing of each other.

    Raises:
        Mistake: saying what joins them.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        raise Mistake(
            "torchrun started several processes that know nothing of each other: for a training put "
            "configs/multi_gpu.yaml behind the other configs, for anything else start one"
        )


def finish() -> None:
    """Leave the other processes, when all are done.

    A run under torchrun then ends without tearing down what is left: threads of the communication that wake up while
    Python shuts down abort it now and then, and torchrun would take that for a failure.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    if is_bundle_command() and "TORCHELASTIC_RUN_ID" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        atexit.register(os._exit, 0)


def is_bundle_command() -> bool:
    """Tell whether this program is ``python -m monai.bundle``, and not one that only uses the bundle."""
    return Path(sys.argv[0]).parts[-3:] == ("monai", "bundle", "__main__.py")


def distribute(network: nn.Module, device: str | torch.device, mode: str = "ddp") -> nn.Module:
    """Let a network train in several processes.

    Args:
        network: the same in all processes; it is moved to the device.
        device: of this process.
        mode: ``ddp``: every process holds the whole network and gradients are averaged (DistributedDataParallel);
            ``fsdp``: weights, gradients and the optimiser's memory are divided among them, block by block (torch's
            ``fully_shard``), for networks that one GPU cannot hold; ``none``: of a workflow that does not do this.

    Returns:
        What to train: a wrapper, or the network itself.

    Raises:
        Mistake: for another ``mode``.
    """
    device = torch.device(device)
    if mode == "none":
        raise Mistake("this workflow runs in one process: start it without torchrun, and without multi_gpu.yaml")
    if mode == "ddp":
        # Said of a transposed convolution's weight, whose one input channel has no stride to speak of.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        devices = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(
            network.to(device),
            device_ids=devices,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,  # they are constants
        )
    if mode == "fsdp":
        # Block by block onto the device, so that it never holds the whole.
        mesh = init_device_mesh(device.type, (world_size(),))
        for module in network.modules():
            if isinstance(module, SwinTransformerBlock):
                fully_shard(module, mesh=mesh)
        return fully_shard(network, mesh=mesh)
    raise Mistake(f"parallel {mode!r} must be 'ddp' or 'fsdp'")


def whole(state: Any) -> Any:
    """Put the tensors of a nested state that are divided among the processes together; call it in all of them.

    One after the other, on the CPU of the first process: elsewhere they are left empty.
    """

    def put_together(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        full = value.full_tensor()
        return full.cpu() if rank() == 0 else full.new_empty(0)

    return tree_map(put_together, state)


def placed_like(tensors: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Divide those tensors among the processes whose namesakes in ``reference`` are; call it in all of them."""
    return {
        name: distribute_tensor(value.to(ours.device), ours.device_mesh, ours.placements)
        if isinstance(ours := reference[name], DTensor) and value.shape == ours.shape
        else value
        for name, value in tensors.items()
    }


def gather(value: Any) -> list[Any]:
    """Return what each process handed in, in the order of their ranks; values are pickled."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def any_rank(flag: bool, device: torch.device) -> bool:
    """Tell whether the flag is up in any process; call it in all of them."""
    if world_size() == 1:
        return flag
    raised = torch.tensor(float(flag), device=device)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised.item())


def first_problem(problem: str | None, device: torch.device) -> str | None:
    """Agree on whether any process has a problem, so that all stop together.

    Args:
        problem: of this process, or None.
        device: that this process computes on.

    Returns:
        In all processes alike, the problem of the first one that has any, with its rank; or None.
    """
    if world_size() == 1:
        return problem
    # One small number at every step; the words are exchanged when there are any.
    if not any_rank(problem is not None, device):
        return None
    problems = gather(problem)
    return next(f"rank {number}: {text}" for number, text in enumerate(problems) if text is not None)
