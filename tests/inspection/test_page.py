"""The page of a backward pass, in a real browser: what it shows and computes."""

from __future__ import annotations

import base64
import importlib.util
import json
import math
import os
import re
import shutil
import struct
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import bounds
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import torchbp
from torchbp import examination
from torchbp.__main__ import main
from torchbp.inspection import observe, page, save_page

FOLDER = Path(page.__file__).parent
FLAGS = """--no-sandbox --disable-gpu --disable-background-networking --no-first-run
    --disable-component-update --disable-sync""".split()
HOSTILE = "</script><img src=x onerror=alert(1)>{{data}}&amp;'\""
Q = torchbp.QuadraticCost()


# ---------------------------------------------------------------- the browser


@pytest.fixture(scope="module")
def browser():
    """Chromium, driven by playwright. Without them the tests are skipped; with
    TORCHBP_REQUIRE_BROWSER=1 they fail instead."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    has_playwright = importlib.util.find_spec("playwright") is not None
    if program is None or not has_playwright:
        message = "needs Chromium and the Python package playwright"
        if os.environ.get("TORCHBP_REQUIRE_BROWSER") == "1":
            pytest.fail(message)
        pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """A function that opens a file; afterwards: no error, and no request but for it."""

    @contextmanager
    def opened(path, **options):
        context = browser.new_context(**options)
        context.set_default_timeout(300_000)
        tab, seen, requests = context.new_page(), [], set()
        tab.on("console", lambda message: seen.append(message.text))
        tab.on("pageerror", lambda error: seen.append(str(error)))
        tab.on("dialog", lambda dialog: seen.append(dialog.message))
        tab.on("request", lambda request: requests.add(request.url.split(":")[0]))
        tab.goto(path.as_uri())
        yield tab
        context.close()
        assert seen == []
        assert requests <= {"file", "data"}

    return opened


@pytest.fixture
def shown(opened, tmp_path):
    """A function that writes the page of a pass and opens it."""

    @contextmanager
    def shown(model, cost, x, y, lr=0.5, **options):
        path = tmp_path / "page.html"
        save_page(path, model, cost, x, y, lr)
        with opened(path, **options) as tab:
            yield tab

    return shown


def example(sizes=(2, 3, 1), n=5, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = torchbp.MLP(sizes, dtype=dtype, **options)
    return model, torch.rand(n, sizes[0]).to(dtype), torch.rand(n, sizes[-1]).to(dtype)


def parameters(tab):
    """W and b of each layer, as the page has them."""
    layers = tab.evaluate("state.net.layers.map(({ W, b }) => [W, b])")
    return [torch.tensor(p, dtype=torch.float64) for pair in layers for p in pair]


def number(text):
    """What a printed number means."""
    mantissa, _, power = text.replace("−", "-").partition("·10")
    power = power.translate(str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-"))
    return float(mantissa) * 10.0 ** int(power or 0)


# ---------------------------------------------------------------- the file


def test_the_file_is_self_contained_and_small(tmp_path):
    path = tmp_path / "page.html"
    model, x, y = example((784, 30, 10), 10, torch.float32)
    save_page(path, model, Q, x, y, 3.0)
    assert path.stat().st_size <= 500_000
    lines = [
        len((FOLDER / f"page.{kind}").read_text("utf-8").splitlines())
        for kind in ("html", "js", "css")
    ]
    assert sum(lines) <= 900
    text = path.read_text("utf-8")
    assert "default-src 'none'" in text
    assert set(re.findall(r"https?://[\w.]+", text)) == {"http://www.w3.org"}


def test_the_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("before")

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="cannot be written: No space left"):
        save_page(path, *example()[:1], Q, *example()[1:], 1.0)
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def costs_nothing(a, y):
    return a.sum().item()


costs_nothing.takes = "a"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"path": 5}, TypeError, "path: expected a path, got int"),
        ({"path": "."}, OSError, "expected a file, got a folder"),
        ({"model": 5}, TypeError, "model: expected a module, got int"),
        ({"model": nn.Linear(2, 1)}, ValueError, "from_native converts"),
        ({"cost": nn.MSELoss()}, TypeError, "expected a cost with takes"),
        ({"cost": costs_nothing}, ValueError, "cost: expected a tensor of one number"),
        ({"cost": torchbp.CrossEntropyCost()}, ValueError, "applied twice"),
        ({"input": [1.0]}, TypeError, "expected two Tensors"),
        ({"input": torch.rand(5, 3)}, ValueError, "expected last dimension 2"),
        ({"input": torch.rand(0, 2)}, ValueError, "expected at least one example"),
        ({"target": torch.rand(4, 1)}, ValueError, "target: expected shape"),
        ({"lr": -1.0}, ValueError, "lr: expected a number >= 0"),
        ({"lr": math.nan}, ValueError, "lr: expected a number >= 0"),
        ({"lr": "1"}, TypeError, "lr: expected a number"),
        ({"model": torchbp.MLP([2, 3000, 3000, 1])}, ValueError, "at most 5,000,000"),
    ],
)
def test_bad_arguments(tmp_path, changes, error, message):
    model, input, target = example(dtype=torch.float32)
    path = tmp_path / "page.html"
    arguments = {"path": path, "model": model, "cost": Q, "lr": 1.0}
    arguments |= {"input": input, "target": target, **changes}
    with pytest.raises(error, match=message):
        save_page(**arguments)
    assert list(tmp_path.iterdir()) == []


def test_the_model_stays_as_it_is(tmp_path):
    model, x, y = example()
    model.train()
    before = [p.clone() for p in model.parameters()]
    save_page(tmp_path / "page.html", model, Q, x, y, 1.0)
    assert model.training
    for p, old in zip(model.parameters(), before, strict=True):
        assert p.grad is None
        assert_close(p.detach(), old.detach(), **bounds.EXACT)


# ---------------------------------------------------------------- its numbers


ACTIVATIONS = torchbp.nn.ACTIVATIONS
COSTS = torchbp.costs.COSTS


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_page_computes_what_torchbp_does(shown, activation, cost):
    """Once from the recorded numbers and once by its own backprop."""
    cost = COSTS[cost]()
    output = "identity" if cost.takes == "z" else "sigmoid"
    model, x, y = example((3, 4, 4, 2), activation=activation, output=output)
    with observe(model) as trace:
        C = cost(model(x), y)
        C.backward()
    with shown(model, cost, x, y) as tab:
        assert tab.inner_text("#warning") == ""
        assert "the same" in tab.inner_text("#checked")
        for source in ("state.net.pass", "backprop(state.net)"):
            computed = tab.evaluate(source)
            assert computed["C"] == pytest.approx(
                C.item(), **bounds.approx(bounds.near())
            )
            for record, layer in zip(trace, computed["layers"], strict=True):
                n = len(x)
                expected = {
                    "x": record.x, "z": record.z, "a": record.a,
                    "s": record.sigma_prime, "delta": n * record.delta,
                    "grad_a": n * record.grad_a, "grad_W": record.grad_weight,
                    "grad_b": record.grad_bias,
                }  # fmt: skip
                for name, t in expected.items():
                    value = torch.tensor(layer[name], dtype=torch.float64)
                    assert_close(value, t, **bounds.near())


def test_every_step_writes_out_the_right_numbers(shown):
    """At each step, for each neuron and weight, what stands highlighted."""
    model, x, y = example((2, 3, 2), n=1)
    with observe(model) as trace:
        Q(model(x), y).backward()
    lr, expected = 0.5, {"C": Q(model(x), y).item()}
    for ell, r in enumerate(trace, start=1):
        for j in range(r.z.shape[-1]):
            at = f"^{{{ell}}}_{{{j + 1}}}"
            expected |= {
                f"z{at}": r.z[0, j], f"a{at}": r.a[0, j], f"δ{at}": r.delta[0, j],
                f"σ'(z{at})": r.sigma_prime[0, j], f"∂C/∂a{at}": r.grad_a[0, j],
                f"∂C/∂b{at}": r.grad_bias[j],
                f"b{at}": r.bias[j] - lr * r.grad_bias[j],
            }  # fmt: skip
            for k in range(r.x.shape[-1]):
                w, grad = f"W^{{{ell}}}_{{{j + 1}{k + 1}}}", r.grad_weight[j, k]
                expected |= {f"∂C/∂{w}": grad, w: r.weight[j, k] - lr * grad}
    seen = set()
    with shown(model, Q, x, y, lr) as tab:
        places = [(ell, j, k) for ell in range(2) for j in range(3 - ell)
                  for k in range(2 + ell)]  # fmt: skip
        count = tab.evaluate("steps().length")
        assert count == 10
        for i in range(count):
            tab.evaluate(f"goToStep({i})")
            assert tab.inner_text("#phase").endswith(f"step {i + 1} of {count}")
            for ell, j, k in places:
                tab.evaluate(f"select({ell}, {j}, {k})")
                lines = tab.evaluate("story().filter(({ isNow }) => isNow)")
                written = tab.locator(".line.now .result").all_inner_texts()
                for line, text in zip(lines, written, strict=True):
                    assert text.strip()[2:] == line["right"][-1]
                    off = bounds.printed(4)
                    value = pytest.approx(float(expected[line["left"]]), **off)
                    assert number(line["right"][-1]) == value
                    seen.add(line["left"])
    assert seen == set(expected)


@pytest.mark.parametrize("cost", COSTS)
def test_the_cost_is_written_out_with_numbers(shown, cost):
    """What stands between C and its value is a sum that has this value."""
    cost = COSTS[cost]()
    output = "identity" if cost.takes == "z" else "sigmoid"
    model, x, y = example((2, 3, 2), n=1, output=output)
    with shown(model, cost, x, y) as tab:
        tab.evaluate("goToStep(stepOf('cost', 1))")
        line = tab.evaluate("story().find(({ isNow }) => isNow)")
        shares = tab.evaluate("seen(1, 'a').flatMap((a) => [a, 1 - a])")
    assert line["left"] == "C"
    put = line["right"][0].replace("½ ", "0.5 * ").replace("^{2}", " ** 2")
    logarithm = r"(−| )ln (\([^()]*\)|[\d.]+)"
    put = re.sub(logarithm, lambda m: f"{m[1].replace(' ', ' * ')}log({m[2]})", put)
    value = eval(put.replace("−", "-"), {"log": math.log})
    off = bounds.printed(4, 8 * math.ceil(1 / min(shares)))  # two outputs, d ln a = 1/a
    assert value == pytest.approx(cost(model(x), y).item(), **off)


def test_the_cancelled_slope_is_written_out(shown):
    """With cross-entropy, ∂C/∂a times σ' is δ = a - y."""
    cost = torchbp.CrossEntropyCost()
    model, x, y = example((2, 3, 2), n=1, output="identity")
    a, y_1 = model(x).sigmoid()[0, 0].item(), y[0, 0].item()
    with shown(model, cost, x, y) as tab:
        tab.evaluate("goToStep(stepOf('bp1', 1))")
        lines = tab.evaluate("story().filter(({ isNow }) => isNow)")
    exact = {"∂C/∂a": (a - y_1) / (a * (1 - a)), "σ'(z": a * (1 - a), "δ": a - y_1}
    for line, (symbol, value) in zip(lines, exact.items(), strict=True):
        assert line["left"].startswith(symbol)
        off = bounds.printed(4)
        assert number(line["right"][-1]) == pytest.approx(value, **off)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [(2, 3, 1), (784, 30, 10)])
