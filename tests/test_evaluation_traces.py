"""Separation, bias, calibration and first errors, each against brute force."""

import itertools

import numpy as np
import pytest

from airl_fast.evaluation import auc
from airl_fast.evaluation.calibration import (
    Platt,
    cross_validated,
    platt_fit,
    prompt_folds,
    reliability,
)
from airl_fast.evaluation.separation import (
    correlation,
    difference_at_equal,
    partial_correlation,
    pooled_auc,
    resampled,
    within_auc,
)
from airl_fast.evaluation.steps import (
    best_threshold,
    cross_validated_first_error,
    error_ranks,
    first_below,
    first_error,
)

RNG = np.random.default_rng(0)
PROMPT = RNG.integers(0, 30, size=200)
LABEL = RNG.random(200) < 0.4
SCORE = np.round(RNG.normal(size=200) + 0.8 * LABEL, 1)  # rounded: with equals
LENGTH = RNG.integers(5, 90, size=200) + 20 * LABEL


def pairs_auc(score, label):
    wins = [(a > b) + (a == b) / 2 for a in score[label] for b in score[~label]]
    return np.mean(wins)


def test_pooled_auc_and_its_interval_by_copying_traces():
    got = pooled_auc(SCORE, LABEL, PROMPT, seed=3, n=40)
    assert got.value == pytest.approx(pairs_auc(SCORE, LABEL))
    rng = np.random.default_rng(3)
    names, index = np.unique(PROMPT, return_inverse=True)
    found = []
    for _ in range(40):
        counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)))
        drawn = np.repeat(np.arange(200), counts[index])  # each trace as often as its prompt
        found.append(auc(SCORE[drawn], LABEL[drawn]))
    assert (got.low, got.high) == pytest.approx(tuple(np.quantile(found, [0.025, 0.975])))
    assert got.prompts == len(names)


def test_within_auc_is_the_mean_over_prompts_with_both():
    got = within_auc(SCORE, LABEL, PROMPT, seed=0)
    each = [
        pairs_auc(SCORE[p == PROMPT], LABEL[p == PROMPT])
        for p in set(PROMPT)
        if 0 < LABEL[p == PROMPT].sum() < (p == PROMPT).sum()
    ]
    assert (got.value, got.prompts) == (pytest.approx(np.mean(each)), len(each))
    assert got.low < got.value < got.high
    easy = within_auc(LABEL + PROMPT * 10.0, LABEL, PROMPT, seed=0)  # knows each prompt's ease too
    assert easy.value == 1.0
    with pytest.raises(ValueError, match="no prompt has both"):
        within_auc([1, 2], [True, False], [0, 1], seed=0)


def test_correlations_are_those_of_residuals():
    plain = correlation(SCORE, LENGTH, PROMPT, seed=0, n=200)
    assert plain.value == pytest.approx(np.corrcoef(SCORE, LENGTH)[0, 1])
    assert plain.low < plain.value < plain.high
    design = np.stack([np.ones(200), LABEL], 1)
    left = [y - design @ np.linalg.lstsq(design, y, rcond=None)[0] for y in (SCORE, LENGTH)]
    part = partial_correlation(SCORE, LENGTH, LABEL, PROMPT, seed=0, n=200)
    assert part.value == pytest.approx(np.corrcoef(*left)[0, 1])
    assert part.value < plain.value  # the labels made both larger
    assert np.isnan(correlation(np.ones(200), LENGTH, PROMPT, seed=0, n=5).value)


def test_difference_at_equal_correctness_is_a_regression_coefficient():
    flag = RNG.random(200) < np.where(LABEL, 0.9, 0.5)
    got = difference_at_equal(SCORE, flag, LABEL, PROMPT, seed=0, n=200)
    design = np.stack([np.ones(200), LABEL, flag], 1).astype(float)
    assert got.value == pytest.approx(np.linalg.lstsq(design, SCORE, rcond=None)[0][2])
    assert got.low < got.value < got.high
    everywhere = difference_at_equal(SCORE, np.ones(200), LABEL, PROMPT, seed=0, n=5)
    assert np.isnan(everywhere.value)


def test_resampled_draws_prompts():
    prompts = RNG.normal(size=40)
    got = resampled(prompts.mean(), lambda w: np.average(prompts, weights=w), 40, 0, 2000)
    error = prompts.std() / np.sqrt(40)
    assert got.high - got.low == pytest.approx(2 * 1.96 * error, rel=0.08)


def test_separation_refuses():
    with pytest.raises(ValueError, match="one value per trace"):
        correlation([1, 2], [1], [0, 0], seed=0)
    with pytest.raises(ValueError, match="finite"):
        correlation([1, np.nan], [1, 2], [0, 0], seed=0)


