"""Long clips of the toy world: one sprite goes through several scenes, in each in another direction before another
background; the caption names the sprite and the directions in their order."""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import BytesIO

import numpy as np

from data.codec.mp4 import write_mp4
from data.toy.world import (
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SIZES,
    SPLITS,
    WORDS,
    background,
    colour_of,
    paint,
    path,
    radius_of,
)

MIN_CUT = 40.0  # grey levels between the mean backgrounds of neighbouring scenes: a cut is seen

_WAYS = ("{}", "{}wards")
_LINKS = (", then ", " then ", ", ", ", next ")
_TEMPLATES = (
    "a {size} {colour} {shape} moves {directions}",
    "a {size} {colour} {shape} goes {directions}",
    "{size} {colour} {shape}: {directions}",
    "a {colour} {shape}, {size}, moves {directions}",
    "moving {directions}: a {size} {colour} {shape}",
    "the {size} {colour} {shape} first moves {directions}",
)


@dataclass(frozen=True)
class Story:
    """What a clip of several scenes shows: a sprite, and where it goes in each scene; neighbours differ."""

    colour: str
    shape: str
    size: str
    directions: tuple[str, ...]


def stories(split: str, scenes: int) -> list[Story]:
    """Every sprite with the "train" sequences of directions (1 - 3^(2 - scenes) of all), or with those "heldout".

    Raises ValueError for another split, or fewer than 3 scenes.
    """
    if split not in SPLITS or scenes < 3:
        raise ValueError(f"No stories of {scenes} scenes for split {split!r}: at least 3, {' or '.join(SPLITS)}.")
    sprites = itertools.product(COLOURS, SHAPES, SIZES)
    sequences = [each for each in itertools.product(DIRECTIONS, repeat=scenes) if _is_story(each, split)]
    return [Story(*sprite, directions) for sprite, directions in itertools.product(sprites, sequences)]


def _is_story(directions: tuple[str, ...], split: str) -> bool:
    """Whether neighbours differ and the turns are those of the split.

    Turn by turn the heldout ones count on, modulo 3: each direction is as frequent there as any other in every place.
    """
    names = list(DIRECTIONS)
    turns = [(names.index(b) - names.index(a)) % 4 for a, b in itertools.pairwise(directions)]
    heldout = all((turn - turns[0] - number) % 3 == 0 for number, turn in enumerate(turns))
    return 0 not in turns and heldout == (split == "heldout")


def caption(story: Story, rng: np.random.Generator) -> str:
    """The sprite and its directions in order, in one of many wordings: ASCII, at most 96 bytes for 4 scenes."""
    way, link = rng.choice(_WAYS), rng.choice(_LINKS)
    directions = link.join(way.format(direction) for direction in story.directions)
    sprite = {"size": story.size, "colour": story.colour, "shape": story.shape}
    words = {name: rng.choice(WORDS.get(value, (value,))) for name, value in sprite.items()}
    return str(rng.choice(_TEMPLATES)).format(directions=directions, **words)


def render_scenes(
    story: Story, rng: np.random.Generator, num_frames: int, height: int, width: int, fps: float
) -> Iterator[np.ndarray]:
    """Scene by scene, equal shares of the clip, uint8 (t, 3, H, W); in each the sprite crosses about half the frame."""
    radius, colour = radius_of(story.size, rng, height, width), colour_of(story.colour, rng)
    cuts = [scene * (num_frames - 1) // len(story.directions) for scene in range(1, len(story.directions))]
    behind = None
    for direction, frames in zip(story.directions, np.split(np.arange(num_frames), cuts), strict=True):
        behind = _another_background(behind, rng, height, width)
        seconds = (frames - frames[0]) / fps
        where = path(story.shape, direction, radius, rng, (width, height), seconds)
        yield paint(story.shape, radius, colour, where, behind)


def _another_background(before: np.ndarray | None, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    while True:
        behind = background(rng, height, width)
        if before is None or abs(behind.mean() - before.mean()) >= MIN_CUT:
            return behind


def toy_story(
    split: str, index: int, seed: int, scenes: int, num_frames: int, height: int, width: int, fps: float
) -> tuple[str, bytes, dict]:
    """(key, mp4, {caption, colour, shape, size, directions, fps}), a pure function of its arguments."""
    known = stories(split, scenes)
    # 821 is prime and no divisor of their number: a cycle visits every story once, and neighbours differ in all.
    story = known[index * 821 % len(known)]
    rng = np.random.default_rng((seed, SPLITS.index(split), index, scenes))
    info = {"caption": caption(story, rng)} | asdict(story) | {"fps": fps}
    mp4 = BytesIO()
    write_mp4(render_scenes(story, rng, num_frames, height, width, fps), mp4, fps)
    return f"{split}-{index:06d}", mp4.getvalue(), info
