"""Roots of a loss's Hessian by its outputs, against the dense Hessian of the loss."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from newtonopt import evaluate, mark_outputs
from newtonopt.operators.roots import Head, Root, root_of

D = torch.float64
Loss = Callable[[Tensor], Tensor]


def numbers(*shape: int, shift: float = 0.0) -> Tensor:
    """Return numbers without a pattern, between -1 and 1, the same in each run."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(1, count + 1, dtype=D) ** 2 + shift).view(shape)


LABELS = torch.tensor([0, 2, 1, 3, 3, 0, 1])
Y = numbers(7, 4)

# Losses of outputs `(7, 4)` that couple no two samples.
LOSSES: dict[str, Loss] = {
    "mse": lambda z: F.mse_loss(z, Y),
    "weighted squares": lambda z: (Y.abs() * (z - Y) ** 2).sum(),
    "norm": lambda z: (z - Y).norm() ** 2,
    "cross entropy": lambda z: F.cross_entropy(z, LABELS),
    "cross entropy with class weights": lambda z: F.cross_entropy(z, LABELS, Y[0].abs()),
    "cross entropy that ignores a class": lambda z: F.cross_entropy(z, LABELS, ignore_index=3),
    "smoothed cross entropy": lambda z: F.cross_entropy(z, LABELS, label_smoothing=0.1),
    "cross entropy of soft targets": lambda z: F.cross_entropy(z, Y.softmax(1)),
    "binary cross entropy": lambda z: F.binary_cross_entropy_with_logits(z, (Y > 0).double()),
    "huber": lambda z: F.huber_loss(z, 3 * Y, delta=0.5),
    "flat": lambda z: F.huber_loss(z, 100 + Y, delta=0.5),
    "poisson": lambda z: F.poisson_nll_loss(z, Y.abs()),
    "marked": lambda z: mark_outputs(z).logsumexp(1).square().sum(),
}


def head_of(loss: Loss, *shape: int, scale: float = 1.0) -> tuple[Head, Tensor]:
    """Return a loss's head and its Hessian by all outputs."""
    w = (scale * numbers(*shape, shift=1.0)).requires_grad_()
    evaluation = evaluate(lambda: loss(w * 1.0), [w])
    with torch.no_grad():
        head = Head.of(evaluation)
    size = w.numel()
    return head, torch.autograd.functional.hessian(lambda z: loss(z), w.detach()).view(size, size)


def whole(root: Root, size: int) -> Tensor:
    """Return `S`, `(size, rows)`."""
    S = torch.zeros(size, math.prod(root.shape), dtype=D)
    for sample, (entries, block) in enumerate(zip(root.index, root.blocks, strict=True)):
        for r in range(block.shape[1]):
            S[entries, r * root.shape[1] + sample] = block[:, r]
    return S


@pytest.mark.parametrize("name", LOSSES)
@torch.no_grad()
def test_roots_are_those_of_the_hessian(name: str) -> None:
    with torch.enable_grad():
        head, H = head_of(LOSSES[name], 7, 4)
    (members,) = head.groups()
    index = torch.arange(28).view(7, 4)
    blocks = head.blocks(members, index)
    assert blocks is not None
    found = root_of(blocks, is_convex=False)
    assert found is not None
    root = Root((members[0].number,), index, found)
    S = whole(root, 28)
    assert float((S @ S.T - H).norm()) <= 1e-12 * float(H.norm()) + 1e-300
    tangent, u = numbers(7, 4, shift=2.0), numbers(math.prod(root.shape), shift=3.0)
    number = members[0].number
    torch.testing.assert_close(root.weigh({number: tangent}), S.T @ tangent.reshape(-1))
    torch.testing.assert_close(root.spread(u, {number: tangent})[number].reshape(-1), S @ u)
    # The residuals are the least-squares solution of S r = slope.
    slope = head.slopes[number].reshape(-1)
    true = torch.linalg.lstsq(S, slope[:, None], driver="gelsd").solution[:, 0]
    torch.testing.assert_close(S @ root.residuals(head.slopes).reshape(-1), S @ true, rtol=1e-8, atol=1e-10)


def test_every_entry_is_a_sample_under_a_sum_of_squares() -> None:
    head, H = head_of(LOSSES["weighted squares"], 7, 4)
    with torch.no_grad():
        (members,) = head.groups()
        blocks = head.blocks(members, torch.arange(28)[:, None])
    assert blocks is not None
    torch.testing.assert_close(blocks[:, 0, 0], H.diagonal())


