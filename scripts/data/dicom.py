"""Find and read the series in a tree of DICOM files."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from monai.data import PydicomReader
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID

from ..mistakes import Mistake, reason

__all__ = ["Remember", "Series", "find_series", "is_dicom", "read_series"]

Header = dict[str, Any]  # of a file: uid, modality, patient, study, and its place in the series
Remember = Callable[[Sequence[Path], Callable[[], Any]], Any]

SUFFIXES = (".dcm", ".ima", ".dicom")
SAME_POSITION = 1e-3  # mm
EVEN = 0.01  # share that the distance of two slices may differ from the usual one
SIDEWAYS = 0.1  # voxels that a slice may be off the line of the others
HEADER = ["SOPClassUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID", "Modality", "ImageType"]
HEADER += ["ImagePositionPatient", "ImageOrientationPatient", "InstanceNumber", "Rows", "NumberOfFrames"]
# Classes of pictures of other things than what was scanned.
SCREENSHOTS = "1.2.840.10008.5.1.4.1.1.7"


@dataclass(frozen=True)
class Series:
    """The files of a series in the order of their slices, and what their headers say."""

    files: tuple[str, ...]
    uid: str
    modality: str
    patient: str
    study: str


def is_dicom(path: Path) -> bool:
    """Tell DICOM files by their suffix, or, without one or with a number in its place, by what stands in them."""
    suffix = path.suffix.lower()
    if path.name.startswith("."):  # what a Mac leaves beside each file on a disk of another kind
        return False
    if suffix in SUFFIXES:
        return True
    if suffix and not suffix[1:].isdigit():
        return False
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:  # a folder, or what may not be read
        return False


def find_series(files: Iterable[Path], remember: Remember | None = None) -> tuple[list[Series], Counter[str]]:
    """Group DICOM files by SeriesInstanceUID, in the order of their first files.

    Args:
        files: to look at.
        remember: answers for files whose headers were read before, and notes what is read now; default: nothing is
            known. See :meth:`bertswin_mae.data.Index.remember`.

    Returns:
        The series, and how many files are passed over, by reason: those that are no images, localizers, and
        screenshots (secondary captures). What is wrong with a series is found when it is read; a file that cannot be
        read is one of its slices, so that none is used without.
    """
    groups: dict[str, list[tuple[Path, Header]]] = defaultdict(list)
    passed_over: Counter[str] = Counter()
    unreadable: list[Path] = []
    for _, files_of in groupby(sorted(files, key=lambda path: (str(path.parent), str(path))), lambda path: path.parent):
        beside = list(files_of)
        read = partial(_headers, beside)
        for path, header in zip(beside, remember(beside, read) if remember else read(), strict=True):
            if header is None:
                unreadable.append(path)
            elif isinstance(header, str):
                passed_over[header] += 1
            else:
                groups[header["uid"] or str(path.parent)].append((path, header))
    within: dict[Path, list[str]] = defaultdict(list)
    for uid, its in groups.items():
        for folder in {path.parent for path, _ in its}:
            within[folder].append(uid)
    for path in unreadable:  # a slice, it may be, of any series in its folder, none of which is whole without it
        for uid in within[path.parent] or [str(path.parent)]:
            groups[uid].append((path, {}))
    return [_series(uid, its) for uid, its in groups.items()], passed_over


def _headers(files: Sequence[Path]) -> list[Header | str | None]:
    """Say of each file what its header does, or why it is passed over; None of one that cannot be read."""
    return [_header(path) for path in files]


def _header(path: Path) -> Header | str | None:
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=HEADER)
        if why := _passed_over(header):
            return why
        place = [_along_normal(header) or 0.0, float(header.get("InstanceNumber") or 0)]
    except (InvalidDicomError, OSError, EOFError, KeyError, TypeError, ValueError):  # pydicom reads values when asked
        return None
    names = {"uid": "SeriesInstanceUID", "modality": "Modality", "patient": "PatientID", "study": "StudyInstanceUID"}
    return {key: str(header.get(tag, "")) for key, tag in names.items()} | {"place": place}


def read_series(files: Path | Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Read a series, or the only one of a folder, through MONAI's PydicomReader.

    Returns:
        Its voxels ``(1, D, H, W)`` float32, the rescale to Hounsfield units applied, and its affine in mm, RAS.

    Raises:
        Mistake: when it is no regular stack of slices, or cannot be decoded.
    """
    files = _only_series(files) if isinstance(files, Path) else files
    try:
        slices = [pydicom.dcmread(path) for path in files]
    except (InvalidDicomError, OSError, EOFError) as error:
        raise Mistake(f"has a file that is no whole DICOM ({reason(error)})") from error
    slices = _stacked(slices)
    reader = _Slices([str(path) for path in files])
    try:
        voxels, meta = reader.get_data(slices)
    except (RuntimeError, AttributeError, ValueError) as error:
        syntax = UID(slices[0].file_meta.get("TransferSyntaxUID", "")).name
        raise Mistake(
            f"has pixels that cannot be decoded, stored as {syntax} ({reason(error)}); `pip install python-gdcm` "
            "decodes most, and dcm2niix converts them"
        ) from error
    voxels = voxels.reshape(*voxels.shape, *[1] * (3 - voxels.ndim))  # a single slice has no third axis
    return voxels.astype(np.float32)[None], np.asarray(meta["affine"], dtype=np.float64)


