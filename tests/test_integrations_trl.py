"""TRL trains a tiny model; its rewards and advantages are held to plain transformers and loops."""

import inspect
import re
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from airl_fast import RewardScorer
from airl_fast.loading import resolve
from tests.tiny_reward import BOUNDARY, Truth, save_reward

pytest.importorskip("trl", reason="the trl extra is not installed")

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from airl_fast.integrations import trl as integration
from airl_fast.integrations.trl import DenseGRPOTrainer, reward_function

TEXTS = ["1+1=", "a dog and"]
PROMPTS = {
    "standard": TEXTS,
    "conversational": [[{"role": "user", "content": text}] for text in TEXTS],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_reward(tmp_path_factory.mktemp("trl"))


@pytest.fixture(scope="module")
def scorer(folder):
    return RewardScorer.from_pretrained(folder / "reward")


def settings(folder, **options):
    return GRPOConfig(
        output_dir=str(folder / "out"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        max_steps=2,
        logging_steps=1,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=12,
        learning_rate=1e-3,
        seed=5,
        **options,
    )


def watched(kind, folder, form, **options):
    """Train for two steps with a trainer that keeps what its loss is given."""
    seen = []

    class Watched(kind):
        def _compute_loss(self, model, inputs):
            seen.append({k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)})
            loss = super()._compute_loss(model, inputs)
            seen[-1]["loss"] = loss.detach()
            return loss

    trainer = Watched(
        model=AutoModelForCausalLM.from_pretrained(folder / "policy"),
        processing_class=tokenizer_of(folder),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS[form], "answer": ["2", "b"]}),
        **options,
    )
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    after = list(trainer.model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert len(seen) == 2
    return seen, trainer


def tokenizer_of(folder):
    return AutoTokenizer.from_pretrained(folder / "policy")


def step_lengths(completion, tokenizer):
    """A token is a character; only special tokens may follow the last step."""
    pieces = [tokenizer.decode([token]) for token in completion]
    ends = [i + 1 for i, piece in enumerate(pieces) if re.fullmatch(BOUNDARY, piece)]
    if ends and set(completion[ends[-1] :]) <= set(tokenizer.all_special_ids):
        ends.pop()
    return [b - a for a, b in zip([0, *ends], [*ends, len(completion)], strict=True)]


def rows(inputs):
    """Prompt ids, completion ids and advantages of every completion of a batch."""
    for i in range(len(inputs["prompt_ids"])):
        yield (
            inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()].tolist(),
            inputs["completion_ids"][i][inputs["completion_mask"][i].bool()].tolist(),
            inputs["advantages"][i],
        )


def test_the_prompts_that_trl_samples_from_are_those_that_are_scored(scorer, folder):
    tokenizer = tokenizer_of(folder)
    standard = scorer.encode(PROMPTS["standard"][0], "b").prompt
    assert list(standard) == tokenizer(TEXTS[0]).input_ids
    chat = scorer.encode(PROMPTS["conversational"][0], "b").prompt
    assert tokenizer.decode(chat) == "user: 1+1=\nassistant: "


