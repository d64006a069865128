"""The error of an operator that met a value which is not finite, told apart from a wrong call."""


class NonFiniteValueError(ValueError):
    """An input or a result of an operator is NaN or infinite; the message names it."""
