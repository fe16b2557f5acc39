"""A measurement of a loss's curvature: its interface, the point it is taken at, and how a list of them is taken."""

from __future__ import annotations

import math
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from newtonopt.checks import check_choice, check_positive, check_prefix, check_seed, check_share, check_whole, shown
from newtonopt.closure.evaluation import Evaluation, Known, Products, Verdict, check_products
from newtonopt.closure.evaluation import Matrix as Checked
from newtonopt.closure.isolation import UnprotectedError
from newtonopt.closure.objective import Objective, ParametersMovedError
from newtonopt.curvature.eigenvalues.extreme import Spectrum
from newtonopt.curvature.measurements.course import EDGE, Course
from newtonopt.curvature.showing import html_table, text_table, written
from newtonopt.operators.linear_operator import LinearOperator
from newtonopt.operators.matrices import gauss_newton, hessian
from newtonopt.operators.verification import examine_one_sided
from newtonopt.vectors.flat import trained_parameters
from newtonopt.vectors.scaling import InRange, dot, scale_of, times_power

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Matrix = Literal["hessian", "gauss_newton"]
Result = TypeVar("Result")

# Products for a measurement of the whole spectrum (more where the eigenvalues may have more), and the fewest that say
# anything about it.
_WHOLE_PRODUCTS, _LEAST_PRODUCTS = 100, 10

# Share of the tolerance to which one-sided differences must agree with exact products.
_DIFFERENCED = 0.5

# A run has diverged where its loss is this many times the lowest so far, and has lost this share of what it had gained.
# The first alone would call each bump in a loss near zero a divergence; the second alone, noise near the start.
_TIMES, _LOST = 10.0, 0.5

# Groups that the tags of this library's measurements have beside those under the prefix itself.
GROUPS = ("bookkeeping", "more")


@dataclass(frozen=True)
class Tag:
    """The name of a value in a log.

    Attributes:
        name: Name without the prefix. A word in capitals stands for a number (RANK) or a name (PART).
        unit: Unit of the value, in terms of the loss's unit L and the parameters' unit θ; empty for a flag or a count.
        description: Meaning of the value, for the table in docs/monitor.md.
        group: The value's group of tags, beside those under the prefix: "bookkeeping" makes the tag
            `curvature-bookkeeping/products`. Default "": `curvature/lambda_max`.

    Example:
        >>> from newtonopt.curvature import Tag
        >>> Tag("lambda_RANK", "L / θ²", "the next largest eigenvalues").fits("lambda_2")
        True

    See Also:
        - `Measurement`: has tags.
        - `Chart`: shows values by their names.
        - `docs/monitor.md`: a table of all tags.
    """

    name: str
    unit: str
    description: str
    group: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.group, str) or not re.fullmatch(r"\w*", self.group):
            raise ValueError(
                f"group must consist of letters, digits and '_', got {shown(self.group)}. Write 'bookkeeping', for "
                "example."
            )

    def folder(self, prefix: str) -> str:
        """Return what stands before the name in a log: the prefix, with the group behind it."""
        # TensorBoard sorts "curvature-bookkeeping" after "curvature", but "curvature_bookkeeping" before it.
        return f"{prefix}-{self.group}" if self.group else prefix

    def fits(self, name: str) -> bool:
        """Return whether a value of that name belongs to this tag."""
        pattern = re.sub("[A-Z]+", ".+", re.escape(self.name).replace("RANK", r"\d+"))
        return re.fullmatch(pattern, name) is not None


@dataclass(frozen=True)
class Chart:
    """A chart on TensorBoard's custom-scalars page.

    Attributes:
        title: Title, another one for each chart.
        patterns: Regular expressions of the values' names, the same in every run, so that TensorBoard merges the charts
            of several runs. The chart appears once each of them matches a value.
        margin: Whether the chart shows a value with its interval. `patterns` are then the names of the value, the lower
            and the upper end. Default False: one line for each value.
        more: Whether the chart belongs in the second category, which is closed at first, for what is looked at less
            often. Default False.
        unless: Regular expression of names; the chart is left out where it matches a value. Default "": never.

    Example:
        >>> from newtonopt.curvature import Chart
        >>> chart = Chart("Eigenvalues", ("lambda_(max|[0-9]+)",))
        >>> chart.names(["lambda_max", "lambda_2", "sharpness"])
        ['lambda_max', 'lambda_2']
        >>> chart.names(["sharpness"])
        []

    See Also:
        - `Measurement`: has charts.
        - `Tag`: the name of a value.
        - `docs/own_measurement.md`: a measurement with a chart.
    """

    title: str
    patterns: tuple[str, ...]
    margin: bool = False
    more: bool = False
    unless: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.patterns, (tuple, list)):
            raise TypeError(
                f"patterns must be a tuple, got {shown(self.patterns)}. Write ('lambda_max',), for example."
            )

    def names(self, known: Collection[str]) -> list[str]:
        """Return which of the known names the chart shows; none of them if a pattern matches none."""
        if self.unless and any(re.fullmatch(self.unless, name) for name in known):
            return []
        matches = [[name for name in known if re.fullmatch(pattern, name)] for pattern in self.patterns]
        return [name for found in matches for name in found] if all(matches) else []


