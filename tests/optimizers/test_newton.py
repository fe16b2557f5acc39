"""One battery over all optimizers: the promises to torch.optim and to the user's closure."""

from __future__ import annotations

import copy
import gc
import io
import math
import os
import pickle
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from optimizer_db import OPTIMIZERS, Build
from problems import Unseen, unseen
from torch import Tensor, nn

from newtonopt import (
    CubicNewton,
    DampedNewton,
    HessianFree,
    LevenbergMarquardt,
    NewtonCG,
    TrustRegionNewton,
    mark_outputs,
)
from newtonopt.optimizers.newton import NewtonOptimizer


class Training:
    """A small noisy model, its data and its closure, with counts of what the closure did."""

    forwards = Unseen(int)

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(2)
        self.model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Dropout(0.2), nn.Linear(3, 3)).to(
            dtype
        )
        self.x = torch.randn(20, 4, dtype=dtype)
        self.y = self.x[:, :3].argmax(1)

    def closure(self) -> Tensor:
        self.model.zero_grad()
        loss = F.cross_entropy(self.model(self.x), self.y)
        self.forwards += 1
        loss.register_hook(lambda _: None)
        loss.backward()
        return loss

    def flat(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])


@pytest.fixture(params=OPTIMIZERS)
def build(request: pytest.FixtureRequest) -> Build:
    return OPTIMIZERS[request.param]


def tightness(optimizer: NewtonOptimizer) -> float:
    """Grows as the control shortens the steps."""
    if optimizer.control is None:
        return 0.0
    value = float(getattr(optimizer.last_step, optimizer.control))
    return 1 / value if optimizer.control == "radius" else value


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float64])
def test_training_lowers_the_loss(build: Build, dtype: torch.dtype) -> None:
    training = Training(dtype)
    training.model.eval()
    optimizer = build(training.model.parameters())
    first = float(optimizer.step(training.closure))
    for _ in range(10):
        last = float(optimizer.step(training.closure))
    assert last < 0.6 * first


def test_a_step_returns_the_first_loss_and_reports(build: Build) -> None:
    training = Training(torch.float64)
    optimizer = build(training.model.parameters())
    assert optimizer.last_step is None
    state = torch.get_rng_state()
    loss = training.closure()
    torch.set_rng_state(state)
    returned = optimizer.step(closure=training.closure)
    assert torch.equal(returned, loss.detach())
    assert not returned.requires_grad
    report = optimizer.last_step
    assert report is not None and report.accepted
    assert report.loss == float(loss.detach())
    assert report.trial_loss < report.loss
    assert report.ratio == pytest.approx((report.loss - report.trial_loss) / report.predicted_decrease, rel=1e-6)
    # Rows take the place of products, in checks of a matrix formed from them too.
    assert report.products + report.rows + report.checks >= report.iterations > 0
    assert report.step_norm > 0


