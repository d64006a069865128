"""The linear probes of the study: their optimum, and what they can and cannot find."""

import json

import numpy as np
import pytest
import torch

from airl_fast.evaluation import auc
from studies import mmlu_pro_probe
from studies.mmlu_pro_data import MODELS
from studies.mmlu_pro_probe import fit, probe
from tests.test_study_mmlu_pro import data, model  # noqa: F401  # fixtures


def test_the_fit_is_where_the_gradient_is_zero():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=generator)
    y = (torch.rand(60, generator=generator) < 0.3).float()
    theta = fit(x, y, 0.01).double().numpy()
    a, t = x.double().numpy(), y.double().numpy()
    p = 1 / (1 + np.exp(-(a @ theta[:-1] + theta[-1])))
    share = np.where(t == 1, 0.5 / t.sum(), 0.5 / (1 - t).sum())
    assert abs(a.T @ (share * (p - t)) + 2 * 0.01 * theta[:-1]).max() < 1e-4
    assert abs((share * (p - t)).sum()) < 1e-4


@pytest.mark.parametrize("separable", [True, False])
def test_a_probe_finds_what_is_there(separable):
    generator = torch.Generator().manual_seed(1)
    x = 3 * torch.randn(160, 4, 8, generator=generator) + 1
    label = torch.rand(160, 4, generator=generator) < 0.25
    if separable:
        label = x[..., 0] + x[..., 1] > 5
    scores, ridge = probe(x[:120], label[:120].float(), x[120:])
    assert ridge > 0
    value = auc(scores.ravel(), label[120:].numpy().ravel())
    assert value > 0.99 if separable else 0.3 < value < 0.7


def test_the_command(model, data, tmp_path):  # noqa: F811
    options = ["--sizes", "6", "10", "--test", "12", "--output", str(tmp_path)]
    assert mmlu_pro_probe.main(["--data", str(data), "--model", str(model), *options]) == 0
    found = json.loads((tmp_path / "probe.json").read_text())
    assert [(one["trained_on"], one["questions"]) for one in found] == [
        ("the expert's answers", 6), ("the expert's answers", 10), ("right answers", 6),
        ("right answers", 10),
    ]  # fmt: skip
    assert set(found[0]["measured"]["auc_within_model"]) == set(MODELS)
    assert (tmp_path / "probe.md").read_text().count("\n") == 8
