"""Whether the terms of a loss pull the parameters the same way."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from newtonopt.autodiff.gradients import grad_of_edge
from newtonopt.autodiff.graph import kind_of, reached
from newtonopt.checks import shown
from newtonopt.closure.evaluation import Evaluation
from newtonopt.curvature.drawing import drawing, figure_of, panels
from newtonopt.curvature.measurements.eigenvalues import ExtremeEigenvalues
from newtonopt.curvature.measurements.measurement import (
    Chart,
    Measured,
    Measurement,
    Tag,
    UnmeasurableError,
    View,
)
from newtonopt.curvature.showing import written
from newtonopt.vectors.flat import flatten
from newtonopt.vectors.scaling import dot, norm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Most terms: each takes a backward pass, and a vector of the gradient's length until all are compared.
_MOST = 8
# Cosines below the first are called a conflict, up to the second nearly orthogonal, from the third on an agreement;
# gradients whose lengths differ by the last factor unbalanced.
_CONFLICT, _WEAK, _AGREEMENT, _UNBALANCED = -0.1, 0.1, 0.5, 10.0


@dataclass(frozen=True)
class TermGradients:
    """The gradients of a loss's terms, compared.

    Attributes:
        names: Names of the terms.
        norms: Norm of each term's gradient, with the weight that the term has in the loss.
        cosines: Cosine between each two of the gradients; NaN where one of them is zero.
        conflict: Share of the gradients' lengths that cancels in their sum, from 0 (all point the same way) to 1.
        along_top: Cosine of each gradient with the top eigenvector, signed so that the sum of the gradients has a
            positive one; NaN where the gradient is zero; empty where no eigenvector was measured.
    """

    names: tuple[str, ...]
    norms: tuple[float, ...]
    cosines: tuple[tuple[float, ...], ...]
    conflict: float
    along_top: tuple[float, ...]

    def pairs(self) -> list[tuple[float, str, str]]:
        """Return the cosines that are known, each with the names of its terms."""
        numbered = itertools.combinations(range(len(self.names)), 2)
        found = [(self.cosines[i][j], self.names[i], self.names[j]) for i, j in numbered]
        return [entry for entry in found if math.isfinite(entry[0])]

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the cosines as a heat map: blue where gradients agree, red where they conflict.

        Args:
            ax: Axes of matplotlib to draw in; None (default): a new figure, which `plt.show()` shows.

        Returns:
            The figure.

        Raises:
            ImportError: matplotlib is missing.
            TypeError: `ax` is not axes.
        """
        (axes,) = panels(ax, 1)
        rows, names = [list(row) for row in self.cosines], list(self.names)
        if self.along_top:
            rows = [[*row, cosine] for row, cosine in zip(rows, self.along_top, strict=True)]
            names.append("top\neigenvector")
        image = axes.imshow(rows, vmin=-1.0, vmax=1.0, cmap="RdBu")
        figure_of(axes).colorbar(image, ax=axes, label="cosine", ticks=[-1.0, 0.0, 1.0])
        for (i, row), j in itertools.product(enumerate(rows), range(len(names))):
            if math.isfinite(row[j]):
                color = "white" if abs(row[j]) > 0.6 else "black"
                axes.text(j, i, f"{row[j]:.2f}", ha="center", va="center", color=color)
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(self.names)), list(self.names))
        axes.set_title("gradients of the loss's terms")
        return figure_of(axes)


