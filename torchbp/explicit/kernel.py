"""The compiled loops of ``kernel.cpp``: the choice, the build and the call.

The loops are built once on each machine, by ``torch.utils.cpp_extension`` with the
machine's own compiler, in a folder that belongs to this build alone. The finished
library then gets its name in the cache in one step. So two processes may build at once,
and an interrupted build leaves nothing that a later one could wait for or load.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from torchbp import costs, nn
from torchbp.costs import CostFunction
from torchbp.explicit.checks import Rates
from torchbp.explicit.steps import Steps, Unit
from torchbp.functional import LinearFunction

KERNELS = ("auto", "torch", "compiled")

SOURCE = Path(__file__).with_name("kernel.cpp")
# Not -ffast-math: it removes the rounding in `exponential`, and NaN with it.
FLAGS = ["-O3", "-ffp-contract=fast", "-fno-math-errno"]
MACHINE_FLAGS = ["-march=native"]
SYSTEMS = ("linux", "darwin")
# "auto" builds, which takes seconds once, for epochs of at least so many examples.
BUILT_FROM = 10_000
# The most products in one call. They take less than a second on any machine: an
# interrupt waits until the call returns.
PRODUCTS_AT_ONCE = 2_000_000_000
# "auto" leaves mini-batches with more products of a weight and an input to BLAS, which
# may use all cores: the first limit is for images in bytes, in which zeros are skipped,
# the second for numbers. Measured on one thread beside the torch calls, with one to
# three layers of 30 to 1,500 neurons and batches of 1 to 1,024: with AVX-512 the loops
# are always faster, with AVX2 they are as fast at these limits.
SKIPPED_PRODUCTS, PRODUCTS = 100_000_000, 10_000_000


def _number(enumeration: str, table: Mapping[str, Any]) -> dict[Any, int]:
    """The numbers by which kernel.cpp knows those Functions of a `table` that it has
    loops for."""
    source = SOURCE.read_text(encoding="utf-8")
    (names,) = re.findall(rf"enum {enumeration} : int32_t {{(.*)}};", source)
    return {
        table[name.lower().replace("_", "-")].function: number
        for number, name in enumerate(names.strip().split(", "))
    }


ACTIVATIONS: dict[type[LinearFunction], int] = _number("Activation", nn.ACTIVATIONS)
COSTS: dict[type[CostFunction], int] = _number("Cost", costs.COSTS)
TRAINED, NOT_FINITE = 0, 1


class Layer(ctypes.Structure):
    """``struct Layer`` of kernel.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("W", "b")),
        *((name, ctypes.c_int64) for name in ("W_row", "b_step")),
        *((name, ctypes.c_int64) for name in ("n_in", "n_out")),
        *((name, ctypes.c_int32) for name in ("activation", "trains_W", "trains_b")),
    )


class Examples(ctypes.Structure):
    """``struct Examples`` of kernel.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("images", "targets", "order")),
        *((name, ctypes.c_int64) for name in ("count", "batch_size")),
        *((name, ctypes.c_int64) for name in ("image_stride", "target_stride")),
        *((name, ctypes.c_int32) for name in ("images_are_bytes", "are_labels")),
    )


# ---------------------------------------------------------------- the choice


def explain_unsuitable(
    functions: Sequence[type[LinearFunction]],
    cost: type[CostFunction],
    parameters: Sequence[Tensor],
) -> str | None:
    """Return what in a network the compiled loops cannot train, or None."""
    for function in functions:
        if function not in ACTIVATIONS:
            return f"{function.__name__.removesuffix('Function')} layers"
    if cost not in COSTS:
        return f"the cost {cost.__name__.removesuffix('Function')}"
    for p in parameters:
        if p.dtype != torch.float32 or p.device.type != "cpu":
            return f"{p.dtype} parameters on {p.device.type}"
    return None


def is_faster(weights: Sequence[Tensor], batch_size: int, is_bytes: bool) -> bool:
    """Return whether the compiled loops are faster than the torch calls, which leave
    the products to BLAS: by a fixed rule, so a run is the same on every machine."""
    products = batch_size * sum(W.numel() for W in weights)
    return products <= (SKIPPED_PRODUCTS if is_bytes else PRODUCTS)


def choose(
    kernel: str,
    functions: Sequence[type[LinearFunction]],
    cost: type[CostFunction],
    weights: Sequence[Tensor],
    batch_size: int,
    is_bytes: bool,
    may_build: bool,
) -> str:
    """Return "torch" or "compiled", whichever the option `kernel` means for these
    steps; raise ValueError if it asks for loops that are not available."""
    if kernel not in KERNELS:
        raise ValueError(f"kernel: expected one of {KERNELS}, got {kernel!r}")
    if kernel == "torch":
        return "torch"
    reason = explain_unsuitable(functions, cost, weights)
    if kernel == "auto":
        suits = reason is None and is_faster(weights, batch_size, is_bytes)
        return "compiled" if suits and load(may_build) else "torch"
    if reason is not None:
        raise ValueError(
            f"kernel: expected 'auto' or 'torch' for {reason}, got 'compiled'"
        )
    if load(build=True) is None:
        raise ValueError(
            "kernel: expected 'auto' or 'torch' where the loops cannot be "
            f"compiled, got 'compiled': {explain_failure()}"
        )
    return "compiled"


# ---------------------------------------------------------------- the build

_library: Any = None  # the loaded function
_failure: str | None = None  # why it is not available in this process
_is_absent = False  # whether the cache lacked it when it was last searched


def load(build: bool) -> Any:
    """Return the compiled function, from the cache or, if `build`, newly built.

    Returns:
        None if it is not built and `build` is false, or if it is not available;
        :func:`explain_failure` then returns the reason.
    """
    global _library, _failure, _is_absent
    if _library is None and _failure is None and (build or not _is_absent):
        try:
            _library = _find_or_build(build)
            _is_absent = _library is None
        except (OSError, RuntimeError, ImportError) as error:
            _failure = _last_line(str(error))
    return _library


def explain_failure() -> str | None:
    """Return one line about why the compiled loops are not available.

    Returns:
        None if they are available, or have not been asked for yet.

    Examples:
        >>> isinstance(explain_failure(), str | None)
        True
    """
    return _failure


def _find_or_build(build: bool) -> Any:
    """Return the function from the cache, or newly built, or None; raise OSError,
    RuntimeError or ImportError if it is not available."""
    if sys.platform not in SYSTEMS:
        raise OSError(f"expected one of {', '.join(SYSTEMS)}, got {sys.platform}")
    path = cache_folder() / f"kernel-{_key()}.so"
    with contextlib.suppress(OSError):  # absent, or damaged: build it
        return _function(path)
    return _build(path) if build else None


def cache_folder() -> Path:
    """Return the folder `torchbp` in $TORCH_EXTENSIONS_DIR, $XDG_CACHE_HOME or
    ~/.cache."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "torchbp"


