"""Gradients that were made in a forward sweep, times the gradient of the loss."""

import torch
from torch import Tensor

from airl_fast.ops import _triton


def scaled(gradient: Tensor, d_loss: Tensor) -> Tensor:
    """``d_loss * gradient``, without a second ``[V, D]`` where d_loss is 1, as it mostly is.

    A CPU looks at d_loss, which it does not have to wait for; on a GPU a kernel does, which works
    in place: not where the graph is kept for another backward, and never while tracing.

    Args:
        gradient: contiguous, of the sweep's own; may be overwritten.
        d_loss: ``[]`` float32 or float64.
    """
    if type(d_loss) is not Tensor:
        return d_loss * gradient
    if _triton.serves_in_place(gradient) and not keeps_graph():
        _triton.scale(gradient, d_loss)
        return gradient
    if d_loss.device.type == "cpu" and float(d_loss) == 1.0:
        return gradient
    return d_loss * gradient


def keeps_graph() -> bool:
    """Whether the backward that is running may be followed by another over the same graph."""
    return torch._C._autograd._get_current_graph_task_keep_graph()
