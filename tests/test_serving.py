"""The server in process: every protocol against transformers alone, every error, every limit."""

import asyncio
import json
import threading
from base64 import b64encode
from collections import Counter
from concurrent.futures import CancelledError

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")

import httpx

from airl_fast import RewardScorer
from airl_fast.integrations.rewards import RewardReader
from airl_fast.serving.app import Limits, make_app
from airl_fast.serving.batcher import Batcher, NonFiniteScore, QueueFull
from benchmarks.serving import TOLERANCE
from tests.tiny_reward import KAPPA, Truth, save_reward

PROMPT, COMPLETION = "1+1=", "ab1cd2ef"
GOOD = {"prompts": [PROMPT], "completions": [COMPLETION]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_reward(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def truth(folder):
    return Truth(folder)


@pytest.fixture(scope="module")
def scorer(folder):
    return RewardScorer.from_pretrained(folder)


@pytest.fixture(scope="module")
def app(scorer):
    return make_app(RewardReader(scorer=scorer), limits=Limits(request_bytes=4000))


def near(value):
    return pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE)


def ask(app, *requests, method="POST", headers=None):
    """Send requests (path and JSON, or bytes, or an iterator of bytes) at once."""

    async def run():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:

            def one(path, body):
                kind = "json" if isinstance(body, (dict, list)) else "content"
                return client.request(method, path, headers=headers, **{kind: body})

            return await asyncio.gather(*(one(*request) for request in requests))

    return asyncio.run(run())


def post(app, path, body, **options):
    (response,) = ask(app, (path, body), **options)
    return response


def test_score_is_all_that_the_scorer_says(app, scorer, truth):
    response = post(
        app, "/score", {"prompts": [PROMPT, [3, 4]], "completions": [COMPLETION, ["a1", "b"]]}
    )
    assert response.status_code == 200
    first, second = response.json()["results"]
    assert first["f"] == near(truth.f(PROMPT, COMPLETION))
    assert [step["text"] for step in first["steps"]] == ["ab1", "cd2", "ef"]
    assert first["granularity"] == "step"
    expected = scorer.score([[3, 4]], [["a1", "b"]])[0]
    assert second["reward"] == near(expected.reward)
    assert second["tokens"]["f"] == near(list(expected.tokens.f))
    unfinished = post(app, "/score", {**GOOD, "end_of_text": False}).json()["results"][0]
    assert unfinished["f"] == near(truth.f(PROMPT, COMPLETION, end_of_text=False))


def test_get_reward_as_openrlhf_asks(app, truth):
    query = [PROMPT + COMPLETION + "<eos>", PROMPT + COMPLETION, PROMPT + "<eos>"]
    answer = post(
        app, "/get_reward", {"query": query, "prompts": [PROMPT] * 3, "labels": ["2"] * 3}
    ).json()
    ids = truth.tokenizer(PROMPT).input_ids
    expected = [
        truth.f(PROMPT, COMPLETION),
        truth.f(PROMPT, COMPLETION, end_of_text=False),
        sum(truth.tokens(ids, [truth.tokenizer.eos_token_id])),
    ]
    assert answer["rewards"] == near(expected)
    assert answer["extra_logs"]["airl_fast_spans"] == [3, 3, 1]
    assert sorted(answer["scores"]) == [
        score for _, score in sorted(zip(answer["rewards"], answer["scores"], strict=True))
    ]
    assert all(0 <= score <= 1 for score in answer["scores"])


def test_pooling_as_vllm_answers(app, truth):
    ids = truth.tokenizer(PROMPT + COMPLETION).input_ids
    raw = {"model": "m", "task": "token_classify", "use_activation": False}
    f = truth.tokens(ids[:1], ids[1:])
    for given, sequences in (
        (PROMPT + COMPLETION, 1),
        ([PROMPT + COMPLETION] * 2, 2),
        (ids, 1),
        ([ids, ids], 2),
    ):
        answer = post(app, "/pooling", {**raw, "input": given}).json()
        assert (answer["object"], answer["model"]) == ("list", "m")
        assert answer["usage"]["prompt_tokens"] == sequences * len(ids)
        assert [one["index"] for one in answer["data"]] == list(range(sequences))
        for one in answer["data"]:
            assert one["object"] == "pooling"
            assert [len(row) for row in one["data"]] == [1] * len(ids)
            assert [row[0] for row in one["data"]] == near([0.0, *f])
    activated = post(app, "/pooling", {"input": ids}).json()["data"][0]["data"]
    assert activated[3][0] == near(2.718281828459045 ** f[2] / (1 + 2.718281828459045 ** f[2]))
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]
    rows = post(app, "/pooling", {**raw, "messages": chat}).json()["data"][0]["data"]
    prompt = truth.tokenizer("user: a\nassistant: ").input_ids
    completion = [*truth.tokenizer("bc").input_ids, truth.tokenizer.eos_token_id]
    expected = [*[0.0] * len(prompt), *truth.tokens(prompt, completion)]
    assert [row[0] for row in rows] == near(expected)


