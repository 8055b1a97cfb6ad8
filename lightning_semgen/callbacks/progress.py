"""The progress bar of a fit."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


class Progress(TQDMProgressBar):
    """Shows the steps done, out of trainer.max_steps."""

    def __init__(self):
        super().__init__(refresh_rate=10)

    def on_train_epoch_start(self, trainer: Trainer, *_) -> None:
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description("training")

    def get_metrics(self, trainer: Trainer, stage: LightningModule) -> dict[str, float | str]:
        metrics = super().get_metrics(trainer, stage)
        return {name.rpartition("/")[2]: value for name, value in metrics.items() if name != "v_num"}
