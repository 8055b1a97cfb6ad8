"""The index beside a shard.

`NAME.tar.index.json` holds, for every sample, its key, whether it has a caption, where its members lie, what `lightning
pack` measured of its video, and the problem of one that cannot be used; and the size and time of the shard it is of.
"""

import io
import json
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from uuid import uuid4

from data.shards.records import has_caption
from data.shards.remote import BLOCK, RemoteFile, RemotePath, cache_folder
from data.shards.tar import MAX_TEXT, Member, TarFile, members

MEASURED = ("duration", "width", "height", "fps", "rotation", "codec", "frames", "size")  # see `probe`


def index_path(shard: Path | RemotePath) -> Path | RemotePath:
    return shard.with_name(shard.name + ".index.json")


def unfinished_path(path: Path) -> Path:
    """A name beside `path` that no other process writes to."""
    return path.with_name(f"{path.name}.{uuid4().hex}.partial")


def write_atomically(path: Path, text: str) -> None:
    unfinished = unfinished_path(path)
    unfinished.write_text(text)
    unfinished.replace(path)


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
