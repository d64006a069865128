"""CPU kernels over raw addresses (csrc/): strides in elements, item_size 4 or 8, cu int32."""
# ruff: noqa: N999 (the name of the extension module)

def segment_sum(
    x: int, stride: int, item_size: int, cu: int, spans: int, mean: bool, out: int
) -> None: ...
def segment_last(x: int, stride: int, item_size: int, cu: int, spans: int, out: int) -> None: ...
def segment_softmax(x: int, stride: int, item_size: int, cu: int, spans: int, out: int) -> None: ...
def discounted_scan(
    x: int,
    stride: int,
    item_size: int,
    cu: int,
    spans: int,
    gamma: float,
    forwards: bool,
    out: int,
) -> None: ...

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
