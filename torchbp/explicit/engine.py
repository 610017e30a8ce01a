"""ExplicitSGD: mini-batch SGD without autograd, an order of magnitude faster than a
native training loop on the book's networks.

It runs the algorithm of :func:`torchbp.backprop`. Its steps are torch calls on buffers
made beforehand (:mod:`torchbp.explicit.steps`) or compiled loops
(:mod:`torchbp.explicit.kernel`); the engine checks the arguments and chooses and caches
the steps.
"""

from __future__ import annotations

import contextlib
import operator
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchbp import costs
from torchbp._autograd import without_autocast
from torchbp._numeric import summing_dtype
from torchbp.explicit import kernel as loops
from torchbp.explicit.checks import (
    Rates,
    check_batch,
    check_layers,
    check_order,
    check_separate,
    check_set,
    layers_of,
)
from torchbp.explicit.parameters import (
    PackedParameters,
    copy_back,
    in_place,
    place_of,
)
from torchbp.explicit.steps import BUILT_IN, FAST, Steps, Unit
from torchbp.functional import LinearFunction
from torchbp.nn import check_takes

__all__ = ["ExplicitSGD"]

# Examples gathered at once: 25 batches of ten, whose 800 kB stay in a core's cache.
EXAMPLES_AT_ONCE = 250
GATHERED_PER_YIELD = 20
CACHED_SIZES = 8  # batch sizes whose buffers are cached


