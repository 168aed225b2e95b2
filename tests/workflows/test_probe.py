"""Promises of the frozen probe."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_KNOBS, bundle, noise, started, tiny, write_volume

from scripts.data import labelled
from scripts.experiments.peers import ViTMAE
from scripts.workflows import FewCasesProbe, FrozenProbe, probed_targets
from scripts.workflows.probe import accuracy, fit_best, label_fractions, nearest_neighbours, r_squared, ridge


def test_label_fractions_count_each_label_in_each_patch():
    label = torch.zeros(1, 1, 8, 8, 16)
    label[..., :4, :8] = 1
    label[..., 8:] = 2
    assert torch.equal(label_fractions(label, 2, 8)[0], torch.tensor([[0.5, 0.0], [0.0, 1.0]]))


def test_ridge_finds_a_linear_map_and_r_squared_says_so():
    features, weights = noise(50, 5), noise(5, 2, seed=1)
    target = features @ weights + 3
    exact, shrunk = (
        torch.from_numpy(ridge(penalty, 50).fit(features, target).predict(features)) for penalty in (1e-9, 1e3)
    )
    assert r_squared(exact, target).min() > 0.999
    assert r_squared(shrunk, target).max() < 0.1
    assert torch.allclose(r_squared(target.mean(dim=0).expand_as(target), target), torch.zeros(2).double(), atol=1e-6)


def test_features_that_hold_the_labels_score_one_and_noise_scores_none(tmp_path):
    def batches(first):
        for number in range(first, first + 4):
            label = (noise(2, 1, 16, 16, 16, seed=number) > 0.5).float()
            yield {"image": label, "label": label}

    def probe(encode):
        return FrozenProbe(
            encode, list(batches(0)), list(batches(50)), 1, 4, tmp_path / "probe.json", {"mode": "x"}
        ).run()

    telling = probe(lambda image: torch.nn.functional.avg_pool3d(image, 4))
    silent = probe(lambda image: noise(image.shape[0], 3, 4, 4, 4, seed=int(image.sum())))
    assert telling["r2"] > 0.99
    assert telling["r2_standard_error"] < 0.01
    assert silent["r2"] < 0.05
    assert telling["embedding"]["linear"] > 0.99
    assert silent["embedding"]["linear"] < 0.5
    report = json.loads((tmp_path / "probe.json").read_text())
    assert report["mode"] == "x"
    assert (report["training_cases"], report["validation_cases"]) == (8, 8)


def test_cases_without_labels_are_refused():
    assert labelled([{"case": "a"}, {"case": "b", "label": __file__}]) == [{"case": "b", "label": __file__}]
    many = [{"case": str(number), "label": __file__} for number in range(20)]
    few, fewer = labelled(many, 10), labelled(many[::-1], 5)
    assert (len(few), fewer) == (10, few[:5])  # the same few, whatever the order
    with pytest.raises(ValueError, match="none of the cases has a label"):
        labelled([{"case": "a"}])
    with pytest.raises(ValueError, match="none of the 1 training cases has a age"):
        probed_targets({"training": [{"case": "a"}], "validation": [{"case": "b"}]}, "age")


def test_label_maps_with_more_labels_than_are_read_are_refused(tmp_path):
    for name, value in (("a", 2), ("b", 5)):
        image = write_volume(tmp_path / f"{name}.nii.gz", shape=(8, 8, 8))
        voxels = np.zeros((8, 8, 8), np.uint8)
        voxels[4] = value
        nib.save(nib.Nifti1Image(voxels, nib.load(image).affine), tmp_path / f"{name}_label.nii.gz")
    folds = {fold: [{"case": name, "image": str(tmp_path / f"{name}.nii.gz"),
                     "label": str(tmp_path / f"{name}_label.nii.gz")}]
             for fold, name in (("training", "a"), ("validation", "b"))}  # fmt: skip
    with pytest.raises(ValueError, match=r"b_label.nii.gz: holds the values 0, 5 where 0 to 2 are expected"):
        probed_targets(folds, "label", num_labels=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "overlays", "network"),
    [
        ("patch", ("small.yaml",), tiny()),
        ("volumetric", ("small.yaml",), tiny(strict_stem=True).encoder),
        ("patch", ("small.yaml", "peers/vit_probe.yaml"), ViTMAE((32, 32, 32), 8, 1, 48, 2, 4, 48)),
    ],
)
def test_the_probe_runs_on_a_decathlon_folder(tmp_path, mode, overlays, network):
    training = []
    for number in range(5):
        path = write_volume(tmp_path / "imagesTr" / f"{number}.nii.gz", seed=number)
        image = nib.load(path)
        (tmp_path / "labelsTr").mkdir(exist_ok=True)
        label = (np.asarray(image.dataobj) > 500).astype(np.uint8)
        nib.save(nib.Nifti1Image(label, image.affine), tmp_path / "labelsTr" / f"{number}.nii.gz")
        training.append({"image": f"imagesTr/{number}.nii.gz", "label": f"labelsTr/{number}.nii.gz"})
    (tmp_path / "dataset.json").write_text(json.dumps({"training": training}))
    torch.save(network.state_dict(), tmp_path / "model.pt")
    knobs = {name: value for name, value in TINY_KNOBS.items() if "epoch" not in name and name != "figure_interval"}
    result = bundle(
        "run",
        "probe",
        "--config_file",
        str([str(ROOT / "configs" / name) for name in ("train.yaml", "probe.yaml", *overlays)]),
        **knobs,
        dataset_dir=tmp_path,
        pretrained=tmp_path / "model.pt",
        output_dir=tmp_path / "out",
        num_labels=1,
        mode=mode,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert report["mode"] == mode
    assert report["r2"] > 0.1


@pytest.mark.slow
def test_the_probe_runs_on_numbers_of_a_datalist_without_label_maps(tmp_path):
    items = [{"image": write_volume(tmp_path / f"{n}.nii.gz", seed=n).name, "age": 20.5 + n} for n in range(14)]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": items[:10], "validation": items[10:]}))
    torch.save(tiny().state_dict(), tmp_path / "model.pt")
    knobs = {name: value for name, value in TINY_KNOBS.items() if "epoch" not in name and name != "figure_interval"}
    files = str([str(ROOT / "configs" / name) for name in ("train.yaml", "probe.yaml", "small.yaml")])
    knobs |= {"dataset_dir": tmp_path, "pretrained": tmp_path / "model.pt", "output_dir": tmp_path / "out"}
    result = bundle("run", "probe", "--config_file", files, **knobs, target="age")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert report["target"] == {"field": "age", "classes": []}
    assert (report["training_cases"], report["validation_cases"]) == (10, 4)
    assert set(report["embedding"]) == {"linear", "penalty", "neighbours", "k"}


def test_a_label_that_is_nowhere_does_not_spoil_the_score():
    target = torch.stack([noise(40), torch.zeros(40)], dim=1)
    scores = r_squared(target + 0.1 * noise(40, 2, seed=1), target)
    assert scores[0] > 0.9
    assert scores[1].isnan()


def test_the_nearest_neighbours_vote():
    features = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    target = torch.tensor([[0.0], [2.0], [5.0], [7.0]])
    new = torch.tensor([[0.4], [10.6]])
    for k, expected in ((2, [1.0, 6.0]), (40, [3.5, 3.5])):
        prediction, _ = fit_best(nearest_neighbours, [k], (features, target), new, lambda *_: 0.0)
        assert prediction.flatten().tolist() == expected


def probed_brightness(tmp_path, target):
    """Probe bright and dark volumes for a field: brightness is a class, level a number; coin and lot are random."""

    def fold(first):
        numbers = range(first, first + 24)
        drawn = np.random.default_rng(first)
        return [{"case": str(n), "brightness": ("bright", "dark")[n % 2], "level": n % 12 + drawn.random() / 10,
                 "coin": str(drawn.integers(2)), "lot": drawn.random()} for n in numbers]  # fmt: skip

    def batches(cases):
        for case in cases:
            image = 0.1 * noise(1, 3, 8, 8, 8, seed=int(case["case"]))
            image[:, 0] += case["brightness"] == "bright"
            image[:, 1] += case["level"]
            yield {"image": image, "case": [case["case"]]}

    targets = probed_targets({"training": fold(0), "validation": fold(50)}, target)
    train, val = batches(targets.training), batches(targets.validation)
    return FrozenProbe(lambda image: image, train, val, 1, 1, tmp_path / "probe.json", {}, targets).run()


def test_classes_are_read_off_the_embeddings(tmp_path):
    told = probed_brightness(tmp_path, "brightness")
    assert told["target"] == {"field": "brightness", "classes": ["bright", "dark"]}
    assert told["embedding"]["linear"] == told["embedding"]["linear_auroc"] == 1.0
    assert told["embedding"]["majority"] == 0.5
    guessed = probed_brightness(tmp_path, "coin")["embedding"]
    assert guessed["linear"] < 0.9
    assert guessed["linear_auroc"] < 0.9


@pytest.mark.parametrize(("whose", "fooled"), [("each", True), ("its", False)])
def test_the_scans_of_a_patient_do_not_choose_for_one_another(tmp_path, whose, fooled):
    # Ten patients of four scans each, which are the same; what is to be told of them is noise.
    cases = [{"case": str(n), "lot": noise(1, seed=n // 4).item()} for n in range(60)]
    cases = [case | ({"patient": str(n // 4)} if whose == "its" else {}) for n, case in enumerate(cases)]
    targets = probed_targets({"training": cases[:40], "validation": cases[40:]}, "lot")

    def batches(cases):
        return [{"image": noise(1, 3, 2, 2, 2, seed=int(case["case"]) // 4), "case": [case["case"]]} for case in cases]

    train, val = batches(targets.training), batches(targets.validation)
    found = FrozenProbe(lambda image: image, train, val, 1, 1, tmp_path / "probe.json", {}, targets).run()
    assert (found["embedding"]["k"] <= 3) == fooled  # the other scans of a patient


def test_numbers_are_read_off_the_embeddings(tmp_path):
    told = probed_brightness(tmp_path, "level")
    assert told["target"] == {"field": "level", "classes": []}
    assert told["embedding"]["linear"] > 0.99
    assert told["embedding"]["neighbours"] > 0.8
    assert "majority" not in told["embedding"]
    assert probed_brightness(tmp_path, "lot")["embedding"]["linear"] < 0.5


def test_the_setting_is_chosen_on_every_fourth_training_case_and_the_penalty_is_relative_to_the_rows():
    train, new = (noise(40, 6, 3), noise(40, 6, 2, seed=1)), noise(5, 6, 3, seed=2)
    asked = []

    def build(setting, rows):
        asked.append((setting, rows))
        return ridge(setting, rows)

    prediction, best = fit_best(build, (1e9, 1e-9), train, new, lambda found, target: -found.square().sum().item())
    assert best == 1e9  # which predicts next to nothing but the mean
    assert asked == [(1e9, 180), (1e-9, 180), (1e9, 240)]
    assert prediction.shape == (5, 6, 2)
    mean = train[1].double().flatten(0, 1).mean(dim=0)
    torch.testing.assert_close(prediction, mean.expand_as(prediction), rtol=1e-6, atol=1e-6)
    assert (
        fit_best(ridge, (1.0, 2.0), (noise(1, 6, 3), noise(1, 6, 2)), new, accuracy)[1] == 1.0
    )  # too few to choose by
    assert ridge(0.5, rows=40).alpha == 20


def test_the_setting_is_chosen_by_other_patients_than_it_is_fitted_to():
    # Five scans of each patient, alike; what is to be told of them is noise.
    train = tuple(values.repeat_interleave(5, dim=0) for values in (noise(20, 6), noise(20, 2, seed=1)))
    patients = [f"patient {place // 5}" for place in range(100)]

    def furthest(**whose):
        errors = []
        fit_best(
            nearest_neighbours,
            (1,),
            train,
            train[0],
            lambda *both: errors.append(abs(both[0] - both[1]).max()) or 0,
            **whose,
        )
        return errors[0]

    assert furthest() == 0  # another scan of the same patient told it
    assert furthest(patients=patients) > 1
    assert furthest(patients=["one"] * 100) == 0  # of a single patient there is no other


def few_cases(path, **about):
    """Cases whose label is the bright part of their image, or whose class says whether the whole is bright."""
    path.touch()
    names = ("label", "class")
    return {
        fold: [
            {"case": f"{fold}_{number}", "seed": number + 100 * (fold == "validation")}
            | {
                name: value
                for name, value in (("label", path), ("class", number % 2))
                if name in about and name in names
            }
            for number in range(5)
        ]
        for fold in ("training", "validation")
    }


def prepared(case):
    image = noise(1, 16, 16, 16, seed=case["seed"]) + 3 * case.get("class", 0)
    return {"image": image} | ({"label": (image > 0).float()} if "label" in case else {})


def share_of_bright(volume):
    return torch.nn.functional.avg_pool3d((volume > 0).float(), 8)


def test_a_training_is_probed_by_what_its_cases_come_with(tmp_path):
    labels = FewCasesProbe(few_cases(tmp_path / "label", label=True), prepared, 4, 8).score(share_of_bright)
    assert labels["probe_r2"] == pytest.approx(1, abs=1e-3)
    assert labels["probe_linear"] == pytest.approx(1, abs=1e-2)
    classes = FewCasesProbe(few_cases(tmp_path / "label", **{"class": 1}), prepared, 4, 8).score(share_of_bright)
    assert classes == {"probe_linear": 1.0, "probe_neighbours": 1.0}
    assert FewCasesProbe(few_cases(tmp_path / "label"), prepared, 4, 8).score(share_of_bright) == {}


def test_of_each_patient_one_case_is_looked_at(tmp_path):
    cases = few_cases(tmp_path / "label", label=True)
    cases = {fold: [case | {"patient": f"p{n // 2}"} for n, case in enumerate(fold_cases)]
             for fold, fold_cases in cases.items()}  # fmt: skip
    chosen = FewCasesProbe(cases, prepared, 2, 8).chosen
    assert [[case["patient"] for case in fold] for fold in chosen] == [["p0", "p1"]] * 2


def test_cases_of_a_training_are_read_once_and_what_cannot_be_read_is_logged_once(tmp_path, caplog):
    read = []
    cases = few_cases(tmp_path / "label", label=True)
    probe = FewCasesProbe(cases, lambda case: read.append(case["case"]) or prepared(case), 3, 8)
    assert probe.score(share_of_bright) == probe.score(share_of_bright)
    assert len(read) == 6

    def refuse(case):
        raise OSError("no label map")

    probe = FewCasesProbe(cases, refuse, 3, 8)
    assert probe.score(share_of_bright) == probe.score(share_of_bright) == {}
    assert caplog.text.count("the features are not probed: no label map") == 1


def test_label_maps_of_a_training_are_prepared_as_their_images_are(tmp_path):
    for number in range(6):
        path = write_volume(tmp_path / f"imagesTr/case_{number}.nii.gz", shape=(48, 40, 40), seed=number)
        image = nib.load(path)
        label = (image.get_fdata() > 500).astype(np.uint8)
        (tmp_path / "labelsTr").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(label, image.affine), tmp_path / f"labelsTr/case_{number}.nii.gz")
    entries = [{"image": f"imagesTr/case_{n}.nii.gz", "label": f"labelsTr/case_{n}.nii.gz"} for n in range(6)]
    folds = {"training": entries[:3], "validation": entries[3:]}
    (tmp_path / "list.json").write_text(json.dumps(folds))
    knobs = TINY_KNOBS | {"field_of_view": "foreground", "device": "cpu"}
    workflow = started(dataset_dir=str(tmp_path / "list.json"), output_dir=str(tmp_path / "out"), **knobs)
    *_, monitor = (one for one in workflow.parser.get_parsed_content("validate::handlers") if hasattr(one, "probe"))
    scores = monitor.probe.score(lambda volume: torch.nn.functional.avg_pool3d(volume, 8))
    assert set(scores) == {"probe_r2", "probe_linear", "probe_neighbours"}
    for case in monitor.probe.read[0]:
        assert case["image"].shape == case["label"].shape == (1, 32, 32, 32)
        bright, dark = (case["image"][case["label"] == value] for value in (1, 0))
        assert bright.min() > dark.max()
    usual = next(iter(workflow.parser.get_parsed_content("validate::dataset")))
    assert torch.equal(usual["image"], monitor.probe.read[1][0]["image"])
