"""MNIST and its family as verified tensors.

`load` returns the images and labels of each split as two tensors, not single images:
50,000 images are 39 MB as uint8. It reads packed and unpacked files where they are;
only a download writes to a root.

Each file is searched for in `root/MNIST/raw` (torchvision's layout; FashionMNIST or
KMNIST for these sets), then in `root`, then in `root/raw`: root may be torchvision's
root, its MNIST folder, or the folder of the files. In each folder a file may be named
train-images-idx3-ubyte.gz or train-images.idx3-ubyte.gz, or either without .gz.
Checksums identify packed files and MNIST's unpacked ones. Unpacked files of
Fashion-MNIST and KMNIST have the same names and sizes, so they are read only from a
folder named after the set (FashionMNIST, fashion-mnist, ...) or from raw in it.

torchvision, scikit-learn and numpy are imported at their first use: this module needs
torch alone, and `load("digits")` neither torchvision nor a network.
"""

import gzip
import hashlib
import http.client
import importlib
import importlib.util
import io
import math
import os
import queue
import socket
import struct
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchbp._terminal import UserError

NAMES = ("mnist", "fashion", "kmnist", "digits")

_CLASSES = {"mnist": "MNIST", "fashion": "FashionMNIST", "kmnist": "KMNIST"}
_COUNTS = {"train": 60_000, "t10k": 10_000}
_VALIDATION = 10_000
_FILES = tuple(
    f"{part}-{kind}-ubyte"
    for part in _COUNTS
    for kind in ("images-idx3", "labels-idx1")
)
# torchvision knows the MD5 of the .gz files only. These tell unpacked MNIST from the
# other sets, whose files have the same names and sizes.
_MNIST_UNPACKED_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
_GZ_EXTRA = 1 << 16  # for gzip's header, which may contain a name, and its trailer
_PROBE_SECONDS = 10.0  # so that a missing network is reported within 15 s
_STALL_SECONDS = 15.0
_TIMEOUT_LOCK = threading.Lock()  # the default time-out is global to the process
_DIGITS_BOUNDS = (0, 1_297, 1_547, 1_797)


class DataError(UserError):
    """Data that is missing, damaged or cannot be loaded; the message is one line.

    Args:
        message: what is wrong; its lines are joined.

    Examples:
        >>> try:
        ...     load("mnist", root="/nowhere", download=False)
        ... except DataError as error:
        ...     print(len(str(error).splitlines()), "line")
        1 line
    """


class Split(NamedTuple):
    """Images and their labels.

    Attributes:
        images: uint8 (n, 784).
        labels: int64 (n).

    Examples:
        >>> blank = Split(torch.zeros(2, 784, dtype=torch.uint8), torch.tensor([3, 7]))
        >>> images, labels = blank
        >>> images.shape
        torch.Size([2, 784])
    """

    images: Tensor
    labels: Tensor


class Splits(NamedTuple):
    """The three splits of a dataset.

    Attributes:
        train, validation, test: a :class:`Split` each.

    Examples:
        >>> splits = load("digits")
        >>> [len(split.labels) for split in splits]
        [1297, 250, 250]
    """

    train: Split
    validation: Split
    test: Split


def load(
    name: str, root: str | os.PathLike[str] | None = None, download: bool = True
) -> Splits:
    """Load a data set as tensors: all images and labels of each split.

    The MNIST family is split 50,000 / 10,000 / 10,000; validation is the last of the
    60,000. "digits" is scikit-learn's 8x8 digits, laid out like MNIST, split
    1,297 / 250 / 250 by a fixed permutation; it needs neither files nor a network.

    Args:
        name: one of `NAMES`.
        root: folder in torchvision's layout, or in another one that this module's
            docstring lists; `default_root()` if None.
        download: download files of the MNIST family that are missing in root.

    Returns:
        Splits: train, validation and test, each (images, labels).

    Raises:
        ValueError: the name is unknown.
        DataError: files are missing, damaged, another data set's or not available, or
            the library that reads them is missing or broken; it says what to do.

    Examples:
        >>> train, validation, test = load("digits")
        >>> train.images.shape, train.images.dtype, len(test.labels)
        (torch.Size([1297, 784]), torch.uint8, 250)
    """
    folder = _folder(name, root)
    if name == "digits":
        return _load_digits()
    try:
        return _load_family(name, folder, download)
    except (OSError, ValueError) as error:  # ValueError: not a valid path
        raise DataError(f"cannot load {name} from {folder}: {error}") from error


