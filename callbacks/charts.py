"""How TensorBoard's custom-scalars page shows curvature."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .logs import Charts


def curvature_charts(values: Mapping[str, float], prefix: str) -> dict[str, Charts]:
    """The charts of what is measured, by category. TensorBoard shows a category's margin charts after the others."""
    names = [tag.removeprefix(f"{prefix}/") for tag in values]
    compared = "preconditioned_lambda_max" if "preconditioned_lambda_max" in names else "lambda_max"
    first = {
        "Eigenvalues": ["lambda_max", *_matching(names, r"lambda_\d+")],
        "Largest eigenvalue against the stability threshold": [compared, "stability_threshold"],
        "Sharpness": ["sharpness"],
    }
    margins = {
        "Largest eigenvalue and its interval": "lambda_max",
        "Smallest eigenvalue and its interval": "lambda_min",
        "Largest preconditioned eigenvalue and its interval": "preconditioned_lambda_max",
    }
    further = {
        "Stability ratio: above 1 steps overshoot": ["stability_ratio"],
        "Curvature along the gradient": ["gradient_curvature"],
        "Gradient's share along the top eigenvectors": ["gradient_alignment"],
        "Smallest eigenvalues": _matching(names, r"lambda_min(_\d+)?") if "lambda_min_2" in names else [],
        "Largest eigenvalue of each part": _matching(names, "lambda_max_of/.*"),
        "Trace": ["trace"],
        "Products": ["products"],
    }
    bounded = {
        title: ("Margin", [f"{prefix}/{name}{end}" for end in ("", "_lower", "_upper")])
        for title, name in margins.items()
        if f"{name}_upper" in names
    }
    title = prefix.capitalize()
    return {title: {**bounded, **_lines(names, first, prefix)}, f"{title}: more": _lines(names, further, prefix)}


def _matching(names: list[str], expression: str) -> list[str]:
    return [name for name in names if re.fullmatch(expression, name)]


def _lines(names: list[str], charts: Mapping[str, list[str]], prefix: str) -> dict[str, tuple[str, list[str]]]:
    """Multi-line charts of what is there. Their tags are regular expressions, matched from the start."""
    return {
        title: ("Multiline", [f"{re.escape(f'{prefix}/{name}')}$" for name in wanted])
        for title, wanted in charts.items()
        if wanted and set(wanted) <= set(names)
    }
