"""One epoch of the same training, written in the usual ways.

Every loop trains the same network from the same weights on the same mini-batches by
plain SGD and returns its weights, which reveal a loop that computes something else.
experiments/benchmark.py times the loops.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, one_hot

import torchbp
from torchbp.data import Split, scale


@dataclass(frozen=True)
class Workload:
    """A network, its mini-batches and its learning rate; sigmoid, quadratic cost.

    Attributes:
        name: for the table.
        sizes: neurons per layer.
        batch_size: examples in a mini-batch.
        lr: η.
        is_synthetic: whether the images are random bytes, half of them zero, instead
            of MNIST's, of which four of five are zero.
    """

    name: str
    sizes: tuple[int, ...]
    batch_size: int
    lr: float
    is_synthetic: bool = False

    def flops(self, density: float = 1.0) -> float:
        """Return the additions and multiplications of a step's matrix products:
        forward, BP4, and BP2 except in the first layer.

        Args:
            density: the share of inputs that are not zero; only their products count.
        """
        first, *others = (a * b for a, b in itertools.pairwise(self.sizes))
        return 2 * self.batch_size * (2 * density * first + 3 * sum(others))


class Loop(Protocol):
    """A way to train."""

    def run(self, order: Tensor) -> None:
        """Take one step for each mini-batch of `order`."""

    def weights(self) -> list[Tensor] | None:
        """Return W and b of each layer, or None if the cost is another one."""


class UnavailableError(RuntimeError):
    """A loop's library or compiler is missing; the message says which."""


@dataclass(frozen=True)
class Task:
    """What every loop is to train.

    Attributes:
        workload: network, batch size and rate.
        data: the training set, on the device.
        device: on which the loop computes.
        threads: of the CPU.
    """

    workload: Workload
    data: Split
    device: torch.device
    threads: int

    def network(self) -> torchbp.MLP:
        """Return the initial network, the same for all loops."""
        torch.manual_seed(0)
        sizes = self.workload.sizes
        model = torchbp.MLP(sizes, device="cpu", dtype=torch.float32)
        return model.to(self.device)

    def numbers(self) -> tuple[Tensor, Tensor]:
        """Return all images and one-hot targets in float32."""
        images, labels = self.data
        classes = self.workload.sizes[-1]
        return scale(images), one_hot(labels, classes).to(torch.float32)


def quadratic(output: Tensor, target: Tensor) -> Tensor:
    """Return the quadratic cost, computed by torch's own operations."""
    return mse_loss(output, target, reduction="sum") / (2 * len(target))


class Autograd:
    """A backward pass and a step of ``torch.optim.SGD`` for each batch; the whole set
    is in memory."""

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        cost: Callable[[Tensor, Tensor], Tensor],
        compiled: bool = False,
    ) -> None:
        self.model, self.batch_size = model, task.workload.batch_size
        self.x, self.y = task.numbers()
        self.optimizer = torch.optim.SGD(model.parameters(), lr=task.workload.lr)

        def forward(x: Tensor, y: Tensor) -> Tensor:
            return cost(model(x), y)

        self.forward: Any = torch.compile(forward) if compiled else forward

    def run(self, order: Tensor) -> None:
        for rows in order.split(self.batch_size):
            self.train(self.x[rows], self.y[rows])

    def train(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        self.forward(x, y).backward()
        self.optimizer.step()

    def weights(self) -> list[Tensor] | None:
        return [p.detach() for p in self.model.parameters()]


class Tutorial(Autograd):
    """The loop of tutorials: single pictures through a DataLoader and ToTensor."""

    def __init__(self, task: Task) -> None:
        super().__init__(task, torchbp.to_native(task.network()), quadratic)
        if importlib.util.find_spec("torchvision") is None:
            raise UnavailableError("torchvision is not installed")
        self.pictures = _Pictures(task.data)
        self.classes = task.workload.sizes[-1]

    def run(self, order: Tensor) -> None:
        loader = torch.utils.data.DataLoader(
            self.pictures, self.batch_size, sampler=order.tolist()
        )
        for pictures, labels in loader:
            y = one_hot(labels, self.classes).to(torch.float32)
            self.train(pictures.flatten(1), y)


class _Pictures(torch.utils.data.Dataset[Any]):
    """The items of torchvision's MNIST, loaded as it does."""

    def __init__(self, data: Split) -> None:
        from torchvision.transforms import ToTensor

        self.images = data.images.view(len(data.images), 28, -1).numpy()
        self.labels = data.labels
        self.transform = ToTensor()

    def __getitem__(self, i: int) -> tuple[Any, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[i])), int(self.labels[i])


