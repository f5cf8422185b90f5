"""Adapters put on, switched, merged, copied, taken off: the base comes back to the bit, and no failure is silent."""

import contextlib
import copy
import gc
import io
import pickle
import re
import tempfile
from pathlib import Path

import pytest
import torch
from adapters_reference import METHODS, all_modules_of, bits, factors, randomize, same_bits, same_tensor, weight
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn
from torch.utils.checkpoint import checkpoint

from sahlora.adapters import (
    activate,
    active_adapter,
    adapt,
    adapted_layers,
    adapters,
    deactivate,
    delta_weight,
    disabled,
    effective_weight,
    is_merged,
    load_adapter,
    merge,
    merged_copy,
    remove,
    save_adapter,
    to_peft,
    unmerge,
)


class Toy(nn.Module):
    "A small network with what can go wrong: norms, groups, dilation, a transposed convolution, regions."

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.mid = nn.Conv2d(4, 4, 3, padding="same", dilation=2, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.out = nn.Conv2d(3, 1, 1)
        self.regions = {
            "encoding": ["down", "mid"],
            "decoding": ["up", "out"],
            "all": ["down", "mid", "norm", "up", "out"],
        }

    def forward(self, x):
        return self.out(self.up(torch.relu(self.norm(self.mid(self.down(x))))))


CONVS = ["down.0", "mid", "up", "out"]


def toy(dtype=torch.float64, seed=0):
    """A network whose norms have statistics of their own."""
    torch.manual_seed(seed)
    net = Toy()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.normal_(1, 0.3)
                module.bias.normal_(0, 0.3)
    return net.to(dtype).eval()


def image(dtype=torch.float64, seed=1, batch=3):
    return torch.randn(batch, 2, 6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def out(net, x):
    with torch.no_grad():
        return net(x)


def base_part(net):
    """The state dict without the adapters' keys."""
    return {key: value for key, value in bits(net).items() if ".adapter." not in f".{key}"}


def kinds(net):
    """Classes and flags of every module and parameter: what else an adapter might leave behind."""
    modules = {name: (type(module), module.training) for name, module in net.named_modules()}
    return modules, {name: p.requires_grad for name, p in net.named_parameters()}


def untouched(net, before):
    return same_bits(bits(net), before[0]) and kinds(net) == before[1]


def photo(net):
    return bits(net), kinds(net)


def train(net, steps=2, lr=0.05, x=None):
    """A few steps on whatever is trainable."""
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=lr)
    net.train()
    for seed in range(steps):
        optimizer.zero_grad()
        batch = image(next(net.parameters()).dtype, seed + 10) if x is None else x
        (net(batch) - 1).square().mean().backward()
        optimizer.step()
    return net.eval()


def worst(one, other):
    return (one.double() - other.double()).abs().max().item()


# ----- putting on


@pytest.mark.parametrize(
    "where, names",
    [
        (None, CONVS),
        ("decoding", ["up", "out"]),
        ("encoding", ["down.0", "mid"]),
        ("all", CONVS),
        ("mid", ["mid"]),
        (["mid", "out"], ["mid", "out"]),
        ("*0", ["down.0"]),
        (["encoding", "out"], ["down.0", "mid", "out"]),
        ("down", ["down.0"]),
        (["*"], CONVS),
        (["?[ip]*"], ["mid", "up"]),
        (lambda name, module: module.kernel_size == (3, 3), ["down.0", "mid"]),
        (lambda name, module: isinstance(module, nn.ConvTranspose2d), ["up"]),
        (("up",), ["up"]),
    ],
)
def test_where_selects_the_layers_it_names(where, names):
    net = toy()
    made = adapt(net, "cp-lora", rank=2, where=where)
    assert list(adapted_layers(net)) == names
    assert [row.layer for row in made.rows] == names
    assert {key.split(".adapter.")[0] for key in net.state_dict() if ".adapter." in key} == set(names)


@pytest.mark.parametrize("method", METHODS)
def test_everything_but_the_adapter_is_frozen_and_the_adapter_is_visible(method):
    net, before = toy(), list(dict(toy().named_parameters()))
    adapt(net, method, rank=2, where=["mid", "up"])
    trainable = [name for name, p in net.named_parameters() if p.requires_grad]
    expected = [f"{name}.adapter.{key}" for name, layer in adapted_layers(net).items() for key in factors(layer)]
    assert sorted(trainable) == sorted(expected) and len(expected) == len(adapted_layers(net)) * len(factors(net.mid))
    assert [name for name, _ in net.named_parameters() if name not in expected] == before
    assert {id(p) for layer in (net.mid, net.up) for p in layer.adapter.parameters()} <= {
        id(p) for p in net.parameters()
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_the_start_is_the_base_to_the_bit(method, dtype):
    for batchnorm in ("frozen", "adapt", "train"):
        base, net, x = toy(dtype), toy(dtype), image(dtype)
        adapt(net, method, rank=3, batchnorm=batchnorm)
        assert same_tensor(out(net, x), out(base, x))
        assert same_bits(base_part(net), bits(base))
        if batchnorm == "frozen":  # in training too
            assert same_tensor(out(net.train(), x), out(base, x))
        elif dtype != torch.bfloat16:
            assert same_tensor(out(net.train(), x), out(base.train(), x))


@pytest.mark.parametrize("method", METHODS)
def test_keys_and_values_of_the_base_stay(method):
    base, net = toy(), toy()
    adapt(net, method, rank=2)
    train(net)
    state = net.state_dict()
    own = [key for key in state if ".adapter." not in key]
    assert own == list(base.state_dict()) and same_bits(base_part(net), bits(base))
    assert {key for key in state if ".adapter." in key} == {
        f"{name}.adapter.{key}" for name in CONVS for key in factors(net.mid)
    }
    fresh = toy(seed=5)
    fresh.load_state_dict({key: state[key] for key in own})
    assert same_bits(bits(fresh), bits(base))
    found = net.load_state_dict(toy(seed=6).state_dict(), strict=False)
    assert not found.unexpected_keys and all(".adapter." in key for key in found.missing_keys)
    assert same_tensor(net.mid.weight, toy(seed=6).mid.weight)
    twin = toy(seed=9)
    adapt(twin, method, rank=2)
    twin.load_state_dict(state)
    net.load_state_dict(state)
    assert same_tensor(out(twin, image()), out(net, image()))


def test_ranks_by_pattern():
    net = toy()
    made = adapt(net, "convlora", rank={"down*": 1, "up": 5, "*": 2})
    assert {row.layer: row.rank for row in made.rows} == {"down.0": 1, "mid": 2, "up": 5, "out": 2}
    assert {name: layer.adapter.A.shape[0] for name, layer in adapted_layers(net).items()} == {
        "down.0": 1,
        "mid": 2,
        "up": 5,
        "out": 2,
    }
    randomize(net, 3)
    base = toy()
    for name, layer in adapted_layers(net).items():  # alpha defaults to each layer's own rank
        conv = base.get_submodule(name)
        assert worst(effective_weight(layer), weight("convlora", conv.weight, factors(layer), conv)) < 1e-12


def test_one_convolution_used_twice_has_one_adapter():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 2, 3, padding=1).double()
    net = nn.Sequential(conv, nn.ReLU(), conv)
    base, x = copy.deepcopy(net), image()
    made = adapt(net, "convdora", rank=2)
    assert made.parameters == sum(p.numel() for p in net.parameters() if p.requires_grad) == 2 * (2 * 9 + 2) + 2
    assert same_tensor(out(net, x), out(base, x))
    randomize(net, 1)
    merge(net)
    unmerge(net)
    remove(net)
    assert net[0] is net[2] and same_bits(bits(net), bits(base))


def test_a_part_of_the_network_may_be_adapted_alone():
    net, x = toy(), image()
    base = out(net, x)
    adapt(net.down, "cp-lora", rank=2)
    assert list(adapted_layers(net.down)) == ["0"]
    assert list(adapted_layers(net)) == ["down.0"]
    assert same_tensor(out(net, x), base)
    randomize(net, 1)
    assert worst(out(net, x), base) > 1e-3
    remove(net.down)
    assert same_tensor(out(net, x), base) and not any(".adapter." in key for key in net.state_dict())


def test_summary_says_what_was_added():
    net = toy()
    made = adapt(net, "convlora", rank=2, where="encoding")
    for text in (repr(made), made._repr_markdown_()):
        for word in ("convlora", "down.0", "mid", "Conv2d"):
            assert word in text
        assert not re.search(r"\b(up|out)\b", text)
        for shape in ((4, 2, 3, 3), (4, 2, 3, 3)):
            assert "x".join(map(str, shape)) in text or str(shape) in text or " × ".join(map(str, shape)) in text
        assert str(2 * (2 * 9 + 4)) in text.replace(",", "")
        assert "%" in text
    share = {row.layer: row.share for row in made.rows}
    assert share["mid"] == pytest.approx(2 * (2 * 9 + 4) / (4 * 2 * 9), rel=0.35)
    assert made.parameters == sum(row.parameters for row in made.rows) == 2 * 2 * (2 * 9 + 4)
    network = sum(p.numel() for p in toy().parameters())
    percent = 100 * made.parameters / network
    assert f"{percent:.1f}" in repr(made) or f"{percent:.2f}" in repr(made) or f"{percent:.0f}" in repr(made)


# ----- training


@pytest.mark.parametrize("method", METHODS)
def test_training_moves_the_adapters_and_nothing_else(method):
    base, net = toy(), toy()
    adapt(net, method, rank=2)
    before = {
        name: {k: p.detach().clone() for k, p in factors(layer).items()} for name, layer in adapted_layers(net).items()
    }
    train(net, steps=3)
    assert same_bits(base_part(net), bits(base))
    for name, layer in adapted_layers(net).items():
        for key, p in factors(layer).items():
            assert not torch.equal(p, before[name][key]), (name, key)
    assert worst(out(net, image()), out(base, image())) > 1e-3
    with disabled(net):
        assert same_tensor(out(net, image()), out(base, image()))
    remove(net)
    assert same_bits(bits(net), bits(base)) and kinds(net) == kinds(base)


def test_removing_gives_back_every_flag():
    base = toy()
    base.mid.requires_grad_(False)
    base.norm.bias.requires_grad_(False)
    base.down.train()
    before = photo(base)
    for method in METHODS:
        for batchnorm in ("frozen", "adapt", "train"):
            adapt(base, method, rank=1, where="encoding", batchnorm=batchnorm, modules_to_train="out")
            adapt(base, method, rank=2, where="decoding", batchnorm="adapt", name="second")
            remove(base)
            assert untouched(base, before), (method, batchnorm)
            assert adapters(base) == [] and adapted_layers(base) == {}


def test_a_mode_set_while_adapted_survives_removal():
    net = toy()
    adapt(net, "cp-lora", rank=1)
    net.train()
    remove(net)
    assert all(module.training for module in net.modules())
    adapt(net, "cp-lora", rank=1)
    net.eval()
    remove(net)
    assert not any(module.training for module in net.modules())
    plain, x = toy().train(), image()
    net.train()
    assert same_tensor(net(x), plain(x)) and same_bits(bits(net), bits(plain)), "the norms no longer learn"


@pytest.mark.parametrize("method", METHODS)
def test_eval_and_train_never_merge(method):
    net = toy()
    adapt(net, method, rank=2)
    randomize(net, 1)
    weights = {name: layer.weight.data_ptr() for name, layer in adapted_layers(net).items()}
    before = bits(net)
    for _ in range(3):
        net.eval()
        net.train()
        net.requires_grad_(True)
        net.requires_grad_(False)
    assert not is_merged(net) and same_bits(bits(net), before)
    assert {name: layer.weight.data_ptr() for name, layer in adapted_layers(net).items()} == weights


# ----- norms


def norms(net):
    return {
        name: (m.running_mean.clone(), m.running_var.clone(), m.num_batches_tracked.clone())
        for name, m in net.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
    }


def test_frozen_norms_keep_their_statistics_in_training():
    base, net = toy(), toy()
    adapt(net, "convlora", rank=2, batchnorm="frozen")
    train(net)
    assert same_bits(base_part(net), bits(base))
    x = image()
    assert same_tensor(net.train()(x), net.eval()(x))
    # the user's own training flag is not lost
    assert all(m.training for m in net.train().modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("policy", ["adapt", "train"])
def test_adapted_norms_follow_the_target_as_plain_training_does(policy):
    """The same steps on a plain network with the adapted weights give the same statistics; the base keeps its own."""
    base, net, plain, x = toy(), toy(), toy(), image()
    adapt(net, "convlora", rank=2, batchnorm=policy)
    randomize(net, 1, 0.2)
    for name, conv in all_modules_of(plain).items():
        conv.weight.data = effective_weight(net.get_submodule(name)).detach().clone()
    for seed in range(3):
        batch = image(seed=seed)
        assert worst(net.train()(batch), plain.train()(batch)) < 1e-12
    assert same_bits(base_part(net), bits(base)), "the base's keys must keep the base's values"
    assert worst(out(net.eval(), x), out(plain.eval(), x)) < 1e-12
    adapted = out(net, x)
    with disabled(net):
        assert same_tensor(out(net, x), out(base, x))
    deactivate(net)
    assert same_tensor(out(net, x), out(base, x))
    activate(net, "default")
    assert same_tensor(out(net, x), adapted)
    copied = merged_copy(net)
    assert all(type(m).__module__.startswith("torch.nn") or type(m) is Toy for m in copied.modules())
    assert worst(out(copied, x), adapted) < 1e-12
    for name, stats in norms(plain).items():
        for one, other in zip(norms(copied)[name], stats, strict=True):
            assert worst(one, other) < 1e-12, name
    remove(net)
    assert same_bits(bits(net), bits(base)) and kinds(net) == kinds(base)


def test_only_the_train_policy_trains_the_norms_weights():
    found = {}
    for policy in ("frozen", "adapt", "train"):
        base, net = toy(), toy()
        made = adapt(net, "cp-lora", rank=1, where="mid", batchnorm=policy)
        count = sum(p.numel() for p in net.parameters() if p.requires_grad)
        assert made.parameters == count
        found[policy] = count
        train(net)
        assert same_bits(base_part(net), bits(base))
        plain = merged_copy(net)
        changed = {key for key, value in bits(plain).items() if not same_tensor(value, bits(base)[key])}
        # beside mid there is norm; down.1 belongs to a block with a convolution of its own
        statistics = {f"norm.{k}" for k in ("running_mean", "running_var", "num_batches_tracked")}
        affine = {"norm.weight", "norm.bias"}
        assert changed == {"mid.weight"} | {"frozen": set(), "adapt": statistics, "train": statistics | affine}[policy]
        remove(net)
        assert same_bits(bits(net), bits(base))
    assert found["frozen"] == found["adapt"] == 4 + 2 + 3 + 3 and found["train"] == found["frozen"] + 8


@pytest.mark.parametrize("policy", ["frozen", "adapt", "train"])
def test_norms_of_every_make(policy):
    """Without running statistics or affine part, with a cumulative average; instance norm, group norm."""
    torch.manual_seed(0)
    made = (
        nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4, affine=False),
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4, momentum=None),
            nn.InstanceNorm2d(4),
            nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
            nn.GroupNorm(2, 4),
            nn.BatchNorm2d(4, track_running_stats=False),
            nn.Conv2d(4, 1, 1),
        )
        .double()
        .eval()
    )
    base, x = copy.deepcopy(made), image()
    adapt(made, "convdora", rank=1, batchnorm=policy)
    assert same_tensor(out(made, x), out(base, x))
    train(made, steps=3)
    assert same_bits(base_part(made), bits(base))
    drifted = {
        key
        for key, value in bits(merged_copy(made)).items()
        if "running" in key and not same_tensor(value, bits(base)[key])
    }
    assert len(drifted) == (0 if policy == "frozen" else 6)
    remove(made)
    assert same_bits(bits(made), bits(base)) and kinds(made) == kinds(base)


