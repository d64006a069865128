"""What the server is asked and what it answers: our own form, OpenRLHF's, vLLM's and verl's.

Each protocol turns a request into pairs to score, and their scores into a response. Everything
here is plain data; tokenizers and models are reached through the scorer alone.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, ClassVar
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field

from airl_fast.encoding import EncodedPair
from airl_fast.integrations.rewards import RewardReader
from airl_fast.integrations.texts import completion_pair, last_turn_pair, text_ids
from airl_fast.parsing import shown
from airl_fast.scores import Scored


class Request(BaseModel, ABC):
    """A request's body; ``pairs`` says what to score and ``response`` what came of it."""

    model_config = ConfigDict(strict=True, extra="ignore")

    @abstractmethod
    def pairs(self, reader: RewardReader) -> list[EncodedPair]:
        """Encode what is to be scored.

        Raises:
            ValueError: what the scorer cannot take, with the position.
        """

    @abstractmethod
    def response(
        self, reader: RewardReader, pairs: Sequence[EncodedPair], scored: Sequence[Scored]
    ) -> dict[str, Any]:
        """The JSON that is answered."""


class ScoreRequest(Request):
    """``POST /score``: all that the scorer says, as ``airl-fast score`` writes it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    prompts: list[Any] = Field(min_length=1)
    completions: list[Any]
    end_of_text: bool = True

    def pairs(self, reader: RewardReader) -> list[EncodedPair]:
        """As ``RewardScorer.score``."""
        if len(self.prompts) != len(self.completions):
            raise ValueError(
                f"expected as many completions as prompts, received {len(self.completions)} for "
                f"{len(self.prompts)}: repeat a prompt for each of its completions"
            )
        given = list(zip(self.prompts, self.completions, strict=True))
        return _each(given, lambda pair: reader.scorer.encode(*pair, end_of_text=self.end_of_text))

    def response(
        self, reader: RewardReader, pairs: Sequence[EncodedPair], scored: Sequence[Scored]
    ) -> dict[str, Any]:
        """``{"results": [Scored]}``."""
        return {"results": [asdict(one) for one in scored]}


class OpenRLHFRequest(Request):
    """``POST /get_reward``: OpenRLHF's, whose queries are prompt and response in one text."""

    query: list[str] = Field(min_length=1)
    prompts: list[str]
    labels: list[Any] | None = None

    def pairs(self, reader: RewardReader) -> list[EncodedPair]:
        """The completion is what follows the prompt."""
        if len(self.prompts) != len(self.query):
            raise ValueError(
                f"expected a prompt for every query, received {len(self.prompts)} for "
                f"{len(self.query)}: the reward needs to know where the response begins"
            )
        given = list(zip(self.query, self.prompts, strict=True))
        return _each(given, lambda one: completion_pair(reader, *one))

    def response(
        self, reader: RewardReader, pairs: Sequence[EncodedPair], scored: Sequence[Scored]
    ) -> dict[str, Any]:
        """``rewards``, their sigmoids as ``scores`` in [0, 1], and numbers to log."""
        return openrlhf_answer(reader, pairs, scored)


class _VLLMRequest(Request):
    """What ``/pooling`` and ``/classify`` share.

    An option that would change the answer and that the server has not is refused.
    """

    model: str | None = None
    input: str | list[str] | list[int] | list[list[int]] | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    use_activation: bool | None = None
    truncate_prompt_tokens: int | None = None
    dimensions: int | None = None
    encoding_format: str = "float"
    task: str | None = None

    tasks: ClassVar[tuple[str | None, ...]] = ()

    def check(self) -> None:
        """Refuse options that cannot be served, and two inputs or none."""
        refused = {
            "truncate_prompt_tokens": (self.truncate_prompt_tokens, None, "nothing is truncated"),
            "dimensions": (self.dimensions, None, "a reward has one"),
            "encoding_format": (self.encoding_format, "float", "answers are JSON numbers"),
        }
        for name, (value, only, why) in refused.items():
            if value != only:
                raise ValueError(f"{name}: received {shown(value)}, but {why}: leave it out")
        if self.task not in self.tasks:
            names = ", ".join(repr(task) for task in self.tasks if task)
            raise ValueError(f"task: expected {names} or none, received {shown(self.task)}")
        if (self.input is None) == (self.messages is None):
            raise ValueError("expected either 'input' or 'messages', received both or none")

    def inputs(self) -> list[str | list[int]]:
        """The texts and token ids of ``input``, one of each sequence."""
        given = self.input
        one = isinstance(given, str) or (given and isinstance(given[0], int))
        if one:
            return [given]  # type: ignore[list-item]  # a text, or the ids of one sequence
        if not given:
            raise ValueError("input: expected a text or token ids, received an empty list")
        return list(given)  # type: ignore[arg-type]  # texts, or ids of several

    def chat_pair(self, reader: RewardReader) -> EncodedPair:
        """The last message is the completion, those before it are the prompt."""
        messages = self.messages or []
        if len(messages) < 2:
            raise ValueError(
                f"messages: expected a prompt and the assistant's answer, received {len(messages)}"
            )
        return reader.encode(messages[:-1], messages[-1:])

    def envelope(
        self, kind: str, data: list[dict[str, Any]], pairs: Sequence[EncodedPair]
    ) -> dict[str, Any]:
        """What vLLM puts around its answers."""
        tokens = sum(len(pair.prompt) + len(pair.completion) for pair in pairs)
        return {
            "id": f"{kind}-{uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": self.model or "airl_fast",
            "data": data,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
        }

    def activated(self, value: float) -> float:
        """A sigmoid, unless ``use_activation`` is false: vLLM's for a model of one label."""
        return value if self.use_activation is False else sigmoid(value)


