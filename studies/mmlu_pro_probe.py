"""Would more demonstrations help? Linear probes of an untrained language model's states.

    python -m studies.mmlu_pro_probe --data FOLDER --model FOLDER --output runs/mmlu_pro_probe

A logistic regression reads a frozen model's hidden states of an answer, averaged over its tokens,
and is trained to tell the expert's answers from the others', as the discriminators of
``studies.mmlu_pro`` are, on growing numbers of questions. A second one is trained on what a reward
never sees, which answers are right: what could be read there at all. Both are measured on the same
held-out questions. The strength of the ridge is chosen on a fifth of the training questions.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from airl_fast.evaluation import Array, auc
from airl_fast.language_model import LanguageModel, Origin
from airl_fast.loading import load_language_model
from airl_fast.packing import pack
from studies.mmlu_pro_analysis import cell, measure, table
from studies.mmlu_pro_data import MODELS, Asked, load

_RIDGES = 1e-4, 1e-3, 1e-2, 1e-1, 1.0
_CHUNK = 8  # questions of a pass
_READ = {
    "who wrote it": "auc_expert",
    "who, right ones": "auc_expert_at_equal right",
    "who, wrong ones": "auc_expert_at_equal wrong",
    "right against wrong within each model": "auc_within_model_mean",
    "accuracy of the pick": "picked",
}


@torch.no_grad()
def states(model: LanguageModel, asked: Sequence[Asked]) -> Tensor:
    """The mean hidden state of every answer, [questions, models, D] float32."""
    found = []
    for start in range(0, len(asked), _CHUNK):
        part = asked[start : start + _CHUNK]
        traces = [t for i, one in enumerate(part) for t in one.traces(lambda ids: (len(ids),), i)]
        batch = pack(traces)
        hidden = model.hidden(batch)[batch.action_index]
        sizes = batch.cu_actions.diff().tolist()
        means = torch.stack([rows.mean(0) for rows in hidden.split(sizes)])
        found.append(means.view(len(part), len(MODELS), -1))
        done = start + len(part)
        if done == len(asked) or (start // _CHUNK) % 8 == 7:
            print(f"{done}/{len(asked)} questions read", flush=True)
    return torch.cat(found).float()


def fit(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """Weights and offset [D + 1] of a logistic regression whose classes weigh half each.

    Args:
        x: [n, D] standardised.
        y: [n] 0 or 1.
        ridge: times the squared norm of the weights, added to the mean loss.
    """
    weight = torch.where(y == 1, 0.5 / y.sum(), 0.5 / (1 - y).sum())
    theta = torch.zeros(x.shape[1] + 1, requires_grad=True)
    optimiser = torch.optim.LBFGS([theta], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            x @ theta[:-1] + theta[-1], y, weight, reduction="sum"
        )
        loss = losses + ridge * theta[:-1].square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return theta.detach()


def probe(train: Tensor, label: Tensor, test: Tensor) -> tuple[Array, float]:
    """Fit on training questions, [P, M, D] and [P, M]; score the others; and the ridge."""
    mean, std = train.mean((0, 1)), train.std((0, 1)) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    held = len(train) // 5

    def scores(x: Tensor, y: Tensor, of: Tensor, ridge: float) -> Array:
        theta = fit(x.flatten(0, 1), y.flatten(), ridge)
        return (of @ theta[:-1] + theta[-1]).numpy().astype(np.float64)

    chosen = max(
        _RIDGES,
        key=lambda ridge: auc(
            scores(train[held:], label[held:], train[:held], ridge).ravel(),
            label[:held].numpy().ravel(),
        ),
    )
    return scores(train, label, test, chosen), chosen


def main(argv: Sequence[str] | None = None) -> int:
    """Read the states, fit the probes, write probe.json and probe.md."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.mmlu_pro_probe", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="questions.jsonl(.gz) and the models' answers")
    add("--model", required=True, help="SmolLM2-135M-Instruct: hub name or folder")
    add("--output", type=Path, default=Path("runs/mmlu_pro_probe"), help="default: %(default)s")
    add("--sizes", type=int, nargs="+", default=[64, 128, 256, 512, 1024],
        help="questions to train on (default: %(default)s)")  # fmt: skip
    add("--test", type=int, default=256, help="held-out questions (default: %(default)s)")
    add("--max-prompt", type=int, default=160, help="tokens (default: %(default)s)")
    add("--max-completion", type=int, default=96, help="tokens (default: %(default)s)")
    options = parser.parse_args(argv)
    logging.disable_progress_bar()
    model = load_language_model(Origin(model=str(options.model)))
    try:
        data = load(
            options.data,
            model.tokenizer,
            train=max(options.sizes),
            test=options.test,
            max_prompt=options.max_prompt,
            max_completion=options.max_completion,
            seed=0,
        )
    except ValueError as error:
        print(f"studies.mmlu_pro_probe: {error}", file=sys.stderr)
        return 2
    found = run(states(model, data.train), states(model, data.test), data, sorted(options.sizes))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "probe.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    (options.output / "probe.md").write_text(page(found))
    print(page(found))
    return 0


def run(train: Tensor, test: Tensor, data: Any, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Both probes at every size."""
    correct = np.array([one.correct for one in data.test], np.float64)
    expert = torch.zeros(train.shape[:2])
    expert[:, 0] = 1
    right = torch.tensor([one.correct for one in data.train], dtype=torch.float32)
    found = []
    for trained_on, label in (("the expert's answers", expert), ("right answers", right)):
        for size in sizes:
            score, ridge = probe(train[:size], label[:size], test)
            found.append({"trained_on": trained_on, "questions": size, "ridge": ridge}
                         | {"measured": measure(score, correct)})  # fmt: skip
    return found


def page(found: Sequence[dict[str, Any]]) -> str:
    """The numbers as a table."""
    rows = []
    for one in found:
        cells = []
        for key in _READ.values():
            outer, _, inner = key.partition(" ")
            value = one["measured"][outer]
            cells.append(cell([value[inner] if inner else value]))
        rows.append([one["trained_on"], str(one["questions"]), *cells])
    head = ["trained on", "questions", *_READ]
    return "\n".join(["AUC, but for the last column.", "", *table(head, rows)]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
