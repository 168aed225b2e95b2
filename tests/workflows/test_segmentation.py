"""Promises of the segmentation network: any encoder, frozen then trained, scored and used on volumes of any size."""

import csv
import json
from functools import partial

import nibabel as nib
import numpy as np
import pytest
import test_finished
import torch
from conftest import ROOT, TINY, TINY_KNOBS, bundle, noise, records, started, tiny, trainer, write_volume
from ignite.engine import Engine, Events
from monai.bundle import ConfigWorkflow
from monai.data import MetaTensor
from monai.transforms import AsDiscreted, Compose, Flipd, Invertd
from torch._subclasses.fake_tensor import FakeTensorMode

from scripts import BertsWinEncoder, parallel
from scripts.engines import LogitsWindowInferer, VolumeEvaluator
from scripts.experiments.peers import ViTEncoder
from scripts.metrics import BoundedHausdorffMetric
from scripts.networks import SegmentationNetwork
from scripts.weights import build_pretrained
from scripts.workflows import FreezeEncoder, MaskWriter, PredictMask

ENCODER = {name: value for name, value in TINY.items() if name not in ("decoder_embed_dim", "mask_ratio")}


def encoder(kind="strict", patch_size=8, in_chans=1, side=32):
    torch.manual_seed(0)
    if kind == "vit":
        return ViTEncoder((side, side, side), patch_size, in_chans, 48, 4, 4)
    return BertsWinEncoder(
        **ENCODER
        | {"img_size": side, "patch_size": patch_size, "in_chans": in_chans, "swin_window_size": 2}
        | {"strict_stem": kind != "default", "blockwise_norm": kind == "blockwise"}
    )


@pytest.mark.parametrize("kind", ["strict", "default", "blockwise", "vit"])
@pytest.mark.parametrize("patch_size", [2, 8, 16])
def test_any_encoder_and_patch_size_gives_logits_of_every_voxel(kind, patch_size):
    side = 16 if patch_size == 2 else 32
    network = SegmentationNetwork(encoder(kind, patch_size, in_chans=2, side=side), out_channels=3, feature_size=4)
    logits = network(noise(1, 2, side, side, side))
    assert logits.shape == (1, 3, side, side, side)
    logits.square().mean().backward()
    without = {name for name, parameter in network.named_parameters() if parameter.grad is None}
    assert not {name for name in without if "norm_cross_attn" not in name and "position_embeddings" not in name}


def test_every_map_of_the_encoder_reaches_the_logits():
    network = SegmentationNetwork(encoder(), out_channels=2, feature_size=4).eval()
    volume = noise(1, 1, 32, 32, 32)
    maps = network.encoder.forward_intermediates(volume)
    assert [tuple(each.shape[2:]) for each in maps] == [(16,) * 3, (8,) * 3, (4,) * 3, (4,) * 3, (4,) * 3]
    with torch.no_grad():
        before = network(volume)
        for place in range(len(maps)):
            changed = list(maps)
            changed[place] = changed[place] + noise(*changed[place].shape)
            network.encoder.forward_intermediates = lambda _, changed=changed: tuple(changed)
            assert not torch.allclose(network(volume), before, atol=1e-3)


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
    inferer = LogitsWindowInferer(
        window_size=[32, 32, 32], overlap=0.5, batch_size=2, background=-1.0, precision="fp32", device="cpu"
    )
    with torch.no_grad():
        for shape in ((20, 32, 50), (9, 9, 9)):
            assert inferer(noise(1, 1, *shape), network).shape == (1, 2, *shape)
        volume = noise(1, 1, 32, 32, 32)
        torch.testing.assert_close(inferer(volume, network), network(volume), rtol=1e-4, atol=1e-5)