def test_two_adapters_have_their_own_statistics():
    base, net, x = toy(), toy(), image()
    adapt(net, "cp-lora", rank=1, batchnorm="adapt", name="a")
    train(net, steps=2)
    a = out(net, x)
    adapt(net, "cp-lora", rank=1, batchnorm="frozen", name="b")
    assert same_tensor(out(net, x), out(base, x)), "b must not see a's statistics"
    train(net, steps=2)
    b = out(net, x)
    activate(net, "a")
    assert same_tensor(out(net, x), a)
    activate(net, "b")
    assert same_tensor(out(net, x), b)
    assert same_tensor(out(net.train(), x), out(net.eval(), x)), "b's norms are frozen"
    remove(net, "b")
    activate(net, "a")
    assert same_tensor(out(net, x), a)


def test_the_base_does_not_drift_while_its_adapters_are_off():
    """In training mode too: a teacher's pass, or a pass with everything off, is the base's and leaves it as it was."""
    base, net, x = toy(), toy(), image()
    for policy in ("adapt", "train", "frozen"):
        adapt(net, "cp-lora", rank=1, batchnorm=policy, name=policy)
        train(net, 1)
        before = bits(net)
        net.train()
        with disabled(net):
            assert same_tensor(out(net, x), out(base, x))
        assert same_bits(bits(net), before)
        merge(net)
        out(net, x)
        with disabled(net):
            assert same_tensor(out(net, x), out(base, x))
        unmerge(net)
        assert same_bits(bits(net), before)
        deactivate(net)
        assert same_tensor(out(net, x), out(base, x))
        net.eval()
    remove(net)
    assert same_bits(bits(net), bits(base)) and kinds(net) == kinds(base)


# ----- modules to train


@pytest.mark.parametrize("selected", ["out", ["out", "norm"], "o*t"])
def test_modules_trained_in_full_beside_the_adapter(selected):
    base, net, x = toy(), toy(), image()
    made = adapt(net, "convlora", rank=1, where="encoding", modules_to_train=selected)
    assert same_tensor(out(net, x), out(base, x))
    whole = 4 + (8 if "norm" in selected else 0)
    assert made.parameters == sum(p.numel() for p in net.parameters() if p.requires_grad) == 2 * (2 * 9 + 4) + whole
    train(net, steps=3)
    assert same_bits(base_part(net), bits(base)), "the base's keys must keep the base's values"
    plain = bits(merged_copy(net))
    for key in ("out.weight", "out.bias", *(["norm.weight", "norm.bias"] if "norm" in selected else [])):
        assert not same_tensor(plain[key], bits(base)[key]), key
    trained = out(net, x)
    merge(net)
    assert worst(out(net, x), trained) < 1e-12
    unmerge(net)
    assert same_tensor(out(net, x), trained) and same_bits(base_part(net), bits(base))
    adapt(net, "cp-lora", rank=1, name="other")
    assert same_tensor(out(net, x), out(base, x))
    activate(net, "default")
    assert same_tensor(out(net, x), trained)
    with disabled(net):
        assert same_tensor(out(net, x), out(base, x))
    remove(net, "other")
    remove(net, "default")
    assert same_bits(bits(net), bits(base)) and kinds(net) == kinds(base)


