"""Scores against MONAI, against brute force in millimetres, and at the edges where scores do not exist."""
import io
import math
import warnings
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from sahlora.ct import HeadCT
from sahlora.evaluation import scores
from sahlora.evaluation.scores import (BINS, METRICS, MIN_LESION_ML, VOLUMES, Metric, bounding_box, by_bin, dice, empty_side, f1,
                                find_lesions, hausdorff, lesion_counts, place_mm, score_patient, slice_counts,
                                register_metric, summarize, surface, surface_dice, surface_distances, surface_heading,
                                surface_tolerance, volume_bin, voxel_edges)

UNDEFINED = ("dice_soft", "dice_hard", "nsd", "hd95_mm", "lesion_f1", "slice_sensitivity")


def scan(shape, mm=(1.0, 1.0, 1.0), shear=(0.0, 0.0), origins=None) -> HeadCT:
    "A scan of zeros on a grid; shear: mm that each slice slides along x and y."
    affine = np.diag([*mm, 1.0])
    affine[:2, 2] = shear
    affine[:3, 3] = -80, -100, 30
    return HeadCT(np.zeros(shape, np.float32), affine, origins=origins)


def uneven(shape, z, slide=0.0, mm=(0.5, 0.5)) -> HeadCT:
    "A scan whose slices lie at heights z (Z,), sliding `slide` mm in y per mm of height."
    z = np.asarray(z, float)
    first = [0, slide * (z[1] - z[0]), z[1] - z[0]]
    affine = np.eye(4)
    affine[0, 0], affine[1, 1], affine[:3, 2] = *mm, first
    return HeadCT(np.zeros(shape, np.float32), affine, origins=np.stack([0 * z, slide * z, z], 1))


def masks(shape, seed, smooth=1.2):
    "Two random, smooth, overlapping masks, of 5 to 60 % of the volume."
    rng = np.random.default_rng(seed)
    base = ndimage.gaussian_filter(rng.random(shape), smooth)
    fields = [base + 0.5 * ndimage.gaussian_filter(rng.random(shape), smooth) for _ in range(2)]
    return [field > np.quantile(field, rng.uniform(0.4, 0.95)) for field in fields]


def specks(shape, seed):
    "Two masks of a few scattered voxels, none in the lowest two slices: the nearest one is often slices away."
    rng = np.random.default_rng(seed)
    fields = rng.random((2, *shape))
    fields[..., :2] = 1
    return [field <= np.sort(field.ravel())[n] for field, n in zip(fields, rng.integers(1, 12, 2))]


def monai_hd95(a, b, mm) -> float:
    "HD95 by MONAI."
    from monai.metrics import compute_hausdorff_distance

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a, b = (torch.from_numpy(np.ascontiguousarray(m, dtype=np.float32))[None, None] for m in (a, b))
        spacing = tuple(float(x) for x in mm)
        return compute_hausdorff_distance(a, b, include_background=True, percentile=95, spacing=spacing).item()


def hd95(a, b, ct) -> float:
    return hausdorff(*surface_distances(a, b, ct))


def equal(mine, theirs) -> None:
    "Equal HD95 to a micrometre: MONAI finds the percentile's rank in float32, so it lies off by some 1e-5 of the gap between two distances."
    np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-3)


def same(one, other) -> None:
    "The same scores of a patient, NaN where NaN is."
    assert list(one) == list(other)
    for name, value in one.items():
        expected = other[name]
        assert value == (expected if isinstance(value, str) else pytest.approx(expected, rel=1e-9, nan_ok=True)), name


def brute_surface(mask) -> np.ndarray:
    "Surface voxels (N, 3), voxel by voxel."
    padded, found = np.pad(mask, 1), []
    for x, y, z in np.argwhere(mask):
        block = padded[x : x + 3, y : y + 3, z : z + 3]
        faces = block[0, 1, 1], block[2, 1, 1], block[1, 0, 1], block[1, 2, 1], block[1, 1, 0], block[1, 1, 2]
        if not all(faces):
            found.append((x, y, z))
    return np.array(found, dtype=int).reshape(-1, 3)


def brute_distances(a, b, place) -> list[np.ndarray]:
    "All pairs of surface voxels, places in mm by `place(i, j, k)`."
    one, other = (np.array([place(*v) for v in brute_surface(m)]) for m in (a, b))
    pairs = np.sqrt(((one[:, None] - other[None]) ** 2).sum(-1))
    return [pairs.min(1), pairs.min(0)]


# Dice


@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_dice_is_the_formula_symmetric_and_bounded(seed):
    rng = np.random.default_rng(seed)
    p, t = rng.random((6, 5, 4)), rng.random((6, 5, 4)) < rng.random()
    value = dice(p, t)
    assert value == pytest.approx(2 * sum(p[i] * t[i] for i in np.ndindex(p.shape)) / (p.sum() + t.sum()))
    hard = p >= 0.5
    assert 0 <= value <= 1 and dice(hard, t) == dice(t, hard)
    if t.any():
        assert dice(t, t) == 1


