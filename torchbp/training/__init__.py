"""Training a network: trainer, engines, progress, checkpoints and TensorBoard."""

from torchbp.training import checkpoint
from torchbp.training.checkpoint import CheckpointError
from torchbp.training.dashboard import LEVELS, Dashboard, EventWriter
from torchbp.training.devices import choose_device, cpu_threads
from torchbp.training.engines import AutogradSGD, Engine, batches, count_outputs
from torchbp.training.parallel import ParallelSGD, World, join
from torchbp.training.progress import PROGRESS, JSONLines, Progress, Quiet
from torchbp.training.run_folder import RunFolder
from torchbp.training.scores import EVALUATE_AT_ONCE, Score, evaluate
from torchbp.training.state import check_state
from torchbp.training.trainer import SCHEDULES, DivergedError, EpochResult, Trainer

__all__ = [
    "EVALUATE_AT_ONCE",
    "LEVELS",
    "PROGRESS",
    "SCHEDULES",
    "AutogradSGD",
    "CheckpointError",
    "Dashboard",
    "DivergedError",
    "Engine",
    "EpochResult",
    "EventWriter",
    "JSONLines",
    "ParallelSGD",
    "Progress",
    "Quiet",
    "RunFolder",
    "Score",
    "Trainer",
    "World",
    "batches",
    "check_state",
    "checkpoint",
    "choose_device",
    "count_outputs",
    "cpu_threads",
    "evaluate",
    "join",
]
