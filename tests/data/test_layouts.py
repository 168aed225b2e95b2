"""Promises of what lies on the disk: every volume is one case, whatever the layout, and nothing else is."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from conftest import TINY_KNOBS, started, write_volume
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from scripts.data import check_cases, find_cases, labelled, list_cases, prepare_cases


def touch(*paths):
    """Finding does not read volumes: empty files will do, each other than the next."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def found(dataset, **how):
    return [case["case"] for case in find_cases(dataset, **how)["training"]]


def listed(folder, *items, name="dataset.json", encoding="utf-8", **more):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"training": items, **more}), encoding=encoding)
    return path


# ------------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("target", [".", "..", "../..", "../../.."])
def test_a_link_to_a_folder_above_adds_no_case(tmp_path, target):
    touch(*(tmp_path / "data" / "sub" / f"{number}.nii.gz" for number in range(3)), tmp_path / "other" / "4.nii.gz")
    link(tmp_path / "data" / "sub" / "latest", target)
    assert found(tmp_path / "data") == ["sub/0", "sub/1", "sub/2"]


def test_links_that_lead_to_each_other_end(tmp_path):
    touch(tmp_path / "a" / "1.nii.gz", tmp_path / "b" / "2.nii.gz")
    link(tmp_path / "a" / "to_b", tmp_path / "b")
    link(tmp_path / "b" / "to_a", tmp_path / "a")
    assert found(tmp_path) == ["a/1", "b/2"]


def test_links_to_folders_elsewhere_are_followed_once(tmp_path):
    touch(tmp_path / "store" / "deep" / "1.nii.gz", tmp_path / "store" / "2.nii.gz")
    for name in ("first", "second"):
        link(tmp_path / "data" / name, tmp_path / "store")
    link(tmp_path / "data" / "within", tmp_path / "store" / "deep")
    assert found(tmp_path / "data") == ["first/2", "first/deep/1"]


def test_a_file_is_one_case_and_the_name_that_is_no_link_wins(tmp_path):
    touch(tmp_path / "real" / "name_of_the_scan.nii.gz", tmp_path / "store" / "b.nii.gz")
    link(tmp_path / "a.nii.gz", "real/name_of_the_scan.nii.gz")  # shorter and earlier, but a link
    link(tmp_path / "linked", "real")
    for name in ("chosen/subject", "chosen/s", "z/y"):
        link(tmp_path / f"{name}.nii.gz", tmp_path / "store" / "b.nii.gz")
    assert found(tmp_path) == ["real/name_of_the_scan", "store/b"]
    (tmp_path / "store").rename(tmp_path / ".store")
    for name in ("chosen/subject", "chosen/s", "z/y"):
        (tmp_path / f"{name}.nii.gz").unlink()
        link(tmp_path / f"{name}.nii.gz", tmp_path / ".store" / "b.nii.gz")
    assert found(tmp_path) == ["real/name_of_the_scan", "z/y"]  # of links alone, the shortest


def test_a_hard_link_is_a_second_name_of_the_same_volume(tmp_path):
    touch(tmp_path / "a.nii.gz")
    (tmp_path / "copy_of_a.nii.gz").hardlink_to(tmp_path / "a.nii.gz")
    assert found(tmp_path) == ["a"]


def test_a_dataset_that_is_a_link_itself_keeps_the_names(tmp_path):
    touch(tmp_path / "real" / "a" / "1.nii.gz")
    link(tmp_path / "data", "real")
    assert found(tmp_path / "data") == found(tmp_path / "real") == ["a/1"]


@pytest.mark.parametrize("name", ["a.nii.gz", "deep/er/a.mha", "a.NRRD", "a.mgz", "deep/a.nii"])
def test_a_broken_link_is_a_case_that_the_check_names(tmp_path, name):
    for number in range(2):
        write_volume(tmp_path / f"good_{number}.nii.gz", seed=number)
    link(tmp_path / name, ".git/annex/objects/a")
    cases = find_cases(tmp_path)["training"]
    assert len(cases) == 3
    with pytest.raises(ValueError, match=r"1 of 3 volumes cannot be used(.|\n)*a\.\w+"):
        check_cases(cases, "mr")
    folds = prepare_cases(tmp_path, "mr", skip_invalid=True)
    assert sorted(case["case"] for fold in folds.values() for case in fold) == ["good_0", "good_1"]


