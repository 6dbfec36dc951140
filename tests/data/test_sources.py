"""Tests of zoo.data.sources: where files are looked for, what is refused, and downloads."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import hashlib
import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest

from zoo.data import sources
from zoo.data.sources import SOURCES, Source, cache_dir, data_dirs, locate
from zoo.errors import DataError, UnknownNameError

CONTENT = b"To be, or not to be: that is the question.\n" * 50
NAME = "hamlet"
REPOSITORY = Path(__file__).parents[2]


class Server(http.server.ThreadingHTTPServer):
    """Serves one file on 127.0.0.1; counts requests and can misbehave."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.paths: list[str] = []
        self.body = CONTENT
        self.promised: int | None = None
        self.status = 200
        self.delay_s = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/hamlet.txt"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        if self.server.status == 0:
            self.wfile.write(b"this is not HTTP\r\n\r\n")
            return
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(self.server.promised or len(self.server.body)))
        self.end_headers()
        time.sleep(self.server.delay_s)
        self.wfile.write(self.server.body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that is the official address of the one data set there is, and an empty cache."""
    monkeypatch.setenv("ZOO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("ZOO_DATA_DIR", raising=False)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        monkeypatch.setattr(sources, "SOURCES", {NAME: source_of(running.url)})
        yield running
        running.shutdown()
        thread.join()


def source_of(url: str, content: bytes = CONTENT, **changes: Any) -> Source:
    plain = Source(
        path="plays/hamlet.txt",
        size=len(content),
        digest=hashlib.sha256(content).hexdigest(),
        url=url,
        licence="public domain",
    )
    return dataclasses.replace(plain, **changes)


def put(folder: Path, content: bytes = CONTENT) -> Path:
    path = folder / "plays" / "hamlet.txt"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


def files_below(folder: Path) -> list[str]:
    """Names of all files but locks."""
    found = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in found if not name.endswith(".lock"))


# --- the table -----------------------------------------------------------------------------------


def test_every_source_can_be_checked() -> None:
    digits = {"sha256": 64, "md5": 32}
    for name, source in SOURCES.items():
        if source.digest is None:  # its reader checks what is decoded
            assert name.endswith("-parquet")
        else:
            assert len(source.digest) == digits[source.algorithm], name
            assert set(source.digest) <= set("0123456789abcdef"), name
        if source.url is not None:
            assert source.size is not None, name
            assert source.size > 0, name
            assert source.url.startswith("https://"), name
        assert source.licence, name
        parts = Path(source.path).parts
        archive = source.path.endswith((".tar.gz", ".zip"))
        assert len(parts) >= 2 or archive, f"{name} has no folder of its own"
        assert ".." not in parts, name
        assert not Path(source.path).is_absolute(), name
    assert len({source.path for source in SOURCES.values()}) == len(SOURCES) >= 1


def test_bundled_files_are_what_they_should_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZOO_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("ZOO_DATA_DIR", raising=False)
    bundled = [name for name, source in SOURCES.items() if source.bundled]
    assert "tiny-shakespeare" in bundled
    for name in bundled:
        path = locate(name)
        content = path.read_bytes()
        if SOURCES[name].packed:
            content = gzip.decompress(content)
        assert len(content) == SOURCES[name].size
        assert hashlib.new(SOURCES[name].algorithm, content).hexdigest() == SOURCES[name].digest
        assert path.is_relative_to(REPOSITORY / "zoo" / "data")
    assert list(tmp_path.iterdir()) == []


# --- where it is looked for ----------------------------------------------------------------------


def test_folders_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ZOO_CACHE_DIR", "/cache")
    monkeypatch.delenv("ZOO_DATA_DIR", raising=False)
    assert data_dirs() == [Path("/cache/data")]
    monkeypatch.setenv("ZOO_DATA_DIR", "/shelf")
    assert data_dirs("/mine") == [Path("/mine"), Path("/shelf"), Path("/cache/data")]
    monkeypatch.setenv("ZOO_DATA_DIR", "")
    monkeypatch.delenv("ZOO_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_dirs("~/x") == [tmp_path / "x", tmp_path / ".cache/zoo/data"]


def test_the_first_folder_that_has_it_wins(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZOO_DATA_DIR", str(tmp_path / "shelf"))
    cached = put(cache_dir())
    assert locate(NAME) == cached
    on_shelf = put(tmp_path / "shelf")
    assert locate(NAME) == on_shelf
    mine = put(tmp_path / "mine")
    assert locate(NAME, tmp_path / "mine") == mine
    assert locate(NAME, tmp_path / "elsewhere") == on_shelf
    assert server.paths == []


def test_an_unknown_data_set() -> None:
    with pytest.raises(UnknownNameError, match="No data set 'tiny-shakespear'") as caught:
        locate("tiny-shakespear")
    assert "Did you mean 'tiny-shakespeare'" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CONTENT[:-1], f"has {len(CONTENT) - 1} bytes, expected {len(CONTENT)}; remove it"),
        (b"", f"has 0 bytes, expected {len(CONTENT)}; remove it"),
        (CONTENT[:-1] + b"!", "has sha256 [0-9a-f]{64}, expected [0-9a-f]{64}; remove it"),
    ],
    ids=["short", "empty", "changed"],
)
def test_a_damaged_file_is_named_and_not_replaced(
    server: Server, tmp_path: Path, content: bytes, message: str
) -> None:
    path = put(tmp_path / "mine", content)
    with pytest.raises(DataError, match=message) as caught:
        locate(NAME, tmp_path / "mine")
    assert str(path) in str(caught.value)
    assert server.url in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content
    assert server.paths == []


def test_md5_where_the_official_list_has_nothing_else(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.md5(CONTENT).hexdigest()
    monkeypatch.setattr(
        sources, "SOURCES", {NAME: source_of(server.url, digest=digest, algorithm="md5")}
    )
    path = put(tmp_path / "mine")
    assert locate(NAME, tmp_path / "mine") == path
    path.write_bytes(bytes(len(CONTENT)))
    with pytest.raises(DataError, match=f"expected {digest}"):
        locate(NAME, tmp_path / "mine")


# --- downloads -----------------------------------------------------------------------------------


def test_a_download_is_checked_kept_and_made_once(server: Server, tmp_path: Path) -> None:
    path = locate(NAME)
    assert path == tmp_path / "cache" / "data" / "plays" / "hamlet.txt"
    assert path.read_bytes() == CONTENT
    assert locate(NAME) == path
    assert server.paths == ["/hamlet.txt"]
    assert files_below(tmp_path) == ["cache/data/plays/hamlet.txt"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"body": CONTENT[:-1] + b"!"}, "has sha256 .*, expected"),
        ({"body": CONTENT + b"!"}, f"has {len(CONTENT) + 1} bytes, expected {len(CONTENT)}"),
        ({"body": CONTENT[:-9], "promised": len(CONTENT)}, "hamlet"),
        ({"status": 404}, "could not be downloaded .*404"),
        ({"status": 503}, "could not be downloaded .*503"),
        ({"status": 0}, "could not be downloaded"),
    ],
    ids=["wrong digest", "too long", "cut off", "not found", "unavailable", "not http"],
)
def test_a_download_that_fails_leaves_nothing(
    server: Server, tmp_path: Path, fault: dict[str, Any], message: str
) -> None:
    for key, value in fault.items():
        setattr(server, key, value)
    with pytest.raises(DataError, match=message) as caught:
        locate(NAME)
    assert "\n" not in str(caught.value)
    assert files_below(tmp_path) == []
    server.body, server.promised, server.status = CONTENT, None, 200
    assert locate(NAME).read_bytes() == CONTENT


def test_without_a_network_the_error_says_what_to_do(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZOO_DATA_DIR", str(tmp_path / "shelf"))
    url = server.url
    server.server_close()
    with pytest.raises(DataError) as caught:
        locate(NAME)
    text = str(caught.value)
    assert "\n" not in text
    target = tmp_path / "cache/data/plays/hamlet.txt"
    for part in (
        f"{NAME!r}",
        "(0.0 MB, public domain)",
        str(tmp_path / "shelf/plays/hamlet.txt"),
        f"curl --create-dirs -o {target} {url}",
    ):
        assert part in text


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("step", ["mkdir", "open", "replace"])
def test_no_space_or_no_permission_in_the_cache(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int
) -> None:
    def fail(self: Path, *arguments: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number), str(self))

    with monkeypatch.context() as patched:
        patched.setattr(Path, step, fail)
        with pytest.raises(DataError, match=os.strerror(number)) as caught:
            locate(NAME)
    assert "\n" not in str(caught.value)
    assert files_below(tmp_path) == []


def test_a_file_in_the_way_of_the_cache(server: Server, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a folder")
    with pytest.raises(DataError, match=r"was not found at .*, and could not be downloaded"):
        locate(NAME)


def test_leaving_the_queue_does_not_harm_the_download_of_another_process(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted:
        def __init__(self, path: str) -> None:
            pass

        def __enter__(self) -> None:
            raise KeyboardInterrupt

        def __exit__(self, *reason: object) -> None:
            pass

    monkeypatch.setattr(filelock, "FileLock", Interrupted)
    (cache_dir() / "plays").mkdir(parents=True)
    partial = cache_dir() / "plays" / "hamlet.txt.part"
    partial.write_bytes(CONTENT[:100])
    with pytest.raises(KeyboardInterrupt):
        locate(NAME)
    assert partial.read_bytes() == CONTENT[:100]


_PROCESS = """
import sys
from zoo.data import sources
url, digest, size = sys.argv[1:]
sources.SOURCES = {"hamlet": sources.Source(path="plays/hamlet.txt", size=int(size), digest=digest,
                                            url=url, licence="public domain")}
print("ready", flush=True)
sys.stdin.readline()
print(sources.locate("hamlet"))
"""


def test_two_processes_at_once_download_once(server: Server, tmp_path: Path) -> None:
    server.delay_s = 0.5
    digest = hashlib.sha256(CONTENT).hexdigest()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, server.url, digest, str(len(CONTENT))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    path = tmp_path / "cache/data/plays/hamlet.txt"
    assert [output for output, _ in outputs] == [f"{path}\n"] * 2
    assert path.read_bytes() == CONTENT
    assert server.paths == ["/hamlet.txt"]
    assert files_below(tmp_path) == ["cache/data/plays/hamlet.txt"]
