"""Which cases there are, at which shapes; and how a run goes through them."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks import attention, environment, heads, memory, packing, sampling, segments, step
from benchmarks.harness import Case, Row, Timing
from benchmarks.language import STEP_PROMPTS, TINY, ModelShape
from benchmarks.runner import run_case

OPERATORS = (
    *heads.OPERATORS,
    *segments.OPERATORS,
    attention.OPERATOR,
    packing.OPERATOR,
    step.OPERATOR,
    sampling.OPERATOR,
)
DTYPES = ("float32", "bfloat16", "float16")

# N, V, D of: SmolLM2-135M, Llama 3.2 1B, Qwen2.5 0.5B
_SHAPES = ((2048, 49152, 576), (512, 128256, 2048), (256, 151936, 896))
_QUICK_SHAPES = ((64, 512, 32),)
_SWEPT = (heads.ENTROPY, heads.POLICY)  # plotted against N and V
_SWEEP_D = 576
_SWEEP_N = tuple((n, 49152) for n in (128, 256, 512, 1024, 4096))  # 2048 is a main shape
_SWEEP_V = tuple((1024, v) for v in (8192, 16384, 32768, 98304))
_ATTENTION = ((8, 1), (4, 8))  # prompts, G
_PACKING = ((1, 4), (1, 8), (1, 16))  # prompts, G
_STEP = (1, 8)
_QUICK_SWEEP = ((32, 512), (64, 256))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to run.

    Attributes:
        quick: tiny shapes and few rounds: to see that everything works, not to learn speeds.
        only: operators, by the start of their names; empty for all.
        peers: names of peers; empty for all. airl_fast always runs.
        backends: of airl_fast; empty for all.
        shapes: N, V, D of the operators over the head; empty for the three of real models.
        dtype: of the head's inputs; the other operators run in float32.
        seed: of all inputs and of the order of timed calls.
        threads: of torch and of the kernels.
        rounds: timed rounds.
        sweep: also run the shapes of the plots against N and V.
        memory: also measure peak memory.
    """

    quick: bool = False
    only: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    shapes: tuple[tuple[int, int, int], ...] = ()
    dtype: str = "float32"
    seed: int = 0
    threads: int = 1
    rounds: int = 7
    sweep: bool = True
    memory: bool = True

    @classmethod
    def from_json(cls, text: str) -> "Settings":
        """Read what ``json.dumps(asdict(settings))`` wrote; older files lack some fields."""
        values: dict[str, Any] = {"backends": (), "shapes": (), **json.loads(text)}
        for name in ("only", "peers", "backends"):
            values[name] = tuple(values[name])
        values["shapes"] = tuple(tuple(shape) for shape in values["shapes"])
        return cls(**values)

    def wants(self, operator: str) -> bool:
        """Whether an operator is to run."""
        return not self.only or operator.startswith(self.only)


@dataclass(frozen=True)
class Results:
    """Rows, and what they were measured with."""

    environment: dict[str, object]
    settings: Settings
    rows: list[Row]

    @classmethod
    def from_json(cls, text: str) -> "Results":
        """Read a results.json.

        Raises:
            ValueError: it is not one.
        """
        try:
            data = json.loads(text)
            settings = Settings.from_json(json.dumps(data["settings"]))
            return cls(data["environment"], settings, [Row(**row) for row in data["rows"]])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"expected the results.json of a benchmark run: {error!r}; "
                "python -m benchmarks writes one"
            ) from error

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "environment": self.environment,
            "settings": asdict(self.settings),
            "rows": [asdict(row) for row in self.rows],
        }


def all_cases(settings: Settings) -> Iterator[Case]:
    """Every case of a run, those of one shape together, built when asked for."""
    dtype, seed = getattr(torch, settings.dtype), settings.seed
    yield from _segment_cases(settings)
    for shape in settings.shapes or (_QUICK_SHAPES if settings.quick else _SHAPES):
        for operator in filter(settings.wants, heads.OPERATORS):
            yield heads.head_case(operator, *shape, dtype, seed)
    yield from _end_to_end_cases(settings)
    if settings.sweep:
        for n, v in _QUICK_SWEEP if settings.quick else (*_SWEEP_N, *_SWEEP_V):
            for operator in filter(settings.wants, _SWEPT):
                width = _QUICK_SHAPES[0][2] if settings.quick else _SWEEP_D
                yield heads.head_case(operator, n, v, width, dtype, seed, group="sweep")


def _segment_cases(settings: Settings) -> Iterator[Case]:
    for operator in filter(settings.wants, segments.OPERATORS):
        for sequences in (8,) if settings.quick else (8, 64, 2048, 20000):
            for gradient in (False, True):
                yield segments.segment_case(
                    operator, sequences, torch.float32, settings.seed, gamma=0.99,
                    gradient=gradient,
                )  # fmt: skip
    if settings.wants(segments.RETURNS):  # long enough for powers of gamma to underflow
        yield segments.segment_case(
            segments.RETURNS, 4 if settings.quick else 32, torch.float32, settings.seed,
            length=2048, gamma=0.9,
        )  # fmt: skip


def _end_to_end_cases(settings: Settings) -> Iterator[Case]:
    """As few prompts as show the sharing: the padded formulations take minutes a call."""
    model = TINY if settings.quick else ModelShape()
    if settings.wants(attention.OPERATOR):
        for prompts, group in ((2, 2),) if settings.quick else _ATTENTION:
            for gradient in (False, True):
                yield attention.attention_case(prompts, group, model, settings.seed, gradient)
    if settings.wants(packing.OPERATOR):
        for prompts, group in ((2, 8),) if settings.quick else _PACKING:
            yield packing.packing_case(prompts, group, model, settings.seed)
    if settings.wants(step.OPERATOR):
        yield step.step_case(*_STEP, model, settings.seed)
    if settings.wants(sampling.OPERATOR):
        tokens = 8 if settings.quick else 128  # the recipe's max_new_tokens
        for prompts in (1, STEP_PROMPTS):
            yield sampling.sampling_case(prompts, _STEP[1], tokens, model, settings.seed)


def run(settings: Settings) -> Results:
    """Run all cases; progress goes to standard error."""
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        return _run(settings)
    finally:
        torch.set_num_threads(threads)


def _run(settings: Settings) -> Results:
    found = environment.describe()
    found["load_before"] = environment.load()
    timing = Timing(
        rounds=settings.rounds, least_s=1e-4 if settings.quick else 0.02, seed=settings.seed
    )
    rows: list[Row] = []
    keys: dict[int, str] = {}
    try:
        for case in all_cases(settings):
            print(f"{case.key}:", end=" ", file=sys.stderr, flush=True)
            own = run_case(
                case, timing, peers=settings.peers or None, backends=settings.backends or None
            )
            if case.memory:
                keys |= {len(rows) + i: case.key for i in range(len(own))}
            rows += own
            print(ratios(own), file=sys.stderr)
    except KeyboardInterrupt:  # an hour's numbers are worth keeping
        print("interrupted: what was timed so far is kept", file=sys.stderr)
        found["interrupted"] = True
    found["load_after_timing"] = environment.load()
    if settings.memory and memory.supported():
        print("peak memory ...", file=sys.stderr)
        memory.measure(settings, rows, keys)
    return Results(found, settings, rows)


def ratios(rows: list[Row]) -> str:
    """A line of progress: the ratios of a case."""
    return ", ".join(
        f"{row.peer} {'' if row.backend == '-' else row.backend + ' '}"
        + (row.status if row.ratio is None else f"{row.ratio:.2f}")
        for row in rows
    )
