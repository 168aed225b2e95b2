"""Swin blocks at one constant resolution: MONAI's weights and numbers, with fewer passes over memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf
from typing import Any

import torch
from einops import rearrange, repeat
from monai.networks.nets.swin_unetr import SwinTransformerBlock
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

__all__ = ["SwinBlock", "SwinLayer"]

# Logits worked on at a time: few enough to stay near the cores of a CPU, and to fit a GPU beside the rest.
LOGITS_AT_ONCE = {"cpu": 2**22, "cuda": 2**27}


class SwinLayer(nn.Module):
    """A stack of Swin blocks on one grid of tokens, every other one with its windows shifted by half.

    Parameters, their names and the numbers are those of :class:`monai.networks.nets.swin_unetr.BasicLayer` without
    down-sampling. Here the grid is known beforehand, so the windows are laid out once.

    Args:
        embed_dim: token width C.
        depth: blocks.
        num_heads: attention heads; divides C.
        window_size: attention window in tokens, D, H, W; no larger than the grid.
        grid_size: tokens along D, H, W; padded with zeros where it is no multiple of the window.
        activation_checkpointing: in training, compute the blocks' activations again on the way back instead of
            keeping them.
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
        """Map ``(B, C, D/P, H/P, W/P)`` to features of the same shape."""
        grid_size = tokens.shape[2:]
        tokens = rearrange(tokens, "b c d h w -> b (d h w) c")
        for block in self.blocks:
            tokens = block(tokens)
        return rearrange(tokens.unflatten(1, grid_size), "b d h w c -> b c d h w")


class SwinBlock(SwinTransformerBlock):
    """One Swin block: attention within windows of the grid, then a perceptron, each beside a residual path.

    Args:
        embed_dim: token width C.
        num_heads: attention heads; divides C.
        window_size: attention window in tokens, D, H, W.
        shift_size: tokens by which the windows are shifted along D, H, W.
        grid_size: tokens along D, H, W.
        activation_checkpointing: in training, compute the activations again on the way back.
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
        overhang = [-side % window for side, window in zip(grid_size, window_size, strict=True)]
        self.padding = [0, 0, 0, overhang[2], 0, overhang[1], 0, overhang[0]]  # F.pad: last axis first
        self.is_shifted = any(shift_size)
        order, regions = lay_out_windows(
            [side + extra for side, extra in zip(grid_size, overhang, strict=True)], window_size, shift_size
        )
        buffers = {"order": order.flatten(), "inverse_order": order.flatten().argsort(), "regions": regions}
        for name, buffer in buffers.items():  # fixed by the shapes: not part of a checkpoint
            self.register_buffer(name, buffer, persistent=False)
        self.attn.register_buffer("relative_position_index", self.attn.relative_position_index, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map the grid's tokens ``(B, N, C)`` to features of the same shape."""
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._transform, tokens, use_reentrant=False)
        return self._transform(tokens)

    def _transform(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self._attend(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))

    def _attend(self, tokens: Tensor) -> Tensor:
        """Let the tokens of each window talk: ``(B, N, C)`` to the same shape."""
        if any(self.padding):
            tokens = F.pad(tokens.unflatten(1, self.grid_size), self.padding)
            padded_size, tokens = tokens.shape[1:4], tokens.flatten(1, 3)
        # The projections look at one token at a time: only what lies between them needs the order of the windows.
        qkv = reorder(self.attn.qkv(tokens), self.order, self.inverse_order)
        table, index = self.attn.relative_position_bias_table, self.attn.relative_position_index
        bias = table.t().index_select(1, index.flatten()).unflatten(1, index.shape)  # (heads, n, n)
        windows = qkv.unflatten(1, self.regions.shape)
        attended = window_attention(windows, bias, self.regions if self.is_shifted else None, self.num_heads)
        attended = reorder(attended.flatten(1, 2), self.inverse_order, self.order)
        if any(self.padding):
            d, h, w = self.grid_size
            attended = attended.unflatten(1, padded_size)[:, :d, :h, :w].flatten(1, 3)
        return self.attn.proj(attended)