@pytest.mark.parametrize("form", ["standard", "conversational"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_grpo_sees_the_reward_of_what_it_sampled(folder, scorer, form, asynchronous):
    truth = Truth(folder)
    function = reward_function(scorer, asynchronous=asynchronous)
    assert inspect.iscoroutinefunction(function) == asynchronous
    seen, trainer = watched(GRPOTrainer, folder, form, reward_funcs=function, args=settings(folder))
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    for inputs, logged in zip(seen, history, strict=True):
        batch = list(rows(inputs))
        rewards = [sum(truth.tokens(p, c)) for p, c, _ in batch]
        assert logged["rewards/airl_fast/mean"] == pytest.approx(
            sum(rewards) / len(rewards), abs=1e-4
        )
        assert logged["airl_fast/f"] == pytest.approx(logged["rewards/airl_fast/mean"], abs=1e-4)
        cut = [c[-1] != trainer.processing_class.eos_token_id for _, c, _ in batch]
        assert logged["airl_fast/cut"] == pytest.approx(sum(cut) / len(cut))
        for prompt, completion, advantage in batch:
            group = [r for r, (p, _, _) in zip(rewards, batch, strict=True) if p == prompt]
            assert len(group) == 4
            mean = sum(group) / 4
            deviation = (sum((r - mean) ** 2 for r in group) / 3) ** 0.5
            expected = (sum(truth.tokens(prompt, completion)) - mean) / (deviation + 1e-4)
            assert advantage.item() == pytest.approx(expected, abs=1e-3)


def ends_with_a_letter(completions, **_):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(text[-1:].isalpha()) for text in texts]


@pytest.mark.parametrize(
    ("form", "granularity", "scale"),
    [("standard", "step", "group"), ("conversational", "interval", "none")],
)
def test_dense_advantages_are_those_of_the_spans(folder, tmp_path, form, granularity, scale):
    truth, gamma, weight = Truth(folder), 0.9, 0.5
    seen, trainer = watched(
        DenseGRPOTrainer,
        folder,
        form,
        scorer=RewardScorer.from_pretrained(save_reward(tmp_path, granularity) / "reward"),
        reward_funcs=[ends_with_a_letter],
        gamma=gamma,
        args=settings(folder, scale_rewards=scale, reward_weights=[weight], loss_type="grpo"),
    )
    for inputs in seen:
        batch = []
        for prompt, completion, advantages in rows(inputs):
            f = truth.tokens(prompt, completion)
            if granularity == "step":
                lengths = step_lengths(completion, trainer.processing_class)
            else:
                lengths = [len(completion[i : i + 3]) for i in range(0, len(completion), 3)]
            returns, end, rest = [], len(f), 0.0
            text = trainer.processing_class.decode(completion, skip_special_tokens=True)
            extra = weight * ends_with_a_letter([text])[0]
            for length in reversed(lengths):
                rest = sum(f[end - length : end]) + extra + gamma * rest
                returns.insert(0, rest)
                end, extra = end - length, 0.0
            batch.append((prompt, lengths, returns, advantages))
        assert max(len(lengths) for _, lengths, _, _ in batch) > 1
        for prompt, lengths, returns, advantages in batch:
            group = [r[0] for p, _, r, _ in batch if p == prompt]
            mean = sum(group) / 4
            deviation = (sum((r - mean) ** 2 for r in group) / 4) ** 0.5
            divisor = deviation + 1e-6 if scale == "group" else 1.0
            expected = [
                (r - mean) / divisor
                for r, n in zip(returns, lengths, strict=True)
                for _ in range(n)
            ]
            padding = len(advantages) - len(expected)
            torch.testing.assert_close(
                advantages.tolist(), [*expected, *[0.0] * padding], atol=2e-3, rtol=1e-3
            )
        # On the first pass the ratio is 1: the loss is minus the mean advantage of each sequence.
        mask = inputs["completion_mask"]
        loss = -((inputs["advantages"] * mask).sum(1) / mask.sum(1)).mean()
        torch.testing.assert_close(inputs["loss"], loss, atol=1e-4, rtol=1e-4)


def test_text_of_another_tokenizer_is_encoded_anew_only_when_asked(scorer, folder):
    other = tokenizer_of(folder)
    shifted = [(token + 7) % 20 + 10 for token in other("abc").input_ids]
    with pytest.raises(
        ValueError, match=r"completion 0: the scorer's tokenizer spells .* score='text'"
    ):
        reward_function(scorer)([TEXTS[0]], ["abc"], [shifted])
    function = reward_function(scorer, score="text", tokenizer=other)
    done, cut = function([TEXTS[0]] * 2, ["abc"] * 2, [[*shifted, other.eos_token_id], shifted])
    expected = [scorer.score([TEXTS[0]], ["abc"], end_of_text=end)[0].f for end in (True, False)]
    assert [done, cut] == pytest.approx(expected)
    assert done != pytest.approx(cut)


def test_the_spans_rewards_become_one_as_asked(scorer):
    ids = scorer.encode(TEXTS[0], "ab1cd2ef").completion
    values = [step.f for step in scorer.score([TEXTS[0]], [list(ids)])[0].steps]
    assert len(values) == 3
    logged, columns = {}, {}
    for reduce, expected in (
        ("sum", sum(values)),
        ("mean", sum(values) / 3),
        ("min", min(values)),
        ("last", values[-1]),
    ):
        function = reward_function(scorer, reduce=reduce)
        (found,) = function(
            prompts=[TEXTS[0]],
            completions=["ab1cd2ef"],
            completion_ids=[list(ids)],
            answer=["2"],
            trainer_state=None,
            log_metric=logged.__setitem__,
            log_extra=columns.__setitem__,
        )
        assert found == pytest.approx(expected)
    assert logged["airl_fast/spans"] == 3
    assert logged["airl_fast/cut"] == 0
    assert columns["airl_fast_lowest"] == [["ab1", "cd2", "ef"][values.index(min(values))]]


def test_wrong_uses_are_named(folder, scorer):
    with pytest.raises(ValueError, match="needs a policy"):
        reward_function(scorer, value="reward")
    with pytest.raises(ValueError, match="one of sum, mean, min, last, received 'max'"):
        reward_function(scorer, reduce="max")
    with pytest.raises(ValueError, match="pass tokenizer="):
        reward_function(scorer, score="text")
    with pytest.raises(ValueError, match="received none"):
        reward_function(scorer)([TEXTS[0]], ["a"])
    with pytest.raises(ValueError, match=r"completion 0: .* do not fit the model's context"):
        reward_function(scorer)([TEXTS[0]], ["1" * 300], [scorer.tokenizer("1" * 300).input_ids])
    model = str(folder / "policy")
    with pytest.raises(ValueError, match="scale_rewards='group' or 'none'"):
        DenseGRPOTrainer(model, scorer=scorer, args=settings(folder, scale_rewards="batch"))
    with pytest.raises(ValueError, match="received tools"):
        DenseGRPOTrainer(model, scorer=scorer, args=settings(folder), tools=[print])
    with pytest.raises(ValueError, match="another tokenizer"):
        DenseGRPOTrainer(
            resolve("arithmetic-base"),
            scorer=scorer,
            args=settings(folder),
            train_dataset=Dataset.from_dict({"prompt": TEXTS}),
        )


def test_an_old_or_absent_trl_is_named(monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(integration, "version", lambda name: "1.9.2")
    with pytest.raises(ImportError, match=r"expects TRL 1.16 or newer, received 1.9.2: pip"):
        integration._check_version()
    monkeypatch.setattr(integration, "version", absent)
    with pytest.raises(ImportError, match=r"pip install 'airl-fast\[trl\]'"):
        integration._check_version()
