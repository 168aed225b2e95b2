"""How long a training waits for data."""

from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine

from scripts.handlers import WaitingClock, waiting


def test_waiting_for_batches_is_told_as_a_share_of_the_iterations(monkeypatch):
    now = 0.0

    def pass_by(seconds):
        nonlocal now
        now += seconds

    def batches():
        while True:
            pass_by(1.0)
            yield 0

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=lambda: now))
    clock, trainer = WaitingClock(), Engine(lambda *_: pass_by(3.0))
    clock.attach(trainer)
    assert clock.share() is None
    trainer.run(batches(), max_epochs=1, epoch_length=4)
    assert clock.share() == 0.25


def test_a_gpu_waits_for_data_while_it_has_nothing_to_do(monkeypatch):
    class Event:  # as of a GPU that was idle for 30 ms before each batch
        count = 0

        def __init__(self):
            self.number, Event.count = Event.count, Event.count + 1

        def elapsed_time(self, other):
            assert (self.number % 2, other.number) == (0, self.number + 1)
            return 30.0

    monkeypatch.setattr(waiting, "_recorded_event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    clock = WaitingClock()
    clock.start()
    for _ in range(3):
        clock.begin_iteration()
        clock.end_waiting()
    clock.begin_iteration()  # and waits yet
    clock.iterated = 0.9
    for _ in range(2):  # what was read is not read again
        assert clock.share() == pytest.approx(0.1)
