"""The site from the notebooks: a page each, an API with links to the cells that define it, search; no network, no server.

Usage: python tests/render_site.py [folder, _docs by default]. Cells are not run; what is committed is shown.
"""
import ast
import base64
import html
import json
import re
import shutil
import sys
from dataclasses import dataclass, field
from os.path import relpath
from pathlib import Path
from urllib.parse import quote

import nbformat
import pypandoc
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

PROJECT = Path(__file__).resolve().parent.parent
ASSETS = Path(__file__).resolve().parent / "site"
# Folders of notebooks in reading order, and what they are called.
GROUPS = {"": "Start", "tutorials": "Tutorials", "common": "Files and hardware", "ct": "One head CT", "phantom": "Phantoms", "cohorts": "Cohorts",
          "unet": "The network", "adapters": "Adapters", "evaluation": "Evaluation", "training": "Training", "prediction": "Prediction",
          "study": "Studies", "report": "Reports", "cli": "Command line", "experiments": "Experiments"}
ORDER = tuple(GROUPS)
MARK = "SAHLORA{}CELL"
CODE = HtmlFormatter(nowrap=True)


@dataclass
class Entry:
    "A public name: where it lives, how it is called, what it says of itself."
    module: str
    name: str
    kind: str
    signature: str
    doc: str
    cell: str = ""  # id of the notebook cell
    members: list["Entry"] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"api/{self.module}.html#{self.name}"


@dataclass
class Page:
    "A notebook: its cells, where its page goes, which module it exports."
    path: str  # relative to nbs, without .ipynb
    cells: list
    title: str
    subtitle: str
    module: str | None
    headings: dict[str, tuple[str, str]] = field(default_factory=dict)  # cell id -> (anchor, text) of the heading above it

    @property
    def url(self) -> str:
        return f"{self.path}.html"

    @property
    def group(self) -> str:
        folder, _, name = self.path.rpartition("/")
        return folder or (name if name in GROUPS else "")


# Notebooks

def read_page(path: Path, root: Path) -> Page:
    "A notebook without its hidden cells."
    cells = [cell for cell in nbformat.read(path, as_version=4).cells
             if not re.match(r"#\|\s*(hide|default_exp)\b", cell.source) and cell.source.strip()]
    text = "\n".join(path.read_text(encoding="utf-8").splitlines())
    module = re.search(r"#\| default_exp (\S+?)(?:\\n)?\"", text)
    prose = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    title = re.search(r"^# (.+)$", prose, re.M)
    subtitle = re.search(r"^> (.+)$", prose, re.M)
    name = path.relative_to(root).with_suffix("").as_posix()
    return Page(name, cells, title[1] if title else name, subtitle[1] if subtitle else "", f"sahlora.{module[1]}" if module else None)


def read_pages(root: Path) -> list[Page]:
    "Every notebook, in reading order."
    found = [read_page(path, root) for path in sorted(root.rglob("*.ipynb"))
             if not any(part.startswith((".", "_")) for part in path.relative_to(root).parts)]
    return sorted(found, key=lambda page: (ORDER.index(page.group), page.path))


# API: read from the exported modules, never imported

def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef, method: bool = False) -> str:
    call = ast.parse(ast.unparse(node.args).join(("def f(", "): pass"))).body[0].args
    if method and call.args and call.args[0].arg in ("self", "cls"):
        call.args.pop(0)
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({ast.unparse(call)}){result}"


def _entry(module: str, node: ast.stmt) -> Entry:
    if isinstance(node, ast.ClassDef):
        bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
        fields = [Entry(module, f"{node.name}.{line.target.id}", "field", ast.unparse(line), "") for line in node.body
                  if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.target.id[0] != "_"]
        methods = [Entry(module, f"{node.name}.{line.name}", "method", _signature(line, method=True), ast.get_docstring(line) or "")
                   for line in node.body if isinstance(line, ast.FunctionDef) and line.name[0] != "_"]
        return Entry(module, node.name, "class", f"class {node.name}{bases}", ast.get_docstring(node) or "", members=fields + methods)
    return Entry(module, node.name, "function", _signature(node), ast.get_docstring(node) or "")


def _constant(module: str, name: str, node: ast.stmt) -> Entry:
    value = ast.unparse(node.value) if node.value else ""
    return Entry(module, name, "value", f"{name} = {value}" if len(value) < 200 else name, "")


