"""Traces as the report shows them, and the files that they and a run come from."""

import json
import math
import random
from dataclasses import asdict

import pytest

from airl_fast import cli
from airl_fast.report import EvalSummary, Section, TraceSet, TraceView, write_report
from airl_fast.report.run import curve_sections, read_history, report_run
from airl_fast.report.scored import read_traces, traces_sections
from airl_fast.report.traces import Scale
from airl_fast.report.viewer import summary_table
from airl_fast.scores import Scored, StepScore, TokenScores
from tests.report_pages import full_trace, trace_of
from tests.tiny_run import tiny_run  # noqa: F401


def scored(text, step_ends, offsets, *, reward=True, value=0.0):
    """A result whose token i has f = value + i, log pi = -i / 4 and whose steps sum them."""
    n = len(offsets)
    f = tuple(value + i for i in range(n))
    logp = tuple(-i / 4 for i in range(n)) if reward else None
    both = tuple(a - b for a, b in zip(f, logp, strict=True)) if reward else None
    steps, start = [], 0
    for i, end in enumerate(step_ends):
        steps.append(
            StepScore(
                text=text[start:end], start=start, end=end, f=float(i),
                reward=i + 0.5 if reward else None,
            )
        )  # fmt: skip
        start = end
    return Scored(
        text=text,
        f=sum(f),
        reward=sum(both) if reward else None,
        granularity="step",
        steps=tuple(steps),
        tokens=TokenScores(
            ids=tuple(range(n)), offsets=tuple(offsets), f=f, logp=logp, reward=both
        ),
    )


def cut(trace):
    return [[(t.text, t.values.get("f")) for t in step.tokens] for step in trace.steps]


def test_tokens_are_cut_by_characters_not_by_bytes_or_code_units():
    text = "a😀b\nc"
    offsets = [(0, 1), (1, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 5)]
    trace = TraceView.from_scored(scored(text, [4, 5], offsets), title="t")
    assert cut(trace) == [
        [("a", 0), ("", 1), ("😀", 2), ("b", 3), ("\n", 4)],
        [("c", 5), ("", 6)],
    ]
    assert [step.text for step in trace.steps] == ["a😀b\n", "c"]
    assert trace.values == {"f": 21.0, "logp": -5.25, "reward": 26.25}
    assert trace.steps[1].values == {"f": 1.0, "logp": -0.5, "reward": 1.5}
    assert trace.steps[0].tokens[4].values == {"f": 4.0, "logp": -1.0, "reward": 5.0}


def test_any_offsets_spell_the_text_once():
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice("ab \n😀ש") for _ in range(rng.randint(1, 12)))
        at = sorted(rng.randint(0, len(text)) for _ in range(rng.randint(0, 8)))
        offsets = [(i, min(len(text), i + rng.randint(0, 4))) for i in at]  # gaps and overlaps
        ends = sorted({*(rng.randint(1, len(text)) for _ in range(2)), len(text)})
        trace = TraceView.from_scored(scored(text, ends, offsets), title="t")
        shown = ["".join(token.text for token in step.tokens) for step in trace.steps]
        assert shown == [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]
        read = {t.values["f"] for step in trace.steps for t in step.tokens if t.values}
        assert read == {float(i) for i in range(len(offsets))}  # no token is lost


def test_without_a_policy_there_is_f_alone():
    trace = TraceView.from_scored(scored("ab", [2], [(0, 1), (1, 2)], reward=False), title="t")
    assert trace.values == {"f": 1.0}
    assert TraceSet(title="s", traces=[trace]).measures == ("f",)


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(ValueError, match="offsets in"):
        TraceView.from_scored(scored("ab", [2], [(0, 3)]), title="t")
    with pytest.raises(ValueError, match="steps in order"):
        TraceView.from_scored(scored("abcd", [3, 2, 4], []), title="t")
    with pytest.raises(ValueError, match=r"error_step in \[0, 1\).* got 1"):
        trace_of("a", error_step=1)
    with pytest.raises(ValueError, match=r"located in \[0, 1\).* got -1"):
        trace_of("a", located=-1)
    with pytest.raises(ValueError, match="expected finite values"):
        trace_of("a", f=[math.nan])
    with pytest.raises(ValueError, match="one step or more"):
        TraceView(title="t", steps=[])
    with pytest.raises(ValueError, match="one or more; leave the set out"):
        TraceSet(title="s", traces=[])
    mixed = [full_trace(random.Random(0), "full"), trace_of("a", title="f alone")]
    with pytest.raises(ValueError, match=r"trace 'f alone'.* score all traces alike"):
        TraceSet(title="s", traces=mixed)


