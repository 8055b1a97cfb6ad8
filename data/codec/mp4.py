"""Frames to an H.264 mp4 that browsers play, as a stream and with the same bytes every time."""

import shutil
import tempfile
from collections.abc import Iterable
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import torch

Chunk = np.ndarray | torch.Tensor

INDEX_FIRST = {"movflags": "+faststart+use_metadata_tags"}
# Fragments of 2 s, in microseconds, which become an ordinary file in the end.
GROWING = {"movflags": "+hybrid_fragmented+use_metadata_tags", "frag_duration": "2000000", "flush_packets": "1"}


def write_mp4(
    frames: Chunk | Iterable[Chunk],
    target: str | Path | BytesIO,
    fps: float = 24.0,
    metadata: dict[str, str] | None = None,
    crf: int = 18,
    growing: bool = False,
) -> None:
    """Writes uint8 RGB frames (T, 3, H, W), or an iterable of such chunks, of which one at a time is held.

    The index stands before the frames. Of a `growing` file it stands behind them, and the file plays while it is being
    written, up to a few seconds before the last frame.

    Raises ValueError for another dtype or layout, odd H or W, a change of size, or no frames at all.
    """
    chunks = [frames] if isinstance(frames, Chunk) else frames
    if not isinstance(target, BytesIO):
        return _encode(chunks, str(target), fps, metadata or {}, crf, growing)
    # +faststart reads the file again to move its index to the front, which needs a file with a name.
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        _encode(chunks, file.name, fps, metadata or {}, crf, growing)
        shutil.copyfileobj(file, target)


def _encode(chunks: Iterable[Chunk], path: str, fps: float, metadata: dict[str, str], crf: int, growing: bool) -> None:
    stream = None
    with av.open(path, "w", format="mp4", options=GROWING if growing else INDEX_FIRST) as container:
        container.metadata.update(metadata)
        for chunk in chunks:
            for image in _images(chunk):
                stream = stream or _add_stream(container, image.shape, fps, crf, growing)
                if image.shape[:2] != (stream.height, stream.width):
                    raise ValueError(f"A frame is {image.shape[:2]}, not {(stream.height, stream.width)}.")
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        if stream is None:
            raise ValueError("There are no frames to write.")
        container.mux(stream.encode())


def _images(chunk: Chunk) -> np.ndarray:
    """(t, 3, H, W) to contiguous (t, H, W, 3)."""
    array = chunk.cpu().numpy() if isinstance(chunk, torch.Tensor) else chunk
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1] != 3:
        raise ValueError(f"Frames must be uint8 (T, 3, H, W), not {array.dtype} {array.shape}.")
    if array.shape[2] % 2 or array.shape[3] % 2:
        raise ValueError(f"H.264 needs even sides, not {array.shape[2]} x {array.shape[3]}: crop or resize.")
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1))


def _add_stream(
    container: av.container.OutputContainer, shape: tuple[int, ...], fps: float, crf: int, growing: bool
) -> av.VideoStream:
    # One thread: with several, the bytes depend on the machine.
    options = {"crf": str(crf), "preset": "veryfast", "threads": "1"}
    if growing:
        options["bf"] = "0"  # fragments know no edit list, without which B-frames would delay the beginning
    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
    stream.height, stream.width = shape[:2]
    stream.pix_fmt = "yuv420p"
    # Say which matrix swscale used (BT.601, limited range); left unsaid, players guess and colours shift.
    stream.codec_context.colorspace = av.video.reformatter.Colorspace.ITU601
    stream.codec_context.color_range = av.video.reformatter.ColorRange.MPEG
    return stream
