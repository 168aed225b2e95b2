"""A look at the features of a network in training, now and then, within a share of its time."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.networks.utils import eval_mode
from monai.utils import CommonKeys as Keys
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..engines import AutocastInferer
from .features import Look, look, summary

__all__ = ["FeatureMonitor"]

logger = logging.getLogger(__name__)

SHARE = 0.05  # of a run's time, at most


class Probe(Protocol):
    """What reads labels off features."""

    def score(self, encode: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return figures by name, for an encoder that maps ``(B, C, D, H, W)`` to ``(B, channels, D/P, H/P, W/P)``."""


@dataclass(eq=False)
class FeatureMonitor:
    """Look at the features of the first validation volumes, nothing hidden and each patch embedded alone, as trained.

    Attach to the evaluator before what writes metrics down: the figures, ``val_effective_rank`` and so on, join them.
    It looks at the first validation, at those that reach the next multiple of ``interval``, and after the last epoch.
    A look between the first and the last is left out while all looks together take more than 5 % of the time.

    The first rank alone looks, at volumes of its own. A network that is divided among ranks would need them all: it is
    not looked at. No random number is drawn, so training is the same with and without.
    """

    network: nn.Module  # its `extract_features` is looked at; one that has none is not
    inferer: AutocastInferer
    num_volumes: int  # the first ones of the validation set
    interval: int | None  # epochs between two looks; None: no look
    val_interval: int = 1  # epochs between two validations
    last_epoch: int = 0  # the run's `max_epochs`
    probe: Probe | None = None  # of what cases come with, if anything
    looks: list[Look] = field(default_factory=list, init=False)
    is_looking: bool = field(default=False, init=False)

    def attach(self, engine: Engine) -> None:
        """Follow an evaluator."""
        if self.interval is None or not hasattr(self.network, "extract_features"):
            return
        if isinstance(self.network, FSDPModule):
            logger.info("the features are not looked at: the network is divided among the processes")
        elif idist.get_rank() == 0:
            self.began, self.spent, self.last, self.names = time.monotonic(), 0.0, 0.0, set[str]()
            engine.add_event_handler(Events.EPOCH_STARTED, self.start)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self.look)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.finish)

    def is_due(self, epoch: int) -> bool:
        """Tell whether the features are looked at after this epoch."""
        is_first_or_last = (epoch <= self.val_interval and not self.spent) or epoch == self.last_epoch
        reaches_multiple = epoch // self.interval > (epoch - self.val_interval) // self.interval
        affordable = not self.spent or self.spent + self.last <= SHARE * (time.monotonic() - self.began)
        return is_first_or_last or (reaches_multiple and affordable)

    def start(self, engine: Engine) -> None:
        """Forget the last look."""
        for name in self.names:
            engine.state.metrics.pop(name, None)
        self.looks, self.is_looking, self.last_started = [], self.is_due(engine.state.epoch), 0.0

    def look(self, engine: Engine) -> None:
        """Look at the volumes of a batch, as far as they are among the first."""
        left = self.num_volumes - sum(len(one.tokens) for one in self.looks)
        if not self.is_looking or left <= 0:
            return
        started = time.monotonic()
        volume = engine.state.output[Keys.IMAGE][:left].float()
        valid = engine.state.output[Keys.PRED]["valid_for_masking_mask"][:left].to(volume.device)
        with eval_mode(self.network):  # one by one, so that a look takes no more memory than training does
            self.looks += [look(*pair, self._encode) for pair in zip(volume.split(1), valid.split(1), strict=True)]
        self.last_started += time.monotonic() - started

    def _encode(self, volume: Tensor, valid: Tensor | None = None) -> Tensor:
        return self.inferer(volume, self.network.extract_features, valid).float()

    def finish(self, engine: Engine) -> None:
        """Hand the figures to the evaluator, to go where its metrics go."""
        if not self.looks:
            return
        started = time.monotonic()
        if not all(torch.isfinite(tokens).all() for one in self.looks for tokens in one.tokens):
            logger.warning("the features are not finite after epoch %d: they are not looked at", engine.state.epoch)
            self.looks = []
            return
        figures = summary(self.looks)
        if self.probe is not None:
            with eval_mode(self.network):
                figures |= self.probe.score(lambda volume: self._encode(volume.to(engine.state.device)))
        self.looks = []
        self.last = self.last_started + time.monotonic() - started
        self.spent += self.last
        figures = {f"val_{name}": value for name, value in figures.items()} | {"val_monitor_seconds": self.last}
        self.names |= figures.keys()
        engine.state.metrics.update(figures)
