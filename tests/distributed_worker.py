"""What tests/training/test_distributed.py runs in every process.

Each function checks the sharded network against the whole one and raises where they
differ.
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import torchbp


def networks():
    """A network, its twin for sharding, and a batch; the same in every process."""
    torch.manual_seed(0)
    model = torchbp.MLP([6, 8, 4])
    return model, copy.deepcopy(model), torch.rand(10, 6), torch.rand(10, 4)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same_gradients(model, sharded):
    for (name, p), q in zip(
        model.named_parameters(), sharded.parameters(), strict=True
    ):
        torch.testing.assert_close(whole(q.grad), p.grad, msg=lambda m: f"{name}: {m}")  # noqa: B023


def fsdp():
    """Every process has half of each parameter and half of the batch."""
    model, sharded, x, y = networks()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in sharded.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    cost = torchbp.QuadraticCost()
    optimizers = [torch.optim.SGD(m.parameters(), lr=1.0) for m in (model, sharded)]
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    for _ in range(3):
        for m, rows, optimizer in (
            (model, slice(None), optimizers[0]),
            (sharded, mine, optimizers[1]),
        ):
            optimizer.zero_grad()
            cost(m(x[rows]), y[rows]).backward()
        assert_same_gradients(model, sharded)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(model.parameters(), sharded.parameters(), strict=True):
        assert isinstance(q, DTensor) and q.to_local().shape != p.shape
        torch.testing.assert_close(whole(q), p)


def tensor_parallel(last):
    """The neurons of the first layer are divided among the processes."""
    model, sharded, x, y = networks()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"layers.0": ColwiseParallel(), "layers.1": last}
    sharded = parallelize_module(sharded, mesh, plan)
    cost = torchbp.QuadraticCost()
    cost(model(x), y).backward()
    output = sharded(x)
    torch.testing.assert_close(whole(output), model(x))
    cost(whole(output), y).backward()
    assert_same_gradients(model, sharded)


def colwise():
    """Alone: the next layer gets the whole output back."""
    model, sharded, x, _ = networks()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer = parallelize_module(sharded.layers[0], mesh, ColwiseParallel())
    g = torch.rand(10, 8 // dist.get_world_size())
    output = layer(x)
    full = model.layers[0](x)
    mine = full.chunk(dist.get_world_size(), -1)[dist.get_rank()]
    torch.testing.assert_close(output, mine)
    output.backward(g)
    parts = [torch.empty_like(g) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, g)
    full.backward(torch.cat(parts, -1))
    assert_same_gradients(model.layers[0], layer)


def rowwise():
    tensor_parallel(RowwiseParallel())


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for check in (fsdp, colwise, rowwise):
        check()
        if dist.get_rank() == 0:
            print(f"{check.__name__}: the gradients of the whole network")
    dist.barrier()
