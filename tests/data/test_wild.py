"""Videos as they come: turned, stretched, deep, broken, with more streams than one."""

import io
import os
import re
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import SHARED

from data.clip import Clip
from data.codec.decode import decode_clip
from data.codec.hdr import HLG, PQ, to_sdr
from data.codec.mp4 import write_mp4
from data.pack.probe import probe
from data.rejected import Rejected
from data.shards.index import MEASURED

CLIPS = Path(os.environ.get("SEMGEN_CLIPS", SHARED / "clips"))
needs_clips = pytest.mark.skipif(not CLIPS.is_dir(), reason="no folder of wild clips: name one in SEMGEN_CLIPS")
GREYS = np.arange(20, 244, 14, np.uint8).reshape(4, 4)  # of the cells of a picture
TURNS = {  # display matrix a, b, c, d: what it makes of a picture
    (1, 0, 0, 1): lambda picture: picture,
    (0, 1, -1, 0): lambda picture: np.rot90(picture, -1),
    (-1, 0, 0, -1): lambda picture: np.rot90(picture, 2),
    (0, -1, 1, 0): lambda picture: np.rot90(picture),
    (-1, 0, 0, 1): np.fliplr,
    (1, 0, 0, -1): np.flipud,
    (0, 1, 1, 0): np.transpose,
    (0, -1, -1, 0): lambda picture: np.rot90(np.transpose(picture), 2),
}


def cells(height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3), each cell of one grey."""
    grey = GREYS[np.arange(height) * 4 // height][:, np.arange(width) * 4 // width]
    return np.repeat(grey[:, :, None], 3, 2)


def greys(video: bytes, height: int, width: int) -> np.ndarray:
    """The grey in the middle of each cell, of a clip of that size."""
    picture = decode_clip(video, Clip(5, height, width, 24.0, 12.0)).float().mean((0, 1)).numpy()
    return picture[height // 8 :: height // 4, width // 8 :: width // 4]


def with_display_matrix(video: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    at = video.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    return video[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + video[at + 36 :]


def muxed(*streams: dict, format: str = "mp4") -> bytes:
    """A file of streams {"codec", "frames", "width", "height", "pix_fmt", …}, at 24 fps those of pictures."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=format) as container:
        added = []
        for codec, frames, *options in (stream.items() for stream in streams):
            stream = container.add_stream(codec[1], rate=24000 if codec[1] == "aac" else 24)
            for name, value in options:
                setattr(stream, name, value)
            added.append((stream, frames[1]))
        for stream, frames in added:
            packets = [packet for frame in _frames(stream, frames) for packet in stream.encode(frame)]
            container.mux(packets + stream.encode())
    return buffer.getvalue()


def _frames(stream: av.stream.Stream, count: int) -> list[av.VideoFrame | av.AudioFrame]:
    if stream.type == "video":
        return [av.VideoFrame.from_ndarray(cells(stream.height, stream.width)) for _ in range(count)]
    silence = [av.AudioFrame.from_ndarray(np.zeros((2, 1000), np.float32), "fltp", "stereo") for _ in range(count)]
    for frame in silence:
        frame.rate = 24000
    return silence


H264 = {"codec": "libx264", "frames": 6, "width": 48, "height": 32, "pix_fmt": "yuv420p"}
COVER = {"codec": "mjpeg", "frames": 1, "width": 16, "height": 16, "pix_fmt": "yuvj420p"}
COVER |= {"disposition": av.stream.Disposition.attached_pic}
AUDIO = {"codec": "aac", "frames": 6}


@pytest.mark.parametrize("matrix", TURNS)
def test_a_video_is_turned_as_its_display_matrix_says(matrix):
    video = with_display_matrix(muxed(H264), matrix)
    height, width = (48, 32) if matrix[0] == 0 else (32, 48)
    np.testing.assert_allclose(greys(video, height, width), TURNS[matrix](GREYS), atol=4)
    assert (probe(video)["height"], probe(video)["width"]) == (height, width)


