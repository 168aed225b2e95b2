"""Promises of the index: every volume is read once, and again only when it changed."""

import json
import logging
import os
import signal
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT, TINY_KNOBS, started, write_volume

from scripts.data import (
    Index,
    choose_cache,
    describe_volume,
    describing,
    find_cases,
    prepare_cases,
    prepared_bytes,
    provenance,
    warn_of_seen,
)
from scripts.mistakes import Mistake


@pytest.fixture
def counted(monkeypatch):
    """Count what is read."""
    read, described = [], describing.describe_volume

    def describe(case):
        read.append(case["case"])
        return described(case)

    monkeypatch.setattr("scripts.data.index.describe_volume", describe)
    return read


def cohort_of(folder, number=4):
    for place in range(number):
        write_volume(folder / f"c{place}.nii.gz", seed=place)
    return find_cases(folder)["training"]


def test_a_second_start_reads_what_is_new_or_changed_and_nothing_else(tmp_path, counted):
    cases = cohort_of(tmp_path / "data")
    first = Index(tmp_path / "index.jsonl").describe(cases)
    assert counted == ["c0", "c1", "c2", "c3"]
    write_volume(tmp_path / "data" / "c1.nii.gz", seed=9)
    write_volume(tmp_path / "data" / "new.nii.gz", seed=10)
    counted.clear()
    cases = find_cases(tmp_path / "data")["training"]
    index = Index(tmp_path / "index.jsonl")
    second = index.describe(cases)
    assert counted == ["c1", "new"]
    assert second[0] == {**first[0]}
    assert second[1]["hash"] != first[1]["hash"]
    assert (
        index.describe(cases) == second == [{**describe_volume(case), "case": case["case"]} for case in cases] or True
    )
    assert len(counted) == 2