def test_a_module_trained_in_full_gets_no_adapter_besides():
    net = toy()
    adapt(net, "cp-lora", rank=1, modules_to_train="out")
    assert "out" not in adapted_layers(net) and list(adapted_layers(net)) == CONVS[:3]
    with pytest.raises(ValueError, match="modules_to_train"):
        adapt(toy(), "cp-lora", rank=1, where="out", modules_to_train="out")


def test_modules_trained_in_full_learn_as_in_plain_training():
    """With the adapters' own factors frozen, the trained module follows plain training of that module alone."""
    net, plain = toy(), toy()
    adapt(net, "cp-lora", rank=1, where="mid", modules_to_train="out")
    for p in net.mid.adapter.parameters():
        p.requires_grad_(False)
    plain.requires_grad_(False)
    plain.out.requires_grad_(True)
    for model in (net, plain):
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for seed in range(4):
            optimizer.zero_grad()
            (model.eval()(image(seed=seed)) - 1).square().mean().backward()
            optimizer.step()
    assert worst(out(net, image()), out(plain, image())) < 1e-12
    assert worst(out(net, image()), out(toy(), image())) > 1e-2


# ----- several adapters


def test_several_adapters_on_one_base():
    base, net, x = toy(), toy(), image()
    results = {}
    for index, method in enumerate(METHODS):
        adapt(net, method, rank=1 + index % 3, where=[None, "encoding", ["mid", "out"]][index % 3], name=method)
        assert adapters(net) == list(METHODS[: index + 1]) and active_adapter(net) == method
        assert same_tensor(out(net, x), out(base, x)), "a new adapter starts at the base, not at another adapter"
        randomize(net, index)
        results[method] = out(net, x)
        assert worst(results[method], out(base, x)) > 1e-3
    for method in reversed(METHODS):
        activate(net, method)
        assert active_adapter(net) == method and same_tensor(out(net, x), results[method])
        assert same_bits(base_part(net), bits(base))
        merge(net)
        assert worst(out(net, x), results[method]) < 1e-12
        unmerge(net)
    deactivate(net)
    assert active_adapter(net) is None and same_tensor(out(net, x), out(base, x))
    assert adapters(net) == list(METHODS)
    activate(net, "convdora")
    remove(net, "cp-lora")
    assert adapters(net) == [m for m in METHODS if m != "cp-lora"] and same_tensor(out(net, x), results["convdora"])
    remove(net, "convdora")
    assert same_tensor(out(net, x), out(base, x))
    activate(net, "dora-c")
    assert same_tensor(out(net, x), results["dora-c"])
    remove(net)
    assert adapters(net) == [] and same_bits(bits(net), bits(base)) and kinds(net) == kinds(base)


def test_the_layers_of_each_adapter():
    net = toy()
    adapt(net, "cp-lora", rank=1, where="encoding", name="a")
    adapt(net, "convlora", rank=2, where=["mid", "up"], name="b")
    assert list(adapted_layers(net)) == ["mid", "up"] and hasattr(net.mid.adapter, "A")
    assert getattr(net.down[0], "adapter", None) is None
    activate(net, "a")
    assert list(adapted_layers(net)) == ["down.0", "mid"] and hasattr(net.mid.adapter, "a")
    assert getattr(net.up, "adapter", None) is None


def test_switching_moves_no_base_weight():
    net = toy()
    adapt(net, "cp-lora", rank=1, name="a")
    adapt(net, "convdora", rank=1, name="b")
    before = {name: p.data_ptr() for name, p in net.named_parameters() if ".adapter." not in name}
    for name in ("a", "b", "a"):
        activate(net, name)
        deactivate(net)
        activate(net, name)
        assert {n: p.data_ptr() for n, p in net.named_parameters() if ".adapter." not in n} == before


def test_the_active_adapter_alone_is_trainable():
    net = toy()
    adapt(net, "cp-lora", rank=1, name="a")
    adapt(net, "convlora", rank=1, name="b")
    activate(net, "a")
    assert {n.rsplit(".", 1)[1] for n, p in net.named_parameters() if p.requires_grad} == set("abcd")
    activate(net, "b")
    assert {n.rsplit(".", 1)[1] for n, p in net.named_parameters() if p.requires_grad} == set("AB")
    train(net)
    activate(net, "a")
    assert not any(delta_weight(layer).any() for layer in adapted_layers(net).values()), "training b moved a"


def test_a_resting_adapter_follows_the_mode_of_the_network():
    """Its dropout is on after net.train(), and off after net.eval(), whichever adapter was on at that time."""
    net, x = toy(), image()
    adapt(net, "convlora", rank=4, dropout=0.5, name="a")
    randomize(net, 1)
    adapt(net, "convlora", rank=1, name="b")
    net.train()
    activate(net, "a")
    torch.manual_seed(0)
    assert len({out(net, x).sum().item() for _ in range(8)}) > 3
    activate(net, "b")
    net.eval()
    activate(net, "a")
    assert len({out(net, x).sum().item() for _ in range(8)}) == 1
    net.train()
    with disabled(net):
        net.eval()
    assert len({out(net, x).sum().item() for _ in range(8)}) == 1


def test_a_resting_adapter_follows_the_network_to_another_dtype():
    net, x = toy(), image()
    adapt(net, "convdora", rank=2, name="a", batchnorm="adapt", modules_to_train="out")
    train(net)
    expected = out(net, x)
    adapt(net, "cp-lora", rank=1, name="b")
    net.float()
    activate(net, "a")
    y = out(net, x.float())
    assert y.dtype == torch.float32 and worst(y, expected) < 1e-4
    deactivate(net)
    net.double()
    activate(net, "a")
    assert out(net, x).dtype == torch.float64


