"""Adapter files: what is written comes back to the bit, all else is refused whole; PEFT's format; compression."""

import copy
import json
import os
import pickle
import random
import warnings

import pytest
import torch
from adapters_reference import DORA, METHODS, bits, factors, randomize, same_bits, same_tensor, to_view, update
from safetensors import safe_open
from safetensors.torch import save_file
from test_adapters_lifecycle import base_part, image, kinds, norms, out, photo, toy, train, untouched, worst
from torch import nn

import sahlora
from sahlora.adapters import (
    activate,
    active_adapter,
    adapt,
    adapted_layers,
    adapters,
    compress,
    deactivate,
    delta_weight,
    effective_weight,
    from_peft,
    is_merged,
    load_adapter,
    merge,
    merged_copy,
    read_adapter,
    remove,
    save_adapter,
    to_peft,
    unmerge,
)

OPTIONS = {
    "plain": {},
    "scaled": {"alpha": 7, "scaling": "rslora", "rank": 3},
    "ranks": {"rank": {"mid": 4, "*": 1}},
    "region": {"where": "decoding", "dropout": 0.2},
    "norms": {"batchnorm": "adapt"},
    "trained-norms": {"batchnorm": "train", "where": ["mid", "up"]},
    "trained-module": {"modules_to_train": ["out", "norm"], "batchnorm": "adapt"},
}


def saved(folder, method="cp-lora", dtype=torch.float64, trained=True, **options):
    """A trained network, its file, and the tensors inside it."""
    net = toy(dtype)
    adapt(net, method, **{"rank": 2, **options})
    if trained:
        train(net, 2)
    return net, save_adapter(net, folder / "adapter.safetensors", metadata={"seed": 3, "cohort": "Universität"})


def refused(net, path, error=ValueError, words=(), **options):
    """Loading fails with the words in the message, and nothing of the network has changed."""
    before, names, active = photo(net), adapters(net), active_adapter(net)
    with pytest.raises(error) as caught:
        load_adapter(net, path, **options)
    text = str(caught.value)
    assert all(str(word) in text for word in words), text
    assert untouched(net, before) and adapters(net) == names and active_adapter(net) == active
    return text


def alike(one, other):
    """Every bit of two networks, and the order of their parameters, by which an optimizer's saved state goes."""
    assert [name for name, _ in one.named_parameters()] == [name for name, _ in other.named_parameters()]
    return same_bits(dict(sorted(bits(one).items())), dict(sorted(bits(other).items())))


# ----- round trips


@pytest.mark.many
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_what_was_saved_comes_back(method, options, tmp_path):
    net, path = saved(tmp_path, method, **OPTIONS[options])
    twin, x = toy(), image()
    made = load_adapter(twin, path)
    assert alike(twin, net) and kinds(twin) == kinds(net)
    assert same_tensor(out(twin, x), out(net, x)) and worst(out(net, x), out(toy(), x)) > 1e-4
    assert adapters(twin) == ["default"] and made.parameters == sum(
        p.numel() for p in twin.parameters() if p.requires_grad
    )
    for one, other in zip(adapted_layers(net).values(), adapted_layers(twin).values(), strict=True):
        assert same_tensor(effective_weight(one), effective_weight(other))
        assert same_tensor(delta_weight(one), delta_weight(other))
    assert same_bits(bits(merged_copy(twin)), bits(merged_copy(net)))
    for model in (net, twin):  # and training goes on as it would have
        torch.manual_seed(4)
        train(model, 2)
    assert alike(twin, net) and same_tensor(out(twin, x), out(net, x))
    for name, stats in norms(net).items():
        assert all(same_tensor(a, b) for a, b in zip(stats, norms(twin)[name], strict=True))
    remove(twin)
    assert same_bits(bits(twin), bits(toy())) and kinds(twin) == kinds(toy())


