"""Two and four processes against one: losses, gradients, weights; resuming, failing, refusing."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from airl_fast.discriminator import Discriminator
from airl_fast.distributed import World, join
from airl_fast.guards import load_fault
from airl_fast.packing import Trace
from airl_fast.passes import micro_batches
from airl_fast.policy import Policy
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


def test_what_one_rank_meets_is_skipped_by_all(models, tmp_path):
    given = overrides(models, "full")
    many, failed = in_processes(2, runs.train_over_faults, tmp_path / "two", given)
    assert not failed
    one = runs.train_over_faults(tmp_path / "one", given)
    assert_like(many, one)
    skipped = [set(m) == {"step", "phase", "seconds", "guards/skipped"} for m in many["metrics"]]
    assert skipped == [step in runs.FAULTS for step in range(1, 8)]
    for step, where in runs.FAULTS.items():
        pair = [load_fault(tmp_path / n / "faults" / f"step-{step:06d}") for n in ("two", "one")]
        assert pair[0].traces == pair[1].traces
        for key in ("step", "phase", "update", "error"):
            assert pair[0].report[key] == pair[1].report[key]
        # f of a trace alone is what rank 0 finds, where nothing is wrong with it.
        assert pair[0].report["tensor"] == ("logp" if where == "logp" else None)


@pytest.mark.parametrize("name", ["full", "shared"])
def test_an_audited_run_is_the_same_run(name, models, alone, tmp_path):
    given = [*overrides(models, name), "guards.audit_every=1"]
    many, failed = in_processes(2, train, tmp_path / "run", given)
    assert not failed
    for line in many["metrics"]:
        audited = [line.pop(key) for key in list(line) if key.startswith("audit/")]
        assert audited
        assert all(share < 0.1 for share in audited)
    assert_like(many, alone(name)[0])


def test_drift_on_one_rank_stops_all(models, tmp_path):
    found, failed = in_processes(2, runs.audits, tmp_path, models["full"])
    assert not failed
    assert found[0] == found[1]
    for text, op in zip(
        found[0],
        ("linear_policy_loss", "linear_logprob_backward", "discriminator_loss"),
        strict=True,
    ):
        assert text.startswith(f"AuditError: audit: {op}, backend cpu: ")


def test_weights_that_cannot_be_written_fail_on_all_and_leave_nothing(models, tmp_path):
    found, failed = in_processes(2, runs.writes, models["full"], tmp_path)
    assert not failed
    errors, left, whole = found
    assert errors[0] == errors[1]
    assert errors[0][0].startswith("WriteError: cannot write")
    assert "Not a directory" in errors[0][0]
    assert "No space left on device" in errors[0][1]
    assert errors[0][2] == "no error"
    assert left == []
    saved = Policy.from_pretrained(tmp_path / "full" / "policy").trainable()
    assert all(torch.equal(saved[name], value) for name, value in whole.items())


def test_a_signal_to_one_rank_ends_all_after_the_step(models, tmp_path):
    """As torchrun starts them; its own SIGTERM goes to every rank."""
    many = ["run.steps=995", "run.output_dir=run"]  # it is asked long before the last of them
    given = [*runs.BASE, *overrides(models, "lora"), *many]
    command = [sys.executable, "-u", "-m", "airl_fast", "train", "arithmetic", *given]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    root = str(Path(__file__).parents[1])
    common = {**os.environ, **place, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    ranks = [
        subprocess.Popen(
            command, cwd=tmp_path, env={**common, "RANK": rank, "LOCAL_RANK": rank}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    try:
        assert any(line.startswith("step 1/") for line in ranks[0].stdout)
        ranks[1].send_signal(signal.SIGTERM)
        said = [rank.communicate(timeout=runs.SECONDS)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert 2 <= len(lines) < 1000
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [
        f"step-{len(lines):06d}"
    ]
    assert not (tmp_path / "run" / "policy").exists()
    assert "SIGTERM: finishing the step" in said[1]
    assert all(f"stopped after step {len(lines)} of 1000 and saved it" in text for text in said)


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