def read_module(path: Path, module: str) -> list[Entry]:
    "The public names that a module defines itself, each with the id of its notebook cell, in the notebook's order."
    source = path.read_text(encoding="utf-8")
    marks = [(number, line.rpartition("#")[2]) for number, line in enumerate(source.splitlines(), 1) if line.startswith("# %% ../")]
    tree, entries = ast.parse(source), {}
    public = next((ast.literal_eval(node.value) for node in tree.body
                   if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"), [])
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names, make = [node.name], lambda name, node=node: _entry(module, node)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            make = lambda name, node=node: _constant(module, name, node)  # noqa: E731
        else:
            continue
        for name in set(names) & set(public):
            entries.setdefault(name, make(name)).cell = max((mark for mark in marks if mark[0] <= node.lineno), default=(0, ""))[1]
    return list(entries.values())


def read_api(package: Path, pages: list[Page]) -> dict[str, list[Entry]]:
    "module -> its entries, for every notebook that exports one."
    api = {}
    for page in pages:
        if page.module:
            stem = package.joinpath(*page.module.split(".")[1:])
            path = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
            api[page.module] = read_module(path, page.module)
    return api


# Pages

def _code(source: str) -> str:
    return f'<pre class="code">{highlight(source, PythonLexer(), CODE)}</pre>'


def _shown_source(source: str) -> str:
    return "\n".join(line for line in source.splitlines() if not line.startswith("#|")).strip()


def _picture(out: Path, name: str, content: bytes) -> str:
    (out / "pictures").mkdir(exist_ok=True)
    (out / "pictures" / name).write_bytes(content)
    return name


def _output(output: dict, page: Page, up: str, out: Path, number: str) -> tuple[str, str]:
    "What an output shows: ('html' or 'markdown', text)."
    if output.output_type == "stream":
        return "html", f'<pre class="out">{html.escape(output.text)}</pre>'
    if output.output_type == "error":
        return "html", f'<pre class="out">{html.escape(f"{output.ename}: {output.evalue}")}</pre>'
    data = output.get("data", {})
    if "image/svg+xml" in data:
        name = _picture(out, f"{page.path.replace('/', '-')}-{number}.svg", "".join(data["image/svg+xml"]).encode())
    elif "image/png" in data:
        name = _picture(out, f"{page.path.replace('/', '-')}-{number}.png", base64.b64decode(data["image/png"]))
    elif "text/markdown" in data:
        return "markdown", "".join(data["text/markdown"])
    elif "text/html" in data:
        return "html", f'<div class="rich">{"".join(data["text/html"])}</div>'
    else:
        return "html", f'<pre class="out">{html.escape("".join(data.get("text/plain", "")))}</pre>'
    return "html", f'<img class="picture" loading="lazy" alt="picture of {html.escape(page.title)}" src="{up}pictures/{name}">'


def _code_cell(cell: dict, page: Page, up: str, out: Path, exported: dict[str, list[Entry]]) -> list[tuple[str, str]]:
    links = ", ".join(f'<a href="{up}{entry.url}">{entry.name}</a>' for entry in exported.get(cell.id, []))
    note = f'<p class="defines">API: {links}</p>' if links else ""
    source = "" if re.search(r"#\|\s*echo:\s*false", cell.source) else _shown_source(cell.source)
    parts = [("html", f'<div class="cell{" exported" if links else ""}" id="cell-{cell.id}">{note}{_code(source) if source else ""}')]
    parts += [_output(output, page, up, out, f"{cell.id}-{number}") for number, output in enumerate(cell.get("outputs", []))]
    return [*parts, ("html", "</div>")]


def to_html(markdown: str) -> str:
    "Markdown with formulas as HTML with MathML. Raises: RuntimeError of pandoc."
    return pypandoc.convert_text(markdown, "html5", format="gfm+tex_math_dollars", extra_args=["--mathml", "--wrap=none"])


def _relink(text: str, page: Page, up: str, out: Path) -> str:
    "Links to notebooks become links to pages; pictures and other files of the project are copied."
    here = PROJECT / "nbs" / Path(page.path).parent

    def replace(match: re.Match) -> str:
        attribute, link = match[1], match[2]
        if re.match(r"[a-z]+:|#", link):
            return match[0]
        target, _, anchor = link.partition("#")
        path = (here / target).resolve()
        if path.suffix == ".ipynb" and path.is_relative_to(PROJECT / "nbs"):
            return f'{attribute}="{relpath(path.with_suffix(".html"), here)}{"#" + anchor if anchor else ""}"'
        if not path.is_relative_to(PROJECT) or not path.exists():
            return match[0]  # the link check finds it
        copy = Path("files") / path.relative_to(PROJECT)
        if path.is_dir():
            return f'{attribute}="{up}{_listing(path, copy, out)}"'
        (out / copy).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, out / copy)
        return f'{attribute}="{up}{copy.as_posix()}"'

    return re.sub(r'\b(href|src)="([^"]*)"', replace, text)


def _listing(path: Path, copy: Path, out: Path) -> str:
    "A folder of the project as a page of links to copies of its files."
    shutil.copytree(path, out / copy, dirs_exist_ok=True)
    rows = "".join(f'<li><a href="{html.escape(quote(name))}">{html.escape(name)}</a></li>' for name in sorted(
        item.relative_to(path).as_posix() for item in path.rglob("*") if item.is_file()))
    (out / copy / "index.html").write_text(f"<!doctype html><meta charset=utf-8><title>{html.escape(path.name)}</title><ul>{rows}</ul>")
    return (copy / "index.html").as_posix()


def _link_names(text: str, names: dict[str, str], up: str) -> str:
    "`name` in prose becomes a link to its API entry; headings and links stay as they are."
    parts = re.split(r"(<h\d.*?</h\d>|<a\b.*?</a>|<pre.*?</pre>)", text, flags=re.S)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"<code>([\w.]+)</code>", lambda match: f'<a class="name" href="{up}{names[match[1]]}">{match[0]}</a>'
                          if match[1] in names else match[0], parts[i])
    return "".join(parts)


