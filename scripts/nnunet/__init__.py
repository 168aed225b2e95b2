"""Our networks under nnU-Net: plans that fit them, and a trainer. nnU-Net itself is needed by the trainer alone."""

from .plans import *
