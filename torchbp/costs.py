"""BP1: one autograd.Function per cost, with its gradient by hand.

A cost is the mean over the examples of a per-example cost, C = (1/n) Σ_x C_x (A1), and
depends on the network's parameters through its outputs only (A2). Its backward returns
∇C, which starts the sweep: the last layer multiplies it by σ' to get δ^L. A cost whose
argument is z instead of a (`takes` = "z") returns δ^L itself, for an identity last
layer. The rest of the package learns about a cost from its Function and its module.

n is the number of rows, over all leading dimensions; torch's means also divide by the
number of outputs K.

========================== ======================== ==================================
torchbp                    torch                    C is
========================== ======================== ==================================
:class:`QuadraticCost`     ``nn.MSELoss``           K/2 times as large
:class:`CrossEntropyCost`  ``nn.BCEWithLogitsLoss`` K times as large; K sigmoids
:class:`LogLikelihoodCost` ``nn.CrossEntropyLoss``  the same; one softmax
========================== ======================== ==================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from torchbp._autograd import TwoFormFunction, autocast_dtype, call, varying
from torchbp._checks import A2, cost_fits, explain_cost, explain_storage, is_dense
from torchbp._define import check_cost, check_name, make_class, place

__all__ = [
    "COSTS",
    "CostFunction",
    "CrossEntropyCost",
    "CrossEntropyFunction",
    "LogLikelihoodCost",
    "LogLikelihoodFunction",
    "QuadraticCost",
    "QuadraticFunction",
    "cost",
    "cross_entropy_cost",
    "define_cost",
    "log_likelihood_cost",
    "quadratic_cost",
]


class CostFunction(TwoFormFunction):
    """C = (1/n) Σ_x C_x(v, y) for outputs v (a or z) and targets y, both (*, K).

    A subclass defines C_x in `per_example` and ∇C_x in `nabla`; neither divides by n,
    since this class applies A1.

    Attributes:
        one_hot_nabla: ∇C_x of v and one-hot rows y, written to the argument `out`; the
            argument `factor` is 1 - `multiple` y. The explicit engine calls it; if it
            is None, the engine calls `nabla` instead.
        multiple: see `one_hot_nabla`.

    Examples:
        >>> class Linear(CostFunction):
        ...     @staticmethod
        ...     def per_example(v, y):
        ...         return (v * y).sum(-1)
        ...
        ...     @staticmethod
        ...     def nabla(v, y):
        ...         return y
        >>> v = torch.ones(2, 3, requires_grad=True)
        >>> C = cost(Linear, v, torch.ones(2, 3))
        >>> C.backward()
        >>> C.item(), v.grad[0].tolist()
        (3.0, [0.5, 0.5, 0.5])
    """

    @staticmethod
    def per_example(v: Tensor, y: Tensor) -> Tensor:
        """Return C_x of every row of `v` and `y`: (*, K), (*, K) -> (*)."""
        raise NotImplementedError

    @staticmethod
    def nabla(v: Tensor, y: Tensor) -> Tensor:
        """Return ∂C_x/∂v of every row of `v` and `y`: (*, K), (*, K) -> (*, K)."""
        raise NotImplementedError

    one_hot_nabla: ClassVar[Callable[..., Tensor] | None] = None
    multiple: ClassVar[int] = 1

    @classmethod
    def check_parts(cls, v: Tensor) -> None:
        """Check C_x and ∇C_x on as many outputs as `v` has, before the first is used;
        ``define_cost`` overrides it if it could not check them."""

    @classmethod
    def evaluate(cls, v: Tensor, y: Tensor) -> Tensor:
        cls.check_parts(v)
        return cls.per_example(v, y).mean()

    @classmethod
    def tensors_to_save(cls, inputs: Any, output: Any) -> tuple[Tensor | None, ...]:
        return tuple(inputs)

    @staticmethod
    def forward(ctx: Any, v: Tensor, y: Tensor, *, cls: Any) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(v, y)
        return cls.evaluate(v, y)

    @staticmethod
    def backward(ctx: Any, *grads: Any, cls: Any = None) -> Any:
        (grad_C,) = grads
        if grad_C is None:
            return None, None
        v, y = ctx.saved_tensors
        n = v.numel() // v.shape[-1]
        nabla = cls.nabla(v, y)
        if not nabla.requires_grad:
            nabla = varying(nabla, v)
        return nabla * (grad_C / n), None  # BP1: ∇C; σ' is the last layer's

    @classmethod
    def push_forward(cls, ctx: Any, dv: Any, dy: Any) -> Any:
        if dy is not None:
            raise ValueError(A2.format("one with a tangent"))
        v, y = ctx.saved_tensors
        return (cls.nabla(v, y) * dv).sum(-1).mean()


class QuadraticFunction(CostFunction):
    """C_x = ½ ‖y - a‖², ∇_a C_x = a - y.

    Examples:
        >>> a, y = torch.tensor([[0.25, 0.5]]), torch.tensor([[0.0, 1.0]])
        >>> QuadraticFunction.per_example(a, y), QuadraticFunction.nabla(a, y)
        (tensor([0.1562]), tensor([[ 0.2500, -0.5000]]))
    """

    one_hot_nabla = None  # `nabla` is a single operation

    @staticmethod
    def per_example(a: Tensor, y: Tensor) -> Tensor:
        return (a - y).square().sum(-1) / 2

    @staticmethod
    def nabla(a: Tensor, y: Tensor) -> Tensor:
        return a - y

    @classmethod
    def evaluate(cls, v: Tensor, y: Tensor) -> Tensor:
        # The mean of per_example in one operation less. A sum over all entries would
        # overflow in float16.
        return (v - y).square().mean() * (v.shape[-1] / 2)


class CrossEntropyFunction(CostFunction):
    """C_x = -Σ_j [y ln σ(z) + (1 - y) ln(1 - σ(z))], ∇_z C_x = σ(z) - y.

    Examples:
        >>> z, y = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 1.0]])
        >>> CrossEntropyFunction.per_example(z, y), CrossEntropyFunction.nabla(z, y)
        (tensor([0.8201]), tensor([[ 0.5000, -0.1192]]))
    """

    multiple = 2

    @staticmethod
    def per_example(z: Tensor, y: Tensor) -> Tensor:
        # 1 - σ(z) = σ(-z), and ln σ is linear where σ underflows.
        return -(y * logsigmoid(z) + (1 - y) * logsigmoid(-z)).sum(-1)

    @staticmethod
    def nabla(z: Tensor, y: Tensor) -> Tensor:
        # σ(z) - y would be 0 for y = 1 and z > 17 in float32, where -e^-z is right.
        return (1 - y) * torch.sigmoid(z) - y * torch.sigmoid(-z)

    @staticmethod
    def one_hot_nabla(z: Tensor, y: Tensor, factor: Tensor, out: Tensor) -> Tensor:
        # σ(z) - y = s σ(s z) with s = 1 - 2y, without loss where σ(z) is near y.
        return torch.mul(z, factor, out=out).sigmoid_().mul_(factor)


class LogLikelihoodFunction(CostFunction):
    """C_x = -Σ_j y ln softmax(z), ∇_z C_x = softmax(z) Σ_j y - y.

    Σ_j y is 1 for one-hot rows and for any distribution; other rows get the derivative
    of the same formula.

    Examples:
        >>> z, y = torch.tensor([[2.0, 2.0]]), torch.tensor([[0.0, 1.0]])
        >>> LogLikelihoodFunction.per_example(z, y), LogLikelihoodFunction.nabla(z, y)
        (tensor([0.6931]), tensor([[ 0.5000, -0.5000]]))
    """

    @staticmethod
    def per_example(z: Tensor, y: Tensor) -> Tensor:
        _, shifted, others = _softmax_parts(z)
        log_p = shifted - torch.log1p(others)
        # 0 · ln 0 = 0: a class with y = 0 costs nothing.
        return -(y * log_p.masked_fill(y == 0, 0)).sum(-1)

    @staticmethod
    def nabla(z: Tensor, y: Tensor) -> Tensor:
        # p Σy - y = p (Σy - y) - y (1 - p). Where p is near 1, 1 - p is the sum of the
        # other classes' p: at saturation softmax(z) - y would be 0 instead of -Σ e^-z.
        top, shifted, others = _softmax_parts(z)
        total = 1 + others
        p = shifted.exp() / total
        q = torch.where(top, others / total, 1 - p)
        return p * (y.sum(-1, keepdim=True) - y) - y * q

    @staticmethod
    def one_hot_nabla(z: Tensor, y: Tensor, factor: Tensor, out: Tensor) -> Tensor:
        # softmax(z) - y; where y is 1, minus the sum of the other classes' softmax.
        others = torch.softmax(z, 1, out=out).mul_(factor).sum(1, keepdim=True)
        return out.addcmul_(y, others, value=-1)


def _softmax_parts(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a mask of the largest z of each row (one entry, also in a tie), shifted =
    z minus that z, and the sum of e^shifted over the other entries of the row, so that
    softmax = e^shifted / (1 + others)."""
    index = z.argmax(-1, keepdim=True)
    top = torch.arange(z.shape[-1], device=z.device) == index
    # inf - inf would be NaN: a z of +inf has probability 1.
    shifted = (z - z.gather(-1, index)).masked_fill(top & z.isinf(), 0)
    others = shifted.exp().masked_fill(top, 0).sum(-1, keepdim=True)
    return top, shifted, others


