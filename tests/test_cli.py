import io
import json
import shutil
import subprocess
import sys
import types

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

import airl_fast
from airl_fast import RewardScorer, cli
from airl_fast.config import describe_config, recipes
from airl_fast.progress import TrainingProgress, summary
from tests.tiny_run import SMALL, tiny_run  # noqa: F401

PROMPT = "68+4+2+9-6="
RIGHT = "68+4=72;72+2=74;74+9=83;83-6=77;#77."
WRONG = "68+4=72;72+2=75;75+9=84;84-6=78;#78."
STEPS = ["68+4=72;", "72+2=75;", "75+9=84;", "84-6=78;", "#78."]


def written(path, *rows):
    path.write_text(
        "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    )
    return str(path)


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def scorer(tiny_run):  # noqa: F811
    return RewardScorer.from_pretrained(tiny_run)


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def test_help_of_every_command_has_an_example(capsys):
    for command in ("demo", "train", "score", "rerank", "locate", "eval", "doctor", "recipes"):
        with pytest.raises(SystemExit) as stop:
            run(command, "--help")
        assert stop.value.code == 0
        assert f"airl-fast {command}" in capsys.readouterr().out.split("example")[1]


def test_train_help_lists_every_key_and_recipe(capsys):
    with pytest.raises(SystemExit):
        run("train", "--help")
    text = capsys.readouterr().out
    assert describe_config() in text
    assert all(f"\n  {name}\n" in text for name in recipes())


def test_help_and_version_import_nothing_heavy():
    code = (
        "import sys; from airl_fast.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print('loaded', *sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(out.stdout.split("loaded ")[1].split())
    assert loaded & {"torch", "transformers", "rich", "pydantic", "numpy"} == set()


def test_python_m_airl_fast():
    command = [sys.executable, "-m", "airl_fast", "--version"]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert out.stdout == f"airl-fast {airl_fast.__version__}\n"


def test_recipes(capsys):
    assert run("recipes") == 0
    out = capsys.readouterr().out.splitlines()
    assert [line for line in out if not line.startswith(" ")] == recipes()


def test_doctor(capsys, monkeypatch):
    status = run("doctor")
    assert "airl_fast" in capsys.readouterr().out
    assert status in (0, 1)
    broken = types.SimpleNamespace(problems=("no compiler",))
    monkeypatch.setattr("airl_fast.doctor.doctor", lambda: broken)
    assert run("doctor") == 1


def test_demo(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("airl_fast.demo.run_demo", lambda *given: calls.append(given))
    assert run("demo", "--output-dir", tmp_path / "d", "--seed", 3) == 0
    ((folder, settings),) = calls
    assert (folder, settings.seed) == (tmp_path / "d", 3)


def test_train_shows_progress_and_goes_on(tmp_path, capsys):
    folder = tmp_path / "run"
    assert run("train", "arithmetic", f"run.output_dir={folder}", *SMALL) == 0
    out, err = capsys.readouterr()
    assert "step 1/6, warm start: log pi" in out
    assert "step 6/6, policy: reward" in out
    assert "pass@1" in out
    assert f"reward:  {folder / 'reward'}" in out
    assert err == ""  # no bars of weights
    assert (folder / "policy" / "model.safetensors").is_file()
    assert run("train", folder / "config.yaml") == 0  # it has ended: nothing to do
    assert "step" not in capsys.readouterr().out.split("phase")[0]
    assert run("train", folder / "config.yaml", "run.resume=never") == 2
    assert "already holds a run" in capsys.readouterr().err


def test_train_interrupted(tmp_path, capsys, monkeypatch):
    def interrupt(self, metrics):
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingProgress, "__call__", interrupt)
    assert run("train", "arithmetic", f"run.output_dir={tmp_path}", *SMALL) == 130
    assert "interrupted after step 1 of 6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "'nope' is no file and no recipe"),
        (["arithmetic", "run.stepz=3"], "run.stepz: no such key; did you mean run.steps?"),
        (["arithmetic", "run.steps=0"], "run.steps"),
        (["gsm8k-smollm2", "task.path=/no/such"], "no such file or folder"),
        (["arithmetic", "policy.model=/no/such/model"], "/no/such/model"),
    ],
)
def test_train_says_what_is_wrong(arguments, message, tmp_path, capsys):
    assert run("train", *arguments, f"run.output_dir={tmp_path}") == 2
    err = capsys.readouterr().err
    assert err.startswith("airl-fast: ")
    assert message in err
    assert "Traceback" not in err


