import json
import random
import sys
import types
from pathlib import Path

import pytest

from airl_fast.config import TaskConfig, load_config
from airl_fast.tasks import load_task
from airl_fast.tasks.medreason import MedReason

SHARED = Path(__file__).parents[3] / "shared" / "data" / "medqa" / "test.jsonl"


def trace(i, **changes):
    row = {
        "dataset_name": ("medqa", "medmcqa")[i % 2],
        "question": f"Patient {i} has a fever. What helps?",
        "options": "Answer Choices:\nA. Rest\nB. Drug X.\nC. Surgery",
        "reasoning": "Fever is common.\nDrug X lowers it.",
        "answer": "Drug X. Explanation: it lowers fever.",
    }
    return row | changes


def asked(i, **changes):
    row = {"question": f"Case {i}?", "options": {"A": "yes", "B": "no"}, "answer_idx": "A"}
    return row | changes


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def test_traces_of_medqa_and_medmcqa_close_with_a_letter(tmp_path, caplog):
    rows = [trace(i) for i in range(6)]
    rows += [trace(6, dataset_name="pubmedqa"), trace(7, answer="Prayer. Explanation: none")]
    task = MedReason(write(tmp_path / "all.jsonl", rows), validation=1, test=1)
    assert len(task.train) == 4
    example = task.train[0]
    assert example.answer == "B"
    assert example.completion.endswith("Drug X lowers it.\nThe answer is (B).")
    assert "Explanation" not in example.completion
    assert task.is_correct(example.completion, example)
    assert not task.is_correct("The answer is (A).", example)
    assert task.extract_answer("It may be A.") is None
    assert task.dropped == {"of 'pubmedqa'": 1, "whose answer is not one of the options": 1}
    assert "1 of 'pubmedqa'" in caplog.text
    wrong, step = task.corrupt(example.completion, random.Random(0))
    assert (task.is_correct(wrong, example), step) == (False, 2)


def test_an_evaluation_set_is_the_test_set(tmp_path):
    train = write(tmp_path / "t.jsonl", [trace(i) for i in range(4)])
    evaluation = write(tmp_path / "e.jsonl", [asked(i) for i in range(3)])
    config = TaskConfig(
        name="medreason", path=train, evaluation=evaluation, validation=1, test=3, chat=False
    )
    task = load_task(config)
    assert sorted(e.prompt for e in task.test)[0] == "Question: Case 0?\nA. yes\nB. no\nAnswer:\n"
    assert all(e.completion is None and e.answer == "A" for e in task.test)
    write(tmp_path / "train.jsonl", [trace(i) for i in range(4)])
    write(tmp_path / "test.jsonl", [asked(9)])
    assert "Case 9?" in MedReason(str(tmp_path), validation=0, test=1).test[0].prompt[0].content
    with pytest.raises(ValueError, match="is for medreason"):
        TaskConfig(name="gsm8k", evaluation=evaluation)
    assert load_config("medreason-smollm2").task.name == "medreason"


def test_hub(monkeypatch):
    names = []

    def load_dataset(name):
        names.append(name)
        return {"train": [trace(i) for i in range(3)]}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert len(MedReason(validation=0, test=0).train) == 3
    assert names == ["UCSC-VLAA/MedReason"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (trace(1, options="nothing"), "expected a line each"),
        (trace(1, options="A. x\nC. y"), "expected a line each"),
        (trace(1, reasoning=""), "'reasoning' is empty"),
        (asked(1, options=["yes", "no"]), "texts by letter"),
        (asked(1, options={"B": "no", "A": "yes"}), "texts by letter"),
        (asked(1, answer_idx="C"), "expected one of A, B"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, row, said):
    with pytest.raises(ValueError, match=f"line 2: {said}|line 2.*{said}"):
        MedReason(write(tmp_path / "x.jsonl", [trace(0), row]), validation=0, test=0)


@pytest.mark.skipif(not SHARED.is_file(), reason="the shared data is not here")
def test_the_published_evaluation_set(tmp_path):
    train = write(tmp_path / "t.jsonl", [trace(0)])
    task = MedReason(train, evaluation=str(SHARED), validation=0, test=1273)
    assert {e.answer for e in task.test} <= set("ABCDE")
