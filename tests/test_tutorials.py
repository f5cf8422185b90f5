"""Tutorials: how they read, that what they keep is small and clean, and that a method of one's own reaches every process."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from sahlora.common.files import read_json
from sahlora.study.experiment import code_hash, load_extensions, project_path

FOLDER = project_path("nbs/tutorials")
TUTORIALS = sorted(FOLDER.glob("*.ipynb"))
METHOD = """from sahlora.adapters import Delta, register


class RowLoRA(Delta):
    name, zero = "row-lora", "B"

    def shapes(self, view, rank):
        return {"A": (rank, *view[1:]), "B": (view[0], rank)}

    def build(self, f, view):
        return (f["B"] @ f["A"].flatten(1)).view(view)


register(RowLoRA())
"""


def cells(path, kind):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == kind]


def test_the_five_tutorials_are_there():
    assert {"own_scans", "monai_networks", "new_method", "clusters", "results"} <= {path.stem for path in TUTORIALS}


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_reads_as_the_others_do(path):
    nb = nbformat.read(path, 4)
    assert re.fullmatch(r"# .+\n\n> [^\\\n]+", nb.cells[0].source), "a title and a subtitle first"
    assert nb.cells[1].cell_type == "markdown" and len(nb.cells[1].source.split()) > 30, "then what and why"
    code = cells(path, "code")
    assert max(sum(bool(line.strip()) for line in cell.source.splitlines()) for cell in code) <= 30
    assert max(len(line) for cell in nb.cells for line in cell.source.splitlines() if "|" not in line) <= 150
    assert sum(cell.source.count("assert ") for cell in code) >= (3 if path.stem == "clusters" else 5)
    assert sum("%%" in cell.source for cell in code) == 0, "no magics: the tests run cells without Jupyter"
    for cell in code:
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(cell.source).body}
        assert len(kinds) <= 1, "imports stand in cells of their own"


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_keeps_its_outputs_small_and_clean(path):
    outputs = [output for cell in cells(path, "code") for output in cell.outputs]
    assert outputs and not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    assert path.stat().st_size < 700_000
    shown = [str(value) for output in outputs for kind, value in {**output.get("data", {}), "text": output.get("text", "")}.items()
             if not kind.startswith("image")]
    assert not any(re.search(r"/(tmp|root|home|Users|work)/", text) for text in shown), "no path of the machine it ran on"
    assert not any("widget-view" in kind for output in outputs for kind in output.get("data", {})), "still pictures in what is kept"
    assert any("image/png" in output.get("data", {}) for output in outputs), "a picture"


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    text = "\n".join(cell.source for cell in cells(path, "markdown"))
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("http") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_commands_exist(path, command):
    "Every `sahlora ...` of a shell block names a command and options that there are."
    text = "\n".join(cell.source for cell in cells(path, "markdown"))
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines() if line.startswith("sahlora ")]
    for words in map(str.split, lines):
        name = words[1:3] if words[1] in ("cohort", "study", "report", "models") else words[1:2]
        shown = command(str(Path(sys.executable).with_name("sahlora")), *name, "--help", COLUMNS="200")
        assert shown.returncode == 0, name
        for option in (word for word in words if word.startswith("--")):
            assert option in shown.stdout, f"{' '.join(name)} {option}"


def ask(code, cwd=None):
    "What Python prints in a process of its own."
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)


def study_with(folder, extensions):
    "A small study of a method of one's own."
    study = yaml.safe_load(project_path("paper/studies/smoke.yaml").read_text())
    cohort = {"layout": "phantom", "cases": 4, "grid": [32, 40]}
    study |= {"study": "own-method", "networks": {}, "folds": 2, "source": cohort | {"kind": "tbi", "seed": 1}, "extensions": extensions,
              "target": cohort | {"kind": "asah", "seed": 2}, "runs": [{"method": "none"}, {"method": "row-lora", "ranks": [2]}]}
    study["pretrain"]["steps"] = study["finetune"]["steps"] = 10
    (folder / "own-method.yaml").write_text(yaml.safe_dump(study))
    return folder / "own-method.yaml"


@pytest.mark.long
def test_a_method_of_ones_own_reaches_whatever_reads_the_study(tmp_path):
    (tmp_path / "row.py").write_text(METHOD)
    code = "from sahlora.study.schema import *; print(*[run['id'] for run in expand_runs(read_study({!r}))])"
    done = ask(code.format(str(study_with(tmp_path, ["row.py"]))), "/")
    assert done.returncode == 0 and "row-lora-r2-decoding-s0" in done.stdout, done.stderr
    done = ask(code.format(str(study_with(tmp_path, []))))
    assert done.returncode and "'row-lora' is unknown" in done.stderr


@pytest.mark.parametrize("name, words", [("nowhere.py", "nowhere.py: no such file"), ("row.txt", "row.txt: not a file of Python; its name must end in .py")])
def test_a_wrong_file_is_named(tmp_path, name, words):
    (tmp_path / "row.txt").write_text(METHOD)
    with pytest.raises((FileNotFoundError, ValueError), match=f"extensions: .*{words}"):
        load_extensions([tmp_path / name])


@pytest.mark.long
def test_a_change_of_the_method_makes_runs_stale(tmp_path):
    notebook, file = project_path("nbs/experiments/3_finetune.ipynb"), tmp_path / "row.py"
    plain = code_hash(notebook)
    file.write_text(METHOD)
    mine = code_hash(notebook, [file])
    file.write_text(METHOD + "# a remark\n")
    assert code_hash(notebook, [file]) == mine != plain
    file.write_text(METHOD.replace("f[\"B\"] @", "-f[\"B\"] @"))
    assert code_hash(notebook, [file]) not in (mine, plain)


@pytest.mark.slow
def test_a_study_with_a_method_of_ones_own(tmp_path, command):
    "The whole batch, in its own processes: cohorts, base, runs, report, with the method in tables and results."
    (tmp_path / "row.py").write_text(METHOD)
    done = command(str(Path(sys.executable).with_name("sahlora")), "study", "run", str(study_with(tmp_path, ["row.py"])), "--cores", "2",
                   "--runs", str(tmp_path / "runs"))
    assert done.returncode == 0, done.stdout + done.stderr
    results = read_json(next(tmp_path.glob("runs/**/results.json")))
    assert {run["method"] for run in results["runs"]} == {"none", "row-lora"} and not results["failed"]
