"""The command: exit codes, one message instead of a traceback, nothing written for bad input."""
import errno
import os
import shutil

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from sahlora.cli import app
from sahlora.cohorts.cohort import make_phantom_cohort
from sahlora.common.files import read_json, write_json
from sahlora.training.loop import save_network
from sahlora.unet import build_network


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    "A small cohort and a small network on disk."
    folder = tmp_path_factory.mktemp("things")
    cohort = make_phantom_cohort(folder / "cohort", "asah", cases=3, seed=5, grid=(32, 40), slices=12)
    torch.manual_seed(0)
    save_network(folder / "model.safetensors", build_network({"name": "multi-view-unet", "levels": 1, "in_channels": 1}))
    return folder, cohort


@pytest.fixture
def run():
    def call(*arguments, debug=False):
        done = CliRunner().invoke(app, [str(a) for a in arguments])
        assert debug or "Traceback" not in done.output
        return done

    return call


def predict(things, run, scan, out, *more):
    return run("predict", scan, "--model", things[0] / "model.safetensors", "--out", out, "--quiet", *more)


@pytest.mark.long
def test_predict_one_scan_and_again(things, run, tmp_path):
    scan = things[1].folder / things[1].table.image[0]
    done = predict(things, run, scan, tmp_path / "out")
    assert done.exit_code == 0 and "mL of blood" in done.output and "Not for clinical use" in done.output
    case = next(p for p in (tmp_path / "out").iterdir() if p.is_dir())
    mask, source = nib.load(case / "mask.nii.gz"), nib.load(scan)
    assert np.array_equal(mask.affine, source.affine) and mask.shape == source.shape and (case / "overlay.png").exists()
    before = (case / "mask.nii.gz").stat().st_mtime_ns
    again = predict(things, run, scan, tmp_path / "out")
    assert again.exit_code == 0 and "1 skipped" in again.output and (case / "mask.nii.gz").stat().st_mtime_ns == before


def test_predict_refuses_bad_input_with_2_and_writes_nothing(things, run, tmp_path):
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes((things[1].folder / things[1].table.image[0]).read_bytes()[:-20])
    loop = tmp_path / "loop.nii.gz"
    loop.symlink_to(loop)
    (tmp_path / "empty").mkdir()
    for scan, words in ((bad, "copy it again"), (loop, "link that leads"), (tmp_path / "none.nii", "no such file"),
                        (tmp_path / "empty", "NIfTI")):
        done = predict(things, run, scan, tmp_path / "out")
        assert done.exit_code == 2 and words in done.stderr and str(scan) in done.stderr, done.stderr
        assert not (tmp_path / "out").exists()
    scan = things[1].folder / things[1].table.image[0]
    for option, value, words in (("--window", "80", "--window 0,80"), ("--spacing", "1,2", "--spacing 0.5,0.5,5"),
                                 ("--device", "gpu", "cuda"), ("--threshold", "2", "threshold")):
        done = predict(things, run, scan, tmp_path / "out", option, value)
        assert done.exit_code == 2 and words in done.stderr and not (tmp_path / "out").exists(), done.stderr


@pytest.mark.parametrize("empty", [["predict", "", "--out", "o"], ["predict", "scan.nii.gz", "--out="], ["cohort", "check", " "]])
def test_an_empty_word_is_not_the_folder_one_is_in(run, tmp_path, monkeypatch, empty):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cohort.csv").write_text("case,patient,image,label\n")
    done = run(*empty)
    assert done.exit_code == 2 and "one of the words is empty" in done.stderr and len(list(tmp_path.iterdir())) == 1


def test_a_batch_goes_on_past_a_bad_case_and_exits_1(things, run, tmp_path):
    scans = tmp_path / "scans"
    scans.mkdir()
    for k, image in enumerate(things[1].table.image):
        content = (things[1].folder / image).read_bytes()
        (scans / f"{k}.nii.gz").write_bytes(content[:-9] if k == 1 else content)
    done = predict(things, run, scans, tmp_path / "out")
    assert done.exit_code == 1 and "1: failed" in done.output and "2 done, 0 skipped, 1 failed" in done.output
    table = pd.read_csv(tmp_path / "out/cases.csv")
    assert table.status.tolist() == ["done", "failed", "done"] and "copy it again" in table.error[1]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0", "2", "cases.csv", "run.json"]


def test_a_full_disk_is_said_in_words(things, run, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "out/mask.nii.gz"))

    monkeypatch.setattr("nibabel.save", full)
    done = predict(things, run, things[1].folder / things[1].table.image[0], tmp_path / "out")
    assert done.exit_code in (1, 2) and "disk is full" in done.output + done.stderr
    assert not list(tmp_path.glob("out/*/mask*"))