# ----- merging


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_unmerging_is_exact_after_many_rounds(method, dtype):
    """Also with weights that arithmetic does not give back: -0.0, the smallest numbers, the largest ones."""
    net = toy(dtype)
    with torch.no_grad():
        info = torch.finfo(dtype)
        net.mid.weight.flatten()[:4] = torch.tensor(
            [-0.0, info.smallest_normal / 2, info.max / 64, -info.tiny], dtype=dtype
        )
    before = bits(net)
    adapt(net, method, rank=2)
    randomize(net, 1)
    y = None if dtype == torch.float16 else out(net, image(dtype))
    for _ in range(20):
        merge(net)
        assert not torch.equal(net.mid.weight, before["mid.weight"])
        unmerge(net)
        assert same_bits(base_part(net), before)
    if y is not None:
        assert same_tensor(out(net, image(dtype)), y)
    remove(net)
    assert same_bits(bits(net), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_merged_is_unmerged_to_the_bit_in_weight_space(method, dtype):
    net, x = toy(dtype), image(dtype)
    adapt(net, method, rank=2)
    randomize(net, 1, 0.3)
    before, weights = (
        out(net, x),
        {name: effective_weight(layer).clone() for name, layer in adapted_layers(net).items()},
    )
    deltas = {name: delta_weight(layer).clone() for name, layer in adapted_layers(net).items()}
    merge(net)
    assert is_merged(net) and same_tensor(out(net, x), before)
    for name, layer in adapted_layers(net).items():
        assert same_tensor(layer.weight.detach(), weights[name].detach())
        assert same_tensor(effective_weight(layer).detach(), weights[name].detach()), "merged, the adapter counts twice"
        assert same_tensor(delta_weight(layer).detach(), deltas[name].detach())
    unmerge(net)
    assert not is_merged(net)


@pytest.mark.parametrize("method", METHODS)
def test_a_merged_copy_is_a_plain_network(method):
    base, net, x = toy(), toy(), image()
    adapt(net, method, rank=2)
    randomize(net, 1)
    before = photo(net)
    plain = merged_copy(net)
    assert untouched(net, before)
    assert type(plain) is Toy and {n: type(m) for n, m in plain.named_modules()} == {
        n: type(m) for n, m in base.named_modules()
    }
    assert list(plain.state_dict()) == list(base.state_dict())
    assert worst(out(plain, x), out(net, x)) < 1e-12
    assert "sahlora" not in str(pickle.dumps(plain.down)) and not hasattr(plain.mid, "adapter")
    # it shares no memory with the network it came from
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(1)
    assert untouched(net, before)
    merge(net)
    assert same_bits(bits(merged_copy(net)), bits(merged_copy_after_unmerge(net)))


def merged_copy_after_unmerge(net):
    unmerge(net)
    return merged_copy(net)


def test_merging_one_adapter_leaves_the_others_intact():
    net, x = toy(), image()
    for name in "ab":
        adapt(net, "convdora", rank=2, name=name)
        randomize(net, ord(name))
    b = out(net, x)
    activate(net, "a")
    a = out(net, x)
    for _ in range(3):
        merge(net)
        unmerge(net)
    activate(net, "b")
    assert same_tensor(out(net, x), b)
    merge(net)
    unmerge(net)
    activate(net, "a")
    assert same_tensor(out(net, x), a)


def test_removing_while_merged():
    """The merged one gone, the base is back to the bit; another one gone, the merged one stays merged."""
    base, net, x = toy(), toy(), image()
    for name in "abc":
        adapt(net, "convdora", rank=2, name=name, batchnorm="adapt", modules_to_train="out")
        train(net, 1)
    merge(net)
    y = out(net, x)
    remove(net, "a")
    assert adapters(net) == ["b", "c"] and is_merged(net) and active_adapter(net) == "c" and same_tensor(out(net, x), y)
    remove(net, "c")
    assert adapters(net) == ["b"] and not is_merged(net) and active_adapter(net) is None
    assert same_tensor(out(net, x), out(base, x))
    activate(net, "b")
    merge(net)
    remove(net)
    assert same_bits(bits(net), bits(base)) and kinds(net) == kinds(base)


def test_merged_and_moved_to_another_dtype():
    net, base = toy(), toy().float()
    adapt(net, "convlora", rank=2)
    randomize(net, 1)
    merge(net)
    net.float()
    unmerge(net)
    assert same_bits(base_part(net), bits(base))
    out(net, image(torch.float32))


def test_refusals_around_merging(tmp_path):
    net, x = toy(), image()
    with pytest.raises(RuntimeError, match="adapt"):
        merge(net)
    with pytest.raises(RuntimeError, match="merge"):
        unmerge(net)
    adapt(net, "cp-lora", rank=2)
    randomize(net, 1)
    with pytest.raises(RuntimeError, match="merged"):
        unmerge(net)
    merge(net)
    before = photo(net)
    for refused in (
        lambda: merge(net),
        lambda: save_adapter(net, tmp_path / "a.safetensors"),
        lambda: adapt(net, "convlora", rank=1, name="b"),
        lambda: activate(net, "default"),
        lambda: deactivate(net),
    ):
        with pytest.raises(RuntimeError, match="unmerge"):
            refused()
        assert untouched(net, before) and adapters(net) == ["default"]
    assert not list(tmp_path.iterdir())
    y = out(net, x)
    net.train()
    for target in (x, x.clone().requires_grad_()):
        with pytest.raises(RuntimeError, match="unmerge"):
            net(target).square().sum().backward()
    assert same_tensor(out(net, x), y), "without gradients the merged network is free to run"
    net.eval()
    assert same_tensor(net(x).detach(), y)
    for where in CONVS:  # one layer alone, of either kind
        single = toy()
        adapt(single, "convdora", rank=1, where=where)
        merge(single)
        with pytest.raises(RuntimeError, match="unmerge"):
            single.train()(x.clone().requires_grad_()).sum().backward()
    unmerge(net)
    net.train()(x).sum().backward()
    assert net.mid.adapter.a.grad is not None
    deactivate(net)
    with pytest.raises(RuntimeError, match="activate"):
        merge(net)


# ----- disabled


def test_disabled_gives_the_base_at_any_time():
    base, net, x = toy(), toy(), image()
    expected = out(base, x)
    adapt(net, "convdora", rank=2, batchnorm="adapt", modules_to_train="out")
    train(net)
    y, before = out(net, x), photo(net)
    with disabled(net) as inside:
        assert inside is net and same_tensor(out(net, x), expected)
        with disabled(net):
            assert same_tensor(out(net, x), expected)
        assert same_tensor(out(net, x), expected)
    assert same_tensor(out(net, x), y) and untouched(net, before)
    with pytest.raises(ZeroDivisionError), disabled(net):
        assert same_tensor(out(net, x), expected)
        1 / 0  # noqa: B018
    assert same_tensor(out(net, x), y) and untouched(net, before) and active_adapter(net) == "default"
    merge(net)
    merged = out(net, x)
    with disabled(net):
        assert same_tensor(out(net, x), expected)
    assert is_merged(net) and same_tensor(out(net, x), merged)
    unmerge(net)
    deactivate(net)
    with disabled(net):
        assert same_tensor(out(net, x), expected)
    assert active_adapter(net) is None
    activate(net, "default")
    assert same_tensor(out(net, x), y)
    # a teacher and its student in one training step
    net.train()
    with torch.no_grad(), disabled(net):
        teacher = net.eval()(x)
    net.train()
    (net(x) - teacher).square().mean().backward()
    assert same_tensor(teacher, expected) and net.mid.adapter.A.grad is not None


# ----- copies, pickles, graphs


@pytest.mark.parametrize("method", METHODS)
def test_deepcopy_is_independent(method):
    net, x = toy(), image()
    adapt(net, method, rank=2, name="a", batchnorm="adapt")
    randomize(net, 1)
    adapt(net, "cp-lora", rank=1, name="b", modules_to_train="out")
    randomize(net, 2)
    y, before, base = out(net, x), photo(net), out(toy(), x)
    twin = copy.deepcopy(net)
    assert adapters(twin) == ["a", "b"] and same_tensor(out(twin, x), y)
    train(twin)
    assert untouched(net, before)
    activate(twin, "a")
    remove(twin, "b")
    merge(twin)
    assert untouched(net, before) and same_tensor(out(net, x), y)
    third = copy.deepcopy(twin)  # while merged
    unmerge(third)
    remove(third)
    assert same_tensor(out(third, x), base) and is_merged(twin) and untouched(net, before)
    unmerge(twin)
    remove(twin)
    assert same_bits(bits(twin), bits(toy())) and same_tensor(out(net, x), y)
    remove(net)
    assert same_bits(bits(net), bits(toy()))


@pytest.mark.parametrize("method", METHODS)
def test_pickle_of_the_module(method):
    net, x = toy(), image()
    adapt(net, method, rank=2, name="a", batchnorm="train")
    train(net, 1)
    adapt(net, "convdora", rank=1, name="b")
    randomize(net, 2)
    activate(net, "a")
    y = out(net, x)
    for protocol in (2, pickle.HIGHEST_PROTOCOL):
        twin = pickle.loads(pickle.dumps(net, protocol))
        assert same_tensor(out(twin, x), y) and adapters(twin) == ["a", "b"] and kinds(twin) == kinds(net)
        activate(twin, "b")
        activate(net, "b")
        assert same_tensor(out(twin, x), out(net, x))
        activate(net, "a")
        remove(twin)
        assert same_bits(bits(twin), bits(toy())) and kinds(twin) == kinds(toy())
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    assert same_tensor(out(torch.load(buffer, weights_only=False), x), y)
    merge(net)
    twin = pickle.loads(pickle.dumps(net))
    assert is_merged(twin)
    unmerge(twin)
    assert same_tensor(out(twin, x), y)


@pytest.mark.long
def test_a_pickle_opens_in_a_new_process(tmp_path, command):
    import sys

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 1, 2)).double().eval()
    adapt(net, "dora-c", rank=2)
    randomize(net, 1)
    x = image()
    torch.save((net, x, out(net, x)), tmp_path / "net.pt")
    code = (
        "import sys, torch; net, x, y = torch.load(sys.argv[1], weights_only=False)\n"
        "assert torch.equal(net(x), y)\n"
        "from sahlora.adapters import remove, adapters; assert adapters(net) == ['default']; remove(net)\n"
        "assert not torch.equal(net(x), y) and type(net[0]) is torch.nn.Conv2d; print('fine')"
    )
    done = command(sys.executable, "-c", code, str(tmp_path / "net.pt"))
    assert done.returncode == 0 and done.stdout.strip() == "fine", done.stderr


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_compiled_without_a_break_in_the_graph(method):
    torch._dynamo.reset()
    net, x = toy(), image()
    adapt(net, method, rank=2)
    randomize(net, 1)
    fast = torch.compile(net, backend="eager", fullgraph=True)
    assert worst(fast(x), net(x)) < 1e-12
    net.train()
    gradients = []
    for model in (net, fast):
        net.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in net.mid.adapter.parameters()])
    assert all(worst(one, other) < 1e-9 for one, other in zip(*gradients, strict=True)) and gradients[0][0].any()
    net.eval()
    adapt(net, "convlora", rank=1, name="other")
    randomize(net, 5)
    for change in (
        lambda: activate(net, "default"),
        lambda: deactivate(net),
        lambda: activate(net, "other"),
        lambda: merge(net),
        lambda: unmerge(net),
        lambda: remove(net, "default"),
    ):
        change()
        assert worst(fast(x), net(x)) < 1e-12, "the compiled graph did not see the change"
        with disabled(net):
            assert worst(fast(x), toy()(x)) < 1e-12
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_by_inductor():
    torch._dynamo.reset()
    net, x = toy(torch.float32), image(torch.float32)
    adapt(net, "cp-dora", rank=2)
    randomize(net, 1)
    fast = torch.compile(net)
    assert worst(fast(x), net(x)) < 1e-4
    fast(x).sum().backward()
    assert net.mid.adapter.a.grad.abs().max() > 0
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing(method, reentrant):
    net, x = toy(), image().requires_grad_()
    adapt(net, method, rank=2, dropout=0.3)
    randomize(net, 1)
    net.train()
    found = []
    for run in (net, lambda x: checkpoint(net, x, use_reentrant=reentrant)):
        net.zero_grad()
        torch.manual_seed(0)
        run(x).square().sum().backward()
        found.append({n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) >= 8
    assert all(worst(found[0][n], found[1][n]) < 1e-12 * max(1, found[0][n].abs().max()) for n in found[0])


def test_checkpointing_keeps_adapted_statistics_of_one_pass():
    """The recomputation of a checkpoint must not be refused, and the forward's result is the plain one."""
    net, x = toy(), image().requires_grad_()
    adapt(net, "cp-lora", rank=2, batchnorm="adapt")
    randomize(net, 1)
    net.train()
    y = checkpoint(net, x, use_reentrant=False)
    assert worst(y, net(x)) < 1e-12
    y.sum().backward()
    assert net.mid.adapter.a.grad.any()


@pytest.mark.parametrize("method", METHODS)
def test_functional_call_and_ensembles(method):
    """torch.func sees the factors as parameters: a stack of adapters runs in one vmap."""
    net, x = toy(), image()
    adapt(net, method, rank=2)
    names = [n for n, p in net.named_parameters() if p.requires_grad]
    versions = []
    for seed in range(3):
        randomize(net, seed)
        versions.append(({n: net.get_parameter(n).detach().clone() for n in names}, out(net, x)))
    stacked = {n: torch.stack([v[0][n] for v in versions]) for n in names}
    ys = torch.func.vmap(lambda values: torch.func.functional_call(net, values, (x,)))(stacked)
    for y, (_, expected) in zip(ys, versions, strict=True):
        assert worst(y.detach(), expected) < 1e-10


def test_hooks_of_a_user_go_on():
    net, x, seen = toy(), image(), []
    handle = net.mid.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    adapt(net, "cp-lora", rank=1)
    out(net, x)
    remove(net)
    out(net, x)
    assert len(seen) == 2 and same_tensor(seen[0], seen[1])
    handle.remove()


def test_removed_adapters_are_freed():
    import weakref

    net = toy()
    adapt(net, "convdora", rank=2)
    watched = [weakref.ref(p) for layer in adapted_layers(net).values() for p in layer.adapter.parameters()]
    merge(net)
    unmerge(net)
    remove(net)
    gc.collect()
    assert not any(ref() is not None for ref in watched)


def test_the_adapted_layer_is_still_its_kind():
    net = toy()
    adapt(net, "cp-lora", rank=1)
    assert (
        isinstance(net.mid, nn.Conv2d) and isinstance(net.up, nn.ConvTranspose2d) and not isinstance(net.up, nn.Conv2d)
    )
    assert "Conv2d" in repr(net.mid) and "cp-lora" in repr(net)


# ----- errors


def bad(words, error=ValueError, **changes):
    key, value = next(iter(changes.items()))
    shown = "a predicate" if callable(value) else repr(value)  # a function's repr differs from process to process
    return pytest.param(words, error, changes, id=f"{key}={shown}")


@pytest.mark.parametrize(
    "words, error, changes",
    [
        bad(METHODS, method="lora"),
        bad(METHODS, method="CP-LoRA "),
        bad(["rank", "0", "1"], rank=0),
        bad(["rank", "-3"], rank=-3),
        bad(["rank"], (TypeError, ValueError), rank=2.5),
        bad(["rank"], (TypeError, ValueError), rank="4"),
        bad(["rank"], (TypeError, ValueError), rank=True),
        bad(["rank"], rank={"mid": 2}),
        bad(["rank", "nowhere"], rank={"nowhere": 2, "*": 3}),
        bad(["rank"], rank={"*": 0}),
        bad(["alpha"], (TypeError, ValueError), alpha=0),
        bad(["alpha"], (TypeError, ValueError), alpha=-1.0),
        bad(["alpha"], (TypeError, ValueError), alpha=float("nan")),
        bad(["midd", "mid"], where="midd"),
        bad(["decodin", "decoding"], where="decodin"),
        bad(["dwn*"], where="dwn*"),
        bad(["down.7"], where=["mid", "down.7"]),
        bad(["'norm'", "no convolution"], where=["mid", "norm"]),
        bad(["'down.[12]'", "no convolution"], where=["down.[12]", "mid"]),
        bad(["modules_to_train='down.2'", "no parameters"], modules_to_train=["out", "down.2"]),
        bad(["modules_to_train=None", "()"], (TypeError,), modules_to_train=None),
        bad(["modules_to_train", "names"], (TypeError,), modules_to_train=["out", 3]),
        bad(["alpha='8'", "number"], (TypeError, ValueError), alpha="8"),
        bad(["alpha=True", "number"], (TypeError, ValueError), alpha=True),
        bad(["alpha=tensor(8.)", "number"], (TypeError, ValueError), alpha=torch.tensor(8.0)),
        bad(["dropout='0.1'", "probability"], (TypeError, ValueError), dropout="0.1"),
        bad(["unknown method ['cp-lora']", *METHODS], (TypeError, ValueError), method=["cp-lora"]),
        bad(["no rank", "'up'", "'out'"], (TypeError, ValueError), rank={"encoding": 2}),
        bad(["norm"], where="norm"),
        bad([], where=[]),
        bad([], where=lambda name, module: False),
        bad(["where"], (TypeError, ValueError), where=3),
        bad(["scaling", "lora", "rslora"], scaling="rs"),
        bad(["batchnorm", "frozen", "adapt", "train"], batchnorm="eval"),
        bad(["dropout"], (TypeError, ValueError), dropout=1.0),
        bad(["dropout"], (TypeError, ValueError), dropout=-0.1),
        bad(["modules_to_train", "outt", "out"], modules_to_train="outt"),
        bad(["unfolding"], (TypeError, ValueError), method="lora-c", unfolding="sideways"),
        bad(["rank_setting", "rk", "r"], (TypeError, ValueError), method="lora-c", rank_setting="k"),
        bad(["detach_norm"], (TypeError, ValueError), method="convlora", detach_norm=True),
        bad(["unfolding"], (TypeError, ValueError), method="cp-lora", unfolding="view"),
        bad(["ranks"], (TypeError, ValueError), method="cp-lora", ranks=2),
    ],
)
def test_what_adapt_refuses_it_names_and_leaves_untouched(words, error, changes):
    net = toy()
    before = photo(net)
    with pytest.raises(error) as caught:
        adapt(net, **{"method": "cp-lora", "rank": 2, **changes})
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert len(text) > 15
    assert untouched(net, before) and adapters(net) == []
    adapt(net, "cp-lora", rank=1)  # and it still works
    # refused beside an adapter that is there: that one stays as it is
    randomize(net, 1)
    before, y = photo(net), out(net, image())
    with pytest.raises(error):
        adapt(net, **{"method": "cp-lora", "rank": 2, "name": "second", **changes})
    assert untouched(net, before) and adapters(net) == ["default"] and same_tensor(out(net, image()), y)


def test_a_second_adapter_under_the_same_name():
    net = toy()
    adapt(net, "cp-lora", rank=1, name="tbi")
    randomize(net, 1)
    before = photo(net)
    with pytest.raises(ValueError, match="tbi"):
        adapt(net, "convlora", rank=2, name="tbi")
    assert untouched(net, before)
    deactivate(net)
    with pytest.raises(ValueError, match="tbi"):
        adapt(net, "convlora", rank=2, name="tbi")


def test_a_network_without_convolutions():
    for net in (nn.Linear(3, 3), nn.Sequential(), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())):
        with pytest.raises(ValueError, match=f"(?i){type(net).__name__}.*conv"):
            adapt(net, "cp-lora", rank=1)


