"""The toy world: captioned sprites that move, 96 compositions of colour, shape, direction and size."""

import itertools
from dataclasses import asdict, dataclass
from io import BytesIO

import numpy as np

from data.codec.mp4 import write_mp4

COLOURS = {"red": (222, 36, 40), "green": (32, 176, 64), "blue": (40, 76, 224), "yellow": (242, 212, 32)}
SHAPES = ("circle", "bar", "pillar")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}  # axis (x, y), sign
SIZES = {"small": 9 / 48, "large": 12.5 / 48}  # radius / short side of the frame
SPLITS = ("train", "heldout")

ASPECT = 2.5  # of a bar, which lies; a pillar stands

# Half width and half height; all shapes have the area of a disc of radius 1.
_LONG, _SHORT = (np.pi * ASPECT) ** 0.5 / 2, (np.pi / ASPECT) ** 0.5 / 2
_EXTENTS = {"circle": (1.0, 1.0), "bar": (_LONG, _SHORT), "pillar": (_SHORT, _LONG)}

WORDS = {
    "circle": ("circle", "disc", "ball"),
    "bar": ("bar", "plank"),
    "pillar": ("pillar", "column"),
    "left": ("left", "leftwards", "to the left"),
    "right": ("right", "rightwards", "to the right"),
    "up": ("up", "upwards", "to the top"),
    "down": ("down", "downwards", "to the bottom"),
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
}
_TEMPLATES = (
    "a {size} {colour} {shape} moves {direction}",
    "a {size} {colour} {shape} moving {direction}",
    "a {size} {colour} {shape} is moving {direction}",
    "a {size} {colour} {shape} slides {direction}",
    "a {size} {colour} {shape} drifts {direction}",
    "a {size} {colour} {shape} gliding {direction}",
    "a {size} {colour} {shape} travels {direction}",
    "a {size} {colour} {shape} that floats {direction}",
    "a {size} {colour} {shape} on its way {direction}",
    "the {size} {colour} {shape} goes {direction}",
    "one {size} {colour} {shape}, moving {direction}",
    "{size} {colour} {shape} moving {direction}",
    "there is a {size} {colour} {shape} moving {direction}",
    "a video of a {size} {colour} {shape} moving {direction}",
    "a {size} {shape} in {colour} moves {direction}",
    "a {colour} {shape}, {size}, moves {direction}",
    "a {shape} moves {direction}; it is {size} and {colour}",
    "moving {direction}: a {size} {colour} {shape}",
    "watch a {size} {colour} {shape} move {direction}",
    "something {size} and {colour}, a {shape}, slides {direction}",
)


@dataclass(frozen=True)
class Composition:
    """What a clip shows: one name out of each of COLOURS, SHAPES, DIRECTIONS and SIZES."""

    colour: str
    shape: str
    direction: str
    size: str


def compositions(split: str) -> list[Composition]:
    """The 80 "train" or the 16 "heldout" compositions; raises ValueError for any other split."""
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}; known: {', '.join(SPLITS)}.")
    grid = itertools.product(*map(enumerate, (COLOURS, SHAPES, DIRECTIONS, SIZES)))
    return [
        Composition(colour, shape, direction, size)
        for (c, colour), (s, shape), (d, direction), (z, size) in grid
        # A Latin square: each colour meets each direction once in heldout; train has all pairs of values.
        if ((c + d) % 3 == s and (c + d) % 2 == z) == (split == "heldout")
    ]


def caption(composition: Composition, rng: np.random.Generator) -> str:
    """All four attributes in one of many wordings: ASCII, at most 80 bytes."""
    values = asdict(composition).items()
    words = {name: rng.choice(WORDS.get(value, (value,))) for name, value in values}
    return str(rng.choice(_TEMPLATES)).format(**words)


def render(
    composition: Composition,
    rng: np.random.Generator,
    num_frames: int = 49,
    height: int = 48,
    width: int = 48,
    fps: float = 24.0,
) -> np.ndarray:
    """uint8 (T, 3, H, W): a sprite that crosses half the frame in 2 s, or in the whole of a longer clip."""
    radius = radius_of(composition.size, rng, height, width)
    where = path(composition.shape, composition.direction, radius, rng, (width, height), np.arange(num_frames) / fps)
    colour = colour_of(composition.colour, rng)
    return paint(composition.shape, radius, colour, where, background(rng, height, width))


