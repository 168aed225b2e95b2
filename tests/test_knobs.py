"""Promises of the knobs: spelt as in YAML, within their range, refused by name in one line."""

from math import inf, nan

import pytest
from conftest import ROOT, TINY_KNOBS, started, train, write_volume
from monai.bundle import ConfigParser

from scripts.cli import RECIPES
from scripts.knobs import CHOICES, OPTIONAL, RANGES, is_expression, is_knob, read
from scripts.mistakes import Mistake

CONFIGS = ROOT / "configs"
DEFAULTS = {
    recipe: ConfigParser.load_config_files([str(CONFIGS / name) for name in files]) for recipe, files in RECIPES.items()
}
# Every knob of every workflow with its own value there.
KNOBS = [(name, own) for defaults in DEFAULTS.values() for name, own in defaults.items() if is_knob(name, own)]
NULLABLE = [(name, own) for name, own in KNOBS if own is None or name in OPTIONAL]
NULLS = ("null", "Null", "NULL", "~", None)


def numbers(own):
    """The numbers that a knob's own value holds, if it is numeric."""
    entries = own if isinstance(own, list) else [own]
    return [entry for entry in entries if isinstance(entry, int | float) and not isinstance(entry, bool)]


NUMERIC = [(name, own) for name, own in KNOBS if numbers(own)]


def test_the_knobs_of_all_workflows_are_here():
    assert len({name for name, _ in KNOBS}) > 60
    assert {name for name, _ in NULLABLE} == {
        *("dataset_dir", "pretrained", "strict_stem", "num_train_cases", "group_by"),
        *("spacing", "iterations_per_epoch", "clip_norm", "discriminant_draws", "index", "monitor_interval"),
        "start_volumes",
    }


@pytest.mark.parametrize("text", NULLS)
def test_null_is_null_in_every_spelling_where_it_may_be(text):
    for name, own in NULLABLE:
        assert read(name, text, own) is None, name


@pytest.mark.parametrize("text", NULLS)
def test_null_is_refused_by_name_where_it_may_not_be(text):
    for name, own in KNOBS:
        if (name, own) not in NULLABLE:
            with pytest.raises(Mistake, match=f"^{name} is null but must be (of type|one of) .+"):
                read(name, text, own)


@pytest.mark.parametrize(("name", "word"), [("cache", "none"), ("field_of_view", "none"), ("parallel", "none")])
def test_none_stays_a_word(name, word):
    assert read(name, word, DEFAULTS["pretraining"][name]) == word


@pytest.mark.parametrize(
    ("recipe", "name", "text", "meant"),
    [
        ("pretraining", "learning_rate", "1e-4", 1e-4),
        ("pretraining", "weight_decay", "5E-2", 0.05),
        ("segmentation", "encoder_learning_rate", "1e-5", 1e-5),
        ("conductor", "final_learning_rate", "1e-7", 1e-7),
        ("pretraining", "clip_norm", "1", 1.0),
        ("pretraining", "iterations_per_epoch", "1e3", 1000),
        ("pretraining", "iterations_per_epoch", 1e3, 1000),
        ("inference", "max_voxels", "2e9", 2_000_000_000),
        ("segmentation", "num_train_cases", "12", 12),
        ("pretraining", "spacing", ["15e-1", 1, "1e0"], [1.5, 1, 1.0]),
        ("inference", "spacing", ["1e0", 1.5, 2], [1.0, 1.5, 2]),
        ("pretraining", "img_size", ("48", 64.0, "4.8e1"), [48, 64, 48]),
        ("pretraining", "flip_axes", ["0", 1.0], [0, 1]),
    ],
)
def test_text_that_is_a_number_is_that_number(recipe, name, text, meant):
    value = read(name, text, DEFAULTS[recipe][name])
    assert value == meant
    assert all(map(lambda one, two: type(one) is type(two), numbers(value), numbers(meant)))


def test_every_number_of_every_workflow_may_be_text():
    for name, own in NUMERIC:
        text = [str(entry) for entry in own] if isinstance(own, list) else str(own)
        assert read(name, text, own) == own, name


