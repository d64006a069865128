"""Train a reward on your own JSON lines, then score with it: seconds on a CPU, nothing fetched.

    python examples/train_on_your_json_lines.py [FOLDER]

A row is {"prompt": ..., "completion": ..., "answer": ...}. The model here is made on the spot, of
two small layers and random weights, so that the example stands alone: for a real reward give
``policy.model`` the name or folder of a language model, more rows and more steps. The command line
does the same: airl-fast train my.yaml task.path=my.jsonl.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from airl_fast import RewardScorer
from airl_fast.config import (
    AlgorithmConfig,
    DiscriminatorConfig,
    PolicyConfig,
    RunConfig,
    RunSection,
    SamplingConfig,
    TaskConfig,
)
from airl_fast.trainer import Trainer


def write_rows(path: Path, count: int, seed: int = 0) -> None:
    """Your traces: sums of three numbers, a step a line."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            a, b, c = (rng.randint(1, 9) for _ in range(3))
            row = {
                "prompt": f"{a}+{b}+{c}=",
                "completion": f"{a}+{b}={a + b}\n{a + b}+{c}={a + b + c}\n#### {a + b + c}",
                "answer": a + b + c,
            }
            file.write(json.dumps(row) + "\n")


def write_tiny_model(folder: Path) -> None:
    """A stand-in for a pretrained model: one token a character."""
    characters = "0123456789+=# \n"
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def main(folder: Path) -> tuple[float, float]:
    """Train in ``folder`` and return f of a right and of a wrong completion."""
    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "traces.jsonl", count=300)
    write_tiny_model(folder / "model")
    config = RunConfig(
        task=TaskConfig(name="jsonl", path=str(folder / "traces.jsonl"), validation=8, test=8),
        policy=PolicyConfig(model=str(folder / "model")),
        discriminator=DiscriminatorConfig(
            head="lm",
            warmup_updates=15,
            perturbed_per_update=16,
            perturbations=("corrupt", "digit"),
        ),
        algorithm=AlgorithmConfig(granularity="step", sft_warmup=150, sft_learning_rate=3e-3),
        sampling=SamplingConfig(prompts_per_step=8, group_size=4, max_new_tokens=24),
        run=RunSection(
            output_dir=str(folder / "run"), steps=2, eval_every=0, checkpoint_every=1000
        ),
    )
    Trainer(config).train()

    scorer = RewardScorer.from_pretrained(folder / "run")
    right, wrong = "2+3=5\n5+4=9\n#### 9", "2+3=5\n5+4=8\n#### 8"
    good, bad = scorer.score(["2+3+4="] * 2, [right, wrong])
    print(f"f: right {good.f:.2f}, wrong {bad.f:.2f}")
    for step in bad.steps:
        print(f"  {step.f:8.2f}  {step.text.strip()}")
    return good.f, bad.f


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as made:
            main(Path(made))
