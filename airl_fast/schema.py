"""What a run can be told: frozen, keyword-only dataclasses, checked when built.

An unknown field, a wrong type or a contradiction is refused, in Python as from a file. Import the
classes from ``airl_fast.config``, which also reads, writes and lists them.
"""

from typing import Literal

from pydantic import Field, model_validator

from airl_fast.schema_guards import GuardsConfig
from airl_fast.schema_models import (
    AlgorithmConfig,
    DiscriminatorConfig,
    PolicyConfig,
    SamplingConfig,
    adapter,
)
from airl_fast.section import Float, Int, refuse_if, section

BUILT_IN = {  # models that ship with the package, and the tasks whose characters they know
    "arithmetic-base": ("arithmetic",),
    "countdown-base": ("arithmetic", "countdown"),
    "countdown-base-small": ("arithmetic", "countdown"),
}


@section
class TaskConfig:
    """Problems, demonstrations and their subsets."""

    name: Literal["arithmetic", "countdown", "gsm8k", "jsonl", "medreason", "mmlu_pro"] = Field(
        description="which task"
    )
    path: str | None = Field(
        default=None,
        min_length=1,
        description="local file or folder of JSON lines, or a hub name "
        "(gsm8k, medreason, mmlu_pro; null: the task's own); arithmetic and countdown are "
        "generated and have none",
    )
    traces: str | None = Field(
        default=None,
        min_length=1,
        description="mmlu_pro: whose answers are the demonstrations: a file of question_id and "
        "response, or its name in task.path less .jsonl; null: the questions' cot_content",
    )
    evaluation: str | None = Field(
        default=None,
        min_length=1,
        description="medreason: a file of questions that the test set is drawn from; null: "
        "test.jsonl of task.path, or the traces",
    )
    seed: Int = Field(default=0, description="draws the subsets, and generated problems")
    demonstrations: Int | None = Field(
        default=None,
        ge=1,
        description="expert traces used; null: 600 (arithmetic, countdown), all (others)",
    )
    unlabelled: Int = Field(
        default=0, ge=0, description="further training prompts, without their demonstrations"
    )
    validation: Int = Field(default=200, ge=0, description="problems to choose settings on")
    test: Int = Field(default=400, ge=0, description="problems to report on")
    expert_error: Float = Field(
        default=0.3,
        ge=0,
        le=1,
        description="arithmetic, countdown: share of demonstrations with an error",
    )
    correct_only: bool = Field(
        default=False, description="mmlu_pro: leave out demonstrations with a wrong answer"
    )
    chat: bool = Field(
        default=True,
        description="gsm8k, medreason, mmlu_pro: prompts go through the chat template",
    )
    calculator_marks: bool = Field(default=False, description="gsm8k: keep <<48/2=24>> in traces")

    @property
    def generated(self) -> bool:
        """Whether the problems are made, from the seed alone."""
        return self.name in ("arithmetic", "countdown")

    @model_validator(mode="after")
    def _check(self) -> "TaskConfig":
        refuse_if(
            (
                self.generated and self.path is not None,
                f"task.path={self.path!r} with task.name={self.name}, which is generated; "
                "remove task.path or set task.name=jsonl",
            ),
            (
                self.name == "jsonl" and self.path is None,
                "task.name=jsonl needs task.path, a file or folder of JSON lines",
            ),
            (
                not self.generated and self.expert_error != 0.3,
                f"task.expert_error={self.expert_error} plants errors in generated traces only; "
                f"remove it for task.name={self.name}",
            ),
            (
                (self.generated or self.name == "jsonl") and not self.chat,
                "task.chat=false is for gsm8k, medreason and mmlu_pro; remove it for "
                f"task.name={self.name}",
            ),
            (
                self.name != "mmlu_pro" and (self.traces is not None or self.correct_only),
                "task.traces and task.correct_only are for mmlu_pro; remove them for "
                f"task.name={self.name}",
            ),
            (
                self.name != "medreason" and self.evaluation is not None,
                f"task.evaluation is for medreason; remove it for task.name={self.name}",
            ),
            (
                self.name != "gsm8k" and self.calculator_marks,
                f"task.calculator_marks is for gsm8k; remove it for task.name={self.name}",
            ),
        )
        return self


