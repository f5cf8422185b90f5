"""Results, tables, figures and PDF of a report: from whole studies, from studies with holes, and from the committed files alone."""
import contextlib
import html
import json
import math
import os
import re
import shutil
import subprocess

import nbformat
import pandas as pd
import pytest
import yaml

from sahlora.report import page as report
from sahlora.report import results
from sahlora.cohorts.cohort import Cohort, make_phantom_cohort
from sahlora.common.display import plain_text
from sahlora.common.files import file_hash
from sahlora.evaluation.scores import METRICS, Metric
from sahlora.cohorts.folds import kfold
from sahlora.study.experiment import make_cohort
from sahlora.study.schema import Study, expand_runs, network_of, read_study, strategy_of
from sahlora.training.loop import pretrain
from sahlora.training.transfer import cross_validate

ROWS = [{"method": "none"}, {"method": "fine-tuning"}, {"method": "cp-lora", "ranks": [2, 8]},
        {"method": "cp-lora", "patients": [2], "seeds": [0]}, {"method": "none", "network": "unet", "seeds": [0]}]
UNET = {"network": {"name": "unet", "levels": 2, "width": 4}, "pretrain": {"steps": 2, "batch_size": 4}}


@pytest.fixture(scope="module")
def study(project):
    content = read_study(project / "paper/studies/smoke.yaml").model_dump()
    small = {role: {**content[role], "cases": 6, "grid": [24, 32]} for role in ("source", "target")}
    short = {**content["finetune"], "steps": 2, "batch_size": 2, "learning_rate": 0.03}
    return Study.model_validate({**content, **small, "finetune": short, "networks": {"unet": UNET}, "seeds": [0, 1], "runs": ROWS})


@pytest.fixture(scope="module")
def runs(study, tmp_path_factory):
    "Folder of a tiny study: two seeds, fewer training patients, a second network."
    folder = tmp_path_factory.mktemp("runs")
    source, target = (make_cohort(getattr(study, role), folder / "cohorts" / role) for role in ("source", "target"))
    with contextlib.redirect_stdout(None):
        for name in ("", "unet"):
            how = {"steps": 3, "batch_size": 4, "learning_rate": 3e-3, "seed": 0}
            pretrain(source, results.base_folder(folder, name), network_of(study, name), how, quiet=True)
        for run in expand_runs(study):
            base = results.base_folder(folder, run["network"]) / "model.safetensors"
            cross_validate(base, target, strategy_of(run), kfold(target.patients, 2), folder / "finetune" / run["id"], study="tiny", quiet=True)
    return folder


@pytest.fixture(scope="module")
def collected(study, runs):
    return results.collect(study, runs)[0]


@pytest.fixture
def copied(runs, tmp_path):
    "A copy of the study's folder, to be tampered with."
    return shutil.copytree(runs, tmp_path / "runs")


def with_rows(study, **changes):
    return Study.model_validate({**study.model_dump(), **changes})


def rewrite(folder, change):
    "Change patients.csv of every run, as if the runs had written it so."
    for path in (folder / "finetune").glob("*/patients.csv"):
        change(pd.read_csv(path, keep_default_na=False, na_values=[""])).to_csv(path, index=False)
        record = json.loads((path.parent / "record.json").read_text())
        record["files"]["patients.csv"] = file_hash(path)
        (path.parent / "record.json").write_text(json.dumps(record))


# ---- the schema, and numbers checked by hand

@pytest.mark.long
def test_comparisons_with_the_named_references_are_those_of_scipy_and_statsmodels(collected):
    from scipy import stats
    from statsmodels.stats.multitest import multipletests

    names = pd.DataFrame(collected["runs"])[["id", "name", "network", "patients"]].rename(columns={"id": "run", "patients": "fewer"})
    rows = pd.DataFrame(collected["patients"]).merge(names, on="run")
    rows = rows[(rows.network == "") & rows.fewer.isna() & (rows.role == "test")]
    wide = rows.pivot_table(index="patient", columns="name", values="dice_soft").round(12)
    for family in collected["comparisons"]:
        names = [row["strategy"] for row in family["rows"]]
        assert set(names) | {family["reference"]} == set(wide)
        assert family["friedman"]["p"] == pytest.approx(stats.friedmanchisquare(*wide.to_numpy().T).pvalue, rel=1e-6)
        apart = [(wide[name] - wide[family["reference"]]).round(12) for name in names]
        by_scipy = [stats.wilcoxon(one, zero_method="pratt", method="exact").pvalue for one in apart]
        assert all((one != 0).all() and one.abs().is_unique for one in apart), wide.to_string()
        assert [row["p"] for row in family["rows"]] == pytest.approx(by_scipy, rel=1e-6)
        assert [row["p_holm"] for row in family["rows"]] == pytest.approx(multipletests(by_scipy, method="holm")[1], rel=1e-6)
    apart = [(wide[name] - wide["fine-tuning-decoding"]).std() for name in wide if name != "fine-tuning-decoding"]
    assert collected["power"]["sd"] == pytest.approx(pd.Series(apart).median(), rel=1e-4)  # of rounded scores


