import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from nibabel import orientations
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless, RLELossless, generate_uid

from scripts.data import Index, find_cases, read_volume
from scripts.data.dicom import find_series, is_dicom, read_series
from scripts.mistakes import Mistake

CT, MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"
OBLIQUE = (0.98, 0.17, 0.1, -0.17, 0.985, 0.02)


def slices_of(voxels, first=(-30.0, -40.0, 12.0), axes=(1, 0, 0, 0, 1, 0), spacing=(0.8, 0.7), gap=2.5, **more):
    """Make the slices of a series, of (D, H, W) Hounsfield units, W the slices; keywords replace what headers say."""
    row = np.array(axes[:3], float) / np.linalg.norm(axes[:3])
    column = np.array(axes[3:], float) - row * (np.array(axes[3:]) @ row)
    column /= np.linalg.norm(column)
    uid, study = generate_uid(entropy_srcs=[str(first), str(more)]), generate_uid(entropy_srcs=["study"])
    made = []
    for place in range(voxels.shape[2]):
        one = pydicom.Dataset()
        one.file_meta = FileMetaDataset()
        one.SOPClassUID, one.SOPInstanceUID = CT, generate_uid(entropy_srcs=[uid, str(place)])
        one.Modality, one.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
        one.PatientID, one.PatientName, one.StudyInstanceUID, one.SeriesInstanceUID = "p1", "p^1", study, uid
        one.StudyDate, one.SeriesDate, one.Manufacturer, one.SeriesNumber = "20200101", "20200101", "SIEMENS", 3
        one.ImagePositionPatient = [round(float(v), 6) for v in np.array(first) + place * gap * np.cross(row, column)]
        one.ImageOrientationPatient = [round(float(v), 8) for v in (*row, *column)]
        one.PixelSpacing, one.SliceThickness, one.InstanceNumber = list(spacing), gap, voxels.shape[2] - place
        one.Rows, one.Columns = voxels.shape[1], voxels.shape[0]
        one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 0
        one.RescaleSlope, one.RescaleIntercept, one.RescaleType = 1, -1024, "HU"
        one.PixelData = (voxels[:, :, place].T + 1024).astype("<u2").tobytes()
        for name, value in more.items():
            setattr(one, name, value(place) if callable(value) else value)
        made.append(one)
    return made


def write(folder, slices, syntax=ExplicitVRLittleEndian, name="{}.dcm"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, one in enumerate(slices):
        # The order of the names is neither that of the slices nor that of their numbers.
        path = folder / name.format((number * 7) % len(slices))
        one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        if syntax.is_compressed:
            one.compress(syntax, generate_instance_uid=False)
        else:
            one.file_meta.TransferSyntaxUID = syntax
        one.save_as(path, enforce_file_format=True, implicit_vr=syntax.is_implicit_VR, little_endian=True)
    return folder


@pytest.fixture
def voxels():
    x, y, z = np.meshgrid(np.linspace(-1, 1, 36), np.linspace(-1, 1, 40), np.linspace(-1, 1, 11), indexing="ij")
    body = np.where(x**2 + y**2 + z**2 < 0.6, 40 + 60 * x + 30 * y, -1000)
    return (body + np.random.default_rng(0).normal(0, 10, body.shape)).round().clip(-1024, 2000)


@pytest.mark.parametrize("axes", [(1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1), (-1, 0, 0, 0, 1, 0), OBLIQUE])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless, JPEG2000Lossless])
def test_a_series_has_the_voxels_and_the_place_that_dcm2niix_gives_it(voxels, tmp_path, axes, syntax):
    dcm2niix = Path(sys.executable).with_name("dcm2niix")
    folder = write(tmp_path / "series", slices_of(voxels, axes=axes), syntax)
    plain = folder if not syntax.is_compressed else write(tmp_path / "plain", slices_of(voxels, axes=axes))
    command = [dcm2niix, "-z", "n", "-b", "n", "-f", "converted", "-o", tmp_path, plain]
    subprocess.run(command, check=True, capture_output=True)  # noqa: S603
    theirs = nib.load(tmp_path / "converted.nii")
    ours, affine = read_series(folder)
    to_theirs = orientations.ornt_transform(*map(orientations.io_orientation, (affine, theirs.affine)))
    turned = orientations.apply_orientation(ours[0], to_theirs)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(turned, theirs.get_fdata())
    np.testing.assert_allclose(affine @ orientations.inv_ornt_aff(to_theirs, voxels.shape), theirs.affine, atol=1e-4)


