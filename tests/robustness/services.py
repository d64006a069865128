"""The rows of the integrations, the server and the commands."""

from __future__ import annotations

from typing import Any

from airl_fast.integrations.rewards import RewardReader
from airl_fast.serving.app import Limits
from tests.robustness.table import Answered, Cell, CommandRefused, Entry

CELLS: list[Cell] = []
TEXT = "takes texts and token ids"
AS_SCORE = "as RewardScorer.score"

_e = Entry(
    "integrations.RewardReader",
    CELLS,
    shape="takes a scorer",
    dtype="takes a scorer",
    device="takes a scorer",
    offsets="takes a scorer",
    range="takes a scorer",
    negative="takes a scorer",
    non_finite="takes a scorer",
    empty="takes a scorer",
    file="takes a scorer",
)
_e.refuses(
    "option",
    'value="logp"',
    lambda t: RewardReader(scorer=t.scorer, value="logp"),
    "received 'logp'",
    "expected value='f' or 'reward'",
)
_e.refuses(
    "option",
    'reduce="max"',
    lambda t: RewardReader(scorer=t.scorer, reduce="max"),
    "received 'max'",
    "expected reduce to be one of sum, mean, min, last",
)
_e.refuses(
    "model",
    '"reward" without a policy',
    lambda t: RewardReader(scorer=t.lone, value="reward"),
    "was loaded alone",
    "pass policy=",
)


def trl(prompts: Any, completions: Any, ids: Any, **options: Any) -> Any:
    def call(t: Any) -> Any:
        from airl_fast.integrations.trl import reward_function

        return reward_function(t.scorer, **options)(
            prompts=prompts, completions=completions, completion_ids=ids
        )

    return call


_e = Entry(
    "integrations.trl.reward_function",
    CELLS,
    shape=TEXT,
    device="takes the scorer's",
    offsets="has none",
    non_finite=TEXT,
    file="reads no file",
)
_e.refuses(
    "dtype",
    "a number for a prompt",
    trl([7], ["a"], [[24]]),
    "completion 0: expected the prompt as",
    "received int",
)
_e.refuses(
    "range",
    "a token id past the vocabulary",
    trl(["1"], ["a"], [[999]]),
    "received 999",
    "encode with the model's own tokenizer",
)
_e.refuses(
    "negative",
    "a token id of -1",
    trl(["1"], ["a"], [[-1]]),
    "received -1",
    "encode with the model's own tokenizer",
)
_e.refuses(
    "empty",
    "no token ids at all",
    trl(["1"], ["a"], None),
    "received none",
    "call this function as GRPOTrainer does",
)
_e.refuses(
    "empty",
    "a completion of no tokens",
    trl(["1"], ["a"], [[]]),
    "completion 0: the completion is an empty list",
    "token ids",
)
_e.refuses(
    "option",
    'score="logits"',
    trl(["1"], ["a"], [[24]], score="logits"),
    "received 'logits'",
    "expected score='ids' or 'text'",
)
_e.refuses(
    "model",
    "ids of another tokenizer",
    trl(["1"], ["zz"], [[24]]),
    "spells the policy's token ids",
    "pass score='text'",
)

_e = Entry(
    "integrations.trl.DenseGRPOTrainer",
    CELLS,
    shape=TEXT,
    dtype=TEXT,
    device="accelerate's",
    offsets="makes them",
    range=TEXT,
    negative=TEXT,
    non_finite="token_advantages refuses them",
    file="as GRPOTrainer",
    empty="as GRPOTrainer",
)


def dense(**changed: Any) -> Any:
    def call(t: Any) -> Any:
        from trl import GRPOConfig

        from airl_fast.integrations.trl import DenseGRPOTrainer

        options = {"scale_rewards": changed.pop("scale_rewards", "group")}
        args = GRPOConfig(output_dir=str(t.folder()), report_to=[], use_cpu=True, **options)
        scorer = t.lone if changed.get("value") == "reward" else t.scorer
        return DenseGRPOTrainer(t.policy.causal_lm, scorer=scorer, args=args, **changed)

    return call


