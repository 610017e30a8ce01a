"""TensorBoard: the curves, pictures and graph of a training, with their captions."""

from torchbp.training.dashboard.dashboard import LEVELS, Dashboard

__all__ = ["LEVELS", "Dashboard"]