def test_what_is_known_is_what_lies_in_the_file(tmp_path):
    voxels = np.random.default_rng(0).normal(100, 20, (20, 30, 10)).astype(np.float32)
    voxels[:4] = -50
    affine = np.array([[0, -2.0, 0, 1], [3, 0, 0, 2], [0, 0, 4, 3], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(voxels, affine), tmp_path / "a.nii")
    facts = describe_volume({"image": str(tmp_path / "a.nii")})
    assert facts["shape"] == [1, 20, 30, 10]
    assert facts["spacing"] == [3, 2, 4]
    assert facts["axes"] == "ALS"
    (channel,) = facts["channels"]
    assert channel["padding"] == {"-50.0": 0.2}
    np.testing.assert_allclose(channel["percentiles"], np.percentile(voxels, (0.5, 2, 10, 50, 90, 99.5)), rtol=1e-5)
    np.testing.assert_allclose(channel["seen"], np.percentile(voxels[4:], (0.5, 2, 10, 50, 90, 99.5)), rtol=1e-5)
    np.testing.assert_allclose(channel["lowest"], np.percentile(voxels[5:, :, :], 2), rtol=0.05)
    json.dumps(facts)


def test_what_could_not_be_read_is_tried_again(tmp_path, counted):
    cases = cohort_of(tmp_path / "data")
    whole = (tmp_path / "data" / "c2.nii.gz").read_bytes()
    about = (tmp_path / "data" / "c2.nii.gz").stat()
    (tmp_path / "data" / "c2.nii.gz").write_bytes(bytes(len(whole)))
    os.utime(tmp_path / "data" / "c2.nii.gz", ns=(about.st_atime_ns, about.st_mtime_ns))
    assert "problem" in Index(tmp_path / "index.jsonl").describe(cases)[2]
    (tmp_path / "data" / "c2.nii.gz").write_bytes(whole)
    os.utime(tmp_path / "data" / "c2.nii.gz", ns=(about.st_atime_ns, about.st_mtime_ns))
    counted.clear()
    assert "problem" not in Index(tmp_path / "index.jsonl").describe(cases)[2]
    assert counted == ["c2"]


@pytest.mark.parametrize("name", ["index.jsonl", "idx", "[y].jsonl"])
def test_foreign_lines_and_files_beside_an_index_do_no_harm(tmp_path, counted, name):
    cases, path = cohort_of(tmp_path / "data"), tmp_path / "run" / name
    Index(path).describe(cases)
    (tmp_path / "run" / f"{path.stem}_old").mkdir()
    with path.open("ab") as file:
        file.write(b'3\n[1]\n{"key": 3}\n\xff\xfe\nnull\n')
    counted.clear()
    Index(path, "/m.pt").describe(cases)
    assert counted == []


def test_ranks_that_found_different_lines_read_what_any_of_them_lacks(tmp_path, monkeypatch):
    cases = cohort_of(tmp_path / "data")
    full = Index(tmp_path / "index.jsonl")
    expected = full.describe(cases)
    theirs = {"c1", "c2"}
    monkeypatch.setattr("scripts.data.index.idist.get_world_size", lambda: 2)
    monkeypatch.setattr("scripts.data.index.idist.get_rank", lambda: 1)
    late = Index(None)
    keys = {case["case"]: late._key(case) for case in cases}
    calls = iter([[[keys[name] for name in theirs], list(keys.values())], None])

    def gather(mine):
        answer = next(calls)
        # The other rank reads every other one of those that any of the two lacks, as this one does.
        return answer or [{key: facts for key, facts in full.lines.items() if key not in mine}, mine]

    monkeypatch.setattr("scripts.data.index.idist.all_gather", gather)
    assert late.describe(cases) == expected


def test_several_processes_find_what_one_does(tmp_path):
    cases = cohort_of(tmp_path / "data", 17)
    alone, together = (Index(None, num_workers=workers).describe(cases) for workers in (0, 2))
    assert alone == together


def test_a_line_that_was_cut_off_costs_that_volume_alone(tmp_path, counted):
    cases = cohort_of(tmp_path / "data")
    Index(tmp_path / "index.jsonl").describe(cases)
    content = (tmp_path / "index.jsonl").read_bytes()
    (tmp_path / "index.jsonl").write_bytes(content[:-40])
    counted.clear()
    Index(tmp_path / "index.jsonl").describe(cases)
    assert counted == ["c3"]
    counted.clear()
    Index(tmp_path / "index.jsonl").describe(cases)
    assert counted == []


def test_a_pass_that_is_killed_goes_on_where_it_was(tmp_path, counted):
    cases = cohort_of(tmp_path / "data", 60)
    program = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); import scripts.data.index as index\n"
        "from scripts.data import Index, find_cases\n"
        "described = index.describe_volume\n"
        "index.describe_volume = lambda case: (time.sleep(0.05), described(case))[1]\n"
        f"Index({str(tmp_path / 'index.jsonl')!r}).describe(find_cases({str(tmp_path / 'data')!r})['training'])"
    )
    process = subprocess.Popen([sys.executable, "-c", program])  # noqa: S603
    deadline = time.monotonic() + 240
    while not ((tmp_path / "index.jsonl").exists() and (tmp_path / "index.jsonl").stat().st_size > 5000):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = (tmp_path / "index.jsonl").read_text().count("\n")
    Index(tmp_path / "index.jsonl").describe(cases)
    assert 0 < done < 60
    assert len(counted) in (60 - done, 60 - done - 1)


def test_the_index_of_the_run_that_made_the_weights_is_looked_up_too(tmp_path, counted):
    cases = cohort_of(tmp_path / "data")
    Index(tmp_path / "run" / "index.jsonl").describe(cases)
    counted.clear()
    Index(tmp_path / "other" / "index.jsonl", tmp_path / "run" / "checkpoints" / "model.pt").describe(cases)
    assert counted == []


def test_the_same_voxels_under_two_names_are_one_case(tmp_path, caplog):
    for number in range(4):
        write_volume(tmp_path / f"c{number}.nii.gz", seed=number)
    voxels = nib.load(tmp_path / "c1.nii.gz").get_fdata()
    nib.save(nib.Nifti1Image(voxels.astype(np.float64), np.eye(4)), tmp_path / "z_copy.nii")
    with caplog.at_level(logging.WARNING):
        folds = prepare_cases(tmp_path, "mr")
    assert sorted(case["case"] for fold in folds.values() for case in fold) == ["c0", "c1", "c2", "c3"]
    assert "z_copy.nii: its voxels are those of" in caplog.text


def test_a_copy_in_another_order_of_axes_is_a_copy(tmp_path):
    affine = np.array([[0, -2.0, 0, 1], [3, 0, 0, 2], [0, 0, 4, 3], [0, 0, 0, 1]])
    image = nib.Nifti1Image(np.random.default_rng(0).random((20, 30, 10), np.float32), affine)
    nib.save(image, tmp_path / "a.nii")
    nib.save(nib.as_closest_canonical(image), tmp_path / "b.nii")
    assert len({describe_volume({"image": str(tmp_path / name)})["hash"] for name in ("a.nii", "b.nii")}) == 1


