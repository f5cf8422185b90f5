"""A scan in, a mask and millilitres out: geometry, numbers, memory, files, and what happens when things go wrong."""
import contextlib
import copy
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from dicom_files import volume, write_series
from scipy import ndimage
from torch import nn

from sahlora.adapters import adapt, adapters, merged_copy, save_adapter
from sahlora.ct import HeadCT, read_ct, write_like, write_nifti
from sahlora.common.files import read_json
from sahlora.prediction.models import find_weights
from sahlora.phantom import make_case
from sahlora.prediction import (InputSpec, Prediction, cases as cases_module, find_cases,
                                load_model, overlay_sheet, predict_cases, predict_scan)
from sahlora.prediction.cases import CASE_COLUMNS, whole_folder
from sahlora.prediction.scan import (choose_device, choose_precision, default_batch, fast_copy,
                                     network_grid, pick_slices)
from sahlora.training.loop import pad_to_multiple, save_network, weights_hash
from sahlora.unet import MultiViewUnet, Unet

AFFINE = np.array([[-0.5, 0, 0, 40], [0, -0.5, 0, 50], [0, 0, 5, -20], [0, 0, 0, 1.0]])


def lively(net: nn.Module, seed: int = 0) -> nn.Module:
    "Random weights that answer to the image, batch norms with statistics of their own, and few pixels above 0.5."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                module.weight.normal_(0, (2 / module.weight[0].numel()) ** 0.5, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
            elif isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
        last = [module for module in net.modules() if isinstance(module, nn.Conv2d)][-1]
        last.weight.mul_(4)
        logits = net.eval()(torch.rand(4, 1, 32, 32, generator=generator))
        last.bias -= logits.flatten().quantile(0.9)
    return net


@pytest.fixture(scope="module")
def net():
    return lively(Unet(levels=2, width=4))


@pytest.fixture(scope="module")
def phantom():
    return make_case("tbi", seed=2, index=1, grid=(64, 80), slices=6, tilt=10.0)


@pytest.fixture
def ct(phantom):
    return HeadCT(phantom.hu.copy(), phantom.affine, "phantom")


@pytest.fixture(scope="module")
def model(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_network(path, net)
    return path


def noise(shape, seed=0, **options):
    hu = np.random.default_rng(seed).uniform(-20, 160, shape).astype(np.float32)
    return HeadCT(hu, AFFINE, "noise", **options)


class Threshold(nn.Module):
    "Marks pixels above half of the window; counts its calls and can be given room for so many slices."

    def __init__(self, room=10**6, error=torch.OutOfMemoryError("CUDA out of memory")):
        super().__init__()
        self.scale, self.room, self.error, self.calls = nn.Parameter(torch.tensor(40.0)), room, error, []

    def __deepcopy__(self, memo):
        return self  # so that calls can be counted

    def forward(self, x):
        self.calls.append(len(x))
        if len(x) > self.room:
            raise self.error
        return self.scale * (x - 0.5)


# --- one scan -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 32, 3), (37, 53, 4), (50, 31, 1)])
@pytest.mark.parametrize("make", [lambda: Unet(levels=2, width=4), lambda: MultiViewUnet(levels=2)])
def test_probabilities_are_the_networks_on_the_scans_own_pixels(make, shape):
    "Against the plain way: window, pad below and right, network as it is, crop."
    net, ct = lively(make()), noise(shape)
    images = torch.from_numpy(np.clip(ct.hu.transpose(2, 1, 0) / 140, 0, 1))[:, None]
    with torch.no_grad():
        expected = net(pad_to_multiple(images, 4)).sigmoid()[:, 0, : shape[1], : shape[0]].permute(2, 1, 0).numpy()
    found = predict_scan(net, ct, precision="fp32", device="cpu")
    assert found.probabilities.shape == shape and found.probabilities.dtype == np.float32
    assert np.abs(found.probabilities - expected).max() < 1e-5
    assert 0.005 < found.mask.mean() < 0.995 and found.mask.dtype == np.uint8


@pytest.mark.parametrize("precision,close", [("fp32", 1e-5), ("bf16", 2e-2)])
@pytest.mark.parametrize("tta", [False, True])
def test_a_slice_does_not_depend_on_its_batch(net, precision, close, tta):
    ct = noise((40, 44, 7))
    found = [predict_scan(net, ct, batch=n, precision=precision, tta=tta).probabilities for n in (1, 2, 3, 7, 50)]
    for other in found[1:]:
        assert np.abs(found[0] - other).max() <= close
    alone = predict_scan(net, HeadCT(ct.hu[..., 4:6], ct.affine), precision=precision, tta=tta).probabilities
    assert np.abs(found[0][..., 4:6] - alone).max() <= close, "nor on the other slices"


def test_tta_is_the_mean_with_the_mirrored_scan_and_mirrors_with_it(net):
    ct = noise((37, 40, 3))
    mirrored = HeadCT(ct.hu[::-1], ct.affine)
    options = {"precision": "fp32"}
    one, other = (predict_scan(net, scan, **options).probabilities for scan in (ct, mirrored))
    both, again = (predict_scan(net, scan, tta=True, **options).probabilities for scan in (ct, mirrored))
    assert np.abs(both - (one + other[::-1]) / 2).max() < 1e-6
    assert np.abs(one - other[::-1]).max() > 1e-3, "this network does see left and right"
    assert np.array_equal(both, again[::-1])


def test_bf16_is_close_to_fp32(net, ct):
    fast, exact = (predict_scan(net, ct, precision=p) for p in ("bf16", "fp32"))
    assert (fast.precision, exact.precision) == ("bf16", "fp32")
    assert 0 < np.abs(fast.probabilities - exact.probabilities).mean() < 5e-3


def test_adapters_are_merged_and_the_callers_network_is_left_alone(ct):
    net = lively(Unet(levels=2, width=4))
    adapt(net, "cp-lora", rank=2, where="decoding")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.3 * parameter.requires_grad
    net.train()
    before, layouts = weights_hash(net), [p.stride() for p in net.parameters()]
    found = predict_scan(net, ct, precision="fp32").probabilities
    assert weights_hash(net) == before and net.training and adapters(net) == ["default"]
    assert [p.stride() for p in net.parameters()] == layouts and any(p.requires_grad for p in net.parameters())
    base = predict_scan(lively(Unet(levels=2, width=4)), ct, precision="fp32").probabilities
    with torch.no_grad():
        images = torch.from_numpy(np.clip(ct.slices() / 140, 0, 1))[:, None]
        expected = net.eval()(pad_to_multiple(images, 4)).sigmoid()[:, 0].permute(2, 1, 0).numpy()
    assert np.abs(found - expected).max() < 1e-4 < 1e-3 < np.abs(found - base).max()


def test_folding_norms_changes_the_network_not_its_answer():
    net = lively(MultiViewUnet(levels=1))
    fast = fast_copy(net, torch.device("cpu"))
    x = torch.rand(2, 1, 16, 24)
    with torch.no_grad():
        assert (fast(x) - net(x)).abs().max() < 1e-4
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in net.modules())


def test_the_window_is_the_models():
    ct = noise((16, 16, 2))
    found = predict_scan(Threshold(), ct, spec=InputSpec(window=(20.0, 60.0)), precision="fp32")
    assert np.array_equal(found.mask.astype(bool), ct.hu >= 40)


# --- resampling ---------------------------------------------------------------------------------------------------


def test_nothing_is_resampled_unless_the_model_says_so():
    ct = noise((40, 48, 3))
    for spec in (InputSpec(), InputSpec(pixel_mm=2.5), InputSpec.from_header({})):
        assert network_grid(ct, spec) == (48, 40)
        assert np.array_equal(predict_scan(Threshold(), ct, spec=spec, precision="fp32").mask, ct.hu >= 70)
    assert network_grid(ct, InputSpec(pixel_mm=1.0, resample=True)) == (24, 20)


def test_resampling_averages_down_and_interpolates_back():
    "Thin bright lines, one row in four, are dark for a network with pixels four times as large; a step keeps its place."
    lines = np.where(np.arange(40) % 4 == 1, 140.0, 0.0)[:, None] * np.ones((1, 40))
    step = np.where(np.arange(40) < 20, 0.0, 140.0)[:, None] * np.ones((1, 40))
    ct = HeadCT(np.stack([lines, lines.T, step, step.T], -1).astype(np.float32), AFFINE)
    p = predict_scan(Threshold(), ct, spec=InputSpec(pixel_mm=2.0, resample=True), precision="fp32").probabilities
    assert p[..., :2].max() < 0.01, "the mean is a quarter of the window"
    assert np.array_equal(p[..., 2] >= 0.5, step > 70) and np.array_equal(p[..., 3] >= 0.5, step.T > 70)


def test_pixels_that_are_not_square_are_resampled_each_way():
    affine = AFFINE @ np.diag([1, 2, 1, 1.0])
    assert network_grid(HeadCT(np.zeros((40, 40, 2), np.float32), affine), InputSpec(pixel_mm=0.5, resample=True)) == (80, 40)


def test_a_scan_on_the_models_grid_is_not_touched_by_resampling(net):
    ct = noise((40, 40, 2))
    plain, same = (predict_scan(net, ct, spec=spec, precision="fp32")
                   for spec in (InputSpec(), InputSpec(pixel_mm=0.5, resample=True)))
    assert np.array_equal(plain.probabilities, same.probabilities) and not same.notes


@pytest.mark.parametrize("pixel_mm,said", [(None, False), (0.5, False), (0.41, False), (0.62, False), (0.39, True),
                                           (0.64, True), (2.5, True)])
def test_pixels_over_a_quarter_off_are_said(pixel_mm, said):
    notes = predict_scan(Threshold(), noise((8, 8, 2)), spec=InputSpec(pixel_mm=pixel_mm)).notes
    assert bool(notes) == said and all(note.startswith("warning: pixels of 0.5 mm") for note in notes)


@pytest.mark.parametrize("said", [{"window": [140, 0]}, {"window": [1]}, {"window": 5}, {"window": ["a", "b"]}, {"pixel_mm": -1}, {"pixel_mm": "x"},
                                  {"resample": True}, {"spacing": 2}, "text", {"pixel_mm": float("nan")}])
def test_a_header_that_is_not_understood_is_refused(said):
    with pytest.raises(ValueError, match="input"):
        InputSpec.from_header({"input": said})


# --- options, devices, memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options,words", [
    ({"threshold": 0}, "threshold must be greater than 0, not 0"), ({"threshold": 1.0}, "threshold must be less than 1"),
    ({"threshold": float("nan")}, "threshold must be a finite"), ({"threshold": "0.5"}, "threshold must be a valid number"),
    ({"threshold": True}, "threshold must be a valid number"), ({"batch": 0}, "batch must be greater"),
    ({"batch": 1.5}, "batch must be a valid integer"), ({"batch": 2.0}, "batch must be a valid integer"),
    ({"batch": True}, "batch must be a valid integer"), ({"tta": "no"}, "tta must be a valid boolean"), ({"tta": 1}, "tta must"),
    ({"device": "tpu"}, "device must be 'auto', 'cpu', 'cuda' or 'mps'"), ({"precision": "int8"}, "precision must be 'auto'")])
