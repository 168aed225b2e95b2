"""Promises of finding, checking and splitting volumes."""

import gzip
import json

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from conftest import write_volume

from scripts.data import check_cases, find_cases, list_cases, prepare_cases, volume_problem


def names(cases):
    return [case["case"] for case in cases]


def write_itk(path, shape=(12, 11, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(np.random.default_rng(0).random(shape, dtype=np.float32)), str(path))
    return path


def test_a_folder_is_searched_at_any_depth_for_every_format(tmp_path):
    write_volume(tmp_path / "a" / "deep" / "one.nii.gz")
    write_volume(tmp_path / "two.nii")
    write_itk(tmp_path / "b" / "three.nrrd")
    write_itk(tmp_path / "four.mha")
    write_volume(tmp_path / "labelsTr" / "one.nii.gz")  # not an image
    write_volume(tmp_path / ".hidden" / "six.nii.gz")
    (tmp_path / "._two.nii").write_bytes(b"a Mac was here")
    (tmp_path / "notes.txt").write_text("nothing")
    cases = find_cases(tmp_path)["training"]
    assert sorted(names(cases)) == ["a/deep/one", "b/three", "four", "two"]
    assert names(check_cases(cases, "mr")) == names(cases)


def test_a_decathlon_folder_gives_its_training_images_without_labels(cohort):
    folds = find_cases(cohort)
    assert list(folds) == ["training"]
    assert names(folds["training"]) == [f"imagesTr/case_{number}" for number in range(6)]


def test_a_datalist_decides_the_split_by_list_or_by_fold(tmp_path):
    for number in range(4):
        write_volume(tmp_path / f"{number}.nii.gz", seed=number)
    items = [{"image": f"{number}.nii.gz"} for number in range(4)]
    listed, folded = tmp_path / "listed.json", tmp_path / "folded.json"
    listed.write_text(json.dumps({"training": items[:3], "validation": items[3:]}))
    folded.write_text(json.dumps({"training": [{**item, "fold": number % 3} for number, item in enumerate(items)]}))
    assert [names(find_cases(listed)[fold]) for fold in ("training", "validation")] == [["0", "1", "2"], ["3"]]
    assert [names(find_cases(folded)[fold]) for fold in ("training", "validation")] == [["1", "2"], ["0", "3"]]
    prepared = prepare_cases(listed, "mr")
    assert names(prepared["validation"]) == ["3"]


def _truncated(path):
    content = write_volume(path).read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _empty(path):
    path.write_bytes(b"")


def _constant(path):
    nib.save(nib.Nifti1Image(np.full((9, 9, 9), 7, np.int16), np.eye(4)), path)


def _four_dimensional(path):
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((9, 9, 9, 3)), np.eye(4)), path)


def _flat(path):
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((9, 9)), np.eye(4)), path)


def _not_finite(path):
    voxels = np.random.default_rng(0).random((9, 9, 9))
    voxels[0, 0, 0], voxels[1, 1, 1] = np.nan, np.inf
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)


def _label_map(path):
    voxels = np.random.default_rng(0).integers(0, 3, (20, 20, 20))
    nib.save(nib.Nifti1Image(voxels.astype(np.uint8), np.eye(4)), path)


def _almost_empty(path):
    voxels = np.zeros((40, 40, 40), np.float32)
    voxels[:6, :6, :6] = np.random.default_rng(0).random((6, 6, 6))
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)


def _no_place(path):
    image = nib.Nifti1Image(np.random.default_rng(0).random((9, 9, 9)), np.eye(4))
    image.header["sform_code"], image.header["qform_code"] = 1, 0
    for row in ("srow_x", "srow_y", "srow_z"):
        image.header[row] = 0
    content = bytearray(image.to_bytes())
    content[280:328] = bytes(48)  # the three rows of the sform
    path.write_bytes(gzip.compress(bytes(content)))


