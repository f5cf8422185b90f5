"""DICOM series: any way of storing one scan gives the same scan; what would give wrong millilitres is refused."""

import itertools
import logging
import os
import shutil
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import CORNER, SHAPE, SPACING, dataset, places, save, volume, write_series
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

import sahlora.ct.dicom
from sahlora.ct import read_ct
from sahlora.ct.core import find_gaps
from sahlora.ct.dicom import FINDINGS, list_series, read_dicom, write_seg

AFFINE = np.array([[-0.5, 0, 0, 5], [0, -0.75, 0, 9], [0, 0, 5, -20], [0, 0, 0, 1.0]])


def refused(path, *words, **options):
    with pytest.raises(ValueError) as error:
        read_dicom(path, **options)
    text = str(error.value)
    assert str(path) in text and all(word in text for word in words), text
    return text


def setting(**tags):
    "A change that sets tags in every slice, or in those of `at`; None deletes."
    at = tags.pop("at", range(99))

    def change(ds, k):
        for keyword, value in tags.items() if k in at else ():
            if value is None:
                del ds[keyword]
            else:
                setattr(ds, keyword, value)

    return change


# ---- one scan, stored in many ways


@pytest.mark.parametrize("swapped, left, back, reverse", list(itertools.product([0, 1], repeat=4)))
def test_storage_order_does_not_matter(tmp_path, swapped, left, back, reverse):
    hu, axes = volume(), [np.array([1.0, 0, 0]), np.array([0, 1.0, 0])]
    for k in range(SHAPE[2]):
        stored, corner, spacing = hu[:, :, k], places()[k], list(SPACING)
        rows = list(axes)
        for axis in (0, 1):
            if (left, back)[axis]:
                stored = np.flip(stored, axis)
                corner = corner + axes[axis] * SPACING[axis] * (SHAPE[axis] - 1)
                rows[axis] = -axes[axis]
        if swapped:
            stored, rows, spacing = stored.T, rows[::-1], [spacing[1], spacing[0], spacing[2]]
        name = f"{SHAPE[2] - k if reverse else k:02d}.dcm"
        save(dataset(stored.T, corner, rows[0], rows[1], spacing, number=50 - k if reverse else k + 1), tmp_path / name)
    ct = read_dicom(tmp_path)
    assert np.array_equal(ct.hu, hu) and np.allclose(ct.affine, AFFINE) and ct.origins is None and ct.notes == ()
    assert ct.hu.dtype == np.float32 and np.array_equal(ct.thicknesses, np.full(9, 5.0))
    mask = volume(seed=1) > 0
    for plane, file in zip(ct.stored.planes(np.where(mask, ct.hu, -1)), ct.stored.files):
        raw = pydicom.dcmread(file.path).pixel_array.astype(float) - 1024
        assert np.array_equal(plane[plane != -1], raw[plane != -1]) and (plane != -1).sum() > 100


@pytest.mark.parametrize("angle", [-18.5, 18.5, 0.3])
def test_tilt_is_kept_and_said(tmp_path, angle):
    slope = np.radians(angle)
    write_series(tmp_path, column=(0, np.cos(slope), -np.sin(slope)))
    ct = read_dicom(tmp_path)
    assert np.isclose(ct.tilt, abs(angle), atol=0.01) and np.array_equal(ct.hu, volume())
    assert np.allclose(ct.affine[:3, 1], 0.75 * np.array([0, -np.cos(slope), -np.sin(slope)]), atol=1e-6)
    assert np.allclose(ct.affine[:3, 2], [0, 0, 5]) and np.allclose(ct.affine[:3, 3], [5, 9, -20])
    assert np.isclose(ct.voxel_ml, 0.5 * 0.75 * 5 * np.cos(slope) / 1000)
    assert ct.notes == (
        (f"gantry tilt {abs(angle):.1f} degrees: slices are kept as they were scanned",) if abs(angle) > 0.5 else ()
    )


def test_tilt_of_the_header_that_the_places_do_not_have(tmp_path):
    write_series(tmp_path, change=setting(GantryDetectorTilt="18.5"))
    (note,) = read_dicom(tmp_path).notes
    assert note.startswith("warning: GantryDetectorTilt says 18.5 degrees, the slices' places say 0.0")


def test_rescale_is_each_slices_own_and_padding_is_clipped(tmp_path):
    def change(ds, k):
        ds.RescaleSlope, ds.RescaleIntercept, ds.PixelRepresentation = str(0.5 * (k + 1)), str(-100 * k), 1
        values = volume()[:, :, k].T.copy()
        values[0, 0] = -3000
        ds.PixelPaddingValue = 0
        ds["PixelPaddingValue"].VR, ds["PixelPaddingValue"].value = "SS", -3000
        ds.PixelData = values.astype("<i2").tobytes()

    write_series(tmp_path, change=change)
    expected = volume().astype(float)
    expected[0, 0] = -3000
    expected = np.maximum(expected * 0.5 * np.arange(1, 10) - 100 * np.arange(9), -1024)
    ct = read_dicom(tmp_path)
    assert np.allclose(ct.hu, expected) and ct.hu.min() == -1024


def test_twelve_bits_with_an_overlay_above_them(tmp_path):
    def change(ds, k):
        ds.BitsStored, ds.HighBit = 12, 11
        ds.PixelData = ((volume()[:, :, k].T + 1024).astype("<u2") | 0x1000).tobytes()

    write_series(tmp_path, change=change)
    assert np.array_equal(read_dicom(tmp_path).hu, volume())


