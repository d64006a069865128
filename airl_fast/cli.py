"""The command ``airl-fast``: every use of the package that needs no Python.

Commands import what they need when they run, so that ``airl-fast --help`` is immediate. What a
user can put right is one line on standard error and exit status 2; whatever else fails keeps its
traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from airl_fast import __version__, commands
from airl_fast import command_help as texts
from airl_fast.bench import EPILOG, add_options, run_bench

_Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments after the program's name; those of the process by default.

    Returns:
        The exit status: 0 done, 1 ``doctor`` found a problem, 2 something to put right, 130
        interrupted.
    """
    arguments = _parse(argv)
    command: _Command = arguments.command
    try:
        return command(arguments)
    except BrokenPipeError:  # the reader of a pipe (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("airl-fast: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ArithmeticError, RuntimeError) as error:
        if not _is_for_users(error):
            raise
        print(f"airl-fast: {error}", file=sys.stderr)
        return 2


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments, with overrides anywhere: argparse alone takes none that follow an option."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if hasattr(arguments, "overrides"):
        later = [word for word in rest if "=" in word and not word.startswith("-")]
        arguments.overrides += later
        rest = [word for word in rest if word not in later]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


def _is_for_users(error: Exception) -> bool:
    """Whether an error is the machine's or the input's fault, and says so by itself.

    Missing files, full disks and unreachable hubs are; so is what this package worded: a
    ValueError, a gradient that is not finite, a damaged checkpoint. One from elsewhere, or from an
    operator (which only this package calls here), is a bug.
    """
    if isinstance(error, OSError):
        return True
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    where = frame.f_globals.get("__name__", "")
    forced = where == "airl_fast.ops.dispatch"  # a backend that the user asked for and is not here
    return forced or (where.startswith("airl_fast.") and not where.startswith("airl_fast.ops."))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="airl-fast",
        description="Learn reasoning rewards from expert demonstrations by adversarial inverse "
        "RL, and use them.",
        epilog="`airl-fast COMMAND --help` says more, with an example.",
    )
    parser.add_argument("--version", action="version", version=f"airl-fast {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, run: _Command, help: str, more: str = "", **options: Any) -> Any:
        made = subparsers.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            epilog=more or getattr(texts, name.upper()),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )
        made.set_defaults(command=run)
        return made

    demo = add("demo", commands.demo, "show the whole way on a small built-in task, in minutes")
    demo.add_argument("--output-dir", type=Path, default=Path("runs/demo"), metavar="DIR",
                      help="where results and models go (default: %(default)s)")  # fmt: skip
    demo.add_argument("--seed", type=int, default=0, metavar="N",
                      help="of data, sampling and weights (default: %(default)s)")  # fmt: skip

    _add_study(add("study", commands.study, "run a grid of seeds by variants, and compare"))

    train = add("train", commands.train, "train a reward and a policy", add_help=False)
    train.add_argument("-h", "--help", action=_TrainHelp, help="show this and every key")
    train.add_argument("recipe", metavar="RECIPE|FILE.yaml",
                       help="a recipe (`airl-fast recipes` lists them) or a YAML file")  # fmt: skip
    train.add_argument("overrides", nargs="*", metavar="section.key=value",
                       help="values that replace the file's")  # fmt: skip

    export = add("export", commands.export, "write the reward and policy of any checkpoint")
    export.add_argument("directory", type=Path, metavar="DIR", help="folder of a run")
    export.add_argument("--checkpoint", default="best", metavar="best|last|STEP",
                        help="which (default: %(default)s, on validation)")  # fmt: skip
    export.add_argument("--output", type=Path, metavar="OUT",
                        help="folder (default: DIR/best, or the checkpoint's name)")  # fmt: skip

    _add_reader(add("score", commands.score, "score completions per token, step and sequence"))
    rerank = add("rerank", commands.rerank, "rank the completions of each prompt, best first")
    _add_reader(rerank)
    rerank.add_argument("--by", choices=("f", "reward"), default="f",
                        help="f, or the AIRL reward f - log pi (default: %(default)s)")  # fmt: skip
    rerank.add_argument("--method", choices=("best", "weighted", "majority"), default="best",
                        help="how one is chosen (default: %(default)s)")  # fmt: skip
    rerank.add_argument("--temperature", type=float, default=1.0, metavar="T",
                        help="of --method weighted (default: %(default)s)")  # fmt: skip
    _add_reader(add("locate", commands.locate, "find the step most likely to be wrong"))
    calibrate = add("calibrate", commands.calibrate, "teach locate to say that no step is wrong")
    _add_reader(calibrate, output=False)
    calibrate.add_argument("--folds", type=int, default=5, metavar="N",
                           help="of the cross-validation (default: %(default)s)")  # fmt: skip
    calibrate.add_argument("--seed", type=int, default=0, metavar="N",
                           help="of the folds (default: %(default)s)")  # fmt: skip

    _add_eval(add("eval", commands.evaluate, "measure a reward on traces with known faults"))
    _add_server(add("serve", commands.serve, "answer requests for rewards over HTTP"))

    report = add(
        "report",
        commands.report,
        "write a run, scored traces and results as one page",
    )
    _add_report(report)
    add("doctor", commands.doctor, "say what this machine and this installation have")
    add(
        "recipes",
        commands.recipes,
        "list the configurations that ship with the package",
    )
    add_options(add("bench", run_bench, "measure the operators, from the repository", EPILOG))
    return parser


