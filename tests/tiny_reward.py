"""A saved reward over random tiny models with a chat template, and f from transformers alone."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from airl_fast import Discriminator, Policy
from airl_fast.language_model import LanguageModel, Origin
from tests.tiny_models import tiny_model, tiny_tokenizer

BOUNDARY = "[0-9 ]"  # so that random text has steps
KAPPA, OFFSET = 0.7, 0.3


def save_reward(folder: Path, granularity: str = "step") -> Path:
    """Write a run's folder: reward/ (an lm head) and policy/, which has the same tokenizer."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    for name, seed in (("policy", 0), ("q", 1)):
        model = tiny_model("llama", seed=seed, vocab_size=len(tokenizer)).eval()
        LanguageModel(model, tokenizer, Origin(model=name)).save(folder / name)
    policy = Policy.from_pretrained(folder / "policy")
    policy.save(folder / "policy")
    reward = Discriminator.create(policy, model=str(folder / "q"), kappa=KAPPA, offset=OFFSET)
    reward.save(
        folder / "reward",
        training={
            "granularity": granularity,
            "interval": 3,
            "boundary": BOUNDARY,
            "logit": "f-logp",
            "reward": "f",
            "temperature": 1.0,
            "task": "words",
        },
    )
    return folder


class Truth:
    """f of every token, one sequence at a time, without packing and without an operator."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder / "q").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "q")

    def tokens(self, prompt: list[int], completion: list[int]) -> list[float]:
        with torch.no_grad():
            logits = self.model(torch.tensor([[*prompt, *completion]])).logits[0].double()
        logq = logits[len(prompt) - 1 : -1].log_softmax(-1)
        return [KAPPA * logq[i, token].item() + OFFSET for i, token in enumerate(completion)]

    def f(self, prompt: str, completion: str, *, end_of_text: bool = True) -> float:
        ids = [self.tokenizer(text).input_ids for text in (prompt, completion)]
        end = [self.tokenizer.eos_token_id] if end_of_text else []
        return sum(self.tokens(ids[0], [*ids[1], *end]))
