"""Files of version 0.1.0, one of each kind: they load, or are refused in words that say what to do."""
import shutil
from pathlib import Path

import pytest

from sahlora.adapters import adapted_layers, load_adapter
from sahlora.cohorts.checks import check_cohort
from sahlora.cohorts.cohort import Cohort, make_phantom_cohort
from sahlora.common.files import load_tensors
from sahlora.cohorts.folds import kfold
from sahlora.prediction import load_model, predict_cases, predict_scan
from sahlora.training.transfer import Strategy, cross_validate, load_run
from sahlora.study.schema import expand_runs, read_study
from sahlora.training.loop import Checkpoint, find_checkpoint, load_network, pretrain

OLD = Path(__file__).parent / "files_0_1_0"


@pytest.fixture
def old(tmp_path):
    "A copy, so that nothing is written into the kept files."
    return Path(shutil.copytree(OLD, tmp_path / "old"))


def test_a_model_and_its_adapter_load_and_predict():
    net, header = load_model(OLD / "model.safetensors", OLD / "run/adapter-fold0.safetensors")
    assert len(header["patients"]) == 3 and header["network"]["levels"] == 1
    _, ct, _ = next(iter(Cohort.read(OLD / "cohort")))
    assert predict_scan(net, ct).probabilities.shape == ct.hu.shape


def test_an_adapter_lands_on_its_base():
    net, _ = load_network(OLD / "model.safetensors")
    load_adapter(net, OLD / "run/adapter-fold0.safetensors")
    assert len(adapted_layers(net)) == 5 and all(layer.adapter.rank == 2 for layer in adapted_layers(net).values())


def test_a_model_is_a_base_of_new_runs(old):
    target = Cohort.read(old / "cohort")
    table = cross_validate(old / "model.safetensors", target, Strategy("decoding", steps=2, batch_size=2), kfold(target.patients),
                           old / "new", quiet=True)
    assert sorted(table.patient) == target.patients


def test_a_cohort_is_read_and_checked_but_not_written_into(old):
    assert check_cohort(old / "cohort").ok and len(Cohort.read(old / "cohort")) == 3
    before = (old / "cohort/cohort.csv").read_bytes()
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is there already, and no record.json lists it; choose another folder"):
            make_phantom_cohort(old / "cohort", "asah", 3, 6, (32, 40), 8, overwrite=overwrite)
    assert (old / "cohort/cohort.csv").read_bytes() == before


def test_a_checkpoint_is_refused(old):
    facts = load_tensors(old / "checkpoint.safetensors")[1]["facts"]
    with pytest.raises(ValueError, match="saved by another version of sahlora.*remove this file to begin anew"):
        find_checkpoint(Checkpoint(old / "checkpoint.safetensors", facts))


def test_an_unfinished_training_is_refused(old):
    (old / "base").mkdir()
    shutil.copy(old / "checkpoint.safetensors", old / "base")
    with pytest.raises(ValueError, match="checkpoint.safetensors: is there already, and no record.json lists it"):
        pretrain(Cohort.read(old / "cohort"), old / "base", {"name": "multi-view-unet"}, {"steps": 2}, quiet=True)


def test_a_run_is_refused(old):
    with pytest.raises(ValueError, match="it is of version 0.1.0.*run it again into another folder"):
        load_run(old / "run")


def test_a_run_is_not_replaced(old):
    target = Cohort.read(old / "cohort")
    with pytest.raises(ValueError, match="no record.json lists it; choose another folder"):
        cross_validate(old / "model.safetensors", target, Strategy("cp-lora", rank=2, steps=4, batch_size=4), kfold(target.patients),
                       old / "run", quiet=True, overwrite=True)


def test_a_study_file_is_read():
    study = read_study(OLD / "study.yaml")
    assert study.tolerance_mm is None and len(expand_runs(study)) == 5


def test_predictions_are_kept_and_gone_on_with(old, monkeypatch):
    monkeypatch.chdir(old)
    run = predict_cases("cohort", "model.safetensors", "predicted", adapter="run/adapter-fold0.safetensors", progress=False)
    assert (run.done, run.skipped, run.failed) == (2, 1, 0) and len(run.table) == 3
