"""The adapters' formulas once more, written apart from the package: index by index, einsum by einsum."""

import math

import torch
from torch import nn

METHODS = ("lora-c", "convlora", "cp-lora", "dora-c", "convdora", "cp-dora")
MATRIX = {"lora-c": "lora-c", "dora-c": "lora-c"}
CONV = {"convlora", "convdora"}
CP = {"cp-lora", "cp-dora"}
DORA = {"dora-c", "convdora", "cp-dora"}
ZERO = {"lora-c": "B", "dora-c": "B", "convlora": "B", "convdora": "B", "cp-lora": "a", "cp-dora": "a"}
SPATIAL = "yxzw"


def is_transposed(conv):
    return isinstance(conv, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))


def view_of(conv):
    """(O, I per group, k...), in which the formulas see the weight."""
    return (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)


def to_view(weight, conv):
    """The stored weight seen as (O, I/groups, k...), one group at a time."""
    if not is_transposed(conv):
        return weight
    step = conv.in_channels // conv.groups
    blocks = [weight[g * step : (g + 1) * step].transpose(0, 1) for g in range(conv.groups)]
    return torch.cat(blocks, 0)


def from_view(value, conv):
    """The way back: (O, I/groups, k...) as the convolution stores it."""
    if not is_transposed(conv):
        return value
    step = conv.out_channels // conv.groups
    return torch.cat([value[g * step : (g + 1) * step].transpose(0, 1) for g in range(conv.groups)], 0)


def factor_shapes(method, conv, rank, rank_setting="rk", unfolding="view"):
    """Shapes of the paper's factors."""
    O, I, *k = view_of(conv)
    if method in MATRIX:
        R = rank * max(k) if rank_setting == "rk" else rank
        if unfolding == "o-ihw":
            shapes = {"B": (O, R), "A": (R, I * math.prod(k))}
        else:
            shapes = {"B": (O * k[0], R), "A": (R, I * math.prod(k[1:]))}
    elif method in CONV:
        shapes = {"A": (rank, I, *k), "B": (O, rank)}
    else:
        shapes = {name: (n, rank) for name, n in zip("abcde", (O, I, *k), strict=False)}
    return {**shapes, "m": (O,)} if method in DORA else shapes


def update(method, f, conv, unfolding="view"):
    """The unscaled update in the shape (O, I/groups, k...)."""
    view = view_of(conv)
    O, I, *k = view
    axes = SPATIAL[: len(k)]
    if method in MATRIX:
        if unfolding == "o-ihw":
            return torch.einsum(f"op,pi{axes}->oi{axes}", f["B"], f["A"].reshape(-1, I, *k))
        if unfolding == "oh-iw":
            return torch.einsum(
                f"oyp,pi{axes[1:]}->oi{axes}", f["B"].reshape(O, k[0], -1), f["A"].reshape(-1, I, *k[1:])
            )
        # the memory of the product, row by row, is the memory of the weight
        columns, flat = f["A"].shape[1], torch.arange(math.prod(view))
        return (f["B"][flat // columns] * f["A"].T[flat % columns]).sum(1).reshape(view)
    if method in CONV:
        return torch.einsum(f"op,pi{axes}->oi{axes}", f["B"], f["A"])
    operands = ",".join(f"{axis}p" for axis in "oi" + axes)
    return torch.einsum(f"{operands}->oi{axes}", *(f[name] for name in "abcde"[: len(view)]))


def weight(method, W, f, conv, scale=1.0, unfolding="view", detach_norm=True):
    """The weight the convolution must use, as it is stored; W is the base's stored weight."""
    V = to_view(W, conv) + scale * update(method, f, conv, unfolding)
    if method in DORA:
        norm = V.flatten(1).square().sum(1).sqrt()
        norm = norm.detach() if detach_norm else norm
        V = V * (f["m"] / norm).reshape(-1, *[1] * (V.ndim - 1))
    return from_view(V, conv)


def factors(layer):
    """The active adapter's parameters by name."""
    return dict(layer.adapter.named_parameters())


@torch.no_grad()
def randomize(net, seed=0, size=0.5):
    """Factors as after some training: none of them zero; magnitudes stay positive."""
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in net.named_parameters():
        if ".adapter." not in f".{key}" or key.rsplit(".", 1)[1] not in "ABabcdem":  # copies of a norm's weight, say
            continue
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if key.endswith("adapter.m"):
            tensor.copy_(tensor * (1 + 0.3 * noise.tanh()))
        else:
            tensor.copy_(size * noise)


def plain_like(conv):
    """A new convolution of the same making, without the weight."""
    kind = next(t for t in CONVS if isinstance(conv, t))
    arguments = {
        key: getattr(conv, key)
        for key in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    }
    if is_transposed(conv):
        arguments["output_padding"] = conv.output_padding
    plain = kind(
        **arguments,
        padding_mode=conv.padding_mode,
        bias=conv.bias is not None,
        dtype=conv.weight.dtype,
        device=conv.weight.device,
    )
    if conv.bias is not None:
        plain.bias.data = conv.bias.detach().clone()
    return plain


CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def bits(net):
    """Every parameter and buffer of a network, copied, for comparison to the bit."""
    return {key: value.detach().clone() for key, value in net.state_dict().items()}


def same_bits(one, other):
    """Whether two state dicts hold the same keys in the same order, and the same bits (NaN and -0.0 included)."""
    if list(one) != list(other):
        return False
    return all(same_tensor(one[key], other[key]) for key in one)


def same_tensor(one, other):
    """Shape, dtype and every bit."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16}[one.element_size()]
    return torch.equal(one.contiguous().view(whole), other.contiguous().view(whole))


def parameter_count(method, conv, rank, rank_setting="rk"):
    """The paper's formulas, typed as numbers rather than summed from shapes."""
    O, I, *k = view_of(conv)
    if method in MATRIX:
        R = rank * max(k) if rank_setting == "rk" else rank
        count = R * (O * k[0] + I * math.prod(k[1:]))
    elif method in CONV:
        count = rank * (I * math.prod(k) + O)
    else:
        count = rank * (O + I + sum(k))
    return count + (O if method in DORA else 0)


def all_modules_of(net, kinds=CONVS):
    """Convolutions by name."""
    return {name: module for name, module in net.named_modules() if isinstance(module, kinds)}
