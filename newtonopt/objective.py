"""The user's closure as a function of the parameters, and what is known of it at one point."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from newtonopt._flat import flatten, trained_parameters, unflatten
from newtonopt._tap import Tap, mark_outputs, reaches, tapped
from newtonopt.isolation import Isolation

__all__ = ["Evaluation", "Objective", "evaluate", "mark_outputs"]

Closure = Callable[[], Any]
Products = Literal["auto", "cached"]


class Evaluation:
    """What is known of an objective at the current parameters: loss, gradient, and the live graph.

    The graph takes the memory of one forward pass, and of the double backward once products are formed; `free()`
    releases it.

    Args:
        loss: The objective, a scalar with its graph.
        params: The parameters to differentiate by.
        outputs: The model outputs from which the loss is computed, for Gauss-Newton products.
        decay: Coefficients, one number or `(n,)`, of a term `sum(decay * theta^2) / 2` to add to the objective.

    Attributes:
        loss: The objective's value, a detached scalar.
        gradient: Its gradient, `(n,)`, in the order of `params`.
        params: The parameters.
        returned: What the closure returned, detached when it is a tensor.
        clipped: Whether the closure shrank `.grad` after its backward.
        marked: Whether outputs were named by `mark_outputs`.
    """

    def __init__(
        self, loss: Tensor, params: Iterable[Tensor], outputs: Sequence[Tensor] = (), decay: float | Tensor = 0.0
    ) -> None:
        self.params = tuple(params)
        self.decay = decay
        self.returned: Any = None
        self.clipped = False
        self.marked = False
        self.unrecognised_advice = ""
        self._graph: tuple[Tensor, tuple[Tensor, ...]] | None = (loss, tuple(outputs))
        gradients = torch.autograd.grad(loss, self.params, retain_graph=True, allow_unused=True)
        _refuse_sparse(gradients)
        if all(g is None for g in gradients):
            raise RuntimeError(
                "The loss does not depend on any of the parameters given: they may be another model's, or those of a "
                "copy made after the optimizer. Give the parameters that the closure's forward pass uses."
            )
        self.data_gradient = flatten(gradients, self.params)
        point = flatten(self.params, self.params).detach()
        self.gradient = self.data_gradient + decay * point
        self.loss = loss.detach() + _decay_term(decay, point)

    @property
    def graph(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The live loss and outputs.

        Raises:
            RuntimeError: The graph was freed.
        """
        if self._graph is None:
            raise RuntimeError("This evaluation was freed and gives no more products: evaluate the closure again.")
        return self._graph

    def free(self) -> None:
        """Release the graph; loss and gradient stay."""
        self._graph = None

    def part_outside_outputs(self) -> bool:
        """Whether the loss depends on the parameters other than through the outputs, as an explicit penalty does."""
        loss, outputs = self.graph
        leaves = {id(p) for p in self.params}
        barrier = {z.grad_fn for z in outputs if z.grad_fn is not None}
        # `variable` is what an AccumulateGrad node, the end of a path, accumulates into.
        return reaches(loss.grad_fn, lambda node: id(getattr(node, "variable", None)) in leaves, barrier)


