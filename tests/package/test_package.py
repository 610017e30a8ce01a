"""What `import torchbp` brings in, and how the modules lean on each other."""

from __future__ import annotations

import ast
import dataclasses
import email
import functools
import graphlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from torch.utils._device import _device_constructors

import torchbp
from torchbp.nn import ACTIVATIONS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "torchbp"
MODULES = sorted(PACKAGE.rglob("*.py"))
ROOMS = ("data", "examination", "exercises", "explicit", "inspection", "training")

# What stands in a row may import from the rows before it and from its own row, as long
# as there is no circle; a room stands for all its files.
ROWS = (
    "_version _autograd _define _checks _numeric _files _terminal data",
    "functional costs examination",
    "nn",
    "convert explicit",
    "inspection",
    "training exercises",
    "__init__",
    "__main__",
)
ROW_OF = {name: i for i, row in enumerate(ROWS) for name in row.split()}


def place(path):
    """The room of a file, or its own name where it stands in no room."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path):
    """The modules of the package that a file imports, as dotted names below torchbp."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "torchbp":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            package, _, inner = node.module.partition(".")
            if package == "torchbp":
                yield inner
        elif isinstance(node, ast.Import):
            for alias in node.names:
                package, _, inner = alias.name.partition(".")
                if package == "torchbp" and inner:
                    yield inner


def test_every_file_of_the_package_is_looked_at():
    assert len(MODULES) == sum(
        name.endswith(".py") for _, _, names in os.walk(PACKAGE) for name in names
    )
    assert {place(path) for path in MODULES} == set(ROW_OF)


def test_imports_run_down_the_rows():
    edges = {}
    for path in MODULES:
        here = place(path)
        for name in imports(path):
            there = name.split(".")[0]
            assert ROW_OF[there] <= ROW_OF[here], f"{path} imports {name}"
            if there != here:
                edges.setdefault(here, set()).add(there)
    graphlib.TopologicalSorter(edges).prepare()  # raises CycleError


@pytest.mark.parametrize("folder", ["torchbp", "experiments"])
def test_a_room_is_entered_by_its_door(folder):
    for path in (ROOT / folder).rglob("*.py"):
        here = place(path) if folder == "torchbp" else ""
        for name in imports(path):
            room, _, inner = name.partition(".")
            if room in ROOMS and room != here:
                assert not inner, f"{path} imports {name}, not torchbp.{room}"


def test_import_torchbp_is_light():
    heavy = "torchvision tensorboard sklearn tqdm scipy".split()
    # torch itself brings some of them where they are installed.
    code = (
        "import sys, torch; before = set(sys.modules); import torchbp; "
        f"print([m for m in {heavy} if m in set(sys.modules) - before])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert result.stdout.strip() == "[]"


def test_no_program_imports_a_program():
    for path in (ROOT / "experiments").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                name = node.module or ""
                if name.split(".")[0] == "experiments":
                    assert name.startswith("experiments.support"), f"{path}: {name}"


def test_no_native_backward_stands_behind_a_hand_written_one():
    """Neither aten's *_backward kernels nor autograd may compute a first derivative."""
    allowed = {"save_for_backward"}
    hand_written = [PACKAGE / f"{name}.py" for name in ("functional", "costs")]
    hand_written += [PACKAGE / "_autograd.py", *(PACKAGE / "explicit").rglob("*.py")]
    for path in hand_written:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func).split(".")[-1]
                assert called in allowed or not called.endswith("backward"), called
                assert called not in ("grad", "vjp", "jacrev"), called


@pytest.mark.parametrize("name", ["functional.py", "costs.py"])
def test_the_files_of_equations_are_short(name):
    """At most 250 lines besides docstrings and blank ones."""
    text = (PACKAGE / name).read_text(encoding="utf-8")
    documented = set()
    for node in ast.walk(ast.parse(text)):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            first = node.body[0]
            documented |= set(range(first.lineno, first.end_lineno + 1))
    lines = enumerate(text.splitlines(), start=1)
    assert sum(bool(line.strip()) and i not in documented for i, line in lines) <= 250


def test_the_whole_algorithm_is_one_short_file():
    """`backprop` with its docstring and little else, for a reader to begin with."""
    path = PACKAGE / "explicit" / "algorithm.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 120


