"""The networks: encoder, masked autoencoder, and a dense decoder on top."""

# flake8: noqa: F403 (the public names are those in the `__all__` of each module)
from .bertswin_mae import *
from .encoder import *
from .patches import *
from .segmentation import *
from .swin import *
