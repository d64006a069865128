import importlib.util
import io
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import airl_fast
from airl_fast import doctor as module
from airl_fast.doctor import EXTRAS, doctor
from airl_fast.ops.dispatch import BACKENDS, Explanation

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def printed(report):
    console = Console(file=io.StringIO(), width=160)
    console.print(report)
    return console.file.getvalue()


def test_report_names_what_is_here():
    report = doctor()
    assert report.versions["airl_fast"] == airl_fast.__version__
    assert report.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert torch.backends.cpu.get_cpu_capability() in report.devices["cpu"]
    assert isinstance(report.operators, Explanation)
    assert report.extension is not None
    assert report.problems == ()
    for text in (printed(report), str(report)):
        for expected in ("torch", "linear_logprob", "reference", "airl_fast._C", "flash"):
            assert expected in text


def test_every_operator_is_served_and_every_other_backend_accounted_for():
    rows = airl_fast.explain().rows
    operators = {row.op for row in rows}
    assert {"linear_logprob", "linear_policy_loss", "airl_score", "discriminator_loss"} <= operators
    for row in rows:
        assert row.backend in BACKENDS
        assert row.backend not in row.refused
        better = BACKENDS[: BACKENDS.index(row.backend)]
        assert all(row.refused[name] for name in better)
    text = str(airl_fast.explain())
    assert text == repr(airl_fast.explain())
    assert len(text.splitlines()) == len(rows)


def test_extras_are_those_of_the_package():
    optional = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    declared = {
        name: {requirement.split(">")[0] for requirement in requirements}
        for name, requirements in optional.items()
        if name not in ("test", "dev")
    }
    assert {name: set(packages) for name, (packages, _) in EXTRAS.items()} == declared


def test_works_and_says_so_when_optional_things_are_absent(monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    def no_operators():
        raise ImportError("cannot import name '_C'")

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(module, "version", absent)
    monkeypatch.setattr(module, "explain", no_operators)
    monkeypatch.setattr(
        module.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "airl_fast._C" else find_spec(name, *rest),
    )
    report = doctor()
    assert all(extra.missing for extra in report.extras)
    assert 'pip install "airl-fast[liger]"' in str(report)
    text = " ".join(report.problems)
    for expected in ("_C is not built", "cannot be imported: cannot import name", "torch"):
        assert expected in text
    assert "problem:" in printed(report)


def test_gpus_are_listed(monkeypatch):
    gpu = SimpleNamespace(
        name="NVIDIA X", total_memory=80 * 2**30, major=9, minor=0, multi_processor_count=132
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    devices = module._devices()
    assert devices["cuda:1"].startswith("NVIDIA X, 80.0 GiB, compute capability 9.0")


@pytest.mark.parametrize("package", ["transformers", "peft", "datasets", "vllm", "trl"])
def test_no_heavy_package_is_imported(package, imported_by_doctor):
    assert package not in imported_by_doctor


@pytest.fixture(scope="module")
def imported_by_doctor():
    code = "import sys; from airl_fast.doctor import doctor; str(doctor()); print(*sys.modules)"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
