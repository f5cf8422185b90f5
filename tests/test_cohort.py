"""Cohorts on disk: what is wrong with a table, an image or a mask is said by name, and nothing hides in a file."""
import gzip
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from sahlora.cohorts.checks import attempt, check_cohort, find_duplicates, grouped
from sahlora.cohorts.cohort import (COLUMNS, Case, Cohort, check_binary, cohort_html, cohort_table, compact, describe_cohort,
                            make_phantom_cohort, read_table, to_hu, volume_bin, voxel_hash, window_of, write_cohort)
from sahlora.ct import read_ct, read_nifti, write_nifti
from sahlora.cohorts.folds import draw_folds, folds_table


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_phantom_cohort(tmp_path_factory.mktemp("made"), "asah", cases=2, seed=1, grid=(32, 40), slices=28)


@pytest.fixture
def cohort(made, tmp_path):
    "A copy to damage."
    shutil.copytree(made.folder, tmp_path / "cohort")
    return Cohort.read(tmp_path / "cohort")


def rewrite(cohort, **columns):
    table = cohort.table.assign(**columns)
    table.to_csv(cohort.folder / "cohort.csv", index=False)


@pytest.mark.long
def test_written_cohort_reads_back(cohort):
    again = Cohort.read(cohort.folder)
    assert again.table.equals(cohort.table) and len(list(again)) == 2 and tuple(again.table) == COLUMNS


@pytest.mark.long
def test_a_table_without_hashes_is_enough(cohort):
    "The columns a user writes by hand: the rest is computed when it is needed."
    hashes = cohort.voxels
    for columns in (["voxels"], ["voxels", "sha256"]):
        cohort.table.drop(columns=columns).to_csv(cohort.folder / "cohort.csv", index=False)
        assert Cohort.read(cohort.folder).voxels == hashes
    rewrite(cohort, voxels=["", cohort.table.voxels[1]])
    assert Cohort.read(cohort.folder).voxels == hashes


@pytest.mark.parametrize("missing", [["blood_ml"], ["sha256"], ["voxels"], ["blood_ml", "sha256", "voxels"]])
def test_columns_that_may_be_missing_are_missed_by_nobody(cohort, missing):
    "Whatever is done with a cohort works without them, or says that millilitres are unknown."
    hashes = cohort.voxels
    cohort.table.drop(columns=missing).to_csv(cohort.folder / "cohort.csv", index=False)
    bare = Cohort.read(cohort.folder)
    assert sorted(bare.table) == sorted(COLUMNS) and bare.voxels == hashes and bare.table.blood_ml.dtype == float
    report = check_cohort(cohort.folder)
    assert report.ok and ("blood_ml is empty" in str(report)) == ("blood_ml" in missing)
    folds, _ = draw_folds(bare, "stratified", 2)
    assert len(folds_table(bare, folds)) == 2 and "unknown" in cohort_html(bare) + str(cohort_table(bare))
    assert (describe_cohort(bare)["bins"] is None) == ("blood_ml" in missing)
    assert len(bare.select(bare.patients[:1])) == 1


BAD = [
    ({"case": "same"}, "stands in it twice"), ({"case": ["", "b"]}, "case '' can not be the name of a file"),
    *(({"case": [name, "b"]}, "can not be the name of a file") for name in ("a/b", "..", ".a", "a\tb", "x" * 300, "Thumbs.db")),
    ({"patient": ["", "p"]}, "has no patient"), ({"patient": ["p\x1b[31m", "q"]}, "can not be printed"), ({"site": "a\tb"}, "can not be printed"),
    ({"intensity": "grey"}, "neither hu nor window"), ({"intensity": ""}, "neither hu nor window"),
    *(({"intensity": word}, "neither hu nor window") for word in (
        "window:", "window:0", "window:0,80,1", "window:80,0", "window:0,0", "window:a,b", "window:0,inf", "window:nan,80", "0,80", "window:-1e308,1e308")),
    ({"spacing": "maybe"}, "neither known nor unknown"), ({"spacing": ""}, "neither known nor unknown"),
    ({"image": "images/none.nii.gz"}, "is not there"), ({"image": ["", ""]}, "'' is not there"), ({"label": "labels"}, "is not there"),
    *(({"blood_ml": [word, "1"]}, "is not a volume in mL") for word in ("much", "-1", "inf", "1e999", "1,5", "nan")),
    ({"voxels": ["abc", ""]}, "not a hash"), ({"sha256": ["A" * 64, ""]}, "not a hash"),
    ({"label": "labels/asah-0000.nii.gz"}, "label of case asah-0000 and label of case asah-0001"),
    ({"image": ["images/asah-0000.nii.gz", "./images/asah-0000.nii.gz"]}, "image of patient asah-0000-s1 and image of patient"),
    ({"label": ["images/asah-0000.nii.gz", "labels/asah-0001.nii.gz"]}, "image of patient asah-0000-s1 and label of case asah-0000"),
]