@pytest.mark.parametrize("scale", [10.0, 100.0, 1000.0])
@pytest.mark.parametrize("name", ["cross entropy", "smoothed cross entropy", "binary cross entropy", "marked"])
def test_confident_predictions_have_roots(name: str, scale: float) -> None:
    """Second derivatives are then differences of numbers that are far larger, and rounded like these."""
    head, H = head_of(LOSSES[name], 7, 4, scale=scale)
    with torch.no_grad():
        (members,) = head.groups()
        blocks = head.blocks(members, torch.arange(28).view(7, 4))
    assert blocks is not None
    S = root_of(blocks, is_convex=True)
    assert S is not None
    true = torch.stack([H[i : i + 4, i : i + 4] for i in range(0, 28, 4)])
    assert float((S @ S.mT - true).norm()) <= 1e-12 * float(true.norm()) + 1e-15


@pytest.mark.parametrize("weight", [1.0, 1e-3, 1e-6, 1e-9])
def test_entries_beside_the_blocks_are_seen_however_small(weight: float) -> None:
    for couple in (
        lambda z: z.mean() ** 2,
        lambda z: (z[0] * z[5]).sum() ** 2,
        lambda z: (z[2] * z[6]).sum() ** 2,
        lambda z: z[3:].sum() ** 2,
    ):

        def loss(z: Tensor, couple: Loss = couple) -> Tensor:
            marked = mark_outputs(z)
            return (marked**2).mean() + weight * couple(marked)

        head, _ = head_of(loss, 7, 4)
        with torch.no_grad():
            assert head.blocks(head.groups()[0], torch.arange(28).view(7, 4)) is None
            assert head.blocks(head.groups()[0], torch.arange(28)[None]) is not None


def test_outputs_are_grouped_by_what_the_loss_couples() -> None:
    a, b, c = (numbers(3, shift=float(i)).requires_grad_() for i in range(3))

    def loss() -> Tensor:
        x, y, z = (mark_outputs(p * 1.0) for p in (a, b, c))
        return (x * z).sum().exp() + x.square().sum() + y.exp().sum() + z.square().sum()

    head = Head.of(evaluate(loss, [a, b, c]))
    with torch.no_grad():
        groups = head.groups()
    numbered = [[z.number for z in group] for group in groups]
    first, second, third = (z.number for z in head.outputs)
    assert numbered == [[first, third], [second]]


def test_a_root_has_no_columns_that_are_zero_for_all_samples() -> None:
    blocks = torch.diag_embed(torch.tensor([[0.0, 4.0, 0.0], [0.0, 0.0, 9.0]], dtype=D))
    found = root_of(blocks, is_convex=False)
    assert found is not None and found.shape == (2, 3, 1)
    torch.testing.assert_close(found @ found.mT, blocks)
    flat = root_of(torch.zeros(2, 3, 3, dtype=D), is_convex=False)
    assert flat is not None and flat.shape == (2, 3, 1) and not bool(flat.any())


def test_rounding_is_no_negative_curvature() -> None:
    """A singular block of a cross entropy may have an eigenvalue that is negative by rounding."""
    p = numbers(5, 6).softmax(1)
    blocks = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    unit = torch.eye(6, dtype=D)
    found = root_of(blocks - 2e-16 * unit, is_convex=False)
    assert found is not None and found.shape == (5, 6, 5)
    assert root_of(blocks - 1e-6 * unit, is_convex=False) is None
    assert root_of(torch.tensor([[[1.0]], [[-1.0]]], dtype=D), is_convex=False) is None
    # Of a loss that is known to be convex, negative eigenvalues are rounding, whatever their size.
    clipped = root_of(blocks - 1e-6 * unit, is_convex=True)
    assert clipped is not None
    assert float((clipped @ clipped.mT - blocks).norm()) <= 1e-5


def test_chosen_samples_are_weighted_up() -> None:
    root = Root((0,), torch.arange(8).view(4, 2), numbers(4, 2, 2))
    chosen = root.only(torch.tensor([2, 0]), 3.0)
    assert torch.equal(chosen.index, torch.tensor([[4, 5], [0, 1]]))
    torch.testing.assert_close(chosen.blocks, 3.0 * root.blocks[[2, 0]])
