"""What one workflow alone needs, a file each."""

from .features import *
from .planning import *
from .probe import *
from .segmentation import *
from .stem_tuning import *
