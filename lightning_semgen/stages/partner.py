"""The other stage of a run: a semantic stage needs a latent stage to make videos, and the other way round."""

from pathlib import Path

from lightning import LightningModule

from lightning_semgen.errors import UserError
from lightning_semgen.runs import LAST, load_stage
from lightning_semgen.training.checkpoints import is_checkpoint


def is_trained(run: str | None) -> bool:
    """Whether a run has been named and has a checkpoint."""
    return run is not None and is_checkpoint(Path(run) / LAST)


def load_partner(stage: LightningModule) -> LightningModule:
    """The stage of `stage.partner_run`, on this one's device, with this one's encoders where they are the same.

    UserError where no run is named, or its semantics are of another space.
    """
    if stage.partner_run is None:
        raise UserError(
            f"{type(stage).__name__} makes videos together with another run: name it as {stage.partner_option}."
        )
    partner = load_stage(stage.partner_run)
    stage.space.check_same(partner.space, stage.partner_run)
    partner.generator = None  # its EMA samples
    partner.frozen.share(stage.frozen)
    partner.to(stage.device)
    partner.frozen.to(stage.device)
    return partner
