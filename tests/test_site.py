"""The site that `make docs` builds: every notebook, every public name, no dead link, nothing from a network."""
import html
import json
import re
import subprocess
import sys
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
import render_site

from sahlora.evaluation.claims import REVISION


class Links(HTMLParser):
    "Anchors and links of a page."

    def __init__(self, text: str):
        super().__init__()
        self.anchors, self.links = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id":
                self.anchors.add(value)
            elif name in ("href", "src", "srcset", "poster", "data") and value:
                self.links.append((tag, value))


def dead_links(site: Path) -> list[str]:
    "Links to files or anchors that are not there, and what a page would load from elsewhere."
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if "files" not in path.relative_to(site).parts}
    wrong = []
    for path, page in pages.items():
        for tag, link in page.links:
            where = f"{path.relative_to(site)}: {link[:100]}"
            if re.match(r"(https?:)?//", link):
                wrong += [f"{where} is loaded from a network"] if tag != "a" else []
                continue
            if re.match(r"data:|mailto:", link):
                continue
            target, _, anchor = unquote(link).partition("#")
            file = (path.parent / target).resolve() if target else path
            if not file.is_file() or not file.is_relative_to(site):
                wrong.append(f"{where} is not there")
            elif anchor and file in pages and anchor not in pages[file].anchors:
                wrong.append(f"{where}: no such anchor")
    return wrong


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site").resolve()
    return folder, render_site.render(folder)


def test_no_dead_link(site):
    assert dead_links(site[0]) == []


def test_a_dead_link_is_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html">b</a><a href="#no">no</a><img src="//example.org/x.png"><a href="a.html">ok</a>')
    assert [line.partition(": ")[2] for line in dead_links(tmp_path)] == [
        "b.html is not there", "#no: no such anchor", "//example.org/x.png is loaded from a network"]


def test_names_of_files_are_text_in_a_listing(tmp_path):
    folder = tmp_path / "a&b"
    folder.mkdir()
    for name in ("<b>x<!--", "a#b.txt"):
        (folder / name).touch()
    url = render_site._listing(folder, Path("files/a&b"), tmp_path / "site")
    page = Links(text := (tmp_path / "site" / url).read_text())
    assert sorted(unquote(link) for _, link in page.links) == ["<b>x<!--", "a#b.txt"] and "<b>" not in text and "a&amp;b</title>" in text


def test_no_verdict_under_revision_stands_on_a_page_without_it(site):
    "Wherever the committed study's claims are listed, in tables and in pictures' captions."
    for page in ("index.html", "tutorials/results.html"):
        text = (site[0] / page).read_text()
        rows = [re.sub("<[^>]+>", " ", row) for row in re.findall("<tr>.*?</tr>", text, re.S) if re.search(r"<td[^>]*>\s*[1-5]\. ", row)]
        assert len(rows) == 5
        for row in rows:
            number = int(row.split()[0][0])
            assert ("under revision" in row) == (number in (2, 4, 5)) and REVISION in text
            assert number in (1, 3) or not re.search("supported|contradicted|inconclusive", row)


def test_every_notebook_is_a_page_with_its_title_and_pictures(site, project):
    folder, pages = site
    notebooks = {path.relative_to(project / "nbs").with_suffix("").as_posix() for path in (project / "nbs").rglob("*.ipynb")
                 if ".ipynb_checkpoints" not in path.parts}
    assert {page.path for page in pages} == notebooks
    for page in pages:
        text = (folder / page.url).read_text(encoding="utf-8")
        pictures = sum("image/png" in output.get("data", {}) or "image/svg+xml" in output.get("data", {})
                       for cell in page.cells for output in cell.get("outputs", []))
        assert text.count('class="picture"') == pictures and f"<title>{html.escape(page.title)}<" in text, page.path
        assert "SAHLORA" not in text.replace("SAHLORA_", ""), f"{page.path}: a cell is lost"


