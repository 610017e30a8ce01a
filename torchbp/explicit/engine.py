"""Backpropagation as the derivation states it: the whole network at once, no autograd.

:func:`backprop` is the algorithm to be read: feedforward, output error, sweep back,
gradients. :class:`ExplicitSGD` is the same algorithm to be run, an order of magnitude
faster than a native training loop on the book's networks; how, says
:mod:`torchbp.explicit`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import numbers
import operator
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from torchbp import costs
from torchbp._autograd import autocast_dtype, autocast_off
from torchbp._checks import explain, explain_memory
from torchbp.convert import from_native
from torchbp.explicit import kernel as loops
from torchbp.explicit.steps import BUILT_IN, FAST, Steps, Unit, padded
from torchbp.functional import LinearFunction, as_rows
from torchbp.nn import MLP, BPLinear, check_takes

__all__ = ["ExplicitSGD", "backprop", "layers_of"]

# What is gathered at once: 25 batches of ten, whose 800 kB stay in a core's cache.
EXAMPLES_AT_ONCE = 250
GATHERED_PER_YIELD = 20
SIZES_KEPT = 8  # batch sizes whose buffers are kept


@torch.no_grad()
def backprop(
    model: nn.Module, cost: Any, input: Tensor, target: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The cost of a batch and its gradient by every parameter, by BP1-BP4 alone.

    Args:
        model: an :class:`torchbp.MLP`, one layer of ours, or an ``nn.Sequential`` of
            them. Nothing in it changes; hooks do not run.
        cost: one of ours, module or function, or from ``define_cost``.
        input: a^0, rows are examples.
        target: as the cost takes it: numbers, or integer labels.

    Shape:
        input (*, n_in), target (*, K) or (*) for labels.

    Returns:
        C, 0-d, and {parameter name: gradient of the parameter's shape}, without those
        parameters that do not require grad.

    Raises:
        TypeError, ValueError: a model of another kind, a cost that takes z on a network
            that gives a, or arguments that do not fit, as the layers and costs say.

    Autocast has no say here: everything is computed in the parameters' dtype.

    Source: Nielsen, Neural Networks and Deep Learning, chapter 2, "The backpropagation
    algorithm".

    Examples:
        >>> import torch, torchbp
        >>> model = torchbp.MLP([4, 3, 2])
        >>> x, y = torch.rand(5, 4), torch.tensor([0, 1, 1, 0, 1])
        >>> C, grads = torchbp.backprop(model, torchbp.QuadraticCost(), x, y)
        >>> {name: tuple(grad.shape) for name, grad in grads.items()}
        ... # doctest: +NORMALIZE_WHITESPACE
        {'layers.0.weight': (3, 4), 'layers.0.bias': (3,),
         'layers.1.weight': (2, 3), 'layers.1.bias': (2,)}
    """
    layers = layers_of(model)
    check_takes(model, cost)
    function = costs.function_of(cost)
    x, y = _check_batch(layers, input, target)
    with _without_autocast(x):
        # Feedforward: z^ℓ = W^ℓ a^{ℓ-1} + b^ℓ, a^ℓ = σ(z^ℓ); s is a or z, whatever σ'
        # is computed from.
        a, s = [x], []
        for layer in layers:
            output = layer.function.evaluate(a[-1], layer.weight, layer.bias)
            s.append(layer.function.saved(output))
            a.append(output[0] if isinstance(output, tuple) else output)
        C = function.evaluate(a[-1], y)  # A1

        # Output error, then the sweep back through the layers.
        grads: dict[nn.Parameter, Tensor] = {}
        grad_a = (function.nabla(a[-1], y) / len(x)).to(x.dtype)
        for ell in reversed(range(len(layers))):
            layer = layers[ell]
            delta = layer.function.gate(grad_a, s[ell])  # BP1, BP2
            _add(grads, layer.bias, delta.sum(0))  # BP3
            _add(grads, layer.weight, delta.t() @ a[ell])  # BP4
            if ell:
                grad_a = delta @ layer.weight  # BP2
    return C, {n: grads[p] for n, p in model.named_parameters() if p in grads}


def _add(grads: dict[nn.Parameter, Tensor], p: Any, grad: Tensor) -> None:
    """Note the gradient by `p`; one that several layers share has the sum of theirs."""
    if p is not None and p.requires_grad:
        grads[p] = grads[p] + grad if p in grads else grad


def _without_autocast(like: Tensor) -> contextlib.AbstractContextManager[None]:
    on = autocast_dtype(like) is not None
    return autocast_off(like.device.type) if on else contextlib.nullcontext()