@pytest.mark.parametrize("columns, words", BAD)
def test_bad_tables_are_refused(cohort, columns, words):
    rewrite(cohort, **columns)
    with pytest.raises(ValueError, match=words) as error:
        Cohort.read(cohort.folder)
    assert "cohort.csv" in str(error.value)


def grey(array):
    return (np.clip(array, 0, 80) / 80 * 255).astype(np.uint8)


@pytest.mark.parametrize("words, voxels, affine", [
    ("one slice of 32 x 40 pixels", lambda a: a[:, :, :1], np.eye(4)), ("mm; expected pixels", np.asarray, np.diag([1.0, 1, 20, 1])),
    ("mm; expected pixels", np.asarray, np.diag([1e-6, 1e-6, 1e-6, 1])), ("HU", grey, np.eye(4)),
    ("not a number", lambda a: np.where(a > 1000, np.nan, a.astype(float)), np.eye(4))])
def test_what_prediction_refuses_training_refuses_too(cohort, words, voxels, affine):
    "In the same words, naming the file; the table can not know it."
    for image, label in zip(cohort.table.image, cohort.table.label):
        for name, change in ((image, voxels), (label, lambda a: voxels(a) if a.shape != voxels(a).shape else a)):
            scan = read_nifti(cohort.folder / name)
            write_nifti(cohort.folder / name, change(scan.array), scan.affine @ affine)
    rewrite(cohort, sha256="", voxels="")
    with pytest.raises(ValueError, match=words) as training:
        list(Cohort.read(cohort.folder))
    assert cohort.table.image[0] in str(training.value) and not check_cohort(cohort.folder).ok
    with pytest.raises(ValueError) as prediction:
        read_ct(cohort.folder / cohort.table.image[0])
    assert str(prediction.value) == str(training.value)


def test_two_masks_of_one_image_may_have_a_row_each(cohort):
    cohort.table.assign(image=cohort.table.image[0], patient="p", sha256="", voxels="").to_csv(cohort.folder / "cohort.csv", index=False)
    assert len(Cohort.read(cohort.folder)) == 2


def rows(cohort, separator=",", end="\n", start=""):
    "cohort.csv as some program would save it."
    return start + cohort.table.to_csv(index=False, sep=separator, lineterminator=end)


@pytest.mark.parametrize("how", ["byte order mark", "Windows", "empty lines", "spaces"])
def test_tables_that_spreadsheets_save_are_read(cohort, how):
    text = {"byte order mark": rows(cohort, start="\ufeff"), "Windows": rows(cohort, end="\r\n"),
            "empty lines": rows(cohort, end="\n,,,,,,,,,\n\n"), "spaces": rows(cohort, separator=",").replace(",", " , ")}[how]
    (cohort.folder / "cohort.csv").write_bytes(text.encode())
    assert Cohort.read(cohort.folder).table.equals(cohort.table)


@pytest.mark.parametrize("how, words", [
    ("semicolons", "with commas"), ("tabs", "with commas"), ("UTF-16", "not a table in UTF-8"), ("Latin-1", "not a table in UTF-8"),
    ("empty", "with commas"), ("twice", "each column once"), ("comma", "line 2 has 11 values for 10 columns; put quotes"),
    ("short", "line 3 has 9 values"), ("no row", "holds no case"), ("NUL", "cohort.csv")])
