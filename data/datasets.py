"""Shards, prompt files and reference videos as datasets; a sample is a dict, a batch a dict of tensors and lists."""

from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from data.clip import Clip
from data.codec.decode import decode_clip
from data.encoded.shards import PARTS, from_bytes
from data.order import SampleOrder
from data.pack.sources import SourceVideo, find_videos
from data.random_numbers import sample_key
from data.rejected import Rejected
from data.selection import Selection, select_caption
from data.shards.index import TEXTS
from data.shards.reader import VIDEO_EXTENSIONS, Shards
from data.shards.records import has_caption, merged
from lightning_semgen.errors import UserError

ANY = Selection()


class ClipDataset(Dataset):
    """The captioned samples of video or encoded shards; raises `Rejected` for one that cannot be used.

    A sample holds `frames` uint8 (T, 3, H, W) and `semantic_frames` (T_s, 3, H, W) or, from encoded shards, what they
    have of `features` (T', H', W', D), `moments` (T', H', W', 2d), `latents` (C, T_z, H_z, W_z) and `text` (L, dim);
    and `caption`, `info` (its JSON, and the caption), `sample` (its key). Without `needs_video` there are no `frames`,
    which saves converting and sending them.
    """

    def __init__(self, shards: Shards, clip: Clip, needs_video: bool = True, selection: Selection = ANY):
        self.shards, self.clip, self.needs_video, self.selection = shards, clip, needs_video, selection

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> dict:
        return self.sample(index)

    def sample(self, index: int, key: int | None = None) -> dict:
        """The sample with what is random about it drawn from `key`; without one the same for ever."""
        members = self.shards.read(index)
        described = caption_of(members, key)
        encoded = {part: from_bytes(members[f"{part}.npy"]) for part in PARTS if f"{part}.npy" in members}
        return described | (encoded or self._frames(members, described["info"], key))

    def first_usable(self, indices: Iterable[int], key: int | None = None) -> tuple[dict, list[tuple[str, str]]]:
        """The first of these samples that can be used, and (key, cause) of those before it that cannot."""
        rejected = []
        for index in indices:
            try:
                return self.sample(index, key), rejected
            except Rejected as cause:
                rejected.append((self.shards.samples[index][1], str(cause)))
        name, cause = rejected[-1]
        raise UserError(f"No sample of {self.shards.paths[0].parent} can be used; the last, {name}: {cause}.")

    def _frames(self, members: dict, info: dict, key: int | None) -> dict[str, Tensor]:
        video = video_of(members)
        return self.streams(video, self.clip, self.selection.begin(video, info, self.clip, key))

    def streams(self, video: bytes, clip: Clip, begin: float) -> dict[str, Tensor]:
        """The frames of a clip that begins at that second."""
        if not self.needs_video:
            return {"semantic_frames": decode_clip(video, clip, begin, semantic_only=True)}
        frames = decode_clip(video, clip, begin)
        return {"frames": frames, "semantic_frames": frames[clip.semantic_indices]}


class Stream(Dataset):
    """The endless stream of training samples: item p is what is delivered at position p.

    A rejected sample is replaced by the next good one of the epoch's order and reported in `rejected`.
    """

    def __init__(self, clips: ClipDataset, seed: int, open_shards: int):
        self.clips, self.seed = clips, seed
        self.order = SampleOrder(clips.shards.sizes, seed, open_shards)

    def __getitem__(self, position: int) -> dict:
        return self.sample(position, position)

    def sample(self, place: int, position: int) -> dict:
        """What is at a place of the order, as it is delivered at a position."""
        key = sample_key(self.seed, position)
        order = map(self.order, range(place, place + len(self.clips)))
        sample, rejected = self.clips.first_usable(order, key)
        return sample | {"position": position, "key": key, "rejected": rejected}


class FixedClips(Dataset):
    """Validation samples in order, with keys that never change, so that losses of different runs compare.

    A rejected sample is replaced by the next good one.
    """

    def __init__(self, clips: ClipDataset):
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict:
        sample, _ = self.clips.first_usable((index + step) % len(self) for step in range(len(self)))
        return sample | {"position": index, "key": sample_key("validation", index)}


