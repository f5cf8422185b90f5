"""What objects show of themselves in a notebook: small, self-contained, and never an error; and the slice viewer."""

import base64
import html
import io
import re
import shutil
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sahlora.common import display
from sahlora import prediction as viewer
from sahlora.prediction import Prediction, contact_sheet, slice_picture, slider, view
from sahlora.adapters import adapt
from sahlora.cohorts.cohort import Cohort, cohort_html, make_phantom_cohort
from sahlora.ct import HeadCT
from sahlora.common.style import MASK, PREDICTION
from sahlora.phantom import make_case
from sahlora.study.experiment import project_path
from sahlora.study.schema import expand_runs, read_study
from sahlora.unet import MultiViewUnet

PNG = re.compile(r'src="data:image/png;base64,([^"]+)"')


def pictures(html):
    "Pictures in a page, as arrays; the page must stand alone."
    assert "<script" not in html and "http" not in html
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for data in PNG.findall(html)]


@pytest.fixture(scope="module")
def phantom():
    return make_case("asah", 3, 1)


@pytest.fixture(scope="module")
def head(phantom):
    return HeadCT(phantom.hu, phantom.affine, "some/where/a <b>head.nii.gz")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return make_phantom_cohort(tmp_path_factory.mktemp("cohorts") / "mine", "tbi", 2, 8)


OUTSIDE = ("<script>document.title='x'</script>", "a|b", "$x_{$", "![](http://x.org/p.png)", "</title><script>", "=1+1", "[a](javascript:b)",
           "http://x.org www.x.org a@b.org", "*a* _b_ __c__ ~~d~~ `e` ^f^", "&lt;b&gt; &#60;", "# 1", "- a", "+ a", "1. a", "2) a", "> a",
           "---", "===", "```", "\\", "a\\|b", ":smile: :+1:", "[^1]", "two\nlines\n\n# three", "\ttab", "\x00\x1b[31m\u202etxt", "<!-- a -->",
           "{{< include x >}}", "$$y$$", "\\(z\\)", "|||", "<http://x.org>", "x" * 3000, "- [ ] a", "<details>", "a\u2028b")  # fmt: skip


def rendered(markdown):
    "(words, tags) of a page that pandoc makes of Markdown as GitHub and our report read it."
    import pypandoc

    page = pypandoc.convert_text(markdown, "html5", format="gfm+tex_math_dollars", extra_args=["--mathml", "--wrap=none"])
    return html.unescape(re.sub("<[^>]+>", "", page)), re.findall(r"<(\w+)", page)


@pytest.mark.many
@pytest.mark.parametrize("text", OUTSIDE, ids=range(len(OUTSIDE)))
def test_words_from_outside_stay_text(text):
    "In a paragraph, a quotation, a list, a heading and a table of Markdown, and in HTML."
    once, safe = display.plain_text(text), display.markdown_text(text)
    assert "\n" not in safe and safe.isprintable()
    for front, tags in (("", ["p"]), ("> ", ["blockquote", "p"]), ("- ", ["ul", "li"]), ("# ", ["h1"]), ("*see* ", ["p", "em"])):
        words, found = rendered(front + safe)
        assert found == tags and words.strip().removeprefix("see ") == once, (front, safe)
    table = pd.DataFrame({"case": [text, "0012"], text: [text, "b"], "n": [1, 2]})
    words, found = rendered(display.table_markdown(table))
    cells = [cell.strip() for cell in words.split("\n") if cell.strip()]
    assert cells == ["case", once, "n", once, once, "1", "0012", "b", "2"] and set(found) <= {"table", "colgroup", "col", "thead", "tr", "th", "tbody", "td"}
    facts = display.facts_html({text: text})
    assert re.findall(r"<(\w+)", facts) == ["table", "tr", "th", "td"] and html.unescape(re.sub("<[^>]+>", " ", facts)).split() == 2 * once.split()
    assert re.findall(r'alt="([^"]*)"', display.png_html(np.zeros((2, 2), np.uint8), text)) == [display.html_text(text)]


