"""What an operator refuses before it knows more of an argument than its Python type."""

from numbers import Real

from torch import Tensor


def require_tensors(op: str, **given: object) -> None:
    """Refuse what is neither a tensor nor None.

    Raises:
        TypeError: naming the argument.
    """
    for name, value in given.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(
                f"{op}: expected {name} to be a tensor, received {type(value).__name__}; "
                f"pass a torch.Tensor, such as torch.as_tensor({name})"
            )


def require_number(name: str, value: object) -> None:
    """Refuse an option that is no number.

    Raises:
        TypeError: naming the option.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"{name}: expected a number, received {type(value).__name__}; pass a Python float"
        )
