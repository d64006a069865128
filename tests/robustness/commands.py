"""The rows of the commands."""

from __future__ import annotations

from typing import Any

from tests.robustness.table import Cell, CommandRefused, Entry

CELLS: list[Cell] = []

PAIR = {"prompt": "1", "completion": "ab"}
ASKED: dict[str, Any] = {
    "score": PAIR,
    "rerank": {"prompt": "1", "completions": ["ab"]},
    "locate": PAIR,
    "calibrate": PAIR | {"label": -1},
    "eval": {"prompt": "1", "steps": ["a"], "label": -1},
}
for _name, _row in ASKED.items():

    def asked(*rows: Any, name: str = _name, content: Any = None, options: Any = ()) -> Any:
        def call(t: Any) -> None:
            source = t.rows(*rows) if content is None else t.file(content)
            t.command(name, t.reward, source, *options)

        return call

    _e = Entry(
        f"airl-fast {_name}",
        CELLS,
        shape="reads texts",
        offsets="reads texts",
        non_finite="reads texts",
    )
    _e.refuses(
        "dtype",
        "a row that is a list",
        asked([1]),
        "line 1: list",
        "write one JSON object a line",
        CommandRefused,
    )
    _e.refuses(
        "device",
        "--device tpu",
        asked(_row, options=("--device", "tpu")),
        "received 'tpu'",
        "`airl-fast doctor` says what is here",
        CommandRefused,
    )
    _e.refuses(
        "negative",
        "--token-budget 0",
        asked(_row, options=("--token-budget", "0")),
        "received 0",
        "token_budget",
        CommandRefused,
    )
    _e.refuses(
        "empty",
        "an empty file",
        asked(content=""),
        "no rows",
        "expected a JSON object a line",
        CommandRefused,
    )
    _e.refuses(
        "option",
        "--passes all",
        asked(_row, options=("--passes", "all")),
        "'all'",
        "choose from",
        CommandRefused,
    )
    _e.refuses(
        "file",
        "a file that does not exist",
        lambda t, n=_name: t.command(n, t.reward, t.base / "nowhere.jsonl"),
        "nowhere.jsonl: no such file",
        "give a file of JSON lines",
        CommandRefused,
    )
    _e.refuses(
        "file",
        "half a line",
        asked(content='{"prompt": "1'),
        "line 1: not JSON",
        "write one JSON object a line",
        CommandRefused,
    )
    _e.refuses(
        "model",
        "a folder without a reward",
        lambda t, n=_name, r=_row: t.command(n, t.folder(), t.rows(r)),
        "holds no trained reward",
        "expected the run.output_dir",
        CommandRefused,
    )
    if _name in ("score", "rerank", "locate"):
        _long = _row | (
            {"completions": ["a" * 300]} if _name == "rerank" else {"completion": "a" * 300}
        )
        _e.refuses(
            "range",
            "a text longer than the model's context",
            asked(_long),
            "line 1: ",
            "nothing is truncated",
            CommandRefused,
        )
    else:
        _e.refuses(
            "range",
            "a label past the steps",
            asked(_row | {"label": 7}),
            "'label' is 7",
            "expected -1",
            CommandRefused,
        )

PLAIN = "reads no tensors"
_e = Entry(
    "airl-fast train",
    CELLS,
    shape=PLAIN,
    device="as Trainer",
    offsets=PLAIN,
    model="as Trainer",
    dtype="as load_config",
    range="as load_config",
    negative="as load_config",
    non_finite="as load_config",
    empty="as load_config",
)
_e.refuses(
    "option",
    "a key that is nearly one",
    lambda t: t.command("train", "arithmetic", "run.step=1"),
    "run.step: no such key",
    "did you mean run.steps?",
    CommandRefused,
)
_e.refuses(
    "file",
    "a recipe that does not exist",
    lambda t: t.command("train", "arithmetics"),
    "no recipe",
    "did you mean arithmetic?",
    CommandRefused,
)


