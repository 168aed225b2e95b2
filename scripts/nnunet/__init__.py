"""Our networks under nnU-Net: plans that fit them, and a trainer. nnU-Net itself is needed by the trainer alone."""

# flake8: noqa: F403 (the public names are those in the `__all__` of each module)
from .plans import *
