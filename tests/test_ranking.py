"""Votes against counting by hand; answers from lists, functions and the reward's task."""

import math

import pytest

from airl_fast import RewardScorer
from airl_fast.ranking import rank, task_reader
from airl_fast.scores import Scored, TokenScores
from tests.tiny_run import tiny_run  # noqa: F401

PROMPT = "68+4+2+9-6="


def scored(f, reward=None):
    tokens = TokenScores(ids=(), offsets=(), f=(), logp=None, reward=None)
    return Scored(text="", f=f, reward=reward, granularity="step", steps=(), tokens=tokens)


def elect(scores, answers, method, **options):
    return rank([scored(f) for f in scores], "f", method=method, answers=answers, **options)


def test_best_of_n_needs_no_answers():
    ranking = elect([1.0, 3.0, 2.0, 3.0], None, "best")
    assert ranking.order == (1, 3, 2, 0)  # equals stay as given
    assert (ranking.answer, ranking.weight, ranking.votes) == (None, None, ())
    assert [one.score for one in ranking] == [3.0, 3.0, 2.0, 1.0]
    assert (len(ranking), ranking[0].index) == (4, 1)
    assert elect([1.0, 3.0], ["7", "8"], "best").answer == "8"


def test_majority_counts_and_lets_the_reward_decide_ties():
    clear = elect([9.0, 1.0, 2.0, 8.0], ["a", "b", "b", None], "majority")
    assert (clear.answer, clear.weight) == ("b", 2 / 3)  # no answer, no vote
    assert clear.order == (2, 1, 0, 3)  # the winner's by score, the rest, those without an answer
    assert [(v.answer, v.indices) for v in clear.votes] == [("b", (1, 2)), ("a", (0,))]
    tied = elect([1.0, 2.0, 4.0, 0.0], ["a", "b", "a", "b"], "majority")
    assert (tied.answer, tied.weight) == ("a", 0.5)
    assert elect([1.0, 6.0, 4.0, 0.0], ["a", "b", "a", "b"], "majority").answer == "b"
    assert elect([1.0, 1.0], ["a", "b"], "majority").answer == "a"  # equal in all: the first


def test_weighted_adds_softmax_weights():
    scores, answers = [0.0, 1.0, 0.5, -1.0], ["a", "b", "a", None]
    ranking = elect(scores, answers, "weighted")
    share = {s: math.exp(s) / (math.e + math.exp(0.5) + 1) for s in (0.0, 0.5, 1.0)}
    weights = {vote.answer: vote.weight for vote in ranking.votes}
    assert weights == pytest.approx({"a": share[0.0] + share[0.5], "b": share[1.0]})
    assert ranking.order == ((2, 0, 1, 3) if weights["a"] > weights["b"] else (1, 2, 0, 3))
    assert elect(scores, answers, "weighted", temperature=0.01).answer == "b"  # the best decides
    assert elect(scores, answers, "weighted", temperature=100.0).answer == "a"  # the majority
    huge = elect([-1e6, -1e6 + 1], ["a", "b"], "weighted")
    assert huge.weight == pytest.approx(math.e / (1 + math.e))


def test_nothing_to_vote_for():
    for method in ("weighted", "majority"):
        ranking = elect([1.0, 2.0], [None, None], method)
        assert (ranking.answer, ranking.weight, ranking.votes) == (None, None, ())
        assert ranking.order == (1, 0)


def test_wrong_calls_are_named():
    with pytest.raises(ValueError, match="expected method best, weighted, majority"):
        elect([1.0], ["a"], "worst")
    with pytest.raises(ValueError, match="needs the completions' answers"):
        elect([1.0], None, "majority")
    with pytest.raises(ValueError, match="expected 2 answers"):
        elect([1.0, 2.0], ["a"], "majority")
    with pytest.raises(ValueError, match="temperature above 0"):
        elect([1.0], ["a"], "weighted", temperature=0.0)
    with pytest.raises(ValueError, match="without a policy"):
        rank([scored(1.0)], "reward")


def test_readers_of_the_tasks_need_no_data():
    assert task_reader("arithmetic")("2+3=5;#5.") == "5"
    assert task_reader("gsm8k")("2 + 3 = 5\n#### 1,005") == "1005"
    assert task_reader("jsonl")("the answer is: Blue.") == "blue"
    with pytest.raises(ValueError, match=r"'chess' is none of .* pass answers="):
        task_reader("chess")


def test_the_scorer_reads_answers(tiny_run):  # noqa: F811
    scorer = RewardScorer.from_pretrained(tiny_run)
    right, wrong = "68+4=72;72+2=74;74+9=83;83-6=77;#77.", "68+4=72;72+2=75;75+9=84;84-6=78;#78."
    ranking = scorer.rerank(PROMPT, [wrong, right, wrong], method="majority")
    assert (ranking.answer, ranking.weight) == ("78", 2 / 3)
    assert ranking.order == (0, 2, 1)
    assert scorer.rerank(PROMPT, [wrong, right, wrong]).answer == "77"
    last = scorer.rerank(PROMPT, [wrong, right], method="majority", answers=lambda text: text[-1:])
    assert (last.answer, last.weight) == (".", 1.0)
    lists = scorer.rerank_all(
        [PROMPT, PROMPT], [[wrong, right], [right]], method="weighted", answers=[["x", None], ["y"]]
    )
    assert [one.answer for one in lists] == ["x", "y"]
    with pytest.raises(ValueError, match="a list of answers for each of 1 prompts"):
        scorer.rerank_all([PROMPT], [[wrong]], method="majority", answers=[["x"], ["y"]])
