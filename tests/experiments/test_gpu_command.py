"""Promises of the command for a GPU: every step is told of, and none costs another."""

import json
import time

import pytest

from scripts.experiments import gpu as command
from scripts.experiments.gpu import Step, gpu
from scripts.mistakes import Mistake


def rows(folder):
    return {row["step"]: row for row in json.loads((folder / "gpu.json").read_text())["rows"]}


def test_a_step_that_fails_or_takes_too_long_costs_no_other(tmp_path, monkeypatch):
    write = "import pathlib; pathlib.Path(r'{}').write_text('a table')"
    steps = [
        Step("good", 1, ["-c", write.format(tmp_path / "out" / "good" / "good.md")], ("good.md", "other.md")),
        Step("bad", 1, ["-c", "print('why'); raise SystemExit(3)"]),
        Step("slow", 0.03, ["-c", "import time; time.sleep(600)"]),
        Step("last", 1, ["-c", write.format(tmp_path / "out" / "last" / "last.md")], ("last.md",)),
    ]
    monkeypatch.setattr(command, "_steps", lambda *_: steps)
    start = time.monotonic()
    gpu(str(tmp_path), str(tmp_path / "out"))
    assert time.monotonic() - start < 60
    found = rows(tmp_path / "out")
    assert [row["outcome"] for row in found.values()] == [
        *("done", "failed with 3, see bad/log.txt", "stopped after 2 s, see slow/log.txt", "done"),
    ]
    assert found["good"]["tables"] == ["good/good.md"]
    assert "why" in (tmp_path / "out" / "bad" / "log.txt").read_text()
    assert "| last | " in (tmp_path / "out" / "gpu.md").read_text()


def test_what_has_no_time_left_is_left_out_and_said_so(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_steps", lambda *_: [Step("first", 1, ["-c", "1"])])
    gpu(str(tmp_path), str(tmp_path / "out"), minutes=0)
    assert rows(tmp_path / "out")["first"]["outcome"] == "left out: no time was left"


def test_a_mistake_is_told_before_anything_is_run(tmp_path):
    with pytest.raises(Mistake, match=r"dataset_dir .*gone does not exist"):
        gpu(str(tmp_path / "gone"), str(tmp_path / "out"))
    with pytest.raises(Mistake, match=r"there are no steps \['test'\]: there are \['tests', 'networks_base', "):
        gpu(str(tmp_path), str(tmp_path / "out"), steps=["test"])


@pytest.mark.slow
@pytest.mark.thorough
def test_without_a_gpu_all_of_it_is_done_at_toy_size(cohort, tmp_path):
    gpu(str(cohort), str(tmp_path))
    found = rows(tmp_path)
    assert {row["outcome"] for row in found.values()} == {"done"}
    assert "0 failures, 0 errors" in found["tests"]["figures"]
    assert all(row["tables"] for row in found.values())