class ExplicitSGD:
    """Mini-batch SGD by explicit backpropagation: W ← W - η ∂C/∂W, fast.

    Args:
        model: an MLP, a hand-written layer, or an ``nn.Sequential`` of them, on its
            device; every parameter in one layer only.
        cost: a QuadraticCost, CrossEntropyCost or LogLikelihoodCost, or one from
            ``define_cost``.
        lr: η.
        weight_decay: λ/n of the book: on weights, not on biases.
        kernel: how steps are computed. "torch": by torch calls on buffers made
            beforehand. "compiled": by C++ loops, for float32 on the CPU with built-in
            layers and costs. "auto": by the loops if a fixed rule of sizes and batch
            size says that they are faster and a C++ compiler is available; the first
            long epoch builds them.

    Attributes:
        model, cost, kernel: the arguments.

    Raises:
        TypeError: `model` or `cost` is of another kind, or a rate is not a number.
        ValueError: a rate is negative or not finite, the cost takes z and the last
            layer gives a, two layers share a parameter, or the kernel is not available.

    The network's structure is fixed at construction. Rates may be changed between
    calls, and so may the values, memory, dtype and device of the parameters.

    Whenever a call has returned or raised, the model's own parameters are up to date;
    they are the same objects in the same memory as before. Parameters that do not
    require grad do not change, hooks do not run, and autocast has no effect.

    After the first batch of a size, a step allocates next to nothing; except in large
    batches BP4 is added to W directly, without storing the gradient. Besides a copy of
    the parameters, the buffers hold some 250 examples, or one batch if that is larger,
    for each of the last 8 batch sizes. On CUDA the steps of some 250 examples are
    captured as one graph, and an epoch does not wait for the device after its checks.
    A Python number that a user's σ or cost reads has the value it had at the capture.

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
        self._rates = Rates(lr, weight_decay)
        self._rates.check_dtype(model)
        self.model, self.cost = model, cost
        self._layers, self._function = layers, costs.function_of(cost)
        self._function.check_parts(
            layers[-1].weight.new_empty(1, len(layers[-1].weight))
        )
        check_separate(layers)
        self._is_built_in = self._function in BUILT_IN and all(
            layer.function is LinearFunction or layer.function in FAST
            for layer in layers
        )
        self._is_generating = False
        self.kernel = kernel
        if kernel not in ("auto", "torch"):  # raises an error if it is not available
            self._choose_kernel(1, is_bytes=True, may_build=True)
        self._checked: tuple[Any, Any] = (None, None)  # rates and dtype that fit
        # Steps by the memory to which they are bound, the least recently used first.
        self._cache: OrderedDict[Any, Steps | loops.CompiledSteps] = OrderedDict()
        self._packed = PackedParameters()

    @property
    def lr(self) -> float:
        """η; it may be changed between calls."""
        return self._rates.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._rates = replace(self._rates, lr=value)

    @property
    def weight_decay(self) -> float:
        """λ/n; it may be changed between calls."""
        return self._rates.weight_decay

    @weight_decay.setter
    def weight_decay(self, value: float) -> None:
        self._rates = replace(self._rates, weight_decay=value)

    def step(self, input: Tensor, target: Tensor) -> Tensor:
        """Update the parameters once, from one mini-batch.

        Args:
            input: (*, n_in), in the parameters' dtype.
            target: (*, K), or labels (*).

        Returns:
            the mini-batch's cost before the update, 0-d.

        Raises:
            TypeError, ValueError: the arguments do not fit; nothing has changed then.
            RuntimeError: a generator of :meth:`steps` is not finished.
        """
        self._check_ready()
        x, y = check_batch(self._layers, input, target)
        m = len(x)
        if not m:
            raise ValueError(f"input: expected an example, got {tuple(input.shape)}")
        places = tuple(map(place_of, self._layers))
        # For cached compiled steps that choice has been made.
        is_compiled = (m, 1, False, True, *places) in self._cache or (
            self._choose_kernel(m, is_bytes=False, may_build=False) == "compiled"
        )
        if is_compiled:
            loop: loops.CompiledSteps = self._steps(places, m, 1, False, True)
            return loop.take_one(x, y)
        with self._mode(x):
            calls: Steps = self._steps(places, m, 1, False, False)
            calls.x.copy_(x)
            calls.y.copy_(y)
            C = calls.run(1)
        return C[0].clone()

    def epoch(
        self,
        images: Tensor,
        targets: Tensor,
        batch_size: int,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Update the parameters once for each mini-batch of a new permutation of the
        examples.

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
            TypeError, ValueError: the arguments do not fit; nothing has changed then.
            RuntimeError: a generator of :meth:`steps` is not finished.
        """
        self._check_ready()
        targets = check_set(self._layers, images, targets, batch_size)
        n = len(images)
        m = min(operator.index(batch_size), n)
        device = "cpu" if generator is None else generator.device
        order = torch.randperm(n, generator=generator, device=device)
        order = order.to(images.device)
        C = torch.cat(list(self._run_steps(images.detach(), targets, order, m)))
        terms = C.to(summing_dtype(C.device))
        last = n - (len(C) - 1) * m  # examples in the last mini-batch
        return ((terms[:-1].sum() * m + terms[-1] * last) / n).to(C.dtype)

    def steps(
        self, images: Tensor, targets: Tensor, order: Tensor, batch_size: int
    ) -> Generator[Tensor, None, None]:
        """Update the parameters once for each mini-batch of `order`.

        Args:
            images, targets, batch_size: as in :meth:`epoch`.
            order: indices of examples, int64; every `batch_size` of them are a batch.

        Yields:
            the costs of the mini-batches, some 5,000 examples at a time, 1-d. The model
            gets the updated parameters when the generator is exhausted or closed. Until
            then changes of the rates and of ``requires_grad`` have no effect.

        Raises:
            TypeError, ValueError: as :meth:`epoch`, at once.
            RuntimeError: another such generator of this engine is not finished.
        """
        self._check_rates()
        targets = check_set(self._layers, images, targets, batch_size)
        check_order(order, len(images))
        m = min(operator.index(batch_size), len(order))
        return self._run_steps(images.detach(), targets, order.to(images.device), m)

    def _run_steps(
        self, images: Tensor, targets: Tensor, order: Tensor, m: int
    ) -> Generator[Tensor, None, None]:
        """Generate the costs of :meth:`steps`. No mode may be set around a yield, since
        it would be set for the consumer, too."""
        self._check_ready()
        count = max(1, min(EXAMPLES_AT_ONCE // m, len(order) // m))
        labels = not targets.is_floating_point()
        is_compiled = self._choose_kernel(m, *_kind_of(images, len(order))) != "torch"
        with self._mode(images):
            check_layers(self._layers)
            check_separate(self._layers)
            units = self._packed.copy_from(self._layers)
        places = tuple(unit.key for unit in units)
        full = len(order) // m * m  # examples in full batches
        parts = [(m, count, order[:full]), (len(order) - full, 1, order[full:])]
        parts = [part for part in parts if len(part[2])]
        try:
            self._is_generating = True
            with self._mode(images):
                made = [
                    self._steps(places, size, at_once, labels, is_compiled, units)
                    for size, at_once, _ in parts
                ]
            for (size, at_once, part), steps in zip(parts, made, strict=True):
                for rows in part.split(size * at_once * GATHERED_PER_YIELD):
                    with self._mode(images):
                        C = steps.take(images, targets, rows)
                    yield C
        finally:
            self._is_generating = False
            copy_back(units, self._layers)

    def _steps(
        self,
        places: tuple[Any, ...],
        m: int,
        count: int,
        labels: bool,
        is_compiled: bool,
        units: Sequence[Unit] | None = None,
    ) -> Any:
        """Return the steps for batches of m on `units`, or on the parameters in place;
        they are made once and cached under `places`, the keys of their memory."""
        key = (m, count, labels, is_compiled, *places)
        steps = self._cache.pop(key, None)
        if steps is None:
            check_layers(self._layers)
            check_separate(self._layers)
            units = in_place(self._layers) if units is None else units
            make = partial(Steps, units, self._function, m, count, labels)
            if is_compiled:
                train = loops.load(build=False)
                steps = loops.CompiledSteps(train, units, self._function, m, make)
            else:
                steps = make()
            while len(self._cache) >= CACHED_SIZES:
                self._cache.popitem(last=False)
        self._cache[key] = steps
        steps.bind(self._rates)
        return steps

    def choose_kernel(self, images: Tensor, batch_size: int) -> str:
        """Return the kernel of such epochs, "torch" or "compiled"; build the loops if
        they are chosen.

        Args:
            images: an epoch's; "auto" builds the loops for 10,000 and more.
            batch_size: m.

        Raises:
            ValueError: `kernel` is "compiled", which is not available.
        """
        m = min(batch_size, len(images))
        return self._choose_kernel(m, *_kind_of(images, len(images)))

    def _choose_kernel(self, m: int, is_bytes: bool, may_build: bool) -> str:
        """Return the kernel for batches of m, as :meth:`choose_kernel`."""
        weights = [layer.weight for layer in self._layers]
        functions = [layer.function for layer in self._layers]
        return loops.choose(
            self.kernel, functions, self._function, weights, m, is_bytes, may_build
        )

    def _check_ready(self) -> None:
        """Raise an error unless a step can be taken at these rates, now."""
        self._check_rates()
        if self._is_generating:
            raise RuntimeError(
                "ExplicitSGD: expected the generator of steps() to be exhausted or "
                "closed first, got another call while it has the parameters"
            )

    def _check_rates(self) -> None:
        """Raise ValueError unless the rates fit the parameters' dtype."""
        rates, dtype = self._rates, self._layers[0].weight.dtype
        if rates is not self._checked[0] or dtype is not self._checked[1]:
            rates.check_dtype(self._layers[0])
            self._checked = rates, dtype

    @contextlib.contextmanager
    def _mode(self, like: Tensor) -> Iterator[None]:
        """Switch autograd and autocast off. Inference mode makes each call a little
        faster, but a user's σ or cost may use autograd itself, so they run without."""
        inference = torch.inference_mode(self._is_built_in)
        with inference, torch.no_grad(), without_autocast(like):
            yield

    def state_dict(self) -> dict[str, Any]:
        """Return the rates: plain SGD has no other state."""
        return asdict(self._rates)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the rates to those of `state`, from :meth:`state_dict`."""
        rates = Rates(state["lr"], state["weight_decay"])
        rates.check_dtype(self.model)
        self._rates = rates

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes without the buffers and the calls bound to them."""
        empty = {"_cache": OrderedDict(), "_packed": PackedParameters()}
        return {**self.__dict__, **empty}


def _kind_of(images: Tensor, examples: int) -> tuple[bool, bool]:
    """Return whether images are bytes, and whether so many examples justify a build."""
    return images.dtype == torch.uint8, examples >= loops.BUILT_FROM
