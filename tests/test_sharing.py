"""What leaves the house: shipped models, model cards, MONAI bundles that give the same mask without sahlora."""
import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pypandoc
import pytest
import torch
from typer.testing import CliRunner

from sahlora.adapters import METHODS, adapt, read_adapter, save_adapter
from sahlora.prediction.models import (WEIGHTS, export_bundle, find_weights, inference_config, is_synthetic,
                            make_models, model_card, read_recipe, score_headings, find_scores,
                            shipped, shipped_card, shipped_table, volume_table, weight_facts)
from sahlora.cli import app
from sahlora.cohorts.cohort import make_phantom_cohort
from sahlora.ct import read_ct, write_like
from sahlora.common.display import plain_text
from sahlora.evaluation.scores import score_patient
from sahlora.common.files import file_hash, load_tensors
from sahlora.phantom import make_case
from sahlora.prediction import InputSpec, load_model, predict_scan
from sahlora.training.loop import predict_volume, pretrain, save_network
from sahlora.unet import MultiViewUnet, build_network

FILES = ["LICENSE", "configs/inference.json", "configs/metadata.json", "docs/README.md", "models/model.pt", "models/model.ts", "record.json"]
ALONE = 'import sys; sys.modules["sahlora"] = None\n'  # from then on import sahlora raises ImportError


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def alone(program, *words, cwd=None):
    "Run a program in a process of its own, in which sahlora can not be imported; what it prints."
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", ALONE + program, *map(str, words)], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def scan(path, grid=(64, 80), axes=None, index=0, slices=8):
    "A phantom as a NIfTI file, its array axes in another order where `axes` says."
    case = make_case("asah", 31, index, grid=grid, slices=slices)
    image = nib.Nifti1Image(np.round(case.hu).astype(np.int16), case.affine)
    if axes:
        turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes))
        image = image.as_reoriented(turn)
    path.parent.mkdir(exist_ok=True, parents=True)
    nib.save(image, path)
    return path


def stored(path):
    return np.asarray(nib.load(path).dataobj)


# ---------------------------------------------------------------- shipped models

def test_one_network_and_every_method_are_shipped_in_two_megabytes():
    assert list(shipped("model")) == ["phantom"] and list(shipped("adapter")) == list(METHODS)
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < 2e6


def test_shipped_files_follow_the_recipe():
    recipe = read_recipe()
    _, header = load_tensors(shipped()["phantom"])
    assert header["synthetic"] and header["cohort"] == recipe["source"] and header["training"] == recipe["pretrain"]
    assert len(header["patients"]) == recipe["source"]["cases"] and header["input"]["resample"]
    for method, path in shipped("adapter").items():
        facts, _ = read_adapter(path)
        said = facts["metadata"]
        assert facts["adapter"]["method"] == method and said["synthetic"] and said["cohort"] == recipe["target"]
        how = said["strategy"]
        assert {name: how[name] for name in recipe["finetune"]} == recipe["finetune"]
        assert how["learning_rate"] == recipe["learning_rates"][method]
        assert not set(said["patients"]) & set(header["patients"])


@pytest.fixture(scope="module")
def patient():
    "The first patient that the shipped weights were scored on."
    from sahlora.ct import HeadCT

    recipe = read_recipe()
    plan = recipe["test"]
    case = make_case(plan["kind"], plan["seed"], 0, grid=tuple(recipe["grid"]), slices=recipe["slices"])
    return HeadCT(np.round(case.hu).astype(np.float32), case.affine), case.blood


@pytest.mark.long
@pytest.mark.parametrize("method", ["none", *METHODS])
def test_shipped_scores_are_what_the_weights_give(method, patient):
    "The committed table holds the score that is computed here again."
    ct, blood = patient
    net, _ = load_model(find_weights("phantom"), None if method == "none" else find_weights(method, "adapter"))
    found = score_patient(predict_volume(net, ct).numpy(), blood, ct)
    table = pd.read_csv(WEIGHTS / "patients.csv")
    row = table[(table.method == method) & (table.patient.str.endswith("-0000-s9103"))].squeeze()
    for name in ("dice_soft", "dice_hard", "volume_ml", "predicted_ml"):
        assert row[name] == pytest.approx(found[name], rel=5e-3, abs=2e-3), name