def test_classify_as_verl_reads_it(app, truth):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": COMPLETION}]
    text = truth.tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == f"user: a\nassistant: {COMPLETION}<eos>\n"
    for given in ({"input": text}, {"messages": chat}):
        answer = post(app, "/classify", {"model": "m", "use_activation": False, **given}).json()
        expected = truth.f("user: a\nassistant: ", COMPLETION)
        assert answer["data"][-1]["probs"][-1] == near(expected)


def test_many_at_once_get_their_own_answers(app, truth):
    texts = [f"{letter}{i}" * (1 + i % 3) for i, letter in enumerate("abcdefghijkl")]
    found = ask(app, *(("/score", {"prompts": [PROMPT], "completions": [t]}) for t in texts))
    for text, response in zip(texts, found, strict=True):
        assert response.json()["results"][0]["f"] == near(truth.f(PROMPT, text))


LONG = {"prompts": [PROMPT], "completions": ["1+1=2;" * 100]}


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/score", b"{", 400, "expected a JSON object, received '{'"),
        ("/score", b"\xff\xfe\x00", 400, "expected a JSON object"),
        ("/score", b"", 400, "expected a JSON object"),
        ("/score", b"[" * 3000, 400, "expected a JSON object"),
        ("/score", b'{"prompts": [NaN]}', 400, "NaN is no JSON"),
        ("/score", [1], 422, "the body: "),
        ("/score", {"prompts": "1+1=", "completions": ["2"]}, 422, "prompts: Input should be a"),
        ("/score", {"prompts": [PROMPT]}, 422, "completions: Field required"),
        ("/score", {**GOOD, "end": 1}, 422, "end: Extra inputs"),
        ("/score", {"prompts": [], "completions": []}, 422, "prompts: List should have at least 1"),
        ("/score", {"prompts": [PROMPT], "completions": []}, 422, "received 0 for 1"),
        ("/score", {"prompts": [""], "completions": ["2"]}, 422, "item 0: the prompt is empty"),
        ("/score", {"prompts": [PROMPT] * 2, "completions": ["2", ""]}, 422, "item 1: the compl"),
        ("/score", {"prompts": [PROMPT], "completions": [7]}, 422, "received int"),
        ("/score", {"prompts": [PROMPT], "completions": [None]}, 422, "received NoneType"),
        ("/score", {"prompts": [PROMPT], "completions": [[3, 99]]}, 422, "received 99"),
        ("/score", LONG, 422, "do not fit the model's context of 256"),
        ("/score", b'{"prompts": ["\\ud800"], "completions": ["a"]}', 422, "cannot encode"),
        ("/get_reward", {"query": ["b"], "prompts": ["a"]}, 422, "starts with its prompt 'a'"),
        ("/get_reward", {"query": ["ab"], "prompts": []}, 422, "a prompt for every query"),
        ("/get_reward", {"query": [1], "prompts": ["a"]}, 422, "query.0: Input should be a"),
        ("/pooling", {}, 422, "either 'input' or 'messages'"),
        ("/pooling", {"input": []}, 422, "received an empty list"),
        ("/pooling", {"input": "a"}, 422, "expected 2 tokens or more, received 1"),
        ("/pooling", {"input": "ab", "task": "embed"}, 422, "task: expected 'token_classify'"),
        ("/pooling", {"input": "ab", "truncate_prompt_tokens": 5}, 422, "nothing is truncated"),
        ("/pooling", {"messages": [{"role": "user", "content": "a"}]}, 422, "answer, received 1"),
        ("/classify", {"input": "no turn"}, 422, "which 'assistant: ' opens"),
        ("/classify", {"input": [3, 4]}, 422, "do not say where the completion begins"),
        ("/nowhere", {}, 404, "expected one of POST /score"),
    ],
)
def test_what_is_wrong_is_said_and_the_server_lives(app, path, body, status, message):
    response = post(app, path, body)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]
    assert post(app, "/score", GOOD).status_code == 200


