"""What fuzzing found, as plain tests; and a short run of every target without atheris."""

import gzip
import itertools
import json
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airl_fast.calibration import Calibration
from airl_fast.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from airl_fast.config import ConfigError, load_config, load_yaml
from airl_fast.parsing import parse_json, parse_object, shown, shown_names
from airl_fast.readers import Reading
from airl_fast.report.run import report_run
from airl_fast.run_folder import RunFolder
from airl_fast.score_files import score_file
from airl_fast.tasks import rows
from airl_fast.tasks.answers import find_answer
from fuzz import seeds
from fuzz.__main__ import _NAMES
from fuzz.mutations import mutated
from fuzz.targets import LONGEST, TARGETS

DEEP = "[" * 20_000 + "]" * 20_000
LONG = "1" * 5000


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "server"])
def test_a_short_run_of_the_target_finds_nothing(name, tmp_path):
    target, rng = TARGETS[name], random.Random(1)
    for _ in range(60):
        variant = rng.randrange(len(target.seeds))
        target(bytes([variant]) + mutated(target.seeds[variant], rng), tmp_path)


def test_a_short_run_of_the_server_finds_nothing(tmp_path):
    pytest.importorskip("fastapi", reason="the serve extra is not installed")
    target, rng = TARGETS["server"], random.Random(1)
    for i in range(200):
        variant = i % len(target.seeds)
        head = rng.randbytes(3) if variant == 4 else b""
        target(bytes([variant]) + head + mutated(target.seeds[variant], rng), tmp_path)


def test_every_seed_is_taken_as_it_is(tmp_path):
    """Where seeds were refused, mutations would never get past the first check."""
    for i, (kind, rows_) in enumerate(zip(("jsonl", "processbench", "prm800k"), seeds.READERS,
                                          strict=False)):  # fmt: skip
        path = tmp_path / f"{i}.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows_))
        assert len(list(Reading(path, kind))) == len(rows_)
    (tmp_path / "calibration.json").write_text(json.dumps(seeds.CALIBRATION))
    Calibration.load(tmp_path / "calibration.json")
    scores = tmp_path / "scores.jsonl"
    scores.write_text(json.dumps(seeds.REPORT[0][0]))
    report_run(tmp_path / "page.html", scores=scores)


def test_every_target_is_on_the_command_line():
    assert set(_NAMES) == set(TARGETS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DEEP, "nested too deeply"),
        (LONG, "Exceeds the limit"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' twice"),
        ("{", r"not JSON \(Expecting property name.* column 2"),
        ("\ufeff{}", "not JSON"),
    ],
)
def test_json_that_cannot_be_taken_is_a_value_error(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)
    with pytest.raises(ValueError, match=message):
        parse_object(text)


def test_values_in_messages_are_short():
    bomb = ["x"]
    for _ in range(40):
        bomb = [bomb] * 9
    for value in ("x" * 10**6, list(range(10**5)), bomb, {"a": bomb}, 16**5000, b"x" * 10**5):
        assert len(shown(value)) <= 300
    assert shown({"a": [1, "b"]}) == "{'a': [1, 'b']}"
    assert shown_names({}) == "nothing"
    assert shown_names({"a": 1, "b": 2}) == "'a', 'b'"
    assert len(shown_names(["x" * 1000] * 1000)) <= 310


@pytest.mark.parametrize("line", [DEEP, f'{{"a": {LONG}}}', '{"prompt": "a", "prompt": "b"}'])
def test_rows_name_the_line(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + line)
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: .*; write one JSON object a line"):
        score_file(pytest.fail, path, None)


def test_gzip_that_is_spoilt_inside_is_named(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    packed = bytearray(gzip.compress(b'{"prompt": "1", "steps": ["a"], "label": 0}\n' * 50))
    packed[12:20] = b"\xff" * 8
    path.write_bytes(packed)
    with pytest.raises(ValueError, match="not a whole gzip file"):
        list(Reading(path))


def test_a_line_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "LONGEST_LINE", 1000)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n{"a": "' + b" " * 10**6 + b'"}\n'))
    with pytest.raises(ValueError, match="line 2: expected at most 1,000 bytes"):
        rows.read_rows(path)


def test_refusals_do_not_repeat_a_long_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "a", "steps": "x" * 10**6, "label": 0}))
    with pytest.raises(ValueError, match="'steps' is") as raised:
        list(Reading(path))
    assert len(str(raised.value)) < LONGEST


