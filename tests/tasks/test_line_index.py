"""Large files are read from disk: the sets of loaded files, and errors that say where."""

import gzip
import json
import os
import random
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airl_fast.batches import Shuffled, StreamedProblems, TraceMaker, check_lengths, encode
from airl_fast.spans import span_rule
from airl_fast.tasks import jsonl, line_index
from airl_fast.tasks.drawing import Split, draw_rows, prompt_key, shuffled_order
from airl_fast.tasks.jsonl import JSONLines
from airl_fast.tasks.line_index import Streamed, index_path
from tests.tiny_models import tiny_tokenizer


def row(i, **changes):
    return {"prompt": f"{i % 37}+{i}=", "completion": f"step {i}; #{i}.", "answer": i} | changes


def rows():
    """Repeated prompts, prompts without a completion, conversations."""
    found = [row(i) for i in range(60)]
    found += [row(i, prompt=f"bare {i % 4}", completion=None) for i in range(6)]
    chat = [{"role": "user", "content": "é\ud83d"}, {"role": "assistant", "content": "yes"}]
    return [*found, {"messages": chat, "answer": "a"}, {"messages": chat[:1]}]


def write(path, rows, before=b""):
    """JSON lines with a blank line after every seventh row."""
    lines = [json.dumps(r) + "\n" + "\n" * (i % 7 == 6) for i, r in enumerate(rows)]
    path.write_bytes(before + "".join(lines).encode())
    return path


@pytest.fixture
def streamed(monkeypatch):
    monkeypatch.setattr(jsonl, "STREAMED_BYTES", 1)


def sets(task):
    return [list(x) for x in (task.train, task.unlabelled, task.validation, task.test)]


@pytest.mark.parametrize("demonstrations", [None, 11])
@pytest.mark.parametrize("own_test", [False, True])
def test_the_sets_are_those_of_loaded_files(tmp_path, monkeypatch, own_test, demonstrations):
    write(tmp_path / "train.jsonl", rows(), before=b"\xef\xbb\xbf")
    if own_test:
        write(tmp_path / "test.jsonl", [row(i, prompt=f"own {i}") for i in range(9)])
    make = partial(
        JSONLines, str(tmp_path), seed=3, demonstrations=demonstrations, unlabelled=9, validation=4,
        test=6,
    )  # fmt: skip
    loaded = make()
    assert not isinstance(loaded.train, Streamed)
    monkeypatch.setattr(jsonl, "STREAMED_BYTES", 1)
    for _ in range(2):  # with a new index, and with one that is there
        task = make()
        assert isinstance(task.train, Streamed)
        assert sets(task) == sets(loaded)
        assert task.train[-1] == loaded.train[-1]
        assert task.train[2:5] == loaded.train[2:5]
        assert all(example.completion is None for example in task.unlabelled)


def test_a_large_compressed_file_is_loaded_and_said_to_be(tmp_path, streamed, caplog):
    plain = write(tmp_path / "plain.jsonl", rows())
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    sizes = {"seed": 3, "unlabelled": 9, "validation": 4, "test": 6}
    assert sets(JSONLines(str(packed), **sizes)) == sets(JSONLines(str(plain), **sizes))
    (record,) = caplog.records
    assert f"{packed} is held in memory whole" in record.getMessage()
    assert "gunzip -k" in record.getMessage()


def plainly(splits, *, seed, demonstrations, unlabelled, validation, test):
    """What `draw_rows` does, in loops: rows are (key, shown)."""
    pools = {}
    for name, split in splits.items():
        pools[name] = list(range(len(split)))
        random.Random(f"{name}/{seed}").shuffle(pools[name])
    used = set()

    def take(name, pool, count):
        last = {splits[name][r][0]: r for r in pool if splits[name][r][0] not in used}
        if count > len(last):
            raise ValueError("too few")
        taken = list(last.values())[:count]
        used.update(splits[name][r][0] for r in taken)
        return taken

    home = {name: name if name in splits else "train" for name in ("test", "validation")}
    tests = take(home["test"], pools[home["test"]], test)
    validations = take(home["validation"], pools[home["validation"]], validation)
    train = splits["train"]
    left = [r for r in pools["train"] if train[r][0] not in used]
    labelled = [r for r in left if train[r][1]]
    bare = [
        r for r in left if not train[r][1] and train[r][0] not in {train[k][0] for k in labelled}
    ]
    if bare and not unlabelled:
        raise ValueError("unused prompts")
    if demonstrations is None:
        extra = take("train", [*bare, *reversed(labelled)], unlabelled)
        shown = [r for r in labelled if train[r][0] not in used]
    else:
        if demonstrations > len(labelled):
            raise ValueError("too few")
        shown = labelled[:demonstrations]
        used.update(train[r][0] for r in shown)
        extra = take("train", [*bare, *labelled[demonstrations:]], unlabelled)
    if not shown:
        raise ValueError("none left")
    return shown, extra, validations, tests


SPLIT = st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=25)


@settings(max_examples=150, deadline=None)
@given(
    train=SPLIT,
    test=st.none() | SPLIT,
    counts=st.tuples(*[st.integers(0, 5)] * 3),
    demonstrations=st.none() | st.integers(0, 8),
    seed=st.integers(0, 3),
)
def test_rows_are_drawn_as_loops_draw_them(train, test, counts, demonstrations, seed):
    splits = {"train": train} | ({} if test is None else {"test": test})
    arrays = {
        name: Split(
            keys=np.array([key for key, _ in split], np.uint64),
            shown=np.array([shown for _, shown in split], bool),
        )
        for name, split in splits.items()
    }
    names = ("unlabelled", "validation", "test")
    options = {
        "seed": seed,
        "demonstrations": demonstrations,
        **dict(zip(names, counts, strict=True)),
    }
    try:
        expected = plainly(splits, **options)
    except ValueError:
        with pytest.raises(ValueError, match=r"task\.|no demonstrations are left"):
            draw_rows(arrays, **options)
        return
    drawn = draw_rows(arrays, **options)
    found = drawn.train, drawn.unlabelled, drawn.validation[1], drawn.test[1]
    assert tuple(r.tolist() for r in found) == expected


