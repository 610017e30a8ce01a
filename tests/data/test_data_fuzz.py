"""data under attack: damaged, hostile and half-made files end in one line, soon and in
little memory.

`tests/test_data.py` has what whole files hold and one test for each kind of damage;
here hypothesis combines the kinds, at every depth: the bytes of the file, of the gzip
stream and of the IDX file inside, under checksums that still fit, which is what a check
behind the checksum is there for.
"""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import processes
import pytest
import test_data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data import (
    COUNTS,
    FILES,
    RAW,
    REPOSITORY,
    VALIDATION,
    Family,
    Server,
    md5,
    pack,
    refused,
)

from torchbp.data import sets as data

family, serve = test_data.family, test_data.serve  # fixtures

SHORT = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
LONG = settings(SHORT, max_examples=5000)

Change = Callable[[bytes], bytes]
# For a file of 15,696 bytes that is right: what is read, unpacked and converted, the
# messages, and torchvision's import, which is done before.
MEMORY = 2_000_000
SECONDS = 30  # a moment, on a machine that has other things to do


@st.composite
def changes(draw: st.DrawFn) -> Change:
    """What may have become of some bytes."""
    kind = draw(
        st.sampled_from(
            ["flip", "cut", "extend", "magic", "count", "sizes", "dtype", "labels",
             "nothing", "repeat", "zeros", "swap"]
        )
    )  # fmt: skip
    place = draw(st.floats(0, 1, exclude_max=True))
    number = draw(
        st.one_of(
            st.integers(0, 2**32 - 1),
            st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 59_999, 60_001]),
        )
    )
    tail = draw(st.binary(min_size=1, max_size=64))
    word = struct.pack(">I", number)

    def change(content: bytes) -> bytes:
        at = int(place * len(content))
        if kind == "flip":
            flipped = content[at : at + 1] or b"\0"
            return (
                content[:at] + bytes([flipped[0] ^ (tail[0] or 1)]) + content[at + 1 :]
            )
        return {
            "cut": lambda: content[:at],
            "extend": lambda: content + tail,
            "magic": lambda: word + content[4:],
            "count": lambda: content[:4] + word + content[8:],
            "sizes": lambda: content[:4] + 3 * word + content[16:],
            "dtype": lambda: content[:2] + tail[:1] + content[3:],
            "labels": lambda: content[:8] + bytes([10 + tail[0] % 246]) * at,
            "nothing": lambda: b"",
            "repeat": lambda: content + content,
            "zeros": lambda: content + bytes(100_000),
            "swap": lambda: content[at:] + content[:at],
        }[kind]()

    return change


def loads_or_refuses(name: str, root: Path) -> bool:
    """Whether it loads; whatever is neither valid nor a DataError of one line that
    names a path fails the test, as does taking long or much memory."""
    started = time.monotonic()
    tracemalloc.start()
    try:
        splits = data.load(name, root, download=False)
    except data.DataError as error:
        message = str(error)
        assert len(message.splitlines()) == 1
        assert str(root) in message
        return False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEMORY
        assert time.monotonic() - started < SECONDS
    sizes = (COUNTS["train"] - VALIDATION, VALIDATION, COUNTS["t10k"])
    for split, n in zip(splits, sizes, strict=True):
        assert split.images.shape == (n, 784)
        assert split.labels.shape == (n,)
        assert 0 <= int(split.labels.min()) <= int(split.labels.max()) <= 9
    return True


def check_damage(
    family: Family,
    root: Path,
    file: str,
    inside: Change,
    outside: Change,
    fits: bool,
) -> None:
    """One file of kmnist is changed inside its gzip stream and around it; with `fits`
    its checksum is made to fit what came of it."""
    plain = family.files["kmnist"][file]
    content = outside(pack(inside(plain)))
    whole = {f: pack(family.files["kmnist"][f]) for f in FILES}
    family.register("kmnist", {**whole, file: content} if fits else whole)
    family.gz["kmnist"] = {**whole, file: content}
    family.write(root, "kmnist")
    loaded = loads_or_refuses("kmnist", root)
    if not fits:
        assert loaded == (content == whole[file])
    elif loaded:  # flipped pixels under a checksum that fits are pixels
        header = 16 if "images" in file else 8
        unpacked = gzip.decompress(content)
        assert len(unpacked) == len(plain) and unpacked[:header] == plain[:header]


@SHORT
@given(changes(), changes(), st.sampled_from(FILES), st.booleans(), st.booleans())
def test_damaged_gz(
    family: Family, tmp_path: Path, inside, outside, file, fits, both
) -> None:  # fmt: skip
    check_damage(family, tmp_path, file, inside, outside if both else bytes, fits)


