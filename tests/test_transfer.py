"""Cross-validation: nobody leaks, every fold begins afresh, what is frozen stays, what is written is whole."""
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from sahlora.adapters import adapt, load_adapter
from sahlora.cohorts.cohort import Case, Cohort, make_phantom_cohort, write_cohort
from sahlora.evaluation.scores import dice
from sahlora.common.files import load_tensors, read_json
from sahlora.cohorts.folds import Fold, inner_split, kfold
from sahlora.cohorts.slices import open_store
from sahlora.training.transfer import (Strategy, collapse, cross_validate, inert_magnitudes,
                                       moving, prepare, recompute_norms)
from sahlora.training.loop import (Training, load_network, predict, predict_volume, pretrain, save_network, set_training_mode, train,
                              weights_hash)
from sahlora.unet import MultiViewUnet, Unet

SHORT = {"steps": 6, "batch_size": 4}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A base trained for a moment on three source patients, and a target of four."
    folder = tmp_path_factory.mktemp("transfer")
    source = make_phantom_cohort(folder / "source", "tbi", cases=3, seed=0, grid=(32, 40))
    pretrain(source, folder / "pretrain", {"name": "multi-view-unet", "levels": 2},
             {"steps": 8, "batch_size": 4, "learning_rate": 3e-3, "seed": 0}, quiet=True)
    return folder / "pretrain/model.safetensors", make_phantom_cohort(folder / "target", "asah", 4, 0, grid=(32, 40))


@pytest.mark.parametrize("field, value", [("method", "cp-lorra"), ("rank", 0), ("rank", "8"), ("steps", 0), ("learning_rate", -1.0),
                                          ("learning_rate", ()), ("learning_rate", (1e-3, 0)), ("training", {"patiense": 3}),
                                          ("training", {"steps": 3})])
def test_bad_strategies_are_refused(field, value):
    wanted = "did you mean 'cp-lora'" if field == "method" else "patience" if "patiense" in str(value) else "steps|learning_rate|rank"
    with pytest.raises(ValueError, match=wanted):
        Strategy(**{"method": "cp-lora", field: value})


def test_unknown_region_lists_the_known_ones():
    with pytest.raises(ValueError, match="decoding"):
        prepare(MultiViewUnet(), Strategy("fine-tuning", region="decoder"))


@pytest.mark.long
@pytest.mark.parametrize("method, more", [("none", {}), ("norm-stats", {}), ("scratch", {}), ("decoding", {}), ("cp-lora", {}),
                                          ("convdora", {"extras": True}), ("decoding", {"learning_rate": (1e-3, 1e-2)}),
                                          ("lora-c", {"training": {"patience": 1, "schedule": "cosine"}})])
def test_a_run_is_whole_and_repeats_bit_for_bit(made, tmp_path, method, more):
    base, cohort = made
    before = base.read_bytes()
    strategy = Strategy(method, **SHORT, **more)
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


@pytest.mark.long
def test_scores_can_be_recomputed_from_the_saved_fold(made, tmp_path):
    "Base plus saved tensors, scored by hand, gives the table: for a fine-tuned region and for an adapter."
    base, cohort = made
    scans = {patient: (ct, mask) for patient, ct, mask in cohort}
    for method, name in (("fine-tuning", "weights-fold1"), ("cp-lora", "adapter-fold1")):
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


@pytest.mark.long
def test_the_strategy_none_is_the_base(made, tmp_path):
    base, cohort = made
    table = cross_validate(base, cohort, Strategy("none"), kfold(cohort.patients, 2), tmp_path, quiet=True)
    net, _ = load_network(base)
    scores = {patient: dice(predict_volume(net, ct).numpy(), mask) for patient, ct, mask in cohort}
    assert dict(zip(table.patient, table.dice_soft)) == pytest.approx(scores, abs=1e-9)