def test_a_step_costs_one_forward_one_backward_and_one_forward_per_trial(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training()
    optimizer = build(training.model.parameters())
    backwards = []
    run = torch.autograd.backward
    monkeypatch.setattr(
        torch.autograd, "backward", lambda *args, **kwargs: (backwards.append(1), run(*args, **kwargs))[1]
    )
    optimizer.step(training.closure)  # which also checks products, and that the closure computes the same loss again
    for _ in range(3):
        training.forwards = 0
        backwards.clear()
        optimizer.step(training.closure)
        assert optimizer.last_step is not None
        # The second-order part of a Levenberg-Marquardt step takes a forward pass too, for each damping.
        bends = optimizer.last_step.iterations if optimizer.defaults.get("acceleration") else 0
        assert training.forwards == 1 + optimizer.last_step.trials + bends
        assert optimizer.last_step.checks == 0
        assert len(backwards) == 1


def test_a_step_leaves_what_one_closure_call_leaves(build: Build) -> None:
    """Random state, buffers and gradients after a step, trials included, are those after the closure ran once at the
    starting point.
    """
    training, twin = Training(), Training()
    build(training.model.parameters()).step(training.closure)
    after = torch.get_rng_state()
    Training()  # the same seed again
    twin.closure()
    assert torch.equal(after, torch.get_rng_state())
    for a, b in zip(training.model.buffers(), twin.model.buffers(), strict=True):
        assert torch.equal(a, b)
    for p, q in zip(training.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-8)


def test_clipping_gives_one_warning_and_changes_nothing(build: Build) -> None:
    plain, clipped = Training(torch.float64), Training(torch.float64)

    def clipping() -> Tensor:
        loss = clipped.closure()
        torch.nn.utils.clip_grad_norm_(clipped.model.parameters(), 1e-4)
        return loss

    optimizers = build(plain.model.parameters()), build(clipped.model.parameters())
    state = torch.get_rng_state()
    for _ in range(3):
        optimizers[0].step(plain.closure)
    torch.set_rng_state(state)
    with pytest.warns(UserWarning, match="clipping has no effect") as caught:
        for _ in range(3):
            optimizers[1].step(clipping)
    assert len(caught) == 1
    assert torch.equal(plain.flat(), clipped.flat())
    for p, q in zip(plain.model.parameters(), clipped.model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)  # the recorded gradient, not the clipped one


def test_a_rejected_step_leaves_parameters_bit_equal(build: Build) -> None:
    training = Training()
    optimizer = build(training.model.parameters())
    start = training.flat()

    def uphill_everywhere_else() -> Tensor:
        if torch.equal(training.flat(), start):
            return training.closure()
        training.model.zero_grad()
        loss = F.cross_entropy(training.model(training.x), training.y) * 0 + 100.0
        loss.backward()
        return loss

    optimizer.step(uphill_everywhere_else)
    assert optimizer.last_step is not None and not optimizer.last_step.accepted
    assert optimizer.last_step.step_norm == 0.0
    assert optimizer.last_step.reason.startswith(
        ("rejected, no trial decreased the loss enough", "rejected, the loss did not fall")
    )
    assert torch.equal(training.flat(), start)
    before = tightness(optimizer)
    optimizer.step(training.closure)
    assert optimizer.control is None or tightness(optimizer) > before


def test_state_dict_resumes_bit_equal_and_loads_weights_only(build: Build) -> None:
    training = Training()
    optimizer = build(
        [
            {"params": training.model[0].parameters(), "lr": 0.7},
            {"params": training.model[1:].parameters(), "weight_decay": 0.1},
        ]
    )
    for _ in range(3):
        optimizer.step(training.closure)
    buffer = io.BytesIO()
    torch.save(
        {"model": training.model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()},
        buffer,
    )
    for _ in range(3):
        optimizer.step(training.closure)

    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    other = Training()
    other.model.load_state_dict(saved["model"])
    resumed = build([{"params": other.model[0].parameters()}, {"params": other.model[1:].parameters()}])
    resumed.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
    for _ in range(3):
        resumed.step(other.closure)
    assert torch.equal(training.flat(), other.flat())
    assert resumed.last_step == optimizer.last_step


def test_settings_of_numpy_and_tensors_are_kept_as_numbers(build: Build) -> None:
    training = Training()
    groups = [{"params": training.model[0].parameters(), "weight_decay": np.float32(0.1)}]
    optimizer = build(groups, lr=torch.tensor(0.5), tolerance_step=np.float64(1e-9), tolerance_gradient=torch.tensor(0))
    optimizer.add_param_group({"params": training.model[1:].parameters(), "lr": np.float64(0.25)})
    optimizer.step(training.closure)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    first, second = torch.load(buffer, weights_only=True)["param_groups"]
    assert (first["lr"], first["weight_decay"], first["tolerance_step"]) == (torch.tensor(0.5), np.float32(0.1), 1e-9)
    assert (second["lr"], second["tolerance_gradient"]) == (0.25, 0)
    assert {type(first["weight_decay"]), type(first["tolerance_step"]), type(second["lr"])} == {float}


def test_copies_and_pickles_go_on_alike(build: Build) -> None:
    training = Training(torch.float64)
    training.model.eval()
    optimizer = build(training.model.parameters())
    optimizer.step(training.closure)
    for clone in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        twin, twin_optimizer = clone((training, optimizer))
        twin_optimizer.step(twin.closure)
        reference, reference_optimizer = copy.deepcopy((training, optimizer))
        reference_optimizer.step(reference.closure)
        assert torch.equal(twin.flat(), reference.flat())


def test_groups_have_their_own_rate_and_decay(build: Build) -> None:
    """A group with lr 0 stays; weight decay in the groups equals the same penalty written into the loss of an exact
    method.
    """
    training = Training()
    still = training.model[4].weight.detach().clone()
    others = [p for p in training.model.parameters() if p is not training.model[4].weight]
    optimizer = build([{"params": others}, {"params": [training.model[4].weight], "lr": 0.0}])
    start = training.flat()
    optimizer.step(training.closure)
    assert torch.equal(training.model[4].weight, still)
    assert not torch.equal(training.flat(), start)


def test_weight_decay_is_the_penalty_in_the_loss() -> None:
    results = []
    for in_loss in (True, False):
        training = Training(torch.float64)
        training.model.eval()
        weights = [p for p in training.model.parameters() if p.dim() == 2]
        others = [p for p in training.model.parameters() if p.dim() != 2]
        decay = 0.0 if in_loss else 0.3

        def closure(t: Training = training, ws: list[Tensor] = weights, on: bool = in_loss) -> Tensor:
            t.model.zero_grad()
            loss = F.cross_entropy(t.model(t.x), t.y)
            if on:
                loss = loss + 0.15 * sum(w.square().sum() for w in ws)
            loss.backward()
            return loss

        optimizer = DampedNewton([{"params": weights, "weight_decay": decay}, {"params": others}])
        for _ in range(5):
            optimizer.step(closure)
        results.append((training.flat(), optimizer.last_step))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-9, atol=1e-11)
    assert results[0][1].loss == pytest.approx(results[1][1].loss, rel=1e-10)


