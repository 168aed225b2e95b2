"""Promises of from_pretrained: three lines from a scan to its features, the same as an inference writes."""

import csv
import json
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, tiny, write_volume
from monai.bundle import ConfigWorkflow

import scripts.convert
from scripts import from_pretrained
from scripts.mistakes import Mistake
from scripts.weights import save, write_record


def write_run(folder, **preprocessing):
    """Write what a training leaves: tiny weights, and what they carry."""
    network = tiny(strict_stem=True)
    save(network.state_dict(), folder / "checkpoints" / "model.pt")
    known = {"modality": "mr", "spacing": [1.2, 1.2, 1.2]} | preprocessing
    write_record({"network": network.settings, "preprocessing": known}, folder / "checkpoints" / "model.pt")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("embedding")
    write_run(place / "run")
    for number, shape in enumerate([(40, 30, 52), (20, 36, 33)]):
        write_volume(place / "data" / "sub" / f"s{number}.nii.gz", shape, seed=number, spacing=1.1)
    return place


def test_a_scan_and_a_folder_are_embedded_as_an_inference_writes_them(place, tmp_path):
    encoder = from_pretrained(place / "run", device="cpu")
    found = list(encoder.embed_folder(place / "data"))
    assert [one.case for one in found] == ["sub/s0", "sub/s1"]
    alone = encoder.embed(place / "data" / "sub" / "s0.nii.gz")
    assert torch.equal(alone.embedding, found[0].embedding)

    knobs = {"dataset_dir": place / "data", "output_dir": tmp_path, "num_workers": 0, "device": "cpu",
             "pretrained": place / "run" / "checkpoints" / "model.pt"}  # fmt: skip
    run = ConfigWorkflow(str(ROOT / "configs" / "inference.json"), workflow_type="infer", run_id="inference",
                         figures=False, **{name: value if isinstance(value, int) else str(value)
                                           for name, value in knobs.items()})  # fmt: skip
    run.initialize()
    run.run()
    rows = list(csv.reader((tmp_path / "embeddings.csv").open()))[1:]
    for one, row in zip(found, rows, strict=True):
        assert row == [one.case, *(f"{value:.6g}" for value in one.embedding.tolist())]
        image = nib.load(tmp_path / one.case / "features.nii.gz")
        np.testing.assert_array_equal(np.asarray(image.dataobj), one.features.permute(1, 2, 3, 0).numpy())
        np.testing.assert_allclose(image.affine, one.features.affine.numpy(), atol=1e-5)


def test_the_encoder_takes_what_the_transform_prepares(place):
    encoder = from_pretrained(place / "run" / "checkpoints" / "model.pt", device="cpu")
    image = encoder.transform({"image": str(place / "data" / "sub" / "s0.nii.gz")})["image"]
    assert image.pixdim.tolist() == pytest.approx([1.2] * 3, abs=0.05)
    assert image.shape == (1, 37, 28, 48)
    assert encoder(image.as_tensor().new_zeros(1, 1, 32, 32, 32)).shape == (1, 48, 4, 4, 4)
    assert not encoder.training
    assert encoder.record["preprocessing"]["modality"] == "mr"


def test_windows_go_where_the_encoder_was_moved(place):
    pretrained, scan = from_pretrained(place / "run", device="cpu"), place / "data" / "sub" / "s0.nii.gz"
    before = pretrained.embed(scan).embedding
    pretrained.inferer.to("meta")  # as if it had been built for another device
    assert torch.equal(pretrained.embed(scan).embedding, before)


def test_the_weights_of_the_bundle_are_the_default_and_a_folder_of_it_will_do():
    volume = torch.rand(1, 1, 64, 64, 64)
    with torch.no_grad():
        first, second = (from_pretrained(source, device="cpu")(volume) for source in (None, ROOT))
    assert first.shape == (1, 192, 8, 8, 8)
    assert torch.equal(first, second)


def test_a_scan_that_cannot_be_used_is_named_and_does_not_stop_the_others(place, tmp_path, caplog):
    encoder = from_pretrained(place / "run", device="cpu")
    write_volume(tmp_path / "a.nii.gz")
    (tmp_path / "b.nii.gz").write_bytes(b"nothing")
    assert [one.case for one in encoder.embed_folder(tmp_path)] == ["a"]
    assert "no features of b: " in caplog.text
    with pytest.raises(Mistake, match="holds 2 scans: embed_folder takes them all"):
        encoder.embed(tmp_path)
    (tmp_path / "a.nii.gz").unlink()
    with pytest.raises(Mistake, match="none of the 1 scans in"):
        list(encoder.embed_folder(tmp_path))


