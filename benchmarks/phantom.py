"""Time and memory of one synthetic case, on one core: python benchmarks/phantom.py writes benchmarks/phantom.md."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import platform
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from sahlora.phantom import KINDS, make_case

GRIDS = ((64, 80), (128, 160), (256, 256))
CASES = 6


def seconds(kind: str, grid: tuple[int, int]) -> list[float]:
    "Seconds of CPU for each of a few cases, shortest first."
    taken = []
    for index in range(CASES):
        started = time.process_time()
        make_case(kind, 950, index, grid)
        taken.append(time.process_time() - started)
    return sorted(taken)


def one(job: tuple[str, int]) -> None:
    make_case(job[0], 951, job[1])


def main() -> None:
    rows = ["| kind | grid | median s | slowest s |", "|---|---|---|---|"]
    for kind in KINDS:
        for grid in GRIDS:
            taken = seconds(kind, grid)
            rows.append(f"| {kind} | {grid[0]} x {grid[1]} x 28 | {taken[CASES // 2]:.2f} | {taken[-1]:.2f} |")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    started = time.perf_counter()
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(one, [("tbi", k) for k in range(46)] + [("asah", k) for k in range(30)]))
    wall = time.perf_counter() - started
    text = ["# Synthetic head CT: cost", "", f"CPU seconds of one case on one core, {CASES} cases each.", "", *rows, "",
            f"Peak memory of a worker: {peak:.2f} GiB. 46 + 30 cases at 64 x 80 x 28 by two workers: {wall:.0f} s,",
            f"at a load of {os.getloadavg()[0]:.1f} ({platform.machine()}, {os.cpu_count()} cores).", ""]
    (Path(__file__).parent / "phantom.md").write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
