"""Several processes, one trajectory: data-parallel steps under ``torchrun``.

Every process draws the same mini-batches as a single process would, and works on its
own part of each. A step equals the single process's step up to rounding, for any number
of processes and any size of the last mini-batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torchbp.training.devices import choose_device
from torchbp.training.engines import AutogradSGD

__all__ = ["ParallelSGD", "World", "join"]


@dataclass(frozen=True)
class World:
    """The processes that train together.

    Attributes:
        rank: the number of this process; 0 logs and saves for all.
        size: the number of processes.
        device: this process's.

    Examples:
        >>> World(rank=0, size=1, device=torch.device("cpu"))
        World(rank=0, size=1, device=device(type='cpu'))
    """

    rank: int
    size: int
    device: torch.device


@contextmanager
def join(device: str) -> Iterator[World]:
    """Join the processes that ``torchrun`` started; without it, be a world of one.

    Args:
        device: a name for :func:`torchbp.training.choose_device`. With "cuda" each
            process takes the GPU of its local rank, and NCCL communicates; else gloo.

    Raises:
        ValueError: the device is not available, or there are more processes than GPUs.

    Examples:
        >>> with join("cpu") as world:  # not started by torchrun
        ...     world.rank, world.size
        (0, 1)
    """
    chosen = choose_device(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(0, 1, chosen)
        return
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if chosen.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"device: expected a GPU for each process, got process {local + 1} on "
                f"a machine with {torch.cuda.device_count()}"
            )
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    torch.distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield World(rank, size, chosen)
    finally:
        torch.distributed.destroy_process_group()


class ParallelSGD(AutogradSGD):
    """W ← W - η ∂C/∂W by ``torch.optim.SGD``, each process on its part of the batch.

    A step equals the one that a single process would take, up to rounding.

    Args:
        model: the network; the processes start from rank 0's parameters.
        cost: one of ours, e.g. ``torchbp.QuadraticCost()``.
        lr: η.
        weight_decay: λ/n of the book: on weights (2-D parameters), not on biases.
        world: the processes, from :func:`join`.

    Examples:
        >>> import torchbp
        >>> from torch import distributed
        >>> store = distributed.HashStore()  # as torchrun does
        >>> distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> model, cost = torchbp.MLP([4, 3, 2]), torchbp.QuadraticCost()
        >>> world = World(rank=0, size=1, device=torch.device("cpu"))
        >>> engine = ParallelSGD(model, cost, 3.0, 0.0, world)
        >>> C = engine.step(torch.rand(6, 4), torch.rand(6, 2))
        >>> torch.equal(engine.collect(C.clone()), C)  # the sum over one process
        True
        >>> distributed.destroy_process_group()
    """

    def __init__(
        self,
        model: nn.Module,
        cost: Any,
        lr: float,
        weight_decay: float,
        world: World,
    ) -> None:
        super().__init__(model, cost, lr, weight_decay)
        self.world = world
        on_gpu = world.device.type == "cuda"
        self.parallel = DistributedDataParallel(
            model,
            device_ids=[world.device] if on_gpu else None,
            gradient_as_bucket_view=True,
        )

    def step(self, input: Tensor, target: Tensor) -> Tensor:
        """Take one step, in which each process works on its part of the mini-batch.

        Args:
            input: (m, n_in), the whole mini-batch.
            target: labels or numbers, as the cost accepts.

        Returns:
            this process's share of the cost, 0-d, detached; the mini-batch's cost is
            the sum over the processes.
        """
        rank, size = self.world.rank, self.world.size
        x, y = input[rank::size], target[rank::size]
        share = len(x) / len(input)
        self.optimizer.zero_grad()
        output = self.parallel(x)
        # A process without a row contributes 0: the mean of no rows would be NaN.
        part = self.cost(output, y) * share if len(x) else output.sum()
        # DistributedDataParallel averages the gradients; the step needs their sum.
        (part * size).backward()
        self.optimizer.step()
        return part.detach()

    def collect(self, costs: Tensor) -> Tensor:
        """Return the costs of several mini-batches, summed over the processes.

        Args:
            costs: the results of :meth:`step`, 1-d; overwritten.
        """
        torch.distributed.all_reduce(costs)
        return costs
