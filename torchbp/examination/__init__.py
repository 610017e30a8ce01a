"""Judging anybody's backward: ``examine`` and its report.

The room stands on torch and on the package's underscored files alone, so that it can
judge any Function, ours included.
"""

from torchbp.examination.examiner import CHECKS, examine
from torchbp.examination.guide import explain
from torchbp.examination.report import Finding, Report
from torchbp.examination.targets import draw, find

__all__ = ["CHECKS", "Finding", "Report", "draw", "examine", "explain", "find"]
