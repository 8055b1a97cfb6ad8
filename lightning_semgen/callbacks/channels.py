"""The channels of semantics at each validation, while this run learns the compressor."""

from lightning import Callback, Trainer
from torch import Tensor

from data.batch import own_rows
from lightning_semgen.callbacks.board import writers
from lightning_semgen.evaluation.channel_statistics import ChannelStatistics
from lightning_semgen.stages.base import Stage

ACTIVE = 0.01  # nats per token, below which a channel tells next to nothing


class Channels(Callback):
    """Histograms over channels of their mean, standard deviation and KL, and the channels at either end as curves."""

    def on_validation_start(self, trainer: Trainer, stage: Stage) -> None:
        self.statistics = None
        if isinstance(stage, Stage) and stage.learns_compressor and not trainer.sanity_checking:
            self.statistics = ChannelStatistics(stage.space.channels).to(stage.device)

    def on_validation_batch_end(self, trainer, stage, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if self.statistics is not None:
            own = own_rows(batch)
            self.statistics.update(outputs["z_sem"][own], outputs["kl"][own])

    def on_validation_epoch_end(self, trainer: Trainer, stage: Stage) -> None:
        if self.statistics is not None:
            show(trainer, stage, self.statistics.compute())


def show(trainer: Trainer, stage: Stage, channels: dict[str, Tensor]) -> None:
    has_posterior = stage.space.compressor.dim is not None
    values = {
        "mean farthest from 0": channels["mean"].abs().max(),
        "smallest std": channels["std"].min(),
        "largest std": channels["std"].max(),
    }
    if has_posterior:
        values["active channels"] = (channels["KL"] > ACTIVE).sum().float()
    stage.log_dict({f"z_sem/{name}": value for name, value in values.items()}, sync_dist=True)
    for writer in writers(trainer):
        for name in ("mean", "std", "KL") if has_posterior else ("mean", "std"):
            writer.add_histogram(f"z_sem/{name} of each channel", channels[name], trainer.global_step)
