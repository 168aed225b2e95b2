"""Promises of the GradientConductor."""

import pytest
import torch
from conftest import FIXTURES, noise

from scripts.engines import GradientConductor


def settings(config):
    return {
        "lr": config["trust_ratio_coef"] if config["use_lion"] else 1.0,
        "momentum": config["momentum_beta"],
        "mode": "smooth" if config["use_smooth_logic"] else "zone",
        "sign": config["use_lion"],
        "trust_clip": config["trust_ratio_clip"],
        "thresholds": config["conflict_thresholds"],
        "remap_power": config["remap_power"],
        "arbiter_weights": config["tie_breaking_weights"],
        "norm_decay": config["norm_ema_beta"],
        "max_iterations": config["projection_max_iters"],
    }


@pytest.mark.parametrize("name", ["smooth_lion", "smooth_momentum", "zones_lion"])
def test_merged_gradients_and_updates_match_the_reference(name):
    case = torch.load(FIXTURES / "gradient_conductor.pt", weights_only=True)[name]
    parameters = [value.clone().requires_grad_() for value in case["parameters"]]
    conductor = GradientConductor(parameters, **settings(case["config"]))
    for step in case["steps"]:
        merged = conductor.merge(step["task_gradients"])
        for ours, theirs in zip(merged, step["merged_gradient"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert min(cosine for _, _, cosine in conductor.statistics["conflicts"]) == pytest.approx(
            step["min_cosine"], abs=1e-5
        )
        conductor.step()
        with torch.no_grad():
            for parameter, before, update in zip(parameters, case["parameters"], step["update"], strict=True):
                torch.testing.assert_close(before - parameter, update, rtol=1e-5, atol=1e-5)
                if case["config"]["use_lion"]:  # small updates: compare them at their own scale
                    signs = torch.sign(before - parameter) * (before - parameter).abs().gt(1e-9)
                    assert (signs == update.sign()).float().mean() > 0.9
                parameter.copy_(before)  # the reference held them fixed


def conduct(tasks, **options):
    parameters = [torch.ones(3, 4, requires_grad=True), torch.ones(5, requires_grad=True)]
    conductor = GradientConductor(parameters, **options)
    return conductor, conductor.merge(tasks)


def task(seed, scale=1.0):
    return [scale * noise(3, 4, seed=seed), scale * noise(5, seed=seed + 100)]


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients])


def test_tasks_that_agree_are_added():
    first = task(1)
    _, merged = conduct({"a": first, "b": [2 * gradient for gradient in first]})
    torch.testing.assert_close(flat(merged), 3 * flat(first))


def test_one_task_alone_is_plain_momentum():
    conductor, merged = conduct({"only": task(1)}, sign=False, lr=0.5)
    torch.testing.assert_close(flat(merged), flat(task(1)))
    conductor.step()
    torch.testing.assert_close(flat(conductor.param_groups[0]["params"]), 1 - 0.5 * flat(task(1)))


@pytest.mark.parametrize("mode", ["smooth", "zone"])
def test_after_merging_the_loser_no_longer_works_against_the_winner(mode):
    strong = task(1, 5.0)
    weak = [-0.9 * gradient + 2.0 * other for gradient, other in zip(strong, task(2), strict=True)]
    conductor, merged = conduct({"a": strong, "b": weak}, mode=mode)
    winner = {"a": strong, "b": weak}[conductor.statistics["winners"][0]]
    assert torch.dot(flat(merged), flat(winner)) > 0
    assert torch.dot(flat(strong), flat(weak)) < 0


def test_a_task_without_gradient_for_a_parameter_counts_as_zero():
    _, merged = conduct({"a": [task(1)[0], None], "b": [None, task(1)[1]]})
    torch.testing.assert_close(flat(merged), flat(task(1)))


def test_a_task_that_always_wins_yields_when_asked_to():
    parameters = [torch.ones(2, requires_grad=True)]
    conductor = GradientConductor(parameters, dominance_window=2)
    winners = []
    for _ in range(6):
        conductor.merge({"a": [torch.tensor([10.0, 0.0])], "b": [torch.tensor([-0.5, 0.1])]})
        winners += conductor.statistics["winners"]
    assert winners[:3] == ["a", "a", "b"] or winners[:3] == ["b", "b", "a"]
    assert set(winners) == {"a", "b"}


@pytest.mark.parametrize("sign", [True, False])
def test_a_saved_state_goes_on_as_if_nothing_had_happened(tmp_path, sign):
    def run(conductor, steps):
        for seed in steps:
            conductor.merge({name: task(seed + place) for place, name in enumerate("abc")})
            conductor.step()
        return flat(conductor.param_groups[0]["params"])

    def fresh():
        return GradientConductor(
            [torch.ones(3, 4, requires_grad=True), torch.ones(5, requires_grad=True)], 1e-2, sign=sign
        )

    whole = run(fresh(), range(6))
    first = fresh()
    halfway = run(first, range(3)).detach().clone()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = fresh()
    with torch.no_grad():
        for parameter, part in zip(second.param_groups[0]["params"], halfway.split([12, 5]), strict=True):
            parameter.copy_(part.view_as(parameter))
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(run(second, range(3, 6)), whole)


def test_half_precision_parameters_keep_float32_gradients_and_averages():
    parameters = [torch.ones(4, dtype=torch.bfloat16, requires_grad=True)]
    conductor = GradientConductor(parameters, lr=1e-1)
    merged = conductor.merge({"a": [noise(4).bfloat16()], "b": [noise(4, seed=1).bfloat16()]})
    conductor.step()
    assert merged[0].dtype == torch.float32
    assert conductor.state[parameters[0]]["average"].dtype == torch.float32
    assert parameters[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fast"}, "mode 'fast' must be 'smooth' or 'zone'"),
        ({"thresholds": (0.0, -0.5, -0.8)}, r"thresholds \(0.0, -0.5, -0.8\) must rise"),
        ({"momentum": 1.0}, r"momentum 1.0 must lie in \[0, 1\)"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GradientConductor([torch.ones(1, requires_grad=True)], **options)
    with pytest.raises(ValueError, match="task 'a' has 1 gradients for 2 parameters"):
        conduct({"a": task(1)[:1]})
