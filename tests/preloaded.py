"""What every run imports, for the process that tests fork; not the package, of which a run may have a copy."""

# ruff: noqa: F401

import inspect

import ignite.handlers
import matplotlib.backends.backend_agg
import matplotlib.figure
import monai.bundle
import monai.engines
import monai.handlers
import monai.networks.nets
import monai.optimizers
import monai.transforms
import nibabel
import pydicom
import scipy.ndimage
import SimpleITK
import sklearn.linear_model
import torch._dynamo
import torch.distributed.checkpoint
import torch.utils.flop_counter
import torch.utils.tensorboard

inspect.stack()  # which fire asks for: from here on it knows the files of all these modules
