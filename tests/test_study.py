"""Study files: every mistake is found before anything runs, and said with the right word."""
import shutil

import nbformat
import pytest
import yaml

from sahlora.cohorts.layouts import LAYOUTS
from sahlora.evaluation.claims import CLAIMS
from sahlora.evaluation.scores import METRICS
from sahlora.study import batch, experiment
from sahlora.study.batch import Costs, job_seconds, make_batch, plan_text, trained_parts
from sahlora.common.style import run_record
from sahlora.report.results import rate_table, strategy_table
from sahlora.study.experiment import check_parameters, code_hash, load_extensions, make_cohort, reached
from sahlora.study.schema import expand_runs, network_of, read_study, strategy_of
from sahlora.unet import NETWORKS, Unet


@pytest.fixture
def write(project, tmp_path):
    content = yaml.safe_load((project / "paper/studies/smoke.yaml").read_text())

    def change(path, value):
        "The smoke study with one value set (or one key added) at a dotted path."
        target = content
        *parents, last = path.split(".")
        for key in parents:
            target = target[int(key) if key.isdigit() else key]
        target[int(last) if last.isdigit() else last] = value
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
        return tmp_path / "mine.yaml"

    return change


@pytest.mark.long
@pytest.mark.parametrize("name", ["smoke", "demo", "paper", "own", "ct-ich", "tuning"])
def test_committed_studies_are_right(project, name):
    study = read_study(project / f"paper/studies/{name}.yaml")
    assert study.study == name and expand_runs(study)


@pytest.mark.many
@pytest.mark.parametrize("path, value, words", [
    ("seed", [0], "did you mean 'seeds'"),
    ("pretrain.step", 5, "pretrain.step: this key is unknown; did you mean 'steps'"),
    ("target.kase", 5, "did you mean 'cases'"),
    ("pretrain.learning_rate", "1e-3", "write 1.0e-3"),
    ("pretrain.steps", 0, "greater than 0"),
    ("pretrain.steps", 1.5, "pretrain.steps"),
    ("folds", 1, "folds"),
    ("source.layout", "dicom", "layout"),
    ("source.kind", "trauma", "'tbi' or 'asah'"),
    ("runs.3.method", "lora-cp", "did you mean"),
    ("runs.3.regions", ["decoder"], "did you mean 'decoding'"),
    ("runs.3.ranks", [8, 8], "stands in it twice"),
    ("runs.3.ranks", [0], "greater than 0"),
    ("network.levels", 0, "levels"),
    ("network.name", "resnet", "multi-view-unet"),
    ("study", "My Study", "study"),
    ("precision", "fp8", "fp32"),
    ("runs.3.learning_rate", "1e-2", "write 1.0e-3"),
    ("runs.3.learning_rate", {4: 0.01}, "names ranks 4, but not 8"),
    ("runs.3.learning_rate", [], "at least 1 item"),
    ("runs.3.learning_rate", [0.01, -1.0], "greater than 0"),
    ("runs.2.extras", True, "belong to adapters"),
    ("runs.3.adapter", {"dropuot": 0.1}, "dropuot"),
    ("pretrain.options", {"shedule": "cosine"}, "did you mean 'schedule'"),
    ("finetune.options", {"loss": "focal"}, "dice+ce"),
    ("runs.3.network", "unett", "does not stand under networks:, where there are: unet"),
    ("networks.unet.network.width", 0, "networks.unet.network: width"),
    ("networks.unet.pretrain.stepz", 3, "did you mean 'steps'"),
    ("networks.unet.pretrain.options", {"shedule": "cosine"}, "did you mean 'schedule'"),
    ("networks", {"My net": {}}, "networks"),
    ("runs.0.patients", [2], "not with none"),
    ("runs.0.ranks", [4], "runs.0.ranks: has no effect on none"),
    ("runs.0.steps", 5, "runs.0.steps: has no effect on none"),
    ("runs.1.learning_rate", 0.1, "runs.1.learning_rate: has no effect on norm-stats"),
    ("runs.1.regions", ["all"], "runs.1.regions: has no effect on norm-stats"),
    ("runs.2.alpha", 4.0, "runs.2.alpha: has no effect on fine-tuning"),
    ("pretrain.options", {"steps": 1}, "steps has a key of its own"),
    ("pretrain.options", {"precision": "bf16"}, "precision has a key of its own"),
    ("finetune.options", {"seed": 5}, "seed has a key of its own"),
    ("pretrain.options", {"warmup": 500}, "warmup"),
    ("pretrain.seed", 2**70, "less than 4294967296"),
    ("seeds", [2**32], "less than 4294967296"),
    ("target.cases", 10_001, "less than or equal to 10000"),
    ("tolerance_mm", 1e9, "less than or equal to 100"),
    ("runs.3.patients", [0], "greater than 0"),
    ("target", {"layout": "pairs", "path": "mine", "lables": "1=SAH"}, "did you mean 'labels'"),
    ("claims", {"margn": 0.1}, "did you mean 'margin'"),
    ("claims", {"score": "hd95"}, "score 'hd95' is unknown; did you mean 'hd95_mm'"),
    ("claims", {"strictly_low": 64}, "strictly_low (64) must be below over (32)"),
])
def test_mistakes_are_found_and_named(write, path, value, words):
    with pytest.raises(ValueError) as error:
        read_study(write(path, value))
    assert words in str(error.value)


