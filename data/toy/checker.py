"""Reads from pixels alone which sprite of the toy world a video shows and where it goes, scene by scene."""

from dataclasses import dataclass

import numpy as np
import torch

from data.toy.world import ASPECT, COLOURS, DIRECTIONS, SHAPES

NONE = "none"
_FRAMES, _SIDE = 12, 48  # a clip is read at about this many frames and pixels per short side
_MIN_CHROMA = 40.0  # a sprite is at least this far from grey, 0 to 255,
_MIN_COSINE = 0.8  # and its hue at least this near to one of the palette
_AREA = (0.01, 0.4)  # of the frame
_MIN_OVERLAP = 0.35  # IoU with a disc (a bar has 0.51); below, the pixels are not one compact blob
_MAX_MISFIT = 0.8  # distance to the nearest shape, where two shapes are 1 or more apart
_MIN_TRAVEL = 0.04  # of the frame's side, from the first frame to the last
_MAX_WOBBLE = 0.25  # deviation from a straight steady path, of the travel
_CUT = 14.0  # of 255: by more than this half of the pixels change at a cut, where a sprite covers less than half
_MIN_SCENE = 0.04  # of the video; what lies between two cuts closer than this is no scene

# E[z^2] over a shape of unit area, about its centre, in units of a bar's.
_BAR_MOMENT = (ASPECT - 1 / ASPECT) / 12
_MOMENTS = {"circle": 0, "bar": 1, "pillar": -1}


@dataclass(frozen=True)
class Reading:
    """Colour, shape and direction that pixels show; "none" where they do not tell."""

    colour: str
    shape: str
    direction: str


def read_video(frames: np.ndarray | torch.Tensor) -> Reading:
    """What uint8 RGB frames (T >= 2, 3, H >= 32, W >= 32) show."""
    if isinstance(frames, torch.Tensor):
        frames = frames.cpu().numpy()
    colour, cover = _segment(_chroma(_subsample(frames)))
    seen, centres, areas = _blobs(cover > 0.5)
    if seen.mean() < 0.5:
        return Reading(NONE, NONE, NONE)
    shape = _shape(cover[seen], centres[seen], areas[seen])
    return Reading(colour, shape, _direction(np.flatnonzero(seen), centres[seen], cover.shape))


def read_scenes(frames: np.ndarray | torch.Tensor) -> list[Reading]:
    """What each scene of such frames shows, in order; a new scene begins where the background changes."""
    if isinstance(frames, torch.Tensor):
        frames = frames.cpu().numpy()
    grey = frames.astype(np.float32).mean(1)
    changes = np.median(np.abs(np.diff(grey, axis=0)), axis=(1, 2))
    scenes = np.split(frames, np.flatnonzero(changes > _CUT) + 1)
    return [read_video(scene) for scene in scenes if len(scene) >= max(2, _MIN_SCENE * len(frames))]


def _subsample(frames: np.ndarray) -> np.ndarray:
    """Float32 (t, 3, h, w) with t <= 12 and the short side below 96."""
    times = np.linspace(0, len(frames) - 1, min(len(frames), _FRAMES)).round().astype(int)
    step = max(1, min(frames.shape[2:]) // _SIDE)
    return frames[times, :, ::step, ::step].astype(np.float32)


def _chroma(frames: np.ndarray) -> np.ndarray:
    """Offset from grey and from the tint of the background, which is most of the pixels."""
    chroma = frames - frames.mean(1, keepdims=True)
    return chroma - np.median(chroma, axis=(0, 2, 3), keepdims=True)


def _segment(chroma: np.ndarray) -> tuple[str, np.ndarray]:
    """Name of the most saturated pixels' colour, and the share of each pixel it covers (t, h, w)."""
    strength = np.sqrt((chroma**2).sum(1))
    core = strength >= max(_MIN_CHROMA, np.quantile(strength, 0.98))
    if not core.any():
        return NONE, np.zeros_like(strength)
    mean = chroma.transpose(0, 2, 3, 1)[core].mean(0)
    palette = np.array(list(COLOURS.values()), np.float32)
    palette -= palette.mean(1, keepdims=True)
    cosines = palette @ mean / np.linalg.norm(palette, axis=1) / np.linalg.norm(mean)
    if cosines.max() < _MIN_COSINE:
        return NONE, np.zeros_like(strength)
    # Over grey, chroma is proportional to the share the sprite covers, whatever the brightness.
    return list(COLOURS)[cosines.argmax()], np.einsum("tchw,c->thw", chroma, mean / (mean @ mean))


def _blobs(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per frame of (t, h, w): is it one compact blob (t,), its centre (t, 2) as x, y, and its area (t,)."""
    _, height, width = mask.shape
    areas = mask.sum((1, 2))
    count = np.maximum(areas, 1)
    centres = np.stack([mask.sum(1) @ np.arange(width) / count, mask.sum(2) @ np.arange(height) / count], 1)
    disc = np.abs(_offsets(centres, height, width)) ** 2 < areas[:, None, None] / np.pi
    overlap = (mask & disc).sum((1, 2)) / np.maximum((mask | disc).sum((1, 2)), 1)
    share = areas / (height * width)
    return (overlap > _MIN_OVERLAP) & (share > _AREA[0]) & (share < _AREA[1]), centres, areas


def _offsets(centres: np.ndarray, height: int, width: int) -> np.ndarray:
    """Each pixel's place relative to the centre as a complex number x + iy (t, h, w)."""
    x = np.arange(width) - centres[:, :1, None]
    y = np.arange(height)[:, None] - centres[:, 1:, None]
    return (x + 1j * y).astype(np.complex64)


def _shape(cover: np.ndarray, centres: np.ndarray, areas: np.ndarray) -> str:
    """The shape with the nearest second moment, which a round blur leaves as it is."""
    z = _offsets(centres, *cover.shape[1:])
    weight = cover * (np.abs(z) ** 2 < 4 * areas[:, None, None] / np.pi)  # two radii hold a blurred bar
    total = weight.sum((1, 2))
    z -= ((weight * z).sum((1, 2)) / total)[:, None, None]
    moments = (weight * z**2).sum((1, 2)) / total**2 / _BAR_MOMENT
    moment = np.median(moments.real) + 1j * np.median(moments.imag)
    misfit = {shape: abs(moment - _MOMENTS[shape]) for shape in SHAPES}
    shape = min(misfit, key=misfit.get)
    return shape if misfit[shape] < _MAX_MISFIT else NONE


def _direction(times: np.ndarray, centres: np.ndarray, shape: tuple[int, int, int]) -> str:
    """Where the straight line through the centres (t, 2) leads, if they travel along one axis at all."""
    if len(times) < 2:
        return NONE
    times = times - times.mean()
    slope = times @ centres / (times @ times)
    travel = slope * (shape[0] - 1)
    axis = np.abs(travel).argmax()
    wobble = np.abs(centres - centres.mean(0) - np.outer(times, slope)).mean(0)[axis]
    far = abs(travel[axis]) > _MIN_TRAVEL * shape[2 - axis]
    straight = abs(travel[axis]) > max(1.5 * abs(travel[1 - axis]), wobble / _MAX_WOBBLE)
    names = {way: name for name, way in DIRECTIONS.items()}
    return names[axis, np.sign(travel[axis])] if far and straight else NONE