def test_a_damaged_checkpoint_and_a_divergence_are_no_bugs(tmp_path, capsys, monkeypatch):
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    assert run("train", "arithmetic", f"run.output_dir={tmp_path}") == 2
    assert "every checkpoint in" in capsys.readouterr().err

    monkeypatch.setattr("airl_fast.optimisation.clip_grad_norm_", lambda *_: float("nan"))
    assert run("train", "arithmetic", f"run.output_dir={tmp_path / 'other'}") == 2
    assert "lower the learning rate" in capsys.readouterr().err


def test_score(scorer, tiny_run, tmp_path, capsys):  # noqa: F811
    ids = scorer.tokenizer(RIGHT).input_ids
    rows = (
        {"id": "a", "prompt": PROMPT, "completion": RIGHT},
        "\n",
        {"prompt": PROMPT, "completion": WRONG, "other": 1},
        {"prompt": PROMPT, "completion": [*ids, 1]},
    )
    assert run("score", tiny_run, written(tmp_path / "in.jsonl", *rows)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = lines(out)
    expected = scorer.score([PROMPT] * 3, [RIGHT, WRONG, [*ids, 1]])
    assert [line.get("id") for line in found] == ["a", None, None]
    for line, one in zip(found, expected, strict=True):
        assert line["f"] == pytest.approx(one.f, abs=1e-5)
        assert line["reward"] == pytest.approx(one.reward, abs=1e-5)
        assert line["granularity"] == "step"
        assert line["text"] == one.text
        assert line["steps"][1]["f"] == pytest.approx(one.steps[1].f, abs=1e-5)
        assert line["steps"][1]["text"] == one.steps[1].text
        assert line["tokens"]["ids"] == list(one.tokens.ids)
        assert line["tokens"]["reward"] == pytest.approx(one.tokens.reward, abs=1e-5)


def test_options_reach_the_scorer(scorer, tiny_run, tmp_path, capsys):  # noqa: F811
    source = written(tmp_path / "in.jsonl", {"prompt": PROMPT, "completion": RIGHT})
    assert run("score", tiny_run / "reward", source, "--no-end-of-text") == 0
    (line,) = lines(capsys.readouterr().out)
    assert line["reward"] is None
    assert line["f"] == pytest.approx(
        scorer.score([PROMPT], [RIGHT], end_of_text=False)[0].f, abs=1e-5
    )
    policy = tiny_run / "policy"
    assert run("score", tiny_run / "reward", source, "--policy", policy) == 0
    assert lines(capsys.readouterr().out)[0]["reward"] is not None
    assert run("score", tiny_run, source, "--passes", "alone", "--token-budget", 20) == 0
    capsys.readouterr()
    assert run("score", tiny_run, source, "--passes", "packed", "--token-budget", 20) == 2
    assert "raise the budget" in capsys.readouterr().err


def test_output_is_written_whole_or_not_at_all(tiny_run, tmp_path, capsys, monkeypatch):  # noqa: F811
    target = tmp_path / "new" / "out.jsonl"
    row = {"prompt": PROMPT, "completion": RIGHT}
    source = written(tmp_path / "in.jsonl", *[row] * 70)
    score = RewardScorer.score_encoded
    calls = []

    def fail_at_the_second(self, pairs):
        calls.append(len(pairs))
        if len(calls) == 2:
            raise RuntimeError("killed")
        return score(self, pairs)

    monkeypatch.setattr(RewardScorer, "score_encoded", fail_at_the_second)
    with pytest.raises(RuntimeError, match="killed"):
        run("score", tiny_run, source, "--output", target)
    assert list(target.parent.iterdir()) == []
    monkeypatch.undo()
    assert run("score", tiny_run, source, "--output", target) == 0
    assert len(lines(target.read_text())) == 70
    assert list(target.parent.iterdir()) == [target]
    assert "70 of 70 lines" in capsys.readouterr().err


def test_rerank(tiny_run, tmp_path, capsys):  # noqa: F811
    source = written(
        tmp_path / "in.jsonl",
        {"prompt": PROMPT, "completions": [WRONG, RIGHT, WRONG]},
        {"id": 7, "prompt": PROMPT, "completions": [RIGHT]},
    )
    assert run("rerank", tiny_run, source) == 0
    first, second = lines(capsys.readouterr().out)
    assert first["order"] == [1, 0, 2]
    assert first["scores"] == sorted(first["scores"], reverse=True)
    assert second == {
        "id": 7, "method": "best", "by": "f", "order": [0], "scores": [first["scores"][0]],
        "answer": "77", "weight": None, "votes": [],
    }  # fmt: skip
    assert run("rerank", tiny_run, source, "--by", "reward") == 0
    assert lines(capsys.readouterr().out)[0]["by"] == "reward"
    assert run("rerank", tiny_run / "reward", source, "--by", "reward") == 2
    assert "--policy" in capsys.readouterr().err
    assert run("rerank", tiny_run, source, "--method", "majority") == 0
    first, _ = lines(capsys.readouterr().out)
    assert (first["order"][0], first["answer"], first["weight"]) == (0, "78", 2 / 3)
    assert first["votes"][1] == {"answer": "77", "weight": 1 / 3, "indices": [1]}
    given = {"prompt": PROMPT, "completions": [WRONG, RIGHT], "answers": [None, "x"]}
    assert run("rerank", tiny_run, written(tmp_path / "a.jsonl", given), "--method=weighted") == 0
    assert lines(capsys.readouterr().out)[0]["answer"] == "x"


def test_calibrate_then_locate(tiny_run, tmp_path, capsys):  # noqa: F811
    run_folder = tmp_path / "run"
    shutil.copytree(tiny_run, run_folder)
    good, bad = [*STEPS[:1], "72+2=74;", "74+9=83;", "83-6=77;", "#77."], STEPS
    labelled = written(
        tmp_path / "labelled.jsonl",
        *[{"problem": PROMPT, "steps": steps, "label": label}
          for steps, label in [(good, -1), (bad, 1)] * 12],
    )  # fmt: skip
    assert run("calibrate", run_folder, labelled, "--folds", 3) == 0
    out = capsys.readouterr().out
    assert out.startswith("24 traces, 12 with an error\n")
    assert "3-fold cross-validation" in out
    assert run("locate", run_folder, labelled) == 0
    clean, wrong = lines(capsys.readouterr().out)[:2]
    assert (clean["step"], clean["text"], clean["label"]) == (None, None, -1)
    assert (wrong["step"], wrong["label"]) == (1, 1)
    assert 0.5 < clean["confidence"] < 1
    assert min(wrong["values"]) < wrong["threshold"] <= min(clean["values"])
    assert RewardScorer.from_pretrained(run_folder).locate(PROMPT, good).step is None
    head = run_folder / "reward" / "discriminator_head.safetensors"
    save_file({k: v + 1 for k, v in load_file(head).items()}, head)
    assert run("locate", run_folder, labelled) == 2
    assert "made for other weights" in capsys.readouterr().err


def test_locate(scorer, tiny_run, tmp_path, capsys):  # noqa: F811
    source = written(
        tmp_path / "in.jsonl",
        {"prompt": PROMPT, "completion": WRONG},
        {"id": "gsm8k-0", "problem": PROMPT, "steps": STEPS, "label": 1},
    )
    assert run("locate", tiny_run, source) == 0
    first, second = lines(capsys.readouterr().out)
    expected = scorer.locate(PROMPT, WRONG)
    assert (first["step"], first["text"], first["start"], first["end"]) == (1, STEPS[1], 8, 16)
    assert first["scores"] == pytest.approx(expected.scores, abs=1e-5)
    assert first["margin"] == pytest.approx(expected.margin, abs=1e-5)
    assert second["scores"] == pytest.approx(first["scores"], abs=1e-5)
    assert (second["id"], second["label"]) == ("gsm8k-0", 1)


GOOD = {"prompt": PROMPT, "completion": RIGHT}


@pytest.mark.parametrize(
    ("command", "row", "message"),
    [
        ("score", '{"prompt": \n', "line 2: not JSON"),
        ("score", "[1]\n", "line 2: list, expected an object"),
        ("score", {"prompt": PROMPT}, "line 2: no column 'completion' among 'prompt'"),
        ("score", {"prompt": PROMPT, "completion": None}, "line 2: expected the completion as"),
        ("score", {"prompt": "1+x=", "completion": "2"}, "line 2: the tokenizer of"),
        ("rerank", GOOD, "line 1: no column 'completions'"),
        ("rerank", {"prompt": PROMPT, "completions": []}, "line 1: no column 'completions'"),
        (
            "rerank",
            {"prompt": PROMPT, "completions": ["2"], "answers": ["2", "3"]},
            "line 1: no column 'completions'",
        ),
        ("locate", {"problem": PROMPT}, "line 2: no column 'steps'"),
        ("locate", {"problem": PROMPT, "steps": [1]}, "line 2: 'steps' is [1], expected a list"),
    ],
)
def test_bad_rows_are_named(command, row, message, tiny_run, tmp_path, capsys):  # noqa: F811
    source = written(tmp_path / "in.jsonl", GOOD, row)
    assert run(command, tiny_run, source, "--output", tmp_path / "out.jsonl") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"airl-fast: {source}, {message}")
    assert not (tmp_path / "out.jsonl").exists()