def cost(function: type[CostFunction], input: Tensor, target: Tensor) -> Tensor:
    """Check the arguments and return C of `function`.

    Args:
        function: a Function of this module.
        input: the network's outputs, a or z as the cost's `takes` says.
        target: floating numbers of the input's shape and dtype, or integer labels,
            which stand for their one-hot rows.

    Shape:
        input (*, K); target (*, K), or (*) for labels. The result is 0-d. An empty
        batch costs NaN, the mean of nothing, and has empty gradients.

    Raises:
        TypeError: an argument is not a tensor, the input is not of a real floating
            dtype, or the target is neither of that dtype nor integer.
        ValueError: shapes or devices that do not fit, labels outside 0..K-1 (on the
            CPU; reading them would stall another device, which asserts it itself), or
            a target that requires grad or has a tangent (A2).

    Under autocast the cost is computed in float32, as native losses are.

    Examples:
        >>> z, labels = torch.zeros(2, 10), torch.tensor([3, 7])
        >>> cost(LogLikelihoodFunction, z, labels)  # ln 10, for equal probabilities
        tensor(2.3026)
        >>> cost(LogLikelihoodFunction, z, torch.tensor([3, 10]))
        Traceback (most recent call last):
            ...
        ValueError: target: expected labels in 0..9, got 10
    """
    check_tensors(input, target)
    if input.dtype != torch.float64 and autocast_dtype(input) is not None:
        input = input.float()
        target = target.float() if target.is_floating_point() else target
    return call(function, input, target_rows(input, target))  # type: ignore[no-any-return]