class _Slices(PydicomReader):
    """MONAI's reader for slices that are read and ordered."""

    def __init__(self, filenames: list[str]) -> None:
        super().__init__()
        self.has_series, self.filenames = True, [filenames]


def _passed_over(header: pydicom.Dataset) -> str | None:
    if "Rows" not in header:
        return "no images"
    if str(header.get("SOPClassUID", "")).startswith(SCREENSHOTS):
        return "screenshots (secondary captures)"
    return "localizers" if "LOCALIZER" in np.atleast_1d(header.get("ImageType") or "") else None


def _series(uid: str, members: list[tuple[Path, Header]]) -> Series:
    ordered = sorted(members, key=lambda member: (member[1].get("place", [0.0, 0.0]), str(member[0])))
    header = max((header for _, header in ordered), key=len)
    files = tuple(str(path) for path, _ in ordered)
    return Series(files, uid, *(header.get(name, "") for name in ("modality", "patient", "study")))


def _only_series(folder: Path) -> list[Path]:
    found, _ = find_series(path for path in folder.iterdir() if path.is_file() and is_dicom(path))
    if len(found) != 1:
        uids = "".join(f"\n  {series.uid}: {len(series.files)} files" for series in found)
        raise Mistake(f"holds {len(found)} DICOM series where one is needed; a folder for each would do{uids}")
    return [Path(path) for path in found[0].files]


def _along_normal(header: pydicom.Dataset) -> float | None:
    """Tell where a slice lies along the normal of its plane, in mm; None where its header does not say."""
    position, orientation = header.get("ImagePositionPatient"), header.get("ImageOrientationPatient")
    if position is None or orientation is None or len(position) != 3 or len(orientation) != 6:
        return None
    normal = np.cross(np.array(orientation[:3], dtype=float), np.array(orientation[3:], dtype=float))
    return float(normal @ np.array(position, dtype=float))


def _stacked(slices: list[pydicom.Dataset]) -> list[pydicom.Dataset]:
    """Order slices by position and number them, as MONAI's reader stacks by number; refuse what is no even stack."""
    if any(int(one.get("NumberOfFrames") or 1) > 1 for one in slices):
        raise Mistake("is an enhanced DICOM file of several frames, which is not read: convert it by dcm2niix")
    if any(str(one.get("PhotometricInterpretation", "")).startswith(("RGB", "YBR", "PALETTE")) for one in slices):
        raise Mistake("is a picture in colours (red, green, blue), where one number a voxel is needed")
    if any(_along_normal(one) is None for one in slices):
        raise Mistake("has slices whose header does not say where they lie (position and orientation)")
    for name in ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient"):
        values = np.array([np.atleast_1d(one.get(name, 1)) for one in slices], dtype=float)
        if np.abs(values - values[0]).max() > SAME_POSITION:
            raise Mistake(f"has slices that differ in {name}: {_two_values(values)}")
    slices = sorted(slices, key=_along_normal)
    places = np.array([_along_normal(one) for one in slices])
    _check_gaps(places)
    positions = np.array([one.ImagePositionPatient for one in slices], dtype=float)
    line = np.linspace(positions[0], positions[-1], len(positions))
    if (off := np.linalg.norm(positions - line, axis=1).max()) > SIDEWAYS * np.min(slices[0].get("PixelSpacing", 1)):
        raise Mistake(f"has slices that do not lie behind one another: one is {off:.3g} mm off the line of the others")
    for number, one in enumerate(slices, start=1):
        one.InstanceNumber = number
    return slices


def _two_values(values: np.ndarray) -> str:
    other = values[np.abs(values - values[0]).max(axis=1).argmax()]
    return f"{values[0].tolist()} and {other.tolist()}"


def _check_gaps(places: np.ndarray) -> None:
    gaps = np.diff(places)
    if not len(gaps):
        return
    if (twice := int((gaps < SAME_POSITION).sum())) > 0:
        raise Mistake(
            f"has {twice} of {len(places)} slices where others lie already: several volumes, times or echoes in one "
            "series; dcm2niix separates them"
        )
    usual = float(np.median(gaps))
    off = np.abs(gaps - usual) > EVEN * usual
    if off.any():
        first = int(off.argmax())
        what = "slices are missing" if gaps[first] > 1.5 * usual else "slices are unevenly spaced"
        raise Mistake(f"{what}: {gaps[first]:.4g} mm after slice {first + 1} of {len(places)}, else {usual:.4g} mm")
