"""The layers as modules, and the MLP assembled from them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchbp import costs, functional
from torchbp._define import check_name, make_class, place
from torchbp.functional import LinearFunction

__all__ = [
    "ACTIVATIONS",
    "INITIALISATIONS",
    "MLP",
    "BPLinear",
    "BPLinearReLU",
    "BPLinearSigmoid",
    "BPLinearSoftplus",
    "BPLinearTanh",
    "check_takes",
    "define_layer",
]


class BPLinear(nn.Linear):
    """z = x Wᵀ + b, with BP2-BP4 by hand: ``nn.Linear``, drop-in.

    Args:
        in_features: n_in.
        out_features: n_out.
        bias: whether there is a b.
        device, dtype: of the parameters.

    Shape:
        input (*, n_in) -> (*, n_out), where * is any number of dimensions.

    Attributes:
        weight: W, (n_out, n_in), initialised as ``nn.Linear`` does.
        bias: b, (n_out), or None.
        function: the Function behind it, with σ and σ'.
        native: torch's module of the same σ; None for the identity, or if torch has
            none.

    Raises:
        TypeError, ValueError: in ``forward``, for an input that is no tensor of shape
            (*, n_in) with the parameters' dtype and on their device.

    The subclasses also apply an activation and replace ``Sequential(nn.Linear,
    nn.<σ>)``. A tool that recognises an ``nn.Linear`` and then calls ``F.linear`` with
    its weight would omit that σ: give it ``torchbp.to_native(model)``.

    Examples:
        >>> layer = BPLinear(784, 10)
        >>> layer(torch.rand(5, 784)).shape
        torch.Size([5, 10])
        >>> native = nn.Linear(784, 10)
        >>> layer.load_state_dict(native.state_dict())
        <All keys matched successfully>
    """

    function: ClassVar[type[LinearFunction]] = LinearFunction
    native: ClassVar[type[nn.Module] | None] = None

    def forward(self, input: Tensor) -> Tensor:
        """Return σ(x Wᵀ + b) for the `input` x, (*, n_in) -> (*, n_out)."""
        return functional.layer(self.function, input, self.weight, self.bias)


class BPLinearSigmoid(BPLinear):
    """a = σ(x Wᵀ + b), σ' = a(1 - a); for ``Sequential(nn.Linear, nn.Sigmoid)``.

    Args:
        in_features: n_in.
        out_features: n_out.
        bias: whether there is a b.
        device, dtype: of the parameters.

    Shape:
        input (*, n_in) -> (*, n_out), where * is any number of dimensions.

    Attributes:
        weight: W, (n_out, n_in), initialised as ``nn.Linear`` does.
        bias: b, (n_out), or None.

    Raises:
        TypeError, ValueError: in ``forward``, for an input that is no tensor of shape
            (*, n_in) with the parameters' dtype and on their device.

    Examples:
        >>> layer = BPLinearSigmoid(784, 30)
        >>> layer
        BPLinearSigmoid(in_features=784, out_features=30, bias=True)
        >>> layer(torch.rand(10, 784)).shape
        torch.Size([10, 30])
    """

    function, native = functional.LinearSigmoidFunction, nn.Sigmoid


class BPLinearTanh(BPLinear):
    """a = tanh(x Wᵀ + b), σ' = 1 - a²; for ``Sequential(nn.Linear, nn.Tanh)``.

    Args:
        in_features: n_in.
        out_features: n_out.
        bias: whether there is a b.
        device, dtype: of the parameters.

    Shape:
        input (*, n_in) -> (*, n_out), where * is any number of dimensions.

    Attributes:
        weight: W, (n_out, n_in), initialised as ``nn.Linear`` does.
        bias: b, (n_out), or None.

    Raises:
        TypeError, ValueError: in ``forward``, for an input that is no tensor of shape
            (*, n_in) with the parameters' dtype and on their device.

    Examples:
        >>> layer = BPLinearTanh(784, 30)
        >>> bool(layer(torch.rand(10, 784)).abs().max() < 1)
        True
    """

    function, native = functional.LinearTanhFunction, nn.Tanh


class BPLinearReLU(BPLinear):
    """a = max(0, x Wᵀ + b), σ' = [a > 0]; for ``Sequential(nn.Linear, nn.ReLU)``.

    Args:
        in_features: n_in.
        out_features: n_out.
        bias: whether there is a b.
        device, dtype: of the parameters.

    Shape:
        input (*, n_in) -> (*, n_out), where * is any number of dimensions.

    Attributes:
        weight: W, (n_out, n_in), initialised as ``nn.Linear`` does.
        bias: b, (n_out), or None.

    Raises:
        TypeError, ValueError: in ``forward``, for an input that is no tensor of shape
            (*, n_in) with the parameters' dtype and on their device.

    Examples:
        >>> layer = BPLinearReLU(784, 30)
        >>> bool((layer(torch.rand(10, 784)) >= 0).all())
        True
    """

    function, native = functional.LinearReLUFunction, nn.ReLU


class BPLinearSoftplus(BPLinear):
    """a = ln(1 + e^z), z = x Wᵀ + b, σ' = 1 - e^-a; for ``Sequential(nn.Linear,
    nn.Softplus)``.

    Args:
        in_features: n_in.
        out_features: n_out.
        bias: whether there is a b.
        device, dtype: of the parameters.

    Shape:
        input (*, n_in) -> (*, n_out), where * is any number of dimensions.

    Attributes:
        weight: W, (n_out, n_in), initialised as ``nn.Linear`` does.
        bias: b, (n_out), or None.

    Raises:
        TypeError, ValueError: in ``forward``, for an input that is no tensor of shape
            (*, n_in) with the parameters' dtype and on their device.

    Examples:
        >>> layer = BPLinearSoftplus(784, 30)
        >>> bool((layer(torch.rand(10, 784)) > 0).all())
        True
    """

    function, native = functional.LinearSoftplusFunction, nn.Softplus


def define_layer(
    name: str,
    sigma: Callable[[Tensor], Tensor],
    sigma_prime: Callable[[Tensor], Tensor],
    saves: str = "a",
) -> type[BPLinear]:
    """Make a layer class from a user's own σ and σ', with BP2-BP4 as for every layer.

    Args:
        name: the class's name, e.g. "BPLinearSiLU".
        sigma: σ(z), entrywise; must not overwrite z.
        sigma_prime: σ' as a function of a if `saves` is "a", of z if it is "z".
        saves: "a" saves the output, as native layers do; "z" saves the weighted input,
            for a σ that is not one-to-one (SiLU, x²).

    Raises:
        TypeError, ValueError: as :func:`torchbp.functional.define_function`.

    Examples:
        >>> BPLinearArsinh = define_layer(
        ...     "BPLinearArsinh", torch.asinh, lambda a: 1 / torch.cosh(a)
        ... )
        >>> BPLinearArsinh(3, 2)
        BPLinearArsinh(in_features=3, out_features=2, bias=True)
    """
    check_name(name)
    function = functional.define_function(f"{name}Function", sigma, sigma_prime, saves)
    # All layers' docstrings are the same between the first line and the examples.
    details = (BPLinearSigmoid.__doc__ or "").split("\n", 1)[-1].partition("Examples:")
    doc = f"{function.__doc__}\n{details[0].rstrip()}\n"
    return place(make_class(name, BPLinear, {"__doc__": doc, "function": function}))


ACTIVATIONS: dict[str, type[BPLinear]] = {
    "sigmoid": BPLinearSigmoid,
    "tanh": BPLinearTanh,
    "relu": BPLinearReLU,
    "softplus": BPLinearSoftplus,
    "identity": BPLinear,
}


def _init_scaled(layer: BPLinear) -> None:
    """Draw W ~ N(0, 1/n_in), b ~ N(0, 1): z is of order 1 for any n_in (book, chapter
    3)."""
    nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features))
    if layer.bias is not None:
        nn.init.normal_(layer.bias)


def _init_normal(layer: BPLinear) -> None:
    """Draw W, b ~ N(0, 1), which saturates layers with many inputs (book, chapter
    1)."""
    nn.init.normal_(layer.weight)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)


def _init_torch(layer: BPLinear) -> None:
    """Leave the parameters as the constructor of ``nn.Linear`` made them."""


INITIALISATIONS: dict[str, Callable[[BPLinear], None]] = {
    "scaled": _init_scaled,
    "normal": _init_normal,
    "torch": _init_torch,
}


class MLP(nn.Module):
    """A fully connected network of hand-written layers.

    Args:
        sizes: neurons of every layer, inputs first: [784, 30, 10].
        activation: of the hidden layers: a name ("sigmoid", "tanh", "relu", "softplus",
            "identity") or a class from :func:`define_layer`.
        output: of the last layer, likewise; None means the same as `activation`. Costs
            that take z need "identity".
        init: "scaled" W ~ N(0, std 1/√n_in), b ~ N(0, 1); "normal" W, b ~ N(0, 1);
            "torch" as ``nn.Linear``.
        device, dtype: of the parameters.

    Shape:
        input (*, sizes[0]) -> (*, sizes[-1]).

    Attributes:
        layers: the layers in order; parameters are ``layers.0.weight``, ...

    Raises:
        TypeError: sizes that are not integers, an activation of another kind.
        ValueError: fewer than two sizes, sizes below 1, unknown names.

    Source: Nielsen, Neural Networks and Deep Learning, chapters 1-3.

    Examples:
        >>> model = MLP([784, 30, 10])  # the book's first network
        >>> model(torch.rand(5, 784)).shape
        torch.Size([5, 10])
        >>> MLP([784, 100, 10], "relu", output="identity")
        MLP(
          (layers): ModuleList(
            (0): BPLinearReLU(in_features=784, out_features=100, bias=True)
            (1): BPLinear(in_features=100, out_features=10, bias=True)
          )
        )
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str | type[BPLinear] = "sigmoid",
        output: str | type[BPLinear] | None = None,
        init: str = "scaled",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = _check_sizes(sizes)
        hidden = _layer_class("activation", activation)
        last = hidden if output is None else _layer_class("output", output)
        if init not in INITIALISATIONS:
            names = ", ".join(INITIALISATIONS)
            raise ValueError(f"init: expected one of {names}, got {init!r}")
        self.sizes = sizes
        classes = [hidden] * (len(sizes) - 2) + [last]
        self.layers = nn.ModuleList(
            make(n_in, n_out, device=device, dtype=dtype)
            for make, n_in, n_out in zip(classes, sizes, sizes[1:], strict=False)
        )
        for layer in self.layers:
            INITIALISATIONS[init](layer)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:
        """Return the last layer's a for `input`, (*, sizes[0]) -> (*, sizes[-1])."""
        for layer in self.layers:
            input = layer(input)
        return input


