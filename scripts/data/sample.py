"""A simulated cohort to try the bundle on: brains made from the MNI152 template that nilearn ships.

Every subject is the same template, deformed and relit. It shows that everything works; it says nothing about people.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.transforms import Compose, Rand3DElasticd, RandBiasFieldd, RandRicianNoised
from tqdm import tqdm

from .. import parallel
from ..mistakes import Mistake

__all__ = ["simulated_brains"]

logger = logging.getLogger(__name__)

RESOLUTION = 2  # mm
NUM_SUBJECTS = 12
LABELS = {"0": "background", "1": "grey matter", "2": "white matter"}


def simulated_brains(folder: str | Path, num_subjects: int = NUM_SUBJECTS, seed: int = 0) -> str:
    """Write a cohort in the layout of the Medical Segmentation Decathlon, once.

    Each subject gets a smooth deformation, a tissue contrast, a bias field and noise of its own; tissue labels lie
    beside the images, deformed alike.

    Args:
        folder: where the cohort goes; used as it is when it is there already.
        num_subjects: brains to make.
        seed: fixes every voxel.

    Returns:
        The folder.

    Raises:
        Mistake: when nilearn is not installed.
    """
    folder = Path(folder)
    if (folder / "dataset.json").exists():
        return str(folder)
    try:
        from nilearn import datasets
    except ModuleNotFoundError as error:
        raise Mistake(
            "no dataset_dir was given, and the simulated sample needs nilearn: give --dataset_dir, or install the "
            "sample extra with `pip install nilearn`"
        ) from error
    logger.info("writing a cohort simulated from the MNI152 template to %s", folder)
    template = datasets.load_mni152_template(resolution=RESOLUTION)
    brain, grey, white = (
        torch.as_tensor(np.asarray(image.dataobj), dtype=torch.float32)[None]
        for image in (
            template,
            datasets.load_mni152_gm_template(resolution=RESOLUTION),
            datasets.load_mni152_wm_template(resolution=RESOLUTION),
        )
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for part in ("imagesTr", "labelsTr"):
            (beside / part).mkdir()
        training = []
        for number in tqdm(
            range(1, num_subjects + 1),
            desc="simulating",
            unit="brain",
            leave=False,
            disable=not parallel.shows_progress(),
        ):
            image, label = _subject(brain, grey, white, np.random.default_rng([seed, number]))
            paths = {"image": f"imagesTr/brain_{number:03d}.nii.gz", "label": f"labelsTr/brain_{number:03d}.nii.gz"}
            nib.save(nib.Nifti1Image(image, template.affine), beside / paths["image"])
            nib.save(nib.Nifti1Image(label, template.affine), beside / paths["label"])
            training.append({key: f"./{path}" for key, path in paths.items()})
        description = {
            "name": "Simulated brains",
            "description": f"deformed and relit copies of one template, ICBM 152 (2009), {RESOLUTION} mm, seed {seed}",
            "modality": {"0": "simulated T1"},
            "labels": LABELS,
            "numTraining": num_subjects,
            "numTest": 0,
            "training": training,
            "test": [],
        }
        (beside / "dataset.json").write_text(json.dumps(description, indent=1))
        beside.chmod(0o755)
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        if not (folder / "dataset.json").exists():  # else another process was faster, and wrote the same
            raise
    return str(folder)


def _subject(
    brain: torch.Tensor, grey: torch.Tensor, white: torch.Tensor, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Make one subject: its image, and its labels (1 grey matter, 2 white matter), both ``(D, H, W)``."""
    keys = ("image", "grey", "white")
    image = brain / brain.max() + generator.uniform(-0.12, 0.08) * grey + generator.uniform(-0.1, 0.15) * white
    simulate = Compose(
        [
            Rand3DElasticd(
                keys,
                sigma_range=(6, 9),  # smoothness of the deformation, voxels
                magnitude_range=(80, 200),
                prob=1.0,
                rotate_range=(0.09,) * 3,  # radians
                scale_range=(0.06,) * 3,
                translate_range=(2,) * 3,  # voxels
                padding_mode="zeros",
            ),
            RandBiasFieldd("image", degree=3, coeff_range=(-0.08, 0.08), prob=1.0),
            RandRicianNoised("image", prob=1.0, std=0.02),
        ]
    ).set_random_state(seed=int(generator.integers(2**31)))
    subject = simulate({"image": image, "grey": grey, "white": white})
    image, grey, white = (subject[key][0].numpy() for key in keys)
    tissue = np.stack([np.full_like(grey, 0.5), grey, white]).argmax(axis=0)
    return (image.clip(min=0) * 1000).astype(np.int16), tissue.astype(np.uint8)
