"""Downloads, against a server on this machine."""

import hashlib
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from vfl.data import SOURCES, get
from vfl.data.download import Source
from vfl.errors import UsageError

CONTENT = {name: np.random.default_rng(i).bytes(700_000 + i) for i, name in enumerate(["a.gz", "b.gz"])}
MD5 = {name: hashlib.md5(content).hexdigest() for name, content in CONTENT.items()}


class Server(ThreadingHTTPServer):
    """Serves `files` under /, notes each request, and misbehaves as told."""

    daemon_threads = False  # so that closing waits for every handler

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(CONTENT)
        self.seen: list[tuple[str, str | None]] = []  # path, Range header
        self.ranges = True  # whether Range is heeded
        self.length = True  # whether Content-Length is sent
        self.cuts: list[int] = []  # after how many bytes the next answers end early
        self.status = 0  # an error for every request

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.seen.append((self.path, wanted))
        content = self.server.files.get(self.path.removeprefix("/"))
        if self.server.status or content is None:
            self.send_error(self.server.status or 404)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.server.ranges else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.server.length:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        stop = start + self.server.cuts.pop(0) if self.server.cuts else len(content)
        self.wfile.write(content[start:stop])

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as running:
        monkeypatch.setitem(SOURCES, "toy", Source((running.url,), MD5))
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def complete(folder: Path) -> bool:
    """Both files are there, right, and nothing else."""
    return {path.name: path.read_bytes() for path in folder.iterdir()} == CONTENT


def test_files_are_downloaded_into_the_sets_folder(server: Server, tmp_path: Path) -> None:
    folder = get("toy", tmp_path / "new")
    assert folder == tmp_path / "new" / "toy" and complete(folder)
    assert server.seen == [("/a.gz", None), ("/b.gz", None)]


