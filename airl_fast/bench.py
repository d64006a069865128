"""``airl-fast bench``: options and start of the benchmarks, which live in the repository.

The harness is not installed with the package: it reads tests/oracle.py and writes its results
next to itself.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

EPILOG = """\
A row has a speed only if its result is right: checked against the float64 oracle on small
inputs, and on samples of the very output that was timed. Writes results.json, results.md and
plots. Nothing else should run on the machine meanwhile.

examples:
  airl-fast bench --quick
  airl-fast bench --only linear_logprob --rounds 9 --output-dir /tmp/results
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a run to ``parser``."""
    add = parser.add_argument
    add("--quick", action="store_true", help="tiny shapes: does everything work? no speeds")
    add("--only", action="append", default=[], metavar="OPERATOR",
        help="the start of an operator's name; may be given again (default: all)")  # fmt: skip
    add("--peers", action="append", default=[], metavar="PEER",
        help="beside airl_fast, run this peer; may be given again (default: all)")  # fmt: skip
    add("--backend", action="append", default=[], dest="backends", metavar="NAME",
        help="of airl_fast, run this backend; may be given again (default: all)")  # fmt: skip
    add("--shape", action="append", default=[], dest="shapes", metavar="N,V,D", type=_shape,
        help="of the head; may be given again (default: those of three models)")  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help="of the head's inputs (default: %(default)s)")  # fmt: skip
    add("--threads", type=int, metavar="N", help="default: torch's own number")
    add("--rounds", type=int, metavar="N", help="timed rounds, 5 or more (default: 7; quick: 5)")
    add("--seed", type=int, default=0, metavar="N",
        help="of inputs and of the order of calls (default: %(default)s)")  # fmt: skip
    add("--no-sweep", dest="sweep", action="store_false", help="no plots against N and V")
    add("--no-memory", dest="memory", action="store_false", help="do not measure peak memory")
    add("--report", type=Path, metavar="FILE",
        help="measure nothing: draw the table and plots of a results.json again")  # fmt: skip
    add("--output-dir", type=Path, metavar="DIR",
        help="default: benchmarks/results/HARDWARE-DATE")  # fmt: skip


def _shape(text: str) -> tuple[int, int, int]:
    """Read "N,V,D"."""
    try:
        n, v, d = (int(size) for size in text.split(","))
    except ValueError:
        n = v = d = 0
    if min(n, v, d) < 1:
        raise argparse.ArgumentTypeError(f"expected N,V,D such as 2048,49152,576, received {text}")
    return n, v, d


def run_bench(arguments: argparse.Namespace) -> int:
    """Run the benchmarks and print where the results are.

    Args:
        arguments: what :func:`add_options` added.

    Returns:
        The exit status: 0, or 1 if an airl_fast result was wrong.

    Raises:
        ValueError: not in the repository, or an option that means nothing.
    """
    if arguments.report is not None:
        return _report(arguments.report, arguments.output_dir)
    rounds = arguments.rounds or (5 if arguments.quick else 7)
    if rounds < 5:
        raise ValueError(f"--rounds: expected 5 or more for a median, received {rounds}")
    if arguments.threads is not None and arguments.threads < 1:
        raise ValueError(f"--threads: expected 1 or more, received {arguments.threads}")
    _find_repository()
    import torch

    suite, report = (import_module(f"benchmarks.{name}") for name in ("suite", "report"))
    unknown = [s for s in arguments.only if not any(o.startswith(s) for o in suite.OPERATORS)]
    if unknown:
        raise ValueError(
            f"--only {unknown[0]}: expected the start of one of: {'; '.join(suite.OPERATORS)}"
        )
    settings = suite.Settings(
        quick=arguments.quick,
        only=tuple(arguments.only),
        peers=tuple(arguments.peers),
        backends=tuple(arguments.backends),
        shapes=tuple(arguments.shapes),
        dtype=arguments.dtype,
        seed=arguments.seed,
        threads=arguments.threads or torch.get_num_threads(),
        rounds=rounds,
        sweep=arguments.sweep,
        memory=arguments.memory,
    )
    results = suite.run(settings)
    print(report.write(results, arguments.output_dir) / "results.md")
    wrong = [row for row in results.rows if row.status == "wrong" and "airl_fast" in row.peer]
    for row in wrong:
        print(f"wrong: {row.operator} {row.backend}: {row.reason}", file=sys.stderr)
    return 1 if wrong else 0


def _report(file: Path, folder: Path | None) -> int:
    """Write results.md and the plots of a results.json, beside it unless told otherwise."""
    if not file.is_file():
        raise ValueError(
            f"--report: expected a results.json of an earlier run, found no file {file}"
        )
    _find_repository()
    suite, report = (import_module(f"benchmarks.{name}") for name in ("suite", "report"))
    try:
        results = suite.Results.from_json(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"--report {file}: {error}") from error
    print(report.write(results, folder or file.parent) / "results.md")
    return 0


def _find_repository() -> None:
    """Make ``benchmarks`` importable from the checkout that holds this package, or from here."""
    for root in (Path(__file__).resolve().parent.parent, Path.cwd()):
        if (root / "benchmarks" / "harness.py").is_file() and (root / "tests/oracle.py").is_file():
            if str(root) not in sys.path:
                sys.path.insert(0, str(root))
            return
    raise ValueError(
        "the benchmarks are not part of the installed package: expected benchmarks/ and "
        f"tests/oracle.py beside the package or in {Path.cwd()}; run this in a checkout of the "
        "repository"
    )
