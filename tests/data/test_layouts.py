"""Promises of nnU-Net and BIDS: their folders give the cases, channels, patients and folds that they mean."""

import json
from pathlib import Path

import pytest
from conftest import TINY_KNOBS, started, write_volume
from folders import found, link, listed, touch

from scripts.data import find_cases, list_cases
from scripts.transforms import LoadVolumed

# ----------------------------------------------------------------------------------------------------------- nnU-Net


def nnunet(folder, version, cases=3, channels=2, ending=".nii.gz", **more):
    touch(*(folder / "imagesTr" / f"case_{n}_{c:04d}{ending}" for n in range(cases) for c in range(channels)))
    touch(*(folder / "labelsTr" / f"case_{n}{ending}" for n in range(cases)), folder / "imagesTs" / f"new_0000{ending}")
    names = {str(channel): f"T{channel}" for channel in range(channels)}
    if version == 1:
        items = [{"image": f"./imagesTr/case_{n}.nii.gz", "label": f"./labelsTr/case_{n}.nii.gz"} for n in range(cases)]
        content = {"modality": names, "training": items, "test": ["./imagesTs/new.nii.gz"]}
    else:
        content = {"channel_names": names, "file_ending": ending, "numTraining": cases}
    (folder / "dataset.json").write_text(json.dumps(content | more))
    return folder


@pytest.mark.parametrize(("version", "ending"), [(1, ".nii.gz"), (2, ".nii.gz"), (2, ".nrrd"), (2, ".mha")])
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_an_nnunet_folder_gives_cases_with_all_channels_and_labels(tmp_path, version, ending, channels):
    cases = find_cases(nnunet(tmp_path, version, channels=channels, ending=ending))["training"]
    assert [case["case"] for case in cases] == [f"imagesTr/case_{number}" for number in range(3)]
    files = [str(tmp_path / "imagesTr" / f"case_1_{channel:04d}{ending}") for channel in range(channels)]
    assert cases[1]["image"] == (files if channels > 1 else files[0])
    assert cases[1]["label"] == str(tmp_path / "labelsTr" / f"case_1{ending}")


@pytest.mark.parametrize("version", [1, 2])
def test_a_case_of_nnunet_that_lacks_a_channel_is_named(tmp_path, version, caplog):
    folder = nnunet(tmp_path, version)
    (folder / "imagesTr" / "case_1_0001.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 cases in .* are incomplete:\n  imagesTr/case_1 lacks .*case_1_0001"):
        find_cases(folder)
    assert found(folder, skip_invalid=True) == ["imagesTr/case_0", "imagesTr/case_2"]
    assert "left out imagesTr/case_1 lacks" in caplog.text
    link(folder / "imagesTr" / "case_1_0001.nii.gz", "not_fetched")  # there, for the check to name
    assert len(found(folder)) == 3


