"""Exercises: write the backward pass yourself, and be told what is wrong.

Each exercise is one Markdown file of this folder, with its task, hints, solution, the
cases that grade it and the usual mistakes; `material.py` reads it, `probes.py` has the
ways in which a case looks at the learner's code, `grading.py` compares, `command.py` is
the command line.
"""

from torchbp.exercises.command import add_exercises

__all__ = ["add_exercises"]
