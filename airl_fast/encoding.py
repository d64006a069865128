"""Prompts and completions as people hold them (text, messages, steps, token ids), as token ids.

Nothing is truncated and nothing is lost in silence: a text that the tokenizer cannot write down
is refused. Steps are those of ``spans.py``.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

from airl_fast.parsing import shown, shown_names
from airl_fast.spans import decode, span_offsets, span_rule
from airl_fast.tasks.base import Example, Message, encode_completion, encode_prompt

Prompt = str | Sequence[Mapping[str, str]] | Sequence[Message] | Sequence[int]
Completion = str | Sequence[str] | Sequence[Mapping[str, str]] | Sequence[Message] | Sequence[int]

_FORMS = (
    "a text, messages (a list of {'role': ..., 'content': ...}) or token ids (a list of integers)"
)


@dataclass(frozen=True, kw_only=True)
class EncodedPair:
    """A prompt and a completion as token ids, with the completion's text and steps.

    Attributes:
        prompt: token ids.
        completion: token ids, end of text included where there is one.
        text: the completion decoded, without the special tokens at its end.
        offsets: start and end of every token in ``text``; those special tokens are empty.
        step_lengths: tokens of every step.
        of_policy: the same text and steps in the tokens of the policy, where its tokenizer is
            another.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    text: str
    offsets: tuple[tuple[int, int], ...]
    step_lengths: tuple[int, ...]
    of_policy: EncodedPair | None = None


class PairEncoder:
    """Encodes prompts and completions as training does.

    Args:
        tokenizer: of the models.
        boundary: regular expression that ends a step.
        vocabulary: number of token ids that the models know.
    """

    def __init__(self, tokenizer: Any, boundary: str, vocabulary: int) -> None:
        self.tokenizer = tokenizer
        self.boundary = re.compile(boundary)
        self.vocabulary = vocabulary
        self._step_lengths = span_rule("step", boundary=boundary, tokenizer=tokenizer)

    def encode(
        self, prompt: Prompt, completion: Completion, *, end_of_text: bool = True
    ) -> EncodedPair:
        """Encode one pair.

        Args:
            prompt: a text, continued as it stands; messages, put through the chat template; or
                token ids.
            completion: a text; one assistant message; token ids, taken as they are; or a list of
                texts, one a step, joined by newlines (but for steps that end with the boundary),
                whose steps are exactly these.
            end_of_text: append the end-of-text token to a completion that is not token ids.

        Raises:
            ValueError: another type, an empty text, a text that the tokenizer cannot represent,
                or a step without a token of its own.
        """
        prompt_ids = self._prompt(prompt)
        kind = _kind("completion", completion)
        steps = None
        if kind == "ids":
            ids = self._checked_ids("completion", completion)
        else:
            if kind == "steps":
                steps = self._separated(completion)  # type: ignore[arg-type]  # of texts
                given = "".join(steps)
            else:
                given = completion if isinstance(completion, str) else _only_message(completion)
            ids = self._encoded(
                "completion",
                lambda: encode_completion(given, self.tokenizer, end_of_text=end_of_text),
            )
        text, offsets = text_offsets(ids, self.tokenizer)
        if kind != "ids" and _essence(text) != _essence(given):
            raise _lossy("completion", given, text)
        return EncodedPair(
            prompt=prompt_ids,
            completion=ids,
            text=text,
            offsets=offsets,
            step_lengths=(
                self._step_lengths(ids) if steps is None else _given_steps(steps, text, offsets)
            ),
        )

    def _prompt(self, prompt: Prompt) -> tuple[int, ...]:
        kind = _kind("prompt", prompt)
        if kind == "ids":
            return self._checked_ids("prompt", prompt)
        if kind == "steps":
            raise ValueError(f"expected the prompt as {_FORMS}, received a list of texts")
        if kind == "messages":
            if not self.tokenizer.chat_template:
                raise ValueError(
                    f"the prompt is messages and the tokenizer of {self.tokenizer.name_or_path!r} "
                    "has no chat template: give the prompt as a text"
                )
            example = Example(prompt=tuple(_message(turn) for turn in prompt))
        else:
            assert isinstance(prompt, str)
            example = Example(prompt=prompt)
        ids = self._encoded("prompt", lambda: encode_prompt(example, self.tokenizer))
        if isinstance(prompt, str):
            written = decode(ids, self.tokenizer)  # a begin-of-text token may come first
            if not _essence(written).endswith(_essence(prompt)):
                raise _lossy("prompt", prompt, written)
        return ids

    def _encoded(self, name: str, encode: Callable[[], list[int]]) -> tuple[int, ...]:
        try:
            return tuple(encode())
        except ValueError:
            raise
        except Exception as error:  # the tokenizers library raises nothing more specific
            raise ValueError(
                f"the tokenizer of {self.tokenizer.name_or_path!r} cannot encode the {name} "
                f"({error}): use characters that it knows"
            ) from error

    def _checked_ids(self, name: str, ids: Sequence[Any]) -> tuple[int, ...]:
        outside = [token for token in ids if not 0 <= token < self.vocabulary]
        if outside:
            raise ValueError(
                f"expected token ids of the {name} from 0 to {self.vocabulary - 1}, received "
                f"{outside[0]}: encode with the model's own tokenizer"
            )
        return tuple(ids)

    def _separated(self, steps: Sequence[str]) -> list[str]:
        """Return the steps with what separates them: the boundary, or else a newline."""

        def ends(step: str) -> bool:
            return any(match.end() == len(step) for match in self.boundary.finditer(step))

        return [step if ends(step) else step + "\n" for step in steps[:-1]] + [steps[-1]]