def _check_sizes(sizes: Any) -> tuple[int, ...]:
    """Return `sizes` as a tuple of integers, or raise."""
    try:
        result = tuple(sizes)
    except TypeError:
        raise TypeError(
            f"sizes: expected a sequence of integers, got {sizes!r}"
        ) from None
    for i, n in enumerate(result):
        if isinstance(n, bool) or not hasattr(n, "__index__"):
            raise TypeError(f"sizes: expected integers, got {n!r} as number {i + 1}")
    result = tuple(map(operator.index, result))  # NumPy's integers, too
    if len(result) < 2:
        raise ValueError(f"sizes: expected at least two, got {list(result)}")
    if min(result) < 1:
        raise ValueError(f"sizes: expected positive integers, got {list(result)}")
    return result


def _layer_class(role: str, activation: Any) -> type[BPLinear]:
    """Return the layer class that `activation` names or is, or raise."""
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            names = ", ".join(ACTIVATIONS)
            raise ValueError(f"{role}: expected one of {names}, got {activation!r}")
        return ACTIVATIONS[activation]
    if isinstance(activation, type) and issubclass(activation, BPLinear):
        return activation
    raise TypeError(
        f"{role}: expected a name or a class from define_layer, got {activation!r}"
    )


def check_takes(model: nn.Module, cost: Any) -> None:
    """Raise unless the cost fits the network: one that takes z needs a network whose
    last layer is the identity.

    All code that joins a model and a cost calls this: with σ applied twice, the model
    would still train, but worse. A cost that takes a fits every last layer, since the
    identity layer's a is its z. A model with a ``forward`` of its own passes, since its
    structure does not show which layer is the last.

    Args:
        model: the network.
        cost: the cost, a module or function with `takes`.

    Raises:
        TypeError: `cost` does not say what it takes.
        ValueError: the cost takes z and the last layer is not the identity.

    Examples:
        >>> import torchbp
        >>> cost = torchbp.CrossEntropyCost()
        >>> check_takes(MLP([784, 30, 10], output="identity"), cost)
        >>> check_takes(MLP([784, 30, 10]), cost)
        ... # doctest: +NORMALIZE_WHITESPACE
        Traceback (most recent call last):
            ...
        ValueError: CrossEntropyCost: expected a network that gives z
        (output="identity"), got one whose last layer is BPLinearSigmoid: σ would be
        applied twice
    """
    takes = getattr(cost, "takes", None)
    name = getattr(cost, "__name__", type(cost).__name__)
    if takes not in ("a", "z"):
        raise TypeError(
            f'{name}: expected a cost with takes "a" or "z", got {takes!r}'
            f"{costs.counterpart(cost)}"
        )
    if isinstance(cost, type):
        raise TypeError(f"cost: expected an instance, got the class {name}")
    last = _last_layer(model)
    gives_a = type(last).__module__ == nn.Sigmoid.__module__ or (
        isinstance(last, BPLinear) and last.function is not LinearFunction
    )
    if takes == "z" and gives_a:
        raise ValueError(
            f'{name}: expected a network that gives z (output="identity"), got one '
            f"whose last layer is {type(last).__name__}: σ would be applied twice"
        )


# Modules after a layer that do not change which kind of output it gives.
_PASSING = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)


def _last_layer(model: nn.Module) -> nn.Module | None:
    """Return the module whose output is the model's, known for an MLP, an
    ``nn.Sequential`` or a layer; None for a model with a forward of its own."""
    if isinstance(model, BPLinear) or not list(model.children()):
        return model
    if type(model) is MLP:
        return _last_layer(model.layers[-1])
    if isinstance(model, nn.Sequential):
        layers = [child for child in model if not isinstance(child, _PASSING)]
        return _last_layer(layers[-1]) if layers else None
    return None
