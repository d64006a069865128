"""The rows of tasks, readers and planted errors."""

from __future__ import annotations

import random
from typing import Any, Literal

from airl_fast.negatives import perturb
from airl_fast.readers import Reading
from airl_fast.schema import TaskConfig
from airl_fast.tasks import TASKS, load_task
from airl_fast.tasks.arithmetic import Arithmetic
from tests.robustness.table import Cell, Entry

CELLS: list[Cell] = []
TEXT = "reads texts"
GOOD = {
    "gsm8k": {"question": "1+1?", "answer": "1+1=2\n#### 2"},
    "jsonl": {"prompt": "1+1=", "completion": "2", "answer": "2"},
    "medreason": {
        "dataset_name": "medqa",
        "question": "Which?",
        "answer": "one",
        "options": "A. one\nB. two",
        "reasoning": "Because one.",
    },
    "mmlu_pro": {
        "question_id": 1,
        "question": "Which?",
        "options": ["one", "two"],
        "answer": "A",
        "answer_index": 0,
        "cot_content": "A: Because. The answer is (A).",
        "category": "maths",
        "src": "x",
    },
}
FIRST = {"gsm8k": "question", "jsonl": "prompt", "medreason": "question", "mmlu_pro": "question"}
FILES = {"mmlu_pro": "questions.jsonl"}


def of(name: str, *rows: Any, content: Any = None, **options: Any) -> Any:
    def call(t: Any) -> Any:
        file = FILES.get(name, "train.jsonl")
        path = t.rows(*rows, name=file) if content is None else t.file(content, file)
        given = {"validation": 0, "test": 0} | options
        return load_task(TaskConfig(name=name, path=str(path.parent), **given))

    return call


GENERATED: tuple[Literal["arithmetic", "countdown"], ...] = ("arithmetic", "countdown")

for _name in TASKS:
    if _name in GENERATED:
        continue
    _e = Entry(
        f"task {_name}",
        CELLS,
        shape=TEXT,
        device=TEXT,
        offsets=TEXT,
        non_finite=TEXT,
        model="knows no model",
    )
    _row, _key = GOOD[_name], FIRST[_name]
    _e.refuses(
        "dtype",
        f"{_key} of a number",
        of(_name, _row | {_key: 7}),
        f"{_key!r} is 7",
        "expected a text",
    )
    _e.refuses(
        "dtype",
        "a row that is a list",
        of(_name, [1, 2]),
        "line 1: list",
        "write one JSON object a line",
    )
    _e.refuses(
        "range",
        "more test problems than there are",
        of(_name, _row, test=5 if _name != "mmlu_pro" else 500),
        "task.test=",
        "or less",
    )
    _e.refuses(
        "negative",
        "test=-1",
        lambda _, n=_name: TaskConfig(name=n, path="x", test=-1),
        "-1",
        "greater than or equal to 0",
    )
    _e.refuses(
        "empty", "an empty file", of(_name, content=""), "no rows", "expected a JSON object a line"
    )
    _e.refuses(
        "empty", f"an empty {_key}", of(_name, _row | {_key: " "}), f"{_key!r} is empty", ' is {"'
    )
    _e.refuses(
        "option",
        "expert_error",
        lambda _, n=_name: TaskConfig(name=n, path="x", expert_error=0.5),
        "task.expert_error=0.5",
        "remove it",
    )
    _e.refuses(
        "file",
        "a folder that does not exist",
        lambda _, n=_name: load_task(
            TaskConfig(name=n, path="./nowhere/at/all.jsonl", validation=0, test=0)
        ),
        "nowhere/at/all.jsonl",
        "file",
    )
    _e.refuses(
        "file",
        "half a line",
        of(_name, content='{"prompt": "1'),
        "line 1: not JSON",
        "write one JSON object a line",
    )
    _e.refuses(
        "file",
        "a file that is no text",
        of(_name, content=b"\xff\xfe{}\n"),
        "line 1: not UTF-8",
        "save the file as UTF-8",
    )
    _bare = {key: value for key, value in _row.items() if key != _key}
    _e.refuses("option", f"no column {_key}", of(_name, _bare), f"no column {_key!r}", ' is {"')

for _made in GENERATED:
    _e = Entry(
        f"task {_made}",
        CELLS,
        shape="is generated",
        dtype="TaskConfig refuses it",
        device="is generated",
        offsets="is generated",
        non_finite="TaskConfig refuses it",
        file="reads none",
        model="knows no model",
        empty="is generated",
    )
    _e.refuses(
        "range",
        "expert_error=1.5",
        lambda _, n=_made: TaskConfig(name=n, expert_error=1.5),
        "1.5",
        "less than or equal to 1",
    )
    _e.refuses(
        "negative",
        "demonstrations=-1",
        lambda _, n=_made: TaskConfig(name=n, demonstrations=-1),
        "-1",
        "greater than or equal to 1",
    )
    _e.refuses(
        "option",
        "a path",
        lambda _, n=_made: TaskConfig(name=n, path="x"),
        "task.path='x'",
        "remove task.path or set task.name=jsonl",
    )