def test_dice_equals_monai():
    from monai.metrics import compute_dice

    for seed in range(10):
        a, b = masks((12, 14, 6), seed)
        expected = compute_dice(*(torch.from_numpy(m.astype(np.float32))[None, None] for m in (a, b))).item()
        assert dice(a, b) == pytest.approx(expected, abs=1e-6)


def test_dice_refuses_other_shapes_and_calls_two_empties_missing():
    with pytest.raises(ValueError, match="same shape"):
        dice(np.zeros((2, 2, 2)), np.zeros((2, 2, 3)))
    nothing = np.zeros((2, 2, 2))
    assert math.isnan(dice(nothing, nothing)) and dice(nothing, nothing + 1) == 0 == dice(nothing + 1, nothing)


# Surfaces


@pytest.mark.parametrize("mm", [(1, 1, 1), (0.5, 0.5, 5), (0.4, 2, 2.5), (3, 0.7, 1.1), (0.488281, 0.488281, 4.8)])
@pytest.mark.parametrize("shape", [(16, 14, 9), (1, 20, 5), (20, 20, 1), (3, 3, 3)])
def test_hd95_equals_monai(mm, shape):
    for seed in range(8):
        a, b = masks(shape, seed, 1.0)
        if a.any() and b.any():
            equal(hd95(a, b, scan(shape, mm)), monai_hd95(a, b, mm))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_hd95_equals_monai_anywhere(data):
    shape = data.draw(st.tuples(*[st.integers(1, 9)] * 3))
    mm = [data.draw(st.integers(4, 120)) / 20 for _ in range(3)]
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    a, b = (rng.random(shape) < data.draw(st.floats(0.02, 0.98)) for _ in range(2))
    if a.any() and b.any():
        equal(hd95(a, b, scan(shape, mm)), monai_hd95(a, b, mm))


def test_one_voxel_masks_and_masks_at_the_border_equal_monai():
    shape, mm = (5, 6, 4), (0.5, 1.5, 5.0)
    for one, other in product([(0, 0, 0), (4, 5, 3), (2, 3, 1)], repeat=2):
        a, b = np.zeros(shape, bool), np.zeros(shape, bool)
        a[one] = b[other] = True
        far = math.dist(np.multiply(one, mm), np.multiply(other, mm))
        assert hd95(a, b, scan(shape, mm)) == pytest.approx(far)
        equal(hd95(a, b, scan(shape, mm)), monai_hd95(a, b, mm))
    full = np.ones(shape, bool)
    equal(hd95(full, b, scan(shape, mm)), monai_hd95(full, b, mm))


def test_a_distance_of_exactly_the_tolerance_counts():
    for step in (0.1, 0.2, 0.4, 0.5, 1.0, 2.0, np.float32(0.4)):
        n = round(2 / step)
        a, b = np.zeros((n + 3, 1, 1), bool), np.zeros((n + 3, 1, 1), bool)
        a[0], b[n] = True, True
        edges = (float(step), 1.0, 1.0)
        assert surface_dice(a, b, edges, 2.0) == 1, step
        assert surface_dice(a, np.roll(b, 1), edges, 2.0) == 0.5, step  # the near ends of both voxels are exactly 2 mm apart
        assert surface_dice(a, np.roll(b, 2), edges, 2.0) == 0, step


def box_pieces(low, high, mm):
    "Area in mm2 and place in mm of each piece of a box's surface; its voxels are low to high (past the last), mm their edges."
    pieces = []
    for corner in product(*(range(a, b + 1) for a, b in zip(low, high))):
        ends = [at in (a, b) for at, a, b in zip(corner, low, high)]
        x, y, z = (mm[i] for i in range(3))
        if sum(ends) == 3:  # a corner of the box: a triangle between three middles of edges
            area = math.sqrt((x * y) ** 2 + (y * z) ** 2 + (z * x) ** 2) / 8
        elif sum(ends) == 2:  # an edge of it: a strip as long as a voxel, aslant between two middles
            along, across = mm[ends.index(False)], [mm[i] for i in range(3) if ends[i]]
            area = along * math.hypot(*across) / 2
        elif sum(ends) == 1:  # a face
            area = x * y * z / mm[ends.index(True)]
        else:
            continue
        pieces.append((area, np.multiply(corner, mm)))
    return np.array([area for area, _ in pieces]), np.array([place for _, place in pieces])