def test_the_learning_rate_scales_the_step_and_its_prediction(build: Build) -> None:
    reports = {}
    for name, groups in {"one": 0.5, "two": None}.items():
        training = Training(torch.float64)
        training.model.eval()
        params = list(training.model.parameters())
        if groups is not None:
            optimizer = build(params, lr=groups)
        else:
            optimizer = build([{"params": params[:2], "lr": 0.5}, {"params": params[2:], "lr": 0.5 * (1 + 1e-12)}])
        optimizer.step(training.closure)
        reports[name] = optimizer.last_step
    assert reports["one"].predicted_decrease == pytest.approx(reports["two"].predicted_decrease, rel=1e-6)
    assert reports["one"].step_norm == pytest.approx(reports["two"].step_norm, rel=1e-6)


def test_a_step_inside_autocast_solves_in_full_precision(build: Build) -> None:
    training = Training()
    training.model.eval()
    optimizer = build(training.model.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [float(optimizer.step(training.closure)) for _ in range(8)]
    assert losses[-1] < 0.8 * losses[0]


def test_schedulers_set_the_rate(build: Build) -> None:
    training = Training()
    optimizer = build(training.model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.0 if epoch == 1 else 1.0)
    moved = []
    for _ in range(3):
        start = training.flat()
        optimizer.step(training.closure)
        scheduler.step()
        moved.append(not torch.equal(start, training.flat()))
    assert moved == [True, False, True]


def test_frozen_unused_and_later_unfrozen_parameters(build: Build) -> None:
    training = Training()
    training.model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    training.model[0].requires_grad_(False)
    frozen = training.model[0].weight.detach().clone()
    optimizer = build(training.model.parameters())
    for _ in range(2):
        optimizer.step(training.closure)
    assert torch.equal(training.model[0].weight, frozen)
    assert torch.equal(training.model.unused, torch.ones(3))
    assert training.model.unused.grad is None
    training.model[0].requires_grad_(True)
    for _ in range(5):  # Dropout draws anew in each step, and some may be rejected
        optimizer.step(training.closure)
    assert not torch.equal(training.model[0].weight, frozen)


class Witness(torch.autograd.Function):
    """An identity whose node in the graph keeps an object alive."""

    @staticmethod
    def forward(ctx, x, kept):  # type: ignore[no-untyped-def]
        kept_by_node = set()  # a set can be referred to weakly
        ctx.kept = kept_by_node
        kept.append(weakref.ref(kept_by_node))
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return g, None


def test_no_graph_is_left_and_none_is_alive_in_a_trial(build: Build) -> None:
    training = Training()
    optimizer = build(training.model.parameters())
    graphs: Callable[[], list[weakref.ref[set[None]]]] = unseen([])
    alive: Callable[[], list[int]] = unseen([])

    def closure() -> Tensor:
        training.model.zero_grad()
        alive().append(sum(graph() is not None for graph in graphs()))
        z = Witness.apply(training.model(training.x), graphs())
        assert graphs()[-1]() is not None
        loss = F.cross_entropy(z, training.y)
        loss.backward()
        return loss

    gc.disable()
    try:
        optimizer.step(closure)
        alive().clear()  # the first step compares products, on the graph, with differences of gradients
        for _ in range(3):
            optimizer.step(closure)
    finally:
        gc.enable()
    assert len(graphs()) > 3
    # A rejected proposal of HessianFree's is solved again, on the graph.
    kept = isinstance(optimizer, HessianFree) and optimizer.param_groups[0]["max_trials"] > 1
    assert max(alive()) == kept
    assert all(graph() is None for graph in graphs())


@pytest.mark.slow
def test_two_hundred_steps_leave_memory_flat() -> None:
    psutil = pytest.importorskip("psutil")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 10))
    x, y = torch.randn(500, 100), torch.randint(0, 10, (500,))
    optimizer = HessianFree(model.parameters(), rank=10)

    def closure() -> Tensor:
        model.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    process = psutil.Process(os.getpid())
    resident = []
    for _ in range(200):
        optimizer.step(closure)
        resident.append(process.memory_info().rss)
    graph = 500 * 100 * 4 * 3  # bytes of the activations that one recording keeps
    assert resident[-1] - resident[40] < 40 * graph


