"""Experiments that show what pre-training brings, one command each: tables, figures and every run that they rest on.

    python -m scripts.experiments.proof convergence --dataset_dir Task04_Hippocampus --output_dir runs/proof

and in its place `segmentation`, `tuning` or `probing`.
Each run is a `python -m monai.bundle run` of its own, in a folder of `output_dir`. What is there already is not run
again, and what was interrupted goes on, so a command can be stopped and repeated.
"""

from ...mistakes import command
from .experiments import Proof

if __name__ == "__main__":
    command(Proof)
