"""Read volumes and label maps: the one reader of every check and workflow.

The place in space is what the file says, as nibabel takes it: the sform of a NIfTI if its code is above 0, else the
qform. Voxels become float32, which is what networks see and what is checked.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813 (its usual name)
import torch
from monai.data import MetaTensor
from monai.transforms import SpatialResample
from nibabel import orientations
from nibabel.spatialimages import HeaderDataError

from ..mistakes import Mistake, reason
from . import dicom

__all__ = ["SUFFIXES", "corner_distance", "read_label", "read_volume"]

NIBABEL_SUFFIXES = (".nii.gz", ".nii", ".img.gz", ".img", ".mgz", ".mgh")
# ITK's own wrapping in Python lacks most types of vectors; SimpleITK reads channels of any type.
ITK_READERS = {".nrrd": "NrrdImageIO", ".nhdr": "NrrdImageIO", ".mha": "MetaImageIO", ".mhd": "MetaImageIO"}
SUFFIXES = (*NIBABEL_SUFFIXES, *ITK_READERS)
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
MILLIMETRES = {"mm": 1.0, "um": 1e-3, "µm": 1e-3, "nm": 1e-6, "cm": 10.0, "m": 1000.0}
MILLIMETRES |= {"millimeter": 1.0, "micron": 1e-3, "micrometer": 1e-3, "centimeter": 10.0, "meter": 1000.0}
SAME_PLACE = 0.1  # voxels that the corners of two grids may be apart
WHOLE = 1e-3  # what a label may differ from a whole number, by the rounding of a scale factor
SLAB = 16  # float32 numbers of a line of the cache
NOT_FETCHED = (b"/annex/objects/", b"version https://git-lfs")  # how pointers begin that stand in for a file's content


def read_volume(files: str | Path | Sequence[str | Path]) -> MetaTensor:
    """Read a volume, ``(C, D, H, W)`` float32, with its affine in mm, RAS, and ``notes`` on its header in its ``meta``.

    Args:
        files: NIfTI, MGH, NRRD or MetaImage, or a folder with one DICOM series, or the files of one. Of several such,
            each is a channel, or several, resampled linearly to the grid of the first where theirs is another.

    Raises:
        Mistake: that says why there is no volume of plain numbers in it.
    """
    several = isinstance(files, list | tuple)
    if several and (Path(files[0]).is_dir() or not dicom.is_dicom(Path(files[0]))):
        first, *others = [_read_one(Path(file)) for file in files]
        channels = torch.cat([first, *(_on_grid_of(first, other) for other in others)])
        notes = [f"{file}: {note}" for file, one in zip(files, (first, *others), strict=True) for note in _notes(one)]
        return MetaTensor(channels, affine=first.affine, meta=_without_affine(first.meta) | {"notes": notes})
    return _read_one([Path(file) for file in files] if several else Path(files))


def read_label(path: str | Path, image: MetaTensor) -> MetaTensor:
    """Read a label map, ``(1, D, H, W)`` float32 whole numbers, in the order of axes of its image, ``(C, D, H, W)``.

    Raises:
        Mistake: when it lies elsewhere in space than its image, or holds other than whole numbers.
    """
    label = read_volume(path)
    if len(label) != 1:
        shape = (*label.shape[1:], len(label))
        raise Mistake(
            f"has shape {tuple(shape)} where its image has {tuple(image.shape[1:])}: one channel with a "
            "number for each structure is needed, not a channel for each"
        )
    label = _in_place_of(image, label)
    rounded = label.round()
    if (between := (label - rounded).abs() > WHOLE).any():
        raise Mistake(
            f"holds {label[between][0].item():g}, where labels are whole numbers: was it resampled linearly, or is "
            "it a probability? Resample it by nearest neighbours, or threshold it"
        )
    return rounded


def corner_distance(shape: Sequence[int], affine: np.ndarray, other: np.ndarray) -> float:
    """Tell how far apart, in mm, the corners of a grid ``(D, H, W)`` lie at most by two affines."""
    corners = np.stack(np.meshgrid(*([0, side - 1] for side in shape), [1], indexing="ij")).reshape(4, -1)
    return float(np.linalg.norm(((affine - other) @ corners)[:3], axis=0).max())


def _read_one(path: Path | list[Path]) -> MetaTensor:
    if isinstance(path, list) or path.is_dir() or dicom.is_dicom(path):
        path = [path] if isinstance(path, Path) and path.is_file() else path
        voxels, affine, name, notes = *dicom.read_series(path), str(path if isinstance(path, Path) else path[0]), []
    else:
        _check_file(path)
        name, suffix = str(path), next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")
        if not suffix:
            raise Mistake(f"{path.name} is no volume that is read: {', '.join(SUFFIXES)}, or a folder of DICOM")
        read = _read_by_itk if suffix in ITK_READERS else _read_by_nibabel
        voxels, affine, notes = read(path)
    meta = {"filename_or_obj": name, "notes": notes}
    return MetaTensor(torch.from_numpy(_contiguous(voxels)), affine=torch.from_numpy(affine), meta=meta)


def _contiguous(voxels: np.ndarray) -> np.ndarray:
    """Lay voxels out with the last axis fastest.

    NIfTI has the first one fastest. NumPy reorders that at once, and waits for the memory at every voxel: slabs as
    thick as a line of the cache take a fifth of the time.
    """
    if voxels.flags.c_contiguous:
        return voxels
    ordered = np.empty(voxels.shape, voxels.dtype)
    for start in range(0, voxels.shape[-1], SLAB):
        ordered[..., start : start + SLAB] = voxels[..., start : start + SLAB]
    return ordered


def _check_file(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise Mistake(f"is a link to {path.readlink()}, which is not there: its content was not fetched")
    if not path.exists():
        raise Mistake("does not exist")
    with path.open("rb") as file:
        start = file.read(32)
    if not start:
        raise Mistake("the file is empty")
    if start.startswith(NOT_FETCHED):
        raise Mistake("is a pointer to content that was not fetched: fetch it, by `git annex get` or `git lfs pull`")


def _read_by_nibabel(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    image = nib.load(path)
    header, stored, notes = image.header, image.get_data_dtype(), []
    if stored.names:
        raise Mistake("is a picture in colours (red, green, blue), where one number a voxel is needed")
    if stored.kind == "c":
        raise Mistake("holds complex numbers: write their magnitude, or real and imaginary part as two channels")
    affine = np.array(image.affine, dtype=np.float64)
    if isinstance(header, nib.Nifti1Header):
        if header["qform_code"] > 0 and header["sform_code"] > 0 and image.ndim > 2:
            notes += _form_notes(image)
        try:
            unit = header.get_xyzt_units()[0]
        except KeyError as error:
            raise Mistake(f"has a unit of voxel sizes that NIfTI does not know, {header['xyzt_units']}") from error
        affine[:3] *= _millimetres(unit)
    elif not isinstance(image, nib.MGHImage):
        raise Mistake("is ANALYZE 7.5, which does not say what is left and right: convert it to NIfTI")
    with np.errstate(over="ignore"):  # what becomes infinite is refused for that
        voxels = image.get_fdata(dtype=np.float32, caching="unchanged")
    # NIfTI's fourth axis is time and its fifth the channel; all that there are become channels.
    kept = [side for place, side in enumerate(voxels.shape) if place < 3 or side > 1]
    if not 3 <= len(kept) <= 4:
        raise Mistake(f"has {len(kept)} dimensions {tuple(voxels.shape)} where 3 are needed")
    voxels = voxels.reshape(*kept, *[1] * (4 - len(kept)))
    return np.moveaxis(voxels, -1, 0), affine, notes


def _form_notes(image: nib.Nifti1Image) -> list[str]:
    try:
        qform = image.get_qform()
    except (ValueError, HeaderDataError):
        return ["its qform is damaged; the sform is used"]
    apart = corner_distance(image.shape[:3], image.get_sform(), qform)
    if apart <= SAME_PLACE * min(image.header.get_zooms()[:3]):
        return []
    return [f"its sform and its qform lie {apart:.3g} mm apart; the sform is used"]


def _read_by_itk(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    header = _text_header(path)
    for file in data_files(path, header):
        if not file.is_file():
            raise Mistake(f"its voxels should be in {file.name}, which is not there")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO(next(name for suffix, name in ITK_READERS.items() if path.name.lower().endswith(suffix)))
    _refuse_cut_off(path, header)
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise Mistake(f"cannot be read by ITK, is it damaged? ({reason(error)})") from error
    if "color" in header.get("kinds", "").lower():
        raise Mistake("is a picture in colours (red, green, blue), where one number a voxel is needed")
    with np.errstate(over="ignore"):
        voxels = sitk.GetArrayFromImage(image).astype(np.float32)
    sides, channels = image.GetDimension(), image.GetNumberOfComponentsPerPixel()
    if sides not in (3, 4) or (sides == 4 and channels > 1):
        raise Mistake(f"has {sides} dimensions {image.GetSize()} of {channels} channels where a volume is needed")
    affine = np.eye(4)
    directions = np.array(image.GetDirection()).reshape(sides, sides)[:3, :3]
    affine[:3, :3] = directions * np.array(image.GetSpacing())[:3]
    affine[:3, 3] = np.array(image.GetOrigin())[:3]
    units = re.findall(r'"([^"]*)"', header.get("space units", ""))
    affine[:3] *= _millimetres(*units, header.get("distanceunits"))
    # ITK hands its axes over from the slowest, channels last.
    axes = range(voxels.ndim)[::-1] if voxels.ndim == sides else [sides, *range(sides)[::-1]]
    voxels = voxels.transpose(axes)
    if sides == 4:
        voxels = np.moveaxis(voxels, -1, 0)
    return voxels.reshape(-1, *voxels.shape[-3:]), LPS_TO_RAS @ affine, []


def _text_header(path: Path) -> dict[str, str]:
    """Read the fields of a header of NRRD or MetaImage, their names in lower case."""
    with path.open("rb") as file:
        lines = iter(file.readline, b"")
        fields: dict[str, str] = {}
        for line in lines:
            name, _, value = re.split("(:=|=|:)", line.decode("latin-1").strip() + "=", maxsplit=1)
            fields[name.strip().lower()] = value.rstrip("=").strip()
            if not line.strip() or name.strip() == "ElementDataFile":
                break
        fields["_start"] = str(file.tell())
    return fields


def data_files(path: Path, header: dict[str, str] | None = None) -> list[Path]:
    """Tell which files beside a header of NRRD or MetaImage hold its voxels, where it names one."""
    if header is None:
        header = _text_header(path) if path.is_file() else {}
    name = header.get("elementdatafile") or header.get("data file") or header.get("datafile") or "LOCAL"
    return [] if name.split()[0].upper() in ("LOCAL", "LIST") or "%" in name else [path.parent / name]


def _refuse_cut_off(path: Path, header: dict[str, str]) -> None:
    """Refuse a MetaImage that has fewer bytes than it says: ITK's message would not tell."""
    if "elementdatafile" not in header or header.get("compresseddata", "").lower() == "true":
        return
    if header.get("binarydata", "").lower() == "false":  # its numbers are text
        return
    sizes = {"CHAR": 1, "SHORT": 2, "INT": 4, "LONG": 4, "LONG_LONG": 8, "FLOAT": 4, "DOUBLE": 8}
    kind = header.get("elementtype", "").removeprefix("MET_").removeprefix("U")
    name = header["elementdatafile"]  # or a list or a pattern: a file a slice
    if kind not in sizes or name.upper().startswith("LIST") or "%" in name:
        return
    file = (data_files(path, header) or [path])[0]
    needed = sizes[kind] * int(header.get("elementnumberofchannels", 1))
    for side in header.get("dimsize", "0").split():
        needed *= int(side)
    there = file.stat().st_size - (int(header["_start"]) if file == path else 0)
    if there < needed:
        raise Mistake(f"is cut off: {there} bytes of voxels where {needed} are needed")