def test_debug_shows_where_and_may_stand_anywhere(things, run, tmp_path):
    for words in (["--debug", "cohort", "check", tmp_path], ["cohort", "check", tmp_path, "--debug"]):
        done = run(*words, debug=True)
        assert isinstance(done.exception, FileNotFoundError)
    assert run("cohort", "check", tmp_path).exit_code == 2


def test_a_mistake_of_ours_is_called_one(run, monkeypatch, tmp_path):
    def broken(*arguments, **options):
        raise KeyError("voxels")

    monkeypatch.setattr("sahlora.cohorts.checks.check_cohort", broken)
    done = run("cohort", "check", tmp_path)
    assert done.exit_code == 1 and "KeyError" in done.stderr and "--debug" in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("kind", ["tbi", "sah"])
def test_making_a_cohort_prints_its_volume_bins(run, tmp_path, kind):
    done = run("cohort", "make", "--kind", kind, "--cases", 3, "--grid", "32x40", "--out", tmp_path / kind)
    assert done.exit_code == 0, done.output
    planned, found = (line.partition(": ")[2] for line in done.output.splitlines() if "scans by mL of blood" in line)
    assert planned.startswith("0: ") and ">100: " in found and sum(int(part.split(": ")[1]) for part in found.split(", ")) == 3
    assert "no clinical claim" in done.output


@pytest.mark.long
def test_cohort_commands(things, run, tmp_path):
    made = run("cohort", "make", "--kind", "tbi", "--cases", 2, "--seed", 4, "--grid", "32x40", "--slices", 10,
               "--out", tmp_path / "tbi")
    assert made.exit_code == 0 and "synthetic, no clinical claim" in made.output
    assert run("cohort", "check", tmp_path / "tbi", "--against", things[1].folder).exit_code == 0
    assert run("cohort", "check", tmp_path / "tbi", "--against", tmp_path / "tbi").exit_code == 2
    shown = run("cohort", "show", tmp_path / "tbi", "--out", tmp_path / "sheet.png")
    assert shown.exit_code == 0 and (tmp_path / "sheet.png").read_bytes()[:4] == b"\x89PNG"
    folds = run("cohort", "folds", things[1].folder)
    assert folds.exit_code == 0 and (things[1].folder / "folds.json").is_file()
    other = run("cohort", "folds", things[1].folder, "--method", "stratified")
    assert other.exit_code == 2 and "holds other folds" in other.stderr
    label = tmp_path / "tbi" / pd.read_csv(tmp_path / "tbi/cohort.csv").label[0]
    label.write_bytes(label.read_bytes()[:-7])
    found = run("cohort", "check", tmp_path / "tbi")
    assert found.exit_code == 1 and label.name in found.output
    assert run("cohort", "make", "--kind", "tbi", "--cases", 1, "--grid", "64", "--out", tmp_path / "x").exit_code == 2


@pytest.mark.parametrize("options, words", [
    (["--cases", "0"], "--cases"), (["--cases", "-3"], "--cases"), (["--cases", "999999999"], "--cases"), (["--cases", "2.5"], "--cases"),
    (["--grid", "0x0"], "grid is (0, 0)"), (["--grid", "64x80x2"], "--grid"), (["--grid", "\u00b2x80"], "--grid"), (["--grid", "9999x80"], "grid is"),
    (["--seed", "-1"], "seed is -1"), (["--slices", "0"], "slices is 0"), (["--workers", "0"], "--workers"), (["--kind", "mri"], "kind is 'mri'")])
def test_phantoms_that_can_not_be_are_refused_before_anything_is_written(run, tmp_path, options, words):
    done = run("cohort", "make", "--kind", "tbi", "--cases", "1", "--out", tmp_path / "c", *options)
    assert done.exit_code == 2 and words in done.stderr and not (tmp_path / "c").exists(), done.output


@pytest.mark.long
def test_a_cohort_is_kept_refused_or_replaced(run, tmp_path):
    make = ("cohort", "make", "--kind", "tbi", "--grid", "32x40", "--slices", "6", "--out", tmp_path / "c", "--cases")
    assert run(*make, 2).exit_code == 0
    again = run(*make, 2)
    assert again.exit_code == 0 and "was done before by the same call" in again.output
    other = run(*make, 1)
    assert other.exit_code == 2 and "cases was 2, is 1" in other.stderr and "--overwrite" in other.stderr
    assert run(*make, 1, "--overwrite").exit_code == 0 and len(pd.read_csv(tmp_path / "c/cohort.csv")) == 1
    assert run("cohort", "show", tmp_path / "c", "--count", 0).exit_code == 2
    assert run("cohort", "folds", tmp_path / "c", "--seed", -1).exit_code == 2
    (tmp_path / "c/cohort.csv").write_text((tmp_path / "c/cohort.csv").read_text().replace(",", ";"))
    for command in ("check", "show", "folds"):
        refused = run("cohort", command, tmp_path / "c")
        assert refused.exit_code == 2 and "cohort.csv" in refused.stderr and "with commas" in refused.stderr, refused.output


