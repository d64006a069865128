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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airl_fast import __version__
from airl_fast.bench import EPILOG, add_options, run_bench

if TYPE_CHECKING:
    from airl_fast.scorer import RewardScorer

_Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments after the program's name; those of the process by default.

    Returns:
        The exit status: 0 done, 1 ``doctor`` found a problem, 2 something to put right, 130
        interrupted.
    """
    arguments = _parser().parse_args(argv)
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
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, run: _Command, help: str, more: str, **options: Any) -> Any:
        made = commands.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            epilog=more,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )
        made.set_defaults(command=run)
        return made

    demo = add("demo", _demo, "show the whole way on a small built-in task, in minutes", _DEMO)
    demo.add_argument("--output-dir", type=Path, default=Path("runs/demo"), metavar="DIR",
                      help="where results and models go (default: %(default)s)")  # fmt: skip
    demo.add_argument("--seed", type=int, default=0, metavar="N",
                      help="of data, sampling and weights (default: %(default)s)")  # fmt: skip

    train = add("train", _train, "train a reward and a policy", _TRAIN, add_help=False)
    train.add_argument("-h", "--help", action=_TrainHelp, help="show this and every key")
    train.add_argument("recipe", metavar="RECIPE|FILE.yaml",
                       help="a recipe (`airl-fast recipes` lists them) or a YAML file")  # fmt: skip
    train.add_argument("overrides", nargs="*", metavar="section.key=value",
                       help="values that replace the file's")  # fmt: skip

    _add_reader(add("score", _score, "score completions per token, step and sequence", _SCORE))
    rerank = add("rerank", _rerank, "rank the completions of each prompt, best first", _RERANK)
    _add_reader(rerank)
    rerank.add_argument("--by", choices=("f", "reward"), default="f",
                        help="f, or the AIRL reward f - log pi (default: %(default)s)")  # fmt: skip
    _add_reader(add("locate", _locate, "find the step most likely to be wrong", _LOCATE))

    _add_eval(add("eval", _eval, "measure a reward on traces with known faults", _EVAL))
    _add_server(add("serve", _serve, "answer requests for rewards over HTTP", _SERVE))

    report = add("report", _report, "write a run, scored traces and results as one page", _REPORT)
    _add_report(report)
    add("doctor", _doctor, "say what this machine and this installation have", _DOCTOR)
    add("recipes", _recipes, "list the configurations that ship with the package", _RECIPES)
    add_options(add("bench", run_bench, "measure the operators, from the repository", EPILOG))
    return parser


def _add_reader(command: argparse.ArgumentParser) -> None:
    """Add what score, rerank and locate share."""
    add = command.add_argument
    add("directory", type=Path, metavar="DIR", help="folder of a finished run, or its reward/")
    add("input", type=Path, metavar="INPUT.jsonl", help="one JSON object a line")
    add("--output", type=Path, metavar="OUT.jsonl", help="default: standard output")
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
    _add_models(command)


def _add_models(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--policy", metavar="NAME|DIR", help="policy of the AIRL form (default: DIR/policy)")
    add("--device", default="cpu", help="such as cpu or cuda (default: %(default)s)")
    add("--token-budget", type=int, default=16384, metavar="N",
        help="tokens of a forward pass (default: %(default)s)")  # fmt: skip
    add("--no-end-of-text", dest="end_of_text", action="store_false",
        help="completions are not finished: append no end-of-text token")  # fmt: skip


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
    add("--policy", metavar="NAME|DIR", help="policy of the AIRL form (default: DIR/policy)")
    add("--device", default="cpu", help="such as cpu or cuda (default: %(default)s)")
    add("--token-budget", type=int, default=16384, metavar="N",
        help="tokens of a forward pass, shared by requests (default: %(default)s)")  # fmt: skip
    add("--max-request-mib", type=float, default=4.0, metavar="MIB",
        help="largest body (default: %(default)s)")  # fmt: skip
    add("--max-waiting", type=int, default=256, metavar="N",
        help="requests that may wait (default: %(default)s)")  # fmt: skip
    add("--timeout", type=float, default=120.0, metavar="SECONDS",
        help="until a request is given up (default: %(default)s)")  # fmt: skip


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

        recipes = "\n".join(f"  {line}" for line in _recipe_lines())
        parser.epilog = f"{parser.epilog}\nrecipes:\n{recipes}\n\nkeys:\n\n{describe_config()}"
        parser.print_help()
        parser.exit()


def _demo(arguments: argparse.Namespace) -> int:
    from airl_fast.demo import DemoSettings, run_demo

    _hush()
    run_demo(arguments.output_dir, DemoSettings(seed=arguments.seed))
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from airl_fast.config import load_config

    config = load_config(arguments.recipe, arguments.overrides)  # before the slow imports

    from rich.console import Console

    from airl_fast.progress import TrainingProgress, summary
    from airl_fast.trainer import Trainer

    _hush()
    console = Console()
    folder = Path(config.run.output_dir)
    console.print(f"{config.algorithm.name} on {config.task.name}, in {folder}", highlight=False)
    with TrainingProgress(config.total_steps, console=console) as progress:
        trainer = Trainer(config, on_step=progress)
        try:
            history = trainer.train()
        except KeyboardInterrupt:
            print(
                f"airl-fast: interrupted after step {trainer.step} of {trainer.total_steps}; the "
                "same command goes on from the last checkpoint",
                file=sys.stderr,
            )
            return 130
    console.print(summary(history))
    console.print(f"policy:  {folder / 'policy'}", highlight=False, soft_wrap=True)
    if trainer.discriminator is not None:
        console.print(f"reward:  {folder / 'reward'}", highlight=False, soft_wrap=True)
        console.print(f"use it:  airl-fast score {folder} traces.jsonl", highlight=False)
    return 0


def _score(arguments: argparse.Namespace) -> int:
    from airl_fast.score_files import score_file

    return _use(arguments, score_file)


def _rerank(arguments: argparse.Namespace) -> int:
    from airl_fast.score_files import rerank_file

    return _use(arguments, rerank_file, by=arguments.by)


def _locate(arguments: argparse.Namespace) -> int:
    from airl_fast.score_files import locate_file

    return _use(arguments, locate_file)


def _use(arguments: argparse.Namespace, run: Callable[..., None], **options: Any) -> int:
    _hush()
    end_of_text = arguments.end_of_text
    load = partial(_scorer, arguments)
    run(load, arguments.input, arguments.output, end_of_text=end_of_text, **options)
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from airl_fast.evaluation.files import evaluate_file

    name = arguments.input.name.split(".")[0]
    target = arguments.output or arguments.directory / "eval" / name

    def run(load: Callable[[], RewardScorer], source: Path, _: Path | None, **options: Any) -> None:
        evaluate_file(load, source, target, **options)

    status = _use(
        arguments,
        run,
        format=arguments.format,
        max_tokens=arguments.max_tokens,
        plots=arguments.plots,
        seed=arguments.seed,
    )
    print((target / "metrics.md").read_text("utf-8"))
    print(f"written: {', '.join(str(path) for path in sorted(target.iterdir()))}")
    return status


def _scorer(arguments: argparse.Namespace) -> RewardScorer:
    from airl_fast.scorer import RewardScorer

    return RewardScorer.from_pretrained(
        arguments.directory,
        policy=arguments.policy,
        device=arguments.device,
        token_budget=arguments.token_budget,
    )


def _serve(arguments: argparse.Namespace) -> int:
    from airl_fast.integrations.rewards import RewardReader
    from airl_fast.serving.server import serve

    _hush()

    def load() -> RewardReader:
        scorer = _scorer(arguments)
        return RewardReader(scorer=scorer, value=arguments.value, reduce=arguments.reduce)

    serve(
        load,
        host=arguments.host,
        port=arguments.port,
        request_bytes=int(arguments.max_request_mib * 2**20),
        waiting=arguments.max_waiting,
        seconds=arguments.timeout,
        token_file=arguments.token_file,
    )
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from airl_fast.report import report_run

    folder, output = arguments.directory, arguments.output
    if output is None and folder is None:
        raise ValueError("nowhere to write: give a run's folder, or --output FILE.html")
    output = output or folder / "report.html"
    options = ("scores", "traces", "located", "evaluation", "title", "max_traces")
    given = {name: getattr(arguments, name) for name in options}
    for text in report_run(output, folder=folder, **given):
        print(f"airl-fast: {text}", file=sys.stderr)
    print(output)
    return 0


def _doctor(_: argparse.Namespace) -> int:
    import rich

    from airl_fast.doctor import doctor

    report = doctor()
    rich.print(report)
    return 1 if report.problems else 0


def _recipes(_: argparse.Namespace) -> int:
    print("\n".join(_recipe_lines()))
    return 0


def _recipe_lines() -> list[str]:
    """Each recipe's name and the comment at the top of its file."""
    from importlib.resources import files

    from airl_fast.config import recipes

    lines = []
    for name in recipes():
        text = (files("airl_fast.recipes") / f"{name}.yaml").read_text("utf-8")
        head = [line.removeprefix("#").strip() for line in text.splitlines() if line[:1] == "#"]
        lines += [name, *(f"    {line}" for line in head)]
    return lines