def test_rounding_is_no_warning(shown, sizes, dtype):
    model, x, y = example(sizes, 10, dtype)
    with shown(model, Q, x, y) as tab:
        assert tab.inner_text("#warning") == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_of_many_numbers_are_exact(shown, dtype):
    """A sum of a million squares, one after the other, is off by more than 8 eps."""
    numbers = torch.full((1000, 1000), 0.1, dtype=dtype)
    value = base64.b64decode(page._norm(numbers)["f8"])
    off = bounds.approx(bounds.close(8))
    exact = pytest.approx(1000 * numbers[0, 0].item(), **off)
    assert struct.unpack("<d", value)[0] == exact
    with shown(*example()[:1], Q, *example()[1:]) as tab:
        entry = numbers[0, 0].item()
        assert tab.evaluate(f"norm(range(1e6).map(() => {entry!r}))") == exact


def changed_delta(path, ell, change):
    """Put `change` of the first recorded δ of layer `ell` in its place."""
    text = path.read_text("utf-8")
    start = text.index('id="data">') + len('id="data">')
    end = text.index("</script>", start)
    content = json.loads(text[start:end])
    delta = content["networks"][0]["layers"][ell]["delta"]
    data = bytearray(base64.b64decode(delta["f8"]))
    first = struct.unpack_from("<d", data)[0]
    struct.pack_into("<d", data, 0, change(first))
    delta["f8"] = base64.b64encode(data).decode()
    path.write_text(text[:start] + json.dumps(content) + text[end:], "utf-8")