@pytest.mark.parametrize(
    "method, options",
    [
        (m, {"rank_setting": s, "unfolding": u})
        for m in ("lora-c", "dora-c")
        for s in ("rk", "r")
        for u in ("oh-iw", "o-ihw")
    ]
    + [(m, {"detach_norm": False}) for m in sorted(DORA)],
)
def test_options_of_the_methods_come_back(method, options, tmp_path):
    net, path = saved(tmp_path, method, **options)
    twin = toy()
    load_adapter(twin, path)
    assert same_tensor(out(twin, image()), out(net, image()))
    for model in (net, twin):
        model.zero_grad()
        model(image()).square().sum().backward()
    for name, layer in adapted_layers(net).items():
        for key, p in factors(layer).items():
            assert same_tensor(p.grad, factors(adapted_layers(twin)[name])[key].grad), (name, key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_comes_back(dtype, tmp_path):
    net, path = saved(tmp_path, "convdora", dtype, trained=False, batchnorm="adapt")
    randomize(net, 1)
    save_adapter(net, path)
    twin = toy(dtype)
    load_adapter(twin, path)
    assert alike(twin, net) and all(p.dtype == dtype for p in twin.mid.adapter.parameters())


def test_the_file_holds_the_adapter_alone_and_says_what_it_is(tmp_path):
    net, path = saved(tmp_path, "convdora", alpha=5, where="encoding", modules_to_train="out")
    with safe_open(path, "pt") as file:
        stored, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    own = {key: value for key, value in bits(net).items() if ".adapter." in key}
    assert same_bits(dict(sorted(stored.items())), dict(sorted(own.items())))
    assert "out.adapter.weight" in stored and len(stored) == 2 * 3 + 2
    texts = [json.loads(value) for value in metadata.values() if value.lstrip().startswith("{")]
    assert len(texts) == 1, "one JSON header"
    text = json.dumps(texts[0])
    for word in (
        "convdora",
        "down.0",
        "mid",
        "Universit",
        sahlora.__version__,
        "lora",
        "alpha",
        "version",
        "[4, 2, 3, 3]",
        "out",
    ):
        assert word in text, word
    header, tensors = read_adapter(path)
    assert header["metadata"] == {"seed": 3, "cohort": "Universität"} and same_bits(
        tensors, dict.fromkeys(tensors) | stored
    )
    assert path.stat().st_size < 12_000
    # the names of the file do not depend on the order of the layers, and the bytes only on the content
    again = save_adapter(net, tmp_path / "again.safetensors", metadata={"cohort": "Universität", "seed": 3})
    assert again.read_bytes() == path.read_bytes()


def test_an_adapter_that_rests_can_be_saved_by_name(tmp_path):
    net, x = toy(), image()
    adapt(net, "cp-lora", rank=2, name="a", batchnorm="adapt", modules_to_train="out")
    train(net, 2)
    a = out(net, x)
    expected = save_adapter(net, tmp_path / "expected.safetensors").read_bytes()
    adapt(net, "convdora", rank=1, name="b")
    assert save_adapter(net, tmp_path / "a.safetensors", name="a").read_bytes() == expected
    assert active_adapter(net) == "b"
    deactivate(net)
    save_adapter(net, tmp_path / "b.safetensors", name="b")
    twin = toy()
    load_adapter(twin, tmp_path / "b.safetensors")
    assert adapters(twin) == ["b"]
    load_adapter(twin, tmp_path / "a.safetensors", name="other")
    assert adapters(twin) == ["b", "other"] and active_adapter(twin) == "other" and same_tensor(out(twin, x), a)
    refused(twin, tmp_path / "b.safetensors", words=["'b'"])
    refused(twin, tmp_path / "a.safetensors", words=["'other'"], name="other")
    activate(twin, "b")
    remove(twin, "other")
    assert save_adapter(twin, tmp_path / "b2.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_an_adapter_that_rested_while_the_network_moved_can_be_saved_and_loaded(tmp_path):
    net, x = toy(), image(torch.float32)
    adapt(net, "convdora", rank=2, name="a", batchnorm="adapt", modules_to_train="out")
    train(net, 1)
    adapt(net, "cp-lora", rank=1, name="b")
    net.float()
    path = save_adapter(net, tmp_path / "a.safetensors", name="a")
    twin = toy().float()
    load_adapter(twin, path)
    activate(net, "a")
    assert alike(merged_copy(twin), merged_copy(net)) and same_tensor(out(twin, x), out(net, x))


def test_layout_and_flags_of_the_base_do_not_matter(tmp_path):
    net, path = saved(tmp_path, "convlora")
    twin = toy().to(memory_format=torch.channels_last).train()
    twin.mid.requires_grad_(False)
    load_adapter(twin, path)
    assert worst(out(twin.eval(), image()), out(net, image())) < 1e-12
    assert {n for n, p in twin.named_parameters() if p.requires_grad} == {
        n for n, p in net.named_parameters() if p.requires_grad
    }
    remove(twin)
    assert twin.up.weight.requires_grad and not twin.mid.weight.requires_grad


def test_saving_replaces_whole_files_and_leaves_nothing_besides(tmp_path):
    net, path = saved(tmp_path)
    first = path.read_bytes()
    with pytest.raises(TypeError, match="metadata"):
        save_adapter(net, path, metadata={"what": object()})
    assert path.read_bytes() == first
    randomize(net, 9)
    save_adapter(net, str(path))
    assert path.read_bytes() != first and [p.name for p in tmp_path.iterdir()] == [path.name]
    merge(net)
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="unmerge"):
        save_adapter(net, path)
    unmerge(net)
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="(?s)nobody.*default"):
        save_adapter(net, path, name="nobody")
    with pytest.raises(RuntimeError, match="adapt"):
        save_adapter(toy(), path)
    deactivate(net)
    with pytest.raises(RuntimeError, match="activ"):
        save_adapter(net, path)
    assert path.read_bytes() == before


# ----- another base


