"""The time of an AIRL step from the shape of the model and of the batch: counted work over rates.

    L layers  D hidden  I inner  H heads  K key heads  E = D / H  V vocabulary
    T packed tokens  N actions  A scores computed by attention  M micro-batches

A Llama-shaped decoder, float32, both models of one shape, f read by the lm head. What is counted:

- products: 2 T P flops for a pass over P weights, twice that for its backward, and P weights
  read and laid out each time;
- attention: 4 A E flops per head, 10 backward (it makes the scores again), of the blocks that the
  kernel does not skip;
- everything elementwise: the floats that it reads and writes, 20 D + 16 H E + 14 K E + 5 I per
  token and layer (norms, rotary, gathers of the packed layout, residuals, SwiGLU, counted in the
  code), and as many again backward;
- the head: 1, 3 or 4 products of 2 N V D (scoring; policy loss; log-probabilities with their
  gradients, which make the logits again), and what an operator costs per logit and per weight;
- gradients: fresh memory for every trained weight and micro-batch; the optimiser: per weight, and
  slower for matrices that do not fit the cache (the embedding);
- dispatch: seconds per layer and micro-batch, which rule small batches.

Nothing else is in it: not sampling, not packing, not the file system. `cost_rates.py` measures the
rates, `cost_steps.py` holds the predictions against steps that are run, `cost_gpus.py` carries the
counted work over to GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np

from airl_fast.packing import Trace, pack
from airl_fast.planning import plan_traces
from benchmarks.packing import ModelShape

BLOCK = 96  # of 48 queries and 64 keys: twice the keys beyond the diagonal, on average, of a query
LARGE = 32 * 2**20  # bytes from which glibc maps every buffer anew: its highest mmap threshold
_FLOAT = 4  # bytes
PHASES = ("scoring", "discriminator update", "energies", "policy update")


@dataclass(frozen=True)
class Workload:
    """What a batch asks of a model, summed over its micro-batches."""

    tokens: float  # T, packed
    actions: float  # N
    scores: float  # A, per head, that attention computes
    micro_batches: float = 1  # M

    @classmethod
    def of(cls, traces: Sequence[Trace], token_budget: int) -> Workload:
        """Count a batch, cut as the learners cut it."""
        plan = plan_traces(traces, token_budget)
        tokens = actions = scores = 0
        for indices in plan:
            batch = pack([traces[i] for i in indices])
            own = batch.cu_segments.diff().numpy().astype(np.int64)
            prefix = batch.prefix.numpy()
            before = np.where(prefix >= 0, own[prefix], 0)
            tokens += batch.num_tokens
            actions += batch.num_actions
            scores += attention_scores(own, before)
        return cls(tokens, actions, scores, len(plan))

    def times(self, factor: float) -> Workload:
        """The work of ``factor`` such batches."""
        return Workload(*(factor * getattr(self, field.name) for field in fields(self)))


def attention_scores(own: np.ndarray, before: np.ndarray, block: int = BLOCK) -> int:
    """Scores of segments of ``own`` tokens that continue ``before`` tokens.

    Args:
        own: [P].
        before: [P].
        block: twice the keys that a query meets on average beyond those that it sees; 1: none.
    """
    return int((own * before + np.minimum(own * own, own * (own + block) // 2)).sum())


@dataclass(frozen=True)
class HeadRate:
    """What an operator over the head costs beyond its products."""

    logit: float  # seconds per logit: the row kernel, and the logits' way to memory and back
    weight: float  # seconds per weight and micro-batch: reading it; writing and adding its gradient


@dataclass(frozen=True)
class Rates:
    """What this machine does per second; see cost_rates.py for how each is measured.

    Attributes:
        product, product_backward: flop/s of a float32 matrix product whose operands are at hand,
            and of its two gradients.
        memory: bytes/s at which a product reads a weight and lays it out, whatever the rows.
        fresh: bytes/s at which memory is written for the first time (page faults).
        attention, attention_backward: flop/s of attention over a packed batch.
        elementwise, elementwise_backward: bytes/s of a trunk's elementwise operations.
        layer, layer_backward: seconds to dispatch one layer.
        optimiser: weights/s that are clipped and updated by AdamW, of matrices up to 32 MiB.
        optimiser_large: of larger ones.
        score, policy, gradient: the head's operators: linear_logprob without gradients,
            linear_policy_loss and linear_logprob with gradients.
    """

    product: float
    product_backward: float
    memory: float
    fresh: float
    attention: float
    attention_backward: float
    elementwise: float
    elementwise_backward: float
    layer: float
    layer_backward: float
    optimiser: float
    optimiser_large: float
    score: HeadRate
    policy: HeadRate
    gradient: HeadRate

    @classmethod
    def from_json(cls, values: dict[str, float | dict[str, float]]) -> Rates:
        """Read what ``asdict`` gave."""
        return cls(**{k: HeadRate(**v) if isinstance(v, dict) else v for k, v in values.items()})

    def as_json(self) -> dict[str, float | dict[str, float]]:
        """Plain data."""
        return asdict(self)


def layer_matrices(shape: ModelShape) -> list[int]:
    """Weights of each matrix of one layer: queries, keys, values, outputs, gate, up, down."""
    key_width = shape.hidden // shape.heads * shape.kv_heads
    widths = [shape.hidden, key_width, key_width, shape.hidden, *[shape.inner] * 3]
    return [shape.hidden * width for width in widths]


def trunk_weights(shape: ModelShape) -> int:
    """Weights of all layers."""
    return shape.layers * sum(layer_matrices(shape))


def all_weights(shape: ModelShape) -> int:
    """Trained weights, the embedding shared with the head; the norms' are left out."""
    return trunk_weights(shape) + shape.vocab * shape.hidden


