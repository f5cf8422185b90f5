"""The paper's source holds no result: its numbers and verdicts come from results.json, for a study of any size."""
import json
import re
import shutil

import pytest
import typst

from sahlora.evaluation.claims import CLAIMS, REVISION, VERDICTS, Plan

# ---- what may be typed

NO_RESULTS = [  # digits that are no results: layout, rounding, places in lists, comparisons of counts, names
    r"//.*", r"@\w+", r'"figures/', r"-?\d+(\.\d+)?(pt|cm|em|fr)\b", r"(width|share): \d+%",
    r'numbering: "[^"]*"|"a4"', r"\b(digits|columns|level|default): \d\b", r"#let many = \d+\n", r"#let level = \[95 %\]",
    r"\.(at|slice|insert)\(-?\d\b(, -?\d)?", r"calc\.(min\(1|max\(0),", r"calc\.pow\(10\.0,", r"calc\.round\(100 - plan\.alpha \* 200\)",
    r"(?<=[\w)]) (<|>|<=|>=|==) \d(?![\d.])(?! [a-z]+s\b)", r"left-then\(\d", r"\(1 \+ (?=int|roles)", r"\{ \d \}",
    r'"0"|"\[0\.\]"', r'"(nsd|hd95_mm|lesion_f1)"', r"#sub\[1\]", r"SHA-256", r"ICC\(3,1\)",
]  # fmt: skip
COUNTED = r"patients?|seeds?|folds?|runs?|strategies|steps|scans|cases|mL|per ?cent|%"
WORDS = r"two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|twenty|thirty|forty|fifty|hundred|thousand"


def typed(source):
    "What looks like a result in a Typst source: numbers, counts in words, verdicts; each with what stands around it."
    prose = re.sub(r"//.*", "", source).replace("five patients or fewer", "").replace("on five\npatients or fewer", "")
    found = re.findall(rf".*\b(?:{WORDS})\s+(?:{COUNTED})\b.*", prose, re.IGNORECASE)
    found += re.findall(rf".*\b(?:{'|'.join(VERDICTS)})\b.*", prose, re.IGNORECASE)
    for formula in re.findall(r"\$[^$]*\$", prose):  # an equation has letters or brackets, and no decimals
        if re.search(r"\d\.\d", formula) or (re.search(r"\d", formula) and not re.search(r"[a-z\[]", formula)):
            found.append(formula)
    rest = re.sub(r"\$[^$]*\$", "", prose)
    for pattern in NO_RESULTS:
        rest = re.sub(pattern, "", rest)
    return found + [line for line in rest.splitlines() if re.search(r"\d", line)]


@pytest.fixture(scope="module")
def sources(project):
    "name -> text of the Typst sources."
    return {path.name: path.read_text(encoding="utf-8") for path in (project / "paper").glob("*.typ")}


def test_no_result_is_typed(sources):
    assert set(sources) == {"paper.typ", "results.typ"}
    assert {name: typed(source) for name, source in sources.items()} == {"paper.typ": [], "results.typ": []}


@pytest.mark.many
@pytest.mark.parametrize("line", [
    "The mean was 0.634.", "It trained 4,920 parameters.", "We tested 12 patients.", "We tested twelve patients in all.",
    "There were two\nseeds.", "Scores rose by 12 %.", "Scores rose by 12%.", "The mean was $0.634$.", "It held $30$ patients.",
    'The mean was "0.634".', "#let best = 0.634", "#number(0.634)", "(p < 0.05)", "- 3 of them failed.", "It was < 5 points.",
    "The first claim is supported.", "It stays inconclusive.", "Claim two was not tested.", '#let verdict = "contradicted"',
])  # fmt: skip
@pytest.mark.parametrize("place", ["= Introduction\n", "= Limits\n", "_shallow_ "])
def test_a_typed_result_is_found(sources, line, place):
    source = sources["paper.typ"]
    assert source.count(place) == 1
    assert typed(source.replace(place, f"{place}{line}\n"))


# ---- invented results, in the form of results.json

ADAPTERS = ("lora-c", "convlora", "cp-lora", "dora-c", "convdora", "cp-dora")
ALWAYS = {"overview", "network", "cohorts", "curves", "dice", "overlays"}


def scores(mean, n=30):
    return {"n": n, "missing": 0, "mean": mean, "sd": 0.1 if n > 1 else None, "median": mean}


