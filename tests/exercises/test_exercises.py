"""Every solution, every usual mistake and every accident of a learner, submitted."""

from __future__ import annotations

import ast
import os
import signal
import sys
from pathlib import Path

import bounds
import processes
import pytest
import torch
from torch.testing import assert_close

import torchbp
from torchbp import data
from torchbp.__main__ import main
from torchbp.exercises import command, probes
from torchbp.exercises.grading import WIDTH
from torchbp.exercises.material import exercises

EXERCISES = {exercise.name: exercise for exercise in exercises()}
MISTAKES = [
    pytest.param(e.name, text, code, id=f"{e.name}-{number}")
    for e in exercises()
    for number, (text, code) in enumerate(e.mistakes, start=1)
]


@pytest.fixture
def run(capsys):
    """What runs `python -m torchbp exercises`, and returns its status and output."""

    def run(*arguments):
        status = main(["exercises", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        if status == 2:
            assert out == "" and err.startswith("error: ") and err.count("\n") == 1
            return status, err
        assert err == ""
        return status, out

    return run


@pytest.fixture
def submit(run, tmp_path):
    """What grades code as an exercise's file, and returns the status and output."""

    def submit(name, code):
        code = code if isinstance(code, bytes) else code.encode()
        (tmp_path / EXERCISES[name].file).write_bytes(code)
        return run("check", name, "--folder", tmp_path)

    return submit


def one_line(text):
    return " ".join(text.split())


# ------------------------------------------------------------ what each file is


def test_there_are_nine_in_the_order_of_the_derivation():
    names = "sigma_prime bp1 bp2 bp3 bp4 layer double_backward own_sigma network"
    assert list(EXERCISES) == names.split()
    assert [exercise.number for exercise in exercises()] == list(range(1, 10))


@pytest.mark.parametrize("name", EXERCISES)
def test_a_file_is_small_and_states_its_task(name):
    exercise = EXERCISES[name]
    for code in (exercise.template, exercise.solution):
        tree = ast.parse(code)
        assert len((ast.get_docstring(tree) or "").splitlines()) >= 3
        assert max(map(len, code.splitlines())) <= 92
    assert 10 <= exercise.template.count("\n") <= 30
    assert "..." in exercise.template and "..." not in exercise.solution
    assert len(exercise.hints) >= 2
    assert len({text for text, _ in exercise.mistakes}) >= 5
    named = {result for case in exercise.cases for result in case.results}
    assert named == set(exercise.equations)


@pytest.mark.parametrize("name", EXERCISES)
def test_a_template_without_work_is_open(submit, name):
    status, out = submit(name, EXERCISES[name].template)
    assert status == 1
    lines = out.splitlines()
    assert lines[0].split() == [str(EXERCISES[name].number), name, "open"]
    assert lines[2].startswith(f"{EXERCISES[name].file}, line ")
    assert lines[3:] == [
        "not yet written",
        "",
        f"python -m torchbp exercises hint {name}",
    ]


@pytest.mark.parametrize("name", EXERCISES)
def test_a_solution_is_right(submit, name):
    status, out = submit(name, EXERCISES[name].solution)
    assert (status, out.split()[:3]) == (
        0,
        [str(EXERCISES[name].number), name, "right"],
    )


@pytest.mark.parametrize(("name", "text", "code"), MISTAKES)
def test_a_usual_mistake_is_named(submit, name, text, code):
    status, out = submit(name, code)
    assert status == 1
    *_, remark, advice = out.strip().split("\n\n")
    assert one_line(remark) == one_line(text)
    assert advice == f"python -m torchbp exercises hint {name}"
    assert max(map(len, out.splitlines())) <= WIDTH + 20


def test_the_example_of_the_transpose(submit):
    code = EXERCISES["bp2"].template.replace(
        "return ...", "return torch.matmul(delta, W.transpose(0, 1)) * (a - a * a)"
    )
    _, out = submit("bp2", code)
    assert out == (
        "3  bp2              wrong\n\n"
        "error_back(delta, W, a) for\n"
        "  delta      = [[1, 2]]\n"
        "  W          = [[1, 3], [2, -1]]\n"
        "  a          = [[0.5, 0.2]]\n"
        "your error   = [[1.75, 0]]\n"
        "right error  = [[1.25, 0.16]]\n\n"
        "BP2: δ^ℓ = ((W^{ℓ+1})ᵀ δ^{ℓ+1}) ⊙ σ'(z^ℓ).\n\n"
        "BP2: W where Wᵀ is needed; a square layer hides that, since the shapes fit. "
        "In\nrows, (Wᵀ δ)ᵀ = δᵀ W.\n\n"
        "python -m torchbp exercises hint bp2\n"
    )


# ----------------------------------------------------- what is right, is right


def names_of(exercise):
    names: dict = {}
    exec(EXERCISES[exercise].solution, names)
    return names


def test_the_solutions_are_the_derivatives():
    """Exercises 1 to 5 beside what the package's own layers have computed, and 9 beside
    its whole algorithm; those are held to native autograd by `compare`."""
    torch.manual_seed(0)
    model = torchbp.MLP([3, 4, 2], dtype=torch.float64)
    x, y = torch.rand(5, 3).double(), torch.rand(5, 2).double()
    cost = torchbp.QuadraticCost()
    assert torchbp.compare(model, cost, x, y).ok
    with torchbp.observe(model) as trace:
        cost(model(x), y).backward()
    below, last = trace
    slope = names_of("sigma_prime")["sigma_prime"](last.a)
    bp1, bp2 = names_of("bp1"), names_of("bp2")
    near = bounds.near(longest=5)
    assert_close(slope, last.sigma_prime, **near)
    assert_close(bp1["nabla_C"](last.a, y), last.grad_a, **near)
    assert_close(bp1["output_error"](last.a, y), last.delta, **near)
    error = bp2["error_back"](last.delta, last.weight, below.a)
    assert_close(error, below.delta, **near)
    for record in trace:
        grad_b = names_of("bp3")["gradient_b"](record.delta)
        assert_close(grad_b, record.grad_bias, **near)
        grad_W = names_of("bp4")["gradient_W"](record.delta, record.x)
        assert_close(grad_W, record.grad_weight, **near)
    _, gradients = torchbp.backprop(model, cost, x, y)
    ours = names_of("network")["backprop"](*model.parameters(), x, y)
    for mine, theirs in zip(ours, gradients.values(), strict=True):
        assert_close(mine, theirs, **near)


# --------------------------------------------------------- a learner's accidents

DEF = "def error_back(delta, W, a):\n    "
LINE_2 = "3_bp2.py, line 2: "
ACCIDENTS = {
    "syntax": (f"{DEF}return (delta", f"{LINE_2}return (delta", "SyntaxError: "),
    "name": (f"{DEF}return dleta", f"{LINE_2}return dleta", "NameError: name 'dleta'"),
    "exit": (f"{DEF}exit(0)", f"{LINE_2}exit(0)", "SystemExit: the program would end"),
    "exit above": ("import sys; sys.exit()", "3_bp2.py, line 1: ", "SystemExit: "),
    "recursion": (
        f"{DEF}return error_back(delta, W, a)",
        f"{LINE_2}return error_back(delta, W, a)",
        "RecursionError: ",
    ),
    "misspelt": ("def error_bakc(a): ...", "3_bp2.py\n", "got error_bakc"),
    "empty": ("", "3_bp2.py\n", "definition of error_back, got nothing"),
    "arity": (
        "def error_back(delta, W):\n    return delta @ W",
        "3_bp2.py, line 1: def error_back(delta, W):",
        "expected error_back(delta, W, a), got error_back(delta, W)",
    ),
    "no function": ("error_back = 3", "3_bp2.py\n", "expected a function, got 3"),
    "no return": (
        f"{DEF}delta @ W * a * (1 - a)",
        f"line 1: {DEF.strip()}",
        "got None: is its return missing?",
    ),
    "a list": (f"{DEF}return [[0.24]]", "line 1: ", "got list [[0.24]]"),
    "an array": (f"{DEF}return (delta @ W).numpy()", "line 1: ", "got ndarray [[1.5]]"),
    "a pair": (f"{DEF}return a, W", "line 1: ", "expected tensors error, got tuple"),
    "shapes": (f"{DEF}return delta @ W[:, [0, 0]].T", LINE_2, "RuntimeError: mat1 and"),
    "raised": (f"{DEF}raise Exception('one\\ntwo')", LINE_2, "Exception: one\n"),
    "no message": (f"{DEF}raise KeyError", LINE_2, "\nKeyError\n"),
    "Ctrl-C's kin": (f"{DEF}raise GeneratorExit", LINE_2, "\nGeneratorExit\n"),
    "null": (b"\0", "3_bp2.py", "source code string cannot contain null bytes"),
    "no text": (b"\xff = 1", "3_bp2.py", "SyntaxError: "),
    "deep": ("(" * 5000, "3_bp2.py", "too many nested parentheses"),
    "dtype": (
        f"{DEF}return (delta @ W * a * (1 - a)).double()",
        "right error  = [[0.24]]",
        "Its dtype is torch.float64, expected torch.float32.",
    ),
    "complex": (f"{DEF}return delta * 1j", "error   = [[0.5j]]", "torch.complex64"),
    "an integer": (f"{DEF}return delta.long()", "your error   = [[0]]", "torch.int64"),
    "a shape": (
        f"{DEF}return delta[0]",
        "your error   = [0.5]",
        "Its shape is [1], expected [1, 1].",
    ),
    "infinite": (f"{DEF}return delta / 0", "your error   = [[inf]]", "BP2: δ^ℓ = "),
    "a sign": (f"{DEF}return -delta @ W * a * (1 - a)", "[[-0.24]]", "-1 times the"),
    "off by n": (
        f"{DEF}return delta @ W * a * (1 - a) * len(a)",
        "  delta      = [[1, 2], [3, -1], [0.5, 0]]",
        "It is n = 3 times the right one.",
    ),
    "a class": ("class error_back: pass", "line 1: class error_back", "got error_back"),
}  # fmt: skip


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_an_accident_is_told_with_its_line(submit, accident):
    code, place, what = ACCIDENTS[accident]
    status, out = submit("bp2", code)
    assert status == 1 and out.startswith("3  bp2              wrong\n")
    assert place in out and what in out


def test_what_a_learner_prints_is_seen(submit):
    code = EXERCISES["bp3"].solution.replace(
        "    return", "    print('δ', delta)\n    return"
    )
    status, out = submit("bp3", code)
    assert status == 0 and out.startswith("δ tensor([[1.],\n")
    assert out.count("δ tensor") == len(EXERCISES["bp3"].cases)
    code = EXERCISES["layer"].solution.replace(
        "        delta", "        print('!')\n        delta"
    )
    assert submit("layer", code)[1].count("!") == 3  # not those of examine


def test_a_file_has_only_the_learner_s_function(submit):
    """Neither the template's other text nor the names of arguments matter, and what
    else is in the file does no harm."""
    code = (
        "from __future__ import annotations\nimport dataclasses\n"
        "@dataclasses.dataclass\nclass Extra:\n    x: 'int' = 0\n"
        "gradient_b = lambda d: d.sum(dim=0)\n"
    )
    assert submit("bp3", code)[0] == 0


def test_half_of_a_file_is_half_right(submit):
    template, solution = EXERCISES["bp1"].template, EXERCISES["bp1"].solution
    head, _, tail = solution.rpartition("def output_error")
    code = head + template[template.rindex("def output_error") :]
    status, out = submit("bp1", code)
    assert status == 1 and "nabla_C is right\n\n2_bp1.py, line " in out
    assert "def output_error(a, y):\nnot yet written" in out and tail


def test_a_sigma_of_the_learner_s_own(submit):
    code = EXERCISES["own_sigma"].solution
    sine = code.replace("z / (1 + torch.exp(-z))", "torch.sin(z)")
    cosine = sine.replace("s + z * s * (1 - s)", "torch.cos(z)")
    assert submit("own_sigma", cosine)[0] == 0
    status, out = submit("own_sigma", sine)
    assert status == 1 and "right slope  = [[0.8776]]" in out
    assert "σ'(z) is how fast σ(z) changes with z." in out
    # Right at the points of the numbers, wrong between: this is for compare to find.
    kinked = cosine.replace(
        "torch.cos(z)", "torch.cos(z) + torch.sin(torch.pi * 4 * z) * (z.abs() < 3)"
    )
    status, out = submit("own_sigma", kinked)
    assert status == 1 and "BP2, layer 1: σ'(z^1) is wrong" in out


@pytest.mark.parametrize("slot", ["sigma_prime", "saves"])
def test_each_gap_of_the_layer_with_an_own_sigma(submit, slot):
    code = EXERCISES["own_sigma"].template
    code = (
        code.replace("saves=...", 'saves="z"')
        if slot == "sigma_prime"
        else code.replace("return ...", "return z")
    )
    status, out = submit("own_sigma", code)
    assert status == 1 and "open" in out and "not yet written" in out


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        ("delta2.T @ a1", "(delta2.T @ a1).T", "It is transposed."),
        ("p - lr * gradient", "p * 1.0", "p ← p - η ∂C/∂p."),
        ("a1 * (1 - a1)", "a1 * (1 - a1) * 1.5", "δ^2 is right."),
    ],
)  # fmt: skip
def test_unknown_mistakes_of_the_network(submit, before, after, text):
    code = EXERCISES["network"].solution.replace(before, after)
    status, out = submit("network", code)
    assert status == 1 and text in out


