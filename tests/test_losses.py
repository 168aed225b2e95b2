"""Promises of the losses."""

import torch
from conftest import noise

from scripts.losses import MaskedL2Loss


def output(patches, hidden):
    return {"reconstructed_patches": patches, "mae_mask_1d": hidden}


def test_the_loss_sees_only_hidden_patches():
    prediction, target = noise(2, 6, 8).requires_grad_(), noise(2, 6, 8, seed=1)
    hidden = torch.tensor([[1, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0]])
    loss = MaskedL2Loss()(output(prediction, hidden), target)
    loss.backward()
    expected = (prediction - target)[hidden.bool()].square().mean()
    torch.testing.assert_close(loss, expected)
    assert torch.equal(prediction.grad.abs().sum(dim=-1) > 0, hidden.bool())


def test_nothing_hidden_costs_nothing():
    assert MaskedL2Loss()(output(noise(1, 4, 8), torch.zeros(1, 4)), noise(1, 4, 8, seed=1)) == 0


def test_half_precision_predictions_are_scored_in_float32():
    loss = MaskedL2Loss()(output(torch.full((1, 2, 8), 300.0).half(), torch.ones(1, 2)), torch.zeros(1, 2, 8))
    assert loss.dtype == torch.float32
    assert loss == 90000  # beyond what half precision holds