def test_the_schema_is_the_one_that_paper_and_figures_read(collected):
    assert set(collected) == {"study", "plan", "cohorts", "patients", "pretrain", "runs", "summaries", "claims", "seeds", "bins", "volumes",
                              "comparisons", "power", "amounts", "networks", "published", "provenance", "failed", "missing", "shown",
                              "scores"}
    names = ["none", "none", "fine-tuning-decoding", "fine-tuning-decoding", "cp-lora-r2-decoding", "cp-lora-r8-decoding",
             "cp-lora-r2-decoding", "cp-lora-r8-decoding", "cp-lora-r8-decoding-n2", "unet-none"]
    assert [run["name"] for run in collected["runs"]] == names
    assert [run["patients"] for run in collected["runs"]] == [None] * 8 + [2, None]
    assert [run["network"] for run in collected["runs"]] == [""] * 9 + ["unet"]
    assert set(collected["seeds"][0]) == {"strategy", "seeds", "sd_seeds", "sd_patients"}
    assert set(collected["bins"][0]) == {"strategy", "bin", "n", "mean", "sd", "low", "high"}
    assert set(collected["comparisons"][0]["rows"][0]) == {"strategy", "n", "difference", "low", "high", "rank_biserial", "p", "p_holm",
                                                           "significant"}
    assert set(collected["power"]) == {"n", "sd", "wanted", "smallest", "reference"}
    assert set(collected["amounts"][0]) == {"strategy", "patients", "n", "mean", "low", "high"}
    assert set(collected["networks"][0]) == {"network", "parameters", "strategy", "trainable", "n", "mean", "sd", "low", "high"}
    assert set(collected["provenance"]) == {"commit", "configuration", "sahlora", "torch", "python"}
    assert collected["plan"]["margin"] == 0.03 and collected["plan"]["standard"] == "fine-tuning-decoding"
    assert not re.search(r'"(seconds|cpu_seconds|date|hostname|processor)"', json.dumps(collected))
    assert not collected["failed"] and not collected["missing"]


def test_only_compared_runs_are_concluded_from(collected):
    compared = ["none", "fine-tuning-decoding", "cp-lora-r2-decoding", "cp-lora-r8-decoding"]
    for key in ("summaries", "seeds", "volumes"):
        assert [row["strategy"] for row in collected[key]] == compared, key
    assert {row["strategy"] for row in collected["bins"]} == set(compared) and len(collected["claims"]) == 5


def test_means_are_over_patients_of_their_means_over_seeds(collected):
    frame = pd.DataFrame(collected["patients"])
    for row in collected["summaries"]:
        mine = frame[frame.run.isin([f"{row['strategy']}-s0", f"{row['strategy']}-s1"])]
        by_patient = mine.groupby("patient").dice_soft.mean()
        assert row["n"] == 6 and row["mean"] == pytest.approx(by_patient.mean()) and row["sd"] == pytest.approx(by_patient.std())
        seeds = mine.groupby("seed").dice_soft.mean()
        spread = next(one for one in collected["seeds"] if one["strategy"] == row["strategy"])
        assert spread["seeds"] == 2 and spread["sd_seeds"] == pytest.approx(seeds.std(), abs=1e-8)


def test_amounts_hold_the_number_really_used_and_the_same_seed(collected):
    assert [(row["strategy"], row["patients"]) for row in collected["amounts"]] == [("cp-lora-r8-decoding", 2), ("cp-lora-r8-decoding", 3)]
    frame = pd.DataFrame(collected["patients"])
    whole = frame[frame.run == "cp-lora-r8-decoding-s0"].dice_soft.mean()
    assert collected["amounts"][1]["mean"] == pytest.approx(whole), "seed 1 has no run with fewer patients"


def test_another_network_stands_apart(collected):
    (row,) = collected["networks"]
    assert (row["network"], row["strategy"], row["trainable"], row["n"]) == ("unet", "none", 0, 6)
    assert 0 < row["parameters"] < 100_000 != collected["pretrain"]["parameters"] == 232_737


def invented(dice, ml, predicted, bins):
    "Test patients of one strategy: one seed, one row each."
    return pd.DataFrame([{"run": "none-s0", "method": "none", "rank": math.nan, "region": "", "seed": 0, "patient": f"p{k}", "role": "test",
                          "dice_soft": score, "volume_ml": one, "predicted_ml": other, "volume_bin": name}
                         for k, (score, one, other, name) in enumerate(zip(dice, ml, predicted, bins))])


def test_bins_by_hand():
    rows = invented([0.1, 0.3, *[0.5] * 5, 0.8], [5] * 2 + [30] * 6, [5] * 8, ["<25"] * 2 + ["25-50"] * 6)
    low, middle = results.bin_rows(rows)
    assert (low["bin"], low["n"], low["mean"]) == ("<25", 2, pytest.approx(0.2)) and math.isnan(low["low"]) and math.isnan(low["high"])
    assert low["sd"] == pytest.approx(math.sqrt(0.02))
    assert middle["n"] == 6 and middle["mean"] == pytest.approx(0.55) and middle["low"] < 0.55 < middle["high"]


