"""The study end to end, on made-up answers and a tiny model; its numbers by hand."""

import json
import random
import string

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from studies import mmlu_pro, mmlu_pro_analysis
from studies.mmlu_pro_analysis import by_model
from studies.mmlu_pro_data import EXPERT, MODELS, load
from tests.tiny_models import tiny_model

LINES = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    characters = string.ascii_letters + string.digits + " .:()?+=\n'"
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)
    tiny_model("llama", vocab_size=len(vocabulary)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)

    def write(name, rows):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    questions = [
        {
            "question_id": i,
            "question": "What?" if i < 8 else f"What is {i}?",  # eight of one text
            "options": [f"{i}", f"{i + 1}", "no"],
            "answer": "A",
        }
        for i in range(LINES)
    ]
    write("questions", questions)
    for m, name in enumerate(MODELS):
        rows = []
        for i in range(LINES):
            letter = rng.choice("AAAB" if name == EXPERT else "ABC")
            text = f"So{'o' * m}. The answer is ({letter})."
            if name == MODELS[1] and i % 10 == 9:
                text = "So."
            rows.append({"question_id": i, "response": text + "\n\nQuestion: more?" * (m == 2)})
        write(name, rows)
    return folder


def run(data, model, output, *more):
    sizes = ["--train", "6", "--test", "9", "--max-prompt", "200", "--seeds", "1"]
    small = ["--granularities", "step", "--batch", "2", "--threads", "1"]
    fixed = ["--data", str(data), "--model", str(model), "--output", str(output)]
    return mmlu_pro.main([*fixed, *sizes, *small, *more])


def test_halves_share_no_question_and_what_does_not_qualify_is_counted(data, model):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    limits = {"max_prompt": 200, "max_completion": 60, "seed": 0}
    got = load(data, tokenizer, train=8, test=8, **limits)
    texts = [{one.question.text for one in half} for half in (got.train, got.test)]
    assert not texts[0] & texts[1]
    assert len({one.question.id for one in [*got.train, *got.test]}) == 16
    reason = f"questions that {MODELS[1]} gave no readable answer to"
    assert 0 <= got.left_out.get(reason, 0) <= 4
    one = got.train[0]
    assert one.correct == tuple(answer == "A" for answer in one.answers)
    assert "Question: more" not in tokenizer.decode(one.completions[2])
    with pytest.raises(ValueError, match="were asked for"):
        load(data, tokenizer, train=30, test=8, **limits)
    short = load(data, tokenizer, train=0, test=0, **limits)
    assert short.left_out == {}


def test_the_study_runs_goes_on_and_refuses_other_settings(
    data, model, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(mmlu_pro_analysis, "_RESAMPLES", 50)
    assert run(data, model, tmp_path) == 0
    out = capsys.readouterr().out
    assert "ms a token of training" in out
    page = (tmp_path / "results.md").read_text()
    assert "| score-step: f (mean) |" in page
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["facts"]["test_questions"] == 9
    assert set(metrics["baselines"]["accuracy"]) == set(MODELS)
    assert metrics["baselines"]["always the expert"] == metrics["baselines"]["accuracy"][EXPERT]
    scores = (tmp_path / "lm-step-0" / "scores.jsonl").read_text()
    (tmp_path / "lm-step-0" / "scores.jsonl").write_text(scores[: len(scores) // 2])  # cut short
    assert run(data, model, tmp_path) == 0
    assert capsys.readouterr().out.count("done before") == 1
    again = [json.loads(line) for line in (tmp_path / "lm-step-0" / "scores.jsonl").open()]
    before = [json.loads(line) for line in scores.splitlines()]
    assert [one["id"] for one in again] == [one["id"] for one in before]
    for one, other in zip(again, before, strict=True):
        for a, b in zip(one["scores"], other["scores"], strict=True):
            assert a == pytest.approx(b, rel=1e-4)
    assert run(data, model, tmp_path, "--batch", "3") == 2
    assert "settings that the folder was started with" in capsys.readouterr().err


def test_scores_by_model_say_nothing_of_who_wrote():
    score = np.random.default_rng(0).normal(size=(50, 4)) * [1, 2, 3, 4] + [9, 0, -5, 2]
    left = by_model(score)
    np.testing.assert_allclose(left.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(left.std(0), 1)
    order = [np.argsort(score[:, m]).tolist() == np.argsort(left[:, m]).tolist() for m in range(4)]
    assert all(order)