def test_other_tables_are_refused_with_their_line(cohort, how, words):
    table = cohort.table.assign(intensity="window:0,80")
    text = {"semicolons": rows(cohort, ";"), "tabs": rows(cohort, "\t"), "UTF-16": rows(cohort), "empty": "\n\n",
            "Latin-1": rows(cohort).replace("phantom", "M\u00fcnchen"), "twice": rows(cohort).replace("voxels", "case"),
            "comma": table.to_csv(index=False).replace('"', ""), "short": rows(cohort).rstrip("\n").rpartition(",")[0] + "\n",
            "no row": rows(cohort).splitlines()[0], "NUL": rows(cohort).replace("asah", "a\0sah")}[how]
    encoding = {"UTF-16": "utf-16", "Latin-1": "latin-1"}.get(how, "utf-8")
    (cohort.folder / "cohort.csv").write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=words) as error:
        Cohort.read(cohort.folder)
    assert "cohort.csv" in str(error.value)


def test_a_table_keeps_text_as_text(tmp_path):
    (tmp_path / "t.csv").write_text('patient,age\n007," 3,5"\n1e3,\n')
    assert read_table(tmp_path / "t.csv").to_dict("list") == {"patient": ["007", "1e3"], "age": ["3,5", ""]}


def test_windows():
    assert window_of("hu") is None and window_of("window:-20,100") == (-20, 100)


def test_missing_column_and_missing_table(cohort, tmp_path):
    cohort.table.drop(columns="label").to_csv(cohort.folder / "cohort.csv", index=False)
    with pytest.raises(ValueError, match="column label missing"):
        Cohort.read(cohort.folder)
    with pytest.raises(FileNotFoundError, match="cohort.csv"):
        Cohort.read(tmp_path)


def test_a_cohort_without_cases_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="no case"):
        write_cohort(tmp_path / "empty", [])
    assert not (tmp_path / "empty").exists()
    for wrong in ({"cases": 0}, {"cases": -1}, {"cases": 10_001}, {"cases": 1, "workers": 0}, {"cases": 1, "grid": (0, 0)},
                  {"cases": 1, "seed": -1}, {"cases": 1, "slices": 0}, {"cases": 1, "kind": "mri"}):
        with pytest.raises(ValueError, match=list(wrong)[-1]):
            make_phantom_cohort(tmp_path / "empty", **{"kind": "tbi", "seed": 0, **wrong})
    assert not (tmp_path / "empty").exists()


def test_patient_ids_stay_text(cohort):
    rewrite(cohort, patient=["007", "008"])
    assert Cohort.read(cohort.folder).patients == ["007", "008"]


@pytest.mark.parametrize("change, words", [
    (lambda array, affine: (array[1:], affine), "shape 31 x 40 x 28, but the image has 32 x 40 x 28"),
    (lambda array, affine: (array, affine + 0.01 * np.eye(4)), "affine differs from the image's by up to 0.01"),
    (lambda array, affine: (array * 5, affine), r"holds 5 \(\d+ voxels\) beside 0 and 1"),
])
def test_bad_masks_are_refused(cohort, change, words):
    label = cohort.folder / cohort.table.label[0]
    mask = read_nifti(label)
    write_nifti(label, *change(mask.array, mask.affine))
    with pytest.raises(ValueError, match=words) as error:
        next(iter(cohort))
    assert label.name in str(error.value)
    assert any(label.name in problem for problem in check_cohort(cohort.folder).problems)


def test_a_mask_that_is_not_a_number_is_not_binary():
    with pytest.raises(ValueError, match=r"nan \(2 voxels\)"):
        check_binary(np.array([0, 1, np.nan, np.nan]), "mask.nii.gz")


def test_a_tiny_shift_of_the_affine_is_allowed(cohort):
    label = cohort.folder / cohort.table.label[0]
    mask = read_nifti(label)
    write_nifti(label, mask.array, mask.affine + 5e-4)
    assert len(list(cohort)) == 2 and check_cohort(cohort.folder).ok


def test_to_hu_refuses_other_words():
    with pytest.raises(ValueError, match="neither hu"):
        to_hu(np.zeros(1), "window:low")


# Voxel hashes


@pytest.fixture(scope="module")
def volume():
    return np.random.default_rng(0).integers(-1000, 2000, (5, 6, 7)).astype(np.int16)


ORIENTATIONS = ("LPS", "RAS", "SAL", "IPR", "ARI")


