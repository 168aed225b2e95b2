"""Promises of bad input: every row of the table in docs/troubleshooting.md, and headers and bytes changed at random."""

import contextlib
import gzip
import json
import os
import re
import shutil
import struct
import tempfile
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, started, write_volume
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts import weights
from scripts.data import check_labels, labelled, prepare_cases, volume_problem
from scripts.mistakes import causes
from scripts.weights import checkpoints

TABLE = (ROOT / "docs" / "troubleshooting.md").read_text()


def write(folder, voxels, affine=None, name="bad.nii.gz"):
    image = nib.Nifti1Image(np.asarray(voxels), np.eye(4) if affine is None else affine)
    nib.save(image, folder / name)


def ramp(*shape, dtype=np.float32):
    return np.arange(np.prod(shape), dtype=dtype).reshape(shape)


def with_voxel(value):
    voxels = ramp(8, 8, 8)
    voxels[1, 2, 3] = value
    return voxels


def truncated(folder):
    write(folder, ramp(20, 20, 20))
    path = folder / "bad.nii.gz"
    path.write_bytes(path.read_bytes()[:-300])


def with_bytes(changes):
    """Write a good volume, then other bytes into its header, by where they start."""

    def make(folder):
        write(folder, ramp(8, 8, 8))
        path = folder / "bad.nii.gz"
        content = bytearray(gzip.decompress(path.read_bytes()))
        for start, changed in changes.items():
            content[start : start + len(changed)] = changed
        path.write_bytes(gzip.compress(bytes(content)))

    return make


WRONG_TYPE = {70: struct.pack("<h", 9999)}  # of the voxels
ENORMOUS = {40: struct.pack("<8h", 3, 30000, 30000, 30000, 1, 1, 1, 1)}  # dimensions
FLAT_AFFINE = {312: bytes(16)}  # its third row
ZERO_SPACING = dict.fromkeys((284, 300, 316), bytes(4))  # the affine's second column


def twice(folder):
    write(folder, ramp(8, 8, 8), name="good_1.nii")


def with_spacing(*spacing):
    return lambda folder: write(folder, ramp(8, 8, 8), affine=np.diag([*spacing, 1.0]))


def nothing(folder):
    for path in folder.iterdir():
        path.unlink()


def listed_but_gone(folder):
    (folder / "dataset.json").write_text(json.dumps({"training": [{"image": "elsewhere.nii.gz"}]}))


def outside(folder):
    write_volume(folder.parent / "elsewhere.nii.gz")
    (folder / "dataset.json").write_text(json.dumps({"training": [{"image": "./sub/../../elsewhere.nii.gz"}]}))


def without_a_channel(folder):
    channels = {"channel_names": {"0": "T1", "1": "T2"}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(channels))
    for name in ("case_0_0000", "case_0_0001", "case_1_0000"):
        write_volume(folder / "imagesTr" / f"{name}.nii.gz")


def several_contrasts(folder):
    for name in ("sub-1/sub-1_T1w", "sub-1/sub-1_FLAIR", "sub-2/sub-2_T1w"):
        write_volume(folder / f"{name}.nii.gz")


def one_patient(folder):
    for session in (1, 2):
        write_volume(folder / "sub-1" / f"sub-1_ses-{session}_T1w.nii.gz", seed=session, spacing=0.1)


def no_datalist(folder):
    (folder / "dataset.json").write_text(json.dumps({"training": [{"picture": "good_1.nii.gz"}]}))


