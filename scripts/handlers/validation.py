"""When a run validates, and when it stops early."""

from __future__ import annotations

import logging

import ignite.distributed as idist
from ignite.engine import Engine, Events

__all__ = ["EarlyStopping", "ValidateAtEnds"]

logger = logging.getLogger(__name__)


class ValidateAtEnds:
    """Validate before the first epoch, as epoch 0, and after the last: what a ValidationHandler leaves out.

    Args:
        validator: the evaluator.
        interval: the ValidationHandler's epochs between two validations.
        first: validate before training, unless the run continues an earlier one.
    """

    def __init__(self, validator: Engine, interval: int = 1, first: bool = False) -> None:
        self.validator, self.interval, self.first = validator, interval, first

    def attach(self, engine: Engine) -> None:
        """Follow a trainer."""
        if self.first:
            engine.add_event_handler(Events.STARTED, self.validate_first)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.validate_last)

    def validate_first(self, engine: Engine) -> None:
        """Run the evaluator before training."""
        if engine.state.iteration == 0:
            self.validator.run(1)  # MONAI's evaluators count from one
            self.validator.state.best_metric_epoch = 0

    def validate_last(self, engine: Engine) -> None:
        """Run the evaluator after the last epoch, if the interval left it out."""
        if engine.state.epoch == engine.state.max_epochs and engine.state.epoch % self.interval:
            self.validator.run(engine.state.epoch)


class EarlyStopping:
    """End training when the validation metric has not improved for a while.

    The first rank decides for all; nothing needs saving, since the best epoch is.

    Args:
        patience: epochs to wait for an improvement.
        validator: the evaluator, which knows the epoch of the best metric.
    """

    def __init__(self, patience: int, validator: Engine) -> None:
        self.patience, self.validator = patience, validator

    def attach(self, engine: Engine) -> None:
        """Follow a trainer."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.judge)

    def judge(self, engine: Engine) -> None:
        """Stop the trainer if the wait is over."""
        best = self.validator.state.best_metric_epoch
        if idist.broadcast(float(best >= 0 and engine.state.epoch - best >= self.patience), src=0):
            logger.info("stopping early: no improvement since epoch %d", best)
            engine.terminate()