@pytest.mark.parametrize("mm", [(0.83, 0.83, 5.0), (1.0, 1.0, 1.0), (5.0, 0.4, 2.0)])
@pytest.mark.parametrize("low, high", [((2, 2, 2), (9, 8, 6)), ((2, 2, 3), (16, 8, 4)), ((0, 0, 0), (18, 10, 8)), ((12, 1, 0), (17, 9, 8))])
def test_surface_dice_of_boxes_is_the_area_by_hand(mm, low, high):
    "The pieces of a box's surface are triangles, strips and rectangles: their areas and distances need no table."
    t, hard = np.zeros((18, 10, 8), bool), np.zeros((18, 10, 8), bool)
    t[2:9, 2:8, 2:6] = True
    hard[tuple(slice(a, b) for a, b in zip(low, high))] = True
    one, other = box_pieces((2, 2, 2), (9, 8, 6), mm), box_pieces(low, high, mm)
    distances = np.sqrt(((one[1][:, None] - other[1][None]) ** 2).sum(-1))
    for tolerance in (max(mm), 2.03 * max(mm)):
        near = one[0][distances.min(1) <= tolerance + 1e-4].sum() + other[0][distances.min(0) <= tolerance + 1e-4].sum()
        assert surface_dice(hard, t, mm, tolerance) == pytest.approx(near / (one[0].sum() + other[0].sum()), rel=1e-5)


def test_walls_of_thick_slices_weigh_by_their_area():
    "A bleed predicted too wide: its top and bottom are right, and hold most voxels, but little of the surface."
    x, y, z = np.mgrid[-30:30, -30:30, :10]
    t, hard = ((np.hypot(x, y) <= radius) & (z >= 2) & (z < 8) for radius in (15, 25))
    ct = scan(t.shape, (0.83, 0.83, 5.0))
    counted = np.mean(np.concatenate(surface_distances(hard, t, ct)) <= 5)
    r, wide, height, out = 15.5 * 0.83, 25.5 * 0.83, 30, 5.0  # of cylinders, mm
    near = 2 * r**2 + 2 * (r + out) ** 2 + 2 * r * 2 * out  # tops, and of the inner wall what lies near the wide top; without pi
    by_hand = near / (2 * r**2 + 2 * wide**2 + 2 * (r + wide) * height)
    scores = score_patient(1.0 * hard, t, ct)
    assert scores["nsd"] == pytest.approx(by_hand, abs=0.05) and counted > scores["nsd"] + 0.2


@given(st.integers(0, 10**6), st.permutations(range(3)))
@settings(max_examples=25, deadline=None)
def test_surface_dice_knows_no_axis_no_place_and_no_order(seed, axes):
    mm, (a, b) = np.array([0.7, 1.9, 4.0]), masks((7, 8, 6), seed, 0.8)
    value = surface_dice(a, b, tuple(mm), 4.0)
    assert 0 <= value <= 1 and surface_dice(b, a, tuple(mm), 4.0) == pytest.approx(value, abs=1e-6)
    turned = surface_dice(a.transpose(axes)[::-1], b.transpose(axes)[::-1], tuple(mm[list(axes)]), 4.0)
    assert turned == pytest.approx(value, abs=1e-6)
    moved = surface_dice(*(np.pad(m, ((2, 1), (0, 3), (1, 2))) for m in (a, b)), tuple(mm), 4.0)
    assert moved == pytest.approx(value, abs=1e-6)
    assert surface_dice(a, b, tuple(3 * mm), 12.0) == pytest.approx(value, abs=1e-4)


def test_a_tolerance_is_not_below_the_voxel():
    a, b = masks((9, 9, 6), 1)
    ct = HeadCT(np.zeros(a.shape, np.float32), np.diag([0.5, 0.5, 4.8000002, 1]), "scans/one.nii.gz")
    with pytest.raises(ValueError, match=r"scans/one\.nii\.gz.*2 mm.*4\.8 mm; state 4\.8 mm or more"):
        score_patient(1.0 * a, b, ct, 2.0)
    for bad in (-1.0, 0.0, 4.79, math.nan):
        with pytest.raises(ValueError, match="state 4.8 mm or more"):
            score_patient(1.0 * a, b, ct, bad)
    assert score_patient(1.0 * a, b, ct)["tolerance_mm"] == score_patient(1.0 * a, b, ct, 4.8)["tolerance_mm"] == 4.8
    wider = score_patient(1.0 * a, b, ct, 9.0)
    assert wider["tolerance_mm"] == 9 and wider["nsd"] >= score_patient(1.0 * a, b, ct)["nsd"]


def test_one_tolerance_for_a_study():
    assert surface_tolerance([0.45, 2.5, 5.0]) == 5 and surface_tolerance([2.5, 4.81]) == 4.9
    assert surface_tolerance([float(np.float32(4.8))]) == 4.8 and surface_tolerance([5.0], 6.5) == 6.5
    assert surface_tolerance([]) is None and surface_tolerance([], 3.0) == 3
    with pytest.raises(ValueError, match="mine: the surface tolerance of 2 mm .* 5 mm; state 5 mm or more"):
        surface_tolerance([2.5, 5.0], 2.0, "mine")


