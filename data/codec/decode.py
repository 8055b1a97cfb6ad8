"""Video bytes to the frames of a clip, chosen by timestamp, upright and with square pixels."""

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, dropwhile, pairwise

import av
import numpy as np
import torch
from torch import Tensor

from data.clip import Clip
from data.codec.hdr import HLG, PQ, to_sdr
from data.rejected import Rejected

TOLERANCE = 1e-3  # seconds; mkv and webm round timestamps to milliseconds
MAX_PIXELS = 8192 * 8192
UPRIGHT = np.eye(2)
WORTH_A_SEEK = 1.0  # seconds; what begins earlier is decoded from the beginning


Timed = tuple[float, float, av.VideoFrame]  # second at which it begins, its length in seconds (0 if unknown), the frame


def decode_clip(video: bytes, clip: Clip, start: float = 0.0, semantic_only: bool = False) -> Tensor:
    """Frames uint8 (T, 3, H, W) of the clip that begins `start` seconds into the video, or (T_s, 3, H, W) of its
    semantic stream only.

    The frame of a grid time is the one whose display interval holds that time. The picture is turned as the video's
    display matrix says, scaled, with square pixels, to cover the clip's size, and cropped in the middle.
    """
    wanted = ((clip.semantic_times if semantic_only else clip.times) + start).tolist()
    if start >= WORTH_A_SEEK:
        with opened(video) as (container, stream):
            if (frames := _from_key_frame(container, stream, start)) is not None:
                return _pictures_at(frames, wanted, stream, clip)
    with opened(video) as (container, stream):
        return _pictures_at(timed(container.decode(stream)), wanted, stream, clip)


def declared(video: bytes) -> dict[str, float]:
    """`duration` in seconds and `fps` as the container says, 0 where it does not."""
    with opened(video) as (container, stream):
        duration = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
        return {"duration": duration, "fps": float(stream.average_rate or 0)}


def _pictures_at(frames: Iterator[Timed], wanted: list[float], stream: av.VideoStream, clip: Clip) -> Tensor:
    """The pictures uint8 (T, 3, H, W) on display at the wanted seconds."""
    picture, made = _Picture(stream, clip), 0
    pictures = np.empty((len(wanted), clip.height, clip.width, 3), np.uint8)
    for begin, end, frame in _displayed(frames):
        while made < len(wanted) and wanted[made] < end - TOLERANCE:
            if wanted[made] < begin - TOLERANCE:
                raise Rejected("a gap in the timestamps")
            pictures[made] = picture(frame)
            made += 1
        if made == len(wanted):
            return torch.from_numpy(pictures).permute(0, 3, 1, 2)
    raise Rejected(f"shorter than {clip.num_frames} frames at {clip.fps:g} fps")


def _from_key_frame(
    container: av.container.InputContainer, stream: av.VideoStream, start: float
) -> Iterator[Timed] | None:
    """What `timed` gives, from a key frame at or before `start` on; None where the container finds none."""
    first = next(container.decode(stream), None)
    if first is None or first.pts is None:
        return None
    container.seek(first.pts + int(start / stream.time_base), stream=stream)
    # Pictures shown before the first key frame may refer to some that were not decoded.
    frames = timed(dropwhile(lambda frame: not frame.key_frame, container.decode(stream)), zero=first.time)
    head = next(frames, None)
    return None if head is None or head[0] > start + TOLERANCE else chain([head], frames)


# Titles come in any encoding: PyAV 19 takes them all, those before it fail unless they are told to replace.
ANY_TITLE = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}


