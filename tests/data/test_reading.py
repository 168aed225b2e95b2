"""Promises of the one reader: values, channels, units and places are those of the file."""

import gzip
import struct

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch

from scripts.data import describe_volume, facts_problem, read_label, read_volume
from scripts.mistakes import Mistake

LPS = np.array([[-2.0, 0, 0, 30], [0, -3.0, 0, 40], [0, 0, 4.0, -7], [0, 0, 0, 1]])
OBLIQUE = np.array([[1.9, 0.3, -0.2, 5], [-0.35, 2.9, 0.4, -8], [0.2, -0.3, 3.9, 11], [0, 0, 0, 1]])
NUMPY_TYPES = ["u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8"]


def volume(shape=(10, 12, 9), seed=0):
    return np.random.default_rng(seed).integers(0, 120, shape)


def with_forms(path, voxels, sform=None, qform=None, zooms=(1, 1, 1), kind=nib.Nifti1Image):
    image = kind(voxels.astype(np.int16), None)
    image.header.set_sform(sform, 0 if sform is None else 2)
    image.header.set_qform(qform, 0 if qform is None else 1)
    image.header.set_zooms(zooms)
    nib.save(image, path)
    return path


def same(path, voxels, affine):
    image = read_volume(path)
    assert image.dtype == torch.float32
    np.testing.assert_array_equal(image.numpy(), np.asarray(voxels, np.float32).reshape(-1, *voxels.shape[-3:]))
    np.testing.assert_allclose(image.affine.numpy(), affine, atol=1e-5)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image, nib.Nifti1Pair])
@pytest.mark.parametrize(
    ("sform", "qform", "zooms"),
    [
        (LPS @ np.diag([1.0005, 1, 1, 1]), None, (2, 3, 4)),  # pixdim rounded
        (LPS, None, (1, 1, 1)),  # pixdim never filled in
        (LPS @ np.diag([1.05, 0.97, 1.02, 1]), LPS, (2, 3, 4)),  # registered
        (OBLIQUE, LPS, (2, 3, 4)),  # sheared, as no qform can be
        (None, LPS, (2, 3, 4)),
    ],
)
def test_the_place_in_space_is_what_nibabel_says(tmp_path, sform, qform, zooms, kind):
    path = with_forms(
        tmp_path / ("a.img" if kind is nib.Nifti1Pair else "a.nii.gz"), volume(), sform, qform, zooms, kind
    )
    same(path, volume(), nib.load(path).affine)
    notes = describe_volume({"image": str(path)})["notes"]
    assert len(notes) == (sform is not None and qform is not None)
    assert not notes or "mm apart; the sform is used" in notes[0]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("name", NUMPY_TYPES)
def test_any_type_and_byte_order_is_read_as_float32(tmp_path, name, order):
    for number, kind in enumerate((nib.Nifti1Image, nib.Nifti2Image)):
        header = kind.header_class(endianness=order)
        header.set_data_dtype(f"{order}{name}")
        path = tmp_path / f"{number}.nii.gz"
        nib.save(kind(volume().astype(f"{order}{name}"), LPS, header), path)
        same(path, volume(), LPS)
        label = read_label(path, read_volume(path))
        np.testing.assert_array_equal(label[0].numpy(), volume())


@pytest.mark.parametrize("name", NUMPY_TYPES)
@pytest.mark.parametrize("suffix", [".nrrd", ".nhdr", ".mha", ".mhd", ".MHA", ".NRRD"])
def test_channels_of_nrrd_and_metaimage_are_read_in_any_number_and_type(tmp_path, name, suffix):
    for channels, compressed in ((1, False), (2, True), (5, False)):
        voxels = volume((channels, 10, 12, 9)).astype(name)
        image = sitk.GetImageFromArray(voxels.transpose(3, 2, 1, 0), isVector=True)
        image.SetSpacing((2, 3, 4))
        image.SetOrigin((-30, -40, -7))
        lower = tmp_path / f"{channels}{suffix.lower()}"
        sitk.WriteImage(image, str(lower), compressed)
        same(
            lower.rename(lower.with_suffix(suffix)),
            voxels,
            np.diag([-1, -1, 1, 1]) @ np.array([[2, 0, 0, -30], [0, 3, 0, -40], [0, 0, 4, -7], [0, 0, 0, 1.0]]),
        )