@pytest.mark.parametrize(
    "key",
    ["down.0.weight", "down.0.bias", "down.1.weight", "down.1.running_mean", "mid.weight", "norm.bias", "out.bias"],
)
def test_another_base_is_refused_and_its_first_differing_layer_named(key, tmp_path):
    """One number in the last bit; layers behind it differ too, but the first one is named."""
    _, path = saved(tmp_path, "cp-lora", where="decoding")
    net, layer = toy(), key.rsplit(".", 1)[0]
    with torch.no_grad():
        tensor = net.state_dict()[key].flatten()
        tensor[-1] = torch.nextafter(tensor[-1], torch.tensor(9.0, dtype=tensor.dtype))
        net.out.weight.add_(1)
    text = refused(net, path, words=[path, repr(layer)])
    assert layer == "out" or "'out'" not in text
    adapt(net, "convlora", rank=1, name="here")
    randomize(net, 1)
    refused(net, path, words=[repr(layer)])


def test_the_sign_of_a_zero_and_the_dtype_are_part_of_the_base(tmp_path):
    base = toy()
    with torch.no_grad():
        base.mid.weight.flatten()[3] = 0.0
    net = copy.deepcopy(base)
    adapt(net, "cp-lora", rank=1)
    path = save_adapter(net, tmp_path / "a.safetensors")
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.mid.weight.flatten()[3] = -0.0
    refused(other, path, words=["'mid'"])
    refused(copy.deepcopy(base).float(), path, words=["'down.0'"])
    load_adapter(base, path)


def test_missing_and_extra_layers(tmp_path):
    _, path = saved(tmp_path, "cp-lora")
    missing = toy()
    missing.up = nn.Identity()
    refused(missing, path, words=["'up'"])
    nameless = toy()
    del nameless.out
    refused(nameless, path, words=["'out'"])
    extra = toy()
    extra.head = nn.Conv2d(3, 1, 1).double()
    refused(extra, path, words=["'head'", "a layer"])
    _, partial = saved(tmp_path, "cp-lora", where="mid")
    refused(extra, partial, words=["'head'", "a layer"])  # also where the extra layer is none that is adapted
    refused(missing, partial, words=["'up'", "a layer"])
    linear = toy()
    linear.mid = nn.Linear(3, 3).double()
    refused(linear, path, words=["'mid'"])
    refused(nn.Sequential(nn.ReLU()), path, words=["lacks"])


def test_changed_shapes_and_kinds(tmp_path):
    _, path = saved(tmp_path, "convlora")
    for layer, module in {
        "mid": nn.Conv2d(4, 4, 3, groups=4, padding=1, bias=False),
        "down.0": nn.Conv2d(2, 4, 5, padding=2),
        "up": nn.ConvTranspose2d(4, 2, 2, stride=2),
        "out": nn.Conv3d(3, 1, 1),
    }.items():
        net = toy()
        parent, _, name = layer.rpartition(".")
        setattr(net.get_submodule(parent), name, module.double())
        refused(net, path, words=[repr(layer)])
    _, path = saved(tmp_path, "convlora", where="out")
    reshaped = toy()  # the same numbers in another shape, in a layer that is not adapted
    reshaped.mid = nn.Conv2d(4, 4, (1, 9), padding="same", groups=2, bias=False).double()
    reshaped.mid.weight.data = toy().mid.weight.data.reshape(4, 2, 1, 9)
    refused(reshaped, path, words=["'mid'"])
    square = nn.Sequential(nn.Conv2d(3, 3, 3)).double()
    adapt(square, "convlora", rank=1)
    randomize(square, 1)
    save_adapter(square, path)
    turned = nn.Sequential(nn.ConvTranspose2d(3, 3, 3)).double()
    remove(square)
    turned.load_state_dict(square.state_dict())
    refused(turned, path, words=["'0'"])  # the same numbers in another kind of layer


def test_loading_refuses_in_states_where_it_would_do_harm(tmp_path):
    net, path = saved(tmp_path)
    merge(net)
    refused(net, path, RuntimeError, words=["unmerge"], name="again")
    assert is_merged(net)
    unmerge(net)
    load_adapter(net, path, name="again")
    assert adapters(net) == ["default", "again"]


# ----- damage


