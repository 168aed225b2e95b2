"""Promises of the documents: every command and every block of Python in them runs."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_KNOBS, copy_bundle
from processes import run_module

import scripts
from scripts.release import PUBLISHED
from scripts.weights import to_reference_state_dict

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```(\w+)( notest)?\n(.*?)```", re.DOTALL)
# What the comments in the blocks say.
SHAPES = {
    "encoder": {
        "folder": (6, 192),
        "features": (6, 192, 8, 8, 8),
        "alike": (6, 6),
        "reconstruction": (1, 1, 48, 64, 48),
        "scores": (2, 2),
        "segmentation": (1, 3, 64, 64, 64),
        "large": (1, 192, 8, 9, 10),
    },
}
# A run needs to be started and ended, not to become good.
SHORT = {
    "training": ["--max_epochs", "1", "--iterations_per_epoch", "1"],
    "tuning": ["--max_epochs", "1", "--iterations_per_epoch", "1"],
    "finetuning": ["--max_epochs", "1", "--iterations_per_epoch", "1"],
}
FEW_DRAWS = ["--discriminant_draws", "8"]  # that the linear map of a segmentation is computed from


def blocks(language):
    return [
        pytest.param(page, body, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, (kind, untested, body) in enumerate(BLOCK.findall(page.read_text()))
        if kind == language and not untested
    ]


def pages_with(language):
    return sorted({parameter.values[0] for parameter in blocks(language)})


def body_of(page, language):
    return "\n".join(parameter.values[1] for parameter in blocks(language) if parameter.values[0] == page)


def anchors(page):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _label(folder):
    """Write the labels that the cohort's datalist names: 1 where an image is bright, 2 where it is brightest."""
    (folder / "labelsTr").mkdir()
    for path in (folder / "imagesTr").iterdir():
        image = nib.load(path)
        voxels = np.asarray(image.dataobj)
        label = (voxels > 500).astype(np.uint8) + (voxels > 800)
        nib.save(nib.Nifti1Image(label.astype(np.uint8), image.affine), folder / "labelsTr" / path.name)
    listed = json.loads((folder / "dataset.json").read_text())["training"]
    cases = [item | {"sex": "FM"[number % 2], "age": 20 + number} for number, item in enumerate(listed)]
    (folder / "dataset.json").write_text(json.dumps({"training": cases[:4], "validation": cases[4:]}))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, cohort):
    """A copy of the bundle with what the documents' examples name."""
    place = tmp_path_factory.mktemp("docs") / "bundle"
    copy_bundle(place)
    shutil.copytree(cohort, place / "DIR")
    shutil.copy(cohort / "imagesTr" / "case_0.nii.gz", place / "SCAN.nii.gz")
    _label(shutil.copytree(cohort, place / "LABELLED"))
    network = scripts.bertswin_mae_small_patch8_48x64x48()
    torch.save(network.state_dict(), place / "MODEL.pt")
    for suffix in (".pt", ".json"):
        shutil.copy(place / "models" / f"model{suffix}", place / f"ENCODER{suffix}")
    torch.save({"model_state_dict": to_reference_state_dict(network)}, place / "AUTHORS.pt")
    quickstart = place / "runs" / "quickstart" / "checkpoints"
    quickstart.mkdir(parents=True)
    torch.save(network.state_dict(), quickstart / "model.pt")
    (place / "OUT" / "CASE").mkdir(parents=True)
    nib.save(nib.Nifti1Image(np.zeros((6, 8, 6, 4)), np.eye(4)), place / "OUT" / "CASE" / "features.nii.gz")
    return place


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_anchors_and_pictures_of_a_page_are_published(page):
    for link, anchor in re.findall(r"\]\((?!\w+://)([^)#]*)#?([^)]*)\)", page.read_text()):
        target = (page.parent / link).resolve() if link else page
        name = target.relative_to(ROOT)
        assert target.exists(), link
        assert any(name.match(pattern) for pattern in PUBLISHED), link
        assert not anchor or anchor in anchors(target), f"{link}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_no_figure_left_to_fill_in(page):
    assert (
        re.findall(r"[A-Z]{5,}_RESULTS?|UNEXPLAINED\d+|WEIGHTS$|SMALL4|TODO|@@", page.read_text(), re.MULTILINE) == []
    )


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("bash"), ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page, workplace):
    for line in filter(None, body_of(page, "bash").splitlines()):  # in one process: a later one may need an earlier
        # The set-up of the quick start is what installed this very environment.
        words = shlex.split(line.split("&&")[-1].replace(".venv/bin/python", "python"))
        if words[:3] == ["python", "-m", "pytest"]:
            continue
        assert words[:2] == ["python", "-m"], line
        extra = next((flags for name, flags in SHORT.items() if name in words), [])
        if "finetuning" in words and "finetune_segmentation" in line and "peers" not in line:
            extra = [*extra, *FEW_DRAWS]
        if "runs/quickstart" in words:
            extra = [*extra, "--output_dir", "OUT/quickstart"]  # the later one counts
        elif "run" in words and "--output_dir" not in words:
            extra = [*extra, "--output_dir", f"OUT/{page.stem}"]
        result = run_module(words[2], [*words[3:], *extra], workplace)
        assert result.returncode == 0, f"{line}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"