@pytest.mark.parametrize("ell", [0, 1])
@pytest.mark.parametrize(
    "change", [lambda d: d * (1 + 2**-40), lambda d: math.nan, lambda d: math.inf]
)
def test_a_wrong_number_is_a_warning(opened, tmp_path, ell, change):
    path = tmp_path / "page.html"
    model, x, y = example()
    save_page(path, model, Q, x, y, 1.0)
    changed_delta(path, ell, lambda delta: delta)
    with opened(path) as tab:
        assert tab.inner_text("#warning") == ""
    changed_delta(path, ell, change)
    with opened(path) as tab:
        warning = tab.inner_text("#warning")
        assert f"{'BP2' if ell == 0 else 'BP1'} at layer {ell + 1}" in warning
        assert f"layers.{ell}: δ{'¹²'[ell]}₁ of example 1 was recorded as" in warning
        assert tab.inner_text("#checked") == ""
        assert tab.locator("#warning").is_visible()


# ---------------------------------------------------------------- what can be changed


def test_a_dragged_weight_gives_what_backprop_gives(shown):
    model, x, y = example()
    with shown(model, Q, x, y) as tab:
        tab.evaluate("select(1, 0, 2)")
        tab.get_by_label("weight W²₁₃").fill("-1.5")
        with torch.no_grad():
            model.layers[1].weight[0, 2] = -1.5
        C, gradients = torchbp.backprop(model, Q, x, y)
        computed = tab.evaluate("state.net.pass")
        assert computed["C"] == pytest.approx(C.item(), **bounds.approx(bounds.near()))
        for ell, layer in enumerate(computed["layers"]):
            for name, key in (("weight", "grad_W"), ("bias", "grad_b")):
                value = torch.tensor(layer[key], dtype=torch.float64)
                expected = gradients[f"layers.{ell}.{name}"]
                assert_close(value, expected, **bounds.near())
        assert "Changed" in tab.inner_text("#checked")


