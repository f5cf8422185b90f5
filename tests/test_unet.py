"""The networks against independent formulas, an independent forward pass, and every way they are called."""

import copy
import itertools
import json
import math
import pickle
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from torch.utils.flop_counter import FlopCounterMode

from sahlora import unet
from sahlora.report.pictures import activations, draw_network
from sahlora.unet import (
    M2,
    NETWORKS,
    MultiViewUnet,
    Unet,
    build_network,
    init_weights,
    region_modules,
    region_parameters,
    register,
)

REGIONS = {"shallow", "deep", "encoding", "decoding", "all"}
SMALL = {"multi-view": lambda: MultiViewUnet(2), "unet": lambda: Unet(levels=2, width=8)}


@pytest.fixture(params=SMALL)
def net(request):
    """A small network of either kind whose activations have a useful size: gain 0.02 alone would hide errors."""
    torch.manual_seed(7)
    return lively(SMALL[request.param]())


def lively(net):
    """Weights of He's size and BatchNorm statistics that are not 0 and 1."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in itertools.chain(net.named_parameters(), net.named_buffers()):
            if tensor.ndim == 4:
                fan_in = tensor[0].numel()
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * math.sqrt(2 / fan_in))
            elif name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif tensor.ndim == 1:
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return net


def count(module):
    return sum(p.numel() for p in module.parameters())


# Parameters, from formulas written without the module's code


def conv_bn(c_in, c_out):
    """3x3 weights, convolution bias, BatchNorm weight and bias."""
    return 9 * c_in * c_out + c_out + c_out + c_out


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("channels", [1, 2, 3, 7])
def test_multi_view_count(levels, channels):
    first = conv_bn(channels, 32) + conv_bn(32, 32)
    down = 5 * conv_bn(32, 32)
    bottom = 3 * conv_bn(32, 32)
    ups = conv_bn(64, 32) + (levels - 1) * conv_bn(96, 32) + levels * conv_bn(32, 32)
    last = conv_bn(96, 32) + conv_bn(32, 32) + 32 + 1
    assert count(MultiViewUnet(levels, channels)) == first + levels * down + bottom + ups + last


def test_paper_counts():
    net = MultiViewUnet(levels=2)
    assert count(net) == 232_737
    assert count(net.first) == 9_696
    assert [count(d) for d in net.downs] == [46_560, 46_560]
    assert count(net.bottom) == 27_936
    assert [count(u) for u in net.ups] == [27_840, 37_056]
    assert count(net.last) == 37_089
    expected = {"shallow": 46_785, "deep": 46_464, "encoding": 46_944, "decoding": 101_985, "all": 232_737}
    assert {r: region_parameters(net, r) for r in net.regions} == expected


def unet_parts(levels, channels, width):
    """Parameters of (downs, bottom, ups, output) of a plain Unet, block by block."""
    widths = [channels] + [width << i for i in range(levels + 1)]
    blocks = [conv_bn(a, b) + conv_bn(b, b) for a, b in zip(widths, widths[1:])]
    ups = [2 * c * c * 4 + c + conv_bn(2 * c, c) + conv_bn(c, c) for c in reversed(widths[1:-1])]
    return blocks[:-1], blocks[-1], ups, width + 1


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize(("channels", "width"), [(1, 8), (3, 8), (2, 5)])
def test_unet_count_and_regions(levels, channels, width):
    net = Unet(levels, channels, width)
    downs, bottom, ups, output = unet_parts(levels, channels, width)
    assert [count(d) for d in net.downs] == downs and [count(u) for u in net.ups] == ups
    assert count(net) == sum(downs) + bottom + sum(ups) + output
    assert {r: region_parameters(net, r) for r in net.regions} == {
        "encoding": sum(downs),
        "deep": bottom,
        "decoding": sum(ups) + output,
        "shallow": downs[0] + ups[-1] + output,
        "all": count(net),
    }


def test_paper_unet_is_31_04_million():
    downs, bottom, ups, output = unet_parts(4, 1, 64)
    net = Unet()
    assert count(net) == sum(downs) + bottom + sum(ups) + output == 31_042_369
    assert [d.unit2.conv.out_channels for d in net.downs] == [64, 128, 256, 512]
    assert net.bottom.unit2.conv.out_channels == 1024


# Regions


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [MultiViewUnet, lambda n: Unet(n, width=4)])
def test_regions_are_modules_and_fit_together(kind, levels):
    net = kind(levels)
    modules = dict(net.named_modules())
    assert set(net.regions) == REGIONS
    held = {}
    for region, names in net.regions.items():
        assert len(set(names)) == len(names) and all(modules[name] is net.get_submodule(name) for name in names)
        held[region] = [key for name in names for key in (f"{name}.{k}" for k, _ in modules[name].named_parameters())]
        assert len(set(held[region])) == len(held[region]), "modules of one region overlap"
        assert region_modules(net, region) == names
    assert set(held["all"]) == {key for key, _ in net.named_parameters()}
    assert not set(held["encoding"]) & set(held["decoding"])
    assert not set(held["shallow"]) & set(held["deep"])


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_multi_view_regions_leave_the_views_alone(levels):
    net = MultiViewUnet(levels)
    own = [name for region in REGIONS - {"all"} for name in net.regions[region]]
    assert not any(isinstance(m, M2) for name in own for m in net.get_submodule(name).modules())
    rest = set(net.regions["all"]) - set(net.regions["encoding"]) - set(net.regions["decoding"])
    assert rest == {name for name, m in net.named_modules() if isinstance(m, M2)} and len(rest) == levels + 1
    assert set(net.regions["deep"]) == {f"downs.{levels - 1}.m1", "ups.0.m1"}


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_unet_regions_partition(levels):
    net = Unet(levels, width=4)
    parts = [*net.regions["encoding"], *net.regions["deep"], *net.regions["decoding"]]
    assert sorted(parts) == sorted(net.regions["all"])
    assert set(net.regions["shallow"]) == {"downs.0", f"ups.{levels - 1}", "last"}


def test_region_counts_shared_weights_once():
    net = MultiViewUnet(1)
    net.last.unit2 = net.first.unit2
    assert region_parameters(net, "shallow") == count(net.first) + count(net.last) - count(net.first.unit2)


def test_unknown_region_lists_the_known(net):
    with pytest.raises(ValueError, match="'decoder'.*shallow, deep, encoding, decoding, all"):
        region_parameters(net, "decoder")
    with pytest.raises(ValueError, match="Conv2d does not name any"):
        region_parameters(torch.nn.Conv2d(1, 1, 1), "all")


def test_region_modules_is_a_copy(net):
    region_modules(net, "deep").clear()
    assert net.regions["deep"]


# The forward pass, written again from the paper's description on the state dict alone


def unit_f(x, w, key, d, training):
    x = F.conv2d(x, w[f"{key}.conv.weight"], w[f"{key}.conv.bias"], stride=1, padding=d, dilation=d)
    mean, var = w[f"{key}.norm.running_mean"].clone(), w[f"{key}.norm.running_var"].clone()
    x = F.batch_norm(x, mean, var, w[f"{key}.norm.weight"], w[f"{key}.norm.bias"], training, 0.1, 1e-5)
    return torch.clamp_min(x, 0)


def m1_f(x, w, key, training):
    return unit_f(unit_f(x, w, f"{key}.unit1", 1, training), w, f"{key}.unit2", 1, training)


def m2_f(x, w, key, training):
    y = x
    for d in (1, 2, 4):
        y = unit_f(y, w, f"{key}.view{d}", d, training)
    return torch.cat([x, y], 1)


def multi_view_f(x, w, levels, training=False):
    d, rights = m1_f(x, w, "first", training), []
    for i in range(levels):
        rights += [m2_f(d, w, f"downs.{i}.m2", training)]
        d = F.max_pool2d(m1_f(d, w, f"downs.{i}.m1", training), 2, 2)
    u = m2_f(d, w, "bottom", training)
    for j in range(levels):
        u = m1_f(u, w, f"ups.{j}.m1", training)
        u = F.interpolate(u, size=(2 * u.shape[2], 2 * u.shape[3]), mode="bilinear")
        u = torch.cat([u, rights[levels - 1 - j]], 1)
    return F.conv2d(m1_f(u, w, "last", training), w["last.logits.weight"], w["last.logits.bias"])


def unet_f(x, w, levels, training=False):
    skips = []
    for i in range(levels):
        x = m1_f(x, w, f"downs.{i}", training)
        skips += [x]
        x = F.max_pool2d(x, 2, 2)
    x = m1_f(x, w, "bottom", training)
    for j in range(levels):
        x = F.conv_transpose2d(x, w[f"ups.{j}.up.weight"], w[f"ups.{j}.up.bias"], stride=2)
        x = m1_f(torch.cat([x, skips[levels - 1 - j]], 1), w, f"ups.{j}.block", training)
    return F.conv2d(x, w["last.weight"], w["last.bias"])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("levels", "channels"), [(1, 1), (2, 1), (2, 3), (3, 2)])
def test_multi_view_equals_functional(levels, channels, training):
    net = lively(MultiViewUnet(levels, channels)).double().train(training)
    x = torch.randn(2, channels, 24, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = multi_view_f(x, net.state_dict(), levels, training)
    assert expected.std() > 0.05, "the comparison would say nothing"
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("levels", "channels"), [(1, 1), (2, 3), (3, 1)])
def test_unet_equals_functional(levels, channels, training):
    net = lively(Unet(levels, channels, width=6)).double().train(training)
    x = torch.randn(2, channels, 24, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = unet_f(x, net.state_dict(), levels, training)
    assert expected.std() > 0.05, "the comparison would say nothing"
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-12)


def test_functional_float32_at_the_papers_start():
    torch.manual_seed(0)
    net, x = MultiViewUnet(2).eval(), torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(net(x), multi_view_f(x, net.state_dict(), 2))


# Shapes, sizes, errors


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("factors", [(1, 1), (3, 2), (5, 4)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", [MultiViewUnet, lambda n, c: Unet(n, c, width=4)])
def test_output_shape(kind, levels, channels, factors, batch):
    height, width = (f * 2**levels for f in factors)
    net = kind(levels, channels).eval()
    assert net(torch.zeros(batch, channels, height, width)).shape == (batch, 1, height, width)


@pytest.mark.parametrize(
    ("levels", "size", "padded"),
    [
        (1, (7, 8), "8x8"),
        (2, (650, 650), "652x652"),
        (3, (512, 500), "512x504"),
        (4, (1, 33), "16x48"),
        (2, (0, 8), "4x8"),
    ],
)
@pytest.mark.parametrize("kind", [MultiViewUnet, lambda n: Unet(n, width=4)])
def test_size_error_names_what_would_do(kind, levels, size, padded):
    with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]}.*multiples of {2**levels}; pad them to {padded}"):
        kind(levels)(torch.zeros(1, 1, *size))


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", [MultiViewUnet, lambda n: Unet(n, width=1)])
def test_the_multiple_is_what_a_network_really_needs(kind, levels, monkeypatch):
    """Without its check, a side of half the multiple, or of half more, is lost or fails on the way; the multiple itself passes."""
    net = kind(levels).eval()
    assert net.multiple == 2**levels and net.config == kind(levels).config
    monkeypatch.setattr("sahlora.unet.check_input", lambda *arguments: None)
    for height, width in ((1, 1), (3, 2)):
        x = torch.zeros(1, 1, height * net.multiple, width * net.multiple)
        assert net(x).shape == x.shape
    for wrong in (net.multiple // 2, net.multiple * 3 // 2):
        x = torch.zeros(1, 1, 2 * net.multiple, wrong)
        try:
            kept = net(x).shape == x.shape
        except RuntimeError:
            kept = False
        assert not kept, wrong


@pytest.mark.long
@pytest.mark.parametrize("make", [lambda: MultiViewUnet(3), lambda: Unet(levels=4, width=2)])
def test_copies_and_networks_from_a_header_say_the_same_multiple(make):
    net = make()
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), build_network(net.config), torch.compile(net)):
        assert twin.multiple == net.multiple


def test_the_papers_unets_need_4_and_16():
    assert (MultiViewUnet().multiple, Unet(width=1).multiple) == (4, 16)
    with pytest.raises(ValueError, match="72x88 pixels do not fit.*multiples of 16; pad them to 80x96"):
        Unet(width=1)(torch.zeros(1, 1, 72, 88))


def test_input_errors(net):
    with pytest.raises(ValueError, match=r"3 channels.*takes 1"):
        net(torch.zeros(1, 3, 16, 16))
    for shape in [(16, 16), (1, 16, 16), (1, 1, 1, 16, 16)]:
        with pytest.raises(ValueError, match="4-D: slices, channels, height, width"):
            net(torch.zeros(shape))
    with pytest.raises(ValueError, match="uint8.*floating-point"):
        net(torch.zeros(1, 1, 16, 16, dtype=torch.uint8))


@pytest.mark.parametrize("value", [0, -1, 1.0, 2.5, "2", None, True])
@pytest.mark.parametrize(
    ("kind", "argument"), [(MultiViewUnet, "levels"), (MultiViewUnet, "in_channels"), (Unet, "levels"), (Unet, "width")]
)
def test_constructor_errors(kind, argument, value):
    with pytest.raises(ValueError, match=f"{argument} is {value!r}.*at least 1"):
        kind(**{argument: value})


# Start values


def test_init_statistics():
    torch.manual_seed(0)
    for net in (MultiViewUnet(2, 3), Unet(3, width=32)):
        gammas = []
        for module in net.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
                w = module.weight.detach()
                std = 0.02 * math.sqrt(2 / ((w.shape[0] + w.shape[1]) * w.shape[2] * w.shape[3]))
                tolerance = 5 / math.sqrt(2 * w.numel())  # five standard errors of a standard deviation
                assert abs(w.std() / std - 1) < tolerance and abs(w.mean() / std) < 5 / math.sqrt(w.numel())
                assert not module.bias.any()
            if isinstance(module, torch.nn.BatchNorm2d):
                gammas.append(module.weight.detach())
                assert not module.bias.any() and not module.running_mean.any() and (module.running_var == 1).all()
        gammas = torch.cat(gammas)
        n = len(gammas)
        assert abs(gammas.mean() - 1) < 5 * 0.02 / math.sqrt(n) and abs(gammas.std() / 0.02 - 1) < 5 / math.sqrt(2 * n)


def test_init_follows_the_global_seed():
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(torch.cat([p.detach().flatten() for p in MultiViewUnet(1).parameters()]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_init_weights_starts_a_network_again(net):
    before = net.state_dict()["last.weight" if isinstance(net, Unet) else "last.logits.weight"].clone()
    torch.manual_seed(0)
    init_weights(net)
    after = net.state_dict()["last.weight" if isinstance(net, Unet) else "last.logits.weight"]
    assert after.std() < before.std() / 5


# Every way of calling gives the same answer


@pytest.fixture
def slices():
    return torch.randn(2, 1, 32, 48, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("training", [False, True])
def test_float64_agrees(net, slices, training):
    net.train(training)
    with torch.no_grad():
        single, double = copy.deepcopy(net)(slices), copy.deepcopy(net).double()(slices.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4 * double.std().item())


def test_channels_last_agrees(net, slices):
    net.eval()
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    names = net.regions["deep"]
    with torch.no_grad():
        plain = net(slices)
        torch.testing.assert_close(
            last(slices.to(memory_format=torch.channels_last)), plain, rtol=1e-4, atol=1e-4 * plain.std().item()
        )
    inner = activations(last, slices.to(memory_format=torch.channels_last), names)
    assert all(y.is_contiguous(memory_format=torch.channels_last) for _, y in inner.values())


def test_bf16_autocast_agrees(net, slices):
    net.eval()
    with torch.no_grad():
        plain = net(slices)
        with torch.autocast("cpu", torch.bfloat16):
            low = net(slices)
    error = (low.float() - plain).square().mean().sqrt() / plain.std()
    assert low.dtype == torch.bfloat16 and 0 < error < 0.03


def test_slices_do_not_see_each_other_in_eval(net, slices):
    net.eval()
    with torch.no_grad():
        torch.testing.assert_close(net(slices), torch.cat([net(s[None]) for s in slices]), rtol=1e-5, atol=1e-5)


def test_training_with_a_batch_of_one(net, slices):
    before = {k: v.clone() for k, v in net.state_dict().items() if "running" in k}
    loss = net.train()(slices[:1]).square().mean()
    loss.backward()
    assert math.isfinite(loss.item())
    assert all(not torch.equal(v, net.state_dict()[k]) for k, v in before.items())


@pytest.mark.parametrize("training", [False, True])
def test_gradients_reach_every_parameter(net, slices, training):
    net.train(training)
    net.double()(slices.double()).square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
        if training and name.endswith("conv.bias"):
            continue  # BatchNorm subtracts the mean, and with it any bias: that gradient is zero
        assert p.grad.abs().max() > 1e-9, name


def test_gradient_is_the_slope():
    """Directional derivative against central differences, in float64."""
    net = lively(MultiViewUnet(1)).double().eval()
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = net.downs[0].m2.view4.conv.weight
    step = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 1e-6
    (slope,) = torch.autograd.grad(net(x).sum(), weight)
    with torch.no_grad():
        values = []
        for sign in (1, -2):
            weight += sign * step
            values.append(net(x).sum())
    expected = (slope * step).sum().item()
    assert abs(expected) > 1e-9
    assert (values[0] - values[1]).item() / 2 == pytest.approx(expected, rel=1e-4)


@pytest.mark.long
def test_compiles_without_graph_breaks(net, slices):
    net.eval()
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with torch.no_grad():
        for x in (slices, slices[:1], slices[..., :32]):
            torch.testing.assert_close(compiled(x), net(x))
    torch._dynamo.reset()


def test_forward_leaves_its_input_alone(net, slices):
    before = slices.clone()
    net.train()(slices)
    assert torch.equal(before, slices)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_are_independent(net, slices, twin):
    net.eval()
    other = twin(net)
    with torch.no_grad():
        assert torch.equal(other(slices), net(slices))
        before = net(slices)
        for p in other.parameters():
            p.add_(1)
        assert torch.equal(net(slices), before) and not torch.equal(other(slices), before)
    assert other.regions == net.regions and other.config == net.config


# Networks by name


@pytest.mark.parametrize("make", [lambda: MultiViewUnet(3, 2), lambda: Unet(2, 3, 4), MultiViewUnet])
def test_config_round_trip(make):
    net = make().eval()
    twin = build_network(json.loads(json.dumps(net.config))).eval()
    assert type(twin) is type(net) and twin.config == net.config
    twin.load_state_dict(net.state_dict(), strict=True)
    x = torch.randn(1, net.in_channels, 16, 16)
    with torch.no_grad():
        assert torch.equal(twin(x), net(x))


def test_build_network_defaults_and_leaves_its_argument_alone():
    config = {"name": "multi-view-unet"}
    assert build_network(config).config == {"name": "multi-view-unet", "levels": 2, "in_channels": 1}
    assert config == {"name": "multi-view-unet"}
    assert {NETWORKS[kind(1).config["name"]] for kind in (MultiViewUnet, Unet)} == {MultiViewUnet, Unet}


@pytest.mark.parametrize("config", [{}, {"name": "Unet"}, {"name": None}, {"name": ["unet"]}, {"levels": 2}])
def test_build_network_lists_known_names(config):
    with pytest.raises(ValueError, match="known networks: multi-view-unet, unet"):
        build_network(config)


def test_build_network_names_bad_arguments():
    with pytest.raises(ValueError, match="multi-view-unet takes no width; it takes levels, in_channels"):
        build_network({"name": "multi-view-unet", "width": 64})
    with pytest.raises(ValueError, match="levels is '2'"):
        build_network({"name": "unet", "levels": "2"})


# A network of one's own


class Own(torch.nn.Module):
    """The least that a network must have."""

    outputs = 1

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.body = torch.nn.Conv2d(1, width, 3, padding=1)
        self.head = torch.nn.Conv2d(width, self.outputs, 1)
        self.config = {"name": "own", "width": width}
        self.regions = {"decoding": ["head"], "all": ["body", "head"]}

    def forward(self, x):
        return self.head(self.body(x))


@pytest.fixture
def names(monkeypatch):
    """The table of networks, put back after the test."""
    monkeypatch.setattr(unet, "NETWORKS", dict(NETWORKS))
    return unet.NETWORKS


def test_a_registered_network_is_built_by_name(names):
    assert register("own")(Own) is Own
    net = build_network(json.loads(json.dumps(build_network({"name": "own", "width": 3}).config)))
    assert type(net) is Own and net.training and net.multiple == 1 and region_parameters(net, "decoding") == 4
    with pytest.raises(ValueError, match="own takes no levels; it takes width"):
        build_network({"name": "own", "levels": 2})
    with pytest.raises(ValueError, match="known networks: multi-view-unet, unet, own"):
        build_network({"name": "mine"})


def test_a_name_belongs_to_one_class_that_may_be_defined_again(names):
    register("own")(Own)
    with pytest.raises(ValueError, match="'own' is the name of Own; register Unet"):
        register("own")(Unet)
    again = type("Own", (Own,), {"__module__": Own.__module__, "__qualname__": "Own"})
    register("own")(again)  # as a notebook's cell that is run twice
    assert names["own"] is again


@pytest.mark.parametrize(("change", "words"), [
    ({"config": None}, "Own.config must be a dict"), ({"config": {"width": 4}}, "Own.config must be a dict"),
    ({"config": {"name": "unet"}}, "Own.config must be a dict"), ({"regions": None}, "Own.regions must be a dict"),
    ({"regions": {"deep": ["bottom"]}}, "Own.regions names bottom"), ({"multiple": 0}, "Own.multiple must be"),
    ({"multiple": 2.0}, "Own.multiple must be"), ({"outputs": 2}, "one logit per pixel")])
def test_what_a_network_lacks_is_said(names, change, words):
    def init(self, width: int = 4) -> None:
        Own.__init__(self, width)
        vars(self).update(change)

    register("own")(type("Own", (Own,), {"__init__": init, "outputs": change.get("outputs", 1)}))
    with pytest.raises(ValueError, match=words):
        build_network({"name": "own"})


def test_any_network_with_regions_can_be_drawn():
    texts = [text.get_text() for text in draw_network(Own(), size=(80, 64)).axes[0].texts]
    assert "Own: 45 parameters" in texts and sum("80×64 px" in text for text in texts) == 2
    own = Own()
    own.draw = lambda size, width_cm: (size, width_cm)
    assert draw_network(own, 64, 9.0) == (64, 9.0)


# Tracing, cost, drawing


def test_activations_are_what_flows(net, slices):
    net.eval()
    names = net.regions["all"]
    seen = activations(net, slices, names)
    assert list(sorted(seen)) == sorted(names)
    with torch.no_grad():
        assert torch.equal(seen["last"][1], net(slices))
        assert torch.equal(net.get_submodule(names[0])(slices), seen[names[0]][1])
    assert not any(m._forward_hooks for m in net.modules())
    with pytest.raises(ValueError):
        activations(net, slices[:, :, :-1], names)
    assert not any(m._forward_hooks for m in net.modules()), "hooks stay after an error"


def flops(net, size):
    """Operations of one slice's forward pass, a multiply-add counted as 2."""
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(net).to("meta").eval()(torch.empty(1, 1, size, size, device="meta"))
    return counter.get_total_flops()


