"""Captioned videos to shards: bytes as they are, broken files named, no shard made twice."""

import json
import os
from collections import Counter
from hashlib import blake2b
from itertools import accumulate, groupby
from pathlib import Path

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.decode import Rejected
from data.probe import probe
from data.shards import read_index, write_atomically, write_shard
from data.sources import Video, find_videos
from lightning_semgen.errors import UserError

CORES = os.cpu_count() or 1
RECORD, REJECTED = "pack.json", "rejected.jsonl"


def pack_videos(
    source: Path,
    out: Path,
    shard_size: PositiveInt = 512,
    val_share: ClosedUnitInterval = 0.0,
    workers: NonNegativeInt = CORES,
) -> None:
    """Packs captioned videos into WebDataset shards. Killed, it goes on where it stopped when it is called again.

    Args:
        source: folder of videos, with captions in NAME.txt or NAME.json beside NAME.mp4 or in a captions.jsonl or
            captions.csv; or such a table itself, with columns path (or file), relative to the table, and caption; or
            one video. Whatever else is in the JSON or the table is kept.
        out: folder of the shards, train-*.tar, and of rejected.jsonl, which names the files that are left out and why.
        shard_size: size of a shard in MB.
        val_share: share of the clips to hold out, as val-*.tar; which ones depends on their names alone.
        workers: processes that check the files, each of which is decoded from end to end.
    """
    videos = find_videos(source)
    shards = _plan(videos, shard_size * 10**6, val_share)
    _claim(out, {"source": str(source), "shard_size": shard_size, "val_share": val_share, "videos": _digest(videos)})
    todo = _unwritten(out, shards)
    left = sum(map(len, todo.values()))
    with tqdm(total=len(videos), initial=len(videos) - left, desc=f"packing into {out}", unit="clip") as progress:
        for name, members in todo.items():
            _write(out, name, members, workers, progress)
    _report(out, [out / name for name in shards])


# Which shard holds what


def _plan(videos: list[Video], shard_bytes: int, val_share: float) -> dict[str, list[Video]]:
    """What goes into each shard, settled before anything is decoded so that it never depends on what was done."""
    splits: dict[str, list[Video]] = {"train": [], "val": []}
    for video in videos:
        splits["val" if _draw(video) < val_share else "train"].append(video)
    return {
        f"{split}-{number:06d}.tar": part
        for split, part_of in splits.items()
        for number, part in enumerate(_parts(part_of, shard_bytes))
    }


def _draw(video: Video) -> float:
    """A number in [0, 1) that files of one name have in common, so that copies in two formats stay together."""
    return int.from_bytes(blake2b(video.stem.encode(), digest_size=6).digest()) / 2**48


def _parts(videos: list[Video], size: int) -> list[list[Video]]:
    starts = accumulate((video.size for video in videos), initial=0)
    groups = groupby(zip(videos, starts, strict=False), key=lambda pair: pair[1] // size)
    return [[video for video, _ in group] for _, group in groups]


def _digest(videos: list[Video]) -> str:
    content = [(video.name, video.size, video.info, video.problem) for video in videos]
    return blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()


# Where a killed run goes on


def _claim(out: Path, record: dict) -> None:
    """Notes what is packed into a folder; UserError where that is something else."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made a folder: {error.strerror}.") from error
    path = out / RECORD
    if not path.exists():
        if any(out.glob("*.tar")):
            raise UserError(f"{out} holds shards that were not packed there: name another folder.")
        write_atomically(path, json.dumps(record, indent=1))
    found = json.loads(path.read_text())
    for name in ("shard_size", "val_share"):
        if found[name] != record[name]:
            raise UserError(
                f"{out} was packed with {name} {found[name]}, not {record[name]}: delete it or name another folder."
            )
    if found["videos"] != record["videos"]:
        raise UserError(
            f"{out} was packed from other videos or captions (of {found['source']}) than {record['source']} has now:"
            " delete it or name another folder."
        )


def _unwritten(out: Path, shards: dict[str, list[Video]]) -> dict[str, list[Video]]:
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


def _write(out: Path, name: str, videos: list[Video], workers: int, progress: tqdm) -> None:
    """Writes one shard, and before that the causes of what it leaves out."""
    findings = list(zip(videos, _probe_all(videos, workers, progress), strict=True))
    with (out / REJECTED).open("a") as file:
        file.write(_lines({video.name: cause for video, cause in findings if isinstance(cause, str)}))
    good = [(video, measured) for video, measured in findings if isinstance(measured, dict)]
    if good:
        write_shard(out / name, (_sample(video, measured) for video, measured in good))


def _sample(video: Video, measured: dict) -> dict:
    info = video.info | {"path": video.name} | measured
    return {"__key__": video.key, video.extension: video.path.read_bytes(), "json": info}


def _probe_all(videos: list[Video], workers: int, progress: tqdm) -> list[dict | str]:
    """What was measured of each video, or the cause why it is rejected."""
    findings: list[dict | str] = []
    while len(findings) < len(videos):
        try:
            for finding in _probes(videos[len(findings) :], workers):
                findings.append(finding)
                progress.update()
        except RuntimeError:  # a file has killed its process: this one, or one soon after it
            findings += map(_probe_alone, videos[len(findings) :][:1])
            progress.update()
    return findings


def _probe_alone(video: Video) -> dict | str:
    try:
        return next(iter(_probes([video], 1)))
    except RuntimeError:
        return "kills the process that decodes it"


def _probes(videos: list[Video], workers: int) -> DataLoader:
    return DataLoader(videos, batch_size=None, collate_fn=_probe, num_workers=workers)


def _probe(video: Video) -> dict | str:
    if video.problem:
        return video.problem
    try:
        return probe(video.path.read_bytes())
    except Rejected as cause:
        return str(cause)
    except Exception as error:  # whatever a wild file does to a decoder, it stops no run
        return f"cannot be read: {type(error).__name__}"


def _report(out: Path, shards: list[Path]) -> None:
    """Prints how many clips were packed, and how many were not, by cause up to its colon."""
    rows = [row for shard in shards if shard.exists() for row in read_index(shard)]
    causes = Counter(cause.partition(":")[0] for cause in _rejected(out).values())
    if not rows:
        raise UserError(f"None of the {causes.total()} videos can be used: {out / REJECTED} says why.")
    hours = sum(row["duration"] for row in rows) / 3600
    table = [
        ("packed", len(rows), f"{hours:.2f} h"),
        ("without a caption", sum(not row["caption"] for row in rows), ""),
        ("rejected", causes.total(), out / REJECTED if causes else ""),
        *((f"  {cause}", number, "") for cause, number in causes.most_common()),
    ]
    for name, number, note in table:
        print(f"{name:<36}{number:>10,}   {note}".rstrip())
