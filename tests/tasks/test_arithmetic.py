import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airl_fast.config import TaskConfig
from airl_fast.tasks import encode_completion, encode_prompt, load_task
from airl_fast.tasks.arithmetic import (
    CHARACTERS,
    Arithmetic,
    Problem,
    build_tokenizer,
    careless_trace,
    sample_problem,
)
from airl_fast.tasks.base import Example, step_index

SMALL = Arithmetic(demonstrations=1, unlabelled=0, validation=0, test=0)
KNOWN = Problem(start=68, operands=(4, 2, 9, -6))


@pytest.fixture(scope="module")
def task():
    return Arithmetic(3, demonstrations=200, unlabelled=300, validation=40, test=60)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def wrong_steps(trace):
    """Indices of steps whose result is not what their own left side gives."""
    steps = re.findall(r"(\d+)([+-]\d+)=(\d+);", trace)
    return [i for i, (a, b, c) in enumerate(steps) if int(a) + int(b) != int(c)]


def breaks(trace):
    """Indices of steps (or of the answer) that do not start from the result before."""
    lefts = [*re.findall(r"(\d+)[+-]\d+=", trace), trace.split("#")[1].rstrip(".")]
    results = re.findall(r"=(\d+);", trace)
    return [i + 1 for i, (a, b) in enumerate(zip(results, lefts[1:], strict=True)) if a != b]


def test_format_is_the_documented_one():
    assert KNOWN.prompt == "68+4+2+9-6="
    assert KNOWN.trace() == "68+4=72;72+2=74;74+9=83;83-6=77;#77."
    assert KNOWN.answer == "77"


def test_problems_keep_their_ranges():
    rng = random.Random(0)
    for _ in range(500):
        problem = sample_problem(rng)
        assert 1 <= problem.start <= 99
        assert len(problem.operands) == 4
        assert all(1 <= abs(operand) <= 9 for operand in problem.operands)
        assert all(0 <= result <= 99 for result in problem.results)


def test_sets_have_their_sizes_and_share_no_problem(task):
    sets = [task.train, task.unlabelled, task.validation, task.test]
    assert [len(examples) for examples in sets] == [200, 300, 40, 60]
    prompts = [example.prompt for examples in sets for example in examples]
    assert len(set(prompts)) == len(prompts)
    assert all(example.completion is None and example.answer for example in task.unlabelled)


def test_what_one_seed_trains_on_no_seed_tests_on():
    tested = {e.prompt for seed in range(3) for e in Arithmetic(seed, test=2000).test}
    trained = {e.prompt for seed in range(3) for e in Arithmetic(seed, test=0).train}
    assert not tested & trained


def test_same_seed_same_task_and_sizes_do_not_move_the_others(task):
    again = Arithmetic(3, demonstrations=200, unlabelled=300, validation=40, test=60)
    assert (again.train, again.test) == (task.train, task.test)
    smaller = Arithmetic(3, demonstrations=50, unlabelled=0, validation=0, test=10)
    assert smaller.train == task.train[:50]
    assert smaller.test == task.test[:10]
    assert Arithmetic(4, demonstrations=200).train != task.train


def test_experts_err_at_their_rate_and_carry_the_error_on():
    task = Arithmetic(0, demonstrations=2000, unlabelled=0)
    wrong = [e for e in task.train if not task.is_correct(e.completion, e)]
    assert 0.26 < len(wrong) / 2000 < 0.34
    assert all(len(wrong_steps(e.completion)) == 1 for e in wrong)
    assert not any(breaks(e.completion) for e in task.train)
    perfect = Arithmetic(0, expert_error=0.0)
    assert all(perfect.is_correct(e.completion, e) for e in perfect.train)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("68+4=72;#72.", "72"),
        ("#0.", "0"),
        ("68+4=72;#72", None),
        ("68+4=72;#72.5", None),
        ("68+4=72;#72..", None),
        ("#72.#72.", None),
        ("68+4=72;", None),
        ("", None),
        ("#.", None),
    ],
)
def test_answer_is_exact(task, completion, answer):
    assert task.extract_answer(completion) == answer
    assert task.is_correct(completion, Example(prompt="x", answer=answer or "72")) is (
        answer is not None
    )