def _hush() -> None:
    """No bars of weights being loaded or written: the commands have their own."""
    from transformers.utils import logging

    logging.disable_progress_bar()


_DEMO = """\
Trains on chained additions with imperfect experts: no network, no GPU, at most five minutes on
two cores. Prints how the learned reward and policy compare with SFT and with the true outcome.

example:
  airl-fast demo --output-dir runs/demo
"""
_TRAIN = """\
An interrupted run goes on from its last checkpoint when the same command is given again. The
run's folder gets policy/, reward/, metrics.jsonl and config.yaml.

examples:
  airl-fast train arithmetic run.output_dir=runs/first run.steps=20
  airl-fast train my.yaml algorithm.granularity=sparse 'policy.betas=[0.9, 0.95]'
"""
_INPUTS = """\
A prompt is a text, a list of messages or a list of token ids; so is a completion, which may also
be a list of texts, one a step."""
_SCORE = f"""\
A line: {{"prompt": "2+3=", "completion": "2+3=5;#5."}}. {_INPUTS} One line comes out for each, in
order: f and the AIRL reward (f - log pi) of the sequence, of every step and of every token, with
character offsets into "text". "id" is passed on.

example:
  airl-fast score runs/demo traces.jsonl --output scores.jsonl
"""
_RERANK = f"""\
A line: {{"prompt": "2+3=", "completions": ["2+3=5;#5.", "2+3=6;#6."]}}. {_INPUTS} One line
comes out for each, in order: "order" (indices of the completions, best first) and their "scores"
in that order. "id" is passed on.

example:
  airl-fast rerank runs/demo samples.jsonl --output ranked.jsonl
"""
_LOCATE = f"""\
A line: {{"prompt": "2+3=", "completion": "2+3=5;#5."}} or {{"problem": "2+3=", "steps": ["2+3=5;",
"#5."]}} (as in ProcessBench; joined by newlines where a step does not end as the reward was
trained). {_INPUTS} One line comes out for each, in order: the 0-based "step" with the lowest f,
its text and offsets, all steps' scores, and the margin to the second lowest. "id" and "label"
are passed on.

example:
  airl-fast locate runs/demo traces.jsonl --output steps.jsonl
"""
_EVAL = """\
Judged traces come in one of three formats:
  jsonl         {"prompt": ..., "completions": ["...", "..."], "correct": [true, false]}, with
                "answers" to vote on (else read from the texts); or {"prompt": ..., "steps":
                ["...", "..."], "label": 1}: the first wrong step, from 0, or -1
  processbench  its rows, as JSON lines or a JSON array
  prm800k       its rows: the first chosen step rated -1 is the error
What a format's rules leave out is counted. Written are metrics.json, metrics.md and plots:
best-of-n curves, AUC, first-error localisation, calibration, length and format bias, beside a
random pick, the majority, log pi (sum and mean) and an oracle.

examples:
  airl-fast eval runs/demo judged.jsonl
  airl-fast eval runs/gsm8k gsm8k.json --format processbench --max-tokens 2048
"""
_SERVE = """\
Speaks POST /score (all that `airl-fast score` writes), OpenRLHF's /get_reward, vLLM's /pooling and
/classify; GET /health and /metrics (Prometheus). Needs the serve extra. A token is required on any
address that other machines can reach. SIGTERM finishes what has been asked and exits with 0.
docs/serving.md has the requests and answers.

example:
  airl-fast serve runs/demo --port 8000
"""
_REPORT = """\
One HTML file that holds everything it shows: learning curves, distributions of rewards, results
of an evaluation, and a viewer that colours traces by reward. Files of traces go together line for
line; a line may also say "correct", "label" (as in ProcessBench), "group", "source" and "title".

example:
  airl-fast score runs/arithmetic traces.jsonl --output scores.jsonl
  airl-fast locate runs/arithmetic traces.jsonl --output steps.jsonl
  airl-fast report runs/arithmetic --scores scores.jsonl --traces traces.jsonl \\
      --located steps.jsonl
"""
_DOCTOR = """\
Prints versions, devices, the backend of every operator and why, and what each missing extra
would add. The exit status is 1 if something is broken.

example:
  airl-fast doctor
"""
_RECIPES = """\
example:
  airl-fast recipes
"""