def test_numbers_and_names_of_digits_keep_their_looks():
    table = pd.DataFrame({"patient": ["007", "1e5"], "Dice": [0.123456, 1.0]})
    assert "| 007 " in display.table_markdown(table, floatfmt=".2f") and "| 1e5 " in display.table_markdown(table)
    assert "|   0.12 |" in display.table_markdown(table, floatfmt=".2f")


def test_a_long_name_keeps_its_ends():
    assert display.plain_text("a" * 100 + "b" * 100, 11) == "aaaaa…bbbbb" and display.plain_text("abc", 3) == "abc"


@pytest.mark.long
@pytest.mark.parametrize("text", ["$x_{$", "two\nlines", "<b>x</b>", "x" * 500])
def test_the_viewer_takes_names_from_outside(head, phantom, text):
    looked = view(head, {text: phantom.blood}, static=True, title=text)
    assert Image.open(io.BytesIO(looked.sheet())).size[0] == 6 * 130
    words = slider(looked).children[2].value
    assert re.findall(r"<(\w+)", words) == ["b"] and html.unescape(re.sub("<[^>]+>", "", words)).count(display.plain_text(text)) == 1


def test_colours_are_the_figures():
    assert (display.MASK_COLOR, display.PREDICTION_COLOR) == (MASK, PREDICTION)


@pytest.mark.parametrize("shape, mm", [((64, 80), (2.5, 2.5)), ((512, 512), (0.45, 0.45)), ((40, 40), (1.0, 2.0)), ((3, 200), (1, 1))])
def test_a_slice_keeps_its_proportions(shape, mm):
    grey = display.grey_slice(np.full(shape, 40.0), mm, 100)
    assert grey.shape == (max(1, round(100 * shape[1] * mm[1] / (shape[0] * mm[0]))), 100)
    assert (grey == round(255 * 40 / 80)).all()


def test_a_slice_lies_as_it_is_read(head):
    hu = np.full((60, 80), -1000.0)
    hu[:10, :8] = 1000  # the patient's right, anterior
    assert display.grey_slice(hu, (1, 1), 60)[:8, :10].min() == 255 and display.grey_slice(hu, (1, 1), 60)[20:].max() == 0


@pytest.mark.parametrize("place", [(0, 0), (511, 511), (17, 300)])
@pytest.mark.parametrize("size", [(33, 41), (512, 512), (700, 900)])
def test_a_voxel_of_a_mask_is_never_lost(place, size):
    mask = np.zeros((512, 512))
    mask[place] = 1
    inside = display.shown_mask(mask, size)
    assert inside.any() and display.marked(np.zeros(size, np.uint8), inside, "#E69F00").any()


def test_fewer_colours_keep_small_areas():
    picture = np.stack([np.tile(np.arange(256, dtype=np.uint8), (64, 1))] * 3, -1)
    picture[30:33, 40:43] = (0x56, 0xB4, 0xE9)
    again = np.asarray(Image.open(io.BytesIO(display.png_bytes(picture, colors=128))).convert("RGB")).astype(int)
    assert abs(again - picture).max() < 16


def test_head_ct(head):
    html = head._repr_html_()
    (picture,) = pictures(html)
    assert picture.shape[1] == 160 and len(html) < 60_000 and "&lt;b&gt;head" in html and "<b>head" not in html
    assert "some/where" not in html, "a page that is shared names the file, not the folders"
    assert repr(head).startswith("HeadCT(64x80x28 voxels") and "<" not in repr(head)
    with np.errstate(all="raise"):
        assert pictures(HeadCT(np.full((32, 32, 2), np.nan), np.diag([-1.0, -1, 1, 1]))._repr_html_())
    big = HeadCT(np.random.default_rng(0).normal(40, 30, (512, 512, 3)).astype("f4"), np.diag([-0.45, -0.45, 5, 1]))
    assert len(big._repr_html_()) < 80_000


@pytest.mark.long
def test_cohort(cohort):
    html = cohort._repr_html_()
    assert len(pictures(html)) == 2 and all(name in html for name in cohort.patients) and len(html) < 200_000
    assert "median" in html and repr(cohort) == "Cohort(2 scans of 2 patients in mine)"


