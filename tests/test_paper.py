"""The way of the data end to end through the batch engine, on a study small enough for a test."""
import json
import os
import re
import shutil
import subprocess

import pandas as pd
import pytest
import yaml

from sahlora.cohorts.cohort import make_phantom_cohort

TINY = {"source": {"cases": 4, "grid": [32, 48]}, "target": {"cases": 3, "grid": [32, 48]},
        "pretrain": {"steps": 4, "batch_size": 4}, "finetune": {"steps": 3, "batch_size": 4}}


def tiny_study(project, path, name="smoke", **changes):
    "A study file like `name`, only smaller, at `path`."
    content = yaml.safe_load((project / f"paper/studies/{name}.yaml").read_text())
    for section, values in changes.items():
        content[section] = {**content[section], **values} if isinstance(values, dict) else values
    for network in content.get("networks", {}).values():
        network["pretrain"] = {"steps": 3, "batch_size": 4}
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def engine(project):
    "Run the batch engine on a study file into a folder; returns the finished process."

    def run(study, runs, *options, real_data=None, own=None):
        env = {name: value for name, value in os.environ.items() if name not in ("SAHLORA_REAL_DATA", "IN_TEST")}
        env |= {"SAHLORA_OWN_DATA": str(own)} if own else {}
        env |= {"SAHLORA_REAL_DATA": str(real_data)} if real_data else {}
        return subprocess.run(["snakemake", "-s", "paper/Snakefile", "--cores", "2", "--nolock", *options, "--config",
                               f"study={study}", f"runs={runs}"], cwd=project, capture_output=True, text=True, env=env)

    return run


@pytest.fixture(scope="module")
def finished(project, engine, tmp_path_factory):
    "(study file, folder of runs) of a finished tiny study."
    folder = tmp_path_factory.mktemp("paper")
    study = tiny_study(project, folder / "tiny.yaml", **TINY)
    done = engine(study, folder / "runs")
    assert done.returncode == 0, done.stdout + done.stderr
    return study, folder / "runs"


