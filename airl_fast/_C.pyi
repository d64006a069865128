"""CPU kernels of csrc/, over raw addresses; and those over spans also on tensors themselves."""
# ruff: noqa: N999 (the name of the extension module)

from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Literal

from torch import Tensor

_Values = tuple[int, int, int, int]  # address, stride in elements, item_size (4 or 8), values
_Spans = tuple[int, int]  # address of the int32 offsets, contiguous; spans

def segment_sum(x: _Values, at: _Spans, mean: bool, threads: int, out: int) -> None: ...
def segment_last(x: _Values, at: _Spans, threads: int, out: int) -> None: ...
def segment_softmax(x: _Values, at: _Spans, threads: int, out: int) -> None: ...
def discounted_scan(
    x: _Values, at: _Spans, gamma: float, forwards: bool, threads: int, out: int
) -> None: ...

# On tensors themselves: None where the operator has to serve, False where it is only that a
# gradient is to be recorded (airl_fast/ops/_eager.py).
_Eager = Tensor | Literal[False] | None

def eager_prepare(
    capsule: object,
    tensor: type[Tensor],
    forced: ContextVar[str | None],
    forward_ad: ModuleType,
    grad_enabled: Callable[[], bool],
    function_modes: Callable[[], int],
    dispatch_modes: Callable[[], int],
    transforms: Callable[[], bool],
    tracing: Callable[[], bool],
    threads: Callable[[], int],
    /,
) -> bool: ...
def eager_sum(x: Tensor, cu: Tensor, /) -> _Eager: ...
def eager_mean(x: Tensor, cu: Tensor, /) -> _Eager: ...
def eager_last(x: Tensor, cu: Tensor, /) -> _Eager: ...
def eager_ends(x: Tensor, cu: Tensor, /) -> Tensor | None: ...
def eager_softmax(x: Tensor, cu: Tensor, /) -> _Eager: ...
def eager_returns(x: Tensor, cu: Tensor, gamma: float, transpose: bool, /) -> _Eager: ...
def eager_spread(grad: Tensor, cu: Tensor, /) -> Tensor | None: ...
def eager_spread_mean(grad: Tensor, cu: Tensor, /) -> Tensor | None: ...
def eager_softmax_gradient(grad: Tensor, cu: Tensor, p: Tensor, /) -> Tensor | None: ...

_Chunk = tuple[
    int, int, int, int, int
]  # address, row stride, rows, V, element (0 f32, 1 bf16, 2 f16)
_Head = tuple[int, float, float, float]  # bias or 0, and inner, outer and slope as in csrc/rows.h

def read_rows(
    chunk: _Chunk,
    head: _Head,
    targets: int,
    first: int,
    threads: int,
    stats: int,
    logp: int,
    entropy: int,
) -> None: ...
def weigh_rows(
    chunk: _Chunk,
    head: _Head,
    targets: int,
    first: int,
    threads: int,
    stats: int,
    logp: int,
    entropy: int,
    tangent: int,
    sums: int,
    width: int,
) -> None: ...
def differentiate_rows(
    chunk: _Chunk,
    head: _Head,
    targets: int,
    first: int,
    threads: int,
    stats: int,
    d_logp: int,
    d_entropy: int,
    gradient: int,
) -> None: ...
def vector_paths() -> list[str]: ...
def vector_path() -> str: ...
def use_vector_path(name: str) -> None: ...
def advise_huge_pages(address: int, bytes: int) -> None: ...

_Vector = tuple[int, int]  # address, stride in elements
# f, logp, weight (address 0: ones), their item_size, is_expert, S, and the options: whether the
# logit subtracts logp, label smoothing, temperature, whether it is the critic's ("wgan")
_Discriminator = tuple[_Vector, _Vector, _Vector, int, _Vector, int, bool, float, float, bool]

def discriminator_loss(spans: _Discriminator, out: int) -> None: ...
def discriminator_gradient(spans: _Discriminator, grad: float, out: int) -> None: ...

GATE_INNER: int
_Operand = tuple[int, int, int, int]  # address, row and column stride, element (0 f32, 1 bf16)
# b, N, address and row stride of the result, and of what is added to it (0: nothing; stride 0: [N])
_Factor = tuple[_Operand, int, int, int, int, int]

def products_ready() -> bool: ...
def multiply(
    a: _Operand,
    factors: list[_Factor],
    rows: int,
    inner: int,
    add: bool,
    gate: bool,
    norm: int,
    epsilon: float,
    parts: int,
    threads: int,
) -> None: ...

_Size = tuple[int, int]  # rows, width

def norm_rows(
    size: _Size, x: int, weight: int, epsilon: float, threads: int, out: int, scale: int
) -> None: ...
def norm_gradient(
    size: _Size, grad: int, x: int, weight: int, scale: int, threads: int, out: int
) -> None: ...
def gate_rows(size: _Size, gate: int, up: int, threads: int, out: int) -> None: ...
def gate_gradient(
    size: _Size, grad: int, gate: int, up: int, threads: int, d_gate: int, d_up: int
) -> None: ...
def draw_rows(
    logits: int,
    stride: int,
    rows: int,
    vocab: int,
    scale: float,
    u: int,
    tokens: int,
    logp: int,
    threads: int,
) -> None: ...
def attend_rows(
    rows: int,
    heads: int,
    key_heads: int,
    size: int,
    tokens: int,
    room: int,
    own: int,
    window: int,
    prompt_keys: int,
    prompt_values: int,
    starts: int,
    counts: int,
    own_keys: int,
    own_values: int,
    queries: int,
    keys: int,
    values: int,
    scale: float,
    out: int,
    threads: int,
) -> None: ...

# heads, key heads, head size, value size, window, scale
_Attention = tuple[int, int, int, int, int, float]
_Segments = tuple[int, int]  # address of int64 [P, 5], P
_Heads = tuple[int, int, int]  # address, strides of tokens and heads in elements

def attend_segments(
    sizes: _Attention,
    segments: _Segments,
    queries: _Heads,
    keys: _Heads,
    values: _Heads,
    out: int,
    statistics: int,
    threads: int,
) -> None: ...
def differentiate_segments(
    sizes: _Attention,
    segments: _Segments,
    queries: _Heads,
    keys: _Heads,
    values: _Heads,
    out: int,
    statistics: int,
    d_out: _Heads,
    d_queries: int,
    d_keys: int,
    d_values: int,
    tokens: int,
    threads: int,
) -> None: ...
def rotate_heads(
    x: int,
    stride: int,
    tokens: int,
    heads: int,
    size: int,
    cos: int,
    sin: int,
    back: bool,
    threads: int,
    out: int,
) -> None: ...
