"""The 27 nonlinear regression problems of NIST's Statistical Reference Datasets, from the files in nist/.

NIST wrote the files (https://www.itl.nist.gov/div898/strd/nls/nls_main.shtml): each holds the data, two starts, and the
certified least-squares solution to eleven digits, computed in 128-bit arithmetic. The models are written below.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "nist"


@dataclass(frozen=True)
class Regression:
    """A least-squares problem, `min_b |model(x, b) - y|^2`, with its certified solution.

    Attributes:
        name: NIST's name of the problem.
        level: NIST's level of difficulty: Lower, Average or Higher.
        x: Predictor, shape `(observations,)`; `(predictors, observations)` if there are several.
        y: Response, shape `(observations,)`; its logarithm for Nelson, as the model has it.
        starts: The two starts, shape `(2, parameters)`; the first is the harder one.
        certified: Certified parameters, shape `(parameters,)`.
        deviations: Certified standard deviations of the parameters, shape `(parameters,)`.
        squares: Certified residual sum of squares.
        model: `model(m, x, b1, b2, ...)`, the model's values, with the functions of `m`: torch or numpy.
    """

    name: str
    level: str
    x: np.ndarray
    y: np.ndarray
    starts: np.ndarray
    certified: np.ndarray
    deviations: np.ndarray
    squares: float
    model: Callable[..., Any]


def problems() -> list[Regression]:
    """Return all problems, the easy ones first, within a level in NIST's order."""
    return [read(name) for name in MODELS]


def read(name: str) -> Regression:
    """Return one problem.

    Raises:
        ValueError: if the file's tables do not have the numbers of parameters and observations that its text states.
    """
    text = (FOLDER / f"{name}.dat").read_text()
    number = r"(-?\d+(?:\.\d*)?(?:E[+-]?\d+)?)"
    table = np.array(re.findall(rf"^ *b\d+ = +{number} +{number} +{number} +{number}", text, re.MULTILINE), dtype=float)
    # The second line that begins with "Data:" heads the columns; nothing follows them.
    data = np.array([line.split() for line in re.split(r"^Data: +y.*\n", text, flags=re.MULTILINE)[1].splitlines()])
    y, *x = data.astype(float).T
    parameters, observations = (int(_one(rf"(\d+) {what}", text)) for what in ("Parameters", "Observations"))
    if table.shape != (parameters, 4) or len(y) != observations:
        read = f"{len(table)} and {len(y)}"
        raise ValueError(f"{name}.dat must have {parameters} parameters and {observations} observations, got {read}.")
    return Regression(
        name=name,
        level=_one(r"(\w+) Level of Difficulty", text),
        x=np.array(x) if len(x) > 1 else x[0],
        y=np.log(y) if "log[y] =" in text else y,
        starts=table[:, :2].T,
        certified=table[:, 2],
        deviations=table[:, 3],
        squares=float(_one(rf"Residual Sum of Squares: +{number}", text)),
        model=MODELS[name],
    )


def digits(found: np.ndarray, certified: np.ndarray) -> float:
    """Return the log relative error, the number of correct digits of the worst parameter: 0 to 11, NIST's precision."""
    with np.errstate(all="ignore"):
        error = float(np.max(np.abs(found - certified) / np.abs(certified)))
    return min(max(-math.log10(error), 0.0), 11.0) if 0 < error < math.inf else 11.0 * (error == 0)


def _one(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"A file of NIST's must contain {pattern}, got {text!r}.")
    return found[1]


def _rise(m, x, b1, b2):
    return b1 * (1 - m.exp(-b2 * x))


def _decay_over_line(m, x, b1, b2, b3):
    return m.exp(-b1 * x) / (b2 + b3 * x)


def _exponentials(m, x, b1, b2, b3, b4, b5, b6):
    return b1 * m.exp(-b2 * x) + b3 * m.exp(-b4 * x) + b5 * m.exp(-b6 * x)


def _peaks(m, x, b1, b2, b3, b4, b5, b6, b7, b8):
    return b1 * m.exp(-b2 * x) + b3 * m.exp(-((x - b4) ** 2) / b5**2) + b6 * m.exp(-((x - b7) ** 2) / b8**2)


def _cubics(m, x, b1, b2, b3, b4, b5, b6, b7):
    return (b1 + b2 * x + b3 * x**2 + b4 * x**3) / (1 + b5 * x + b6 * x**2 + b7 * x**3)


def _power(m, x, b1, b2):
    return b1 * x**b2


def _misra1b(m, x, b1, b2):
    return b1 * (1 - (1 + b2 * x / 2) ** -2)


def _misra1c(m, x, b1, b2):
    return b1 * (1 - (1 + 2 * b2 * x) ** -0.5)


def _misra1d(m, x, b1, b2):
    return b1 * b2 * x / (1 + b2 * x)


def _kirby(m, x, b1, b2, b3, b4, b5):
    return (b1 + b2 * x + b3 * x**2) / (1 + b4 * x + b5 * x**2)


def _nelson(m, x, b1, b2, b3):
    return b1 - b2 * x[0] * m.exp(-b3 * x[1])


def _mgh17(m, x, b1, b2, b3, b4, b5):
    return b1 + b2 * m.exp(-x * b4) + b3 * m.exp(-x * b5)


def _roszman(m, x, b1, b2, b3, b4):
    return b1 - b2 * x - m.arctan(b3 / (x - b4)) / math.pi


def _enso(m, x, b1, b2, b3, b4, b5, b6, b7, b8, b9):
    turns = 2 * math.pi * x
    annual = b2 * m.cos(turns / 12) + b3 * m.sin(turns / 12)
    first = b5 * m.cos(turns / b4) + b6 * m.sin(turns / b4)
    second = b8 * m.cos(turns / b7) + b9 * m.sin(turns / b7)
    return b1 + annual + first + second


def _mgh09(m, x, b1, b2, b3, b4):
    return b1 * (x**2 + x * b2) / (x**2 + x * b3 + b4)


def _mgh10(m, x, b1, b2, b3):
    return b1 * m.exp(b2 / (x + b3))


def _eckerle(m, x, b1, b2, b3):
    return b1 / b2 * m.exp(-0.5 * ((x - b3) / b2) ** 2)


def _logistic(m, x, b1, b2, b3):
    return b1 / (1 + m.exp(b2 - b3 * x))


def _generalised_logistic(m, x, b1, b2, b3, b4):
    return b1 / (1 + m.exp(b2 - b3 * x)) ** (1 / b4)


def _bennett(m, x, b1, b2, b3):
    return b1 * (b2 + x) ** (-1 / b3)


MODELS: dict[str, Callable[..., Any]] = {
    "Misra1a": _rise,
    "Chwirut2": _decay_over_line,
    "Chwirut1": _decay_over_line,
    "Lanczos3": _exponentials,
    "Gauss1": _peaks,
    "Gauss2": _peaks,
    "DanWood": _power,
    "Misra1b": _misra1b,
    "Kirby2": _kirby,
    "Hahn1": _cubics,
    "Nelson": _nelson,
    "MGH17": _mgh17,
    "Lanczos1": _exponentials,
    "Lanczos2": _exponentials,
    "Gauss3": _peaks,
    "Misra1c": _misra1c,
    "Misra1d": _misra1d,
    "Roszman1": _roszman,
    "ENSO": _enso,
    "MGH09": _mgh09,
    "Thurber": _cubics,
    "BoxBOD": _rise,
    "Rat42": _logistic,
    "MGH10": _mgh10,
    "Eckerle4": _eckerle,
    "Rat43": _generalised_logistic,
    "Bennett5": _bennett,
}
