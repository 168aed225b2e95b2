"""Swin blocks at one constant resolution: MONAI's weights and numbers, with fewer passes over memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import inf
from typing import Any

import torch
from einops import rearrange
from monai.networks.nets.swin_unetr import SwinTransformerBlock
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

__all__ = ["SwinBlock", "SwinLayer"]

# Logits that the backward pass on the CPU holds at a time: few enough to stay near the cores.
LOGITS_AT_ONCE = 2**22


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
        order, regions, self.group_sizes = lay_out_windows(
            [side + extra for side, extra in zip(grid_size, overhang, strict=True)], window_size, shift_size
        )
        buffers = {"order": order, "inverse_order": order.argsort(), "regions": regions}
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
        groups = [
            window_attention(group, bias if len(self.group_sizes) == 1 else bias + apart(region), self.num_heads)
            for group, region in zip(qkv.split(self.group_sizes, dim=1), self.regions, strict=True)
        ]
        attended = reorder(torch.cat(groups, dim=1), self.inverse_order, self.order)
        if any(self.padding):
            d, h, w = self.grid_size
            attended = attended.unflatten(1, padded_size)[:, :d, :h, :w].flatten(1, 3)
        return self.attn.proj(attended)


def lay_out_windows(
    grid_size: Sequence[int], window_size: Sequence[int], shift_size: Sequence[int]
) -> tuple[Tensor, Tensor, list[int]]:
    """Order the tokens of a grid by window, and the windows by how the grid's edge runs through them.

    Windows shifted beyond the far end of an axis hold tokens of both its ends, which must not see each other. All
    windows that are cut alike form a group and share one mask: one group without a shift, at most eight with.

    Args:
        grid_size: tokens along D, H, W; multiples of the window.
        window_size: D, H, W.
        shift_size: D, H, W.

    Returns:
        ``order`` ``(N,)``, the grid's tokens group by group and window by window; ``regions`` ``(groups, n)``, for the
        n tokens of a window the part of the grid each comes from; and the tokens of each group.
    """
    numbers = torch.arange(grid_size[0] * grid_size[1] * grid_size[2]).reshape(tuple(grid_size))
    numbers = numbers.roll([-shift for shift in shift_size], dims=(0, 1, 2))
    # Per axis: the stretch of windows that are whole, then the last one, which is cut where there is a shift.
    stretches = [
        [slice(0, side - window), slice(side - window, side)] if shift else [slice(0, side)]
        for side, window, shift in zip(grid_size, window_size, shift_size, strict=True)
    ]
    order, regions = [], []
    p, q, r = window_size
    for cut in product(*stretches):
        group = numbers[cut]
        if not group.numel():
            continue
        order.append(rearrange(group, "(d p) (h q) (w r) -> (d h w p q r)", p=p, q=q, r=r))
        wrapped = [
            (torch.arange(window) >= window - shift) & (shift > 0) & (stretch.stop == side)
            for stretch, side, window, shift in zip(cut, grid_size, window_size, shift_size, strict=True)
        ]
        d, h, w = (part.long() for part in wrapped)
        regions.append((4 * d[:, None, None] + 2 * h[:, None] + w).flatten())
    return torch.cat(order), torch.stack(regions), [len(group) for group in order]


def apart(region: Tensor) -> Tensor:
    """Mask ``(n, n)`` to add to the logits, from the part of the grid ``(n,)`` that each token comes from."""
    # Minus infinity, where MONAI has -100: its exponential is denormal, which costs a hundred times a zero.
    return torch.zeros(len(region), len(region), device=region.device).masked_fill(region[:, None] != region, -inf)


def window_attention(qkv: Tensor, bias: Tensor, num_heads: int) -> Tensor:
    """Attention within windows, with a bias that all windows share.

    Args:
        qkv: ``(B, windows · n, 3C)``, queries, keys and values of the tokens, window by window.
        bias: ``(heads, n, n)``, added to the logits.
        num_heads: heads; divides C.

    Returns:
        ``(B, windows · n, C)``.
    """
    windows = rearrange(qkv, "b (w n) c -> (b w) n c", n=bias.shape[-1])
    attend = _TrainedOnCPU.apply if _is_trained(bias) and qkv.device.type == "cpu" else fused_attention
    return rearrange(attend(windows, bias, num_heads), "(b w) n c -> b (w n) c", b=qkv.shape[0])


def fused_attention(qkv: Tensor, bias: Tensor, num_heads: int) -> Tensor:
    """As :func:`window_attention`, on ``(windows, n, 3C)``, by PyTorch's fused kernels."""
    query, key, value = split_heads(qkv, num_heads)
    return join_heads(F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(qkv.dtype)[None]))


def split_heads(qkv: Tensor, num_heads: int) -> Tensor:
    """Take ``(windows, n, 3C)`` apart into queries, keys and values, each ``(windows, heads, n, C/heads)``."""
    return rearrange(qkv, "w n (qkv heads c) -> qkv w heads n c", qkv=3, heads=num_heads)


def join_heads(attended: Tensor) -> Tensor:
    """Bring ``(windows, heads, n, C/heads)`` back to ``(windows, n, C)``."""
    return rearrange(attended, "w heads n c -> w n (heads c)")


class _TrainedOnCPU(torch.autograd.Function):
    """Attention with a trained bias on the CPU, where PyTorch's fused kernels have no gradient for the bias.

    Keeps queries, keys and values alone and computes the probabilities again on the way back, some windows at a time.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, num_heads: int) -> Tensor:
        ctx.save_for_backward(qkv, bias)
        ctx.num_heads = num_heads
        return fused_attention(qkv, bias, num_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, attended_grad: Tensor) -> tuple[Tensor, Tensor, None]:
        qkv, bias = ctx.saved_tensors
        qkv_grads, bias_grad = [], torch.zeros_like(bias)
        at_once = max(1, LOGITS_AT_ONCE // bias.numel())
        with torch.enable_grad():
            bias = bias.to(qkv.dtype).requires_grad_()
            for windows, grad in zip(qkv.split(at_once), attended_grad.split(at_once), strict=True):
                windows = windows.detach().requires_grad_()
                query, key, value = split_heads(windows, ctx.num_heads)
                logits = (query * query.shape[-1] ** -0.5) @ key.mT + bias
                attended = join_heads(logits.softmax(-1) @ value)
                windows_grad, added = torch.autograd.grad(attended, (windows, bias), grad)
                qkv_grads.append(windows_grad)
                bias_grad += added
        qkv_grad = torch.cat(qkv_grads)
        return qkv_grad, bias_grad, None


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