@pytest.mark.long
@pytest.mark.parametrize("path, value, words", [
    ("folds", 50, "50 folds of 9 patients"),
    ("folds", {"method": "stratified", "count": 10}, "10 folds of 9 patients"),
    ("folds", {"train": ["asah-0000-s202", "x"], "test": ["asah-0001-s202"]}, "the target has no patient x"),
    ("folds", {"train": ["asah-0000-s202"], "test": ["asah-0000-s202"]}, "1 patient is in both"),
    ("runs.3.patients", [7], "patients: 7, but a fold trains on 6"),
    ("runs", [{"method": "cp-lora", "patients": [1], "learning_rate": [1e-3, 1e-2]}], "needs two patients with blood or more"),
    ("source", {"layout": "phantom", "kind": "asah", "cases": 3, "seed": 202}, "source and target: 3 patients are in both"),
    ("target.grid", [5, 5], "two even whole numbers"),
])
def test_patients_that_can_not_be_are_told_before_anything_runs(write, tmp_path, path, value, words):
    study = write(path, value)
    with pytest.raises(ValueError) as said:
        make_batch(study, tmp_path / "runs")
    assert words in str(said.value) and "mine.yaml" in str(said.value) and not (tmp_path / "runs").exists()


def test_every_mistake_is_said_at_once(write):
    write("pretrain.stepz", 1)
    with pytest.raises(ValueError) as error:
        read_study(write("folds", 1))
    assert "stepz" in str(error.value) and "folds" in str(error.value)


def test_a_mistyped_key_is_said_before_the_one_that_is_missing(write, tmp_path):
    content = yaml.safe_load(write("runz", [{"method": "none"}]).read_text(encoding="utf-8"))
    del content["runs"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError) as error:
        read_study(tmp_path / "mine.yaml")
    first, second = str(error.value).splitlines()[1:]
    assert "runz" in first and "did you mean 'runs'" in first and second.strip() == "runs: must be given"


@pytest.mark.long
@pytest.mark.parametrize("path, error, words", [
    ("$SAHLORA_NOWHERE/scans", ValueError, "target.path: the variable SAHLORA_NOWHERE is not set; set it, or write the folder in its place"),
    ("${SAHLORA_NOWHERE}", ValueError, "the variable SAHLORA_NOWHERE is not set"),
    ("/nowhere/scans", FileNotFoundError, "target.path: /nowhere/scans: no such folder"),
])
def test_a_folder_that_is_not_there_is_told_before_anything_runs(write, tmp_path, path, error, words):
    study = write("target", {"layout": "pairs", "path": path})
    with pytest.raises(error) as said:
        make_batch(study, tmp_path / "runs")
    assert words in str(said.value) and "mine.yaml" in str(said.value) and not (tmp_path / "runs").exists()


def test_an_unknown_study_lists_the_others(project):
    with pytest.raises(FileNotFoundError, match="ct-ich, demo, own, paper, smoke"):
        read_study(project / "paper/studies/smoek.yaml")