def test_a_cohort_without_millilitres_goes_through_every_command(things, run, tmp_path):
    shutil.copytree(things[1].folder, tmp_path / "c")
    (tmp_path / "c/folds.json").unlink(missing_ok=True)
    things[1].table.drop(columns="blood_ml").to_csv(tmp_path / "c/cohort.csv", index=False)
    for command in (["check"], ["folds", "--method", "stratified"], ["show", "--out", tmp_path / "sheet.png"]):
        done = run("cohort", *command[:1], tmp_path / "c", *command[1:])
        assert done.exit_code == 0, done.output


def test_cohort_import(things, run, tmp_path):
    source = tmp_path / "mine"
    for kind in ("images", "labels"):
        (source / kind).mkdir(parents=True)
        for name in sorted((things[1].folder / kind).iterdir()):
            (source / kind / name.name).write_bytes(name.read_bytes())
    done = run("cohort", "import", "--layout", "pairs", "--source", source, "--out", tmp_path / "out")
    assert done.exit_code == 0 and len(pd.read_csv(tmp_path / "out/cohort.csv")) == 3
    first = next((source / "images").iterdir())
    first.write_bytes(first.read_bytes()[:-9])
    some = run("cohort", "import", "--layout", "pairs", "--source", source, "--out", tmp_path / "some")
    assert some.exit_code == 1 and first.name in some.output and len(pd.read_csv(tmp_path / "some/cohort.csv")) == 2
    none = run("cohort", "import", "--layout", "bsd", "--source", source, "--out", tmp_path / "none")
    assert none.exit_code == 2 and "bhsd" in none.stderr and not (tmp_path / "none").exists()


@pytest.mark.long
def test_pretrain_and_finetune(things, run, tmp_path):
    source = make_phantom_cohort(tmp_path / "source", "tbi", cases=3, seed=6, grid=(32, 40), slices=12)
    done = run("pretrain", "--cohort", source.folder, "--out", tmp_path / "base", "--steps", 3, "--batch-size", 2, "--quiet")
    assert done.exit_code == 0 and "3 steps" in done.output
    base = tmp_path / "base/model.safetensors"
    tuned = run("finetune", "--base", base, "--cohort", things[1].folder, "--out", tmp_path / "run", "--steps", 2,
                "--batch-size", 2, "--quiet")
    assert tuned.exit_code == 0 and "3 patients" in tuned.output, tuned.output
    scan = things[1].folder / things[1].table.image[0]
    masks = run("predict", scan, "--model", base, "--adapter", tmp_path / "run/adapter-fold0.safetensors", "--out",
                tmp_path / "masks", "--quiet")
    assert masks.exit_code == 0 and "mL of blood" in masks.output
    leak = run("finetune", "--base", base, "--cohort", source.folder, "--out", tmp_path / "leak", "--quiet")
    assert leak.exit_code == 2 and "in both" in leak.stderr
    wrong = run("finetune", "--base", base, "--cohort", things[1].folder, "--out", tmp_path / "x", "--method", "cplora")
    assert wrong.exit_code == 2 and "cp-lora" in wrong.stderr
    odd = run("finetune", "--base", base, "--cohort", things[1].folder, "--out", tmp_path / "y", "--option", "patiense=3")
    assert odd.exit_code == 2 and "did you mean 'patience'" in odd.stderr
    rates = run("finetune", "--base", base, "--cohort", things[1].folder, "--out", tmp_path / "z", "--learning-rate", "1e-3,fast")
    assert rates.exit_code == 2 and "--learning-rate 1e-3,1e-2" in rates.stderr


@pytest.mark.parametrize("words, said", [
    (["--method", "shallow", "--region", "all"], "region 'all' has no effect on shallow"),
    (["--method", "scratch", "--region", "nowhere"], "region 'nowhere' has no effect on scratch"),
    (["--method", "none", "--option", "average=0.9"], "none: trains nothing"),
    (["--option", "warmup=1", "--option", "warmup=2"], "--option warmup stands there twice"),
    (["--option", "warmup=[20"], "--option warmup=[20: the value is not YAML"),
    (["--option", "clip=!!python/object:os.system"], "the value is not YAML"),
    (["--rank", 100000], "less than or equal to 1024"), (["--seed", 2**64], "less than 4294967296"), (["--steps", 2, "--learning-rate", 1e30], "is nan")])
