"""What TensorBoard shows of a run: one point per epoch, step = epoch, 0 = untrained."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchbp.convert import from_native
from torchbp.costs import target_rows
from torchbp.data import Split, scale
from torchbp.inspection import Record, evaluating, probe
from torchbp.nn import BPLinear, check_takes
from torchbp.training.dashboard import graph, pictures
from torchbp.training.dashboard.captions import LAYOUT, caption
from torchbp.training.dashboard.events import event_writer

if TYPE_CHECKING:
    from PIL.Image import Image

    from torchbp.training import EpochResult

__all__ = ["LEVELS", "Dashboard"]

# off: no event file. basic: the curves. full: distributions, pictures and the graph.
LEVELS = ("off", "basic", "full")
PROBE = 1000  # training images that δ, saturation and distributions are computed on
ANSWERED_AT_ONCE = 2500


@dataclass(frozen=True)
class Watched:
    """What :meth:`Dashboard.log` looks at."""

    model: nn.Module
    cost: Any
    input: Tensor
    target: Tensor
    test: Split
    names: Sequence[str]


class Dashboard:
    """Writes the event file of one run.

    Args:
        folder: the run's folder.
        settings: what the run was started with; shown as text.
        hyperparameters: those settings by which runs are compared.
        versions: of the programs, the machine; shown as text.
        resumed_at: the last completed epoch of a run that goes on. What the event files
            hold from later epochs is superseded.
        level: how much is written, one of LEVELS.

    Raises:
        ValueError: a level that is none.
        OSError: the folder cannot be written.
        ImportError: tensorboard is not installed, and the level is not "off".

    Examples:
        >>> import tempfile
        >>> from torchbp.training import EpochResult, Score
        >>> scores = {name: Score(0.5, 0.1) for name in ("train", "validation", "test")}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     dashboard = Dashboard(Path(folder), {"lr": 3.0}, {"lr": 3.0}, {})
        ...     dashboard.log(EpochResult(0, scores, None, 0.0, 0.0), lr=3.0)
        ...     dashboard.close()
        ...     [path.name.split(".")[0] for path in Path(folder).iterdir()]
        ['events']
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        hyperparameters: Mapping[str, Any],
        versions: Mapping[str, Any],
        resumed_at: int | None = None,
        level: str = "full",
    ) -> None:
        if level not in LEVELS:
            raise ValueError(
                f"level: expected one of {', '.join(LEVELS)}, got {level!r}"
            )
        self.level = level
        self.writer: Any = None
        self.watched: Watched | None = None
        self.layers = 0  # of the network, known from the first probe
        self._described: set[str] = set()
        if level == "off":
            return
        earlier = sorted(folder.glob("events.out.tfevents.*"))
        _wait_for_a_later_name(earlier)
        # Epoch 0 is logged anew by a run that did not complete its first.
        purge = None if resumed_at is None else resumed_at + 1 if resumed_at else 0
        # An interrupt while the writer is handed an event may keep its thread waiting
        # until the next flush is due, and with it the end of the program: a second.
        self.writer = event_writer(folder, purge_step=purge, flush_secs=1)
        # What stands at step 0 was superseded with it, or was never written.
        # Not so the graph: a sitting whose level is higher draws it, at any epoch.
        self._is_drawn = level != "full" or any(
            graph.FIRST.encode() in file.read_bytes() for file in earlier
        )
        if not resumed_at or not earlier:
            from torch.utils.tensorboard.summary import custom_scalars

            self.writer.add_text("settings", _as_code(settings), 0)
            self.writer.add_text("versions", _as_code(versions), 0)
            self.writer.file_writer.add_summary(custom_scalars(LAYOUT), 0)
            for summary in _hyperparameters(hyperparameters)[:2]:
                self.writer.file_writer.add_summary(summary, 0)

    def watch(
        self,
        model: nn.Module,
        cost: Any,
        train: Split,
        test: Split,
        dataset: str | None = None,
    ) -> None:
        """Say what :meth:`log` is to look at; without it, it writes the scores alone.

        Args:
            model: a network of our layers or native ones, on the data's device.
            cost: of ours.
            train: images, uint8 (n, n_in), and labels (n). δ, saturation, z and a are
                those of its first 1,000.
            test: likewise; the pictures are of these.
            dataset: whose classes the labels are, as in ``data.NAMES``.

        Raises:
            TypeError, ValueError: a cost that is none of ours or does not fit the
                model, a model without any linear layer, or labels that do not fit it.

        Of the pictures those are drawn that can be: images and weights only where the
        images are flat, (n, s²), and the first linear layer reads them; an example's
        way only where each layer has one row for it and the last one gives the answer;
        the confusion of at most 100 classes.
        """
        if self.level == "off":
            return
        check_takes(model, cost)
        if not any(isinstance(m, BPLinear) for m in from_native(model).modules()):
            raise ValueError(
                "model: expected an nn.Linear or a hand-written layer to look at, got "
                f"{type(model).__name__} without any; without watch() the dashboard "
                "shows the scores"
            )
        dtype = next(model.parameters()).dtype
        input = scale(train.images[:PROBE], dtype)
        with torch.inference_mode(), evaluating(model):
            output = model(input)
        target = target_rows(output.detach(), train.labels[:PROBE])
        names = list(map(str, range(output.shape[-1])))
        if len(pictures.CLASS_NAMES.get(dataset or "", ())) == len(names):
            names = pictures.CLASS_NAMES[dataset or ""]
        self.watched = Watched(model, cost, input, target, test, names)

    def log(self, result: EpochResult, lr: float, last: bool = False) -> None:
        """One epoch's curves, distributions and, at some epochs, pictures.

        Args:
            result: the epoch's scores and speed.
            lr: η.
            last: whether the run ends with this epoch, which is always pictured.
        """
        if self.level == "off":
            return
        epoch = result.epoch
        for name, score in result.scores.items():
            self._scalar(f"cost/{name}", score.cost, epoch)
            self._scalar(f"accuracy/{name}", score.accuracy, epoch)
        if result.running_cost is not None:
            self._scalar("cost/running", result.running_cost, epoch)
            self._scalar("speed/images_per_second", result.images_per_second, epoch)
        self._scalar("learning_rate", lr, epoch)
        if self.watched is not None:
            self._look(self.watched, epoch, lr, last)
        self.writer.flush()

    def _look(self, watched: Watched, epoch: int, lr: float, last: bool) -> None:
        records = probe(watched.model, watched.cost, watched.input, watched.target)
        self.layers = len(records)
        for number, record in enumerate(records, start=1):
            self._layer(f"layer_{number}", record, lr, epoch)
        if self.level != "full" or not records:
            return
        for number, record in enumerate(records, start=1):
            self._distributions(f"layer_{number}", record, epoch)
        if is_pictured(epoch) or last:
            self._show(watched, epoch)
        if not self._is_drawn:
            self._is_drawn = True
            from tensorboard.compat.proto.event_pb2 import Event

            drawn = graph.draw(records, type(watched.cost).__name__)
            event = Event(graph_def=drawn.SerializeToString())
            self.writer.file_writer.add_event(event, 0)

    def _layer(self, layer: str, record: Record, lr: float, epoch: int) -> None:
        self._scalar(f"delta_norm/{layer}", record.norm("mean_delta"), epoch)
        self._scalar(f"saturated/{layer}", record.saturated, epoch)
        self._scalar(f"update_ratio/{layer}", record.update_ratio(lr), epoch)
        self._scalar(f"norm_weight/{layer}", record.norm("weight"), epoch)
        self._scalar(f"norm_bias/{layer}", record.norm("bias"), epoch)

    def _distributions(self, layer: str, record: Record, epoch: int) -> None:
        quantities = {
            "W": record.weight,
            "b": record.bias,
            "z": record.z,
            "a": record.a,
            "delta": record.delta,
        }
        for name, values in quantities.items():
            if values is not None:
                self._histogram(f"distributions/{name}_{layer}", values, epoch)

    def _show(self, watched: Watched, epoch: int) -> None:
        """The pictures that can be drawn of this network and these images."""
        test, names = watched.test, watched.names
        if not len(test.labels):
            return
        labels, K = test.labels.long(), len(names)
        guesses = _answers(watched.model, test.images)
        shown: dict[str, Image] = {}
        if K <= pictures.MOST_CLASSES:
            counts = torch.bincount(labels * K + guesses, minlength=K * K)
            counts = counts.unflatten(0, (K, K)).cpu()
            shown["confusion"] = pictures.confusion(counts, names)
        x = scale(test.images[:1], watched.input.dtype)
        if x.dim() == 2 and math.isqrt(x.shape[1]) ** 2 == x.shape[1]:
            shown["misclassified"] = pictures.misclassified(
                test.images, labels, guesses, names
            )
            records = probe(watched.model, watched.cost, x, labels[:1])
            if records[0].x.shape == x.shape:
                W = records[0].weight
                is_answer = len(records) == 1 and len(W) == K
                shown["weights"] = pictures.weights(W, names if is_answer else None)
                if pictures.is_journey(records, K):
                    label = int(labels[0])
                    shown["journey"] = pictures.journey(records, label, names)
        for name, picture in shown.items():
            self._image(f"pictures/{name}", picture, epoch)

    def _scalar(self, tag: str, value: float | None, epoch: int) -> None:
        from torch.utils.tensorboard.summary import scalar

        if value is not None:
            self._add(scalar(tag, value), "scalars", epoch)

    def _histogram(self, tag: str, values: Tensor, epoch: int) -> None:
        from torch.utils.tensorboard.summary import histogram

        # Finite weights at their largest give activations that are not.
        finite = values.detach()[values.isfinite()]
        if not len(finite):
            return
        wide = torch.promote_types(finite.dtype, torch.float32)  # NumPy has no bfloat16
        summary = histogram(tag, finite.to(wide).cpu().numpy(), bins=64)
        self._add(summary, "histograms", epoch)

    def _image(self, tag: str, picture: Image, epoch: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        file = io.BytesIO()
        picture.save(file, "PNG", compress_level=3)
        image = Summary.Image(
            width=picture.width,
            height=picture.height,
            colorspace=3,
            encoded_image_string=file.getvalue(),
        )
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        self._add(summary, "images", epoch)

    def _add(self, summary: Any, plugin: str, epoch: int) -> None:
        """Write one value; the first of each tag brings its caption along."""
        (value,) = summary.value
        if value.tag not in self._described:
            self._described.add(value.tag)
            _describe(value, plugin, caption(value.tag, self.layers))
        self.writer.file_writer.add_summary(summary, epoch)

    def close(self, complete: bool = False) -> None:
        """Write what is waiting. Closing twice is closing once.

        Args:
            complete: whether the run has come to its end, which the HPARAMS tab shows;
                one that was interrupted may still go on.
        """
        if self.writer is None:
            return
        if complete:
            self.writer.file_writer.add_summary(_hyperparameters({})[2], 0)
        self.writer.close()
        self.writer, self.level = None, "off"


def is_pictured(epoch: int) -> bool:
    """Whether `epoch` is one of 0, 1, 2, 5, 10, 20, 50, ...: TensorBoard shows ten
    pictures of a kind, and most happens early."""
    return epoch == 0 or str(epoch).rstrip("0") in ("1", "2", "5")


@torch.inference_mode()
def _answers(model: nn.Module, images: Tensor) -> Tensor:
    """The class of the largest output for each of the images, uint8 (n, n_in)."""
    dtype = next(model.parameters()).dtype
    chunks = images.split(ANSWERED_AT_ONCE)
    with evaluating(model):
        return torch.cat([model(scale(x, dtype)).argmax(-1) for x in chunks])


def _hyperparameters(values: Mapping[str, Any]) -> Any:
    """What makes a row of the HPARAMS tab: its columns, the run's values, and that it
    is complete. Its metrics are the last points of the curves. With
    ``SummaryWriter.add_hparams`` it would be a run of its own, one folder down."""
    from torch.utils.tensorboard.summary import hparams

    plain = {
        key: value if isinstance(value, (bool, int, float, str)) else str(value)
        for key, value in values.items()
    }
    metrics = ("accuracy/test", "accuracy/validation", "cost/test", "cost/train")
    return hparams(plain, dict.fromkeys(metrics))


def _describe(value: Any, plugin: str, text: str) -> None:
    """The caption, in a form that both of TensorBoard's readers take: the one in Rust
    believes metadata that name their data class only."""
    from tensorboard.compat.proto import summary_pb2

    value.metadata.summary_description = text
    value.metadata.plugin_data.plugin_name = plugin
    value.metadata.data_class = {
        "scalars": summary_pb2.DATA_CLASS_SCALAR,
        "histograms": summary_pb2.DATA_CLASS_TENSOR,
        "images": summary_pb2.DATA_CLASS_BLOB_SEQUENCE,
    }[plugin]


def _wait_for_a_later_name(earlier: Sequence[Path]) -> None:
    """Event files are read in the order of their names, which have the second of their
    making."""
    seconds = [int(part) for p in earlier if (part := p.name.split(".")[3]).isdigit()]
    wait = max(seconds, default=0) + 1 - time.time()
    if 0 < wait <= 1:
        time.sleep(wait)


def _as_code(content: Mapping[str, Any]) -> str:
    """Markdown that TensorBoard shows as it stands."""
    lines = json.dumps(content, indent=2, default=str).splitlines()
    return "\n".join(f"    {line}" for line in lines)
