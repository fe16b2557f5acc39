"""One measurement as a dictionary: its values are true, tracking is marked, budgets hold."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.functional import hessian as dense_hessian
from torch.func import functional_call

from newtonopt.curvature import (
    Density,
    ExtremeEigenvalues,
    Layers,
    LossSlice,
    Measurement,
    Preconditioned,
    Sharpness,
    Tag,
    Trace,
    View,
    measure,
)


class Problem:
    """A small regression in float64, with its dense Hessian."""

    def __init__(self, seconds: float = 0.0) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
        self.x, self.y = torch.randn(20, 3).double(), torch.randn(20, 2).double()
        self.seconds = seconds

    def closure(self) -> Tensor:
        time.sleep(self.seconds)
        self.model.zero_grad()
        loss = F.mse_loss(self.model(self.x), self.y)
        loss.backward()
        return loss

    def dense(self) -> tuple[Tensor, Tensor]:
        names, values = zip(*self.model.named_parameters(), strict=True)
        point = torch.cat([v.detach().flatten() for v in values])

        def loss(flat: Tensor) -> Tensor:
            pieces = flat.split([v.numel() for v in values])
            given = {n: piece.view(v.shape) for n, piece, v in zip(names, pieces, values, strict=True)}
            return F.mse_loss(functional_call(self.model, given, (self.x,)), self.y)

        return torch.func.grad(loss)(point), dense_hessian(loss, point)


def test_every_value_is_that_of_the_dense_matrix() -> None:
    problem = Problem()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1, momentum=0.5)
    found = measure(
        problem.closure,
        problem.model.named_parameters(),
        optimizer,
        bottom=2,
        measurements=[Layers(["0.*", "*.bias"]), Trace(), Density(), LossSlice()],
        tolerance=1e-6,
        sharpness=Sharpness(radius=1e-3),
        prefix="loss/here",
    )
    gradient, hessian = problem.dense()
    values, vectors = torch.linalg.eigh(hessian)
    first = slice(0, 24)
    biases = torch.tensor([*range(18, 24), 36, 37])
    expected = {
        "lambda_max": values[-1],
        "lambda_2": values[-2],
        "lambda_3": values[-3],
        "lambda_min": values[0],
        "lambda_min_2": values[1],
        "gradient_curvature": gradient @ hessian @ gradient / (gradient @ gradient),
        "gradient_alignment": ((vectors[:, -3:].T @ gradient) ** 2).sum() / (gradient @ gradient),
        "lambda_max_of/0": torch.linalg.eigvalsh(hessian[first, first])[-1],
        "lambda_max_of/_.bias": torch.linalg.eigvalsh(hessian[biases][:, biases])[-1],
        "trace": hessian.trace(),
        "stability_threshold": 30.0,
        "stability_ratio": values[-1] / 30.0,
    }
    for name, value in expected.items():
        assert found.read(name) == pytest.approx(float(value), rel=1e-5, abs=1e-9), name
    rise = 1e-3 * gradient.norm() + 0.5e-6 * expected["gradient_curvature"]
    assert found["loss/here/sharpness"] == pytest.approx(float(rise), rel=1e-3)
    assert found["loss/here-bookkeeping/certified"] == 1.0
    groups = {tag.rpartition("/")[0] for tag in found if not tag.startswith("loss/here/lambda_max_of/")}
    assert groups == {"loss/here", "loss/here-more", "loss/here-bookkeeping"}
    assert isinstance(found, Mapping) and all(type(value) is float for value in found.values())
    torch.testing.assert_close(found.of(Density).nodes, values, rtol=1e-8, atol=1e-10)
    assert found.of(LossSlice).losses.shape == (21,)


def test_the_adaptive_optimizers_threshold_is_for_the_preconditioned_matrix() -> None:
    problem = Problem()
    adam = torch.optim.Adam(problem.model.parameters(), lr=1e-3)
    before = measure(problem.closure, problem.model.parameters(), adam, sharpness=None)
    assert not [tag for tag in before if "stability" in tag or "preconditioned" in tag]  # no step has been taken
    for _ in range(5):
        adam.step(problem.closure)
    found = measure(problem.closure, problem.model.parameters(), adam, tolerance=1e-6, sharpness=None)
    _, hessian = problem.dense()
    moments = torch.cat([adam.state[p]["exp_avg_sq"].flatten() for p in problem.model.parameters()])
    scale = ((1 - 0.9**5) * ((moments / (1 - 0.999**5)).sqrt() + 1e-8)).rsqrt()
    largest = float(torch.linalg.eigvalsh(scale[:, None] * hessian * scale)[-1])
    assert found["curvature/preconditioned_lambda_max"] == pytest.approx(largest, rel=1e-5)
    assert found["curvature/stability_threshold"] == pytest.approx(38e3)
    assert found["curvature/stability_ratio"] == pytest.approx(largest / 38e3, rel=1e-5)
    (chart,) = (chart for chart in found.charts() if "stability_threshold" in chart.names(found.names()))
    assert chart.patterns == ("preconditioned_lambda_max", "stability_threshold")
    words = found.in_words().splitlines()
    assert words[0].startswith("In short: below the edge") and "the stability threshold 38\u00a0000" in words[1]
    assert any(line.startswith("The largest eigenvalue of the preconditioned matrix is ") for line in words[2:])
    by_hand = measure(
        problem.closure,
        problem.model.parameters(),
        adam,
        measurements=[Preconditioned()],
        tolerance=1e-6,
        sharpness=None,
    )
    seconds = "curvature-bookkeeping/seconds"
    assert {**by_hand, seconds: 0.0} == {**found, seconds: 0.0}


def test_a_preconditioner_that_is_not_known_adds_nothing() -> None:
    problem = Problem()
    params = list(problem.model.parameters())
    stepped = [kind(params, lr=1e-3) for kind in (torch.optim.SGD, torch.optim.Adadelta)]
    part = torch.optim.Adam(params[:2], lr=1e-3)
    for optimizer in (*stepped, part):
        optimizer.step(problem.closure)
    for optimizer in (None, *stepped, part, torch.optim.Adam(params, lr=1e-3)):
        found = measure(problem.closure, params, optimizer, sharpness=None, gradient=False)
        assert not [tag for tag in found if "preconditioned" in tag]
        assert "reconditioned" not in found.in_words()
        assert ("curvature/stability_threshold" in found) == isinstance(optimizer, torch.optim.SGD)


def test_the_preconditioned_eigenvalue_that_nobody_asked_for_is_tracked() -> None:
    problem = Problem()
    adam = torch.optim.Adam(problem.model.parameters(), lr=1e-4)
    adam.step(problem.closure)
    first = measure(problem.closure, problem.model.parameters(), adam, sharpness=None)
    second = measure(problem.closure, problem.model.parameters(), adam, sharpness=None, last=first)
    assert first.of(Preconditioned).certified and not second.of(Preconditioned).certified
    assert second.of(Preconditioned).products < first.of(Preconditioned).products
    name = "curvature/preconditioned_lambda_max"
    assert second[name] == pytest.approx(first[name], rel=1e-2)


def test_tracking_takes_fewer_products_and_says_that_it_certifies_nothing() -> None:
    problem = Problem()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.05)
    settings: dict[str, Any] = {"top": 2, "tolerance": 1e-3, "sharpness": Sharpness(radius=0.3, always=True)}
    first = measure(problem.closure, problem.model.parameters(), optimizer, **settings)
    for _ in range(3):
        optimizer.step(problem.closure)
    tracked = measure(problem.closure, problem.model.parameters(), optimizer, last=first, **settings)
    fresh = measure(problem.closure, problem.model.parameters(), optimizer, **settings)
    assert (first["curvature-bookkeeping/certified"], tracked["curvature-bookkeeping/certified"]) == (1.0, 0.0)
    assert tracked["curvature-bookkeeping/products"] < 0.7 * fresh["curvature-bookkeeping/products"]
    assert tracked.keys() == fresh.keys()
    for name, error in (("lambda_max", 1e-2), ("lambda_2", 0.1), ("lambda_min", 0.1), ("sharpness", 1e-2)):
        assert tracked[f"curvature/{name}"] == pytest.approx(fresh[f"curvature/{name}"], rel=error)
    _, hessian = problem.dense()
    values = torch.linalg.eigvalsh(hessian)
    for name in ("lambda_max", "lambda_min"):
        low, high = tracked[f"curvature/{name}_lower"], tracked[f"curvature/{name}_upper"]
        assert bool(((values >= low - 1e-9) & (values <= high + 1e-9)).any()), "some eigenvalue lies between them"
        assert low <= tracked[f"curvature/{name}"] <= high


def test_what_was_tracked_and_lost_is_looked_for_afresh() -> None:
    """The curvature grows where the last measurement's vector has no part, and the gradient sees it."""
    weights = torch.linspace(0.1, 45.0, 300, dtype=torch.float64)
    point = torch.zeros(301, dtype=torch.float64)
    point[-2:] = 1.0
    p, growth = point.requires_grad_(), torch.tensor(0.01, dtype=torch.float64)

    def closure() -> Tensor:
        return 0.5 * (2.0 * p[0] ** 2 + growth * (weights * p[1:] ** 2).sum())

    settings: dict[str, Any] = {"top": 1, "bottom": 0, "sharpness": None}
    first = measure(closure, [p], **settings)
    assert first["curvature/lambda_max"] == pytest.approx(2.0)
    growth.fill_(1.0)
    # One product is too few to tell the old eigenvector from the gradient in the start.
    blind = measure(closure, [p], **settings, gradient=False, last=first, max_products=1)
    assert blind["curvature-bookkeeping/certified"] == 0.0 and blind["curvature/lambda_max"] < 40.0
    assert measure(closure, [p], **settings, last=first, max_products=1)["curvature-bookkeeping/certified"] == 1.0
    # With a few more, tracking finds the new eigenvector by itself, since it starts from the gradient too.
    found = measure(closure, [p], **settings, last=first, max_products=24)
    assert found["curvature/lambda_max"] == pytest.approx(45.0, rel=1e-2)


