"""From a folder of scans to draws: cases, what is known of them, checks, caches."""

# flake8: noqa: F403 (the public names are those in the `__all__` of each module)
from .caches import *
from .cases import *
from .checks import *
from .describing import *
from .draws import *
from .index import *
from .layouts import *
from .provenance import *
from .reading import *
from .sample import *
from .splitting import *
from .targets import *
