"""What `import torchbp` brings in, and how the modules lean on each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import torchbp

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "torchbp").glob("*.py"))

# A module may import those to its left; nothing runs back up.
ORDER = (
    "_version _naming _checks _exam_tools _exam_subject _exam_verdicts "
    "_exam_derivatives _exam_layouts _exam_backward _exam_transforms _exam_costs "
    "examination _wording _forms functional costs data checkpoint nn _steps explicit "
    "convert observation _sweeps comparison _terminal tour _captions _graph _pictures dashboard trainer parallel progress distortion "
    "__init__ __main__"
).split()


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


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_imports_run_one_way(path):
    allowed = ORDER[: ORDER.index(path.stem)]
    tree = ast.parse(path.read_text())
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "torchbp"
        ):
            inner = (node.module or "").split(".")[1:]
            used = inner or [alias.name for alias in node.names]
            assert set(used) <= set(allowed), f"{path.stem} imports {used}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert "experiments" not in ast.dump(node)


def test_no_native_backward_stands_behind_a_hand_written_one():
    """Neither aten's *_backward kernels nor autograd may compute a first derivative."""
    allowed = {"save_for_backward"}
    for name in ("functional.py", "costs.py", "_forms.py", "explicit.py", "_steps.py"):
        for node in ast.walk(ast.parse((ROOT / "torchbp" / name).read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func).split(".")[-1]
                assert called in allowed or not called.endswith("backward"), called
                assert called not in ("grad", "vjp", "jacrev"), called


def test_public_names_are_documented_and_sorted():
    for name in torchbp.__all__:
        assert getattr(torchbp, name).__doc__ or name == "__version__"
    assert len(set(torchbp.__all__)) == len(torchbp.__all__)
    assert (ROOT / "torchbp" / "py.typed").exists()
