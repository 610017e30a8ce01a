"""Where the tests find MNIST, and what happens where they do not."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from processes import Driver

from torchbp import data

# What a shell starts in the background has SIGINT ignored, and children inherit that:
# the tests of Ctrl-C would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _one_thread():
    """The tests are small: more threads would only get in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed():
    """Each test draws the same numbers in any order, and so fails again or never."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def driver() -> Iterator[Driver]:
    """A process that forks programs; one for the whole session."""
    driver = Driver()
    yield driver
    driver.close()


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    """A folder with MNIST: TORCHBP_DATA, or where a download has put it.

    Without one the test is skipped; with TORCHBP_REQUIRE_DATA=1 it fails instead. Where
    torchvision is not installed, as beside the oldest torch, it is skipped in any case.
    """
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision, which reads MNIST")
    root = data.default_root()
    if data.find("mnist", root):
        return root
    message = f"MNIST not found in {root}: set TORCHBP_DATA to a folder that has it"
    if os.environ.get("TORCHBP_REQUIRE_DATA") == "1":
        pytest.fail(message)
    pytest.skip(message)
