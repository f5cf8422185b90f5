"""Time and memory of the adapters against PEFT, LyCORIS and full fine-tuning, written as one Markdown file.

    python benchmarks/adapters.py [--quick] [--device auto|cpu|cuda] [--out benchmarks/adapters.md]

Candidates of one table run in turn, round after round, in a fresh order each round, after an untimed one. A ratio is
taken within a round; tables show its median and quartiles. On a CPU the program starts itself again with one thread
and fixed allocator settings (unless the environment sets them), so that every candidate runs under the same.
"""

import argparse
import gc
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# The settings of sahlora.common.hardware.keep_memory, and one thread: glibc keeps large blocks instead of asking the system for them at every step.
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "1073741824",
    "MALLOC_TOP_PAD_": "67108864",
}
# For memory the opposite: large blocks go back at once, so that the resident set follows what is alive.
LEAN = dict(zip(SETTINGS, ("1", "65536", "0", "0"), strict=True))
CHILD = "--memory-of"  # how the program calls itself for memory

if __name__ == "__main__" and CHILD not in sys.argv and any(key not in os.environ for key in SETTINGS):
    os.execve(sys.executable, [sys.executable, *sys.argv], SETTINGS | os.environ)  # both are read at start-up only

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from sahlora.adapters import METHODS, adapt, adapted_layers, merge, merged_copy  # noqa: E402
from sahlora.unet import MultiViewUnet, region_modules, region_parameters  # noqa: E402

REGION = "decoding"
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = ("fp32", "bf16")
CONVS = ((32, 32, 64), (96, 32, 64), (128, 128, 32))  # in, out, height and width
NAMES = {
    "frozen": "the frozen conv", "full": "full fine-tuning", "full-train": "full fine-tuning, batch statistics",
    "peft-lora": "PEFT LoRA", "peft-dora": "PEFT DoRA", "lycoris": "LyCORIS LoCon",
    "lycoris-dora": "LyCORIS LoCon, weight_decompose",
}  # fmt: skip
PEERS = ("peft-lora", "peft-dora", "lycoris", "lycoris-dora")


@dataclass(frozen=True)
class Spec:
    "One candidate: what is trained (a method, a peer, full, frozen), at which rank, in which memory layout."

    kind: str
    rank: int = 0
    layout: str = "contiguous"

    @property
    def dora(self) -> bool:
        "Whether it learns magnitudes."
        return self.kind == "dora-c" or self.kind.endswith("dora")


@dataclass(frozen=True)
class Case:
    "What every candidate of one group is put on: a conv or the network, the input's size and the precision."

    what: str  # "conv" or "step"
    shape: tuple[int, ...]  # of the input, (N, C, H, W)
    out: int = 0  # the conv's output channels
    dtype: str = "fp32"


@dataclass
class Job:
    "A candidate ready to run: `forward` gives what `finish` goes backward from."

    net: nn.Module
    parameters: list[nn.Parameter]
    forward: Callable[[], Tensor]
    finish: Callable[[Tensor], None]
    keep: list[object] = field(default_factory=list)

    def __call__(self) -> None:
        self.finish(self.forward())


# --- candidates ---------------------------------------------------------------------------------------------------


def make_base(case: Case, device: str) -> tuple[nn.Module, list[str]]:
    "The frozen network of a case with seeded weights, in eval mode, and the names of the convolutions to adapt."
    torch.manual_seed(0)
    if case.what == "conv":
        net, names = nn.Sequential(nn.Conv2d(case.shape[1], case.out, 3, padding=1)), ["0"]
    else:
        net = MultiViewUnet(levels=2)
        parts = tuple(f"{name}." for name in region_modules(net, REGION))
        names = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and n.startswith(parts)]
        settle(net, torch.rand(case.shape))
    return net.to(device).eval().requires_grad_(False), names


@torch.no_grad()
def settle(net: nn.Module, x: Tensor) -> None:
    "Statistics of `x` into the batch norms: without them activations shrink towards denormal, slow numbers."
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the plain average
    net.train()(x)
    for norm in norms:
        norm.momentum = 0.1


