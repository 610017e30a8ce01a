"""Images of noise, in the place of MNIST."""

from __future__ import annotations

import torch

from torchbp.data import Split, Splits


def noise_splits(train: int, always_zero: int = 0) -> Splits:
    """Splits with so many images for training, of which so many pixels are 0."""
    return Splits(*(_split(n, always_zero) for n in (train, 5, 6)))


def _split(n: int, always_zero: int) -> Split:
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(0, 256, (n, 784), generator=generator)
    images[:, :always_zero] = 0
    return Split(images.to(torch.uint8), torch.arange(n) % 10)
