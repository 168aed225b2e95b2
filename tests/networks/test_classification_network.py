"""Promises of the classification network: any encoder, either pooling, numbers in their unit."""

import pytest
import torch
from conftest import TINY, noise

from scripts import BertsWinEncoder
from scripts.networks import AttentionPooling, ClassificationNetwork

ENCODER = {name: value for name, value in TINY.items() if name != "decoder_embed_dim"}


def network(pooling="mean", **settings):
    torch.manual_seed(0)
    return ClassificationNetwork(BertsWinEncoder(**ENCODER), **{"out_channels": 3} | settings, pooling=pooling)


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_either_pooling_gives_a_row_of_logits_and_trains_every_weight(pooling):
    net = network(pooling)
    logits = net(noise(2, 1, 32, 32, 32))
    assert logits.shape == (2, 3)
    logits.square().mean().backward()
    unused = {name for name, weight in net.named_parameters() if weight.grad is None}
    assert not {name for name in unused if not name.startswith("encoder.swin.blocks")}


def test_the_mean_of_the_tokens_is_what_the_head_sees():
    net = network()
    volume = noise(2, 1, 32, 32, 32)
    expected = net.head(net.norm(net.encoder(volume).mean(dim=(2, 3, 4))))
    torch.testing.assert_close(net(volume), expected)


def test_attention_weighs_tokens_and_does_not_care_for_their_order():
    torch.manual_seed(0)
    pool, tokens = AttentionPooling(48), noise(2, 64, 48)
    pooled = pool(tokens)
    torch.testing.assert_close(pool(tokens.flip(1)), pooled)
    pool.query.data *= 1000
    assert not torch.allclose(pool(tokens), pooled, atol=1e-3)


def test_a_number_is_in_its_own_unit_and_the_unit_is_kept_with_the_weights():
    net = network(out_channels=1, mean=50.0, deviation=20.0)
    again = network(out_channels=1)
    again.load_state_dict(net.state_dict())
    volume = noise(2, 1, 32, 32, 32)
    torch.testing.assert_close(again(volume), net(volume))
    torch.nn.init.zeros_(net.head.weight)
    torch.nn.init.ones_(net.head.bias)
    assert net(volume).flatten().tolist() == [70.0, 70.0]


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_the_network_is_scripted(pooling):
    net, volume = network(pooling).eval(), noise(2, 1, 32, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(net)(volume), net(volume), rtol=1e-4, atol=1e-5)
