"""Faults of a disk, planted: calls that fail, files that may not grow, folders of others."""

import os
import resource
from contextlib import contextmanager
from pathlib import Path

WRITES = (
    "airl_fast.checkpoint.save_file",
    "os.mkdir",
    "os.rename",
    "os.replace",
    "os.fsync",
    "pathlib.Path.write_text",
)


class FailingDisk:
    """Within it, the call number ``at`` (from 0) of those that write raises ``error``.

    ``calls`` is how many there were.
    """

    def __init__(self, monkeypatch, at, error):
        self.at, self.error, self.calls = at, error, 0
        for name in WRITES:
            monkeypatch.setattr(name, self._failing(name))

    def _failing(self, name):
        original = _find(name)

        def call(*arguments, **options):
            self.calls += 1
            if self.calls == self.at + 1:
                raise OSError(self.error, os.strerror(self.error))
            return original(*arguments, **options)

        return call


def _find(name):
    module, _, attribute = name.rpartition(".")
    if module == "pathlib.Path":
        return getattr(Path, attribute)
    return getattr(__import__(module, fromlist=[attribute]), attribute)


@contextmanager
def largest_file(size):
    """No file may grow beyond ``size`` bytes: the kernel's own refusal, EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def nobody():
    """As a user who owns nothing, where the tests run as the superuser."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def contents(folder):
    """Every file below a folder with its bytes, by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
