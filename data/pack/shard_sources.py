"""The videos in shards, ours or others', and what is said of each."""

import os
from pathlib import Path
from typing import BinaryIO

from data.pack.sources import UNREADABLE, SourceVideo, find_videos, unique_keys
from data.shards.reader import VIDEO_EXTENSIONS, Shards, expand
from data.shards.records import merged
from lightning_semgen.errors import UserError


def find_sources(source: Path) -> list[SourceVideo]:
    """The videos of what `find_videos` takes, or of shards: a folder of .tar files, one, or a glob or brace pattern."""
    if source.is_dir():
        shards = sorted(source.glob("*.tar"))
        if shards and any(path.suffix[1:].lower() in VIDEO_EXTENSIONS for path in source.rglob("*")):
            raise UserError(f"{source} has both videos and shards: name the shards alone, as '{source / '*.tar'}'.")
    else:
        shards = expand(str(source), hint="check the pattern") if source.suffix == ".tar" else []
    return _shard_videos(shards) if shards else find_videos(source)


def _shard_videos(shards: list[Path]) -> list[SourceVideo]:
    """A video for each sample, by the name SHARD.tar:KEY, where SHARD begins where the paths of the shards part."""
    root = os.path.commonpath([path.absolute().parent for path in shards])
    rows = {path: Shards.rows(path) for path in shards}
    keys = iter(unique_keys([row["key"] for samples in rows.values() for row in samples]))
    videos = []
    for path, samples in rows.items():
        name = Path(os.path.relpath(path, root)).as_posix()
        with path.open("rb") as file:
            videos += [_video(next(keys), f"{name}:{row['key']}", path, row, file) for row in samples]
    if not videos:
        raise UserError(f"There are no samples in the shards of {root}.")
    return videos


def _video(key: str, name: str, path: Path, row: dict, file: BinaryIO) -> SourceVideo:
    members = {extension.lower(): place for extension, place in row["members"].items()}
    extension = next((extension for extension in VIDEO_EXTENSIONS if extension in members), "")
    offset, size = members.get(extension, (0, 0))
    info = merged(*(_content(file, members.get(extension)) for extension in ("txt", "json")))
    problem = row.get("problem") or (UNREADABLE if info is None else None if extension else "no video member")
    return SourceVideo(key, row["key"], name, extension, path, offset, size, info or {}, problem)


def _content(file: BinaryIO, place: tuple[int, int] | None) -> bytes | None:
    if place is None:
        return None
    file.seek(place[0])
    return file.read(place[1])
