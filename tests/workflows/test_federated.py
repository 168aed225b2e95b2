"""Promises of federated pre-training: one schedule over all rounds; only weights and numbers leave a site."""

from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_KNOBS, records
from monai.fl.utils.exchange_object import ExchangeObject
from torch._subclasses.fake_tensor import FakeTensorMode

from scripts.experiments.federated import compare
from scripts.mistakes import Mistake, causes
from scripts.workflows import average_updates, federated_site

CONFIGS = [str(ROOT / "configs" / name) for name in ("train.yaml", "small.yaml")]
KNOBS = {name: value for name, value in TINY_KNOBS.items() if name != "max_epochs"} | {"num_workers": 0}


@pytest.fixture(scope="module")
def site(cohort, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    knobs = KNOBS | {"dataset_dir": str(cohort), "output_dir": str(folder), "warmup_epochs": 1}
    return federated_site(CONFIGS, rounds=2, local_epochs=2, **knobs)


@pytest.fixture(scope="module")
def exchanged(site):
    """Everything that a site hands over in two rounds, and the rate at the end of each."""
    weights = {name: value.clone() for name, value in site.trainer.network.state_dict().items()}
    handed, rates = [], []
    for _ in range(2):
        handed.append(site.evaluate(ExchangeObject(weights=weights)))
        site.train(ExchangeObject(weights=weights))
        handed.append(site.get_weights())
        weights = average_updates(weights, [handed[-1].weights], [1])
        rates.append(site.trainer.optimizer.param_groups[0]["lr"])
    return handed, rates


def test_differences_on_the_cpu_are_added_to_weights_on_a_gpu():
    with FakeTensorMode():  # a GPU's, without one
        (new,) = average_updates({"w": torch.zeros(3, device="cuda")}, [{"w": torch.ones(3)}], [1]).values()
    assert new.device.type == "cuda"


@pytest.fixture
def folder(site):
    """What the site writes to."""
    return Path(site.train_workflow.parser["output_dir"])


def test_the_schedule_of_a_site_goes_over_all_rounds(site, exchanged, folder):
    _, rates = exchanged
    assert rates == pytest.approx([0.00075, 0.000001])  # in the middle of the cosine, and at its end
    assert [line["epoch"] for line in records(folder)] == [2, 4]  # validated at the end of each round
    assert site.trainer.state.epoch == 4


def test_nothing_but_differences_of_weights_counters_and_metrics_leaves_a_site(site, exchanged):
    network = site.trainer.network.state_dict()
    for item in exchanged[0]:
        assert item.optim is None
        if item.metrics is not None:
            assert item.weights is None
            assert item.statistics is None
            assert all(name.startswith("val_") and isinstance(value, float) for name, value in item.metrics.items())
        else:
            assert {name: value.shape for name, value in item.weights.items()} == {
                name: value.shape for name, value in network.items()
            }
            assert all(type(value) is torch.Tensor for value in item.weights.values())  # without the metadata of a scan
            assert all(isinstance(value, int) for value in item.statistics.values())


def test_a_round_changes_the_weights_and_leaves_the_files_at_the_site(exchanged, folder):
    update = exchanged[0][1].weights
    assert any(difference.abs().max() > 0 for difference in update.values())
    left = {path.name for path in folder.iterdir()}
    assert {"metrics.jsonl", "index.jsonl", "checkpoints"} <= left


def test_updates_are_averaged_by_their_shares():
    weights = {"a": torch.ones(2)}
    average = average_updates(weights, [{"a": torch.tensor([4.0, 0.0])}, {"a": torch.tensor([0.0, 8.0])}], [3, 1])
    assert average["a"].tolist() == [4.0, 3.0]
    assert weights["a"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "knobs", [{"max_epochs": 3}, {"resume": True}, {"learnin_rate": 0.1}, {"iterations_per_epoch": 0}]
)
def test_a_site_refuses_what_a_run_refuses_and_what_follows_from_the_rounds(cohort, tmp_path, knobs):
    with pytest.raises((Mistake, RuntimeError)) as caught:
        federated_site(CONFIGS, 1, **KNOBS | {"dataset_dir": str(cohort), "output_dir": str(tmp_path)} | knobs)
    (mistake,) = (cause for cause in causes(caught.value) if isinstance(cause, Mistake))
    assert next(iter(knobs)) in str(mistake)


@pytest.mark.slow
def test_the_comparison_starts_all_ways_from_the_same_weights(cohort, tmp_path):
    curves = compare(str(cohort), str(tmp_path), rounds=1, num_volumes=2, num_validation=1, **KNOBS)
    assert len({scores[0] for scores in curves.values()}) == 1
    assert len({scores[1] for scores in curves.values()}) == 3
    assert {"federated.json", "federated.md", "federated.png"} <= {path.name for path in tmp_path.iterdir()}
    with pytest.raises(Mistake, match="2 sites of 30 volumes"):
        compare(str(cohort), str(tmp_path), num_volumes=30)