def test_answer_with_a_leading_zero_is_wrong(task):
    assert not task.is_correct("#07.", Example(prompt="x", answer="7"))
    with pytest.raises(ValueError, match="no answer"):
        task.is_correct("#7.", Example(prompt="x"))


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_corrupt_carries_on_and_knows_the_step(seed):
    rng = random.Random(seed)
    trace = sample_problem(rng).trace()
    changed, step = SMALL.corrupt(trace, rng)
    assert wrong_steps(changed) == [step]
    assert breaks(changed) == []
    assert all(0 <= int(result) <= 99 for result in re.findall(r"=(\d+)", changed))
    place = next(i for i, (a, b) in enumerate(zip(trace, changed, strict=False)) if a != b)
    assert step_index(changed, place, r";") == step


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_corrupt_without_carry_changes_one_result_only(seed):
    rng = random.Random(seed)
    trace = sample_problem(rng).trace()
    changed, step = SMALL.corrupt(trace, rng, carry=False)
    before, after = trace.split(";"), changed.split(";")
    assert [i for i in range(5) if before[i] != after[i]] == [step]
    assert wrong_steps(changed) == [step]
    assert breaks(changed) == [step + 1]


def test_corrupt_reaches_every_step_and_refuses_free_text(task):
    rng = random.Random(0)
    assert {task.corrupt(KNOWN.trace(), rng)[1] for _ in range(100)} == {0, 1, 2, 3}
    for text in ("", "hello", "68+4=72", "68+4=;#72.", "68+4=72;#72. and"):
        with pytest.raises(ValueError, match="corrupt takes a trace"):
            task.corrupt(text, rng)


def test_corrupt_never_repairs_a_wrong_step(task):
    rng = random.Random(0)
    for example in task.train:
        changed, step = task.corrupt(example.completion, rng)
        assert changed != example.completion
        assert step in wrong_steps(changed)


def test_careless_author_forgets_carries_at_its_rate():
    rng = random.Random(0)
    assert careless_trace(KNOWN, rng, forget=0.0) == KNOWN.trace()
    # 68+4 and 64+9 lose their carry, 63-6 its borrow; 62+2 has none to lose.
    assert careless_trace(KNOWN, rng, forget=1.0) == "68+4=62;62+2=64;64+9=63;63-6=67;#67."
    wrong = sum(careless_trace(KNOWN, rng).startswith("68+4=62;") for _ in range(2000))
    assert 0.55 < wrong / 2000 < 0.65
    for _ in range(500):
        trace = careless_trace(sample_problem(rng), rng)
        assert all(0 <= int(result) <= 99 for result in re.findall(r"=(\d+)", trace))
        assert not breaks(trace)


def test_tokenizer_round_trips_and_has_one_token_a_character(tokenizer, tmp_path):
    text = KNOWN.prompt + KNOWN.trace()
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == len(CHARACTERS) + 2
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(text).input_ids == ids
    assert loaded.decode(ids) == text
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 1)
    assert loaded.padding_side == "left"


@settings(deadline=None)
@given(text=st.text(alphabet=CHARACTERS, min_size=1))
def test_tokenizer_round_trips_any_text_of_its_characters(text):
    tokenizer = build_tokenizer()
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_refuses_other_characters(tokenizer):
    with pytest.raises(Exception, match="UNK"):
        tokenizer("68 + 4")


def test_encoding_of_an_example(task, tokenizer):
    example = task.test[0]
    prompt = encode_prompt(example, tokenizer)
    completion = encode_completion(example.completion, tokenizer)
    assert tokenizer.decode(prompt) == example.prompt
    assert completion[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(completion[:-1]) == example.completion


@pytest.mark.parametrize("wrong", [{"expert_error": 1.5}, {"test": -1}, {"unlabelled": -600}])
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        Arithmetic(0, **wrong)


def test_load_task():
    config = TaskConfig(name="arithmetic", seed=3, demonstrations=200, unlabelled=300)
    task = load_task(config)
    assert task.name == "arithmetic"
    assert len(task.train) == 200
    assert len(load_task(TaskConfig(name="arithmetic")).train) == 600
