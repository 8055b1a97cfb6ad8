"""Many damaged samples among many: every good one is delivered, the others are counted by cause."""

from collections import Counter
from io import BytesIO

import av
import numpy as np
import pytest
from torch.utils.data import DataLoader

from data.batch import collate
from data.clip import Clip
from data.codec.mp4 import write_mp4
from data.datasets import ClipDataset, Stream
from data.encoded.encoding import Encoding
from data.encoded.precompute import precompute_shards
from data.order import PositionBatches
from data.rejected import RejectionCount
from data.shards.reader import Shards
from data.shards.writer import write_shard
from lightning_semgen.errors import UserError

CLIP = Clip(5, 16, 16, 24.0, 12.0)
COUNT, BAD = 1000, range(0, 1000, 10)


def video(frames: int) -> bytes:
    pictures = np.random.default_rng(0).integers(0, 256, (frames, 3, 16, 16), dtype=np.uint8)
    write_mp4(pictures, buffer := BytesIO())
    return buffer.getvalue()


def sound_only() -> bytes:
    buffer = BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=24000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 24000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.fixture(scope="module")
def damages() -> dict[str, bytes]:
    """A damaged video of each cause."""
    whole = video(8)
    return {
        "truncated": whole[: len(whole) * 2 // 3],
        "garbage": bytes(range(256)) * 4,
        "no video stream": sound_only(),
        "too short": video(3),
        "empty": b"",
    }


@pytest.fixture(scope="module")
def clips(damages, tmp_path_factory) -> ClipDataset:
    """1,000 samples in four shards, of which each tenth is damaged, in five ways in turn."""
    folder, good, bad = tmp_path_factory.mktemp("damaged"), video(8), list(damages.values())
    rows = [
        {"__key__": f"k{n:04}", "mp4": bad[n // 10 % len(bad)] if n in BAD else good, "json": {"caption": f"clip {n}"}}
        for n in range(COUNT)
    ]
    for shard in range(4):
        write_shard(folder / f"train-{shard}.tar", rows[250 * shard : 250 * shard + 250])
    return ClipDataset(Shards(str(folder / "*.tar")), CLIP)


def test_an_epoch_delivers_every_good_sample_in_its_place(clips):
    """And in the place of each damaged one the next good one of the order, with the causes."""
    stream = Stream(clips, seed=0, open_shards=2)
    batches = PositionBatches(lambda: 0, batch_size=50, rank=0, world_size=1)
    loader = iter(DataLoader(stream, batch_sampler=batches, num_workers=2, collate_fn=collate))
    tally, own, names = RejectionCount(), [], set()
    for _ in range(COUNT // 50):
        batch = next(loader)
        rejected = sum(batch["rejected"], [])
        tally.add(len(batch["sample"]), rejected)
        own += [key for key, before in zip(batch["sample"], batch["rejected"], strict=True) if not before]
        names |= {key for key, _ in rejected}
    bad = {f"k{n:04}" for n in BAD}
    assert sorted(own) == sorted({f"k{n:04}" for n in range(COUNT)} - bad) and names == bad
    tally.check(0.2)
    with pytest.raises(UserError, match=r"samples were rejected, more than data.max_bad_share 0.05 allows:\n +\d+  "):
        tally.check(0.05)


def test_encoding_keeps_every_good_sample_once_or_stops_with_the_causes(clips, tmp_path, recwarn):
    def encode(folder, share):
        mean = Encoding(folder, {}, lambda batch: {"features": batch["semantic_frames"].float().mean((3, 4))})
        precompute_shards(clips, [mean], batch_size=50, workers=2, max_bad_share=share)

    encode(tmp_path / "all", 0.2)
    keys = [key for _, key, _ in Shards(str(tmp_path / "all/*.tar")).samples]
    assert sorted(keys) == [f"k{n:04}" for n in range(COUNT) if n not in BAD]
    causes = Counter(str(warning.message).split(": ", 1)[1].split(":")[0].rstrip(".") for warning in recwarn)
    assert causes == {"does not decode": 60, "no video stream": 20, "shorter than 5 frames at 24 fps": 20}
    with pytest.raises(UserError, match="samples were rejected") as stop:
        encode(tmp_path / "none", 0.05)
    for cause in ("no video stream", "shorter than 5 frames at 24 fps", "does not decode"):
        assert cause in str(stop.value)
