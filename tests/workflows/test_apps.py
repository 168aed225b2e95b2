"""Promises of MONAI Label and MONAI Deploy on a finished bundle, each installed in an environment of its own.

With APPS=FOLDER the environments stay there for the next run. torchvision must fit torch: with a torch for CPUs,
install that of https://download.pytorch.org/whl/cpu there.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from test_finished import agreement, folder, labelled, masks  # noqa: F401 (fixtures)

pytestmark = pytest.mark.apps

# Beside what these tests run on; what a bundle does not use is left out, such as sam2, pydicom-seg and the clients.
LABEL = """monailabel==0.8.5 torchvision==0.28.0 pydantic-settings python-dotenv python-multipart httpx httpcore h11
    anyio schedule expiringdict expiring-dict timeloop dicomweb-client retrying pynetdicom pyjwt passlib bcrypt
    requests-toolbelt scikit-image lazy-loader imageio tifffile shapely ninja watchdog psutil"""
DEPLOY = """monai-deploy-app-sdk==4.0.0 monai==1.6.1 holoscan-cu13 holoscan-cli wheel-axle-runtime tritonclient gevent
    geventhttpclient zope.event zope.interface greenlet brotli python-rapidjson colorama typeguard
    highdicom pyjpegls pillow-jpls"""

INFER = """
import shutil, sys
from monailabel.tasks.infer.bundle import BundleInferTask
task = BundleInferTask(sys.argv[1], {})
assert task.is_valid() and task.labels == {"blob": 1}
shutil.copy(task({"image": sys.argv[2], "device": "cpu", "model": "bundle"})[0], sys.argv[3])
"""
TRAIN = """
import sys
from pathlib import Path
from monailabel.tasks.train.bundle import BundleTrainTask
root = Path(sys.argv[2])
class Datastore:
    def datalist(self):
        return [{"image": str(path), "label": str(root / "labelsTr" / path.name)} for path in root.glob("imagesTr/*")]
request = {"model": "bundle", "max_epochs": 1, "device": "cpu", "val_split": 0.3}
for _ in range(2):
    BundleTrainTask(sys.argv[1], {})(request, Datastore())
"""
OPERATOR = """
import sys
import nibabel as nib
import numpy as np
from monai.deploy.core import Application, Image, IOType
from monai.deploy.operators.monai_bundle_inference_operator import IOMapping, MonaiBundleInferenceOperator
scan = nib.load(sys.argv[2])
voxels = np.asarray(scan.dataobj).astype(np.float32)
meta = {"spacing": scan.header.get_zooms()[:3], "affine": scan.affine, "original_affine": scan.affine}
meta |= {"spatial_shape": np.array(voxels.shape), "original_channel_dim": "no_channel", "space": "RAS"}
class Context:
    models = None
class Port:
    def get(self, name):
        return None
    def receive(self, name):
        return Image(voxels, meta)
    def emit(self, value, name):
        np.save(sys.argv[3], np.swapaxes(value.asnumpy(), 0, 2))
ends = [[IOMapping(name, Image, IOType.IN_MEMORY)] for name in ("image", "pred")]
operator = MonaiBundleInferenceOperator(
    Application(), app_context=Context(), input_mapping=ends[0], output_mapping=ends[1], bundle_path=sys.argv[1]
)
operator.compute(Port(), Port(), None)
"""


def environment(place, packages):
    """Make an environment with some packages on top of this one's, if it is not there."""
    if not place.exists():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)  # noqa: S603
        (site,) = place.glob("lib/*/site-packages")
        (site / "base.pth").write_text(sysconfig.get_path("purelib"))
        install = [place / "bin/pip", "install", "-q", "--no-deps", "--ignore-installed", *packages.split()]
        subprocess.run(install, check=True)  # noqa: S603

    def python(code, *arguments):
        ended = subprocess.run(  # noqa: S603
            [place / "bin/python", "-c", code, *map(str, arguments)],
            cwd=place, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr[-3000:]

    return python


def test_monai_label_infers_and_trains(folder, labelled, masks, tmp_path):  # noqa: F811
    python = environment(Path(os.environ.get("APPS", tmp_path)) / "label", LABEL)
    bundle = shutil.copytree(folder, tmp_path / "bundle")
    python(INFER, bundle, labelled / "imagesTr/0.nii.gz", tmp_path / "found.nii.gz")
    assert agreement(nib.load(tmp_path / "found.nii.gz").dataobj, masks / "0.nii.gz") >= 0.999
    python(TRAIN, bundle, labelled)
    before, after = (torch.load(place / "models/model.pt", weights_only=True) for place in (folder, bundle))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_monai_deploy_infers(folder, labelled, masks, tmp_path):  # noqa: F811
    python = environment(Path(os.environ.get("APPS", tmp_path)) / "deploy", DEPLOY)
    for bundle in (folder, folder / "models/model.ts"):
        python(OPERATOR, bundle, labelled / "imagesTr/0.nii.gz", tmp_path / "found.npy")
        assert agreement(np.load(tmp_path / "found.npy"), masks / "0.nii.gz") >= 0.999
