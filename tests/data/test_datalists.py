"""Promises of datalists: each is read, whoever wrote it, and leads to files of its own folder."""

import json

import pytest
from conftest import write_volume
from folders import found, listed, touch

from scripts.data import find_cases, labelled, prepare_cases


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("name", ["dataset.json", "list.json"])
def test_a_list_is_read_whatever_an_editor_made_of_it(tmp_path, encoding, name):
    path = listed(tmp_path, {"image": "ä.nii.gz"}, name=name, encoding=encoding)
    assert found(path.parent if name == "dataset.json" else path) == ["ä"]


def test_lists_of_files_are_channels(tmp_path):
    items = [{"image": [f"{number}_t1.nii.gz", f"{number}_t2.nii.gz"]} for number in range(2)]
    first, second = find_cases(listed(tmp_path, *items))["training"]
    assert first["image"] == [str(tmp_path / "0_t1.nii.gz"), str(tmp_path / "0_t2.nii.gz")]
    assert (first["case"], second["case"]) == ("0_t1", "1_t1")
    assert find_cases(listed(tmp_path, {"image": ["a.nii.gz"]}))["training"][0]["image"] == str(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("image", [[], {}, 3, None, ["a.nii.gz", 3], [["a.nii.gz"]]])
def test_an_image_that_is_no_path_is_refused(tmp_path, image):
    with pytest.raises(ValueError, match="every item of 'training' needs one 'image' path, or a list of them"):
        find_cases(listed(tmp_path, {"image": image}))


def test_paths_of_other_systems_are_read(tmp_path):
    touch(tmp_path / "scans" / "a b.nii.gz", tmp_path / "odd\\name.nii.gz")
    url = (tmp_path / "scans" / "a b.nii.gz").as_uri()
    for path in ("scans\\a b.nii.gz", ".\\scans\\a b.nii.gz", url, url.replace("file://", "file://localhost")):
        (case,) = find_cases(listed(tmp_path, {"image": path, "label": path}))["training"]
        assert case["image"] == case["label"] == str(tmp_path / "scans" / "a b.nii.gz")
        assert case["case"] == "scans/a b"
    (case,) = find_cases(listed(tmp_path, {"image": "odd\\name.nii.gz"}))["training"]  # a name on this system
    assert case["image"] == str(tmp_path / "odd\\name.nii.gz")


@pytest.mark.parametrize(
    "item",
    [
        {"image": "../a.nii.gz"},
        {"image": ["b.nii.gz", "sub/../../a.nii.gz"]},
        {"image": "..\\a.nii.gz"},
        {"image": ["b.nii.gz", "sub\\..\\..\\a.nii.gz"]},
        {"image": "b.nii.gz", "label": "..\\a.nii.gz"},
        {"image": "file:../a.nii.gz"},
        {"image": ["b.nii.gz", "file:%2e%2e/a.nii.gz"]},
    ],
)
def test_a_list_that_leads_out_of_its_folder_is_refused_in_every_spelling(tmp_path, item):
    touch(tmp_path / "a.nii.gz", tmp_path / "data" / "b.nii.gz")
    with pytest.raises(ValueError, match="which leads out of its folder"):
        find_cases(listed(tmp_path / "data", item))


def test_labels_that_are_not_where_the_list_says_are_refused_by_whoever_needs_them(tmp_path):
    for number in range(4):
        write_volume(tmp_path / "images" / f"{number}.nii.gz", seed=number)
    touch(tmp_path / "masks" / "1.nii.gz")
    items = [{"image": f"images/{number}.nii.gz", "label": f"labels/{number}.nii.gz"} for number in range(4)]
    cases = find_cases(listed(tmp_path, *items))["training"]
    with pytest.raises(ValueError, match=r"4 of 4 label maps are not where the list says, .*labels/0\.nii\.gz"):
        labelled(cases)
    half = find_cases(listed(tmp_path, items[0], items[1] | {"label": "masks/1.nii.gz"}, *items[2:]))["training"]
    with pytest.raises(ValueError, match="3 of 4 label maps are not where the list says"):
        labelled(half, most=1)
    assert len(prepare_cases(tmp_path, "mr")) == 2  # a pre-training needs none


@pytest.mark.parametrize("none", [None, "", float("nan")])
def test_a_label_or_class_that_is_left_empty_is_not_given(tmp_path, none):
    touch(tmp_path / "m.nii.gz")
    items = [
        {"image": "a.nii.gz", "label": none, "class": none},
        {"image": "b.nii.gz", "label": "m.nii.gz", "class": 0},
    ]
    cases = find_cases(listed(tmp_path, *items))["training"]
    assert [case["case"] for case in labelled(cases)] == ["b"]
    assert [case.get("class") for case in cases] == [None, "0"]


def test_a_number_for_a_label_is_a_class_as_lists_of_classifications_have_it(tmp_path):
    touch(tmp_path / "a.nii.gz")
    (case,) = find_cases(listed(tmp_path, {"image": "a.nii.gz", "label": 1.0}))["training"]
    assert (case["class"], "label" in case) == ("1", False)
    (case,) = find_cases(listed(tmp_path, {"image": "a.nii.gz", "label": 1, "class": "healthy"}))["training"]
    assert case["class"] == "healthy"


def test_a_patient_is_the_same_however_a_table_spells_the_number(tmp_path):
    touch(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz")
    items = [{"image": f"{name}.nii.gz", "patient": number} for name, number in (("a", 1), ("b", 1.0))]
    assert {case["patient"] for case in find_cases(listed(tmp_path, *items))["training"]} == {"1"}


def test_a_list_with_nobody_to_train_on_is_refused_as_such(tmp_path):
    write_volume(tmp_path / "a.nii.gz")
    (tmp_path / "list.json").write_text(json.dumps({"training": [], "validation": [{"image": "a.nii.gz"}]}))
    with pytest.raises(ValueError, match="no volume is left for training"):
        prepare_cases(tmp_path / "list.json", "mr")
