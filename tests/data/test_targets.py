"""Promises of what is learned of a case: a field of the datalist, told apart, checked, and kept in its proportions."""

import json
import logging
from collections import Counter

import pytest
from conftest import write_volume

from scripts.data import find_cases, read_targets
from scripts.mistakes import Mistake


def folds(training, validation, field="sex"):
    """Make cases of values; None: a case without one."""
    made = {"training": training, "validation": validation}
    return {
        fold: [{"case": f"{fold[0]}{n}"} | ({} if value is None else {field: value}) for n, value in enumerate(values)]
        for fold, values in made.items()
    }


def test_a_datalist_brings_its_texts_and_numbers_along_and_changes_nothing_that_has_a_meaning(tmp_path):
    write_volume(tmp_path / "a.nii.gz")
    item = {"image": "a.nii.gz", "age": 50.65, "sex": "F", "class": 1, "note": [1], "grade": float("nan")}
    item |= {"case": "x", "modality": "T1", "seed": 3, "fov": "y", "error": "z", "lacks": "w", "target": 1}
    (tmp_path / "dataset.json").write_text(json.dumps({"training": [item]}))
    (case,) = find_cases(tmp_path)["training"]
    own = {"image": str(tmp_path / "a.nii.gz"), "case": "a"}
    assert case == own | {"age": 50.65, "sex": "F", "class": "1"}


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        (["M", "F", "F"], ["F", "M"]),
        ([10, 9, 2, 2.0], ["2", "9", "10"]),
        (["10", "9", "healthy"], ["9", "10", "healthy"]),
        ([True, False], ["False", "True"]),
    ],
)
def test_classes_are_named_in_order_whatever_they_are(values, classes):
    targets = read_targets(folds(values, values), "sex")
    assert (targets.task, targets.classes) == ("classification", classes)
    assert targets.values["t0"] == classes.index(str(values[0]))
    assert targets.groups == [int(targets.values[case["case"]]) for case in targets.training]
    assert (targets.mean, targets.deviation) == (0, 1)


def test_scans_are_a_patients_where_the_data_says_so():
    cases = folds(["F", "M", "F"], ["F", "M"])
    cases["training"][2]["patient"] = cases["training"][1]["patient"] = "x"
    assert read_targets(cases, "sex").patients == {"t0": "t0", "t1": "x", "t2": "x"}


def test_many_different_numbers_are_a_regression_and_few_are_classes(caplog):
    caplog.set_level(logging.INFO)
    numbers = [20.5 + n for n in range(11)]
    targets = read_targets(folds(numbers, [1]), "sex")
    assert (targets.task, targets.classes, targets.groups) == ("regression", [], None)
    assert (targets.mean, round(targets.deviation, 3)) == (25.5, 3.162)  # of those to train on
    assert "sex is a number, from 1 to 30.5: a regression" in caplog.text
    assert read_targets(folds(list(map(str, numbers)), [1]), "sex").values == targets.values  # spelt as text
    assert read_targets(folds(numbers, numbers), "sex", task="classification").task == "classification"
    few = folds([1, 2, 3], [1, 2])
    assert read_targets(few, "sex").task == "classification"
    assert read_targets(few, "sex", task="regression").values == {"t0": 1, "t1": 2, "t2": 3, "v0": 1, "v1": 2}


def test_cases_without_the_field_and_unknown_classes_are_left_out_by_name(caplog):
    targets = read_targets(folds(["a", "b", None, "b"], ["a", "c", "b", None]), "sex")
    assert [case["case"] for case in targets.training] == ["t0", "t1", "t3"]
    assert [case["case"] for case in targets.validation] == ["v0", "v2"]
    assert "left out 1 of 4 cases, as they have no sex: t2" in caplog.text
    assert "left out 1 of 4 cases, as they have no sex: v3" in caplog.text
    assert "left out 1 of 3 cases, as their sex is that of no training case: v1" in caplog.text
    assert "only one training case each has sex a: little can be learned of them" in caplog.text
    assert not {"v1", "v3"} & targets.values.keys()


