"""What follows a training run: resuming, validation, recording, figures, the report."""

# flake8: noqa: F403 (the public names are those in the `__all__` of each module)
from .figures import *
from .recording import *
from .report import *
from .resuming import *
from .threads import *
from .validation import *
from .waiting import *
