"""Trained runs as a function from prompts to videos."""

from pathlib import Path

import torch
import yaml
from lightning.fabric.utilities import move_data_to_device

from data.batch import collate
from data.datasets import Prompts, References
from lightning_semgen.errors import UserError
from lightning_semgen.runs import CONFIG, load_stage
from lightning_semgen.stages.latent import LatentStage
from lightning_semgen.video.generated import GeneratedVideo


class Generator:
    """Generates videos from prompts, the same ones as `lightning predict`."""

    def __init__(self, stage: LatentStage, precision: str | int | None = None):
        self.stage = stage
        dtype = {"bf16": torch.bfloat16, "16": torch.float16}.get(str(precision).removesuffix("-mixed"))
        self._autocast = torch.autocast(stage.device.type, dtype, enabled=dtype is not None)

    @classmethod
    def from_runs(
        cls, latent: str | Path, semantic: str | Path | None = None, device: str | torch.device | None = None
    ) -> "Generator":
        """The generator of two runs; UserError where one is missing or they do not fit.

        Args:
            latent: folder of the latent stage's run.
            semantic: of the semantic stage's; None: the run that the latent stage's compressor is from.
            device: None: the first accelerator, if there is one, else the CPU.
        """
        stage = load_stage(latent)
        if not isinstance(stage, LatentStage):
            raise UserError(f"{latent} is the run of a {type(stage).__name__}: name a LatentStage's as latent.")
        if semantic is not None:
            stage.partner_run = str(semantic)
        stage.generator = None  # the EMA samples
        stage.to(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
        stage.frozen.to(stage.device)
        config = yaml.safe_load((Path(latent) / CONFIG).read_text())
        return cls(stage, config["trainer"]["precision"])

    def __call__(
        self, prompt: str | list[str] = "", seed: int = 0, reference: str | Path | None = None
    ) -> GeneratedVideo | list[GeneratedVideo]:
        """The video of a prompt and a seed; several, for a list of prompts or a folder of references, are a list.

        Args:
            reference: a video whose semantics are taken in place of the semantic run's; no run is needed for them.
        """
        prompts = [{"caption": prompt}] if isinstance(prompt, str) else [{"caption": each} for each in prompt]
        rows = Prompts(prompts, seed)
        if reference is not None:
            rows = References(reference, self.stage.clip, prompts, seed)
        videos = [self._video(row) for row in rows]
        return videos[0] if isinstance(prompt, str) and len(videos) == 1 else videos

    @torch.inference_mode()
    def _video(self, row: dict) -> GeneratedVideo:
        batch = move_data_to_device(collate([row]), self.stage.device)
        with self._autocast:
            (video,) = self.stage.predict_step(batch, 0)["videos"]
        return GeneratedVideo(video, self.stage.clip.fps, row["caption"], row["seed"])
