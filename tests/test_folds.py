"""Folds and leaks: everybody is tested once, nobody twice under two names, and a file of folds is never redrawn."""
import json

import nibabel as nib
import numpy as np
import pytest
from pydantic import TypeAdapter

from sahlora.cohorts.checks import check_leakage
from sahlora.cohorts.cohort import Case, Cohort, volume_bin, write_cohort
from sahlora.cohorts.folds import (Fold, check_disjoint, check_folds, check_voxels, draw_folds, fewer, folds_for, folds_table, kfold,
                                   patient_volumes, read_folds, stratified)
from sahlora.study.experiment import DrawnFolds, FixedFold, FoldsSpec, make_folds
from sahlora.study.schema import read_study
from sahlora.training.loop import load_network, pretrain, save_network
from sahlora.training.transfer import Strategy, cross_validate
from sahlora.unet import MultiViewUnet

AFFINE = np.diag([-1.0, -1.0, 5.0, 1.0])


def scan(seed, ml=0.3):
    "A random volume (12, 16, 5) and a mask of `ml` millilitres."
    hu = np.random.default_rng(seed).integers(-1000, 1500, (12, 16, 5)).astype(np.int16)
    mask = np.zeros(hu.size, np.uint8)
    mask[: round(ml * 200)] = 1
    return hu, mask.reshape(hu.shape)


def cohort_of(folder, patients, seed=0, axes="LPS", dtype=np.int16, prefix=""):
    "A cohort of one scan per patient; the k-th scan depends on seed + k alone, however it is stored."
    cases = [Case(f"{prefix}{patient}-scan", f"{prefix}{patient}", "test", scan(seed + k)[0].astype(dtype),
                  scan(seed + k, 0.1 * (k + 1))[1], AFFINE) for k, patient in enumerate(patients)]
    cohort = write_cohort(folder, cases)
    for name in (*cohort.table.image, *cohort.table.label):
        image = nib.load(folder / name)
        turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes))
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine).as_reoriented(turn), folder / name)
    return cohort


@pytest.fixture
def cohort(tmp_path):
    return cohort_of(tmp_path / "target", [f"p{k}" for k in range(6)])


# The paper's folds


def test_folds_test_everybody_once_and_ignore_the_order():
    patients = [f"p{i}" for i in range(10)]
    folds = kfold(patients)
    assert sorted(p for fold in folds for p in fold.test) == sorted(patients)
    assert folds == kfold(patients[::-1]) != kfold(patients, seed=1)
    for fold in folds:
        assert check_disjoint(fold.train, fold.test, "fold") == 0


def test_kfold_is_scikit_learns():
    "The paper's thirty patients, as scikit-learn's KFold(3, shuffle=True, random_state=0) splits them."
    from sklearn.model_selection import KFold

    patients = [f"p{i:02d}" for i in range(30)]
    expected = [tuple(patients[i] for i in test) for _, test in KFold(3, shuffle=True, random_state=0).split(patients)]
    assert [fold.test for fold in kfold(patients)] == expected


@pytest.mark.parametrize("draw", [kfold, lambda patients, folds: stratified(dict.fromkeys(patients, 1.0), folds)])
@pytest.mark.parametrize("patients, folds", [(["a"], 2), (["a", "b"], 3), (["a", "b"], 1), (["a", "b"], 0), ([], 2)])
def test_too_few_patients(draw, patients, folds):
    with pytest.raises(ValueError, match="at least 2 folds and a patient in each"):
        draw(patients, folds)


# Stratified folds


def volumes(count=40, seed=0):
    ml = np.random.default_rng(seed).lognormal(3, 1.2, count).round(1)
    return {f"p{i:02d}": float(x) for i, x in enumerate(ml)}


