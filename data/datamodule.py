"""The data module: shards to batches, on any number of ranks and workers; its state is one integer."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveInt
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset

from data.batch import collate
from data.buckets import BucketStream, clips_of, split_into
from data.clip import Clip
from data.datasets import ClipDataset, FixedClips, Prompts, References, Repeated, Stream, captions, read_prompts
from data.encoded.cuts import CutClips
from data.encoded.options import EncodedOptions
from data.encoded.precompute import precompute
from data.encoded.shards import check_fingerprint, encoded_paths
from data.interface import ClipModel
from data.order import PositionBatches
from data.selection import Selection
from data.shards.reader import MAX_MEMBER_MB, Shards
from data.toy.shards import TOY_HELDOUT, render_toy_world
from data.workers import prepare_worker
from lightning_semgen.errors import UserError


class VideoDataModule(LightningDataModule):
    """Captioned clips from WebDataset shards, and prompts to generate from.

    Args:
        train_shards: shards to train on: glob or brace pattern or a list of them, paths or URLs (s3://, gs://, https://).
        val_shards: the same for validation and test.
        batch_size: clips in a batch of one device.
        num_frames: frames of a clip at `fps`; 4k + 1 for VAEs that compress time by 4.
        height: height of the frames in pixels; a video is scaled to cover height and width, and cropped in the middle.
        width: width of the frames in pixels.
        fps: frames per second that the VAE sees.
        semantic_fps: frames per second that the semantic encoder sees.
        buckets: shapes of training clips, [[height, width, num_frames], …]. Each video goes to the shape that fits it
            best, each batch has one shape; null: one shape, that of `height`, `width` and `num_frames`.
        encoded: folder of encoded shards, seen by all nodes. The first fit or `lightning encode` runs the frozen parts
            over all clips and writes their output there; training reads it. null: the frozen parts run in each step.
        encoded_seconds: seconds in the middle of each training video that encoded shards hold; .inf: all. Training
            cuts clips from them at `clip_start`. null: one clip of each video.
        clip_start: where a training clip lies in a longer video: "random", drawn anew each time, or "centre". Clips of
            validation, and of encoded shards without `encoded_seconds`, are in the centre.
        min_duration: seconds; shorter videos are rejected.
        min_fps: frames per second; slower videos are rejected. Otherwise their frames repeat on the grid of `fps`.
        max_bad_share: share of rejected samples above which a fit or an encode stops.
        open_shards: number of shards whose samples are mixed with each other; a run reads from that many at a time.
        toy_clips: if > 0, a toy world with that many training clips is rendered where the shards are missing.
        toy_scenes: scenes of a toy clip, of equal length: 1, or 3 or 4 with one sprite and a cut between two scenes.
        prompts: text file with one prompt a line, for predict.
        reference: video, or folder or table of videos, for predict. New videos follow their semantics (layout and
            motion), with every prompt of `prompts`, else with the video's own caption, else with the empty prompt.
        samples_per_prompt: videos for each prompt, with seeds `seed`, `seed` + 1, …
        max_member_mb: size in MB above which a file in a shard is not read and its sample is rejected.
        allow_pipe: whether shards may be commands, "pipe:COMMAND"; their output is copied once to this machine.
        num_workers: processes that read and decode.
        seed: seed of the order of samples and of everything random about them; seed_everything sets it.
    """

    def __init__(
        self,
        train_shards: str | list[str] = "shards/toy/train-*.tar",
        val_shards: str | list[str] = "shards/toy/heldout-*.tar",
        batch_size: int = 32,
        num_frames: int = 49,
        height: int = 48,
        width: int = 48,
        fps: float = 24.0,
        semantic_fps: float = 1.6,
        buckets: list[list[int]] | None = None,
        encoded: str | None = None,
        encoded_seconds: float | None = None,
        clip_start: Literal["random", "centre"] = "random",
        min_duration: NonNegativeFloat = 0.0,
        min_fps: NonNegativeFloat = 0.0,
        max_bad_share: ClosedUnitInterval = 0.05,
        open_shards: PositiveInt = 32,
        toy_clips: int = 0,
        toy_scenes: Literal[1, 3, 4] = 1,
        prompts: str | None = None,
        reference: str | None = None,
        samples_per_prompt: int = 1,
        max_member_mb: int = MAX_MEMBER_MB,
        allow_pipe: bool = False,
        num_workers: int = 1,
        seed: int = 0,
    ):
        super().__init__()
        self.shards = {"train": train_shards, "val": val_shards}
        self.clip = Clip(num_frames, height, width, fps, semantic_fps)
        self.buckets = clips_of(buckets or [], self.clip)
        self.selection = Selection(clip_start, min_duration, min_fps)
        self.max_bad_share, self.open_shards = max_bad_share, open_shards
        self.encoded = None if encoded is None else Path(encoded)
        seconds = {"train": encoded_seconds, "val": None}
        self.encoded_options = EncodedOptions(self.encoded, seconds, self.clip, self.selection)
        self.encoded_options.check_room()
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.prompts, self.reference, self.samples_per_prompt = prompts, reference, samples_per_prompt
        self.toy_clips, self.toy_scenes = toy_clips, toy_scenes
        self.max_member_mb, self.allow_pipe = max_member_mb, allow_pipe
        self.delivered = 0
        if self.encoded is not None:
            self._refuse_buckets(self.encoded)

    @property
    def model(self) -> ClipModel:
        return self.trainer.lightning_module

    # What has to be there before training

    def prepare_data(self) -> None:
        if self.trainer.state.fn == "predict":
            return
        if self.toy_clips:
            render_toy_world(self.shards["train"], "train", self.toy_clips, self.clip, self.toy_scenes)
            render_toy_world(self.shards["val"], "heldout", TOY_HELDOUT, self.clip, self.toy_scenes)

    def setup(self, stage: str) -> None:
        if self.encoded is not None and stage in ("fit", "validate"):
            precompute([(self, self.model)], self.trainer.global_rank, self.trainer.world_size)
        for clip in self.buckets if stage == "fit" else []:
            self._check(clip)

    def _check(self, bucket: Clip) -> None:
        if not hasattr(self.model, "check_clip"):
            raise UserError(f"data.buckets is not for {type(self.model).__name__}: set it to null.")
        try:
            self.model.check_clip(bucket)
        except UserError as error:
            shape = [bucket.height, bucket.width, bucket.num_frames]
            raise UserError(f"data.buckets holds {shape}, which this stage cannot be trained on. {error}") from error

    @property
    def clip_options(self) -> dict:
        """The options that decide which clips encoded shards hold."""
        shards = {f"{split}_shards": patterns for split, patterns in self.shards.items()}
        stretch = {"encoded_seconds": self.encoded_options.seconds["train"]}
        bounds = self.encoded_options.bounds
        return shards | vars(self.clip) | bounds | stretch | {"max_member_mb": self.max_member_mb}

    def clips(self, split: str, encoded: bool) -> ClipDataset:
        """The captioned clips of a split, from video shards or from encoded shards."""
        shards = self._shards(self.shards[split])
        if encoded:
            shards = self._shards([str(path) for path in encoded_paths(shards, self.encoded / split)])
        stretches = False
        for folder in {path.parent for path in shards.paths}:
            if (folder / "fingerprint.json").exists():  # encoded shards, whoever named them
                self._refuse_buckets(folder)
                check_fingerprint(folder, self.encoded_options.fingerprint(split, self.model))
                stretches = self.encoded_options.seconds[split] is not None
        if shards.uncaptioned:
            rank_zero_info(
                f"{split}: {shards.uncaptioned} samples without a caption are skipped, {len(shards)} are used."
            )
        if stretches:
            return CutClips(shards, self.clip, self.selection, self.model.cut_parts)
        return ClipDataset(shards, self.clip, self.model.needs_video, self.selection)

    def _refuse_buckets(self, folder: Path) -> None:
        if self.buckets:
            raise UserError(
                f"The encoded shards in {folder} are of one shape, so data.buckets cannot be used with them: train on"
                " video shards, with data.encoded null, or set data.buckets to null."
            )

    def _shards(self, patterns: str | list[str]) -> Shards:
        return Shards(patterns, self.max_member_mb, self.allow_pipe)

    # Loaders

    def train_dataloader(self) -> DataLoader:
        return self.stream(lambda: self.delivered)

    def stream(self, start: Callable[[], int]) -> DataLoader:
        """The endless training stream from the position that `start` gives."""
        clips = self.clips("train", self.encoded is not None)
        if self.buckets:
            clips = BucketStream(split_into(self.buckets, clips), self.seed, self.open_shards, self.global_batch_size)
        else:
            clips = Stream(clips, self.seed, self.open_shards)
        batches = PositionBatches(start, self.batch_size, self.trainer.global_rank, self.trainer.world_size)
        return self._loader(clips, batch_sampler=batches, persistent_workers=self.num_workers > 0)

    def val_dataloader(self) -> DataLoader:
        return self._shared_by_ranks(FixedClips(self.clips("val", self.encoded is not None)))

    def test_dataloader(self) -> DataLoader:
        prompts = Prompts(captions(self._shards(self.shards["val"])), self.seed, self.samples_per_prompt)
        return self._shared_by_ranks(prompts)

    def predict_dataloader(self) -> DataLoader:
        if self.prompts is None and self.reference is None:
            raise UserError(
                "There is nothing to generate from: give a text file with one prompt a line as --data.prompts, or a"
                " video as --data.reference."
            )
        prompts = None if self.prompts is None else read_prompts(self.prompts)
        if self.reference is None:
            rows = Prompts(prompts, self.seed, self.samples_per_prompt)
        else:
            rows = References(self.reference, self.clip, prompts, self.seed, self.samples_per_prompt)
        return self._shared_by_ranks(rows)

    def _shared_by_ranks(self, rows: Dataset) -> DataLoader:
        """Loads every row once. Some ranks get rows that are marked `repeated`: all ranks need equally many batches."""
        rows = Repeated(rows, self.trainer.world_size)
        share = range(self.trainer.global_rank, len(rows), self.trainer.world_size)
        return self._loader(rows, batch_size=self.batch_size, sampler=share)

    def _loader(self, dataset: Dataset, **options) -> DataLoader:
        workers = {"num_workers": self.num_workers, "worker_init_fn": prepare_worker}
        pinned = self.trainer.strategy.root_device.type == "cuda"  # so that copies to the GPU do not wait
        return DataLoader(dataset, collate_fn=collate, pin_memory=pinned, **workers, **options)

    # State: how many samples have been delivered, on all ranks together

    @property
    def global_batch_size(self) -> int:
        return self.trainer.world_size * self.batch_size

    def on_after_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        if self.trainer.training:
            first = int(batch["position"][0]) - self.trainer.global_rank * self.batch_size
            self.delivered = first + self.global_batch_size
        return batch

    def state_dict(self) -> dict:
        return {"delivered": self.delivered}

    def load_state_dict(self, state: dict) -> None:
        self.delivered = state["delivered"]
        if self.buckets and self.delivered % self.global_batch_size:
            raise UserError(
                f"With data.buckets a run goes on at whole batches, but the {self.delivered} samples that this one has"
                f" seen are no multiple of the {self.global_batch_size} of a batch on all devices: keep data.batch_size"
                " times the number of devices as it was."
            )
