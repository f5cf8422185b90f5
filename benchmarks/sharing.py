"""How many training jobs share one device before they slow each other down, written as one Markdown file.

    python benchmarks/sharing.py [--jobs 1 2 4 8] [--steps 60] [--out benchmarks/sharing.md]

Every job is a process of its own with one CPU thread, as in a study: batches of 8 slices of the paper's study, 256 x 320. All jobs
of a row begin together, after a few untimed steps each.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from adapters import gpu, processor, shown, table, write

from sahlora.cohorts.cohort import Cohort, make_phantom_cohort
from sahlora.common.hardware import choose_device, choose_precision, keep_memory
from sahlora.cohorts.slices import open_store
from sahlora.training.transfer import Strategy, prepare
from sahlora.training.loop import train
from sahlora.unet import MultiViewUnet

DEVICE = choose_device()
BATCH, GRID, WARM = 8, (256, 320), 3
CHILD = "--child"  # how the program calls itself
STRATEGIES = {"all": {}, "cp-lora": {"rank": 8}}


def job(method: str, steps: int, folder: Path, number: int) -> dict[str, float]:
    "Train when the others are ready: seconds, and the GPU's memory in MiB."
    keep_memory()
    store = open_store(Cohort.read(folder / "cohort"), 4)
    torch.manual_seed(0)
    net = MultiViewUnet(levels=2)

    def run(count: int) -> None:
        strategy = Strategy(method, steps=count, batch_size=BATCH, **STRATEGIES[method])
        how = strategy.training_at(1e-3, 0)
        train(net, store, np.arange(len(store)), how, quiet=True)

    prepare(net, Strategy(method, **STRATEGIES[method]))
    run(WARM)
    (folder / f"ready-{number}").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
    begin = time.perf_counter()
    run(steps)
    seconds = time.perf_counter() - begin
    memory = torch.cuda.max_memory_reserved() // 2**20 if DEVICE.type == "cuda" else 0
    return {"seconds": seconds, "memory": memory}


def together(method: str, jobs: int, steps: int, folder: Path) -> list[dict[str, float]]:
    "So many jobs at a time."
    for old in (*folder.glob("ready-*"), *folder.glob("go")):
        old.unlink()
    command = [sys.executable, __file__, CHILD, method, str(steps), str(folder)]
    running = [subprocess.Popen([*command, str(k)], stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}) for k in range(jobs)]
    try:
        while len(list(folder.glob("ready-*"))) < jobs:
            if any(one.poll() is not None for one in running):
                sys.exit(f"a job of {method} ended before it began to train; see its error above")
            time.sleep(0.05)
        (folder / "go").touch()
        return [json.loads(one.communicate()[0].splitlines()[-1]) for one in running]
    finally:  # the others would wait for ever
        for one in running:
            one.kill()


def main() -> None:
    "Measure, then write the file."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2, 4, 8] if DEVICE.type == "cuda" else [1, 2], help="jobs at a time")
    parser.add_argument("--steps", type=int, default=60 if DEVICE.type == "cuda" else 3, help="timed steps of a job")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="file to write")
    parser.add_argument(CHILD, nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        method, steps, folder, number = options.child
        print(json.dumps(job(method, int(steps), Path(folder), int(number))))
        return
    if options.jobs[0] != 1:
        parser.error("--jobs begins with 1: the others are set against one job alone")
    folder = Path(tempfile.mkdtemp())
    open_store(make_phantom_cohort(folder / "cohort", "asah", 2, 7, GRID, workers=1), 4)
    rows = []
    for method in STRATEGIES:
        alone = None
        for jobs in options.jobs:
            found = together(method, jobs, options.steps, folder)
            rate = sum(options.steps * BATCH / one["seconds"] for one in found)
            alone = alone or rate
            rows.append([method, jobs, f"{rate:.1f}", f"{rate / alone:.2f}", f"{rate / jobs / alone:.2f}", sum(one["memory"] for one in found) or None])
            print(*rows[-1], file=sys.stderr, flush=True)
    shutil.rmtree(folder)
    facts = [f"Processor: {processor()}, {os.cpu_count()} cores; device {DEVICE}, one CPU thread a job", *gpu(DEVICE.type),
             f"Python {platform.python_version()}, torch {torch.__version__}, precision auto is {choose_precision(DEVICE)}"]  # fmt: skip
    jobs = " ".join(map(str, options.jobs))
    command = f"python benchmarks/sharing.py --jobs {jobs} --steps {options.steps} --out {shown(options.out)}"
    head = ["", "jobs at a time", "slices/s of all", "to one job alone", "speed of a job, to alone", "GPU memory that torch reserved, MiB"]
    parts = ["# Training jobs that share a device", f"Made by `{command}`. MultiViewUnet(levels=2), batches of {BATCH} slices of "
             f"{GRID[0]} x {GRID[1]}; adapters at rank 8 in the decoding region.", "\n".join(f"- {fact}" for fact in facts), table(head, rows)]
    write(options.out, "\n\n".join(parts) + "\n")
    print(options.out)


if __name__ == "__main__":
    main()