def layers_of(model: nn.Module) -> list[BPLinear]:
    """The layers of ours that `model` calls one after the other, and nothing else.

    Args:
        model: an MLP, a layer of ours, or an ``nn.Sequential`` of them.

    Raises:
        TypeError: `model` is something else, or a layer's parameters are computed from
            others (parametrizations, pruning).
        ValueError, TypeError: layers that do not fit together.

    Examples:
        >>> model = nn.Sequential(MLP([4, 3, 2]), nn.Identity(), BPLinear(2, 1))
        >>> [layer.out_features for layer in layers_of(model)]
        [3, 2, 1]
    """
    modules = list(_chain(model))
    others = [type(m).__name__ for m in modules if not _is_ours(m)]
    if others:
        raise TypeError(
            "model: expected an MLP, a hand-written layer or an nn.Sequential of them, "
            f"got {others[0]}{_advice(model)}"
        )
    if not modules:
        raise TypeError("model: expected at least one hand-written layer, got none")
    layers: list[Any] = modules
    _check_layers(layers)
    return layers


def _chain(module: Any) -> Iterator[Any]:
    """The modules that `module` calls one after the other; only what an MLP and an
    ``nn.Sequential`` are made of can be told."""
    children: Any = []
    if isinstance(module, MLP) and type(module).forward is MLP.forward:
        children = module.layers
    elif type(module) is nn.Sequential:
        children = module
    elif type(module) is not nn.Identity:
        yield module
    for child in children:
        yield from _chain(child)


def _is_ours(module: Any) -> bool:
    return isinstance(module, BPLinear) and type(module).forward is BPLinear.forward


def _advice(model: Any) -> str:
    """What to do with a `model` that is no chain of our layers."""
    if not isinstance(model, nn.Module):
        return ""
    with contextlib.suppress(TypeError, ValueError):  # what cannot be converted
        if all(map(_is_ours, _chain(from_native(model)))):
            return "; from_native(model) converts it"
    return "; other models train by autograd: cost(model(x), y).backward()"