def test_the_kind_of_stem_is_read_off_the_weights_and_others_are_refused(tmp_path):
    build = partial(BertsWinEncoder, **ENCODER)
    for strict in (True, False):
        torch.save(tiny(strict_stem=strict).state_dict(), tmp_path / "model.pt")
        assert build_pretrained(build, tmp_path / "model.pt").strict_stem == strict
        assert build_pretrained(build, None, like=tmp_path / "model.pt").strict_stem == strict
        with pytest.raises(ValueError, match="leave strict_stem out"):
            build_pretrained(build, tmp_path / "model.pt", strict_stem=not strict)
    assert not build_pretrained(build, None, like=tmp_path / "nowhere.pt").strict_stem
    assert build_pretrained(build, None, strict_stem=True, like=tmp_path / "nowhere.pt").strict_stem
    with pytest.raises(ValueError, match="give --pretrained"):
        build_pretrained(build, None)


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
    names = ("train.yaml", "finetune_segmentation.yaml", "small.yaml", *overlays)
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
    page = (tmp_path / "out" / "report.html").read_text()
    for words in ("Fine-tuning for segmentation: ", "<td>label 1</td>", f"<td>{rows[1][0]}</td>"):
        assert words in page, words

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
    # Float32: torch 2.13 gives the U-Net's 3³ convolutions of few voxels NaN gradients in bfloat16 on some CPUs.
    knobs = {"max_epochs": 2, "precision": "fp32"}
    result = finetune(f"peers/{overlay}", dataset_dir=labelled_cohort, output_dir=tmp_path, **knobs)
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
@pytest.mark.parametrize("problem", ["label maps are not where the list says", "num_train_cases 99 is more than the"])
def test_a_finetuning_without_enough_labels_is_refused(labelled_cohort, cohort, tmp_path, problem):
    settings = (
        {"dataset_dir": cohort} if "where" in problem else {"dataset_dir": labelled_cohort, "num_train_cases": 99}
    )
    result = finetune(output_dir=tmp_path, **settings)
    assert result.returncode == 1
    assert problem in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_volume_that_cannot_be_segmented_does_not_stop_the_others_and_scans_are_not_overwritten(
    labelled_cohort, tmp_path
):
    test_finished.finetune(labelled_cohort, tmp_path, iterations_per_epoch=1)
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
    assert f"output_dir {scans} lies within the dataset {scans}: choose a folder beside it" in result.stderr
    assert sorted(path.name for path in scans.iterdir()) == ["bad.nii.gz", "cut.nii.gz", "good.nii.gz"]
    assert np.array_equal(nib.load(scans / "good.nii.gz").dataobj, good.dataobj)


def test_a_label_map_lies_as_its_file_and_a_failure_does_not_end_the_run(tmp_path):
    for name in ("good", "huge", "unwritable"):
        write_volume(tmp_path / "scans" / f"{name}.nii.gz", shape=(6, 7, 8))
    flip = Compose([Flipd("image", 0)])
    out, seen = tmp_path / "out", []
    out.mkdir()
    (out / "huge.nii.gz").write_text("of an earlier run")  # could be a scan: it is left alone
    (out / "unwritable.nii.gz").mkdir()

    def items():
        for path in sorted((tmp_path / "scans").iterdir()):
            scan = nib.load(path)
            image = MetaTensor(np.asarray(scan.dataobj)[None], affine=scan.affine, meta={"filename_or_obj": str(path)})
            yield flip({"case": path.name.split(".")[0], "image": image})
        yield {"case": "cut", "error": "cannot be read"}

    def infer(volume, network):
        seen.append(volume)
        if len(seen) == 2:
            raise RuntimeError("out of memory")
        return torch.cat([500 - volume, volume - 500], dim=1)

    evaluator = VolumeEvaluator(
        device=torch.device("cpu"),
        val_data_loader=list(items()),
        network=torch.nn.Identity(),
        inferer=infer,
        iteration_update=PredictMask(Compose([AsDiscreted("pred", argmax=True), Invertd("pred", flip, "image")])),
        val_handlers=[MaskWriter(out)],
    )
    with pytest.raises(ValueError, match="3 of 4 volumes could not be segmented") as caught:
        evaluator.run()
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]] == [
        *("huge", "unwritable", "cut"),
    ]
    assert "huge: out of memory" in str(caught.value)
    assert "unwritable: cannot be written" in str(caught.value)
    assert len(seen) == 3
    mask, scan = nib.load(out / "good.nii.gz"), nib.load(tmp_path / "scans" / "good.nii.gz")
    assert np.array_equal(mask.dataobj, np.asarray(scan.dataobj) > 500)
    assert np.array_equal(mask.affine, scan.affine)
    assert not (out / "huge.nii.gz").exists()  # that of an earlier run


