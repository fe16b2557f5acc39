"""Lightning callbacks that show an optimizer's curvature and steps while it trains."""

from .curvature_monitor import CurvatureMonitor
from .step_monitor import StepMonitor

__all__ = ["CurvatureMonitor", "StepMonitor"]
