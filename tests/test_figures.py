"""Every figure on small, large and broken tables: drawn whole, readable, with its note, the same bytes twice."""
import re
import warnings
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from sahlora.evaluation.claims import REVISION
from sahlora.ct import HeadCT
from sahlora.common.display import plain_text
from sahlora.report.figures import (amounts, dice_by_parameters, dice_by_strategy, dice_by_volume,
                                    ledger, study_overview, volume_agreement)
from sahlora.report.pictures import best_median_worst, cohort_sheet, learning_curves, overlays
from sahlora.common.style import COLUMN, NOTE, PAGE, RunId, family, label, style_of, empty_figure, read_run, run_record, save_figure
from sahlora.prediction.scan import overlay_sheet

METHODS = ("lora-c", "convlora", "cp-lora", "dora-c", "convdora", "cp-dora")
REGIONS = {"shallow": 46_785, "deep": 46_464, "encoding": 46_944, "decoding": 101_985, "all": 232_737}
NONE, NORMS, SCRATCH = RunId("none"), RunId("norm-stats"), RunId("scratch")
STANDARD, ADAPTER = RunId("fine-tuning", region="decoding"), RunId("cp-lora", 8, "decoding")
FEW = (NONE, NORMS, STANDARD, ADAPTER)
MANY = (NONE, NORMS, SCRATCH, *(RunId("fine-tuning", region=at) for at in ("shallow", "deep", "encoding", "decoding", "all")),
        *(RunId(method, rank, "decoding") for method in METHODS for rank in (2, 8, 32)))
BINS = ("<25", "25-50", "50-100", ">100")
CLAIMS = ("Transfer is feasible: fine-tuning on the target beats none.", "LoRA-based methods beat standard fine-tuning.",
          "Larger volumes are segmented better, by every method.",
          "CP-LoRA is comparable to the other LoRA methods with fewer parameters.", "Higher ranks beat strictly low ranks.")


@dataclass
class Invented:
    "The parts of an invented results.json that figures are drawn from."

    patients: pd.DataFrame
    runs: list[dict[str, Any]]
    summaries: list[dict[str, Any]]
    bins: list[dict[str, Any]]
    volumes: list[dict[str, Any]]
    amounts: list[dict[str, Any]]
    claims: list[dict[str, Any]]
    histories: dict[Any, pd.DataFrame] = field(default_factory=dict)

    @property
    def shown(self) -> list[RunId]:
        "Strategies for figures that hold a handful."
        return list(dict.fromkeys(read_run(run).strategy for run in self.runs))[:8]

    def results(self, **more: Any) -> dict[str, Any]:
        cohort = {"patients": int(self.patients.patient.nunique()), "scans": int(self.patients.patient.nunique())}
        return {"study": {"synthetic": True, "network": {"name": "multi-view-unet"}}, "cohorts": {"source": cohort, "target": cohort},
                "pretrain": {"parameters": 232_737, "steps": 1500}, "patients": self.patients.to_dict("records"), "runs": self.runs,
                "claims": self.claims, "failed": [], "missing": [], **more}


def spread(values: pd.Series) -> dict[str, Any]:
    "n, mean and a normal interval; none for five or fewer."
    half = 1.96 * values.std() / np.sqrt(len(values)) if len(values) > 5 else None
    mean = float(values.mean()) if len(values) else None
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return {"n": len(values), "mean": mean, "sd": None, "low": low, "high": high}


def invented_runs(names, seeds):
    size = {"lora-c": 4929, "convlora": 3393, "cp-lora": 615, "dora-c": 4929, "convdora": 3393, "cp-dora": 615}
    for run in names:
        count = size.get(run.method, 100) * run.rank if run.rank else \
            {"none": 0, "norm-stats": 0, "scratch": 232_737}.get(run.method, REGIONS.get(run.region))
        yield from ({**run_record(RunId(run.method, run.rank, run.region, replicate=seed)), "id": f"{run.name}-s{seed}", "name": run.name,
                     "trainable": count, "folds": 3} for seed in range(seeds))


