"""Disks that fail and checkpoints that were altered: a clear error, and the one before is found."""

import errno
import json
import logging
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from airl_fast.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    verify_checkpoint,
)
from tests.faults import FailingDisk, contents, largest_file, nobody

FILES = ("tensors.safetensors", "state.json", "manifest.json")


def save(folder, step, **options):
    tensors = {"a": torch.arange(5000) + step}
    return save_checkpoint(folder, step, tensors, {"step": step}, **{"keep": 2, **options})


def assert_found(folder, step):
    path = latest_checkpoint(folder)
    assert path.name == f"step-{step:06d}"
    tensors, state = load_checkpoint(path)
    assert state == {"step": step}
    assert torch.equal(tensors["a"], torch.arange(5000) + step)


def failure(folder):
    """What saving step 2 says, if it fails."""
    try:
        save(folder, 2)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_whatever_call_fails_the_checkpoint_before_is_there(error, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        disk = FailingDisk(patch, -1, error)
        save(tmp_path / "count" / "run", 2)
    assert disk.calls >= 10
    failed = 0
    for at in range(disk.calls):
        folder = tmp_path / str(at)
        save(folder, 1)
        before = contents(folder)
        with monkeypatch.context() as patch:
            FailingDisk(patch, at, error)
            message = failure(folder)
        if message:
            failed += 1
            assert f"{folder / 'step-000002'}: [Errno {error}]" in message
            assert "the disk has room" in message
        assert_found(folder, 2 if (folder / "step-000002").exists() else 1)
        assert {k: v for k, v in contents(folder).items() if k in before} == before
        assert not list(folder.glob("*.tmp-*"))
        save(folder, 3)
        assert_found(folder, 3)
    assert failed >= 9


@pytest.mark.parametrize("limit", [0, 1, 1000, 8192, 40_000])
def test_a_file_that_may_not_grow(limit, tmp_path):
    save(tmp_path, 1)
    before = contents(tmp_path)
    with largest_file(limit), pytest.raises(CheckpointError, match=r"cannot write .*step-000002"):
        save(tmp_path, 2)
    assert contents(tmp_path) == before
    assert_found(tmp_path, 1)
    save(tmp_path, 2)
    assert_found(tmp_path, 2)


def test_a_folder_that_may_only_be_read():
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are hidden from other users
    try:
        save(folder, 1)
        before = contents(folder)
        folder.chmod(0o555)
        with nobody(), pytest.raises(CheckpointError, match=r"Permission denied.*writable"):
            save(folder, 2)
        assert contents(folder) == before
        assert_found(folder, 1)
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def cut(at):
    return lambda file: file.write_bytes(file.read_bytes()[:at])


def flip(at):
    def alter(file):
        data = bytearray(file.read_bytes())
        data[int(at * (len(data) - 1))] ^= 4
        file.write_bytes(data)

    return alter


def folder_instead(file):
    file.unlink()
    file.mkdir()


ALTERED = {
    "emptied": cut(0),
    "cut in half": lambda file: cut(file.stat().st_size // 2)(file),
    "less one byte": cut(-1),
    "first byte": flip(0),
    "a middle byte": flip(0.5),
    "last byte": flip(1),
    "gone": Path.unlink,
    "a folder": folder_instead,
}


@pytest.mark.parametrize("alter", ALTERED.values(), ids=ALTERED)
@pytest.mark.parametrize("name", FILES)
def test_an_altered_file_is_named_and_the_checkpoint_before_is_found(name, alter, tmp_path, caplog):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    alter(path / name)
    with pytest.raises(CheckpointError, match=name) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    with caplog.at_level(logging.WARNING, logger="airl_fast.checkpoint"):
        assert_found(tmp_path, 1)
    assert name in caplog.text
    save(tmp_path, 2)  # made again, and in place of the damaged one
    assert_found(tmp_path, 2)
    assert not list(tmp_path.glob("*.tmp-*"))


def test_any_byte_of_the_manifest_counts(tmp_path):
    """Any bit, too; but for white space, which JSON has more than one kind of."""
    path = save(tmp_path, 2)
    file = path / "manifest.json"
    whole = file.read_bytes()
    meaning = json.loads(whole)
    for at in range(len(whole)):
        for bit in range(8):
            data = bytearray(whole)
            data[at] ^= 1 << bit
            file.write_bytes(data)
            try:
                verify_checkpoint(path)
            except CheckpointError:
                continue
            assert json.loads(data) == meaning, (at, bit)


@pytest.mark.parametrize("manifest", ["[]", "null", '{"format": 1}', '{"format": 1, "files": 3}'])
def test_a_manifest_that_is_another_thing(manifest, tmp_path):
    path = save(tmp_path, 2)
    (path / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=r"damaged: manifest\.json.*an earlier checkpoint"):
        verify_checkpoint(path)


def test_a_manifest_of_another_step_or_with_more_in_it(tmp_path):
    path = save(tmp_path, 2)
    shutil.copytree(path, tmp_path / "step-000007")
    with pytest.raises(CheckpointError, match=r"step-000007 is damaged: .* of step 2; a copy"):
        load_checkpoint(tmp_path / "step-000007")
    assert load_checkpoint(shutil.copytree(path, tmp_path / "copy"))[1] == {"step": 2}
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["more"] = {"bytes": 1, "sha256": "0"}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="entries that were not written"):
        verify_checkpoint(path)


def test_files_that_are_not_ours_are_not_read(tmp_path):
    path = save(tmp_path, 2)
    (path / ".DS_Store").write_bytes(b"\0")
    (path / "notes").mkdir()
    assert_found(tmp_path, 2)


def test_a_checkpoint_that_is_a_link(tmp_path):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "run"
    for step in (1, 2):
        moved = shutil.move(save(folder, step), elsewhere / str(step))
        (folder / f"step-{step:06d}").symlink_to(moved, target_is_directory=True)
    assert_found(folder, 2)
    before = contents(elsewhere)
    save(folder, 2)  # takes the link's place
    save(folder, 3)  # the other link goes
    assert sorted(p.name for p in folder.iterdir()) == ["step-000002", "step-000003"]
    assert not (folder / "step-000002").is_symlink()
    assert contents(elsewhere) == before  # what links point to is never touched

    (folder / "step-000004").symlink_to(tmp_path / "nowhere")
    (folder / "step-000005").write_text("a file")
    assert_found(folder, 3)
    for step in (4, 5):
        save(folder, step)
        assert_found(folder, step)


def test_a_folder_of_checkpoints_that_is_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "disk")
    save(tmp_path / "checkpoints", 1)
    assert_found(tmp_path / "disk", 1)


def test_damaged_ones_ahead_go_before_whole_ones_behind(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, keep=3)
    (tmp_path / "step-000030" / "state.json").unlink()
    save(tmp_path, 25, keep=2)  # from 20, made again
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000020", "step-000025"]


def test_protected_ones_stay_besides_the_newest(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step, keep=2, protect=[2])
    names = [f"step-{step:06d}" for step in (2, 5, 6)]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    prune_checkpoints(tmp_path, 6, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == names[1:]


def test_an_old_one_that_cannot_be_deleted_is_no_reason_to_stop(tmp_path, monkeypatch, caplog):
    save(tmp_path, 1, keep=1)

    def refuse(path):
        raise OSError(errno.EBUSY, "Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr(
            "airl_fast.checkpoint.remove", lambda path: None if not path.exists() else refuse(path)
        )
        save(tmp_path, 2, keep=1)
    assert "cannot delete old checkpoints" in caplog.text
    assert_found(tmp_path, 2)
    save(tmp_path, 3, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000003"]
