"""Each estimate against enumeration or a formula written another way."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airl_fast.evaluation import (
    auc,
    best_of_n,
    binomial_interval,
    bootstrap_interval,
    locate_accuracy,
    majority_vote,
    paired_bootstrap,
    paired_bootstrap_of_runs,
    pass_at_k,
    weighted_vote,
)

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 1), (6, 3), (7, 7)])
def test_pass_at_k_is_the_share_of_subsets_with_a_hit(n, k):
    for c in range(n + 1):
        samples = [True] * c + [False] * (n - c)
        subsets = list(itertools.combinations(samples, k))
        assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(s) for s in subsets]), abs=1e-12)


def test_pass_at_k_takes_arrays_and_large_counts():
    got = pass_at_k(10_000, np.array([0, 1, 10_000]), 100)
    np.testing.assert_allclose(got, [0.0, 0.01, 1.0], rtol=1e-12)
    c = np.array([[3, 0], [2, 5]])
    assert pass_at_k(5, c, 1).shape == (2, 2)
    np.testing.assert_allclose(pass_at_k(5, c, 1), c / 5)


@pytest.mark.parametrize(
    ("n", "c", "k"), [(4, 2, 5), (4, 2, 0), (4, 5, 1), (4, -1, 1), (4, 0.5, 1)]
)
def test_pass_at_k_refuses(n, c, k):
    with pytest.raises(ValueError, match="expected"):
        pass_at_k(n, c, k)


def _best_of_n_by_enumeration(correct, score, k):
    def pick(subset):
        best = max(score[i] for i in subset)
        return np.mean([correct[i] for i in subset if score[i] == best])

    return np.mean([pick(s) for s in itertools.combinations(range(len(correct)), k)])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=7),
    st.data(),
)
def test_best_of_n_is_the_mean_over_subsets(samples, data):
    correct, score = [s[0] for s in samples], [s[1] for s in samples]
    k = data.draw(st.integers(1, len(samples)))
    expected = _best_of_n_by_enumeration(correct, score, k)
    assert best_of_n([correct], [score], [k])[0, 0] == pytest.approx(expected, abs=1e-12)


def test_best_of_n_ends_are_a_random_pick_and_the_top():
    correct = RNG.random((9, 16)) < 0.4
    score = RNG.normal(size=(9, 16))
    curve = best_of_n(correct, score, [1, 16])
    np.testing.assert_allclose(curve[:, 0], correct.mean(1))
    np.testing.assert_allclose(curve[:, 1], correct[np.arange(9), score.argmax(1)])
    oracle = best_of_n(correct, correct.astype(float), [1, 4, 16])
    np.testing.assert_allclose(
        oracle, np.stack([pass_at_k(16, correct.sum(1), k) for k in (1, 4, 16)], 1)
    )


def test_best_of_n_refuses():
    with pytest.raises(ValueError, match="draw more samples"):
        best_of_n([[1, 0]], [[0.1, 0.2]], [3])
    with pytest.raises(ValueError, match="not finite"):
        best_of_n([[1, 0]], [[0.1, float("nan")]], [1])
    with pytest.raises(ValueError, match="one shape"):
        best_of_n([[1, 0]], [[0.1]], [1])


def test_majority_vote():
    answers = [["a", "b", "b", None], ["a", "b", "b", "a"], [None, None, None, None]]
    correct = [[1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]]
    assert majority_vote(answers, correct).tolist() == [0, 0, 0]  # tie: a came first
    score = [[0] * 4, [0.1, 5.0, -4.0, 0.2], [0] * 4]
    assert majority_vote(answers, correct, ties="score", score=score).tolist() == [0, 1, 0]
    assert majority_vote([["x", "x"]], [[1, 0]]).tolist() == [0.5]  # right answer, wrong method


def test_weighted_vote():
    answers, correct = [["a", "b", "b"]], [[1, 0, 0]]
    assert weighted_vote(answers, correct, [[1, 1, 1]]).tolist() == [0]
    assert weighted_vote(answers, correct, [[1, 0.4, 0.4]]).tolist() == [1]
    assert weighted_vote(answers, correct, [[1, 0.5, 0.5]]).tolist() == [1]  # tie: first
    with pytest.raises(ValueError, match="softmax"):
        weighted_vote(answers, correct, [[1, -1, 1]])


def test_votes_refuse_ragged_answers_and_contradictions():
    with pytest.raises(ValueError, match="shape of correct"):
        majority_vote([["a"]], [[1, 0]])
    with pytest.raises(ValueError, match="ties='score'"):
        majority_vote([["a"]], [[1]], ties="score")
    with pytest.raises(ValueError, match="ties='score'"):
        majority_vote([["a"]], [[1]], score=[[1.0]])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=25))
def test_auc_is_the_share_of_ordered_pairs(pairs):
    score, label = [p[0] for p in pairs], [p[1] for p in pairs]
    if len(set(label)) == 1:
        with pytest.raises(ValueError, match="both labels"):
            auc(score, label)
        return
    positives = [s for s, y in pairs if y]
    negatives = [s for s, y in pairs if not y]
    wins = [(a > b) + 0.5 * (a == b) for a in positives for b in negatives]
    assert auc(score, label) == pytest.approx(np.mean(wins), abs=1e-12)


def test_auc_refuses():
    with pytest.raises(ValueError, match="finite"):
        auc([1.0, float("inf")], [0, 1])
    with pytest.raises(ValueError, match="0 and 1"):
        auc([1.0, 2.0], [1, 2])


def test_bootstrap_interval_matches_the_normal_approximation():
    values = RNG.normal(3.0, 2.0, size=400)
    low, high = bootstrap_interval(values, seed=1)
    error = values.std() / math.sqrt(values.size)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.25 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.25 * error)
    assert (low, high) == bootstrap_interval(values, seed=1)
    assert (low, high) != bootstrap_interval(values, seed=2)
    narrow = bootstrap_interval(values, seed=1, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert bootstrap_interval([0.5], seed=0) == (0.5, 0.5)


def test_paired_bootstrap_sees_what_unpaired_intervals_hide():
    problem = RNG.normal(0, 10, size=200)  # problems differ far more than the methods do
    a, b = problem + 0.5 + RNG.normal(0, 1, 200), problem + RNG.normal(0, 1, 200)
    result = paired_bootstrap(a, b, seed=0)
    assert result.difference == pytest.approx((a - b).mean())
    assert 0 < result.low < result.difference < result.high
    assert result.p_value < 0.01
    same = paired_bootstrap(a, a, seed=0)
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    back = paired_bootstrap(b, a, seed=0)
    assert back.low == pytest.approx(-result.high)
    with pytest.raises(ValueError, match="per problem"):
        paired_bootstrap([1.0], [1.0, 2.0], seed=0)


def test_runs_are_resampled_and_then_their_problems():
    a = [RNG.normal(0.5, 1, 200), RNG.normal(0.5, 1, 300)]
    b = [np.zeros(200), np.zeros(300)]
    one = paired_bootstrap_of_runs(a[:1], b[:1], seed=3)
    plain = paired_bootstrap(a[0], b[0], seed=3)
    assert one.difference == pytest.approx(plain.difference)
    assert (one.low, one.high) == pytest.approx((plain.low, plain.high), abs=0.02)
    both = paired_bootstrap_of_runs(a, b, seed=3)
    assert both.difference == pytest.approx((a[0].mean() + a[1].mean()) / 2)
    # Runs that differ and problems that do not: the intervals are those of the runs alone. Of two,
    # a quarter of the resamples has the lower one twice.
    runs = paired_bootstrap_of_runs([[0.0] * 5, [1.0] * 5], [[0.0] * 5] * 2, seed=0)
    assert (runs.low, runs.difference, runs.high) == (0.0, 0.5, 1.0)
    # The variance of the mean of R means of P: that over runs and that within them, over R (enough
    # runs for their mean to be normal).
    apart = [RNG.normal(centre, 2, 20) for centre in np.linspace(-1, 1, 30)]
    wide = paired_bootstrap_of_runs(apart, [np.zeros(20)] * 30, seed=1, n=5000)
    means = [d.mean() for d in apart]
    std = ((np.var(means) + np.mean([d.var() / 20 for d in apart])) / 30) ** 0.5
    assert wide.high - wide.low == pytest.approx(2 * 1.96 * std, rel=0.05)
    with pytest.raises(ValueError, match="as many runs"):
        paired_bootstrap_of_runs(a, b[:1], seed=0)
    with pytest.raises(ValueError, match="same problems"):
        paired_bootstrap_of_runs([[1.0]], [[1.0, 2.0]], seed=0)


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (10, 10), (500, 1319)])
def test_wilson_interval_solves_its_equation(successes, trials):
    # The bounds are the p at which the score statistic is exactly z (the definition).
    z = 1.959963984540054
    for bound in binomial_interval(successes, trials):
        gap = (successes / trials - bound) ** 2
        assert gap == pytest.approx(z * z * bound * (1 - bound) / trials, abs=1e-12)
    low, high = binomial_interval(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1


def test_intervals_refuse():
    with pytest.raises(ValueError, match="successes"):
        binomial_interval(3, 2)
    with pytest.raises(ValueError, match=r"0\.95"):
        binomial_interval(1, 2, level=95)
    with pytest.raises(ValueError, match="finite"):
        bootstrap_interval([1.0, float("nan")], seed=0)


def test_locate_accuracy():
    scores = [[0.0, -3.0, 1.0], [-1.0, 2.0], [0.0, 0.0, 0.0, 0.0]]
    result = locate_accuracy(scores, [1, 1, 2])
    assert result.hits.tolist() == [1, 0, 0.25]
    assert result.accuracy == pytest.approx(1.25 / 3)
    assert result.chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 4) / 3)


def test_locate_accuracy_of_noise_is_chance():
    lengths = RNG.integers(1, 7, size=4000)
    result = locate_accuracy(
        [RNG.normal(size=length) for length in lengths], [int(RNG.integers(n)) for n in lengths]
    )
    assert result.accuracy == pytest.approx(result.chance, abs=0.03)


@pytest.mark.parametrize(
    ("scores", "errors"), [([[0.0]], [-1]), ([[0.0]], [1]), ([[0.0]], []), ([], [])]
)
def test_locate_accuracy_refuses(scores, errors):
    with pytest.raises(ValueError, match="expected"):
        locate_accuracy(scores, errors)
