"""Reward granularity: every one is a cut of a completion into spans of tokens.

Dense: one token a span. Interval: k tokens. Step: up to and including the token in which a step
boundary ends. Sparse: the whole completion. What comes later sees span lengths only.

Offsets are characters of the completion decoded as it stands, special tokens and spaces kept
(:func:`decode`). A character split over several tokens belongs to the token that completes it.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Granularity = Literal["dense", "interval", "step", "sparse"]
SpanRule = Callable[[Sequence[int]], tuple[int, ...]]
_INCOMPLETE = "\ufffd"  # how decoders show the bytes of a character that is not complete yet


def span_rule(
    granularity: Granularity,
    *,
    interval: int = 8,
    boundary: str = "\n",
    boundary_ids: Sequence[int] | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> SpanRule:
    r"""Return the function that cuts a completion (token ids) into span lengths.

    Args:
        granularity: ``"dense"``, ``"interval"``, ``"step"`` or ``"sparse"``.
        interval: tokens of a span of ``"interval"``; the last may be shorter.
        boundary: regular expression that ends a step of ``"step"``, found in the decoded text
            wherever the tokens fall. The span ends with the token in which a match ends, so the
            first characters of the next step may belong to it. Tokens after the last boundary form
            a span, unless they are only special tokens (end of text), which join the last step.
        boundary_ids: token ids that end a step, instead of ``boundary``; no text is decoded.
        tokenizer: what decodes; ``"step"`` needs it unless ``boundary_ids`` is given, and then
            knows special tokens only with it.

    Raises:
        ValueError: (here) an unknown granularity, an interval below 1, an invalid or empty
            boundary, no tokenizer; (by the function) an empty completion.
    """
    if granularity not in get_args(Granularity):
        raise ValueError(
            f"expected granularity {', '.join(get_args(Granularity))}, received {granularity!r}"
        )
    if granularity == "interval" and not isinstance(interval, int):
        raise ValueError(
            f"expected an interval of tokens, received {interval!r}: pass a whole number of tokens"
        )
    if granularity == "interval" and interval < 1:
        raise ValueError(f"expected an interval of 1 token or more, received {interval}: raise it")
    ends: Callable[[Sequence[int]], list[int]]
    if granularity == "dense":
        ends = lambda ids: list(range(1, len(ids)))  # noqa: E731
    elif granularity == "interval":
        ends = lambda ids: list(range(interval, len(ids), interval))  # noqa: E731
    elif granularity == "sparse":
        ends = lambda ids: []  # noqa: E731
    else:
        ends = _step_rule(boundary, boundary_ids, tokenizer)

    def spans(completion: Sequence[int]) -> tuple[int, ...]:
        if not completion:
            raise ValueError("expected a completion of 1 token or more, received none: drop it")
        return tuple(b - a for a, b in pairwise([0, *ends(completion), len(completion)]))

    return spans


def decode(completion: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the text that offsets refer to: nothing skipped, nothing cleaned up."""
    return str(
        tokenizer.decode(
            list(completion), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
    )


def span_offsets(
    completion: Sequence[int], span_lengths: Sequence[int], tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[int, int]]:
    """Return where each span starts and ends, in characters of :func:`decode` of the completion.

    The spans follow one another without a gap from 0 to the end of the text. A span is empty when
    its tokens complete no character.

    Raises:
        ValueError: the spans do not sum to the completion, or the tokenizer decodes a token
            otherwise once later ones are known.
    """
    if sum(span_lengths) != len(completion) or min(span_lengths, default=0) < 1:
        raise ValueError(
            f"expected span lengths of 1 or more that sum to the {len(completion)} tokens of the "
            f"completion, received {tuple(span_lengths)}: make them with span_rule"
        )
    ends = [0, *_character_ends(completion, tokenizer, {})]
    return list(pairwise(ends[i] for i in accumulate(span_lengths, initial=0)))


def _step_rule(
    boundary: str,
    boundary_ids: Sequence[int] | None,
    tokenizer: "PreTrainedTokenizerBase | None",
) -> Callable[[Sequence[int]], list[int]]:
    """Return the function that lists the ends of all steps but the last, in tokens."""
    if boundary_ids is not None:
        if not boundary_ids:
            raise ValueError("expected boundary_ids to hold a token id, received none: name one")
        last = frozenset(boundary_ids)

        def found(ids: Sequence[int]) -> list[int]:
            return [i + 1 for i, token in enumerate(ids) if token in last]

    elif tokenizer is None:
        raise ValueError(
            "expected a tokenizer for granularity 'step', received none: pass tokenizer, or the "
            "token ids that end a step as boundary_ids"
        )
    else:
        pattern, decoder = _compiled(boundary), tokenizer
        known: dict[int, str] = {}  # the text of each token alone, once it was seen

        def found(ids: Sequence[int]) -> list[int]:
            characters = [m.end() for m in pattern.finditer(decode(ids, decoder)) if m.end()]
            if not characters:
                return []
            ends = _character_ends(ids, decoder, known)
            return sorted({bisect_left(ends, character) + 1 for character in characters})

    special = frozenset(() if tokenizer is None else tokenizer.all_special_ids)

    def ends(ids: Sequence[int]) -> list[int]:
        cuts = found(ids)
        if cuts and special.issuperset(ids[cuts[-1] :]):
            cuts.pop()  # nothing but end of text follows, or nothing at all
        return cuts

    return ends


def _compiled(boundary: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(boundary)
    except re.error as error:
        raise ValueError(
            f"expected boundary to be a regular expression, received {boundary!r} ({error}): "
            "escape literal text with re.escape"
        ) from error
    if pattern.search(""):
        raise ValueError(
            f"expected boundary to match some text, received {boundary!r}, which matches nothing "
            "at all: every position would end a step"
        )
    return pattern


def _character_ends(
    ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase", known: dict[int, str]
) -> list[int]:
    """Return how many characters of the decoded text each token completes, and those before it.

    ``known`` takes the text of every token that it lacks.
    """
    text = decode(ids, tokenizer)
    known.update((token, decode([token], tokenizer)) for token in set(ids) - known.keys())
    alone = [known[token] for token in ids]
    pieces = alone if "".join(alone) == text else _incremental(ids, tokenizer)
    if "".join(pieces) != text:
        raise ValueError(
            f"{type(tokenizer).__name__} does not decode a token alike with and without the later "
            "ones, so that offsets are undefined: use a granularity other than 'step', or "
            "boundary_ids"
        )
    return list(accumulate(map(len, pieces)))


def _incremental(ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Return the text that each token adds, decoded after the tokens that last added some.

    That context makes a decoder treat the token as in mid text (SentencePiece's drop the first
    space). A character that is left incomplete waits for the token that completes it.
    """
    pieces: list[str] = []
    context, done, shown = 0, 0, 0  # tokens [context, done) are context, of ``shown`` characters
    for i in range(len(ids)):
        text = decode(ids[context : i + 1], tokenizer)
        complete = i + 1 == len(ids) or not text.endswith(_INCOMPLETE)
        stable = text if complete else text.rstrip(_INCOMPLETE)
        pieces.append(stable[shown:])
        shown = max(shown, len(stable))
        if complete:
            context, done = done, i + 1
            shown = len(decode(ids[context:done], tokenizer))
    return pieces