# Bad input.


def test_no_closure_names_the_remedies(build: Build) -> None:
    optimizer = build([torch.zeros(2, requires_grad=True)])
    with pytest.raises(RuntimeError, match=r"bf16-mixed.*32-true"):
        optimizer.step()


@pytest.mark.parametrize(("value", "what"), [(math.nan, "loss"), (math.inf, "loss")])
def test_non_finite_losses_move_nothing(build: Build, value: float, what: str) -> None:
    training = Training()
    optimizer = build(training.model.parameters())
    start = training.flat()

    def broken() -> Tensor:
        training.model.zero_grad()
        loss = F.cross_entropy(training.model(training.x), training.y) * value
        loss.backward()
        return loss

    controls = []
    for _ in range(4):
        optimizer.step(broken)
        assert optimizer.last_step is not None and not optimizer.last_step.accepted
        assert f"the {what} is not finite" in optimizer.last_step.reason
        controls.append(tightness(optimizer))
    assert controls == sorted(controls)
    assert optimizer.control is None or controls[-1] > controls[0]
    with pytest.raises(RuntimeError, match="not finite in 5 steps in a row"):
        optimizer.step(broken)
    assert torch.equal(training.flat(), start)
    optimizer.step(training.closure)
    assert optimizer.last_step.accepted


def test_a_non_finite_gradient_moves_nothing(build: Build) -> None:
    theta = torch.zeros(2, requires_grad=True)
    optimizer = build([theta])

    def closure() -> Tensor:
        loss = F.mse_loss(theta.sqrt(), torch.ones(2))
        loss.backward()
        return loss

    optimizer.step(lambda: (optimizer.zero_grad(), closure())[1])
    assert torch.equal(theta, torch.zeros(2))
    assert optimizer.last_step is not None and "the gradient is not finite" in optimizer.last_step.reason