def join_validation(splits: Splits) -> Splits:
    """Add the validation split to the training split, for the final training after all
    choices are made.

    Args:
        splits: as `load` returns them; they do not change.

    Returns:
        Splits: new ones, with an empty validation split.

    Examples:
        >>> splits = join_validation(load("digits"))
        >>> [len(split.labels) for split in splits]
        [1547, 0, 250]
    """
    train, validation, test = splits
    joined = Split(*(torch.cat(pair) for pair in zip(train, validation, strict=True)))
    return Splits(joined, Split(*(t[:0] for t in validation)), test)


def find(name: str, root: str | os.PathLike[str] | None = None) -> bool:
    """Return whether any file of a data set is on disk, without reading it.

    Packed files directly in root count for the whole family, since their names do not
    identify the set.

    Args:
        name: one of `NAMES`; "digits" is found if scikit-learn is installed.
        root: as in `load`.

    Returns:
        bool: whether `load(name, root)` would find files, intact or damaged.

    Raises:
        ValueError: the name is unknown.

    Examples:
        >>> find("mnist", root="/nowhere")
        False
    """
    try:
        folder = _folder(name, root)
        if name == "digits":
            return importlib.util.find_spec("sklearn") is not None
        return bool(_locate(name, folder))
    except (OSError, DataError):  # a folder without permission, or of no user
        return False


