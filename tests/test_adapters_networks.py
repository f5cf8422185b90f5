"""Adapters on whole networks: ours by region, MONAI's by layer; counts, a training step, merging, import time."""

import copy
import sys

import pytest
import torch
from adapters_reference import CONVS, METHODS, all_modules_of, bits, parameter_count, randomize, same_bits, same_tensor
from test_adapters_lifecycle import base_part, kinds, out, worst
from torch import nn

from sahlora.adapters import (
    activate,
    adapt,
    adapted_layers,
    adapters,
    deactivate,
    disabled,
    effective_weight,
    load_adapter,
    merge,
    merged_copy,
    remove,
    save_adapter,
    summary,
    unmerge,
)
from sahlora.unet import MultiViewUnet, Unet

NETWORKS = {
    "multi-view": (lambda: MultiViewUnet(levels=2), (2, 1, 16, 16)),
    "unet": (lambda: Unet(levels=2, width=8), (2, 1, 16, 16)),
    "monai-unet-2d": (
        lambda: monai(
            "UNet",
            spatial_dims=2,
            in_channels=1,
            out_channels=2,
            channels=(4, 8, 16),
            strides=(2, 2),
            num_res_units=1,
            norm="batch",
        ),
        (2, 1, 16, 16),
    ),
    "monai-unet-3d": (
        lambda: monai(
            "UNet", spatial_dims=3, in_channels=1, out_channels=2, channels=(4, 8, 8), strides=(2, 2), num_res_units=2
        ),
        (1, 1, 8, 8, 8),
    ),
    "basicunet-2d": (
        lambda: monai("BasicUNet", spatial_dims=2, in_channels=1, out_channels=2, features=(4, 4, 8, 8, 8, 4)),
        (1, 1, 32, 32),
    ),
    "basicunet-3d": (
        lambda: monai(
            "BasicUNet", spatial_dims=3, in_channels=1, out_channels=1, features=(4, 4, 4, 4, 4, 4), norm="batch"
        ),
        (1, 1, 16, 16, 16),
    ),
    "dynunet-2d": (
        lambda: monai(
            "DynUNet",
            spatial_dims=2,
            in_channels=1,
            out_channels=2,
            kernel_size=[3, 3, 3],
            strides=[1, 2, 2],
            upsample_kernel_size=[2, 2],
            filters=[4, 8, 8],
            res_block=True,
        ),
        (1, 1, 16, 16),
    ),
    "dynunet-3d": (
        lambda: monai(
            "DynUNet",
            spatial_dims=3,
            in_channels=1,
            out_channels=1,
            kernel_size=[3, (3, 3, 1), 3],
            strides=[1, (2, 2, 1), 2],
            upsample_kernel_size=[(2, 2, 1), 2],
            filters=[4, 4, 6],
            norm_name="batch",
        ),
        (1, 1, 8, 8, 8),
    ),
    "segresnet-2d": (
        lambda: monai(
            "SegResNet",
            spatial_dims=2,
            init_filters=8,
            in_channels=1,
            out_channels=2,
            blocks_down=(1, 1),
            blocks_up=(1,),
            upsample_mode="deconv",
        ),
        (1, 1, 16, 16),
    ),
    "segresnet-3d": (
        lambda: monai(
            "SegResNet",
            spatial_dims=3,
            init_filters=8,
            in_channels=1,
            out_channels=1,
            blocks_down=(1, 1),
            blocks_up=(1,),
        ),
        (1, 1, 8, 8, 8),
    ),
}


def monai(name, **options):
    networks = pytest.importorskip("monai.networks.nets")
    return getattr(networks, name)(**options)


def network(name, dtype=torch.float64):
    """A network with norms that have seen data, and an input for it."""
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    net = make().to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, value in net.state_dict().items():
            if key.endswith("running_var"):
                value.uniform_(0.5, 1.5, generator=generator)
            elif key.endswith("running_mean"):
                value.normal_(0, 0.1, generator=generator)
            elif value.ndim > 2:  # large enough that an update of one layer is seen at the end
                value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return net.eval(), x


def output(net, x):
    """The output, or the first one of a network that gives several."""
    y = net(x)
    return y[0] if isinstance(y, (tuple, list)) else y


