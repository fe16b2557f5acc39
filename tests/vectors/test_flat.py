"""Flat vectors by hand, there and back; parameters that none can stand for are refused with the remedy."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from torch import Tensor, nn

from newtonopt import HessianFree
from newtonopt.vectors.flat import (
    add_flat,
    check_any,
    check_parameters,
    differs,
    flat_dtype,
    flatten,
    flatten_rows,
    is_rounding,
    local_pieces,
    place,
    put_back,
    trained_parameters,
    unflatten,
    unflatten_rows,
)


def parameters(*dtypes: torch.dtype) -> list[Tensor]:
    """A matrix `[[1, 2], [3, 4]]` and a vector `[5, 6]`."""
    first, second = (*dtypes, torch.float64, torch.float64)[:2]
    return [
        nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=first)),
        nn.Parameter(torch.tensor([5.0, 6.0], dtype=second)),
    ]


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.float32, torch.float32), torch.float32),
        ((torch.float32, torch.float64), torch.float64),
        ((torch.bfloat16, torch.bfloat16), torch.float32),
        ((torch.bfloat16, torch.float32), torch.float32),
    ],
)
def test_a_vector_and_back(dtypes: tuple[torch.dtype, ...], expected: torch.dtype) -> None:
    params = parameters(*dtypes)
    vector = flatten(params, params)
    assert flat_dtype(params) == vector.dtype == expected
    assert vector.tolist() == [1, 2, 3, 4, 5, 6]
    back = unflatten(vector.detach(), params)
    assert [t.dtype for t in back] == list(dtypes)
    assert all(torch.equal(t, p) for t, p in zip(back, params, strict=True))


def test_rows_of_a_transposed_matrix_follow_its_shape_not_its_memory() -> None:
    matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).t()
    assert flatten([matrix], [matrix]).tolist() == [1, 3, 2, 4]
    place(torch.tensor([5.0, 6.0, 7.0, 8.0]), [matrix])
    assert matrix.tolist() == [[5, 6], [7, 8]]


def test_unused_parameters_count_as_zeros() -> None:
    params = parameters()
    assert flatten([None, params[1]], params).tolist() == [0, 0, 0, 0, 5, 6]
    total = torch.ones(6).double()
    add_flat(total, [None, params[1].detach()], params)
    assert total.tolist() == [1, 1, 1, 1, 6, 7]
    rows = flatten_rows([torch.ones(3, 2, 2), None], params, 3)
    assert rows.tolist() == [[1, 1, 1, 1, 0, 0]] * 3
    with pytest.raises(ValueError, match="zip"):
        flatten([None], params)


def test_rows_and_back() -> None:
    params = parameters(torch.float64, torch.float32)
    rows = torch.arange(12.0).double().view(2, 6)
    pieces = unflatten_rows(rows, params)
    assert [(tuple(t.shape), t.dtype) for t in pieces] == [((2, 2, 2), torch.float64), ((2, 2), torch.float32)]
    assert pieces[1].tolist() == [[4, 5], [10, 11]]
    assert torch.equal(flatten_rows(pieces, params, 2), rows)


def test_pieces_are_views() -> None:
    params = parameters()
    vector, columns = torch.arange(6.0).double(), torch.arange(12.0).double().view(6, 2)
    local_pieces(vector, params)[1].fill_(9.0)
    unflatten(vector, params)[0].fill_(8.0)
    assert vector.tolist() == [8, 8, 8, 8, 9, 9]
    assert [tuple(piece.shape) for piece in local_pieces(columns, params)] == [(4, 2), (2, 2)]


def test_placing_leaves_graphs_valid() -> None:
    params = parameters()
    loss = sum(p.square().sum() for p in params)
    place(torch.arange(6.0).double(), params)
    assert flatten(params, params).tolist() == [0, 1, 2, 3, 4, 5]
    # The graph was built over [1, ..., 6] and sees the values of now.
    gradients = torch.autograd.grad(loss, params)
    assert flatten(gradients, params).tolist() == [0, 2, 4, 6, 8, 10]


def test_only_parameters_that_moved_are_put_back() -> None:
    params = parameters()
    kept = flatten(params, params).detach().clone()
    assert put_back(kept, params) is None
    params[1].data[0] = math.nan
    left = put_back(kept, params)
    assert left is not None
    assert left[:4].tolist() == [1, 2, 3, 4] and left[4].isnan()
    assert torch.equal(flatten(params, params), kept)
    kept[0] = params[0].data[0, 0] = math.nan
    assert put_back(kept, params) is None  # NaN equals NaN


def test_differences() -> None:
    a = torch.tensor([1.0, math.nan])
    assert not differs(a, a.clone())
    assert differs(a, torch.tensor([1.0, 2.0]))
    assert differs(a, torch.tensor([2.0, math.nan]))
    assert not differs(torch.zeros(2), -torch.zeros(2))


def test_rounding_is_relative_to_each_parameter() -> None:
    params = parameters()
    eps = torch.finfo(torch.float64).eps ** (2 / 3)
    vector = torch.tensor([1e6, 1, 1, 1, 1e-3, 0]).double()
    for entry, size in ((3, 1e6), (5, 1e-3)):
        near, far = vector.clone(), vector.clone()
        near[entry] += 0.9 * eps * size
        far[entry] += 1.1 * eps * size
        assert is_rounding(near, vector, params)
        assert not is_rounding(far, vector, params)
    # The dtype of a parameter decides, not the vector's.
    near = vector.clone()
    near[4] += 1e-3 * torch.finfo(torch.bfloat16).eps
    assert is_rounding(near, vector, parameters(torch.float64, torch.bfloat16))
    assert not is_rounding(near, vector, params)


def test_trained_parameters_are_those_with_a_gradient_each_once() -> None:
    p, q = parameters()
    frozen = torch.ones(3)
    found = trained_parameters(iter([p, frozen, q, p]))
    assert len(found) == 2 and found[0] is p and found[1] is q
    for given, words in (
        ([], "params must hold at least one tensor, got none. Write model.parameters()."),
        ([frozen, frozen], "got 2 that do not. Unfreeze a model with model.requires_grad_()."),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            trained_parameters(given)
    with pytest.raises(TypeError, match=r"params must hold tensors only, got a tuple in it"):
        trained_parameters([("p", p)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="must hold at least one tensor"):
        check_any([])


def inference_parameter() -> Tensor:
    with torch.inference_mode():
        return torch.ones(2)


REFUSED = {
    "twice": (lambda p: [p, p], r"hold each parameter once, got the same one twice\. Write model\.parameters"),
    "inference": (lambda p: [inference_parameter()], r"got one made under torch\.inference_mode.*copy\.deepcopy"),
    "devices": (lambda p: [p, p.to("meta")], r"on one device, .*cpu, meta\. Move the model"),
    "complex": (lambda p: [torch.ones(2, dtype=torch.complex64)], r"be real, got torch\.complex64\. Keep"),
    "half": (lambda p: [torch.ones(2, dtype=torch.float16)], r"float32, float64 or bfloat16, got torch\.float16"),
    "whole": (lambda p: [torch.ones(2, dtype=torch.int64)], r"float32, float64 or bfloat16, got torch\.int64"),
    "lazy": (lambda p: list(nn.LazyLinear(2).parameters()), "Run the model once on a batch"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_parameters_that_no_vector_can_stand_for(case: str) -> None:
    build, words = REFUSED[case]
    with pytest.raises(ValueError, match=f"^params must .*{words}"):
        check_parameters(build(torch.ones(2)))


def test_memory_may_be_interleaved_but_not_shared() -> None:
    memory = torch.zeros(4, 6)
    for apart in (
        [memory[:2], memory[2:]],
        [memory[:, 1:], memory[:, 0]],
        [memory[:, ::2], memory[:, 1::2]],
        [torch.empty(0), torch.empty(0), memory],
        [memory.t()],
        [torch.ones(1).expand(1)],
    ):
        check_parameters(apart)
    for shared in (
        [memory[:3], memory[2:]],
        [memory[:, :2], memory[:, 1]],
        [memory, memory.t()],
        [torch.ones(1).expand(2)],
        [memory.as_strided((3, 3), (1, 1))],
    ):
        with pytest.raises(ValueError, match="must not share memory"):
            check_parameters(shared)


def test_copies_of_a_model_are_taken() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    check_parameters([*model.parameters(), *copy.deepcopy(model).parameters()])


def test_uninitialised_parameters_ask_for_a_forward_pass() -> None:
    with pytest.raises(ValueError, match="Run the model once on a batch"):
        HessianFree(nn.LazyLinear(2).parameters())