def test_what_does_not_fit_the_weights_is_refused_with_what_would_do(tmp_path):
    usual = {"low": [1.0] * 3, "median": [1.0] * 3, "high": [1.0] * 3}
    encoder = from_pretrained(write_run(tmp_path / "run", spacing=None, cohort_spacing=usual), device="cpu")
    rng = np.random.default_rng(0)
    ct = np.where(rng.random((40, 40, 40)) < 0.5, -1000, 40) + rng.normal(0, 10, (40, 40, 40))
    nib.save(nib.Nifti1Image(ct.astype(np.float32), np.eye(4)), tmp_path / "ct.nii.gz")
    with pytest.raises(Mistake, match=r"is a CT by its values .*, where modality is mr: use --modality ct"):
        encoder.embed(tmp_path / "ct.nii.gz")
    t2 = np.pad(rng.uniform(20, 400, (30, 30, 30)), 4, constant_values=-1000)  # as tools that resample pad an MR
    nib.save(nib.Nifti1Image(t2.astype(np.float32), np.eye(4)), tmp_path / "padded.nii.gz")
    assert encoder.embed(tmp_path / "padded.nii.gz").case == "padded"
    with pytest.raises(Mistake, match=r"has voxels of 1.6 x 1.6 x 1.6 mm, .* by --spacing \[1.0, 1.0, 1.0\]"):
        encoder.embed(write_volume(tmp_path / "coarse.nii.gz", spacing=1.6))
    paths = [write_volume(tmp_path / f"{number}.nii.gz", seed=number) for number in range(2)]
    with pytest.raises(Mistake, match=r"has 2 channels .* where in_chans is 1"):
        encoder.embed(paths)
    with pytest.raises(Mistake, match="modality is ct, but"):
        from_pretrained(tmp_path / "run", modality="ct")
    with pytest.raises(Mistake, match=r"no knob called modalty: did you mean modality\?"):
        from_pretrained(tmp_path / "run", modalty="mr")
    assert from_pretrained(tmp_path / "run", spacing=[1.0] * 3, device="cpu").embed(tmp_path / "coarse.nii.gz")


def test_weights_that_carry_nothing_need_it_said(tmp_path):
    network = tiny()
    save(network.state_dict(), tmp_path / "model.pt")
    with pytest.raises(Mistake, match=r"carries no modality, spacing, img_size, .*: copy the JSON"):
        from_pretrained(tmp_path / "model.pt")
    knobs = network.encoder.settings | {"modality": "mr", "spacing": None, "device": "cpu"}
    assert from_pretrained(tmp_path / "model.pt", **knobs).encoder.img_size == (32, 32, 32)


def test_a_repository_is_found_where_it_was_fetched_before(tmp_path, monkeypatch, place):
    hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("safetensors")
    cached = tmp_path / "models--owner--brains"
    snapshot = cached / "snapshots" / "abc"
    weights = place / "run" / "checkpoints" / "model.pt"
    scripts.convert.to_safetensors(str(weights), str(snapshot / "models" / "model.safetensors"))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    scan = place / "data" / "sub" / "s0.nii.gz"
    ours, theirs = (from_pretrained(source, device="cpu").embed(scan) for source in (weights, "owner/brains"))
    assert torch.equal(ours.embedding, theirs.embedding)
    with pytest.raises(Mistake, match="owner/others is no file or folder here, and Hugging Face does not give it"):
        from_pretrained("owner/others")


def test_without_the_hub_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(Mistake, match=r"there is no file or folder owner/name; .* pip install huggingface_hub first"):
        from_pretrained("owner/name")
    with pytest.raises(Mistake, match=r"there is no file or folder .*/gone.pt$"):
        from_pretrained(tmp_path / "gone.pt")
    with pytest.raises(Mistake, match="holds no weights"):
        from_pretrained(tmp_path)


def test_a_damaged_record_is_no_traceback(tmp_path):
    write_run(tmp_path)
    (tmp_path / "checkpoints" / "model.json").write_text(json.dumps({"network": 1})[:-3])
    with pytest.raises(Mistake, match=r"the record of .*model.pt is damaged"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("typed", ["checkpoints/model.pt", "{folder}/nothing", "runs/more/model"])
def test_a_path_that_is_not_there_is_not_looked_for_elsewhere(typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(Mistake, match="there is no file or folder"):
        from_pretrained(typed.format(folder="runs"))
