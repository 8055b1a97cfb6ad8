"""What the videos of a shard are, found in processes of their own, since a wild file may kill its decoder."""

from collections.abc import Callable
from functools import partial

from torch.utils.data import DataLoader

from data.pack.segments import measure
from data.pack.sources import SourceVideo
from data.rejected import Rejected


def measure_all(
    videos: list[SourceVideo], segment_seconds: float, workers: int, advance: Callable[[], None]
) -> list[list[dict] | str]:
    """What `measure` says of each video, or the cause why it is rejected; calls `advance` after each."""
    findings: list[list[dict] | str] = []
    while len(findings) < len(videos):
        try:
            for finding in _findings(videos[len(findings) :], segment_seconds, workers):
                findings.append(finding)
                advance()
        except RuntimeError:  # a file has killed its process: this one, or one soon after it
            findings += [_alone(video, segment_seconds) for video in videos[len(findings) :][:1]]
            advance()
    return findings


def _alone(video: SourceVideo, segment_seconds: float) -> list[dict] | str:
    try:
        return next(iter(_findings([video], segment_seconds, 1)))
    except RuntimeError:
        return "kills the process that decodes it"


def _findings(videos: list[SourceVideo], segment_seconds: float, workers: int) -> DataLoader:
    find = partial(_find, segment_seconds=segment_seconds)
    return DataLoader(videos, batch_size=None, collate_fn=find, num_workers=workers)


def _find(video: SourceVideo, segment_seconds: float) -> list[dict] | str:
    if video.problem:
        return video.problem
    try:
        return measure(video.read(), segment_seconds)
    except Rejected as cause:
        return str(cause)
    except Exception as error:  # whatever a wild file does to a decoder, it stops no run
        return f"cannot be read: {type(error).__name__}"
