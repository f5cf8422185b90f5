"""Cohorts on disk: what is wrong with a table, a mask or a source folder is said by name."""
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sahlora.cohort import Cohort, check_disjoint, import_ct_ich, kfold, make_phantom_cohort, to_hu
from sahlora.ct import read_nifti, write_nifti


@pytest.fixture
def cohort(tmp_path):
    return make_phantom_cohort(tmp_path / "cohort", "asah", cases=2, seed=1, grid=(32, 40), slices=28)


def rewrite(cohort, **columns):
    table = cohort.table.assign(**columns)
    table.to_csv(cohort.folder / "cohort.csv", index=False)


def test_written_cohort_reads_back(cohort):
    again = Cohort.read(cohort.folder)
    assert again.table.equals(cohort.table) and len(list(again)) == 2


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


def test_patient_ids_stay_text(cohort):
    rewrite(cohort, patient=["007", "008"])
    assert Cohort.read(cohort.folder).patients == ["007", "008"]


@pytest.mark.parametrize("change, words", [
    (lambda array, affine: (array[1:], affine), "shape"),
    (lambda array, affine: (array, affine + 0.01 * np.eye(4)), "affine differs"),
    (lambda array, affine: (array * 5, affine), "beside 0 and 1"),
])
def test_bad_masks_are_refused(cohort, change, words):
    label = cohort.folder / cohort.table.label[0]
    write_nifti(label, *change(*read_nifti(label)))
    with pytest.raises(ValueError, match=words) as error:
        next(iter(cohort))
    assert label.name in str(error.value)


def test_a_failed_import_leaves_no_table(tmp_path):
    brain = tmp_path / "source/Patients_CT/001/brain"
    brain.mkdir(parents=True)
    (brain / "1.jpg").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="1.jpg"):
        import_ct_ich(tmp_path / "source", tmp_path / "out", ["001"])
    assert not (tmp_path / "out/cohort.csv").exists()


def test_ct_ich_slices_are_sorted_by_number_and_oriented(tmp_path):
    brain = tmp_path / "source/Patients_CT/001/brain"
    brain.mkdir(parents=True)
    for number in (10, 9):
        picture = np.zeros((40, 40), np.uint8)
        picture[:20] = number * 10  # brighter in front: the upper half of the picture
        Image.fromarray(picture).save(brain / f"{number}.jpg", quality=100)
    blood = np.zeros((40, 40), np.uint8)
    blood[:, :20] = 255  # the left half of the picture: the patient's right
    Image.fromarray(blood).save(brain / "9_HGE_Seg.jpg", quality=95)
    cohort = import_ct_ich(tmp_path / "source", tmp_path / "out", ["001"], size=20)
    _, ct, mask = next(iter(cohort))
    assert ct.hu.shape == (20, 20, 2)
    assert ct.hu[10, 2, 0] == pytest.approx(-20 + 90 / 255 * 120, abs=1) and ct.hu[10, 17, 0] == pytest.approx(-20, abs=1)
    assert ct.hu[10, 2, 1] > ct.hu[10, 2, 0], "slice 10 comes after slice 9"
    assert mask[:10, :, 0].all() and not mask[10:, :, 0].any() and not mask[..., 1].any()
    assert pd.isna(cohort.table.blood_ml[0]) and cohort.table.spacing[0] == "unknown"


def test_real_ct_ich(real_data, tmp_path):
    cohort = import_ct_ich(real_data / "ct-ich-mini", tmp_path, ["077", "078", "079", "080"], size=130)
    depths = {patient: mask.shape[2] for patient, _, mask in cohort}
    assert depths == {"ct-ich-077": 2, "ct-ich-078": 10, "ct-ich-079": 1, "ct-ich-080": 8}
    for _, ct, mask in cohort:
        assert mask.any((0, 1)).all(), "every slice holds blood"
        assert ct.hu[mask == 1].mean() > ct.hu[mask == 0].mean() + 20
        native = 650 * 650 / 130**2
        assert 50 < mask.sum() / mask.shape[2] * native < 60_000


def test_area_averaging_keeps_the_amount_of_blood(real_data, tmp_path):
    counts = []
    for size in (650, 325, 130):
        cohort = import_ct_ich(real_data / "ct-ich-mini", tmp_path / str(size), ["078"], size=size)
        counts.append(next(iter(cohort))[2].sum() / size**2)
    assert counts == pytest.approx([counts[0]] * 3, rel=0.1)


def test_missing_ct_ich_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        import_ct_ich(tmp_path / "nowhere", tmp_path / "out", ["077"])
    for words in ("physionet.org", "CC BY 4.0", "ct-ich-mini/Patients_CT", "SAHLORA_REAL_DATA"):
        assert words in str(error.value)


def test_folds_test_everybody_once_and_ignore_the_order():
    patients = [f"p{i}" for i in range(10)]
    folds = kfold(patients)
    assert sorted(p for fold in folds for p in fold.test) == sorted(patients)
    assert folds == kfold(patients[::-1]) != kfold(patients, seed=1)
    for fold in folds:
        assert check_disjoint(fold.train, fold.test, "fold") == 0
    with pytest.raises(ValueError, match="at least 2"):
        kfold(["a"], 2)
    with pytest.raises(ValueError, match="a patient in each"):
        kfold(["a", "b"], 3)


def test_to_hu_refuses_other_words():
    with pytest.raises(ValueError, match="neither hu"):
        to_hu(np.zeros(1), "window:low")
