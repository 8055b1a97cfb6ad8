"""WebDataset tar shards with an index beside each: written at once or not at all, read at any place.

`NAME.tar.index.json` holds, for every sample, its key, whether it has a caption, where its members lie, and what
`lightning pack` measured of its video; and the size and time of the shard it is of.
"""

import glob
import json
import os
import tarfile
from collections.abc import Iterable
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from uuid import uuid4

import braceexpand
import webdataset as wds

from lightning_semgen.errors import UserError

VIDEO_EXTENSIONS = (
    *("mp4", "webm", "mkv", "mov", "avi", "m4v", "3gp", "3g2", "ts", "mts", "m2ts"),
    *("flv", "f4v", "mpg", "mpeg", "wmv", "asf", "ogv", "mxf"),
)
MEASURED = ("duration", "width", "height", "fps", "rotation", "codec", "frames")  # see `probe`


def index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + ".index.json")


def _partial(path: Path) -> Path:
    """A name beside `path` that no other process writes to."""
    return path.with_name(f"{path.name}.{uuid4().hex}.partial")


def write_atomically(path: Path, text: str) -> None:
    partial = _partial(path)
    partial.write_text(text)
    partial.replace(path)


def write_shard(path: Path, samples: Iterable[dict]) -> None:
    """Writes samples {"__key__": …, "mp4": bytes, "json": dict, …}, then the index; a killed write leaves neither."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    with wds.TarWriter(str(partial), mtime=0) as writer:
        for sample in samples:
            writer.write(sample)
    partial.replace(path)
    read_index(path)


def read_index(path: Path) -> list[dict]:
    """One row for each sample of a shard; made anew, and kept beside it if possible, where the shard has changed."""
    stat = path.stat()
    identity = [stat.st_size, stat.st_mtime_ns]
    if index_path(path).exists():
        index = json.loads(index_path(path).read_text())
        if index.get("shard") == identity:
            return index["samples"]
    index = {"shard": identity, "samples": _scan(path)}
    with suppress(OSError):  # the folder may be read-only
        write_atomically(index_path(path), json.dumps(index, separators=(",", ":")))
    return index["samples"]


def _scan(path: Path) -> list[dict]:
    """Goes once through a shard; members whose names agree up to the first dot make a sample."""
    samples: dict[str, dict] = {}
    with tarfile.open(path) as tar:
        for member in filter(tarfile.TarInfo.isfile, tar):
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            sample = samples.setdefault(f"{folder}/{stem}".lstrip("/"), {"caption": False, "members": {}})
            sample["members"][extension] = [member.offset_data, member.size]
            if extension == "json":
                sample |= _known(tar.extractfile(member).read())
    return [{"key": key, **sample} for key, sample in samples.items()]


def _known(text: bytes) -> dict:
    """Of a sample's JSON, whether it has a caption and what was measured of the video."""
    info = {}
    with suppress(ValueError):
        info = json.loads(text)
    if not isinstance(info, dict):
        return {"caption": False}
    caption = info.get("caption")
    measured = {name: info[name] for name in MEASURED} if info.keys() >= set(MEASURED) else {}
    return {"caption": isinstance(caption, str) and bool(caption.strip())} | measured


def expand(patterns: str | list[str]) -> list[Path]:
    """Shards named by glob or brace patterns (environment variables too), sorted; UserError where there are none."""
    names = [os.path.expandvars(p) for p in ([patterns] if isinstance(patterns, str) else patterns)]
    names = [name for pattern in names for name in braceexpand.braceexpand(pattern)]
    paths = sorted({Path(path) for name in names for path in glob.glob(name)})
    absent = [name for name in names if not glob.has_magic(name) and not Path(name).exists()]
    if paths and absent:
        raise UserError(f"{len(absent)} of the {len(names)} named shards are missing, the first is {absent[0]}.")
    if not paths:
        raise UserError(
            f"There are no shards at {', '.join(names)}: check data.train_shards and data.val_shards, or set"
            " data.toy_clips to have a toy world rendered there."
        )
    return paths


class Shards:
    """The samples of several shards as one list, each readable at any time; safe to send to workers.

    Only captioned samples are in it; `uncaptioned` counts the others.
    """

    def __init__(self, patterns: str | list[str]):
        self.paths = expand(patterns)
        self.samples: list[tuple[int, str, dict]] = []
        self.uncaptioned = 0
        self.digests: list[str] = []  # of what each shard holds, whatever it is called
        for number, path in enumerate(self.paths):
            rows = self._rows(path)
            self.digests.append(blake2b(json.dumps(rows).encode(), digest_size=4).hexdigest())
            self.samples += [(number, row["key"], row["members"]) for row in rows if row["caption"]]
            self.uncaptioned += sum(not row["caption"] for row in rows)
        if not self.samples:
            raise UserError(
                f"None of the {self.uncaptioned} samples in {self.paths[0].parent} has a caption: each needs a"
                ' KEY.json with a "caption".'
            )

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int, only: tuple[str, ...] | None = None) -> dict[str, bytes | str]:
        """The members of a sample by extension, all or `only` some, and its `__key__`."""
        shard, key, members = self.samples[index]
        contents: dict[str, bytes | str] = {"__key__": key}
        with open(self.paths[shard], "rb") as file:
            for name, (offset, size) in members.items():
                if only is None or name in only:
                    file.seek(offset)
                    contents[name] = file.read(size)
        return contents

    @staticmethod
    def _rows(path: Path) -> list[dict]:
        try:
            return read_index(path)
        except (tarfile.TarError, ValueError, KeyError, OSError) as error:
            raise UserError(f"The shard {path} cannot be read ({error}): write it again or leave it out.") from error