def test_shades_are_symmetric_around_the_centre_and_full_at_the_limit():
    scale = Scale.of([-4.0, -2.0, 0.0, 2.0, 4.0], 0.0)
    assert (scale.centre, scale.limit) == (0.0, 4.0)
    values = [-9, -4, -3.4, -1, -0.4, 0, 0.4, 1, 3.4, 4, 9]
    assert [scale.shade(v) for v in values] == [-4, -4, -3, -1, 0, 0, 0, 1, 3, 4, 4]
    assert Scale.of([1.0, 2.0, 30.0], None).centre == 2.0  # the median
    assert Scale.of([2.0, 2.0], None).limit == 1.0
    assert Scale.of([0.001, -0.001], 0.0).show(0.001) == "0.001000"
    assert Scale.of([4000.0, -4000.0], 0.0).show(1234.5) == "1234"


def test_every_trace_has_a_row_in_words():
    traces = [
        trace_of("a", "b", title="x", correct=False, error_step=0, located=1),
        trace_of("a", title="y", correct=True),
    ]
    assert summary_table(TraceSet(title="s", traces=traces)).rows == [
        [1, "x", "wrong", "-1", 2, "2", "1"],
        [2, "y", "correct", "0", 1, "", ""],
    ]


# Files


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(n=3, **more):
    return [
        {"id": f"row {i}", **asdict(scored("one\ntwo", [4, 7], [(0, 4), (4, 7)], value=i)), **more}
        for i in range(n)
    ]


def test_files_are_read_line_for_line(tmp_path):
    known = [
        {"id": "row 0", "prompt": "why?", "correct": True, "source": "expert"},
        {"id": "row 1", "problem": "how?", "label": 1},
        {"id": "row 2", "prompt": [{"role": "user", "content": "who?"}], "label": -1, "group": 4},
    ]
    steps = [{"id": f"row {i}", "step": step} for i, step in enumerate([0, 1, None])]
    first, second, third = read_traces(
        jsonl(tmp_path / "s.jsonl", lines()),
        traces=jsonl(tmp_path / "t.jsonl", known),
        located=jsonl(tmp_path / "l.jsonl", steps),
    )
    assert (first.title, first.prompt, first.correct, first.source) == (
        "row 0", "why?", True, "expert",
    )  # fmt: skip
    assert (first.error_step, first.located, first.group) == (None, 0, "why?")
    assert (second.prompt, second.correct, second.error_step, second.located) == (
        "how?", False, 1, 1,
    )  # fmt: skip
    assert (third.prompt, third.correct, third.error_step, third.located, third.group) == (
        "user: who?", True, None, None, "4",
    )  # fmt: skip
    assert second.values["f"] == 3.0
    table, *charts = traces_sections([first, second, third], 2)[0].items
    assert dict(table.rows)["known errors located"] == "1 of 1"
    assert dict(table.rows)["of them known to be right"] == "2 of 3"
    assert [c.title for c in charts] == [
        "f of traces",
        "log π of traces",
        "reward f − log π of traces",
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": "a", "completion": "b"}],
            r"s.jsonl, line 1: not a line of .* \(no 'tokens'\)",
        ),
        (lines(1, steps=[]), "line 1: trace 'row 0': expected one step"),
        (lines(1, f="much"), "line 1: not a line of `airl-fast score`"),
        (lines(1, correct="yes"), "line 1: expected 'correct' to be true, false or null"),
        (lines(1, label=7), r"line 1: .*error_step in \[0, 2\)"),
        (lines(1, error_step=True), "line 1: expected 'error_step' to be the 0-based index"),
    ],
)
def test_what_is_wrong_with_a_line_is_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_traces(jsonl(tmp_path / "s.jsonl", rows))


def test_files_of_other_rows_are_refused(tmp_path):
    scores = jsonl(tmp_path / "s.jsonl", lines(2))
    with pytest.raises(ValueError, match=r"1 rows, and .* has 2"):
        read_traces(scores, traces=jsonl(tmp_path / "t.jsonl", [{"id": "row 0"}]))
    with pytest.raises(ValueError, match=r"'id' is 'x', and .* has 'row 1'"):
        read_traces(scores, traces=jsonl(tmp_path / "t.jsonl", [{"id": "row 0"}, {"id": "x"}]))
    with pytest.raises(ValueError, match="no 'step'"):
        read_traces(scores, located=jsonl(tmp_path / "l.jsonl", [{"id": "row 0"}, {"id": "row 1"}]))


def test_curves_are_the_recorded_values_and_begin_where_their_phase_does(tmp_path):
    rows = [
        {"step": 1, "phase": "sft", "policy/entropy": 2.0},
        {"step": 2, "phase": "policy", "policy/entropy": 1.0, "valid/pass@1": 0.5, "mine": 3},
        {"step": 3, "phase": "policy", "policy/entropy": math.nan, "mine": 4},
    ]
    path = jsonl(tmp_path / "metrics.jsonl", rows)
    with path.open("a") as file:
        file.write('{"step": 4, "pha')  # half-written
    history = read_history(path)
    assert [m["step"] for m in history] == [1, 2, 3]
    known, others = curve_sections(history)
    entropy = next(c for c in known.items if c.title == "Policy entropy")
    (series,) = entropy.series
    assert list(series.x) == [1, 2, 3]
    assert series.y[:2] == [2.0, 1.0]
    assert entropy.marks == [(1.0, "warm start"), (2.0, "policy")]
    (mine,) = others.items
    assert (mine.title, mine.series[0].y) == ("mine", [3.0, 4.0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no steps yet"),
        ("x\n", "line 1: not JSON"),
        ('{"a": 1}\n', "line 1: expected an object with the number of a 'step'"),
    ],
)
def test_other_files_are_no_history(tmp_path, text, message):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_history(tmp_path / "metrics.jsonl")


