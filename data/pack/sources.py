"""The videos of a folder, a table or a file, and what is said of each."""

import os
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from data.pack.tables import FORMS, IN_FOLDERS, is_table, read_table
from data.shards.reader import VIDEO_EXTENSIONS
from data.shards.records import has_caption, merged
from lightning_semgen.errors import UserError

UNREADABLE = "its .json or .txt is not readable"


@dataclass(frozen=True)
class SourceVideo:
    """A video, by the name that its folder, table or shard has for it."""

    key: str
    stem: str  # the key but for the number that makes it unique
    name: str
    extension: str
    path: Path  # of its own file, or of the shard
    offset: int  # in that file, bytes
    size: int  # bytes
    info: dict  # its caption and what else is said of it
    problem: str | None  # why it is rejected without a look inside

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def find_videos(source: Path) -> list[SourceVideo]:
    """The videos of a folder or a table, sorted, or the one of a file; UserError where there are none."""
    if source.is_dir():
        root, infos = source, _folder(source)
    elif source.is_file() and is_table(source):
        root, infos = source.parent, read_table(source)
        _tell_of_missing(source, infos)
    elif source.is_file() and _extension(source.name) in VIDEO_EXTENSIONS:
        root, infos = source.parent, {source.name: _sidecar(source)}
    elif source.exists():
        raise UserError(f"{source} is neither a folder nor a video nor a table ({', '.join(FORMS)}).")
    else:
        raise UserError(f"There is no {source}.")
    if not infos:
        raise UserError(f"There are no videos in {source}: names that end in {', '.join(VIDEO_EXTENSIONS)} are.")
    names = sorted(infos)
    stems = [os.path.splitext(name)[0].lstrip("/").replace(".", "_") for name in names]  # a key ends at its first dot
    labels = zip(unique_keys(stems), stems, names, strict=True)
    return [_video(key, stem, name, root / name, infos[name]) for key, stem, name in labels]


def _video(key: str, stem: str, name: str, path: Path, info: dict | None) -> SourceVideo:
    size = path.stat().st_size if path.is_file() else 0
    problem = None
    if not path.is_file():
        problem = "no such file"
    elif _extension(name) not in VIDEO_EXTENSIONS:
        problem = f"unknown extension: .{_extension(name)}"
    elif info is None:
        problem = UNREADABLE
    return SourceVideo(key, stem, name, _extension(name), path, 0, size, info or {}, problem)


def _extension(name: str) -> str:
    return Path(name).suffix[1:].lower()


def unique_keys(stems: list[str]) -> list[str]:
    """A key for each stem: itself, or with a number where it is taken or is the `segment_key` of another."""
    known, taken, last = set(stems), set(), Counter()
    keys = []
    for stem in stems:
        key = stem
        while key in taken or (whole_key(key) != key and whole_key(key) in known):
            last[stem] += 1
            key = f"{stem}-{last[stem] + 1}"
        taken.add(key)
        keys.append(key)
    return keys


def segment_key(key: str, number: int) -> str:
    return f"{key}_s{number:03d}"


def whole_key(key: str) -> str:
    """What a `segment_key` was made of; any other key itself."""
    return re.sub(r"(?<=.)_s\d{3,}$", "", key)


def _folder(folder: Path) -> dict[str, dict | None]:
    """What the files beside the videos of a folder and its tables say of each; warnings tell what is not understood."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    videos = [path for path in files if _extension(path.name) in VIDEO_EXTENSIONS]
    stems = {path.with_suffix("") for path in videos}
    found = [
        path for path in files if is_table(path) and not (path.suffix == ".json" and path.with_suffix("") in stems)
    ]
    tables = _own_tables(found)
    infos: dict[str, dict | None] = {path.relative_to(folder).as_posix(): _sidecar(path) for path in videos}
    listed: dict[str, dict] = {}
    for table in tables:
        rows = read_table(table)
        _tell_of_missing(table, rows)
        listed |= {Path(os.path.relpath(table.parent / name, folder)).as_posix(): row for name, row in rows.items()}
    infos |= {name: _joined(infos.get(name), row) for name, row in listed.items()}
    silent = [name for name, info in infos.items() if info is not None and not has_caption(info)]
    if tables:
        _tell_of_unlisted(folder, tables[0], [name for name in silent if name not in listed])
    _tell_of_unread(folder, [path for path in found if path not in tables], silent)
    return infos


def _own_tables(tables: list[Path]) -> list[Path]:
    """Those that are read with the videos of their folder, of which there may be one."""
    own = [path for path in tables if path.name in IN_FOLDERS]
    own.sort(key=lambda path: (path.parent, IN_FOLDERS.index(path.name)))
    for one, other in pairwise(own):
        if one.parent == other.parent:
            raise UserError(f"{one.parent} has both {one.name} and {other.name}: keep one.")
    return own


def _joined(sidecar: dict | None, row: dict) -> dict:
    """A row of a table and what the files beside the video say: the row first, but for a caption that it lacks."""
    said = {name: value for name, value in row.items() if value is not None}
    if has_caption(sidecar or {}) and not has_caption(row):
        said.pop("caption", None)
    return (sidecar or {}) | said


def _tell_of_missing(table: Path, rows: dict[str, dict]) -> None:
    missing = [name for name in rows if not (table.parent / name).is_file()]
    if missing:
        told = f"{len(missing)} of the {len(rows)} videos that {table} names are missing, the first is {missing[0]}"
        warnings.warn(f"{told}: paths are relative to the table's folder.", stacklevel=2)


def _tell_of_unlisted(folder: Path, table: Path, names: list[str]) -> None:
    if names:
        told = f"{len(names)} videos of {folder} have no caption, and no row of {table} names them"
        warnings.warn(f"{told}, the first is {names[0]}.", stacklevel=2)


def _tell_of_unread(folder: Path, tables: list[Path], silent: list[str]) -> None:
    if tables and silent:
        told = f"{len(silent)} videos of {folder} have no caption, and {tables[0]} is not read"
        way = f"name it captions{tables[0].suffix.lower()}, or give it in place of the folder"
        warnings.warn(f"{told}: if it has their captions, {way}.", stacklevel=2)


def _sidecar(video: Path) -> dict | None:
    text, record = video.with_suffix(".txt"), video.with_suffix(".json")
    try:
        return merged(*(path.read_bytes() if path.exists() else None for path in (text, record)))
    except OSError:
        return None
