"""AIRL steps of random models through the library's learners, held against the cost model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from airl_fast.advantages import token_advantages
from airl_fast.config import load_config
from airl_fast.discriminator import Discriminator
from airl_fast.language_model import LanguageModel, Origin
from airl_fast.learners import DiscriminatorLearner, PolicyLearner
from airl_fast.optimisation import Optimiser
from airl_fast.packing import Source, Trace
from airl_fast.passes import action_logp, offsets, span_energies
from benchmarks.costs import PHASES, Rates, Workload, step_s
from benchmarks.packing import TINY, ModelShape


@dataclass(frozen=True, kw_only=True)
class Step:
    """A model and a batch: what one validation runs.

    Attributes:
        name: of the row.
        shape: of the policy and the discriminator.
        prompts, group: G samples and one demonstration for each prompt.
        prompt, completion: mean tokens of each; lengths vary by a third around them.
        token_budget: tokens of a micro-batch.
    """

    name: str
    shape: ModelShape
    prompts: int
    group: int
    prompt: int
    completion: int
    token_budget: int = 4096


def _llama(*sizes: int) -> ModelShape:
    names = ("vocab", "hidden", "inner", "layers", "heads", "kv_heads")
    return ModelShape(**dict(zip(names, sizes, strict=True)))


STEPS = (
    Step(name="SmolLM2-135M", shape=ModelShape(), prompts=1, group=2, prompt=138, completion=124),
    Step(name="SmolLM2's width, 4 layers", shape=ModelShape(layers=4), prompts=1, group=4,
         prompt=138, completion=124),
    Step(name="deep and narrow", shape=_llama(8192, 192, 512, 8, 3, 1), prompts=3, group=8,
         prompt=60, completion=90),
    Step(name="shallow and wide", shape=_llama(16384, 1024, 2816, 2, 16, 8), prompts=1, group=5,
         prompt=100, completion=100),
    Step(name="large vocabulary", shape=_llama(49152, 320, 896, 2, 5, 1), prompts=1, group=5,
         prompt=138, completion=124),
    Step(name="long sequences", shape=_llama(8192, 320, 896, 4, 5, 5), prompts=1, group=2,
         prompt=500, completion=700),
    Step(name="small micro-batches", shape=_llama(16384, 384, 1024, 4, 6, 2), prompts=5, group=2,
         prompt=180, completion=60, token_budget=500),
    Step(name="large micro-batches", shape=_llama(8192, 512, 1536, 2, 8, 2), prompts=3, group=7,
         prompt=80, completion=90, token_budget=16384),
    Step(name="large groups", shape=_llama(8192, 256, 704, 6, 4, 2), prompts=1, group=32,
         prompt=80, completion=50),
)  # fmt: skip
OUTSIDE = (  # where the model is expected not to hold; reported apart
    Step(name="two dozen tokens in all", shape=_llama(256, 64, 192, 4, 2, 1), prompts=1,
         group=2, prompt=5, completion=5),
    Step(name="sequences of 4,000 tokens", shape=_llama(256, 128, 256, 2, 2, 2), prompts=1,
         group=2, prompt=3000, completion=1000, token_budget=8192),
)  # fmt: skip
QUICK_STEPS = (Step(name="tiny", shape=TINY, prompts=1, group=2, prompt=6, completion=5),)


def random_model(shape: ModelShape, seed: int = 0) -> LanguageModel:
    """A Llama of random weights, its embedding tied to its head."""
    torch.manual_seed(seed)  # transformers draws initial weights from the global generator
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return LanguageModel(LlamaForCausalLM(config).eval(), None, Origin(model="random"))


def random_traces(
    vocab: int,
    prompts: int,
    group: int,
    prompt: int,
    completion: int,
    *,
    source: Source = Source.POLICY,
    spread: float = 0.0,
    seed: int = 0,
) -> list[Trace]:
    """``group`` completions of each prompt, one span each; lengths uniform within ``spread``."""
    rng = np.random.default_rng([seed, 0])
    own = np.random.default_rng([seed, 1 + source])  # completions differ from source to source

    def ids(mean: int, generator: np.random.Generator) -> tuple[int, ...]:
        low, high = round(mean * (1 - spread)), round(mean * (1 + spread))
        length = generator.integers(max(1, low), high + 1)
        return tuple(generator.integers(0, vocab, length).tolist())

    traces = []
    for number in range(prompts):
        shared = ids(prompt, rng)
        for _ in range(group):
            answer = ids(completion, own)
            traces.append(
                Trace(
                    prompt=shared,
                    completion=answer,
                    span_lengths=(len(answer),),
                    group=number,
                    source=source,
                )
            )
    return traces


class StepRunner:
    """Two random models and their learners; ``run`` makes one step on given traces."""

    def __init__(self, shape: ModelShape, token_budget: int) -> None:
        self.policy, body = random_model(shape, 0), random_model(shape, 1)
        self.discriminator = Discriminator(body, head="lm", trunk="own", width=shape.hidden)
        self.token_budget = token_budget
        config = load_config(
            "arithmetic",
            [
                "run.output_dir=unused",
                f"run.token_budget={token_budget}",
                "sampling.max_new_tokens=1",
                "sampling.stop=[]",
                "discriminator.accuracy_throttle=1.0",
            ],
        )
        self.disc_learner = DiscriminatorLearner(self.discriminator, self.policy, config)
        optimiser = Optimiser(
            self.policy.trainable(),
            learning_rate=1e-6,
            weight_decay=0.01,
            betas=(0.9, 0.98),
            clip_norm=1.0,
        )
        self.policy_learner = PolicyLearner(self.policy, config, optimiser)

    def run(self, samples: Sequence[Trace], experts: Sequence[Trace]) -> dict[str, float]:
        """What the trainer does with its samples; seconds of every phase and of the whole."""
        clock = [time.perf_counter()]
        seen = [*samples, *experts]
        logp = action_logp(self.policy, seen, self.token_budget)
        clock.append(time.perf_counter())
        self.disc_learner.update(seen, logp)
        clock.append(time.perf_counter())
        energies = span_energies(self.discriminator, self.policy, samples, self.token_budget)
        clock.append(time.perf_counter())
        advantages = _advantages(torch.cat(energies), samples)
        self.policy_learner.update(samples, advantages)
        clock.append(time.perf_counter())
        parts = [later - earlier for earlier, later in pairwise(clock)]
        return {**dict(zip(PHASES, parts, strict=True)), "step": clock[-1] - clock[0]}


def _advantages(rewards: torch.Tensor, traces: Sequence[Trace]) -> list[torch.Tensor]:
    lengths = [len(trace.completion) for trace in traces]
    values = token_advantages(
        rewards,
        cu_spans=offsets(lengths, rewards.device),
        cu_seq_spans=offsets([1] * len(traces), rewards.device),
        group=torch.tensor([trace.group for trace in traces]),
        gamma=1.0,
    )
    return list(values.split(lengths))


class Validation:
    """A step, run once to warm up, and what every further run took."""

    def __init__(self, step: Step) -> None:
        self.step = step
        sizes = (step.shape.vocab, step.prompts)
        lengths = (step.prompt, step.completion)
        self._samples = random_traces(*sizes, step.group, *lengths, spread=1 / 3)
        self._experts = random_traces(*sizes, 1, *lengths, spread=1 / 3, source=Source.EXPERT)
        self._runner = StepRunner(step.shape, step.token_budget)
        self._runs: list[dict[str, float]] = []
        self._runner.run(self._samples, self._experts)

    def round(self) -> None:
        """Run the step once more."""
        self._runs.append(self._runner.run(self._samples, self._experts))

    def against(self, rates: Rates) -> dict[str, object]:
        """Seconds by phase, the median of the runs and as predicted, and what was counted."""
        step, runs, samples = self.step, self._runs, self._samples
        seen = Workload.of([*samples, *self._experts], step.token_budget)
        predicted = step_s(step.shape, seen, Workload.of(samples, step.token_budget), rates)
        measured = {phase: statistics.median(run[phase] for run in runs) for phase in predicted}
        return {
            "name": step.name,
            "shape": asdict(step.shape),
            "seen": asdict(seen),
            "sequences": len(samples) + len(self._experts),
            "measured": measured,
            "spread": {p: max(r[p] for r in runs) / min(r[p] for r in runs) for p in predicted},
            "predicted": predicted,
            "error": {phase: predicted[phase] / measured[phase] - 1 for phase in predicted},
        }
