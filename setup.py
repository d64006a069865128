"""Build the C++ extension ``airl_fast._C``; everything else is stated in pyproject.toml.

The sources under csrc/ see raw pointers, sizes and strides, never torch headers, so the build
needs no torch and one build serves every torch version.
"""

import sys
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

_FLAGS = ["/O2", "/W4"] if sys.platform == "win32" else ["-O3", "-Wall", "-Wextra"]

ParallelCompile(default=0).install()  # one compiler process per core

setup(
    ext_modules=[
        Pybind11Extension(
            "airl_fast._C",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            cxx_std=17,
            extra_compile_args=_FLAGS,
        )
    ],
    cmdclass={"build_ext": build_ext},
)
