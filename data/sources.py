"""The videos of a folder, a table or a file, and what is said of each."""

import csv
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

from data.shards import VIDEO_EXTENSIONS
from lightning_semgen.errors import UserError

TABLES = ("captions.jsonl", "captions.csv")


@dataclass(frozen=True)
class Video:
    """A video file, by the name that its folder or table has for it."""

    key: str
    name: str
    path: Path
    info: dict  # its caption and what else is said of it
    size: int  # bytes
    problem: str | None  # why it is rejected without a look inside

    @property
    def stem(self) -> str:
        """The key but for the number that makes it unique."""
        return _stem(self.name)

    @property
    def extension(self) -> str:
        return _extension(self.name)


def find_videos(source: Path) -> list[Video]:
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
    keys = _keys(infos)
    return [_video(key, name, root / name, infos[name]) for name, key in keys.items()]


def _video(key: str, name: str, path: Path, info: dict | None) -> Video:
    size = path.stat().st_size if path.is_file() else 0
    problem = None
    if not path.is_file():
        problem = "no such file"
    elif _extension(name) not in VIDEO_EXTENSIONS:
        problem = f"unknown extension: .{_extension(name)}"
    elif info is None:
        problem = "its .json or .txt is not readable"
    return Video(key, name, path, info or {}, size, problem)


def _extension(name: str) -> str:
    return Path(name).suffix[1:].lower()


def _keys(names: Iterable[str]) -> dict[str, str]:
    """The sorted names with unique keys; a key ends at its first dot, so it must have none."""
    keys: dict[str, str] = {}
    for name in sorted(names):
        stem = _stem(name)
        candidates = chain([stem], (f"{stem}-{number}" for number in count(2)))
        keys[next(key for key in candidates if key not in keys)] = name
    return {name: key for key, name in keys.items()}


def _stem(name: str) -> str:
    return os.path.splitext(name)[0].lstrip("/").replace(".", "_")


def _sidecars(folder: Path) -> dict[str, dict | None]:
    """What the .json and .txt beside each video of a folder say of it, None where they are broken."""
    videos = [path for path in folder.rglob("*") if _extension(path.name) in VIDEO_EXTENSIONS and path.is_file()]
    return {path.relative_to(folder).as_posix(): _sidecar(path) for path in videos}


def _sidecar(video: Path) -> dict | None:
    text, record = video.with_suffix(".txt"), video.with_suffix(".json")
    try:
        info = json.loads(record.read_text("utf-8-sig")) if record.exists() else {}
        caption = {"caption": text.read_text("utf-8-sig").strip()} if text.exists() else {}
        return caption | info
    except (ValueError, TypeError, OSError):
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
