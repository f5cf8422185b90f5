"""Batches, augmentation, the loop and its checkpoints: balanced, seeded, frozen where it says frozen, resumable."""
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from monai.losses import DiceCELoss, DiceLoss

from sahlora.cohorts import slices
from sahlora.adapters import adapt
from sahlora.cohorts.slices import (NO_AUGMENTATION, Augmentation, BalancedBatches, augment, bend,
                                    bend_mask, displacement, open_store, pack, sample_generator,
                                    smooth, unpack)
from sahlora.cohorts.cohort import Case, Cohort, make_phantom_cohort, write_cohort
from sahlora.common import hardware
from sahlora.common.files import differences, load_tensors, save_tensors
from sahlora.training.loop import (Checkpoint, Trainer, Training, batch_dice, batch_loss, ct_to_images, dice_of_rows,
                                   find_checkpoint, load_network, make_training, moving_average, pad_to_multiple,
                                   predict, pretrain, save_network, train, training_facts, weights_hash)
from sahlora.unet import NETWORKS, MultiViewUnet, Unet

PLAIN = Training(steps=4, batch_size=4, precision="fp32", augmentation=NO_AUGMENTATION)


def with_air_and_bone(hu):
    "HU (X, Y, Z) with a rim of air and of bone, without which a volume is not taken for CT."
    hu[0], hu[-1] = -1000, 1000
    return hu


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    "Six patients of three slices: bright squares on noise, in the first four patients only."
    draw, cases = np.random.default_rng(0), []
    for k in range(6):
        hu = np.rint(draw.uniform(0, 40, (16, 16, 3))).astype(np.int16)
        mask = np.zeros((16, 16, 3), np.uint8)
        mask[4:10, 4:10, 1] = k < 4
        cases.append(Case(f"c{k}", f"p{k}", "toy", with_air_and_bone(hu + 60 * mask.astype(np.int16)), mask, np.diag([-1.0, -1, 5, 1])))
    return open_store(write_cohort(tmp_path_factory.mktemp("toy") / "cohort", cases), 4)


def everything(store):
    return np.arange(len(store))


def network(seed=0, levels=1):
    torch.manual_seed(seed)
    return MultiViewUnet(levels=levels)


# --- slices and batches -------------------------------------------------------------------------------------------


def test_bytes_hold_whole_hu_exactly():
    hu = np.arange(-1024, 3000, dtype=np.float32)
    assert np.array_equal(unpack(pack(hu)), np.clip(hu, -30, 170))
    assert unpack(pack(np.array([10.4, 10.6], np.float32))).tolist() == [10, 11]


def test_a_store_gives_what_the_cohort_holds(store):
    assert len(store) == 18 and store.size == (16, 16) and store.blood.sum() == 4
    assert store.rows(["p1", "p5"]).tolist() == [3, 4, 5, 15, 16, 17]
    hu, masks = store.read([4, 0, 4])
    assert torch.equal(hu[0], hu[2]) and masks[0].sum() == 36 and not masks[1].any() and hu[0].max() > 60
    with pytest.raises(ValueError, match="no patient p9"):
        store.rows(["p9"])


def test_other_content_is_another_store(tmp_path):
    def case(value):
        return Case("c", "p", "toy", with_air_and_bone(np.full((16, 18, 2), value, np.int16)), np.zeros((16, 18, 2), np.uint8), np.eye(4))

    cohort = write_cohort(tmp_path / "one", [case(10)])
    first = open_store(cohort, 4)
    assert open_store(cohort, 4).folder == first.folder and first.size == (20, 16)
    again = open_store(write_cohort(tmp_path / "one", [case(11)], overwrite=True), 4)
    assert again.folder != first.folder and again.read([0])[0].median() == 11


def test_a_store_made_by_many_at_once_is_one_store(store, tmp_path, monkeypatch):
    cohort, unpacked, calls = Cohort.read(store.folder.parent.parent), slices._unpack_cohort, []

    def unpack_slowly(*told):
        calls.append(told)
        time.sleep(0.5)  # so that all the others ask meanwhile
        unpacked(*told)

    monkeypatch.setattr(slices, "_cache_folder", lambda cohort, key: tmp_path / "cache" / key)
    monkeypatch.setattr(slices, "_unpack_cohort", unpack_slowly)
    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(open_store, [cohort] * 6, [4] * 6))
    assert len(calls) == 1
    assert {one.folder for one in made} == set((tmp_path / "cache").iterdir()) and len({one.folder for one in made}) == 1
    assert all(torch.equal(one.read(range(len(store)))[0], store.read(range(len(store)))[0]) for one in made)
    assert made[0].folder.stat().st_mode & 0o777 == 0o777 & ~os.umask(os.umask(0o022)), "colleagues can read it"


