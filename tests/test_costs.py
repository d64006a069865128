"""The cost model and the fits: counts, laws and known answers. Never times."""

import json
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from airl_fast.packing import Source, pack
from benchmarks import cost_gpus, cost_model, cost_rates, cost_steps, costs, growth, page
from benchmarks.cost_gpus import QWEN_1_5B, Job
from benchmarks.cost_steps import random_model, random_traces
from benchmarks.costs import HeadRate, Rates, Workload
from benchmarks.fits import fit_growth
from benchmarks.packing import ModelShape

SHAPE = ModelShape(vocab=300, hidden=48, inner=80, layers=3, heads=4, kv_heads=2)
WORK = Workload(tokens=900, actions=600, scores=40_000, micro_batches=3)
HEAD = HeadRate(logit=1e-9, weight=2e-9)
RATES = Rates(
    product=2e11,
    product_backward=1.5e11,
    memory=8e9,
    fresh=3e9,
    attention=1e11,
    attention_backward=1.2e11,
    elementwise=2e10,
    elementwise_backward=1e10,
    layer=4e-4,
    layer_backward=1e-3,
    optimiser=6e8,
    optimiser_large=2e8,
    score=HEAD,
    policy=HEAD,
    gradient=HEAD,
)
# seconds are flops: nothing else costs anything
ONLY_FLOPS = Rates(
    **{
        **{name: float("inf") for name in asdict(RATES)},
        **dict.fromkeys(("product", "product_backward", "attention", "attention_backward"), 1.0),
        **dict.fromkeys(("layer", "layer_backward"), 0.0),
        **dict.fromkeys(("score", "policy", "gradient"), HeadRate(0.0, 0.0)),
    }
)
PARTS = (costs.scoring_s, costs.discriminator_update_s, costs.policy_update_s)


# Fits


@pytest.mark.parametrize(("p", "fixed"), list(product((0.5, 1.0, 1.37, 2.0), (0.0, 0.3, 20.0))))
def test_fits_find_the_exponent_beside_a_fixed_part(p: float, fixed: float) -> None:
    x = [16.0, 32.0, 64.0, 128.0, 256.0, 512.0]
    fit = fit_growth(x, [fixed + 0.02 * size**p for size in x])
    assert fit.exponent == pytest.approx(p, abs=2e-3)
    assert fit.low <= p <= fit.high
    assert fit.fixed == pytest.approx(fixed, abs=0.02 * max(fixed, 0.02 * 16**p))
    assert fit.scale == pytest.approx(0.02, rel=0.02)
    assert fit.residual < 1e-3
    if fixed == 0.0:
        assert fit.slope == pytest.approx(p, abs=1e-9)
        assert fit.slope_error < 1e-9


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    x = [float(2**i) for i in range(8)]
    noisy = [[(3.0 + 0.5 * s) * rng.lognormal(0.0, 0.03) for s in x] for _ in range(200)]
    fits = [fit_growth(x, y) for y in noisy]
    # 95%, less three standard errors of 200 draws and what the F test's linearisation may miss
    assert np.mean([fit.low <= 1.0 <= fit.high for fit in fits]) >= 0.88
    assert np.median([fit.high - fit.low for fit in fits]) < 0.5  # and they say something


