import html.parser
import math
import re
import sys

import pytest

from airl_fast import report as module
from airl_fast.report import (
    Chart,
    ColouredTrace,
    Estimate,
    Section,
    Series,
    Table,
    TraceSet,
    save_chart,
    write_report,
)

HOSTILE = '<script>alert("1")</script> & "quoted"'
VOID = {"meta", "line", "path", "polyline", "polygon", "circle", "br"}


class Page(html.parser.HTMLParser):
    """Checks that every element is closed in order, and keeps names, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.names, self.attributes, self.text = [], [], [], ""
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
        self.text += data


def chart(*series, title="Curve"):
    return Chart(title=title, x_label="step", y_label="pass@1", series=series)


def written(path, *items, **options):
    section = Section(title="Part", text=["A paragraph."], items=items)
    write_report(path / "deep" / "report.html", "Run", [section], **options)
    text = (path / "deep" / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


TRACES = TraceSet(
    title="Traces",
    label="f",
    traces=[
        ColouredTrace(
            title="one",
            prompt="1+1=",
            spans=[("1+1=3\n", -2.0), ("#3", 1.0), ("!", 0.0)],
            wrong=0,
        )
    ],
)


def test_everything_is_shown_and_nothing_is_fetched(tmp_path):
    table = Table(
        title="Methods",
        columns=["method", "pass@1", "steps", "seconds"],
        rows=[["AIRL", Estimate(0.69666, 0.68, 0.71249), 60, 1.5], ["none", "", 0, 0.0]],
        note="95% intervals",
    )
    curve = chart(Series(name="a", x=[0, 1], y=[0.1, 0.2], low=[0, 0.1], high=[0.2, 0.3]))
    text, page = written(
        tmp_path, table, curve, TRACES, conclusions=["It holds."], facts={"command": "airl-fast"}
    )
    for expected in (
        "Run", "Part", "A paragraph.", "It holds.", "airl-fast", "Methods", "0.697",
        "0.680 to 0.712", "60", "1.500", "95% intervals", "Curve", "pass@1", "1+1=3",
    ):  # fmt: skip
        assert expected in page.text
    assert page.text.index("It holds.") < page.text.index("Part")
    assert not {"script", "link", "img", "iframe"} & set(page.names)
    assert not re.search(r"https?:|url\(|@import", text)
    assert "prefers-color-scheme" in text


def test_text_from_outside_is_escaped_everywhere(tmp_path):
    items = [
        Table(title=HOSTILE, columns=[HOSTILE, HOSTILE], rows=[[HOSTILE, HOSTILE]], note=HOSTILE),
        Chart(
            title=HOSTILE,
            x_label=HOSTILE,
            y_label=HOSTILE,
            series=[Series(name=HOSTILE, x=[0, 1], y=[0, 1])],
        ),
        TraceSet(
            title=HOSTILE,
            label=HOSTILE,
            traces=[ColouredTrace(title=HOSTILE, prompt=HOSTILE, spans=[(HOSTILE, 1.0)])],
        ),
    ]
    path = tmp_path / "r.html"
    section = Section(title=HOSTILE, text=[HOSTILE], items=items)
    write_report(path, HOSTILE, [section], conclusions=[HOSTILE], facts={HOSTILE: HOSTILE})
    page = Page(path.read_text())
    assert "script" not in page.names
    assert "alert" in page.text
    assert not any("alert" in str(key) for a in page.attributes for key in a)


def test_lines_go_through_the_points_and_break_at_gaps(tmp_path):
    y = [0.0, 0.5, math.nan, 1.0, 0.0]
    _, page = written(tmp_path, chart(Series(name="a", x=[0, 10, 20, 30, 40], y=y)))
    lines = [a["points"] for a in page.attributes if "points" in a]
    points = [[tuple(map(float, p.split(","))) for p in line.split()] for line in lines]
    assert [len(line) for line in points] == [2, 2]
    (x0, bottom), (_, middle) = points[0]
    (_, top), (x4, bottom_again) = points[1]
    assert x0 == module._LEFT
    assert x4 == module._WIDTH - module._RIGHT
    assert top < middle < bottom == bottom_again
    assert middle == pytest.approx((top + bottom) / 2, abs=0.2)


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
    ticks, (low, high) = module._axis(values, tight=False)
    assert [text for _, text in ticks] == texts
    assert low <= min(values) < max(values) <= high


@pytest.mark.parametrize("value", [0.0, 5.0, -1e-9, 1e12])
def test_one_point_has_an_axis(value):
    for tight in (True, False):
        ticks, (low, high) = module._axis([value], tight=tight)
        assert low < value < high
        assert 2 <= len(ticks) <= 12


def test_spans_are_coloured_by_their_distance_from_the_centre(tmp_path):
    text, page = written(tmp_path, TRACES)
    spans = [a for a in page.attributes if "data-tip" in a]
    assert [a["class"] for a in spans] == ["s lo wrong", "s hi", "s lo"]
    strength = [float(a["style"].removeprefix("--a:")) for a in spans]
    assert strength[0] == 0.75
    assert strength[0] > strength[1] > strength[2] == 0
    assert spans[0]["data-tip"] == "span 0: f -2 (known to be wrong)"
    assert "known to be wrong" not in spans[1]["data-tip"]
    assert f"&le; {-TRACES.limit:.3g}" in text


def test_equal_rewards_and_no_traces_have_a_scale():
    assert TraceSet(title="t", traces=[]).limit == 1
    flat = ColouredTrace(title="t", prompt="p", spans=[("a", 2.0), ("b", 2.0)])
    assert TraceSet(title="t", traces=[flat], centre=2.0).limit == 1


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
    with pytest.raises(ValueError, match="finite rewards"):
        TraceSet(title="t", traces=[ColouredTrace(title="t", prompt="", spans=[("a", math.inf)])])


def test_charts_are_saved_for_papers(tmp_path):
    pytest.importorskip("matplotlib")
    curve = chart(Series(name="a", x=[0, 1], y=[0.1, 0.2], low=[0, 0.1], high=[0.2, 0.3]))
    save_chart(tmp_path / "c.pdf", curve)
    assert (tmp_path / "c.pdf").read_bytes().startswith(b"%PDF")


def test_saving_a_chart_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"airl-fast\[report\]"):
        save_chart(tmp_path / "c.pdf", chart(Series(name="a", x=[0], y=[0])))