def test_expansion_is_the_product(write):
    study = read_study(write("runs", [{"method": "none"},
                                      {"method": "fine-tuning", "regions": ["all", "deep"]},
                                      {"method": "cp-lora", "regions": ["all", "deep"], "ranks": [1, 2], "steps": 7}]))
    runs = expand_runs(study)
    assert [run["id"] for run in runs] == ["none-s0", "fine-tuning-all-s0", "fine-tuning-deep-s0", "cp-lora-r1-all-s0",
                                           "cp-lora-r2-all-s0", "cp-lora-r1-deep-s0", "cp-lora-r2-deep-s0"]
    assert {run["steps"] for run in runs} == {study.finetune.steps, 7}


def test_an_ablation_stands_in_one_study_and_in_its_tables_as_rows_of_their_own(write):
    rates = {"method": "fine-tuning", "seeds": [0, 1], "learning_rate": 1e-3}
    rows = [{"method": "cp-lora"}, {"method": "cp-lora", "alpha": 16.0}, {"method": "cp-lora", "adapter": {"dropout": 0.5}},
            rates, {**rates, "seeds": [0], "learning_rate": 3e-4}, {"method": "scratch", "steps": 7}, {"method": "scratch"}]
    runs = expand_runs(read_study(write("runs", rows)))
    assert [run["id"] for run in runs] == [
        "cp-lora-r8-decoding-s0", "cp-lora-r8-decoding-alpha16-s0", "cp-lora-r8-decoding-dropout0.5-s0",
        "fine-tuning-decoding-lr0.001-s0", "fine-tuning-decoding-lr0.001-s1", "fine-tuning-decoding-lr0.0003-s0",
        "scratch-steps7-s0", "scratch-s0"]
    assert [run["run"].is_compared for run in runs] == [True, False, False, False, False, False, False, True]
    records = [{**run_record(run["run"]), "id": run["id"], "name": run["run"].strategy.name, "trainable": 100, "flags": []} for run in runs]
    results = {"runs": records, "pretrain": {"parameters": 1000}, "summaries": [], "patients": [
        {"run": run["id"], "method": run["method"], "rank": run["rank"], "region": run["run"].region, "extras": False, "patients": None,
         "seed": run["seed"], "role": "test", "patient": "p", "dice_soft": 0.5, "dice_hard": 0.5} for run in runs]}
    assert strategy_table(results).strategy.tolist() == [
        "CP-LoRA, rank 8", "CP-LoRA, rank 8, alpha 16", "CP-LoRA, rank 8, dropout 0.5", "Fine-tuning, decoding, learning rate 0.001",
        "Fine-tuning, decoding, learning rate 0.0003", "From scratch, steps 7", "From scratch"]
    with pytest.raises(ValueError, match="cp-lora-r8-decoding-s0 stands in it twice"):
        read_study(write("runs", [rows[0], rows[0]]))


DECLARED = 'method: str = "cp-lora"  # how\nrank: int = 8  # adapter rank\nrate: float = 1.0e-3  # rate\nsplit: dict = {}'


@pytest.mark.parametrize("injected, words", [
    ("rnak = 2", "did you mean 'rank'"),
    ("rank = '2'", "must be int"),
    ("rank = True", "must be int"),
    ("rate = 'fast'", "must be float"),
    ("split = [1]", "must be dict"),
    ("method = 3", "must be str"),
])
def test_injected_parameters_are_checked(injected, words):
    with pytest.raises(ValueError, match=words):
        check_parameters(["", DECLARED, f"# Parameters\n{injected}\n", "check_parameters(In)"])


def test_right_parameters_pass():
    cells = ["", DECLARED, "# Parameters\nrate = 1\nsplit = {'train': ['a']}\n", "check_parameters(In)"]
    assert check_parameters(cells) == {"method": "cp-lora", "rank": 8, "rate": 1, "split": {"train": ["a"]}}


@pytest.mark.long
def test_code_hashes_of_the_experiments_differ(project):
    paths = sorted((project / "nbs/experiments").glob("*.ipynb"))
    assert len({code_hash(path) for path in paths}) == len(paths) == 4