class Objective:
    """The closure as a function of a step from the current parameters. Lives for one optimizer step.

    Whatever is evaluated elsewhere, the parameters are put back bit for bit; only `move` sets new ones.

    Args:
        closure: Takes no argument; computes the loss and calls `backward` on it (several times for a sum of losses), or
            returns a live loss.
        params: The parameters.
        decay: Weight decay, one number or one for each parameter entry `(n,)`: adds `sum(decay * theta^2) / 2`.
    """

    def __init__(self, closure: Closure, params: Iterable[Tensor], decay: float | Tensor = 0.0) -> None:
        self._closure = closure
        self.params = tuple(params)
        self._decay = decay
        self._isolation = Isolation(closure, self.params)
        with torch.no_grad():
            self.point = flatten(self.params, self.params).clone()

    def record(self) -> Evaluation:
        """Run the closure for real, once: its `backward` runs, its traces stay.

        Raises:
            RuntimeError: The closure gives no loss, or `.grad` holds more than this closure's gradient.
        """
        with self._isolation.recorded(), tapped(self.params, backward=True) as tap:
            returned = self._closure()
            called_backward = bool(tap.terms)
            evaluation = self._evaluation(tap, returned)
        if called_backward:
            evaluation.clipped = _is_clipped(self.params, evaluation.data_gradient)
        return evaluation

    def evaluate(self) -> Evaluation:
        """The same without a trace: `backward` is left out, and all but the parameters is put back."""
        with self._isolation.isolated(), tapped(self.params, backward=False) as tap:
            return self._evaluation(tap, self._closure())

    def loss_at(self, step: Tensor) -> float:
        """The objective at `point + step`, `(n,)`: one forward pass, without a trace."""
        with self._moved(step), self._isolation.isolated(), tapped(self.params, backward=False) as tap:
            loss = _sum_of_terms(tap, self._closure()).detach()
        return _value(loss, self._decay, self.point + step)

    def gradient_at(self, step: Tensor) -> tuple[float, Tensor]:
        """The objective and its gradient at `point + step`: one forward and one backward pass, without a trace."""
        with self._moved(step):
            evaluation = self.evaluate()
            evaluation.free()
        return float(evaluation.loss), evaluation.gradient

    def move(self, step: Tensor) -> None:
        """Make `point + step` the new point."""
        self.point = self.point + step
        with torch.no_grad():
            for p, piece in zip(self.params, unflatten(self.point, self.params), strict=True):
                p.copy_(piece)
        torch.clear_autocast_cache()

    @contextmanager
    def _moved(self, step: Tensor) -> Iterator[None]:
        self._place(self.point + step)
        try:
            yield
        finally:
            self._place(self.point)

    def _place(self, point: Tensor) -> None:
        for p, piece in zip(self.params, unflatten(point, self.params), strict=True):
            # Through `.data` autograd does not see the change, which is taken back: an evaluation made before stays
            # usable.
            p.data.copy_(piece)
        # Inside an autocast block of the caller's, the casts of the old values would be used again.
        torch.clear_autocast_cache()

    def _evaluation(self, tap: Tap, returned: Any) -> Evaluation:
        loss = _sum_of_terms(tap, returned)
        _refuse_reentrant_checkpoints(loss)
        try:
            evaluation = Evaluation(loss, self.params, tap.outputs(), self._decay)
        except RuntimeError as error:
            if "backward through the graph a second time" not in str(error):
                raise
            raise RuntimeError(
                "The graph of the loss was freed inside the closure, as torch.autograd.backward(loss) frees it, which "
                "is not seen here: call loss.backward() instead."
            ) from error
        evaluation.returned = returned.detach() if isinstance(returned, Tensor) else returned
        evaluation.unrecognised_advice = _advice(tap)
        evaluation.marked = tap.has_marks()
        return evaluation


def evaluate(closure: Closure, params: Iterable[Tensor], products: Products = "auto") -> Evaluation:
    """Evaluate a closure for curvature products, without a trace in parameters, `.grad`, buffers, random state or logs.

    Args:
        closure: The one that `torch.optim.LBFGS` takes, or any function of no argument that returns a live scalar loss.
        params: The parameters, such as `model.parameters()`; those that do not require a gradient are left out.
        products: How products are formed: "cached" keeps the graph of the evaluation; "auto" (default) chooses, which
            today means "cached".

    Returns:
        The `Evaluation` to give to `hessian`, `gauss_newton` or `jacobian`.

    Raises:
        TypeError: `closure` cannot be called, or `params` is not an iterable of tensors.
        ValueError: `params` is empty or mixes devices or dtypes, or `products` is unknown.
        RuntimeError: The closure neither calls `backward` nor returns a live loss, or the loss does not depend on
            `params`.
    """
    check_products(products)
    check_closure(closure)
    return Objective(closure, trained_parameters(params)).evaluate()