def a_run(method, region="", rank=8, seed=0, mean=0.5, role="test", **more):
    name = method + (f"-r{rank}" if method in ADAPTERS else "") + (f"-{region}" if region else "")
    name = more.pop("front", "") + name + more.pop("back", "")
    return {"id": f"{name}-s{seed}", "name": name, "method": method, "region": region, "rank": rank, "seed": seed, "extras": False,
            "network": "", "patients": None, "steps": 800, "learning_rate": 0.001, "rates": [0.001], "tried": [{}], "flags": [], "notes": [],
            "trainable": 0 if method == "none" else 1000 + 37 * rank, "folds": 3, "last_loss": 0.3,
            "batch_norm": {"follow the batch": 3, "keep still": 18, "trained": 3} if region else {"recomputed": False},
            f"{role}_dice_soft": scores(mean), f"{role}_dice_hard": scores(mean + 0.0107), f"{role}_hd95_mm": scores(40 * mean), **more}


def study(**changes):
    return {"study": "tiny", "title": "A tiny study", "note": "Invented.", "synthetic": True, "threads": 1, "precision": "auto", "folds": 3,
            "seeds": [0], "source": {"layout": "phantom"}, "target": {"layout": "phantom"}, "network": {"name": "multi-view-unet"},
            "finetune": {"batch_size": 8, "options": {}}, **changes}


def a_claim(number, verdict):
    known = verdict != "not tested"
    return {"number": number, "claim": CLAIMS[number].claim, "verdict": verdict, "test": "a test", "effect": 0.0123 * number if known else None,
            "interval": [-0.0171, 0.0431] if known else None, "p": 0.0317 if known else None, "n": 30 if known else None, "dropped": 0,
            "reason": "", "sentence": f"Sentence {number} of the ledger.", "details": []}


def small(shift=0.0):
    "Results without adapters' ranks, amounts, other networks or missing runs, one seed."
    runs = [a_run("none", mean=0.4111 + shift), a_run("fine-tuning", "decoding", mean=0.5222 + shift),
            a_run("cp-lora", "decoding", mean=0.5333 + shift)]
    return whole(runs, claims=[a_claim(1, "supported"), a_claim(2, "inconclusive"), a_claim(3, "contradicted"), a_claim(4, "not tested"),
                               a_claim(5, "not tested")], shift=shift)