_e = Entry("airl-fast serve", CELLS, shape=PLAIN, dtype=PLAIN, device="as score", offsets=PLAIN)
_e.refuses(
    "range",
    "port 99999",
    lambda t: t.command("serve", t.reward, "--port", 99999),
    "99999",
    "--port",
    CommandRefused,
)
_e.refuses(
    "negative",
    "--max-waiting 0",
    lambda t: t.command("serve", t.reward, "--port", 0, "--max-waiting", 0),
    "received 0",
    "raise it",
    CommandRefused,
)
_e.refuses(
    "non-finite",
    "--timeout nan",
    lambda t: t.command("serve", t.reward, "--port", 0, "--timeout", "nan"),
    "received nan",
    "raise it",
    CommandRefused,
)
_e.refuses(
    "empty",
    "an empty token",
    lambda t: t.command("serve", t.reward, "--token-file", t.file("")),
    "received nothing",
    "openssl rand -hex 32",
    CommandRefused,
)
_e.refuses(
    "option",
    "an open address without a token",
    lambda t: t.command("serve", t.reward, "--host", "0.0.0.0"),
    "there is no token",
    "--token-file FILE",
    CommandRefused,
)
_e.refuses(
    "file",
    "a token file that does not exist",
    lambda t: t.command("serve", t.reward, "--token-file", t.base / "nowhere"),
    "nowhere",
    "No such file",
    CommandRefused,
)
_e.refuses(
    "model",
    "a folder without a reward",
    lambda t: t.command("serve", t.folder(), "--port", 0),
    "holds no trained reward",
    "expected the run.output_dir",
    CommandRefused,
)

_e = Entry(
    "airl-fast report",
    CELLS,
    shape=PLAIN,
    dtype=PLAIN,
    device=PLAIN,
    offsets=PLAIN,
    range=PLAIN,
    non_finite=PLAIN,
    model=PLAIN,
)
_e.refuses(
    "negative",
    "--max-traces -1",
    lambda t: t.command(
        "report", "--scores", t.rows({"x": 1}), "--output", t.base / "a.html", "--max-traces", -1
    ),
    "got -1",
    "expected one trace or more",
    CommandRefused,
)
_e.refuses(
    "empty",
    "nothing to report",
    lambda t: t.command("report"),
    "nowhere to write",
    "give a run's folder, or --output FILE.html",
    CommandRefused,
)
_e.refuses(
    "option",
    "an unknown option",
    lambda t: t.command("report", "--pdf"),
    "unrecognized arguments",
    "--pdf",
    CommandRefused,
)
_e.refuses(
    "file",
    "a folder that holds no run",
    lambda t: t.command("report", t.folder()),
    "metrics.jsonl",
    "run",
    CommandRefused,
)

for _name in ("demo", "doctor", "recipes", "bench"):
    _e = Entry(
        f"airl-fast {_name}",
        CELLS,
        shape=PLAIN,
        dtype=PLAIN,
        device=PLAIN,
        offsets=PLAIN,
        range=PLAIN,
        negative=PLAIN,
        non_finite=PLAIN,
        empty=PLAIN,
        model=PLAIN,
    )
    _e.refuses(
        "option",
        "an unknown option",
        lambda t, n=_name: t.command(n, "--fast"),
        "unrecognized arguments",
        "--fast",
        CommandRefused,
    )
    if _name not in ("demo", "bench"):
        Entry(f"airl-fast {_name}", CELLS, file="reads no file")
Entry("airl-fast demo", CELLS).refuses(
    "file",
    "a file for --output-dir",
    lambda t: t.command("demo", "--output-dir", t.file("x")),
    "rows.jsonl",
    "Not a directory",
    CommandRefused,
)
Entry("airl-fast bench", CELLS).refuses(
    "file",
    "a results file that does not exist",
    lambda t: t.command("bench", "--report", t.base / "nowhere.json"),
    "found no file",
    "expected a results.json of an earlier run",
    CommandRefused,
)
Entry("airl-fast bench", CELLS).refuses(
    "option",
    "a shape of two numbers",
    lambda t: t.command("bench", "--shape", "2,3"),
    "received 2,3",
    "expected N,V,D",
    CommandRefused,
)
