"""The two scripts of docs/federated.md under NVFlare's simulator, in an environment of its own: run by `-m apps`."""

import os
import re
import shutil
import subprocess

import pytest
import torch
import yaml
from conftest import ROOT, TINY_KNOBS, app_environment, records

from scripts import BertsWinMAE
from scripts.weights import read_weights


@pytest.mark.apps
def test_two_sites_train_one_network_in_the_simulator_of_nvflare(cohort, tmp_path):
    python = app_environment("nvflare", "nvflare")
    page = (ROOT / "docs" / "federated.md").read_text()
    client, job = re.findall(r"```python notest\n(.*?)```", page, re.DOTALL)
    (tmp_path / "client.py").write_text(client)
    (tmp_path / "job.py").write_text(job)
    knobs = {name: value for name, value in TINY_KNOBS.items() if name != "max_epochs"} | {"num_workers": 0}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(knobs))
    for number, name in enumerate(("site-1", "site-2")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for volume in sorted((cohort / "imagesTr").iterdir())[number::2]:
            shutil.copy(volume, tmp_path / "data" / name)
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "bertswin_mae").symlink_to(ROOT / "scripts")
    configs = ",".join([*(str(ROOT / "configs" / name) for name in ("train.yaml", "small.yaml")), "tiny.yaml"])
    configs = configs.replace("tiny.yaml", str(tmp_path / "tiny.yaml"))
    words = [str(python), "job.py", configs, str(tmp_path / "data"), str(tmp_path / "out"), "2"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    ended = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    assert ended.returncode == 0, f"{ended.stdout[-5000:]}\n{ended.stderr[-5000:]}"
    for name in ("site-1", "site-2"):
        assert [line["epoch"] for line in records(tmp_path / "out" / name)] == [1, 2]
    # What the server has is a network's weights, and no volume of any site.
    weights = read_weights(tmp_path / "out" / "model.pt")
    assert {name: value.shape for name, value in weights.items()} == {
        name: value.shape for name, value in BertsWinMAE(**_arguments(knobs)).state_dict().items()
    }
    assert all(torch.isfinite(value).all() for value in weights.values())
    server = [path.name for path in (tmp_path / "out" / "server").rglob("*")]
    assert not [name for name in server if name.startswith("case_") or name == "index.jsonl"]


def _arguments(knobs):
    shared = ("img_size", "patch_size", "encoder_embed_dim", "swin_window_size", "decoder_embed_dim", "stem_base_dim")
    depths = {"encoder_depths": [knobs["encoder_depth"]], "encoder_num_heads": [knobs["encoder_num_heads"]]}
    return {name: knobs[name] for name in shared} | depths