@pytest.mark.long
def test_cohort_of_hundreds_stays_small(cohort):
    row = cohort.table.iloc[:1]
    many = Cohort(cohort.folder, pd.concat([row.assign(case=f"c{i}", patient=f"p{i}") for i in range(300)], ignore_index=True))
    html = many._repr_html_()
    assert "and 288 more" in html and len(pictures(html)) == 5 and len(html) < 300_000 and "p11<" in html and "p12<" not in html


def test_cohort_that_lost_a_file_still_shows(cohort, tmp_path):
    shutil.copytree(cohort.folder, tmp_path / "lost")
    lost = Cohort.read(tmp_path / "lost")
    (tmp_path / "lost" / lost.table.image[0]).write_bytes(b"no NIfTI")
    html = lost._repr_html_()
    assert "no pictures:" in html and lost.table.case[0] in html and not pictures(html)


def test_cohort_of_unknown_spacing(cohort):
    unknown = Cohort(cohort.folder, cohort.table.assign(spacing="unknown", blood_ml=np.nan))
    assert "unknown mL" in cohort_html(unknown) and "nan" not in cohort_html(unknown)


def predicted(head, phantom, notes=()):
    return Prediction(head, phantom.blood * 0.9, 0.5, 1.0, "cpu", "fp32", 4, tuple(notes))


def test_prediction(head, phantom):
    html = predicted(head, phantom)._repr_html_()
    ml = f"{head.volume_ml(phantom.blood):.1f} mL"
    assert len(pictures(html)) == 1 and len(html) < 250_000 and ml in html and "not for clinical use" in html and "&#9888;" not in html
    assert repr(predicted(head, phantom)).startswith(f"Prediction({ml} hard")


def test_prediction_shows_its_flags(head, phantom):
    one = predicted(head, phantom, ["warning: pixels of <1> mm", "resampled"])
    assert one.flags == ("pixels of <1> mm",) and one._repr_html_().count("&#9888;") == 1
    assert "pixels of &lt;1&gt; mm" in one._repr_html_()


STUDIES = [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem == "paper"))
           for path in sorted(project_path("paper/studies").glob("*.yaml"))]


@pytest.mark.long
@pytest.mark.parametrize("path", STUDIES)
def test_study(path, monkeypatch):
    monkeypatch.delenv("SAHLORA_OWN_DATA", raising=False)
    monkeypatch.setenv("SAHLORA_REAL_DATA", "nowhere")
    study = read_study(path)
    text = study._repr_markdown_()
    assert f"**{study.study}**" in text and text.count("\n|:--") == 2 and len(text) < 10_000
    counts = [int(line.split("|")[-2]) for line in text.splitlines()[-len(study.runs):]]
    assert sum(counts) == len(expand_runs(study)) and f"| {sum(counts)}, of " in text


def test_summary_of_many_layers_stays_short():
    made = adapt(MultiViewUnet(levels=2), "cp-lora", rank=2, batchnorm="train")
    text = made._repr_markdown_()
    assert f"and {len(made.rows) - 23} more" in text and text.count("\n|") == 27 and f"{made.parameters:,} of" in text
    assert repr(made).count("\n") == len(made.rows) + 3, "plain text lists them all"


def test_viewer_draws_each_mask_in_its_colour(head, phantom):
    k = int(phantom.blood.sum((0, 1)).argmax())
    other = np.roll(phantom.blood, 12, 0)
    picture = slice_picture(head, k, {"one": phantom.blood, "two": other}, width=256)
    colours = {tuple(c) for c in picture.reshape(-1, 3)}
    assert {(0xE6, 0x9F, 0x00), (0x56, 0xB4, 0xE9)} <= colours
    assert (slice_picture(head, k, {}) == slice_picture(head, k, {"none": np.zeros(head.hu.shape)})).all()