def planned(done):
    "rule -> how often, of a dry run."
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout[done.stdout.index("Job stats"):] if "Job stats" in done.stdout else ""
    return {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", table, re.M) if rule not in ("total", "all")}


def test_everything_is_there_and_whole(finished):
    report = finished[1] / "smoke/report"
    results = json.loads((report / "results.json").read_text())
    assert [run["name"] for run in results["runs"]] == ["none", "norm-stats", "fine-tuning-decoding", "cp-lora-r8-decoding",
                                                            "unet-cp-lora-r8-decoding"]
    assert [run["trainable"] for run in results["runs"]][:4] == [0, 0, 101_985, 4_920]
    assert len(results["patients"]) == 15 and results["cohorts"]["source"]["patients"] == 4
    assert (report / "paper.pdf").read_bytes().startswith(b"%PDF")
    assert {path.name for path in (report / "figures").iterdir()} == {"record.json"} | {
        f"{name}.{kind}" for kind in ("svg", "png") for name in ("overview", "cohorts", "network", "dice", "curves", "overlays", "bins",
                                                                 "volumes", "parameters", "ledger")}
    cost = json.loads((report / "cost.json").read_text())
    assert all(facts["seconds"] > 0 and facts["threads"] == 1 for facts in cost.values()) and len(cost) == 7


def test_every_number_of_the_tables_is_in_patients_csv(finished):
    folder = finished[1] / "smoke"
    results = json.loads((folder / "report/results.json").read_text())
    for run in results["runs"]:
        table = pd.read_csv(folder / "finetune" / run["id"] / "patients.csv")
        assert run["test_dice_soft"]["mean"] == pytest.approx(table.dice_soft.mean(), rel=1e-8)
        assert run["test_dice_hard"]["n"] == len(table) == 3


def test_html_needs_nothing_from_outside(finished):
    page = (finished[1] / "smoke/report/report.html").read_text()
    outside = re.findall(r"""(?:src|href)=["'](?!data:|#)([^"']+)""", page) + re.findall(r"url\((?!['\"]?data:|#)([^)]+)", page)
    assert not [link for link in outside if not link.startswith("https://doi.org")], outside[:3]
    assert page.count("data:image/") + page.count("<svg") >= 5 and "<table" in page
    assert "no clinical claim" in page and "check_parameters" not in page and "Traceback" not in page


def test_a_second_run_does_nothing(finished, engine):
    done = engine(*finished)
    assert done.returncode == 0 and "Nothing to be done" in done.stdout + done.stderr


def test_a_deleted_output_reruns_what_depends_on_it(finished, engine, tmp_path):
    patients = finished[1] / "smoke/finetune/cp-lora-r8-decoding-s0/patients.csv"
    shutil.copy2(patients, tmp_path / "kept")
    patients.unlink()
    try:
        assert planned(engine(*finished, "--dry-run")) == {"finetune": 1, "report": 1, "html": 1, "pdf": 1}
    finally:
        shutil.copy2(tmp_path / "kept", patients)


def test_a_changed_parameter_reruns_what_depends_on_it(project, finished, engine, tmp_path):
    runs = [{"method": "none"}, {"method": "fine-tuning"}, {"method": "cp-lora", "ranks": [8], "learning_rate": 0.02}]
    study = tiny_study(project, tmp_path / "changed.yaml", **TINY, runs=runs)
    assert planned(engine(study, finished[1], "--dry-run"))["finetune"] == 1
    study = tiny_study(project, tmp_path / "changed.yaml", **{**TINY, "pretrain": {"steps": 5, "batch_size": 4}})
    plan = planned(engine(study, finished[1], "--dry-run"))
    assert plan["pretrain"] == 1 and plan["finetune"] == 4 and "cohorts" not in plan


def test_two_runs_give_the_same_bytes(finished, engine, tmp_path):
    study, first = finished
    done = engine(study, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    same = ["report/results.json", "report/paper.pdf", "pretrain/model.safetensors", "cohorts/target/cohort.csv"]
    same += [path.relative_to(first / "smoke").as_posix() for path in (first / "smoke/finetune").glob("*/*")
             if path.suffix in (".csv", ".safetensors")]
    same += [f"report/figures/{path.name}" for path in (first / "smoke/report/figures").iterdir()]
    different = [name for name in same if (first / "smoke" / name).read_bytes() != (tmp_path / "smoke" / name).read_bytes()]
    assert len(same) > 12 and not different


def test_missing_real_data_is_a_recipe(project, engine, tmp_path):
    done = engine(project / "paper/studies/ct-ich.yaml", tmp_path, real_data=tmp_path / "nowhere")
    said = done.stdout + done.stderr
    assert done.returncode != 0
    for words in ("physionet.org", "CC BY 4.0", "SAHLORA_REAL_DATA", "Patients_CT"):
        assert words in said
    assert not (tmp_path / "ct-ich/cohorts/source/cohort.csv").exists()


def test_a_bad_study_stops_at_once(project, engine, tmp_path):
    study = tiny_study(project, tmp_path / "bad.yaml", pretrain={"stepz": 3})
    done = engine(study, tmp_path / "runs")
    assert done.returncode != 0 and "did you mean 'steps'" in done.stdout + done.stderr
    assert not (tmp_path / "runs").exists()


def papermill(project, executed, **values):
    arguments = [item for name, value in values.items() for item in ("-p", name, str(value))]
    return subprocess.run(["papermill", "nbs/experiments/3_finetune.ipynb", str(executed), "-k", "python3",
                           "--no-progress-bar", *arguments], cwd=project, capture_output=True, text=True)


def test_one_run_by_papermill_alone(project, finished, tmp_path):
    folder = finished[1] / "smoke"
    done = papermill(project, tmp_path / "out.ipynb", method="cp-lora", rank=2, steps=2, batch_size=4, out=tmp_path / "run",
                     base=folder / "pretrain/model.safetensors", cohort=folder / "cohorts/target")
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert run["name"] == "cp-lora-r2-decoding" and run["trainable"] == 4_920 // 4


@pytest.mark.parametrize("values, words", [
    ({"rnak": 8}, "did you mean 'rank'"),
    ({"method": "cp-lorra"}, "did you mean 'cp-lora'"),
    ({"rank": "eight"}, "must be int"),
])
def test_a_bad_parameter_fails_before_any_work(project, tmp_path, values, words):
    done = papermill(project, tmp_path / "out.ipynb", out=tmp_path / "run", **values)
    assert done.returncode == 1 and words in done.stderr
    cells = json.loads((tmp_path / "out.ipynb").read_text())["cells"]
    assert sum(cell["metadata"].get("papermill", {}).get("status") == "completed" for cell in cells) < 9
    assert not (tmp_path / "run").exists()


def test_a_failed_run_is_kept_as_evidence_and_never_counts(project, finished, engine, tmp_path):
    "A learning rate that ends in NaN: the notebook with the error stays, its outputs do not, and nothing is reported."
    shutil.copytree(finished[1] / "smoke/cohorts", tmp_path / "smoke/cohorts")
    study = tiny_study(project, tmp_path / "bad.yaml", **TINY, runs=[
        {"method": "fine-tuning", "learning_rate": 1e30}])
    done = engine(study, tmp_path)
    folder = tmp_path / "smoke/finetune/fine-tuning-decoding-s0"
    assert done.returncode != 0 and "the loss is nan" in done.stdout + done.stderr
    assert "FloatingPointError" in (folder / "finetune.ipynb").read_text()
    assert not (folder / "run.json").exists() and not (tmp_path / "smoke/report/results.json").exists()


def test_real_slices_go_the_same_way(project, engine, real_data, tmp_path):
    small = {"layout": "ct-ich", "path": "$SAHLORA_REAL_DATA/ct-ich-mini", "size": 64}
    study = tiny_study(project, tmp_path / "real.yaml", "ct-ich", source=small, target=small,
                       pretrain={"steps": 3}, finetune={"steps": 2})
    done = engine(study, tmp_path, real_data=real_data)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "ct-ich/report/results.json").read_text())
    assert results["cohorts"]["target"]["blood_ml"] is None
    assert {(row["patient"], row["role"]) for row in results["patients"]} == {("ct-ich-079", "test"), ("ct-ich-080", "fit")}
    said = json.loads((tmp_path / "ct-ich/pretrain/pretrain.ipynb").read_text())
    assert "batches hold the other kind only" in json.dumps(said)
    assert "synthetic" not in (tmp_path / "ct-ich/report/figures/dice.svg").read_text()
    assert (tmp_path / "ct-ich/report/paper.pdf").stat().st_size > 20_000