def test_non_finite_curvature_moves_nothing(build: Build) -> None:
    theta = torch.zeros(2, requires_grad=True)
    optimizer = build([theta])

    def closure() -> Tensor:
        optimizer.zero_grad()
        z = mark_outputs(theta)
        loss = (z**1.5 + z).sum()  # at zero its slope is one, and its second derivative infinite
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.equal(theta, torch.zeros(2))
    assert optimizer.last_step is not None and "curvature is not finite" in optimizer.last_step.reason


def test_accumulation_across_closures_is_an_error(build: Build) -> None:
    training = Training()
    optimizer = build(training.model.parameters())
    start = training.flat()
    training.closure()

    def without_zero_grad() -> Tensor:
        loss = F.cross_entropy(training.model(training.x), training.y)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="zero_grad"):
        optimizer.step(without_zero_grad)
    assert torch.equal(training.flat(), start)


def test_a_tensor_is_no_closure(build: Build) -> None:
    with pytest.raises(TypeError, match=r"closure must be a function without arguments .*, got tensor"):
        build([torch.zeros(2, requires_grad=True)]).step(torch.zeros(()))  # type: ignore[arg-type]


def test_parameters_of_another_model_are_an_error(build: Build) -> None:
    training = Training()
    optimizer = build(copy.deepcopy(training.model).parameters())
    with pytest.raises(RuntimeError, match="does not depend on any of the given parameters"):
        optimizer.step(training.closure)


def test_an_error_in_a_step_leaves_the_state_as_it_was(build: Build) -> None:
    training = Training()
    optimizer = build(training.model.parameters())
    calls: Callable[[], list[int]] = unseen([])

    def other_batches() -> Tensor:
        calls().append(1)
        loss = training.closure()
        if len(calls()) > 1:
            (loss.detach().requires_grad_() * 10.0).backward()
        return loss

    before = copy.deepcopy(optimizer.state)
    with pytest.raises(RuntimeError, match="Start its data loader from the beginning"):
        optimizer.step(other_batches)
    assert optimizer.state == before == {}


def test_an_error_after_clamping_puts_the_weights_back(build: Build) -> None:
    training = Training()
    optimizer = build(training.model.parameters())
    before = training.flat()

    def failing() -> Tensor:
        for p in training.model.parameters():
            p.data.zero_()
        raise ValueError("no data")

    with pytest.raises(ValueError, match="no data"):
        optimizer.step(failing)
    assert torch.equal(training.flat(), before) and not optimizer.state


def test_another_optimizers_state_is_refused(build: Build) -> None:
    theta = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"no .*products.*another kind of optimizer"):
        build([theta]).load_state_dict(torch.optim.SGD([theta], lr=0.1).state_dict())


def test_another_models_state_is_refused(build: Build) -> None:
    training = Training()
    optimizer = build(training.model.parameters())
    next(training.model.parameters()).requires_grad_(False)
    optimizer.step(training.closure)
    state = copy.deepcopy(optimizer.state_dict())
    next(training.model.parameters()).requires_grad_(True)
    build(training.model.parameters()).load_state_dict(state)  # frozen in the state is any size
    wider = [torch.zeros(1 + p.numel(), requires_grad=True) for p in training.model.parameters()]
    other = build(wider)
    with pytest.raises(ValueError, match=r"parameter 1 had 3 entries, but here it has the shape \(4,\), 4 entries"):
        other.load_state_dict(state)
    assert not other.state


def test_all_frozen_is_an_error(build: Build) -> None:
    theta = torch.zeros(2, requires_grad=True)
    optimizer = build([theta])
    theta.requires_grad_(False)
    with pytest.raises(RuntimeError, match="Every parameter of this optimizer is frozen"):
        optimizer.step(lambda: torch.zeros(()))


def test_parameters_that_cannot_be_one_vector(build: Build) -> None:
    one = torch.zeros(1, requires_grad=True)
    with pytest.raises(ValueError, match="params must hold at least one tensor, got"):
        build([])
    with pytest.raises(ValueError, match=r"complex64.*torch\.view_as_complex"):
        build([one, torch.zeros(1, dtype=torch.complex64, requires_grad=True)])
    optimizer = build([one])
    with pytest.raises(ValueError, match="must be on one device"):
        optimizer.add_param_group({"params": [torch.zeros(1, device="meta", requires_grad=True)]})
    assert len(optimizer.param_groups) == 1


