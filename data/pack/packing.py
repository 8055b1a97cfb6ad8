"""Captioned videos to shards: long ones cut, broken ones named, no shard made twice."""

import fcntl
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate, groupby
from pathlib import Path

from tqdm import tqdm

from data.pack.captioning import Captioner
from data.pack.probe_processes import measure_all
from data.pack.segments import split
from data.pack.shard_sources import find_sources
from data.pack.sources import SourceVideo, segment_key, whole_key
from data.rejected import Rejected
from data.shards.index import read_index, write_atomically
from data.shards.records import MEASURED_BY, has_caption, measured_by_pack
from data.shards.writer import write_shard
from lightning_semgen.errors import UserError

RECORD, REJECTED, LOCK = "pack.json", "rejected.jsonl", "pack.lock"


def pack_videos(
    source: Path,
    out: Path,
    shard_size: int,
    val_share: float,
    segment_seconds: float,
    caption_with: str | None,
    caption_prompt: str,
    workers: int,
) -> None:
    """Packs captioned videos into WebDataset shards; the options are those of `lightning pack`."""
    videos = find_sources(source)
    captioner = Captioner(caption_with, caption_prompt) if caption_with else None
    shards = _plan(videos, shard_size * 10**6, val_share)
    options = {"shard_size": shard_size, "val_share": val_share, "segment_seconds": segment_seconds}
    options |= {"caption_with": caption_with, "caption_prompt": caption_prompt}
    with _locked(out):
        _claim(out, options, {"source": str(source), "videos": _digest(videos)})
        todo = _unwritten(out, shards)
        left = sum(map(len, todo.values()))
        with tqdm(total=len(videos), initial=len(videos) - left, desc=f"packing into {out}", unit="video") as progress:
            writer = _Writer(out, segment_seconds, captioner, workers, progress)
            for name, members in todo.items():
                writer.write(name, members)
        _report(out, [out / name for name in shards], segment_seconds)


# Which shard holds what


def _plan(videos: list[SourceVideo], shard_bytes: int, val_share: float) -> dict[str, list[SourceVideo]]:
    """The videos of each shard. It is decided before anything is decoded, so that it never depends on earlier work."""
    splits: dict[str, list[SourceVideo]] = {"train": [], "val": []}
    for video in videos:
        splits["val" if _draw(video) < val_share else "train"].append(video)
    return {
        f"{split}-{number:06d}.tar": part
        for split, part_of in splits.items()
        for number, part in enumerate(_parts(part_of, shard_bytes))
    }


def _draw(video: SourceVideo) -> float:
    """A number in [0, 1) that files of one name have in common: copies in two formats, segments packed anew."""
    return int.from_bytes(blake2b(whole_key(video.stem).encode(), digest_size=6).digest()) / 2**48


def _parts(videos: list[SourceVideo], size: int) -> list[list[SourceVideo]]:
    starts = accumulate((video.size for video in videos), initial=0)
    groups = groupby(zip(videos, starts, strict=False), key=lambda pair: pair[1] // size)
    return [[video for video, _ in group] for _, group in groups]


def _digest(videos: list[SourceVideo]) -> str:
    content = [(video.name, video.size, video.info, video.problem) for video in videos]
    return blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()


# Where a killed run goes on


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Makes the folder and keeps other processes from packing into it; UserError where one does."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made a folder: {error.strerror}.") from error
    with (out / LOCK).open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not kept by workers of a killed process
        except (BlockingIOError, PermissionError) as error:
            raise UserError(f"Another `lightning pack` is at work in {out}: wait, or name another folder.") from error
        yield


def _claim(out: Path, options: dict, content: dict) -> None:
    """Notes what is packed into a folder, and how; UserError where that is something else."""
    path = out / RECORD
    if not path.exists():
        if any(out.glob("*.tar")):
            raise UserError(f"{out} holds shards that were not packed there: name another folder.")
        write_atomically(path, json.dumps(options | content, indent=1, allow_nan=False))
    found = json.loads(path.read_text())
    for name, value in options.items():
        if found.get(name) != value:
            raise UserError(
                f"{out} was packed with {name} {found.get(name)}, not {value}: delete it or name another folder."
            )
    if found["videos"] != content["videos"]:
        raise UserError(
            f"{out} was packed from other videos or captions (of {found['source']}) than {content['source']} has now:"
            " delete it or name another folder."
        )