def test_a_file_cut_anywhere_is_refused(tmp_path):
    net, path = saved(tmp_path, "convdora", batchnorm="adapt")
    whole, target = path.read_bytes(), toy()
    cuts = [0, 1, 7, 8, 9, 100, *range(200, len(whole), max(1, len(whole) // 40)), len(whole) - 1]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        refused(target, path, words=[path])
    for tail in (b"\0", b"x" * 8, whole):
        path.write_bytes(whole + tail)
        refused(target, path, words=[path])
    path.write_bytes(whole)
    load_adapter(target, path)
    assert alike(target, net)


def test_a_file_altered_anywhere_is_refused(tmp_path):
    """One flipped bit at some hundred places: in the sizes, the header, the JSON, every tensor."""
    _, path = saved(tmp_path, "cp-dora", where="mid", rank=1)
    whole, target, chance = path.read_bytes(), toy(), random.Random(0)
    data = 8 + int.from_bytes(whole[:8], "little")
    places = {
        *range(8),
        *chance.sample(range(8, data), 250),
        *chance.sample(range(data, len(whole)), 100),
        data,
        len(whole) - 1,
    }
    for place in sorted(places):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="adapter.safetensors"):
            load_adapter(target, path)
    assert untouched(target, photo(toy())) and adapters(target) == []


def rewrite(path, change):
    """The same tensors with a header that somebody edited."""
    with safe_open(path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    (key,) = [key for key, value in metadata.items() if value.lstrip().startswith("{")]
    header = json.loads(metadata[key])
    change(header, tensors)
    save_file(tensors, path, metadata={**metadata, key: json.dumps(header)})


def test_an_edited_header_is_refused(tmp_path):
    def alpha(header, tensors):
        header["adapter"]["alpha"] = 100.0

    def method(header, tensors):
        header["adapter"]["method"] = "convlora"

    def base(header, tensors):
        header["base"]["mid"] = "0" * 64

    def note(header, tensors):
        header["metadata"]["seed"] = 4

    def rank(header, tensors):
        next(iter(header["layers"].values()))["rank"] = 3

    def number(header, tensors):
        next(iter(tensors.values())).flatten()[0] += 1

    def swap(header, tensors):
        first, second = [key for key in tensors if key.endswith("mid.adapter.c") or key.endswith("mid.adapter.d")]
        tensors[first], tensors[second] = tensors[second], tensors[first]

    def lose(header, tensors):
        tensors.popitem()

    def add(header, tensors):
        tensors["evil"] = torch.ones(2)

    def checksum(header, tensors):
        del header["checksum"]

    for change in (alpha, method, base, note, rank, number, swap, lose, add, checksum):
        _, path = saved(tmp_path)
        refused(toy(), rewrite(path, change) or path, words=[path])
    _, path = saved(tmp_path)
    rewrite(path, lambda header, tensors: None)
    load_adapter(toy(), path)  # what was merely written again is still the same


@pytest.mark.parametrize("version", [0, 2, 999, "1", None, -1])
def test_an_unknown_version_is_refused(version, tmp_path):
    _, path = saved(tmp_path)
    rewrite(path, lambda header, tensors: header.update(version=version))
    refused(toy(), path, words=[path, "version", repr(version)])


def test_files_that_are_something_else(tmp_path):
    net, path = toy(), tmp_path / "x.safetensors"
    refused(net, tmp_path / "nowhere.safetensors", FileNotFoundError, words=["nowhere.safetensors"])
    save_file({"a": torch.zeros(2)}, path)
    refused(net, path, words=[path])
    save_file({"a": torch.zeros(2)}, path, metadata={"sahlora": "{}"})
    refused(net, path, words=[path])
    save_file({"a": torch.zeros(2)}, path, metadata={"sahlora": "[1, 2"})
    refused(net, path, words=[path])
    path.write_text("not a file of tensors at all")
    refused(net, path, words=[path])
    refused(net, tmp_path, (ValueError, OSError), words=[tmp_path])


def test_no_pickle_is_ever_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path / "sprung").write_text, ("ha",)

    for write in (lambda p: p.write_bytes(pickle.dumps(Trap())), lambda p: torch.save(Trap(), p)):
        write(tmp_path / "trap.safetensors")
        refused(toy(), tmp_path / "trap.safetensors", words=["trap.safetensors"])
    assert not (tmp_path / "sprung").exists()


# ----- PEFT


class Plain(nn.Module):
    "Convolutions on which PEFT and these adapters mean the same."

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.body = nn.Sequential(
            nn.Conv2d(4, 6, 3, stride=2, padding="valid"), nn.ReLU(), nn.Conv2d(6, 4, 1, bias=False)
        )
        self.body2 = nn.Conv2d(4, 3, (1, 2), padding="same")

    def forward(self, x):
        return self.body2(self.body(torch.relu(self.stem(x))))


def plain(seed=0):
    torch.manual_seed(seed)
    return Plain().double().eval()


def apart(one, other):
    """The largest difference, relative to the largest value."""
    return worst(one, other) / max(1.0, other.abs().max().item())


@pytest.fixture
def peft():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("peft")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 5, "rank": 3},
        {"scaling": "rslora", "alpha": 3},
        {"rank": {"stem": 4, "*": 2}},
        {"rank": {"body*": 3, "*": 1}, "alpha": 6, "scaling": "rslora"},
        {"where": ["body"], "rank": 1},
    ],
)
@pytest.mark.parametrize("method", ["convlora", "convdora", "cp-lora", "cp-dora"])
def test_peft_opens_what_was_exported(method, options, peft, tmp_path):
    net, x = plain(), image()
    adapt(net, method, **{"rank": 2, **options})
    randomize(net, 1)
    to_peft(net, tmp_path / "peft")
    model = peft.PeftModel.from_pretrained(plain(), str(tmp_path / "peft")).eval()
    assert apart(out(model, x), out(net, x)) < 1e-12 and worst(out(net, x), out(plain(), x)) > 1e-2
    merged = model.merge_and_unload()
    for name, conv in plain().named_modules():
        if isinstance(conv, nn.Conv2d):
            assert apart(merged.get_submodule(name).weight, merged_copy(net).get_submodule(name).weight) < 1e-12
    # and the way back, as convLoRA or convDoRA
    twin = plain()
    from_peft(twin, tmp_path / "peft", name="back")
    assert adapters(twin) == ["back"] and apart(out(twin, x), out(net, x)) < 1e-12
    assert list(adapted_layers(twin)) == list(adapted_layers(net))
    assert [len(factors(layer)) for layer in adapted_layers(twin).values()] == [3 if "dora" in method else 2] * len(
        adapted_layers(net)
    )
    remove(twin)
    assert same_bits(bits(twin), bits(plain()))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank_pattern": {"stem": 5}},
        {"alpha_pattern": {"body.0": 11}, "rank_pattern": {"body": 1, "0": 3}},
        {"use_rslora": True},
        {"rank_pattern": {"body2": 1}, "alpha_pattern": {"^stem": 2}, "use_rslora": True},
        {"target_modules": ["stem", "body.2"]},
    ],
)
@pytest.mark.parametrize("dora", [False, True])
def test_what_peft_saved_is_opened(dora, options, peft, tmp_path):
    options = {"target_modules": ["stem", "0", "2", "body2"], "r": 2, "lora_alpha": 3, **options}
    model = peft.get_peft_model(plain(), peft.LoraConfig(use_dora=dora, **options)).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_" in key:
                noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                p.copy_(p * (1 + 0.2 * noise.tanh()) if "magnitude" in key else 0.5 * noise)
    model.save_pretrained(str(tmp_path))
    net, x = plain(), image()
    made = from_peft(net, tmp_path)
    assert apart(out(net, x), out(model, x)) < 1e-12 and worst(out(net, x), out(plain(), x)) > 1e-2
    assert made.method == ("convdora" if dora else "convlora")
    adapted = {n for n, _ in model.base_model.model.named_modules() if n.endswith("lora_A")}
    assert set(adapted_layers(net)) == {n.removesuffix(".lora_A") for n in adapted}
    # it trains, saves and merges as any other adapter
    path = save_adapter(net, tmp_path / "ours.safetensors")
    twin = plain()
    load_adapter(twin, path)
    assert same_tensor(out(twin, x), out(net, x))
    merge(net)
    assert apart(out(net, x), out(model, x)) < 1e-12


