"""Order, dual-rate clips, shards, rejected samples, encoded shards."""

import io
import json
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
import webdataset as wds
from conftest import CLIP, ON_CPU

from data.batch import collate, own_rows
from data.clip import Clip
from data.codec.decode import decode_clip
from data.codec.mp4 import write_mp4
from data.datamodule import VideoDataModule
from data.datasets import ClipDataset, FixedClips, Stream, read_prompts
from data.encoded.encoding import Encoding
from data.encoded.precompute import precompute_shards, share_of
from data.encoded.shards import check_fingerprint
from data.order import PositionBatches, SampleOrder
from data.rejected import Rejected
from data.selection import Selection, select_caption
from data.shards.index import has_caption, index_path
from data.shards.reader import Shards
from data.shards.records import MEASURED_BY
from data.shards.writer import write_shard
from data.toy.shards import render_toy_world
from data.toy.world import toy_clip
from lightning_semgen.errors import UserError

SMALL = Clip(5, 16, 16, 24.0, 12.0)


def numbered_video(times: list[float]) -> bytes:
    """A video whose n-th frame, shown from times[n] on, has the grey level 4n."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=1000, options={"crf": "0", "bf": "0"})
        stream.width = stream.height = 16
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 4 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(1000 * time), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def shown(frames: torch.Tensor) -> list[int]:
    return [round(level / 4) for level in frames.float().mean((1, 2, 3)).tolist()]


def test_order_is_a_permutation_of_each_epoch_and_a_pure_function():
    sizes = [7, 0, 12, 1, 20, 10]
    order = SampleOrder(sizes, seed=3, open_shards=2)
    epochs = [[order(position) for position in range(50 * e, 50 * e + 50)] for e in range(2)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != [SampleOrder(sizes, 4, 2)(position) for position in range(50, 100)]
    assert [SampleOrder(sizes, 3, 2)(position) for position in (77, 3, 60)] == [
        epochs[1][27],
        epochs[0][3],
        epochs[1][10],
    ]


def test_no_more_shards_are_open_than_are_allowed():
    order = SampleOrder([10] * 12, seed=0, open_shards=3)
    shards = [order(position) // 10 for position in range(120)]
    groups = [set(shards[start : start + 30]) for start in range(0, 120, 30)]
    assert [len(group) for group in groups] == [3] * 4 and len(set.union(*groups)) == 12
    assert any(a != b for a, b in zip(shards, shards[1:], strict=False))


def test_two_ranks_see_what_one_sees():
    one = iter(PositionBatches(start=lambda: 10, batch_size=6, rank=0, world_size=1))
    two = [iter(PositionBatches(start=lambda: 10, batch_size=3, rank=rank, world_size=2)) for rank in range(2)]
    for _ in range(4):
        assert next(one) == next(two[0]) + next(two[1])


@pytest.mark.parametrize(("frames", "semantic"), [(121, [0, 15, 30, 45, 60, 75, 90, 105, 120]), (49, [0, 15, 30, 45])])
def test_semantic_stream_is_the_nearest_frames_of_the_clip(frames, semantic):
    clip = Clip(frames, 48, 48, 24.0, 1.6)
    assert clip.semantic_indices == semantic
    torch.testing.assert_close(clip.semantic_times, torch.arange(len(semantic), dtype=torch.float64) / 1.6)


def test_a_rate_that_does_not_divide_takes_the_nearest_frame():
    clip = Clip(25, 48, 48, 24.0, 5.0)
    assert clip.semantic_indices == [0, 5, 10, 14, 19, 24]
    assert torch.equal(clip.semantic_times, clip.times[clip.semantic_indices])


@pytest.mark.parametrize("fps", [24.0, 30.0, 24000 / 1001, 10.0])
def test_the_frame_of_a_grid_time_is_the_one_on_display(fps):
    frames = decode_clip(numbered_video([n / fps for n in range(20)]), SMALL)
    assert shown(frames) == [int(time * fps + 1e-2) for time in SMALL.times.tolist()]


def test_variable_frame_rate_is_read_by_its_timestamps():
    times = [0, 0.03, 0.05, 0.12, 0.13, 0.2]
    assert shown(decode_clip(numbered_video(times), SMALL)) == [0, 1, 2, 3, 4]  # at 0, .042, .083, .125 and .167 s


def test_a_start_shifts_the_clip():
    video = numbered_video([n / 24 for n in range(20)])
    assert shown(decode_clip(video, SMALL, start=0.25)) == [6, 7, 8, 9, 10]


def test_a_late_start_is_sought_and_gives_what_decoding_from_the_beginning_gives(monkeypatch):
    frames = [np.full((16, 16, 3), number, np.uint8) for number in range(240)]
    write_mp4(np.stack(frames).transpose(0, 3, 1, 2), buffer := io.BytesIO(), fps=24.0)
    sought = decode_clip(buffer.getvalue(), SMALL, start=9.0)
    monkeypatch.setattr("data.codec.decode.WORTH_A_SEEK", 100.0)
    assert torch.equal(sought, decode_clip(buffer.getvalue(), SMALL, start=9.0))
    assert abs(sought[0].float().mean() - 216) < 2


def test_starts_are_random_by_key_whole_frames_and_within_the_video():
    info = MEASURED_BY | {"duration": 2.0, "fps": 24.0, "frames": 48, "width": 16, "height": 16, "size": 0}
    info |= {"rotation": 0, "codec": "h264"}
    selection = Selection("random")
    starts = [selection.begin(b"", info, SMALL, key) for key in range(200)]
    assert starts == [selection.begin(b"", info, SMALL, key) for key in range(200)] and len(set(starts)) > 30
    assert min(starts) >= 0 and max(starts) + SMALL.duration < 2.0
    assert all(abs(start * 24 - round(start * 24)) < 1e-9 for start in starts)
    middle = selection.begin(b"", info, SMALL, None)
    assert {Selection("centre").begin(b"", info, SMALL, key) for key in (None, 1, 2)} == {middle}
    assert abs(middle + SMALL.duration / 2 - 1) < 0.06
    assert selection.begin(numbered_video([n / 24 for n in range(5)]), {}, SMALL, key=7) == 0


def test_short_and_slow_videos_are_rejected_on_demand():
    video = numbered_video([n / 10 for n in range(20)])
    assert len(decode_clip(video, SMALL)) == 5  # frames repeat on the faster grid
    with pytest.raises(Rejected, match=r"slower than 24 fps \(data.min_fps\)"):
        Selection(min_fps=24.0).begin(video, {}, SMALL, None)
    with pytest.raises(Rejected, match=r"shorter than 5 s \(data.min_duration\)"):
        Selection(min_duration=5.0).begin(video, {}, SMALL, None)


def test_one_of_several_captions_is_chosen_by_key():
    info = {"caption": ["a", "b", "c"]}
    assert {select_caption(info, key) for key in range(50)} == {"a", "b", "c"}
    assert select_caption(info, 5) == select_caption(info, 5) and select_caption(info, None) == "a"
    assert has_caption(info) and not has_caption({"caption": []}) and not has_caption({"caption": ["a", " "]})


def test_what_cannot_be_used_is_rejected_with_its_cause():
    with pytest.raises(Rejected, match="shorter than 5 frames at 24 fps"):
        decode_clip(numbered_video([0, 1 / 24]), SMALL)
    with pytest.raises(Rejected, match="does not decode"):
        decode_clip(b"no video at all", SMALL)


def test_a_video_is_scaled_to_cover_and_cropped_in_the_middle():
    picture = np.zeros((30, 3, 32, 64), np.uint8)
    picture[..., :16] = picture[..., 48:] = 255  # the crop cuts off what is white
    buffer = io.BytesIO()
    write_mp4(picture, buffer)
    frames = decode_clip(buffer.getvalue(), SMALL)
    assert frames.shape == (5, 3, 16, 16) and frames[..., 1:-1].float().mean() < 10


@pytest.fixture
def damaged(tmp_path):
    """Ten samples, of which two do not decode and one has no caption."""
    samples = []
    for index in range(10):
        key, mp4, info = toy_clip("train", index, 0)
        if index == 5:
            info.pop("caption")
        samples.append({"__key__": key, "mp4": b"broken" if index in (2, 7) else mp4, "json": info})
    write_shard(tmp_path / "damaged-0.tar", samples)
    return Shards(str(tmp_path / "damaged-*.tar"))


def test_bad_samples_are_replaced_and_reported(damaged):
    assert len(damaged) == 9 and damaged.uncaptioned == 1
    stream = Stream(ClipDataset(damaged, CLIP), seed=0, open_shards=1)
    batch = collate([stream[position] for position in range(9)])
    assert batch["frames"].shape == (9, 49, 3, 48, 48) and batch["semantic_frames"].shape == (9, 4, 3, 48, 48)
    assert torch.equal(batch["frames"][:, [0, 15, 30, 45]], batch["semantic_frames"])
    reported = {key for rejected in batch["rejected"] for key, cause in rejected}
    assert reported == {"train-000002", "train-000007"} and len(set(batch["sample"])) == 7
    assert batch["key"].dtype == torch.int64 and len(set(batch["key"].tolist())) == 9


def test_bad_samples_are_left_out_of_encoded_shards_and_replaced_in_validation(damaged, tmp_path):
    clips = ClipDataset(damaged, CLIP)
    with pytest.warns(UserWarning, match="train-000002 is left out.*does not decode"):
        positions = Encoding(tmp_path / "enc", {}, lambda batch: {"features": torch.zeros(len(batch["info"]), 1)})
        precompute_shards(clips, [positions], batch_size=3, workers=0)
    assert len(Shards(str(tmp_path / "enc/*.tar"))) == 7
    assert [FixedClips(clips)[index]["sample"] for index in (1, 2, 3)] == [
        "train-000001",
        "train-000003",
        "train-000003",
    ]


def test_all_bad_is_an_error(tmp_path):
    write_shard(tmp_path / "bad.tar", [{"__key__": "a", "mp4": b"x", "json": {"caption": "a"}}])
    with pytest.raises(UserError, match="No sample of .* can be used.*does not decode"):
        Stream(ClipDataset(Shards(str(tmp_path / "bad.tar")), CLIP), seed=0, open_shards=1)[0]


def test_foreign_shards_are_indexed_once_and_anew_when_they_change(damaged):
    path = damaged.paths[0]
    index = index_path(path).read_text()
    index_path(path).unlink()
    assert Shards(str(path)).samples == damaged.samples
    assert index_path(path).read_text() == index
    index_path(path).write_text(index.replace("train-000003", "train-000033"))
    assert Shards(str(path)).samples[3][1] == "train-000033"  # read, not made again
    with wds.TarWriter(str(path)) as tar:
        tar.write({"__key__": "other", "mp4": b"x", "json": {"caption": "another"}})
    assert [row[1] for row in Shards(str(path)).samples] == ["other"]


def test_broken_and_odd_captions_are_not_captions(tmp_path):
    texts = [b"{no json", b"[1]", b'{"caption": ["a", 1]}', b'{"caption": " "}', b'{"caption": "good"}']
    rows = [{"__key__": f"k{n}", "mp4": b"x", "json": text} for n, text in enumerate(texts)]
    write_shard(tmp_path / "odd.tar", rows)
    shards = Shards(str(tmp_path / "odd.tar"))
    assert [row[1] for row in shards.samples] == ["k4"] and shards.uncaptioned == 4


def test_shards_that_are_missing_or_broken_are_named(tmp_path):
    with pytest.raises(UserError, match="no shards at .*nowhere-.*tar.*data.toy_clips"):
        Shards(str(tmp_path / "nowhere-*.tar"))
    (tmp_path / "s-0.tar").touch()
    with pytest.raises(UserError, match="2 of the 3 named shards are missing, the first is .*s-1.tar"):
        Shards(str(tmp_path / "s-{0..2}.tar"))
    (tmp_path / "broken.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(UserError, match="broken.tar cannot be read"):
        Shards(str(tmp_path / "broken.tar"))


def test_the_toy_world_is_rendered_where_it_is_missing_and_only_there(tmp_path):
    pattern = str(tmp_path / "train-*.tar")
    render_toy_world(pattern, "train", 20, CLIP)
    (shard,) = tmp_path.glob("*.tar")
    written = shard.stat().st_mtime_ns
    render_toy_world(pattern, "train", 20, CLIP)
    assert shard.stat().st_mtime_ns == written and len(Shards(pattern)) == 20


def test_encoded_shards_say_what_the_parts_say_and_are_written_once(shards, tmp_path):
    clips = ClipDataset(Shards(str(shards / "shards/toy/heldout-*.tar")), CLIP)
    calls = []

    def encode(batch):
        calls.append(len(batch["sample"]))
        return {"features": batch["semantic_frames"].float().mean((3, 4)) / 255}

    for _ in range(2):
        precompute_shards(clips, [Encoding(tmp_path / "enc", {"encoder": "mean"}, encode)], 5, workers=0)
    assert calls == [5, 5, 5, 1]
    encoded = FixedClips(ClipDataset(Shards(str(tmp_path / "enc/*.tar")), CLIP))
    for index in (0, 15):
        raw = clips[index]
        assert encoded[index]["caption"] == raw["caption"] and encoded[index]["sample"] == raw["sample"]
        expected = raw["semantic_frames"].float().mean((2, 3)) / 255
        torch.testing.assert_close(encoded[index]["features"], expected, atol=1e-3, rtol=1e-3)
    with pytest.raises(UserError, match="encoder 'mean', the config says 'other'"):
        check_fingerprint(tmp_path / "enc", {"encoder": "other"})


@pytest.mark.parametrize(("held", "sizes"), [(2, [2] * 8), (0.5, [1] * 16)])
def test_few_long_clips_are_encoded_at_once(shards, tmp_path, monkeypatch, held, sizes):
    monkeypatch.setattr("data.encoded.precompute.HELD", int(held * 3 * 49 * 48 * 48))
    clips, seen = ClipDataset(Shards(str(shards / "shards/toy/heldout-*.tar")), CLIP, needs_video=False), []

    def encode(batch):
        seen.append(len(batch["sample"]))
        return {"features": batch["semantic_frames"]}

    precompute_shards(clips, [Encoding(tmp_path / "enc", {}, encode)], batch_size=5, workers=0)
    assert seen == sizes


def test_each_rank_encodes_its_share_whenever_it_begins(shards, tmp_path):
    clips = ClipDataset(Shards(str(shards / "shards/toy/*.tar")), CLIP)

    def encode(rank, folder):
        options = {"batch_size": 5, "workers": 0, "rank": rank, "world_size": 2}
        mean = Encoding(folder, {}, lambda batch: {"features": batch["semantic_frames"].float().mean((3, 4))})
        precompute_shards(clips, [mean], **options)
        return {path.name: path.read_bytes() for path in folder.glob("*.tar")}

    first, both = encode(0, tmp_path / "a"), encode(1, tmp_path / "a")
    assert [name.split("-")[0] for name in first] == ["train"] and len(both) == 2
    assert both == encode(1, tmp_path / "b") | encode(0, tmp_path / "b")


def test_one_decode_feeds_several_encodings_and_only_what_is_missing_is_made(shards, tmp_path):
    """The same bytes as one after another."""
    decoded = []

    class Counted(ClipDataset):
        def sample(self, index, key=None):
            decoded.append(index)
            return super().sample(index, key)

    ways = {
        "mean": lambda batch: {"features": batch["semantic_frames"].float().mean((3, 4))},
        "small": lambda batch: {"features": batch["semantic_frames"][..., ::8, ::8]},
    }

    def made(folder, *names):
        encodings = [Encoding(folder / name, {}, ways[name]) for name in names]
        precompute_shards(clips, encodings, batch_size=5, workers=0)
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.tar")}

    clips = Counted(Shards(str(shards / "shards/toy/*.tar")), CLIP)
    together = made(tmp_path / "a", "mean", "small")
    assert sorted(decoded) == list(range(56))
    apart = made(tmp_path / "b", "mean") | made(tmp_path / "b", "small")
    assert len(together) == 4 and together == apart
    (lost, *_) = (tmp_path / "a/small").glob("heldout*.tar")
    for path in (lost, index_path(lost)):
        path.unlink()
    del decoded[:]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*.tar")}
    assert made(tmp_path / "a", "mean", "small") == apart and len(decoded) == 16
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())


def test_shares_are_even_by_clips_and_leave_nothing_out():
    clips = [100, 3, 90, 40, 0, 50, 7]
    shares = [share_of(clips, rank, 3) for rank in range(3)]
    assert sorted(sum(shares, [])) == list(range(7))
    assert [sum(clips[shard] for shard in share) for share in shares] == [100, 97, 93]
    assert [share_of([5], rank, 2) for rank in range(2)] == [[0], []]


def test_prompt_files(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\n two \n")
    assert read_prompts(str(tmp_path / "p.txt")) == [{"caption": "one"}, {"caption": "two"}]
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UserError, match="empty.txt is empty"):
        read_prompts(str(tmp_path / "empty.txt"))
    with pytest.raises(UserError, match="no prompt file"):
        read_prompts(str(tmp_path / "none.txt"))


def data_of(rank=0, ranks=1, state=None, **options):
    """A data module on one of several ranks, where the state says."""
    data = VideoDataModule(seed=5, **options)
    data.trainer = SimpleNamespace(
        strategy=ON_CPU,
        global_rank=rank,
        world_size=ranks,
        training=True,
        lightning_module=SimpleNamespace(needs_video=False),
    )
    if state:
        data.load_state_dict(json.loads(json.dumps(state)))
    return data, iter(data.train_dataloader())


def deliver(ranks, batches):
    """The samples of the next global batches, one list each."""
    return [
        [name for data, loader in ranks for name in data.on_after_batch_transfer(next(loader), 0)["sample"]]
        for _ in range(batches)
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_state_of_the_loader_is_one_integer(shards, monkeypatch, workers):
    monkeypatch.chdir(shards)
    options = {"batch_size": 3, "num_workers": workers}
    whole = deliver([data_of(**options)], 20)  # 60 of 40 clips: into the second epoch
    begun = data_of(**options)
    first = deliver([begun], 7)
    assert first + deliver([data_of(state=begun[0].state_dict(), **options)], 13) == whole


def test_two_ranks_go_on_where_one_was_stopped_and_one_where_two_were(shards, monkeypatch):
    monkeypatch.chdir(shards)
    whole = deliver([data_of(batch_size=6, num_workers=0)], 14)  # two epochs
    one = data_of(batch_size=6, num_workers=0)
    found = deliver([one], 3)
    two = [data_of(rank, 2, one[0].state_dict(), batch_size=3, num_workers=0) for rank in range(2)]
    found += deliver(two, 6)
    assert two[0][0].state_dict() == two[1][0].state_dict()
    found += deliver([data_of(state=two[0][0].state_dict(), batch_size=6, num_workers=0)], 5)
    assert found == whole


@pytest.mark.parametrize("ranks", [1, 2, 3, 20])
def test_validation_has_every_clip_once_on_any_number_of_ranks(ranks, shards):
    """16 clips in batches of 3; all ranks have as many batches, since they meet at each."""
    seen, batches = [], set()
    for rank in range(ranks):
        data = VideoDataModule(val_shards=str(shards / "shards/toy/heldout-*.tar"), batch_size=3, num_workers=0)
        data.trainer = SimpleNamespace(
            strategy=ON_CPU,
            global_rank=rank,
            world_size=ranks,
            lightning_module=SimpleNamespace(needs_video=False),
        )
        made = list(data.val_dataloader())
        batches.add(len(made))
        seen += [batch["position"][row].item() for batch in made for row in own_rows(batch)]
    assert sorted(seen) == list(range(16)) and len(batches) == 1
