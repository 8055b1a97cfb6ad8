"""WebDataset tar shards with an index beside each: written at once or not at all, read at any place.

`NAME.tar.index.json` holds, for every sample, its key, whether it has a caption, where its members lie, what `lightning
pack` measured of its video, and the problem of one that cannot be used; and the size and time of the shard it is of.
"""

import glob
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import copy
from hashlib import blake2b
from pathlib import Path
from uuid import uuid4

import braceexpand
import webdataset as wds

from data.decode import Rejected
from data.pipe import PREFIX, copied
from data.remote import BLOCK, RemoteFile, RemotePath, cache_folder
from data.tar import MAX_TEXT, Member, TarFile, members
from lightning_semgen.errors import UserError

MAX_MEMBER_MB = 1000
VIDEO_EXTENSIONS = (
    *("mp4", "webm", "mkv", "mov", "avi", "m4v", "3gp", "3g2", "ts", "mts", "m2ts"),
    *("flv", "f4v", "mpg", "mpeg", "wmv", "asf", "ogv", "mxf"),
)
MEASURED = ("duration", "width", "height", "fps", "rotation", "codec", "frames", "size")  # see `probe`
DATA_HINT = "check data.train_shards and data.val_shards, or set data.toy_clips to have a toy world rendered there"


def index_path(shard: Path | RemotePath) -> Path | RemotePath:
    return shard.with_name(shard.name + ".index.json")


def _partial(path: Path) -> Path:
    """A name beside `path` that no other process writes to."""
    return path.with_name(f"{path.name}.{uuid4().hex}.partial")


def write_atomically(path: Path, text: str) -> None:
    partial = _partial(path)
    partial.write_text(text)
    partial.replace(path)


@contextmanager
def shard_writer(path: Path) -> Iterator[Callable[[dict], None]]:
    """Writes samples {"__key__": …, "mp4": bytes, "json": dict, …} as they come, at the end the index; neither is there
    before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        with wds.TarWriter(str(partial), mtime=0) as writer:
            yield writer.write
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    read_index(path)


def remove_partial(path: Path) -> None:
    """What a killed process had begun of a shard; nobody may be writing it."""
    for partial in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
        partial.unlink()


def write_shard(path: Path, samples: Iterable[dict]) -> None:
    with shard_writer(path) as write:
        for sample in samples:
            write(sample)


def read_index(path: Path | RemotePath) -> list[dict]:
    """One row for each sample of a shard; made anew, and kept beside it if possible, where the shard has changed.

    A remote shard may have the index it was packed with beside it; one that is made is kept in the cache folder.
    """
    if isinstance(path, RemotePath):
        size, tag = path.version()
        beside = _stored(index_path(path))
        if beside.get("shard", [None])[0] == size:  # its time is that of the file it was copied from
            return beside["samples"]
        identity = [size, tag]
        kept = cache_folder("indexes") / f"{blake2b(path.url.encode(), digest_size=16).hexdigest()}.json"
    else:
        stat = path.stat()
        identity, kept = [stat.st_size, stat.st_mtime_ns], index_path(path)
    index = _stored(kept)
    if index.get("shard") != identity:
        index = {"shard": identity, "samples": _scan(path)}
        with suppress(OSError):  # the folder may be read-only
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(kept, json.dumps(index, separators=(",", ":")))
    return index["samples"]


def _stored(path: Path | RemotePath) -> dict:
    """An index; empty where there is none, or something else under its name."""
    index = None
    with suppress(FileNotFoundError, PermissionError, ValueError):
        index = json.loads(path.read_text())
    return index if isinstance(index, dict) else {}


def _scan(path: Path | RemotePath) -> list[dict]:
    """Goes once through a shard; members whose names agree up to the first dot make a sample."""
    samples: dict[str, dict] = {}
    with TarFile(RemoteFile(path), BLOCK) if isinstance(path, RemotePath) else TarFile(io.FileIO(path)) as file:
        for member in members(file):
            sample = samples.setdefault(member.key, {"caption": False, "members": {}})
            if problem := member.problem or _clash(member, sample):
                sample["problem"] = problem
            else:
                sample["members"][member.extension] = [member.offset, member.size]
                if member.extension == "json":
                    file.seek(member.offset)
                    sample |= _known(file.read(member.size))
    return [{"key": key, **sample} for key, sample in samples.items()]


def _clash(member: Member, sample: dict) -> str | None:
    if member.extension in sample["members"]:
        return "two members of one name"  # which of two captions is of which of two videos, nobody knows
    if member.extension == "json" and member.size > MAX_TEXT:
        return "a JSON of more than 16 MB"
    return None


def _known(text: bytes) -> dict:
    """Of a sample's JSON, whether it has a caption and what was measured of the video."""
    info = {}
    with suppress(ValueError, RecursionError):
        info = json.loads(text)
    if not isinstance(info, dict):
        return {"caption": False}
    measured = {name: info[name] for name in MEASURED} if info.keys() >= set(MEASURED) else {}
    return {"caption": has_caption(info)} | measured


def has_caption(info: dict) -> bool:
    """Whether `caption` is a text, or a list of such, none of them empty."""
    captions = info.get("caption")
    captions = captions if isinstance(captions, list) else [captions]
    return bool(captions) and all(isinstance(caption, str) and caption.strip() for caption in captions)


