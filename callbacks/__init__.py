"""Lightning callbacks that show an optimizer's curvature and steps while it trains."""

from newtonopt.callbacks.curvature_monitor import CurvatureMonitor
from newtonopt.callbacks.step_monitor import StepMonitor

__all__ = ["CurvatureMonitor", "StepMonitor"]
