"""What a run can be told: frozen, keyword-only dataclasses, checked when built.

An unknown field, a wrong type or a contradiction is refused, in Python as from a file. Import the
classes from ``airl_fast.config``, which also reads, writes and lists them.
"""

from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs


def _not_boolean(value: object) -> object:
    if isinstance(value, bool):  # bool is an int in Python; `steps: yes` is a mistake
        raise ValueError(f"expected a number, received {value!r}")
    return value


_Int = Annotated[int, BeforeValidator(_not_boolean)]
_Float = Annotated[float, BeforeValidator(_not_boolean), Field(allow_inf_nan=False)]
_Betas = tuple[Annotated[_Float, Field(ge=0, lt=1)], Annotated[_Float, Field(ge=0, lt=1)]]


_T = TypeVar("_T")


def _keywords_only(cls: type, value: Any) -> Any:
    if isinstance(value, ArgsKwargs) and value.args:
        raise ValueError(f"{cls.__name__} takes keywords only, received {value.args!r}")
    return value


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def _section(cls: type[_T]) -> type[_T]:
    """Make a frozen, keyword-only dataclass that refuses unknown fields.

    pydantic accepts positional values for ``Field`` defaults in spite of ``kw_only=True``
    (2.14), hence the check of our own.
    """
    check: Any = classmethod(_keywords_only)
    setattr(cls, _keywords_only.__name__, model_validator(mode="before")(check))
    built: Any = dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))(cls)
    return built


def _refuse_if(*cases: tuple[bool, str]) -> None:
    """Raise with the message of the first case that holds."""
    for holds, message in cases:
        if holds:
            raise ValueError(message)


