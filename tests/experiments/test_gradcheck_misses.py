"""The count of wrong Functions that gradcheck notices."""

from __future__ import annotations

import runpy
from pathlib import Path

from wrong_functions import WRONG_FUNCTIONS

PROGRAM = Path(__file__).parents[2] / "experiments" / "gradcheck_misses.py"


def test_the_count_of_what_gradcheck_notices(capsys):
    assert runpy.run_path(str(PROGRAM))["command_line"]([]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split() for line in lines[1:-2]}
    assert list(rows) == [wrong.name for wrong in WRONG_FUNCTIONS]
    # Each has its finding; what is grossly wrong in float64 gradcheck notices, what is
    # wrong elsewhere it does not.
    assert [row[3] for row in rows.values()] == [w.check for w in WRONG_FUNCTIONS]
    assert rows["WrongSign"][1:3] == ["yes", "yes"]
    assert rows["GradientAveragedTwice"][1:3] == ["yes", "yes"]
    assert rows["DetachedTwice"][1:3] == ["-", "yes"]
    assert rows["BiasUnsummed"][1:3] == ["-", "-"]
    first, all = (sum(row[k] == "yes" for row in rows.values()) for k in (1, 2))
    assert lines[-1] == (
        f"of {len(rows)} wrong Functions gradcheck detects {first}, with gradgradcheck "
        f"and batched gradients {all}, examine {len(rows)}"
    )