def test_another_method_is_refused(app):
    response = post(app, "/score", b"", method="GET")
    assert response.status_code == 405
    assert "received GET /score" in response.json()["error"]["message"]


async def pieces(count):
    for _ in range(count):
        yield b" " * 1000


@pytest.mark.parametrize("body", [b" " * 5000, pieces(5), pieces(200)])
def test_a_body_beyond_the_limit_is_refused(app, body):
    response = post(app, "/score", body)
    assert response.status_code == 413
    assert "at most 4000 bytes" in response.json()["error"]["message"]
    assert post(app, "/score", GOOD).status_code == 200


def test_a_model_that_makes_nan_is_named_and_the_server_lives(folder):
    scorer = RewardScorer.from_pretrained(folder / "reward")
    app = make_app(RewardReader(scorer=scorer), limits=Limits())
    scorer.discriminator.kappa.data.fill_(float("nan"))
    for response in ask(app, *[("/score", GOOD)] * 3):
        assert response.status_code == 500
        assert "not finite" in response.json()["error"]["message"]
    scorer.discriminator.kappa.data.fill_(float("inf"))
    assert post(app, "/score", GOOD).status_code == 500
    scorer.discriminator.kappa.data.fill_(KAPPA)
    assert post(app, "/score", GOOD).status_code == 200


class Held:
    """A scorer that waits before it scores, and notes what it was asked for."""

    def __init__(self, scorer):
        self._scorer = scorer
        self.go, self.started, self.asked = threading.Event(), threading.Event(), []

    def __getattr__(self, name):
        return getattr(self._scorer, name)

    def score_encoded(self, pairs):
        self.asked += [pair.text for pair in pairs]
        self.started.set()
        assert self.go.wait(60)
        return self._scorer.score_encoded(pairs)


def test_too_many_are_sent_away_and_told_when_to_come_back(scorer):
    held = Held(scorer)
    app = make_app(RewardReader(scorer=held), limits=Limits(waiting=2))

    async def run():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            first = asyncio.create_task(client.post("/score", json=GOOD))
            await asyncio.to_thread(held.started.wait, 60)
            later = [asyncio.create_task(client.post("/score", json=GOOD)) for _ in range(5)]
            refused, pending = [], set(later)
            while len(refused) < 3:  # the two that may wait are answered after go
                done, pending = await asyncio.wait(pending, return_when="FIRST_COMPLETED")
                refused += done
            held.go.set()
            return [task.result() for task in refused], [await task for task in (first, *pending)]

    refused, served = asyncio.run(run())
    for response in refused:
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert "2 requests are waiting" in response.json()["error"]["message"]
    assert [response.status_code for response in served] == [200] * 3


def test_what_has_timed_out_is_not_scored(scorer):
    held = Held(scorer)
    app = make_app(RewardReader(scorer=held), limits=Limits(seconds=0.2))
    texts = ["a", "b"]
    for text in texts:
        response = post(app, "/score", {"prompts": [PROMPT], "completions": [text]})
        assert response.status_code == 504
        assert "not scored within 0.2 s" in response.json()["error"]["message"]
    held.go.set()
    app = make_app(RewardReader(scorer=held), limits=Limits())
    assert post(app, "/score", GOOD).status_code == 200
    assert held.asked == ["a", COMPLETION]  # b was waiting when it was given up


def test_a_token_is_asked_for(scorer):
    app = make_app(RewardReader(scorer=scorer), limits=Limits(), token="s3cret")
    basic = b64encode(b"any:s3cret").decode()
    for value, status in (
        (None, 401),
        ("Bearer wrong", 401),
        ("Bearer ", 401),
        ("s3cret", 401),
        ("Basic !", 401),
        ("Bearer s3cret", 200),
        ("bearer s3cret", 200),
        (f"Basic {basic}", 200),
    ):
        headers = {} if value is None else {"Authorization": value}
        assert post(app, "/score", GOOD, headers=headers).status_code == status
        assert post(app, "/metrics", b"", method="GET", headers=headers).status_code == status
    refused = post(app, "/score", GOOD)
    assert "Authorization: Bearer TOKEN" in refused.json()["error"]["message"]
    assert post(app, "/health", b"", method="GET").status_code == 200