def test_a_calibration_of_other_types_is_refused(tmp_path):
    path = tmp_path / "calibration.json"
    good = json.dumps(seeds.CALIBRATION)
    for before, after, message in (
        ('"threshold": -1.0', '"threshold": " "', "decider.threshold: Input should be"),
        ('"scale": 2.0', '"scale": 0.0', "decider.scale: expected above 0"),
        ('"scale": 2.0', '"scale": 1e400', "decider.scale: Input should be a finite"),
        ('"a": 0.1', '"a": [0]', "decider.located.a: Input should be"),
        ('"f1": 0.5', '"f1": {}', "fitted.f1: Input should be"),
        ('"folds": 5', f'"folds": {DEEP}', "nested too deeply"),
        ('"seed": 0', '"seed": 0, "more": 1', "more: "),
    ):
        path.write_text(good.replace(before, after, 1))
        with pytest.raises(ValueError, match=f"is no calibration .*{message}"):
            Calibration.load(path)


def test_a_checkpoint_that_fits_its_manifest_may_still_be_damaged(tmp_path):
    """Whoever can write a file can write its digest."""
    path = save_checkpoint(tmp_path, 1, {}, {"step": 1}, keep=1)
    for name, content in (
        ("state.json", b"[1]"), ("state.json", b"\xff\xfe"), ("state.json", DEEP.encode()),
        ("state.json", b"{"), ("tensors.safetensors", b"\xff" * 64),
    ):  # fmt: skip
        kept = (path / name).read_bytes()
        (path / name).write_bytes(content)
        manifest = json.loads((path / "manifest.json").read_text())
        before = json.dumps(manifest)
        from airl_fast.checkpoint import _fingerprint

        manifest["files"][name] = _fingerprint(path / name)
        (path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match="is damaged"):
            load_checkpoint(path)
        (path / name).write_bytes(kept)
        (path / "manifest.json").write_text(before)
    (path / "manifest.json").write_text('{"format": 1, "files": [true]}')
    with pytest.raises(CheckpointError, match=r"manifest\.json omits tensors\.safetensors"):
        load_checkpoint(path)
    (path / "manifest.json").write_text(DEEP)
    with pytest.raises(CheckpointError, match="nested too deeply"):
        load_checkpoint(path)


def test_a_run_does_not_go_on_from_a_state_that_is_none(tmp_path):
    config = load_config("arithmetic", [f"run.output_dir={tmp_path}"])
    for state in ({"step": 1}, {"config": {}}, {"step": "1", "config": {}}):
        save_checkpoint(tmp_path / "checkpoints", 1, {}, state, keep=1)
        with pytest.raises(ValueError, match="has no configuration or no step"):
            RunFolder(config).open()
    save_checkpoint(tmp_path / "checkpoints", 1, {}, {"step": 1, "config": {"run": 3}}, keep=1)
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        RunFolder(config).open()


def test_metrics_that_are_none_name_their_line(tmp_path):
    folder = RunFolder(load_config("arithmetic", [f"run.output_dir={tmp_path}"]))
    for line, message in ((DEEP, "nested too deeply"), ("{", "not JSON"), ('{"a": 1}', "'step'")):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + line + "\n")
        with pytest.raises(ValueError, match=f"metrics.jsonl, line 2: .*{message}"):
            folder.history()
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
            report_run(tmp_path / "page.html", folder=tmp_path)


