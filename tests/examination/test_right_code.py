"""Right code, of torch and in other people's styles, must raise no false alarm."""

from __future__ import annotations

import pytest
from right_code import RIGHT_CODE

import torchbp


@pytest.mark.parametrize("name", RIGHT_CODE)
def test_right_code_raises_no_alarm(name):
    piece = RIGHT_CODE[name]
    report = torchbp.examine(piece.function, *piece.inputs, **piece.options)
    assert report.ok, report.brief()