@section
class RunSection:
    """The run: where, how long, how often."""

    output_dir: str = Field(min_length=1, description="folder of the run")
    steps: Int = Field(default=60, ge=1, description="policy steps (sft: optimiser steps)")
    seed: Int = Field(default=0, ge=0, description="of sampling, batches and new weights")
    token_budget: Int = Field(default=16384, ge=2, description="tokens of a micro-batch")
    gradient_checkpointing: bool = Field(
        default=False,
        description="compute the activations of both models' layers again in backward passes: the "
        "memory of long traces, for another forward pass",
    )
    checkpoint_every: Int = Field(default=20, ge=1, description="steps between checkpoints")
    keep_checkpoints: Int = Field(default=2, ge=1, description="newest checkpoints kept")
    resume: Literal["auto", "never", "must"] = Field(
        default="auto",
        description="auto: go on if there is a checkpoint; never: refuse a used folder; "
        "must: refuse to start anew",
    )
    eval_every: Int = Field(default=10, ge=0, description="steps between evaluations; 0: none")
    eval_samples: Int = Field(default=4, ge=1, description="samples of a validation problem")
    eval_kl: bool = Field(
        default=False,
        description="evaluations measure the KL from the policy that the warm start left, kept "
        "for it",
    )
    device: str | None = Field(
        default=None, min_length=1, description="null: the GPU where there is one, else the CPU"
    )
    threads: Int | None = Field(default=None, ge=1, description="CPU threads; null: torch's own")
    matmul_precision: Literal["highest", "high", "medium"] | None = Field(
        default=None,
        description="of float32 products, as torch.set_float32_matmul_precision: high is TF32 on a "
        "GPU and 16 bits on a CPU with AMX, medium 8 bits there; null: torch's own, highest",
    )


