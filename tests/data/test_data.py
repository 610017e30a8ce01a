"""data: what loads is what the files hold, and whatever is amiss is a DataError."""

import gzip
import hashlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import bounds
import processes
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchbp.data import sets as data

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
COUNTS = {"train": 20, "t10k": 6}
VALIDATION = 5
RAW = {
    "mnist": Path("MNIST", "raw"),
    "fashion": Path("FashionMNIST", "raw"),
    "kmnist": Path("KMNIST", "raw"),
}
CLASSES = {name: raw.parts[0] for name, raw in RAW.items()}
CLASS = "CLASS"  # stands for one of them
REPOSITORY = Path(__file__).parents[2]

fuzz = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def pack(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def synthetic(seed: int) -> dict[str, bytes]:
    """The four IDX files of a small dataset, unpacked."""
    generator = torch.Generator().manual_seed(seed)
    files = {}
    for part, n in COUNTS.items():
        images = torch.randint(256, (n * 784,), generator=generator)
        labels = torch.randint(10, (n,), generator=generator)
        header = struct.pack(">4i", 2051, n, 28, 28)
        files[f"{part}-images-idx3-ubyte"] = header + bytes(images.tolist())
        header = struct.pack(">2i", 2049, n)
        files[f"{part}-labels-idx1-ubyte"] = header + bytes(labels.tolist())
    return files


@dataclass
class Family:
    """Small stand-ins for the three datasets, which torchvision's classes know."""

    files: dict[str, dict[str, bytes]]
    monkeypatch: pytest.MonkeyPatch
    gz: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def register(self, name: str, gz: dict[str, bytes]) -> None:
        """Makes torchvision expect these .gz files."""
        import torchvision.datasets

        self.gz[name] = gz
        cls = getattr(torchvision.datasets, CLASSES[name])
        resources = [(f"{file}.gz", md5(gz[file])) for file in FILES]
        self.monkeypatch.setattr(cls, "resources", resources)

    def mirrors(self, name: str, *mirrors: str) -> None:
        import torchvision.datasets

        cls = getattr(torchvision.datasets, CLASSES[name])
        self.monkeypatch.setattr(cls, "mirrors", list(mirrors))

    def know_unpacked(self) -> dict[str, str]:
        """Registers the checksums of the unpacked MNIST, and returns them."""
        known = {file: md5(content) for file, content in self.files["mnist"].items()}
        self.monkeypatch.setattr(data, "_MNIST_UNPACKED_MD5", known)
        return known

    def write(
        self,
        folder: Path,
        name: str = "mnist",
        packed: bool = True,
        dotted: bool = False,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for file in FILES:
            path = folder / (file.replace("-idx", ".idx") if dotted else file)
            if packed:
                path = path.with_name(f"{path.name}.gz")
                path.write_bytes(self.gz[name][file])
            else:
                path.write_bytes(self.files[name][file])

    def check(self, splits: data.Splits, name: str = "mnist") -> None:
        """Compares splits with what was put into the files."""
        files = self.files[name]
        images = {p: files[f"{p}-images-idx3-ubyte"][16:] for p in COUNTS}
        labels = {p: files[f"{p}-labels-idx1-ubyte"][8:] for p in COUNTS}
        cut = COUNTS["train"] - VALIDATION
        expected = (
            (images["train"][: cut * 784], labels["train"][:cut]),
            (images["train"][cut * 784 :], labels["train"][cut:]),
            (images["t10k"], labels["t10k"]),
        )
        for split, (pixels, classes) in zip(splits, expected, strict=True):
            assert split.images.dtype == torch.uint8
            assert split.images.shape == (len(classes), 784)
            assert bytes(split.images.flatten().tolist()) == pixels
            assert split.labels.dtype == torch.int64
            assert split.labels.tolist() == list(classes)


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Family:
    monkeypatch.setattr(data, "_COUNTS", COUNTS)
    monkeypatch.setattr(data, "_VALIDATION", VALIDATION)
    monkeypatch.setattr(data, "_MNIST_UNPACKED_MD5", {})
    monkeypatch.delenv("TORCHBP_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    family = Family({n: synthetic(i) for i, n in enumerate(RAW)}, monkeypatch)
    for name, files in family.files.items():
        family.register(name, {file: pack(files[file]) for file in FILES})
        family.mirrors(name)
    return family


class Server(ThreadingHTTPServer):
    """Serves bytes on 127.0.0.1; paths in `stalled` get a beginning and no end."""

    def __init__(self, contents: dict[str, bytes]) -> None:
        self.contents = contents
        self.asked: list[str] = []
        self.stalled: set[str] = set()
        self.released = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"

    def handle_error(self, *_: object) -> None:
        """Clients that hang up early are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        file = self.path.lstrip("/")
        self.server.asked.append(file)
        if file not in self.server.contents:
            self.send_error(404)
            return
        content = self.server.contents[file]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if file in self.server.stalled:
            self.wfile.write(content[:10])
            self.wfile.flush()
            self.server.released.wait(30)
            return
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Silence."""


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    running: list[tuple[Server, threading.Thread]] = []

    def start(contents: dict[str, bytes]) -> Server:
        server = Server({f"{file}.gz": c for file, c in contents.items()})
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        running.append((server, thread))
        return server

    yield start
    for server, thread in running:
        server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/"


def snapshot(root: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden files too."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
        for path in root.rglob("*")
    }


def refused(name: str, root: Path, download: bool = False) -> str:
    """The one-line message of the DataError that loading must end in."""
    with pytest.raises(data.DataError) as caught:
        data.load(name, root, download=download)
    message = str(caught.value)
    assert message and len(message.splitlines()) == 1
    return message


# Names, roots, scale


@pytest.mark.parametrize("function", [data.load, data.find])
@pytest.mark.parametrize("name", ["", "MNIST", "cifar10", None])
def test_unknown_name(function: Callable[..., object], name: str) -> None:
    with pytest.raises(ValueError, match=r"mnist.*fashion.*kmnist.*digits") as caught:
        function(name)
    assert repr(name) in str(caught.value)


def test_default_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHBP_DATA", str(tmp_path / "chosen"))
    assert data.default_root() == tmp_path / "chosen"
    monkeypatch.delenv("TORCHBP_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data.default_root() == tmp_path / "torchbp"
    for ignored in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert data.default_root() == Path.home() / ".cache" / "torchbp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data.default_root() == Path.home() / ".cache" / "torchbp"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 784), (), (7,), (3, 28, 28)])
def test_scale(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    images = torch.randint(256, shape, dtype=torch.uint8)
    before = images.clone()
    scaled = data.scale(images, dtype)
    assert scaled.dtype == dtype
    assert torch.equal(scaled, images.to(dtype) / 255)
    assert torch.equal(images, before)


def test_scale_ends_and_device() -> None:
    assert data.scale(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [0, 1]
    images = torch.zeros(2, 3, dtype=torch.uint8)
    assert data.scale(images, device="meta").device.type == "meta"


@pytest.mark.parametrize("images", [torch.zeros(2), torch.zeros(2).long(), [1, 2]])
def test_scale_refuses_what_is_not_uint8(images: object) -> None:
    came = images.dtype if isinstance(images, torch.Tensor) else "list"
    with pytest.raises(TypeError, match=rf"torch\.uint8.*{came}"):
        data.scale(images)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"floating-point.*torch\.int32"):
        data.scale(torch.zeros(2, dtype=torch.uint8), torch.int32)


def test_error_is_one_line() -> None:
    assert str(data.DataError("a\nb\r\nc\u2028d")) == "a b c d"


# digits


def test_digits_are_the_permuted_set() -> None:
    np = pytest.importorskip("numpy")
    labels = pytest.importorskip("sklearn.datasets").load_digits().target
    splits = data.load("digits", download=False)
    assert [len(split.images) for split in splits] == [1297, 250, 250]
    for split in splits:
        assert split.images.shape[1:] == (784,)
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
    order = np.random.RandomState(0).permutation(1797)
    together = torch.cat([split.labels for split in splits])
    assert together.tolist() == labels[order].tolist()


def test_digits_are_laid_out_like_mnist() -> None:
    pixels = torch.cat([split.images for split in data.load("digits")])
    ink = pixels.view(-1, 28, 28).double()
    grid = torch.arange(28.0, dtype=torch.float64)
    mass = ink.sum((1, 2))
    for axis in (1, 2):
        centre = ink.sum(3 - axis) @ grid / mass
        assert (centre - 13.5).abs().max() <= 0.5
        used = ink.amax(3 - axis) > 0  # (n, 28)
        first = used.int().argmax(1)
        last = 27 - used.flip(1).int().argmax(1)
        assert (last - first).max() <= 19
    assert pixels.max() == 255


def test_enlarged_keeps_all_ink_wherever_it_lies() -> None:
    corners = torch.zeros(5, 8, 8)
    for i, (row, column) in enumerate([(0, 0), (0, 7), (7, 0), (7, 7)]):
        corners[i, row, column] = 16
    enlarged = data._enlarged(corners).view(5, 28, 28).long()
    sums = enlarged.sum((1, 2))
    assert sums[0] > 0
    assert sums[:4].tolist() == [sums[0]] * 4
    assert torch.equal(enlarged[0], enlarged[3].flip(0, 1))
    assert sums[4] == 0


def test_digits_are_the_same_each_time_and_quick() -> None:
    first = data.load("digits")
    start = time.perf_counter()
    second = data.load("digits")
    assert time.perf_counter() - start < 1
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("default", [torch.float64, "meta"])
def test_torch_defaults_do_not_matter(
    family: Family, tmp_path: Path, default: torch.dtype | str
) -> None:
    family.write(tmp_path)
    dtype = torch.get_default_dtype()
    try:
        if isinstance(default, str):
            torch.set_default_device(default)
        else:
            torch.set_default_dtype(default)
        loaded = data.load("digits"), data.load("mnist", tmp_path)
        scaled = data.scale(loaded[0].test.images)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)
    assert torch.equal(loaded[0].test.images, data.load("digits").test.images)
    assert scaled.dtype == torch.float32
    family.check(loaded[1])


def run(script: str, *paths: Path) -> "subprocess.CompletedProcess[str]":
    path = os.pathsep.join(map(str, (*paths, REPOSITORY)))
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=processes.LIMIT,
    )


def test_heavy_imports_wait_and_digits_need_no_torchvision(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    fault = 'raise RuntimeError("operator torchvision::nms\\ndoes not exist")'
    (tmp_path / "torchvision" / "__init__.py").write_text(fault)
    script = """
import sys
from torchbp.data import sets as data
assert not {"torchvision", "sklearn"} & set(sys.modules)
assert data.find("mnist", "absent") is False
assert len(data.load("digits").train.labels) == 1297
assert "torchvision" not in sys.modules
try:
    data.load("mnist", "absent")
except data.DataError as error:
    print(error)
"""
    ended = run(script, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "nms does not exist" in ended.stdout
    assert "pip install --upgrade torch torchvision" in ended.stdout
    assert ended.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (RuntimeError("operator torchvision::nms does not exist"), "nms"),
        (ImportError("undefined symbol"), "undefined symbol"),
        (AttributeError("no attribute 'extension'"), "extension"),
        (OSError("libcudart.so: no such file"), "libcudart"),
        (ModuleNotFoundError("No module", name="torchvision"), "not installed"),
        (ModuleNotFoundError("No module named 'PIL'", name="PIL"), "PIL"),
    ],
)
def test_unfit_torchvision(
    family: Family, tmp_path: Path, fault: Exception, says: str
) -> None:
    def fail(module: str) -> None:
        raise fault

    family.write(tmp_path / RAW["mnist"])
    family.monkeypatch.setattr(data.importlib, "import_module", fail)
    message = refused("mnist", tmp_path)
    assert says in message
    assert "pip install --upgrade torch torchvision" in message


def test_missing_sklearn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(data.DataError, match="pip install --upgrade scikit-learn"):
        data.load("digits")


# Files that are whole


@pytest.mark.parametrize("name", list(RAW))
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dotted", [True, False])
@pytest.mark.parametrize("deeper", [".", CLASS, f"{CLASS}/raw"])
def test_layouts(
    family: Family, tmp_path: Path, name: str, packed: bool, dotted: bool, deeper: str
) -> None:
    """A root in torchvision's layout, or one of its inner folders."""
    family.write(tmp_path / RAW[name], name, packed, dotted)
    root = tmp_path / deeper.replace(CLASS, CLASSES[name])
    before = snapshot(tmp_path)
    assert data.find(name, root)
    family.check(data.load(name, str(root), download=False), name)
    family.check(data.load(name, root), name)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", list(RAW))
@pytest.mark.parametrize("dotted", [True, False])
@pytest.mark.parametrize("folder", [".", "raw"])
def test_packed_files_in_a_folder_of_any_name(
    family: Family, tmp_path: Path, name: str, dotted: bool, folder: str
) -> None:
    family.write(tmp_path / folder, name, dotted=dotted)
    assert data.find(name, tmp_path)
    family.check(data.load(name, tmp_path), name)


@pytest.mark.parametrize("dotted", [True, False])
@pytest.mark.parametrize("folder", [".", "raw"])
def test_unpacked_mnist_in_a_folder_of_any_name(
    family: Family, tmp_path: Path, dotted: bool, folder: str
) -> None:
    family.know_unpacked()
    family.write(tmp_path / folder, packed=False, dotted=dotted)
    assert data.find("mnist", tmp_path)
    family.check(data.load("mnist", tmp_path))


@pytest.mark.parametrize("folder", [".", "raw", "MNIST/raw", "KMNIST", "KMNIST/raw"])
def test_unpacked_files_of_a_set_that_is_not_certain(
    family: Family, tmp_path: Path, folder: str
) -> None:
    """KMNIST's files have the names and sizes of Fashion-MNIST's."""
    family.write(tmp_path / folder, "kmnist", packed=False)
    for root in (tmp_path, tmp_path / folder):
        assert not data.find("fashion", root)
        for download in (True, False):
            refused("fashion", root, download)
    message = refused("fashion", tmp_path / folder)
    assert "unpacked files count in a folder called FashionMNIST" in message
    assert str(tmp_path / folder / FILES[0]) in message


@pytest.mark.parametrize(
    "folder", ["fashion", "fashion-mnist", "Fashion_MNIST/raw", "KMNIST/FashionMNIST"]
)
def test_a_folder_s_name_says_whose_unpacked_files_are(
    family: Family, tmp_path: Path, folder: str
) -> None:
    family.write(tmp_path / folder, "fashion", packed=False)
    family.check(data.load("fashion", tmp_path / folder), "fashion")
    assert not data.find("kmnist", tmp_path / folder)


def test_the_current_folder_and_links_have_names_as_well(
    family: Family, tmp_path: Path
) -> None:
    family.write(tmp_path / RAW["kmnist"], "kmnist", packed=False)
    family.monkeypatch.chdir(tmp_path / RAW["kmnist"])
    family.check(data.load("kmnist", "."), "kmnist")
    family.check(data.load("kmnist", ".."), "kmnist")
    (tmp_path / "link").symlink_to(tmp_path / "KMNIST")
    family.check(data.load("kmnist", tmp_path / "link"), "kmnist")
    family.write(tmp_path / "store", "fashion", packed=False)
    (tmp_path / "FashionMNIST").symlink_to(tmp_path / "store")
    family.check(data.load("fashion", tmp_path / "FashionMNIST"), "fashion")


def test_files_may_lie_in_several_of_the_places(family: Family, tmp_path: Path) -> None:
    family.write(tmp_path)
    for file, folder in zip(FILES, ["raw", ".", RAW["mnist"], "raw"], strict=True):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        name = f"{file}.gz".replace("-idx", ".idx")
        (tmp_path / f"{file}.gz").rename(tmp_path / folder / name)
    family.check(data.load("mnist", tmp_path))


@pytest.mark.parametrize("deeper", [".", CLASS, f"{CLASS}/raw"])
def test_a_download_completes_torchvision_s_layout(
    family: Family, serve: Callable[..., Server], tmp_path: Path, deeper: str
) -> None:
    """No MNIST/raw inside MNIST/raw, whichever of its folders is the root."""
    server = serve(family.gz["mnist"])
    family.mirrors("mnist", server.url)
    family.write(tmp_path / RAW["mnist"])
    missing = f"{FILES[2]}.gz"
    whole = snapshot(tmp_path)
    (tmp_path / RAW["mnist"] / missing).unlink()
    root = tmp_path / deeper.replace(CLASS, "MNIST")
    family.check(data.load("mnist", root))
    assert set(server.asked) == {missing}
    assert snapshot(tmp_path) == whole


def test_packed_and_unpacked_files_may_be_mixed(family: Family, tmp_path: Path) -> None:
    raw = tmp_path / RAW["mnist"]
    family.write(raw)
    (raw / f"{FILES[0]}.gz").unlink()
    (raw / FILES[0]).write_bytes(family.files["mnist"][FILES[0]])
    (raw / FILES[1]).write_bytes(b"ignored: the .gz has a checksum")
    family.check(data.load("mnist", tmp_path, download=False))


def test_own_folder_goes_before_flat_files(family: Family, tmp_path: Path) -> None:
    family.write(tmp_path, "mnist")
    family.write(tmp_path / RAW["fashion"], "fashion", packed=False)
    family.check(data.load("fashion", tmp_path, download=False), "fashion")
    family.check(data.load("mnist", tmp_path, download=False), "mnist")


def test_default_root_is_used(family: Family) -> None:
    assert not data.find("mnist")
    family.write(data.default_root() / RAW["mnist"])
    assert data.find("mnist")
    family.check(data.load("mnist", download=False))


def test_read_only_root(family: Family, tmp_path: Path) -> None:
    raw = tmp_path / RAW["mnist"]
    family.write(raw)
    raw.chmod(0o500)
    try:
        family.check(data.load("mnist", tmp_path))
    finally:
        raw.chmod(0o700)


# Files that are absent, damaged, or another's


def test_nothing_found(family: Family, tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "absent"):
        assert not data.find("kmnist", root)
        message = refused("kmnist", root)
        assert str(root / RAW["kmnist"]) in message
        assert all(f"{file}.gz" in message for file in FILES)
        assert 'load("digits")' in message and "--dataset digits" in message
    assert "does not exist" in message
    assert snapshot(tmp_path) == {}


def test_root_is_a_file(family: Family, tmp_path: Path) -> None:
    root = tmp_path / "file"
    root.write_bytes(b"")
    assert not data.find("mnist", root)
    for download in (True, False):
        assert f"the file {root}" in refused("mnist", root, download)


def test_some_files_missing(family: Family, tmp_path: Path) -> None:
    family.write(tmp_path / RAW["mnist"])
    for file in FILES[1:3]:
        (tmp_path / RAW["mnist"] / f"{file}.gz").unlink()
    assert data.find("mnist", tmp_path)
    message = refused("mnist", tmp_path)
    assert "lacks 2 of 4" in message
    for i, file in enumerate(FILES):
        assert (f"{file}.gz" in message) == (i in (1, 2))


@pytest.mark.parametrize("file", FILES)
def test_truncated_gz(family: Family, tmp_path: Path, file: str) -> None:
    family.write(tmp_path / RAW["mnist"])
    path = tmp_path / RAW["mnist"] / f"{file}.gz"
    whole = family.gz["mnist"][file]
    path.write_bytes(whole[:-9])
    before = snapshot(tmp_path)
    for download in (True, False):
        message = refused("mnist", tmp_path, download)
        assert str(path) in message
        assert md5(whole) in message and md5(whole[:-9]) in message
        assert f"{len(whole) - 9} bytes" in message
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("change", [-1, 1])
def test_unpacked_size(family: Family, tmp_path: Path, file: str, change: int) -> None:
    family.write(tmp_path, packed=False)
    size = (tmp_path / file).stat().st_size
    os.truncate(tmp_path / file, size + change)
    message = refused("mnist", tmp_path)
    assert str(tmp_path / file) in message
    assert f"expected {size} bytes, got {size + change}" in message


def test_sibling_is_named(family: Family, tmp_path: Path) -> None:
    family.write(tmp_path, "fashion")
    assert f"the {FILES[0]}.gz of FashionMNIST" in refused("mnist", tmp_path)


def test_unpacked_mnist_has_checksums(family: Family, tmp_path: Path) -> None:
    known = family.know_unpacked()
    folder = tmp_path / "fashion"
    family.write(folder, "mnist", packed=False)
    family.check(data.load("mnist", folder, download=False))
    assert "other than MNIST's" in refused("fashion", folder)
    family.write(folder, "fashion", packed=False)
    family.check(data.load("fashion", folder, download=False), "fashion")
    assert known[FILES[0]] in refused("mnist", folder)


def test_label_out_of_range(family: Family, tmp_path: Path) -> None:
    family.write(tmp_path, packed=False)
    path = tmp_path / FILES[3]
    path.write_bytes(path.read_bytes()[:-1] + b"\x0a")
    assert f"{path} is damaged" in (message := refused("mnist", tmp_path))
    assert "labels in 0..9, got 10" in message


@pytest.mark.parametrize("extra", [1, 50_000_000])
def test_gz_that_unpacks_to_more(family: Family, tmp_path: Path, extra: int) -> None:
    bomb = pack(family.files["mnist"][FILES[0]] + bytes(extra))
    family.register("mnist", {**family.gz["mnist"], FILES[0]: bomb})
    family.write(tmp_path)
    assert "unpacked, got more" in refused("mnist", tmp_path)


def test_gz_that_unpacks_to_less(family: Family, tmp_path: Path) -> None:
    short = pack(family.files["mnist"][FILES[0]][:-1])
    family.register("mnist", {**family.gz["mnist"], FILES[0]: short})
    family.write(tmp_path)
    size = len(family.files["mnist"][FILES[0]])
    assert f"expected {size} bytes unpacked, got {size - 1}" in refused(
        "mnist", tmp_path
    )


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("word", [0, 1])
def test_header(
    family: Family, tmp_path: Path, packed: bool, file: str, word: int
) -> None:
    family.write(tmp_path)
    content = bytearray(family.files["mnist"][file])
    content[4 * word : 4 * word + 4] = b"\x7f\xff\xff\xff"
    if packed:
        family.register("mnist", {**family.gz["mnist"], file: pack(bytes(content))})
        family.write(tmp_path)
    else:
        (tmp_path / f"{file}.gz").unlink()
        (tmp_path / file).write_bytes(content)
    message = refused("mnist", tmp_path)
    assert str(tmp_path / file) in message
    assert "expected the IDX header 0000080" in message and "7fffffff" in message


def test_gz_that_cannot_be_unpacked(family: Family, tmp_path: Path) -> None:
    whole = family.gz["mnist"][FILES[0]]
    for broken in (b"no gzip", whole[:-20], whole[:10] + b"\xff" * 40):
        family.register("mnist", {**family.gz["mnist"], FILES[0]: broken})
        family.write(tmp_path)
        message = refused("mnist", tmp_path)
        assert f"{tmp_path / FILES[0]}.gz cannot be unpacked" in message


def test_folder_that_may_not_be_searched(family: Family, tmp_path: Path) -> None:
    def fail(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    family.write(tmp_path)
    family.monkeypatch.setattr(Path, "is_file", fail)
    assert not data.find("mnist", tmp_path)
    message = refused("mnist", tmp_path)
    assert f"cannot load mnist from {tmp_path}" in message
    assert "Permission denied" in message


def test_odd_results_of_torchvision(family: Family, tmp_path: Path) -> None:
    import torchvision.datasets

    family.write(tmp_path)
    results: list[object] = [(torch.zeros(3, 28, 28), torch.zeros(20)), None]
    for result, says in zip(results, ["(3, 28, 28)", "pip install"], strict=True):
        family.monkeypatch.setattr(
            torchvision.datasets.MNIST, "_load_data", lambda _, result=result: result
        )
        assert says in refused("mnist", tmp_path)


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A way to spoil a file: flipped bits, cut, prolonged, or another header."""
    kind = draw(st.sampled_from(["flip", "cut", "extend", "magic", "count"]))
    place = draw(st.floats(0, 1, exclude_max=True))
    bits = draw(st.integers(1, 255))
    tail = draw(st.binary(min_size=1, max_size=40))
    word = struct.pack(">I", draw(st.integers(0, 2**32 - 1)))

    def spoil(content: bytes) -> bytes:
        at = int(place * len(content))
        if kind == "flip":
            at = at if bits % 2 else at % 32
            flipped = bytes([content[at] ^ bits])
            return content[:at] + flipped + content[at + 1 :]
        if kind == "cut":
            return content[:at]
        if kind == "extend":
            return content + tail
        return (
            word + content[4:] if kind == "magic" else content[:4] + word + content[8:]
        )

    return spoil


def loads_whole_or_refuses(name: str, root: Path) -> bool:
    """Whether a root loads; anything but valid splits or a DataError fails the test."""
    try:
        splits = data.load(name, root, download=False)
    except data.DataError as error:
        assert len(str(error).splitlines()) == 1
        return False
    for split, n in zip(splits, (15, 5, 6), strict=True):
        assert split.images.shape == (n, 784)
        assert split.labels.shape == (n,)
        assert 0 <= int(split.labels.min()) <= int(split.labels.max()) <= 9
    return True


@fuzz
@given(spoil=damages(), file=st.sampled_from(FILES))
def test_fuzz_gz(
    family: Family, tmp_path: Path, spoil: Callable[[bytes], bytes], file: str
) -> None:
    family.write(tmp_path)
    whole = family.gz["mnist"][file]
    (tmp_path / f"{file}.gz").write_bytes(spoil(whole))
    assert loads_whole_or_refuses("mnist", tmp_path) == (spoil(whole) == whole)


@fuzz
@given(spoil=damages(), file=st.sampled_from(FILES), inside=st.booleans())
def test_fuzz_gz_of_matching_checksum(
    family: Family,
    tmp_path: Path,
    spoil: Callable[[bytes], bytes],
    file: str,
    inside: bool,
) -> None:
    plain = family.files["kmnist"][file]
    content = pack(spoil(plain)) if inside else spoil(pack(plain))
    packed = {f: pack(family.files["kmnist"][f]) for f in FILES}
    family.register("kmnist", {**packed, file: content})
    family.write(tmp_path, "kmnist")
    loads_whole_or_refuses("kmnist", tmp_path)


@fuzz
@given(spoil=damages(), file=st.sampled_from(FILES))
def test_fuzz_unpacked(
    family: Family, tmp_path: Path, spoil: Callable[[bytes], bytes], file: str
) -> None:
    family.write(tmp_path, packed=False)
    whole = family.files["mnist"][file]
    spoilt = spoil(whole)
    (tmp_path / file).write_bytes(spoilt)
    loaded = loads_whole_or_refuses("mnist", tmp_path)
    header = 16 if "images" in file else 8
    if len(spoilt) != len(whole) or spoilt[:header] != whole[:header]:
        assert not loaded


# Downloads, from 127.0.0.1 only


def test_download(family: Family, serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(family.gz["fashion"])
    family.mirrors("fashion", server.url)
    root = tmp_path / "new" / "root"
    before = socket.getdefaulttimeout()
    family.check(data.load("fashion", root), "fashion")
    assert socket.getdefaulttimeout() == before
    held = {str(RAW["fashion"] / f"{file}.gz") for file in FILES}
    assert {path for path, content in snapshot(root).items() if content} == held
    assert not list(root.glob(".download-*"))
    asked = len(server.asked)
    family.check(data.load("fashion", root), "fashion")
    assert len(server.asked) == asked


def test_only_missing_files_are_downloaded(
    family: Family, serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve(family.gz["mnist"])
    family.mirrors("mnist", server.url)
    family.write(tmp_path, packed=False)
    (tmp_path / FILES[2]).unlink()
    family.check(data.load("mnist", tmp_path))
    assert set(server.asked) == {f"{FILES[2]}.gz"}


def test_a_damaged_file_is_not_downloaded_over(
    family: Family, serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve(family.gz["mnist"])
    family.mirrors("mnist", server.url)
    (tmp_path / f"{FILES[3]}.gz").write_bytes(b"damaged")
    assert "damaged" in refused("mnist", tmp_path, download=True)
    assert (tmp_path / f"{FILES[3]}.gz").read_bytes() == b"damaged"
    assert server.asked == []


def test_second_mirror(
    family: Family, serve: Callable[..., Server], tmp_path: Path
) -> None:
    empty, wrong = serve({}), serve(dict.fromkeys(FILES, b"wrong"))
    right = serve(family.gz["mnist"])
    family.mirrors("mnist", closed_port(), empty.url, wrong.url, right.url)
    family.check(data.load("mnist", tmp_path))


def test_wrong_download_leaves_nothing(
    family: Family, serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve({**family.gz["mnist"], FILES[1]: family.gz["mnist"][FILES[0]]})
    family.mirrors("mnist", server.url)
    message = refused("mnist", tmp_path, download=True)
    assert f"{server.url}{FILES[1]}.gz" in message
    assert md5(family.gz["mnist"][FILES[1]]) in message
    held = {path for path, content in snapshot(tmp_path).items() if content}
    assert held == {str(RAW["mnist"] / f"{FILES[0]}.gz")}
    server.contents[f"{FILES[1]}.gz"] = family.gz["mnist"][FILES[1]]
    family.check(data.load("mnist", tmp_path))


def test_stalled_download(
    family: Family, serve: Callable[..., Server], tmp_path: Path
) -> None:
    family.monkeypatch.setattr(data, "_STALL_SECONDS", 0.2)
    server = serve(family.gz["mnist"])
    server.stalled = {f"{FILES[0]}.gz"}
    family.mirrors("mnist", server.url)
    start = time.monotonic()
    assert "timed out" in refused("mnist", tmp_path, download=True)
    assert time.monotonic() - start < 3
    assert not [path for path, content in snapshot(tmp_path).items() if content]
    assert not list(tmp_path.glob(".download-*"))


def test_no_mirror_answers(family: Family, tmp_path: Path) -> None:
    mirrors = [closed_port(), closed_port()]
    family.mirrors("mnist", *mirrors)
    message = refused("mnist", tmp_path, download=True)
    assert all(mirror in message for mirror in mirrors)
    assert str(tmp_path / RAW["mnist"]) in message
    assert all(f"{file}.gz" in message for file in FILES)
    assert 'load("digits")' in message and "--dataset digits" in message
    assert snapshot(tmp_path) == {}


def test_name_service_that_never_answers(family: Family, tmp_path: Path) -> None:
    released = threading.Event()

    def black_hole(*_: object, **__: object) -> None:
        released.wait(30)
        raise socket.gaierror("released")

    assert data._PROBE_SECONDS <= 12
    family.monkeypatch.setattr(data, "_PROBE_SECONDS", 0.2)
    family.monkeypatch.setattr(socket, "getaddrinfo", black_hole)
    family.mirrors("mnist", "http://mirror.invalid/")
    start = time.monotonic()
    try:
        assert "no answer in 0.2 s" in refused("mnist", tmp_path, download=True)
    finally:
        released.set()
    assert time.monotonic() - start < 5


def test_root_that_cannot_be_made(
    family: Family, serve: Callable[..., Server], tmp_path: Path
) -> None:
    family.mirrors("mnist", serve(family.gz["mnist"]).url)
    (tmp_path / "file").write_bytes(b"")
    root = tmp_path / "file" / "root"
    assert f"cannot download into {root}" in refused("mnist", root, download=True)


def test_unwritable_root(
    family: Family, serve: Callable[..., Server], tmp_path: Path
) -> None:
    make = Path.mkdir

    def mkdir(path: Path, *args: int, **options: bool) -> None:
        if tmp_path in path.parents:  # chmod would not stop a test run by root
            raise PermissionError(13, "Permission denied")
        make(path, *args, **options)

    family.mirrors("mnist", serve(family.gz["mnist"]).url)
    family.monkeypatch.setattr(Path, "mkdir", mkdir)
    message = refused("mnist", tmp_path, download=True)
    assert f"cannot download into {tmp_path}" in message
    assert "Permission denied" in message


def test_two_processes_at_once(
    family: Family, serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve(family.gz["mnist"])
    root = tmp_path / "root"
    resources = [(f"{file}.gz", md5(family.gz["mnist"][file])) for file in FILES]
    script = f"""
import pathlib, time
from torchvision.datasets import MNIST
from torchbp.data import sets as data
MNIST.resources, MNIST.mirrors = {json.dumps(resources)}, [{server.url!r}]
data._COUNTS, data._VALIDATION, data._MNIST_UNPACKED_MD5 = {COUNTS}, {VALIDATION}, {{}}
def wait(ready=pathlib.Path({str(tmp_path)!r})):
    (ready / str(time.perf_counter_ns())).touch()
    while len([p for p in ready.iterdir() if p.name.isdigit()]) < 2:
        time.sleep(0.001)
wait()
print(data.load("mnist", {str(root)!r}).test.labels.tolist())
"""
    ended: list[subprocess.CompletedProcess[str]] = []
    threads = [
        threading.Thread(target=lambda: ended.append(run(script))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    labels = list(family.files["mnist"][FILES[3]][8:])
    for process in ended:
        assert process.returncode == 0, process.stderr
        assert json.loads(process.stdout) == labels
    family.check(data.load("mnist", root, download=False))
    assert not list(root.glob(".download-*"))


# The real MNIST


def test_mnist(mnist_root: Path) -> None:
    splits = data.load("mnist", mnist_root, download=False)
    assert [len(split.labels) for split in splits] == [50_000, 10_000, 10_000]
    assert [tuple(split.images.shape) for split in splits] == [
        (n, 784) for n in (50_000, 10_000, 10_000)
    ]
    assert splits.train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert splits.test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    train = torch.cat([splits.train.images, splits.validation.images])
    assert data.scale(train).mean().item() == pytest.approx(0.1307, **bounds.printed(4))
    labels = torch.cat([splits.train.labels, splits.validation.labels])
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert labels.bincount().tolist() == counts


def test_mnist_unpacked_is_the_same_and_not_fashion(
    mnist_root: Path, tmp_path: Path
) -> None:
    whole = data.load("mnist", mnist_root, download=False)
    for file, path in data._locate("mnist", mnist_root).items():
        content = path.read_bytes()
        plain = gzip.decompress(content) if path.suffix == ".gz" else content
        (tmp_path / file).write_bytes(plain)
    unpacked = data.load("mnist", tmp_path, download=False)
    for a, b in zip(whole, unpacked, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
    assert "MNIST" in refused("fashion", tmp_path)
    with (tmp_path / FILES[2]).open("r+b") as stream:
        stream.seek(5000)
        stream.write(b"\x7b")
    assert str(tmp_path / FILES[2]) in refused("mnist", tmp_path)


def test_mnist_truncated(mnist_root: Path, tmp_path: Path) -> None:
    for path in data._locate("mnist", mnist_root).values():
        shutil.copyfile(path, tmp_path / path.name)
    path = next(tmp_path.glob(f"{FILES[0]}*"))
    os.truncate(path, 1000)
    message = refused("mnist", tmp_path)
    assert str(path) in message and "1000" in message