def test_a_listed_file_that_is_not_there_is_a_case_that_the_check_names(tmp_path):
    write_volume(tmp_path / "a.nii.gz")
    path = listed(tmp_path, {"image": "a.nii.gz"}, {"image": "gone.nii.gz"}, {"image": "sub/gone.mha"})
    assert found(path) == ["a", "gone", "sub/gone"]
    assert [case["case"] for case in list_cases(path)] == ["a", "gone", "sub/gone"]
    with pytest.raises(ValueError, match=r"2 of 3 volumes cannot be used(.|\n)*gone\.nii\.gz(.|\n)*sub/gone\.mha"):
        prepare_cases(path, "mr")


# ------------------------------------------------------------------------------------------------------------ labels


@pytest.mark.parametrize(
    "name",
    [
        *("case1_mask.nii.gz", "brainmask.nii.gz", "BraTS-0001-seg.nii.gz", "aparc+aseg.mgz", "sub-1_dseg.nii.gz"),
        *("Totalseg.nii.gz", "brain_probseg.nii", "Segmentation.seg.nrrd", "a.SEG.NRRD", "T1-Label.mha", "labels.mhd"),
        *("x_labelmap.nii.gz", "x_segmentations.nrrd", "atlas parcellation.nii.gz", "wmparc.mgz", "aseg.presurf.mgz"),
        *("frame01_gt.nii.gz", "seg/t1.nii.gz", "deep/Masks/t1.nii.gz", "labelsTs/t1.nii.gz", "x_seg.hdr", "x_seg.img"),
    ],
)
def test_a_file_named_after_a_label_is_passed_over(tmp_path, name, caplog):
    caplog.set_level("INFO")
    touch(tmp_path / "t1.nii.gz", tmp_path / name)
    if name.startswith("x_seg."):
        touch(tmp_path / "x_seg.hdr", tmp_path / "x_seg.img")
    assert found(tmp_path) == ["t1"]
    assert "files that are named after labels or masks" in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        *("masked_t1", "segment_03", "labelled_scan", "mask_free/t1", "label_free", "unsegmented", "t1_seg_corrected"),
        *("segs_of_p1/t1", "labeled/t1", "weight", "masks2024/t1", "0gt", "bright", "mask_01", "gt_free"),
    ],
)
def test_a_scan_whose_name_only_contains_a_word_of_labels_is_used(tmp_path, name):
    touch(tmp_path / f"{name}.nii.gz")
    assert found(tmp_path) == [name]


# ----------------------------------------------------------------------------------------------- one file, a pattern


@pytest.mark.parametrize("name", ["a.nii.gz", "A.NII", "a.mhd", "mask.nii.gz", "a.nrrd", "a.mgz"])
def test_one_volume_is_a_cohort_of_one(tmp_path, name):
    touch(tmp_path / name, tmp_path / "other.nii.gz")
    assert [case["image"] for case in list_cases(tmp_path / name)] == [str(tmp_path / name)]
    assert list_cases(tmp_path / name)[0]["case"] == name.split(".")[0]


@pytest.mark.parametrize("half", ["pair.img", "pair.hdr"])
def test_either_half_of_a_pair_stands_for_its_volume(tmp_path, half):
    nib.save(nib.Nifti1Pair(np.zeros((4, 4, 4), np.float32), np.eye(4)), tmp_path / "pair.img")
    for dataset in (tmp_path / half, tmp_path, tmp_path / f"*{Path(half).suffix}"):
        assert [case["image"] for case in list_cases(dataset)] == [str(tmp_path / "pair.img")]