def _add_study(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("study", metavar="NAME|FILE.yaml", nargs="?", help="without one: what there is")
    add("overrides", nargs="*", metavar="section.key=value",
        help="after the file's own, before those of its starts and variants")  # fmt: skip
    add("--output-dir", type=Path, metavar="DIR", help="default: runs/study-NAME")
    add("--seeds", type=int, nargs="+", metavar="N", help="instead of the file's")
    add("--jobs", type=int, default=1, metavar="N",
        help="worker processes, one thread each (default: %(default)s)")  # fmt: skip
    add("--page", type=Path, metavar="FILE.md",
        help="write the page there too, its plots in a folder of its name")  # fmt: skip


def _add_reader(command: argparse.ArgumentParser, output: bool = True) -> None:
    """Add what score, rerank, locate and calibrate share."""
    add = command.add_argument
    add("directory", type=Path, metavar="DIR", help="folder of a finished run, or its reward/")
    add("input", type=Path, metavar="INPUT.jsonl", help="one JSON object a line")
    if output:
        add("--output", type=Path, metavar="OUT.jsonl", help="default: standard output")
    add("--no-end-of-text", dest="end_of_text", action="store_false",
        help="completions are not finished: append no end-of-text token")  # fmt: skip
    _add_models(command)


def _add_eval(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("directory", type=Path, metavar="DIR", help="folder of a finished run, or its reward/")
    add("input", type=Path, metavar="DATA.jsonl", help="judged traces; .jsonl.gz too")
    add("--format", choices=("jsonl", "processbench", "prm800k"), default="jsonl",
        help="of the rows (default: %(default)s)")  # fmt: skip
    add("--output", type=Path, metavar="OUT", help="folder (default: DIR/eval/NAME OF THE DATA)")
    add("--max-tokens", type=int, metavar="N",
        help="leave out traces of more tokens, prompt included; they are counted")  # fmt: skip
    add("--no-plots", dest="plots", action="store_false", help="numbers only, no PNG files")
    add("--seed", type=int, default=0, metavar="N",
        help="of intervals, folds and subsets (default: %(default)s)")  # fmt: skip
    add("--no-end-of-text", dest="end_of_text", action="store_false",
        help="completions are not finished: append no end-of-text token")  # fmt: skip
    _add_models(command)


def _add_models(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--policy", metavar="NAME|DIR", help="policy of the AIRL form (default: DIR/policy)")
    add("--device", default="cpu", help="such as cpu or cuda (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), help="of the weights (default: as saved)")
    add("--passes", choices=("packed", "alone"),
        help="as many rows a pass as --token-budget holds, or one pass for every prompt and every "
        "completion (default: alone on a CPU where packing is not exact, else packed)")  # fmt: skip
    add("--token-budget", type=int, metavar="N",
        help="tokens of a packed pass (default: 16384, on a CPU 2048 or the longest)")  # fmt: skip
    add(
        "--merge-steps",
        action="store_true",
        help="with a policy of another tokenizer: join steps that it does not end with the next",
    )


def _add_server(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("directory", type=Path, metavar="DIR", help="folder of a finished run, or its reward/")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    add("--token-file", type=Path, metavar="FILE",
        help="holds the token that callers must send; default: the variable AIRL_FAST_TOKEN, if "
             "set")  # fmt: skip
    add("--value", choices=("f", "reward"), default="f",
        help="f, or the AIRL reward f - log pi (default: %(default)s)")  # fmt: skip
    add("--reduce", choices=("sum", "mean", "min", "last"), default="sum",
        help="how the spans' rewards become a sequence's (default: %(default)s)")  # fmt: skip
    add("--max-request-mib", type=float, default=4.0, metavar="MIB",
        help="largest body (default: %(default)s)")  # fmt: skip
    add("--max-waiting", type=int, default=256, metavar="N",
        help="requests that may wait (default: %(default)s)")  # fmt: skip
    add("--timeout", type=float, default=120.0, metavar="SECONDS",
        help="until a request is given up (default: %(default)s)")  # fmt: skip
    _add_models(command)


def _add_report(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("directory", type=Path, nargs="?", metavar="DIR", help="folder of a run")
    add("--output", type=Path, metavar="FILE.html", help="default: DIR/report.html")
    add("--scores", type=Path, metavar="SCORES.jsonl", help="what `airl-fast score` wrote")
    add("--traces", type=Path, metavar="TRACES.jsonl",
        help="what it read, with labels if there are any")  # fmt: skip
    add("--located", type=Path, metavar="STEPS.jsonl",
        help="what `airl-fast locate` wrote of the same traces")  # fmt: skip
    add("--eval", type=Path, dest="evaluation", metavar="METRICS.json",
        help="results of an evaluation")  # fmt: skip
    add("--title", help="of the page")
    add("--max-traces", type=int, default=1000, metavar="N",
        help="traces in the viewer (default: %(default)s)")  # fmt: skip


class _TrainHelp(argparse.Action):
    """``train --help``: every configuration key, looked up only when asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from airl_fast.config import describe_config

        recipes = "\n".join(f"  {line}" for line in commands.recipe_lines())
        parser.epilog = f"{parser.epilog}\nrecipes:\n{recipes}\n\nkeys:\n\n{describe_config()}"
        parser.print_help()
        parser.exit()
