"""What of ``airl-fast eval``'s metrics the report draws."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from airl_fast.evaluation.measure import REWARD, JudgedTrace
from airl_fast.report.content import Estimate
from airl_fast.report.summary import CurvePoint, EvalSummary, ReliabilityBin


def summarise(title: str, metrics: dict[str, Any], traces: Sequence[JudgedTrace]) -> EvalSummary:
    """Make the report's section from ``evaluation.measure``'s tree and the traces it is of."""
    kinds = {"right": True, "wrong": False}
    histograms = {
        name: [one.scores[REWARD] for one in traces if one.correct is correct]
        for name, correct in kinds.items()
    }
    return EvalSummary(
        title=title,
        numbers=dict(_numbers(metrics)),
        curves=_curves(metrics["best_of_n"]),
        reliability={
            f"{name}, calibrated": list(_bins(found))
            for name, found in metrics["calibration"].get("by_score", {}).items()
        },
        histograms={name: values for name, values in histograms.items() if values},
        histogram_label=REWARD,
        notes=["Intervals are 95% bootstraps over prompts."],
    )


def _numbers(metrics: dict[str, Any]) -> Iterator[tuple[str, float | Estimate]]:
    for name, found in metrics["auc"].get("by_score", {}).items():
        yield from _estimate(f"AUC of {name}", found["pooled"])
        yield from _estimate(f"AUC of {name} within a prompt", found["within_prompt"])
    for name, found in metrics["localisation"].get("by_score", {}).items():
        yield from _estimate(f"first error is the lowest step of {name}", found["lowest_step"])
        yield from _estimate(f"ProcessBench F1 of {name}", found["processbench"].get("f1", {}))
    for name, found in metrics["calibration"].get("by_score", {}).items():
        yield f"calibration error of {name}", found["ece"]


def _estimate(name: str, found: dict[str, Any]) -> Iterator[tuple[str, Estimate]]:
    """The value with its interval, where it is defined."""
    if "value" in found:
        three = Estimate(found["value"], found["low"], found["high"])
        if math.isfinite(three.value + three.low + three.high):
            yield name, three


def _curves(section: dict[str, Any]) -> dict[str, list[CurvePoint]]:
    return {
        name: [
            CurvePoint(n=n, mean=mean, low=low, high=high)
            for n, mean, low, high in zip(
                section["k"], curve["value"], curve["low"], curve["high"], strict=True
            )
        ]
        for name, curve in section.get("curves", {}).items()
    }


def _bins(found: dict[str, Any]) -> Iterator[ReliabilityBin]:
    for count, probability, accuracy in zip(
        found["count"], found["probability"], found["accuracy"], strict=True
    ):
        if count:
            yield ReliabilityBin(p_mean=probability, fraction=accuracy, count=count)