def test_inputs_targets_and_the_rate_can_be_dragged(shown):
    model, x, y = example()
    with shown(model, Q, x, y) as tab:
        tab.evaluate("select(-1, 1)")
        tab.get_by_label("input x₂").fill("0.25")
        tab.evaluate("select(1, 0)")
        tab.get_by_label("target y₁").fill("0.75")
        tab.get_by_label("learning rate").fill("2")
        x[0, 1], y[0, 0] = 0.25, 0.75
        C = Q(model(x), y).item()
        near = bounds.approx(bounds.near())
        assert tab.evaluate("state.net.pass.C") == pytest.approx(C, **near)
        assert tab.evaluate("state.net.lr") == 2
        tab.click("#reset")
        assert tab.evaluate("state.net.lr") == 0.5


@pytest.mark.parametrize("cost", ["quadratic", "cross-entropy"])
def test_a_hundred_steps_follow_explicit_sgd(shown, cost):
    model, x, y = example()
    with shown(model, Q, x, y) as tab:
        tab.select_option("#cost", cost)
        tab.click("#one")
        tab.click("#hundred")
        learned = parameters(tab)
        assert "Steps taken: 101" in tab.inner_text("#trained")
        assert tab.locator("#costs .run").count() == 1
    output = "sigmoid" if cost == "quadratic" else "identity"
    twin = torchbp.MLP([2, 3, 1], output=output, dtype=torch.float64)
    twin.load_state_dict(model.state_dict())
    engine = torchbp.ExplicitSGD(twin, COSTS[cost](), lr=0.5)
    for _ in range(101):
        engine.step(x, y)
    for ours, theirs in zip(learned, twin.parameters(), strict=True):
        assert_close(ours, theirs.detach(), **bounds.near(steps=101))


