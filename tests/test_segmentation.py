"""Promises of the segmentation network: any encoder, frozen then trained, scored and used on volumes of any size."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TINY_KNOBS, bundle, noise, records, tiny, trainer, write_volume
from ignite.engine import Events
from monai.bundle import ConfigWorkflow

from scripts import BertsWinEncoder, parallel
from scripts.engines import LogitsWindowInferer
from scripts.experiments.peers import ViTEncoder
from scripts.metrics import BoundedHausdorffMetric
from scripts.networks import SegmentationNetwork
from scripts.workflows import FreezeEncoder, build_encoder, from_scratch, parameter_groups

ENCODER = {name: value for name, value in TINY.items() if name not in ("decoder_embed_dim", "mask_ratio")}


def encoder(kind="strict", patch_size=8, in_chans=1):
    torch.manual_seed(0)
    if kind == "vit":
        return ViTEncoder((32, 32, 32), patch_size, in_chans, 48, 4, 4)
    grid = 32 // patch_size
    return BertsWinEncoder(
        **ENCODER
        | {"patch_size": patch_size, "in_chans": in_chans, "swin_window_size": min(2, grid)}
        | {"strict_stem": kind != "default", "blockwise_norm": kind == "blockwise"}
    )


@pytest.mark.parametrize("kind", ["strict", "default", "blockwise", "vit"])
@pytest.mark.parametrize("patch_size", [2, 8, 16])
def test_any_encoder_and_patch_size_gives_logits_of_every_voxel(kind, patch_size):
    network = SegmentationNetwork(encoder(kind, patch_size, in_chans=2), out_channels=3, feature_size=4)
    logits = network(noise(1, 2, 32, 32, 32))
    assert logits.shape == (1, 3, 32, 32, 32)
    logits.square().mean().backward()
    without = {name for name, parameter in network.named_parameters() if parameter.grad is None}
    assert not {name for name in without if "norm_cross_attn" not in name and "position_embeddings" not in name}


def test_every_skip_reaches_the_logits():
    network = SegmentationNetwork(encoder(), out_channels=2, feature_size=4).eval()
    volume = noise(1, 1, 32, 32, 32)
    *skips, features = network.encoder.forward_with_skips(volume)
    with torch.no_grad():
        before = network(volume)
        for place in (0, 1, 3):  # 2 lies on the grid of the features, which hold it
            changed = [*skips, features]
            changed[place] = changed[place] + noise(*changed[place].shape)
            network.encoder.forward_with_skips = lambda _, changed=changed: changed
            assert not torch.allclose(network(volume), before, atol=1e-3)


def test_parameters_are_divided_into_two_groups_each_once():
    network = SegmentationNetwork(encoder(), 2, 4)
    decoder, encoding = parameter_groups(network, 1e-3, 1e-4)
    assert (decoder["lr"], encoding["lr"]) == (1e-3, 1e-4)
    names = [id(parameter) for group in (decoder, encoding) for parameter in group["params"]]
    assert sorted(names) == sorted(id(parameter) for parameter in network.parameters())
    (only,) = parameter_groups(torch.nn.Linear(2, 2), 1e-3, 1e-4)
    assert only["lr"] == 1e-3


def test_the_encoder_is_left_alone_for_the_first_epochs():
    network = tiny()
    before = network.encoder.swin.blocks[0].mlp.linear1.weight.clone()
    engine = trainer(network, epochs=3)
    FreezeEncoder(network, 2).attach(engine)
    moved = []

    @engine.on(Events.EPOCH_COMPLETED)
    def look():
        moved.append(not torch.equal(network.encoder.swin.blocks[0].mlp.linear1.weight, before))

    engine.run()
    assert moved == [False, False, True]


def test_a_missed_structure_is_as_far_as_the_volume_is_long():
    truth = torch.zeros(1, 3, 6, 8, 24)
    truth[:, 1, 2, 2, 2], truth[:, 2, 3, 3, 3] = 1, 1
    found = truth.clone()
    found[:, 2] = 0
    for pair in ((found, truth), (truth, found)):  # missed, and found where it is not
        metric = BoundedHausdorffMetric(include_background=False)
        metric(*pair)
        assert metric.aggregate().item() == pytest.approx(26 / 2)  # 0 for the first, the diagonal for the second


def test_large_and_small_volumes_are_covered_by_windows():
    network = SegmentationNetwork(encoder(), 2, 4).eval()
    inferer = LogitsWindowInferer([32, 32, 32], 0.5, 2, -1.0, "fp32", "cpu")
    with torch.no_grad():
        for shape in ((20, 32, 50), (9, 9, 9)):
            assert inferer(noise(1, 1, *shape), network).shape == (1, 2, *shape)
        volume = noise(1, 1, 32, 32, 32)
        torch.testing.assert_close(inferer(volume, network), network(volume), rtol=1e-4, atol=1e-5)


def test_the_kind_of_stem_is_read_off_the_weights_and_others_are_refused(tmp_path):
    for strict in (True, False):
        torch.save(tiny(strict_stem=strict).state_dict(), tmp_path / "model.pt")
        assert build_encoder(ENCODER | {"strict_stem": None}, tmp_path / "model.pt").strict_stem == strict
        with pytest.raises(ValueError, match="leave strict_stem out"):
            build_encoder(ENCODER | {"strict_stem": not strict}, tmp_path / "model.pt")
    assert build_encoder(ENCODER | {"strict_stem": None}, None).strict_stem


@pytest.fixture(scope="module")
def labelled_cohort(tmp_path_factory):
    """Six volumes whose bright half is label 1, in an orientation of their own, and a list that names their classes."""
    folder = tmp_path_factory.mktemp("labelled")
    training = []
    for number in range(6):
        path = write_volume(folder / "imagesTr" / f"{number}.nii.gz", seed=number, shape=(30, 40, 28))
        image = nib.load(path)
        affine = np.diag([-1.0, -1.0, 1.0, 1.0])
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine), path)
        (folder / "labelsTr").mkdir(exist_ok=True)
        label = (np.asarray(image.dataobj) > 500).astype(np.uint8)
        nib.save(nib.Nifti1Image(label, affine), folder / "labelsTr" / path.name)
        names = {"image": f"imagesTr/{path.name}", "label": f"labelsTr/{path.name}", "class": f"class {number % 2}"}
        training.append(names)
    (folder / "dataset.json").write_text(json.dumps({"training": training}))
    return folder


FINETUNING = {name: value for name, value in TINY_KNOBS.items() if name != "figure_interval"} | {
    "num_labels": 1,
    "feature_size": 4,
    "freeze_epochs": 1,
    "num_workers": 0,
}


def finetune(*overlays, run="finetuning", **knobs):
    names = ("finetune_segmentation.yaml", "small.yaml", *overlays)
    files = str([str(ROOT / "configs" / name) for name in names])
    return bundle("run", run, "--config_file", files, **(FINETUNING | knobs))


@pytest.mark.slow
@pytest.mark.parametrize("strict_stem", [True, False])
def test_finetuning_scores_every_case_and_prediction_writes_masks_on_the_files_voxels(
    labelled_cohort, tmp_path, strict_stem
):
    torch.save(tiny(strict_stem=strict_stem).state_dict(), tmp_path / "model.pt")
    settings = {"dataset_dir": labelled_cohort, "output_dir": tmp_path / "out"}
    result = finetune(pretrained=tmp_path / "model.pt", num_train_cases=3, max_epochs=3, val_interval=2, **settings)
    assert result.returncode == 0, result.stderr
    assert [record["epoch"] for record in records(tmp_path / "out")] == [2, 3]
    assert 0 < records(tmp_path / "out")[-1]["val_dice"] <= 1
    with (tmp_path / "out" / "val_dice_raw.csv").open() as file:
        rows = list(csv.reader(file))
    assert len(rows) > 1
    assert rows[1][0].startswith("imagesTr/")

    again = finetune(num_train_cases=4, resume="true", **settings)
    assert again.returncode == 1
    assert "num_train_cases 3, not 4" in again.stderr

    masks = tmp_path / "masks"
    checkpoints = {"ckpt_dir": tmp_path / "out" / "checkpoints", "spacing": "[1.2, 1.1, 1.0]"}
    predicted = finetune(run="prediction", **(settings | checkpoints | {"output_dir": masks}))
    assert predicted.returncode == 0, predicted.stderr
    for path in (labelled_cohort / "imagesTr").iterdir():
        image, mask = nib.load(path), nib.load(masks / "imagesTr" / path.name)
        assert mask.shape == image.shape
        assert np.allclose(mask.affine, image.affine)
        assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 1}


@pytest.mark.slow
@pytest.mark.parametrize("overlay", ["vit_segmentation.yaml", "unetr.yaml", "unet.yaml"])
def test_monais_networks_are_finetuned_by_the_same_command(labelled_cohort, tmp_path, overlay):
    result = finetune(f"peers/{overlay}", dataset_dir=labelled_cohort, output_dir=tmp_path, max_epochs=2)
    assert result.returncode == 0, result.stderr
    assert records(tmp_path)[-1]["val_hausdorff"] > 0


@pytest.mark.slow
def test_a_decoder_learns_what_a_frozen_encoder_shows(labelled_cohort, tmp_path):
    torch.save(tiny(strict_stem=True).state_dict(), tmp_path / "model.pt")
    knobs = {"max_epochs": 12, "freeze_epochs": 12, "iterations_per_epoch": 8, "affine_prob": 0, "learning_rate": 0.01}
    settings = {"dataset_dir": labelled_cohort, "pretrained": tmp_path / "model.pt", "val_interval": 6}
    result = finetune(output_dir=tmp_path / "out", **settings, **knobs)
    assert result.returncode == 0, result.stderr
    assert records(tmp_path / "out")[-1]["val_dice"] > 0.7  # all of it, or a coin, scores 0.67
    trained = torch.load(tmp_path / "out" / "checkpoints" / "model.pt", weights_only=True)
    for name, weight in torch.load(tmp_path / "model.pt", weights_only=True).items():
        if name.startswith("encoder."):
            assert torch.equal(trained[name], weight)


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["none of the cases has a label", "num_train_cases 99 is more than the"])
def test_a_finetuning_without_enough_labels_is_refused(labelled_cohort, cohort, tmp_path, problem):
    settings = {"dataset_dir": cohort} if "none" in problem else {"dataset_dir": labelled_cohort, "num_train_cases": 99}
    result = finetune(output_dir=tmp_path, **settings)
    assert result.returncode == 1
    assert problem in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_volume_that_cannot_be_segmented_does_not_stop_the_others_and_scans_are_not_overwritten(
    labelled_cohort, tmp_path
):
    network = SegmentationNetwork(encoder(), out_channels=2, feature_size=4)
    (tmp_path / "checkpoints").mkdir()
    torch.save(network.state_dict(), tmp_path / "checkpoints" / "model.pt")
    scans = tmp_path / "scans"
    scans.mkdir()
    good = nib.load(labelled_cohort / "imagesTr" / "0.nii.gz")
    nib.save(good, scans / "good.nii.gz")
    nib.save(nib.Nifti1Image(np.full((9, 9, 9), np.nan, np.float32), np.eye(4)), scans / "bad.nii.gz")
    (scans / "cut.nii.gz").write_bytes((scans / "good.nii.gz").read_bytes()[:500])
    knobs = {"run": "prediction", "dataset_dir": scans, "ckpt_dir": tmp_path / "checkpoints"}
    result = finetune(**knobs, output_dir=tmp_path / "masks")
    assert result.returncode == 1
    assert "2 of 3 volumes could not be segmented" in result.stderr
    assert "bad: has 729 voxels that are NaN" in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in (tmp_path / "masks").iterdir()] == ["good.nii.gz"]

    result = finetune(**knobs, output_dir=scans)
    assert result.returncode == 1
    assert "good: its label map would overwrite it" in result.stderr
    assert np.array_equal(nib.load(scans / "good.nii.gz").dataobj, good.dataobj)


@pytest.mark.slow
def test_the_config_has_what_monai_wants_of_a_training(labelled_cohort, tmp_path):
    files = [str(ROOT / "configs" / name) for name in ("finetune_segmentation.yaml", "small.yaml")]
    settings = FINETUNING | {"dataset_dir": str(labelled_cohort), "output_dir": str(tmp_path)}
    workflow = ConfigWorkflow(files, workflow_type="train", **settings)
    workflow.initialize()
    assert workflow.check_properties() == []


def test_weights_for_a_network_without_an_encoder_are_refused():
    network = torch.nn.Conv3d(1, 2, 1)
    assert from_scratch(network, None) is network
    with pytest.raises(ValueError, match="Conv3d starts from random weights: leave --pretrained out"):
        from_scratch(network, "model.pt")


def test_several_processes_are_refused():
    with pytest.raises(ValueError, match="this workflow runs in one process"):
        parallel.distribute(tiny(), "cpu", mode="none")
