"""As many threads as there are cores that nobody else keeps busy."""

import logging
import os
import time
from dataclasses import dataclass

import torch
from ignite.engine import Engine, Events

from .. import machine

__all__ = ["FreeCores"]

logger = logging.getLogger(__name__)

SAMPLE = 0.3  # seconds that the machine is looked at before a run
SPARED = 0.25  # of a core that others may use without costing a thread
CHOSEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # by which a user has decided


@dataclass(eq=False)
class FreeCores:
    """Compute with one thread for each core that is free, looked at before the run and after every epoch.

    Threads wait for each other many times a step, and spin meanwhile. Where one of them does not get its core, because
    another program has it, all wait: two threads beside two busy programs take tens of times as long on two cores, one
    thread not twice. Attach to any engine; it does nothing where a GPU computes, where ``OMP_NUM_THREADS`` is set (it
    is under torchrun), and outside of Linux.
    """

    device: str | torch.device

    def attach(self, engine: Engine) -> None:
        """Follow an engine."""
        decided = any(os.environ.get(name) for name in CHOSEN)
        if torch.device(self.device).type == "cpu" and not decided and machine.core_seconds():
            self.most = min(torch.get_num_threads(), machine.cores())
            engine.add_event_handler(Events.STARTED, self.start)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.adapt)

    def start(self, engine: Engine) -> None:
        """Look at the machine for a moment."""
        self.since, self.seen = time.monotonic(), machine.core_seconds()
        time.sleep(SAMPLE)
        self.adapt(engine)

    def adapt(self, engine: Engine) -> None:
        """Choose the threads by what others have used since the last look."""
        now, seen = time.monotonic(), machine.core_seconds()
        others = max(0.0, (seen.all - self.seen.all) - (seen.own - self.seen.own)) / (now - self.since)
        free = min(machine.cores(), seen.there - others)  # a quota is of the cores that others leave
        self.since, self.seen = now, seen
        threads = min(self.most, max(1, int(free + SPARED)))
        if threads != torch.get_num_threads():
            logger.info("%d of %d cores are free: computing with %d threads; OMP_NUM_THREADS would fix their number",
                        max(0, round(free)), machine.cores(), threads)  # fmt: skip
            torch.set_num_threads(threads)