@pytest.mark.parametrize(
    "what, module",
    [
        ("dilation", nn.Conv2d(2, 4, 3, padding=2, dilation=2)),
        ("groups", nn.Conv2d(2, 4, 3, padding=1, groups=2)),
        ("padding_mode", nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect")),
        ("Transpose", nn.ConvTranspose2d(2, 4, 3, padding=1)),
    ],
)
def test_where_peft_computes_something_else_nothing_is_exported(what, module, tmp_path):
    net = plain()
    net.stem = module.double()
    adapt(net, "convlora", rank=1)
    with pytest.raises(ValueError, match=f"(?s)'stem'.*{what}"):
        to_peft(net, tmp_path / "peft")
    assert not (tmp_path / "peft").exists() or not list((tmp_path / "peft").iterdir())
    remove(net)
    adapt(net, "convlora", rank=1, where="body2")
    to_peft(net, tmp_path / "peft")  # the other layers may


def test_peft_has_no_place_for_the_rest(tmp_path):
    for method in ("lora-c", "dora-c"):
        net = plain()
        adapt(net, method, rank=1)
        with pytest.raises(ValueError, match=method):
            to_peft(net, tmp_path)
    net = plain()
    adapt(net, "convlora", rank=1, modules_to_train="body2")
    with pytest.raises(ValueError, match="body2"):
        to_peft(net, tmp_path)
    net = plain()
    adapt(net, "convdora", rank=1, detach_norm=False)
    to_peft(net, tmp_path)  # the same function; only its training would differ
    merge(net)
    with pytest.raises(RuntimeError, match="unmerge"):
        to_peft(net, tmp_path)
    with pytest.raises(RuntimeError, match="adapt"):
        to_peft(plain(), tmp_path)


def test_peft_folders_that_do_not_fit_change_nothing(peft, tmp_path):
    net = plain()
    adapt(net, "convlora", rank=2)
    randomize(net, 1)
    to_peft(net, tmp_path / "good")

    def attempt(target, folder, error=ValueError, words=()):
        before = photo(target)
        with pytest.raises(error) as caught:
            from_peft(target, folder)
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert untouched(target, before) and adapters(target) == []

    attempt(plain(), tmp_path / "nowhere", FileNotFoundError, ["nowhere"])
    lacking = plain()
    del lacking.body2
    attempt(lacking, tmp_path / "good", words=["body2"])
    wider = plain()
    wider.stem = nn.Conv2d(2, 6, 3).double()
    attempt(wider, tmp_path / "good", words=["stem"])
    dilated = plain()
    dilated.stem = nn.Conv2d(2, 4, 3, padding=2, dilation=2).double()
    attempt(dilated, tmp_path / "good", words=["stem", "dilation"])
    for changes, word in (
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["stem"]}, "modules_to_save"),
    ):
        folder = tmp_path / word
        to_peft(net, folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
        attempt(plain(), folder, words=[word])
    whole = (tmp_path / "good" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "good" / "adapter_model.safetensors").write_bytes(whole[:-9])
    attempt(plain(), tmp_path / "good", words=["good"])
    taken = plain()
    adapt(taken, "cp-lora", rank=1)
    with pytest.raises(ValueError, match="default"):
        from_peft(taken, tmp_path / "bias")


# ----- compression


def cp(factors_):
    axes = "oiyxz"[: len(factors_)]
    return torch.einsum(",".join(f"{axis}p" for axis in axes) + f"->{axes}", *factors_)


@pytest.mark.parametrize("shape", [(5, 4, 3), (5, 4, 3, 3), (3, 2, 2, 3, 2)])
def test_compressing_an_update_reports_its_true_error(shape):
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept, errors = delta.clone(), []
    for rank in (1, 3, 8, 20):
        made = compress(delta, rank)
        (found,) = made.factors.values()
        assert [tuple(f.shape) for f in found] == [(n, rank) for n in shape]
        error = ((cp(found) - delta).norm() / delta.norm()).item()
        assert made.error == pytest.approx(error, rel=1e-6, abs=1e-9)
        errors.append(error)
        # no better multiple of the same direction: the fit is at least a projection along itself
        step = ((cp(found) * delta).sum() / cp(found).square().sum()).item()
        assert step == pytest.approx(1, abs=1e-3)
    assert errors == sorted(errors, reverse=True) and errors[0] < 1 and errors[-1] < 0.35
    assert torch.equal(delta, kept)


def test_an_update_of_rank_one_is_found_exactly():
    parts = [torch.randn(n, 1, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (6, 5, 3, 3)]
    assert compress(cp(parts), 1).error < 1e-6
    svd = torch.randn(7, 3, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = torch.linalg.svdvals(svd.flatten(1))  # of a 1x1 kernel the best fit is known: Eckart and Young
    assert compress(svd, 2).error == pytest.approx((s[2] / s.norm()).item(), rel=1e-3)
    assert compress(torch.zeros(3, 2, 3, 3), 2).error == 0
    assert compress(1e-7 * cp(parts), 1).error < 1e-6 and compress(1e7 * cp(parts).float(), 1).error < 1e-4


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_compressing_a_network_adds_a_cp_adapter(method, tmp_path):
    net, x = toy(), image()
    adapt(net, method, rank=2, alpha=5, name="trained", batchnorm="adapt", modules_to_train="out")
    train(net, 3, lr=0.3)
    y, before = out(net, x), {name: delta_weight(layer).detach().clone() for name, layer in adapted_layers(net).items()}
    magnitudes = {
        name: layer.adapter.m.detach().clone() for name, layer in adapted_layers(net).items() if method in DORA
    }
    torch.manual_seed(11)
    chance = torch.random.get_rng_state()
    made = compress(net, {"mid": 6, "*": 3}, name="small")
    assert torch.equal(torch.random.get_rng_state(), chance), "the caller's random numbers were used up"
    assert adapters(net) == ["trained", "small"] and active_adapter(net) == "small"
    assert list(adapted_layers(net)) == list(before)
    squares, total = 0.0, 0.0
    for name, layer in adapted_layers(net).items():
        f = factors(layer)
        assert set(f) == set("abcd") | ({"m"} if method in DORA else set())
        assert f["a"].shape[1] == (6 if name == "mid" else 3)
        gap = (delta_weight(layer).detach() - before[name]).norm().item()
        assert made.errors[name] == pytest.approx(gap / before[name].norm().item(), rel=1e-6, abs=1e-9)
        squares, total = squares + gap**2, total + before[name].square().sum().item()
        if method in DORA:
            assert same_tensor(f["m"].detach(), magnitudes[name])
        scale = (to_view(delta_weight(layer), layer).flatten() @ update("cp-lora", f, layer).flatten()).item()
        assert scale == pytest.approx(update("cp-lora", f, layer).square().sum().item(), rel=1e-9), (
            "the scale is not in the factors"
        )
    assert made.error == pytest.approx((squares / total) ** 0.5, rel=1e-6) and 0 < made.error < 1
    for text in (repr(made), made._repr_markdown_()):
        assert "mid" in text and f"{made.errors['mid']:.3f}" in text
    assert same_bits(base_part(net), bits(toy()))
    small = out(net, x)
    path = save_adapter(net, tmp_path / "small.safetensors")
    twin = toy()
    load_adapter(twin, path)
    assert same_tensor(out(twin, x), small) and worst(small, out(toy(), x)) > 1e-4
    train(net, 1)
    activate(net, "trained")
    assert same_tensor(out(net, x), y), "training the small one moved the large one"
    remove(net)
    assert same_bits(bits(net), bits(toy()))


def test_compressing_twice_gives_the_same_and_leaves_tensorly_as_it_was():
    import tensorly

    delta = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    results = []
    for backend in ("numpy", "pytorch"):
        with tensorly.backend_context(backend):
            results.append(compress(delta, 4))
            assert tensorly.get_backend() == backend
    assert all(same_tensor(a, b) for a, b in zip(*(r.factors["delta"] for r in results), strict=True))
    assert results[0].error == results[1].error and results[0].factors["delta"][0].dtype == torch.float32


def test_what_compress_refuses():
    net = toy()
    with pytest.raises(RuntimeError, match="adapt"):
        compress(net, 2)
    adapt(net, "convlora", rank=2, name="here")
    randomize(net, 1)
    before = photo(net)
    for bad in (0, -1):
        for what in (net, torch.ones(2, 2, 3, 3)):
            with pytest.raises(ValueError, match="rank"):
                compress(what, bad)
    for bad in (2.5, "4", {"nowhere": 1, "*": 2}, {"mid": 1}):
        with pytest.raises((ValueError, TypeError), match="rank"):
            compress(net, bad)
    with pytest.raises(ValueError, match="here"):
        compress(net, 2, name="here")
    assert untouched(net, before) and adapters(net) == ["here"]
    with torch.no_grad():
        net.mid.adapter.A.fill_(float("nan"))
    with pytest.raises(ValueError, match="mid"):
        compress(net, 2)
    with pytest.raises(ValueError, match="finite"):
        compress(torch.full((2, 2, 3, 3), float("inf")), 2)
    assert adapters(net) == ["here"]
    randomize(net, 1)
    merge(net)
    with pytest.raises(RuntimeError, match="unmerge"):
        compress(net, 2)


# ----- what an audit found


def test_a_compressed_adapter_is_one_adapter_in_its_file(tmp_path):
    """Whatever comes before the first adapted layer: one configuration, and the same output after loading."""
    x = image()
    for method, options in (
        ("convlora", {"batchnorm": "adapt"}),
        ("cp-lora", {"alpha": 32, "scaling": "rslora", "modules_to_train": "0"}),
        ("dora-c", {"modules_to_train": "0", "alpha": 3, "rank_setting": "r", "detach_norm": False}),
    ):

        def made():
            torch.manual_seed(0)
            layers = nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1)
            return nn.Sequential(*layers).double().eval()

        net, twin = made(), made()
        adapt(net, method, rank=2, **options)
        randomize(net, 1)
        compress(net, 2)
        y, path = out(net, x), save_adapter(net, tmp_path / "small.safetensors")
        assert load_adapter(twin, path).method in ("cp-lora", "cp-dora") and same_tensor(out(twin, x), y)
        assert len({str(part.config) for part in net.modules() if hasattr(part, "config")}) == 1
        header = read_adapter(path)[0]["adapter"]
        assert header["alpha"] is None and header["scaling"] == "lora"
        assert header["options"] == ({"detach_norm": False} if method == "dora-c" else {})


@pytest.mark.parametrize("changes", [{"alpha": 32}, {"method": "convlora"}, {"dropout": 0.5}, {"scaling": "rslora"}])
def test_parts_adapted_differently_under_one_name_are_no_one_adapter(changes, tmp_path):
    net, path = toy(), tmp_path / "a.safetensors"
    adapt(net.down, "cp-lora", rank=2, alpha=2)
    adapt(net.up, **{"method": "cp-lora", "rank": 1, "alpha": 2, **changes})
    for act in (lambda: save_adapter(net, path), lambda: compress(net, 1), lambda: to_peft(net, tmp_path / "peft")):
        with pytest.raises(ValueError, match=f"(?s)'default'.*{next(iter(changes))}="):
            act()
    assert list(tmp_path.iterdir()) == [] and adapters(net) == ["default"]
    save_adapter(net.up, path)  # the parts are whole


def test_parts_adapted_alike_under_one_name_are_one_adapter(tmp_path):
    net, twin, x = toy(), toy(), image()
    adapt(net.down, "cp-lora", rank=2, alpha=3, where="0")
    adapt(net.up, "cp-lora", rank=1, alpha=3)
    randomize(net, 1)
    path = save_adapter(net, tmp_path / "a.safetensors")
    load_adapter(twin, path)
    assert same_tensor(out(twin, x), out(net, x)) and worst(out(net, x), out(toy(), x)) > 1e-3
    assert read_adapter(path)[0]["adapter"]["where"] == "0, every convolution"


@pytest.mark.parametrize("autocast", [False, True])
def test_compressing_in_training_or_under_autocast_compresses_all_of_the_update(autocast):
    net = toy(torch.float32)
    adapt(net, "convlora", rank=2, dropout=0.5)
    randomize(net, 1)
    before = {name: delta_weight(layer).detach().clone() for name, layer in adapted_layers(net.eval()).items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        made = compress(net.train(), 60)
    assert made.error < 1e-3
    for name, layer in adapted_layers(net).items():
        gap = (delta_weight(layer).detach() - before[name]).norm() / before[name].norm()
        assert gap < 2e-3 and made.errors[name] == pytest.approx(gap.item(), abs=1e-5)


@pytest.mark.skipif(os.name == "nt", reason="permissions of files are POSIX's")
def test_colleagues_may_read_what_was_saved(tmp_path):
    net = toy()
    adapt(net, "convlora", rank=2, where="down.*")
    before = os.umask(0o027)
    try:
        save_adapter(net, tmp_path / "mine.safetensors")
        to_peft(net, tmp_path / "peft")
    finally:
        os.umask(before)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 3 and {path.stat().st_mode & 0o777 for path in written} == {0o640}


def test_empty_adapters_change_nothing(tmp_path):
    net, path = saved(tmp_path, modules_to_train="out")
    header, tensors = read_adapter(path)
    from sahlora.adapters.files import checksum
    from sahlora.common.files import save_tensors

    for extras in ({}, header["extras"]):
        kept = {key: t for key, t in tensors.items() if any(key.startswith(name) for name in extras)}
        empty = {key: value for key, value in header.items() if key != "checksum"} | {"layers": {}, "extras": extras}
        save_tensors(path, kept, {**empty, "checksum": checksum(empty, kept)})
        refused(toy(), path, words=["no layer"])
    folder = tmp_path / "peft"
    folder.mkdir()
    save_file({}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 8}))
    net = toy()
    before = photo(net)
    with pytest.raises(ValueError, match="(?s)peft.*no layer"):
        from_peft(net, folder)
    assert untouched(net, before) and adapters(net) == []


def test_numbers_from_numpy_are_plain_in_the_file(tmp_path):
    numpy = pytest.importorskip("numpy")
    net, twin = toy(), toy()
    adapt(net, "cp-lora", rank=numpy.int64(2), alpha=numpy.float32(8), dropout=numpy.float32(0.25))
    randomize(net, 1)
    path = save_adapter(net, tmp_path / "a.safetensors")
    load_adapter(twin, path)
    assert same_tensor(out(twin, image()), out(net, image()))
    assert read_adapter(path)[0]["adapter"]["alpha"] == 8 and read_adapter(path)[0]["adapter"]["dropout"] == 0.25


def test_odd_tensors_of_the_base(tmp_path):
    """Conjugate and negative views are hashed by their values; what has no values is refused by name."""
    buffer, path = torch.randn(3, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)), tmp_path / "a"
    net, twin, other = toy(), toy(), toy()
    for model, value in ((net, buffer.conj()), (twin, buffer.conj().resolve_conj()), (other, buffer)):
        model.mid.register_buffer("wave", value)
        model.mid.register_buffer("phase", value.imag)  # of a conjugate: a negative view
    adapt(net, "cp-lora", rank=1)
    save_adapter(net, path)
    load_adapter(twin, path)
    refused(other, path, words=["mid"])
    for make, word in ((lambda t: t.to_sparse(), "sparse"), (lambda t: t.to("meta"), "meta")):
        odd = toy()
        odd.mid.register_buffer("odd", make(torch.eye(3)))
        adapt(odd, "cp-lora", rank=1)
        with pytest.raises(ValueError, match=f"(?s)'odd' of 'mid'.*{word}"):
            save_adapter(odd, tmp_path / "b")
    assert list(tmp_path.iterdir()) == [path]