def check_tensors(
    input: Any, target: Any, names: tuple[str, str] = ("input", "target")
) -> None:
    """Raise TypeError unless both are dense tensors."""
    if is_dense(input) and is_dense(target):
        return
    if not (isinstance(input, Tensor) and isinstance(target, Tensor)):
        got = f"{type(input).__name__} and {type(target).__name__}"
        raise TypeError(f"{', '.join(names)}: expected two Tensors, got {got}")
    reason = explain_storage(names[0], input) or explain_storage(names[1], target)
    if reason is not None:
        raise reason


def target_rows(input: Tensor, target: Tensor) -> Tensor:
    """Check both arguments as :func:`cost` does, and return the target as rows (*, K)
    of the dtype of `input`."""
    check(input, target)
    return target if target.dtype is input.dtype else _one_hot(target, input)


def function_of(cost: Any) -> type[CostFunction]:
    """Return the Function behind one of our costs, module or function.

    Raises:
        TypeError: `cost` is of another kind.
    """
    function = getattr(cost, "function", None)
    if isinstance(function, type) and issubclass(function, CostFunction):
        return function
    raise TypeError(
        "cost: expected one of torchbp's, or one from define_cost, got "
        f"{getattr(cost, '__name__', type(cost).__name__)}{counterpart(cost)}"
    )


