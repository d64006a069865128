"""The section on what a run is watched for; see ``schema.py`` and docs/guards.md."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from airl_fast.section import Float, Int, section


def _off(value: object) -> object:
    return "off" if value is False else value  # YAML reads a bare `off` as false


Action = Annotated[Literal["off", "warn", "stop"], BeforeValidator(_off)]


@section
class GuardsConfig:
    """What stops a run, what it warns of; may differ when a run goes on."""

    non_finite: Literal["stop", "skip"] = Field(
        default="stop",
        description="a loss, reward or gradient that is not finite: save the batch and stop, or "
        "skip the rest of the step, counted in the metrics",
    )
    max_skips: Int = Field(
        default=3, ge=1, description="non_finite=skip: steps in a row; one more stops the run"
    )
    patience: Int = Field(
        default=5, ge=1, description="steps in a row that put a run into one of the states below"
    )
    discriminator_saturated: Action = Field(
        default="warn", description="the discriminator is right and sure: it teaches nothing more"
    )
    saturated_accuracy: Float = Field(
        default=0.99, gt=0.5, le=1, description="from this disc/accuracy on, and"
    )
    saturated_logit: Float = Field(
        default=6.0, gt=0, description="from this mean |logit| of a span on (disc/logit)"
    )
    policy_collapse_entropy: Action = Field(
        default="warn", description="the policy hardly varies its tokens any more"
    )
    entropy_fraction: Float = Field(
        default=0.1, gt=0, lt=1, description="below this share of the first policy step's entropy"
    )
    policy_collapse_length: Action = Field(
        default="warn", description="completions are far too short, or run on until cut off"
    )
    length_fraction: Float = Field(
        default=0.25,
        gt=0,
        lt=1,
        description="below this share of the demonstrations' mean length",
    )
    truncated_share: Float = Field(
        default=0.9, gt=0, le=1, description="or from this share of cut-off completions on"
    )
    policy_collapse_repetition: Action = Field(
        default="warn", description="completions repeat themselves"
    )
    distinct_share: Float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="below this share of different 4-grams in a completion (rollout/distinct)",
    )
    sampler_mismatch: Action = Field(
        default="warn", description="the sampler's log-probs are not the trainer's"
    )
    mismatch_tolerance: Float | None = Field(
        default=None,
        gt=0,
        description="largest difference of a token; null: 0.01, or 0.1 with "
        "run.matmul_precision=high, 0.5 with medium or a bfloat16 policy",
    )
    audit_every: Int = Field(
        default=0,
        ge=0,
        description="steps between audits, which hold the operators against plain torch in "
        "float32 and stop the run on drift; 0: none",
    )
    audit_rows: Int = Field(default=64, ge=1, description="rows (actions) of an audit")
