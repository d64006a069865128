import dataclasses
import math
import subprocess
import sys

import pytest
import yaml
from pydantic import ValidationError

from airl_fast.config import (
    AlgorithmConfig,
    ConfigError,
    DiscriminatorConfig,
    GuardsConfig,
    PolicyConfig,
    RunConfig,
    RunSection,
    SamplingConfig,
    TaskConfig,
    describe_config,
    load_config,
    recipes,
    save_config,
)

TASK = TaskConfig(name="arithmetic")
POLICY = PolicyConfig(model="arithmetic-base")
RUN = RunSection(output_dir="out")


def test_built_in_python_with_defaults():
    config = RunConfig(task=TASK, policy=POLICY, run=RUN)
    assert config.algorithm.name == "airl"
    assert config.discriminator == DiscriminatorConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.run.steps = 3
    for positional in (lambda: TaskConfig("arithmetic"), lambda: RunConfig(TASK, POLICY)):
        with pytest.raises(ValidationError, match="takes keywords only"):
            positional()


@pytest.mark.parametrize(
    "build",
    [
        lambda: RunSection(output_dir="o", stpes=3),
        lambda: RunSection(output_dir="o", steps="many"),
        lambda: RunSection(output_dir=3),
        lambda: AlgorithmConfig(granularity="steps"),
        lambda: AlgorithmConfig(gamma=math.nan),
        lambda: SamplingConfig(stop=("",)),
        lambda: PolicyConfig(),
    ],
)
def test_wrong_fields_are_refused_in_python_too(build):
    with pytest.raises(ValueError, match="validation error"):
        build()


@pytest.mark.parametrize("name", recipes())
def test_recipes_load_and_round_trip(name, tmp_path):
    config = load_config(name)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    for granularity in ("dense", "interval", "step", "sparse"):
        load_config(name, [f"algorithm.granularity={granularity}"])
    for algorithm in ("sft", "grpo"):
        load_config(name, [f"algorithm.name={algorithm}"])


def test_recipes_are_the_known_ones():
    assert recipes() == ["arithmetic", "gsm8k-smollm2", "medreason-smollm2", "mmlu-pro-smollm2"]


def test_every_value_round_trips(tmp_path):
    config = load_config(
        "arithmetic",
        [
            "algorithm.name=grpo",
            "policy.betas=[0.8, 0.95]",
            "sampling.stop=[';', '\\n', 'ende: ü']",
            "discriminator.logp_floor=null",
            "policy.learning_rate=1e-7",
            "task.path=null",
            "run.output_dir='2024'",
        ],
    )
    assert config.sampling.stop == (";", "\\n", "ende: ü")
    assert config.policy.betas == (0.8, 0.95)
    save_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config


def test_yaml_numbers_that_pyyaml_reads_as_text():
    assert isinstance(yaml.safe_load("2e-4"), str)  # why the coercion is relied on
    config = load_config("arithmetic", ["policy.learning_rate=3e-4", "algorithm.gamma=1"])
    assert config.policy.learning_rate == 3e-4
    assert isinstance(config.algorithm.gamma, float)


