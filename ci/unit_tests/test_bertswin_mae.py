"""The model zoo's unit test of this bundle: every config is checked and run on a few small volumes.

The zoo runs it in its root, where the bundle is ``models/bertswin_mae``.
"""

import json
import sys
import tempfile
import unittest
from pathlib import Path

import nibabel as nib
import numpy as np
from monai.bundle import ConfigWorkflow

ROOT = Path("models/bertswin_mae")
sys.path.insert(0, str(ROOT))

TINY = {
    **{"img_size": [32, 32, 32], "patch_size": 8, "encoder_embed_dim": 48, "encoder_depth": 2, "encoder_num_heads": 4},
    **{"swin_window_size": [2, 2, 2], "stem_base_dim": 8, "decoder_embed_dim": 32, "strict_stem": True},
    **{"batch_size": 2, "iterations_per_epoch": 2, "max_epochs": 1, "warmup_epochs": 0, "num_workers": 0},
}


class TestBertsWinMAE(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        place = tempfile.TemporaryDirectory()
        cls.addClassCleanup(place.cleanup)
        cls.place = Path(place.name)
        cases, rng = [], np.random.default_rng(0)
        for number in range(4):
            label = np.kron(rng.integers(0, 3, (4, 4, 4)), np.ones((9, 9, 9)))
            case = {"image": label * 300 + rng.integers(0, 100, label.shape), "label": label}
            for kind, voxels in case.items():
                nib.save(nib.Nifti1Image(voxels.astype(np.int16), np.eye(4)), cls.place / f"{kind}_{number}.nii.gz")
            cases.append({kind: f"{kind}_{number}.nii.gz" for kind in case})
        (cls.place / "volumes.json").write_text(json.dumps({"training": cases[:3], "validation": cases[3:]}))

    def run_workflow(self, kind, run_id, *files, output, **knobs):
        workflow = ConfigWorkflow(
            config_file=[str(ROOT / "configs" / name) for name in files],
            meta_file=str(ROOT / "configs" / "metadata.json"),
            logging_file=str(ROOT / "configs" / "logging.conf"),
            workflow_type=kind,
            run_id=run_id,
            bundle_root=str(ROOT),
            dataset_dir=str(self.place / "volumes.json"),
            output_dir=str(self.place / output),
            **knobs,
        )
        workflow.initialize()
        self.assertEqual(workflow.check_properties(), [])
        workflow.run()
        workflow.finalize()

    def test_training(self):
        trained, tuned = (str(self.place / run / "checkpoints" / "model.pt") for run in ("training", "tuning"))
        for run_id, config, knobs in (
            ("training", "train.yaml", {"output": "training"}),
            ("training", "train_conductor.yaml", {"output": "conductor"}),
            ("tuning", "tune_stem.yaml", {"output": "tuning", "pretrained": trained}),
            ("probe", "probe.yaml", {"output": "probe", "pretrained": tuned}),
            ("finetuning", "finetune_segmentation.yaml", {"output": "segmentation", "pretrained": tuned}),
        ):
            with self.subTest(config):
                self.run_workflow("train", run_id, "train.yaml", config, "small.yaml", **TINY, **knobs)

    def test_inference(self):
        self.run_workflow("infer", "inference", "inference.json", output="features", num_workers=0, figures=False)
        self.assertTrue((self.place / "features" / "embeddings.csv").is_file())


if __name__ == "__main__":
    unittest.main()
