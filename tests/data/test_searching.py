"""Promises of a folder: every volume and DICOM series in it is one case, whatever its name, and nothing else is."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import write_volume
from folders import found, link, listed, touch, write_series

from scripts.data import check_cases, find_cases, list_cases, prepare_cases

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