def test_every_public_name_leads_to_its_cell(site, project):
    folder, pages = site
    defined = defaultdict(set)
    for module, entries in render_site.read_api(project / "sahlora", pages).items():
        page = (folder / f"api/{module}.html").read_text(encoding="utf-8")
        for entry in entries:
            defined[module].add(entry.name)
            assert entry.cell and f'#cell-{entry.cell}"' in page and f'id="{entry.name}"' in page, entry
    for module in ("adapters.network", "ct.core", "unet", "training.transfer"):
        source = (project / f"sahlora/{module.replace('.', '/')}.py").read_text()
        listed = set(eval(re.search(r"__all__ = (\[.*?\])", source, re.S)[1]))
        assert listed == defined[f"sahlora.{module}"]


def test_formulas_are_mathml(site):
    folder, pages = site
    formulas = 0
    for page in pages:
        prose = "\n".join(cell.source for cell in page.cells if cell.cell_type == "markdown")
        body = (folder / page.url).read_text(encoding="utf-8")
        formulas += body.count("<math")
        assert ("$$" not in prose) or 'display="block"' in body, page.path
        assert not re.search(r'class="math', body), f"{page.path}: a formula that pandoc could not read"
    assert formulas > 100


def test_search_index_finds_what_is_there(site):
    folder, _ = site
    rows = json.loads((folder / "search-index.js").read_text(encoding="utf-8").removeprefix("window.SEARCH = ").rstrip(";\n"))
    for url, title, _ in rows:
        file, _, anchor = url.partition("#")
        assert f'id="{anchor}"' in (folder / file).read_text(encoding="utf-8"), url
        assert title
    titles = [title for _, title, _ in rows]
    assert "adapt · sahlora.adapters.network" in titles and any("head ct" in title.lower() for title in titles)


def test_a_rewritten_link_and_a_signature(tmp_path, project):
    page = render_site.Page("tutorials/x", [nbformat.v4.new_markdown_cell("# T\n\n[u](../unet.ipynb#a) `adapt` $x^2$")], "T", "", None)
    body = render_site.page_body(page, tmp_path, {}, {"adapt": "api/m.html#adapt"})
    assert 'href="../unet.html#a"' in body and 'href="../api/m.html#adapt"' in body and "<msup>" in body
    module = tmp_path / "m.py"
    module.write_text("__all__ = ['f', 'C']\n# %% ../nbs/9_x.ipynb #abc\ndef f(a: int, *, b: str = 'x') -> bool:\n    'Doc.'\n"
                      "# %% ../nbs/9_x.ipynb #def\nclass C:\n    'Cdoc'\n    n: int\n    def m(self, k): pass\ndef hidden(): pass\n")
    function, thing = render_site.read_module(module, "m")
    assert (function.signature, function.doc, function.cell) == ("f(a: int, *, b: str='x') -> bool", "Doc.", "abc")
    assert [member.signature for member in thing.members] == ["n: int", "m(k)"] and thing.cell == "def"


def test_nbdev_prepares_the_notebooks_for_quarto(project, tmp_path):
    "What nbdev-docs does before it calls Quarto; types of late imports must not stop it."
    names = ["common/files.ipynb", "adapters/lora.ipynb", "study/schema.ipynb"]
    code = ("import sys; from pathlib import Path; from nbdev.processors import FilterDefaults; from nbdev.serve_drv import main\n"
            "for name in sys.argv[2:]:\n    (Path(sys.argv[1]) / name).parent.mkdir(exist_ok=True)\n"
            "    main((Path('nbs') / name, Path(sys.argv[1]) / name, FilterDefaults))")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), *names], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in names:
        cells = nbformat.read(tmp_path / name, as_version=4).cells
        assert cells[0].cell_type == "raw" and "description:" in cells[0].source
        assert any("def " in cell.source for cell in cells if cell.cell_type == "code")