def test_agreement_by_hand():
    (row,) = results.agreement_rows(invented([0.5] * 4, [10, 20, 30, 40], [12, 18, 33, 41], ["<25"] * 4))
    assert row["bias"] == pytest.approx(1.0) and row["n"] == 4  # +2, -2, +3, +1
    sd = math.sqrt((1 + 9 + 4 + 0) / 3)
    assert row["loa_low"] == pytest.approx(1 - 1.96 * sd) and row["loa_high"] == pytest.approx(1 + 1.96 * sd)
    assert row["loa_low_low"] < row["loa_low"] < row["loa_low_high"] < row["loa_high_low"] < row["loa_high"] < row["loa_high_high"]
    assert row["bias_low"] < 1 < row["bias_high"] and 0.9 < row["ccc"] <= 1 and 0.9 < row["icc"] <= 1 and row["slope_p"] is None


def test_a_metric_of_ones_own_reaches_tables_comparisons_and_claims(study, copied, collected, monkeypatch):
    monkeypatch.setitem(METRICS, "recall", Metric("recall", "", "higher", "recall of voxels", lambda one: 0.0))
    rewrite(copied, lambda table: table.assign(recall=table.dice_soft / 2))
    found = results.collect(with_rows(study, claims={"score": "recall"}), copied)[0]
    assert found["scores"]["recall"] == "recall of voxels" and "recall of voxels" in results.score_table(found)
    assert [row["recall"] for row in found["patients"]] == pytest.approx([row["dice_soft"] / 2 for row in collected["patients"]])
    for mine, theirs in zip(found["comparisons"], collected["comparisons"], strict=True):
        assert [row["difference"] for row in mine["rows"]] == pytest.approx([row["difference"] / 2 for row in theirs["rows"]], abs=1e-8)
    assert found["claims"][0]["effect"] == pytest.approx(collected["claims"][0]["effect"] / 2, abs=1e-8)


def test_losses_are_thinned_to_blocks():
    history = pd.DataFrame({"fold": [0] * 250 + [1] * 250, "step": [*range(1, 251)] * 2, "loss": [1.0] * 250 + [0.5] * 250})
    thin = results.thin_history(history)
    assert thin.groupby("fold").size().tolist() == [84, 84] and thin.step.max() == 250  # blocks of 3, the last of 1
    assert thin.groupby("fold").loss.unique().tolist() == [[1.0], [0.5]]
    few = history[history.step < 4]
    assert results.thin_history(few).loss.tolist() == few.loss.tolist(), "short ones stay as they are"


def test_the_histories_of_a_big_study_stay_small():
    history = pd.DataFrame({"fold": 0, "step": range(1, 801), "loss": 0.123456789})
    one = results.thin_history(history).assign(run="cp-lora-r32-decoding-s0").to_csv(index=False)
    assert 168 * len(one) < 2e6


# ---- studies with holes

ERROR = {"cells": [{"cell_type": "code", "outputs": [{"output_type": "error", "ename": "FloatingPointError", "evalue": "the loss is nan\nmore"}]}],
         "metadata": {}}


def test_failed_and_missing_runs_are_named_and_the_rest_completes(study, copied, collected):
    shutil.rmtree(copied / "finetune/cp-lora-r2-decoding-s1")
    failed = copied / "finetune/fine-tuning-decoding-s0"
    for path in failed.iterdir():
        path.unlink()
    (failed / "finetune.ipynb").write_text(json.dumps(ERROR))
    found, cost = results.collect(study, copied)
    assert found["failed"] == [{"id": "fine-tuning-decoding-s0", "name": "fine-tuning-decoding", "error": "FloatingPointError: the loss is nan",
                                "notebook": "finetune/fine-tuning-decoding-s0/finetune.ipynb"}]
    assert found["missing"] == ["cp-lora-r2-decoding-s1"] and len(found["runs"]) == 8
    assert {row["strategy"]: row["seeds"] for row in found["seeds"]} == {
        "none": 2, "fine-tuning-decoding": 1, "cp-lora-r2-decoding": 1, "cp-lora-r8-decoding": 2}
    assert found["summaries"][0] == collected["summaries"][0] and len(found["claims"]) == 5
    lines = results.gap_lines(found)
    assert len(lines) == 2 and "the loss is nan" in lines[0] and "cp-lora-r2-decoding-s1" in lines[1]


@pytest.mark.parametrize("content, failed", [
    ("{\"cells\": [", False),  # killed while it was written
    (json.dumps({"cells": [], "metadata": {"papermill": {"exception": None}}}), False),  # killed between two cells
    (json.dumps({"cells": [], "metadata": {"papermill": {"exception": True}}}), True),  # the kernel died
])
def test_what_a_killed_run_left_behind(study, copied, content, failed):
    folder = copied / "finetune/none-s0"
    (folder / "run.json").unlink()
    (folder / "finetune.ipynb").write_text(content)
    found, _ = results.collect(study, copied)
    assert bool(found["failed"]) == failed and found["missing"] == ([] if failed else ["none-s0"])


