"""OpenRLHF's reward function file: ``--reward.remote_url PATH/TO/openrlhf.py``.

``python -c "import airl_fast.integrations.openrlhf as m; print(m.__file__)"`` prints the path. The
environment names the reward: ``AIRL_FAST_REWARD`` (the folder of a run), ``AIRL_FAST_DEVICE``
("cpu"), ``AIRL_FAST_VALUE`` ("f" or "reward") and ``AIRL_FAST_REDUCE`` ("sum", "mean", "min" or
"last"). Written against OpenRLHF 0.11.2, which loads the file by its path and calls
``reward_func`` from several threads with one query each: they are scored together.

OpenRLHF logs an error of a reward and goes on without one (reward None), so look at its log.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from airl_fast.integrations.shared import shared_reader


def reward_func(
    queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any] | None, **kwargs: Any
) -> dict[str, Any]:
    """Score queries, which are prompt and response in one text with special tokens written out.

    The response is encoded anew by the scorer's tokenizer. One that does not end with its
    end-of-text token was cut short, and none is scored.

    Args:
        queries: B texts.
        prompts: B texts with which the queries start.
        labels: not used: the reward needs no reference.
        **kwargs: not used.

    Returns:
        ``rewards`` [B] float32, ``scores`` [B] float32 (their sigmoids: a monotone map into
        [0, 1], not a probability of being correct) and ``extra_logs``, a dict of [B] float32.

    Raises:
        ValueError: no reward is named, or a query that cannot be scored, with its position.
    """
    from airl_fast.serving.protocols import OpenRLHFRequest, openrlhf_answer

    reader, batcher = shared_reader()
    pairs = OpenRLHFRequest(query=list(queries), prompts=list(prompts)).pairs(reader)
    answer = openrlhf_answer(reader, pairs, batcher.submit(pairs).result())
    return {
        "rewards": torch.tensor(answer["rewards"], dtype=torch.float32),
        "scores": torch.tensor(answer["scores"], dtype=torch.float32),
        "extra_logs": {
            name: torch.tensor(values, dtype=torch.float32)
            for name, values in answer["extra_logs"].items()
        },
    }