def counterpart(cost: Any) -> str:
    """Return the end of an error message about another cost: what to use instead.

    Examples:
        >>> counterpart(nn.CrossEntropyLoss())
        '; the counterpart of CrossEntropyLoss is LogLikelihoodCost, with the same C'
    """
    native = getattr(cost, "func", cost)  # of a functools.partial
    kinds = native.__mro__ if isinstance(native, type) else type(native).__mro__
    names = [getattr(kind, "__name__", "") for kind in (native, *kinds)]
    for ours in COSTS.values():
        for name, difference in ours.replaces.items():
            if name in names:
                named = f"; the counterpart of {name} is {ours.__name__}"
                return f"{named}, {difference}"
    return "; define_cost makes one of C_x and its gradient" if callable(cost) else ""


def check(input: Tensor, target: Tensor) -> None:
    """Raise the errors that :func:`cost` documents, except for labels out of range."""
    if not cost_fits(input, target):
        raise explain_cost(input, target)


def _one_hot(labels: Tensor, like: Tensor) -> Tensor:
    """Return labels (*) as rows (*, K) of the dtype of `like`."""
    try:
        return torch.zeros_like(like).scatter(-1, labels.long().unsqueeze(-1), 1)
    except (RuntimeError, IndexError) as error:
        if labels.device.type == "cpu" and labels.numel():
            check_labels(labels, like.shape[-1], error)
        raise


def check_labels(labels: Tensor, K: int, cause: BaseException | None = None) -> None:
    """Raise ValueError, from `cause`, unless all labels are in 0..K-1."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= K:
        raise ValueError(
            f"target: expected labels in 0..{K - 1}, got {low if low < 0 else high}"
        ) from cause


def quadratic_cost(input: Tensor, target: Tensor) -> Tensor:
    """Return C = 1/(2n) Σ_x ‖y - a‖²; ∇_a C = (a - y)/n.

    It is K/2 times ``F.mse_loss``, which also divides by the number of outputs K.

    Args:
        input: a, (*, K).
        target: numbers (*, K), or labels (*).

    Raises:
        TypeError, ValueError: as :func:`cost`.

    Examples:
        >>> a = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
        >>> quadratic_cost(a, torch.tensor([1, 1]))  # (0 + ½)/2
        tensor(0.2500)
    """
    return cost(QuadraticFunction, input, target)


def cross_entropy_cost(input: Tensor, target: Tensor) -> Tensor:
    """Return C = -1/n Σ_x Σ_j [y ln σ(z) + (1-y) ln(1-σ(z))]; ∇_z C = (σ(z) - y)/n.

    The last layer is the identity, and the cost applies the sigmoid. It is K times
    ``F.binary_cross_entropy_with_logits``, which also divides by the number of outputs
    K; ``F.cross_entropy`` is :func:`log_likelihood_cost`.

    Args:
        input: z, (*, K).
        target: numbers (*, K), or labels (*).

    Raises:
        TypeError, ValueError: as :func:`cost`.

    Examples:
        >>> z = torch.zeros(1, 2, requires_grad=True)
        >>> C = cross_entropy_cost(z, torch.tensor([[1.0, 0.0]]))  # 2 ln 2
        >>> C.backward()
        >>> round(C.item(), 4), z.grad
        (1.3863, tensor([[-0.5000,  0.5000]]))
    """
    return cost(CrossEntropyFunction, input, target)


def log_likelihood_cost(input: Tensor, target: Tensor) -> Tensor:
    """Return C = -1/n Σ_x ln softmax(z)_y; ∇_z C = (softmax(z) - y)/n.

    The last layer is the identity, and the cost applies the softmax, which is not
    entrywise and so cannot be a layer's σ. It is ``F.cross_entropy``;
    ``F.binary_cross_entropy_with_logits`` is 1/K of :func:`cross_entropy_cost`.

    Args:
        input: z, (*, K).
        target: numbers (*, K), or labels (*).

    Raises:
        TypeError, ValueError: as :func:`cost`.

    Examples:
        >>> z = torch.zeros(1, 4, requires_grad=True)
        >>> C = log_likelihood_cost(z, torch.tensor([2]))  # ln 4
        >>> C.backward()
        >>> round(C.item(), 4), z.grad
        (1.3863, tensor([[ 0.2500,  0.2500, -0.7500,  0.2500]]))
    """
    return cost(LogLikelihoodFunction, input, target)


class _Cost(nn.Module):
    """The cost {name}, C = 1/n Σ_x C_x, by its own C_x and ∇C_x.

    Shape:
        input {takes} (*, K), rows are examples; target (*, K), numbers of the input's
        dtype, or (*), integer labels, which stand for their one-hot rows. C is 0-d.

    Attributes:
        takes: "{takes}".

    Raises:
        TypeError, ValueError: in ``forward``, for arguments that do not fit.
    """

    # define_cost fills in this docstring for its classes.
    function: ClassVar[type[CostFunction]]
    takes: ClassVar[str]
    native: ClassVar[type[nn.Module] | None] = None
    # C is `scale` times the sum of the native losses, over n.
    scale: ClassVar[float] = 1.0
    # The torch losses that it replaces, by name, and how it differs from each.
    replaces: ClassVar[Mapping[str, str]] = {}

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return C, 0-d, of the network's outputs `input` and the targets `target`."""
        return cost(self.function, input, target)