@pytest.mark.slow
@LONG
@given(changes(), changes(), st.sampled_from(FILES), st.booleans(), st.booleans())
def test_damaged_gz_at_length(
    family: Family, tmp_path: Path, inside, outside, file, fits, both
) -> None:  # fmt: skip
    check_damage(family, tmp_path, file, inside, outside if both else bytes, fits)


def check_unpacked(family: Family, root: Path, file: str, change: Change) -> None:
    family.write(root, packed=False)
    whole = family.files["mnist"][file]
    known = {f: md5(family.files["mnist"][f]) for f in FILES}
    family.monkeypatch.setattr(data, "_MNIST_UNPACKED_MD5", known)
    (root / file).write_bytes(change(whole))
    assert loads_or_refuses("mnist", root) == (change(whole) == whole)


@SHORT
@given(changes(), st.sampled_from(FILES))
def test_damaged_unpacked(family: Family, tmp_path: Path, change, file) -> None:
    check_unpacked(family, tmp_path, file, change)


@pytest.mark.slow
@LONG
@given(changes(), st.sampled_from(FILES))
def test_damaged_unpacked_at_length(
    family: Family, tmp_path: Path, change, file
) -> None:  # fmt: skip
    check_unpacked(family, tmp_path, file, change)


def gzip_of(
    size: int, start: bytes = b"", flags: int = 0, extra: bytes = b"", members: int = 1
) -> bytes:
    """A gzip file of `members` parts that together unpack to `start` and zeros."""
    packed = b""
    for i in range(members):
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        body = crc = written = 0
        chunks = []
        share = size // members
        while written < share:
            chunk = bytes(min(1 << 20, share - written))
            if i == 0 and written == 0:
                chunk = (start + chunk)[: len(chunk)]
            crc = zlib.crc32(chunk, crc)
            chunks.append(deflate.compress(chunk))
            written += len(chunk)
        body = b"".join([*chunks, deflate.flush()])
        header = b"\x1f\x8b\x08" + bytes([flags]) + bytes(6) + extra
        packed += header + body + struct.pack("<II", crc, share % 2**32)
    return packed


