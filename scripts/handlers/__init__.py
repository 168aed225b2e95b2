"""What follows a training run: resuming, validation, recording, figures."""

from .figures import *
from .recording import *
from .resuming import *
from .validation import *