@dataclass(frozen=True, eq=False)
class Histogram:
    """A histogram with its bars given.

    Attributes:
        low: Smallest value counted.
        high: Largest value counted.
        edges: Ends of the bars `(bars + 1,)`, ascending, float64 on the CPU.
        heights: Heights of the bars `(bars,)`, float64 on the CPU.

    Example:
        >>> import torch
        >>> from newtonopt.curvature import Histogram
        >>> Histogram(0.0, 2.0, torch.tensor([0.0, 1.0, 2.0]), torch.tensor([5.0, 1.0])).heights.tolist()
        [5.0, 1.0]

    See Also:
        - `Measurement.histograms()`: returns them.
        - `Density`: a measurement that has one.
        - `docs/own_measurement.md`: how the parts of a measurement fit together.
    """

    low: float
    high: float
    edges: Tensor = field(repr=False)
    heights: Tensor = field(repr=False)


class UnmeasurableError(Exception):
    """Raised by `Measurement.measure` where there is nothing to measure here, with the reason for the user.

    The other measurements are taken all the same. `Measured.in_words` gives the reason, and `CurvatureMonitor` warns
    once.

    Args:
        reason: Sentence that says why.

    Example:
        >>> import torch
        >>> from newtonopt.curvature import Preconditioned, measure
        >>> adam = torch.optim.Adam([w := torch.ones(2, requires_grad=True)])
        >>> found = measure(lambda: w.square().sum(), [w], adam, measurements=[Preconditioned()])
        >>> print(found.in_words().splitlines()[-2][:82])
        Preconditioned is not measured: optimizer must have a state (exp_avg_sq) for each

    See Also:
        - `Measurement.measure()`: raises it.
        - `Measured.unmeasurable()`: the reasons, after the fact.
        - `docs/own_measurement.md`: how the parts of a measurement fit together.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)


class Measurement(ABC, Generic[Result]):
    """Something to measure of a loss's curvature: settings, computation, tags, charts, sentences and figures.

    A subclass is a frozen dataclass whose fields are its settings. It must define `tags`, `measure` and `values`; the
    rest is optional. `measure` and `CurvatureMonitor` take a list of measurements, with at most one of each class.

    Attributes:
        tags: The values' tags.
        charts: Charts on TensorBoard's custom-scalars page. Default: none.
        uses_matrix: Whether `measure` forms products with `view.matrix`. Default True. Measurements that do not are
            taken last, when the graph behind the matrix has been freed.
        uses_quotient: Whether `measure` reads `view.quotient`, which costs one product. Default False.
        leads: Whether its verdict and its sentences stand before those of the others. Default False.

    Example:
        >>> import torch
        >>> from newtonopt.curvature import ExtremeEigenvalues, Measurement, Tag, measure
        >>> class Gap(Measurement[float]):
        ...     tags = (Tag("gap", "L / θ²", "the largest eigenvalue less the second"),)
        ...     def measure(self, view):
        ...         spectrum = view.of(ExtremeEigenvalues)
        ...         return None if spectrum is None else spectrum.top[0].value - spectrum.top[1].value
        ...     def values(self, result):
        ...         return {"gap": result}
        >>> w = torch.ones(2, dtype=torch.float64, requires_grad=True)
        >>> found = measure(lambda: w[0] ** 2 + 3 * w[1] ** 2, [w], measurements=[Gap()])
        >>> round(found["curvature/gap"], 6)
        4.0

    See Also:
        - `View`: what a measurement is given.
        - `Tag`, `Chart`, `Histogram`: what it shows.
        - `measure()`, `CurvatureMonitor`: what runs it.
        - `docs/own_measurement.md`: one written step by step.
    """

    tags: ClassVar[tuple[Tag, ...]]
    charts: ClassVar[tuple[Chart, ...]] = ()
    uses_matrix: ClassVar[bool] = True
    uses_quotient: ClassVar[bool] = False
    leads: ClassVar[bool] = False

    @abstractmethod
    def measure(self, view: View) -> Result | None:
        """Return the result at the point under view; None where the budget is too small for it.

        Raises:
            UnmeasurableError: There is nothing to measure here.
        """

    @abstractmethod
    def values(self, result: Result) -> Mapping[str, float]:
        """Return the values to log, by their tags' names. Values that are not finite are left out of the log."""

    def verdict(self, result: Result, measured: Measured) -> str:
        """Return a few words for the first line of the text, such as "not at a minimum"; empty: none."""
        return ""

    def sentences(self, result: Result, measured: Measured) -> Sequence[str]:
        """Return sentences that say what the result means, and what to do about it.

        Args:
            result: Result of `measure`.
            measured: The results of all measurements.
        """
        return ()

    def figures(self, result: Result) -> Mapping[str, Figure]:
        """Return figures of matplotlib's by their tags' names. They must not be pyplot's, which would keep them."""
        return {}

    def histograms(self, result: Result) -> Mapping[str, Histogram]:
        """Return histograms by their tags' names."""
        return {}

    def spectra(self, result: Result) -> Sequence[Spectrum]:
        """Return the eigenvalues whose convergence `curvature-bookkeeping/converged` reports."""
        return ()

    def differenced_along(self, result: Result | None, view: View) -> Sequence[Tensor] | None:
        """Return the directions `(n,)` along which one-sided differences of gradients must agree with exact products,
        so that the next measurements may track this result by them; None (default): `measure` needs exact products.

        Where one measurement of the list needs exact products, all have them.

        Args:
            result: Result of `measure`, from exact products; None where there is none.
            view: The point where it was measured.
        """
        return None

    def check_list(self, measurements: Sequence[Measurement[Any]]) -> None:
        """Raise ValueError if this cannot be measured as one of these measurements."""
        return

    def check_model(self, names: Sequence[str], size: int | None) -> None:
        """Raise ValueError if this cannot be measured for a model. `CurvatureMonitor` calls it before training.

        Args:
            names: Names of the parameters.
            size: How many entries they have together; None if it is not known yet.
        """
        return