def test_a_network_that_does_not_learn(submit, monkeypatch):
    pytest.importorskip("sklearn", reason="needs scikit-learn, which has the digits")
    monkeypatch.setattr(probes, "EPOCHS", 2)
    code = EXERCISES["network"].solution.replace(
        "    return delta1", "    x = x if len(x) < 9 else 0 * x\n    return delta1"
    )
    code = code.replace("delta2 = (", "delta2 = (len(x) < 9) * (")
    status, out = submit("network", code)
    assert status == 1 and "it does not learn: " in out and "expected 90%" in out


def test_without_the_digits_the_numbers_are_graded(submit, monkeypatch):
    def fail(name):
        raise data.DataError("no digits")

    monkeypatch.setattr(data, "load", fail)
    status, out = submit("network", EXERCISES["network"].solution)
    assert status == 0 and "the gradients are right; no training: no digits" in out


# ------------------------------------------------------------------ the commands


def test_from_start_to_the_end(run, tmp_path):
    folder = tmp_path / "new" / "ex"
    _, out = run("--folder", tmp_path)
    assert out.endswith("exercises start FOLDER   (--help has the rest)\n")
    status, out = run("start", folder)
    assert (
        status == 0 and f"9 exercises written to {folder}" in out and "left" not in out
    )
    files = sorted(path.name for path in folder.iterdir())
    assert files == [exercise.file for exercise in exercises()]
    assert run("check", "--folder", folder)[0] == 1
    for exercise in exercises():
        (folder / exercise.file).write_text(exercise.solution, encoding="utf-8")
        status, out = run("check", exercise.number, "--folder", folder)
        assert status == 0
        _, out = run("--folder", folder)
        assert out.count(" done\n") == exercise.number
        assert out.count(" open\n") == 9 - exercise.number
    status, out = run("check", "--folder", folder)
    assert status == 0 and out.count(" right\n") == 9 and "All are right." in out
    # A file that was changed is not done any more.
    with (folder / "3_bp2.py").open("a", encoding="utf-8") as file:
        file.write("\n")
    assert run("--folder", folder)[1].count(" done\n") == 8
    written = {path.name for path in folder.iterdir()} - set(files)
    assert written == {command.LOG}  # and no __pycache__