def _text(path):
    path.write_text("this is no volume")


BAD = [
    (_truncated, "cannot be read"),
    (_empty, "the file is empty"),
    (_constant, "is constant: every voxel is 7"),
    (_four_dimensional, r"has 3 channels \(or times\) of \(9, 9, 9\) where in_chans is 1"),
    (_flat, r"has 2 dimensions \(9, 9\) where 3 are needed"),
    (_not_finite, "has 2 voxels that are NaN or infinite"),
    (_text, "cannot be read"),
    (_label_map, "looks like a label map: its only values are 0, 1, 2"),
    (_almost_empty, "is almost empty: 99.5 % of its voxels are 0"),
    (_no_place, "has an affine that maps voxels to no place in space"),
]


@pytest.mark.parametrize(("spoil", "reason"), BAD, ids=[spoil.__name__ for spoil, _ in BAD])
def test_a_volume_that_cannot_be_used_is_named_with_the_reason(tmp_path, spoil, reason, caplog):
    write_volume(tmp_path / "good.nii.gz")
    spoil(tmp_path / "bad.nii.gz")
    cases = find_cases(tmp_path)["training"]
    with pytest.raises(ValueError, match=rf"1 of 2 volumes cannot be used(.|\n)*bad\.nii\.gz: {reason}"):
        check_cases(cases, "mr")
    assert names(check_cases(cases, "mr", skip_invalid=True)) == ["good"]
    assert any("left out" in line and "bad.nii.gz" in line for line in caplog.messages)


def test_nothing_left_after_skipping_ends_the_run(tmp_path):
    _constant(tmp_path / "bad.nii.gz")
    with pytest.raises(ValueError, match="none of the 1 volumes can be used"):
        check_cases(find_cases(tmp_path)["training"], "mr", skip_invalid=True)


def test_a_volume_with_a_fourth_axis_of_one_is_a_plain_volume(tmp_path):
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((9, 9, 9, 1)), np.eye(4)), tmp_path / "a.nii.gz")
    assert volume_problem(tmp_path / "a.nii.gz", "mr") is None


def test_an_mr_is_not_taken_for_a_ct(tmp_path):
    mr = write_volume(tmp_path / "mr.nii.gz", low=0)
    ct = write_volume(tmp_path / "ct.nii.gz", low=-1000)
    assert "is not in Hounsfield units: no voxel is below -200 HU" in volume_problem(mr, "ct")
    assert volume_problem(ct, "ct") is None
    air = write_volume(tmp_path / "air.nii.gz", low=-1600)
    assert "holds nothing but air: no voxel is above -500 HU" in volume_problem(air, "ct")
    assert volume_problem(mr, "mr") is None


def test_datasets_that_cannot_be_found_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"dataset_dir .*nowhere does not exist"):
        find_cases(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no volume: looked for \*\.nii\.gz"):
        find_cases(tmp_path)
    listed = tmp_path / "list.json"
    listed.write_text("{")
    with pytest.raises(ValueError, match="is not a datalist in JSON"):
        find_cases(listed)
    listed.write_text(json.dumps({"images": []}))
    with pytest.raises(ValueError, match="is not a MONAI datalist"):
        find_cases(listed)
    listed.write_text(json.dumps({"training": [{"label": "a.nii.gz"}]}))
    with pytest.raises(ValueError, match="needs one 'image' path"):
        find_cases(listed)


def test_two_files_of_one_name_are_refused(tmp_path):
    write_volume(tmp_path / "a.nii.gz")
    write_volume(tmp_path / "a.nii")
    with pytest.raises(ValueError, match="several volumes named a:"):
        find_cases(tmp_path)


def test_a_volume_must_have_the_channels_of_the_network(tmp_path):
    voxels = np.random.default_rng(0).random((9, 9, 9, 2))
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "two.nii.gz")
    assert volume_problem(tmp_path / "two.nii.gz", "mr", in_chans=2) is None
    voxels[..., 1] = 4
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "two.nii.gz")
    assert "is constant: every voxel is 4" in volume_problem(tmp_path / "two.nii.gz", "mr", in_chans=2)


