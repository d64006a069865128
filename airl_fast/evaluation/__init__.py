"""What a policy and a reward are worth: numbers with their uncertainty, and ``airl-fast eval``.

``numbers``, ``separation``, ``calibration`` and ``steps`` take arrays and know no model;
``measure`` puts them together for scored traces; ``files``, ``table``, ``plots`` and ``summary``
(for the report) are the command.
"""

from airl_fast.evaluation.numbers import (
    Array,
    Localisation,
    PairedDifference,
    auc,
    best_of_n,
    binomial_interval,
    bootstrap_interval,
    locate_accuracy,
    majority_vote,
    paired_bootstrap,
    paired_bootstrap_of_runs,
    pass_at_k,
    weighted_vote,
)

__all__ = [
    "Array",
    "Localisation",
    "PairedDifference",
    "auc",
    "best_of_n",
    "binomial_interval",
    "bootstrap_interval",
    "locate_accuracy",
    "majority_vote",
    "paired_bootstrap",
    "paired_bootstrap_of_runs",
    "pass_at_k",
    "weighted_vote",
]