@pytest.mark.parametrize("page", pages_with("python"), ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    for name in [name for name in sys.modules if name == "scripts" or name.startswith("scripts.")]:
        monkeypatch.setitem(sys.modules, f"bertswin_mae{name.removeprefix('scripts')}", sys.modules[name])
    body = body_of(page, "python")
    names: dict = {"__name__": page.stem}
    exec(compile(body, str(page), "exec"), names)  # noqa: S102
    for name, shape in SHAPES.get(page.stem, {}).items():
        assert tuple(names[name].shape) == shape


def test_the_encoder_page_goes_from_the_weights_to_their_use_in_ten_lines():
    body = next(parameter.values[1] for parameter in blocks("python") if "from_pretrained" in parameter.values[1])
    assert len([line for line in body.splitlines() if line]) <= 10


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The package as pip installs it, in a folder of its own."""
    place = tmp_path_factory.mktemp("pip")
    copy_bundle(place / "source")
    options = ["-q", "--no-deps", "--no-build-isolation", "--target", str(place / "site")]
    command = [sys.executable, "-m", "pip", "install", *options, str(place / "source")]
    subprocess.run(command, check=True, capture_output=True)  # noqa: S603
    return place / "site"


def in_package(installed, code, cwd):
    environment = os.environ | {"PYTHONPATH": str(installed)}
    ended = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_pip_installs_the_package_under_its_name(installed, tmp_path):
    in_package(
        installed,
        "import monai, bertswin_mae; assert monai.networks.nets.BertsWinMAE is bertswin_mae.BertsWinMAE",
        tmp_path,
    )
    assert not (installed / "scripts").exists()
    (information,) = installed.glob("bertswin_mae-*.dist-info")
    version = json.loads((ROOT / "configs" / "metadata.json").read_text())["version"]
    assert information.name == f"bertswin_mae-{version}.dist-info"


@pytest.mark.slow
def test_the_installed_package_holds_every_room_twice_and_no_experiment(installed):
    package = installed / "bertswin_mae"
    rooms = {path.relative_to(ROOT / "scripts") for path in (ROOT / "scripts").rglob("*.py")}
    rooms = {room for room in rooms if room.parts[0] != "experiments"}
    assert len({room.parent for room in rooms}) > 5
    for place in (package, package / "bundle" / "scripts"):
        found = {path.relative_to(place) for path in place.rglob("*.py")}
        assert {path for path in found if path.parts[0] != "bundle"} == rooms
    apart = ("experiments", "peers", "tests")
    assert not [path for path in package.rglob("*") if path.name in apart]
    assert (package / "bundle" / "CITATION.cff").exists()  # which the front page links


@pytest.mark.slow
def test_the_installed_package_holds_a_bundle_that_runs(installed, cohort, tmp_path):
    code = "import torch, bertswin_mae as b; b.from_pretrained(device='cpu')(torch.ones(1, 1, 64, 64, 64)); "
    code += "import sys; sys.path.insert(0, str(b.bundle_root())); import scripts; "
    code += "print(b.bundle_root(), scripts.bundle_root())"
    root = installed / "bertswin_mae" / "bundle"
    assert in_package(installed, code, tmp_path).split() == [str(root)] * 2
    assert {path.name for path in (root / "configs").rglob("*")} == {
        path.name for path in (ROOT / "configs").glob("*.*")
    }
    files = [str(root / "configs" / name) for name in ("train.yaml", "small.yaml")]
    knobs = TINY_KNOBS | {"max_epochs": 1, "dataset_dir": str(cohort), "output_dir": str(tmp_path / "out")}
    arguments = [part for name, value in knobs.items() for part in (f"--{name}", str(value))]
    ended = run_module("monai.bundle", ["run", "training", "--config_file", str(files), *arguments], tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "out" / "checkpoints" / "model.pt").exists()
