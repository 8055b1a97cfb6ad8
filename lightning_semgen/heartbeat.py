"""A rank that dies ends the others with one sentence, whatever the backend and the launcher."""

import os
import sys
import time
from contextlib import suppress
from datetime import timedelta
from itertools import count
from socket import gethostname
from threading import Event, Thread

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed import DistError, TCPStore

from lightning_semgen.errors import UserError

BEAT = 0.5  # seconds between two signs of life


class Heartbeat(Callback):
    """Ends this rank of a fit when another has died.

    Each rank counts on in the store where the ranks met and looks at the others' counts. That is in rank 0 or, under
    torchrun, beside it; when it is gone, rank 0 is named.

    Args:
        timeout: seconds without a sign of life after which a rank is taken for dead; a collective that fails has it
            looked for at once.
    """

    def __init__(self, timeout: float = 120.0):
        self.timeout = timeout
        self.over = Event()
        self.over.set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size == 1:
            return
        self.rank, self.names = trainer.global_rank, [f"heartbeat/{rank}" for rank in range(trainer.world_size)]
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(*address, is_master=False, timeout=timedelta(seconds=self.timeout))
        store.set(self.names[self.rank], gethostname())
        trainer.strategy.barrier()
        self.signs, self.heard = store.multi_get(self.names), [time.monotonic() for _ in self.names]
        self.over.clear()
        Thread(target=self._exchange, args=(store,), daemon=True).start()
        Thread(target=self._watch, daemon=True).start()

    def _exchange(self, store: TCPStore) -> None:
        with suppress(DistError):
            for beat in count():
                store.set(self.names[self.rank], f"{gethostname()} {beat}")
                self._hear(store.multi_get(self.names))
                if self.over.wait(BEAT):
                    return

    def _watch(self) -> None:
        """In a thread of its own, since a store whose machine hangs may not answer for ever."""
        while not self.over.wait(BEAT):
            if dead := self._dead(self.timeout):
                print(f"lightning: {dead}", file=sys.stderr, flush=True)
                os._exit(1)  # the main thread may be in a collective that never ends

    def _hear(self, signs: list[bytes]) -> None:
        for rank, (sign, before) in enumerate(zip(signs, self.signs, strict=True)):
            if sign != before:
                self.heard[rank] = time.monotonic()
        self.signs = signs

    def _dead(self, seconds: float) -> str | None:
        """The first that has been silent for that long, as a sentence."""
        now = time.monotonic()
        for rank, (heard, sign) in enumerate(zip(self.heard, self.signs, strict=True)):
            if rank != self.rank and now - heard > seconds:
                return (
                    f"Rank {rank} of {len(self.signs)}, on {sign.decode().split()[0]}, has died: no sign of life for"
                    f" {now - heard:.0f} s. Its own output or SLURM's says why. This rank ends too: go on from the last"
                    " checkpoint with --ckpt_path last."
                )
        return None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """UserError in place of what a collective says when a rank has died under it."""
        if not self.over.is_set() and (type(exception) is RuntimeError or isinstance(exception, DistError)):
            time.sleep(5 * BEAT)
            if dead := self._dead(4 * BEAT):
                raise UserError(dead) from exception
        self.over.set()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.barrier()  # nobody leaves before all are done
        self.over.set()
