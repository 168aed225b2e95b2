"""Loops on MONAI's engines: batches, inferers, trainers, the GradientConductor, and volumes answered one by one."""

from .batches import *
from .conductor import *
from .inferers import *
from .trainer import *
from .volumes import *
