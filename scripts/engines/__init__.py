"""Loops on MONAI's engines: batches, inferers, trainers, the GradientConductor, and volumes answered one by one."""

# flake8: noqa: F403 (the public names are those in the `__all__` of each module)
from .batches import *
from .compiling import *
from .conductor import *
from .inferers import *
from .trainer import *
from .volumes import *
