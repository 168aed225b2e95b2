"""A simulated cohort to try the bundle on: brains made from the MNI152 template that nilearn ships.

Every subject is the same template, deformed and relit. It shows that everything works; it says nothing about people.
"""

import json
import logging
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
    """Write a cohort with tissue labels in the layout of the Medical Segmentation Decathlon, and return its folder.

    Each subject gets a smooth deformation, a tissue contrast, a bias field and noise of its own; the seed fixes every
    voxel. A cohort that is there already is used as it is. To make one needs nilearn.
    """
    folder = Path(folder)
    if (folder / "dataset.json").exists():
        return str(folder)
    maps, affine = _template()
    logger.info("writing a cohort simulated from the MNI152 template to %s", folder)
    names = [f"brain_{number:03d}.nii.gz" for number in range(1, num_subjects + 1)]
    description = {
        "name": "Simulated brains",
        "description": f"deformed and relit copies of one template, ICBM 152 (2009), {RESOLUTION} mm, seed {seed}",
        "modality": {"0": "simulated T1"},
        "labels": {"0": "background", "1": "grey matter", "2": "white matter"},
        "numTraining": num_subjects,
        "numTest": 0,
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names],
        "test": [],
    }
    no_bar = not parallel.shows_progress()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
        cohort = Path(beside, folder.name)
        for number, name in enumerate(tqdm(names, "simulating", unit="brain", leave=False, disable=no_bar), start=1):
            for part, voxels in _subject(maps, np.random.default_rng([seed, number])).items():
                (cohort / part).mkdir(parents=True, exist_ok=True)
                nib.save(nib.Nifti1Image(voxels, affine), cohort / part / name)
        (cohort / "dataset.json").write_text(json.dumps(description, indent=1))
        try:
            cohort.rename(folder)
        except OSError:
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
    maps = {name: torch.from_numpy(image.get_fdata(dtype=np.float32))[None] for name, image in images.items()}
    return maps, images["image"].affine


def _subject(maps: dict[str, torch.Tensor], generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Make one subject, by folder: its image, and its labels (1 grey matter, 2 white matter), both ``(D, H, W)``."""
    brain, grey, white = maps.values()
    image = brain / brain.max() + generator.uniform(-0.12, 0.08) * grey + generator.uniform(-0.1, 0.15) * white
    # Smoothness and translation are in voxels, rotation is in radians.
    smooth = {"sigma_range": (6, 9), "magnitude_range": (80, 200), "prob": 1.0, "padding_mode": "zeros"}
    pose = {"rotate_range": (0.09,) * 3, "scale_range": (0.06,) * 3, "translate_range": (2,) * 3}
    deform = Rand3DElasticd(list(maps), **smooth, **pose)
    relight = RandBiasFieldd("image", degree=3, coeff_range=(-0.08, 0.08), prob=1.0)
    simulate = Compose([deform, relight, RandRicianNoised("image", prob=1.0, std=0.02)])
    simulate.set_random_state(seed=int(generator.integers(2**31)))
    image, grey, white = (voxels[0].numpy() for voxels in simulate({**maps, "image": image}).values())
    tissue = np.stack([np.full_like(grey, 0.5), grey, white]).argmax(axis=0)
    return {"imagesTr": (image.clip(min=0) * 1000).astype(np.int16), "labelsTr": tissue.astype(np.uint8)}
