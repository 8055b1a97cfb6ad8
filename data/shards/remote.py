"""Files behind URLs, through fsspec: read in ranges, and again where a connection drops."""

import io
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom
from typing import Any

import aiohttp
import fsspec
from fsspec.implementations.http import HTTPFileSystem
from fsspec.registry import known_implementations

from lightning_semgen.errors import UserError

ATTEMPTS = 8
FIRST_PAUSE = 0.25  # seconds, doubled from attempt to attempt: half a minute in all
BLOCK = 2**23  # bytes of a request where a file is read from end to end
MAX_GAP = 2**16  # bytes between two ranges that cost less than a second request
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, UserError)
CONNECTION = (aiohttp.ClientError, ConnectionError, TimeoutError)

log = logging.getLogger(__name__)


def cache_folder(name: str) -> Path:
    """The folder in which this machine keeps indexes and copies of remote files."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_semgen" / name


@dataclass(frozen=True)
class RemotePath:
    """A file behind a URL, with as much of pathlib's Path as shards need; safe to send to workers.

    It holds no connection: fsspec has one filesystem for each process, and a forked one forgets its parent's.
    Credentials are found where the filesystems look for them, in environment variables and fsspec's configuration.

    What does not exist is FileNotFoundError, what the server refuses PermissionError; UserError names a URL that
    ATTEMPTS requests have not got, or whose filesystem is not installed.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self._split()[1]

    @property
    def stem(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def parent(self) -> "RemotePath":
        folder, _, query = self._split()
        return RemotePath(folder + query)

    def __truediv__(self, name: str) -> "RemotePath":
        address, _, query = self.url.partition("?")  # which may hold a token for all files of a folder
        return RemotePath(f"{address}/{name}" + (f"?{query}" if query else ""))

    def with_name(self, name: str) -> "RemotePath":
        return self.parent / name

    def _split(self) -> tuple[str, str, str]:
        """Folder, name, and the query with its question mark."""
        address, question, query = self.url.partition("?")
        folder, _, name = address.rpartition("/")
        return folder, name, question + query

    def glob(self) -> list["RemotePath"]:
        """The files of a pattern with * or [, where the server can list them; without, the file of that name."""
        if not set("*[") & set(self.url):
            return [self]
        with suppress(FileNotFoundError, PermissionError):
            return self._persistently(
                lambda files, path: [RemotePath(files.unstrip_protocol(name)) for name in files.glob(path)]
            )
        return []

    def exists(self) -> bool:
        with suppress(FileNotFoundError, PermissionError):
            return bool(self._info())
        return False

    def version(self) -> tuple[int, str]:
        """The size in bytes, and what changes with the content as far as the server knows."""
        info = self._info()
        if info["size"] is None:
            raise UserError(f"The server of {self} does not say how large it is: copy it to a disk.")
        tags = ("ETag", "etag", "Last-Modified", "LastModified", "updated", "mtime")
        return info["size"], next((str(info[tag]) for tag in tags if info.get(tag)), "")

    def _info(self) -> dict[str, Any]:
        return self._persistently(lambda files, path: files.info(path))

    def read_text(self) -> str:
        return self._persistently(lambda files, path: files.cat_file(path)).decode()

    def read(self, start: int, size: int) -> bytes:
        return self._persistently(lambda files, path: _range(files, path, start, size))

    def read_ranges(self, ranges: list[tuple[int, int]]) -> list[bytes]:
        """The bytes of (offset, size) ranges; neighbours come in one request."""
        start = min((offset for offset, _ in ranges), default=0)
        end = max((offset + size for offset, size in ranges), default=0)
        if end - start > sum(size + MAX_GAP for _, size in ranges):
            return [self.read(offset, size) for offset, size in ranges]
        span = memoryview(self.read(start, end - start) if end > start else b"")
        return [bytes(span[offset - start :][:size]) for offset, size in ranges]

    def _persistently(self, request: Callable[[fsspec.AbstractFileSystem, str], Any]) -> Any:
        """What a request of the filesystem and this file's name there gives, tried again while the connection fails."""
        files, path = self._filesystem()
        for attempt in range(ATTEMPTS):
            try:
                return request(files, path)
            except Exception as error:  # each filesystem has its own
                cause = _passing(error)
            if attempt + 1 < ATTEMPTS:
                log.warning("%s: attempt %d of %d: %s", self, attempt + 1, ATTEMPTS, cause)
                # Workers that failed together do not come back together.
                time.sleep(FIRST_PAUSE * 2**attempt * SystemRandom().uniform(0.5, 1.5))
        raise UserError(f"{self} could not be read in {ATTEMPTS} attempts; the last: {cause}.")

    def _filesystem(self) -> tuple[fsspec.AbstractFileSystem, str]:
        protocol = self.url.partition("://")[0]
        try:
            return fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            package = known_implementations[protocol]["class"].partition(".")[0]
            raise UserError(f"{self} needs a package that is not installed: pip install {package}.") from error
        except ValueError as error:
            raise UserError(
                f"{self} is of no known kind: s3://, gs://, http(s):// and others of fsspec are."
            ) from error


class RemoteFile(io.RawIOBase):
    """A remote file to be read by a buffered reader, a request for each buffer."""

    def __init__(self, path: RemotePath):
        self.path, self.at = path, 0
        self.size, _ = path.version()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def readinto(self, buffer: memoryview) -> int:
        count = max(min(len(buffer), self.size - self.at), 0)
        if count:
            buffer[:count] = self.path.read(self.at, count)
        self.at += count
        return count


def _range(files: fsspec.AbstractFileSystem, path: str, start: int, size: int) -> bytes:
    options = _http_options(path, size) if isinstance(files, HTTPFileSystem) else {}
    data = files.cat_file(path, start=start, end=start + size, **options)
    if len(data) != size:
        raise ConnectionError(f"{len(data)} of {size} bytes")
    return data


def _http_options(url: str, size: int) -> dict[str, Any]:
    """Options of a range request: without them the whole file could be read into memory."""

    async def check(response: aiohttp.ClientResponse) -> None:
        if response.status == 200 and response.content_length != size:
            raise UserError(f"The server of {url} does not serve parts of a file: copy it to a disk.")

    return {"raise_for_status": check, "headers": {"Accept-Encoding": "identity"}}


def _passing(error: Exception) -> str:
    """What has gone wrong where it may go right the next time; raises the error where it will not."""
    # fsspec says of whatever befell a question for a size over HTTP that there is no such file.
    cause = error.__cause__ if isinstance(error.__cause__, CONNECTION) else error
    if not isinstance(cause, aiohttp.ClientResponseError):
        if isinstance(cause, FINAL):
            raise error
        return f"{type(cause).__name__}, {cause}"
    answer = f"the server answers {cause.status} {cause.message}"
    if cause.status < 500 and cause.status not in (408, 429):
        raise (FileNotFoundError if cause.status in (404, 410) else PermissionError)(answer) from error
    return answer
