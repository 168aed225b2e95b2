"""Promises of the Swin blocks: MONAI's numbers, forward and back."""

import pytest
import torch
from conftest import noise
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.nets.swin_unetr import BasicLayer

from scripts.networks import SwinLayer

CASES = {
    "shifted": ((2, 2, 2), (4, 4, 4)),
    "padded": ((3, 2, 2), (4, 5, 3)),
    "one window along an axis": ((4, 2, 3), (4, 4, 6)),
    "one window": ((2, 3, 2), (2, 3, 2)),
    "windows of one token": ((1, 1, 2), (3, 2, 4)),
    "many windows": ((2, 2, 2), (8, 6, 7)),
}


def both(window_size, grid_size, **settings):
    """A SwinLayer, and MONAI's layer with the same weights, biases large enough to matter."""
    torch.manual_seed(0)
    ours = SwinLayer(24, 3, 2, window_size, grid_size, **settings)
    for name, parameter in ours.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter)
    monais = BasicLayer(24, 3, 2, window_size, drop_path=0.0, qkv_bias=True)
    for block in monais.blocks:
        block.attn.register_buffer("relative_position_index", block.attn.relative_position_index, persistent=False)
    monais.load_state_dict(ours.state_dict())  # strict: the same names and shapes
    return ours, monais


def outcome(layer, tokens, precision=torch.float32):
    """Features, and the gradients of the tokens and of every parameter."""
    tokens = tokens.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
        features = layer(tokens)
    weights = noise(*features.shape, seed=1)
    gradients = torch.autograd.grad((features.float() * weights).sum(), (tokens, *layer.parameters()))
    names = ["tokens", *(name for name, _ in layer.named_parameters())]
    return {"features": features.detach()} | dict(zip(names, gradients, strict=True))


def assert_same(outcome, expected, tolerance):
    """Bound the relative error of each tensor, as a whole."""
    for name, tensor in expected.items():
        error = (outcome[name].float() - tensor).norm() / tensor.norm()
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_features_and_gradients_are_those_of_monai(case, checkpointing):
    ours, monais = both(*CASES[case], activation_checkpointing=checkpointing)
    tokens = noise(2, 24, *CASES[case][1])
    assert_same(outcome(ours, tokens), outcome(monais, tokens), 1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), monais(tokens), rtol=1e-5, atol=1e-5)


def relative_errors(outcome, exact):
    return {name: ((outcome[name].float() - tensor).norm() / tensor.norm()).item() for name, tensor in exact.items()}


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_stays_within_a_hundredth_of_float32(case):
    ours, monais = both(*CASES[case])
    tokens = noise(2, 24, *CASES[case][1])
    exact = outcome(monais, tokens)
    errors = relative_errors(outcome(ours, tokens, torch.bfloat16), exact)
    assert errors["features"] < 1e-2
    norms = {name: tensor.norm() for name, tensor in exact.items() if name != "features"}
    whole = sum((errors[name] * norm) ** 2 for name, norm in norms.items()) ** 0.5
    assert whole < 1e-2 * sum(norm**2 for norm in norms.values()) ** 0.5  # the gradient as one vector
    for name, error in errors.items():  # parts of few numbers are noisier: in MONAI's own bfloat16, up to 0.02
        assert error < 4e-2, f"{name}: {error:.1e}"


@pytest.mark.parametrize("trained", [["norm1"], ["relative_position_bias_table"], ["qkv.bias"], ["linear2.weight"], []])
def test_what_is_frozen_does_not_change_the_gradient_of_the_rest(trained):
    ours, _ = both((2, 2, 2), (4, 3, 4))
    tokens = noise(2, 24, 4, 3, 4)
    everything = outcome(ours, tokens)
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_(any(part in name for part in trained))
    kept = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    tokens.requires_grad_()
    loss = (ours(tokens) * noise(2, 24, 4, 3, 4, seed=1)).sum()
    gradients = torch.autograd.grad(loss, (tokens, *kept.values()))
    expected = {name: everything[name] for name in ("tokens", *kept)}
    assert_same(dict(zip(expected, gradients, strict=True)), expected, 1e-6)


def test_a_layer_may_be_used_twice_in_a_graph_that_is_walked_back_twice():
    ours, monais = both((2, 2, 2), (4, 4, 4))
    tokens, gradients = noise(1, 24, 4, 4, 4), []
    for layer in (ours, monais):
        loss = (layer(layer(tokens)) * noise(1, 24, 4, 4, 4, seed=1)).sum()
        first = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
        again = torch.autograd.grad(loss, list(layer.parameters()))
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
        gradients.append(dict(enumerate(first)))
    assert_same(*gradients, 1e-5)


def test_tokens_of_another_grid_are_refused():
    ours, _ = both((2, 2, 2), (4, 2, 2))
    with pytest.raises(ValueError, match=r"grid of \(2, 4, 2\), built for \(4, 2, 2\)"):
        ours(noise(1, 24, 2, 4, 2))


@pytest.mark.parametrize("frozen", [False, True])
def test_no_attention_matrix_is_kept_for_the_way_back(frozen):
    ours, monais = both((4, 4, 4), (8, 8, 8))
    ours.requires_grad_(not frozen)
    kept = []
    for layer in (ours, monais):
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.setdefault(t.data_ptr(), t), lambda t: t):
            layer(noise(1, 24, 8, 8, 8).requires_grad_())
        kept.append(max(tensor.numel() for tensor in saved.values()))
    logits = 8 * 2 * 64 * 64  # windows, heads, tokens of a window squared
    assert kept[0] < logits <= kept[1]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 5)), min_size=3, max_size=3))
def test_any_window_in_any_grid_is_laid_out_like_monais(axes):
    window_size = tuple(window for window, _ in axes)
    grid_size = tuple(window + more for window, more in axes)
    ours, monais = both(window_size, grid_size)
    tokens = noise(1, 24, *grid_size)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), monais(tokens), rtol=1e-5, atol=1e-5)
