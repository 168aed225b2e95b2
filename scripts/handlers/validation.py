"""When a run validates, and when it stops early."""

import logging
from dataclasses import dataclass

import ignite.distributed as idist
from ignite.engine import Engine, Events
from monai import handlers

__all__ = ["EarlyStopping", "ValidationHandler"]

logger = logging.getLogger(__name__)


class ValidationHandler(handlers.ValidationHandler):
    """MONAI's ValidationHandler by epoch, which validates after the last epoch whatever the interval.

    With ``exec_at_start`` it validates before training, as epoch 0, unless the run continues an earlier one.

    Args:
        kwargs: of :class:`monai.handlers.ValidationHandler`.
    """

    def attach(self, engine: Engine) -> None:
        """Follow a trainer."""
        is_due = Events.EPOCH_COMPLETED(
            event_filter=lambda trainer, epoch: epoch % self.interval == 0 or epoch == trainer.state.max_epochs
        )
        engine.add_event_handler(is_due, self)
        if self.exec_at_start:
            engine.add_event_handler(Events.STARTED, self.validate_untrained)

    def validate_untrained(self, engine: Engine) -> None:
        """Run the evaluator before training."""
        if engine.state.iteration == 0:
            self.validator.run(1)  # MONAI's evaluators count from one
            self.validator.state.best_metric_epoch = 0


@dataclass(eq=False)
class EarlyStopping:
    """End training when the validation metric has not improved for a while.

    The first rank decides for all; nothing needs saving, since the best epoch is.
    """

    patience: int  # epochs to wait for an improvement
    validator: Engine  # which knows the epoch of the best metric

    def attach(self, engine: Engine) -> None:
        """Follow a trainer."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.judge)

    def judge(self, engine: Engine) -> None:
        """Stop the trainer if the wait is over."""
        best = self.validator.state.best_metric_epoch
        if idist.broadcast(float(best >= 0 and engine.state.epoch - best >= self.patience), src=0):
            logger.info("stopping early: no improvement since epoch %d", best)
            engine.terminate()