def test_frozen_parameters_stay(shown):
    model, x, y = example()
    model.layers[0].weight.requires_grad_(False)
    with shown(model, Q, x, y) as tab:
        before = parameters(tab)
        tab.click("#hundred")
        after = parameters(tab)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


def answers_after(tab, button):
    tab.get_by_role("button", name=button, exact=True).click()
    return tab.evaluate("seen(0, 'a')[0]")


def test_the_lessons_hold(shown):
    model, x, y = example()
    with shown(model, Q, x, y) as tab:
        tab.get_by_role("button", name="Lesson 1").click()
        assert tab.locator(".neuron.saturated").count() == 1
        slow = answers_after(tab, "100 steps, quadratic cost")
        fast = answers_after(tab, "100 steps, cross-entropy")
        assert fast < 0.5 < 0.9 < slow
        assert tab.locator("#costs polyline.run").count() == 2
        tab.get_by_role("button", name="Lesson 2").click()
        sizes = tab.locator("#layers tr td:nth-child(5)").all_inner_texts()
        errors = [number(text.strip()) for text in sizes]
        assert len(errors) == 5 and errors == sorted(errors)
        tab.get_by_role("button", name="Lesson 3").click()
        before = parameters(tab)[0]
        tab.get_by_role("button", name="Show BP4 at layer 1").click()
        assert tab.locator(".line.now .result").inner_text().strip() == "= 0"
        answers_after(tab, "Lesson 3: A dead input")
        tab.locator("#lesson").get_by_role("button", name="100 steps").click()
        after = parameters(tab)[0]
        assert torch.equal(before[:, 1], after[:, 1])
        assert not torch.equal(before[:, 0], after[:, 0])
        tab.get_by_role("button", name="Set input 2 to 0.8").click()
        assert number(tab.locator(".line.now .result").inner_text().strip()[2:]) > 0
        tab.locator("#lesson").get_by_role("button", name="100 steps").click()
        assert torch.equal(before[:, 1], parameters(tab)[0][:, 1])


def test_what_a_lesson_does_is_in_view(shown):
    """Each button of a lesson brings its result on the screen and keeps the focus."""
    is_seen = """(e) => {
        const { top, bottom } = e.getBoundingClientRect();
        return top >= 0 && Math.floor(bottom) <= innerHeight; // whole pixels scroll
    }"""
    model, x, y = example()
    with shown(model, Q, x, y, viewport={"width": 1280, "height": 900}) as tab:
        for lesson, places in enumerate(("1212", "132", "121"), start=1):
            tab.get_by_role("button", name=f"Lesson {lesson}").press("Enter")
            pressed = "document.activeElement.textContent"
            assert tab.evaluate(pressed).startswith(f"Lesson {lesson}")
            for i, place in enumerate(places):
                button = tab.locator("#lesson button").nth(i)
                button.press("Enter")
                result = {"1": ".line.now >> nth=-1", "2": "#costs svg", "3": "#layers"}
                assert tab.locator(result[place]).evaluate(is_seen)
                focus = "table" if place == "3" else ""
                assert tab.evaluate("document.activeElement.id") == focus
                if not focus:
                    assert tab.evaluate(pressed) == button.inner_text()


