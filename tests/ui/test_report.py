"""The report: one file, nothing from outside, everything in it, and no name that could become markup."""

from __future__ import annotations

import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest

import app
from merging.analysis.inspection import Inspection
from merging.analysis.inspection_run import inspect
from merging.errors import OutputError
from tests.small_checkpoints import family, llama_like, merge, recipe, save
from ui import report as module
from ui.chart import Chart
from ui.charts import charts_of
from ui.report import command, report, write_report

KEYS = ["sizes", "importance", "cosine", "kept", "signs", "ranks", "spectra", "subspaces", "principal"]
NASTY = '<img src=x onerror="alert(1)">{title}&amp;'


class Page(HTMLParser):
    """Elements with their attributes, text of cells, and whether tags are balanced."""

    VOID = {"meta", "br", "img", "link", "input", "hr"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == [], "tags are balanced"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    folder = tmp_path_factory.mktemp("report")
    paths = family(folder, llama_like(2, 16), 3, config={"model_type": "llama"})
    merge(recipe("task_arithmetic", [(p, {"weight": 0.4}) for p in paths[1:]], paths[0]), folder / "merged")
    base, *experts = map(str, paths)
    return inspect(base, experts, str(folder / "merged"), cache=False, threads=1)


@pytest.fixture(scope="module")
def text(result: Inspection) -> str:
    return report(result)


@pytest.fixture(scope="module")
def charts(result: Inspection) -> dict[str, Chart]:
    return {chart.key: chart for chart in charts_of(result)}


def figures(text: str) -> dict[str, dict]:
    match = re.search(r'<script type="application/json" id="figures">(.*?)</script>', text, re.DOTALL)
    assert match
    return json.loads(match[1])


def test_nothing_comes_from_outside(text: str) -> None:
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base", "form", "audio", "video")
        assert "src" not in attributes and "srcset" not in attributes
        if "href" in attributes:
            assert (attributes["href"] or "").startswith("#")
    policy = next(m["content"] for m in page.named("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy and "default-src 'none'" in policy and "http" not in policy and "unsafe-eval" not in policy
    style = "".join(page.texts["style"])
    assert "@import" not in style and "url(" not in style


def test_the_script_is_there_once(text: str) -> None:
    assert len(re.findall(r"plotly\.js v\d", text)) == 1 and 4e6 < len(text) < 8e6
    assert len(Page(text).named("script")) == 4


def test_every_chart_has_a_text_a_figure_and_a_table(charts: dict[str, Chart], text: str) -> None:
    page, drawn = Page(text), figures(text)
    assert list(charts) == KEYS
    ids = {attributes.get("id") for _, attributes in page.elements}
    for chart in charts.values():
        assert chart.key in ids and f"plot-{chart.key}" in ids and len(chart.reading) > 100 and chart.variants
        assert chart.table.rows and all(len(row) == len(chart.table.columns) for row in chart.table.rows)
        assert chart.basis.startswith("exact: ")
        for i, (name, _) in enumerate(chart.variants):
            assert drawn[f"{chart.key}-{i}"]["data"] and (name or len(chart.variants) == 1)
    boxes = [a for a in page.named("div") if a.get("class") == "plot"]
    assert len(boxes) == len(charts) and all(box["role"] == "img" and box["aria-label"] for box in boxes)
    assert all((a.get("href") or "")[1:] in ids for a in page.named("a"))
    assert len(page.named("details")) >= len(charts) + 1


def test_figures_bring_no_look_of_their_own(text: str) -> None:
    """Light or dark is chosen by the page, from two templates that are there once."""
    match = re.search(r'id="templates">(.*?)</script>', text)
    assert match
    templates = json.loads(match[1])
    assert templates["light"]["layout"]["paper_bgcolor"] != templates["dark"]["layout"]["paper_bgcolor"]
    for figure in figures(text).values():
        assert figure["layout"].keys() >= {"height"} and "template" not in figure["layout"]
        assert "paper_bgcolor" not in figure["layout"]
    assert "prefers-color-scheme: dark" in text and "@media print" in text


def test_tables_hold_the_numbers_of_the_charts(result: Inspection, charts: dict[str, Chart]) -> None:
    assert result.changes is not None and result.trimmed is not None and result.spectra is not None
    cosine = result.changes.cosine()
    assert charts["cosine"].table.rows[0][1] == pytest.approx(cosine[0, 1])
    assert list(charts["cosine"].variants[0][1].data[0].z[0]) == pytest.approx(cosine[0].tolist())
    total = result.changes.total(result.changes.select(1, "mlp_up"))
    row = next(row for row in charts["sizes"].table.rows if row[:2] == [1, "mlp_up"])
    assert row[2:] == pytest.approx([norm / total.base_norm for norm in total.norm])
    shares = result.trimmed.shares()
    assert charts["signs"].table.rows[2][2] == pytest.approx(shares[2].conflict)
    row = next(r for r in charts["ranks"].table.rows if r[:2] == ["model.layers.1.mlp.down_proj.weight", "expert3"])
    spectrum = next(s for s in result.spectra if (s.tensor, s.of) == (row[0], row[1]))
    assert row[2:4] == [16, 32] and row[4] == spectrum.measures().effective_rank_of_values
    merged = result.changes.total().merged
    assert merged is not None and [r[1] for r in charts["kept"].table.rows] == merged.projection


def test_what_was_compared_and_how_it_was_made(result: Inspection, text: str) -> None:
    page = Page(text)
    cells = page.texts["td"]
    for facts in result.models.values():
        assert facts["reference"] in cells and facts["fingerprint"][:16] in cells
    assert result.made in text and result.versions["torch"] in text
    assert command(result) in "".join(page.texts["code"])
    assert len(page.named("article")) == len(result.findings)
    for sign, word in (("i", "Note"), ("✓", "Fine")):
        assert sign in page.texts["span"] and any(word in part for part in page.texts["p"])


def test_the_command_makes_the_same_inspection_again(result: Inspection) -> None:
    options = app.parser().parse_args(shlex.split(command(result))[2:])
    assert options.base == result.reference["base"] and options.experts == result.reference["experts"]
    assert options.merged == result.reference["merged"] and options.parts.split(",") == result.options["parts"]
    assert (options.density, options.rank, options.spectra) == (0.2, 16, "gram")


def test_names_are_text_and_nothing_else(tmp_path: Path) -> None:
    state = llama_like(1, 8)
    base = save(tmp_path / "base", state)
    evil = save(tmp_path / NASTY, {name: tensor * 1.1 for name, tensor in state.items()})
    plain = save(tmp_path / "plain", {name: tensor + 0.1 for name, tensor in state.items()})
    found = inspect(str(base), [str(evil), str(plain)], cache=False, threads=1)
    assert found.names[0] == NASTY
    text = report(found)
    page = Page(text)
    assert page.named("img") == [] and len(page.named("script")) == 4
    assert not any("onerror" in (attributes or {}) for _, attributes in page.elements)
    assert "{title}" in "".join(page.texts["h1"])  # as it stands: it is no place to fill in
    assert "onerror" in "".join(page.texts["td"])
    embedded = json.dumps(figures(text))
    assert "<img" not in embedded and "&lt;img" in embedded


@pytest.mark.parametrize("nasty", ["</script><script>alert(1)</script>", "<!--", "\u2028", "]]>"])
def test_nothing_can_end_the_script_that_holds_the_figures(nasty: str) -> None:
    shown = module._json({"x": nasty})
    assert not set("<>&\u2028\u2029") & set(shown) and json.loads(shown) == {"x": nasty}


def test_a_report_of_only_some_parts(result: Inspection, tmp_path: Path) -> None:
    base, experts = result.reference["base"], result.reference["experts"]
    for options, keys in (
        ({"parts": ["doctor"]}, []),
        ({"parts": ["changes"]}, ["sizes", "importance", "cosine"]),
        ({"parts": ["spectra"], "spectra": "preview"}, ["ranks", "spectra"]),
    ):
        found = inspect(base, experts, cache=False, threads=1, **options)
        page = Page(report(found))
        assert [s["id"] for s in page.named("section") if s["id"] in KEYS] == keys
        assert len([a for a in page.named("div") if a.get("class") == "plot"]) == len(keys)
        if options.get("spectra"):
            assert any(p.startswith("estimated: ") for p in page.texts["p"])


def test_one_expert_and_tensors_outside_of_blocks(tmp_path: Path) -> None:
    state = {"a.weight": llama_like(1, 16)["lm_head.weight"], "b": llama_like(1, 16)["model.norm.weight"]}
    base = save(tmp_path / "base", state)
    expert = save(tmp_path / "expert", {name: tensor + 0.1 for name, tensor in state.items()})
    found = inspect(str(base), [str(expert)], cache=False, threads=1)
    charts = {chart.key: chart for chart in charts_of(found)}
    assert "cosine" not in charts and charts["sizes"].variants == [] and charts["sizes"].table.rows
    assert charts["spectra"].variants[0][0] == "a.weight (20 × 16)"
    Page(report(found))


def test_many_rows_are_cut_and_that_is_said(charts: dict[str, Chart], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ROWS", 5)
    count = len(charts["ranks"].table.rows)
    assert f"and {count - 5:,} more rows, which --json holds" in module._table(charts["ranks"].table)


def test_writing(result: Inspection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "report", lambda _: "<p>ü</p>")
    write_report(result, tmp_path / "r.html")
    write_report(result, tmp_path / "r.html")
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"] and (tmp_path / "r.html").read_text("utf-8") == "<p>ü</p>"
    with pytest.raises(OutputError) as caught:
        write_report(result, tmp_path / "none" / "r.html")
    assert caught.value.code == "E_OUTPUT_WRITE"


def test_what_texts_add(tmp_path: Path) -> None:
    """Sensitivities and whitened spectra by expert, hidden states of all models."""
    demo = Path(__file__).resolve().parents[2] / "assets" / "demo"
    experts = [demo / "experts" / name for name in ("sort", "rotate")]
    out = merge(recipe("task_arithmetic", [(e, {"weight": 0.4}) for e in experts], demo / "base"), tmp_path / "merged")
    lines = (demo / "calibration" / "sort.jsonl").read_text("utf-8").splitlines()[:6]
    (tmp_path / "few.jsonl").write_text("\n".join(lines), "utf-8")
    found = inspect(
        str(demo / "base"), [str(e) for e in experts], str(out.folder),
        parts=["texts"], texts=[tmp_path / "few.jsonl"], cache=False, threads=1,
    )  # fmt: skip
    charts = {chart.key: chart for chart in charts_of(found)}
    assert list(charts) == ["sensitivity", "entropy", "whitened", "representations"]
    assert found.texts is not None
    first = found.texts["experts"][0]
    assert charts["whitened"].table.rows[0][:2] == [first["whitened"]["tensors"][0]["tensor"], "sort"]
    assert charts["whitened"].table.rows[0][2] == first["whitened"]["tensors"][0]["effective_rank_of_values"]
    assert [line.name for line in charts["representations"].variants[0][1].data] == ["base", "sort", "rotate", "merged"]
    page = Page(report(found))
    assert {"whitened", "representations"} <= {s["id"] for s in page.named("section")}
