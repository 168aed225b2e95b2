"""The steps of docs/nnunet.md with nnU-Net itself, in an environment of its own: run by `-m apps`."""

import json
import os
import re
import subprocess

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_KNOBS, app_environment, tiny, write_volume


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A Dataset folder of six volumes, whose bright voxels are the label."""
    folder = tmp_path_factory.mktemp("nnunet") / "raw" / "Dataset004_Bright"
    (folder / "labelsTr").mkdir(parents=True)
    for number in range(6):
        image = nib.load(write_volume(folder / "imagesTr" / f"case_{number}_0000.nii.gz", seed=number))
        label = (np.asarray(image.dataobj) > 700).astype(np.uint8)
        nib.save(nib.Nifti1Image(label, image.affine), folder / "labelsTr" / f"case_{number}.nii.gz")
    about = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "bright": 1}, "numTraining": 6}
    about |= {"file_ending": ".nii.gz", "overwrite_image_reader_writer": "NibabelIOWithReorient"}
    (folder / "dataset.json").write_text(json.dumps(about))
    return folder


@pytest.mark.apps
def test_nnunet_plans_trains_and_predicts_with_our_network(dataset, tmp_path):
    python = app_environment("nnunet", "nnunetv2")
    places = {f"nnUNet_{name}": str(dataset.parent.parent / name) for name in ("raw", "preprocessed", "results")}

    def run(*words, **variables):
        words = [str(python), *([str(python.parent / words[0]), *words[1:]] if words[0] != "-m" else words)]
        environment = os.environ | places | {"nnUNet_n_proc_DA": "1"} | variables
        ended = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
        assert ended.returncode == 0, f"{words}\n{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}"
        return ended.stdout

    torch.save(tiny(strict_stem=True).state_dict(), tmp_path / "model.pt")
    (tmp_path / "model.json").write_text(json.dumps({"network": TINY_KNOBS, "preprocessing": {"spacing": None}}))
    (tmp_path / "short").mkdir()
    (short,) = re.findall(r"```python notest\n(.*?)```", (ROOT / "docs" / "nnunet.md").read_text(), re.DOTALL)
    (tmp_path / "short" / "short.py").write_text(short)
    plans = dataset.parent.parent / "preprocessed" / dataset.name / "nnUNetPlans.json"
    run("nnUNetv2_plan_and_preprocess", "-d", "4", "-c", "3d_fullres", "--no_pp", "-npfp", "1")
    command = ("plans", str(plans), "--pretrained", str(tmp_path / "model.pt"), "--modality", "mr", "--batch_size", "2")
    run("-m", "scripts.nnunet", *command)
    run("nnUNetv2_preprocess", "-d", "4", "-plans_name", "BertsWinPlans", "-c", "3d_fullres", "-np", "1")
    trainers = run("-m", "scripts.nnunet", "trainer_folder").strip()
    found = {"PYTHONPATH": trainers, "nnUNet_extTrainer": f"{trainers}{os.pathsep}{tmp_path / 'short'}"}
    chosen = ("-tr", "Short", "-p", "BertsWinPlans", "-device", "cpu")
    run("nnUNetv2_train", "4", "3d_fullres", "0", *chosen, **found | {"nnUNet_n_proc_DA": "0"})
    (results,) = (dataset.parent.parent / "results" / dataset.name).iterdir()
    assert {"checkpoint_final.pth", "progress.png"} <= {path.name for path in (results / "fold_0").iterdir()}
    (tmp_path / "model.pt").unlink()  # a prediction needs the checkpoint alone
    folders = ("-i", str(dataset / "imagesTr"), "-o", str(tmp_path / "masks"))
    fast = ("-f", "0", "-npp", "1", "-nps", "1", "--disable_tta")
    run("nnUNetv2_predict", *folders, "-d", "4", "-c", "3d_fullres", *chosen, *fast, **found)
    masks = sorted((tmp_path / "masks").glob("*.nii.gz"))
    assert len(masks) == 6
    image = nib.load(dataset / "imagesTr" / "case_0_0000.nii.gz")
    assert nib.load(masks[0]).shape == image.shape
    assert np.allclose(nib.load(masks[0]).affine, image.affine)
