"""Numbers of samples read off gradients, and the uses at which samples end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from newtonopt.autodiff.graph import behind, kind_of
from newtonopt.autodiff.samples import Edge, Samples, labels_at, uses_of

D = torch.float64


def numbers(*shape: int, shift: float = 0.0, dtype: torch.dtype = D) -> Tensor:
    """Return numbers without a pattern, between -1 and 1, the same in each run."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(1, count + 1, dtype=D) ** 2 + shift).view(shape).to(dtype)


def samples_of(z: Tensor) -> Samples:
    """Return the first dimension's entries as samples."""
    return Samples((z,), torch.arange(z.numel()).view(len(z), -1))


def edge_of(t: Tensor) -> Edge:
    edge = get_gradient_edge(t)
    return edge.node, edge.output_nr


def labels_of(z: Tensor, at: Tensor) -> Tensor | None:
    """Return the samples' numbers of the gradient at a tensor; None for a mixture."""
    (found,) = labels_at(samples_of(z), [edge_of(at)])
    return None if found is None else found.samples


# Outputs grouped into samples.


def test_cotangents_have_the_outputs_shapes() -> None:
    a, b = torch.zeros(3, 2, dtype=D), torch.zeros(3, dtype=torch.float32)
    samples = Samples((a, b), torch.tensor([[0, 1, 6], [2, 3, 7], [4, 5, 8]]))
    assert (samples.count, samples.columns) == (3, 3)
    first, second = samples.cotangents(torch.arange(9.0, dtype=D).view(3, 3))
    assert torch.equal(first, torch.tensor([[0.0, 1.0], [3.0, 4.0], [6.0, 7.0]], dtype=D))
    assert torch.equal(second, torch.tensor([2.0, 5.0, 8.0])) and second.dtype == torch.float32


def test_weights_are_between_one_and_two_and_of_either_sign() -> None:
    weights = samples_of(torch.zeros(50, 2, dtype=D)).weights
    assert weights.shape == (50, 2) and weights.dtype == D
    assert bool(((weights.abs() >= 1) & (weights.abs() <= 2)).all())
    assert bool((weights > 0).any()) and bool((weights < 0).any())
    assert weights.unique().numel() == 100
    # A cotangent in bfloat16 is the weight itself.
    coarse = samples_of(torch.zeros(50, 2, dtype=torch.bfloat16)).weights
    assert coarse.dtype == torch.float32 and torch.equal(coarse, coarse.bfloat16().float())


# Numbers of samples.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 2, 3, 60, 62, 1001, 1002, 5000])
def test_every_sample_is_known_by_its_number(count: int, dtype: torch.dtype) -> None:
    """In one pass up to 1001 samples in double precision, 61 in single; in several beyond."""
    x = (numbers(count, 2, dtype=dtype) + 2).requires_grad_()
    h = x * 1.5
    (found,) = labels_at(samples_of((h * h).sum(1)), [edge_of(h)])
    assert found is not None
    assert torch.equal(found.samples, torch.arange(count)[:, None].expand(count, 2))
    along = samples_of(torch.zeros(count, dtype=dtype)).weights
    assert torch.equal(found.gradient, (2 * h * along.to(dtype)).detach())


def test_entries_of_samples_in_any_order() -> None:
    x = numbers(6, 2).requires_grad_()
    h = x * 2
    order = torch.tensor([4, 0, 5, 2])
    found = labels_of(h[order].exp(), h)
    assert found is not None
    assert found[:, 0].tolist() == [1, -1, 3, -1, 0, 2]


def test_entries_without_a_gradient_have_no_sample() -> None:
    x = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=D, requires_grad=True)
    h = x * 1
    found = labels_of(h.relu().sum(1), h)
    assert found is not None and found.tolist() == [[0, -1], [-1, 1], [-1, -1]]


