"""WebDataset tar shards, written at once or not at all."""

import glob
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import webdataset as wds

from data.shards.index import read_index, unfinished_path


@contextmanager
def shard_writer(path: Path) -> Iterator[Callable[[dict], None]]:
    """Writes samples {"__key__": …, "mp4": bytes, "json": dict, …} as they come, at the end the index; neither is there
    before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = unfinished_path(path)
    try:
        with wds.TarWriter(str(unfinished), mtime=0) as writer:
            yield lambda sample: writer.write(_encoded(sample))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    read_index(path)


def _encoded(sample: dict) -> dict:
    """The sample with its JSON as text, in which NaN, that no other program reads, is an error."""
    if not isinstance(sample.get("json"), dict):
        return sample
    return sample | {"json": json.dumps(sample["json"], allow_nan=False).encode()}


def remove_unfinished(path: Path) -> None:
    """Deletes what a killed process has left of a shard; no other process may be writing that shard."""
    for unfinished in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
        unfinished.unlink()


def write_shard(path: Path, samples: Iterable[dict]) -> None:
    with shard_writer(path) as write:
        for sample in samples:
            write(sample)
