"""MNIST, its family and scikit-learn's digits as verified tensors, and distortions."""

from torchbp.data.distortion import distort
from torchbp.data.sets import (
    NAMES,
    DataError,
    Split,
    Splits,
    default_root,
    find,
    join_validation,
    load,
    scale,
)

__all__ = [
    "NAMES",
    "DataError",
    "Split",
    "Splits",
    "default_root",
    "distort",
    "find",
    "join_validation",
    "load",
    "scale",
]
