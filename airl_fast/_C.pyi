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
