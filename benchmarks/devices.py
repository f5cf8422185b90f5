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

from sahlora.evaluation.claims import REVISION, Claim, Plan, judge
from sahlora.common.files import read_json
from sahlora.common.style import read_run
from sahlora.report.results import read_results, tested_rows

Results = dict[str, Any]


def hardware(folder: Path, results: Results) -> str:
    "Processor or GPU, torch, jobs, and the seconds of one."
    cost = pd.DataFrame(read_json(folder / "cost.json")).T
    trained = cost.loc[[run["id"] for run in results["runs"] if run["trainable"]]].seconds.astype(float)
    made = " and ".join(sorted(set(cost.processor)))
    seeds = ", ".join(map(str, sorted({run["seed"] for run in results["runs"]})))
    return (f"{made}, torch {results['provenance']['torch']}; seeds {seeds}; {len(cost)} jobs, {cost.seconds.astype(float).sum() / 3600:.2f} h together; "
            f"a run that trains takes {trained.min():.0f} to {trained.max():.0f} s (one thread, jobs side by side)")  # fmt: skip


def soft_dice(rows: pd.DataFrame) -> pd.Series:
    "By run and patient."
    return rows.set_index(["run", "patient"]).dice_soft


def compared(one: pd.Series, other: pd.Series) -> pd.DataFrame:
    "By run: mean on either side, difference of the means, mean and largest difference of a patient."
    both = pd.DataFrame({"one": one, "other": other}).dropna()
    both["gap"] = both.other - both.one
    runs = both.groupby(level="run", sort=False)
    return pd.DataFrame({"one": runs.one.mean(), "other": runs.other.mean(), "gap": runs.gap.mean(), "each": runs.gap.apply(lambda g: g.abs().mean()),
                         "most": runs.gap.apply(lambda g: g.abs().max())})  # fmt: skip


def seeds_apart(one: pd.Series) -> float:
    "Mean distance between the means of two seeds of a strategy, for scale. NaN where there is one seed."
    means = one.groupby(level="run").mean()
    pairs = [abs(means[run] - means[run[:-1] + "1"]) for run in means.index if run.endswith("-s0") and run[:-1] + "1" in means.index]
    return float(pd.Series([gap for gap in pairs if gap > 0]).mean())


def ledger(results: Results, runs: set[str]) -> list[Claim]:
    "The claims from these runs alone."
    rows = tested_rows(results)
    rows = rows[rows.run.isin(runs)]
    trainable = {read_run(run): run["trainable"] for run in results["runs"] if run["id"] in set(rows.run)}
    return judge(rows, trainable, Plan(**results["plan"]))


def outcome(claim: Claim) -> str:
    "Verdict, effect and interval."
    if claim.effect is None or claim.interval is None:
        return claim.verdict
    return f"{claim.verdict}, {claim.effect:+.3f} ({claim.interval[0]:+.3f} to {claim.interval[1]:+.3f})"


def claims_table(one: Results, other: Results, common: set[str]) -> str:
    "What comes of each claim on either side; the first from all its runs, and from those that both have."
    every = {run["id"] for run in one["runs"]}
    ledgers = [ledger(one, every), ledger(one, common), ledger(other, common)]
    rows = [[three[0].claim, *map(outcome, three)] for three in zip(*ledgers)]
    return table(["claim", "first, all runs", "first, the same runs", "second"], rows, words=4)


def main() -> None:
    "Compare, then write the file."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs=2, help="two reports of a study")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="file to write")
    options = parser.parse_args()
    results = [read_results(folder)[0] for folder in options.folders]
    one, other = (soft_dice(pd.DataFrame(each["patients"]).query("role == 'test'")) for each in results)
    rows = compared(one, other)
    labels = {run["id"]: read_run(run).strategy.label for run in results[0]["runs"]}
    lines = [[labels[run], f"{r.one:.3f}", f"{r.other:.3f}", f"{r.gap:+.3f}", f"{r.each:.3f}", f"{r.most:.3f}"]
             for run, r in rows.sort_index().iterrows()]  # fmt: skip
    adapters = rows[["lora" in run or "dora" in run for run in rows.index]]
    command = f"python benchmarks/devices.py {shown(options.folders[0])} {shown(options.folders[1])} --out {shown(options.out)}"
    summary = (
        f"Soft Dice of the {len(rows)} runs that both have. **Synthetic, no clinical claim.** Rounding differs between processors, so the base "
        f"network differs and with it every run. Means of strategies are {rows.gap.abs().mean():.3f} apart in the mean and "
        f"{rows.gap.abs().max():.3f} at most; two seeds on the first machine are {seeds_apart(one):.3f} apart in the mean. The order of all "
        f"strategies agrees with Spearman's rho {spearmanr(rows.one, rows.other).statistic:.2f}, that of the adapters alone with "
        f"{spearmanr(adapters.one, adapters.other).statistic:.2f}."
    )
    machines = [f"- {name}: {hardware(*pair)}" for name, pair in zip(("first", "second"), zip(options.folders, results))]
    scored = table(["strategy", "first", "second", "difference", "of a patient, mean", "largest"], lines)
    parts = ["# One study on two kinds of hardware", f"Made by `{command}`; how the second came about stands at the top of that file.",
             "\n".join(machines), summary,
             "## Claims", f"Verdict, effect and 95 % interval. Under revision: {REVISION}.",
             claims_table(*results, set(rows.index)), "## Scores", scored]  # fmt: skip
    write(options.out, "\n\n".join(parts) + "\n")
    print(options.out)


if __name__ == "__main__":
    main()