def test_yaml_that_cannot_be_taken_is_a_config_error(tmp_path):
    path = tmp_path / "a.yaml"
    for text, message in (
        ("[" * 5000 + "]" * 5000, "nested too deeply"),
        (LONG, "Exceeds the limit"),
        ("run: {steps: 2001-99-99}", "month must be in"),
        ("run: !!timestamp x", "AttributeError"),
        ("run: !!bool x", "KeyError"),
        ("a: &a [1]\nb: *a", "aliases are not taken"),
        ("run: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_config(path)
    with pytest.raises(ConfigError, match="month must be in"):
        load_config("arithmetic", ["run.seed=2001-99-99"])
    with pytest.raises(ConfigError, match="the override 'xxx") as raised:
        load_config("arithmetic", ["x" * 10**6])
    assert len(str(raised.value)) < LONGEST
    with pytest.raises(ConfigError, match="no such key") as raised:
        load_config("arithmetic", ["run." + "x" * 10**6 + "=1"])
    assert len(str(raised.value)) < LONGEST
    path.write_text("\n".join(f"a{i}: 1" for i in range(3000)))
    with pytest.raises(ConfigError, match=r"and 29.. more") as raised:
        load_config(path)
    assert len(str(raised.value)) < LONGEST
    assert load_yaml("a: [1, 2]") == {"a": [1, 2]}


def test_a_report_of_a_strange_run_says_what_is_wrong(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "phase": "policy", "seconds": 1}\n')
    page = tmp_path / "page.html"
    (tmp_path / "config.yaml").write_text("run: [1]\ntask: 3\n")  # no facts in it, no fault either
    report_run(page, folder=tmp_path)
    for text in ("run: {", "run: \0", DEEP):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"config.yaml: not readable as YAML"):
            report_run(page, folder=tmp_path)
    evaluation = tmp_path / "metrics.json"
    for changes, message in (
        ({"title": 1.0}, "expected texts as 'title'"),
        ({"notes": [1]}, "expected texts as 'title'"),
        ({"histograms": {"a": [10**400]}}, "'histograms' is not as documented"),
        ({"reliability": {"a": [[0.5, 0.5, 10**400]]}}, "a count from 1 to 2"),
        ({"reliability": {"a": []}}, "expected bins, got none"),
    ):
        evaluation.write_text(json.dumps({**seeds.REPORT[3][0], **changes}))
        with pytest.raises(ValueError, match=message):
            report_run(page, evaluation=evaluation)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": 3}, "expected a text, got 3"),
        ({"f": 10**400}, "int too large"),
        ({"f": "x" * 10**6}, "could not convert"),
        ({"tokens": {**seeds.SCORED["tokens"], "f": [0.5]}}, r"columns of \[1, 2\] tokens"),
        ({"steps": [{**seeds.SCORED["steps"][0], "start": -1}]}, "steps that do not lie"),
    ],
)
def test_scores_that_are_none_name_their_line(tmp_path, changes, message):
    path = tmp_path / "scores.jsonl"
    path.write_text(json.dumps({**seeds.SCORED, **changes}))
    with pytest.raises(ValueError, match=f"line 1: not a line of .*{message}") as raised:
        report_run(tmp_path / "page.html", scores=path)
    assert len(str(raised.value)) < LONGEST


@pytest.mark.parametrize(
    "piece", ["x", "1", "1,", "( ", " ", "<answer>", "</answer>", "\\boxed{", "}", "answer is "]
)
def test_an_answer_is_found_in_linear_time(piece):
    """Of 500,000 characters; what took the square of their number would take hours."""
    found = find_answer(piece * (500_000 // len(piece)))
    assert found is None or isinstance(found, str)


@given(
    st.lists(
        st.sampled_from(
            ["<answer>", "</answer>", "\\boxed{", "{", "}", "a", "7", "\n", " ", "The answer is: ",
             "answer is", "#### ", "\\"]
        ),
        max_size=14,
    ).map("".join)
)  # fmt: skip
def test_answers_are_found_as_plain_regular_expressions_find_them(text):
    """The forms as the docstring of find_answer has them, however slow."""
    hashes = re.search(r"^[ \t]*####[ \t]*(.*)$", text, re.MULTILINE)
    tags = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    phrases = re.findall(r".*\banswer is:?\s*(.*)", text, re.IGNORECASE)
    boxed = None
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\{", text)]):
        depths = list(itertools.accumulate({"{": 1, "}": -1}.get(c, 0) for c in text[start:]))
        if -1 in depths:
            boxed = text[start : start + depths.index(-1)]
            break
    forms = [hashes and hashes[1], tags and tags[-1], boxed, phrases and phrases[-1]]
    expected = next((form for form in forms if form is not None and form != []), None)
    assert find_answer(text) == (None if expected is None else expected.strip())


def test_roles_of_a_refused_completion_are_cut():
    from fuzz.server import ask

    pytest.importorskip("fastapi", reason="the serve extra is not installed")
    turns = [{"role": "user", "content": "a"}, {"role": "x" * 100_000, "content": "b"}]
    ask(3, json.dumps({"messages": turns}).encode())  # raises where an answer is long
