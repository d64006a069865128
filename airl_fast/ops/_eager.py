"""The eager path of the operators over spans: one call into C++ on the tensors themselves.

On a few thousand values a kernel takes a microsecond, and a call of the custom operator with its
checks a hundred. Where nobody would notice the difference, the public functions therefore pass it
by: plain CPU tensors, valid inputs, no other backend forced, and nothing that follows or changes
what operators do (torch.compile, modes, functorch's transforms, the tracer of torch.jit,
forward-mode differentiation). Everything else, every error included, is the operator's. Both run
the same kernel, so that the results are the same bits.

Memory is shared through DLPack's exchange interface, which torch publishes from 2.10 on; where
there is none, or one of another layout, the operators serve every call.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from airl_fast import _C
from airl_fast.ops.dispatch import forced_backend

_NAMES = (  # of torch._C: what says that something follows or changes the operators
    "_len_torch_function_stack",
    "_len_torch_dispatch_stack",
    "_are_functorch_transforms_active",
    "_is_tracing",
)


def prepare() -> bool:
    """Hand torch's interface to the eager functions of ``_C``; whether they serve from now on."""
    modes, dispatch_modes, transforms, tracing = (getattr(torch._C, n, None) for n in _NAMES)
    if not (modes and dispatch_modes and transforms and tracing):
        return False
    if not hasattr(forward_ad, "_current_level"):
        return False
    return _C.eager_prepare(
        getattr(torch.Tensor, "__dlpack_c_exchange_api__", None),
        torch.Tensor,
        forced_backend,
        forward_ad,
        torch.is_grad_enabled,
        modes,
        dispatch_modes,
        transforms,
        tracing,
        torch.get_num_threads,
    )


SERVES = prepare()


def recorded(
    eager: Callable[..., Any],
    operator: Callable[..., Tensor],
    keep: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., Tensor]:
    """Give an eager function the gradient of its operator: the same ``keep`` and ``backward``.

    For where the eager function said False: nothing then stands in the way of an autograd function,
    which costs a quarter of a custom operator. Its apply is called past ``Function.apply``, whose
    only business is with functorch's transforms: 3 of 8 us.
    """

    def forward(ctx: Any, *inputs: Any) -> Tensor:
        out = eager(*inputs)
        if not isinstance(out, Tensor):
            out = operator(*inputs)
        keep(ctx, inputs, out)
        return out

    steps = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(eager.__name__, (Function,), steps)
    apply: Callable[..., Tensor] = super(Function, function).apply  # type: ignore[misc]
    return apply
