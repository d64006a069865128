import json
import random

import pytest

from airl_fast.config import TaskConfig
from airl_fast.tasks import load_task
from airl_fast.tasks.base import Example, Message
from airl_fast.tasks.jsonl import JSONLines


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    return str(path)


def plain(i, **changes):
    return {"prompt": f"p{i}", "completion": f"step {i}\n#### {i}", "answer": i} | changes


def test_plain_rows(tmp_path):
    path = write(tmp_path / "d.jsonl", [plain(i) for i in range(10)])
    task = load_task(TaskConfig(name="jsonl", path=path, validation=2, test=3))
    assert (len(task.train), len(task.validation), len(task.test)) == (5, 2, 3)
    assert all(task.is_correct(e.completion, e) for e in task.train)
    changed, step = task.corrupt("a 3\nb", random.Random(0))
    assert step == 0
    assert changed != "a 3\nb"


def test_messages(tmp_path):
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"q{i}"},
                {"role": "assistant", "content": "The answer is (B)."},
            ],
            "answer": "B",
        }
        for i in range(3)
    ]
    rows.append({"messages": [{"role": "user", "content": "alone"}], "answer": "C"})
    task = JSONLines(write(tmp_path / "d.jsonl", rows), unlabelled=1, validation=0, test=0)
    assert len(task.train) == 3
    example = task.train[0]
    assert example.prompt[0] == Message(role="system", content="Be brief.")
    assert len(example.prompt) == 2
    assert task.is_correct(example.completion, example)
    assert task.unlabelled == [
        Example(prompt=(Message(role="user", content="alone"),), answer="C", id="jsonl-train-3")
    ]


def test_prompt_may_be_messages(tmp_path):
    rows = [plain(0, prompt=[{"role": "user", "content": "hi"}])]
    task = JSONLines(write(tmp_path / "d.jsonl", rows), validation=0, test=0)
    assert task.train[0].prompt == (Message(role="user", content="hi"),)


def test_several_traces_of_a_prompt_stay_in_one_set(tmp_path):
    rows = [plain(i % 5, completion=f"way {i}\n#### {i % 5}") for i in range(20)]
    task = JSONLines(write(tmp_path / "d.jsonl", rows), validation=1, test=2, unlabelled=1)
    sets = [
        {e.prompt for e in s} for s in (task.train, task.unlabelled, task.validation, task.test)
    ]
    assert [len(s) for s in sets] == [1, 1, 1, 2]
    assert len(set.union(*sets)) == 5
    assert len(task.train) == 4


def test_own_splits_are_used_and_their_prompts_not_trained_on(tmp_path):
    write(tmp_path / "train.jsonl", [plain(i) for i in range(5)])
    write(tmp_path / "validation.jsonl", [plain(7)])
    write(tmp_path / "test.jsonl", [plain(0), plain(8)])
    task = JSONLines(str(tmp_path), validation=1, test=2)
    assert {e.prompt for e in task.train} == {"p1", "p2", "p3", "p4"}
    assert {e.prompt for e in task.test} == {"p0", "p8"}


def test_prompts_without_completion(tmp_path):
    rows = [plain(0), plain(1), plain(2, completion=None), plain(0, completion=None)]
    path = write(tmp_path / "d.jsonl", rows)
    task = JSONLines(path, unlabelled=1, validation=0, test=0)
    assert [e.prompt for e in task.unlabelled] == ["p2"]  # p0 has a demonstration elsewhere
    with pytest.raises(ValueError, match=r"1 training prompts have no completion.*unlabelled=1"):
        JSONLines(path, validation=0, test=0)


def test_answers_are_needed_where_they_are_used(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": "x"} for i in range(3)]
    path = write(tmp_path / "d.jsonl", rows)
    task = JSONLines(path, validation=0, test=0)
    with pytest.raises(ValueError, match="no answer to compare with"):
        task.is_correct("#### 3", task.train[0])
    with pytest.raises(ValueError, match=r"d\.jsonl, line \d: no column 'answer'.*task\.test=0"):
        JSONLines(path, validation=0, test=1)


def test_words_and_units_compare(tmp_path):
    task = JSONLines(write(tmp_path / "d.jsonl", [plain(0)]), validation=0, test=0)
    assert task.is_correct("#### 72 apples", Example(prompt="p", answer="72"))
    assert task.is_correct("<answer>Paris.</answer>", Example(prompt="p", answer="paris"))
    assert not task.is_correct("Paris", Example(prompt="p", answer="paris"))
    assert task.extract_answer(r"\boxed{1,000}") == "1000"


USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completion": "x"}, "line 2: no column 'prompt' among 'completion'; a row is"),
        ({"prompt": "x"}, "line 2: no column 'completion'.*write null for a prompt"),
        (plain(1, prompt=""), "line 2: 'prompt' is empty"),
        (plain(1, completion=5), "line 2: 'completion' is 5"),
        (plain(1, answer=["a"]), r"line 2: 'answer' is \['a'\]"),
        (plain(1, answer=True), "line 2: 'answer' is True"),
        ({"messages": []}, "line 2: 'messages' is .*expected a list"),
        ({"messages": "hi"}, "line 2: 'messages' is 'hi', expected a list"),
        ({"messages": ["hi"]}, r"line 2, messages\[0\]: 'hi', expected an object"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "role 'bot', expected one of system"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: no column 'content'"),
        ({"messages": [USER], "prompt": "x"}, "line 2: both 'messages' and 'prompt'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no turn before the completion"),
    ],
)
def test_wrong_row_is_named(tmp_path, row, message):
    path = write(tmp_path / "d.jsonl", [plain(0), row])
    with pytest.raises(ValueError, match=message):
        JSONLines(path, validation=0, test=0)
