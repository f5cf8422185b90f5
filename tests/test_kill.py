"""A study that is killed at any moment, and started again, ends in the same bytes; one that fails in part says so."""
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from sahlora.study.batch import MARK, end_leftovers, leftovers, make_batch, pending
from sahlora.common.files import LOCK, owner

TINY = {"source": {"cases": 3, "grid": [32, 48]}, "target": {"cases": 3, "grid": [32, 48]}, "networks": {},
        "pretrain": {"steps": 120, "batch_size": 4}, "finetune": {"steps": 40, "batch_size": 4},
        "runs": [{"method": "none"}, {"method": "cp-lora", "learning_rate": 0.01}]}
# What a run cost, and notebooks as they were executed: all else is the same bytes.
MAY_DIFFER = ("run.json", "cost.json", "cost.md")


def write_study(project: Path, path: Path, **changes: object) -> Path:
    "The smoke study, made tiny and changed, at `path`."
    content = yaml.safe_load((project / "paper/studies/smoke.yaml").read_text())
    for key, values in {**TINY, **changes}.items():
        content[key] = {**content[key], **values} if isinstance(values, dict) and values else values
    path.write_text(yaml.safe_dump(content))
    return path


def start(study: Path, runs: Path, *options: str) -> subprocess.Popen:
    "`sahlora study run`, as `make paper` calls it, in a session of its own."
    env = {name: value for name, value in os.environ.items() if name not in ("IN_TEST", MARK)}
    return subprocess.Popen(["sahlora", "study", "run", str(study), "--runs", str(runs), *options],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True)


def finish(process: subprocess.Popen, timeout: float = 600) -> str:
    "What it printed, when it ended well."
    said = process.communicate(timeout=timeout)[0]
    assert process.returncode == 0, said
    return said


def contents(folder: Path) -> dict[str, bytes]:
    "Every file of a study that must be the same, by name."
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in MAY_DIFFER and ".ipynb" not in path.name}


def wait_for(condition, process: subprocess.Popen, seconds: float = 300) -> None:
    "Wait until something is so, while a process goes on."
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.02)


def engine_of(process: subprocess.Popen) -> psutil.Process | None:
    "The Snakemake that a study's owner started; None before."
    return next((child for child in psutil.Process(process.pid).children() if "snakemake" in " ".join(child.cmdline())), None)


def at_work(process: psutil.Process) -> bool:
    "Whether a process is still there, and no zombie."
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.fixture(scope="module")
def whole(project, tmp_path_factory):
    "(study file, files) of a tiny study that ran without a kill."
    folder = tmp_path_factory.mktemp("whole")
    study = write_study(project, folder / "tiny.yaml")
    finish(start(study, folder / "runs"))
    return study, contents(folder / "runs/smoke")