def test_voxels_that_are_no_boxes_of_one_size_have_no_surface_dice():
    shape = (9, 9, 7)
    a, b = masks(shape, 2)
    z = [0, 2.5, 5, 7.5, 12.5, 17.5, 22.5]
    sheared = np.eye(4)
    sheared[0, 1] = 0.1
    for ct in (uneven(shape, z), HeadCT(np.zeros(shape, np.float32), sheared)):
        scores = score_patient(1.0 * a, b, ct, 1.0)  # nor is a tolerance measured by them
        assert voxel_edges(ct) is None and math.isnan(scores["nsd"]) and math.isnan(scores["tolerance_mm"]) and scores["hd95_mm"] >= 0
    nearly = scan(shape, (0.5, 0.5, 5), (0, 0.02))  # a quarter of a degree
    assert max(voxel_edges(nearly)) == pytest.approx(5, rel=1e-4) and score_patient(1.0 * a, b, nearly)["nsd"] > 0


@pytest.mark.parametrize("pixels", [1, -2])
def test_a_tilted_scan_has_the_surface_dice_of_the_same_bleed_without_tilt(pixels):
    "The gantry shifts each slice by whole pixels against the one below; the anatomy stays where it is."
    shape, spacing = (12, 30, 6), (0.9, 0.9, 4.0)
    a, b = (np.pad(mask, ((0, 0), (10, 10), (0, 0))) for mask in masks((12, 10, 6), 3))
    tilted = [np.stack([np.roll(mask[..., k], -pixels * k, axis=1) for k in range(6)], -1) for mask in (a, b)]
    affine = np.diag([*spacing, 1.0])
    affine[1, 2] = pixels * spacing[1]
    straight, slanted = (HeadCT(np.zeros(shape, np.float32), one) for one in (np.diag([*spacing, 1.0]), affine))
    wanted, found = score_patient(1.0 * a, b, straight), score_patient(1.0 * tilted[0], tilted[1], slanted)
    assert abs(slanted.tilt) > 10 and found["tolerance_mm"] == wanted["tolerance_mm"] == 4
    assert found["nsd"] == pytest.approx(wanted["nsd"], abs=1e-9) and 0 < wanted["nsd"]


@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_surface_is_erosions_complement(seed):
    rng = np.random.default_rng(seed)
    mask = rng.random(rng.integers(1, 8, 3)) < rng.random()
    assert np.array_equal(surface(mask), mask & ~ndimage.binary_erosion(mask))
    assert np.array_equal(np.argwhere(surface(mask)), brute_surface(mask))


def test_surface_takes_an_empty_array_and_leaves_its_argument():
    assert surface(np.zeros((0, 3, 2), bool)).shape == (0, 3, 2)
    mask = np.ones((4, 4, 4), bool)
    assert surface(mask).sum() == 64 - 8 and mask.all()


@pytest.mark.parametrize("shear", [(0, 0), (0, 1.8), (-0.7, 2.6)])
def test_tilted_scans_equal_brute_force_in_mm(shear):
    shape, mm = (11, 12, 6), (0.6, 0.6, 5.0)
    ct = scan(shape, mm, shear)
    for seed in range(12):
        a, b = specks(shape, seed) if seed % 3 else masks(shape, seed, 1.0)
        expected = brute_distances(a, b, lambda i, j, k: (0.6 * i + shear[0] * k, 0.6 * j + shear[1] * k, 5.0 * k))
        for mine, theirs in zip(surface_distances(a, b, ct), expected):
            np.testing.assert_allclose(mine, theirs, atol=1e-9)


@pytest.mark.parametrize("slide", [0.0, 0.35])
def test_uneven_scans_equal_brute_force_in_mm(slide):
    z = [0, 2.5, 5, 7.5, 12.5, 17.5, 22.5]
    ct = uneven((11, 12, 7), z, slide)
    assert len(ct.stacks) == 2
    for seed in range(12):
        a, b = specks((11, 12, 7), seed) if seed % 3 else masks((11, 12, 7), seed, 1.0)
        expected = brute_distances(a, b, lambda i, j, k: (0.5 * i, 0.5 * j + slide * z[k], z[k]))
        for mine, theirs in zip(surface_distances(a, b, ct), expected):
            np.testing.assert_allclose(mine, theirs, atol=1e-9)


def test_a_spacing_per_axis_would_be_wrong_in_a_tilted_scan():
    ct = scan((11, 30, 6), (0.6, 0.6, 5.0), (0, 2.6))
    mask = np.zeros(ct.hu.shape, bool)
    mask[3:8, 8:22, 1:4] = True
    higher = np.roll(mask, 1, 2)
    assert monai_hd95(higher, mask, ct.spacing) - hd95(higher, mask, ct) > 0.2