@section
class RunConfig:
    """Everything that a run depends on."""

    task: TaskConfig
    policy: PolicyConfig
    discriminator: DiscriminatorConfig = Field(default_factory=DiscriminatorConfig)
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    guards: GuardsConfig = Field(default_factory=GuardsConfig)
    run: RunSection

    @property
    def sft_steps(self) -> int:
        """Steps of imitation: all of them, or the warm start."""
        return self.run.steps if self.algorithm.name == "sft" else self.algorithm.sft_warmup

    @property
    def warmup_steps(self) -> int:
        """Steps in which the discriminator alone is trained."""
        learns = self.algorithm.name == "airl" and not self.algorithm.frozen_discriminator
        return self.discriminator.warmup_updates if learns else 0

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, the warm starts included."""
        own = 0 if self.algorithm.name == "sft" else self.run.steps
        return self.sft_steps + self.warmup_steps + own

    @property
    def shown_prompts(self) -> int:
        """How many prompts of a step have a demonstration."""
        if self.sampling.demonstration_prompts is not None:
            return self.sampling.demonstration_prompts
        prompts = self.sampling.prompts_per_step
        return max(1, prompts // 2) if self.task.unlabelled else prompts

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        task, policy, disc = self.task, self.policy, self.discriminator
        built_in = policy.model in BUILT_IN
        trains_on_groups = self.algorithm.name != "sft"
        bare_prompts = self.sampling.prompts_per_step - self.shown_prompts
        demonstrations = task.demonstrations
        if demonstrations is None and task.generated:
            demonstrations = 600
        refuse_if(
            (
                built_in and task.name not in BUILT_IN.get(policy.model, ()),
                f"policy.model={policy.model} knows the characters of "
                f"{' and '.join(BUILT_IN.get(policy.model, ()))} only; set policy.model to a "
                f"language model for task.name={task.name}",
            ),
            (
                built_in and policy.gguf_file is not None,
                f"policy.gguf_file with policy.model={policy.model}, which is safetensors; "
                "remove policy.gguf_file",
            ),
            (
                self.algorithm.name == "airl" and len(self.sampling.stop) > 0,
                f"sampling.stop={list(self.sampling.stop)} with algorithm.name=airl: "
                "demonstrations end with the end-of-text token and stopped samples do not, which "
                "is all that f would learn; remove it, and let the model end its text",
            ),
            (
                disc.trunk == "shared" and policy.lora_rank == 0,
                "discriminator.trunk=shared is two adapters over one frozen backbone; set "
                "policy.lora_rank to 1 or more",
            ),
            (
                self.algorithm.name == "airl"
                and self.algorithm.sft_warmup > 0
                and disc.trunk != "policy"
                and disc.model is None
                and disc.saved is None
                and adapter(policy) != adapter(disc),
                f"algorithm.sft_warmup={self.algorithm.sft_warmup}: the discriminator starts from "
                "the warm policy's weights, so both need the same adapter; set "
                f"discriminator.lora_rank={policy.lora_rank} and "
                f"discriminator.lora_alpha={policy.lora_alpha}, or algorithm.sft_warmup=0",
            ),
            (
                disc.logit == "wgan" and self.algorithm.reward == "f-logp",
                "algorithm.reward=f-logp with discriminator.logit=wgan: a critic is no "
                "log-density ratio; set algorithm.reward=f",
            ),
            (
                self.algorithm.name == "airl"
                and not self.algorithm.frozen_discriminator
                and disc.logit == "f"
                and self.algorithm.reward == "f-logp",
                "algorithm.reward=f-logp with discriminator.logit=f: f is the log-density ratio "
                "by itself, and log pi would be subtracted twice; set algorithm.reward=f (and "
                "algorithm.entropy_coef for a bonus)",
            ),
            (
                trains_on_groups and self.sampling.group_size == 1,
                f"sampling.group_size=1 with algorithm.baseline={self.algorithm.baseline}: a "
                "group of one has every advantage 0; set sampling.group_size to 2 or more",
            ),
            (
                self.run.token_budget <= self.sampling.max_new_tokens,
                f"run.token_budget={self.run.token_budget} cannot hold a prompt and "
                f"sampling.max_new_tokens={self.sampling.max_new_tokens}; raise run.token_budget",
            ),
            (
                self.guards.audit_every > 0 and self.run.matmul_precision in ("high", "medium"),
                f"guards.audit_every={self.guards.audit_every} with run.matmul_precision="
                f"{self.run.matmul_precision}: an audit holds the operators against products in "
                "float32; set run.matmul_precision=highest, or guards.audit_every=0",
            ),
            (
                self.shown_prompts > self.sampling.prompts_per_step,
                f"sampling.demonstration_prompts={self.shown_prompts} is more than "
                f"sampling.prompts_per_step={self.sampling.prompts_per_step}; lower it",
            ),
            (
                self.shown_prompts < self.sampling.prompts_per_step and task.unlabelled == 0,
                f"sampling.demonstration_prompts={self.shown_prompts} leaves prompts without a "
                "demonstration and task.unlabelled=0; set task.unlabelled, or null",
            ),
            (
                trains_on_groups
                and demonstrations is not None
                and self.shown_prompts > demonstrations,
                f"a step has {self.shown_prompts} prompts with a demonstration, and "
                f"task.demonstrations={demonstrations}; set sampling.demonstration_prompts (or "
                f"sampling.prompts_per_step) to {demonstrations} or less",
            ),
            (
                trains_on_groups and bare_prompts > task.unlabelled,
                f"a step has {bare_prompts} prompts without a demonstration, and task.unlabelled="
                f"{task.unlabelled}; raise it, lower sampling.prompts_per_step, or raise "
                "sampling.demonstration_prompts",
            ),
        )
        return self