def build(spec: Spec, base: nn.Module, names: Sequence[str]) -> tuple[nn.Module, list[nn.Parameter], list[object]]:
    "A copy of the frozen base with the candidate on it, what is trained, and what must be kept alive."
    net, kind = deepcopy(base).to(memory_format=LAYOUTS[spec.layout]), spec.kind
    if kind in METHODS:
        adapt(net, kind, rank=spec.rank, where=REGION if hasattr(net, "regions") else None)
    elif kind.startswith("full"):
        for name in region_modules(net, REGION) if hasattr(net, "regions") else names:
            net.get_submodule(name).requires_grad_(True).train(kind == "full-train")
    elif kind.startswith("peft"):
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=spec.rank, lora_alpha=spec.rank, target_modules=list(names), use_dora=spec.dora)
        net = inject_adapter_in_model(config, net).to(memory_format=LAYOUTS[spec.layout]).eval()
    elif kind.startswith("lycoris"):
        from lycoris.modules.locon import LoConModule

        options = {"lora_dim": spec.rank, "alpha": spec.rank, "weight_decompose": spec.dora}
        wrappers = [LoConModule(name, net.get_submodule(name), **options) for name in names]
        for wrapper in wrappers:
            wrapper.to(next(net.parameters()).device).apply_to()
        return net, [p for wrapper in wrappers for p in wrapper.parameters()], wrappers
    return net, [p for p in net.parameters() if p.requires_grad], []


def precision(case: Case, device: str) -> torch.autocast:
    "Autocast to bf16, or none."
    return torch.autocast(device, torch.bfloat16, enabled=case.dtype == "bf16")


def conv_job(case: Case, spec: Spec, base: nn.Module, names: Sequence[str], device: str) -> Job:
    "Forward and backward of one layer, its input wanting a gradient as inside a network."
    net, parameters, keep = build(spec, base, names)
    layer, draw = net.get_submodule(names[0]), torch.Generator().manual_seed(1)
    kind, layout = torch.bfloat16 if case.dtype == "bf16" else torch.float32, LAYOUTS[spec.layout]
    x, g = (
        torch.randn(case.shape[0], n, *case.shape[2:], generator=draw).to(device, kind, memory_format=layout)
        for n in (case.shape[1], case.out)
    )
    x.requires_grad_()

    def forward() -> Tensor:
        with precision(case, device):
            return layer(x)

    def finish(y: Tensor) -> None:
        y.backward(g)
        for tensor in (x, *parameters):
            tensor.grad = None

    return Job(net, parameters, forward, finish, keep)


def step_job(case: Case, spec: Spec, base: nn.Module, names: Sequence[str], device: str) -> Job:
    "A whole training step: forward, soft Dice over the batch, backward, Adam."
    net, parameters, keep = build(spec, base, names)
    draw = torch.Generator().manual_seed(1)
    x = torch.rand(case.shape, generator=draw).to(device, memory_format=LAYOUTS[spec.layout])
    t = (torch.rand(case.shape, generator=draw) > 0.9).float().to(device)
    optimizer = torch.optim.Adam(parameters, lr=1e-3)

    def forward() -> Tensor:
        with precision(case, device):
            logits = net(x)
        p = logits.float().sigmoid()
        return 1 - (2 * (p * t).sum() + 1e-5) / (p.sum() + t.sum() + 1e-5)

    def finish(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Job(net, parameters, forward, finish, keep)


def make_job(case: Case, spec: Spec, base: nn.Module, names: Sequence[str], device: str) -> Job:
    "The candidate of a case, run once. Raises: AssertionError if it does not start as the base does."
    job = (conv_job if case.what == "conv" else step_job)(case, spec, base, names, device)
    if case.dtype == "fp32" and spec.kind != "full-train":
        x = torch.rand(2, *case.shape[1:], generator=torch.Generator().manual_seed(2)).to(device)
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # its rounding would hide a difference
            expected, found = base(x), job.net(x)
        scale = expected.abs().max()
        assert (expected - found).abs().max() <= 1e-4 * scale, f"{spec} does not compute what the base does"
    job()
    return job


def norm_state(net: nn.Module) -> list[Tensor]:
    "Running statistics of every batch norm."
    return [b for m in net.modules() if isinstance(m, nn.BatchNorm2d) for b in (m.running_mean, m.running_var)]


# --- measuring ----------------------------------------------------------------------------------------------------


@dataclass
class Times:
    "Seconds per round, by the clock on the wall and of the processor."

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def sync(device: str) -> None:
    "Wait until the device is done."
    if device == "cuda":
        torch.cuda.synchronize()


def interleave(
    calls: Mapping[Spec, Callable[[], object]], seconds: float, least: int, device: str
) -> dict[Spec, Times]:  # fmt: skip
    "Time `calls`, each run before, in turn: `least` rounds, or more until `seconds` are over, in a new order each."
    found, order, begin, rounds = {key: Times() for key in calls}, list(calls), time.perf_counter(), 0
    gc.disable()
    try:
        while rounds < least or (time.perf_counter() - begin < seconds and rounds < 200):
            gc.collect()
            random.Random(rounds).shuffle(order)
            for key in order:
                sync(device)
                wall, cpu = time.perf_counter(), time.process_time()
                calls[key]()
                sync(device)
                found[key].wall.append(time.perf_counter() - wall)
                found[key].cpu.append(time.process_time() - cpu)
            rounds += 1
    finally:
        gc.enable()
    return found


@dataclass(frozen=True)
class Ratio:
    "Median and quartiles of the ratio of two candidates within a round; `cpu` is the median by processor time."

    median: float
    low: float
    high: float
    cpu: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}-{self.high:.2f}] {self.cpu:.2f}"


