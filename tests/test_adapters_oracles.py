"""The adapters against independent libraries where those are right: values and gradients, in float64, to 1e-12."""

import copy
import warnings

import pytest
import torch
from adapters_reference import factors, randomize, to_view
from torch import nn

from sahlora.adapters import adapt, adapted_layers, delta_weight, effective_weight, merge, unmerge

TOL = 1e-12

# where PEFT is right: integer padding, no dilation, one group, zeros outside
PLAIN = {
    "1d": (nn.Conv1d, {"in_channels": 4, "out_channels": 6, "kernel_size": 5, "stride": 2, "padding": 2}, (11,)),
    "2d": (nn.Conv2d, {"in_channels": 3, "out_channels": 5, "kernel_size": 3, "padding": 1}, (8, 7)),
    "2d-1x1": (nn.Conv2d, {"in_channels": 6, "out_channels": 4, "kernel_size": 1, "bias": False}, (5, 4)),
    "2d-uneven": (
        nn.Conv2d,
        {"in_channels": 4, "out_channels": 3, "kernel_size": (2, 3), "stride": (2, 1), "padding": (0, 2)},
        (7, 6),
    ),
    "3d": (nn.Conv3d, {"in_channels": 2, "out_channels": 4, "kernel_size": 3, "padding": 1, "stride": 2}, (5, 4, 6)),
}
# where LyCORIS is right: dilation and groups too
RICH = {
    **PLAIN,
    "2d-dilated": (
        nn.Conv2d,
        {"in_channels": 3, "out_channels": 5, "kernel_size": 3, "padding": 4, "dilation": 4},
        (10, 9),
    ),
    "2d-groups": (
        nn.Conv2d,
        {"in_channels": 6, "out_channels": 9, "kernel_size": 3, "padding": 2, "dilation": 2, "groups": 3},
        (8, 9),
    ),
    "2d-depthwise": (
        nn.Conv2d,
        {"in_channels": 4, "out_channels": 8, "kernel_size": 3, "stride": 2, "padding": 1, "groups": 4},
        (9, 8),
    ),
    "3d-groups": (
        nn.Conv3d,
        {"in_channels": 4, "out_channels": 6, "kernel_size": (1, 2, 3), "dilation": (1, 1, 2), "groups": 2},
        (3, 4, 6),
    ),
}


def make(case, seed=0):
    kind, arguments, size = case
    torch.manual_seed(seed)
    conv = kind(**arguments).double()
    return conv, torch.randn(2, conv.in_channels, *size, dtype=torch.float64)


def ours(conv, method, rank, **options):
    """An adapted copy with trained-looking factors: the network and its layer."""
    net = nn.Sequential(copy.deepcopy(conv))
    adapt(net, method, rank=rank, **options)
    randomize(net, 7)
    (layer,) = adapted_layers(net).values()
    return net, layer


def close(one, other):
    assert one.shape == other.shape, (one.shape, other.shape)
    return (one - other).abs().max() <= TOL * max(1.0, other.abs().max().item())


def compare(net, oracle, x, pairs):
    """Outputs, gradients of the input and of each (ours, theirs, reshape) pair of parameters."""
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y1, y2 = net(x1), oracle(x2)
    assert close(y1, y2)
    g = torch.randn(y1.shape, generator=torch.Generator().manual_seed(3), dtype=y1.dtype)
    y1.backward(g)
    y2.backward(g)
    assert close(x1.grad, x2.grad)
    for mine, theirs in pairs:
        assert theirs.grad.abs().max() > 1e-3
        assert close(mine.grad, theirs.grad.reshape(mine.shape))


def as_conv_factors(layer, method):
    """A and B of the convLoRA that is the same update: A[p,i,y,x] = b[i,p] c[y,p] d[x,p] for a CP form."""
    f = factors(layer)
    if "A" in f:
        return f["A"].detach(), f["B"].detach()
    axes = "yxz"[: len(f) - 2 - ("m" in f)]
    spatial = [f[name] for name in "cde"[: len(axes)]]
    A = torch.einsum("ip," + ",".join(f"{axis}p" for axis in axes) + f"->pi{axes}", f["b"], *spatial)
    return A.detach(), f["a"].detach()


def peft_network(conv, rank, alpha, dora, rslora=False):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = nn.Sequential(copy.deepcopy(conv))
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], use_dora=dora, use_rslora=rslora)
        model = peft.get_peft_model(net, config).double()
    return model, model.base_model.model[0]


def fill_peft(layer, A, B, m=None):
    n = A.ndim - 2
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(A)
        layer.lora_B["default"].weight.copy_(B.reshape(*B.shape, *[1] * n))
        if m is not None:
            magnitude = layer.lora_magnitude_vector["default"].weight
            magnitude.copy_(m.reshape(magnitude.shape))


