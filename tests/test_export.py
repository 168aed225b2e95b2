"""Promises of MONAI's tools on this bundle: verify, export, load."""

import copy
import shutil

import monai.bundle
import numpy as np
import pytest
import torch
from conftest import bundle, copy_bundle, noise

from scripts import bertswin_mae_small_patch8_48x64x48, from_pretrained
from scripts.networks import SegmentationNetwork

CONFIG, META = "configs/inference.json", "configs/metadata.json"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def encoder():
    """One of the size that inference.json describes."""
    torch.manual_seed(3)
    size = {"img_size": 64, "swin_window_size": 4}
    return bertswin_mae_small_patch8_48x64x48(**size).encoder.eval()


@pytest.fixture(scope="module")
def weights(encoder, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(encoder.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def volume():
    return noise(1, 1, 64, 64, 64)


def agrees(output, encoder, volume, tolerance):
    with torch.no_grad():
        torch.testing.assert_close(torch.as_tensor(output), encoder(volume), rtol=tolerance, atol=tolerance)


def test_verify_net_in_out_agrees_with_the_metadata():
    result = bundle(
        "verify_net_in_out", "--net_id", "network_def", "--config_file", CONFIG, "--meta_file", META, device="cpu"
    )
    assert result.returncode == 0, result.stderr
    assert "data shape of network is verified with no error" in result.stdout + result.stderr


@pytest.mark.parametrize("options", [(), ("--use_trace", "True")], ids=["script", "trace"])
def test_ckpt_export_writes_a_torchscript_that_computes_the_same(options, weights, encoder, volume, tmp_path):
    result = bundle(
        *("ckpt_export", "--net_id", "network_def", "--config_file", CONFIG, "--meta_file", META, *options),
        ckpt_file=weights,
        pretrained=weights,
        filepath=tmp_path / "model.ts",
    )
    assert result.returncode == 0, result.stderr
    script, metadata, _ = monai.data.load_net_with_metadata(tmp_path / "model.ts", map_location="cpu")
    with torch.no_grad():
        agrees(script(volume), encoder, volume, 1e-5)
        several = noise(3, 1, 64, 64, 64, seed=1)  # traced with one
        agrees(script(several), encoder, several, 1e-5)
    assert metadata["name"] == "BertsWinMAE"


def test_ckpt_export_needs_no_option(volume, tmp_path):
    result = bundle("ckpt_export", "--config_file", CONFIG, filepath=tmp_path / "model.ts")
    assert result.returncode == 0, result.stderr
    script, _, _ = monai.data.load_net_with_metadata(tmp_path / "model.ts", map_location="cpu")
    # Float32 alone rounds the large features of trained weights by more than 1e-5: both are compared with exact ones.
    encoder = from_pretrained(device="cpu")
    with torch.no_grad():
        exact = copy.deepcopy(encoder).double()(volume.double())
        rounding, exported = ((features - exact).abs().max() for features in (encoder(volume), script(volume)))
        agrees(torch.jit.script(encoder.encoder.double())(volume.double()), encoder, volume.double(), 1e-5)
    assert exported < 2 * rounding < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("blockwise_norm", [False, True])
def test_encoders_and_what_stands_on_them_can_be_scripted(blockwise_norm, tmp_path):
    torch.manual_seed(3)
    encoder = bertswin_mae_small_patch8_48x64x48(strict_stem=blockwise_norm, blockwise_norm=blockwise_norm).encoder
    head = torch.nn.Sequential(encoder, torch.nn.Flatten(2))
    several = noise(2, 1, 48, 64, 48)
    for network in (encoder, SegmentationNetwork(encoder, out_channels=3, feature_size=4), head):
        with torch.no_grad():
            expected = network.eval()(several)
            torch.jit.script(network).save(tmp_path / "network.ts")
            loaded = torch.jit.load(tmp_path / "network.ts")
            torch.testing.assert_close(loaded(several), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("blockwise_norm", [False, True])
def test_a_scripted_network_can_be_cast_to_another_precision(blockwise_norm):
    torch.manual_seed(3)
    encoder = bertswin_mae_small_patch8_48x64x48(strict_stem=blockwise_norm, blockwise_norm=blockwise_norm).encoder
    for block in encoder.swin.blocks:
        torch.nn.init.normal_(block.attn.relative_position_bias_table)  # new ones are all but zero
    several = noise(2, 1, 48, 64, 48).double()
    for network in (SegmentationNetwork(encoder, out_channels=3, feature_size=4), encoder):
        scripted = torch.jit.script(copy.deepcopy(network).eval()).double()  # casts what it was made of, too
        with torch.no_grad():
            exact = copy.deepcopy(network).double()(several)
            torch.testing.assert_close(scripted(several), exact, rtol=1e-9, atol=1e-9)
            coarse = scripted.to(torch.bfloat16)(several.bfloat16())
        assert coarse.dtype == torch.bfloat16
        assert (coarse.double() - exact).std() < 0.1 * exact.std()


def test_onnx_export_agrees_with_onnxruntime(weights, encoder, volume, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    result = bundle(
        *("onnx_export", "--net_id", "network_def", "--config_file", CONFIG, "--meta_file", META),
        ckpt_file=weights,
        pretrained=weights,
        filepath=tmp_path / "model.onnx",
    )
    assert result.returncode == 0, result.stderr
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: volume.numpy()})
    assert output.dtype == np.float32
    agrees(output, encoder, volume, 1e-4)


@pytest.mark.parametrize("blockwise_norm", [False, True])
def test_torch_export_captures_the_encoder(blockwise_norm):
    torch.manual_seed(3)
    encoder = bertswin_mae_small_patch8_48x64x48(strict_stem=blockwise_norm, blockwise_norm=blockwise_norm).encoder
    program = torch.export.export(encoder.eval(), (noise(1, 1, 48, 64, 48),))
    other = noise(1, 1, 48, 64, 48, seed=1)
    agrees(program.module()(other), encoder, other, 1e-5)


def test_bundle_load_returns_the_network_with_the_checkpoints_weights(weights, encoder, volume, tmp_path, monkeypatch):
    folder = tmp_path / "bundles" / "bertswin_mae"
    copy_bundle(folder)
    shutil.copy(weights, folder / "models" / "model.pt")
    monkeypatch.chdir(tmp_path)
    network = monai.bundle.load(
        "bertswin_mae", bundle_dir=str(tmp_path / "bundles"), workflow_type="inference", source="github", device="cpu"
    )
    loaded = network.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in encoder.state_dict().items())
    with torch.no_grad():
        agrees(network.eval()(volume), encoder, volume, 1e-6)
