"""Make the small base models that ship with the package: ``python -m airl_fast.arithmetic_base``.

A Llama of 0.34 million parameters, pretrained on traces whose author forgets the carry or borrow
with probability 0.6 where there is one: it knows the format and the arithmetic, and errs
systematically. ``arithmetic-base`` knows arithmetic; ``countdown-base`` (``--countdown --steps
2690``) knows both tasks, from as many traces of each; ``countdown-base-small`` (``--countdown
--layers 2 --width 64``) is another backbone with the same characters. Their training problems are
in nobody's test or validation set.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from airl_fast.batches import derive_seed
from airl_fast.language_model import LanguageModel, Origin
from airl_fast.ops.linear_logprob import linear_logprob
from airl_fast.optimisation import Optimiser
from airl_fast.packing import Trace, pack
from airl_fast.tasks import arithmetic, countdown

TRAINING_FOLD = 2  # and above; 0 and 1 are the test and validation problems


def make_base(
    directory: Path,
    *,
    countdown_too: bool = False,
    steps: int = 1345,
    batch_size: int = 64,
    layers: int = 3,
    width: int = 96,
    seed: int = 0,
) -> LanguageModel:
    """Pretrain a base model and write it to ``directory`` (three minutes on one CPU core).

    Args:
        directory: where to.
        countdown_too: half of the traces are Countdown's.
        steps: updates.
        batch_size: traces of an update.
        layers: of the model.
        width: of its hidden states, a multiple of 8.
        seed: of weights and data.
    """
    from rich.progress import track
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = (countdown if countdown_too else arithmetic).build_tokenizer()
    draws = [_draw_arithmetic, *([_draw_countdown] if countdown_too else [])]
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
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
    for step in track(range(steps), description="pretraining the base"):
        data_seed = derive_seed(seed, "pretraining", step)
        batch = pack(_traces(tokenizer, draws, batch_size, data_seed))
        hidden, head = model.hidden(batch)[batch.state_index], model.head
        logp = linear_logprob(hidden, head.weight, batch.targets, **head.arguments())
        (-logp.mean()).backward()
        optimiser.step()
    model.save(directory)
    return model


Draw = Callable[[random.Random], tuple[int, str, str]]  # fold, prompt, completion


def _draw_arithmetic(rng: random.Random) -> tuple[int, str, str]:
    problem = arithmetic.sample_problem(rng)
    if problem.fold < TRAINING_FOLD:
        return problem.fold, "", ""
    return problem.fold, problem.prompt, arithmetic.careless_trace(problem, rng)


def _draw_countdown(rng: random.Random) -> tuple[int, str, str]:
    problem, solution = countdown.sample_problem(rng)
    return problem.fold, problem.prompt, countdown.careless_trace(solution, rng)


def _traces(tokenizer: Any, draws: Sequence[Draw], count: int, seed: int) -> list[Trace]:
    rng = random.Random(seed)
    traces: list[Trace] = []
    while len(traces) < count:
        fold, prompt, text = draws[len(traces) % len(draws)](rng)
        if fold < TRAINING_FOLD:
            continue
        completion = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        traces.append(
            Trace(
                prompt=tuple(tokenizer(prompt).input_ids),
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
    parser.add_argument("--countdown", action="store_true", help="half of the traces Countdown's")
    parser.add_argument("--steps", type=int, default=1345, help="updates (default 1345)")
    parser.add_argument("--layers", type=int, default=3, help="of the model (default 3)")
    parser.add_argument("--width", type=int, default=96, help="of its states (default 96)")
    given = parser.parse_args()
    make_base(
        given.directory,
        countdown_too=given.countdown,
        steps=given.steps,
        layers=given.layers,
        width=given.width,
        seed=given.seed,
    )


if __name__ == "__main__":
    main()
