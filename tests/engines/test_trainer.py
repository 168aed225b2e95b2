"""Promises of the masked loop."""

import pytest
import torch
from conftest import noise, tiny, trainer
from ignite.engine import Events

from scripts.engines import ConductorTrainer, GradientConductor, NonFiniteLossError, PrepareMaskedBatch, autocast_dtype
from scripts.losses import MaskedL2Loss, StructuralLoss, choose_loss
from scripts.mistakes import Mistake
from scripts.networks import patchify, random_masking


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
    engine = trainer(network, 1, optimizer_factory=lambda _: (optimizer, scheduler), accumulation_steps=2)
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


def test_a_field_of_view_in_the_batch_says_which_patches_are_valid_and_the_ratio_counts_these():
    fov = torch.zeros(2, 1, 32, 32, 32, dtype=torch.uint8)
    fov[:, :, 8:] = 1  # three of four layers of patches
    _, _, _, masks = PrepareMaskedBatch(8, 0.75)({"image": noise(2, 1, 32, 32, 32), "fov": fov, "case": ["a", "b"]})
    valid = masks["valid_for_masking_mask"]
    assert torch.equal(valid.reshape(2, 4, 16).all(dim=2), torch.tensor([[False, True, True, True]] * 2))
    assert (masks["masked"] & valid).sum(dim=1).tolist() == [36, 36]
    assert masks["masked"][~valid].all()


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


def test_the_trainer_scores_hidden_patches_and_no_others():
    network = tiny()
    engine = trainer(network, length=2)
    engine.optimizer.step = lambda *_: None
    engine.run()
    out = engine.state.output
    volume, masked = out["image"], random_masking(torch.ones(2, 64, dtype=torch.bool), 0.75, seeds=[0, 1])
    prediction = network(volume, masked=masked)["reconstructed_cube"]
    expected = (patchify(prediction, 8) - patchify(volume, 8))[masked].square().mean()
    torch.testing.assert_close(out["loss"], expected)


def test_an_epoch_that_is_no_multiple_of_the_accumulation_steps_once_more_at_its_end():
    network, steps = tiny(), []
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    optimizer.register_step_post_hook(lambda *_: steps.append(engine.state.iteration))
    engine = trainer(
        network, batch_size=1, length=5, epochs=2, optimizer_factory=lambda _: optimizer, accumulation_steps=2
    )
    engine.run()
    assert steps == [2, 4, 5, 7, 9, 10]


def test_the_network_trains_in_training_mode():
    network = tiny().eval()
    trainer(network).run()
    assert network.training


def test_a_mask_ratio_that_hides_nothing_is_refused():
    with pytest.raises(ValueError, match=r"mask_ratio 0 must lie in \(0, 1\) to train on"):
        PrepareMaskedBatch(8, 0)


def conducted(network, loss="structural", tasks="component", **settings):
    losses = {"l2": MaskedL2Loss(), "structural": StructuralLoss(8)}
    conductor = GradientConductor(network.parameters(), lr=1e-2, sign=False, weight_decay=settings.pop("decay", 0.0))
    engine = trainer(
        network,
        kind=ConductorTrainer,
        optimizer_factory=lambda _: conductor,
        loss_function=choose_loss(loss, losses, tasks),
        **settings,
    )
    engine.run()
    return engine


def test_the_conductor_gets_a_gradient_of_each_component_and_steps_along_the_merged_one():
    network = tiny()
    merged = []
    conductor_merge = GradientConductor.merge

    class Listening(GradientConductor):
        def merge(self, gradients):
            merged.append({task: torch.cat([g.flatten() for g in parts]) for task, parts in gradients.items()})
            return conductor_merge(self, gradients)

    losses = {"structural": StructuralLoss(8)}
    engine = trainer(network, length=2, kind=ConductorTrainer, loss_function=choose_loss("structural", losses),
                     optimizer_factory=lambda net: Listening(net.parameters()))  # fmt: skip
    engine.run()
    fresh = tiny().train()
    batch = engine.state.batch
    volume, target, _, masks = PrepareMaskedBatch(8, 0.75)(batch, "cpu")
    whole = choose_loss("structural", losses)(fresh(volume, **masks), target)
    expected = torch.autograd.grad(whole, list(fresh.parameters()))
    assert list(merged[0]) == ["brightness", "contrast", "structure"]
    torch.testing.assert_close(sum(merged[0].values()), torch.cat([g.flatten() for g in expected]))
    assert engine.optimizer.steps == 1


