"""The samples of WebDataset tar shards as one list, read at any place."""

import glob
import json
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from hashlib import blake2b
from pathlib import Path

import braceexpand

from data.rejected import Rejected
from data.shards.index import read_index
from data.shards.pipes import PREFIX, copied
from data.shards.records import CAPTIONS, merged
from data.shards.remote import RemotePath
from lightning_semgen.errors import UserError

MAX_MEMBER_MB = 1000


VIDEO_EXTENSIONS = (
    *("mp4", "webm", "mkv", "mov", "avi", "m4v", "3gp", "3g2", "ts", "mts", "m2ts"),
    *("flv", "f4v", "mpg", "mpeg", "wmv", "asf", "ogv", "mxf"),
)


DATA_HINT = "check data.train_shards and data.val_shards, or set data.toy_clips to have a toy world rendered there"


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
                f"None of the {self.uncaptioned} samples in {self.paths[0].parent} has a caption: each needs a KEY.txt,"
                f' or a KEY.json with a "caption" (or {", ".join(CAPTIONS[1:])}){self._seen()}.'
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

    def _seen(self) -> str:
        """The members of the first sample and the names in its JSON, where there are any, for a message."""
        path, row = next(((path, row) for path in self.paths for row in self.rows(path)), (None, None))
        if row is None:
            return ""
        record = row["members"].get("json")
        info = merged(None, _contents(path, [record])[0]) if record else {}
        names = "" if not record else ", broken" if info is None else f" with {', '.join(info) or 'nothing in it'}"
        told = [f"{row['key']}.{extension}{names if extension == 'json' else ''}" for extension in row["members"]]
        return f"; the first has {', '.join(told)}"

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