def test_a_tensor_that_is_handed_no_gradient_has_no_sample() -> None:
    x = numbers(3).requires_grad_()
    h, unused = x * 1, x * 2
    found = labels_at(samples_of(h.exp()), [edge_of(h), edge_of(unused)])
    assert [None if one is None else one.samples.tolist() for one in found] == [[0, 1, 2], [-1, -1, -1]]


@pytest.mark.parametrize(
    "values",
    [
        [1.0, -1.0],
        [1.0, 1.0],
        [2.0, -3.0],
        [3.0, -1.0],
        [2.0, -1.5],
        [2.0, 5.0, 1.0],
        [1.0, -2.0, 1.0],
        [1.0, 1.0, -1.0, -1.0],
        [0.5, 1.0, 2.0, 4.0, 8.0],
        [1.0] * 64,
        [(-1.0) ** i for i in range(64)],
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_sum_over_samples_is_a_mixture_whatever_the_numbers(values: list[float], dtype: torch.dtype) -> None:
    """Along ones, sums of such numbers are powers of two times one another, or zero."""
    x = torch.tensor(values, dtype=dtype)
    w = torch.ones((), dtype=dtype, requires_grad=True)
    assert labels_of(w * 1 * x, w) is None


def test_a_part_of_a_tensor_that_samples_share_makes_it_a_mixture() -> None:
    x = numbers(4).requires_grad_()
    h = x * 1
    assert labels_of(h[:3] * h[3], h) is None
    assert labels_of(h[:3] * h[3].detach(), h) is not None


def test_real_and_imaginary_parts_of_different_samples_are_a_mixture() -> None:
    x = numbers(3, 2).requires_grad_()
    h = torch.view_as_complex(x * 1) * 1j
    parts = torch.view_as_real(h)
    assert labels_of(parts.reshape(-1).exp(), h) is None
    found = labels_of(parts.exp(), h)
    assert found is not None and found.tolist() == [0, 1, 2]
    # A part without a gradient belongs to nobody.
    found = labels_of(parts[:, 1].exp(), h)
    assert found is not None and found.tolist() == [0, 1, 2]


@pytest.mark.parametrize(("dtype", "power"), [(torch.float64, -1070), (torch.float32, -140)])
def test_numbers_that_underflow_have_no_sample(dtype: torch.dtype, power: int) -> None:
    scale = torch.ldexp(torch.ones(80, dtype=dtype), torch.where(torch.arange(80) % 2 == 0, 0, power))
    x = numbers(80, dtype=dtype).requires_grad_()
    h = x * 1
    found = labels_of(h * scale, h)
    assert found is not None
    assert torch.equal(found, torch.where(torch.arange(80) % 2 == 0, torch.arange(80), -1))


def test_operations_that_add_in_another_order_are_followed() -> None:
    """Kernels on a GPU add in any order, so that the sums differ by rounding."""

    class Shaken(torch.autograd.Function):
        passes = 0

        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, g: Tensor) -> Tensor:  # type: ignore[override]
            Shaken.passes += 1
            return g * (1 + Shaken.passes * 8 * torch.finfo(g.dtype).eps)

    x = numbers(70).requires_grad_()
    h = x * 1
    found = labels_of(Shaken.apply(h), h)
    assert Shaken.passes == 2
    assert found is not None and torch.equal(found, torch.arange(70))


def test_a_second_derivative_has_its_samples() -> None:
    x, w = numbers(5, 2).requires_grad_(), numbers(2, 3).requires_grad_()
    h = x @ w
    (g,) = torch.autograd.grad(h.sin().sum(), x, create_graph=True)
    found = labels_of(g.square().sum(1), h)
    assert found is not None and torch.equal(found, torch.arange(5)[:, None].expand(5, 3))


# Uses.


def uses_in(z: Tensor, params: Sequence[Tensor], samples: Samples | None = None) -> list[tuple[str, int, str]]:
    """Return the operations of the uses, their slots, and the operations of their operands."""
    leaves: list[Node] = [get_gradient_edge(p).node for p in params]
    found = uses_of(samples_of(z) if samples is None else samples, leaves)
    return sorted((kind_of(use.node), use.slot, kind_of(use.target[0])) for use in found)


def test_layers_are_the_uses_of_a_network() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    found = uses_in(model(numbers(5, 3)), list(model.parameters()))
    assert found == [("Addmm", 0, ""), ("Addmm", 0, ""), ("Addmm", 2, "T"), ("Addmm", 2, "T")]


def test_only_the_parameters_asked_for_have_uses() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    assert uses_in(model(numbers(5, 3)), [model[0].bias]) == [("Addmm", 0, "")]
    assert uses_in(model(numbers(5, 3)), [nn.Parameter(numbers(2))]) == []


def test_a_parameter_of_the_samples_themselves_ends_at_itself() -> None:
    codes = numbers(5, 3).requires_grad_()
    (use,) = uses_of(samples_of(codes.sin().sum(1)), [get_gradient_edge(codes).node])
    assert use.node is use.target[0] is get_gradient_edge(codes).node
    (found,) = use.results
    assert found is not None and torch.equal(found.samples, torch.arange(5)[:, None].expand(5, 3))


def test_an_operand_behind_another_one_counts_once() -> None:
    """The samples `h` are behind a tensor that holds a parameter too, and are used alone."""
    w, s = numbers(3, 1).requires_grad_(), numbers(1).requires_grad_()
    h = (numbers(6, 3) @ w).tanh().squeeze(1)
    c = torch.cat([h, s])
    found = uses_in(c[:6] * c[6] + h, [w, s])
    assert found == [("Add", 1, "Squeeze"), ("Mul", 1, "Select"), ("Slice", 0, "Cat")]


@pytest.mark.parametrize(
    ("mix", "operation"),
    [
        (lambda h: h - h.mean(0), "Sub"),
        (lambda h: h.softmax(0), "Softmax"),
        (lambda h: torch.nn.functional.batch_norm(h, None, None, training=True), "NativeBatchNorm"),
        (lambda h: (h @ h.T).sum(1), "Mm"),
    ],
)
def test_an_operation_that_mixes_samples_is_a_use_of_what_is_before(
    mix: Callable[[Tensor], Tensor], operation: str
) -> None:
    w = numbers(3, 2).requires_grad_()
    found = uses_in(mix(numbers(400, 3) @ w), [w])
    assert {kind for kind, _, _ in found} == {operation}
    assert "Mm" in {target for _, _, target in found}


def test_several_outputs_of_one_sample() -> None:
    """A grouping into single entries mixes them in the layer before, one into samples does not."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    z = model(numbers(300, 3))
    entries = Samples((z,), torch.arange(z.numel())[:, None])
    found = uses_in(z, list(model.parameters()), entries)
    assert found == [("Addmm", 0, ""), ("Addmm", 1, "Tanh"), ("Addmm", 2, "T")]
    assert len(uses_in(z, list(model.parameters()))) == 4


def test_outputs_that_no_parameter_reaches_have_no_uses() -> None:
    x = numbers(4).requires_grad_()
    assert uses_in(x.sin(), [nn.Parameter(numbers(2))]) == []


def test_labels_leave_the_graph() -> None:
    model = nn.Linear(3, 1).double()
    z = model(numbers(5, 3))
    before = list(behind(z.grad_fn))
    for _ in range(2):
        uses_in(z, list(model.parameters()))
    assert list(behind(z.grad_fn)) == before and all(p.grad is None for p in model.parameters())
    z.sum().backward()


def test_convolutions_add_in_one_order_while_samples_are_told_apart() -> None:
    x = torch.ones(3, 1, requires_grad=True)
    z = x * 2
    seen: list[bool] = []
    z.register_hook(lambda g: seen.append(torch.backends.cudnn.deterministic))
    before = torch.backends.cudnn.deterministic
    samples = Samples((z,), torch.arange(3)[:, None])
    samples.gradients(torch.ones(3, 1), [torch.autograd.graph.get_gradient_edge(x)])
    assert seen == [True]
    assert torch.backends.cudnn.deterministic is before
