"""How long a training waits for data."""

import time
from dataclasses import dataclass, field

import torch
from ignite.engine import Engine, Events

__all__ = ["WaitingClock"]


@dataclass(eq=False)
class WaitingClock:
    """Add up the iterations, and what they wait for their batches: on a GPU, how long it has nothing to do.

    A CPU runs ahead of its GPU, and waits for batches while the GPU works. So there pairs of events tell, of before
    and after a batch was asked for, in the order in which the GPU comes by them.
    """

    iterated: float = field(default=0.0, init=False)  # seconds, waiting included
    waited: float = field(default=0.0, init=False)  # seconds, without the events that were not read yet
    events: list[torch.cuda.Event] = field(default_factory=list, init=False)
    on_gpu: bool = field(default=False, init=False)
    asked: float = field(default=0.0, init=False)  # when a batch was, the last time

    def attach(self, engine: Engine) -> None:
        """Follow a trainer, from its start."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self.begin_iteration)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self.end_waiting)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.end_iteration)

    def start(self) -> None:
        """Begin anew."""
        self.iterated, self.waited, self.events = 0.0, 0.0, []
        self.on_gpu = torch.cuda.is_initialized()

    def begin_iteration(self) -> None:
        """Start to wait for a batch."""
        self.asked = time.monotonic()
        if self.on_gpu:
            self.events.append(_recorded_event())

    def end_waiting(self) -> None:
        """Have a batch."""
        if self.on_gpu:
            self.events.append(_recorded_event())
        else:
            self.waited += time.monotonic() - self.asked

    def end_iteration(self) -> None:
        """Have done with it."""
        self.iterated += time.monotonic() - self.asked

    def share(self) -> float | None:
        """Tell which part of the iterations was waiting; None before the first has ended."""
        if self.events:
            torch.cuda.synchronize()
            pairs = zip(self.events[::2], self.events[1::2], strict=False)  # the last one may wait yet
            self.waited += sum(idle.elapsed_time(busy) for idle, busy in pairs) / 1000
            del self.events[: len(self.events) // 2 * 2]
        return self.waited / self.iterated if self.iterated else None


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
