import gzip
import json
import random
import sys
import types
from pathlib import Path

import pytest

from airl_fast.config import TaskConfig, load_config
from airl_fast.tasks import load_task
from airl_fast.tasks.mmlu_pro import MMLUPro

SHARED = Path(__file__).parents[3] / "shared" / "data" / "mmlu_pro"


def question(i, **changes):
    row = {
        "question_id": i,
        "category": "maths",
        "question": f"What is {i} + 1?",
        "options": [str(i), str(i + 1), str(i + 2)],
        "answer": "B",
    }
    return row | changes


def response(i, letter="B"):
    return {"question_id": i, "response": f"We have {i} + 1 = {i + 1}. The answer is ({letter})."}


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, "utf-8")


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "questions.jsonl.gz", [question(i) for i in range(20)])
    told = [response(i, "A" if i < 4 else "B") for i in range(18)]
    told.append({"question_id": 18, "response": "I cannot tell."})
    write(tmp_path / "big.jsonl.gz", told)
    return tmp_path


def test_demonstrations_are_the_named_models(folder, caplog):
    task = MMLUPro(str(folder), traces="big", validation=2, test=3)
    sets = (task.train, task.unlabelled, task.validation, task.test)
    prompts = [example.prompt for one in sets for example in one]
    assert len(prompts) == len(set(prompts))
    assert all(e.completion.startswith("We have") for e in task.train)
    assert task.dropped == {"without a readable answer": 1}
    assert "1 without a readable answer" in caplog.text
    assert len(task.train) <= 18
    assert "A. " in task.train[0].prompt[0].content
    right = next(e for e in task.train if e.id == "mmlu_pro-10" or "(B)" in e.completion)
    assert task.is_correct(right.completion, right)
    wrong, step = task.corrupt(right.completion, random.Random(0))
    assert wrong != right.completion
    assert step in (0, 1)


def test_correct_only_and_a_question_without_demonstration_as_prompt(folder):
    task = MMLUPro(
        str(folder), traces="big", validation=0, test=0, unlabelled=2, correct_only=True, chat=False
    )
    assert len(task.train) == 14
    assert {e.id for e in task.unlabelled} <= {f"mmlu_pro-{i}" for i in (0, 1, 2, 3, 18, 19)}
    assert task.train[0].prompt.startswith("Question: What is")
    assert all(task.is_correct(e.completion, e) for e in task.train)
    assert task.dropped == {"without a readable answer": 1, "with a wrong answer": 4}


def test_the_seed_decides(folder):
    draw = [MMLUPro(str(folder), traces="big", seed=s, validation=2, test=5) for s in (0, 0, 1)]
    assert draw[0].test == draw[1].test != draw[2].test


def test_configuration_builds_it(folder):
    config = TaskConfig(
        name="mmlu_pro", path=str(folder), traces="big", validation=1, test=1, chat=False
    )
    assert load_task(config).name == "mmlu_pro"
    recipe = load_config("mmlu-pro-smollm2", [f"task.path={folder}", "task.traces=big"])
    assert recipe.task.traces == "big"
    with pytest.raises(ValueError, match="are for mmlu_pro"):
        TaskConfig(name="gsm8k", traces="big")


def test_hub(monkeypatch, tmp_path):
    asked = []

    def load_dataset(name):
        asked.append(name)
        cot = "A: Let's think step by step. It is 2. The answer is (B)."
        return {
            "test": [question(i, cot_content="") for i in range(4)],
            "validation": [question(i, cot_content=cot) for i in range(4, 7)],
        }

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    task = MMLUPro(validation=0, test=0)
    assert asked == ["TIGER-Lab/MMLU-Pro"]
    assert sorted(e.id for e in task.train) == [f"mmlu_pro-{i}" for i in (4, 5, 6)]
    assert task.train[0].completion == "It is 2. The answer is (B)."
    write(tmp_path / "big.jsonl", [response(i) for i in range(4)])
    assert len(MMLUPro(traces=str(tmp_path / "big.jsonl"), validation=1, test=0).train) >= 3


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (question(1, question_id="x"), "question_id"),
        (question(1, options="A"), "options"),
        (question(1, options=["a", ""]), "options"),
        (question(1, answer="D"), "a letter from A to C"),
        ({"question_id": 1, "options": ["a", "b"], "answer": "A"}, "no column 'question'"),
    ],
)
def test_a_malformed_question_is_named(tmp_path, row, said):
    write(tmp_path / "questions.jsonl", [question(0), row])
    with pytest.raises(ValueError, match=f"line 2.*{said}"):
        MMLUPro(str(tmp_path), traces="big")


def test_missing_files_and_repeated_answers(folder):
    with pytest.raises(ValueError, match=r"no small\.jsonl"):
        MMLUPro(str(folder), traces="small")
    with pytest.raises(ValueError, match=r"set task\.traces"):
        MMLUPro(str(folder))
    with pytest.raises(ValueError, match=r"expected questions\.jsonl"):
        MMLUPro(str(folder / "nothing.jsonl"))
    write(folder / "twice.jsonl", [response(1), response(1)])
    with pytest.raises(ValueError, match="line 2: question 1 a second time"):
        MMLUPro(str(folder), traces="twice")
    (folder / "cut.jsonl.gz").write_bytes((folder / "big.jsonl.gz").read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a whole gzip file"):
        MMLUPro(str(folder), traces="cut")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
def test_our_reading_of_real_answers_agrees_with_the_recorded_one():
    with gzip.open(SHARED / "mistral-7b-instruct-v0.2.jsonl.gz", "rt") as file:
        rows = [json.loads(next(file)) for _ in range(1500)]
    read = [MMLUPro.extract_answer(row["response"]) for row in rows]
    pairs = zip(read, (row["prediction"] for row in rows), strict=True)
    same = [a == b for a, b in pairs if a is not None]
    assert len(same) > 0.7 * len(rows)
    assert sum(same) > 0.98 * len(same)  # the recording reads the first answer, we the last
