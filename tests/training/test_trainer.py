"""Every example once an epoch, the right 1/m, the same bits, and a stop in time."""

from __future__ import annotations

import math

import pytest
import torch

import torchbp
from torchbp.data.sets import Split, Splits, scale
from torchbp.training import (
    SCHEDULES,
    AutogradSGD,
    DivergedError,
    EpochResult,
    Trainer,
    batches,
    evaluate,
)


def split(n: int, seed: int, pixels: int = 6, classes: int = 3) -> Split:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, pixels), generator=generator).to(torch.uint8)
    return Split(images, torch.randint(0, classes, (n,), generator=generator))


DATA = Splits(split(23, 0), split(7, 1), split(11, 2))


def make_trainer(
    seed=0, batch_size=5, lr=0.5, data=DATA, weight_decay=0.0, native=False
):
    torch.manual_seed(seed)
    model = torchbp.MLP([6, 4, 3])
    model = torchbp.to_native(model) if native else model
    cost = torchbp.QuadraticCost()
    engine = AutogradSGD(model, cost, lr, weight_decay)
    return Trainer(model, engine, cost, data, batch_size, seed)


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_a_schedule_sets_the_rate_of_each_epoch():
    trainer = make_trainer()
    trainer.schedule = lambda epoch: 0.5 / (1 + epoch)
    rates = []
    trainer.fit(3, lambda result: rates.append(trainer.engine.lr))
    assert rates == [0.5, 0.5, 0.25, 0.5 / 3]
    # Epoch by epoch the weights of a trainer with that rate.
    other = make_trainer()
    for epoch in range(3):
        other.engine.lr = 0.5 / (1 + epoch)
        other.run_epoch()
    assert torch.equal(weights(trainer), weights(other))


def test_schedules_go_from_all_to_what_they_say():
    assert [SCHEDULES["constant"](x) for x in (0, 0.5, 0.99)] == [1, 1, 1]
    cosine = SCHEDULES["cosine"]
    assert [cosine(0), cosine(0.5), cosine(1)] == pytest.approx([1, 0.5, 0])


def test_images_are_varied_anew_for_each_epoch_and_scored_as_they_are():
    seen = []

    def vary(images, generator):
        assert generator is trainer.generator
        seen.append(torch.randint_like(images, 0, 256))
        return seen[-1]

    trainer = make_trainer(data=Splits(split(20, 0), *DATA[1:]))
    trainer.engine = spy = Spy(trainer.model)
    before = trainer.data.train.images.clone()
    trainer.vary = vary
    trainer.run_epoch()
    trainer.run_epoch()
    assert len(seen) == 2
    assert torch.equal(trainer.data.train.images, before)
    for epoch, images in enumerate(seen):
        rows = torch.cat(spy.inputs[4 * epoch : 4 * epoch + 4])
        expected = scale(images)
        assert torch.equal(rows.sort(0).values, expected.sort(0).values)


def test_without_validation_images_there_is_no_best_epoch():
    empty = Split(*(t[:0] for t in DATA.validation))
    trainer = make_trainer(data=DATA._replace(validation=empty))
    result = trainer.run_epoch()
    assert list(result.scores) == ["train", "test"]
    assert trainer.best is None


class Spy(AutogradSGD):
    """An engine that only looks."""

    lr = 1.0

    def __init__(self, model):
        self.model = model
        self.inputs, self.targets = [], []

    def step(self, input, target):
        self.inputs.append(input)
        self.targets.append(target)
        return torch.tensor(float(len(input)))


@pytest.mark.parametrize("batch_size", [1, 5, 7, 22, 23])
def test_every_example_comes_once_an_epoch(batch_size):
    trainer = make_trainer(batch_size=batch_size)
    spy = trainer.engine = Spy(trainer.model)
    trainer.run_epoch()
    sizes = [len(x) for x in spy.inputs]
    full, rest = divmod(23, batch_size)
    assert sizes == [batch_size] * full + ([rest] if rest else [])
    seen = torch.cat(spy.inputs)
    expected = scale(DATA.train.images)
    assert sorted(seen.tolist()) == sorted(expected.tolist())
    # Each with its own label.
    for x, y in zip(seen, torch.cat(spy.targets), strict=True):
        row = int((expected == x).all(1).nonzero()[0])
        assert y.tolist() == [float(DATA.train.labels[row] == j) for j in range(3)]


