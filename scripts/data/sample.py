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


def simulated_brains(folder: str | Path, num_subjects: int = 12, seed: int = 0) -> str:
    """Write a cohort with tissue labels in the layout of the Medical Segmentation Decathlon, once.

    Each subject gets a smooth deformation, a tissue contrast, a bias field and noise of its own.

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
    maps, affine = _template()
    logger.info("writing a cohort simulated from the MNI152 template to %s", folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        numbers, no_bar = range(1, num_subjects + 1), not parallel.shows_progress()
        for number in tqdm(numbers, desc="simulating", unit="brain", leave=False, disable=no_bar):
            for part, voxels in _subject(maps, np.random.default_rng([seed, number])).items():
                (beside / part).mkdir(exist_ok=True)
                nib.save(nib.Nifti1Image(voxels, affine), beside / part / f"brain_{number:03d}.nii.gz")
        (beside / "dataset.json").write_text(json.dumps(_description(num_subjects, seed), indent=1))
        beside.chmod(0o755)
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        if not (folder / "dataset.json").exists():  # else another process was faster, and wrote the same
            raise
    return str(folder)


def _template() -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Load image, grey and white matter of the template, ``(1, D, H, W)`` each, and its affine."""
    try:
        from nilearn import datasets
    except ModuleNotFoundError as error:
        raise Mistake(
            "no dataset_dir was given, and the simulated sample needs nilearn: give --dataset_dir, or install the "
            "sample extra with `pip install nilearn`"
        ) from error
    images = {
        "image": datasets.load_mni152_template(resolution=RESOLUTION),
        "grey": datasets.load_mni152_gm_template(resolution=RESOLUTION),
        "white": datasets.load_mni152_wm_template(resolution=RESOLUTION),
    }
    maps = {name: torch.as_tensor(np.asarray(image.dataobj), dtype=torch.float32) for name, image in images.items()}
    return {name: voxels[None] for name, voxels in maps.items()}, images["image"].affine


def _subject(maps: dict[str, torch.Tensor], generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Make one subject, by folder: its image, and its labels (1 grey matter, 2 white matter), both ``(D, H, W)``."""
    brain, grey, white = maps.values()
    image = brain / brain.max() + generator.uniform(-0.12, 0.08) * grey + generator.uniform(-0.1, 0.15) * white
    deform = Rand3DElasticd(
        list(maps),
        sigma_range=(6, 9),  # smoothness of the deformation, voxels
        magnitude_range=(80, 200),
        prob=1.0,
        rotate_range=(0.09,) * 3,  # radians
        scale_range=(0.06,) * 3,
        translate_range=(2,) * 3,  # voxels
        padding_mode="zeros",
    )
    relight = RandBiasFieldd("image", degree=3, coeff_range=(-0.08, 0.08), prob=1.0)
    simulate = Compose([deform, relight, RandRicianNoised("image", prob=1.0, std=0.02)])
    simulate.set_random_state(seed=int(generator.integers(2**31)))
    image, grey, white = (voxels[0].numpy() for voxels in simulate({**maps, "image": image}).values())
    tissue = np.stack([np.full_like(grey, 0.5), grey, white]).argmax(axis=0)
    return {"imagesTr": (image.clip(min=0) * 1000).astype(np.int16), "labelsTr": tissue.astype(np.uint8)}


def _description(num_subjects: int, seed: int) -> dict:
    names = [f"brain_{number:03d}.nii.gz" for number in range(1, num_subjects + 1)]
    return {
        "name": "Simulated brains",
        "description": f"deformed and relit copies of one template, ICBM 152 (2009), {RESOLUTION} mm, seed {seed}",
        "modality": {"0": "simulated T1"},
        "labels": {"0": "background", "1": "grey matter", "2": "white matter"},
        "numTraining": num_subjects,
        "numTest": 0,
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names],
        "test": [],
    }