def test_an_adapter_helps_where_the_network_was_not_trained():
    scores = pd.read_csv(WEIGHTS / "patients.csv").pivot(index="patient", columns="method", values="dice_soft")
    for method in METHODS:
        assert (scores[method] - scores["none"]).mean() > 0.15
    assert shipped_table().loc["cp-lora", "numbers"] < shipped_table().loc["phantom", "numbers"] / 40


def test_the_committed_card_and_licence_are_the_computed_ones(project):
    assert (WEIGHTS / "README.md").read_text() == shipped_card(), "write it again: sahlora models make, or shipped_card()"
    assert (WEIGHTS / "LICENSE").read_bytes() == (project / "LICENSE").read_bytes()


def test_names_are_found(tmp_path, monkeypatch):
    assert find_weights("cp-dora", "adapter") == WEIGHTS / "cp-dora.safetensors"
    monkeypatch.chdir(tmp_path)
    Path("cp-dora").write_text("")
    assert find_weights("cp-dora", "adapter") == Path("cp-dora"), "a file goes before a name"
    Path("cp-lora").mkdir()
    assert find_weights("cp-lora", "adapter") == WEIGHTS / "cp-lora.safetensors", "a folder of runs hides no shipped adapter"
    assert find_weights("none/model.safetensors") == Path("none/model.safetensors")
    for word, kind, hint in (("cplora", "adapter", "did you mean 'cp-lora'"), ("phantm", "model", "did you mean 'phantom'"),
                             ("phantom", "adapter", "There are: lora-c")):
        with pytest.raises(ValueError, match=hint):
            find_weights(word, kind)


def test_weights_that_were_not_installed_are_missed(tmp_path, monkeypatch):
    monkeypatch.setattr("sahlora.prediction.models.WEIGHTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="install sahlora again"):
        find_weights("phantom")


def test_a_recipe_that_is_not_whole_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_text("threads: 1\n")
    with pytest.raises(ValueError, match="grid, slices, source"):
        read_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text((WEIGHTS / "recipe.yaml").read_text().replace("lora-c: 3", "loar-c: 3"))
    with pytest.raises(ValueError, match="loar-c is no adapter"):
        read_recipe(tmp_path / "r.yaml")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "What a recipe of two steps makes, by the command."
    folder, recipe = tmp_path_factory.mktemp("tiny"), read_recipe()
    recipe |= {"grid": [32, 40], "slices": 8, "network": {"name": "multi-view-unet", "levels": 1}, "learning_rates": {"cp-lora": 0.01}}
    recipe |= {role: {**recipe[role], "cases": 2} for role in ("source", "target", "test")}
    recipe |= {part: {**recipe[part], "steps": 2, "batch_size": 2} for part in ("pretrain", "finetune")}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    done = run("models", "make", "--out", folder / "out", "--work", folder / "work", "--recipe", folder / "recipe.yaml", "--quiet")
    assert done.exit_code == 0 and "no clinical claim" in done.output, done.output
    return folder


MADE = ["README.md", "cp-lora.safetensors", "patients.csv", "phantom.safetensors", "record.json"]


@pytest.mark.long
def test_models_are_made_again_from_a_recipe(tiny):
    assert sorted(path.name for path in (tiny / "out").iterdir()) == MADE
    before = {path.name: file_hash(path) for path in (tiny / "out").iterdir()}
    make_models(tiny / "again", tiny / "work", tiny / "recipe.yaml", quiet=True)  # goes on from the pre-training
    assert {path.name: file_hash(path) for path in (tiny / "again").iterdir()}.items() <= before.items()
    assert "Synthetic" in (tiny / "out" / "README.md").read_text()


@pytest.mark.long
def test_models_are_not_made_twice_and_never_over_others(tiny, tmp_path):
    "The same call keeps its files; another recipe is refused, or replaces what the record lists: no stale adapter, no lost note."
    recipe, out = json.loads((tiny / "recipe.yaml").read_text()), tmp_path / "out"

    def make(*more, **learning_rates):
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe | {"learning_rates": {name.replace("_", "-"): r for name, r in learning_rates.items()}}))
        return run("models", "make", "--out", out, "--work", tiny / "work", "--recipe", tmp_path / "recipe.yaml", "--quiet", *more)

    def times():
        return {path.name: path.stat().st_mtime_ns for path in out.iterdir()}

    assert make(cp_lora=0.01, convlora=0.01).exit_code == 0 and sorted(times()) == sorted([*MADE, "convlora.safetensors"])
    (out / "note.txt").write_text("mine")
    before, work = times(), {path: path.stat().st_mtime_ns for path in (tiny / "work").rglob("*.*") if path.is_file()}
    for more in ((), ("--overwrite",)):
        assert make(*more, cp_lora=0.01, convlora=0.01).exit_code == 0 and times() == before
    refused = make(cp_lora=0.02)
    assert refused.exit_code == 2 and "recipe.learning_rates.cp-lora was 0.01, is 0.02" in refused.stderr and times() == before
    assert make("--overwrite", cp_lora=0.02).exit_code == 0
    assert sorted(times()) == sorted([*MADE, "note.txt"]) and (out / "note.txt").read_text() == "mine"
    assert {path: path.stat().st_mtime_ns for path in work} == work, "cohorts and base are kept"
    (out / "README.md").write_text("edited")
    refused = make(cp_lora=0.02)
    assert refused.exit_code == 2 and "README.md was changed since" in refused.stderr and (out / "README.md").read_text() == "edited"