def test_flops_of_the_paper():
    net = MultiViewUnet(2)
    # Weights of the convolutions at full, half and quarter size, times pixels, times two for multiply and add.
    k = 9 * 32
    full = k * (1 / 32 + 1) * 32 + 5 * k * 32 + k * (3 + 1) * 32 + 32
    half = 5 * k * 32 + k * (3 + 1) * 32
    quarter = 3 * k * 32 + k * (2 + 1) * 32
    assert flops(net, 64) == 2 * 64 * 64 * (full + half / 4 + quarter / 16)
    assert flops(net, 64) / 1e9 == pytest.approx(0.96, abs=0.005)
    assert flops(net, 512) / 1e9 == pytest.approx(61.2, abs=0.05)


@pytest.mark.long
@pytest.mark.parametrize("make", [MultiViewUnet, lambda n: MultiViewUnet(n, 3), lambda n: Unet(n, width=8)])
@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_drawing_shows_the_network(make, levels, tmp_path):
    net = make(levels)
    figure = draw_network(net, size=64)
    texts = [t.get_text() for t in figure.axes[0].texts]
    boxes = [t for t in texts if t.endswith(" parameters") and " px\n" in t]
    drawn = sorted(int(t.split("\n")[1].split()[0].replace(",", "")) for t in boxes)
    assert drawn == sorted(count(net.get_submodule(name)) for name in net.regions["all"])
    assert any(f"{net.in_channels}→" in t for t in texts)
    oblong = [t.get_text() for t in draw_network(net, size=(80, 64)).axes[0].texts]
    assert any("80×64 px" in t for t in oblong) and not any("64×64 px" in t for t in oblong)
    legend = [t.get_text() for t in figure.axes[0].get_legend().get_texts()]
    assert set(legend) == {f"{r}: {region_parameters(net, r):,}" for r in REGIONS - {"all"}}
    assert figure.get_size_inches()[0] == pytest.approx(12 / 2.54)
    figure.savefig(tmp_path / "net.png", dpi=30)
    assert (tmp_path / "net.png").stat().st_size > 0


