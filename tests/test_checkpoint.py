"""Checkpoints: exact round trips, and every way a process or a disk can cut one short."""

import json
import logging
import os
import subprocess
import sys
import time

import pytest
import torch

from airl_fast.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from airl_fast.optimizer_state import flatten_optimizer, restore_optimizer


def tensors():
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(6, 5, generator=generator)
    return {
        "f32": torch.tensor([1e-45, -0.0, float("inf"), float("nan"), 1 / 3]),
        "bf16": wide.to(torch.bfloat16),
        "transposed": torch.randn(3, 4, generator=generator).T,
        "int64": torch.tensor([2**62 + 1, -1]),
        "uint8": torch.get_rng_state(),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
    }


STATE = {
    "step": 20,
    "lr": 0.1 + 0.2,
    "best": float("-inf"),
    "nested": {"seeds": [1, 2**63], "name": "é\n", "none": None, "on": True},
}


def bits(tensor):
    return (
        tensor.contiguous().view(-1).view(torch.uint8)
        if tensor.dim()
        else tensor.view(1).view(torch.uint8)
    )


def test_round_trip_is_exact(tmp_path):
    saved = tensors()
    path = save_checkpoint(tmp_path / "new" / "run", 20, saved, STATE, keep=2)
    assert path.name == "step-000020"
    assert sorted(p.name for p in path.iterdir()) == [
        "manifest.json",
        "state.json",
        "tensors.safetensors",
    ]
    loaded, state = load_checkpoint(path)
    assert state == STATE
    assert loaded.keys() == saved.keys()
    for name, tensor in saved.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(bits(loaded[name]), bits(tensor)), name


def test_keeps_all_while_there_are_fewer_than_asked_for(tmp_path):
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, {}, {"step": step}, keep=7)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"step-{step:06d}" for step in range(1, 6)
    ]


def test_keeps_the_newest_and_the_one_just_written(tmp_path):
    for step in (10, 9, 100, 1_000_000):
        save_checkpoint(tmp_path, step, {}, {"step": step}, keep=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-000010",
        "step-000100",
        "step-1000000",
    ]
    assert latest_checkpoint(tmp_path).name == "step-1000000"
    save_checkpoint(tmp_path, 1, {}, {}, keep=1)  # an older step, but the one just written
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, 5, {"a": torch.zeros(2)}, {}, keep=2)
    save_checkpoint(tmp_path, 5, {"a": torch.ones(2)}, {}, keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000005"]
    assert load_checkpoint(tmp_path / "step-000005")[0]["a"].tolist() == [1, 1]


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}")
    (tmp_path / "step-notes").mkdir()
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {}, {}, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "metrics.jsonl",
        "step-000002",
        "step-notes",
    ]


def test_no_checkpoint_is_none(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "absent") is None


def test_a_half_written_folder_is_passed_over_and_cleaned_up(tmp_path):
    save_checkpoint(tmp_path, 1, {"a": torch.ones(1)}, {}, keep=5)
    partial = tmp_path / "step-000002.tmp-4242"
    partial.mkdir()
    (partial / "tensors.safetensors").write_bytes(b"half")
    assert latest_checkpoint(tmp_path).name == "step-000001"
    assert partial.exists()  # reading deletes nothing
    save_checkpoint(tmp_path, 3, {}, {}, keep=5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001", "step-000003"]


def truncate(path):
    file = path / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    return "tensors.safetensors has"


def alter_a_byte(path):
    file = path / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return "SHA-256 of tensors.safetensors"


def alter_the_state(path):
    file = path / "state.json"
    file.write_text(file.read_text().replace("20", "21"))
    return "SHA-256 of state.json"


def lose_a_file(path):
    (path / "state.json").unlink()
    return "state.json is missing"


def lose_the_manifest(path):
    (path / "manifest.json").unlink()
    return "no manifest.json"


def cut_the_manifest(path):
    (path / "manifest.json").write_text('{"format": 1, "fi')
    return "manifest.json"


def empty_the_manifest(path):
    (path / "manifest.json").write_text('{"format": 1, "files": {}}')
    return "omits tensors.safetensors"


DAMAGE = [
    truncate,
    alter_a_byte,
    alter_the_state,
    lose_a_file,
    lose_the_manifest,
    cut_the_manifest,
    empty_the_manifest,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, caplog, damage):
    for step in (10, 20):
        save_checkpoint(tmp_path, step, {"a": torch.arange(8)}, {"step": step, "x": 20}, keep=2)
    message = damage(tmp_path / "step-000020")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "step-000020")
    with caplog.at_level(logging.WARNING, logger="airl_fast.checkpoint"):
        assert latest_checkpoint(tmp_path).name == "step-000010"
    assert "step-000020" in caplog.text
    assert message in caplog.text
    damage(tmp_path / "step-000010")
    with pytest.raises(CheckpointError, match=r"every checkpoint.*step-000020, step-000010"):
        latest_checkpoint(tmp_path)


