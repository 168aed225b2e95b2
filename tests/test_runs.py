"""Promises of whole runs, started as a user starts them."""

import time

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import TINY, asks_for_nothing, records, start_training, train, write_volume
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts import BertsWinMAE

pytestmark = pytest.mark.slow


def without_time(folder):
    return [
        {name: value for name, value in record.items() if not name.endswith("seconds")} for record in records(folder)
    ]


def test_training_leaves_what_the_readme_says_from_any_directory(cohort, tmp_path):
    out = tmp_path / "out"
    result = train(cwd=tmp_path, dataset_dir=cohort, output_dir=out)
    assert result.returncode == 0, result.stderr
    assert "epoch 2/2  train_loss" in result.stdout

    assert [record["epoch"] for record in records(out)] == [1, 2]
    assert records(out)[1].keys() >= {
        *("epoch", "iteration", "learning_rate", "train_loss"),
        *("val_mse", "val_mae", "val_psnr", "val_ssim", "val_unexplained"),
    }
    assert len(list((out / "tensorboard").iterdir())) == 1
    page = (out / "report.html").read_text()
    asks_for_nothing(page)
    for words in (f"Pre-training: {cohort.name}", "Finished after 2 epochs.", "The best epoch is", "Reconstructions",
                  "waiting for data", "<td>max_epochs</td><td>2</td><td>300</td>"):  # fmt: skip
        assert words in page, words
    assert matplotlib.image.imread(out / "figures" / "epoch_0002.png").std() > 0
    left = {path.name for path in (out / "checkpoints").iterdir() if not path.name.startswith(".")}
    assert left == {"model.json", "model.pt", "training_state.pt", "training_state.previous.pt"}
    model = BertsWinMAE(**TINY)
    model.load_state_dict(torch.load(out / "checkpoints" / "model.pt", weights_only=True))


def test_the_large_config_runs_on_its_own(cohort, tmp_path):
    knobs = {"spacing": "[1.5, 1.5, 1.5]", "modality": "mr", "num_workers": 1, "max_epochs": 1, "accumulation_steps": 2}
    result = train("train.yaml", dataset_dir=cohort, output_dir=tmp_path, **knobs)
    assert result.returncode == 0, result.stderr
    assert records(tmp_path)[0]["iteration"] == 2


def test_a_killed_run_goes_on_as_if_it_had_not_stopped(cohort, tmp_path):
    settings = {"dataset_dir": cohort, "max_epochs": 8}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(output_dir=whole, **settings).returncode == 0

    process = start_training(output_dir=parts, **settings)
    deadline = time.monotonic() + 480
    while not (parts / "checkpoints" / "training_state.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert len(records(parts)) < 8

    again = train(output_dir=parts, **settings)
    assert again.returncode == 1
    assert "is left from an earlier run: continue it with --resume true" in again.stderr
    assert "Traceback" not in again.stderr

    resumed = train(output_dir=parts, resume="true", **settings)
    assert resumed.returncode == 0, resumed.stderr
    assert "continuing from" in resumed.stdout
    assert without_time(parts) == without_time(whole)
    states = [torch.load(run / "checkpoints" / "training_state.pt", weights_only=True) for run in (whole, parts)]
    for part in ("network", "optimizer"):
        torch.testing.assert_close(states[0][part], states[1][part], rtol=0, atol=0)


def test_ct_volumes_train_and_what_is_no_ct_is_refused_by_name(tmp_path):
    for number in range(3):
        write_volume(tmp_path / "data" / f"ct_{number}.nii.gz", seed=number, low=-1000, spacing=2)
    settings = {"dataset_dir": tmp_path / "data", "modality": "ct", "max_epochs": 1, "spacing": "[2.5, 2.5, 2.5]"}
    result = train(output_dir=tmp_path / "good", **settings)
    assert result.returncode == 0, result.stderr

    write_volume(tmp_path / "data" / "brain.nii.gz", low=0)
    refused = train(output_dir=tmp_path / "bad", **settings)
    assert refused.returncode == 1
    assert "brain.nii.gz: is not in Hounsfield units" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert [path.name for path in (tmp_path / "bad").iterdir()] == ["index.jsonl"]  # what was read is known
    skipped = train(output_dir=tmp_path / "skipped", skip_invalid="true", **settings)
    assert skipped.returncode == 0, skipped.stderr
    assert "left out" in skipped.stdout


def test_volumes_thinner_and_larger_than_the_crop_train_from_the_disk_cache(tmp_path):
    for number, shape in enumerate([(40, 40, 4), (20, 50, 36), (64, 20, 33)]):
        write_volume(tmp_path / "data" / f"{number}.nii.gz", shape=shape, seed=number)
    for _ in range(2):
        settings = {"cache": "disk", "cache_dir": tmp_path / "cache", "num_workers": 1, "max_epochs": 1}
        result = train(dataset_dir=tmp_path / "data", output_dir=tmp_path / "out", resume="true", **settings)
        assert result.returncode == 0, result.stderr
        assert len(list((tmp_path / "cache").glob("*.pt"))) == 3


def test_a_loss_that_is_not_finite_ends_the_run_with_the_names_and_no_traceback(cohort, tmp_path):
    result = train(dataset_dir=cohort, output_dir=tmp_path / "out", learning_rate=1e30, clip_norm="None", max_epochs=20)
    assert result.returncode == 1
    assert "error: the loss is nan" in result.stderr
    assert "imagesTr/case_" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_sample_is_simulated_once_and_trains(tmp_path):
    pytest.importorskip("nilearn", reason="the sample extra is not installed")
    from scripts.data import simulated_brains

    folder = simulated_brains(tmp_path / "brains", num_subjects=2)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "brains").rglob("*.nii.gz")}
    assert simulated_brains(tmp_path / "brains", num_subjects=2) == folder
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "brains").rglob("*.nii.gz")} == written

    first, second = (nib.load(tmp_path / "brains" / "imagesTr" / f"brain_00{n}.nii.gz") for n in (1, 2))
    label = np.asarray(nib.load(tmp_path / "brains" / "labelsTr" / "brain_001.nii.gz").dataobj)
    image, other = (np.asarray(volume.dataobj).astype(float) for volume in (first, second))
    assert first.header.get_zooms() == (2, 2, 2)
    assert 0.8 < np.corrcoef(image.ravel(), other.ravel())[0, 1] < 0.99  # brains, but not the same one
    assert image[label == 2].mean() > image[label == 1].mean() > 2 * image[label == 0].mean()  # white, grey, the rest

    result = train(dataset_dir=folder, output_dir=tmp_path / "out", max_epochs=1)
    assert result.returncode == 0, result.stderr


