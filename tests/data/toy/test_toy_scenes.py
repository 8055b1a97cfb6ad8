"""Long clips of several scenes keep the toy world's promises, and the checker reads the scenes back through H.264."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import LONG
from test_toy_world import NOTHING, decode, noise

from data.toy.checker import Reading, read_scenes
from data.toy.scenes import caption, render_scenes, stories, toy_story
from data.toy.world import DIRECTIONS
from lightning_semgen.evaluation.adherence import Adherence

SIZE = {"num_frames": LONG.num_frames, "height": LONG.height, "width": LONG.width, "fps": LONG.fps}


def story(index: int, split: str = "heldout") -> tuple[str, bytes, dict]:
    return toy_story(split, index, 0, 4, **SIZE)


def scenes_of(info: dict) -> list[Reading]:
    return [Reading(info["colour"], info["shape"], direction) for direction in info["directions"]]


@pytest.mark.parametrize("scenes", [3, 4])
def test_heldout_sequences_are_new_and_balanced(scenes):
    train, heldout = ({s.directions for s in stories(split, scenes)} for split in ("train", "heldout"))
    assert len(heldout) == 12 and not train & heldout and len(train | heldout) == 4 * 3 ** (scenes - 1)
    for place in range(scenes):
        assert Counter(directions[place] for directions in heldout) == dict.fromkeys(DIRECTIONS, 3)
        assert {directions[place] for directions in train} == set(DIRECTIONS)
    with pytest.raises(ValueError, match="at least 3"):
        stories("train", 2)


def test_clips_are_a_pure_function_of_their_arguments():
    first, again, other = story(3), story(3), toy_story("heldout", 3, 1, 4, **SIZE)
    assert first == again and first[1] != other[1]


def test_captions_fit_the_byte_encoder_and_say_the_directions_in_order():
    rng = np.random.default_rng(0)
    told = {s: caption(s, rng) for s in stories("train", 4) + stories("heldout", 4)}
    for story, text in told.items():
        assert len(text.encode("ascii")) <= 96
        words = [word.removesuffix("wards") for word in text.replace(",", " ").replace(":", " ").split()]
        assert [word for word in words if word in DIRECTIONS] == list(story.directions)
        assert story.colour in words
    assert len({text.replace(s.colour, "") for s, text in told.items()}) > 1000


def test_the_sprite_recurs_before_other_backgrounds():
    scenes = list(render_scenes(stories("train", 4)[0], np.random.default_rng(0), rendered := 241, 48, 48, 4.0))
    assert [len(scene) for scene in scenes] == [60, 60, 60, rendered - 180]  # the second one begins at 15 s
    centres = [scene[0].reshape(3, -1)[:, np.ptp(scene[0].astype(int), axis=0).argmax()] for scene in scenes]
    assert all(np.array_equal(centres[0], centre) for centre in centres)
    backgrounds = [np.median(scene) for scene in scenes]
    assert min(abs(np.diff(backgrounds))) > 20


@pytest.mark.parametrize("count", [16])
def test_checker_reads_every_scene_in_order(count):
    clips = [story(index, split) for split in ("train", "heldout") for index in range(count)]
    right = [read_scenes(decode(mp4)) == scenes_of(info) for _, mp4, info in clips]
    assert np.mean(right) >= 0.99


def test_a_reversed_clip_tells_the_story_backwards():
    _, mp4, info = story(0)
    back = {"left": "right", "right": "left", "up": "down", "down": "up"}
    backwards = [replace(reading, direction=back[reading.direction]) for reading in reversed(scenes_of(info))]
    assert read_scenes(decode(mp4)[::-1]) == backwards


@pytest.mark.parametrize("kind", ["uniform", "gaussian", "blurred", "frozen"])
def test_checker_sees_no_scene_in_noise(kind):
    rng = np.random.default_rng(0)
    found = [read_scenes(noise(kind, rng)) for _ in range(50)]
    assert np.mean([all(reading == NOTHING for reading in scenes) for scenes in found]) == 1


def test_adherence_counts_scenes_and_their_order():
    videos, infos = zip(*((torch.from_numpy(decode(mp4)), info) for _, mp4, info in map(story, range(2))), strict=True)
    first, second = infos[0]["directions"][:2]
    swapped = infos[0] | {"directions": [second, first, *infos[0]["directions"][2:]]}
    adherence = Adherence()
    adherence.update(torch.stack(videos), infos)
    assert all(adherence.compute()[name] == 1 for name in Adherence.names)
    adherence.update(videos[0][None], [swapped])
    adherence.update(videos[0][None, :60], [infos[0]])  # its first scene alone
    shares = adherence.compute()
    assert shares["direction"] == pytest.approx((1 + 1 + 0.5 + 0.25) / 4)
    assert shares["colour"] == pytest.approx((1 + 1 + 1 + 0.25) / 4)
    assert shares["scenes in order"] == 0.5