def quantiles(values: Sequence[float]) -> list[float]:
    "Quartile, median, quartile."
    points = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    return torch.tensor(values, dtype=torch.float64).quantile(points).tolist()


def ratio(times: Mapping[Spec, Times], one: Spec, other: Spec) -> Ratio | None:
    "Time of `one` as a fraction of `other`'s; None where one of them did not run."
    if one not in times or other not in times:
        return None
    a, b = times[one], times[other]
    low, median, high = quantiles([p / q for p, q in zip(a.wall, b.wall, strict=True)])
    return Ratio(median, low, high, quantiles([p / q for p, q in zip(a.cpu, b.cpu, strict=True)])[1])


def time_group(
    case: Case, specs: Iterable[Spec], device: str, seconds: float, least: int, failures: dict[str, str]
) -> tuple[dict[Spec, Times], dict[Spec, int]]:  # fmt: skip
    "Times of all candidates of a case and their trainable parameters; a peer that fails is noted and left out."
    base, names = make_base(case, device)
    jobs: dict[Spec, Job] = {}
    for spec in specs:
        try:
            jobs[spec] = make_job(case, spec, base, names, device)
        except (ImportError, RuntimeError) as error:
            if spec.kind not in PEERS:
                raise
            what = f"{NAMES[spec.kind]}, {case.what}, {spec.layout}"
            failures[what] = f"{type(error).__name__}: {error}".splitlines()[0]
    times = interleave(jobs, seconds, least, device)
    for spec, job in jobs.items():  # the comparison is fair only if nobody's batch norms moved
        same = all(map(torch.equal, norm_state(job.net), norm_state(base)))
        assert same or spec.kind == "full-train", f"{spec} changed the batch norms' statistics"
    return times, {spec: sum(p.numel() for p in job.parameters) for spec, job in jobs.items()}


def saved_bytes(job: Job) -> int:
    "Bytes that autograd keeps for backward after one forward, each storage once, parameters and buffers not counted."
    own = {t.untyped_storage().data_ptr() for m in (job.net, *job.keep) for t in (*m.parameters(), *m.buffers())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = job.forward()
    total = sum(kept.values())
    job.finish(out)
    return total


def process_kib(key: str) -> int:
    "An entry of this process's status: VmRSS, or VmHWM, its peak."
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])


def peak_bytes(job: Job, device: str) -> int:
    "Peak of one run above what was held before: resident memory of this process, or the GPU allocator's."
    gc.collect()
    if device == "cuda":
        sync(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        sync(device)
        return torch.cuda.max_memory_allocated() - before
    before = process_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    job()
    return (process_kib("VmHWM") - before) * 1024


def memory_of(case: Case, spec: Spec, device: str) -> dict[str, int]:
    "Saved and peak bytes of one candidate."
    base, names = make_base(case, device)
    job = make_job(case, spec, base, names, device)
    job()
    return {"saved": saved_bytes(job), "peak": peak_bytes(job, device)}


def memory_child(text: str) -> None:
    "Print one line of JSON per request, each measured in a process of its own, forked before torch computes anything."
    for request in json.loads(text):
        case, spec = Case(**request[0] | {"shape": tuple(request[0]["shape"])}), Spec(**request[1])
        for module in {"peft": ["peft"], "lycoris": ["lycoris.modules.locon"]}.get(spec.kind.split("-")[0], []):
            __import__(module)
        pid = os.fork()
        if not pid:
            status = 1
            try:
                print(json.dumps(memory_of(case, spec, "cpu")), flush=True)
                status = 0
            finally:
                os._exit(status)
        if os.waitpid(pid, 0)[1]:
            raise RuntimeError(f"measuring the memory of {spec} on {case} failed")


Kinds = Sequence[tuple[str, int]]  # what is trained, and the rank
Sizes = dict[tuple[Case, Spec], dict[str, int]]


def memories(requests: Sequence[tuple[Case, Spec]], device: str) -> Sizes:
    "Saved and peak bytes of many candidates; on a CPU from fresh processes, Linux only."
    if device == "cuda":
        return {request: memory_of(*request, device) for request in requests}
    if not Path("/proc/self/clear_refs").exists():
        return {}
    text = json.dumps([[asdict(case), asdict(spec)] for case, spec in requests])
    command = [sys.executable, __file__, CHILD, text]
    lines = subprocess.run(command, env=os.environ | LEAN, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(zip(requests, map(json.loads, lines.splitlines()), strict=True))


# --- tables -------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[object]], words: int = 1) -> str:
    "Markdown; the first `words` columns are text, None is a dash."
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    cells = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *cells])