@given(st.integers(0, 10**6), st.floats(0.5, 3))
@settings(max_examples=30, deadline=None)
def test_surface_scores_symmetry_translation_scale(seed, scale):
    shape, mm, shear = (9, 8, 6), np.array([0.7, 0.7, 4.0]), np.array([0.3, 1.1])
    a, b = specks(shape, seed) if seed % 2 else masks(shape, seed, 0.8)
    there, back = surface_distances(a, b, scan(shape, mm, shear))
    swapped = surface_distances(b, a, scan(shape, mm, shear))
    assert np.array_equal(swapped[0], back) and np.array_equal(swapped[1], there)
    assert 0 <= hausdorff(there, back) <= max(there.max(), back.max())
    assert hausdorff(there, back, 100) == max(there.max(), back.max())
    moved = surface_distances(*(np.pad(m, ((2, 1), (0, 3), (1, 2))) for m in (a, b)), scan((12, 11, 9), mm, shear))
    np.testing.assert_allclose(np.concatenate(moved), np.concatenate([there, back]), atol=1e-9)
    larger = surface_distances(a, b, scan(shape, scale * mm, scale * shear))
    np.testing.assert_allclose(np.concatenate(larger), scale * np.concatenate([there, back]), atol=1e-9)


def test_turning_the_scan_in_space_changes_nothing():
    shape, ct = (12, 13, 7), scan((12, 13, 7), (0.6, 0.6, 5.0), (0.2, 1.3))
    angle = 0.4
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    turned = HeadCT(ct.hu, turn @ ct.affine)
    for seed in range(6):
        a, b = specks(shape, seed) if seed % 2 else masks(shape, seed)
        one, other = score_patient(1.0 * a, b, ct), score_patient(1.0 * a, b, turned)
        same(one, other)


def test_place_mm_is_the_affine():
    ct = scan((5, 6, 7), (0.5, 0.7, 4.0), (0.3, 1.0))
    voxels = np.argwhere(np.ones((5, 6, 7)))
    expected = (np.c_[voxels, np.ones(len(voxels))] @ ct.affine.T)[:, :3] - ct.affine[:3, 3]
    np.testing.assert_allclose(place_mm(ct, voxels), expected, atol=1e-12)


def test_bounding_box_of_several_masks():
    a, b = np.zeros((6, 7, 8), bool), np.zeros((6, 7, 8), bool)
    a[2, 3, 4] = b[4, 1, 7] = True
    assert bounding_box(a, b) == (slice(2, 5), slice(1, 4), slice(4, 8))
    assert bounding_box(0 * a, 0 * b) == (slice(0, 0),) * 3


# Lesions


def brute_lesions(mask) -> list[set]:
    "26-connected components as sets of voxels, by flooding."
    left, found = {tuple(int(x) for x in v) for v in np.argwhere(mask)}, []
    while left:
        wave = {left.pop()}
        component = set(wave)
        while wave:
            wave = {tuple(np.add(v, d)) for v in wave for d in product((-1, 0, 1), repeat=3)} & left
            left -= wave
            component |= wave
        found.append(component)
    return found


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=60, deadline=None)
def test_lesion_counts_equal_brute_force(seed, known):
    rng = np.random.default_rng(seed)
    hard, t = (rng.random((7, 6, 5)) < rng.uniform(0.02, 0.2) for _ in range(2))
    hard[..., : seed % 3] = t[..., : seed % 3] = False  # so that the box around them starts higher
    slice_ml = rng.uniform(0.02, 0.08, 5) if known else None

    def counts(component):
        return sum(slice_ml[v[2]] for v in component) >= MIN_LESION_ML if known else len(component) >= 3

    guesses, lesions = brute_lesions(hard), brute_lesions(t)
    serious = set().union(*(g for g in guesses if counts(g)))
    blood = set().union(*lesions)
    judged = [bool(lesion & serious) for lesion in lesions if counts(lesion)]
    false = sum(1 for guess in guesses if counts(guess) and not guess & blood)
    assert lesion_counts(hard, t, slice_ml) == (sum(judged), false, len(judged) - sum(judged))


def test_lesions_by_hand():
    t, hard = np.zeros((12, 12, 4), bool), np.zeros((12, 12, 4), bool)
    t[1:3, 1:3, 1:3], t[8:10, 1:3, 1:3], t[1, 9, 0] = True, True, True
    hard[1:10, 2, 1] = True  # one prediction finds two lesions
    assert lesion_counts(hard, t) == (2, 0, 0)
    hard[6:8, 8:10, 3] = True  # away from all blood
    assert lesion_counts(hard, t) == (2, 1, 0) and f1(2, 1, 0) == 0.8
    hard[0:3, 9, 0] = True  # on a speck that is too small to count: no false alarm
    assert lesion_counts(hard, t) == (2, 1, 0)
    assert lesion_counts(hard, t, min_voxels=1) == (3, 1, 0)
    assert lesion_counts(0 * t, t) == (0, 0, 2) and lesion_counts(t, 0 * t) == (0, 2, 0)
    assert math.isnan(f1(0, 0, 0)) and f1(0, 1, 0) == 0 == f1(0, 0, 1)