class Prompts(Dataset):
    """Prompts to generate from: `caption`, `info` (what else is known of it), `seed`, and the `key` of its noise."""

    def __init__(self, infos: list[dict], seed: int, per_prompt: int = 1):
        self.rows = [(info, seed + repeat) for info in infos for repeat in range(per_prompt)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        info, seed = self.rows[index]
        key = sample_key("sample", seed, info["caption"])
        return {"caption": info["caption"], "info": info, "seed": seed, "number": index, "key": key}


class References(Prompts):
    """Videos whose semantics to generate from, one row for each of a video's prompts and seeds.

    A row of `Prompts` with `reference` (the video's key), its `frames` and its `semantic_frames`; raises UserError for
    a video that cannot be used.

    Args:
        source: a video, or a folder or table of them.
        prompts: that every video is generated with; None: each has its own caption, or the empty prompt.
    """

    def __init__(self, source: str | Path, clip: Clip, prompts: list[dict] | None, seed: int, per_prompt: int = 1):
        videos = find_videos(Path(source))
        for video in videos:
            if video.problem:
                raise UserError(f"The reference {video.path} cannot be used: {video.problem}.")
        pairs = [(video, info) for video in videos for info in prompts or [own_prompt(video)]]
        super().__init__([info for _, info in pairs], seed, per_prompt)
        self.videos = [video for video, _ in pairs for _ in range(per_prompt)]
        self.clip = clip

    def __getitem__(self, index: int) -> dict:
        video = self.videos[index]
        frames = reference_frames(video.path, self.clip)
        streams = {"frames": frames, "semantic_frames": frames[self.clip.semantic_indices]}
        return super().__getitem__(index) | {"reference": video.key} | streams


class Repeated(Dataset):
    """Rows and the first ones again, `repeated`, until their number divides by the ranks, who meet at every batch."""

    def __init__(self, rows: Dataset, ranks: int):
        self.rows, self.ranks = rows, ranks

    def __len__(self) -> int:
        return -(-len(self.rows) // self.ranks) * self.ranks

    def __getitem__(self, index: int) -> dict:
        return self.rows[index % len(self.rows)] | {"repeated": index >= len(self.rows)}


def own_prompt(video: SourceVideo) -> dict:
    return video.info | {"caption": select_caption(video.info, None) if has_caption(video.info) else ""}


@lru_cache(maxsize=1)  # the rows of a video follow each other
def reference_frames(path: Path, clip: Clip) -> Tensor:
    """Frames uint8 (T, 3, H, W) of the beginning of a video."""
    try:
        return decode_clip(path.read_bytes(), clip)
    except (Rejected, OSError) as cause:
        raise UserError(f"The reference {path} cannot be used: {cause}.") from cause


def video_of(members: dict) -> bytes:
    for extension in VIDEO_EXTENSIONS:
        if extension in members:
            return members[extension]
    raise Rejected("no video member")


def caption_of(members: dict, key: int | None = None) -> dict:
    """What a sample's .json and .txt say of it; raises `Rejected` where they have no caption."""
    info = merged(members.get("txt"), members.get("json"))
    if info is None or not has_caption(info):  # the shard has changed since it was indexed
        raise Rejected("no caption")
    return {"caption": select_caption(info, key), "info": info, "sample": members["__key__"]}


def captions(shards: Shards) -> list[dict]:
    """What is said of every sample that is not rejected."""
    infos = []
    for index in range(len(shards)):
        with suppress(Rejected):
            described = caption_of(shards.read(index, only=TEXTS))
            infos.append(described["info"] | {"caption": described["caption"]})
    return infos


def read_prompts(path: str) -> list[dict]:
    """A text file with one prompt a line; UserError where there is none."""
    if not Path(path).is_file():
        raise UserError(f"There is no prompt file {path}: data.prompts takes a text file with one prompt a line.")
    lines = Path(path).read_text("utf-8-sig").split("\n")
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"The prompt file {path} is empty: write one prompt a line.")
    return [{"caption": prompt} for prompt in prompts]
