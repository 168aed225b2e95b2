"""Experiments that show what pre-training brings, one command each: tables, figures and every run that they rest on.

    python -m scripts.experiments.proof segmentation --dataset_dir DIR --pretrained MODEL.pt --num_labelled "[3,5,10]"

and in its place `classification`, `tuning`, `probing`, or `convergence`, which pre-trains.
Each run is a `python -m monai.bundle run` of its own, in a folder of `output_dir`. What is there already is not run
again, and what was interrupted goes on, so a command can be stopped and repeated.
"""

from ...mistakes import command
from .experiments import Proof

if __name__ == "__main__":
    command(Proof)