@dataclass(frozen=True)
class Alignment(Measurement[TermGradients]):
    """Whether the gradients of a loss's terms agree, with each other and along the top eigenvector, for one backward
    pass a term: for physics-informed networks and several tasks.

    Terms are the summands of the loss, in the order in which the closure adds them, each with the weight that it has
    there; losses that it calls `backward` on one by one follow one another. A sum inside a mean, a square or
    `torch.stack(...).sum()` is one term; a parameter that is added by itself, as a learned weight is, is none.

    Args:
        names: Names of the terms, two to eight, such as ["equation", "start"], as many as each loss has summands that
            the closure calls `backward` on; the terms of several batches are added up by name. None (default): "1", "2"
            and so on, for up to eight summands.

    Example:
        >>> import torch
        >>> from newtonopt.curvature import Alignment, measure
        >>> w = torch.ones(2, dtype=torch.float64, requires_grad=True)
        >>> def closure():
        ...     return (w[0] - 2.0) ** 2 + 3.0 * (w[0] + w[1]) ** 2
        >>> found = measure(closure, [w], measurements=[Alignment(["data", "decay"])])
        >>> round(found["curvature/alignment_of/data_decay"], 3), round(found["curvature/conflict"], 3)
        (-0.707, 0.177)
        >>> print(found.in_words().splitlines()[-2][:77])
        The gradients of the terms data and decay point against each other (cosine -0

    See Also:
        - `AlongGradient`: the gradient of the whole loss along the top eigenvectors.
        - `docs/monitor.md`: how to add a measurement to a run.
    """

    names: Sequence[str] | None = None

    tags: ClassVar[tuple[Tag, ...]] = (
        Tag("alignment_of/TERM_TERM", "-1 to 1", "the cosine between the gradients of two terms of the loss"),
        Tag("alignment_min", "-1 to 1", "the smallest of these"),
        Tag("alignment", "", "a figure of all cosines"),
        Tag("conflict", "0 to 1", "the share of the terms' gradients, by their norms, that cancels in their sum"),
        Tag("gradient_norm_of/TERM", "L / θ", "the norm of a term's gradient, with the weight it has in the loss"),
        Tag(
            "top_alignment_of/TERM",
            "-1 to 1",
            "the cosine of a term's gradient with the top eigenvector, whose sign is that of the whole gradient: "
            "negative where the term pulls against the others",
        ),
    )
    charts: ClassVar[tuple[Chart, ...]] = (
        Chart("Cosines between the gradients of loss terms", ("alignment_of/.*",), more=True),
        Chart("Share of the terms' gradients that cancels", ("conflict",), more=True),
        Chart("Norms of the terms' gradients", ("gradient_norm_of/.*",), more=True),
        Chart("Cosines of the terms' gradients with the top eigenvector", ("top_alignment_of/.*",), more=True),
    )

    def __post_init__(self) -> None:
        if self.names is not None and not _are_names(self.names):
            raise ValueError(
                f"names must be a list of 2 to {_MOST} different names of letters, digits, '_', '-' and '.', or None, "
                f"got {shown(self.names)}. Write ['equation', 'start'], for example."
            )

    def measure(self, view: View) -> TermGradients | None:
        """Return the gradients, compared; None where there is no time for a backward pass a term."""
        evaluation = view.evaluation
        if evaluation.form != "cached":
            raise UnmeasurableError('The terms of the loss are found in its graph, which only products="cached" keeps.')
        calls = _places(evaluation)
        names, places = self._names([len(call) for call in calls], view), [place for call in calls for place in call]
        if view.affordable(len(places)) < len(places):
            return None
        gradients = [
            view.objective.mean(lambda part=part: _gradient(view, places[part :: len(names)]))  # type: ignore[misc]
            for part in range(len(names))
        ]
        norms = tuple(map(norm, gradients))
        total = sum(gradients[1:], gradients[0])
        cosines = tuple(tuple(_cosine(first, second) for second in gradients) for first in gradients)
        conflict = 1.0 - norm(total) / sum(norms) if sum(norms) > 0.0 else 0.0
        spectrum = view.of(ExtremeEigenvalues)
        along_top: tuple[float, ...] = ()
        if spectrum is not None and spectrum.top:
            vector = spectrum.top[0].vector
            sign = math.copysign(1.0, dot(vector, view.gradient))
            along_top = tuple(sign * _cosine(vector, g) for g in gradients)
        return TermGradients(names, norms, cosines, conflict, along_top)

    def _names(self, per_call: Sequence[int], view: View) -> tuple[str, ...]:
        """Return the terms' names.

        Args:
            per_call: Number of summands of each loss that `backward` is called on.
            view: The point.

        Raises:
            UnmeasurableError: The loss has another number of terms, on some process.
        """
        # All processes come to the same decision: on the number of terms, and on whether all losses have as many.
        own = [float(sum(per_call)), float(per_call[0]), float(len(set(per_call)))]
        found = view.objective.collect(torch.tensor(own, dtype=torch.float64, device=view.gradient.device))
        counts, firsts, kinds = ([int(number) for number in column] for column in torch.stack(list(found)).T)
        count = counts[0]
        if len(set(counts)) > 1:
            raise UnmeasurableError(f"The loss must have the same number of summands on all processes, got {counts}.")
        if count < 2:
            raise UnmeasurableError(
                "The loss must be a sum of two terms or more, got one. Add them up as a + b in the closure."
            )
        if self.names is None and count > _MOST:
            raise UnmeasurableError(
                f"The loss must have at most {_MOST} summands where names is None, got {count}. Give names, or write "
                "torch.stack([...]).sum() for summands that are one term."
            )
        # Summands of one loss are never added up: nobody could tell the summands of a sum within it from terms.
        if self.names is not None and ({*firsts} != {len(self.names)} or {*kinds} != {1}):
            raise UnmeasurableError(
                f"The loss must have {len(self.names)} summands, as many as names, got {firsts[0]}. Write "
                "torch.stack([...]).sum() for summands that are one term, and call backward once for each batch."
            )
        return tuple(self.names or map(str, range(1, count + 1)))

    def values(self, result: TermGradients) -> dict[str, float]:
        """Return cosines, the share that cancels, and norms."""
        pairs = result.pairs()
        found = {f"alignment_of/{first}_{second}": cosine for cosine, first, second in pairs}
        if pairs:
            found["alignment_min"] = min(pairs)[0]
        found["conflict"] = result.conflict
        found |= {f"gradient_norm_of/{name}": size for name, size in zip(result.names, result.norms, strict=True)}
        for name, cosine in zip(result.names, result.along_top, strict=False):
            found[f"top_alignment_of/{name}"] = cosine
        return found

    def sentences(self, result: TermGradients, measured: Measured) -> list[str]:
        """Return which two terms conflict most, and which is hardly trained."""
        pairs = result.pairs()
        found = []
        if pairs:
            smallest, first, second = min(pairs)
            between = f"terms {first} and {second}"
            if smallest < _CONFLICT:
                found.append(
                    f"The gradients of the {between} point against each other (cosine {written(smallest, 2)}): a "
                    f"gradient step that lowers one raises the other, and {result.conflict:.0%} of the terms' "
                    "gradients cancels. Change the weights of the terms, or take second-order steps."
                )
            elif smallest >= _AGREEMENT:
                found.append(f"The gradients of all terms agree: the smallest cosine is {written(smallest, 2)}.")
            elif smallest > _WEAK:
                found.append(
                    f"The gradients of the {between} agree only in part (cosine {written(smallest, 2)}): a gradient "
                    "step that lowers one lowers the other less."
                )
            else:
                found.append(
                    f"The gradients of the {between} are nearly orthogonal (cosine {written(smallest, 2)}): neither "
                    "term helps the other, and none is in the way."
                )
        sizes = sorted(zip(result.norms, result.names, strict=True))
        (small, weak), (large, strong) = sizes[0], sizes[-1]
        if small > 0.0 and large >= _UNBALANCED * small:
            found.append(
                f"The gradient of the term {strong} is {written(large / small, 2)} times as long as that of {weak}, "
                f"which a gradient step hardly trains. Where {weak} matters, raise its weight."
            )
        return found

    def figures(self, result: TermGradients) -> dict[str, Figure]:
        """Return the cosines as a heat map."""
        figure, (axes,) = drawing(1)
        result.plot(ax=axes)
        return {"alignment": figure}


