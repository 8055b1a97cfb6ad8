"""The index beside a shard.

`NAME.tar.index.json` holds, for every sample, its key, whether it has a caption, where its members lie, what `lightning
pack` measured of its video, and the problem of one that cannot be used; and the size and time of the shard it is of. It
has the number of its format: an index of another one is made again.
"""

import io
import json
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from uuid import uuid4

from data.shards.records import FORMAT, MEASURED, MEASURED_BY, has_caption, measured_by_pack, merged
from data.shards.remote import BLOCK, RemoteFile, RemotePath, cache_folder
from data.shards.tar import MAX_TEXT, Member, TarFile, members

TEXTS = ("json", "txt")  # members that say something of the others


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
        index = {"format": FORMAT, "shard": identity, "samples": _scan(path)}
        with suppress(OSError):  # the folder may be read-only
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(kept, json.dumps(index, separators=(",", ":"), allow_nan=False))
    return index["samples"]


def _stored(path: Path | RemotePath) -> dict:
    """An index; empty where there is none, or one of another format, or something else under its name."""
    index = None
    with suppress(FileNotFoundError, PermissionError, ValueError, RecursionError):
        index = json.loads(path.read_text())
    return index if isinstance(index, dict) and index.get("format") == FORMAT else {}


def _scan(path: Path | RemotePath) -> list[dict]:
    """Goes once through a shard; members whose names agree up to the first dot make a sample."""
    samples: dict[str, dict] = {}
    told: dict[str, dict] = {}  # by key, of what its texts say no more than is needed
    with TarFile(RemoteFile(path), BLOCK) if isinstance(path, RemotePath) else TarFile(io.FileIO(path)) as file:
        for member in members(file):
            sample = samples.setdefault(member.key, {"caption": False, "members": {}})
            extension = member.extension.lower()
            if problem := member.problem or _clash(member, extension, sample):
                sample["problem"] = problem
            else:
                sample["members"][extension] = [member.offset, member.size]
                if extension in TEXTS:
                    file.seek(member.offset)
                    told.setdefault(member.key, {})[extension] = _told(extension, file.read(member.size))
    for key, texts in told.items():
        samples[key] |= _known(texts, samples[key]["members"])
    return [{"key": key, **sample} for key, sample in samples.items()]


def _clash(member: Member, extension: str, sample: dict) -> str | None:
    if extension in sample["members"]:
        return "two members of one name"  # which of two captions is of which of two videos, nobody knows
    if extension in TEXTS and member.size > MAX_TEXT:
        return f"a {extension.upper()} of more than 16 MB"
    return None


def _told(extension: str, text: bytes) -> dict | None:
    """Of a .json or .txt whether it has a caption, and the numbers of the former; None where it is broken."""
    info = merged(text, None) if extension == "txt" else merged(None, text)
    if info is None:
        return None
    return {"caption": has_caption(info)} | {name: info[name] for name in (*MEASURED, *MEASURED_BY) if name in info}


def _known(texts: dict[str, dict | None], members: dict[str, list[int]]) -> dict:
    """Whether a sample has a caption, and what was measured of its video; nothing where one of its texts is broken."""
    if None in texts.values():
        return {"caption": False}
    sizes = [size for extension, (_, size) in members.items() if extension not in TEXTS]
    record = texts.get("json", {})
    facts = measured_by_pack(record, record.get("size")) if record.get("size") in sizes else {}
    return {"caption": any(text["caption"] for text in texts.values())} | facts
