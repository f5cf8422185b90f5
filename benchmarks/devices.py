"""The same study on two kinds of hardware: how far apart scores and verdicts are, written as one Markdown file.

    python benchmarks/devices.py paper/results runs/demo-gpu/report --out benchmarks/devices.md

Each folder is a report of a study: results.json, patients.csv, cost.json. Strategies that both ran with the same seed are compared.
Synthetic, no clinical claim.
"""

import argparse
from pathlib import Path

import pandas as pd
from adapters import shown, table, write
from scipy.stats import spearmanr

from sahlora.figures.style import label
from sahlora.files import read_json
from sahlora.results import strategy_name

KEY = ["run", "patient"]


def scores(folder: Path) -> pd.Series:
    "Soft Dice by run and test patient."
    rows = pd.read_csv(folder / "patients.csv")
    return rows[rows.role == "test"].set_index(KEY).dice_soft


def hardware(folder: Path) -> str:
    "Processor or GPU, torch, and the hours that a report's runs took together."
    cost, results = pd.DataFrame(read_json(folder / "cost.json")).T, read_json(folder / "results.json")
    made = " and ".join(sorted(set(cost.processor)))
    return f"{made}, torch {results['provenance']['torch']}, {len(cost)} jobs, {cost.seconds.astype(float).sum() / 3600:.2f} h in all"


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


def verdicts(folders: list[Path]) -> str:
    "The claims, and what came of each on either side."
    ledgers = [read_json(folder / "results.json")["claims"] for folder in folders]
    return table(["claim", "first", "second"], [[a["claim"], a["verdict"], b["verdict"]] for a, b in zip(*ledgers)])


def main() -> None:
    "Compare, then write the file."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs=2, help="two reports of a study")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="file to write")
    options = parser.parse_args()
    one, other = (scores(folder) for folder in options.folders)
    rows = compared(one, other)
    trained = rows[rows.gap.abs() > 0]
    lines = [[label(strategy_name(run)), f"{r.one:.3f}", f"{r.other:.3f}", f"{r.gap:+.3f}", f"{r.each:.3f}", f"{r.most:.3f}"]
             for run, r in rows.iterrows()]  # fmt: skip
    rho = spearmanr(trained.one, trained.other).statistic
    command = f"python benchmarks/devices.py {shown(options.folders[0])} {shown(options.folders[1])} --out {shown(options.out)}"
    summary = (
        "Soft Dice per patient of the runs that both have. **Synthetic, no clinical claim.** Means of strategies differ by "
        f"{trained.gap.abs().mean():.3f} in the mean and {trained.gap.abs().max():.3f} at most; two seeds on the first machine by "
        f"{seeds_apart(one):.3f} in the mean. The order of the strategies agrees with Spearman's rho {rho:.2f}."
    )
    machines = [f"- {name}: {hardware(folder)}" for name, folder in zip(("first", "second"), options.folders)]
    scored = table(["strategy", "first", "second", "difference", "of a patient, mean", "largest"], lines)
    parts = ["# One study on two kinds of hardware", f"Made by `{command}`.", "\n".join(machines),
             summary, scored, "## Claims", verdicts(options.folders)]  # fmt: skip
    write(options.out, "\n\n".join(parts) + "\n")
    print(options.out)


if __name__ == "__main__":
    main()