def test_without_any_run_there_is_no_report(study, copied):
    for folder in (copied / "finetune").iterdir():
        (folder / "run.json").unlink()
    (copied / "finetune/none-s0/finetune.ipynb").write_text(json.dumps(ERROR))
    with pytest.raises(FileNotFoundError, match="not one run of smoke is complete.*1 failed.*9 never ran.*the loss is nan.*make paper"):
        results.collect(study, copied)


def test_a_run_of_another_study_is_named_and_not_used(study, copied):
    "A folder is believed for what its run.json says it ran, not for its name."
    shutil.rmtree(copied / "finetune/cp-lora-r8-decoding-s0")
    shutil.copytree(copied / "finetune/cp-lora-r2-decoding-s0", copied / "finetune/cp-lora-r8-decoding-s0")
    found, _ = results.collect(study, copied)
    (failed,) = found["failed"]
    assert failed["id"] == "cp-lora-r8-decoding-s0" and "another run's" in failed["error"] and "rank was 2, is 8" in failed["error"]
    assert len(found["runs"]) == 9 and "rank was 2, is 8" in " ".join(results.gap_lines(found))


def test_runs_on_another_base_are_not_used(study, copied):
    shutil.copy(copied / "pretrain-unet/model.safetensors", copied / "pretrain/model.safetensors")
    found, _ = results.collect(study, copied)
    assert len(found["runs"]) == 1 and len(found["failed"]) == 9 and all("base was" in one["error"] for one in found["failed"])


def test_a_study_whose_options_changed_has_no_runs(study, runs):
    changed = with_rows(study, finetune={**study.finetune.model_dump(), "steps": 3})
    with pytest.raises(FileNotFoundError, match="not one run of smoke is complete.*10 failed.*steps was 2, is 3.*run it again"):
        results.collect(changed, runs)


@pytest.mark.parametrize("name", ["patients.csv", "history.csv"])
def test_files_that_the_run_did_not_write_are_refused(study, copied, name):
    path = copied / "finetune/cp-lora-r8-decoding-s0" / name
    path.write_text(path.read_text().rstrip("\n") + "\n\n")
    with pytest.raises(ValueError, match=f"{name}: is not the file that record.json beside it names"):
        results.collect(study, copied)


def test_one_seed_has_no_spread(study, runs):
    found, _ = results.collect(with_rows(study, seeds=[0], runs=ROWS[:3]), runs)
    assert all(row["seeds"] == 1 and row["sd_seeds"] is None for row in found["seeds"])
    assert found["amounts"] == [] and found["networks"] == [] and not len(results.seed_table(found))
    assert not len(results.amount_table(found)) and not len(results.network_table(found))


def drawn(found, histories, pictures):
    "Names of the figures that a study has data for, each drawn and closed."
    import matplotlib.pyplot as plt

    makers = report.figure_makers(found, histories, pictures)
    for make in makers.values():
        plt.close(make())
    return set(makers)


ALWAYS = {"overview", "network", "cohorts", "curves", "dice", "overlays"}


def test_without_spacing_no_volume_is_known(study, copied, tmp_path):
    mm = dict.fromkeys(("nsd", "tolerance_mm", "hd95_mm", "volume_ml", "predicted_ml"), math.nan)
    rewrite(copied, lambda rows: rows.assign(**mm, volume_bin="unknown"))
    results.write_results(study, copied, tmp_path / "report")
    found, *rest = results.read_results(tmp_path / "report")
    assert found["volumes"] == [] and {row["bin"] for row in found["bins"]} == {"unknown"} and len(found["summaries"]) == 4
    assert drawn(found, *rest) == ALWAYS | {"parameters", "amounts", "ledger"}
    assert results.score_table(found)["HD95, mm"].tolist() == results.score_table(found)["surface Dice"].tolist() == ["–"] * 4
    assert set(results.patient_table(found)["mL"]) == {"unknown"}
    assert next(claim for claim in found["claims"] if claim["number"] == 3)["verdict"] == "not tested"


def test_a_fit_is_never_concluded_from(study, copied, tmp_path):
    "As in the CT-ICH study: one patient tested, the others trained on."
    rewrite(copied, lambda rows: rows.assign(role=["test"] + ["fit"] * (len(rows) - 1)))
    results.write_results(study, copied, tmp_path / "report")
    found, *rest = results.read_results(tmp_path / "report")
    assert all(found[key] == [] for key in ("summaries", "claims", "seeds", "bins", "volumes", "amounts", "networks"))
    assert drawn(found, *rest) == ALWAYS
    rows, title = report.dice_rows(found)
    assert title == "a fit, not a test" and len(rows.drop_duplicates(["method", "rank", "patient"])) == 4 * 5
    assert "soft Dice of the fit" in results.strategy_table(found) and not len(results.claims_table(found))
    assert results.patient_table(found).patient.str.endswith("(fit)").sum() == 5


# ---- every table of every study