def test_the_order_is_new_each_epoch_and_the_seed_s():
    orders = []
    for seed in (0, 0, 1):
        trainer = make_trainer(seed)
        spy = trainer.engine = Spy(trainer.model)
        trainer.run_epoch()
        trainer.run_epoch()
        orders.append(torch.cat(spy.inputs))
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0][:23], orders[0][23:])


def test_the_running_cost_weighs_batches_by_their_size():
    trainer = make_trainer(batch_size=5)
    trainer.engine = Spy(trainer.model)  # costs 5, 5, 5, 5 and 3
    result = trainer.run_epoch()
    assert result.running_cost == pytest.approx((4 * 5 * 5 + 3 * 3) / 23)


def test_a_partial_batch_is_averaged_over_its_own_size():
    """Three of 23 examples remain at batch size 5; their step has 1/3, not 1/5."""
    trainer = make_trainer(batch_size=5)
    by_hand = make_trainer(batch_size=5)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    trainer.run_epoch()
    for rows in order.split(5):
        x = scale(DATA.train.images[rows])
        y = torch.nn.functional.one_hot(DATA.train.labels[rows], 3).float()
        C = 0.5 * (by_hand.model(x) - y).square().sum() / len(rows)
        grads = torch.autograd.grad(C, list(by_hand.model.parameters()))
        with torch.no_grad():
            for p, g in zip(by_hand.model.parameters(), grads, strict=True):
                p -= 0.5 * g
    torch.testing.assert_close(weights(trainer), weights(by_hand))


def test_a_step_is_the_step_of_native_layers():
    ours, native = make_trainer(lr=3.0), make_trainer(lr=3.0, native=True)
    assert torch.equal(weights(ours), weights(native))
    a, b = ours.run_epoch(), native.run_epoch()
    torch.testing.assert_close(weights(ours), weights(native))
    assert a.running_cost == pytest.approx(b.running_cost)


def test_the_rate_may_be_changed_between_steps():
    trainer, other = make_trainer(lr=0.5), make_trainer(lr=0.1)
    trainer.engine.lr = 0.1
    x, y = scale(DATA.train.images[:4]), torch.rand(4, 3)
    for t in (trainer, other):
        t.engine.step(x, y)
    assert trainer.engine.lr == 0.1
    assert torch.equal(weights(trainer), weights(other))
    with pytest.raises(ValueError, match="lr: expected a number >= 0, got -1"):
        trainer.engine.lr = -1.0


def test_weight_decay_is_on_weights_alone():
    trainer = make_trainer(lr=0.5, weight_decay=0.1)
    x, y = scale(DATA.train.images[:4]), torch.rand(4, 3)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.engine.step(x, y)
    for name, p in trainer.model.named_parameters():
        decay = 0.1 if name.endswith("weight") else 0.0
        expected = before[name] - 0.5 * (p.grad + decay * before[name])
        torch.testing.assert_close(p.detach(), expected)


def test_evaluation_changes_nothing():
    trainer, undisturbed = make_trainer(), make_trainer()
    trainer.model.train()
    rng, own = torch.get_rng_state(), trainer.generator.get_state()
    before = weights(trainer)
    trainer.score()
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(trainer.generator.get_state(), own)
    assert torch.equal(weights(trainer), before)
    assert all(p.grad is None for p in trainer.model.parameters())
    assert trainer.model.training
    trainer.run_epoch()
    trainer.score()
    trainer.run_epoch()
    undisturbed.run_epoch()
    undisturbed.run_epoch()
    assert torch.equal(weights(trainer), weights(undisturbed))


