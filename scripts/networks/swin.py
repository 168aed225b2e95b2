"""Swin blocks at one constant resolution: MONAI's weights and numbers, with fewer passes over memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import inf
from typing import Any

import torch
from einops import rearrange
from monai.networks.nets.swin_unetr import SwinTransformerBlock
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

__all__ = ["SwinBlock", "SwinLayer", "maybe_checkpointed"]

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
        """Map ``(B, C, D/P, H/P, W/P)`` to features of the same shape; a ValueError for tokens of another grid."""
        grid_size = tokens.shape[2:]
        if tuple(grid_size) != self.blocks[0].grid_size:
            raise ValueError(f"tokens lie on a grid of {tuple(grid_size)}, built for {self.blocks[0].grid_size}")
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
        self.padded_size = tuple(side + extra for side, extra in zip(grid_size, overhang, strict=True))
        order, regions = lay_out_windows(self.padded_size, window_size, shift_size)
        buffers = {"order": order.flatten(), "inverse_order": order.flatten().argsort(), "regions": regions}
        for name, buffer in buffers.items():  # fixed by the shapes: not part of a checkpoint
            self.register_buffer(name, buffer, persistent=False)
        self.attn.register_buffer("relative_position_index", self.attn.relative_position_index, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map the grid's tokens ``(B, N, C)`` to features of the same shape."""
        return maybe_checkpointed(self._transform, tokens, self.use_checkpoint)

    def _transform(self, tokens: Tensor) -> Tensor:
        # Cast before adding: a sum of two types is several times slower on the CPU.
        tokens = tokens + self._attend(tokens).to(tokens.dtype)
        hidden = linear_after(partial(_normalise, self.norm2), self.mlp.linear1, tokens, *self.norm2.parameters())
        return tokens + linear_after(F.gelu, self.mlp.linear2, hidden).to(tokens.dtype)

    def _attend(self, tokens: Tensor) -> Tensor:
        """Normalise, and let the tokens of each window talk: ``(B, N, C)`` to the same shape."""
        qkv = linear_after(self._normalise_and_pad, self.attn.qkv, tokens, *self.norm1.parameters())
        # The projections look at one token at a time: only what lies between them needs the order of the windows.
        windows = reorder(qkv, self.order, self.inverse_order).unflatten(1, self.regions.shape)
        table, index = self.attn.relative_position_bias_table, self.attn.relative_position_index
        attended = window_attention(windows, table, index, self.regions if self.is_shifted else None)
        attended = reorder(attended.flatten(1, 2), self.inverse_order, self.order)
        if any(self.padding):
            d, h, w = self.grid_size
            attended = attended.unflatten(1, self.padded_size)[:, :d, :h, :w].flatten(1, 3)
        return self.attn.proj(attended)

    def _normalise_and_pad(self, tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        tokens = _normalise(self.norm1, tokens, weight, bias)
        return F.pad(tokens.unflatten(1, self.grid_size), self.padding).flatten(1, 3) if any(self.padding) else tokens


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


def window_attention(qkv: Tensor, table: Tensor, index: Tensor, regions: Tensor | None) -> Tensor:
    """Attention within windows, with a bias that all windows share.

    Args:
        qkv: ``(B, windows, n, 3C)``, queries, keys and values of the tokens.
        table: ``(offsets, heads)``, added to the logits of two tokens by the offset between them.
        index: ``(n, n)``, the place in the table of each pair of tokens.
        regions: ``(windows, n)``, the part of the grid that each token belongs to; tokens see those of their own alone.
            None: of one part, all of them.

    Returns:
        ``(B, windows, n, C)``.
    """
    recomputed = qkv.device.type == "cpu" and (_is_trained(qkv) or _is_trained(table))
    return (_RecomputedAttention.apply if recomputed else fused_attention)(qkv, table, index, regions)


def fused_attention(qkv: Tensor, table: Tensor, index: Tensor, regions: Tensor | None) -> Tensor:
    """As :func:`window_attention`, by PyTorch's fused kernels."""
    bias = look_up(table, index).to(qkv.dtype)
    parts = [
        join_heads(F.scaled_dot_product_attention(*split_heads(part, table.shape[1]), attn_mask=added), part.shape[1])
        for added, part in some_at_a_time(bias, regions, qkv)
    ]
    return torch.cat(parts, dim=1)


class _RecomputedAttention(torch.autograd.Function):
    """Attention for training on the CPU, where PyTorch's fused kernels have no gradient for the bias.

    Keeps queries, keys and values alone, and computes the attention again on the way back, some windows at a time.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, table: Tensor, index: Tensor, regions: Tensor | None) -> Tensor:
        ctx.save_for_backward(qkv, table, index, regions)
        return fused_attention(qkv, table, index, regions)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, attended_grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        qkv, table, index, regions = ctx.saved_tensors
        num_heads, scale = table.shape[1], (qkv.shape[-1] // 3 // table.shape[1]) ** -0.5
        bias = look_up(table, index)
        qkv_grads, bias_grad = [], torch.zeros_like(bias)
        for added, part, grad in some_at_a_time(bias.to(qkv.dtype), regions, qkv, attended_grad):
            query, key, value = split_heads(part, num_heads)
            (grad,) = split_heads(grad, num_heads, parts=1)
            query = query * scale
            with torch.enable_grad():
                logits = (query @ key.mT).add_(added).requires_grad_()
                probabilities = logits.softmax(-1)
            (logits_grad,) = torch.autograd.grad(probabilities, logits, grad @ value.mT)
            part_grads = [logits_grad @ key * scale, logits_grad.mT @ query, probabilities.detach().mT @ grad]
            qkv_grads.append(torch.cat([join_heads(part_grad, part.shape[1]) for part_grad in part_grads], dim=-1))
            bias_grad += logits_grad.sum(0, dtype=bias_grad.dtype)  # and not two types added: that is slow
        table_grad = torch.zeros_like(table.t()).index_add_(1, index.flatten(), bias_grad.flatten(1)).t()
        return torch.cat(qkv_grads, dim=1), table_grad, None, None


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """Take the biases ``(heads, n, n)`` of all pairs of tokens from the table ``(offsets, heads)``."""
    return table.t().index_select(1, index.flatten()).unflatten(1, index.shape)


def some_at_a_time(bias: Tensor, regions: Tensor | None, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Take some windows of tensors ``(B, windows, n, …)`` at a time, and first what to add to their logits.

    Yields:
        ``(B · some, heads, n, n)``, or one for all windows; and each tensor's ``(B, some, n, …)``.
    """
    batch_size, num_windows = tensors[0].shape[:2]
    at_once = num_windows
    if not torch.jit.is_tracing():  # what is traced must not depend on the size of the batch
        most = LOGITS_AT_ONCE.get(bias.device.type, LOGITS_AT_ONCE["cuda"])
        at_once = max(1, most // (batch_size * bias.numel()))
    for start in range(0, num_windows, at_once):
        some = slice(start, start + at_once)
        added = bias[None]
        if regions is not None:
            region = regions[some]
            # Minus infinity, where MONAI has -100: its exponential is denormal, which costs a hundred times a zero.
            apart = bias.new_zeros(()).where(region[:, :, None] == region[:, None], -inf)
            added = (bias + apart[:, None])[None].expand(batch_size, -1, -1, -1, -1).flatten(0, 1)
        yield added, *(tensor[:, some] for tensor in tensors)


def split_heads(tokens: Tensor, num_heads: int, parts: int = 3) -> Tensor:
    """Take ``(B, windows, n, parts · C)``, such as queries, keys and values, apart by part and head.

    Returns:
        ``(parts, B · windows, heads, n, C/heads)``.
    """
    return tokens.flatten(0, 1).unflatten(-1, (parts, num_heads, -1)).permute(2, 0, 3, 1, 4)


def join_heads(attended: Tensor, num_windows: int) -> Tensor:
    """Bring ``(B · windows, heads, n, C/heads)`` back to ``(B, windows, n, C)``."""
    return attended.transpose(1, 2).flatten(2).unflatten(0, (-1, num_windows))


def maybe_checkpointed(function: Callable[[Tensor], Any], inputs: Tensor, enabled: bool) -> Any:
    """Compute ``function(inputs)``; if enabled, keep the inputs alone and compute it again on the way back."""
    if enabled and torch.is_grad_enabled():
        return checkpoint(function, inputs, use_reentrant=False, preserve_rng_state=False)  # nothing in it is random
    return function(inputs)


def linear_after(function: Callable[..., Tensor], linear: nn.Linear, inputs: Tensor, *parameters: Tensor) -> Tensor:
    """Compute ``linear(function(inputs, *parameters))`` and keep the inputs alone for the way back.

    Args:
        function: cheap to compute twice.
        linear: the layer behind it.
        inputs: ``(B, N, C)``.
        parameters: of the function, which get a gradient too.
    """
    if _is_trained(inputs) or _is_trained(linear.weight):
        return _LinearAfter.apply(function, linear.weight, linear.bias, inputs, *parameters)
    return linear(function(inputs, *parameters))


class _LinearAfter(torch.autograd.Function):
    """See :func:`linear_after`. What autocast made of the weight is not kept either."""

    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Tensor], weight: Tensor, bias: Tensor, inputs: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.function = function
        device = inputs.device.type
        ctx.autocast = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
        }
        ctx.save_for_backward(weight, inputs, *parameters)
        return F.linear(function(inputs, *parameters), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *arguments = ctx.saved_tensors
        _, needs_weight, needs_bias, *needed = ctx.needs_input_grad
        with torch.enable_grad(), torch.autocast(**ctx.autocast, cache_enabled=False):
            arguments = [
                argument.detach().requires_grad_(need) for argument, need in zip(arguments, needed, strict=True)
            ]
            hidden = ctx.function(*arguments)
        rows = grad.flatten(0, -2)
        weight_grad = rows.T @ hidden.detach().flatten(0, -2).to(grad.dtype) if needs_weight else None
        bias_grad = rows.sum(0) if needs_bias else None
        grads = [None] * len(needed)
        if any(needed):
            wanted = [argument for argument in arguments if argument.requires_grad]
            found = iter(torch.autograd.grad(hidden, wanted, (grad @ weight.to(grad.dtype)).to(hidden.dtype)))
            grads = [next(found) if need else None for need in needed]
        return None, weight_grad, bias_grad, *grads


def _normalise(norm: nn.LayerNorm, tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(tokens, norm.normalized_shape, weight, bias, norm.eps)


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