def test_slices_of_two_sizes_are_refused(tmp_path):
    cases = [Case(f"c{n}", f"p{n}", "toy", with_air_and_bone(np.zeros((n, 16, 2), np.int16)), np.zeros((n, 16, 2), np.uint8), np.eye(4)) for n in (16, 24)]
    with pytest.raises(ValueError, match="c24.*one slice size"):
        open_store(write_cohort(tmp_path / "c", cases), 4)
    assert not (tmp_path / "c/cache").exists()


def other_index(folder, **change):
    "Change entries of index.json, which keeps its form."
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {name: list(how(index[name])) for name, how in change.items()}))


@pytest.mark.parametrize("damage", [lambda f: (f / "masks.u8").write_bytes((f / "masks.u8").read_bytes()[:-1]),
                                    lambda f: (f / "images.u8").unlink(), lambda f: (f / "index.json").write_text("{"),
                                    lambda f: (f / "index.json").write_text("{}"), lambda f: (f / "index.json").write_text("[" * 100_000),
                                    lambda f: other_index(f, patients=reversed), lambda f: other_index(f, size=reversed),
                                    lambda f: other_index(f, blood=lambda blood: [not one for one in blood])])
def test_a_store_that_is_not_whole_is_made_again(store, tmp_path, damage):
    shutil.copytree(store.folder.parent.parent, tmp_path / "c")
    damage(tmp_path / "c/cache" / store.folder.name)
    again = open_store(Cohort.read(tmp_path / "c"), 4)
    assert torch.equal(again.read(range(len(store)))[0], store.read(range(len(store)))[0])
    assert all(getattr(again, name).tolist() == getattr(store, name).tolist() for name in ("patients", "cases", "blood"))