@pytest.mark.parametrize(
    "kinds", ["list domain domain domain", "domain domain domain list", "vector domain domain domain"]
)
def test_the_list_axis_of_a_nrrd_is_first_or_last(tmp_path, kinds):
    first = not kinds.endswith("list")
    voxels = volume((3, 10, 12, 9)).astype("<i2")
    stored = voxels if first else np.moveaxis(voxels, 0, -1)
    directions = ["(2,0,0)", "(0,3,0)", "(0,0,4)"]
    directions.insert(0 if first else 3, "none")
    header = f"NRRD0005\ntype: short\ndimension: 4\nsizes: {' '.join(map(str, stored.shape))}\n"
    header += f"space: left-posterior-superior\nspace directions: {' '.join(directions)}\nspace origin: (0,0,0)\n"
    header += f"kinds: {kinds}\nendian: little\nencoding: gzip\n\n"
    path = tmp_path / "a.nrrd"
    path.write_bytes(header.encode() + gzip.compress(stored.tobytes(order="F")))
    same(path, voxels, np.diag([-2.0, -3.0, 4.0, 1.0]))


def test_axes_beyond_space_hold_channels(tmp_path):
    two = volume((10, 12, 9, 2))
    for name, voxels in {"4d": two, "5d": two[:, :, :, None], "6d": two[:, :, :, None, None]}.items():
        nib.save(nib.Nifti1Image(voxels.astype(np.int16), LPS), tmp_path / f"{name}.nii")
        same(tmp_path / f"{name}.nii", np.moveaxis(two, -1, 0), LPS)
    nib.save(nib.Nifti1Image(two[:, :, :, None, :1].astype(np.int16), LPS), tmp_path / "one.nii")
    same(tmp_path / "one.nii", two[None, ..., 0], LPS)
    nib.save(nib.Nifti1Image(volume((4, 4, 4, 2, 2)).astype(np.int16), LPS), tmp_path / "both.nii")
    with pytest.raises(Mistake, match="has 5 dimensions"):
        read_volume(tmp_path / "both.nii")


@pytest.mark.parametrize("suffix", [".mgz", ".mgh"])
def test_freesurfers_volumes_are_read_with_their_place(tmp_path, suffix):
    nib.save(nib.MGHImage(volume().astype(np.float32), LPS), tmp_path / f"a{suffix}")
    same(tmp_path / f"a{suffix}", volume(), LPS)


@pytest.mark.parametrize(("unit", "factor"), [("micron", 0.001), ("meter", 1000.0), ("mm", 1.0), ("unknown", 1.0)])
def test_units_of_a_nifti_become_mm_of_voxels_and_of_the_origin(tmp_path, unit, factor):
    image = nib.Nifti1Image(volume().astype(np.int16), LPS)
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "a.nii")
    same(tmp_path / "a.nii", volume(), np.diag([factor, factor, factor, 1]) @ LPS)


@pytest.mark.parametrize(("unit", "factor"), [("um", 0.001), ("µm", 0.001), ("cm", 10.0), ("m", 1000.0), ("mm", 1.0)])
def test_units_of_nrrd_and_metaimage_become_mm(tmp_path, unit, factor):
    image = sitk.GetImageFromArray(volume().astype(np.int16).transpose(2, 1, 0))
    image.SetOrigin((1, 2, 3))
    expected = np.diag([-factor, -factor, factor, 1])
    expected[:3, 3] = np.array([-1, -2, 3]) * factor
    for name, line in (("a.nrrd", f'space units: "{unit}" "{unit}" "{unit}"'), ("a.mha", f"DistanceUnits = {unit}")):
        path = tmp_path / name
        sitk.WriteImage(image, str(path))
        content, magic = path.read_bytes(), b"space directions:" if name == "a.nrrd" else b"ElementType"
        path.write_bytes(content.replace(magic, line.encode("latin-1") + b"\n" + magic, 1))
        same(path, volume(), expected)


def test_an_unknown_unit_is_refused_by_its_name(tmp_path):
    path = tmp_path / "a.nrrd"
    sitk.WriteImage(sitk.GetImageFromArray(volume()), str(path))
    path.write_bytes(path.read_bytes().replace(b"space dir", b'space units: "yard" "yard" "yard"\nspace dir', 1))
    with pytest.raises(Mistake, match="voxel sizes in yard"):
        read_volume(path)


