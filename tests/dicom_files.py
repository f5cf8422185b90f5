"""Writes small DICOM CT series for the tests: a known volume, stored the way a test asks for."""

from pathlib import Path

import numpy as np
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

SHAPE = (20, 24, 9)  # voxels to the left, posterior, superior
SPACING = (0.5, 0.75, 5.0)  # mm
CORNER = np.array([-5.0, -9.0, -20.0])  # left, posterior, superior, of voxel (0, 0, 0)


def volume(shape=SHAPE, seed=0) -> np.ndarray:
    "Random HU (X, Y, Z), int16, with air and bone in it."
    return np.random.default_rng(seed).integers(-1000, 1500, shape).astype(np.int16)


def places(count=SHAPE[2], step=SPACING[2]) -> np.ndarray:
    "Corners (Z, 3) in mm of even slices: left, posterior, superior."
    return CORNER + np.arange(count)[:, None] * np.array([0, 0, step])


TAGS = {
    "SOPClassUID": CTImageStorage, "Modality": "CT", "PatientID": "one", "StudyInstanceUID": "1.2.826.0.2",
    "StudyDate": "20240131", "FrameOfReferenceUID": "1.2.826.0.4", "SeriesDescription": "Head",
    "ConvolutionKernel": "STANDARD", "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"], "BodyPartExamined": "HEAD",
    "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "BitsStored": 16,
    "HighBit": 15, "PixelRepresentation": 0, "RescaleSlope": 1, "RescaleIntercept": -1024,
}  # fmt: skip


def dataset(plane, corner, row=(1, 0, 0), column=(0, 1, 0), spacing=SPACING, number=1, series=2) -> Dataset:
    "One CT slice (rows, columns) of HU; `corner`, `row`, `column` in DICOM's frame; spacing along (row, column)."
    ds = Dataset()
    own = {
        "SOPInstanceUID": f"1.2.826.0.1.{series}.{number}",
        "SeriesInstanceUID": f"1.2.826.0.3.77777{series}",
        "SeriesNumber": series,
        "InstanceNumber": number,
        "SliceThickness": spacing[2],
        "ImagePositionPatient": [f"{x:.6g}" for x in corner],
        "ImageOrientationPatient": [f"{x:.7g}" for x in (*row, *column)],
        "PixelSpacing": [spacing[1], spacing[0]],
        "Rows": plane.shape[0],
        "Columns": plane.shape[1],
    }
    for keyword, value in (TAGS | own).items():
        setattr(ds, keyword, value)
    ds.add_new("PixelData", "OW", np.ascontiguousarray(plane + 1024).astype("<u2").tobytes())
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return ds


def save(ds: Dataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path


def write_series(folder, hu=None, corners=None, change=None, series=2, **geometry) -> list[Path]:
    "A series of HU (X, Y, Z), rows to the left, columns to the back; `change(ds, k)` edits slice k before it is saved."
    hu = volume() if hu is None else hu
    corners = places(hu.shape[2]) if corners is None else np.asarray(corners)
    paths = []
    for k in range(len(corners)):
        ds = dataset(hu[:, :, k].T, corners[k], number=k + 1, series=series, **geometry)
        if change:
            change(ds, k)
        paths.append(save(ds, Path(folder) / f"{series}-{k + 1:02d}.dcm"))
    return paths
