"""The guide has a page for each check, and its examples do what the pages say."""

from __future__ import annotations

import pytest
import torch
from wrong_functions import rand

import torchbp
from torchbp.__main__ import main
from torchbp.examination import CHECKS, explain
from torchbp.examination.guide import blocks, introduction, read_pages

INPUTS = {
    "x": rand(3, 4, seed=1),
    "y": rand(3, 4, seed=2),
    "a": rand(3, 4, seed=3),
    "b": rand(4, seed=4),
}
OPTIONS = {
    "reference": {"reference": torch.exp},
    "compile": {"compile": True},
    "compiled-backward": {"compile": True},
    "A1": {"cost": True},
    "A2": {"cost": True},
}
TWO = {"raw-gradients": "xb", "requires_grad-subsets": "xy", "A1": "ay", "A2": "ay"}
TWO |= {"unneeded-gradients": "xy", "empty-inputs": "xb"}


def test_every_check_has_a_page_in_its_order():
    assert list(read_pages()) == list(CHECKS)


def run(check):
    """The findings of the page's wrong and right examples."""
    space: dict = {}
    exec(blocks(introduction())[0], space)
    for code in blocks(read_pages()[check]):
        exec(code, space)
    inputs = [INPUTS[name] for name in TWO.get(check, "x")]
    options = OPTIONS.get(check, {})
    for kind in ("wrong", "right"):
        fn = space.get(kind) or space[kind.capitalize()]
        yield torchbp.examine(fn, *inputs, **options)[check]


@pytest.mark.parametrize("check", CHECKS)
def test_the_examples_do_what_the_page_says(check):
    wrong, right = run(check)
    if check == "second-device" and wrong.status == "not applicable":
        pytest.skip("needs a second device")
    assert wrong.status in ("fail", "warn", "not supported"), wrong
    assert right.status == "pass", right


def test_the_command_prints_pages(capsys):
    assert main(["examine", "--explain", "linear-in-g"]) == 0
    page = capsys.readouterr().out
    assert page.startswith("linear-in-g\n\nBackward multiplies")
    assert "grad.clamp(-1, 1)" in page and "class Square(Function):" in page
    assert "class Product" not in page
    assert main(["examine", "--explain"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n{check} " in f"\n{listed}" for check in CHECKS)
    assert max(map(len, listed.splitlines())) <= 88
    assert explain("linear in g") == explain("linear-in-g")
    assert main(["examine", "--explain", "nothing"]) == 2
    assert "--explain: expected one of forward," in capsys.readouterr().err