def invented_claims():
    verdicts = ("supported", "contradicted", "supported", "inconclusive", "not tested")
    effects = ((0.11, [0.07, 0.16]), (-0.04, [-0.06, -0.02]), (0.62, [0.3, 0.8]), (-0.01, [-0.04, 0.01]), (None, None))
    return [{"number": i + 1, "claim": text, "verdict": verdict,
             "test": "Spearman's rho of score and volume" if i == 2 else "signed-rank test",
             "effect": effect, "interval": interval, "p": None if effect is None else 0.01, "n": None if effect is None else 30,
             "details": [{"margin": 0.03}] if i == 3 else []}
            for i, (text, verdict, (effect, interval)) in enumerate(zip(CLAIMS, verdicts, effects))]


def invent(names, patients=30, seeds=2):
    "Invented results of so many strategies, patients and seeds."
    rng = np.random.default_rng(0)
    ml = rng.lognormal(3.4, 0.9, patients)
    rows = [{"method": run.method, "rank": run.rank, "region": run.region, "strategy": run, "seed": seed,
             "patient": f"p{i:02d}", "role": "test", "volume_ml": ml[i],
             "predicted_ml": ml[i] * rng.lognormal(0, 0.3),
             "dice_soft": float(np.clip(0.1 + 0.1 * np.log(ml[i]) + 0.003 * k + rng.normal(0, 0.05), 0, 1)), "collapsed": False}
            for k, run in enumerate(names) for seed in range(seeds) for i in range(patients)]
    table = pd.DataFrame(rows)
    means = table.groupby(["strategy", "patient"], sort=False)[["dice_soft", "volume_ml", "predicted_ml"]].mean().reset_index()
    means["bin"] = pd.cut(means.volume_ml, [0, 25, 50, 100, np.inf], labels=BINS)
    volumes = [{"strategy": run.name, "bias": 1.0, "bias_low": 0.0, "bias_high": 2.0, "loa_low": -9.0, "loa_low_low": -11.0,
                "loa_low_high": -7.0, "loa_high": 11.0, "loa_high_low": 9.0, "loa_high_high": 13.0} for run in names]
    fits = pd.concat([pd.DataFrame({"run": f"r-s{seed}", "fold": fold, "step": np.arange(1, 60), "loss": rng.uniform(0.2, 0.9, 59)})
                      for seed in range(seeds) for fold in range(3)])
    return Invented(table, list(invented_runs(names, seeds)),
                    [{"strategy": run.name, **spread(part.dice_soft)} for run, part in means.groupby("strategy", sort=False)],
                    [{"strategy": run.name, "bin": one, **spread(means[(means.strategy == run) & (means.bin == one)].dice_soft)}
                     for run in names for one in BINS], volumes,
                    [{"strategy": run.name, "patients": count, **spread(means[means.strategy == run].dice_soft)} for run in names[-3:]
                     for count in (5, 10, 20)], invented_claims(), {name: fits for name in ("pre-training", *names)})


def pictures(names, rows=3):
    "Invented slices: (3, 80, 64) per strategy and patient."
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:80, :64]
    blob = np.exp(-((x - 30) ** 2 + (y - 40) ** 2) / 100)
    return {name: {f"asah-{i:04d}-s202": np.stack([rng.uniform(0, 1, (80, 64)), blob > 0.4, np.roll(blob, i, axis=1)])
                   for i in range(rows)} for name in names}


def sheet(count=5):
    return {role: [(f"asah-{i:04d}-s202", np.full((80, 64), 0.4), np.eye(80, 64)) for i in range(count)] for role in ("source", "target")}


DRAWN = {
    "overview": lambda one, synthetic: study_overview(one.results(), synthetic),
    "dice": lambda one, synthetic: dice_by_strategy(one.patients, synthetic, summaries=one.summaries),
    "bins": lambda one, synthetic: dice_by_volume(one.bins, one.shown, synthetic),
    "parameters": lambda one, synthetic: dice_by_parameters(one.runs, one.summaries, synthetic),
    "volumes": lambda one, synthetic: volume_agreement(one.patients, one.volumes, one.shown[:3], synthetic),
    "amounts": lambda one, synthetic: amounts(one.amounts, [read_run(run).strategy for run in one.runs if run["seed"] == 0][-3:], synthetic),
    "ledger": lambda one, synthetic: ledger(one.claims, synthetic),
    "curves": lambda one, synthetic: learning_curves(one.histories, synthetic),
    "overlays": lambda one, synthetic: overlays(pictures(one.shown[:7]), synthetic),
    "cohorts": lambda one, synthetic: cohort_sheet(sheet(), synthetic),
}
SMALL, LARGE = invent(FEW, patients=9, seeds=1), invent(MANY)


