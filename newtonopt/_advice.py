"""Which remedy fits a loss of which no model output was recorded."""

from __future__ import annotations

from collections.abc import Iterable

_HESSIAN = 'use curvature="hessian"'
_PIECEWISE = f"is piecewise linear, so its Gauss-Newton matrix is zero or undefined: {_HESSIAN}"
_PROBABILITIES = (
    "return logits from the model, without its softmax or sigmoid, and take cross_entropy or "
    "binary_cross_entropy_with_logits of them (skorch: criterion=torch.nn.CrossEntropyLoss)"
)
_ROOT = (
    f"if it is one for all the data, minimise its square, which has the same minimum, by mse_loss; if many: {_HESSIAN}"
)

# By the functions of torch.nn.functional that the closure called.
CALLED: dict[str, str] = {
    "nll_loss": f"was given something else than the logarithm of a softmax over classes: {_PROBABILITIES}",
    "kl_div": "was given something else than the logarithm of a softmax over classes: take log_softmax of the logits",
    "l1_loss": f"{_PIECEWISE}, or use smooth_l1_loss or huber_loss, which are recognised",
    "hinge_embedding_loss": _PIECEWISE,
    "margin_ranking_loss": _PIECEWISE,
    "multi_margin_loss": f"{_PIECEWISE}, or use cross_entropy of the same scores",
    "multilabel_margin_loss": f"{_PIECEWISE}, or use multilabel_soft_margin_loss, which is recognised",
    "triplet_margin_loss": f"is not convex in the embeddings: {_HESSIAN}",
    "triplet_margin_with_distance_loss": f"is not convex in the embeddings: {_HESSIAN}",
    "cosine_embedding_loss": f"is not convex in the embeddings: {_HESSIAN}",
    "cosine_similarity": f"is not convex in the embeddings: {_HESSIAN}",
    "gaussian_nll_loss": (
        f"is convex in the mean but not in mean and variance together: {_HESSIAN}, or, if the variance is no output of "
        "the model, mark the mean"
    ),
    "ctc_loss": f"has no second derivative: {_HESSIAN}, whose products are then formed by finite differences",
}

# By the node of the loss's graph that is met behind sums, means, signs, scales and views.
ENDS: dict[str, tuple[str, str]] = {
    "LogBackward0": ("a logarithm", f"if it is that of probabilities, {_PROBABILITIES}"),
    "LogSoftmaxBackward0": ("log-probabilities", "take cross_entropy of the logits"),
    "LogSigmoidBackward0": ("a log-sigmoid", "take binary_cross_entropy_with_logits of the logits"),
    "SoftplusBackward0": ("a softplus", "take binary_cross_entropy_with_logits or soft_margin_loss of the scores"),
    "LogsumexpBackward0": ("a logsumexp", "take cross_entropy of the scores (contrastive ones: over each row)"),
    "PowBackward0": (
        "a power",
        "if it is a square, take mse_loss of outputs and targets "
        "(DeepXDE: model.compile(optimizer, loss=torch.nn.functional.mse_loss))",
    ),
    "SqrtBackward0": ("a square root", _ROOT),
    "LinalgVectorNormBackward0": ("a norm", _ROOT),
    "AbsBackward0": ("an absolute value", f"take smooth_l1_loss or huber_loss, or {_HESSIAN}"),
    "ReluBackward0": ("a hinge", _HESSIAN),
    "ClampMinBackward0": ("a hinge", _HESSIAN),
    "ClampBackward1": ("a hinge", _HESSIAN),
}
ENDS.update(
    dict.fromkeys(
        (
            *("MseLossBackward0", "NllLossBackward0", "NllLoss2DBackward0", "HuberLossBackward0"),
            *("SmoothL1LossBackward0", "SoftMarginLossBackward0", "BinaryCrossEntropyBackward0"),
            "BinaryCrossEntropyWithLogitsBackward0",
        ),
        (
            "a loss of torch.nn.functional that was called outside of the closure",
            "call the model and the loss inside the closure, each time it runs",
        ),
    )
)
_LAYER = (
    "the model's output itself, as a critic's does",
    f"it is linear in the output, so that there is no Gauss-Newton matrix: {_HESSIAN}",
)
ENDS.update(
    dict.fromkeys(("AddmmBackward0", "MmBackward0", "MvBackward0", "BmmBackward0", "ConvolutionBackward0"), _LAYER)
)


def unrecognised(called: Iterable[str], ends: Iterable[str], wrappers: Iterable[str] = ()) -> str:
    """Return what was seen of a loss without recorded outputs, and what to write instead.

    Args:
        called: The names of the loss functions called, in order.
        ends: The names of the nodes that the losses are computed from, through linear operations alone.
        wrappers: The names of classes that wrap other tensors, of outputs that recognised losses were given.
    """
    called, ends, wrappers = (list(dict.fromkeys(names)) for names in (called, ends, wrappers))
    sentences = ["No model output was recorded for the Gauss-Newton matrix."]
    if called:
        sentences.append(f"The closure called {', '.join(called)}.")
    for name in wrappers:
        sentences.append(f"An output is a {name}, which has no such matrix: give the loss plain tensors.")
    remedies = [f"{name} {CALLED[name]}." for name in called if name in CALLED]
    if not remedies:
        found = dict.fromkeys(ENDS[name] for name in sorted(ends) if name in ENDS)
        remedies = [f"The loss ends in sums or means of {what}: {remedy}." for what, remedy in found]
    return " ".join([*sentences, *remedies, _RECOGNISED])


_RECOGNISED = (
    "The losses recognised are cross_entropy, log_softmax followed by nll_loss or kl_div, mse_loss, huber_loss, "
    "smooth_l1_loss, binary_cross_entropy (also with logits), poisson_nll_loss and the soft margin losses of "
    "torch.nn.functional. For any other loss call `z = newtonopt.mark_outputs(z)` on the model's output inside the "
    'closure, or use curvature="hessian".'
)
