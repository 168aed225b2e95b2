"""Promises of the split: by patient where they are known, the same on every machine."""

import hashlib
import json

import pytest
from conftest import write_volume

from scripts.data import find_cases, group_cases, prepare_cases, split_cases, split_summary, warn_of_shared_patients


def names(cases):
    return [case["case"] for case in cases]


def test_a_split_is_summed_up_alike_in_any_order_and_otherwise_with_a_case_more_or_elsewhere():
    cases = [{"case": name} for name in "abcd"]
    once = split_summary({"training": cases[:3], "validation": cases[3:]})
    assert once.startswith("3 for training, 1 for validation (names ")
    assert once == split_summary({"training": cases[2::-1], "validation": cases[3:]})
    others = ((cases[:2], cases[3:]), (cases[1:], cases[:1]))
    assert once not in {split_summary({"training": training, "validation": held}) for training, held in others}


def of_patients(number, scans):
    return [
        {"case": f"p{patient}/scan_{scan}", "patient": f"p{patient}"}
        for patient in range(number)
        for scan in range(scans)
    ]


def test_the_split_is_stable_under_added_cases_and_independent_of_order():
    cases = [{"case": f"patient_{number}"} for number in range(200)]
    some, all_ = split_cases(cases[:150], 0.2), split_cases(cases[::-1], 0.2)
    assert set(names(some["validation"])) <= set(names(all_["validation"]))
    assert set(names(some["training"])) <= set(names(all_["training"]))
    assert len(all_["validation"]) == pytest.approx(40, abs=12)  # two standard deviations


def test_two_cases_are_split_one_and_one_and_a_single_one_is_refused():
    folds = split_cases([{"case": "a"}, {"case": "b"}], 0.01)
    assert [len(folds["training"]), len(folds["validation"])] == [1, 1]
    folds = split_cases([{"case": "a"}, {"case": "b"}], 0.99)
    assert [len(folds["training"]), len(folds["validation"])] == [1, 1]
    with pytest.raises(ValueError, match=r"one volume to train on and one to validate on are needed.*: a$"):
        split_cases([{"case": "a"}], 0.2)
    with pytest.raises(ValueError, match="val_fraction 1 must lie between 0 and 1"):
        split_cases([{"case": "a"}, {"case": "b"}], 1)


@pytest.mark.parametrize("val_fraction", [0.01, 0.2, 0.5])
def test_cases_without_patients_are_split_by_the_hash_of_their_names_as_ever(val_fraction):
    cases = [{"case": f"imagesTr/case_{number}"} for number in range(50)]
    places = {
        case["case"]: int.from_bytes(hashlib.sha256(case["case"].encode()).digest()[:8], "big") / 2**64
        for case in cases
    }
    below = {name for name, place in places.items() if place < val_fraction} or {min(places, key=places.get)}
    assert set(names(split_cases(cases, val_fraction)["validation"])) == below


@pytest.mark.parametrize(("number", "scans"), [(2, 5), (40, 3), (7, 1)])
def test_a_patient_is_never_on_both_sides(number, scans):
    folds = split_cases(of_patients(number, scans), 0.2)
    trained, validated = ({case["patient"] for case in folds[fold]} for fold in ("training", "validation"))
    assert trained
    assert validated
    assert not trained & validated
    assert len(folds["training"]) + len(folds["validation"]) == number * scans


def test_where_some_patients_are_known_the_others_count_as_one_each():
    cases = [*of_patients(3, 4), *({"case": f"other_{number}"} for number in range(30))]
    folds = split_cases(cases, 0.3)
    validated = {case.get("patient", case["case"]) for case in folds["validation"]}
    assert not validated & {case.get("patient", case["case"]) for case in folds["training"]}


def test_scans_of_one_patient_alone_cannot_be_split():
    with pytest.raises(ValueError, match=r"all 3 volumes are of one patient, p0.*--group_by"):
        split_cases(of_patients(1, 3), 0.2)


@pytest.mark.parametrize(
    ("group_by", "patients"),
    [(r"^[^/]+", ["s1", "s1", "s2"]), (r"s(\d+)/", ["1", "1", "2"]), (r"(?P<who>s\d)", ["s1", "s1", "s2"])],
)
def test_a_regular_expression_finds_the_patient_in_the_name(group_by, patients):
    cases = [{"case": "s1/a", "patient": "anonymous"}, {"case": "s1/b"}, {"case": "s2/a"}]
    assert [case["patient"] for case in group_cases(cases, group_by)] == patients
    assert cases[0]["patient"] == "anonymous"


@pytest.mark.parametrize(
    ("group_by", "message"),
    [
        ("(s1", r"group_by '\(s1' is no regular expression"),
        ("*", r"group_by '\*' is no regular expression"),
        ("s1", "group_by 's1' finds no patient in the names of 1 cases, such as s2/a"),
        ("x?", "group_by 'x\\?' finds no patient in the names of 2 cases"),  # matches, but nothing
        ("s1|(t)", "finds no patient in the names of 2 cases"),
    ],
)
def test_an_expression_that_does_not_fit_every_name_is_refused(group_by, message):
    with pytest.raises(ValueError, match=message):
        group_cases([{"case": "s1/a"}, {"case": "s2/a"}], group_by)


@pytest.mark.parametrize("key", ["patient", "subject", "PatientID", "participant_id"])
def test_a_datalist_may_name_the_patient_in_several_ways(tmp_path, key):
    items = [{"image": f"{number}.nii.gz", key: number // 2, "session": number % 2} for number in range(4)]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": items}))
    cases = find_cases(tmp_path)["training"]
    assert [case["patient"] for case in cases] == ["0", "0", "1", "1"]
    assert [case["session"] for case in cases] == ["0", "1", "0", "1"]


@pytest.mark.parametrize("unknown", [None, "", float("nan")])
def test_a_patient_that_is_left_empty_is_not_known(tmp_path, unknown):
    (tmp_path / "dataset.json").write_text(json.dumps({"training": [{"image": "a.nii.gz", "patient": unknown}]}))
    assert "patient" not in find_cases(tmp_path)["training"][0]


def test_lists_that_share_a_patient_are_used_with_a_warning(tmp_path, caplog):
    for number in range(3):
        write_volume(tmp_path / f"p{number // 2}_{number}.nii.gz", seed=number)
    items = [{"image": f"p{number // 2}_{number}.nii.gz", "patient": f"p{number // 2}"} for number in range(3)]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": items[:1], "validation": items[1:]}))
    folds = prepare_cases(tmp_path, "mr")
    assert len(folds["validation"]) == 2
    assert "1 patients are both trained and validated on, as the lists have it: p0" in caplog.text
    caplog.clear()
    warn_of_shared_patients({"training": [{"case": "a"}], "validation": [{"case": "b"}, {"case": "c", "patient": "c"}]})
    assert not caplog.messages


def test_a_training_splits_by_the_expression_that_it_is_given(tmp_path):
    for number in range(6):
        write_volume(tmp_path / f"p{number // 3}_{number}.nii.gz", seed=number)
    folds = prepare_cases(tmp_path, "mr", group_by=r"^p\d")
    assert sorted(len({case["patient"] for case in cases}) for cases in folds.values()) == [1, 1]
    assert [len(cases) for cases in folds.values()] == [3, 3]