@pytest.mark.many
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_a_whole_network(method, name):
    net, x = network(name)
    base = copy.deepcopy(net)
    convs = all_modules_of(base)
    made = adapt(net, method, rank=2)
    assert list(adapted_layers(net)) == list(convs) and len(convs) >= 6
    assert made.parameters == sum(parameter_count(method, conv, 2) for conv in convs.values())
    assert made.parameters == sum(p.numel() for p in net.parameters() if p.requires_grad)
    with torch.no_grad():
        expected = output(base, x)
        assert same_tensor(output(net, x), expected), "the start is not the base"
    # one Adam step
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.01)
    net.train()
    before = bits(net)
    (output(net, x) - 1).square().mean().backward()
    optimizer.step()
    changed = {key for key, value in bits(net).items() if not same_tensor(value, before[key])}
    assert changed and all(".adapter." in key for key in changed), "something else than adapters was trained"
    zero = "a" if method.startswith("cp") else "B"
    moved = [f"{layer}.adapter.{zero}" in changed for layer in convs]
    assert sum(moved) >= 0.8 * len(convs), "the step reached few layers"
    net.eval()
    randomize(net, 3, 0.3)
    with torch.no_grad():
        y = output(net, x)
        assert worst(y, expected) > 1e-3
        plain = copy.deepcopy(base)  # the same by plain convolutions
        for layer, module in adapted_layers(net).items():
            plain.get_submodule(layer).weight.copy_(effective_weight(module))
        size = y.abs().max().clamp(min=1)
        assert worst(output(plain, x), y) <= 1e-12 * size
        merge(net)
        assert same_tensor(output(net, x), y)
        shipped = merged_copy(net)
        unmerge(net)
        assert same_tensor(output(net, x), y) and same_bits(base_part(net), bits(base))
        assert worst(output(shipped, x), y) <= 1e-12 * size
        assert {n: type(m) for n, m in shipped.named_modules()} == {n: type(m) for n, m in base.named_modules()}
        with disabled(net):
            assert same_tensor(output(net, x), expected)
        remove(net)
        assert same_bits(bits(net), bits(base)) and kinds(net) == kinds(base) and same_tensor(output(net, x), expected)


@pytest.mark.many
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["multi-view", "unet", "monai-unet-3d", "dynunet-2d", "segresnet-2d"])
def test_low_precision_starts_at_the_base_and_comes_back(name, dtype):
    for method in METHODS:
        net, x = network(name, dtype)
        base = copy.deepcopy(net)
        adapt(net, method, rank=2)
        with torch.no_grad():
            assert same_tensor(output(net, x), output(base, x))
            randomize(net, 1, 0.1)
            y = output(net, x)
            merge(net)
            assert same_tensor(output(net, x), y)
            unmerge(net)
            remove(net)
            assert same_bits(bits(net), bits(base))


# ----- the paper's counts


@pytest.mark.parametrize("method, count", [("cp-lora", 4920), ("convlora", 27144), ("lora-c", 39432)])
def test_counts_of_the_decoding_region_at_rank_8(method, count):
    net = MultiViewUnet(levels=2)
    made = adapt(net, method, rank=8, where="decoding")
    assert made.parameters == count == sum(p.numel() for p in net.parameters() if p.requires_grad)
    remove(net)
    channels = sum(layer.out_channels for layer in adapted_layers_of(net, "decoding").values())
    dora = {"cp-lora": "cp-dora", "convlora": "convdora", "lora-c": "dora-c"}[method]
    assert adapt(net, dora, rank=8, where="decoding").parameters == count + channels


def adapted_layers_of(net, region):
    """Convolutions inside a region's modules, found without the package."""
    roots = tuple(f"{name}." for name in net.regions[region])
    return {name: m for name, m in net.named_modules() if isinstance(m, CONVS) and f"{name}.".startswith(roots)}


def test_lora_c_with_the_plain_rank():
    net = MultiViewUnet(levels=2)
    assert adapt(net, "lora-c", rank=8, where="decoding", rank_setting="r").parameters == 13320
    assert str(13320) in repr(summary(net)).replace(",", "")


@pytest.mark.many
@pytest.mark.parametrize("kind", ["multi-view", "unet"])
@pytest.mark.parametrize("region", ["shallow", "deep", "encoding", "decoding", "all"])
def test_every_region_by_every_method(kind, region):
    net, x = network(kind, torch.float32)
    base, expected = copy.deepcopy(net), out(net, x)
    convs = adapted_layers_of(base, region)
    assert convs
    for method in METHODS:
        for rank in (1, 8):
            made = adapt(net, method, rank=rank, where=region)
            assert list(adapted_layers(net)) == list(convs)
            assert made.parameters == sum(parameter_count(method, conv, rank) for conv in convs.values())
            assert same_tensor(out(net, x), expected)
            remove(net)
    assert same_bits(bits(net), bits(base)) and kinds(net) == kinds(base)


