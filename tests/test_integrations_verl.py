"""verl and OpenRLHF call the reward as they do; verl is not installed for the tests.

The stand-ins restate what was read in verl 0.9.1: ``RewardManagerBase`` (its constructor and the
attributes that it sets), ``DataProto`` as far as rewards use it (slices, items, ``batch`` and
``non_tensor_batch``), and the order of calls of its agent loop and of ``compute_rm_score``.
"""

import asyncio
import importlib.util
import pickle
import sys
import types
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from airl_fast import RewardScorer
from airl_fast.integrations import openrlhf, shared, verl
from tests.tiny_reward import Truth, save_reward

PROMPT, COMPLETION = "1+1=", "ab1cd2ef"
TOLERANCE = {"rel": 2e-4, "abs": 2e-4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_reward(tmp_path_factory.mktemp("verl"))


@pytest.fixture(scope="module")
def truth(folder):
    return Truth(folder)


@pytest.fixture(autouse=True)
def named(folder, monkeypatch):
    monkeypatch.setenv("AIRL_FAST_REWARD", str(folder))
    for name in ("DEVICE", "VALUE", "REDUCE"):
        monkeypatch.delenv(f"AIRL_FAST_{name}", raising=False)


@dataclass
class Data:
    """A stand-in of DataProto."""

    batch: dict
    non_tensor_batch: dict

    def __len__(self):
        return len(self.batch["responses"])

    def __getitem__(self, at):
        return Data(
            {key: value[at] for key, value in self.batch.items()},
            {key: value[at] for key, value in self.non_tensor_batch.items()},
        )


class Base:
    """A stand-in of RewardManagerBase."""

    def __init__(self, config, tokenizer, compute_score):
        self.config, self.tokenizer, self.compute_score = config, tokenizer, compute_score


@pytest.fixture
def manager_class(monkeypatch):
    home = "verl.experimental.reward_loop.reward_manager.base"
    names = home.split(".")
    for i in range(1, len(names) + 1):
        monkeypatch.setitem(sys.modules, ".".join(names[:i]), types.ModuleType(".".join(names[:i])))
    sys.modules[home].RewardManagerBase = Base
    verl.reward_manager_class.cache_clear()
    yield verl.AIRLRewardManager
    verl.reward_manager_class.cache_clear()


def padded(sequences, side):
    width = max(map(len, sequences))
    rows = [
        [0] * (width - len(s)) * (side == "left") + s + [0] * (width - len(s)) * (side == "right")
        for s in sequences
    ]
    mask = [
        [0] * (width - len(s)) * (side == "left")
        + [1] * len(s)
        + [0] * (width - len(s)) * (side == "right")
        for s in sequences
    ]
    return torch.tensor(rows), torch.tensor(mask)


def batch_of(truth, prompts, completions):
    ids = [truth.tokenizer(text).input_ids for text in prompts]
    sampled = [[*truth.tokenizer(c).input_ids, truth.tokenizer.eos_token_id] for c in completions]
    sampled[-1].pop()  # one that was cut short
    left, left_mask = padded(ids, "left")
    right, right_mask = padded(sampled, "right")
    mask = torch.cat([left_mask, right_mask], 1)
    turns = {"__num_turns__": np.array([2] * len(ids))}
    return Data({"prompts": left, "responses": right, "attention_mask": mask}, turns), ids, sampled


def test_the_manager_as_compute_rm_score_calls_it(manager_class, truth):
    manager = manager_class(
        config=None,
        tokenizer=truth.tokenizer,
        compute_score=None,
        reward_router_address=None,
        reward_model_tokenizer=None,
    )
    data, prompts, sampled = batch_of(truth, [PROMPT, "a dog and"], [COMPLETION, "x1 yz"])

    async def all_rows():
        rows = (manager.run_single(data[i : i + 1]) for i in range(len(data)))
        return await asyncio.gather(*rows)

    outputs = pickle.loads(pickle.dumps(asyncio.run(all_rows())))  # as between ray's workers
    scores = [output["reward_score"] for output in outputs]
    rewards = manager_class.assemble_rm_scores(data, scores)
    assert rewards.shape == data.batch["responses"].shape
    assert rewards.dtype == torch.float32
    cuts = [[3, 6, 9], [2, 3, 5]]  # ab1|cd2|ef<eos> and x1|<space>|yz
    for row, p, c, ends, score in zip(rewards, prompts, sampled, cuts, scores, strict=True):
        f = truth.tokens(p, c)
        expected = [0.0] * len(row)
        for start, end in zip([0, *ends], ends, strict=False):
            expected[end - 1] = sum(f[start:end])
        assert row.tolist() == pytest.approx(expected, **TOLERANCE)
        assert score == pytest.approx(sum(f), **TOLERANCE)
    for key in outputs[0]["reward_extra_info"]:  # verl makes arrays of these
        assert np.array([o["reward_extra_info"][key] for o in outputs]).shape == (2,)
    with pytest.raises(ValueError, match="rows and scores must be in one order"):
        manager_class.assemble_rm_scores(data, scores[::-1])


def test_the_manager_as_the_agent_loop_calls_it(manager_class, truth):
    """Several outputs of one trajectory, padded on the right, of which the last is scored."""
    manager = manager_class(None, truth.tokenizer, None)
    prompts = [truth.tokenizer(text).input_ids for text in ("a longer prompt", PROMPT)]
    sampled = [truth.tokenizer(text).input_ids for text in ("and a longer answer", COMPLETION)]
    whole = [p + s for p, s in zip(prompts, sampled, strict=True)]
    lengths = {
        "prompt_len": np.array([len(p) for p in prompts]),
        "response_len": np.array([len(s) for s in sampled]),
        "__num_turns__": np.array([2, 2]),
    }
    data = Data(
        {
            "prompts": padded(prompts, "right")[0],
            "responses": padded(sampled, "right")[0],
            "attention_mask": padded(whole, "right")[1],
        },
        lengths,
    )
    found = asyncio.run(manager.run_single(data))["reward_score"]
    assert torch.tensor([found], dtype=torch.float32).item() == pytest.approx(
        sum(truth.tokens(prompts[1], sampled[1])), **TOLERANCE
    )
    data.non_tensor_batch["__num_turns__"] = np.array([2, 4])
    with pytest.raises(ValueError, match="received 4 turns"):
        asyncio.run(manager.run_single(data))


def test_the_manager_needs_verl_and_the_policys_tokenizer(manager_class, truth):
    from transformers import AutoTokenizer

    from airl_fast.loading import resolve

    with pytest.raises(ValueError, match="another tokenizer"):
        manager_class(None, AutoTokenizer.from_pretrained(resolve("arithmetic-base")), None)
    for name in [name for name in sys.modules if name.split(".")[0] == "verl"]:
        del sys.modules[name]
    verl.reward_manager_class.cache_clear()
    if importlib.util.find_spec("verl") is None:
        with pytest.raises(ImportError, match=r"needs verl 0\.9"):
            verl.AIRLRewardManager  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'Manager'"):
        verl.Manager  # noqa: B018


def test_compute_score_as_verls_managers_call_it(truth):
    def ask(**options):
        return verl.compute_score(
            data_source="words",
            solution_str=COMPLETION,
            ground_truth="2",
            extra_info={"prompt": PROMPT, "num_turns": 2, "rollout_reward_scores": {}},
            **options,
        )

    scored = ask()
    assert scored["score"] == pytest.approx(truth.f(PROMPT, COMPLETION), **TOLERANCE)
    assert scored["airl_fast_spans"] == 3
    cut = ask(end_of_text=False)["score"]
    assert cut == pytest.approx(truth.f(PROMPT, COMPLETION, end_of_text=False), **TOLERANCE)
    assert ask(reduce="min")["score"] == scored["airl_fast_lowest"]
    chat = np.array([{"role": "user", "content": "a"}], dtype=object)
    found = verl.compute_score("words", "bc", None, {"prompt": chat})["score"]
    assert found == pytest.approx(truth.f("user: a\nassistant: ", "bc"), **TOLERANCE)
    with pytest.raises(ValueError, match=r"extra_info\['prompt'\], received none"):
        verl.compute_score("words", "bc", None)


def test_the_file_of_openrlhf_as_it_is_loaded(truth):
    spec = importlib.util.spec_from_file_location("reward_func", openrlhf.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    queries = [PROMPT + COMPLETION + "<eos>", PROMPT + COMPLETION]

    async def threads():  # one query each, as OpenRLHF asks
        return await asyncio.gather(
            *(asyncio.to_thread(module.reward_func, [q], [PROMPT], ["2"]) for q in queries)
        )

    done, cut = asyncio.run(threads())
    assert done["rewards"].tolist() == pytest.approx([truth.f(PROMPT, COMPLETION)], **TOLERANCE)
    unfinished = truth.f(PROMPT, COMPLETION, end_of_text=False)
    assert cut["rewards"].tolist() == pytest.approx([unfinished], **TOLERANCE)
    torch.testing.assert_close(done["scores"], torch.sigmoid(done["rewards"]))
    # what OpenRLHF makes of an answer
    assert torch.tensor([done["rewards"]]).isfinite().all()
    assert all(v.flatten()[0].item() == v for v in done["extra_logs"].values())


def test_the_environment_names_the_reward(folder, monkeypatch):
    monkeypatch.setenv("AIRL_FAST_VALUE", "reward")
    monkeypatch.setenv("AIRL_FAST_REDUCE", "last")
    reader, _ = shared.shared_reader()
    scored = RewardScorer.from_pretrained(folder).score([PROMPT], [COMPLETION])[0]
    found = openrlhf.reward_func([PROMPT + COMPLETION + "<eos>"], [PROMPT], None)["rewards"]
    assert found.tolist() == pytest.approx([scored.steps[-1].reward], **TOLERANCE)
    assert shared.shared_reader()[0].scorer is reader.scorer  # loaded once
    monkeypatch.setenv("AIRL_FAST_VALUE", "g")
    with pytest.raises(ValueError, match="expected value='f' or 'reward', received 'g'"):
        shared.shared_reader()
    monkeypatch.delenv("AIRL_FAST_REWARD")
    with pytest.raises(ValueError, match="set AIRL_FAST_REWARD"):
        shared.shared_reader()
