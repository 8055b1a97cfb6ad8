"""Long videos in segments: together exactly the frames of the whole, each a file of its own that shows them alike."""

import io
import os
from fractions import Fraction
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import SHARED
from test_wild import with_display_matrix

from data.codec.decode import display_matrix, opened, pixel_aspect, timed
from data.codec.hdr import PQ
from data.pack.segments import Segment, measure, split

CLIPS = Path(os.environ.get("SEMGEN_CLIPS", SHARED / "clips"))
needs_clips = pytest.mark.skipif(not CLIPS.is_dir(), reason="no folder of wild clips: name one in SEMGEN_CLIPS")


def film(frames: int, format: str = "mp4", codec: str = "libx264", key_every: int = 12, **options) -> bytes:
    """Frames of 48 x 32 at 24 fps that all differ, and a sound."""
    noise, buffer = np.random.default_rng(0), io.BytesIO()
    with av.open(buffer, "w", format=format) as container:
        stream = container.add_stream(codec, rate=24, options={"sc_threshold": "0"} | options.pop("options", {}))
        for name, value in {"width": 48, "height": 32, "pix_fmt": "yuv420p", "gop_size": key_every, **options}.items():
            setattr(stream, name, value)
        sound = container.add_stream("libopus" if format == "webm" else "aac", rate=48000)
        silence = av.AudioFrame.from_ndarray(np.zeros((2, 960), np.float32), "fltp", "stereo")
        silence.rate = 48000
        for _ in range(frames):
            picture = noise.integers(0, 256, (32, 48, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux([*stream.encode(), *sound.encode(silence), *sound.encode()])
    return buffer.getvalue()


def shown(video: bytes) -> tuple[list[tuple[float, str]], tuple]:
    """The time and the pixels of each frame, and how they are to be shown."""
    with opened(video) as (container, stream):
        frames = [(time, frame) for time, _, frame in timed(container.decode(stream))]
        codec, first = stream.codec_context, frames[0][1]
        look = (
            (first.format.name, display_matrix(first).tolist(), pixel_aspect(stream))
            + (codec.color_trc, codec.color_primaries, codec.colorspace, codec.color_range)
            + (sorted(data.type.name for data in first.side_data if data.type.name != "SEI_UNREGISTERED"),)
        )
        pixels = [blake2b(frame.to_ndarray().tobytes(), digest_size=8).hexdigest() for _, frame in frames]
    return [(time, picture) for (time, _), picture in zip(frames, pixels, strict=True)], look


def check(video: bytes, segments: list[Segment]) -> None:
    """That segments are the video, or its beginning."""
    frames, look = shown(video)
    parts = [shown(segment.file) for segment in segments]
    assert all(part_look == look for _, part_look in parts)
    together = [frame for part, _ in parts for frame in part]
    assert [picture for _, picture in together] == [picture for _, picture in frames[: len(together)]]
    times = [segment.start + time for segment, (part, _) in zip(segments, parts, strict=True) for time, _ in part]
    np.testing.assert_allclose(times, [time for time, _ in frames[: len(times)]], atol=1.1e-3)
    assert segments[0].start == 0 and all(one.end == two.start for one, two in pairwise(segments))
    for segment in segments:
        with av.open(io.BytesIO(segment.file)) as container:
            (stream,) = container.streams
            assert not stream.start_time


FAST = {"options": {"deadline": "realtime", "cpu-used": "8"}}
SOURCES = {
    "mp4": {},
    "mkv": {"format": "matroska"},
    "webm": {"format": "webm", "codec": "libvpx-vp9", **FAST},
    "ts": {"format": "mpegts"},
    "hdr": {"pix_fmt": "yuv420p10le", "color_trc": PQ, "color_primaries": 9, "colorspace": 9},
    "wide pixels": {"sample_aspect_ratio": Fraction(4, 3)},
    "wide pixels that only the container knows": {"codec": "libvpx-vp9", "sample_aspect_ratio": Fraction(4, 3), **FAST},
}


@pytest.mark.parametrize("options", SOURCES.values(), ids=SOURCES)
def test_segments_are_the_video(options):
    video = film(130, **options)
    segments = list(split(video, 2.0))
    assert [round(segment.end, 1) for segment in segments] == [2.0, 4.0, 5.4]
    check(video, segments)
    assert list(split(video, 2.0)) == segments
    parts = measure(video, 2.0)
    assert [part["segment"] for part in parts] == [[segment.start, segment.end] for segment in segments]
    assert [part["size"] for part in parts] == [len(segment.file) for segment in segments]


def test_segments_of_a_turned_video_are_turned():
    video = with_display_matrix(film(130), (0, 1, -1, 0))
    segments = list(split(video, 1.0))
    assert len(segments) == 5 and measure(video, 1.0)[3]["rotation"] == 90
    check(video, segments)


def test_a_key_frame_whose_neighbours_need_the_frames_before_it_is_no_obstacle():
    video = film(130, options={"x264-params": "open-gop=1:bframes=3:b-adapt=0"})
    with av.open(io.BytesIO(video)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    late = [two.pts < one.pts for one, two in pairwise(packets) if one.is_keyframe]
    assert sum(late) >= 5  # frames that are stored after a key frame and shown before it
    assert len(measure(video, 1.0)) == 6
    check(video, list(split(video, 1.0)))


def test_what_stays_whole():
    video = film(60)
    for seconds in (0, 2.0):
        assert not list(split(video, seconds)) and [part["frames"] for part in measure(video, seconds)] == [60]
    assert not list(split(film(60, key_every=250), 1.0))
    (whole,) = measure(film(60, "mov", "prores_ks", pix_fmt="yuv422p10le"), 0.5)  # mp4 does not take its codec
    assert "segment" not in whole and whole["codec"] == "prores"


@needs_clips
@pytest.mark.slow
def test_wild_clips_are_cut():
    turned = (CLIPS / "clips/ax_hevc10_hlg_rotated.mp4").read_bytes()  # HDR, from a telephone
    segments = list(split(turned, 0.6))
    assert len(segments) == 3
    check(turned, segments[:2])
    assert len(measure(turned, 0.6)) == 1  # an edit list hides its last frame
    long = (CLIPS / "long/intel_one-by-one-person-detection.mp4").read_bytes()
    check(long, list(split(long, 60.0)))
    assert [part["segment"] for part in measure(long, 60.0)] == [[0, 60], [60, 139.4]]
