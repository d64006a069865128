"""One whole AIRL step, packed and fused, beside the same step padded and unfused.

Scoring (log pi of all traces, f of the samples, advantages), one update of the discriminator on
samples and demonstrations, one update of the policy on the samples, with their optimisers: what
the trainer does between two rollouts, by its own learners and passes. Two Llamas of random
weights in the shape of SmolLM2-135M, all weights trained, and the options of the recipe
gsm8k-smollm2 but for its adapters. Sampling is timed apart (sampling.py).

The padded formulations pad to the longest of a whole step (language.py), or to the fixed 300 + 824
tokens of the seed paper's configurations. Each formulation runs as many tokens in one pass as it
is fastest with. On the timed inputs all are held to the step made one trace at a time in float32,
on small ones to the same in float64 with every entry of every gradient.
"""

from collections.abc import Mapping
from functools import partial

import torch

from airl_fast.advantages import token_advantages
from airl_fast.packing import pack
from airl_fast.passes import action_logp, offsets, span_energies
from airl_fast.planning import plan_traces
from benchmarks.harness import Case, Outputs, Prepared, Sampled, Variant
from benchmarks.language import STEP_PROMPTS, TINY, ModelShape, head_product
from benchmarks.lengths import MAX_COMPLETION, MAX_PROMPT
from benchmarks.padded import padding, rows_a_pass
from benchmarks.step_inputs import (
    SAMPLES,
    TOKEN_BUDGET,
    Laps,
    StepInputs,
    StepResult,
    kept_gradients,
    step_inputs,
)
from benchmarks.step_peers import alone_step, padded_step

OPERATOR = "AIRL step (scoring, both updates)"
_ROUNDS = 3
_EVERY_ENTRY = 1 << 62
# Plain torch rounds logits to half precision: its gradients are off by up to 0.4 of the largest.
_PLAIN_TOLERANCE = 0.5


def step_case(
    prompts: int,
    group: int,
    shape: ModelShape,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Case:
    """A step's share of ``prompts`` prompts, ``group`` samples and a demonstration each."""
    rows, fixed_rows = rows_a_pass(device)
    plain = None if dtype == torch.float32 else _PLAIN_TOLERANCE
    return Case(
        operator=OPERATOR,
        shape={
            "prompts": prompts, "of": STEP_PROMPTS, "G": group, "V": shape.vocab, "D": shape.hidden,
        },
        dtype=dtype,
        inputs=partial(step_inputs, prompts, group, shape, seed, SAMPLES, dtype, device),
        small=partial(step_inputs, 2, 3, TINY, seed, _EVERY_ENTRY, dtype, device),
        oracle=lambda inputs: _alone(inputs.copy(torch.float64)),
        expected=_expected,
        yardstick=("product", lambda x: head_product(x.policy.head.weight, x.everything)),
        variants=[
            Variant("airl_fast", packed_step, "default", note="prompts stored once"),
            Variant(
                "padded",
                partial(padded_step, fixed=False),
                note=f"to the longest of a step of {STEP_PROMPTS} prompts; {rows} rows a pass",
                tolerance=plain,
            ),
            Variant(
                "padded, fixed",
                partial(padded_step, fixed=True),
                note=f"to {MAX_PROMPT} + {MAX_COMPLETION} tokens; rows a pass: {fixed_rows}; once",
                tolerance=plain,
                once=True,
            ),
        ],
        facts=_facts,
        rounds=_ROUNDS,
        memory=False,
    )  # fmt: skip


def packed_step(inputs: StepInputs) -> Prepared:
    """The step by the library's learners and passes."""

    def read(result: StepResult) -> Outputs:
        return result.outputs

    return Prepared(partial(_packed, inputs), read, inputs.reset, lambda result: result.seconds)


def _packed(inputs: StepInputs) -> StepResult:
    laps, config, traces = Laps(), inputs.config, inputs.traces.policy
    budget = config.run.token_budget
    logp = action_logp(inputs.policy, inputs.everything, budget, config.sampling.temperature)
    laps.add("scoring")
    with kept_gradients(inputs.disc_learner.optimiser, inputs.samples) as disc_gradients:
        disc = inputs.disc_learner.update(inputs.everything, logp)
    laps.add("discriminator update")
    f = torch.cat(span_energies(inputs.discriminator, inputs.policy, traces, budget))
    advantages = _advantages(inputs, f)
    laps.add("scoring")
    with kept_gradients(inputs.policy_learner.optimiser, inputs.samples) as policy_gradients:
        policy = inputs.policy_learner.update(
            traces, advantages.split([len(trace.completion) for trace in traces])
        )
    laps.add("policy update")
    outputs = {
        "logp": torch.cat(logp),
        "f": f,
        "advantages": advantages,
        "losses": torch.tensor([disc["disc/loss"], policy["policy/loss"]]),
        "gradient norms": torch.tensor([disc["disc/grad_norm"], policy["policy/grad_norm"]]),
        "discriminator gradients": torch.cat(disc_gradients),
        "policy gradients": torch.cat(policy_gradients),
    }
    return StepResult(outputs, laps.seconds)


def _advantages(inputs: StepInputs, f: torch.Tensor) -> torch.Tensor:
    """As the trainer has them: the reward is f."""
    traces, algorithm = inputs.traces.policy, inputs.config.algorithm
    values = token_advantages(
        f,
        cu_spans=offsets([n for t in traces for n in t.span_lengths], f.device),
        cu_seq_spans=offsets([len(t.span_lengths) for t in traces], f.device),
        group=torch.tensor([t.group for t in traces], device=f.device),
        gamma=algorithm.gamma,
        baseline=algorithm.baseline,
        scale=algorithm.scale,
        level=algorithm.advantage_level,
    )
    limit = algorithm.advantage_clip
    assert limit is not None
    return values.clamp(-limit, limit)


def _expected(inputs: StepInputs) -> Mapping[str, Sampled]:
    """The step one trace at a time, in float32."""
    exact = (
        inputs
        if next(inputs.policy.parameters()).dtype == torch.float32
        else inputs.copy(torch.float32)
    )
    return {name: Sampled(values.double()) for name, values in _alone(exact).items()}


def _alone(inputs: StepInputs) -> Outputs:
    prepared = alone_step(inputs)
    outputs = prepared.read(prepared.call())
    inputs.reset()
    return outputs


def _facts(inputs: StepInputs) -> Mapping[str, Mapping[str, float]]:
    """Tokens that each formulation runs through the discriminator in its update."""
    everything = inputs.everything
    packed = [pack([everything[i] for i in part]) for part in plan_traces(everything, TOKEN_BUDGET)]
    padded, fixed = (sum(padding(inputs.traces, to)) for to in (False, True))
    return {
        "airl_fast": {"tokens": sum(batch.num_tokens for batch in packed)},
        "padded": {"tokens": len(everything) * padded},
        "padded, fixed": {"tokens": len(everything) * fixed},
    }
