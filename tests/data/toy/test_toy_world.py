"""The toy world keeps its promises, and the checker reads it back through H.264."""

import weakref
from collections import Counter
from dataclasses import asdict
from io import BytesIO
from itertools import combinations, product

import av
import numpy as np
import pytest
import torch

from data.codec.mp4 import write_mp4
from data.toy.checker import Reading, read_video
from data.toy.world import SPLITS, caption, compositions, render, toy_clip

NOTHING = Reading("none", "none", "none")
SYNONYMS = {
    "circle": {"circle", "disc", "ball"},
    "bar": {"bar", "plank"},
    "pillar": {"pillar", "column"},
    "left": {"left", "leftwards"},
    "right": {"right", "rightwards"},
    "up": {"up", "upwards", "top"},
    "down": {"down", "downwards", "bottom"},
    "small": {"small", "little", "tiny"},
    "large": {"large", "big", "huge"},
}


def decode(mp4):
    with av.open(BytesIO(mp4)) as container:
        images = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(images).transpose(0, 3, 1, 2)


def box_blur(frames):
    padded = np.pad(frames.astype(np.float32), ((0, 0), (0, 0), (1, 1), (1, 1)), "edge")
    height, width = frames.shape[2:]
    return sum(padded[:, :, y : y + height, x : x + width] for y, x in product(range(3), range(3))) / 9


def noise(kind, rng):
    shape = (17, 3, 48, 48)
    if kind == "uniform":
        return rng.integers(0, 256, shape, dtype=np.uint8)
    values = rng.normal(size=shape if kind != "frozen" else (1, *shape[1:]))
    for _ in range(0 if kind == "gaussian" else 6):
        values = box_blur(values)
    frames = np.clip(128 + 50 * values / values.std(), 0, 255).astype(np.uint8)
    return np.broadcast_to(frames, shape)


@pytest.mark.parametrize("split", SPLITS)
def test_clips_are_a_pure_function_of_their_arguments(split):
    first, again, other = (toy_clip(split, 3, seed) for seed in (0, 0, 1))
    assert first == again
    assert first[0] == f"{split}-000003"
    assert first[1] != other[1]


def test_splits_are_disjoint_and_together_everything():
    train, heldout = (set(compositions(split)) for split in SPLITS)
    assert (len(train), len(heldout), len(train & heldout)) == (80, 16, 0)
    with pytest.raises(ValueError, match="train, heldout"):
        compositions("test")


def test_heldout_is_balanced_and_train_has_every_pair():
    train, heldout = ([asdict(c) for c in compositions(split)] for split in SPLITS)
    for name, count in {"colour": 4, "shape": 3, "direction": 4, "size": 2}.items():
        uses = Counter(c[name] for c in heldout)
        assert len(uses) == count and max(uses.values()) - min(uses.values()) <= 1
    for a, b in combinations(train[0], 2):
        everywhere = {(c[a], c[b]) for c in train + heldout}
        assert {(c[a], c[b]) for c in train} == everywhere


@pytest.mark.parametrize(("split", "cycles"), [("train", 2), ("heldout", 4)])
def test_checker_reads_clips_of_all_kinds(split, cycles):
    clips = [toy_clip(split, index, seed=0) for index in range(cycles * len(compositions(split)))]
    seen = Counter((info["colour"], info["shape"], info["direction"], info["size"]) for _, _, info in clips)
    assert set(seen.values()) == {cycles}
    right, right_blurred = [], []
    for _, mp4, info in clips:
        frames, truth = decode(mp4), Reading(info["colour"], info["shape"], info["direction"])
        right.append(read_video(frames) == truth)
        right_blurred.append(read_video(box_blur(frames).astype(np.uint8)) == truth)
    assert np.mean(right) >= 0.99
    assert np.mean(right_blurred) >= 0.95


@pytest.mark.parametrize("size", [(32, 32, 121), (64, 112, 49), (240, 416, 17)])
def test_checker_reads_other_sizes_and_lengths(size):
    height, width, num_frames = size
    for index, c in enumerate(compositions("heldout")):
        frames = render(c, np.random.default_rng(index), num_frames, height, width)
        assert read_video(torch.from_numpy(frames)) == Reading(c.colour, c.shape, c.direction)