def whole(runs, shift=0.0, claims=(), **more):
    "Everything that follows from runs, with invented numbers."
    names = list(dict.fromkeys(run["name"] for run in runs))
    mean = {run["name"]: run["test_dice_soft"]["mean"] for run in runs}
    seeds = len({run["seed"] for run in runs})
    rows = [{"run": run["id"], "patient": f"p{i}", "role": "test", "volume_ml": 10.0 * i + 3, "dice_soft": run["test_dice_soft"]["mean"]}
            for run in runs for i in range(3)]
    return {
        "study": study(), "plan": Plan().model_dump(), "claims": list(claims), "runs": runs, "patients": rows,
        "pretrain": {"parameters": 232737, "steps": 1500, "batch_size": 8, "learning_rate": 0.001},
        "cohorts": {role: {"patients": 30, "scans": 30, "blood_ml": {"min": 1.25 + shift, "median": 40.0, "max": 133.0}}
                    for role in ("source", "target")},
        "summaries": [{"strategy": name, "n": 30, "mean": mean[name], "sd": 0.1234, "low": mean[name] - 0.0411, "high": mean[name] + 0.0433}
                      for name in names],
        "seeds": [{"strategy": name, "seeds": seeds, "sd_seeds": 0.0123 if seeds > 1 else None, "sd_patients": 0.1234} for name in names],
        "bins": [{"strategy": name, "bin": one, "n": n, "mean": mean[name] + 0.05 if n else None, "sd": 0.1 if n else None, "low": None,
                  "high": None} for name in names for one, n in (("0", 0), ("<25", 8), ("25-50", 12), (">100", 10))],
        "volumes": [{"strategy": name, "n": 30, "bias": -3.21 - shift, "bias_low": -6.0, "bias_high": -1.0, "loa_low": -20.0, "loa_high": 14.0,
                     "ccc": 0.91, "ccc_low": 0.8, "ccc_high": 0.95, "icc": 0.92, "icc_low": 0.81, "icc_high": 0.96, "slope": -0.12,
                     "slope_p": 0.0004} for name in names],
        "amounts": [], "networks": [], "failed": [], "missing": [],
        "published": [{"what": "no fine-tuning", "strategy": "none", "mean": 0.41, "sd": 0.26, "source": "a journal"},
                      {"what": "adapters", "strategy": None, "claim": 2, "mean": None, "sd": None, "value": "higher", "source": "a journal"}],
        "provenance": {"commit": "abcdef0123456789+changes", "configuration": "9f" * 32, "sahlora": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
        **more}  # fmt: skip


def large():
    "Results of the committed study's size: 26 strategies, two seeds, amounts, another network."
    regions = ("shallow", "deep", "encoding", "decoding", "all")
    strategies = [("none",), ("norm-stats",), ("scratch",), *(("fine-tuning", region) for region in regions),
                  *((method, "decoding", rank) for method in ADAPTERS for rank in (2, 8, 32))]
    runs = [a_run(*one, seed=seed, mean=0.40012 + 0.0071 * i) for i, one in enumerate(strategies) for seed in (0, 1)]
    found = whole(runs, claims=[a_claim(number, "supported") for number in sorted(CLAIMS)])
    found["runs"] += [a_run("scratch", patients=5, back="-n5"), a_run("cp-lora", "decoding", network="unet", front="unet-"),
                      a_run("cp-lora", "decoding", extras=True, back="-extras")]
    found["amounts"] = [{"strategy": "scratch", "patients": k, "n": 30, "mean": 0.3 + k / 100, "low": 0.2, "high": 0.5} for k in (5, 20)]
    found["networks"] = [{"network": "unet", "parameters": 1_234_567, "strategy": "cp-lora-r8-decoding", "trainable": 4321, "n": 30,
                          "mean": 0.4777, "sd": 0.1, "low": 0.44, "high": 0.51}]
    return found


def broken():
    "A study of which runs failed and never ran, and one collapsed."
    found = large()
    found |= {"failed": [{"id": "cp-lora-r64-s0", "name": "cp-lora-r64", "error": "ValueError: a bad *word*", "notebook": "x"}],
              "missing": ["cp-lora-r64-s1"], "amounts": [], "networks": []}
    found["runs"][4]["flags"] = ["fold 1 collapsed"]
    found["runs"][20]["notes"] = ["the magnitude does nothing: layers.0"]
    return found


def fit_only():
    "A study whose only scores are a fit: nothing is tested, no spacing is known."
    runs = [a_run("none", role="fit", mean=0.4111), a_run("fine-tuning", "decoding", role="fit", mean=0.5222)]
    found = whole([{**run, "test_dice_soft": scores(0.3, n=1)} for run in runs])
    rows = [{**row, "role": "fit" if row["patient"] == "p1" else "test", "volume_ml": None} for row in found["patients"]]
    found |= {key: [] for key in ("summaries", "seeds", "bins", "volumes", "claims")}
    found["cohorts"] = {role: {"patients": 2, "scans": 2, "blood_ml": None} for role in ("source", "target")}
    split = {"train": ["a"], "test": ["b"], "fit": True}
    return found | {"patients": rows, "study": study(synthetic=False, folds=split, source={"layout": "ct-ich"}, target={"layout": "ct-ich"})}


def bare():
    "No fine-tuning alone, and none of the keys that may be left out."
    found = whole([a_run("none", mean=0.4111)])
    return {key: value for key, value in found.items() if key not in (
        "amounts", "networks", "bins", "volumes", "claims", "failed", "missing", "published", "seeds")}  # fmt: skip


def elsewhere():
    "A study of which every run is on another network."
    found = whole([a_run("none", network="unet", front="unet-"), a_run("cp-lora", "decoding", network="unet", front="unet-")])
    rows = [{"network": "unet", "parameters": 99_000, "strategy": name, "trainable": 1296, "n": 30, "mean": 0.5, "sd": 0.1, "low": 0.4, "high": 0.6}
            for name in ("none", "cp-lora-r8-decoding")]
    return found | {key: [] for key in ("summaries", "seeds", "bins", "volumes", "claims")} | {"networks": rows}


def own():
    "A network with a region of its own, and a metric that the claims are about, both registered by a file of the study."
    runs = [{**a_run(method, region, mean=mean), "test_recall": scores(mean + 0.1234)}
            for method, region, mean in (("none", "", 0.4111), ("fine-tuning", "back", 0.5222))]
    found = whole(runs, scores={"dice_soft": "soft Dice", "recall": "recall of *voxels*"})
    return found | {"study": study(network={"name": "tiny-net"}), "plan": found["plan"] | {"score": "recall"}}


STUDIES = {  # results and the figures that they call for beside those that every study has
    "small": (small, {"bins", "volumes", "ledger"}), "large": (large, {"bins", "volumes", "ledger", "parameters", "amounts"}),
    "broken": (broken, {"bins", "volumes", "ledger", "parameters"}), "fit only": (fit_only, set()), "bare": (bare, set()),
    "elsewhere": (elsewhere, set()), "own": (own, {"bins", "volumes"}),
}  # fmt: skip

# ---- the document


class Paper:
    "A paper made from results in a folder; only the figures that belong to it are there."

    def __init__(self, project, folder, results, figures):
        (folder / "figures").mkdir()
        for source in (*(project / "paper").glob("*.typ"), project / "paper/refs.bib"):
            shutil.copy(source, folder)
        (folder / "results.json").write_text(json.dumps(results, allow_nan=False))
        for name in figures:
            (folder / f"figures/{name}.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="240" height="120"/>')
        self.source = {"root": str(folder), "ignore_system_fonts": True}
        self.main = str(folder / "paper.typ")

    def pdf(self):
        "(PDF, warnings)."
        return typst.compile_with_warnings(self.main, format="pdf", timestamp=0, **self.source)

    def find(self, selector):
        "Elements of one kind, as nested dictionaries."
        return json.loads(typst.query(self.main, selector, **self.source))

    @property
    def text(self):
        "All its paragraphs, lists, tables and captions."
        kinds = ("heading", "par", "figure", "enum", "list")
        return "\n".join(text_of(element) for kind in kinds for element in self.find(kind)).replace("\u200b", "").replace("  ", " ")


def text_of(element):
    "The words of an element."
    if isinstance(element, list):
        return "".join(map(text_of, element))
    if not isinstance(element, dict):
        return ""
    if element.get("func") in ("text", "raw"):
        return element["text"]
    words = " " if element.get("func") == "space" else "".join(text_of(value) for key, value in element.items() if key != "label")
    return words + " " * (element.get("func") in ("cell", "item"))


@pytest.fixture
def paper(project, tmp_path_factory):
    "A function: results and further figures -> Paper."
    return lambda results, figures=(): Paper(project, tmp_path_factory.mktemp("paper"), results, ALWAYS | set(figures))


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_of_any_kind_gives_a_paper_that_uses_its_figures(paper, name):
    make, figures = STUDIES[name]
    made = paper(make(), figures)
    pdf, warnings = made.pdf()
    assert pdf.startswith(b"%PDF") and not warnings
    pictures = [one for one in made.find("figure") if one["kind"] == "image"]
    assert len(pictures) == len(ALWAYS | figures)  # the same bytes twice, too:
    assert made.pdf()[0] == pdf


@pytest.mark.parametrize("name", STUDIES)
def test_every_figure_and_table_has_a_caption_and_is_referred_to(paper, name):
    make, figures = STUDIES[name]
    made = paper(make(), figures)
    shown, targets = made.find("figure"), {ref["target"] for ref in made.find("ref")}
    assert {one["label"] for one in shown} <= targets
    note = [re.search("synthetic, no clinical claim", text_of(one["caption"]), re.IGNORECASE) for one in shown if one["label"] != "<network>"]
    assert all(note) if make()["study"]["synthetic"] else not any(note)


def test_numbers_are_those_of_the_results(paper):
    results = large()
    text = paper(results, STUDIES["large"][1]).text
    for row in results["summaries"]:
        assert f"{row['mean']:.3f}" in text and f"{row['low']:.3f} to {row['high']:.3f}" in text, row
    adapter = next(run for run in results["runs"] if run["name"] == "cp-lora-r32-decoding")
    for number in (f"{adapter['trainable']:,}", "232,737", "1,500", "1.3 to 133.0 mL", "−3.2 mL", "−6.0 to −1.0", "< 0.001", "1,234,567", "4,321",
                   "0.478 (0.440 to 0.510)", "0.350", "0.410 ± 0.260", "0.123", "0.032", "abcdef0123456789+changes"):
        assert number in text, number
    hard = sum(run["test_dice_hard"]["mean"] for run in results["runs"] if run["name"] == "scratch" and not run["patients"]) / 2
    assert f"{hard:.3f}" in text


def test_verdicts_are_those_of_the_ledger(paper):
    results = small()
    text = paper(results, STUDIES["small"][1]).text
    abstract = next(line for line in text.splitlines() if "Abstract" in line)
    for words in ("supported: 1", "inconclusive: 2", "contradicted: 3", "not tested: 4 and 5"):
        assert words in abstract, abstract
    for claim in results["claims"]:
        assert f"{claim['claim']} {claim['verdict'].capitalize()}. {claim['sentence']}" in text
    for claim in results["claims"]:
        claim["verdict"] = "contradicted"
    other = paper(results, STUDIES["small"][1]).text
    assert "contradicted: 1, 2, 3, 4 and 5" in other and "inconclusive" not in other.lower() and "supported" not in other.lower()


def test_a_verdict_under_revision_stands_with_its_reason(paper):
    results = small()
    for claim in results["claims"][1:4]:
        claim |= {"verdict": "under revision", "reason": REVISION, "sentence": f"{claim['sentence']} This is under revision: {REVISION}."}
    made = paper(results, STUDIES["small"][1])
    captions = {figure["label"]: text_of(figure["caption"]) for figure in made.find("figure")}
    abstract = next(line for line in made.text.splitlines() if "Abstract" in line)
    assert f"under revision: 2, 3 and 4 ({REVISION})" in abstract and "supported: 1" in abstract
    for label in ("<overview>", "<ledger>", "<claims>"):
        assert f"Under revision: {REVISION}." in captions[label]
    assert "claim 2: under revision" in made.text and not re.search("inconclusive|contradicted", made.text)


def test_surface_dice_stands_with_its_tolerance_or_not_at_all(paper):
    assert "surface dice" not in paper(small(), STUDIES["small"][1]).text.lower()
    results = small()
    for run in results["runs"]:
        run["test_nsd"] = scores(0.8765)
    for row in results["patients"]:
        row |= {"nsd": 0.8765, "tolerance_mm": 5.0}
    text = paper(results, STUDIES["small"][1]).text
    assert "by area, that lies within 5 mm of the other" in text and "surface Dice, 5 mm" in text and "0.877" in text
    results["patients"][0]["tolerance_mm"] = 7.25
    assert "within 5 and 7.25 mm of the other" in paper(results, STUDIES["small"][1]).text


def test_a_network_and_a_metric_of_ones_own_are_called_by_their_names(paper):
    text = paper(own(), STUDIES["own"][1]).text
    assert "The network of this study, tiny-net, reads" in text and "here: back." in text and "Unet [" not in text
    assert "the score (recall of *voxels*)" in text and "0.646" in text and "shallow" not in text


OUTSIDE = ("#panic()", "$x_{$", "*a* _b_ `c`", "@nobody2020", "<ledger>", '"quotes" \\ #"', "[a](http://x) // b", "= 1", "</script>", "\n\n= A heading")


@pytest.mark.many
@pytest.mark.parametrize("words", OUTSIDE)
def test_words_from_outside_stay_text(paper, words):
    "Titles, notes, errors, notes of runs and names come from files of others."
    results = broken()
    results["study"] |= {"title": words, "note": words}
    results["failed"][0] |= {"error": words, "id": words}
    results["runs"][4]["flags"] = [words]
    results["published"][0]["what"] = words
    results["published"][0]["source"] = words
    made = paper(results, STUDIES["broken"][1])
    pdf, warnings = made.pdf()
    assert pdf.startswith(b"%PDF") and not warnings
    plain = lambda text: re.sub(r"\s+", " ", text)  # noqa: E731
    text, usual = plain(made.text), paper(broken(), STUDIES["broken"][1])
    assert text.count(plain(words).strip()) >= 5
    assert [len(made.find(kind)) for kind in ("heading", "link", "math.equation", "ref")] == [
        len(usual.find(kind)) for kind in ("heading", "link", "math.equation", "ref")]


def test_other_results_give_other_numbers(paper):
    one, other = (paper(small(shift), STUDIES["small"][1]).text for shift in (0.0, 0.25))
    for row in small()["summaries"]:
        assert f"{row['mean']:.3f}" in one and f"{row['mean']:.3f}" not in other
        assert f"{row['mean'] + 0.25:.3f}" in other and f"{row['mean'] + 0.25:.3f}" not in one


def test_missing_and_collapsed_runs_are_said(paper):
    text = paper(broken(), STUDIES["broken"][1]).text
    abstract = next(line for line in text.splitlines() if "Abstract" in line)
    assert "Incomplete: 1 run failed and 1 run never ran" in abstract
    assert "cp-lora-r64-s0 failed: ValueError: a bad *word*" in text and "cp-lora-r64-s1 never ran" in text
    assert "from scratch †" in text and "fold 1 collapsed" in text and "the magnitude does nothing." in text
    assert "Incomplete" not in paper(small(), STUDIES["small"][1]).text


def test_a_fit_is_called_a_fit(paper):
    text = paper(fit_only()).text
    assert "These are fits" in text and "0.411" in text and "A fit, not a test" in text
    assert "synthetic" not in text.lower() and "of blood" not in text and "pixel spacing unknown" in text


def test_every_reference_of_the_bibliography_is_cited(project, sources):
    keys = set(re.findall(r"^@\w+\{(\w+),", (project / "paper/refs.bib").read_text(), re.MULTILINE))
    assert len(keys) > 20 and keys == set(re.findall(r"@([a-z]+\d{4})\b", sources["paper.typ"]))