def test_files_are_told_by_suffix_or_by_what_stands_in_them(voxels, tmp_path):
    named = write(tmp_path / "a", slices_of(voxels)[:1], name="IM{}")
    numbered = write(tmp_path / "b", slices_of(voxels)[:1], name="1.2.840.{}")
    (tmp_path / "README").write_text("no image")
    assert all(map(is_dicom, [*named.iterdir(), *numbered.iterdir(), Path("x.IMA"), Path("x.DCM")]))
    assert not any(map(is_dicom, [tmp_path / "README", Path("scan.nii.gz"), tmp_path, Path("._IM0001.dcm")]))


def test_series_are_told_apart_and_what_is_no_scan_is_counted(voxels, tmp_path):
    write(tmp_path, slices_of(voxels), name="one{}.dcm")
    write(tmp_path, slices_of(voxels, PatientID="p2", Modality="MR", SOPClassUID=MR), name="two{}.dcm")
    write(tmp_path, slices_of(voxels[:, :, :2], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), name="scout{}.dcm")
    write(tmp_path, slices_of(voxels[:, :, :3], SOPClassUID="1.2.840.10008.5.1.4.1.1.7"), name="shot{}.dcm")
    (tmp_path / "broken.dcm").write_bytes(bytes(128) + b"DICM")
    series, passed_over = find_series(tmp_path.iterdir())
    assert sorted((len(one.files), one.modality, one.patient) for one in series) == [(11, "CT", "p1"), (11, "MR", "p2")]
    assert passed_over == {"localizers": 2, "screenshots (secondary captures)": 3, "no images": 1}
    with pytest.raises(Mistake, match="holds 2 DICOM series where one is needed"):
        read_series(tmp_path)


MISSING = [place for place in range(11) if place != 4]


@pytest.mark.parametrize(
    ("kept", "more", "message"),
    [
        (MISSING, {}, r"slices are missing: 5 mm after slice 4 of 10, else 2.5 mm"),
        (range(11), {"ImagePositionPatient": lambda place: [0, 0, 2.0 * place + (place > 6)]}, "unevenly spaced: 3 mm"),
        ([*range(11), 3], {}, "1 of 12 slices where others lie already"),
        (range(11), {"NumberOfFrames": 20}, "enhanced DICOM file of several frames"),
        (range(11), {"PhotometricInterpretation": "PALETTE COLOR"}, "picture in colours"),
        (range(11), {"ImagePositionPatient": None}, "does not say where they lie"),
        (range(11), {"PixelSpacing": lambda place: [0.8, 0.7 + 0.1 * (place > 5)]}, "differ in PixelSpacing"),
        (
            range(11),
            {"ImageOrientationPatient": lambda place: [1, 0, 0, 0, 1, 0] if place else [*OBLIQUE]},
            "differ in Im",
        ),
    ],
)
def test_what_is_no_even_stack_is_refused_with_the_reason(voxels, tmp_path, kept, more, message):
    slices = slices_of(voxels, **more)
    chosen = [slices[place] for place in kept]
    write(tmp_path, chosen, name="{}.dcm")
    with pytest.raises(Mistake, match=message):
        read_series(sorted(tmp_path.iterdir()))


def test_pixels_that_nothing_decodes_are_named_with_their_encoding(voxels, tmp_path):
    write(tmp_path, slices_of(voxels), RLELossless)
    for path in tmp_path.iterdir():
        one = pydicom.dcmread(path)
        one.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"  # a film
        one.save_as(path)
    with pytest.raises(Mistake, match="cannot be decoded, stored as MPEG2"):
        read_series(tmp_path)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n"])