@dataclass(frozen=True)
class Plan:
    """The measurements to take and their budget: the arguments of `measure`, checked."""

    measurements: tuple[Measurement[Any], ...]
    curvature: Matrix = "hessian"
    products: Products = "auto"
    tolerance: float = 1e-2
    max_products: int = 100
    max_seconds: float | None = None
    seed: int = 0
    prefix: str = "curvature"

    def __post_init__(self) -> None:
        for measurement in self.measurements:
            measurement.check_list(self.measurements)
        check_choice("curvature", self.curvature, get_args(Matrix))
        check_products(self.products)
        check_share("tolerance", self.tolerance)
        check_whole("max_products", self.max_products, 1)
        if self.max_seconds is not None:
            check_positive("max_seconds", self.max_seconds)
        check_seed(self.seed)
        check_prefix(self.prefix)
        if self.prefix.endswith(tuple(f"-{group}" for group in GROUPS)):
            raise ValueError(
                f"prefix must not end like a group of tags (-{', -'.join(GROUPS)}), got {shown(self.prefix)}. Write "
                "'curvature', for example."
            )

    def tag_of(self, name: str) -> str:
        """Return the tag of a value: its name behind the prefix and the group of its tag, if it has one."""
        tags = (*COST_TAGS, *(tag for measurement in self.measurements for tag in measurement.tags))
        folder = next((tag.folder(self.prefix) for tag in tags if tag.fits(name)), self.prefix)
        return f"{folder}/{name}"