@pytest.fixture(autouse=True)
def quiet():
    "A warning is an error, and no figure stays open."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    plt.close("all")


def words(fig):
    "Every text of a figure that is seen."
    return [text.get_text() for text in fig.findobj(plt.Text) if text.get_visible() and text.get_text()]


def check_whole(fig):
    "A column or a page wide at most, nothing cut off, no two labels of an axis on each other."
    fig.canvas.draw()
    renderer, (width, height) = fig.canvas.get_renderer(), fig.get_size_inches()
    box = fig.get_tightbbox(renderer)
    assert width in (COLUMN, PAGE) or width < PAGE
    assert box.x0 > -0.02 and box.y0 > -0.02 and box.x1 < width + 0.02 and box.y1 < height + 0.02, box
    for ax in fig.axes:
        for labels, along in ((ax.get_xticklabels(which="both"), "x"), (ax.get_yticklabels(which="both"), "y")):
            drawn = [text for text in labels if text.get_text() and text.get_visible() and ax.axison]
            spans = sorted(tuple(getattr(text.get_window_extent(renderer), f"interval{along}")) for text in drawn)
            assert all(one[1] <= two[0] + 0.5 for one, two in zip(spans, spans[1:])), [text.get_text() for text in drawn]


def test_large_slices_do_not_make_a_large_file(tmp_path):
    rng = np.random.default_rng(0)
    fig = cohort_sheet({"source": [("a", rng.uniform(0, 1, (512, 512)), np.eye(512))] * 5})
    assert len(bytes_of(fig, tmp_path, "a")[0]) < 5_000_000


def bytes_of(fig, folder, name):
    path = save_figure(fig, folder / f"{name}.svg")
    return path.read_bytes(), path.with_suffix(".png").read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("one", [SMALL, LARGE], ids=["small", "large"])
def test_drawn_whole_with_its_note_and_twice_the_same(one, name, tmp_path):
    first = DRAWN[name](one, True)
    assert words(first).count(NOTE) == 1
    check_whole(first)
    svg, png = bytes_of(first, tmp_path, "a")
    again = DRAWN[name](one, True)
    again.canvas.draw()  # shown before it is saved
    assert (svg, png) == bytes_of(again, tmp_path, "b")
    assert svg.startswith(b"<?xml") and png.startswith(b"\x89PNG") and b"Software" not in png and b"dc:date" not in svg
    assert len(svg) < 800_000 and len(png) < 600_000
    real = DRAWN[name](one, False)
    assert NOTE not in words(real)
    check_whole(real)


def test_png_has_two_hundred_dots_per_inch_of_the_figure_s_width(tmp_path):
    image = plt.imread(save_figure(DRAWN["dice"](SMALL, True), tmp_path / "dice.svg").with_suffix(".png"))
    assert image.shape[1] == round(200 * COLUMN)
    save_figure(DRAWN["dice"](SMALL, True), tmp_path / "alone.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone.png", "dice.png", "dice.svg"]


@pytest.mark.long
def test_figures_follow_the_numbers(tmp_path):
    "The same call with other numbers is another file."
    other = LARGE.patients.assign(dice_soft=LARGE.patients.dice_soft * 0.9)
    drawn = [bytes_of(dice_by_strategy(table), tmp_path, name) for table, name in ((LARGE.patients, "a"), (other, "b"))]
    assert drawn[0][0] != drawn[1][0] and drawn[0][1] != drawn[1][1]


def test_dice_rows_show_means_over_seeds_and_the_intervals_that_are_given():
    table = pd.DataFrame({"method": ["none"] * 4, "seed": [0, 1] * 2, "patient": ["a", "a", "b", "b"], "dice_soft": [0.2, 0.4, 0.8, 1.0]})
    ax = dice_by_strategy(table, summaries=[{"strategy": "none", "mean": 0.6, "low": 0.45, "high": 0.75}]).axes[0]
    assert [text.get_text() for text in ax.texts] == ["0.600"] and [text.get_text() for text in ax.get_yticklabels()] == ["No fine-tuning"]
    lines = [np.asarray(line.get_xdata()).tolist() for line in ax.lines]
    assert pytest.approx([0.3, 0.9]) in lines and [0.45, 0.75] in lines and [0.6] in lines
    assert not [line for line in dice_by_strategy(table).axes[0].lines if list(line.get_xdata()) == [0.45, 0.75]]


