"""The command ``airl-fast``: demo, train, score, rerank, locate, calibrate, doctor and others.

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
    rerank.add_argument("--method", choices=("best", "weighted", "majority"), default="best",
                        help="how one is chosen (default: %(default)s)")  # fmt: skip
    rerank.add_argument("--temperature", type=float, default=1.0, metavar="T",
                        help="of --method weighted (default: %(default)s)")  # fmt: skip
    _add_reader(add("locate", _locate, "find the step most likely to be wrong", _LOCATE))
    calibrate = add("calibrate", _calibrate, "teach locate when to say that no step is wrong",
                    _CALIBRATE)  # fmt: skip
    _add_reader(calibrate, output=False)
    calibrate.add_argument("--folds", type=int, default=5, metavar="N",
                           help="of the cross-validation (default: %(default)s)")  # fmt: skip
    calibrate.add_argument("--seed", type=int, default=0, metavar="N",
                           help="of the folds (default: %(default)s)")  # fmt: skip

    add("doctor", _doctor, "say what this machine and this installation have", _DOCTOR)
    add("recipes", _recipes, "list the configurations that ship with the package", _RECIPES)
    add_options(add("bench", run_bench, "measure the operators, from the repository", EPILOG))
    return parser


def _add_reader(command: argparse.ArgumentParser, output: bool = True) -> None:
    """Add what score, rerank, locate and calibrate share."""
    add = command.add_argument
    add("directory", type=Path, metavar="DIR", help="folder of a finished run, or its reward/")
    add("input", type=Path, metavar="INPUT.jsonl", help="one JSON object a line")
    if output:
        add("--output", type=Path, metavar="OUT.jsonl", help="default: standard output")
    add("--policy", metavar="NAME|DIR", help="policy of the AIRL form (default: DIR/policy)")
    add("--device", default="cpu", help="such as cpu or cuda (default: %(default)s)")
    add("--passes", choices=("packed", "alone"),
        help="as many rows a pass as --token-budget holds, or one pass for every prompt and every "
        "completion (default: alone on a CPU where packing is not exact, else packed)")  # fmt: skip
    add("--token-budget", type=int, default=16384, metavar="N",
        help="tokens of a packed pass (default: %(default)s)")  # fmt: skip
    add(
        "--merge-steps",
        action="store_true",
        help="with a policy of another tokenizer: join steps that it does not end with the next",
    )
    add("--no-end-of-text", dest="end_of_text", action="store_false",
        help="completions are not finished: append no end-of-text token")  # fmt: skip


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

    return _use(
        arguments,
        rerank_file,
        by=arguments.by,
        method=arguments.method,
        temperature=arguments.temperature,
    )


def _locate(arguments: argparse.Namespace) -> int:
    from airl_fast.score_files import locate_file

    return _use(arguments, locate_file)


def _calibrate(arguments: argparse.Namespace) -> int:
    from airl_fast.score_files import calibrate_file

    made = calibrate_file(
        _loader(arguments),
        arguments.directory,
        arguments.input,
        end_of_text=arguments.end_of_text,
        folds=arguments.folds,
        seed=arguments.seed,
    )
    print(made.summary())
    return 0


def _use(arguments: argparse.Namespace, run: Callable[..., None], **options: Any) -> int:
    end_of_text = arguments.end_of_text
    load = _loader(arguments)
    run(load, arguments.input, arguments.output, end_of_text=end_of_text, **options)
    return 0


def _loader(arguments: argparse.Namespace) -> Callable[[], RewardScorer]:
    _hush()

    def load() -> RewardScorer:
        from airl_fast.scorer import RewardScorer

        return RewardScorer.from_pretrained(
            arguments.directory,
            policy=arguments.policy,
            device=arguments.device,
            passes=arguments.passes,
            token_budget=arguments.token_budget,
            merge_steps=arguments.merge_steps,
        )

    return load


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
comes out for each, in order: "order" (indices of the completions, best first), their "scores" in
that order, and the "answer" of the winner. "id" is passed on. --method weighted adds up softmax
weights per answer, majority counts answers and lets the reward decide ties; both give every
answer's "weight" in "votes". Answers are read as in the task that the reward was trained for,
unless the line has "answers" (texts or null, one for each completion).

examples:
  airl-fast rerank runs/demo samples.jsonl --output ranked.jsonl
  airl-fast rerank runs/demo samples.jsonl --method majority
"""
_LOCATE = f"""\
A line: {{"prompt": "2+3=", "completion": "2+3=5;#5."}} or {{"problem": "2+3=", "steps": ["2+3=5;",
"#5."]}} (as in ProcessBench; joined by newlines where a step does not end as the reward was
trained). {_INPUTS} One line comes out for each, in order: the 0-based "step", its text and
offsets, all steps' scores, the "lowest", and its margin to the second lowest. "id" and "label" are
passed on. After `airl-fast calibrate`, "step" is null where no step deviates, and "confidence" is
the probability that "step" is right; before it, "step" is the lowest and "confidence" null.

example:
  airl-fast locate runs/demo traces.jsonl --output steps.jsonl
"""
_CALIBRATE = """\
Lines as of `airl-fast locate`, with "label": the 0-based first wrong step, or -1 for none (as in
ProcessBench); ten or more of each kind. Chooses the threshold of the highest ProcessBench F1, fits
the confidence, judges both by cross-validation, and writes reward/calibration.json, which score
and locate read from then on.

example:
  airl-fast calibrate runs/demo labelled.jsonl
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
