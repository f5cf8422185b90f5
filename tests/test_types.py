"""Style and types of the exported modules and of the tests, as pyproject.toml asks for them."""
import subprocess
import sys
import tomllib

import pytest


def run(*arguments, cwd):
    return subprocess.run([sys.executable, "-m", *arguments], cwd=cwd, capture_output=True, text=True)


def test_ruff_finds_nothing(project):
    done = run("ruff", "check", "--no-cache", "sahlora", "tests", "benchmarks", "setup.py", cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr


def test_types_agree(project, tmp_path):
    done = run("mypy", "--cache-dir", str(tmp_path), cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("line, code", [("x: int = 'text'", "assignment"), ("math.square(2)", "attr-defined"), ("read_json()", "call-arg")])
def test_the_type_check_finds_a_mistake(project, tmp_path, line, code):
    (tmp_path / "wrong.py").write_text(f"import math\nfrom sahlora.files import read_json\n{line}\n")
    done = run("mypy", "--config-file", "pyproject.toml", "--cache-dir", str(tmp_path), str(tmp_path / "wrong.py"), cwd=project)
    assert done.returncode == 1 and f"[{code}]" in done.stdout, done.stdout


def test_modules_without_a_full_check_are_still_there(project):
    overrides = tomllib.loads((project / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    named = [name for override in overrides for name in override["module"] if name.startswith("sahlora.")]
    for name in named:
        stem = project.joinpath(*name.split("."))
        assert stem.with_suffix(".py").is_file() or (stem / "__init__.py").is_file(), f"{name}: gone; take it off the list in pyproject.toml"
