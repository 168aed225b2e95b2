"""Datasets as they lie on the disk, of files that are empty or tiny."""

import json

import pydicom
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from scripts.data import find_cases


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
