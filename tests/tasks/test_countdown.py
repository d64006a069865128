import random
import re
from collections import Counter
from fractions import Fraction
from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airl_fast.config import TaskConfig, load_config
from airl_fast.negatives import perturb
from airl_fast.policy import Policy
from airl_fast.tasks import arithmetic, encode_completion, encode_prompt, load_task
from airl_fast.tasks.base import Example
from airl_fast.tasks.countdown import (
    Countdown,
    Problem,
    build_tokenizer,
    calculate,
    careless_trace,
    read,
    sample_problem,
    solutions,
    write,
)

SMALL = Countdown(demonstrations=1, unlabelled=0, validation=0, test=0)
EXAMPLE = Example(prompt="3,17,4>63=", answer="63")
KNOWN = "17+4=21;3*21=63;#63."


@pytest.fixture(scope="module")
def task():
    return Countdown(3, demonstrations=200, unlabelled=300, validation=40, test=60)


def checked(prompt, completion):
    """The first wrong step by exact fractions and a count of what is there; None for none."""
    numbers, target = prompt[:-1].split(">")
    there = Counter(numbers.split(","))
    *steps, answer = completion.split(";") if ";" in completion else ["", completion]
    last = None
    for i, step in enumerate(steps):
        left, right = step.split("=") if step.count("=") == 1 else ("", "")
        operands = re.fullmatch(r"([0-9]+)([^0-9])([0-9]+)", left)
        if operands is None:
            return i
        a, operation, b = operands.groups()
        need = Counter([a, b])
        if any(there[n] < need[n] for n in need):
            return i
        there -= need
        if operation == "/" and b == "0":
            return i
        value = {
            "+": lambda x, y: x + y,
            "-": lambda x, y: x - y,
            "*": lambda x, y: x * y,
            "/": lambda x, y: x / y,
        }[operation](Fraction(a), Fraction(b))
        if value.denominator != 1 or not 0 <= value <= 99 or right != str(value):
            return i
        there[right] += 1
        last = right
    return None if answer == f"#{target}." and last == target else len(steps)


def reached(numbers):
    """Every value of an expression of some of the numbers, each result within 1 to 99."""
    found = set()

    def go(values):
        for i, j in permutations(range(len(values)), 2):
            for operation in "+-*/":
                value = calculate(values[i], operation, values[j])
                if value:
                    found.add(value)
                    go([v for k, v in enumerate(values) if k not in (i, j)] + [value])

    go(list(numbers))
    return found


def test_format_is_the_documented_one():
    assert Problem(numbers=(3, 17, 4), target=63).prompt == EXAMPLE.prompt
    assert write(read(KNOWN)[0]) == KNOWN
    assert SMALL.is_correct(KNOWN, EXAMPLE)


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_problems_keep_their_ranges_and_their_solution_is_one(seed):
    problem, steps = sample_problem(random.Random(seed))
    assert len(problem.numbers) == 3
    assert all(1 <= n <= 20 for n in problem.numbers)
    assert 10 <= problem.target <= 99
    assert len(steps) == 2
    assert checked(problem.prompt, write(steps)) is None


def test_sets_have_their_sizes_and_share_no_problem_in_any_order(task):
    sets = [task.train, task.unlabelled, task.validation, task.test]
    assert [len(examples) for examples in sets] == [200, 300, 40, 60]
    prompts = [e.prompt.split(">") for examples in sets for e in examples]
    keys = [(*sorted(numbers.split(",")), target) for numbers, target in prompts]
    assert len(set(keys)) == len(keys)
    assert all(e.completion is None and e.answer for e in task.unlabelled)


def test_what_one_seed_trains_on_no_seed_tests_on():
    def keys(examples):
        return {(*sorted(e.prompt.split(">")[0].split(",")), e.answer) for e in examples}

    tasks = [Countdown(s, demonstrations=500, unlabelled=0, test=300) for s in range(3)]
    tested = set().union(*(keys([*task.test, *task.validation]) for task in tasks))
    trained = set().union(*(keys(task.train) for task in tasks))
    assert len(trained) > 1000
    assert not tested & trained


