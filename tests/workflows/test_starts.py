"""Promises of the start by starts in closed form: they say what the features tell, before any step, and once."""

import pytest
import torch
from conftest import TINY, noise
from ignite.engine import Engine
from monai.engines import PrepareBatchExtraInput
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from scripts import BertsWinEncoder
from scripts.engines import LogitsInferer
from scripts.networks import SegmentationNetwork
from scripts.workflows import DiscriminantStart, discriminants

ENCODER = {name: value for name, value in TINY.items() if name not in ("decoder_embed_dim", "mask_ratio")}


def normal_tokens(count=4000):
    """Tokens of three classes with means of their own and one covariance, and the class of each."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), count, replacement=True, generator=generator)
    spread = torch.eye(5) + 0.3 * torch.randn(5, 5, generator=generator)
    means = torch.randn(3, 5, generator=generator)
    return means[classes] + torch.randn(count, 5, generator=generator) @ spread / 2, classes


def fitted(tokens, classes, rank):
    rows = torch.cat([tokens, torch.ones(len(tokens), 1)], dim=1).double()
    targets = torch.nn.functional.one_hot(classes, 3).double()
    return discriminants(rows.T @ rows / len(rows), rows.T @ targets / len(rows), 3, rank)


def network(patch_size=8, out_channels=3):
    torch.manual_seed(0)
    return SegmentationNetwork(BertsWinEncoder(**ENCODER | {"patch_size": patch_size}), out_channels, feature_size=4)


def started(network, batches):
    engine = Engine(lambda *_: None)
    engine.state.device = torch.device("cpu")
    DiscriminantStart(network, batches, PrepareBatchExtraInput([]), LogitsInferer("fp32", "cpu")).start(engine)
    return network.eval()


@pytest.fixture
def halves():
    """Volumes that are bright in one half, which is labelled."""
    volume, label = noise(4, 1, 32, 32, 32) / 4, torch.zeros(4, 1, 32, 32, 32)
    volume[:, :, :16] += 2
    label[:, :, :16] = 2
    return {"image": volume, "label": label}


def test_the_classes_are_told_apart_as_by_scikit_learn():
    tokens, classes = normal_tokens()
    reduce, expand, bias = fitted(tokens, classes, rank=5)
    found = (tokens @ reduce @ expand + bias).argmax(dim=1)
    expected = LinearDiscriminantAnalysis().fit(tokens, classes).predict(tokens)
    assert (found.numpy() == expected).mean() > 0.98


def test_two_coordinates_suffice_for_three_classes_and_more_are_zeros():
    tokens, classes = normal_tokens()
    logits = [tokens @ reduce @ expand + bias for reduce, expand, bias in
              (fitted(tokens, classes, rank) for rank in (2, 5, 64))]  # fmt: skip
    assert torch.allclose(logits[0], logits[1], atol=1e-4)
    assert torch.allclose(logits[0], logits[2], atol=1e-4)
    assert not torch.allclose(logits[0], tokens @ torch.zeros(5, 3), atol=1e-2)


@pytest.mark.parametrize("patch_size", [4, 8, 16])
def test_a_network_segments_before_its_first_step(patch_size, halves):
    found = started(network(patch_size), [halves])(halves["image"]).argmax(dim=1, keepdim=True)
    assert (found == halves["label"]).float().mean() > 0.95


def test_a_class_that_no_draw_shows_is_told_nowhere(halves):
    found = started(network(out_channels=4), [halves])(halves["image"])
    assert torch.isfinite(found).all()
    assert not {1, 3} & set(found.argmax(dim=1).flatten().tolist())


def test_a_network_that_was_trained_keeps_what_it_has_learned(halves):
    goes_on = network()
    torch.nn.init.normal_(goes_on.token_head.expand.weight)
    before = {name: value.clone() for name, value in goes_on.state_dict().items()}
    started(goes_on, [halves])
    assert all(torch.equal(value, before[name]) for name, value in goes_on.state_dict().items())


def test_the_encoder_is_not_touched(halves):
    encoder = network().encoder.state_dict()
    assert all(
        torch.equal(value, encoder[name]) for name, value in started(network(), [halves]).encoder.state_dict().items()
    )


def test_features_that_say_nothing_leave_the_map_at_zero(halves, caplog):
    silent = network()
    for parameter in silent.encoder.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    assert not started(silent, [halves]).token_head.expand.weight.any()
    assert "no linear map can be fitted" in caplog.text
