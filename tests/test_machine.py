"""Promises of what the machine is said to offer: affinity, quotas, and the cores that others leave."""

import multiprocessing
import time

import pytest

from scripts import machine


@pytest.fixture
def linux(tmp_path, monkeypatch):
    """A machine of four cores, of which three may be used, as its files say."""
    groups = tmp_path / "cgroup"
    (tmp_path / "own").write_text("0::/job/step\n")
    (groups / "job" / "step").mkdir(parents=True)
    monkeypatch.setattr(machine, "CGROUPS", groups)
    monkeypatch.setattr(machine, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(machine, "PROC", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 3}, raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("limits", "cores"),
    [
        ({}, 3),
        ({"job/cpu.max": "max 100000"}, 3),
        ({"job/cpu.max": "200000 100000"}, 2),
        ({"job/step/cpu.max": "150000 100000"}, 1),
        ({"job/step/cpu.max": "50000 100000", "job/cpu.max": "200000 100000"}, 1),
        ({"job/cpu.max": "6400000 100000"}, 3),
    ],
)
def test_cores_are_those_of_the_affinity_and_of_the_quota_of_any_group_above(linux, limits, cores):
    for name, content in limits.items():
        (linux / "cgroup" / name).write_text(content)
    assert machine.cores() == cores


def test_quotas_of_the_first_version_of_groups_count_too(linux):
    (linux / "own").write_text("4:cpu,cpuacct:/job\n3:memory:/other\n")
    folder = linux / "cgroup" / "cpu,cpuacct" / "job"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    (folder / "cpu.cfs_quota_us").write_text("-1\n")
    assert machine.cores() == 3
    (folder / "cpu.cfs_quota_us").write_text("250000\n")
    assert machine.cores() == 2


def test_busy_seconds_are_those_of_the_cores_that_may_be_used(linux):
    # user nice system idle iowait irq softirq steal guest
    rows = ["cpu 9 9 9 9 9 9 9 9", "cpu0 100 0 20 900 50 1 2 3 0", "cpu1 0 10 0 5 5 0 0 0 0", "cpu2 7 7 7 7 7 7 7 7 7"]
    (linux / "stat").write_text("\n".join([*rows, "cpu3 0 0 4 0 0 0 0 0 0", "intr 5"]))
    ticks = machine.os.sysconf("SC_CLK_TCK")
    assert machine.core_seconds().all == pytest.approx((126 + 10 + 4) / ticks)
    (linux / "stat").unlink()
    assert machine.core_seconds() is None


def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_what_this_process_and_the_processes_that_load_use_is_its_own():
    if machine.core_seconds() is None:
        pytest.skip("this system does not say")
    before = machine.core_seconds().own
    burn(0.2)
    # In whole ticks: 89.35 - 89.16 is a little less than 0.19.
    assert round(machine.core_seconds().own - before, 2) >= 0.19
    child = multiprocessing.get_context("fork").Process(target=burn, args=(0.5,))
    child.start()
    time.sleep(0.05)
    middle = machine.core_seconds().own
    deadline = time.monotonic() + 20
    while machine.core_seconds().own - middle < 0.3:  # while it lives
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.join()
