"""TensorBoard: the curves, pictures and graph of a training, with their captions."""

from torchbp.training.dashboard.dashboard import LEVELS, Dashboard
from torchbp.training.dashboard.events import EventWriter

__all__ = ["LEVELS", "Dashboard", "EventWriter"]
