"""What follows a training run: resuming, validation, recording, figures."""

from .figures import ReconstructionFigures, RestoreIntensities
from .recording import ConductorStatistics, MetricsRecorder
from .resuming import (
    TRAINING_STATE,
    CheckpointHandler,
    OutputLock,
    PreemptionHandler,
    ResumeHandler,
    end_when_preempted,
)
from .validation import EarlyStopping, ValidateAtEnds

__all__ = [
    "TRAINING_STATE",
    "CheckpointHandler",
    "ConductorStatistics",
    "EarlyStopping",
    "MetricsRecorder",
    "OutputLock",
    "PreemptionHandler",
    "ReconstructionFigures",
    "RestoreIntensities",
    "ResumeHandler",
    "ValidateAtEnds",
    "end_when_preempted",
]
