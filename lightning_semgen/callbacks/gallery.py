"""What a validation shows in TensorBoard: a few clips as every part sees them."""

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from data.batch import own_rows
from lightning_semgen.callbacks.board import writers
from lightning_semgen.errors import UserError
from lightning_semgen.evaluation.table import build_metrics
from lightning_semgen.stages.base import Stage
from lightning_semgen.stages.latent import LatentStage
from lightning_semgen.stages.semantic import SemanticStage
from lightning_semgen.video.generated import PREVIEW_FRAMES, LatentVideo, previews
from lightning_semgen.video.pictures import add_animation, animated_table, evenly
from lightning_semgen.video.principal_components import pca_colours

COUNTED, SHOWN = 8, 4  # clips of a validation: for which each rank generates, rows of a picture
REAL, GENERATED, NONE = "real semantics", "generated semantics", "the prompt alone"

Columns = dict[str, Tensor]  # uint8 videos (B, T, 3, H, W) by title


class Gallery(Callback):
    """Pictures of the first clips, and the metrics of what is generated for them.

    Every rank generates, since sharded networks need them all; the first one's clips are shown, all ranks' counted. A
    picture that fails is a warning and never ends a fit.

    Args:
        enabled: whether validations generate; false saves the time, and there are no metrics of videos.
    """

    def __init__(self, enabled: bool = True):
        self.enabled = enabled

    def on_validation_start(self, trainer: Trainer, stage: Stage) -> None:
        self.metrics = build_metrics(stage.device)

    def on_validation_batch_end(
        self, trainer: Trainer, stage: Stage, outputs, batch: dict, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx or trainer.sanity_checking or not self.enabled or not isinstance(stage, Stage):
            return
        batch = {name: values[:COUNTED] for name, values in batch.items()}
        own = own_rows(batch)
        try:
            with trainer.precision_plugin.forward_context():  # as in validation and predict
                shown = pictures(stage, loaded_partner(trainer, stage), batch)
        except Exception as error:
            if trainer.world_size > 1:
                raise  # the other ranks wait for this one in a collective
            return rank_zero_warn(f"There are no pictures of step {trainer.global_step}: {sentence(error)}")
        for name, columns in shown.items():
            for title in columns.keys() & {f"on {GENERATED}", f"on {NONE}"}:
                for metric in self.metrics.values():
                    metric.update(columns[title][own], [batch["info"][row] for row in own])
            for writer in writers(trainer):
                rows = {title: videos[:SHOWN] for title, videos in columns.items()}
                gif = animated_table(rows, batch["caption"][:SHOWN], stage.clip.num_frames / stage.clip.fps)
                add_animation(writer, f"gallery/{name}", gif, trainer.global_step)

    def on_validation_epoch_end(self, trainer: Trainer, stage: Stage) -> None:
        if trainer.sanity_checking or not isinstance(stage, Stage):
            return
        for name, metric in self.metrics.items():
            if metric.update_called:
                values = metric.compute()
                curves = {f"{name}/{value}": values[value] for value in metric.curves if value in values}
                stage.log_dict(curves, sync_dist=True)


@torch.no_grad()
def pictures(stage: Stage, partner: Stage | None, batch: dict) -> dict[str, Columns]:
    """The pictures of a validation batch. Some need the other stage and are missing without it."""
    semantic, latent = (stage, partner) if isinstance(stage, SemanticStage) else (partner, stage)
    z_sem = semantics(stage, semantic, batch)
    clips = originals(latent, batch)
    shown = {}
    if latent is not None:
        made = {f"on {name}": previews(latent.render(batch["caption"], batch["key"], z)) for name, z in z_sem.items()}
        shown["videos"] = clips | made
    if stage.space is not None:
        colours = pca_colours(torch.stack(list(z_sem.values())))  # one projection, so that colours compare
        features = {} if "moments" in batch else {"features": pca_colours(stage.space.features(batch))}
        shown["semantics"] = clips | features | dict(zip(z_sem, colours, strict=True))
    return shown


def loaded_partner(trainer: Trainer, stage: Stage) -> Stage | None:
    """The other stage, if it is trained; on all ranks or on none, since all ranks generate together.

    The first rank decides whether it is there, as a file system may show a new file to some machines only.
    """
    partner = None
    if trainer.strategy.broadcast(bool(stage.partner_run) and stage.can_make_videos()):
        try:
            partner = stage.partner
        except Exception as error:
            rank_zero_warn(f"The other stage's pictures are not shown: {sentence(error)}")
        if not trainer.strategy.reduce_boolean_decision(partner is not None, all=True):
            return None
    return partner


def sentence(error: Exception) -> str:
    """The text of a UserError; of any other error, its type too."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def semantics(stage: Stage, semantic: SemanticStage | None, batch: dict) -> dict[str, Tensor | None]:
    """z_sem (B, T', H', W', d) of the clips and those generated for their prompts."""
    if stage.space is None:
        return {NONE: None}
    found = {REAL: stage.space(batch)}
    if semantic is not None:
        found[GENERATED] = semantic.sample_semantics(batch["caption"], batch["key"])
    return found


def originals(latent: LatentStage | None, batch: dict) -> Columns:
    """The clips and the VAE's reconstruction of them; encoded shards hold no frames."""
    frames = batch.get("frames", batch.get("semantic_frames"))
    clips = {} if frames is None else {"video": evenly(frames, min(frames.shape[1], PREVIEW_FRAMES))}
    if latent is not None and ("latents" in batch or "frames" in batch):
        clips["VAE reconstruction"] = previews([LatentVideo(z, latent.vae) for z in latent.frozen.latents(batch)])
    return clips
