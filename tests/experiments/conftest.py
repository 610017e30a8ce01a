"""What the tests of the derivation's claims share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@pytest.fixture
def measure(capsys) -> Callable[..., Any]:
    """Run an experiment; check what holds for each, and return what was written, what
    was printed and the events."""

    def run(main, settings):
        results = main(settings)
        out = capsys.readouterr().out
        folder = Path(settings.logdir, settings.name)
        written = json.loads((folder / "results.json").read_text())
        assert written == json.loads(json.dumps(results))
        assert out.splitlines()[-1] == results["verdict"]
        assert max(map(len, out.partition("verdict")[0].splitlines())) <= 100
        events = EventAccumulator(str(folder))
        events.Reload()
        return written, out, events

    return run