@pytest.mark.long
def test_models_are_not_made_over_files_of_a_user(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/README.md").write_text("mine")
    for more in ((), ("--overwrite",)):
        done = run("models", "make", "--out", tmp_path / "out", "--work", tiny / "work", "--recipe", tiny / "recipe.yaml", "--quiet", *more)
        assert done.exit_code == 2 and "README.md: is there already" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["README.md"] and (tmp_path / "out/README.md").read_text() == "mine"


# ---------------------------------------------------------------- the command

@pytest.mark.long
def test_predict_works_at_once(tmp_path):
    "With nothing trained: the shipped network, and an adapter by name."
    path = scan(tmp_path / "scan.nii.gz", slices=6)
    done = run("predict", path, "--adapter", "cp-lora", "--out", tmp_path / "masks", "--quiet", "--precision", "fp32")
    assert done.exit_code == 0 and "synthetic data: no clinical claim" in done.output and "Not for clinical use" in done.output
    net, header = load_model(find_weights("phantom"), find_weights("cp-lora", "adapter"))
    p = predict_scan(net, read_ct(path), spec=InputSpec.from_header(header), precision="fp32")
    write_like(p.ct, p.mask, tmp_path / "ours.nii.gz")
    assert p.mask.any() and np.array_equal(stored(tmp_path / "masks/scan/mask.nii.gz"), stored(tmp_path / "ours.nii.gz"))
    wrong = run("predict", path, "--adapter", "cp-laro", "--out", tmp_path / "other", "--quiet")
    assert wrong.exit_code == 2 and "did you mean 'cp-lora'" in wrong.stderr and not (tmp_path / "other").exists()


def test_a_shipped_adapter_fits_the_shipped_network_alone(tmp_path):
    torch.manual_seed(1)
    save_network(tmp_path / "model.safetensors", MultiViewUnet())
    done = run("export", "--model", tmp_path / "model.safetensors", "--adapter", "cp-lora", "--out", tmp_path / "bundle")
    assert done.exit_code == 2 and "other base weights" in done.stderr and not (tmp_path / "bundle").exists()


def test_models_show():
    done = run("models", "show")
    assert done.exit_code == 0 and all(name in done.output for name in ("phantom", *METHODS)) and "no clinical claim" in done.output


@pytest.mark.long
def test_fine_tuning_of_the_shipped_network(tmp_path):
    "By name, and the card of its adapter knows its fold's patients and scores."
    cohort = make_phantom_cohort(tmp_path / "target", "asah", cases=3, seed=12, grid=(32, 40), slices=10)
    done = run("finetune", "--base", "phantom", "--cohort", cohort.folder, "--out", tmp_path / "run", "--steps", 2, "--batch-size", 2, "--quiet")
    assert done.exit_code == 0, done.output
    adapter = tmp_path / "run/adapter-fold1.safetensors"
    done = run("export", "--adapter", adapter, "--out", tmp_path / "bundle")
    assert done.exit_code == 0, done.output
    card = (tmp_path / "bundle/docs/README.md").read_text()
    table = pd.read_csv(tmp_path / "run/patients.csv")
    assert "The adapter was trained on 2 patients" in card and "steps 2, batch size 2" in card and "1 scans of patients" in card
    assert f"{table[table.fold == 1].dice_soft.item():.2f}" in card


# ---------------------------------------------------------------- model cards

def test_a_card_says_synthetic_or_not_and_always_not_for_clinical_use(tmp_path):
    net = MultiViewUnet(levels=1)
    for name, patients, kind in (("a", ["asah-0001-s3"], True), ("b", ["007"], False), ("c", [], False)):
        save_network(tmp_path / f"{name}.safetensors", net, patients=patients)
        facts = weight_facts(tmp_path / f"{name}.safetensors")
        page = model_card(name, facts)
        assert ("Synthetic data, no clinical claim" in page) == kind == facts["synthetic"] and "Not for clinical use" in page
    assert "patients that are not named" in page and is_synthetic({"synthetic": True, "patients": ["007"]})


def test_a_card_of_a_real_adapter_on_a_synthetic_network(tmp_path):
    "Scores of real patients are not called synthetic; where the network is from is still said."
    net = MultiViewUnet(levels=1)
    save_network(tmp_path / "model.safetensors", net, patients=["tbi-0000-s1"])
    adapt(net, "cp-lora", rank=2, where="decoding")
    save_adapter(net, tmp_path / "a.safetensors", metadata={"patients": ["p1", "p2"]})
    facts = weight_facts(tmp_path / "model.safetensors", tmp_path / "a.safetensors")
    page = model_card("x", facts)
    assert not facts["synthetic"] and facts["from_phantom"] and "trained on 2 patients. Head CT" in page
    assert "trained on 1 patient. Procedural" in page and "> Not for clinical use" in page


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "a|b", "![](http://x)", "`c` *d*", "two\n\n# lines"])
def test_a_card_takes_the_words_of_a_file_as_text(tmp_path, text):
    "Headers are written by others; a card is read as Markdown."
    save_network(tmp_path / "model.safetensors", MultiViewUnet(levels=1), patients=["p1"], training={"precision": text, "steps": 5})
    facts = weight_facts(tmp_path / "model.safetensors")
    facts["network"] = {"name": text, "levels": text}
    facts |= {"weights": text, "cohort": {"kind": text, "seed": text}}
    adapter = {"method": text, "rank": 2, "where": text, "layers": 1, "numbers": 5, "patients": ["p2"], "cohort": None, "strategy": {}}
    page = model_card(text, {**facts, "adapter": adapter})
    made = pypandoc.convert_text(page, "html5", format="gfm")
    tags = set(re.findall(r"<(\w+)", made)) - {"code"}
    assert tags == {"h1", "h2", "blockquote", "p", "ul", "li"} and made.count("<h1") == 1 and made.count("<h2") == 7
    assert html.unescape(re.sub("<[^>]+>", "", made)).count(plain_text(text)) >= 7