def test_a_later_format_is_refused_by_name(tmp_path):
    path = save_checkpoint(tmp_path, 1, {}, {}, keep=1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99, expected 1"):
        verify_checkpoint(path)


def test_shared_tensors_are_refused(tmp_path):
    weight = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"'a' and 'b' share memory.*clone"):
        save_checkpoint(tmp_path, 1, {"a": weight, "b": weight[1:3]}, {}, keep=1)
    assert list(tmp_path.iterdir()) == []
    halves = {"a": weight[:2], "b": weight[2:]}  # one storage, nothing in common
    loaded, _ = load_checkpoint(save_checkpoint(tmp_path, 1, halves, {}, keep=1))
    assert torch.equal(loaded["b"], weight[2:])


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"a": {"b": (1, 2)}}, r"state\.a\.b.*tuple"),
        ({"a": {1: 2}}, r"state\.a: expected string keys, got 1"),
        ({"a": [torch.ones(1)]}, r"state\.a\[0\].*Tensor"),
    ],
)
def test_state_that_json_would_change_is_refused(tmp_path, state, where):
    with pytest.raises(ValueError, match=where):
        save_checkpoint(tmp_path, 1, {}, state, keep=1)


def test_tensors_without_data_are_refused(tmp_path):
    with pytest.raises(ValueError, match="dense tensor"):
        save_checkpoint(tmp_path, 1, {"a": torch.empty(2, device="meta")}, {}, keep=1)
    with pytest.raises(ValueError, match="keep >= 1"):
        save_checkpoint(tmp_path, 1, {}, {}, keep=0)


def test_an_unwritable_folder_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write .*step-000001.*choose another"):
        save_checkpoint(blocked / "run", 1, {}, {}, keep=1)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write to a read-only folder")
def test_a_read_only_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match=r"Permission denied.*choose another"):
            save_checkpoint(tmp_path, 1, {}, {}, keep=1)
    finally:
        tmp_path.chmod(0o700)


def test_a_full_disk_leaves_the_last_checkpoint_and_no_rubbish(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"a": torch.ones(1)}, {}, keep=1)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("airl_fast.checkpoint.save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(tmp_path, 2, {}, {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


SAVE_FOREVER = """
import sys, torch
from pathlib import Path
from airl_fast.checkpoint import save_checkpoint
for step in range(1, 10**9):
    tensors = {"a": torch.full((300_000,), float(step))}
    save_checkpoint(Path(sys.argv[1]), step, tensors, {"step": step}, keep=2)
"""


def test_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    for attempt in range(4):
        directory = tmp_path / str(attempt)
        process = subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, str(directory)])
        deadline = time.monotonic() + 60
        while not (directory / "step-000003").exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.0037 * attempt)
        process.kill()
        process.wait()
        whole = [verify_checkpoint(path) for path in directory.glob("step-??????")]
        assert 2 <= len(whole) <= 3  # the new one is in place before the oldest goes
        loaded, state = load_checkpoint(latest_checkpoint(directory))
        assert torch.equal(loaded["a"], torch.full((300_000,), float(state["step"])))


