"""Head CT from files: every bad input is named, storage order comes back, damage is never read in silence."""
import errno
import gzip
import itertools
import os

import nibabel as nib
import numpy as np
import pytest

from sahlora.ct import HeadCT, read_ct, read_nifti, write_like, write_nifti
from sahlora.ct.core import (angle_degrees, even_stacks, find_gaps, from_lps, is_hidden, owned_mm,
                             slice_normal, to_lps, visible)
from sahlora.common.files import plain_words

SHAPE = (40, 44, 9)
ORDERS = sorted({"".join(p) for axes in itertools.permutations(("LR", "PA", "SI")) for p in itertools.product(*axes)})


def head(shape=SHAPE, seed=0):
    "A ring of bone around brain with a clot, in air, int16 HU."
    x, y = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in shape[:2]), indexing="ij")
    r = np.hypot(x, y) / (min(shape[:2]) / 2)
    plane = np.where(r < 0.75, 35, np.where(r < 0.9, 900, -1000))
    hu = plane[..., None] + np.random.default_rng(seed).normal(0, 4, shape)
    hu[15:20, 18:22, 3:6] = 65
    return np.round(hu).astype(np.int16)


def axial(spacing=(0.5, 0.6, 5.0), tilt=0.0):
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[1, 2] = spacing[2] * np.tan(np.radians(tilt))
    affine[:3, 3] = (11, 13, -40)
    return affine


@pytest.fixture
def save(tmp_path):
    def write(array, affine=None, name="scan.nii.gz", **header):
        image = nib.Nifti1Image(array, axial() if affine is None else affine)
        for key, value in header.items():
            image.header[key] = value
        nib.save(image, tmp_path / name)
        return tmp_path / name

    return write


def edit(path, start, content):
    "The same uncompressed file with other bytes from `start` on."
    raw = bytearray(path.read_bytes())
    raw[start : start + len(content)] = content
    path.write_bytes(raw)
    return path


def refused(path, *words, **options):
    with pytest.raises(ValueError) as error:
        read_ct(path, **options)
    text = str(error.value)
    assert str(path) in text and all(word in text for word in words), text


# --- what is read right -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
@pytest.mark.parametrize("tilt", [0.0, 18.5])
def test_values_and_geometry_are_nibabels(save, name, tilt):
    path = save(head(), axial(tilt=tilt), name)
    ct, image = read_ct(path), nib.as_closest_canonical(nib.load(path))
    assert np.array_equal(ct.hu[::-1, ::-1], np.maximum(image.get_fdata(), -1024))
    assert np.isclose(ct.tilt, tilt, atol=1e-4) and ct.volume_ml(np.ones(SHAPE)) == pytest.approx(np.prod(SHAPE) * 1.5e-3)
    assert any("18.5 degrees" in note for note in ct.notes) == (tilt > 0)


def test_scaling_and_padding(save):
    stored = head() + 1024
    stored[0] = 0
    path = save(stored.astype(np.int16), scl_slope=np.nan)
    image = nib.Nifti1Image(stored.astype(np.int16), axial())
    image.header.set_slope_inter(1, -1024)
    nib.save(image, path)
    loaded = nib.load(path).get_fdata()
    assert np.array_equal(read_ct(path).hu, np.maximum(loaded, -1024))
    padded = np.where(head() < -900, -3024, head()).astype(np.int16)
    assert read_ct(save(padded)).hu.min() == -1024


def test_fourth_axis_of_one_is_dropped_and_comes_back(save, tmp_path):
    ct = read_ct(save(head()[..., None]))
    assert ct.hu.shape == SHAPE
    write_like(ct, np.zeros(SHAPE, np.uint8), tmp_path / "mask.nii.gz")
    assert nib.load(tmp_path / "mask.nii.gz").shape == (*SHAPE, 1)


