import json
import random
import sys
import types

import pytest

from airl_fast.config import TaskConfig
from airl_fast.tasks import load_task
from airl_fast.tasks.base import Example, Message
from airl_fast.tasks.gsm8k import GSM8K


def row(i):
    return {
        "question": f"Ann has {i} apples and buys 2. How many?",
        "answer": f"She has {i}+2 = <<{i}+2={i + 2}>>{i + 2} apples.\n#### {i + 2}",
    }


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "train.jsonl", [row(i) for i in range(20)])
    write(tmp_path / "test.jsonl", [row(i) for i in range(100, 110)])
    return tmp_path


def prompts(examples):
    return [example.prompt for example in examples]


def test_folder_gives_four_disjoint_sets(folder):
    task = GSM8K(str(folder), demonstrations=8, unlabelled=5, validation=4, test=10)
    sizes = [len(s) for s in (task.train, task.unlabelled, task.validation, task.test)]
    assert sizes == [8, 5, 4, 10]
    everything = prompts(task.train + task.unlabelled + task.validation + task.test)
    assert len(set(everything)) == 27
    assert all(e.completion is None and e.answer for e in task.unlabelled)
    assert all(e.id.startswith("gsm8k-test") for e in task.test)
    assert all(task.is_correct(e.completion, e) for e in task.train + task.test)


def test_none_takes_all_that_remain_and_the_seed_decides(folder):
    task = GSM8K(str(folder), unlabelled=3, validation=4, test=1)
    assert len(task.train) == 13
    again = GSM8K(str(folder), unlabelled=3, validation=4, test=1)
    assert again.train == task.train
    assert GSM8K(str(folder), seed=1, unlabelled=3, validation=4, test=1).train != task.train


def test_single_file_gives_all_sets(folder):
    task = GSM8K(str(folder / "train.jsonl"), validation=4, test=6)
    assert (len(task.train), len(task.validation), len(task.test)) == (10, 4, 6)


def test_prompts_and_marks(folder):
    options = {"validation": 1, "test": 1}
    chat = GSM8K(str(folder), **options).train[0]
    assert isinstance(chat.prompt[0], Message)
    assert "<<" not in chat.completion
    plain = GSM8K(str(folder), **options, chat=False, calculator_marks=True).train[0]
    assert plain.prompt.startswith("Question: Ann")
    assert plain.prompt.endswith("\nAnswer:\n")
    assert "<<" in plain.completion


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("48/2 = 24\n#### 1,072", True),
        ("#### $1072.00", True),
        ("#### 1072.", True),
        (r"\boxed{1072}", True),
        ("So the answer is 1,072 apples.", True),
        ("#### 1072.5", False),
        ("#### -1072", False),
        ("#### 72", False),
        ("1072", False),
        ("", False),
    ],
)
def test_numeric_check(folder, completion, right):
    task = GSM8K(str(folder), validation=0, test=0)
    assert task.is_correct(completion, Example(prompt="q", answer="1072")) is right


def test_corrupt_names_the_line(folder):
    task = GSM8K(str(folder), validation=0, test=0)
    example = task.train[0]
    changed, line = task.corrupt(example.completion, random.Random(0))
    assert line == 0
    assert changed.split("\n")[1] == example.completion.split("\n")[1]
    assert changed != example.completion


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"train\.jsonl, line 3: not JSON"),
        ("[1, 2]", r"line 3: list, expected an object"),
        ('{"question": "q"}', r"line 3: no column 'answer' among 'question'; a GSM8K row is"),
        ('{"question": "q", "answer": 3}', r"line 3: 'answer' is 3 \(int\), expected a text"),
        ('{"question": " ", "answer": "#### 3"}', r"line 3: 'question' is empty"),
        ('{"question": "q", "answer": "three"}', r"line 3: 'answer' has no line '#### NUMBER'"),
    ],
)
def test_wrong_row_is_named(tmp_path, line, message):
    good = json.dumps(row(1))
    (tmp_path / "train.jsonl").write_text(f"{good}\n\n{line}\n")
    with pytest.raises(ValueError, match=message):
        GSM8K(str(tmp_path), validation=0, test=0)


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        GSM8K(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match=r"expected train\.jsonl .* found nothing"):
        GSM8K(str(tmp_path))
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(ValueError, match="no rows"):
        GSM8K(str(tmp_path))
    (tmp_path / "train.jsonl").write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(ValueError, match="line 1: not UTF-8"):
        GSM8K(str(tmp_path))


@pytest.mark.parametrize(
    "sizes",
    [
        {"test": 11},
        {"test": 0, "validation": 21},
        {"test": 0, "validation": 0, "demonstrations": 21},
        {"test": 0, "validation": 0, "demonstrations": 15, "unlabelled": 6},
        {"test": 0, "validation": 0, "unlabelled": 21},
    ],
)
def test_too_large_subset_is_refused_with_what_there_is(folder, sizes):
    with pytest.raises(ValueError, match=r"task\.\w+=\d+, and the data has \d+ .*or less"):
        GSM8K(str(folder), **sizes)


def test_no_demonstrations_left(folder):
    with pytest.raises(ValueError, match="no demonstrations are left"):
        GSM8K(str(folder), test=0, validation=20)


def test_hub_name(monkeypatch):
    asked = []

    def load_dataset(name, configuration):
        asked.append((name, configuration))
        return {"train": [row(i) for i in range(6)], "test": [row(9)]}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    task = load_task(TaskConfig(name="gsm8k", validation=1, test=1))
    assert asked == [("openai/gsm8k", "main")]
    assert len(task.train) == 5


def test_hub_that_cannot_be_reached_says_what_to_do(monkeypatch):
    def load_dataset(name, configuration):
        raise ConnectionError("offline")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match=r"ConnectionError: offline.*give a folder"):
        GSM8K()
