"""A study through a real Slurm: one node on loopback, with the daemons of Debian's slurm-wlm and munge, for as long as the tests take."""
import getpass
import importlib.util
import json
import os
import platform
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from test_kill import contents, finish, start, wait_for, write_study

from sahlora.study.batch import cancel_jobs, job_prefix

pytestmark = pytest.mark.slow

CONF = """ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
AuthType=auth/munge
AuthInfo=socket={munge}/socket
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SwitchType=switch/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=60 State=UP
"""
PROFILE = {"executor": "slurm", "jobs": 4, "retries": 1, "latency-wait": 10, "slurm-no-account": True, "slurm-status-command": "squeue",
           "slurm-init-seconds-before-status-checks": 3, "default-resources": ["mem_mb=1000", "runtime=30", "slurm_partition=main"]}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def why_not() -> str:
    "Why there can be no Slurm here; nothing if there can."
    path = os.environ["PATH"] + ":/usr/sbin"
    if missing := [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=path)]:
        return f"needs Slurm: {', '.join(missing)} not found (Debian: apt-get install slurm-wlm munge)"
    if getpass.getuser() != "root":
        return "needs root, to start slurmd"
    return "" if importlib.util.find_spec("snakemake_executor_plugin_slurm") else "needs pip install 'sahlora[slurm]'"


def daemon(*words: str, log: Path) -> subprocess.Popen:
    with open(log, "w") as file:
        return subprocess.Popen(words, stdout=file, stderr=file, env=os.environ | {"PATH": os.environ["PATH"] + ":/usr/sbin"})


def up(daemons: list[subprocess.Popen], folder: Path) -> None:
    "Wait until the node is idle."
    for _ in range(300):
        states = subprocess.run(["sinfo", "--noheader", "--format=%t"], capture_output=True, text=True).stdout.split()
        if states == ["idle"]:
            return
        time.sleep(0.2)
    logs = "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in sorted(folder.glob("*.log")))
    raise RuntimeError(f"Slurm does not come up: node {states}, daemons {[one.poll() for one in daemons]}\n{logs}")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    "A Slurm of one node; SLURM_CONF names it to sbatch, squeue and scancel."
    if reason := why_not():
        pytest.skip(reason)
    folder, munge = tmp_path_factory.mktemp("slurm"), tmp_path_factory.mktemp("munge")
    for name in ("state", "spool", "bin"):
        (folder / name).mkdir()
    (munge / "key").write_bytes(os.urandom(128))
    (munge / "key").chmod(0o600)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    values = {"host": platform.node().split(".")[0], "user": getpass.getuser(), "munge": munge, "folder": folder,
              "ports": (free_port(), free_port()), "cpus": os.cpu_count(), "memory": memory - 200}
    (folder / "slurm.conf").write_text(CONF.format(**values))
    path = os.environ["PATH"]
    os.environ |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{folder / 'bin'}:{path}"}
    # Snakemake's plugin takes SLURM_CONF away from its jobs, where srun needs it.
    (folder / "bin/srun").write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which("srun", path=path)} "$@"\n')
    (folder / "bin/srun").chmod(0o755)
    parts = {"--key-file": "key", "--socket": "socket", "--pid-file": "pid", "--log-file": "log", "--seed-file": "seed"}
    words = [f"{name}={munge / file}" for name, file in parts.items()]
    daemons = [daemon("munged", "--foreground", "--force", *words, log=folder / "munged.log")]
    try:
        while not (munge / "socket").exists():
            assert daemons[0].poll() is None, (folder / "munged.log").read_text()
            time.sleep(0.05)
        daemons += [daemon("slurmctld", "-D", "-c", log=folder / "ctld.out.log"), daemon("slurmd", "-D", log=folder / "slurmd.out.log")]
        up(daemons, folder)
        yield folder
    finally:
        for one in reversed(daemons):
            one.terminate()
            one.wait(30)
        os.environ["PATH"] = path
        del os.environ["SLURM_CONF"]


@pytest.fixture
def profile(tmp_path):
    folder = tmp_path / "profile"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(PROFILE))
    return folder


def queue() -> list[str]:
    "State and comment of what is in the queue."
    words = ["squeue", "--noheader", "--states=PENDING,RUNNING", "--format=%A %T %k"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()


def running(what: str) -> str:
    "The number of a job at work that has a word in its comment; '' when there is none."
    return next((line.split()[0] for line in queue() if "RUNNING" in line and what in line), "")


def test_the_profile_is_one_for_slurm(project):
    found = yaml.safe_load((project / "paper/profiles/slurm/config.yaml").read_text())
    assert found["executor"] == "slurm" and found["retries"] >= 1 and {"mem_mb", "runtime"} <= set(found["default-resources"])


def test_the_same_bytes_come_out_though_jobs_are_cancelled(project, slurm, profile, tmp_path):
    "A run of the study is cancelled while it trains: it is tried again, and the results are those of this machine alone."
    study = write_study(project, tmp_path / "tiny.yaml")
    finish(start(study, tmp_path / "local"))
    process = start(study, tmp_path / "cluster", "--profile", str(profile))
    wait_for(lambda: running("rule_finetune_wildcards_cp-lora"), process, 300)
    subprocess.run(["scancel", running("rule_finetune_wildcards_cp-lora")], check=True)
    said = finish(process)
    assert "Trying to restart job" in said, said
    here, there = contents(tmp_path / "local/smoke"), contents(tmp_path / "cluster/smoke")
    assert {"report/results.json", "report/paper.pdf", "finetune/cp-lora-r8-decoding-s0/patients.csv"} <= set(here)
    assert set(here) == set(there) and not [name for name in here if here[name] != there[name]]


def test_jobs_of_a_killed_owner_are_cancelled_by_the_next(project, slurm, profile, tmp_path):
    study, folder = write_study(project, tmp_path / "tiny.yaml", pretrain={"steps": 4000, "batch_size": 4}), tmp_path / "runs/smoke"
    process = start(study, tmp_path / "runs", "--profile", str(profile))
    wait_for(lambda: running("rule_pretrain"), process, 300)
    left = running("rule_pretrain")
    os.killpg(process.pid, 9)
    process.wait()
    assert any(line.startswith(f"{left} ") for line in queue())  # Slurm knows nothing of our end
    write_study(project, study, pretrain={"steps": 5, "batch_size": 4})
    finish(start(study, tmp_path / "runs", "--profile", str(profile)))
    assert not queue() and json.loads((folder / "pretrain/run.json").read_text())["training"]["steps"] == 5


def test_a_run_that_fails_on_the_cluster_is_reported(project, slurm, profile, tmp_path):
    study = write_study(project, tmp_path / "bad.yaml", runs=[{"method": "none"}, {"method": "fine-tuning", "learning_rate": 1e30}])
    process = start(study, tmp_path / "runs", "--profile", str(profile))
    said = process.communicate(timeout=900)[0]
    assert process.returncode == 1 and "1 of 2 runs are missing; the report says which" in said
    results = json.loads((tmp_path / "runs/smoke/report/results.json").read_text())
    assert [one["id"] for one in results["failed"]] == ["fine-tuning-decoding-s0"]


def test_only_jobs_of_this_study_are_cancelled(slurm, tmp_path):
    for folder in (tmp_path / "a", tmp_path / "b"):
        words = ["sbatch", f"--job-name={job_prefix(folder)}_x", "--output=/dev/null", "--wrap=sleep 60"]
        subprocess.run(words, check=True, capture_output=True)
    assert cancel_jobs(tmp_path / "a") == 1 and cancel_jobs(tmp_path / "a") == 0 and cancel_jobs(tmp_path / "b") == 1
