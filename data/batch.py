"""A batch of samples, from the shards to the training step: every key, and who writes it.

B samples. A batch has the keys of its source: `ClipDataset` (training, validation), `Prompts` or `References`.
"""

from typing import TypedDict

import torch
from torch import Tensor


class Batch(TypedDict, total=False):
    """What `collate` makes of samples."""

    # of every source
    caption: list[str]  # the sample's caption, one of them where it has several
    info: list[dict]  # the sample's JSON
    key: Tensor  # (B,) int64: everything random about a sample is a function of it (`random_numbers`)

    # video shards (ClipDataset)
    frames: Tensor  # (B, T, 3, H, W) uint8 at data.fps; absent where the model needs the semantic stream alone
    semantic_frames: Tensor  # (B, T_s, 3, H, W) uint8 at data.semantic_fps

    # encoded shards (ClipDataset, CutClips), written by `Encoding` from what `FrozenParts.precompute` says
    features: Tensor  # (B, T', H', W', D) float32
    moments: Tensor  # (B, T', H', W', 2d) float32: what a frozen compressor makes of features, in their place
    latents: Tensor  # (B, C, T_z, H_z, W_z) float32, normalised
    text: list[Tensor]  # B × (L, text_dim) float32, unpadded

    # which sample it is
    sample: list[str]  # its key in the shard (ClipDataset)
    position: Tensor  # (B,) int64: place in the stream (Stream), or in the validation clips (FixedClips)
    shape: list[tuple[int, int, int]]  # (num_frames, height, width) of its bucket (BucketStream)
    rejected: list[list[tuple[str, str]]]  # (key, cause) of the samples that it replaces (Stream)

    # videos longer than a clip, while they are encoded (Stretches)
    starts: list[list[float]]  # seconds of the video at which clips begin

    # validation clips, prompts and references, which ranks share (Repeated)
    repeated: list[bool]  # whether the row is another rank's too and only fills the batch

    # prompts and references (Prompts, References)
    seed: list[int]
    number: list[int]  # the row
    reference: list[str]  # the key of the reference video


def collate(samples: list[dict]) -> Batch:
    """Stacks tensors except `text`, makes tensors of `position` and `key`, and lists everything else."""
    batch = {name: [sample[name] for sample in samples] for name in samples[0]}
    for name, values in batch.items():
        if isinstance(values[0], Tensor) and name != "text":
            batch[name] = torch.stack(values)
        elif name in ("position", "key"):
            batch[name] = torch.tensor(values)
    return batch


def own_rows(batch: Batch) -> list[int]:
    """The rows of a batch that no other rank has; all of a training batch."""
    return [row for row, repeated in enumerate(batch.get("repeated", [False] * len(batch["key"]))) if not repeated]
