"""Weights on disk: written whole, read safely, filled in completely, converted from the authors' names."""

# flake8: noqa: F403 (the public names are those in the `__all__` of each module)
from .authors import *
from .checkpoints import *
from .pretrained import *
from .record import *
from .widening import *
