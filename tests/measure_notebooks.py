"""How notebooks read, in figures, as in the table of CONTRIBUTING.md. Usage: python tests/measure_notebooks.py NOTEBOOK_OR_FOLDER..."""
import json
import re
import statistics
import sys
from pathlib import Path


def measure(path: str | Path) -> dict[str, float]:
    """Of a notebook, or of all in a folder: how many cells, how long, how much prose.

    cells; non-blank lines of a code cell, directives aside (median, longest); words of prose to a code cell; formulas; pictures; checks.
    A check is an assert, or a call of fastcore's test functions.
    """
    notebooks = sorted(Path(path).glob("*.ipynb")) if Path(path).is_dir() else [Path(path)]
    cells = [cell for notebook in notebooks for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]]
    code, lines = [], []
    for cell in cells:
        if cell["cell_type"] == "code":
            rows = [row for row in "".join(cell["source"]).splitlines() if row.strip() and not re.match(r"#\s*\|", row)]
            if rows:
                code.append(cell)
                lines.append(rows)
    prose = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    words = re.findall(r"[A-Za-z][\w'-]*", re.sub(r"\$[^$]*\$|`[^`]*`|\(\S*\)", " ", prose))
    outputs = [output for cell in code for output in cell["outputs"]]
    return {"cells": len(cells), "median": statistics.median(map(len, lines)), "longest": max(map(len, lines)),
            "words": round(len(words) / len(code), 1), "formulas": len(re.findall(r"\$\$.+?\$\$|\$[^$\n]+\$", prose, re.S)),
            "pictures": sum(any(kind.startswith("image/") for kind in output.get("data", {})) for output in outputs),
            "checks": sum(bool(re.match(r"\s*(assert\b|test_\w+\()", row)) for rows in lines for row in rows)}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(" | ".join([Path(name).stem, *(f"{value:g}" for value in measure(name).values())]))
