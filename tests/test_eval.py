"""What ``airl-fast eval`` measures, against brute force, and the command itself."""

import builtins
import itertools
import json
import weakref

import numpy as np
import pytest

from airl_fast import RewardScorer, cli, readers
from airl_fast.evaluation import files
from airl_fast.evaluation.measure import JudgedTrace, measure
from tests.tiny_run import tiny_run  # noqa: F401

PROMPT = "68+4+2+9-6="
RIGHT = "68+4=72;72+2=74;74+9=83;83-6=77;#77."
WRONG = "68+4=72;72+2=75;75+9=84;84-6=78;#78."


def traces(prompts=12, n=4, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for p in range(prompts):
        for _ in range(n):
            correct = bool(rng.random() < 0.5)
            score = float(rng.normal() + correct)
            answer = "1" if correct else str(rng.integers(2, 4))
            made.append(
                JudgedTrace(
                    prompt=p,
                    correct=correct,
                    answer=answer if rng.random() < 0.9 else None,
                    length=int(rng.integers(5, 20)),
                    scores={"f": score, "log pi (sum)": float(rng.normal())},
                )
            )
    return made


def test_best_of_n_beside_its_baselines():
    made = traces()
    got = measure(made)["best_of_n"]
    assert (got["prompts"], got["k"]) == (12, [1, 2, 4])
    rows = [made[i : i + 4] for i in range(0, 48, 4)]

    def over_subsets(k, pick):
        return np.mean([np.mean([pick(s) for s in itertools.combinations(row, k)]) for row in rows])

    def vote(subset):
        count = {}
        for one in subset:
            if one.answer is not None:
                count.setdefault(one.answer, []).append(one.correct)
        return np.mean(max(count.values(), key=len)) if count else 0.0

    picks = {
        "random": lambda s: np.mean([one.correct for one in s]),
        "majority": vote,
        "f": lambda s: max(s, key=lambda one: one.scores["f"]).correct,
        "oracle": lambda s: any(one.correct for one in s),
    }
    for i, k in enumerate(got["k"]):
        for name, pick in picks.items():
            assert got["curves"][name]["value"][i] == pytest.approx(over_subsets(k, pick))
    first, last = got["curves"]["f"]["value"][-1], got["curves"]["random"]["value"][-1]
    assert got["f_less"]["random"]["difference"] == pytest.approx(first - last)
    assert "vote weighted by f" in got["curves"]
    assert got["curves"]["f"]["low"][2] <= first <= got["curves"]["f"]["high"][2]


def test_a_large_group_is_voted_on_over_drawn_subsets_reproducibly():
    made = traces(prompts=4, n=12)
    one, again = (measure(made, seed=3)["best_of_n"]["curves"] for _ in range(2))
    assert one == again
    assert one["majority"]["value"][0] == pytest.approx(
        np.mean([t.correct and t.answer is not None for t in made]), abs=0.06
    )


def test_sections_that_the_data_cannot_give_say_why():
    single = [one for i, one in enumerate(traces()) if i % 4 == 0]
    got = measure(single)
    assert "no prompt has two" in got["best_of_n"]["skipped"]
    assert "no prompt has both" in got["auc"]["by_score"]["f"]["within_prompt"]["skipped"]
    assert "no trace has a step" in got["localisation"]["skipped"]
    right = [one for one in traces() if one.correct]
    assert "every trace is right" in measure(right)["auc"]["skipped"]
    assert "every trace is right" in measure(right)["calibration"]["skipped"]
    with pytest.raises(ValueError, match="got none"):
        measure([])


def test_localisation_beside_chance():
    rng = np.random.default_rng(1)
    made = []
    for p in range(40):
        row = rng.normal(size=4)
        label = int(rng.integers(-1, 4))
        if label >= 0:
            row[label] -= 6
        made.append(
            JudgedTrace(
                prompt=p,
                correct=label < 0,
                answer=None,
                length=9,
                scores={"f": row.sum()},
                candidate=False,
                steps={"f": row.tolist()},
                label=label,
            )
        )
    got = measure(made)["localisation"]
    assert got["by_score"]["f"]["lowest_step"]["value"] > 0.95
    assert got["by_score"]["f"]["processbench"]["f1"]["value"] > 0.8
    assert got["by_score"]["f"]["mean_rank"]["value"] < 1.2
    chance = {
        "lowest_step": 1 / 4,
        "mean_rank": 2.5,
        "accuracy_error": 0.2,
        "accuracy_correct": 0.2,
    }
    assert got["random"] == pytest.approx(chance)
    assert got["with_wrong_step"] == sum(one.label >= 0 for one in made)


def rows(count=8):
    made = []
    for i in range(count):
        prompt, digit = f"{i + 11}+4+2+9-6=", str(i)
        made.append(
            {
                "prompt": prompt,
                "completions": [RIGHT, WRONG, f"{digit}+1=5;#5.", "68+4=7"],
                "correct": [True, False, False, i % 2 == 0],
                "answers": ["77", "78", "5", None],
            }
        )
    return made


def written(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def test_command_writes_numbers_a_table_and_plots(tiny_run, tmp_path, capsys):  # noqa: F811
    source = written(tmp_path / "judged.jsonl", rows())
    assert run("eval", tiny_run, source, "--output", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "judged.jsonl: 8 rows" in out
    assert "32 of 32 traces scored" in out
    assert "## Best of n" in out
    assert "| log pi (mean) |" in out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["data"]["traces"] == 32
    assert metrics["data"]["without_answer"] == 8
    curves = metrics["best_of_n"]["curves"]
    expected = {"random", "majority", "vote weighted by f", "f", "f - log pi", "oracle"}
    assert expected | {"log pi (sum)", "log pi (mean)"} == set(curves)
    scorer = RewardScorer.from_pretrained(tiny_run)
    first = [scorer.rerank(row["prompt"], row["completions"])[0].index for row in rows()]
    right = np.mean([row["correct"][i] for row, i in zip(rows(), first, strict=True)])
    assert curves["f"]["value"][-1] == pytest.approx(right)
    names = {"metrics.json", "metrics.md", "best_of_n.png", "calibration.png", "histogram.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    png = (tmp_path / "out" / "best_of_n.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    page = tmp_path / "report.html"
    assert run("report", "--eval", tmp_path / "out" / "metrics.json", "--output", page) == 0
    html = page.read_text("utf-8")
    auc = metrics["auc"]["by_score"]["f"]["pooled"]["value"]
    assert "AUC of f within a prompt" in html
    assert f"{auc:.3f}" in html
    assert "vote weighted by f" in html


def test_answers_that_are_not_given_are_read_as_the_rewards_task_does(tiny_run, tmp_path):  # noqa: F811
    found = []
    for name, keys in (("given", ()), ("read", ("answers",))):
        lines = [{k: v for k, v in row.items() if k not in keys} for row in rows()]
        source = written(tmp_path / f"{name}.jsonl", lines)
        assert run("eval", tiny_run, source, "--no-plots", "--output", tmp_path / name) == 0
        found.append(json.loads((tmp_path / name / "metrics.json").read_text()))
    assert found[0]["data"] == found[1]["data"]
    assert found[0]["best_of_n"]["curves"] == found[1]["best_of_n"]["curves"]


def test_command_on_processbench(tiny_run, tmp_path, capsys):  # noqa: F811
    steps = [part + ";" for part in WRONG.split(";")[:-1]] + ["#78."]
    lines = [
        {
            "id": f"x-{i}",
            "generator": "g",
            "problem": PROMPT,
            "steps": steps if i % 3 else [steps[0], *steps[1:3]],
            "final_answer_correct": False,
            "label": 1 if i % 3 else -1,
        }
        for i in range(20)
    ]
    for i, line in enumerate(lines):
        line["problem"] = f"{i + 10}{PROMPT[2:]}"
    source = written(tmp_path / "bench.jsonl", lines)
    arguments = ("eval", tiny_run, source, "--format", "processbench", "--output", tmp_path / "o")
    assert run(*arguments, "--max-tokens", 40) == 0
    out = capsys.readouterr().out
    assert "## First wrong step" in out
    metrics = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert metrics["dropped"] == {"traces of more than 40 tokens": 13}
    assert (metrics["data"]["traces"], metrics["localisation"].keys()) == (7, {"skipped"})
    assert run(*arguments) == 0
    metrics = json.loads((tmp_path / "o" / "metrics.json").read_text())
    found = metrics["localisation"]["by_score"]
    assert set(found) == {"f", "f - log pi", "log pi (sum)", "log pi (mean)"}
    scorer = RewardScorer.from_pretrained(tiny_run)
    located = [
        scorer.locate(line["problem"], line["steps"]).step for line in lines if line["label"] > 0
    ]
    expected = np.mean([step == 1 for step in located])
    assert found["f"]["lowest_step"]["value"] == pytest.approx(expected)
    assert (tmp_path / "o" / "localisation.png").is_file()


def test_a_reward_without_policy_has_no_log_pi(tiny_run, tmp_path, capsys):  # noqa: F811
    source = written(tmp_path / "judged.jsonl", rows(4))
    arguments = ("eval", tiny_run / "reward", source, "--output", tmp_path / "o", "--no-plots")
    assert run(*arguments) == 0
    assert "| f |" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert set(metrics["auc"]["by_score"]) == {"f"}
    assert not list((tmp_path / "o").glob("*.png"))


def test_no_more_rows_are_held_than_are_scored_at_once(tiny_run, tmp_path, monkeypatch):  # noqa: F811
    source, made, held = written(tmp_path / "judged.jsonl", rows(8)), [], []
    plain, score = readers._plain, RewardScorer.score_encoded

    def parsed(row):
        item = plain(row)
        made.append(weakref.ref(item))
        return item

    def scored(scorer, pairs):
        held.append((len(pairs), sum(one() is not None for one in made)))
        return score(scorer, pairs)

    monkeypatch.setattr(readers, "_plain", parsed)
    monkeypatch.setattr(files, "_CHUNK", 2)
    monkeypatch.setattr(RewardScorer, "score_encoded", scored)
    assert run("eval", tiny_run, source, "--no-plots", "--output", tmp_path / "o") == 0
    assert len(made) == 3 * 8  # checked, encoded, scored
    assert len(held) > 8
    assert all(pairs <= 2 and alive <= 3 for pairs, alive in held)


def test_a_file_that_changes_under_the_command_is_named(tiny_run, tmp_path, capsys, monkeypatch):  # noqa: F811
    source = written(tmp_path / "judged.jsonl", rows(4))
    load = RewardScorer.from_pretrained

    def changed(*arguments, **options):
        written(source, rows(5))
        return load(*arguments, **options)

    monkeypatch.setattr(RewardScorer, "from_pretrained", changed)
    assert run("eval", tiny_run, source, "--no-plots") == 2
    assert "it changed while it was read" in capsys.readouterr().err


def test_what_a_user_can_put_right_is_one_line(tiny_run, tmp_path, capsys, monkeypatch):  # noqa: F811
    source = written(tmp_path / "bad.jsonl", [*rows(1), {"prompt": "p", "completions": []}])
    assert run("eval", tiny_run, source, "--no-plots") == 2
    assert "line 2" in capsys.readouterr().err
    source = written(tmp_path / "odd.jsonl", [{**rows(1)[0], "prompt": "what?"}])
    assert run("eval", tiny_run, source, "--no-plots") == 2
    assert "line 1" in capsys.readouterr().err
    real = builtins.__import__

    def without(name, *given, **more):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *given, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert run("eval", tiny_run, source) == 2
    assert "airl-fast[report]" in capsys.readouterr().err