@pytest.mark.parametrize("slices", [1, 5, 28])
def test_sheet_of_few_slices(slices, phantom):
    ct = HeadCT(phantom.hu[..., :slices] if slices > 1 else phantom.hu[..., :2], phantom.affine)
    assert contact_sheet(ct, {}, most=12).shape[1] == 130 * min(6, ct.hu.shape[2])


def test_view_refuses(head, phantom):
    with pytest.raises(TypeError, match="can not view str"):
        view("scan.nii.gz")
    with pytest.raises(ValueError, match="shape"):
        view(head, phantom.blood[1:])
    with pytest.raises(ValueError, match="colours for 4"):
        view(head, {str(i): phantom.blood for i in range(5)})
    with pytest.raises(ValueError, match="low < high"):
        view(head, window=(80, 0))


def test_view_takes_predictions_and_arrays(head, phantom):
    assert list(view(predicted(head, phantom), {"annotation": phantom.blood}).masks) == ["annotation", "prediction"]
    assert repr(view(phantom.hu)) == "SliceView(28 slices, no mask)"


def test_slider_moves(head, phantom):
    looked = view(head, phantom.blood)
    box = slider(looked)
    at, (window, masks), words, image = box.children[0], box.children[1].children, box.children[2], box.children[3]
    for k in (0, 13, 27):
        at.value = k + 1
        assert image.value == looked.picture(k) and f"{k + 1}/28" in words.value
    window.value, masks.value = (-500.0, 1500.0), False
    assert image.value == looked.picture(27, (-500.0, 1500.0), masks=False) != looked.picture(27)
    assert dict(slider(view(head, window=(10, 60))).children[1].children[0].options)["10 to 60 HU"] == (10, 60)


def test_still_picture_without_a_front_end(head, phantom, monkeypatch):
    for name in ("JPY_SESSION_NAME", "VSCODE_PID"):
        monkeypatch.delenv(name, raising=False)
    assert set(view(head, phantom.blood)._repr_mimebundle_()) == {"text/plain", "image/png"}


def test_slider_with_a_front_end(head, phantom, monkeypatch):
    monkeypatch.setenv("JPY_SESSION_NAME", "a.ipynb")
    monkeypatch.setitem(viewer.sys.modules, "IPython", SimpleNamespace())
    bundle = view(head, phantom.blood)._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle and bundle["text/plain"].startswith("SliceView(")
    assert set(view(head, phantom.blood, static=True)._repr_mimebundle_()) == {"text/plain", "image/png"}


def test_still_picture_without_ipywidgets(head, phantom, monkeypatch):
    monkeypatch.setenv("JPY_SESSION_NAME", "a.ipynb")
    monkeypatch.setattr(viewer, "find_spec", lambda name: None)
    assert set(view(head, phantom.blood)._repr_mimebundle_()) == {"text/plain", "image/png"}
    with pytest.raises(ModuleNotFoundError, match="pip install ipywidgets"):
        view(head, phantom.blood, static=False)._repr_mimebundle_()


def test_exported_page_shows_the_picture(head, phantom, monkeypatch):
    "nbconvert, which has no kernel, takes the still picture of an output that was saved with its slider."
    from nbconvert import HTMLExporter

    monkeypatch.setenv("JPY_SESSION_NAME", "a.ipynb")
    bundle = view(head, phantom.blood, static=False)._repr_mimebundle_()
    output = nbformat.v4.new_output("display_data", data=bundle)
    page, _ = HTMLExporter(template_name="basic").from_notebook_node(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("view(head)", outputs=[output])]))
    assert bundle["image/png"][:200] in page and "widget-view" not in page


@pytest.mark.slow
def test_a_notebook_that_runs_without_a_browser_keeps_the_picture(monkeypatch):
    from nbclient import NotebookClient

    for name in ("JPY_SESSION_NAME", "VSCODE_PID"):
        monkeypatch.delenv(name, raising=False)
    cells = ["import numpy as np\nfrom sahlora.prediction import view", "view(np.full((32, 40, 6), 30.0), np.ones((32, 40, 6)))"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(nb, timeout=300, kernel_name="python3").execute()
    assert set(nb.cells[1].outputs[0].data) == {"text/plain", "image/png"}
