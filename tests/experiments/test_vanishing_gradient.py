"""experiments/vanishing_gradient.py: its figures are BP2's, and its claims can fail."""

from __future__ import annotations

import dataclasses
import math

import bounds
import pytest
import torch
from noise import noise_splits

import torchbp
from experiments import vanishing_gradient as experiment
from experiments.support import reporting

DATA = noise_splits(60)
# Sums over 784 pixels, in float32, through a few layers.
OFF = bounds.relative(bounds.network(torch.float32, longest=784))


@pytest.fixture(autouse=True)
def _noise(monkeypatch):
    monkeypatch.setattr(reporting, "load", lambda settings: DATA)


def settings(tmp_path, **changes):
    small = {
        "depth": 3, "width": 5, "seeds": 2, "examples": 40, "epochs": 2,
        "logdir": str(tmp_path), "name": "one",
    }  # fmt: skip
    return experiment.VanishingSettings(**{**small, **changes})


def test_everything_is_measured_and_written(measure, tmp_path):
    written, _, events = measure(experiment.main, settings(tmp_path))
    assert len(written["starts"]) == len(written["courses"]) == 3 * 3 * 3
    for start, course in zip(written["starts"], written["courses"], strict=True):
        depth = start["depth"]
        assert len(start["norms"]) == len(start["speeds"]) == depth
        assert len(start["predicted"]) == depth - 1
        for of_epochs in (course["norms"], course["speeds"]):
            assert all(len(of_layers) == depth for of_layers in of_epochs)
            assert course["diverged"] or len(of_epochs) == 3
    assert written["shown"] == all(written["claims"].values())
    (course,) = (
        c for c in written["courses"]
        if (c["activation"], c["init"], c["depth"]) == ("tanh", "torch", 2)
    )  # fmt: skip
    for quantity in ("norm", "speed"):
        shown = [p.value for p in events.Scalars(f"tanh_torch_2/{quantity}_1")]
        assert shown == pytest.approx([now[0] for now in course[f"{quantity}s"]])


def test_norms_are_those_of_the_gradients(tmp_path):
    """‖δ^ℓ‖ and the speeds beside what autograd leaves in native layers."""
    chosen = settings(tmp_path, seeds=1, seed=3)
    images, labels = DATA.train.images[:40], DATA.train.labels[:40]
    start, course = experiment.measure(chosen, "tanh", "torch", 3, images, labels)
    torch.manual_seed(3)
    sizes = [784, 5, 5, 5, 10]
    model = torchbp.MLP(sizes, "tanh", output="identity", init="torch")
    native = torchbp.to_native(model)
    torchbp.CrossEntropyCost()(native(torchbp.data.scale(images)), labels).backward()
    layers = [m for m in native.modules() if isinstance(m, torch.nn.Linear)][:-1]
    expected = [layer.bias.grad.norm().item() for layer in layers]
    assert start.speeds == pytest.approx(expected, **OFF)
    assert course.speeds[0] == pytest.approx(expected, **OFF)
    a = torchbp.data.scale(images)
    z = []
    for layer in model.layers:
        z.append(torch.nn.functional.linear(a, layer.weight, layer.bias))
        z[-1].retain_grad()
        a = z[-1] if layer is model.layers[-1] else torch.tanh(z[-1])
    torchbp.CrossEntropyCost()(a, labels).backward()
    expected = [t.grad.norm().item() for t in z[:-1]]
    assert start.norms == pytest.approx(expected, **OFF)
    assert course.norms[0] == pytest.approx(expected, **OFF)
    W, slopes = model.layers[1].weight, 1 - torch.tanh(z[0]) ** 2
    factor = math.sqrt(5 * (W**2).mean().item() * (slopes**2).mean().item())
    assert start.predicted[0] == pytest.approx(factor, **OFF)


def test_factors_and_slopes_of_geometric_norms():
    start = _start("sigmoid", "scaled", [0.01, 0.1, 1.0], [0.1, 0.1])
    assert start.slope == pytest.approx(math.log(10))
    assert start.factor == pytest.approx(0.1)
    assert start.predicted_factor == pytest.approx(0.1)
    gone = _start("relu", "torch", [0.0, 0.0, 1.0], [0.1, 0.1])
    assert math.isfinite(gone.slope) and gone.slope > 0