def test_check_stops_at_the_first_that_is_not_right(run, tmp_path):
    run("start", tmp_path)
    for name in ("sigma_prime", "bp1", "bp3"):
        path = tmp_path / EXERCISES[name].file
        path.write_text(EXERCISES[name].solution, encoding="utf-8")
    status, out = run("check", "--folder", tmp_path)
    assert status == 1 and "bp3" not in out
    assert [line.split()[2] for line in out.splitlines()[:3]] == [
        "right",
        "right",
        "open",
    ]


def test_start_overwrites_nothing(run, tmp_path):
    own = {
        "2_bp1.py": "own",
        "7_bp2.py": "of another version",
        "bp3.py": "own",
        "a": "b",
    }
    for name, text in own.items():
        (tmp_path / name).write_text(text)
    links = os.name != "nt"
    if links:
        (tmp_path / "5_bp4.py").symlink_to(tmp_path / "nowhere")
    status, out = run("start", tmp_path)
    assert status == 0 and f"{5 if links else 6} exercises written" in out
    left = "not changed: 2_bp1.py, 7_bp2.py, bp3.py"
    assert (left + ", 5_bp4.py" if links else left) in out
    assert {name: (tmp_path / name).read_text() for name in own} == own
    assert not (tmp_path / "3_bp2.py").exists() and not (tmp_path / "nowhere").exists()
    _, again = run("start", tmp_path)
    assert "0 exercises written" in again


