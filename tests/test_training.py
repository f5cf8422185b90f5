"""The loop: balanced, seeded, frozen where it says frozen, whole checkpoints."""
import numpy as np
import pytest
import torch
from monai.losses import DiceLoss

from sahlora.files import load_tensors, save_tensors
from sahlora.training import (BalancedBatches, Slices, ct_to_images, load_network, pad_to_multiple, predict,
                              save_network, train, weights_hash)
from sahlora.unet import MultiViewUnet, Unet


def toy(count=6, size=16, blood=3):
    "Bright squares on noise; the first `blood` slices hold one."
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 1, size, size, generator=generator) * 0.3
    masks = torch.zeros(count, 1, size, size, dtype=torch.uint8)
    masks[:blood, :, 4:10, 4:10] = 1
    return Slices(images + 0.6 * masks, masks, tuple(f"p{i}" for i in range(count)))


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_batches_are_balanced_and_use_every_slice(batch_size):
    has_blood = torch.tensor([True] * 3 + [False] * 9)
    batches = BalancedBatches(has_blood, batch_size, seed=1)
    drawn = torch.stack([next(batches) for _ in range(60)])
    assert (has_blood[drawn].sum(1) == batch_size - batch_size // 2).all()
    counts = torch.bincount(drawn.flatten(), minlength=12)
    for pool in (counts[:3], counts[3:]):
        assert pool.min() > 0 and pool.max() - pool.min() <= 1, "a pool is used up before it starts again"


def test_batches_depend_on_the_seed_alone():
    has_blood = torch.arange(20) < 7
    draw = lambda seed: [next(b).tolist() for b in [BalancedBatches(has_blood, 6, seed)] for _ in range(9)]
    assert draw(3) == draw(3) != draw(4)


def test_one_kind_only_is_said_and_nothing_is_refused_in_silence():
    assert "no slice without blood" in BalancedBatches(torch.ones(4, dtype=torch.bool), 2).note
    assert "no slice with blood" in BalancedBatches(torch.zeros(4, dtype=torch.bool), 2).note
    assert BalancedBatches(torch.tensor([True, False]), 2).note == ""
    with pytest.raises(ValueError, match="need slices"):
        BalancedBatches(torch.zeros(0, dtype=torch.bool), 2)


def test_padding_is_below_and_right():
    planes = torch.ones(2, 5, 6)
    padded = pad_to_multiple(planes, 4)
    assert padded.shape == (2, 8, 8) and padded[:, :5, :6].all() and padded.sum() == 60
    assert ct_to_images(np.full((1, 4, 4), 70.0), 4).tolist() == torch.full((1, 1, 4, 4), 0.5).tolist()


def test_same_seed_same_weights_other_seed_others():
    hashes = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        net = MultiViewUnet(levels=1)
        train(net, toy(), steps=4, batch_size=4, seed=seed, quiet=True)
        hashes.append(weights_hash(net))
    assert hashes[0] == hashes[1] != hashes[2]


def test_frozen_batch_norm_does_not_drift():
    torch.manual_seed(0)
    net = MultiViewUnet(levels=1)
    net.requires_grad_(False)
    net.last.requires_grad_(True)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    train(net, toy(), steps=3, batch_size=4, quiet=True)
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith("last.") for name in moved)
    assert any("running_mean" in name for name in moved), "statistics of the trained part follow the data"


def test_one_step_is_adam_on_monais_loss():
    "The first step written out by hand: the same batch, MONAI's loss, torch's Adam."
    torch.manual_seed(0)
    net, data = MultiViewUnet(levels=1), toy(count=2, blood=1)
    other = MultiViewUnet(levels=1)
    other.load_state_dict(net.state_dict())
    other.to(memory_format=torch.channels_last)
    history = train(net, data, steps=1, batch_size=2, learning_rate=1e-2, seed=5, quiet=True)
    mirror = torch.rand(2, generator=torch.Generator().manual_seed(5)) < 0.5
    images = torch.stack([x.flip(-1) if m else x for x, m in zip(data.images, mirror)])
    assert mirror.tolist() != [False, False], "the seed mirrors at least one"
    masks = torch.stack([x.flip(-1) if m else x for x, m in zip(data.masks, mirror)]).float()
    optimizer = torch.optim.Adam(other.parameters(), lr=1e-2)
    loss = DiceLoss(sigmoid=True, batch=True)(other.train()(images), masks)
    loss.backward()
    optimizer.step()
    assert history.loss[0] == pytest.approx(loss.item(), abs=1e-6)
    for one, two in zip(net.parameters(), other.parameters()):
        assert torch.equal(one, two)


def test_a_loss_that_is_not_a_number_names_patients():
    data = toy()
    data.images[0] = float("nan")
    with pytest.raises(FloatingPointError, match="step 1 .*p0"):
        train(MultiViewUnet(levels=1), data, steps=2, batch_size=12, quiet=True)


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="nothing to train"):
        train(MultiViewUnet(levels=1).requires_grad_(False), toy(), steps=1, quiet=True)


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
    torch.manual_seed(0)
    net, x = MultiViewUnet(levels=1), torch.rand(7, 1, 16, 16)
    assert torch.allclose(predict(net, x, 2), predict(net, x, 7), atol=1e-7)