def test_the_root_is_vfl_data_where_none_is_given(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VFL_DATA", str(tmp_path))
    assert get("toy") == tmp_path / "toy"


def test_right_files_stay_and_wrong_ones_are_replaced(server: Server, tmp_path: Path) -> None:
    folder = get("toy", tmp_path)
    (folder / "a.gz").write_bytes(b"broken")
    server.seen.clear()
    assert complete(get("toy", tmp_path))
    assert server.seen == [("/a.gz", None)]


def test_another_address_may_be_given_with_or_without_a_slash(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SOURCES, "toy", Source(("http://127.0.0.1:1/",), MD5))
    assert complete(get("toy", tmp_path / "1", base_url=server.url))
    assert complete(get("toy", tmp_path / "2", base_url=server.url.rstrip("/")))


def test_progress_is_told_by_file_up_to_its_total(server: Server, tmp_path: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    get("toy", tmp_path, progress=lambda *step: told.append(step))
    for name, content in CONTENT.items():
        steps = [(done, total) for file, done, total in told if file == name]
        assert len(steps) > 1 and steps[-1] == (len(content), len(content))
        assert all(before[0] < after[0] for before, after in pairwise(steps))


def test_progress_has_no_total_where_the_server_tells_none(server: Server, tmp_path: Path) -> None:
    server.length = False
    totals: set[int | None] = set()
    assert complete(get("toy", tmp_path, progress=lambda file, done, total: totals.add(total)))
    assert totals == {None}


def test_a_cut_connection_is_resumed_where_it_ended(server: Server, tmp_path: Path) -> None:
    server.cuts = [300_000, 200_000]
    told: list[tuple[str, int, int | None]] = []
    assert complete(get("toy", tmp_path, progress=lambda *step: told.append(step)))
    assert server.seen[:3] == [("/a.gz", None), ("/a.gz", "bytes=300000-"), ("/a.gz", "bytes=500000-")]
    assert {total for file, _, total in told if file == "a.gz"} == {700_000}


def test_a_server_without_ranges_is_asked_for_the_whole_again(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.cuts = [300_000]
    assert complete(get("toy", tmp_path))


def test_a_later_call_goes_on_from_what_the_earlier_one_kept(server: Server, tmp_path: Path) -> None:
    server.cuts = [300_000, 0, 0, 0]
    with pytest.raises(
        UsageError, match=r"a.gz cannot be downloaded .*ended after 300,000 of 700,000 bytes; a.gz.part keeps 300,000"
    ):
        get("toy", tmp_path)
    assert len(server.seen) == 4  # once with gain, three times without
    assert [path.name for path in (tmp_path / "toy").iterdir()] == ["a.gz.part"]
    assert complete(get("toy", tmp_path))
    assert server.seen[4] == ("/a.gz", "bytes=300000-")


def test_a_server_that_always_cuts_early_is_given_up(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.cuts = [5000, 3000, 4000, 4500, 700_000]
    with pytest.raises(UsageError, match="cannot be downloaded"):
        get("toy", tmp_path)
    assert len(server.seen) == 4


def test_a_part_as_long_as_the_file_is_loaded_anew(server: Server, tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "a.gz.part").write_bytes(bytes(700_000))
    assert complete(get("toy", tmp_path))
    assert server.seen[:2] == [("/a.gz", "bytes=700000-"), ("/a.gz", None)]


def test_a_wrong_checksum_is_refused_and_the_file_removed(server: Server, tmp_path: Path) -> None:
    server.files["a.gz"] = b"something else"
    found = hashlib.md5(b"something else").hexdigest()
    with pytest.raises(
        UsageError, match=f"a.gz gave a file with the md5 {found} instead of {MD5['a.gz']}; it was removed"
    ):
        get("toy", tmp_path)
    assert list((tmp_path / "toy").iterdir()) == []


@pytest.mark.parametrize("status", [403, 404, 503])
def test_a_refusal_is_told_with_its_status_and_not_tried_again(server: Server, tmp_path: Path, status: int) -> None:
    server.status = status
    with pytest.raises(UsageError, match=rf"a.gz cannot be downloaded \({server.url}a.gz: the server answers {status}"):
        get("toy", tmp_path)
    assert len(server.seen) == 1
    assert list((tmp_path / "toy").iterdir()) == []


def refused_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_an_unreachable_address_is_told(server: Server, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{refused_port()}/"
    with pytest.raises(UsageError, match=rf"a.gz cannot be downloaded \({url}a.gz: .*refused"):
        get("toy", tmp_path, base_url=url)


def test_an_address_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be downloaded .*unknown url type"):
        get("mnist", tmp_path, base_url="nonsense")


def test_the_next_address_is_tried_where_one_fails(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = f"http://127.0.0.1:{refused_port()}/"
    monkeypatch.setitem(SOURCES, "toy", Source((dead, server.url + "nowhere/", server.url), MD5))
    assert complete(get("toy", tmp_path))
    assert server.seen[:2] == [("/nowhere/a.gz", None), ("/a.gz", None)]
    server.status = 500
    with pytest.raises(
        UsageError, match=rf"{dead}a.gz: .*; {server.url}nowhere/a.gz: .*500.*; {server.url}a.gz: .*500"
    ):
        get("toy", tmp_path / "again")


def in_the_way(root: Path) -> None:
    root.write_text("a file, not a folder")


def part_is_a_folder(root: Path) -> None:
    (root / "toy" / "a.gz.part").mkdir(parents=True)


@pytest.mark.parametrize(
    ("obstacle", "message"),
    [
        (in_the_way, "toy cannot be made .*choose another --data-root"),
        (part_is_a_folder, "a.gz.part cannot be written .*choose another --data-root"),
    ],
)
def test_a_place_that_cannot_be_written_is_told(
    obstacle: Callable[[Path], None], message: str, server: Server, tmp_path: Path
) -> None:
    obstacle(tmp_path / "root")
    with pytest.raises(UsageError, match=message):
        get("toy", tmp_path / "root")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits", "digits needs no download: it comes with vfl"),
        ("synthetic", "synthetic needs no download"),
        ("fashionmnist", "unknown data set to download 'fashionmnist'; did you mean 'fashion_mnist'"),
    ],
)
def test_a_name_without_files_is_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        get(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_official_files_have_the_names_the_readers_look_for() -> None:
    assert list(SOURCES["mnist"].files) == list(SOURCES["fashion_mnist"].files)
    assert set(SOURCES["mnist"].files) == {
        f"{split}-{kind}-ubyte.gz" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    }
    assert list(SOURCES["cifar10"].files) == ["cifar-10-binary.tar.gz"]
    assert all(len(md5) == 32 for source in SOURCES.values() for md5 in source.files.values())