def _compiler() -> list[str]:
    """The compiler command that torch.utils.cpp_extension uses."""
    return shlex.split(os.environ.get("CXX", "c++"))


def _key() -> str:
    """Cache key of source, flags, compiler and processor."""
    try:
        version = subprocess.run(
            [*_compiler(), "--version"], capture_output=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise OSError(f"expected a C++ compiler, got none: {error}") from error
    parts = [SOURCE.read_bytes(), " ".join([*FLAGS, *MACHINE_FLAGS]).encode(), version]
    return hashlib.sha256(b"\0".join([*parts, _processor()])).hexdigest()[:16]


def _processor() -> bytes:
    """The processor, on which -march=native depends: several machines may share a home
    folder."""
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_bytes().partition(b"\n\n")[0].splitlines()
        wanted = (b"model name", b"flags", b"Features", b"CPU part")
        return b"\n".join(line for line in first if line.startswith(wanted))
    return f"{platform.machine()} {platform.processor()}".encode()


def _build(path: Path) -> Any:
    """Build the library, put it at `path` if the cache can be written, and load it."""
    print(
        "torchbp: compiling the explicit engine's loops for this machine, once; "
        "this takes some seconds",
        file=sys.stderr,
        flush=True,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(
            dir=path.parent, prefix="building-", ignore_cleanup_errors=True
        )
    except OSError:  # a read-only cache: build for this process alone
        folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with folder as name:
        library = _compile(name)
        function = _function(library)
        with contextlib.suppress(OSError):
            os.replace(library, path)
    return function


def _compile(folder: str) -> Path:
    """Build the library in `folder`, which belongs to this build alone, and return its
    path."""
    with warnings.catch_warnings(), _ninja_on_path():
        warnings.simplefilter("ignore")
        # It logs that there is no GPU, and more that does not matter for this build.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        from torch.utils import cpp_extension

        cpp_extension.load(
            "torchbp_kernel",
            [str(SOURCE)],
            extra_cflags=[*FLAGS, *MACHINE_FLAGS],
            # Not linked to torch, which the loops do not use: they fit any version.
            extra_ldflags=["-Wl,--as-needed"] if sys.platform == "linux" else [],
            build_directory=folder,
            with_cuda=False,
            is_python_module=False,
        )
    (library,) = Path(folder).glob("torchbp_kernel*.so")
    return library


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Add this Python's scripts to PATH: `ninja` may be in an environment that is not
    activated."""
    if find_spec("ninja") is None:
        yield
        return
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{before}{os.pathsep}{sysconfig.get_path('scripts')}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _last_line(message: str) -> str:
    """The compiler's last error in the message of a failed build, else its last
    line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line]
    return [*lines[-1:], *errors][-1] if lines else "unknown"


def _function(path: Path) -> Any:
    """Load the library at `path` and return its function."""
    train = ctypes.CDLL(str(path)).torchbp_train
    train.restype = ctypes.c_int
    train.argtypes = [
        ctypes.POINTER(Layer), ctypes.c_int64, ctypes.POINTER(Examples),
        ctypes.c_int32, ctypes.c_float, ctypes.c_float, ctypes.c_void_p,
    ]  # fmt: skip
    return train


# ---------------------------------------------------------------- the call


class CompiledSteps:
    """The steps of mini-batches of m rows, by the compiled loops.

    Args:
        train: the compiled function.
        units: the layers.
        cost: the cost's Function.
        m: rows in a batch.
        make_steps: makes the torch calls for the same steps, of the same `units`, whose
            memory it keeps alive: the loops know addresses alone.

    The loops skip inputs that are zero, which is right only while every parameter is
    finite. If one is not, or a z or δ, they change nothing, and the torch calls take
    these steps: NaN then spreads as it does natively.
    """

    def __init__(
        self,
        train: Any,
        units: Sequence[Unit],
        cost: type[CostFunction],
        m: int,
        make_steps: Callable[[], Steps],
    ) -> None:
        self.train, self.cost, self.m = train, COSTS[cost], m
        self.make_steps = make_steps
        self.layers = (Layer * len(units))(*map(_describe_layer, units))
        self.can_read = all(map(_can_read, units))
        self.trained = [unit.W for unit in units if unit.updates_weight]
        self.trained += [u.b for u in units if u.updates_bias and u.b is not None]
        self.rates = Rates(0.0)
        self.cost_like = torch.empty((), dtype=torch.float32, device="cpu")
        self.all_rows = torch.arange(m, device="cpu")
        products = sum(unit.W.numel() for unit in units) * 3 * m
        self.rows_at_once = max(1, PRODUCTS_AT_ONCE // max(products, 1)) * m

    def bind(self, rates: Rates) -> None:
        """Take the steps at these rates from now on."""
        self.rates = rates

    def take(self, images: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
        """Take the steps of the mini-batches `rows` of a set; return their costs."""
        images, targets = images.resolve_neg(), targets.resolve_neg()
        if images.stride(1) != 1 or (targets.dim() == 2 and targets.stride(1) != 1):
            images, targets = images[rows].contiguous(), targets[rows].contiguous()
            rows = torch.arange(len(rows), device="cpu")
        parts = rows.contiguous().split(self.rows_at_once)
        return torch.cat([self._take(images, targets, part) for part in parts])

    def take_one(self, x: Tensor, y: Tensor) -> Tensor:
        """Take the step of one mini-batch; return its cost, 0-d. The loops know only
        addresses, so autograd is told that what is trained was written to."""
        x, y = x.contiguous().resolve_neg(), y.contiguous().resolve_neg()
        C = torch.empty_like(self.cost_like)  # in half the time of torch.empty
        if not self._train(x, y, self.all_rows, C):
            C = self._take(x, y, self.all_rows)[0]
        increment_version(self.trained)
        return C

    def _take(self, images: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
        """As :meth:`take`, by one call of the loops, or by torch calls if that
        refuses."""
        C = torch.empty(-(-len(rows) // self.m), dtype=torch.float32, device="cpu")
        if not self._train(images, targets, rows, C):
            steps = self.make_steps()
            steps.bind(self.rates)
            return steps.take(images, targets, rows)
        return C

    def _train(self, images: Tensor, targets: Tensor, rows: Tensor, C: Tensor) -> bool:
        """Take the steps, write their costs to C and return True; or change nothing and
        return False."""
        pointers = images.data_ptr(), targets.data_ptr(), rows.data_ptr()
        # A fake tensor has no memory: the torch calls raise the right error for it.
        if not (self.can_read and all(pointers) and C.data_ptr()):
            return False
        # Made for each call, during which other threads run.
        examples = Examples(
            *pointers, rows.shape[0], self.m, images.stride(0), targets.stride(0),
            images.dtype is torch.uint8, targets.dtype is torch.int64,
        )  # fmt: skip
        outcome = self.train(
            self.layers, len(self.layers), examples, self.cost,
            self.rates.lr, self.rates.weight_decay, C.data_ptr(),
        )  # fmt: skip
        if outcome not in (TRAINED, NOT_FINITE):
            raise MemoryError("ExplicitSGD: no memory for the buffers of a mini-batch")
        return bool(outcome == TRAINED)


def _can_read(unit: Unit) -> bool:
    """Whether W and b can be read at their addresses, with unit stride along rows."""
    return unit.W.stride(1) == 1 and not any(
        t.is_neg() or _bytes_spanned(t) > t.untyped_storage().nbytes()
        for t in (unit.W, unit.b)
        if t is not None
    )


def _bytes_spanned(t: Tensor) -> int:
    """The size that the storage of `t` must have; it may have been freed or cut."""
    steps = zip(t.shape, t.stride(), strict=True)
    last = t.storage_offset() + sum((n - 1) * step for n, step in steps)
    return int(last + 1) * t.element_size()


def _describe_layer(unit: Unit) -> Layer:
    """A unit as the loops read it."""
    W, b = unit.W, unit.b
    return Layer(
        W.data_ptr(), None if b is None else b.data_ptr(),
        W.stride(0), 0 if b is None else b.stride(0),
        W.shape[1], W.shape[0],
        ACTIVATIONS[unit.function], unit.updates_weight,
        unit.updates_bias and b is not None,
    )  # fmt: skip
