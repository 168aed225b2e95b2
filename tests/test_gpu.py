"""Promises that only a GPU can keep or break; without one they are kept by the CPU, at the same size."""

import copy
import json
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_KNOBS, Volumes, bundle, noise, records, tiny, train
from ignite.engine import Events
from monai.transforms import CopyItemsd

from scripts.engines import AugmentedBatch, AutocastInferer, MAETrainer, PrepareMaskedBatch, can_compile, compile_parts
from scripts.losses import MaskedL2Loss, choose_loss
from scripts.mistakes import Mistake
from scripts.networks import patchify
from scripts.transforms import Augmentation, RandCTNoised, RandHUWarpd, RandTurnd

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="no GPU")


def gpu_trainer(network, precision="bf16", epochs=1, length=8, data=None, **settings):
    network = network.to(DEVICE)
    return MAETrainer(
        device=torch.device(DEVICE),
        max_epochs=epochs,
        train_data_loader=torch.utils.data.DataLoader(data or Volumes(length), batch_size=2, pin_memory=ON_GPU),
        network=network,
        optimizer=torch.optim.AdamW(network.parameters(), 1e-3, fused=True),
        inferer=AutocastInferer(precision, DEVICE),
        loss_function=choose_loss("l2", {"l2": MaskedL2Loss()}),
        prepare_batch=PrepareMaskedBatch(8, 0.75),
        non_blocking=True,
        clip_norm=1.0,
        **settings,
    )


def weights(network):
    return torch.cat([parameter.detach().float().cpu().flatten() for parameter in network.parameters()])


@pytest.mark.parametrize("precision", ["fp32", "bf16", pytest.param("fp16", marks=needs_gpu)])
def test_a_device_trains_as_the_cpu_does_in_float32(precision):
    ours, theirs = tiny(), tiny()
    theirs.load_state_dict(ours.state_dict())
    start = weights(ours)
    gpu_trainer(ours, precision).run()
    cpu = gpu_trainer(theirs, "fp32")
    cpu.network.to("cpu")
    cpu.state.device = torch.device("cpu")
    cpu.inferer = AutocastInferer("fp32", "cpu")
    cpu.optimizer = torch.optim.AdamW(theirs.parameters(), 1e-3)
    cpu.run()
    moved, apart = (weights(theirs) - start).norm(), (weights(ours) - weights(theirs)).norm()
    # The scaler of half precision may leave out a step while it finds its scale; Adam makes much of small gradients.
    assert apart < (0.7 if precision == "fp16" else 0.3) * moved


@pytest.mark.skipif(not can_compile(DEVICE), reason="no compiler")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_parts_give_the_same_gradients(precision):
    eager = tiny().to(DEVICE).train()
    compiled = compile_parts(copy.deepcopy(eager), True, DEVICE)
    volume, masked = noise(2, 1, 32, 32, 32).to(DEVICE), torch.arange(64).expand(2, 64) % 4 > 0
    for network in (eager, compiled):
        MaskedL2Loss()(
            AutocastInferer(precision, DEVICE)(volume, network, masked=masked), patchify(volume, 8)
        ).backward()
    gradients = [torch.cat([part.grad.flatten() for part in network.parameters()]) for network in (compiled, eager)]
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < (1e-4 if precision == "fp32" else 3e-2)


def test_volumes_are_turned_and_bent_on_the_device_as_on_the_cpu():
    turn = RandTurnd(["image", "fov"], (16, 16, 16), 0.7, 12.0, 0.1, 2.0, 0.5, (0, 1), ["bilinear", "nearest"],
                     ["border", "zeros"])  # fmt: skip
    augmentation = Augmentation([turn, RandHUWarpd("image", 0.7, hu_scale=500.0, hu_offset=-20.0)])
    batch = {"image": noise(6, 1, 24, 24, 24), "fov": (noise(6, 1, 24, 24, 24, seed=1) > 0).to(torch.uint8)}
    ours = augmentation.on_batch({key: value.to(DEVICE) for key, value in batch.items()}, range(6))
    theirs = augmentation.on_batch(batch, range(6))
    torch.testing.assert_close(ours["image"].cpu(), theirs["image"], atol=1e-3, rtol=1e-3)
    assert (ours["fov"].cpu() != theirs["fov"]).float().mean() < 1e-3