@pytest.mark.parametrize("case", PLAIN)
@pytest.mark.parametrize("rslora", [False, True])
def test_convlora_is_pefts_lora(case, rslora):
    conv, x = make(PLAIN[case])
    net, layer = ours(conv, "convlora", 4, alpha=6, scaling="rslora" if rslora else "lora")
    oracle, theirs = peft_network(conv, 4, 6, False, rslora)
    fill_peft(theirs, *as_conv_factors(layer, "convlora"))
    assert close(delta_weight(layer), theirs.get_delta_weight("default"))
    f = factors(layer)
    compare(net, oracle, x, [(f["A"], theirs.lora_A["default"].weight), (f["B"], theirs.lora_B["default"].weight)])


@pytest.mark.parametrize("case", PLAIN)
def test_convdora_is_pefts_dora(case):
    conv, x = make(PLAIN[case])
    net, layer = ours(conv, "convdora", 3, alpha=5)
    oracle, theirs = peft_network(conv, 3, 5, True)
    f = factors(layer)
    start = conv.weight.flatten(1).norm(dim=1).reshape(theirs.lora_magnitude_vector["default"].weight.shape)
    assert (theirs.lora_magnitude_vector["default"].weight - start).abs().max() < 1e-6
    fill_peft(theirs, *as_conv_factors(layer, "convdora"), f["m"].detach())
    compare(
        net,
        oracle,
        x,
        [
            (f["A"], theirs.lora_A["default"].weight),
            (f["B"], theirs.lora_B["default"].weight),
            (f["m"], theirs.lora_magnitude_vector["default"].weight),
        ],
    )


@pytest.mark.parametrize("case", PLAIN)
@pytest.mark.parametrize("method", ["cp-lora", "cp-dora"])
def test_cp_is_a_structured_peft_adapter(case, method):
    conv, x = make(PLAIN[case])
    net, layer = ours(conv, method, 5, alpha=4)
    oracle, theirs = peft_network(conv, 5, 4, method == "cp-dora")
    f = factors(layer)
    fill_peft(theirs, *as_conv_factors(layer, method), f["m"].detach() if "m" in f else None)
    pairs = [(f["a"], theirs.lora_B["default"].weight)]
    if "m" in f:
        pairs.append((f["m"], theirs.lora_magnitude_vector["default"].weight))
    compare(net, oracle, x, pairs)


@pytest.mark.parametrize("method, dora", [("convlora", False), ("convdora", True)])
def test_merged_weights_are_pefts(method, dora):
    conv, x = make(PLAIN["2d"])
    net, layer = ours(conv, method, 3, alpha=5)
    oracle, theirs = peft_network(conv, 3, 5, dora)
    fill_peft(theirs, *as_conv_factors(layer, method), factors(layer)["m"].detach() if dora else None)
    merge(net)
    merged = oracle.merge_and_unload()
    assert close(layer.weight.detach(), merged[0].weight.detach())
    assert close(net.eval()(x), merged(x))
    unmerge(net)


@pytest.mark.parametrize("alpha", [2, 3])
@pytest.mark.parametrize(
    "arguments",
    [
        {"padding": 1},
        {"padding": 2, "dilation": 2, "stride": 2},
        {"padding": 2, "dilation": 2, "padding_mode": "reflect"},
        {"bias": False, "padding": "same"},
    ],
)
def test_lora_c_is_loralibs_convolution(alpha, arguments):
    loralib = pytest.importorskip("loralib")
    for kernel in (1, 3, 4) if arguments.get("padding") != "same" else (3,):
        torch.manual_seed(0)
        oracle = loralib.Conv2d(3, 5, kernel, r=2, lora_alpha=alpha, merge_weights=False, **arguments).double()
        net, layer = ours(oracle.conv, "lora-c", 2, alpha=alpha)
        f = factors(layer)
        with torch.no_grad():
            oracle.lora_A.copy_(f["A"])
            oracle.lora_B.copy_(f["B"])
        x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
        compare(net, oracle, x, [(f["A"], oracle.lora_A), (f["B"], oracle.lora_B)])


def lycoris_module(conv, rank, alpha, dora=False):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        locon = pytest.importorskip("lycoris.modules.locon")
    module = locon.LoConModule("oracle", conv, 1.0, rank, alpha, weight_decompose=dora)
    if dora:  # built in float32, and not a parameter after that
        module.dora_scale = nn.Parameter(module.dora_scale.detach().double())
    module.double()
    module.apply_to()
    return module