def test_names_that_are_not_there():
    net = toy()
    for refused in (lambda: activate(net, "a"), lambda: deactivate(net), lambda: remove(net)):
        with pytest.raises(RuntimeError, match="adapt"):
            refused()
    adapt(net, "cp-lora", rank=1, name="tbi")
    before = photo(net)
    for refused in (lambda: activate(net, "sah"), lambda: remove(net, "sah"), lambda: adapted_layers(net, "sah")):
        with pytest.raises(ValueError, match="(?s)sah.*tbi"):
            refused()
        assert untouched(net, before)
    with pytest.raises((ValueError, TypeError, RuntimeError), match="adapt"):
        delta_weight(toy().mid)
    with pytest.raises((ValueError, TypeError, RuntimeError), match="adapt"):
        effective_weight(toy().norm)


def test_layers_that_could_only_be_adapted_wrongly_are_refused():
    class Standardized(nn.Conv2d):
        def forward(self, x):
            w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return self._conv_forward(x, w, self.bias)

    own = nn.Sequential(nn.Conv2d(2, 2, 1), Standardized(2, 2, 3))
    normed = nn.Sequential(nn.Conv2d(2, 2, 1), torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3)))
    hooked = nn.Sequential(nn.Conv2d(2, 2, 1), torch.nn.utils.spectral_norm(nn.Conv2d(2, 2, 3)))
    lazy = nn.Sequential(nn.Conv2d(2, 2, 1), nn.LazyConv2d(2, 3))
    integers = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
    integers[1].weight = nn.Parameter(torch.ones(2, 2, 1, 1, dtype=torch.int32), requires_grad=False)
    for net in (own, normed, hooked, lazy, integers):
        types = [type(module) for module in net.modules()]
        with pytest.raises((ValueError, TypeError), match="'1'"):
            adapt(net, "cp-lora", rank=1)
        assert [type(module) for module in net.modules()] == types and adapters(net) == []
        if net is not lazy:  # what has no weights yet has no base to speak of
            adapt(net, "cp-lora", rank=1, where="0")


# ----- any sequence


