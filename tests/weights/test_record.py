"""Promises of what weights carry: later runs need no knob repeated, and what does not fit is refused."""

import json
import signal
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_KNOBS, tiny, write_volume
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle import run as monai_run

from scripts import convert
from scripts.data import licence_of
from scripts.mistakes import Mistake
from scripts.weights import carried_knobs, load, read_record, save, stem_is_strict, write_record

SCHEDULE = {"batch_size": 2, "iterations_per_epoch": 1, "max_epochs": 1, "warmup_epochs": 0, "accumulation_steps": 1,
            "num_workers": 0, "cache": "none", "num_figure_volumes": 0}  # fmt: skip
NETWORK = {name: value for name, value in TINY_KNOBS.items() if name not in SCHEDULE and name != "figure_interval"}
CONFIGS = {
    "tuning": ("train.yaml", "tune_stem.yaml"),
    "finetuning": ("train.yaml", "finetune_segmentation.yaml"),
    "prediction": ("train.yaml", "finetune_segmentation.yaml"),
    "probe": ("train.yaml", "probe.yaml"),
    "training": ("train.yaml",),
    "inference": ("inference.json",),
}


def workflow(run_id, *overlays, **knobs):
    files = [*(str(ROOT / "configs" / name) for name in CONFIGS[run_id]), *map(str, overlays)]
    knobs = {name: str(value) if hasattr(value, "parts") else value for name, value in knobs.items()}
    made = ConfigWorkflow(files, run_id=run_id, workflow_type="infer" if run_id == "inference" else "train", **knobs)
    made.initialize()
    return made


def run(run_id, *overlays, **knobs):
    """Run a workflow in this process."""
    before = signal.getsignal(signal.SIGTERM)
    made = workflow(run_id, *overlays, **knobs)
    made.run()
    signal.signal(signal.SIGTERM, before)
    return made


def checked(run_id, *overlays, **knobs):
    """Do the first step of a workflow alone, and tell what its knobs are then."""
    parser = workflow(run_id, *overlays, **knobs).parser
    parser.get_parsed_content(f"{run_id}::0")
    parser.ref_resolver.remove_resolved_content(f"{run_id}::0")  # as a run does
    return parser.get_parsed_content