def test_several_files_are_channels_on_the_grid_of_the_first(tmp_path):
    smooth = np.linspace(0, 100, 20)[:, None, None] + np.linspace(0, 50, 24)[None, :, None] + np.zeros(18)
    nib.save(nib.Nifti1Image(smooth.astype(np.float32), np.diag([2.0, 2, 2, 1])), tmp_path / "t1.nii")
    nib.save(
        nib.Nifti1Image(
            smooth[::-1].astype(np.float32), np.array([[-2.0, 0, 0, 38], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]])
        ),
        tmp_path / "flipped.nii",
    )
    fine = np.kron(smooth, np.ones((1, 1, 2)))
    nib.save(nib.Nifti1Image(fine.astype(np.float32), np.diag([2.0, 2, 1, 1])), tmp_path / "fine.nii")
    image = read_volume([tmp_path / name for name in ("t1.nii", "flipped.nii", "fine.nii")])
    assert image.shape == (3, 20, 24, 18)
    assert (image[1] - image[0]).abs().max() < 1e-3
    assert (image[2] - image[0]).abs().max() < 1e-3
    np.testing.assert_allclose(image.affine.numpy(), np.diag([2.0, 2, 2, 1]))


@pytest.mark.parametrize("kind", ["c8", "c16"])
def test_complex_numbers_are_refused_by_name(tmp_path, kind):
    nib.save(nib.Nifti1Image((volume() * (1 + 1j)).astype(kind), LPS), tmp_path / "a.nii")
    with pytest.raises(Mistake, match="complex numbers"):
        read_volume(tmp_path / "a.nii")


@pytest.mark.parametrize("channels", ["RGB", "RGBA"])
def test_colours_are_refused_by_name(tmp_path, channels):
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), [(name, "u1") for name in channels]), LPS), tmp_path / "a.nii")
    with pytest.raises(Mistake, match="colours"):
        read_volume(tmp_path / "a.nii")


def test_a_metaimage_may_have_a_file_a_slice_or_its_voxels_as_text(tmp_path):
    voxels = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)  # z, y, x
    head = "ObjectType = Image\nNDims = 3\nDimSize = 4 3 2\nElementType = MET_FLOAT\nElementSpacing = 1 1 2\n"
    for number, plane in enumerate(voxels, start=1):
        (tmp_path / f"s{number:03d}.raw").write_bytes(plane.tobytes())
    (tmp_path / "slices.mhd").write_text(head + "BinaryData = True\nElementDataFile = s%03d.raw 1 2 1\n")
    text = " ".join(str(int(value)) for value in voxels.flatten())
    (tmp_path / "text.mha").write_text(head + f"BinaryData = False\nElementDataFile = LOCAL\n{text}\n")
    for name in ("slices.mhd", "text.mha"):
        assert np.array_equal(read_volume(tmp_path / name)[0], voxels.T)


def test_what_is_cut_off_or_not_there_is_said(tmp_path):
    image = sitk.GetImageFromArray(volume())
    for name, victim in (("a.mha", "a.mha"), ("b.mhd", "b.raw")):
        sitk.WriteImage(image, str(tmp_path / name))
        path = tmp_path / victim
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(Mistake, match=r"is cut off: \d+ bytes of voxels where 8640 are needed"):
            read_volume(tmp_path / name)
    for name, victim in (("b.mhd", "b.raw"), ("c.nhdr", "c.raw")):
        sitk.WriteImage(image, str(tmp_path / name))
        (tmp_path / victim).unlink()
        with pytest.raises(Mistake, match=f"should be in {victim}, which is not there"):
            read_volume(tmp_path / name)
    sitk.WriteImage(image, str(tmp_path / "d.nrrd"))
    (tmp_path / "d.nrrd").write_bytes((tmp_path / "d.nrrd").read_bytes()[:-200])
    with pytest.raises(Mistake, match="cannot be read by ITK, is it damaged"):
        read_volume(tmp_path / "d.nrrd")


def test_content_that_was_not_fetched_is_said(tmp_path):
    (tmp_path / "a.nii.gz").symlink_to(".git/annex/objects/1.nii.gz")
    (tmp_path / "b.nii.gz").write_text("/annex/objects/MD5E-s100--1.nii.gz\n")
    (tmp_path / "c.nrrd").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    for name in ("a.nii.gz", "b.nii.gz", "c.nrrd"):
        assert "was not fetched" in describe_volume({"image": str(tmp_path / name)})["problem"]
    assert describe_volume({"image": str(tmp_path / "d.nii")})["problem"] == "does not exist"


