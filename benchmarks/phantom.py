"""Time and memory of synthetic cases, one thread each: python benchmarks/phantom.py writes benchmarks/phantom.md."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import multiprocessing
import platform
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from sahlora.phantom import KINDS, make_case

GRIDS = ((64, 80), (128, 160), (256, 256))
CASES = 6
Row = tuple[list[float], list[float], float]


def worker(grid: tuple[int, int], kind: str) -> Row:
    "CPU seconds and wall seconds of a few cases, each sorted, and this process's peak memory in GiB."
    cpu, wall = [], []
    for index in range(CASES):
        started = time.process_time(), time.perf_counter()
        make_case(kind, 950, index, grid)
        cpu.append(time.process_time() - started[0])
        wall.append(time.perf_counter() - started[1])
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB here
    return sorted(cpu), sorted(wall), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def fresh(grid: tuple[int, int], kind: str) -> Row:
    "The same in a new process that has done nothing else."
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(worker, grid, kind).result()


def one(job: tuple[str, int]) -> float:
    "CPU seconds of one case."
    started = time.process_time()
    make_case(job[0], 951, job[1])
    return time.process_time() - started


def main() -> None:
    load = os.getloadavg()[0]
    columns = ("kind", "grid", "CPU s, median", "CPU s, slowest", "wall s, median", "peak memory of the worker, GiB")
    rows = [f"| {' | '.join(columns)} |", "|---|---|---|---|---|---|"]
    for kind in KINDS:
        for grid in GRIDS:
            cpu, wall, peak = fresh(grid, kind)
            rows.append(f"| {kind} | {grid[0]} x {grid[1]} x 28 | {cpu[CASES // 2]:.2f} | {cpu[-1]:.2f} "
                        f"| {wall[CASES // 2]:.2f} | {peak:.2f} |")
    started = time.perf_counter()
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        spent = sum(pool.map(one, [("tbi", k) for k in range(46)] + [("asah", k) for k in range(30)]))
    wall = time.perf_counter() - started
    text = ["# Synthetic head CT: cost", "", "    python benchmarks/phantom.py", "",
            f"{CASES} cases per row, one thread; each row is a fresh process, with its peak memory (ru_maxrss).", "",
            *rows, "",
            f"46 + 30 cases at 64 x 80 x 28 by two workers: {wall:.0f} s wall, {spent:.0f} s CPU in all.", "",
            f"{platform.machine()}, {os.cpu_count()} cores (load {load:.1f} at the start):",
            "where wall and CPU differ, other work was running.", ""]
    (Path(__file__).parent / "phantom.md").write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
