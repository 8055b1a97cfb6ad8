"""Shards behind URLs: the same samples as from disk, whatever the connection does, or a clear error."""

import os
import pickle
import shutil
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from random import Random
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
import torch
from conftest import ON_CPU
from torch.utils.data import DataLoader, Dataset

from data.datamodule import VideoDataModule
from data.shards.index import index_path
from data.shards.reader import Shards
from data.shards.remote import ATTEMPTS, RemotePath
from data.shards.writer import write_shard
from lightning_semgen.errors import UserError

FAILURES = ["503", "close", "cut"]


class Handler(BaseHTTPRequestHandler):
    """Serves a folder in ranges; fails a share of requests, which of them depends on the request and its number only.

    A failure is a 503, a connection closed at once, or one closed in mid-body.
    """

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one packet: nothing waits for an acknowledgement

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        wanted = f"{self.command} {self.path} {self.headers.get('Range')}"
        with self.server.lock:
            self.server.requests[wanted] += 1
            draw = Random(f"{wanted} {self.server.requests[wanted]}").random()
        failure = FAILURES[int(draw / self.server.failures * 3)] if draw < self.server.failures else None
        path = Path(self.server.folder + urlsplit(self.path).path)
        if failure == "503":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif failure == "close":
            self.close_connection = True
        elif path.is_dir():
            self._send(200, "".join(f'<a href="{name}">{name}</a>' for name in os.listdir(path)).encode(), html=True)
        elif not path.is_file() or self.path.startswith("/secret"):
            self._send(404 if not path.is_file() else 403, b"no")
        else:
            self._send_file(path.read_bytes(), cut=failure == "cut")

    def _send_file(self, content: bytes, cut: bool):
        wanted = self.headers.get("Range") if self.server.ranges else None
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            content = content[int(first) : int(last) + 1]
        self._send(206 if wanted else 200, content, cut=cut)

    def _send(self, status: int, content: bytes, html: bool = False, cut: bool = False):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "text/html" if html else "application/octet-stream")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if cut else content)
            self.close_connection = cut

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.failures, server.ranges = str(tmp_path / "served"), 0.0, True
    server.requests, server.lock = Counter(), threading.Lock()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty cache folder, and no long waits."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("data.shards.remote.FIRST_PAUSE", 1e-4)


@pytest.fixture
def packed(tmp_path) -> Shards:
    """Three shards of ten samples, and their indexes."""
    random = Random(0)
    for number in range(3):
        rows = [
            {"__key__": f"k{number}{n}", "mp4": random.randbytes(random.randrange(1, 9000)), "json": {"caption": "c"}}
            for n in range(10)
        ]
        write_shard(tmp_path / f"served/train-{number}.tar", rows)
    return Shards(str(tmp_path / "served/train-*.tar"))


def everything(shards: Shards) -> list[dict]:
    return [shards.read(index) for index in range(len(shards))]


def drop_indexes(tmp_path: Path) -> None:
    for path in (tmp_path / "served").glob("*.json"):
        path.unlink()


