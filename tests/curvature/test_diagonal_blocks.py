"""Diagonal blocks against slices of the dense matrix."""

from __future__ import annotations

import pytest
import torch
from problems import build
from torch import Tensor

from newtonopt import LinearOperator, evaluate, gauss_newton, hessian
from newtonopt.curvature import blocks, extreme_eigenvalues


def test_parts_of_a_model_by_default() -> None:
    case = build("conv", "cross_entropy")
    H = hessian(evaluate(case.closure, case.params))
    found = blocks(H, case.model.named_parameters())
    whole = H.dense()
    sizes = {"0": 20, "4": 27}
    assert {name: block.shape[0] for name, block in found.items()} == sizes
    torch.testing.assert_close(found["0"].dense(), whole[:20, :20])
    torch.testing.assert_close(found["4"].dense(), whole[20:, 20:])
    spectrum = extreme_eigenvalues(found["4"], top=2, bottom=1)
    truth = torch.linalg.eigvalsh(whole[20:, 20:])
    assert spectrum.top[0].value == pytest.approx(float(truth[-1]), rel=1e-3)
    assert spectrum.top[0].vector.shape == (27,)


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["net.0.weight", "net.0.bias", "net.2.weight"], ["net.0", "net.2"]),
        (["net.weight", "net.bias"], ["net"]),
        (["net.0.weight", "head.weight"], ["net", "head"]),
        (["a.b.c.weight", "a.b.d.e.weight"], ["a.b.c", "a.b.d"]),
        (["a.b.c.weight", "a.scale"], ["a"]),
        (["weight", "bias"], ["weight", "bias"]),
    ],
)
def test_parts_are_the_first_level_where_there_are_several(names: list[str], parts: list[str]) -> None:
    like = torch.zeros(len(names))
    named = [(name, torch.zeros(1, requires_grad=True)) for name in names]
    assert list(blocks(LinearOperator(lambda v: v, (len(names),) * 2, like), named)) == parts


def test_patterns_may_overlap_and_need_not_be_contiguous() -> None:
    case = build("odd", "mse")
    A = gauss_newton(evaluate(case.closure, case.params))
    before = A.products
    found = blocks(A, case.model.named_parameters(), ["*u*", "scale", "[sw]*"])
    whole = A.dense()
    names = [name for name, p in case.model.named_parameters() if p.requires_grad for _ in range(p.numel())]
    for pattern, kept in (("*u*", "unused"), ("scale", "scale"), ("[sw]*", "scale weight")):
        indices = torch.tensor([i for i, name in enumerate(names) if name in kept.split()])
        torch.testing.assert_close(found[pattern].dense(), whole[indices][:, indices])
        assert found[pattern].psd
    assert list(found) == ["*u*", "scale", "[sw]*"]
    # The whole matrix is formed from rows.
    assert A.products == found["scale"].products == before + 2 + 1 + 16


def test_a_parameter_under_two_names_is_one() -> None:
    case = build("words", "cross_entropy")
    H = hessian(evaluate(case.closure, case.params))
    pairs = case.model.named_parameters(remove_duplicate=False)
    assert {name: block.shape[0] for name, block in blocks(H, pairs).items()} == {"embedding": 20, "mix": 20}


def test_errors_name_the_remedy() -> None:
    A = torch.eye(3)
    H = LinearOperator(lambda v: A @ v, (3, 3), A)
    theta: list[tuple[str, Tensor]] = [("a", torch.zeros(3, requires_grad=True))]
    with pytest.raises(TypeError, match=r"operator must be a LinearOperator, got (tensor|a Tensor)"):
        blocks(A, theta)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"named_parameters must hold pairs .*Write model.named_parameters\(\)"):
        blocks(H, [theta[0][1]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"patterns must each match one of a.*, got 'b'"):
        blocks(H, theta, ["a", "b"])
    with pytest.raises(
        ValueError, match=r"named_parameters must be the parameters passed to evaluate, with 3 entries .* got 0 "
    ):
        blocks(H, [("a", torch.zeros(3))])
