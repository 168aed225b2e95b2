"""Promises of compiled networks: the same numbers, weights and files, and off where it would not help."""

import copy

import pytest
import torch
from conftest import TINY_KNOBS, noise, records, tiny, train

from scripts.engines import can_compile, compile_parts
from scripts.losses import MaskedL2Loss
from scripts.networks import SegmentationNetwork, patchify


def compiled_parts(network):
    return [name for name, module in network.named_modules() if module._compiled_call_impl is not None]


def test_blocks_and_decoder_are_compiled_in_place_and_nothing_by_default_on_a_cpu():
    network = tiny()
    assert compile_parts(network, "auto", "cpu") is compile_parts(network, False, "cuda") is network
    assert compiled_parts(network) == []
    before = list(network.state_dict())
    compile_parts(network, True, "cpu")
    assert compiled_parts(network) == [
        *(f"encoder.swin.blocks.{block}" for block in range(2)),
        "decoder",
    ]
    assert list(network.state_dict()) == before
    # Dynamo passes over what torch.nn itself defines.
    parts = [network.get_submodule(name) for name in compiled_parts(network)]
    assert {type(part).forward.__module__.partition(".")[0] for part in parts} == {"scripts"}
    assert compiled_parts(copy.deepcopy(network)) == []


def test_a_segmentation_network_is_compiled_with_the_levels_of_its_decoder():
    network = compile_parts(SegmentationNetwork(tiny().encoder, 2, feature_size=4), True, "cpu")
    assert compiled_parts(network)[-3:] == ["levels.0", "levels.1", "levels.2"]


def test_compiling_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("CC", "no-such-compiler")
    assert not can_compile("cpu")
    assert not can_compile("cuda")
    monkeypatch.setattr(compile_parts.__globals__["shutil"], "which", lambda _: "/usr/bin/cc")
    assert can_compile("cpu")


needs_a_compiler = pytest.mark.skipif(not can_compile("cpu"), reason="no C++ compiler")


@pytest.mark.slow
@needs_a_compiler
@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing": True}])
def test_a_compiled_network_gives_the_same_loss_and_gradients(settings):
    eager = tiny(**settings).train()
    compiled = compile_parts(copy.deepcopy(eager), True, "cpu")
    volume, masked = noise(2, 1, 32, 32, 32), torch.arange(64).expand(2, 64) % 4 > 0
    for network in (eager, compiled):
        MaskedL2Loss()(network(volume, masked=masked), patchify(volume, 8)).backward()
    for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
@needs_a_compiler
def test_a_compiled_training_is_resumed_without_it_and_gives_the_weights_of_an_eager_one(cohort, tmp_path):
    def run(name, **knobs):
        settings = TINY_KNOBS | {"dataset_dir": cohort, "output_dir": tmp_path / name, "accumulation_steps": 2} | knobs
        settings |= {"precision": "fp32"}
        result = train(**settings)
        assert result.returncode == 0, result.stderr
        return records(tmp_path / name)[-1], torch.load(tmp_path / name / "checkpoints" / "model.pt", weights_only=True)

    run("compiled", compile="true", max_epochs=1)
    (ours, weights), (theirs, expected) = run("compiled", resume="true"), run("eager")
    assert weights.keys() == expected.keys()
    assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-3)
    ours, theirs = (torch.cat([made[name].flatten() for name in expected]) for made in (weights, expected))
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()  # two steps of a thousandth move them by ten times as much


@pytest.mark.thorough
@pytest.mark.slow
@needs_a_compiler
def test_a_compiled_segmentation_takes_batches_of_several_sizes_with_gradients_and_without():
    torch.manual_seed(0)
    eager = SegmentationNetwork(tiny().encoder, 2, feature_size=4)
    compiled = compile_parts(copy.deepcopy(eager), True, "cpu")
    for batch in (2, 1):
        volume = noise(batch, 1, 32, 32, 32)
        for network in (eager, compiled):
            network.zero_grad()
            network(volume).square().mean().backward()
        for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-3)
        with torch.no_grad():
            torch.testing.assert_close(compiled(volume), eager(volume), atol=1e-5, rtol=1e-4)