@pytest.mark.parametrize(
    "syntax",
    [RLELossless, JPEGLSLossless, DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian],
    ids=lambda uid: uid.keyword,
)
def test_transfer_syntaxes(tmp_path, syntax):
    for k, path in enumerate(write_series(tmp_path)):
        ds = pydicom.dcmread(path)
        if syntax.is_encapsulated:
            ds.compress(syntax, generate_instance_uid=False)
        elif syntax == ExplicitVRBigEndian:
            ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
        ds.file_meta.TransferSyntaxUID = syntax
        pydicom.dcmwrite(
            path,
            ds,
            little_endian=syntax != ExplicitVRBigEndian,
            implicit_vr=syntax == ImplicitVRLittleEndian,
            force_encoding=True,
        )
    assert np.array_equal(read_dicom(tmp_path).hu, volume())


@pytest.mark.parametrize("implicit", [True, False])
def test_files_without_preamble_and_without_suffix(tmp_path, implicit):
    for path in write_series(tmp_path / "with"):
        ds = pydicom.dcmread(path)
        del ds.file_meta
        pydicom.dcmwrite(tmp_path / f"IM{path.stem}", ds, implicit_vr=implicit, little_endian=True, force_encoding=True)
    shutil.rmtree(tmp_path / "with")
    assert np.array_equal(read_dicom(tmp_path).hu, volume())


def test_over_long_numbers_are_read_in_silence_and_settings_stay(tmp_path, caplog, capfd):
    def change(ds, k):
        text = "\\".join(f"{x:.17f}" for x in places()[k])
        with warnings.catch_warnings(), pydicom.config.disable_value_validation():
            warnings.simplefilter("ignore")
            ds["ImagePositionPatient"] = pydicom.dataelem.RawDataElement(
                pydicom.tag.Tag("ImagePositionPatient"), "DS", len(text), text.encode(), 0, False, True
            )

    write_series(tmp_path, change=change)
    with warnings.catch_warnings(), pydicom.config.strict_reading():  # a caller who wants every fault raised
        warnings.simplefilter("error")
        ct = read_dicom(tmp_path)
        assert pydicom.config.settings.reading_validation_mode == pydicom.config.RAISE
    assert not logging.getLogger("pydicom").disabled
    assert np.allclose(ct.affine, AFFINE) and caplog.text == "" and capfd.readouterr() == ("", "")