def test_labels_that_a_gpu_was_handed_are_scored_where_windows_are_put_together(labelled_cohort, tmp_path):
    files = ("train.yaml", "finetune_segmentation.yaml", "small.yaml")
    knobs = FINETUNING | {"dataset_dir": str(labelled_cohort), "output_dir": str(tmp_path)}
    postprocessing = started(*files, run_id="finetuning", **knobs).parser.get_parsed_content("validate::postprocessing")
    with FakeTensorMode():  # a GPU's, without one
        moved = postprocessing.transforms[0]({"label": torch.zeros(1, 4, 4, 4, device="cuda")})
    assert moved["label"].device.type == "cpu"


@pytest.mark.parametrize(("overlays", "groups"), [((), [True, True]), (("peers/unet.yaml",), [True, False])])
def test_the_encoder_learns_at_a_rate_of_its_own(labelled_cohort, tmp_path, overlays, groups):
    files = ("train.yaml", "finetune_segmentation.yaml", "small.yaml", *overlays)
    knobs = {"learning_rate": 1e-3, "encoder_learning_rate": 1e-4, "dataset_dir": str(labelled_cohort)}
    resolve = started(
        *files, run_id="finetuning", output_dir=str(tmp_path), **(FINETUNING | knobs)
    ).parser.get_parsed_content
    decoder, encoding = resolve("optimizer").param_groups
    assert (decoder["lr"], encoding["lr"]) == (1e-3, 1e-4)
    assert [len(group["params"]) > 0 for group in (decoder, encoding)] == groups
    names = [id(parameter) for group in (decoder, encoding) for parameter in group["params"]]
    assert sorted(names) == sorted(id(parameter) for parameter in resolve("network").parameters())


NAMES = ("plain/c1", "na,me;x", 'the "best", one', "two\nlines", "a\rb", "'single'", "", "ä/ü")


def test_the_scores_are_valid_csv_whatever_a_case_is_called(tmp_path):
    files = ("train.yaml", "finetune_segmentation.yaml", "small.yaml")
    workflow = started(*files, run_id="finetuning", output_dir=str(tmp_path / "out"), **FINETUNING)
    saver = workflow.parser.get_parsed_content("validate::handlers::1")
    validation = Engine(lambda engine, batch: None)
    saver.attach(validation)

    @validation.on(Events.STARTED)
    def score(engine):
        scores = torch.arange(2.0 * len(NAMES)).reshape(-1, 2)
        engine.state.metric_details = {"val_dice": scores, "val_hausdorff": scores}

    validation.run([[{"case": name}] for name in NAMES])
    for table in ("val_dice_raw.csv", "val_hausdorff_raw.csv"):
        with (tmp_path / "out" / table).open(newline="") as file:
            header, *rows = list(csv.reader(file))
        assert header == ["filename", "class0", "class1", "mean"]
        assert [row[0] for row in rows] == list(NAMES)
        assert [float(row[3]) for row in rows] == [0.5 + 2 * place for place in range(len(NAMES))]
    assert (tmp_path / "out" / "val_dice_raw.csv").read_text().splitlines()[1].startswith("plain/c1,")


@pytest.mark.slow
def test_the_config_has_what_monai_wants_of_a_training(labelled_cohort, tmp_path):
    files = [str(ROOT / "configs" / name) for name in ("train.yaml", "finetune_segmentation.yaml", "small.yaml")]
    settings = FINETUNING | {"dataset_dir": str(labelled_cohort), "output_dir": str(tmp_path)}
    workflow = ConfigWorkflow(files, workflow_type="train", **settings)
    workflow.initialize()
    assert workflow.check_properties() == []


def test_several_processes_are_refused():
    with pytest.raises(ValueError, match="this workflow runs in one process"):
        parallel.distribute(tiny(), "cpu", mode="none")
