"""The main job, on scikit-learn's digits where nothing but a run is needed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import bounds
import processes
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import torchbp
from experiments import mnist
from experiments.support.settings import COSTS, ENGINES, RECIPES, build
from torchbp import data
from torchbp.explicit import kernel
from torchbp.inspection import page
from torchbp.nn import ACTIVATIONS
from torchbp.training import checkpoint

SCRIPT = Path(mnist.__file__)
SMALL = ["--dataset", "digits", "--sizes", "784", "12", "10", "--epochs", "2"]


engines = pytest.mark.parametrize("engine", ENGINES)


def run(capsys, tmp_path, *options, small=SMALL):
    """Exit status, output, errors of the program in this process."""
    arguments = [*small, "--logdir", str(tmp_path / "runs"), *options]
    status = mnist.command_line(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def settings(tmp_path, **changes):
    small = {"dataset": "digits", "sizes": (784, 12, 10), "epochs": 2}
    return mnist.TrainingSettings(
        **{**small, "logdir": str(tmp_path / "runs"), **changes}
    )


def final_weights(metrics):
    state = checkpoint.load(Path(metrics["run"]) / "checkpoint.pt")
    return torch.cat([t.flatten() for t in state["trainer"]["model"].values()])


def test_a_run_leaves_what_is_needed_to_repeat_it(capsys, tmp_path):
    status, out, err = run(capsys, tmp_path, "--name", "one")
    assert (status, err) == (0, "")
    assert "test accuracy" in out and "tensorboard --logdir" in out
    folder = tmp_path / "runs" / "one"
    names = {p.name.split(".")[0] for p in folder.iterdir()}
    assert names == {"settings", "versions", "checkpoint", "events", "learning"}
    saved = json.loads((folder / "settings.json").read_text())
    assert saved["sizes"] == [784, 12, 10] and saved["dataset"] == "digits"
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["torch"] == torch.__version__
    events = EventAccumulator(str(folder))
    events.Reload()
    # 1,297 images in batches of 10 are 130 mini-batches.
    assert [e.step for e in events.Scalars("accuracy/test")] == [0, 130, 260]


def test_the_trained_network_is_a_page(capsys, tmp_path):
    """Of this session alone: whoever resumes the run asks for it anew."""
    folder = tmp_path / "runs" / "one"
    status, out, err = run(capsys, tmp_path, "--name", "one", "--page")
    assert (status, err) == (0, "")
    assert f"page            {folder / 'page.html'}" in out
    text = (folder / "page.html").read_text(encoding="utf-8")
    assert "MLP [784, 12, 10]" in text
    (folder / "page.html").unlink()
    assert mnist.command_line(["--resume", str(folder)]) == 0
    assert (
        not (folder / "page.html").exists()
        and "page.html" not in capsys.readouterr().out
    )
    assert mnist.command_line(["--resume", str(folder), "--page"]) == 0
    assert (folder / "page.html").read_text(encoding="utf-8") == text


def test_a_network_too_large_for_a_page_is_a_note(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MOST_NUMBERS", 1000)
    status, out, err = run(capsys, tmp_path, "--name", "one", "--page")
    assert status == 0 and "page.html" not in out
    assert err.startswith("NOTE: no page: ") and err.count("\n") == 1


def test_piped_output_is_a_line_per_epoch(capsys, tmp_path):
    _, out, _ = run(capsys, tmp_path)
    lines = [line for line in out.splitlines() if line.startswith("epoch")]
    assert [line.split("/")[0] for line in lines] == ["epoch 0", "epoch 1", "epoch 2"]
    assert "\r" not in out and "\x1b" not in out


def test_json_is_an_object_on_each_line(capsys, tmp_path):
    status, out, err = run(capsys, tmp_path, "--json")
    assert (status, err) == (0, "")
    *epochs, last = map(json.loads, out.splitlines())
    assert [line["epoch"] for line in epochs] == [0, 1, 2]
    assert set(epochs[1]["cost"]) == {"train", "validation", "test"}
    assert epochs[2]["accuracy"]["test"] == last["test_accuracy"]
    assert last["done"] is True and Path(last["run"]).is_dir()


def test_quiet_says_nothing(capsys, tmp_path):
    assert run(capsys, tmp_path, "--quiet") == (0, "", "")
    with pytest.raises(SystemExit, match="2"):
        mnist.parse("", ["--quiet", "--json"])
    assert "not allowed with" in capsys.readouterr().err


def checkpoints_of(run):
    """The names by which people give a run, and the epoch that each goes on from."""
    return {"": 2, "/": 2, "/checkpoint.pt": 2, "/checkpoint.previous.pt": 1}


@pytest.mark.parametrize("name", checkpoints_of(""))
def test_a_run_is_resumed_by_any_of_its_names(capsys, tmp_path, name):
    metrics = mnist.main(settings(tmp_path, output="quiet"))
    capsys.readouterr()
    command = ["--resume", metrics["run"] + name, "--epochs", "3", "--json"]
    assert mnist.command_line(command) == 0
    epochs = [
        json.loads(line)["epoch"] for line in capsys.readouterr().out.split("\n")[:-1]
    ]
    assert epochs[0] == checkpoints_of("")[name] + 1
    assert epochs[-1] == 3
    assert (Path(metrics["run"]) / "checkpoint.pt").is_file()


def test_a_run_is_named_by_its_checkpoint_though_it_is_damaged_or_gone(
    capsys, tmp_path
):
    """The one before it takes its place, as where the folder is named."""
    run = Path(mnist.main(settings(tmp_path, output="quiet"))["run"])
    newest, command = run / "checkpoint.pt", ["--resume", str(run / "checkpoint.pt")]
    newest.write_bytes(newest.read_bytes()[:-100])
    assert mnist.command_line(command) == 0
    assert "continuing from" in capsys.readouterr().err
    newest.unlink()
    assert mnist.command_line(command) == 0
    assert "no such checkpoint; continuing from" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="POSIX links")
def test_a_run_is_named_by_a_link_to_its_checkpoint(capsys, tmp_path):
    run = Path(mnist.main(settings(tmp_path, output="quiet"))["run"])
    (tmp_path / "latest.pt").symlink_to(run / "checkpoint.pt")
    command = ["--resume", str(tmp_path / "latest.pt"), "--epochs", "3", "--json"]
    assert mnist.command_line(command) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["epoch"], last["run"]) == (3, str(run))


def test_nothing_is_written_beside_a_checkpoint_without_a_run(capsys, tmp_path):
    run = Path(mnist.main(settings(tmp_path, output="quiet"))["run"])
    (tmp_path / "alone").mkdir()
    for name in ("checkpoint.pt", "checkpoint.previous.pt", "best.pt"):
        alone = tmp_path / "alone" / name
        alone.write_bytes((run / "checkpoint.pt").read_bytes())
        assert mnist.command_line(["--resume", str(alone)]) == 2
        err = capsys.readouterr().err
        assert err.startswith(
            f"error: {alone}: expected a run's folder or a checkpoint"
        )
        assert err.count("\n") == 1
    assert len(list((tmp_path / "alone").iterdir())) == 3


def test_a_checkpoint_that_is_not_there_is_refused(capsys, tmp_path):
    metrics = mnist.main(settings(tmp_path, output="quiet"))
    capsys.readouterr()
    assert mnist.command_line(["--resume", metrics["run"] + "/nothing.pt"]) == 2
    assert "nothing.pt" in capsys.readouterr().err


def test_a_resumed_run_may_say_it_in_another_way(capsys, tmp_path):
    metrics = mnist.main(settings(tmp_path))
    capsys.readouterr()
    command = ["--resume", metrics["run"], "--epochs", "3", "--json"]
    assert mnist.command_line(command) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["epoch"] for line in lines] == [3, 3]


def test_the_output_format_belongs_to_the_session(capsys, tmp_path):
    metrics = mnist.main(settings(tmp_path, output="quiet"))
    assert mnist.command_line(["--resume", metrics["run"], "--epochs", "3"]) == 0
    assert "epoch 3/3" in capsys.readouterr().out


def test_settings_of_a_session_that_was_cut_short_are_saved(capsys, tmp_path):
    metrics = mnist.main(settings(tmp_path))
    options = {"epochs": 4, "engine": "explicit", "checkpoint_every": 2}
    stop_after(2, lambda: mnist.resume(metrics["run"], **options))
    capsys.readouterr()
    assert mnist.command_line(["--resume", metrics["run"]]) == 0
    assert "epoch 4/4" in capsys.readouterr().out
    saved = json.loads((Path(metrics["run"]) / "settings.json").read_text())
    assert {name: saved[name] for name in options} == options


def test_a_reader_who_leaves_ends_the_run_resumably(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    options = ["--engine", "explicit", "--logdir", str(tmp_path), "--name", "one"]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *SMALL[:-1], "200", "--json", *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    assert json.loads(process.stdout.readline())["epoch"] == 0
    process.stdout.close()
    assert process.wait(timeout=processes.LIMIT) == 141
    assert (
        process.stderr.read()
        == f"\nstopped; to continue: --resume {tmp_path / 'one'}\n"
    )
    process.stderr.close()
    state = checkpoint.load(tmp_path / "one" / "checkpoint.pt")
    assert 0 <= state["trainer"]["epoch"] < 200


def test_what_is_given_beside_a_recipe_wins(capsys, tmp_path):
    best = mnist.parse("", ["--recipe", "best", "--lr", "0.25", "--epochs", "3"])
    assert best == {**RECIPES["best"], "lr": 0.25, "epochs": 3}
    small = [*SMALL, "--recipe", "best", "--name", "one"]
    assert run(capsys, tmp_path, small=small)[0] == 0
    saved = json.loads((tmp_path / "runs" / "one" / "settings.json").read_text())
    assert saved["sizes"] == [784, 12, 10] and saved["dataset"] == "digits"
    for name in ("schedule", "distort", "train_on", "cost", "engine"):
        assert saved[name] == RECIPES["best"][name]


def test_trained_on_all_images_without_a_validation_set(capsys, tmp_path):
    status, out, _ = run(capsys, tmp_path, "--train-on", "all", "--name", "one")
    assert status == 0
    assert out.startswith("digits: 1,547 images")
    assert "validation" not in out and "best epoch" not in out
    events = EventAccumulator(str(tmp_path / "runs" / "one"))
    events.Reload()
    assert "accuracy/test" in events.Tags()["scalars"]
    assert "accuracy/validation" not in events.Tags()["scalars"]


@engines
def test_schedule_and_distortions_resume_to_the_bit(capsys, tmp_path, engine):
    chosen = {"epochs": 3, "engine": engine, "schedule": "cosine", "distort": 1.0}
    whole = mnist.main(settings(tmp_path, name="whole", **chosen))
    part = tmp_path / "runs" / "part"
    stop_after(1, lambda: mnist.main(settings(tmp_path, name="part", **chosen)))
    assert checkpoint.load(part / "checkpoint.pt")["trainer"]["epoch"] == 1
    resumed = mnist.resume(str(part))
    assert torch.equal(final_weights(whole), final_weights(resumed))
    events = EventAccumulator(str(part))
    events.Reload()
    rates = [e.value for e in events.Scalars("learning_rate")][1:]
    assert rates == pytest.approx([3.0, 2.25, 0.75])
    # The schedule goes over the epochs that the run was started with.
    capsys.readouterr()
    assert mnist.command_line(["--resume", str(part), "--epochs", "4"]) == 2
    assert "epochs: expected the 3 of" in capsys.readouterr().err


def stop_after(epochs, train):
    """Ctrl-C in the epoch after that."""
    run_epoch = mnist.Trainer.run_epoch

    def interrupted(trainer, *arguments):
        if trainer.epoch == epochs:
            raise KeyboardInterrupt
        return run_epoch(trainer, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mnist.Trainer, "run_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train()


@engines
@pytest.mark.parametrize("cost", list(COSTS))
@pytest.mark.parametrize("activation", [n for n in ACTIVATIONS if n != "identity"])
def test_every_cost_and_activation_learns(tmp_path, cost, activation, engine):
    lr = {"quadratic": 1.0, "cross-entropy": 0.1, "log-likelihood": 0.1}[cost]
    chosen = {"cost": cost, "activation": activation, "lr": lr, "init": "torch"}
    metrics = mnist.main(settings(tmp_path, epochs=5, engine=engine, **chosen))
    assert metrics["test_accuracy"] > 0.8


def test_bp_and_native_layers_start_and_train_alike(tmp_path):
    runs = [
        mnist.main(settings(tmp_path, layers=layers, lr=0.1, epochs=1))
        for layers in ("bp", "native")
    ]
    torch.testing.assert_close(*map(final_weights, runs))


@engines
def test_same_seed_same_bits_and_another_seed_others(tmp_path, engine):
    a, b, c = (
        final_weights(mnist.main(settings(tmp_path, seed=seed, engine=engine)))
        for seed in (5, 5, 6)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@engines
def test_resume_ends_with_the_bits_of_an_undisturbed_run(tmp_path, engine):
    whole = mnist.main(settings(tmp_path, epochs=4, name="whole", engine=engine))
    part = mnist.main(settings(tmp_path, epochs=2, name="part", engine=engine))
    resumed = mnist.resume(part["run"], epochs=4)
    assert torch.equal(final_weights(whole), final_weights(resumed))
    assert resumed["best"] == whole["best"]
    events = EventAccumulator(part["run"])
    events.Reload()
    assert [e.step for e in events.Scalars("cost/test")] == [0, 130, 260, 390, 520]


@pytest.mark.parametrize(
    ("first", "second"), [("autograd", "explicit"), ("explicit", "autograd")]
)
def test_resume_across_engines(capsys, tmp_path, first, second):
    """The other engine goes on from the weights, the batches and the best so far."""
    options = {"lr": 0.5, "weight_decay": 1e-3}
    whole = mnist.main(settings(tmp_path, epochs=4, name="whole", **options))
    part = mnist.main(settings(tmp_path, name="part", engine=first, **options))
    capsys.readouterr()
    command = ["--resume", part["run"], "--epochs", "4", "--engine", second]
    assert mnist.command_line(command) == 0
    assert second in capsys.readouterr().out.splitlines()[1]
    torch.testing.assert_close(final_weights(part), final_weights(whole))
    saved = json.loads((Path(part["run"]) / "settings.json").read_text())
    assert saved["engine"] == second
    events = EventAccumulator(part["run"])
    events.Reload()
    running = [e.step for e in events.Scalars("cost/running")]
    assert len(running) == 4 * 50 and running == sorted(set(running))
    assert {130, 260, 390, 520} < set(running)


def test_both_engines_leave_the_same_things(tmp_path):
    """Tags, steps and files; and, at a small rate, the same weights."""
    runs = [
        mnist.main(settings(tmp_path, engine=engine, lr=0.1, name=engine))
        for engine in ENGINES
    ]
    torch.testing.assert_close(*map(final_weights, runs))
    seen = []
    for metrics in runs:
        events = EventAccumulator(metrics["run"])
        events.Reload()
        tags = events.Tags()
        steps = {t: [e.step for e in events.Scalars(t)] for t in tags["scalars"]}
        files = {p.name.split(".")[0] for p in Path(metrics["run"]).iterdir()}
        seen.append((steps, sorted(tags["histograms"]), files))
    assert seen[0] == seen[1]


def test_native_layers_have_no_explicit_engine(capsys, tmp_path):
    status, _, err = run(capsys, tmp_path, "--layers", "native", "--engine", "explicit")
    assert status == 2
    assert "engine: expected autograd for native layers, got 'explicit'" in err
    assert not list((tmp_path / "runs").glob("*"))
    native = mnist.main(settings(tmp_path, layers="native", epochs=1))
    assert mnist.command_line(["--resume", native["run"], "--engine", "explicit"]) == 2


def kernel_of(tmp_path, name):
    versions = json.loads((tmp_path / "runs" / name / "versions.json").read_text())
    return versions.get("kernel")


@pytest.fixture
def compiled():
    if kernel.load(build=True) is None:
        pytest.skip(f"needs the compiled loops: {kernel.explain_failure()}")


def test_the_kernel_is_said_recorded_kept_and_changed(capsys, tmp_path, compiled):
    explicit = ["--engine", "explicit", "--kernel", "torch", "--name", "one"]
    _, out, err = run(capsys, tmp_path, *explicit)
    assert "explicit engine, torch calls" in out and err == ""
    assert kernel_of(tmp_path, "one") == "torch"
    resume = ["--resume", str(tmp_path / "runs" / "one")]
    _, out, err = run(capsys, tmp_path, *resume, "--epochs", "3", small=[])
    assert "explicit engine, torch calls" in out and err == ""
    status, out, err = run(
        capsys, tmp_path, *resume, "--epochs", "4", "--kernel", "compiled", small=[]
    )
    assert status == 0 and "explicit engine, compiled loops" in out
    assert err == "NOTE: the run continues with the kernel compiled, after torch\n"
    assert kernel_of(tmp_path, "one") == "compiled"
    _, out, err = run(capsys, tmp_path, *resume, "--epochs", "5", small=[])
    assert "explicit engine, compiled loops" in out and err == ""


def test_a_run_keeps_the_kernel_that_auto_chose(
    capsys, tmp_path, compiled, monkeypatch
):
    run(capsys, tmp_path, "--engine", "explicit", "--name", "one")
    assert kernel_of(tmp_path, "one") == "compiled"
    with monkeypatch.context() as patch:  # another machine, which has no compiler
        patch.setattr(kernel, "load", lambda build: None)
        patch.setattr(kernel, "_failure", "no compiler")
        run(capsys, tmp_path, "--engine", "explicit", "--name", "two")
        assert kernel_of(tmp_path, "two") == "torch"
        one = ["--resume", str(tmp_path / "runs" / "one"), "--epochs", "3"]
        status, out, err = run(capsys, tmp_path, *one, small=[])
    assert status == 0 and "torch calls" in out
    assert "with the kernel torch, after compiled: no compiler" in err
    two = ["--resume", str(tmp_path / "runs" / "two"), "--epochs", "3"]
    _, out, err = run(capsys, tmp_path, *two, small=[])
    assert "explicit engine, torch calls" in out and err == ""


def test_compiled_needs_the_explicit_engine_and_a_compiler(
    capsys, tmp_path, monkeypatch
):
    status, _, err = run(capsys, tmp_path, "--kernel", "compiled")
    assert status == 2
    assert "kernel: expected auto or torch for the autograd engine" in err
    monkeypatch.setattr(kernel, "load", lambda build: None)
    monkeypatch.setattr(kernel, "_failure", "no compiler")
    explicit = ["--engine", "explicit", "--kernel", "compiled"]
    status, _, err = run(capsys, tmp_path, *explicit)
    assert status == 2 and err.endswith("got 'compiled': no compiler\n")
    assert not list((tmp_path / "runs").glob("*"))


def test_resuming_a_complete_run_only_says_its_results(capsys, tmp_path):
    metrics = mnist.main(settings(tmp_path, name="one"))
    capsys.readouterr()
    assert mnist.command_line(["--resume", metrics["run"]]) == 0
    assert f"{metrics['test_accuracy']:.2%}" in capsys.readouterr().out


def test_resume_refuses_settings_that_contradict_naming_each(capsys, tmp_path):
    run(capsys, tmp_path, "--name", "one")
    one = str(tmp_path / "runs" / "one")
    status = mnist.command_line(["--resume", one, "--lr", "0.5", "--seed", "7"])
    assert status == 2
    err = capsys.readouterr().err
    assert "lr is 3.0 in the run and 0.5 now" in err
    assert "seed is 0 in the run and 7 now" in err
    assert mnist.command_line(["--resume", one, "--lr", "3", "--epochs", "3"]) == 0


SAME = [
    "--lr 3", "--lr 3e0", "--weight-decay -0.0", "--sizes 784 12 10", "--dataset auto",
    "--dataset digits", "--threads 1", "--name one", "--logdir {logdir}/../runs",
    "--schedule constant --distort 0 --train-on train", "--cost quadratic --seed 00",
]  # fmt: skip
OTHER = {
    "--batch-size 11 --lr 3": ["batch_size is 10 in the run and 11 now"],
    "--init torch --cost cross-entropy": [
        "init is 'scaled' in the run and 'torch' now",
        "cost is 'quadratic' in the run and 'cross-entropy' now",
    ],
    "--sizes 784 13 10": ["sizes is (784, 12, 10) in the run and (784, 13, 10) now"],
    "--dataset mnist": ["dataset is 'digits' in the run and 'mnist' now"],
    "--threads 2": ["threads is 0 in the run and 2 now"],
    "--name two": ["name is 'one' in the run and 'two' now"],
    "--logdir {logdir}/runs": [
        "logdir is '{logdir}' in the run and '{logdir}/runs' now"
    ],
    "--layers native": ["layers is 'bp' in the run and 'native' now"],
    "--activation tanh": ["activation is 'sigmoid' in the run and 'tanh' now"],
    "--distort 0.5 --weight-decay 1": [
        "distort is 0.0 in the run and 0.5 now",
        "weight_decay is 0.0 in the run and 1.0 now",
    ],
    "--schedule cosine": ["schedule is 'constant' in the run and 'cosine' now"],
    "--train-on all": ["train_on is 'train' in the run and 'all' now"],
    "--epochs 1": ["expected at least the 2 that {logdir}/one has completed, got 1"],
    "--recipe best": [
        "lr is 3.0 in the run and 0.5 now", "batch_size is 10 in the run and",
    ],
}  # fmt: skip


def test_resume_knows_a_setting_in_any_spelling(capsys, tmp_path):
    """What is the same is taken as such, however it is written; what contradicts is
    named, each, and nothing but it."""
    run(capsys, tmp_path, "--name", "one")
    logdir = tmp_path / "runs"
    one, settings_file = str(logdir / "one"), logdir / "one" / "settings.json"
    before = settings_file.read_text()
    for options in SAME:
        arguments = ["--resume", one, *options.format(logdir=logdir).split()]
        assert mnist.command_line([*arguments, "--log-level", "off"]) == 0, options
        assert capsys.readouterr().err == ""
    kept = json.loads(settings_file.read_text())
    assert {**kept, "log_level": "full"} == json.loads(before)
    state = (logdir / "one" / "checkpoint.pt").read_bytes()
    for options, messages in OTHER.items():
        arguments = options.format(logdir=logdir).split()
        assert mnist.command_line(["--resume", one, *arguments]) == 2, options
        err = capsys.readouterr().err
        for message in messages:
            assert message.format(logdir=logdir) in err
        if "recipe" not in options:
            assert err.count(" in the run and ") == len(
                [m for m in messages if "in the run" in m]
            )
        assert err.count("\n") == 1
    assert state == (logdir / "one" / "checkpoint.pt").read_bytes()


def test_a_run_that_was_moved_is_resumed_where_it_is(capsys, tmp_path):
    run(capsys, tmp_path, "--name", "one")
    (tmp_path / "runs" / "one").rename(tmp_path / "moved")
    moved = ["--resume", str(tmp_path / "moved"), "--epochs", "3"]
    assert mnist.command_line([*moved, "--name", "one"]) == 2
    assert "name is 'moved' in the run and 'one' now" in capsys.readouterr().err
    assert mnist.command_line([*moved, "--name", "moved"]) == 0
    assert not list((tmp_path / "runs").iterdir())


def test_resume_from_python_takes_lists_and_names_unknown_settings(tmp_path):
    metrics = mnist.main(settings(tmp_path, name="one"))
    assert mnist.resume(metrics["run"], sizes=[784, 12, 10])["epoch"] == 2
    with pytest.raises(TypeError, match="nonsense"):
        mnist.resume(metrics["run"], nonsense=3)


def spoil_settings(state):
    state["settings"]["lr"] = "high"


def spoil_epoch(state):
    state["trainer"]["epoch"] = -1


def spoil_rate(state):
    state["trainer"]["engine"]["lr"] = -1.0


def spoil_shape(state):
    state["trainer"]["model"]["layers.0.weight"] = torch.ones(12, 783)


def spoil_trainer(state):
    state["trainer"] = [1, 2]


def spoil_keys(state):
    del state["trainer"]["model"]["layers.1.bias"]


@pytest.mark.parametrize(
    "spoil",
    [spoil_settings, spoil_epoch, spoil_rate, spoil_shape, spoil_trainer, spoil_keys],
)
def test_a_whole_checkpoint_with_a_state_that_does_not_fit(capsys, tmp_path, spoil):
    """One line, status 2, the file as it was; and where there is one, on from the one
    before."""
    run(capsys, tmp_path, "--name", "one")
    one = tmp_path / "runs" / "one"
    state = checkpoint.load(one / "checkpoint.pt")
    spoil(state)
    checkpoint.save(one / "checkpoint.pt", state)
    spoilt = (one / "checkpoint.pt").read_bytes()
    command = ["--resume", str(one), "--epochs", "3"]
    before = (one / "checkpoint.previous.pt").read_bytes()
    (one / "checkpoint.previous.pt").unlink()
    assert mnist.command_line(command) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {one / 'checkpoint.pt'}: expected a run of this")
    assert err.count("\n") == 1
    assert (one / "checkpoint.pt").read_bytes() == spoilt
    (one / "checkpoint.previous.pt").write_bytes(before)
    assert mnist.command_line(command) == 0
    assert "continuing from" in capsys.readouterr().err
    assert (one / "checkpoint.damaged.pt").read_bytes() == spoilt


def test_resuming_another_programs_checkpoint(capsys, tmp_path):
    checkpoint.save(tmp_path / "checkpoint.pt", {"epoch": 3})
    assert mnist.command_line(["--resume", str(tmp_path)]) == 2
    assert "expected a run of this program" in capsys.readouterr().err


BAD = {
    "--sizes 784": "expected at least two positive integers, got (784,)",
    "--sizes 784 0 10": "expected at least two positive integers",
    "--sizes 784 30 9": "expected 784 first (28 x 28 pixels) and 10 last",
    "--sizes 784 x": "invalid int value: 'x'",
    "--activation softsign": "invalid choice: 'softsign'",
    "--lr -1": "lr: expected a number from 0 to 3.4e+38, got -1.0",
    "--lr nan": "lr: expected a number from 0 to 3.4e+38, got nan",
    "--lr 1e300": "lr: expected a number from 0 to 3.4e+38, got 1e+300",
    "--sizes 784 10000000000 10": "expected a network that fits into",
    "--weight-decay -1": "weight_decay: expected a number from 0",
    "--batch-size 0": "batch_size: expected at least 1, got 0",
    "--batch-size 1298": "batch_size: expected 1 to 1297",
    "--epochs 0": "epochs: expected at least 1, got 0",
    "--checkpoint-every 0": "checkpoint_every: expected at least 1",
    "--threads -1": "threads: expected 0 (automatic) to 1024, got -1",
    "--seed -1": "seed: expected 0 to 2^63 - 1, got -1",
    "--target-accuracy 95": "target_accuracy: expected 0 to 1, got 95",
    "--name a/b": "expected a plain folder name, got 'a/b'",
    "--logdir {file}": "logdir: ",
    "--resume {file}": "expected a run's folder or a checkpoint in one",
    "--dataset mnist --data {file}": "root: expected a folder",
    "--distort -1": "distort: expected 0 (none) to 4, got -1",
    "--distort nan": "distort: expected 0 (none) to 4, got nan",
    "--schedule linear": "invalid choice: 'linear'",
    "--recipe worst": "invalid choice: 'worst'",
    "--nonsense 3": "unrecognized arguments: --nonsense 3",
}


@pytest.mark.parametrize("options", list(BAD))
def test_bad_input_is_one_line_and_status_2(capsys, tmp_path, options):
    file = tmp_path / "file"
    file.write_text("")
    arguments = options.format(file=file).split()
    try:
        status, _, err = run(capsys, tmp_path, *arguments)
    except SystemExit as stop:  # argparse's own
        status, err = stop.code, capsys.readouterr().err
    assert status == 2
    assert BAD[options] in err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert not list((tmp_path / "runs").glob("*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_a_device_that_is_not_there(capsys, tmp_path):
    status, _, err = run(capsys, tmp_path, "--device", "cuda")
    assert status == 2
    assert "device: expected one of cpu" in err and "'cuda'" in err


@engines
def test_a_cost_that_diverges_stops_the_run(capsys, tmp_path, engine):
    options = ("--activation", "relu", "--cost", "log-likelihood", "--lr", "1e30")
    options = (*options, "--engine", engine)
    status, _, err = run(capsys, tmp_path, *options, "--name", "one")
    assert status == 1
    assert "the cost became nan in epoch 1, step " in err or "became inf" in err
    assert "at lr 1e+30" in err
    state = checkpoint.load(tmp_path / "runs" / "one" / "checkpoint.pt")
    assert state["trainer"]["epoch"] == 0


def test_a_missed_target_accuracy_is_status_1(capsys, tmp_path):
    status, _, err = run(capsys, tmp_path, "--target-accuracy", "1")
    assert status == 1
    assert "expected at least 100.00%" in err
    assert run(capsys, tmp_path, "--target-accuracy", "0.5")[0] == 0


def test_without_mnist_auto_takes_the_digits_and_says_so(capsys, tmp_path, monkeypatch):
    def unreachable(name, root=None, download=True):
        if name == "mnist":
            raise data.DataError("no network")
        return load(name, root, download)

    load = data.load
    monkeypatch.setattr(data, "load", unreachable)
    monkeypatch.setenv("TORCHBP_DATA", str(tmp_path))
    status, out, err = run(capsys, tmp_path, "--name", "one", "--dataset", "auto")
    assert status == 0
    assert "NOT comparable" in err and "no network" in err
    assert out.startswith("digits: 1,297 images")
    saved = json.loads((tmp_path / "runs" / "one" / "settings.json").read_text())
    assert saved["dataset"] == "digits"


def test_damaged_mnist_is_not_passed_over(capsys, tmp_path, monkeypatch):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"cut off")

    def damaged(name, root=None, download=True):
        raise data.DataError("train-images-idx3-ubyte.gz is damaged")

    monkeypatch.setattr(data, "load", damaged)
    options = ("--dataset", "auto", "--data", str(tmp_path))
    status, _, err = run(capsys, tmp_path, *options)
    assert status == 2 and "is damaged" in err


def test_a_torchvision_that_does_not_fit(tmp_path):
    """The import fails as it does beside a CPU-only torch; digits work all the same."""
    broken = tmp_path / "torchvision"
    broken.mkdir()
    (broken / "__init__.py").write_text(
        'raise RuntimeError("operator torchvision::nms does not exist")'
    )
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{SCRIPT.parents[1]}",
    }

    def start(*options):
        command = [sys.executable, str(SCRIPT), "--epochs", "1", "--logdir"]
        return subprocess.run(
            [*command, str(tmp_path / "runs"), *options],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    failed = start("--dataset", "mnist")
    assert failed.returncode == 2
    assert "torchvision::nms does not exist" in failed.stderr
    assert "pip install --upgrade torch torchvision" in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert start("--dataset", "digits").returncode == 0


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@engines
def test_ctrl_c_ends_cleanly_and_can_be_resumed(tmp_path, engine):
    options = ["--dataset", "digits", "--epochs", "5000", "--checkpoint-every", "4000"]
    command = [sys.executable, str(SCRIPT), *options, "--engine", engine]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    process = subprocess.Popen(
        [*command, "--logdir", str(tmp_path), "--name", "one"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch    3/"):
            break
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=processes.LIMIT)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert f"--resume {tmp_path / 'one'}" in err
    state = checkpoint.load(tmp_path / "one" / "checkpoint.pt")
    epoch = state["trainer"]["epoch"]
    assert epoch >= 3
    # An interrupt between an epoch's log and its state repeats the epoch: the log may
    # be one ahead, and the resumed run replaces that point.
    assert epochs_of(tmp_path / "one")[-1] in (epoch, epoch + 1)
    resumed = mnist.resume(str(tmp_path / "one"), epochs=epoch + 1)
    assert resumed["epoch"] == epoch + 1
    assert epochs_of(tmp_path / "one") == list(range(epoch + 2))


def epochs_of(folder):
    """The epochs at whose ends the curves have points: of 130 mini-batches each."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return [e.step / 130 for e in events.Scalars("cost/test")]


