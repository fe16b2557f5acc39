"""The curvature of a model's layers, each by itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

from newtonopt.checks import shown
from newtonopt.curvature.diagonal_blocks import are_patterns, blocks
from newtonopt.curvature.eigenvalues.extreme import Spectrum
from newtonopt.curvature.measurements.eigenvalues import is_known, spectrum
from newtonopt.curvature.measurements.measurement import Chart, Measurement, Tag, View

# Characters that TensorBoard's writer allows in no tag.
_OUTSIDE_TAGS = re.compile(r"[^-/\w.]")


@dataclass(frozen=True)
class Layers(Measurement[dict[str, Spectrum]]):
    """The largest eigenvalue of each layer's diagonal block, for as many products each as the eigenvalues may have.

    Args:
        patterns: Patterns of parameters' names, such as `["encoder.*", "*.bias"]`, as for `blocks`: one block each.
            None (default): a block for each of the model's parts.

    Example:
        >>> import torch
        >>> from newtonopt.curvature import Layers, measure
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
        >>> inputs = torch.eye(2)
        >>> def closure():
        ...     return model(inputs).square().sum()
        >>> found = measure(closure, model.named_parameters(), measurements=[Layers()])
        >>> [tag for tag in found if "_of/" in tag]
        ['curvature/lambda_max_of/0', 'curvature/lambda_max_of/2']

    See Also:
        - `blocks()`: the function behind it.
        - `ExtremeEigenvalues`: the eigenvalues of the whole matrix.
        - `docs/monitor.md`: how to add a measurement to a run.
    """

    patterns: Sequence[str] | None = None

    tags: ClassVar[tuple[Tag, ...]] = (
        Tag(
            "lambda_max_of/PART",
            "L / θ²",
            "the largest eigenvalue of a diagonal block, left out by the same rule; PART has `_` for `*`",
        ),
    )
    charts: ClassVar[tuple[Chart, ...]] = (Chart("Largest eigenvalue of each part", ("lambda_max_of/.*",), more=True),)

    def __post_init__(self) -> None:
        if not (self.patterns is None or are_patterns(self.patterns)):
            raise ValueError(
                f"patterns must be a list of patterns of parameters' names, or None, got {shown(self.patterns)}. Write "
                "['encoder.*'], for example."
            )

    def check_model(self, names: Sequence[str], size: int | None) -> None:
        """Raise ValueError if a pattern fits no parameter's name."""
        for pattern in self.patterns or ():
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"patterns must each match the name of a measured parameter, got {pattern!r}. Choose from "
                    f"{', '.join(names) or 'none'}."
                )

    def measure(self, view: View) -> dict[str, Spectrum] | None:
        """Return the largest eigenvalue of each block, by the name in its tag."""
        if not view.named:
            raise ValueError(
                "params must be pairs of names and tensors to measure Layers, got tensors only. Write "
                "model.named_parameters()."
            )
        last = view.before(Layers) or {}
        found = {}
        for part, block in blocks(view.matrix, view.named, self.patterns).items():
            name = _OUTSIDE_TAGS.sub("_", part.removesuffix(".*"))
            largest = spectrum(view, block, 1, 0, last.get(name), None)
            if largest is not None:
                found[name] = largest
        return found

    def values(self, result: dict[str, Spectrum]) -> dict[str, float]:
        """Return the eigenvalues that are known to a tenth."""
        return {f"lambda_max_of/{name}": s.top[0].value for name, s in result.items() if is_known(s.top[0])}

    def spectra(self, result: dict[str, Spectrum]) -> list[Spectrum]:
        """Return all eigenvalues."""
        return list(result.values())