@pytest.mark.long
def test_folds_do_not_feed_each_other(made, tmp_path):
    "The second fold gives the same whatever came before it: weights, statistics and optimizer begin afresh."
    base, cohort = made
    one, two = kfold(cohort.patients, 2)
    strategy = Strategy("fine-tuning", **SHORT)
    after_one = cross_validate(base, cohort, strategy, [one, two], tmp_path / "a", quiet=True)
    after_another = cross_validate(base, cohort, strategy, [replace(one, train=one.train[:1]), two], tmp_path / "b", quiet=True)
    scores = [table[table.fold == 1].reset_index(drop=True) for table in (after_one, after_another)]
    assert scores[0].equals(scores[1])
    weights = [(tmp_path / run / "weights-fold1.safetensors").read_bytes() for run in "ab"]
    assert weights[0] == weights[1] != (tmp_path / "a/weights-fold0.safetensors").read_bytes()


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


# --- strategies ---------------------------------------------------------------------------------------------------


def test_the_words_of_regions_are_fine_tuning_there():
    for region, count in {"shallow": 46_785, "deep": 46_464, "encoding": 46_944, "decoding": 101_985, "all": 232_737}.items():
        assert Strategy(region) == Strategy("fine-tuning", region=region)
        assert prepare(MultiViewUnet(levels=2), Strategy(region)) == count
    assert Strategy("scratch").name == "scratch" and Strategy("norm-stats").region == ""
    with pytest.raises(ValueError, match="region 'deep' has no effect on norm-stats"):
        Strategy("norm-stats", region="deep")


@pytest.mark.parametrize("network", [MultiViewUnet, lambda: Unet(levels=2, width=8)])
@pytest.mark.parametrize("extras", [False, True])
def test_extras_open_head_biases_and_norms_and_nothing_else(network, extras):
    "By hand from the modules: kernels never, what fine-tuning trains beside them with extras only."
    prepare(net := network(), Strategy("cp-lora", extras=extras))
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert all(".adapter." in name for name in trained)
    plain, wanted = network(), set()
    within = tuple(plain.regions["decoding"])
    for name, module in plain.named_modules():
        if name.startswith(within) and isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            head = module.kernel_size == (1, 1)
            wanted |= {f"{name}.adapter.{key}" for key in (("weight", "bias") if head else ("bias",))}
        elif name.startswith(within) and isinstance(module, nn.BatchNorm2d):
            wanted |= {f"{name}.adapter.weight", f"{name}.adapter.bias"}
    found = {name for name in trained if name.endswith((".weight", ".bias"))}
    assert found == (wanted if extras else set())


def test_norms_of_an_adapter_with_extras_follow_the_batch_and_the_base_keeps_its_own():
    torch.manual_seed(0)
    prepare(net := MultiViewUnet(levels=1), Strategy("cp-lora", extras=True))
    base = copy.deepcopy(net)
    set_training_mode(net)
    net(torch.rand(2, 1, 8, 8))
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, base.state_dict()[name])}
    assert changed and changed <= moving(net, Strategy("cp-lora", extras=True)) and all(".adapter." in name for name in changed)
    assert any("last.unit1.norm" in name for name in changed) and not any(name.startswith("first") for name in changed)


