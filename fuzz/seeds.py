"""Valid inputs of every target, which mutations start from: one list for each variant."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import save

from airl_fast.config import load_config
from fuzz.mutations import Raw

_PLAIN = [
    {"prompt": "1+1=", "completions": ["2", "3"], "correct": [True, False], "answers": ["2", None]},
    {"prompt": "1+1=", "steps": ["1+1", "=2"], "label": -1, "id": "a"},
]
_PROCESSBENCH = {
    "id": "gsm8k-0", "generator": "g", "problem": "p", "steps": ["a", "b"],
    "final_answer_correct": True, "label": -1,
}  # fmt: skip
_PRM800K = {
    "question": {"problem": "p"},
    "label": {
        "steps": [
            {"completions": [{"text": "a", "rating": 1}], "human_completion": None,
             "chosen_completion": 0},
            {"completions": [{"text": "b", "rating": -1}], "human_completion": {"text": "c"},
             "chosen_completion": None},
        ],
        "finish_reason": "solution",
    },
}  # fmt: skip
READERS: list[list[Any]] = [_PLAIN, [_PROCESSBENCH], [_PRM800K], [[_PROCESSBENCH]], _PLAIN]

FILES: list[list[Any]] = [
    [{"prompt": "1+1=", "completion": "2", "id": 1}],
    [{"prompt": "1+1=", "completions": ["2", "3"], "answers": ["2", None]}],
    [{"problem": "p", "steps": ["a", "b"], "label": 0}, {"prompt": "1+1=", "completion": "2"}],
]


def _lines(*rows: Any) -> Raw:
    return Raw("\n".join(json.dumps(row) for row in rows))


_TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "#### 2"}]
_QUESTION = {
    "question_id": 1, "question": "q", "options": ["a", "b"], "answer": "A", "category": "c",
    "cot_content": "A: Let's think step by step. The answer is (A).",
}  # fmt: skip
TASKS: list[list[Any]] = [
    [
        {"prompt": "q", "completion": "#### 2", "answer": 2},
        {"messages": _TURNS, "answer": "2"},
        _lines(*({"prompt": f"q{i}", "completion": "x", "answer": "1"} for i in range(5))),
    ],
    [
        {"question": "q", "answer": "a <<1+1=2>>\n#### 72"},
        _lines(*({"question": f"q{i}", "answer": "#### 1"} for i in range(5))),
    ],
    [
        {"question": "q", "options": "Answer Choices:\nA. a\nB. b", "answer": "a",
         "reasoning": "r", "dataset_name": "d", "id_in_dataset": 1},
    ],
    [_QUESTION, _lines(*({**_QUESTION, "question_id": i, "question": f"q{i}"} for i in range(5)))],
]  # fmt: skip

_QUALITY = {
    "f1": 0.5, "accuracy_erroneous": 0.5, "accuracy_correct": 0.5, "calibration_error": 0.1,
    "brier": 0.2,
}  # fmt: skip
CALIBRATION = {
    "format": 1,
    "decider": {"value": "f", "rule": "first", "threshold": -1.0, "scale": 2.0,
                "located": {"a": 0.1, "b": 0.2}, "none": {"a": 0.1, "b": 0.2}},
    "traces": 10, "erroneous": 5, "fitted": _QUALITY, "held_out": _QUALITY, "folds": 5, "seed": 0,
    "weights": "0",
}  # fmt: skip

TRAINED = {
    "format": 1, "kind": "discriminator", "head": "lm", "trunk": "own", "width": 32,
    "shaping_gamma": None, "span_logp": "sum",
    "body": {"adapter": None, "origin": None, "dtype": "float32"},
    "training": {"granularity": "step", "interval": 3, "boundary": "\n", "logit": "f-logp",
                 "reward": "f", "temperature": 1.0, "task": "arithmetic"},
}  # fmt: skip

_STATE = {
    "step": 2,
    "config": json.loads(json.dumps(asdict(load_config("arithmetic", ["run.output_dir=run"])))),
}
STATE = json.dumps(_STATE).encode()
TENSORS = save({"a": torch.arange(4.0), "b": torch.zeros(2, 2)})
_MANIFEST = {
    "format": 1, "step": 2,
    "files": {"state.json": {"bytes": len(STATE), "sha256": "0"},
              "tensors.safetensors": {"bytes": len(TENSORS), "sha256": "0"}},
}  # fmt: skip
CHECKPOINT: list[list[Any]] = [[_MANIFEST], [_STATE], [Raw(TENSORS.decode("latin-1"))], [_STATE]]

_STEPS = [
    {"step": i, "phase": "policy", "seconds": 1.0, "valid/pass@1": 0.5, "a <b>": 1} for i in (1, 2)
]
METRICS: list[list[Any]] = [[_lines(*_STEPS), *_STEPS], [Raw(_lines(*_STEPS).text + "\n"), *_STEPS]]

SCORED = {
    "id": "x", "text": "ab", "f": 1.0, "reward": 0.5, "granularity": "step",
    "steps": [{"text": "a", "start": 0, "end": 1, "f": 0.5, "reward": 0.2, "num_tokens": 1},
              {"text": "b", "start": 1, "end": 2, "f": 0.5, "reward": 0.3, "num_tokens": 1}],
    "tokens": {"ids": [1, 2], "offsets": [[0, 1], [1, 2]], "f": [0.5, 0.5],
               "logp": [-1.0, -2.0], "reward": [0.2, 0.3]},
}  # fmt: skip
_EVALUATION = {
    "title": "t", "numbers": {"AUC": [0.8, 0.7, 0.9], "pass@1": 0.3},
    "curves": {"f": [[1, 0.3, 0.2, 0.4], [4, 0.4, 0.3, 0.5]]},
    "reliability": {"f": [[0.1, 0.12, 50], [0.3, 0.27, 40]]},
    "histograms": {"correct": [1.2, 0.4], "wrong": [-0.3]}, "histogram_label": "f",
    "notes": ["n"],
}  # fmt: skip
_CONFIG = {
    "task": {"name": "arithmetic", "test": 5},
    "policy": {"model": "arithmetic-base", "betas": [0.9, 0.99]},
    "discriminator": {"perturbations": ["corrupt", "digit"]},
    "algorithm": {"name": "airl", "sft_warmup": 2},
    "sampling": {"stop": ["\n"]},
    "run": {"output_dir": "x", "steps": 3},
}
REPORT: list[list[Any]] = [
    [{**SCORED, "prompt": "p", "label": 1, "source": "expert", "located": 0}, SCORED],
    [{"prompt": [{"role": "user", "content": "p"}], "correct": True, "group": "g", "id": "x"}],
    [{"step": 0, "id": "x"}],
    [_EVALUATION, {"report": _EVALUATION}, [_EVALUATION, _EVALUATION]],
    [_CONFIG],
]
_BOMB = "\n".join(
    ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]
)
CONFIG: list[list[Any]] = [
    [
        _CONFIG,
        Raw("run: !!python/object/apply:os.system ['true']"),
        Raw(_BOMB),
        Raw(f"{_BOMB}\nrun: {{output_dir: *a11, steps: 1}}"),
        Raw("run: &a\n  output_dir: *a\n"),
        Raw("run: {steps: 2001-99-99, output_dir: 0b, seed: 1_0:99}"),
        Raw("? [1, 2]\n: 3\n? {a: 1}\n: 4"),
        Raw("<<: [1, 2]\nrun: {<<: {steps: 1}}"),
        Raw("run: !!binary x\ntask: !!timestamp x\npolicy: !!int 0x\nsampling: !!float x"),
    ],
    [Raw("run.steps=3"), Raw("a.b=1"), Raw("sampling.stop=[a, b]"), Raw("run.seed=2001-99-99")],
    [
        {
            "recipe": "arithmetic",
            "seeds": [0, 1],
            "overrides": ["run.steps=2"],
            "starts": {"a": None, "b": {"overrides": ["task.test=3"]}},
            "variants": {"c": None, "d": {"start": "a", "init": "base", "reward_from": "c"}},
            "comparisons": [["c", "SFT"]],
            "plots": {"All": ["c", "d"]},
            "sft_arms": [[0.1, 2]],
        },
        {"recipe": "arithmetic", "seeds": [0], "starts": {"a": {}}, "variants": {"c": {}}},
    ],
]

_PAIRS = {"prompts": ["1+1=", [3, 4]], "completions": ["ab1cd", ["a", "b"]], "end_of_text": True}
_REWARD = {"query": ["1+1=ab1<eos>"], "prompts": ["1+1="], "labels": [""]}
_MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b1"}]
_POOL = [
    {"input": "ab1", "model": "m", "use_activation": False},
    {"input": [[3, 4, 5], [6, 7]], "task": None, "encoding_format": "float"},
    {"messages": _MESSAGES, "truncate_prompt_tokens": None, "dimensions": None},
]
SERVER: list[list[Any]] = [
    [_PAIRS],
    [_REWARD],
    [*_POOL, {"input": "ab", "task": "token_classify"}],
    [*_POOL, {"input": "user: a\nassistant: b1<eos>\n", "task": "classify"}],
    [_PAIRS],  # other paths, methods and headers
]