def label_of(tmp_path, voxels, affine, image_affine=LPS):
    nib.save(nib.Nifti1Image(volume().astype(np.int16), image_affine), tmp_path / "image.nii")
    nib.save(nib.Nifti1Image(voxels, affine), tmp_path / "label.nii")
    return read_label(tmp_path / "label.nii", read_volume(tmp_path / "image.nii"))


def test_a_label_elsewhere_than_its_image_is_refused_with_the_distance(tmp_path):
    label, shifted, swapped = (volume() > 60).astype(np.uint8), LPS.copy(), LPS[:, [1, 0, 2, 3]]
    shifted[2, 3] += 3
    for affine, off in (
        (shifted, "3.0"),
        (np.eye(4), r"\d+\.\d"),
        (LPS @ np.diag([2, 2, 2, 1.0]), r"\d+\.\d"),
        (swapped, r"\d+\.\d"),
    ):
        with pytest.raises(Mistake, match=f"elsewhere than its image: their corners are up to {off} mm apart"):
            label_of(tmp_path, label, affine)
    with pytest.raises(Mistake, match=r"has shape \(5, 6, 4\) where its image has \(10, 12, 9\)"):
        label_of(tmp_path, label[::2, ::2, :-1:2], LPS @ np.diag([2, 2, 2, 1.0]))


def test_a_label_on_the_very_voxels_is_used_however_it_is_stored(tmp_path):
    label = (volume() > 60).astype(np.uint8)
    rounded = LPS.copy()
    rounded[:3, 3] += 1e-5
    assert np.array_equal(label_of(tmp_path, label, rounded)[0], label)
    flipped = LPS @ np.array([[-1.0, 0, 0, 9], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    assert np.array_equal(label_of(tmp_path, label[::-1], flipped)[0], label)
    moved = label_of(tmp_path, label.transpose(2, 0, 1), LPS[:, [2, 0, 1, 3]])
    assert np.array_equal(moved[0], label)
    np.testing.assert_array_equal(moved.affine.numpy(), LPS)


@pytest.mark.parametrize("angle", [0.3, np.pi / 4, 1.0])
def test_axes_are_matched_on_oblique_grids_too(tmp_path, angle):
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    label, grid = (volume() > 60).astype(np.uint8), turn @ np.diag([2.0, 2.0, 3.0, 1.0])
    for axes in ((0, 1, 2), (1, 0, 2), (2, 1, 0), (1, 2, 0)):
        columns = [*axes, 3]
        assert np.array_equal(label_of(tmp_path, label.transpose(axes), grid[:, columns], grid)[0], label)


def test_a_damaged_qform_does_not_cost_a_sound_sform(tmp_path):
    path = with_forms(tmp_path / "a.nii", volume(), LPS, LPS, (2, 3, 4))
    content = bytearray(path.read_bytes())
    content[256:264] = struct.pack("<2f", 1, 1)
    path.write_bytes(bytes(content))
    same(path, volume(), LPS)
    assert describe_volume({"image": str(path)})["notes"] == ["its qform is damaged; the sform is used"]


def test_labels_are_rounded_where_a_scale_factor_blurs_them_and_else_must_be_whole(tmp_path):
    one = (volume() > 60).astype(np.uint8)
    for scaled in (one * 0.9999999, one * 1.00000006, one / 255 * 255):
        assert np.array_equal(label_of(tmp_path, scaled.astype(np.float32), LPS)[0], one)
    for wrong, message in ((one * 0.7, r"holds 0.7"), (np.stack([1 - one, one], -1), r"shape \(10, 12, 9, 2\)")):
        with pytest.raises(Mistake, match=message):
            label_of(tmp_path, wrong.astype(np.float32), LPS)


def problem_of(tmp_path, voxels, modality):
    nib.save(nib.Nifti1Image(voxels, LPS), tmp_path / "a.nii")
    return facts_problem(describe_volume({"image": str(tmp_path / "a.nii")}), modality)


def ball(inside, outside, noise=8.0, shape=(24, 24, 24)):
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, side) for side in shape), indexing="ij")
    values = np.where(x**2 + y**2 + z**2 < 0.5, inside + 0.1 * abs(inside) * x, outside)
    return (values + np.random.default_rng(0).normal(0, noise, shape)).round(), (x**2 + y**2 > 0.95)