@pytest.mark.parametrize("change, said", [
    ({"role": "fit"}, "no patient was tested"), ({"dice_soft": 7.5}, "not from 0 to 1"), ({"dice_soft": "0,5"}, "could not convert"),
    ({"role": None}, "no patient was tested"), (["dice_soft"], "dice_soft"), (["role"], "role"), (["volume_ml"], "volume_ml")])
def test_a_card_shows_scores_of_unseen_patients_alone(tmp_path, change, said):
    scores, path = pd.read_csv(WEIGHTS / "patients.csv"), tmp_path / "scores.csv"
    scores = scores.drop(columns=change) if isinstance(change, list) else scores.assign(**change)
    scores.to_csv(path, index=False)
    with pytest.raises(ValueError, match=f"scores.csv: .*{said}"):
        export_bundle(tmp_path / "bundle", scores=path)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.long
def test_a_bundle_never_replaces_the_weights_it_is_made_of(tmp_path):
    base = tmp_path / "base"
    cohort = make_phantom_cohort(tmp_path / "source", "tbi", cases=2, seed=12, grid=(32, 40), slices=6)
    pretrain(cohort, base, {"name": "multi-view-unet", "levels": 1}, {"steps": 2, "batch_size": 2}, quiet=True)
    before = (base / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="model.safetensors, which this call reads"):
        export_bundle(base, base / "model.safetensors", overwrite=True)
    assert (base / "model.safetensors").read_bytes() == before