# Operations on one-entry tensors that are linear: sums, and those of one operand beside constants.
_SUMS = frozenset({"Add", "Sub", "Rsub", "Neg"})
_SCALINGS = frozenset({"Mul", "Div", "Mean", "Sum", "ToCopy", "View", "Squeeze", "Unsqueeze", "Clone", "Alias"})

# Where a term enters a loss: its edge in the graph, the derivative of the loss by it, and the mask of the parameters
# that the loss counts for, None for all.
_Entry = tuple[GradientEdge, Tensor, Tensor | None]


def _places(evaluation: Evaluation) -> list[list[_Entry]]:
    """Return for each loss where its terms enter, in the order in which they are added."""
    found: list[list[_Entry]] = []
    for part in (one for one, _ in evaluation.parts) if evaluation.parts else (evaluation,):
        loss, _ = part.graph
        calls = [summands(edge) for edge in _losses(get_gradient_edge(loss), part.recording.losses)]
        edges = [edge for call in calls for edge in call]
        nodes = {edge.node for edge in edges}
        if reached([operand for node in nodes for operand, _ in node.next_functions], nodes):
            # The derivative by the one has a part that belongs to the other.
            raise UnmeasurableError(
                "One summand of the loss is computed from another one, so its gradient contains the other one's. Write "
                "them as one term, torch.stack([...]).sum()."
            )
        weights = iter(torch.autograd.grad(loss, edges, retain_graph=True))
        found += [[(edge, next(weights), part.mask) for edge in call] for call in calls]
    return found