def test_norm_statistics_are_those_of_one_pass_by_hand(made):
    "Layer by layer with numpy's mean and variance over the whole set in one batch."
    store = open_store(made[1], 4)
    torch.manual_seed(2)
    net = MultiViewUnet(levels=1)
    x = (store.read(range(len(store)))[0] / 140).clamp(0, 1)
    recompute_norms(net, store, range(len(store)), batch_size=len(store))
    unit1, unit2 = net.first.unit1, net.first.unit2
    with torch.no_grad():
        z = unit1.conv(x).double()
        mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3), unbiased=False)
        assert torch.allclose(unit1.norm.running_mean.double(), mean, atol=1e-6)
        assert torch.allclose(unit1.norm.running_var.double(), z.var((0, 2, 3)), rtol=1e-4)
        shape = (1, -1, 1, 1)
        y = (z - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt() * unit1.norm.weight.view(shape) + unit1.norm.bias.view(shape)
        assert torch.allclose(unit2.norm.running_mean.double(), unit2.conv(y.relu().float()).double().mean((0, 2, 3)), atol=1e-5)


@pytest.mark.long
def test_scratch_knows_nothing_of_the_base(made, tmp_path):
    base, cohort = made
    torch.manual_seed(99)
    save_network(tmp_path / "other.safetensors", MultiViewUnet(levels=2))
    tables = [cross_validate(path, cohort, Strategy("scratch", **SHORT), kfold(cohort.patients, 2), tmp_path / name, quiet=True)
              for name, path in (("a", base), ("b", tmp_path / "other.safetensors"))]
    assert tables[0].equals(tables[1])


@pytest.mark.parametrize("method", ["dora-c", "convdora", "cp-dora"])
def test_a_magnitude_is_inert_where_scaling_it_changes_nothing(method):
    "Scale each magnitude by 3: the output in training mode moves exactly where the function says it should not be inert."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 1))
    adapt(net, method, rank=2, batchnorm="train")
    x = torch.randn(4, 1, 12, 12)
    named = inert_magnitudes(net, x)
    assert named == ["0"]
    set_training_mode(net)
    for name in ("0", "3", "5"):
        m = net.get_submodule(name).adapter.m
        before = net(x).detach()
        with torch.no_grad():
            m.mul_(3)
            moved = (net(x) - before).abs().max() / before.std()
            m.div_(3)
        assert (moved < 1e-3) == (name in named), (name, moved)


# --- choosing on training patients --------------------------------------------------------------------------------


def test_inner_splits_are_by_patient():
    for n in range(2, 12):
        train_part, validation = inner_split(names := [f"p{k}" for k in range(n)], names, seed=n)
        assert train_part and validation and sorted(train_part + validation) == sorted(f"p{k}" for k in range(n))
    for bleeding in ([], ["p0"], ["p0", "of another cohort"]):
        with pytest.raises(ValueError, match=f"two patients with blood or more, there is {len(bleeding[:1])}"):
            inner_split(["p0", "p1", "p2"], bleeding)


def test_both_sides_of_an_inner_split_have_blood():
    names = [f"p{k}" for k in range(20)]
    for seed in range(50):
        for part in inner_split(names, ["p3", "p17"], seed):
            assert len({"p3", "p17"} & {*part}) == 1 and 4 <= len(part) <= 16


@pytest.mark.long
def test_a_learning_rate_is_chosen_without_the_test_patients(made, tmp_path):
    "Other masks for the test patients change their scores, but not one figure of the choice."
    base, cohort = made
    fold = Fold(tuple(cohort.patients[:3]), tuple(cohort.patients[3:]))
    strategy = Strategy("decoding", learning_rate=(1e-4, 1e-2), **SHORT)
    cross_validate(base, cohort, strategy, [fold], tmp_path / "a", quiet=True)
    cases = []
    for row, (patient, ct, mask) in zip(cohort.table.itertuples(), cohort):
        mask = np.roll(mask, 5, axis=0) if patient in fold.test else mask
        cases.append(Case(row.case, patient, row.site, ct.hu.astype(np.int16), mask, ct.affine))
    other = write_cohort(tmp_path / "other", cases)
    cross_validate(base, other, strategy, [fold], tmp_path / "b", quiet=True)
    a, b = (read_json(tmp_path / run / "run.json")["outcomes"][0] for run in "ab")
    assert a["tried"] == b["tried"] and a["learning_rate"] == b["learning_rate"] and len(a["tried"]) == 2
    assert a["learning_rate"] == max((1e-4, 1e-2), key=lambda rate: a["tried"][f"{rate:g}"])
    tables = [pd.read_csv(tmp_path / run / "patients.csv") for run in "ab"]
    assert not tables[0].dice_soft.equals(tables[1].dice_soft)