class ExplicitEpochs:
    """:meth:`torchbp.ExplicitSGD.epoch` on batches in the order of the others."""

    kernel = "auto"

    def __init__(self, task: Task) -> None:
        self.model, self.data = task.network(), task.data
        self.batch_size = task.workload.batch_size
        self.engine = torchbp.ExplicitSGD(
            self.model, torchbp.QuadraticCost(), task.workload.lr, kernel=self.kernel
        )

    def run(self, order: Tensor) -> None:
        for _ in self.engine.steps(*self.data, order, self.batch_size):
            pass

    def weights(self) -> list[Tensor] | None:
        return [p.detach() for p in self.model.parameters()]


class ExplicitTorchCalls(ExplicitEpochs):
    """:class:`ExplicitEpochs` without the compiled kernel."""

    kernel = "torch"


class ExplicitSteps(ExplicitEpochs):
    """:meth:`torchbp.ExplicitSGD.step`, batch by batch."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.x, self.y = task.numbers()

    def run(self, order: Tensor) -> None:
        for rows in order.split(self.batch_size):
            self.engine.step(self.x[rows], self.y[rows])


class NumPy:
    """The four equations on whole mini-batches, in NumPy."""

    def __init__(self, task: Task) -> None:
        if importlib.util.find_spec("threadpoolctl") is None:
            raise UnavailableError("threadpoolctl is not installed")
        self.batch_size, self.lr = task.workload.batch_size, task.workload.lr
        self.threads = task.threads
        self.x, self.y = (t.numpy() for t in task.numbers())
        start = [p.detach().clone().numpy() for p in task.network().parameters()]
        self.W, self.b = start[::2], start[1::2]

    def run(self, order: Tensor) -> None:
        from threadpoolctl import threadpool_limits

        with threadpool_limits(self.threads):
            for rows in order.split(self.batch_size):
                self.step(self.x[rows.numpy()], self.y[rows.numpy()])

    def step(self, x: Any, y: Any) -> None:
        import numpy as np

        a = [x]
        for W, b in zip(self.W, self.b, strict=True):
            a.append(1 / (1 + np.exp(-(a[-1] @ W.T + b))))
        grad_a = (a[-1] - y) / np.float32(len(x))
        for ell in reversed(range(len(self.W))):
            delta = grad_a * a[ell + 1] * (1 - a[ell + 1])
            grad_a = delta @ self.W[ell] if ell else None
            self.W[ell] -= self.lr * (delta.T @ a[ell])
            self.b[ell] -= self.lr * delta.sum(0)

    def weights(self) -> list[Tensor] | None:
        pairs = zip(self.W, self.b, strict=True)
        return [torch.from_numpy(t) for pair in pairs for t in pair]


class JAX:
    """``jit`` of a ``lax.scan`` over all the steps, the gradients by ``jax.grad``."""

    def __init__(self, task: Task) -> None:
        jax = _import_jax(task.threads)
        jnp = jax.numpy
        self.batch_size, lr = task.workload.batch_size, task.workload.lr
        x, y = (jnp.asarray(t.numpy()) for t in task.numbers())
        start = [jnp.asarray(p.detach().numpy()) for p in task.network().parameters()]
        self.values = list(zip(start[::2], start[1::2], strict=True))

        def cost(values: Any, x: Any, y: Any) -> Any:
            for W, b in values:
                x = jax.nn.sigmoid(x @ W.T + b)
            return ((x - y) ** 2).sum() / (2 * len(y))

        def step(values: Any, rows: Any) -> tuple[Any, None]:
            grads = jax.grad(cost)(values, x[rows], y[rows])
            return jax.tree.map(lambda p, g: p - lr * g, values, grads), None

        self.scan = jax.jit(lambda v, rows: jax.lax.scan(step, v, rows)[0])
        self.asarray, self.ready = jnp.asarray, jax.block_until_ready

    def run(self, order: Tensor) -> None:
        whole = order[: len(order) // self.batch_size * self.batch_size]
        rows = self.asarray(whole.view(-1, self.batch_size).numpy())
        self.values = self.ready(self.scan(self.values, rows))

    def weights(self) -> list[Tensor] | None:
        import numpy as np

        return [
            torch.tensor(np.asarray(t), dtype=torch.float32, device="cpu")
            for pair in self.values
            for t in pair
        ]


def _import_jax(threads: int) -> Any:
    """Import JAX, limited to one thread if `threads` is 1: JAX decides at its first
    use."""
    if importlib.util.find_spec("jax") is None:
        raise UnavailableError('jax is not installed: pip install ".[peers]"')
    with _one_core() if threads == 1 else contextlib.nullcontext():
        flag = "--xla_cpu_multi_thread_eigen=false"
        flags = os.environ.get("XLA_FLAGS", "")
        if threads == 1 and flag not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()
        import jax

        jax.devices("cpu")
    jax.config.update("jax_platforms", "cpu")
    return jax


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """Make libraries that start their threads in this block see one core."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