def test_killed_in_training_and_scoring_and_run_again(whole, tmp_path):
    "The whole group while the base trains; then the owner alone, whose orphans train on; then between two files of a run."
    study, wanted = whole
    folder = tmp_path / "smoke"
    process = start(study, tmp_path)
    wait_for(lambda: (folder / "pretrain" / LOCK).exists(), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

    process = start(study, tmp_path)
    wait_for(lambda: (folder / "finetune/cp-lora-r8-decoding-s0" / LOCK).exists(), process)
    process.kill()
    process.wait()
    orphans = leftovers(folder)
    assert any("papermill" in " ".join(one.cmdline()) for one in orphans)
    for one in orphans:
        one.suspend()  # else a fast machine has them done before the next owner looks

    process = start(study, tmp_path)
    wait_for(lambda: not any(at_work(one) for one in orphans), process)
    wait_for(lambda: engine_of(process), process)
    wait_for(lambda: (folder / "finetune/cp-lora-r8-decoding-s0/patients.csv").exists(), process)
    engine_of(process).kill()
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "were still at work; they were ended" in said and "run the study again" in said
    assert not leftovers(folder)

    finish(start(study, tmp_path))
    found = contents(folder)
    assert not [name for name in wanted if found.get(name) != wanted[name]] and set(found) == set(wanted)
    assert pending(make_batch(study, tmp_path)) == []


def test_the_plan_says_what_is_left_and_about_how_long(whole, tmp_path):
    study, wanted = whole
    plan = subprocess.run(["sahlora", "study", "plan", str(study), "--runs", str(tmp_path)], capture_output=True, text=True, check=True).stdout
    assert "finetune cp-lora-r8-decoding-s0" in plan and "About " in plan and os.listdir(tmp_path) == []
    hours = float(re.search(r"([0-9.]+) core hours", plan)[1])
    spent = [json.loads(path.read_text())["cpu_seconds"] for path in (study.parent / "runs/smoke").glob("*/**/run.json")]
    assert sum(spent) / 3 < 3600 * hours < 5 * sum(spent)  # the report and the kernels' starts are in the plan alone
    done = subprocess.run(["sahlora", "study", "plan", str(study), "--runs", str(study.parent / "runs")], capture_output=True, text=True, check=True)
    assert "everything is done; nothing would run" in done.stdout


def test_a_living_owner_is_left_alone(whole, tmp_path):
    study, _ = whole
    first = start(study, tmp_path)
    wait_for(lambda: owner(tmp_path / "smoke").startswith(f"process {first.pid} "), first)
    second = start(study, tmp_path)
    said = second.communicate(timeout=60)[0]
    assert second.returncode == 2 and f"is being written by process {first.pid} " in said
    assert first.poll() is None
    wait_for(lambda: leftovers(tmp_path / "smoke"), first)
    first.terminate()  # asked to stop, it leaves nothing at work and nothing locked
    first.wait(60)
    assert first.returncode not in (0, None) and not leftovers(tmp_path / "smoke") and owner(tmp_path / "smoke") == "nobody"


def test_a_failed_run_stops_neither_the_others_nor_the_report(project, tmp_path):
    runs = [{"method": "none"}, {"method": "fine-tuning", "learning_rate": 1e30}, {"method": "norm-stats"}]
    study = write_study(project, tmp_path / "bad.yaml", runs=runs)
    process = start(study, tmp_path)
    said = process.communicate(timeout=600)[0]
    report, failed = tmp_path / "smoke/report", tmp_path / "smoke/finetune/fine-tuning-decoding-s0"
    assert process.returncode == 1 and "1 of 3 runs are missing; the report says which" in said, said
    results = json.loads((report / "results.json").read_text())
    assert {run["method"] for run in results["runs"]} == {"none", "norm-stats"}
    assert [one["id"] for one in results["failed"]] == [failed.name] and "nan" in results["failed"][0]["error"]
    assert failed.name in (report / "report.html").read_text() or "fine-tuning" in (report / "report.html").read_text()
    assert (report / "paper.pdf").read_bytes().startswith(b"%PDF") and not (failed / "run.json").exists()

    write_study(project, tmp_path / "bad.yaml", runs=[{"method": "none"}, {"method": "fine-tuning"}, {"method": "norm-stats"}])
    finish(start(study, tmp_path))
    results = json.loads((report / "results.json").read_text())
    assert len(results["runs"]) == 3 and not results["failed"]


def test_a_cohort_that_is_not_there_is_named(project, tmp_path):
    study = write_study(project, tmp_path / "bad.yaml")
    content = yaml.safe_load(study.read_text())
    study.write_text(yaml.safe_dump({**content, "source": {"layout": "folder", "path": str(tmp_path / "nowhere")}}))
    process = start(study, tmp_path)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 2 and f"source.path: {tmp_path}/nowhere: no such folder" in said


@pytest.mark.slow
def test_nothing_is_reported_when_nothing_is_whole(project, tmp_path):
    study = write_study(project, tmp_path / "bad.yaml", pretrain={"steps": 3, "batch_size": 4, "learning_rate": 1e30})
    process = start(study, tmp_path)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 1 and "no report: no run is whole" in said and not (tmp_path / "smoke/report/results.json").exists()


WRITER = """import sys, time
from sahlora.common.files import sole_writer
with sole_writer(sys.argv[1]):
    print("in", flush=True)
    time.sleep(float(sys.argv[2]))
"""
COUNTER = """import pathlib, random, sys, time
from sahlora.common.files import sole_writer
file = pathlib.Path(sys.argv[1], "count")
for _ in range(30):
    with sole_writer(sys.argv[1]):
        number = int(file.read_text())
        time.sleep(random.random() / 500)
        if sys.argv[2] == "counts":
            file.write_text(str(number + 1))
"""


def writer(folder: Path, seconds: float) -> subprocess.Popen:
    "A process that is in `sole_writer` for a while."
    return subprocess.Popen([sys.executable, "-c", WRITER, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True)


def test_a_second_writer_waits_for_the_first(tmp_path):
    first = writer(tmp_path / "run", 1.5)
    assert first.stdout.readline() == "in\n"
    second = writer(tmp_path / "run", 0)
    assert f"process {first.pid} " in second.stdout.readline()
    assert second.stdout.readline() == "in\n" and first.wait(5) == 0
    assert second.wait(30) == 0 and os.listdir(tmp_path) == []


def test_many_writers_are_never_two_at_once(tmp_path):
    "Each finds a counter as the last one left it; they take the lock over from each other, and some are killed."
    (tmp_path / "run").mkdir()
    (tmp_path / "run/count").write_text("0")
    words = [sys.executable, "-c", COUNTER, str(tmp_path / "run")]
    counters = [subprocess.Popen([*words, "counts"], stdout=subprocess.DEVNULL) for _ in range(4)]
    for _ in range(6):
        victim = subprocess.Popen([*words, "is killed"], stdout=subprocess.DEVNULL)
        time.sleep(0.15 + random.random() / 10)
        victim.kill()
        victim.wait()
    assert [one.wait(60) for one in counters] == [0] * 4
    assert (tmp_path / "run/count").read_text() == "120"


def test_only_this_study_is_ended(tmp_path):
    def sleeper(folder):
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=os.environ | {MARK: str(folder)})

    mine, other = sleeper(tmp_path / "a"), sleeper(tmp_path / "b")
    try:
        while not leftovers(tmp_path / "a"):
            time.sleep(0.02)
        assert end_leftovers(tmp_path / "a") == 1 and mine.wait(5) is not None and other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_ten_kills_at_random_moments(whole, tmp_path, seed):
    "Of the group, of the owner alone, or of the engine alone; whatever is left at work is ended by the next."
    study, wanted = whole
    draw = random.Random(seed)
    for _ in range(10):
        process = start(study, tmp_path)
        time.sleep(draw.uniform(1, 25))
        if process.poll() is None:
            how = draw.choice(["group", "owner", "engine"])
            if how == "group":
                os.killpg(process.pid, signal.SIGKILL)
            elif how == "owner":
                process.kill()
            else:
                for child in psutil.Process(process.pid).children():
                    child.kill()
        process.wait(600)  # the engine may not have been there yet: then all of the study runs
    finish(start(study, tmp_path))
    found = contents(tmp_path / "smoke")
    assert not [name for name in wanted if found.get(name) != wanted[name]] and set(found) == set(wanted)