def test_paired_lines_only_where_strategies_are_few():
    lines = lambda one: sum(to_hex(line.get_color()) == "#d9d9d9" for line in dice_by_strategy(one.patients).axes[0].lines)
    assert lines(SMALL) == 9 and lines(LARGE) == 0


def test_families_stand_together_in_order_of_appearance():
    shuffled = LARGE.patients.sample(frac=1, random_state=0)
    ax = dice_by_strategy(shuffled).axes[0]
    groups = [family(run) for run in sorted(shuffled.strategy.unique(), key=lambda run: -dict(zip(
        [text.get_text() for text in ax.get_yticklabels()], ax.get_yticks()))[run.label])]
    assert len(groups) == 26 and sum(one != two for one, two in zip(groups, groups[1:])) == 7


def test_a_collapsed_run_has_a_dagger():
    table = SMALL.patients.assign(collapsed=SMALL.patients.strategy == ADAPTER)
    ax = dice_by_strategy(table).axes[0]
    assert [text.get_text() for text in ax.get_yticklabels()][-1] == "CP-LoRA, rank 8 †" and "†" in ax.get_xlabel()
    assert "†" not in dice_by_strategy(SMALL.patients).axes[0].get_xlabel()


def test_no_interval_for_five_patients_or_fewer_even_where_one_is_given():
    bins = [{"strategy": "none", "bin": name, "n": n, "mean": 0.5, "low": 0.4, "high": 0.6}
            for name, n in (("<25", 5), ("25-50", 6), (">100", 0))]
    ax = dice_by_volume(bins, [NONE]).axes[0]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["<25\nn = 5", "25-50\nn = 6"]
    lengths = [np.ptp(segment[:, 1]) for collection in ax.collections for segment in collection.get_segments()]
    assert lengths == pytest.approx([0, 0.2]) and "n ≤ 5" in ax.get_xlabel()


def test_intervals_are_drawn_from_low_to_high_also_when_lopsided():
    ax = amounts([{"strategy": "scratch", "patients": 5, "n": 9, "mean": 0.5, "low": 0.2, "high": 0.6},
                  {"strategy": "scratch", "patients": 10, "n": 9, "mean": 0.6, "low": None, "high": None}], [SCRATCH]).axes[0]
    ends = [segment[:, 1].tolist() for collection in ax.collections for segment in collection.get_segments()]
    assert ends[0] == pytest.approx([0.2, 0.6]) and ends[1] == pytest.approx([0.6, 0.6])
    assert [text.get_text() for text in ax.get_xticklabels()] == ["5", "10"] and len(ax.get_legend_handles_labels()[0]) == 1


def test_parameters_leave_out_what_is_not_compared():
    extra = [{**SMALL.runs[-1], "name": "cp-lora-r8-decoding-n5", "patients": 5},
             {**SMALL.runs[-1], "name": "unet-none", "network": "unet"}]
    fig = dice_by_parameters([*SMALL.runs, *extra], SMALL.summaries)
    assert len(fig.axes) == 1 and fig.axes[0].get_legend_handles_labels()[1] == ["No fine-tuning", "Norm statistics", "CP-LoRA"]
    lora, dora = dice_by_parameters(LARGE.runs, LARGE.summaries).axes
    assert lora.get_legend_handles_labels()[1][-3:] == ["LoRA-C", "convLoRA", "CP-LoRA"]
    assert dora.get_legend_handles_labels()[1][-3:] == ["DoRA-C", "convDoRA", "CP-DoRA"]


def test_words_of_regions_never_meet():
    "Three regions have much the same number of parameters, and their Dice may be the same."
    alike = [{**row, "mean": 0.5, "low": 0.45, "high": 0.55} for row in LARGE.summaries]
    fig = dice_by_parameters(LARGE.runs, alike)
    renderer = fig.canvas.get_renderer()
    for ax in fig.axes:
        boxes = [text.get_window_extent(renderer) for text in ax.texts if not text.get_text().isdigit()]
        assert len(boxes) == 6 and not any(one.overlaps(two) for i, one in enumerate(boxes) for two in boxes[:i])


