"""Plan a pre-training: settings that fit the volumes and this machine, each with its reason, and what they cost."""

# flake8: noqa: F403 (the public names are those in the `__all__` of each module)
from .choices import *
from .cohort import *
from .plan import *
