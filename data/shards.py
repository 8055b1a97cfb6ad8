"""WebDataset tar shards with an index beside each: written at once or not at all, read at any place.

`NAME.tar.index.json` holds, for every sample, its key, whether it has a caption, and where its members lie.
"""

import glob
import json
import os
import tarfile
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import braceexpand
import webdataset as wds

from lightning_semgen.errors import UserError

VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "mov", "avi")


def index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + ".index.json")


def write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def write_shard(path: Path, samples: Iterable[dict]) -> None:
    """Writes samples {"__key__": …, "mp4": bytes, "json": dict, …}, then the index; a killed write leaves neither."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with wds.TarWriter(str(partial), mtime=0) as writer:
        for sample in samples:
            writer.write(sample)
    partial.replace(path)
    write_index(path)


def write_index(path: Path) -> None:
    """Goes once through a shard; where two members make a sample is decided by the key before the first dot."""
    samples: dict[str, dict] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            if not member.isfile():
                continue
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            sample = samples.setdefault(f"{folder}/{stem}".lstrip("/"), {"caption": False, "members": {}})
            sample["members"][extension] = [member.offset_data, member.size]
            if extension == "json":
                sample["caption"] = bool(json.load(tar.extractfile(member)).get("caption"))
    rows = [{"key": key, **sample} for key, sample in samples.items()]
    write_atomically(index_path(path), json.dumps({"samples": rows}, separators=(",", ":")))


def expand(patterns: str | list[str]) -> list[Path]:
    """Shards named by glob or brace patterns (environment variables too), sorted; UserError where there are none."""
    names = [os.path.expandvars(p) for p in ([patterns] if isinstance(patterns, str) else patterns)]
    names = [name for pattern in names for name in braceexpand.braceexpand(pattern)]
    paths = sorted({Path(path) for name in names for path in glob.glob(name)})
    if not paths:
        raise UserError(
            f"There are no shards at {', '.join(names)}: check data.train_shards and data.val_shards, or set"
            " data.toy_clips to have a toy world rendered there."
        )
    return paths


class Shards:
    """The samples of several shards as one list, each read with two system calls; safe to send to workers.

    Only captioned samples are in it; `uncaptioned` counts the others.
    """

    def __init__(self, patterns: str | list[str]):
        self.paths = expand(patterns)
        self.samples: list[tuple[int, str, dict]] = []
        self.uncaptioned = 0
        for number, path in enumerate(self.paths):
            for row in self._index(path):
                if row["caption"]:
                    self.samples.append((number, row["key"], row["members"]))
                else:
                    self.uncaptioned += 1
        if not self.samples:
            raise UserError(
                f"None of the {self.uncaptioned} samples in {self.paths[0].parent} has a caption: each needs a"
                ' KEY.json with a "caption".'
            )

    def __len__(self) -> int:
        return len(self.samples)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_files"}

    def read(self, index: int) -> dict[str, bytes | str]:
        """The members of a sample by extension, and its `__key__`."""
        shard, key, members = self.samples[index]
        file = self._files.setdefault(shard, None) or self._open(shard)
        contents = {name: os.pread(file, size, offset) for name, (offset, size) in members.items()}
        return {"__key__": key, **contents}

    @cached_property
    def _files(self) -> dict[int, int]:
        return {}

    def _open(self, shard: int) -> int:
        self._files[shard] = os.open(self.paths[shard], os.O_RDONLY)
        return self._files[shard]

    @staticmethod
    def _index(path: Path) -> list[dict]:
        try:
            if not index_path(path).exists():
                write_index(path)
            return json.loads(index_path(path).read_text())["samples"]
        except (tarfile.TarError, ValueError) as error:
            raise UserError(f"The shard {path} cannot be read ({error}): write it again or leave it out.") from error
