"""Shards of the toy world, rendered where they are missing."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from tqdm import tqdm

from data.clip import Clip
from data.shards.index import index_path
from data.shards.writer import write_shard
from data.toy.scenes import toy_story
from data.toy.world import toy_clip
from lightning_semgen.errors import UserError

TOY_SHARD, TOY_HELDOUT = 256, 192  # clips in a shard of the toy world; 192 = 12 of each held-out composition


def render_toy_world(pattern: str | list[str], split: str, clips: int, clip: Clip, scenes: int = 1) -> None:
    """Writes the shards of a split of the toy world that are missing; the `*` of the pattern is their number."""
    if not isinstance(pattern, str) or pattern.count("*") != 1:
        raise UserError(
            f"The toy world is rendered to one pattern with one *, such as shards/toy/train-*.tar, not {pattern}."
        )
    starts = {Path(pattern.replace("*", f"{n:06d}")): n * TOY_SHARD for n in range(-(-clips // TOY_SHARD))}
    todo = {p: range(s, min(s + TOY_SHARD, clips)) for p, s in starts.items() if not index_path(p).exists()}
    render = toy_clip if scenes == 1 else partial(toy_story, scenes=scenes)
    size = {"num_frames": clip.num_frames, "height": clip.height, "width": clip.width, "fps": clip.fps}
    bar = tqdm(total=sum(map(len, todo.values())), desc=f"rendering {split} clips", unit="clip", disable=not todo)
    with ProcessPoolExecutor() as pool, bar as progress:
        for path, indices in todo.items():
            write_shard(
                path, _samples(pool.map(partial(render, split, seed=0, **size), indices, chunksize=8), progress)
            )


def _samples(clips: Iterable[tuple[str, bytes, dict]], progress: tqdm) -> Iterator[dict]:
    for key, mp4, info in clips:
        progress.update()
        yield {"__key__": key, "mp4": mp4, "json": info}