@pytest.mark.parametrize("axes", ORIENTATIONS)
@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.float64])
def test_the_hash_is_blind_to_storage(volume, tmp_path, axes, dtype):
    affine = np.diag([-0.5, -0.5, 5, 1])
    image = nib.Nifti1Image(volume.astype(dtype), affine)
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axes))
    nib.save(image.as_reoriented(turn), tmp_path / "copy.nii")
    assert voxel_hash(read_nifti(tmp_path / "copy.nii").array) == voxel_hash(volume)


def test_the_hash_sees_what_matters(volume):
    changed = volume.copy()
    changed[2, 3, 4] += 1
    others = [changed, volume[::-1], volume[:, :, :-1], volume.transpose(0, 2, 1), volume.reshape(6, 5, 7)]
    assert len({voxel_hash(array) for array in (volume, *others)}) == 6


def test_the_hash_forgets_padding_and_scaling_noise(volume):
    padded, clipped = volume.astype(np.float32), volume.astype(np.float32)
    padded[0], clipped[0] = -3024, -1024
    assert voxel_hash(padded) == voxel_hash(clipped) == voxel_hash(clipped + np.float32(0.01))
    grey = np.arange(210, dtype=np.uint8).reshape(5, 6, 7)
    assert voxel_hash(grey) == voxel_hash(grey.astype(np.float64))
    missing = clipped.copy()
    missing[1, 1, 1] = np.nan
    assert voxel_hash(missing) == voxel_hash(np.nan_to_num(missing, nan=-1024))


@pytest.mark.parametrize("array, dtype", [
    (np.array([-1024.0, 3071.0]), np.int16), (np.array([0.5]), np.float32), (np.array([40000]), np.float32),
    (np.array([np.nan, 1.0]), np.float32), (np.array([7], np.uint8), np.uint8), (np.array([255], np.int64), np.int16)])
def test_compact_loses_nothing(array, dtype):
    small = compact(array)
    assert small.dtype == dtype and np.array_equal(small, array, equal_nan=array.dtype.kind == "f")


# Duplicates


def copy_of(cohort, folder, case="other", patient="somebody", dtype=np.float32, axes="RAS"):
    "A cohort of one scan: the first of `cohort`, stored in another way under another name."
    _, ct, mask = next(iter(cohort))
    made = write_cohort(folder, [Case(case, patient, "copy", ct.hu.astype(dtype), mask, ct.affine)])
    for name in (made.table.image[0], made.table.label[0]):
        image = nib.load(folder / name)
        turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes))
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine).as_reoriented(turn), folder / name)
    made.table.drop(columns=["voxels", "sha256"]).to_csv(folder / "cohort.csv", index=False)
    return Cohort.read(folder)


@pytest.mark.parametrize("dtype, axes", [(np.int16, "LPS"), (np.float32, "RAS"), (np.float64, "SPL")])
def test_a_renamed_copy_is_found(cohort, tmp_path, dtype, axes):
    copy = copy_of(cohort, tmp_path / "copy", dtype=dtype, axes=axes)
    ((one, other),) = find_duplicates(cohort, copy)
    assert (one.case, other.case, other.patient) == (cohort.table.case[0], "other", "somebody")
    assert "case other of patient somebody in" in str(other)
    assert find_duplicates(cohort) == find_duplicates(copy) == []


# Checking


def test_a_good_cohort_is_good(cohort):
    report = check_cohort(cohort.folder)
    assert report.ok and report.problems == () and "2 scans of 2 patients, no problem" in str(report)


def flip(path, where=0.5, bit=1):
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= bit
    path.write_bytes(content)


