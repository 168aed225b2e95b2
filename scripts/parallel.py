"""Several processes, one training: what Ignite's ``idist`` lacks. With one process everything here does nothing."""

import atexit
import logging
import os
import sys
import warnings
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import ignite.distributed as idist
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


def shows_progress() -> bool:
    """Tell whether this process should draw progress bars: the first one does, where somebody watches."""
    return idist.get_rank() == 0 and sys.stderr.isatty()


def start(device: str | torch.device, timeout: float = 60) -> None:
    """Join the other processes that torchrun started; only the first one logs from here on.

    The device of this process decides between NCCL (CUDA) and Gloo; ``timeout``, in minutes, is how long one waits for
    the others before it gives up.
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
    """Refuse to be one of several processes that torchrun started and that know nothing of each other."""
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        raise Mistake(
            "torchrun started several processes that know nothing of each other: for a training put "
            "configs/multi_gpu.yaml behind the other configs, for anything else start one"
        )


def finish() -> None:
    """Leave the other processes, when all are done."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    end_process(0)


def end_process(code: int) -> None:
    """Let a bundle command under torchrun end with this code, and without tearing down what is left.

    Ranks that do not answer any more would be waited for, and threads of the communication that wake up while Python
    shuts down abort it now and then.
    """
    if is_bundle_command() and "TORCHELASTIC_RUN_ID" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        atexit.register(os._exit, code)


def is_bundle_command() -> bool:
    """Tell whether this program is ``python -m monai.bundle``, and not one that only uses the bundle."""
    return Path(sys.argv[0]).parts[-3:] == ("monai", "bundle", "__main__.py")


def distribute(network: nn.Module, device: str | torch.device, mode: str = "ddp") -> nn.Module:
    """Let a network train in several processes: move it to this one's device, and wrap or divide it.

    With ``mode`` ``ddp``, every process holds the whole network and gradients are averaged (DistributedDataParallel).
    With ``fsdp``, weights, gradients and the optimiser's memory are divided among them, block by block (torch's
    ``fully_shard``), for networks that one GPU cannot hold. A workflow that does neither has ``none``: refused.
    """
    device = torch.device(device)
    if mode == "none":
        raise Mistake("this workflow runs in one process: start it without torchrun, and without multi_gpu.yaml")
    if mode == "ddp":
        # Said of a transposed convolution's weight, whose one input channel has no stride to speak of.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        # The buffers are constants. Without device_ids, arguments stay where they are: masks on the CPU.
        return DistributedDataParallel(network.to(device), gradient_as_bucket_view=True, broadcast_buffers=False)
    if mode == "fsdp":
        # Block by block onto the device, so that it never holds the whole.
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for module in network.modules():
            if isinstance(module, SwinTransformerBlock):
                fully_shard(module, mesh=mesh)
        return fully_shard(network, mesh=mesh)
    raise Mistake(f"parallel {mode!r} must be 'ddp' or 'fsdp'")


def full_tensors(state: Any) -> Any:
    """Put divided tensors of a nested state together on the CPU of the first process; call it in all of them."""

    def put_together(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        full = value.full_tensor()
        return full.cpu() if idist.get_rank() == 0 else full.new_empty(0)

    return tree_map(put_together, state)


def shard_like(tensors: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Divide those tensors among the processes whose namesakes in ``reference`` are; call it in all of them."""
    return {
        name: (
            distribute_tensor(value.to(ours.device), ours.device_mesh, ours.placements)
            if isinstance(ours := reference[name], DTensor) and value.shape == ours.shape
            else value
        )
        for name, value in tensors.items()
    }


def gather(value: Any) -> list[Any]:
    """Return what each process handed in, in the order of their ranks; values are pickled."""
    return [part for (part,) in idist.all_gather((value,))]


def any_rank(flag: bool) -> bool:
    """Tell whether the flag is up in any process; call it in all of them."""
    return bool(idist.all_reduce(float(flag), op="MAX"))


def first_problem(problem: str | None) -> str | None:
    """Agree on the problem of the first process that has any, with its rank, or None: so that all stop together."""
    # One small number at every step; the words are exchanged when there are any.
    if idist.get_world_size() == 1 or not any_rank(problem is not None):
        return problem
    return next(f"rank {number}: {text}" for number, text in enumerate(gather(problem)) if text is not None)
