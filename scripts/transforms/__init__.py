"""Transforms that MONAI does not have, as dictionary transforms for any config."""

# flake8: noqa: F403 (the public names are those in the `__all__` of each module)
from .augmentation import *
from .compact import *
from .field_of_view import *
from .hounsfield import *
from .loading import *
from .spatial import *