def refused(run_id, *overlays, **knobs):
    with pytest.raises(RuntimeError) as caught:
        checked(run_id, *overlays, **knobs)
    assert isinstance(caught.value.__cause__, Mistake)
    return str(caught.value.__cause__)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Labelled MR at 2 mm, and a pre-training on them at 1.5 mm with a scaling and a stem of its own."""
    place = tmp_path_factory.mktemp("record")
    for number in range(6):
        image = nib.load(write_volume(place / "data" / "imagesTr" / f"c{number}.nii.gz", seed=number, spacing=2.0))
        labels = (np.asarray(image.dataobj) > 500).astype(np.uint8) + (np.asarray(image.dataobj) > 800)
        (place / "data" / "labelsTr").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(labels, image.affine), place / "data" / "labelsTr" / f"c{number}.nii.gz")
    names = [{"image": f"imagesTr/c{n}.nii.gz", "label": f"labelsTr/c{n}.nii.gz"} for n in range(6)]
    (place / "data" / "dataset.json").write_text(json.dumps({"training": names}))
    (place / "scaling.yaml").write_text("intensities::mr::transforms::0::upper: 98.0\n")
    run("training", place / "scaling.yaml", dataset_dir=place / "data", output_dir=place / "pre", modality="mr",
        spacing=[1.5, 1.5, 1.5], strict_stem=True, blockwise_norm=True, **SCHEDULE, **NETWORK)  # fmt: skip
    return place


def test_a_training_writes_what_its_weights_are_and_no_path(place):
    record = read_record(place / "pre" / "checkpoints" / "model.pt")
    strict = {"in_chans": 1, "strict_stem": True, "blockwise_norm": True}
    assert record["network"] == NETWORK | strict
    preprocessing = record["preprocessing"]
    assert preprocessing["intensity"]["transforms"][0]["upper"] == 98.0
    assert (preprocessing["modality"], preprocessing["spacing"]) == ("mr", [1.5, 1.5, 1.5])
    assert preprocessing["cohort_spacing"] == {"low": [2.0] * 3, "median": [2.0] * 3, "high": [2.0] * 3}
    assert record["metrics"]["epoch"] == 1
    assert record["metrics"]["val_loss"] > 0
    assert record["provenance"]["recipe"] == "pretraining"
    assert record["provenance"]["started_from_sha256"] is None
    assert len(record["seen"]["hashes"]) == record["provenance"]["volumes"]
    assert str(place) not in json.dumps(record)


def test_what_follows_a_pretraining_needs_none_of_its_knobs(place):
    common = SCHEDULE | {"dataset_dir": place / "data"}
    tuned = place / "tuned" / "checkpoints"
    run("tuning", pretrained=place / "pre" / "checkpoints" / "model.pt", output_dir=place / "tuned", **common)
    assert read_record(tuned / "encoder.pt")["network"] == read_record(tuned / "model.pt")["network"]
    assert read_record(tuned / "encoder.pt")["provenance"]["started_from_sha256"]
    licensed = read_record(tuned / "encoder.pt")
    licensed["provenance"]["licence"] = "CC BY-SA 3.0"
    write_record(licensed, tuned / "encoder.pt")

    trained = run("finetuning", pretrained=tuned / "encoder.pt", output_dir=place / "fine", num_labels=2,
                  feature_size=4, **common)  # fmt: skip
    resolve = trained.parser.get_parsed_content
    assert (resolve("spacing"), resolve("modality"), resolve("img_size")) == ([1.5] * 3, "mr", [32, 32, 32])
    assert resolve("intensity")["transforms"][0].scaler.upper == 98.0
    assert resolve("encoder").settings["blockwise_norm"]
    record = read_record(place / "fine" / "checkpoints" / "model.pt")
    assert licence_of(place / "fine" / "checkpoints" / "model.pt") == "CC BY-SA 3.0"
    assert "it started from: CC BY-SA 3.0" in (place / "fine" / "bundle" / "docs" / "data_license.txt").read_text()
    assert (record["network"]["num_labels"], record["network"]["feature_size"]) == (2, 4)
    assert record["seen"] == read_record(tuned / "encoder.pt")["seen"]

    new = {"dataset_dir": place / "data" / "imagesTr" / "c0.nii.gz", "num_workers": 0}
    run("prediction", ckpt_dir=place / "fine" / "checkpoints", output_dir=place / "masks", **new)
    assert nib.load(place / "masks" / "c0.nii.gz").shape == (36, 30, 33)
    probe = {"batch_size": 2, "dataset_dir": place / "data", "num_workers": 0, "output_dir": place / "probe"}
    run("probe", pretrained=tuned / "encoder.pt", **probe)
    assert (place / "probe" / "probe.json").exists()


# What the JSON of a small encoder of MR at 1 mm says.
RECORD = {
    "network": NETWORK | {"in_chans": 1, "strict_stem": False, "blockwise_norm": False},
    "preprocessing": {
        "modality": "mr",
        "spacing": None,
        "intensity": {"background": -1.0, "transforms": [
            {"_target_": "ScaleIntensityRangePercentilesd", "keys": "image", "lower": 1, "upper": 98, "b_min": -1,
             "b_max": 1}]},
        "cohort_spacing": {"low": [0.9, 0.9, 0.9], "median": [1.0, 1.0, 1.0], "high": [1.0, 1.0, 2.0]},
    },
}  # fmt: skip


def carrying(folder, record=RECORD, **preprocessing):
    """Write tiny weights that carry a record."""
    path = folder / "model.pt"
    save(tiny().state_dict(), path)
    if preprocessing:
        record = record | {"preprocessing": record["preprocessing"] | preprocessing}
    write_record(record, path)
    return path


@pytest.mark.parametrize("run_id", ["tuning", "finetuning", "probe", "inference"])
def test_knobs_are_taken_from_the_weights_and_said_in_one_line(run_id, tmp_path, capsys):
    resolve = checked(run_id, pretrained=carrying(tmp_path))
    assert [resolve(name) for name in ("modality", "spacing", "patch_size")] == ["mr", None, 8]
    assert resolve("intensity")["transforms"][0].scaler.upper == 98
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "model.pt was trained: " in line]
    assert "encoder_embed_dim 48" in line


def test_an_overlay_may_repeat_what_the_weights_carry_and_size_and_spacing_may_differ_within_bounds(tmp_path):
    (tmp_path / "same.yaml").write_text("modality: mr\nspacing: null\npatch_size: 8\nimg_size: [48, 32, 32]\n")
    resolve = checked("tuning", tmp_path / "same.yaml", pretrained=carrying(tmp_path), spacing=[0.7, 1.0, 3.0],
                      swin_window_size=(2, 2, 2))  # fmt: skip
    assert (resolve("img_size"), resolve("spacing")) == ([48, 32, 32], [0.7, 1.0, 3.0])


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"patch_size": 4}, r"patch_size is 4, but .*model.pt was trained with 8: leave patch_size out"),
        ({"swin_window_size": [1, 2, 2]}, "swin_window_size is"),
        ({"in_chans": 2}, "in_chans is 2, but"),
        ({"strict_stem": True}, "strict_stem is True, but"),
        ({"spacing": [1.0, 1.0, 3.1]}, r"within 1.5 times of \[1.0, 1.0, 1.0\] mm"),
        ({"spacing": [0.5, 1.0, 1.0]}, "spacing is"),
    ],
)
def test_a_knob_that_contradicts_the_weights_is_refused_with_what_would_do(knobs, message, tmp_path):
    with pytest.raises(Mistake, match=message):
        raise Mistake(refused("tuning", pretrained=carrying(tmp_path), **knobs))


def test_what_an_overlay_scales_otherwise_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("intensities::mr::transforms::0::upper: 90.0\n")
    assert "intensities::mr is not what" in refused("probe", tmp_path / "mine.yaml", pretrained=carrying(tmp_path))


def test_a_spacing_of_the_weights_stands_for_volumes_of_any(tmp_path):
    weights = carrying(tmp_path, spacing=[2.0, 2.0, 2.0])
    assert checked("tuning", pretrained=weights, spacing=[3.0, 2.0, 1.5])("spacing") == [3.0, 2.0, 1.5]
    (tmp_path / "null.yaml").write_text("spacing: null\n")
    assert "spacing is null, but" in refused("tuning", tmp_path / "null.yaml", pretrained=weights)
    assert "or stay within 1.5 times" in refused("tuning", pretrained=weights, spacing=[3.1, 2.0, 2.0])


def test_what_stands_on_the_command_line_is_chosen_though_the_config_says_the_same(tmp_path):
    files = [str(ROOT / "configs" / name) for name in CONFIGS["probe"]]
    with pytest.raises(RuntimeError) as caught:
        monai_run("probe", config_file=files, pretrained=str(carrying(tmp_path)), modality="ct")
    assert "modality is ct, but" in str(caught.value.__cause__)
    assert "or give weights of ct" in str(caught.value.__cause__)


def test_a_pretraining_goes_on_in_the_modality_and_channels_of_its_weights_alone(tmp_path):
    weights = carrying(tmp_path)
    resolve = checked("training", pretrained=weights)
    assert (resolve("modality"), resolve("patch_size")) == ("mr", 16)
    assert "in_chans is 2, but" in refused("training", pretrained=weights, in_chans=2)


def test_volumes_unlike_those_that_the_weights_have_seen_are_refused(tmp_path):
    for number in range(3):
        write_volume(tmp_path / "thick" / f"{number}.nii.gz", spacing=3.2, seed=number)
    resolve = checked("tuning", pretrained=carrying(tmp_path), dataset_dir=tmp_path / "thick",
                      output_dir=tmp_path / "out")  # fmt: skip
    with pytest.raises(RuntimeError) as caught:
        resolve("cases")
    assert "has voxels of 3.2 x 3.2 x 3.2 mm, where the weights were trained on 1 x 1 x 1 mm: resample it" in str(
        caught.value.__cause__
    )


def test_what_is_missing_or_foreign_is_not_known(tmp_path):
    path = tmp_path / "model.pt"
    for text in ("[1]", '{"seen": {"salt": "", "hashes": []}}', '{"network": 3, "preprocessing": {"intensity": 1}}'):
        path.with_suffix(".json").write_text(text)
        assert checked("tuning", pretrained=path)("patch_size") == 16
    path.with_suffix(".json").write_text('{"network": ')
    assert "the record of" in refused("tuning", pretrained=path)
    assert "is damaged" in refused("tuning", pretrained=path)


@pytest.mark.parametrize(
    "record",
    [
        {"network": {"patch_size": "$__import__('os').getcwd()"}},
        {"network": {"img_size": [32, 32, "$print(1)"]}},
        {"network": {"patch_size": 1000}},
        {"preprocessing": {"modality": "pet"}},
        {"preprocessing": {"modality": "mr", "intensity": {"transforms": [{"_target_": "os.system", "command": "x"}]}}},
        {"preprocessing": {"modality": "mr", "intensity": {"background": "$print(1)"}}},
        {"preprocessing": {"modality": "mr", "intensity": {"background": {"_mode_": "callable"}}}},
    ],
)
def test_nothing_that_a_record_says_is_run(record, tmp_path):
    assert "model.pt" in refused("tuning", pretrained=carrying(tmp_path, record))


def test_a_plan_goes_behind_the_inference_and_its_other_knobs_are_passed_over(tmp_path):
    (tmp_path / "plan.yaml").write_text("modality: ct\nindex: x.jsonl\nmax_epochs: 5\n")
    (tmp_path / "typo.yaml").write_text("max_epoch: 5\n")
    assert checked("inference", tmp_path / "plan.yaml", pretrained=tmp_path / "new.pt")("modality") == "ct"
    assert "there is no knob called max_epoch" in refused("inference", tmp_path / "typo.yaml")
    with pytest.raises(RuntimeError) as caught:
        monai_run("inference", config_file=str(ROOT / "configs" / "inference.json"), max_epochs=5)
    assert "there is no knob called max_epochs" in str(caught.value.__cause__)


def test_the_old_name_of_the_weights_is_answered_with_the_new_one():
    assert "there is no knob called checkpoint: it is called pretrained now" in refused("inference", checkpoint="a.pt")


def test_weights_as_safetensors_carry_the_same_in_their_head(tmp_path):
    pytest.importorskip("safetensors")
    weights, published = carrying(tmp_path), tmp_path / "out" / "model.safetensors"
    convert.to_safetensors(str(weights), str(published))
    assert read_record(published) == read_record(weights)
    assert list(published.parent.iterdir()) == [published]
    ours, theirs = load(weights), load(published)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert checked("tuning", pretrained=published)("patch_size") == 8
    published.write_bytes(published.read_bytes()[:1000])
    with pytest.raises(Mistake, match="is damaged"):
        load(published)


def test_without_safetensors_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "model.safetensors").write_bytes(b"")
    for read in (load, read_record):
        with pytest.raises(Mistake, match="pip install safetensors"):
            read(tmp_path / "model.safetensors")


def test_widened_weights_carry_their_channels(tmp_path):
    convert.widen(str(carrying(tmp_path)), str(tmp_path / "wide.pt"), 3, "mean")
    wide = read_record(tmp_path / "wide.pt")
    assert wide["network"]["in_chans"] == 3
    assert wide["preprocessing"] == RECORD["preprocessing"]


def test_a_network_has_at_least_one_channel(tmp_path):
    with pytest.raises(Mistake, match="in_chans is 0 but must be at least 1"):
        convert.widen(str(carrying(tmp_path)), str(tmp_path / "wide.pt"), 0, "mean")


def test_weights_without_a_record_do_not_take_over_that_of_others(tmp_path):
    source = carrying(tmp_path)
    convert.widen(str(source), str(tmp_path / "wide.pt"), 3, "mean")
    before = (tmp_path / "wide.pt").read_bytes()
    source.with_suffix(".json").unlink()
    with pytest.raises(Mistake, match=r"wide.json tells of something else than what .*wide.pt would hold"):
        convert.widen(str(source), str(tmp_path / "wide.pt"), 2, "mean")
    assert (tmp_path / "wide.pt").read_bytes() == before


def test_the_json_of_another_tool_is_not_taken_for_a_record_and_replaced(tmp_path):
    source, other = carrying(tmp_path), tmp_path / "dataset.json"
    other.write_text('{"training": []}')
    with pytest.raises(Mistake, match=r"dataset.json tells of something else than what .*dataset.pt would hold"):
        convert.widen(str(source), str(tmp_path / "dataset.pt"), 2, "mean")
    assert other.read_text() == '{"training": []}'


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train_conductor.yaml", "small.yaml"], "change what none of them holds .*: name train.yaml first"),
        (["multi_gpu.yaml"], "does not say encoder_depth of the network: name train.yaml first"),
    ],
)
def test_overlays_alone_are_no_network(tmp_path, files, message):
    with pytest.raises(Mistake, match=message):
        convert.to_authors(str(carrying(tmp_path)), str(tmp_path / "a.pt"), [str(ROOT / "configs" / f) for f in files])


def test_the_authors_checkpoint_is_no_flat_weights(tmp_path):
    with pytest.raises(Mistake, match=r"let it end in .pt"):
        convert.to_authors(str(carrying(tmp_path)), str(tmp_path / "authors.safetensors"))


def test_a_folder_carries_nothing():
    assert read_record(".") == read_record("/") == {}


def test_the_bundles_own_weights_are_described_by_their_record():
    weights = ROOT / "models" / "model.pt"
    own = ConfigParser.load_config_file(ROOT / "configs" / "inference.json")
    assert carried_knobs(weights, own | {"strict_stem": None}, own) == {"strict_stem": False}
    assert read_record(weights)["network"]["strict_stem"] == stem_is_strict(load(weights), weights)
    assert len(read_record(weights)["seen"]["hashes"]) == 122


@pytest.mark.parametrize(("dataset_dir", "is_checked"), [("scans", True), (None, False)])
def test_scans_must_be_like_those_of_the_bundles_own_weights_and_the_sample_need_not(dataset_dir, is_checked):
    _, refuse, *_ = checked("inference", dataset_dir=dataset_dir)("loading")
    assert bool(refuse.arguments[-1]) == is_checked