# ---------------------------------------------------------------- how it is used


def test_by_keyboard(shown):
    """One tab stop for each layer, arrows inside it, weights through their neuron."""
    model, x, y = example()
    with shown(model, Q, x, y) as tab:
        assert tab.locator("#network [tabindex='0']").count() == 3
        tab.focus("#next")
        focused = "document.activeElement.getAttribute('aria-label') ?? ''"
        for _ in range(20):
            tab.keyboard.press("Tab")
            if tab.evaluate(focused).startswith("neuron"):
                break
        tab.keyboard.press("ArrowDown")
        assert tab.evaluate(focused).startswith("neuron 2")
        assert tab.inner_text("#choice").startswith("Neuron 2 of layer 1")
        tab.keyboard.press("ArrowRight")
        assert "step 2 of" in tab.inner_text("#phase")
        tab.keyboard.press("ArrowLeft")
        assert "step 1 of" in tab.inner_text("#phase")
        tab.keyboard.press("Tab")
        assert tab.evaluate(focused).startswith("neuron 1")
        tab.focus("#back")
        tab.keyboard.press("Enter")
        assert tab.evaluate("document.activeElement.id") == "back"
        tab.select_option("#weight", "1")
        assert "weight from" in tab.inner_text("#choice")


def test_clicks_on_neurons_and_weights(shown):
    model, x, y = example()
    with shown(model, Q, x, y) as tab:
        tab.locator("[data-at='0,2']").click()
        assert tab.inner_text("#choice").startswith("Neuron 3 of layer 1, weight from")
        tab.locator("[data-weight='1,0,1']").dispatch_event("click")
        assert "Neuron 1 of layer 2, weight from neuron 2" in tab.inner_text("#choice")
        tab.select_option("#example", "mean")
        assert "mean of 5 examples" in tab.inner_text("#choice")


def test_weights_of_a_large_network_are_written_out_too(shown):
    model, x, y = example((784, 30, 10), 3, torch.float32)
    with shown(model, Q, x, y) as tab:
        assert "more than 500 weights" in tab.inner_text("#fixed")
        assert not tab.locator("#controls").is_visible()
        assert tab.locator("#network rect.pixel").count() == 784
        assert "10 of 30 shown" in tab.inner_text("#others")
        tab.get_by_label("Layer 1, the largest errors").select_option("29")
        tab.evaluate("goToStep(stepOf('bp4', 1))")
        tab.select_option("#weight", "29")
        assert "weight from neuron 30" in tab.inner_text("#choice")
        assert "W22" not in tab.inner_text("#written")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("media", ["screen", "print"])
def test_a_narrow_page_scrolls_one_way_only(shown, scheme, media):
    options = {"viewport": {"width": 400, "height": 800}, "color_scheme": scheme}
    model, x, y = example((784, 30, 10), 3, torch.float32)
    with shown(model, Q, x, y, **options) as tab:
        tab.emulate_media(media=media)
        for i in range(tab.evaluate("steps().length")):
            tab.evaluate(f"goToStep({i})")
            assert tab.evaluate("document.documentElement.scrollWidth") <= 400
        ink = "getComputedStyle(document.body).color"
        is_light = scheme == "light" or media == "print"
        assert (tab.evaluate(ink) == "rgb(28, 36, 48)") == is_light
        assert tab.locator("#stepper").is_visible() == (media == "screen")


def test_trained_curves_are_printed(shown):
    model, x, y = example()
    with shown(model, Q, x, y) as tab:
        tab.emulate_media(media="print")
        assert not tab.locator("#change").is_visible()
        tab.emulate_media(media="screen")
        tab.click("#hundred")
        tab.emulate_media(media="print")
        assert tab.locator("#costs svg").is_visible()
        assert not tab.locator("#knobs").is_visible()