@pytest.mark.parametrize("trap", [lambda own: own.symlink_to(own.parent / "theirs"), lambda own: (own.mkdir(), own.chmod(0o777))])
def test_a_folder_of_temporary_files_that_others_can_write_is_passed_over(store, tmp_path, monkeypatch, trap):
    "A store there could hold anybody's slices: with the right name and the right sizes."
    cohort, own = Cohort.read(store.folder.parent.parent), tmp_path / f"sahlora-{os.getuid()}"
    (tmp_path / "theirs").mkdir()
    trap(own)
    planted = own / slices.cache_key(cohort, 4)[:20]
    shutil.copytree(store.folder, planted)
    (planted / "images.u8").write_bytes(bytes((planted / "images.u8").stat().st_size))
    monkeypatch.setattr(slices.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(slices, "_is_whole", lambda folder, real=slices._is_whole: folder.is_relative_to(tmp_path) and real(folder))
    monkeypatch.setattr(slices.os, "access", lambda *_: False)  # the cohort's own folder is read-only
    found = open_store(cohort, 4)
    assert torch.equal(found.read(range(len(store)))[0], store.read(range(len(store)))[0])


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_batches_are_balanced_and_use_every_slice(batch_size):
    blood = np.array([True] * 3 + [False] * 9)
    batches = BalancedBatches(np.arange(12) + 100, blood, batch_size, seed=1)
    drawn = np.array([batches.batch(k) for k in range(60)]) - 100
    assert (blood[drawn].sum(1) == batch_size - batch_size // 2).all()
    counts = np.bincount(drawn.ravel(), minlength=12)
    for pool in (counts[:3], counts[3:]):
        assert pool.min() > 0 and np.ptp(pool) <= 1, "a pool is used up before it starts again"
    assert all(np.array_equal(batches.batch(k) - 100, drawn[k]) for k in (59, 3, 0)), "any batch, in any order"


def test_batches_depend_on_the_seed_alone():
    blood = np.arange(20) < 7
    draw = lambda seed: [BalancedBatches(np.arange(20), blood, 6, seed).batch(k).tolist() for k in range(9)]  # noqa: E731
    assert draw(3) == draw(3) != draw(4)


def test_one_kind_only_is_said_and_nothing_is_refused_in_silence():
    assert "no slice without blood" in BalancedBatches(np.arange(4), np.ones(4, bool), 2).note
    assert "no slice with blood" in BalancedBatches(np.arange(4), np.zeros(4, bool), 2).note
    assert BalancedBatches(np.arange(2), np.array([True, False]), 2).note == ""
    for rows, size in ((0, 2), (4, 1)):
        with pytest.raises(ValueError, match="need slices"):
            BalancedBatches(np.arange(rows), np.zeros(rows, bool), size)


# --- augmentation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [1.0, 4.0])
def test_blur_is_scipys(sigma):
    from scipy.ndimage import gaussian_filter

    field = torch.rand(1, 2, 40, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = np.stack([gaussian_filter(plane, sigma, mode="mirror", truncate=4) for plane in field[0].numpy()])
    assert np.abs(smooth(field, sigma)[0].numpy() - expected).max() < 1e-6


@pytest.mark.parametrize("size", [(64, 64), (80, 64), (64, 160)])
def test_displacement_is_as_large_along_x_as_along_y_in_pixels(size):
    "A point is moved by `bend`, and where its centre of mass goes is compared: whatever the shape of a slice."
    noise = torch.rand(2, 2, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    noise[:, 1] = noise[:, 0]  # the same along both axes
    height, width = size
    field = displacement(noise, 20, 4)
    y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    places = bend(torch.stack([x, y]).expand(2, -1, -1, -1), field)
    moved = (places - torch.stack([x, y]))[..., 8:-8, 8:-8]
    assert moved.abs().max() > 0.3 and (moved[:, 0] - moved[:, 1]).abs().max() < 1e-4


def test_bend_samples_where_it_says():
    picture = torch.rand(1, 1, 12, 16)
    assert torch.allclose(bend(picture, torch.zeros(1, 12, 16, 2)), picture, atol=1e-6)
    right = torch.zeros(1, 12, 16, 2)
    right[..., 0] = 2 / 16  # one pixel to the right
    moved = bend(picture, right)
    assert torch.allclose(moved[..., :-1], picture[..., 1:], atol=1e-5) and torch.allclose(moved[..., -1], torch.zeros(12), atol=1e-5)


def test_thin_masks_keep_their_size_but_for_the_papers_cut():
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., 20:100, 60:62] = 1
    field = displacement(torch.rand(1, 2, 128, 128, generator=sample_generator(0, 0)) * 2 - 1, 5, 4)
    sizes = {cut: (bend_mask(mask, field, cut).sum() / mask.sum()).item() for cut in ("half", "nearest", "paper")}
    assert abs(sizes["half"] - 1) < 0.05 and abs(sizes["nearest"] - 1) < 0.05 and sizes["paper"] > 1.4
    with pytest.raises(ValueError, match="half, nearest, paper"):
        bend_mask(mask, field, "third")


@pytest.mark.parametrize("how", [Augmentation(), Augmentation(elastic=1, alpha=80, jitter=1, jitter_weight=0.5)])
def test_a_slice_is_augmented_alike_in_any_batch(how):
    hu, masks = torch.rand(5, 1, 20, 24) * 140, (torch.rand(5, 1, 20, 24) > 0.7).byte()
    together = augment(hu, masks, range(7, 12), 3, how)
    alone = [augment(hu[j : j + 1], masks[j : j + 1], [7 + j], 3, how) for j in range(5)]
    for one, parts in zip(together, zip(*alone)):
        assert torch.equal(one, torch.cat(parts))
    assert set(together[1].unique().tolist()) <= {0.0, 1.0} and 0 <= together[0].min() and together[0].max() <= 1
    assert (together[2] == (how.jitter_weight if how.jitter else 1)).all()


def test_jitter_moves_the_window():
    hu = torch.full((400, 1, 2, 2), 70.0)
    images, _, _ = augment(hu, torch.zeros_like(hu), range(400), 0, Augmentation(elastic=0, flip=0, jitter=1))
    low, high = (70 - 30) / (170 - 30), (70 + 30) / (110 + 30)
    assert low - 0.2 < images.min() < 0.4 and 0.6 < images.max() < high + 0.2 and abs(images.mean() - 0.5) < 0.02


@pytest.mark.parametrize("wrong", [{"elastic": 2}, {"flip": -1}, {"masks": "big"}, {"sigma": 0}, {"jitter_hu": 30.5}, {"jitter_hu": 71},
                                   {"jitter_hu": float("nan")}, {"alpha": float("inf")}, {"alpha": -5.0}, {"sigma": 1e6}, {"flip": "0.5"},
                                   {"jitter_weight": float("inf")}, {"elastic": True}, {"alpha": 1e12}, {"jitter_weight": 0.0},
                                   {"jitter_weight": 1e308}])
def test_impossible_augmentation_is_refused(wrong):
    with pytest.raises(ValueError):
        Augmentation(**wrong)


# --- the loop -----------------------------------------------------------------------------------------------------


def test_padding_is_below_and_right():
    padded = pad_to_multiple(torch.ones(2, 5, 6), 4)
    assert padded.shape == (2, 8, 8) and padded[:, :5, :6].all() and padded.sum() == 60
    assert ct_to_images(np.full((1, 4, 4), 70.0), 4).tolist() == torch.full((1, 1, 4, 4), 0.5).tolist()


def test_losses_are_monais():
    logits, truth = torch.randn(3, 1, 9, 9), (torch.rand(3, 1, 9, 9) > 0.7).float()
    assert torch.isclose(1 - batch_dice(logits, truth), DiceLoss(sigmoid=True, batch=True)(logits, truth), atol=1e-6)
    loss, dice = batch_loss("dice+ce", logits, truth, torch.ones(3))
    assert torch.isclose(loss, DiceCELoss(sigmoid=True, batch=True)(logits, truth), atol=1e-5) and 0 < dice < 1


def test_same_seed_same_weights_other_seed_others(store):
    hashes = []
    for seed in (0, 0, 1):
        net = network(seed)
        train(net, store, everything(store), Training(steps=4, batch_size=4, seed=seed), quiet=True)
        hashes.append(weights_hash(net))
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("workers", [1, 3])
def test_readers_change_nothing(store, workers):
    hashes = []
    for count in (0, workers):
        net = network()
        train(net, store, everything(store), Training(steps=5, batch_size=4, workers=count), quiet=True)
        hashes.append(weights_hash(net))
    assert hashes[0] == hashes[1]


def test_frozen_batch_norm_does_not_drift(store):
    net = network().requires_grad_(False)
    net.last.requires_grad_(True)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    train(net, store, everything(store), PLAIN, quiet=True)
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith("last.") for name in moved)
    assert any("running_mean" in name for name in moved), "statistics of the trained part follow the data"


def test_one_step_is_adam_on_monais_loss(store):
    "The first step written out by hand: the same batch, MONAI's loss, torch's Adam."
    net, other = network(), network()
    other.to(memory_format=torch.channels_last)
    how = Training(steps=1, batch_size=4, learning_rate=1e-2, seed=5, precision="fp32", augmentation=NO_AUGMENTATION)
    history = train(net, store, everything(store), how, quiet=True)
    hu, masks = store.read(BalancedBatches(everything(store), store.blood, 4, 5).batch(0))
    optimizer = torch.optim.Adam(other.parameters(), lr=1e-2)
    images = (hu / 140).clamp(0, 1).to(memory_format=torch.channels_last)
    loss = DiceLoss(sigmoid=True, batch=True)(other.train()(images), masks.float())
    loss.backward()
    optimizer.step()
    assert history.loss[0] == pytest.approx(loss.item(), abs=1e-6)
    for one, two in zip(net.parameters(), other.parameters()):
        sure = two.grad.abs() > 1e-6  # the gradient of a bias before a norm is rounding alone, and Adam scales it up
        assert torch.allclose(one[sure], two[sure], atol=1e-6)
    assert sum(int((p.grad.abs() > 1e-6).sum()) for p in other.parameters()) > 1000


@pytest.mark.long
def test_two_slices_can_be_learned_by_heart(tmp_path):
    cases, draw = [], np.random.default_rng(3)
    for k in range(2):
        mask = np.zeros((32, 32, 1), np.uint8)
        mask[8 + 6 * k : 18 + 6 * k, 6:20] = 1
        hu = np.rint(draw.normal(35, 8, mask.shape) + 25 * mask).astype(np.int16)
        cases.append(Case(f"c{k}", f"p{k}", "toy", with_air_and_bone(hu), mask, np.diag([-1.0, -1, 5, 1]), spacing="unknown"))
    two = open_store(write_cohort(tmp_path / "two", cases), 4)
    net = network(levels=2)
    train(net, two, everything(two), Training(steps=150, batch_size=2, learning_rate=3e-3, augmentation=NO_AUGMENTATION), quiet=True)
    hu, masks = two.read([0, 1])
    found = predict(net, (hu / 140).clamp(0, 1)) > 0.5
    assert 2 * (found & masks.bool()).sum() / (found.sum() + masks.sum()) > 0.98


@pytest.mark.long
@pytest.mark.parametrize("options", [{"optimizer": "adamw", "weight_decay": 0.1}, {"schedule": "cosine", "warmup": 2}, {"clip": 0.01},
                                     {"loss": "dice+ce"}, {"average": 0.5}, {"precision": "bf16"}])
def test_options_change_the_training(store, options):
    hashes = []
    for more in ({}, options):
        net = network()
        history = train(net, store, everything(store), make_training({**training_facts(PLAIN), **more}), quiet=True)
        assert np.isfinite(history.loss).all() and len(history) == 4 and not net.training
        hashes.append(weights_hash(net))
    assert hashes[0] != hashes[1]


def norms_of(net):
    "Running statistics by name."
    return {name: value for name, value in net.state_dict().items() if "running" in name}


@pytest.mark.long
@pytest.mark.parametrize("more", [{}, {"patience": 50}])
def test_averaged_weights_are_scored_with_statistics_of_their_own(store, more):
    "The statistics are what one pass over the training batches gives, and the first weights are forgotten."
    net, rows = network(), everything(store)
    plain = copy.deepcopy(net)
    options = {"steps": 200, "batch_size": 6, "learning_rate": 3e-3, "precision": "fp32", "augmentation": NO_AUGMENTATION}
    how = Training(**options, average=0.99, **more)
    history = train(net, store, rows, how, validation=rows if more else None, quiet=True)
    again, batches = copy.deepcopy(net), BalancedBatches(rows, store.blood, 6, 0)
    images = ((store.read(batches.batch(k))[0] / 140).clamp(0, 1) for k in range(batches.per_epoch))
    torch.optim.swa_utils.update_bn(images, again)
    for name, value in norms_of(again).items():
        assert torch.allclose(value, norms_of(net)[name], rtol=1e-4, atol=1e-6), name
    train(plain, store, rows, Training(**options), quiet=True)
    dice = dice_of_rows(net, store, rows)
    assert dice > 0.8 * dice_of_rows(plain, store, rows) > 0.3
    if more:
        assert dice == pytest.approx(history.validation.max(), abs=1e-6)


def test_averaging_leaves_frozen_norms_alone(store):
    net = MultiViewUnet(levels=2)
    adapt(net, "cp-lora", rank=2, where="decoding")
    before = {name: value.clone() for name, value in net.state_dict().items() if "adapter" not in name}
    train(net, store, np.arange(len(store)), Training(steps=4, batch_size=6, average=0.9), quiet=True)
    after = net.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_average_of_the_first_steps_forgets_the_start():
    mean = torch.ones(1)
    for n in range(1, 100):
        mean = moving_average(0.99, mean, torch.zeros(1), n)
    assert mean < 1e-6  # 0.37 without a warm-up of the decay


def test_stopping_early_keeps_a_copy_of_the_best(store):
    net = network()
    how = Training(steps=200, batch_size=6, learning_rate=0.05, patience=2, augmentation=NO_AUGMENTATION)
    history = train(net, store, store.rows(["p0", "p1", "p4"]), how, validation=store.rows(["p2", "p3"]), quiet=True)
    seen = history.validation.dropna()
    assert len(history) < 200 and len(seen) - 1 - seen.to_numpy().argmax() == 2
    assert dice_of_rows(net, store, store.rows(["p2", "p3"])) == pytest.approx(seen.max(), abs=0.02)
    with pytest.raises(ValueError, match="needs validation slices"):
        train(network(), store, everything(store), how, quiet=True)


def test_a_training_shorter_than_an_epoch_is_scored_at_its_end(store):
    how = Training(steps=2, batch_size=2, patience=1, augmentation=NO_AUGMENTATION)
    history = train(network(), store, store.rows(["p0", "p1"]), how, validation=store.rows(["p2", "p3"]), quiet=True)
    assert len(history) == 2 and history.epoch.max() == 1 and history.validation.notna().tolist() == [False, True]


@pytest.mark.parametrize("rate", [1e30, 1e9])
def test_weights_that_run_away_in_the_last_step_are_not_kept(store, tmp_path, rate):
    with pytest.raises(FloatingPointError, match="the weights ran away in the last step"):
        train(network(), store, everything(store), Training(steps=1, batch_size=4, learning_rate=rate), quiet=True)


def test_nobody_trains_on_masks_without_blood(tmp_path):
    air = np.random.default_rng(0).integers(-1000, 80, (16, 16, 3)).astype(np.int16)
    cases = [Case(f"c{k}", f"p{k}", "toy", with_air_and_bone(air + k), np.zeros(air.shape, np.uint8), np.diag([-2.0, -2, 5, 1])) for k in range(3)]
    with pytest.raises(ValueError, match="no training patient has any blood"):
        pretrain(write_cohort(tmp_path / "c", cases), tmp_path / "base", {"name": "multi-view-unet", "levels": 1}, {"steps": 2}, quiet=True)
    assert not (tmp_path / "base/model.safetensors").exists()


def test_a_network_of_ones_own_needs_no_multiple(store, monkeypatch, tmp_path):
    "One that takes any size says nothing of it."
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.regions, self.only = {"name": "plain"}, {}, torch.nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x):
            return self.only(x)

    monkeypatch.setitem(NETWORKS, "plain", Plain)
    history = pretrain(Cohort.read(store.folder.parent.parent), tmp_path / "base", {"name": "plain"}, {"steps": 2, "batch_size": 2}, quiet=True)
    assert len(history) == 2 and load_network(tmp_path / "base/model.safetensors")[0].multiple == 1


def test_a_loss_that_is_not_a_number_names_cases_and_keeps_the_checkpoint(store, tmp_path):
    checkpoint = Checkpoint(tmp_path / "run.safetensors", {})
    train(net := network(), store, everything(store), PLAIN, checkpoint=checkpoint, every=2, quiet=True)
    kept = checkpoint.path.read_bytes()
    with torch.no_grad():
        next(net.parameters())[:] = float("nan")
    with pytest.raises(FloatingPointError, match=r"step 1 \(epoch 1\), in a batch of the cases .*c\d"):
        train(net, store, everything(store), PLAIN, quiet=True)
    assert checkpoint.path.read_bytes() == kept


def test_nothing_to_train_is_an_error(store):
    with pytest.raises(ValueError, match="nothing to train"):
        train(network().requires_grad_(False), store, everything(store), PLAIN, quiet=True)


def test_training_leaves_the_allocator_of_its_process_alone(store, monkeypatch):
    "The command line and the experiments ask for `keep_memory`; a program that calls `train` may not want it."
    monkeypatch.setattr(hardware, "_kept", {})
    train(network(), store, everything(store), PLAIN, quiet=True)
    assert not hardware._kept


@pytest.mark.parametrize("wrong, words", [({"stepps": 3}, "did you mean 'steps'"), ({"steps": "10"}, "steps"), ({"loss": "focal"}, "dice\\+ce"),
                                          ({"average": 1.0}, "average"), ({"clip": 0}, "clip"), ({"learning_rate": -1}, "learning_rate"),
                                          ({"steps": 10.5}, "steps"), ({"steps": True}, "steps"), ({"steps": "10"}, "steps"),
                                          ({"batch_size": 2.5}, "batch_size"), ({"batch_size": 1}, "batch_size"),
                                          ({"patience": 0}, "patience"), ({"patience": -1}, "patience"), ({"patience": 1.5}, "patience"),
                                          ({"learning_rate": float("inf")}, "learning_rate"), ({"learning_rate": float("nan")}, "learning_rate"),
                                          ({"device": "gpu"}, "device"), ({"precision": "fp8"}, "precision"), ({"seed": -1}, "seed"),
                                          ({"seed": 0.5}, "seed"), ({"warmup": 1.5}, "warmup"), ({"workers": -1}, "workers"),
                                          ({"compile": "yes"}, "compile"), ({"weight_decay": float("inf")}, "weight_decay"),
                                          ({"augmentation": "none"}, "augmentation"), ({"warmup": 100}, "warmup must be below the 100 steps"),
                                          ({"learning_rate": 1e-300}, "learning_rate"), ({"learning_rate": 1e300}, "learning_rate"),
                                          ({"clip": 1e-30}, "clip"), ({"weight_decay": 1e30}, "weight_decay"), ({"seed": 2**64}, "seed")])
def test_wrong_options_are_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        make_training(wrong)


def test_a_device_that_is_not_there(store):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match="cuda is not there"):
        train(network(), store, everything(store), Training(device="cuda"), quiet=True)