@pytest.mark.long
def test_a_stage_reaches_what_decides_its_result_and_nothing_else(project):
    "A better figure of the report or a better statistic costs no training; a bug mended in the loop reaches all that trained."
    modules = {}
    for path in sorted((project / "nbs/experiments").glob("*.ipynb")):
        cells = nbformat.read(path, 4).cells
        modules[path.stem[2:]] = set(reached("\n".join(cell.source for cell in cells if cell.cell_type == "code")))
    for stage, wanted, alien in (
        ("cohorts", {"phantom.bleeding", "cohorts.layouts", "study.experiment"},
         {"evaluation.claims", "evaluation.statistics", "training.loop", "study.schema", "report.page", "report.results", "report.figures", "study.batch"}),
        ("pretrain", {"training.loop", "cohorts.slices", "unet"},
         {"training.transfer", "evaluation.statistics", "evaluation.claims", "report.page", "report.figures", "study.schema"}),
        ("finetune", {"training.loop", "training.transfer", "adapters.cp_lora", "evaluation.scores"},
         {"evaluation.statistics", "evaluation.claims", "report.page", "report.results", "report.figures", "study.schema"}),
        ("report", {"evaluation.claims", "evaluation.statistics", "report.results", "report.figures"}, {"study.batch", "cli"}),
    ):
        assert {f"sahlora.{name}" for name in wanted} <= modules[stage], stage
        assert not {f"sahlora.{name}" for name in alien} & modules[stage], stage


class OwnRegions(Unet):
    "A network whose regions have names of their own."

    def __init__(self, levels=2, width=4):
        super().__init__(levels=levels, width=width)
        self.config = {"name": "own-regions", "levels": levels, "width": width}
        self.regions = {"front": self.regions["encoding"], "back": self.regions["decoding"]}


def test_strategies_of_the_whole_network_ask_for_no_region(write, monkeypatch):
    monkeypatch.setitem(NETWORKS, "own-regions", OwnRegions)
    write("network", {"name": "own-regions"})
    rows = [{"method": "none"}, {"method": "norm-stats"}, {"method": "scratch"}, {"method": "fine-tuning", "regions": ["back"]}]
    study = read_study(write("runs", rows))
    assert [run["run"].strategy.name for run in expand_runs(study)] == ["none", "norm-stats", "scratch", "fine-tuning-back"]
    for row in ({"method": "fine-tuning"}, {"method": "decoding"}):
        with pytest.raises(ValueError, match="region.*'decoding' is unknown"):
            read_study(write("runs", [row]))


MINE = """from sahlora.evaluation.claims import Claim, Rule, register_claim
from sahlora.evaluation.scores import Metric, register_metric
register_metric(Metric("recall", "", "higher", "share found", lambda one: float(one.hard[one.t].mean())))
register_claim(Rule(6, "It runs.", lambda evidence, plan: Claim(6, "It runs.", "supported", "a look")))
"""


@pytest.mark.long
def test_extensions_of_a_study_are_loaded_checked_and_counted(write, tmp_path, project):
    (tmp_path / "mine.py").write_text(MINE)
    write("extensions", ["mine.py"])
    try:
        study = read_study(write("claims", {"score": "recall"}))
        assert study.extensions == [str((tmp_path / "mine.py").resolve())] and list(CLAIMS)[-1] == 6 and "recall" in METRICS
    finally:
        METRICS.pop("recall", None)
        CLAIMS.pop(6, None)
    assert load_extensions(study.extensions) and "recall" not in METRICS, "a file runs once in a process"
    notebook = project / "nbs/experiments/1_cohorts.ipynb"
    plain, own = code_hash(notebook), code_hash(notebook, study.extensions)
    (tmp_path / "mine.py").write_text(MINE + "# a remark")
    assert plain != own == code_hash(notebook, study.extensions)
    (tmp_path / "mine.py").write_text(MINE + "x = 1")
    assert code_hash(notebook, study.extensions) != own
    with pytest.raises(FileNotFoundError, match="extensions: .*nowhere.py: no such file"):
        read_study(write("extensions", ["nowhere.py"]))


