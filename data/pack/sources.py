"""The videos of a folder, a table or a file, and what is said of each."""

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.shards.index import has_caption
from data.shards.reader import VIDEO_EXTENSIONS
from lightning_semgen.errors import UserError

TABLES = ("captions.jsonl", "captions.csv")
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
        tables = [source / name for name in TABLES if (source / name).exists()]
        if len(tables) > 1:
            raise UserError(f"{source} has both {' and '.join(TABLES)}: keep one.")
        root, infos = source, _sidecars(source) | (_table(tables[0]) if tables else {})
    elif source.is_file() and source.suffix in (".jsonl", ".csv"):
        root, infos = source.parent, _table(source)
    elif source.is_file() and _extension(source.name) in VIDEO_EXTENSIONS:
        root, infos = source.parent, {source.name: _sidecar(source)}
    elif source.exists():
        raise UserError(f"{source} is neither a folder nor a video nor a .jsonl or .csv table.")
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


def _sidecars(folder: Path) -> dict[str, dict | None]:
    """What the .json and .txt beside each video of a folder say of it, None where they are broken."""
    videos = [path for path in folder.rglob("*") if _extension(path.name) in VIDEO_EXTENSIONS and path.is_file()]
    return {path.relative_to(folder).as_posix(): _sidecar(path) for path in videos}


def _sidecar(video: Path) -> dict | None:
    text, record = video.with_suffix(".txt"), video.with_suffix(".json")
    try:
        return merged(*(path.read_bytes() if path.exists() else None for path in (text, record)))
    except OSError:
        return None


def merged(text: bytes | None, record: bytes | None) -> dict | None:
    """What a .txt, the caption, and a .json say together, the latter first; None where they are broken."""
    try:
        info = json.loads(record.decode("utf-8-sig")) if record is not None else {}
        if not isinstance(info, dict):
            return None
        if text is not None and not has_caption(info):
            info |= {"caption": text.decode("utf-8-sig").strip()}
        return info
    except ValueError:
        return None


def _table(path: Path) -> dict[str, dict]:
    """The rows of a .jsonl or .csv by the path each names, relative to the table's folder."""
    infos: dict[str, dict] = {}
    for line, row in _rows(path):
        column = next((name for name in ("path", "file") if isinstance(row, dict) and row.get(name)), None)
        if column is None:
            raise UserError(f"{path}, line {line}: there is no path (or file) that names the video.")
        if None in row:
            raise UserError(f"{path}, line {line}: more fields than columns; a caption with commas needs quotes.")
        name = Path(os.path.relpath(path.parent / str(row.pop(column)), path.parent)).as_posix()
        if name in infos:
            raise UserError(f"{path}, line {line}: {name} is listed before; a video has one row.")
        infos[name] = row
    return infos


def _rows(path: Path) -> Iterator[tuple[int, dict]]:
    """The rows of a table, each with the number of its line."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                reader = csv.DictReader(file, strict=True)
                yield from ((reader.line_num, row) for row in reader)
            else:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield number, json.loads(line)
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read, line {number}: {error}.") from error
