"""Promises of the network: what it sees, what it returns, what it refuses."""

import copy

import monai
import pytest
import torch
from conftest import REFERENCES, TINY, noise, tiny

import scripts
from scripts import BertsWinMAE, ConvDecoder, patchify
from scripts.networks import sincos_positions
from scripts.weights import convert_reference_state_dict


@pytest.mark.parametrize("path", REFERENCES, ids=lambda path: path.stem)
@torch.no_grad()
def test_outputs_match_the_authors_implementation(path):
    reference = torch.load(path, weights_only=True)
    wrapped = {f"module._orig_mod.{name}": value for name, value in reference["state_dict"].items()}
    model = BertsWinMAE(**reference["config"]).eval()
    model.load_state_dict(convert_reference_state_dict(wrapped))  # strict
    volume, expected = reference["input"], reference["expected"]

    out = model(volume, masked=expected["masked"])
    features, skips = model.extract_volumetric_features(volume, return_skips=True)
    outputs = {
        "reconstruction": out["reconstructed_cube"],
        "patch_features": model.extract_features(volume),
        "patch_features_valid": model.extract_features(volume, expected["valid_mask"]),
        "volumetric_features": features,
        "volumetric_reconstruction": model.decoder(model.encoder(volume)),
    }
    for name, output in outputs.items():
        torch.testing.assert_close(output, expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert len(skips) == len(expected.get("skips", skips))
    for skip, expected_skip in zip(skips, expected.get("skips", skips), strict=True):
        torch.testing.assert_close(skip, expected_skip, rtol=1e-5, atol=1e-5)
    positions = model.encoder.positions.flatten(2).mT
    torch.testing.assert_close(positions, reference["state_dict"]["pos_embed"], rtol=1e-5, atol=1e-6)


def test_a_foreign_state_dict_is_not_converted():
    with pytest.raises(ValueError, match=r"1 of 1 names are not those of the BertsWin reference network: layer1\.conv"):
        convert_reference_state_dict({"layer1.conv": torch.zeros(1)})


@pytest.mark.parametrize("strict_stem", [False, True])
def test_hidden_voxels_cannot_reach_the_features(strict_stem):
    model, volume = tiny(strict_stem=strict_stem), noise(1, 1, 32, 32, 32).requires_grad_()
    masked = scripts.random_masking(torch.ones(1, 64, dtype=torch.bool), 0.75, seeds=[0])
    features = model.encoder.encode(model.embed_visible(volume, ~masked))
    features.square().sum().backward()
    touched = patchify(volume.grad, 8).abs().amax(dim=-1) > 0
    assert torch.equal(touched, ~masked)  # gradient: every visible patch, no hidden one

    hidden_voxels = scripts.unpatchify(masked[..., None].expand(-1, -1, 512), 8, (4, 4, 4))
    other = torch.where(hidden_voxels, noise(1, 1, 32, 32, 32, seed=9) * 100, volume)
    assert torch.equal(features, model.encoder.encode(model.embed_visible(other, ~masked)))  # value


@torch.no_grad()
def test_patches_out_of_view_are_mask_tokens_and_never_scored():
    model, volume = tiny(), noise(2, 1, 32, 32, 32)
    valid = torch.rand(2, 64, generator=torch.Generator().manual_seed(1)) > 0.3
    changed = volume + 100 * scripts.unpatchify((~valid)[..., None].expand(-1, -1, 512), 8, (4, 4, 4))
    masked = scripts.random_masking(valid, 0.75, seeds=[0, 1])
    outs = [model(image, valid_for_masking_mask=valid, masked=masked) for image in (volume, changed)]
    assert torch.equal(outs[0]["reconstructed_cube"], outs[1]["reconstructed_cube"])
    assert torch.equal(outs[0]["mae_mask_1d"].bool(), masked & valid)
    assert torch.equal(model.extract_features(volume, valid), model.extract_features(changed, valid))


@torch.no_grad()
def test_train_and_inference_agree_on_the_encoder():
    model, volume = tiny(), noise(2, 1, 32, 32, 32)
    features, skips = model.extract_volumetric_features(volume, return_skips=True)
    assert torch.equal(model.encoder(volume), features)
    assert torch.equal(model.extract_volumetric_features(volume), features)
    tokens = model.extract_tokens(volume)
    assert tokens.shape == (2, 64, 48)
    assert torch.equal(model.encoder.encode(tokens.mT.reshape(2, 48, 4, 4, 4)), features)
    assert [tuple(skip.shape[1:]) for skip in skips] == [(8, 16, 16, 16), (16, 8, 8, 8), (32, 4, 4, 4)]


@torch.no_grad()
def test_with_blockwise_norm_patch_mode_and_volumetric_mode_are_one_function():
    volume, strict = noise(2, 2, 32, 32, 32), {"strict_stem": True, "in_chans": 2}
    model, plain = tiny(blockwise_norm=True, **strict), tiny(**strict)
    for module in model.encoder.stem.modules():  # not only at the initial scale of one
        if isinstance(module, torch.nn.GroupNorm):
            module.weight.normal_(1, 0.3)
            module.bias.normal_(0, 0.3)
    torch.testing.assert_close(model.encoder(volume), model.extract_features(volume), rtol=1e-5, atol=1e-5)
    plain.load_state_dict(model.state_dict())  # same weights, same pre-training
    masked = scripts.random_masking(torch.ones(2, 64, dtype=torch.bool), 0.75, seeds=[0, 1])
    outs = [network(volume, masked=masked)["reconstructed_cube"] for network in (model, plain)]
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)
    assert (plain.encoder(volume) - plain.extract_features(volume)).abs().max() > 0.1  # the gap without it


