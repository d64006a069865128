"""Where other trainers give one text, the prompt and the completion in it."""

from __future__ import annotations

from typing import Any

from airl_fast.encoding import EncodedPair
from airl_fast.integrations.rewards import RewardReader


def text_ids(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """Encode a text that may hold special tokens already.

    Args:
        tokenizer: of the scorer.
        text: not empty.
        special: add special tokens (begin of text), unless the text starts with that token.

    Raises:
        ValueError: an empty text, or one that the tokenizer does not know.
    """
    if not text:
        raise ValueError("the text is empty: expected one character or more")
    starts = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    try:
        ids = list(tokenizer(text, add_special_tokens=special and not starts).input_ids)
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise ValueError(
            f"the tokenizer cannot encode {text[:80]!r} ({error}): use characters that it knows"
        ) from error
    unknown = tokenizer.unk_token
    if unknown is not None and unknown not in text and tokenizer.unk_token_id in ids:
        raise ValueError(
            f"the tokenizer does not know all of {text[:80]!r}: use characters that it knows"
        )
    return ids


def completion_pair(reader: RewardReader, query: str, prompt: str) -> EncodedPair:
    """Encode a query, which is a prompt and its completion in one text, special tokens written out.

    An end-of-text token at the end says that the completion is finished; without one none is added.
    A prompt that starts with the begin-of-text token gets no second one.

    Raises:
        ValueError: the query does not start with the prompt, or the scorer cannot take them.
    """
    if not query.startswith(prompt):
        raise ValueError(
            f"expected a query that starts with its prompt {prompt[:80]!r}, received "
            f"{query[:80]!r}: a prompt that was truncated has lost its start; raise the limit on "
            "prompts"
        )
    tokenizer = reader.scorer.tokenizer
    completion, end = query[len(prompt) :], tokenizer.eos_token
    finished = end is not None and completion.endswith(end)
    if finished and completion == end:
        return reader.encode(_prompt(tokenizer, prompt), [tokenizer.eos_token_id])
    if finished:
        completion = completion.removesuffix(end)
    return reader.encode(_prompt(tokenizer, prompt), completion, end_of_text=finished)


def last_turn_pair(reader: RewardReader, given: str | list[int]) -> EncodedPair:
    """Encode a conversation that went through the chat template; its last turn is the completion.

    Raises:
        ValueError: token ids, a tokenizer without a template, or no assistant's turn in the text.
    """
    tokenizer = reader.scorer.tokenizer
    remedy = "send 'messages', or prompts and completions to /score"
    if not isinstance(given, str):
        raise ValueError(f"token ids do not say where the completion begins: {remedy}")
    if not tokenizer.chat_template:
        raise ValueError(f"without a chat template no turn can be found in the text: {remedy}")
    opening = _opening(tokenizer)
    start = given.rfind(opening) + len(opening)
    if start < len(opening) or not opening:
        raise ValueError(
            f"expected a text with an assistant's turn, which {opening!r} opens, received "
            f"{given[:80]!r}: {remedy}"
        )
    prompt, turn, end = given[:start], given[start:], tokenizer.eos_token
    finished = end is not None and turn.rstrip().endswith(end)
    if finished:  # templates write a newline after it
        turn = turn.rstrip().removesuffix(end)
    return reader.encode(_prompt(tokenizer, prompt), turn, end_of_text=finished)


def _prompt(tokenizer: Any, prompt: str) -> str | list[int]:
    """A prompt as the scorer encodes it, unless it has its special tokens already."""
    bos = tokenizer.bos_token
    if bos is not None and prompt.startswith(bos):
        return text_ids(tokenizer, prompt, special=False)
    return prompt


def _opening(tokenizer: Any) -> str:
    """What the chat template writes before an assistant's answer."""
    turn = [{"role": "user", "content": "x"}]
    closed, opened = (
        tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=generation)
        for generation in (False, True)
    )
    return str(opened[len(closed) :] if opened.startswith(closed) else "")