def damage(cohort, kind):
    "Damage the first scan; returns words that the report must hold."
    image, label = (cohort.folder / cohort.table[name][0] for name in ("image", "label"))
    scan, mask = read_nifti(image), read_nifti(label)
    if kind == "bit":
        flip(image)
        return [image.name, "corrupted"]
    if kind == "mask bit":
        flip(label, 0.7)
        return [label.name, "corrupted"]
    if kind == "truncated":
        image.write_bytes(image.read_bytes()[:-100])
        return [image.name, "corrupted"]
    if kind == "swapped":
        write_nifti(image, scan.array[::-1].copy(), scan.affine)
        return [image.name, "sha256 differs", "voxel hash differs"]
    if kind == "rewritten":
        image.write_bytes(gzip.compress(gzip.decompress(image.read_bytes()), 1))
        return [image.name, "sha256 differs"]
    if kind == "blood":
        write_nifti(label, mask.array * (np.arange(mask.array.shape[2]) % 2).astype(np.uint8), mask.affine)
        return [label.name, "cohort.csv states"]
    if kind == "not HU":
        write_nifti(image, np.clip(scan.array, 0, 80), scan.affine)
        return [image.name, "windowed"]
    if kind == "not a number":
        array = scan.array.astype(np.float32)
        array[3, 3, :2] = np.nan
        write_nifti(image, array, scan.affine)
        return [image.name, "2 of 35840 voxels are not a number"]
    assert kind == "coronal"
    write_nifti(image, scan.array, np.diag([-1.0, -5.0, 1.0, 1.0]))
    write_nifti(label, mask.array, np.diag([-1.0, -5.0, 1.0, 1.0]))
    return [image.name, "its slices are coronal"]


@pytest.mark.parametrize("kind", ["bit", "mask bit", "truncated", "swapped", "rewritten", "blood", "not HU",
                                  "not a number", "coronal"])
def test_damage_is_found(cohort, kind):
    words = damage(cohort, kind)
    report = check_cohort(cohort.folder)
    assert not report.ok and all(word in str(report) for word in words), str(report)
    assert "asah-0001.nii.gz" not in "".join(report.problems), "the other scan is good"
    if kind == "rewritten":
        assert "voxel hash" not in str(report), "the voxels are the same"


def test_notes_are_gathered_and_strays_named(cohort):
    image, label = (cohort.folder / cohort.table[name][0] for name in ("image", "label"))
    mask = read_nifti(label)
    write_nifti(label, mask.array * 0, mask.affine)
    (cohort.folder / "images/old.nii.gz").write_bytes(image.read_bytes())
    rewrite(cohort, blood_ml=[0.0, None])
    report = check_cohort(cohort.folder)
    assert report.ok, str(report)
    for words in ("empty mask: no blood (asah-0000)", "blood_ml is empty in the table (asah-0001)",
                  "a file that cohort.csv does not name (images/old.nii.gz)", "pixels of 5 x 5 mm"):
        assert any(words in note for note in report.notes), words
    assert grouped([(str(n), "warning: odd") for n in range(5)]) == ("odd (0, 1, 2 and 2 more)",)


def one_slice(cohort, spacing):
    "The first scan of a cohort, cut down to the slice with most blood."
    _, ct, mask = next(iter(cohort))
    k = slice(n := int(mask.sum((0, 1)).argmax()), n + 1)
    return write_cohort(cohort.folder.parent / "one", [Case("a", "p", "x", ct.hu[..., k].astype(np.int16), mask[..., k], ct.affine,
                                                            "hu", spacing)])


@pytest.mark.parametrize("spacing", ["known", "unknown"])
def test_one_slice_is_told_because_prediction_refuses_it(cohort, spacing):
    one = one_slice(cohort, spacing)
    with pytest.raises(ValueError, match="one slice"):
        read_ct(one.folder / one.table.image[0])
    report = check_cohort(one.folder)
    assert report.ok == (spacing == "unknown"), "training does not mind, where no spacing is known"
    assert "one slice of 32 x 40 pixels (2-D)" in "".join(report.notes if report.ok else report.problems)


@pytest.mark.parametrize("share, told", [(1.0, "the mask covers 100.0% of the scan"), (0.5, "the mask covers 50.0% of the scan"), (0.2, "")])
def test_a_mask_larger_than_any_hematoma_is_told(cohort, share, told):
    _, ct, _ = next(iter(cohort))
    mask = np.zeros(ct.hu.shape, np.uint8)
    mask[: round(share * len(mask))] = 1
    report = check_cohort(write_cohort(cohort.folder.parent / "large", [Case("a", "p", "x", ct.hu.astype(np.int16), mask, ct.affine)]).folder)
    assert report.ok and (told in str(report) if told else "covers" not in str(report))


