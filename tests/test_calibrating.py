"""Calibration against brute force over every threshold, and against data whose truth is known."""

import json
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airl_fast.calibrating import LabelledSteps, _best_threshold, _platt, calibrate
from airl_fast.calibration import Calibration, Curve, Rule, step_values


def decided(values, rule, threshold):
    """The rule in plain words."""
    below = [i for i, value in enumerate(values) if value < threshold]
    if not below:
        return -1
    return below[0] if rule == "first" else min(range(len(values)), key=lambda i: values[i])


def f1(rows, labels, rule, threshold):
    right = [
        decided(row, rule, threshold) == label for row, label in zip(rows, labels, strict=True)
    ]
    wrong_traces = [r for r, label in zip(right, labels, strict=True) if label >= 0]
    good_traces = [r for r, label in zip(right, labels, strict=True) if label < 0]
    a, b = np.mean(wrong_traces), np.mean(good_traces)
    return 2 * a * b / (a + b) if a + b else 0.0


@st.composite
def labelled_rows(draw):
    rows = draw(
        st.lists(
            st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=5), min_size=2, max_size=8
        )
    )
    labels = [draw(st.integers(-1, len(row) - 1)) for row in rows]
    labels[0], labels[1] = -1, min(labels[1] % len(rows[1]), len(rows[1]) - 1)
    return rows, labels


@given(labelled_rows(), st.sampled_from(get_args(Rule)))
@settings(max_examples=80, deadline=None)
def test_no_threshold_is_better(data, rule):
    rows, labels = data
    best, threshold = _best_threshold([np.array(row) for row in rows], labels, rule)
    assert best == pytest.approx(f1(rows, labels, rule, threshold))
    values = sorted({value for row in rows for value in row})
    tries = [values[0] - 1, *values, *(np.array(values) + 0.5), values[-1] + 1]
    assert best == pytest.approx(max(f1(rows, labels, rule, t) for t in tries))


def traces(count, seed, drop=4.0):
    """Steps whose mean f depends on their length; a wrong step is lower by ``drop`` a token."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        tokens = rng.integers(3, 30, size=rng.integers(2, 7))
        per_token = rng.normal(-1.0, 1.0, size=len(tokens))
        label = -1
        if i % 2:
            label = int(rng.integers(len(tokens)))
            per_token[label] -= drop
        made.append(
            LabelledSteps(
                f=tuple((per_token * tokens).tolist()),
                num_tokens=tuple(tokens.tolist()),
                label=label,
            )
        )
    return made


def test_the_value_that_knows_lengths_is_chosen_and_holds_on_fresh_traces():
    made = calibrate(traces(200, seed=0))
    assert made.decider.value == "f per token"
    assert (made.traces, made.erroneous) == (200, 100)
    fresh = traces(1000, seed=1)
    decisions = [made.decider.decide(t.f, t.num_tokens) for t in fresh]
    right = np.array(
        [
            (-1 if step is None else step) == t.label
            for (step, _, _), t in zip(decisions, fresh, strict=True)
        ]
    )
    kinds = np.array([t.label >= 0 for t in fresh])
    a, b = right[kinds].mean(), right[~kinds].mean()
    assert made.held_out.f1 == pytest.approx(2 * a * b / (a + b), abs=0.08)
    confidence = np.array([c for _, c, _ in decisions])
    assert confidence.mean() == pytest.approx(right.mean(), abs=0.06)
    surest = np.argsort(-confidence)[:300]
    assert right[surest].mean() > right.mean()
    assert made.held_out.calibration_error < 0.15


def test_labels_that_mean_nothing_are_found_out_by_the_cross_validation():
    noise = traces(120, seed=2, drop=0.0)
    made = calibrate(noise)
    assert made.held_out.f1 < 0.45
    assert made.held_out.f1 < made.fitted.f1


def test_confidence_never_falls_with_the_distance_and_recovers_a_known_curve():
    rng = np.random.default_rng(3)
    distance = rng.uniform(0, 4, size=20000)
    right = rng.random(20000) < 1 / (1 + np.exp(-(-1.0 + 1.5 * distance)))
    curve = _platt(np.stack([distance, right.astype(float)], 1))
    assert (curve.a, curve.b) == pytest.approx((-1.0, 1.5), abs=0.1)
    falling = _platt(np.stack([distance, (~right).astype(float)], 1))
    assert falling.b == 0
    assert falling(1.0) == pytest.approx((~right).mean(), abs=1e-3)
    assert _platt(np.zeros((0, 2)))(1.0) == 0.5  # nothing is known
    separable = _platt(np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 1.0]]))
    assert 0 < separable(0.0) < separable(2.0) < 1


def test_values():
    f, tokens = (-6.0, -2.0, -8.0), (3, 1, 2)
    assert step_values("f", f, tokens).tolist() == [-6, -2, -8]
    assert step_values("f per token", f, tokens).tolist() == [-2, -2, -4]
    assert step_values("centred f", f, tokens).tolist() == [0, 4, -2]
    assert step_values("centred f per token", f, tokens).tolist() == [0, 0, -2]


def test_it_survives_a_file_and_says_what_is_none(tmp_path):
    made = calibrate(traces(60, seed=4), folds=3, seed=5, weights="abc")
    made.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == made
    assert "3-fold" in made.summary()
    values = json.loads((tmp_path / "calibration.json").read_text())
    last = {**values["decider"], "rule": "last"}
    damages = [{**values, "format": 2}, {"format": 1}, {**values, "decider": last}]
    for damaged in ("{", "[]", *map(json.dumps, damages)):
        (tmp_path / "calibration.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"is no calibration .*airl-fast calibrate"):
            Calibration.load(tmp_path / "calibration.json")


def test_what_cannot_be_fitted_is_named():
    good = traces(40, seed=6)
    with pytest.raises(ValueError, match="10 traces or more with an error"):
        calibrate([t for t in good if t.label < 0])
    with pytest.raises(ValueError, match="trace 3: expected a label from -1"):
        calibrate([*good[:3], replace(good[3], label=99)])
    with pytest.raises(ValueError, match="trace 0: expected finite f"):
        calibrate([replace(good[0], f=(float("nan"),) * len(good[0].f)), *good[1:]])
    with pytest.raises(ValueError, match="folds"):
        calibrate(good, folds=1)


def test_a_curve_does_not_overflow():
    assert Curve(a=-2000.0, b=1.0)(0.0) == 0.0
    assert Curve(a=2000.0, b=1.0)(0.0) == 1.0