@pytest.mark.long
def test_a_card_shows_no_scores_of_another_run(tmp_path):
    "An adapter that was put into a run's folder, and a table that was changed there."
    cohort = make_phantom_cohort(tmp_path / "target", "asah", cases=3, seed=12, grid=(32, 40), slices=10)
    for method in ("cp-lora", "lora-c"):
        done = run("finetune", "--base", "phantom", "--cohort", cohort.folder, "--out", tmp_path / method, "--steps", 1, "--batch-size", 2,
                   "--method", method, "--quiet")
        assert done.exit_code == 0, done.output
    adapter, model = tmp_path / "cp-lora/adapter-fold0.safetensors", WEIGHTS / "phantom.safetensors"
    assert len(find_scores(adapter, model)) == 1 and weight_facts(model, adapter)["adapter"]["strategy"]["method"] == "cp-lora"
    shutil.copy(tmp_path / "lora-c/adapter-fold0.safetensors", adapter)
    for call in (lambda: find_scores(adapter, model), lambda: weight_facts(model, adapter)):
        with pytest.raises(ValueError, match="adapter-fold0.safetensors: is not the file that record.json"):
            call()
    (tmp_path / "cp-lora/record.json").unlink()  # as version 0.1.0 left a folder
    with pytest.raises(ValueError, match="is a lora-c adapter, but the run beside it trained cp-lora"):
        weight_facts(model, adapter)
    table = tmp_path / "lora-c/patients.csv"
    table.write_text(table.read_text().replace("0.", "0.9", 1))
    with pytest.raises(ValueError, match="patients.csv: is not the file that record.json"):
        find_scores(tmp_path / "lora-c/adapter-fold1.safetensors", model)


def test_scores_by_volume():
    rows = pd.DataFrame({"volume_ml": [10.0, 20.0, 60.0, np.nan], "dice_soft": [0.2, 0.6, 0.8, 0.4], "dice_hard": [0.2, 0.6, 0.8, 0.4],
                         "nsd": np.nan, "hd95_mm": np.nan})
    lines = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:5]] for line in volume_table(rows).splitlines()}
    assert lines["<25"] == ["2", "0.40", "0.40"] and lines["50-100"] == ["1", "0.80", "0.80"] and lines["unknown"] == ["1", "0.40", "0.40"]
    assert lines["all"] == ["4", "0.50", "0.50"] and lines[">100"] == ["0", "-", "-"]
    assert list(score_headings(rows).values()) == ["soft Dice", "Dice", "surface Dice", "HD95 in mm"]
    assert score_headings(rows.assign(tolerance_mm=5.0))["nsd"] == "surface Dice, 5 mm" and "surface Dice, 5 mm" in volume_table(
        rows.assign(tolerance_mm=5.0))
    old = rows.drop(columns="nsd").assign(nsd_2mm=0.5)
    assert "nsd" not in score_headings(old) and "urface" not in volume_table(old)


# ---------------------------------------------------------------- bundles

@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    done = run("export", "--adapter", "cp-lora", "--out", folder / "hematoma")
    assert done.exit_code == 0 and "MONAI bundle" in done.output, done.output
    return folder / "hematoma"


def test_a_bundle_has_monais_layout(bundle, project):
    assert sorted(str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()) == FILES
    meta = json.loads((bundle / "configs/metadata.json").read_text())
    needed = {"version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version", "task", "description", "authors",
              "copyright", "network_data_format"}
    assert needed <= meta.keys() and meta["intended_use"].endswith("not for clinical use.") and "ynthetic" in meta["description"]
    for tensor in (meta["network_data_format"]["inputs"]["image"], meta["network_data_format"]["outputs"]["pred"]):
        assert {"type", "format", "num_channels", "spatial_shape", "dtype", "value_range", "is_patch_data", "channel_def"} <= tensor.keys()
    card = (bundle / "docs/README.md").read_text()
    assert "Not for clinical use" in card and "Synthetic data, no clinical claim" in card and "cp-lora adapter of rank 8" in card
    assert (bundle / "LICENSE").read_bytes() == (project / "LICENSE").read_bytes()
    assert all(path.stat().st_mode & 0o044 for path in (bundle, *bundle.rglob("*"))), "whoever gets the folder can read it"