@pytest.mark.parametrize("folds", [2, 3, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_each_bin_is_spread_evenly(folds, seed):
    ml = volumes()
    drawn, _ = stratified(ml, folds, seed)
    assert sorted(p for fold in drawn for p in fold.test) == sorted(ml)
    assert all(not set(fold.train) & set(fold.test) and len(fold.train) + len(fold.test) == 40 for fold in drawn)
    for name in {volume_bin(x) for x in ml.values()}:
        counts = [sum(volume_bin(ml[p]) == name for p in fold.test) for fold in drawn]
        assert max(counts) - min(counts) <= 1, (name, counts)
    assert stratified(dict(reversed(ml.items())), folds, seed)[0] == drawn, "the order does not matter"
    assert stratified(ml, folds, seed + 2)[0] != drawn


def test_small_bins_are_named():
    ml = {**{f"a{i}": 10.0 for i in range(6)}, "b": 30.0, "c": 60.0, "d": 60.0, "e": 0.0, "f": float("nan")}
    drawn, notes = stratified(ml, 3)
    assert sorted(p for fold in drawn for p in fold.test) == sorted(ml)
    assert notes == ("fewer than 3 patients in the bins 0 mL (1), 25-50 mL (1), 50-100 mL (2), unknown mL (1): not every "
                     "fold tests one",)
    assert stratified({f"a{i}": 10.0 for i in range(6)}, 3)[1] == ()


def test_only_small_bins():
    drawn, notes = stratified({"a": 10.0, "b": 30.0, "c": 60.0, "d": 200.0}, 2)
    assert notes == ("no volume bin holds 2 patients: drawn without bins",) and [len(fold.test) for fold in drawn] == [2, 2]


def test_unknown_volumes_are_one_bin():
    drawn, notes = stratified(dict.fromkeys("abcdef", float("nan")), 3)
    assert notes == () and [len(fold.test) for fold in drawn] == [2, 2, 2]


def test_a_patient_counts_with_the_largest_scan(tmp_path):
    cases = [Case(f"s{k}", patient, "x", *scan(k, ml), AFFINE) for k, (patient, ml) in
             enumerate([("b", 0.1), ("a", 0.2), ("b", 0.3)])]
    cohort = write_cohort(tmp_path / "one", cases)
    assert patient_volumes(cohort) == {"a": 0.2, "b": 0.3} and list(patient_volumes(cohort)) == ["a", "b"]
    assert draw_folds(cohort, "stratified", 2)[0] == stratified({"a": 0.2, "b": 0.3}, 2)[0]
    table = folds_table(cohort, [Fold(("a",), ("b",))])
    assert table["test"].tolist() == [1] and table["<25 mL"].tolist() == [1] and "0.3" in table["median mL (range)"][0]


# Leaks


@pytest.mark.parametrize("axes, dtype", [("LPS", np.int16), ("RAS", np.float32), ("SPR", np.float64), ("AIL", np.int32)])
def test_renamed_scans_between_cohorts(tmp_path, cohort, axes, dtype):
    other = cohort_of(tmp_path / "other", [f"p{k}" for k in range(3)], seed=4, axes=axes, dtype=dtype, prefix="q")
    other.table.drop(columns=["voxels", "sha256"]).to_csv(other.folder / "cohort.csv", index=False)
    other = Cohort.read(other.folder)
    with pytest.raises(ValueError) as error:
        check_leakage(cohort, other)
    assert "2 pairs of scans" in str(error.value) and "p4-scan = qp0-scan, p5-scan = qp1-scan" in str(error.value)
    assert check_leakage(cohort, other.select(["qp2"])) == 0


def test_a_shared_patient_between_cohorts(tmp_path, cohort):
    other = cohort_of(tmp_path / "other", ["p5", "new"], seed=50)
    with pytest.raises(ValueError, match="source and target: 1 patient is in both: p5$"):
        check_leakage(cohort, other)


def test_ten_pairs_are_listed_and_the_rest_counted():
    one, other = ({f"{name}{k:02d}": str(k) for k in range(13)} for name in "ab")
    with pytest.raises(ValueError, match="13 pairs .*a00 = b00, .*a09 = b09 and 3 more"):
        check_voxels(one, other, "here and there")
    with pytest.raises(ValueError, match="13 patients are in both: a00, .*a09 and 3 more"):
        check_disjoint(one, one, "here and there")
    assert check_voxels(one, {}, "") == check_voxels({}, one, "") == 0


def two_names(folder):
    "Patients a to d; a and b are one person, the one's scan stored as another's."
    cases = [Case(name, name, "x", *scan(0 if name in "ab" else ord(name)), AFFINE) for name in "abcd"]
    return write_cohort(folder, cases)


def test_one_person_in_two_folds(tmp_path):
    cohort = two_names(tmp_path / "twice")
    with pytest.raises(ValueError, match=r"fold 1: training and test: 1 pair of scans .* a = b; drop them"):
        check_folds(cohort, [Fold(("a", "b"), ("c",)), Fold(("a", "c"), ("b",))])
    assert check_folds(cohort, [Fold(("a", "b"), ("c", "d")), Fold(("c", "d"), ("a", "b"))]) == 0
    with pytest.raises(ValueError, match="training and test: 1 patient is in both: c"):
        check_folds(cohort, [Fold(("a", "c"), ("c",))])
    with pytest.raises(ValueError, match="has no patient z"):
        check_folds(cohort, [Fold(("a",), ("z",))])
    for method in ("kfold", "stratified"):
        with pytest.raises(ValueError, match="a = b|b = a"):
            draw_folds(cohort, method, 4)
        with pytest.raises(ValueError):
            folds_for(cohort, tmp_path / "folds.json", method, 4)
    assert not (tmp_path / "folds.json").exists()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A base that saw the scans 0, 1 and 2."
    folder = tmp_path_factory.mktemp("base")
    source = cohort_of(folder / "source", ["s0", "s1", "s2"])
    pretrain(source, folder, {"name": "multi-view-unet", "levels": 2},
             {"steps": 1, "batch_size": 2, "learning_rate": 1e-3, "seed": 0}, quiet=True)
    return folder / "model.safetensors"


def test_a_base_knows_its_scans_under_any_name(base, tmp_path):
    header = load_network(base)[1]
    assert header["patients"] == ["s0", "s1", "s2"] and set(header["voxels"]) == {"s0-scan", "s1-scan", "s2-scan"}
    target = cohort_of(tmp_path / "target", ["t0", "t1"], seed=2, axes="RAS", dtype=np.float32)
    with pytest.raises(ValueError, match="source and target: 1 pair of scans .* s2-scan = t0-scan"):
        cross_validate(base, target, Strategy("none"), kfold(target.patients, 2), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()
    clean = cohort_of(tmp_path / "clean", ["t0", "t1"], seed=3)
    table = cross_validate(base, clean, Strategy("none"), kfold(clean.patients, 2), tmp_path / "out", quiet=True)
    assert sorted(table.patient) == ["t0", "t1"]


def test_a_base_without_hashes_still_works(tmp_path, cohort):
    "Weights from elsewhere know patients at most."
    save_network(tmp_path / "old.safetensors", MultiViewUnet(levels=2), patients=["x"])
    few = cohort.select(["p0", "p1"])
    assert len(cross_validate(tmp_path / "old.safetensors", few, Strategy("none"), kfold(few.patients, 2), tmp_path / "out",
                              quiet=True)) == 2


def test_cross_validation_refuses_one_person_in_two_folds(base, tmp_path):
    cases = [Case(name, name, "x", *scan(1000 if name in "ab" else ord(name)), AFFINE) for name in "abcd"]
    cohort = write_cohort(tmp_path / "twice", cases)
    with pytest.raises(ValueError, match="training and test: 1 pair"):
        cross_validate(base, cohort, Strategy("none"), kfold(cohort.patients, 4), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


# Kept in a file


@pytest.mark.parametrize("method", ["kfold", "stratified"])
def test_a_file_is_written_once_and_used_again(cohort, tmp_path, method):
    path = tmp_path / "folds.json"
    drawn = folds_for(cohort, path, method, 3, 7)
    before = path.read_bytes()
    assert folds_for(cohort, path, method, 3, 7) == read_folds(path, cohort) == drawn
    assert path.read_bytes() == before
    content = json.loads(before)
    assert (content["method"], content["folds"], content["seed"]) == (method, 3, 7)
    assert content["patients"]["p1"] == {"blood_ml": 0.2, "voxels": [cohort.voxels["p1-scan"]]}
    path.unlink()
    folds_for(cohort, path, method, 3, 7)
    assert path.read_bytes() == before


def test_what_is_in_the_file_counts(cohort, tmp_path):
    "A split that was changed by hand is what the user wants."
    path = tmp_path / "folds.json"
    folds_for(cohort, path)
    content = json.loads(path.read_text())
    content["split"] = content["split"][::-1]
    path.write_text(json.dumps(content))
    assert folds_for(cohort, path) == kfold(cohort.patients)[::-1]


@pytest.mark.parametrize("options, words", [
    ({"method": "stratified"}, "method is kfold, asked is stratified"), ({"folds": 2}, "folds is 3, asked is 2"),
    ({"seed": 1}, "seed is 0, asked is 1"), ({"split": Fold(("p0",), ("p1",))}, "method is kfold, asked is fixed"),
    ({"method": "stratified", "seed": 5}, "asked is stratified; seed is 0, asked is 5")])
def test_other_requests_are_refused(cohort, tmp_path, options, words):
    path = tmp_path / "folds.json"
    folds_for(cohort, path)
    before = path.read_bytes()
    with pytest.raises(ValueError) as error:
        folds_for(cohort, path, **options)
    assert words in str(error.value) and "folds.json" in str(error.value) and "delete this one" in str(error.value)
    assert path.read_bytes() == before


def test_another_cohort_is_refused(cohort, tmp_path):
    path = tmp_path / "folds.json"
    folds_for(cohort, path, "stratified")
    with pytest.raises(ValueError, match="missing patients p0, p1;"):
        folds_for(cohort.select(cohort.patients[2:]), path, "stratified")
    more = cohort_of(tmp_path / "more", [f"p{k}" for k in range(7)])
    with pytest.raises(ValueError, match="new patients p6;"):
        read_folds(path, more)
    other = cohort_of(tmp_path / "other", [f"p{k}" for k in range(6)], seed=1)
    with pytest.raises(ValueError, match="other scans of p0, p1, p2, p3, p4 and 1 more"):
        read_folds(path, other)


def test_new_masks_matter_to_stratified_folds_alone(cohort, tmp_path):
    for method in ("kfold", "stratified"):
        folds_for(cohort, tmp_path / f"{method}.json", method)
    cohort.table.assign(blood_ml=[9.0, *cohort.table.blood_ml[1:]]).to_csv(cohort.folder / "cohort.csv", index=False)
    again = Cohort.read(cohort.folder)
    assert folds_for(again, tmp_path / "kfold.json") == kfold(cohort.patients)
    with pytest.raises(ValueError, match=r"other volumes of p0 \(0.1 mL, now 9.0\)"):
        folds_for(again, tmp_path / "stratified.json", "stratified")


def test_a_fixed_split(cohort, tmp_path):
    split = Fold(("p0", "p1"), ("p2",), fit=True)
    for _ in range(2):
        assert folds_for(cohort, tmp_path / "folds.json", split=split) == [split]
    with pytest.raises(ValueError, match="another fixed split"):
        folds_for(cohort, tmp_path / "folds.json", split=Fold(("p0",), ("p2",)))


@pytest.mark.parametrize("split", [[], [{"train": [], "test": ["p0"], "fit": False}], [{"train": ["p0"], "test": [], "fit": False}],
                                   [{"train": [0], "test": ["p1"], "fit": False}], [{"train": "p0", "test": ["p1"]}], [{"test": ["p1"]}],
                                   None, {"p0": 1}, ["p0"]])
def test_folds_without_patients_are_refused(cohort, tmp_path, split):
    path = tmp_path / "folds.json"
    folds_for(cohort, path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"split": split}))
    with pytest.raises(ValueError, match="folds.json: not a file of folds .* delete it to draw anew"):
        read_folds(path, cohort)


@pytest.mark.parametrize("method", ["kfold", "stratified"])
@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_can_not_be_are_named(cohort, tmp_path, method, seed):
    with pytest.raises(ValueError, match=f"seed is {seed}; give a whole number from 0 to 4294967295"):
        folds_for(cohort, tmp_path / "folds.json", method, seed=seed)
    assert not (tmp_path / "folds.json").exists()


@pytest.mark.parametrize("content", ["[]", "{}", '{"patients": {}}', '{"patients": {"p0": 1}}', "3", "{"])
def test_a_damaged_file(cohort, tmp_path, content):
    (tmp_path / "folds.json").write_text(content)
    for use in (folds_for, lambda cohort, path: read_folds(path, cohort)):
        with pytest.raises(ValueError, match="folds.json"):
            use(cohort, tmp_path / "folds.json")
    assert (tmp_path / "folds.json").read_text() == content


def test_a_leak_by_hand_is_found(cohort, tmp_path):
    path = tmp_path / "folds.json"
    folds_for(cohort, path)
    content = json.loads(path.read_text())
    content["split"][0]["train"].append(content["split"][0]["test"][0])
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="fold 0: training and test: 1 patient is in both"):
        read_folds(path, cohort)


def test_an_unknown_method(cohort, tmp_path):
    with pytest.raises(ValueError, match="'random': there are kfold, stratified"):
        folds_for(cohort, tmp_path / "folds.json", "random")


# In a study


@pytest.mark.parametrize("value, kind", [(3, int), ({"train": ["a"], "test": ["b"], "fit": True}, FixedFold),
                                         ({"method": "stratified", "count": 4, "seed": 1}, DrawnFolds),
                                         ({"method": "kfold"}, DrawnFolds)])
def test_three_forms(value, kind):
    assert isinstance(TypeAdapter(FoldsSpec).validate_python(value), kind)


@pytest.mark.parametrize("value, words", [
    ("1", "greater than or equal to 2"), ("{method: random}", "'kfold' or 'stratified'"),
    ("{method: stratified, count: 1}", "count"), ("{methd: stratified}", "did you mean 'method'"),
    ("{train: [a], tset: [b]}", "did you mean 'test'"), ("{train: [a], test: []}", "test"), ("three", "folds")])
def test_wrong_forms(project, tmp_path, value, words):
    text = (project / "paper/studies/smoke.yaml").read_text().replace("folds: 3", f"folds: {value}")
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        read_study(tmp_path / "mine.yaml")
    assert words in str(error.value) and "folds" in str(error.value)


def test_a_study_draws_into_a_file(cohort, tmp_path):
    for name, spec, expected in (("number", 2, kfold(cohort.patients, 2)),
                                 ("drawn", DrawnFolds(method="stratified", count=2), None),
                                 ("split", FixedFold(train=["p0"], test=["p1"], fit=True), [Fold(("p0",), ("p1",), True)])):
        drawn = make_folds(spec, cohort, tmp_path / f"{name}.json")
        assert drawn == (expected or stratified(patient_volumes(cohort), 2)[0])
        assert drawn == make_folds(spec, cohort, tmp_path / f"{name}.json") == read_folds(tmp_path / f"{name}.json", cohort)


def test_fewer_training_patients_lie_in_more_and_the_test_stays():
    fold = Fold(tuple(f"p{n}" for n in range(20)), ("q1", "q2"))
    parts = [fewer(fold, count) for count in (1, 5, 10, 20)]
    assert [len(part.train) for part in parts] == [1, 5, 10, 20] and {part.test for part in parts} == {fold.test}
    assert all(set(a.train) < set(b.train) for a, b in zip(parts, parts[1:])) and set(parts[-1].train) == set(fold.train)
    assert fewer(fold, 5) == fewer(Fold(fold.train[::-1], fold.test), 5) and fewer(fold, 5, seed=1) != fewer(fold, 5)
    for count in (0, 21):
        with pytest.raises(ValueError, match=f"{count}, but a fold trains on 20"):
            fewer(fold, count)
