"""From the scores of the study to its numbers: metrics.json and results.md.

P held-out questions, four models' answers to each: every score is an array [P, 4], in the order
of ``MODELS``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from airl_fast.evaluation import (
    Array,
    auc,
    best_of_n,
    bootstrap_interval,
    majority_vote,
    paired_bootstrap,
)
from airl_fast.evaluation.separation import pooled_auc, resampled, within_auc
from studies.mmlu_pro_data import EXPERT, MODELS, Asked

_SEED = 0
_RESAMPLES = 1000
_BASE = ("log pi (sum)", "log pi (mean)")
_READ = ("f (sum)", "f (mean)")
_PICKS = ("random", "majority", "always the expert", "oracle")
_KINDS = ("right", "wrong")
_UNDEFINED = {"value": None, "low": None, "high": None}  # answers of one kind only


def analyse(
    folder: Path, test: Sequence[Asked], variants: Sequence[str], facts: dict[str, Any]
) -> Path:
    """Measure every variant and the base model; write metrics.json and results.md.

    Args:
        folder: of the study.
        test: the held-out questions, in the order in which they were scored.
        variants: names of the folders, ``HEAD-GRANULARITY-SEED``.
        facts: how the study was made; goes into both files.

    Returns:
        The path of results.md.
    """
    correct = np.array([one.correct for one in test], np.float64)
    answers = [list(one.answers) for one in test]
    scores = _read(folder / "base", test, _BASE)
    measured = {name: [measure(values, correct)] for name, values in scores.items()}
    lengths = np.array([[len(part) for part in one.completions] for one in test], np.float64)
    measured["shortest answer"] = [measure(-lengths, correct)]
    for variant in variants:
        kind = variant.rsplit("-", 1)[0]
        for name, values in _read(folder / variant, test, _READ).items():
            measured.setdefault(f"{kind}: {name}", []).append(measure(values, correct))
            scores[f"{variant}: {name}"] = values
    metrics = {
        "facts": facts,
        "baselines": _baselines(correct, answers),
        "scores": measured,
        "f_less_log_pi": _against_base(scores, correct),
    }
    text = json.dumps(metrics, indent=1, allow_nan=False)
    (folder / "metrics.json").write_text(text + "\n")
    page = folder / "results.md"
    page.write_text(_page(metrics))
    return page


def by_model(score: Array) -> Array:
    """Scores in standard deviations of their model, [P, 4]: what is left once it is known."""
    spread = score.std(0)
    return (score - score.mean(0)) / np.where(spread > 0, spread, 1.0)


def measure(score: Array, correct: Array) -> dict[str, Any]:
    """Everything about one score, as values with intervals."""
    questions, models = score.shape
    prompt = np.repeat(np.arange(questions), models)
    flat, labels, left = score.ravel(), correct.ravel(), by_model(score)
    expert = np.tile([float(model == EXPERT) for model in MODELS], (questions, 1))
    is_expert = expert.ravel() == 1
    within = {model: _interval(score[:, m], correct[:, m]) for m, model in enumerate(MODELS)}
    means = _mean_auc(score, correct)
    kinds = {"right": labels == 1, "wrong": labels == 0}
    return {
        "auc_within_model": within,
        "auc_within_model_mean": means,
        "auc_pooled": _pooled(flat, labels, prompt),
        "auc_within_question": _within(flat, labels, prompt),
        "auc_within_question_by_model": _within(left.ravel(), labels, prompt),
        "auc_expert": _pooled(flat, is_expert, prompt),
        "auc_expert_at_equal": {
            name: _pooled(flat[mine], is_expert[mine], prompt[mine]) for name, mine in kinds.items()
        },
        "picked": _mean(best_of_n(correct, score, [models])[:, 0]),
        "picked_by_model": _mean(best_of_n(correct, left, [models])[:, 0]),
        "picks_the_expert": _mean(best_of_n(expert, score, [models])[:, 0]),
    }


def _pooled(score: Array, label: Array, prompt: Array) -> dict[str, float | None]:
    one_kind = label.all() or not label.any()
    return (
        dict(_UNDEFINED)
        if one_kind
        else _plain(pooled_auc(score, label, prompt, _SEED, _RESAMPLES))
    )


def _within(score: Array, label: Array, prompt: Array) -> dict[str, float | None]:
    mixed = any(0 < label[prompt == p].mean() < 1 for p in np.unique(prompt))
    return _plain(within_auc(score, label, prompt, _SEED)) if mixed else dict(_UNDEFINED)


def _interval(score: Array, label: Array) -> dict[str, float | None]:
    return _pooled(score, label, np.arange(score.size))


def _mean_auc(score: Array, correct: Array) -> dict[str, float | None]:
    """Mean over models of the AUC among the model's own answers; questions are resampled."""

    def value(weight: Array) -> float:
        drawn = np.repeat(np.arange(len(score)), weight.astype(int))
        each = []
        for m in range(score.shape[1]):
            label = correct[drawn, m]
            if label.all() or not label.any():
                return np.nan
            each.append(auc(score[drawn, m], label))
        return float(np.mean(each))

    every = np.ones(len(score))
    return _plain(resampled(value(every), value, len(score), _SEED, _RESAMPLES))


def _baselines(correct: Array, answers: list[list[str]]) -> dict[str, Any]:
    accuracy = {model: _mean(correct[:, m]) for m, model in enumerate(MODELS)}
    return {
        "accuracy": accuracy,
        "random": _mean(correct.mean(1)),
        "majority": _mean(majority_vote(answers, correct)),
        "always the expert": accuracy[EXPERT],
        "oracle": _mean(correct.max(1)),
    }


