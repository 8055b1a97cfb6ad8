"""Tables of videos and their captions, in the forms and with the column names that others use."""

import csv
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from data.shards.records import CAPTIONS, has_caption, plain, with_caption
from lightning_semgen.errors import UserError

FORMS = (".jsonl", ".csv", ".tsv", ".json", ".parquet")
# Tables that are read with a folder; the Hub's name is metadata, but metadata.json is more often about the whole.
IN_FOLDERS = tuple(name + form for name in ("captions", "metadata") for form in FORMS if name + form != "metadata.json")
VIDEOS = ("path", "file_name", "file", "video", "video_path")  # the names that a video's path goes by, the surest first
SHOWN = 300  # characters of a row that a message shows


def is_table(path: Path) -> bool:
    return path.suffix.lower() in FORMS


def read_table(path: Path) -> dict[str, dict]:
    """What a table says of each video, by the path relative to the table's folder; UserError where it names none.

    A warning says what was seen where no row has a caption.
    """
    infos: dict[str, dict] = {}
    first = None
    for place, row in _rows(path):
        _check(path, place, row)
        first = first or row
        column = _path_column(row)
        if column is None:
            others = ", ".join(VIDEOS[1:])
            raise UserError(f"{path}, {place}: there is no path (or {others}) that names the video{_seen(row)}.")
        name = Path(os.path.relpath(path.parent / row[column], path.parent)).as_posix()
        if name in infos:
            raise UserError(f"{path}, {place}: {name} is listed before; a video has one row.")
        infos[name] = with_caption({own: _value(own, value) for own, value in row.items() if own != column})
    if not infos:
        raise UserError(f"There are no rows in {path}.")
    if not any(map(has_caption, infos.values())):
        known = f"{', '.join(CAPTIONS[:-1])} or {CAPTIONS[-1]}"
        warnings.warn(f"No row of {path} has a caption, which is looked for in {known}{_seen(first)}.", stacklevel=2)
    return infos


def _check(path: Path, place: str, row: object) -> None:
    if not isinstance(row, dict):
        raise UserError(f"{path}, {place}: there is no row with a path but {str(row)[:SHOWN]!r}.")
    if None in row:
        raise UserError(f"{path}, {place}: more fields than columns; a caption with commas needs quotes.")


def _path_column(row: dict) -> str | None:
    """The column that holds the path of a row's video; None where there is none."""
    columns = {str(name).strip().lower(): name for name in reversed(row)}
    for known in VIDEOS:
        value = row.get(columns.get(known))
        if isinstance(value, str) and value.strip():
            return columns[known]
    return None


def _value(column: str, value: object) -> object:
    """A value as JSON can hold it; a list of captions that is written as a text is a list."""
    if str(column).strip().lower() == "captions" and isinstance(value, str) and value.startswith("["):
        with suppress(ValueError, RecursionError):
            return plain(json.loads(value))
    return plain(value)


def _seen(row: dict) -> str:
    """The end of a message: what was found in place of what was looked for."""
    shown = json.dumps(plain(row), ensure_ascii=False)
    shown = shown if len(shown) <= SHOWN else shown[:SHOWN] + "…"
    return f"; its columns are {', '.join(map(str, row))}, the row is {shown}"


def _rows(path: Path) -> Iterator[tuple[str, object]]:
    """The rows of a table, each with the words for its place."""
    read = {".jsonl": _lines, ".json": _list, ".parquet": _parquet}.get(path.suffix.lower(), _separated)
    number = 0
    try:
        for number, row in read(path):
            yield f"{'row' if read in (_list, _parquet) else 'line'} {number}", row
    except (ValueError, RecursionError, csv.Error, OSError) as error:
        where = f", after line {number}" if read is _separated else ""
        raise UserError(f"{path} cannot be read{where}: {str(error).rstrip('.')}.") from error


def _lines(path: Path) -> Iterator[tuple[int, object]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path} cannot be read, line {number}: {error}.") from error


def _separated(path: Path) -> Iterator[tuple[int, dict]]:
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True, delimiter=separator)
        yield from ((reader.line_num, row) for row in reader)


def _list(path: Path) -> Iterator[tuple[int, object]]:
    rows = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list):
        seen = f"its keys are {', '.join(rows)}" if isinstance(rows, dict) else f"it holds {rows!r}"
        raise UserError(f"{path} is not a list of rows: {seen[:SHOWN]}.")
    yield from enumerate(rows, 1)


def _parquet(path: Path) -> Iterator[tuple[int, dict]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{path} is read by pyarrow, which is not installed: `pip install pyarrow`.") from error
    with parquet.ParquetFile(path) as file:
        batches = (batch.to_pylist() for batch in file.iter_batches())
        yield from enumerate((row for rows in batches for row in rows), 1)