@pytest.mark.parametrize("padding", [-2000, -3024, -1024, -1000, 0])
def test_stored_values_are_no_hounsfield_units_whatever_the_padding(tmp_path, padding):
    hounsfield, corner = ball(40, -1000)
    raw = np.where(corner, padding, hounsfield + 1024).astype(np.int16)
    assert "is not in Hounsfield units" in problem_of(tmp_path, raw, "ct")
    assert problem_of(tmp_path, np.where(corner, padding, hounsfield).astype(np.float32), "ct") is None


def test_the_blurred_edge_of_padding_is_no_air(tmp_path):
    hounsfield, corner = ball(40, -1000, shape=(64, 64, 16))
    for voxels in (hounsfield + 1024, hounsfield):
        padded = np.where(corner, -2000.0, voxels)
        blurred = 0.5 * (padded[:-1] + padded[1:])
        blurred[0, 0, 0] = -2001
        problem = problem_of(tmp_path, blurred.astype(np.int16), "ct")
        assert (problem is None) == (voxels is hounsfield)


def test_a_limb_in_clipped_air_is_no_label_map(tmp_path):
    x, y, _ = np.meshgrid(*(np.linspace(-1, 1, side) for side in (80, 80, 20)), indexing="ij")
    noise = np.random.default_rng(0).normal(0, 20, x.shape)
    limb = np.where(x**2 + y**2 < 0.03, 60 + noise, -1024)
    voxels = np.where(x**2 + y**2 > 0.95, -3024, limb).round().astype(np.int16)
    voxels[38:42, 38:42, 10] = -300  # gas
    assert "label map" not in str(problem_of(tmp_path, voxels, "ct"))


def test_a_body_that_was_cut_out_of_a_ct_is_used(tmp_path):
    hounsfield, _ = ball(40, -1000)
    assert problem_of(tmp_path, np.where(hounsfield < -500, -1000, hounsfield).astype(np.int16), "ct") is None


@pytest.mark.parametrize("value", [-32768, 32767, -3.4e38, 3e38, -1e6])
def test_a_number_for_no_data_that_takes_the_contrast_is_refused(tmp_path, value):
    voxels, _ = ball(600, 20)
    assert problem_of(tmp_path, voxels.astype(np.float32), "mr") is None
    voxels[:3] = value
    assert "of its contrast beside padding" in problem_of(tmp_path, voxels.astype(np.float32), "mr")
    voxels[:3] = 0  # as of a brain that was cut out
    assert problem_of(tmp_path, voxels.astype(np.float32), "mr") is None


def test_values_beyond_float32_are_refused(tmp_path):
    voxels, _ = ball(600, 20)
    voxels[0] = 1e39
    assert problem_of(tmp_path, voxels, "mr") == "has 576 voxels that are NaN or infinite, as float32"


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.float32, np.float64])
def test_label_maps_of_any_number_of_values_and_type_are_told_from_scans_of_8_bits(tmp_path, kind):
    x, y, z = np.indices((60, 60, 60))
    inside = (x - 30) ** 2 + (y - 30) ** 2 + (z - 30) ** 2 < 28**2
    for values in (4, 31, 60):
        atlas = np.where(inside, (x // 12 + 5 * (y // 12) + 25 * (z // 12)) % (values - 1) + 1, 0)
        assert "looks like a label map" in problem_of(tmp_path, atlas.astype(kind), "mr")
    scan, _ = ball(200, 10, noise=3, shape=(60, 60, 60))
    assert problem_of(tmp_path, scan.clip(0, 255).astype(np.uint8), "mr") is None


def test_a_header_of_another_kind_does_not_pass_for_nifti(tmp_path):
    nib.save(nib.AnalyzeImage(volume().astype(np.int16), None), tmp_path / "a.img")
    with pytest.raises(Mistake, match=r"ANALYZE 7.5"):
        read_volume(tmp_path / "a.img")
    (tmp_path / "b.nii").write_bytes(struct.pack("<i", 348) + bytes(400))
    assert "problem" in describe_volume({"image": str(tmp_path / "b.nii")})
