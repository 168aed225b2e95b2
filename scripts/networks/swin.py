"""Swin blocks at one constant resolution, with MONAI's weights and numbers."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from monai.networks.nets.swin_unetr import SwinTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

__all__ = ["SwinBlock", "SwinLayer", "maybe_checkpointed"]

PARTITION = "b (d p) (h q) (w r) c -> (b d h w) (p q r) c"


class SwinLayer(nn.Module):
    """A stack of Swin blocks on one grid of tokens, every other one with its windows shifted by half.

    Parameters, their names and the numbers are those of :class:`monai.networks.nets.swin_unetr.BasicLayer` without
    down-sampling. Here the grid is known beforehand, so the attention masks are made once.

    Takes arguments of :class:`~bertswin_mae.networks.BertsWinMAE`, for one stage, and ``grid_size``: tokens along
    D, H, W, padded with zeros where that is no multiple of the window.
    """

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        window_size: Sequence[int],
        grid_size: Sequence[int],
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        # An axis that one window covers has nowhere to shift to.
        half = [window // 2 if window < side else 0 for window, side in zip(window_size, grid_size, strict=True)]
        shifts = ([0, 0, 0], half)
        self.blocks = nn.ModuleList(
            SwinBlock(embed_dim, num_heads, window_size, shifts[i % 2], grid_size, activation_checkpointing)
            for i in range(depth)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``(B, C, D/P, H/P, W/P)`` to features of the same shape; a ValueError for tokens of another grid."""
        return self.hidden_states(tokens, [len(self.blocks)])[0]

    def hidden_states(self, tokens: Tensor, depths: Sequence[int]) -> list[Tensor]:
        """As :meth:`forward`, but return what comes out of some of the blocks, which count from 1."""
        grid_size = self.blocks[0].grid_size
        if tuple(tokens.shape[2:]) != grid_size:
            raise ValueError(f"tokens lie on a grid of {tuple(tokens.shape[2:])}, built for {grid_size}")
        tokens = rearrange(tokens, "b c d h w -> b d h w c").contiguous()
        states = []
        for depth, block in enumerate(self.blocks, start=1):
            tokens = block(tokens)
            if depth in depths:
                states.append(rearrange(tokens, "b d h w c -> b c d h w"))
        return states