def spoil(cohort, kind):
    "A cohort that `finetune` refuses; returns words of the note."
    scans = list(cohort)
    hu, masks = ([scan.hu.astype(np.int16) for _, scan, _ in scans], [mask for _, _, mask in scans])
    names, words = list("abc"), "2 patients"
    hu, masks = [*hu, hu[0][::-1].copy()], [*masks, masks[0][::-1].copy()]
    if kind == "too few patients":
        names[2] = "b"
    elif kind == "no blood":
        masks, words = [mask * 0 for mask in masks], "no training patient of fold 0, 1, 2 has any blood"
    elif kind == "blood of one patient":
        masks, words = [masks[0], masks[1] * 0, masks[2] * 0], "has any blood"
    elif kind == "two sizes":
        hu[2], masks[2], words = hu[2][:24], masks[2][:24], "24 x 40 and 32 x 40 pixels"
    cases = [Case(str(k), name, "x", *both, scans[0][1].affine) for k, (name, *both) in enumerate(zip(names, hu, masks))]
    return write_cohort(cohort.folder.parent / "spoiled", cases), words


@pytest.mark.long
@pytest.mark.parametrize("kind", ["too few patients", "no blood", "blood of one patient", "two sizes"])
def test_what_training_will_refuse_is_told(cohort, tmp_path, kind):
    from sahlora.cohorts.folds import folds_for
    from sahlora.training.loop import pretrain
    from sahlora.training.transfer import Strategy, cross_validate

    spoiled, words = spoil(cohort, kind)
    report = check_cohort(spoiled.folder)
    assert report.ok and any("fine-tuning refuses it" in note and words in note for note in report.notes), str(report)
    base = tmp_path / "base"
    pretrain(make_phantom_cohort(tmp_path / "source", "tbi", 2, 9, (32, 40)), base, {"name": "multi-view-unet", "levels": 1},
             {"steps": 1, "batch_size": 2}, quiet=True)
    with pytest.raises(ValueError):
        cross_validate(base / "model.safetensors", spoiled, Strategy("decoding", steps=1, batch_size=2),
                       folds_for(spoiled, tmp_path / "folds.json"), tmp_path / "run", quiet=True)


def test_folds_that_do_not_fit_any_more_are_told(cohort):
    (cohort.folder / "folds.json").write_text("{}")
    assert "fine-tuning refuses it" in str(check_cohort(cohort.folder)) and "folds.json: not a file of folds" in str(check_cohort(cohort.folder))


@pytest.mark.parametrize("kind", ["bit", "truncated", "not HU", "not a number", "coronal"])
def test_what_prediction_refuses_is_a_problem(cohort, kind):
    damage(cohort, kind)
    with pytest.raises(ValueError) as error:
        read_ct(cohort.folder / cohort.table.image[0])
    assert str(error.value) in check_cohort(cohort.folder).problems


def test_grey_values_that_prediction_would_take_for_hu_are_a_problem(cohort):
    _, ct, mask = next(iter(cohort))
    for name, top in (("dark", 250), ("right", 255)):
        grey = np.clip(ct.hu / 300 * 255, 0, top).astype(np.uint8)
        case = Case("a", "p", "x", grey, mask, ct.affine, "window:0,300")
        report = check_cohort(write_cohort(cohort.folder.parent / name, [case]).folder)
        assert report.ok == (name == "right"), str(report)
    grey = np.clip(ct.hu / 300 * 255, 0, 250).astype(np.uint8)
    assert np.abs(read_ct(cohort.folder.parent / "dark/images/a.nii.gz", window=(0, 300)).hu - to_hu(grey, "window:0,300")).max() > 40


def test_hidden_files_are_no_strays(cohort):
    for name in ("images/._asah-0000.nii.gz", "labels/.part.1.2.3.4.x.nii.gz", "images/Thumbs.db"):
        (cohort.folder / name).write_bytes(b"x")
    assert "does not name" not in str(check_cohort(cohort.folder))


def test_millilitres_without_spacing_are_a_problem(cohort):
    rewrite(cohort, spacing="unknown")
    assert "where the spacing is unknown" in str(check_cohort(cohort.folder))


