"""Lengths like those of GSM8K, without the data set."""

import math

import numpy as np

# Means of 138 and 124 tokens; the spread of the logarithms is that of GSM8K's test questions and
# worked solutions under SmolLM2's tokenizer (measured: 0.35 and 0.42). The prompt's instruction,
# 76 tokens, is the same everywhere.
_INSTRUCTION, _QUESTION, _QUESTION_SPREAD = 76, 62, 0.35
COMPLETION, _COMPLETION_SPREAD = 124, 0.42
PROMPT = _INSTRUCTION + _QUESTION
MAX_PROMPT, MAX_COMPLETION = 300, 824  # the fixed padding of the seed paper's configurations


def prompt_lengths(count: int, rng: np.random.Generator) -> list[int]:
    """Lengths of ``count`` prompts with their instruction."""
    drawn = _lognormal(_QUESTION, _QUESTION_SPREAD, count, rng)
    return [min(_INSTRUCTION + length, MAX_PROMPT) for length in drawn]


def completion_lengths(count: int, rng: np.random.Generator) -> list[int]:
    """Lengths of ``count`` completions."""
    drawn = _lognormal(COMPLETION, _COMPLETION_SPREAD, count, rng)
    return [min(length, MAX_COMPLETION) for length in drawn]


def offsets_covering(total: int, rng: np.random.Generator, mean: float | None = None) -> list[int]:
    """Offsets of completion-like sequences that fill ``total`` actions; the last may be cut.

    Args:
        total: N.
        rng: draws the lengths.
        mean: of the lengths; that of GSM8K's completions if None.
    """
    offsets = [0]
    while offsets[-1] < total:
        (length,) = _lognormal(mean or COMPLETION, _COMPLETION_SPREAD, 1, rng)
        offsets.append(min(total, offsets[-1] + length))
    return offsets


def _lognormal(mean: float, spread: float, count: int, rng: np.random.Generator) -> list[int]:
    drawn = rng.lognormal(math.log(mean) - spread**2 / 2, spread, count)
    return [max(1, round(length)) for length in drawn.tolist()]