def test_a_baseline_far_below_is_written_and_does_not_press_the_rest_together():
    at = {"none": (0.1, 0.05, 0.15)}
    rows = [{**row, **dict(zip(("mean", "low", "high"), at.get(row["strategy"], (0.6, 0.55, 0.65))))} for row in LARGE.summaries]
    fig = dice_by_parameters(LARGE.runs, rows)
    for ax in fig.axes:
        assert "↓ No fine-tuning 0.100 (0.050 to 0.150)" in [text.get_text() for text in ax.texts]
        assert ax.get_ylim()[0] > 0.5 and "No fine-tuning" not in ax.get_legend_handles_labels()[1]
        assert "Norm statistics" in ax.get_legend_handles_labels()[1]
    check_whole(fig)


def test_overview_counts():
    text = words(study_overview(LARGE.results(failed=[{"id": "scratch-s1"}], missing=["none-s1", "none-s0"])))
    for line in ("26 strategies", "× 2 seeds", "× 3 folds", "52 runs in all", "1 failed", "2 never run", "30 patients tested",
                 "1,560 scores", "232,737 parameters", "1,500 steps", "2 supported", "1 contradicted", "1 inconclusive", "1 not tested"):
        assert any(line in one for one in text), line
    fitted = SMALL.results(patients=[{"patient": "a", "role": "fit"}], claims=[])
    text = "\n".join(words(study_overview(fitted)))
    assert "1 patient only fitted" in text and "tested" not in text.replace("not tested", "") and "not judged" in text


def test_ledger_says_every_verdict_in_words_and_gives_every_claim_an_axis_of_its_own():
    fig = ledger(LARGE.claims)
    assert {"supported", "contradicted", "inconclusive", "not tested"} <= set(words(fig))
    assert {"no effect to show", "ρ = 0.62, n = 30\n(0.30 to 0.80)"} <= set(words(fig))
    assert [ax.get_xlim()[1] for ax in fig.axes] == pytest.approx([0.192, 0.072, 1, 0.048, 0.1])
    assert -0.03 in [line.get_xdata()[0] for line in fig.axes[3].lines]


def test_a_verdict_under_revision_has_its_reason_in_the_figure():
    claims = [{**claim, "verdict": "under revision", "reason": REVISION} if claim["number"] in (2, 4, 5) else claim for claim in LARGE.claims]
    said = words(ledger(claims))
    assert said.count("under revision") == 3 and f"under revision: {REVISION}" in said
    assert not {"contradicted", "inconclusive", "not tested"} & set(said)
    assert "2 supported\n3 under revision" in words(study_overview(LARGE.results(claims=claims)))
    assert not any("revision" in one for one in words(ledger(LARGE.claims)))


OUTSIDE = ("$x_{$", "<script>alert(1)</script>", "a|b", "two\nlines", "\u202etxt\x07", "x" * 500, "\\frac{$1$", "-->")


@pytest.mark.long
@pytest.mark.parametrize("name", OUTSIDE)
def test_names_from_outside_are_drawn_as_text(name, tmp_path):
    "A dollar sign starts a formula in matplotlib, and a name of 500 letters would push the pictures out."
    planes = pictures(["none", "cp-lora-r8-decoding"], 1)
    overlay = {run: {name: next(iter(patients.values()))} for run, patients in planes.items()}
    row = sheet(2)["source"]
    figs = {"sheet": cohort_sheet({"source": [(name, *row[0][1:]), row[1]]}), "overlay": overlays(overlay, titles={name: f"{name} (fit)"}),
            "slices": overlay_sheet(HeadCT(np.zeros((32, 40, 3)), np.diag([-1.0, -1, 5, 1])), np.zeros((32, 40, 3)), name)}
    FigureCanvasAgg(figs["slices"])
    for kind, fig in figs.items():
        check_whole(fig)
        shown = [one for one in words(fig) if one.startswith(plain_text(name)[:12])]
        assert len(shown) == 1 and "\n" not in shown[0] and (len(name) > 20 or shown[0].startswith(plain_text(name)))
        content = save_figure(fig, tmp_path / f"{kind}.svg").read_text()
        ElementTree.fromstring(content)
        assert "<script" not in re.sub("<!--.*?-->", "", content, flags=re.S)


