"""Compiling the parts of a network that take the time, each where it stands."""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch
from torch import nn

from ..networks import ConvDecoder
from ..networks.segmentation import Level
from ..networks.swin import SwinBlock

__all__ = ["can_compile", "compile_parts"]


def can_compile(device: str | torch.device) -> bool:
    """Tell whether ``torch.compile`` finds what it needs: a C compiler, and for a GPU Triton and Python's header."""
    on_gpu = torch.device(device).type == "cuda"
    words = os.environ.get("CC" if on_gpu else "CXX", "").split()
    if not (shutil.which(words[0]) if words else shutil.which("gcc") or shutil.which("clang")):
        return False
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return not on_gpu or (importlib.util.find_spec("triton") is not None and header.exists())


def compile_parts(network: nn.Module, enabled: bool | str, device: str | torch.device) -> nn.Module:
    """Let the Swin blocks and the decoder of a network be compiled when they first run; other parts stay as they are.

    They are compiled in place, so that names of weights, checkpoints and copies do not change; and one by one, so that
    equal blocks are compiled once. What chooses the visible patches and the stem, which takes as many as there are, are
    not: with a field of view their number changes from batch to batch.

    Args:
        network: any; a MONAI one has no such parts.
        enabled: ``auto``: on a GPU, where a compiler is there.
        device: that it runs on.
    """
    if enabled is True or (enabled == "auto" and _is_capable(device) and can_compile(device)):
        # Blocks share their code: shifted or not, with a gradient or without, of several batches.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.optimize_ddp = False  # it takes networks apart, and these are parts
        for module in network.modules():
            if isinstance(module, SwinBlock | ConvDecoder | Level):
                module.compile(dynamic=False)  # shapes are few, and with unknown ones convolutions fail to compile
    return network


def _is_capable(device: str | torch.device) -> bool:
    return torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)  # for Triton
