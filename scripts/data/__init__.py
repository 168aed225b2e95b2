"""From a folder of scans to draws: cases, checks, caches."""

from .caches import *
from .cases import *
from .checks import *
from .draws import *
from .layouts import *
from .sample import *
from .splitting import *
