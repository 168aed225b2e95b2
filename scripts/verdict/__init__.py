"""What a pre-training has come to: what needs no network beside it, its features, and a verdict in plain words."""

# flake8: noqa: F403 (the public names are those in the `__all__` of each module)
from .baselines import *
from .monitor import *
from .rules import *