def test_a_file_of_another_version_is_graded(run, tmp_path):
    path = tmp_path / "12_bp3.py"
    path.write_text("def gradient_b(errors):\n    return errors.sum(0)\n")
    for name in ("bp3", "4", "4_bp3", "12_bp3.py", "bp3.py"):
        assert run("check", name, "--folder", tmp_path)[0] == 0
    assert run("check", path)[0] == 0
    assert run("check", Path(os.path.relpath(path)))[0] == 0


def test_one_hint_more_each_time(run, tmp_path):
    hints = EXERCISES["bp2"].hints
    for shown in range(1, len(hints) + 1):
        status, out = run("hint", "bp2", "--folder", tmp_path)
        assert status == 0
        expected = " ".join(f"{i + 1}. {hint}" for i, hint in enumerate(hints[:shown]))
        assert one_line(out) == one_line(expected)
    for _ in range(2):
        _, out = run("hint", "bp2", "--folder", tmp_path)
        assert out.endswith("exercises solution bp2\n") and hints[-1].split()[0] in out
    assert one_line(run("hint", "bp3", "--folder", tmp_path)[1]).startswith("1. ")


def test_a_damaged_log_is_no_obstacle(run, submit, tmp_path):
    (tmp_path / command.LOG).write_bytes(b"\xff\xfe done\nhint\ndone\n")
    assert submit("bp3", EXERCISES["bp3"].solution)[0] == 0
    assert run("--folder", tmp_path)[1].count(" done\n") == 1