@dataclass(frozen=True)
class Clock:
    """The time left, in products; the same on all processes.

    Attributes:
        began: When the measuring began, by `time.perf_counter`.
        limit: Seconds it may take; None: no limit.
        product: Seconds that one product takes.
        device: Device on which processes exchange what they have left.
    """

    began: float
    limit: float | None
    product: float
    device: torch.device

    def affordable(self, most: int) -> int:
        """Return how many products there is time for, `most` at most."""
        if self.limit is None:
            return most
        return max(0, min(most, int(self._least((self.limit - self._spent()) / self.product))))

    def has(self, seconds: float) -> bool:
        """Return whether there are so many seconds left."""
        return self.limit is None or self._least(self.limit - self._spent() - seconds) >= 0.0

    def _spent(self) -> float:
        return time.perf_counter() - self.began

    def _least(self, value: float) -> float:
        """Return the smallest value of all processes."""
        least = torch.tensor(value, dtype=torch.float64, device=self.device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(least, dist.ReduceOp.MIN)
        return float(least)


@dataclass(frozen=True, eq=False)
class View:
    """The point at which measurements are taken, and what is known there.

    Attributes:
        closure: The user's closure.
        objective: The closure as a function of the parameters, for losses and gradients nearby.
        loss: Loss at the point.
        gradient: Gradient there `(n,)`.
        quotient: Rayleigh quotient `g'Ag / g'g` of the gradient g, hence a lower bound on the largest eigenvalue; None
            where the gradient is zero, or where neither a measurement nor a time limit asked for its product.
        params: The parameters that are trained.
        named: Pairs of the parameters' names and them; empty where the names are not known.
        optimizers: The optimizers given.
        plan: All settings, with the measurements.
        clock: The time left.
        last: Results of the last measuring of this run; None: the first, or one that starts at random.
        weight: Weight of this process in the mean over several, as for `evaluate`.
        form: How further products are formed.
        operator: The curvature matrix; None once the graph behind it has been freed.
        live: The evaluation that the matrix belongs to; None once its graph has been freed.
        lenient: Whether a measurement that raises an error is left out, instead of ending all.
        differenced: Whether products are one-sided differences, which are accurate enough to track eigenvalues, and for
            nothing else.
        taken: Results so far by the class of their measurement.
        reasons: Why there is nothing to measure, by the class of the measurement.
        failures: The error's message of each measurement that was left out for it, by its class.

    Example:
        >>> import torch
        >>> from newtonopt.curvature import Measurement, Tag, measure
        >>> class Norm(Measurement[float]):
        ...     tags = (Tag("gradient_norm", "L / θ", "the norm of the gradient"),)
        ...     uses_matrix = False
        ...     def measure(self, view):
        ...         return float(view.gradient.norm())
        ...     def values(self, result):
        ...         return {"gradient_norm": result}
        >>> w = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> found = measure(lambda: 0.5 * w.square().sum(), [w], measurements=[Norm()])
        >>> found["curvature/gradient_norm"]
        5.0

    See Also:
        - `Measurement`: what takes it.
        - `Objective`: losses and gradients nearby.
        - `docs/own_measurement.md`: one written step by step.
    """

    closure: Callable[[], Any]
    objective: Objective
    loss: float
    gradient: Tensor
    quotient: float | None
    params: Sequence[Tensor]
    named: Sequence[tuple[str, Tensor]]
    optimizers: Sequence[Optimizer]
    plan: Plan
    clock: Clock
    last: Measured | None
    weight: float | None
    form: Products
    operator: LinearOperator | None
    live: Evaluation | None
    lenient: bool = False
    differenced: bool = False
    taken: dict[type, Any] = field(default_factory=dict)
    reasons: dict[type, str] = field(default_factory=dict)
    failures: dict[type, str] = field(default_factory=dict)

    @property
    def matrix(self) -> LinearOperator:
        """The curvature matrix at the point, for a measurement that says `uses_matrix`.

        Raises:
            RuntimeError: The graph behind the matrix has been freed.
        """
        if self.operator is None:
            raise RuntimeError(_FREED.format("matrix"))
        return self.operator

    @property
    def evaluation(self) -> Evaluation:
        """The evaluation at the point, with its graph, for a measurement that says `uses_matrix`.

        Raises:
            RuntimeError: The graph has been freed.
        """
        if self.live is None:
            raise RuntimeError(_FREED.format("evaluation"))
        return self.live

    @property
    def training(self) -> list[Optimizer]:
        """The optimizers that train at least one of the parameters."""
        return training(self.optimizers, self.params)

    def asks_for(self, kind: type[Measurement[Any]]) -> bool:
        """Return whether a measurement of that class is among those asked for."""
        return any(isinstance(measurement, kind) for measurement in self.plan.measurements)

    def of(self, kind: type[Measurement[Result]]) -> Result | None:
        """Return the result of another measurement, which is taken now if it has not been taken yet.

        Args:
            kind: Class of the measurement.

        Returns:
            Its result; None where it was not asked for, or has none.

        Raises:
            RuntimeError: That measurement asks for the result of the one that asks.
        """
        for measurement in self.plan.measurements:
            if isinstance(measurement, kind):
                found: Result | None = self.take(measurement)
                return found
        return None

    def before(self, kind: type[Measurement[Result]]) -> Result | None:
        """Return the result that a measurement of that class had the last time; None where there is none."""
        return None if self.last is None else self.last.of(kind)

    def take(self, measurement: Measurement[Result]) -> Result | None:
        """Return the result of a measurement, which is computed once."""
        kind = type(measurement)
        if kind not in self.taken:
            self.taken[kind] = _PENDING
            self.taken[kind] = self.attempt(kind, partial(measurement.measure, self))
        if self.taken[kind] is _PENDING:
            raise RuntimeError(
                f"The measurements depend on each other in a cycle, and {kind.__name__} is part of it. Let one of them "
                "use the other's last result: view.before(...)."
            )
        result: Result | None = self.taken[kind]
        return result

    def attempt(self, kind: type, compute: Callable[[], Result | None]) -> Result | None:
        """Return what a measurement computes; None where it has nothing to measure, or is left out for its error."""
        try:
            return compute()
        except UnmeasurableError as error:
            self.reasons[kind] = str(error)
        except (UnprotectedError, ParametersMovedError):
            raise  # the other measurements would change training, or belong to another point
        except Exception as error:
            if self.differenced:
                raise  # `take` starts again, with exact products
            self._leave_out(kind, error)
        return None

    def _leave_out(self, kind: type, error: Exception) -> None:
        """Note why a measurement is left out; raise its error if that is not allowed."""
        # The message alone, for an error keeps alive all that its frames refer to.
        unclear = isinstance(error, _MISTAKES) or not str(error)
        message = f"{kind.__name__} failed with {type(error).__name__}: {error}." if unclear else str(error)
        if not self.lenient and unclear:
            raise RuntimeError(message) from error
        if not self.lenient:
            raise error
        self.failures[kind] = message

    def affordable(self, most: int) -> int:
        """Return how many products (or gradients or losses) there is time for, `most` at most."""
        return self.clock.affordable(most)

    def has_time(self, seconds: float) -> bool:
        """Return whether there is that much time left."""
        return self.clock.has(seconds)

    def affordable_for_whole_spectrum(self) -> int:
        """Return how many products a measurement of all eigenvalues may take: 100, `max_products` where that is more,
        and none where there is time for fewer than ten.
        """
        budget = self.affordable(max(_WHOLE_PRODUCTS, self.plan.max_products))
        return budget if budget >= _LEAST_PRODUCTS else 0


_PENDING = object()
_FREED = "The {} has been freed. Set uses_matrix = True in the class of the measurement."
# Errors that a mistake in a measurement's class raises, and whose text does not name the class.
_MISTAKES = (AssertionError, AttributeError, LookupError, TypeError, ZeroDivisionError)

# Values that every list of measurements logs beside their own.
COST_TAGS = (
    Tag(
        "converged",
        "",
        "1: all intervals, those of layers and of the preconditioned matrix included, are as narrow as `tolerance`; "
        "0: the budget ended first, or tracking stopped at 10 %",
        "bookkeeping",
    ),
    Tag(
        "products",
        "",
        "curvature products, including those for [checking them](setups.md#how-products-are-checked) but not those "
        "for the sharpness",
        "bookkeeping",
    ),
    Tag("seconds", "s", "duration of the measurement", "bookkeeping"),
)
COST_CHART = Chart("Products", ("products",), more=True)


@dataclass(frozen=True)
class Losses:
    """The losses of a run so far.

    Attributes:
        first: The first one.
        lowest: The lowest one.
        now: The loss at the point that was measured.

    Example:
        >>> from newtonopt.curvature.measurements.measurement import Losses
        >>> Losses(first=2.3, lowest=0.1, now=36.0).diverged, Losses(first=2.3, lowest=0.001, now=0.05).diverged
        (True, False)
    """

    first: float
    lowest: float
    now: float

    @property
    def diverged(self) -> bool:
        """Whether the loss is not finite, or ten times its lowest with half or more of what it had fallen lost.

        For a lowest loss of zero or less, ten times it stands for a rise by nine times its size.
        """
        if not math.isfinite(self.now):
            return True
        rise, gain = self.now - self.lowest, self.first - self.lowest
        return rise > 0.0 and rise >= max((_TIMES - 1.0) * abs(self.lowest), _LOST * gain)

    def then(self, loss: float) -> Losses:
        """Return the losses with a further one."""
        return Losses(self.first, min(self.lowest, loss), loss)

    def in_words(self) -> str:
        """Return the loss beside the lowest one."""
        if not math.isfinite(self.now):
            return "the loss is not finite"
        if self.lowest > 0.0:
            return f"the loss is {written(self.now, 3)}, {written(self.now / self.lowest, 2)} times its lowest so far"
        return f"the loss is {written(self.now, 3)}, and {written(self.lowest, 3)} was its lowest so far"


# What to do where a run has diverged, whose curvature, often none, would suggest a longer step.
_DIVERGED = (
    "Curvature says little here. Go back to an earlier checkpoint, or restart with a lower learning rate or a warm-up."
)


@dataclass(frozen=True, eq=False, repr=False)
class Measured(Mapping[str, float]):
    """Values by tag, such as `{"curvature/lambda_max": 12.4, ...}`, and the results they come from.

    Attributes:
        plan: Measurements and budget asked for.
        numbers: The values by tag.
        form: How products should be formed the next time: by differences where that was found to be necessary.
        verdicts: Verdicts of the checks of products, for the measuring that follows.
        doubt: Why the products cannot be vouched for; empty where they can.
        by_class: Results by the class of their measurement.
        reasons: Why there is nothing to measure, by the class of the measurement.
        failures: The error's message of each measurement that was left out for it, by its class.
        losses: The loss here and earlier in the run; None: not known.
        course: How the run has gone so far, as `CurvatureMonitor`, or `measure` with `last`, has followed it.

    Example:
        >>> import torch
        >>> from newtonopt.curvature import ExtremeEigenvalues, measure
        >>> w = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> found = measure(lambda: w[0] ** 2 + 3 * w[1] ** 2, [w])
        >>> round(found["curvature/lambda_max"], 3) == round(found.read("lambda_max"), 3) == 6.0
        True
        >>> [round(entry.value, 3) for entry in found.of(ExtremeEigenvalues).top]
        [6.0, 2.0]

    See Also:
        - `measure()`: returns it.
        - `Tag`: the name, unit and meaning of a value.
        - `docs/monitor.md`: a table of all tags.
    """

    plan: Plan
    numbers: Mapping[str, float]
    form: Products
    verdicts: Mapping[Checked, Verdict]
    doubt: str
    by_class: Mapping[type, Any]
    reasons: Mapping[type, str]
    failures: Mapping[type, str] = field(default_factory=dict)
    losses: Losses | None = None
    course: Course = field(default_factory=partial(Course, from_start=False))

    def __getitem__(self, tag: str) -> float:
        return self.numbers[tag]

    def __iter__(self) -> Iterator[str]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __repr__(self) -> str:
        return text_table("Measured", self._rows(), self.in_words().splitlines())

    def _repr_html_(self) -> str:
        return html_table("Measured", self._rows(), self.in_words().splitlines())

    def _rows(self) -> list[tuple[str, str, str]]:
        """Return names, values and units."""
        tags = [*(tag for measurement in self.plan.measurements for tag in measurement.tags), *COST_TAGS]
        units = {name: next((tag.unit for tag in tags if tag.fits(name)), "") for name in self.names()}
        values = zip(units.items(), self.values(), strict=True)
        return [(name, f"{value:.6g}", unit) for (name, unit), value in values]

    def read(self, name: str) -> float | None:
        """Return a value by its name, which is the last part of its tag; None if it was not measured."""
        return self.get(self.plan.tag_of(name))

    def names(self) -> list[str]:
        """Return the names of all values: their tags without the prefix and the group."""
        return [tag.removeprefix(self.plan.prefix).partition("/")[2] for tag in self]

    def of(self, kind: type[Measurement[Result]]) -> Result | None:
        """Return the result of the measurement of that class; None where it was not asked for, or has none."""
        return next((result for measurement, result in self.results() if isinstance(measurement, kind)), None)

    def results(self) -> Iterator[tuple[Measurement[Any], Any]]:
        """Yield each measurement that has a result, and the result."""
        for measurement in self.plan.measurements:
            result = self.by_class.get(type(measurement))
            if result is not None:
                yield measurement, result

    def charts(self) -> list[Chart]:
        """Return the charts of all measurements."""
        return [*(chart for measurement in self.plan.measurements for chart in measurement.charts), COST_CHART]

    def unmeasurable(self) -> dict[str, str]:
        """Return by the name of its class why a measurement had nothing to measure."""
        return {kind.__name__: reason for kind, reason in self.reasons.items()}

    def failed(self) -> dict[str, str]:
        """Return by the name of its class the message of the error for which a measurement was left out."""
        return {kind.__name__: message for kind, message in self.failures.items()}

    @property
    def differenced(self) -> bool:
        """Whether one-sided differences of gradients are accurate enough to track these results."""
        return "hessian" in self.verdicts and not self.verdicts["hessian"].manner.central

    def suits(self, plan: Plan) -> bool:
        """Return whether differences that are accurate enough for these results are so for another plan."""
        kinds, known = ({type(m) for m in p.measurements} for p in (plan, self.plan))
        same = (plan.products, plan.curvature, plan.tolerance) == ("auto", "hessian", self.plan.tolerance)
        return same and kinds <= known

    @property
    def diverged(self) -> bool:
        """Whether the loss is not finite, or has risen far above its lowest so far; False where it is not known."""
        return self.losses is not None and self.losses.diverged

    @property
    def troubled(self) -> bool:
        """Whether steps overshoot, or the losses suggest that they have, so that longer steps would not help."""
        ratio = self.read("stability_ratio")
        overshoots = ratio is not None and ratio >= EDGE[0]
        return self.diverged or overshoots or self.course.overshoots

    def in_words(self) -> str:
        """Return what the values mean and what to do, a line for each measurement, after the verdict in one line.

        Where the run has diverged, the measurements say nothing.
        """
        if self.losses is not None and self.losses.diverged:
            lines = [f"In short: diverged: {self.losses.in_words()}.", _DIVERGED]
            earlier = self.course.earlier(self.read("stability_ratio"))
            lines += [f"The stability ratio was {earlier}."] if earlier else []
            lines += [f"Nothing is certified: {self.doubt}"] if self.doubt else []
        else:
            lines = self._meaning()
        lines += [f"{name} is not measured: {reason}" for name, reason in self.unmeasurable().items()]
        lines += [f"{name} could not be measured: {message}" for name, message in self.failed().items()]
        certified = self.read("certified")
        if certified == 0.0 and not self.doubt and self.read("asymmetry") is None:
            lines.append(
                "This measurement tracked the last one's eigenvectors. CurvatureMonitor certifies each with "
                "Budget(certify_every=1), and measure with certify=True."
            )
        if certified == 1.0 and self.read("converged") == 0.0:
            lines.append(
                f"Some intervals are wider than {written(self.plan.tolerance, 2)} of their value: raise max_products "
                f"above {self.plan.max_products} to narrow them."
            )
        products, seconds = self.read("products"), self.read("seconds")
        if products is not None and seconds is not None:
            lines.append(f"Measured with {products:.0f} products in {written(seconds, 2)} s.")
        return "\n".join(lines)

    def _meaning(self) -> list[str]:
        """Return the verdict in one line, and the measurements' sentences."""
        found = sorted(self.results(), key=lambda entry: not entry[0].leads)
        verdicts = [measurement.verdict(result, self) for measurement, result in found]
        trouble = self.course.verdict()
        if trouble:
            verdicts.insert(0, trouble)
        verdict = "; ".join(filter(None, verdicts))
        said = [
            (measurement.leads, words) for measurement, result in found for words in measurement.sentences(result, self)
        ]
        return [
            *([f"In short: {verdict}."] if verdict else []),
            *([self.course.advice()] if trouble else []),
            *(words for leads, words in said if leads),
            *([f"Nothing is certified: {self.doubt}"] if self.doubt else []),
            *(words for leads, words in said if not leads),
        ]


def take(
    closure: Callable[[], Any],
    params: Iterable[Tensor],
    optimizers: Sequence[Optimizer],
    plan: Plan,
    weight: float | None = None,
    named: Sequence[tuple[str, Tensor]] = (),
    last: Measured | None = None,
    lenient: bool = False,
    losses: Losses | None = None,
    certify: bool = False,
    step_losses: Sequence[float] | None = None,
) -> Measured:
    """Take the measurements of a plan, whose settings have been checked, at the parameters.

    Args:
        closure: Computes the loss, as for `evaluate`.
        params: The parameters.
        optimizers: Optimizers that train some of them.
        plan: Measurements to take, and their budget.
        weight: Weight of this process in the mean over several, as for `evaluate`.
        named: Pairs of the parameters' names and them; empty if the names are not known.
        last: The last results, to track; None: start at random.
        lenient: Whether a measurement that raises an error is left out while others succeed. Default False. Errors of
            the loss and the gradient, parameters that the closure moves, and state that cannot be put back end all.
        losses: The losses of the run before; None (default): as `last` has them, or none.
        certify: Whether to start at random in spite of `last`, of which the losses are kept. Default False.
        step_losses: Losses of the steps since then; None (default): the measured one alone.

    Returns:
        Their results.

    Raises:
        ValueError: A value has a name that is none of its measurement's tags.
        FloatingPointError: The loss, the gradient or a product is not finite.
        RuntimeError: All measurements that have anything to measure raise errors.
    """
    settings = (closure, trained_parameters(params), optimizers, plan, weight, named)
    began = time.perf_counter()
    before = last.losses if losses is None and last is not None else losses
    course = Course() if last is None else last.course
    tracked, found = None if certify else last, None
    if tracked is not None and tracked.differenced and tracked.suits(plan):
        try:
            found = _take(*settings, tracked, lenient, before, began, differenced=True)
        except (UnprotectedError, ParametersMovedError):
            raise
        except Exception:  # tracking has lost an eigenvector, or there are no differences here
            tracked = None
    if found is None:
        found = _take(*settings, tracked, lenient, before, began, differenced=False)
    here = [] if found.losses is None else [found.losses.now]
    course = course.then(here if step_losses is None else step_losses)
    return replace(found, course=course.with_ratio(found.read("stability_ratio")))


def _take(
    closure: Callable[[], Any],
    params: Sequence[Tensor],
    optimizers: Sequence[Optimizer],
    plan: Plan,
    weight: float | None,
    named: Sequence[tuple[str, Tensor]],
    last: Measured | None,
    lenient: bool,
    before: Losses | None,
    began: float,
    *,
    differenced: bool,
) -> Measured:
    """Take the measurements with exact products, or with the one-sided differences that the last ones allow."""
    products: Products = "finite_difference" if differenced else plan.products
    verdicts = {} if last is None else last.verdicts
    verdicts = {matrix: verdict for matrix, verdict in verdicts.items() if differenced or verdict.manner.central}
    known = Known(verdicts, replayed=differenced)
    twice = plan.curvature == "hessian"
    objective = Objective(closure, params, products=products, weight=weight, known=known, twice=twice)
    evaluation = objective.evaluate()
    if last is None:
        objective.check_replay(evaluation)
    A = hessian(evaluation) if plan.curvature == "hessian" else gauss_newton(evaluation)
    if not math.isfinite(float(evaluation.gradient.abs().max())):
        raise FloatingPointError(
            "The gradient is not finite at the parameters, so there is no curvature. Look for a norm, a root or a "
            "logarithm at zero."
        )
    quotient, seconds = None, 0.0
    if plan.max_seconds is not None or any(measurement.uses_quotient for measurement in plan.measurements):
        quotient, seconds = _timed_quotient(A, evaluation.gradient)
    view = View(
        closure,
        objective,
        float(evaluation.loss),
        evaluation.gradient,
        quotient,
        params,
        named,
        optimizers,
        plan,
        Clock(began, plan.max_seconds, seconds, params[0].device),
        last,
        weight,
        plan.products,
        A,
        evaluation,
        lenient,
        differenced,
    )
    # First what needs products, so that their graph can be freed before the loss is computed elsewhere.
    for measurement in plan.measurements:
        if measurement.uses_matrix:
            view.take(measurement)
    rough = _one_sided(view) if last is None else None
    count, doubt = A.products + evaluation.checks + (0 if rough is None else rough.cost), A.trust.doubt
    verdicts = {**evaluation.verdicts, **({} if rough is None else {"hessian": rough})}
    # A closure that has no second derivative now has none the next time.
    lacks = evaluation.form == "finite_difference" and not differenced
    form: Products = "finite_difference" if lacks else plan.products
    del A
    view = replace(view, operator=None, live=None, form=form, differenced=False)
    evaluation.free()
    for measurement in plan.measurements:
        view.take(measurement)
    objective.settle()
    objective.check_restored()
    numbers = _numbers(view)
    if view.failures and all(result is None for result in view.taken.values()):
        raise RuntimeError(next(iter(view.failures.values())))
    numbers["products"], numbers["seconds"] = float(count), time.perf_counter() - began
    numbers = {plan.tag_of(name): value for name, value in numbers.items()}
    here = Losses(view.loss, view.loss, view.loss) if before is None else before.then(view.loss)
    return Measured(plan, numbers, form, verdicts, doubt, view.taken, view.reasons, view.failures, here)


def _one_sided(view: View) -> Verdict | None:
    """Return the verdict on one-sided differences for the measuring that tracks this one; None if they will not do."""
    plan, directions = view.plan, list[Tensor]()
    if plan.products != "auto" or plan.curvature != "hessian":
        return None
    for measurement in plan.measurements:
        if measurement.uses_matrix:
            along = measurement.differenced_along(view.taken[type(measurement)], view)
            if along is None:
                return None
            directions += along
    if not directions:
        return None
    return examine_one_sided(view.evaluation, view.matrix, directions, _DIFFERENCED * plan.tolerance)


def _timed_quotient(A: LinearOperator, gradient: Tensor) -> tuple[float | None, float]:
    """Return g'Ag / g'g, None where g is zero, and the seconds that its product took."""
    began = time.perf_counter()
    # Powers of two taken out of g and A, so that no square underflows.
    matrix, direction = InRange(A), times_power(gradient, -scale_of(gradient))
    along, square = dot(direction, matrix @ direction), dot(direction, direction)
    seconds = time.perf_counter() - began
    return (matrix.back(along / square) if square > 0.0 else None), seconds


def _numbers(view: View) -> dict[str, float]:
    """Return the finite values of all results by name: a chart cannot show others."""
    numbers: dict[str, float] = {}
    spectra: list[Spectrum] = []
    for measurement in view.plan.measurements:
        kind = type(measurement)
        values = view.attempt(kind, partial(_values, measurement, view.taken[kind]))
        if values is None:
            view.taken[kind] = None
            continue
        numbers |= {name: float(value) for name, value in values.items() if math.isfinite(value)}
        spectra += measurement.spectra(view.taken[kind])
    if spectra:
        numbers["converged"] = float(all(spectrum.converged for spectrum in spectra))
    return numbers


def _values(measurement: Measurement[Result], result: Result | None) -> Mapping[str, float] | None:
    """Return the values of a result by their tags' names; None where there is no result."""
    values = None if result is None else measurement.values(result)
    for name in values or ():
        if not any(tag.fits(name) for tag in measurement.tags):
            names = ", ".join(tag.name for tag in measurement.tags)
            raise ValueError(f"values of {type(measurement).__name__} must be among {names}, got {name!r}.")
    return values


def training(optimizers: Sequence[Optimizer], params: Sequence[Tensor]) -> list[Optimizer]:
    """Return the optimizers that train at least one of the parameters."""
    own = {id(p) for p in params}
    return [o for o in optimizers if any(id(p) in own for group in o.param_groups for p in group["params"])]
