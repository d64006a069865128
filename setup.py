"""Build the C++ extension ``airl_fast._C``; everything else is stated in pyproject.toml.

The sources under csrc/ see raw pointers, sizes and strides, never torch headers, so the build
needs no torch and one build serves every torch version.
"""

import sys
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

# No contraction: a multiply-add is one only where it is written, so that log-probabilities do not
# depend on whether the entropy was asked for.
_UNIX = ["-O3", "-Wall", "-Wextra", "-ffp-contract=off", "-pthread"]
_FLAGS = ["/O2", "/W4"] if sys.platform == "win32" else _UNIX

ParallelCompile(default=0).install()  # one compiler process per core

setup(
    ext_modules=[
        Pybind11Extension(
            "airl_fast._C",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            cxx_std=17,
            extra_compile_args=_FLAGS,
            extra_link_args=[] if sys.platform == "win32" else ["-pthread", "-ldl"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