def test_sharpness_is_left_to_certified_measurements_unless_it_is_asked_for() -> None:
    problem = Problem()
    params = list(problem.model.parameters())
    first = measure(problem.closure, params)
    assert "curvature/sharpness" in first
    assert "curvature/sharpness" not in measure(problem.closure, params, last=first)
    always = measure(problem.closure, params, last=first, sharpness=Sharpness(always=True))
    assert always["curvature/sharpness"] == pytest.approx(first["curvature/sharpness"], rel=1e-2)


def test_tracking_takes_a_quarter_of_the_products_allowed_at_most() -> None:
    problem = Problem()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.05)
    settings: dict[str, Any] = {"tolerance": 1e-9, "sharpness": None, "gradient": False, "max_products": 60}
    first = measure(problem.closure, problem.model.parameters(), optimizer, **settings)
    optimizer.step(problem.closure)
    for allowed, most in ((60, 15), (24, 12), (6, 6)):  # a quarter, or twice the four eigenvalues and four
        settings["max_products"] = allowed
        tracked = measure(problem.closure, problem.model.parameters(), last=first, **settings)
        assert 6 <= tracked["curvature-bookkeeping/products"] <= most
    settings |= {"tolerance": 1e-2, "max_products": 24}
    tracked = measure(problem.closure, problem.model.parameters(), last=first, **settings)
    assert 4 <= tracked["curvature-bookkeeping/products"] <= 12
    _, hessian = problem.dense()
    assert tracked["curvature/lambda_max"] == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-2)