def test_twins_in_a_cohort(cohort):
    _, ct, mask = next(iter(cohort))
    cases = [Case(name, patient, "x", ct.hu.astype(np.int16), mask, ct.affine)
             for name, patient in (("a", "p"), ("b", "p"), ("c", "q"))]
    write_cohort(cohort.folder.parent / "same", cases[:2])
    report = check_cohort(cohort.folder.parent / "same")
    assert report.ok and "the same voxels twice" in str(report)
    write_cohort(cohort.folder.parent / "other", cases)
    report = check_cohort(cohort.folder.parent / "other")
    assert not report.ok and "different patients: a (patient p), b (patient p), c (patient q)" in str(report)


def test_what_an_action_raises_becomes_words(tmp_path):
    assert attempt(int, "3") == (3, [])
    assert attempt(read_nifti, tmp_path / "none.nii")[1][0].endswith("is not there; check the name")
    assert attempt(int, "x")[0] is None and "invalid literal" in attempt(int, "x")[1][0]
    with pytest.raises(TypeError):
        attempt(int, [])


# In numbers


def test_the_table_tells_spacing_and_volume(cohort, tmp_path):
    twin = copy_of(cohort, tmp_path / "twin", axes="SAR")
    table = cohort_table(cohort, twin)
    assert list(table) == ["cohort", "twin"] and list(table.loc["pixels"]) == ["32 x 40"] * 2
    assert table["twin"]["slice mm"] == f"{read_nifti(twin.folder / twin.table.image[0]).affine[2, 2]:.3g}"
    bins = [int(table["cohort"][name]) for name in table.index if name.startswith("scans of")]
    assert sum(bins) == 2 and bins[-1] == 0


def test_unknown_spacing_has_no_bin(cohort):
    rewrite(cohort, spacing="unknown", blood_ml=None)
    unknown = Cohort.read(cohort.folder)
    assert describe_cohort(unknown) == {"patients": 2, "scans": 2, "bins": None, "blood_ml": None}
    column = cohort_table(unknown)["cohort"]
    assert column["pixel mm"] == column["blood mL"] == "unknown" and column["scans of unknown mL"] == "2"


def test_bins_have_no_holes():
    assert [volume_bin(ml) for ml in (0, 1e-3, 25, 50, 100, 1e4, float("nan"))] == [
        "0", "<25", "25-50", "50-100", ">100", ">100", "unknown"]
    with pytest.raises(ValueError, match="-1"):
        volume_bin(-1)


# Whose folder it is


def small(folder, **options):
    return make_phantom_cohort(folder, **{"kind": "tbi", "cases": 3, "seed": 1, "grid": (32, 40), "slices": 6, **options})


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.long
def test_the_same_phantoms_are_kept_and_others_refused(tmp_path, capsys, monkeypatch):
    made = small(tmp_path / "c")
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"images", "labels", "cohort.csv", "record.json"}
    before = stamps(tmp_path / "c")
    assert small(tmp_path / "c", workers=2).table.equals(made.table) and "was done before" in capsys.readouterr().out
    for other, words in (({"cases": 4}, "cases was 3, is 4"), ({"kind": "sah"}, "kind was 'tbi', is 'asah'"), ({"seed": 2}, "seed was 1"),
                         ({"grid": (32, 48)}, "grid was"), ({"slices": 7}, "slices was 6")):
        with pytest.raises(ValueError, match=f"another call.*{words}.*--overwrite"):
            small(tmp_path / "c", **other)
    monkeypatch.setattr("sahlora.cohorts.cohort.case_key", lambda *request: "another code's")
    with pytest.raises(ValueError, match="another call: code was"):
        small(tmp_path / "c")
    assert stamps(tmp_path / "c") == before


@pytest.mark.long
def test_overwriting_touches_what_the_record_lists_alone(tmp_path):
    small(tmp_path / "c")
    for name in ("images/mine.nii.gz", "labels/notes.txt", "folds.json", "cache/x/images.u8"):
        (tmp_path / "c" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "c" / name).write_text("mine")
    small(tmp_path / "c", cases=2, overwrite=True)
    files = {str(path.relative_to(tmp_path / "c")) for path in stamps(tmp_path / "c")}
    volumes = {f"{kind}/tbi-000{k}.nii.gz" for kind in ("images", "labels") for k in range(2)}
    mine = {"images/mine.nii.gz", "labels/notes.txt", "folds.json", "cache/x/images.u8"}
    assert files == volumes | mine | {"cohort.csv", "record.json"}
    assert all((tmp_path / "c" / name).read_text() == "mine" for name in mine)