# --- checkpoints --------------------------------------------------------------------------------------------------

RUN = """
import sys, torch, numpy as np
from pathlib import Path
from sahlora.cohorts.cohort import Cohort
from sahlora.cohorts.slices import open_store
from sahlora.training.loop import Checkpoint, Training, save_network, train
from sahlora.unet import MultiViewUnet
torch.set_num_threads(1)
folder, out = map(Path, sys.argv[1:])
store = open_store(Cohort.read(folder), 4)
torch.manual_seed(int(out.stem[-1]) * 77)
net = MultiViewUnet(levels=1)
start = torch.Generator().manual_seed(0)
with torch.no_grad():
    for p in net.parameters():
        p.copy_(torch.randn(p.shape, generator=start) * 0.1)
how = Training(steps=60, batch_size=4, precision="fp32", average=0.9)
history = train(net, store, np.arange(len(store)), how, checkpoint=Checkpoint(out.with_suffix(".checkpoint.safetensors"), {"a": 1}), every=5, quiet=True)
save_network(out.with_suffix(".safetensors"), net)
history.to_csv(out.with_suffix(".csv"))
"""


def run_killed(store, out, kills, seed=0):
    "Run the program, kill it after `kills` random times, then let it end."
    command = [sys.executable, "-c", RUN, str(store.folder.parent.parent), str(out)]
    draw = np.random.default_rng(seed)
    for _ in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        wait = draw.uniform(0.05, 1.2)
        target = out.with_suffix(".checkpoint.safetensors")
        begin = time.time()
        while time.time() - begin < 60 and not target.exists() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out.with_suffix(".safetensors").read_bytes(), out.with_suffix(".csv").read_bytes()


