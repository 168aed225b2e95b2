"""Tiny networks and volumes that every test can afford."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

# One thread is fastest for networks this small, and leaves the other core alone; before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
# Outputs of the authors' implementation: two configurations in every clone, a larger one where `shared` lies beside it.
REFERENCES = sorted({*FIXTURES.glob("reference_*.pt"), *ROOT.parent.glob("shared/fixtures/reference_patch16*.pt")})
sys.path.insert(0, str(ROOT))

from processes import Started, run_module  # noqa: E402

from scripts import BertsWinMAE  # noqa: E402
from scripts.engines import AutocastInferer, MAETrainer, PrepareMaskedBatch  # noqa: E402
from scripts.losses import MaskedL2Loss  # noqa: E402

TINY = {
    "img_size": (32, 32, 32),
    "patch_size": 8,
    "encoder_embed_dim": 48,
    "encoder_depths": (2,),
    "encoder_num_heads": (4,),
    "swin_window_size": (2, 2, 2),
    "decoder_embed_dim": 32,
    "stem_base_dim": 8,
}
# The same, as knobs of the configs.
TINY_KNOBS = {
    "img_size": [32, 32, 32],
    "patch_size": 8,
    "encoder_embed_dim": 48,
    "encoder_depth": 2,
    "encoder_num_heads": 4,
    "swin_window_size": [2, 2, 2],
    "decoder_embed_dim": 32,
    "stem_base_dim": 8,
    "batch_size": 2,
    "iterations_per_epoch": 2,
    "max_epochs": 2,
    "warmup_epochs": 0,
    "figure_interval": 1,
}


def tiny(**overrides) -> BertsWinMAE:
    torch.manual_seed(0)
    return BertsWinMAE(**(TINY | overrides)).eval()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Volumes(torch.utils.data.Dataset):
    """Noise that passes for a dataset."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"image": noise(1, 32, 32, 32, seed=index), "case": f"case_{index}", "seed": index}


def trainer(
    network,
    batch_size=2,
    length=4,
    epochs=1,
    precision="fp32",
    optimizer_factory=None,
    kind=MAETrainer,
    loader=None,
    **settings,
):
    """Build an MAETrainer on noise; the factory makes an optimiser, or that and a scheduler, for the network."""
    made = optimizer_factory(network) if optimizer_factory else torch.optim.SGD(network.parameters(), 0.01)
    optimizer, scheduler = made if isinstance(made, tuple) else (made, None)
    return kind(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=loader or torch.utils.data.DataLoader(Volumes(length), batch_size=batch_size),
        network=network,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        inferer=AutocastInferer(precision, "cpu"),
        **{"loss_function": MaskedL2Loss(), "prepare_batch": PrepareMaskedBatch(8, 0.75)} | settings,
    )