def _millimetres(*units: str | None) -> float:
    """Tell how many mm a file's unit is; without one, it is mm."""
    names = {unit.lower() for unit in units if unit} - {"unknown"}
    if len(names) > 1 or not names <= MILLIMETRES.keys():
        raise Mistake(
            f"gives its voxel sizes in {' and '.join(sorted(names))}, where {', '.join(MILLIMETRES)} are known"
        )
    return MILLIMETRES[names.pop()] if names else 1.0


def _on_grid_of(first: MetaTensor, other: MetaTensor) -> torch.Tensor:
    grid = first.affine.numpy()
    if other.shape[1:] == first.shape[1:] and _in_same_place(first.shape[1:], other.affine.numpy(), grid):
        return other.as_tensor()
    lowest = other.min()  # outside of it there is nothing, not zero
    resample = SpatialResample(mode="bilinear", padding_mode="zeros", dtype=torch.float64)
    return (resample(other - lowest, first.affine, first.shape[1:]) + lowest).as_tensor().float()


def _in_same_place(shape: Sequence[int], affine: np.ndarray, grid: np.ndarray) -> bool:
    return corner_distance(shape, affine, grid) <= SAME_PLACE * np.linalg.norm(grid[:3, :3], axis=0).min()


def _in_place_of(image: MetaTensor, label: MetaTensor) -> MetaTensor:
    """Give a label map the axes and the affine of its image, if it lies on the very same voxels."""
    grid, place, shape = image.affine.numpy(), label.affine.numpy(), tuple(image.shape[1:])
    stored = [(label[0].numpy(), place)]
    steps = np.linalg.inv(grid)[:3, :3] @ place[:3, :3]  # of the label's axes, in voxels of the image
    axes = np.abs(steps).argmax(axis=0)
    if sorted(axes) == [0, 1, 2]:
        turn = np.stack([axes, np.sign(steps[axes, range(3)])], axis=1)
        turned = orientations.apply_orientation(label[0].numpy(), turn)
        stored.append((turned, place @ orientations.inv_ornt_aff(turn, label.shape[1:])))
    for voxels, affine in stored:
        if voxels.shape == shape and _in_same_place(shape, affine, grid):
            voxels = torch.from_numpy(np.ascontiguousarray(voxels))[None]
            return MetaTensor(voxels, affine=image.affine, meta=_without_affine(label.meta))
    if tuple(label.shape[1:]) != shape:
        raise Mistake(f"has shape {tuple(label.shape[1:])} where its image has {shape}: resample it to its image")
    apart = corner_distance(shape, place, grid)
    raise Mistake(f"lies elsewhere than its image: their corners are up to {apart:.1f} mm apart")


def _without_affine(meta: dict[str, Any]) -> dict[str, Any]:
    return {name: meta[name] for name in ("filename_or_obj", "notes")}


def _notes(volume: MetaTensor) -> list[str]:
    return volume.meta["notes"]