def test_a_pattern_is_the_cohort_of_what_it_matches(tmp_path):
    touch(*(tmp_path / "site" / f"{name}.nii.gz" for name in ("t1_1", "t1_2", "t2_1", "t1_1_mask")))
    touch(tmp_path / "site" / "list.txt", tmp_path / "site" / "p1" / "t1_3.mha")
    assert found(tmp_path / "site" / "t1_*") == ["t1_1", "t1_2"]
    assert found(f"{tmp_path}/*/t2_?.nii.gz") == ["site/t2_1"]
    assert found(f"{tmp_path}/**/t1_3.*") == ["site/p1/t1_3"]
    assert found(f"{tmp_path}/site/p*") == ["p1/t1_3"]  # a folder
    with pytest.raises(ValueError, match=r"dataset_dir .*t9.* matches no file"):
        find_cases(tmp_path / "site" / "t9*")


def test_a_folder_whose_name_looks_like_a_pattern_is_a_folder(tmp_path):
    touch(tmp_path / "scans [2024]" / "a.nii.gz")
    assert found(tmp_path / "scans [2024]") == ["a"]


# ----------------------------------------------------------------------------------------------------- other formats


def test_images_that_are_not_read_are_counted_with_how_to_convert_them(tmp_path, caplog):
    caplog.set_level("INFO")
    touch(*(tmp_path / name for name in ("a.nii.gz", "p/x.PAR", "p/x.REC", "p/y.par", "alone.hdr", "b.img", "c.mnc")))
    touch(*(tmp_path / "slices" / f"{number}.png" for number in range(12)), tmp_path / "d.nii.bz2", tmp_path / ".h.png")
    assert found(tmp_path) == ["a"]
    for line in (
        "2 .par, 1 .rec, which are not read: dcm2niix converts them",
        "1 .mnc, which are not read: mnc2nii converts them",
        "1 .nii.bz2, which are not read: unpack them",
        "1 .hdr, 1 .img, which are not read: the other one of a pair",
        "12 .png, which are not read: write those of a volume to one NIfTI",
    ):
        assert line in caplog.text


@pytest.mark.parametrize(("name", "what"), [("a.rec", "1 .rec"), ("deep/a.JPG", "1 .jpg"), ("a.hdr", "1 .hdr")])
def test_a_folder_of_such_files_alone_is_refused_with_what_they_are(tmp_path, name, what):
    touch(tmp_path / name)
    with pytest.raises(ValueError, match=rf"holds no volume: looked for .*; there are {what}, which are not read"):
        find_cases(tmp_path)
    with pytest.raises(ValueError, match=what):
        find_cases(tmp_path / name)


# ------------------------------------------------------------------------------------------------------------- DICOM


def write_series(folder, uid="1.2.3", slices=3, patient="Doe", study="9", modality="CT", name="IM{:04d}.dcm", first=0):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(slices):
        one = pydicom.Dataset()
        one.file_meta = pydicom.dataset.FileMetaDataset()
        one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        one.SOPClassUID = one.file_meta.MediaStorageSOPClassUID = CTImageStorage
        one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = f"{uid}.{number}"
        one.SeriesInstanceUID, one.StudyInstanceUID, one.PatientID, one.Modality = uid, study, patient, modality
        one.Rows = one.Columns = 4
        one.ImageOrientationPatient, one.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, slices - number]
        one.save_as(folder / name.format(first + number), enforce_file_format=True)


@pytest.mark.parametrize("name", ["IM{:04d}.dcm", "IM{:04d}", "{:04d}.IMA"])
def test_every_series_in_a_tree_is_a_case_named_after_its_folder(tmp_path, name):
    write_series(tmp_path / "p1" / "ct", "1.1", patient="p1", name=name)
    write_series(tmp_path / "p1" / "mixed", "1.2", patient="p1", modality="MR", name=name)
    write_series(tmp_path / "p1" / "mixed", "1.3", patient="p1", modality="MR", name=name, first=10, study="8")
    touch(tmp_path / "p2" / "t1.nii.gz", tmp_path / "README")
    cases = {case["case"]: case for case in find_cases(tmp_path)["training"]}
    assert cases.keys() == {"p2/t1", "p1/ct", "p1/mixed/1.2", "p1/mixed/1.3"}
    ct = cases["p1/ct"]
    assert (ct["patient"], ct["session"], ct["modality"]) == ("p1", "9", "CT")
    assert cases["p1/mixed/1.3"]["session"] == "8"
    order = [Path(path).name for path in ct["image"]]
    assert order == [name.format(number) for number in (2, 1, 0)]  # as the slices lie