class PoolingRequest(_VLLMRequest):
    """``POST /pooling``: vLLM's token_classify, a row of one value for every token.

    The value is that of the token as a span of its own. A token that is no action has 0: of
    ``input`` the first, of ``messages`` the prompt's.
    """

    tasks = ("token_classify", None)

    def pairs(self, reader: RewardReader) -> list[EncodedPair]:
        """Of ``input``, all tokens after the first are the completion."""
        self.check()
        if self.messages is not None:
            return [self.chat_pair(reader)]

        def split(given: str | list[int]) -> EncodedPair:
            tokenizer, special = reader.scorer.tokenizer, self.add_special_tokens
            ids = text_ids(tokenizer, given, special=special) if isinstance(given, str) else given
            if len(ids) < 2:
                raise ValueError(
                    f"expected 2 tokens or more, received {len(ids)}: the first has no reward"
                )
            pair = reader.scorer.encode(ids[:1], ids[1:])
            return replace(pair, step_lengths=(len(pair.completion),))

        return _each(self.inputs(), split)

    def response(
        self, reader: RewardReader, pairs: Sequence[EncodedPair], scored: Sequence[Scored]
    ) -> dict[str, Any]:
        """``{"data": [{"index", "object": "pooling", "data": [[value], ...]}]}``."""
        data = []
        for i, (pair, one) in enumerate(zip(pairs, scored, strict=True)):
            values = one.tokens.f if reader.value == "f" else one.tokens.reward or ()
            rows = [[0.0]] * len(pair.prompt) + [[self.activated(value)] for value in values]
            data.append({"index": i, "object": "pooling", "data": rows})
        return self.envelope("pool", data, pairs)


class ClassifyRequest(_VLLMRequest):
    """``POST /classify``: one reward a sequence, where verl reads ``data[-1].probs[-1]``."""

    tasks = ("classify", None)

    def pairs(self, reader: RewardReader) -> list[EncodedPair]:
        """Of ``input``, the completion is the last assistant's turn of the chat template."""
        self.check()
        if self.messages is not None:
            return [self.chat_pair(reader)]
        return _each(self.inputs(), lambda given: last_turn_pair(reader, given))

    def response(
        self, reader: RewardReader, pairs: Sequence[EncodedPair], scored: Sequence[Scored]
    ) -> dict[str, Any]:
        """``{"data": [{"index", "label": "reward", "probs": [value], "num_classes": 1}]}``."""
        values = [
            self.activated(reader.scalar(reader.read(pair, one)))
            for pair, one in zip(pairs, scored, strict=True)
        ]
        data = [
            {"index": i, "label": "reward", "probs": [value], "num_classes": 1}
            for i, value in enumerate(values)
        ]
        return self.envelope("classify", data, pairs)


ROUTES: dict[str, type[Request]] = {
    "/score": ScoreRequest,
    "/get_reward": OpenRLHFRequest,
    "/pooling": PoolingRequest,
    "/classify": ClassifyRequest,
}


def openrlhf_answer(
    reader: RewardReader, pairs: Sequence[EncodedPair], scored: Sequence[Scored]
) -> dict[str, Any]:
    """What OpenRLHF reads: ``rewards``, ``scores`` in [0, 1] and ``extra_logs``, all lists."""
    found = [reader.read(pair, one) for pair, one in zip(pairs, scored, strict=True)]
    rewards = [reader.scalar(one) for one in found]
    return {
        "rewards": rewards,
        "scores": [sigmoid(reward) for reward in rewards],
        "extra_logs": {
            "airl_fast_f": [one.f for one in scored],
            "airl_fast_spans": [len(one.values) for one in found],
            "airl_fast_lowest": [min(one.values) for one in found],
        },
    }


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), for any x."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _each(given: Sequence[Any], encode: Any) -> list[EncodedPair]:
    pairs = []
    for i, one in enumerate(given):
        try:
            pairs.append(encode(one))
        except ValueError as error:
            raise ValueError(f"item {i}: {error}") from error
    return pairs
