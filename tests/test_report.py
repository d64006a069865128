"""Pages, tables and charts; traces are in test_report_traces.py, the browser in _browser.py."""

import base64
import hashlib
import html.parser
import math
import re
import sys

import numpy as np
import pytest

from airl_fast.report import (
    Chart,
    CurvePoint,
    Estimate,
    EvalSummary,
    ReliabilityBin,
    Section,
    Series,
    Table,
    TraceSet,
    save_chart,
    svg,
    write_report,
)
from airl_fast.report.summary import histogram
from airl_fast.report.text import escape, json_block, visible
from tests.report_pages import HOSTILE, trace_of

VOID = {"meta", "link", "line", "path", "polyline", "polygon", "circle", "br", "input"}


class Page(html.parser.HTMLParser):
    """Checks that every element is closed in order, and keeps names, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.names, self.attributes, self.text = [], [], [], ""
        self.inside = {"style": "", "script": ""}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.names.append(tag)
        self.attributes.append(dict(attributes))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in self.inside:
            self.inside[self.open[-1]] = data  # the last: the page's own script
        else:
            self.text += data


def chart(*series, title="Curve", **options):
    return Chart(title=title, x_label="step", y_label="pass@1", series=series, **options)


def written(path, *items, **options):
    section = Section(title="Part", text=["A paragraph."], items=items, pre="a: 1")
    write_report(path / "deep" / "report.html", "Run", [section], **options)
    assert [file.name for file in (path / "deep").iterdir()] == ["report.html"]
    text = (path / "deep" / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


BAND = Series(name="a", x=[0, 1], y=[0.1, 0.2], low=[0, 0.1], high=[0.2, 0.3])


def test_everything_is_shown_and_nothing_may_be_fetched(tmp_path):
    table = Table(
        title="Methods",
        columns=["method", "pass@1", "steps", "seconds"],
        rows=[["AIRL", Estimate(0.69666, 0.68, 0.71249), 60, 1.5], ["none", "", 0, 0.0]],
        note="95% intervals",
    )
    traces = TraceSet(title="Traces", traces=[trace_of("one\n", "two")])
    text, page = written(
        tmp_path, table, chart(BAND), traces, conclusions=["It holds."], facts={"seed": "7"}
    )
    for expected in (
        "Run", "Part", "A paragraph.", "It holds.", "seed", "Methods", "0.697", "a: 1",
        "0.680 to 0.712", "60", "1.500", "95% intervals", "Curve", "pass@1", "one",
    ):  # fmt: skip
        assert expected in page.text
    assert page.text.index("It holds.") < page.text.index("Part")
    assert not {"img", "iframe", "base", "form", "object"} & set(page.names)
    assert not re.search(r"https?:|url\(|@import|\bsrc=", text)
    assert [a["href"] for a in page.attributes if "href" in a] == ["data:,"]
    assert not any("style" in a or any(k.startswith("on") for k in a) for a in page.attributes)


def test_the_policy_allows_this_style_and_this_script_alone(tmp_path):
    _, page = written(tmp_path, TraceSet(title="t", traces=[trace_of("x")]))
    (policy,) = (a["content"] for a in page.attributes if "http-equiv" in a)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    for kind in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.inside[kind].encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"


def test_a_page_without_traces_has_no_script(tmp_path):
    _, page = written(tmp_path, chart(BAND))
    assert "script" not in page.names


def test_text_from_outside_is_escaped_everywhere(tmp_path):
    items = [
        Table(title=HOSTILE, columns=[HOSTILE, HOSTILE], rows=[[HOSTILE, HOSTILE]], note=HOSTILE),
        Chart(
            title=HOSTILE,
            x_label=HOSTILE,
            y_label=HOSTILE,
            series=[Series(name=HOSTILE, x=[0, 1], y=[0, 1])],
            note=HOSTILE,
            marks=[(0, HOSTILE)],
        ),
        TraceSet(
            title=HOSTILE, traces=[trace_of(HOSTILE, title=HOSTILE, prompt=HOSTILE)], note=HOSTILE
        ),
    ]
    path = tmp_path / "r.html"
    section = Section(title=HOSTILE, text=[HOSTILE], items=items, pre=HOSTILE)
    write_report(path, HOSTILE, [section], conclusions=[HOSTILE], facts={HOSTILE: HOSTILE})
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.names.count("script") == 2  # the data and the viewer
    assert "alert" in page.text
    assert not any("alert" in str(key) for a in page.attributes for key in a)
    assert not re.search("[\0\u202e\ud800-\udfff]", text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc 😀 é ‍ ש", "a\tb\nc 😀 é ‍ ש"),
        ("\0", "⟨U+0000⟩"),
        ("x\r\x1b[0m", "x⟨U+000D⟩⟨U+001B⟩[0m"),
        ("\u202eevil\u2066", "⟨U+202E⟩evil⟨U+2066⟩"),
        ("\ud83d", "⟨U+D83D⟩"),
    ],
)
def test_what_cannot_be_seen_is_spelled(text, shown):
    assert visible(text) == shown
    assert escape(f"<{text}>") == f"&lt;{shown}&gt;"


def test_json_in_a_page_holds_no_markup():
    block = json_block({"</script>": "<!-- & \u2028 \0 \ud800"})
    assert not set("<>&\u2028\0") & set(block)
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_block(math.nan)


def drawn(item):
    return Page(svg.svg(item)).attributes


def lines(item):
    """The points of every line, in the plane of the drawing."""
    found = [a["points"] for a in drawn(item) if "line" in a.get("class", "").split()]
    return [[tuple(map(float, p.split(","))) for p in line.split()] for line in found]


def test_lines_go_through_the_points_and_break_at_gaps():
    y = [0.0, 0.5, math.nan, 1.0, 0.0]
    first, second = lines(chart(Series(name="a", x=[0, 10, 20, 30, 40], y=y)))
    (x0, bottom), (_, middle) = first
    (_, top), (x4, bottom_again) = second
    assert (x0, x4) == (svg.LEFT, svg.WIDTH - svg.RIGHT)
    assert top < middle < bottom == bottom_again
    assert middle == pytest.approx((top + bottom) / 2, abs=0.2)


def test_doublings_are_equally_far_apart():
    (line,) = lines(chart(Series(name="a", x=[1, 2, 4, 8], y=[0, 1, 0, 1]), x_log=True))
    gaps = np.diff([x for x, _ in line])
    assert gaps == pytest.approx([gaps[0]] * 3, abs=0.2)
    with pytest.raises(ValueError, match="above 0"):
        chart(Series(name="a", x=[0], y=[0]), x_log=True)


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0.0, 1.0], ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ([0.51, 0.74], ["0.50", "0.55", "0.60", "0.65", "0.70", "0.75"]),
        ([-3.2, 1.0], ["-4", "-3", "-2", "-1", "0", "1"]),
        ([0, 1000], ["0", "200", "400", "600", "800", "1000"]),
        ([0, 4e6], ["0", "1e+06", "2e+06", "3e+06", "4e+06"]),
    ],
)
def test_ticks_are_round(values, texts):
    ticks, (low, high) = svg.axis(values, tight=False)
    assert [text for _, text in ticks] == texts
    assert low <= min(values) < max(values) <= high


@pytest.mark.parametrize("value", [0.0, 5.0, -1e-9, 1e12])
def test_one_point_has_an_axis(value):
    for tight in (True, False):
        ticks, (low, high) = svg.axis([value], tight=tight)
        assert low < value < high
        assert 2 <= len(ticks) <= 12


def test_a_chart_has_its_numbers_as_a_table():
    other = Series(name="b", x=[1, 2], y=[5, math.nan])
    table = svg.numbers(chart(BAND, other))
    assert table.columns == ("step", "a", "b")
    assert table.rows == [
        ["0", "0.1 (0 to 0.2)", ""],
        ["1", "0.2 (0.1 to 0.3)", "5"],
        ["2", "", ""],
    ]
    long = svg.numbers(chart(Series(name="a", x=range(1000), y=range(1000))))
    assert [row[0] for row in long.rows] == [str(x) for x in range(0, 1000, 5)]
    assert long.note == "Every 5th of 1,000 rows."


def test_a_histogram_counts_every_value_once():
    rng = np.random.default_rng(0)
    groups = {"experts": rng.normal(1, 1, 500), "policy": rng.standard_cauchy(300)}
    made = histogram(groups, label="f")
    rows = np.array([row[1:] for row in made.table.rows])
    assert rows.sum(0).tolist() == [500, 300]
    for series, column in zip(made.series, rows.T, strict=True):
        assert series.y == pytest.approx([*(column / column.sum()), 0])
    edges, experts = made.series[0].x, groups["experts"]
    below = [int((experts < edge).sum()) for edge in edges]
    assert np.diff(below).tolist() == rows[:, 0].tolist()
    assert sum(row[1] for row in histogram({"a": [2.0, 2.0]}, label="f").table.rows) == 2
    with pytest.raises(ValueError, match="no values"):
        histogram({"a": []}, label="f")


SUMMARY = EvalSummary(
    title="GSM8K",
    numbers={"AUC of f": Estimate(0.81, 0.78, 0.84), "pass@1": 0.31},
    curves={"f": [CurvePoint(n=4, mean=0.5, low=0.4, high=0.6),
                  CurvePoint(n=1, mean=0.3, low=0.2, high=0.4)]},
    reliability={"f": [ReliabilityBin(p_mean=0.2, fraction=0.5, count=10),
                       ReliabilityBin(p_mean=0.8, fraction=0.8, count=30)]},
    histograms={"correct": [1.0, 2.0], "wrong": [-1.0]},
    notes=["95% intervals"],
)  # fmt: skip


def test_a_summary_survives_json_and_is_shown_whole(tmp_path):
    assert EvalSummary.from_json(SUMMARY.to_json()) == SUMMARY
    section = SUMMARY.section()
    titles = [item.title for item in section.items]
    assert titles == ["Numbers", "Best of N", "Reliability", "Distribution of reward"]
    numbers, curve, reliability, _ = section.items
    assert numbers.rows[0] == ["AUC of f", Estimate(0.81, 0.78, 0.84)]
    assert (list(curve.series[0].x), list(curve.series[0].y)) == ([1, 4], [0.3, 0.5])
    assert "0.075" in reliability.note  # (10 * 0.3 + 30 * 0) / 40
    assert [row[-1] for row in reliability.table.rows] == [10, 30]
    write_report(tmp_path / "r.html", "r", [section])
    assert "95% intervals" in Page((tmp_path / "r.html").read_text(encoding="utf-8")).text
    assert EvalSummary().section().items == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "expected an object .* got list"),
        ({"curve": {}}, r"keys among .* got \['curve'\]"),
        ({"curves": {"f": [[1, 2]]}}, "'curves' is not as documented"),
        ({"curves": {"f": [[0, 0.1, 0.1, 0.1]]}}, "n >= 1"),
        ({"numbers": {"a": "x"}}, "'numbers' is not as documented"),
        ({"reliability": {"f": [[0.5, 1.5, 3]]}}, "fraction in"),
        ({"histograms": {"f": [float("inf")]}}, "expected finite values"),
    ],
)
def test_a_summary_of_another_form_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        EvalSummary.from_json(value, "metrics.json")


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="row 0 has 1"):
        Table(title="t", columns=["a", "b"], rows=[["x"]])
    with pytest.raises(ValueError, match="as long as x"):
        Series(name="s", x=[0, 1], y=[0])
    with pytest.raises(ValueError, match="low and high or neither"):
        Series(name="s", x=[0], y=[0], low=[0])
    with pytest.raises(ValueError, match="finite x"):
        Series(name="s", x=[math.nan], y=[0])
    with pytest.raises(ValueError, match="leave the chart out"):
        chart(Series(name="s", x=[0], y=[math.nan]))


def test_charts_are_saved_for_papers(tmp_path):
    pytest.importorskip("matplotlib")
    items = SUMMARY.section().items[1:]
    for i, item in enumerate([chart(BAND, marks=[(0.5, "phase")]), *items]):
        save_chart(tmp_path / f"{i}.pdf", item)
        assert (tmp_path / f"{i}.pdf").read_bytes().startswith(b"%PDF")


def test_saving_a_chart_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"airl-fast\[report\]"):
        save_chart(tmp_path / "c.pdf", chart(BAND))
