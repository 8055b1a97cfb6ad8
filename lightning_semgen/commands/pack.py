"""`lightning pack`: captioned videos into shards."""

import os
from pathlib import Path

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveInt

CORES = os.cpu_count() or 1
PROMPT = (
    "Describe this video in one paragraph: who and what is to be seen, what they look like, what happens, where it is,"
    " and how the camera moves."
)


def pack(
    source: Path,
    out: Path,
    shard_size: PositiveInt = 512,
    val_share: ClosedUnitInterval = 0.0,
    segment_seconds: NonNegativeFloat = 60.0,
    caption_with: str | None = None,
    caption_prompt: str = PROMPT,
    workers: NonNegativeInt = CORES,
) -> None:
    """Packs captioned videos into WebDataset shards. If it was killed, the same command continues.

    Args:
        source: folder of videos, with captions in NAME.txt or NAME.json beside NAME.mp4 or in a captions.jsonl or
            captions.csv; or such a table itself, with columns path (or file), relative to the table, and caption; or
            one video; or shards of KEY.mp4 with KEY.txt or KEY.json: a folder of .tar files, one, or a quoted pattern
            like 'old/train-{000..099}.tar'. Whatever else is in the JSON or the table is kept.
        out: folder of the shards, train-*.tar, and of rejected.jsonl, which names the files that are left out and why.
        shard_size: size of a shard in MB.
        val_share: share of the videos to hold out, as val-*.tar; which ones depends on their names alone.
        segment_seconds: videos longer than 1.5 times this are cut, without sound and without encoding them again, at
            the key frames nearest to this far apart, into KEY_s000, KEY_s001, …; 0 is never. All others, and those that
            cannot be cut so, are copied byte for byte.
        caption_with: hub id or folder of a model of transformers, image-text-to-text with a chat template, that
            captions what has no caption.
        caption_prompt: what that model is asked.
        workers: processes that check the files, each of which is decoded from end to end.
    """
    from data.pack.packing import pack_videos  # help does not wait for what packing needs

    pack_videos(source, out, shard_size, val_share, segment_seconds, caption_with, caption_prompt, workers)
