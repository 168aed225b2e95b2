"""Promises of starts without a step: they say what the features tell, before any step, and once."""

import numpy as np
import pytest
import torch
from conftest import TINY, noise
from ignite.engine import Engine
from monai.engines import PrepareBatchExtraInput
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from scripts import BertsWinEncoder
from scripts.data import read_targets
from scripts.engines import LogitsInferer, MeanWindowInferer
from scripts.networks import ClassificationNetwork, SegmentationNetwork
from scripts.workflows import DiscriminantStart, EmbeddingStart, PrepareTargetBatch, discriminants, linear_head, starts

ENCODER = {name: value for name, value in TINY.items() if name not in ("decoder_embed_dim", "mask_ratio")}


def normal_tokens(count=4000):
    """Tokens of three classes with means of their own and one covariance, and the class of each."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), count, replacement=True, generator=generator)
    spread = torch.eye(5) + 0.3 * torch.randn(5, 5, generator=generator)
    means = torch.randn(3, 5, generator=generator)
    return means[classes] + torch.randn(count, 5, generator=generator) @ spread / 2, classes


def fitted(tokens, classes, rank):
    rows = torch.cat([tokens, torch.ones(len(tokens), 1)], dim=1).double()
    targets = torch.nn.functional.one_hot(classes, 3).double()
    return discriminants(rows.T @ rows / len(rows), rows.T @ targets / len(rows), 3, rank)


def network(patch_size=8, out_channels=3):
    torch.manual_seed(0)
    return SegmentationNetwork(BertsWinEncoder(**ENCODER | {"patch_size": patch_size}), out_channels, feature_size=4)


def started(network, batches):
    engine = Engine(lambda *_: None)
    engine.state.device = torch.device("cpu")
    DiscriminantStart(network, batches, PrepareBatchExtraInput([]), LogitsInferer("fp32", "cpu")).start(engine)
    return network.eval()


@pytest.fixture
def halves():
    """Volumes that are bright in one half, which is labelled."""
    volume, label = noise(4, 1, 32, 32, 32) / 4, torch.zeros(4, 1, 32, 32, 32)
    volume[:, :, :16] += 2
    label[:, :, :16] = 2
    return {"image": volume, "label": label}


def test_the_classes_are_told_apart_as_by_scikit_learn():
    tokens, classes = normal_tokens()
    reduce, expand, bias = fitted(tokens, classes, rank=5)
    found = (tokens @ reduce @ expand + bias).argmax(dim=1)
    expected = LinearDiscriminantAnalysis().fit(tokens, classes).predict(tokens)
    assert (found.numpy() == expected).mean() > 0.98


def test_two_coordinates_suffice_for_three_classes_and_more_are_zeros():
    tokens, classes = normal_tokens()
    logits = [tokens @ reduce @ expand + bias for reduce, expand, bias in
              (fitted(tokens, classes, rank) for rank in (2, 5, 64))]  # fmt: skip
    assert torch.allclose(logits[0], logits[1], atol=1e-4)
    assert torch.allclose(logits[0], logits[2], atol=1e-4)
    assert not torch.allclose(logits[0], tokens @ torch.zeros(5, 3), atol=1e-2)


@pytest.mark.parametrize("patch_size", [4, 8, 16])
def test_a_network_segments_before_its_first_step(patch_size, halves):
    found = started(network(patch_size), [halves])(halves["image"]).argmax(dim=1, keepdim=True)
    assert (found == halves["label"]).float().mean() > 0.95


def test_a_class_that_no_draw_shows_is_told_nowhere(halves):
    found = started(network(out_channels=4), [halves])(halves["image"])
    assert torch.isfinite(found).all()
    assert not {1, 3} & set(found.argmax(dim=1).flatten().tolist())


def test_a_network_that_was_trained_keeps_what_it_has_learned(halves):
    goes_on = network()
    torch.nn.init.normal_(goes_on.token_head.expand.weight)
    before = {name: value.clone() for name, value in goes_on.state_dict().items()}
    started(goes_on, [halves])
    assert all(torch.equal(value, before[name]) for name, value in goes_on.state_dict().items())


def test_the_encoder_is_not_touched(halves):
    encoder = network().encoder.state_dict()
    assert all(
        torch.equal(value, encoder[name]) for name, value in started(network(), [halves]).encoder.state_dict().items()
    )


def test_features_that_say_nothing_leave_the_map_at_zero(halves, caplog):
    silent = network()
    for parameter in silent.encoder.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    assert not started(silent, [halves]).token_head.expand.weight.any()
    assert "no linear map can be fitted" in caplog.text


@pytest.mark.parametrize("count", [2, 3])
def test_a_head_tells_classes_as_well_as_discriminant_analysis(count):
    tokens, classes = (values.numpy() for values in normal_tokens(1000))
    x, y = tokens[classes < count], classes[classes < count]
    weight, bias = linear_head(x[::2], y[::2], count, balanced=False)
    expected = LinearDiscriminantAnalysis().fit(x[::2], y[::2]).score(x[1::2], y[1::2])
    assert ((x @ weight.T + bias).argmax(axis=1)[1::2] == y[1::2]).mean() > expected - 0.02


def test_a_head_is_not_surer_of_noise_than_it_is_right():
    x, y = np.random.default_rng(0).normal(size=(60, 200)), np.arange(60) % 2
    weight, bias = linear_head(x, y, 2, balanced=True)
    new = torch.from_numpy(np.random.default_rng(1).normal(size=(60, 200)) @ weight.T + bias)
    assert torch.nn.functional.cross_entropy(new, torch.from_numpy(y)) < 0.72  # a guess has 0.69


def test_a_class_of_a_single_case_is_no_obstacle():
    x, y = np.eye(5), np.array([0, 0, 1, 2, 2])
    weight, bias = linear_head(x, y, 3, balanced=True)
    assert ((x @ weight.T + bias).argmax(axis=1) == y).all()


def test_a_single_case_of_a_class_does_not_flatten_what_is_told_of_the_others():
    tokens, classes = (values.numpy() for values in normal_tokens(300))
    x, y = tokens[classes < 2], classes[classes < 2]
    weight, bias = linear_head(np.concatenate([x, x[:1] + 5]), np.append(y, 2), 3, balanced=True)
    likely = torch.from_numpy(x @ weight.T + bias).softmax(dim=1).numpy()
    assert likely[np.arange(len(x)), y].mean() > 0.8


def test_of_noise_a_rare_class_is_as_likely_as_a_frequent_one():
    x, y = np.random.default_rng(0).normal(size=(200, 50)), (np.arange(200) < 10).astype(int)
    weight, bias = linear_head(x, y, 2, balanced=True)
    new = torch.from_numpy(np.random.default_rng(1).normal(size=(200, 50)) @ weight.T + bias).softmax(dim=1)
    assert 0.35 < new[:, 1].mean() < 0.65


def test_a_class_that_no_case_has_is_the_least_likely_of_all():
    tokens, classes = (values.numpy() for values in normal_tokens(300))
    weight, bias = linear_head(tokens, 2 * classes, 6, balanced=True)
    assert set((tokens @ weight.T + bias).argmax(axis=1)) == {0, 2, 4}


def test_the_penalty_of_a_number_is_chosen_by_other_cases_than_those_it_is_fitted_to():
    random = np.random.default_rng(0)
    x, told = random.normal(size=(60, 100)), random.normal(size=100)
    weight, bias = linear_head(x, random.normal(size=60), 1, balanced=True)
    assert np.abs(x @ weight.T + bias).max() < 0.7  # of noise it says next to nothing
    x = random.normal(size=(300, 100))
    weight, bias = linear_head(x, x @ told, 1, balanced=True)
    assert np.corrcoef((x @ weight.T + bias)[:, 0], x @ told)[0, 1] > 0.99


@pytest.mark.parametrize("outputs", [1, 2])
def test_the_penalty_is_chosen_by_other_patients_not_by_other_scans_of_the_same(outputs):
    random = np.random.default_rng(0)
    x = np.repeat(random.normal(size=(40, 100)), 5, axis=0) + random.normal(size=(200, 100)) / 10  # five scans of each
    y = np.repeat(random.permutation(40) % 2, 5)
    patients = [f"patient {place // 5}" for place in range(200)]

    def told(**whose):
        weight, bias = linear_head(x, y, outputs, True, **whose)
        told = x @ weight.T + bias
        return np.abs(told - told.mean(axis=0)).mean()

    # Of these features nothing can be told but who it is.
    assert told(patients=patients) < told() / 2


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_patient_with_scans_of_both_classes_or_alone_is_no_obstacle(outputs):
    x, y = np.eye(6), np.array([0, 0, 1, 1, 1, 0])
    for patients in ("abbcca", "aaaaaa", "aabbba", "abcdef", "aabcde"):
        weight, bias = linear_head(x, y, outputs, True, [*patients])
        assert np.isfinite(weight).all()
        assert np.isfinite(bias).all()


@pytest.mark.filterwarnings("error")
def test_a_patient_alone_in_a_fold_judges_a_penalty_too():
    random, by_heart = np.random.default_rng(0), []
    for patients in ["aabcde", "aabbcc"] * 20:
        x, y = random.normal(size=(6, 50)), random.normal(size=6)
        weight, bias = linear_head(x, y, 1, True, [*patients])
        by_heart.append(np.abs(x @ weight.T + bias - y[:, None]).mean() < 0.1)
    assert np.mean(by_heart) < 0.5  # noise rarely is: no penalty is the best of nothing


def test_a_head_knows_whose_the_volumes_are(monkeypatch):
    seen = []
    monkeypatch.setattr(starts, "linear_head", lambda *given: seen.append(given[-1]) or linear_head(*given))
    head_started([0.0, 1.0] * 3, ["dark", "bright"] * 3, patients=[*"aabbcc"])
    assert seen == [[*"aabbcc"]]


def bright(numbers):
    """Volumes, larger than a window, that are the brighter the larger their number."""
    return [noise(1, 1, 40, 32, 32, seed=place) / 4 + n for place, n in enumerate(numbers)]


def head_started(numbers, values, pooling="mean", iteration=0, patients=None):
    cases = [{"case": str(place), "brightness": value} for place, value in enumerate(values)]
    for case, patient in zip(cases, patients or (), strict=bool(patients)):
        case["patient"] = patient
    targets = read_targets({"training": cases, "validation": cases}, "brightness")
    torch.manual_seed(0)
    outputs = len(targets.classes) or 1
    made = ClassificationNetwork(BertsWinEncoder(**ENCODER), outputs, pooling, targets.mean, targets.deviation)
    engine = Engine(lambda *_: None)
    engine.state.device, engine.state.iteration = torch.device("cpu"), iteration
    batches = [{"image": volume, "case": [str(place)]} for place, volume in enumerate(bright(numbers))]
    inferer = MeanWindowInferer((32, 32, 32), 0.5, 2, "fp32", "cpu")
    start = EmbeddingStart(made, batches, PrepareTargetBatch(targets), inferer, targets.patients, balanced=True)
    start.attach(engine)
    if engine.has_event_handler(start.start):
        start.start(engine)
    return made.eval(), inferer


def test_a_head_tells_classes_before_its_first_step():
    numbers = [0.0, 1.0] * 6
    made, inferer = head_started(numbers, ["dark", "bright"] * 6)
    found = [inferer(volume, made).argmax().item() for volume in bright([0.05, 0.95])]
    assert found == [1, 0]  # in the order of their names


def test_a_head_tells_numbers_before_its_first_step_in_their_unit():
    numbers = np.linspace(0, 1, 40)
    made, inferer = head_started(numbers, 50 + 40 * numbers)
    found = [inferer(volume, made).item() for volume in bright([0.25, 0.75])]
    assert found == pytest.approx([60, 80], abs=4)


@pytest.mark.parametrize("kept", [{"iteration": 5}, {"pooling": "attention"}], ids=["goes on", "attention"])
def test_a_head_that_goes_on_or_learns_to_pool_stays(kept):
    made, _ = head_started([0.0, 1.0] * 3, ["dark", "bright"] * 3, **kept)
    torch.manual_seed(0)
    fresh = ClassificationNetwork(BertsWinEncoder(**ENCODER), 2, kept.get("pooling", "mean"))
    assert torch.equal(made.head.weight, fresh.head.weight)


def test_a_head_over_features_that_are_not_finite_starts_at_random(caplog):
    made, _ = head_started([0.0, torch.inf] * 3, ["dark", "bright"] * 3)
    assert torch.isfinite(made.head.weight).all()
    assert "the head starts at random" in caplog.text