def test_a_candidate_that_explodes_is_out_and_all_of_them_are_an_error(made, tmp_path, monkeypatch):
    base, cohort = made
    import sahlora.training.transfer as transfer

    real = transfer.train_patients

    def explode(net, store, patients, how, **more):
        if how.learning_rate > 1:
            raise FloatingPointError("the loss is nan at step 1")
        return real(net, store, patients, how, **more)

    monkeypatch.setattr(transfer, "train_patients", explode)
    fold = [Fold(tuple(cohort.patients[:3]), tuple(cohort.patients[3:]))]
    cross_validate(base, cohort, Strategy("decoding", learning_rate=(5.0, 1e-3), **SHORT), fold, tmp_path / "a", quiet=True)
    outcome = read_json(tmp_path / "a/run.json")["outcomes"][0]
    assert outcome["tried"]["5"] is None and outcome["learning_rate"] == 1e-3
    with pytest.raises(FloatingPointError, match="every candidate"):
        cross_validate(base, cohort, Strategy("decoding", learning_rate=(5.0, 6.0), **SHORT), fold, tmp_path / "b", quiet=True)
    assert not (tmp_path / "b/run.json").exists()


# --- what must not pass in silence --------------------------------------------------------------------------------


@pytest.mark.long
def test_a_collapsed_run_is_flagged(made, tmp_path, capsys):
    base, cohort = made
    folds = kfold(cohort.patients, 2)
    table = cross_validate(base, cohort, Strategy("all", steps=60, batch_size=4, learning_rate=5.0), folds, tmp_path, quiet=True)
    flags = read_json(tmp_path / "run.json")["flags"]
    assert table.collapsed.any() and flags and "warning: fold" in capsys.readouterr().out
    fine = pd.DataFrame({"volume_ratio": [1.2, 0.4, 0.9]})
    assert not collapse(fine, pd.DataFrame({"dice": np.linspace(0.2, 0.7, 60)}))
    assert collapse(fine, pd.DataFrame({"dice": np.full(60, 0.01)})) and collapse(fine * 4, pd.DataFrame({"dice": []}))


def test_training_patients_without_blood_stop_a_run(made, tmp_path):
    base, cohort = made
    cases = [Case(row.case, row.patient, row.site, ct.hu.astype(np.int16), mask * (row.Index == 0), ct.affine)
             for row, (_, ct, mask) in zip(cohort.table.itertuples(), cohort)]
    healthy = write_cohort(tmp_path / "healthy", cases)
    folds = kfold(healthy.patients, 2)
    with pytest.raises(ValueError, match="no training patient has any blood"):
        cross_validate(base, healthy, Strategy("decoding", **SHORT), folds, tmp_path / "out", quiet=True)
    few = write_cohort(tmp_path / "few", [replace(case, label=mask * (k != 1)) for k, (case, (_, _, mask)) in enumerate(zip(cases, cohort))])
    for strategy in (Strategy("decoding", learning_rate=(1e-3, 1e-2), **SHORT), Strategy("decoding", training={"patience": 1}, **SHORT)):
        with pytest.raises(ValueError, match="two patients with blood"):
            cross_validate(base, few, strategy, folds, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()
    table = cross_validate(base, healthy, Strategy("none"), folds, tmp_path / "none", quiet=True)
    assert len(table) == 4 and (table.volume_ml > 0).sum() == 1


def test_a_place_that_can_not_be_written_is_found_before_any_work(made, tmp_path, monkeypatch):
    base, cohort = made
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr("sahlora.training.transfer.train_patients", lambda *a, **b: pytest.fail("trained before it looked"))
    with pytest.raises(OSError):
        cross_validate(base, cohort, Strategy("decoding", **SHORT), kfold(cohort.patients, 2), tmp_path / "file/run", quiet=True)


@pytest.mark.long
def test_a_full_disk_loses_nothing_that_was_done(made, tmp_path, monkeypatch):
    base, cohort = made
    folds, strategy = kfold(cohort.patients, 2), Strategy("cp-lora", **SHORT)
    whole = cross_validate(base, cohort, strategy, folds, tmp_path / "whole", quiet=True)
    import sahlora.training.transfer as transfer

    real, calls = transfer.write_csv, []

    def full(path, table):
        calls.append(path)
        if len(calls) == 3:  # the second fold's scores
            raise OSError(28, os.strerror(28), str(path))
        real(path, table)

    monkeypatch.setattr(transfer, "write_csv", full)
    with pytest.raises(OSError):
        cross_validate(base, cohort, strategy, folds, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run/run.json").exists() and (tmp_path / "run/unfinished/fold0").is_dir()
    again = cross_validate(base, cohort, strategy, folds, tmp_path / "run", quiet=True)
    assert again.equals(whole) and (tmp_path / "run/patients.csv").read_bytes() == (tmp_path / "whole/patients.csv").read_bytes()
    assert [read_json(tmp_path / name / "run.json")["resumed"] for name in ("whole", "run")] == [False, True]
    assert not list((tmp_path / "run").glob(".*")) and not (tmp_path / "run/unfinished").exists()


@pytest.mark.long
def test_killed_while_the_folds_are_cleared_away(made, tmp_path, monkeypatch):
    "The tree of folds goes file by file: a kill in between must not leave a fold that looks done."
    base, cohort = made
    strategy, folds = Strategy("cp-lora", **SHORT), kfold(cohort.patients, 2)
    cross_validate(base, cohort, strategy, folds, tmp_path / "whole", quiet=True)
    import sahlora.common.files as files

    def killed(folder, **_):
        for path in sorted(Path(folder).rglob("facts.json")):
            path.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files.shutil, "rmtree", killed)
        cross_validate(base, cohort, strategy, folds, tmp_path / "run", quiet=True)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = files.temporary_name(tmp_path / "run/patients.csv")  # of another kill
    left.with_name(left.name.replace(f".{os.getpid()}.", f".{ended.pid}.")).write_text("half a ta")
    cross_validate(base, cohort, strategy, folds, tmp_path / "run", quiet=True)
    whole, again = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.name != "run.json"} for name in ("whole", "run"))
    assert whole == again