@pytest.mark.long
def test_the_versions_of_libraries_are_counted(project, monkeypatch):
    notebook = project / "nbs/experiments/2_pretrain.ipynb"
    before = code_hash(notebook)
    monkeypatch.setattr(experiment, "package_version", lambda name: "unknown" if name == "torch" else "1")
    assert code_hash(notebook) != before


def test_rates_per_rank_candidates_and_regions_by_name(write):
    write("runs.0", {"method": "deep"})
    write("runs.1", {"method": "scratch", "learning_rate": [0.001, 0.01]})
    write("runs.3", {"method": "norm-stats"})
    study = read_study(write("runs.2", {"method": "cp-lora", "ranks": [2, 8], "learning_rate": {2: 0.02, 8: 0.01}, "extras": True}))
    runs = expand_runs(study)
    assert [run["id"] for run in runs] == ["fine-tuning-deep-s0", "scratch-s0", "cp-lora-r2-decoding-extras-s0", "cp-lora-r8-decoding-extras-s0",
                                        "norm-stats-s0", "unet-cp-lora-r8-decoding-s0"]
    assert [strategy_of(run).learning_rate for run in runs[:4]] == [0.001, (0.001, 0.01), 0.02, 0.01]
    assert strategy_of(runs[2]).alpha is None and strategy_of({**runs[2], "alpha": 16.0}).alpha == 16
    with pytest.raises(ValueError, match="runs.0.regions: has no effect on deep"):
        read_study(write("runs.0", {"method": "deep", "regions": ["all"]}))


def test_the_table_of_learning_rates_shows_the_best_and_what_failed():
    def run(tried):
        return {"name": "cp-lora-r8-decoding", "method": "cp-lora", "rank": 8, "region": "decoding", "flags": [], "seed": 0, "tried": tried}

    table = rate_table({"runs": [run([{}]), run([{"0.001": 0.3, "0.01": 0.5}, {"0.001": 0.4, "0.01": 0.4}]), run([{"0.01": 0.2, "1": None}])]})
    assert table["0.001"].tolist()[0] == "0.350" and table["0.01"].tolist() == ["0.450", "0.200"]
    assert table["best"].tolist() == ["0.01", "0.01"] and table["1"].tolist()[1] == "–" and len(table) == 2


def test_fewer_patients_another_network_and_seeds_of_its_own(write):
    write("networks.plain", {"network": {"name": "unet", "levels": 2, "width": 4}, "pretrain": {"steps": 3}})
    write("runs.0", {"method": "scratch", "patients": [5, 10], "seeds": [3, 4]})
    study = read_study(write("runs.3", {"method": "none", "network": "plain"}))
    runs = {run["id"]: run for run in expand_runs(study)}
    assert list(runs)[:4] == ["scratch-n5-s3", "scratch-n10-s3", "scratch-n5-s4", "scratch-n10-s4"] and "plain-none-s0" in runs
    assert strategy_of(runs["scratch-n5-s4"]).patients == 5 and strategy_of(runs["plain-none-s0"]).patients is None
    assert network_of(study, "plain")["width"] == 4 and network_of(study, "") == study.network
    assert study.networks["plain"].pretrain.steps == 3 and study.pretrain.steps == 500