def test_a_run_is_reported_from_the_command_line(tiny_run, tmp_path, capsys):  # noqa: F811
    problems = [{"prompt": "2+3=", "completion": "2+3=5;#5.", "correct": True, "source": "expert"},
                {"prompt": "4+3=", "completion": "4+3=9;#9.", "label": 0},
                {"prompt": "4+4=", "completion": "4+4=8;#8.", "label": -1}]  # fmt: skip
    traces = jsonl(tmp_path / "traces.jsonl", problems)
    scores, steps, page = (tmp_path / name for name in ("s.jsonl", "l.jsonl", "r.html"))
    assert cli.main(["score", str(tiny_run), str(traces), "--output", str(scores)]) == 0
    assert cli.main(["locate", str(tiny_run), str(traces), "--output", str(steps)]) == 0
    results = tmp_path / "metrics.json"
    results.write_text(json.dumps({"report": EvalSummary(numbers={"AUC": 0.75}).to_json()}))
    capsys.readouterr()
    status = cli.main(
        ["report", str(tiny_run), "--scores", str(scores), "--traces", str(traces), "--located",
         str(steps), "--eval", str(results), "--output", str(page), "--max-traces", "2"]
    )  # fmt: skip
    printed = capsys.readouterr()
    assert (status, printed.out.strip()) == (0, str(page))
    assert "first 2 of 3" in printed.err
    text = page.read_text(encoding="utf-8")
    for shown in ("Learning curves", "Discriminator accuracy", "arithmetic", "4+3=9;", "0.750",
                  "The first 2 of 3 traces", "demonstrations: 40"):  # fmt: skip
        assert shown in text
    assert "4+4=8;" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a run's folder, or --output"),
        (["--output", "x.html"], "nothing to report on"),
        (["nowhere"], "metrics.jsonl: no such file"),
        (["--output", "x.html", "--eval", "e.json", "--located", "l.jsonl"], "go with --scores"),
        (["--output", "x.html", "--eval", "e.json", "--max-traces", "0"], "one trace or more"),
        (["--output", "x.html", "--eval", "e.json"], "e.json: expected an object with keys"),
    ],
)
def test_what_is_wrong_with_a_command_is_one_line(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e.json").write_text('{"unknown": 1}')
    assert cli.main(["report", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()


def test_scores_alone_make_a_report(tmp_path):
    scores = jsonl(tmp_path / "s.jsonl", lines(2))
    assert report_run(tmp_path / "r.html", scores=scores) == []
    assert "row 1" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_the_demo_writes_its_report(tmp_path):
    from airl_fast.demo import AIRL, FROZEN, GRPO, SHARPENED, DemoSettings, Results
    from airl_fast.demo_report import write_results
    from airl_fast.measuring import Measured
    from airl_fast.reward_uses import Uses

    names = ("SFT", AIRL, FROZEN, GRPO, SHARPENED)
    method = Measured(
        temperature=1.0,
        sampled=[1.0, 0.0],
        greedy=[1.0, 0.0],
        best=[1.0, 0.0],
        validation={"1": 0.5},
    )
    ways = ("random pick", "majority vote", "log pi", "f", "oracle")
    uses = Uses(
        rerank={way: [1.0, 0.0] for way in ways},
        auc={},
        locate={"log pi": [0.0, 1.0], "f": [1.0, 1.0]},
        chance=0.25,
        traces=[{"prompt": "2+3=", "spans": ["2+3=6;", "6+1=7;", "#7."], "f": [-3.0, 1.0, -9.0],
                 "error": 0}],
    )  # fmt: skip
    results = Results(
        settings=asdict(DemoSettings()),
        methods=dict.fromkeys(names, method),
        chosen={"SFT": "a folder"},
        uses=uses,
        seconds=1.0,
    )
    run = jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "phase": "policy", "valid/pass@1": 0.5}])
    (tmp_path / "out").mkdir()
    write_results(tmp_path / "out", results, {"AIRL": run.parent})
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert '"error":0,"located":0' in text  # the span that repeats the answer is no step
    assert "Learning curves" in text
    assert "Picking one of 16 samples of the base" in text


def test_a_report_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "r.html"
    path.write_text("before")
    with pytest.raises(TypeError):
        write_report(path, "t", [Section(title="s", text=[None])])
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