# What makes a tensor without another tensor to take the device and the dtype from; a
# torch.Generator() is on the CPU wherever torch's default device is.
FACTORIES = {function.__name__ for function in _device_constructors()}
MAKE_INTEGERS = {"arange", "randint", "randperm", "tril_indices", "triu_indices"}
MODULES_WITH_PARAMETERS = {"MLP", *(layer.__name__ for layer in ACTIVATIONS.values())}


@pytest.mark.parametrize("folder", ["torchbp", "experiments"])
def test_what_makes_tensors_names_device_and_dtype(folder):
    """So torch's default device and dtype, which are the user's, have no say."""
    found = 0
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            name = called.split(".")[-1]
            is_factory = called == f"torch.{name}" and name in FACTORIES
            if not is_factory and name not in MODULES_WITH_PARAMETERS:
                continue
            wanted = {"device"} if name in MAKE_INTEGERS else {"device", "dtype"}
            missing = wanted - {keyword.arg for keyword in node.keywords}
            assert not missing, f"{path}:{node.lineno}: {called} without {missing}"
            found += 1
    assert found > 10


def test_public_names_are_there_once():
    assert len(set(torchbp.__all__)) == len(torchbp.__all__)
    assert torchbp.__version__ == importlib.metadata.version("torchbp")
    assert (ROOT / "torchbp" / "py.typed").exists()


# ------------------------------------------------------------------------ docstrings

HEADING = r"^(Args|Shape|Attributes|Returns|Yields|Raises|Examples):$"


def public():
    """Every public function and class of the package, and its public methods, by name:
    what a module's or a room's `__all__` lists, or, without one, all that is defined in
    the module and has no underscore."""
    for path in PACKAGE.glob("*.py"):
        if not path.stem.startswith("_"):
            yield from _public_of(importlib.import_module(f"torchbp.{path.stem}"))
    for room in ROOMS:
        yield from _public_of(importlib.import_module(f"torchbp.{room}"))


def _public_of(module):
    own = [n for n, v in vars(module).items() if _defined_in(v, module)]
    prefix = module.__name__.split(".")[-1]
    for name in getattr(module, "__all__", [n for n in own if n[0] != "_"]):
        thing = getattr(module, name)
        if inspect.ismodule(thing):
            yield from _public_of(thing)
        elif callable(thing):
            yield f"{prefix}.{name}", thing
            if isinstance(thing, type):
                yield from _members(f"{prefix}.{name}", thing)


def _defined_in(value, module):
    return callable(value) and getattr(value, "__module__", "") == module.__name__


def _members(name, cls):
    """Methods and properties of its own; what a base class has said need not be said
    again."""
    bases = [base for base in cls.__mro__[1:] if base is not object]
    for key, member in vars(cls).items():
        inherited = any(key in vars(base) for base in bases)
        if key.startswith("_") or inherited:
            continue
        if isinstance(member, (property, functools.cached_property)):
            yield f"{name}.{key}", member
        elif isinstance(member, (classmethod, staticmethod)):
            yield f"{name}.{key}", member.__func__
        elif inspect.isfunction(member):
            yield f"{name}.{key}", member


def sections(text):
    """The sections of a docstring by their headings; what stands before them is ""."""
    result, heading = {"": ""}, ""
    for line in inspect.cleandoc(text).splitlines():
        match = re.match(HEADING, line)
        if match:
            heading = match[1]
            result[heading] = ""
        else:
            result[heading] += line + "\n"
    return result


def parameters(thing):
    """The names that a caller gives; those of a class are its constructor's."""
    if isinstance(thing, property) or getattr(thing, "_is_protocol", False):
        return []
    if isinstance(thing, type):
        has_own = "__init__" in vars(thing) and not dataclasses.is_dataclass(thing)
        if not has_own and "Args" not in sections(thing.__doc__ or ""):
            return []
        thing = thing.__init__
    names = list(inspect.signature(thing).parameters)
    return [name for name in names if name not in ("self", "cls", "ctx")]


PUBLIC = dict(public())
# One thing under two names, as torchbp.MLP and torchbp.nn.MLP, is the same docstring.
CALLABLES = {name: x for name, x in PUBLIC.items() if name.count(".") == 1}


