"""The loss's curvature, logged while a model trains."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning.pytorch.utilities.types import STEP_OUTPUT
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.optim import SGD, Optimizer

from newtonopt import evaluate, hessian
from newtonopt._checks import check_products
from newtonopt.curvature import Eigenvalue, extreme_eigenvalues, stability_threshold
from newtonopt.curvature import sharpness as measure_sharpness
from newtonopt.evaluation import Products

from .logs import Charts, add_charts, log_values, passes_multiple


class CurvatureMonitor(Callback):
    """Log the extreme eigenvalues of the Hessian, a sharpness measure and the stability threshold during training.

    The loss is that of `training_step` on the first batches that training saw, kept as the probe, weighted by their
    sizes. It is measured in full precision, without autocast, and leaves no trace: parameters, `.grad`, buffers, random
    state, metrics and logs stay as they were to the bit. A measurement that fails warns once and is left out; training
    goes on.

    Values go to every logger, under `curvature/`, and to `trainer.callback_metrics`. TensorBoard's custom-scalars page
    gets a category of charts.

    Args:
        every_n_train_steps: Optimizer steps between measurements, one or more. Default 100.
        top: How many of the largest eigenvalues, one or more. Default 3.
        bottom: How many of the smallest eigenvalues, zero or more. Default 1.
        sharpness: "ball" (default): the worst loss increase at Euclidean distance up to `sharpness_radius`;
            "adaptive_ball": the same with each step relative to its parameter's size (Kwon et al. 2021); None: not
            measured.
        sharpness_radius: Of the ball, above zero. Default 0.05 (Foret et al. 2021).
        mode: "train" (default): the function that training minimises, with Dropout's random numbers held fixed; "eval":
            the model in evaluation mode.
        num_batches: How many batches make the probe, one or more. Default 1.
        products: How curvature products are formed, "auto" (default), "cached", "streamed" or
            "finite_difference": see `evaluate`.
        tolerance: Relative width that an eigenvalue's interval must reach, between 0 and 1. Default 1e-2: a chart shows
            no more.
        max_products: Bound on the eigenvalues' curvature products in one measurement, one or more. Default 100. The
            extreme eigenvalues' intervals are logged as wide as they are then; a further eigenvalue, shown without an
            interval, is left out unless it is known to a tenth.
        seed: Of the random start vectors. Default 0.

    Raises:
        ValueError: A setting out of its range.
    """

    def __init__(
        self,
        every_n_train_steps: int = 100,
        top: int = 3,
        bottom: int = 1,
        sharpness: Literal["ball", "adaptive_ball"] | None = "ball",
        sharpness_radius: float = 0.05,
        mode: Literal["train", "eval"] = "train",
        num_batches: int = 1,
        products: Products = "auto",
        tolerance: float = 1e-2,
        max_products: int = 100,
        seed: int = 0,
    ) -> None:
        for name, value, least in (
            ("every_n_train_steps", every_n_train_steps, 1),
            ("top", top, 1),
            ("bottom", bottom, 0),
            ("num_batches", num_batches, 1),
            ("max_products", max_products, 1),
            ("seed", seed, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}: give a whole number, {least} or more.")
        for name, choice, allowed in (
            ("sharpness", sharpness, ("ball", "adaptive_ball", None)),
            ("mode", mode, ("train", "eval")),
        ):
            if choice not in allowed:
                raise ValueError(f"{name} is {choice!r}: choose {' or '.join(map(repr, allowed))}.")
        if not isinstance(sharpness_radius, (int, float)) or not 0 < sharpness_radius < math.inf:
            raise ValueError(f"sharpness_radius is {sharpness_radius!r}: give a finite number above zero.")
        if not isinstance(tolerance, (int, float)) or not 0 < tolerance < 1:
            raise ValueError(f"tolerance is {tolerance!r}: give a number between 0 and 1.")
        check_products(products)
        self.every_n_train_steps = every_n_train_steps
        self.top = top
        self.bottom = bottom
        self.sharpness = sharpness
        self.sharpness_radius = sharpness_radius
        self.mode = mode
        self.num_batches = num_batches
        self.products: Products = products
        self._way: Products = products
        self.tolerance = tolerance
        self.max_products = max_products
        self.seed = seed
        self._probe: list[tuple[Any, int]] = []
        self._last_step = 0
        self._charts_written = False
        self._warned = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "CurvatureMonitor gets the loss from training_step, which under manual optimization would train the "
                "model: use it with automatic optimization, or call newtonopt.evaluate on a closure of your own."
            )
        self._probe.clear()
        self._way = self.products
        self._charts_written = False
        self._warned = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if len(self._probe) < self.num_batches:
            self._probe.append((_copied(batch), batch_idx))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        due = passes_multiple(self._last_step, trainer.global_step, self.every_n_train_steps)
        self._last_step = trainer.global_step
        if not due or len(self._probe) < self.num_batches:
            return
        try:
            values = self._measure(trainer, pl_module)
        except (RuntimeError, ValueError, ArithmeticError, MisconfigurationException) as error:
            if not self._warned:
                rank_zero_warn(
                    f"CurvatureMonitor could not measure at step {trainer.global_step}, and training goes on: {error}"
                )
            self._warned = True
            return
        log_values(trainer, values)
        if not self._charts_written:
            add_charts(trainer, "Curvature", _charts(values))
            self._charts_written = True

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        began = time.perf_counter()
        params = [p for p in pl_module.parameters() if p.requires_grad]
        sizes = _sizes(self._probe) if len(self._probe) > 1 or trainer.world_size > 1 else [1]

        def closure() -> None:
            for (batch, batch_idx), size in zip(self._probe, sizes, strict=True):
                (_loss(pl_module, batch, batch_idx) * (size / sum(sizes))).backward()

        with _measuring(trainer, pl_module, self.mode):
            evaluation = evaluate(closure, params, products=self._way, weight=sum(sizes))
            H = hessian(evaluation)
            g = evaluation.gradient
            spectrum = extreme_eigenvalues(
                H,
                top=self.top,
                bottom=self.bottom,
                tolerance=self.tolerance,
                max_products=self.max_products,
                seed=self.seed,
            )
            values = {
                **_eigenvalue_tags("lambda_max", "lambda", spectrum.top),
                **_eigenvalue_tags("lambda_min", "lambda_min", spectrum.bottom),
                **_stability_tags(trainer.optimizers, spectrum.top[0].value),
            }
            if bool(g.any()):
                values["curvature/gradient_curvature"] = float(g @ (H @ g) / (g @ g))
            values["curvature/products"] = float(H.products)
            del H
            evaluation.free()
            if evaluation.form == "finite_difference":
                self._way = "finite_difference"  # what has no second derivative now has none the next time
            if self.sharpness is not None:
                ball = measure_sharpness(
                    closure,
                    params,
                    kind=self.sharpness,
                    radius=self.sharpness_radius,
                    seed=self.seed,
                    products=self._way,
                    weight=sum(sizes),
                )
                values["curvature/sharpness"] = ball.value
        values["curvature/seconds"] = time.perf_counter() - began
        return values


def _sizes(probe: Sequence[tuple[Any, int]]) -> list[int]:
    return [extract_batch_size(batch) for batch, _ in probe]


def _copied(batch: Any) -> Any:
    return apply_to_collection(batch, Tensor, lambda t: t.detach().clone())


def _loss(pl_module: LightningModule, batch: Any, batch_idx: int) -> Tensor:
    # As Lightning calls it: `batch_idx` may be left out. A copy, because the step may change its batch in place.
    takes_index = is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)
    output = pl_module.training_step(_copied(batch), *([batch_idx] if takes_index else []))
    loss = output if isinstance(output, Tensor) else (output or {}).get("loss")
    if not isinstance(loss, Tensor):
        raise RuntimeError("training_step returned no loss for the probe batch.")
    return loss


@contextmanager
def _measuring(trainer: Trainer, pl_module: LightningModule, mode: str) -> Iterator[None]:
    """The module in the wanted mode and in its weights' precision: autocast costs a product 4e-3 of relative error."""
    training = [(module, module.training) for module in pl_module.modules()]
    precision = trainer.precision_plugin
    with ExitStack() as stack:
        if not isinstance(precision, MixedPrecision):
            stack.enter_context(precision.train_step_context())
        if mode == "eval":
            pl_module.eval()
        try:
            yield
        finally:
            for module, flag in training:
                module.training = flag