def test_platt_is_the_maximum_of_its_likelihood():
    fit = platt_fit(SCORE * 50 + 7, LABEL)
    n1, n0 = LABEL.sum(), (~LABEL).sum()
    target = np.where(LABEL, (n1 + 1) / (n1 + 2), 1 / (n0 + 2))

    def likelihood(slope, offset):
        p = 1 / (1 + np.exp(-(slope * (SCORE * 50 + 7) + offset)))
        return (target * np.log(p) + (1 - target) * np.log(1 - p)).sum()

    best = likelihood(fit.slope, fit.offset)
    for up, right in itertools.product((-1e-4, 0, 1e-4), repeat=2):
        assert likelihood(fit.slope + up, fit.offset + right) <= best + 1e-12
    assert fit.slope > 0


def test_platt_on_separable_constant_and_huge_scores():
    fit = platt_fit([1.0, 2.0, 3.0, 4.0], [False, False, True, True])
    assert fit(4.0) > 0.7 > 0.3 > fit(1.0)
    flat = platt_fit(np.ones(8), np.arange(8) < 2)
    assert flat(1.0) == pytest.approx((2 * 3 / 4 + 6 * 1 / 8) / 8)  # the mean target
    assert np.isfinite(platt_fit(SCORE * 1e6, LABEL).slope)
    assert Platt(1.0, 0.0)([-1e4, 1e4]).tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="both kinds"):
        platt_fit([1.0, 2.0], [True, True])


def test_cross_validation_never_fits_on_its_own_prompts():
    fold = prompt_folds(PROMPT, seed=1)
    assert all(len(set(fold[p == PROMPT])) == 1 for p in set(PROMPT))
    assert set(fold) == set(range(5))
    got = cross_validated(SCORE, LABEL, PROMPT, seed=1)
    for k in range(5):
        fit = platt_fit(SCORE[fold != k], LABEL[fold != k])
        np.testing.assert_allclose(got[fold == k], fit(SCORE[fold == k]))
    with pytest.raises(ValueError, match="two prompts"):
        prompt_folds([4, 4], seed=0)


def test_reliability_by_hand():
    p, y = np.array([0.05, 0.1, 0.15, 0.95, 1.0]), np.array([0, 0, 1, 1, 1])
    got = reliability(p, y, bins=10)
    assert got.count == [1, 2, 0, 0, 0, 0, 0, 0, 0, 2]
    assert got.accuracy[1] == 0.5
    assert got.probability[9] == pytest.approx(0.975)
    assert np.isnan(got.accuracy[2])
    assert got.ece == pytest.approx((1 * 0.05 + 2 * (0.5 - 0.125) + 2 * 0.025) / 5)
    assert got.brier == pytest.approx(((p - y) ** 2).mean())
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        reliability([1.1], [1])


def steps_of(seed, traces=60):
    rng = np.random.default_rng(seed)
    rows, labels = [], []
    for _ in range(traces):
        size = int(rng.integers(1, 7))
        row = np.round(rng.normal(size=size), 1)
        label = int(rng.integers(0, size)) if rng.random() < 0.5 else -1
        if label >= 0:
            row[label] -= 1.5
        rows.append(row.tolist())
        labels.append(label)
    return rows, np.array(labels)


@pytest.mark.parametrize("seed", range(8))
def test_best_threshold_is_the_best_of_all(seed):
    rows, labels = steps_of(seed)
    got = best_threshold(rows, labels)

    def f1(threshold):
        return first_error([first_below(row, threshold) for row in rows], labels).f1

    scores = sorted({score for row in rows for score in row})
    everything = [*(s + 0.05 for s in scores), scores[0] - 1]
    assert f1(got) == pytest.approx(max(map(f1, everything)))
    assert f1(got) > 0.3


def test_first_error_by_hand():
    got = first_error([0, -1, 2, -1, 1], [0, 1, 2, -1, -1])
    assert (got.accuracy_error, got.accuracy_correct) == (pytest.approx(2 / 3), 0.5)
    assert got.f1 == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))
    assert first_error([-1, -1], [0, -1]).f1 == 0.0
    assert np.isnan(first_error([0], [0]).f1)
    with pytest.raises(ValueError, match="one kind only"):
        best_threshold([[1.0]], [0])
    with pytest.raises(ValueError, match="one prediction per label"):
        first_error([0], [0, 1])


def test_cross_validated_first_error_uses_other_prompts():
    rows, labels = steps_of(5)
    prompts = np.arange(60) // 2
    got = cross_validated_first_error(rows, labels, prompts, seed=2)
    fold = prompt_folds(prompts, seed=2)
    for k in range(5):
        rest = np.flatnonzero(fold != k)
        threshold = best_threshold([rows[i] for i in rest], labels[rest])
        for i in np.flatnonzero(fold == k):
            assert got[i] == first_below(rows[i], threshold)


def test_error_ranks():
    ranks, chance = error_ranks([[3, 1, 2], [1, 1, 5], [4], [1, 2]], [2, 0, 0, -1])
    assert ranks.tolist() == [2, 1.5, 1]
    assert chance.tolist() == [2, 2, 1]
