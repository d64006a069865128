"""Count what the CPU waits for a GPU for."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_READS = {
    _aten._local_scalar_dense.default,
    _aten.equal.default,
    _aten.masked_select.default,
    _aten.nonzero.default,
    _aten.repeat_interleave.Tensor,
    _aten.unique_dim.default,
    _aten._unique2.default,
}
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}


class Waits(TorchDispatchMode):
    """Within it, ``made`` counts operators whose result the CPU has to wait for.

    Reads of values, results whose size depends on values, and copies between the two memories that
    are not asynchronous; not those in the body of a custom operator, and not what copies from
    pageable memory wait for.
    """

    def __init__(self):
        super().__init__()
        self.made = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._waits(func, args, kwargs):
            self.made[str(func)] += 1
        return func(*args, **kwargs)

    def _waits(self, func, args, kwargs):
        if func is _aten.copy_.default:
            asynchronous = len(args) > 2 and args[2]
            return args[0].device.type != args[1].device.type and not asynchronous
        if func is _aten._to_copy.default:
            to = torch.device(kwargs.get("device") or args[0].device)
            return to.type != args[0].device.type and not kwargs.get("non_blocking")
        if not args or not isinstance(args[0], torch.Tensor) or not args[0].is_cuda:
            return False
        if func in _READS:
            return not (func is _aten.repeat_interleave.Tensor and kwargs.get("output_size"))
        masks = (torch.bool, torch.uint8)
        return func in _INDEXED and any(i is not None and i.dtype in masks for i in args[1])
