"""Weights on disk: written whole, read safely, filled in completely, converted from the authors' names."""

from .authors import *
from .checkpoints import *
from .pretrained import *
from .widening import *
