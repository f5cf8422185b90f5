"""environment.yml from constraints.txt, so that every version is pinned in one place. Usage: python tests/render_environment.py"""
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
HEAD = """# Written from constraints.txt by `make pins`: mamba env create -f environment.yml
name: sahlora
channels:
  - conda-forge
dependencies:
  - python=3.11
  - pip
  - make
  - git
  - pip:
"""


def pins(project: Path = PROJECT) -> dict[str, str]:
    "Package -> version of constraints.txt."
    lines = (project / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def render(project: Path = PROJECT) -> str:
    "The environment file as text."
    rows = [f"      - {name}=={version}" for name, version in pins(project).items()]
    return HEAD + "\n".join([*rows, "      - -e ."]) + "\n"


if __name__ == "__main__":
    (PROJECT / "environment.yml").write_text(render(), encoding="utf-8")