def test_every_table_is_text_without_gaps_in_words(collected):
    for name in ("strategy", "region", "rank", "score", "rate", "volume", "agreement", "seed", "amount", "network", "claims", "published",
                 "patient", "cohort", "provenance"):
        text = getattr(results, f"{name}_table")(collected).to_markdown(index=False)
        assert not re.search(r"\b(nan|None|NaN|NaT|<NA>)\b", text), name
    assert results.rank_table(collected).columns.tolist() == ["method", "rank 2", "rank 8"]
    assert results.region_table(collected).strategy.str.replace(" †", "").tolist() == ["No fine-tuning", "Fine-tuning, decoding"]
    assert "another cohort" in " ".join(results.published_table(collected).columns)


def test_a_published_number_stands_beside_its_strategy_its_bin_or_its_claim():
    row = {"what": "one", "strategy": "none", "mean": 0.41, "sd": 0.26, "source": "the paper"}
    found = {"summaries": [{"strategy": "none", "mean": 0.31, "sd": 0.1}],
             "bins": [{"strategy": "none", "bin": "<25", "mean": 0.21, "sd": None}],
             "claims": [{"number": 2, "verdict": "under revision"}],
             "published": [row, {**row, "bin": "<25"}, {**row, "bin": ">100"}, {**row, "strategy": "scratch"},
                           {"what": "two", "claim": 2, "value": "higher", "source": "x"}, {"what": "three", "claim": 3, "value": "y", "source": "x"}]}
    table = results.published_table(found)
    assert table.here.tolist() == ["0.310 ± 0.100", "0.210", "–", "–", "claim 2: under revision", "claim 3: not tested"]
    assert table["published, another cohort"].tolist() == ["0.410 ± 0.260"] * 4 + ["higher", "y"]


def test_a_collapsed_fold_is_a_dagger_and_no_summary_a_dash():
    runs = [{"id": f"cp-lora-r{rank}-decoding", "name": f"cp-lora-r{rank}-decoding", "method": "cp-lora", "region": "decoding", "rank": rank,
             "flags": ["fold 0: the loss stayed where it began"] * (rank == 8)} for rank in (8, 2)]
    found = {"runs": runs, "summaries": [{"strategy": "cp-lora-r2-decoding", "mean": 0.5, "low": 0.4, "high": 0.6}]}
    assert results.rank_table(found).to_dict("records") == [{"method": "CP-LoRA", "rank 2": "0.500 (0.400 to 0.600)", "rank 8": "– †"}]


def test_surface_dice_stands_with_its_tolerance_or_not_at_all(collected):
    (tolerance,) = {row["tolerance_mm"] for row in collected["patients"]}
    assert tolerance >= 5 and f"surface Dice, {tolerance:g} mm" in results.score_table(collected)
    old = {**collected, "patients": [{key: value for key, value in row.items() if key not in ("nsd", "tolerance_mm")}
                                     for row in collected["patients"]]}
    assert list(results.score_table(old)) == ["strategy", "HD95, mm", "lesion F1", "slice sensitivity", "slice specificity"]
    assert len(results.strategy_table(old)) == 4 and len(results.patient_table(old)) == 6


def test_claims_under_revision_are_called_so_wherever_they_stand(collected):
    revised = {claim["number"]: claim for claim in collected["claims"] if claim["number"] in (2, 4, 5) and claim["verdict"] != "not tested"}
    assert revised and {claim["verdict"] for claim in revised.values()} == {"under revision"}
    reason = revised[2]["reason"]
    table = results.claims_table(collected).set_index("claim")
    for claim in revised.values():
        row = table.loc[f"{claim['number']}. {claim['claim']}"]
        assert row["verdict"] == "under revision" and reason in row["what may be written"]
    assert "claim 2: under revision" in set(results.published_table(collected).here)
    said = report.captions(collected)
    assert reason in said["ledger"] and reason in said["overview"]


def test_many_strategies_are_chosen_from_by_a_rule_in_words(collected):
    run = collected["runs"][0]
    many = [{**run, "name": f"{method}-r{rank}-decoding", "method": method, "rank": rank, "region": "decoding"}
            for method in ("lora-c", "convlora", "cp-lora", "dora-c") for rank in (2, 8)]
    found = {**collected, "runs": [*collected["runs"], *many]}
    chosen, rule = results.chosen_strategies(found)
    assert chosen == ["none", "fine-tuning-decoding", "cp-lora-r8-decoding", "lora-c-r8-decoding", "convlora-r8-decoding"]
    assert "rank 8" in rule and results.chosen_strategies(collected)[1] == "all strategies"
    assert results.chosen_strategies({**found, "plan": {**found["plan"], "baseline": "x", "standard": "y", "equal_rank": 3}})[1].startswith("the first")


# ---- provenance

def git(folder, *words):
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *words], cwd=folder, check=True, capture_output=True)


