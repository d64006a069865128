"""RewardScorer against plain transformers, one sequence at a time, no packing and no operator."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.normalizers import Replace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from airl_fast import Discriminator, Policy, RewardScorer
from airl_fast.encoding import PairEncoder
from airl_fast.language_model import LanguageModel, Origin
from tests.tiny_models import tiny_model, tiny_tokenizer
from tests.tiny_run import tiny_run  # noqa: F401

PROMPTS = ["68+4+2+9-6=", "5+5+5+5+5=", "68+4+2+9-6=", "99-9-9-9-9="]
COMPLETIONS = [
    "68+4=72;72+2=74;74+9=83;83-6=77;#77.",
    "5+5=10;10+5=15;15+5=20;20+5=25;#25.",
    "68+4=72;72+2=75;75+9=84;84-6=78;#78.",
    "99-9=90;",
]
TRAINING = {
    "granularity": "step",
    "interval": 3,
    "boundary": ";",
    "logit": "f-logp",
    "reward": "f",
    "temperature": 0.7,
    "task": "arithmetic",
}


def ids_of(scorer, text):
    return scorer.tokenizer(text, add_special_tokens=False).input_ids


def plain(folder, prompt, completion):
    """Logits and last hidden states at every position, from transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        out = model(torch.tensor([[*prompt, *completion]]), output_hidden_states=True)
    return out.logits[0].double(), out.hidden_states[-1][0].double()


def plain_logp(folder, prompt, completion, temperature=1.0):
    logits, _ = plain(folder, prompt, completion)
    logits = logits[len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1)[range(len(completion)), list(completion)]


def step_cuts(text, tokens):
    """First and last token of every step, for one token a character and an end-of-text token."""
    ends = [i + 1 for i, character in enumerate(text) if character == ";"]
    if ends and ends[-1] == len(text):
        ends.pop()
    return list(zip([0, *ends], [*ends, tokens], strict=True))


def close(found, expected):
    found, expected = torch.tensor(found), torch.as_tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def scorer(tiny_run):  # noqa: F811
    return RewardScorer.from_pretrained(tiny_run)


@pytest.fixture(scope="module")
def policy(tiny_run):  # noqa: F811
    return Policy.from_pretrained(tiny_run / "policy")