class SwinBlock(SwinTransformerBlock):
    """One Swin block: attention within windows of the grid, then a perceptron, each beside a residual path.

    Where windows are large, training computes GELUs again on the way back, and on a CPU attention matrices. On 224³
    voxels in bfloat16 that takes 0.74 of a step's memory, and 1.02 of its time (in float32 0.78 and 1.04).

    Takes arguments of :class:`SwinLayer`, and ``shift_size``: tokens by which the windows are shifted along D, H, W.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        window_size: Sequence[int],
        shift_size: Sequence[int],
        grid_size: Sequence[int],
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(embed_dim, num_heads, window_size, shift_size, use_checkpoint=activation_checkpointing)
        self.grid_size = tuple(grid_size)
        # Where attention matrices outweigh queries, keys and values. `use_checkpoint` covers all of the block.
        tokens, head_dim = math.prod(window_size), embed_dim // num_heads
        self.recomputes = tokens > 3 * head_dim and not activation_checkpointing
        # Fixed by the shapes: not part of a checkpoint.
        self.register_buffer("attn_mask", shifted_window_mask(grid_size, window_size, shift_size), persistent=False)
        self.attn.register_buffer("relative_position_index", self.attn.relative_position_index, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``(B, D/P, H/P, W/P, C)`` to features of the same shape."""
        return maybe_checkpointed(self._transform, tokens, self.use_checkpoint)

    def _transform(self, tokens: Tensor) -> Tensor:
        qkv = self.attn.qkv(self._window_partition(self.norm1(tokens)))
        # A GPU has fused kernels, which keep no attention matrix.
        attended = maybe_checkpointed(self._attend, qkv, self.recomputes and qkv.device.type == "cpu")
        tokens = tokens + self._window_reverse(self.attn.proj(attended))
        return tokens + maybe_checkpointed(self._contract, self.mlp.linear1(self.norm2(tokens)), self.recomputes)

    def _contract(self, hidden: Tensor) -> Tensor:
        return self.mlp.linear2(F.gelu(hidden))

    def _attend(self, qkv: Tensor) -> Tensor:
        """Attention within each window, ``(B · windows, n, 3C)`` to ``(B · windows, n, C)``."""
        query, key, value = rearrange(qkv, "b n (qkv heads c) -> qkv b heads n c", qkv=3, heads=self.num_heads)
        table, index = self.attn.relative_position_bias_table, self.attn.relative_position_index
        bias = table.t().index_select(1, index.flatten()).unflatten(1, index.shape)  # (heads, n, n)
        bias = bias.type_as(qkv)  # .to(qkv.dtype) would trace to a constant, and an export keep it when it is cast
        if any(self.shift_size):
            # Minus infinity, where MONAI has -100: its exponential is denormal, which costs a hundred times a zero.
            bias = bias.masked_fill(self.attn_mask[:, None], -math.inf)  # (windows, heads, n, n)
            bias = bias.repeat(qkv.shape[0] // bias.shape[0], 1, 1, 1)  # len() would trace to a constant
        if qkv.device.type == "cpu" and not torch.jit.is_tracing():  # what is exported may run on a GPU
            # Windows are small for the CPU's fused kernel: on 224³ voxels in bfloat16, features take 1.17 times as long
            # with it, and a step, as it has no gradient for the bias, 1.15 times.
            logits = (query * query.shape[-1] ** -0.5 @ key.mT).add_(bias)
            attended = logits.softmax(-1) @ value
        else:
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return rearrange(attended, "b heads n c -> b n (heads c)")

    def _window_partition(self, tokens: Tensor) -> Tensor:
        """Pad, shift and partition the grid ``(B, D/P, H/P, W/P, C)``: to ``(B · windows, n, C)``."""
        padding = _padding(self.grid_size, self.window_size)
        if any(padding):
            tokens = F.pad(tokens, [0, 0, 0, padding[2], 0, padding[1], 0, padding[0]])  # the last axis first
        if any(self.shift_size):
            tokens = tokens.roll([-shift for shift in self.shift_size], dims=(1, 2, 3))
        p, q, r = self.window_size
        return rearrange(tokens, PARTITION, p=p, q=q, r=r)

    def _window_reverse(self, windows: Tensor) -> Tensor:
        """Undo :meth:`_window_partition`."""
        p, q, r = self.window_size
        d, h, w = (-(-side // window) for side, window in zip(self.grid_size, self.window_size, strict=True))
        before, after = PARTITION.split(" -> ")
        tokens = rearrange(windows, f"{after} -> {before}", d=d, h=h, w=w, p=p, q=q, r=r)
        if any(self.shift_size):
            tokens = tokens.roll(self.shift_size, dims=(1, 2, 3))
        d, h, w = self.grid_size
        return tokens[:, :d, :h, :w]


def shifted_window_mask(grid_size: Sequence[int], window_size: Sequence[int], shift_size: Sequence[int]) -> Tensor:
    """Tell which tokens of a window must not see each other, since a shift brought them there from far apart.

    Takes arguments of :class:`SwinBlock`.

    Returns:
        ``(windows, n, n)`` bool, True = hidden from each other.
    """
    axes = zip(grid_size, _padding(grid_size, window_size), shift_size, strict=True)
    # The near end of each axis, as thick as the shift, went round to the far end.
    d, h, w = (torch.arange(side + padding) >= side + padding - shift for side, padding, shift in axes)
    regions = 4 * d[:, None, None] + 2 * h[:, None] + w.int()
    p, q, r = window_size
    regions = rearrange(regions[None, ..., None], PARTITION, p=p, q=q, r=r)
    return regions != regions.mT


def _padding(grid_size: Sequence[int], window_size: Sequence[int]) -> list[int]:
    return [-side % window for side, window in zip(grid_size, window_size, strict=True)]


def maybe_checkpointed(function: Callable[[Tensor], Any], inputs: Tensor, enabled: bool) -> Any:
    """Compute ``function(inputs)``; if enabled, keep the inputs alone and compute it again on the way back.

    PyTorch stops computing again as soon as it has what the way back needs, so that a matrix product at the end of the
    function is not repeated.
    """
    if enabled and _is_trained():
        return checkpoint(function, inputs, use_reentrant=False, preserve_rng_state=False)  # nothing in it is random
    return function(inputs)


def _is_trained() -> bool:
    return torch.is_grad_enabled() and not torch.jit.is_tracing()  # an exported network needs no gradient
