"""Files and folders that take their place whole or not at all."""

import errno
import os

import pytest

from airl_fast.durable import WriteError, explained, make_folder, whole_folder, write_text
from tests.faults import FailingDisk, contents, largest_file


def fill(folder, **files):
    with whole_folder(folder) as made:
        for name, text in files.items():
            (made / name).write_text(text)


def test_a_text_is_replaced_or_stays(tmp_path, monkeypatch):
    file = tmp_path / "file"
    write_text(file, "old")
    with monkeypatch.context() as patch:
        disk = FailingDisk(patch, -1, errno.ENOSPC)
        write_text(file, "old")
    for at in range(disk.calls):
        with monkeypatch.context() as patch:
            FailingDisk(patch, at, errno.ENOSPC)
            with pytest.raises(OSError, match="No space"):
                write_text(file, "new")
        assert file.read_text() in ("old", "new")  # new: the rename is there, and not yet flushed
    with largest_file(2), pytest.raises(OSError, match="File too large"):
        write_text(file, "longer than two bytes")
    assert file.read_text() in ("old", "new")


def test_an_error_says_what_and_what_to_do():
    def fail():
        with explained("DIR/policy"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with pytest.raises(WriteError, match=r"cannot write DIR/policy: .*Read-only.*goes on from"):
        fail()


def test_a_new_folder_takes_over_what_only_the_old_one_has(tmp_path):
    folder = tmp_path / "a" / "reward"
    fill(folder, weights="1", head="1")
    (folder / "calibration.json").write_text("made by hand")
    (folder / "plots").mkdir()
    (folder / "plots" / "one").write_text("png")
    fill(folder, weights="2", head="1")
    assert contents(folder) == {
        "weights": b"2",
        "head": b"1",
        "calibration.json": b"made by hand",
        "plots/one": b"png",
    }
    assert os.listdir(tmp_path / "a") == ["reward"]


def test_where_nothing_changes_nothing_is_touched(tmp_path):
    folder = tmp_path / "policy"
    fill(folder, weights="1", head="1")
    before = (folder.stat().st_ino, (folder / "weights").stat().st_ino)
    fill(folder, weights="1")
    assert before == (folder.stat().st_ino, (folder / "weights").stat().st_ino)
    assert os.listdir(tmp_path) == ["policy"]


def test_a_folder_that_fails_half_way_leaves_the_old_one(tmp_path):
    folder = tmp_path / "policy"
    fill(folder, weights="1")

    def fail():
        with whole_folder(folder) as made:
            (made / "weights").write_text("2")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert contents(tmp_path) == {"policy/weights": b"1"}


def test_killed_between_two_renames_both_folders_are_there_and_taken_up(tmp_path):
    folder = tmp_path / "reward"
    fill(folder, weights="1", calibration="mine")
    (tmp_path / "reward.tmp-4242").mkdir()
    folder.rename(tmp_path / "reward.tmp-4242-retired")  # as left by such a process
    fill(folder, weights="2")
    assert contents(tmp_path) == {"reward/weights": b"2", "reward/calibration": b"mine"}


def test_a_link_is_replaced_and_its_target_left_alone(tmp_path):
    target = tmp_path / "elsewhere"
    fill(target, weights="1")
    (tmp_path / "policy").symlink_to(target)
    fill(tmp_path / "policy", weights="2")
    assert contents(target) == {"weights": b"1"}
    assert (tmp_path / "policy" / "weights").read_text() == "2"
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "policy"]


def test_the_names_of_new_folders_are_flushed(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr("airl_fast.durable.flush", flushed.append)
    make_folder(tmp_path / "a" / "b")
    assert set(flushed) == {tmp_path, tmp_path / "a"}