def test_agreement_means_over_seeds():
    fig = volume_agreement(LARGE.patients, LARGE.volumes, [NONE, STANDARD, ADAPTER])
    assert [ax.get_title() for ax in fig.axes[:3]] == ["No fine-tuning", "Fine-tuning, decoding", "CP-LoRA, rank 8"]
    mine = LARGE.patients[LARGE.patients.strategy == NONE].groupby("patient").predicted_ml.mean()
    assert sorted(fig.axes[0].lines[1].get_ydata()) == pytest.approx(sorted(mine))
    assert {"+1.0", "-9.0", "+11.0"} <= {text.get_text() for text in fig.axes[3].texts}


@pytest.mark.long
@pytest.mark.parametrize("name", ["dice", "bins", "parameters", "volumes", "amounts", "overview", "curves"])
def test_one_patient(name):
    check_whole(DRAWN[name](invent(FEW, patients=1, seeds=1), True))


def test_missing_scores():
    table = LARGE.patients.copy()
    table.loc[table.strategy == SCRATCH, "dice_soft"] = np.nan
    table.loc[table.patient == "p03", ["dice_soft", "volume_ml"]] = np.nan
    check_whole(fig := dice_by_strategy(table))
    assert len(fig.axes[0].texts) == 25 and len(fig.axes[0].get_yticks()) == 26
    assert len(volume_agreement(table, LARGE.volumes, [NONE]).axes[0].lines[1].get_xdata()) == 29
    blank = [{**row, "mean": None, "low": None, "high": None} if row["strategy"] == "scratch" else row for row in LARGE.summaries]
    check_whole(dice_by_parameters(LARGE.runs, blank))


@pytest.mark.parametrize("fig", [
    lambda: dice_by_strategy(SMALL.patients.assign(dice_soft=np.nan)), lambda: dice_by_strategy(SMALL.patients.iloc[:0]),
    lambda: dice_by_volume([], FEW), lambda: dice_by_volume([{**row, "n": 0} for row in SMALL.bins], FEW),
    lambda: dice_by_parameters([], []), lambda: dice_by_parameters(SMALL.runs[:2], SMALL.summaries),
    lambda: volume_agreement(SMALL.patients.assign(volume_ml=None), [], FEW), lambda: amounts([], FEW), lambda: ledger([]),
    lambda: learning_curves({}), lambda: learning_curves({"none": pd.DataFrame({"step": [], "loss": []})}),
    lambda: overlays({}), lambda: cohort_sheet({}), lambda: cohort_sheet({"source": []})])
def test_nothing_to_draw_is_said(fig, tmp_path):
    fig = fig()
    assert len(words(fig)) == 2 and NOTE in words(fig)
    check_whole(fig)
    assert bytes_of(fig, tmp_path, "a")[0]


@pytest.mark.long
def test_no_adapters_and_adapters_alone():
    for names in (MANY[:8], MANY[-3:], (RunId("cp-lora", 8, "all"), RunId("my-own", 4, "decoding"), NONE)):
        one = invent(names, patients=7)
        check_whole(DRAWN["parameters"](one, True))
        check_whole(DRAWN["dice"](one, True))
        check_whole(DRAWN["bins"](one, True))


def test_patients_without_blood_stand_at_zero_of_the_root_axes():
    table = SMALL.patients.assign(volume_ml=0.0)
    check_whole(volume_agreement(table, SMALL.volumes, FEW[:2]))


def test_a_loss_that_is_not_a_number_leaves_a_gap():
    history = pd.DataFrame({"step": range(20), "loss": [0.5] * 10 + [np.nan] * 10, "fold": 0})
    check_whole(learning_curves({"scratch": history, "none": history.assign(loss=np.nan)}))


@pytest.mark.long
def test_one_fit_per_run_and_fold_in_curves():
    fig = learning_curves({ADAPTER: LARGE.histories[NONE]})
    assert len(fig.axes) == 1 and len(fig.axes[0].lines) == 6
    many = learning_curves(LARGE.histories)
    assert len(many.axes) == 28 and [len(ax.lines) for ax in many.axes] == [1] * 27 + [0]


