"""The tour's numbers, read off the screen, beside the same ones worked out by hand."""

from __future__ import annotations

import math
import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import bounds
import processes
import pytest
import torch

from torchbp import functional
from torchbp.__main__ import main
from torchbp.inspection.layout import WIDTH
from torchbp.inspection.tour import Tour

ROOT = Path(__file__).parents[2]
SEEDS = range(6)


def shown(capsys, *arguments):
    """What the tour prints, once it has gone well."""
    assert main(["tour", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def numbers(line):
    return [float(x) for x in re.findall(r"-?\d+\.\d+", line)]


def problem(out):
    """W, b by layer, x and y, as they are printed."""
    rows = [line for line in out.splitlines() if re.search(r"\[.*\].*\[.*\]", line)]
    W, b = {}, {}
    for line in rows:
        named = re.search(r"W\^(\d)", line)
        if named:
            ell = int(named[1])
            W[ell], b[ell] = [], []
        *weights, bias = numbers(line)
        W[ell].append(weights)
        b[ell].append(bias)
    example = re.search(r"x = \(([\d.]+), ([\d.]+)\).*y = (\d)", out)
    return W, b, [float(example[1]), float(example[2])], float(example[3])


def sigma(z):
    return 1 / (1 + math.exp(-z))


def forward(W, b, x):
    a, z = {0: x}, {}
    for ell in (1, 2):
        z[ell] = [
            sum(w * v for w, v in zip(row, a[ell - 1], strict=True)) + c
            for row, c in zip(W[ell], b[ell], strict=True)
        ]
        a[ell] = [sigma(v) for v in z[ell]]
    return z, a


def worked_out(W, b, x, y, lr=0.5):
    """Every quantity of the tour by its name, by finite differences where it is a
    derivative: no equation of backpropagation is used."""
    z, a = forward(W, b, x)
    C = (y - a[2][0]) ** 2 / 2
    result = {"C": C}
    for ell in (1, 2):
        for j, (z_j, a_j) in enumerate(zip(z[ell], a[ell], strict=True), start=1):
            result[f"z^{ell}_{j}"] = z_j
            result[f"a^{ell}_{j}"] = a_j
            slope = (sigma(z_j + 1e-5) - sigma(z_j - 1e-5)) / 2e-5
            result[f"σ'(z^{ell}_{j})"] = slope

    def nudged(ell, j, k):
        def cost(h):
            W_h = {m: [list(row) for row in rows] for m, rows in W.items()}
            b_h = {m: list(row) for m, row in b.items()}
            if k is None:
                b_h[ell][j] += h
            else:
                W_h[ell][j][k] += h
            return (y - forward(W_h, b_h, x)[1][2][0]) ** 2 / 2

        return (cost(1e-5) - cost(-1e-5)) / 2e-5

    for ell in (1, 2):
        for j, row in enumerate(W[ell]):
            slope = nudged(ell, j, None)
            name = f"b^{ell}_{j + 1}"
            result[f"∂C/∂{name}"] = result[f"δ^{ell}_{j + 1}"] = slope
            result[f"{name} ←"] = b[ell][j] - lr * slope
            for k, w in enumerate(row):
                slope = nudged(ell, j, k)
                name = f"W^{ell}_{j + 1}{k + 1}"
                result[f"∂C/∂{name}"] = slope
                result[f"{name} ←"] = w - lr * slope
    result["∂C/∂a^2_1"] = a[2][0] - y
    for k, w in enumerate(W[2][0]):
        result[f"W^2_1{k + 1} δ^2_1"] = w * result["δ^2_1"]
    return result


@pytest.mark.parametrize("seed", SEEDS)
def test_every_number_is_right(capsys, seed):
    out = shown(capsys, "--seed", str(seed))
    expected = worked_out(*problem(out))
    seen, off = set(), bounds.printed(4)
    for line in out.partition("The check")[0].splitlines():
        match = re.fullmatch(r"  (\S.*?) (=|←) .*?(-?\d+\.\d{4})", line)
        if not match:
            continue
        name = match[1].strip() + (" ←" if match[2] == "←" else "")
        assert float(match[3]) == pytest.approx(expected[name], **off), line
        seen.add(name)
    assert seen == set(expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_numbers_put_in_give_the_number_that_comes_out(capsys, seed):
    """A learner with a calculator finds the same, but for the rounding."""
    out = shown(capsys, "--seed", str(seed)).partition("The check")[0]
    checked = 0
    for line in out.splitlines():
        match = re.fullmatch(r"  \S.*? [=←] (?:.* = )?(.*?) = +(-?\d+\.\d{4})", line)
        if not match or re.search(r"[a-zδ]", match[1]):
            continue
        code = re.sub(r"½ \((.*)\)²", r"(\1)**2/2", match[1])
        code = re.sub(r"σ\((.*)\)", r"sigma(\1)", code).replace("·", "*")
        value = eval(code, {"sigma": sigma})
        numbers = 1 + len(re.findall(r"\d\.\d{4}", match[1]))
        off = bounds.printed(4, numbers)
        assert value == pytest.approx(float(match[2]), **off), line
        checked += 1
    assert checked == 4 + 4 + 1 + 3 + 3 + 3 + 3 + 9 + 13


def test_the_check_has_the_gradients_in_full(capsys):
    out = shown(capsys, "--seed", "3")
    expected = worked_out(*problem(out))
    rows = re.findall(r"^  (∂C/∂\S+) +(\S+) +(\S+) +(\S+)$", out, flags=re.MULTILINE)
    assert len(rows) == 13
    for name, ours, native, difference in rows:
        off = bounds.approx(bounds.difference(1e-5))
        assert float(ours) == pytest.approx(expected[name], **off)
        assert float(native) == pytest.approx(expected[name], **off)
        assert abs(float(difference)) < bounds.network(longest=3, layers=2)
    assert "8 of 8 agree" in out


def test_columns_line_up_and_fit_80(capsys):
    for seed in SEEDS:
        out = shown(capsys, "--seed", str(seed))
        assert max(map(len, out.splitlines())) <= WIDTH
        for block in out.split("\n\n"):
            lines = [
                line for line in block.splitlines() if re.match("  [^t].* = ", line)
            ]
            starts = {line.rindex("=") for line in lines}
            assert len(starts) <= 1 or "W^1 =" in block or "W^2 =" in block, block
    assert "\x1b" not in out and not re.search(r" $", out, flags=re.MULTILINE)


def test_the_cost_falls_whatever_the_seed():
    for seed in range(40):
        tour = Tour(seed)
        assert tour.ok
        assert 0 < tour.cost_after < tour.cost, seed


def test_a_tour_is_its_seed_and_leaves_no_trace(capsys):
    torch.manual_seed(7)
    first = shown(capsys, "--seed", "4")
    after = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(after, torch.rand(1))
    assert shown(capsys, "--seed", "4") == first
    assert shown(capsys, "--seed", "5") != first


def test_each_equation_points_at_its_lines(capsys):
    out = shown(capsys)
    sections = re.split(r"^\d+/10 +", out, flags=re.MULTILINE)[1:]
    assert len(sections) == 10
    homes = {}
    for section in sections:
        for name, number, code in re.findall(
            r"^  (torchbp/[\w/]+\.py):(\d+) +(.*)$", section, flags=re.MULTILINE
        ):
            line = (ROOT / name).read_text(encoding="utf-8").splitlines()
            text = line[int(number) - 1].strip()
            assert text.startswith(code.removesuffix("…"))
            equation = section[:3]
            assert equation in text.partition("#")[2]
            homes.setdefault(equation, set()).add(name)
    explicit, layers = "torchbp/explicit/algorithm.py", "torchbp/functional.py"
    assert homes == {
        "BP1": {explicit, layers, "torchbp/costs.py"},
        "BP2": {explicit, layers},
        "BP3": {explicit, layers},
        "BP4": {explicit, layers},
    }


def test_a_wrong_gradient_is_status_1(capsys, monkeypatch):
    right = functional.LinearSigmoidFunction.gate
    monkeypatch.setattr(
        functional.LinearSigmoidFunction,
        "gate",
        staticmethod(lambda grad_a, a: right(grad_a, a) * 1.001),
    )
    assert main(["tour"]) == 1
    out = capsys.readouterr().out
    assert "A GRADIENT IS WRONG." in out and "is right" not in out


@pytest.mark.parametrize("seed", ["-1", "4294967296", "x"])
def test_bad_seeds_are_one_line_and_status_2(capsys, seed):
    try:
        status = main(["tour", "--seed", seed])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and seed in err
    with pytest.raises(ValueError, match=r"seed: expected 0 to 2\^64 - 1, got -1"):
        Tour(-1)


@pytest.mark.parametrize(
    ("lines", "sections"), [("\n" * 9, 10), ("", 10), ("\n\nq\n", 3), ("\nQ", 2)]
)
def test_steps_where_input_is_no_terminal(
    capsys, monkeypatch, tmp_path, lines, sections
):
    file = tmp_path / "keys"
    file.write_text(lines)
    with file.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        out = shown(capsys, "--step")
    assert len(re.findall(r"^\d+/10 ", out, flags=re.MULTILINE)) == sections
    monkeypatch.setattr(sys, "stdin", None)
    assert shown(capsys, "--step") == shown(capsys)


pty = pytest.mark.skipif(os.name == "nt", reason="needs pseudo-terminals")


class Terminal:
    """`python -m torchbp tour --step` at a terminal of its own."""

    def __init__(self, **environment):
        self.master, slave = os.openpty()
        clean = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "torchbp", "tour", "--step"],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=ROOT,
            env={**clean, "TERM": "xterm", **environment},
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""

    def until(self, text):
        """Read until `text` has come."""
        while text not in self.seen:
            assert select.select([self.master], [], [], 60)[0], self.seen
            self.seen += os.read(self.master, 65536).decode(errors="replace")
        return self.seen

    def press(self, keys):
        self.seen = ""
        os.write(self.master, keys)

    def end(self):
        status = self.process.wait(timeout=processes.LIMIT)
        os.close(self.master)
        return status


@pty
def test_a_key_at_a_terminal_then_ctrl_c():
    terminal = Terminal()
    first = terminal.until("1 of 10: any key to continue, q to quit --")
    assert "\x1b[1m1/10   The network and the example\x1b[0m" in first
    assert "2/10" not in first
    terminal.press(b" ")
    second = terminal.until("2 of 10: any key")
    assert "\r" + " " * 20 in second  # the prompt is wiped out
    assert "\x1b[32m" in second
    terminal.press(b"\x1b[B")  # an arrow key is one key
    third = terminal.until("3 of 10: any key")
    assert "4 of 10" not in third
    terminal.process.send_signal(signal.SIGINT)
    terminal.until("\r")
    assert terminal.end() == 130
    assert "Traceback" not in terminal.seen


@pty
def test_no_color_and_q():
    terminal = Terminal(NO_COLOR="1")
    assert "\x1b[" not in terminal.until("1 of 10: any key")
    terminal.press(b"q")
    terminal.until("\r")
    assert terminal.end() == 0