def _losses(total: GradientEdge, count: int) -> list[GradientEdge]:
    """Return the edges of the losses whose sum `((l1 + l2) + l3) + ...` an evaluation keeps."""
    found = []
    for _ in range(count - 1):
        (left, left_number), (right, right_number) = total.node.next_functions
        assert left is not None and right is not None
        found.append(GradientEdge(right, right_number))
        total = GradientEdge(left, left_number)
    return [total, *reversed(found)]


def summands(loss: GradientEdge) -> list[GradientEdge]:
    """Return the edges of the scalars that a loss is a sum of, with constant weights, in the order of the sum.

    A leaf, such as a learned weight that is added by itself, is none of them.
    """
    found: dict[tuple[Node, int], GradientEdge] = {}
    waiting = [(loss.node, loss.output_nr)]
    while waiting:
        node, number = waiting.pop()
        live = [(operand, nr) for operand, nr in node.next_functions if operand is not None]
        kind = kind_of(node)
        # A constant divided by a term is not linear in it.
        is_scaled = kind in _SCALINGS and len(live) == 1 and node.next_functions[0][0] is not None
        if kind in _SUMS or (is_scaled and all(math.prod(of._input_metadata[nr].shape) == 1 for of, nr in live)):
            waiting += reversed(live)
        elif live:
            found[node, number] = GradientEdge(node, number)
    return list(found.values())


def _gradient(view: View, places: Sequence[_Entry]) -> Tensor:
    """Return the gradient of the terms at these places on this process, with their weights `(n,)`."""
    total = torch.zeros_like(view.gradient)
    for edge, weight, mask in places:
        own = flatten(grad_of_edge(edge, view.params, weight), view.params)
        total += own if mask is None else own * mask
    return total


def _cosine(first: Tensor, second: Tensor) -> float:
    left, right = norm(first), norm(second)
    return dot(first, second) / left / right if left > 0.0 and right > 0.0 else math.nan


def _are_names(names: object) -> bool:
    return (
        isinstance(names, (list, tuple))
        and 2 <= len(names) <= _MOST
        and all(isinstance(name, str) and re.fullmatch(r"[-\w.]+", name) for name in names)
        and len(set(names)) == len(names)
    )
