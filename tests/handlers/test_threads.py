"""Promises of the threads: as many as there are free cores, and none of it where somebody else decides."""

import pytest
import torch
from ignite.engine import Engine

from scripts import machine
from scripts.handlers import FreeCores
from scripts.machine import CoreSeconds


@pytest.fixture
def four_cores(monkeypatch):
    """A machine with four cores whose clock is ours; `used` tells what each look finds."""
    clock, used = [0.0], [CoreSeconds(0, 0, 4)]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "cores", lambda: 4)
    monkeypatch.setattr(machine, "core_seconds", lambda: used[0])
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    threads = torch.get_num_threads()
    torch.set_num_threads(4)

    def goes_by(seconds, others, own=0.0):
        clock[0] += seconds
        used[0] = CoreSeconds(used[0].all + seconds * (others + own), used[0].own + seconds * own, used[0].there)

    yield goes_by
    torch.set_num_threads(threads)


def chosen(goes_by, monkeypatch, *epochs, at_the_start=0.0, device="cpu"):
    """Run epochs of ten seconds beside so many busy cores, and return the threads of each, and behind the last."""
    monkeypatch.setattr("time.sleep", lambda seconds: goes_by(seconds, at_the_start))
    found, beside = [], iter(epochs)

    def work(engine, batch):
        threads = torch.get_num_threads()
        found.append(threads)
        goes_by(10, next(beside), own=threads)

    engine = Engine(work)
    FreeCores(device).attach(engine)
    engine.run([0], max_epochs=len(epochs))
    return [*found, torch.get_num_threads()]


def test_a_run_alone_takes_all_cores_and_what_it_does_itself_is_no_neighbour(four_cores, monkeypatch):
    assert chosen(four_cores, monkeypatch, 0, 0, 0.2, 0) == [4, 4, 4, 4, 4]


def test_busy_neighbours_get_their_cores_at_the_start_and_when_they_come_and_go(four_cores, monkeypatch):
    assert chosen(four_cores, monkeypatch, 2, 4, 4, 0, at_the_start=3) == [1, 2, 1, 1, 4]


def test_a_part_of_a_core_costs_a_thread_since_all_would_wait_for_it(four_cores, monkeypatch):
    assert chosen(four_cores, monkeypatch, 0.5, 1.2, at_the_start=0) == [4, 3, 3]


def test_a_quota_is_of_the_cores_that_others_leave(four_cores, monkeypatch):
    monkeypatch.setattr(machine, "core_seconds", lambda seen=machine.core_seconds: seen()._replace(there=64))
    assert chosen(four_cores, monkeypatch, 30, 62, at_the_start=30) == [4, 4, 2]


def test_whoever_has_chosen_the_threads_keeps_them(four_cores, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert chosen(four_cores, monkeypatch, 4, at_the_start=4) == [4, 4]


def test_a_gpu_is_not_asked_for_free_cores_and_neither_is_a_system_that_does_not_say(four_cores, monkeypatch):
    assert chosen(four_cores, monkeypatch, 4, at_the_start=4, device="cuda:0") == [4, 4]
    monkeypatch.setattr(machine, "core_seconds", lambda: None)
    assert chosen(four_cores, monkeypatch, 4, at_the_start=4) == [4, 4]
