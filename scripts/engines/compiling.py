"""Compiling the parts of a network that take the time, each where it stands."""

import importlib.util
import os
import shutil
from collections.abc import Iterator

import torch
from torch import nn

from ..networks import ConvDecoder, PatchStem
from ..networks.segmentation import Level
from ..networks.swin import SwinBlock

__all__ = ["can_compile", "compile_parts"]


def can_compile(device: str | torch.device) -> bool:
    """Tell whether ``torch.compile`` finds what it needs for a device: Triton on a GPU, and a C compiler."""
    compiler = os.environ.get("CC" if torch.device(device).type == "cuda" else "CXX")
    found = shutil.which(compiler) if compiler else shutil.which("gcc") or shutil.which("clang")
    return bool(found) and (torch.device(device).type != "cuda" or importlib.util.find_spec("triton") is not None)


def compile_parts(network: nn.Module, enabled: bool | str, device: str | torch.device) -> nn.Module:
    """Let the parts of a network be compiled when they first run: stem, Swin blocks, decoder; others stay as they are.

    They are compiled in place, so that names of weights, checkpoints and copies do not change; and one by one, so that
    equal blocks are compiled once, and what chooses the visible patches is not.

    Args:
        network: any; a MONAI one has no such parts.
        enabled: ``auto``: on a GPU, where a compiler is there.
        device: that it runs on.
    """
    on_gpu = torch.device(device).type == "cuda"
    if enabled is True or (enabled == "auto" and on_gpu and can_compile(device)):
        for part in _parts(network):
            part.compile()
    return network


def _parts(network: nn.Module) -> Iterator[nn.Module]:
    for module in network.modules():
        if isinstance(module, PatchStem):
            yield from module.stages  # both with skips and without
        elif isinstance(module, SwinBlock | ConvDecoder | Level):
            yield module