def cached(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache/lightning_semgen/indexes").glob("*.json"))


@pytest.mark.parametrize("kind", ["http", "file"])
@pytest.mark.parametrize("pattern", ["train-{0..2}.tar", "train-*.tar"])
@pytest.mark.parametrize("indexed", [True, False])
def test_remote_shards_are_those_on_disk(packed, server, tmp_path, kind, pattern, indexed):
    if not indexed:
        drop_indexes(tmp_path)
    base = server.url if kind == "http" else f"file://{server.folder}"
    remote = Shards(f"{base}/{pattern}")
    assert remote.samples == packed.samples and remote.digests == packed.digests
    assert everything(remote) == everything(packed)
    assert len(cached(tmp_path)) == (0 if indexed else 3)


def test_a_sample_is_one_request_and_of_a_large_shard_only_headers_are_read(server, tmp_path, monkeypatch):
    monkeypatch.setattr("data.shards.index.BLOCK", 4096)
    rows = [{"__key__": f"k{n}", "mp4": bytes(100_000), "json": {"caption": "c"}} for n in range(4)]
    write_shard(tmp_path / "served/s.tar", rows)
    drop_indexes(tmp_path)
    shards = Shards(f"{server.url}/s.tar")
    fetched = sum(int(last) - int(first) + 1 for first, last in ranges(server))
    assert 0 < fetched < 100_000
    server.requests.clear()
    assert shards.read(2) == rows[2] | {"json": b'{"caption": "c"}'}
    assert server.requests.total() == 1
    assert shards.read(1, only=("json",))["json"] == b'{"caption": "c"}'


def ranges(server) -> list[list[str]]:
    return [key.partition("bytes=")[2].split("-") for key in server.requests if "bytes=" in key]


def test_a_cached_index_is_used_until_the_shard_changes(packed, server, tmp_path):
    drop_indexes(tmp_path)
    url = f"{server.url}/train-0.tar"
    Shards(url)
    server.requests.clear()
    assert len(Shards(url)) == 10 and not ranges(server)
    shutil.copy(tmp_path / "served/train-1.tar", tmp_path / "served/train-0.tar")
    assert [row[1] for row in Shards(url).samples] == [f"k1{n}" for n in range(10)] and ranges(server)


def test_an_index_beside_a_shard_that_has_changed_is_not_believed(packed, server, tmp_path):
    shutil.copy(tmp_path / "served/train-1.tar", tmp_path / "served/train-0.tar")
    assert [row[1] for row in Shards(f"{server.url}/train-0.tar").samples] == [f"k1{n}" for n in range(10)]


def test_dropped_connections_change_nothing(packed, server, tmp_path):
    drop_indexes(tmp_path)
    server.failures = 0.3
    remote = Shards(f"{server.url}/train-{{0..2}}.tar")
    assert everything(remote) == everything(packed)
    repeated = sum(count - 1 for count in server.requests.values())
    assert repeated > 10


class Samples(Dataset):
    def __init__(self, shards: Shards):
        self.shards = shards

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> dict:
        return self.shards.read(index)


def test_workers_read_on_their_own(packed, server):
    server.failures = 0.2
    remote = pickle.loads(pickle.dumps(Shards(f"{server.url}/train-*.tar")))  # as spawned workers get it
    assert remote.read(0) == packed.read(0)  # this process has a connection of its own when they are forked
    for _ in range(2):
        loader = DataLoader(Samples(remote), batch_size=None, num_workers=2, multiprocessing_context="fork")
        assert list(loader) == everything(packed)


def first_batch(train_shards: str, **options) -> dict:
    module = VideoDataModule(train_shards, batch_size=4, num_workers=0, **options)
    stage = SimpleNamespace(needs_video=True)
    module.trainer = SimpleNamespace(
        strategy=ON_CPU, global_rank=0, world_size=1, training=True, lightning_module=stage
    )
    return next(iter(module.train_dataloader()))


def test_the_data_module_reads_from_urls_and_keeps_its_limits(shards, server):
    server.folder, server.failures = str(shards / "shards/toy"), 0.2
    remote, local = first_batch(f"{server.url}/train-*.tar"), first_batch(f"{server.folder}/train-*.tar")
    assert torch.equal(remote["frames"], local["frames"]) and remote["sample"] == local["sample"]
    with pytest.raises(UserError, match="No sample of http.* can be used.*more than 0 MB"):
        first_batch(f"{server.url}/train-*.tar", max_member_mb=0)
    with pytest.raises(UserError, match="would run a command"):
        first_batch("pipe:cat train-0.tar")


def test_a_dead_server_is_named_with_the_attempts(packed, server):
    remote = Shards(f"{server.url}/train-0.tar")
    server.failures = 1.0
    server.requests.clear()
    with pytest.raises(UserError, match=rf"train-0.tar could not be read in {ATTEMPTS} attempts; the last: "):
        remote.read(0)
    assert ATTEMPTS <= server.requests.total() <= 2 * ATTEMPTS  # aiohttp itself tries a closed connection once more


def test_what_is_missing_or_refused_is_not_tried_again(packed, server, tmp_path):
    with pytest.raises(UserError, match="There is no shard .*/train-3.tar"):
        Shards(f"{server.url}/train-{{0..7}}.tar")
    with pytest.raises(UserError, match="no shards at .*other"):
        Shards(f"{server.url}/other-*.tar")
    shutil.copytree(tmp_path / "served", tmp_path / "served/secret")
    with pytest.raises(UserError, match="secret/train-0.tar cannot be read.*403"):
        Shards(f"{server.url}/secret/train-0.tar")
    assert max(server.requests.values()) <= 2


def test_a_server_that_knows_no_ranges_is_refused_before_it_sends_a_shard(packed, server):
    remote = Shards(f"{server.url}/train-0.tar")
    server.ranges, server.failures = False, 1.0
    with pytest.raises(UserError, match="does not serve parts of a file"):
        remote.read(3)


def test_a_filesystem_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="xyz://a/b.tar is of no known kind"):
        Shards("xyz://a/b.tar")
    for url, package in (("s3://bucket/a.tar", "s3fs"), ("gs://bucket/a.tar", "gcsfs")):
        if find_spec(package) is None:
            with pytest.raises(UserError, match=f"{url} needs .*: pip install {package}"):
                Shards(url)


def test_names_beside_a_url_keep_its_token():
    path = RemotePath("https://host/folder/a.b.tar?token=1")
    assert (path.name, path.stem) == ("a.b.tar", "a.b")
    assert str(index_path(path)) == "https://host/folder/a.b.tar.index.json?token=1"
    assert str(path.parent / "fingerprint.json") == "https://host/folder/fingerprint.json?token=1"


def test_commands_run_where_they_may_and_once(packed, tmp_path):
    source, runs = tmp_path / "served/train-1.tar", tmp_path / "runs"
    command = f"pipe:echo >> {runs}; cat {source}"
    with pytest.raises(UserError, match="would run a command: say --data.allow_pipe true"):
        Shards(command)
    assert not runs.exists()
    for _ in range(2):
        assert everything(Shards(command, allow_pipe=True)) == everything(packed)[10:20]
    assert runs.read_text() == "\n"
    with pytest.raises(UserError, match="pipe:cat .*; exit 3 ended with status 3"):
        Shards(f"pipe:cat {source}; exit 3", allow_pipe=True)
    assert [path.suffix for path in (tmp_path / "cache/lightning_semgen/shards").iterdir()].count(".tar") == 1