def test_threads_are_given_back(tmp_path):
    torch.set_num_threads(2)
    mnist.main(settings(tmp_path, threads=1, epochs=1))
    assert torch.get_num_threads() == 2


def test_bp_and_native_gradients_agree_on_real_batches(mnist_root):
    """To float32 rounding, on the first batches of MNIST, at the start and trained."""
    train = data.load("mnist", mnist_root, download=False).train
    chosen = mnist.TrainingSettings()
    ours = build(chosen)
    cost = torchbp.QuadraticCost()
    optimizer = torch.optim.SGD(ours.parameters(), lr=3.0)
    native = torchbp.to_native(ours)
    off = bounds.network(torch.float32, longest=784, layers=2)
    for i in range(100):
        x = data.scale(train.images[10 * i : 10 * i + 10])
        y = train.labels[10 * i : 10 * i + 10]
        names = [name for name, _ in ours.named_parameters()]
        grads = [
            torch.autograd.grad(cost(model(x), y), list(model.parameters()))
            for model in (ours, native)
        ]
        for name, a, b in zip(names, *grads, strict=True):
            error = (a - b).norm() / b.norm()
            assert error < off, f"batch {i}, {name}: relative error {error:.1e}"
        for p, g in zip(ours.parameters(), grads[0], strict=True):
            p.grad = g
        optimizer.step()


@engines
def test_mnist_in_full_for_one_epoch(mnist_root, tmp_path, capsys, engine):
    options = ["--dataset", "mnist", "--data", str(mnist_root), "--epochs", "1"]
    options += ["--engine", engine]
    status, out, _ = run(capsys, tmp_path, "--target-accuracy", "0.92", small=options)
    assert status == 0, out
    assert "of all 10,000 images" in out