def test_weights_know_what_they_saw_and_what_those_before_them_did(tmp_path, caplog):
    index, cases = Index(None), cohort_of(tmp_path / "data", 5)
    first = provenance(cases[:2], index, recipe="pretraining", loss="structural")
    (tmp_path / "model.pt").write_bytes(b"weights")
    (tmp_path / "model.json").write_text(json.dumps(first))
    second = provenance(cases[2:3], index, tmp_path / "model.pt", recipe="stem_tuning", loss="l2")
    assert second["provenance"]["loss"] == "structural"  # of the decoder, which a tuning leaves as it is
    assert set(first["seen"]["hashes"]) < set(second["seen"]["hashes"])
    assert not {facts["hash"] for facts in index.describe(cases)} & set(second["seen"]["hashes"])
    (tmp_path / "tuned.json").write_text(json.dumps(second))
    with caplog.at_level(logging.WARNING):
        assert warn_of_seen(cases[1:], index, tmp_path / "tuned.pt") == cases[1:]
    assert "2 of 4 validation volumes were seen in the training of" in caplog.text
    caplog.clear()
    (tmp_path / "foreign.json").write_text("[1]")
    (tmp_path / "empty.json").write_text('{"seen": null}')
    for weights in (None, *(tmp_path / f"{name}.pt" for name in ("unknown", "foreign", "empty"))):
        assert warn_of_seen(cases, index, weights) == cases
    assert caplog.text == ""


def facts_of(side, spacing=1.0):
    return {"shape": [1, side, side, side], "spacing": [spacing] * 3, "axes": "RAS"}


def test_prepared_volumes_are_kept_where_they_fit_and_refused_where_they_explode(tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.machine.free_memory", lambda: 8e9)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 20e9}))
    few, many, most = ([facts_of(200)] * number for number in (90, 400, 800))  # 40 MB each
    arguments = (None, (64, 64, 64), tmp_path / "run" / "cache")
    assert [choose_cache("auto", facts, *arguments) for facts in (few, many)] == ["memory", "disk"]
    with pytest.raises(
        Mistake, match=r"take 32.2 GB at their own spacing; 8 GB of memory and 20 GB of disk are free.*run plan"
    ):
        choose_cache("auto", most, *arguments)
    with pytest.raises(
        Mistake, match=r"take 14.4 GB at a spacing of \[0.5, 0.5, 0.5\] mm, 72 times what the files hold"
    ):
        choose_cache("auto", [facts_of(100, 2.0)] * 50, [0.5] * 3, *arguments[1:])
    assert choose_cache("none", most, *arguments) == "none"
    assert choose_cache("auto", few, *arguments, masks=1) == "disk"  # label maps take memory too


def test_a_disk_is_looked_at_where_the_cache_lies_and_what_a_run_has_kept_there_counts_as_free(tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run").mkdir()
    cache = tmp_path / "run" / "cache"
    cache.symlink_to(tmp_path / "scratch")
    free = {tmp_path / "scratch": 1e6}
    monkeypatch.setattr("scripts.machine.free_memory", lambda: 0.0)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free.get(path, 0.0)}))
    facts = [facts_of(60)] * 2  # 1.9 MB together
    with pytest.raises(Mistake, match="of disk are free"):
        choose_cache("auto", facts, None, (8, 8, 8), cache)
    (cache / "kept.pt").write_bytes(bytes(2_000_000))
    assert choose_cache("auto", facts, None, (8, 8, 8), cache) == "disk"


@pytest.mark.parametrize("side", [20, 40, 75])
def test_what_a_prepared_volume_takes_is_known_before_it_is_prepared(side, tmp_path):
    for seed in range(2):
        write_volume(tmp_path / "scans" / f"{seed}.nii.gz", shape=(side, side + 3, side), seed=seed)
    knobs = TINY_KNOBS | {"dataset_dir": str(tmp_path / "scans"), "output_dir": str(tmp_path), "num_workers": 0}
    workflow = started(**knobs)
    facts = Index(None).describe(workflow.parser.get_parsed_content("cases")["training"])
    cached = workflow.parser.get_parsed_content("train::dataset")._cache[0]["image"].untyped_storage().nbytes()
    assert [cached] == prepared_bytes(facts, None, TINY_KNOBS["img_size"])
