"""Cross-validation: nobody leaks, every fold begins afresh, what is frozen stays, what is written is whole."""
import json
import shutil

import pandas as pd
import pytest

from sahlora.adapters import load_adapter
from sahlora.cohort import Cohort, make_phantom_cohort
from sahlora.evaluation import dice
from sahlora.files import load_tensors
from sahlora.folds import Fold, kfold
from sahlora.training import load_network, predict_volume, pretrain, weights_hash
from sahlora.transfer import Strategy, cross_validate, prepare
from sahlora.unet import MultiViewUnet

SHORT = {"steps": 6, "batch_size": 4}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A base trained for a moment on three source patients, and a target of four."
    folder = tmp_path_factory.mktemp("transfer")
    source = make_phantom_cohort(folder / "source", "tbi", cases=3, seed=0, grid=(32, 40))
    pretrain(source, folder / "pretrain", {"name": "multi-view-unet", "levels": 2},
             {"steps": 8, "batch_size": 4, "learning_rate": 3e-3, "seed": 0}, quiet=True)
    return folder / "pretrain/model.safetensors", make_phantom_cohort(folder / "target", "asah", 4, 0, grid=(32, 40))


@pytest.mark.parametrize("field, value", [("method", "cp-lorra"), ("rank", 0), ("rank", "8"), ("steps", 0),
                                          ("learning_rate", -1.0)])
def test_bad_strategies_are_refused(field, value):
    with pytest.raises(ValueError, match="did you mean 'cp-lora'" if field == "method" else field):
        Strategy(**{"method": "cp-lora", field: value})


def test_unknown_region_lists_the_known_ones():
    with pytest.raises(ValueError, match="decoding"):
        prepare(MultiViewUnet(), Strategy("fine-tuning", region="decoder"))


@pytest.mark.parametrize("method", ["none", "fine-tuning", "cp-lora"])
def test_a_run_is_whole_and_repeats_bit_for_bit(made, tmp_path, method):
    base, cohort = made
    before = base.read_bytes()
    strategy = Strategy(method, **SHORT)
    for name in ("one", "two"):
        cross_validate(base, cohort, strategy, kfold(cohort.patients, 2), tmp_path / name, "test", quiet=True)
    assert base.read_bytes() == before
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in set(names) - {"run.json"}:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    table = pd.read_csv(tmp_path / "one/patients.csv")
    assert sorted(table.patient) == cohort.patients and set(table.role) == {"test"}
    run = json.loads((tmp_path / "one/run.json").read_text())
    assert run["base"] == weights_hash(load_network(base)[0]) and run["seconds"] > 0 and run["peak_mib"] > 50


def test_scores_can_be_recomputed_from_the_saved_fold(made, tmp_path):
    "Base plus saved tensors, scored by hand, gives the table: for a fine-tuned region and for an adapter."
    base, cohort = made
    scans = {patient: (ct, mask) for patient, ct, mask in cohort}
    for method, name in (("fine-tuning", "region-fold1"), ("cp-lora", "adapter-fold1")):
        out = tmp_path / method
        table = cross_validate(base, cohort, Strategy(method, **SHORT), kfold(cohort.patients, 2), out, quiet=True)
        net, _ = load_network(base)
        if method == "cp-lora":
            load_adapter(net, out / f"{name}.safetensors")
        else:
            tensors, _ = load_tensors(out / f"{name}.safetensors")
            assert not net.load_state_dict(tensors, strict=False).unexpected_keys
        for row in table[table.fold == 1].itertuples():
            ct, mask = scans[row.patient]
            assert dice(predict_volume(net, ct).numpy(), mask) == pytest.approx(row.dice_soft, abs=1e-6)


def test_the_strategy_none_is_the_base(made, tmp_path):
    base, cohort = made
    table = cross_validate(base, cohort, Strategy("none"), kfold(cohort.patients, 2), tmp_path, quiet=True)
    net, _ = load_network(base)
    scores = {patient: dice(predict_volume(net, ct).numpy(), mask) for patient, ct, mask in cohort}
    assert dict(zip(table.patient, table.dice_soft)) == pytest.approx(scores, abs=1e-9)


def test_folds_do_not_feed_each_other(made, tmp_path):
    "The second fold gives the same whatever came before it: weights, statistics and optimizer begin afresh."
    base, cohort = made
    one, two = kfold(cohort.patients, 2)
    strategy = Strategy("fine-tuning", **SHORT)
    after_one = cross_validate(base, cohort, strategy, [one, two], tmp_path / "a", quiet=True)
    after_itself = cross_validate(base, cohort, strategy, [two, two], tmp_path / "b", quiet=True)
    scores = [table[table.fold == 1].reset_index(drop=True) for table in (after_one, after_itself)]
    assert scores[0].equals(scores[1])
    weights = [(tmp_path / run / "region-fold1.safetensors").read_bytes() for run in "ab"]
    assert weights[0] == weights[1] != (tmp_path / "a/region-fold0.safetensors").read_bytes()


def test_a_fixed_split_scores_the_fit_apart(made, tmp_path):
    base, cohort = made
    fold = Fold(tuple(cohort.patients[:3]), tuple(cohort.patients[3:]), fit=True)
    table = cross_validate(base, cohort, Strategy("cp-lora", **SHORT), [fold], tmp_path, quiet=True)
    assert table.groupby("role").patient.apply(list).to_dict() == {"fit": cohort.patients[:3], "test": cohort.patients[3:]}


def test_leaks_stop_a_run_before_it_writes(made, tmp_path):
    base, cohort = made
    fold = Fold(tuple(cohort.patients[:3]), tuple(cohort.patients[2:]))
    with pytest.raises(ValueError, match=cohort.patients[2]):
        cross_validate(base, cohort, Strategy("none"), [fold], tmp_path / "leak", quiet=True)
    source = base.parent.parent / "source"
    with pytest.raises(ValueError, match="source and target: 3 patients"):
        cross_validate(base, Cohort.read(source), Strategy("none"), [], tmp_path / "leak", quiet=True)
    assert not (tmp_path / "leak").exists()


def test_an_unknown_volume_stays_unknown(made, tmp_path):
    base, cohort = made
    shutil.copytree(cohort.folder, tmp_path / "cohort")
    cohort.table.assign(spacing="unknown", blood_ml=None).to_csv(tmp_path / "cohort/cohort.csv", index=False)
    unknown = Cohort.read(tmp_path / "cohort")
    table = cross_validate(base, unknown, Strategy("none"), kfold(cohort.patients, 2), tmp_path / "out", quiet=True)
    assert table[["volume_ml", "predicted_ml", "predicted_hard_ml"]].isna().all().all() and table.dice_soft.notna().all()