def test_options_that_can_not_be_are_refused(net, model, scans, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        predict_scan(net, noise((8, 8, 2)), **options)
    with pytest.raises(ValueError, match=words):
        run(scans, model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"save_probabilities": 1}, {"dicom_seg": "yes"}, {"window": (80.0, 0.0)}, {"window": (0.0, float("nan"))},
                                     {"window": (0, 40, 80)}, {"spacing": (0.5, 0.5)}, {"spacing": (0.5, 0, 5)}, {"spacing": (0.5, 0.5, float("inf"))},
                                     {"series": 2.5}, {"orientation": 3}, {"fill_nan": 1}, {"allow_gaps": "no"}])
def test_options_of_cases_are_checked_before_the_first_of_them(model, scans, tmp_path, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} .*(must|should|should have|Tuple)"):
        run(scans, model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


INF = float("inf")


@pytest.mark.parametrize("spec", [((-INF, 140.0),), ((0.0, INF),), ((0.0, float("nan")),), ((140.0, 0.0),), ((0.0, 0.0),), ((0.0, 1.0, 2.0),),
                                  ((0.0, "140"),), ((False, True),), ((0.0, 140.0), INF), ((0.0, 140.0), 0.0), ((0.0, 140.0), "2.5"),
                                  ((0.0, 140.0), True), ((0.0, 140.0), None, True), ((0.0, 140.0), 2.5, "yes")])
def test_what_a_network_was_trained_on_is_checked(spec):
    with pytest.raises(ValueError, match="^(window|pixel_mm|resample) "):
        InputSpec(*spec)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_an_error(net, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"device {device} is not there"):
        predict_scan(net, noise((8, 8, 2)), device=device)
    assert choose_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("able,expected", [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"),
                                           ({"avx512_f": True, "avx512_bf16": False}, "fp32"), ({}, "fp32")])
def test_bf16_is_chosen_where_the_processor_has_it(monkeypatch, able, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert choose_precision(torch.device("cpu")) == expected
    assert choose_precision(torch.device("cpu"), "fp32") == "fp32" and choose_precision(torch.device("mps")) == "fp32"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_gives_the_same_as_the_cpu(net, ct):
    one, other = (predict_scan(net, ct, device=d, precision="fp32") for d in ("cuda", "cpu"))
    assert one.device == "cuda" and np.abs(one.probabilities - other.probabilities).max() < 1e-2


def test_batches_shrink_with_the_slice():
    cpu = torch.device("cpu")
    assert default_batch((512, 512), cpu) == 2 and default_batch((4096, 4096), cpu) == 1
    assert default_batch((80, 64), cpu) > default_batch((256, 256), cpu) > 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), RuntimeError("MPS backend out of memory")])
def test_short_memory_halves_the_batch_and_says_so(error):
    ct, net = noise((16, 16, 11)), Threshold(room=2, error=error)
    found = predict_scan(net, ct, batch=9, precision="fp32")
    assert net.calls == [9, 4, 2, 2, 2, 2, 2, 1] and found.batch == 2
    assert np.array_equal(found.mask, ct.hu >= 70), "no slice is lost or done twice"
    assert found.notes == ("warning: memory was short: the batch was halved from 9 to 2 slices",)
    assert predict_scan(Threshold(room=2), ct, batch=2).notes == ()


def test_no_memory_for_one_slice_is_one_clear_error():
    with pytest.raises(MemoryError, match="noise: not enough memory on cpu for one slice of 20 x 16 pixels"):
        predict_scan(Threshold(room=0), noise((16, 20, 3)))


def test_other_errors_of_a_network_are_not_hidden():
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        predict_scan(Threshold(room=0, error=RuntimeError("shapes do not fit")), noise((16, 16, 3)))


REAL_SHORTAGE = """
import resource, sys, numpy as np
from sahlora.ct import HeadCT
from sahlora.prediction import predict_scan
from sahlora.unet import MultiViewUnet
hu = np.random.default_rng(0).normal(30, 30, (256, 256, 5)).astype(np.float32)
affine, net = np.diag([-0.5, -0.5, 5, 1.0]), MultiViewUnet(levels=1)
predict_scan(net, HeadCT(hu[:32, :32], affine))
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv[1]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
found = predict_scan(net, HeadCT(hu, affine), batch=5, precision="fp32")
print(found.batch, found.notes)
"""


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux to limit a process's memory")
def test_a_process_that_really_runs_short_goes_on_with_a_smaller_batch():
    "How much is short depends on the machine's allocator, so several limits are tried; too little for a slice is said in words."
    for room in (160, 224, 288, 352, 416):
        done = subprocess.run([sys.executable, "-c", REAL_SHORTAGE, str(room)], capture_output=True, text=True, timeout=120)
        if not done.returncode and int(done.stdout[0]) < 5:
            assert "memory was short" in done.stdout
            return
        assert not done.returncode or "MemoryError: scan: not enough memory on cpu for one slice" in done.stderr, done.stderr
    pytest.fail("no limit made a process go on with a smaller batch")


def test_a_network_that_gives_no_numbers_is_not_taken_for_one_without_blood():
    ct = noise((16, 16, 2))
    ct.hu[3, 4, 1] = np.nan
    with pytest.raises(ValueError, match="no number for 1 of 512 voxels"):
        predict_scan(Threshold(), ct)
    with pytest.raises(ValueError, match="one logit for each pixel"):
        predict_scan(nn.Conv2d(1, 2, 1), noise((16, 16, 2)))


# --- what a prediction says ---------------------------------------------------------------------------------------


def uneven(shape=(20, 24, 9)):
    "Four slices 4 mm apart, then five 7 mm apart, along a sheared line."
    z = np.array([0, 4, 8, 12, 15, 22, 29, 36, 43.0])
    ct = noise(shape)
    origins = AFFINE[:3, 3] + np.stack([0 * z, -0.3 * z, z], 1)
    affine = AFFINE.copy()
    affine[:3, 2] = origins[1] - origins[0]
    return HeadCT(ct.hu, affine, "uneven", origins=origins), z


def test_numbers_against_numpy_and_scipy():
    ct, z = uneven()
    p = np.random.default_rng(1).uniform(0, 1, ct.hu.shape).astype(np.float32) ** 8
    found = Prediction(ct, p, 0.5, 1.0, "cpu", "fp32", 2)
    owned = np.array([4, 4, 4, 3.5, 5, 7, 7, 7, 7])  # half of the way to each neighbour, the ends half their own step
    ml = 0.5 * 0.5 * owned / 1000
    assert found.hard_ml == pytest.approx(((p >= 0.5).sum((0, 1)) * ml).sum())
    assert found.soft_ml == pytest.approx((p.astype(float).sum((0, 1)) * ml).sum())
    assert found.slices_with_blood == (p >= 0.5).any((0, 1)).sum()
    labels, count = ndimage.label(p >= 0.5, ndimage.generate_binary_structure(3, 3))
    largest = max((ml * (labels == n).sum((0, 1))).sum() for n in range(1, count + 1))
    assert count > 5 and found.largest_ml == pytest.approx(largest)
    assert np.array_equal(found.mask, p >= 0.5)
    p[..., :6] = p[..., 8:] = 0  # blood of one thickness, not the first slice's
    labels, count = ndimage.label(p >= 0.5, ndimage.generate_binary_structure(3, 3))
    found = Prediction(ct, p, 0.5, 1.0, "cpu", "fp32", 2)
    assert found.largest_ml == pytest.approx(np.bincount(labels.ravel())[1:].max() * ml[6])


