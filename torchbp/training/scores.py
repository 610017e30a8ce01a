"""Scores: the cost and the accuracy of a model on a split."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from torchbp._numeric import summing_dtype
from torchbp.data import Split, scale
from torchbp.inspection import evaluating
from torchbp.nn import check_takes

__all__ = ["EVALUATE_AT_ONCE", "Score", "evaluate"]

EVALUATE_AT_ONCE = 2000


class Score(NamedTuple):
    """The cost and the accuracy of a model on a split.

    Attributes:
        cost: the mean cost per example.
        accuracy: the share of correct answers, 0 to 1.

    Examples:
        >>> print(f"{Score(cost=0.03, accuracy=0.9574).accuracy:.2%}")
        95.74%
    """

    cost: float
    accuracy: float


@torch.inference_mode()
def evaluate(model: nn.Module, cost: Any, split: Split) -> Score:
    """Return the score of `model` on `split`, without changing the model or drawing
    random numbers.

    Args:
        model: the network.
        cost: one of ours, e.g. ``torchbp.QuadraticCost()``.
        split: images and labels, on the model's device.

    Examples:
        >>> import torchbp
        >>> images = torch.zeros(10, 784, dtype=torch.uint8)
        >>> split = Split(images, torch.arange(10))
        >>> model = torchbp.MLP([784, 10], output="identity")
        >>> evaluate(model, torchbp.LogLikelihoodCost(), split).accuracy  # 1 of 10
        0.1
    """
    check_takes(model, cost)
    sum_dtype = summing_dtype(split.labels.device)
    total = torch.zeros((), dtype=sum_dtype, device=split.labels.device)
    correct = torch.zeros((), dtype=torch.int64, device=split.labels.device)
    dtype = next(model.parameters()).dtype
    chunks = zip(
        split.images.split(EVALUATE_AT_ONCE),
        split.labels.split(EVALUATE_AT_ONCE),
        strict=True,
    )
    with evaluating(model):
        for images, labels in chunks:
            output = model(scale(images, dtype))
            total += cost(output, labels).to(sum_dtype) * len(labels)
            correct += (output.argmax(-1) == labels.long()).sum()
    n = len(split.labels)
    # Python floats: a float32 share of 10,000 would print as 0.9542999863624573.
    return Score(total.item() / n, correct.item() / n)