def test_groups_share_the_global_settings(build: Build) -> None:
    optimizer = build([torch.zeros(1, requires_grad=True)])
    with pytest.raises(
        ValueError, match=r"tolerance_step must be the same in all .* got 7.0\. Give a group only lr and weight_decay"
    ):
        optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "tolerance_step": 7.0})
    optimizer.add_param_group({"params": [torch.zeros(2, requires_grad=True)], "lr": 0.1})
    assert optimizer.param_groups[1]["products"] == optimizer.param_groups[0]["products"]


BAD = [
    ("lr", -1.0, "must be zero or positive, and finite"),
    ("lr", math.nan, "must be zero or positive, and finite"),
    ("lr", "1e-3", "must be zero or positive, and finite"),
    ("weight_decay", -0.1, "must be zero or positive, and finite"),
    ("tolerance_gradient", -1e-9, "must be zero or positive, and finite"),
    ("tolerance_step", math.inf, "must be zero or positive, and finite"),
    ("steps_per_call", 0, "a whole number and at least 1"),
    ("steps_per_call", 2.0, "whole number"),
    ("steps_per_call", True, "whole number"),
    ("lr", True, "must be zero or positive, and finite"),
    ("products", "exact", "'auto' or 'cached' or 'streamed' or 'finite_difference'"),
    ("curvature", "fisher", "'gauss_newton' or 'hessian'"),
]
BAD_DAMPING = [
    ("damping", None, "must be positive and finite"),
    ("damping", 0.0, "must be positive and finite"),
    ("damping", 1e31, "must be between min_damping"),
    ("damping_factor", 1.0, "must be above 1 and finite"),
    ("min_damping", -1.0, "must be positive and finite"),
    ("min_damping", 1e31, "must be at most max_damping"),
]
BAD_HESSIAN_FREE = [
    ("preconditioner", "jacobi", "'nystrom' or 'empirical_fisher' or None"),
    ("max_trials", 0, "a whole number and at least 1"),
    ("rank", 0, "a whole number and at least 1"),
    ("refresh_every", 1.5, "whole number"),
    ("max_iterations", -3, "a whole number and at least 1"),
    ("progress_tolerance", 1.0, r"must be in \[0, 1\)"),
    ("warm_start", -0.1, r"must be in \[0, 1\)"),
    ("warm_start", False, r"must be in \[0, 1\)"),
    ("rank", True, "a whole number and at least 1"),
    ("seed", "a", "whole number"),
    ("seed", 2**64, r"from 0 to 2\*\*64 - 1, got 18446744073709551616"),
]
BAD_DAMPED_NEWTON = [
    ("eigenvalues", "squared", "'absolute' or 'shifted' or 'clamped'"),
    ("blocks", "layer", "'whole' or 'parameter'"),
    ("max_trials", 0, "a whole number and at least 1"),
]
BAD_LEVENBERG_MARQUARDT = [
    *[bad for bad in BAD_DAMPING if bad[0] != "damping_factor"],
    ("curvature", "hessian", '"gauss_newton" for LevenbergMarquardt.*Take HessianFree'),
    ("products", "streamed", '"auto" or "cached" for LevenbergMarquardt.*Take HessianFree'),
    ("solve", "rows", "'auto' or 'samples' or 'parameters'"),
    ("scaling", 1.5, "must be between 0 and 1"),
    ("scaling", True, "must be between 0 and 1"),
    ("acceleration", 1, "must be True or False"),
    ("momentum", 1.0, r"must be in \[0, 1\)"),
    ("rows", 0, "a whole number and at least 1"),
    ("max_trials", 0, "a whole number and at least 1"),
    ("seed", -1, "whole number"),
]
BAD_NEWTON_CG = [
    ("line_search", "wolfe", "'armijo' or 'strong_wolfe'"),
    ("preconditioner", "empirical_fisher", "'nystrom' or None"),
    ("rank", 0, "a whole number and at least 1"),
    ("seed", -1, "whole number"),
    ("max_trials", 0, "a whole number and at least 1"),
    ("max_iterations", 1.5, "whole number"),
]
BAD_TRUST_REGION = [
    ("subproblem", "dogleg", "'steihaug' or 'lanczos' or 'exact'"),
    ("radius", 0.0, "must be positive and finite"),
    ("radius", 1e11, "must be between min_radius"),
    ("min_radius", 1e11, "must be at most max_radius"),
    ("max_trials", 0, "a whole number and at least 1"),
    ("max_iterations", 0, "a whole number and at least 1"),
]
BAD_CUBIC = [
    ("subproblem", "steihaug", "'lanczos' or 'exact'"),
    ("sigma", 0.0, "must be positive and finite"),
    ("sigma", 1e101, "must be between min_sigma"),
    ("min_sigma", 1e101, "must be at most max_sigma"),
    ("max_trials", 0, "a whole number and at least 1"),
    ("max_iterations", 0, "a whole number and at least 1"),
]
BAD_OF: dict[type[NewtonOptimizer], list[tuple[str, object, str]]] = {
    HessianFree: [*BAD, *BAD_DAMPING, *BAD_HESSIAN_FREE],
    DampedNewton: [*BAD, *BAD_DAMPING, *BAD_DAMPED_NEWTON],
    LevenbergMarquardt: [*BAD, *BAD_LEVENBERG_MARQUARDT],
    NewtonCG: [*BAD, *BAD_NEWTON_CG],
    TrustRegionNewton: [*BAD, *BAD_TRUST_REGION],
    CubicNewton: [*BAD, *BAD_CUBIC],
}