def same_masks(paths, masks, tmp_path):
    "Raises where a mask that MONAI wrote is not the one that `predict_scan` makes."
    net, header = load_model(find_weights("phantom"), find_weights("cp-lora", "adapter"))
    for path in paths:
        ct = read_ct(path)
        p = predict_scan(net, ct, spec=InputSpec.from_header(header), precision="fp32")
        write_like(ct, p.mask, tmp_path / "ours.nii.gz")
        mask = masks / f"{path.name.partition('.')[0]}_mask.nii.gz"
        theirs, ours = stored(mask), stored(tmp_path / "ours.nii.gz")
        assert theirs.shape == ours.shape and theirs.dtype == np.uint8 and ours.sum() > 20
        assert (theirs != ours).sum() <= 1e-4 * ours.sum(), f"{path.name}: {(theirs != ours).sum()} voxels differ"
        assert np.allclose(nib.load(mask).affine, nib.load(path).affine, atol=1e-4)


@pytest.mark.long
def test_a_clean_process_gets_the_same_output(bundle, tmp_path):
    "MONAI loads the network without sahlora, as TorchScript and by its configuration, and runs the bundle: our numbers, our masks."
    net, _ = load_model(find_weights("phantom"), find_weights("cp-lora", "adapter"))
    x = torch.rand(2, 1, 40, 24)
    torch.save(x, tmp_path / "x.pt")
    paths = [scan(tmp_path / "scans/same.nii.gz"), scan(tmp_path / "scans/fine.nii.gz", (128, 160), "RSA", 1)]
    said = alone("""
import torch, json
from monai.bundle import create_workflow, load, verify_net_in_out
place, name = sys.argv[1:]
x = torch.load(place + "/x.pt")
net, meta, _ = load(name, bundle_dir="..", load_ts_module=True, device="cpu")
same = load(name, bundle_dir="..", workflow_type="inference", device="cpu")
with torch.no_grad():
    torch.save((net(x), same(x)), place + "/y.pt")
verify_net_in_out("network_def", meta_file="configs/metadata.json", config_file="configs/inference.json", device="cpu", n=2, p=1)
workflow = create_workflow(config_file="configs/inference.json", workflow_type="inference", dataset_dir=place + "/scans",
                           output_dir=place + "/masks")
assert not workflow.check_properties(), workflow.check_properties()
workflow.run()
print(json.dumps([meta["name"], "sahlora" in {name.partition(".")[0] for name, module in sys.modules.items() if module}]))
""", tmp_path, bundle.name, cwd=bundle)
    assert json.loads(said.splitlines()[-1]) == ["hematoma", False]
    with torch.no_grad():
        ours = net(x)
    for theirs in torch.load(tmp_path / "y.pt"):
        assert torch.allclose(theirs, ours, atol=1e-5) and not torch.allclose(theirs, ours + 1e-3, atol=1e-5)
    same_masks(paths, tmp_path / "masks", tmp_path)


def test_the_state_is_plain_and_fits_our_class(bundle):
    state = torch.load(bundle / "models/model.pt", weights_only=True)
    net, _ = load_model(find_weights("phantom"), find_weights("cp-lora", "adapter"))
    meta = json.loads((bundle / "configs/metadata.json").read_text())
    again = build_network(meta["network"])
    again.load_state_dict(state)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.slow