def test_a_scan_without_blood_has_zeros():
    ct = noise((16, 16, 5))
    found = Prediction(ct, np.zeros(ct.hu.shape, np.float32), 0.5, 1.0, "cpu", "fp32", 2)
    assert (found.hard_ml, found.soft_ml, found.largest_ml, found.slices_with_blood) == (0, 0, 0, 0)
    assert "0.00 mL" in found._repr_html_()


def test_a_prediction_shows_itself_and_says_what_it_is_not(net, ct):
    found = predict_scan(net, HeadCT(ct.hu, ct.affine, "<b>&scan", notes=("gantry tilt 10.0 degrees",)))
    page = found._repr_html_()
    assert "not for clinical use" in page and "data:image/png;base64," in page and "gantry tilt 10.0" in page
    assert "&lt;b&gt;&amp;scan" in page and "<b>&scan" not in page
    assert "not for clinical use" in repr(found) and f"{found.hard_ml:.1f} mL" in repr(found)


@pytest.mark.parametrize("slices,first,last,most", [(12, 3, 5, 30), (90, 40, 44, 30), (90, 0, 2, 30), (90, 88, 89, 30),
                                                    (300, 20, 280, 30), (300, None, None, 30)])
def test_slices_to_show(slices, first, last, most):
    mask = np.zeros((2, 2, slices), np.uint8)
    if first is not None:
        mask[..., first : last + 1] = 1
    picks = pick_slices(mask, most)
    assert len(picks) == min(slices, most) == len(set(picks)) and picks == sorted(picks)
    assert picks[0] >= 0 and picks[-1] < slices
    if first is not None:
        assert picks[0] <= first and picks[-1] >= last, "from the first blood to the last"
        assert max(np.diff(picks)) - min(np.diff(picks)) <= 1, "evenly"