class SklearnMLP:
    """scikit-learn's ``MLPClassifier``. It has no quadratic cost of sigmoid outputs: it
    minimises the log-likelihood of a softmax, with a few more operations."""

    def __init__(self, task: Task) -> None:
        if importlib.util.find_spec("sklearn") is None:
            raise UnavailableError("scikit-learn is not installed")
        from sklearn.neural_network import MLPClassifier

        workload = task.workload
        self.threads = task.threads
        self.x, self.y = scale(task.data.images).numpy(), task.data.labels.numpy()
        self.classifier = MLPClassifier(
            workload.sizes[1:-1], activation="logistic", solver="sgd", alpha=0,
            batch_size=workload.batch_size, learning_rate_init=workload.lr / 10,
            momentum=0, max_iter=1, shuffle=False, warm_start=True,
        )  # fmt: skip

    def run(self, order: Tensor) -> None:
        import warnings

        from threadpoolctl import threadpool_limits

        rows = order.numpy()
        with warnings.catch_warnings(), threadpool_limits(self.threads):
            warnings.simplefilter("ignore")  # not converged after one epoch
            self.classifier.fit(self.x[rows], self.y[rows])

    def weights(self) -> list[Tensor] | None:
        return None


def has_compiler() -> bool:
    """Return whether a C++ compiler is installed."""
    return any(map(shutil.which, ("g++", "clang++", "c++", "cl")))


def _check_compiler() -> None:
    """Raise UnavailableError unless a C++ compiler is installed."""
    if not has_compiler():
        raise UnavailableError("torch.compile needs a C++ compiler")


def _autograd(ours: bool, compiled: bool) -> Callable[[Task], Loop]:
    """Return what makes the loop of our layers or native ones, compiled or eager."""

    def make(task: Task) -> Loop:
        if compiled:
            _check_compiler()
        model = task.network()
        if ours:
            return Autograd(task, model, torchbp.QuadraticCost(), compiled)
        return Autograd(task, torchbp.to_native(model), quadratic, compiled)

    return make


NATIVE, EXPLICIT = "native", "ExplicitSGD.epoch"

# In the order of the table.
LOOPS: dict[str, Callable[[Task], Loop]] = {
    "DataLoader, native": Tutorial,
    NATIVE: _autograd(ours=False, compiled=False),
    "native, compiled": _autograd(ours=False, compiled=True),
    "BP layers": _autograd(ours=True, compiled=False),
    "BP layers, compiled": _autograd(ours=True, compiled=True),
    "ExplicitSGD.step": ExplicitSteps,
    EXPLICIT: ExplicitEpochs,
    f"{EXPLICIT}, torch": ExplicitTorchCalls,
    "NumPy": NumPy,
    "JAX, jit + scan": JAX,
    "scikit-learn": SklearnMLP,
}
COMPILED = {name for name in LOOPS if name.endswith("compiled")}
ON_ANY_DEVICE = {
    NATIVE, "native, compiled", "BP layers", "BP layers, compiled",
    "ExplicitSGD.step", EXPLICIT, f"{EXPLICIT}, torch",
}  # fmt: skip
