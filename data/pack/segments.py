"""Long videos cut at key frames by stream copy: nothing is encoded again, no frame is lost or shown twice."""

import io
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise
from typing import NamedTuple

import av
import numpy as np

from data.codec.decode import opened
from data.pack.probe import probe
from data.rejected import Rejected

EXTENSIONS = {"mp4": "mp4", "matroska": "mkv"}  # of the containers, as FFmpeg names them


class Segment(NamedTuple):
    """A video file of its own, without sound, and the seconds of the whole from and to which it goes."""

    start: float
    end: float
    extension: str
    file: bytes


def measure(video: bytes, seconds: float) -> list[dict]:
    """What `probe` says of each segment, with `segment`, its [start, end]; or of the whole video where it stays whole.

    It does where `split` does not cut it, and where the copies would not show the same: where their container does not
    take its codec, or where what it says cannot be copied: mkv's pixel aspect, an edit list that hides the last frames.
    """
    whole = probe(video)
    try:
        parts = [probe(part.file) | {"segment": [part.start, part.end]} for part in split(video, seconds)]
    except (Rejected, ValueError):  # ValueError: the container does not take that codec
        return [whole]
    same = all(part[name] == whole[name] for part in parts for name in ("width", "height", "rotation", "codec"))
    return parts if same and sum(part["frames"] for part in parts) == whole["frames"] else [whole]


def split(video: bytes, seconds: float) -> Iterator[Segment]:
    """Cuts a video longer than 1.5 · `seconds` at the key frames nearest to `seconds` apart; yields nothing otherwise.

    No segment is shorter than half of `seconds`, and where key frames are rare some are longer; 0 is never to cut.
    """
    with opened(video) as (container, stream):
        packets = [(p.pts, p.duration or 0, p.is_keyframe, p.is_discard) for p in _packets(container, stream)]
        second, muxer = float(1 / stream.time_base), "mp4" if "mp4" in container.format.name else "matroska"
    if not seconds or any(pts is None for pts, *_ in packets):
        return
    pts, length, key, hidden = map(np.array, zip(*packets, strict=True))
    zero = int(pts[~hidden].min())  # an edit list hides what is there to make later frames of
    pts -= zero
    since = np.minimum.accumulate(pts[::-1])[::-1]  # when the first of a packet and all after it is shown
    closed = key & (pts == since)  # nothing from there on needs an earlier packet
    cuts = _cuts(pts, since, key if muxer == "mp4" else closed, seconds * second)
    if not cuts:
        return
    times = [0, *since[cuts].tolist(), int((pts + length)[~hidden].max())]
    # Where a key frame is not closed, the file begins with the one before it, hidden by mp4's edit list.
    leads = [0, *(cut if closed[cut] else int(np.flatnonzero(key[:cut]).max(initial=0)) for cut in cuts)]
    for lead, last, (start, end) in zip(leads, [*cuts, len(pts)], pairwise(times), strict=True):
        with opened(video) as (container, stream):
            file = _copy(islice(_packets(container, stream), lead, last), stream, muxer, zero + start)
        yield Segment(round(start / second, 3), round(end / second, 3), EXTENSIONS[muxer], file)


def _packets(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    return (packet for packet in container.demux(stream) if packet.size)  # the last one, empty, is for decoders


def _cuts(pts: np.ndarray, since: np.ndarray, key: np.ndarray, distance: float) -> list[int]:
    """The key packets at which to cut, where all before them in the file is shown before them and what follows."""
    before = np.concatenate([pts[:1] - 1, np.maximum.accumulate(pts)[:-1]])
    cuts, begin, end = [], 0, pts.max()
    while end - begin >= 1.5 * distance:
        far = (since >= begin + distance / 2) & (since <= end - distance / 2)
        possible = np.flatnonzero(key & (before < since) & far)
        if not len(possible):
            break
        cuts.append(int(possible[abs(since[possible] - begin - distance).argmin()]))
        begin = since[cuts[-1]]
    return cuts


def _copy(packets: Iterable[av.Packet], stream: av.VideoStream, muxer: str, zero: int) -> bytes:
    file = io.BytesIO()
    # Without bitexact, the same video gives other bytes each time.
    with av.open(file, "w", format=muxer, options={"fflags": "+bitexact"}) as container:
        copy = container.add_stream_from_template(stream, opaque=True)
        copy.sample_aspect_ratio = stream.sample_aspect_ratio or 0  # which its container may know alone
        for packet in packets:
            packet.stream = copy
            packet.pts, packet.dts = packet.pts - zero, None if packet.dts is None else packet.dts - zero
            container.mux_one(packet)
    return file.getvalue()
