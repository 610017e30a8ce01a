"""The whole algorithm at once: backpropagation without autograd, to read and to run."""

from torchbp.explicit.engine import (
    ExplicitSGD,
    backprop,
    check_rates,
    layers_of,
    summing_dtype,
)

__all__ = ["ExplicitSGD", "backprop", "check_rates", "layers_of", "summing_dtype"]