class QuadraticCost(_Cost):
    """C = 1/(2n) Σ_x ‖y - a‖², half the squared distance; ∇_a C = (a - y)/n.

    Its native counterpart is ``nn.MSELoss``, the mean over all n K numbers. So C and
    its gradient are K/2 times as large for K outputs, and need 2/K of the learning
    rate: C = ``F.mse_loss(a, y, reduction="sum") / (2 * n)``.

    Shape:
        input a (*, K), rows are examples; target (*, K), numbers of the input's dtype,
        or (*), integer labels, which stand for their one-hot rows. C is 0-d.

    Attributes:
        takes: "a", what the last layer returns, whatever its σ.
        native: torch's counterpart.
        scale: C is `scale` times the sum of the native losses, over n.

    Raises:
        TypeError, ValueError: in ``forward``, for arguments that are no dense tensors
            of such shapes and dtypes on one device, labels outside 0..K-1, or a target
            that requires grad.

    Examples:
        >>> a = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
        >>> QuadraticCost()(a, torch.tensor([1, 1]))
        tensor(0.2500)
        >>> QuadraticCost.takes
        'a'
    """

    function = QuadraticFunction
    takes = "a"
    native, scale = nn.MSELoss, 0.5
    replaces: ClassVar = dict.fromkeys(
        ("MSELoss", "mse_loss"), "whose C is K/2 times as large"
    )


class CrossEntropyCost(_Cost):
    """C = -1/n Σ_x Σ_j [y ln σ(z) + (1-y) ln(1 - σ(z))]; ∇_z C = (σ(z) - y)/n.

    Its native counterpart is ``nn.BCEWithLogitsLoss``: the K outputs are K sigmoids, K
    yes-or-no questions. ``nn.CrossEntropyLoss``, a softmax, is one question with K
    answers: that is :class:`LogLikelihoodCost`. (The names are the book's.)
    BCEWithLogitsLoss is the mean over all n K numbers. So C and its gradient are K
    times as large for K outputs, and need 1/K of the learning rate: C =
    ``F.binary_cross_entropy_with_logits(z, y, reduction="sum") / n``.

    The last layer is the identity; the cost applies the sigmoid.

    Shape:
        input z (*, K), rows are examples; target (*, K), numbers of the input's dtype,
        or (*), integer labels, which stand for their one-hot rows. C is 0-d.

    Attributes:
        takes: "z", what an identity layer returns.
        native: torch's counterpart.
        scale: C is `scale` times the sum of the native losses, over n.

    Raises:
        TypeError, ValueError: in ``forward``, for arguments that are no dense tensors
            of such shapes and dtypes on one device, labels outside 0..K-1, or a target
            that requires grad.

    Examples:
        >>> CrossEntropyCost()(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))
        tensor(1.3863)
        >>> CrossEntropyCost.takes
        'z'
    """

    function = CrossEntropyFunction
    takes = "z"
    native = nn.BCEWithLogitsLoss
    replaces: ClassVar = {
        "BCEWithLogitsLoss": "whose C is K times as large",
        "binary_cross_entropy_with_logits": "whose C is K times as large",
        "BCELoss": "which takes z and applies the sigmoid itself",
        "binary_cross_entropy": "which takes z and applies the sigmoid itself",
    }


