"""Lightning callbacks that show an optimizer's curvature and steps while it trains."""

try:
    from .curvature_monitor import CurvatureMonitor
    from .step_monitor import StepMonitor
except ModuleNotFoundError as error:
    raise ImportError(
        f"newtonopt.callbacks needs Lightning and TensorBoard, and {str(error.name).split('.')[0]} is not installed: "
        "pip install lightning tensorboard."
    ) from error

__all__ = ["CurvatureMonitor", "StepMonitor"]