def lay_out_windows(
    grid_size: Sequence[int], window_size: Sequence[int], shift_size: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Divide a grid of tokens into windows.

    Windows shifted beyond the far end of an axis hold tokens of both its ends, which must not see each other.

    Args:
        grid_size: tokens along D, H, W; multiples of the window.
        window_size: D, H, W.
        shift_size: D, H, W.

    Returns:
        ``(windows, n)``, the numbers of the tokens in each window; and for each of them, which part of the grid it
        belongs to, of those that a shift puts side by side.
    """
    grid = torch.arange(grid_size[0] * grid_size[1] * grid_size[2]).reshape(tuple(grid_size))
    # The near end of each axis, as thick as the shift, goes round to the far end.
    d, h, w = (torch.arange(side) >= side - shift for side, shift in zip(grid_size, shift_size, strict=True))
    regions = 4 * d[:, None, None] + 2 * h[:, None] + w.int()
    grid = grid.roll([-shift for shift in shift_size], dims=(0, 1, 2))
    p, q, r = window_size
    into_windows = "(d p) (h q) (w r) -> (d h w) (p q r)"
    return rearrange(grid, into_windows, p=p, q=q, r=r), rearrange(regions, into_windows, p=p, q=q, r=r)


def window_attention(qkv: Tensor, bias: Tensor, regions: Tensor | None, num_heads: int) -> Tensor:
    """Attention within windows, with a bias that all windows share.

    Args:
        qkv: ``(B, windows, n, 3C)``, queries, keys and values of the tokens.
        bias: ``(heads, n, n)``, added to the logits.
        regions: ``(windows, n)``, the part of the grid that each token belongs to; tokens see those of their own alone.
            None: of one part, all of them.
        num_heads: heads; divides C.

    Returns:
        ``(B, windows, n, C)``.
    """
    attend = _TrainedOnCPU.apply if _is_trained(bias) and qkv.device.type == "cpu" else fused_attention
    return attend(qkv, bias, regions, num_heads)


def fused_attention(qkv: Tensor, bias: Tensor, regions: Tensor | None, num_heads: int) -> Tensor:
    """As :func:`window_attention`, by PyTorch's fused kernels."""
    bias = bias.to(qkv.dtype)
    parts = [
        join_heads(F.scaled_dot_product_attention(*split_heads(part, num_heads), attn_mask=added), len(qkv))
        for part, added in some_at_a_time(qkv, bias, regions)
    ]
    return torch.cat(parts, dim=1)


class _TrainedOnCPU(torch.autograd.Function):
    """Attention with a trained bias on the CPU, where PyTorch's fused kernels have no gradient for the bias.

    Keeps queries, keys and values alone, and computes the attention again on the way back, some windows at a time.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, regions: Tensor | None, num_heads: int) -> Tensor:
        ctx.save_for_backward(qkv, bias, regions)
        ctx.num_heads = num_heads
        return fused_attention(qkv, bias, regions, num_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, attended_grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        qkv, bias, regions = ctx.saved_tensors
        qkv_grads, bias_grad = [], torch.zeros_like(bias)
        with torch.enable_grad():
            bias = bias.to(qkv.dtype).requires_grad_()
            done = 0
            for part, added in some_at_a_time(qkv.detach(), bias, regions):
                part.requires_grad_()
                query, key, value = split_heads(part, ctx.num_heads)
                logits = (query * query.shape[-1] ** -0.5) @ key.mT + added
                attended = join_heads(logits.softmax(-1) @ value, len(qkv))
                grad = attended_grad[:, done : done + part.shape[1]]
                part_grad, added_grad = torch.autograd.grad(attended, (part, bias), grad)
                qkv_grads.append(part_grad)
                bias_grad += added_grad
                done += part.shape[1]
        return torch.cat(qkv_grads, dim=1), bias_grad, None, None


def some_at_a_time(qkv: Tensor, bias: Tensor, regions: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Take some windows at a time, and what to add to their logits.

    Yields:
        ``(B, some, n, 3C)``; and ``(B · some, heads, n, n)``, or one for all windows.
    """
    at_once = max(1, LOGITS_AT_ONCE.get(qkv.device.type, LOGITS_AT_ONCE["cuda"]) // (len(qkv) * bias.numel()))
    parts = qkv.split(at_once, dim=1)
    if regions is None:
        yield from ((part, bias[None]) for part in parts)
        return
    for part, region in zip(parts, regions.split(at_once), strict=True):
        # Minus infinity, where MONAI has -100: its exponential is denormal, which costs a hundred times a zero.
        apart = torch.zeros((), dtype=bias.dtype, device=bias.device)
        apart = apart.where(region[:, :, None] == region[:, None], -inf)
        yield part, repeat(bias + apart[:, None], "some heads n m -> (b some) heads n m", b=len(qkv))


def split_heads(qkv: Tensor, num_heads: int) -> Tensor:
    """Take ``(B, windows, n, 3C)`` apart: queries, keys and values, each ``(B · windows, heads, n, C/heads)``."""
    return rearrange(qkv, "b w n (qkv heads c) -> qkv (b w) heads n c", qkv=3, heads=num_heads)


def join_heads(attended: Tensor, batch_size: int) -> Tensor:
    """Bring ``(B · windows, heads, n, C/heads)`` back to ``(B, windows, n, C)``."""
    return rearrange(attended, "(b w) heads n c -> b w n (heads c)", b=batch_size)


def reorder(tokens: Tensor, order: Tensor, inverse_order: Tensor) -> Tensor:
    """Put the tokens ``(B, N, C)`` in another order ``(N,)``."""
    return _Permutation.apply(tokens, order, inverse_order) if _is_trained(tokens) else tokens.index_select(1, order)


class _Permutation(torch.autograd.Function):
    """Reorder tokens. Both directions gather: PyTorch's gradient of an indexing scatters and adds, which is slow."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, inverse_order: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_order)
        return tokens.index_select(1, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse_order,) = ctx.saved_tensors
        return grad.index_select(1, inverse_order), None, None


def _is_trained(tensor: Tensor) -> bool:
    # A tracer cannot record gradients of our own, and an exported network needs none.
    return torch.is_grad_enabled() and tensor.requires_grad and not torch.jit.is_tracing()
