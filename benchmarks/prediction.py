"""Slices per second and memory of `predict_scan` against a plain loop, written as one Markdown file.

    python benchmarks/prediction.py [--rounds 3] [--out benchmarks/prediction.md]

The plain loop takes one slice at a time through the same network, fp32, contiguous, its batch norms as they are. All
candidates run in one process and in turn, round after round, in a fresh order, after an untimed one; a ratio is taken
within a round. On a CPU the main table is made twice, in two processes: with the allocator settings that sahlora's
programs choose, and with glibc's.
"""

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from adapters import SETTINGS, gpu, processor, settle, shown, table, write
from torch import nn

from sahlora.ct import HeadCT, window
from sahlora.common.hardware import choose_device
from sahlora.phantom import make_case
from sahlora.prediction import predict_scan
from sahlora.unet import MultiViewUnet

ALLOCATOR = {key: value for key, value in SETTINGS.items() if key.startswith("MALLOC")}  # threads stay torch's choice
DEVICE = choose_device()
# Pixels: batch sizes; and slices of the sweeps' scans.
SWEEPS = {512: (1, 8, 32, 64), 64: (1, 64, 256)} if DEVICE.type == "cuda" else {512: (1, 2, 4, 8), 64: (1, 16, 64)}
SLICES = {512: 64, 64: 256} if DEVICE.type == "cuda" else {512: 8, 64: 64}
CHILD = "--child"  # how the program calls itself
Jobs = dict[str, Callable[[], object]]