def test_the_first_fold_of_nnunet_says_who_is_validated_on(tmp_path, caplog):
    folder = nnunet(tmp_path, 2)
    splits = [{"train": ["case_0", "case_2"], "val": ["case_1"]}, {"train": ["case_1"], "val": ["case_0"]}]
    (folder / "splits_final.json").write_text(json.dumps(splits), encoding="utf-8-sig")
    folds = {fold: [case["case"] for case in cases] for fold, cases in find_cases(folder).items()}
    assert folds == {"training": ["imagesTr/case_0", "imagesTr/case_2"], "validation": ["imagesTr/case_1"]}
    (folder / "splits_final.json").write_text(json.dumps([{"train": ["case_2"], "val": ["case_1"]}]))
    assert found(folder) == ["imagesTr/case_2"]
    assert "left out 1 cases that the split" in caplog.text
    assert [case["case"] for case in list_cases(folder)] == [f"imagesTr/case_{number}" for number in (2, 1, 0)]
    for wrong, message in (
        ([{"train": ["case_0"], "val": ["case_9"]}], "names 1 cases that are not there, such as case_9"),
        ([], "must be a list of"),
        ({"train": []}, "must be a list of"),
        ([{"train": 3, "val": []}], "must be a list of"),
    ):
        (folder / "splits_final.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=message):
            find_cases(folder)


def test_an_nnunet_dataset_may_say_where_each_file_is(tmp_path):
    touch(tmp_path / "x" / "a.nii.gz", tmp_path / "x" / "b.nii.gz", tmp_path / "y" / "c.nii.gz")
    about = {"images": ["x/a.nii.gz", str(tmp_path / "x" / "b.nii.gz")], "label": "y/c.nii.gz"}
    content = {"channel_names": {"0": "T1", "1": "T2"}, "file_ending": ".nii.gz", "dataset": {"one": about}}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    (case,) = find_cases(tmp_path)["training"]
    assert case["image"] == [str(tmp_path / "x" / "a.nii.gz"), str(tmp_path / "x" / "b.nii.gz")]
    assert (case["case"], case["label"]) == ("imagesTr/one", str(tmp_path / "y" / "c.nii.gz"))
    for images, message in (
        (["x/a.nii.gz"], "lacks 2 channels, it has 1"),
        (["../a", "b"], "leads out"),
        (None, "needs"),
    ):
        content["dataset"]["one"]["images"] = images
        (tmp_path / "dataset.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            find_cases(tmp_path)


def test_a_decathlon_folder_is_not_taken_for_nnunet(tmp_path):
    touch(tmp_path / "imagesTr" / "a_0000.nii.gz", tmp_path / "imagesTr" / "a_0001.nii.gz")
    items = [{"image": "./imagesTr/a_0000.nii.gz"}, {"image": "./imagesTr/a_0001.nii.gz"}]
    assert found(listed(tmp_path, *items, modality={"0": "T1"}).parent) == ["imagesTr/a_0000", "imagesTr/a_0001"]
    channels = [{"image": ["imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz"]}]
    assert found(listed(tmp_path, *channels, modality={"0": "T1"}).parent) == ["imagesTr/a_0000"]
    gone = [{"image": "./imagesTr/b.nii.gz"}, {"image": "./imagesTr/c.nii.gz"}]  # for the check to name
    assert found(listed(tmp_path / "other", *gone, modality={"0": "T1"}).parent) == ["imagesTr/b", "imagesTr/c"]


def test_files_that_have_another_suffix_than_nnunet_was_told_are_refused(tmp_path):
    folder = nnunet(tmp_path, 2, ending=".nrrd", file_ending=".nii.gz")
    with pytest.raises(ValueError, match=r"without a file like imagesTr/CASE_0000\.nii\.gz"):
        find_cases(folder)


def test_a_folder_with_a_dataset_json_of_another_kind_is_searched(tmp_path):
    touch(tmp_path / "scans" / "a.nii.gz")
    touch(tmp_path / "imagesTr" / "b_0007.nii.gz")
    odd = ({"training": 3, "modality": {"0": "CT"}}, {"modality": "CT"}, {"modality": {"0": "CT"}})
    for content in ({"name": "ours"}, [], *odd):
        (tmp_path / "dataset.json").write_text(json.dumps(content))
        assert found(tmp_path) == ["imagesTr/b_0007", "scans/a"]


# -------------------------------------------------------------------------------------------------------------- BIDS


def bids(folder, *names, described=True):
    touch(*(folder / name for name in names))
    if described:
        (folder / "dataset_description.json").write_text(json.dumps({"Name": "ours", "BIDSVersion": "1.8.0"}))
    return folder


def session(patient, number, *suffixes, entities=""):
    place = f"sub-{patient}/ses-{number}/anat/sub-{patient}_ses-{number}"
    return [f"{place}{entities}_{suffix}.nii.gz" for suffix in suffixes]


@pytest.mark.parametrize("described", [True, False])
def test_a_bids_folder_of_one_contrast_gives_it_with_patient_and_session(tmp_path, described):
    others = ["derivatives/sub-1/sub-1_T1w.nii.gz", "sourcedata/sub-1/sub-1_T1w.nii.gz", "code/a.nii.gz"]
    names = [*session(1, 1, "T1w"), "sub-2/anat/sub-2_T1w.nii.gz", "sub-2/anat/sub-2_T1w_dseg.nii.gz"]
    cases = find_cases(bids(tmp_path, *names, *others, described=described))["training"]
    assert [case["case"] for case in cases] == ["sub-1/ses-1/anat/sub-1_ses-1_T1w", "sub-2/anat/sub-2_T1w"]
    assert [(case["patient"], case.get("session")) for case in cases] == [("sub-1", "ses-1"), ("sub-2", None)]
    assert cases[0]["image"] == str(tmp_path / names[0])


def test_several_contrasts_are_refused_with_their_counts_and_how_to_choose(tmp_path):
    folder = bids(
        tmp_path, *session(1, 1, "T1w", "FLAIR"), *session(1, 2, "T1w"), "sub-1/func/sub-1_task-rest_bold.nii"
    )
    message = r"BIDS folder with 2 T1w, 1 FLAIR, 1 bold; .*--contrasts T1w, .*--contrasts \"\['T1w','FLAIR'\]\""
    for contrasts in (None, [], "T2w", ["T1w", "T2w"], 3, [["T1w"]]):
        with pytest.raises(ValueError, match=message):
            find_cases(folder, contrasts)
    for contrasts in ("T1w", ["T1w"], ("T1w",)):
        assert found(folder, contrasts=contrasts) == [f"sub-1/ses-{n}/anat/sub-1_ses-{n}_T1w" for n in (1, 2)]


def test_chosen_contrasts_are_channels_in_their_order(tmp_path):
    folder = bids(tmp_path, *session(1, 1, "T1w", "FLAIR", "T2w"), *session(2, 1, "FLAIR", "T1w"))
    first, second = find_cases(folder, ["FLAIR", "T1w"])["training"]
    assert first["image"] == [str(folder / name) for name in session(1, 1, "FLAIR", "T1w")]
    assert (first["case"], first["patient"]) == ("sub-1/ses-1/anat/sub-1_ses-1", "sub-1")
    assert (second["case"], second["session"]) == ("sub-2/ses-1/anat/sub-2_ses-1", "ses-1")


def test_a_session_that_lacks_a_contrast_is_refused_or_left_out_by_name(tmp_path, caplog):
    folder = bids(tmp_path, *session(1, 1, "T1w", "FLAIR"), *session(1, 2, "T1w"), *session(2, 1, "FLAIR"))
    message = r"2 of 3 cases .* incomplete:\n  sub-1/ses-2/anat/sub-1_ses-2 lacks FLAIR\n  sub-2/ses-1.* lacks T1w"
    with pytest.raises(ValueError, match=message):
        find_cases(folder, ["T1w", "FLAIR"])
    assert found(folder, contrasts=["T1w", "FLAIR"], skip_invalid=True) == ["sub-1/ses-1/anat/sub-1_ses-1"]
    assert "left out sub-1/ses-2/anat/sub-1_ses-2 lacks FLAIR" in caplog.text
    every = list_cases(folder, ["T1w", "FLAIR"])
    assert len(every) == 3
    with pytest.raises(ValueError, match="is incomplete: it lacks FLAIR"):  # as every failure, named at the end
        LoadVolumed("image")(every[1])
    assert found(folder, contrasts="T1w")
    assert "sub-2/ses-1 has no T1w: left out" in caplog.text


def test_runs_of_a_session_go_together_and_what_does_not_fit_is_named(tmp_path):
    runs = [name for run in (1, 2) for name in session(1, 1, "T1w", "FLAIR", entities=f"_run-{run}")]
    cases = find_cases(bids(tmp_path / "a", *runs), ["T1w", "FLAIR"])["training"]
    assert [case["case"] for case in cases] == [f"sub-1/ses-1/anat/sub-1_ses-1_run-{run}" for run in (1, 2)]
    assert [Path(path).name for path in cases[1]["image"]] == [Path(name).name for name in runs[2:]]
    acquired = [*session(1, 1, "T1w", entities="_acq-fine"), *session(1, 1, "FLAIR")]  # one of each
    assert len(found(bids(tmp_path / "b", *acquired), contrasts=["T1w", "FLAIR"])) == 1
    several = [*session(1, 1, "T1w", entities="_run-1"), *session(1, 1, "T1w", entities="_run-2"), *acquired[1:]]
    message = r"3 of 3 cases(.|\n)*run-1 lacks FLAIR\n.*run-2 lacks FLAIR\n.*sub-1_ses-1 lacks T1w"
    with pytest.raises(ValueError, match=message):
        find_cases(bids(tmp_path / "c", *several), ["T1w", "FLAIR"])
    half = bids(tmp_path / "d", *runs[:-1])
    assert found(half, contrasts=["T1w", "FLAIR"], skip_invalid=True) == ["sub-1/ses-1/anat/sub-1_ses-1_run-1"]
    elsewhere = [name.replace("/anat/", "/perf/") if "FLAIR" in name else name for name in runs]
    assert len(found(bids(tmp_path / "e", *elsewhere), contrasts=["T1w", "FLAIR"])) == 2
    assert len(found(tmp_path / "c", contrasts="T1w")) == 2


def test_contrasts_are_refused_where_there_is_no_bids(tmp_path):
    touch(tmp_path / "a_T1w.nii.gz")
    for dataset in (tmp_path, tmp_path / "a_T1w.nii.gz", listed(tmp_path / "list", {"image": "a.nii.gz"})):
        with pytest.raises(ValueError, match=r"contrasts T1w are chosen in BIDS folders, but .* is none"):
            find_cases(dataset, "T1w")


def test_folders_that_only_look_like_subjects_are_searched(tmp_path):
    touch(
        tmp_path / "sub-0" / "T1w.nii.gz", tmp_path / "sub-0" / "brain.nii.gz", tmp_path / "more" / "sub-1_T1w.nii.gz"
    )
    assert found(tmp_path) == ["more/sub-1_T1w", "sub-0/T1w", "sub-0/brain"]


def test_a_training_takes_the_contrast_and_the_patients_that_its_knobs_say(tmp_path):
    for number in range(4):
        for suffix in ("T1w", "FLAIR"):
            name = session(f"{number // 2}{number % 2}", 1, suffix)[0]
            write_volume(tmp_path / "data" / name, seed=10 * number + (suffix == "FLAIR"))
    knobs = {"dataset_dir": str(tmp_path / "data"), "output_dir": str(tmp_path / "out"), "contrasts": "FLAIR"}
    workflow = started(**TINY_KNOBS, **knobs, group_by="sub-([01])", val_fraction=0.5)
    folds = workflow.parser.get_parsed_content("cases")
    assert [len({case["patient"] for case in cases}) for cases in folds.values()] == [1, 1]
    assert [len(cases) for cases in folds.values()] == [2, 2]
    assert all(case["image"].endswith("_FLAIR.nii.gz") for cases in folds.values() for case in cases)
