"The phantom keeps its promises: same bits, same patient on every grid, blood where it may lie, HU where they belong."

import hashlib
import os
import subprocess
import sys

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from sahlora import phantom

GRID = (64, 80)
SEED = 11


def on_grid(fine: np.ndarray) -> np.ndarray:
    "A field of the fine lattice on the default grid, (X, Y, Z)."
    return phantom.regrid(phantom.thick(fine.astype(np.float32)), GRID).transpose(2, 1, 0)


@pytest.fixture(scope="module")
def built() -> list[tuple[phantom.Head, phantom.PhantomCase]]:
    "Six source and six target patients with their heads."
    out = []
    for kind in phantom.KINDS:
        for index in range(6):
            head = phantom.make_head(kind, SEED, index)
            out.append((head, phantom.scan_head(head, kind, SEED, index, GRID, 28)))
    return out


def test_same_bits_in_any_order(built) -> None:
    for index in (3, 0):
        for head, case in built:
            if case.index == index:
                again = phantom.make_case(case.kind, SEED, index)
                assert again.hu.tobytes() == case.hu.tobytes() and again.blood.tobytes() == case.blood.tobytes()
                assert again.affine.tobytes() == case.affine.tobytes() and again.info == case.info


def test_same_bits_in_another_process_with_more_threads(built) -> None:
    case = built[7][1]
    code = ("import hashlib; from sahlora.phantom import make_case;"
            f"c = make_case('{case.kind}', {SEED}, {case.index});"
            "print(hashlib.sha256(c.hu.tobytes() + c.blood.tobytes()).hexdigest())")
    env = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "5"}
    there = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert there.strip() == hashlib.sha256(case.hu.tobytes() + case.blood.tobytes()).hexdigest()


def test_cases_differ(built) -> None:
    seen = {case.hu.tobytes() for _, case in built}
    assert len(seen) == len(built)
    assert phantom.make_case("tbi", SEED + 1, 0).hu.tobytes() not in seen


def test_types_shapes_and_names(built) -> None:
    for _, case in built:
        assert case.hu.shape == case.blood.shape == (64, 80, 28)
        assert (case.hu.dtype, case.blood.dtype, case.affine.dtype) == (np.float32, np.uint8, np.float64)
        assert set(np.unique(case.blood)) <= {0, 1}
        assert -1024 <= case.hu.min() < -950 and 900 < case.hu.max() <= 3071
        assert case.hu.flags.c_contiguous and case.name == f"{case.kind}-{case.index:04d}"
    with pytest.raises(AttributeError):
        case.kind = "tbi"


@pytest.mark.parametrize("grid", [(128, 160), (256, 320)])
def test_volume_does_not_depend_on_the_grid(built, grid: tuple[int, int]) -> None:
    for head, case in built:
        other = phantom.scan_head(head, case.kind, SEED, case.index, grid, 28)
        assert other.hu.shape == (*grid, 28)
        assert other.info["blood_ml"] == pytest.approx(case.info["blood_ml"], rel=0.05, abs=0.4)


def test_blood_ml_is_the_masks_volume(built) -> None:
    for _, case in built:
        voxel = abs(np.linalg.det(case.affine[:3, :3])) / 1000
        assert case.info["blood_ml"] == pytest.approx(case.blood.sum() * voxel, abs=0.01)


def test_mask_is_half_blood_and_inside_the_skull(built) -> None:
    for head, case in built:
        fraction, depth = on_grid(head.blood), on_grid(head.depth)
        assert np.array_equal(case.blood == 1, fraction >= 0.5)
        assert (depth[case.blood == 1] > 0).all()
        assert head.blood[head.depth < 0].max() == 0  # not a fraction of a voxel in bone


def test_target_blood_keeps_to_csf_spaces(built) -> None:
    for head, case in built[6:]:
        assert set(case.info["lesions"]) <= {"subarachnoid", "intraventricular"}
        away = -head.csf[head.blood >= 0.5]  # mm from the CSF as it was before the bleed
        assert np.mean(away < 0) > 0.3 and np.mean(away < 3) > 0.95 and away.max() < 4.5


def test_target_blood_hugs_csf_more_than_source_blood(built) -> None:
    def share(part) -> float:
        csf = np.concatenate([head.csf[head.blood >= 0.5] for head, _ in part])
        return float(np.mean(csf > -1.5))

    assert share(built[6:]) > share(built[:6]) + 0.2