def test_cases_in_memory_are_kept_and_others_refused(tmp_path, capsys):
    def cases(first):
        return [Case(name, name, "x", np.full((4, 5, 6), value), np.ones((4, 5, 6), bool), np.eye(4))
                for name, value in (("a", first), ("b", 2.0))]

    before = write_cohort(tmp_path / "c", cases(1.0)).table
    (tmp_path / "c/mine.txt").write_text("mine")
    assert write_cohort(tmp_path / "c", cases(1.0)).table.equals(before) and "was done before" in capsys.readouterr().out
    with pytest.raises(ValueError, match="another call: a was '[0-9a-f]*', is"):
        write_cohort(tmp_path / "c", cases(1.1))
    assert Cohort.read(tmp_path / "c").table.equals(before)
    assert not write_cohort(tmp_path / "c", cases(1.1), overwrite=True).table.equals(before)
    assert (tmp_path / "c/mine.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="two have one name"):
        write_cohort(tmp_path / "d", cases(1.0)[:1] * 2)


SCRIPT = """
import sys, time
import sahlora.cohorts.cohort as c
make = c.make_case
def slow(*request, **options):
    time.sleep(float(sys.argv[3]))
    return make(*request, **options)
c.make_case = slow
c.make_phantom_cohort(sys.argv[1], "tbi", int(sys.argv[2]), 1, (32, 40), 6, int(sys.argv[4]))
"""


def writer(folder, cases, seconds=0.0, workers=1):
    command = [sys.executable, "-c", SCRIPT, str(folder), str(cases), str(seconds), str(workers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_killed_call_had_made_is_kept(tmp_path, workers):
    killed = writer(tmp_path / "c", 3, 0.5, workers)
    while not list((tmp_path / "c").glob("made/tbi-*.json")):
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.02)
    killed.kill()
    killed.communicate()
    whole = {path.stem for path in (tmp_path / "c").glob("made/tbi-*.json")}
    before = {path: time for path, time in stamps(tmp_path / "c").items() if path.name.partition(".")[0] in whole and "made" not in str(path)}
    assert before and not (tmp_path / "c/cohort.csv").exists()
    (tmp_path / "c/images/.part.other.1.1.0.x.nii.gz").write_text("of another computer, which may be alive")
    with pytest.raises(ValueError, match="another call: cases was 3, is 2"):
        small(tmp_path / "c", cases=2)
    went_on = small(tmp_path / "c")
    after = stamps(tmp_path / "c")
    assert all(after[path] == time for path, time in before.items())
    assert went_on.table.equals(small(tmp_path / "at once").table) and check_cohort(tmp_path / "c").ok
    assert [path.name for path in after if ".part." in path.name] == [".part.other.1.1.0.x.nii.gz"]
    assert not (tmp_path / "c/made").exists()


@pytest.mark.long
def test_two_writers_of_one_cohort_come_one_after_the_other(tmp_path):
    same = [writer(tmp_path / "c", 2, 0.2) for _ in range(2)]
    said = [one.communicate()[0] for one in same]
    assert [one.returncode for one in same] == [0, 0] and sum("was done before" in text for text in said) == 1, said
    assert check_cohort(tmp_path / "c").ok
    other = [writer(tmp_path / "d", cases, 0.2) for cases in (1, 2)]
    said = [one.communicate()[0] for one in other]
    assert sorted(one.returncode for one in other) == [0, 1] and sum("another call" in text for text in said) == 1, said
    assert check_cohort(tmp_path / "d").ok, "the one that was refused wrote nothing"


def test_a_cohort_of_version_0_1_0_is_read_and_not_written(tmp_path):
    shutil.copytree(Path(__file__).parent / "files_0_1_0/cohort", tmp_path / "c")
    before = stamps(tmp_path / "c")
    old = Cohort.read(tmp_path / "c")
    assert len(list(old)) == 3 and check_cohort(tmp_path / "c").ok and "asah-0000" in cohort_html(old)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is there already, and no record.json lists it; choose another folder"):
            make_phantom_cohort(tmp_path / "c", "asah", 3, 6, (32, 40), 8, overwrite=overwrite)
    assert stamps(tmp_path / "c") == before