def test_what_does_not_grow_has_slope_zero() -> None:
    fit = fit_growth([1, 2, 4, 8], [5.0, 5.0, 5.0, 5.0])
    assert fit.slope == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("x", "y"), [([1, 2, 3], [1, 1, 1]), ([1, 2, 4, 8], [1, 2, 0, 3]), ([0, 1, 2, 3], [1] * 4)]
)
def test_fits_refuse_what_has_no_exponent(x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        fit_growth(x, y)


# Counts against torch's flop counter


def _counted(training: bool) -> int:
    """Flops of the linear layers of a tiny trunk on a packed batch."""
    model = random_model(SHAPE)
    batch = pack(_traces(SHAPE))
    model.hidden(batch)  # the first pass holds the fused layers to the model's own
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        hidden = model.hidden(batch)
        if training:
            hidden.sum().backward()
    found = counter.get_flop_counts()["Global"]
    # attention and rotary embeddings are other operations (bmm)
    return sum(n for operation, n in found.items() if str(operation) in ("aten.mm", "aten.addmm"))


def _traces(shape: ModelShape) -> list:
    return random_traces(shape.vocab, 2, 3, 12, 9, spread=0.3)


def test_products_of_a_trunk() -> None:
    work = replace(Workload.of(_traces(SHAPE), 1 << 20), scores=0)
    forward, both = _counted(training=False), _counted(training=True)
    assert costs.trunk_s(SHAPE, work, ONLY_FLOPS) == forward > 0
    # the input of the first layer needs a gradient too: the embedding is trained
    assert costs.trunk_backward_s(SHAPE, work, ONLY_FLOPS) == both - forward


def test_flops_of_attention() -> None:
    """4 E flops a score, 10 backward, by torch's own count of a call whose mask hides nothing."""
    heads, queries, keys, size = 3, 5, 8, 16
    q = torch.randn(1, heads, queries, size, requires_grad=True)
    k, v = (torch.randn(1, heads, keys, size, requires_grad=True) for _ in range(2))
    with FlopCounterMode(display=False) as counter:
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        out = weights @ v
        forward = counter.get_total_flops()
        out.sum().backward()
        backward = counter.get_total_flops() - forward
    count = queries * keys
    shape = ModelShape(vocab=2, hidden=heads * size, inner=1, layers=1, heads=heads, kv_heads=heads)
    work = Workload(0, 0, count, 0)
    assert costs.trunk_s(shape, work, ONLY_FLOPS) == forward
    remade = 2 * heads * count * size  # flash attention makes the scores again
    assert costs.trunk_backward_s(shape, work, ONLY_FLOPS) == backward + remade


def test_products_of_the_head() -> None:
    n, v, d = 24, SHAPE.vocab, SHAPE.hidden
    hidden = torch.randn(n, d, requires_grad=True)
    weight = torch.randn(v, d, requires_grad=True)
    targets = torch.randint(v, (n,))
    with FlopCounterMode(display=False) as counter:
        logp = (hidden @ weight.t()).log_softmax(-1).gather(1, targets[:, None])
        forward = counter.get_total_flops()
        logp.sum().backward()
        both = counter.get_total_flops()
    work = Workload(tokens=0, actions=n, scores=0, micro_batches=0)
    free = HeadRate(0.0, 0.0)
    assert costs.head_s(SHAPE, work, ONLY_FLOPS, 1, free) == forward
    assert costs.head_s(SHAPE, work, ONLY_FLOPS, 3, free) == both  # the policy loss: no more
    # linear_logprob keeps no logits and makes them again
    assert costs.head_s(SHAPE, work, ONLY_FLOPS, 4, free) == both + forward


@pytest.mark.parametrize(("own", "before"), [([7, 600, 1025], [0, 0, 0]), ([5, 40], [11, 700])])
def test_scores_of_attention_by_brute_force(own: list[int], before: list[int]) -> None:
    def causal(length: int) -> int:
        """Blocks of 48 queries and 64 keys that hold a key which one of its queries sees."""
        ends = [min(length, first + 48) for first in range(0, length, 48)]
        return sum((end - 48 * i) * min(length, 64 * -(-end // 64)) for i, end in enumerate(ends))

    counted = costs.attention_scores(np.array(own), np.array(before))
    exact = sum(o * b + causal(o) for o, b in zip(own, before, strict=True))
    assert counted == pytest.approx(exact, rel=0.05)
    if max(own) <= 48:
        assert counted == exact
    least = costs.attention_scores(np.array(own), np.array(before), block=1)
    assert least == sum(o * b + o * (o + 1) // 2 for o, b in zip(own, before, strict=True))


def test_a_batch_is_counted_as_the_learners_cut_it() -> None:
    samples = random_traces(50, 3, 4, 10, 6)
    experts = random_traces(50, 3, 1, 10, 6, source=Source.EXPERT)
    work = Workload.of([*samples, *experts], 1 << 20)
    assert (work.tokens, work.actions, work.micro_batches) == (3 * (10 + 5 * 6), 3 * 5 * 6, 1)
    cut = Workload.of([*samples, *experts], 40)  # one prompt each
    assert (cut.tokens, cut.scores, cut.micro_batches) == (work.tokens, work.scores, 3)


# Laws


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("size", ["vocab", "inner", "layers", "hidden"])
def test_larger_models_take_longer(part, size: str) -> None:
    larger = replace(SHAPE, **{size: 2 * getattr(SHAPE, size)})
    assert part(larger, WORK, RATES) > part(SHAPE, WORK, RATES)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("count", ["tokens", "actions", "scores", "micro_batches"])
def test_larger_batches_take_longer(part, count: str) -> None:
    larger = replace(WORK, **{count: 2 * getattr(WORK, count)})
    assert part(SHAPE, larger, RATES) > part(SHAPE, WORK, RATES)


@pytest.mark.parametrize("rate", sorted(asdict(RATES)))
def test_a_faster_machine_takes_less_time(rate: str) -> None:
    value = getattr(RATES, rate)
    if isinstance(value, HeadRate):
        faster: object = HeadRate(value.logit / 2, value.weight / 2)
    else:
        faster = value / 2 if rate.startswith("layer") else value * 2
    large = replace(SHAPE, vocab=200_000)  # whose embedding is past the cache
    before, after = (
        costs.step_s(large, WORK, WORK, rates)["step"]
        for rates in (RATES, replace(RATES, **{rate: faster}))
    )
    assert after < before


def test_time_is_linear_in_sequences_but_for_the_optimiser() -> None:
    fixed = 2 * costs.optimiser_s(SHAPE, RATES)
    once = costs.step_s(SHAPE, WORK, WORK, RATES)["step"] - fixed
    for factor in (2, 5, 32):
        many = WORK.times(factor)
        assert costs.step_s(SHAPE, many, many, RATES)["step"] - fixed == pytest.approx(
            factor * once, rel=1e-12
        )


def test_a_step_is_the_sum_of_its_phases() -> None:
    parts = costs.step_s(SHAPE, WORK, WORK, RATES)
    assert sum(parts[phase] for phase in costs.PHASES) == pytest.approx(parts["step"])


def test_a_machine_of_half_the_speed_has_half_the_rates() -> None:
    sizes = cost_rates.QUICK
    names = cost_rates._experiments(sizes)
    times = {name: 0.01 * (2 + i) * 1.7**i for i, name in enumerate(names)}
    fast = cost_rates.solve(sizes, times).as_json()
    slow = cost_rates.solve(sizes, {name: 2 * s for name, s in times.items()}).as_json()
    for name, rate in fast.items():
        if isinstance(rate, dict):
            for part, seconds in rate.items():
                assert slow[name][part] == pytest.approx(2 * seconds), (name, part)
        else:
            factor = 2 if name.startswith("layer") else 0.5
            assert slow[name] == pytest.approx(factor * rate), name


def test_rates_survive_json() -> None:
    assert Rates.from_json(json.loads(json.dumps(RATES.as_json()))) == RATES


# GPUs


def test_an_update_is_six_flops_a_weight_and_token() -> None:
    work = Workload(tokens=1000, actions=1000, scores=0)
    flops = cost_gpus.pass_flops(QWEN_1_5B, work, backward=True, head=3)
    assert flops == 6 * costs.all_weights(QWEN_1_5B) * 1000
    assert costs.all_weights(QWEN_1_5B) == pytest.approx(1.54e9, rel=0.01)  # as published


def test_gpus_share_the_products_and_not_the_links() -> None:
    job = Job(name="1.5B", shape=QWEN_1_5B)
    one, many = cost_gpus.predict(job, 8), cost_gpus.predict(job, 1024)
    assert many["compute"] == pytest.approx(one["compute"] / 128)
    assert one["reduce"] == 0.0 < many["reduce"]
    assert many["share of peak"] < one["share of peak"] < cost_gpus.GPU().share
    for row in (one, many):
        assert 0 < row["overlapped"] <= row["not overlapped"]
    larger = cost_gpus.predict(replace(job, prompts=128 * 1024), 1024)
    assert larger["compute"] == pytest.approx(one["compute"])
    assert larger["not overlapped"] == pytest.approx(one["not overlapped"] + larger["reduce"])


def test_gpus_that_cannot_be_filled_are_refused() -> None:
    job = Job(name="1.5B", shape=QWEN_1_5B)
    with pytest.raises(ValueError, match="multiple of 8"):
        cost_gpus.predict(job, 12)
    with pytest.raises(ValueError, match="at most 1024"):
        cost_gpus.predict(job, 2048)
    with pytest.raises(ValueError, match="token_budget of at least 262"):
        cost_gpus.predict(replace(job, token_budget=200), 8)


def test_completions_of_a_prompt_that_do_not_fit_repeat_it() -> None:
    job = Job(name="1.5B", shape=QWEN_1_5B, prompts=8, prompt=100, completion=50, token_budget=250)
    assert job.pieces(1) == 3  # 9 completions, 3 in a micro-batch
    assert job.work(1).tokens == 8 * (3 * 100 + 9 * 50)
    assert job.micro_batches(8) == 3


def test_every_scenario_fits_its_gpus() -> None:
    assert all(row["fits"] for row in [*cost_gpus.scenarios(), *cost_gpus.scaling()])


# The commands and the document


def test_blocks_are_filled_and_words_left_alone() -> None:
    text = "a\n<!-- one -->\nold\n<!-- /one -->\nb\n"
    filled = page.fill(text, {"one": "new"})
    assert filled == "a\n<!-- one -->\n\nnew\n\n<!-- /one -->\nb\n"
    assert page.fill(filled, {"one": "new"}) == filled
    with pytest.raises(ValueError, match="<!-- two -->"):
        page.fill(text, {"two": "new"})


def test_the_document_is_what_was_measured() -> None:
    text = page.DOCUMENT.read_text("utf-8")
    grown = json.loads((page.FOLDER / "growth.json").read_text("utf-8"))
    model = json.loads((page.FOLDER / "cost_model.json").read_text("utf-8"))
    blocks = page.growth_blocks(grown) | page.cost_blocks(model)
    assert page.fill(text, blocks) == text
    worst = max(abs(row["error"]["step"]) for row in model["validation"])
    assert len(model["validation"]) >= 6
    assert worst <= model["allowed"] == cost_model.ALLOWED


def test_validated_shapes_are_not_calibrated_on() -> None:
    sizes = cost_rates.Sizes()
    calibrated = (sizes.reference, sizes.dispatch)
    assert not {step.shape for step in cost_steps.STEPS} & set(calibrated)
    assert len({step.shape for step in cost_steps.STEPS}) == len(cost_steps.STEPS)


def test_quick_cost_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = page.DOCUMENT.read_bytes()
    options = ["--quick", "--threads", "1", "--output-dir", str(tmp_path)]
    assert cost_model.main(["predict", *options]) == 2
    assert "run 'calibrate' first" in capsys.readouterr().err
    assert cost_model.main(options) == 0
    found = json.loads((tmp_path / "cost_model.json").read_text("utf-8"))
    (row,) = found["validation"]
    assert set(row["measured"]) == set(row["predicted"]) == {*costs.PHASES, "step"}
    assert row["seen"]["micro_batches"] == 1
    assert "| tiny |" in (tmp_path / "cost_model.md").read_text("utf-8")
    capsys.readouterr()
    assert cost_model.main(["predict", *options, "--layers", "2", "--prompts", "1"]) == 0
    assert "policy update" in capsys.readouterr().out
    assert page.DOCUMENT.read_bytes() == before


def test_quick_growth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    options = ["--quick", "--threads", "1", "--rounds", "2", "--output-dir", str(tmp_path)]
    for name in ("linear_policy_loss against N", "scoring against G"):
        assert growth.main([*options, "--only", name]) == 0
    found = json.loads((tmp_path / "growth.json").read_text("utf-8"))
    names = [sweep["name"] for sweep in found["sweeps"]]
    assert names == ["linear_policy_loss against N", "scoring against G"]
    for sweep in found["sweeps"]:
        assert len(sweep["points"]) >= 4
        assert all(point["seconds"] > 0 for point in sweep["points"])
        assert sweep["time"]["low"] <= sweep["time"]["exponent"] <= sweep["time"]["high"]
    assert {p.name for p in tmp_path.glob("*.png")} == {"growth-head.png", "growth-model.png"}
    assert "scoring against G" in (tmp_path / "growth.md").read_text("utf-8")


@pytest.mark.parametrize("main", [cost_model.main, growth.main])
def test_quick_numbers_stay_out_of_the_document(main, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick"]) == 2
    assert "--output-dir of its own" in capsys.readouterr().err


def test_unknown_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    assert growth.main(["--only", "nothing"]) == 2
    assert "expected the start of one of: linear_logprob against N" in capsys.readouterr().err