def test_the_commit_says_whether_the_code_was_changed(tmp_path):
    assert results.commit_of(tmp_path) == "unknown"
    (tmp_path / "sahlora").mkdir()
    (tmp_path / "sahlora/code.py").write_text("x = 1\n")
    git(tmp_path, "init", "--quiet")
    assert results.commit_of(tmp_path) == "unknown", "no commit yet"
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "--message", "one")
    clean = results.commit_of(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", clean)
    (tmp_path / "results.json").write_text("{}")
    assert results.commit_of(tmp_path) == clean, "a result is not code"
    (tmp_path / "sahlora/more.py").write_text("y = 2\n")
    assert results.commit_of(tmp_path) == f"{clean}+changes"


def test_the_configuration_changes_with_the_study_alone(study):
    base = {"sahlora": "1", "torch": "2", "python": "3"}
    one = results.describe_provenance(study, base)
    assert one == results.describe_provenance(with_rows(study), base)
    assert one["configuration"] != results.describe_provenance(with_rows(study, seeds=[0]), base)["configuration"]


# ---- figures and PDF from the committed files alone

@pytest.fixture(scope="module")
def written(study, runs, tmp_path_factory):
    "A report's folder with its figures and PDF, as the study itself makes them."
    folder = tmp_path_factory.mktemp("report")
    results.write_results(study, runs, folder)
    report.draw_figures(folder, folder / "figures")
    report.render_pdf(folder / "results.json", folder / "paper.pdf")
    return folder


def test_figures_and_pdf_come_again_from_three_files_byte_for_byte(written, tmp_path):
    committed = tmp_path / "results"
    committed.mkdir()
    for name in ("results.json", "histories.csv", "pictures.safetensors"):
        shutil.copy(written / name, committed)
    report.draw_figures(committed, tmp_path / "figures")
    report.render_pdf(committed / "results.json", tmp_path / "paper.pdf", figures=tmp_path / "figures")
    files = lambda folder: {path.name: path.read_bytes() for path in folder.iterdir()}  # noqa: E731
    mine, theirs = files(tmp_path / "figures"), files(written / "figures")
    assert {name for name in mine if name.endswith(".svg")} == {
        f"{name}.svg" for name in ALWAYS | {"bins", "parameters", "volumes", "amounts", "ledger"}}
    assert mine.keys() == theirs.keys() and [name for name in mine if mine[name] != theirs[name]] == []
    assert (tmp_path / "paper.pdf").read_bytes() == (written / "paper.pdf").read_bytes()


def test_a_changed_number_changes_the_figure_and_the_pdf(written, tmp_path):
    "The two tests above can fail."
    committed = shutil.copytree(written, tmp_path / "results", ignore=shutil.ignore_patterns("figures", "*.pdf"))
    found = json.loads((committed / "results.json").read_text())
    found["patients"][0]["dice_soft"] = 0.987
    found["summaries"][0]["mean"] = 0.987
    (committed / "results.json").write_text(json.dumps(found))
    report.draw_figures(committed, committed / "figures")
    report.render_pdf(committed / "results.json", tmp_path / "paper.pdf")
    assert (committed / "figures/dice.svg").read_bytes() != (written / "figures/dice.svg").read_bytes()
    assert (committed / "figures/network.svg").read_bytes() == (written / "figures/network.svg").read_bytes()
    assert (tmp_path / "paper.pdf").read_bytes() != (written / "paper.pdf").read_bytes()


def change_results(folder, **changes):
    path = folder / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_figure_without_data_any_more_is_taken_away_and_nothing_else(written, tmp_path):
    committed = shutil.copytree(written, tmp_path / "results")
    mine = [committed / f"figures/{name}" for name in ("holiday.png", "sketch.svg", "notes.txt")]
    for path in mine:
        path.write_text("mine")
    change_results(committed, amounts=[])
    paths = report.draw_figures(committed, committed / "figures")
    assert not list((committed / "figures").glob("amounts.*")) and all(path.is_file() for path in paths)
    assert [path.read_text() for path in mine] == ["mine"] * 3


def test_pictures_of_the_same_name_are_not_replaced(written, tmp_path):
    (tmp_path / "dice.png").write_text("mine")
    with pytest.raises(ValueError, match="dice.png: is there already, and no record.json lists it"):
        report.draw_figures(written, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["dice.png"] and (tmp_path / "dice.png").read_text() == "mine"


def test_a_report_of_another_study_is_not_replaced(study, runs, written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "report")
    other = study.model_copy(update={"study": "other"})
    for call in (lambda **more: results.write_results(other, runs, folder, **more),
                 lambda **more: report.draw_figures(folder, folder / "figures", **more)):
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(ValueError, match="study was 'smoke', is 'other'"):
            call()
        assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        call(overwrite=True)
    assert json.loads((folder / "results.json").read_text())["study"]["study"] == "other"


def test_a_report_of_the_same_study_is_written_anew(study, runs, written, tmp_path, capsys):
    folder = shutil.copytree(written, tmp_path / "report")
    capsys.readouterr()
    results.write_results(study, runs, folder)
    assert "was done before by the same call" in capsys.readouterr().out
    results.write_results(with_rows(study, seeds=[0]), runs, folder)
    assert "done before" not in capsys.readouterr().out and len(json.loads((folder / "results.json").read_text())["runs"]) == 6


def test_captions_say_what_was_chosen_and_that_phantoms_are_phantoms(written, collected):
    said = report.captions(collected)
    assert {path.stem for path in (written / "figures").glob("*.svg")} <= set(said)
    assert "the best, the median and the worst patient" in said["overlays"]
    assert all("synthetic, no clinical claim" in text.lower() for name, text in said.items() if name != "network")
    real = report.captions({**collected, "study": {**collected["study"], "synthetic": False}})
    assert not any("synthetic" in text.lower() for text in real.values())


# ---- report.html

@pytest.fixture(scope="module")
def page(project, study, runs, tmp_path_factory):
    "report.html of the tiny study with one run taken away, from the executed notebook."
    folder = tmp_path_factory.mktemp("page")
    hole = shutil.copytree(runs, folder / "runs")
    shutil.rmtree(hole / "finetune/none-s1")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(json.loads(study.model_dump_json())))
    subprocess.run(["papermill", "nbs/experiments/4_report.ipynb", str(folder / "report.ipynb"), "-k", "python3", "--no-progress-bar",
                    "-p", "study", str(folder / "tiny.yaml"), "-p", "runs", str(hole), "-p", "out", str(folder / "report")],
                   cwd=project, check=True, capture_output=True)
    report.render_html(folder / "report.ipynb", folder / "report.html", "tiny")
    report.render_html(folder / "report.ipynb", folder / "again.html", "tiny")
    assert (folder / "report.html").read_bytes() == (folder / "again.html").read_bytes()
    return (folder / "report.html").read_text()


def test_the_page_needs_nothing_from_outside(page):
    outside = re.findall(r"""(?:src|href)=["'](?!data:|#)([^"']+)""", page) + re.findall(r"url\((?!['\"]?(?:data:|#))([^)]+)", page)
    assert not outside and "<script" not in page and "<math" in page and "@media print" in page


def test_the_page_has_contents_figures_and_tables(page):
    assert 'id="TOC"' in page and page.count("<svg") + page.count("data:image/svg") >= 10 and page.count("<table") >= 10
    for words in ("What may be concluded", "Millilitres", "Beside the paper", "another cohort", "synthetic, no clinical claim"):
        assert words in page or words.capitalize() in page, words
    text = re.sub(r"<svg.*?</svg>|data:image/[^\"]+", "", page, flags=re.S)
    assert "another cohort" in text and not re.search(r"check_parameters|Traceback|seconds|peak_mib|\bnan\b", text)


def test_the_page_says_at_its_top_what_is_missing(page):
    assert 0 < page.index("none-s1 was not run to its end") < page.index("What may be concluded</h2>")


# ---- words of others in report.html

OUTSIDE = ("<script>document.title='x'</script>", "a|b", "$x_{$", "![](http://127.0.0.1:9/x.png)", "</title><script>document.title='y'</script>",
           "=1+1", "x" * 400, "<img src=x onerror=document.title=1>", "[a](javascript:alert(1))", "two & txt")


def outside_cohort(folder, kind, names, seed):
    "A procedural cohort whose patients somebody else named."
    made = make_phantom_cohort(folder, kind, len(names), seed=seed, grid=(24, 32))
    made.table.assign(patient=list(names)).to_csv(folder / "cohort.csv", index=False)
    return Cohort.read(folder)


@pytest.fixture(scope="module")
def foreign(project, study, tmp_path_factory):
    "report.html of a study in which every word that a user can choose is meant to do harm."
    folder = tmp_path_factory.mktemp("foreign")
    source = outside_cohort(folder / "source", "tbi", ["<b>s</b>", *(f"s{k}" for k in range(4))], 3)
    target = outside_cohort(folder / "target", "asah", OUTSIDE, 4)
    spec = {role: {"layout": "folder", "path": str(folder / role)} for role in ("source", "target")}
    plan = with_rows(study, **spec, networks={}, seeds=[0], runs=[{"method": "none"}, {"method": "cp-lora"}],
                     title=OUTSIDE[4], note=f"{OUTSIDE[0]}\n\n# {OUTSIDE[3]}")
    with contextlib.redirect_stdout(None):
        pretrain(source, folder / "runs/pretrain", network_of(plan, ""), {"steps": 3, "batch_size": 4, "learning_rate": 3e-3, "seed": 0}, quiet=True)
        run = expand_runs(plan)[0]
        cross_validate(folder / "runs/pretrain/model.safetensors", target, strategy_of(run), kfold(target.patients, 2),
                       folder / "runs/finetune" / run["id"], quiet=True)
    failed = folder / "runs/finetune" / expand_runs(plan)[1]["id"]
    failed.mkdir()
    error = {"output_type": "error", "ename": "ValueError", "evalue": f"{OUTSIDE[0]} {OUTSIDE[1]} {OUTSIDE[2]}"}
    (failed / "finetune.ipynb").write_text(json.dumps({"cells": [{"cell_type": "code", "outputs": [error]}], "metadata": {}}))
    (folder / "plan.yaml").write_text(yaml.safe_dump(json.loads(plan.model_dump_json())))
    subprocess.run(["papermill", "nbs/experiments/4_report.ipynb", str(folder / "report.ipynb"), "-k", "python3", "--no-progress-bar",
                    "-p", "study", str(folder / "plan.yaml"), "-p", "runs", str(folder / "runs"), "-p", "out", str(folder / "report")],
                   cwd=project, check=True, capture_output=True)
    report.render_html(folder / "report.ipynb", folder / "report.html", plan.title)
    report.render_pdf(folder / "report/results.json", folder / "paper.pdf")
    return folder


def test_words_of_others_are_text_in_the_page(foreign):
    page = (foreign / "report.html").read_text()
    assert not re.search(r"<script|<b>|<img(?! (role=\"img\" )?[^>]*src=\"data:)|onerror=(?!document.title=1&gt;)|href=\"(?!#)", page)
    assert page.count("</title>") == 1 + page.count("<title>") - 1 and not (foreign / "x.png").exists()
    text = html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"<svg.*?</svg>", "", page, flags=re.S)))
    for name in OUTSIDE:
        assert plain_text(name, 60) in text, name
    rows = re.findall(r"<tr>(.*?)</tr>", page[page.index('id="patients"'):page.index('id="provenance"')], re.S)
    assert len(rows) == 1 + len(OUTSIDE) and {row.count("<td") for row in rows[1:]} == {3}