@pytest.mark.parametrize("levels", [1, 4])
@pytest.mark.parametrize("make", [MultiViewUnet, lambda n: Unet(n)])
def test_drawing_is_legible(make, levels):
    """Every text in a box is inside it, no two texts overlap, and nothing leaves the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = draw_network(make(levels))
    renderer = FigureCanvasAgg(figure).get_renderer()
    axes = figure.axes[0]
    frames = [p.get_window_extent(renderer) for p in axes.patches if type(p).__name__ == "FancyBboxPatch"]
    texts = [t.get_window_extent(renderer) for t in axes.texts if t.get_text()]
    for a, b in itertools.combinations(texts, 2):
        assert not a.overlaps(b)
    for text in texts:
        for frame in frames:
            if frame.overlaps(text):
                assert frame.x0 <= text.x0 and text.x1 <= frame.x1 and frame.y0 <= text.y0 and text.y1 <= frame.y1
    picture = figure.bbox
    for extent in [*texts, *frames, axes.get_legend().get_window_extent(renderer)]:
        assert picture.x0 <= extent.x0 and extent.x1 <= picture.x1
        assert picture.y0 <= extent.y0 and extent.y1 <= picture.y1


def test_drawing_refuses_others():
    with pytest.raises(ValueError, match="Conv2d can not be drawn"):
        draw_network(torch.nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match="pad them to"):
        draw_network(MultiViewUnet(3), size=100)


@pytest.mark.long
def test_import_is_light():
    code = "import sys, sahlora.unet; sys.exit(int('matplotlib' in sys.modules or 'monai' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("make", [MultiViewUnet, Unet])
def test_the_papers_intensity_multiplies_the_input(make):
    torch.manual_seed(0)
    kind = {"levels": 1} if make is MultiViewUnet else {"levels": 1, "width": 4}
    plain, paper = make(**kind).eval(), make(**kind, intensity="0..255").eval()
    paper.load_state_dict(plain.state_dict())
    x = torch.rand(1, 1, 8, 8)
    assert torch.equal(paper(x), plain(255 * x)) and not torch.equal(paper(x), plain(x))
    assert build_network(paper.config).config["intensity"] == "0..255" and "intensity" not in plain.config
    with pytest.raises(ValueError, match="0..1, 0..255"):
        make(intensity="8 bit")
