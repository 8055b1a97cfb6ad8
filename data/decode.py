"""Video bytes to the frames of a clip, chosen by timestamp."""

import io
from collections.abc import Iterator

import av
import numpy as np
import torch
from torch import Tensor

from data.clip import Clip

TOLERANCE = 1e-3  # seconds; mkv and webm round timestamps to milliseconds


class Rejected(Exception):
    """Why a sample cannot be used; its text is the cause that is counted."""


def decode_clip(video: bytes, clip: Clip, start: float = 0.0, semantic_only: bool = False) -> Tensor:
    """Frames uint8 (T, 3, H, W) of the clip that begins `start` seconds into the video, or (T_s, 3, H, W) of its
    semantic stream only.

    The frame of a grid time is the one whose display interval holds that time. The picture is scaled to cover the
    clip's size and cropped in the middle.
    """
    wanted = ((clip.semantic_times if semantic_only else clip.times) + start).tolist()
    frames: list[np.ndarray] = []
    reformatter = av.video.reformatter.VideoReformatter()  # keeps its tables; a frame's own would make them anew
    try:
        for begin, end, frame in _displayed(video):
            while len(frames) < len(wanted) and wanted[len(frames)] < end - TOLERANCE:
                if wanted[len(frames)] < begin - TOLERANCE:
                    raise Rejected("a gap in the timestamps")
                frames.append(_scaled(frame, clip, reformatter))
            if len(frames) == len(wanted):
                return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()
    except (av.FFmpegError, IndexError) as error:
        raise Rejected(f"does not decode: {type(error).__name__}") from error
    raise Rejected(f"shorter than {clip.num_frames} frames at {clip.fps:g} fps")


def _displayed(video: bytes) -> Iterator[tuple[float, float, av.VideoFrame]]:
    """Frames with the seconds from and to which each is shown; the first is shown from 0."""
    before = None
    for time, length, frame in _timed_frames(video):
        if before is not None:
            yield before[0], time, before[2]
        before = time, time + length, frame
    if before is not None:
        yield before


def _timed_frames(video: bytes) -> Iterator[tuple[float, float, av.VideoFrame]]:
    with av.open(io.BytesIO(video)) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1  # workers are the parallelism
        first = None
        for frame in container.decode(stream):
            if frame.pts is None:
                raise Rejected("a frame without a timestamp")
            first = frame.pts if first is None else first
            yield float((frame.pts - first) * frame.time_base), float((frame.duration or 0) * frame.time_base), frame


def _scaled(frame: av.VideoFrame, clip: Clip, reformatter: av.video.reformatter.VideoReformatter) -> np.ndarray:
    """(H, W, 3): scaled to cover, cropped in the middle."""
    scale = max(clip.height / frame.height, clip.width / frame.width)
    height = max(round(frame.height * scale), clip.height)
    width = max(round(frame.width * scale), clip.width)
    rgb = reformatter.reformat(frame, width, height, "rgb24", interpolation="AREA").to_ndarray()
    top, left = (height - clip.height) // 2, (width - clip.width) // 2
    return rgb[top : top + clip.height, left : left + clip.width]
