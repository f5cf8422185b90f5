"""One writer at a time, a record of whose files they are, and temporary names that nobody shares."""
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest

from sahlora.common import files
from sahlora.cohorts.cohort import Cohort, make_phantom_cohort
from sahlora.common.files import (LOCK, PART, RECORD, atomic_path, check_recorded, output_folder,
                                  owner, read_record, remove_leftovers, sole_writer,
                                  temporary_name, write_json)
from sahlora.cohorts.folds import kfold
from sahlora.training.transfer import Strategy, cross_validate, load_examples, load_run
from sahlora.training.loop import pretrain

WRITER = """import sys
from sahlora.common.files import sole_writer
with sole_writer(sys.argv[1]):
    print("in", flush=True)
    sys.stdin.readline()
"""


def ended() -> int:
    "The number of a process that has ended."
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def left_by(pid: int, path: Path) -> Path:
    "A temporary file of another process of this host."
    name = temporary_name(path)
    left = name.with_name(name.name.replace(f".{os.getpid()}.", f".{pid}."))
    left.parent.mkdir(parents=True, exist_ok=True)
    left.write_text("half")
    return left


# --- temporary names ----------------------------------------------------------------------------------------------

def test_threads_of_one_process_do_not_share_a_temporary_name(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: write_json(tmp_path / "one.json", {"n": n}), range(800)))
    assert json.loads((tmp_path / "one.json").read_text())["n"] in range(800) and os.listdir(tmp_path) == ["one.json"]


def test_a_long_name_can_be_written(tmp_path):
    with atomic_path(tmp_path / f"{'n' * 245}.json") as temporary:
        temporary.write_text("{}")
    assert len(os.listdir(tmp_path)) == 1


def test_only_what_is_dead_and_directly_inside_is_removed(tmp_path):
    dead, gone = ended(), left_by(ended(), tmp_path / "a.csv")
    kept = [left_by(os.getppid(), tmp_path / "alive.csv"), left_by(dead, tmp_path / "sub/deeper.csv"), tmp_path / f"{PART}of 0.1.0.csv",
            tmp_path / "note.txt"]
    for path in kept:
        path.write_text("half")
    remove_leftovers(tmp_path)
    assert not gone.exists() and all(path.exists() for path in kept)


def test_what_another_host_is_writing_stays(tmp_path, monkeypatch):
    theirs = left_by(ended(), tmp_path / "a.csv")
    monkeypatch.setattr(files, "_HOST", "0" * 8)
    with sole_writer(tmp_path):
        assert theirs.exists()


# --- one writer ---------------------------------------------------------------------------------------------------

@pytest.fixture
def writer(tmp_path):
    "Another process that writes `tmp_path/run` until it is told to end."
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("way", ["run", "link", "above/../run"])
def test_another_process_is_named_whatever_path_leads_there(tmp_path, writer, way):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "above").mkdir()
    with pytest.raises(BlockingIOError, match=f"is being written by process {writer.pid} on .*wait for it or stop it"), \
            sole_writer(tmp_path / way, wait=False):
        raise AssertionError("two writers")


def test_a_killed_writer_holds_nothing(tmp_path, writer):
    writer.kill()
    writer.wait()
    assert owner(tmp_path / "run").startswith(f"process {writer.pid} ")
    with sole_writer(tmp_path / "run", wait=False):
        assert owner(tmp_path / "run").startswith(f"process {os.getpid()} ")
    assert not (tmp_path / "run").exists(), "an empty folder is not left behind"


def test_a_thread_may_hold_a_folder_twice_but_two_threads_may_not(tmp_path):
    def other():
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()} "), sole_writer(tmp_path, wait=False):
            raise AssertionError("two writers")

    with sole_writer(tmp_path):
        with sole_writer(tmp_path / "."):
            pass
        assert owner(tmp_path).startswith("process"), "the inner one has not given the folder away"
        with ThreadPoolExecutor(1) as pool:
            pool.submit(other).result()
    assert not (tmp_path / LOCK).exists()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="out: is a file"), sole_writer(tmp_path / "out"):
        raise AssertionError("a file was taken for a folder")


def test_a_file_system_without_locks_is_said_and_still_has_one_writer(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("filelock._unix.fcntl.flock", refuse)

    def other():
        with pytest.raises(BlockingIOError), sole_writer(tmp_path / "run", wait=False):
            raise AssertionError("two writers")

    with sole_writer(tmp_path / "run"):
        assert "this file system has no locks" in capsys.readouterr().out
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()


# --- the record ---------------------------------------------------------------------------------------------------

def write(out, number, names=("number.txt",), overwrite=False, fail=False):
    "A command that writes one number into each of its files; whether it had been done."
    with output_folder(out, "write", {"number": number, "deep": {"names": len(names)}}, [*names, "spare.txt"], overwrite) as done:
        for name in names if not done else ():
            (Path(out) / name).parent.mkdir(exist_ok=True)
            (Path(out) / name).write_text(str(number))
            if fail:
                raise KeyboardInterrupt
    return done


def contents(out):
    return {str(path.relative_to(out)): path.read_text() for path in sorted(Path(out).rglob("*")) if path.is_file() and path.name != RECORD}


def test_the_same_call_keeps_and_another_is_refused_with_the_difference(tmp_path, capsys):
    assert not write(tmp_path, 1) and write(tmp_path, 1)
    assert "was done before by the same call" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"number was 1, is 2.*\(--out\).*\(--overwrite\)"):
        write(tmp_path, 2)
    assert contents(tmp_path) == {"number.txt": "1"}


