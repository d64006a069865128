"""Make the small base model that ships with the package: ``python -m airl_fast.arithmetic_base``.

A Llama of 0.34 million parameters, pretrained on traces whose author forgets the carry or borrow
with probability 0.6 where there is one: it knows the format and the arithmetic, and errs
systematically. Its training problems are in nobody's test or validation set.
"""

import argparse
import random
from pathlib import Path
from typing import Any

import torch

from airl_fast.batches import derive_seed
from airl_fast.loading import LanguageModel, Origin
from airl_fast.ops.linear_logprob import linear_logprob
from airl_fast.optimisation import Optimiser
from airl_fast.packing import Trace, pack
from airl_fast.tasks.arithmetic import build_tokenizer, careless_trace, sample_problem

TRAINING_FOLD = 2  # and above; 0 and 1 are the test and validation problems


def make_base(
    directory: Path, *, steps: int = 1345, batch_size: int = 64, seed: int = 0
) -> LanguageModel:
    """Pretrain the base model and write it to ``directory`` (three minutes on one CPU core)."""
    from rich.progress import track
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LanguageModel(LlamaForCausalLM(config).eval(), tokenizer, Origin(model=str(directory)))
    optimiser = Optimiser(
        model.trainable(),
        learning_rate=2e-3,
        weight_decay=0.01,
        betas=(0.9, 0.98),
        clip_norm=1.0,
        warmup=50,
        updates=steps,
        final_fraction=0.02,
    )
    for step in track(range(steps), description="pretraining the arithmetic base"):
        batch = pack(_traces(tokenizer, batch_size, derive_seed(seed, "pretraining", step)))
        hidden, head = model.hidden(batch)[batch.state_index], model.head
        logp = linear_logprob(hidden, head.weight, batch.targets, **head.arguments())
        (-logp.mean()).backward()
        optimiser.step()
    model.save(directory)
    return model


def _traces(tokenizer: Any, count: int, seed: int) -> list[Trace]:
    rng = random.Random(seed)
    traces: list[Trace] = []
    while len(traces) < count:
        problem = sample_problem(rng)
        if problem.fold < TRAINING_FOLD:
            continue
        completion = [*tokenizer(careless_trace(problem, rng)).input_ids, tokenizer.eos_token_id]
        traces.append(
            Trace(
                prompt=tuple(tokenizer(problem.prompt).input_ids),
                completion=tuple(completion),
                span_lengths=(len(completion),),
            )
        )
    return traces


def main() -> None:
    """Parse the command line and make the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default 0)")
    arguments = parser.parse_args()
    make_base(arguments.directory, seed=arguments.seed)


if __name__ == "__main__":
    main()
