import gzip
import json

import pytest

from airl_fast.readers import Candidates, Reading, Steps


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def bench(i=0, **changes):
    row = {
        "id": f"gsm8k-{i}",
        "generator": "someone",
        "problem": "2+3+4?",
        "steps": ["2+3=5", "5+4=10", "So 10."],
        "final_answer_correct": False,
        "label": 1,
    }
    return row | changes


def rated(*ratings, chosen=0, human=None):
    """A step of PRM800K with these ratings."""
    completions = [
        {"text": f"says {i}", "rating": r, "flagged": None} for i, r in enumerate(ratings)
    ]
    return {"completions": completions, "human_completion": human, "chosen_completion": chosen}


def prm(*steps, reason="solution"):
    return {
        "question": {"problem": "2+3?", "ground_truth_answer": "5"},
        "label": {"steps": list(steps), "total_time": 1, "finish_reason": reason},
    }


def test_processbench_lines_arrays_and_compressed(tmp_path):
    rows = [bench(0), bench(1, label=-1, final_answer_correct=True)]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    for path in (
        write(tmp_path / "x.jsonl", rows),
        write(tmp_path / "x.jsonl.gz", rows),
        tmp_path / "x.json",
    ):
        reading = Reading(path, "processbench")
        items = list(reading)
        assert [item.label for item in items] == [1, -1]
        assert items[0].prompt == "2+3+4?"
        assert items[0].steps == ("2+3=5", "5+4=10", "So 10.")
        assert (reading.rows, reading.dropped, items[1].id) == (2, {}, "gsm8k-1")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"label": 3}, "'label' is 3"),
        ({"label": True}, "'label' is True"),
        ({"steps": []}, "'steps'"),
        ({"steps": ["a", 3]}, "'steps'"),
        ({"problem": ""}, "'problem' is empty"),
        ({"final_answer_correct": "yes"}, "final_answer_correct"),
    ],
)
def test_a_malformed_row_of_processbench_is_named(tmp_path, changes, said):
    path = write(tmp_path / "x.jsonl", [bench(), bench(**changes)])
    with pytest.raises(ValueError, match=f"line 2.*{said}"):
        list(Reading(path, "processbench"))


def test_rows_are_read_as_a_stream(tmp_path):
    path = write(tmp_path / "x.jsonl", [bench(), bench(label=9)])
    items = iter(Reading(path, "processbench"))
    assert next(items).label == 1  # before the bad row is met
    with pytest.raises(ValueError, match="line 2"):
        next(items)


def test_prm800k_first_error_follows_the_chosen_completions(tmp_path):
    own = {"text": "the human's", "rating": None}
    rows = [
        prm(rated(1), rated(0), rated(1)),  # 0 is no error
        prm(rated(1), rated(-1, 1, chosen=1), rated(-1)),  # gone on from the second completion
        prm(rated(1), rated(-1, -1, chosen=None), reason="found_error"),  # all were wrong
        prm(rated(1), rated(-1, chosen=None, human=own), rated(1)),
        prm(rated(1), reason="give_up"),
        prm(rated(1), reason="bad_problem"),
        prm(rated(1), rated(None)),
        prm(rated(1), rated(1, chosen=None)),
        prm(reason="solution"),
        prm(rated(1), reason="found_error"),
    ]
    reading = Reading(write(tmp_path / "x.jsonl", rows), "prm800k")
    items = list(reading)
    assert [item.label for item in items] == [-1, 2, 1, -1]
    assert items[1].steps == ("says 0", "says 1", "says 0")
    assert items[2].steps == ("says 0", "says 0")
    assert items[3].steps[1] == "the human's"
    assert reading.dropped == {
        "that ended in give_up": 1,
        "that ended in bad_problem": 1,
        "with a step that nobody rated": 1,
        "without a labelled step": 2,
        "that ended in found_error without a step rated -1": 1,
    }
    assert reading.rows == len(items) + sum(reading.dropped.values())


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": {}, "label": {}}, "no column 'problem'"),
        ({"question": "q", "label": {}}, "expected objects"),
        (prm(rated(1), reason="bored"), "finish_reason"),
        (prm("step"), "expected an object"),
        (prm(rated(1, chosen=4)), "among 1 completions"),
        (prm(rated(2)), "'rating' is 2"),
    ],
)
def test_a_malformed_row_of_prm800k_is_named(tmp_path, row, said):
    path = write(tmp_path / "x.jsonl", [prm(rated(1)), row])
    with pytest.raises(ValueError, match=f"line 2.*{said}"):
        list(Reading(path, "prm800k"))


def test_plain_lines(tmp_path):
    rows = [
        {"prompt": "p", "completions": ["a", "b"], "correct": [True, False], "id": 7},
        {"prompt": "p", "completions": ["a"], "correct": [True], "answers": [None]},
        {"prompt": [1, 2], "steps": ["a", "b"], "label": 0},
    ]
    first, second, third = Reading(write(tmp_path / "x.jsonl", rows))
    assert isinstance(first, Candidates)
    assert (first.correct, first.answers, first.id) == ((True, False), None, "7")
    assert second.answers == (None,)
    assert isinstance(third, Steps)
    assert (third.prompt, third.label) == ([1, 2], 0)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"completions": ["a"], "correct": [True]}, "no column 'prompt'"),
        ({"prompt": "p"}, "'completions' is None"),
        ({"prompt": "p", "completions": ["a"]}, "'correct' is None"),
        ({"prompt": "p", "completions": ["a"], "correct": [1]}, "true and false"),
        ({"prompt": "p", "completions": ["a"], "correct": [True, True]}, "a list of 1"),
        ({"prompt": "p", "completions": ["a"], "correct": [True], "answers": [3]}, "texts or null"),
        ({"prompt": "p", "completions": ["a"], "steps": ["a"]}, "keep one"),
        ({"prompt": "p", "steps": ["a"], "label": 1}, "'label' is 1"),
    ],
)
def test_a_malformed_plain_row_is_named(tmp_path, row, said):
    path = write(tmp_path / "x.jsonl", [{"prompt": "p", "steps": ["a"], "label": -1}, row])
    with pytest.raises(ValueError, match=f"line 2.*{said}"):
        list(Reading(path))


def test_files_and_formats_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        Reading(tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match="expected a format"):
        Reading(write(tmp_path / "x.jsonl", [bench()]), "csv")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a JSON array"):
        list(Reading(tmp_path / "x.json", "processbench"))
