"""Cohorts on disk: what is wrong with a table, an image or a mask is said by name, and nothing hides in a file."""
import gzip
import shutil

import nibabel as nib
import numpy as np
import pytest

from sahlora.checks import attempt, check_cohort, find_duplicates, grouped
from sahlora.cohort import (COLUMNS, Case, Cohort, check_binary, cohort_table, compact, describe_cohort,
                            make_phantom_cohort, to_hu, volume_bin, voxel_hash, write_cohort)
from sahlora.ct import read_nifti, write_nifti


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


def test_written_cohort_reads_back(cohort):
    again = Cohort.read(cohort.folder)
    assert again.table.equals(cohort.table) and len(list(again)) == 2 and tuple(again.table) == COLUMNS


def test_a_table_without_hashes_is_enough(cohort):
    "The columns a user writes by hand: the rest is computed when it is needed."
    hashes = cohort.voxels
    for columns in (["voxels"], ["voxels", "sha256"]):
        cohort.table.drop(columns=columns).to_csv(cohort.folder / "cohort.csv", index=False)
        assert Cohort.read(cohort.folder).voxels == hashes
    rewrite(cohort, voxels=["", cohort.table.voxels[1]])
    assert Cohort.read(cohort.folder).voxels == hashes


@pytest.mark.parametrize("columns, words", [
    ({"case": "same"}, "stands in it twice"),
    ({"intensity": "grey"}, "neither hu nor window"),
    ({"spacing": "maybe"}, "neither known nor unknown"),
    ({"image": "images/none.nii.gz"}, "is not there"),
])
def test_bad_tables_are_refused(cohort, columns, words):
    rewrite(cohort, **columns)
    with pytest.raises(ValueError, match=words) as error:
        Cohort.read(cohort.folder)
    assert "cohort.csv" in str(error.value)


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
    affine = scan.affine @ np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])
    write_nifti(image, scan.array, affine)
    write_nifti(label, mask.array, affine)
    return [image.name, "coronal"]


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
