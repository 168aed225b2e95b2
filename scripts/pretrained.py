"""What the bundle ships: where it lies, and the encoder with its weights."""

from __future__ import annotations

from pathlib import Path

from .bertswin_mae import bertswin_mae_small_patch8_48x64x48
from .encoder import BertsWinEncoder
from .inference import load_encoder, strict_stem_of

__all__ = ["bundle_root", "pretrained_encoder"]


def bundle_root() -> Path:
    """Tell where the bundle lies, the folder of ``configs`` and ``models``: within the package or around it."""
    package = Path(__file__).resolve().parent
    installed = package / "bundle"
    return installed if installed.is_dir() else package.parent


def pretrained_encoder() -> BertsWinEncoder:
    """Build the small encoder with the weights of ``models/model.pt``; the model card says what they have seen.

    Returns:
        The encoder in evaluation mode: volumes ``(B, 1, 48, 64, 48)`` on the scale [-1, 1] to features
        ``(B, 192, 6, 8, 6)``.

    Raises:
        ValueError: when the weights are not there.
    """
    weights = bundle_root() / "models" / "model.pt"
    encoder = bertswin_mae_small_patch8_48x64x48(strict_stem=strict_stem_of(weights)).encoder
    return load_encoder(encoder, weights).eval()