def test_a_volume_of_exactly_the_minimum_counts_and_corners_join():
    mask = np.zeros((10, 10, 4), bool)
    mask[:10, 0, 0] = True
    slice_ml = np.array([0.01, 0.02, 0.01, 0.01])
    assert find_lesions(mask, slice_ml)[1].sum() == 1
    mask[9, 0, 0] = False
    assert find_lesions(mask, slice_ml)[1].sum() == 0
    mask[9, 1, 1] = True  # a corner away, and in a slice that owns twice as much
    assert find_lesions(mask, slice_ml)[1].sum() == 1
    assert find_lesions(mask, slice_ml, min_ml=0.0)[1].tolist() == [False, True]


# Slices, volumes, bins


def test_slices_by_hand():
    t, hard = np.zeros((3, 3, 6), bool), np.zeros((3, 3, 6), bool)
    t[0, 0, [0, 1, 2]] = hard[2, 2, [2, 3]] = True
    assert slice_counts(hard, t) == (1, 1, 2, 2)
    scores = score_patient(1.0 * hard, t)
    assert scores["slice_sensitivity"] == pytest.approx(1 / 3) and scores["slice_specificity"] == pytest.approx(2 / 3)
    everywhere = score_patient(np.ones((3, 3, 6)), np.ones((3, 3, 6), np.uint8))
    assert everywhere["slice_sensitivity"] == 1 and math.isnan(everywhere["slice_specificity"])


def test_volumes_of_uneven_and_tilted_slices():
    z = [0, 2.5, 5, 7.5, 12.5, 17.5]
    owned = [2.5, 2.5, 2.5, 3.75, 5, 5]
    rng = np.random.default_rng(0)
    p, t = rng.random((6, 5, 6)), rng.random((6, 5, 6)) < 0.3
    for slide in (0.0, 0.4):
        ct = uneven(p.shape, z, slide)
        scores, ml = score_patient(p, t, ct), 0.5 * 0.5 * np.array(owned) / 1000
        assert scores["volume_ml"] == pytest.approx(sum(t[..., k].sum() * ml[k] for k in range(6)))
        assert scores["predicted_ml"] == pytest.approx(sum(p[..., k].sum() * ml[k] for k in range(6)))
        assert scores["predicted_hard_ml"] == pytest.approx(ct.volume_ml(p >= 0.5))


def test_bins_drop_nothing():
    volumes = [0, 1e-9, 24.999, 25, 49.999, 50, 99.999, 100, 1e4, math.nan]
    expected = ["0", "<25", "<25", "25-50", "25-50", "50-100", "50-100", ">100", ">100", "unknown"]
    assert [volume_bin(ml) for ml in volumes] == expected and set(expected) == {*BINS, "unknown"}
    with pytest.raises(ValueError, match="volume"):
        volume_bin(-1.0)


# A patient


def test_keys_and_types_of_a_patient():
    a, b = masks((12, 12, 6), 0)
    for ct in (None, scan((12, 12, 6), (1, 1, 5))):
        scores = score_patient(np.where(a, 0.9, 0.1).astype(np.float32), b.astype(np.uint8), ct)
        assert list(scores) == ["dice_soft", "dice_hard", "nsd", "tolerance_mm", "hd95_mm", "lesion_f1", "lesion_tp", "lesion_fp",
                                "lesion_fn", "slice_sensitivity", "slice_specificity", "slice_tp", "slice_fp",
                                "slice_fn", "slice_tn", *VOLUMES, "volume_bin", "empty"]
        assert {type(value) for value in scores.values()} == {float, int, str}
        in_mm = [scores[name] for name in ("nsd", "tolerance_mm", "hd95_mm", *VOLUMES)]
        assert all(map(math.isnan, in_mm)) if ct is None else not any(map(math.isnan, in_mm))
        assert scores["volume_bin"] == ("unknown" if ct is None else "<25")
        anyway = ("dice_soft", "dice_hard", "lesion_f1", "slice_sensitivity")
        assert not any(math.isnan(scores[name]) for name in anyway)


def test_a_metric_of_ones_own_is_scored_after_the_others(monkeypatch):
    monkeypatch.setitem(METRICS, "recall", Metric("recall", "", "higher", "share found", lambda one: float(one.hard[one.t].mean())))
    a, b = masks((12, 12, 6), 0)
    assert list(score_patient(1.0 * a, b))[-2:] == ["empty", "recall"] and score_patient(1.0 * b, b)["recall"] == 1