def _eigenvalue_tags(first: str, others: str, eigenvalues: Sequence[Eigenvalue]) -> dict[str, float]:
    """The extreme one with its bounds, the further ones (`lambda_2`, or `lambda_min_2`) without."""
    if not eigenvalues:
        return {}
    extreme = eigenvalues[0]
    further = {f"curvature/{others}_{i}": e.value for i, e in enumerate(eigenvalues[1:], start=2) if _is_known(e)}
    return {
        f"curvature/{first}": extreme.value,
        f"curvature/{first}_lower": extreme.lower,
        f"curvature/{first}_upper": extreme.upper,
        **further,
    }


def _is_known(eigenvalue: Eigenvalue) -> bool:
    """Whether a value that is shown without its bounds can be: they are within a tenth of it."""
    return eigenvalue.upper - eigenvalue.lower <= 0.1 * abs(eigenvalue.value)


def _stability_tags(optimizers: Sequence[Optimizer], largest: float) -> dict[str, float]:
    if not all(isinstance(optimizer, SGD) for optimizer in optimizers):
        return {}  # an optimizer without a threshold on the Hessian's own eigenvalues
    try:
        threshold = min(stability_threshold(optimizer) for optimizer in optimizers)
    except (TypeError, ValueError):
        return {}  # a step that is not SGD's, or one that is never stable
    if not math.isfinite(threshold):
        return {}  # the learning rate is zero, as at the start of a warm-up
    return {"curvature/stability_threshold": threshold, "curvature/stability_ratio": largest / threshold}


def _charts(values: dict[str, float]) -> Charts:
    """The page of what is measured. A multi-line chart's tags are regular expressions, to be ended with $."""
    several = ["curvature/lambda_max$"] + [
        f"{tag}$" for tag in values if tag.startswith("curvature/lambda_") and tag[-1].isdigit()
    ]
    charts: dict[str, tuple[str, list[str]]] = {}
    for title, name in (
        ("Largest eigenvalue, with bounds", "lambda_max"),
        ("Smallest eigenvalue, with bounds", "lambda_min"),
    ):
        if f"curvature/{name}" in values:
            charts[title] = ("Margin", [f"curvature/{name}{end}" for end in ("", "_lower", "_upper")])
    charts["Eigenvalues"] = ("Multiline", several)
    if "curvature/stability_threshold" in values:
        charts["Largest eigenvalue against the stability threshold"] = (
            "Multiline",
            ["curvature/lambda_max$", "curvature/stability_threshold$"],
        )
    if "curvature/sharpness" in values:
        charts["Sharpness"] = ("Multiline", ["curvature/sharpness$"])
    return charts