def test_overrides_apply_in_order_and_to_absent_sections(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("task: {name: arithmetic}\npolicy:\n  model: arithmetic-base\nsampling:\n")
    config = load_config(file, ["run.output_dir=a=b", "run.seed=1", "run.seed=2"])
    assert (config.run.output_dir, config.run.seed) == ("a=b", 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.step=3", r"run\.step: no such key; did you mean run\.steps\?"),
        ("steps=3", r"did you mean run\.steps\?"),
        ("algorithm.max_new_tokens=3", r"did you mean sampling\.max_new_tokens\?"),
        ("algorithm.learning_rate=1", r"algorithm\.learning_rate: no such key; did you mean"),
        ("foo.bar=1", r"foo\.bar: no such key"),
        ("run=3", r"sets a whole section; write run\.KEY=VALUE"),
        ("run.steps", "has no value"),
        ("run.steps=", "has no value"),
        ("run.steps=[", r"run\.steps: '\[' is not readable as YAML"),
        ("run.steps=yes", r"run\.steps: expected a number, received True"),
        ("run.steps=1.5", r"run\.steps: .*fractional.*received 1\.5"),
        ("run.steps=0", r"run\.steps: .*greater than or equal to 1; received 0"),
        ("run.steps=null", r"run\.steps: .*received None"),
        ("run.output_dir=2024", r"run\.output_dir: .*quote it: run\.output_dir='\"2024\"'"),
        ("policy.learning_rate=fast", r"policy\.learning_rate: .*received 'fast'"),
        ("algorithm.kl_beta=.inf", r"algorithm\.kl_beta: .*finite"),
        ("algorithm.granularity=word", r"'dense', 'interval', 'step' or 'sparse'"),
        ("sampling.stop=x", r"write a list: sampling\.stop="),
        ("policy.betas=[0.9]", r"policy\.betas"),
        ("discriminator.label_smoothing=1", r"discriminator\.label_smoothing: .*less than 1"),
    ],
)
def test_a_wrong_override_names_the_key_and_the_remedy(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config("arithmetic", [override])


# Each case: overrides of the arithmetic recipe, and what the message has to name.
CONTRADICTIONS = [
    (["sampling.stop=['x']"], r"sampling\.stop=\['x'\] with algorithm\.name=airl"),
    (["discriminator.trunk=shared"], r"discriminator\.lora_rank"),
    (["discriminator.trunk=shared", "discriminator.lora_rank=4"], r"policy\.lora_rank"),
    (["discriminator.trunk=policy"], r"set discriminator\.head=score"),
    (
        ["discriminator.trunk=policy", "discriminator.head=score", "discriminator.lora_rank=4"],
        r"set discriminator\.lora_rank=0",
    ),
    (
        ["discriminator.trunk=policy", "discriminator.head=score", "discriminator.model=m"],
        r"discriminator\.trunk=own",
    ),
    (["discriminator.shaping=true"], r"needs discriminator\.head=score"),
    (["discriminator.head=score", "discriminator.kappa=0.5"], r"discriminator\.kappa"),
    (["discriminator.gguf_file=x.gguf"], r"needs discriminator\.model"),
    (["discriminator.replay_fraction=0.5"], r"set discriminator\.replay "),
    (["discriminator.replay=10"], r"discriminator\.replay_fraction above 0"),
    (
        ["discriminator.warmup_samples=false", "discriminator.perturbed_per_update=0"],
        r"leaves no negatives; set discriminator\.perturbed_per_update to 1 or more",
    ),
    (
        ["discriminator.perturbed_spans=changed", "discriminator.perturbed_per_update=0"],
        "nothing is perturbed; remove it",
    ),
    (["discriminator.logit=wgan"], r"set discriminator\.label_smoothing=0"),
    (
        [
            "discriminator.logit=wgan",
            "discriminator.label_smoothing=0",
            "discriminator.accuracy_throttle=0.9",
        ],
        r"set discriminator\.accuracy_throttle=1",
    ),
    (
        [
            "discriminator.logit=wgan",
            "discriminator.label_smoothing=0",
            "algorithm.reward=f-logp",
        ],
        r"set algorithm\.reward=f",
    ),
    (["discriminator.logit=f"], r"subtracted twice; set algorithm\.reward=f"),
    (["algorithm.delta=1.1"], r"algorithm\.clip_high"),
    (["discriminator.shaping_gamma=0.9"], r"set discriminator\.shaping=true"),
    (
        ["algorithm.name=grpo", "algorithm.frozen_discriminator=true"],
        r"set algorithm\.name=airl",
    ),
    (["sampling.group_size=1"], r"set sampling\.group_size to 2 or more"),
    (["run.token_budget=40"], r"raise run\.token_budget"),
    (
        ["run.matmul_precision=high", "guards.audit_every=5"],
        r"set run\.matmul_precision=highest, or guards\.audit_every=0",
    ),
    (["task.demonstrations=8"], r"sampling\.demonstration_prompts .*to 8 or less"),
    (["sampling.demonstration_prompts=33"], r"more than sampling\.prompts_per_step=32"),
    (["task.unlabelled=0", "sampling.demonstration_prompts=8"], r"set task\.unlabelled, or null"),
    (
        [
            "task.demonstrations=8",
            "task.unlabelled=4",
            "sampling.demonstration_prompts=8",
        ],
        r"a step has 24 prompts without a demonstration, and task\.unlabelled=4",
    ),
    (["task.path=x"], r"remove task\.path"),
    (["task.chat=false"], r"task\.chat=false is for gsm8k"),
    (["task.calculator_marks=true"], r"task\.calculator_marks is for gsm8k"),
    (["policy.gguf_file=x.gguf"], r"remove policy\.gguf_file"),
    (["task.name=gsm8k", "task.expert_error=0.3"], r"policy\.model=arithmetic-base"),
    (["task.name=jsonl"], r"needs task\.path"),
    (["discriminator.saved=x", "discriminator.model=y"], r"remove discriminator\.model"),
    (["discriminator.saved=x", "discriminator.kappa=2"], r"remove discriminator\.kappa"),
    (["discriminator.saved=x", "discriminator.lora_rank=2"], r"discriminator\.lora_rank"),
    (["task.name=countdown"], r"policy\.model=arithmetic-base"),
    (["task.name=gsm8k", "task.expert_error=0.1"], r"task\.expert_error=0\.1"),
]


@pytest.mark.parametrize(("overrides", "message"), CONTRADICTIONS)
def test_contradictions_are_refused_before_any_model_is_loaded(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config("arithmetic", overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["discriminator.trunk=shared", "discriminator.lora_rank=4", "policy.lora_rank=4"],
        ["discriminator.trunk=policy", "discriminator.head=score", "discriminator.shaping=true"],
        ["discriminator.replay=10", "discriminator.replay_fraction=0.5"],
        [
            "discriminator.logit=wgan",
            "discriminator.label_smoothing=0",
            "algorithm.reward=f",
        ],
        ["discriminator.logit=f", "algorithm.reward=f"],
        ["discriminator.logit=f", "algorithm.frozen_discriminator=true"],
        ["algorithm.name=sft", "sampling.group_size=1", "algorithm.reward=f-logp"],
        ["algorithm.expert_in_group=true", "algorithm.frozen_discriminator=true"],
        ["sampling.demonstration_prompts=8", "task.demonstrations=8"],
        ["algorithm.baseline=leave_one_out", "algorithm.delta=2"],
    ],
)
def test_what_is_no_contradiction_loads(overrides):
    load_config("arithmetic", overrides)


def test_all_wrong_fields_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        load_config("arithmetic", ["run.steps=0", "policy.dtype=float8"])
    assert "run.steps" in str(error.value)
    assert "policy.dtype" in str(error.value)
    with pytest.raises(ConfigError) as error:
        load_config("arithmetic", ["run.stps=0", "polcy.dtype=float8"])
    assert "run.stps" in str(error.value)
    assert "did you mean policy.dtype" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected sections"),
        ("- a", "expected sections"),
        ("task: [", "not readable as YAML"),
        ("run: {steps: 1, steps: 2}", "the key 'steps' is given twice"),
        ("run: 3", "run: expected `key: value` lines, received 3"),
        ("run: {1: 2}", r"run\.1: no such key"),
        ("{[a]: 1}", "not readable as YAML"),
        ("task: {name: arithmetic}", r"policy\.model: required .*\n?.*run\.output_dir: required"),
    ],
)
def test_wrong_files_are_named(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_missing_files_and_recipes():
    with pytest.raises(ConfigError, match="did you mean arithmetic"):
        load_config("arithmetc")
    with pytest.raises(ConfigError, match="no such file; give a YAML file or a recipe"):
        load_config("none/at/all.yaml")


def test_unreadable_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(file)


def test_yaml_never_builds_objects(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("task: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ConfigError, match="not readable as YAML"):
        load_config(file)


def test_description_lists_every_field():
    text = describe_config()
    for section in dataclasses.fields(RunConfig):
        cls = {
            "task": TaskConfig,
            "policy": PolicyConfig,
            "discriminator": DiscriminatorConfig,
            "algorithm": AlgorithmConfig,
            "sampling": SamplingConfig,
            "guards": GuardsConfig,
            "run": RunSection,
        }[section.name]
        for field in dataclasses.fields(cls):
            assert f"\n  {section.name}.{field.name} (" in text
    assert "run.output_dir (text; required)" in text
    assert "algorithm.granularity (one of dense, interval, step, sparse; default step)" in text
    assert "sampling.stop (list of texts; default [])" in text
    assert "discriminator.logp_floor (number or null; default null)" in text
    assert "None" not in text


def test_reading_a_configuration_imports_no_heavy_library():
    code = (
        "import sys\n"
        "from airl_fast.config import load_config\n"
        "import airl_fast.tasks\n"
        "load_config('arithmetic')\n"
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