IMAGES = struct.pack(">4i", 2051, COUNTS["train"], 28, 28)
HOSTILE = {
    "a bomb of 100 MB": lambda: gzip_of(100_000_000),
    "a bomb of 60 MB, small enough": lambda: gzip_of(60_000_000),
    "a bomb behind the right header": lambda: gzip_of(60_000_000, IMAGES),
    "a bomb of 200 members": lambda: gzip_of(60_000_000, IMAGES, members=200),
    "3,000 members of nothing": lambda: gzip_of(0) * 3000,
    "a bomb in a bomb": lambda: gzip.compress(gzip_of(100_000_000), mtime=0),
    "a name without end": lambda: gzip_of(100, IMAGES, 8, b"x" * 60_000),
    "a header of 64 KB": lambda: gzip_of(100, IMAGES, 4, b"\xff\xff" + bytes(65_535)),
    "flags that nobody has": lambda: gzip_of(100, IMAGES, 0xE0),
    "another method": lambda: b"\x1f\x8b\x07" + gzip_of(100, IMAGES)[3:],
    "a zip file": lambda: b"PK\x03\x04" + bytes(1000),
    "deflate without an end": lambda: gzip_of(100)[:10] + b"\0\xff\xff\0\0" * 1000,
    "declared huge": lambda: pack(struct.pack(">4I", 2051, *[2**32 - 1] * 3)),
    "declared huge, as doubles": lambda: pack(struct.pack(">4I", 0xE03, *[2**31] * 3)),
    "255 dimensions": lambda: pack(struct.pack(">256I", 0x8FF, *[2**32 - 1] * 255)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_gz_of_a_checksum_that_fits(
    family: Family, tmp_path: Path, kind: str
) -> None:
    content = HOSTILE[kind]()
    family.register("kmnist", {**family.gz["kmnist"], FILES[0]: content})
    family.write(tmp_path, "kmnist")
    assert not loads_or_refuses("kmnist", tmp_path)


@pytest.mark.parametrize("packed", [True, False])
def test_a_file_of_a_terabyte_is_not_read(
    family: Family, tmp_path: Path, packed: bool
) -> None:
    """A sparse one: it takes no room on the disk, but minutes to read."""
    family.write(tmp_path, packed=packed)
    path = tmp_path / f"{FILES[0]}{'.gz' * packed}"
    try:
        os.truncate(path, 1 << 40)
    except OSError as error:
        pytest.skip(f"needs a file system with large sparse files: {error}")
    try:
        assert not loads_or_refuses("mnist", tmp_path)
        message = refused("mnist", tmp_path)
        assert str(path) in message and f"got {1 << 40}" in message
    finally:
        path.unlink()


def test_a_file_that_grows_while_it_is_read(family: Family, tmp_path: Path) -> None:
    family.write(tmp_path, packed=False)
    path = tmp_path / FILES[0]
    right, size = Path.stat, path.stat().st_size
    path.write_bytes(path.read_bytes() + bytes(10_000_000))

    def stat(self: Path, **options: bool) -> os.stat_result:
        result = right(self, **options)
        if self != path:
            return result
        return os.stat_result((*result[:6], size, *result[7:]))

    family.monkeypatch.setattr(Path, "stat", stat)
    assert not loads_or_refuses("mnist", tmp_path)


def put_folder(path: Path) -> None:
    path.mkdir()


def put_dangling_link(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


def put_loop(path: Path) -> None:
    path.symlink_to(path)


def put_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def put_pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("put", "came"),
    [
        (put_folder, "a folder"),
        (put_dangling_link, "a link to nothing"),
        (put_loop, "a link to nothing"),
        (put_device, "a device"),
        (put_pipe, "a device"),
    ],
)
@pytest.mark.parametrize("download", [True, False])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_what_is_no_file_in_a_file_s_place(
    family: Family,
    serve: Callable[..., Server],
    tmp_path: Path,
    put: Callable[[Path], None],
    came: str,
    download: bool,
    ending: str,
) -> None:
    server = serve(family.gz["mnist"])
    family.mirrors("mnist", server.url)
    family.write(tmp_path)
    (tmp_path / f"{FILES[2]}.gz").unlink()
    path = tmp_path / f"{FILES[2]}{ending}"
    put(path)
    message = refused("mnist", tmp_path, download)
    assert f"{path}: expected a file, got" in message and came in message
    assert os.path.lexists(path) and server.asked == []


def test_a_file_that_cannot_be_read(family: Family, tmp_path: Path) -> None:
    unreadable = Path("/proc/self/mem")  # to read where nothing is mapped is an error
    if not unreadable.is_file():
        pytest.skip("needs Linux's /proc: chmod would not stop a test run by root")
    family.write(tmp_path)
    path = tmp_path / f"{FILES[1]}.gz"
    path.unlink()
    path.symlink_to(unreadable)
    assert str(tmp_path) in refused("mnist", tmp_path)
    assert not loads_or_refuses("mnist", tmp_path)


def test_an_empty_file(family: Family, tmp_path: Path) -> None:
    for packed in (True, False):
        family.write(tmp_path, packed=packed)
        path = tmp_path / f"{FILES[1]}{'.gz' * packed}"
        path.write_bytes(b"")
        message = refused("mnist", tmp_path)
        assert str(path) in message and "expected" in message and "got" in message
        for file in FILES:
            (tmp_path / f"{file}.gz").unlink(missing_ok=True)


def test_images_and_labels_of_different_counts(family: Family, tmp_path: Path) -> None:
    """Each file whole in itself, and under a checksum that fits."""
    labels = struct.pack(">2i", 2049, COUNTS["train"] - 1) + bytes(COUNTS["train"] - 1)
    family.register("kmnist", {**family.gz["kmnist"], FILES[1]: pack(labels)})
    family.write(tmp_path, "kmnist")
    message = refused("kmnist", tmp_path)
    size = 8 + COUNTS["train"]
    assert f"expected {size} bytes unpacked, got {size - 1}" in message


@pytest.mark.parametrize("root", ["\0", "a\0b", "\udcff", "x" * 5000, "~nosuchuser/x"])
@pytest.mark.parametrize("download", [True, False])
def test_roots_that_no_system_takes(family: Family, root: str, download: bool) -> None:
    assert not data.find("mnist", root)
    with pytest.raises(data.DataError) as caught:
        data.load("mnist", root, download=download)
    assert len(str(caught.value).splitlines()) == 1


def test_nobody_s_home(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", fail)
    assert not data.find("mnist")
    with pytest.raises(data.DataError, match=r"~/\.cache.*home directory"):
        data.load("mnist")


# An address space with a limit: what tracemalloc does not see counts, too

LIMITED = """
import resource, sys
import torch, torchvision.datasets
from torchbp.data import sets as data
data._COUNTS, data._VALIDATION, data._MNIST_UNPACKED_MD5 = {counts}, {validation}, {{}}
torchvision.datasets.MNIST.resources = {resources}
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = used + {room}
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    data.load("mnist", {root!r}, download=False)
except data.DataError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_a_bomb_in_an_address_space_with_a_limit(
    family: Family, tmp_path: Path
) -> None:
    """75 MB in a room of 30 above what the process has."""
    bomb = gzip_of(75_000_000, IMAGES)
    family.register("mnist", {**family.gz["mnist"], FILES[0]: bomb})
    family.write(tmp_path)
    resources = [(f"{f}.gz", md5(family.gz["mnist"][f])) for f in FILES]
    script = LIMITED.format(
        counts=COUNTS, validation=VALIDATION, resources=resources, room=30_000_000,
        root=str(tmp_path),
    )  # fmt: skip
    ended = start(script).communicate(timeout=processes.LIMIT)
    assert "unpacked, got more" in ended[0] and not ended[1]


# Several processes, one empty folder


def start(script: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(
        filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])
    )
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


LOADING = """
import json, sys
from torchvision.datasets import MNIST
from torchbp.data import sets as data
MNIST.resources, MNIST.mirrors = {resources}, [{url!r}]
data._COUNTS, data._VALIDATION, data._MNIST_UNPACKED_MD5 = {counts}, {validation}, {{}}
print("ready", flush=True)
sys.stdin.readline()
print(json.dumps(data.load("mnist", {root!r}).test.labels.tolist()), flush=True)
"""


def check_several_at_once(
    family: Family, server: Server, root: Path, count: int, killed: int
) -> None:
    """`count` processes begin together, of which `killed` are killed while a download
    is on its way. The others load what the files hold, and what stands in the folder
    afterwards is whole."""
    resources = [(f"{file}.gz", md5(family.gz["mnist"][file])) for file in FILES]
    script = LOADING.format(
        resources=resources, url=server.url, root=str(root), counts=COUNTS,
        validation=VALIDATION,
    )  # fmt: skip
    running = [start(script) for _ in range(count)]
    if killed:
        server.stalled = {f"{FILES[1]}.gz"}  # its beginning, and no end for now
    for process in running:
        assert process.stdout.readline() == "ready\n"
    for process in running:
        process.stdin.write("\n")
        process.stdin.flush()
    if killed:
        deadline = time.monotonic() + processes.LIMIT
        while server.asked.count(f"{FILES[1]}.gz") < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for process in running[:killed]:
            process.send_signal(signal.SIGKILL)
            process.wait()
        server.stalled = set()
        server.released.set()  # cut short: the others see an unfinished file
    labels = list(family.files["mnist"][FILES[3]][8:])
    for i, process in enumerate(running):
        out, err = process.communicate(timeout=processes.LIMIT)
        if i < killed:
            continue
        if killed:  # the only mirror broke off: said in one line, and loaded next time
            assert "no mirror gave" in err.strip().splitlines()[-1]
        else:
            assert process.returncode == 0, err
            assert json.loads(out) == labels
    held = {path.name: path.read_bytes() for path in (root / RAW["mnist"]).iterdir()}
    for name, content in held.items():
        assert content == family.gz["mnist"][name.removesuffix(".gz")]
    family.check(data.load("mnist", root))
    family.check(data.load("mnist", root, download=False))


def test_two_processes_on_an_empty_folder_one_of_them_killed(
    family: Family, serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve(family.gz["mnist"])
    family.mirrors("mnist", server.url)
    check_several_at_once(family, server, tmp_path / "root", 2, 1)


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(10))
@pytest.mark.parametrize("killed", [0, 3])
def test_many_processes_on_an_empty_folder(
    family: Family,
    serve: Callable[..., Server],
    tmp_path: Path,
    turn: int,
    killed: int,
) -> None:
    server = serve(family.gz["mnist"])
    family.mirrors("mnist", server.url)
    check_several_at_once(family, server, tmp_path / "root", 6, killed)


def test_a_mirror_that_breaks_off(family: Family, tmp_path: Path) -> None:
    """A connection that ends in the middle of each file leaves nothing behind."""
    import threading

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        stop = threading.Event()

        def answer() -> None:
            listening.settimeout(0.1)
            while not stop.is_set():
                try:
                    connection, _ = listening.accept()
                except TimeoutError:
                    continue
                with connection:
                    connection.settimeout(5)
                    connection.recv(4096)
                    connection.sendall(
                        b"HTTP/1.0 200 OK\r\nContent-Length: 100000\r\n\r\nbegun"
                    )

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            family.mirrors("mnist", f"http://127.0.0.1:{port}/")
            for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
                family.monkeypatch.delenv(variable, raising=False)
            message = refused("mnist", tmp_path, download=True)
        finally:
            stop.set()
            thread.join()
    assert f"no mirror gave {FILES[0]}.gz" in message
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