def test_overwriting_removes_what_the_record_lists_and_nothing_else(tmp_path):
    write(tmp_path, 1, ("a.txt", "sub/b.txt", "other/c.txt"))
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "other/mine.txt").write_text("mine")
    write(tmp_path, 2, ("a.txt",), overwrite=True)
    assert contents(tmp_path) == {"a.txt": "2", "mine.txt": "mine", "other/mine.txt": "mine"} and not (tmp_path / "sub").exists()


def test_overwriting_does_not_repeat_what_this_call_has_done(tmp_path):
    write(tmp_path, 1)
    assert write(tmp_path, 1, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_in_no_record_are_never_replaced(tmp_path, overwrite):
    (tmp_path / "number.txt").write_text("mine")
    with pytest.raises(ValueError, match="number.txt: is there already, and no record.json lists it"):
        write(tmp_path, 1, overwrite=overwrite)
    assert contents(tmp_path) == {"number.txt": "mine"}


def test_a_file_that_was_changed_is_not_replaced_in_silence(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "number.txt").write_text("corrected by hand")
    with pytest.raises(ValueError, match="number.txt was changed since"):
        write(tmp_path, 1)
    assert not write(tmp_path, 1, overwrite=True) and contents(tmp_path) == {"number.txt": "1"}


def test_a_missing_file_is_made_again(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "number.txt").unlink()
    assert not write(tmp_path, 1) and contents(tmp_path) == {"number.txt": "1"}


def test_an_interrupted_call_is_gone_on_with_and_another_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 1, ("a.txt", "b.txt"), fail=True)
    assert read_record(tmp_path)["complete"] is False
    with pytest.raises(ValueError, match="has not ended"):
        check_recorded(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="number was 1, is 2"):
        write(tmp_path, 2, ("a.txt",))
    assert not write(tmp_path, 1, ("a.txt", "b.txt")) and set(contents(tmp_path)) == {"a.txt", "b.txt"}


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/hostname", "sub/../../outside.txt", ".", "", "./"])
def test_a_record_can_not_reach_out_of_its_folder(tmp_path, name):
    (tmp_path / "outside.txt").write_text("mine")
    out = tmp_path / "out"
    write_json(out / RECORD, {"command": "write", "facts": {}, "files": {name: None}, "complete": True})
    with pytest.raises(ValueError, match="is not a record of sahlora"):
        write(out, 1, overwrite=True)
    assert (tmp_path / "outside.txt").read_text() == "mine"


@pytest.mark.parametrize("text", ["{", "[]", "{}", "[" * 100_000, "\udcff{", '{"command": "a", "facts": 1, "files": [], "complete": true}'])
def test_a_damaged_record_is_named(tmp_path, text):
    (tmp_path / RECORD).write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=RECORD):
        write(tmp_path, 1, overwrite=True)


def test_two_versions_do_not_mix(tmp_path, monkeypatch):
    write(tmp_path, 1)
    monkeypatch.setattr(files, "package_version", lambda name: "9.9")
    with pytest.raises(ValueError, match="sahlora was .*, is '9.9'"):
        write(tmp_path, 1)


@pytest.mark.parametrize("reads", ["a.txt", "sub/deep", "link"])
def test_overwriting_never_removes_what_the_call_reads(tmp_path, reads):
    "Neither a file of the record, nor a folder with one in it, nor what a link leads to."
    write(tmp_path / "out", 1, ("a.txt", "sub/b.txt"))
    (tmp_path / "link").symlink_to(tmp_path / "out/sub")
    (tmp_path / "out/sub/deep").symlink_to(tmp_path / "out/a.txt")
    before = contents(tmp_path / "out")
    source = tmp_path / reads if reads == "link" else tmp_path / "out" / reads
    with pytest.raises(ValueError, match="which this call reads"), \
            output_folder(tmp_path / "out", "write", {"number": 2}, ["a.txt"], True, [source]):
        pytest.fail("it must be refused before anything is done")
    assert contents(tmp_path / "out") == before


# --- runs ---------------------------------------------------------------------------------------------------------

