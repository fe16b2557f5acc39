"""Rows as factors against the same rows formed, and the choice between them by cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from newtonopt.operators import factors as module
from newtonopt.operators.factors import Block, Factors, Formed, Outers, assembled, gram, joined, merged

D = torch.float64


def numbers(*shape: int, shift: float = 0.0) -> Tensor:
    """Return numbers without a pattern, between -1 and 1, the same in each run."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(1, count + 1, dtype=D) ** 2 + shift).view(shape)


def both(s: int, m: int, p: int, q: int, shift: float = 0.0) -> tuple[Factors, Formed]:
    """Return factors, and the rows that they stand for, each formed as a sum of outer products."""
    left, right = numbers(s, m, p, shift=shift), numbers(s, m, q, shift=shift + 1)
    left[:, m // 3] = 0.0
    rows = torch.stack(
        [sum((torch.outer(left[a, i], right[a, i]) for a in range(s)), left.new_zeros(p, q)) for i in range(m)]
    )
    return Factors(left, right), Formed(rows.flatten(1), p)


def grammed(*parts: Factors | Formed) -> Tensor:
    m = len(parts[0].dense())
    return gram(parts, torch.full((m, m), torch.nan, dtype=D))


def close(found: Tensor, true: Tensor, tolerance: float = 1e-12) -> None:
    assert found.shape == true.shape
    assert float((found - true).norm()) <= tolerance * float(true.norm())


SIZES = [(s, m, p, q) for s in (1, 2, 6) for m, p, q in ((1, 3, 4), (5, 1, 6), (7, 6, 1), (50, 8, 5), (200, 3, 4))]


@pytest.mark.parametrize(("s", "m", "p", "q"), SIZES)
def test_factors_are_the_rows_that_they_stand_for(s: int, m: int, p: int, q: int) -> None:
    factored, formed = both(s, m, p, q)
    rows = formed.rows
    close(factored.dense(), rows)
    assert formed.dense() is rows
    K = rows @ rows.T
    v, u = numbers(p * q, shift=2.0), numbers(m, shift=3.0)
    order = numbers(m, shift=4.0).argsort()
    for part in (factored, formed):
        close(grammed(part), K)
        close(part.push(v), rows @ v)
        close(part.pull(u), rows.T @ u)
        close(part.squares(), K.diagonal())
        close(part.ordered(order).dense(), rows[order])
        height, width = part.column_squares(True)
        assert width is not None
        squares = rows.square().sum(0).view(p, q)
        close(height, squares.sum(1))
        close(width, squares.sum(0))


@pytest.mark.parametrize("m", [1, 191, 192, 193, 400])
def test_inner_products_in_blocks(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    factored, formed = both(2, m, 5, 3)
    true = formed.rows @ formed.rows.T
    close(grammed(factored), true)
    monkeypatch.setattr(module, "_BLOCK", 7)
    monkeypatch.setattr(module, "_WIDE", 10)
    for part in (factored, formed):
        found = grammed(part)
        close(found, true)
        assert torch.equal(found, found.T)


def test_inner_products_of_several_parameters_add_up() -> None:
    one, two, three = both(1, 20, 4, 5), both(2, 20, 3, 3, shift=5.0), both(1, 20, 2, 7, shift=9.0)
    true = sum((formed.rows @ formed.rows.T for _, formed in (one, two, three)), torch.zeros(20, 20, dtype=D))
    close(grammed(one[0], two[0], three[0]), true)
    close(grammed(one[1], two[0], three[1]), true)
    close(grammed(one[1], two[1], three[1]), true)


def test_columns_are_weighed() -> None:
    factored, formed = both(2, 9, 4, 5)
    left, right = numbers(4, shift=6.0).abs() + 0.1, numbers(5, shift=7.0).abs()
    W = torch.outer(left, right).reshape(-1)
    for part in (factored, formed):
        close(part.scaled(0.25).dense(), 0.5 * formed.rows)
        close(grammed(part.scaled((left, right))), (formed.rows * W) @ formed.rows.T)
    vector = Formed(formed.rows[:, :4])
    close(vector.scaled((left, None)).dense(), vector.rows * left.sqrt())
    squares, nothing = vector.column_squares(False)
    assert nothing is None
    close(squares, vector.rows.square().sum(0))


def test_parts_are_joined_one_below_the_other() -> None:
    one, two = both(1, 5, 4, 6), both(3, 7, 4, 6, shift=5.0)
    true = torch.cat([one[1].rows, two[1].rows])
    found = joined([one[0], two[0]])
    assert isinstance(found, Factors) and len(found.left) == 3
    close(found.dense(), true)
    for parts in ([one[0], two[1]], [one[1], two[0]], [one[1], two[1]]):
        mixed = joined(parts)
        assert isinstance(mixed, Formed) and mixed.height == 4
        close(mixed.dense(), true)
    assert joined([one[0]]) is one[0]


# The choice.


def outers(rows: int, times: int, p: int, q: int, shift: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return factors by rows, and the rows that they stand for."""
    left, right = numbers(rows, times, p, shift=shift), numbers(rows, times, q, shift=shift + 1)
    return left, right, torch.einsum("ntp,ntq->npq", left, right).flatten(1)


@pytest.mark.parametrize(
    ("times", "p", "q", "form"),
    [
        (1, 4, 5, Factors),  # 9 numbers instead of 20
        (1, 1, 5, Formed),
        (1, 5, 1, Formed),
        (1, 2, 2, Formed),
        (2, 8, 9, Factors),  # 4 x 17 products instead of 72
        (2, 8, 8, Formed),
        (6, 30, 30, Formed),
    ],
)
def test_the_cheaper_form_is_chosen(times: int, p: int, q: int, form: type) -> None:
    left, right, rows = outers(3, times, p, q)
    found = assembled([Outers(2, left, right)], torch.Size([p, q]), 6, left)
    assert type(found) is form
    true = torch.zeros(6, p * q, dtype=D)
    true[2:5] = rows
    close(found.dense(), true)


def test_groups_of_rows_with_different_numbers_of_uses() -> None:
    pieces: list[Outers] = []
    true = torch.zeros(9, 1200, dtype=D)
    for first, rows, times in ((0, 4, 1), (4, 2, 3), (0, 4, 1), (6, 3, 1)):
        left, right, formed = outers(rows, times, 30, 40, shift=float(first + times + len(pieces)))
        pieces.append(Outers(first, left, right))
        true[first : first + rows] += formed
    found = assembled(pieces, torch.Size([30, 40]), 9, true)
    assert isinstance(found, Factors) and found.left.shape == (3, 9, 30)
    close(found.dense(), true)


def test_outer_products_with_an_equal_factor_become_one() -> None:
    left, right, rows = outers(4, 1, 10, 12)
    other, _, _ = outers(4, 1, 12, 3, shift=5.0)
    shape, true = torch.Size([10, 12]), rows + torch.einsum("ntp,ntq->npq", left, other).flatten(1)
    pieces = [Outers(0, left, right), Outers(0, left, other)]
    close(assembled(pieces, shape, 4, left).dense(), true)
    pieces.append(Outers(0, 2 * left, right + other))
    assert len(merged(pieces)) == 1
    close(assembled(pieces, shape, 4, left).dense(), 3 * true)
    # Elsewhere it is another row.
    assert len(merged([*pieces, Outers(4, left, right)])) == 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_outer_products_with_factors_that_are_multiples_become_one(side: str) -> None:
    left, right, rows = outers(5, 2, 10, 12)
    left[3], rows[3] = 0.0, 0.0
    other = numbers(5, 2, 12 if side == "left" else 10, shift=5.0)
    # A number for each outer product, as where a residual has a coefficient that varies from sample to sample.
    c = torch.tensor([2.0, -1e-9, 0.0, 7.0, 1e9], dtype=D)[:, None, None] * numbers(5, 2, 1, shift=6.0)
    new = Outers(0, c * left, other) if side == "left" else Outers(0, other, c * right)
    both = [Outers(0, left, right), new]
    true = rows + torch.einsum("ntp,ntq->npq", new.left, new.right).flatten(1)
    [one] = merged(both)
    assert one.left.shape == left.shape
    for found, row in zip(torch.einsum("ntp,ntq->npq", one.left, one.right).flatten(1), true, strict=True):
        close(found, row)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_tiny_and_huge_multiples_are_joined_without_loss(size: float) -> None:
    """In float32 the squares of their entries are zero or infinite."""
    left, right, _ = (t.float() for t in outers(5, 2, 10, 12))
    new = Outers(0, size * left.flip(2), right)
    other = Outers(0, 2 * size * left.flip(2), numbers(5, 2, 12, shift=5.0).float())
    [one] = merged([new, other])
    true = torch.einsum("ntp,ntq->npq", new.left / size, new.right + 2 * other.right)
    torch.testing.assert_close(torch.einsum("ntp,ntq->npq", one.left / size, one.right), true, rtol=1e-5, atol=1e-6)
    assert len(merged([Outers(0, size * left, right), Outers(0, size * left.flip(2), other.right)])) == 2


def test_outer_products_are_not_made_one_where_a_single_row_differs() -> None:
    left, right, _ = outers(5, 1, 10, 12)
    other = numbers(5, 1, 12, shift=5.0)
    for change in (1e-12, 1.0):
        nearly = 3 * left
        nearly[4, 0, 0] += change * left[4].norm()
        assert len(merged([Outers(0, left, right), Outers(0, nearly, other)])) == 2
    # No multiple of zeros.
    assert len(merged([Outers(0, 0 * left, right), Outers(0, left, other)])) == 2


@pytest.mark.parametrize("block", [2, 3, 192])
def test_inner_products_of_rows_with_different_numbers_of_uses(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    found = joined([both(s, m, 4, 5, shift=float(s))[0] for s, m in ((1, 4), (3, 5), (2, 1))])
    assert isinstance(found, Factors) and found.left.shape == (3, 10, 4)
    close(grammed(found), found.dense() @ found.dense().T)


def test_formed_rows_beside_factors_are_formed() -> None:
    left, right, rows = outers(3, 1, 10, 12)
    more = numbers(2, 120, shift=4.0)
    found = assembled([Outers(1, left, right), Block(3, more)], torch.Size([10, 12]), 5, left)
    assert isinstance(found, Formed) and found.height == 10
    true = torch.zeros(5, 120, dtype=D)
    true[1:4] += rows
    true[3:] += more
    close(found.dense(), true)


def test_a_parameter_without_rows_has_rows_of_zeros() -> None:
    for shape in (torch.Size([3, 4]), torch.Size([4]), torch.Size([])):
        found = assembled([], shape, 5, numbers(1))
        assert found.dense().shape == (5, shape.numel()) and not bool(found.dense().any())


def test_rows_that_do_not_fit_are_refused_with_their_size() -> None:
    with pytest.raises(MemoryError, match=r"1000 rows of a parameter of 10000000000 entries.*HessianFree"):
        assembled([], torch.Size([100_000, 100_000]), 1000, numbers(1))


@pytest.mark.parametrize("s", [1, 2, 6])
def test_single_precision(s: int) -> None:
    factored, formed = both(s, 30, 6, 7)
    short = Factors(factored.left.float(), factored.right.float())
    found = gram([short], torch.empty(30, 30))
    assert found.dtype == torch.float32
    close(found.double(), formed.rows @ formed.rows.T, 1e-5)
