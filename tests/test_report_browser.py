"""The report in a real browser: keyboard, colours, widths, and no request of any kind."""

import random
import shutil
from dataclasses import replace
from itertools import pairwise

import pytest

from airl_fast.report import Chart, Section, Series, Table, TraceSet, write_report
from tests.report_pages import HOSTILE, full_trace, trace_of

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)  # fmt: skip  # noqa: E501
if CHROMIUM is None:
    pytest.skip("no Chromium on the PATH", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
MEASURES = ("reward", "f", "logp")  # in the viewer's order


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=300_000)
        yield opened
        opened.close()


class Opened:
    """A page, with everything that it asked for and complained about."""

    def __init__(self, browser, path, **options):
        self.path = path
        self.page = browser.new_page(**options)
        self.page.set_default_timeout(300_000)  # nothing here is timed; a machine may be slow
        self.requests, self.complaints = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.goto(path.as_uri())

    def press(self, *keys):
        for key in keys:
            self.page.keyboard.press(key)

    def text(self, selector):
        return self.page.text_content(selector)

    def texts(self, selector):
        return self.page.locator(selector).all_text_contents()

    def active(self, box):
        """What a screen reader says of the active option of a list."""
        return self.page.evaluate(
            "s => { const box = document.querySelector(s);"
            "return document.getElementById(box.getAttribute('aria-activedescendant')).ariaLabel }",
            box,
        )

    def focused(self):
        return self.page.evaluate(
            "(document.activeElement.className || document.activeElement.name"
            " || document.activeElement.dataset.go || document.activeElement.tagName)"
        )

    def close(self):
        self.page.close()
        assert self.requests == [self.path.as_uri()]
        assert self.complaints == []


@pytest.fixture
def opened(browser, tmp_path):
    pages = []

    def open_(*items, **options):
        path = tmp_path / f"report {len(pages)}.html"
        write_report(path, "Run", [Section(title="First"), Section(title="Traces", items=items)])
        pages.append(Opened(browser, path, **options))
        return pages[-1]

    yield open_
    for page in pages:
        page.close()