@_section
class TaskConfig:
    """Problems, demonstrations and their subsets."""

    name: Literal["arithmetic", "gsm8k", "jsonl", "medreason", "mmlu_pro"] = Field(
        description="which task"
    )
    path: str | None = Field(
        default=None,
        min_length=1,
        description="local file or folder of JSON lines, or a hub name "
        "(gsm8k, medreason, mmlu_pro; null: the task's own); arithmetic is generated and has none",
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
    seed: _Int = Field(default=0, description="draws the subsets, and arithmetic's problems")
    demonstrations: _Int | None = Field(
        default=None, ge=1, description="expert traces used; null: 600 (arithmetic), all (others)"
    )
    unlabelled: _Int = Field(
        default=0, ge=0, description="further training prompts, without their demonstrations"
    )
    validation: _Int = Field(default=200, ge=0, description="problems to choose settings on")
    test: _Int = Field(default=400, ge=0, description="problems to report on")
    expert_error: _Float = Field(
        default=0.3, ge=0, le=1, description="arithmetic: share of demonstrations with an error"
    )
    correct_only: bool = Field(
        default=False, description="mmlu_pro: leave out demonstrations with a wrong answer"
    )
    chat: bool = Field(
        default=True,
        description="gsm8k, medreason, mmlu_pro: prompts go through the chat template",
    )
    calculator_marks: bool = Field(default=False, description="gsm8k: keep <<48/2=24>> in traces")

    @model_validator(mode="after")
    def _check(self) -> "TaskConfig":
        _refuse_if(
            (
                self.name == "arithmetic" and self.path is not None,
                f"task.path={self.path!r} with task.name=arithmetic, which is generated; "
                "remove task.path or set task.name=jsonl",
            ),
            (
                self.name == "jsonl" and self.path is None,
                "task.name=jsonl needs task.path, a file or folder of JSON lines",
            ),
            (
                self.name != "arithmetic" and self.expert_error != 0.3,
                f"task.expert_error={self.expert_error} plants errors in generated traces only; "
                f"remove it for task.name={self.name}",
            ),
            (
                self.name in ("arithmetic", "jsonl") and not self.chat,
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


@_section
class PolicyConfig:
    """The model that writes traces, and its optimiser."""

    model: str = Field(
        min_length=1,
        description="hub name or folder; arithmetic-base: the model that ships with the package",
    )
    gguf_file: str | None = Field(default=None, description="GGUF file inside policy.model")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="weights and activations; logits are always float32"
    )
    lora_rank: _Int = Field(default=0, ge=0, description="rank of the adapters; 0: full weights")
    lora_alpha: _Int = Field(default=16, ge=1, description="scale of the adapters")
    learning_rate: _Float = Field(default=2e-4, gt=0, description="AdamW, the highest rate")
    weight_decay: _Float = Field(default=0.01, ge=0, description="AdamW")
    warmup_steps: _Int = Field(default=5, ge=0, description="steps of linear warm-up")
    final_lr_fraction: _Float = Field(
        default=0.1, ge=0, le=1, description="the cosine ends at this share of the rate"
    )
    betas: _Betas = Field(default=(0.9, 0.98), description="AdamW")
    clip_norm: _Float = Field(default=1.0, gt=0, description="largest norm of the gradient")


@_section
class DiscriminatorConfig:
    """The learned reward f: its model, its optimiser and what it is trained on."""

    head: Literal["lm", "score"] = Field(
        default="lm", description="lm: f = kappa log q(a|s) + offset; score: one learned row"
    )
    model: str | None = Field(
        default=None, min_length=1, description="hub name or folder; null: the policy's"
    )
    gguf_file: str | None = Field(default=None, description="GGUF file inside discriminator.model")
    trunk: Literal["own", "shared", "policy"] = Field(
        default="own",
        description="own: a model of its own; shared: two LoRA adapters over one frozen backbone; "
        "policy: reads the policy's hidden states",
    )
    shaping: bool = Field(
        default=False, description="score head: f = g + shaping_gamma h(s') - h(s)"
    )
    shaping_gamma: _Float = Field(default=1.0, ge=0, le=1, description="discount of the shaping")
    lora_rank: _Int = Field(default=0, ge=0, description="rank of the adapters; 0: full weights")
    lora_alpha: _Int = Field(default=16, ge=1, description="scale of the adapters")
    learning_rate: _Float = Field(default=2e-4, gt=0, description="AdamW, constant")
    head_learning_rate: _Float = Field(
        default=1e-2, gt=0, description="AdamW, for kappa and offset or the score rows"
    )
    weight_decay: _Float = Field(default=0.05, ge=0, description="AdamW")
    betas: _Betas = Field(default=(0.9, 0.98), description="AdamW")
    clip_norm: _Float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    kappa: _Float = Field(default=1.0, description="lm head: where kappa starts")
    offset: _Float = Field(default=0.0, description="lm head: where the offset starts")
    label_smoothing: _Float = Field(default=0.2, ge=0, lt=1, description="0.2: targets 0.9 and 0.1")
    logit: Literal["f-logp", "f", "wgan"] = Field(
        default="f-logp",
        description="what tells experts from policy: f - log pi, f alone, or a critic (whose f "
        "nothing bounds but its learning rate)",
    )
    updates_per_step: _Int = Field(default=1, ge=1, description="updates per policy step")
    warmup_updates: _Int = Field(
        default=30, ge=0, description="steps (of updates_per_step updates) before the policy moves"
    )
    accuracy_throttle: _Float = Field(
        default=1.0, gt=0, le=1, description="skip updates while the running accuracy is above it"
    )
    logp_floor: _Float | None = Field(
        default=None,
        lt=0,
        description="lowest log pi of a span in the logit, counted in the metrics; null: none",
    )
    replay: _Int = Field(default=0, ge=0, description="past policy traces kept as negatives")
    replay_fraction: _Float = Field(
        default=0.0, ge=0, le=1, description="share of the policy traces drawn from the replay"
    )
    perturbed_per_update: _Int = Field(
        default=64, ge=0, description="corrupted demonstrations in an update, as negatives"
    )
    perturbations: tuple[Literal["corrupt", "digit", "swap", "drop"], ...] = Field(
        default=("corrupt", "digit", "swap", "drop"),
        min_length=1,
        description="how: plant a wrong step, change a digit, swap two steps, drop one",
    )
    span_logp: Literal["sum", "mean"] = Field(
        default="sum", description="log pi (and the lm head's f) of a span from its tokens'"
    )

    @model_validator(mode="after")
    def _check(self) -> "DiscriminatorConfig":
        mine = "discriminator."
        _refuse_if(
            (
                self.shaping and self.head == "lm",
                f"{mine}shaping=true needs {mine}head=score: the lm head has no potential",
            ),
            (
                not self.shaping and self.shaping_gamma != 1.0,
                f"{mine}shaping_gamma={self.shaping_gamma} discounts a potential that is not "
                f"there; set {mine}shaping=true, or remove it",
            ),
            (
                self.head == "score" and (self.kappa, self.offset) != (1.0, 0.0),
                f"{mine}kappa and {mine}offset belong to {mine}head=lm; remove them",
            ),
            (
                self.gguf_file is not None and self.model is None,
                f"{mine}gguf_file={self.gguf_file!r} needs {mine}model, where the file is; "
                "without either, the policy's model is used",
            ),
            (
                self.trunk != "own" and self.model is not None,
                f"{mine}trunk={self.trunk} uses the policy's model; remove "
                f"{mine}model={self.model!r} or set {mine}trunk=own",
            ),
            (
                self.trunk == "shared" and self.lora_rank == 0,
                f"{mine}trunk=shared is two adapters over one frozen backbone; set "
                f"{mine}lora_rank (and policy.lora_rank) to 1 or more",
            ),
            (
                self.trunk == "policy" and self.head == "lm",
                f"{mine}trunk=policy reads the policy's hidden states: an lm head would only "
                f"repeat log pi; set {mine}head=score",
            ),
            (
                self.trunk == "policy" and self.lora_rank > 0,
                f"{mine}trunk=policy trains the score rows only; set {mine}lora_rank=0",
            ),
            (
                self.replay_fraction > 0 and self.replay == 0,
                f"{mine}replay_fraction={self.replay_fraction} draws from an empty replay; set "
                f"{mine}replay to the number of traces to keep",
            ),
            (
                self.replay > 0 and self.replay_fraction == 0,
                f"{mine}replay={self.replay} keeps traces that are never drawn; set "
                f"{mine}replay_fraction above 0",
            ),
            (
                self.logit == "wgan" and self.label_smoothing > 0,
                f"{mine}logit=wgan is a critic without labels; set {mine}label_smoothing=0",
            ),
            (
                self.logit == "wgan" and self.accuracy_throttle < 1,
                f"{mine}logit=wgan has no accuracy; set {mine}accuracy_throttle=1",
            ),
        )
        return self


def _adapter(model: PolicyConfig | DiscriminatorConfig) -> tuple[int, int] | None:
    return (model.lora_rank, model.lora_alpha) if model.lora_rank else None


@_section
class AlgorithmConfig:
    """What the policy is trained on and how."""

    name: Literal["airl", "sft", "grpo"] = Field(
        default="airl", description="airl; baselines: sft, grpo with the true outcome as reward"
    )
    reward: Literal["f", "f-logp"] = Field(
        default="f", description="the policy's reward: f, or f - log pi"
    )
    frozen_discriminator: bool = Field(
        default=False, description="a control: keep f as it starts, no updates at all"
    )
    granularity: Literal["dense", "interval", "step", "sparse"] = Field(
        default="step", description="a reward per token, per interval, per step or per trace"
    )
    interval: _Int = Field(default=8, ge=1, description="tokens of an interval")
    reward_clip: _Float | None = Field(
        default=None,
        gt=0,
        description="largest |reward| of a span, counted in the metrics; null: none",
    )
    gamma: _Float = Field(default=1.0, ge=0, le=1, description="discount of the reward to go")
    baseline: Literal["mean", "leave_one_out"] = Field(
        default="mean", description="what a group's members are compared with"
    )
    scale: Literal["std", "none"] = Field(
        default="std", description="divide a group's advantages by their standard deviation"
    )
    advantage_level: Literal["span", "sequence"] = Field(
        default="span",
        description="a span's reward to go is compared with those of the group's spans at its "
        "place, or with the returns of its whole traces (always so for grpo)",
    )
    advantage_clip: _Float | None = Field(
        default=None, gt=0, description="largest |advantage|, counted in the metrics; null: none"
    )
    expert_in_group: bool = Field(
        default=False, description="the demonstration joins the policy's group of its prompt"
    )
    policy_updates: _Int = Field(default=1, ge=1, description="policy updates per rollout")
    clip_low: _Float = Field(default=0.2, ge=0, lt=1, description="ratio clipped at 1 - clip_low")
    clip_high: _Float = Field(default=0.2, ge=0, description="ratio clipped at 1 + clip_high")
    delta: _Float | None = Field(
        default=None, gt=1, description="largest ratio where the advantage is negative; null: none"
    )
    kl_beta: _Float = Field(default=0.0, ge=0, description="weight of the KL to the start")
    entropy_coef: _Float = Field(default=0.0, ge=0, description="weight of the entropy bonus")
    sft_warmup: _Int = Field(default=0, ge=0, description="SFT steps on the demonstrations first")
    sft_batch: _Int = Field(default=32, ge=1, description="demonstrations in an SFT step")
    sft_learning_rate: _Float = Field(
        default=2e-4, gt=0, description="AdamW, the highest rate of SFT, decayed by a cosine"
    )

    @model_validator(mode="after")
    def _check(self) -> "AlgorithmConfig":
        _refuse_if(
            (
                self.delta is not None and self.delta <= 1 + self.clip_high,
                f"algorithm.delta={self.delta} is at or below 1 + algorithm.clip_high="
                f"{1 + self.clip_high}; set it above, or null",
            ),
            (
                self.frozen_discriminator and self.name != "airl",
                f"algorithm.frozen_discriminator=true with algorithm.name={self.name}, which has "
                "no discriminator; remove it, or set algorithm.name=airl",
            ),
        )
        return self


@_section
class SamplingConfig:
    """How the policy's traces are drawn."""

    prompts_per_step: _Int = Field(default=32, ge=1, description="prompts of a policy step")
    demonstration_prompts: _Int | None = Field(
        default=None,
        ge=1,
        description="those of them that have a demonstration, whose samples the discriminator "
        "sees; null: half, or all where task.unlabelled=0",
    )
    group_size: _Int = Field(default=8, ge=1, description="samples of each prompt")
    temperature: _Float = Field(default=1.0, gt=0, description="of sampling and of log pi")
    max_new_tokens: _Int = Field(default=32, ge=1, description="longer traces count as cut off")
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), description="texts that end a trace, besides the end-of-text token"
    )


