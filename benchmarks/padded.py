"""The padded formulation: a rectangle of tokens, its logits materialised, and one row per trace.

B traces, left + W columns. Prompts are padded on the left, completions on the right, so that all
completions begin in one column, and only the completions' logits are computed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

from airl_fast.packing import Trace
from benchmarks.language import StepTraces
from benchmarks.lengths import MAX_COMPLETION, MAX_PROMPT

# Rows of a pass, the fastest of those tried (SmolLM2-135M's shape, two cores of an EPYC, float32).
# Forward and backward of 10 rows of 431 tokens: 1, 2, 5 rows a pass 23.0, 22.0, 28.3 s; forward
# alone of 4 rows of 1,124: 1, 2, 4 rows 9.6, 9.9, 11.2 s.
_ROWS = 2, 1
_GPU_ROWS = 16, 8  # not tried yet: no GPU has been at hand


@dataclass(frozen=True)
class Rectangle:
    """Traces as rows.

    Attributes:
        ids: [B, left + W] int64, zero where padded.
        mask: [B, left + W] int64, one on tokens.
        width: W.
    """

    ids: Tensor
    mask: Tensor
    width: int

    @property
    def actions(self) -> Tensor:
        """[B, W] bool: where a completion has a token."""
        return self.mask[:, -self.width :].bool()

    def split(self, rows: int) -> Iterator[tuple[slice, "Rectangle"]]:
        """Micro-batches of at most ``rows`` rows, and which rows they are."""
        for start in range(0, len(self.ids), rows):
            part = slice(start, start + rows)
            yield part, Rectangle(self.ids[part], self.mask[part], self.width)


def rectangle(
    traces: Sequence[Trace], left: int, width: int, device: torch.device | str = "cpu"
) -> Rectangle:
    """Pad prompts on the left to ``left`` tokens, completions on the right to ``width``."""
    ids = torch.zeros(len(traces), left + width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, trace in enumerate(traces):
        begin, end = left - len(trace.prompt), left + len(trace.completion)
        ids[row, begin:end] = torch.tensor(trace.prompt + trace.completion)
        mask[row, begin:end] = 1
    return Rectangle(ids.to(device), mask.to(device), width)


def alone(trace: Trace, device: torch.device | str = "cpu") -> Rectangle:
    """One trace, not padded."""
    return rectangle([trace], len(trace.prompt), len(trace.completion), device)


def rows_a_pass(device: torch.device | str) -> tuple[int, int]:
    """Rows of a pass, padded to the longest and to the fixed length."""
    return _ROWS if torch.device(device).type == "cpu" else _GPU_ROWS


def padding(step: StepTraces, fixed: bool) -> tuple[int, int]:
    """What a formulation pads to: left and width."""
    if fixed:
        return MAX_PROMPT, MAX_COMPLETION
    return step.longest_prompt, step.longest_completion


def log_probs(model: LlamaForCausalLM, rows: Rectangle) -> Tensor:
    """[B, W] log-probabilities of the completions' tokens; the model in standard attention."""
    logits = model(
        input_ids=rows.ids,
        attention_mask=rows.mask,
        position_ids=(rows.mask.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=rows.width + 1,
    ).logits[:, :-1]
    taken = rows.ids[:, -rows.width :, None]
    wide = torch.promote_types(logits.dtype, torch.float32)
    return functional.log_softmax(logits, -1, dtype=wide).gather(-1, taken).squeeze(-1)