@pytest.mark.parametrize("place", [0, 10])
def test_a_slice_that_cannot_be_read_is_not_left_out(voxels, tmp_path, content, place):
    write(tmp_path, slices_of(voxels))
    (tmp_path / f"{(place * 7) % 11}.dcm").write_bytes(content)
    (series,), passed_over = find_series(tmp_path.iterdir())
    assert len(series.files) == 11
    assert not passed_over
    with pytest.raises(Mistake, match="no whole DICOM"):
        read_series(series.files)


def test_a_tilted_gantry_is_read_as_it_lies(voxels, tmp_path):
    write(tmp_path, slices_of(voxels, ImagePositionPatient=lambda place: [-30, -40 + 0.5 * place, 2.5 * place]))
    _, affine = read_series(tmp_path)
    np.testing.assert_allclose(affine[:3, 2], [0, -0.5, 2.5], atol=1e-6)


def test_one_file_is_told_what_it_is(voxels, tmp_path):
    folder = write(tmp_path / "folder.dcm", slices_of(voxels))
    assert read_volume(folder).shape == read_volume([folder])[:1].shape == (1, *voxels.shape)
    assert read_volume(folder / "0.dcm").shape == (1, *voxels.shape[:2], 1)


def test_a_file_that_is_cut_off_is_named(voxels, tmp_path):
    write(tmp_path, slices_of(voxels))
    victim = next(tmp_path.iterdir())
    victim.write_bytes(victim.read_bytes()[:-300])
    with pytest.raises(Mistake, match=r"decoded|no whole DICOM"):
        read_series(tmp_path)


def test_headers_are_read_once_and_again_in_a_folder_that_changed(tmp_path, monkeypatch):
    voxels = np.random.default_rng(0).integers(-1000, 1000, (8, 9, 4))
    for number in range(3):
        write(tmp_path / "tree" / f"p{number}", slices_of(voxels + number, PatientID=f"p{number}"))
    read, dcmread = [], pydicom.dcmread
    monkeypatch.setattr("pydicom.dcmread", lambda path, **given: read.append(path) or dcmread(path, **given))
    first = find_cases(tmp_path / "tree", index=Index(tmp_path / "index.jsonl"))
    assert len(read) == 12
    read.clear()
    assert find_cases(tmp_path / "tree", index=Index(tmp_path / "index.jsonl")) == first
    assert read == []
    unreadable = next((tmp_path / "tree" / "p1").iterdir())
    unreadable.write_bytes(unreadable.read_bytes()[:100])
    for _ in range(2):  # it may be readable the next time
        find_cases(tmp_path / "tree", index=Index(tmp_path / "index.jsonl"))
        assert {path.parent.name for path in read} == {"p1"}
        read.clear()
    write(tmp_path / "tree" / "p1", slices_of(voxels + 1, PatientID="p1"))
    assert find_cases(tmp_path / "tree", index=Index(tmp_path / "index.jsonl")) == first
    assert {path.parent.name for path in read} == {"p1"}
    index = Index(tmp_path / "index.jsonl")
    assert [facts["shape"] for facts in index.describe(first["training"])] == [[1, 8, 9, 4]] * 3


def test_a_header_with_a_number_that_is_none_is_of_a_slice_that_cannot_be_read(tmp_path):
    folder = write(tmp_path / "series", slices_of(np.zeros((8, 9, 4), int)))
    broken = folder / "0.dcm"
    content = pydicom.dcmread(broken)
    number = str(content.InstanceNumber).encode()
    at = broken.read_bytes().index(b"\x20\x00\x13\x00IS")
    data = bytearray(broken.read_bytes())
    data[at + 8 : at + 8 + len(number)] = b"a" * len(number)
    broken.write_bytes(bytes(data))
    (series,), _ = find_series(folder.iterdir())
    assert len(series.files) == 4
