"""Importers: each public layout as it lies on disk, with its quirks, and every way in which it can be wrong."""
import json
import os
import shutil

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sahlora.cohorts.checks import check_cohort
from sahlora.cohorts.cohort import Cohort, make_phantom_cohort, to_hu
from sahlora.ct import read_nifti
from sahlora.cohorts.layouts import (BLOOD, KINDS, LAYOUTS, Layout, blood_mask, check_import, combine_raters, import_cohort,
                                     import_ct_ich, layout_help, parse_labels, read_patients, register_layout, which_blood)

SHAPE = (24, 30, 6)


def head(seed=0):
    "A head (X, Y, Z) in HU, axes left, posterior, superior: air, a skull, brain and noise."
    generator = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(-1, 1, SHAPE[0]), np.linspace(-1, 1, SHAPE[1]), indexing="ij")
    radius = np.hypot(x, y)[..., None] * np.ones(SHAPE[2])
    hu = np.select([radius < 0.7, radius < 0.9], [35.0, 900.0], -1000.0)
    return np.round(hu + generator.normal(0, 8, SHAPE)).clip(-1024).astype(np.int16)


def blood(first=10, many=3):
    "A box of blood, off centre along every axis."
    mask = np.zeros(SHAPE, np.uint8)
    mask[first : first + many, 8:12, 1:4] = 1
    return mask


AFFINE = np.array([[-0.5, 0, 0, 60], [0, -0.5, 0, 70], [0, 0, 5, -40], [0, 0, 0, 1.0]])
SHEARED = AFFINE @ np.array([[1, 0, 0, 0], [0, 1, np.tan(np.radians(4)) * 10, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])


def store(path, array, affine=AFFINE, axes="LPS", dtype=None):
    "An array with axes L, P, S as NIfTI, its axes in another order."
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.asarray(array if dtype is None else array.astype(dtype))
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axes))
    image = nib.Nifti1Image(array, affine).as_reoriented(turn)
    bare = path.suffix not in (".nii", ".gz")
    nib.save(image, path.with_name(f"{path.name}.nii.gz") if bare else path)
    if bare:
        path.with_name(f"{path.name}.nii.gz").rename(path)


def lay_pairs(source):
    store(source / "images/a.nii.gz", head(0), axes="RAS")
    store(source / "labels/a.nii.gz", blood(), axes="RAS")
    store(source / "images/b.nii", head(1), axes="LPS", dtype=np.float32)
    store(source / "labels/b.nii.gz", blood(4), axes="LPS", dtype=np.float64)


def lay_ct_ich(source):
    "Release 1.3: masks of 0 to about 255 that are not whole, patients with gaps in their numbers."
    for number, first in (("049", 10), ("070", 4)):
        noise = np.random.default_rng(1).uniform(-0.3, 0.3, SHAPE)
        store(source / f"ct_scans/{number}.nii", head(int(number)), axes="RAS", dtype=np.float64)
        store(source / f"masks/{number}.nii", blood(first) * 254.6 + noise, axes="RAS", dtype=np.float32)


def lay_bhsd(source):
    "The suffix is missing on some files."
    for name, first, ending in (("ID_0a1_ID_9b", 10, ""), ("ID_0a2_ID_9c", 4, ".nii.gz")):
        store(source / f"images/{name}{ending}", head(first), axes="LAS")
        store(source / f"labels/{name}.nii.gz", 5 * blood(first) + 2 * blood(first + 5), axes="LAS")


def lay_instance(source):
    for number, first in (("001", 10), ("100", 4)):
        store(source / f"train_2/data/{number}.nii.gz", head(first), axes="RPI")
        store(source / f"train_2/label/{number}.nii.gz", blood(first), axes="RPI")


def lay_mbh_seg(source):
    "Raters 1, 2 and 5; the second scan has one."
    for name, raters in (("ID_0a1_ID_9b", {1: 10, 2: 11, 5: 12}), ("ID_0a2_ID_9c", {2: 4})):
        store(source / name / "image.nii.gz", head(min(raters.values())), axes="LPI")
        for rater, first in raters.items():
            store(source / name / f"label_annot_{rater}.nii.gz", rater * blood(first), axes="LPI")


def lay_seg_cq500(source):
    "The second scan has a 4 degree sheared affine; another mask lies beside."
    for name, first, affine in (("CQ500-CT-1", 10, AFFINE), ("CQ500-CT-243", 4, SHEARED)):
        store(source / f"data/volumes/{name}/CT.nii", head(first), affine)
        store(source / f"data/volumes/{name}/ICH_mask.nii.gz", blood(first), affine)
        store(source / f"data/volumes/{name}/brain.nii.gz", head(first) > 0, affine, dtype=np.uint8)


LAY = {"pairs": lay_pairs, "ct-ich": lay_ct_ich, "bhsd": lay_bhsd, "instance": lay_instance, "mbh-seg": lay_mbh_seg,
       "seg-cq500": lay_seg_cq500}
EXPECTED = {  # cases, patients, heads, first rows of blood
    "pairs": (["a", "b"], ["a", "b"], [0, 1], [10, 4]),
    "ct-ich": (["ct-ich-049", "ct-ich-070"], ["ct-ich-049", "ct-ich-070"], [49, 70], [10, 4]),
    "bhsd": (["ID_0a1_ID_9b", "ID_0a2_ID_9c"], ["rsna-ID_0a1", "rsna-ID_0a2"], [10, 4], [10, 4]),
    "instance": (["instance-001", "instance-100"], ["instance-001", "instance-100"], [10, 4], [10, 4]),
    "mbh-seg": (["ID_0a1_ID_9b", "ID_0a2_ID_9c"], ["rsna-ID_0a1", "rsna-ID_0a2"], [10, 4], [11, 4]),
    "seg-cq500": (["CQ500-CT-1", "CQ500-CT-243"], ["CQ500-CT-1", "CQ500-CT-243"], [10, 4], [10, 4]),
}


