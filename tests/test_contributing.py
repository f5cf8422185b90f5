"""What CONTRIBUTING.md says of our notebooks is what they measure, and its commands exist."""
import json
import re

import pytest
import yaml
from measure_notebooks import measure


@pytest.fixture(scope="module")
def text(project):
    return (project / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_table_holds_what_is_measured(project, text):
    rows = re.findall(r"^\| ours `([^`]+)` \| (.+) \|$", text, re.M)
    folders = {path.parent.relative_to(project / "nbs").as_posix() for path in (project / "nbs").rglob("*.ipynb")
               if ".ipynb_checkpoints" not in path.parts}
    assert {name for name, _ in rows} == folders, "all notebooks of every folder are counted, not the best ones"
    for name, cells in rows:
        assert [f"{value:g}" for value in measure(project / "nbs" / name).values()] == cells.split(" | "), \
            f"{name}: run python tests/measure_notebooks.py nbs/{name}"


def test_measuring(tmp_path):
    code = {"cell_type": "code", "outputs": [{"output_type": "display_data", "data": {"image/png": ""}}]}
    cells = [{"cell_type": "markdown", "source": ["# Two words\n", "and $a+b$ `code` four"]}, {**code, "source": ["#| default_exp x"]},
             {**code, "source": ["#| export\n", "x = 1\n", "\n", "y = 2\n", "z = 3"]}, {**code, "source": ["assert x\n", "test_eq(x, 1)"]}]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}))
    assert measure(tmp_path / "a.ipynb") == {"cells": 4, "median": 2.5, "longest": 3, "words": 2, "formulas": 1, "pictures": 2, "checks": 2}


def test_its_commands_and_those_of_the_workflow_are_in_the_makefile(project, text):
    made = set(re.findall(r"^([a-z-]+):", (project / "Makefile").read_text(), re.M))
    workflow = yaml.safe_load((project / ".github/workflows/test.yml").read_text())
    lines = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    wanted = set(re.findall(r"`make ([a-z-]+)`", text)) | {word for line in lines for word in line.split()[1:]}
    assert wanted <= made, wanted - made
    assert "make test" in lines and 'CMD ["make", "paper"]' in (project / "Dockerfile").read_text()