def test_nifti2_big_endian_and_missing_suffix(tmp_path):
    image = nib.Nifti2Image(head(), axial())
    nib.save(image, tmp_path / "two.nii.gz")
    assert np.array_equal(read_ct(tmp_path / "two.nii.gz").hu, np.maximum(head(), -1024))
    big = nib.Nifti1Image(head().astype(">i2"), axial(), nib.Nifti1Header(endianness=">"))
    nib.save(big, tmp_path / "big.nii")
    assert np.array_equal(read_ct(tmp_path / "big.nii").hu, np.maximum(head(), -1024))
    (tmp_path / "ID_0001").write_bytes((tmp_path / "two.nii.gz").read_bytes())
    assert read_ct(tmp_path / "ID_0001").hu.shape == SHAPE


CODES = [*(((q, s), 0.0) for q, s in ((1, 0), (0, 1), (2, 1), (4, 4))), *(((q, s), 18.5) for q, s in ((0, 1), (2, 1), (4, 4)))]


@pytest.mark.long
@pytest.mark.parametrize("codes, tilt", CODES)  # a qform alone holds no shear
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_round_trip_in_all_48_orders(tmp_path, codes, tilt, suffix):
    mask = (head() == 65).astype(np.uint8)
    for letters in ORDERS if suffix == ".nii" else ORDERS[::7]:
        turn = nib.orientations.ornt_transform(nib.io_orientation(axial(tilt=tilt)), nib.orientations.axcodes2ornt(letters))
        affine = axial(tilt=tilt) @ nib.orientations.inv_ornt_aff(turn, SHAPE)
        image = nib.Nifti1Image(nib.apply_orientation(head(), turn), affine)
        image.set_qform(affine, codes[0], strip_shears=True)
        image.set_sform(affine, codes[1])
        nib.save(image, tmp_path / f"in{suffix}")
        ct = read_ct(tmp_path / f"in{suffix}")
        assert np.array_equal(ct.hu == 65, mask == 1), letters
        write_like(ct, mask, tmp_path / f"out{suffix}")
        source, found = nib.load(tmp_path / f"in{suffix}"), nib.load(tmp_path / f"out{suffix}")
        assert found.get_data_dtype() == np.uint8 and found.shape == source.shape
        assert np.array_equal(found.dataobj, nib.apply_orientation(mask, turn)), letters
        assert np.array_equal(found.affine, source.affine)
        for key in ("qform_code", "sform_code", "pixdim", "srow_x", "quatern_b", "qoffset_z"):
            assert np.array_equal(found.header[key], source.header[key]), (letters, key)


def test_free_text_of_a_header_is_not_copied(save, tmp_path):
    path = save(head(), name="scan.nii", descrip=b"DOE^JANE", aux_file=b"secret")
    write_like(read_ct(path), np.zeros(SHAPE, np.uint8), tmp_path / "mask.nii")
    assert b"DOE" not in (tmp_path / "mask.nii").read_bytes() and b"secret" not in (tmp_path / "mask.nii").read_bytes()


# --- slices and what they own -----------------------------------------------------------------------------------


def test_sheared_phantom_has_the_same_millilitres():
    from sahlora.phantom import make_case

    phantom = make_case("asah", 3, 0, grid=(32, 40), slices=28)
    straight, sheared = np.diag([-5.0, -5.0, 5.0, 1.0]), np.diag([-5.0, -5.0, 5.0, 1.0])
    sheared[1, 2] = 5 * np.tan(np.radians(18.5))
    one, other = (HeadCT(phantom.hu, affine).volume_ml(phantom.blood) for affine in (straight, sheared))
    assert one > 1 and abs(other / one - 1) < 0.01


@pytest.mark.parametrize("spacings", [(5.0,), (4.0, 7.0), (2.5, 5.0, 10.0)])
def test_owned_lengths_add_up(spacings):
    positions, at = [], 0.0
    for step in spacings:
        positions += [at + k * step for k in range(6)]
        at = positions[-1] + 0.3 + step / 2
    positions = np.array(positions)
    assert [end - first for first, end in even_stacks(positions)] == [6] * len(spacings)
    assert np.isclose(owned_mm(positions).sum(), positions[-1] - positions[0] + spacings[0] / 2 + spacings[-1] / 2)


def test_a_gap_is_no_stack():
    whole = np.arange(20) * 5.0
    for missing in ([7], [7, 8], [3, 12]):
        gaps = find_gaps(np.delete(whole, missing))
        assert gaps and all(mm > expected for _, mm, expected in gaps), missing
    assert not find_gaps(whole) and not find_gaps(whole + np.random.default_rng(0).normal(0, 0.02, 20))
    with pytest.raises(ValueError, match="two slices or more"):
        owned_mm(np.array([1.0]))