def page_body(page: Page, out: Path, api: dict[str, list[Entry]], names: dict[str, str]) -> str:
    "A notebook as HTML; fills page.headings."
    up = "../" * page.path.count("/")
    exported: dict[str, list[Entry]] = {}
    for entry in api.get(page.module or "", []):
        exported.setdefault(entry.cell, []).append(entry)
    blocks, markdown = [], []
    for cell in page.cells:
        if cell.cell_type == "markdown":
            parts = [("markdown", cell.source)]
        else:
            parts = _code_cell(cell, page, up, out, exported)
        for kind, text in parts:
            if kind == "html":
                markdown.append(MARK.format(len(blocks)))
                blocks.append(text)
            else:
                markdown.append(text)
    text = _relink(to_html("\n\n".join(markdown)), page, up, out)
    text = _link_names(text, names, up)
    return re.sub(r"<p>" + MARK.format(r"(\d+)") + r"</p>", lambda match: blocks[int(match[1])], text)


def _sections(body: str) -> list[tuple[str, str, str]]:
    "(anchor, heading, words) of a page's parts, for the search."
    rows, parts = [], re.split(r'<h[12] id="([^"]*)"[^>]*>(.*?)</h[12]>', body, flags=re.S)
    for anchor, heading, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        prose = " ".join(re.findall(r"<p>(.*?)</p>|<li>(.*?)</li>", text, flags=re.S) and
                         [a or b for a, b in re.findall(r"<p>(.*?)</p>|<li>(.*?)</li>", text, flags=re.S)])
        rows.append((anchor, _plain(heading), _plain(prose)[:600]))
    return rows


def _plain(text: str) -> str:
    text = re.sub(r"<math.*?</math>", " ", text, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", text)).split())


def _headings_of_cells(body: str) -> dict[str, tuple[str, str]]:
    "cell id -> (anchor, text) of the heading above it."
    found, heading = {}, ("", "")
    for match in re.finditer(r'<h[1-4] id="([^"]*)"[^>]*>(.*?)</h[1-4]>|id="cell-([^"]+)"', body, flags=re.S):
        if match[3]:
            found[match[3]] = heading
        else:
            heading = (match[1], _plain(match[2]))
    return found


# API pages

def api_body(page: Page, entries: list[Entry]) -> str:
    "The public names of a module, each with a link to the section of its notebook."
    rows = [f'<h1>{page.module}</h1><p class="lead">{html.escape(page.subtitle)}. '
            f'Explained in <a href="../{page.url}">{html.escape(page.title)}</a>.</p>']
    for entry in entries:
        heading = page.headings.get(entry.cell, ("", ""))[1] or page.title
        rows.append(f'<section class="entry" id="{entry.name}"><h2><code>{entry.name}</code> <small>{entry.kind}</small></h2>'
                    f'{_code(entry.signature)}{_doc(entry.doc)}{_members(entry)}'
                    f'<p class="defines">Notebook: <a href="../{page.url}#cell-{entry.cell}">{html.escape(heading)}</a></p></section>')
    return "\n".join(rows)


def _doc(doc: str) -> str:
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(doc))
    return f'<p class="doc">{text}</p>' if doc else ""


