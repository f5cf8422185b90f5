"""Slices per second, share of the machine's arithmetic, and memory of training, written as one Markdown file.

    python benchmarks/training.py [--rounds 3] [--speeds] [--out benchmarks/training.md]

The plain loop is the way of the paper's group: batches of two slices, one with blood, each augmented by itself; fp32,
contiguous, MONAI's loss, Adam. All candidates run in one process and in turn, round after round in a fresh order, after an
untimed round; a ratio is taken within a round. What allocator settings bring is measured in processes of their own.
"""

import argparse
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from adapters import SETTINGS, gpu, processor, shown, table, write
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sahlora.cohorts.cohort import Cohort, make_phantom_cohort
from sahlora.cohorts.folds import Fold
from sahlora.common.hardware import choose_device, choose_precision, keep_memory
from sahlora.cohorts.slices import SliceStore, open_store
from sahlora.training.transfer import Strategy, cross_validate, prepare
from sahlora.training.loop import pretrain, train
from sahlora.unet import MultiViewUnet

ADAPTERS = ("lora-c", "convlora", "cp-lora", "dora-c", "convdora", "cp-dora")
DEVICE = choose_device()
BATCH, PLAIN_BATCH = 8, 2
# Steps by pixels, and rows of the products that measure the machine: enough to be timed.
STEPS, MATRIX = ({256: 20, 64: 20}, 8192) if DEVICE.type == "cuda" else ({256: 3, 64: 20}, 2048)
CHILD = "--child"  # how the program calls itself
Jobs = dict[str, Callable[[], object]]
Seconds = dict[str, list[float]]


# --- the plain loop -----------------------------------------------------------------------------------------------


def blur(field: Tensor, sigma: float) -> Tensor:
    "Gaussian blur of (1, 1, H, W), separable: kinder to this loop than the 33 x 33 kernel that torchvision applies."
    x = torch.arange(-4 * sigma, 4 * sigma + 1)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel, pad = kernel / kernel.sum(), len(x) // 2
    field = F.conv2d(F.pad(field, (pad, pad, 0, 0), mode="reflect"), kernel.view(1, 1, 1, -1))
    return F.conv2d(F.pad(field, (0, 0, pad, pad), mode="reflect"), kernel.view(1, 1, -1, 1))


def one_sample(hu: np.ndarray, mask: np.ndarray) -> tuple[Tensor, Tensor]:
    "Window, elastic deformation with probability 1/2 and flip with 1/2, of one slice."
    image, mask = torch.from_numpy(np.clip(hu, 0, 140) / 140 * 255).float()[None], torch.from_numpy(mask).float()[None]
    height, width = image.shape[1:]
    if torch.rand(1) < 0.5:
        moves = [blur(torch.rand(1, 1, height, width) * 2 - 1, 4)[0, 0] * 5 / n for n in (height, width)]
        grid = F.affine_grid(torch.eye(2, 3)[None], (1, 1, height, width), align_corners=False) + torch.stack(moves, -1)[None]
        both = F.grid_sample(torch.stack([image, mask], 1), grid, align_corners=False)[0]
        image, mask = both[:1], (both[1:] > 0).float()
    if torch.rand(1) < 0.5:
        image, mask = image.flip(-1), mask.flip(-1)
    return image, mask


class Slices(torch.utils.data.Dataset):
    "Slices in memory, with and without blood in turn."

    def __init__(self, hu: np.ndarray, masks: np.ndarray):
        has = masks.any((1, 2))
        pairs = zip(np.flatnonzero(has), np.flatnonzero(~has))
        self.hu, self.masks, self.order = hu, masks, [int(k) for pair in pairs for k in pair]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        return one_sample(self.hu[self.order[k]], self.masks[self.order[k]])


