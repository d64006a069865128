"""Two and four processes against one: losses, gradients, weights; resuming, failing, refusing."""

from types import SimpleNamespace

import pytest
import torch

from airl_fast.config import load_config
from airl_fast.distributed import World, join, refuse_alone
from airl_fast.models import Discriminator, Policy
from airl_fast.packing import Trace
from airl_fast.passes import micro_batches
from tests import distributed_runs as runs
from tests.distributed_runs import in_processes, train, write_model

LORA = ["policy.lora_rank=3", "discriminator.lora_rank=3"]
CASES = {
    "full": [],
    "lora": LORA,
    "shared": [
        *LORA,
        "discriminator.trunk=shared",
        "algorithm.reward=f-logp",
        "algorithm.policy_updates=2",
        "algorithm.kl_beta=0.1",
        "run.steps=2",
        "algorithm.sft_warmup=1",
        "discriminator.warmup_updates=1",
    ],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a model with tied embeddings for full weights, and of a smaller one for LoRA."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "full": write_model(folder / "tied", layers=2, tied=True),
        "lora": write_model(folder / "untied", layers=1, tied=False),
    }


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory):
    """The runs of one process, each made once."""
    made = {}

    def run(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = train(folder / "run", overrides(models, name)), folder / "run"
        return made[name]

    return run


def overrides(models, name):
    return [f"policy.model={models['full' if name == 'full' else 'lora']}", *CASES[name]]


def assert_like(many, one):
    """Every metric, gradient and weight within float tolerance."""
    assert len(many["metrics"]) == len(one["metrics"])
    for got, expected in zip(many["metrics"], one["metrics"], strict=True):
        assert set(got) == set(expected)
        for key in set(got) - {"seconds", "phase"}:
            assert got[key] == pytest.approx(expected[key], rel=1e-3, abs=2e-5), (got["step"], key)
    assert len(many["gradients"]) == len(one["gradients"])
    for pair in zip(many["gradients"], one["gradients"], strict=True):
        for got, expected in zip(*pair, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)
    assert set(many["weights"]) == set(one["weights"])
    for name, expected in one["weights"].items():
        torch.testing.assert_close(many["weights"][name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "size"), [("full", 2), ("full", 4), ("lora", 2), ("lora", 4), ("shared", 2)]
)
def test_processes_together_do_what_one_does(name, size, models, alone, tmp_path):
    many, failed = in_processes(size, train, tmp_path / "run", overrides(models, name))
    assert not failed
    one, _ = alone(name)
    assert_like(many, one)
    for kind, made in (("policy", Policy), ("disc", Discriminator)):
        folder = tmp_path / "run" / {"policy": "policy", "disc": "reward"}[kind]
        saved = list(made.from_pretrained(folder).trainable().values())
        weights = [v for k, v in many["weights"].items() if k.startswith(f"{kind}.")]
        assert len(saved) == len(weights)
        for got, expected in zip(saved, weights, strict=True):
            assert torch.equal(got, expected)


def test_a_run_goes_on_with_another_number_of_processes(models, alone, tmp_path):
    one, _ = alone("shared")
    run, given = tmp_path / "run", overrides(models, "shared")
    train(run, given, steps=2)
    _, failed = in_processes(2, train, run, given, 3)
    assert not failed
    last = train(run, given)
    assert [m["step"] for m in last["metrics"]] == [1, 2, 3, 4]
    assert_like({**last, "gradients": []}, {**one, "gradients": []})


def test_a_rank_that_fails_ends_the_others(models, tmp_path):
    _, failed = in_processes(
        2, runs.train_until_one_fails, tmp_path / "run", overrides(models, "lora")
    )
    assert set(failed) == {0, 1}
    assert failed[1].startswith("RuntimeError: planted")
    assert "did not end" not in failed[0]


def test_what_ranks_do_not_share_is_refused_on_all_of_them(models, tmp_path):
    found, failed = in_processes(2, runs.refusals, models["lora"], tmp_path / "run")
    assert not failed
    for mine in found:
        assert "the same data, but ranks [1] differ" in mine["same"]
        assert "the same weights, but ranks [1] differ" in mine["weights"]
        assert "has no layer of the classes ['NoSuchLayer']" in mine["layers"]
        assert mine["first"] == "ValueError: of rank 0"
        assert "where every machine sees the same files" in mine["folder"]


def test_operators_on_a_sharded_head(models):
    found, failed = in_processes(2, runs.operators, models["full"])
    assert not failed
    values, gradients, norms, clipped, samples = found
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert norms[0] > 0.5
    for one, many in (gradients, clipped):
        for name, expected in one.items():
            torch.testing.assert_close(many[name], expected, rtol=1e-4, atol=1e-6)
    assert [r.completion for r in samples[0]] == [r.completion for r in samples[1]]


# Without other processes


@pytest.mark.parametrize(
    ("variables", "device", "error"),
    [
        ({"WORLD_SIZE": "2"}, "cpu", "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"),
        ({}, "cuda:1", "run.device=cuda:1 names one device for 2 processes: set run.device=cuda"),
        ({}, "cuda", "LOCAL_RANK=1 has no GPU of its own: this machine shows 0"),
    ],
)
def test_processes_that_cannot_be_joined_are_refused(variables, device, error, monkeypatch):
    set_by_torchrun = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    for name in set_by_torchrun:
        monkeypatch.delenv(name, raising=False)
    for name, value in (variables or set_by_torchrun).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=error):
        join(device)


def test_a_lone_process_is_a_world_of_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = join("cpu")
    assert (world.rank, world.size, world.first) == (0, 1, True)
    assert not torch.distributed.is_initialized()
    values = torch.arange(3.0)
    assert torch.equal(world.sum_(values), torch.arange(3.0))
    assert world.share([1, 2, 3]) == [1, 2, 3]
    assert world.gather("a") == ["a"]


@pytest.mark.parametrize(("count", "size"), [(1, 4), (3, 4), (7, 2), (9, 4), (8, 1)])
def test_every_rank_makes_as_many_passes_and_every_trace_counts_once(count, size):
    traces = [
        Trace(prompt=(1, 2 + i), completion=(3,) * (1 + i % 3), span_lengths=(1 + i % 3,))
        for i in range(count)
    ]
    given = []
    for rank in range(size):
        model = SimpleNamespace(world=World(rank, size), device=torch.device("cpu"))
        given.append(list(micro_batches(traces, 8, model)))
    assert len({len(batches) for batches in given}) == 1
    seen = [i for batches in given for indices, _, weight in batches if weight for i in indices]
    assert sorted(seen) == list(range(count))
    for batches in given:
        for indices, batch, weight in batches:
            assert weight in (0.0, 1.0)
            assert batch.num_tokens <= 8
            assert batch.unpack() == [traces[i] for i in indices]


@pytest.mark.parametrize("key", ["guards.non_finite=skip", "guards.audit_every=2"])
def test_what_one_rank_would_do_alone_is_refused(key):
    config = load_config("arithmetic", [key])
    refuse_alone(config, World())
    with pytest.raises(ValueError, match=f"{key} with 2 processes"):
        refuse_alone(config, World(0, 2))