def test_a_conducted_loss_without_conflict_trains_like_any_other():
    plain, single = tiny(), tiny()
    trainer(plain, optimizer_factory=lambda net: GradientConductor(net.parameters(), lr=1e-2, sign=False)).run()
    conducted(single, loss="l2")
    for ours, theirs in zip(single.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("tasks", ["component", "loss"])
def test_accumulated_small_batches_conduct_like_one_large_batch(tasks):
    def weights(**settings):
        network = tiny()
        conducted(network, "l2+structural", tasks, **settings)
        return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])

    large, small = weights(batch_size=4), weights(batch_size=2, accumulation_steps=2)
    torch.testing.assert_close(large, small, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(large, weights(batch_size=2), rtol=1e-4, atol=1e-6)


def test_the_merged_gradient_is_clipped_and_kept_in_float32_under_autocast():
    network, norms = tiny(), []
    conductor = GradientConductor(network.parameters(), lr=1e-3)
    step = conductor.step
    conductor.step = lambda *args: norms.append(norm(network)) or step(*args)
    losses = {"structural": StructuralLoss(8)}
    engine = trainer(network, kind=ConductorTrainer, optimizer_factory=lambda _: conductor, precision="bf16",
                     loss_function=choose_loss("structural", losses), clip_norm=0.01)  # fmt: skip
    engine.run()
    assert norms == [pytest.approx(0.01, rel=1e-3)] * 2
    assert all(gradient.dtype == torch.float32 for parts in engine.task_gradients.values() for gradient in parts)


def test_the_conductor_refuses_scaled_gradients():
    with pytest.raises(ValueError, match="choose --precision bf16 or fp32"):
        trainer(tiny(), kind=ConductorTrainer, precision="fp16",
                optimizer_factory=lambda net: GradientConductor(net.parameters()))  # fmt: skip


def test_the_trainer_reports_what_the_loss_is_made_of():
    engine = conducted(tiny(), "l2+structural")
    parts = engine.state.output["components"]
    assert list(parts) == ["l2", "structural_brightness", "structural_contrast", "structural_structure"]
    assert not any(part.requires_grad for part in parts.values())


class SpoiltBatch(PrepareMaskedBatch):
    """Batches of which one has a voxel that is no number."""

    def __init__(self, number):
        super().__init__(8, 0.75)
        self.number, self.calls = number, 0

    def __call__(self, batchdata, *args, **kwargs):
        self.calls += 1
        if self.calls == self.number:
            batchdata = batchdata | {"image": batchdata["image"] * torch.nan}
        return super().__call__(batchdata, *args, **kwargs)


def test_a_loss_that_is_looked_at_later_has_left_the_weights_alone_and_is_named_all_the_same():
    def fused(network):
        return torch.optim.AdamW(network.parameters(), 0.01, fused=True)

    network, sound = tiny(), tiny()
    sound.load_state_dict(network.state_dict())
    engine = trainer(network, length=12, optimizer_factory=fused, prepare_batch=SpoiltBatch(3))
    assert engine.lag == 0  # nothing has to be waited for on a CPU
    engine.lag = 2
    with pytest.raises(NonFiniteLossError, match=r"the loss is nan in epoch 1, iteration 3, on case_4, case_5: look"):
        engine.run()
    assert engine.state.iteration == 5
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    # The last steps of an epoch are looked at before it is validated or saved.
    engine = trainer(sound, length=6, optimizer_factory=fused, prepare_batch=SpoiltBatch(3))
    engine.lag = 2
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda _: pytest.fail("this epoch is not whole"))
    with pytest.raises(NonFiniteLossError, match="iteration 3, on case_4, case_5"):
        engine.run()


def test_a_fused_optimiser_that_is_looked_at_later_trains_the_same_network():
    def weights(lag):
        network = tiny()
        engine = trainer(network, length=8, optimizer_factory=lambda it: torch.optim.AdamW(it.parameters(), fused=True))
        engine.lag = lag
        engine.run()
        return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])

    assert torch.equal(weights(0), weights(2))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"),
                                   RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
                                   RuntimeError("CUDA error: out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])  # fmt: skip
def test_too_little_memory_ends_the_run_with_what_would_do(error):
    network = tiny()

    def full(*_):
        raise error

    network.decoder.register_forward_hook(full)
    expected = r"out of memory on cpu in epoch 1, iteration 1, with a batch of 2: lower batch_size and raise"
    with pytest.raises(Mistake, match=expected):
        trainer(network).run()


def test_another_error_is_no_matter_of_memory():
    network = tiny()
    network.decoder.register_forward_pre_hook(lambda *_: torch.zeros(2) + torch.zeros(3))
    with pytest.raises(RuntimeError, match="must match the size") as caught:
        trainer(network).run()
    assert not isinstance(caught.value, Mistake)
