"""A trainer of your own: a policy-gradient step whose head never forms its logits.

    python examples/own_trainer.py         # on a CPU, without a network, in seconds

The trunk is a plain transformers model; ``linear_logprob`` reads log-probabilities off its hidden
states, ``linear_policy_loss`` makes the clipped loss and its gradients in one sweep over the head.
The reward is a toy: the share of a completion's tokens that are below 8, of 32.
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from airl_fast import group_advantages, linear_logprob, linear_policy_loss

PROMPTS, GROUP, LENGTH, VOCABULARY = 4, 8, 6, 32


def sample(model: LlamaForCausalLM, prompts: torch.Tensor) -> torch.Tensor:
    """Sample completions of equal length, [B, P + LENGTH]."""
    ids = prompts
    for _ in range(LENGTH):
        logits = model(ids).logits[:, -1]
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], dim=1)
    return ids


def states(model: LlamaForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states that predict the completions' tokens [N, D], and those tokens [N]."""
    hidden = model.model(ids).last_hidden_state[:, -LENGTH - 1 : -1]
    return hidden.flatten(0, 1), ids[:, -LENGTH:].flatten()


def main(steps: int) -> list[float]:
    """Train and return the mean reward of every step."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    head = model.lm_head.weight  # [V, D]
    history = []
    for step in range(steps):
        prompts = torch.randint(VOCABULARY, (PROMPTS, 3)).repeat_interleave(GROUP, dim=0)
        with torch.no_grad():
            ids = sample(model, prompts)
            hidden, targets = states(model, ids)
            old_logp = linear_logprob(hidden, head, targets)
        reward = (ids[:, -LENGTH:] < 8).float().mean(1)  # [B]
        advantages = group_advantages(reward, torch.arange(len(ids)) // GROUP)  # [B]
        history.append(reward.mean().item())

        for _ in range(2):  # the second update is off-policy, and clipped
            hidden, targets = states(model, ids)
            loss, stats = linear_policy_loss(
                hidden,
                head,
                targets,
                advantages.repeat_interleave(LENGTH),
                cu_seqs=torch.arange(len(ids) + 1, dtype=torch.int32) * LENGTH,
                old_logp=old_logp,
                entropy_coef=0.002,
            )
            optimizer.zero_grad()
            loss.backward()  # gradients were made in the forward sweep
            optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            print(
                f"step {step}: reward {history[-1]:.3f}, entropy {stats.entropy_mean.item():.3f}, "
                f"clipped {stats.clip_fraction.item():.1%}"
            )
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="default %(default)s")
    main(parser.parse_args().steps)