def scale(
    images: Tensor,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Scale bytes to [0, 1]: images / 255.

    Args:
        images: uint8, any shape.
        dtype: floating-point type of the result.
        device: of the result; that of the images if None.

    Returns:
        Tensor: of the shape of images.

    Raises:
        TypeError: images is not a uint8 tensor, or dtype not a floating-point type.

    Examples:
        >>> scale(torch.tensor([0, 51, 255], dtype=torch.uint8))
        tensor([0.0000, 0.2000, 1.0000])
    """
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images: expected a torch.uint8 tensor, got {got}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")
    # Bytes are moved, which are a quarter of the size of float32.
    return images.to(device).to(dtype).div_(255)


def default_root() -> Path:
    """Return `$TORCHBP_DATA`, else `$XDG_CACHE_HOME/torchbp`, else `~/.cache/torchbp`.

    Examples:
        >>> default_root().is_absolute()
        True
    """
    if chosen := os.environ.get("TORCHBP_DATA"):
        return Path(chosen).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification requires that relative paths are ignored.
    return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "torchbp"


def _folder(name: str, root: str | os.PathLike[str] | None) -> Path:
    """Check the name of a data set and return the folder of its files."""
    if name not in NAMES:
        raise ValueError(f"name: expected one of {', '.join(NAMES)}, got {name!r}")
    if root is not None and "\0" in os.fsdecode(root):
        raise DataError(f"root: expected a folder, got {root!r}")
    try:
        return default_root() if root is None else Path(root).expanduser()
    except RuntimeError as error:  # ~ of an unknown user
        place = "~/.cache" if root is None else root
        raise DataError(f"root: expected a folder, got {place}: {error}") from error


def _load_family(name: str, root: Path, download: bool) -> Splits:
    """Load MNIST, Fashion-MNIST or KMNIST; download missing files if allowed."""
    if root.exists() and not root.is_dir():
        raise DataError(f"root: expected a folder, got the file {root}")
    located = _locate(name, root)
    missing = [file for file in _FILES if file not in located]
    for path in (path for file in missing for path, _ in _candidates(name, root, file)):
        # A download would replace it, unless another process has just done so.
        if os.path.lexists(path) and not path.is_file():
            got = "a folder" if path.is_dir() else "a link to nothing or a device"
            raise DataError(f"{path}: expected a file, got {got}; move or remove it")
    if missing and not download:
        state = f"lacks {len(missing)} of 4 files" if located else "holds no file"
        if not root.exists():
            state = "does not exist and holds no file"
        raise DataError(f"{root} {state} of {name}: {_remedy(name, root, missing)}")
    dataset = _dataset_class(name)
    with tempfile.TemporaryDirectory(prefix="torchbp-") as scratch:
        raw = Path(scratch, dataset.__name__, "raw")
        raw.mkdir(parents=True)
        for file, path in located.items():
            (raw / file).write_bytes(_verified(path, file, name, dataset))
        if missing:
            _download(name, root, missing, dataset)
        for file in missing:
            path = _home(name, root) / f"{file}.gz"
            (raw / file).write_bytes(_verified(path, file, name, dataset))
        images, labels = _read(dataset, scratch, "train")
        test = Split(*_read(dataset, scratch, "t10k"))
    n = len(images) - _VALIDATION
    train = Split(images[:n], labels[:n])
    return Splits(train, Split(images[n:], labels[n:]), test)


def _read(dataset: Any, root: str, part: str) -> tuple[Tensor, Tensor]:
    """Read the images and labels of verified files through torchvision."""
    try:
        stored = dataset(root, train=part == "train", download=False)
        images, labels = stored.data, stored.targets
    except Exception as error:  # which one depends on torchvision's version
        raise DataError(_torchvision_advice(f"failed to read {part}", error)) from error
    n = _COUNTS[part]
    if images.shape != (n, 28, 28) or labels.shape != (n,):
        raise DataError(
            f"expected {part} images ({n}, 28, 28) and labels ({n},) from torchvision, "
            f"got {tuple(images.shape)} and {tuple(labels.shape)}"
        )
    return images.reshape(n, 784), labels.to(torch.int64)


def _locate(name: str, root: Path) -> dict[str, Path]:
    """Return the paths of a data set's files that exist, by file; if packed, their
    checksums are yet to be verified."""
    located: dict[str, Path] = {}
    for file in _FILES:
        for path, is_certain in _candidates(name, root, file):
            if is_certain and path.is_file():
                located.setdefault(file, path)
    return located


def _candidates(name: str, root: Path, file: str) -> list[tuple[Path, bool]]:
    """Return the paths that a file may have, in order of preference, and whether a file
    at each can be identified; .gz before unpacked, because of the checksum."""
    folders = root / _CLASSES[name] / "raw", root, root / "raw"
    names = file, file.replace("-idx", ".idx")
    return [
        (folder / f"{other}{ending}", bool(ending) or _is_certain(name, folder))
        for folder in folders
        for ending in (".gz", "")
        for other in names
    ]


def _is_certain(name: str, folder: Path) -> bool:
    """Return whether unpacked files in a folder can be identified as the data set's: by
    their checksums, which MNIST's have, or by the folder's name."""
    ends = (Path(end(folder)) for end in (os.path.abspath, os.path.realpath))
    owners = [(end.parent if end.name == "raw" else end).name for end in ends]
    plain = {"".join(filter(str.isalnum, owner)).lower() for owner in owners}
    return name == "mnist" or not plain.isdisjoint({name, _CLASSES[name].lower()})


def _uncertain(name: str, root: Path, files: list[str]) -> str:
    """Return a hint about a file that may be another set's, or ""."""
    for path in (path for file in files for path, _ in _candidates(name, root, file)):
        if path.is_file():
            return (
                f" ({path} may be another set's: unpacked files count in a folder "
                f"called {_CLASSES[name]})"
            )
    return ""


def _home(name: str, root: Path) -> Path:
    """Return the folder for downloads in torchvision's layout; root may be an inner
    folder of it."""
    folder = Path(os.path.abspath(root))
    if folder.parts[-2:] == (_CLASSES[name], "raw"):
        return root
    is_inside = folder.name == _CLASSES[name]
    return root / "raw" if is_inside else root / _CLASSES[name] / "raw"


def _remedy(name: str, root: Path, files: list[str]) -> str:
    """Return which files are needed where, and what works without them."""
    gz = ", ".join(f"{file}.gz" for file in files)
    return (
        f"put {gz} into {_home(name, root)}{_uncertain(name, root, files)}, or use the "
        'digits, which work offline: load("digits"), --dataset digits'
    )


def _verified(path: Path, file: str, name: str, dataset: Any) -> bytes:
    """Return the unpacked bytes of a file after all checks."""
    n = _COUNTS[file.split("-")[0]]
    shape = (n, 28, 28) if "images" in file else (n,)
    header = struct.pack(f">{1 + len(shape)}i", 2048 + len(shape), *shape)
    size = len(header) + math.prod(shape)
    if path.suffix == ".gz":
        content = _gunzipped(path, size, dict(dataset.resources)[f"{file}.gz"])
    else:
        content = _plain(path, size, _MNIST_UNPACKED_MD5.get(file), name == "mnist")
    start, numbers = content[: len(header)], content[len(header) :]
    if start != header:
        raise _damaged(path, f"the IDX header {header.hex()}", start.hex())
    if "labels" in file and max(numbers, default=0) > 9:
        raise _damaged(path, "labels in 0..9", f"{max(numbers)}")
    return content


def _plain(path: Path, size: int, mnist_md5: str | None, is_mnist: bool) -> bytes:
    """Read an unpacked file of the right size; its MD5 tells MNIST from other sets."""
    if path.stat().st_size != size:  # before a file of any size is read
        raise _damaged(path, f"{size} bytes", f"{path.stat().st_size}")
    with path.open("rb") as stream:
        content = stream.read(size + 1)
    if len(content) != size:  # changed meanwhile
        raise _damaged(path, f"{size} bytes", f"{len(content)} or more")
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if mnist_md5 and (md5 == mnist_md5) != is_mnist:
        other = "" if is_mnist else "other than MNIST's "
        raise _damaged(path, f"MD5 {other}{mnist_md5}", md5)
    return content


def _gunzipped(path: Path, size: int, expected: str) -> bytes:
    """Unpack a .gz file of the right MD5, of which a bounded number of bytes is
    read."""
    # Deflate adds at most 5 bytes to each 16 KB of incompressible data.
    largest = size + size // 1024 + _GZ_EXTRA
    with path.open("rb") as file:
        packed = file.read(largest + 1)
    if len(packed) > largest:
        raise _damaged(path, f"at most {largest} bytes", f"{path.stat().st_size}")
    md5 = hashlib.md5(packed, usedforsecurity=False).hexdigest()
    if md5 != expected:
        got = f"{md5} ({len(packed)} bytes{_owner(md5)})"
        raise _damaged(path, f"MD5 {expected}", got)
    try:  # the checked bytes, since the file may change
        with gzip.open(io.BytesIO(packed), "rb") as stream:
            content = stream.read(size + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked: {error}") from error
    if len(content) != size:
        got = "more" if len(content) > size else f"{len(content)}"
        raise _damaged(path, f"{size} bytes unpacked", got)
    return content


def _owner(md5: str) -> str:
    """Return the name of the family's file with this MD5, for a message, or ""."""
    for dataset in map(_dataset_class, _CLASSES):
        for file, known in dataset.resources:
            if md5 == known:
                return f", the {file} of {dataset.__name__}"
    return ""


def _damaged(path: Path, expected: str, got: str) -> DataError:
    """Return the error about a damaged file, which the user has to remove."""
    return DataError(
        f"{path} is damaged or not the right file: expected {expected}, got {got}; "
        "move or remove it, and load again to download it"
    )


def _download(name: str, root: Path, files: list[str], dataset: Any) -> None:
    """Download files into root; each appears complete and verified or not at all."""
    mirrors = _reachable_mirrors(name, root, files, dataset)
    raw = _home(name, root)
    try:
        raw.mkdir(parents=True, exist_ok=True)
        # In root, since os.replace is atomic only within a file system.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as scratch:
            for file in files:
                _fetch(f"{file}.gz", mirrors, scratch, dataset)
                os.replace(Path(scratch, f"{file}.gz"), raw / f"{file}.gz")
    except OSError as error:
        remedy = _remedy(name, root, files)
        raise DataError(f"cannot download into {root}: {error}; {remedy}") from error


def _fetch(file: str, mirrors: list[str], folder: str, dataset: Any) -> None:
    """Download a file with torchvision from the first mirror with the right MD5."""
    utils = _import("torchvision.datasets.utils")
    md5, failures = dict(dataset.resources)[file], []
    for mirror in mirrors:
        try:
            with _socket_timeout(_STALL_SECONDS):
                utils.download_url(mirror + file, folder, file, md5)
            return
        except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
            failures.append(f"{mirror}{file}: {error or type(error).__name__}")
            if isinstance(error, urllib.error.HTTPError):
                error.close()
    raise DataError(f"no mirror gave {file} with MD5 {md5}: {'; '.join(failures)}")


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Set the default time-out of sockets, since torchvision's downloads set none."""
    with _TIMEOUT_LOCK:
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(seconds)
        try:
            yield
        finally:
            socket.setdefaulttimeout(before)


def _reachable_mirrors(
    name: str, root: Path, files: list[str], dataset: Any
) -> list[str]:
    """Return the mirrors, the first to answer first; raise DataError if none does."""
    answers: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()

    def probe(mirror: str) -> None:
        """Request a file, and report the mirror and its failure or ""."""
        headers = {"User-Agent": "torchbp"}
        try:
            request = urllib.request.Request(f"{mirror}{files[-1]}.gz", headers=headers)
            with urllib.request.urlopen(request, timeout=_PROBE_SECONDS):
                answers.put((mirror, ""))
        except Exception as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            answers.put((mirror, str(error) or type(error).__name__))

    # getaddrinfo ignores time-outs: hence threads. It may never return: hence daemons.
    silent = dict.fromkeys(dataset.mirrors, f"no answer in {_PROBE_SECONDS:g} s")
    for mirror in silent:
        threading.Thread(target=probe, args=(mirror,), daemon=True).start()
    deadline = time.monotonic() + _PROBE_SECONDS
    for _ in range(len(silent)):
        try:
            mirror, failure = answers.get(timeout=max(0, deadline - time.monotonic()))
        except queue.Empty:
            break
        if not failure:
            return [mirror, *(other for other in silent if other != mirror)]
        silent[mirror] = failure
    reasons = "; ".join(f"{mirror}: {why}" for mirror, why in silent.items())
    raise DataError(f"cannot download {name} ({reasons}): {_remedy(name, root, files)}")


def _dataset_class(name: str) -> Any:
    """Return torchvision's class of a data set."""
    datasets = _import("torchvision.datasets")
    return getattr(datasets, _CLASSES[name])


def _torchvision_advice(event: str, error: Exception) -> str:
    """Return the message about a failure of torchvision, and the fix."""
    return (
        f"torchvision {event} ({type(error).__name__}: {error}); it must fit torch "
        f"{torch.__version__}: pip install --upgrade torch torchvision, or use the "
        'digits, which need none: load("digits"), --dataset digits'
    )


def _import(module: str) -> Any:
    """Import a module of torchvision; raise DataError if that fails in any way."""
    try:
        return importlib.import_module(module)
    except Exception as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "torchvision"
        event = "is not installed" if absent else "cannot be imported"
        raise DataError(_torchvision_advice(event, error)) from error


def _load_digits() -> Splits:
    """Load scikit-learn's digits, laid out like MNIST, in a fixed order."""
    try:
        import numpy as np
        from sklearn.datasets import load_digits
    except Exception as error:
        fix = "pip install --upgrade scikit-learn"
        raise DataError(f"digits need scikit-learn ({error}): {fix}") from error
    pixels, classes = load_digits(return_X_y=True)
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(pixels)))
    images = _enlarged(torch.from_numpy(pixels).float().view(-1, 8, 8)[order])
    labels = torch.from_numpy(classes).to(torch.int64)[order]
    bounds = pairwise(_DIGITS_BOUNDS)
    return Splits(*(Split(images[a:b], labels[a:b]) for a, b in bounds))


def _enlarged(images: Tensor) -> Tensor:
    """Return 8x8 images of 0..16 in MNIST's layout: scaled to 20x20, with the centre of
    mass in the middle of 28x28."""
    box = torch.nn.functional.interpolate(images[:, None], (20, 20), mode="bicubic")
    box = box[:, 0].clamp(0, 16).mul(255 / 16).round()  # (n, 20, 20)
    mass = box.sum((1, 2)).clamp(min=1)
    # With the device and dtype of the images, not torch's defaults.
    steps = torch.arange(20, device=box.device)
    grid = steps.to(box.dtype)
    # Clamped to keep the box inside.
    top = (13.5 - box.sum(2) @ grid / mass).round().clamp(0, 8).long()
    left = (13.5 - box.sum(1) @ grid / mass).round().clamp(0, 8).long()
    rows = (top[:, None] + steps)[:, :, None]  # (n, 20, 1)
    columns = (left[:, None] + steps)[:, None, :]  # (n, 1, 20)
    canvas = box.new_zeros(len(box), 28 * 28, dtype=torch.uint8)
    return canvas.scatter_(1, (28 * rows + columns).flatten(1), box.byte().flatten(1))
