"""A mini-batch's step as a list of bound calls on buffers made beforehand.

With ten images a step is a dozen torch calls of about a microsecond each, so their
number and their allocations decide its speed. :class:`Steps` makes the buffers for one
batch size and binds every call to them once. A step is then ``for op in ops: op()``; on
CUDA it is one replay of the graph captured from the same calls.

The calls and their reasons:

- BP4 and the update are one operation, ``W.addmm_(delta.T, x, alpha=-lr/m)``: the
  gradient is neither stored nor read again. Where one operation would be less exact,
  there are two: see :func:`adds_once`.
- A packed matrix has b as its last column, and x has a column of ones for it: BP3 is a
  column of BP4, and z = x Wᵀ + b is one product. ``b.addmv_(delta.T, ones)`` would
  lose digits at large batches, since it adds tiny terms one by one.
- Rows of packed matrices start at multiples of 64 bytes, which makes the products
  faster.
- Images stay bytes until they are gathered, many batches at once. They are then
  multiplied by 1/255, which is faster than a division and differs from it in the last
  bit at most.
- σ' of all layers that share a σ is one call over their activations, which lie next to
  each other in memory.
- The costs of many batches are computed at once, from their stored outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchbp import costs, functional
from torchbp.costs import COSTS, CostFunction
from torchbp.explicit.checks import Rates
from torchbp.functional import LinearFunction
from torchbp.nn import ACTIVATIONS

Op = Callable[[], Any]

ALIGNMENT = 64  # bytes: a cache line, and the widest vector


class Unit(NamedTuple):
    """One layer in a step. W and b are views of the packed matrix `folded`, (n_out,
    n_in + 1), or of the parameters themselves if that is None."""

    function: type[LinearFunction]
    W: Tensor
    b: Tensor | None
    folded: Tensor | None
    updates_weight: bool
    updates_bias: bool

    @property
    def key(self) -> tuple[Any, ...]:
        """The :func:`memory_key` of the layer."""
        return memory_key(self.W, self.b, self.updates_weight, self.updates_bias)


def memory_key(
    W: Tensor, b: Tensor | None, updates_weight: bool, updates_bias: bool
) -> tuple[Any, ...]:
    """Return the cache key of calls bound to W and b: addresses, strides, shapes,
    dtypes, devices, and which are trained. The bound calls keep this memory alive, so
    an address in a key is never reused for other tensors."""
    key = W.data_ptr(), W.stride(), W.shape, W.dtype, W.device, updates_weight
    if b is None:
        return key
    return *key, b.data_ptr(), b.stride(), b.shape, b.dtype, b.device, updates_bias


# The Functions whose σ and σ' take `out`. A user's subclass of one of them is not in
# the set, since its σ or σ' may differ.
FAST = {
    layer.function for layer in ACTIVATIONS.values() if layer.function.slope is not None
}
BUILT_IN = {cost.function for cost in COSTS.values()}


def _alike(t: Tensor, value: float) -> Tensor:
    """Return a tensor of t's shape and strides, filled with `value`."""
    return torch.empty_strided(
        t.shape, t.stride(), dtype=t.dtype, device=t.device
    ).fill_(value)


def adds_once(W: Tensor, delta_T: Tensor, x: Tensor) -> bool:
    """Return whether ``W.addmm_(delta_T, x)`` adds the whole sum over the rows to W at
    once.

    BLAS adds a sum over many rows to W block after block, and each addition rounds at
    the size of W, so the error of the update grows with the number of blocks. The
    length of a block depends on the processor (in MKL 384 rows with AVX-512, 96 with
    AVX2, and 1 for small matrices on older ones) and on the shapes. So try it on
    tensors of the same shapes and strides: to entries of 1 the first row adds ε/2 and
    the last one ε/4, each of which would be rounded away if it were added alone.
    """
    if len(x) == 1:
        return True
    eps = torch.finfo(W.dtype).eps
    ones, left, right = _alike(W, 1), _alike(delta_T, 1), _alike(x, 0)
    right[0], right[-1] = 2 * eps, eps
    return bool((ones.addmm_(left, right, alpha=0.25) > 1).all())  # alpha: as in steps


