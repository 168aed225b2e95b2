"""Promises of the configs: complete, consistent, and kind to a wrong knob."""

import json
import re
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY_KNOBS, bundle, started, write_volume
from monai.bundle import ConfigParser, ConfigWorkflow

import scripts
from scripts.cli import check_knobs
from scripts.data.draws import Draw

CONFIGS = ROOT / "configs"


def test_check_properties_finds_nothing_missing(cohort, tmp_path):
    training = started(dataset_dir=str(cohort), output_dir=str(tmp_path), **TINY_KNOBS)
    assert training.check_properties() == []
    assert training.train_dataset_data[0]["case"] == "imagesTr/case_0"
    assert training.max_epochs == 2
    assert training.evaluator is not None


@pytest.mark.parametrize(
    ("kind", "run_id", "files"),
    [
        ("infer", "inference", ["inference.json"]),
        ("train", "training", ["train.yaml", "small.yaml"]),
        ("train", "finetuning", ["train.yaml", "finetune_segmentation.yaml", "small.yaml"]),
    ],
)
def test_without_an_argument_a_workflow_is_complete_and_stands_on_the_sample(
    cohort, tmp_path, monkeypatch, kind, run_id, files
):
    sample = shutil.copytree(cohort, tmp_path / "data" / "simulated_brains")
    shutil.copytree(sample / "imagesTr", sample / "labelsTr")
    for path in (sample / "labelsTr").iterdir():
        image = nib.load(path)
        nib.save(nib.Nifti1Image((image.get_fdata() // 500).astype(np.uint8), image.affine), path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.setattr("sys.path", [*sys.path])
    paths = [str(CONFIGS / name) for name in files]
    workflow = ConfigWorkflow(paths, workflow_type=kind, run_id=run_id, bundle_root=str(tmp_path))
    workflow.initialize()
    assert workflow.check_properties() == []
    dataset = workflow.parser.get_parsed_content("dataset" if kind == "infer" else "train::dataset")
    assert Path(dataset.data[0]["image"]).is_relative_to(sample)


def test_the_small_config_builds_the_small_factory_network(tmp_path):
    ours = started(output_dir=str(tmp_path)).network_def
    factory = scripts.bertswin_mae_small_patch8_48x64x48()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in factory.state_dict().items()}
    assert ours.encoder.img_size == factory.encoder.img_size


def test_the_large_config_builds_the_papers_network(tmp_path):
    large = started("train.yaml", output_dir=str(tmp_path))
    with torch.device("meta"):
        ours, paper = large.network_def, scripts.bertswin_mae_base_patch16_224()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in paper.state_dict().items()}


def test_the_large_config_holds_the_papers_numbers(tmp_path):
    knobs = yaml.safe_load((CONFIGS / "train.yaml").read_text())
    assert knobs["batch_size"] * knobs["accumulation_steps"] == 50
    assert knobs["iterations_per_epoch"] == 300 * knobs["accumulation_steps"]
    assert (knobs["learning_rate"], knobs["weight_decay"], knobs["clip_norm"]) == (1.5e-4, 0.05, 1.0)
    assert (knobs["warmup_epochs"], knobs["early_stop_patience"], knobs["mask_ratio"]) == (20, 50, 0.75)
    ct = knobs["intensities"]["ct"]["transforms"][0]
    for hounsfield, scaled in ((ct["a_min"], ct["b_min"]), (ct["a_max"], ct["b_max"])):
        assert scaled == pytest.approx((hounsfield + 21.14) / 578.02, abs=1e-4)
    assert knobs["intensities"]["ct"]["data_range"] == pytest.approx(ct["b_max"] - ct["b_min"], abs=2e-4)


def test_every_knob_has_a_comment():
    text = (CONFIGS / "train.yaml").read_text()
    lines = text[text.index("- knobs\n") : text.index("\nsample:")].splitlines()
    knobs = {line.split(":")[0]: line for line in lines if line[:1].isalpha()}
    assert len(knobs) > 40
    assert [name for name, line in knobs.items() if " # " not in line] == []


def test_small_overrides_only_what_train_has():
    train, small = (yaml.safe_load((CONFIGS / name).read_text()) for name in ("train.yaml", "small.yaml"))
    assert small.keys() <= train.keys()


def test_metadata_network_and_package_agree():
    metadata = json.loads((CONFIGS / "metadata.json").read_text())
    # Of two pins, the later one is for Python 3.10: the metadata's are there for every Python.
    pins = dict(re.findall(r"^(\S+)==([^\s;]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    assert metadata["monai_version"] == pins["monai"]
    assert metadata["pytorch_version"] == pins["torch"]
    assert metadata["numpy_version"] == pins["numpy"]
    for package, version in metadata["required_packages_version"].items():
        assert pins[package] == version, package
    assert metadata["version"] in metadata["changelog"]  # the version's only place: pyproject.toml takes it from there
    contract, encoder = metadata["network_data_format"], scripts.from_pretrained(device="cpu").encoder
    image, pred = contract["inputs"]["image"], contract["outputs"]["pred"]
    volume = torch.zeros(1, image["num_channels"], *image["spatial_shape"])
    assert tuple(encoder(volume).shape[1:]) == (pred["num_channels"], *pred["spatial_shape"])


def test_verify_metadata_accepts_the_metadata(tmp_path):
    # MONAI's schema lies on a server: its demands on the format are kept here, and an existing file skips the download.
    schema = {"type": "object", "required": REQUIRED, "properties": {"version": {"type": "string"}}}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    arguments = ["verify_metadata", "--meta_file", str(CONFIGS / "metadata.json")]
    result = bundle(*arguments, filepath=tmp_path / "schema.json")
    assert result.returncode == 0, result.stderr
    assert "metadata is verified with no error" in result.stdout + result.stderr


# The required fields of MONAI's meta_schema_20240725.json.
REQUIRED = [
    "schema",
    "version",
    "changelog",
    "monai_version",
    "pytorch_version",
    "numpy_version",
    "required_packages_version",
    "task",
    "description",
    "authors",
    "copyright",
    "network_data_format",
]


@pytest.mark.parametrize(
    ("knob", "value", "message"),
    [
        ("max_epoch", 3, "there is no knob called max_epoch: did you mean max_epochs?"),
        ("datasetdir", "x", "there is no knob called datasetdir: did you mean dataset_dir?"),
        ("max_epochs", "many", "max_epochs is 'many' but must be of type int, for example 300"),
        ("batch_size", 2.5, "batch_size is 2.5 but must be of type int"),
        ("resume", "perhaps", "resume is 'perhaps' but must be of type bool"),
        ("img_size", 48, r"img_size is 48 but must be of type list, for example \[224, 224, 224\]"),
        ("img_size", [48, 64], r"img_size is \[48, 64\] but must be a list like \[224, 224, 224\]"),
        ("swin_window_size", ["a", 1, 1], r"swin_window_size is \['a', 1, 1\] but must be a list like \[7, 7, 7\]"),
        ("batch_size", 0, "batch_size is 0 but must be at least 1"),
        ("batch_size", None, "batch_size is null but must be of type int, for example 10"),
        ("flip_axes", [3], r"flip_axes is 3 but must be one of \[0, 1, 2\]"),
        ("device", "gpu", r"device gpu cannot be used .*; --device c.* would do"),
        ("output_dir", __file__, r"test_configs.py cannot be written to"),
        ("output_dir", "~/x", r"~/x would be a folder called ~: write the path out"),
        ("modality", "pet", r"modality is 'pet' but must be one of \['ct', 'mr'\]"),
        ("cache", "disc", "cache is 'disc' but must be one of .*: did you mean disk?"),
    ],
)
def test_a_wrong_override_is_refused_with_what_would_do(knob, value, message):
    with pytest.raises(RuntimeError) as caught:
        started(**{knob: value})
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(ValueError, match=message):
        raise caught.value.__cause__


@pytest.mark.parametrize("text", ["true", "True", "yes"])
def test_truth_may_be_spelt_as_in_yaml(text, tmp_path):
    training = started(skip_invalid=text, output_dir=str(tmp_path))
    assert training.parser.get_parsed_content("skip_invalid") is True
    assert training.parser.get_parsed_content("cases", instantiate=False).get_config()["skip_invalid"] is True


def test_an_overlay_may_bring_items_of_its_own_if_something_uses_them(tmp_path):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("my_ratio: 0.5\nmask_ratio: '@my_ratio'\n")
    training = started("train.yaml", "small.yaml", str(overlay), output_dir=str(tmp_path))
    assert training.parser.get_parsed_content("mask_ratio") == 0.5


def test_check_knobs_works_inside_a_config_only():
    with pytest.raises(RuntimeError, match="inside a MONAI bundle config only"):
        check_knobs()


def built(*files, **overrides):
    return started(*files, **overrides).parser.get_parsed_content


def known_volume(folder, low, high, axcodes="LPI"):
    """Write twelve voxels of 2 mm each way: `low` everywhere, `high` in the half towards the patient's right."""
    voxels = np.full((12, 12, 12), low, np.float32)
    voxels[6:] = high  # the second half of the first axis, which runs to the left or to the right
    flips = np.diag([*(-2.0 if code in "LPI" and axcodes != "RAS" else 2.0 for code in axcodes), 1.0])
    for number in range(2):
        noise = np.random.default_rng(number).random(voxels.shape).astype(np.float32) * 1e-3 * (high - low)
        nib.save(nib.Nifti1Image(voxels + noise, flips), folder / f"{number}.nii.gz")


@pytest.mark.parametrize("axcodes", ["RAS", "LPI"])
@pytest.mark.parametrize(
    ("modality", "low", "high", "expected"),
    [
        ("ct", -400.0, 500.0, ((-400 + 21.14) / 578.02, (500 + 21.14) / 578.02, (-1011 + 21.14) / 578.02)),
        ("ct", -2000.0, 4000.0, (None, (1992 + 21.14) / 578.02, (-1011 + 21.14) / 578.02)),
        ("mr", 300.0, 900.0, (None, 1.0, -1.0)),
    ],
)
def test_preparation_orients_resamples_scales_crops_and_pads(tmp_path, modality, low, high, expected, axcodes):
    known_volume(tmp_path, low, high, axcodes)
    resolve = built(
        dataset_dir=str(tmp_path), output_dir=str(tmp_path / "out"), modality=modality, spacing=[1.0, 1.0, 1.0],
        **TINY_KNOBS,
    )  # fmt: skip
    volume = resolve("validate::dataset")[0]["image"]
    assert type(volume) is torch.Tensor
    assert volume.shape == (1, 32, 32, 32)
    low_value, high_value, padding = expected
    assert volume[0, 0, 0, 0].item() == pytest.approx(padding, abs=1e-3)
    # 12 voxels of 2 mm are 23 of 1 mm from centre to centre; RAS puts the patient's right at the first index.
    filled = (volume[0] > padding + 0.2).nonzero()
    assert (filled.amax(dim=0) - filled.amin(dim=0) + 1)[1:].tolist() == [23, 23]
    middle = volume[0, :, 16, 16]
    bright = (middle > (high_value + padding) / 2).nonzero().float().mean()
    assert middle.max().item() == pytest.approx(high_value, abs=0.02)
    if low_value is not None:
        dark = middle[(middle > padding + 0.2) & (middle < (low_value + high_value) / 2)]
        assert dark.median().item() == pytest.approx(low_value, abs=0.02)
        assert (bright > 15.5) == (axcodes == "RAS")  # the bright half lies left or right


def draws(resolve, count):
    """Draw the first training volume several times."""
    return [resolve("train::dataloader").dataset[Draw(0, seed)] for seed in range(count)]


def test_random_crops_reach_every_part_of_a_volume_and_flips_only_the_axes_asked_for(tmp_path):
    ramp = np.stack(np.meshgrid(*3 * [np.arange(44.0)], indexing="ij"))
    for number in range(2):
        voxels = (ramp[0] + 50 * ramp[1] + 1e-3 * number).astype(np.float32)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / f"{number}.nii.gz")
    settings = {"dataset_dir": str(tmp_path), "output_dir": str(tmp_path / "out"), **TINY_KNOBS}
    images = [item["image"] for item in draws(built(**settings, affine_prob=0.0, flip_prob=0.0), 80)]
    lows, highs = ([limit(image).item() for image in images] for limit in (torch.min, torch.max))
    assert min(lows) < -0.88  # the foreground crop keeps what is above -0.9
    assert max(highs) > 0.98
    assert len({round(low, 3) for low in lows}) > 10  # many different places
    assert all(image[0, 1, 5, 5] > image[0, 0, 5, 5] for image in images)
    flipped = draws(built(**settings, affine_prob=0.0, flip_prob=1.0, flip_axes=[0]), 1)[0]["image"]
    assert flipped[0, 1, 5, 5] < flipped[0, 0, 5, 5]
    assert flipped[0, 5, 1, 5] > flipped[0, 5, 0, 5]


def test_rotation_is_meant_in_degrees(tmp_path):
    for number in range(2):
        write_volume(tmp_path / f"{number}.nii.gz", shape=(48, 48, 48), seed=number)
    resolve = built(dataset_dir=str(tmp_path), output_dir=str(tmp_path / "out"), **TINY_KNOBS, affine_prob=1.0)
    turn = resolve("train::augmentation").transforms[0]
    assert turn.radians == pytest.approx(12 / 180 * np.pi)
    assert (turn.prob, turn.scaling) == (1, 0.1)


def test_the_trainer_is_built_with_the_knobs(cohort, tmp_path):
    resolve = built(dataset_dir=str(cohort), output_dir=str(tmp_path), **(TINY_KNOBS | {"warmup_epochs": 1}),
                    weight_decay=0.07, clip_norm=0.5, accumulation_steps=2, learning_rate=0.01)  # fmt: skip
    trainer = resolve("train::trainer")
    (group,) = trainer.optimizer.param_groups
    assert (group["weight_decay"], group["betas"]) == (0.07, (0.9, 0.95))
    assert (trainer.clip_norm, trainer.accumulation_steps) == (0.5, 2)
    assert trainer.lr_scheduler.optimizer is trainer.optimizer
    rates = [group["lr"]]
    for _ in range(2):  # two epochs of one step each
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        rates.append(group["lr"])
    assert rates == pytest.approx([1e-8, 0.01, 1e-6])


def test_the_smallest_error_is_the_best(cohort, tmp_path):
    evaluator = built(dataset_dir=str(cohort), output_dir=str(tmp_path), **TINY_KNOBS)("validate::evaluator")
    assert evaluator.state.key_metric_name == "val_loss"
    assert evaluator.metric_cmp_fn(0.1, 0.2)
    assert not evaluator.metric_cmp_fn(0.2, 0.1)


def padded_cts(folder):
    """Write two CTs, tilted off RAS, of a ball of soft tissue in noisy air, within constant padding; as a datalist."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*3 * [np.arange(40) - 19.5], indexing="ij"))
    voxels = np.where((grid**2).sum(axis=0) < 100, 40.0, -1000.0) + rng.normal(0, 10, (40, 40, 40))
    voxels[np.abs(grid[0]) > 15] = -2048
    for number in range(2):
        voxels[20, 20, 20] += number  # no copy of each other
        affine = np.diag([-1.0, -1.0, 1.0, 1.0])
        nib.save(nib.Nifti1Image(voxels.astype(np.float32), affine), folder / f"{number}.nii.gz")
    return {"dataset_dir": str(folder), "output_dir": str(folder / "out"), "modality": "ct"} | TINY_KNOBS


@pytest.mark.parametrize(("field_of_view", "spacing"), [("scanner", None), ("scanner", [1.5, 1.5, 1.5]),
                                                        ("foreground", None)])  # fmt: skip
def test_the_field_of_view_follows_the_volume_through_every_transform(tmp_path, field_of_view, spacing):
    settings = padded_cts(tmp_path) | {"field_of_view": field_of_view, "spacing": spacing, "img_size": [48, 48, 48]}
    resolve = built(**settings, affine_prob=1.0, ct_noise_prob=0.0, hu_warp_prob=0.0)
    drawn = draws(resolve, 10)
    for item in (resolve("validate::dataset")[0], *drawn):
        image, fov = item["image"][0], item["fov"][0].bool()
        truth = image > (-1.7124 if field_of_view == "scanner" else -0.5)  # padding is at the window's lower end
        assert 0.01 < fov.float().mean() < 0.9
        # The volume is resampled smoothly and the mask is not: their borders may differ by a voxel.
        assert (fov != truth).float().mean() < 0.12
        assert (fov & truth).sum() / (fov | truth).sum() > 0.75
    assert len({item["fov"].sum().item() for item in drawn}) > 5  # different places


def test_only_the_input_is_augmented(tmp_path):
    settings = padded_cts(tmp_path)

    def draw(**knobs):
        return draws(built(**(settings | knobs)), 1)[0]

    clean = draw(hu_warp_prob=0.0, ct_noise_prob=0.0)
    assert torch.equal(clean["image"], clean["target"])
    noisy = draw(hu_warp_prob=1.0, ct_noise_prob=1.0)
    assert torch.equal(noisy["target"], clean["target"])
    assert (noisy["image"] - noisy["target"]).abs().max() > 0.01
    assert noisy["image"].min() >= -1.7126


@pytest.mark.parametrize("field_of_view", ["none", "scanner", "foreground"])
def test_the_device_makes_the_same_batches_as_the_workers(tmp_path, field_of_view):
    settings = padded_cts(tmp_path) | {"num_workers": 0, "field_of_view": field_of_view, "flip_prob": 0.5}
    settings |= {"affine_prob": 0.7, "hu_warp_prob": 0.7, "ct_noise_prob": 0.7, "batch_size": 4}

    def batches(on_device):
        resolve = built(**settings, augment_on_device=on_device)
        loader, prepare = resolve("train::dataloader"), resolve("train::trainer").prepare_batch
        given = list(loader)
        assert given[0]["image"].shape[2] == (40 if on_device else 32)  # with room to turn, or turned
        return [prepare(batch, "cpu") for batch in given]

    for ours, theirs in zip(batches(True), batches(False), strict=True):
        for one, other in zip(ours[:2], theirs[:2], strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        assert ours[3].keys() == theirs[3].keys()
        assert all(torch.equal(ours[3][name], theirs[3][name]) for name in ours[3])


@pytest.mark.parametrize("on_device", [True, False])
def test_a_compact_cache_gives_the_same_batches(tmp_path, on_device):
    settings = padded_cts(tmp_path) | {"num_workers": 0, "augment_on_device": on_device}

    def batch(compact):
        resolve = built(**settings, compact=compact)
        cached = resolve("train::dataset")._cache[0]["image"]
        assert cached.dtype == (torch.int16 if compact else torch.float32)
        return resolve("train::trainer").prepare_batch(next(iter(resolve("train::dataloader"))), "cpu")[0]

    assert torch.equal(batch(True), batch(False))


@pytest.mark.parametrize(
    ("device", "knob", "expected"), [("cpu", "auto", False), ("cuda:0", "auto", True), ("cpu", True, True)]
)
def test_volumes_are_augmented_on_a_gpu_by_default_and_elsewhere_by_the_workers(device, knob, expected):
    config = ConfigParser.load_config_file(CONFIGS / "train.yaml") | {"device": device, "augment_on_device": knob}
    assert ConfigParser(config).get_parsed_content("train::on_device") is expected


def test_mr_is_not_augmented_in_hounsfield_units(cohort, tmp_path):
    resolve = built(dataset_dir=str(cohort), output_dir=str(tmp_path), **TINY_KNOBS)
    assert "target" not in draws(resolve, 1)[0]
