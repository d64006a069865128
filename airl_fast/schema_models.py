"""The sections on what is trained: models, algorithm and sampling; see ``schema.py``."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from airl_fast.section import Betas, Float, Int, refuse_if, section


@section
class PolicyConfig:
    """The model that writes traces, and its optimiser."""

    model: str = Field(
        min_length=1,
        description="hub name or folder; arithmetic-base, countdown-base and countdown-base-small "
        "ship with the package",
    )
    gguf_file: str | None = Field(default=None, description="GGUF file inside policy.model")
    dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None,
        description="weights and activations; logits, updates and the sums of gradients over "
        "micro-batches are always float32; null: float32, or that of a policy that was saved",
    )
    lora_rank: Int = Field(default=0, ge=0, description="rank of the adapters; 0: full weights")
    lora_alpha: Int = Field(default=16, ge=1, description="scale of the adapters")
    learning_rate: Float = Field(default=2e-4, gt=0, description="AdamW, the highest rate")
    weight_decay: Float = Field(default=0.01, ge=0, description="AdamW")
    warmup_steps: Int = Field(default=5, ge=0, description="steps of linear warm-up")
    final_lr_fraction: Float = Field(
        default=0.1, ge=0, le=1, description="the cosine ends at this share of the rate"
    )
    betas: Betas = Field(default=(0.9, 0.98), description="AdamW")
    clip_norm: Float = Field(default=1.0, gt=0, description="largest norm of the gradient")


@section
class DiscriminatorConfig:
    """The learned reward f: its model, its optimiser and what it is trained on."""

    head: Literal["lm", "score"] = Field(
        default="lm", description="lm: f = kappa log q(a|s) + offset; score: one learned row"
    )
    model: str | None = Field(
        default=None, min_length=1, description="hub name or folder; null: the policy's"
    )
    gguf_file: str | None = Field(default=None, description="GGUF file inside discriminator.model")
    saved: str | None = Field(
        default=None,
        min_length=1,
        description="folder of a run with a reward, or its reward/: f starts from it (or stays it, "
        "with algorithm.frozen_discriminator) instead of as a copy of the policy",
    )
    trunk: Literal["own", "shared", "policy"] = Field(
        default="own",
        description="own: a model of its own; shared: two LoRA adapters over one frozen backbone; "
        "policy: reads the policy's hidden states",
    )
    shaping: bool = Field(
        default=False, description="score head: f = g + shaping_gamma h(s') - h(s)"
    )
    shaping_gamma: Float = Field(default=1.0, ge=0, le=1, description="discount of the shaping")
    lora_rank: Int = Field(default=0, ge=0, description="rank of the adapters; 0: full weights")
    lora_alpha: Int = Field(default=16, ge=1, description="scale of the adapters")
    learning_rate: Float = Field(default=2e-4, gt=0, description="AdamW, the highest rate")
    head_learning_rate: Float | None = Field(
        default=None,
        gt=0,
        description="AdamW, for the head; null: 1e-2 for kappa and offset, 1e-3 for score rows",
    )
    final_lr_fraction: Float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="over the run's updates, a cosine takes both rates to this share; 1: constant",
    )
    weight_decay: Float = Field(default=0.05, ge=0, description="AdamW")
    betas: Betas = Field(default=(0.9, 0.98), description="AdamW")
    clip_norm: Float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    kappa: Float = Field(default=1.0, description="lm head: where kappa starts")
    offset: Float = Field(default=0.0, description="lm head: where the offset starts")
    label_smoothing: Float = Field(default=0.2, ge=0, lt=1, description="0.2: targets 0.9 and 0.1")
    logit: Literal["f-logp", "f", "wgan"] = Field(
        default="f-logp",
        description="what tells experts from policy: f - log pi, f alone, or a critic (whose f "
        "nothing bounds but its learning rate)",
    )
    pair_weight: Float = Field(
        default=0.0,
        ge=0,
        description="weight of a ranking loss: a demonstration's logit, summed over its spans, "
        "above that of every other trace of its prompt",
    )
    logit_penalty: Float = Field(
        default=0.0,
        ge=0,
        description="weight of the mean squared logit of a span, each class half",
    )
    ema_decay: Float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="rewards are of the weights' exponential moving average, which keeps this "
        "share of itself at every update; 0: of the weights",
    )
    updates_per_step: Int = Field(default=1, ge=1, description="updates per policy step")
    warmup_updates: Int = Field(
        default=30, ge=0, description="steps (of updates_per_step updates) before the policy moves"
    )
    warmup_samples: bool = Field(
        default=True,
        description="before the policy moves its samples are negatives too; false: corrupted "
        "demonstrations alone, and nothing is sampled",
    )
    accuracy_throttle: Float = Field(
        default=1.0, gt=0, le=1, description="skip updates while the running accuracy is above it"
    )
    logp_floor: Float | None = Field(
        default=None,
        lt=0,
        description="lowest log pi of a span in the logit, counted in the metrics; null: none",
    )
    replay: Int = Field(default=0, ge=0, description="past policy traces kept as negatives")
    replay_fraction: Float = Field(
        default=0.0, ge=0, le=1, description="share of the policy traces drawn from the replay"
    )
    perturbed_per_update: Int = Field(
        default=64, ge=0, description="corrupted demonstrations in an update, as negatives"
    )
    perturbations: tuple[Literal["corrupt", "digit", "swap", "drop"], ...] = Field(
        default=("corrupt", "digit", "swap", "drop"),
        min_length=1,
        description="how: plant a wrong step, change a digit, swap two steps, drop one",
    )
    perturbed_spans: Literal["all", "changed"] = Field(
        default="all",
        description="negatives in a corrupted demonstration: all of its spans, or the first that "
        "was changed (those before it are the demonstration's own)",
    )
    span_logp: Literal["sum", "mean"] = Field(
        default="sum", description="log pi (and the lm head's f) of a span from its tokens'"
    )

    @property
    def head_rate(self) -> float:
        """``head_learning_rate``, or what goes with the head."""
        default = {"lm": 1e-2, "score": 1e-3}[self.head]
        return default if self.head_learning_rate is None else self.head_learning_rate

    @model_validator(mode="after")
    def _check(self) -> "DiscriminatorConfig":
        mine = "discriminator."
        refuse_if(
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
                self.saved is not None and (self.model is not None or self.trunk != "own"),
                f"{mine}saved={self.saved!r} is a model with its head; remove {mine}model and set "
                f"{mine}trunk=own",
            ),
            (
                self.saved is not None
                and (self.kappa, self.offset, self.lora_rank) != (1.0, 0.0, 0),
                f"{mine}saved={self.saved!r} has its own kappa, offset and adapter; remove "
                f"{mine}kappa, {mine}offset and {mine}lora_rank",
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
                not self.warmup_samples and self.perturbed_per_update == 0,
                f"{mine}warmup_samples=false with {mine}perturbed_per_update=0 leaves no "
                f"negatives; set {mine}perturbed_per_update to 1 or more",
            ),
            (
                self.perturbed_spans == "changed" and self.perturbed_per_update == 0,
                f"{mine}perturbed_spans=changed with {mine}perturbed_per_update=0: nothing is "
                f"perturbed; remove it, or set {mine}perturbed_per_update to 1 or more",
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


def adapter(model: PolicyConfig | DiscriminatorConfig) -> tuple[int, int] | None:
    """Rank and alpha of a model's adapter, or None without one."""
    return (model.lora_rank, model.lora_alpha) if model.lora_rank else None


