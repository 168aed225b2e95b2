"""The networks: encoder, masked autoencoder, and a dense decoder on top."""

from .bertswin_mae import *
from .encoder import *
from .patches import *
from .segmentation import *
from .swin import *
