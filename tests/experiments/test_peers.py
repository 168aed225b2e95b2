"""Promises of the peer: MONAI's ViT-MAE, told which patches to hide, in the loop of BertsWin."""

import pytest
import torch
from conftest import noise, records, train
from monai.networks.nets import MaskedAutoEncoderViT

from scripts.experiments.peers import ViTMAE
from scripts.losses import MaskedL2Loss
from scripts.networks import patchify


def peer() -> ViTMAE:
    torch.manual_seed(0)
    return ViTMAE((32, 32, 48), 8, 1, 48, 2, 4, 24)


def test_it_computes_what_monais_network_computes():
    ours = peer()
    theirs = MaskedAutoEncoderViT(
        1,
        (32, 32, 48),
        8,
        48,
        192,
        2,
        4,
        decoder_hidden_size=24,
        decoder_mlp_dim=96,
        decoder_num_heads=4,
        qkv_bias=True,
    )
    theirs.load_state_dict(ours.state_dict())
    volume = noise(2, 1, 32, 32, 48)
    torch.manual_seed(1)
    patches, hidden = theirs(volume)
    out = ours(volume, masked=hidden.bool())
    torch.testing.assert_close(out["reconstructed_patches"], patches)
    assert torch.equal(out["mae_mask_1d"], hidden.float())
    assert torch.equal(patchify(out["reconstructed_cube"], 8), out["reconstructed_patches"])


def test_hidden_voxels_cannot_reach_the_reconstruction():
    network, volume = peer(), noise(1, 1, 32, 32, 48)
    masked = torch.arange(96)[None] >= 24
    changed = volume.clone()
    changed[:, :, 16:] += 100  # all of its patches are hidden
    outs = [network(image, masked=masked)["reconstructed_cube"] for image in (volume, changed)]
    assert torch.equal(*outs)


def test_it_learns_under_autocast():
    network, volume = peer(), noise(2, 1, 32, 32, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = network(volume)
    MaskedL2Loss()(out, patchify(volume, 8)).backward()
    assert network.patch_embedding.patch_embeddings.weight.grad.abs().sum() > 0


def test_patches_outside_the_field_of_view_are_refused():
    with pytest.raises(ValueError, match="field_of_view none"):
        peer()(noise(1, 1, 32, 32, 48), torch.ones(1, 96, dtype=torch.bool))


@pytest.mark.slow
def test_the_overlay_trains_it_by_the_same_command(cohort, tmp_path):
    ended = train(
        "train.yaml", "small.yaml", "peers/vit_mae.yaml", dataset_dir=cohort, output_dir=tmp_path, decoder_embed_dim=48
    )
    assert ended.returncode == 0, ended.stderr
    assert records(tmp_path)[-1]["val_unexplained"] > 0
    ViTMAE((32, 32, 32), 8, 1, 48, 2, 4, 48).load_state_dict(
        torch.load(tmp_path / "checkpoints/model.pt", weights_only=True)
    )
