"""What follows a training run: resuming, validation, recording, figures."""

# flake8: noqa: F403 (the public names are those in the `__all__` of each module)
from .figures import *
from .recording import *
from .resuming import *
from .validation import *