def test_pixels_become_square():
    video = muxed(H264 | {"width": 32, "sample_aspect_ratio": Fraction(2, 1)})
    assert (probe(video)["height"], probe(video)["width"]) == (32, 64)
    np.testing.assert_allclose(greys(video, 16, 32), GREYS, atol=4)  # nothing is cropped
    flat = muxed(H264 | {"width": 32, "height": 64, "sample_aspect_ratio": Fraction(2, 1)})
    np.testing.assert_allclose(greys(with_display_matrix(flat, (0, 1, -1, 0)), 24, 24), np.rot90(GREYS, -1), atol=4)


@pytest.mark.parametrize("options", [{"pix_fmt": "yuv444p", "width": 49, "height": 33}, {"pix_fmt": "yuv420p10le"}])
def test_deep_and_odd_sized_pictures_decode(options):
    video = muxed(H264 | options)
    np.testing.assert_allclose(greys(video, 32, 48), GREYS, atol=4)
    assert probe(video)["width"] == options.get("width", 48)


def grey(nits: float, transfer: int) -> np.ndarray:
    """A pixel of HDR, by the formulas of BT.2100 (for a screen of 1000 nits)."""
    if transfer == PQ:
        light = (nits / 10000) ** 0.1593017578125
        signal = ((0.8359375 + 18.8515625 * light) / (1 + 18.6875 * light)) ** 78.84375
    else:
        scene = (nits / 1000) ** (1 / 1.2)
        signal = (3 * scene) ** 0.5 if scene <= 1 / 12 else 0.17883277 * np.log(12 * scene - 0.28466892) + 0.55991073
    return np.full((1, 1, 3), round(65535 * signal), np.uint16)


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_hdr_keeps_its_shadows_and_rolls_off_its_highlights(transfer):
    shown = [int(to_sdr(grey(nits, transfer), transfer)[0, 0, 1]) for nits in (0, 10, 50, 80, 203, 500, 1000)]
    assert shown[:4] == pytest.approx([255 * (nits / 203) ** (1 / 2.4) for nits in (0, 10, 50, 80)], abs=2)
    assert 200 < shown[4] < shown[5] < shown[6] and shown[6] == 255


def test_an_hdr_video_is_shown_as_sdr():
    plain, hdr = muxed(H264 | {"pix_fmt": "yuv420p10le"}), muxed(H264 | {"pix_fmt": "yuv420p10le", "color_trc": PQ})
    expected = to_sdr(np.repeat(GREYS.astype(np.uint16)[:, :, None] * 257, 3, 2), PQ)[:, :, 0]
    assert np.abs(greys(plain, 32, 48) - expected).max() > 50
    np.testing.assert_allclose(greys(hdr, 32, 48), expected, atol=8)


def test_of_several_streams_the_moving_picture_counts():
    assert probe(muxed(COVER, H264))["codec"] == "h264"
    assert probe(muxed(H264, H264 | {"width": 64}))["width"] == 48


@pytest.mark.parametrize("streams", [(AUDIO,), (AUDIO, COVER)], ids=["audio", "audio with a cover"])
def test_a_file_without_moving_pictures_is_rejected(streams):
    for read in (probe, lambda video: decode_clip(video, Clip(1, 16, 16, 24.0, 12.0))):
        with pytest.raises(Rejected, match="no video stream"):
            read(muxed(*streams))


def test_what_is_measured():
    video = muxed(H264 | {"frames": 24}, AUDIO)
    measured = probe(video)
    assert tuple(measured) == MEASURED
    assert tuple(measured.values()) == (1.0, 48, 32, 24.0, 0, "h264", 24, len(video))


