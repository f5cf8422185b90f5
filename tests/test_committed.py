"""The committed study: its figures and paper come out of its numbers byte by byte, its conclusions out of its patients."""
import json

import pytest

from sahlora.report import page as report
from sahlora.report import results
from sahlora.study import schema as study
from sahlora.evaluation.claims import REVISION
from sahlora.common.files import RECORD


@pytest.fixture(scope="module")
def committed(project):
    return json.loads((project / "paper/results/results.json").read_text())


def leaves(content, name=""):
    "(dotted name, value) of everything in nested lists and dicts."
    if not isinstance(content, (dict, list)):
        return [(name, content)]
    items = content.items() if isinstance(content, dict) else enumerate(content)
    return [leaf for key, value in items for leaf in leaves(value, f"{name}.{key}")]


@pytest.mark.long
def test_the_study_file_is_the_one_that_was_run(project, committed):
    later = {"extensions": []}  # a key that came after the run has its default
    assert study.read_study(project / "paper/studies/demo.yaml").model_dump(mode="json") == {**later, **committed["study"]}
    assert len(committed["runs"]) == 58 and not committed["failed"] and not committed["missing"]
    assert set(committed["provenance"]["commit"]) <= set("0123456789abcdef")  # of code without changes


@pytest.mark.long
def test_conclusions_follow_from_the_patients(project, committed):
    again = results._plain(results.conclude(study.read_study(project / "paper/studies/demo.yaml"), committed))
    numbers, kept = (dict(leaves(json.loads(json.dumps(one)))) for one in (again, {key: committed[key] for key in again}))
    assert set(numbers) == set(kept) and len(kept) > 1000
    wrong = []
    for name, value in kept.items():  # scores were rounded when they were written, and a bootstrap's ends move with ties in the last digit
        loose = 5e-3 if name.rsplit(".", 1)[1] in ("low", "high") else 1e-6
        if numbers[name] != (pytest.approx(value, rel=1e-5, abs=loose) if isinstance(value, float) else value):
            wrong.append((name, value, numbers[name]))
    assert not wrong


def test_no_surface_score_by_counted_voxels_is_left(project, committed):
    said = [(project / f"paper/results/{name}").read_text() for name in ("results.json", "patients.csv")] + [json.dumps(committed)]
    assert not any("nsd" in text for text in said)


def test_claims_under_revision_have_no_verdict(committed):
    revised = [claim for claim in committed["claims"] if claim["number"] in (2, 4, 5)]
    assert all(claim["verdict"] == "under revision" and REVISION in claim["sentence"] for claim in revised)


def test_what_it_cost_is_told_run_by_run(project, committed):
    cost = json.loads((project / "paper/results/cost.json").read_text())
    assert set(cost) == {"pretrain", *(run["id"] for run in committed["runs"])}
    assert sum(facts["cpu_seconds"] for facts in cost.values()) / 60 < 2 * 90  # two cores, 90 minutes
    assert not any(facts.get("resumed") for facts in cost.values())


@pytest.mark.long
def test_figures_and_paper_come_out_of_the_numbers_byte_by_byte(project, tmp_path):
    report.draw_figures(project / "paper/results", tmp_path / "figures")
    report.render_pdf(project / "paper/results/results.json", tmp_path / "paper.pdf", figures=tmp_path / "figures")
    kept, drawn = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (project / "paper/figures", tmp_path / "figures"))
    for record in (kept.pop(RECORD), drawn.pop(RECORD)):  # it names the version, which a release changes
        assert set(json.loads(record)["files"]) == set(kept)
    assert set(kept) == set(drawn) and not [name for name in kept if kept[name] != drawn[name]]
    assert (project / "paper/paper.pdf").read_bytes() == (tmp_path / "paper.pdf").read_bytes()
