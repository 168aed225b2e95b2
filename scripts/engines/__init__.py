"""The training loop on MONAI's engines: batches, inferers, trainers, and the GradientConductor."""

from .batches import PrepareMaskedBatch, PrepareWholeBatch
from .conductor import ConductorTrainer, GradientConductor
from .inferers import AutocastInferer, FeatureWindowInferer, LogitsInferer, LogitsWindowInferer, autocast_dtype
from .trainer import MAETrainer, NonFiniteLossError

__all__ = [
    "AutocastInferer",
    "ConductorTrainer",
    "FeatureWindowInferer",
    "GradientConductor",
    "LogitsInferer",
    "LogitsWindowInferer",
    "MAETrainer",
    "NonFiniteLossError",
    "PrepareMaskedBatch",
    "PrepareWholeBatch",
    "autocast_dtype",
]
