"""Distorted images are near the old ones, and each is distorted in its own way."""

from __future__ import annotations

import pytest
import torch

from torchbp.data.distortion import distort


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(n=50, side=28):
    """A disc near the middle of each picture."""
    at = torch.arange(side) - (side - 1) / 2
    there = (at[:, None] ** 2 + at**2).sqrt() < side / 4
    return (255 * there).to(torch.uint8).reshape(1, -1).repeat(n, 1)


def centres(images):
    side = int(images.shape[1] ** 0.5)
    grey = images.view(-1, side, side).double()
    at = torch.arange(side).double()
    mass = grey.sum((1, 2))
    return torch.stack(
        [(grey.sum(1) * at).sum(1) / mass, (grey.sum(2) * at).sum(1) / mass]
    )


def test_strength_0_changes_nothing():
    images = torch.randint(0, 256, (1003, 784), dtype=torch.uint8)
    assert torch.equal(distort(images, seeded(), 0.0), images)


def test_images_are_new_and_each_is_distorted_in_its_own_way():
    images = blobs()
    before = images.clone()
    distorted = distort(images, seeded())
    assert torch.equal(images, before)
    assert distorted.dtype == torch.uint8 and distorted.shape == images.shape
    assert len(distorted.unique(dim=0)) == len(images)


@pytest.mark.parametrize("side", [8, 28])
def test_a_distorted_picture_is_near_the_old_one(side):
    images = blobs(side=side)
    distorted = distort(images, seeded())
    # Up to 2 of 28 pixels, and the bending, which averages out over the disc.
    far = (centres(distorted) - centres(images)).abs() * 28 / side
    assert 0.5 < far.max() < 3.5
    # Up to 12 % in each direction, and some bending.
    share = distorted.double().sum(1) / images.double().sum(1)
    assert 0.6 < share.min() < 0.95 and 1.05 < share.max() < 1.6
    assert abs(share.mean() - 1) < 0.1


def test_more_strength_is_more_of_it():
    images = blobs()
    changed = [
        (distort(images, seeded(), s).double() - images.double()).abs().mean()
        for s in (0.25, 0.5, 1.0, 2.0)
    ]
    assert changed == sorted(changed) and changed[-1] > 3 * changed[0]


def test_the_generator_decides():
    images = blobs(1500)
    a, b, c = (distort(images, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    generator = seeded()
    assert not torch.equal(distort(images, generator), distort(images, generator))
    state = torch.get_rng_state()
    distort(images, seeded())
    assert torch.equal(state, torch.get_rng_state())


def test_no_images():
    assert distort(torch.empty(0, 784, dtype=torch.uint8), seeded()).shape == (0, 784)


def test_what_is_not_a_batch_of_square_byte_images_is_refused():
    with pytest.raises(TypeError, match=r"expected torch.uint8, got torch.float32"):
        distort(torch.rand(2, 784), seeded())
    for shape in [(784,), (2, 783), (2, 28, 28), (2, 0)]:
        with pytest.raises(ValueError, match="expected square ones, \\(n, s x s\\)"):
            distort(torch.zeros(shape, dtype=torch.uint8), seeded())
    for strength in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="strength: expected a number >= 0"):
            distort(blobs(2), seeded(), strength)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_as_on_the_cpu():
    images = blobs()
    on_cuda = distort(images.cuda(), seeded()).cpu().int()
    assert (on_cuda - distort(images, seeded()).int()).abs().max() <= 1