@pytest.mark.parametrize(
    ("training", "validation", "settings", "message"),
    [
        ([None, None], ["a"], {}, "none of the 2 training cases has a sex: --target names a field of the datalist"),
        (["a", "b"], [None], {}, "none of the 1 validation cases has a sex"),
        (["a", "b"], ["a", "b"], {"task": "regression"}, "sex is no number for 4 of 4 cases, such as 'a' of t0"),
        ([1, float("inf")], [1], {"task": "regression"}, "sex is no number for 1 of 3 cases, such as inf of t1"),
        (["a", "a"], ["a", "b"], {}, "all 2 training cases have the same sex, a: two classes are needed"),
        (["a", "b"], ["b", "b"], {}, "the 2 validation cases have no two classes of sex"),
        ([*range(30), "n/a"], [1, 2], {}, r"sex has 31 different values in 31 training cases \(0, 1, 2, …\), not all"),
        (["a", "b"], ["a", "b"], {"most": 9}, "num_train_cases is 9 but must be from 2 to 2"),
        (["a", "b", "b"], ["a", "b"], {"most": 1}, "num_train_cases is 1 but must be from 2 to 3"),
    ],
)
def test_what_nothing_can_be_learned_of_is_refused_with_what_would_do(training, validation, settings, message):
    with pytest.raises(Mistake, match=message):
        read_targets(folds(training, validation), "sex", **settings)


def test_the_fields_that_there_are_are_named():
    with pytest.raises(Mistake, match=r"none of the 2 training cases has a age: .*, which has sex$"):
        read_targets(folds(["a", "b"], ["a"]), "age")


def test_fewer_training_cases_keep_the_shares_of_their_classes_whatever_the_order():
    cases = folds(["a"] * 60 + ["b"] * 30 + ["c"], ["a", "b"])
    chosen = read_targets(cases, "sex", most=31, seed=1)
    names = [case["case"] for case in chosen.training]
    assert Counter(case["sex"] for case in chosen.training) == {"a": 20, "b": 10, "c": 1}
    again = read_targets({**cases, "training": cases["training"][::-1]}, "sex", most=31, seed=1)
    assert [case["case"] for case in again.training] == names
    assert [case["case"] for case in read_targets(cases, "sex", most=31, seed=2).training] != names
    fewer = {case["case"] for case in read_targets(cases, "sex", most=16, seed=1).training}
    assert fewer < set(names)
    few = read_targets(cases, "sex", most=3, seed=1)
    assert few.classes == ["a", "b", "c"]


def test_what_a_network_has_learned_is_learned_further_and_nothing_else():
    known = {"field": "sex", "classes": ["a", "b"]}
    assert read_targets(folds(["b", "a"], ["a", "b"]), "sex", like=known).about == known
    number = {"field": "sex", "classes": []}
    assert read_targets(folds([1, 2, 3], [1, 2]), "sex", like=number).task == "regression"  # few, but no classes
    for other, said in (
        ({"field": "sex", "classes": ["b", "a"]}, r"sex \(a, b\) here, but sex \(b, a\) in the network"),
        ({"field": "sex", "classes": ["a", "b", "c"]}, r"but sex \(a, b, c\) in the network"),
        ({"field": "race", "classes": ["a", "b"]}, r"target is sex here, but race \(a, b\) in the network"),
    ):
        with pytest.raises(Mistake, match=said):
            read_targets(folds(["b", "a"], ["a", "b"]), "sex", like=other)


def test_a_few_training_cases_have_each_class_its_share_whatever_their_order():
    cases = [{"case": str(number), "side": ("left", "right")[number % 2]} for number in range(60)]
    cases.append({"case": "odd", "side": "neither"})
    targets = read_targets({"training": cases, "validation": cases}, "side")
    few = targets.few(12)
    sides = [case["side"] for case in few]
    assert len(few) == 12
    assert sides.count("neither") == 1
    assert abs(sides.count("left") - sides.count("right")) <= 1
    assert targets.few(61) == targets.few(500) == targets.training
    assert len(targets.few(1)) == 3  # one of each class
    aged = [case | {"age": 0.5 + place} for place, case in enumerate(cases)]
    assert len(read_targets({"training": aged, "validation": aged}, "age").few(7)) == 7


@pytest.mark.parametrize("field", ["label", "target", "modality"])
def test_a_field_with_a_meaning_of_its_own_cannot_be_learned(field):
    with pytest.raises(ValueError, match=f"target {field} has a meaning of its own"):
        read_targets(folds([0, 1], [0, 1], field), field)