def test_labels_beside_images_are_passed_over_and_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("p0/t1.nii.gz", "p0/seg.nii.gz", "p1/t1.nii.gz", "p1/mask.nii", "labeled/t1.nii.gz"):
        write_volume(tmp_path / name)
    assert names(find_cases(tmp_path)["training"]) == ["labeled/t1", "p0/t1", "p1/t1"]
    assert "passed over 2 files that are named after labels or masks" in caplog.text


def test_labels_are_remembered_where_a_datalist_names_them(tmp_path):
    write_volume(tmp_path / "a.nii.gz")
    write_volume(tmp_path / "b.nii.gz")
    (tmp_path / "dataset.json").write_text(
        json.dumps({"training": [{"image": "a.nii.gz", "label": "b.nii.gz"}, {"image": "b.nii.gz", "label": "gone"}]})
    )
    first, second = find_cases(tmp_path)["training"]
    assert first["label"] == str(tmp_path / "b.nii.gz")
    assert second["label"] == str(tmp_path / "gone")  # for those who need it to say that it is not there


def test_a_datalist_may_give_each_case_its_field_of_view(tmp_path):
    write_volume(tmp_path / "a.nii.gz")
    fov = {"radius": 12, "centre_offset": [1, -2]}

    def listed(field_of_view):
        items = [{"image": "a.nii.gz", "field_of_view": field_of_view}]
        (tmp_path / "dataset.json").write_text(json.dumps({"training": items}))
        return find_cases(tmp_path)["training"][0]

    assert listed(fov)["field_of_view"] == fov
    for wrong in (
        {"radius": "large"},
        {"radius": 0},
        {"radius": True},
        {"radius": 3, "axis": 3},
        {"radius": 3, "centre": [0, 0]},
        {"radius": 3, "centre_offset": [1]},
        [3],
    ):
        with pytest.raises(ValueError, match=r"a field_of_view must be like .* in voxels, but one is"):
            listed(wrong)


@pytest.mark.parametrize("output_dir", ["data", "data/out", "link", "link/new", "data/../data", "."])
def test_results_and_scans_are_kept_apart_whatever_path_leads_to_them(tmp_path, output_dir):
    for name in ("c0", "c1", "c0/features"):
        write_volume(tmp_path / "data" / f"{name}.nii.gz", seed=len(name))
    (tmp_path / "link").symlink_to(tmp_path / "data")
    for dataset_dir in (tmp_path / "data", tmp_path / "link"):
        with pytest.raises(ValueError, match="choose a folder beside it"):
            list_cases(dataset_dir, output_dir=tmp_path / output_dir)
        assert len(list_cases(dataset_dir, output_dir=tmp_path / "out")) == 3


def test_results_never_replace_the_label_maps_of_a_list(tmp_path):
    for folder in ("scans", "labels"):
        write_volume(tmp_path / folder / "c0.nii.gz")
    datalist = tmp_path / "list.json"
    datalist.write_text(json.dumps({"training": [{"image": "scans/c0.nii.gz", "label": "labels/c0.nii.gz"}]}))
    with pytest.raises(ValueError, match="holds files of the dataset"):
        list_cases(datalist, output_dir=tmp_path / "labels")
    assert len(list_cases(datalist, output_dir=tmp_path / "out")) == 1


def test_results_may_lie_beside_one_volume_but_not_in_its_place(tmp_path):
    scan = write_volume(tmp_path / "data" / "c0.nii.gz")
    assert len(list_cases(scan, output_dir=tmp_path / "data" / "out")) == 1
    with pytest.raises(ValueError, match="holds files of the dataset"):
        list_cases(scan, output_dir=tmp_path / "data")
