"""What the counted work of a step comes to on 8 and on 1,024 GPUs: predictions, never measured.

Hybrid sharding: weights, gradients and optimiser states are sharded over the GPUs of a node, and
nodes hold copies. Every micro-batch gathers the weights once per pass over the node's own links
(and reduces gradients there); every update adds the shards' gradients across nodes. Compute and
communication overlap wholly at best and not at all at worst: a step lies between.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.costs import Workload, all_weights, attention_scores, trunk_weights
from benchmarks.packing import ModelShape


@dataclass(frozen=True, kw_only=True)
class GPU:
    """An H100 SXM and its links: public specifications, and what is assumed of them.

    Attributes:
        peak: flop/s of dense bf16 products (NVIDIA's data sheet).
        share: of it that training attains: the Llama 3 report gives 38 to 43% on 8,192 to 16,384
            H100s (arXiv 2407.21783, table 4).
        memory: bytes/s of HBM (data sheet).
        capacity: bytes of HBM.
        node: GPUs that share NVLink.
        nvlink: bytes/s and direction (900 GB/s in both).
        network: bytes/s, direction and GPU (400 Gbit/s InfiniBand NDR, one card per GPU).
        link_share: of both that collectives attain; an assumption.
        hop: seconds of latency of one step of a ring between nodes; an assumption.
        launch: seconds to launch one layer's kernels, forward; an assumption.
    """

    peak: float = 989.4e12
    share: float = 0.40
    memory: float = 3.35e12
    capacity: float = 80e9
    node: int = 8
    nvlink: float = 450e9
    network: float = 50e9
    link_share: float = 0.8
    hop: float = 10e-6
    launch: float = 100e-6


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model, and the batch of one step over all GPUs.

    Attributes:
        name: of the model.
        shape: of policy and discriminator.
        untied: the embedding is a matrix of its own.
        prompts: per step; each has ``group`` samples and one demonstration.
        prompt, completion: tokens of each.
        token_budget: tokens of a micro-batch.
    """

    name: str
    shape: ModelShape
    untied: bool = False
    prompts: int = 1024
    group: int = 8
    prompt: int = 138
    completion: int = 124
    token_budget: int = 16384

    @property
    def weights(self) -> int:
        """Weights of one model, all of them trained."""
        embedding = self.shape.vocab * self.shape.hidden
        return all_weights(self.shape) + (embedding if self.untied else 0)

    def pieces(self, extra: int) -> int:
        """Micro-batches that the ``group + extra`` completions of a prompt are cut into.

        Raises:
            ValueError: a sequence is longer than a micro-batch.
        """
        together = (self.token_budget - self.prompt) // self.completion
        if together < 1:
            raise ValueError(
                f"expected a token_budget of at least {self.prompt + self.completion}, one "
                f"sequence, received {self.token_budget}"
            )
        return math.ceil((self.group + extra) / together)

    def work(self, extra: int) -> Workload:
        """Counted work of ``group + extra`` completions of every prompt."""
        count, pieces = self.group + extra, self.pieces(extra)
        own = np.array([self.prompt] * pieces + [self.completion] * count)
        before = np.array([0] * pieces + [self.prompt] * count)
        scores = attention_scores(own, before, block=128)
        return Workload(int(own.sum()), count * self.completion, scores, 0).times(self.prompts)

    def micro_batches(self, gpus: int) -> int:
        """Micro-batches of each of ``gpus`` GPUs, demonstrations included."""
        pieces = self.pieces(1)
        if pieces > 1:
            return math.ceil(pieces * self.prompts / gpus)
        return math.ceil(self.work(1).tokens / gpus / self.token_budget)


QWEN_1_5B = ModelShape(vocab=151936, hidden=1536, inner=8960, layers=28, heads=12, kv_heads=2)
QWEN_7B = ModelShape(vocab=152064, hidden=3584, inner=18944, layers=28, heads=28, kv_heads=4)
MODELS = (  # micro-batches that fit beside the states; two long sequences for the larger
    ("1.5B", {"shape": QWEN_1_5B, "token_budget": 16384}),
    ("7B", {"shape": QWEN_7B, "untied": True, "token_budget": 4608}),
)
LENGTHS = (
    ("GSM8K", {"prompt": 138, "completion": 124}),
    ("long reasoning", {"prompt": 256, "completion": 2048}),
)
SCALING = (8, 64, 256, 1024)  # GPUs for the same batch


def pass_flops(shape: ModelShape, work: Workload, *, backward: bool, head: int) -> float:
    """Flops of a pass: trunk, attention, and ``head`` products over the head."""
    products = 2 * work.tokens * trunk_weights(shape) * (3 if backward else 1)
    attention = (14 if backward else 4) * work.scores * shape.hidden * shape.layers
    return products + attention + head * 2 * work.actions * shape.vocab * shape.hidden


def step_flops(job: Job) -> float:
    """Flops of a step after sampling: what ``costs.step_s`` counts."""
    seen, sampled, shape = job.work(1), job.work(0), job.shape
    return (
        pass_flops(shape, seen, backward=False, head=1)
        + pass_flops(shape, seen, backward=True, head=4)
        + pass_flops(shape, sampled, backward=False, head=1)
        + pass_flops(shape, sampled, backward=True, head=3)
    )


def activation_bytes(shape: ModelShape) -> int:
    """Bytes that a token keeps for the backward pass in bf16, norms and rotary fused.

    Per layer: two norms' inputs and outputs, queries, attention's output (6 D); keys and values
    (2 K E); gate, up, SiLU and product (4 I).
    """
    key_width = shape.hidden // shape.heads * shape.kv_heads
    return 2 * shape.layers * (6 * shape.hidden + 2 * key_width + 4 * shape.inner)


def predict(job: Job, gpus: int, gpu: GPU | None = None) -> dict[str, float | bool]:
    """Seconds of a step after sampling on ``gpus`` GPUs, its parts, and bytes per GPU.

    Args:
        job: what is trained on.
        gpus: a multiple of a node's.
        gpu: the hardware.

    Raises:
        ValueError: not a multiple of a node's GPUs, or more of them than prompts.
    """
    gpu = gpu or GPU()
    if gpus < 1 or gpus % gpu.node:
        raise ValueError(f"expected a multiple of {gpu.node} GPUs, received {gpus}: fill the nodes")
    if gpus > job.prompts:
        raise ValueError(
            f"expected at most {job.prompts} GPUs, one a prompt, received {gpus}: completions of "
            "one prompt share its tokens"
        )
    nodes, weights, layers = gpus // gpu.node, job.weights, job.shape.layers
    tokens = job.work(1).tokens / gpus
    micro_batches = job.micro_batches(gpus)
    compute = step_flops(job) / gpus / (gpu.peak * gpu.share)
    # two scoring passes; two updates of a forward and a backward pass, and an update's 30 bytes a
    # weight: bf16 weight, float32 weight, two moments read and written, the gradient read
    reads = 6 * micro_batches * 2 * weights
    memory = (reads + 2 * 30 * weights / gpu.node) / gpu.memory
    launch = micro_batches * layers * gpu.launch * (2 + 2 * 3)
    inside = (gpu.node - 1) / gpu.node * 2 * weights / (gpu.nvlink * gpu.link_share)
    gather = micro_batches * (6 + 2) * inside  # 6 gathers of weights, 2 reductions of gradients
    reduce = 0.0
    if nodes > 1:
        shard = 4 * weights / gpu.node
        reduce = 2 * (2 * (nodes - 1) / nodes * shard / (gpu.network * gpu.link_share))
        reduce += 2 * 2 * (nodes - 1) * gpu.hop
    alone = max(compute, launch) + memory
    states = 2 * 18 * weights / gpu.node
    activations = min(tokens, job.token_budget) * activation_bytes(job.shape)
    held = states + activations + 2 * 2 * weights / layers + 2**27
    return {
        "tokens per GPU": tokens,
        "micro-batches": micro_batches,
        "compute": compute,
        "memory": memory,
        "launch": launch,
        "gather": gather,
        "reduce": reduce,
        "overlapped": max(alone, gather + reduce),
        "not overlapped": alone + gather + reduce,
        "GB per GPU": held / 1e9,
        "break-even tokens": gather / compute * tokens / micro_batches,
        "fits": held < 0.9 * gpu.capacity,
        "share of peak": step_flops(job) / gpus / gpu.peak / (alone + gather + reduce),
        "sampling at least": sampling_s(job, gpus, gpu),
    }


def sampling_s(job: Job, gpus: int, gpu: GPU) -> float:
    """A bound from below on sampling: each GPU decodes all of its sequences at once.

    Every token reads the weights once and every sequence its keys and values (half of their final
    length on average), in bf16; the products of all sequences run at ``share``.
    """
    sequences = job.prompts * job.group / gpus
    reads = job.completion * 2 * job.weights
    key_width = job.shape.hidden // job.shape.heads * job.shape.kv_heads
    kept = 2 * 2 * key_width * job.shape.layers  # bytes a token
    context = job.prompt + job.completion / 2
    cached = sequences * job.completion * context * kept
    flops = 2 * all_weights(job.shape) * sequences * job.completion
    return (reads + cached) / gpu.memory + flops / (gpu.peak * gpu.share)


def scenarios() -> list[dict[str, object]]:
    """Both models and both lengths: on 8 GPUs, on 1,024 with 128 times the batch, and the same."""
    return [
        _row(name, model, lengths, sizes, prompts=1024 * factor, gpus=gpus)
        for name, model in MODELS
        for lengths, sizes in LENGTHS
        for gpus, factor in ((8, 1), (1024, 128), (1024, 1))
    ]


def scaling() -> list[dict[str, object]]:
    """The same batch of short sequences on more and more GPUs: where adding them stops to pay."""
    return [
        _row(name, model, *LENGTHS[0], prompts=1024, gpus=gpus)
        for name, model in MODELS
        for gpus in SCALING
    ]


def _row(
    name: str,
    model: dict[str, Any],
    lengths: str,
    sizes: dict[str, int],
    *,
    prompts: int,
    gpus: int,
) -> dict[str, object]:
    job = Job(name=name, prompts=prompts, **model, **sizes)
    about = {"model": name, "weights": job.weights, "lengths": lengths, "prompts": prompts}
    return {**about, "gpus": gpus, **predict(job, gpus)}