@pytest.mark.parametrize("case", RICH)
@pytest.mark.parametrize("method", ["convlora", "convdora", "cp-lora", "cp-dora"])
def test_lycoris_locon(case, method):
    """Dilation, groups and depthwise too; its DoRA has the norm in the gradient."""
    conv, x = make(RICH[case])
    dora = method.endswith("dora")
    net, layer = ours(conv, method, 3, alpha=5, **({"detach_norm": False} if dora else {}))
    f = factors(layer)
    oracle = copy.deepcopy(conv)
    module = lycoris_module(oracle, 3, 5, dora)
    A, B = as_conv_factors(layer, method)
    with torch.no_grad():
        module.lora_down.weight.copy_(A)
        module.lora_up.weight.copy_(B.reshape(module.lora_up.weight.shape))
        if dora:
            module.dora_scale.copy_(f["m"].reshape(module.dora_scale.shape))
    pairs = [(f[key], w.weight) for key, w in (("A", module.lora_down), ("B", module.lora_up)) if key in f]
    pairs += [(f["a"], module.lora_up.weight)] if "a" in f else []
    pairs += [(f["m"], module.dora_scale)] if dora else []
    compare(net, oracle, x, pairs)


@pytest.mark.parametrize("method", ["dora-c", "convdora", "cp-dora"])
def test_lycoris_norm_formula_on_any_update(method):
    """The magnitude and direction split alone, over each of the three updates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        general = pytest.importorskip("lycoris.functional.general")
    for case in RICH.values():
        conv, _ = make(case)
        _, layer = ours(conv, method, 2)
        W = conv.weight.detach()
        V = W + delta_weight(layer).detach()
        m = factors(layer)["m"].detach().reshape(-1, *[1] * (W.ndim - 1))
        assert close(effective_weight(layer).detach(), general.weight_decompose(V, m))
        assert (effective_weight(layer) - W).abs().max() > 1e-2


@pytest.mark.parametrize("method", ["cp-lora", "cp-dora"])
@pytest.mark.parametrize("case", [*RICH, "up"])
def test_the_cp_update_is_tensorlys(case, method):
    import tensorly
    from tensorly.cp_tensor import cp_to_tensor

    up = (
        nn.ConvTranspose2d,
        {"in_channels": 4, "out_channels": 6, "kernel_size": (2, 3), "groups": 2, "stride": 2},
        (4, 4),
    )
    conv, _ = make(RICH.get(case, up))
    _, layer = ours(conv, method, 4, alpha=6)
    f = factors(layer)
    names = [name for name in "abcde" if name in f]
    mine, theirs = delta_weight(layer), {name: f[name].detach().clone().requires_grad_() for name in names}
    with tensorly.backend.backend_context("pytorch"):
        weights = torch.full((4,), 6 / 4, dtype=torch.float64)
        expected = cp_to_tensor((weights, [theirs[name] for name in names]))
    assert close(to_view(mine, conv), expected)
    g = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (to_view(mine, conv) * g).sum().backward()
    (expected * g).sum().backward()
    for name in names:
        assert theirs[name].grad.abs().max() > 1e-3
        assert close(f[name].grad, theirs[name].grad)


@pytest.mark.parametrize("stride, padding, dilation", [(1, 1, 1), (2, 2, 2), (1, 0, 3)])
def test_tltorchs_chain_of_convolutions_is_the_cp_convolution(stride, padding, dilation):
    """Four small convolutions in a row, one per factor, on top of the frozen one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tltorch = pytest.importorskip("tltorch")
        from tltorch.functional.convolution import cp_conv
    import tensorly

    arguments = {
        "in_channels": 4,
        "out_channels": 6,
        "kernel_size": 3,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
    }
    conv, x = make((nn.Conv2d, arguments, (9, 9)))
    net, layer = ours(conv, "cp-lora", 5)
    f = factors(layer)
    theirs = {name: nn.Parameter(f[name].detach().clone()) for name in "abcd"}
    with tensorly.backend.backend_context("pytorch"):
        kernel = tltorch.CPTensor(
            torch.ones(5, dtype=torch.float64), list(theirs.values()), shape=tuple(conv.weight.shape), rank=5
        )
        expected = conv(x) + cp_conv(x, kernel, stride=stride, padding=padding, dilation=dilation)
    assert close(net(x), expected)
    y = net(x)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y.backward(g)
    expected.backward(g)
    for name in "abcd":
        assert theirs[name].grad.abs().max() > 1e-3
        assert close(f[name].grad, theirs[name].grad)


@pytest.mark.parametrize("method", ["convlora", "convdora"])
def test_training_goes_where_pefts_goes(method):
    """A few steps of gradient descent from the same start: the trajectories are one."""
    conv, x = make(PLAIN["2d"])
    dora = method == "convdora"
    net = nn.Sequential(copy.deepcopy(conv))
    adapt(net, method, rank=3, alpha=6)
    f = factors(net[0])
    oracle, theirs = peft_network(conv, 3, 6, dora)
    fill_peft(theirs, f["A"].detach(), f["B"].detach(), f["m"].detach() if dora else None)
    target = torch.randn(net(x).shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for model in (net, oracle):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(5):
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            optimizer.step()
    assert close(net(x), oracle(x)) and (net(x) - conv(x)).abs().max() > 1e-2
    assert close(f["A"].detach(), theirs.lora_A["default"].weight.detach())