def traces(count=6, **options):
    rng = random.Random(0)
    made = []
    for i in range(count):
        error = i % 4 if i % 2 else None
        made.append(
            full_trace(
                rng,
                f"problem {i}",
                prompt=f"prompt {i // 2}",
                correct=error is None,
                error_step=error,
                located=1,
                group=str(i // 2),
                source="expert" if i % 2 == 0 else "policy",
            )
        )
    return TraceSet(title="Traces", traces=made, **options)


def test_values_are_shown_as_given_at_both_levels_and_for_every_measure(opened):
    given = traces()
    shown = opened(given)
    for measure in MEASURES:
        shown.page.check(f"input[value={measure}]")
        shown.page.check("input[value=steps]")
        digits = given.scale(measure, "steps").decimals
        trace = given.traces[0]
        values = [f"{step.values[measure]:.{digits}f}" for step in trace.steps]
        assert shown.texts(".row .value") == values
        assert shown.texts(".row .text") == [step.text for step in trace.steps]
        shades = [f"{given.scale(measure, 'steps').shade(s.values[measure])}" for s in trace.steps]
        classes = shown.page.eval_on_selector_all(".row .text", "all => all.map(e => e.className)")
        assert [c.split()[1].replace("n", "-").replace("p", "").replace("z", "0") for c in classes] == shades  # fmt: skip  # noqa: E501
        shown.page.check("input[value=tokens]")
        digits = given.scale(measure, "tokens").decimals
        tokens = [token for step in trace.steps for token in step.tokens]
        names = shown.page.eval_on_selector_all(".token", "all => all.map(e => e.ariaLabel)")
        assert len(names) == len(tokens)
        for name, token in zip(names, tokens, strict=True):
            assert f"{token.values[measure]:.{digits}f}" in name
        assert shown.texts(".token") == [token.text for token in tokens]


def test_the_whole_viewer_works_from_the_keyboard(opened):
    shown = opened(traces())
    order = []
    for _ in range(9):
        shown.press("Tab")
        order.append(shown.focused())
    assert order == [
        "A", "A", "viewer-1-measure", "viewer-1-level", "filter", "sort", "1", "list", "BUTTON",
    ]  # fmt: skip
    shown.press("Shift+Tab")
    assert shown.active(".list").startswith("1, problem 0, correct, reward f − log π ")
    shown.press("ArrowDown")
    assert shown.text(".name") == "2. problem 1"
    said = shown.text("[role=status]")
    assert said.startswith("Trace 2 of 6, problem 1, ✗ wrong")
    assert said.endswith("located error: step 2, true error: step 2")
    shown.press("End")
    assert shown.text(".place") == "6 of 6"
    shown.press("Home", "ArrowDown", "Enter")
    assert shown.focused() == "steps"
    assert shown.active(".steps").startswith("Step 1 of 4, reward f − log π ")
    shown.press("ArrowDown")
    assert ", located error, true error" in shown.active(".steps")
    assert shown.text(".detail") == shown.active(".steps").split(": ")[0]
    shown.press("Enter")  # the step's tokens
    assert shown.active(".steps").startswith("Step 2 of 4, token 1: “")
    shown.press("ArrowRight", "ArrowRight")
    assert "token 3: “↵”" in shown.active(".steps")
    shown.press("ArrowRight")
    assert shown.active(".steps").startswith("Step 3 of 4, token 1")
    shown.press("ArrowUp", "ArrowUp")
    assert shown.active(".steps").startswith("Step 1 of 4, token 1")
    shown.press("End")
    assert "token 3: no characters of its own" in shown.active(".steps")
    shown.press("PageDown")
    assert shown.text(".name") == "3. problem 2"
    shown.press("Escape")
    assert not shown.page.is_checked("input[value=tokens]")
    shown.press("Escape")
    assert shown.focused() == "list"


def test_what_has_the_focus_can_be_seen(opened):
    shown = opened(traces(), Table(title="t", columns=["a"], rows=[["b"]]))
    outlined = """() => {
        const of = document.activeElement;
        const id = of.getAttribute("aria-activedescendant");
        return [of, id && document.getElementById(id)].filter(Boolean)
            .map((e) => getComputedStyle(e)).every((s) => parseFloat(s.outlineWidth) >= 2
                && s.outlineStyle === "solid");
    }"""
    shown.press("Tab")
    stops = 0
    while shown.focused() != "BODY":
        assert shown.page.evaluate(outlined), shown.focused()
        shown.press("Tab")
        stops += 1
    assert stops == 13


def test_the_located_and_the_true_error_are_marked_in_words(opened):
    steps = ["a\n", "b\n", "c"]
    shown = opened(
        TraceSet(title="t", traces=[trace_of(*steps, correct=False, error_step=1, located=2)])
    )
    assert shown.texts(".row .marks") == ["", "true error", "located errorlowest"]
    assert shown.texts(".row.located .text") == ["c"]
    assert shown.texts(".row.wrong .text") == ["b\n"]
    shown.page.focus("[data-jump=error]")
    shown.press("Enter")
    assert shown.active(".steps") == "Step 2 of 3, f -1.000, true error: b\n"
    shown.page.click("[data-jump=located]")
    assert shown.active(".steps") == "Step 3 of 3, f -2.000, located error, lowest: c"
    assert shown.page.is_hidden("input[value=tokens]")  # there are none
    shown.press("Enter")
    assert shown.active(".steps").startswith("Step 3 of 3, f")


def test_traces_are_filtered_and_sorted(opened):
    given = traces(8)
    shown = opened(given)

    def listed():
        return [int(t.removeprefix("problem ")) for t in shown.texts(".list .title")]

    def options(name):
        return shown.texts(f"[name={name}] option")

    assert options("filter") == [
        "all (8)", "correct (4)", "wrong (4)", "error located rightly (2)", "error missed (2)",
        "error located where none is known (4)", "from expert (4)", "from policy (4)",
        "of the prompt shown",
    ]  # fmt: skip
    shown.page.select_option("[name=filter]", label="wrong (4)")
    assert listed() == [1, 3, 5, 7]
    assert shown.text(".name") == "2. problem 1"
    shown.page.select_option("[name=filter]", label="error located rightly (2)")
    assert listed() == [1, 5]
    assert shown.text("[role=status]").startswith("Trace 1 of 2, problem 1")
    shown.page.select_option("[name=filter]", label="of the prompt shown")
    assert listed() == [0, 1]
    shown.page.select_option("[name=filter]", label="all (8)")
    values = [trace.values["f"] for trace in given.traces]
    shown.page.check("input[value=f]")
    shown.page.select_option("[name=sort]", label="lowest f first")
    assert listed() == sorted(range(8), key=values.__getitem__)
    shown.page.select_option("[name=sort]", label="highest f first")
    assert listed() == sorted(range(8), key=lambda i: -values[i])
    lowest = [min(step.values["f"] for step in trace.steps) for trace in given.traces]
    shown.page.select_option("[name=sort]", label="lowest step by f first")
    assert listed() == sorted(range(8), key=lowest.__getitem__)
    assert shown.text(".place") == "1 of 8"


def test_untrusted_text_is_text(opened):
    long = "x" * 100_000
    hostile = trace_of(HOSTILE, long, "שלום \u200fעולם 😀‍🔥", title=HOSTILE, prompt=HOSTILE)
    shown = opened(TraceSet(title=HOSTILE, traces=[hostile]))
    seen = HOSTILE
    for code in (0, 0x202E, 0xD800):
        seen = seen.replace(chr(code), f"⟨U+{code:04X}⟩")
    texts = shown.texts(".row .text")
    assert texts[0] == seen
    assert texts[1] == long
    assert texts[2] == "שלום ⟨U+200F⟩עולם 😀‍🔥"
    assert shown.text(".name") == f"1. {seen}"
    assert shown.text(".prompt pre") == seen
    assert shown.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_script_that_slipped_in_would_not_run(opened):
    shown = opened(traces())
    shown.page.evaluate(
        """() => { const s = document.createElement("script"); s.textContent = "window.x = 1";
        document.body.append(s); const i = new Image(); i.src = "http://127.0.0.1:9/x.png";
        document.body.append(i); }"""
    )
    assert shown.page.evaluate("window.x === undefined")
    assert len(shown.complaints) >= 1
    assert all("Content Security Policy" in text for text in shown.complaints)
    shown.complaints.clear()
    shown.requests[:] = [url for url in shown.requests if not url.startswith("http:")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1240])
