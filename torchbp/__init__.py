"""Backpropagation written by hand, as a PyTorch package.

Notation
--------
The symbols are those of Nielsen's *Neural Networks and Deep Learning*, chapter 2. One
thing differs: rows are examples here, where the book uses columns.

======== ========================== ============ ======================================
book     code                       shape        meaning
======== ========================== ============ ======================================
a^{ℓ-1}  ``x`` / ``input``          (*, n_in)    rows are examples
W^ℓ      ``W`` / ``weight``         (n_out,      W[j, k] goes from neuron k to neuron
                                    n_in)        j, as in ``nn.Linear``
b^ℓ      ``b`` / ``bias``           (n_out)
z^ℓ, a^ℓ ``z``, ``a``               (*, n_out)   z = x Wᵀ + b, a = σ(z)
δ^ℓ      ``delta``                  (*, n_out)   ∂C/∂z
η        ``lr``                                  learning rate
m        ``batch_size``                          examples in a mini-batch
n        ``n``                                   examples that a cost averages over
λ/n      ``weight_decay``                        on weights, never on biases
======== ========================== ============ ======================================

The equations
-------------
For layers ℓ = 1 ... L, σ entrywise, ⊙ elementwise, C = (1/n) Σ_x C_x::

    BP1   δ^L = ∇_a C ⊙ σ'(z^L)                    delta = grad_a * σ'
    BP2   δ^ℓ = ((W^{ℓ+1})ᵀ δ^{ℓ+1}) ⊙ σ'(z^ℓ)     delta = (delta_next @ W_next) * σ'
    BP3   ∂C/∂b^ℓ = δ^ℓ                            grad_b = delta.sum(examples)
    BP4   ∂C/∂W^ℓ = δ^ℓ (a^{ℓ-1})ᵀ                 grad_W = delta.T @ x

- BP2 is split between two layers: layer ℓ+1 returns ``delta @ W``, and layer ℓ
  multiplies what it receives by σ'. BP1 is split in the same way between the cost,
  which returns ∇_a C, and the last layer. Each line that implements an equation ends
  with a comment that names it.
- BP3 and BP4 are sums over the examples. The 1/n of the mean enters once, in the cost
  (A1), and travels down with δ.
- σ' is written in terms of a wherever a determines it (sigmoid a(1 - a), tanh 1 - a²,
  ReLU [a > 0], softplus 1 - e^-a), so z is not stored.
- Softmax is not entrywise, so BP1 as stated does not apply (δ^L = Jᵀ ∇_a C). The
  log-likelihood cost therefore takes z, and returns δ^L = (softmax(z) - y)/n directly.

The files
---------
======================= ================================================================
``functional``          BP2-BP4: an autograd.Function for each layer
``costs``               BP1: an autograd.Function for each cost
``nn``, ``convert``     the modules; conversion to native layers and back
``explicit``            the whole algorithm at once, without autograd
``examination``         ``examine``: checks of anybody's backward
``inspection``          ``observe``, ``compare``, the tour and the page
``data``, ``training``  MNIST and its family; trainer, checkpoints, TensorBoard
``exercises``           each equation, for the reader to write
======================= ================================================================
"""

import importlib
from typing import Any

from torchbp import costs, functional
from torchbp._version import __version__
from torchbp.convert import from_native, to_native
from torchbp.costs import (
    CrossEntropyCost,
    LogLikelihoodCost,
    QuadraticCost,
    define_cost,
)
from torchbp.examination import examine
from torchbp.explicit import ExplicitSGD, backprop
from torchbp.inspection import compare, observe
from torchbp.nn import (
    MLP,
    BPLinear,
    BPLinearReLU,
    BPLinearSigmoid,
    BPLinearSoftplus,
    BPLinearTanh,
    define_layer,
)

__all__ = [
    "MLP",
    "BPLinear",
    "BPLinearReLU",
    "BPLinearSigmoid",
    "BPLinearSoftplus",
    "BPLinearTanh",
    "CrossEntropyCost",
    "ExplicitSGD",
    "LogLikelihoodCost",
    "QuadraticCost",
    "__version__",
    "backprop",
    "compare",
    "costs",
    "define_cost",
    "define_layer",
    "examine",
    "from_native",
    "functional",
    "observe",
    "to_native",
]


def __getattr__(name: str) -> Any:
    """Import :mod:`torchbp.data` and :mod:`torchbp.training` at their first use."""
    if name in ("data", "training"):
        return importlib.import_module(f"torchbp.{name}")
    raise AttributeError(f"module 'torchbp' has no attribute {name!r}")