@pytest.mark.long
def test_killed_and_gone_on_is_the_same_to_the_last_bit(store, tmp_path):
    whole = run_killed(store, tmp_path / "run0", kills=0)
    assert run_killed(store, tmp_path / "run1", kills=2) == whole
    assert sorted(p.suffix for p in tmp_path.iterdir() if "new" in p.name or p.name.startswith(".")) == []


class Dropping(MultiViewUnet):
    "A network whose training draws from torch's own generator."

    def forward(self, x):
        return super().forward(torch.nn.functional.dropout(x, 0.3, self.training))


@pytest.mark.long
@pytest.mark.parametrize("make, how, held_out", [
    (Dropping, Training(steps=9, batch_size=4, precision="fp32"), None),
    (MultiViewUnet, Training(steps=200, batch_size=6, learning_rate=0.05, patience=2, precision="fp32", augmentation=NO_AUGMENTATION), ["p2", "p3"])])
def test_random_draws_and_early_stopping_go_on_where_they_were(store, tmp_path, monkeypatch, make, how, held_out):
    def run(seed, **options):
        torch.manual_seed(0)
        net = make(levels=1)
        torch.manual_seed(seed)
        rows, validation = store.rows(["p0", "p1", "p4"]), None if held_out is None else store.rows(held_out)
        return train(net, store, rows, how, validation=validation, quiet=True, **options), weights_hash(net)

    whole, hashed = run(seed=5)
    checkpoint = Checkpoint(tmp_path / "run.safetensors", {})
    step = Trainer.step

    def stop_before_the_end(self, k, *batch):
        step(self, k, *batch)
        if k == len(whole) - 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(Trainer, "step", stop_before_the_end)
        with pytest.raises(KeyboardInterrupt):
            run(seed=5, checkpoint=checkpoint, every=1)
    assert find_checkpoint(checkpoint)[1]["step"] == len(whole) - 2
    again, same = run(seed=6, checkpoint=checkpoint, every=1)
    pd.testing.assert_frame_equal(again, whole, check_exact=True)
    assert same == hashed and (held_out or run(seed=6)[1] != hashed)