# What the row of the table says first, how to make it, and the modality.
VOLUMES = {
    "cut off": (truncated, "mr"),
    "a header of something else": (with_bytes(WRONG_TYPE), "mr"),
    "a header that claims too much": (with_bytes(ENORMOUS), "mr"),
    "empty file": (lambda folder: (folder / "bad.nii.gz").write_bytes(b""), "mr"),
    "NaN or infinite voxels": (lambda folder: write(folder, with_voxel(np.nan)), "mr"),
    "constant": (lambda folder: write(folder, np.full((8, 8, 8), 7.0)), "mr"),
    "4D": (lambda folder: write(folder, ramp(8, 8, 8, 3)), "mr"),
    "a single slice": (lambda folder: write(folder, ramp(8, 8, 1)), "mr"),
    "no place in space": (with_bytes(FLAT_AFFINE), "mr"),
    "zero spacing": (with_bytes(ZERO_SPACING), "mr"),
    "absurd spacing": (with_spacing(1.0, 5000.0, 1.0), "mr"),
    "too large once resampled": (with_spacing(99.0, 99.0, 99.0), "mr"),
    "a label map": (lambda folder: write(folder, ramp(8, 8, 8).astype(np.uint8) % 3), "mr"),
    "almost empty": (lambda folder: write(folder, np.where(ramp(8, 8, 8) == 5, 5.5, 0.0)), "mr"),
    "a CT as MR": (lambda folder: write(folder, np.where(ramp(9, 9, 9) % 2, -1000, ramp(9, 9, 9) / 9)), "mr"),
    "no Hounsfield units": (lambda folder: write(folder, ramp(8, 8, 8)), "ct"),
    "nothing but air": (lambda folder: write(folder, -1000 - ramp(8, 8, 8) / 100), "ct"),
    "two files of one name": (twice, "mr"),
    "nothing there": (nothing, "mr"),
    "no such folder": (lambda folder: shutil.rmtree(folder), "mr"),
    "listed, but not there": (listed_but_gone, "mr"),
    "listed, out of the folder": (outside, "mr"),
    "a datalist of another kind": (no_datalist, "mr"),
    "a channel that is missing": (without_a_channel, "mr"),
    "several contrasts": (several_contrasts, "mr"),
    "one patient": (one_patient, "mr"),
}


def row_of(name):
    """Return what the table says of a row: the message, its parts between dots."""
    (line,) = [line for line in TABLE.splitlines() if line.startswith(f"| {name} |")]
    message = line.split("|")[2].strip().strip("`")
    return [part.strip() for part in message.split("…") if part.strip()]


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "data"
    for number in (1, 2):
        write_volume(place / f"good_{number}.nii.gz", seed=number, low=-1000)
    return place


