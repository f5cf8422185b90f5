"""The scaffold keeps its promises: one place for each setting, pins that agree, an export that is checked."""
import ast
import graphlib
import json
import re
import shutil
import subprocess
import sysconfig
import tomllib
from configparser import ConfigParser
from importlib import metadata

import pytest
import render_environment
import render_readme
from check_export import check
from packaging.specifiers import SpecifierSet

from sahlora.study.experiment import imports


REQUIREMENTS = ("requirements", "dicom_requirements", "tensorboard_requirements", "slurm_requirements", "dev_requirements",
                "docs_requirements", "bench_requirements", "oracle_requirements")


@pytest.fixture(scope="module")
def settings(project):
    config = ConfigParser(interpolation=None)
    config.read(project / "settings.ini")
    return config["DEFAULT"]


@pytest.fixture(scope="module")
def pyproject(project):
    return tomllib.loads((project / "pyproject.toml").read_text())


def installed():
    "Distributions of this environment; not what setuptools carries inside and puts on the path when a library asks for it."
    return metadata.distributions(path=[sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_pyproject_mirrors_settings(settings, pyproject):
    table, nbdev = pyproject["project"], pyproject["tool"]["nbdev"]
    assert table["name"] == settings["lib_name"]
    assert table["requires-python"] == f">={settings['min_python']}"
    assert table["urls"]["Repository"] == settings["git_url"]
    assert [f"{name}={target}" for name, target in table["scripts"].items()] == settings["console_scripts"].split()
    for key in ("lib_path", "nbs_path", "doc_path", "tst_flags", "skip_procs"):
        assert nbdev[key] == settings[key], key
    assert nbdev["allowed_cell_metadata_keys"] == settings["allowed_cell_metadata_keys"].split()
    for key in ("clean_ids", "put_version_in_init", "update_pyproject"):
        assert str(nbdev[key]) == settings[key], key
    assert settings["doc_host"] == "", "with a host, the two nbdev generations export different docstrings"


def test_installed_metadata_is_what_settings_say(settings):
    assert metadata.version("sahlora") == settings["version"]
    asked = {normal(re.split(r"[ ;<>=]", line)[0]) for line in metadata.requires("sahlora")}
    assert asked == {normal(name) for key in REQUIREMENTS for name in settings[key].split()}


def test_versions_are_pinned_once(project, settings):
    for key in REQUIREMENTS:
        assert not re.search(r"[=<>~]", settings[key]), f"{key}: versions belong into constraints.txt"
    assert (project / "environment.yml").read_text() == render_environment.render(), "run `make pins`"


def test_constraints_are_what_is_installed():
    pins = {normal(name): version for name, version in render_environment.pins().items()}
    assert pins["torch"] == "2.13.0"
    versions = {normal(dist.name): dist.version for dist in installed()}
    tools = {"sahlora", "pip", "setuptools", "wheel"}
    wrong = {name: (version, pins.get(name)) for name, version in versions.items()
             if name not in tools and pins.get(name) != version.partition("+")[0]}
    assert not wrong, f"installed and pinned versions differ: {wrong}"


@pytest.mark.parametrize("python", ["3.11.0", "3.12.0", "3.13.0"])
def test_every_pin_is_for_every_python_we_name(python):
    pins = {normal(name) for name in render_environment.pins()}
    asked = {normal(dist.name): dist.metadata.get("Requires-Python") or "" for dist in installed()}
    assert len(pins & set(asked)) > 150
    assert not {name: words for name, words in asked.items() if name in pins and not SpecifierSet(words).contains(python)}


def test_readme_is_rendered_from_index(project):
    assert (project / "README.md").read_text() == render_readme.render(), "run `make readme`"


def test_citation_names_the_version(project, settings):
    assert f"version: {settings['version']}\n" in (project / "CITATION.cff").read_text()


def test_notebooks_hold_no_error_and_no_long_cell(project):
    for path in sorted((project / "nbs").rglob("*.ipynb")):
        for i, cell in enumerate(json.loads(path.read_text())["cells"]):
            where = f"{path.name} cell {i}"
            if cell["cell_type"] == "code":
                lines = [line for line in "".join(cell["source"]).splitlines() if line.strip() and not line.startswith("#|")]
                assert len(lines) <= 30, f"{where}: {len(lines)} lines"
                assert all(output["output_type"] != "error" for output in cell["outputs"]), where


def shown_errors(source):
    "The try statements of a cell that show an error."
    lines = [line for line in source.splitlines() if not line.startswith(("%", "!", "#|"))]
    tries = [node for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, ast.Try)]
    return [node for node in tries if any(getattr(call.func, "id", "") == "print" for handler in node.handlers
                                          for call in ast.walk(handler) if isinstance(call, ast.Call))]


def test_an_error_that_a_notebook_shows_must_come(project):
    found = 0
    for path in sorted((project / "nbs").rglob("*.ipynb")):
        for i, cell in enumerate(json.loads(path.read_text())["cells"]):
            source = "".join(cell["source"])
            found += len(re.findall(r"^refused\(", source, re.M))  # which raises by itself where no error came
            for node in shown_errors(source) if cell["cell_type"] == "code" and not source.startswith("#| export") else ():
                found += 1
                assert node.orelse or any(isinstance(one, ast.Raise) for one in ast.walk(node)), f"{path.name} cell {i}: raise where no error came"
    assert found > 30


@pytest.fixture(scope="module")
def clone(project, tmp_path_factory):
    "A clone of the last commit's notebooks and package, to be tampered with."
    folder = tmp_path_factory.mktemp("clone") / "project"
    for name in ("nbs", "sahlora"):
        shutil.copytree(project / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(project / name, folder)
    git(folder, "init", "--quiet")
    commit(folder)
    return folder


def git(folder, *arguments):
    return subprocess.run(["git", "-c", "user.name=test", "-c", "user.email=test@example.org", *arguments], cwd=folder,
                          check=True, capture_output=True, text=True).stdout


def commit(folder):
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "state")


@pytest.fixture
def pristine(clone):
    yield clone
    git(clone, "reset", "--hard", "--quiet")
    git(clone, "clean", "-fdq")


@pytest.mark.long
def test_an_untouched_clone_agrees(pristine):
    assert check(pristine) == []


@pytest.mark.long
def test_a_changed_character_is_found(pristine):
    module = pristine / "sahlora/ct/core.py"
    module.write_text(module.read_text().replace("1000", "1001", 1))
    assert any("sahlora/ct/core.py: differs" in line for line in check(pristine))


@pytest.mark.long
def test_a_stale_module_is_found(pristine):
    (pristine / "sahlora/old.py").write_text("# AUTOGENERATED! DO NOT EDIT! File to edit: ../nbs/99_old.ipynb.\n")
    found = check(pristine)
    assert any("no notebook exports it" in line for line in found) and any("not tracked" in line for line in found)


@pytest.mark.long
def test_an_uncommitted_export_is_found(pristine):
    "The notebook is committed with a new cell, its module only lies in the folder."
    path = pristine / "nbs/common/files.ipynb"
    notebook = json.loads(path.read_text())
    notebook["cells"].append({"cell_type": "code", "execution_count": None, "id": "added", "metadata": {}, "outputs": [],
                              "source": ["#| export\n", "ADDED = 1"]})
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
    git(pristine, "commit", "--quiet", "--message", "notebook only", "nbs")
    try:
        subprocess.run(["nbdev-export"], cwd=pristine, check=True, capture_output=True)
        assert any("last commit: sahlora/common/files.py: differs" in line for line in check(pristine))
    finally:
        git(pristine, "reset", "--hard", "--quiet", "HEAD~1")


@pytest.mark.long
def test_an_unclean_notebook_is_found(pristine):
    path = pristine / "nbs/common/files.ipynb"
    notebook = json.loads(path.read_text())
    notebook["cells"][2]["metadata"]["scrolled"] = True
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
    assert any("nbs/common/files.ipynb: differs" in line for line in check(pristine))


def test_two_notebooks_never_export_one_module(project):
    "nbdev lets the second overwrite the first in silence."
    names = []
    for path in (project / "nbs").rglob("*.ipynb"):
        names += re.findall(r"#\| default_exp (\S+)", "\n".join(
            "".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]))
    assert len(names) == len(set(names)) > 40


