"""Promises of the masked loop."""

import pytest
import torch
from conftest import noise, tiny
from ignite.engine import Events

from scripts.engine import AutocastInferer, MAETrainer, NonFiniteLossError, PrepareMaskedBatch, autocast_dtype
from scripts.losses import MaskedL2Loss


class Volumes(torch.utils.data.Dataset):
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"image": noise(1, 32, 32, 32, seed=index), "case": f"case_{index}", "seed": index}


def trainer(network, batch_size=2, length=4, epochs=1, precision="fp32", optimizer=None, **settings):
    return MAETrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=torch.utils.data.DataLoader(Volumes(length), batch_size=batch_size),
        network=network,
        optimizer=optimizer or torch.optim.SGD(network.parameters(), 0.01),
        loss_function=MaskedL2Loss(),
        inferer=AutocastInferer(precision, "cpu"),
        prepare_batch=PrepareMaskedBatch(8, 0.75),
        **settings,
    )


def weights_after(**settings):
    network = tiny()
    trainer(network, **settings).run()
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def test_accumulated_small_batches_train_like_one_large_batch():
    large, small = weights_after(batch_size=4), weights_after(batch_size=2, accumulation_steps=2)
    torch.testing.assert_close(large, small, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(large, weights_after(batch_size=2), rtol=1e-4, atol=1e-6)


def test_the_gradient_is_clipped_to_the_norm():
    network, norms = tiny(), []
    engine = trainer(network, clip_norm=0.01)
    step = engine.optimizer.step
    engine.optimizer.step = lambda *args: norms.append(norm(network)) or step(*args)
    engine.run()
    assert norms == [pytest.approx(0.01, rel=1e-3)] * 2


def norm(network):
    return torch.stack([parameter.grad.norm() for parameter in network.parameters()]).norm().item()


def test_the_rate_changes_by_optimiser_step_not_by_iteration():
    network, rates = tiny(), []
    optimizer = torch.optim.SGD(network.parameters(), 1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    engine = trainer(network, 1, optimizer=optimizer, lr_scheduler=scheduler, accumulation_steps=2)
    engine.add_event_handler(Events.ITERATION_STARTED, lambda _: rates.append(optimizer.param_groups[0]["lr"]))
    engine.run()
    assert rates == [1.0, 1.0, 0.5, 0.5]


def test_a_loss_that_is_not_finite_stops_the_run_with_the_names_of_the_batch():
    network = tiny()
    with torch.no_grad():
        network.decoder.embed.bias.fill_(torch.inf)
    with pytest.raises(NonFiniteLossError, match=r"epoch 1, iteration 1, on case_0, case_1: look at these volumes"):
        trainer(network).run()


def test_the_same_seeds_train_the_same_network_bit_for_bit():
    assert torch.equal(weights_after(), weights_after())


def test_bfloat16_training_stays_close_to_float32():
    full, half = weights_after(), weights_after(precision="bf16")
    assert not torch.equal(full, half)
    assert (full - half).norm() / full.norm() < 1e-3


def test_masks_follow_from_the_seed_of_each_volume():
    prepare = PrepareMaskedBatch(8, 0.75)
    batch = {"image": noise(2, 1, 32, 32, 32), "seed": torch.tensor([4, 5])}
    volume, target, _, kwargs = prepare(batch, "cpu")
    swapped = prepare({"image": batch["image"], "seed": torch.tensor([5, 4])}, "cpu")[3]
    assert (volume.shape, target.shape) == ((2, 1, 32, 32, 32), (2, 64, 512))
    assert torch.equal(kwargs["masked"], swapped["masked"].flip(0))
    assert kwargs["masked"].sum(dim=1).tolist() == [48, 48]


def test_precision_is_chosen_by_name_or_by_what_the_device_is_fast_at(monkeypatch):
    assert autocast_dtype("fp32", "cpu") is None
    assert autocast_dtype("bf16", "cpu") is torch.bfloat16
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert autocast_dtype("auto", "cpu") is None
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert autocast_dtype("auto", "cpu") is torch.bfloat16
    with pytest.raises(ValueError, match=r"precision 'half' must be one of \('auto', 'fp32', 'bf16', 'fp16'\)"):
        autocast_dtype("half", "cpu")