@torch.no_grad()
def test_patch_mode_of_the_whole_volume_is_pretraining_with_nothing_hidden():
    model, volume = tiny(), noise(1, 1, 32, 32, 32)
    out = model(volume, masked=torch.zeros(1, 64, dtype=torch.bool))
    assert torch.equal(out["reconstructed_cube"], model.decoder(model.extract_features(volume)))
    assert out["mae_mask_1d"].sum() == 0


@pytest.mark.parametrize("patch_size", [2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("channels", [1, 2])
@torch.no_grad()
def test_every_patch_size_rebuilds_a_volume_of_the_input_shape(patch_size, channels):
    sides = (2 * patch_size, 3 * patch_size, patch_size)
    model = tiny(img_size=sides, patch_size=patch_size, swin_window_size=(2, 2, 1), in_chans=channels, stem_base_dim=4)
    out = model(noise(1, channels, *sides))
    assert out["reconstructed_cube"].shape == (1, channels, *sides)
    assert out["reconstructed_patches"].shape == (1, 6, patch_size**3 * channels)
    assert model.encoder(noise(1, channels, *sides)).shape == (1, 48, 2, 3, 1)
    assert torch.equal(out["reconstructed_patches"], patchify(out["reconstructed_cube"], patch_size))


@torch.no_grad()
def test_the_same_seed_hides_the_same_patches_and_gives_the_same_output():
    model, volume = tiny(), noise(2, 1, 32, 32, 32)
    outs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outs.append(model(volume))
    assert torch.equal(outs[0]["reconstructed_cube"], outs[1]["reconstructed_cube"])
    assert not torch.equal(outs[0]["mae_mask_1d"], outs[2]["mae_mask_1d"])
    assert outs[0]["mae_mask_1d"].sum(dim=1).tolist() == [48, 48]


def test_positions_give_each_axis_its_third_in_the_order_depth_height_width():
    table = sincos_positions((2, 3, 4), 12)[0]
    for axis in range(3):
        own = table[4 * axis : 4 * axis + 4]
        others = tuple(other for other in range(1, 4) if other != axis + 1)
        assert (own - own.mean(dim=others, keepdim=True)).abs().max() < 1e-6  # varies along its own axis alone
    assert torch.allclose(table[:2, 1, 0, 0], torch.tensor([1.0, 0.01]).sin())  # sines first, base 10000
    assert torch.allclose(table[2:4, 1, 0, 0], torch.tensor([1.0, 0.01]).cos())


def test_a_checkpoint_holds_learned_parameters_only_and_so_fits_another_volume_size():
    small, large = tiny(), tiny(img_size=(32, 48, 40))
    assert small.state_dict().keys() == dict(small.named_parameters()).keys()
    large.load_state_dict(small.state_dict())


def test_weights_are_initialised_as_in_the_reference():
    model = tiny(encoder_embed_dim=192, encoder_num_heads=(4,))
    qkv = model.encoder.swin.blocks[0].attn.qkv
    assert qkv.weight.abs().max() <= (6 / (192 + 576)) ** 0.5  # xavier uniform
    assert qkv.bias.abs().max() == 0
    first = model.encoder.stem.stages[2][0].weight  # kaiming normal, fan out, of 27 · 32
    assert first.std().item() == pytest.approx((2 / (27 * 32)) ** 0.5, rel=0.05)
    assert model.mask_token.std().item() == pytest.approx(0.02, rel=0.3)


def test_importing_the_package_registers_the_network_with_monai():
    assert monai.networks.nets.BertsWinMAE is BertsWinMAE
    assert monai.networks.nets.BertsWinEncoder is scripts.BertsWinEncoder


def test_factories_build_the_networks_they_are_named_after():
    small = scripts.bertswin_mae_small_patch8_48x64x48()
    assert (small.encoder.img_size, small.encoder.num_patches) == ((48, 64, 48), 6 * 8 * 6)
    with torch.device("meta"):
        base = scripts.bertswin_mae_base_patch16_224(in_chans=2)
    assert base.encoder.grid_size == (14, 14, 14)
    assert len(base.encoder.swin.blocks) == 12
    assert base.encoder.in_chans == 2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"img_size": (32, 30, 32)}, r"img_size \(32, 30, 32\) must be divisible by patch_size 8 .* \(32, 32, 32\)"),
        ({"swin_window_size": (5, 2, 2)}, r"swin_window_size \(5, 2, 2\) must .* grid .* \(4, 4, 4\).* \(4, 2, 2\)"),
        ({"patch_size": 12}, r"patch_size 12 must be a power of two from 2 to 64"),
        ({"patch_size": 128}, r"patch_size 128 must be a power of two from 2 to 64"),
        ({"encoder_depths": (2, 2)}, r"encoder_depths \[2, 2\] must hold exactly one .* example \[2\]"),
        ({"encoder_num_heads": (3, 6)}, r"encoder_num_heads \[3, 6\] must hold exactly one"),
        ({"encoder_embed_dim": 50}, r"encoder_embed_dim 50 must be a positive multiple of 6 .* example 54"),
        ({"encoder_num_heads": (5,)}, r"encoder_num_heads \[5\] must divide encoder_embed_dim 48, for example \[4\]"),
        ({"mask_ratio": 1.0}, r"mask_ratio 1.0 must lie in \[0, 1\)"),
        ({"mask_ratio": -0.1}, r"mask_ratio -0.1 must lie in \[0, 1\)"),
        ({"stem_base_dim": 6}, r"stem_base_dim 6 must be a positive multiple of 4 .* example 8"),
        ({"blockwise_norm": True}, r"blockwise_norm needs strict_stem=True"),
        ({"in_chans": 0}, r"in_chans 0 must be at least 1"),
        ({"decoder_embed_dim": 0}, r"decoder_embed_dim 0 must be positive"),
    ],
)
def test_settings_that_cannot_be_built_are_refused_with_one_that_can(setting, message):
    with pytest.raises(ValueError, match=message):
        BertsWinMAE(**(TINY | setting))


