"""Which backend serves an operator, chosen per call, never in silence.

An operator registers one implementation per backend. Each states, for given tensors, whether it
can serve them: ``serves(*tensors)`` returns None, or the reason why it cannot. The best backend
that serves the call is picked (``cuda``, ``triton``, ``cpu``, ``reference``, in that order);
``backend(name)`` or the environment variable ``AIRL_FAST_BACKEND`` forces one, and a forced
backend that cannot serve the call raises.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from typing import Any, TypeVar, cast

import torch

BACKENDS = ("cuda", "triton", "cpu", "reference")
_ENV = "AIRL_FAST_BACKEND"
Backward = TypeVar("Backward", bound=Callable[..., Any])
forced_backend: ContextVar[str | None] = ContextVar("airl_fast_backend", default=None)


@dataclass(frozen=True)
class Implementation:
    """One backend of one operator."""

    function: Callable[..., Any]
    serves: Callable[..., str | None]  # tensors -> None, or the reason why not


_registry: dict[str, dict[str, Implementation]] = {}


def always(*tensors: torch.Tensor) -> str | None:
    """Serve any dtype on any device: what the reference backend does."""
    return None


def implements(
    op: str, backend_name: str, serves: Callable[..., str | None] = always
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the implementation of ``op`` on a backend."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        _registry.setdefault(op, {})[_checked(backend_name)] = Implementation(function, serves)
        return function

    return add


def pick(op: str, *tensors: torch.Tensor) -> Callable[..., Any]:
    """Return the implementation of ``op`` that serves these tensors; raises as ``serving``."""
    return _registry[op][serving(op, *tensors)].function


def serving(op: str, *tensors: torch.Tensor) -> str:
    """Return the name of the backend that serves these tensors.

    Raises:
        RuntimeError: the forced backend does not exist for ``op`` or cannot serve the tensors.
    """
    implementations = _registry[op]
    name = forced()
    if name is not None:
        reason = _reason(implementations, _checked(name), tensors)
        if reason is not None:
            raise RuntimeError(
                f"{op}: backend {name!r} was forced but cannot serve this call: {reason}; "
                f"unset {_ENV} or leave airl_fast.backend() to let the library choose"
            )
        return name
    for name in BACKENDS:
        if _reason(implementations, name, tensors) is None:
            return name
    raise RuntimeError(f"{op}: no backend serves this call")


def forced() -> str | None:
    """The backend that every call has to use, if one is forced."""
    return forced_backend.get() or os.environ.get(_ENV) or None


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend for every operator called inside the ``with`` block.

    Args:
        name: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: (at the call) the backend cannot serve an operator, naming why.
    """
    token = forced_backend.set(_checked(name))
    try:
        yield
    finally:
        forced_backend.reset(token)


def register_autograd(
    op: Any, backward: Callable[..., Any], *, setup_context: Callable[..., None]
) -> None:
    """As ``op.register_autograd``; what was forced in the forward is forced in its backward, too.

    Autograd goes backward over CUDA tensors in threads of its own, which see no ContextVar.
    """

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.forced_backend = forced_backend.get()
        setup_context(ctx, inputs, output)

    op.register_autograd(forced_as_before(backward), setup_context=keep)


def forced_as_before(backward: Backward) -> Backward:
    """A backward that forces ``ctx.forced_backend``, unless that is None."""

    @wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        if ctx.forced_backend is None:
            return backward(ctx, *grads)
        with backend(ctx.forced_backend):
            return backward(ctx, *grads)

    return cast(Backward, run)


@dataclass(frozen=True)
class Serving:
    """Which backend serves one operator on one device, and why each of the others does not."""

    op: str
    device: str
    backend: str
    refused: dict[str, str]  # backend -> reason; backends that could serve it too are left out

    @property
    def why_not(self) -> str:
        """The refusals in words, backends with the same reason together; empty if none."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.refused.items():
            by_reason.setdefault(reason, []).append(name)
        return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())

    def __str__(self) -> str:
        why_not = f" ({self.why_not})" if self.refused else ""
        return f"{self.op} on {self.device}: {self.backend}{why_not}"


@dataclass(frozen=True, repr=False)
class Explanation:
    """What ``explain()`` found: rows to work with, lines to read when printed."""

    rows: tuple[Serving, ...]

    def __repr__(self) -> str:
        return "\n".join(str(row) for row in self.rows)


def explain() -> Explanation:
    """Say which backend serves each operator on each device here, and why not the others."""
    for module in _OPERATOR_MODULES:
        import_module(f"airl_fast.ops.{module}")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows = []
    for op in sorted(_registry):
        for device in devices:
            probe = torch.empty(1, device=device)
            reasons = {name: _reason(_registry[op], name, (probe,)) for name in BACKENDS}
            chosen = next(name for name in BACKENDS if reasons[name] is None)
            refused = {name: reason for name, reason in reasons.items() if reason is not None}
            rows.append(Serving(op, device, chosen, refused))
    return Explanation(tuple(rows))


_OPERATOR_MODULES = (
    "_cpu_products",
    "linear_logprob",
    "linear_policy_loss",
    "vocab_parallel",
    "airl_score",
    "discriminator_loss",
    "segments",
    "returns",
    "group_advantages",
)


def _reason(
    implementations: dict[str, Implementation], name: str, tensors: tuple[torch.Tensor, ...]
) -> str | None:
    if name not in implementations:
        return "not implemented"
    return implementations[name].serves(*tensors)


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(
            f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}; "
            "airl_fast.explain() lists what serves each operator"
        )
    return name