def test_a_cohort_of_ones_own_needs_no_code(project, engine, tmp_path):
    "own.yaml as it is, but for the number of steps, on a user's folder of NIfTI."
    for role, kind in (("source", "tbi"), ("target", "asah")):
        made = make_phantom_cohort(tmp_path / f"made/{role}", kind, 6, seed=5, grid=(32, 40))
        for folder in ("images", "labels"):
            (tmp_path / f"own/{role}/{folder}").mkdir(parents=True)
        for row in made.table.itertuples():
            shutil.copy(made.folder / row.image, tmp_path / f"own/{role}/images/{row.case}.nii.gz")
            shutil.copy(made.folder / row.label, tmp_path / f"own/{role}/labels/{row.case}.nii.gz")
    study = tiny_study(project, tmp_path / "own.yaml", "own", pretrain={"steps": 4, "batch_size": 4}, finetune={"steps": 2, "batch_size": 4},
                       threads=1, seeds=[0], runs=[{"method": "none"}, {"method": "cp-lora", "ranks": [2], "learning_rate": [0.003, 0.01]}])
    done = engine(study, tmp_path, own=tmp_path / "own")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "own/report/results.json").read_text())
    assert results["cohorts"]["target"]["patients"] == 6 and len(results["claims"]) == 5
    assert "synthetic" not in (tmp_path / "own/report/figures/dice.svg").read_text()
    without = engine(study, tmp_path / "again")
    assert without.returncode != 0 and "SAHLORA_OWN_DATA" in without.stdout + without.stderr


@pytest.mark.parametrize(("says", "calls", "code"), [("OSError: Address already in use", 2, 0), ("ValueError: no blood", 1, 1)])
def test_a_kernel_without_a_port_is_started_again_and_nothing_else_is(project, tmp_path, says, calls, code):
    text = (project / "paper/Snakefile").read_text()
    shell = "".join(re.findall(r'^    "(.*)"$', text.split("PAPERMILL = (")[1].split("\n)")[0], re.M))
    shell = shell.replace("{{", "{").replace("}}", "}")
    for name, value in {"{threads}": "1", "{params.notebook}": "a.ipynb", "{log}": "log", "{params.values:q}": "'{a: 1}'"}.items():
        shell = shell.replace(name, value)
    fake = tmp_path / "papermill"
    fake.write_text(f'#!/bin/sh\necho called >> calls\n[ $(wc -l < calls) -gt 1 ] || {{ echo "{says}"; exit 1; }}\n')
    fake.chmod(0o755)
    done = subprocess.run(["bash", "-c", f"set -euo pipefail; {shell}; touch after"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"})
    assert done.returncode == code and len((tmp_path / "calls").read_text().split()) == calls
    assert (says in done.stderr) == bool(code) and (tmp_path / "after").exists() == (code == 0)