@pytest.mark.parametrize("name", EXERCISES)
def test_the_solution_is_shown_when_it_is_asked_for(run, submit, name):
    status, out = run("solution", name)
    assert (status, out) == (0, EXERCISES[name].solution)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["check", "bp5"], "NAME: expected one of sigma_prime, bp1, "),
        (["hint", ""], "NAME: expected one of"),
        (["solution", "10"], "NAME: expected one of"),
        (["check", "bp1"], "expected 2_bp1.py"),
        (["check"], "expected 1_sigma_prime.py"),
        (["check", "--folder", "nowhere"], "nowhere: expected 1_sigma_prime.py"),
        (["hint", "bp1", "--folder", "nowhere"], "nowhere"),
        (["start", "file"], "file"),
        (["start", "file/below"], "file"),
        (["check", "1", "--folder", "folder"], "1_sigma_prime.py"),
    ],
)  # fmt: skip
def test_what_cannot_be_done(run, tmp_path, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder", "1_sigma_prime.py").mkdir(parents=True)
    status, err = run(*arguments)
    assert status == 2 and text in err


@pytest.mark.parametrize("arguments", [["x"], ["start"], ["hint"], ["check", "1", "2"]])
def test_usage_errors(capsys, arguments):
    assert main(["exercises", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_a_folder_that_cannot_be_written_to_is_graded(submit, monkeypatch):
    def fail(folder, line):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(command, "_write_log", fail)
    assert submit("bp3", EXERCISES["bp3"].solution)[0] == 0


PROGRAM = (sys.executable, "-u", "-m", "torchbp", "exercises", "check")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_output_in_another_encoding(tmp_path, encoding):
    (tmp_path / "3_bp2.py").write_text(
        EXERCISES["bp2"].mistakes[0][1], encoding="utf-8"
    )
    result = processes.run(
        *PROGRAM, "bp2", cwd=tmp_path, env={"PYTHONIOENCODING": encoding}
    )
    assert (result.returncode, result.stderr) == (1, "")
    assert "BP2: W where W? is needed; a square layer" in result.stdout


def test_watching_a_file(tmp_path):
    exercise = EXERCISES["bp3"]

    def save(code):  # as an editor does
        (tmp_path / "new").write_text(code, encoding="utf-8")
        (tmp_path / "new").replace(tmp_path / exercise.file)

    save(exercise.mistakes[0][1])
    process = processes.start(*PROGRAM, "bp3", "--watch", cwd=tmp_path)
    processes.read_until(process, "wrong")
    processes.read_until(process, "waiting for a save")
    save(exercise.solution)
    processes.read_until(process, "right")
    processes.read_until(process, "waiting for a save")
    save(exercise.template)
    processes.read_until(process, "open")
    processes.read_until(process, "waiting for a save")
    process.send_signal(signal.SIGINT)
    out, err = processes.finish(process)
    assert (process.returncode, out, err) == (1, "\n", "")


@pytest.mark.parametrize(
    ("name", "watch"), [("bp3", ["--watch"]), ("layer", []), ("own_sigma", [])]
)
def test_an_endless_loop_ends_by_ctrl_c_in_one_line(tmp_path, name, watch):
    lines = ["while True:", "    open('reached', 'w').close()", ""]
    loop, within = "\n".join(lines), "\n        ".join(lines)
    solution = EXERCISES["layer"].solution
    code = {
        "bp3": f"def gradient_b(delta):\n        {within}",
        "layer": solution.replace("x, W, a = ctx", f"{within}x, W, a = ctx"),
        "own_sigma": loop,
    }[name]
    (tmp_path / EXERCISES[name].file).write_text(code, encoding="utf-8")
    process = processes.start(*PROGRAM, name, *watch, cwd=tmp_path)
    processes.wait_until((tmp_path / "reached").exists, "the loop")
    process.send_signal(signal.SIGINT)
    out, err = processes.finish(process)
    assert (process.returncode, err) == (130, "")
    assert out.strip().startswith(f"interrupted in {EXERCISES[name].file}, line ")
    assert out.strip().count("\n") == 0