def test_the_command_of_the_card_gives_our_masks(bundle, tmp_path):
    "python -m monai.bundle run, as the card says, on scans of several sizes, pixels and orientations."
    paths = [scan(tmp_path / "scans/same.nii.gz"), scan(tmp_path / "scans/fine.nii.gz", (128, 160), "LAS", 1),
             scan(tmp_path / "scans/odd.nii", (102, 126), "RSA", 2)]
    words = ["--config_file", "configs/inference.json", "--dataset_dir", tmp_path / "scans", "--output_dir", tmp_path / "masks"]
    card = (bundle / "docs/README.md").read_text()
    assert "python -m monai.bundle run --config_file configs/inference.json --dataset_dir SCANS --output_dir MASKS" in card
    done = subprocess.run([sys.executable, "-m", "monai.bundle", "run", *map(str, words)], cwd=bundle, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    same_masks(paths, tmp_path / "masks", tmp_path)


def through_monai(net, path, spec, step, threshold=0.5):
    "A scan through a bundle's transforms, slice by slice, in this process; the probabilities before and the mask after them."
    from monai.bundle import ConfigParser
    from monai.inferers import SliceInferer

    config = inference_config(spec, step, threshold) | {"imports": ["$import torch"], "output_dir": str(path.parent / "out")}
    parser = ConfigParser(config)
    item = parser.get_parsed_content("preprocessing")({"image": str(path)})
    assert isinstance(parser.get_parsed_content("inferer"), SliceInferer)
    with torch.no_grad():
        item["pred"] = parser.get_parsed_content("inferer")(item["image"][None], net)[0]
    return item["image"], np.asarray(parser.get_parsed_content("postprocessing")(item)["pred"])[0]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spec", [InputSpec(), InputSpec((-20.0, 100.0)), InputSpec((0.0, 80.0), 3.1, True), InputSpec((0.0, 140.0), 1.7, True)],
                         ids=["plain", "window", "coarser", "finer"])
@pytest.mark.parametrize("network", [{"name": "multi-view-unet", "levels": 3}, {"name": "unet", "levels": 2, "width": 4},
                                     {"name": "unet", "width": 2}], ids=["multi-view", "plain", "plain of 4 levels"])
def test_transforms_do_what_predict_does(spec, network, tmp_path):
    "Windows, padding, resampling and the way back, for networks that nobody trained: the same mask, the same grid."
    torch.manual_seed(3)
    net = build_network(network).eval()
    for value in net.parameters():
        if value.ndim == 4:
            torch.nn.init.kaiming_normal_(value)  # probabilities that differ from pixel to pixel, at any depth
    path = scan(tmp_path / "scan.nii.gz", (72, 88) if net.multiple == 16 else (58, 70), "PLS", slices=5)
    ct = read_ct(path)
    p = predict_scan(net, ct, spec=spec, precision="fp32")
    threshold = float(np.quantile(p.probabilities, 0.9))  # some voxels on either side, whatever the network says
    image, mask = through_monai(net, path, spec, net.multiple, threshold)
    ours = (p.probabilities >= threshold).transpose(1, 0, 2)  # stored as PLS
    assert mask.shape == ours.shape and 0 < ours.mean() < 0.5
    assert (mask != ours).mean() < 2e-4, f"{(mask != ours).sum()} of {mask.size} voxels differ"
    assert float(image.min()) == 0 and float(image.max()) <= 1 and not any(n % net.multiple for n in image.shape[1:3])


def test_a_bundle_says_what_the_network_needs(tmp_path):
    "The plain Unet halves four times: the bundle pads to 16, and so does its metadata say."
    torch.manual_seed(3)
    net = build_network({"name": "unet", "width": 2})
    save_network(tmp_path / "model.safetensors", net)
    bundle = export_bundle(tmp_path / "plain", tmp_path / "model.safetensors")
    config = json.loads((bundle / "configs/inference.json").read_text())
    assert config["padding"]["transforms"][0]["k"] == [16, 16, 1]
    meta = json.loads((bundle / "configs/metadata.json").read_text())
    assert meta["network_data_format"]["inputs"]["image"]["spatial_shape"] == ["16*n", "16*n"]
    x = torch.rand(2, 1, 80, 96)
    with torch.no_grad():
        assert torch.allclose(torch.jit.load(bundle / "models/model.ts")(x), net.eval()(x), atol=1e-5)


@pytest.mark.parametrize("threshold", [1.0, 0, float("nan"), float("inf"), "0.5", True])
def test_bad_bundles_are_refused_and_nothing_is_written(tmp_path, threshold):
    for out, options, words in ((tmp_path / "a b", {}, "letters, digits"), (tmp_path / "x", {"threshold": threshold}, "threshold must"),
                                (tmp_path / "x", {"model": "none.safetensors"}, "no such file")):
        with pytest.raises((ValueError, OSError), match=words):
            export_bundle(out, **options)
    assert not list(tmp_path.iterdir())


