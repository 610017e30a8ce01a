"""The dashboard, which writes the curves and pictures of a run for TensorBoard.

Curves have a point at the end of each epoch, from epoch 0, the untrained network; the
running cost has several points within an epoch. The global step counts mini-batches.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchbp._files import write_atomically
from torchbp.convert import from_native
from torchbp.costs import target_rows
from torchbp.data import Split, scale
from torchbp.inspection import Record, evaluating, probe
from torchbp.nn import BPLinear, check_takes
from torchbp.training.dashboard import graph, pictures
from torchbp.training.dashboard.captions import EPOCHS, LAYOUT, MINI_BATCHES, caption
from torchbp.training.dashboard.chart import draw_learning
from torchbp.training.dashboard.events import EventWriter, event_files, read_scalars

if TYPE_CHECKING:
    from PIL.Image import Image

    from torchbp.training import EpochResult

__all__ = ["LEVELS", "Dashboard"]

# off: no event file; basic: curves; full: also distributions, pictures and the graph.
LEVELS = ("off", "basic", "full")
PROBE = 1000  # training images for δ, saturation and distributions
# The most points of the running cost in an epoch and in a run. TensorBoard samples at
# random from more than 1,000.
POINTS_AN_EPOCH, POINTS_A_RUN = 50, 1000
LEARNING = "learning.png"  # in the run's folder
_SPEED = "delta_norm/layer_"  # the prefix of the tags of its curves
ANSWERED_AT_ONCE = 2500


@dataclass(frozen=True)
class Watched:
    """The network and the images that :meth:`Dashboard.log` measures."""

    model: nn.Module
    cost: Any
    input: Tensor
    target: Tensor
    test: Split
    names: Sequence[str]


class Dashboard:
    """Writes the event file of one session of a run.

    Args:
        folder: the run's folder.
        settings: of the run; shown as text.
        hyperparameters: the settings by which runs are compared.
        versions: of the programs and the machine; shown as text.
        resumed_at: the last completed epoch of a run that is resumed. Points of later
            epochs in its event files are superseded.
        level: the amount to write, one of LEVELS.
        epochs: the run's last epoch, over which the points of the running cost are
            spread; if None, every epoch has 50.
        steps_per_epoch: mini-batches in an epoch, from which a resumed run derives
        which
            points are superseded. A run whose event files count epochs, as those of
            version 0.1.0 do, continues to count epochs.

    Raises:
        ValueError: an unknown level, a number below 1, or a resumed run without its
            steps per epoch.
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
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
    ) -> None:
        _check_numbers(resumed_at, level, epochs, steps_per_epoch)
        self.level = level
        self.watched: Watched | None = None
        self.layers = 0  # of the network, known from the first probe
        self._described: set[str] = set()
        if level == "off":
            return
        earlier = event_files(folder)
        contents = [file.read_bytes() for file in earlier]
        self._folder = folder
        self._counts_epochs = bool(resumed_at) and _count_epochs(contents)
        self._epochs = epochs
        self._stride = 1 if self._counts_epochs else steps_per_epoch
        # A run that did not complete its first epoch logs epoch 0 again.
        last_step = self._step(resumed_at) if resumed_at else -1
        self.writer = EventWriter(folder, None if resumed_at is None else last_step + 1)
        # The graph has no step: it is drawn once, by the first session of level full.
        self._is_drawn = level != "full" or any(
            graph.FIRST.encode() in content for content in contents
        )
        # {layer: {step: ‖∂C/∂b‖}}, the curves of "how fast each layer learns".
        self._learning: dict[int, dict[int, float]] = {}
        if resumed_at and level == "full":
            curves = read_scalars(contents, _SPEED, last_step)
            self._learning = {int(t.removeprefix(_SPEED)): c for t, c in curves.items()}
        if not resumed_at or not earlier:
            self._describe_run(settings, hyperparameters, versions)
        self.writer.flush()

    def _describe_run(
        self,
        settings: Mapping[str, Any],
        hyperparameters: Mapping[str, Any],
        versions: Mapping[str, Any],
    ) -> None:
        """Write the texts, the layout of the charts and the row of HPARAMS, at step
        0."""
        from torch.utils.tensorboard import summary

        self.writer.add_text("settings", _as_code(settings), 0)
        self.writer.add_text("versions", _as_code(versions), 0)
        self.writer.add_summary(summary.custom_scalars(LAYOUT), 0)
        for part in _hyperparameters(hyperparameters)[:2]:
            self.writer.add_summary(part, 0)

    def watch(
        self,
        model: nn.Module,
        cost: Any,
        train: Split,
        test: Split,
        dataset: str | None = None,
    ) -> None:
        """Choose the network and the images that :meth:`log` measures; without this
        call it writes the scores alone.

        A picture that cannot be drawn is omitted. "misclassified" and "weights" need
        flat images, (n, s²), and "weights" a first linear layer that reads them;
        "journey" also needs one row for the example in each layer, the last of which
        returns the answer; "confusion" needs at most 100 classes.

        Args:
            model: a network of our layers or native ones, on the data's device.
            cost: one of ours.
            train: images, uint8 (n, n_in), and labels (n). The first 1,000 are used for
                δ, saturation, z and a.
            test: images and labels, for the pictures.
            dataset: a name of ``data.NAMES``, for the names of the classes.

        Raises:
            TypeError, ValueError: a cost of another kind or one that does not fit the
                model, a model without any linear layer, or labels that do not fit it.
        """
        if self.level == "off":
            return
        check_takes(model, cost)
        if not any(isinstance(m, BPLinear) for m in from_native(model).modules()):
            raise ValueError(
                "model: expected an nn.Linear or a hand-written layer, got "
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
        """Write one epoch's curves, distributions and, at some epochs, pictures.

        Args:
            result: the epoch's scores, costs and speed.
            lr: η.
            last: whether the run ends with this epoch, which always has pictures.

        Raises:
            OSError: the event file cannot be written.
        """
        if self.level == "off":
            return
        if self._stride is None and result.costs:
            self._stride = len(result.costs)
        epoch = result.epoch
        self._log_running_cost(result)
        for name, score in result.scores.items():
            self._scalar(f"cost/{name}", score.cost, epoch)
            self._scalar(f"accuracy/{name}", score.accuracy, epoch)
        if result.running_cost is not None:
            self._scalar("speed/images_per_second", result.images_per_second, epoch)
        self._scalar("learning_rate", lr, epoch)
        if self.watched is not None:
            self._measure(self.watched, epoch, lr, last)
        self.writer.flush()

    def _step(self, epoch: int) -> int:
        """Return the global step at the end of `epoch`."""
        return epoch * (self._stride or 1)

    def _log_running_cost(self, result: EpochResult) -> None:
        """Write the running cost, with several points if the mini-batches are known."""
        if result.running_cost is None:
            return
        if self._counts_epochs or not result.costs:
            self._scalar("cost/running", result.running_cost, result.epoch)
            return
        from torch.utils.tensorboard.summary import scalar

        n, now = len(result.costs), time.time()
        for done, cost in thin(result.costs, result.epoch, self._epochs):
            step = self._step(result.epoch) - n + done
            moment = now - result.seconds * (1 - done / n)
            self._add(scalar("cost/running", cost), "scalars", step, moment)

    def _measure(self, watched: Watched, epoch: int, lr: float, last: bool) -> None:
        """Write the results of a backward pass over the fixed training images."""
        records = probe(watched.model, watched.cost, watched.input, watched.target)
        self.layers = len(records)
        for number, record in enumerate(records, start=1):
            self._log_norms(f"layer_{number}", record, lr, epoch)
            speed = record.norm("mean_delta")
            if speed is not None:
                curve = self._learning.setdefault(number, {})
                curve[self._step(epoch)] = speed
        if self.level != "full" or not records:
            return
        for number, record in enumerate(records, start=1):
            self._log_distributions(f"layer_{number}", record, epoch)
        if is_pictured(epoch) or last:
            self._log_pictures(watched, epoch)
            self._log_learning(epoch, last)
        if not self._is_drawn:
            self._is_drawn = True
            self.writer.add_graph(graph.draw(records, type(watched.cost).__name__))

    def _log_norms(self, layer: str, record: Record, lr: float, epoch: int) -> None:
        """Write the curves of one layer."""
        self._scalar(f"delta_norm/{layer}", record.norm("mean_delta"), epoch)
        self._scalar(f"saturated/{layer}", record.saturated, epoch)
        self._scalar(f"update_ratio/{layer}", record.update_ratio(lr), epoch)
        self._scalar(f"norm_weight/{layer}", record.norm("weight"), epoch)
        self._scalar(f"norm_bias/{layer}", record.norm("bias"), epoch)

    def _log_distributions(self, layer: str, record: Record, epoch: int) -> None:
        """Write the histograms of one layer."""
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

    def _log_pictures(self, watched: Watched, epoch: int) -> None:
        """Write those pictures that can be drawn of the network and the images."""
        test, names = watched.test, watched.names
        if not len(test.labels):
            return
        labels, K = test.labels.long(), len(names)
        guesses = _answers(watched.model, test.images)
        drawn: dict[str, Image] = {}
        if K <= pictures.MOST_CLASSES:
            counts = torch.bincount(labels * K + guesses, minlength=K * K)
            counts = counts.unflatten(0, (K, K)).cpu()
            drawn["confusion"] = pictures.confusion(counts, names)
        x = scale(test.images[:1], watched.input.dtype)
        if x.dim() == 2 and math.isqrt(x.shape[1]) ** 2 == x.shape[1]:
            drawn["misclassified"] = pictures.misclassified(
                test.images, labels, guesses, names
            )
            records = probe(watched.model, watched.cost, x, labels[:1])
            if records[0].x.shape == x.shape:
                W = records[0].weight
                is_answer = len(records) == 1 and len(W) == K
                drawn["weights"] = pictures.weights(W, names if is_answer else None)
                if pictures.is_journey(records, K):
                    label = int(labels[0])
                    drawn["journey"] = pictures.journey(records, label, names)
        for name, picture in drawn.items():
            self._image(f"pictures/{name}", picture, epoch)

    def _log_learning(self, epoch: int, last: bool) -> None:
        """Write the chart of how fast each layer learns, from the second point on; at
        the last epoch also as a file, larger than TensorBoard's cards."""
        if max(map(len, self._learning.values()), default=0) < 2:
            return
        unit = "epochs" if self._counts_epochs else "mini-batches"
        self._image("pictures/learning", draw_learning(self._learning, unit), epoch)
        if last:
            file = io.BytesIO()
            draw_learning(self._learning, unit, zoom=2).save(file, "PNG", optimize=True)
            write_atomically(self._folder / LEARNING, file.getvalue())

    def _scalar(self, tag: str, value: float | None, epoch: int) -> None:
        """Add a point to a curve, unless the value is None."""
        from torch.utils.tensorboard.summary import scalar

        if value is not None:
            self._add(scalar(tag, value), "scalars", self._step(epoch))

    def _histogram(self, tag: str, values: Tensor, epoch: int) -> None:
        """Add the histogram of the finite values, if there are any."""
        from torch.utils.tensorboard.summary import histogram

        # Activations may overflow although the weights are finite.
        finite = values.detach()[values.isfinite()]
        if not len(finite):
            return
        dtype = torch.promote_types(finite.dtype, torch.float32)  # for NumPy
        summary = histogram(tag, finite.to(dtype).cpu().numpy(), bins=64)
        self._add(summary, "histograms", self._step(epoch))

    def _image(self, tag: str, picture: Image, epoch: int) -> None:
        """Add a picture, as a PNG."""
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
        self._add(summary, "images", self._step(epoch))

    def _add(
        self, summary: Any, plugin: str, step: int, moment: float | None = None
    ) -> None:
        """Add one value; the first one of each tag carries the tag's caption."""
        (value,) = summary.value
        if value.tag not in self._described:
            self._described.add(value.tag)
            unit = EPOCHS if self._counts_epochs else MINI_BATCHES
            text = f"{caption(value.tag, self.layers)} {unit}"
            if plugin == "scalars" and value.tag != "cost/running":
                text += " One point an epoch: set Smoothing to 0."
            _describe(value, plugin, text)
        self.writer.add_summary(summary, step, moment)

    def close(self, complete: bool = False) -> None:
        """Write waiting events and end the session; a second call does nothing.

        Args:
            complete: whether the run is complete, which the HPARAMS tab shows; an
                interrupted run can be resumed.

        Raises:
            OSError: the event file cannot be written.
        """
        if self.level == "off":
            return
        self.level = "off"
        if complete:
            self.writer.add_summary(_hyperparameters({})[2], 0)
        self.writer.flush()


def _check_numbers(
    resumed_at: int | None, level: str, epochs: int | None, steps_per_epoch: int | None
) -> None:
    """Raise ValueError for arguments of a Dashboard that do not fit."""
    if level not in LEVELS:
        raise ValueError(f"level: expected one of {', '.join(LEVELS)}, got {level!r}")
    for name, value in (("epochs", epochs), ("steps_per_epoch", steps_per_epoch)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if resumed_at and steps_per_epoch is None:
        raise ValueError(
            "steps_per_epoch: expected the number of mini-batches in an epoch of a "
            "resumed run, got None"
        )


def thin(
    costs: Sequence[float], epoch: int, epochs: int | None = None
) -> list[tuple[int, float]]:
    """Return the points of an epoch's running cost: (mini-batches completed, mean cost
    of those since the point before).

    Args:
        costs: of the epoch's mini-batches. epoch: its number. epochs: the run's last
        epoch, over which 1,000 points are spread evenly. If a run
            is extended, only its later epochs have the new spacing.

    Examples:
        >>> thin([4.0, 2.0, 1.0, 0.0], epoch=1, epochs=500)
        [(2, 3.0), (4, 0.5)]
        >>> thin([4.0, 2.0, 1.0, 0.0], epoch=1, epochs=2000)  # at every second epoch
        []
    """
    n = len(costs)
    points = min(POINTS_AN_EPOCH, n)
    if epochs is not None:
        points = min(points, POINTS_A_RUN // epochs)
        every = math.ceil(epochs / POINTS_A_RUN)
        if every > 1 and (epoch % every == 0 or epoch == epochs):
            points = 1
    ends = [n * i // points for i in range(points + 1)] if points else []
    return [
        (end, statistics.fmean(costs[start:end]))
        for start, end in itertools.pairwise(ends)
    ]


def is_pictured(epoch: int) -> bool:
    """Return whether `epoch` has pictures: 0, 1, 2, 5, 10, 20, 50, ...

    TensorBoard shows ten pictures of a kind, and most of the learning is early.

    Args:
        epoch: 0 for the untrained network.

    Examples:
        >>> [epoch for epoch in range(30) if is_pictured(epoch)]
        [0, 1, 2, 5, 10, 20]
    """
    return epoch == 0 or str(epoch).rstrip("0") in ("1", "2", "5")


@torch.inference_mode()
def _answers(model: nn.Module, images: Tensor) -> Tensor:
    """Return the model's answers, class numbers, for images, uint8 (n, n_in)."""
    dtype = next(model.parameters()).dtype
    chunks = images.split(ANSWERED_AT_ONCE)
    with evaluating(model):
        return torch.cat([model(scale(x, dtype)).argmax(-1) for x in chunks])


def _hyperparameters(values: Mapping[str, Any]) -> Any:
    """Return the three summaries of a row of the HPARAMS tab: columns, values, and the
    end of the run. The metrics are the last points of the curves. ``add_hparams`` would
    write them as another run, in a folder of its own."""
    from torch.utils.tensorboard.summary import hparams

    plain = {
        key: value if isinstance(value, (bool, int, float, str)) else str(value)
        for key, value in values.items()
    }
    metrics = ("accuracy/test", "accuracy/validation", "cost/test", "cost/train")
    return hparams(plain, dict.fromkeys(metrics))


def _describe(value: Any, plugin: str, text: str) -> None:
    """Attach a caption, and the data class without which TensorBoard's reader in Rust
    ignores it."""
    from tensorboard.compat.proto import summary_pb2

    value.metadata.summary_description = text
    value.metadata.plugin_data.plugin_name = plugin
    value.metadata.data_class = {
        "scalars": summary_pb2.DATA_CLASS_SCALAR,
        "histograms": summary_pb2.DATA_CLASS_TENSOR,
        "images": summary_pb2.DATA_CLASS_BLOB_SEQUENCE,
    }[plugin]


def _count_epochs(contents: Sequence[bytes]) -> bool:
    """Return whether the steps of event files are epochs: their captions do not name
    mini-batches."""
    return any(b"learning_rate" in content for content in contents) and not any(
        MINI_BATCHES.encode() in content for content in contents
    )


def _as_code(content: Mapping[str, Any]) -> str:
    """Return the content as a Markdown code block of JSON."""
    lines = json.dumps(content, indent=2, default=str).splitlines()
    return "\n".join(f"    {line}" for line in lines)