def test_target_blood_is_denser_near_its_source(built) -> None:
    slopes = []
    for head, case in built[6:]:
        x, y, z = phantom.ANEURYSMS[head.site]
        assert head.site == case.info["site"]
        where = head.lesions["subarachnoid"] >= 0.95
        warp = phantom.stream("asah", SEED, case.index, "warp")
        points = phantom.head_points(phantom.frame(head.tilt), head.who, warp)
        near = np.minimum(*(phantom.distance(points, (s * x, y, z)) for s in (-1, 1)))[where]
        hu = head.hu[where]
        slopes.append(hu[near < np.quantile(near, 0.3)].mean() - hu[near > np.quantile(near, 0.7)].mean())
    assert np.mean(slopes) > 1 and np.mean(np.array(slopes) > 0) >= 0.8


RANGES = {"csf": (4, 16), "white": (20, 31), "grey": (34, 45), "cerebellum": (31, 42), "fat": (-100, -45)}


@pytest.mark.parametrize("tissue", RANGES)
def test_tissue_hu(built, tissue: str) -> None:
    low, high = RANGES[tissue]
    medians = []
    for head, case in built:
        pure = on_grid(head.tissue == phantom.TISSUES.index(tissue)) > 0.97
        if pure.sum() > 20:
            medians.append(np.median(case.hu[pure]))
    assert len(medians) >= 4 and low < np.median(medians) < high


def test_oedema_stays_around_its_lesion(built) -> None:
    number, seen = phantom.TISSUES.index("oedema"), 0
    for head, case in built:
        there = head.tissue == number
        core = sum(head.lesions.get(name, 0) for name in ("contusion", "intraparenchymal"))
        if not isinstance(core, np.ndarray):
            assert not there.any()  # nothing else has oedema
            continue
        seen += 1
        away = ndimage.distance_transform_edt(core < 0.5, sampling=phantom.FINE_MM)[there]
        assert there.any() and away.max() < 20  # mm
    assert seen >= 1


def test_bone_is_bone(built) -> None:
    for head, _ in built[::4]:
        assert 700 < np.median(head.hu[head.tissue == phantom.TISSUES.index("table")]) < 1300


LESIONS = {"epidural": (56, 10), "subdural": (50, 12), "contusion": (48, 9), "intraparenchymal": (48, 9),
           "subarachnoid": (44, 8), "intraventricular": (40, 9)}


def test_lesion_hu(built) -> None:
    found = {}
    for head, case in built:
        for name, fraction in head.lesions.items():
            where = on_grid(fraction) >= 0.5
            if where.sum() >= 30:
                found.setdefault(name, []).append(float(np.median(case.hu[where])))
    assert {"subarachnoid", "intraventricular"} <= set(found) and len(set(found) & set(LESIONS)) >= 4
    for name, medians in found.items():
        middle, spread = LESIONS[name]
        assert abs(np.mean(medians) - middle) < spread, (name, medians)


def test_affine_axes_and_voxels(built) -> None:
    for _, case in built:
        assert nibabel.aff2axcodes(case.affine) == ("L", "P", "S")
        assert np.allclose(np.linalg.norm(case.affine[:3, :2], axis=0), 2.5)
        assert np.isclose(np.linalg.norm(case.affine[:3, 2]), 5 / np.cos(np.radians(case.info["tilt_deg"])), atol=1e-3)
    tilts = [case.info["tilt_deg"] for _, case in built]
    assert min(tilts) == 0 and 5 <= max(tilts) <= 20


def test_field_centre_stays_for_any_grid_and_slices() -> None:
    for grid, slices in (((64, 80), 28), ((128, 160), 28), ((64, 80), 27), ((64, 80), 10)):
        affine = phantom.make_case("tbi", SEED, 1, grid, slices, tilt=12).affine
        first = (28 - slices) // 2
        middle = [(grid[0] - 1) / 2, (grid[1] - 1) / 2, 13.5 - first, 1]
        assert np.allclose((affine @ middle)[:3], 0, atol=1e-9)


def test_fewer_slices_are_the_middle_ones() -> None:
    full, part = (phantom.make_case("asah", SEED, 2, slices=n) for n in (28, 12))
    assert np.array_equal(part.hu, full.hu[..., 8:20]) and np.array_equal(part.blood, full.blood[..., 8:20])
    assert np.allclose(part.affine @ [3, 4, 0, 1], full.affine @ [3, 4, 8, 1])


def test_tilt_shears_and_keeps_the_volume() -> None:
    flat, tilted = (phantom.make_case("asah", SEED, 4, tilt=t) for t in (0.0, 18.0))
    assert abs(np.linalg.det(flat.affine)) == pytest.approx(abs(np.linalg.det(tilted.affine)))
    assert tilted.affine[2, 1] == pytest.approx(-2.5 * np.sin(np.radians(18))) and flat.affine[2, 1] == 0
    assert tilted.info["blood_ml"] == pytest.approx(flat.info["blood_ml"], rel=0.05)
    centres = [ndimage.center_of_mass(c.hu[:, :, 24] > 300)[1] for c in (flat, tilted)]
    assert centres[1] - centres[0] > 3  # near the vertex the head moves back in the picture