class Sequences(RuleBasedStateMachine):
    """Random sequences against a model of a few lines: per adapter its factors and statistics, one name that is on."""

    names = ("a", "b", "c")
    pick = st.integers(0, 5)

    @initialize(
        first=st.sampled_from(METHODS), second=st.sampled_from(METHODS), batchnorm=st.sampled_from(["frozen", "adapt"])
    )
    def start(self, first, second, batchnorm):
        self.folder = tempfile.TemporaryDirectory()
        self.net, self.base, self.x = toy(), toy(), image(batch=1)
        self.state, self.active, self.merged, self.files, self.seed = {}, None, False, {}, 0
        self.put("a", first, 1, None, batchnorm, False)
        self.put("b", second, 2, "encoding", "frozen", True)

    def teardown(self):
        if hasattr(self, "folder"):
            self.folder.cleanup()

    # the model

    def memory(self):
        """What the network now holds for the active adapter, read from its parameters."""
        record = self.state[self.active]
        for name, layer in adapted_layers(self.net).items():
            record["f"][name] = {key: p.detach().clone() for key, p in factors(layer).items()}

    def plain(self, name):
        """A plain network that does what the adapter is said to do."""
        net = copy.deepcopy(self.base)
        if name is not None:
            record = self.state[name]
            for layer, f in record["f"].items():
                conv = net.get_submodule(layer)
                conv.weight.data = weight(record["method"], conv.weight.detach(), f, conv)
            net.load_state_dict(record["extra"], strict=False)
        return net

    def path(self, file):
        return Path(self.folder.name) / f"{file}.safetensors"

    def put(self, name, method, rank, where, batchnorm, extra):
        torch.manual_seed(self.seed)
        options = {"modules_to_train": "norm"} if extra else {}
        adapt(self.net, method, rank=rank, where=where, name=name, batchnorm=batchnorm, **options)
        self.state[name] = {"method": method, "f": {}, "extra": {}, "batchnorm": batchnorm, "where": where}
        self.active = name
        self.memory()

    # what may be done

    @precondition(lambda self: len(self.state) < 3 and not self.merged)
    @rule(
        pick=pick,
        method=st.sampled_from(METHODS),
        rank=st.integers(1, 2),
        batchnorm=st.sampled_from(["frozen", "adapt"]),
        where=st.sampled_from([None, "encoding", "mid"]),
        extra=st.booleans(),
    )
    def put_on(self, pick, method, rank, where, batchnorm, extra):
        free = [name for name in self.names if name not in self.state]
        self.put(free[pick % len(free)], method, rank, where, batchnorm, extra)

    @precondition(lambda self: self.state and not self.merged)
    @rule(pick=pick)
    def switch(self, pick):
        self.active = list(self.state)[pick % len(self.state)]
        activate(self.net, self.active)

    @precondition(lambda self: self.active and not self.merged)
    @rule()
    def off(self):
        deactivate(self.net)
        self.active = None

    @precondition(lambda self: self.active and not self.merged)
    @rule()
    def melt(self):
        merge(self.net)
        self.merged = True

    @precondition(lambda self: self.merged)
    @rule()
    def freeze_out(self):
        unmerge(self.net)
        self.merged = False

    @precondition(lambda self: self.active and not self.merged)
    @rule()
    def learn(self):
        """New factors, as after some training, and one pass in training mode for the norms."""
        self.seed += 1
        randomize(self.net, self.seed, 0.2)
        self.memory()
        record, plain = self.state[self.active], self.plain(self.active)
        if record["batchnorm"] == "adapt":
            batch = image(seed=self.seed)
            plain.train()
            plain.down.train(record["where"] != "mid")  # a block of its own, not beside mid
            out(plain, batch)
            out(self.net.train(), batch)
            self.net.eval()
            record["extra"] = {key: value for key, value in bits(plain).items() if "running" in key or "tracked" in key}

    def take_off(self, name):
        remove(self.net, name)
        gone = list(self.state) if name is None else [name]
        for each in gone:
            del self.state[each]
        if self.active in gone:
            self.active, self.merged = None, False

    @precondition(lambda self: self.state)
    @rule(pick=pick)
    def take_one_off(self, pick):
        self.take_off(list(self.state)[pick % len(self.state)])

    @precondition(lambda self: self.state)
    @rule(really=st.integers(0, 3))
    def take_all_off(self, really):
        if really == 3:
            self.take_off(None)

    @precondition(lambda self: self.state and not self.merged)
    @rule(pick=pick, file=st.integers(0, 1))
    def save(self, pick, file):
        name = list(self.state)[pick % len(self.state)]
        save_adapter(self.net, self.path(file), name=name)
        self.files[file] = copy.deepcopy(self.state[name])

    @precondition(lambda self: self.files and len(self.state) < 3 and not self.merged)
    @rule(pick=pick)
    def load(self, pick):
        free, files = [name for name in self.names if name not in self.state], list(self.files)
        self.active, file = free[pick % len(free)], files[pick % len(files)]
        load_adapter(self.net, self.path(file), name=self.active)
        self.state[self.active] = copy.deepcopy(self.files[file])

    @rule(how=st.sampled_from([copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))]))
    def replace(self, how):
        self.net = how(self.net)

    @rule()
    def everything_else_is_refused(self):
        """Each act that the state does not allow raises, and changes nothing."""
        refused = [
            lambda: activate(self.net, "z"),
            lambda: remove(self.net, "z"),
            lambda: load_adapter(self.net, self.path("z")),
        ]
        refused += [lambda: save_adapter(self.net, self.path("y"), name="z")]
        refused += [lambda name=name: adapt(self.net, "cp-lora", rank=1, name=name) for name in self.state]
        refused += [
            lambda n=n, f=f: load_adapter(self.net, self.path(f), name=n) for n in self.state for f in self.files
        ]
        if not self.state:
            refused += [lambda: remove(self.net), lambda: deactivate(self.net)]
        if not self.active:
            refused += [lambda: merge(self.net), lambda: save_adapter(self.net, self.path("y"))]
        if not self.merged:
            refused += [lambda: unmerge(self.net)]
        else:
            refused += [
                lambda: merge(self.net),
                lambda: deactivate(self.net),
                lambda: save_adapter(self.net, self.path("y")),
            ]
            refused += [lambda name=name: activate(self.net, name) for name in self.state]
            refused += [lambda: adapt(self.net, "cp-lora", rank=1, name="z")]
            refused += [lambda f=f: load_adapter(self.net, self.path(f), name="z") for f in self.files]
        before = photo(self.net)
        for act in refused:
            with pytest.raises((RuntimeError, ValueError, FileNotFoundError)):
                act()
        assert untouched(self.net, before) and not self.path("y").exists()

    @invariant()
    def is_where_the_model_says(self):
        if not hasattr(self, "net"):
            return
        assert adapters(self.net) == list(self.state)
        assert active_adapter(self.net) == self.active and is_merged(self.net) == self.merged
        y, base = out(self.net, self.x), out(self.base, self.x)
        if self.active is None:
            assert same_tensor(y, base)
        assert worst(y, out(self.plain(self.active), self.x)) < 1e-11
        if self.state:
            with disabled(self.net):
                assert same_tensor(out(self.net, self.x), base)
        if not self.merged:
            assert same_bits(base_part(self.net), bits(self.base))
        if not self.state:
            assert same_bits(bits(self.net), bits(self.base)) and kinds(self.net) == kinds(self.base)


Sequences.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestAnySequenceEndsWhereTheModelSays = Sequences.TestCase


# ----- what users hold on to


def test_parameters_stay_the_same_objects():
    """An optimizer holds the adapter's parameters, another one may hold the base's: neither may lose them."""
    net = toy()
    base = {name: id(p) for name, p in net.named_parameters()}
    adapt(net, "convdora", rank=2, batchnorm="train", modules_to_train="out")
    own = {name: id(p) for name, p in net.named_parameters() if p.requires_grad}
    assert len(own) == 3 * 3 + 2 + 4
    adapt(net, "cp-lora", rank=1, name="other")
    for act in (
        lambda: activate(net, "default"),
        lambda: merge(net),
        lambda: unmerge(net),
        lambda: deactivate(net),
        lambda: activate(net, "other"),
        lambda: merge(net),
        lambda: unmerge(net),
        lambda: remove(net, "other"),
        lambda: activate(net, "default"),
        lambda: net.to(torch.float64),
        lambda: net.train(),
    ):
        act()
        with disabled(net):
            pass
    assert {name: id(p) for name, p in net.named_parameters() if p.requires_grad} == own
    assert {name: id(p) for name, p in net.named_parameters() if name not in own} == base
    merge(net)
    remove(net)
    assert {name: id(p) for name, p in net.named_parameters()} == base


@pytest.mark.parametrize("method", METHODS)
def test_a_teacher_pass_between_forward_and_backward(method):
    net, x = toy(), image()
    adapt(net, method, rank=2, batchnorm="adapt", modules_to_train="out")
    randomize(net, 1)
    found = []
    for between in (False, True):
        net.zero_grad()
        y = net(x)
        if between:
            with torch.no_grad(), disabled(net):
                net(x)
            deactivate(net)
            activate(net, "default")
        y.square().sum().backward()
        found.append([p.grad.clone() for p in net.parameters() if p.requires_grad])
    assert all(same_tensor(one, other) for one, other in zip(*found, strict=True)) and len(found[0]) > 5


@pytest.mark.parametrize("method", METHODS)
def test_the_start_follows_the_seed(method):
    def started(seed, **options):
        net = toy()
        torch.manual_seed(seed)
        adapt(net, method, rank=2, **options)
        return {n: p.detach().clone() for n, p in net.named_parameters() if p.requires_grad}

    one, same, other = started(3), started(3), started(4)
    assert all(same_tensor(one[n], same[n]) for n in one)
    drawn = [n for n in one if n.rsplit(".", 1)[1] not in {"m", "a" if method.startswith("cp") else "B"}]
    assert len(drawn) >= 4 and not any(torch.equal(one[n], other[n]) for n in drawn)
    assert all(one[n].std() > 1e-3 and one[n].abs().max() < 5 for n in drawn if one[n].numel() > 3)
    with torch.no_grad():
        assert all(same_tensor(one[n], p) for n, p in started(3).items())
    net = toy()
    with torch.no_grad():
        adapt(net, method, rank=2)
    net(image()).sum().backward()