ORDER = ("common", "ct", "phantom", "cohorts", "unet", "adapters", "evaluation", "training", "prediction", "study", "report", "cli")


def test_modules_import_from_their_own_folder_and_from_those_before_it(project):
    "The folders are the arrows of the data; no circle, and no import inside a function that hides one."
    graph = {}
    for path in (project / "sahlora").rglob("*.py"):
        name = ".".join(path.relative_to(project).with_suffix("").parts).removesuffix(".__init__")
        if name in ("sahlora", "sahlora._modidx"):
            continue
        tree = ast.parse(path.read_text())
        graph[name] = {other for other in imports(tree, name if path.name == "__init__.py" else name.rpartition(".")[0])
                       if other.startswith("sahlora.") and other.split(".")[1] in ORDER}
        late = {other for other in graph[name] if ORDER.index(other.split(".")[1]) > ORDER.index(name.split(".")[1])}
        assert not late, f"{name} imports {late}"
    modules = {name: {next(n for n in (other, other.rpartition(".")[0]) if n in graph) for other in others} - {name}
               for name, others in graph.items()}
    assert len(list(graphlib.TopologicalSorter(modules).static_order())) == len(graph) > 40


def test_import_sahlora_is_light(command):
    done = command("python", "-X", "importtime", "-c", "import sahlora")
    loaded = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert not loaded & {"torch", "numpy", "monai", "nibabel", "matplotlib"}