NETWORK, TRAINING = {"name": "multi-view-unet", "levels": 1}, {"steps": 2, "batch_size": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A base, its folder and a target cohort."
    folder = tmp_path_factory.mktemp("made")
    source = make_phantom_cohort(folder / "source", "tbi", 3, 1, (32, 40), 8)
    target = make_phantom_cohort(folder / "target", "asah", 3, 2, (32, 40), 8)
    pretrain(source, folder / "base", NETWORK, TRAINING, quiet=True)
    return folder / "base/model.safetensors", source, target


def finetune(made, out, method="cp-lora", **options):
    "A short run of one strategy."
    _, _, target = made
    return cross_validate(made[0], target, Strategy(method, rank=2, steps=2, batch_size=2), kfold(target.patients), out, "test", quiet=True, **options)


@pytest.mark.long
def test_pretraining_twice_trains_once(made, tmp_path, monkeypatch, capsys):
    _, source, _ = made
    first = pretrain(source, tmp_path / "base", NETWORK, TRAINING, quiet=True)
    before = (tmp_path / "base/run.json").read_bytes()
    monkeypatch.setattr("sahlora.training.loop.train", lambda *_, **__: pytest.fail("trained again"))
    again = pretrain(source, tmp_path / "base", NETWORK, TRAINING, quiet=True)
    assert again.loss.tolist() == first.loss.tolist() and (tmp_path / "base/run.json").read_bytes() == before
    with pytest.raises(ValueError, match="training.steps was 2, is 3"):
        pretrain(source, tmp_path / "base", NETWORK, {**TRAINING, "steps": 3}, quiet=True)


def test_finetuning_into_another_runs_folder(made, tmp_path):
    finetune(made, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="strategy.method was 'cp-lora', is 'fine-tuning'"):
        finetune(made, tmp_path, "decoding")
    assert len(list(tmp_path.glob("adapter-*"))) == 3
    finetune(made, tmp_path, "decoding", overwrite=True)
    assert not list(tmp_path.glob("adapter-*")) and len(list(tmp_path.glob("weights-*"))) == 3, "no stale adapter of the first"
    assert (tmp_path / "notes.txt").read_text() == "mine" and load_run(tmp_path)[0]["strategy"]["method"] == "fine-tuning"


def test_training_does_not_overwrite_what_it_reads(made, tmp_path):
    "A base, and a cohort, that lie in the folder to be replaced."
    base, source, target = made
    before = {path: path.read_bytes() for folder in (base.parent, source.folder) for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="model.safetensors, which this call reads"):
        finetune(made, base.parent, overwrite=True)
    with pytest.raises(ValueError, match="cohort.csv, which this call reads"):
        pretrain(source, source.folder, NETWORK, TRAINING, quiet=True, overwrite=True)
    assert all(path.read_bytes() == was for path, was in before.items())
    for steps in (2, 3):  # a run beside the scans, in the cohort's own folder, is no input
        pretrain(source, source.folder / "base", NETWORK, {**TRAINING, "steps": steps}, quiet=True, overwrite=True)
    assert len(pd.read_csv(source.folder / "base/history.csv")) == 3


def test_finetuning_twice_trains_once(made, tmp_path, monkeypatch):
    first = finetune(made, tmp_path)
    monkeypatch.setattr("sahlora.training.transfer.train_patients", lambda *_, **__: pytest.fail("trained again"))
    again, columns = finetune(made, tmp_path), ["method", "patient", "fold", "dice_soft", "predicted_ml"]
    assert list(again) == list(first) and again[columns].to_dict("list") == first[columns].to_dict("list")


def test_a_run_json_of_another_run_is_not_read(made, tmp_path):
    finetune(made, tmp_path / "one")
    finetune(made, tmp_path / "other", "none")
    (tmp_path / "one/run.json").write_bytes((tmp_path / "other/run.json").read_bytes())
    with pytest.raises(ValueError, match="run.json is another run's: strategy.method was 'cp-lora', is 'none'"):
        load_run(tmp_path / "one")


@pytest.mark.long
@pytest.mark.parametrize("name", ["patients.csv", "history.csv", "examples.safetensors"])
def test_a_run_whose_files_were_exchanged_is_not_read(made, tmp_path, name):
    finetune(made, tmp_path / "one")
    with open(tmp_path / "one" / name, "ab") as file:
        file.write(b" ")
    with pytest.raises(ValueError, match=f"{name}: is not the file that record.json beside it names"):
        load_run(tmp_path / "one")
        load_examples(tmp_path / "one")


def test_a_training_is_not_lost_where_nothing_was_installed(made, tmp_path, monkeypatch):
    "Run from a source folder, there is no metadata of the package, nor need there be of another."
    def missing(name):
        from importlib.metadata import PackageNotFoundError

        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    finetune(made, tmp_path / "run")
    run = load_run(tmp_path / "run")[0]
    assert run["sahlora"] == run["torch"] == "unknown"


def test_the_machine_is_described_before_the_work(made, tmp_path, monkeypatch):
    "What fails there, fails before the first step."
    monkeypatch.setattr("sahlora.training.loop.machine_facts", lambda: 1 / 0)
    monkeypatch.setattr("sahlora.training.loop.train", lambda *_, **__: pytest.fail("trained first"))
    with pytest.raises(ZeroDivisionError):
        pretrain(Cohort.read(made[1].folder), tmp_path / "base", NETWORK, TRAINING, quiet=True)