# ---------------------------------------------------------------- any model, any number


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.add_module(HOSTILE.replace(".", ""), torchbp.BPLinearTanh(2, 3))
        self.norm = nn.LayerNorm(3)
        self.last = torchbp.BPLinearSigmoid(3, 1)
        self.unused = torchbp.BPLinearSigmoid(3, 1)

    def forward(self, x):
        first, *rest = self.children()
        return rest[1](rest[0](first(x)))


def test_other_modules_are_named_and_names_are_text(shown):
    torch.manual_seed(0)
    model = Mixed()
    type(model).__name__ = HOSTILE
    try:
        with shown(model, Q, torch.rand(4, 2), torch.rand(4, 1)) as tab:
            about = tab.inner_text("#about")
            rest = "norm: LayerNorm, unused: BPLinearSigmoid (not called)"
            assert f"not drawn: {rest}" in about
            assert about.startswith(HOSTILE)
            assert tab.title().endswith(f"{HOSTILE} [2, 3, 1]")
            assert f"1 {HOSTILE}" in tab.inner_text("#layers")
            assert tab.locator("img").count() == 0
            assert tab.inner_text("#warning") == ""
    finally:
        type(model).__name__ = "Mixed"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300, 1e-310])
def test_numbers_that_are_none_are_text(shown, value):
    model, x, y = example()
    x[0, 1] = value
    with shown(model, Q, x, y) as tab:
        for i in range(tab.evaluate("steps().length")):
            tab.evaluate(f"goToStep({i})")
        tab.evaluate("select(-1, 1)")
        tab.select_option("#example", "0")
        text = tab.inner_text("#written")
        assert number(text.split(" = ")[1].replace("Infinity", "inf")) == (
            value if value != 1e-310 else pytest.approx(value)
        ) or math.isnan(value)
        tab.click("#hundred")


# ---------------------------------------------------------------- from a terminal


def test_the_tour_and_observe_write_pages(opened, tmp_path, capsys, mnist_root):
    tour, first_batch = tmp_path / "tour.html", tmp_path / "mnist.html"
    assert main(["tour", "--html", str(tour)]) == 0
    assert main(["observe", "--html", str(first_batch)]) == 0
    out = capsys.readouterr().out
    for path, title in ((tour, "MLP [2, 3, 1]"), (first_batch, "MLP [784, 30, 10]")):
        assert f"page {path}" in out
        with opened(path) as tab:
            assert title in tab.inner_text("#about")
            assert tab.inner_text("#warning") == ""
    assert first_batch.stat().st_size <= 500_000


def test_a_page_that_cannot_be_written_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TORCHBP_DATA", raising=False)
    for command in (
        ["tour", "--html", str(tmp_path)],
        ["observe", "--data", str(tmp_path), "--html", str(tmp_path / "page.html")],
    ):
        assert main(command) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- notebooks


class Cells(HTMLParser):
    """The text and the style of each cell."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.cells, self.style = set(), {}, None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.style = dict(attributes).get("style", "")

    def handle_data(self, data):
        self.cells[data] = self.style


def test_results_are_tables_in_notebooks():
    model, x, y = example()
    with observe(model) as trace:
        Q(model(x), y).backward()
    comparison = torchbp.compare(model, Q, x, y)
    report = examination.examine(torchbp.QuadraticCost(), x[:, :1], y)
    for result in (trace, comparison, report):
        cells = Cells(result._repr_html_())
        assert cells.tags == {"table", "caption", "tr", "th", "td"}
    assert "layers.0" in Cells(trace._repr_html_()).cells
    verdicts = Cells(comparison._repr_html_()).cells
    assert "background" in next(
        verdicts[word] for word in ("≈", "exact") if word in verdicts
    )
    assert "background" in Cells(report._repr_html_()).cells["pass"]


def test_names_in_notebooks_are_text():
    torch.manual_seed(0)
    model = Mixed()
    with observe(model) as trace:
        Q(model(torch.rand(4, 2)), torch.rand(4, 1)).backward()
    cells = Cells(trace._repr_html_())
    assert "img" not in cells.tags and "script" not in cells.tags
    assert HOSTILE in cells.cells