_e.refuses(
    "option",
    'scale_rewards="batch"',
    dense(scale_rewards="batch"),
    "received 'batch'",
    "set one of them in GRPOConfig",
)
_e.refuses(
    "option",
    "tools",
    dense(tools=[print]),
    "received tools",
    "use GRPOTrainer with airl_fast's reward_function",
)
_e.refuses(
    "option",
    "an unknown baseline",
    dense(baseline="median"),
    "received 'median'",
    "one of 'mean', 'leave_one_out', 'none'",
)
_e.refuses("option", "gamma=2", dense(gamma=2.0), "received 2.0", "a discount in [0, 1]")
_e.refuses(
    "model", '"reward" without a policy', dense(value="reward"), "was loaded alone", "pass policy="
)


def verl(text: Any, **changed: Any) -> Any:
    def call(t: Any) -> Any:
        from airl_fast.integrations.verl import compute_score

        given = {"extra_info": {"prompt": "1"}, "reward": str(t.reward)} | changed
        return compute_score("x", text, None, **given)

    return call


_e = Entry(
    "integrations.verl.compute_score",
    CELLS,
    shape=TEXT,
    device="AIRL_FAST_DEVICE",
    offsets="has none",
    range=AS_SCORE,
    negative=AS_SCORE,
    non_finite=TEXT,
)
_e.refuses("dtype", "a number for the response", verl(7), "received int", "a text, messages")
_e.refuses(
    "empty",
    "no prompt",
    verl("a", extra_info={}),
    "received none",
    "add it to the data set's extra_info",
)
_e.refuses("empty", "an empty response", verl(""), "the completion is empty", "a text, messages")
_e.refuses(
    "option",
    'reduce="max"',
    verl("a", reduce="max"),
    "received 'max'",
    "expected reduce to be one of sum, mean, min, last",
)
_e.refuses(
    "file",
    "a folder that does not exist",
    verl("a", reward="/nowhere"),
    "no such folder",
    "give the run.output_dir",
)
_e.refuses(
    "model", "no reward named", verl("a", reward=None), "no reward is named", "set AIRL_FAST_REWARD"
)


def openrlhf(queries: Any, prompts: Any, environment: str | None = "") -> Any:
    def call(t: Any) -> Any:
        import os

        from airl_fast.integrations.openrlhf import reward_func

        before = os.environ.pop("AIRL_FAST_REWARD", None)
        if environment is not None:
            os.environ["AIRL_FAST_REWARD"] = environment or str(t.reward)
        try:
            return reward_func(queries, prompts, None)
        finally:
            os.environ.pop("AIRL_FAST_REWARD", None)
            if before is not None:
                os.environ["AIRL_FAST_REWARD"] = before

    return call


_e = Entry(
    "integrations.openrlhf.reward_func",
    CELLS,
    shape=TEXT,
    device="AIRL_FAST_DEVICE",
    offsets="has none",
    range=AS_SCORE,
    negative=AS_SCORE,
    non_finite=TEXT,
)
_e.refuses("dtype", "numbers for queries", openrlhf([7], ["1"]), "7", "valid string")
_e.refuses("empty", "no queries", openrlhf([], []), "[]", "at least 1 item")
_e.refuses(
    "option",
    "a query without its prompt",
    openrlhf(["2ab"], ["1"]),
    "received '2ab'",
    "raise the limit on prompts",
)
_e.refuses(
    "option",
    "1 prompt for 2 queries",
    openrlhf(["1a", "1b"], ["1"]),
    "received 1 for 2",
    "the reward needs to know where the response begins",
)
_e.refuses(
    "file",
    "a folder that does not exist",
    openrlhf(["1a"], ["1"], "/nowhere"),
    "no such folder",
    "give the run.output_dir",
)
_e.refuses(
    "model",
    "no reward named",
    openrlhf(["1a"], ["1"], None),
    "no reward is named",
    "set AIRL_FAST_REWARD",
)

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