def plain_loop(data: Slices, slices: int) -> Callable[[], None]:
    "A job that trains the whole network on so many slices, two at a time."
    from monai.losses import DiceLoss

    torch.manual_seed(0)
    net, loss = MultiViewUnet(levels=2).to(DEVICE).train(), DiceLoss(sigmoid=True, batch=True)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from torch.utils.data.DataLoader(data, batch_size=PLAIN_BATCH)

    batches = endless()

    def job() -> None:
        for _ in range(slices // PLAIN_BATCH):
            images, masks = (t.to(DEVICE) for t in next(batches))
            optimizer.zero_grad()
            value = loss(net(images), masks)
            value.backward()
            optimizer.step()
            value.item()

    return job


# --- ours ---------------------------------------------------------------------------------------------------------


def our_loop(store: SliceStore, strategy: Strategy, whole_graph: bool = False) -> Callable[[], object]:
    """A job that trains by a strategy, from a new optimizer on.

    `whole_graph`: with gradients through the frozen part too, for which an input that wants one is enough.
    """
    torch.manual_seed(0)
    net = MultiViewUnet(levels=2)
    prepare(net, strategy)
    if whole_graph:
        net.register_forward_pre_hook(lambda module, inputs: (inputs[0].detach().requires_grad_(),))
    how = strategy.training_at(1e-3, 0)
    return lambda: train(net, store, np.arange(len(store)), how, quiet=True)


def strategy(method: str, pixels: int, precision: str = "auto") -> Strategy:
    "A strategy for so many steps."
    return Strategy(method, steps=STEPS[pixels], batch_size=BATCH, precision=precision)


def flops(method: str, pixels: int) -> float:
    "Floating-point operations of one step, forward and backward, by torch's counter."
    net = MultiViewUnet(levels=2)
    prepare(net, Strategy(method))
    with FlopCounterMode(display=False) as counter:
        net.train()(torch.rand(BATCH, 1, pixels, pixels)).sum().backward()
    return float(counter.get_total_flops())


def product(dtype: torch.dtype) -> Callable[[], Tensor]:
    "A job: one square matrix product."
    a, b = (torch.rand(MATRIX, MATRIX, device=DEVICE).to(dtype) for _ in range(2))
    return lambda: a @ b


# --- measuring ----------------------------------------------------------------------------------------------------


def wait() -> None:
    "Until the device has done what it was asked."
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def interleave(jobs: Jobs, rounds: int) -> Seconds:
    "Seconds of every job, round by round."
    seconds, order = {name: [] for name in jobs}, list(jobs)
    for number in range(rounds + 1):
        random.Random(number).shuffle(order)
        for name in order:
            wait()
            begin = time.perf_counter()
            jobs[name]()
            wait()
            if number:  # the first one warms up
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def cohort_of(folder: Path, pixels: int) -> Cohort:
    "Two phantoms of 256 x 256, eight of 64 x 64."
    return make_phantom_cohort(folder / str(pixels), "asah", 2 if pixels > 100 else 8, 7, (pixels, pixels), workers=1)


def speeds(folder: Path, pixels: int, rounds: int, only: tuple[str, ...] = ()) -> Seconds:
    "Seconds of every candidate for BATCH * STEPS slices."
    store, steps = open_store(Cohort.read(folder / str(pixels)), 4), STEPS[pixels]
    hu, masks = store.read(range(len(store)))
    data = Slices(hu[:, 0].numpy(), masks[:, 0].numpy())
    jobs: dict[str, Callable[[], Callable[[], object]]] = {
        "plain": lambda: plain_loop(data, steps * BATCH),
        "all": lambda: our_loop(store, strategy("all", pixels)),
        "all, fp32": lambda: our_loop(store, strategy("all", pixels, "fp32")),
        "decoding": lambda: our_loop(store, strategy("decoding", pixels)),
        **{m: lambda m=m: our_loop(store, strategy(m, pixels)) for m in ADAPTERS},
        "cp-lora, whole graph": lambda: our_loop(store, strategy("cp-lora", pixels), whole_graph=True),
        "product bf16": lambda: product(torch.bfloat16), "product fp32": lambda: product(torch.float32),
    }  # fmt: skip
    return interleave({name: make() for name, make in jobs.items() if not only or name in only}, rounds)


def many(folder: Path) -> dict[str, object]:
    "A cohort of many cases: seconds until the first step of training is done, and peak memory of this process in MiB."
    begin, first = time.perf_counter(), []
    store = open_store(Cohort.read(folder), 4)
    opened = time.perf_counter() - begin
    net = MultiViewUnet(levels=2)
    net.first.register_full_backward_hook(lambda *_: first.append(time.perf_counter() - begin))
    train(net, store, np.arange(len(store)), Strategy("all", steps=50, batch_size=BATCH).training_at(1e-3, 0), quiet=True)
    return {"cases": len(set(store.cases)), "slices": len(store), "opened": opened, "first": first[0],
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}  # fmt: skip


def link_cases(source: Cohort, folder: Path, cases: int) -> None:
    "A cohort of so many cases whose files are links to those of a few."
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    rows = []
    for k in range(cases):
        row = source.table.iloc[k % len(source.table)].copy()
        for kind in ("image", "label"):
            link = folder / f"{kind}s" / f"c{k:04}.nii.gz"
            link.symlink_to((source.folder / row[kind]).resolve())
            row[kind] = str(link.relative_to(folder))
        row["case"], row["patient"] = f"c{k:04}", f"p{k:04}"
        rows.append(row)
    source.table.iloc[:0].from_records(rows, columns=source.table.columns).to_csv(folder / "cohort.csv", index=False)


def precisions(folder: Path) -> dict[str, list[float]]:
    "Soft Dice of the same test patients after the same training in fp32 and in bf16."
    source, target = (Cohort.read(folder / name) for name in ("source", "target"))
    found = {}
    for precision in ("fp32", "bf16"):
        out = folder / precision
        training = {"steps": 400, "batch_size": BATCH, "learning_rate": 1e-3, "seed": 0, "precision": precision}
        pretrain(source, out, {"name": "multi-view-unet"}, training, quiet=True)
        fold = Fold(tuple(target.patients[:6]), tuple(target.patients[6:]))
        how = Strategy("cp-lora", steps=100, batch_size=BATCH, learning_rate=1e-2, precision=precision)
        table = cross_validate(out / "model.safetensors", target, how, [fold], out / "run", quiet=True)
        found[precision] = table.dice_soft.tolist()
    return found


# --- processes ----------------------------------------------------------------------------------------------------


def child(task: str, folder: Path, ours: bool, threads: int) -> dict:
    "A task's answer from a process of its own, with our allocator settings or glibc's own."
    env = {key: value for key, value in os.environ.items() if key not in SETTINGS} | {"OMP_NUM_THREADS": str(threads)}
    env |= {"SAHLORA_BENCHMARK_ALLOCATOR": "ours" if ours else "glibc"}
    done = subprocess.run([sys.executable, __file__, CHILD, task, str(folder)], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def answer(task: str, folder: Path) -> object:
    "What a child prints."
    if os.environ["SAHLORA_BENCHMARK_ALLOCATOR"] == "ours":
        keep_memory()
    kind, *arguments = task.split(":")
    if kind == "speeds":
        pixels, rounds, only = arguments
        return speeds(folder, int(pixels), int(rounds), tuple(filter(None, only.split(";"))))
    return {"many": many, "precisions": precisions}[kind](folder)


def prepare_folder(folder: Path, speeds_alone: bool) -> None:
    "Phantoms on disk; caches of the slices are made here as well."
    for pixels in STEPS:
        open_store(cohort_of(folder, pixels), 4)
    if speeds_alone:
        return
    for name, kind, cases in (("source", "tbi", 12), ("target", "asah", 12)):
        make_phantom_cohort(folder / name, kind, cases, 41, (64, 80))
    few = make_phantom_cohort(folder / "few", "asah", 4, 9, (64, 80))
    link_cases(few, folder / "many", 2000)


# --- the page -----------------------------------------------------------------------------------------------------


def ratio(seconds: Seconds, one: str, other: str) -> tuple[str, str]:
    "How many times as fast `one` is as `other`: median over rounds, and the lowest."
    found = [b / a for a, b in zip(seconds[one], seconds[other])]
    return f"{statistics.median(found):.2f}", f"{min(found):.2f}"


def speed_table(seconds: Seconds, pixels: int) -> str:
    "Slices per second of every candidate."
    slices, rows = STEPS[pixels] * BATCH, []
    for name in seconds:
        if not name.startswith("product"):
            rate = slices / statistics.median(seconds[name])
            time_of_all = statistics.median(a / b for a, b in zip(seconds[name], seconds["all"]))
            rows.append([name, f"{rate:.1f}", *ratio(seconds, name, "plain"), f"{time_of_all:.2f}"])
    return table(["", "slices/s", "to the plain loop, median", "lowest round", "time to `all`"], rows)


def share_table(seconds: Seconds, pixels: int) -> str:
    "What part of the machine's own matrix throughput training reaches."
    rows, work, multiply = [], flops("all", pixels) * STEPS[pixels], 2 * MATRIX**3
    auto = choose_precision(DEVICE)
    for name, precision in (("all", auto), ("all, fp32", "fp32")):
        machine = [multiply / s for s in seconds[f"product {precision}"]]
        ours = [work / s for s in seconds[name]]
        shares = [a / b for a, b in zip(ours, machine)]
        rows.append([precision, f"{statistics.median(ours) / 1e9:.0f}", f"{statistics.median(machine) / 1e9:.0f}",
                     f"{statistics.median(shares):.2f}", f"{min(shares):.2f}"])
    return table(["precision", "training, GFLOP/s", f"{MATRIX} x {MATRIX} product, GFLOP/s", "share", "lowest round"], rows)


def section(seconds: Seconds, pixels: int) -> str:
    "Everything about one slice size."
    whole = statistics.median(b / a for a, b in zip(seconds["cp-lora"], seconds["cp-lora, whole graph"]))
    return "\n\n".join([
        f"## {pixels} x {pixels}", f"Batches of {BATCH} slices (plain loop: {PLAIN_BATCH}); adapters at rank 8 in the decoding region.",
        speed_table(seconds, pixels), "Share of the arithmetic, all parameters trained, augmentation and optimizer within:",
        share_table(seconds, pixels), "A share above 1 says that convolutions run faster than a plain product here.",
        f"The frozen prefix: with gradients through the whole network a step of CP-LoRA takes {whole:.2f} times as long."])


def settings_section(folder: Path, rounds: int, threads: int) -> str:
    "What the allocator brings: the plain loop and ours, each in its own process, in turn."
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, job, ours in (("plain, glibc's own settings", "plain", False), ("plain, ours", "plain", True),
                                ("all, glibc's own settings", "all", False), ("all, ours", "all", True)):
            seconds = child(f"speeds:256:1:{job}", folder, ours, threads)[job][0]
            found.setdefault(name, []).append(seconds)
    base = found["plain, glibc's own settings"]
    rows = [[name, f"{STEPS[256] * BATCH / statistics.median(times):.1f}",
             f"{statistics.median(b / a for a, b in zip(times, base)):.2f}"] for name, times in found.items()]
    return "\n\n".join(["## Allocator settings", "256 x 256, a process each; the last line is the whole gain.",
                        table(["", "slices/s", "to the first line"], rows)])


def other_sections(folder: Path, rounds: int, threads: int) -> list[str]:
    "What is not a table of speeds: the allocator, many cases, and the two precisions."
    sections = [settings_section(folder, rounds, threads)]
    cold, warm = (child("many", folder / "many", True, threads) for _ in range(2))
    sections.append("\n\n".join(["## Many cases", f"{warm['cases']} cases, {warm['slices']} slices of 64 x 80 (links to four phantoms):",
        table(["cache", "cohort opened, s", "first step done, s", "peak memory, MiB"],
              [[name, f"{m['opened']:.1f}", f"{m['first']:.1f}", m["peak"]] for name, m in (("cold", cold), ("warm", warm))])]))
    dice = child("precisions", folder, True, threads)
    apart = [abs(a - b) for a, b in zip(dice["fp32"], dice["bf16"])]
    sections.append("\n\n".join(["## bf16 against fp32", "Pre-training (400 steps) and CP-LoRA (100 steps) in either precision, soft "
        f"Dice of six phantoms (synthetic, no clinical claim): fp32 {statistics.mean(dice['fp32']):.3f}, bf16 "
        f"{statistics.mean(dice['bf16']):.3f}; a patient differs by {statistics.mean(apart):.3f} in the mean, {max(apart):.3f} at most."]))
    return sections


def main() -> None:
    "Measure, then write the file."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each table")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of every process")
    parser.add_argument("--speeds", action="store_true", help="the tables of slices per second alone")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="file to write")
    parser.add_argument(CHILD, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(answer(options.child[0], Path(options.child[1]))))
        return
    begin, load, folder = time.perf_counter(), os.getloadavg()[0], Path(tempfile.mkdtemp())
    prepare_folder(folder, options.speeds)
    sections = [section(child(f"speeds:{pixels}:{options.rounds}:", folder, True, options.threads), pixels) for pixels in STEPS]
    sections += [] if options.speeds else other_sections(folder, options.rounds, options.threads)
    shutil.rmtree(folder)
    facts = [f"Processor: {processor()}, {os.cpu_count()} cores; device {DEVICE}, threads {options.threads}", *gpu(DEVICE.type),
             f"Python {platform.python_version()}, torch {torch.__version__}, precision auto is {choose_precision(DEVICE)}",
             "Our allocator settings: " + ", ".join(f"{k}={v}" for k, v in SETTINGS.items() if k.startswith("MALLOC")),
             f"Load of the machine before the start: {load:.1f}; the run took {(time.perf_counter() - begin) / 60:.1f} minutes"]
    command = (f"python benchmarks/training.py --rounds {options.rounds} --threads {options.threads}{' --speeds' * options.speeds}"
               f" --out {shown(options.out)}")
    parts = ["# Speed and memory of training", f"Made by `{command}`. MultiViewUnet(levels=2), phantoms.",
             "\n".join(f"- {fact}" for fact in facts), *sections]
    write(options.out, "\n\n".join(parts) + "\n")
    print(options.out)


if __name__ == "__main__":
    main()