def check_closure(closure: object) -> None:
    """Refuse what cannot be called with a TypeError."""
    if not callable(closure):
        raise TypeError(
            f"closure is a {type(closure).__name__}: give a function of no argument that computes the loss, calls "
            "backward and returns the loss."
        )


def check_products(products: str) -> None:
    """Refuse an unknown way to form products with a ValueError."""
    if products not in ("auto", "cached"):
        raise ValueError(f'products is {products!r}: choose "auto" or "cached".')


def _sum_of_terms(tap: Tap, returned: Any) -> Tensor:
    """The objective: the sum of what `backward` was called on, or else the live loss that the closure returned."""
    terms = tap.terms
    if not terms and isinstance(returned, Tensor) and returned.requires_grad:
        terms = [returned if returned.dim() == 0 else returned.squeeze()]
    if not terms:
        raise RuntimeError(
            "The closure neither called loss.backward() nor returned a loss that requires a gradient, so there is "
            "nothing to minimise. End it with `loss.backward(); return loss` (torch.autograd.backward is not seen: "
            "call the method), and check that the loss depends on the parameters and that no torch.no_grad() "
            "surrounds the forward pass."
        )
    if terms[0].dim() != 0 and terms[0].numel() != 1:
        raise RuntimeError(f"The loss has shape {tuple(terms[0].shape)}: return a scalar, such as loss.mean().")
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total.reshape(())


def _decay_term(decay: float | Tensor, point: Tensor) -> Tensor:
    return 0.5 * (decay * point.square()).sum()


def _value(loss: Tensor, decay: float | Tensor, point: Tensor) -> float:
    return float(loss + _decay_term(decay, point))


def _advice(tap: Tap) -> str:
    seen = f"The closure called {', '.join(dict.fromkeys(tap.losses_seen))}. " if tap.losses_seen else ""
    return (
        f"No model output was recorded for the Gauss-Newton matrix. {seen}The losses recognised are cross_entropy, "
        "log_softmax followed by nll_loss or kl_div, mse_loss, huber_loss, smooth_l1_loss, binary_cross_entropy (also "
        "with logits), poisson_nll_loss and the soft margin losses of torch.nn.functional. For any other loss call "
        '`z = newtonopt.mark_outputs(z)` on the model\'s output inside the closure, or use curvature="hessian".'
    )


def _refuse_reentrant_checkpoints(loss: Tensor) -> None:
    # Its parameters hang on no path of the graph, so that their gradient would silently be missing.
    if reaches(loss.grad_fn, lambda node: node.name() == "CheckpointFunctionBackward"):
        raise RuntimeError(
            "The forward pass uses torch.utils.checkpoint with use_reentrant=True, which hides the parameters inside "
            "from differentiation. Call checkpoint(..., use_reentrant=False)."
        )


def _refuse_sparse(gradients: Sequence[Tensor | None]) -> None:
    if any(g is not None and g.layout != torch.strided for g in gradients):
        raise RuntimeError(
            "A gradient is sparse, and curvature products need dense ones: build the embedding with sparse=False."
        )


def _is_clipped(params: Sequence[Tensor], gradient: Tensor) -> bool:
    """Whether `.grad` is the recorded gradient clipped; anything but this or the gradient itself is an error."""
    with torch.no_grad():
        left = flatten([p.grad for p in params], params)
        scale = float(gradient.abs().max())
        if not math.isfinite(scale):
            return False  # reported as a non-finite gradient
        rounding = math.sqrt(torch.finfo(gradient.dtype).eps) * max(scale, float(left.abs().max()))
        if float((left - gradient).abs().max()) <= rounding:
            return False
        shrunk = (left * gradient >= -rounding * scale) & (left.abs() <= gradient.abs() + rounding)
    if bool(shrunk.all()):
        return True
    raise RuntimeError(
        "After the closure, .grad is not the gradient of its loss: something else was added, usually an earlier "
        "closure's gradient. A second-order step needs one objective, so gradients cannot be accumulated across "
        "closures: call optimizer.zero_grad() first in the closure, set accumulate_grad_batches=1 in Lightning, and "
        "to use several batches loop over them inside one closure, calling backward for each."
    )