def test_an_optimizer_of_a_part_has_no_ratio() -> None:
    problem = Problem()
    part = torch.optim.SGD(problem.model[0].parameters(), lr=0.05)
    found = measure(problem.closure, problem.model.parameters(), part, sharpness=None)
    assert not [tag for tag in found if "stability" in tag]
    found = measure(problem.closure, problem.model[0].parameters(), part, sharpness=None)
    assert found["curvature/stability_threshold"] == pytest.approx(40.0)


def test_other_parameters_than_last_time_start_afresh() -> None:
    problem = Problem()
    first = measure(problem.closure, problem.model[0].parameters(), sharpness=None)
    found = measure(problem.closure, problem.model.parameters(), sharpness=None, last=first)
    assert found["curvature-bookkeeping/certified"] == 1.0


def test_the_time_is_kept() -> None:
    """Each run of the closure takes 20 ms, and streamed products run it."""
    problem = Problem(seconds=0.02)
    began = time.perf_counter()
    found = measure(problem.closure, problem.model.parameters(), products="streamed", max_seconds=0.5)
    assert time.perf_counter() - began < 2.0
    assert 2 <= found["curvature-bookkeeping/products"] < 25
    assert "curvature/sharpness" not in found
    short = measure(problem.closure, problem.model.parameters(), products="streamed", max_seconds=1e-3)
    assert set(short.names()) == {"gradient_curvature", "products", "seconds"}