class LogLikelihoodCost(_Cost):
    """C = -1/n Σ_x ln softmax(z)_y, for one-hot y; ∇_z C = (softmax(z) - y)/n.

    Its native counterpart is ``nn.CrossEntropyLoss``, with the same C and gradients for
    inputs (n, K). (With more dimensions, K is the second one in torch and the last one
    here.) ``nn.BCEWithLogitsLoss``, K sigmoids, is :class:`CrossEntropyCost`.

    The last layer is the identity; the cost applies the softmax. Targets of numbers are
    distributions over the classes; the cost is -1/n Σ_x Σ_j y ln softmax(z).

    Shape:
        input z (*, K), rows are examples; target (*, K), numbers of the input's dtype,
        or (*), integer labels, which stand for their one-hot rows. C is 0-d.

    Attributes:
        takes: "z", what an identity layer returns.
        native: torch's counterpart.
        scale: C is `scale` times the sum of the native losses, over n.

    Raises:
        TypeError, ValueError: in ``forward``, for arguments that are no dense tensors
            of such shapes and dtypes on one device, labels outside 0..K-1, or a target
            that requires grad.

    Examples:
        >>> LogLikelihoodCost()(torch.zeros(1, 4), torch.tensor([2]))
        tensor(1.3863)
        >>> LogLikelihoodCost.takes
        'z'
    """

    function = LogLikelihoodFunction
    takes = "z"
    native = nn.CrossEntropyLoss
    replaces: ClassVar = {
        "CrossEntropyLoss": "with the same C",
        "cross_entropy": "with the same C",
        "NLLLoss": "which takes z and applies the log-softmax itself",
        "nll_loss": "which takes z and applies the log-softmax itself",
    }


COSTS: dict[str, type[_Cost]] = {
    "quadratic": QuadraticCost,
    "cross-entropy": CrossEntropyCost,
    "log-likelihood": LogLikelihoodCost,
}
for _name, _cost in COSTS.items():
    _f = globals()[f"{_name.replace('-', '_')}_cost"]
    _f.function, _f.takes = _cost.function, _cost.takes
# The native losses, for the help of an option.
COUNTERPARTS = ", ".join(
    f"{name}: nn.{c.native.__name__} in torch" for name, c in COSTS.items() if c.native
)


def define_cost(
    name: str,
    cost: Callable[[Tensor, Tensor], Tensor],
    grad: Callable[[Tensor, Tensor], Tensor],
    takes: str = "a",
) -> type[_Cost]:
    """Make a cost module from a user's own C_x and its gradient, under A1 and A2.

    Args:
        name: the class's name, e.g. "AbsoluteCost".
        cost: C_x of every row, (*, K) outputs and (*, K) targets -> (*).
        grad: ∂C_x/∂output of every row, -> (*, K), without the 1/n of A1.
        takes: "a" if the outputs are activations, "z" if weighted inputs.

    Raises:
        TypeError: `cost` or `grad` is not callable or does not return a tensor.
        ValueError: `name` is not an identifier, `takes` is neither "a" nor "z", a
            result has another shape than documented, an argument is overwritten, or a
            tensor is read that requires grad and would never get its gradient.

    Both are checked on three outputs. If they take another number only, for example
    because of ten class weights, they are checked at the first call.

    Examples:
        >>> import torch, torchbp
        >>> Absolute = torchbp.define_cost(
        ...     "Absolute",
        ...     cost=lambda a, y: (a - y).abs().sum(-1),
        ...     grad=lambda a, y: (a - y).sign(),
        ... )
        >>> Absolute()(torch.tensor([[0.0, 3.0], [1.0, 1.0]]), torch.ones(2, 2))
        tensor(1.5000)
    """
    check_name(name)
    if takes not in ("a", "z"):
        raise ValueError(f'takes: expected "a" or "z", got {takes!r}')
    parts = {
        "per_example": staticmethod(cost),
        "nabla": staticmethod(grad),
        **check_cost(cost, grad),
    }
    function = make_class(f"{name}Function", CostFunction, parts)
    doc = (_Cost.__doc__ or "").format(name=name, takes=takes)
    members = {"__doc__": doc, "function": function, "takes": takes}
    return place(make_class(name, _Cost, members))
