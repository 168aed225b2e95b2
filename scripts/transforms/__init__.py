"""Transforms that MONAI does not have, as dictionary transforms for any config."""

from .field_of_view import *
from .hounsfield import *
from .loading import *
from .spatial import *