@pytest.mark.parametrize(("name", "value"), [("learning_rate", "1e-4x"), ("batch_size", "2.5"), ("batch_size", True),
    ("spacing", ["null", 1, 1]), ("spacing", [1, 1]), ("clip_norm", []), ("max_epochs", "many")])  # fmt: skip
def test_what_is_no_number_is_refused_with_an_example(name, value):
    own = DEFAULTS["pretraining"][name]
    or_null = ", or null" if name in OPTIONAL else ""
    with pytest.raises(Mistake, match=rf"^{name} is .+ but must be .+{or_null}$"):
        read(name, value, own)


def test_every_number_of_every_config_has_a_range_or_choices():
    found = {name for name, _ in NUMERIC} | {"num_train_cases", "spacing"}
    for path in (*CONFIGS.rglob("*.yaml"), CONFIGS / "inference.json"):
        found |= {name for name, own in ConfigParser.load_config_file(path).items()
                  if numbers(own) and "::" not in name}  # fmt: skip
    assert len(found) > 40
    assert found == {*RANGES, "flip_axes"}
    assert "flip_axes" in CHOICES


def test_every_own_value_is_in_range_and_what_is_outside_is_refused_by_name():
    for name, own in NUMERIC:
        assert read(name, own, own) is own
        if name not in RANGES:
            continue
        span, kind = RANGES[name], type(numbers(own)[0])
        outside = [kind(span.low - 1), *([] if span.with_low else [span.low]), *([] if span.with_high else [span.high])]
        outside += [nan, inf, -inf, "nan", "-inf", ".inf", -(10**400)] + ([] if span.high == inf else [span.high + 1])
        for number in outside:
            value = [number, *own[1:]] if isinstance(own, list) else number
            with pytest.raises(Mistake, match=f"^{name} is [^\n]+ but (its entries )?must be [^\n]+$"):
                read(name, value, own)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rate", -0.1, "learning_rate is -0.1 but must be above 0"),
        ("clip_norm", -1, "clip_norm is -1 but must be above 0"),
        ("mask_ratio", 1.5, "mask_ratio is 1.5 but must be at least 0 and below 1"),
        ("val_fraction", 0, "val_fraction is 0 but must be above 0 and below 1"),
        ("weight_decay", -0.1, "weight_decay is -0.1 but must be at least 0"),
        ("rotation", 200, "rotation is 200 but must be at least 0 and at most 180"),
        ("swin_window_size", [7, 0, 7], r"swin_window_size is \[7, 0, 7\] but its entries must be at least 1"),
        ("learning_rate", "nan", "learning_rate is nan but must be above 0"),
        ("seed", -1, "seed is -1 but must be at least 0"),
        ("spacing", [0.2, 0.2, -1], r"spacing is .* but its entries must be at least 0.001 and at most 100"),
    ],
)
def test_a_number_out_of_range_ends_a_run_before_anything_is_read(name, value, message, tmp_path):
    with pytest.raises(RuntimeError) as caught:
        started(**{name: value}, dataset_dir=str(tmp_path / "gone"))
    with pytest.raises(Mistake, match=message):
        raise caught.value.__cause__


@pytest.mark.parametrize(
    ("name", "text", "meant"),
    [
        *(("modality", text, "ct") for text in ("ct", "CT", "Ct")),
        *(("modality", text, "mr") for text in ("MR", "mr", "Mr", "MRI", "mri", "Mri")),
        *(("cache", "Disk", "disk"), ("cache", "NONE", "none"), ("field_of_view", "Scanner", "scanner")),
        *(("precision", "BF16", "bf16"), ("parallel", "FSDP", "fsdp")),
        *(("augment_on_device", text, True) for text in (True, "true", "Yes")),
        *(("augment_on_device", text, False) for text in (False, "False", "off")),
        ("augment_on_device", "Auto", "auto"),
    ],
)
def test_choices_are_compared_without_case(name, text, meant):
    assert read(name, text, DEFAULTS["pretraining"][name]) == meant