def test_a_taken_name_of_a_metric_is_refused(monkeypatch):
    monkeypatch.setattr("sahlora.evaluation.scores.METRICS", dict(METRICS))

    def make():
        def recall(one):
            return float(one.hard[one.t].mean())

        return Metric("recall", "", "higher", "share found", recall)

    def precision(one):
        return float(one.t[one.hard].mean())

    first, again = make(), make()
    register_metric(first)
    register_metric(again)  # as when a cell is run a second time
    assert scores.METRICS["recall"] is again
    for other in (replace(first, value=precision), replace(first, name="nsd")):
        with pytest.raises(ValueError, match=f"metric '{other.name}' is registered already, .*choose another name"):
            register_metric(other)
    assert scores.METRICS["recall"] is again and scores.METRICS["nsd"] is METRICS["nsd"]


def test_a_single_slice_has_distances_and_no_volume():
    a, b = masks((12, 12, 1), 0)
    scores = score_patient(1.0 * a, b, scan((12, 12, 1), (1, 1, 5)))
    assert math.isnan(scores["volume_ml"]) and scores["volume_bin"] == "unknown"
    assert scores["hd95_mm"] == pytest.approx(monai_hd95(a, b, (1, 1, 5)))
    assert math.isnan(scores["nsd"]) and math.isnan(scores["tolerance_mm"]), "how tall its voxels are is not known"


@pytest.mark.parametrize("known", [True, False])
def test_empties(known):
    blood, nothing = np.zeros((8, 8, 6)), np.zeros((8, 8, 6))
    blood[2:5, 2:5, 2:4] = 1
    ct = scan(blood.shape, (2, 2, 5)) if known else None
    both = score_patient(nothing + 0.01, nothing, ct)
    assert both["empty"] == "both" and all(math.isnan(both[name]) for name in UNDEFINED)
    assert both["slice_specificity"] == 1 and both["lesion_tp"] == both["lesion_fp"] == both["lesion_fn"] == 0
    for p, t, side in ((0.001 * blood, blood, "prediction"), (blood, nothing, "annotation")):
        scores = score_patient(p, t, ct)
        assert scores["empty"] == side == empty_side(p >= 0.5, t) and math.isnan(scores["hd95_mm"])
        assert scores["dice_hard"] == 0 == scores["lesion_f1"]
        assert scores["nsd"] == 0 if known else math.isnan(scores["nsd"])
    assert scores["dice_soft"] == 0 and score_patient(nothing, blood, ct)["dice_soft"] == 0
    assert math.isnan(scores["slice_sensitivity"]) and (scores["lesion_tp"], scores["lesion_fp"]) == (0, 1)
    assert score_patient(nothing, blood, ct)["slice_sensitivity"] == 0


def test_order_in_memory_and_dtype_do_not_matter():
    a, b = masks((14, 12, 6), 3)
    p = np.where(a, 0.75, 0.25)  # exact in float16
    ct = scan(p.shape, (0.5, 0.5, 5))
    plain = score_patient(p, b, ct)
    wide = np.zeros((28, 12, 12))
    wide[::2, :, ::2] = p
    others = [(np.asfortranarray(p), np.asfortranarray(b)), (wide[::2, :, ::2], b),
              (p[::-1].copy()[::-1], b[::-1].copy()[::-1]),
              (p.transpose(2, 1, 0).copy().transpose(2, 1, 0), b), (p.astype(np.float16), b.astype(np.uint8)),
              (p.astype(np.float32), b.astype(np.float32)), (p, b.astype(np.int64))]
    for q, t in others:
        same(score_patient(q, t, ct), plain)
    assert score_patient(a, b, ct)["nsd"] == plain["nsd"]  # a mask is a prediction too
    frozen = [x.copy() for x in (p, b)]
    for x in frozen:
        x.setflags(write=False)
    same(score_patient(*frozen, ct), plain)


def test_a_probability_of_one_half_is_predicted():
    p, t = np.full((3, 3, 3), 0.4999), np.ones((3, 3, 3), bool)
    p[1, 1, 1] = 0.5
    scores = score_patient(p, t, scan(p.shape, (10, 10, 10)))
    assert scores["predicted_hard_ml"] == pytest.approx(1) and scores["dice_hard"] == pytest.approx(2 / 28)
    assert scores["slice_tp"] == 1 and scores["empty"] == ""


def test_half_precision_does_not_lose_voxels():
    p, t = np.full((200, 200, 10), 0.75, np.float16), np.ones((200, 200, 10), np.uint8)  # the sum is far beyond float16
    scores = score_patient(p, t, scan(p.shape, (1, 1, 1)))
    assert scores["dice_soft"] == pytest.approx(2 * 0.75 / 1.75) and scores["predicted_ml"] == pytest.approx(300)


