"""What a task is: prompts, expert completions, a verifier, and a way to plant one wrong step."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str  # "system", "user" or "assistant"
    content: str


Prompt = str | tuple[Message, ...]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One problem. A plain prompt is continued as it stands; messages go through a chat template.

    ``completion`` is an expert's demonstration (in ``validation`` and ``test``: a correct
    reference), or None for a prompt without one. ``answer`` is what the verifier compares with.
    """

    prompt: Prompt
    completion: str | None = None
    answer: str | None = None
    id: str = ""


class Task(Protocol):
    """A set of problems with their verifier.

    ``train`` has a demonstration in every example; ``unlabelled`` has prompts without one (their
    answers, where known, serve baselines only). No problem is in two of the four sets.
    """

    name: str
    step_boundary: str  # regex; a step ends where a match ends
    validation: list[Example]
    test: list[Example]

    @property
    def train(self) -> Sequence[Example]:
        """Examples with demonstrations; large data is read when it is asked for."""
        ...

    @property
    def unlabelled(self) -> Sequence[Example]:
        """Prompts without demonstrations."""
        ...

    def is_correct(self, completion: str, example: Example) -> bool:
        """Say whether the completion's final answer is the example's."""
        ...

    @staticmethod
    def extract_answer(completion: str) -> str | None:
        """Return the final answer in a comparable form, or None when there is none."""
        ...

    def corrupt(self, completion: str, rng: random.Random) -> tuple[str, int]:
        """Plant one wrong step; return the changed text and the 0-based index of that step."""
        ...


def step_index(text: str, position: int, boundary: str) -> int:
    """Return the 0-based step that holds the character at ``position``.

    A step ends where a match of ``boundary`` ends (the rule of ``spans.py``), so this is the
    number of matches that end at or before ``position``.
    """
    return sum(match.end() <= position for match in re.finditer(boundary, text))


def split_steps(text: str, boundary: str) -> list[str]:
    """Cut a text into its steps, delimiters kept, so that joining them gives the text back."""
    ends = sorted({0, *(match.end() for match in re.finditer(boundary, text)), len(text)})
    return [text[start:end] for start, end in pairwise(ends)]


def other_digit(text: str, place: int, rng: random.Random) -> str:
    """Return the text with the digit at ``place`` replaced, never by a new leading zero."""
    leads = not text[:place][-1:].isdigit() and text[place + 1 : place + 2].isdigit()
    digits = [d for d in "0123456789" if d != text[place] and not (leads and d == "0")]
    return text[:place] + rng.choice(digits) + text[place + 1 :]


def encode_prompt(example: Example, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the prompt's token ids, ready to be continued.

    A plain prompt gets the special tokens that the tokenizer puts in front (a begin-of-text
    token, where the model has one) and no end-of-text token; messages go through the
    tokenizer's chat template with the assistant's turn opened.

    Raises:
        ValueError: messages without a chat template, or a prompt of no tokens.
    """
    if isinstance(example.prompt, str):
        ids = list(tokenizer(example.prompt).input_ids)
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
            ids.pop()  # some tokenizers close every text; a prompt is to be continued
    else:
        if not tokenizer.chat_template:
            raise ValueError(
                f"example {example.id!r}: the prompt is a conversation and the tokenizer of "
                f"{tokenizer.name_or_path!r} has no chat template; set task.chat=false (gsm8k), "
                "give plain prompts, or use a chat model"
            )
        messages = [{"role": turn.role, "content": turn.content} for turn in example.prompt]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # The template writes the special tokens itself.
        ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    if not ids:
        raise ValueError(
            f"example {example.id!r}: the prompt {example.prompt!r} has no tokens; "
            "give at least one character that the tokenizer knows"
        )
    return ids


def encode_completion(
    text: str, tokenizer: "PreTrainedTokenizerBase", *, end_of_text: bool = True
) -> list[int]:
    """Return the completion's token ids, followed by the end-of-text token if asked for.

    The completion is encoded on its own, as a model writes it: no token joins prompt and
    completion.

    Raises:
        ValueError: an empty completion, one that contains the end-of-text token as text, or
            ``end_of_text`` with a tokenizer that has none.
    """
    ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    if not ids:
        raise ValueError(f"the completion {text!r} has no tokens; a trace needs at least one")
    eos = tokenizer.eos_token_id
    if eos is not None and eos in ids:
        raise ValueError(
            f"the completion contains the end-of-text token {tokenizer.eos_token!r} as text: "
            f"{text[:80]!r}; remove it, it is added at the end"
        )
    if not end_of_text:
        return ids
    if eos is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no end-of-text token; set "
            "tokenizer.eos_token, or pass end_of_text=False"
        )
    return [*ids, eos]