def radius_of(size: str, rng: np.random.Generator, height: int, width: int) -> float:
    """Pixels: of one of SIZES, give or take 8 %."""
    return SIZES[size] * min(height, width) * rng.uniform(0.92, 1.08)


def colour_of(colour: str, rng: np.random.Generator) -> np.ndarray:
    """RGB float32 (3,), near one of COLOURS."""
    return np.float32(COLOURS[colour] + rng.uniform(-12, 12, 3))


def paint(shape: str, radius: float, colour: np.ndarray, where: np.ndarray, behind: np.ndarray) -> np.ndarray:
    """uint8 frames (T, 3, H, W): a sprite whose centres are `where` (T, 2) over what is `behind` it (3, H, W)."""
    _, height, width = behind.shape
    x = np.arange(width, dtype=np.float32) + 0.5 - where[:, None, None, 0]  # (T, 1, W)
    y = np.arange(height, dtype=np.float32)[:, None] + 0.5 - where[:, None, None, 1]  # (T, H, 1)
    cover = np.clip(0.5 - _distance(shape, x, y, radius), 0, 1)[:, None]  # (T, 1, H, W)
    return (behind + cover * (colour[:, None, None] - behind) + 0.5).astype(np.uint8)


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in pixels, inside < 0, to the outline of a shape as large as a disc of this radius."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - radius
    half_width, half_height = radius * np.array(_EXTENTS[shape])
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def toy_clip(
    split: str,
    index: int,
    seed: int,
    num_frames: int = 49,
    height: int = 48,
    width: int = 48,
    fps: float = 24.0,
) -> tuple[str, bytes, dict[str, str | float]]:
    """(key, mp4, {caption, colour, shape, direction, size, fps}), a pure function of its arguments."""
    known = compositions(split)
    # 37 is coprime to 80 and to 16: a cycle visits every composition once, and neighbours differ.
    composition = known[index * 37 % len(known)]
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    info = {"caption": caption(composition, rng)} | asdict(composition) | {"fps": fps}
    mp4 = BytesIO()
    write_mp4(render(composition, rng, num_frames, height, width, fps), mp4, fps)
    return f"{split}-{index:06d}", mp4.getvalue(), info


def path(
    shape: str,
    direction: str,
    radius: float,
    rng: np.random.Generator,
    frame: tuple[int, int],
    seconds: np.ndarray,
) -> np.ndarray:
    """Centres (T, 2) in pixels, x then y, from which the sprite stays inside the frame (width, height)."""
    low = radius * np.array(_EXTENTS[shape]) + 1.5
    room = frame - 2 * low
    axis, sign = DIRECTIONS[direction]
    travel = np.zeros(2)
    travel[axis] = min(rng.uniform(0.42, 0.56) * frame[axis], room[axis])
    progress = seconds / max(2.0, seconds[-1])
    corner = low + rng.uniform(size=2) * (room - travel * progress[-1])
    return np.float32(corner + travel * progress[::sign, None])


def background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Nearly grey float32 (3, H, W), 0 to 255: far in saturation from every colour of a sprite."""
    angle, phase, waves = rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi), rng.uniform(0.75, 2)
    y, x = np.mgrid[:height, :width] / min(height, width) - 0.5
    along, across = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    pattern = {
        "plain": 0 * along,
        "gradient": 1.4 * along,
        "stripes": np.sin(2 * np.pi * waves * along + phase),
        "checker": np.tanh(8 * np.sin(np.pi * waves * along + phase) * np.sin(np.pi * waves * across)),
    }[rng.choice(["plain", "gradient", "stripes", "checker"])]
    grey = rng.uniform(40, 215) + rng.uniform(6, 16) * pattern
    tint = rng.uniform(-7, 7, 3)[:, None, None]
    return np.clip(grey + tint, 0, 255).astype(np.float32)
