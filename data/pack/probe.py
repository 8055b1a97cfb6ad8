"""What a video file is, known by decoding all of it."""

from data.codec.decode import display_matrix, is_sideways, opened, pixel_aspect, timed
from data.rejected import Rejected


def probe(video: bytes) -> dict[str, float | int | str | None]:
    """What `shards.MEASURED` names; raises `Rejected` for a video that is not whole.

    `duration` is in seconds, from the first frame to the end of the last; `width` and `height` are those of the
    picture on display, turned by `rotation` degrees clockwise and with square pixels; `fps` is the mean rate, None of
    a single frame without a duration; `frames` is how many there are; `size` is the file's in bytes.
    """
    if not video:
        raise Rejected("empty file")
    with opened(video) as (container, stream):
        duration, count, damaged = 0.0, 0, 0
        for begin, length, frame in timed(container.decode(stream)):
            duration, count, damaged = begin + length, count + 1, damaged + frame.is_corrupt
        if not count:
            raise Rejected("no frames")
        if damaged:
            raise Rejected(f"damaged: {damaged} of {count} frames")
        declared = float(stream.duration * stream.time_base) if stream.duration else None
        _check_length(video, duration, declared, slack=0.1 + 2 * duration / count)
        height, width = frame.height, round(frame.width * pixel_aspect(stream))
        if is_sideways(display_matrix(frame)):
            height, width = width, height
        return {
            "duration": round(duration, 3),
            "width": width,
            "height": height,
            "fps": round(count / duration, 3) if duration else None,
            "rotation": -frame.rotation % 360,
            "codec": stream.codec_context.codec.canonical_name,
            "frames": count,
            "size": len(video),
        }


def _check_length(video: bytes, duration: float, declared: float | None, slack: float) -> None:
    """Rejects a video that ends early: decoders pass over the missing rest of a file without an error."""
    if declared is None:  # Matroska and others know only when the longest stream ends, which need not be the video
        with opened(video) as (container, _):
            declared = (container.duration or 0) / 1e6
            packets = [packet for packet in container.demux() if packet.pts is not None]
            duration = max(float((packet.pts + (packet.duration or 0)) * packet.time_base) for packet in packets)
    if duration < declared - slack:
        raise Rejected(f"truncated: {duration:.2f} of {declared:.2f} s are there")