@pytest.mark.slow
def test_killed_at_20_random_moments(store, tmp_path):
    whole = run_killed(store, tmp_path / "run0", kills=0)
    for k in range(1, 6):
        assert run_killed(store, tmp_path / f"run{k}", kills=4, seed=k) == whole


def test_another_run_is_refused_with_the_difference(store, tmp_path):
    path = tmp_path / "run.safetensors"
    train(network(), store, everything(store), PLAIN, checkpoint=Checkpoint(path, {"split": "a", "how": {"steps": 4}}), every=2, quiet=True)
    with pytest.raises(ValueError, match="how.steps was 4, is 5; split was 'a', is 'b'"):
        train(network(), store, everything(store), PLAIN, checkpoint=Checkpoint(path, {"split": "b", "how": {"steps": 5}}), quiet=True)
    assert differences({"a": {"b": 1}}, {"a": {"b": 1}}) == []


def test_a_damaged_checkpoint_gives_way_to_the_one_before(store, tmp_path, capsys):
    checkpoint = Checkpoint(tmp_path / "run.safetensors", {})
    train(network(), store, everything(store), PLAIN, checkpoint=checkpoint, every=2, quiet=True)
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:1000])
    assert find_checkpoint(checkpoint)[1]["step"] == 2 and "going on from the one before" in capsys.readouterr().out