@pytest.mark.parametrize("method", ["forward", "extract_features", "extract_volumetric_features", "extract_tokens"])
@pytest.mark.parametrize("shape", [(1, 1, 32, 32, 40), (1, 2, 32, 32, 32), (32, 32, 32)])
def test_a_volume_of_another_shape_is_refused(method, shape):
    with pytest.raises(ValueError, match=r"volume has shape .* but this network takes .* \('B', 1, 32, 32, 32\)"):
        getattr(tiny(), method)(torch.zeros(shape))


@pytest.mark.parametrize("name", ["masked", "valid_for_masking_mask"])
@pytest.mark.parametrize("mask", [torch.ones(1, 63, dtype=torch.bool), torch.ones(1, 64)])
def test_a_mask_of_another_shape_or_type_is_refused(name, mask):
    with pytest.raises(ValueError, match=rf"{name} has shape .* but must be \(B, N\) = \(1, 64\) and torch.bool"):
        tiny()(torch.zeros(1, 1, 32, 32, 32), **{name: mask})


def test_large_volumes_are_rebuilt_as_exactly_as_small_ones():
    torch.manual_seed(0)
    decoder = ConvDecoder(48, 32, 16, 1)
    features = noise(1, 48, 8, 8, 8)
    with torch.no_grad():
        exact = copy.deepcopy(decoder).double()(features.double())
        # PyTorch's group norm of channels last errs by a thousandth here.
        torch.testing.assert_close(decoder(features).double(), exact, rtol=1e-5, atol=1e-5)
