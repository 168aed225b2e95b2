"""The networks: encoder, masked autoencoder, and a dense decoder on top."""

from .bertswin_mae import BertsWinMAE, ConvDecoder, bertswin_mae_base_patch16_224, bertswin_mae_small_patch8_48x64x48
from .encoder import BertsWinEncoder, PatchStem, initialise_weights, sincos_positions
from .patches import patchify, random_masking, unpatchify, valid_patches
from .segmentation import SegmentationNetwork
from .swin import SwinBlock, SwinLayer, maybe_checkpointed

__all__ = [
    "BertsWinEncoder",
    "BertsWinMAE",
    "ConvDecoder",
    "PatchStem",
    "SegmentationNetwork",
    "SwinBlock",
    "SwinLayer",
    "bertswin_mae_base_patch16_224",
    "bertswin_mae_small_patch8_48x64x48",
    "initialise_weights",
    "maybe_checkpointed",
    "patchify",
    "random_masking",
    "sincos_positions",
    "unpatchify",
    "valid_patches",
]
