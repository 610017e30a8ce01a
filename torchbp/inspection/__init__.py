"""Looking at our own layers: what they compute, and whether it is right.

- `observation`: observe and probe, which record a pass.
- `records`: the records.
- `comparison`, `sweeps`, `agreement`: compare, the passes that it runs, and its report.
- `tour`, `layout`: a guided tour of one example, and its layout as text.
- `page`, `lessons`: a recorded pass as an HTML page, and the page's texts.
"""

from torchbp.inspection.agreement import Agreement, Comparison, Row
from torchbp.inspection.comparison import compare
from torchbp.inspection.layout import Section, show
from torchbp.inspection.observation import evaluating, observe, probe
from torchbp.inspection.page import save_page
from torchbp.inspection.records import Record, Trace
from torchbp.inspection.tour import Tour

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
