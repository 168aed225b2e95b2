"""Promises of the bundle that a fine-tuning leaves: complete, and at home in MONAI's tools and applications."""

import json
import shutil
import sys

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_KNOBS, write_volume
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.data import load_net_with_metadata
from monai.transforms import LoadImage, LoadImaged
from test_configs import REQUIRED

from scripts.data import label_names
from scripts.mistakes import Mistake
from scripts.weights import read_record, write_record
from scripts.workflows import finished

KNOBS = {name: value for name, value in TINY_KNOBS.items() if name != "figure_interval"}
KNOBS |= {"num_labels": 1, "feature_size": 4, "freeze_epochs": 0, "num_workers": 0, "precision": "fp32"}
KNOBS |= {"max_epochs": 1, "iterations_per_epoch": 4, "learning_rate": 0.01, "affine_prob": 0}
FILES = ("train.yaml", "finetune_segmentation.yaml", "small.yaml")


def run(*files, run_id, workflow_type="train", **knobs):
    workflow = ConfigWorkflow([str(file) for file in files], workflow_type=workflow_type, run_id=run_id, **knobs)
    workflow.initialize()
    workflow.run()
    return workflow


def finetune(cohort, output_dir, **knobs):
    paths = {"dataset_dir": str(cohort), "output_dir": str(output_dir)}
    return run(*(ROOT / "configs" / name for name in FILES), run_id="finetuning", **(KNOBS | paths | knobs))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Four volumes whose bright half is a blob, in an orientation and a spacing of their own."""
    folder = tmp_path_factory.mktemp("labelled")
    affine, training = np.diag([-1.0, -1.5, 2.0, 1.0]), []
    (folder / "labelsTr").mkdir()
    for name in ("0.nii.gz", "1.nii.gz", "2.nii.gz", "3.nii.gz"):
        voxels = np.asarray(nib.load(write_volume(folder / "imagesTr" / name, (34, 38, 28), int(name[0]))).dataobj)
        nib.save(nib.Nifti1Image(voxels, affine), folder / "imagesTr" / name)
        nib.save(nib.Nifti1Image((voxels > 500).astype(np.uint8), affine), folder / "labelsTr" / name)
        training.append({"image": f"imagesTr/{name}", "label": f"labelsTr/{name}"})
    about = {"name": "Blobs", "licence": "CC0", "labels": {"0": "background", "1": "blob"}}
    (folder / "dataset.json").write_text(json.dumps({**about, "training": training}))
    return folder


@pytest.fixture(scope="module")
def folder(labelled, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("out")
    finetune(labelled, output_dir, spacing=[1.2, 1.3, 1.7])
    return output_dir / "bundle"


@pytest.fixture(scope="module")
def masks(folder, labelled, tmp_path_factory):
    """Label maps as `run prediction` writes them, without overlays and settings."""
    place = tmp_path_factory.mktemp("masks")
    knobs = {"dataset_dir": str(labelled / "imagesTr"), "output_dir": str(place)}
    knobs["ckpt_dir"] = str(folder.parent / "checkpoints")
    run(*(ROOT / "configs" / name for name in FILES[:2]), run_id="prediction", **knobs)
    return place


def test_it_holds_all_that_a_bundle_should_and_nothing_else(folder):
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    code = {f"scripts/{path.relative_to(ROOT / 'scripts').as_posix()}" for path in (ROOT / "scripts").rglob("*.py")}
    code = {name for name in code if "/experiments/" not in name}
    assert found == code | {
        *("LICENSE", "large_files.yml", "requirements.txt", "docs/README.md", "docs/data_license.txt"),
        *("configs/inference.json", "configs/train.json", "configs/metadata.json", "configs/logging.conf"),
        *("models/model.pt", "models/model.json", "models/model.ts"),
    }
    assert [path.name for path in folder.parent.iterdir() if "bundle" in path.name] == ["bundle"]
    weights = (folder.parent / "checkpoints/model.pt").read_bytes()
    assert (folder / "models/model.pt").read_bytes() == weights


def test_channels_are_named_as_the_dataset_names_its_labels(folder, tmp_path):
    metadata = json.loads((folder / "configs/metadata.json").read_text())
    assert metadata["network_data_format"]["outputs"]["pred"]["channel_def"] == {"0": "background", "1": "blob"}
    card = (folder / "docs/README.md").read_text()
    assert "| 1 | blob |" in card
    assert "3 training volumes of Blobs; 1 " in card
    assert f"| dice_blob | {metadata['eval_metrics']['val_dice_blob']:.4g} |" in card
    assert "CC0" in (folder / "docs/data_license.txt").read_text()
    for labels, expected in (
        ({"background": 0, "liver": 1, "tumour": "2", "whole": [1, 2]}, ["liver", "tumour"]),
        ({"0": "background", "2": "tumour"}, ["label_1", "tumour"]),
        (["background", "liver", "tumour"], ["liver", "tumour"]),
        (None, ["label_1", "label_2"]),
    ):
        (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
        assert label_names(tmp_path, 2) == label_names(tmp_path / "dataset.json", 2) == ["background", *expected]
    assert label_names(tmp_path / "elsewhere", 1) == ["background", "label_1"]


def test_monais_tools_find_nothing_wrong(folder, labelled, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    (tmp_path / "schema.json").write_text(json.dumps({"type": "object", "required": REQUIRED}))
    meta = {"meta_file": "configs/metadata.json"}
    monai.bundle.verify_metadata(**meta, filepath=tmp_path / "schema.json")
    monai.bundle.verify_net_in_out("network_def", **meta, config_file="configs/inference.json", device="cpu")
    paths = {"dataset_dir": str(labelled), "output_dir": str(tmp_path)}
    for kind, run_id in (("train", "training"), ("infer", "inference")):
        config = {"train": "configs/train.json", "infer": "configs/inference.json"}[kind]
        workflow = ConfigWorkflow(config, workflow_type=kind, run_id=run_id, **paths)
        workflow.initialize()
        assert workflow.check_properties() == []
    assert json.loads((folder / "configs/train.json").read_text())["_knobs_"]["feature_size"].startswith("channels")


def test_it_is_downloaded_as_a_zip_and_loaded_with_its_weights(folder, tmp_path, monkeypatch):
    shutil.make_archive(str(tmp_path / "blobs"), "zip", folder.parent, "bundle")
    monkeypatch.setattr(monai.bundle.scripts, "download_url", lambda url, filepath, **_: shutil.copy(url, filepath))
    place = {"name": "bundle", "bundle_dir": str(tmp_path)}
    monai.bundle.download(**place, url=str(tmp_path / "blobs.zip"))
    monkeypatch.chdir(tmp_path)
    expected = torch.load(folder / "models/model.pt", weights_only=True)
    for kind in ("train", "inference"):
        network = monai.bundle.load(**place, workflow_type=kind, device="cpu")
        assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())
    script, metadata, files = load_net_with_metadata(
        tmp_path / "bundle/models/model.ts", more_extra_files=["inference.json"]
    )
    volume = torch.rand(2, 1, 32, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(script(volume), network.eval()(volume), rtol=1e-4, atol=1e-5)
    assert metadata["name"] == "Segmentation"
    assert b"SlidingWindowInferer" in files["inference.json"]
    assert json.loads(files["inference.json"])["precision"] == "fp32"  # as applications


def agreement(found, mask):
    return (np.asarray(found).squeeze() == np.asarray(nib.load(mask).dataobj)).mean()


def test_run_prediction_is_the_bundles_own_inference(folder, labelled, masks, tmp_path):
    config = folder / "configs/inference.json"
    paths = {"dataset_dir": str(labelled / "imagesTr"), "output_dir": str(tmp_path)}
    run(config, run_id="inference", workflow_type="infer", **paths)
    for mask in masks.iterdir():
        assert agreement(nib.load(tmp_path / mask.name).dataobj, mask) == 1
        assert np.allclose(nib.load(mask).affine, nib.load(labelled / "imagesTr" / mask.name).affine)


def test_knobs_that_are_part_of_a_bundle_cannot_be_changed_in_a_prediction(folder, tmp_path, labelled):
    knobs = {"dataset_dir": str(labelled), "ckpt_dir": str(folder.parent / "checkpoints"), "output_dir": str(tmp_path)}
    for wrong, message in (
        ({"img_size": [64, 64, 64]}, r"img_size is \[32, 32, 32\] in .*inference.json, and cannot be another"),
        ({"ckpt_dir": str(tmp_path)}, "checkpoints of a fine-tuning that has ended"),
    ):
        with pytest.raises(RuntimeError) as caught:
            run(*(ROOT / "configs" / name for name in FILES[:2]), run_id="prediction", **(knobs | wrong))
        with pytest.raises(Mistake, match=message):
            raise caught.value.__cause__


def test_monai_label_infers_with_it(folder, labelled, masks, monkeypatch, tmp_path):
    """As BundleInferTask does: the parts of inference.json one by one, transforms outside of their Compose."""
    monkeypatch.chdir(tmp_path)
    parser = ConfigParser()
    parser.read_config(str(folder / "configs/inference.json"))
    parser.config.update({"bundle_root": str(folder)})
    network = parser.get_parsed_content("network_def")
    network.load_state_dict(torch.load(folder / "models/model.pt", weights_only=True))
    path = str(labelled / "imagesTr/0.nii.gz")
    data = {"image": path, "image_path": path, "device": "cpu"}  # Spacingd would take the latter for metadata
    for transform in parser.get_parsed_content("preprocessing").transforms:
        if isinstance(transform, LoadImaged):
            transform._loader.image_only = False
        data = transform(data)
    with torch.no_grad():
        data["pred"] = parser.get_parsed_content("inferer")(data["image"][None], network.eval())[0]
    for transform in parser.get_parsed_content("postprocessing").transforms:
        data = transform(data)
    assert agreement(data["pred"], masks / "0.nii.gz") >= 0.999
    assert np.allclose(data["pred"].affine, data["image_meta_dict"]["original_affine"])


@pytest.mark.parametrize("archive", [False, True], ids=["folder", "model.ts"])
def test_monai_deploy_infers_with_it(folder, labelled, masks, archive, monkeypatch, tmp_path):
    """As MonaiBundleInferenceOperator does, from anywhere: volumes come loaded, transforms that load are left out."""
    monkeypatch.chdir(tmp_path)
    parser, image = ConfigParser(), LoadImage(image_only=True)(labelled / "imagesTr/0.nii.gz")
    if archive:
        files = load_net_with_metadata(folder / "models/model.ts", more_extra_files=["inference.json"])[2]
        parser.read_config(json.loads(files["inference.json"]))
    else:
        parser.read_config(str(folder / "configs/inference.json"))
        monkeypatch.syspath_prepend(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] == "scripts"]:
            monkeypatch.delitem(sys.modules, name)
        assert parser.get_parsed_content("network") is not None
    network = torch.jit.load(folder / "models/model.ts")
    pre, post = (parser.get_parsed_content(name) for name in ("preprocessing", "postprocessing"))
    pre.transforms = [transform for transform in pre.transforms if not isinstance(transform, LoadImaged)]
    data = pre({"image": image})
    with torch.no_grad():
        data["pred"] = parser.get_parsed_content("inferer")(inputs=data["image"][None], network=network)[0]
    assert agreement(post(data)["pred"], masks / "0.nii.gz") >= 0.999


def test_monai_label_trains_it_further_with_its_own_lists_again_and_again(folder, labelled, tmp_path):
    """As BundleTrainTask does: lists of image and label, the epochs, and a handler that loads the weights."""
    place = shutil.copytree(folder, tmp_path / "bundle")
    handlers = json.loads((place / "configs/train.json").read_text())["train"]["handlers"]
    loading = {"_target_": "CheckpointLoader", "load_path": str(place / "models/model.pt"), "strict": False}
    items = [
        {key: str(labelled / f"{key}sTr" / f"{number}.nii.gz") for key in ("image", "label")} for number in range(3)
    ]
    overrides = {
        "bundle_root": str(place),
        "train#trainer#max_epochs": 2,
        "train#dataset#data": items[:2],
        "validate#dataset#data": items[2:],
        "device": "cpu",
        "train#handlers": [loading | {"load_dict": {"model": "$@network"}}, *handlers],
    }
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    for output_dir in (place / "runs/1", place / "runs/2"):  # two within a second
        monai.bundle.run(
            run_id="run", meta_file=str(place / "configs/metadata.json"), config_file=str(place / "configs/train.json"),
            **overrides, output_dir=str(output_dir),
        )  # fmt: skip
    assert str(items[0]["image"]) in (place / "runs/2/report.html").read_text()
    after = {path: path.read_bytes() for path in place.rglob("*") if "runs" not in path.parts and path.is_file()}
    changed = {path.relative_to(place).as_posix() for path in before if after[path] != before[path]}
    assert after.keys() == before.keys()
    assert {"models/model.pt", "models/model.ts"} <= changed
    assert changed <= {
        "models/model.pt",
        "models/model.ts",
        "models/model.json",
        "configs/metadata.json",
        "docs/README.md",
    }


def test_a_bundle_that_cannot_be_written_leaves_the_earlier_one(labelled, folder, tmp_path, monkeypatch):
    shutil.copytree(folder.parent, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out/bundle").rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(finished, "ckpt_export", lambda *_, **__: (_ for _ in ()).throw(OSError("no room")))
        with pytest.raises(RuntimeError):
            finetune(labelled, tmp_path / "out", resume=True, spacing=[1.2, 1.3, 1.7])
    assert {path: path.read_bytes() for path in (tmp_path / "out/bundle").rglob("*") if path.is_file()} == before
    assert not list((tmp_path / "out").glob(".bundle.*"))


def test_a_run_that_has_nothing_left_to_do_writes_its_bundle_again(labelled, folder, tmp_path):
    shutil.copytree(folder.parent, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/bundle/scripts")
    (tmp_path / "out/bundle/of_an_earlier_run").touch()
    answer = tmp_path / "out/bundle/runs/inference/0.nii.gz"  # which its user asked for
    answer.parent.mkdir(parents=True)
    answer.touch()
    finetune(labelled, tmp_path / "out", resume=True, spacing=[1.2, 1.3, 1.7])
    before, after = (
        {path.relative_to(place) for path in place.rglob("*") if "runs" not in path.parts}
        for place in (folder, tmp_path / "out/bundle")
    )
    assert before == after
    assert answer.is_file()
    shutil.rmtree(tmp_path / "out/bundle/scripts")
    model = tmp_path / "out/bundle/models/model.pt"  # as a training of the bundle's own renews it
    write_record(read_record(model) | {"provenance": {"recipe": "continued"}}, model)
    finetune(labelled, tmp_path / "out", resume=True, spacing=[1.2, 1.3, 1.7])
    assert not (tmp_path / "out/bundle/scripts").exists()