def padded_width(n: int, dtype: torch.dtype) -> int:
    """Return n rounded up to a multiple of :data:`ALIGNMENT` bytes."""
    step = ALIGNMENT // dtype.itemsize
    return -(-n // step) * step


def _first(n: int, buffer: Tensor) -> Tensor:
    """Return the first n rows. If that is all, do not slice: a slice costs as much as
    an operation on ten images."""
    return buffer if n == len(buffer) else buffer[:n]


class LayerCalls:
    """The buffers of one layer at batches of m rows, and the calls on them.

    Attributes:
        z, a, delta: (m, n_out) views of the padded buffers, (m, width).
        x: the next layer's input, (m, n_out + 1) with ones or (m, n_out).
    """

    def __init__(self, unit: Unit, m: int, is_last: bool) -> None:
        self.unit, self.m, self.is_last = unit, m, is_last
        self.is_fast = unit.function in FAST
        self.is_identity = unit.function is functional.LinearFunction
        n = unit.W.shape[0]
        # The last layer has no ones to carry, and costs reduce over its rows.
        self.width = n if is_last else padded_width(n + 1, unit.W.dtype)
        self.padded_z, self.padded_delta = self._new_buffer(), self._new_buffer()
        self.z, self.delta = self.padded_z[:, :n], self.padded_delta[:, :n]
        self.writes_ones = False
        self.adds_once: bool | None = None  # not tried yet
        self.sum: Tensor | None = None  # of δᵀ x, if that is not added at once

    def _new_buffer(self) -> Tensor:
        """Return zeros, (m, width)."""
        return self.unit.W.new_zeros(self.m, self.width)

    def place(self, a: Tensor | None, slope: Tensor | None) -> None:
        """Take these parts of the memory of all layers' a and σ' as the buffers."""
        n = self.unit.W.shape[0]
        self.padded_a = self.padded_z if a is None else a.view(self.m, self.width)
        self.padded_slope = None if slope is None else slope.view(self.m, self.width)
        self.a = self.padded_a[:, :n]
        self.x = self.a
        if self.unit.folded is not None and not self.is_last:
            # σ is one call over z and this column. It gives 1 in the column if some z
            # has σ(z) = 1; if none has, the ones are written again after each call.
            one = self.unit.function.one if self.is_fast else None
            self.padded_z[:, n] = 1 if one is None else one
            self.ones = self.padded_a[:, n].fill_(1)
            self.writes_ones = self.is_fast and one is None
            self.x = self.padded_a[:, : n + 1]

    def forward(self, x: Tensor, z: Tensor) -> list[Op]:
        """Return the calls for z = x Wᵀ + b and a = σ(z)."""
        unit = self.unit
        if unit.folded is not None:
            product = partial(torch.mm, x, unit.folded.t(), out=z)
        elif unit.b is None:
            product = partial(torch.mm, x, unit.W.t(), out=z)
        else:
            product = partial(torch.addmm, unit.b, x, unit.W.t(), out=z)
        if self.is_identity:
            return [product]
        if self.is_fast:
            f: Any = unit.function.sigma
            sigma = partial(f, self.padded_z, out=self.padded_a)
            ones = [partial(self.ones.fill_, 1)] if self.writes_ones else []
            return [product, sigma, *ones]
        return [product, lambda: self.a.copy_(unit.function.sigma(z))]

    def gate(self, grad_a: Tensor) -> list[Op]:
        """Return the calls for δ = grad_a ⊙ σ'(z), grad_a of the padded shape."""
        if self.is_identity:
            return []
        if self.padded_slope is not None:
            if grad_a is self.padded_delta:
                return [partial(grad_a.mul_, self.padded_slope)]  # BP2
            return [
                partial(torch.mul, grad_a, self.padded_slope, out=self.padded_delta)
            ]
        function = self.unit.function
        grad_a = grad_a[:, : self.delta.shape[1]]
        s = functional.saved_of(function, self.a, self.z)
        return [lambda: self.delta.copy_(function.gate(grad_a, s))]  # BP2

    def update(self, x: Tensor, rates: Rates) -> list[Op]:
        """Return the calls for W ← W - η (δᵀ x / m + λ/n W) and b ← b - η δᵀ 1 / m. The
        1/m of A1 is in the rate; δ does not contain it."""
        unit, delta = self.unit, self.delta.t()
        rate = -rates.lr / self.m
        ops: list[Op] = []
        if rates.weight_decay and unit.updates_weight:
            # A factor 1 - ηλ/n of the product below would be rounded: for a small ηλ/n
            # that loses much of the decay, in the same direction at every step.
            decay = -rates.lr * rates.weight_decay
            ops.append(partial(unit.W.add_, unit.W, alpha=decay))
        if unit.folded is not None and unit.updates_weight and unit.updates_bias:
            return [*ops, *self._add_product(unit.folded, delta, x, rate)]  # BP3, BP4
        if unit.updates_weight:
            x = x[:, : unit.W.shape[1]]
            ops += self._add_product(unit.W, delta, x, rate)  # BP4
        if unit.updates_bias and unit.b is not None:
            total = torch.zeros_like(unit.b, memory_format=torch.contiguous_format)
            ops.append(partial(torch.sum, self.delta, 0, out=total))  # BP3
            ops.append(partial(unit.b.add_, total, alpha=rate))
        return ops

    def _add_product(
        self, W: Tensor, delta: Tensor, x: Tensor, rate: float
    ) -> list[Op]:
        """Return the calls for W ← W + rate δᵀ x, rounded once at the size of W."""
        if self.adds_once is None:
            self.adds_once = adds_once(W, delta, x)
            self.sum = None if self.adds_once else _alike(W, 0)
        if self.sum is None:
            return [partial(W.addmm_, delta, x, alpha=rate)]
        product = partial(torch.mm, delta, x, out=self.sum)
        return [product, partial(W.add_, self.sum, alpha=rate)]


class Steps:
    """The steps of `count` consecutive mini-batches of `m` rows.

    Args:
        units: the layers.
        cost: the cost's Function.
        m, count: rows in a batch, and batches that are gathered at once.
        labels: whether the targets are labels; their rows are then one-hot.

    Attributes:
        x: the buffer for the inputs, (count m, n_in).
        y: the buffer for the targets' rows, (count m, K); see :meth:`gather`.
        v: the outputs from which the costs are computed, (count m, K).
    """

    def __init__(
        self,
        units: Sequence[Unit],
        cost: type[CostFunction],
        m: int,
        count: int,
        labels: bool,
    ) -> None:
        self.units, self.cost, self.m, self.count = units, cost, m, count
        self.rates = Rates(0.0)
        first = units[0].W
        n_in, K = first.shape[1], units[-1].W.shape[0]
        rows = m * count
        inputs = first.new_zeros(rows, padded_width(n_in + 1, first.dtype))
        inputs[:, n_in] = 1
        self.x = inputs[:, :n_in]
        has_ones = units[0].folded is not None
        self.inputs = inputs[:, : n_in + has_ones].view(count, m, -1).unbind(0)
        self.y, self.v = first.new_zeros(rows, K), first.new_zeros(rows, K)
        self.targets = self.y.view(count, m, K).unbind(0)
        self.outputs = self.v.view(count, m, K).unbind(0)
        self.costs = first.new_zeros(count)
        self.factors: Tensor | None = None
        if labels and cost in BUILT_IN and cost.one_hot_nabla is not None:
            self.factors, self.one = torch.ones_like(self.y), first.new_ones(())
        self.layers = [
            LayerCalls(u, m, i == len(units) - 1) for i, u in enumerate(units)
        ]
        self.output_is_z = self.layers[-1].is_identity
        self.slopes = self._place()
        self.ops: list[list[Op]] = []
        self.selected: dict[torch.dtype, Tensor] = {}
        self.graph: Any = None
        self.warm = False
        self.capturable = first.is_cuda

    def _place(self) -> list[Op]:
        """Place the activations of all layers next to each other in memory, and their
        σ' likewise; return the calls that compute σ'."""
        fast = [layer for layer in self.layers if layer.is_fast]
        sizes = [layer.m * layer.width for layer in fast]
        new = self.units[0].W.new_zeros
        a, slope = new(sum(sizes)), new(sum(sizes))
        shares = zip(a.split(sizes), slope.split(sizes), strict=True)
        for layer in self.layers:
            if layer.is_fast:
                layer.place(*next(shares))
            else:
                own = None if layer.is_identity else layer._new_buffer().view(-1)
                layer.place(own, None)
        memory: list[Any] = [
            (x.unit.function, x.padded_a, x.padded_slope) for x in fast
        ]
        if len({layer.unit.function for layer in fast}) == 1:
            memory = [(fast[0].unit.function, a, slope)]
        return [partial(function.slope, a, out=out) for function, a, out in memory]

    def bind(self, rates: Rates) -> None:
        """Make the calls for these rates, unless they exist."""
        if self.ops and self.rates == rates:
            return
        # In this order: an interrupt must not leave the old calls under the new rates.
        self.ops, self.graph, self.warm = [], None, False
        self.rates = rates
        self.ops = [self._step(k) for k in range(self.count)]

    def _step(self, k: int) -> list[Op]:
        """Return the calls of batch `k`: the algorithm, from feedforward to update."""
        x, ops = self.inputs[k], []
        inputs = []
        for layer in self.layers:
            inputs.append(x)
            ops += layer.forward(x, self._z(layer, k))
            x = layer.x
        ops += self.slopes
        ops += self._output_error(k)
        for i in reversed(range(len(self.layers))):
            layer = self.layers[i]
            if i:
                below = self.layers[i - 1]
                ops.append(
                    partial(torch.mm, layer.delta, layer.unit.W, out=below.delta)
                )  # BP2: (W)ᵀδ
            ops += layer.update(inputs[i], self.rates)
            if i:
                ops += below.gate(below.padded_delta)
        return ops

    def _z(self, layer: LayerCalls, k: int) -> Tensor:
        """Return the buffer for a layer's z. If the network's output is z, it is stored
        with the other outputs, for the costs."""
        return (
            self.outputs[k]
            if layer is self.layers[-1] and self.output_is_z
            else layer.z
        )

    def _output_error(self, k: int) -> list[Op]:
        """Return the calls for δ^L of batch `k`; they also store the output, or a - y,
        for its cost."""
        last, y, v = self.layers[-1], self.targets[k], self.outputs[k]
        delta = last.padded_delta
        if self.cost is costs.QuadraticFunction and not last.is_identity:
            # ∇_a C_x = a - y is stored instead of a: C_x = ½ ‖a - y‖².
            return [partial(torch.sub, last.a, y, out=v), *last.gate(v)]  # BP1
        ops: list[Op] = [] if self.output_is_z else [partial(v.copy_, last.a)]
        one_hot_nabla = self.cost.one_hot_nabla
        if self.factors is None or one_hot_nabla is None:
            nabla = self.cost.nabla
            return [*ops, lambda: delta.copy_(nabla(v, y)), *last.gate(delta)]
        factor = self.factors.view(self.count, self.m, -1)[k]
        ops.append(partial(one_hot_nabla, v, y, factor, out=delta))
        return ops + last.gate(delta)

    def take(self, images: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
        """Take the steps of the mini-batches `rows` of a set; return their costs."""
        costs = []
        for part in rows.split(self.m * self.count):
            self.gather(images, targets, part)
            costs.append(self.run(len(part) // self.m).clone())
        return torch.cat(costs)

    def gather(self, images: Tensor, targets: Tensor, rows: Tensor) -> None:
        """Copy the examples `rows` of a set to the buffers of inputs and targets."""
        n = len(rows)
        x, y = _first(n, self.x), _first(n, self.y)
        x.copy_(self._selected(images, rows))
        if not images.is_floating_point():
            x.mul_(1 / 255)
        if targets.is_floating_point():
            torch.index_select(targets, 0, rows, out=y)
            return
        # Not rows of an identity matrix, which would have K x K numbers.
        labels = self._selected(targets, rows).unsqueeze(1)
        y.zero_().scatter_(1, labels, 1)
        if self.factors is not None:
            factors = _first(n, self.factors)
            torch.sub(self.one, y, alpha=self.cost.multiple, out=factors)

    def _selected(self, source: Tensor, rows: Tensor) -> Tensor:
        """Return source[rows], in memory that the next call overwrites."""
        if source.dtype not in self.selected:
            shape = (len(self.x), *source.shape[1:])
            self.selected[source.dtype] = source.new_empty(shape)
        buffer = _first(len(rows), self.selected[source.dtype])
        return torch.index_select(source, 0, rows, out=buffer)

    def run(self, count: int) -> Tensor:
        """Take the steps of the first `count` batches in the buffers; return their
        costs, (count), in memory that the next call overwrites."""
        if self.capturable and count == self.count:
            self._replay()
        else:
            self._run(count)
        return self.costs[:count]

    def _run(self, count: int) -> None:
        """Make the calls of `count` batches, and compute their costs."""
        for k in range(count):
            for op in self.ops[k]:
                op()
        rows = count * self.m
        v, out = self.v[:rows], self.costs[:count]
        if self.cost is costs.QuadraticFunction and not self.output_is_z:
            # v is a - y. A mean for each batch: means of rows would be slower, and a
            # sum would overflow in float16.
            outputs = v.shape[1]
            torch.mean(v.square().view(count, -1), 1, out=out).mul_(outputs / 2)
        else:
            C = self.cost.per_example(v, self.y[:rows])
            torch.mean(C.view(count, self.m), 1, out=out)

    def _replay(self) -> None:
        """Do the same as `_run`, from the second time on by a CUDA graph: libraries
        initialise themselves at their first calls, which a capture forbids."""
        if self.graph is not None:
            self.graph.replay()
            return
        if not self.warm:
            self.warm = True
            self._run(self.count)
            return
        graph, device = torch.cuda.CUDAGraph(), self.y.device
        current = torch.cuda.current_stream(device)
        # A stream of this device: torch's own stream for captures belongs to the device
        # of the process's first capture, and on another one captures nothing.
        capture = torch.cuda.graph(
            graph,
            stream=torch.cuda.Stream(device),
            capture_error_mode="thread_local",
        )
        try:
            with torch.cuda.device(device), capture:
                self._run(self.count)
        except RuntimeError:  # for example from a σ or a cost that reads values
            torch.cuda.set_stream(current)  # torch 2.8 stays on the other stream
            self.capturable = False
            self._run(self.count)
            return
        self.graph = graph
        graph.replay()