@pytest.mark.parametrize(("budget", "converged"), [(40, 1.0), (3, 0.0)])
def test_it_says_whether_every_interval_is_narrow_enough(budget: int, converged: float) -> None:
    problem = Problem()
    found = measure(problem.closure, problem.model.named_parameters(), sharpness=None, max_products=budget)
    assert found["curvature-bookkeeping/converged"] == converged
    assert found.of(ExtremeEigenvalues).converged == bool(converged)


def test_a_part_whose_interval_is_wide_has_not_converged() -> None:
    """The whole is diagonal with two eigenvalues, found in two products; the part has many."""
    p, q = (torch.ones(n, dtype=torch.float64, requires_grad=True) for n in (1, 40))
    weights = torch.linspace(1.0, 2.0, 40, dtype=torch.float64)

    def closure() -> Tensor:
        return 1e3 * p.square().sum() + (weights * q.square()).sum()

    settings: dict[str, Any] = {"top": 1, "bottom": 0, "sharpness": None, "tolerance": 1e-6, "max_products": 8}
    found = measure(closure, [("p", p), ("q", q)], **settings)
    assert found["curvature-bookkeeping/converged"] == 1.0
    found = measure(closure, [("p", p), ("q", q)], measurements=[Layers(["q"])], **settings)
    assert found.of(ExtremeEigenvalues).converged and found["curvature-bookkeeping/converged"] == 0.0


def test_gauss_newton_is_positive() -> None:
    problem = Problem()
    found = measure(problem.closure, problem.model.parameters(), curvature="gauss_newton", bottom=0, sharpness=None)
    assert found["curvature/lambda_max"] > 0.0
    hessian = measure(problem.closure, problem.model.parameters(), bottom=0, sharpness=None)
    assert found["curvature/lambda_max"] != pytest.approx(hessian["curvature/lambda_max"], rel=1e-4)


def test_layers_need_names() -> None:
    problem = Problem()
    with pytest.raises(ValueError, match=r"params must be pairs of names .* Write model\.named_parameters\(\)"):
        measure(problem.closure, problem.model.parameters(), measurements=[Layers()])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top": 0}, "top must be a whole number and at least 1, got 0"),
        ({"prefix": "my tags"}, "prefix must consist of letters, .* got 'my tags'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        measure(Problem().closure, Problem().model.parameters(), **settings)


@pytest.mark.parametrize("sharpness", [None, "ball"])
def test_a_closure_that_takes_other_data_each_time_is_refused(sharpness: Any) -> None:
    model, data = nn.Linear(3, 2), iter(torch.randn(100, 5, 3))
    with pytest.raises(RuntimeError, match="the same data"):
        measure(lambda: model(next(data)).square().mean(), model.parameters(), sharpness=sharpness)


def test_a_preconditioner_needs_an_optimizer() -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="optimizer must be given to measure Preconditioned, got None"):
        measure(lambda: p.square().sum(), [p], measurements=[Preconditioned()])


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    other, own = (torch.optim.SGD([x], lr=0.1) for x in (q, p))
    for optimizer in (other, [other]):
        with pytest.raises(ValueError, match="optimizer must train some of params, got one that trains none"):
            measure(lambda: p.square().sum(), [p], optimizer)
    found = measure(lambda: p.square().sum(), [p], [other, own])
    assert found["curvature/stability_threshold"] == pytest.approx(20.0)