def test_it_fits_and_can_be_read_in_light_and_dark(opened, scheme, width):
    chart = Chart(
        title="c", x_label="x", y_label="y", series=[Series(name="a", x=[0, 1], y=[0, 1])]
    )
    table = Table(title="t", columns=["c" * 30] * 6, rows=[["v" * 30] * 6])
    view = {"width": width, "height": 740}
    shown = opened(traces(), chart, table, color_scheme=scheme, viewport=view)
    shown.page.check("input[value=tokens]")
    assert shown.page.evaluate("document.documentElement.scrollWidth") == width
    light = shown.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (light == "rgb(255, 255, 255)") == (scheme == "light")
    pairs = shown.page.evaluate(
        """() => [...document.querySelectorAll(".scale span, .value, .facts, .note, dt, summary")]
        .map((e) => { let b = e; while (getComputedStyle(b).backgroundColor === "rgba(0, 0, 0, 0)")
            b = b.parentElement;
            return [getComputedStyle(e).color, getComputedStyle(b).backgroundColor] })"""
    )
    assert len(pairs) > 12
    assert min(contrast(*pair) for pair in pairs) >= 4.5  # WCAG 2.2, level AA


def contrast(first, second):
    """The ratio that WCAG defines, of two colours written as rgb(r, g, b)."""

    def luminance(colour):
        parts = [int(part) / 255 for part in colour.strip("rgba()").split(",")[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_a_thousand_traces_are_not_in_the_document_at_once(opened):
    shown = opened(traces(1000))
    assert shown.text(".place") == "1 of 1000"
    assert len(shown.texts(".list .title")) == 20
    shown.page.focus(".list")
    shown.press("PageDown", "ArrowDown")
    assert shown.text(".name") == "22. problem 21"
    assert len(shown.texts(".list .title")) == 20
    shown.press("End")
    assert shown.text(".name") == "1000. problem 999"
    assert shown.page.evaluate("document.querySelectorAll('.viewer *').length") < 1000


def test_steps_without_tokens_are_whole_among_tokens(opened):
    full = traces(1).traces[0]
    bare = replace(full, steps=[replace(step, tokens=()) for step in full.steps])
    shown = opened(TraceSet(title="t", traces=[full, bare]))
    shown.page.check("input[value=tokens]")
    assert len(shown.texts(".token")) == 12
    shown.page.click("[data-go='1']")
    assert len(shown.texts(".token")) == 0
    shown.page.focus(".steps")
    shown.press("End")
    assert shown.active(".steps").startswith("Step 4 of 4, reward f − log π ")


def test_two_viewers_do_not_disturb_each_other(opened):
    shown = opened(traces(), traces())
    first, second = (shown.page.locator(f"#viewer-{n}") for n in (1, 2))
    second.locator("input[value=tokens]").check()
    second.locator("[data-go='1']").click()
    assert first.locator("input[value=steps]").is_checked()
    assert first.locator(".name").text_content() == "1. problem 0"
    assert second.locator(".name").text_content() == "2. problem 1"
    ids = shown.page.eval_on_selector_all("[id]", "all => all.map(e => e.id)")
    assert len(ids) == len(set(ids))


def test_roles_names_and_headings(opened):
    shown = opened(traces())
    for name, count in (("Traces", 6), ("Steps", 4)):
        box = shown.page.get_by_role("listbox", name=name, exact=True)
        assert box.get_by_role("option").count() == count
    assert shown.page.get_by_role("radio", name="tokens").count() == 1
    assert shown.page.get_by_role("combobox", name="Show").count() == 1
    levels = shown.page.eval_on_selector_all(
        "h1, h2, h3, h4", "all => all.map(e => Number(e.tagName[1]))"
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))


def test_without_scripts_plots_numbers_and_traces_are_there(opened):
    chart = Chart(
        title="c", x_label="x", y_label="y", series=[Series(name="a", x=[0, 1], y=[0, 1])]
    )
    given = TraceSet(title="t", traces=[trace_of("one\n", "two", f=[0.5, -0.25], located=1)])
    shown = opened(chart, given, java_script_enabled=False)
    assert shown.page.locator("svg.plot").is_visible()
    assert shown.page.locator("summary").first.is_visible()
    assert shown.page.locator("noscript td.text").nth(1).is_visible()
    assert shown.texts("noscript td")[1::3] == ["0.5000", "-0.2500"]
    assert shown.page.locator("noscript td", has_text="located error").count() == 1
    assert not shown.page.locator(".viewer").is_visible()


def test_it_prints_the_trace_and_not_the_controls(opened):
    shown = opened(traces())
    shown.page.emulate_media(media="print")
    assert shown.page.is_visible(".row .text >> nth=0")
    assert not shown.page.is_visible(".controls")
    assert not shown.page.is_visible(".list")
    assert shown.page.pdf().startswith(b"%PDF")
