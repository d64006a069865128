"""Build the extensions ``airl_fast._C`` (C++) and, where nvcc is found, ``airl_fast._cuda``.

Everything else is stated in pyproject.toml. The sources under csrc/ see raw pointers, sizes and
strides, never torch headers, so the build needs no torch and one build serves every torch version.

    AIRL_FAST_CUDA        0: without the CUDA kernels; 1: with them, or an error; auto (default)
    AIRL_FAST_CUDA_ARCHS  what to build them for, such as the default "80;90a"
"""

import sys
import sysconfig
from glob import glob
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Extension, setup

# No contraction: a multiply-add is one only where it is written, so that log-probabilities do not
# depend on whether the entropy was asked for.
_UNIX = ["-O3", "-Wall", "-Wextra", "-ffp-contract=off", "-pthread"]
_FLAGS = ["/O2", "/W4"] if sys.platform == "win32" else _UNIX

ParallelCompile(default=0).install()  # one compiler process per core


def _load_nvcc() -> ModuleType:
    path = Path(__file__).resolve().parent / "csrc" / "cuda" / "nvcc.py"
    spec = spec_from_file_location("airl_fast_nvcc", path)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


nvcc = _load_nvcc()
_NVCC = nvcc.wanted_nvcc()


class BuildExtensions(build_ext):
    """As pybind11 builds extensions, except for ``_cuda``, which nvcc compiles and links."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one extension."""
        if ext.name != "airl_fast._cuda":
            super().build_extension(ext)
            return
        names = nvcc.architectures()
        include = (pybind11.get_include(), sysconfig.get_path("include"))
        more = [f"-isystem={folder}" for folder in include]
        more.append(f'-DAIRL_FAST_CUDA_ARCHS="{";".join(names)}"')
        files = [nvcc.HERE / "bindings.cpp", *nvcc.sources()]
        objects = nvcc.compile_all(_NVCC, names, files, more)
        nvcc.link(_NVCC, objects, Path(self.get_ext_fullpath(ext.name)))


_CUDA = [
    Extension(
        "airl_fast._cuda",
        [*sorted(glob("csrc/cuda/*.cu")), "csrc/cuda/bindings.cpp"],
        depends=sorted(glob("csrc/*.h") + glob("csrc/cuda/*.*h") + ["csrc/cuda/nvcc.py"]),
    )
]

setup(
    ext_modules=[
        Pybind11Extension(
            "airl_fast._C",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h") + glob("csrc/cuda/*")),
            cxx_std=17,
            extra_compile_args=_FLAGS,
            extra_link_args=[] if sys.platform == "win32" else ["-pthread", "-ldl"],
        ),
        *(_CUDA if _NVCC else []),
    ],
    cmdclass={"build_ext": BuildExtensions},
)
