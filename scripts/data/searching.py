"""Search folders and patterns for volumes and DICOM series, and tell what is left out."""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..mistakes import Mistake
from .describing import Case
from .dicom import Remember, find_series, is_dicom
from .reading import SUFFIXES

__all__ = ["case_name", "cases_of", "files_below", "longest_suffix", "series_cases", "sort_out"]

logger = logging.getLogger(__name__)

# The words of labels. Files are passed over whose names end in one, folders whose whole name is one.
LABEL = r"(mask|(a|d|prob)?seg|label|labelmap|segmentation|(a|wm)?parc|parcellation)s?"
LABEL_FILE = re.compile(rf".*{LABEL}|(.*[^a-z0-9])?gt|{LABEL}\..*", re.DOTALL)
LABEL_FOLDER = re.compile(rf"{LABEL}|labels(tr|ts|va)")
# Files that are images by their suffix, and are not read.
CONVERSIONS = {
    "dcm2niix converts them": (".par", ".rec", ".v"),
    "mnc2nii converts them": (".mnc", ".mnc2", ".minc"),
    "3dAFNItoNIFTI converts them": (".head", ".brik", ".brik.gz"),
    "mrconvert converts them": (".mif", ".mif.gz", ".mih"),
    "ITK-SNAP converts them": (".gipl", ".gipl.gz"),
    "unpack them": (".nii.bz2", ".nii.xz", ".nii.zst", ".nii.zip", ".nrrd.gz", ".mha.gz", ".dcm.gz"),
    "the other one of a pair of .hdr and .img is missing": (".hdr", ".hdr.gz", ".img", ".img.gz"),
    "write those of a volume to one NIfTI": (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".npy", ".npz"),
}
OTHERS = tuple(suffix for suffixes in CONVERSIONS.values() for suffix in suffixes)
NO_SCANS = ("SEG", "RTDOSE")  # modalities in DICOM headers of what was made of scans
PAIRS = {".img": ".hdr", ".img.gz": ".hdr.gz"}
HEADERS = {header: image for image, header in PAIRS.items()}  # a volume is its .img


def files_below(root: Path, tops: Sequence[Path]) -> Iterator[Path]:
    """Yield the files in folders at any depth, through links too, but of each real folder once."""
    above = {root.resolve(), *root.resolve().parents}  # a link there leads back to where we are
    seen: set[str] = set()
    while tops:
        links: list[Path] = []
        for top in tops:
            for folder, subfolders, files in os.walk(top, onerror=_log_unread):
                subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
                if (real := os.path.realpath(folder)) in seen:
                    subfolders.clear()
                    continue
                seen.add(real)
                links += [Path(folder) / name for name in subfolders if (Path(folder) / name).is_symlink()]
                yield from (Path(folder) / name for name in files)
        # After all that is there without them, so that its own names win.
        tops = sorted((link for link in links if link.resolve() not in above), key=lambda link: (len(link.parts), link))


def _log_unread(error: OSError) -> None:
    logger.warning("%s cannot be searched (%s)", error.filename, error.strerror)


def cases_of(root: Path, files: Iterable[Path], chosen: bool = False, remember: Remember | None = None) -> list[Case]:
    """Make cases of volumes and DICOM files, in the order of their names; what is left out is logged.

    ``chosen`` is a file that the user named: whatever it is called, it is a volume. ``remember`` is of ``find_series``.
    """
    volumes, dicoms, left_out = sort_out(root, files, chosen)
    cases = [{"image": str(path), "case": case_name(path, root)} for path in volumes]
    if dicoms:
        series, passed_over = series_cases(root, dicoms, remember)
        cases += series
        left_out += [f"{count} DICOM files: {why}" for why, count in passed_over.items()]
    for what in left_out if cases else []:
        logger.info("passed over %s", what)
    if not cases:
        besides = f"; there are {'; '.join(left_out)}" if left_out else ""
        looked_for = ", ".join("*" + suffix for suffix in SUFFIXES)
        raise Mistake(f"{root} holds no volume: looked for {looked_for} and DICOM{besides}")
    return cases