def test_same_seed_same_task_and_sizes_do_not_move_the_others(task):
    again = Countdown(3, demonstrations=200, unlabelled=300, validation=40, test=60)
    assert (again.train, again.unlabelled, again.test) == (task.train, task.unlabelled, task.test)
    smaller = Countdown(3, demonstrations=50, unlabelled=0, validation=0, test=10)
    assert smaller.train == task.train[:50]
    assert smaller.test == task.test[:10]
    assert Countdown(4, demonstrations=200, unlabelled=0).train != task.train


def test_references_are_right_and_experts_err_at_their_rate_in_one_step():
    task = Countdown(0, demonstrations=2000, unlabelled=0)
    assert all(checked(e.prompt, e.completion) is None for e in [*task.validation, *task.test])
    wrong = [e for e in task.train if checked(e.prompt, e.completion) is not None]
    assert 0.26 < len(wrong) / 2000 < 0.34
    perfect = Countdown(0, unlabelled=0, expert_error=0.0)
    assert all(checked(e.prompt, e.completion) is None for e in perfect.train)


@pytest.mark.parametrize(
    ("completion", "step"),
    [
        (KNOWN, None),
        ("4+17=21;21*3=63;#63.", None),
        ("3*21=63;#63.", 0),  # 21 is not there
        ("17+4=21;17*3=51;#51.", 1),  # 17 is used up
        ("17+4=21;3*21=64;#64.", 1),
        ("17+4=22;3*22=66;#66.", 0),
        ("17+4=21;#21.", 1),  # not the target
        ("17+4=21;3*21=63;#64.", 2),
        ("17+4=21;3*21=63;#63", 2),
        ("17+4=21;3*21=63;", 2),
        ("17+4=021;3*21=63;#63.", 0),
        ("17+04=21;3*21=63;#63.", 0),
        ("17/4=4;#63.", 0),  # no whole number
        ("3-4=-1;#63.", 0),
        ("#63.", 0),
        ("", 0),
        ("17+4=21;3*21=63;#63.#63.", 2),
    ],
)
def test_first_wrong_step(completion, step):
    assert SMALL.first_wrong_step(completion, EXAMPLE) == step
    assert SMALL.is_correct(completion, EXAMPLE) is (step is None)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["digit", "swap", "drop", "corrupt"]))
def test_the_verifier_agrees_with_exact_fractions(seed, kind):
    rng = random.Random(seed)
    problem, steps = sample_problem(rng)
    example = Example(prompt=problem.prompt, answer=str(problem.target))
    text = perturb(SMALL, write(steps), rng, kinds=(kind,))
    assert SMALL.first_wrong_step(text, example) == checked(problem.prompt, text)


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_corrupt_plants_the_only_wrong_step_and_carries_it_on(seed):
    rng = random.Random(seed)
    problem, steps = sample_problem(rng)
    changed, step = SMALL.corrupt(write(steps), rng)
    found = read(changed)[0]
    wrong = [i for i, s in enumerate(found) if s.exact != s.result]
    assert wrong == [step]
    assert found[step].result != 0
    assert checked(problem.prompt, changed) == step
    assert changed.endswith(f"={found[-1].result};#{found[-1].result}.")
    if step + 1 < len(found):  # the wrong value is used by a later step, as the right one was
        later = [n for s in found[step + 1 :] for n in (s.left, s.right)]
        assert found[step].result in later


def test_corrupt_reaches_every_step_and_refuses_free_text():
    rng = random.Random(0)
    assert {SMALL.corrupt(KNOWN, rng)[1] for _ in range(200)} == {0, 1}
    with pytest.raises(ValueError, match="corrupt takes a trace"):
        SMALL.corrupt("the answer is 63", rng)


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_solver_finds_the_generating_solution_and_only_solutions(seed):
    problem, steps = sample_problem(random.Random(seed))
    found = list(solutions(problem))
    texts = [write(s) for s in found]
    assert len(set(texts)) == len(texts)
    assert all(checked(problem.prompt, text) is None for text in texts)
    answers = {SMALL.extract_answer(text) for text in texts}
    assert SMALL.extract_answer(write(steps)) in answers