@pytest.mark.long
@pytest.mark.parametrize("columns, rows", [(1, 1), (3, 3), (7, 3)])
def test_overlays_fit_the_page(columns, rows):
    fig = overlays(pictures(MANY[:columns], rows), titles={"asah-0000-s202": "asah-0000-s202 (fit)"})
    check_whole(fig)
    assert len(fig.axes) == (columns + 1) * rows and fig.get_size_inches()[0] <= PAGE
    titles = [ax.title.get_window_extent(fig.canvas.get_renderer()) for ax in fig.axes[:columns + 1]]
    assert all(one.x1 <= two.x0 for one, two in zip(titles, titles[1:]))


def test_overlays_leave_a_place_empty_for_a_patient_that_a_run_lacks():
    examples = pictures(("none", "scratch"), 2)
    del examples["scratch"]["asah-0001-s202"]
    fig = overlays(examples)
    assert [len(ax.images) for ax in fig.axes] == [1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("run, name, words", [
    (NONE, "none", "No fine-tuning"), (RunId("none", replicate=3), "none-s3", "No fine-tuning, seed 3"),
    (RunId("fine-tuning", region="all"), "fine-tuning-all", "Fine-tuning, all"),
    (RunId("scratch", patients=5), "scratch-n5", "From scratch, 5 patients"),
    (RunId("convdora", 32, "decoding"), "convdora-r32-decoding", "convDoRA, rank 32"),
    (RunId("cp-lora", 8, "deep"), "cp-lora-r8-deep", "CP-LoRA, rank 8, deep"),
    (RunId("lora-c", 2, "decoding", True, 10, replicate=1), "lora-c-r2-decoding-extras-n10-s1", "LoRA-C, rank 2, extras, 10 patients, seed 1"),
    (RunId("cp-lora", 8, "decoding", network="unet"), "unet-cp-lora-r8-decoding", "unet: CP-LoRA, rank 8"),
    (RunId("my-own", 4, "decoding"), "my-own-r4-decoding", "my-own, rank 4"),
    (RunId("cp-lora", 8, "decoding", options={"alpha": 16.0}, replicate=0), "cp-lora-r8-decoding-alpha16-s0", "CP-LoRA, rank 8, alpha 16, seed 0"),
    (RunId("scratch", options={"learning_rate": 3e-4}), "scratch-lr0.0003", "From scratch, learning rate 0.0003"),
    (RunId("scratch", options={"learning_rate": [1e-3, 0.01]}), "scratch-lr0.001-0.01", "From scratch, learning rate 0.001 or 0.01"),
    (RunId("cp-lora", 8, "all", options={"rank_stabilized": True}), "cp-lora-r8-all-rank-stabilized-true", "CP-LoRA, rank 8, all, rank stabilized True"),
    (RunId("cp-lora", 8, "all", options={"kind": "a/../b c"}), "cp-lora-r8-all-kind-a-..-b-c", "CP-LoRA, rank 8, all, kind a/../b c")])
def test_names_and_labels(run, name, words):
    assert run.name == name and run.label == words
    assert read_run(run_record(run)) == run and "/" not in run.name


def test_labels_of_a_study_differ_and_colours_are_a_family_s():
    assert len({run.label for run in MANY}) == 26 and label("anything at all") == "anything at all"
    assert style_of("cp-dora")["color"] == style_of(RunId("cp-lora", 8, "all"))["color"] != style_of("lora-c")["color"]
    assert len({(one["color"], one["marker"], one["markerfacecolor"]) for one in map(style_of, METHODS)}) == 6


def test_only_plain_runs_of_the_main_network_are_compared():
    assert all(run.is_compared for run in MANY)
    special = ({"patients": 5}, {"extras": True}, {"network": "unet"}, {"options": {"alpha": 16.0}})
    assert not any(RunId("cp-lora", 8, "decoding", **one).is_compared for one in special)


def test_best_median_worst_of_ties_is_by_name():
    assert best_median_worst({"b": 0.5, "a": 0.5, "c": 0.5}) == ["a", "b", "c"] and best_median_worst({"a": float("nan")}) == []


def test_what_is_not_there_is_written_within_its_figure():
    check_whole(empty_figure("every run was trained on all training patients", True))