def test_evaluate_is_the_mean_over_all_examples(monkeypatch):
    trainer = make_trainer()
    whole = evaluate(trainer.model, trainer.cost, DATA.train)
    monkeypatch.setattr("torchbp.training.scores.EVALUATE_AT_ONCE", 5)  # 23 = 4 · 5 + 3
    parts = evaluate(trainer.model, trainer.cost, DATA.train)
    assert parts.cost == pytest.approx(whole.cost)
    assert parts.accuracy == whole.accuracy
    output = trainer.model(scale(DATA.train.images))
    assert whole.accuracy == (output.argmax(1) == DATA.train.labels).sum().item() / 23
    cost = trainer.cost(output, DATA.train.labels).item()
    assert whole.cost == pytest.approx(cost)


def test_same_seed_same_bits():
    runs = [make_trainer(seed=3) for _ in range(2)]
    for trainer in runs:
        trainer.fit(3)
    assert torch.equal(weights(runs[0]), weights(runs[1]))


def test_a_resumed_run_has_the_bits_of_an_undisturbed_one():
    whole, first, second = make_trainer(), make_trainer(), make_trainer(seed=0)
    whole.fit(5)
    saved = {}
    first.fit(2, save=saved.update)
    second.load_state_dict(saved)
    assert second.epoch == 2
    second.fit(5)
    assert torch.equal(weights(whole), weights(second))
    assert whole.best == second.best


def test_saving_every_two_epochs_and_at_the_end():
    trainer, saved = make_trainer(), []
    trainer.fit(5, save=lambda state: saved.append(state["epoch"]), save_every=2)
    assert saved == [0, 2, 4, 5]


def test_an_interrupt_saves_the_last_complete_epoch():
    """Ctrl-C in the third epoch, with a checkpoint due only every ten."""
    trainer, undisturbed, saved = make_trainer(), make_trainer(), []
    undisturbed.fit(2)
    calls = 0

    def progress(images, cost):
        nonlocal calls
        calls += 1
        if trainer.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.fit(9, on_progress=progress, save=saved.append, save_every=10)
    assert calls == 3
    assert [state["epoch"] for state in saved] == [0, 2]
    kept = torch.cat([t.flatten() for t in saved[1]["model"].values()])
    assert torch.equal(kept, weights(undisturbed))
    assert not torch.equal(kept, weights(trainer))


def test_the_untrained_network_is_epoch_0():
    seen: list[EpochResult] = []
    make_trainer().fit(2, on_epoch=seen.append)
    assert [r.epoch for r in seen] == [0, 1, 2]
    assert seen[0].running_cost is None and seen[1].running_cost is not None


def test_the_best_epoch_is_that_of_the_validation_set():
    trainer, seen = make_trainer(), []
    trainer.fit(6, on_epoch=seen.append)
    results = seen[1:]
    best = max(results, key=lambda r: (r.scores["validation"].accuracy, -r.epoch))
    assert trainer.best == (
        best.epoch,
        best.scores["validation"].accuracy,
        best.scores["test"].accuracy,
    )


@pytest.mark.parametrize(("bad", "word"), [(math.nan, "nan"), (math.inf, "inf")])
def test_a_cost_that_is_not_finite_stops_the_run(bad, word):
    trainer = make_trainer()
    spy = trainer.engine = Spy(trainer.model)
    original = spy.step
    spy.step = lambda x, y: original(x, y) * (bad if len(spy.inputs) == 8 else 1)
    trainer.run_epoch()
    with pytest.raises(
        DivergedError, match=rf"became {word} in epoch 2, step 3, at lr 1"
    ):
        trainer.run_epoch()


def test_batches_keep_dtype_and_range():
    order = torch.arange(23)
    for xs, ys in batches(DATA.train, order, 5, 3, torch.float64):
        for x, y in zip(xs, ys, strict=True):
            assert x.dtype == y.dtype == torch.float64
            assert x.min() >= 0 and x.max() <= 1
            assert torch.equal(y.sum(1), torch.ones(len(y)).double())


@pytest.mark.parametrize("batch_size", [0, 24])
def test_batch_sizes_out_of_range_are_refused(batch_size):
    with pytest.raises(ValueError, match=f"expected 1 to 23.*got {batch_size}"):
        make_trainer(batch_size=batch_size)