@pytest.mark.long
def test_a_cohort_of_ones_own_is_imported_by_the_study(tmp_path):
    cohort = make_cohort({"layout": "phantom", "kind": "asah", "cases": 3, "seed": 0, "grid": [32, 40]}, tmp_path / "made")
    for role in ("images", "labels"):
        (tmp_path / "mine" / role).mkdir(parents=True)
    for row in cohort.table.itertuples():
        shutil.copy(tmp_path / "made" / row.image, tmp_path / f"mine/images/{row.case}.nii.gz")
        shutil.copy(tmp_path / "made" / row.label, tmp_path / f"mine/labels/{row.case}.nii.gz")
    mine = make_cohort({"layout": "pairs", "path": str(tmp_path / "mine")}, tmp_path / "cohort")
    assert mine.voxels == cohort.voxels and mine.table.blood_ml.tolist() == pytest.approx(cohort.table.blood_ml.tolist(), rel=1e-4)
    (tmp_path / f"mine/labels/{cohort.table.case[1]}.nii.gz").write_bytes(b"not a scan")
    with pytest.raises(ValueError, match=f"(?s)1 scans can not be used.*skip_bad.*{cohort.table.case[1]}"):
        make_cohort({"layout": "pairs", "path": str(tmp_path / "mine")}, tmp_path / "cohort2")
    some = make_cohort({"layout": "pairs", "path": str(tmp_path / "mine"), "skip_bad": True}, tmp_path / "cohort3")
    assert some.table.case.tolist() == [cohort.table.case[0], cohort.table.case[2]]


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_study_imports_every_layout_that_there_is(write, tmp_path, layout):
    section = {"layout": layout, "path": "$MY_SCANS", "blood": "EDH" if LAYOUTS[layout].codes and len(LAYOUTS[layout].codes) > 1 else None}
    study = read_study(write("target", section))
    assert study.target.layout == layout and study.target.options.keys() == {key for key in ("blood",) if section[key]}
    own = {"labels": "1=EDH", "rater": "union", "size": 64}
    for option, value in own.items():
        if option in LAYOUTS[layout].option_names:
            assert read_study(write("target", {**section, option: value})).target.options[option] == value
        else:
            with pytest.raises(ValueError, match=f"mine.yaml: target: {option}: has no effect on the layout {layout}; its options are: blood, "):
                read_study(write("target", {**section, option: value}))
    with pytest.raises(FileNotFoundError, match="target.path: /nowhere: no such folder"):
        make_batch(write("target", {**section, "path": "/nowhere"}), tmp_path / "runs")


@pytest.mark.parametrize("section, words", [
    ({"layout": "bhds", "path": "x"}, "target.layout: 'bhds' is unknown; did you mean 'bhsd'? There are: phantom, folder, pairs, ct-ich"),
    ({"path": "x"}, "target.layout: "),
    ({"layout": "bhsd"}, "target.path: must be given"),
    ({"layout": "bhsd", "path": "x", "blod": "SAH"}, "target.blod: this key is unknown; did you mean 'blood'? There are: layout, path"),
    ({"layout": "bhsd", "path": "x", "blood": "SHA"}, "target: blood 'SHA': not one of the labels EDH, IPH, IVH, SAH, SDH"),
    ({"layout": "mbh-seg", "path": "x", "rater": "most"}, "rater 'most': there are majority, union, one"),
    ({"layout": "pairs", "path": "x", "labels": "1:EDH"}, "write code=name"),
    ({"layout": "pairs", "path": "x", "labels": "1=edema,2=SAH"}, "Say which of edema, SAH are (blood)"),
    ({"layout": "instance", "path": "x", "window": [80, 0]}, "window needs low < high"),
    ({"layout": "instance", "path": "x", "window": [80]}, "target.window: "),
    ({"layout": "instance", "path": "x", "spacing": [1, 1, -1]}, "greater than 0"),
    ({"layout": "instance", "path": "x", "orientation": "XYZ"}, "orientation 'XYZ' is none"),
    ({"layout": "ct-ich", "path": "x", "size": 3}, "size"),
    ({"layout": "bhsd", "path": "x", "patients": ["a"]}, "target.patients"),
    ({"layout": "ct-ich", "path": "x", "patients": []}, "target.patients"),
])
def test_a_wrong_import_is_told_when_the_study_is_read(write, section, words):
    with pytest.raises(ValueError) as error:
        read_study(write("target", section))
    assert words in str(error.value)


def store_heads(tmp_path, image, label):
    "Two phantoms, stored with names of our choice."
    cohort = make_cohort({"layout": "phantom", "kind": "asah", "cases": 2, "seed": 0, "grid": [32, 40]}, tmp_path / "made")
    for number, row in enumerate(cohort.table.itertuples(), 1):
        for name, file in ((image, row.image), (label, row.label)):
            path = tmp_path / "mine" / name.format(n=number)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "made" / file, path)
    return cohort


