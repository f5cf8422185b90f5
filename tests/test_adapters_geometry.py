"""Six methods on every kind of convolution: the output is that of a plain convolution with the formula's weight."""

import copy
import math

import pytest
import torch
from adapters_reference import (
    DORA,
    METHODS,
    ZERO,
    factor_shapes,
    factors,
    parameter_count,
    plain_like,
    randomize,
    same_tensor,
    update,
    weight,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from sahlora.adapters import METHODS as KNOWN
from sahlora.adapters import adapt, adapted_layers, delta_weight, disabled, effective_weight, merge, remove, unmerge

TOL = 1e-12
pytestmark = [pytest.mark.many, pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")]

# name: (kind, arguments, spatial size of the input)
LAYERS = {
    "1d": (nn.Conv1d, {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "padding": 1}, (9,)),
    "1d-reflect-dilated": (
        nn.Conv1d,
        {
            "in_channels": 4,
            "out_channels": 6,
            "kernel_size": 5,
            "padding": 4,
            "dilation": 2,
            "padding_mode": "reflect",
            "groups": 2,
        },
        (13,),
    ),
    "2d": (nn.Conv2d, {"in_channels": 3, "out_channels": 5, "kernel_size": 3, "padding": 1}, (7, 8)),
    "2d-1x1": (nn.Conv2d, {"in_channels": 6, "out_channels": 2, "kernel_size": 1, "bias": False}, (4, 5)),
    "2d-stride": (
        nn.Conv2d,
        {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "stride": (2, 1), "padding": (0, 2)},
        (8, 7),
    ),
    "2d-uneven-kernel": (
        nn.Conv2d,
        {"in_channels": 2, "out_channels": 3, "kernel_size": (1, 4), "padding": (2, 1), "bias": False},
        (5, 6),
    ),
    "2d-tall-kernel": (
        nn.Conv2d,
        {"in_channels": 2, "out_channels": 3, "kernel_size": (5, 2), "stride": (1, 3)},
        (7, 8),
    ),
    "2d-same-dilated": (
        nn.Conv2d,
        {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": "same", "dilation": 4},
        (9, 8),
    ),
    "2d-same-even": (
        nn.Conv2d,
        {"in_channels": 2, "out_channels": 3, "kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)},
        (7, 7),
    ),
    "2d-same-reflect": (
        nn.Conv2d,
        {
            "in_channels": 3,
            "out_channels": 3,
            "kernel_size": 3,
            "padding": "same",
            "dilation": 2,
            "padding_mode": "reflect",
        },
        (8, 6),
    ),
    "2d-valid": (
        nn.Conv2d,
        {"in_channels": 3, "out_channels": 4, "kernel_size": 2, "padding": "valid", "stride": 2},
        (6, 6),
    ),
    "2d-replicate": (
        nn.Conv2d,
        {"in_channels": 2, "out_channels": 4, "kernel_size": 3, "padding": (2, 1), "padding_mode": "replicate"},
        (5, 5),
    ),
    "2d-circular": (
        nn.Conv2d,
        {
            "in_channels": 2,
            "out_channels": 4,
            "kernel_size": 3,
            "padding": 2,
            "padding_mode": "circular",
            "dilation": 2,
            "stride": 2,
        },
        (6, 7),
    ),
    "2d-groups": (
        nn.Conv2d,
        {"in_channels": 6, "out_channels": 9, "kernel_size": 3, "groups": 3, "padding": 1},
        (5, 6),
    ),
    "2d-depthwise": (
        nn.Conv2d,
        {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "groups": 4, "padding": 2, "dilation": 2},
        (6, 6),
    ),
    "2d-depthwise-multiplier": (
        nn.Conv2d,
        {"in_channels": 3, "out_channels": 6, "kernel_size": 3, "groups": 3, "bias": False},
        (5, 5),
    ),
    "2d-wide": (
        nn.Conv2d,
        {"in_channels": 64, "out_channels": 96, "kernel_size": 3, "padding": "same", "dilation": 2},
        (6, 5),
    ),
    "2d-wide-reflect": (
        nn.Conv2d,
        {
            "in_channels": 96,
            "out_channels": 64,
            "kernel_size": (5, 3),
            "padding": (2, 1),
            "stride": (2, 1),
            "padding_mode": "reflect",
        },
        (7, 6),
    ),
    "3d": (nn.Conv3d, {"in_channels": 2, "out_channels": 3, "kernel_size": 3, "padding": 1}, (4, 5, 6)),
    "3d-1x1x1": (nn.Conv3d, {"in_channels": 4, "out_channels": 2, "kernel_size": 1}, (3, 3, 3)),
    "3d-uneven": (
        nn.Conv3d,
        {
            "in_channels": 4,
            "out_channels": 2,
            "kernel_size": (1, 2, 3),
            "stride": (1, 2, 1),
            "padding": (0, 1, 2),
            "dilation": (1, 1, 2),
            "groups": 2,
        },
        (4, 5, 6),
    ),
    "3d-replicate": (
        nn.Conv3d,
        {"in_channels": 2, "out_channels": 2, "kernel_size": 3, "padding": 1, "padding_mode": "replicate"},
        (4, 4, 4),
    ),
    "up1d": (
        nn.ConvTranspose1d,
        {"in_channels": 4, "out_channels": 3, "kernel_size": 4, "stride": 2, "padding": 1},
        (6,),
    ),
    "up2d": (nn.ConvTranspose2d, {"in_channels": 3, "out_channels": 4, "kernel_size": 2, "stride": 2}, (4, 5)),
    "up2d-all": (
        nn.ConvTranspose2d,
        {
            "in_channels": 4,
            "out_channels": 6,
            "kernel_size": (3, 2),
            "stride": (3, 2),
            "padding": (1, 0),
            "output_padding": (2, 1),
            "groups": 2,
            "dilation": (2, 1),
            "bias": False,
        },
        (4, 5),
    ),
    "up2d-depthwise": (
        nn.ConvTranspose2d,
        {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "groups": 4, "stride": 2},
        (4, 4),
    ),
    "up3d": (
        nn.ConvTranspose3d,
        {
            "in_channels": 4,
            "out_channels": 2,
            "kernel_size": (3, 2, 1),
            "stride": (2, 2, 1),
            "padding": (1, 0, 0),
            "output_padding": (1, 0, 0),
            "groups": 2,
        },
        (3, 4, 3),
    ),
    "up1d-groups": (
        nn.ConvTranspose1d,
        {"in_channels": 6, "out_channels": 9, "kernel_size": 3, "groups": 3, "dilation": 2},
        (5,),
    ),
}


def make(kind, arguments, dtype=torch.float64, seed=1):
    """A convolution and an adapter-free twin."""
    torch.manual_seed(seed)
    return kind(**arguments).to(dtype)


def example(conv, size, dtype=torch.float64, batch=2, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, conv.in_channels, *size, generator=generator, dtype=torch.float64).to(dtype)


def adapted(conv, method, rank=3, **options):
    """The convolution inside a network, adapted; the only layer."""
    net = nn.Sequential(conv)
    adapt(net, method, rank=rank, **options)
    (layer,) = adapted_layers(net).values()
    return net, layer


def worst(one, other):
    assert one.shape == other.shape and one.dtype == other.dtype
    return (one - other).abs().max().item() / max(1.0, other.abs().max().item())


def check_layer(conv, x, method, rank, scale=1.0, least=1e-3, **options):
    """Weight, update, output and every gradient against the formula; the output moves by `least` or more."""
    base = copy.deepcopy(conv)
    net, layer = adapted(conv, method, rank, **options)
    assert layer is net[0]
    assert {key: tuple(p.shape) for key, p in factors(layer).items()} == factor_shapes(
        method, base, rank, options.get("rank_setting", "rk"), options.get("unfolding", "view")
    )
    assert same_tensor(net(x), base(x)), "the start is not the base"
    randomize(net, 3)

    f = {key: p.detach().clone().requires_grad_() for key, p in factors(layer).items()}
    W = base.weight.detach()
    kept = {key: options[key] for key in ("unfolding", "detach_norm") if key in options}
    expected = weight(method, W, f, base, scale, **kept)
    assert worst(effective_weight(layer), expected) <= TOL
    plain_update = weight(
        method.replace("dora-c", "lora-c").replace("dora", "lora"),
        W * 0,
        f,
        base,
        scale,
        options.get("unfolding", "view"),
    )
    assert delta_weight(layer).shape == base.weight.shape
    assert worst(delta_weight(layer), plain_update) <= TOL

    plain = plain_like(base)
    del plain.weight
    plain.weight = expected
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, reference = net(ours), plain(theirs)
    assert worst(y, reference) <= TOL
    assert (y - base(x)).abs().max() >= least, "the adapter changes nothing: the comparison would be empty"
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=y.dtype)
    y.backward(g)
    reference.backward(g)
    assert worst(ours.grad, theirs.grad) <= TOL
    for key, parameter in factors(layer).items():
        assert f[key].grad.abs().max() >= least, key
        assert worst(parameter.grad, f[key].grad) <= TOL, key
    assert layer.weight.grad is None and not layer.weight.requires_grad
    return net, base


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("method", METHODS)
def test_output_and_gradients_are_those_of_a_plain_convolution(layer, method):
    kind, arguments, size = LAYERS[layer]
    conv = make(kind, arguments)
    x = example(conv, size)
    net, base = check_layer(conv, x, method, rank=3)
    with torch.no_grad():
        before = net(x)
        with disabled(net):
            assert same_tensor(net(x), base(x))
        merge(net)
        assert worst(net(x), before) <= TOL
        unmerge(net)
        assert same_tensor(net(x), before)
        remove(net)
        assert type(net[0]) is kind and same_tensor(net(x), base(x))


@pytest.mark.parametrize("execution", ["chain", "auto"])
@pytest.mark.parametrize("method", METHODS)
def test_other_executions_compute_the_same(method, execution):
    """A chain of small convolutions beside the frozen one, where there is one: values, gradients, merged weights."""
    if execution == "chain" and method not in ("convlora", "cp-lora"):
        with pytest.raises(ValueError, match=f"(?s){method}.*execution"):
            adapted(make(*LAYERS["2d"][:2]), method, execution=execution)
        return
    for kind, arguments, size in LAYERS.values():
        conv = make(kind, arguments)
        x = example(conv, size)
        net, base = check_layer(conv, x, method, rank=3, alpha=5, scale=5 / 3, execution=execution)
        with torch.no_grad():
            y = net(x)
            merge(net)
            assert worst(net(x), y) <= TOL
            unmerge(net)
            assert same_tensor(net(x), y)
            with disabled(net):
                assert same_tensor(net(x), base(x))
        assert worst(net(x[0]), y[0]) <= TOL
        net.to(memory_format=torch.channels_last) if x.ndim == 4 else None
        assert worst(net(x), y) <= TOL
        net.float()
        assert worst(net(x.float()).double(), y) <= 1e-5


def test_the_methods_are_the_six_of_the_paper():
    assert list(KNOWN) == list(METHODS)


@pytest.mark.parametrize("unfolding", ["view", "oh-iw", "o-ihw"])
@pytest.mark.parametrize("rank_setting", ["rk", "r"])
@pytest.mark.parametrize("method", ["lora-c", "dora-c"])
@pytest.mark.parametrize(
    "layer", ["1d", "2d-tall-kernel", "2d-uneven-kernel", "2d-groups", "3d-uneven", "up2d-all", "up3d"]
)
def test_rank_settings_and_unfoldings(layer, method, rank_setting, unfolding):
    kind, arguments, size = LAYERS[layer]
    conv = make(kind, arguments)
    check_layer(conv, example(conv, size), method, 2, rank_setting=rank_setting, unfolding=unfolding)


def test_the_three_unfoldings_are_three_different_updates():
    """With the same B and A, "view" and "oh-iw" lay the product out differently; only a 1-D kernel makes them agree."""
    conv = make(nn.Conv2d, {"in_channels": 3, "out_channels": 4, "kernel_size": 3})
    updates = {}
    for unfolding in ("view", "oh-iw"):
        net, layer = adapted(copy.deepcopy(conv), "lora-c", 2, unfolding=unfolding)
        randomize(net, 5)
        updates[unfolding] = delta_weight(layer)
        if unfolding == "oh-iw":  # the semantic one has the factors' rank in its own unfolding
            matrix = updates[unfolding].permute(0, 2, 1, 3).reshape(4 * 3, 3 * 3)
            assert torch.linalg.matrix_rank(matrix) == 6
    assert worst(updates["view"], updates["oh-iw"]) > 0.1


@pytest.mark.parametrize("layer", ["1d", "2d", "2d-groups", "2d-same-dilated", "3d-uneven", "up2d-all"])
@pytest.mark.parametrize("method", sorted(DORA))
def test_dora_with_the_norm_in_the_gradient(layer, method):
    kind, arguments, size = LAYERS[layer]
    conv = make(kind, arguments)
    check_layer(conv, example(conv, size), method, 2, detach_norm=False)


@pytest.mark.parametrize("method", ["dora-c", "cp-dora"])
def test_detaching_the_norm_changes_gradients_and_no_value(method):
    conv = make(*LAYERS["2d"][:2])
    x, found = example(conv, LAYERS["2d"][2]), {}
    for detach in (True, False):
        net, layer = adapted(copy.deepcopy(conv), method, 2, detach_norm=detach)
        randomize(net, 1)
        net(x).square().sum().backward()
        found[detach] = (net(x).detach(), layer.adapter.get_parameter(ZERO[method]).grad, layer.adapter.m.grad)
    assert same_tensor(found[True][0], found[False][0])
    assert worst(found[True][1], found[False][1]) > 1e-3
    assert worst(found[True][2], found[False][2]) <= TOL


@pytest.mark.parametrize("scaling, scale", [("lora", 6 / 4), ("rslora", 6 / 2)])
@pytest.mark.parametrize("method", METHODS)
def test_alpha_and_its_two_scalings(method, scaling, scale):
    conv = make(*LAYERS["2d"][:2])
    check_layer(conv, example(conv, LAYERS["2d"][2]), method, 4, scale, alpha=6, scaling=scaling)


@pytest.mark.parametrize("scaling, scale", [("lora", 1.0), ("rslora", 2.0)])
def test_alpha_is_the_rank_by_default(scaling, scale):
    conv = make(*LAYERS["2d"][:2])
    check_layer(conv, example(conv, LAYERS["2d"][2]), "convlora", 4, scale, scaling=scaling)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_every_dtype_starts_at_the_base_and_follows_the_formula(method, dtype):
    """To the bit at the start; within the dtype's rounding afterwards, measured against the formula in float64."""
    eps = torch.finfo(dtype).eps
    for name, (kind, arguments, size) in LAYERS.items():
        conv = make(kind, arguments, dtype)
        base, x = copy.deepcopy(conv), example(conv, size, dtype)
        net, layer = adapted(conv, method, 2)
        with torch.no_grad():
            assert all(p.dtype == dtype for p in layer.adapter.parameters()), name
            assert same_tensor(effective_weight(layer), base.weight), name
            assert not delta_weight(layer).any(), name
            assert same_tensor(net(x), base(x)), name
            randomize(net, 3)
            f = {key: p.double() for key, p in factors(layer).items()}
            expected = weight(method, base.weight.double(), f, base)
            got = effective_weight(layer)
            assert got.dtype == dtype, name
            assert (got.double() - expected).abs().max() <= 12 * eps * expected.abs().max(), name
            plain = plain_like(base)
            plain.weight.data = got.clone()
            y = plain(x)
            assert (net(x).double() - y.double()).abs().max() <= 8 * eps * y.double().abs().max(), name
            before = net(x)
            merge(net)
            assert (net(x).double() - before.double()).abs().max() <= 8 * eps * y.double().abs().max(), name
            unmerge(net)
            assert same_tensor(layer.weight, base.weight) and same_tensor(net(x), before), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "kind, size, memory_format",
    [
        (nn.Conv2d, (6, 5), torch.channels_last),
        (nn.ConvTranspose2d, (6, 5), torch.channels_last),
        (nn.Conv3d, (4, 5, 3), torch.channels_last_3d),
        (nn.ConvTranspose3d, (4, 5, 3), torch.channels_last_3d),
    ],
)
def test_channels_last(kind, size, memory_format, method):
    for dtype, tolerance in ((torch.float64, TOL), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        conv = make(kind, {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1, "groups": 2}, dtype)
        conv = conv.to(memory_format=memory_format)
        base, x = copy.deepcopy(conv), example(conv, size, dtype).contiguous(memory_format=memory_format)
        net, layer = adapted(conv, method, 2)
        assert same_tensor(net(x), base(x)) and net(x).stride() == base(x).stride()
        randomize(net, 3)
        net.to(memory_format=memory_format)
        plain = plain_like(base)
        plain.weight.data = effective_weight(layer).detach().contiguous(memory_format=memory_format)
        y, expected = net(x), plain(x)
        assert worst(y.double(), expected.double()) <= tolerance and y.stride() == expected.stride()
        # the same in the usual layout: values and gradients do not depend on the layout
        usual = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
        z = usual(x.contiguous())
        assert worst(y.double(), z.double()) <= tolerance
        y.square().sum().backward()
        z.square().sum().backward()
        for key, p in factors(layer).items():
            assert worst(p.grad.double(), factors(usual[0])[key].grad.double()) <= 4 * tolerance, (dtype, key)
        merge(net)
        assert worst(net(x).double(), y.detach().double()) <= tolerance and net(x).stride() == y.stride()
        unmerge(net)
        assert same_tensor(net(x), y.detach()) and same_tensor(layer.weight, base.weight)
        assert layer.weight.stride() == base.weight.stride()


@pytest.mark.parametrize("method", METHODS)
def test_the_base_moved_to_another_layout_after_it_was_adapted(method):
    conv = make(*LAYERS["2d"][:2])
    net, layer = adapted(conv, method, 2)
    randomize(net, 3)
    x = example(conv, LAYERS["2d"][2])
    expected = net(x)
    net.to(memory_format=torch.channels_last)
    assert worst(net(x.contiguous(memory_format=torch.channels_last)), expected) <= TOL
    net.float()
    assert net(x.float()).dtype == torch.float32 and (net(x.float()) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_a_transposed_convolution_takes_an_output_size(method):
    conv = make(nn.ConvTranspose2d, {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "stride": 2, "padding": 1})
    base, x = copy.deepcopy(conv), example(conv, (4, 4))
    _, layer = adapted(conv, method, 2)
    assert same_tensor(layer(x, output_size=(8, 7)), base(x, output_size=(8, 7)))
    assert same_tensor(layer(x, [7, 8]), base(x, [7, 8]))
    randomize(nn.Sequential(layer), 1)
    plain = plain_like(base)
    plain.weight.data = effective_weight(layer).detach()
    assert worst(layer(x, output_size=[8, 8]), plain(x, output_size=[8, 8])) <= TOL
    with pytest.raises(ValueError, match="output"):
        layer(x, output_size=[90, 90])


@pytest.mark.parametrize("method", METHODS)
def test_one_image_without_a_batch_axis(method):
    for name in ("1d", "2d-same-reflect", "3d", "up2d"):
        kind, arguments, size = LAYERS[name]
        conv = make(kind, arguments)
        net, _ = adapted(conv, method, 2)
        randomize(net, 1)
        x = example(conv, size, batch=1)
        assert worst(net(x[0]), net(x)[0]) <= TOL


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_batch_stays_empty(method):
    conv = make(*LAYERS["2d"][:2])
    net, _ = adapted(conv, method, 2)
    randomize(net, 1)
    assert net(torch.zeros(0, 3, 7, 8, dtype=torch.float64)).shape == (0, 5, 7, 8)


@pytest.mark.parametrize("method", METHODS)
def test_the_network_may_be_the_convolution_itself(method):
    conv = make(*LAYERS["2d"][:2])
    base, x = copy.deepcopy(conv), example(conv, LAYERS["2d"][2])
    adapt(conv, method, rank=2)
    (layer,) = adapted_layers(conv).values()
    assert layer is conv and isinstance(conv, nn.Conv2d) and same_tensor(conv(x), base(x))
    randomize(conv, 1)
    plain = plain_like(base)
    plain.weight.data = effective_weight(conv).detach()
    assert worst(conv(x), plain(x)) <= TOL
    remove(conv)
    assert (
        type(conv) is nn.Conv2d and same_tensor(conv(x), base(x)) and list(conv.state_dict()) == list(base.state_dict())
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer", ["2d", "2d-uneven-kernel", "1d-reflect-dilated", "3d-uneven", "up2d-all"])
def test_parameter_counts_are_the_papers_formulas(layer, method):
    kind, arguments, _ = LAYERS[layer]
    for rank in (1, 4):
        for setting in ("rk", "r") if method in ("lora-c", "dora-c") else ("rk",):
            conv = make(kind, arguments)
            options = {"rank_setting": setting} if method in ("lora-c", "dora-c") else {}
            net = nn.Sequential(conv)
            made = adapt(net, method, rank=rank, **options)
            count = sum(p.numel() for p in net.parameters() if p.requires_grad)
            assert count == made.parameters == parameter_count(method, conv, rank, setting)


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_past_full_rank_is_allowed_and_said(method):
    conv = make(*LAYERS["2d"][:2])
    x = example(conv, LAYERS["2d"][2])
    net, _ = check_layer(conv, x, method, 40)
    text = repr(adapt(nn.Sequential(make(*LAYERS["2d"][:2])), method, rank=40))
    quiet = repr(adapt(nn.Sequential(make(*LAYERS["2d"][:2])), method, rank=1))
    assert "full rank" in text and "full rank" not in quiet


@pytest.mark.parametrize("method", sorted(DORA))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_filters_of_zero_norm_stay_finite(method, dtype):
    """One filter is zero, as pruning leaves it: same start, and a step later everything is still finite."""
    for name in ("2d", "up2d-all", "2d-depthwise"):
        kind, arguments, size = LAYERS[name]
        conv = make(kind, arguments, dtype)
        with torch.no_grad():
            conv.weight.zero_() if name == "2d-depthwise" else conv.weight.select(1 if "up" in name else 0, 0).zero_()
        base, x = copy.deepcopy(conv), example(conv, size, dtype)
        for detach in (True, False):
            net, layer = adapted(copy.deepcopy(conv), method, 2, detach_norm=detach)
            assert same_tensor(net(x), base(x))
            optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-2)
            for _ in range(2):
                optimizer.zero_grad()
                net(x).square().mean().backward()
                assert all(torch.isfinite(p.grad).all() for p in layer.adapter.parameters())
                optimizer.step()
            assert torch.isfinite(net(x)).all() and torch.isfinite(effective_weight(layer)).all()


@pytest.mark.parametrize("method", METHODS)
def test_gradients_at_the_start(method):
    """Only the zero factor (and DoRA's magnitude) has a gradient at the start, and the next step reaches the rest."""
    conv = make(*LAYERS["2d"][:2])
    net, layer = adapted(conv, method, 2)
    net(example(conv, LAYERS["2d"][2])).square().sum().backward()
    for key, p in factors(layer).items():
        assert bool(p.grad.any()) == (key in (ZERO[method], "m")), key
    assert not factors(layer)[ZERO[method]].any()
    assert all(p.any() for key, p in factors(layer).items() if key != ZERO[method])


@pytest.mark.parametrize("method", METHODS)
def test_autocast_runs_the_adapted_weight_in_bf16(method):
    conv = make(*LAYERS["2d"][:2], dtype=torch.float32)
    base, x = copy.deepcopy(conv), example(conv, LAYERS["2d"][2], torch.float32)
    net, layer = adapted(conv, method, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_tensor(net(x), base(x)) and net(x).dtype == torch.bfloat16
    randomize(net, 1)
    plain = plain_like(base)
    plain.weight.data = effective_weight(layer).detach()
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
        assert worst(y.float(), plain(x).float()) <= 2**-6
        exact = effective_weight(layer)
    assert same_tensor(exact, effective_weight(layer)), "autocast rounded the factors' product before it was added"
    with torch.autocast("cpu", torch.bfloat16):
        merge_input = net(x).float()
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.adapter.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        merge(net)
        assert worst(net(x).float(), merge_input.detach()) <= 2**-6


@pytest.mark.parametrize(
    "method, execution", [*((m, "weight") for m in METHODS), ("convlora", "chain"), ("cp-lora", "chain")]
)
def test_dropout_drops_whole_components_in_training_only(method, execution):
    """The factors' components are dropped (p) and the rest is scaled by 1/(1-p); in eval mode nothing is."""
    conv = make(*LAYERS["2d"][:2])
    base, x = copy.deepcopy(conv), example(conv, LAYERS["2d"][2])
    options = {"rank_setting": "r"} if method in ("lora-c", "dora-c") else {}
    net, layer = adapted(conv, method, 4, dropout=0.25, execution=execution, **options)
    assert same_tensor(net.train()(x), base(x))
    randomize(net, 1)
    f, zero, plain = factors(layer), ZERO[method], plain_like(base)

    def expected(kept):
        mask = torch.tensor([kept >> p & 1 for p in range(4)], dtype=torch.float64) / 0.75
        plain.weight.data = weight(method, base.weight, {**f, zero: f[zero] * mask}, base).detach()
        return plain(x)

    subsets, seen = [expected(kept) for kept in range(16)], []
    for seed in range(40):
        torch.manual_seed(seed)
        y = net(x).detach()
        found = [kept for kept, subset in enumerate(subsets) if worst(y, subset) <= TOL]
        assert len(found) == 1, "the update is no subset of its components"
        seen += found
    assert len(set(seen)) > 4 and 0.6 < sum(kept.bit_count() for kept in seen) / 160 < 0.9
    plain.weight.data = weight(method, base.weight, f, base).detach()
    merge(net)  # in training mode: a merged weight has every component
    assert worst(net.eval()(x), plain(x)) <= TOL
    unmerge(net)
    assert worst(net(x), plain(x)) <= TOL and same_tensor(net(x), net(x))


def test_dropout_keeps_the_mean_update():
    conv = make(*LAYERS["2d"][:2])
    net, layer = adapted(conv, "convlora", 4, dropout=0.25)
    randomize(net, 1)
    net.train()
    x = example(conv, LAYERS["2d"][2])
    torch.manual_seed(0)
    mean = torch.stack([net(x).detach() for _ in range(3000)]).mean(0)
    assert worst(mean, net.eval()(x).detach()) < 0.05


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck_through_the_adapted_layer(method):
    """Numerical derivatives of the output with respect to the input and every factor."""
    for name in ("1d", "2d-same-dilated", "2d-groups", "up2d"):
        kind, arguments, _ = LAYERS[name]
        conv = make(kind, arguments)
        options = {"detach_norm": False} if method in DORA else {}
        net, layer = adapted(conv, method, 1, **options)
        randomize(net, 1)
        size = (4,) if name == "1d" else (3, 3)
        x = example(conv, size, batch=1).requires_grad_()
        names = list(factors(layer))
        start = tuple(p.detach().clone().requires_grad_() for p in factors(layer).values())

        def run(x, *values, names=names, net=net):
            given_ = {f"0.adapter.{key}": value for key, value in zip(names, values, strict=True)}
            return torch.func.functional_call(net, given_, (x,))

        assert torch.autograd.gradcheck(run, (x, *start), fast_mode=True), name


@st.composite
def geometries(draw):
    """A convolution of any kind with arguments that torch accepts, and the size of an input it accepts."""
    n = draw(st.integers(1, 3))
    up = draw(st.booleans())
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inputs, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))

    def per_axis(low, high):
        if draw(st.booleans()):
            return draw(st.integers(low, high))
        return tuple(draw(st.integers(low, high)) for _ in range(n))

    def axes(value):
        return (value,) * n if isinstance(value, int) else value

    kernel, dilation, stride = per_axis(1, 4 if n < 3 else 3), per_axis(1, 3), per_axis(1, 3)
    arguments = {
        "in_channels": inputs,
        "out_channels": outputs,
        "kernel_size": kernel,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    reach = [d * (k - 1) for k, d in zip(axes(kernel), axes(dilation), strict=True)]
    if up:
        arguments |= {"stride": stride, "padding": per_axis(0, 1)}
        room = [max(s, d) - 1 for s, d in zip(axes(stride), axes(dilation), strict=True)]
        arguments["output_padding"] = tuple(draw(st.integers(0, top)) for top in room)
        size = tuple(draw(st.integers(3, 4)) for _ in range(n))
        out = [
            (i - 1) * s - 2 * p + r + o + 1
            for i, s, p, r, o in zip(
                size, axes(stride), axes(arguments["padding"]), reach, arguments["output_padding"], strict=True
            )
        ]
        assume(min(out) > 0)
    else:
        mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        padding = draw(st.sampled_from(["same", "valid", None]))
        if padding == "same":
            arguments |= {"padding": "same", "padding_mode": mode}
            pad = reach
        elif padding == "valid":
            arguments |= {"padding": "valid", "stride": stride, "padding_mode": mode}
            pad = [0] * n
        else:
            arguments |= {"padding": per_axis(0, 3), "stride": stride, "padding_mode": mode}
            pad = list(axes(arguments["padding"]))
        # room for the kernel, and for a reflection that is smaller than the image
        size = tuple(max(r, p) + draw(st.integers(1, 3)) for r, p in zip(reach, pad, strict=True))
    kind = {
        False: (nn.Conv1d, nn.Conv2d, nn.Conv3d),
        True: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    }[up][n - 1]
    return kind, arguments, size


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(
    geometry=geometries(),
    method=st.sampled_from(METHODS),
    rank=st.integers(1, 6),
    scaling=st.sampled_from(["lora", "rslora"]),
    alpha=st.sampled_from([None, 1, 2.5, 16]),
    unfolding=st.sampled_from(["view", "oh-iw", "o-ihw"]),
    setting=st.sampled_from(["rk", "r"]),
    detach=st.booleans(),
    seed=st.integers(0, 9),
    execution=st.sampled_from(["weight", "weight", "chain", "auto"]),
)
def test_any_geometry(geometry, method, rank, scaling, alpha, unfolding, setting, detach, seed, execution):
    kind, arguments, size = geometry
    conv = make(kind, arguments, seed=seed)
    scale = (rank if alpha is None else alpha) / (rank if scaling == "lora" else math.sqrt(rank))
    options = {"scaling": scaling, "execution": execution} | ({} if alpha is None else {"alpha": alpha})
    if execution == "chain" and method not in ("convlora", "cp-lora"):
        options["execution"] = "auto"
    if method in ("lora-c", "dora-c"):
        options |= {"rank_setting": setting, "unfolding": unfolding}
    if method in DORA:
        options |= {"detach_norm": detach}
    check_layer(conv, example(conv, size), method, rank, scale, least=0, **options)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(geometry=geometries(), method=st.sampled_from(METHODS), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_geometry_starts_at_the_base_in_low_precision(geometry, method, dtype):
    kind, arguments, size = geometry
    conv = make(kind, arguments, dtype)
    base, x = copy.deepcopy(conv), example(conv, size, dtype)
    net, layer = adapted(conv, method, 2)
    assert same_tensor(net(x), base(x))
    randomize(net, 2)
    for _ in range(3):
        merge(net)
        unmerge(net)
    assert same_tensor(layer.weight, base.weight)
    with disabled(net):
        assert same_tensor(net(x), base(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu(method):
    for name, (kind, arguments, size) in LAYERS.items():
        conv = make(kind, arguments).cuda()
        base, x = copy.deepcopy(conv), example(conv, size).cuda()
        net, layer = adapted(conv, method, 2)
        assert all(p.is_cuda for p in layer.adapter.parameters()), name
        with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
            assert same_tensor(net(x), base(x)), name
            randomize(net.cpu(), 3)
            expected = net(x.cpu())
            net.cuda()
            assert worst(net(x).cpu(), expected) <= TOL, name
            merge(net)
            assert worst(net(x).cpu(), expected) <= TOL, name
            unmerge(net)
            assert same_tensor(layer.weight, base.weight), name


def test_the_reference_itself():
    """The formulas above on numbers done by hand, so that both sides can not be wrong together."""
    conv = nn.Conv2d(1, 2, (1, 2))
    a, b = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0]])
    c, d = torch.tensor([[5.0]]), torch.tensor([[1.0], [7.0]])
    assert update("cp-lora", {"a": a, "b": b, "c": c, "d": d}, conv).flatten().tolist() == [15, 105, 30, 210]
    A, B = torch.tensor([[[[2.0, 3.0]]]]), torch.tensor([[1.0], [10.0]])
    assert update("convlora", {"A": A, "B": B}, conv).flatten().tolist() == [2, 3, 20, 30]
    square = nn.Conv2d(1, 1, 2)
    B, A = torch.tensor([[1.0], [10.0]]), torch.tensor([[2.0, 3.0]])
    assert update("lora-c", {"A": A, "B": B}, square).flatten().tolist() == [2, 3, 20, 30]
    wide = nn.Conv2d(2, 1, 2)
    A = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert update("lora-c", {"A": A, "B": B}, wide).flatten().tolist() == [1, 2, 3, 4, 10, 20, 30, 40]
    assert update("lora-c", {"A": A, "B": B}, wide, "oh-iw").flatten().tolist() == [1, 2, 10, 20, 3, 4, 30, 40]
    W = torch.tensor([[[[3.0, 4.0]]], [[[0.0, 2.0]]]])
    f = {"A": torch.zeros(1, 1, 1, 2), "B": torch.zeros(2, 1), "m": torch.tensor([10.0, 1.0])}
    assert weight("convdora", W, f, conv).flatten().tolist() == [6, 8, 0, 1]


@pytest.mark.parametrize("method", METHODS)
def test_looking_at_a_layer_in_training_or_under_autocast_shows_all_of_it(method):
    """No component dropped, and in the dtype in which the layer computes."""
    conv = make(*LAYERS["2d"][:2], dtype=torch.float32)
    net, layer = adapted(conv, method, 4, dropout=0.5)
    randomize(net, 1)
    net.eval()
    looks = [look(layer).detach().clone() for look in (delta_weight, effective_weight)]
    net.train()
    for _ in range(5):
        for look, expected in zip((delta_weight, effective_weight), looks, strict=True):
            assert same_tensor(look(layer).detach(), expected)
            with torch.autocast("cpu", torch.bfloat16):
                assert same_tensor(look(layer).detach(), expected)
    x = example(conv, LAYERS["2d"][2], torch.float32)
    assert not torch.equal(net(x), net(x)), "the layer itself drops components in training"