@needs_gpu
def test_no_step_waits_for_the_gpu():
    engine = gpu_trainer(tiny(), length=16)
    hounsfield = {"hu_scale": 500.0, "hu_offset": -20.0}
    turn = RandTurnd("image", (32, 32, 32), 0.5, 12.0, 0.1, flip_prob=0.5, flip_axes=(0, 1))
    intensity = [RandHUWarpd("image", 0.5, **hounsfield), RandCTNoised("image", 0.5, **hounsfield)]
    augmentation = Augmentation([turn, CopyItemsd("image", names="target"), *intensity])
    engine.prepare_batch = AugmentedBatch(engine.prepare_batch, augmentation)
    assert engine.lag == 2

    @engine.on(Events.ITERATION_STARTED)
    def forbid(engine):
        if engine.state.iteration == 3:
            torch.cuda.set_sync_debug_mode("error")

    try:
        engine.add_event_handler(
            Events.ITERATION_COMPLETED(once=7), lambda _: torch.cuda.set_sync_debug_mode("default")
        )
        engine.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_too_little_memory_of_a_gpu_ends_the_run_with_what_would_do():
    volume = {"image": noise(1, 128, 128, 128), "case": "large", "seed": 0}
    engine = gpu_trainer(tiny(img_size=(128, 128, 128)), data=[volume, volume])
    torch.cuda.empty_cache()  # what earlier tests have left would do for a step
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**22) / total)
    try:
        with pytest.raises(Mistake, match=r"out of memory on cuda .* lower batch_size and raise accumulation_steps"):
            engine.run()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def test_the_recipe_trains_on_the_device_and_goes_on(cohort, tmp_path):
    knobs = {"dataset_dir": cohort, "output_dir": tmp_path, "device": DEVICE, "augment_on_device": "true"}
    for more in ({"max_epochs": 1}, {"resume": "true"}):
        ended = train(**knobs, **more)
        assert ended.returncode == 0, ended.stderr
    assert [record["epoch"] for record in records(tmp_path)] == [1, 2]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_rank_trains_and_goes_on(parallel, cohort, tmp_path):
    files = [str(ROOT / "configs" / name) for name in ("train.yaml", "small.yaml", "multi_gpu.yaml")]
    knobs = TINY_KNOBS | {"dataset_dir": cohort, "output_dir": tmp_path, "parallel": parallel}
    for more in ({"max_epochs": 1}, {"resume": "true"}):
        overrides = [part for name, value in (knobs | more).items() for part in (f"--{name}", str(value))]
        command = ["-m", "torch.distributed.run", "--nproc_per_node=1", "--standalone", "-m", "monai.bundle", "run"]
        ended = subprocess.run(  # noqa: S603
            [sys.executable, *command, "training", "--config_file", str(files), *overrides],
            cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]


@needs_gpu
def test_a_fine_tuning_is_validated_on_the_device(cohort, tmp_path):
    data = shutil.copytree(cohort, tmp_path / "data")
    (data / "labelsTr").mkdir()
    for path in (data / "imagesTr").iterdir():
        image = nib.load(path)
        label = (np.asarray(image.dataobj) > 500).astype(np.uint8)
        nib.save(nib.Nifti1Image(label, image.affine), data / "labelsTr" / path.name)
    files = str([str(ROOT / "configs" / name) for name in ("train.yaml", "finetune_segmentation.yaml", "small.yaml")])
    knobs = {name: value for name, value in TINY_KNOBS.items() if name != "figure_interval"}
    knobs |= {"dataset_dir": data, "output_dir": tmp_path / "out", "device": DEVICE, "num_labels": 1, "feature_size": 4}
    ended = bundle("run", "finetuning", "--config_file", files, **knobs)
    assert ended.returncode == 0, ended.stderr
    assert {"val_dice", "val_hausdorff"} <= records(tmp_path / "out")[-1].keys()
