"""The rows of the server."""

from __future__ import annotations

from typing import Any

from airl_fast.serving.app import Limits
from tests.robustness.table import Answered, Cell, Entry

CELLS: list[Cell] = []
TEXT = "takes texts and token ids"
AS_SCORE = "as RewardScorer.score"

_e = Entry(
    "serving.app.Limits",
    CELLS,
    shape="takes numbers",
    dtype="takes numbers",
    device="takes numbers",
    offsets="takes numbers",
    range="takes numbers",
    empty="takes numbers",
    file="takes numbers",
    model="takes numbers",
    option="takes numbers",
)
_e.refuses("negative", "waiting=0", lambda _: Limits(waiting=0), "received 0", "raise it")
_e.refuses(
    "non-finite", "NaN seconds", lambda _: Limits(seconds=float("nan")), "received nan", "raise it"
)

BODIES: dict[str, dict[str, Any]] = {
    "/score": {"prompts": ["1"], "completions": ["ab"]},
    "/get_reward": {"query": ["1ab"], "prompts": ["1"]},
    "/pooling": {"input": "1ab"},
    "/classify": {
        "messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "ab"}]
    },
}
SHORT = {
    "/score": {"prompts": []},
    "/get_reward": {"query": []},
    "/pooling": {"input": []},
    "/classify": {"messages": []},
}
ODD = {
    "/score": {"prompts": 7},
    "/get_reward": {"query": [7]},
    "/pooling": {"input": 7.5},
    "/classify": {"messages": 7},
}
for _path, _body in BODIES.items():

    def posted(changed: Any, path: str = _path, body: Any = _body) -> Any:
        return lambda t: t.ask(path, body | changed if isinstance(changed, dict) else changed)

    _e = Entry(
        f"POST {_path}",
        CELLS,
        shape=TEXT,
        device="takes the server's",
        offsets="has none",
        file="reads no file",
        model="has one reward: the body's model name is not read",
    )
    _e.refuses("dtype", "a number", posted(ODD[_path]), "422:", "expected an object with", Answered)
    _e.refuses(
        "dtype",
        "an array for the body",
        posted(b"[]"),
        "received []",
        "expected an object with",
        Answered,
    )
    _e.refuses(
        "non-finite",
        "NaN in the body",
        posted(b'{"prompts": [NaN]}'),
        "NaN is no JSON",
        "check the body",
        Answered,
    )
    _e.refuses("empty", "nothing in it", posted(SHORT[_path]), "422:", "expected", Answered)
    _e.refuses(
        "empty",
        "an empty body",
        posted(b""),
        "400: expected a JSON object, received ''",
        "check the body",
        Answered,
    )
    _e.refuses(
        "option",
        "half a body",
        posted(b'{"prompts": ["1'),
        "400: expected a JSON object",
        "check the body",
        Answered,
    )
    _e.refuses(
        "option",
        "GET",
        lambda t, p=_path: t.ask(p, b"", method="GET"),
        f"received GET {_path}",
        "expected one of POST /score",
        Answered,
    )
    _e.refuses(
        "range",
        "a body above the limit",
        posted({"x": "a" * 5000}),
        "413: expected a body of at most 4000 bytes",
        "raise --max-request-mib",
        Answered,
    )
for _path, _ids in (("/score", {"completions": [[999]]}), ("/pooling", {"input": [3, 999]})):
    _e = Entry(f"POST {_path}", CELLS)
    _e.refuses(
        "range",
        "a token id past the vocabulary",
        posted(_ids, _path, BODIES[_path]),
        "received 999",
        "encode with the model's own tokenizer",
        Answered,
    )
    _low = {"completions": [[-1]]} if _path == "/score" else {"input": [3, -1]}
    _e.refuses(
        "negative",
        "a token id of -1",
        posted(_low, _path, BODIES[_path]),
        "received -1",
        "encode with the model's own tokenizer",
        Answered,
    )
for _path in ("/get_reward", "/classify"):
    Entry(f"POST {_path}", CELLS, negative="takes texts here")
for _path in ("/health", "/metrics"):
    _no = "takes no body"
    _e = Entry(
        f"GET {_path}",
        CELLS,
        shape=_no,
        dtype=_no,
        device=_no,
        offsets=_no,
        range=_no,
        negative=_no,
        non_finite=_no,
        empty=_no,
        file=_no,
        model=_no,
    )
    _e.refuses(
        "option",
        "POST",
        lambda t, p=_path: t.ask(p, b""),
        f"received POST {_path}",
        "GET /health, GET /metrics",
        Answered,
    )
