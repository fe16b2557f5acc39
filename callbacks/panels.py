"""What TensorBoard shows beside charts: words, figures and histograms."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from torch.utils.tensorboard import SummaryWriter

from newtonopt.curvature.density import SpectralDensity
from newtonopt.curvature.drawing import drawing
from newtonopt.curvature.measurement import Measurement

from .logs import tensorboard_writers

_BINS = 60


def add_text(trainer: Trainer, measurement: Measurement, remark: str) -> None:
    """Say what the measurement means, a line each."""
    lines = [*measurement.in_words().splitlines(), remark]
    for writer in tensorboard_writers(trainer):
        writer.add_text(f"{measurement.prefix}/in_words", "  \n".join(lines), trainer.global_step)


def add_figures(trainer: Trainer, measurement: Measurement) -> None:
    """The density as a figure and as a histogram, and the slice as a figure, where they were measured.

    Raises:
        ImportError: matplotlib is missing.
    """
    for writer in tensorboard_writers(trainer):
        if measurement.density is not None:
            # A tag of its own: TensorBoard shows what was written first under a tag, and drops the rest.
            _add_histogram(
                writer, f"{measurement.prefix}/eigenvalues_log_count", measurement.density, trainer.global_step
            )
            figure, (axes,) = drawing(1)
            measurement.density.plot(ax=axes)
            writer.add_figure(f"{measurement.prefix}/spectral_density", figure, trainer.global_step)
        if measurement.slice is not None:
            figure, panels = drawing(measurement.slice.losses.dim())
            measurement.slice.plot(ax=panels)
            writer.add_figure(f"{measurement.prefix}/loss_slice", figure, trainer.global_step)


def _add_histogram(writer: SummaryWriter, tag: str, density: SpectralDensity, step: int) -> None:
    """How many eigenvalues lie in each of equal ranges, as log10(1 + count): nearly all lie next to zero."""
    nodes, shares = density.nodes, density.weights
    low, high = float(nodes.min()), float(nodes.max())
    edges = torch.linspace(low, low + density.span(), _BINS + 1, dtype=torch.float64, device="cpu")
    bins = torch.bucketize(nodes, edges[1:-1], right=True)
    counts = torch.zeros(_BINS, dtype=torch.float64, device="cpu").index_add_(0, bins, shares * density.size)
    heights, middles = torch.log10(1.0 + counts), 0.5 * (edges[1:] + edges[:-1])
    total, first, second = (float((heights * middles**power).sum()) for power in (0, 1, 2))
    writer.add_histogram_raw(tag, low, high, total, first, second, edges[1:].tolist(), heights.tolist(), step)
