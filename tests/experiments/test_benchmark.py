"""Promises of the benchmark: every contestant does every task it can, and the plain form is the same network."""

import json

import pytest
import torch
from conftest import ROOT, noise, tiny

from scripts.experiments.benchmark.cohort import cohort
from scripts.experiments.benchmark.draws import draws
from scripts.experiments.benchmark.networks import STEP, TITLES, Contestant, networks, plain_form
from scripts.experiments.benchmark.training import data


def test_the_plain_form_is_the_same_network():
    model = tiny(img_size=(48, 32, 40))
    plain = plain_form(model)
    volume, masked = noise(2, 1, 48, 32, 40), torch.rand(2, 120, generator=torch.Generator().manual_seed(0)) > 0.25
    assert type(plain.encoder.swin) is not type(model.encoder.swin)
    with torch.no_grad():
        for name in ("extract_features", "encoder"):
            torch.testing.assert_close(getattr(plain, name)(volume), getattr(model, name)(volume), rtol=1e-5, atol=1e-5)
        outputs = [network(volume, masked=masked)["reconstructed_cube"] for network in (plain, model)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


def test_a_training_step_gives_every_parameter_a_gradient():
    for form in TITLES:
        model, tasks = Contestant(form, "bf16").prepare("tiny", noise(1, 1, 32, 32, 32))
        tasks[STEP]()
        without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
        unused = ("norm_cross_attn", "position_embeddings", "decoder_pos_embedding") if form == "vit_mae" else ()
        assert not [name for name in without if not any(part in name for part in unused)]


def test_a_draw_is_measured_by_stage_and_the_waiting_follows_from_it(tmp_path):
    draws(img_sizes=32, step_seconds=1e-4, cores=[1, 1000], repeats=1, output_dir=str(tmp_path))
    by_workers, on_device = json.loads((tmp_path / "draws.json").read_text())["rows"]
    assert list(by_workers["seconds"]) == [
        *("crop, copied into a batch", "RandTurnd", "CopyItemsd", "RandHUWarpd", "RandCTNoised", "Lambdad"),
    ]
    assert by_workers["worker_seconds"] == pytest.approx(sum(by_workers["seconds"].values()))
    assert on_device["worker_seconds"] == on_device["seconds"]["crop, copied into a batch"]
    rows = [line.split(" | ") for line in (tmp_path / "draws.md").read_text().splitlines() if "32³, by" in line][-2:]
    assert rows[0][3] != "0% |"  # one core cannot feed it
    assert rows[1][3] == "0% |"


@pytest.mark.thorough
@pytest.mark.slow
def test_networks_are_measured_side_by_side(tmp_path, capsys):
    networks("tiny", img_sizes=[32], precision="fp32", device="cpu", repeats=1, output_dir=str(tmp_path))
    report = json.loads((tmp_path / "networks.json").read_text())
    rows = {(row["contestant"], row["task"]): row for row in report["rows"]}
    assert len(rows) == 3 + 1 + 3 + 2  # ours, with checkpointing, plain, ViT-MAE
    for row in rows.values():
        assert 0 < row["fastest"] <= row["seconds"] <= row["slowest"]
        assert row["flops"] > 0
        assert row["peak_bytes"] is None or row["peak_bytes"] > 1e6
    ours, plain = (rows[f"{title}, fp32", STEP] for title in ("BertsWin", "plain eager BertsWin"))
    assert ours["parameters"] == plain["parameters"]
    assert "| 1 of 32³ | training step | BertsWin, fp32 |" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"networks.json", "networks.md"}


def test_a_network_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"network 'huge' must be one of \('base', 'small', 'tiny'\)"):
        networks("huge", output_dir=str(tmp_path))


@pytest.mark.slow
def test_waiting_for_data_is_measured_with_the_cache_and_without(cohort, tmp_path):
    knobs = {"iterations_per_epoch": 3, "device": "cpu"}
    data(str(cohort), epochs=1, output_dir=str(tmp_path), **knobs)
    report = json.loads((tmp_path / "data.json").read_text())
    assert [row["cache"] for row in report["rows"]] == ["memory", "none"]
    assert all(0 <= row["waiting_share"] <= 1 and row["volumes_per_second"] > 0 for row in report["rows"])
    assert "LoadVolumed" in report["preparation"]
    assert "| memory |" in (tmp_path / "data.md").read_text()
    assert not (ROOT / "metrics.jsonl").exists()


@pytest.mark.thorough
@pytest.mark.slow
def test_a_cohort_is_measured_from_the_index_to_the_features(tmp_path):
    cohort(volumes=12, num_workers=0, output_dir=str(tmp_path))
    report = json.loads((tmp_path / "cohort.json").read_text())
    assert len(report["rows"]) == 5
    assert all(row["seconds"] > 0 and row["bytes"] > 5e7 for row in report["rows"])
