"""Looking at our own layers: what they compute, and whether it is right."""

from torchbp.inspection.comparison import Agreement, Comparison, Row, compare
from torchbp.inspection.observation import (
    Record,
    Trace,
    evaluating,
    observe,
    probe,
)
from torchbp.inspection.page import save_page
from torchbp.inspection.tour import Section, Tour, show

__all__ = [
    "Agreement",
    "Comparison",
    "Record",
    "Row",
    "Section",
    "Tour",
    "Trace",
    "compare",
    "evaluating",
    "observe",
    "probe",
    "save_page",
    "show",
]