@pytest.mark.parametrize(("n", "n_next"), [(700, 400), (400, 700)])
def test_the_prediction_is_of_bp2_s_product(n, n_next):
    """(Wᵀδ) ⊙ σ' of independent weights: it grows with the neurons of layer ℓ."""
    torch.manual_seed(0)
    model = torchbp.MLP([20, n, n_next, 3], "tanh", output="identity", init="normal")
    x, y = torch.rand(30, 20), torch.arange(30) % 3
    trace = experiment.probe(model, torchbp.CrossEntropyCost(), x, y)[:-1]
    (predicted,) = experiment.predictions(trace)
    first, second = experiment.norms(trace, "delta")
    # A norm of n random numbers strays by 1/√2n of itself.
    off = bounds.relative(bounds.deviation(1.0, min(n, n_next)))
    assert first / second == pytest.approx(predicted, **off)


def _start(activation, init, norms, predicted, speeds=None):
    return experiment.InitialState(
        activation, init, len(norms), norms, speeds or norms, predicted, 0.0
    )


def _geometric(activation, init, factor, depth):
    norms = [factor ** (depth - ell) for ell in range(1, depth + 1)]
    return _start(activation, init, norms, [factor] * (depth - 1))


FACTORS = {
    ("sigmoid", "scaled"): 0.2, ("sigmoid", "normal"): 0.6, ("sigmoid", "torch"): 0.1,
    ("tanh", "scaled"): 0.6, ("tanh", "normal"): 1.7, ("tanh", "torch"): 0.6,
    ("relu", "scaled"): 0.7, ("relu", "normal"): 4.0, ("relu", "torch"): 0.4,
}  # fmt: skip


def _found(changes=None):
    """What the experiment would find if every layer had exactly its factor."""
    factors = {**FACTORS, **(changes or {})}
    starts = [
        _geometric(*kind, factor, depth)
        for kind, factor in factors.items()
        for depth in (1, 2, 3)
    ]
    courses = [
        experiment.TrainingCourse(
            s.activation, s.init, s.depth, [s.norms] * 2, [s.speeds] * 2, False
        )
        for s in starts
    ]
    return starts, courses


def test_all_claims_hold_on_what_they_say():
    assert all(experiment.judge(*_found()).values())


@pytest.mark.parametrize(
    ("kind", "factor", "failed"),
    [
        (("sigmoid", "torch"), 1.1, "every initialisation"),
        (("sigmoid", "scaled"), 0.6, "less than half per layer"),
        (("sigmoid", "scaled"), 1.1, "slower its first layer"),
        (("sigmoid", "scaled"), 1.1, "are the smallest"),
        (("tanh", "scaled"), 0.4, "less than half as much"),
        (("relu", "normal"), 0.9, "grows towards the input"),
    ],
)
def test_claims_fail_on_other_factors(kind, factor, failed):
    claims = experiment.judge(*_found({kind: factor}))
    assert any(failed in claim and not holds for claim, holds in claims.items())


def test_the_prediction_and_the_course_can_fail():
    starts, courses = _found()
    (deepest,) = (
        i for i, s in enumerate(starts)
        if (s.activation, s.init, s.depth) == ("tanh", "torch", 3)
    )  # fmt: skip
    for predicted, said in (
        ([0.8, 0.8], ["BP2 predicts the mean factor of a layer, within 10%"]),
        ([0.3, 1.2], ["and the factor of each layer, within 40%"]),
    ):
        wrong = dataclasses.replace(starts[deepest], predicted=predicted)
        claims = experiment.judge(
            [*starts[:deepest], wrong, *starts[deepest + 1 :]], courses
        )
        assert [c for c, holds in claims.items() if not holds] == said
    for quantity in ("norms", "speeds"):
        later = [
            dataclasses.replace(c, **{quantity: [c.norms[0], c.norms[0][::-1]]})
            for c in courses
        ]
        claims = experiment.judge(starts, later)
        assert [c for c, holds in claims.items() if not holds] == [
            "sigmoid, scaled: ‖δ^1‖ and ‖∂C/∂b^1‖ are the smallest in training, too"
        ]


def test_a_training_that_diverges_is_cut_and_said(tmp_path):
    chosen = settings(tmp_path, lr=1e30, epochs=4)
    images, labels = DATA.train.images[:40], DATA.train.labels[:40]
    _, course = experiment.measure(chosen, "relu", "normal", 3, images, labels)
    assert course.diverged and len(course.speeds) < 5
    assert all(math.isfinite(v) for speeds in course.speeds for v in speeds)


def test_the_claims_hold_on_the_digits(tmp_path, monkeypatch, capsys):
    """Real images, the real network, few seeds."""
    monkeypatch.undo()
    options = "--dataset digits --quick --seeds 3 --epochs 1 --logdir".split()
    assert experiment.command_line([*options, str(tmp_path)]) == 0
    assert "verdict: shown (8 of 8 claims)" in capsys.readouterr().out