def _check_batch(
    layers: list[BPLinear], input: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """The input (examples, n_in) and the target's rows (examples, K), once checked."""
    reason = explain(input, layers[0].weight, layers[0].bias)
    if reason is not None:
        raise reason
    costs.check_tensors(input, target)
    shape = (*input.shape[:-1], layers[-1].out_features)
    output = torch.empty((), dtype=input.dtype, device=input.device).expand(shape)
    return as_rows(input.detach()), as_rows(costs.target_rows(output, target))


def _check_layers(layers: list[BPLinear]) -> None:
    """That each layer's parameters are its own, and fit the layer before it."""
    for layer in layers:
        _check_own(layer)
    for before, layer in itertools.pairwise(layers):
        a = before.weight.new_empty(()).expand(1, before.weight.shape[0])
        reason = explain(a, layer.weight, layer.bias)
        if reason is not None:
            raise type(reason)(f"{type(layer).__name__} behind another layer: {reason}")


def _check_set(
    layers: list[BPLinear], images: Tensor, targets: Tensor, batch_size: int
) -> Tensor:
    """The targets of a whole set of examples, labels as int64, once all is checked."""
    if isinstance(batch_size, bool) or not hasattr(batch_size, "__index__"):
        raise TypeError(f"batch_size: expected an integer, got {batch_size!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    costs.check_tensors(images, targets, ("images", "targets"))
    W = layers[0].weight
    if images.dtype not in (torch.uint8, W.dtype):
        raise TypeError(
            f"images: expected uint8 or the parameters' {W.dtype}, got {images.dtype}"
        )
    if images.dim() != 2 or images.shape[1] != W.shape[1] or not len(images):
        raise ValueError(
            f"images: expected shape (n, {W.shape[1]}) with n >= 1, "
            f"got {tuple(images.shape)}"
        )
    if images.device != W.device:
        raise ValueError(
            f"images: expected the parameters' device {W.device}, got {images.device}"
        )
    _check_numbers("images", images)
    outputs = W.new_empty(()).expand(len(images), layers[-1].weight.shape[0])
    costs.check(outputs, targets)
    _check_numbers("targets", targets)
    if targets.is_floating_point():
        return targets
    targets = targets.long()
    costs.check_labels(targets, outputs.shape[1])
    return targets


def _check_numbers(name: str, t: Tensor) -> None:
    """Raise ValueError unless all are there and finite."""
    if (reason := explain_memory(name, t)) is not None:
        raise reason
    # The sum tells at a third of the cost; it may overflow where no number has.
    if not t.is_floating_point() or t.sum().isfinite():
        return
    bad = ~t.isfinite().flatten(1).all(1)
    if bad.any():
        i = int(bad.int().argmax())
        raise ValueError(
            f"{name}: expected finite numbers, got {t[i][~t[i].isfinite()][0].item()} "
            f"in example {i} and {int(bad.sum()) - 1} more that are not"
        )


def _check_order(order: Tensor, n: int) -> None:
    """That `order` is a list of examples."""
    if order.dim() != 1 or order.dtype != torch.int64 or not len(order):
        raise ValueError(
            f"order: expected int64 indices (k) with k >= 1, got {order.dtype} "
            f"{tuple(order.shape)}"
        )
    low, high = int(order.min()), int(order.max())
    if low < 0 or high >= n:
        raise ValueError(
            f"order: expected indices in 0..{n - 1}, got {low if low < 0 else high}"
        )


def summing_dtype(device: torch.device) -> torch.dtype:
    """What sums over many examples are made in: float64 where the device has it.

    Args:
        device: where the sums are made.

    Examples:
        >>> summing_dtype(torch.device("cpu"))
        torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64


def check_rates(lr: float, weight_decay: float, model: nn.Module) -> None:
    """Raise ValueError unless both rates are finite and not negative, and the
    parameters' dtype has room for what they are multiplied by.

    Args:
        lr: η.
        weight_decay: λ/n.
        model: whose parameters they are for.

    Raises:
        TypeError: one of the rates is no number: a tensor could be changed unseen.
        ValueError: one of the rates is negative, not finite or too large.

    Examples:
        >>> check_rates(-1.0, 0.0, nn.Linear(2, 1))
        Traceback (most recent call last):
            ...
        ValueError: lr: expected a number >= 0, got -1.0
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not isinstance(value, numbers.Real):
            got = type(value).__name__
            raise TypeError(f"{name}: expected a number, got {value!r} of type {got}")
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: expected a number >= 0, got {value}")
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    largest = torch.finfo(dtype).max
    for name, value in (("lr", lr), ("lr · weight_decay", lr * weight_decay)):
        if value > largest:
            raise ValueError(
                f"{name}: expected at most {largest:.3g}, the largest {dtype}, "
                f"got {value:.3g}"
            )


def _trains(layer: BPLinear) -> tuple[bool, bool]:
    """Whether W and b are to be updated."""
    b: Any = layer.bias
    return layer.weight.requires_grad, b is not None and b.requires_grad


def _check_own(layer: BPLinear) -> None:
    """Raise TypeError unless W and b are the layer's own, not computed from others."""
    if layer._parameters.keys() != {"weight", "bias"}:
        raise TypeError(
            f"model: expected layers with a weight and a bias of their own, got "
            f"{type(layer).__name__} whose parameters are computed (a parametrization, "
            f"pruning)"
        )


def _check_separate(layers: list[BPLinear]) -> None:
    """Raise ValueError unless every number of every parameter has its own memory."""
    seen = set()
    for p in (p for layer in layers for p in layer.parameters()):
        if (reason := explain_memory("parameters", p)) is not None:
            raise reason
        strided = zip(p.shape, p.stride(), strict=True)
        if p.data_ptr() in seen or any(n > 1 and not step for n, step in strided):
            raise ValueError(
                "model: expected every parameter in one layer only and with memory of "
                f"its own, got one of shape {tuple(p.shape)} that shares it"
            )
        seen.add(p.data_ptr())


def _key(
    units: list[Unit], m: int, count: int, labels: bool, compiled: bool
) -> tuple[Any, ...]:
    """What steps are made for."""
    return (m, count, labels, compiled, *(unit.key for unit in units))


def _mark_changed(units: Sequence[Unit]) -> None:
    """Tell autograd that parameters were written to: the loops have only addresses."""
    changed = [unit.W for unit in units if unit.updates_weight]
    changed += [unit.b for unit in units if unit.updates_bias and unit.b is not None]
    increment_version(changed)


class ExplicitSGD:
    """Mini-batch SGD by explicit backpropagation: W ← W - η ∂C/∂W, fast.

    Args:
        model: an MLP, one layer of ours, or an ``nn.Sequential`` of them, on its
            device; every parameter in one place only.
        cost: a QuadraticCost, CrossEntropyCost or LogLikelihoodCost, or one from
            ``define_cost``.
        lr: η. May be changed between calls.
        weight_decay: λ/n of the book: on weights, not on biases.
        kernel: what computes the steps. "torch": torch's own calls on buffers made
            beforehand. "compiled": C++ loops, for float32 on the CPU with built-in
            layers and costs. "auto": these where they are faster, which is a fixed rule
            of sizes and batch size, and where a C++ compiler is at hand; the first long
            epoch builds them.

    Attributes:
        model, cost, lr, weight_decay, kernel: as given.

    Raises:
        TypeError: a model or a cost of another kind.
        ValueError: a negative or non-finite lr or weight decay, a cost that takes z on
            a network that gives a, a parameter that two layers share, or a kernel that
            cannot be had.

    The network's structure is that of the moment of construction; the parameters'
    values, memory, dtype and device may change between calls.

    Whenever a call has returned or raised, the model's own parameters are up to date;
    they are the same objects in the same memory as before. Parameters that do not
    require grad stay as they are; hooks do not run, and autocast has no say.

    After the first batch of a size a step allocates next to nothing, and up to 384 rows
    no gradient is made: BP4 adds to W. Beside a copy of the parameters, the buffers
    hold some 250 examples, or one batch where that is larger, for each of the last 8
    batch sizes. On CUDA some 250 examples' steps are captured as one graph, and after
    its checks an epoch does not wait for the device; a Python number that a σ or a cost
    of your own reads is then the one it was.

    Source: Nielsen, Neural Networks and Deep Learning, chapters 1-3.

    Examples:
        >>> import torch, torchbp
        >>> _ = torch.manual_seed(0)
        >>> model = torchbp.MLP([4, 3, 2])
        >>> engine = torchbp.ExplicitSGD(model, torchbp.QuadraticCost(), lr=1.0)
        >>> x, y = torch.rand(20, 4), torch.arange(20) % 2
        >>> costs = [engine.epoch(x, y, batch_size=5) for _ in range(10)]
        >>> bool(costs[-1] < costs[0])
        True
    """

    def __init__(
        self,
        model: nn.Module,
        cost: Any,
        lr: float,
        weight_decay: float = 0.0,
        kernel: str = "auto",
    ) -> None:
        layers = layers_of(model)
        check_takes(model, cost)
        check_rates(lr, weight_decay, model)
        self.model, self.cost = model, cost
        self.lr, self.weight_decay = lr, weight_decay
        self._layers, self._function = layers, costs.function_of(cost)
        self._function.check_parts(
            layers[-1].weight.new_empty(1, len(layers[-1].weight))
        )
        _check_separate(layers)
        self._is_built_in = self._function in BUILT_IN and all(
            layer.function is LinearFunction or layer.function in FAST
            for layer in layers
        )
        self._is_sweeping = False
        if kernel not in loops.KERNELS:
            raise ValueError(f"kernel: expected one of {loops.KERNELS}, got {kernel!r}")
        self.kernel = kernel
        self._checked_rates: tuple[Any, ...] = ()
        if kernel == "compiled":
            self._choose_kernel(1, is_bytes=True, may_build=True)
        # Steps by what they were made for; those not used for longest go first.
        self._made: OrderedDict[Any, Steps | loops.CompiledSteps] = OrderedDict()
        self._packed: list[Tensor] = []

    def step(self, input: Tensor, target: Tensor) -> Tensor:
        """One update from one mini-batch.

        Args:
            input: (*, n_in), in the parameters' dtype.
            target: (*, K), or labels (*).

        Returns:
            the mini-batch's cost before the update, 0-d.

        Raises:
            TypeError, ValueError: arguments that do not fit; nothing has changed then.
        """
        self._check_idle()
        self._check_rates()
        x, y = _check_batch(self._layers, input, target)
        if not len(x):
            raise ValueError(f"input: expected an example, got {tuple(input.shape)}")
        units = self._direct()
        steps = self._compiled_steps(units, len(x))
        if steps is not None:
            C = steps.take_one(x, y)
            _mark_changed(units)
            return C
        with self._mode(x):
            steps = self._steps(units, len(x), 1, False, False)
            steps.x.copy_(x)
            steps.y.copy_(y)
            C = steps.run(1)
        return C[0].clone()

    def choose_kernel(self, images: Tensor, batch_size: int) -> str:
        """Return what will compute such epochs' steps, "torch" or "compiled", built.

        Args:
            images: those of an epoch; "auto" builds the loops for 10,000 and more.
            batch_size: m.

        Raises:
            ValueError: "compiled" was asked for and cannot be had.
        """
        may_build = len(images) >= loops.BUILT_FROM
        m = min(batch_size, len(images))
        return self._choose_kernel(m, images.dtype == torch.uint8, may_build)

    def _choose_kernel(self, m: int, is_bytes: bool, may_build: bool) -> str:
        if self.kernel == "torch":
            return "torch"
        weights = [layer.weight for layer in self._layers]
        functions = [layer.function for layer in self._layers]
        reason = loops.explain_unsuitable(functions, self._function, weights)
        if self.kernel == "auto":
            suits = reason is None and loops.is_faster(weights, m, is_bytes)
            return "compiled" if suits and loops.load(may_build) else "torch"
        if reason is not None:
            raise ValueError(
                f"kernel: expected 'auto' or 'torch' for {reason}, got 'compiled'"
            )
        if loops.load(build=True) is None:
            raise ValueError(
                "kernel: expected 'auto' or 'torch' where the loops cannot be "
                f"compiled, got 'compiled': {loops.explain_failure()}"
            )
        return "compiled"

    def epoch(
        self,
        images: Tensor,
        targets: Tensor,
        batch_size: int,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """One update for each mini-batch of a new permutation of the examples.

        Args:
            images: (n, n_in), uint8, which stand for images / 255, or numbers in the
                parameters' dtype.
            targets: (n, K) in that dtype, or labels (n).
            batch_size: m; the last mini-batch has what is left.
            generator: of the permutation, ``torch.randperm(n)``; torch's own if None.

        Returns:
            the mean cost of the examples, each in its mini-batch before the update,
            0-d.

        Raises:
            TypeError, ValueError: arguments that do not fit; nothing has changed then.
        """
        self._check_rates()
        targets = _check_set(self._layers, images, targets, batch_size)
        n = len(images)
        m = min(operator.index(batch_size), n)
        device = "cpu" if generator is None else generator.device
        order = torch.randperm(n, generator=generator, device=device)
        order = order.to(images.device)
        C = torch.cat(list(self._sweep(images.detach(), targets, order, m)))
        wide = C.to(summing_dtype(C.device))
        last = n - (len(C) - 1) * m  # examples in the last mini-batch
        return ((wide[:-1].sum() * m + wide[-1] * last) / n).to(C.dtype)

    def steps(
        self, images: Tensor, targets: Tensor, order: Tensor, batch_size: int
    ) -> Generator[Tensor, None, None]:
        """One update for each mini-batch of `order`.

        Args:
            images, targets, batch_size: as in :meth:`epoch`.
            order: indices of examples, int64; every `batch_size` of them are a batch.

        Yields:
            the costs of the mini-batches, some 5,000 examples at a time, 1-d. From the
            first until the generator is exhausted or closed, the updated parameters
            are the generator's, and the model has those of the start; the rates, and
            what is frozen, are those of that moment, too.

        Raises:
            TypeError, ValueError: as :meth:`epoch`, at once.
            RuntimeError: another such generator of this engine is not finished.
        """
        self._check_rates()
        targets = _check_set(self._layers, images, targets, batch_size)
        _check_order(order, len(images))
        m = min(operator.index(batch_size), len(order))
        return self._sweep(images.detach(), targets, order.to(images.device), m)

    def _sweep(
        self, images: Tensor, targets: Tensor, order: Tensor, m: int
    ) -> Generator[Tensor, None, None]:
        """The generator behind :meth:`steps`. No mode may be set around a yield: it
        would be set for the consumer, too."""
        self._check_idle()
        count = max(1, min(EXAMPLES_AT_ONCE // m, len(order) // m))
        labels = not targets.is_floating_point()
        may_build = len(order) >= loops.BUILT_FROM
        is_bytes = images.dtype == torch.uint8
        compiled = self._choose_kernel(m, is_bytes, may_build) == "compiled"
        with self._mode(images):
            units = self._pack()
        whole = len(order) // m * m
        parts = [(m, count, order[:whole]), (len(order) - whole, 1, order[whole:])]
        parts = [part for part in parts if len(part[2])]
        try:
            self._is_sweeping = True
            with self._mode(images):
                made = [
                    self._steps(units, size, at_once, labels, compiled)
                    for size, at_once, _ in parts
                ]
            for (size, at_once, part), steps in zip(parts, made, strict=True):
                for rows in part.split(size * at_once * GATHERED_PER_YIELD):
                    with self._mode(images):
                        C = steps.take(images, targets, rows)
                    yield C
        finally:
            self._is_sweeping = False
            self._unpack(units)

    def _check_rates(self) -> None:
        rates = self.lr, self.weight_decay, self._layers[0].weight.dtype
        if rates != self._checked_rates:
            check_rates(self.lr, self.weight_decay, self._layers[0])
            self._checked_rates = rates

    def _check_idle(self) -> None:
        if self._is_sweeping:
            raise RuntimeError(
                "ExplicitSGD: expected the generator of steps() to be exhausted or "
                "closed first, got another call while it has the parameters"
            )

    @contextlib.contextmanager
    def _mode(self, like: Tensor) -> Iterator[None]:
        """No autograd and no autocast. In inference mode a call takes 0.3 µs less; σ
        and costs that a user defined may want autograd for themselves."""
        inference = torch.inference_mode(self._is_built_in)
        with inference, torch.no_grad(), _without_autocast(like):
            yield

    def _compiled_steps(self, units: list[Unit], m: int) -> Any:
        """The loops for one batch of m, or None where the torch calls take it."""
        if self.kernel == "torch":
            return None
        key = _key(units, m, 1, False, True)
        if key in self._made:  # so the question has been asked
            steps = self._made[key]
            self._made.move_to_end(key)
            steps.bind(self.lr, self.weight_decay)
            return steps
        if self._choose_kernel(m, is_bytes=False, may_build=False) == "torch":
            return None
        return self._steps(units, m, 1, False, True)

    def _steps(
        self, units: list[Unit], m: int, count: int, labels: bool, compiled: bool
    ) -> Any:
        """The steps for batches of m, made once and kept."""
        key = _key(units, m, count, labels, compiled)
        steps = self._made.pop(key, None)
        if steps is None:
            _check_layers(self._layers)
            _check_separate(self._layers)
            make = partial(Steps, units, self._function, m, count, labels)
            if compiled:
                train = loops.load(build=False)
                steps = loops.CompiledSteps(train, units, self._function, m, make)
            else:
                steps = make()
            while len(self._made) >= SIZES_KEPT:
                self._made.popitem(last=False)
        self._made[key] = steps
        steps.bind(self.lr, self.weight_decay)
        return steps

    def _direct(self) -> list[Unit]:
        """The layers with the parameters themselves."""
        units = []
        for layer in self._layers:
            W, bias = layer.weight, layer.bias
            trains = W.requires_grad, bias is not None and bias.requires_grad
            b = None if bias is None else bias.detach()
            units.append(Unit(layer.function, W.detach(), b, None, *trains))
        return units

    def _pack(self) -> list[Unit]:
        """The layers with their parameters in matrices whose last column is b."""
        _check_layers(self._layers)
        _check_separate(self._layers)
        wanted = [
            ((len(W), padded(W.shape[1] + 1, W.dtype)), W.dtype, W.device)
            for W in (layer.weight for layer in self._layers)
        ]
        if wanted != [(tuple(M.shape), M.dtype, M.device) for M in self._packed]:
            self._packed = [
                torch.zeros(shape, dtype=dtype, device=device)
                for shape, dtype, device in wanted
            ]
        units = []
        for matrix, layer in zip(self._packed, self._layers, strict=True):
            n_in = layer.weight.shape[1]
            W, b, folded = matrix[:, :n_in], matrix[:, n_in], matrix[:, : n_in + 1]
            W.copy_(layer.weight)
            b.copy_(layer.bias) if layer.bias is not None else b.zero_()
            units.append(Unit(layer.function, W, b, folded, *_trains(layer)))
        return units

    def _unpack(self, units: list[Unit]) -> None:
        """The trained parameters back to where they belong."""
        for unit, layer in zip(units, self._layers, strict=True):
            with torch.inference_mode(layer.weight.is_inference()), torch.no_grad():
                if unit.updates_weight:
                    layer.weight.copy_(unit.W)
                if unit.updates_bias and unit.b is not None:
                    layer.bias.copy_(unit.b)

    def state_dict(self) -> dict[str, Any]:
        """The rates: plain SGD has no other state."""
        return {"lr": self.lr, "weight_decay": self.weight_decay}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The rates from the `state` of :meth:`state_dict`."""
        check_rates(state["lr"], state["weight_decay"], self.model)
        self.lr, self.weight_decay = state["lr"], state["weight_decay"]

    def __getstate__(self) -> dict[str, Any]:
        """Without the buffers, and the calls that are bound to them."""
        return {**self.__dict__, "_made": OrderedDict(), "_packed": []}