def text_offsets(ids: tuple[int, ...], tokenizer: Any) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Return the text and where each token is in it; special tokens at the end are empty."""
    special, length = set(tokenizer.all_special_ids), len(ids)
    while length and ids[length - 1] in special:
        length -= 1
    body = ids[:length]
    text = decode(body, tokenizer) if body else ""
    found = span_offsets(body, (1,) * length, tokenizer) if body else []
    end = (len(text), len(text))
    return text, (*found, *[end] * (len(ids) - length))


def _kind(name: str, value: Any) -> Literal["text", "messages", "steps", "ids"]:
    if isinstance(value, str):
        if not value:
            raise ValueError(f"the {name} is empty: expected {_FORMS}")
        return "text"
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        if not value:
            raise ValueError(f"the {name} is an empty list: expected {_FORMS}")
        if all(isinstance(item, int) and not isinstance(item, bool) for item in value):
            return "ids"
        if all(isinstance(item, (Mapping, Message)) for item in value):
            return "messages"
        if all(isinstance(item, str) for item in value):
            return "steps"
    items = ""
    if isinstance(value, Sequence):
        items = " of " + ", ".join(sorted({type(item).__name__ for item in value}))
    raise ValueError(f"expected the {name} as {_FORMS}, received {type(value).__name__}{items}")


def _message(turn: Any) -> Message:
    if isinstance(turn, Message):
        return turn
    role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(
            f"expected a message as {{'role': text, 'content': text}}, received {shown(dict(turn))}"
        )
    return Message(role=role, content=content)


def _only_message(turns: Any) -> str:
    messages = [_message(turn) for turn in turns]
    if len(messages) != 1 or messages[0].role != "assistant":
        roles = shown_names(message.role for message in messages)
        raise ValueError(
            f"expected a completion of one assistant message, received the roles {roles}: put "
            "earlier turns into the prompt"
        )
    return messages[0].content


def _given_steps(
    steps: Sequence[str], text: str, offsets: Sequence[tuple[int, int]]
) -> tuple[int, ...]:
    """Return the tokens of each step: a step ends with the token that holds its last character."""
    if text != "".join(steps):
        steps = [unicodedata.normalize("NFC", step) for step in steps]  # what Qwen's does
    if text != "".join(steps):
        raise _lossy("completion", "".join(steps), text)
    token_ends = [end for _, end in offsets]
    ends = [bisect_left(token_ends, end) + 1 for end in accumulate(map(len, steps))]
    ends[-1] = len(offsets)  # with the end of text
    for i, (before, end) in enumerate(pairwise([0, *ends])):
        if end <= before:
            raise ValueError(
                f"step {i} ({shown(steps[i])}) has no token of its own: the tokenizer writes its "
                "end "
                "together with a neighbour's; join it with the step before or after it"
            )
    return tuple(end - before for before, end in pairwise([0, *ends]))


def _essence(text: str) -> str:
    """The text less what tokenizers change in good faith: number of spaces, case, composition."""
    return re.sub(" +", " ", unicodedata.normalize("NFKC", text).casefold()).strip(" ")


def _lossy(name: str, given: str, written: str) -> ValueError:
    return ValueError(
        f"the tokenizer does not give the {name} back: {given[:80]!r} becomes {written[:80]!r}; "
        "use characters that it knows"
    )