def test_a_series_in_the_root_has_the_name_of_the_folder_and_one_in_two_folders_theirs(tmp_path):
    write_series(tmp_path / "scan", "1.1")
    assert found(tmp_path / "scan") == ["scan"]
    write_series(tmp_path / "tree" / "p" / "a", "1.2")
    write_series(tmp_path / "tree" / "p" / "b", "1.2", first=5)
    assert found(tmp_path / "tree") == ["p"]
    assert len(find_cases(tmp_path / "tree")["training"][0]["image"]) == 6
    assert found(f"{tmp_path}/scan/*.dcm") == ["scan"]


def test_labels_and_what_is_no_image_among_dicom_files_is_passed_over(tmp_path, caplog):
    caplog.set_level("INFO")
    write_series(tmp_path / "ct", "1.1")
    write_series(tmp_path / "other", "1.2", modality="SEG")
    write_series(tmp_path / "plan", "1.4", modality="RTDOSE", slices=1)
    write_series(tmp_path / "seg", "1.3")
    (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    assert found(tmp_path) == ["ct"]
    for count in ("1 DICOM files: no images", "3 DICOM files: of modality SEG", "1 DICOM files: of modality RTDOSE"):
        assert f"passed over {count}" in caplog.text


def test_an_empty_patient_is_not_known(tmp_path):
    write_series(tmp_path / "ct", patient="", study="")
    case = find_cases(tmp_path)["training"][0]
    assert "patient" not in case
    assert "session" not in case


@pytest.mark.parametrize("slices", [0, 3])
def test_a_slice_that_was_not_fetched_spoils_its_series(tmp_path, slices):
    write_series(tmp_path / "ct", slices=slices)
    link(tmp_path / "ct" / "IM0009.dcm", "gone")
    (case,) = find_cases(tmp_path)["training"]
    assert case["case"] == "ct"
    assert str(tmp_path / "ct" / "IM0009.dcm") in case["image"]
    assert len(case["image"]) == slices + 1


def test_a_datalist_may_name_a_folder_with_a_series(tmp_path):
    write_series(tmp_path / "scans" / "ct", patient="p1")
    write_series(tmp_path / "scans" / "two", "1.1")
    write_series(tmp_path / "scans" / "two", "1.2", first=10)
    items = [{"image": "scans/ct", "label": "m.nii.gz"}, {"image": "scans/two", "patient": "p2"}]
    ct, two = find_cases(listed(tmp_path, *items))["training"]
    assert len(ct["image"]) == 3
    assert (ct["case"], ct["patient"], ct["label"]) == ("scans/ct", "p1", str(tmp_path / "m.nii.gz"))
    assert (two["image"], two["patient"]) == (str(tmp_path / "scans" / "two"), "p2")  # for the check to name


# --------------------------------------------------------------------------------------------------------- datalists


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
    with pytest.raises(ValueError, match="none of the cases has a class"):
        labelled(half, by="class")
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
    assert [case["class"] for case in labelled(cases, by="class")] == ["0"]


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


def test_the_first_fold_of_nnunet_says_who_is_validated_on(tmp_path):
    folder = nnunet(tmp_path, 2)
    splits = [{"train": ["case_0", "case_2"], "val": ["case_1"]}, {"train": ["case_1"], "val": ["case_0"]}]
    (folder / "splits_final.json").write_text(json.dumps(splits), encoding="utf-8-sig")
    folds = {fold: [case["case"] for case in cases] for fold, cases in find_cases(folder).items()}
    assert folds == {"training": ["imagesTr/case_0", "imagesTr/case_2"], "validation": ["imagesTr/case_1"]}
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
    assert len(list_cases(folder, ["T1w", "FLAIR"])) == 1
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