def test_what_is_not_dicom_is_ignored(tmp_path):
    paths = write_series(tmp_path / "a/b")
    for name, content in (
        ("a/readme.txt", b"text"),
        (".DS_Store", b"\0" * 200),
        ("a/b/._2-01.dcm", b"\0\5\x16\7" * 40),
        ("__MACOSX/x.dcm", b"junk"),
        ("picture.jpg", b"\xff\xd8" * 99),
        ("short", b"\x08\x00"),
        ("empty", b""),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    index = pydicom.dcmread(paths[0], stop_before_pixels=True)
    index.SOPClassUID = "1.2.840.10008.1.3.10"
    index.DirectoryRecordSequence = []
    save(index, tmp_path / "DICOMDIR")
    os.mkfifo(tmp_path / "a/pipe.dcm")
    ct = read_dicom(tmp_path)
    assert np.array_equal(ct.hu, volume()) and ct.notes == ()


HIDDEN = (".DS_Store", "Thumbs.db", "desktop.ini", "._a.nii.gz", ".a.nii", "._2-01.dcm", "__MACOSX/2-01.dcm", "@eaDir/2-01.dcm")


def test_hidden_files_are_neither_read_nor_counted(tmp_path):
    for name in HIDDEN:
        (tmp_path / "scan" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "scan" / name).write_bytes(b"\0" * 128 + b"DICMjunk")
    refused(tmp_path / "scan", "among its 0 files")
    refused(zipped(tmp_path / "scan", tmp_path / "hidden.zip"), "among its 0 files")
    write_series(tmp_path / "scan")
    for path in (tmp_path / "scan", zipped(tmp_path / "scan", tmp_path / "scan.zip")):
        ct = read_ct(path)
        assert np.array_equal(ct.hu, volume().clip(-1024)) and not any("left out" in note for note in ct.notes)


def test_a_hidden_path_that_is_named_is_read(tmp_path):
    write_series(tmp_path / ".data/.scan")
    assert np.array_equal(read_dicom(tmp_path / ".data/.scan").hu, volume())
    with zipfile.ZipFile(tmp_path / ".scan.zip", "w") as archive:
        for path in sorted((tmp_path / ".data/.scan").iterdir()):
            archive.writestr(zipfile.ZipInfo(f"./{path.name}"), path.read_bytes())  # as tools that zip "." do
    assert np.array_equal(read_dicom(tmp_path / ".scan.zip").hu, volume())


def test_links_are_followed_once_and_loops_are_errors(tmp_path):
    write_series(tmp_path / "real")
    (tmp_path / "scan").mkdir()
    (tmp_path / "scan/to").symlink_to(tmp_path / "real")
    (tmp_path / "real/up").symlink_to(tmp_path / "real")
    assert read_dicom(tmp_path / "scan").notes == ()
    (tmp_path / "scan/loop.dcm").symlink_to(tmp_path / "scan/loop.dcm")
    for path in (tmp_path / "scan", tmp_path / "scan/loop.dcm"):
        with pytest.raises(OSError, match="loop"):
            read_dicom(path)
    with pytest.raises(FileNotFoundError):
        read_dicom(tmp_path / "none")


# ---- zips


def zipped(folder, target):
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(Path(folder).rglob("*")):
            archive.write(path, path.relative_to(folder))
    return target


def test_a_zip_is_read_without_unpacking(tmp_path):
    write_series(tmp_path / "in/deep")
    (tmp_path / "in/__MACOSX").mkdir()
    (tmp_path / "in/__MACOSX/._2-01.dcm").write_bytes(b"junk")
    zipped(tmp_path / "in", tmp_path / "scan.zip")
    shutil.rmtree(tmp_path / "in")
    ct = read_dicom(tmp_path / "scan.zip")
    assert (
        np.array_equal(ct.hu, volume())
        and ct.stored.files[0].member == "deep/2-01.dcm"
        and ct.source.endswith("scan.zip")
    )
    assert [path.name for path in tmp_path.iterdir()] == ["scan.zip"]


def test_bad_zips(tmp_path, monkeypatch):
    write_series(tmp_path / "in")
    scan = zipped(tmp_path / "in", tmp_path / "scan.zip")
    whole = scan.read_bytes()
    for content in (whole[:-100], whole[: len(whole) // 2], b"PK\x03\x04" + b"\0" * 50, b""):
        scan.write_bytes(content)
        refused(scan, "corrupted", "copy it again")
    flipped = bytearray(whole)
    flipped[2000] ^= 1
    scan.write_bytes(flipped)
    refused(scan, "2-0", "corrupted", "copy it again")
    encrypted = bytearray(whole)
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        encrypted[whole.index(mark) + offset] |= 1
    scan.write_bytes(encrypted)
    refused(scan, "encrypted", "password")
    scan.write_bytes(whole)
    monkeypatch.setattr(sahlora.ct.dicom, "ZIP_LIMIT", 1000)
    refused(scan, "unpacked", "name the folder")
    with zipfile.ZipFile(scan, "w"):
        pass
    refused(scan, "no DICOM images among its 0 files")


# ---- damaged files


def test_damaged_files_are_named(tmp_path):
    paths = write_series(tmp_path)
    whole = paths[4].read_bytes()
    for end in (0, 100, 140, 400, 700, len(whole) - SHAPE[0] * SHAPE[1] * 2 - 12):
        paths[4].write_bytes(whole[:end])
        refused(tmp_path, "2-05.dcm", "corrupted", "copy it again")
    for end in (len(whole) - SHAPE[0] * SHAPE[1] * 2, len(whole) - 400, len(whole) - 2):
        paths[4].write_bytes(whole[:end])
        refused(tmp_path, "2-05.dcm", "corrupted", "copy it again")
    paths[4].write_bytes(whole)
    (tmp_path / "notes.ima").write_bytes(b"no DICOM at all" * 50)
    refused(tmp_path, "notes.ima", "copy it again")


def test_pixel_data_of_another_length(tmp_path):
    paths = write_series(tmp_path)
    ds = pydicom.dcmread(paths[3])
    ds.PixelData += bytes(200)
    save(ds, paths[3])
    refused(tmp_path, "2-04.dcm", "1160 bytes", "24 x 20 need 960")


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless], ids=lambda uid: uid.keyword)
def test_truncated_compressed_pixels(tmp_path, syntax):
    paths = write_series(tmp_path)
    ds = pydicom.dcmread(paths[3])
    ds.compress(syntax, generate_instance_uid=False)
    ds.PixelData = pydicom.encaps.encapsulate([pydicom.encaps.get_frame(ds.PixelData, 0, number_of_frames=1)[:200]])
    save(ds, paths[3])
    refused(tmp_path, "2-04.dcm", "corrupted", "copy it again")


@pytest.mark.parametrize("syntax, name", [(JPEGLosslessSV1, "JPEG Lossless"), ("1.2.840.10008.1.2.4.999", "1.2.4.999")])
def test_compression_that_can_not_be_read_is_named(tmp_path, syntax, name):
    def change(ds, k):
        ds.file_meta.TransferSyntaxUID = syntax
        ds.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8" * 50])
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True

    for k, path in enumerate(write_series(tmp_path)):
        ds = pydicom.dcmread(path)
        change(ds, k)
        pydicom.dcmwrite(path, ds, implicit_vr=False, little_endian=True, force_encoding=True)
    refused(tmp_path, "2-01.dcm", name, "can not be read here", "pip install", "uncompressed")


@pytest.mark.long
def test_random_damage_is_read_or_refused(tmp_path):
    rng = np.random.default_rng(0)
    paths = write_series(tmp_path / "scan")
    for path, syntax in ((paths[2], RLELossless), (paths[3], JPEGLSLossless)):
        ds = pydicom.dcmread(path)
        ds.compress(syntax, generate_instance_uid=False)
        save(ds, path)
    zipped(tmp_path / "scan", tmp_path / "scan.zip")
    outcomes = []
    for trial in range(140):
        path = paths[trial % 4] if trial < 110 else tmp_path / "scan.zip"
        whole = bytearray(path.read_bytes())
        kind, damaged = trial % 3, whole.copy()
        if kind == 0:  # a few bits, mostly in the header
            for _ in range(rng.integers(1, 6)):
                damaged[rng.integers(0, min(len(whole), 1400))] ^= 1 << rng.integers(8)
        elif kind == 1:
            damaged = damaged[: rng.integers(0, len(whole))]
        else:  # a run of random bytes
            start = rng.integers(0, len(whole) - 20)
            damaged[start : start + 16] = rng.bytes(16)
        path.write_bytes(damaged)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                ct = read_dicom(path.parent if path.suffix == ".dcm" else path, allow_gaps=bool(trial % 2))
            outcomes.append(ct.hu.shape[2])
        except ValueError as error:
            assert str(tmp_path) in str(error)
            outcomes.append(0)
        path.write_bytes(whole)
    assert 10 < np.count_nonzero(outcomes) < 130  # both happen


# ---- which series


@pytest.fixture
def export(tmp_path):
    "What a picture archive gives for one head: scout, soft, bone, contrast, coronal, thin, dose report, key picture."
    sagittal = {"row": (0, 1, 0), "column": (0, 0, -1)}
    hu = volume()
    write_series(
        tmp_path, hu[:, :, :1], series=1, change=setting(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), **sagittal
    )
    write_series(
        tmp_path, volume(seed=2), series=2, change=setting(ConvolutionKernel="H70h", SeriesDescription="Head 5.0")
    )
    write_series(tmp_path, volume(seed=3), series=3, change=setting(ContrastBolusAgent="OMNIPAQUE 300"))
    thin = CORNER + np.arange(9)[:, None] * [0, 0, 1.5]
    write_series(tmp_path, volume(seed=4), thin, series=4, change=setting(SliceThickness="1.5"))
    write_series(tmp_path, volume(seed=5), series=5)
    write_series(
        tmp_path, volume(seed=6), series=6, column=(0, 0, -1), corners=CORNER + np.arange(9)[:, None] * [0, 5.0, 0]
    )
    write_series(
        tmp_path, hu[:, :, :1], series=7, change=setting(SOPClassUID="1.2.840.10008.5.1.4.1.1.7", Modality="OT")
    )
    write_series(
        tmp_path, hu[:, :, :1], series=8, change=setting(SOPClassUID="1.2.840.10008.5.1.4.1.1.88.67", Modality="SR")
    )
    write_series(tmp_path, hu[:, :, :1], series=9, change=setting(SliceThickness="5"))  # a monitoring slice
    write_series(tmp_path, volume(seed=7), series=10, change=setting(BodyPartExamined="NECK"))
    write_series(
        tmp_path, volume(seed=8), series=11, change=setting(ImageType=["DERIVED", "SECONDARY", "AXIAL", "MIP"])
    )
    write_series(tmp_path, volume(seed=9), series=12, change=setting(SeriesDescription="CTA head"))
    return tmp_path


def test_the_axial_soft_tissue_series_is_chosen_and_the_others_are_listed(export):
    ct = read_dicom(export)
    assert np.array_equal(ct.hu, volume(seed=5)) and len(ct.notes) == 11
    for number, words in (
        (1, "localizer"),
        (2, "bone or sharp kernel (H70h) (--series 2)"),
        (3, "contrast (OMNIPAQUE 300)"),
        (4, "1.5 mm slices, further from 5 mm"),
        (6, "coronal, 90 degrees off axial"),
        (7, "secondary capture"),
        (8, "X-Ray Radiation Dose SR"),
        (9, "only 1 slices"),
        (10, "body part NECK, not head"),
        (11, "a projection (MIP)"),
        (12, "contrast (CTA head)"),
    ):
        (note,) = [note for note in ct.notes if note.startswith(f"not used: series {number} ")]
        assert words in note
    assert [series.number for series in list_series(export) if series.problem] == [1, 6, 7, 8]


@pytest.mark.long
@pytest.mark.parametrize("wanted, seed", [("2", 2), (3, 3), ("1.2.826.0.3.777774", 4), ("777775", 5), ("10", 7)])
def test_a_series_can_be_named(export, wanted, seed):
    ct = read_dicom(export, series=wanted)
    assert np.array_equal(ct.hu, volume(seed=seed))
    doubts = [note for note in ct.notes if note.startswith("warning: ")]
    expected = {2: "bone or sharp kernel", 3: "contrast", 7: "body part NECK"}
    assert len(doubts) == (seed in expected) and all(expected[seed] in doubt for doubt in doubts)


def test_a_series_that_is_not_there_or_can_not_be_used(export):
    refused(export, "--series 99 is not in it", "series 5 'Head': 9 slices of 5 mm [--series 5]", series=99)
    refused(export, "--series 26.0.3 is not in it", series="26.0.3")
    refused(export, "series 6 'Head': coronal", "needed is the axial", series="6")
    refused(export, "a single slice", series=9)


def test_more_slices_then_the_lower_number(tmp_path):
    write_series(tmp_path, volume()[:, :, :7], series=3)
    write_series(tmp_path, series=5)
    write_series(tmp_path, series=4)
    ct = read_dicom(tmp_path)
    assert [note.split(": ")[2] for note in ct.notes] == [
        "fewer slices (7) (--series 3)",
        "a higher series number (--series 5)",
    ]
    write_series(tmp_path, series=6, change=setting(SeriesNumber=4))
    refused(tmp_path, "--series 4 fits several series", "[--series 3.777774]", series=4)
    assert len(read_dicom(tmp_path, series="777776").notes) == 3


def test_series_without_number_or_uid(tmp_path):
    write_series(
        tmp_path, change=setting(SeriesNumber=None, SeriesInstanceUID=None, SeriesDescription=None, PatientID=None)
    )
    ct = read_dicom(tmp_path)
    assert np.array_equal(ct.hu, volume())
    with pytest.raises(ValueError, match="SeriesInstanceUID is missing"):
        write_seg(ct, ct.hu > 0, tmp_path / "seg.dcm")


@pytest.mark.parametrize("tag, word", [("PatientID", "2 patients"), ("StudyInstanceUID", "2 studies")])
def test_several_patients_or_studies(tmp_path, tag, word):
    write_series(tmp_path)
    write_series(tmp_path, volume(seed=1), series=3, change=setting(**{tag: "1.2.3.9"}))
    refused(tmp_path, word, "1.2.3.9", "[--series 2]", "[--series 3]")
    assert np.array_equal(read_dicom(tmp_path, series=3).hu, volume(seed=1))
    if tag == "StudyInstanceUID":  # another study without a head CT in it does not matter
        shutil.rmtree(tmp_path)
        write_series(tmp_path)
        write_series(
            tmp_path,
            series=3,
            change=setting(StudyInstanceUID="1.2.3.9", Modality="MR", SOPClassUID="1.2.840.10008.5.1.4.1.1.4"),
        )
        assert "MR Image Storage" in read_dicom(tmp_path).notes[0]


@pytest.mark.parametrize(
    "tags, words",
    [
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", "Modality": "CT"}, "secondary capture"),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, "a colour image (RGB"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "a colour image (PALETTE COLOR"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2.1"}, "multi-frame (Enhanced CT"),
        ({"NumberOfFrames": 20}, "multi-frame (Enhanced CT"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.66.4", "Modality": "SEG"}, "Segmentation Storage"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.4", "Modality": "MR"}, "MR Image Storage"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
    ],
)
def test_no_head_ct_in_it(tmp_path, tags, words):
    paths = write_series(tmp_path, change=setting(**tags))
    refused(tmp_path, "no axial head CT in it", words, "one file per slice", "dcm2niix")
    refused(paths[0], "no axial head CT in it", words)


def test_single_files(tmp_path):
    paths = write_series(tmp_path / "scan")
    refused(paths[0], "one slice of a series", "name the folder")
    (tmp_path / "text").write_text("hello")
    refused(tmp_path / "text", "not a DICOM image")
    (tmp_path / "none").mkdir()
    refused(tmp_path / "none", "no DICOM images among its 0 files")


@pytest.mark.parametrize(
    "description, kernel, agent, bone, contrast",
    [
        ("Head w/o contrast", "STANDARD", "", 0, 0),
        ("HEAD WITHOUT CONTRAST", "SOFT", "", 0, 0),
        ("Schädel nativ", "H31s", "", 0, 0),
        ("Head +C", "STANDARD", "", 0, 1),
        ("CT ANGIO", "FC21", "", 0, 1),
        ("Head", "UB", "ISOVUE 370", 0, 1),
        ("Head", "UB", "NONE", 0, 0),
        ("POST FOSSA", "STANDARD", "", 0, 0),
        ("Knochen", "", "", 1, 0),
        ("Head 1.0 H60s", "", "", 1, 0),
        ("Head", "Hr40f", "", 0, 0),
        ("Head", "Hr60f", "", 1, 0),
        ("Head", "BONEPLUS", "", 1, 0),
        ("Head", "YE", "", 1, 0),
        ("Head", "FC30", "", 1, 0),
        ("Head", "FC68", "", 0, 0),
        ("Head", "J70h", "", 1, 0),
        ("head with contrast", "STD+", "", 0, 1),
    ],
)
def test_kernels_and_contrast(tmp_path, description, kernel, agent, bone, contrast):
    tags = {"SeriesDescription": description, "ConvolutionKernel": kernel, "ContrastBolusAgent": agent}
    write_series(tmp_path, volume()[:, :, :3], change=setting(SpecificCharacterSet="ISO_IR 192", **tags))
    notes = " ".join(read_dicom(tmp_path).notes)
    assert ("kernel" in notes, "contrast (" in notes) == (bool(bone), bool(contrast))


# ---- what a series must hold


@pytest.mark.parametrize(
    "tag",
    [
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
        "Rows",
        "Columns",
        "RescaleSlope",
        "RescaleIntercept",
    ],
)
def test_missing_tags(tmp_path, tag):
    write_series(tmp_path, change=setting(**{tag: None}, at=[2, 5]))
    refused(tmp_path, "series 2 'Head'", f"{tag} in slice 3 (2-03.dcm), slice 6 (2-06.dcm)")


def test_missing_pixels(tmp_path):
    write_series(tmp_path, change=setting(PixelData=None, at=[3]))
    refused(tmp_path, "2-04.dcm", "PixelData is missing")


@pytest.mark.parametrize(
    "tags, words",
    [
        ({"PixelSpacing": [0, 0.5]}, "PixelSpacing is 0, 0.5 in slice 1"),
        ({"RescaleSlope": "0"}, "RescaleSlope is 0"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, "MONOCHROME1"),
        (
            {"ImageOrientationPatient": [1, 0, 0, 0.1, 1, 0]},
            "not two unit vectors at right angles (1, 0, 0, 0.1, 1, 0)",
        ),
        ({"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]}, "not two unit vectors"),
        ({"Columns": 0, "PixelData": b""}, "Columns is 0"),
    ],
)
def test_values_that_can_not_be(tmp_path, tags, words):
    write_series(tmp_path, change=setting(**tags))
    refused(tmp_path, words)


@pytest.mark.parametrize(
    "tags, words",
    [
        (
            {"ImageOrientationPatient": [1, 0, 0, 0, 0.9997, 0.0245]},
            "ImageOrientationPatient is 1, 0, 0, 0, 1, 0 in 8 (slice 1",
        ),
        ({"Rows": 12, "PixelData": bytes(480)}, "Rows is 24 in 8"),
        ({"PixelSpacing": [0.75, 0.52]}, "PixelSpacing is 0.75, 0.5 in 8"),
        ({"PatientID": "two"}, "several patients (PatientID one, two)"),
    ],
)
def test_mixed_series(tmp_path, tags, words):
    write_series(tmp_path, change=setting(**tags, at=[8]))
    options = {"series": 2} if "PatientID" in tags else {}
    refused(tmp_path, "mixed series", words, **options)


def test_rounded_cosines_are_not_mixed(tmp_path):
    write_series(tmp_path, change=setting(ImageOrientationPatient=[1, 0, 0, 0, 1, 0.0008], at=[8]))
    assert read_dicom(tmp_path).hu.shape == SHAPE


def test_what_is_no_slice_of_the_series_is_left_out(tmp_path):
    write_series(tmp_path)
    scout = dataset(volume()[:, :, 0].T, CORNER, (0, 1, 0), (0, 0, -1), number=90)
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    save(scout, tmp_path / "scout.dcm")
    ct = read_dicom(tmp_path)
    assert np.array_equal(ct.hu, volume()) and ct.notes == ("left out of the series: localizer: scout.dcm",)


def test_copies_are_left_out_and_counted(tmp_path):
    paths = write_series(tmp_path)
    for path in paths[3:5]:
        shutil.copy(path, tmp_path / f"{path.stem} copy.dcm")
    ct = read_dicom(tmp_path)
    assert np.array_equal(ct.hu, volume()) and ct.notes[0].startswith("left out: 2 copies of slices: ")


def test_two_acquisitions_in_one_series(tmp_path):
    write_series(tmp_path)
    other = dataset(volume(seed=1)[:, :, 4].T, places()[4], number=40)
    save(other, tmp_path / "other.dcm")
    refused(tmp_path, "slice 5 (2-05.dcm)", "slice 40 (other.dcm)", "one place with different pixels", allow_gaps=True)


@pytest.mark.parametrize(
    "tags, words",
    [
        ({"FrameOfReferenceUID": "1.2.3", "at": [3]}, "several frames of reference"),
        ({"LossyImageCompression": "01"}, "lossy compression"),
        ({"BodyPartExamined": "CHEST"}, "body part CHEST"),
    ],
)
def test_doubts_are_warnings(tmp_path, tags, words):
    write_series(tmp_path, change=setting(**tags))
    (note,) = read_dicom(tmp_path).notes
    assert note.startswith("warning: ") and words in note


# ---- slices that are not there


def heights(*z):
    return CORNER + np.array(z)[:, None] * [0, 0, 1.0]


def write_at(folder, z, change=None):
    return write_series(folder, volume((8, 8, len(z))), heights(*z), change=change)


@pytest.mark.parametrize(
    "z, words, stacks",
    [
        (
            (0, 5, 10, 20, 25, 30),
            ("1 in all", "10.00 mm between slice 3 (2-03.dcm) and slice 4 (2-04.dcm)", "5.00 mm are expected"),
            2,
        ),
        ((0, 5, 10, 15, 35), ("3 in all", "20.00 mm between slice 4 (2-04.dcm) and slice 5"), 2),
        ((0, 5, 20, 25, 30, 40, 45, 50), ("3 in all", "15.00 mm", "10.00 mm between slice 5"), 3),
        ((0, 10, 15, 20, 25), ("1 in all", "10.00 mm between slice 1 (2-01.dcm) and slice 2"), 2),
        ((0, 5, 10, 15, 25, 35, 45, 50, 55), ("3 in all", "between slice 4", "between slice 5", "between slice 6"), 3),
        ((0, 15, 30, 35, 40, 45), ("4 in all", "15.00 mm between slice 1", "15.00 mm between slice 2"), 2),
        ((0, 5, 10, 15, 18), ("uneven slices", "3.00 mm between slice 4 (2-04.dcm) and slice 5"), 2),
        ((0, 3, 5, 10, 15, 20), ("uneven slices", "2.00 mm between slice 2 (2-02.dcm) and slice 3"), 2),
    ],
)
def test_missing_slices_are_named(tmp_path, z, words, stacks):
    write_at(tmp_path, z)
    refused(tmp_path, "series 2 'Head'", "--allow-gaps", *words)
    ct = read_dicom(tmp_path, allow_gaps=True)
    warned = [note for note in ct.notes if note.startswith("warning: ")]
    assert all(any(word in note for note in warned) for word in words) and len(ct.stacks) == stacks
    assert np.allclose(ct.positions - ct.positions[0], z) and np.isfinite(ct.slice_ml).all()


def test_every_second_slice_of_all_is_missing(tmp_path):
    write_at(tmp_path, np.arange(6) * 10.0, setting(SliceThickness="5"))
    (note,) = read_dicom(tmp_path).notes  # numbers run on: perhaps it was meant
    assert note == "warning: slices lie 2.0 times their thickness apart: slices may be missing throughout"
    for k, path in enumerate(sorted(tmp_path.iterdir())):
        ds = pydicom.dcmread(path)
        ds.InstanceNumber = 2 * k + 1
        save(ds, path)
    refused(
        tmp_path, "5 in all", "10.00 mm between slice 1 (2-01.dcm) and slice 3 (2-02.dcm) where 5.00 mm", "--allow-gaps"
    )


def test_two_stacks_of_two_thicknesses_are_no_gap(tmp_path):
    def change(ds, k):
        ds.SliceThickness = 4 if k < 4 else 8

    write_at(tmp_path, (0, 4, 8, 12, 13, 21, 29, 37), change)
    ct = read_dicom(tmp_path)
    assert ct.notes == ("2 stacks of even slices: 4 slices 4.00 mm apart, then 4 slices 8.00 mm apart",)
    assert np.allclose(ct.origins, heights(0, 4, 8, 12, 13, 21, 29, 37) * [-1, -1, 1])
    assert np.allclose(ct.affine[:3, 2], [0, 0, 4]) and np.array_equal(ct.thicknesses, [4] * 4 + [8] * 4)
    assert np.allclose(ct.slice_ml * 1000 / (0.5 * 0.75), [4, 4, 4, 2.5, 4.5, 8, 8, 8])


def test_gaps_that_only_thickness_shows():
    z = np.array([0, 5, 10, 15, 25, 35, 45.0])
    assert [k for k, *_ in find_gaps(z, np.full(7, 5.0))] == [3, 4, 5]
    assert [k for k, *_ in find_gaps(z, np.array([5.0] * 4 + [10.0] * 3))] == []
    assert find_gaps(np.arange(9) * 5.0, np.full(9, np.nan)) == []


def test_moved_slices(tmp_path):
    corners = places()
    corners[4] += [2.5, 0, 0]
    write_series(tmp_path, corners=corners)
    refused(tmp_path, "slice 5 (2-05.dcm) lies 2.5 mm beside the others")
    refused(tmp_path, "2.5 mm beside", allow_gaps=True)
    write_series(tmp_path, corners=places() + np.arange(9)[:, None] * [6.0, 0, 0])
    refused(tmp_path, "more than 45 degrees off their normal")


# ---- millilitres


def ball(corners, tilt, mm=1.0, n=150, radius=60):
    "HU (X, Y, Z) of a ball in air, sliced at these corners, columns tilted."
    slope = np.radians(tilt)
    x, y = np.meshgrid(np.arange(n) * mm, np.arange(n) * mm, indexing="ij")
    place = np.stack([x, y * np.cos(slope), -y * np.sin(slope)], -1)[:, :, None] + np.asarray(corners)
    return np.where(np.linalg.norm(place, axis=-1) < radius, 30, -1000).astype(np.int16)


def test_a_tilted_scan_in_two_stacks_has_the_same_millilitres(tmp_path):
    ml, known = {}, 4 / 3 * np.pi * 60**3 / 1000
    for tilt in (0, 18.5):
        cosine = np.cos(np.radians(tilt))
        steps = np.concatenate([[0], np.cumsum([4.0] * 19 + [1.08] + [7.0] * 13)]) / cosine
        corners = np.array([-75, -75 * cosine, -86]) + steps[:, None] * [0, 0, 1]
        column = (0, cosine, -np.sin(np.radians(tilt)))
        write_series(tmp_path / str(tilt), ball(corners, tilt), corners, column=column, spacing=(1.0, 1.0, 5.0))
        ct = read_dicom(tmp_path / str(tilt))
        assert len(ct.stacks) == 2 and np.isclose(ct.tilt, tilt, atol=0.01)
        ml[tilt] = ct.volume_ml(ct.hu > -300)
    assert abs(ml[18.5] / ml[0] - 1) < 0.01 and abs(ml[18.5] / known - 1) < 0.01


@pytest.mark.long
def test_the_real_head(real_data, tmp_path):
    folder = real_data / "ge-head-ct"
    if not folder.is_dir():
        pytest.skip("needs ge-head-ct in SAHLORA_REAL_DATA")
    ct = read_dicom(folder)
    assert ct.notes == (
        "2 stacks of even slices: 14 slices 4.00 mm apart, then 14 slices 7.00 mm apart",
        "gantry tilt 18.5 degrees: slices are kept as they were scanned",
    )
    assert ct.hu.shape == (512, 512, 28) and ct.hu.min() == -1024 and np.isclose(ct.tilt, 18.5, atol=0.01)
    # by hand: slice z, times cos(tilt) for the distance along the normal; half the way to each neighbour
    slices = sorted((pydicom.dcmread(path) for path in folder.glob("*.dcm")), key=lambda ds: ds.ImagePositionPatient[2])
    z = np.array([float(ds.ImagePositionPatient[2]) for ds in slices]) * float(slices[0].ImageOrientationPatient[4])
    edges = np.concatenate([[z[0] - 2.0], (z[1:] + z[:-1]) / 2, [z[-1] + 3.5]])
    area = np.array([(ds.pixel_array.astype(int) > -300).sum() * 0.4882812**2 for ds in slices])
    by_hand = float((area * np.diff(edges)).sum()) / 1000
    assert abs(ct.volume_ml(ct.hu > -300) / by_hand - 1) < 0.005 and 2500 < by_hand < 4500
    assert [file.name for file in ct.stored.files] == [f"{n:02d}.dcm" for n in range(1, 29)]
    check_seg(ct, ct.hu > 60, tmp_path / "seg.dcm")


# ---- DICOM SEG


def check_seg(ct, mask, path):
    "Write a mask and compare every frame with the slice of the same SOPInstanceUID, read with pydicom alone."
    hd = pytest.importorskip("highdicom")
    write_seg(ct, mask, path)
    seg = hd.seg.segread(path)
    instances = list(ct.stored.instances)
    back = seg.get_pixels_by_source_instance(instances, assert_missing_frames_are_empty=True)[..., 0]
    for k, (file, instance) in enumerate(zip(ct.stored.files, instances)):
        source = pydicom.dcmread(file.path, stop_before_pixels=True)
        assert source.SOPInstanceUID == instance
        # where the marked voxels of slice k lie by the affine, and the SEG's pixels by the slice's own header
        rows, columns = np.nonzero(back[k])
        axes, corner = (
            np.reshape(source.ImageOrientationPatient, (2, 3)).astype(float),
            np.array(source.ImagePositionPatient, float),
        )
        down, across = map(float, source.PixelSpacing)
        lie = corner + columns[:, None] * across * axes[0] + rows[:, None] * down * axes[1]
        x, y = np.nonzero(mask[:, :, k])
        mine = ct.corners[k] + x[:, None] * ct.affine[:3, 0] + y[:, None] * ct.affine[:3, 1]
        lie, mine = (a[np.lexsort(np.round(a, 2).T)] for a in (lie * [-1, -1, 1], mine))
        assert lie.shape == mine.shape and np.allclose(lie, mine, atol=0.01)
    assert back.sum() == mask.sum()
    return seg


@pytest.mark.parametrize(
    "row, column",
    [
        ((1, 0, 0), (0, 1, 0)),
        ((-1, 0, 0), (0, -1, 0)),
        ((0, 1, 0), (1, 0, 0)),
        ((0, -1, 0), (0.9483237, 0, -0.3173047)),
    ],
)
def test_seg_lies_on_its_slices(tmp_path, row, column):
    write_series(tmp_path / "scan", row=row, column=column)
    ct = read_dicom(tmp_path / "scan")
    mask = np.zeros(ct.hu.shape, np.uint8)
    mask[2:9, 3:5, 2:7] = 1
    mask[4, 6, 3] = 1
    seg = check_seg(ct, mask, tmp_path / "seg.dcm")
    assert (
        seg.NumberOfFrames == 5
        and seg.SegmentationType == "BINARY"
        and seg.PatientID == "one"
        and seg.ContentDate == "20240131"
    )
    part = seg.SegmentSequence[0]
    assert (
        part.SegmentedPropertyTypeCodeSequence[0].CodeValue == "35566002" and part.SegmentAlgorithmType == "AUTOMATIC"
    )
    assert part.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "49755003"
    algorithm = part.SegmentationAlgorithmIdentificationSequence[0]
    assert algorithm.AlgorithmName == "sahlora" and algorithm.AlgorithmVersion
    assert seg.StudyInstanceUID == "1.2.826.0.2" and seg.FrameOfReferenceUID == "1.2.826.0.4"


def test_seg_is_the_same_bytes_and_another_mask_is_not(tmp_path, monkeypatch):
    pytest.importorskip("highdicom")
    write_series(tmp_path / "scan")
    ct = read_dicom(tmp_path / "scan")
    write_seg(ct, ct.hu > 0, tmp_path / "a.dcm")
    write_seg(ct, ct.hu > 0, tmp_path / "b.dcm", label="Hematoma")
    write_seg(ct, ct.hu > 1, tmp_path / "c.dcm")
    write_seg(ct, ct.hu > 0, tmp_path / "d.dcm", label="Hemorrhage")
    one, same, mask, label = (pydicom.dcmread(tmp_path / f"{name}.dcm") for name in "abcd")
    assert (tmp_path / "a.dcm").read_bytes() == (tmp_path / "b.dcm").read_bytes()
    assert len({one.SOPInstanceUID, mask.SOPInstanceUID, label.SOPInstanceUID}) == 3
    assert label.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0].CodeValue == FINDINGS["Hemorrhage"][0]
    assert not {"InstanceCreationDate", "InstanceCreationTime"} & set(one.dir()) and "ContributionDateTime" not in str(
        one
    )


def test_seg_of_an_empty_mask_and_of_everything(tmp_path):
    write_series(tmp_path / "scan")
    ct = read_dicom(tmp_path / "scan")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_seg(ct, np.zeros(ct.hu.shape, bool), tmp_path / "empty.dcm").NumberOfFrames == 9
        assert check_seg(ct, np.ones(ct.hu.shape, bool), tmp_path / "full.dcm").NumberOfFrames == 9


def test_seg_of_two_stacks_states_each_thickness(tmp_path):
    def change(ds, k):
        ds.SliceThickness = 4 if k < 4 else 8

    write_at(tmp_path / "scan", (0, 4, 8, 12, 13, 21, 29, 37), change)
    ct = read_dicom(tmp_path / "scan")
    seg = check_seg(ct, ct.hu > 0, tmp_path / "seg.dcm")
    stated = {
        frame.PlanePositionSequence[0].ImagePositionPatient[2]: frame.PixelMeasuresSequence[0].SliceThickness
        for frame in seg.PerFrameFunctionalGroupsSequence
    }
    assert [stated[z] for z in sorted(stated)] == [4] * 4 + [8] * 4


def test_seg_from_a_zip_and_from_a_bare_header(tmp_path):
    hd = pytest.importorskip("highdicom")
    with pydicom.config.disable_value_validation():
        write_series(
            tmp_path / "scan",
            change=setting(StudyDate="31.1.2024", PatientSex="male?", SliceThickness=None, FrameOfReferenceUID=None),
        )
    ct = read_dicom(zipped(tmp_path / "scan", tmp_path / "scan.zip"))
    write_seg(ct, ct.hu > 0, tmp_path / "seg.dcm")
    seg = hd.seg.segread(tmp_path / "seg.dcm")
    assert seg.ContentDate == "19700101" and seg.PatientSex == "" and seg.FrameOfReferenceUID
    assert seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness == 5
    back = seg.get_pixels_by_source_instance(list(ct.stored.instances))[..., 0]
    assert np.array_equal(back, (ct.hu > 0).transpose(2, 1, 0))


def test_seg_is_refused_in_words(tmp_path, monkeypatch):
    paths = write_series(tmp_path / "scan")
    ct, out = read_dicom(tmp_path / "scan"), tmp_path / "out/seg.dcm"
    mask = ct.hu > 0

    def no_seg(words, ct=ct, mask=mask, **options):
        with pytest.raises(ValueError, match=words):
            write_seg(ct, mask, out, **options)
        assert not out.parent.exists() or not list(out.parent.iterdir())

    no_seg("shape", mask=mask[1:])
    no_seg("values", mask=mask * 2)
    no_seg("label 'Clot' has no code; there are: Hematoma, Hemorrhage", label="Clot")
    no_seg("not read from DICOM", ct=sahlora.ct.HeadCT(ct.hu, ct.affine, "array"))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "highdicom", None)
        no_seg(r"pip install 'sahlora\[dicom\]'")
    pytest.importorskip("highdicom")
    ds = pydicom.dcmread(paths[2])
    ds.SOPInstanceUID = "1.2.3.4"
    save(ds, paths[2])
    no_seg("2-03.dcm: has changed since it was read")
    ds.SOPInstanceUID = ct.stored.instances[0]
    save(ds, paths[2])
    no_seg("SOPInstanceUID is missing or not right", ct=read_dicom(tmp_path / "scan"))
    paths[2].unlink()
    with pytest.raises(FileNotFoundError):
        write_seg(ct, mask, out)