def test_a_full_disk_keeps_the_last_checkpoint(store, tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path / "run.safetensors", {})
    train(network(), store, everything(store), PLAIN, checkpoint=checkpoint, every=4, quiet=True)
    kept = checkpoint.path.read_bytes()

    def full(descriptor):
        raise OSError(28, os.strerror(28), str(checkpoint.path))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError):
        checkpoint.save(9, network().state_dict(), {})
    assert checkpoint.path.read_bytes() == kept and [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


MANY = """
import resource, sys
import numpy as np
import pandas as pd
from sahlora.cohorts.cohort import Cohort
from sahlora.cohorts.slices import open_store
from sahlora.training.loop import Training, train
from sahlora.unet import MultiViewUnet
store = open_store(Cohort.read(sys.argv[1]), 4)
train(MultiViewUnet(levels=2), store, np.arange(len(store)), Training(steps=20), quiet=True)
print(len(set(store.patients)), len(store), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def many_cases(folder, cases):
    "Patients, slices and peak MiB of a process that trains on so many links to two phantoms."
    few = make_phantom_cohort(folder / "few", "asah", cases=2, seed=0)  # kept, for the second time
    for kind in ("images", "labels"):
        (folder / f"{cases}/{kind}").mkdir(parents=True)
    rows = few.table.loc[np.arange(cases) % 2].reset_index(drop=True)
    for column in ("image", "label"):
        for k, name in enumerate(rows[column]):
            (folder / f"{cases}/{column}s/{k}.nii.gz").symlink_to((few.folder / name).resolve())
        rows[column] = [f"{column}s/{k}.nii.gz" for k in range(cases)]
    rows["case"] = rows["patient"] = [f"p{k:04}" for k in range(cases)]
    rows.to_csv(folder / f"{cases}/cohort.csv", index=False)
    done = subprocess.run([sys.executable, "-c", MANY, str(folder / str(cases))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()[-3:]]


@pytest.mark.parametrize("cases", [20, pytest.param(2000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_cases(tmp_path, cases):
    small, large = many_cases(tmp_path, 4), many_cases(tmp_path, cases)
    assert large[:2] == [cases, 28 * cases] and large[2] < 4096, "4 GiB at most"
    assert large[2] < small[2] + 150, "what a case adds is a row of a table"


# --- networks on disk ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", [MultiViewUnet(levels=1, in_channels=2), Unet(levels=2, width=8)])
def test_networks_come_back_from_disk(net, tmp_path):
    save_network(tmp_path / "net.safetensors", net, note="x")
    again, header = load_network(tmp_path / "net.safetensors")
    assert weights_hash(again) == weights_hash(net) and header["note"] == "x" and type(again) is type(net)
    x = torch.randn(1, net.in_channels, 16, 16)
    assert torch.equal(predict(again, x), predict(net, x))


def test_altered_weights_are_refused(tmp_path):
    net = MultiViewUnet(levels=1)
    save_network(tmp_path / "net.safetensors", net)
    tensors, header = load_tensors(tmp_path / "net.safetensors")
    name = next(iter(tensors))
    save_tensors(tmp_path / "net.safetensors", {**tensors, name: tensors[name] + 1}, header)
    with pytest.raises(ValueError, match="do not match the hash"):
        load_network(tmp_path / "net.safetensors")


def test_predict_does_not_depend_on_the_batch_size():
    net, x = network(), torch.rand(7, 1, 16, 16)
    assert torch.allclose(predict(net, x, 2), predict(net, x, 7), atol=1e-7)


@pytest.mark.long
def test_pretraining_stops_early_on_patients_of_its_own(tmp_path):
    cohort = make_phantom_cohort(tmp_path / "c", "tbi", cases=5, seed=1, grid=(32, 40))
    history = pretrain(cohort, tmp_path / "out", {"name": "multi-view-unet", "levels": 1},
                       {"steps": 400, "batch_size": 32, "learning_rate": 0.05, "patience": 2}, quiet=True)
    assert "validation" in history and len(history) < 400
    epochs = pd.read_csv(tmp_path / "out/epochs.csv")
    assert epochs.loss.iloc[0] == pytest.approx(history.loss[history.epoch == 1].mean()) and len(epochs) == history.epoch.max()
    assert epochs.validation.to_numpy() == pytest.approx(history.validation.dropna().to_numpy())
