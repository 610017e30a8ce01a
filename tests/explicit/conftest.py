"""The explicit engine's tests run by the torch calls and by the compiled loops."""

from __future__ import annotations

import pytest

from torchbp.explicit import kernel


@pytest.fixture(scope="session")
def built():
    """The compiled loops; the test is skipped where they cannot be had."""
    if kernel.load(build=True) is None:
        pytest.skip(f"needs the compiled loops: {kernel.explain_failure()}")
    return kernel.load(build=False)


@pytest.fixture(scope="module", params=["torch", "compiled"])
def kernel_in_use(request):
    """What "auto" chooses, where both are possible."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(kernel, "load", lambda build: None)
        else:
            request.getfixturevalue("built")
        yield request.param
