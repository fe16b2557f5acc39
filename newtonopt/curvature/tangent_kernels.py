"""The neural tangent kernel: inner products of the gradients of a network's outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from newtonopt.closure.evaluation import Evaluation
from newtonopt.operators.matrices import jacobian
from newtonopt.operators.rows import jacobian_rows
from newtonopt.vectors.memory import check_room


@torch.inference_mode(False)
@torch.no_grad()
def neural_tangent_kernel(evaluation: Evaluation) -> Tensor:
    """Return the empirical neural tangent kernel `J J'`, `(m, m)`, with `J` the outputs' Jacobian (Jacot et al. 2018).

    The rows and columns are the entries of the recorded outputs, each flattened, in the order in which the closure
    produced them, as the rows of `jacobian(evaluation)`. Frozen parameters do not count.

    Args:
        evaluation: Return value of `evaluate(closure, params)`, with cached products.

    Returns:
        The kernel, in the dtype and on the device of the gradient.

    Raises:
        TypeError: `evaluation` is no `Evaluation`.
        RuntimeError: Samples are coupled, no output was recorded, or the evaluation was freed.
        MemoryError: The kernel or the Jacobian would not fit.

    Example:
        >>> import torch
        >>> from newtonopt import evaluate
        >>> from newtonopt.curvature import neural_tangent_kernel
        >>> theta = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
        >>> inputs, target = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64), torch.zeros(2).double()
        >>> def closure():
        ...     return torch.nn.functional.mse_loss(inputs @ theta, target)
        >>> neural_tangent_kernel(evaluate(closure, [theta]))
        tensor([[1., 1.],
                [1., 2.]], dtype=torch.float64)

    See Also:
        - `jacobian()`: the factor `J`.
        - `gauss_newton_spectrum()`: the eigenvalues of `J'J` with the loss's Hessian in between.
        - `docs/measurements.md`: errors and costs beside those of other measurements.
    """
    m, like = jacobian(evaluation).shape[0], evaluation.gradient  # checks the evaluation
    remedy = "Use products with jacobian(evaluation), which need only vectors."
    check_room(m * m, like.dtype, like.device, f"A {m} x {m} kernel", remedy)
    return jacobian_rows(evaluation).gram()