def milliseconds(times: Mapping[Spec, Times], spec: Spec) -> str | None:
    "Median time of a candidate."
    return f"{1e3 * quantiles(times[spec].wall)[1]:.1f}" if spec in times else None


def mib(size: float) -> str:
    "Bytes in MiB."
    return f"{size / 2**20:.1f}"


@dataclass
class Run:
    "How much is measured, and what was seen on the way."

    quick: bool
    device: str
    begin: float = field(default_factory=time.perf_counter)
    failures: dict[str, str] = field(default_factory=dict)
    summary: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        "Progress on the terminal."
        print(f"[{time.perf_counter() - self.begin:4.0f} s] {text}", file=sys.stderr, flush=True)


def conv_specs(rank: int, both: bool) -> list[Spec]:
    "Candidates on a conv: everything in channels_last; contiguous too, or only what PEFT's DoRA needs to be faced."
    kinds = [("frozen", 0), ("full", 0), *((kind, rank) for kind in [*METHODS, *PEERS])]
    plain = kinds if both else [("frozen", 0), ("convdora", rank), ("peft-dora", rank)]
    return [*(Spec(*kind, "channels_last") for kind in kinds), *(Spec(*kind) for kind in plain)]


def conv_rows(run: Run, conv: tuple[int, int, int], kinds: Kinds, sizes: Sizes) -> list[list[object]]:
    "Rows of one conv: relative times by precision and layout, and memory."
    ranks, cells = sorted({rank for _, rank in kinds if rank}), {}
    for case in (conv_case(conv, dtype) for dtype in DTYPES):
        for rank in ranks:
            run.say(f"1. single convolutions: {conv} {case.dtype} rank {rank}")
            specs = conv_specs(rank, both=rank == 16 and not run.quick)
            times, _ = time_group(case, specs, run.device, 1.0 if run.quick else 3.0, 5, run.failures)
            for spec in specs:
                frozen = Spec("frozen", 0, spec.layout)
                found = milliseconds(times, spec) if spec == frozen else ratio(times, spec, frozen)
                if spec.rank or rank == 16:
                    cells[spec, case.dtype] = found
    rows = []
    for kind, rank in kinds:
        name = {"full": "the conv trained in full", "frozen": "the frozen conv (ms)"}.get(kind, NAMES.get(kind, kind))
        memory = [sizes.get((conv_case(conv, dtype), Spec(kind, rank))) for dtype in DTYPES]
        rows.append([
            name, rank or None, *(cells.get((Spec(kind, rank, la), d)) for d in DTYPES for la in LAYOUTS),
            *(m and f"{mib(m['saved'])} / {mib(m['peak'])}" for m in memory),
        ])  # fmt: skip
    return rows