def test_an_unfinished_run_is_not_taken_for_another(made, tmp_path):
    base, cohort = made
    folds = kfold(cohort.patients, 2)
    (tmp_path / "run/unfinished/fold0").mkdir(parents=True)
    (tmp_path / "run/unfinished/fold0/facts.json").write_text('{"strategy": {"method": "cp-lora", "rank": 4}}')
    with pytest.raises(ValueError, match="unfinished: is there already, and no record.json lists it"):
        cross_validate(base, cohort, Strategy("cp-lora", **SHORT), folds, tmp_path / "run", quiet=True)


# --- killed -------------------------------------------------------------------------------------------------------

RUN = """
import sys, torch
from sahlora.cohorts.cohort import Cohort
from sahlora.cohorts.folds import kfold
from sahlora.training.transfer import Strategy, cross_validate
torch.set_num_threads(1)
base, folder, out, workers = sys.argv[1:]
cohort = Cohort.read(folder)
strategy = Strategy("cp-lora", steps=40, batch_size=4, learning_rate=(1e-3, 1e-2), precision="fp32", training={"workers": int(workers)})
cross_validate(base, cohort, strategy, kfold(cohort.patients, 2), out, every=5, quiet=True)
"""


def run_killed(made, out, kills, seed, seconds=8.0, workers=0):
    "Run a cross-validation, kill it at `kills` random moments, let it end; its files but run.json."
    command = [sys.executable, "-c", RUN, str(made[0]), str(made[1].folder), str(out), str(workers)]
    draw = np.random.default_rng(seed)
    for _ in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        begin, wait = time.time(), draw.uniform(0, seconds)
        while time.time() - begin < 60 and not (out / "unfinished").is_dir() and process.poll() is None:
            time.sleep(0.02)  # imports are not what is tested
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "run.json"}


def test_a_killed_cross_validation_ends_in_the_same_bytes(made, tmp_path):
    whole = run_killed(made, tmp_path / "whole", kills=0, seed=0)
    assert len(whole) >= 6 and run_killed(made, tmp_path / "killed", kills=2, seed=1, seconds=3, workers=2) == whole


@pytest.mark.slow
def test_a_cross_validation_killed_at_20_random_moments(made, tmp_path):
    whole = run_killed(made, tmp_path / "whole", kills=0, seed=0)
    for k in range(5):
        assert run_killed(made, tmp_path / f"run{k}", kills=4, seed=10 + k) == whole


# --- controls -----------------------------------------------------------------------------------------------------


