"""What TensorBoard shows of a run: one point per epoch, step = epoch, 0 = untrained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchbp.convert import from_native
from torchbp.observation import Record, observe

if TYPE_CHECKING:
    from torchbp.trainer import EpochResult

__all__ = ["Dashboard", "probe"]


class Dashboard:
    """Writes the event file of one run.

    Args:
        folder: the run's folder.
        settings: what the run was started with; shown as text.
        hyperparameters: those settings by which runs are compared.
        versions: of the programs, the machine; shown as text.
        resumed_at: the last completed epoch of a run that goes on. What the event files
            hold from later epochs is superseded.

    Raises:
        OSError: the folder cannot be written.
        ImportError: tensorboard is not installed.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        hyperparameters: Mapping[str, Any],
        versions: Mapping[str, Any],
        resumed_at: int | None = None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Epoch 0 is logged anew by a run that did not complete its first.
        purge = None if resumed_at is None else resumed_at + 1 if resumed_at else 0
        self.writer: Any = SummaryWriter(str(folder), purge_step=purge)
        if resumed_at is None:
            self.writer.add_text("settings", _as_code(settings), 0)
            self.writer.add_text("versions", _as_code(versions), 0)
            self._hyperparameters(hyperparameters)

    def _hyperparameters(self, values: Mapping[str, Any]) -> None:
        """The run's row in the HPARAMS tab. ``SummaryWriter.add_hparams`` would make a
        run of its own for it, one folder down."""
        from torch.utils.tensorboard.summary import hparams

        plain = {
            key: value if isinstance(value, (bool, int, float, str)) else str(value)
            for key, value in values.items()
        }
        metrics = {
            "accuracy/test": None,
            "accuracy/validation": None,
            "cost/test": None,
        }
        for summary in hparams(plain, metrics)[:2]:
            self.writer.file_writer.add_summary(summary)

    def log(self, result: EpochResult, lr: float, records: list[Record]) -> None:
        """One epoch's curves and distributions.

        Args:
            result: the epoch's scores and speed.
            lr: η.
            records: of :func:`probe` on the network as the epoch left it.
        """
        for name, score in result.scores.items():
            self._scalar(f"cost/{name}", score.cost, result.epoch)
            self._scalar(f"accuracy/{name}", score.accuracy, result.epoch)
        if result.running_cost is not None:
            self._scalar("cost/running", result.running_cost, result.epoch)
            speed = result.images_per_second
            self._scalar("speed/images_per_second", speed, result.epoch)
        self._scalar("learning_rate", lr, result.epoch)
        for number, record in enumerate(records, start=1):
            self._layer(f"layer_{number}", record, result.epoch)
        self.writer.flush()

    def _layer(self, layer: str, record: Record, epoch: int) -> None:
        self._scalar(f"delta_norm/{layer}", record.norm("mean_delta"), epoch)
        self._scalar(f"saturated/{layer}", record.saturated, epoch)
        self._scalar(f"norm_weight/{layer}", record.norm("weight"), epoch)
        if record.bias is not None:
            self._scalar(f"norm_bias/{layer}", record.norm("bias"), epoch)
            self._histogram(f"distributions/b_{layer}", record.bias, epoch)
        assert record.delta is not None
        self._histogram(f"distributions/W_{layer}", record.weight, epoch)
        self._histogram(f"distributions/a_{layer}", record.a, epoch)
        self._histogram(f"distributions/delta_{layer}", record.delta, epoch)

    def _scalar(self, tag: str, value: float | None, epoch: int) -> None:
        self.writer.add_scalar(tag, value, epoch)

    def _histogram(self, tag: str, values: Tensor, epoch: int) -> None:
        self.writer.add_histogram(tag, values, epoch, bins=64)

    def close(self) -> None:
        self.writer.close()


def probe(model: nn.Module, cost: Any, input: Tensor, target: Tensor) -> list[Record]:
    """z, a, δ of every layer on fixed examples, with the model left as it was: no
    ``.grad`` is touched and no random number drawn.

    Args:
        model: a network of our layers or native ones.
        cost: of ours.
        input: (n, n_in).
        target: (n, n_out), or labels (n).
    """
    # A native network is seen through a twin of our layers on the same parameters.
    twin = from_native(model)
    was_training = {module: module.training for module in twin.modules()}
    twin.eval()  # dropout would draw random numbers, batch norm would remember
    input = input.detach().requires_grad_()
    with torch.enable_grad(), observe(twin) as trace:
        # The gradient of the input alone: the sweep passes every layer on its way
        # there.
        torch.autograd.grad(cost(twin(input), target), input)
    for module, training in was_training.items():
        module.training = training
    return list(trace)


def _as_code(content: Mapping[str, Any]) -> str:
    """Markdown that TensorBoard shows as it stands."""
    lines = json.dumps(content, indent=2, default=str).splitlines()
    return "\n".join(f"    {line}" for line in lines)