def test_what_can_not_be_scored_is_refused():
    p, t = np.full((4, 5, 6), 0.5), np.zeros((4, 5, 6), np.uint8)
    nan = p.copy()
    nan[1, 2, 3] = np.nan
    for bad, annotation, ct, why in [
        (nan, t, None, "NaN in 1 voxels"), (nan.astype(np.float16), t, None, "NaN in 1 voxels"),
        (p + 1, t, None, "sigmoid"), (p - 1, t, None, "sigmoid"), (p * np.inf, t, None, "sigmoid"),
        (p[1:], t, None, "same shape"), (p[0], t[0], None, "same shape"),
        (p, t + 2, None, "0 and 1"), (p, t - 0.5, None, "0 and 1"),
        (p, np.full(t.shape, np.nan), None, "0 and 1"), (p, t, scan((4, 5, 7)), "same grid"),
        (p[:0], t[:0], None, "no voxel")]:
        with pytest.raises(ValueError, match=why):
            score_patient(bad, annotation, ct)


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_a_patient_is_bounded_and_symmetric_where_it_should_be(seed):
    a, b = masks((9, 9, 5), seed, 0.8)
    ct = scan(a.shape, (2.5, 2.5, 5), (0, 1.2 * (seed % 2)))
    one, other = score_patient(1.0 * a, b, ct), score_patient(1.0 * b, a, ct)
    for name in ("dice_soft", "dice_hard", "nsd", "hd95_mm"):
        assert one[name] == pytest.approx(other[name], nan_ok=name == "nsd")
    assert all(0 <= one[name] <= 1 for name in METRICS if name != "hd95_mm" and not math.isnan(one[name]))
    assert one["slice_fp"] == other["slice_fn"] and one["volume_ml"] == pytest.approx(other["predicted_hard_ml"])
    perfect = score_patient(1.0 * b, b, ct)
    assert perfect["dice_soft"] == 1 and (seed % 2 or perfect["nsd"] == 1) and perfect["hd95_mm"] == 0 == perfect["lesion_fn"]


# Many patients


def cohort() -> pd.DataFrame:
    "Five patients: two scored, one missed, one false alarm, one rightly empty; the second has no spacing."
    blood, nothing = np.zeros((8, 8, 6)), np.zeros((8, 8, 6))
    blood[2:6, 2:6, 2:5] = 1
    ct = scan(blood.shape, (10, 10, 10))  # 48 mL
    half = blood.copy()
    half[4:] = 0
    pairs = [(half, blood, ct), (blood, blood, None), (nothing, blood, ct), (blood, nothing, ct),
             (nothing, nothing, ct)]
    return pd.DataFrame([{"patient": f"p{i}", **score_patient(*pair)} for i, pair in enumerate(pairs)])


def test_summary_of_a_score_by_hand():
    hard, far = (summarize(cohort()[name]) for name in ("dice_hard", "hd95_mm"))
    values = [2 / 3, 1.0, 0.0, 0.0]
    assert (hard["n"], hard["missing"]) == (4, 1) and hard["mean"] == pytest.approx(np.mean(values))
    assert hard["sd"] == pytest.approx(np.std(values, ddof=1)) and hard["median"] == pytest.approx(1 / 3)
    assert far["n"] == 1 and far["sd"] is None


def test_a_table_that_went_through_a_file_gives_the_same():
    table = cohort()
    read = pd.read_csv(io.StringIO(table.to_csv(index=False)))
    pd.testing.assert_frame_equal(by_bin(read), by_bin(table))


def test_every_bin_has_its_row():
    table = by_bin(cohort(), ("dice_hard",))
    assert table.n.to_dict() == {"0": 2, "<25": 0, "25-50": 2, "50-100": 0, ">100": 0, "unknown": 1}
    assert table.loc["25-50", "dice_hard"] == pytest.approx(1 / 3) and table.loc["0", "dice_hard_n"] == 1
    assert table.loc[["<25", "50-100", ">100"], "dice_hard"].isna().all() and table.loc["unknown", "dice_hard"] == 1
    none = by_bin(cohort().iloc[:0])
    assert list(none.index) == [*BINS, "unknown"] and (none.n == 0).all() and none.hd95_mm.isna().all()


def test_tables_of_older_runs_are_refused_by_name():
    old = cohort().drop(columns=["nsd", "tolerance_mm"]).assign(nsd_2mm=0.5)  # counted voxels
    with pytest.raises(ValueError, match="lacks nsd: score its patients again"):
        by_bin(old)
    with pytest.raises(ValueError, match="volume_ml"):
        by_bin(cohort().drop(columns="volume_ml"))


def test_a_heading_names_the_tolerance():
    assert surface_heading(cohort()) == "surface Dice, 10 mm" and surface_heading(cohort().assign(tolerance_mm=math.nan)) == "surface Dice"
    assert surface_heading(pd.DataFrame({"tolerance_mm": [5.0, 2.5, math.nan, 4.9]})) == "surface Dice, 2.5 to 5 mm"


def test_summarize_keeps_its_result():
    assert summarize(pd.Series([1.0, 2.0, 4.0, np.nan])) == {
        "n": 3, "missing": 1, "mean": pytest.approx(7 / 3), "sd": pytest.approx(1.5275252316519468), "median": 2.0}
    assert summarize(pd.Series([np.nan])) == {"n": 0, "missing": 1, "mean": None, "sd": None, "median": None}