def _against_base(scores: dict[str, Array], correct: Array) -> dict[str, Any]:
    """The pick by f less the pick by log pi, for a score averaged over seeds of a variant."""
    kinds: dict[str, list[Array]] = {}
    for name, values in scores.items():
        if name not in _BASE:
            variant, read = name.split(": ")
            picks = best_of_n(correct, values, [values.shape[1]])[:, 0]
            kinds.setdefault(f"{variant.rsplit('-', 1)[0]}: {read}", []).append(picks)
    found = {}
    for name, picks in kinds.items():
        mean = np.mean(picks, axis=0)
        found[name] = {}
        for base in _BASE:
            other = best_of_n(correct, scores[base], [correct.shape[1]])[:, 0]
            test = paired_bootstrap(mean, other, _SEED)
            found[name][base] = {
                "value": test.difference,
                "low": test.low,
                "high": test.high,
                "p": test.p_value,
            }
    return found


def _read(folder: Path, test: Sequence[Asked], names: Sequence[str]) -> dict[str, Array]:
    lines = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    if [line["id"] for line in lines] != [one.question.id for one in test]:
        raise ValueError(f"{folder}: scores of other questions; remove the folder and run again")
    return {
        name: np.array([[one[name] for one in line["scores"]] for line in lines]) for name in names
    }


def _mean(values: Array) -> dict[str, float | None]:
    low, high = bootstrap_interval(values, _SEED)
    return {"value": float(values.mean()), "low": low, "high": high}


def _plain(found: Any) -> dict[str, float | None]:
    values = {"value": found.value, "low": found.low, "high": found.high}
    return values if np.isfinite(list(values.values())).all() else dict(_UNDEFINED)


def _page(metrics: dict[str, Any]) -> str:
    facts = metrics["facts"]
    head = [
        f"Trained on {facts['train_questions']} questions ({facts['train_tokens']} tokens, "
        f"{facts['updates']} updates), measured on {facts['test_questions']} of the other half "
        f"({facts['test_tokens']} tokens). Left out on the way:",
        "",
        *(f"- {count} {reason}" for reason, count in facts["left_out"].items()),
        "",
        "Brackets: 95% bootstrap over questions, the mean of the bounds where there are several "
        "seeds; ±: standard deviation over seeds.",
    ]
    sections = {
        "Accuracy of the models on these questions": _accuracy_table(metrics),
        "Right against wrong within each model: AUC": _within_table(metrics),
        "Picking one of the four answers to a question": _picks_table(metrics),
        "f less log pi, picks of all seeds averaged, paired by question": _paired_table(metrics),
        "Style against correctness: AUC": _style_table(metrics),
    }
    for title, body in sections.items():
        head += ["", f"## {title}", "", *body]
    return "\n".join(head) + "\n"


def _accuracy_table(metrics: dict[str, Any]) -> list[str]:
    accuracy = metrics["baselines"]["accuracy"]
    return table(["answer", "accuracy"], [[m, cell([value])] for m, value in accuracy.items()])


def _within_table(metrics: dict[str, Any]) -> list[str]:
    rows = [
        [
            name,
            *(cell([one["auc_within_model"][model] for one in found]) for model in MODELS),
            cell([one["auc_within_model_mean"] for one in found]),
        ]
        for name, found in metrics["scores"].items()
    ]
    return table(["score", *MODELS, "mean"], rows)


def _picks_table(metrics: dict[str, Any]) -> list[str]:
    base = {name: cell([metrics["baselines"][name]]) for name in _PICKS}
    return [
        "'By model': scores in standard deviations of their model, so that who wrote an answer "
        "tells nothing.",
        "",
        *table(
            ["pick", "accuracy", "by model", "picks the expert"],
            [
                ["random", base["random"], "", ""],
                ["majority", base["majority"], "", ""],
                ["always the expert", base["always the expert"], "", "1.000"],
                *_rows(metrics, "picked", "picked_by_model", "picks_the_expert"),
                ["oracle", base["oracle"], "", ""],
            ],
        ),
    ]


def _paired_table(metrics: dict[str, Any]) -> list[str]:
    rows = [
        [name, *(f"{cell([found[base]])}, p = {found[base]['p']:.3g}" for base in _BASE)]
        for name, found in metrics["f_less_log_pi"].items()
    ]
    return table(["score", *(f"less {name}" for name in _BASE)], rows)


def _style_table(metrics: dict[str, Any]) -> list[str]:
    rows = [
        [
            name,
            cell([one["auc_expert"] for one in found]),
            *(cell([one["auc_expert_at_equal"][kind] for one in found]) for kind in _KINDS),
            cell([one["auc_within_question"] for one in found]),
            cell([one["auc_within_question_by_model"] for one in found]),
        ]
        for name, found in metrics["scores"].items()
    ]
    return [
        "Who: the expert's answers against the others', among all, among right and among wrong "
        "ones. Right: right against wrong answers to one question, and the same by model.",
        "",
        *table(
            ["score", "who", "who, right ones", "who, wrong ones", "right", "right, by model"], rows
        ),
    ]


def _rows(metrics: dict[str, Any], *keys: str) -> list[list[str]]:
    return [
        [name, *(cell([one[key] for one in found]) for key in keys)]
        for name, found in metrics["scores"].items()
    ]


def cell(found: Sequence[dict[str, float | None]]) -> str:
    """Values of several seeds as their mean, spread and mean interval."""
    if any(one["value"] is None for one in found):
        return "not defined"
    value, low, high = (
        float(np.mean([one[key] for one in found])) for key in ("value", "low", "high")
    )
    spread = ""
    if len(found) > 1:
        spread = f" ± {np.std([one['value'] for one in found], ddof=1):.3f}"
    return f"{value:.3f}{spread} [{low:.3f}, {high:.3f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]
