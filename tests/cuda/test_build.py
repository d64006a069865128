"""What nvcc and ptxas say of the kernels, how the build is told what to do, and who serves whom."""

import importlib
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location

import pytest
import torch

import airl_fast
from airl_fast.ops import _cuda_extension
from tests.cuda import emulation


@pytest.fixture(scope="module")
def nvcc():
    """csrc/cuda/nvcc.py, as setup.py loads it."""
    spec = spec_from_file_location("airl_fast_nvcc", emulation.CSRC / "cuda" / "nvcc.py")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_kernel_compiles_for_both_architectures_without_spills(nvcc):
    """Finds what the installation compiled, unless a source has changed since."""
    compiler = nvcc.find_nvcc()
    if compiler is None:
        pytest.skip("no nvcc in CUDA_HOME/bin or PATH")
    names = nvcc.DEFAULT_ARCHITECTURES.split(";")
    objects = nvcc.compile_all(compiler, names, nvcc.sources())
    rows = nvcc.kernels("".join(file.with_suffix(".log").read_text() for file in objects))
    print(nvcc.table(rows))
    assert {row.architecture for row in rows} == {f"sm_{name}" for name in names}
    for row in rows:
        assert row.spilled_bytes == 0, row
        assert row.registers <= 64 or not row.name.startswith("policy_kernel"), row
    families = {row.name.split("<")[0] for row in rows}
    assert {"read_kernel", "differentiate_kernel", "policy_kernel", "scan_kernel"} <= families


def test_what_ptxas_says_is_read(nvcc):
    log = (
        "ptxas info    : Compiling entry function '_Z3foov' for 'sm_80'\n"
        "ptxas info    : Function properties for _Z3foov\n"
        "    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 456 bytes cmem[0]\n"
    )
    (kernel,) = nvcc.kernels(log)
    assert kernel.name in ("foo", "_Z3foov")
    assert (kernel.architecture, kernel.registers) == ("sm_80", 40)
    assert (kernel.spilled_bytes, kernel.stack_bytes) == (28, 8)
    assert "sm_80" in nvcc.table([kernel])


@pytest.mark.parametrize(("choice", "built"), [("0", False), ("1", True), ("auto", True)])
def test_the_build_goes_with_nvcc_where_it_is_told_to(choice, built, nvcc, monkeypatch):
    monkeypatch.setenv("AIRL_FAST_CUDA", choice)
    monkeypatch.setattr(nvcc, "find_nvcc", lambda: "/somewhere/nvcc")
    assert (nvcc.wanted_nvcc() is not None) == built


def test_the_build_says_what_is_missing_and_what_is_wrong(nvcc, monkeypatch):
    monkeypatch.setattr(nvcc, "find_nvcc", lambda: None)
    monkeypatch.setenv("AIRL_FAST_CUDA", "auto")
    assert nvcc.wanted_nvcc() is None
    monkeypatch.setenv("AIRL_FAST_CUDA", "1")
    with pytest.raises(SystemExit, match=r"there is no nvcc .* install the CUDA toolkit"):
        nvcc.wanted_nvcc()
    monkeypatch.setenv("AIRL_FAST_CUDA", "yes")
    with pytest.raises(SystemExit, match="expected 0, 1 or auto, received 'yes'"):
        nvcc.wanted_nvcc()
    monkeypatch.setenv("AIRL_FAST_CUDA_ARCHS", "80;h100")
    with pytest.raises(SystemExit, match="such as 80;90a, received 'h100'"):
        nvcc.architectures()


def test_a_source_that_does_not_compile_is_an_error_in_nvccs_words(nvcc, tmp_path, monkeypatch):
    compiler = nvcc.find_nvcc()
    if compiler is None:
        pytest.skip("no nvcc in CUDA_HOME/bin or PATH")
    monkeypatch.setattr(nvcc, "CACHE", tmp_path / "objects")
    source = tmp_path / "wrong.cu"
    source.write_text("__global__ void f() { nothing(); }\n")
    with pytest.raises(RuntimeError, match=r"(?s)wrong.cu: expected no error.*nothing.*=0 builds"):
        nvcc.compiled(compiler, ["80"], source)


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("80;90a", (8, 0), True),
        ("80;90a", (8, 6), True),
        ("80;90a", (8, 9), True),
        ("80;90a", (9, 0), True),
        ("80;90a", (7, 5), False),
        ("80;90a", (10, 0), False),
        ("89", (8, 0), False),
        ("90a", (9, 1), False),
        ("80;90;100f", (12, 0), False),
        ("120", (12, 1), True),
        ("", (8, 0), False),
    ],
)
def test_code_runs_where_it_was_built_for(built, capability, runs):
    assert _cuda_extension.runs_on(built, capability) == runs


def test_each_refusal_has_its_reason(monkeypatch):
    x = torch.empty(3)
    assert _cuda_extension.serves(x) == "it takes tensors on a CUDA device, not on cpu"
    assert "float64 inputs ask for float64" in _cuda_extension.serves_head(x.double())
    with pytest.raises(ValueError, match="expected a tensor on a CUDA device, received one on cpu"):
        _cuda_extension.place(x)
    with (
        airl_fast.backend("cuda"),
        pytest.raises(RuntimeError, match=r"'cuda' was forced .*a CUDA device, not on cpu"),
    ):
        airl_fast.segment_sum(x, torch.tensor([0, 3], dtype=torch.int32))

    class OnGPU:
        device, dtype = torch.device("cuda", 0), torch.float32

    monkeypatch.setattr(_cuda_extension, "find_spec", lambda name: None)
    assert "install it again with AIRL_FAST_CUDA=1" in _cuda_extension.serves(OnGPU)
    with pytest.raises(ImportError, match="install it again with AIRL_FAST_CUDA=1"):
        _cuda_extension.extension()
    monkeypatch.setattr(_cuda_extension, "find_spec", lambda name: object())
    monkeypatch.setattr(_cuda_extension, "extension", lambda: importlib.import_module("types"))
    monkeypatch.setattr("types.architectures", "80;90a", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert "AIRL_FAST_CUDA_ARCHS='80;90a;120'" in _cuda_extension.serves(OnGPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert _cuda_extension.serves(OnGPU) is None


def test_the_extension_needs_no_gpu_to_be_imported_and_says_what_cuda_says():
    if find_spec("airl_fast._cuda") is None:
        pytest.skip("built without nvcc")
    if torch.cuda.is_available():
        pytest.skip("with a GPU there is nothing to refuse")
    cuda = _cuda_extension.extension()
    assert cuda.architectures
    with pytest.raises(RuntimeError, match="cudaGetDevice: cudaError"):
        cuda.segment_last((0, 0), (0, 1), (0, 1, 1), 0)


def test_the_kernels_are_clean_under_the_sanitizers(tmp_path):
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    compiler = emulation.compiler()
    linked = subprocess.run(
        [compiler, *sanitize, str(probe), "-o", str(tmp_path / "probe")], capture_output=True
    )
    if linked.returncode != 0:
        pytest.skip("the compiler has no address and undefined-behaviour sanitizers")
    program, harness = tmp_path / "harness", emulation.HERE / "harness.cpp"
    build = [compiler, "-x", "c++", "-O0", "-g", *emulation.FLAGS, *sanitize, harness]
    subprocess.run([*build, *emulation.SOURCES, "-o", program], check=True)
    subprocess.run([program], check=True, env={"ASAN_OPTIONS": "detect_leaks=0"})