def made(policy, folder, *, training=(), **options):
    """A reward folder with a head of random weights."""
    discriminator = Discriminator.create(policy, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in discriminator.head_parameters().values():
            parameter.normal_()
    discriminator.save(folder, training={**TRAINING, **dict(training)})
    return folder


def test_lm_head_equals_plain_transformers(scorer, tiny_run):  # noqa: F811
    head = load_file(tiny_run / "reward" / "discriminator_head.safetensors")
    kappa, offset = head["head.kappa"].item(), head["head.offset"].item()
    assert scorer.trained.granularity == "step"
    assert scorer.trained.temperature == 0.8
    for prompt, completion, scored in zip(
        PROMPTS, COMPLETIONS, scorer.score(PROMPTS, COMPLETIONS), strict=True
    ):
        p, c = ids_of(scorer, prompt), [*ids_of(scorer, completion), 1]
        f = kappa * plain_logp(tiny_run / "reward", p, c) + offset
        logp = plain_logp(tiny_run / "policy", p, c, temperature=0.8)
        assert scored.text == completion
        assert scored.tokens.ids == tuple(c)
        close(scored.tokens.f, f)
        close(scored.tokens.logp, logp)
        close(scored.tokens.reward, f - logp)
        cuts = step_cuts(completion, len(c))
        close([s.f for s in scored.steps], [f[a:b].sum() for a, b in cuts])
        close([s.reward for s in scored.steps], [(f - logp)[a:b].sum() for a, b in cuts])
        close([scored.f, scored.reward], [f.sum(), (f - logp).sum()])
        assert scored.granularity == "step"
        assert [(s.first, s.last + 1) for s in scored.spans] == cuts
        assert [s.f for s in scored.spans] == [s.f for s in scored.steps]


def test_steps_and_tokens_lie_where_they_say(scorer):
    (scored,) = scorer.score(PROMPTS[:1], COMPLETIONS[:1])
    steps = [step.text for step in scored.steps]
    assert steps == ["68+4=72;", "72+2=74;", "74+9=83;", "83-6=77;", "#77."]
    assert all(step.text == scored.text[step.start : step.end] for step in scored.steps)
    pieces = [scored.text[start:end] for start, end in scored.tokens.offsets]
    assert pieces == [*scored.text, ""]  # the end of text is no character


@pytest.mark.parametrize("granularity", ["dense", "interval", "step", "sparse"])
@pytest.mark.parametrize("shaping", [None, 0.9])
def test_score_head_equals_plain_transformers(policy, tmp_path, granularity, shaping):
    folder = made(policy, tmp_path / "reward", head="score", shaping_gamma=shaping,
                  training={"granularity": granularity})  # fmt: skip
    policy.save(tmp_path / "policy")
    scorer = RewardScorer.from_pretrained(tmp_path, token_budget=64)
    head = load_file(folder / "discriminator_head.safetensors")
    weight, bias = head["head.weight"].double(), head["head.bias"].double()

    def expected(rows, cuts):
        """f of spans: g, or g + gamma h(after) - h(before), h read at the spans' last tokens."""
        values = []
        for i, (_, end) in enumerate(cuts):
            f = rows[end - 1, 0]
            if shaping is not None:
                after = rows[end - 1, 1] if i < len(cuts) - 1 else 0.0
                before = rows[cuts[i][0] - 1, 1] if i else 0.0
                f = f + shaping * after - before
            values.append(f)
        return torch.stack(values)

    for prompt, completion, scored in zip(
        PROMPTS, COMPLETIONS, scorer.score(PROMPTS, COMPLETIONS), strict=True
    ):
        p, c = ids_of(scorer, prompt), [*ids_of(scorer, completion), 1]
        n = len(c)
        rows = plain(folder, p, c)[1][len(p) :] @ weight.T + bias
        logp = plain_logp(tmp_path / "policy", p, c, temperature=0.7)
        cuts = {
            "dense": [(i, i + 1) for i in range(n)],
            "interval": [(i, min(i + 3, n)) for i in range(0, n, 3)],
            "step": step_cuts(completion, n),
            "sparse": [(0, n)],
        }
        close(scored.tokens.f, expected(rows, cuts["dense"]))
        steps = expected(rows, cuts["step"])
        close([s.f for s in scored.steps], steps)
        step_logp = torch.stack([logp[a:b].sum() for a, b in cuts["step"]])
        close([s.reward for s in scored.steps], steps - step_logp)
        values = expected(rows, cuts[granularity])
        assert scored.granularity == granularity
        assert [(s.first, s.last + 1) for s in scored.spans] == cuts[granularity]
        assert [completion[s.start : s.end] for s in scored.spans] == [
            completion[first:end] for first, end in cuts[granularity]
        ]
        close([s.f for s in scored.spans], values)
        span_logp = torch.stack([logp[a:b].sum() for a, b in cuts[granularity]])
        close([s.reward for s in scored.spans], values - span_logp)
        total = values.sum()
        close([scored.f, scored.reward], [total, total - logp.sum()])


def test_mean_over_spans(policy, tmp_path):
    made(policy, tmp_path / "reward", span_logp="mean")
    policy.save(tmp_path / "policy")
    (scored,) = RewardScorer.from_pretrained(tmp_path).score(PROMPTS[:1], COMPLETIONS[:1])
    f, reward = torch.tensor(scored.tokens.f), torch.tensor(scored.tokens.reward)
    cuts = step_cuts(COMPLETIONS[0], len(f))
    close([s.f for s in scored.steps], [f[a:b].mean() for a, b in cuts])
    close([s.reward for s in scored.steps], [reward[a:b].mean() for a, b in cuts])
    close([scored.f], [sum(s.f for s in scored.steps)])


def test_neither_batching_nor_order_matters(scorer, tiny_run):  # noqa: F811
    together = scorer.score(PROMPTS, COMPLETIONS)
    small = RewardScorer.from_pretrained(tiny_run, token_budget=64)
    alone = [small.score([p], [c])[0] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    cut = small.score(PROMPTS, COMPLETIONS)
    back = scorer.score(PROMPTS[::-1], COMPLETIONS[::-1])[::-1]
    for one, *others in zip(together, alone, cut, back, strict=True):
        for other in others:
            assert one.tokens.ids == other.tokens.ids
            close(one.tokens.f, other.tokens.f)
            close(one.tokens.reward, other.tokens.reward)
            close([s.f for s in one.steps], [s.f for s in other.steps])
    assert scorer.score([], []) == []


def test_inputs_of_any_form_are_the_same_pair(scorer):
    prompt, completion = PROMPTS[0], COMPLETIONS[0]
    ids = ids_of(scorer, completion)
    forms = [
        completion,
        [*ids, 1],
        [{"role": "assistant", "content": completion}],
        ["68+4=72;", "72+2=74;", "74+9=83;", "83-6=77;", "#77."],
    ]
    first, *rest = scorer.score([prompt, ids_of(scorer, prompt), prompt, prompt], forms)
    assert all(one.tokens.ids == first.tokens.ids for one in rest)
    assert all([s.text for s in one.steps] == [s.text for s in first.steps] for one in rest)
    (open_ended,) = scorer.score([prompt], [completion], end_of_text=False)
    assert open_ended.tokens.ids == tuple(ids)
    (as_ids,) = scorer.score([prompt], [ids])
    assert as_ids.tokens.ids == tuple(ids)


def test_rerank(scorer):
    completions = [COMPLETIONS[2], COMPLETIONS[0], COMPLETIONS[2]]
    scored = scorer.score([PROMPTS[0]] * 3, completions)
    assert scored[1].f > scored[0].f
    ranked = scorer.rerank(PROMPTS[0], completions)
    assert [r.index for r in ranked] == [1, 0, 2]  # equals keep their order
    close([r.score for r in ranked], [scored[1].f, scored[0].f, scored[2].f])
    by_reward = scorer.rerank(PROMPTS[0], completions, by="reward")
    assert [r.score for r in by_reward] == sorted((r.scored.reward for r in ranked), reverse=True)
    several = scorer.rerank_all(PROMPTS[:2], [completions, COMPLETIONS[1:2]])
    assert [[r.index for r in group] for group in several] == [[1, 0, 2], [0]]


def test_locate_finds_a_planted_error(scorer):
    found = scorer.locate(PROMPTS[2], COMPLETIONS[2])
    assert (found.step, found.text, found.start, found.end) == (1, "72+2=75;", 8, 16)
    assert found.scores == tuple(step.f for step in found.scored.steps)
    lowest, second = sorted(found.scores)[:2]
    assert found.margin == second - lowest > 0
    assert scorer.locate(PROMPTS[3], COMPLETIONS[3]).margin is None


def test_no_gradients_and_eval_mode(scorer, policy, tmp_path):
    folder = made(policy, tmp_path / "r")
    discriminator = Discriminator.from_pretrained(folder).train()
    fresh = RewardScorer(discriminator, scorer.trained, policy=policy.train())
    fresh.score(PROMPTS[:1], COMPLETIONS[:1])
    assert not discriminator.training
    assert not policy.training
    assert all(p.grad is None for p in discriminator.parameters())


def test_a_reward_alone_gives_f_and_asks_for_a_policy(scorer, tiny_run):  # noqa: F811
    alone = RewardScorer.from_pretrained(tiny_run / "reward")
    (one,), (full,) = (s.score(PROMPTS[:1], COMPLETIONS[:1]) for s in (alone, scorer))
    close(one.tokens.f, full.tokens.f)
    assert one.reward is one.tokens.logp is one.tokens.reward is one.steps[0].reward is None
    with pytest.raises(ValueError, match="policy="):
        alone.rerank(PROMPTS[0], COMPLETIONS[:2], by="reward")
    given = RewardScorer.from_pretrained(tiny_run / "reward", policy=tiny_run / "policy")
    assert given.score(PROMPTS[:1], COMPLETIONS[:1])[0].reward == full.reward


def test_a_reward_that_reads_the_policys_states_needs_one(policy, tmp_path):
    folder = made(policy, tmp_path / "reward", head="score", trunk="policy")
    with pytest.raises(ValueError, match="pass policy="):
        RewardScorer.from_pretrained(folder)
    scored = RewardScorer.from_pretrained(folder, policy=policy).score(PROMPTS, COMPLETIONS)
    head = load_file(folder / "discriminator_head.safetensors")
    tokenizer = policy.tokenizer
    p, c = tokenizer(PROMPTS[0]).input_ids, [*tokenizer(COMPLETIONS[0]).input_ids, 1]
    policy.save(tmp_path / "policy")
    states = plain(tmp_path / "policy", p, c)[1][len(p) :]
    close(scored[0].tokens.f, states @ head["head.weight"][0].double() + head["head.bias"].item())


def test_folders_without_a_reward_are_named(tiny_run, tmp_path):  # noqa: F811
    load = RewardScorer.from_pretrained
    with pytest.raises(ValueError, match="no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no trained reward"):
        load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="has not ended"):
        load(tmp_path)
    shutil.copytree(tiny_run / "policy", tmp_path / "policy")
    with pytest.raises(ValueError, match="sft or grpo"):
        load(tmp_path)
    with pytest.raises(ValueError, match="expected a 'discriminator'"):
        load(tmp_path / "policy")
    shutil.copytree(tiny_run / "reward", tmp_path / "reward")
    metadata = json.loads((tmp_path / "reward" / "airl_fast.json").read_text())
    del metadata["training"]["boundary"]
    (tmp_path / "reward" / "airl_fast.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="lacks boundary"):
        load(tmp_path / "reward")


LONG = "1+1=2;" * 100


@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [
        ("1+1=", LONG, "do not fit the model's context of "),
        ("1+x=", "2", "cannot encode the prompt"),
        ("1+1=", "2\n", "cannot encode the completion"),
        ("", "2", "the prompt is empty"),
        ("1+1=", "", "the completion is empty"),
        ("1+1=", [], "the completion is an empty list"),
        ("1+1=", [3, 99], "token ids of the completion from 0 to 17, received 99"),
        ("1+1=", [3, "2"], "received list of int, str"),
        ("1+1=", 7, "received int"),
        (["1+", "1="], "2", "received a list of texts"),
        ([{"role": "user", "content": "1+1="}], "2", "no chat template"),
        ("1+1=", [{"role": "user", "content": "2"}], "one assistant message, received the roles"),
        ("1+1=", [{"role": "assistant"}], "'content': text"),
        ("1+1=", "2<eos>", "end-of-text"),
        ("1+1=", ["2;", "", "3"], "cannot encode"),  # an empty step becomes a newline
    ],
)
def test_wrong_inputs_are_named(scorer, prompt, completion, message):
    with pytest.raises(ValueError, match=message) as error:
        scorer.score([PROMPTS[0], prompt], [COMPLETIONS[0], completion])
    assert str(error.value).startswith("pair 1: ")


def test_wrong_calls_are_named(scorer):
    with pytest.raises(ValueError, match=r"pass \[prompts\]"):
        scorer.score("1+1=", ["2"])
    with pytest.raises(ValueError, match="received 2 for 1"):
        scorer.score(["1+1="], ["2", "2"])
    with pytest.raises(ValueError, match="expected by='f' or 'reward'"):
        scorer.rerank("1+1=", ["2"], by="logp")
    with pytest.raises(ValueError, match="one completion or more"):
        scorer.rerank("1+1=", [])


@pytest.fixture(scope="module")
def worded(tmp_path_factory):
    """A scorer whose tokenizer knows letters, newlines and a chat template; random weights."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    body = LanguageModel(tiny_model("llama").eval(), tokenizer, Origin(model="tiny"))
    folder = tmp_path_factory.mktemp("worded")
    Policy(body.model, tokenizer, body.origin).save(folder / "policy")
    policy = Policy.from_pretrained(folder / "policy")
    made(policy, folder / "reward", training={"boundary": "\n"})
    return RewardScorer.from_pretrained(folder)


def test_a_tokenizer_that_loses_text_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = Replace("b", "")
    encoder = PairEncoder(tokenizer, "\n", 61)
    assert encoder.encode("ac", "ac").text == "ac"
    with pytest.raises(ValueError, match="does not give the prompt back: 'abc' becomes 'ac'"):
        encoder.encode("abc", "a")
    for completion in ("abc", ["abc", "a"]):
        with pytest.raises(ValueError, match="does not give the completion back"):
            encoder.encode("a", completion)


def byte_level(*texts):
    """A byte-level BPE tokenizer that has merged all that it could of these texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        special_tokens=["<eos>"], initial_alphabet=alphabet, min_frequency=1, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def test_steps_end_with_the_token_that_holds_their_end():
    tokenizer = byte_level(".\nB", "\n\n\n")
    encoder = PairEncoder(tokenizer, "\n", len(tokenizer))
    pair = encoder.encode("é", ["A ü.", "Be", "C"])
    tokens = [pair.text[start:end] for start, end in pair.offsets]
    # ü is two tokens, of which the second completes it; the step's end is inside ".\nB"
    assert tokens == ["A", " ", "", "ü", ".\nB", "e", "\n", "C", ""]
    assert pair.step_lengths == (5, 2, 2)
    assert encoder.encode("é", "A ü.\nBe\nC") == pair
    with pytest.raises(ValueError, match=r"step 1 .* has no token of its own"):
        encoder.encode("é", ["A", "\n", "", "C"])


def test_given_steps_stay_as_they_are(worded):
    steps = ["first.\nstill the first.", "second.", "third."]
    found = worded.locate("a problem", steps)
    assert [s.text for s in found.scored.steps] == [
        "first.\nstill the first.\n",
        "second.\n",
        "third.",
    ]
    assert len(worded.locate("a problem", "\n".join(steps)).scores) == 4
    assert found.scored.f == pytest.approx(worded.score(["a problem"], ["\n".join(steps)])[0].f)


def test_chat_messages_go_through_the_template(worded):
    chat = [{"role": "user", "content": "hello"}]
    text = "user: hello\nassistant: "
    completion = [{"role": "assistant", "content": "hi."}]
    one, other = worded.score([chat, text], [completion, "hi."])
    assert one.f == pytest.approx(other.f)
    with pytest.raises(ValueError, match="'content': text"):
        worded.score([[{"role": "user", "text": "hello"}]], ["hi."])