def expand(patterns: str | list[str], allow_pipe: bool = False, hint: str = DATA_HINT) -> list[Path | RemotePath]:
    """Shards named by glob or brace patterns (environment variables too), sorted; UserError where there are none."""
    names = [os.path.expandvars(p) for p in ([patterns] if isinstance(patterns, str) else patterns)]
    names = [name for pattern in names for name in braceexpand.braceexpand(pattern)]
    found = {name: _found(name, allow_pipe) for name in names}
    paths = sorted({path for paths in found.values() for path in paths}, key=str)
    absent = [name for name in names if not glob.has_magic(name) and not found[name]]
    if paths and absent:
        raise UserError(f"{len(absent)} of the {len(names)} named shards are missing, the first is {absent[0]}.")
    if not paths:
        raise UserError(f"There are no shards at {', '.join(names)}: {hint}.")
    return paths


def _found(name: str, allow_pipe: bool) -> list[Path] | list[RemotePath]:
    if name.startswith(PREFIX):
        return [copied(name, allow_pipe)]
    if "://" in name:
        return RemotePath(name).glob()
    return [Path(path) for path in glob.glob(name)]


class Shards:
    """The samples of several shards as one list, each readable at any time; safe to send to workers.

    Only captioned samples are in it, and those that cannot be used whatever their caption: `uncaptioned` counts the
    others.

    Args:
        patterns: globs or brace patterns of paths, of URLs that fsspec knows, or of commands, "pipe:COMMAND".
        max_member_mb: size in MB above which a member is not read.
        allow_pipe: whether commands are run.
    """

    def __init__(self, patterns: str | list[str], max_member_mb: int = MAX_MEMBER_MB, allow_pipe: bool = False):
        self.paths = expand(patterns, allow_pipe)
        self.max_member_mb = max_member_mb
        self.samples: list[tuple[int, str, dict]] = []
        self.problems: dict[int, str] = {}  # by the place of a sample that is never read
        self.measured: list[tuple] = []  # seconds, height and width of each sample's video, None where nobody knows
        self.sizes: list[int] = []  # samples of each shard
        self.uncaptioned = 0
        self.digests: list[str] = []  # of what each shard holds, whatever it is called
        with ThreadPoolExecutor(16) as pool:  # remote indexes come one request after another
            for number, rows in enumerate(pool.map(self.rows, self.paths)):
                self._add(number, rows)
        if not self.samples:
            raise UserError(
                f"None of the {self.uncaptioned} samples in {self.paths[0].parent} has a caption: each needs a"
                ' KEY.json with a "caption".'
            )

    def _add(self, number: int, rows: list[dict]) -> None:
        before = len(self.samples)
        self.digests.append(blake2b(json.dumps(rows).encode(), digest_size=4).hexdigest())
        for row in rows:
            if "problem" in row:
                self.problems[len(self.samples)] = row["problem"]
            if "problem" in row or row["caption"]:
                self.samples.append((number, row["key"], row["members"]))
                self.measured.append(tuple(map(row.get, ("duration", "height", "width"))))
            else:
                self.uncaptioned += 1
        self.sizes.append(len(self.samples) - before)

    def __len__(self) -> int:
        return len(self.samples)

    def only(self, indices: Sequence[int]) -> "Shards":
        """Some of the samples, given in the order in which they lie here."""
        part = copy(self)
        part.samples, part.measured = [self.samples[i] for i in indices], [self.measured[i] for i in indices]
        part.problems = {place: self.problems[i] for place, i in enumerate(indices) if i in self.problems}
        held = Counter(number for number, *_ in part.samples)
        part.sizes = [held[number] for number in range(len(self.paths))]
        return part

    def read(self, index: int, only: tuple[str, ...] | None = None) -> dict[str, bytes | str]:
        """The members of a sample by extension, all or `only` some, and its `__key__`; may raise `Rejected`."""
        if index in self.problems:
            raise Rejected(self.problems[index])
        number, key, ranges = self.samples[index]
        ranges = {name: place for name, place in ranges.items() if only is None or name in only}
        if not all(0 <= size <= self.max_member_mb * 10**6 for _, size in ranges.values()):
            raise Rejected(f"a member of more than {self.max_member_mb} MB (data.max_member_mb)")
        contents = _contents(self.paths[number], list(ranges.values()))
        return {"__key__": key} | dict(zip(ranges, contents, strict=True))

    @staticmethod
    def rows(path: Path | RemotePath) -> list[dict]:
        """The index of a shard; UserError for one that is missing or broken."""
        try:
            return read_index(path)
        except UserError:
            raise
        except FileNotFoundError as error:
            raise UserError(f"There is no shard {path}.") from error
        except (tarfile.TarError, ValueError, LookupError, TypeError, OSError) as error:
            raise UserError(f"The shard {path} cannot be read ({error}): write it again or leave it out.") from error


def _contents(path: Path | RemotePath, ranges: list[tuple[int, int]]) -> list[bytes]:
    """The bytes of (offset, size) ranges of a file."""
    if isinstance(path, RemotePath):
        return path.read_ranges(ranges)
    contents = []
    with path.open("rb") as file:
        for offset, size in ranges:
            file.seek(offset)
            contents.append(file.read(size))
    if [len(content) for content in contents] != [size for _, size in ranges]:
        raise UserError(f"The shard {path} has become shorter than it was when the run began.")
    return contents