@pytest.mark.long
def test_a_public_layout_is_imported_by_the_study(write, tmp_path):
    made = store_heads(tmp_path, "train_2/data/00{n}.nii.gz", "train_2/label/00{n}.nii.gz")
    study = read_study(write("target", {"layout": "instance", "path": str(tmp_path / "mine"), "site": "here"}))
    cohort = make_cohort(study.target.model_dump(), tmp_path / "cohort")
    assert cohort.table.case.tolist() == ["instance-001", "instance-002"] and set(cohort.table.site) == {"here"}
    assert list(cohort.voxels.values()) == list(made.voxels.values())
    assert (batch.scans_of(study.target), batch.grid_of(study.target)) == (2, (32, 40))


HOSPITAL = """
from sahlora.cohorts.layouts import BLOOD, Layout, register_layout

files = ("NAME/ct.nii", "NAME/blood.nii")
register_layout(Layout("hospital", files, "scans of our hospital", files=(files,), codes=BLOOD))
"""


@pytest.mark.long
def test_a_layout_of_an_extension_is_imported_by_the_study(write, tmp_path):
    made = store_heads(tmp_path, "{n}/ct.nii.gz", "{n}/blood.nii.gz")
    (tmp_path / "hospital.py").write_text(HOSPITAL)
    section = {"layout": "hospital", "path": str(tmp_path / "mine")}
    with pytest.raises(ValueError, match="target.layout: 'hospital' is unknown"):
        read_study(write("target", section))
    write("extensions", ["hospital.py"])
    try:
        study = read_study(write("target", section))
        cohort = make_cohort(study.target, tmp_path / "cohort")
        assert cohort.table.case.tolist() == ["1", "2"] and list(cohort.voxels.values()) == list(made.voxels.values())
        with pytest.raises(ValueError, match="target: labels: has no effect on the layout hospital"):
            read_study(write("target", {**section, "labels": "1=EDH"}))
    finally:
        LAYOUTS.pop("hospital", None)


def test_what_a_study_costs_is_added_up(project):
    "Each job by hand, from invented seconds: a cohort's scans, a base's steps, a run's folds of steps and scans."
    smoke = read_study(project / "paper/studies/smoke.yaml")
    parts = trained_parts(smoke)
    costs = Costs(start=10.0, case=1.0, scan=2.0, peak_mib=500.0, steps={part: 0.5 for part in parts})
    scans, folds = smoke.target.cases, smoke.folds
    runs = {run["id"]: run for run in expand_runs(smoke)}
    assert job_seconds(smoke, "cohorts", "", costs) == 10 + (smoke.source.cases + scans) * 1.0
    assert job_seconds(smoke, "pretrain", "", costs) == 10 + smoke.pretrain.steps * 0.5 + 5 * 2.0
    assert job_seconds(smoke, "finetune", "none-s0", costs) == 10 + scans * 2.0
    assert job_seconds(smoke, "finetune", "norm-stats-s0", costs) == 10 + folds * scans * 2.0
    assert job_seconds(smoke, "finetune", "cp-lora-r8-decoding-s0", costs) == 10 + scans * 2.0 + folds * runs["cp-lora-r8-decoding-s0"]["steps"] * 0.5
    assert job_seconds(smoke, "pdf", "", costs) == 10
    jobs = [("cohorts", ""), ("finetune", "none-s0"), ("finetune", "norm-stats-s0")]
    told, cohorts, none, norms = plan_text(smoke, jobs, costs, cores=2), *(job_seconds(smoke, *job, costs) for job in jobs)
    assert f"About {(cohorts + max(none, norms)) / 60:.1f} min on 2 cores (2 jobs at a time" in told and "3 jobs to do" in told, told
    assert f"{(cohorts + none + norms) / 3600:.2f} core hours" in told


@pytest.mark.long
def test_the_plan_of_a_study_asks_snakemake_and_this_machine(project, tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "pending", lambda asked: [("cohorts", ""), ("finetune", "none-s0")])
    monkeypatch.setattr(batch, "measure", lambda study, slots: Costs(1.0, 1.0, 1.0, 1.0, {part: 1.0 for part in trained_parts(study)}))
    made = make_batch(project / "paper/studies/smoke.yaml", tmp_path, cores=2)
    assert "smoke: 2 jobs to do" in batch.plan_study(made)
    monkeypatch.setattr(batch, "pending", lambda asked: [])
    assert batch.plan_study(made) == "smoke: everything is done; nothing would run"
