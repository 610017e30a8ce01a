"""Exercises: write the backward pass yourself, and be told what is wrong.

Each exercise is one Markdown file of this folder: its task, hints, solution, the cases
that grade it and the usual mistakes. `material.py` reads it, `probes.py` runs a case on
the learner's code, `grading.py` compares the results, `command.py` is the command line.
"""

from torchbp.exercises.command import add_exercises

__all__ = ["add_exercises"]