def test_the_papers_whole_recipe_trains_and_resumes(tmp_path):
    for number in range(3):
        write_volume(tmp_path / "data" / f"ct_{number}.nii.gz", seed=number, low=-1000)
    settings = {"dataset_dir": tmp_path / "data", "output_dir": tmp_path / "out", "modality": "ct", "loss": "tissue+l2",
                "field_of_view": "scanner", "augment_on_device": "true", "accumulation_steps": 2,
                "learning_rate": 1e-3}  # fmt: skip
    configs = ("train.yaml", "train_conductor.yaml", "small.yaml")
    first = train(*configs, **settings, max_epochs=1)
    assert first.returncode == 0, first.stderr
    second = train(*configs, **settings, resume="true")
    assert second.returncode == 0, second.stderr
    first, last = records(tmp_path / "out")
    assert (first["epoch"], last["epoch"]) == (1, 2)
    assert {"train_l2", "val_tissue_bone_surface", "val_structural", "val_loss"} <= first.keys()
    state = torch.load(tmp_path / "out" / "checkpoints" / "training_state.pt", weights_only=True)
    assert state["optimizer"]["conductor"]["steps"] == 2
    assert set(state["optimizer"]["conductor"]["previous"]) == {f"tissue_{group}" for group in
        ("all_tissue", "soft_tissue", "bone_surface")} | {"l2"}  # fmt: skip
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    assert {"conductor/norm_l2", "conductor/wins_l2"} <= set(events.Tags()["scalars"])
    other = train(*configs, **(settings | {"loss": "structural"}), resume="true")
    assert other.returncode == 1
    assert "is of a run with loss 'tissue+l2', not 'structural'" in other.stderr
    write_volume(tmp_path / "data" / "ct_3.nii.gz", seed=3, low=-1000)
    other = train(*configs, **settings, resume="true")
    assert other.returncode == 1
    assert "is of a run with volumes '2 for training, 1 for validation (names " in other.stderr


def test_mlflow_tracks_a_run_in_a_local_sqlite_store(cohort, tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="the tracking extra is not installed")
    result = train(dataset_dir=cohort, output_dir=tmp_path / "out", tracking="mlflow")
    assert result.returncode == 0, result.stderr
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/out/mlruns.db")
    (experiment,) = [one for one in client.search_experiments() if one.name != "Default"]
    (run,) = client.search_runs(experiment.experiment_id)
    assert run.info.status == "FINISHED"
    losses = [point.value for point in client.get_metric_history(run.info.run_id, "train_loss")]
    assert len(losses) == 4
    logged = [point.value for point in client.get_metric_history(run.info.run_id, "val_unexplained")]
    assert logged == [record["val_unexplained"] for record in records(tmp_path / "out")]
    assert list((tmp_path / "out" / "mlruns").rglob("config_*.json"))  # the settings of the run


def test_a_normalised_target_trains_and_is_measured_on_the_intensity_scale(cohort, tmp_path):
    result = train(dataset_dir=cohort, output_dir=tmp_path, loss="normalised_l2", learning_rate=1e-3, max_epochs=1,
                   iterations_per_epoch=60)  # fmt: skip
    assert result.returncode == 0, result.stderr
    (record,) = records(tmp_path)
    assert record["val_unexplained"] < 0.9  # a patch's own mean and deviation explain much; on the wrong scale, nothing


def test_training_starts_from_given_weights(cohort, tmp_path):
    torch.manual_seed(5)
    given = BertsWinMAE(**TINY)
    torch.save(given.state_dict(), tmp_path / "given.pt")
    settings = {"dataset_dir": cohort, "max_epochs": 1, "learning_rate": 1e-12, "final_learning_rate": 1e-12}
    result = train(output_dir=tmp_path / "out", pretrained=tmp_path / "given.pt", **settings)
    assert result.returncode == 0, result.stderr
    left = torch.load(tmp_path / "out" / "checkpoints" / "model.pt", weights_only=True)
    for name, weight in given.state_dict().items():
        torch.testing.assert_close(left[name], weight, rtol=0, atol=1e-6)
    refused = train(output_dir=tmp_path / "other", pretrained=tmp_path / "given.pt", strict_stem="true", **settings)
    assert refused.returncode == 1
    assert "do not fit this network" in refused.stderr
    assert "Traceback" not in refused.stderr