def test_options_without_a_meaning_are_refused_not_ignored(things, run, tmp_path, words, said):
    done = run("finetune", "--base", things[0] / "model.safetensors", "--cohort", things[1].folder, "--out", tmp_path / "x", "--batch-size", 2,
               "--quiet", *words)
    assert done.exit_code == 2 and said in done.stderr, done.output


def test_a_patient_who_was_trained_on_is_not_counted_as_tested(things, run, tmp_path):
    folds = tmp_path / "folds.json"
    assert run("cohort", "folds", things[1].folder, "--out", folds).exit_code == 0
    content = read_json(folds)
    content["split"][0]["fit"] = True
    write_json(folds, content)
    call = ["finetune", "--base", things[0] / "model.safetensors", "--cohort", things[1].folder, "--folds", folds, "--method", "none", "--quiet"]
    done = run(*call, "--out", tmp_path / "run")
    assert done.exit_code == 0 and "3 patients" in done.output, done.output
    for change, said in (({"fit": "no"}, "fit is true or false"), ({"test": content["split"][1]["test"] * 2}, "twice")):
        write_json(folds, {**content, "split": [content["split"][0] | change, *content["split"][1:]]})
        wrong = run(*call, "--out", tmp_path / "wrong")
        assert wrong.exit_code == 2 and said in wrong.stderr, wrong.output


def test_words_of_others_do_not_steer_the_terminal(things, run, tmp_path):
    scan = tmp_path / "scans" / "a\x1b[31mred\nb: 0.0 mL.nii.gz"
    scan.parent.mkdir()
    shutil.copy(things[1].folder / things[1].table.image[0], scan)
    shutil.copy(scan, os.fsencode(scan.parent) + b"/M\xfcller.nii.gz")
    (scan.parent / "c\x1b[2Jd.nii.gz").write_bytes(b"nothing")
    done = predict(things, run, scan.parent, tmp_path / "out")
    assert done.exit_code == 1 and "\x1b" not in done.output and "2 done, 0 skipped, 1 failed" in done.output, done.output
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == {"a_[31mred_b: 0.0 mL", "M_ller"}
    assert "\x1b" not in (tmp_path / "out/cases.csv").read_text(encoding="utf-8")
    again = predict(things, run, scan.parent, tmp_path / "out")
    assert again.exit_code == 1 and "0 done, 2 skipped, 1 failed" in again.output, again.output
    refused = run("cohort", "check", tmp_path / "x\x1b[31m")
    assert refused.exit_code == 2 and "x?[31m" in refused.stderr


@pytest.mark.long
def test_more_about_the_training(things, run, tmp_path):
    source = make_phantom_cohort(tmp_path / "source", "tbi", cases=3, seed=6, grid=(32, 40), slices=12)
    done = run("pretrain", "--cohort", source.folder, "--out", tmp_path / "base", "--steps", 3, "--batch-size", 2, "--quiet", "--threads", 1,
               "--option", "schedule=cosine", "--option", "weight_decay=1e-3", "--option", "compile=false", "--tensorboard", tmp_path / "board")
    assert done.exit_code == 0, done.output
    facts = read_json(tmp_path / "base/run.json")
    assert facts["training"]["schedule"] == "cosine" and facts["training"]["weight_decay"] == 1e-3 and facts["threads"] == 1
    assert list((tmp_path / "board").rglob("events.*")), "TensorBoard's log is there"
    base = tmp_path / "base/model.safetensors"
    again = run("pretrain", "--cohort", source.folder, "--out", tmp_path / "again", "--steps", 3, "--batch-size", 2, "--quiet", "--threads", 1,
                "--option", "schedule=cosine", "--option", "weight_decay=1e-3", "--option", "compile=false", "--workers", 2)
    assert again.exit_code == 0 and (tmp_path / "again/model.safetensors").read_bytes() == base.read_bytes(), "readers leave no trace"
    tuned = run("finetune", "--base", base, "--cohort", things[1].folder, "--out", tmp_path / "run", "--steps", 2, "--batch-size", 2, "--quiet",
                "--method", "cp-dora", "--extras", "--learning-rate", "1e-3,1e-2", "--workers", 2)
    assert tuned.exit_code == 0 and "does nothing" in tuned.output, tuned.output
    outcomes = read_json(tmp_path / "run/run.json")["outcomes"]
    assert [sorted(outcome["tried"]) for outcome in outcomes] == [["0.001", "0.01"]] * 3