_FORMATS = {
    "jsonl": {"prompt": "1", "steps": ["a", "b"], "label": -1},
    "processbench": {
        "id": "x",
        "problem": "1",
        "steps": ["a", "b"],
        "label": 0,
        "final_answer_correct": False,
    },
    "prm800k": {
        "question": {"problem": "1"},
        "label": {
            "finish_reason": "solution",
            "steps": [
                {
                    "completions": [{"text": "a", "rating": 1}],
                    "human_completion": None,
                    "chosen_completion": 0,
                }
            ],
        },
    },
}


def read(form: str, *rows: Any, content: Any = None) -> Any:
    def call(t: Any) -> Any:
        path = t.rows(*rows) if content is None else t.file(content)
        return list(Reading(path, form))

    return call


for _form, _row in _FORMATS.items():
    _e = Entry(
        f"readers.Reading of {_form}",
        CELLS,
        shape=TEXT,
        device=TEXT,
        offsets=TEXT,
        non_finite=TEXT,
        model="knows no model",
    )
    _e.serves("option", "a good row", lambda t, f=_form, r=_row: len(read(f, r)(t)) == 1, "an item")
    _e.refuses(
        "empty",
        "an empty file",
        read(_form, content=""),
        "no rows",
        "expected a JSON object a line",
    )
    _e.refuses(
        "file",
        "a file that does not exist",
        lambda t, f=_form: Reading(t.base / "nowhere", f),
        "no such file",
        "give a file of JSON lines",
    )
    _e.refuses(
        "file",
        "half a line",
        read(_form, content='{"prompt": "1'),
        "line 1: not JSON",
        "write one JSON object a line",
    )
    _e.refuses(
        "file",
        "half a gzip file",
        lambda t, f=_form: list(Reading(t.file(b"\x1f\x8b\x08\x00\x00", "rows.jsonl.gz"), f)),
        "not a whole gzip file",
        "fetch it again",
    )
    if _form == "prm800k":
        _chosen = {"completions": [{"text": "a", "rating": 1}], "chosen_completion": 4}
        _low = {"completions": [{"text": "a", "rating": 1}], "chosen_completion": -3}
        _rated = {"completions": [{"text": "a", "rating": 7}], "chosen_completion": 0}
        for _fault, _given, _step, _received in (
            ("range", "a chosen completion of 4", _chosen, "'chosen_completion' is 4"),
            ("negative", "a chosen completion of -3", _low, "'chosen_completion' is -3"),
            ("range", "a rating of 7", _rated, "'rating' is 7"),
        ):
            _label = {"finish_reason": "solution", "steps": [_step]}
            _e.refuses(
                _fault, _given, read(_form, _row | {"label": _label}), _received, "a PRM800K row is"
            )
        _e.refuses(
            "dtype",
            "steps of a text",
            read(_form, _row | {"label": {"finish_reason": "solution", "steps": "a"}}),
            "'steps' is 'a'",
            "a PRM800K row is",
        )
    else:
        _e.refuses(
            "dtype",
            "steps of a text",
            read(_form, _row | {"steps": "ab"}),
            "'steps' is 'ab'",
            "row is",
        )
        _e.refuses(
            "range",
            "a label of 2 for 2 steps",
            read(_form, _row | {"label": 2}),
            "'label' is 2",
            "row is",
        )
        _e.refuses(
            "negative",
            "a label of -2",
            read(_form, _row | {"label": -2}),
            "'label' is -2",
            "row is",
        )
        _e.refuses(
            "empty", "no steps", read(_form, _row | {"steps": []}), "'steps' is []", "row is"
        )
_e = Entry("readers.Reading of jsonl", CELLS)
_e.refuses(
    "option",
    'format="csv"',
    lambda t: Reading(t.file("x"), "csv"),
    "received 'csv'",
    "expected a format of jsonl, processbench, prm800k",
)
_e.refuses(
    "option",
    "steps and completions",
    read("jsonl", {"prompt": "1", "steps": ["a"], "completions": ["a"]}),
    "both 'steps' and 'completions'",
    "keep one",
)

_e = Entry(
    "negatives.perturb",
    CELLS,
    shape=TEXT,
    dtype=TEXT,
    device=TEXT,
    offsets=TEXT,
    range=TEXT,
    negative=TEXT,
    non_finite=TEXT,
    file="reads none",
    model="knows no model",
)


def perturbed(text: str, **options: Any) -> Any:
    return lambda _: perturb(
        Arithmetic(0, demonstrations=1, unlabelled=0, validation=0, test=0),
        text,
        random.Random(0),
        **options,
    )


_e.refuses(
    "empty",
    "a text that nothing changes",
    perturbed("ab", kinds=("digit",)),
    "changes the trace 'ab'",
    "leave it out",
)
_e.refuses(
    "option",
    'kinds=("typo",)',
    perturbed("1", kinds=("typo",)),
    "['typo']",
    "expected some of ['corrupt'",
)
