"""The networks: encoder, masked autoencoder, and what stands on an encoder: decoder and linear head."""

# flake8: noqa: F403 (the public names are those in the `__all__` of each module)
from .bertswin_mae import *
from .classification import *
from .encoder import *
from .patches import *
from .segmentation import *
from .swin import *
