"""Distances and differences that the checks and the experiments share."""

from __future__ import annotations

import math

import pytest
import torch

from torchbp._numeric import central_difference, relative_distance


def test_tensors_together_are_one_vector():
    ours = [torch.tensor([[1.0, 2.0]]), torch.tensor([3.0], requires_grad=True)]
    right = [torch.tensor([[1.0, 2.0]]), torch.tensor([2.0])]
    assert relative_distance(ours, right) == pytest.approx(1 / 3)
    assert relative_distance(iter(right), right) == 0
    assert math.isnan(relative_distance(torch.tensor(math.nan), torch.tensor(1.0)))


def test_a_central_difference_is_exact_for_a_parabola():
    """Of numbers and of tensors; its error is that of the third derivative, ε²/6."""
    assert central_difference(lambda t: 3 * (2 + t) ** 2, 0.5) == 12
    assert central_difference(lambda t: (1 + t) ** 3, 0.5) == 3 + 0.5**2
    slopes = central_difference(lambda t: torch.tensor([1.0, 2.0]) * t, 0.25)
    assert slopes.tolist() == [1, 2]
