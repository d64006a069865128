"""CUDA kernels over raw addresses in GPU memory (csrc/cuda/): strides in elements, cu int32."""

architectures: str  # what they were built for, such as "80;90a"

_Where = tuple[int, int]  # device index, stream
# address, row stride, rows, V, element (0 float32, 1 bfloat16, 2 float16)
_Chunk = tuple[int, int, int, int, int]
_Head = tuple[int, float, float, float]  # bias or 0, and inner, outer and slope as in csrc/rows.h
_Plan = tuple[int, int, int]  # blocks to a row, threads of a block, bytes of the row that it keeps

def plan_read(
    chunk: _Chunk, major: int, shared_bytes: int, processors: int
) -> tuple[int, int, int]: ...
def plan_policy(
    chunk: _Chunk, major: int, shared_bytes: int, processors: int
) -> tuple[int, int, int]: ...
def read_rows(
    where: _Where,
    chunk: _Chunk,
    head: _Head,
    targets: int,
    stats: int,
    logp: int,
    entropy: int,
    plan: _Plan | None = None,
) -> None: ...
def differentiate_rows(
    where: _Where,
    chunk: _Chunk,
    head: _Head,
    targets: int,
    stats: int,
    d_logp: int,
    d_entropy: int,
    gradient: int,
) -> None: ...
def policy_rows(
    where: _Where,
    chunk: _Chunk,
    head: _Head,
    targets: int,
    actions: tuple[int, int, int, int],
    options: tuple[float, float, float, float, float],
    logp: int,
    entropy: int,
    gradient: int,
    plan: _Plan | None = None,
) -> None: ...

_Vector = tuple[int, int]  # address, stride
_Cuts = tuple[int, int, int]  # address of the offsets, spans, values

def segment_sum(where: _Where, x: _Vector, cu: _Cuts, mean: bool, out: int) -> None: ...
def segment_last(where: _Where, x: _Vector, cu: _Cuts, out: int) -> None: ...
def segment_softmax(where: _Where, x: _Vector, cu: _Cuts, out: int) -> None: ...
def discounted_scan(
    where: _Where, x: _Vector, cu: _Cuts, gamma: float, forwards: bool, out: int
) -> None: ...
def score_spans(
    where: _Where,
    hidden: _Chunk,
    weight: int,
    bias: int,
    rows: int,
    gamma: float,
    cu: _Cuts,
    sequences: _Cuts,
    logp: int,
    mean: bool,
    f: int,
    reward: int,
) -> None: ...

# f, logp, weight (address 0: ones), is_expert, S, and the options: whether the logit subtracts
# logp, label smoothing, temperature, whether it is the critic's ("wgan")
_Discriminator = tuple[_Vector, _Vector, _Vector, _Vector, int, bool, float, float, bool]

def discriminator_scratch(spans: int) -> int: ...
def discriminator_loss(where: _Where, spans: _Discriminator, scratch: int, out: int) -> None: ...
def discriminator_gradient(
    where: _Where, spans: _Discriminator, grad: int, scratch: int, out: int
) -> None: ...