def test_words_for_no_curvature_at_all() -> None:
    p = nn.Parameter(torch.zeros(1))
    words = measure(lambda: p.sum() * 3, [p]).in_words()
    assert "the curvature is zero: the loss falls linearly" in words
    assert "The smallest eigenvalue is zero" in words


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, ["the top eigenvector", "loss"]),
        ({"directions": 2}, ["the top eigenvector", "the bottom eigenvector"]),
        ({"directions": 2, "bottom": 0}, ["the top eigenvector", "the second eigenvector"]),
    ],
)
def test_a_slice_is_labelled_by_its_eigenvectors(settings: dict[str, Any], names: list[str]) -> None:
    p = nn.Parameter(torch.ones(3))
    along = LossSlice(settings.get("directions", 1))
    bottom = settings.get("bottom", 1)
    found = measure(lambda: (p**4 * torch.arange(1, 4)).sum(), [p], bottom=bottom, sharpness=None, measurements=[along])
    axes = found.of(LossSlice).plot().axes[0]
    assert [axes.get_xlabel(), axes.get_ylabel()] == [name.replace("the ", "step along the ") for name in names]


@pytest.mark.parametrize(
    ("measurements", "kind", "words"),
    [
        (Trace(), TypeError, r"measurements must be a list, got Trace\(\)\. Write \[Trace\(\)\]"),
        ([Trace], TypeError, "measurements must hold measurements only, got <class .* in it"),
        ([Trace(), Trace()], ValueError, "measurements must hold at most one Trace, .* got Trace"),
        (
            [Sharpness()],
            ValueError,
            "measurements must hold at most one Sharpness, counting those of the other arguments",
        ),
    ],
)
def test_a_list_that_is_none_of_measurements_is_refused(measurements: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        measure(Problem().closure, Problem().model.parameters(), measurements=measurements)


class Asks(Measurement[float]):
    """Asks for another one."""

    tags = (Tag("first", "", "one more than the other"),)

    def measure(self, view: Any) -> float:
        return 1.0 + (view.of(Answers) or 0.0)

    def values(self, result: float) -> dict[str, float]:
        return {"first": result}


class Answers(Asks):
    """Is asked, or asks back."""

    tags = (Tag("second", "", "two"),)

    def measure(self, view: Any) -> float:
        return 2.0

    def values(self, result: float) -> dict[str, float]:
        return {"second": result}


class AsksBack(Answers):
    def measure(self, view: Any) -> float:
        return view.of(Asks) or 0.0


class Undeclared(Answers):
    def values(self, result: float) -> dict[str, float]:
        return {"third": result}


def test_a_measurement_gets_the_result_of_another_whatever_the_order() -> None:
    p = nn.Parameter(torch.ones(2))
    for measurements in ([Asks(), Answers()], [Answers(), Asks()]):
        found = measure(lambda: p.square().sum(), [p], sharpness=None, measurements=measurements)
        assert (found["curvature/first"], found["curvature/second"]) == (3.0, 2.0)
    alone = measure(lambda: p.square().sum(), [p], sharpness=None, measurements=[Asks()])
    assert alone["curvature/first"] == 1.0 and alone.of(Answers) is None


def test_measurements_that_wait_for_one_another_are_told() -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(RuntimeError, match="depend on each other in a cycle, and Asks"):
        measure(lambda: p.square().sum(), [p], sharpness=None, measurements=[Asks(), AsksBack()])


def test_a_value_that_is_no_tag_of_its_measurement_is_refused() -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="values of Undeclared must be among second, got 'third'"):
        measure(lambda: p.square().sum(), [p], sharpness=None, measurements=[Undeclared()])


