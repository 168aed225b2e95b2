"""Measure time and memory beside MONAI's ViT-MAE and beside the same network in plain eager PyTorch.

    python -m scripts.experiments.benchmark networks --network base --img_sizes "[112,224]" --output_dir OUT
    python -m scripts.experiments.benchmark data --dataset_dir DIR --output_dir OUT
    python -m scripts.experiments.benchmark draws --img_sizes "[64,96,224]" --step_seconds 0.1 --output_dir OUT
    python -m scripts.experiments.benchmark cohort --volumes 10000 --output_dir OUT

The contestants take turns, round after round, so that a noisy machine is as unkind to one as to the other. All
commands print a table and leave it in `output_dir`, with the figures as JSON.
"""

from ...mistakes import command
from .cohort import cohort
from .draws import draws
from .networks import networks
from .training import data

if __name__ == "__main__":
    command({"networks": networks, "data": data, "draws": draws, "cohort": cohort})