@pytest.mark.parametrize("layout", LAY)
def test_each_layout_comes_out_as_it_went_in(tmp_path, layout):
    LAY[layout](tmp_path / "source")
    report = import_cohort(layout, tmp_path / "source", tmp_path / "out")
    cases, patients, seeds, rows = EXPECTED[layout]
    table = report.cohort.table
    assert (table.case.tolist(), table.patient.tolist(), report.skipped) == (cases, patients, {})
    assert set(table.site) == {layout} and set(table.intensity) == {"hu"} and set(table.spacing) == {"known"}
    for k, ((_, ct, mask), seed, row) in enumerate(zip(report.cohort, seeds, rows)):
        expected = blood(row) if layout != "bhsd" else blood(row) | blood(row + 5)
        if layout == "mbh-seg" and row == 11:
            expected = (blood(10) + blood(11) + blood(12) >= 2).astype(np.uint8)
        assert np.array_equal(ct.hu, head(seed)) and np.array_equal(mask, expected), cases[k]
        assert np.allclose(ct.affine, SHEARED if cases[k] == "CQ500-CT-243" else AFFINE)
        assert table.blood_ml[k] == pytest.approx(expected.sum() * 0.5 * 0.5 * 5 / 1000, abs=1e-3)
        stored = nib.load(tmp_path / "out" / table.image[k])
        assert stored.get_data_dtype() == np.int16 and nib.aff2axcodes(stored.affine) == ("L", "P", "S")
    checked = check_cohort(tmp_path / "out")
    assert checked.ok, str(checked)
    assert json.loads((tmp_path / "out/import.json").read_text())["request"]["layout"] == layout


def test_a_tilted_case_keeps_its_tilt_and_volume(tmp_path):
    lay_seg_cq500(tmp_path / "source")
    cohort = import_cohort("seg-cq500", tmp_path / "source", tmp_path / "out").cohort
    tilts = [ct.tilt for _, ct, _ in cohort]
    assert tilts == pytest.approx([0, 4], abs=0.05) and cohort.table.blood_ml[0] == cohort.table.blood_ml[1]


def test_fractions_are_kept_as_float(tmp_path):
    lay_pairs(tmp_path / "source")
    store(tmp_path / "source/images/a.nii.gz", head() + 0.25, axes="RAS", dtype=np.float64)
    cohort = import_cohort("pairs", tmp_path / "source", tmp_path / "out").cohort
    kinds = [nib.load(tmp_path / "out" / name).get_data_dtype() for name in cohort.table.image]
    assert kinds == [np.float32, np.int16] and np.array_equal(next(iter(cohort))[1].hu, head() + np.float32(0.25))


# Other names for the same layout


@pytest.mark.parametrize("layout, old, new", [
    ("pairs", "labels", "masks"), ("bhsd", "labels", "ground truths"), ("instance", "train_2", "train")])
def test_other_names_of_folders(tmp_path, layout, old, new):
    LAY[layout](tmp_path / "source")
    (tmp_path / "source" / old).rename(tmp_path / "source" / new)
    assert len(import_cohort(layout, tmp_path / "source", tmp_path / "out").cohort) == 2


@pytest.mark.parametrize("layout, inner", [("instance", "train_2"), ("seg-cq500", "data/volumes"), ("seg-cq500", "data")])
def test_the_inner_folder_may_be_named(tmp_path, layout, inner):
    LAY[layout](tmp_path / "source")
    assert len(import_cohort(layout, tmp_path / "source" / inner, tmp_path / "out").cohort) == 2


def test_numbers_name_the_same_patient_in_all_releases(tmp_path):
    store(tmp_path / "source/ct_scans/49.nii", head())
    store(tmp_path / "source/masks/49.nii", blood())
    assert import_cohort("ct-ich", tmp_path / "source", tmp_path / "out").cohort.patients == ["ct-ich-049"]


def test_hidden_and_other_files_are_left_alone(tmp_path):
    lay_pairs(tmp_path / "source")
    for name in ("images/.DS_Store", "images/._a.nii.gz", "labels/readme.txt", "images/dataset.json"):
        (tmp_path / "source" / name).write_bytes(b"x")
    assert len(import_cohort("pairs", tmp_path / "source", tmp_path / "out").cohort) == 2


HIDDEN = {
    "pairs": ["images/._a.nii.gz"], "ct-ich": ["ct_scans/._049.nii"], "bhsd": ["images/Thumbs.db", "labels/desktop.ini", "images/._x"],
    "instance": ["train_2/data/._001.nii.gz"],
    "mbh-seg": ["__MACOSX/image.nii.gz", "ID_0a1_ID_9b/._label_annot_9.nii.gz", ".x/image.nii.gz", "ID_0a1_ID_9b/.DS_Store"],
    "seg-cq500": ["data/volumes/__MACOSX/CT.nii", "data/volumes/.CQ500-CT-1/CT.nii"],
}


@pytest.mark.parametrize("layout", LAY)
def test_no_layout_counts_hidden_files(tmp_path, layout):
    LAY[layout](tmp_path / "source")
    expected = [str(one) for one in LAYOUTS[layout].find(tmp_path / "source")]
    for name in HIDDEN[layout]:
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_bytes(b"x")
    assert [str(one) for one in LAYOUTS[layout].find(tmp_path / "source")] == expected