@contextmanager
def opened(video: bytes) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The container and its main video stream; `Rejected` where there is none or what is read of it is broken."""
    limit = {"max_pixels": str(MAX_PIXELS)}  # for frames decoded to learn what the stream is, and for those after
    try:
        with av.open(io.BytesIO(video), options=limit, **ANY_TITLE) as container:
            stream = container.streams.best("video")
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
                raise Rejected("no video stream")
            if stream.codec_context is None:
                raise Rejected("no decoder for its codec")
            if not 0 < stream.codec_context.width * stream.codec_context.height <= MAX_PIXELS:
                raise Rejected("no picture size, or one of more than 67 megapixels")
            stream.codec_context.options = limit
            stream.thread_count = 1  # workers are the parallelism
            yield container, stream
    except av.FFmpegError as error:
        raise Rejected(f"does not decode: {type(error).__name__}") from error


def pixel_aspect(stream: av.VideoStream) -> float:
    """Width of a pixel over its height."""
    return float(stream.sample_aspect_ratio or 1)


def display_matrix(frame: av.VideoFrame) -> np.ndarray:
    """(2, 2): the rows are where the x and the y axis of the stored picture point on display."""
    data = frame.side_data.get("DISPLAYMATRIX")
    return UPRIGHT if data is None else np.frombuffer(data, np.int32).reshape(3, 3)[:2, :2]


def is_sideways(matrix: np.ndarray) -> bool:
    return abs(matrix[0, 1]) > abs(matrix[0, 0])


def timed(frames: Iterable[av.VideoFrame], zero: float | None = None) -> Iterator[Timed]:
    """Frames with the second since time `zero`, or the first one's, at which each begins, and its own length."""
    tick = None
    for frame in frames:
        if frame.pts is None:
            raise Rejected("a frame without a timestamp")
        tick = tick or float(frame.time_base)  # fractions take longer than all else here
        zero = frame.time if zero is None else zero
        yield frame.time - zero, (frame.duration or 0) * tick, frame


def _displayed(frames: Iterable[Timed]) -> Iterator[tuple[float, float, av.VideoFrame]]:
    """Frames with the seconds from and to which each is shown."""
    before = None
    for time, length, frame in frames:
        if before is not None:
            yield before[0], time, before[2]
        before = time, time + length, frame
    if before is not None:
        yield before


class _Picture:
    """Makes a frame of a stream a picture (H, W, 3) of a clip: crop first, turn last, when least is left to turn."""

    def __init__(self, stream: av.VideoStream, clip: Clip):
        self.clip, self.aspect, self.codec = clip, pixel_aspect(stream), stream.codec_context
        self.graphs: dict[tuple, av.filter.Graph] = {}  # keep their tables; a frame's own reformat makes them anew

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        matrix = display_matrix(frame)
        transfer = self.codec.color_trc  # what the first frame says, where the container says otherwise
        kind = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range, is_sideways(matrix))
        if kind not in self.graphs:
            self.graphs[kind] = self._graph(frame, is_sideways(matrix), "rgb48le" if transfer in (PQ, HLG) else "rgb24")
        self.graphs[kind].push(frame)
        rgb = self.graphs[kind].pull().to_ndarray()
        return _turned(to_sdr(rgb, transfer) if transfer in (PQ, HLG) else rgb, matrix)

    def _graph(self, frame: av.VideoFrame, sideways: bool, layout: str) -> av.filter.Graph:
        """Crops in the middle what covers the clip's size, with square pixels, and scales that."""
        height, width = (self.clip.width, self.clip.height) if sideways else (self.clip.height, self.clip.width)
        scale = max(height / frame.height, width / (frame.width * self.aspect))
        kept_height = min(round(height / scale), frame.height)
        kept_width = min(round(width / scale / self.aspect), frame.width)
        graph = av.filter.Graph()
        graph.threads = 1
        source = (
            f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/1"
            f":colorspace={int(frame.colorspace)}:range={int(frame.color_range)}"
        )
        filters = [
            graph.add("buffer", source),
            graph.add("crop", f"{max(kept_width, 1)}:{max(kept_height, 1)}"),
            graph.add("scale", f"{width}:{height}:flags=area"),
            graph.add("format", f"pix_fmts={layout}"),
            graph.add("buffersink"),
        ]
        for one, next_one in pairwise(filters):
            one.link_to(next_one)
        graph.configure()
        return graph


def _turned(picture: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    x, y = matrix.diagonal()
    if is_sideways(matrix):
        picture, x, y = picture.swapaxes(0, 1), matrix[1, 0], matrix[0, 1]
    return picture[:: -1 if y < 0 else 1, :: -1 if x < 0 else 1]
