"""One sentence when another rank has died."""

import re
from socket import gethostname

from lightning.pytorch import Callback, Trainer
from torch.distributed import DistError

from lightning_semgen.errors import UserError
from lightning_semgen.stages.base import Stage

GLOO = re.compile("gloo|pair closure")  # what its errors say, which are RuntimeErrors


class LostRank(Callback):
    """Replaces the long error of a collective, when another rank has died or is stuck, by one sentence."""

    def on_exception(self, trainer: Trainer, stage: Stage, exception: BaseException) -> None:
        if trainer.world_size > 1 and (isinstance(exception, DistError) or GLOO.search(str(exception))):
            raise UserError(
                f"Rank {trainer.global_rank} of {trainer.world_size}, on {gethostname()}, has lost another one"
                f" ({str(exception).strip().splitlines()[0]}): what that one printed last says why. Go on from the last"
                " checkpoint with --ckpt_path last."
            ) from exception
