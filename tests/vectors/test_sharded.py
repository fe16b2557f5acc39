"""Two processes with a shard of the parameters each equal one process with plain parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run
from sharded_problems import bits, closure_of, network, sharded_network, whole
from torch import Tensor

from newtonopt import CubicNewton, HessianFree, NewtonCG, TrustRegionNewton, evaluate, gauss_newton, hessian
from newtonopt.curvature import (
    critical_point,
    diagonal,
    effective_dimension,
    extreme_eigenvalues,
    frobenius_norm,
    gradient_curvature,
    loss_slice,
    sharpness,
    spectral_density,
    trace,
)
from newtonopt.vectors.random import unit_vectors
from newtonopt.vectors.sharded import _DRAWN, Layout, Sharded

SIZE = 45


def layout_of(rank: int) -> Layout:
    spans = [((0, 7), (20, 23)), ((7, 20), (23, SIZE))][rank]
    return Layout(SIZE, spans, dist.group.WORLD)


def part(whole: Tensor, rank: int, axis: int = -1) -> Sharded:
    layout = layout_of(rank)
    pieces = [whole.narrow(axis, start, stop - start) for start, stop in layout.spans]
    return Sharded(torch.cat(pieces, axis), layout, axis)


OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "dot": lambda v, w, rows, columns: v @ w,
    "dot_method": lambda v, w, rows, columns: v.dot(w),
    "norm": lambda v, w, rows, columns: v.norm(),
    "norm_of_rows": lambda v, w, rows, columns: rows.norm(),
    "sum": lambda v, w, rows, columns: (v * w).sum(dtype=torch.float64),
    "extremes": lambda v, w, rows, columns: torch.stack([v.max(), v.min(), v.abs().amax()]),
    "finite": lambda v, w, rows, columns: torch.isfinite(v / v).all() & (v > 9).any(),
    "equal": lambda v, w, rows, columns: torch.tensor([torch.equal(v, v.clone()), torch.equal(v, w)]),
    "rows_times_vector": lambda v, w, rows, columns: rows @ v,
    "gram": lambda v, w, rows, columns: rows @ rows.T + columns.T @ columns,
    "combination": lambda v, w, rows, columns: columns @ (columns.T @ v),
    "elementwise": lambda v, w, rows, columns: (2 * v - w / 3).clamp(min=0).pow(0.75).lerp(w, 0.1),
    "in_place": lambda v, w, rows, columns: v.clone().mul_(2).add_(w).neg_(),
    "broadcast": lambda v, w, rows, columns: torch.arange(3.0, dtype=v.dtype)[:, None] * v + rows,
    "mixed_product": lambda v, w, rows, columns: (rows @ columns) @ rows,
    "addmv": lambda v, w, rows, columns: v.clone().addmv_(rows.T, rows @ w, alpha=-1.0),
    "addmm": lambda v, w, rows, columns: v.new_zeros(3, SIZE).addmm_(rows @ columns, rows),
    "shapes": lambda v, w, rows, columns: torch.cat([torch.stack([v, w]), rows[1:], columns.T[:1], rows[[2, 0]]])[3],
    "everything": lambda v, w, rows, columns: torch.ops.aten.slice.Tensor(columns, 0, 0, 2**63 - 1),
    "columns": lambda v, w, rows, columns: torch.stack([2 * c for c in columns.unbind(1)], dim=1)[:, [1, 0, 2]],
    "row_by_row": lambda v, w, rows, columns: row_by_row(rows, v),
    "triangular": lambda v, w, rows, columns: torch.linalg.solve_triangular((rows @ rows.T).tril(), rows, upper=False),
    "projector": lambda v, w, rows, columns: (lambda q: q @ (q.T @ v))(torch.linalg.qr(columns)[0]),
    "orthonormal": lambda v, w, rows, columns: (lambda q: q.T @ q)(torch.linalg.qr(columns)[0]),
    "factor": lambda v, w, rows, columns: (lambda q, r: q @ r)(*torch.linalg.qr(columns)),
    "singular_values": lambda v, w, rows, columns: torch.linalg.svd(columns, full_matrices=False)[1],
    "singular_vectors": lambda v, w, rows, columns: (lambda u, s, t: u @ (s[:, None] * t))(
        *torch.linalg.svd(columns, full_matrices=False)
    ),
}


def row_by_row(rows: Tensor, v: Tensor) -> Tensor:
    chunk = v.new_empty(3, SIZE)
    for i in range(3):
        chunk[i] = rows[i] + v
    return chunk


REFUSED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "an entry": lambda v, rows: v[3],
    "a range": lambda v, rows: v[2:5],
    "order": lambda v, rows: v.argsort(),
    "cumulative sum": lambda v, rows: v.cumsum(0),
    "along the shards": lambda v, rows: rows.sum(1),
    "a plain vector": lambda v, rows: v + torch.ones(SIZE, dtype=v.dtype),
    "a product with a plain vector": lambda v, rows: rows @ torch.ones(SIZE, dtype=v.dtype),
    "an outer product": lambda v, rows: v[:, None] @ v[None],
    "rows with columns": lambda v, rows: rows + v[:, None],
    "concatenation": lambda v, rows: torch.cat([v, v]),
    "random entries": lambda v, rows: torch.bernoulli(v.clamp(0, 1)),
    "another layout": lambda v, rows: v + Sharded(v.local, Layout(SIZE, ((0, v.local.numel()),), v.placement.group)),
}


def compute(rank: int) -> dict[str, Any]:
    torch.manual_seed(2)
    v, w, rows, columns = (
        torch.randn(*shape, dtype=torch.float64) for shape in ((SIZE,), (SIZE,), (3, SIZE), (SIZE, 3))
    )
    operands = part(v, rank), part(w, rank), part(rows, rank), part(columns, rank, -2)
    found: dict[str, Any] = {}
    for name, operation in OPERATIONS.items():
        result = operation(*operands)
        whole = result.full_tensor() if isinstance(result, Sharded) else result
        found[name] = whole, operation(v, w, rows, columns), isinstance(result, Sharded)
    for name, refused in REFUSED.items():
        with pytest.raises(NotImplementedError, match="sharded over processes"):
            refused(operands[0], operands[2])
            pytest.fail(name)
    return found


def test_operations_equal_those_on_the_whole() -> None:
    for found in run(compute):
        for name, (result, expected, _) in found.items():
            torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def noise(rank: int, size: int) -> tuple[Tensor, Tensor]:
    cut = size // 3
    layout = Layout(size, [((0, cut),), ((cut, size),)][rank], dist.group.WORLD)
    like = Sharded(torch.zeros(sum(stop - start for start, stop in layout.spans)), layout)
    generator = torch.Generator().manual_seed(3)
    vector = like.new_empty(size, dtype=torch.float64).normal_(generator=generator)
    columns = torch.empty_like(
        like.unsqueeze(1).expand(-1, 3), dtype=torch.float64, memory_format=torch.contiguous_format
    ).normal_(generator=generator)
    return vector.full_tensor(), columns.full_tensor()


@pytest.mark.parametrize("size", [7, _DRAWN, 2 * _DRAWN + 5, 2 * _DRAWN + 21])
def test_random_vectors_are_those_of_one_process(size: int) -> None:
    generator = torch.Generator().manual_seed(3)
    expected = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((size,), (size, 3))]
    for vector, columns in run(noise, size):
        assert torch.equal(vector, expected[0])
        assert torch.equal(columns, expected[1])


def vectors(rank: int) -> dict[str, Any]:
    """Loss, gradient, products, eigenvalues and sharpness at the start, as whole tensors."""
    sharded = dist.is_initialized()
    model = sharded_network() if sharded else network()
    closure = closure_of(model, rank, dist.get_world_size() if sharded else 1)
    before = bits(model)
    evaluation = evaluate(closure, model.parameters(), "auto" if sharded else "finite_difference")
    found: dict[str, Any] = {"loss": evaluation.loss, "gradient": evaluation.gradient}
    v = evaluation.gradient / evaluation.gradient.norm()
    for build in (hessian, gauss_newton):
        A = build(evaluation)
        spectrum = extreme_eigenvalues(A, top=2, bottom=1, tolerance=1e-2)
        found[build.__name__] = A @ v
        found[f"largest of {build.__name__}"] = torch.tensor([e.value for e in spectrum.top])
        found[f"vectors of {build.__name__}"] = torch.stack([e.vector for e in spectrum.top]).abs()
        found[f"products with {build.__name__}"] = torch.tensor(spectrum.products)
    for kind in ("ball", "adaptive_ball", "average"):
        found[kind] = torch.tensor(sharpness(closure, model.parameters(), kind, max_gradients=30, samples=6).value)
    found["unchanged"] = torch.tensor(bits(model) == before and all(p.grad is None for p in model.parameters()))
    return {name: x.full_tensor() if isinstance(x, Sharded) else x for name, x in found.items()}


def test_measurements_equal_those_of_one_process() -> None:
    expected = vectors(0)
    for found in run(vectors):
        for name, value in found.items():
            rtol = 1e-12 if name in ("loss", "gradient") else 1e-6
            torch.testing.assert_close(value, expected[name], rtol=rtol, atol=rtol, msg=lambda m, n=name: f"{n}: {m}")


def statistics(rank: int) -> dict[str, Any]:
    """Measurements of the whole spectrum, of a critical point and along directions, as whole tensors."""
    sharded = dist.is_initialized()
    model = sharded_network() if sharded else network()
    closure = closure_of(model, rank, dist.get_world_size() if sharded else 1)
    evaluation = evaluate(closure, model.parameters(), "auto" if sharded else "finite_difference")
    H, G, g = hessian(evaluation), gauss_newton(evaluation), evaluation.gradient
    sketched, point = trace(H, max_products=16), critical_point(evaluation, max_products=8)
    estimated, density = diagonal(G, max_products=3), spectral_density(H, steps=4, starts=2)
    along = gradient_curvature(evaluation, extreme_eigenvalues(H, top=1, bottom=0, max_products=6))
    found: dict[str, Any] = {
        "trace": torch.tensor([sketched.value, sketched.standard_error]),
        "norm": torch.tensor(frobenius_norm(G, max_products=14).value),
        "dimension": torch.tensor(effective_dimension(G, 0.1, max_products=12).value),
        "diagonal": estimated.values,
        "errors": estimated.standard_errors,
        "unit vectors": torch.stack(list(unit_vectors(G.like))),
        "density": torch.cat([density.nodes, density.weights]),
        "ends": torch.tensor([point.smallest.value, point.largest.value]),
        "along": torch.tensor([along.curvature, along.residual, *along.alignments]),
        "slice": loss_slice(closure, model.parameters(), g, points=3).losses,
    }
    return {name: x.full_tensor() if isinstance(x, Sharded) else x for name, x in found.items()}


@pytest.mark.slow
def test_statistics_equal_those_of_one_process() -> None:
    expected = statistics(0)
    for found in run(statistics):
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def steps(rank: int, settings: dict[str, Any], kind: Any = HessianFree, count: int = 4) -> tuple[list[Any], Tensor]:
    sharded = dist.is_initialized()
    model = sharded_network() if sharded else network()
    settings = {"products": "auto" if sharded else "finite_difference", **settings}
    # Iterations beyond what finite differences can tell would amplify their rounding.
    optimizer = kind(model.parameters(), max_iterations=5, **settings)
    closure = closure_of(model, rank, dist.get_world_size() if sharded else 1)
    reports = []
    for _ in range(count):
        optimizer.step(closure)
        reports.append(optimizer.last_step)
    return reports, whole(model)


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
@pytest.mark.parametrize(
    "preconditioner",
    [*(pytest.param(p, marks=pytest.mark.slow) for p in (None, "empirical_fisher", "hutchinson")), "nystrom"],
)
def test_steps_equal_those_of_one_process(curvature: str, preconditioner: str | None) -> None:
    settings = {"curvature": curvature, "preconditioner": preconditioner, "rank": 6, "weight_decay": 1e-3}
    expected, end = steps(0, settings)
    for reports, params in run(steps, settings):
        assert [r.form for r in reports] == ["finite_difference"] * 4
        assert [r.iterations for r in reports] == [r.iterations for r in expected]
        assert [r.loss for r in reports] == pytest.approx([r.loss for r in expected], rel=1e-6)
        torch.testing.assert_close(params, end, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (NewtonCG, {}),
        (NewtonCG, {"line_search": "strong_wolfe", "curvature": "gauss_newton"}),
        (TrustRegionNewton, {"max_trials": 3}),
        (TrustRegionNewton, {"subproblem": "lanczos"}),
        (CubicNewton, {"max_trials": 3}),
    ],
    ids=["newton_cg", "strong_wolfe", "trust_region", "lanczos", "cubic"],
)
def test_steps_of_other_members_equal_those_of_one_process(kind: Any, settings: dict[str, Any]) -> None:
    expected, end = steps(0, settings, kind)
    assert any(report.accepted for report in expected)
    for reports, params in run(steps, settings, kind):
        for field in ("form", "iterations", "products", "trials", "accepted", "reason"):
            assert [getattr(r, field) for r in reports] == [getattr(r, field) for r in expected]
        assert [r.loss for r in reports] == pytest.approx([r.loss for r in expected], rel=1e-6)
        torch.testing.assert_close(params, end, rtol=1e-5, atol=1e-5)