@pytest.mark.parametrize(
    ("name", "value", "proposal"),
    [("modality", "pet", ""), ("modality", "T1", ""), ("cache", "ram", ""), ("precision", "float", ""),
     ("augment_on_device", "maybe", ""), ("cache", "disc", ": did you mean disk?"),
     ("field_of_view", "scaner", ": did you mean scanner?")],
)  # fmt: skip
def test_a_choice_is_proposed_if_it_is_like_what_came(name, value, proposal):
    with pytest.raises(Mistake) as caught:
        read(name, value, DEFAULTS["pretraining"][name])
    assert str(caught.value) == f"{name} is {value!r} but must be one of {list(CHOICES[name])}{proposal}"


@pytest.mark.parametrize(("name", "near"), [("lr", None), ("bs", None), ("gpu", None), ("fp16", None),
    ("epochs", "max_epochs"), ("Batch_Size", "batch_size"), ("learningrate", "learning_rate")])  # fmt: skip
def test_a_name_is_proposed_if_it_is_like_what_came(name, near):
    with pytest.raises(RuntimeError) as caught:
        started(**{name: 1})
    message = str(caught.value.__cause__)
    if near:
        assert f"there is no knob called {name}: did you mean {near}?" in message
    else:
        assert "did you mean" not in message
        assert f"there is no knob called {name}: the knobs are accumulation_steps, " in message
        assert "learning_rate" in message
        assert "train_loss" not in message


def test_what_is_read_as_meant_reaches_the_run(tmp_path):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("learning_rate: 1e-4\nspacing: [1e-1, 0.2, 1.e-1]\n")
    knobs = {"clip_norm": "~", "modality": "CT", "iterations_per_epoch": "Null", "output_dir": str(tmp_path / "out")}
    resolve = started("train.yaml", "small.yaml", str(overlay), **knobs).parser.get_parsed_content
    assert [resolve(name) for name in ("learning_rate", "clip_norm", "iterations_per_epoch")] == [1e-4, None, None]
    assert resolve("spacing") == [0.1, 0.2, 0.1]
    assert resolve("padding")[0] == -1.7125  # of a CT


def test_lists_are_lists_however_the_command_line_spells_them():
    # A resumed run compares them, and (2.0, 2.0, 2.0) is no [2.0, 2.0, 2.0].
    assert read("spacing", (2.0, 2.0, 2.0), None) == [2.0, 2.0, 2.0]
    assert read("img_size", ("64", 64, 64), [32, 32, 32]) == [64, 64, 64]


def test_expressions_and_other_parts_of_a_config_are_left_alone():
    assert is_expression("@max_epochs")
    for name, value in (("learning_rate", "$1e-4"), ("spacing", "@other"), ("cache", "%cache"), ("batch_size", "$-1")):
        assert read(name, value, DEFAULTS["pretraining"][name]) is value
    network = {"_target_": "mine"}
    assert read("network_def", network, DEFAULTS["pretraining"]["network_def"]) is network
    assert read("output_dir", 2024, DEFAULTS["pretraining"]["output_dir"]) == "2024"


@pytest.mark.slow
def test_the_command_line_speaks_yaml(tmp_path):
    for number in range(3):
        write_volume(tmp_path / "data" / f"{number}.nii.gz", seed=number)
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("learning_rate: 1e-4\n")
    knobs = {"spacing": "Null", "clip_norm": "None", "iterations_per_epoch": "NULL", "pretrained": "~"}
    knobs |= {"modality": "MRI", "max_epochs": 1, "cache": "none", "field_of_view": "none", "num_workers": 0}
    settings = knobs | {"dataset_dir": tmp_path / "data", "output_dir": tmp_path / "out"}
    result = train("train.yaml", "small.yaml", str(overlay), **settings)
    assert result.returncode == 0, result.stderr
    assert '"learning_rate": 0.0001' in (tmp_path / "out" / "metrics.jsonl").read_text()
    assert "clip_norm</td><td>null</td>" in (tmp_path / "out" / "report.html").read_text()
    for null in ("null", "None"):
        refused = train(**settings | {"batch_size": null})
        assert refused.returncode == 1
        assert refused.stderr.splitlines()[-1] == "error: batch_size is null but must be of type int, for example 10"
    unknown = train(**settings | {"batchsize": "None"})
    assert "there is no knob called batchsize" in unknown.stderr.splitlines()[-1]
    assert TINY_KNOBS["batch_size"] == 2
