"""Plan a pre-training: settings that fit the volumes and this machine, each with its reason, and what they cost."""

from .choices import *
from .cohort import *
from .plan import *
