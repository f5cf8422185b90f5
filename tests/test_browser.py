"""A reader's first minutes, in a real browser: JupyterLab opens, two notebooks run, their figures are seen; the site's search answers.

Needs Playwright and a Chromium on the PATH (Debian's package `chromium`), or SAHLORA_CHROMIUM with its path.
SAHLORA_SCREENSHOTS names a folder for pictures of what was seen.
"""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
import render_site

pytestmark = pytest.mark.slow
sync_api = pytest.importorskip("playwright.sync_api", reason="needs the dev extra: pip install playwright")
CHROMIUM = os.environ.get("SAHLORA_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# The notebook in front.
PANEL = ".jp-NotebookPanel:not(.lm-mod-hidden)"


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("needs Chromium: apt-get install chromium, or name one in SAHLORA_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def copy(project, tmp_path_factory):
    "The project without its runs, so that what the notebooks write stays out of it."
    folder = tmp_path_factory.mktemp("project") / "sahlora"
    for name in ("nbs", "paper", "sahlora"):
        shutil.copytree(project / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", ".snakemake"))
    for path in project.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def lab(copy, tmp_path_factory):
    "JupyterLab as `make lab` starts it, but for the browser window and the token."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = tmp_path_factory.mktemp("home")
    environment = {**os.environ, "JUPYTER_CONFIG_DIR": str(home), "JUPYTERLAB_SETTINGS_DIR": str(home), "JUPYTERLAB_WORKSPACES_DIR": str(home),
                   "OMP_NUM_THREADS": "1"}
    environment.pop("IN_TEST", None)
    with open(home / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--notebook-dir=nbs", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
             "--IdentityProvider.token=", "--ServerApp.port_retries=0", *(["--allow-root"] if os.getuid() == 0 else [])],
            cwd=copy, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=5)
                break
            except OSError:
                assert server.poll() is None, (home / "log").read_text()
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/lab"
    finally:
        server.terminate()
        server.wait(30)


def run_all(page, url: str, notebook: str, copy: Path) -> dict:
    "Open a notebook, forget its outputs, run all cells, wait for the last, save; the notebook as saved."
    page.goto(f"{url}/tree/{notebook}?reset")
    page.wait_for_selector(f"{PANEL} .jp-Cell", timeout=120_000)
    asked = page.locator(".jp-Dialog .jp-mod-accept")  # JupyterLab asks for the kernel where the list of kernels comes late
    page.add_locator_handler(asked, lambda button: button.click())
    path, deadline = copy / "nbs" / notebook, time.monotonic() + 300
    while time.monotonic() < deadline:
        if asked.is_visible():
            asked.click()
        page.wait_for_selector(f"{PANEL} .jp-Notebook-ExecutionIndicator[data-status=idle]", timeout=120_000)
        for entry in ("Clear Outputs of All Cells", "Run All Cells"):
            page.click(f"text='{'Edit' if entry.startswith('Clear') else 'Run'}' >> nth=0")
            page.click(f".lm-Menu-itemLabel:text-is('{entry}')")
        page.wait_for_timeout(3000)  # a kernel that has not begun is idle too
        page.wait_for_selector(f"{PANEL} .jp-Notebook-ExecutionIndicator[data-status=idle]", timeout=240_000)
        page.keyboard.press("Control+s")
        page.wait_for_timeout(2000)
        saved = json.loads(path.read_text())
        if all(cell["execution_count"] for cell in saved["cells"] if cell["cell_type"] == "code" and "".join(cell["source"]).strip()):
            return saved
    seen(page, f"{Path(notebook).stem}-not-run")
    raise AssertionError(f"{notebook}: not every cell was run: "
                         f"{[(c['execution_count'], c['source'][:60]) for c in saved['cells'] if c['cell_type'] == 'code']}")


def seen(page, name: str) -> None:
    if os.environ.get("SAHLORA_SCREENSHOTS"):
        page.screenshot(path=Path(os.environ["SAHLORA_SCREENSHOTS"]) / f"{name}.png")


@pytest.mark.parametrize("notebook", ["index.ipynb", "experiments/1_cohorts.ipynb"])
def test_a_notebook_runs_in_jupyterlab_and_its_figures_are_seen(browser, lab, copy, notebook):
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    saved = run_all(page, lab, notebook, copy)
    outputs = [output for cell in saved["cells"] if cell["cell_type"] == "code" for output in cell["outputs"]]
    assert all(output["output_type"] != "error" and output.get("name") != "stderr" for output in outputs), outputs
    assert page.locator(f"{PANEL} [data-mime-type='application/vnd.jupyter.error']").count() == 0
    picture = page.locator(f"{PANEL} .jp-OutputArea-output img").first
    picture.scroll_into_view_if_needed(timeout=60_000)
    assert picture.is_visible() and picture.evaluate("image => image.complete && image.naturalWidth > 200")
    seen(page, Path(notebook).stem)
    page.close()


def test_the_slice_viewer_moves(browser, lab, copy):
    "The slider's arrow key shows the next slice, drawn by the kernel."
    cells = ["from sahlora.ct import HeadCT\nfrom sahlora.phantom import make_case\nfrom sahlora.prediction import view",
             "case = make_case('asah', 0, 0)\nview(HeadCT(case.hu, case.affine, 'phantom'), case.blood >= 0.5)"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}  # else JupyterLab asks
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata=kernel)
    nbformat.write(notebook, copy / "nbs" / "viewer_check.ipynb")
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    run_all(page, lab, "viewer_check.ipynb", copy)
    image, number = page.locator(f"{PANEL} .widget-image").first, page.locator(f"{PANEL} .widget-readout").first
    image.wait_for(timeout=60_000)
    before, at = image.get_attribute("src"), int(number.inner_text())
    page.locator(f"{PANEL} .widget-slider .noUi-handle").first.focus()
    page.keyboard.press("ArrowRight")
    sync_api.expect(image).not_to_have_attribute("src", before, timeout=30_000)
    sync_api.expect(number).to_have_text(str(at + 1))
    assert image.evaluate("image => image.naturalWidth > 200")
    seen(page, "viewer")
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_site_opens_from_a_folder_and_finds(browser, tmp_path_factory, scheme):
    folder = tmp_path_factory.mktemp("site")
    render_site.render(folder)
    page = browser.new_page(color_scheme=scheme)
    asked, wrong = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto((folder / "index.html").as_uri())
    page.keyboard.press("/")
    page.keyboard.type("adapt")
    first = page.locator("#found a").first
    assert first.inner_text().startswith("adapt ·")
    first.click()
    page.wait_for_selector("section#adapt")
    page.locator("section#adapt .defines a").click()
    assert page.url.partition("#")[2].startswith("cell-") and page.locator(f"[id='{page.url.partition('#')[2]}']").is_visible()
    assert page.locator("math").first.bounding_box()["width"] > 3
    seen(page, f"site-{scheme}")
    ink, paper = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    bright = {name: sum(map(int, value.strip("rgb()").split(","))) for name, value in (("ink", ink), ("paper", paper))}
    assert abs(bright["ink"] - bright["paper"]) > 450 and (bright["paper"] > 384) == (scheme == "light")
    assert not wrong and all(url.startswith("file:") for url in asked)
