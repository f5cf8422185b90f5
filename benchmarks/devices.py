"""The same study on two kinds of hardware: how far apart scores and verdicts are, written as one Markdown file.

    python benchmarks/devices.py paper/results runs/demo-gpu/report --out benchmarks/devices.md

Each folder is a report of a study; demo-gpu is paper/studies/demo.yaml under another name with `seeds: [0]`, run on an H200: 26 runs
twelve at a time, the other six at once on another machine of that kind, where pre-training gave the same weights, bit for bit.
Runs that both have are compared, so a study of fewer seeds may stand beside one of more.
Synthetic, no clinical claim.
"""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
from adapters import shown, table, write
from scipy.stats import spearmanr

from sahlora.adapters import METHODS
from sahlora.common.files import read_json
from sahlora.common.style import RunId, read_run
from sahlora.evaluation.claims import REVISION, Claim, Plan, judge
from sahlora.report.results import read_results, tested_rows

Results = dict[str, Any]


def runs_of(results: Results) -> dict[str, RunId]:
    "The runs of a study by their names."
    return {run["id"]: read_run(run) for run in results["runs"]}


def hardware(folder: Path, results: Results) -> str:
    "Processor or GPU, torch, jobs, and the seconds of one."
    cost = pd.DataFrame(read_json(folder / "cost.json")).T
    seconds = cost.seconds.astype(float)
    trained = seconds[[run["id"] for run in results["runs"] if run["trainable"]]]
    made = " and ".join(sorted(set(cost.processor)))
    seeds = ", ".join(map(str, sorted({run.replicate for run in runs_of(results).values()})))
    return (f"{made}, torch {results['provenance']['torch']}; seeds {seeds}; "
            f"{len(cost)} jobs, {seconds.sum() / 3600:.2f} h together; "
            f"a run that trains takes {trained.min():.0f} to {trained.max():.0f} s "
            "(one thread, jobs side by side)")


def soft_dice(results: Results) -> pd.Series:
    "Soft Dice of the tested patients by run (a RunId) and patient."
    rows = pd.DataFrame(results["patients"]).query("role == 'test'")
    return rows.assign(run=rows.run.map(runs_of(results))).set_index(["run", "patient"]).dice_soft


def compared(one: pd.Series, other: pd.Series) -> pd.DataFrame:
    """Mean on either side by run, difference of the means, and of single patients.

    `each`, `most`: mean and largest absolute difference of a patient.
    """
    both = pd.DataFrame({"one": one, "other": other}).dropna()
    both["gap"] = both.other - both.one
    both["distance"] = both.gap.abs()
    return both.groupby(level="run").agg(
        one=("one", "mean"), other=("other", "mean"), gap=("gap", "mean"),
        each=("distance", "mean"), most=("distance", "max"))


def seeds_apart(one: pd.Series) -> float:
    "Mean distance between seeds 0 and 1 of a strategy, for scale. NaN where there is one seed."
    means = one.groupby(level="run").mean()
    seeds = {k: {run.strategy: dice for run, dice in means.items() if run.replicate == k} for k in (0, 1)}
    apart = (pd.Series(seeds[0], dtype=float) - pd.Series(seeds[1], dtype=float)).abs().dropna()
    return float(apart[apart > 0].mean())  # what does not train is the same with every seed


def ledger(results: Results, runs: set[RunId]) -> list[Claim]:
    "The claims from these runs alone."
    rows = tested_rows(results)
    rows = rows[rows.run.map(runs_of(results)).isin(runs)]
    trainable = {read_run(run): run["trainable"] for run in results["runs"] if run["id"] in set(rows.run)}
    return judge(rows, trainable, Plan(**results["plan"]))


def outcome(claim: Claim) -> str:
    "Verdict, effect and interval."
    if claim.effect is None or claim.interval is None:
        return claim.verdict
    return f"{claim.verdict}, {claim.effect:+.3f} ({claim.interval[0]:+.3f} to {claim.interval[1]:+.3f})"


def claims_table(one: Results, other: Results, common: set[RunId]) -> str:
    "Each claim on either machine; on the first from all its runs, and from those that both have."
    every = set(runs_of(one).values())
    ledgers = [ledger(one, every), ledger(one, common), ledger(other, common)]
    rows = [[three[0].claim, *map(outcome, three)] for three in zip(*ledgers)]
    return table(["claim", "first, all runs", "first, the same runs", "second"], rows, words=4)


def summary(rows: pd.DataFrame, seeds: float) -> str:
    "How far apart the machines are, in words; `rows` of `compared`, `seeds`: distance of two seeds."
    adapters = rows[[run.method in METHODS for run in rows.index]]
    distances = rows.gap.abs()
    return (
        f"Soft Dice of the {len(rows)} runs that both have. **Synthetic, no clinical claim.** "
        "Rounding differs between processors, so the base network differs and with it every run. "
        f"Means of strategies are {distances.mean():.3f} apart in the mean and {distances.max():.3f} "
        f"at most; two seeds on the first machine are {seeds:.3f} apart in the mean. The order of all "
        f"strategies agrees with Spearman's rho {spearmanr(rows.one, rows.other).statistic:.2f}, that "
        f"of the adapters alone with {spearmanr(adapters.one, adapters.other).statistic:.2f}.")


def main() -> None:
    "Compare, then write the file."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs=2, help="two reports of a study")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="file to write")
    options = parser.parse_args()
    results = [read_results(folder)[0] for folder in options.folders]
    one = soft_dice(results[0])
    rows = compared(one, soft_dice(results[1]))
    lines = [[run.strategy.label, f"{r.one:.3f}", f"{r.other:.3f}", f"{r.gap:+.3f}", f"{r.each:.3f}", f"{r.most:.3f}"]
             for run, r in rows.iterrows()]  # fmt: skip
    folders = " ".join(map(shown, options.folders))
    command = f"python benchmarks/devices.py {folders} --out {shown(options.out)}"
    machines = [f"- {name}: {hardware(*pair)}" for name, pair in zip(("first", "second"), zip(options.folders, results))]
    parts = [
        "# One study on two kinds of hardware",
        f"Made by `{command}`; how the second came about stands at the top of that file.",
        "\n".join(machines),
        summary(rows, seeds_apart(one)),
        "## Claims",
        f"Verdict, effect and 95 % interval. Under revision: {REVISION}.",
        claims_table(*results, set(rows.index)),
        "## Scores",
        table(["strategy", "first", "second", "difference", "of a patient, mean", "largest"], lines),
    ]
    write(options.out, "\n\n".join(parts) + "\n")
    print(options.out)


if __name__ == "__main__":
    main()