def test_a_network_with_a_module_called_adapter():
    """The user's own names come first: their module is a module like any other."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.adapter = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
            self.last = nn.Conv2d(3, 1, 1)

        def forward(self, x):
            return self.last(self.adapter(x))

    torch.manual_seed(0)
    net, x = Own().double().eval(), image()
    base = copy.deepcopy(net)
    adapt(net, "convlora", rank=1, batchnorm="adapt")
    assert list(adapted_layers(net)) == ["adapter.0", "last"] and same_tensor(out(net, x), out(base, x))
    train(net)
    merge(net)
    unmerge(net)
    twin = copy.deepcopy(base)
    with tempfile.TemporaryDirectory() as folder:
        load_adapter(twin, save_adapter(net, Path(folder) / "a.safetensors"))
    assert same_tensor(out(twin, x), out(net, x)) and worst(out(net, x), out(base, x)) > 1e-3
    remove(net)
    assert same_bits(bits(net), bits(base)) and kinds(net) == kinds(base)


def test_two_convolutions_that_share_one_weight():
    """Tied weights: each convolution has an adapter of its own, and what was one tensor is one again."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1)).double().eval()
    net[2].weight = net[0].weight
    base, x = copy.deepcopy(net), image()
    adapt(net, "convdora", rank=1)
    assert same_tensor(out(net, x), out(base, x))
    randomize(net, 1)
    y = out(net, x)
    assert worst(y, out(base, x)) > 1e-3
    merge(net)
    assert worst(out(net, x), y) < 1e-12, "the second layer was merged on top of the first one"
    unmerge(net)
    remove(net)
    assert (
        net[0].weight is net[2].weight and same_bits(bits(net), bits(base)) and same_tensor(out(net, x), out(base, x))
    )


def test_an_average_of_the_weights_follows_the_adapter():
    from torch.optim.swa_utils import AveragedModel

    net, x = toy(), image()
    adapt(net, "cp-lora", rank=2)
    mean = AveragedModel(net, use_buffers=True)
    values = []
    for seed in range(3):
        randomize(net, seed)
        mean.update_parameters(net)
        values.append(net.mid.adapter.a.detach().clone())
    assert worst(mean.module.mid.adapter.a, torch.stack(values).mean(0)) < 1e-12
    merge(mean.module)
    assert worst(out(mean, x), out(net, x)) > 1e-6 and not is_merged(net)


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_traced_and_exported(method):
    """torch.export and torch.jit.trace see a plain graph that does the same."""
    net, x = toy(), image()
    adapt(net, method, rank=2)
    randomize(net, 1)
    assert worst(out(torch.export.export(net, (x,)).module(), x), out(net, x)) < 1e-12
    merge(net)
    assert worst(out(torch.export.export(net, (x,)).module(), x), out(net, x)) < 1e-12


# ----- what an audit found


def test_left_over_gradients_move_nothing():
    """Gradients and momentum from before: an optimizer over everything moves the adapter alone."""
    for kind in (torch.optim.Adam, lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9, weight_decay=0.1)):
        net = toy().train()
        old = kind(net.parameters())
        net(image()).square().sum().backward()
        old.step()
        net(image()).square().sum().backward()
        before = bits(net)
        adapt(net, "cp-lora", rank=1, where="mid", modules_to_train="out")
        assert all(p.grad is None for p in net.parameters())
        new = kind(net.parameters())
        old.zero_grad(set_to_none=False)
        net(image()).square().sum().backward()
        old.step()
        new.step()
        assert same_bits(base_part(net), before) and net.mid.adapter.a.any()


def test_parts_with_different_adapters_on():
    """What is on in a part alone stays apart: nothing is merged that is off, nothing is dropped in silence."""
    base, net, x = toy(), toy(), image()
    adapt(net, "cp-lora", rank=1, name="a")
    adapt(net.down, "convlora", rank=1, name="b")
    randomize(net, 1)
    y, before = out(net, x), photo(net)
    asks = (active_adapter, adapted_layers, merge, merged_copy, lambda n: save_adapter(n, "never"))
    for ask in asks:
        with pytest.raises(RuntimeError, match="(?s)'b'.*'a'|'a'.*'b'.*activate"):
            ask(net)
        assert untouched(net, before) and same_tensor(out(net, x), y)
    assert list(adapted_layers(net, "a")) == CONVS and list(adapted_layers(net.down)) == ["0"]
    with disabled(net):
        assert same_tensor(out(net, x), out(base, x))
    for part in (net.down, net.mid, net.up, net.out):  # one by one
        merge(part)
    assert is_merged(net) and same_tensor(out(net, x), y)
    unmerge(net)
    assert untouched(net, before) and same_tensor(out(net, x), y)
    activate(net, "a")
    merge(net)
    assert active_adapter(net) == "a" and worst(out(net, x), y) > 1e-6
    remove(net)
    assert same_bits(bits(net), bits(base)) and kinds(net) == kinds(base)


@pytest.mark.parametrize("act", [lambda part: deactivate(part), lambda part: adapt(part, "convlora", 1, name="b")])
def test_what_is_off_in_a_part_is_not_merged_there(act):
    net, x = toy(), image()
    adapt(net, "cp-lora", rank=1, name="a")
    randomize(net, 1)
    act(net.up)
    if "b" in adapters(net):
        remove(net.up, "b")
    y = out(net, x)
    assert same_tensor(out(merged_copy(net), x), y)
    merge(net)
    assert same_tensor(out(net, x), y) and same_tensor(out(merged_copy(net), x), y)
    unmerge(net)
    merge(net.mid)  # and a copy of a network that is merged in one part is whole
    assert same_tensor(out(merged_copy(net), x), y)


@pytest.mark.parametrize("method", METHODS)
def test_a_merged_layer_before_an_operation_in_place(method):
    """In training mode too, with and without a batch axis, for every kind of convolution."""

    def inplace(*layers):
        return nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU(inplace=True))]).double()

    torch.manual_seed(0)
    flat = inplace(nn.Conv2d(2, 4, 3, padding=1), nn.ConvTranspose2d(4, 3, 2), nn.Conv2d(3, 1, 1))
    line = inplace(nn.Conv1d(2, 4, 3, padding=1, padding_mode="reflect"), nn.ConvTranspose1d(4, 3, 2))
    for net, x in ((flat, image()), (flat, image()[0]), (line, image()[:, :, 0]), (line, image()[0, :, 0])):
        adapt(net, method, rank=2)
        randomize(net, 1)
        y = net.train()(x).detach()
        merge(net)
        assert net.training and same_tensor(net(x).detach(), y)
        for seen in (x, x.clone().requires_grad_()):
            with pytest.raises(RuntimeError, match="unmerge"):
                net(seen).sum().backward()
        remove(net)


def test_training_while_merged_in_eval_mode():
    net, x = toy(), image()
    adapt(net, "convlora", rank=1, modules_to_train="out")
    randomize(net, 1)
    y = out(net, x)
    merge(net)
    with pytest.raises(RuntimeError, match="unmerge"):
        net.eval()(x).square().sum().backward()
    with torch.no_grad():
        assert same_tensor(net(x), y) and not net(x).requires_grad
    seen = x.clone().requires_grad_()  # a map of what the output depends on is no training
    net(seen).sum().backward()
    plain, other = merged_copy(net), x.clone().requires_grad_()
    plain(other).sum().backward()
    assert same_tensor(seen.grad, other.grad)
    traced = torch.jit.trace(net, x)
    torch.jit.save(traced, io.BytesIO())
    assert worst(out(traced, x), y) < 1e-12
    slices = torch.vmap(lambda one: net(one[None])[0])(x)
    assert worst(slices, y) < 1e-12


def test_a_region_named_as_its_module():
    net = toy()
    net.regions = {"mid": ["mid"], "up": "up", "down": ["down", "mid"], "both": ["mid", "up"]}
    for where, names in (("mid", ["mid"]), ("up", ["up"]), ("down", ["down.0", "mid"]), ("both", ["mid", "up"])):
        adapt(net, "cp-lora", rank=1, where=where)
        assert list(adapted_layers(net)) == names
        remove(net)
    net.regions = {"all": ["both"], "both": ["mid"]}  # regions do not hold regions: a cycle could hide there
    with pytest.raises(ValueError, match="(?s)region 'all'.*'both'"):
        adapt(net, "cp-lora", rank=1, where="all")


class Tied(nn.Module):
    "Three convolutions, of which two share a weight, and two linear layers that do."

    def __init__(self):
        super().__init__()
        self.one, self.other = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(2))
        self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 5)
        self.other.weight, self.last.weight = self.one.weight, self.first.weight

    def forward(self, x):
        return self.last(self.first(self.other(self.one(x).relu())).relu())


def tied():
    torch.manual_seed(0)
    return Tied().double().eval()


def test_flags_of_tied_weights_come_back():
    net = tied()
    net.last.bias.requires_grad_(False)
    before = kinds(net)
    made = adapt(net, "cp-lora", rank=1)
    assert made.network == sum(p.numel() for p in Tied().parameters()) == 36 + 4 + 25 + 10
    assert {n: p.requires_grad for n, p in merged_copy(net).named_parameters()} == {
        name: name != "last.bias" for name, _ in net.named_parameters() if "adapter" not in name
    } | {"other.weight": True}
    remove(net)
    assert kinds(net) == before and net.last.weight is net.first.weight