class AnotherTrace(Answers):
    tags = (Tag("trace", "", "not the trace"),)


class OneTag(Answers):
    tags = Tag("second", "", "two")  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("measurements", "kind", "words"),
    [
        ([Trace(), AnotherTrace()], ValueError, "got 'trace' in AnotherTrace and in Trace. Rename one"),
        ([OneTag()], TypeError, "tags must be a tuple of Tag in OneTag, got "),
    ],
)
def test_tags_must_be_a_measurements_own(measurements: Any, kind: type[Exception], words: str) -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(kind, match=words):
        measure(lambda: p.square().sum(), [p], sharpness=None, measurements=measurements)


class Mistaken(Answers):
    def measure(self, view: Any) -> float:
        return view.no_such_thing  # type: ignore[no-any-return]


def test_a_mistake_in_a_measurement_names_its_class() -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(RuntimeError, match=r"Mistaken failed with AttributeError: .*no_such_thing"):
        measure(lambda: p.square().sum(), [p], sharpness=None, measurements=[Mistaken()])


class Rounded(Measurement[float]):
    """A measurement that takes a product and says nothing about differences."""

    tags = (Tag("rounded", "", "the first entry of a product"),)

    def measure(self, view: View) -> float:
        return float((view.matrix @ torch.ones_like(view.gradient))[0])

    def values(self, result: float) -> dict[str, float]:
        return {"rounded": result}


def test_tracking_takes_differences_where_they_agree_with_exact_products() -> None:
    problem = Problem()
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=1e-4)
    optimizer.step(problem.closure)
    params, settings = list(problem.model.parameters()), {"sharpness": None, "tolerance": 1e-3}
    first = measure(problem.closure, params, optimizer, **settings)
    assert first.differenced
    optimizer.step(problem.closure)
    before = [p.detach().clone() for p in params]
    tracked = measure(problem.closure, params, optimizer, **settings, last=first)
    exact = measure(problem.closure, params, optimizer, **settings, last=first, products="cached")
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert tracked.differenced and not exact.differenced
    assert (tracked.read("certified"), exact.read("certified")) == (0.0, 0.0)
    for name in ("lambda_max", "lambda_2", "preconditioned_lambda_max", "gradient_curvature"):
        assert tracked.read(name) == pytest.approx(exact.read(name), rel=1e-3)
    assert tracked.read("lambda_max") != exact.read("lambda_max"), "one of the two is rounded otherwise"
    assert tracked.form == "auto"


def test_differences_are_for_tracking_alone() -> None:
    problem = Problem()
    params = list(problem.model.parameters())
    settings: dict[str, Any] = {"sharpness": None, "seed": 0}
    first = measure(problem.closure, params, **settings)
    for more in ({"products": "cached"}, {"curvature": "gauss_newton"}, {"measurements": [Rounded()]}):
        assert not measure(problem.closure, params, **settings, **more).differenced
    # A measurement that the first list does not have gets exact products.
    both = [measure(problem.closure, params, **settings, last=last, measurements=[Rounded()]) for last in (first, None)]
    assert both[0].read("rounded") == both[1].read("rounded")


def test_what_differences_cannot_track_is_measured_again_with_exact_products() -> None:
    problem = Problem()
    params = list(problem.model.parameters())
    first = measure(problem.closure, params, sharpness=None)
    shrunk = measure(problem.closure, params[:2], sharpness=None, last=first)
    again = measure(problem.closure, params[:2], sharpness=None)
    assert first.differenced and shrunk.read("certified") == 1.0
    assert shrunk.read("lambda_max") == again.read("lambda_max")