def sort_out(root: Path, files: Iterable[Path], chosen: bool = False) -> tuple[list[Path], list[Path], list[str]]:
    """Sort files into volumes, DICOM files, and words for those that are left out; each real file is there once."""
    volumes, dicoms, others, labels = [], [], Counter(), 0
    for name in files:
        path = (longest_suffix(name, HEADERS) and other_half(name)) or name
        kind = longest_suffix(path, SUFFIXES)
        if path.name.startswith("."):
            continue
        if kind in PAIRS and not other_half(path):
            others[kind] += 1
        elif kind or is_dicom(path):
            is_label = not chosen and _is_label(path, root)
            labels += is_label
            (volumes if kind else dicoms).extend([] if is_label else [path])
        elif kind := longest_suffix(path, OTHERS):
            others[kind] += 1
    left_out = [f"{labels} files that are named after labels or masks"] if labels else []
    for how, suffixes in CONVERSIONS.items():
        if counts := [f"{others[suffix]} {suffix}" for suffix in suffixes if others[suffix]]:
            left_out.append(f"{', '.join(counts)}, which are not read: {how}")
    return _once(volumes, root), _once(dicoms, root), left_out


def _is_label(path: Path, root: Path) -> bool:
    folders = path.parent.relative_to(root).parts
    return bool(LABEL_FILE.fullmatch(_stem(path))) or any(LABEL_FOLDER.fullmatch(part.lower()) for part in folders)


def _once(files: Iterable[Path], root: Path) -> list[Path]:
    """Keep one name of each real file, sorted: the one that no link leads to, else the shortest."""
    real_root = root.resolve()

    def rank(path: Path) -> tuple[bool, int, str]:
        return os.path.realpath(path) != str(real_root / path.relative_to(root)), len(str(path)), str(path)

    kept: dict[Any, Path] = {}
    for path in sorted(files, key=rank):
        about = path.stat() if path.exists() else None
        kept.setdefault((about.st_dev, about.st_ino) if about else os.path.realpath(path), path)
    return sorted(kept.values())


def series_cases(
    root: Path, files: Sequence[Path], remember: Remember | None = None
) -> tuple[list[Case], Counter[str]]:
    """Make a case of each DICOM series, named after the folder that it alone lies in, else after its UID, too."""
    found, passed_over = find_series(files, remember)
    for series in (other for other in found if other.modality in NO_SCANS):
        passed_over[f"of modality {series.modality}"] += len(series.files)
    found = [series for series in found if series.modality not in NO_SCANS]
    places = [_common_folder(series.files) for series in found]
    counts = Counter(places)
    cases: list[Case] = []
    for series, place in zip(found, places, strict=True):
        name = _folder_name(place, root)
        if counts[place] > 1:
            name = case_name(place / re.sub(r"[^\w.-]", "_", series.uid), root)
        about = {"patient": series.patient, "session": series.study, "modality": series.modality}
        known = {key: value for key, value in about.items() if value}
        cases.append({"image": [*series.files], "case": name, **known})
    return cases, passed_over


def _common_folder(files: Sequence[str]) -> Path:
    return Path(os.path.commonpath([Path(path).parent for path in files]))


def _folder_name(folder: Path, root: Path) -> str:
    name = case_name(folder, root)
    return name if name != "." else Path(os.path.abspath(root)).name or "volume"  # noqa: PTH100 (links stay links)


def other_half(path: Path) -> Path | None:
    """Return the ``.hdr`` of a pair for its ``.img``, and the other way round, or None where it is not there."""
    kind = longest_suffix(path, PAIRS | HEADERS)
    half, stem = (PAIRS | HEADERS)[kind], path.name[: len(path.name) - len(kind)]
    return next((one for suffix in (half, half.upper()) if os.path.lexists(one := path.with_name(stem + suffix))), None)


def longest_suffix(path: Path, suffixes: Iterable[str]) -> str:
    """Return the longest of the suffixes that a file has, or none."""
    return max((suffix for suffix in suffixes if path.name.lower().endswith(suffix)), key=len, default="")


def _stem(path: Path) -> str:
    name = path.name.lower()
    return name.removesuffix(longest_suffix(path, (*SUFFIXES, *HEADERS)) or path.suffix.lower())


def case_name(path: Path, root: Path) -> str:
    """Return a path below the dataset without suffix, of one that lies elsewhere the path in full."""
    # Absolute first: a name must not lead out of the folder that results are written to.
    path, root = (Path(os.path.abspath(place)) for place in (path, root))  # noqa: PTH100 (links stay links)
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix().lstrip("/")
    return name[: len(name) - len(longest_suffix(path, SUFFIXES))]