@section
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
    interval: Int = Field(default=8, ge=1, description="tokens of an interval")
    reward_clip: Float | None = Field(
        default=None,
        gt=0,
        description="largest |reward| of a span, counted in the metrics; null: none",
    )
    gamma: Float = Field(default=1.0, ge=0, le=1, description="discount of the reward to go")
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
    advantage_clip: Float | None = Field(
        default=None, gt=0, description="largest |advantage|, counted in the metrics; null: none"
    )
    expert_in_group: bool = Field(
        default=False, description="the demonstration joins the policy's group of its prompt"
    )
    policy_updates: Int = Field(default=1, ge=1, description="policy updates per rollout")
    clip_low: Float = Field(default=0.2, ge=0, lt=1, description="ratio clipped at 1 - clip_low")
    clip_high: Float = Field(default=0.2, ge=0, description="ratio clipped at 1 + clip_high")
    delta: Float | None = Field(
        default=None, gt=1, description="largest ratio where the advantage is negative; null: none"
    )
    kl_beta: Float = Field(default=0.0, ge=0, description="weight of the KL to the start")
    entropy_coef: Float = Field(default=0.0, ge=0, description="weight of the entropy bonus")
    sft_warmup: Int = Field(default=0, ge=0, description="SFT steps on the demonstrations first")
    sft_batch: Int = Field(default=32, ge=1, description="demonstrations in an SFT step")
    sft_learning_rate: Float = Field(
        default=2e-4, gt=0, description="AdamW, the highest rate of SFT, decayed by a cosine"
    )

    @model_validator(mode="after")
    def _check(self) -> "AlgorithmConfig":
        refuse_if(
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


@section
class SamplingConfig:
    """How the policy's traces are drawn."""

    prompts_per_step: Int = Field(default=32, ge=1, description="prompts of a policy step")
    demonstration_prompts: Int | None = Field(
        default=None,
        ge=1,
        description="those of them that have a demonstration, whose samples the discriminator "
        "sees; null: half, or all where task.unlabelled=0",
    )
    group_size: Int = Field(default=8, ge=1, description="samples of each prompt")
    temperature: Float = Field(default=1.0, gt=0, description="of sampling and of log pi")
    max_new_tokens: Int = Field(default=32, ge=1, description="longer traces count as cut off")
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), description="texts that end a trace, besides the end-of-text token"
    )