def test_decoding_adapters_build_no_graph_below_them(made):
    "The frozen prefix: what the encoder gives needs no gradient, so none is computed there."
    prepare(net := MultiViewUnet(levels=2), Strategy("cp-lora"))
    seen = {}
    for name in ("first", "downs.0", "downs.1", "bottom", "ups.0"):
        net.get_submodule(name).register_forward_hook(lambda m, a, y, name=name: seen.update({name: y}))
    net(torch.rand(1, 1, 16, 16))
    flat = {name: (y if torch.is_tensor(y) else y[0]).requires_grad for name, y in seen.items()}
    assert flat == {"first": False, "downs.0": False, "downs.1": False, "bottom": False, "ups.0": True}


def learned_and_constant(folder, cohort, planes):
    "Soft Dice on three patients after training on seven, by the network and by the best constant mask; `planes`: their masks."
    cases = [Case(row.case, row.patient, row.site, ct.hu.astype(np.int16), mask, ct.affine)
             for row, (_, ct, _), mask in zip(cohort.table.itertuples(), cohort, planes)]
    store = open_store(write_cohort(folder, cases), 4)
    torch.manual_seed(0)
    net = MultiViewUnet(levels=2)
    train(net, store, store.rows(cohort.patients[:7]), Training(steps=150, batch_size=8, learning_rate=3e-3), quiet=True)
    test = [(predict_volume(net, ct).numpy(), mask) for (_, ct, _), mask in zip(cohort, planes)][7:]
    mean = np.concatenate(planes[:7], axis=2).mean(axis=2, keepdims=True)
    masks = [np.broadcast_to(m, test[0][1].shape).astype(float) for m in (mean, *(mean >= t for t in np.unique(mean)[1:]))]
    return np.mean([dice(p, mask) for p, mask in test]), max(np.mean([dice(m, mask) for _, mask in test]) for m in masks)


def test_shuffled_labels_teach_no_more_than_the_mean_mask(tmp_path):
    "Masks dealt out anew over all slices: the network does no better than the best constant mask; with true ones it does."
    cohort = make_phantom_cohort(tmp_path / "c", "asah", 10, 5, grid=(32, 40))
    true = [mask for _, _, mask in cohort]
    every = np.concatenate(true, axis=2)
    shuffled = np.split(every[..., np.random.default_rng(5).permutation(every.shape[2])], 10, axis=2)
    learned, constant = learned_and_constant(tmp_path / "shuffled", cohort, shuffled)
    assert learned <= constant + 0.02
    learned, constant = learned_and_constant(tmp_path / "true", cohort, true)
    assert learned > constant + 0.1


def test_bf16_differs_from_fp32_by_little(made, tmp_path):
    "The same run in both precisions: Dice differs, by how much is bounded."
    base, cohort = made
    tables = [cross_validate(base, cohort, Strategy("decoding", precision=precision, **SHORT), kfold(cohort.patients, 2), tmp_path / precision,
                             quiet=True) for precision in ("fp32", "bf16")]
    difference = (tables[0].dice_soft - tables[1].dice_soft).abs()
    assert 0 < difference.max() < 0.05


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_predict_brings_pictures_to_the_network():
    net = MultiViewUnet(levels=1).to("cuda")
    assert predict(net, torch.rand(3, 1, 8, 8)).device.type == "cpu"


def test_fewer_patients_train_and_all_are_tested(made, tmp_path):
    base, cohort = made
    table = cross_validate(base, cohort, Strategy("decoding", patients=1, **SHORT), kfold(cohort.patients, 2), tmp_path / "few", quiet=True)
    run = read_json(tmp_path / "few/run.json")
    assert run["name"] == "fine-tuning-decoding-n1" and [len(fold["train"]) for fold in run["folds"]] == [1, 1]
    assert set(table.patients) == {1} and sorted(table.patient) == cohort.patients
    with pytest.raises(ValueError, match="a fold trains on 2"):
        cross_validate(base, cohort, Strategy("decoding", patients=3, **SHORT), kfold(cohort.patients, 2), tmp_path / "many", quiet=True)