def test_hidden_pictures_and_tables_are_left_alone(tmp_path):
    jpeg_patient(tmp_path / "source/Patients_CT/001/brain")
    for name in ("001/brain/._9.jpg", "001/brain/._9_HGE_Seg.jpg", "__MACOSX/brain/9.jpg", "001/brain/Thumbs.db"):
        (tmp_path / "source/Patients_CT" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source/Patients_CT" / name).write_bytes(b"x")
    (tmp_path / "source/._hemorrhage_diagnosis.csv").write_bytes(b"x")
    report = import_cohort("ct-ich", tmp_path / "source", tmp_path / "out")
    assert report.cohort.patients == ["ct-ich-001"] and not report.skipped


def test_slices_may_be_numbered_with_zeros(tmp_path):
    jpeg_patient(tmp_path / "source/Patients_CT/001/brain")
    for path in sorted((tmp_path / "source/Patients_CT/001/brain").iterdir()):
        number, rest = path.stem.partition("_")[0], path.name.lstrip("0123456789")
        path.rename(path.with_name(f"{number.zfill(3)}{rest}"))
    report = import_cohort("ct-ich", tmp_path / "source", tmp_path / "out")
    assert [ct.hu.shape[2] for _, ct, _ in report.cohort] == [2] and not report.skipped


def test_two_scans_of_one_name_are_refused(tmp_path):
    lay_ct_ich(tmp_path / "source")
    for kind in ("ct_scans", "masks"):
        shutil.copy(tmp_path / f"source/{kind}/049.nii", tmp_path / f"source/{kind}/49.nii")
    with pytest.raises(ValueError, match="several scans would be called ct-ich-049"):
        import_cohort("ct-ich", tmp_path / "source", tmp_path / "out")


# Labels


def test_only_the_blood_that_was_asked_for(tmp_path):
    lay_bhsd(tmp_path / "source")
    for names, rows in (("IPH", 15), (["sdh"], 10)):
        cohort = import_cohort("bhsd", tmp_path / "source", tmp_path / "out", blood=names, overwrite=True).cohort
        assert np.array_equal(next(iter(cohort))[2], blood(rows))
    report = import_cohort("bhsd", tmp_path / "source", tmp_path / "out", blood="EDH", overwrite=True)
    assert "empty mask: no blood (ID_0a1_ID_9b, ID_0a2_ID_9c)" in str(report) and "blood is EDH" in str(report)


@pytest.mark.long
@pytest.mark.parametrize(("site", "kept"), [(None, "phantom"), ("ward 3", "ward 3")])
def test_a_phantom_imported_again_stays_one(tmp_path, site, kept):
    cohort = make_phantom_cohort(tmp_path / "phantoms", "asah", cases=2, seed=5, grid=(32, 40), slices=12)
    again = import_cohort("pairs", cohort.folder, tmp_path / "again", site=site).cohort
    assert set(again.table.site) == {kept} and len(again) == 2
    assert again.patients == cohort.patients, "and its patients are who they were"
    shutil.rmtree(tmp_path / "again")
    (cohort.folder / "cohort.csv").unlink()
    assert set(import_cohort("pairs", cohort.folder, tmp_path / "again").cohort.table.site) == {"pairs"}


@pytest.mark.long
def test_two_scans_of_a_patient_stay_together_when_imported_again(tmp_path):
    cohort = make_phantom_cohort(tmp_path / "one", "asah", 3, seed=4, grid=(32, 40), slices=6)
    table = cohort.table.assign(patient=["ann", "ben", "ann"])
    table.to_csv(cohort.folder / "cohort.csv", index=False)
    assert import_cohort("pairs", cohort.folder, tmp_path / "again").cohort.table.patient.tolist() == ["ann", "ben", "ann"]
    said = {case: f"p{k}" for k, case in enumerate(table.case)}
    assert import_cohort("pairs", cohort.folder, tmp_path / "other", patients=said).cohort.table.patient.tolist() == ["p0", "p1", "p2"]
    table[:2].to_csv(cohort.folder / "cohort.csv", index=False)
    with pytest.raises(ValueError, match=f"cohort.csv: no patient for {table.case[2]}; add them"):
        import_cohort("pairs", cohort.folder, tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_pairs_with_a_map(tmp_path):
    store(tmp_path / "source/images/a.nii.gz", head())
    store(tmp_path / "source/labels/a.nii.gz", 255 * blood() + 7 * blood(16))
    options = {"labels": "255=hematoma,7=ventricle"}
    with pytest.raises(ValueError, match=r"is 'hematoma' blood\? Say which of hematoma, ventricle are \(--blood\)"):
        import_cohort("pairs", tmp_path / "source", tmp_path / "out", **options)
    cohort = import_cohort("pairs", tmp_path / "source", tmp_path / "out", blood="hematoma", **options).cohort
    assert np.array_equal(next(iter(cohort))[2], blood())


@pytest.mark.parametrize("value, words", [(255, "255 (36 voxels)"), (0.999, "0.999 (36 voxels)"), (-1, "-1 (36 voxels)")])
def test_unexplained_labels_are_named_and_never_rounded(tmp_path, value, words):
    lay_pairs(tmp_path / "source")
    store(tmp_path / "source/labels/a.nii.gz", value * blood().astype(float), axes="RAS")
    report = import_cohort("pairs", tmp_path / "source", tmp_path / "out")
    assert report.cohort.table.case.tolist() == ["b"]
    for word in ("a.nii.gz", words, "--labels"):
        assert word in report.skipped["a"]


@pytest.mark.parametrize("layout", ["bhsd", "mbh-seg", "instance", "seg-cq500"])
def test_every_layout_refuses_a_label_without_a_name(tmp_path, layout):
    LAY[layout](tmp_path / "source")
    masks = sorted((tmp_path / "source").rglob("label*/*.nii.gz")) + sorted((tmp_path / "source").rglob("*annot_1.nii.gz"))
    path = (masks + sorted((tmp_path / "source").rglob("ICH_mask.nii.gz")))[0]
    found = read_nifti(path)
    store(path, found.array * 6, found.affine)
    report = import_cohort(layout, tmp_path / "source", tmp_path / "out")
    assert len(report.skipped) == 1 and "nobody explained" in str(report) and path.name in str(report)


def test_rounding_keeps_what_is_no_number():
    values = np.array([0, 0.4, 0.6, 254.9, 1e-3])
    assert blood_mask(values, BLOOD, ["blood"], "m", rounded=True).tolist() == [False, False, True, True, False]
    for bad in (np.nan, -2.0):
        with pytest.raises(ValueError, match="nobody explained"):
            blood_mask(np.array([0, bad, 1]), BLOOD, ["blood"], "m", rounded=True)


@pytest.mark.parametrize("text, codes", [("1=EDH,2=IPH", {1: "EDH", 2: "IPH"}), (" 255 = blood ", {255: "blood"}),
                                         ({"3": "SAH"}, {3: "SAH"}), (None, None)])
def test_maps_of_labels(text, codes):
    assert parse_labels(text) == codes


@pytest.mark.parametrize("text, words", [("EDH", "code=name"), ("1=EDH,", "code=name"), ("1=EDH,1=IPH", "twice"),
                                         ("0=air", "background"), ("1.5=EDH", "code=name"), ("", "code=name")])
def test_wrong_maps_of_labels(text, words):
    with pytest.raises(ValueError, match=words):
        parse_labels(text)


def test_which_labels_are_blood():
    codes = dict(enumerate(KINDS, 1))
    assert which_blood(codes, None) == KINDS and which_blood(codes, "sah, EDH") == ("SAH", "EDH")
    with pytest.raises(ValueError, match="--blood 'XYZ': not one of the labels EDH"):
        which_blood(codes, "EDH,XYZ")


# Raters


@pytest.mark.parametrize("rater, rows", [("majority", None), ("union", (10, 11, 12)), ("one", (10,)), (2, (11,)), ("5", (12,))])
def test_raters(tmp_path, rater, rows):
    lay_mbh_seg(tmp_path / "source")
    report = import_cohort("mbh-seg", tmp_path / "source", tmp_path / "out", rater=rater)
    mask = next(iter(report.cohort))[2]
    if rows:
        assert np.array_equal(mask, np.any([blood(row) for row in rows], axis=0))
    missing = rater == "5"
    assert list(report.skipped) == ["ID_0a2_ID_9c"] * missing
    if missing:
        assert "rater 5 did not mark it; there are 2 (--rater)" in str(report)


def test_of_two_raters_both_must_agree():
    one, other = np.array([1, 1, 0], bool), np.array([1, 0, 0], bool)
    assert combine_raters({1: one, 2: other}).tolist() == [True, False, False]
    assert combine_raters({1: one}).tolist() == one.tolist()
    with pytest.raises(ValueError, match="rater mean did not mark it; there are 1 .*majority, union, one"):
        combine_raters({1: one}, "mean")


def test_a_scan_nobody_marked(tmp_path):
    lay_mbh_seg(tmp_path / "source")
    (tmp_path / "source/ID_0a2_ID_9c/label_annot_2.nii.gz").unlink()
    report = import_cohort("mbh-seg", tmp_path / "source", tmp_path / "out")
    assert len(report.cohort) == 1 and "holds no mask" in report.skipped["ID_0a2_ID_9c"]


# 8-bit pictures


@pytest.mark.parametrize("scale", ["grey", "unit", "hu"])
def test_a_window_that_is_known(tmp_path, scale):
    hu = np.clip(head(), 0, 80)
    grey = np.round(hu * 255 / 80)
    voxels = {"grey": grey.astype(np.uint8), "unit": (grey / 255).astype(np.float32), "hu": hu.astype(np.int16)}[scale]
    store(tmp_path / "source/images/a.nii.gz", voxels)
    store(tmp_path / "source/labels/a.nii.gz", blood())
    with pytest.raises(ValueError, match="--window 0,80"):
        import_cohort("pairs", tmp_path / "source", tmp_path / "out")
    cohort = import_cohort("pairs", tmp_path / "source", tmp_path / "out", window=(0, 80)).cohort
    assert cohort.table.intensity[0] == "window:0,80"
    stored = read_nifti(tmp_path / "out" / cohort.table.image[0]).array
    if scale != "hu":
        assert stored.dtype == np.uint8 and np.array_equal(stored, grey)
    assert np.abs(to_hu(stored, "window:0,80") - hu).max() <= 80 / 255
    assert check_cohort(tmp_path / "out").ok


# CT-ICH as JPEG


def jpeg_patient(brain, numbers=(9, 10), size=40, marked=(9,)):
    brain.mkdir(parents=True)
    for number in numbers:
        picture = np.zeros((size, size), np.uint8)
        picture[: size // 2] = number * 10  # brighter in front: the upper half of the picture
        Image.fromarray(picture).save(brain / f"{number}.jpg", quality=100)
    blood = np.zeros((size, size), np.uint8)
    blood[:, : size // 2] = 255  # the left half of the picture: the patient's right
    for number in marked:
        Image.fromarray(blood).save(brain / f"{number}_HGE_Seg.jpg", quality=95)


def test_ct_ich_slices_are_sorted_by_number_and_oriented(tmp_path):
    jpeg_patient(tmp_path / "source/Patients_CT/001/brain")
    cohort = import_ct_ich(tmp_path / "source", tmp_path / "out", ["001"], size=20)
    _, ct, mask = next(iter(cohort))
    assert ct.hu.shape == (20, 20, 2)
    assert ct.hu[10, 2, 0] == pytest.approx(-20 + 90 / 255 * 120, abs=1) and ct.hu[10, 17, 0] == pytest.approx(-20, abs=1)
    assert ct.hu[10, 2, 1] > ct.hu[10, 2, 0], "slice 10 comes after slice 9"
    assert mask[:10, :, 0].all() and not mask[10:, :, 0].any() and not mask[..., 1].any()
    assert pd.isna(cohort.table.blood_ml[0]) and cohort.table.spacing[0] == "unknown"


def test_jpeg_as_a_layout(tmp_path):
    jpeg_patient(tmp_path / "source/Patients_CT/050/brain", numbers=(3, 4, 7), marked=())
    jpeg_patient(tmp_path / "source/Patients_CT/049/brain")
    report = import_cohort("ct-ich", tmp_path / "source", tmp_path / "out")
    assert report.cohort.patients == ["ct-ich-049", "ct-ich-050"]
    assert [ct.hu.shape for _, ct, _ in report.cohort] == [(40, 40, 2), (40, 40, 3)], "native size"
    for note in ("2 slices between the first and the last are not there", "empty mask: no blood"):
        assert f"{note} (ct-ich-050)" in str(report)
    report = import_cohort("ct-ich", tmp_path / "source", tmp_path / "small", size=20, spacing=(0.4, 0.5, 5))
    _, ct, mask = next(iter(report.cohort))
    assert ct.hu.shape == (20, 20, 2) and ct.spacing == pytest.approx((0.8, 1.0, 5))
    assert report.cohort.table.blood_ml[0] == pytest.approx(mask.sum() * 0.8 * 5 / 1000, abs=1e-3)


def test_jpeg_bad_patients_are_skipped(tmp_path):
    for name in ("001", "002", "003", "004"):
        jpeg_patient(tmp_path / f"source/Patients_CT/{name}/brain")
    folder = tmp_path / "source/Patients_CT"
    (folder / "002/brain/9.jpg").write_bytes((folder / "002/brain/9.jpg").read_bytes()[:200])
    (folder / "003/brain/9.jpg").unlink()
    Image.new("L", (20, 20)).save(folder / "004/brain/10.jpg")
    report = import_cohort("ct-ich", tmp_path / "source", tmp_path / "out")
    assert list(report.skipped) == ["ct-ich-002", "ct-ich-003", "ct-ich-004"]
    for case, words in (("ct-ich-002", "9.jpg"), ("ct-ich-003", "9_HGE_Seg.jpg"), ("ct-ich-004", "2 sizes")):
        assert words in report.skipped[case]


def test_a_failed_import_leaves_no_table(tmp_path):
    brain = tmp_path / "source/Patients_CT/001/brain"
    brain.mkdir(parents=True)
    (brain / "1.jpg").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="1.jpg"):
        import_ct_ich(tmp_path / "source", tmp_path / "out", ["001"])
    assert not (tmp_path / "out/cohort.csv").exists()


def test_missing_ct_ich_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        import_ct_ich(tmp_path / "nowhere", tmp_path / "out", ["077"])
    for words in ("physionet.org", "CC BY 4.0", "ct-ich-mini/Patients_CT", "SAHLORA_REAL_DATA"):
        assert words in str(error.value)


def test_real_ct_ich(real_data, tmp_path):
    cohort = import_ct_ich(real_data / "ct-ich-mini", tmp_path, ["077", "078", "079", "080"], size=130)
    depths = {patient: mask.shape[2] for patient, _, mask in cohort}
    assert depths == {"ct-ich-077": 2, "ct-ich-078": 10, "ct-ich-079": 1, "ct-ich-080": 8}
    for _, ct, mask in cohort:
        assert mask.any((0, 1)).all(), "every slice holds blood"
        assert ct.hu[mask == 1].mean() > ct.hu[mask == 0].mean() + 20
        native = 650 * 650 / 130**2
        assert 50 < mask.sum() / mask.shape[2] * native < 60_000


def test_real_ct_ich_as_a_layout(real_data, tmp_path):
    report = import_cohort("ct-ich", real_data / "ct-ich-mini", tmp_path / "out")
    assert report.cohort.patients == ["ct-ich-077", "ct-ich-078", "ct-ich-079", "ct-ich-080"] and not report.skipped
    assert not any("table says" in note for note in report.notes), "the release's table agrees with the masks"
    assert all(ct.hu.shape[:2] == (650, 650) for _, ct, _ in report.cohort)
    assert check_cohort(tmp_path / "out").ok


def test_area_averaging_keeps_the_amount_of_blood(real_data, tmp_path):
    counts = []
    for size in (650, 325, 130):
        cohort = import_ct_ich(real_data / "ct-ich-mini", tmp_path / str(size), ["078"], size=size)
        counts.append(next(iter(cohort))[2].sum() / size**2)
    assert counts == pytest.approx([counts[0]] * 3, rel=0.1)


@pytest.mark.parametrize("patient, none", [("PatientNumber", "No_Hemorrhage"), ("Patient Number", "No Hemorrhage"),
                                           (" patient_number", "no_hemorrhage ")])
def test_the_table_of_the_release_is_compared(tmp_path, patient, none):
    lay_ct_ich(tmp_path / "source")
    said = [f"{n},{k + 1},{int(k not in (1, 2, 3))}" for n in (49, 70) for k in range(6 if n == 49 else 5)]
    said[1] = "49,2,1"  # the mask has blood on this slice
    (tmp_path / "source/hemorrhage_diagnosis_raw_ct.csv").write_text(
        "\n".join([f"{patient},SliceNumber,{none}", *said, ",,"]))
    notes = import_cohort("ct-ich", tmp_path / "source", tmp_path / "out").notes
    assert notes[:2] == ("3 slices with blood, the release's table says 2 (ct-ich-049)",
                         "6 slices, the release's table says 5 (ct-ich-070)")


def test_a_table_of_the_release_that_can_not_be_compared_is_named(tmp_path):
    lay_ct_ich(tmp_path / "source")
    for text, words in (("PatientNumber,Slices\n49,3\n", "column nohemorrhage, slicenumber missing"), ("a;b\n", "with commas")):
        (tmp_path / "source/hemorrhage_diagnosis.csv").write_text(text)
        with pytest.raises(ValueError, match=words) as error:
            import_cohort("ct-ich", tmp_path / "source", tmp_path / "out")
        assert "hemorrhage_diagnosis.csv" in str(error.value)


# Patients


@pytest.mark.parametrize("text", ["Case, Patient\na,007\nb,007\nz,8\n", "\ufeffcase,patient\r\na,007 \r\nb, 007\r\n,\r\n"])
def test_patients_from_a_table(tmp_path, text):
    lay_pairs(tmp_path / "source")
    (tmp_path / "patients.csv").write_text(text)
    cohort = import_cohort("pairs", tmp_path / "source", tmp_path / "out", patients=tmp_path / "patients.csv").cohort
    assert cohort.table.patient.tolist() == ["007", "007"] and cohort.table.case.tolist() == ["a", "b"]


@pytest.mark.parametrize("text, words", [("case;patient\na;1\nb;2\n", "with commas"), ("case\tpatient\na\t1\nb\t2\n", "with commas"),
                                         ("", "with commas"), ("case,patient,patient\na,1,1\nb,2,2\n", "once"),
                                         ("case,patient\na,1,2\nb,2\n", "line 2 has 3 values"),
                                         ("case,patient\na,1\n", "no patient for b"), ("case,who\na,1\n", "column patient"),
                                         ("case,patient\na,1\na,2\nb,3\n", "a: stands in it twice"),
                                         ("case,patient\na,\nb,1\n", "a: stands in it twice or has no patient")])
def test_wrong_tables_of_patients(tmp_path, text, words):
    lay_pairs(tmp_path / "source")
    (tmp_path / "patients.csv").write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        import_cohort("pairs", tmp_path / "source", tmp_path / "out", patients=tmp_path / "patients.csv")
    assert "patients.csv" in str(error.value) and not (tmp_path / "out").exists()
    with pytest.raises(FileNotFoundError):
        read_patients(tmp_path / "nowhere.csv")


# What is wrong with a source


@pytest.mark.parametrize("layout", LAY)
def test_a_source_that_is_not_there_or_not_that(tmp_path, layout):
    for source in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError) as error:
            import_cohort(layout, source, tmp_path / "out")
        assert LAYOUTS[layout].help in str(error.value) and str(source) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_unpaired_files_are_listed(tmp_path):
    lay_pairs(tmp_path / "source")
    shutil.copy(tmp_path / "source/images/a.nii.gz", tmp_path / "source/images/c.nii.gz")
    shutil.copy(tmp_path / "source/labels/a.nii.gz", tmp_path / "source/labels/d.nii.gz")
    with pytest.raises(ValueError) as error:
        import_cohort("pairs", tmp_path / "source", tmp_path / "out")
    assert "images without a mask: c; masks without an image: d; complete or remove them" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_two_files_of_one_name(tmp_path):
    lay_pairs(tmp_path / "source")
    shutil.copy(tmp_path / "source/images/b.nii", tmp_path / "source/images/a.nii")
    with pytest.raises(ValueError, match="two files for one scan"):
        import_cohort("pairs", tmp_path / "source", tmp_path / "out")
    shutil.copytree(tmp_path / "source/labels", tmp_path / "source/masks")
    (tmp_path / "source/images/a.nii").unlink()
    with pytest.raises(ValueError, match="masks/a.nii.gz and .*labels/a.nii.gz: two files for one scan"):
        import_cohort("pairs", tmp_path / "source", tmp_path / "out")


def break_image(source, kind):
    image, label = source / "images/a.nii.gz", source / "labels/a.nii.gz"
    if kind == "shape":
        store(label, blood()[1:], axes="RAS")
        return "labels/a.nii.gz: shape 23 x 30 x 6, but the image has 24 x 30 x 6"
    if kind == "affine":
        moved = AFFINE.copy()
        moved[2, 3] += 2.5
        store(label, blood(), moved, axes="RAS")
        return "labels/a.nii.gz: affine differs from the image's by up to 2.5"
    if kind == "mirrored":
        store(label, blood(), AFFINE @ np.diag([-1, 1, 1, 1.0]), axes="RAS")
        return "labels/a.nii.gz: affine differs"
    if kind == "bit":
        content = bytearray(image.read_bytes())
        content[len(content) // 2] ^= 4
        image.write_bytes(content)
        return "images/a.nii.gz: corrupted"
    if kind == "nan":
        store(image, np.where(head() < 900, head(), np.nan), axes="RAS")
        return "voxels are not a number"
    if kind == "8-bit":
        store(image, np.clip(head(), 0, 80).astype(np.uint8), axes="RAS")
        return "--window"
    if kind == "coronal":
        store(image, head(), np.diag([-0.5, -5, 0.5, 1]))
        store(label, blood(), np.diag([-0.5, -5, 0.5, 1]))
        return "coronal"
    assert kind == "link"
    image.unlink()
    image.symlink_to(image)
    return "images/a.nii.gz is a link that leads back to itself"


@pytest.mark.parametrize("kind", ["shape", "affine", "mirrored", "bit", "nan", "8-bit", "coronal", "link"])
def test_a_bad_scan_is_skipped_and_named(tmp_path, kind):
    lay_pairs(tmp_path / "source")
    words = break_image(tmp_path / "source", kind)
    report = import_cohort("pairs", tmp_path / "source", tmp_path / "out")
    assert report.cohort.table.case.tolist() == ["b"] and words in report.skipped["a"], report.skipped
    assert "1 of 2 skipped" in str(report) and "skipped a: " in str(report)
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.nii.gz")) == ["b.nii.gz", "b.nii.gz"]
    assert "a" in json.loads((tmp_path / "out/import.json").read_text())["skipped"]


def test_filled_when_asked(tmp_path):
    lay_pairs(tmp_path / "source")
    break_image(tmp_path / "source", "nan")
    report = import_cohort("pairs", tmp_path / "source", tmp_path / "out", fill_nan=True)
    assert len(report.cohort) == 2 and "filled with air" in str(report)


def test_a_missing_spacing_can_be_said(tmp_path):
    lay_pairs(tmp_path / "source")
    for name in ("images/a.nii.gz", "labels/a.nii.gz"):
        image = nib.load(tmp_path / "source" / name)
        image.set_qform(image.affine, 1)
        header = image.header.copy()
        header["pixdim"][3] = header["srow_x"][2] = header["srow_y"][2] = header["srow_z"][2] = 0
        header["vox_offset"], header["magic"] = 352, b"n+1"
        content = np.asarray(image.dataobj)
        raw = header.binaryblock + b"\0" * 4 + content.astype(header.get_data_dtype()).tobytes(order="F")
        (tmp_path / "source" / name).with_suffix("").write_bytes(raw)
        (tmp_path / "source" / name).unlink()
    report = import_cohort("pairs", tmp_path / "source", tmp_path / "out")
    assert "--spacing" in report.skipped["a"]
    options = {"spacing": (0.5, 0.5, 5), "orientation": "RAS"}
    (tmp_path / "source/images/b.nii").unlink(), (tmp_path / "source/labels/b.nii.gz").unlink()
    assert len(import_cohort("pairs", tmp_path / "source", tmp_path / "both", **options).cohort) == 1
    report = import_cohort("pairs", tmp_path / "source", tmp_path / "said", spacing=(0.5, 0.5, 5))
    assert report.cohort.table.blood_ml.tolist() == [0.045] and np.array_equal(next(iter(report.cohort))[2], blood())


# What already lies there


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_import_is_kept_and_another_refused(tmp_path, capsys):
    lay_pairs(tmp_path / "source")
    options = {"layout": "pairs", "source": tmp_path / "source", "out": tmp_path / "out"}
    first = import_cohort(**options)
    before, times = content(tmp_path / "out"), [path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.nii.gz")]
    again = import_cohort(**options)
    assert str(again) == str(first) and "was done before" in capsys.readouterr().out
    assert times == [path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.nii.gz")]
    shutil.copytree(tmp_path / "source", tmp_path / "moved")
    assert str(import_cohort("pairs", tmp_path / "moved", tmp_path / "out")) == str(first), "the same scans, elsewhere"
    with pytest.raises(ValueError, match="another call: site was 'pairs', is 'elsewhere'.*--overwrite"):
        import_cohort(**options, site="elsewhere")
    with pytest.raises(ValueError, match="another call: scans.a was .*--overwrite"):
        import_cohort(**options, patients={"a": "same", "b": "b"})
    assert before == content(tmp_path / "out")
    import_cohort(**options, site="elsewhere", overwrite=True)
    assert set(Cohort.read(tmp_path / "out").table.site) == {"elsewhere"}


@pytest.mark.parametrize("change", ["voxels", "mask", "added", "removed"])
def test_a_source_that_has_changed_is_another_import(tmp_path, change):
    lay_pairs(tmp_path / "source")
    import_cohort("pairs", tmp_path / "source", tmp_path / "out")
    (tmp_path / "out/images/notes.txt").write_text("mine")
    (tmp_path / "out/folds.json").write_text("mine")
    before = content(tmp_path / "out")
    if change == "voxels":
        store(tmp_path / "source/images/a.nii.gz", head(7), axes="RAS")
    elif change == "mask":
        store(tmp_path / "source/labels/a.nii.gz", blood(6), axes="RAS")
    elif change == "added":
        store(tmp_path / "source/images/c.nii.gz", head(7))
        store(tmp_path / "source/labels/c.nii.gz", blood())
    else:
        (tmp_path / "source/images/a.nii.gz").unlink()
        (tmp_path / "source/labels/a.nii.gz").unlink()
    with pytest.raises(ValueError, match=f"another call: scans.{'c' if change == 'added' else 'a'} was"):
        import_cohort("pairs", tmp_path / "source", tmp_path / "out")
    assert before == content(tmp_path / "out")
    cohort = import_cohort("pairs", tmp_path / "source", tmp_path / "out", overwrite=True).cohort
    names = {"added": "abc", "removed": "b"}.get(change, "ab")
    assert cohort.table.case.tolist() == list(names)
    files = {str(path.relative_to(tmp_path / "out")) for path in content(tmp_path / "out")}
    volumes = {f"{kind}/{name}.nii.gz" for kind in ("images", "labels") for name in names}
    assert files == volumes | {"cohort.csv", "import.json", "record.json", "images/notes.txt", "folds.json"}, "no more, no less"


def test_jpeg_slices_that_have_changed_are_another_import(tmp_path):
    jpeg_patient(tmp_path / "source/Patients_CT/050/brain")
    jpeg_patient(tmp_path / "source/Patients_CT/049/brain")
    (tmp_path / "source/Patients_CT/049/brain/Thumbs.db").write_bytes(b"x")
    import_cohort("ct-ich", tmp_path / "source", tmp_path / "out")
    (tmp_path / "source/Patients_CT/049/brain/Thumbs.db").write_bytes(b"y")
    import_cohort("ct-ich", tmp_path / "source", tmp_path / "out")
    shutil.copy(tmp_path / "source/Patients_CT/050/brain/9.jpg", tmp_path / "source/Patients_CT/050/brain/11.jpg")
    with pytest.raises(ValueError, match="another call: scans.ct-ich-050 was"):
        import_cohort("ct-ich", tmp_path / "source", tmp_path / "out")


def test_what_no_record_lists_is_never_replaced(tmp_path):
    lay_pairs(tmp_path / "source")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    import_cohort("pairs", tmp_path / "source", tmp_path / "mine")
    import_cohort("pairs", tmp_path / "source", tmp_path / "mine", site="elsewhere", overwrite=True)
    assert (tmp_path / "mine/thesis.txt").read_text() == "x"
    (tmp_path / "mine/record.json").unlink()
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="cohort.csv: is there already, and no record.json lists it"):
            import_cohort("pairs", tmp_path / "source", tmp_path / "mine", overwrite=overwrite)
    for out in (tmp_path / "source", tmp_path):
        with pytest.raises(ValueError, match="holds the source"):
            import_cohort("pairs", tmp_path / "source", out, overwrite=True)
    assert len(list((tmp_path / "source").rglob("*.nii*"))) == 4


def test_nothing_to_import_keeps_what_was_there(tmp_path):
    lay_pairs(tmp_path / "source")
    import_cohort("pairs", tmp_path / "source", tmp_path / "out")
    for name in ("a", "b"):
        store(tmp_path / f"source/labels/{name}.nii.gz", 9 * blood(), axes="RAS")
    with pytest.raises(ValueError, match="none of 2 scans could be imported:\n.*a.nii.gz") as error:
        import_cohort("pairs", tmp_path / "source", tmp_path / "out", overwrite=True)
    assert "9 (36 voxels)" in str(error.value) and len(list(Cohort.read(tmp_path / "out"))) == 2
    with pytest.raises(ValueError, match="none of 2"):
        import_cohort("pairs", tmp_path / "source", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_interrupted_import_leaves_no_table(tmp_path, monkeypatch):
    lay_pairs(tmp_path / "source")
    import sahlora.cohorts.cohort

    write, calls = sahlora.cohorts.cohort.write_nifti, []

    def full(path, *arguments):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, os.strerror(28), str(path))
        write(path, *arguments)

    monkeypatch.setattr(sahlora.cohorts.cohort, "write_nifti", full)
    with pytest.raises(OSError, match="No space left"):
        import_cohort("pairs", tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out/cohort.csv").exists()
    monkeypatch.undo()
    assert len(import_cohort("pairs", tmp_path / "source", tmp_path / "out").cohort) == 2, "the same import goes on"


# Options


@pytest.mark.parametrize("layout, options, words", [
    ("bsd", {}, "--layout 'bsd' is unknown; did you mean 'bhsd'? There are: pairs, ct-ich"),
    ("pairs", {"windwo": (0.0, 80.0)}, "windwo is unknown; did you mean 'window'"),
    ("bhsd", {"labels": "1=EDH"}, "has its own codes"),
    ("instance", {"blood": "EDH"}, "--blood 'EDH': not one of the labels blood"),
    ("pairs", {"size": 100}, "--size"),
    ("pairs", {"rater": "mean"}, "--rater 'mean'"),
    ("pairs", {"labels": "one=EDH"}, "--labels"),
    ("pairs", {"rater": "\u00b2"}, "--rater"),
    ("pairs", {"window": (80.0, 0.0)}, "--window needs low < high, not 80,0"),
    ("pairs", {"window": (0.0, float("nan"))}, "window"), ("pairs", {"window": (0.0, float("inf"))}, "window"),
    ("pairs", {"spacing": (0.5, 0.5, float("inf"))}, "spacing"), ("pairs", {"spacing": (0.5, 0.5, 0.0)}, "spacing"),
    ("pairs", {"orientation": "LPX"}, "--orientation 'LPX'"), ("pairs", {"size": 0}, "size"),
    ("pairs", {"blood": []}, "--blood"),
    ("pairs", {"patients": {"a": "", "b": "b"}}, "no patient for a"), ("pairs", {"patients": {"a": None, "b": "b"}}, "no patient for a"),
])
def test_wrong_options(tmp_path, layout, options, words):
    LAY.get(layout, lay_pairs)(tmp_path / "source")
    with pytest.raises(ValueError) as error:
        import_cohort(layout, tmp_path / "source", tmp_path / "out", **options)
    assert words in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"window": (0.0, 80.0)}, {"orientation": "LPS"}, {"fill_nan": True}, {"size": 8}, {"size": 5000},
                                     {"spacing": (float("inf"), 1.0, 5.0)}])
def test_options_that_pictures_have_no_use_for(tmp_path, options):
    jpeg_patient(tmp_path / "source/Patients_CT/001/brain")
    with pytest.raises(ValueError, match=next(iter(options)).replace("_", ".")):
        import_cohort("ct-ich", tmp_path / "source", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_pictures_of_impossible_pixels_are_skipped_like_volumes(tmp_path):
    jpeg_patient(tmp_path / "source/Patients_CT/001/brain")
    with pytest.raises(ValueError, match="none of 1 scans .*\n.*voxels of 50 x 50 x 5 mm"):
        import_cohort("ct-ich", tmp_path / "source", tmp_path / "out", spacing=(50.0, 50.0, 5.0))


def test_what_prediction_will_refuse_and_what_no_hematoma_is_are_told(tmp_path):
    jpeg_patient(tmp_path / "source/Patients_CT/001/brain", numbers=(9,))
    notes = str(import_cohort("ct-ich", tmp_path / "source", tmp_path / "out"))
    assert "prediction refuses it" in notes and "one slice of 40 x 40 pixels" in notes
    assert "the mask covers 50.0% of the scan" in notes
    lay_pairs(tmp_path / "pairs")
    store(tmp_path / "pairs/labels/a.nii.gz", 1 - blood(), axes="RAS")
    assert "the mask covers 99.2% of the scan" in str(import_cohort("pairs", tmp_path / "pairs", tmp_path / "inverted"))


def test_help_says_where_data_are_from():
    text = layout_help()
    for words in (*LAYOUTS, "physionet.org", "huggingface.co/datasets/WuBiao/BHSD", "instance.grand-challenge.org",
                  "mbhseg.com", "zenodo.org/records/8063221", "1 EDH, 2 IPH, 3 IVH, 4 SAH, 5 SDH", "cite"):
        assert words in text
    assert layout_help("bhsd") in text


# The table of layouts


OWN = Layout("hospital", ("NUMBER/scan.nii.gz", "NUMBER/bleed.nii.gz"), "our archive", files=(("NAME/scan.nii", "NAME/bleed.nii"),),
             codes=BLOOD)


def test_a_layout_of_ones_own_is_one_row(tmp_path, monkeypatch):
    monkeypatch.setattr("sahlora.cohorts.layouts.LAYOUTS", dict(LAYOUTS))
    register_layout(OWN)
    for number, first in (("17", 10), ("18", 4)):
        store(tmp_path / "source" / number / "scan.nii.gz", head(first), axes="RAS")
        store(tmp_path / "source" / number / "bleed.nii.gz", blood(first), axes="RAS")
    cohort = import_cohort("hospital", tmp_path / "source", tmp_path / "out").cohort
    assert cohort.patients == ["17", "18"] and set(cohort.table.site) == {"hospital"}
    assert [np.array_equal(mask, blood(first)) for (_, _, mask), first in zip(cohort, (10, 4))] == [True, True]
    assert "our archive" in layout_help()
    with pytest.raises(ValueError, match="'hospital' is registered already"):
        register_layout(OWN)
    (tmp_path / "source/18/bleed.nii.gz").unlink()
    with pytest.raises(ValueError, match="images without a mask: 18"):
        import_cohort("hospital", tmp_path / "source", tmp_path / "out")


def test_six_layouts_are_registered_and_say_which_options_matter():
    assert list(LAYOUTS) == list(LAY)
    own = {name: {"labels", "rater", "size"} & set(layout.option_names) for name, layout in LAYOUTS.items()}
    assert own == {"pairs": {"labels"}, "ct-ich": {"size"}, "bhsd": set(), "instance": set(), "mbh-seg": {"rater"}, "seg-cq500": set()}
    assert all({"blood", "patients", "site", "window", "spacing", "orientation", "fill_nan"} <= set(layout.option_names)
               for layout in LAYOUTS.values())


def test_choices_are_checked_without_a_file():
    asked = check_import("pairs", labels="1=SAH,2=drain", blood="sah", spacing=(0.5, 0.5, 5.0))
    assert (asked.codes, asked.blood, asked.site, asked.rater) == ({1: "SAH", 2: "drain"}, ("SAH",), "pairs", "majority")
    for layout, options, words in (("pairs", {"labels": "1=drain"}, "is 'drain' blood"), ("bhsd", {"labels": "1=EDH"}, "its own codes"),
                                   ("mbh-seg", {"rater": "mean"}, "--rater 'mean'"), ("bhsd", {"lables": "1=EDH"}, "lables is unknown"),
                                   ("ct-ich", {"size": 8}, "size"), ("tiff", {}, "--layout 'tiff' is unknown")):
        with pytest.raises(ValueError, match=words):
            check_import(layout, **options)