@pytest.mark.parametrize("format", ["matroska", "avi", "mp4"])
def test_a_file_that_is_cut_off_is_noticed(format):
    video = faststart_noise(100) if format == "mp4" else muxed(H264 | {"frames": 100}, format=format)
    assert probe(video)["frames"] == 100
    with pytest.raises(Rejected, match="truncated|does not decode"):
        probe(video[: len(video) * 3 // 4])


def test_sound_may_go_on_after_the_last_picture():
    video = muxed(H264 | {"frames": 24}, AUDIO | {"frames": 72}, format="matroska")
    assert probe(video)["duration"] == pytest.approx(1, abs=0.01)


def test_what_is_broken_inside_or_has_no_decoder_is_rejected():
    video = faststart_noise(30)
    middle = len(video) // 2
    with pytest.raises(Rejected, match="does not decode|damaged"):
        probe(video[:middle] + bytes(2000) + video[middle + 2000 :])
    with pytest.raises(Rejected, match="no decoder"):
        probe(video.replace(b"avc1", b"zzz1"))
    with pytest.raises(Rejected, match="empty file"):
        probe(b"")


def of_16000_square_pixels(video: bytes, declared: bool) -> bytes:
    """A VP9 mp4 of 64 x 64 pixels whose first frame, and the container if `declared`, says that it is far larger."""
    patched = bytearray(video)
    header = video.index(b"\x49\x83\x42") + 3  # the frame's sync code; its width and height follow after four bits
    fields = int.from_bytes(video[header : header + 5], "big")
    assert fields >> 4 & 0xFFFFFFFF == 63 << 16 | 63
    fields = fields & ~(0xFFFFFFFF << 4) | (15999 << 16 | 15999) << 4
    patched[header : header + 5] = fields.to_bytes(5, "big")
    if declared:
        entry = video.index(b"vp09", video.index(b"stsd")) + 28
        assert video[entry : entry + 4] == struct.pack(">2H", 64, 64)
        patched[entry : entry + 4] = struct.pack(">2H", 16000, 16000)
    return bytes(patched)


def peak_memory() -> int:
    """In MB."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) // 1000


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("declared", [True, False])
def test_an_absurd_picture_size_is_rejected_before_it_costs_memory(declared):
    video = muxed({"codec": "libvpx-vp9", "frames": 3, "width": 64, "height": 64, "pix_fmt": "yuv420p"})
    assert probe(video)["frames"] == 3
    absurd = of_16000_square_pixels(video, declared)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from here
    before = peak_memory()
    for read in (probe, lambda video: decode_clip(video, Clip(1, 16, 16, 24.0, 12.0))):
        with pytest.raises(Rejected, match="more than 67 megapixels"):
            read(absurd)
    assert peak_memory() - before < 50  # one frame is 400 MB


def test_a_stream_that_grows_absurd_is_rejected_too(monkeypatch):
    small, large = (
        H264 | {"codec": "mjpeg", "pix_fmt": "yuvj420p", "width": side, "height": side} for side in (32, 128)
    )
    frames = [muxed(stream, format="mjpeg") for stream in (small, large)]
    monkeypatch.setattr("data.codec.decode.MAX_PIXELS", 64 * 64)
    assert len(decode_clip(frames[0], Clip(1, 16, 16, 25.0, 25.0))) == 1
    with pytest.raises(Rejected, match="does not decode"):
        probe(b"".join(frames))


def test_a_title_in_any_encoding_is_no_obstacle():
    buffer = io.BytesIO()
    write_mp4(np.zeros((5, 3, 16, 16), np.uint8), buffer, metadata={"title": "a title"})
    video = buffer.getvalue().replace(b"a title", b"\xff\xfe\xe9\xe8tle")
    assert probe(video)["frames"] == len(decode_clip(video, Clip(5, 16, 16, 24.0, 12.0))) == 5


def faststart_noise(frames: int) -> bytes:
    """An mp4 with its index in front, whose frames are all large."""
    buffer = io.BytesIO()
    write_mp4(np.random.default_rng(0).integers(0, 256, (frames, 3, 48, 48), np.uint8), buffer)
    return buffer.getvalue()


@needs_clips
@pytest.mark.parametrize("folder", ["codec", "derived"])
def test_of_wild_clips_only_broken_ones_are_rejected(folder):
    causes = {}
    for path in (CLIPS / folder).iterdir():
        try:
            probe(path.read_bytes())
        except Rejected as cause:
            causes[path.name] = str(cause).partition(":")[0]
    broken = {
        "codec": {"ax_invalid-bitstream.webm": "does not decode", "decord_corrupted.mp4": "does not decode"},
        "derived": {"truncated_faststart_60pct.mp4": "does not decode", "zero_bytes.mp4": "empty file"},
    }
    assert causes == broken[folder]