@pytest.mark.parametrize("numbers", [(1, 2, 3), (5, 5, 17), (2, 2, 2), (20, 10, 1)])
def test_solver_misses_no_target_that_can_be_reached(numbers):
    reachable = reached(numbers)
    for target in range(10, 100):
        solved = next(solutions(Problem(numbers=numbers, target=target)), None)
        # 1 as a factor does nothing, so leaving it out loses no target.
        assert (solved is not None) == (target in reachable - set(numbers)) or target in numbers


def test_most_problems_have_several_solutions(task):
    def count(example):
        numbers, target = example.prompt[:-1].split(">")
        problem = Problem(numbers=tuple(map(int, numbers.split(","))), target=int(target))
        return len({task.extract_answer(write(s)) for s in solutions(problem)})

    counts = [count(example) for example in task.test]
    assert sum(c > 1 for c in counts) > len(counts) / 2


def test_answers_are_the_same_in_any_order_of_independent_steps():
    orders = ["1+2=3;3*4=12;3+12=15;#15.", "4*3=12;2+1=3;12+3=15;#15."]
    assert len({SMALL.extract_answer(text) for text in orders}) == 1
    assert SMALL.extract_answer("2-1=1;#1.") != SMALL.extract_answer("1-2=1;#1.")
    assert all(SMALL.extract_answer(t) is None for t in ("#65.", "1+2=3;", "01+2=3;#3.", ""))


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_careless_authors_only_forget_carries(seed):
    rng = random.Random(seed)
    _, steps = sample_problem(rng)
    found = read(careless_trace(steps, rng, forget=1.0))[0]
    assert len(found) == len(steps)
    for step in found:
        carries = step.operation == "+" and step.left % 10 + step.right % 10 >= 10
        borrows = step.operation == "-" and step.left % 10 < step.right % 10
        off = {True: (-10, 10)[step.operation == "-"], False: 0}[carries or borrows]
        exact = {"+": step.left + step.right, "-": step.left - step.right,
                 "*": step.left * step.right}.get(step.operation)  # fmt: skip
        exact = step.left // step.right if exact is None else exact
        assert step.result in (exact, exact + off)
    assert careless_trace(steps, rng, forget=0.0) == write(steps)


def test_tokenizer_adds_to_that_of_arithmetic(task):
    mine, its = build_tokenizer(), arithmetic.build_tokenizer()
    assert its.get_vocab().items() <= mine.get_vocab().items()
    example = task.train[0]
    ids = [*encode_prompt(example, mine), *encode_completion(example.completion, mine)]
    assert mine.decode(ids, skip_special_tokens=True) == example.prompt + example.completion


def test_of_a_configuration():
    made = load_task(TaskConfig(name="countdown", seed=5, demonstrations=3, validation=1, test=2))
    assert [len(made.train), len(made.unlabelled), len(made.test)] == [3, 0, 2]
    for overrides, message in (
        (["policy.model=arithmetic-base"], "characters of arithmetic only"),
        (["task.path=x"], "task.name=countdown, which is generated"),
        (["task.chat=false"], "task.chat=false is for"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config(
                "arithmetic",
                ["run.output_dir=x", "task.name=countdown", "policy.model=y", *overrides],
            )


def test_negative_arguments_and_foreign_examples_are_refused():
    with pytest.raises(ValueError, match="expected 0 or more"):
        Countdown(demonstrations=-1)
    with pytest.raises(ValueError, match="expected a probability"):
        Countdown(expert_error=2)
    for bad in (Example(prompt="1+1=", answer="2"), Example(prompt="1,2>12=", answer="3")):
        with pytest.raises(ValueError, match="take the task's own"):
            SMALL.is_correct(KNOWN, bad)


def test_the_base_model_reads_both_tasks():
    tokenizer = Policy.from_pretrained("countdown-base").tokenizer
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()


def test_every_operation_of_a_step():
    for left, right in product(range(0, 100, 7), range(0, 13)):
        assert calculate(left, "+", right) == (left + right if left + right <= 99 else None)
        assert calculate(left, "-", right) == (left - right if left >= right else None)
        assert calculate(left, "*", right) == (left * right if left * right <= 99 else None)
        fraction = Fraction(left, right) if right else None
        whole = fraction is not None and fraction.denominator == 1
        assert calculate(left, "/", right) == (int(fraction) if whole else None)
