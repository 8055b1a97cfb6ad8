"""Buckets of shapes: which one a video is in, in what order they come, and training on them."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CLIP, CONFIGS, ON_CPU, stage
from test_data import deliver

from data.buckets import BlockOrder, BucketStream, clips_of, fitting, split_into
from data.clip import Clip
from data.datamodule import VideoDataModule
from data.datasets import ClipDataset, Stream
from data.pack.probe import probe
from data.selection import Selection
from data.shards.reader import Shards
from data.shards.writer import write_shard
from data.toy.world import toy_clip
from lightning_semgen.errors import UserError
from lightning_semgen.stages.latent import LatentStage
from lightning_semgen.stages.semantic import SemanticStage

SHAPES = [(48, 80, 25), (80, 48, 25), (48, 80, 49)]  # height, width, frames
VIDEOS = [SHAPES[n] for n in (0, 1, 2, 0, 0, 1, 0, 2, 0, 1, 0, 2, 0)]
PADDED = 2  # frames that a video has more than its clip


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> str:
    """Three shards of 13 videos as `pack` writes them, and one video that is too short."""
    folder = tmp_path_factory.mktemp("packed")
    samples = []
    for index, (height, width, frames) in enumerate([*VIDEOS, (48, 80, 9)]):
        key, mp4, info = toy_clip("train", index, 0, frames + PADDED, height, width)
        samples.append({"__key__": key, "mp4": mp4, "json": info | probe(mp4)})
    for shard in range(3):
        write_shard(folder / f"train-{shard}.tar", samples[shard::3])
    return str(folder / "train-*.tar")


def data_of(packed, rank=0, ranks=1, state=None, made=None, **options):
    """A data module on one of several ranks, where the state says, and its training batches."""
    data = VideoDataModule(**{"train_shards": packed, "buckets": SHAPES, "seed": 5, "num_workers": 0} | options)
    module = made or SimpleNamespace(needs_video=False, check_clip=lambda clip: None)
    data.trainer = SimpleNamespace(
        strategy=ON_CPU, global_rank=rank, world_size=ranks, training=True, lightning_module=module
    )
    if state:
        data.load_state_dict(json.loads(json.dumps(state)))
    data.setup("fit")
    return data, iter(data.train_dataloader())


def chosen(buckets, *videos) -> list[list[int] | None]:
    """The bucket of each video (height, width, seconds)."""
    clips = clips_of(buckets, Clip(121, 480, 832, 24.0, 1.6))
    height, width, seconds = np.array(videos, float).T
    shapes = [[clip.height, clip.width, clip.num_frames] for clip in clips]
    return [None if best < 0 else shapes[best] for best in fitting(clips, seconds, height, width)]


def test_a_video_goes_to_the_shape_that_wastes_least_of_it():
    low, high, tall = [480, 832, 121], [720, 1280, 121], [832, 480, 121]
    videos = (480, 854, 10), (1080, 1920, 10), (1920, 1080, 10), (720, 1280, 10), (360, 640, 10)
    assert chosen([low, high, tall], *videos) == [low, high, tall, high, low]


def test_a_video_goes_to_the_longest_clip_that_it_fills():
    short, long = [480, 832, 49], [480, 832, 121]
    for buckets in ([short, long], [long, short]):
        assert chosen(buckets, *[(480, 832, s) for s in (10, 5.05, 5.0, 3, 2.05, 2)]) == [
            long,
            long,
            *[short] * 3,
            None,
        ]


def test_the_larger_of_equal_shapes_is_taken_unless_it_enlarges():
    small, large = [360, 640, 49], [720, 1280, 49]
    assert chosen([small, large], (1440, 2560, 3), (720, 1280, 3), (540, 960, 3)) == [large, large, small]


@pytest.mark.parametrize("counts", [[40, 9, 23], [1, 200], [3, 2]])
def test_every_place_of_every_bucket_comes_once_and_blocks_are_of_one_bucket(counts):
    order, size, total = BlockOrder(counts, seed=3, size=6), 6, sum(counts)
    dealt = [order(position) for position in range(total * 5 // size * size)]
    assert all(len({bucket for bucket, _ in dealt[start : start + size]}) == 1 for start in range(0, len(dealt), size))
    for bucket, count in enumerate(counts):
        places = [place for b, place in dealt if b == bucket]
        assert places == list(range(len(places)))  # nothing left out, nothing twice
        assert abs(len(places) - 5 * count) <= size * (1 + len(counts))  # all get on equally fast
    assert [BlockOrder(counts, 3, size)(position) for position in (len(dealt) - 1, 7)] == [
        dealt[-1],
        dealt[7],
    ]  # a pure function


def test_each_epochs_buckets_are_mixed_anew():
    order = BlockOrder([60, 60], seed=0, size=6)
    epochs = [[order(position)[0] for position in range(start, start + 120, 6)] for start in (0, 120)]
    assert all(Counter(epoch) == {0: 10, 1: 10} for epoch in epochs)
    assert epochs[0] != epochs[1] and sorted(epochs[0]) not in epochs


def test_one_bucket_is_the_order_without_buckets(packed):
    clips = ClipDataset(Shards(packed), Clip(9, 48, 48, 24.0, 1.6), False, Selection("random"))
    plain = Stream(clips, seed=5, open_shards=2)
    parts = split_into(clips_of([[48, 48, 9]], clips.clip), clips)
    bucketed = BucketStream(parts, seed=5, open_shards=2, batch_size=4)
    for position in range(0, 40, 3):
        one, other = plain[position], bucketed[position]
        assert other.pop("shape") == (9, 48, 48)
        assert torch.equal(one.pop("semantic_frames"), other.pop("semantic_frames")) and one == other


def test_batches_have_one_shape_and_their_samples_are_of_their_bucket(packed):
    data, loader = data_of(packed, batch_size=4, made=SimpleNamespace(needs_video=True, check_clip=lambda clip: None))
    found = {shape: Counter() for shape in SHAPES}
    for _ in range(9):
        batch = next(loader)
        ((frames, height, width),) = set(batch["shape"])
        assert batch["frames"].shape == (4, frames, 3, height, width)
        found[height, width, frames].update(batch["sample"])
    for shape, seen in found.items():
        assert set(seen) <= {f"train-{n:06d}" for n, video in enumerate(VIDEOS) if video == shape}
        assert max(seen.values()) - min(seen.values()) <= 1  # each once in every pass
    assert sum(map(len, found.values())) == 13  # all but the one that is too short


def test_the_state_is_one_integer(packed):
    whole = deliver([data_of(packed, batch_size=3)], 9)
    begun = data_of(packed, batch_size=3, num_workers=2)
    first = deliver([begun], 5)
    state = begun[0].state_dict()
    assert state == {"delivered": 15}
    assert first + deliver([data_of(packed, state=state, batch_size=3, num_workers=1)], 4) == whole


def test_two_ranks_see_what_one_sees_and_go_on_where_it_stopped(packed):
    one = data_of(packed, batch_size=4)
    whole = deliver([one], 7)
    two = [data_of(packed, rank, 2, batch_size=2) for rank in range(2)]
    found = deliver(two, 4)
    one = data_of(packed, state=two[0][0].state_dict(), batch_size=4)
    assert found + deliver([one], 3) == whole
    with pytest.raises(UserError, match="the 28 samples .* no multiple of the 5 of a batch"):
        data_of(packed, state=one[0].state_dict(), batch_size=5)


def test_a_broken_video_is_replaced_by_one_of_its_bucket(tmp_path):
    samples = []
    for index, (height, width, frames) in enumerate(SHAPES[:2] * 3):
        key, mp4, info = toy_clip("train", index, 0, frames + PADDED, height, width)
        samples.append({"__key__": key, "mp4": mp4 if index else b"broken", "json": info | probe(mp4)})
    write_shard(tmp_path / "train-0.tar", samples)
    data, loader = data_of(str(tmp_path / "*.tar"), batch_size=3)
    batches = [next(loader) for _ in range(2)]
    assert {shape for batch in batches for shape in batch["shape"]} == {(25, 48, 80), (25, 80, 48)}
    assert {key for batch in batches for rejected in batch["rejected"] for key, _ in rejected} == {"train-000000"}
    assert all(len({int(key[-1]) % 2 for key in batch["sample"]}) == 1 for batch in batches)


@pytest.mark.parametrize("cls", [SemanticStage, LatentStage])
def test_both_stages_train_on_every_shape(cls, packed):
    made = stage(cls)
    data, loader = data_of(packed, made=made, batch_size=2)
    batches = {batch["shape"][0]: batch for batch in (next(loader) for _ in range(9))}
    assert len(batches) == 3
    seen = []
    made.generator.register_forward_hook(lambda network, inputs, output: seen.append(inputs))
    for (frames, height, width), batch in batches.items():
        made.training_step(batch, 0)["loss"].backward()
        z, _, condition, seconds = seen.pop()
        alone = cls(clip=Clip(frames, height, width, CLIP.fps, CLIP.semantic_fps))
        assert seconds == alone.seconds and len(seconds) == z.shape[2]
        assert made.shift_of(made.clip_of(batch)) == alone.shift
        if cls is LatentStage:
            assert z.shape[1:] == alone.latent_shape and condition.semantics.grid == alone.space.grid
    assert made.generator.transformer.proj_out.weight.grad.isfinite().all()


def test_the_shift_follows_the_tokens_of_the_clip():
    short, long = (Clip(frames, 48, 48, 24.0, 12.0) for frames in (25, 49))  # 6 and 12 steps of 9 tokens
    made = SemanticStage(clip=long, semantic_dim=None)
    assert 1 < made.shift_of(short) < made.shift_of(long) == made.shift
    assert made.shift_of(short) == pytest.approx(made.shift / 2**0.5)


def test_a_fit_with_buckets_measures_trains_and_validates(packed, workspace, lightning):
    lightning(
        "fit", "-c", f"{CONFIGS}/dim8.yaml", "--model.compressor_steps=1", "--data.encoded=null",
        f"--data.train_shards={packed}", "--data.buckets=[[48,80,25],[80,48,25]]", "--trainer.max_steps=3",
    )  # fmt: skip
    checkpoint = torch.load("runs/dim8/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["VideoDataModule"] == {"delivered": 12}


@pytest.mark.parametrize("buckets", [[[48, 80]], [[48, 80, 0]], [[48, 80, 25], [48, 80, 25.0]]])
def test_a_bucket_is_three_numbers(buckets):
    with pytest.raises(UserError, match=r"data.buckets holds \[48, 80.*\]: give each bucket as \[height, width, num"):
        VideoDataModule(buckets=buckets)


@pytest.mark.parametrize(("shape", "cause"), [((48, 72, 25), "multiples of 16"), ((48, 80, 26), r"4·k \+ 1 frames")])
def test_a_shape_that_does_not_divide_is_refused_before_training(packed, shape, cause):
    with pytest.raises(UserError, match=rf"data.buckets holds \[{shape[0]}, {shape[1]}, {shape[2]}\].*{cause}"):
        data_of(packed, buckets=[SHAPES[0], shape], made=stage(LatentStage))


def test_shards_that_do_not_say_what_their_videos_are_are_refused(shards):
    with pytest.raises(UserError, match="train-000000.tar does not say .*lightning pack"):
        data_of(str(shards / "shards/toy/train-*.tar"))


def test_buckets_of_which_every_video_is_too_short_are_refused(packed):
    with pytest.raises(UserError, match="None of the 14 videos .* is long enough"):
        data_of(packed, buckets=[[48, 80, 481]])


def test_encoded_shards_and_buckets_exclude_each_other(packed, tmp_path):
    with pytest.raises(UserError, match="features are of one shape, so data.buckets .* data.encoded null"):
        VideoDataModule(buckets=SHAPES, encoded="shards/toy/features")
    write_shard(tmp_path / "train-0.tar", [{"__key__": "a", "json": {"caption": "a"}}])
    (tmp_path / "fingerprint.json").write_text("{}")
    with pytest.raises(UserError, match="encoded shards in .*data.buckets"):
        data_of(str(tmp_path / "*.tar"))