@_section
class RunSection:
    """The run: where, how long, how often."""

    output_dir: str = Field(min_length=1, description="folder of the run")
    steps: _Int = Field(default=60, ge=1, description="policy steps (sft: optimiser steps)")
    seed: _Int = Field(default=0, ge=0, description="of sampling, batches and new weights")
    token_budget: _Int = Field(default=16384, ge=2, description="tokens of a micro-batch")
    checkpoint_every: _Int = Field(default=20, ge=1, description="steps between checkpoints")
    keep_checkpoints: _Int = Field(default=2, ge=1, description="newest checkpoints kept")
    resume: Literal["auto", "never", "must"] = Field(
        default="auto",
        description="auto: go on if there is a checkpoint; never: refuse a used folder; "
        "must: refuse to start anew",
    )
    eval_every: _Int = Field(default=10, ge=0, description="steps between evaluations; 0: none")
    eval_samples: _Int = Field(default=4, ge=1, description="samples of a validation problem")
    device: str | None = Field(
        default=None, min_length=1, description="null: the GPU where there is one, else the CPU"
    )
    threads: _Int | None = Field(default=None, ge=1, description="CPU threads; null: torch's own")


@_section
class RunConfig:
    """Everything that a run depends on."""

    task: TaskConfig
    policy: PolicyConfig
    discriminator: DiscriminatorConfig = Field(default_factory=DiscriminatorConfig)
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
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
        built_in = policy.model == "arithmetic-base"
        trains_on_groups = self.algorithm.name != "sft"
        bare_prompts = self.sampling.prompts_per_step - self.shown_prompts
        demonstrations = task.demonstrations
        if demonstrations is None and task.name == "arithmetic":
            demonstrations = 600
        _refuse_if(
            (
                built_in and task.name != "arithmetic",
                f"policy.model=arithmetic-base knows arithmetic's 16 characters only; set "
                f"policy.model to a language model for task.name={task.name}",
            ),
            (
                built_in and policy.gguf_file is not None,
                "policy.gguf_file with policy.model=arithmetic-base, which is safetensors; "
                "remove policy.gguf_file",
            ),
            (
                policy.dtype == "bfloat16" and policy.lora_rank == 0,
                "policy.dtype=bfloat16 with policy.lora_rank=0 trains bfloat16 weights, which "
                "round small updates away; set policy.lora_rank, or policy.dtype=float32",
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
                and _adapter(policy) != _adapter(disc),
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