def conv_section(run: Run) -> str:
    "Table 1: forward and backward of single convolutions, relative to the frozen one."
    parts = ["## 1. One convolution, forward and backward, relative to the frozen convolution"]
    convs, ranks = (CONVS[1:2], (16,)) if run.quick else (CONVS, (4, 16, 64))
    kinds = [("frozen", 0), ("full", 0), *((kind, rank) for rank in ranks for kind in [*METHODS, *PEERS])]
    run.say("1. single convolutions: memory")
    wanted = [(conv, dtype, Spec(*kind)) for conv in convs for dtype in DTYPES for kind in kinds if installed(kind[:1])]
    least = [w for w in wanted if w[2].rank in (0, 16) or w[:2] == (CONVS[1], "fp32")]  # the rest says nothing new
    least = [w for w in least if w[1] == "fp32" or not run.quick]
    sizes = memories([(conv_case(conv, dtype), spec) for conv, dtype, spec in least], run.device)
    times = [f"{dtype} {layout}" for dtype in DTYPES for layout in LAYOUTS]
    head = ["", "rank", *times, *(f"{dtype} MiB saved / peak" for dtype in DTYPES)]
    for conv in convs:
        rows = conv_rows(run, conv, kinds, sizes)
        parts.append(f"### {conv[0]} -> {conv[1]} channels, 3x3, batch 8 of {conv[2]}x{conv[2]}\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def conv_case(conv: tuple[int, int, int], dtype: str) -> Case:
    "Batch 8 for a conv of these channels and size."
    return Case("conv", (8, conv[0], conv[2], conv[2]), conv[1], dtype)


def installed(kinds: Iterable[str]) -> list[str]:
    "Those kinds whose library is there."
    packages = {"peft": "peft", "lycoris": "lycoris_lora"}
    return [k for k in kinds if packages.get(k.split("-")[0]) is None or library(packages[k.split("-")[0]]) != "absent"]


def library(name: str) -> str:
    "Version of a package, or 'absent'."
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def step_specs(dtype: str, rank: int, wide: bool) -> list[Spec]:
    "Candidates for a training step; contiguous are all in a wide fp32 run, else only those that face PEFT's DoRA."
    last = [Spec("full", 0, "channels_last"), Spec("full-train", 0, "channels_last")]
    last += [Spec(k, rank, "channels_last") for k in [*METHODS, *(PEERS if wide else PEERS[:2])]]
    plain = [Spec(k, rank) for k in [*METHODS, *PEERS[:2]]]
    return [*last, Spec("full"), *(s for s in plain if s.dora or (wide and dtype == "fp32"))]


def peer_of(times: Mapping[Spec, Times], spec: Spec) -> Spec:
    "PEFT's LoRA or DoRA of the same rank: channels_last where that works, contiguous where not."
    peer = Spec("peft-dora" if spec.dora else "peft-lora", spec.rank, "channels_last")
    return peer if peer in times else Spec(peer.kind, peer.rank)


def step_rows(times: Mapping[Spec, Times], counts: Mapping[Spec, int], rank: int, region: int) -> list[list[object]]:
    "Rows of one rank."
    rows, full, plain = [], Spec("full", 0, "channels_last"), Spec("full")
    for kind in [*METHODS, *PEERS]:
        last, other = Spec(kind, rank, "channels_last"), Spec(kind, rank)
        if last not in times and other not in times:
            continue
        count, ours = counts[last if last in counts else other], kind in METHODS
        rows.append([
            NAMES.get(kind, kind), rank, f"{count:,}", f"{count / region:.2f}", milliseconds(times, last),
            ratio(times, last, full), ratio(times, last, peer_of(times, last)) if ours else None,
            milliseconds(times, other), ratio(times, other, plain),
            ratio(times, other, Spec(peer_of(times, other).kind, rank)) if ours else None,
        ])  # fmt: skip
    return rows


def step_section(run: Run) -> str:
    "Table 2: whole training steps on the multi-view Unet."
    parts, region = [], region_parameters(MultiViewUnet(levels=2), REGION)
    ranks = (8, 64) if run.quick else (4, 8, 16, 64)
    plan = {(80, 64): 5.0} if run.quick else {(128, 128): 30.0, (80, 64): 10.0}
    head = ["", "rank", "parameters", "of region", "ms channels_last", "to full", "to PEFT", "ms contiguous",
            "to full", "to PEFT, both contiguous"]  # fmt: skip
    for (height, width), seconds in plan.items():
        for dtype in DTYPES:
            case, rows, tops = Case("step", (8, 1, height, width), dtype=dtype), [], []
            small, big, peers = [], [], []
            for rank in ranks:
                run.say(f"2. training step: {height}x{width} {dtype} rank {rank}")
                budget = seconds * (1.2 if dtype == "fp32" else 0.8)
                specs = step_specs(dtype, rank, wide=not run.quick and rank in (8, 64))
                times, counts = time_group(case, specs, run.device, budget, 3 if run.quick else 5, run.failures)
                rows += step_rows(times, counts, rank, region)
                for kind in ("full", "full-train") if rank == ranks[0] else ():
                    last, other = Spec(kind, 0, "channels_last"), Spec(kind)
                    count = counts[last]
                    tops.append([NAMES[kind], None, f"{count:,}", f"{count / region:.2f}", milliseconds(times, last),
                                 ratio(times, last, Spec("full", 0, "channels_last")), None, milliseconds(times, other),
                                 ratio(times, other, Spec("full")), None])  # fmt: skip
                for spec in (Spec(k, rank, "channels_last") for k in METHODS):
                    against = ratio(times, spec, Spec("full", 0, "channels_last"))
                    (small if counts[spec] <= region else big).append((against, f"{spec.kind} rank {rank}"))
                    if spec.kind in ("convlora", "convdora") and (peer := ratio(times, spec, peer_of(times, spec))):
                        peers.append(f"{spec.kind} rank {rank}: {peer.median:.2f}")
            run.summary += step_summary(f"training step, {height}x{width}, {dtype}", small, big, peers)
            parts.append(f"### Batch 8 of {height}x{width}, {dtype}\n\n{table(head, tops + rows)}")
    return "\n\n".join([f"## 2. A training step of the multi-view Unet (levels=2), region {REGION!r}", *parts])


def step_summary(what: str, small: list, big: list, peers: list[str]) -> list[str]:
    "The criteria in words: against full fine-tuning, below and above its number of parameters, and against PEFT."
    lines = []
    for found, text in ((small, "no more parameters than the region"), (big, "more parameters than the region")):
        if found:
            worst = max(found, key=lambda pair: pair[0].median)
            middle = quantiles([r.median for r, _ in found])[1]
            lines.append(f"{what}, channels_last, to full fine-tuning, {text}: median {middle:.2f}, highest "
                         f"{worst[0].median:.2f} ({worst[1]}; {worst[0].cpu:.2f} by processor time)")  # fmt: skip
    return lines + ([f"{what}, to PEFT's same method: {', '.join(peers)}"] if peers else [])


def memory_section(run: Run) -> str:
    "Table 3: memory of a training step."
    size, ranks = ((80, 64), (8,)) if run.quick else ((128, 128), (8, 64))
    ours = [Spec(k, r, "channels_last") for r in ranks for k in (("cp-lora", "convdora") if run.quick else METHODS)]
    layouts = {"peft-lora": "channels_last", "peft-dora": "contiguous"}
    peers = [Spec(k, r, layouts[k]) for r in ranks for k in installed(layouts)]
    specs = [Spec("full", 0, "channels_last"), *ours, Spec("full"), *peers]
    dtypes = DTYPES[1:] if run.quick else DTYPES
    cases = {dtype: Case("step", (8, 1, *size), dtype=dtype) for dtype in dtypes}
    run.say("3. memory of a training step")
    found = memories([(case, spec) for case in cases.values() for spec in specs], run.device)
    columns = ("saved MiB", "to full", "peak MiB", "to full")
    head = ["", "rank", "layout", *(f"{d} {t}" for d in dtypes for t in columns)]
    rows, worst = [], {}
    for spec in specs if found else ():
        row = [NAMES.get(spec.kind, spec.kind), spec.rank or None, spec.layout]
        for dtype, case in cases.items():
            mine, full = found[case, spec], found[case, Spec("full", 0, spec.layout)]
            row += [x for key in ("saved", "peak") for x in (mib(mine[key]), f"{mine[key] / full[key]:.3f}")]
            if spec.kind in METHODS:
                this = mine["peak"] / full["peak"], f"{spec.kind} rank {spec.rank}"
                worst[dtype] = max(worst.get(dtype, this), this)
        rows.append(row)
    for dtype, (value, who) in worst.items():
        run.summary.append(f"peak memory of a step to full fine-tuning, {dtype}: at most {value:.3f} ({who})")
    how = ("the GPU allocator's peak above what was allocated before the step" if run.device == "cuda" else
           "the process's peak resident memory above what was resident before the step, each candidate in a process of "
           "its own whose allocator returns blocks of 64 KiB and more at once")  # fmt: skip
    note = f"Saved: what autograd keeps between forward and backward. Peak: {how}. Ratios are within one layout."
    body = table(head, rows, 3) if rows else "Not measured: this needs Linux or a GPU."
    return f"## 3. Memory of a training step, batch 8 of {size[0]}x{size[1]}\n\n{note}\n\n{body}"


def merged_section(run: Run) -> str:
    "Table 4: inference of merged networks against the plain one."
    size, rows, found = (80, 64) if run.quick else (128, 128), {}, {}
    for dtype in DTYPES:
        run.say(f"4. merged inference: {dtype}")
        case = Case("step", (8, 1, *size), dtype=dtype)
        base = make_base(case, run.device)[0].to(memory_format=torch.channels_last)
        x = torch.rand(case.shape, generator=torch.Generator().manual_seed(1)).to(run.device)
        x = x.to(memory_format=torch.channels_last)
        nets = {Spec("plain"): base, Spec("the same, a copy"): deepcopy(base)}
        for kind in ("cp-lora", "convdora") if run.quick else METHODS:
            net = deepcopy(base)
            adapt(net, kind, rank=8, where=REGION)
            with torch.no_grad():
                for layer in adapted_layers(net).values():
                    for p in layer.adapter.parameters():
                        p.add_(0.01)
            nets[Spec(f"{kind}: not merged")] = deepcopy(net)
            nets[Spec(f"{kind}: merged_copy(net)")] = merged_copy(net)
            merge(net)
            nets[Spec(f"{kind}: merge(net)")] = net

        def call(net: nn.Module) -> Callable[[], Tensor]:
            def infer() -> Tensor:
                with torch.inference_mode(), precision(case, run.device):  # noqa: B023
                    return net(x)  # noqa: B023

            return infer

        calls = {spec: call(net.eval()) for spec, net in nets.items()}
        for untimed in calls.values():
            untimed()
        times = interleave(calls, 3 if run.quick else 20, 5 if run.quick else 7, run.device)
        for spec in nets:
            value = ratio(times, spec, Spec("plain"))
            rows.setdefault(spec.kind, [spec.kind]).extend([milliseconds(times, spec), value])
            if spec.kind != "plain":
                found.setdefault(spec.kind.rpartition(": ")[2], []).append(value)
    for what, values in found.items():
        wall, cpu = sorted(v.median for v in values), sorted(v.cpu for v in values)
        run.summary.append(f"inference to the plain network, {what}: {wall[0]:.3f} to {wall[-1]:.3f} "
                           f"({cpu[0]:.3f} to {cpu[-1]:.3f} by processor time)")  # fmt: skip
    head = ["", *(f"{d} {t}" for d in DTYPES for t in ("ms", "to plain"))]
    return f"## 4. Inference, batch 8 of {size[0]}x{size[1]}, channels_last, rank 8\n\n{table(head, rows.values())}"


def chain_section(run: Run) -> str:
    "Table 5: one convolution with the built weight against a chain of small ones, by width."
    ranks, layouts = ((8,), ["channels_last"]) if run.quick else ((4, 16, 64), list(LAYOUTS))
    rows, right, cost, cells = [], 0, 1.0, 0
    for width, size in ((32, 64), (64, 32), (128, 32), (256, 16)):
        run.say(f"5. weight or chain: width {width}")
        for rank in ranks:
            row: list[object] = [f"{width} -> {width}, {size}x{size}", rank]
            for dtype in DTYPES:
                for layout in layouts:
                    weight, chain, picks = chain_ratios(run, width, size, rank, dtype, layout)
                    better = chain.median < weight.median
                    right, cells = right + (picks == better), cells + 1
                    cost = max(cost, (chain.median / weight.median) ** (1 if picks else -1))
                    marks = " *" * better + " auto" * picks
                    row.append(f"{weight.median:.2f} / {chain.median:.2f}{marks}")
            rows.append(row)
    head = ["conv 3x3, batch 8", "rank", *(f"{d} {la}" for d in DTYPES for la in layouts)]
    note = ("Forward and backward of CP-LoRA relative to the frozen convolution: weight-space / chain of four small "
            "convolutions. `*`: the chain is faster. `auto`: execution=\"auto\" chooses the chain.")  # fmt: skip
    run.summary.append(f"CP-LoRA with execution=\"auto\" takes the faster way in {right} of {cells} cells of table 5; "
                       f"at worst it takes {cost:.2f} times as long as the other way")  # fmt: skip
    return f"## 5. CP-LoRA: the built weight or a chain of factors\n\n{note}\n\n{table(head, rows)}"


def chain_ratios(run: Run, width: int, size: int, rank: int, dtype: str, layout: str) -> tuple[Ratio, Ratio, bool]:
    "Weight-space and chain relative to the frozen convolution, and whether auto takes the chain."
    case, jobs = Case("conv", (8, width, size, size), width, dtype), {}
    base, names = make_base(case, run.device)
    for execution in ("frozen", "weight", "chain"):
        net = deepcopy(base).to(memory_format=LAYOUTS[layout])
        if execution != "frozen":
            adapt(net, "cp-lora", rank=rank, execution=execution)
        jobs[Spec(execution, rank, layout)] = conv_job(case, Spec("frozen", 0, layout), net, names, run.device)
    for job in jobs.values():
        job()
    times = interleave(jobs, 0.3 if run.quick else 0.5, 5, run.device)
    automatic = deepcopy(base)
    adapt(automatic, "cp-lora", rank=rank, execution="auto")
    frozen = Spec("frozen", rank, layout)
    weight, chain = (ratio(times, Spec(e, rank, layout), frozen) for e in ("weight", "chain"))
    return weight, chain, automatic[0].adapter.chained


# --- the file -----------------------------------------------------------------------------------------------------


def processor() -> str:
    "The processor's model, and whether it multiplies bf16."
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    values = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    values = {key.strip(): value.strip() for key, value in values.items()}
    flags = [f for f in ("avx512_bf16", "amx_bf16") if f in values.get("flags", "").split()]
    kind = [f"{key} {values[key]}" for key in ("cpu family", "model") if key in values]
    return f"{values.get('model name', platform.machine())} ({', '.join([*kind, *flags])})"


def gpu(device: str) -> list[str]:
    "What there is to say of the GPU that a benchmark used; nothing on a CPU."
    if device != "cuda":
        return []
    cudnn = torch.backends.cudnn
    return [f"GPU: {torch.cuda.get_device_name()}; CUDA {torch.version.cuda}; cuDNN {cudnn.version()}; TF32 in convolutions: {cudnn.allow_tf32}"]


def facts(run: Run, seconds: float, load: float) -> str:
    "The machine and the settings, without names or paths."
    lines = [f"Processor: {processor()}, {os.cpu_count()} cores; threads used: {torch.get_num_threads()}", *gpu(run.device)]
    packages = ("torch", "sahlora", "peft", "lycoris_lora")
    lines.append(f"Python {platform.python_version()}; " + ", ".join(f"{p} {library(p)}" for p in packages))
    lines.append("Environment: " + ", ".join(f"{key}={os.environ[key]}" for key in SETTINGS))
    lines.append(f"Load of the machine before the start: {load:.1f}; the run took {seconds / 60:.1f} minutes")
    return "\n".join(f"- {line}" for line in lines)


NOTES = """Cells read: median of the ratio within a round [quartiles] and the median of the same ratio by processor
time, which other programs on the machine disturb less. A dash: not run. Everything frozen is in eval mode:
batch norms use, and keep, the same running statistics in every candidate, full fine-tuning included (the
row "batch statistics" is what its own training loop does), and only the adapter's parameters, or the
region's, want gradients. "to PEFT" is PEFT's LoRA for LoRA forms and its DoRA for DoRA forms at the same
rank, in channels_last where that runs, else contiguous; only convLoRA and convDoRA are the same formula
there. LyCORIS's DoRA sends gradients through the norm. bf16 is autocast; the single convolutions then get
bf16 input, as within a network. MiB saved: what autograd keeps for backward; peak: above what is held
before; both with contiguous tensors in table 1."""


def shown(path: Path) -> str:
    "The path as the command shows it: relative to the working folder, or the name alone."
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def write(path: Path, text: str) -> None:
    "Whole or not at all."
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def main() -> None:
    "Measure, then write the file."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a rough table in less than two minutes")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if present")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="file to write")
    parser.add_argument(CHILD, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    warnings.filterwarnings("ignore")  # the peers' import-time warnings
    if options.memory_of:
        return memory_child(options.memory_of)
    if not options.out.parent.is_dir():
        parser.error(f"--out: there is no folder {options.out.parent}")
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    run, load = Run(options.quick, device), os.getloadavg()[0]
    sections = [section(run) for section in (conv_section, step_section, memory_section, merged_section, chain_section)]
    command = f"python benchmarks/adapters.py{' --quick' * run.quick} --device {device} --out {shown(options.out)}"
    parts = [f"# Speed and memory of the adapters{' (quick run: rough)' * run.quick}", f"Made by `{command}`.",
             facts(run, time.perf_counter() - run.begin, load), NOTES, "## Summary",
             "\n".join(f"- {line}" for line in run.summary)]  # fmt: skip
    if run.failures:
        parts.append("Peers that do not run:\n\n" + "\n".join(f"- {who}: `{why}`" for who, why in run.failures.items()))
    write(options.out, "\n\n".join([*parts, *sections]) + "\n")
    print(options.out)


if __name__ == "__main__":
    main()