def test_turns_undo_each_other():
    array = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    for letters in ORDERS:
        affine = nib.orientations.inv_ornt_aff(
            nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(letters)),
            (4, 4, 4))
        lps, there, stored = to_lps(array, affine)
        assert nib.aff2axcodes(there) == ("L", "P", "S") and np.array_equal(from_lps(lps, stored), array)
    assert angle_degrees(slice_normal(axial(tilt=25)), axial(tilt=25)[:3, 2]) == pytest.approx(25)


# --- bad input ----------------------------------------------------------------------------------------------------


def test_damaged_files(save, tmp_path):
    path = save(head())
    whole = path.read_bytes()
    for name, content, words in (
        ("checksum", whole[:-6] + bytes([whole[-6] ^ 1]) + whole[-5:], "corrupted gzip"),
        ("cut", whole[: len(whole) // 2], "copy it again"),
        ("text", b"this was never compressed", "not gzip"),
        ("empty", b"", "empty"),
        ("inside", gzip.compress(b"not a scan" * 100), "not NIfTI"),
        ("short", gzip.compress(gzip.decompress(whole)[:-10]), "truncated"),
    ):
        file = tmp_path / f"{name}.nii.gz"
        file.write_bytes(content)
        refused(file, words)
    (tmp_path / "letter.txt").write_text("Dear colleague, " * 20)
    refused(tmp_path / "letter.txt", "neither NIfTI nor DICOM")
    pair = nib.Nifti1Pair(head(), axial())
    nib.save(pair, tmp_path / "old.img")
    refused(tmp_path / "old.hdr", ".hdr/.img")


def test_what_is_not_one_volume(save):
    rgb = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    refused(save(rgb, name="rgb.nii.gz"), "RGB", "secondary capture")
    refused(save(np.stack([head()] * 3, -1), name="four.nii.gz"), "4 dimensions", "40 x 44 x 9 x 3")
    refused(save(head()[..., :1], name="flat.nii.gz"), "2-D", "40 x 44 pixels")
    refused(save(head()[..., 0], name="flatter.nii.gz"), "2-D", "40 x 44")
    refused(save(head().astype(np.complex64), name="complex.nii.gz"), "complex64")


def test_numbers(save):
    holes = head().astype(np.float32)
    holes[3, 3, :2], holes[4, 4, 4] = np.nan, np.inf
    path = save(holes)
    refused(path, "3 of 15840 voxels", "--fill-nan")
    ct = read_ct(path, fill_nan=True)
    assert (ct.hu[3, 3, :2] == -1000).all() and ct.hu[4, 4, 4] == -1000 and any("3 voxels" in n for n in ct.notes)
    refused(save(np.full(SHAPE, 40, np.int16)), "all 15840 voxels", "40")


def test_not_hu(save):
    grey = np.clip(np.round(head() / 80 * 255), 0, 255).astype(np.uint8)
    path = save(grey)
    refused(path, "windowed or 8-bit", "--window 0,80", "0 to 255")
    ct = read_ct(path, window=(0, 80))
    brain = (head() > 10) & (head() < 70)
    assert np.abs(ct.hu[brain] - head()[brain]).max() < 0.2 and any("0 to 255" in note for note in ct.notes)
    refused(save(head() + 1024), "rescale intercept")
    refused(save((head() > 60).astype(np.uint8), name="mask.nii.gz"), "a mask's values alone", "name the scan")
    refused(save(np.clip(head(), 0, 1200), name="mri.nii.gz"), "MRI can not be read")
    refused(save(np.clip(head(), -1000, 80)), "no bone above 300")
    clipped = save(np.clip(head(), 0, 80))
    refused(clipped, "--window")
    assert np.array_equal(read_ct(clipped, window=(0, 80)).hu, np.clip(head(), 0, 80))
    refused(path, "low < high", window=(80, 0))
    refused(save(head()), "right --window", window=(0, 80))
    refused(save(head().astype(np.float32) * 1e6), "far beyond HU")


@pytest.mark.parametrize("letters, plane", [("LSP", "coronal"), ("PSL", "sagittal"), ("SPL", "sagittal")])
def test_other_planes(save, letters, plane):
    codes = nib.orientations.axcodes2ornt(letters)
    affine = np.linalg.inv(nib.orientations.inv_ornt_aff(codes, (1, 1, 1))) @ np.diag([0.6, 0.6, 5, 1])
    assert nib.aff2axcodes(affine) == tuple(letters)
    refused(save(head(), affine), plane, "5 mm", "axial")


def test_oblique_and_isotropic(save):
    for angle, fine in ((29.9, True), (31, False)):
        c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        affine = np.block([[np.array([[1, 0, 0], [0, c, -s], [0, s, c]]), np.zeros((3, 1))], [0, 0, 0, 1]]) @ axial()
        if fine:
            read_ct(save(head(), affine))
        else:
            refused(save(head(), affine), "31 degrees off axial")
    iso = head((40, 40, 40))
    for letters in ("LPS", "SLP", "PSL"):
        codes = nib.orientations.axcodes2ornt(letters)
        affine = np.linalg.inv(nib.orientations.inv_ornt_aff(codes, (1, 1, 1)))
        assert read_ct(save(iso, affine)).hu.shape == (40, 40, 40)


def test_spacing(save):
    path = save(head(), name="scan.nii")
    edit(path, 80, np.zeros(3, "<f4").tobytes())
    refused(path, "spacing of 0 x 0 x 0 mm", "expected", "--spacing")
    ct = read_ct(path, spacing=(0.4, 0.5, 4))
    assert np.allclose(ct.spacing, (0.4, 0.5, 4)) and ct.voxel_ml == pytest.approx(0.0008)
    path = save(head(), name="scan.nii")
    edit(path, 88, np.float32(np.nan).tobytes())
    refused(path, "--spacing")
    zero = axial()
    zero[2, 2] = 0
    path = save(head(), name="scan.nii")
    edit(path, 312, np.array(zero[2], "<f4").tobytes())
    refused(path, "--spacing")
    refused(path, "three lengths", spacing=(1, 2))
    refused(path, "three lengths", spacing=(1, 2, -5))
    refused(save(head(), axial((0.0005, 0.0005, 0.005))), "unit")
    metres = save(head(), name="m.nii")
    refused(edit(metres, 123, bytes([1])), "meter")


def test_spacing_is_said_in_one_order_whatever_the_file_has(save, tmp_path):
    for letters in ORDERS:
        turn = nib.orientations.ornt_transform(nib.io_orientation(axial()), nib.orientations.axcodes2ornt(letters))
        affine = axial() @ nib.orientations.inv_ornt_aff(turn, SHAPE)
        path = save(nib.apply_orientation(head(), turn), affine, "scan.nii")
        edit(path, 80, np.zeros(3, "<f4").tobytes())
        ct = read_ct(path, spacing=(0.5, 0.6, 5))
        assert np.array_equal(ct.hu, np.maximum(head(), -1024)) and np.allclose(ct.spacing, (0.5, 0.6, 5))
        write_like(ct, np.zeros(SHAPE, np.uint8), tmp_path / "mask.nii")
        assert np.allclose(np.sort(nib.load(tmp_path / "mask.nii").header.get_zooms()), (0.5, 0.6, 5))


def test_orientation_is_never_guessed(save):
    path = save(head(), name="scan.nii")
    edit(path, 252, bytes(4))  # both codes 0
    refused(path, "left and right are not known", "--orientation")
    assert np.array_equal(read_ct(path, orientation="LPS").hu, np.maximum(head(), -1024))
    assert np.array_equal(read_ct(path, orientation="ras").hu, np.maximum(head(), -1024)[::-1, ::-1])
    refused(path, "three letters", orientation="LLS")
    image = nib.Nifti1Image(head(), axial())
    image.set_qform(axial() @ np.diag([-1, 1, 1, 1]), 1)
    image.set_sform(axial(), 1)
    nib.save(image, path)
    refused(path, "sform says LPS", "qform RPS", "left and right are not certain")


def test_warnings_carry_numbers(save):
    def notes(array, spacing):
        return " ".join(read_ct(save(array, axial(spacing))).notes)

    assert "2 slices" not in notes(head(), (0.5, 0.5, 5))
    assert "4 slices" in notes(head((40, 44, 4)), (0.5, 0.5, 5))
    assert "12 mm apart" in notes(head(), (0.5, 0.5, 12))
    assert "2 x 2 mm" in notes(head(), (2, 2, 5)) and "0.1 x 0.1 mm" in notes(head(), (0.1, 0.1, 5))
    image = nib.load(save(head()))
    image.header["pixdim"][3] = 3
    path = save(head(), name="scan.nii")
    edit(path, 88, np.float32(3).tobytes())
    assert any("pixdim says" in note for note in read_ct(path).notes)


def test_disk_errors_in_plain_words(tmp_path):
    loop = tmp_path / "loop.nii.gz"
    loop.symlink_to(loop)
    for path, words in ((loop, "leads back to itself"), (tmp_path / "none.nii", "is not there")):
        with pytest.raises(OSError) as error:
            read_ct(path)
        assert words in plain_words(error.value) and str(path) in plain_words(error.value)
    for number in (errno.EACCES, errno.ENOSPC, errno.EISDIR, errno.EROFS, errno.EIO):
        text = plain_words(OSError(number, os.strerror(number), "out/mask.nii.gz"))
        assert text.startswith("out/mask.nii.gz") and "Errno" not in text and ";" in text


def test_options_that_do_not_belong(save, tmp_path):
    refused(save(head()), "--series", series="3")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_nifti(folder / "a.nii.gz", head(), axial())
    refused(folder, "a.nii.gz", "name one")


# --- damage at random ---------------------------------------------------------------------------------------------


def damage(content, seed):
    "Bit flips anywhere or in the header, a cut, or a run of zeros."
    draw, content = np.random.default_rng(seed), bytearray(content)
    kind = seed % 4
    if kind == 0:
        for at in draw.integers(0, len(content), draw.integers(1, 9)):
            content[at] ^= 1 << int(draw.integers(8))
    elif kind == 1:
        for at in draw.integers(0, min(352, len(content)), draw.integers(1, 4)):
            content[at] = int(draw.integers(256))
    elif kind == 2:
        del content[int(draw.integers(len(content))) :]
    else:
        start = int(draw.integers(len(content)))
        content[start : start + 40] = bytes(len(content[start : start + 40]))
    return bytes(content)


@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.nii"])
def test_200_random_damages_are_refused_or_harmless(save, tmp_path, name):
    whole, expected, passed = save(head(), axial(tilt=10), name).read_bytes(), np.maximum(head(), -1024), 0
    for seed in range(200):
        path = tmp_path / f"damaged-{name}"
        path.write_bytes(damage(whole, seed))
        try:
            ct = read_ct(path)
        except ValueError as error:
            assert str(path) in str(error) and "Traceback" not in str(error)
            continue
        passed += 1
        if name.endswith(".gz"):  # the checksum guards it
            assert np.array_equal(ct.hu, expected)
    assert passed < (40 if name.endswith(".gz") else 200)  # without a checksum, changed voxels can not be told
    assert read_nifti(save(head(), axial(tilt=10), name)).array.shape == SHAPE


@pytest.mark.parametrize("name, hidden", [
    (".DS_Store", True), ("Thumbs.db", True), ("THUMBS.DB", True), ("desktop.ini", True), ("._scan.nii.gz", True),
    ("__MACOSX", True), ("$RECYCLE.BIN", True), (".part.host.1.1.0.scan.nii.gz", True), ("a/.git", True),
    ("scan.nii.gz", False), (".data/scan.nii.gz", False), ("thumbs", False), ("IM0001", False), (".", False)])
def test_what_is_hidden(name, hidden):
    assert is_hidden(name) == hidden


def test_what_is_visible_is_sorted_and_a_folder_that_is_not_there_is_an_error(tmp_path):
    for name in ("b", ".a", "a", "Thumbs.db"):
        (tmp_path / name).write_text("x")
    assert visible(tmp_path) == [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(FileNotFoundError):
        visible(tmp_path / "gone")
