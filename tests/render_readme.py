"""README.md from nbs/index.ipynb: prose and shown code, links made relative to the top. Usage: python tests/render_readme.py"""
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

PROJECT = Path(__file__).resolve().parent.parent


def results_only(cell: nbformat.NotebookNode) -> nbformat.NotebookNode:
    "What a cell displayed as Markdown, without its code. Raises: ValueError when it was not run."
    shown = [output["data"]["text/markdown"] for output in cell.outputs if "text/markdown" in output.get("data", {})]
    if not shown:
        raise ValueError("index.ipynb: a cell that shows its result alone displayed no Markdown; run the notebook")
    return nbformat.v4.new_markdown_cell("\n\n".join("".join(one) for one in shown))


def render(project: Path = PROJECT) -> str:
    "The README as text: hidden cells dropped, outputs as text, paths into nbs/."
    nb = nbformat.read(project / "nbs/index.ipynb", as_version=4)
    nb.cells = [cell for cell in nb.cells if not cell.source.startswith(("#| hide", "#| eval"))]
    nb.cells = [results_only(cell) if cell.source.startswith("#| echo: false") else cell for cell in nb.cells]
    nb.metadata["language_info"] = {"name": "python"}  # colours the code; cleaned notebooks do not carry it
    text, resources = MarkdownExporter().from_notebook_node(nb)
    if resources.get("outputs"):
        raise ValueError("index.ipynb shows a picture as an output; save it to nbs/images and link it instead")
    text = text.replace("](images/", "](nbs/images/").replace("](../", "](")
    for path in (project / "nbs").rglob("*.ipynb"):
        name = path.relative_to(project / "nbs").as_posix()
        text = text.replace(f"]({name})", f"](nbs/{name})")
    return "<!-- Rendered from nbs/index.ipynb by `make readme`. -->\n\n" + text.strip() + "\n"


if __name__ == "__main__":
    (PROJECT / "README.md").write_text(render(), encoding="utf-8")
