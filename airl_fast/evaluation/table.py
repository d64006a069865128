"""The metrics of ``airl-fast eval`` as a page of Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def markdown(metrics: dict[str, Any]) -> str:
    """Return the page: what was measured, then a table for every section."""
    source, data, trained = metrics["source"], metrics["data"], metrics["trained"]
    lines = [
        f"# {source['file']}",
        "",
        f"{source['rows']} rows ({source['format']}), {data['traces']} traces of "
        f"{data['prompts']} prompts, {data['correct']:.3f} of them right, "
        f"{data['mean_tokens']:.0f} tokens long on average. The reward was trained on "
        f"{trained['task']} ({trained['granularity']}, logit {trained['logit']}). In brackets: 95% "
        "bootstrap intervals over prompts.",
    ]
    lines += [f"\nLeft out: {count} {reason}." for reason, count in metrics["dropped"].items()]
    if data["without_answer"]:
        lines.append(f"\n{data['without_answer']} candidates have no readable answer, and no vote.")
    writers = {
        "best_of_n": ("Best of n", _best_of_n),
        "auc": ("Right against wrong traces: AUC", _auc),
        "localisation": ("First wrong step", _localisation),
        "calibration": ("Calibration (Platt's sigmoid, cross-validated)", _calibration),
        "bias": ("What else the reward follows", _bias),
    }
    for name, (title, write) in writers.items():
        section = metrics[name]
        body = [f"Not measured: {section['skipped']}."] if "skipped" in section else write(section)
        lines += ["", f"## {title}", "", *body]
    return "\n".join(lines) + "\n"


def _best_of_n(section: dict[str, Any]) -> list[str]:
    ks = section["k"]
    rows = [
        [
            name,
            *(
                _interval({key: curve[key][i] for key in ("value", "low", "high")})
                for i in range(len(ks))
            ),
        ]
        for name, curve in section["curves"].items()
    ]
    more = [
        [name, _signed(test), f"{test['p_value']:.3g}"] for name, test in section["f_less"].items()
    ]
    return [
        f"Accuracy over {section['prompts']} prompts "
        f"({section['prompts_with_one_completion_left_out']} with one completion left out).",
        "",
        *_table(["pick", *(f"n = {k}" for k in ks)], rows),
        "",
        f"At n = {ks[-1]}, f less the others, paired by prompt:",
        "",
        *_table(["other", "difference", "p"], more),
    ]


def _auc(section: dict[str, Any]) -> list[str]:
    rows = [
        [
            name,
            _interval(found["pooled"]),
            found["within_prompt"].get("skipped") or _interval(found["within_prompt"]),
        ]
        for name, found in section["by_score"].items()
    ]
    rows += [["random", "0.500", "0.500"], ["oracle", "1.000", "1.000"]]
    return _table(["score", "pooled", "within a prompt"], rows)


def _localisation(section: dict[str, Any]) -> list[str]:
    rows = []
    for name, found in section["by_score"].items():
        bench = found["processbench"]
        skipped = bench.get("skipped")
        cells = (
            [skipped, "", ""]
            if skipped
            else [
                _interval(bench["f1"]),
                _number(bench["accuracy_error"]),
                _number(bench["accuracy_correct"]),
            ]
        )
        rows.append([name, _interval(found["lowest_step"]), _interval(found["mean_rank"]), *cells])
    chance, oracle = section["random"], section["oracle"]
    a, b = chance["accuracy_error"], chance["accuracy_correct"]
    f1 = 2 * a * b / (a + b) if a and b else None
    rows.append(
        [
            "random",
            _number(chance["lowest_step"]),
            _number(chance["mean_rank"]),
            _number(f1),
            _number(a),
            _number(b),
        ]
    )
    rows.append(
        ["oracle", _number(oracle["lowest_step"]), _number(oracle["mean_rank"]), *["1.000"] * 3]
    )
    return [
        f"{section['traces']} traces, {section['with_wrong_step']} with a wrong step. Lowest step: "
        "how often the lowest-scoring step is the first wrong one. Rank: of the first wrong step, "
        "1 the lowest. F1 (ProcessBench): the first step below a threshold that was chosen on "
        "other prompts.",
        "",
        *_table(["score", "lowest step", "rank", "F1", "with an error", "without"], rows),
    ]


def _calibration(section: dict[str, Any]) -> list[str]:
    rows = [
        [name, _number(found["ece"]), _number(found["brier"])]
        for name, found in section["by_score"].items()
    ]
    rows.append(["always the mean", "0.000", _number(section["always_the_mean"]["brier"])])
    return _table(["score", "ECE", "Brier"], rows)


def _bias(section: dict[str, Any]) -> list[str]:
    rows = [
        [
            name,
            _interval(found["length"]),
            _interval(found["length_at_equal_correctness"]),
            _interval(found["format_in_deviations"]),
        ]
        for name, found in section["by_score"].items()
    ]
    rows.append(["correctness", _interval(section["correctness_with_length"]), "", ""])
    return [
        "Correlation with length in tokens; the same among traces of equal correctness; and how "
        "much higher traces with a readable final answer "
        f"({section['formatted']:.3f} of all) score at equal correctness, in standard deviations.",
        "",
        *_table(["score", "length", "at equal correctness", "format"], rows),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}"


def _interval(found: dict[str, Any]) -> str:
    if found["value"] is None or found["low"] is None:
        return _number(found["value"])
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _signed(found: dict[str, Any]) -> str:
    return f"{found['difference']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
