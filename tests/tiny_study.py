"""A study of seconds, that tests change."""

TINY = """\
# A study of seconds.
recipe: arithmetic
seeds: [0]
sft_arms: [[2.0e-4, 2], [1.0e-3, 2]]
sft_checkpoints: 2
temperatures: [1.0, 0.0]
samples: 2
rerank_samples: 3
curve_every: 1
overrides:
  - run.steps=3
  - run.eval_samples=2
  - run.checkpoint_every=1
  - algorithm.sft_batch=3
  - discriminator.warmup_updates=1
  - discriminator.perturbed_per_update=2
  - sampling.prompts_per_step=4
  - sampling.group_size=2
  - sampling.max_new_tokens=12
  - task.demonstrations=20
  - task.unlabelled=20
  - task.validation=6
  - task.test=6
starts:
  arithmetic:
variants:
  AIRL:
  taken over:
    init: base
    reward_from: AIRL
    overrides: [algorithm.frozen_discriminator=true]
  GRPO:
    overrides: [algorithm.name=grpo]
comparisons:
  - [AIRL, best SFT]
  - [GRPO, AIRL]
"""


def made(folder, text):
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def changed(*pairs):
    text = TINY
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    return text
