"""BertsWinMAE: 3D masked autoencoder pre-training for medical volumes, as a MONAI bundle."""

import monai.networks.nets

from .data import list_cases
from .networks import (
    BertsWinEncoder,
    BertsWinMAE,
    ConvDecoder,
    bertswin_mae_base_patch16_224,
    bertswin_mae_small_patch8_48x64x48,
    patchify,
    random_masking,
    unpatchify,
)
from .weights import bundle_root
from .workflows import from_pretrained

__all__ = ["BertsWinEncoder", "BertsWinMAE", "ConvDecoder", "bundle_root", "from_pretrained", "list_cases", "patchify"]
__all__ += ["bertswin_mae_base_patch16_224", "bertswin_mae_small_patch8_48x64x48"]
__all__ += ["random_masking", "unpatchify"]

# Registered, so that a config anywhere can say `_target_: monai.networks.nets.BertsWinMAE`.
monai.networks.nets.BertsWinMAE = BertsWinMAE
monai.networks.nets.BertsWinEncoder = BertsWinEncoder