def scan(pixels: int, slices: int) -> HeadCT:
    "A phantom of `pixels` x `pixels` and as many slices, repeated where a phantom has too few."
    case = make_case("tbi", seed=0, index=0, grid=(pixels, pixels))
    return HeadCT(np.tile(case.hu, (1, 1, -(-slices // case.hu.shape[2])))[..., :slices], case.affine, "phantom")


def network() -> nn.Module:
    "The paper's network with seeded weights; settled, so that no activation is a slow, denormal number."
    torch.manual_seed(0)
    net = MultiViewUnet(levels=2)
    settle(net, torch.from_numpy(window(scan(64, 28).slices()))[:, None])
    return net.eval()


@torch.inference_mode()
def plain_loop(net: nn.Module, ct: HeadCT) -> np.ndarray:
    "One slice at a time, fp32, contiguous: probabilities (X, Y, Z)."
    images, net = torch.from_numpy(window(ct.slices()))[:, None], net.to(DEVICE)
    return torch.cat([net(image[None].to(DEVICE)).sigmoid().cpu() for image in images])[:, 0].permute(2, 1, 0).numpy()


def interleave(jobs: Jobs, rounds: int) -> dict[str, list[float]]:
    "Seconds of every job, round by round."
    seconds, order = {name: [] for name in jobs}, list(jobs)
    for number in range(rounds + 1):
        random.Random(number).shuffle(order)
        for name in order:
            begin = time.perf_counter()
            jobs[name]()
            if number:  # the first one warms up
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def measure(rounds: int, sweeps: bool) -> dict[str, object]:
    "Everything that is timed under one allocator setting."
    net, found = network(), {"threads": torch.get_num_threads(), "sweeps": {}}
    for pixels, batches in SWEEPS.items() if sweeps else ():
        ct = scan(pixels, SLICES[pixels])
        jobs: Jobs = {"plain": lambda ct=ct: plain_loop(net, ct)}
        jobs |= {f"{precision} {batch}": lambda ct=ct, p=precision, b=batch: predict_scan(net, ct, batch=b, precision=p)
                 for precision in ("fp32", "bf16") for batch in batches}  # fmt: skip
        found["sweeps"][str(pixels)] = interleave(jobs, rounds)
    ct = scan(512, 40)
    exact, fast = plain_loop(net, ct), predict_scan(net, ct).probabilities
    found["apart"] = {"mean": float(np.abs(fast - exact).mean()), "max": float(np.abs(fast - exact).max())}
    found["whole"] = interleave({"plain": lambda: plain_loop(net, ct), "predict_scan": lambda: predict_scan(net, ct)}, rounds)
    return found


def peak(precision: str) -> dict[str, object]:
    "Peak resident memory of a process that predicts one 512 x 512 x 40 scan, in MiB; `loaded`: before the prediction."
    net, ct = network(), scan(512, 40)
    status = Path("/proc/self/status").read_text()
    resident = int(status.split("VmRSS:")[1].split()[0]) // 1024
    prediction = predict_scan(net, ct, precision=precision)
    gpu_peak = torch.cuda.max_memory_allocated() // 2**20 if DEVICE.type == "cuda" else 0
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "loaded": resident, "gpu": gpu_peak,
            "precision": prediction.precision, "batch": prediction.batch}


def child(task: str, allocator: dict[str, str]) -> dict[str, object]:
    "A task's answer from a process of its own, under an allocator's settings."
    env = {key: value for key, value in os.environ.items() if key not in SETTINGS} | allocator
    done = subprocess.run([sys.executable, __file__, CHILD, task], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def within_rounds(seconds: dict[str, list[float]], name: str) -> float:
    "How many times as fast as the plain loop: the median over rounds."
    return statistics.median(a / b for a, b in zip(seconds["plain"], seconds[name]))


def sweep_table(pixels: str, seconds: dict[str, list[float]]) -> str:
    "Batch sizes and precisions on one slice size."
    n, rows = SLICES[int(pixels)], []
    for batch in SWEEPS[int(pixels)]:
        row: list[object] = [batch]
        for precision in ("fp32", "bf16"):
            times = seconds[f"{precision} {batch}"]
            row += [f"{n / statistics.median(times):.1f}", f"{within_rounds(seconds, f'{precision} {batch}'):.2f}"]
        rows.append(row)
    plain = n / statistics.median(seconds["plain"])
    head = ["slices at once", "fp32 slices/s", "to the plain loop", "bf16 slices/s", "to the plain loop"]
    return f"{pixels} x {pixels} ({n} slices; plain loop {plain:.1f} slices/s):\n\n{table(head, rows)}"


def section(title: str, found: dict[str, object], memory: dict[str, dict]) -> str:
    "What was found under one allocator setting."
    whole = found["whole"]
    rows = [[name, f"{40 / statistics.median(times):.1f}", f"{within_rounds(whole, name):.2f}",
             f"{min(a / b for a, b in zip(whole['plain'], times)):.2f}"] for name, times in whole.items()]  # fmt: skip
    parts = [f"## {title}", "512 x 512 x 40, batch as `predict_scan` chooses it:",
             table(["", "slices/s", "to the plain loop, median", "lowest round"], rows),
             f"Probabilities against the plain loop: {found['apart']['mean']:.1e} apart in the mean, "
             f"{found['apart']['max']:.1e} at most (an untrained network)."]  # fmt: skip
    parts += ["Peak memory of the whole process: " + "; ".join(
        f"{m['precision']}, {m['batch']} at once: {m['peak']} MiB ({m['loaded']} MiB before predicting)"
        + (f", {m['gpu']} MiB of the GPU's" if m["gpu"] else "")
        for m in memory.values()) + "."]  # fmt: skip
    return "\n\n".join(parts + [sweep_table(pixels, seconds) for pixels, seconds in found["sweeps"].items()])


def main() -> None:
    "Measure, then write the file."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each table")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="file to write")
    parser.add_argument(CHILD, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, argument = options.child.split(":")
        print(json.dumps(peak(argument) if kind == "peak" else measure(int(argument), kind == "sweeps")))
        return
    begin, load = time.perf_counter(), os.getloadavg()[0]
    settings = {"With sahlora's allocator settings": ALLOCATOR}
    if DEVICE.type == "cpu":  # on a GPU the allocator of the host hardly matters
        settings["With glibc's own allocator settings"] = {}
    sections, threads = [], 0
    for title, allocator in settings.items():
        found = child(f"{'sweeps' if allocator else 'time'}:{options.rounds}", allocator)
        threads = found["threads"]
        sections.append(section(title, found, {p: child(f"peak:{p}", allocator) for p in ("bf16", "fp32")}))
    facts = [f"Processor: {processor()}, {os.cpu_count()} cores; threads used: {threads}; device {DEVICE}", *gpu(DEVICE.type),
             f"Python {platform.python_version()}, torch {torch.__version__}",
             "sahlora's settings: " + ", ".join(f"{key}={value}" for key, value in ALLOCATOR.items()),
             f"Load of the machine before the start: {load:.1f}; the run took "
             f"{(time.perf_counter() - begin) / 60:.1f} minutes"]  # fmt: skip
    command = f"python benchmarks/prediction.py --rounds {options.rounds} --out {shown(options.out)}"
    parts = ["# Speed and memory of prediction", f"Made by `{command}`. MultiViewUnet(levels=2), phantoms.",
             "\n".join(f"- {fact}" for fact in facts), *sections]  # fmt: skip
    write(options.out, "\n\n".join(parts) + "\n")
    print(options.out)


if __name__ == "__main__":
    main()
