"""What one workflow alone needs, a file each."""

# flake8: noqa: F403 (the public names are those in the `__all__` of each module)
from .classification import *
from .embedding import *
from .features import *
from .federated import *
from .finished import *
from .planning import *
from .probe import *
from .segmentation import *
from .starts import *
from .stem_tuning import *