def test_the_page_forbids_what_it_does_not_need(foreign):
    page = (foreign / "report.html").read_text()
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    assert policy and page.index("<head>") < policy.start() < page.index("<style") and policy.start() < page.index("<title")
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules == {"default-src": "'none'", "img-src": "data:", "style-src": "'unsafe-inline'", "base-uri": "'none'", "form-action": "'none'"}


def test_html_in_a_notebook_becomes_text_and_pictures_stay_here(tmp_path):
    outputs = [nbformat.v4.new_output("display_data", {"text/markdown": "<script>document.title='x'</script> and ![cap](http://127.0.0.1:9/x.png)"}),
               nbformat.v4.new_output("display_data", {"text/html": "<iframe src=x></iframe>", "text/plain": "a frame"})]
    cells = [nbformat.v4.new_markdown_cell("---\nheader-includes: <script>1</script>\n---\n\n<div onclick=x>\n\ntext\n\n</div>"),
             nbformat.v4.new_code_cell("", outputs=outputs)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "page.ipynb")
    report.render_html(tmp_path / "page.ipynb", tmp_path / "page.html", "true\n<b>")
    page = (tmp_path / "page.html").read_text()
    assert not re.search("<(script|iframe|img|div)", page) and "&lt;script&gt;" in page and "cap" in page and "a frame" in page
    assert "<title>true &lt;b&gt;</title>" in page