@pytest.mark.parametrize("name", PUBLIC)
def test_each_public_name_says_what_it_does_and_takes(name):
    thing = PUBLIC[name]
    # Not inherited: a subclass does something else.
    text = vars(thing).get("__doc__") if isinstance(thing, type) else thing.__doc__
    assert text, f"{name} has no docstring"
    parts = sections(text)
    assert parts[""].strip(), f"{name} does not say what it does"
    listed = re.findall(r"^    ([*\w]+(?:, [*\w]+)*):", parts.get("Args", ""), re.M)
    documented = {p.lstrip("*") for names in listed for p in names.split(", ")}
    wanted = set(parameters(thing))
    # A method may name what it takes in its sentences.
    if name not in CALLABLES and "Args" not in parts:
        documented = {p for p in wanted if re.search(rf"`{p}`", text)}
    assert documented == wanted, f"{name}: Args has {documented}, it takes {wanted}"
    if dataclasses.is_dataclass(thing):
        fields = {field.name for field in dataclasses.fields(thing)}
        assert all(re.search(rf"\b{field}\b", text) for field in fields), name


# "Arguments as X", "see X", ":func:`X` as a module": another page is needed.
POINTERS = re.compile(r"\b[Aa]s (in |for )?:\w+:|\bas there\b|\b[Ss]ee :|` as a module")


@pytest.mark.parametrize("name", [n for n, c in PUBLIC.items() if isinstance(c, type)])
def test_the_help_of_a_class_needs_no_other_page(name):
    """A method may point to another method of its class: it is on the same page."""
    cls = PUBLIC[name]
    members = {m for m in dir(cls) if not m.startswith("_")}
    texts = [cls.__doc__, *(member.__doc__ for _, member in _members(name, cls))]
    for text in filter(None, texts):
        for match in POINTERS.finditer(text):
            rest = text[match.start() :].splitlines()[0]
            own = re.search(r":meth:`(\w+)`", rest)
            assert own and own[1] in members, f"{name}: {rest}"


@pytest.mark.parametrize("layer", ["BPLinear", "BPLinearTanh", "Squared"])
def test_the_help_of_a_layer_says_what_it_takes(layer):
    Squared = torchbp.define_layer(
        "Squared", lambda z: z**2, lambda z: 2 * z, saves="z"
    )
    text = {**vars(torchbp), "Squared": Squared}[layer].__doc__
    for word in ("in_features:", "dtype:", "Shape:", "weight:", "Raises:"):
        assert word in text, f"{layer} does not say {word}"


@pytest.mark.parametrize("name", CALLABLES)
def test_each_public_callable_has_an_example(name):
    example = sections(CALLABLES[name].__doc__).get("Examples", "")
    assert ">>> " in example, f"{name} has no Examples"


# ---------------------------------------------------- what is built and installed

BUILD = (
    "import sys; from hatchling import build; target = sys.argv[1]; "
    "build.build_sdist(target); build.build_wheel(target)"
)


needs_hatchling = pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None,
    reason="needs hatchling, which builds the package",
)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The sdist and the wheel, as pip has them made, from a copy."""
    source, target = (tmp_path_factory.mktemp(name) for name in ("source", "target"))
    hidden = (".[!g]*", ".git", ".gitignore")  # all but .github
    skip = shutil.ignore_patterns(*hidden, "__pycache__", "*.egg-info", "build", "runs")
    shutil.copytree(ROOT, source, ignore=skip, dirs_exist_ok=True)
    (source / "secret.txt").write_text("not to be packed")
    subprocess.run(
        [sys.executable, "-c", BUILD, str(target)],
        cwd=source,
        check=True,
        capture_output=True,
    )
    return source, *(next(target.glob(f"*.{end}")) for end in ("tar.gz", "whl"))


def files_below(source, *folders):
    """The names of all files below these folders of `source`."""
    return {
        str(path.relative_to(source))
        for folder in folders
        for path in (source / folder).rglob("*")
        if path.is_file()
    }


@needs_hatchling
def test_the_wheel_has_the_package_and_nothing_else(built):
    source, _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = email.message_from_bytes(
            archive.read(next(n for n in names if n.endswith("METADATA")))
        )
    info = f"torchbp-{torchbp.__version__}.dist-info"
    expected = files_below(source, "torchbp")
    expected |= {f"{info}/{name}" for name in ("WHEEL", "RECORD", "METADATA")}
    expected |= {f"{info}/licenses/LICENSE"}
    assert names == expected
    assert metadata["Version"] == torchbp.__version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.10"
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert metadata.get_payload().startswith("# torchbp")


@needs_hatchling
def test_the_sdist_has_what_the_tests_need_and_nothing_else(built):
    source, sdist, _ = built
    with tarfile.open(sdist) as archive:
        files = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    code = files_below(source, "torchbp", "experiments", "tests", ".github")
    assert {"tests/cases.py", "experiments/mnist.py", "torchbp/py.typed"} <= code
    # hatchling adds .gitignore: what is built from the sdist leaves out the same.
    expected = set(".gitignore LICENSE PKG-INFO README.md pyproject.toml".split())
    assert files - code <= expected
    assert expected - {".gitignore"} <= files
    assert code <= files


@needs_hatchling
def test_the_wheel_works_where_there_is_nothing_but_it(built, tmp_path):
    """Unpacked, which is what installing a pure wheel comes to."""
    with zipfile.ZipFile(built[2]) as archive:
        archive.extractall(tmp_path)
    code = (
        "import sys, torchbp; from torchbp.__main__ import main; "
        "print(torchbp.__file__); sys.exit(main(['tour']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    assert result.stdout.startswith(str(tmp_path / "torchbp"))
    assert "torchbp/explicit/algorithm.py:" in result.stdout
    assert "Every gradient is right." in result.stdout


@pytest.fixture(scope="session")
def installed(built, tmp_path_factory):
    """The unpacked sdist and, beside it, the installed wheel."""
    _, sdist, wheel = built
    folder = tmp_path_factory.mktemp("installed")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / f"torchbp-{torchbp.__version__}", folder / "site"


def run_python(site, folder, *arguments):
    """Run Python in `folder`, with the wheel installed in `site`."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