def test_peft_folders_without_a_name_or_a_scale(tmp_path):
    single = nn.Conv2d(2, 3, 3)
    adapt(single, "convlora", rank=1)
    with pytest.raises(ValueError, match="Sequential"):
        to_peft(single, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
    net = plain()
    adapt(net, "convlora", rank=1)
    to_peft(net, tmp_path / "peft")
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    for changes in ({"lora_alpha": None}, {"lora_alpha": "8"}, {}):
        changed = {**settings, **changes}
        if not changes:
            del changed["lora_alpha"]
        (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(changed))
        target = plain()
        with pytest.raises(ValueError, match="(?s)peft.*lora_alpha"):
            from_peft(target, tmp_path / "peft")
        assert adapters(target) == []


def test_names_and_ranks_are_checked_in_every_way_in(tmp_path):
    net, path = saved(tmp_path)
    delta = torch.randn(3, 3, 3, 3)
    for bad in (True, 1.5, "3", None, {"x": 1}):
        with pytest.raises(TypeError, match="rank.*whole number"):
            compress(delta, bad)
    with pytest.raises(TypeError, match="non-empty"):
        compress(net, 1, name="")
    refused(toy(), path, words=["non-empty"], name="")
    to_peft_from = plain()
    adapt(to_peft_from, "convlora", rank=1)
    with pytest.raises(TypeError, match="non-empty"):
        from_peft(plain(), to_peft(to_peft_from, tmp_path / "peft"), name="")
    assert adapters(net) == ["default"]
