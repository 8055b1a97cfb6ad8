"""What reading costs, as ratios of medians against named alternatives.   python benchmarks/data_speed.py [--repeats 5]

Two passes of decord or torchcodec are timed where those are installed.
"""

import argparse
import io
import resource
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import torch
from measuring import faster, medians, rounds
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.batch import collate
from data.clip import Clip
from data.codec.decode import decode_clip
from data.datasets import ClipDataset, Stream
from data.encoded.encoding import Encoding
from data.encoded.precompute import precompute_shards
from data.order import SampleOrder
from data.shards.reader import Shards
from data.shards.writer import write_shard
from data.toy.world import toy_clip
from data.workers import prepare_worker
from encoders import build_encoder
from encoders.vae.base import build_vae

TOY = Clip(49, 48, 48, 24.0, 1.6)


def film(seconds: float, height: int = 480, width: int = 854) -> bytes:
    """H.264 at 24 fps with a key frame every 48 frames: a textured picture that pans, with a little noise."""
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (height // 8, width // 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24, options={"crf": "23", "g": "48", "preset": "fast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(round(seconds * 24)):
            shift = number * 2 % (texture.shape[1] - width)
            picture = texture[:, shift : shift + width] // 2 + rng.integers(0, 16, (height, width, 1), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def bare_pyav(video: bytes, clip: Clip) -> None:
    """The least that gives both streams: one decode, one scaling for each."""
    fine, coarse = (av.video.reformatter.VideoReformatter() for _ in range(2))
    frames, semantic, wanted = [], [], set(clip.semantic_indices)
    with av.open(io.BytesIO(video)) as container:
        container.streams.video[0].thread_count = 1
        for number, frame in enumerate(container.decode(video=0)):
            frames.append(fine.reformat(frame, 256, 256, "rgb24", interpolation="AREA").to_ndarray())
            if number in wanted:
                semantic.append(coarse.reformat(frame, 224, 224, "rgb24", interpolation="AREA").to_ndarray())
            if len(frames) == clip.num_frames:
                break
    torch.from_numpy(np.stack(frames)), torch.from_numpy(np.stack(semantic))


def decord_twice(video: bytes, clip: Clip) -> None:
    import decord

    for side, indices in ((256, list(range(clip.num_frames))), (224, clip.semantic_indices)):
        decord.VideoReader(io.BytesIO(video), width=side, height=side, num_threads=1).get_batch(indices).asnumpy()


def torchcodec_twice(video: bytes, clip: Clip) -> None:
    from torchcodec.decoders import VideoDecoder

    for side, indices in ((256, list(range(clip.num_frames))), (224, clip.semantic_indices)):
        frames = VideoDecoder(video, num_ffmpeg_threads=1).get_frames_at(indices).data
        torch.nn.functional.interpolate(frames.float(), (side, side), mode="bilinear", antialias=True)


def seconds(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    return medians(rounds(functions, "cpu", repeats))


def line(name: str, value: str) -> None:
    print(f"{name:<66} {value}", flush=True)


def dual_rate(folder: Path, repeats: int) -> None:
    for length in (5, 10):
        clip, video = Clip(24 * length - 3, 256, 256, 24.0, 1.6), film(length)
        info = {"caption": "a", "duration": float(length), "fps": 24.0}  # as `lightning pack` has it
        write_shard(folder / f"film-{length}.tar", [{"__key__": "a", "mp4": video, "json": info}])
        stream = Stream(ClipDataset(Shards(str(folder / f"film-{length}.tar")), clip), seed=0, open_shards=1)
        line(f"{length} s of 480p H.264", f"{len(video) * 8e-6 / length:.1f} Mb/s")
        ways = {"ours": lambda s=stream: collate([s[0]]), "bare PyAV": lambda v=video, c=clip: bare_pyav(v, c)}
        for name, function in (("decord", decord_twice), ("torchcodec", torchcodec_twice)):
            if find_spec(name):
                ways[f"{name}, two passes"] = lambda f=function, v=video, c=clip: f(v, c)
        times = rounds(ways, "cpu", repeats)
        for name in list(ways)[1:]:
            ratio = faster(times["ours"], times[name])
            line(f"dual-rate clips of {length} s, 480p: clips/s against {name}", f"{ratio:.2f}")


def seeking(repeats: int) -> None:
    clip, video = Clip(49, 256, 256, 24.0, 1.6), film(60)
    starts = {"start": 2.0, "end": 57.5}
    times = seconds({n: lambda s=s: decode_clip(video, clip, s) for n, s in starts.items()}, repeats)
    line("2 s out of 60 s: time at the end over time at the start", f"{times['end'] / times['start']:.2f}")
    whole = seconds({"whole": lambda: list(av.open(io.BytesIO(video)).decode(video=0))}, 1)["whole"]
    line("… and over decoding the whole", f"{times['end'] / whole:.2f}")


@torch.no_grad()
def encoded(folder: Path, repeats: int, count: int = 64) -> None:
    encoder, vae = build_encoder("toy"), build_vae("toy")
    rows = [toy_clip("train", index, 0) for index in range(count)]
    write_shard(folder / "toy.tar", [{"__key__": key, "mp4": mp4, "json": info} for key, mp4, info in rows])
    clips = ClipDataset(Shards(str(folder / "toy.tar")), TOY)

    def parts(batch: dict) -> dict:
        return {"features": encoder(batch["semantic_frames"]), "latents": vae.encode(batch["frames"])}

    precompute_shards(clips, [Encoding(folder / "encoded", {}, parts)], batch_size=16, workers=0)
    ready = ClipDataset(Shards(str(folder / "encoded" / "*.tar")), TOY)
    ways = {
        "encoded": lambda: [collate([ready[i] for i in range(s, s + 16)]) for s in range(0, count, 16)],
        "videos": lambda: [parts(collate([clips[i] for i in range(s, s + 16)])) for s in range(0, count, 16)],
    }
    times = seconds(ways, repeats)
    line("encoded shards: clips/s against videos through encoder and VAE", f"{times['videos'] / times['encoded']:.1f}")


def reader(folder: Path, repeats: int, count: int = 200, size: int = 2 * 10**6) -> None:
    array = io.BytesIO()
    np.save(array, np.zeros(size // 2, np.float16))
    samples = ({"__key__": f"{i}", "features.npy": array.getvalue(), "json": {"caption": "a"}} for i in range(count))
    write_shard(folder / "reader.tar", samples)
    shards = Shards(str(folder / "reader.tar"))
    taken = seconds({"reader": lambda: [shards.read(index) for index in range(count)]}, repeats)["reader"]
    line("encoded shards: reader alone, from page cache", f"{count * size / taken / 1e6:,.0f} MB/s")


class Peaks(Dataset):
    """A stream of which only the peak memory of the process that reads it is delivered."""

    def __init__(self, stream: Stream):
        self.stream = stream

    def __getitem__(self, position: int) -> int:
        self.stream[position]
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory(folder: Path, count: int) -> None:
    """Growth of a worker's peak from a tenth of the way on; one sample in 32 is a film of a minute at 480p."""
    rows = [toy_clip("train", index, 0) for index in range(31)]
    samples = [{"__key__": key, "mp4": mp4, "json": info} for key, mp4, info in rows]
    write_shard(folder / "memory.tar", [*samples, {"__key__": "film", "mp4": film(60), "json": {"caption": "a"}}])
    stream = Stream(ClipDataset(Shards(str(folder / "memory.tar")), TOY), seed=0, open_shards=1)
    worker = DataLoader(
        Peaks(stream), batch_size=None, sampler=range(count), num_workers=1, worker_init_fn=prepare_worker
    )
    peaks = list(tqdm(worker, desc="memory", total=count, leave=False))
    line(f"a worker's peak memory: after {count:,} samples over after a tenth", f"{peaks[-1] / peaks[count // 10]:.3f}")


def mixing(shards: int = 400, samples: int = 250) -> None:
    """How far apart in an epoch's order those come that lie beside each other, in shares of a full permutation's."""

    def distance(open_shards: int) -> float:
        order = SampleOrder([samples] * shards, 0, open_shards)
        places = np.empty(order.count)
        places[[order(position) for position in range(order.count)]] = np.arange(order.count)
        return float(np.abs(np.diff(places)).mean())

    full = distance(shards)
    for open_shards in (8, 32, 128):
        name = f"neighbours of {shards} shards, {open_shards} open: distance against full mixing"
        line(name, f"{distance(open_shards) / full:.2f}")


def parts(options: argparse.Namespace, folder: Path) -> Iterator[None]:
    yield dual_rate(folder, options.repeats)
    yield seeking(options.repeats)
    yield encoded(folder, options.repeats)
    yield reader(folder, options.repeats)
    yield memory(folder, options.samples)
    yield mixing()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--samples", type=int, default=10_000, help="whose memory is watched")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        for _ in parts(parser.parse_args(), Path(scratch)):
            pass