def test_head_is_anatomy_the_right_way_round() -> None:
    case = phantom.make_case("tbi", SEED, 0, tilt=0.0)
    air = (case.hu[:, :, :10] < -400) & ndimage.binary_fill_holes(case.hu[:, :, :10].max(2) > -300)[..., None]
    assert np.argwhere(air)[:, 1].mean() < 40  # sinuses lie in front
    assert air.sum() > 200 and np.argwhere(air)[:, 0].mean() == pytest.approx(31.5, abs=4)  # and on both sides
    bone = (case.hu > 300).sum((0, 1))
    within = [ndimage.binary_fill_holes(plane > -300) & (plane < -400) for plane in np.moveaxis(case.hu, 2, 0)]
    assert sum(w.sum() for w in within[:10]) > 5 * sum(w.sum() for w in within[15:])  # sinuses below
    assert bone[27] < bone[14]  # the vertex above


def test_side_of_a_lesion_is_the_side_in_the_volume() -> None:
    tried = 0
    for index in range(30):
        lesions = phantom.plan_trauma(SEED, index)
        if len(lesions) == 1 and lesions[0].type in ("epidural", "subdural") and tried < 3:
            case = phantom.make_case("tbi", SEED, index, tilt=0.0)
            x = nibabel.affines.apply_affine(case.affine, np.argwhere(case.blood))[:, 0].mean()
            assert np.sign(x) == -lesions[0].side  # RAS+: the left is negative
            tried += 1
    assert tried == 3


def test_volume_bins_are_filled() -> None:
    target = [sum(phantom.plan_bleed(SEED, k)[2:]) for k in range(30)]
    assert (np.histogram(target, [0, 25, 50, 100, 200])[0] >= 3).all()
    source = np.array([sum(a.ml for a in phantom.plan_trauma(SEED, k)) for k in range(46)])
    assert 2 <= (source == 0).sum() <= 10 and source[source > 0].min() >= 2 and source.max() <= 160
    types = {a.type for k in range(46) for a in phantom.plan_trauma(SEED, k)}
    assert types == {"epidural", "subdural", "contusion", "intraparenchymal"}


def test_what_was_asked_for_is_there(built) -> None:
    for head, case in built[:6]:
        asked = {}
        for lesion in phantom.plan_trauma(SEED, case.index):
            asked[lesion.type] = asked.get(lesion.type, 0) + lesion.ml
        assert set(asked) == set(case.info["lesions"])
        if not asked:
            assert case.blood.sum() == 0
        for name, ml in asked.items():
            assert case.info["lesions"][name] == pytest.approx(ml, rel=0.2, abs=1)
    for head, case in built[6:]:
        asked = sum(phantom.plan_bleed(SEED, case.index)[2:])
        assert case.info["blood_ml"] == pytest.approx(asked, rel=0.2)


def test_noise_is_as_strong_as_it_says() -> None:
    for sigma, grid in ((3.0, (64, 80)), (5.0, (128, 160))):
        assert phantom.grain(phantom.stream("tbi", 0, 0, "x"), grid, sigma).std() == pytest.approx(sigma, rel=1e-3)


def test_a_threshold_does_not_solve_it(built) -> None:
    cuts, scores = np.arange(36, 64), []
    for head, case in built[6:]:
        brain = on_grid(np.clip(head.depth + 0.5, 0, 1)) > 0.9
        hu, truth = case.hu[brain], case.blood[brain] > 0
        scores.append([2 * (truth & (hu >= t)).sum() / (truth.sum() + (hu >= t).sum()) for t in cuts])
    assert 0.1 < np.mean(scores, axis=0).max() < 0.5


@pytest.mark.parametrize(
    "request_, word",
    [
        (dict(kind="stroke"), "kind"), (dict(index=-1), "index"), (dict(index=1.5), "index"), (dict(seed=-2), "seed"),
        (dict(seed=True), "seed"), (dict(grid=(63, 80)), "grid"), (dict(grid=(64, 8)), "grid"),
        (dict(grid=(64,)), "grid"), (dict(grid=(64.0, 80)), "grid"), (dict(slices=0), "slices"),
        (dict(slices=29), "slices"), (dict(tilt=45), "tilt"), (dict(tilt=float("nan")), "tilt"),
    ],
)
def test_bad_requests_are_named(request_: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        phantom.make_case(**(dict(kind="tbi", seed=0, index=0) | request_))


def test_imports_are_light() -> None:
    code = "import sys, sahlora.phantom; print([m for m in ('torch', 'nibabel', 'matplotlib') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"