@contextlib.contextmanager
def as_a_user():
    """Root may read everything, so be nobody for a while, where the tests are run by root."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.mark.parametrize("name", VOLUMES)
def test_a_bad_volume_is_refused_with_the_message_of_the_table(name, folder):
    make, modality = VOLUMES[name]
    make(folder)
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(ValueError) as caught:
        prepare_cases(folder, modality, spacing=(0.1, 0.1, 0.1))
    for part in row_of(name):
        assert part in str(caught.value), str(caught.value)
    assert sorted(folder.parent.rglob("*")) == before


def test_a_volume_without_permission_is_refused_with_the_message_of_the_table():
    with tempfile.TemporaryDirectory() as place:  # that anybody may enter, unlike pytest's
        write(Path(place), ramp(8, 8, 8))
        Path(place).chmod(0o755)
        (Path(place) / "bad.nii.gz").chmod(0)
        with as_a_user():
            problem = volume_problem(Path(place) / "bad.nii.gz", "mr")
    for part in row_of("no permission"):
        assert part in problem


def odd_label(folder):
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[1, 2, 3] = 7
    write(folder, labels, name="label.nii.gz")


# How to make the label map, None for none, and how many are asked for.
LABELS = {
    "a damaged label map": (lambda folder: (folder / "label.nii.gz").write_bytes(b"no"), 1),
    "labels beyond the last one": (odd_label, 1),
    "a label map of another size": (lambda folder: write(folder, np.zeros((7, 8, 8)), name="label.nii.gz"), 1),
    "labels that are not there": (lambda folder: None, 1),
    "no labels": (None, 1),
    "fewer labels than asked for": (odd_label, 9),
}


@pytest.mark.parametrize("name", LABELS)
def test_a_bad_label_map_is_refused_with_the_message_of_the_table(name, tmp_path):
    make, most = LABELS[name]
    write(tmp_path, ramp(8, 8, 8), name="image.nii.gz")
    case = {"image": str(tmp_path / "image.nii.gz"), "case": "a"}
    if make:
        make(tmp_path)
        case["label"] = str(tmp_path / "label.nii.gz")
    with pytest.raises(ValueError) as caught:
        check_labels(labelled([case], most), num_labels=2)
    for part in row_of(name):
        assert part in str(caught.value), str(caught.value)


class Code:
    def __reduce__(self):
        return (print, ("executed",))


def save_code(path):
    torch.save({"network": Code()}, path)


def save_half(path):
    checkpoints.save({"weight": torch.arange(1000.0)}, path)
    path.write_bytes(path.read_bytes()[:2000])


def save_changed(path):
    checkpoints.save({"weight": torch.arange(1000.0)}, path)
    content = bytearray(path.read_bytes())
    content[2000] ^= 255
    path.write_bytes(content)


def save_other(path):
    torch.save({"weight": torch.zeros(3), "bias": torch.zeros(4)}, path)


CHECKPOINTS = {
    "a checkpoint with code": save_code,
    "a checkpoint that is cut off": save_half,
    "a checkpoint with a changed byte": save_changed,
    "a checkpoint of another network": save_other,
    "no checkpoint": lambda path: None,
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_bad_checkpoint_is_refused_with_the_message_of_the_table(name, tmp_path, capsys):
    path = tmp_path / "model.pt"
    CHECKPOINTS[name](path)
    with pytest.raises(ValueError) as caught:
        weights.fill(torch.nn.Linear(2, 2), path)
    for part in row_of(name):
        assert part in str(caught.value), str(caught.value)
    assert "executed" not in capsys.readouterr().out


def a_file(tmp_path):
    (tmp_path / "taken").write_text("a file")
    return {"output_dir": str(tmp_path / "taken")}


def an_earlier_run(tmp_path):
    (tmp_path / "training_state.pt").write_text("of an earlier run")
    return {"output_dir": str(tmp_path), "ckpt_dir": str(tmp_path)}


KNOBS = {
    "an unknown knob": lambda tmp_path: {"max_epoch": 3},
    "a value of another type": lambda tmp_path: {"max_epochs": "many"},
    "a list of another length": lambda tmp_path: {"img_size": [48, 64]},
    "a value that is not among the choices": lambda tmp_path: {"modality": "pet"},
    "one that is like none": lambda tmp_path: {"lr": 0.1},
    "null, where something is needed": lambda tmp_path: {"batch_size": "null"},
    "a list of which an entry is out of range": lambda tmp_path: {"img_size": [0, 48, 48]},
    "a value out of range": lambda tmp_path: {"batch_size": 0},
    "a network that cannot be built": lambda tmp_path: {"img_size": [50, 64, 48]},
    "a device that is not there": lambda tmp_path: {"device": "cuda:99"},
    "an output folder that cannot be written to": a_file,
    "the output of an earlier run": an_earlier_run,
}


@pytest.mark.parametrize("name", KNOBS)
def test_a_bad_knob_is_refused_with_the_message_of_the_table(name, tmp_path):
    knobs = {"output_dir": str(tmp_path / "out")} | KNOBS[name](tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RuntimeError) as caught:
        started(**knobs).parser.get_parsed_content("network")
    messages = " ".join(map(str, causes(caught.value)))
    for part in row_of(name):
        assert part in messages, messages
    assert sorted(tmp_path.rglob("*")) == before


def test_every_row_of_the_table_is_tested():
    rows = set(re.findall(r"^\| ([^|`]+?) \| `", TABLE, re.MULTILINE))
    assert rows == VOLUMES.keys() | LABELS.keys() | CHECKPOINTS.keys() | KNOBS.keys() | {"no permission"}


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changes=st.lists(st.tuples(st.integers(0, 1200), st.integers(0, 255)), min_size=1, max_size=6),
       end=st.none() | st.integers(0, 1300))  # fmt: skip
def test_headers_and_bytes_changed_at_random_give_a_reason_or_a_volume_and_never_an_error(tmp_path, changes, end):
    write(tmp_path, ramp(6, 6, 6), name="whole.nii")
    content = bytearray((tmp_path / "whole.nii").read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    path = Path(tmp_path / "changed.nii")
    path.write_bytes(content[:end])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        problem = volume_problem(path, "mr")
    assert problem is None or (problem and "\n" not in problem)
