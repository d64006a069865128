"""Sampling on a GPU: log-probs are those of packed batches, and the CPU seldom waits."""

import pytest
import torch

from airl_fast.language_model import LanguageModel, Origin
from airl_fast.packing import Trace
from airl_fast.passes import action_logp
from airl_fast.rollout import sample
from tests.gpu.waits import Waits
from tests.tiny_models import tiny_model, tiny_tokenizer

PROMPTS = [(1, 5, 9, 4), (7,), (1, 8, 8, 3, 20, 11)]


def policy_of(name, scale, dtype=torch.float32):
    model = tiny_model(name, dtype=dtype).eval().cuda()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(scale)
    return LanguageModel(model, tiny_tokenizer(), Origin(model="tiny"))


@pytest.mark.parametrize("stop", [(), ("12", "3")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_completion_ends_where_it_ends_and_has_its_own_log_probs(name, dtype, stop):
    policy = policy_of(name, 0.1, dtype)
    error = 1e-3 if dtype == torch.float32 else 0.1  # logits are rounded where they are sampled
    rollouts = sample(policy, PROMPTS, group_size=20, max_new_tokens=40, seed=0, stop=stop)
    assert len({len(r.completion) for r in rollouts}) > 10
    traces = [Trace(prompt=r.prompt, completion=r.completion, span_lengths=(len(r.completion),))
              for r in rollouts]  # fmt: skip
    logp = action_logp(policy, traces, 4096)
    for rollout, packed in zip(rollouts, logp, strict=True):
        torch.testing.assert_close(torch.tensor(rollout.logp), packed.cpu(), atol=error, rtol=0)
        assert 2 not in rollout.completion[:-1]
        assert not any(s in rollout.text[:-1] for s in stop)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sixteen_tokens_are_drawn_between_two_waits(name, dtype):
    policy = policy_of(name, 0.0, dtype)  # uniform: a row in 61 ends at each token
    waits = []
    for tokens in (16, 64, 64):
        with Waits() as made:
            sample(policy, PROMPTS, group_size=40, max_new_tokens=tokens, seed=0)
        waits.append(made.made.total())
    few, _, many = waits
    assert many - few <= 3 * 2  # which rows there are, and their tokens