def write_volume(path: Path, shape=(36, 30, 33), seed: int = 0, spacing: float = 1.0, low: float = 0.0) -> Path:
    """Write a smooth random NIfTI volume, from `low` up by 1000."""
    coarse = np.random.default_rng(seed).random(tuple(-(-side // 6) for side in shape))
    voxels = np.kron(coarse, np.ones((6, 6, 6)))[: shape[0], : shape[1], : shape[2]] * 1000 + low
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels.astype(np.float32), np.diag([spacing, spacing, spacing, 1.0])), path)
    return path


@pytest.fixture(scope="session", autouse=True)
def python_path() -> list[str]:
    """Python's path once all tests are collected."""
    return list(sys.path)


@pytest.fixture(autouse=True)
def _own_path(python_path: list[str]) -> Iterator[None]:
    """Forget the bundles that a test has put on the path: `scripts` of a later test's processes is this one."""
    yield
    sys.path[:] = python_path


@pytest.fixture(scope="session")
def cohort(tmp_path_factory) -> Path:
    """A Decathlon folder with six small MR-like volumes."""
    folder = tmp_path_factory.mktemp("cohort")
    training = []
    for number in range(6):
        write_volume(folder / "imagesTr" / f"case_{number}.nii.gz", seed=number)
        training.append({"image": f"./imagesTr/case_{number}.nii.gz", "label": f"./labelsTr/case_{number}.nii.gz"})
    (folder / "dataset.json").write_text(json.dumps({"training": training, "test": []}))
    return folder


def copy_bundle(place: Path) -> Path:
    """Copy the repository's files, without what runs and builds have left in it."""

    def left_out(folder: str, names: list[str]) -> list[str]:
        at_the_top = {"runs", "data", "dist", "build"} if Path(folder) == ROOT else set()
        return [n for n in names if n in at_the_top or n.startswith(".") or n.endswith((".egg-info", "__pycache__"))]

    return shutil.copytree(ROOT, place, ignore=left_out)


def records(folder: Path) -> list[dict]:
    """Read the metrics.jsonl that a run left."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Markup(HTMLParser):
    """The tags of a page, and what they link to, as a browser reads them."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.links = set(), set(), []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]


def asks_for_nothing(page: str) -> None:
    """Look for scripts in a page, for what opens outside of its folder, and for a policy that forbids all that."""
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page
    markup = Markup(page)
    assert not markup.tags & {"script", "iframe", "link", "object", "embed", "form", "base"}
    assert not any(name.startswith("on") for name in markup.attributes)
    assert [link for link in markup.links if not link.startswith(("data:image/", "#", "./"))] == []
    assert not re.search(r"url\(|@import", page)


def drawn_by_a_browser(page: Path) -> np.ndarray:
    """Let Chromium draw the top of a page, and hear no complaint; skip where there is none."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("Chromium is not installed: no browser has drawn the page")
    picture, profile = page.with_suffix(".png"), page.parent / ".profile"
    result = subprocess.run(  # noqa: S603
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=800,1000",
         f"--user-data-dir={profile}", f"--screenshot={picture}", f"file://{page}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in result.stderr  # what the page's policy forbids is told there, and so are errors
    return matplotlib.image.imread(picture)[..., :3]


def bundle(*arguments: str, cwd: Path = ROOT, **knobs) -> subprocess.CompletedProcess:
    """Run `python -m monai.bundle …` as a user would, in a process of its own."""
    return run_module("monai.bundle", [*arguments, *_overrides(knobs)], cwd)


def _overrides(knobs: dict) -> list[str]:
    return [part for name, value in knobs.items() for part in (f"--{name}", str(value))]


def started(*configs: str, run_id: str = "training", **knobs) -> ConfigWorkflow:
    """Build a workflow and do all of its steps but the last: what it is made of can be looked at, nothing has run."""
    files = [str(ROOT / "configs" / name) for name in configs or ("train.yaml", "small.yaml")]
    workflow = ConfigWorkflow(files, workflow_type="train", run_id=run_id, **knobs)
    workflow.initialize()
    for step in range(len(workflow.parser[run_id]) - 1):
        workflow.parser.get_parsed_content(f"{run_id}::{step}")
        workflow.parser.ref_resolver.remove_resolved_content(f"{run_id}::{step}")  # as a run does
    return workflow


def train(*configs: str, cwd: Path = ROOT, **knobs) -> subprocess.CompletedProcess:
    return bundle(*_training(configs), cwd=cwd, **(TINY_KNOBS | knobs))


def start_training(*configs: str, **knobs) -> Started:
    return Started("monai.bundle", [*_training(configs), *_overrides(TINY_KNOBS | knobs)], ROOT)


def _training(configs: tuple[str, ...]) -> list[str]:
    files = [str(ROOT / "configs" / name) for name in configs or ("train.yaml", "small.yaml")]
    return ["run", "training", "--config_file", str(files)]


def app_environment(name: str, *packages: str) -> Path:
    """Install packages into a virtual environment of their own, on top of this one, and return its Python.

    It is made once, in a folder that ``APPS_ENVIRONMENTS`` names, or that of temporary files.
    """
    folder = Path(os.environ.get("APPS_ENVIRONMENTS", tempfile.gettempdir())) / f"bertswin_{name}"
    if not (folder / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)  # noqa: S603
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "beneath.pth").write_text(sysconfig.get_path("purelib"))
        constraints = folder / "constraints.txt"
        constraints.write_text(f"torch=={torch.__version__.partition('+')[0]}\n")  # what is here, not the newest
        command = [str(folder / "bin" / "pip"), "install", "-q", *packages, "-c", str(constraints)]
        subprocess.run(command, check=True)  # noqa: S603
        (folder / "complete").touch()
    return folder / "bin" / "python"
