"""Transforms that MONAI does not have, as dictionary transforms for any config."""

from .field_of_view import FieldOfViewd, ForegroundMaskd, cylinder, detect_field_of_view
from .hounsfield import RandCTNoised, RandHUWarpd
from .spatial import ValuePadd, flips
from .usability import RefuseHuged, RefuseUnusabled

__all__ = [
    "FieldOfViewd",
    "ForegroundMaskd",
    "RandCTNoised",
    "RandHUWarpd",
    "RefuseHuged",
    "RefuseUnusabled",
    "ValuePadd",
    "cylinder",
    "detect_field_of_view",
    "flips",
]