def test_missing_files_are_named(tiny_run, tmp_path, capsys):  # noqa: F811
    source = written(tmp_path / "in.jsonl", GOOD)
    assert run("score", tmp_path / "none", source) == 2
    assert "none: no such folder" in capsys.readouterr().err
    assert run("score", tmp_path, source) == 2
    assert "holds no trained reward" in capsys.readouterr().err
    assert run("score", tiny_run, tmp_path / "none.jsonl") == 2
    assert "none.jsonl: no such file" in capsys.readouterr().err
    assert run("score", tiny_run, written(tmp_path / "empty.jsonl")) == 2
    assert "no rows" in capsys.readouterr().err


def test_what_is_a_bug_keeps_its_traceback(tiny_run, tmp_path, monkeypatch):  # noqa: F811
    source = written(tmp_path / "in.jsonl", GOOD)
    monkeypatch.setattr(RewardScorer, "score_encoded", lambda self, pairs: int("no number"))
    with pytest.raises(ValueError, match="no number"):
        run("score", tiny_run, source)


def shown(console, **options):
    progress = TrainingProgress(4, console=console, **options)
    with progress:
        for step, phase in enumerate(["sft", "sft", "policy", "policy"], start=1):
            metrics = {"step": step, "phase": phase, "seconds": 0.5, "reward/mean": 1.0 * step}
            progress(metrics | ({"valid/pass@1": 0.25} if step == 3 else {}))
    return console.file.getvalue()


def test_progress_in_a_log_and_on_a_terminal():
    log = shown(Console(file=io.StringIO(), width=200))
    assert [line.split(",")[0] for line in log.splitlines()] == ["step 1/4", "step 3/4", "step 4/4"]
    assert "step 4/4, policy: reward 4.000, pass@1 0.250 (0.50 s a step)" in log
    every = shown(Console(file=io.StringIO(), width=200), seconds=0.0)
    assert len(every.splitlines()) == 4
    bar = shown(Console(file=io.StringIO(), width=200, force_terminal=True))
    assert "4/4" in bar
    assert "pass@1 0.250" in bar


def test_summary_has_a_row_for_every_phase():
    history = [
        {"phase": "sft", "step": 1, "seconds": 1.0, "valid/pass@1": 0.5},
        {"phase": "policy", "step": 2, "seconds": 2.0, "reward/mean": -0.25},
        {"phase": "policy", "step": 3, "seconds": 2.0, "reward/mean": 0.75},
    ]
    console = Console(file=io.StringIO(), width=80)
    console.print(summary(history))
    rows = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["warm", "start", "1", "1.0", "0.500"] in rows
    assert ["policy", "2", "4.0", "0.750"] in rows
