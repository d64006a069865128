"""One scorer a process, for trainers that call a function and know nothing of ours."""

from __future__ import annotations

import os
import threading
from functools import cache
from typing import TYPE_CHECKING, cast

from airl_fast.integrations.rewards import Reduce, RewardReader
from airl_fast.scores import By
from airl_fast.serving.batcher import Batcher

if TYPE_CHECKING:
    from airl_fast.scorer import RewardScorer

VARIABLE = "AIRL_FAST_REWARD"
_lock = threading.Lock()


def shared_reader(
    *, reward: str | None = None, value: By | None = None, reduce: Reduce | None = None
) -> tuple[RewardReader, Batcher]:
    """The reward of a folder, loaded once, and the thread that scores for all who ask.

    Args:
        reward: the folder of a finished run or its reward/; else ``AIRL_FAST_REWARD``.
        value: "f" or "reward"; else ``AIRL_FAST_VALUE``, else "f".
        reduce: how the spans' rewards become one; else ``AIRL_FAST_REDUCE``, else "sum".

    Raises:
        ValueError: no folder is named, it holds no reward, or an option is unknown.
    """
    environment = os.environ
    folder = reward or environment.get(VARIABLE)
    if not folder:
        raise ValueError(
            f"no reward is named: set {VARIABLE} to the run.output_dir of `airl-fast train`, in "
            "the environment of every worker"
        )
    with _lock:
        scorer, batcher = _loaded(folder, environment.get("AIRL_FAST_DEVICE", "cpu"))
    chosen = value or environment.get("AIRL_FAST_VALUE", "f")
    reduction = reduce or environment.get("AIRL_FAST_REDUCE", "sum")
    reader = RewardReader(
        scorer=scorer, value=cast(By, chosen), reduce=cast(Reduce, reduction)
    )  # which refuses what it does not know
    return reader, batcher


@cache
def _loaded(folder: str, device: str) -> tuple[RewardScorer, Batcher]:
    from airl_fast.scorer import RewardScorer

    scorer = RewardScorer.from_pretrained(folder, device=device)
    return scorer, Batcher(scorer.score_encoded, token_budget=scorer.token_budget)
