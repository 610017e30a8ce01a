"""The whole algorithm at once, without autograd.

- `algorithm`: :func:`torchbp.backprop`, to read.
- `engine`: :class:`torchbp.ExplicitSGD`, the same algorithm to train with.
- `parameters`: the parameters that a step updates, in place or packed.
- `steps`: a step as torch calls on buffers made beforehand.
- `kernel`: an epoch as compiled loops (``kernel.cpp``).
- `checks`: the checks of models, batches and rates.
"""

from torchbp.explicit.algorithm import backprop
from torchbp.explicit.checks import Rates, layers_of
from torchbp.explicit.engine import ExplicitSGD
from torchbp.explicit.kernel import KERNELS
from torchbp.explicit.kernel import explain_failure as kernel_failure

__all__ = [
    "KERNELS",
    "ExplicitSGD",
    "Rates",
    "backprop",
    "kernel_failure",
    "layers_of",
]