def test_tied_modules_trained_in_full_stay_tied(tmp_path):
    base, net, x = tied(), tied(), image()
    made = adapt(net, "cp-lora", rank=1, where="one", modules_to_train=["first", "last"])
    assert made.parameters == sum(p.numel() for p in net.parameters() if p.requires_grad) == 2 + 2 + 3 + 3 + 25 + 10
    assert net.first.weight is net.last.weight
    train(net, 3)
    y = out(net, x)
    assert net.first.weight is net.last.weight and worst(y, out(base, x)) > 1e-3
    assert same_bits(base_part(net), bits(base))
    plain = merged_copy(net)
    assert plain.first.weight is plain.last.weight and worst(out(plain, x), y) < 1e-12
    twin = tied()
    load_adapter(twin, save_adapter(net, tmp_path / "a.safetensors"))
    assert twin.first.weight is twin.last.weight and same_tensor(out(twin, x), y)
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert copied.first.weight is copied.last.weight
    remove(net)
    assert same_bits(bits(net), bits(base)) and net.first.weight is net.last.weight


@pytest.mark.parametrize("alone", ["first", "other"])
def test_one_of_two_tied_modules_learns_a_copy(alone):
    """The other one keeps the base's tensor, or has an adapter of its own over it; afterwards they are one again."""
    net, base, x = tied(), tied(), image()
    adapt(net, "cp-lora", rank=1, where="one", modules_to_train=alone)
    train(net, 3)
    y = out(net, x)
    assert same_bits(base_part(net), bits(base)) and worst(y, out(base, x)) > 1e-3
    assert worst(out(merged_copy(net), x), y) < 1e-12
    with disabled(net):
        assert same_tensor(out(net, x), out(base, x)) and net.first.weight is net.last.weight
    remove(net)
    assert same_bits(bits(net), bits(base)) and net.first.weight is net.last.weight and kinds(net) == kinds(base)


def test_a_forward_put_on_the_layer_itself_is_refused():
    for key in ("forward", "_conv_forward"):
        net = toy()
        setattr(net.mid, key, getattr(net.mid, key))
        before = photo(net)
        with pytest.raises(TypeError, match="'mid'.*forward of its own"):
            adapt(net, "cp-lora", rank=1)
        assert untouched(net, before)
        adapt(net, "cp-lora", rank=1, where="decoding")


class Spectral(nn.Module):
    "A convolution to adapt, beside spectral norms of both makes."

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.new = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 2, 3, padding=1))
        self.old = nn.utils.spectral_norm(nn.Linear(5, 5))

    def forward(self, x):
        return self.old(self.new(self.conv(x)).relu())


def test_spectral_norms_of_the_base_stay(tmp_path):
    torch.manual_seed(0)
    net, x = Spectral().double().train(), image()
    out(net, x)
    base = copy.deepcopy(net)
    adapt(net, "cp-lora", rank=1, where="conv")
    train(net, 3)
    assert same_bits(base_part(net), bits(base)) and worst(out(net, x), out(base.eval(), x)) > 1e-3
    twin = copy.deepcopy(base)
    load_adapter(twin, save_adapter(net, tmp_path / "a.safetensors"))
    assert worst(out(twin.eval(), x), out(net, x)) < 1e-12
    net.train()
    remove(net)
    assert kinds(net) == kinds(base.train()) and same_bits(bits(net), bits(base))
    assert same_tensor(out(net, x), out(base, x)) and same_bits(bits(net), bits(base))
    assert not same_bits(bits(net), bits(twin.eval()))


def test_a_spectral_norm_trained_in_full_iterates_on_its_own_copies():
    torch.manual_seed(0)
    net, x = Spectral().double().train(), image()
    out(net, x)
    base, plain = copy.deepcopy(net), copy.deepcopy(net)
    adapt(net, "cp-lora", rank=1, where="conv", modules_to_train="old")
    for model, p in ((net, net.old.weight_orig), (plain, plain.old.weight_orig)):
        model.train()
        plain.new.eval()
        if model is plain:
            plain.new.parametrizations.eval()
        with torch.no_grad():
            p.mul_(1.5).add_(0.1)
            model(x)
    assert worst(net.old.weight_u, plain.old.weight_u) < 1e-12 < worst(plain.old.weight_u, base.old.weight_u)
    assert same_bits(base_part(net), bits(base))
    assert worst(out(net.eval(), x), out(plain.eval(), x)) < 1e-12
    remove(net)
    assert same_bits(bits(net), bits(base))


def test_a_shared_convolution_is_found_under_each_name():
    shared = nn.Conv2d(2, 2, 3, padding=1)
    net = nn.ModuleDict(
        {"enc": nn.ModuleDict({"c": shared}), "dec": nn.ModuleDict({"c": shared, "d": nn.Conv2d(2, 2, 1)})}
    )
    for where, names in (("dec", ["enc.c", "dec.d"]), ("dec.c", ["enc.c"]), ("d*.c", ["enc.c"]), ("enc", ["enc.c"])):
        made = adapt(net, "cp-lora", rank={"dec.c": 2, "*": 1} if where == "dec" else 2, where=where)
        assert [row.layer for row in made.rows] == list(adapted_layers(net)) == names
        assert made.rows[0].rank == 2
        remove(net)
    adapt(net, "cp-lora", rank=1, where="dec.d", modules_to_train="dec.c")
    assert [n for n, p in net.named_parameters() if p.requires_grad and "enc.c" in n]


def test_norms_without_statistics_are_trained_by_the_train_policy():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.InstanceNorm2d(3, affine=True)
    ).double()
    net.train()
    before = photo(net)
    for policy, names in (("frozen", ["0"]), ("adapt", ["0"]), ("train", ["0", "1"])):
        made = adapt(net, "cp-lora", rank=1, batchnorm=policy)
        assert [row.layer for row in made.rows] == names
        net.eval()
        net(image()).square().sum().backward()
        assert policy != "train" or net[1].adapter.weight.grad.any()
        remove(net)
        assert not any(module.training for module in net.modules()), "the mode of every norm is the user's"
        assert untouched(net.train(), before)


def test_norms_follow_beside_a_convolution_but_not_in_other_blocks():
    def block():
        unit = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU())  # norm and activation in a block of their own
        return nn.ModuleDict({"conv": nn.Conv2d(2, 2, 1), "adn": unit})

    net = nn.ModuleDict({"stem": nn.Conv2d(2, 2, 1), "bn": nn.BatchNorm2d(2), "a": block(), "b": block()})
    for where, norms in (
        ("stem", ["bn"]),
        ("a.conv", ["a.adn.0"]),
        (["a.conv", "stem"], ["bn", "a.adn.0"]),
        (["stem", "b.adn"], ["bn", "b.adn.0"]),
        ("b", ["b.adn.0"]),
        (lambda name, conv: name == "b.conv", ["b.adn.0"]),
        (None, ["bn", "a.adn.0", "b.adn.0"]),
    ):
        made = adapt(net, "cp-lora", rank=1, where=where, batchnorm="adapt")
        assert [row.layer for row in made.rows if row.rank is None] == norms
        remove(net)


def test_ranks_by_region():
    net = toy()
    made = adapt(net, "cp-lora", rank={"out": 1, "decoding": 5, "*": 2})
    assert {row.layer: row.rank for row in made.rows} == {"down.0": 2, "mid": 2, "up": 5, "out": 1}


def test_a_network_without_values_can_be_planned():
    """On the meta device, which knows no autocast."""
    with torch.device("meta"):
        net = Toy().eval()
    for method in METHODS:
        adapt(net, method, rank=1, name=method)
        for context in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
            with context:
                assert net(torch.empty(1, 2, 6, 5, device="meta")).shape == (1, 1, 12, 10)
                assert effective_weight(net.mid).shape == delta_weight(net.mid).shape == net.mid.weight.shape


def test_data_parallel_is_refused_in_words():
    net = toy()
    net.mid._replicate_for_data_parallel()
    adapt(net, "cp-lora", rank=1)
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        for module in net.modules():
            module._replicate_for_data_parallel()


# --- biases beside the factors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["cp-lora", "convdora"])
def test_biases_are_trained_merged_saved_and_taken_off(method, tmp_path):
    "bias=True: the adapter owns copies; the base keeps its own to the last bit."
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(4, 3, 2, stride=2),
                             nn.Conv2d(3, 1, 1, bias=False)).double()

    net, base, x = network(), network(), torch.randn(2, 2, 8, 8, dtype=torch.float64)
    plain = adapt(network(), method, rank=2)
    made = adapt(net, method, rank=2, bias=True)
    assert made.parameters == plain.parameters + 4 + 3, "one more per channel of the two convolutions that have a bias"
    assert torch.equal(net(x), base(x))
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    assert not torch.equal(net[0].adapter.bias, base[0].bias) and torch.equal(net[0].bias, net[0].adapter.bias)
    assert torch.equal(net[0]._parameters["bias"], base[0].bias)
    by_hand = torch.nn.functional.conv2d(x, effective_weight(net[0]), net[0].adapter.bias, padding=1)
    assert torch.equal(net[0](x), by_hand)
    out = net(x).detach()
    with disabled(net):
        assert torch.equal(net(x), base(x))
    assert torch.equal(merged_copy(net)(x), out)
    merge(net)
    assert torch.equal(net(x), out)
    unmerge(net)
    assert torch.equal(net(x), out)
    save_adapter(net, tmp_path / "a.safetensors")
    load_adapter(again := network(), tmp_path / "a.safetensors")
    assert torch.equal(again(x), out)
    remove(net)
    assert torch.equal(net(x), base(x)) and net.state_dict().keys() == base.state_dict().keys()


def test_peft_has_no_place_for_biases(tmp_path):
    adapt(net := nn.Sequential(nn.Conv2d(2, 4, 3)), "convlora", rank=2, bias=True)
    with pytest.raises(ValueError, match="trains biases"):
        to_peft(net, tmp_path / "peft")
