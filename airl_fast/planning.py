"""Micro-batches within a budget of tokens, of like size where several processes share them."""

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence

import numpy as np

from airl_fast.batch_checks import invalid
from airl_fast.packing import Trace, by_prompt, check_traces

_IMBALANCE = 1.1  # most tokens of a micro-batch over the mean, when ranks share the work


def plan_micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut sequences into micro-batches of at most ``budget`` tokens by best-fit decreasing.

    The longest go first, each into the fullest micro-batch that still has room. Micro-batches are
    kept by their free room, and the rooms that occur in order: a bisection finds the best fit.

    Args:
        lengths: tokens of each sequence.
        budget: tokens of a micro-batch.

    Returns:
        Indices into ``lengths`` per micro-batch, ascending in each.

    Raises:
        ValueError: a sequence is longer than the budget, or has no tokens.
    """
    given = np.asarray(lengths)
    if not given.size:
        return []
    if given.dtype.kind not in "iu":
        raise invalid("lengths to be whole numbers", lengths[0], "pass whole numbers of tokens")
    sizes = given.astype(np.int64)
    longest, shortest = int(sizes.argmax()), int(sizes.argmin())
    if sizes[longest] > budget:
        raise _too_long(int(sizes[longest]), longest, budget)
    if sizes[shortest] < 1:
        raise invalid(
            "every sequence to have a token", f"{sizes[shortest]} at index {shortest}", "drop it"
        )
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # free tokens -> micro-batches with exactly that many
    rooms: list[int] = []  # the keys of by_room, ascending
    order = np.argsort(-sizes, kind="stable")
    for index, length in zip(order.tolist(), sizes[order].tolist(), strict=True):
        place = bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            chosen = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
            bins[chosen].append(index)
        else:
            room, chosen = budget, len(bins)
            bins.append([index])
        left = room - length
        if left not in by_room:
            by_room[left] = []
            insort(rooms, left)
        by_room[left].append(chosen)
    return [sorted(members) for members in bins]


def plan_traces(
    traces: Sequence[Trace], budget: int, *, share_prompts: bool = True, ranks: int = 1
) -> list[list[int]]:
    """Cut traces into micro-batches of at most ``budget`` packed tokens.

    Traces of one prompt stay together when they fit, since their prompt is then stored once; a
    prompt with too many traces is cut into pieces, and counted in each. Rank r of R takes every
    R-th micro-batch from the r-th on.

    Args:
        traces: what :func:`pack` will be given.
        budget: packed tokens of a micro-batch.
        share_prompts: as :func:`pack` will be called; otherwise every trace stands alone.
        ranks: the number of micro-batches is made a multiple of this and their tokens near equal.
            With fewer traces than ranks there is one micro-batch per trace.

    Returns:
        Indices into ``traces`` per micro-batch, ascending in each.

    Raises:
        ValueError: one trace is longer than the budget.
    """
    if ranks < 1:
        raise invalid("ranks of 1 or more", ranks, "pass the number of processes")
    check_traces(traces)
    units: list[list[int]] = []
    for same in by_prompt(traces) if share_prompts else [[b] for b in range(len(traces))]:
        longest = max(same, key=lambda b: len(traces[b].completion))
        if traces[longest].num_tokens > budget:
            raise _too_long(traces[longest].num_tokens, longest, budget)
        room = budget - len(traces[same[0]].prompt)
        pieces = plan_micro_batches([len(traces[b].completion) for b in same], room)
        units += [[same[i] for i in piece] for piece in pieces]

    def tokens(unit: list[int]) -> int:
        return len(traces[unit[0]].prompt) + sum(len(traces[b].completion) for b in unit)

    plan = plan_micro_batches([tokens(unit) for unit in units], budget)
    if ranks > 1:
        plan, units = _balance(units, tokens, budget, len(plan), ranks)
    return [sorted(b for unit in members for b in units[unit]) for members in plan]


def _balance(
    units: list[list[int]],
    tokens: Callable[[list[int]], int],
    budget: int,
    fewest: int,
    ranks: int,
) -> tuple[list[list[int]], list[list[int]]]:
    """Spread units over a multiple of ``ranks`` micro-batches, the longest to the emptiest.

    Units are cut in two while there are too few of them, or some rank would wait for another: the
    largest one or, where there are many, a sixteenth of them at a time.
    Returns the units per micro-batch, and the units.
    """
    num_traces = sum(map(len, units))
    count = min(-(-fewest // ranks) * ranks, num_traces)
    sizes = [tokens(unit) for unit in units]
    while True:
        while len(units) < count:
            units, sizes = _halve_largest(units, sizes, tokens, count - len(units))
        plan: list[list[int]] = [[] for _ in range(count)]
        loads = [(0, i) for i in range(count)]  # a heap
        for unit in sorted(range(len(units)), key=lambda u: -sizes[u]):
            load, emptiest = loads[0]
            plan[emptiest].append(unit)
            heapq.heapreplace(loads, (load + sizes[unit], emptiest))
        fullest_first = sorted(loads, reverse=True)
        fullest = fullest_first[0][0]
        if fullest > budget:
            count = min(count + ranks, num_traces)
        elif fullest > _IMBALANCE * sum(sizes) / count and len(units) < num_traces:
            units, sizes = _halve_largest(units, sizes, tokens, num_traces - len(units))
        else:
            return [plan[i] for _, i in fullest_first], units


def _halve_largest(
    units: list[list[int]], sizes: list[int], tokens: Callable[[list[int]], int], most: int
) -> tuple[list[list[int]], list[int]]:
    """Cut the units of most tokens, among those of several traces, in two; and their sizes."""
    several = (u for u, unit in enumerate(units) if len(unit) > 1)
    largest = heapq.nlargest(min(most, max(1, len(units) // 16)), several, key=sizes.__getitem__)
    rest = sorted(set(range(len(units))).difference(largest))
    halves = [half for u in largest for half in (units[u][::2], units[u][1::2])]
    return (
        [*(units[u] for u in rest), *halves],
        [*(sizes[u] for u in rest), *map(tokens, halves)],
    )


def _too_long(length: int, index: int, budget: int) -> ValueError:
    return invalid(
        f"every sequence to fit the budget of {budget} tokens",
        f"{length} tokens at index {index}",
        "raise the budget or drop the sequence",
    )