def test_the_sheet_shows_every_mask_pixel_and_needs_no_pyplot(ct):
    import matplotlib.pyplot as plt

    mask = np.zeros(ct.hu.shape, np.uint8)
    mask[30, 40, 2] = 1
    figures = plt.get_fignums()
    plain, marked = (np.asarray(overlay_sheet(ct, m, width=40, columns=3).axes[0].images[0].get_array())
                     for m in (0 * mask, mask))
    changed = (plain != marked).any(-1)
    assert changed.any() and plt.get_fignums() == figures
    height, width = plain.shape[0] // 2, plain.shape[1] // 3
    rows, columns = np.nonzero(changed)
    assert set(rows // height) == {0} and set(columns // width) == {2}, "only in the tile of slice 3"


def test_the_sheet_has_posterior_below_and_left_on_the_right():
    ct = noise((40, 80, 2))  # nothing of it is air, so nothing is cut off
    mask = np.zeros(ct.hu.shape, np.uint8)
    mask[9, 60, 1] = 1
    plain, marked = (np.asarray(overlay_sheet(ct, m, width=40).axes[0].images[0].get_array()) for m in (0 * mask, mask))
    rows, columns = np.nonzero((plain != marked).any(-1))
    label = plain.shape[0] - 80  # rows for the line of text
    assert (rows.min(), rows.max()) == (label + 59, label + 61) and (columns.min(), columns.max()) == (48, 50)


# --- models -------------------------------------------------------------------------------------------------------


def test_a_model_and_its_adapter_come_from_files(tmp_path, net, ct):
    adapted = copy.deepcopy(net)
    adapt(adapted, "convlora", rank=2, where="decoding")
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter += 0.2 * parameter.requires_grad
    save_network(tmp_path / "m.safetensors", net, input={"window": [0, 80], "pixel_mm": 0.5, "resample": False})
    save_adapter(adapted, tmp_path / "a.safetensors")
    plain, header = load_model(tmp_path / "m.safetensors")
    merged, _ = load_model(tmp_path / "m.safetensors", tmp_path / "a.safetensors")
    assert InputSpec.from_header(header) == InputSpec((0, 80), 0.5) and weights_hash(plain) == weights_hash(net)
    spec = InputSpec((0, 80), 0.5)
    found = [predict_scan(n, ct, precision="fp32", spec=s).probabilities for n, s in ((plain, None), (merged, None), (net, spec), (adapted, spec))]
    assert np.abs(found[0] - found[2]).max() < 1e-6 and np.abs(found[1] - found[3]).max() < 1e-5
    assert np.abs(found[0] - found[1]).max() > 1e-3 and adapters(merged) == []


def test_a_network_that_was_read_keeps_the_pixels_it_was_trained_on():
    "Shipped weights, with and without an adapter, adapted again and merged: what `predict_scan` does without a word."
    ct = noise((60, 72, 3))
    for adapter in (None, find_weights("cp-lora", "adapter")):
        net, header = load_model(find_weights("phantom"), adapter)
        spec = InputSpec.from_header(header)
        assert spec.resample and spec != InputSpec()
        found, told, plain = (predict_scan(net, ct, **more).probabilities for more in ({}, {"spec": spec}, {"spec": InputSpec()}))
        assert np.array_equal(found, told) and not np.allclose(found, plain)
        adapt(net, "cp-lora", rank=2, name="mine")
        assert np.allclose(predict_scan(merged_copy(net), ct).probabilities, told, atol=1e-5)


def test_files_that_are_no_model_are_named(tmp_path, net, model):
    other = lively(Unet(levels=2, width=4), seed=9)
    adapt(other, "lora-c", rank=2, where="decoding")
    save_adapter(other, tmp_path / "other.safetensors")
    save_network(tmp_path / "odd.safetensors", net, input={"resample": True})
    (tmp_path / "cut.safetensors").write_bytes(model.read_bytes()[:-100])
    (tmp_path / "text.safetensors").write_text("hello")
    bad = {"other": "is an adapter", "odd": "resample needs pixel_mm", "cut": "copy it again", "text": "copy it again"}
    for name, words in bad.items():
        with pytest.raises(ValueError, match=words) as error:
            load_model(tmp_path / f"{name}.safetensors")
        assert f"{name}.safetensors" in str(error.value)
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors: no such file"):
        load_model(tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match="other.safetensors.*other base weights"):
        load_model(model, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not an adapter file"):
        load_model(model, model)


# --- finding scans ------------------------------------------------------------------------------------------------


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def found_in(path, **options):
    return {name: case.relative_to(path).as_posix() for name, case in find_cases(path, **options).items()}


def test_scans_are_found_in_a_mess(tmp_path):
    touch(tmp_path, "p1/CT.nii.gz", "p2/CT.nii", "P2b/ct.nii", "p3/deep/scan.NII.GZ", "d/1.dcm", "d/sub/2.dcm", "e/DICOMDIR",
          "e/series1/IM1.IMA", "e/series2/IM2", "arch.zip", "notes.txt", ".hidden.nii", "__MACOSX/._x.nii", "p1/._CT.nii.gz",
          "x.nii.gz/x.nii.gz", "done/case.json", "done/mask.nii.gz", "a.b.nii")
    (tmp_path / "e/series2/IM2").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "p3/loop").symlink_to(tmp_path)
    (tmp_path / "p3/self.nii").symlink_to("self.nii")
    (tmp_path / "p4").symlink_to(tmp_path / "p1")
    os.mkfifo(tmp_path / "pipe.nii")
    assert found_in(tmp_path) == {
        "a.b": "a.b.nii", "arch": "arch.zip", "P2b_ct": "P2b/ct.nii", "d": "d", "series1": "e/series1", "series2": "e/series2",
        "p1_CT": "p1/CT.nii.gz", "p2_CT": "p2/CT.nii", "scan": "p3/deep/scan.NII.GZ", "self": "p3/self.nii",
        "x": "x.nii.gz/x.nii.gz"}
    assert "d" not in find_cases(tmp_path, skip=[tmp_path / "d"])


def test_names_are_unique_whatever_they_are(tmp_path):
    touch(tmp_path, "a/CT.nii", "a/CT.nii.gz", "b/a/CT.nii", "cases.csv.nii", "a_CT.nii", "A_ct.nii")
    names = list(find_cases(tmp_path))
    assert len(names) == 6 == len({name.casefold() for name in names}) and "cases.csv" not in names
    assert all("/" not in name for name in names)


def test_one_scan_is_one_case(tmp_path):
    touch(tmp_path, "scan.nii.gz", "study/1.dcm", "study/more/2.dcm", "export.zip", "IM0001")
    for name, stem in (("scan.nii.gz", "scan"), ("study", "study"), ("export.zip", "export"), ("IM0001", "IM0001")):
        assert find_cases(tmp_path / name) == {stem: tmp_path / name}


def test_nothing_found_says_what_was_looked_for(tmp_path):
    touch(tmp_path, "photo.jpg", "empty/notes.txt")
    with pytest.raises(ValueError, match="no scan in it or below; looked for NIfTI files"):
        find_cases(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        find_cases(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(FileNotFoundError, match="link that leads nowhere"):
        find_cases(tmp_path / "loop")


def test_a_cohort_says_what_its_scans_are(tmp_path):
    touch(tmp_path, "images/a.nii.gz", "images/b.nii.gz", "labels/a.nii.gz", "labels/b.nii.gz", "other.nii.gz")
    head = "case,patient,site,image,label,intensity,spacing,blood_ml,sha256\n"
    row = "{0},{0},s,images/{0}.nii.gz,labels/{0}.nii.gz,hu,known,1,\n"
    (tmp_path / "cohort.csv").write_text(head + row.format("b") + row.format("a"))
    assert found_in(tmp_path) == {"b": "images/b.nii.gz", "a": "images/a.nii.gz"}
    (tmp_path / "cohort.csv").write_text(head + row.format("a").replace("a,", "../a,", 1))
    with pytest.raises(ValueError, match="can not be the name of a file"):
        find_cases(tmp_path)


# --- many scans ---------------------------------------------------------------------------------------------------


@pytest.fixture
def scans(tmp_path, phantom):
    folder = tmp_path / "scans"
    for index, name in enumerate(("one", "two", "three")):
        write_nifti(folder / f"{name}.nii.gz", np.roll(phantom.hu, index, 0).astype(np.int16), phantom.affine)
    return folder


def run(path, model, out, **options):
    return predict_cases(path, model, out, progress=False, **options)


def listing(out):
    return {path.relative_to(out).as_posix(): path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_the_table_is_what_the_masks_hold(scans, model, tmp_path):
    result = run(scans, model, tmp_path / "out", save_probabilities=True)
    table = pd.read_csv(tmp_path / "out/cases.csv", keep_default_na=False).set_index("case")
    assert (result.done, result.skipped, result.failed, result.exit_code) == (3, 0, 0, 0)
    assert list(table.index) == ["one", "three", "two"] and ["case", *table.columns] == list(CASE_COLUMNS)
    for name, row in table.iterrows():
        scan, mask, p = (nib.load(path) for path in (scans / f"{name}.nii.gz", tmp_path / f"out/{name}/mask.nii.gz",
                                                     tmp_path / f"out/{name}/probabilities.nii.gz"))
        assert np.array_equal(scan.affine, mask.affine) and scan.shape == mask.shape == p.shape
        assert mask.get_data_dtype() == np.uint8 and p.get_data_dtype() == np.float32
        marked, soft = np.asarray(mask.dataobj), np.asarray(p.dataobj)
        assert set(np.unique(marked)) == {0, 1} and np.array_equal(marked, soft >= 0.5)
        ml = abs(np.linalg.det(mask.affine[:3, :3])) / 1000
        assert row.hard_ml == pytest.approx(marked.sum() * ml, abs=1e-3)
        assert row.soft_ml == pytest.approx(soft.sum(dtype=float) * ml, abs=1e-3)
        labels, _ = ndimage.label(marked, np.ones((3, 3, 3)))
        assert row.largest_ml == pytest.approx(np.bincount(labels.ravel())[1:].max() * ml, abs=1e-3)
        assert row.slices == 6 and row.slices_with_blood == marked.any((0, 1)).sum()
        assert (row.status, row.tilt, row.spacing, row.error) == ("done", 10.0, "2.5x2.5x5", "")
        assert "2.5 x 2.5 mm" in row.warnings and row.source.endswith(f"{name}.nii.gz")
        assert (tmp_path / f"out/{name}/overlay.png").read_bytes().startswith(b"\x89PNG")


def test_run_json_tells_how_it_was_made(scans, model, tmp_path):
    run(scans, model, tmp_path / "out", threshold=0.4, tta=True, precision="fp32")
    record = read_json(tmp_path / "out/run.json")
    assert record["use"] == "not for clinical use" and record["complete"] is True
    assert record["counts"] == {"done": 3, "skipped": 0, "failed": 0} and record["errors"] == {}
    assert record["options"]["threshold"] == 0.4 and record["options"]["tta"] and record["device"] == "cpu"
    assert record["precision"] == "fp32" and record["versions"]["torch"] == torch.__version__
    assert record["sha256"]["model"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert record["seconds"] > 0 and record["peak_mib"] > 10


def test_finished_cases_are_skipped_and_stay_in_the_table(scans, model, tmp_path):
    out = tmp_path / "out"
    (scans / "two.nii.gz").rename(tmp_path / "two.nii.gz")
    run(scans, model, out)
    before = {name: time for name, time in listing(out).items() if "/" in name}
    (tmp_path / "two.nii.gz").rename(scans / "two.nii.gz")
    again = run(scans, model, out)
    after = listing(out)
    assert (again.done, again.skipped, again.exit_code) == (1, 2, 0) and list(again.table.case) == ["one", "three", "two"]
    assert before.items() <= after.items(), "what was finished is not written again"
    table = (out / "cases.csv").read_bytes()
    assert run(scans, model, out).skipped == 3 and (out / "cases.csv").read_bytes() == table


@pytest.mark.parametrize("options,words", [({"threshold": 0.3}, "threshold was 0.5, is 0.3.*--overwrite"), ({"tta": True}, "tta"),
                                           ({"save_probabilities": True}, "save_probabilities"),
                                           ({"window": (0.0, 80.0)}, "read"), ({"precision": "fp32"}, "precision")])
def test_other_options_into_the_same_place_are_refused(scans, model, tmp_path, options, words):
    run(scans / "one.nii.gz", model, tmp_path / "out")
    before = listing(tmp_path / "out")
    with pytest.raises(ValueError, match=words):
        run(scans, model, tmp_path / "out", **options)
    assert listing(tmp_path / "out") == before, "nothing is written"


def test_another_model_another_scan_and_overwriting(scans, model, tmp_path, phantom):
    out, other = tmp_path / "out", tmp_path / "other.safetensors"
    save_network(other, lively(Unet(levels=2, width=4), seed=5))
    run(scans, model, out)
    before = listing(out)
    with pytest.raises(ValueError, match="one: holds the files of another call: model was .*--overwrite"):
        run(scans, other, out)
    with pytest.raises(ValueError, match="three: was made with other settings .model was .*does not make it again; take another --out"):
        run(scans / "one.nii.gz", other, out, overwrite=True)  # the other two would stay: two models in one table
    write_nifti(scans / "one.nii.gz", np.roll(phantom.hu, 9, 1).astype(np.int16), phantom.affine)
    with pytest.raises(ValueError, match="one: holds the files of another call: content of .*one.nii.gz was .*--overwrite"):
        run(scans, model, out)
    assert listing(out) == before
    mask = (out / "one/mask.nii.gz").read_bytes()
    result = run(scans, other, out, overwrite=True)
    assert result.done == 3 and (out / "one/mask.nii.gz").read_bytes() != mask
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_an_adapter_is_part_of_what_made_a_result(scans, net, model, tmp_path):
    adapted = copy.deepcopy(net)
    adapt(adapted, "cp-lora", rank=2, where="decoding")
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter += 0.3 * parameter.requires_grad
    save_adapter(adapted, tmp_path / "a.safetensors")
    scan = scans / "one.nii.gz"
    plain, merged = (run(scan, model, tmp_path / name, adapter=adapter, precision="fp32").table.soft_ml[0]
                     for name, adapter in (("plain", None), ("merged", tmp_path / "a.safetensors")))
    assert merged == pytest.approx(predict_scan(adapted, read_ct(scan), precision="fp32").soft_ml, rel=1e-4)
    assert abs(plain - merged) > 1e-3 * plain
    with pytest.raises(ValueError, match="another call: adapter was None"):
        run(scan, model, tmp_path / "plain", adapter=tmp_path / "a.safetensors", precision="fp32")
    assert read_json(tmp_path / "merged/run.json")["files"]["adapter"].endswith("a.safetensors")


def test_what_is_not_ours_is_never_touched(scans, model, tmp_path):
    out = tmp_path / "out"
    touch(out, "one/thesis.docx")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="one: is there already and is no finished case"):
            run(scans, model, out, overwrite=overwrite)
    assert list(listing(out)) == ["one/thesis.docx"]
    (out / "one/thesis.docx").rename(out / "one/case.json")
    (out / "one/case.json").write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="not written by this command"):
        run(scans, model, out, overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        run(scans, model, scans / "one.nii.gz")
    with pytest.raises(ValueError, match="holds the scans"):
        run(scans, model, scans)
    touch(tmp_path, "dicom/1.dcm")
    with pytest.raises(ValueError, match="holds the scans"):
        run(tmp_path / "dicom", model, tmp_path / "dicom/out")


def test_results_below_the_scans_are_not_scans(scans, model, tmp_path):
    assert run(scans, model, scans / "out").done == 3
    touch(scans / "out", "copied here.nii")
    assert run(scans, model, scans / "out").skipped == 3


def test_a_single_bad_scan_is_an_error_and_nothing_is_written(scans, model, tmp_path):
    bad = scans / "one.nii.gz"
    bad.write_bytes(bad.read_bytes()[:-200])
    for path in (bad, scans / "photo.jpg"):
        path.touch()
        with pytest.raises(ValueError, match=path.name):
            run(path, model, tmp_path / "new/out")
        assert not (tmp_path / "new/out").exists()
    run(scans / "two.nii.gz", model, tmp_path / "out")
    before = listing(tmp_path / "out")
    with pytest.raises(ValueError, match="one.nii.gz"):
        run(bad, model, tmp_path / "out")
    assert listing(tmp_path / "out") == before


def test_a_single_scan_that_can_not_be_written_leaves_nothing(scans, model, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device", "mask.nii.gz")

    monkeypatch.setattr(cases_module, "write_like", full)
    with pytest.raises(OSError, match="new/out does not fit: the disk is full.* 1 of 1 cases are left, each of up to 1 MB"):
        run(scans / "one.nii.gz", model, tmp_path / "new/out")
    assert not (tmp_path / "new/out").exists()


def test_a_batch_goes_on_past_bad_cases(scans, model, tmp_path):
    out = tmp_path / "out"
    (scans / "three.nii.gz").write_bytes(b"not\na scan")
    (scans / "gone.nii.gz").symlink_to("gone.nii.gz")
    result = run(scans, model, out)
    assert (result.done, result.failed, result.exit_code) == (2, 2, 1)
    table = pd.read_csv(out / "cases.csv", keep_default_na=False).set_index("case")
    assert dict(table.status) == {"gone": "failed", "one": "done", "three": "failed", "two": "done"}
    assert set(result.errors) == {"gone", "three"} and "three.nii.gz" in result.errors["three"]
    assert "leads back to itself" in table.error["gone"] and (out / "cases.csv").read_text().count("\n") == 5
    assert not (out / "three").exists() and read_json(out / "run.json")["counts"]["failed"] == 2
    assert set(run(scans, model, out).errors) == {"gone", "three"}, "a scan that can not be read keeps its name"
    (scans / "gone.nii.gz").unlink()
    write_nifti(scans / "three.nii.gz", *[nib.load(scans / "one.nii.gz").get_fdata().astype(np.int16), np.diag([-1, -1, 5, 1.0])])
    again = run(scans, model, out)
    assert (again.done, again.skipped, again.exit_code) == (1, 2, 0) and list(again.table.status) == ["done"] * 3


def test_broken_off_and_started_again(scans, model, tmp_path, monkeypatch):
    "Interrupted within a case: the table is true, the next run does the rest."
    out, real = tmp_path / "out", cases_module.predict_scan

    def stop(net, ct, **options):
        if "three" in ct.source:
            raise KeyboardInterrupt
        return real(net, ct, **options)

    monkeypatch.setattr(cases_module, "predict_scan", stop)
    with pytest.raises(KeyboardInterrupt):
        run(scans, model, out)
    table = pd.read_csv(out / "cases.csv")
    assert list(table.case) == ["one"] and list(table.status) == ["done"] and read_json(out / "run.json")["complete"] is False
    monkeypatch.setattr(cases_module, "predict_scan", real)
    again = run(scans, model, out)
    assert (again.done, again.skipped) == (2, 1) and read_json(out / "run.json")["complete"] is True
    assert sorted(path.name for path in out.iterdir()) == ["cases.csv", "one", "run.json", "three", "two"]


KILLED = """
import os, signal, sys
from sahlora.prediction import cases, predict_cases
real = cases.save_figure
def save(fig, path):
    real(fig, path)
    if "three" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
cases.save_figure = save
predict_cases(*sys.argv[1:4], progress=False)
"""


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_killed_in_the_middle_of_writing(scans, model, tmp_path):
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, scans, model, out], capture_output=True, text=True, timeout=120)
    assert done.returncode == -9, done.stderr
    assert not (out / "three").exists() and [path.is_dir() for path in out.glob(".part.*three")] == [True]
    assert list(pd.read_csv(out / "cases.csv").case) == ["one"]
    again = run(scans, model, out)
    assert (again.done, again.skipped) == (2, 1) and not list(out.glob(".*"))


def test_a_folder_takes_its_name_only_when_whole(tmp_path):
    with whole_folder(tmp_path / "case") as part:
        touch(part, "new")
        assert not (tmp_path / "case").exists()
    with pytest.raises(OSError, match="disk"), whole_folder(tmp_path / "case") as part:
        raise OSError("disk")
    assert [path.name for path in tmp_path.iterdir()] == ["case"] and (tmp_path / "case/new").exists()


def test_a_lowered_batch_is_kept_for_the_next_case(scans, model, tmp_path, monkeypatch):
    greedy = Threshold(room=2)
    monkeypatch.setattr(cases_module, "load_model", lambda *files: (greedy, {"network": {}, "weights": ""}))
    result = run(scans, model, tmp_path / "out", batch=6)
    assert greedy.calls == [6, 3, 1] + [1] * 5 + [1] * 12, "no case meets the shortage again"
    assert result.table.warnings.str.contains("memory was short").sum() == 1
    monkeypatch.setattr(greedy, "room", 0)
    result = run(scans, model, tmp_path / "none")
    assert result.failed == 3 and "not enough memory" in result.errors["one"]


def test_options_reach_the_reader(scans, model, tmp_path, phantom):
    write_nifti(scans / "one.nii.gz", np.clip(phantom.hu, 0, 80).astype(np.int16), phantom.affine)
    assert run(scans, model, tmp_path / "out").errors.keys() == {"one"}
    assert run(scans / "one.nii.gz", model, tmp_path / "windowed", window=(0, 80)).done == 1
    assert json.loads((tmp_path / "windowed/run.json").read_text())["options"]["read"] == {"window": [0, 80]}
    with pytest.raises(ValueError, match="windw is unknown; did you mean 'window'"):
        run(scans, model, tmp_path / "new", windw=(0, 80))
    assert not (tmp_path / "new").exists()


def test_dicom_seg_is_for_dicom(scans, model, tmp_path):
    result = run(scans / "one.nii.gz", model, tmp_path / "out", dicom_seg=True)
    assert "no DICOM SEG: " in result.table.warnings[0] and "one.nii.gz: not read from DICOM" in result.table.warnings[0]
    assert not (tmp_path / "out/one/mask_seg.dcm").exists()


def test_a_cohorts_grey_values_and_unknown_spacing(scans, model, tmp_path, phantom):
    grey = np.round((np.clip(phantom.hu, -20, 100) + 20) / 120 * 255).astype(np.uint8)
    write_nifti(scans / "one.nii.gz", grey, phantom.affine)
    head = "case,patient,site,image,label,intensity,spacing,blood_ml,sha256\n"
    touch(scans, "label-a.nii.gz", "label-b.nii.gz")
    table = (head + 'a,a,s,one.nii.gz,label-a.nii.gz,"window:-20,100",unknown,,\n'
             "b,b,s,two.nii.gz,label-b.nii.gz,hu,known,,\n")
    (scans / "cohort.csv").write_text(table)
    result = run(scans, model, tmp_path / "out")
    assert list(result.table.status) == ["done", "done"]
    assert ["spacing is not known" in words for words in result.table.warnings] == [True, False]
    assert run(scans, model, tmp_path / "out").skipped == 2
    (scans / "cohort.csv").write_text(table.replace("-20,100", "-10,100"))
    with pytest.raises(ValueError, match=r"out/a: holds the files of another call: cohort.read.window was \[-20.0, 100.0\], is \[-10.0, 100.0\]"):
        run(scans, model, tmp_path / "out")
    again = run(scans, model, tmp_path / "out", overwrite=True)
    assert (again.done, again.skipped) == (1, 1)


ORDERS = [(p, f) for p in ((0, 1, 2), (1, 0, 2), (2, 0, 1), (0, 2, 1), (1, 2, 0), (2, 1, 0))
          for f in ((1, 1, 1), (-1, 1, 1), (1, -1, 1), (1, 1, -1), (-1, -1, 1), (-1, 1, -1), (1, -1, -1), (-1, -1, -1))]


def test_the_mask_comes_back_in_all_48_storage_orders(net, tmp_path, phantom):
    "The mask of a reordered scan is the reordered mask, with the scan's own affine and codes."
    image = nib.Nifti1Image(np.round(phantom.hu).astype(np.int16), phantom.affine)
    image.set_sform(image.affine, 1)
    image.set_qform(None, 0)
    reference = None
    for axes, flips in ORDERS:
        turn = np.array([[axis, flip] for axis, flip in zip(axes, flips)])
        turned = image.as_reoriented(turn)
        turned.set_sform(turned.affine, 2)
        nib.save(turned, tmp_path / "scan.nii")
        found = predict_scan(net, ct := read_ct(tmp_path / "scan.nii"), precision="fp32")
        write_like(ct, found.mask, tmp_path / "mask.nii.gz")
        mask, scan = nib.load(tmp_path / "mask.nii.gz"), nib.load(tmp_path / "scan.nii")
        assert np.array_equal(mask.affine, scan.affine) and mask.shape == scan.shape
        assert all(int(mask.header[code]) == int(scan.header[code]) for code in ("qform_code", "sform_code"))
        back = nib.apply_orientation(np.asarray(mask.dataobj), nib.orientations.ornt_transform(
            nib.io_orientation(mask.affine), nib.io_orientation(image.affine)))
        reference = back if reference is None else reference
        assert np.array_equal(back, reference) and 0 < back.mean() < 1


@pytest.mark.long
def test_a_real_tilted_scan_of_two_stacks(real_data, model, tmp_path):
    "GE, tilted by 18.5 degrees, 14 slices 4 mm and 14 slices 7 mm apart: a NIfTI per stack, and a SEG of the series."
    result = run(real_data / "ge-head-ct", model, tmp_path / "out", dicom_seg=True)
    row = result.table.iloc[0]
    assert row.status == "done" and row.slices == 28 and row.tilt == pytest.approx(18.5, abs=0.2)
    stacks = [nib.load(path) for path in sorted((tmp_path / "out/ge-head-ct").glob("mask_stack*.nii.gz"))]
    assert [stack.shape[2] for stack in stacks] == [14, 14]
    assert [round(float(abs(np.linalg.det(s.affine[:3, :3])) / np.prod(np.linalg.norm(s.affine[:3, :2], axis=0))))
            for s in stacks] == [4, 7]
    counts = np.concatenate([np.asarray(s.dataobj).sum((0, 1)) for s in stacks])
    assert row.slices_with_blood == (counts > 0).sum()
    ct = read_ct(real_data / "ge-head-ct")
    area = np.linalg.norm(np.cross(ct.affine[:3, 0], ct.affine[:3, 1]))
    steps = np.diff(ct.positions)
    owned = np.array([steps[0], *(steps[:-1] + steps[1:]) / 2, steps[-1]])
    assert row.hard_ml == pytest.approx((counts * owned).sum() * area / 1000, rel=5e-3)
    import pydicom

    seg = pydicom.dcmread(tmp_path / "out/ge-head-ct/mask_seg.dcm")
    assert seg.Modality == "SEG" and seg.pixel_array.sum() == counts.sum()


# --- a network says its own multiple -------------------------------------------------------------------------------


MULTIPLES = [(lambda: MultiViewUnet(levels=1), 2), (lambda: MultiViewUnet(levels=3), 8), (lambda: Unet(levels=1, width=2), 2),
             (lambda: Unet(levels=4, width=2), 16), (lambda: Unet(levels=5, width=1), 32)]


@pytest.mark.parametrize("shape", [(72, 88, 2), (33, 50, 1), (16, 48, 2)])
@pytest.mark.parametrize("make,multiple", MULTIPLES, ids=lambda value: str(value) if isinstance(value, int) else "")
def test_slices_of_any_size_are_padded_to_the_networks_multiple(make, multiple, shape):
    net, ct = make().eval(), noise(shape)
    images = torch.from_numpy(np.clip(ct.hu.transpose(2, 1, 0) / 140, 0, 1))[:, None]
    padded = nn.functional.pad(images, (0, -shape[0] % multiple, 0, -shape[1] % multiple))
    with torch.no_grad():
        expected = net(padded).sigmoid()[:, 0, : shape[1], : shape[0]].permute(2, 1, 0).numpy()
    assert np.abs(predict_scan(net, ct, precision="fp32").probabilities - expected).max() < 1e-5


class Picky(nn.Module):
    "Takes sides that are multiples of 12, and has no levels."

    multiple = 12

    def forward(self, x):
        assert not x.shape[2] % 12 and not x.shape[3] % 12
        return 20 * x - 10


def test_a_network_of_somebody_else_is_asked_too():
    ct = noise((30, 41, 2))
    assert np.array_equal(predict_scan(Picky(), ct, precision="fp32").mask, ct.hu >= 70)
    vars(net := Threshold())["levels"] = 3  # says nothing of a multiple: any size will do
    assert np.array_equal(predict_scan(net, ct, precision="fp32").mask, ct.hu >= 70)


# --- two runs at a time ---------------------------------------------------------------------------------------------


def at_once(*calls):
    "Run predict_cases in several processes at the same time; each must end well."
    program = "import sys; from sahlora.prediction import predict_cases; predict_cases(*sys.argv[1:4], progress=False)"
    processes = [subprocess.Popen([sys.executable, "-c", program, *map(str, call)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                  text=True) for call in calls]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


def agrees(out, names):
    "Raises where cases.csv and run.json do not say what lies in the folder."
    assert sorted(path.parent.name for path in out.glob("*/mask.nii.gz")) == sorted(names)
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "cases.csv", "run.json"])
    table, record = pd.read_csv(out / "cases.csv"), read_json(out / "run.json")
    assert sorted(table.case) == sorted(names) and set(table.status) == {"done"}
    assert record["complete"] is True and record["errors"] == {}
    assert sum(record["counts"].values()) <= len(names) and record["table"] == hashlib.sha256((out / "cases.csv").read_bytes()).hexdigest()


@pytest.mark.long
def test_two_runs_into_one_folder_lose_nothing(scans, model, tmp_path):
    "Other scans, other scans again, and the same scans, all at the same time."
    for name, folder in (("one", "a"), ("two", "b"), ("three", "b")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (scans / f"{name}.nii.gz").rename(tmp_path / folder / f"{name}.nii.gz")
    out = tmp_path / "out"
    at_once((tmp_path / "a", model, out), (tmp_path / "b", model, out), (tmp_path / "b", model, out), (tmp_path / "a/one.nii.gz", model, out))
    agrees(out, ["one", "two", "three"])


# --- names, once given, stay -----------------------------------------------------------------------------------------


@pytest.fixture
def patients(tmp_path, phantom):
    "Folder A with S2010 and S2011; `add(name)` writes another scan."
    def add(name, seed=None):
        hu = np.roll(phantom.hu, sum(map(ord, name)) if seed is None else seed, 0)
        write_nifti(tmp_path / "scans" / f"{name}.nii.gz", hu.astype(np.int16), phantom.affine)
    add("A/S2010")
    add("A/S2011")
    return add


def sources(out):
    "Name -> scan of the cases in cases.csv."
    table = pd.read_csv(out / "cases.csv", keep_default_na=False)
    assert table.case.is_unique and table.source.is_unique
    return {row.case: row.source.partition("/scans/")[2] for row in table.itertuples()}


def test_a_name_stays_when_another_scan_of_that_name_appears(patients, model, tmp_path):
    scans, out = tmp_path / "scans", tmp_path / "out"
    run(scans, model, out)
    before = {name: time for name, time in listing(out).items() if "/" in name}
    patients("B/S2010")
    again = run(scans, model, out)
    assert (again.done, again.skipped) == (1, 2) and before.items() <= listing(out).items()
    assert sources(out) == {"S2010": "A/S2010.nii.gz", "S2011": "A/S2011.nii.gz", "B_S2010": "B/S2010.nii.gz"}
    (scans / "A/S2010.nii.gz").unlink()
    third = run(scans, model, out)
    assert (third.done, third.skipped) == (0, 2), "B keeps its name when A is gone"
    agrees(out, ["S2010", "S2011", "B_S2010"])
    patients("C/S2010")
    assert run(scans, model, out).done == 1 and sources(out)["C_S2010"] == "C/S2010.nii.gz"


def test_a_scan_alone_does_not_take_anothers_name(patients, model, tmp_path):
    patients("B/S2010")
    for folder, name in (("A", "S2010"), ("B", "S2010_2"), ("A", "S2010"), ("B", "S2010_2")):
        result = run(tmp_path / "scans" / folder / "S2010.nii.gz", model, tmp_path / "out")
        assert name in set(result.table.case)
    agrees(tmp_path / "out", ["S2010", "S2010_2"])


@pytest.mark.long
@pytest.mark.parametrize("move", ["rename", "link", "relative"])
def test_scans_that_are_moved_or_named_otherwise_are_the_same_cases(patients, model, tmp_path, monkeypatch, move):
    out, scans = tmp_path / "out", tmp_path / "scans"
    patients("B/S2010", seed=sum(map(ord, "A/S2010")))  # the same voxels as A's: two cases all the same
    run(scans, model, out)
    before = listing(out)
    if move == "rename":
        scans = scans.rename(tmp_path / "moved")
    elif move == "link":
        (tmp_path / "linked").symlink_to(scans)
        scans = tmp_path / "linked"
    else:
        monkeypatch.chdir(tmp_path)
        scans = "scans"
    again = run(scans, model, out)
    assert (again.done, again.skipped) == (0, 3) and sorted(again.table.case) == ["A_S2010", "B_S2010", "S2011"]
    assert {name: time for name, time in listing(out).items() if "/" in name} == {name: time for name, time in before.items() if "/" in name}


def test_the_name_of_a_failed_case_stays(patients, model, tmp_path):
    scans, out = tmp_path / "scans", tmp_path / "out"
    good = (scans / "A/S2010.nii.gz").read_bytes()
    (scans / "A/S2010.nii.gz").write_bytes(good[:-100])
    assert list(run(scans, model, out).errors) == ["S2010"]
    patients("B/S2010")
    result = run(scans, model, out)
    assert list(result.errors) == ["S2010"] and sources(out)["B_S2010"] == "B/S2010.nii.gz"
    (scans / "A/S2010.nii.gz").write_bytes(good)
    assert run(scans, model, out).exit_code == 0
    agrees(out, ["S2010", "S2011", "B_S2010"])


def test_a_failure_stays_in_the_table_while_its_scan_is_there(patients, model, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "scans/A/bad.nii.gz").write_bytes(b"not a scan")
    run(tmp_path / "scans/A", model, out)
    patients("B/S2012")
    assert set(run(tmp_path / "scans/B", model, out).table.case) == {"S2010", "S2011", "S2012", "bad"}
    (tmp_path / "scans/A/bad.nii.gz").unlink()
    assert set(run(tmp_path / "scans/B", model, out).table.case) == {"S2010", "S2011", "S2012"}


def test_no_case_is_named_like_the_tables(scans, model, tmp_path):
    (scans / "one.nii.gz").rename(tmp_path / "run.json.nii.gz")
    assert list(run(tmp_path / "run.json.nii.gz", model, tmp_path / "out").table.case) == ["run.json_2"]
    agrees(tmp_path / "out", ["run.json_2"])


# --- hidden files ----------------------------------------------------------------------------------------------------


HIDDEN = [".DS_Store", "Thumbs.db", "desktop.ini", "._1.dcm", "__MACOSX/1.dcm", "sub/.DS_Store", ".git/config"]


def test_hidden_files_are_neither_read_nor_hashed(model, tmp_path):
    series = tmp_path / "scans/series"
    write_series(series, volume((40, 40, 4)), spacing=(0.5, 0.5, 5.0))
    for index, name in enumerate(("plain", *HIDDEN)):
        if index:
            touch(series, name)
            (series / name).write_bytes(b"junk" * 50)
        for path in (series, tmp_path / "scans"):
            result = run(path, model, tmp_path / "out")
            assert (result.done, result.skipped, result.failed) == (int(not index and path == series), 1 - int(not index and path == series), 0), name
    old = {f"2-{k:02d}.dcm": hashlib.sha256((series / f"2-{k:02d}.dcm").read_bytes()).hexdigest() for k in range(1, 5)}
    text = json.dumps(old, sort_keys=True, separators=(",", ":"))
    assert read_json(tmp_path / "out/series/case.json")["input"] == hashlib.sha256(text.encode()).hexdigest(), "as 0.1.0 had it"


# --- DICOM SEG -------------------------------------------------------------------------------------------------------


def no_study(ds, k):
    del ds.StudyInstanceUID


def one_instance(ds, k):
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "1.2.826.0.9"


@pytest.mark.parametrize("change", [no_study, one_instance])
@pytest.mark.parametrize("alone", [True, False])
def test_a_series_that_no_seg_can_refer_to_gets_its_mask(model, tmp_path, change, alone):
    write_series(tmp_path / "scans/bad", volume((40, 40, 4)), change=change, spacing=(0.5, 0.5, 5.0))
    write_series(tmp_path / "scans/good", volume((40, 40, 4)), spacing=(0.5, 0.5, 5.0))
    result = run(tmp_path / "scans" / ("bad" if alone else ""), model, tmp_path / "out", dicom_seg=True)
    assert result.exit_code == 0 and "no DICOM SEG: " in result.table.warnings[0] and "InstanceUID is missing or" in result.table.warnings[0]
    assert sorted(path.name for path in (tmp_path / "out/bad").iterdir()) == ["case.json", "mask.nii.gz", "overlay.png"]
    assert alone or (tmp_path / "out/good/mask_seg.dcm").is_file() and "SEG" not in result.table.warnings[1]
    assert run(tmp_path / "scans" / ("bad" if alone else ""), model, tmp_path / "out", dicom_seg=True).done == 0


def test_a_seg_without_its_library_is_refused_before_the_inference(scans, model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "highdicom", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(cases_module, "find_spec", lambda name: None, raising=False)
    monkeypatch.setattr(cases_module, "predict_scan", lambda *arguments, **options: pytest.fail("it began"))
    with pytest.raises(ValueError, match="highdicom: pip install"):
        run(scans, model, tmp_path / "out", dicom_seg=True)
    assert not (tmp_path / "out").exists()


# --- a full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("code,words", [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "quota is used up"), (errno.EROFS, "read-only")])
@pytest.mark.parametrize("writer", ["write_like", "save_figure", "write_json"])
def test_a_full_disk_stops_the_run_and_says_what_is_needed(scans, model, tmp_path, monkeypatch, code, words, writer):
    "At the second of three cases, whatever is being written; the same call goes on when there is room."
    out, real = tmp_path / "out", getattr(cases_module, writer)

    def full(*arguments):
        if any(isinstance(a, os.PathLike) and ".three" in str(a) for a in arguments):
            raise OSError(code, os.strerror(code), "somewhere")
        return real(*arguments)

    monkeypatch.setattr(cases_module, writer, full)
    with pytest.raises(OSError, match=f"out .*{words}.* 2 of 3 cases are left, each of up to 1 MB; those that are done are kept"):
        run(scans, model, out)
    assert sorted(path.name for path in out.iterdir()) == ["cases.csv", "one", "run.json"] and read_json(out / "run.json")["complete"] is False
    assert list(pd.read_csv(out / "cases.csv").case) == ["one"]
    monkeypatch.setattr(cases_module, writer, real)
    result = run(scans, model, out)
    assert (result.done, result.skipped) == (2, 1)
    agrees(out, ["one", "two", "three"])


LIMITED = """
import resource, sys
from sahlora.prediction import predict_cases
predict_cases(*sys.argv[1:4], progress=False)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # room for tables, not for an overlay
result = predict_cases(*sys.argv[4:7], progress=False)
print(result.done, result.skipped, result.failed)
"""


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a limit on the size of files")
def test_a_file_that_may_not_grow_fails_its_own_case(scans, model, tmp_path):
    "A limit on the size of one file says nothing of the next case; really written, not pretended."
    (tmp_path / "first").mkdir()
    (scans / "two.nii.gz").rename(tmp_path / "first/two.nii.gz")
    done = subprocess.run([sys.executable, "-c", LIMITED, tmp_path / "first", model, tmp_path / "out", scans, model, tmp_path / "out"],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.split() == ["0", "0", "2"], done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cases.csv", "run.json", "two"]
    assert "too large" in " ".join(read_json(tmp_path / "out/run.json")["errors"].values())


# --- what another call left, and what is a user's --------------------------------------------------------------------


def inside(out):
    return {name: time for name, time in listing(out).items() if "/" in name}


def test_overwrite_keeps_what_the_same_call_has_done(scans, model, tmp_path, phantom):
    out = tmp_path / "out"
    run(scans, model, out)
    before = inside(out)
    again = run(scans, model, out, overwrite=True)
    assert (again.done, again.skipped) == (0, 3) and inside(out) == before
    write_nifti(scans / "two.nii.gz", np.roll(phantom.hu, 9, 1).astype(np.int16), phantom.affine)
    again = run(scans, model, out, overwrite=True)
    assert (again.done, again.skipped) == (1, 2) and {name for name, time in inside(out).items() if before[name] != time} == {
        "two/mask.nii.gz", "two/overlay.png", "two/case.json"}


@pytest.mark.long
def test_a_users_files_stay_when_a_case_is_made_again(scans, model, tmp_path):
    out = tmp_path / "out"
    run(scans, model, out, save_probabilities=True)
    touch(out, "one/notes.txt", "one/sub/mine.png", "notes.txt", "mine/notes.txt")
    result = run(scans, model, out, threshold=0.3, overwrite=True)
    assert result.done == 3 and not (out / "one/probabilities.nii.gz").exists(), "what no longer belongs to the case goes"
    files = {"case.json", "mask.nii.gz", "overlay.png"}
    assert {path.name for path in (out / "one").iterdir()} == {*files, "notes.txt", "sub"} and (out / "one/sub/mine.png").exists()
    assert (out / "notes.txt").exists() and (out / "mine/notes.txt").exists()
    assert set(read_json(out / "one/case.json")["files"]) == files - {"case.json"}
    touch(out, "two/probabilities.nii.gz")
    result = run(scans, model, out, threshold=0.3, save_probabilities=True, overwrite=True)
    assert list(result.errors) == ["two"] and "two/probabilities.nii.gz: is no file of this case" in result.errors["two"]
    assert (out / "two/probabilities.nii.gz").stat().st_size == 0 and (out / "two/mask.nii.gz").exists()


@pytest.mark.long
@pytest.mark.parametrize("name", ["one/mask.nii.gz", "one/overlay.png", "cases.csv"])
def test_a_file_that_was_edited_is_not_overwritten_in_silence(scans, model, tmp_path, name):
    out = tmp_path / "out"
    run(scans, model, out)
    was = (out / name).read_bytes()
    (out / name).write_bytes(was + b"mine")
    before = listing(out)
    with pytest.raises(ValueError, match=f"out/one: .*: {Path(name).name} was changed since|out/{name}: was changed since"):
        run(scans, model, out)
    assert listing(out) == before
    result = run(scans, model, out, overwrite=True)
    assert result.done == int("/" in name) and (out / name).read_bytes() == was


def test_a_file_that_was_removed_is_made_again(scans, model, tmp_path):
    out = tmp_path / "out"
    run(scans, model, out)
    was = (out / "one/mask.nii.gz").read_bytes()
    (out / "one/mask.nii.gz").unlink()
    assert run(scans, model, out).done == 1 and (out / "one/mask.nii.gz").read_bytes() == was


REPLACED = """
import os, signal, sys
from sahlora.prediction import cases, predict_cases
count, real = int(sys.argv[4]), os.replace
def replace(old, new):
    global count
    if "one" in os.fspath(new).split(os.sep)[-2:-1] and ".part." in os.fspath(old).split(os.sep)[-2]:
        if not count:
            os.kill(os.getpid(), signal.SIGKILL)
        count -= 1
    real(old, new)
os.replace = replace
predict_cases(*sys.argv[1:4], progress=False, threshold=0.3, overwrite=True)
"""


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("count", [0, 1, 2])
def test_killed_while_a_case_is_replaced(scans, model, tmp_path, count):
    "Before the first file, after the mask, before case.json: the user's note stays, and the next run makes the case whole."
    out = tmp_path / "out"
    run(scans / "one.nii.gz", model, out, save_probabilities=True)
    (out / "one/notes.txt").write_text("mine")
    done = subprocess.run([sys.executable, "-c", REPLACED, scans / "one.nii.gz", model, out, str(count)], capture_output=True, text=True, timeout=120)
    assert done.returncode == -9, done.stderr
    assert (out / "one/notes.txt").read_text() == "mine" and read_json(out / "one/case.json")["complete"] is False
    other = run(scans / "two.nii.gz", model, out, threshold=0.3)
    assert list(other.table.case) == ["two"], "half a case is not in the table"
    result = run(scans / "one.nii.gz", model, out, threshold=0.3)
    assert result.done == 1 and (out / "one/notes.txt").read_text() == "mine"
    assert {path.name for path in (out / "one").iterdir()} == {"case.json", "mask.nii.gz", "overlay.png", "notes.txt"}
    run(scans / "one.nii.gz", model, tmp_path / "fresh", threshold=0.3)
    assert (out / "one/mask.nii.gz").read_bytes() == (tmp_path / "fresh/one/mask.nii.gz").read_bytes()
    agrees(out, ["one", "two"])


@pytest.mark.parametrize("name,text", [("run.json", '{"seconds": 3, "strategy": {}}'), ("run.json", "[1]"), ("cases.csv", "case,mine\na,1\n"),
                                       ("cases.csv", ",".join(CASE_COLUMNS) + "\n")])
def test_tables_of_others_are_never_overwritten(scans, model, tmp_path, name, text):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text(text)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=f"out/{name}: is there already"):
            run(scans, model, out, overwrite=overwrite)
    assert (out / name).read_text() == text and list(listing(out)) == [name]


def as_0_1_0(out):
    "Write the records of a folder as sahlora 0.1.0 wrote them."
    for path in out.glob("*/case.json"):
        record = read_json(path)
        path.write_text(json.dumps({key: value for key, value in record.items() if key not in ("told", "complete")}
                                   | {"files": sorted(record["files"])}))
    record = read_json(out / "run.json")
    del record["table"]
    (out / "run.json").write_text(json.dumps(record))


OLD = Path(__file__).parent / "files_0_1_0"


def test_a_folder_that_0_1_0_wrote_is_gone_on_with(tmp_path):
    "The files as it left them, from the folder that it named the scan from and from another."
    shutil.copytree(OLD / "predicted", tmp_path / "out")
    before = listing(tmp_path / "out")
    with contextlib.chdir(OLD):
        again = run("cohort/images/asah-0000.nii.gz", "model.safetensors", tmp_path / "out", adapter="run/adapter-fold0.safetensors")
    assert (again.done, again.skipped) == (0, 1) and list(again.table.case) == ["asah-0000"]
    again = run(OLD / "cohort", OLD / "model.safetensors", tmp_path / "out", adapter=OLD / "run/adapter-fold0.safetensors")
    assert (again.done, again.skipped) == (2, 1) and sorted(again.table.case) == ["asah-0000", "asah-0001", "asah-0002"]
    assert {name: before[name] for name in before if "/" in name}.items() <= listing(tmp_path / "out").items()


def test_cases_of_0_1_0_are_gone_on_with(scans, model, tmp_path):
    out = tmp_path / "out"
    run(scans / "one.nii.gz", model, out)
    as_0_1_0(out)
    before = inside(out)
    again = run(scans, model, out)
    assert (again.done, again.skipped) == (2, 1) and before.items() <= inside(out).items()
    with pytest.raises(ValueError, match="out/one: holds the files of another call: threshold was 0.5, is 0.3"):
        run(scans, model, out, threshold=0.3)
    as_0_1_0(out)
    assert run(scans, model, out, threshold=0.3, overwrite=True).done == 3
    agrees(out, ["one", "two", "three"])


@pytest.mark.parametrize("files", [["../../mine.txt"], {"../../mine.txt": None}, ["sub/mine.txt"], [1]])
def test_a_record_that_names_files_elsewhere_is_refused(scans, model, tmp_path, files):
    out = tmp_path / "out"
    run(scans / "one.nii.gz", model, out)
    (tmp_path / "mine.txt").write_text("mine")
    (out / "one/case.json").write_text(json.dumps(read_json(out / "one/case.json") | {"files": files}))
    with pytest.raises(ValueError, match="one/case.json: not written by this command"):
        run(scans / "one.nii.gz", model, out, threshold=0.3, overwrite=True)
    assert (tmp_path / "mine.txt").exists()


# --- what is known of the weights, and of the packages ---------------------------------------------------------------


def test_weights_that_are_not_their_runs_are_refused(scans, net, tmp_path):
    from sahlora.common.files import output_folder

    with output_folder(tmp_path / "run", "pretrain", {"seed": 1}, ["model.safetensors"]):
        save_network(tmp_path / "run/model.safetensors", net)
        with pytest.raises(ValueError, match="model.safetensors: the pretrain that writes it has not ended"):
            run(scans, tmp_path / "run/model.safetensors", tmp_path / "out")
    assert run(scans / "one.nii.gz", tmp_path / "run/model.safetensors", tmp_path / "out").done == 1
    adapted = copy.deepcopy(net)
    adapt(adapted, "cp-lora", rank=2, where="decoding")
    with output_folder(tmp_path / "fold", "finetune", {"seed": 1}, ["a.safetensors"]):
        save_adapter(adapted, tmp_path / "fold/a.safetensors")
    adapt(net := copy.deepcopy(net), "convlora", rank=2, where="decoding")
    save_adapter(net, tmp_path / "fold/a.safetensors")
    with pytest.raises(ValueError, match="a.safetensors: is not the file that record.json"):
        run(scans, tmp_path / "run/model.safetensors", tmp_path / "other", adapter=tmp_path / "fold/a.safetensors")
    save_network(tmp_path / "run/model.safetensors", lively(Unet(levels=2, width=4), seed=5))
    with pytest.raises(ValueError, match="model.safetensors: is not the file that record.json"):
        run(scans, tmp_path / "run/model.safetensors", tmp_path / "other")
    assert not (tmp_path / "other").exists()


NO_METADATA = """
import importlib.metadata as metadata, sys
real = metadata.version
def version(name):
    if name in ("sahlora", "nibabel", "pydicom"):
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.version = version
from sahlora.prediction import predict_cases
predict_cases(*sys.argv[1:4], progress=False)
"""


@pytest.mark.long
def test_versions_that_are_not_known_do_not_stop_a_run(scans, model, tmp_path):
    done = subprocess.run([sys.executable, "-c", NO_METADATA, scans / "one.nii.gz", model, tmp_path / "out"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = read_json(tmp_path / "out/run.json")
    assert found["versions"]["sahlora"] == found["versions"]["nibabel"] == found["versions"]["pydicom"] == found["sahlora"] == "unknown"
    assert found["versions"]["torch"] == torch.__version__
