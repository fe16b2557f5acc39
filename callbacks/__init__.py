"""Lightning callbacks that show an optimizer's curvature and steps while it trains.

- `curvature_monitor`: `CurvatureMonitor`, when it measures, and its budget. The measurements are those of
  `newtonopt.curvature`.
- `step_margin_monitor`: `StepMarginMonitor`, which logs how near steps come to raising the loss, for a forward pass.
- `step_monitor`: `StepMonitor`, which logs the reports of Newton steps.
- `lightning`: the module's loss on kept batches as a closure, and workarounds for Lightning's peculiarities.
- `images`: figures in every logger that takes images.
- `tensorboard`: charts, words, figures and histograms. Tags and units stand in `newtonopt.curvature.measurements`.
- `tab`: the "Curvature" tab of TensorBoard, which installs as a package of its own, `newtonopt_tensorboard`.

The monitors call `lightning` for the closure and for writing values, and `tensorboard` for the rest.
"""

try:
    from .curvature_monitor import Budget, CurvatureMonitor
    from .lightning import Probe
    from .step_margin_monitor import StepMarginMonitor
    from .step_monitor import StepMonitor
except ModuleNotFoundError as error:
    raise ImportError(
        f"newtonopt.callbacks needs Lightning and TensorBoard, and {str(error.name).split('.')[0]} is not installed: "
        "pip install lightning tensorboard."
    ) from error

__all__ = ["Budget", "CurvatureMonitor", "Probe", "StepMarginMonitor", "StepMonitor"]