def test_nothing_of_the_page_acts_in_a_browser(foreign):
    "Figures, tables and formulas are seen; no error, no request, no change of the title."
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = os.environ.get("SAHLORA_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("needs Chromium: apt-get install chromium, or name one in SAHLORA_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page, said, asked = browser.new_page(), [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((foreign / "report.html").as_uri())
        widths = page.evaluate("[...document.querySelectorAll('img, svg')].map(one => one.getBoundingClientRect().width)")
        counts = page.evaluate("['math', 'table', 'script'].map(tag => document.querySelectorAll(tag).length)")
        title, styled = page.evaluate("[document.title, getComputedStyle(document.body).maxWidth]")
        quiet, local = list(said), list(asked)
        page.evaluate("const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s)")
        ran = page.evaluate("window.ran")
        browser.close()
    assert quiet == [] and local == [(foreign / "report.html").as_uri()] and title == OUTSIDE[4]
    assert len(widths) >= 5 and min(widths) > 100 and counts[0] >= 4 and counts[1] >= 5 and counts[2] == 0 and styled != "none"
    assert ran is None and "Content Security Policy" in said[0], "a script that some gap let in would not run either"


def test_a_page_shows_its_own_pictures_alone(tmp_path):
    "Any notebook may be made a page: no file of this machine gets into it, and no link acts."
    words = "![a](/etc/hostname) ![b](../../etc/hostname) ![c](//example.org/x.png) [d](javascript:alert(1)) [e](https://example.org) [f](#g)"
    path = tmp_path / "any.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(words)]), path)
    report.render_html(path, tmp_path / "any.html", "any")
    page = (tmp_path / "any.html").read_text(encoding="utf-8")
    body = page[page.index("<body"):]
    assert "<img" not in body and "javascript:" not in body and "base64" not in body
    assert 'href="https://example.org"' in body and 'href="#g"' in body


@pytest.mark.parametrize("text", ["x", "{}", "[]", '{"nbformat": 4}'])
def test_what_is_no_notebook_is_named(tmp_path, text):
    (tmp_path / "x.ipynb").write_text(text)
    with pytest.raises(ValueError, match="x.ipynb: is no notebook"):
        report.render_html(tmp_path / "x.ipynb", tmp_path / "x.html", "x")
    with pytest.raises(ValueError, match="is the notebook itself"):
        report.render_html(tmp_path / "x.ipynb", tmp_path / "x.ipynb", "x")
    assert (tmp_path / "x.ipynb").read_text() == text and not (tmp_path / "x.html").exists()
