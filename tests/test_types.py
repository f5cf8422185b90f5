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


@pytest.mark.long
def test_types_agree(project, tmp_path):
    done = run("mypy", "--cache-dir", str(tmp_path), cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
@pytest.mark.parametrize("line, code", [
    ("x: int = 'text'", "assignment"), ("math.square(2)", "attr-defined"), ("read_json()", "call-arg"),
    ("from sahlora.ct import HeadCT\nHeadCT.volume_ml()", "call-arg"),  # methods that @patch adds are checked too
    ("from sahlora.ct import HeadCT\nHeadCT.millilitres", "attr-defined")])
def test_the_type_check_finds_a_mistake(project, tmp_path, line, code):
    (tmp_path / "wrong.py").write_text(f"import math\nfrom sahlora.common.files import read_json\n{line}\n")
    done = run("mypy", "--config-file", "pyproject.toml", "--cache-dir", str(tmp_path), str(tmp_path / "wrong.py"), cwd=project)
    assert done.returncode == 1 and f"[{code}]" in done.stdout, done.stdout


def test_no_module_is_left_out(project):
    "Every kind of error counts in every module but for `override`, whose reason stands in pyproject.toml."
    settings = tomllib.loads((project / "pyproject.toml").read_text())["tool"]["mypy"]
    assert settings["disable_error_code"] == ["override"] and not settings.get("exclude")
    assert not [name for override in settings["overrides"] for name in override["module"] if name.startswith("sahlora")]
    ignored = [line for path in (project / "sahlora").rglob("*.py") for line in path.read_text().splitlines() if "type: ignore" in line]
    assert all("type: ignore[" in line for line in ignored) and len(ignored) <= 3, ignored