def test_training_a_region_learns_the_target():
    """The loss falls, more with a higher rank on the whole than with none; nothing outside the region moves."""
    torch.manual_seed(0)
    net, x = network("multi-view", torch.float32)
    base, target = copy.deepcopy(net), (torch.rand(2, 1, 16, 16) > 0.5).float()
    for method in METHODS:
        torch.manual_seed(1)
        adapt(net, method, rank=4, where="decoding")
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.01)
        losses = []
        for _ in range(12):
            optimizer.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(net.train()(x), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0], (method, losses)
        assert same_bits(base_part(net), bits(base))
        remove(net)
        net.eval()
    assert same_bits(bits(net), bits(base))


def test_a_file_of_a_whole_network(tmp_path):
    for name in ("multi-view", "dynunet-2d"):
        net, x = network(name)
        base = copy.deepcopy(net)
        adapt(net, "convdora", rank=2, batchnorm="adapt")
        randomize(net, 1, 0.2)
        with torch.no_grad():
            output(net.train(), x)
            y = output(net.eval(), x)
            path = save_adapter(net, tmp_path / f"{name}.safetensors")
            load_adapter(base, path)
            assert same_tensor(output(base, x), y)
    other, _ = network("unet")
    with pytest.raises(ValueError, match="dynunet"):
        load_adapter(other, tmp_path / "dynunet-2d.safetensors")
    assert adapters(other) == []


def test_switching_copies_nothing():
    net = MultiViewUnet(levels=2)
    for index, name in enumerate(("a", "b")):
        adapt(net, METHODS[index], rank=8, name=name)
    places = {n: p.data_ptr() for n, p in net.named_parameters() if ".adapter." not in n}
    for name in "abab":
        activate(net, name)
    assert {n: p.data_ptr() for n, p in net.named_parameters() if ".adapter." not in n} == places
    deactivate(net)


def test_merged_inference_runs_the_plain_convolutions():
    """Not a clock but a count: the operations of the merged network are those of the plain one."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    net, x = network("multi-view", torch.float32)
    found = []
    for act in (lambda: None, lambda: adapt(net, "cp-dora", rank=4), lambda: merge(net), lambda: remove(net)):
        act()
        calls = []
        with torch.no_grad(), Count():
            net(x)
        found.append(sorted(calls))
    assert found[0] == found[2] == found[3] and len(found[1]) > len(found[0])


# ----- importing

HEAVY = ("monai", "nibabel", "matplotlib", "tensorly", "peft", "scipy", "pandas", "sklearn", "lycoris", "torchvision")


def loaded(command, code):
    """Heavy packages that a new process holds after it has run `code`."""
    tell = f"import sys; print(sorted({{m.split('.')[0] for m in sys.modules}} & set({HEAVY})))"
    done = command(sys.executable, "-c", f"{code}\n{tell}")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.long
def test_importing_and_using_it_loads_torch_alone(command):
    start = loaded(command, "import torch")
    assert loaded(command, "from sahlora.adapters import adapt") == start
    use = """
from sahlora.adapters import *
import torch
net = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3))
adapt(net, "cp-dora", rank=1)
net(torch.ones(1, 1, 4, 4)).sum().backward()
merge(net)
unmerge(net)
remove(net)
"""
    assert loaded(command, use) == start
    assert "monai" in loaded(command, "import monai")  # the check itself sees what is there


# ----- methods of one's own

@pytest.mark.long
def test_importing_the_package_runs_no_foreign_file(command, tmp_path, monkeypatch):
    """Whatever the environment says; no variable of it changes."""
    (tmp_path / "row.py").write_text("raise RuntimeError('this file was run')")
    monkeypatch.setenv("SAHLORA_METHODS", str(tmp_path / "row.py"))
    tell = "import os; before = dict(os.environ); from sahlora.adapters import METHODS; print(before == dict(os.environ), *METHODS)"
    done = command(sys.executable, "-c", tell)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "lora-c", "convlora", "cp-lora", "dora-c", "convdora", "cp-dora"]