def contents(folder):
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.long
def test_a_bundle_is_kept_refused_or_replaced(tmp_path):
    out = tmp_path / "bundle"
    export_bundle(out, adapter="cp-lora")
    (out / "docs/mine.md").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    for overwrite in (False, True):
        export_bundle(out, adapter="cp-lora", overwrite=overwrite)
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before, "the same call keeps its files"
    for words in (("--adapter", "convlora"), ("--adapter", "cp-lora", "--threshold", 0.4)):
        done = run("export", "--out", out, *words)
        assert done.exit_code == 2 and "another call" in done.stderr and {path: path.stat().st_mtime_ns for path in before} == before
    done = run("export", "--out", out, "--adapter", "convlora", "--overwrite")
    assert done.exit_code == 0, done.stderr
    export_bundle(tmp_path / "fresh" / "bundle", adapter="convlora")
    found, fresh = contents(out), contents(tmp_path / "fresh/bundle")
    same = fresh.keys() - {"models/model.ts", "record.json"}  # TorchScript numbers what it has traced in a process
    assert found.keys() == {*fresh, "docs/mine.md"} and {name: found[name] for name in same} == {name: fresh[name] for name in same}
    (out / "models/model.pt").write_bytes(b"edited")
    with pytest.raises(ValueError, match="models/model.pt was changed since it was written"):
        export_bundle(out, adapter="convlora")
    assert (out / "models/model.pt").read_bytes() == b"edited"


@pytest.mark.parametrize("name", ["LICENSE", "docs/README.md", "models"])
def test_a_bundle_is_not_written_over_files_of_a_user(tmp_path, name):
    path = tmp_path / "bundle" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    for overwrite in (False, True):
        with pytest.raises((ValueError, OSError), match=f"bundle/{name}"):
            export_bundle(tmp_path / "bundle", overwrite=overwrite)
    assert path.read_text() == "mine"


def test_weights_that_are_not_their_runs_are_not_exported(tiny, tmp_path):
    torch.manual_seed(1)
    work = tmp_path / "made"
    make_models(work, tiny / "work", tiny / "recipe.yaml", quiet=True)
    export_bundle(tmp_path / "x", work / "phantom.safetensors", work / "cp-lora.safetensors")
    save_network(work / "phantom.safetensors", MultiViewUnet(levels=1))
    with pytest.raises(ValueError, match="phantom.safetensors: is not the file that record.json"):
        export_bundle(tmp_path / "y", work / "phantom.safetensors")
    assert not (tmp_path / "y").exists()


@pytest.mark.long
def test_versions_that_are_not_known_do_not_stop_an_export(tmp_path):
    program = """
import importlib.metadata as metadata, sys
real = metadata.version
def version(name):
    if name in ("sahlora", "nibabel"):
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.version = version
from sahlora.prediction.models import export_bundle
export_bundle(sys.argv[1])
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program, tmp_path / "x"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    meta = json.loads((tmp_path / "x/configs/metadata.json").read_text())
    assert meta["required_packages_version"] == {"nibabel": "unknown"} and meta["changelog"]["0.1.0"].endswith("sahlora unknown")


LIMITED = """
import resource, sys
from typer.testing import CliRunner
from sahlora.cli import app
import monai.data, sahlora.prediction.models
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
done = CliRunner().invoke(app, ["export", "--out", sys.argv[1]])
print(done.exit_code, done.stderr)
"""


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a limit on the size of files")
def test_a_bundle_that_does_not_fit_is_said_in_words_and_gone_on_with(tmp_path):
    "Really written, not pretended: torch's own writer says nothing of the disk."
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", LIMITED, tmp_path / "bundle"], capture_output=True, text=True)
    assert done.stdout.startswith("2 ") and "too large" in done.stdout and "mistake" not in done.stdout, done.stdout + done.stderr
    left = contents(tmp_path / "bundle")
    assert "models/model.pt" not in left and not json.loads((tmp_path / "bundle/record.json").read_text())["complete"]
    done = run("export", "--out", tmp_path / "bundle")
    assert done.exit_code == 0 and sorted(contents(tmp_path / "bundle")) == FILES


def test_a_full_disk_is_said_in_words(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr("sahlora.prediction.models.torch.save", full)
    done = run("export", "--out", tmp_path / "bundle")
    assert done.exit_code == 2 and "disk is full" in done.stderr and list(contents(tmp_path / "bundle")) == ["record.json"]
