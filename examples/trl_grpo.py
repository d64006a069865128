"""Train a policy with TRL on a learned reward, once as a number a completion and once dense.

    python examples/trl_grpo.py            # on a CPU, without a network; needs the trl extra

The reward here is the built-in arithmetic model itself, saved as an lm discriminator with a value
for every step: put the folder of your own run (`airl-fast train`) in its place.
"""

import argparse
import tempfile
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from airl_fast import Discriminator, Policy, RewardScorer
from airl_fast.integrations.trl import DenseGRPOTrainer, reward_function

TRAINING = {
    "granularity": "step",
    "interval": 8,
    "boundary": ";",
    "logit": "f-logp",
    "reward": "f",
    "temperature": 1.0,
    "task": "arithmetic",
}


def main(steps: int) -> None:
    """Train for a few steps each way and print the rewards."""
    prompts = [f"{a}+{b}-{c}=" for a in (12, 47, 68) for b in (5, 9) for c in (3, 7)]
    data = Dataset.from_dict({"prompt": prompts})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        policy = Policy.from_pretrained("arithmetic-base")
        policy.save(folder / "policy")
        Discriminator.create(policy, head="lm").save(folder / "reward", training=TRAINING)
        scorer = RewardScorer.from_pretrained(folder / "reward")

        settings = {
            "output_dir": str(folder / "out"),
            "max_steps": steps,
            "logging_steps": 1,
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 32,
            "learning_rate": 1e-4,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
        }

        def trained(kind: type, **options: object) -> None:
            trainer = kind(
                AutoModelForCausalLM.from_pretrained(folder / "policy"),
                args=GRPOConfig(**settings),
                train_dataset=data,
                processing_class=policy.tokenizer,
                **options,
            )
            trainer.train()
            logged = [row["reward"] for row in trainer.state.log_history if "reward" in row]
            print(kind.__name__, "mean reward per step:", [round(reward, 2) for reward in logged])

        # one reward a completion: the mean over its steps of f
        trained(GRPOTrainer, reward_funcs=reward_function(scorer, reduce="mean"))
        # every token has the advantage of its own step, discounted to go
        trained(DenseGRPOTrainer, scorer=scorer, gamma=0.95)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2, help="of each (default %(default)s)")
    main(parser.parse_args().steps)