@needs_hatchling
def test_a_program_runs_in_any_folder_beside_an_installed_wheel(installed, tmp_path):
    """Its run folder is below the working directory; nothing is written elsewhere."""
    before = [files_below(folder, ".") for folder in installed]
    options = "--dataset digits --sizes 784 2 10 --epochs 1 --name one --quiet"
    source, site = installed
    program = source / "experiments" / "mnist.py"
    trained = run_python(site, tmp_path, program, *options.split())
    assert (trained.returncode, trained.stdout, trained.stderr) == (0, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    versions = json.loads((tmp_path / "runs" / "one" / "versions.json").read_text())
    assert versions["torchbp"] == torchbp.__version__
    assert [files_below(folder, ".") for folder in installed] == before


# In one process, since each import of torch takes seconds.
HELP_OF_ALL = """
import runpy, sys
for program in sys.argv[1:]:
    sys.argv = [program, "--help"]
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, program
print(sys.modules["torchbp"].__file__)
"""


@needs_hatchling
def test_every_program_finds_what_it_imports(installed, tmp_path):
    source, site = installed
    programs = sorted((source / "experiments").glob("*.py"))
    assert len(programs) == len(list((ROOT / "experiments").glob("*.py"))) >= 10
    result = run_python(site, tmp_path, "-c", HELP_OF_ALL, *programs)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("usage: ") == len(programs)
    # The package beside the programs, so that both are of one version.
    assert result.stdout.rstrip().endswith(str(source / "torchbp" / "__init__.py"))


@needs_hatchling
def test_tests_of_the_sdist_test_the_installed_package(installed, tmp_path):
    """Where no package stands beside them; the C++ source, too, is the wheel's."""
    source, site = installed
    hide = shutil.ignore_patterns("torchbp")
    shutil.copytree(source, tmp_path / "sdist", ignore=hide)
    tests = ["tests/core/test_nn.py", "tests/explicit/test_kernel.py"]
    chosen = "test_mlp_keys or (sanitizers and unoptimised)"
    command = ["-m", "pytest", "-q", "-p", "no:xdist", *tests, "-k", chosen]
    result = run_python(site, tmp_path / "sdist", *command)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 passed" in result.stdout or "needs g++" in result.stdout


PROGRAM = ROOT / "tests" / "typed_program.py"


def test_a_user_s_program_runs():
    runpy.run_path(str(PROGRAM))


def check_types(*options):
    pytest.importorskip("mypy", reason="needs mypy")
    result = subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(PROGRAM)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_user_s_program_type_checks():
    """With the project's own settings: what mypy knows of torch is in its cache."""
    check_types()


@pytest.mark.slow
def test_a_user_s_program_type_checks_under_strict(tmp_path):
    """With mypy's own, from nothing: torch alone takes half a minute. What mypy says of
    an installed package's own lines is not shown to its users."""
    options = ("--config-file=", "--strict", "--follow-imports=silent")
    check_types(*options, f"--cache-dir={tmp_path}")