@pytest.mark.parametrize(
    ("kind", "name", "value", "words"),
    [(kind, *bad) for kind, bads in BAD_OF.items() for bad in bads],
)
def test_wrong_settings_are_named(kind: type[NewtonOptimizer], name: str, value: object, words: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){name}.*{words}"):
        kind([torch.zeros(1, requires_grad=True)], **{name: value})  # type: ignore[arg-type]


def test_settings_changed_later_are_checked_too(build: Build) -> None:
    training = Training()
    first, *others = training.model.parameters()
    optimizer = build([{"params": [first]}, {"params": others}])
    before = training.flat()
    wrong = [
        *BAD,
        ("weight_decay", math.nan, "must be zero or positive, and finite"),
        ("max_trials", 0, "a whole number and at least 1"),
    ]
    for name, value, words in wrong:
        group = optimizer.param_groups[name in ("lr", "weight_decay")]
        kept, group[name] = group[name], value
        with pytest.raises(ValueError, match=f"(?s){name}.*{words}"):
            optimizer.step(training.closure)
        group[name] = kept
    optimizer.load_state_dict(optimizer.state_dict())  # torch adds a setting of its own to the defaults then
    optimizer.param_groups[1]["tolerance_step"] = 7.0
    with pytest.raises(ValueError, match=r"tolerance_step must be the same in all parameter groups"):
        optimizer.step(training.closure)
    assert training.forwards == 0 and torch.equal(training.flat(), before)
    assert optimizer.last_step is None


def test_a_schedule_may_end_below_zero_by_rounding() -> None:
    theta = torch.ones(1, requires_grad=True)
    optimizer = DampedNewton([theta])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.3, 0.0, 3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = theta.square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
        schedule.step()
    assert optimizer.param_groups[0]["lr"] < 0.0
    before = theta.detach().clone()
    optimizer.step(closure)
    assert optimizer.last_step.reason == "the learning rate is zero" and torch.equal(theta, before)


def test_the_running_control_is_in_the_state() -> None:
    training = Training()
    first, *others = training.model.parameters()
    optimizer = DampedNewton([first, *others])
    optimizer.step(training.closure)
    optimizer.state[first]["damping"] = 100.0
    optimizer.step(training.closure)
    assert optimizer.last_step.damping == 100.0