def _unwritten(out: Path, shards: dict[str, list[SourceVideo]]) -> dict[str, list[SourceVideo]]:
    """The shards that are not there yet; what a killed run had begun of them is removed."""
    for partial in out.glob("*.partial"):
        partial.unlink()
    rejected = _rejected(out)
    todo = {
        name: videos
        for name, videos in shards.items()
        if not (out / name).exists() and not all(video.name in rejected for video in videos)
    }
    begun = {video.name for videos in todo.values() for video in videos}
    write_atomically(out / REJECTED, _lines({name: rejected[name] for name in rejected if name not in begun}))
    return todo


def _rejected(out: Path) -> dict[str, str]:
    """Causes by path; a last line that was cut off belongs to a shard that is not there yet."""
    path = out / REJECTED
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return {row["path"]: row["cause"] for row in rows}


def _lines(causes: dict[str, str]) -> str:
    return "".join(json.dumps({"path": path, "cause": cause}) + "\n" for path, cause in causes.items())


# The work


@dataclass(frozen=True)
class _Writer:
    out: Path
    segment_seconds: float
    captioner: Captioner | None
    workers: int
    progress: tqdm

    def write(self, name: str, videos: list[SourceVideo]) -> None:
        """Writes one shard, and before that the causes of what it leaves out."""
        measured = measure_all(videos, self.segment_seconds, self.workers, self.progress.update)
        findings = list(zip(videos, measured, strict=True))
        with (self.out / REJECTED).open("a") as file:
            file.write(_lines({video.name: cause for video, cause in findings if isinstance(cause, str)}))
        good = [(video, parts) for video, parts in findings if isinstance(parts, list)]
        if good:
            write_shard(self.out / name, (sample for found in good for sample in self._samples(*found)))

    def _samples(self, video: SourceVideo, parts: list[dict]) -> Iterator[dict]:
        """The video, or its segments: cut here again, so that no more than one has to be kept or sent."""
        file = video.read()
        if "segment" not in parts[0]:
            yield self._sample(video, video.key, video.extension, file, parts[0])
            return
        for number, (part, segment) in enumerate(zip(parts, split(file, self.segment_seconds), strict=True)):
            yield self._sample(video, segment_key(video.key, number), segment.extension, segment.file, part)

    def _sample(self, video: SourceVideo, key: str, extension: str, file: bytes, measured: dict) -> dict:
        info = {"path": video.name} | video.info | measured | MEASURED_BY
        was_packed = bool(measured_by_pack(video.info, video.size))  # else its segment may be anything
        match was_packed, video.info.get("segment"), measured.get("segment"):
            case True, [int() | float() as begin, _], [start, end]:
                info["segment"] = [round(begin + start, 3), round(begin + end, 3)]
        if self.captioner and not has_caption(info):
            self.progress.set_postfix_str(f"captioning {key}")
            with suppress(Rejected):
                info |= {"caption": self.captioner(file, measured), "captioned_with": self.captioner.name}
        return {"__key__": key, extension: file, "json": info}


def _report(out: Path, shards: list[Path], segment_seconds: float) -> None:
    """Prints how many clips were packed, and how many videos were not, by cause up to its colon."""
    rows = [row for shard in shards if shard.exists() for row in read_index(shard)]
    causes = Counter(cause.partition(":")[0] for cause in _rejected(out).values())
    if not rows:
        raise UserError(f"None of the {causes.total()} videos can be used: {out / REJECTED} says why.")
    hours = sum(row["duration"] for row in rows) / 3600
    long = sum(row["duration"] > 1.5 * segment_seconds for row in rows) if segment_seconds else 0
    table = [
        ("packed", len(rows), f"{hours:.2f} h"),
        ("without a caption", sum(not row["caption"] for row in rows), ""),
        *([("left whole, though long", long, "")] if long else []),
        ("rejected", causes.total(), out / REJECTED if causes else ""),
        *((f"  {cause}", number, "") for cause, number in causes.most_common()),
    ]
    for name, number, note in table:
        print(f"{name:<36}{number:>10,}   {note}".rstrip())
