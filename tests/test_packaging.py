"""The package as others get it: a wheel built from the source distribution, with all it needs, in an environment of its own."""
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

SOURCES = ("settings.ini", "constraints.txt", "CITATION.cff", "CHANGELOG.md", "README.md", "LICENSE", "setup.py", "pyproject.toml",
           "MANIFEST.in")
QUESTION = ("import sahlora, importlib.resources as r; print(sahlora.__version__); "
            "assert (r.files('sahlora') / 'py.typed').is_file(); assert 'site-packages' in sahlora.__file__, sahlora.__file__")


@pytest.fixture(scope="module")
def built(project, tmp_path_factory):
    "The folder with sdist and wheel; the wheel is built from the sdist, so that nothing is missing there."
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "dist"))
    shutil.copytree(project / "sahlora", source / "sahlora", ignore=shutil.ignore_patterns("__pycache__"))
    for name in SOURCES:
        shutil.copy(project / name, source)
    done = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "--outdir", out, source],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Package would be ignored" not in done.stdout + done.stderr, "setuptools must know every folder of the package"
    return out


def test_the_wheel_holds_the_package_and_its_data(built, project):
    wheel = zipfile.ZipFile(next(built.glob("*.whl")))
    packed = {name for name in wheel.namelist() if name.startswith("sahlora/")}
    here = {path.relative_to(project).as_posix() for path in (project / "sahlora").rglob("*")
            if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")}
    assert packed == here and "sahlora/py.typed" in packed
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())
    assert not any(name.startswith(("tests", "nbs", "benchmarks")) for name in wheel.namelist())


def test_the_wheel_says_what_settings_say(built, project):
    wheel = zipfile.ZipFile(next(built.glob("*.whl")))
    metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("METADATA"))).decode()
    for line in ("Name: sahlora", "Requires-Python: >=3.11", "License: Apache-2.0"):
        assert line in metadata.splitlines()
    extras = {line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Provides-Extra")}
    assert {"dev", "docs", "dicom", "bench"} <= extras
    assert "sahlora = sahlora.cli:app" in wheel.read(next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))).decode()


def test_the_source_distribution_holds_the_settings(built):
    names = {name.partition("/")[2] for name in tarfile.open(next(built.glob("*.tar.gz"))).getnames()}
    assert {"settings.ini", "constraints.txt", "setup.py", "sahlora/py.typed", "LICENSE"} <= names


def runs(python: str) -> bool:
    try:
        return subprocess.run([python, "-c", "import venv, ensurepip"], capture_output=True).returncode == 0
    except OSError:
        return False


def pythons() -> dict[str, str]:
    "minor version -> an interpreter of it that is here."
    found = {f"3.{sys.version_info.minor}": sys.executable}
    for minor in (11, 12, 13):
        homes = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/3.{minor}.*/bin/python")
        for candidate in (*map(str, homes), shutil.which(f"python3.{minor}")):
            if candidate and runs(candidate):
                found.setdefault(f"3.{minor}", candidate)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_a_clean_environment(built, project, tmp_path, version):
    "All requirements can be had for this Python; the import is light, and the command runs with what its first lines need."
    if version not in pythons():
        pytest.skip(f"there is no Python {version} here")
    wheel = next(built.glob("*.whl"))
    subprocess.run([pythons()[version], "-m", "venv", tmp_path / "venv"], check=True)
    pip = [tmp_path / "venv/bin/python", "-m", "pip", "--disable-pip-version-check", "--quiet"]
    constraints = ["--constraint", project / "constraints.txt"]
    found = subprocess.run([*pip, "install", "--dry-run", *constraints, f"{wheel}[dicom]"], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    subprocess.run([*pip, "install", *constraints, "--no-deps", wheel], check=True)
    subprocess.run([*pip, "install", *constraints, "typer", "pydantic", "pyyaml"], check=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    for question in ([tmp_path / "venv/bin/python", "-c", QUESTION], [tmp_path / "venv/bin/sahlora", "--version"]):
        done = subprocess.run(question, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.strip() == "0.2.0.dev0", done.stderr
