"""The whole algorithm at once: backpropagation without autograd, to read and to run."""

from torchbp.explicit.engine import (
    ExplicitSGD,
    backprop,
    check_rates,
    layers_of,
    summing_dtype,
)
from torchbp.explicit.kernel import KERNELS
from torchbp.explicit.kernel import explain_failure as kernel_failure

__all__ = [
    "KERNELS",
    "ExplicitSGD",
    "backprop",
    "check_rates",
    "kernel_failure",
    "layers_of",
    "summing_dtype",
]
