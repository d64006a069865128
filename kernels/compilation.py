"""Compile every kernel and configuration ahead of time, and print what each takes of a GPU.

    python -m airl_fast.kernels.compilation [--only NAME] [--arch 80 90]

needs no GPU. Registers and stack come from the compiled cubin, shared memory from the compiler.
Exit status 1 if a kernel spills registers (a stack frame that is not empty: no kernel here has
arrays of its own), or needs more shared memory than its architecture has.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from airl_fast.kernels import discriminator, layer, linear_logprob, rows, scaling, segments
from airl_fast.kernels.launch import (
    ROW_CONFIGS,
    SEGMENT_CONFIGS,
    DotConfig,
    dot_config,
    interpreted,
    options,
    shared_limit,
)

ARCHITECTURES = (80, 90)
_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# (D, V) that reach every entry of the table of products.
_SHAPES = ((4096, 128256), (896, 151936), (100, 151936), (64, 512), (100, 512))


@dataclass(frozen=True)
class Case:
    """One kernel with its argument types and constants: what Triton would compile at a call."""

    kernel: Any
    dtype: str
    config: str
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    unaligned: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        """What ``--only`` looks into."""
        flags = " ".join(k.lower() for k, v in self.constants.items() if v is True)
        return f"{self.kernel.fn.__name__} {self.dtype} {self.config} {flags}"


@dataclass(frozen=True)
class Usage:
    """What one program of a compiled kernel takes."""

    registers: int
    spilled: int  # bytes of stack
    shared: int  # bytes


def cases(arch: int) -> Iterator[Case]:
    """Every kernel and configuration, the costliest options and the plain ones."""
    yield from _products(arch)
    yield from _rows()
    yield from _segments()
    yield from _spans()
    yield from _layers()
    for dtype in ("bf16", "fp32"):
        types = {"x": f"*{dtype}", "factor": "*fp32", "count": "i64"}
        block = {"BLOCK": scaling.BLOCK}
        yield Case(scaling.scale_kernel, dtype, "", types, block, options(warps=8))


def _layers() -> Iterator[Case]:
    for dtype in _TYPES:
        names = ("x", "weight", "out", "grad", "d_x", "gate", "up", "d_gate", "d_up", "cos", "sin")
        types = dict.fromkeys(names, f"*{dtype}")
        types |= {"scale": "*fp32", "parts": "*fp32", "rows": "i32", "count": "i64"}
        types |= {"width": "i32", "stride": "i32", "heads": "i32", "size": "i32", "epsilon": "fp32"}
        for width in (896, 4096, layer.LARGEST_WIDTH):
            launch = layer.norm_launch(width)
            block, opts = {"BLOCK": launch.pop("BLOCK")}, launch
            yield Case(layer.norm_kernel, dtype, str(width), types, block, opts)
            both = {"NEED_X": True, "NEED_WEIGHT": True}
            yield Case(layer.norm_gradient_kernel, dtype, str(width), types, both | block, opts)
        block, opts = {"BLOCK": layer.GATE_BLOCK}, options(warps=8)
        for kernel in (layer.gate_kernel, layer.gate_gradient_kernel):
            yield Case(kernel, dtype, "", types, block, opts)
        for back in (False, True):
            launch = layer.rotate_launch(14, 64)
            tile = {name: launch.pop(name) for name in ("HEADS", "PAIRS")}
            yield Case(layer.rotate_kernel, dtype, "", types, {"BACK": back, **tile}, launch)


def _products(arch: int) -> Iterator[Case]:
    chosen: dict[tuple[str, DotConfig, bool], None] = {}
    for dtype, torch_dtype in _TYPES.items():
        for width, vocab in _SHAPES:
            config = dot_config(width, vocab, torch_dtype, arch)
            chosen[dtype, config, width % config.BK == 0] = None
    types = {"bias": "*fp32", "targets": "*i64", "partial": "*fp32", "count": "i32"}
    types |= {"vocab": "i32", "width": "i32", "hidden_stride": "i32", "weight_stride": "i32"}
    types |= {"inner": "fp32", "outer": "fp32"}
    for dtype, config, even in chosen:
        both = {"hidden": f"*{dtype}", "weight": f"*{dtype}"}
        for full in (False, True):
            for entropy in (False, True):
                constants = {"HAS_BIAS": full, "CAPPED": full, "ENTROPY": entropy, "EVEN": even}
                constants |= {"FLOAT32": dtype == "fp32", **config.constants()}
                yield Case(
                    linear_logprob.split_kernel,
                    dtype,
                    str(config),
                    types | both,
                    constants,
                    config.options(),
                    () if even else ("width", "hidden", "weight", "hidden_stride", "weight_stride"),
                )
    types = {"partial": "*fp32", "logp": "*fp32", "entropy": "*fp32", "count": "i32"}
    constants = {"ENTROPY": True, "ROWS": linear_logprob._COMBINED_ROWS}
    types["splits"] = "i32"
    yield Case(linear_logprob.combine_kernel, "fp32", "", types, constants, options(warps=4))


def _rows() -> Iterator[Case]:
    head = {"bias": "*fp32", "targets": "*i64", "stride": "i32", "vocab": "i32"}
    head |= {"inner": "fp32", "outer": "fp32"}
    slope = {"gradient_stride": "i32", "slope": "fp32"}
    vectors = {"logp": "*fp32", "entropy": "*fp32"}
    policy = dict.fromkeys(("advantages", "old", "ref", "share"), "*fp32")
    policy |= dict.fromkeys(("low", "high", "delta", "beta", "entropy_coef"), "fp32")
    coefficients = dict.fromkeys(("d_logp", "d_entropy", "stats"), "*fp32")
    pairs = [("fp32", g) for g in _TYPES] + [("bf16", "bf16"), ("fp16", "fp16")]
    for config in ROW_CONFIGS:
        opts = {k: v for k, v in config.constants().items() if k != "BLOCK"}
        for full in (False, True):
            base = {"HAS_BIAS": full, "CAPPED": full, "BLOCK": config.BLOCK}
            for logits, gradient in pairs:
                chunk = {"logits": f"*{logits}", "gradient": f"*{gradient}"}
                narrow = {"NARROW": logits != gradient}
                name = f"{logits}>{gradient}"
                if logits == gradient:
                    yield Case(
                        rows.read_kernel,
                        logits,
                        str(config),
                        head | vectors | {"stats": "*fp32", "logits": f"*{logits}"},
                        base | {"ENTROPY": True, "KEEP": True},
                        opts,
                    )
                for kept in (False, True):
                    flags = {"D_LOGP": True, "D_ENTROPY": True, "KEPT": kept}
                    yield Case(
                        rows.differentiate_kernel,
                        name,
                        str(config),
                        head | slope | coefficients | chunk,
                        base | narrow | flags,
                        opts,
                    )
                yield Case(
                    rows.policy_kernel,
                    name,
                    str(config),
                    head | slope | vectors | policy | chunk,
                    base | narrow | {"HAS_OLD": True, "HAS_REF": True, "HAS_DELTA": True},
                    opts,
                )


def _segments() -> Iterator[Case]:
    types = {"cu": "*i32", "out": "*fp32", "segments": "i32", "total": "i32"}
    for config in SEGMENT_CONFIGS:
        size = {"ROWS": config.ROWS, "COLUMNS": config.COLUMNS}
        opts = options(config.warps)
        for dtype in ("bf16", "fp16", "fp32", "fp64"):
            common = types | {"x": f"*{dtype}"}
            name = str(config)
            for mode in range(3):
                constants = {"MODE": mode, **size}
                yield Case(segments.reduce_kernel, dtype, name, common, constants, opts)
            yield Case(segments.softmax_kernel, dtype, name, common, size, opts)
            scanned = common | {"gamma": "*fp64"}
            for forwards in (False, True):
                constants = {"FORWARDS": forwards, **size}
                yield Case(segments.scan_kernel, dtype, name, scanned, constants, opts)


def _spans() -> Iterator[Case]:
    opts = options(warps=4)
    types = {"bias": "*fp32", "logp": "*fp32", "cu": "*i32", "edges": "*i32", "reward": "*fp32"}
    types |= {
        "f": "*fp32",
        "total": "i32",
        "width": "i32",
        "hidden_stride": "i32",
        "weight_stride": "i32",
    }
    types["gamma"] = "fp32"
    flags = {"SHAPED": True, "MEAN": True, "AIRL": True, "WIDTH": discriminator._WIDTH}
    for dtype in _TYPES:
        both = {"hidden": f"*{dtype}", "weight": f"*{dtype}"}
        yield Case(discriminator.span_kernel, dtype, "", types | both, flags, opts)
    types = {"expert": "*i8", "numbers": "*fp64", "spans": "i32"}
    for dtype in ("fp32", "fp64"):
        values = dict.fromkeys(("f", "logp", "weight"), f"*{dtype}")
        sums = types | values | {"partial": "*fp64"}
        slopes = types | values | {"grad": f"*{dtype}", "totals": "*fp64", "out": "*fp64"}
        for wgan in (False, True):
            flags = {"AIRL": not wgan, "WGAN": wgan, "WEIGHTED": True}
            flags["SPANS"] = discriminator._SPANS
            yield Case(discriminator.sums_kernel, dtype, "", sums, flags, opts)
            yield Case(discriminator.gradient_kernel, dtype, "", slopes, flags, opts)


def compiled_usage(case: Case, arch: int) -> Usage:
    """Compile a case for an architecture and read what it takes from the cubin."""
    signature = {name: case.types.get(name, "constexpr") for name in case.kernel.arg_names}
    unmarked = set(case.unaligned)
    for parameter in case.kernel.params:
        if parameter.do_not_specialize:
            unmarked.add(parameter.name)
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(case.kernel.arg_names)
        if name not in unmarked
        and (signature[name].startswith("*") or name == "width" or name.endswith("stride"))
    }
    source = ASTSource(case.kernel, signature, constexprs=case.constants, attrs=aligned)
    target = GPUTarget("cuda", arch, 32)
    kernel = triton.compile(source, target=target, options=case.options)
    registers, stack = _resources(kernel.asm["cubin"])
    return Usage(registers, stack, kernel.metadata.shared)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack, as the CUDA tools report them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", str(file)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump: expected a line with REG and STACK, received:\n{report}")
    return int(found[1]), int(found[2])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return 1 if a kernel spills or does not fit, 2 if nothing matches."""
    parser = argparse.ArgumentParser(prog="python -m airl_fast.kernels.compilation")
    parser.add_argument("--only", default="", help="words that a line's name must all contain")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parsed = parser.parse_args(arguments)
    if interpreted():
        print("unset TRITON_INTERPRET: interpreted kernels cannot be compiled", file=sys.stderr)
        return 2
    print(f"Triton {triton.__version__}")
    print(f"{'arch':5} {'registers':>9} {'spilled':>7} {'shared':>7}  kernel")
    count = bad = 0
    for arch in parsed.arch:
        for case in cases(arch):
            if not all(word in case.name for word in parsed.only.split()):
                continue
            usage = compiled_usage(case, arch)
            fits = usage.spilled == 0 and usage.shared <= shared_limit(arch)
            count, bad = count + 1, bad + (not fits)
            numbers = f"{usage.registers:9} {usage.spilled:7} {usage.shared:7}"
            print(f"sm_{arch} {numbers}  {case.name}{'' if fits else '  FAILED'}", flush=True)
    print(f"{count} compiled, {bad} failed (spilled, or too much shared memory)")
    return 2 if count == 0 else int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