def elementwise_floats(shape: ModelShape) -> int:
    """Floats that a token's elementwise operations read and write in one layer."""
    key_width = shape.hidden // shape.heads * shape.kv_heads
    return 36 * shape.hidden + 14 * key_width + 5 * shape.inner


def trunk_s(shape: ModelShape, work: Workload, rates: Rates) -> float:
    """Seconds of a forward pass without gradients, below the head."""
    weights = trunk_weights(shape)
    return (
        2 * work.tokens * weights / rates.product
        + work.micro_batches * weights * _FLOAT / rates.memory
        + 4 * work.scores * shape.hidden * shape.layers / rates.attention
        + work.tokens * shape.layers * elementwise_floats(shape) * _FLOAT / rates.elementwise
        + work.micro_batches * shape.layers * rates.layer
    )


def trunk_backward_s(shape: ModelShape, work: Workload, rates: Rates) -> float:
    """Seconds that gradients add to it."""
    weights, embedding = trunk_weights(shape), shape.vocab * shape.hidden
    moved = work.tokens * shape.layers * elementwise_floats(shape) * _FLOAT
    return (
        4 * work.tokens * weights / rates.product_backward
        + work.micro_batches * weights * _FLOAT / rates.memory
        + 10 * work.scores * shape.hidden * shape.layers / rates.attention_backward
        + moved / rates.elementwise_backward
        + work.micro_batches * (weights + embedding) * _FLOAT / rates.fresh
        + work.micro_batches * shape.layers * rates.layer_backward
    )


def head_s(
    shape: ModelShape, work: Workload, rates: Rates, products: int, extra: HeadRate
) -> float:
    """Seconds of an operator over the head."""
    logits, weights = work.actions * shape.vocab, shape.vocab * shape.hidden
    return (
        products * 2 * logits * shape.hidden / rates.product
        + logits * extra.logit
        + work.micro_batches * weights * extra.weight
    )


def scoring_s(shape: ModelShape, work: Workload, rates: Rates) -> float:
    """Seconds of log pi of every action: a forward pass, one product over the head."""
    return trunk_s(shape, work, rates) + head_s(shape, work, rates, 1, rates.score)


def discriminator_update_s(shape: ModelShape, work: Workload, rates: Rates) -> float:
    """Seconds of one update of a discriminator with a trunk of its own and the lm head."""
    return (
        trunk_s(shape, work, rates)
        + trunk_backward_s(shape, work, rates)
        + head_s(shape, work, rates, 4, rates.gradient)
        + optimiser_s(shape, rates)
    )


def policy_update_s(shape: ModelShape, work: Workload, rates: Rates) -> float:
    """Seconds of one update of the policy."""
    return (
        trunk_s(shape, work, rates)
        + trunk_backward_s(shape, work, rates)
        + head_s(shape, work, rates, 3, rates.policy)
        + optimiser_s(shape, rates)
    )


def optimiser_s(shape: ModelShape, rates: Rates) -> float:
    """Seconds of clipping and AdamW over all weights."""
    matrices = [*layer_matrices(shape) * shape.layers, shape.vocab * shape.hidden]
    return sum(
        size / (rates.optimiser_large if size * _FLOAT > LARGE else rates.optimiser)
        for size in matrices
    )


def step_s(shape: ModelShape, seen: Workload, sampled: Workload, rates: Rates) -> dict[str, float]:
    """Seconds of a step after sampling, by phase and in all.

    Args:
        shape: of the policy and of the discriminator.
        seen: samples and demonstrations: scored by the policy, told apart by the discriminator.
        sampled: the samples: rewarded by the fresh discriminator, learned from by the policy.
        rates: of this machine.
    """
    parts = dict(
        zip(
            PHASES,
            (
                scoring_s(shape, seen, rates),
                discriminator_update_s(shape, seen, rates),
                scoring_s(shape, sampled, rates),
                policy_update_s(shape, sampled, rates),
            ),
            strict=True,
        )
    )
    return {**parts, "step": sum(parts.values())}