def test_health_and_metrics(scorer):
    app = make_app(RewardReader(scorer=scorer), limits=Limits())
    health = post(app, "/health", b"", method="GET").json()
    assert (health["status"], health["granularity"], health["value"]) == ("ok", "step", "f")
    ask(app, ("/score", GOOD), ("/score", GOOD), ("/score", b"{"), ("/x", b""))
    text = post(app, "/metrics", b"", method="GET").text
    values = Counter()
    for line in text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            values[name] += float(value)
    assert values['airl_fast_requests_total{route="/score",status="200"}'] == 2
    assert values['airl_fast_requests_total{route="/score",status="400"}'] == 1
    assert values['airl_fast_requests_total{route="other",status="404"}'] == 1
    assert values['airl_fast_request_seconds_count{route="/score"}'] == 3
    assert values["airl_fast_batch_requests_sum"] == 2
    assert values["airl_fast_tokens_total"] == 2 * (len(PROMPT) + len(COMPLETION) + 1)
    assert values["airl_fast_queue_requests"] == values["airl_fast_queue_tokens"] == 0


def test_one_bad_job_fails_nobody_else(scorer):
    bad = scorer.encode(PROMPT, "bad")
    good = [scorer.encode(PROMPT, text) for text in ("a", "b", "c")]
    go = threading.Event()
    passes = []

    def score(pairs):
        assert go.wait(60)
        passes.append(len(pairs))
        if bad in pairs:
            raise RuntimeError("this one")
        return scorer.score_encoded(pairs)

    batcher = Batcher(score)
    futures = [batcher.submit([pair]) for pair in (good[0], bad, good[1], good[2])]
    cancelled = batcher.submit(good)
    assert cancelled.cancel()
    go.set()
    with pytest.raises(RuntimeError, match="this one"):
        futures.pop(1).result(60)
    for pair, future in zip(good, futures, strict=True):
        assert future.result(60)[0].text == pair.text
    with pytest.raises(CancelledError):
        cancelled.result(60)
    batcher.close()
    assert sum(passes) <= 1 + 3 + 4  # together, then each by itself; the cancelled one never
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit(good)


def test_a_batch_ends_at_the_token_budget(scorer):
    pair = scorer.encode(PROMPT, "abc")  # 4 tokens and 4
    go, sizes = threading.Event(), []

    def score(pairs):
        assert go.wait(60)
        sizes.append(len(pairs))
        return scorer.score_encoded(pairs)

    batcher = Batcher(score, token_budget=24, limit=8)
    first = batcher.submit([pair])
    while batcher.stats().waiting:
        first.running()
    futures = [batcher.submit([pair] * n) for n in (1, 1, 1, 1, 5, 1)]
    assert batcher.stats().waiting == 6
    assert batcher.stats().waiting_tokens == 80
    batcher.submit([pair]), batcher.submit([pair])
    with pytest.raises(QueueFull, match="8 requests are waiting"):
        batcher.submit([pair])
    go.set()
    batcher.close()
    assert [len(future.result()) for future in futures] == [1, 1, 1, 1, 5, 1]
    assert sizes == [1, 3, 1, 5, 3]
    assert batcher.stats().tokens == 8 * 13


def test_a_value_that_is_not_finite_fails_its_own_job_alone(scorer):
    import dataclasses

    pairs = [scorer.encode(PROMPT, text) for text in ("a", "b")]

    def score(given):
        found = scorer.score_encoded(given)
        return [
            dataclasses.replace(one, f=float("inf")) if one.text == "b" else one for one in found
        ]

    batcher = Batcher(score)
    good, bad = (batcher.submit([pair]) for pair in pairs)
    assert good.result(60)[0].text == "a"
    with pytest.raises(NonFiniteScore, match="scored 'b' with a value that is not finite"):
        bad.result(60)
    batcher.close()


def test_answers_are_plain_json(app):
    body = post(app, "/score", GOOD).content
    assert json.loads(body, parse_constant=pytest.fail)