def test_data_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"test labels: expected 0\.\.2.*got 0\.\.4"):
        make_trainer(data=DATA._replace(test=split(50, 3, classes=5)))
    with pytest.raises(ValueError, match="expected last dimension 6"):
        make_trainer(data=Splits(*(split(23, i, pixels=7) for i in range(3))))


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_bad_rates_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected a number >= 0"):
        make_trainer(**{name: value})


def test_a_cost_that_takes_z_wants_an_identity_output():
    model = torchbp.MLP([6, 3])
    for m in (model, torchbp.to_native(model)):
        with pytest.raises(ValueError, match="σ would be applied twice"):
            AutogradSGD(m, torchbp.CrossEntropyCost(), 1.0)
    AutogradSGD(torchbp.MLP([6, 3], output="identity"), torchbp.CrossEntropyCost(), 1.0)


def test_an_epoch_whose_last_step_breaks_the_network_is_not_complete():
    trainer, saved = make_trainer(batch_size=23), []

    def break_it(input, target):
        with torch.no_grad():
            trainer.model.layers[0].weight[0, 0] = math.inf
        return torch.tensor(1.0)

    trainer.engine.step = break_it
    with pytest.raises(DivergedError, match=r"not finite after epoch 1: .*layers\.0"):
        trainer.fit(3, save=saved.append)
    assert [state["epoch"] for state in saved] == [0]


def test_an_interrupt_while_an_epoch_is_logged_repeats_the_epoch():
    trainer, saved = make_trainer(), []

    def on_epoch(result):
        if result.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.fit(4, on_epoch, save=saved.append)
    assert saved[-1]["epoch"] == 1


def test_a_failing_cost_leaves_the_mode_as_it_was():
    trainer = make_trainer()
    trainer.model.train()

    def failing(output, target):
        return torchbp.costs.quadratic_cost(output, output[0])

    failing.takes = "a"
    with pytest.raises(ValueError, match="target"):
        evaluate(trainer.model, failing, DATA.train)
    assert trainer.model.training


def test_empty_training_and_test_sets_are_refused():
    with pytest.raises(ValueError, match="test: expected at least one example"):
        make_trainer(data=DATA._replace(test=split(0, 0)))
    with pytest.raises(ValueError, match="train: expected at least one example"):
        make_trainer(data=DATA._replace(train=split(0, 0)))


def test_scoring_leaves_every_module_in_its_mode():
    model = torch.nn.Sequential(torchbp.BPLinear(6, 4), torch.nn.BatchNorm1d(4))
    model.train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    evaluate(model, torchbp.LogLikelihoodCost(), DATA.test)
    assert [module.training for module in model.modules()] == modes


def test_a_network_with_batch_norm_trains():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torchbp.BPLinearSigmoid(6, 4),
        torch.nn.BatchNorm1d(4),
        torchbp.BPLinearSigmoid(4, 3),
    )
    cost = torchbp.QuadraticCost()
    trainer = Trainer(model, AutogradSGD(model, cost, 0.5), cost, DATA, 5)
    remembered = model[1].running_mean.clone()
    trainer.score()
    assert torch.equal(model[1].running_mean, remembered)
    assert math.isfinite(trainer.run_epoch().running_cost)
    assert not torch.equal(model[1].running_mean, remembered)


@pytest.mark.parametrize("make", [AutogradSGD, torchbp.ExplicitSGD])
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_a_rate_that_is_a_tensor_is_refused_by_both_engines(make, name):
    """It could be changed in place, and one engine would not see it."""
    model, cost = torchbp.MLP([4, 3, 2]), torchbp.QuadraticCost()
    rates = {"lr": 1.0, "weight_decay": 0.0, name: torch.tensor(1.0)}
    with pytest.raises(TypeError, match=f"{name}: expected a number, got tensor"):
        make(model, cost, **rates)
    engine = make(model, cost, lr=1.0)

    def step_with_a_tensor():
        engine.lr = torch.tensor(1.0)
        engine.step(torch.rand(5, 4), torch.rand(5, 2))

    with pytest.raises(TypeError, match="lr: expected a number, got tensor"):
        step_with_a_tensor()