def _members(entry: Entry) -> str:
    rows = [f'<dt id="{member.name}"><code>{html.escape(member.signature)}</code></dt><dd>{_doc(member.doc)}</dd>'
            for member in entry.members]
    return f'<dl>{"".join(rows)}</dl>' if rows else ""


def api_index(pages: list[Page], api: dict[str, list[Entry]]) -> str:
    "All modules and their names."
    rows = ["<h1>API</h1><p>Every public name, by module; each leads to its signature, and from there to the cell that defines it.</p>"]
    for page in pages:
        if page.module:
            names = " ".join(f'<a href="{page.module}.html#{entry.name}"><code>{entry.name}</code></a>' for entry in api[page.module])
            rows.append(f'<h2><a href="{page.module}.html">{page.module}</a></h2><p>{html.escape(page.subtitle)}</p>'
                        f'<p class="names">{names}</p>')
    return "\n".join(rows)


# The site

def _navigation(pages: list[Page], here: str, up: str) -> str:
    rows, group = [f'<a class="home" href="{up}index.html">sahlora</a><a href="{up}api/index.html">API</a>'], None
    for page in pages:
        if page.group != group:
            group = page.group
            rows.append(f"<h3>{GROUPS[group]}</h3>")
        current = ' aria-current="page"' if page.url == here else ""
        rows.append(f'<a href="{up}{page.url}"{current}>{html.escape(page.title)}</a>')
    return "".join(rows)


def write(out: Path, url: str, title: str, body: str, pages: list[Page]) -> None:
    "One page with navigation and search around it."
    up = "../" * url.count("/")
    path = out / url
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((ASSETS / "page.html").read_text(encoding="utf-8").replace("{{title}}", html.escape(title)).replace("{{up}}", up)
                    .replace("{{navigation}}", _navigation(pages, url, up)).replace("{{body}}", body), encoding="utf-8")


def render(out: Path, project: Path = PROJECT) -> list[Page]:
    "The whole site, into an empty folder. Raises: RuntimeError of pandoc."
    shutil.copy(ASSETS / "search.js", out / "search.js")  # first: a folder that holds it may be written anew
    pages = read_pages(project / "nbs")
    api = read_api(project / "sahlora", pages)
    known = [entry for entries in api.values() for entry in entries]
    names = {page.path.rpartition("/")[2]: page.url for page in pages} | {module: f"api/{module}.html" for module in api}
    names |= {entry.name: entry.url for entry in known if sum(other.name == entry.name for other in known) == 1}
    index = []
    for page in pages:
        body = page_body(page, out, api, names)
        page.headings = _headings_of_cells(body)
        write(out, page.url, page.title, body, pages)
        index += [(f"{page.url}#{anchor}", heading if heading == page.title else f"{page.title}: {heading}", words)
                  for anchor, heading, words in _sections(body)]
    for page in pages:
        if page.module:
            write(out, f"api/{page.module}.html", page.module, api_body(page, api[page.module]), pages)
    write(out, "api/index.html", "API", api_index(pages, api), pages)
    index += [(entry.url, f"{entry.name} · {entry.module}", entry.doc[:300]) for entry in known]
    (out / "search-index.js").write_text(f"window.SEARCH = {json.dumps(index, ensure_ascii=False)};\n", encoding="utf-8")
    style = (ASSETS / "site.css").read_text(encoding="utf-8")
    dark = HtmlFormatter(style="github-dark").get_style_defs("pre.code")
    style += HtmlFormatter(style="default").get_style_defs("pre.code") + "\n@media (prefers-color-scheme: dark) {\n" + dark + "\n}\n"
    (out / "site.css").write_text(style, encoding="utf-8")
    return pages


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else PROJECT / "_docs").resolve()
    if folder.exists() and any(folder.iterdir()) and not (folder / "search.js").exists():
        sys.exit(f"{folder} holds something else; name an empty folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"{len(render(folder))} notebooks: open {folder / 'index.html'}")