@pytest.mark.parametrize("kind", ["uniform", "gaussian", "blurred", "frozen"])
def test_checker_sees_nothing_in_noise(kind):
    rng = np.random.default_rng(0)
    assert np.mean([read_video(noise(kind, rng)) == NOTHING for _ in range(100)]) >= 0.99


def test_checker_sees_no_direction_in_a_still_sprite_and_nothing_on_grey():
    c = compositions("train")[0]
    still = np.repeat(render(c, np.random.default_rng(0), num_frames=1), 9, 0)
    assert read_video(still) == Reading(c.colour, c.shape, "none")
    assert read_video(np.full_like(still, 128)) == NOTHING


def test_reversed_clip_goes_the_other_way():
    frames = render(compositions("train")[0], np.random.default_rng(0))
    assert {read_video(frames).direction, read_video(frames[::-1]).direction} == {"left", "right"}


@pytest.mark.parametrize("num_frames", [49, 121])
def test_sprite_never_touches_the_border(num_frames):
    for index, c in enumerate(compositions("train")):
        frames = render(c, np.random.default_rng(index), num_frames).astype(int)
        chroma = frames.max(1) - frames.min(1)  # (T, H, W)
        chroma[:, 1:-1, 1:-1] = 0
        assert chroma.max() < 32


def test_captions_are_short_varied_and_say_everything():
    rng = np.random.default_rng(0)
    for c in compositions("train") + compositions("heldout"):
        texts = {caption(c, rng) for _ in range(64)}
        assert len(texts) > 32
        for text in texts:
            words = set(text.replace(",", " ").replace(";", " ").replace(":", " ").split())
            assert all(words & SYNONYMS.get(value, {value}) for value in asdict(c).values())
            assert len(text.encode("ascii")) <= 80


def test_mp4_keeps_metadata_pixels_and_rate():
    frames = render(compositions("train")[5], np.random.default_rng(0))
    metadata = {"title": "a small red circle moves left", "comment": "seed=1", "steps": "50"}
    write_mp4(torch.from_numpy(frames), target := BytesIO(), fps=24000 / 1001, metadata=metadata)
    mp4 = target.getvalue()
    assert mp4.index(b"moov") < mp4.index(b"mdat")  # what +faststart is for
    with av.open(BytesIO(mp4)) as container:
        video = container.streams.video[0]
        assert metadata.items() <= container.metadata.items()
        assert (video.codec_context.name, video.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (video.average_rate.numerator, video.average_rate.denominator) == (24000, 1001)
    assert np.abs(decode(mp4).astype(int) - frames).mean() < 4


def test_mp4_of_chunks_is_the_mp4_of_the_whole(tmp_path):
    frames = render(compositions("train")[0], np.random.default_rng(0))
    write_mp4(frames, whole := BytesIO())
    write_mp4((frames[i : i + 10] for i in range(0, 49, 10)), tmp_path / "chunks.mp4")
    assert (tmp_path / "chunks.mp4").read_bytes() == whole.getvalue()


def test_mp4_holds_one_chunk_of_a_long_video_at_a_time():
    chunks, most = [], 0

    def stream():
        nonlocal most
        for number in range(100):
            chunk = np.full((2, 3, 16, 16), number, np.uint8)
            chunks.append(weakref.ref(chunk))
            most = max(most, sum(old() is not None for old in chunks))
            yield chunk

    write_mp4(stream(), target := BytesIO())
    assert len(decode(target.getvalue())) == 200
    assert most <= 2  # the new one, and the generator's own name for the one before


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((2, 3, 33, 32), np.uint8), "even sides, not 33 x 32"),
        (np.zeros((2, 3, 32, 32), np.float32), "must be uint8"),
        ([np.zeros((1, 3, side, side), np.uint8) for side in (32, 34)], "not (32, 32)"),
        ([], "no frames"),
    ],
)
def test_mp4_errors_say_what_is_wrong(frames, message):
    with pytest.raises(ValueError) as error:
        write_mp4(frames, BytesIO())
    assert message in str(error.value)