def model_and_optimizer(dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).to(dtype)
    groups = [
        {"params": model[0].parameters(), "lr": 1e-2},
        {"params": model[1].parameters(), "weight_decay": 0.3},
    ]
    return model, torch.optim.AdamW(groups, lr=1e-3, betas=(0.8, 0.97), **options)


def train(model, optimizer, steps):
    generator = torch.Generator().manual_seed(1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    for _ in range(steps):
        x = torch.randn(5, 3, generator=generator).to(model[0].weight.dtype)
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.bfloat16},
        {"amsgrad": True},
        {"fused": True},
        {"foreach": True},
    ],
)
def test_optimizer_resumes_bit_for_bit(tmp_path, options):
    model, optimizer = model_and_optimizer(**options)
    train(model, optimizer, 3)
    moments, scalars = flatten_optimizer(optimizer, "policy.optimizer")
    assert moments["policy.optimizer.0.step"].item() == 3
    assert scalars["groups"][0]["lr"] == pytest.approx(1e-2 * 0.7**3)
    path = save_checkpoint(
        tmp_path, 3, {**moments, "unrelated": torch.ones(1)}, {"optimizer": scalars}, keep=1
    )

    again, other = model_and_optimizer(**options)
    again.load_state_dict(model.state_dict())
    loaded, state = load_checkpoint(path)
    restore_optimizer(other, loaded, state["optimizer"], "policy.optimizer")
    assert [g["lr"] for g in other.param_groups] == [g["lr"] for g in optimizer.param_groups]
    assert other.param_groups[0]["betas"] == (0.8, 0.97)
    before = loaded["policy.optimizer.0.exp_avg"].clone()
    train(model, optimizer, 2)
    train(again, other, 2)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    after, _ = flatten_optimizer(optimizer, "x")
    resumed, _ = flatten_optimizer(other, "x")
    assert after.keys() == resumed.keys()
    assert all(torch.equal(after[name], resumed[name]) for name in after)
    assert torch.equal(before, loaded["policy.optimizer.0.exp_avg"])  # nothing is aliased


def test_optimizer_with_a_tensor_learning_rate(tmp_path):
    def build():
        return torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=torch.tensor(0.25))

    optimizer = build()
    optimizer.param_groups[0]["lr"].fill_(0.125)
    moments, scalars = flatten_optimizer(optimizer, "o")
    assert moments.keys() == {"o.group.0.lr"}
    other = build()
    restore_optimizer(other, moments, scalars, "o")
    assert other.param_groups[0]["lr"].item() == 0.125


def test_an_optimizer_that_never_stepped(tmp_path):
    _, optimizer = model_and_optimizer()
    moments, scalars = flatten_optimizer(optimizer, "o")
    assert moments == {}
    restore_optimizer(model_and_optimizer()[1], moments, scalars, "o")


def test_an_optimizer_of_another_model_is_refused():
    model, optimizer = model_and_optimizer()
    train(model, optimizer, 1)
    moments, scalars = flatten_optimizer(optimizer, "o")
    with pytest.raises(ValueError, match=r"missing, first 'o\.0\.exp_avg'"):
        restore_optimizer(optimizer, {}, scalars, "o")
    one_group = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"\[2, 2\] parameters as saved, got \[4\]"):
        restore_optimizer(one_group, moments, scalars, "o")
    wider = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    groups = [{"params": layer.parameters()} for layer in wider]
    with pytest.raises(ValueError, match=r"parameter 0 was saved as torch.float32 \(4, 3\)"):
        restore_optimizer(torch.optim.AdamW(groups), moments, scalars, "o")
    narrow = torch.optim.AdamW([{"params": layer.bfloat16().parameters()} for layer in model])
    with pytest.raises(ValueError, match="bfloat16"):
        restore_optimizer(narrow, moments, scalars, "o")