def test_an_order_is_that_of_a_shuffled_list():
    order = list(range(1000))
    random.Random(7).shuffle(order)
    assert list(shuffled_order(1000, 7)) == order


def test_keys_tell_prompts_apart():
    chat = jsonl.Message(role="user", content="a")
    prompts = ["a", "a ", '[["user", "a"]]', (chat,), (chat, chat), "\ud83d"]
    assert len({prompt_key(prompt) for prompt in prompts}) == len(prompts)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a", "completion"', r"train\.jsonl, line 53: not JSON"),
        (b"\xff", r"line 53: not UTF-8"),
        (b'{"completion": "a"}', "line 53: no column 'prompt'"),
        (b"[]", "line 53: list, expected an object"),
    ],
)
def test_a_malformed_row_is_named_and_no_index_is_left(tmp_path, streamed, line, message):
    path = write(tmp_path / "train.jsonl", [row(i) for i in range(45)])  # 51 lines
    path.write_bytes(path.read_bytes() + b"\n" + line + b"\n" + json.dumps(row(1)).encode())
    with pytest.raises(ValueError, match=message):
        JSONLines(str(path), validation=1, test=1)
    assert [file.name for file in tmp_path.iterdir()] == ["train.jsonl"]


def test_a_row_of_a_set_without_an_answer_is_named(tmp_path, streamed):
    path = write(tmp_path / "d.jsonl", [row(i, answer=None) for i in range(2)])
    with pytest.raises(
        ValueError, match=r"d\.jsonl, line [12]: no column 'answer', which the test"
    ):
        JSONLines(str(path), validation=0, test=1)


def test_a_file_without_rows(tmp_path, streamed):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\n\n")
    with pytest.raises(ValueError, match="no rows"):
        JSONLines(str(path), validation=0, test=0)


def load(path, **options):
    return JSONLines(str(path), validation=0, test=0, **options)


def test_the_index_follows_the_file(tmp_path, streamed):
    path = write(tmp_path / "d.jsonl", [row(i) for i in range(5)])
    assert len(load(path).train) == 5
    made = index_path(path).stat().st_ino
    assert len(load(path).train) == 5
    assert index_path(path).stat().st_ino == made  # not built again
    write(path, [row(i) for i in range(10, 15)])
    assert {e.answer for e in load(path).train} == {str(i) for i in range(10, 15)}
    text = path.read_bytes()
    path.write_bytes(text.replace(b"14", b"41"))  # of the same size
    os.utime(path, ns=(0, 1))
    assert "41" in {e.answer for e in load(path).train}
    index_path(path).write_bytes(index_path(path).read_bytes()[:-1])
    assert len(load(path).train) == 5
    index_path(path).write_bytes(b"not an index")
    assert len(load(path).train) == 5


def test_a_file_that_is_cut_while_in_use(tmp_path, streamed):
    path = write(tmp_path / "d.jsonl", [row(i) for i in range(5)])
    train = load(path).train
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"line \d: the file was cut while in use"):
        train[0]


def test_the_index_may_be_elsewhere(tmp_path, streamed, monkeypatch):
    path = write(tmp_path / "d.jsonl", [row(i) for i in range(5)])
    monkeypatch.setenv(line_index.FOLDER, str(tmp_path / "none"))
    with pytest.raises(ValueError, match="AIRL_FAST_INDEX_DIR to a folder with room"):
        load(path)
    (tmp_path / "some").mkdir()
    monkeypatch.setenv(line_index.FOLDER, str(tmp_path / "some"))
    assert len(load(path).train) == 5
    assert len(list((tmp_path / "some").iterdir())) == 1
    assert not path.with_name("d.jsonl.index").exists()


def test_problems_are_encoded_and_checked_when_they_are_drawn(tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer()
    found = [row(i, completion=f"1+{i}={i + 1};#{i + 1}.") for i in range(30)]
    found[17]["completion"] = "9" * 300
    path = write(tmp_path / "d.jsonl", found)
    loaded = Shuffled(encode(load(path).train, tokenizer), 0, "demonstrated")
    monkeypatch.setattr(jsonl, "STREAMED_BYTES", 1)
    task = load(path)
    streamed = Shuffled(encode(task.train, tokenizer), 0, "demonstrated")
    assert isinstance(streamed.items, StreamedProblems)
    assert streamed.take(0, 70) == loaded.take(0, 70)
    assert streamed.items[1:3] == loaded.items[1:3]
    limits = {"max_new_tokens": 1, "token_budget": 200, "context": float("inf")}
    check_lengths(streamed.items, **limits)
    with pytest.raises(ValueError, match=r"'jsonl-train-17': .* do not fit run\.token_budget"):
        streamed.take(0, 30)
    rule = span_rule("sparse")
    maker = TraceMaker(task, tokenizer, rule, perturbations=("swap",))
    maker.check_perturbable(task.train)  # nothing is read
    with pytest.raises(ValueError, match=r"'jsonl-train-\d+': no perturbation among swap"):
        maker.perturbed(loaded.items[0], 0, 0)
