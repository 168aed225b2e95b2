"""Promises of the command line: what can be run, what is refused, in one line."""

import pytest
from conftest import ROOT, bundle, started, train
from monai.bundle import ConfigParser, ConfigWorkflow

from scripts.mistakes import Mistake

STACKS = {
    "pretraining": (["train.yaml"], ["training", "plan"]),
    "conductor": (["train.yaml", "train_conductor.yaml", "multi_gpu.yaml"], ["training", "plan"]),
    "stem_tuning": (["train.yaml", "tune_stem.yaml", "small.yaml"], ["training", "plan", "tuning"]),
    "segmentation": (["train.yaml", "finetune_segmentation.yaml"], ["training", "plan", "finetuning", "prediction"]),
    "classification": (
        ["train.yaml", "finetune_classification.yaml"],
        ["training", "plan", "finetuning", "prediction"],
    ),
    "probe": (["train.yaml", "probe.yaml"], ["training", "plan", "probe"]),
    "inference": (["inference.json"], ["inference"]),
}


def ended(run_id, *configs, **knobs):
    """Make a workflow, and do what comes at its end, or, of an inference, at its start."""
    workflow = ConfigWorkflow([str(ROOT / "configs" / name) for name in configs], run_id=run_id, **knobs)
    workflow.initialize()
    workflow.finalize()
    return workflow


@pytest.mark.parametrize("stack", STACKS)
def test_the_workflows_of_a_config_can_be_run_and_nothing_else(stack):
    configs, workflows = STACKS[stack]
    for run_id in (*workflows, "run"):
        assert ended(run_id, *configs).parser[run_id]
    sections = ConfigParser.load_config_files([str(ROOT / "configs" / name) for name in configs])
    others = {name for name in sections if "::" not in name and not name.startswith("+")} - {*workflows, "run"}
    assert {"network", "device", "imports"} <= others
    for run_id in others:
        with pytest.raises(RuntimeError) as caught:
            ended(run_id, *configs)
        assert str(caught.value.__cause__) == (
            f"there is no workflow called {run_id} in these configs: run one of {', '.join(workflows)}"
        )
        assert isinstance(caught.value.__cause__, Mistake)


def test_the_default_of_a_probe_is_to_probe():
    steps = ended("run", "train.yaml", "probe.yaml").parser
    assert steps["run"] == steps["training"] == steps["probe"]
    assert steps["run"][-1] == "$@probing.run()"


def test_an_overlay_may_bring_a_workflow(tmp_path):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("mine:\n  - _target_: scripts.cli.check_knobs\n  - $print(@max_epochs)\nalso: '%training'\n")
    for run_id in ("mine", "also"):
        ended(run_id, "train.yaml", str(overlay))


# Where nobody may make a folder, not even root.
READ_ONLY = "/sys/bertswin"


@pytest.mark.slow
@pytest.mark.parametrize(
    "knobs",
    [{"sample::folder": f"{READ_ONLY}/brains"}, {"output_dir": READ_ONLY}, {"cache": "disk", "cache_dir": READ_ONLY},
     {"ckpt_dir": f"{READ_ONLY}/checkpoints"}],
    ids=["sample", "output", "cache", "checkpoints"],
)  # fmt: skip
def test_a_folder_that_is_read_only_is_named_in_one_line(knobs, tmp_path, cohort):
    if "sample::folder" in knobs:
        pytest.importorskip("nilearn", reason="the sample extra is not installed")
    else:
        knobs = {"dataset_dir": cohort, **knobs}
    result = train(**{"output_dir": tmp_path / "out", "num_workers": 0, **knobs})
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert READ_ONLY in line
    assert "choose another" in line
    assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run_id", "stack"),
    [("train", "pretraining"), ("losses", "probe"), ("validate", "segmentation"), ("network", "inference")],
)
def test_what_is_no_workflow_ends_in_one_line_from_any_directory(run_id, stack, tmp_path):
    configs, workflows = STACKS[stack]
    files = str([str(ROOT / "configs" / name) for name in configs])
    result = bundle("run", run_id, "--config_file", files, cwd=tmp_path)
    assert result.returncode == 1
    assert f"error: there is no workflow called {run_id} in these configs: run one of {', '.join(workflows)}\n" in (
        result.stderr
    )
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["train::flips", "train::random_transforms"])
def test_what_an_overlay_of_an_earlier_version_changes_in_vain_is_refused(name):
    with pytest.raises(RuntimeError) as caught:
        started(**{name: []})
    assert str(caught.value.__cause__).startswith(f"{name} is of an earlier version: train::")
