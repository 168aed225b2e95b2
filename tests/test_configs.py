"""Promises of the configs: complete, consistent, and kind to a wrong knob."""

import json

import pytest
import torch
import yaml
from conftest import ROOT, TINY_KNOBS, bundle
from monai.bundle import ConfigWorkflow

import scripts
from scripts.cli import check_knobs

CONFIGS = ROOT / "configs"
PRETRAINING = [str(CONFIGS / "train.yaml"), str(CONFIGS / "small.yaml")]


def workflow(files=tuple(PRETRAINING), **overrides):
    return ConfigWorkflow(list(files), workflow_type="train", **overrides)


def test_check_properties_finds_nothing_missing(cohort, tmp_path):
    training = workflow(dataset_dir=str(cohort), output_dir=str(tmp_path), **TINY_KNOBS)
    training.initialize()
    assert training.check_properties() == []
    assert training.train_dataset_data[0]["case"] == "imagesTr/case_0"
    assert training.max_epochs == 2
    assert training.evaluator is not None


def test_the_small_config_builds_the_small_factory_network(tmp_path):
    small = workflow(output_dir=str(tmp_path))
    small.initialize()
    ours, factory = small.network_def, scripts.bertswin_mae_small_patch8_48x64x48()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in factory.state_dict().items()}
    assert ours.encoder.img_size == factory.encoder.img_size


def test_the_large_config_builds_the_papers_network(tmp_path):
    large = workflow([PRETRAINING[0]], output_dir=str(tmp_path))
    large.initialize()
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
    says_it_itself = {"encoder_num_heads", "decoder_embed_dim"}
    commented_above = {"bundle_root", "small"}
    assert {name for name, line in knobs.items() if " # " not in line} == says_it_itself | commented_above


def test_small_overrides_only_what_train_has():
    train, small = (yaml.safe_load((CONFIGS / name).read_text()) for name in ("train.yaml", "small.yaml"))
    assert small.keys() <= train.keys()


def test_metadata_network_and_package_agree():
    metadata = json.loads((CONFIGS / "metadata.json").read_text())
    pins = dict(line.split("#")[0].strip().split("==") for line in (ROOT / "requirements.txt").read_text().splitlines()
                if "==" in line)  # fmt: skip
    assert metadata["monai_version"] == pins["monai"]
    assert metadata["pytorch_version"] == pins["torch"]
    assert metadata["numpy_version"] == pins["numpy"]
    for package, version in metadata["required_packages_version"].items():
        assert pins[package] == version, package
    assert f'version = "{metadata["version"]}"' in (ROOT / "pyproject.toml").read_text()
    assert metadata["version"] in metadata["changelog"]
    contract, encoder = metadata["network_data_format"], scripts.bertswin_mae_small_patch8_48x64x48().encoder
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
        ("batch_size", None, "batch_size is None but must be of type int"),
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
        workflow(**{knob: value}).initialize()
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(ValueError, match=message):
        raise caught.value.__cause__


@pytest.mark.parametrize("text", ["true", "True", "yes"])
def test_truth_may_be_spelt_as_in_yaml(text, tmp_path):
    training = workflow(skip_invalid=text, output_dir=str(tmp_path))
    training.initialize()
    assert training.parser.get_parsed_content("skip_invalid") is True
    assert training.parser.get_parsed_content("cases", instantiate=False).get_config()["skip_invalid"] is True


def test_an_overlay_may_bring_items_of_its_own_if_something_uses_them(tmp_path):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("my_ratio: 0.5\nmask_ratio: '@my_ratio'\n")
    training = workflow([*PRETRAINING, str(overlay)], output_dir=str(tmp_path))
    training.initialize()
    assert training.parser.get_parsed_content("mask_ratio") == 0.5


def test_check_knobs_works_inside_a_config_only():
    with pytest.raises(RuntimeError, match="inside a MONAI bundle config only"):
        check_knobs(CONFIGS / "train.yaml")
